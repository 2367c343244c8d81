"""Ask the real llama-server for its own memory table, on files without weights; see `planner.py`."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from labdeploy.runners.llama_memory import LlamaMemorySettings

# A mount namespace of its own: what is mounted here is gone with the process.
_ENTER = """
root=$1; models=$2; shift 2
mount --bind "$models" "$root/mnt" && mount --rbind /dev "$root/dev" && mount --rbind /sys "$root/sys" &&
mount -t proc proc "$root/proc" && mount -t tmpfs tmpfs "$root/tmp" && exec chroot "$root" "$@"
"""
# `|   - Vulkan0 (llvmpipe) | 24105 = 22916 + (2476 =  1860 +     480 +     136) + -1287 |`, and the same for Host
_DEVICE = re.compile(r"\|\s+- (Vulkan\d+|Host) .*?= +(\d+) \+ +(\d+) \+ +(\d+)\D")
_VERSION = re.compile(r"version: (.*)")
TIMEOUT_S = 60


@dataclass(frozen=True)
class Taken:
    """One line of the table, in whole MiB as llama.cpp rounds them down."""

    model_mib: int
    context_mib: int
    compute_mib: int

    @property
    def total_mib(self) -> int:
        """All three."""
        return self.model_mib + self.context_mib + self.compute_mib


@dataclass(frozen=True)
class Llama:
    """A llama-server in a root of its own, which sees the folder `models` as /mnt."""

    root: Path
    models: Path

    def argv(self, *argv: str) -> list[str]:
        """Return the command line that starts it there."""
        enter = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh")
        return [*enter, str(self.root), str(self.models), "llama-server", *argv]

    def build(self) -> str:
        """Return its version."""
        done = subprocess.run(self.argv("--version"), capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        found = _VERSION.search(done.stdout + done.stderr)
        return found[1] if found else "unknown"

    def table(self, name: str, settings: LlamaMemorySettings) -> tuple[Taken, ...]:
        """Return its table for these settings: the GPUs, then the host. It is stopped before it loads anything."""
        words = ("--model", f"/mnt/{name}", "--host", "/tmp/x.sock", "-lv", "4", *flags(settings))  # noqa: S108
        devices: list[Taken] = []
        seen: list[str] = []
        with running(self.argv(*words), settings.n_gpus) as lines:
            for line in lines:
                seen.append(line)
                found = _DEVICE.search(line) if "breakdown" in line else None
                if found:
                    devices.append(Taken(*map(int, found.groups()[1:])))
                if found and found[1] == "Host":
                    return tuple(devices)
        raise RuntimeError(f"no table from llama-server {' '.join(words)}:\n" + "".join(seen[-20:]))


@contextmanager
def running(argv: list[str], n_gpus: int) -> Iterator[Iterator[str]]:
    """Run it with as many software GPUs as asked for: llama.cpp takes a device twice when it is named twice."""
    env = os.environ | {"GGML_VK_VISIBLE_DEVICES": ",".join(["0"] * n_gpus)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        yield iter(process.stdout or ())
    finally:
        process.kill()
        process.communicate()


def flags(settings: LlamaMemorySettings) -> list[str]:
    """Return the flags that say these settings."""
    on_off = {True: "on", False: "off"}
    words = {
        "--ctx-size": settings.ctx_size,
        "--parallel": settings.parallel,
        "--batch-size": settings.batch_size,
        "--ubatch-size": settings.ubatch_size,
        "--cache-type-k": settings.cache_type_k,
        "--cache-type-v": settings.cache_type_v,
        "--flash-attn": on_off[settings.flash_attn],
    }
    if settings.n_gpus:
        words |= {"--gpu-layers": settings.gpu_layers}
        words |= {"--n-cpu-moe": settings.n_cpu_moe} if settings.n_cpu_moe else {}
        words |= {"--tensor-split": ",".join(f"{share:g}" for share in settings.tensor_split or (1,) * settings.n_gpus)}
    else:
        words |= {"--device": "none"}
    switches = ["--kv-unified" if settings.kv_unified else "--no-kv-unified"]
    switches += [] if settings.repack else ["--no-repack"]
    switches += ["--swa-full"] if settings.swa_full else []
    return [str(word) for pair in words.items() for word in pair] + switches
