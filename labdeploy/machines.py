"""What a host has: as the inventory writes it, completed by what the host said; and where the two differ.

The inventory always wins. What it leaves out is taken from the lock, and what it says otherwise than the host is told.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labdeploy.errors import InventoryError
from labdeploy.hardware import Cpu, Gpu, Hardware
from labdeploy.schema import Mib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from labdeploy.facts.cpu import CpuFacts
    from labdeploy.facts.gpu import GpuFacts
    from labdeploy.facts.machine import Machine
    from labdeploy.inventory import Host
    from labdeploy.models.book import ModelBook

QUARTERS_FROM_MIB = 25600  # where ABOUT is a quarter of a GiB, so that two sizes that differ look different
MAPPED_PART = 2  # a mapped file is read page by page, and others read too: half of what dd had to itself
_UNKNOWN = "is not all written, and the lock does not know it"
ABOUT = 0.01  # sizes on the box and sizes that drivers tell differ by less: 24GiB is 24564 MiB on an RTX 4090


@dataclass(frozen=True)
class Difference:
    """Something of which the inventory and the host say different things."""

    path: str
    text: str
    matters: bool
    """A plan that believes the inventory goes wrong by it."""

    def __str__(self) -> str:
        return f"{self.path} {self.text}"


def completed(host: Host, machine: Machine | None) -> Host:
    """Fill in what the inventory leaves out of a host's hardware; InventoryError where nobody knows it."""
    hardware = _known(host, machine)
    if hardware is None:
        raise InventoryError(_UNKNOWN, where=f"hosts.{host.name}.hardware", hint=f"labdeploy probe {host.name}")
    done = dataclasses.replace(host, hardware=_filled_in(hardware, machine) if machine else hardware)
    _check_gpus(done)
    return done


def require_known(hosts: Iterable[Host], book: ModelBook) -> None:
    """Raise one InventoryError that names every host of which neither the inventory nor the lock says what it has."""
    unknown = [host.name for host in hosts if _known(host, book.machine(host.name)) is None]
    if unknown:
        lines = "\n".join(f"{book.at(f'hosts.{name}.hardware')}: {_UNKNOWN}" for name in unknown)
        raise InventoryError(lines, hint=f"labdeploy probe {' '.join(unknown)}")


def _known(host: Host, machine: Machine | None) -> Hardware | None:
    """Give the hardware of a host: as written, the rest as probed; None where neither says enough for a plan."""
    if host.hardware.is_known:
        return host.hardware
    probed = _probed(machine)
    return _joined(host.hardware, probed) if probed else None


def _probed(machine: Machine | None) -> Hardware | None:
    """Give the hardware that a host said it has; None where it did not say enough for a plan."""
    if machine is None or machine.cpu is None or machine.ram is None:
        return None
    cpu = machine.cpu
    return Hardware(
        cpu=Cpu(cores=_allowed_cores(cpu), threads=max(cpu.threads, _allowed_cores(cpu))),
        ram=Mib(machine.ram.total_mib),
        gpus=tuple(_gpu(gpu, gpu.vram_mib) for gpu in machine.gpus if gpu.vram_mib and not gpu.shares_ram),
    )


def _joined(written: Hardware, probed: Hardware) -> Hardware:
    """Take what is written, and the rest as probed."""
    return Hardware(
        cpu=written.cpu if written.cpu.cores else probed.cpu,
        ram=written.ram or probed.ram,
        gpus=written.gpus or probed.gpus,
        disk_read=written.disk_read,
    )


def _allowed_cores(cpu: CpuFacts) -> int:
    """Give the cores that may be busy at once: threads beyond a time limit make all others wait."""
    return cpu.cores if cpu.quota is None else max(1, min(cpu.cores, int(cpu.quota)))


def _gpu(gpu: GpuFacts, vram_mib: int) -> Gpu:
    return Gpu(name=gpu.name, vram=Mib(vram_mib), vendor=gpu.vendor)


def _filled_in(hardware: Hardware, machine: Machine) -> Hardware:
    """Add what is not written and the host knows: features of the CPU, its fast cores, disk speed, UUIDs of GPUs."""
    cpu, said = hardware.cpu, machine.cpu
    if said:
        cpu = dataclasses.replace(
            cpu,
            features=said.features if cpu.features is None else cpu.features,
            performance_cores=cpu.performance_cores or said.performance_cores,
        )
    gpus = tuple(
        dataclasses.replace(
            gpu,
            uuid=gpu.uuid or (found.uuid if found else None),
            compute_capability=gpu.compute_capability or (found.compute_capability if found else None),
        )
        for gpu, found in zip(hardware.gpus, _matched(hardware.gpus, machine.gpus), strict=True)
    )
    disk = hardware.disk_read
    if disk is None and machine.disk_read_mib_per_s:
        disk = Mib(max(1, machine.disk_read_mib_per_s // MAPPED_PART))
    return dataclasses.replace(hardware, cpu=cpu, gpus=gpus, disk_read=disk)


def _matched(written: Sequence[Gpu], probed: Sequence[GpuFacts]) -> list[GpuFacts | None]:
    """Find for each written GPU the one that it is: by its UUID, else the next of its vendor in the bus's order."""
    left = [gpu for gpu in probed if gpu.vendor == "software" or not gpu.shares_ram]
    left += [gpu for gpu in probed if gpu not in left]
    by_uuid = {gpu.uuid: gpu for gpu in left if gpu.uuid}
    found = [by_uuid.get(gpu.uuid) if gpu.uuid else None for gpu in written]
    left = [gpu for gpu in left if gpu not in found]
    for i, gpu in enumerate(written):
        same = next((other for other in left if other.vendor == gpu.maker), None)
        if not gpu.uuid and same:
            found[i] = same
            left.remove(same)
    return found


def _check_gpus(host: Host) -> None:
    """Refuse services that name GPUs which the host has not; where hardware is written, reading it saw that."""
    n = len(host.hardware.gpus)
    for name, service in host.services.items():
        for gpu in getattr(service.settings, "gpus", None) or ():
            if gpu >= n:
                raise InventoryError(
                    f"names GPU {gpu}, the host has {n}, counted from 0",
                    where=f"hosts.{host.name}.services.{name}.gpus",
                    hint=f"labdeploy probe {host.name}",
                )


# --- differences ----------------------------------------------------------------------------------------------


def differences(host: Host, machine: Machine) -> list[Difference]:
    """List what the inventory says of a host otherwise than the host itself."""
    at, hardware = f"hosts.{host.name}.hardware", host.hardware
    gpus = _gpu_differences(at, hardware, machine) if hardware.is_known or hardware.gpus else ()
    return [*_cpu_differences(at, hardware, machine), *gpus]


def _cpu_differences(at: str, hardware: Hardware, machine: Machine) -> Iterator[Difference]:
    cpu, ram = machine.cpu, machine.ram
    if ram and hardware.ram and _differ(hardware.ram, ram.total_mib):
        more = hardware.ram > ram.total_mib
        yield _sizes(f"{at}.ram", hardware.ram, ram.total_mib, matters=more)
    if cpu is None or not hardware.cpu.cores:
        return
    for key in ("cores", "threads", "performance_cores"):
        says, has = getattr(hardware.cpu, key), getattr(cpu, key)
        if says is not None and has is not None and says != has:
            yield Difference(f"{at}.cpu.{key}", f"says {says}, the host has {has}", key == "cores" and says > has)
    if cpu.quota is not None and hardware.cpu.compute_cores > cpu.quota:
        text = f"says {hardware.cpu.cores}, a control group of the host allows the time of {cpu.quota:g}"
        yield Difference(f"{at}.cpu.cores", text, matters=True)
    missing = [name for name in hardware.cpu.features or () if name not in cpu.features]
    if missing and cpu.features:
        yield Difference(f"{at}.cpu.features", f"names {', '.join(missing)}, which the host has not", matters=True)


def _gpu_differences(at: str, hardware: Hardware, machine: Machine) -> Iterator[Difference]:
    found = _matched(hardware.gpus, machine.gpus)
    for i, (gpu, has) in enumerate(zip(hardware.gpus, found, strict=True)):
        path = f"{at}.gpus[{i}]"
        if has is None:
            wanted = f"{gpu.name} with UUID {gpu.uuid}" if gpu.uuid else gpu.name
            yield Difference(path, f"says {wanted}, the host shows no such GPU", matters=True)
            continue
        if has.vram_mib is None:
            why = "it shares main memory" if has.shares_ram else "no driver tells"
            yield Difference(f"{path}.vram", f"says {_size(gpu.vram)}, the host does not say: {why}", matters=True)
        elif _differ(gpu.vram, has.vram_mib):
            yield _sizes(f"{path}.vram", gpu.vram, has.vram_mib, matters=True)
        if gpu.compute_capability and has.compute_capability not in (None, gpu.compute_capability):
            text = f"says {gpu.compute_capability}, the host has {has.compute_capability}"
            yield Difference(f"{path}.compute_capability", text, matters=True)
    for has in machine.gpus:
        if has not in found and not has.shares_ram:
            size = f" with {_size(has.vram_mib)}" if has.vram_mib else ""
            yield Difference(f"{at}.gpus", f"does not name {has.name}{size} at {has.pci}", matters=False)


def _differ(says_mib: int, has_mib: int) -> bool:
    return abs(says_mib - has_mib) > ABOUT * has_mib


def _sizes(path: str, says_mib: int, has_mib: int, *, matters: bool) -> Difference:
    return Difference(path, f"says {_size(says_mib)}, the host has {_size(has_mib)}", matters)


def _size(size_mib: int) -> str:
    """Write a size so that the inventory takes it: to a quarter of a GiB below, small ones exactly."""
    return f"{size_mib // 256 / 4:g}GiB" if size_mib >= QUARTERS_FROM_MIB or size_mib % 1024 == 0 else f"{size_mib}MiB"
