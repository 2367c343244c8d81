"""Questions to hosts that change nothing: their state, their history, their files. Asked of many hosts at once."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from labdeploy.dial import WORKERS
from labdeploy.errors import LabdeployError
from labdeploy.generation import SpanMark
from labdeploy.host import HostConnection, Line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from labdeploy.inventory import Host

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceState:
    """A service as it runs."""

    unit: str
    active: str = "unknown"
    sub: str = ""
    healthy: bool = False
    restarts: int = 0
    since: str = ""
    memory_mib: int | None = None


@dataclass(frozen=True)
class Buffers:
    """What a service said it had allocated on a device when it started, in MiB."""

    model_mib: float
    context_mib: float
    compute_mib: float


@dataclass(frozen=True)
class HostState:
    """A host as it is."""

    generation: int
    good: int
    pending: bool
    drift: tuple[str, ...]
    services: dict[str, ServiceState]
    plan: dict[str, Any]
    real: dict[str, dict[str, Buffers]] = field(default_factory=dict)
    """By service and device (`gpu0`, `host`), as read back after its start."""
    layers: dict[str, int] = field(default_factory=dict)
    """By service: layers on GPUs, as read back."""


@dataclass(frozen=True)
class Switch:
    """One entry of a host's journal."""

    event: str
    push_id: str
    by: str
    at: str
    from_: int
    to: int
    changed: tuple[str, ...]
    result: str


@dataclass(frozen=True)
class History:
    """What was pushed to a host: manifests of its generations, and its journal in order."""

    current: int
    good: int
    manifests: dict[int, dict[str, Any]]
    journal: tuple[Switch, ...]

    @property
    def previous(self) -> int:
        """The generation before the last switch, where a rollback goes."""
        moves = [e for e in self.journal if e.event in ("push", "rollback") and e.result == "ok" and e.from_ != e.to]
        return moves[-1].from_ if moves else 0

    def spans(self, number: int) -> dict[str, SpanMark]:
        """Give the parts of spans of a generation, by the service's name."""
        marks = self.manifests.get(number, {}).get("spans", {})
        return {name: SpanMark(mark["id"], tuple(mark["hosts"])) for name, mark in marks.items()}

    @property
    def last_switch(self) -> Switch | None:
        """The last push or rollback that was confirmed."""
        done = [entry for entry in self.journal if entry.event in ("push", "rollback") and entry.result == "ok"]
        return done[-1] if done else None

    def state_of(self, number: int) -> str:
        """Say what became of a generation."""
        if number == 0:
            return "adopted"
        if number == self.good:
            return "good"
        last = next((e for e in reversed(self.journal) if number in (e.from_, e.to) and e.from_ != e.to), None)
        left_by_rollback = last is not None and last.event in ("rollback", "settle") and last.from_ == number
        return "rolled-back" if left_by_rollback else "superseded"


@dataclass(frozen=True)
class Files:
    """Units of the current generation, and those that are installed, by their path in a rendered tree."""

    current: int
    deployed: dict[str, bytes] = field(default_factory=dict)
    installed: dict[str, bytes] = field(default_factory=dict)
    drift: tuple[str, ...] = ()


def ask_all(
    hosts: Sequence[Host], folder: Path, question: Callable[[HostConnection], T]
) -> dict[str, T | LabdeployError]:
    """Ask every host the same, in parallel; a host that cannot answer has its error in place of an answer."""

    def ask(host: Host) -> T | LabdeployError:
        try:
            with HostConnection(host, folder) as connection:
                return question(connection)
        except LabdeployError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, min(WORKERS, len(hosts)))) as pool:
        return dict(zip([host.name for host in hosts], pool.map(ask, hosts), strict=True))


def state(connection: HostConnection) -> HostState:
    """Ask a host how it is."""
    lines = connection.run("state")
    return HostState(
        generation=_number(lines, "current"),
        good=_number(lines, "good"),
        pending=any(line.kind == "pending" for line in lines),
        drift=_drift(lines),
        services={n: _service(n, unit, lines) for n, unit in (line.fields for line in lines if line.kind == "unit")},
        plan=next((json.loads(line.field(0)) for line in lines if line.kind == "plan"), {}),
        real=_real(lines),
        layers={line.field(0): int(line.field(1)) for line in lines if line.kind == "layers"},
    )


def history(connection: HostConnection) -> History:
    """Ask a host what was pushed to it."""
    lines = connection.run("history")
    return History(
        current=_number(lines, "current"),
        good=_number(lines, "good"),
        manifests={int(line.field(0)): json.loads(line.field(1)) for line in lines if line.kind == "manifest"},
        journal=tuple(_switch(json.loads(line.field(0))) for line in lines if line.kind == "journal"),
    )


def files(connection: HostConnection) -> Files:
    """Ask a host for its units, as deployed and as installed."""
    lines = connection.run("files")
    by_kind = {
        kind: {line.field(0): base64.b64decode(line.field(1)) for line in lines if line.kind == kind}
        for kind in ("deployed", "installed")
    }
    return Files(_number(lines, "current"), by_kind["deployed"], by_kind["installed"], _drift(lines))


def _number(lines: Sequence[Line], kind: str) -> int:
    return next((int(line.field(0)) for line in lines if line.kind == kind), 0)


def _drift(lines: Sequence[Line]) -> tuple[str, ...]:
    return tuple(line.field(0) for line in lines if line.kind == "drift")


def _service(name: str, unit: str, lines: Sequence[Line]) -> ServiceState:
    shown = {line.field(1): line.field(2) for line in lines if line.kind == "show" and line.field(0) == name}
    healthy = any(line.kind == "healthy" and line.fields == (name, "true") for line in lines)
    memory = shown.get("MemoryCurrent", "")
    return ServiceState(
        unit=unit,
        active=shown.get("ActiveState", "unknown"),
        sub=shown.get("SubState", ""),
        healthy=healthy,
        restarts=int(shown.get("NRestarts") or 0),
        since=shown.get("ActiveEnterTimestamp", ""),
        memory_mib=int(memory) // 2**20 if memory.isdigit() and int(memory) < 2**63 else None,
    )


def _real(lines: Sequence[Line]) -> dict[str, dict[str, Buffers]]:
    found: dict[str, dict[str, Buffers]] = {}
    for name, device, *mib in (line.fields for line in lines if line.kind == "real"):
        found.setdefault(name, {})[device] = Buffers(*map(float, mib))
    return found


def _switch(entry: dict[str, Any]) -> Switch:
    return Switch(
        event=entry["event"],
        push_id=entry["push_id"],
        by=entry["by"],
        at=entry["at"],
        from_=entry["from"],
        to=entry["to"],
        changed=tuple(entry.get("changed", ())),
        result=entry["result"],
    )
