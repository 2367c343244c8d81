"""GPUs: the kernel's list of display adapters, and what the tools of their makers add to it.

An adapter is known by its place on the PCI bus; that joins what several tools say of it. Tools of one maker differ
from release to release in the names and the nesting of what they print, so that keys are looked for, not counted on.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labdeploy.facts.answer import Answer, documents, known, mib, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from labdeploy.hardware import Vendor

VENDORS: Mapping[str, Vendor] = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
# amdgpu_vram_mgr.c: memory that a card brings has a maker; an APU's share of main memory has none ("unknown").
_MAKERS = "samsung infineon elpida etron nanya hynix mosel winbond esmt micron"
MEMORY_MAKERS = frozenset(_MAKERS.split())
LEAST_OWN_MIB = 4096  # an APU is given 512 to 2048 MiB unasked; who gives it more means it to be used


@dataclass(frozen=True)
class GpuFacts:
    """One GPU. Sizes in MiB; None where nobody says."""

    name: str
    vendor: Vendor
    pci: str | None = None
    """Its place on the bus, as /sys writes it: `0000:01:00.0`."""
    uuid: str | None = None
    vram_mib: int | None = None
    free_mib: int | None = None
    driver: str | None = None
    compute_capability: str | None = None
    """Of an NVIDIA GPU."""
    gfx: str | None = None
    """Of an AMD GPU: `gfx1100`."""
    shares_ram: bool = False
    """It has no memory of its own (an iGPU, a Jetson, the software device): plans do not count it unless told to."""


def parse_gpus(answer: Answer) -> tuple[GpuFacts, ...]:
    """List the GPUs of a host in the order of the bus, which is the one that drivers count in; software last."""
    found = {gpu.pci: gpu for gpu in _adapters(answer)}
    for tool in (_nvidia, _amd_smi, _rocm_smi, _xpu_smi):
        for said in tool(answer):
            before = found.get(said.pci)
            found[said.pci] = _joined(before, said) if before else said
    in_order = sorted(found.values(), key=lambda gpu: gpu.pci or "")
    named = (dataclasses.replace(gpu, name=gpu.name or f"{gpu.vendor} GPU") for gpu in in_order)
    return (*named, *_software(answer))


def _joined(one: GpuFacts, other: GpuFacts) -> GpuFacts:
    """Join what two sources say: what the first does not know, and the second one's name."""
    fields = [field.name for field in dataclasses.fields(GpuFacts) if field.name not in ("name", "shares_ram")]
    missing = {key: getattr(other, key) for key in fields if getattr(one, key) is None}
    shares_ram = one.shares_ram or other.shares_ram
    return dataclasses.replace(one, **missing, name=other.name or one.name, shares_ram=shares_ram)


# --- the kernel -----------------------------------------------------------------------------------------------


def _adapters(answer: Answer) -> Iterator[GpuFacts]:
    names, gfx = _lspci_names(answer), _gfx(answer)
    for line in answer.get("pci", ()):
        pci, *words = line.split()
        said = dict(word.split("=", 1) for word in words if "=" in word)
        vendor = VENDORS.get(said.get("vendor", ""))
        if vendor:
            yield GpuFacts(
                name=names.get(pci, ""),
                vendor=vendor,
                pci=pci,
                uuid=f"GPU-{said['unique_id']}" if re.fullmatch(r"[0-9a-f]{16}", said.get("unique_id", "")) else None,
                driver=known(said.get("version")),
                gfx=gfx.get(pci),
                **_memory(vendor, said),
            )


def _memory(vendor: Vendor, said: Mapping[str, str]) -> dict[str, Any]:
    """Give a card's memory: amdgpu has total and used, Intel's drivers the total; NVIDIA's tell it only to its tool."""
    if vendor == "amd":
        total, used = whole(said.get("mem_info_vram_total")), whole(said.get("mem_info_vram_used"))
        own = said.get("mem_info_vram_vendor") in MEMORY_MAKERS or (mib(total) or 0) >= LEAST_OWN_MIB
        free = None if total is None or used is None else max(0, total - used)
        return {"vram_mib": mib(total), "free_mib": mib(free), "shares_ram": total is not None and not own}
    if vendor == "intel":
        local = whole(said.get("local_bytes"))
        return {"vram_mib": mib(local), "shares_ram": local is None}
    return {}


def _lspci_names(answer: Answer) -> dict[str, str]:
    """Read `0000:03:00.0 VGA compatible controller [0300]: Intel Corporation DG2 [Arc A770] [8086:56a0] (rev 08)`."""
    pattern = re.compile(r"(\S+) [^\[]+\[03[0-9a-f]{2}\]: (.+?) \[[0-9a-f]{4}:[0-9a-f]{4}\]")
    found = (pattern.match(line) for line in answer.get("lspci", ()))
    return {match[1]: match[2] for match in found if match}


def _gfx(answer: Answer) -> dict[str, str]:
    """Give the gfx version of AMD GPUs: KFD writes 90a as 90010 (major x 10000 + minor x 100 + step)."""
    found = {}
    for line in answer.get("kfd", ()):
        words = line.split()
        said = {key: int(value) for key, value in zip(words[::2], words[1::2], strict=False) if value.isdigit()}
        if version := said.get("gfx_target_version"):
            place = said.get("location_id", 0)
            pci = f"{said.get('domain', 0):04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{place & 7}"
            found[pci] = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return found


# --- the makers' tools ----------------------------------------------------------------------------------------


def _nvidia(answer: Answer) -> Iterator[GpuFacts]:
    """Read nvidia-smi: bus, UUID, total and free memory, driver, compute capability, name."""
    newer = [line.split(", ", 6) for line in answer.get("nvidia-smi", ())]
    older = [line.split(", ", 5) for line in answer.get("nvidia-smi-old", ())]
    rows = [row for row in newer if len(row) == 7]  # noqa: PLR2004 (the columns of the question)
    rows = rows or [[*row[:5], "N/A", row[5]] for row in older if len(row) == 6]  # noqa: PLR2004 (one less)
    for pci, uuid, total, free, driver, capability, name in rows:
        yield GpuFacts(
            name=name.strip(),
            vendor="nvidia",
            pci=_bus(pci),
            uuid=uuid.strip() if re.fullmatch(r"\s*GPU-[0-9a-fA-F-]+\s*", uuid) else None,
            vram_mib=whole(total) or None,  # GB10 says 0, Orin says [N/A]: both use main memory
            free_mib=whole(free) if whole(total) else None,
            driver=known(driver),
            compute_capability=capability.strip() if re.fullmatch(r"\s*\d{1,2}\.\d\s*", capability) else None,
            shares_ram=not whole(total),
        )


def _amd_smi(answer: Answer) -> Iterator[GpuFacts]:
    """Read amd-smi: a list, or one under `gpu_data`, or one GPU under `gpu`."""
    for device in _devices(documents(answer.get("amd-smi", ())), "asic"):
        asic, bus = _part(device, "asic"), _part(device, "bus")
        vram, driver = _part(device, "vram"), _part(device, "driver")
        size = vram.get("size", vram.get("vram_size"))
        yield GpuFacts(
            name=known(asic.get("market_name")) or "",
            vendor="amd",
            pci=_bus(bus.get("bdf")),
            vram_mib=whole(size.get("value") if isinstance(size, dict) else size),  # its "MB" are MiB
            driver=known(driver.get("version", driver.get("driver_version"))),
            gfx=(known(asic.get("target_graphics_version")) or "").partition(":")[0] or None,
        )


def _rocm_smi(answer: Answer) -> Iterator[GpuFacts]:
    """Read rocm-smi: `card0`, ... and, beside them, `system`; names of keys change their case between releases."""
    for document in documents(answer.get("rocm-smi", ())):
        cards = {name: part for name, part in document.items() if isinstance(part, dict)} if _is(document) else {}
        driver = next((_any_case(part).get("driver version") for part in cards.values()), None)
        for name, card in cards.items():
            said = _any_case(card)
            total, used = whole(said.get("vram total memory (b)")), whole(said.get("vram total used memory (b)"))
            if re.fullmatch(r"card\d+", name):
                yield GpuFacts(
                    name=known(said.get("card series")) or known(said.get("device name")) or "",
                    vendor="amd",
                    pci=_bus(said.get("pci bus")),
                    vram_mib=mib(total),
                    free_mib=None if total is None or used is None else mib(max(0, total - used)),
                    driver=known(said.get("driver version") or driver),
                    gfx=known(said.get("gfx version")),
                )


def _xpu_smi(answer: Answer) -> Iterator[GpuFacts]:
    """Read xpu-smi: one document for each device; its numbers are strings."""
    for device in _devices(documents(answer.get("xpu-smi", ())), "device_name"):
        yield GpuFacts(
            name=known(device.get("device_name")) or "",
            vendor="intel",
            pci=_bus(device.get("pci_bdf_address")),
            vram_mib=mib(whole(device.get("memory_physical_size_byte"))),
            free_mib=mib(whole(device.get("memory_free_size_byte"))),
            driver=known(device.get("driver_version")),
        )


def _software(answer: Answer) -> Iterator[GpuFacts]:
    """Give Vulkan's software device, where facts.sh was told to ask for it."""
    for line in answer.get("llama-server.software", ()):
        device = DEVICE.fullmatch(line)
        if device and "llvmpipe" in device["name"]:
            yield GpuFacts(
                device["name"], "software", vram_mib=int(device["total"]), free_mib=int(device["free"]), shares_ram=True
            )


# One line of `llama-server --list-devices`: `  CUDA0: NVIDIA GeForce RTX 4090 (24564 MiB, 23592 MiB free)`
DEVICE = re.compile(r"\s+(?P<id>\w+): (?P<name>.+) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)")


# --- shapes ---------------------------------------------------------------------------------------------------


def _bus(text: object) -> str | None:
    """Write a place on the bus as /sys does; nvidia-smi writes eight digits of domain and capitals."""
    match = re.fullmatch(r"(?:[0-9a-f]{0,4}([0-9a-f]{4}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", str(text).strip().lower())
    return f"{match[1] or '0000'}:{match[2]}" if match else None


def _devices(value: Any, key: str) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401 (JSON)
    """Find all mappings that have a key, however deep they lie."""
    if isinstance(value, dict) and key in value:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _devices(inner, key)


def _part(device: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = device.get(key)
    return part if isinstance(part, dict) else {}


def _is(value: object) -> bool:
    return isinstance(value, dict)


def _any_case(part: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).lower(): value for key, value in part.items()}
