"""All that a host said, as one `Machine`, and how the lock keeps it.

    hosts:
      gpu1: {os: ..., cpu: {...}, ram: {...}, gpus: [...], runners: {llama-server: {..., flags: 3f2a91c04d1e}}}
    flags:
      3f2a91c04d1e: -a= --alias= ... --metrics ...     # one for each build, `=` where a value follows

Memory that is free and the speed of a disk are different at each look. The lock keeps what it has for as long as that
is about right, so that asking the same machine again writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from labdeploy.errors import InventoryError
from labdeploy.facts.answer import Answer, first, known
from labdeploy.facts.build import Build, Device, parse_builds
from labdeploy.facts.cpu import CpuFacts, RamFacts, os_name, parse_cpu, parse_ram
from labdeploy.facts.gpu import GpuFacts, parse_gpus

if TYPE_CHECKING:
    from collections.abc import Mapping

ABOUT = 0.2  # two looks that differ by less than this part say the same of free memory, or of a disk
LEAST_READ_S = 0.005  # below this it is the clock that is measured


@dataclass(frozen=True)
class Machine:
    """What a host said of itself; None where it did not say."""

    os: str | None = None
    kernel: str | None = None
    arch: str | None = None
    systemd: str | None = None
    cpu: CpuFacts | None = None
    ram: RamFacts | None = None
    gpus: tuple[GpuFacts, ...] = ()
    disk_read_mib_per_s: int | None = None
    runners: Mapping[str, Build] = field(default_factory=dict)


def parse_machine(answer: Answer) -> Machine:
    """Read all that a host answered."""
    _, _, rest = first(answer, "uname").partition(" ")
    kernel, _, arch = rest.rpartition(" ")
    return Machine(
        os=os_name(answer),
        kernel=known(kernel),
        arch=known(arch),
        systemd=known(first(answer, "systemd").removeprefix("systemd ")),
        cpu=parse_cpu(answer),
        ram=parse_ram(answer),
        gpus=parse_gpus(answer),
        disk_read_mib_per_s=parse_disk(answer),
        runners=parse_builds(answer),
    )


def parse_disk(answer: Answer) -> int | None:
    """Read dd's last line, `268435456 bytes (268 MB, 256 MiB) copied, 0.5 s, 537 MB/s`, in MiB per second."""
    match = re.search(r"^(\d+) bytes.* copied, ([\d.]+(?:e-\d+)?) s,", "\n".join(answer.get("disk", ())), re.MULTILINE)
    seconds = float(match[2]) if match else 0.0
    return max(1, round(int(match[1]) / 2**20 / seconds)) if match and seconds > LEAST_READ_S else None


def parse_sizes(answer: Answer) -> dict[str, int]:
    """Give the sizes in bytes of the model files that are there, by their paths."""
    rows = (line.split(" ", 1) for line in answer.get("model", ()))
    return {row[1]: int(row[0]) for row in rows if len(row) == 2 and row[0].isdigit()}  # noqa: PLR2004 (size, path)


# --- the lock -------------------------------------------------------------------------------------------------


def to_lock(machine: Machine, before: Machine | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Give a machine as plain values, and the sets of flags that its builds know, by their digests."""
    steady = _steady(machine, before) if before else machine
    entry = dataclasses.asdict(steady)
    flags: dict[str, str] = {}
    for name, build in steady.runners.items():
        words = " ".join(f"{flag}=" if takes_value else flag for flag, takes_value in build.flags.items())
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        flags |= {digest: words} if words else {}
        entry["runners"][name]["flags"] = digest if words else None
    plain: dict[str, Any] = _plain(entry)
    return plain, flags


def _plain(value: Any) -> Any:  # noqa: ANN401 (what YAML can write)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _steady(now: Machine, before: Machine) -> Machine:
    """Keep the older of two measurements where they say about the same."""
    free = {gpu.pci or gpu.name: gpu.free_mib for gpu in before.gpus}
    gpus = tuple(
        dataclasses.replace(gpu, free_mib=_about(gpu.free_mib, free.get(gpu.pci or gpu.name), gpu.vram_mib))
        for gpu in now.gpus
    )
    disk = _about(now.disk_read_mib_per_s, before.disk_read_mib_per_s, before.disk_read_mib_per_s)
    ram = now.ram
    if ram and before.ram:
        available = _about(ram.available_mib, before.ram.available_mib, ram.total_mib)
        ram = dataclasses.replace(ram, available_mib=available)
    return dataclasses.replace(now, gpus=gpus, ram=ram, disk_read_mib_per_s=disk)


def _about(now: int | None, before: int | None, of: int | None) -> int | None:
    """Give the older measurement where the newer one differs by a small part of `of`; the newer one else."""
    if now is None or before is None or of is None or abs(now - before) > ABOUT * of:
        return now
    return before


def from_lock(lock: Mapping[str, Any], host: str) -> Machine | None:
    """Read back what `to_lock` wrote of a host; None where the lock has nothing of it."""
    entry = lock.get("hosts", {}).get(host)
    if entry is None:
        return None
    where = f"hosts.{host}"
    sets = lock.get("flags", {})
    machine = dict(entry) if isinstance(entry, dict) else entry
    if isinstance(machine, dict) and isinstance(machine.get("runners"), dict) and isinstance(sets, dict):
        machine["runners"] = {name: _with_flags(build, sets) for name, build in machine["runners"].items()}
    read: Machine = _read("Machine", machine, where)
    return read


def _with_flags(build: Any, sets: Mapping[str, Any]) -> Any:  # noqa: ANN401 (what YAML holds)
    """Put the set of flags in place of its digest."""
    if not isinstance(build, dict):
        return build
    words = str(sets.get(str(build.get("flags")), "")).split()
    return {**build, "flags": {word.removesuffix("="): word.endswith("=") for word in words}}


_RECORDS = {kind.__name__: kind for kind in (Machine, CpuFacts, RamFacts, GpuFacts, Build, Device)}
_SCALARS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "Vendor": (str,),
    "bool": (bool,),
}


def _read(kind: str, value: Any, where: str) -> Any:  # noqa: ANN401 (of the type that `kind` names)
    """Read a plain value as what a field's annotation says."""
    if kind.endswith(" | None"):
        return None if value is None else _read(kind.removesuffix(" | None"), value, where)
    if kind in _SCALARS and isinstance(value, _SCALARS[kind]) and isinstance(value, bool) == (kind == "bool"):
        return value
    if kind in _RECORDS:
        return _record(_RECORDS[kind], value, where)
    if (inner := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", kind)) and isinstance(value, list):
        return tuple(_read(inner[1], item, f"{where}[{i}]") for i, item in enumerate(value))
    if (inner := re.fullmatch(r"Mapping\[str, (\w+)\]", kind)) and isinstance(value, dict):
        return {str(key): _read(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return _problem(where, f"must be of type {kind}, not {value!r:.60}")


@functools.cache
def _declared(kind: type) -> dict[str, str]:
    return {part.name: str(part.type) for part in dataclasses.fields(kind)}


def _record(kind: type, value: Any, where: str) -> Any:  # noqa: ANN401 (the record)
    declared = _declared(kind)
    if not isinstance(value, dict) or not value.keys() <= declared.keys():
        unknown = sorted(map(str, value.keys() - declared.keys())) if isinstance(value, dict) else []
        _problem(where, f"has {unknown[0]}, which is not known here" if unknown else "must be a mapping")
    try:
        return kind(**{name: _read(declared[name], item, f"{where}.{name}") for name, item in value.items()})
    except TypeError:
        return _problem(where, "has not all that is needed")


def _problem(where: str, what: str) -> NoReturn:
    host = where.split(".")[1].partition("[")[0]
    raise InventoryError(f"in the lock: {what}", where=where, hint=f"labdeploy probe {host}  # writes it anew")
