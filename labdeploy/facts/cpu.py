"""The processor and main memory: /proc, /sys and lscpu, and the limits of control groups above the services."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labdeploy.facts.answer import Answer, first, known, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# What ggml-cpu chooses kernels and memory layouts by (ggml 0.27, ggml-cpu/CMakeLists.txt and arch/*/repack.cpp).
_FEATURES = """
    sse4_2 avx avx2 fma f16c bmi2 avx_vnni avx512f avx512cd avx512bw avx512dq avx512vl avx512vbmi avx512_vnni
    avx512_bf16 amx_tile amx_int8 asimd asimdhp asimddp i8mm bf16 sve sve2 sme vsx
"""
FEATURES = tuple(_FEATURES.split())
NO_LIMIT_BYTES = 2**60  # cgroup v1 writes the largest multiple of a page, 2^63, where there is no limit


@dataclass(frozen=True)
class CpuFacts:
    """The processors that services may run on. Cores and threads that are offline or forbidden do not count."""

    model: str | None
    cores: int
    """Physical ones, all sockets together."""
    threads: int
    performance_cores: int | None
    """Of a hybrid; None where all cores are alike."""
    efficiency_cores: int | None
    numa_nodes: int
    quota: float | None
    """Processors' worth of time that a control group allows (`CPUQuota=400%` is 4); None without a limit."""
    features: tuple[str, ...]


@dataclass(frozen=True)
class RamFacts:
    """Main memory, less what a control group forbids."""

    total_mib: int
    available_mib: int | None


def parse_cpu(answer: Answer) -> CpuFacts | None:
    """Read the processor; None where the host says nothing of it."""
    topology = _topology(answer)
    threads = frozenset(topology.siblings) or numbers(_lscpu(answer).get("On-line CPU(s) list", ""))
    if not threads:
        return None
    cores = _cores(answer, topology, threads)
    fast = _fast_threads(topology, threads)
    n_fast = len({topology.siblings[thread] for thread in fast}) if fast else None
    return CpuFacts(
        model=_model(answer),
        cores=cores,
        threads=len(threads),
        performance_cores=n_fast,
        efficiency_cores=None if n_fast is None else cores - n_fast,
        numa_nodes=max(1, sum(bool(node & threads) for node in topology.nodes)),
        quota=_quota(answer),
        features=_features(answer),
    )


def parse_ram(answer: Answer) -> RamFacts | None:
    """Read main memory; None where the host says nothing of it."""
    kib = {key: whole(value.removesuffix("kB")) for key, value in _pairs(answer.get("meminfo", ()))}
    total = kib.get("MemTotal")
    if total is None:
        return None
    limits = [whole(value) for key, value, _ in _words(answer.get("limits", ())) if key == "memory.max"]
    most = min((limit for limit in limits if limit and limit < NO_LIMIT_BYTES), default=total * 1024)
    available = kib.get("MemAvailable")
    total_mib = min(total * 1024, most) // 2**20
    return RamFacts(total_mib, None if available is None else min(total_mib, available // 1024))


def numbers(text: str) -> frozenset[int]:
    """Read a list of CPUs as the kernel writes it: `0-3,8,10-14:2`; no more than 65536 of them."""
    found: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5})(?::(\d{1,4}))?)?", part)
        if match:
            low, step = int(match[1]), max(1, int(match[3] or 1))
            found |= set(range(low, int(match[2] or low) + 1, step))
    return frozenset(found)


# --- topology -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Topology:
    """What /sys says: threads by number, each with all threads of its core and its capacity; nodes; kinds."""

    siblings: Mapping[int, frozenset[int]]
    capacity: Mapping[int, int]
    nodes: tuple[frozenset[int], ...]
    performance: frozenset[int]
    efficiency: frozenset[int]


def _topology(answer: Answer) -> _Topology:
    lines = list(_words(answer.get("topology", ())))
    allowed = next((numbers(value) for key, value, _ in _words(answer.get("limits", ())) if key == "cpus"), None)
    cores = {int(number): rest.split() for key, number, rest in lines if key == "core" and number.isdigit()}
    usable = {n: rest for n, rest in cores.items() if rest and (not allowed or n in allowed)}
    kinds = {key: numbers(number) for key, number, _ in lines if key in ("cpu_core", "cpu_atom")}
    return _Topology(
        siblings={n: numbers(rest[0]) for n, rest in usable.items()},
        capacity={n: int(rest[1]) for n, rest in usable.items() if len(rest) > 1 and rest[1].isdigit()},
        nodes=tuple(numbers(rest) for key, _, rest in lines if key == "node"),
        performance=kinds.get("cpu_core", frozenset()),
        efficiency=kinds.get("cpu_atom", frozenset()),
    )


def _cores(answer: Answer, topology: _Topology, threads: frozenset[int]) -> int:
    """Count physical cores: threads of one core name the same siblings; without /sys, as lscpu multiplies."""
    if topology.siblings:
        return len(set(topology.siblings.values()))
    lscpu = _lscpu(answer)
    per_socket, sockets = whole(lscpu.get("Core(s) per socket")), whole(lscpu.get("Socket(s)"))
    return min(per_socket * sockets, len(threads)) if per_socket and sockets else len(threads)


def _fast_threads(topology: _Topology, threads: frozenset[int]) -> frozenset[int]:
    """Give the threads of a hybrid's fast cores; none where all cores are alike.

    Intel names its kinds. Arm gives each CPU a capacity, 1024 for the fastest; here those with half of that are
    fast: one thread that is slower holds all others up, since they go in step.
    """
    if topology.performance and topology.efficiency & threads:
        return topology.performance & frozenset(topology.siblings)
    most = max(topology.capacity.values(), default=0)
    fast = frozenset(n for n, capacity in topology.capacity.items() if 2 * capacity >= most)
    return fast if len(fast) < len(topology.capacity) else frozenset()


# --- the rest -------------------------------------------------------------------------------------------------


def _model(answer: Answer) -> str | None:
    """Give the name of the processor: of /proc/cpuinfo, else (Arm) as lscpu decodes it, all kinds of a hybrid."""
    named = [value for key, value in _pairs(answer.get("cpuinfo", ())) if key == "model name"]
    decoded = [value for key, value in _pairs(answer.get("lscpu", ())) if key == "Model name"]
    names = list(dict.fromkeys(name for name in map(known, named or decoded) if name))
    return " + ".join(names) or None


def _quota(answer: Answer) -> float | None:
    """Give the least of the time limits above the services, in processors."""
    limits = [
        int(quota) / int(period)
        for key, quota, period in _words(answer.get("limits", ()))
        if key == "cpu.max" and quota.isdigit() and period.isdigit() and int(period)
    ]
    return round(min(limits), 2) if limits else None


def _features(answer: Answer) -> tuple[str, ...]:
    """Give the features that all kinds of cores have, of those that matter."""
    kinds = [set(value.split()) for key, value in _pairs(answer.get("cpuinfo", ())) if key in ("flags", "Features")]
    common = set.intersection(*kinds) if kinds else set()
    return tuple(name for name in FEATURES if name in common)


def _lscpu(answer: Answer) -> dict[str, str]:
    return dict(_pairs(answer.get("lscpu", ())))


def _pairs(lines: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Split lines such as `MemTotal:  24683656 kB`."""
    for line in lines:
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _words(lines: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Split lines such as `core 0 0,8 1024` into the first word, the second and the rest."""
    for line in lines:
        key, _, rest = line.partition(" ")
        second, _, third = rest.partition(" ")
        yield key, second, third


def os_name(answer: Answer) -> str | None:
    """Give the system's name for people: `Debian GNU/Linux 13 (trixie)`."""
    return known(first(answer, "os").partition("=")[2].strip("\"'"))
