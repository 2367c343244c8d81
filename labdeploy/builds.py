"""Builds of runners: how they are named, which one a host's services name, and what a lock of vLLM asks of a host.

A build is `/opt/labdeploy/runners/RUNNER/VERSION-HASH/` on a host, with its program at `bin/RUNNER`. HASH is of what it
was made from: a lock of wheels, or an archive. Units name this path, so that going back a generation is going back to
its build. All of it is pure; builds_lock.py makes locks, builds_install.py and builds.sh put builds on hosts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError
from labdeploy.runners import RUNNERS
from labdeploy.schema import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from labdeploy.inventory import Host

ROOT = "/opt/labdeploy/runners"
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]*")
NAME = re.compile(rf"({VERSION.pattern})-([0-9a-f]{{8}})")
LOCKS = "runners"  # the folder beside the inventory
SHOWN = 6  # of a list in a message


@dataclass(frozen=True)
class Variant:
    """What vLLM was compiled for. From CUDA's table of least drivers, and docker/Dockerfile of vLLM 0.33.0."""

    device: str
    """What vLLM calls the platform it finds."""
    torch_backend: str | None
    """uv's name of the index that has this torch; None where PyPI's own is the one."""
    driver: tuple[int, ...] = ()
    capability: tuple[int, int] = (0, 0)
    room_mib: int = 0
    """Of the disk. Measured for the CPU: 2.2 GiB and as much again while it is made; 4.1 GiB of wheels for CUDA."""


VARIANTS = {
    "cpu": Variant("cpu", "cpu", room_mib=5 * 1024),
    "cu129": Variant("cuda", "cu129", (525, 60, 13), (7, 5), 20 * 1024),
    "cu130": Variant("cuda", None, (580,), (7, 5), 20 * 1024),
}


@dataclass(frozen=True)
class Facts:
    """What a host says of itself before anything is installed there."""

    arch: str = "x86_64"
    pythons: tuple[str, ...] = ()
    uv: str | None = None
    tools: tuple[str, ...] = ()
    room_mib: int | None = None
    driver: str | None = None
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build:
    """A build on a host."""

    runner: str
    name: str
    size_mib: int
    at: str
    named_by: str
    """Generations whose units name it, as `4 7`; with `installed` where an installed unit does."""


# --- names and paths ----------------------------------------------------------------------------------------------


def name_of(version: str, content_hash: str) -> str:
    """Name a build by its version and the sha256 of what it was made from."""
    return f"{version}-{content_hash[:8]}"


def program(runner: str, name: str) -> str:
    """Give the path of a build's program, which units name."""
    return f"{ROOT}/{runner}/{name}/bin/{runner}"


def known(lock: Mapping[str, Any], host: str, runner: str) -> tuple[tuple[str, ...], str | None]:
    """Give what the lock knows of a host: builds that were installed, and the one its services name."""
    of_host = lock.get("builds", {}).get(host, {})
    entry = of_host.get(runner, {}) if isinstance(of_host, dict) else None
    if isinstance(entry, dict):
        installed, use = entry.get("installed", []), entry.get("use")
        if isinstance(installed, list) and all(isinstance(n, str) for n in installed) and isinstance(use, str | None):
            return tuple(installed), use
    what = "in the lock: expected installed: [NAME, ...] and use: NAME"
    raise InventoryError(
        what, where=f"builds.{host}.{runner}", hint="git log -p -- '*.lock.yaml'  # its last good state"
    )


def with_programs(host: Host, lock: Mapping[str, Any]) -> Host:
    """Give the host with the path of every runner that its services may take, whichever way it was named.

    The inventory wins: a path, the name of a build, or a version of which one build is known. Else the build that
    `runner use` chose. Else the runner's own default place.
    """
    wanted = {name for s in host.services.values() for name in (RUNNERS if s.runner == "auto" else (s.runner,))}
    return dataclasses.replace(
        host, runners={**host.runners, **{runner: _path(host, runner, lock) for runner in sorted(wanted)}}
    )


def _path(host: Host, runner: str, lock: Mapping[str, Any]) -> str:
    installed, used = known(lock, host.name, runner)
    named = host.runners.get(runner) or used
    if named is None:
        return RUNNERS[runner].default_binary
    return named if named.startswith("/") else program(runner, one_build(host.name, runner, named, installed, used))


def require_version(text: str) -> None:
    """Refuse what cannot be the version of a build; `0.33.0-rc2` can, what looks like a whole build's name cannot."""
    if not VERSION.fullmatch(text):
        raise InventoryError(f"{text!r} is not a version", hint="letters, digits, '.', '+', '_' and '-'")
    if NAME.fullmatch(text):
        what = f"{text!r} is the name of a build, not a version"
        raise InventoryError(what, hint="leave the last '-' and what follows it away")


def one_build(host: str, runner: str, named: str, installed: Sequence[str], used: str | None = None) -> str:
    """Give the one build that a name or a version means."""
    if NAME.fullmatch(named):
        return named
    found = [name for name in installed if name.rpartition("-")[0] == named]
    if used in found:
        return used
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{named} may be {' or '.join(found)}"
        raise InventoryError(
            what, where=f"hosts.{host}.runners.{runner}", hint=f"labdeploy runner use {host} {runner} NAME"
        )
    near = did_you_mean(named, installed)
    raise InventoryError(
        f"no build {named} of {runner} is known to be on {host}{near}",
        where=f"hosts.{host}.runners.{runner}",
        hint=f"labdeploy runner install {host} {runner} {named}",
    )


# --- locks of vLLM ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WheelLock:
    """A lock of wheels: each package with its version and hashes, for one version of vLLM, variant and Python."""

    path: Path
    version: str
    variant: str
    python: str
    package: str
    content: bytes

    @property
    def name(self) -> str:
        """Names the build that is made from it."""
        return name_of(self.version, hashlib.sha256(self.content).hexdigest())

    @property
    def n_packages(self) -> int:
        """How many packages it names."""
        return len(re.findall(rb"^[A-Za-z0-9._-]+==", self.content, re.MULTILINE))

    @property
    def asks(self) -> Variant:
        """What its wheels ask of a host."""
        return VARIANTS[self.variant]

    @property
    def shim(self) -> str:
        """The version under which a rebuild of vLLM by another name must find itself; `-` for vLLM itself."""
        return "-" if self.package == "vllm" else f"{self.version}+{self.variant}"

    @property
    def torch_backend(self) -> str | None:
        """The index that its torch comes from, where it was not named by hand."""
        return self.asks.torch_backend if b"\n# torch: index\n" in self.content else None


def lock_name(version: str, variant: str, python: str) -> str:
    """Name the file of a lock."""
    return f"vllm-{version}-{variant}-py{python.replace('.', '')}.lock.txt"


def head(version: str, variant: str, python: str, package: str, *, torch_index: bool) -> str:
    """Write the first lines of a lock, which `read_lock` reads."""
    return (
        "# Written by `labdeploy runner lock`. Commit it; do not edit it.\n"
        f"# version: {version}\n# variant: {variant}\n# python: {python}\n# package: {package}\n"
        f"# torch: {'index' if torch_index else 'as found'}\n"
    )


def read_lock(path: Path) -> WheelLock:
    """Read a lock of wheels."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InventoryError(f"cannot be read: {error.strerror}", where=str(path)) from None
    said = dict(
        re.findall(r"^# (version|variant|python|package): (\S+)$", content.decode(errors="replace"), re.MULTILINE)
    )
    if len(said) < 4 or said["variant"] not in VARIANTS or not VERSION.fullmatch(said["version"]):  # noqa: PLR2004
        hint = "labdeploy runner lock vllm VERSION"
        raise InventoryError(
            "is not a lock that labdeploy wrote: its first lines are missing", where=str(path), hint=hint
        )
    return WheelLock(path, said["version"], said["variant"], said["python"], said["package"], content)


def find_lock(folder: Path, version: str, facts: Facts) -> WheelLock:
    """Pick the lock of a version that suits a host: the newest CUDA first, then a Python that is there already."""
    locks = (read_lock(path) for path in sorted((folder / LOCKS).glob(f"vllm-{version}-*.lock.txt")))
    found = [lock for lock in locks if lock.version == version]
    if not found:
        raise InventoryError(
            f"no lock of vLLM {version} in {folder / LOCKS}",
            hint=f"labdeploy runner lock vllm {version}  # --help shows variants and Pythons",
        )
    by_fit = sorted(found, key=lambda lock: (lock.asks.driver, lock.python in facts.pythons, lock.python), reverse=True)
    suits = [
        lock for lock in by_fit if not list(refusals(lock, facts)) and (lock.asks.device == "cuda") == has_gpu(facts)
    ]
    return next(iter(suits), by_fit[0])


def has_gpu(facts: Facts) -> bool:
    """Tell whether the host has an NVIDIA driver or GPU."""
    return bool(facts.driver or facts.capabilities)


def refusals(lock: WheelLock, facts: Facts) -> Iterator[tuple[str, str]]:
    """Say why a lock's wheels would not run on a host, each with what to change; nothing is downloaded before."""
    asks = lock.asks
    if asks.device == "cuda":
        yield from _gpu_refusals(lock, facts)
    if facts.room_mib is not None and facts.room_mib < asks.room_mib:
        yield f"needs {asks.room_mib} MiB below /opt, {facts.room_mib} MiB are free", "make room on the host"
    if facts.arch not in ("x86_64", "aarch64"):
        yield f"there are no wheels of vLLM for {facts.arch}", "serve a GGUF with llama-server there"


def _gpu_refusals(lock: WheelLock, facts: Facts) -> Iterator[tuple[str, str]]:
    asks, other = lock.asks, f"labdeploy runner lock vllm {lock.version} --variant"
    if facts.driver is None:
        yield "no NVIDIA driver is loaded", f"{other} cpu  # or install the driver"
    elif _numbers(facts.driver) < asks.driver:
        older = next((name for name, v in VARIANTS.items() if v.driver and v.driver <= _numbers(facts.driver)), None)
        hint = f"{other} {older}" if older else "install a newer driver"
        yield f"driver {facts.driver} is too old: {lock.variant} needs {'.'.join(map(str, asks.driver))}", hint
    for capability in facts.capabilities:
        if _numbers(capability) < asks.capability:
            least = ".".join(map(str, asks.capability))
            what = f"a GPU has compute capability {capability}, the wheels of vLLM begin at {least}"
            yield what, "serve a GGUF with llama-server there"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def wheels_of(lock: WheelLock, folder: Path) -> list[Path]:
    """Find in a folder the wheels that a lock names; InventoryError names those that are not there."""
    wanted = re.findall(r"^([A-Za-z0-9._-]+)==([^ \\\n]+)", lock.content.decode(), re.MULTILINE)
    by_key: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.glob("*.whl")):
        package, version, *_ = path.name.split("-")
        by_key.setdefault((_normal(package), version), []).append(path)
    missing = [f"{name}=={version}" for name, version in wanted if (_normal(name), version) not in by_key]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise InventoryError(
            f"{len(missing)} of {len(wanted)} wheels are not in {folder}: {', '.join(missing[:SHOWN])}{more}",
            hint=f"pip download --no-deps --require-hashes -r {lock.path} -d {folder}",
        )
    return [path for name, version in wanted for path in by_key[_normal(name), version]]


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
