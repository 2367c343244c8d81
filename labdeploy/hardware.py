"""What machines have: processors, memory and GPUs, as the inventory writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from labdeploy.schema import Int, ListOf, Mib, OneOf, Record, Size, Text, setting

SLOW_DISK_READ = Mib(100)  # a 7200 rpm SATA disk reads 80-160 MiB/s; no start may be called dead before that

Vendor = Literal["nvidia", "amd", "intel", "software"]
Backend = Literal["cuda", "rocm", "vulkan"]

_VENDOR_BY_NAME: tuple[tuple[str, Vendor], ...] = (
    (r"llvmpipe|lavapipe|software", "software"),
    (r"intel|\barc\b|battlemage|data center gpu", "intel"),
    (r"amd|radeon|\brx ?\d|instinct|\bmi\d", "amd"),
    (r"nvidia|geforce|\b(rtx|gtx|quadro|tesla|titan)\b|\b(gh|gb|[abhlptv])\d{1,3}[a-z]?\b", "nvidia"),
)
_BACKEND_BY_VENDOR: dict[Vendor, Backend] = {
    "nvidia": "cuda",
    "amd": "vulkan",  # needs no ROCm stack on the host; `backend: rocm` asks for it
    "intel": "vulkan",
    "software": "vulkan",
}


@dataclass(frozen=True)
class Cpu:
    """The processor of a machine."""

    cores: int = setting(Int(1, 4096), "physical cores, all sockets together")
    threads: int | None = setting(Int(1, 8192), "hardware threads; default: as many as cores", default=None)
    performance_cores: int | None = setting(
        Int(1, 4096), "fast cores of a hybrid processor (Intel P-cores); default: all cores", default=None
    )
    features: tuple[str, ...] | None = setting(
        ListOf(Text("a CPU flag", r"[a-z0-9_]+")),
        "flags of /proc/cpuinfo that matter: avx2, avx512f, asimddp, i8mm; default: as probed, else `avx2`",
        default=None,
    )

    @property
    def known_features(self) -> tuple[str, ...]:
        """The features to count with: as written or probed, else those of any x86 processor since 2013."""
        return ("avx2",) if self.features is None else self.features

    @property
    def compute_cores(self) -> int:
        """Cores that token generation should use: the slow ones of a hybrid only hold the fast ones up."""
        return min(self.performance_cores or self.cores, self.cores)


@dataclass(frozen=True)
class Gpu:
    """One GPU of a machine, in the order the driver lists them (by PCI bus)."""

    name: str = setting(Text("a GPU name"), "as people call it: `RTX 3090`")
    vram: Mib = setting(Size(least_mib=1), "its own memory")
    vendor: Vendor | None = setting(
        OneOf(("nvidia", "amd", "intel", "software")), "whose driver; default: told by the name", default=None
    )
    backend: Backend | None = setting(
        OneOf(("cuda", "rocm", "vulkan")),
        "what llama-server computes with; default: cuda for nvidia, else vulkan",
        default=None,
    )
    uuid: str | None = setting(
        Text("a GPU UUID", r"GPU-[0-9a-fA-F-]+"), "`nvidia-smi -L` shows it; stable across reboots", default=None
    )
    compute_capability: str | None = setting(
        Text("a compute capability such as 8.6", r"\d{1,2}\.\d"), "of an NVIDIA GPU", default=None
    )

    @cached_property
    def maker(self) -> Vendor:
        """The vendor: as written, else told by the name, else NVIDIA."""
        by_name = (vendor for pattern, vendor in _VENDOR_BY_NAME if re.search(pattern, self.name, re.IGNORECASE))
        return self.vendor or next(by_name, None) or "nvidia"

    @property
    def api(self) -> Backend:
        """The backend that llama-server uses on it."""
        return self.backend or _BACKEND_BY_VENDOR[self.maker]


@dataclass(frozen=True)
class Hardware:
    """What a machine has. Where `cpu` or `ram` is left out, that and all else that is not written is as probed."""

    cpu: Cpu = setting(Record(Cpu), "the processor; default: as probed", default=Cpu(cores=0))
    ram: Mib = setting(Size(least_mib=1), "main memory; default: as probed", default=Mib(0))
    gpus: tuple[Gpu, ...] = setting(
        ListOf(Record(Gpu)), "GPUs in the order the driver lists them; default: none, or as probed", default=()
    )
    disk_read: Mib | None = setting(
        Size(least_mib=1),
        "what the disk with the models reads in a second; starts are given time by it; "
        f"default: as probed, else `{SLOW_DISK_READ}MiB`",
        default=None,
    )

    @property
    def is_known(self) -> bool:
        """Whether it says all that a plan needs; zeros cannot be written."""
        return self.cpu.cores > 0 and self.ram > 0

    @property
    def disk_mib_per_s(self) -> int:
        """The speed to count with: as written or probed, else that of a slow disk."""
        return self.disk_read or SLOW_DISK_READ


UNKNOWN = Hardware()  # of a host whose inventory says nothing: only the host can tell


@dataclass(frozen=True)
class Reserve:
    """Memory that plans leave alone, for the system and everything labdeploy does not run."""

    ram: Mib | None = setting(Size(), "main memory kept free for the system; default: 1GiB", default=None)
    vram: Mib | None = setting(
        Size(), "memory of each GPU kept free for its desktop and for growth at run time; default: 512MiB", default=None
    )
