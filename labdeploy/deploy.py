"""Push and rollback over many hosts: what is sent, what came back, in which order, and when to stop."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import functools
import getpass
import json
import re
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from labdeploy import __version__
from labdeploy.dial import WORKERS
from labdeploy.errors import (
    HostError,
    LabdeployError,
    LockedError,
    NeedsPersonError,
    UnhealthyError,
)
from labdeploy.host import HostConnection, Line, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from labdeploy.generation import Generation
    from labdeploy.host import Payload
    from labdeploy.remembered import Push
    from labdeploy.ssh import Target

Result = Literal["changed", "unchanged", "rolled-back", "failed", "skipped", "would-change"]

WATCH_S = 6  # a service that crashes five seconds after its first answer is still caught
CONFIRM_S = 30  # the host waits this long for the second connection before it goes back
DENIED = "another host of its span failed"
LOCK_POLL_S = 2.0  # a held host is asked again; each time is a login and one systemctl call there
SLACK_S = 120  # beyond all deadlines of its services, a host that says nothing is given up
_TOLD: dict[str, Result] = {
    "changed": "changed",
    "unchanged": "unchanged",
    "would-change": "would-change",
    "rolled-back": "rolled-back",
}


@dataclass(frozen=True)
class ServiceOutcome:
    """What happened to one service."""

    action: str
    downtime_s: float | None = None
    first_token_s: float | None = None
    """From the request to the first token, on the host itself; None of runners that are not asked for a stream."""


@dataclass(frozen=True)
class Outcome:
    """What happened on one host."""

    host: str
    result: Result
    generation: int | None = None
    previous: int | None = None
    seconds: float = 0.0
    error: LabdeployError | None = None
    services: Mapping[str, ServiceOutcome] = field(default_factory=dict)
    log: tuple[tuple[str, str], ...] = ()
    """Last journal lines of a service that failed: (service, line)."""
    note: str = ""
    """Why it was skipped."""
    would: tuple[str, ...] = ()
    """The steps of a dry run, in order."""
    deployed: Mapping[str, bytes] = field(default_factory=dict)
    """Of a dry run: the units that would change, as they are deployed (new ones empty), by their path in a tree."""
    warnings: tuple[str, ...] = ()
    plan_before: Mapping[str, Any] = field(default_factory=dict)
    plan_after: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """The exit code this host alone would give."""
        return self.error.exit_code if self.error else 0


@dataclass(frozen=True)
class Job:
    """What to do on one host: a verb of the host program with its target, and what to send along."""

    host: Target
    verb: Literal["push", "rollback"]
    target: str
    services: tuple[str, ...] = ()
    payload: Payload = b""
    """What the host asks for where something is to change."""
    deadline_s: float = 3600.0
    together: frozenset[str] = frozenset()
    """Hosts that move with this one or not at all, for they serve something together; itself among them."""


@dataclass(frozen=True)
class Order:
    """How a fleet is gone through: first some canaries, then so many at a time, until so many have failed."""

    canary: int = 0
    serial: int = 0
    max_failures: int | None = None

    def batches(self, jobs: Sequence[Job]) -> list[Sequence[Job]]:
        """Cut the jobs into batches; a batch starts when the one before it has ended.

        Hosts that move together are in one batch and next to each other, which can make it larger than asked for.
        """
        size = self.serial or max(1, len(jobs))
        batches: list[Sequence[Job]] = []
        batch: list[Job] = []
        for group in _groups(jobs):
            batch += group
            if len(batch) >= (self.canary if self.canary and not batches else size):
                batches.append(batch)
                batch = []
        return [*batches, batch] if batch else batches

    def enough(self, failed: Sequence[Outcome], *, canaries: bool) -> str:
        """Say why no more hosts shall be started, or nothing; only canaries were started so far, or more."""
        if failed and self.canary and canaries:
            return f"the canary {failed[0].host} failed"
        if self.max_failures is not None and len(failed) > self.max_failures:
            return f"{len(failed)} hosts failed, --max-failures allows {self.max_failures}"
        return ""


class Stop(threading.Event):
    """Set on Ctrl-C, or when enough hosts have failed: hosts in flight finish, no other is started."""

    why = "interrupted before it was started"


def new_push_id() -> str:
    """Make the id that all generations of one push share; ids sort by time."""
    return f"{_now():%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def whoami() -> str:
    """Name who pushes from where, in characters that are safe anywhere."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        user = "unknown"
    return re.sub(r"[^A-Za-z0-9@._-]", "_", f"{user}@{socket.gethostname()}")


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Gather the jobs of hosts that move together, in the order of the first of each."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.together or job.host.name, []).append(job)
    return list(groups.values())


def push_job(push: Push, generations: Callable[[], Mapping[str, Generation]], push_id: str) -> Job:
    """Say what a push sends to a host; its files are packed when the host asks for them."""
    at = f"{_now():%Y-%m-%dT%H:%M:%SZ}"

    def write(send: Callable[[bytes], object]) -> None:
        send(generations()[push.name].bundle(push_id=push_id, by=whoami(), at=at, version=__version__))

    return Job(push, "push", push.content_hash, push.services, write, push.deadline_s, frozenset(push.together))


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    push_id: str,
    *,
    order: Order = Order(),
    options: Sequence[str] = (),
    watch_s: int = WATCH_S,
    wait_s: int = 0,
    on_line: Callable[[str, Line], None] = lambda _host, _line: None,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
    stop: Stop | None = None,
) -> list[Outcome]:
    """Do the jobs host by host in parallel, batch after batch; every host gets an outcome, in the jobs' order.

    A host that another push holds is asked again until it is free, for `wait_s`, counted for each host.
    """
    stop = stop or Stop()
    outcomes: dict[str, Outcome] = {}

    def run_one(job: Job, *more: str, span: Span | None = None) -> Outcome:
        told, until = ",".join((*options, *more)) or "-", time.monotonic() + wait_s
        while True:
            outcome = run_job(job, folder, push_id, told, watch_s, on_line, span)
            left_s = until - time.monotonic()
            if not isinstance(outcome.error, LockedError) or left_s <= 0 or stop.is_set():
                return outcome
            on_line(job.host.name, Line("step", ("locked", outcome.error.what)))
            stop.wait(min(LOCK_POLL_S, left_s))

    def run_group(group: Sequence[Job]) -> list[Outcome]:
        if stop.is_set():
            return [skipped(job, stop.why) for job in group]
        if len(group) == 1 or "dry-run" in options:
            return [run_one(job) for job in group]
        return list(run_span(Span(group, functools.partial(_deny, folder=folder, push_id=push_id)), run_one))

    for n, batch in enumerate(order.batches(jobs)):
        if why := order.enough([outcome for outcome in outcomes.values() if outcome.error], canaries=n == 1):
            stop.why = why
            stop.set()
        groups = _groups(batch)
        with ThreadPoolExecutor(max_workers=min(WORKERS, len(groups))) as pool:
            futures = [pool.submit(run_group, group) for group in groups]
            for outcome in (outcome for future in as_completed(futures) for outcome in future.result()):
                outcomes[outcome.host] = outcome
                on_outcome(outcome)
    return [outcomes[job.host.name] for job in jobs]


class Span(threading.Barrier):
    """Where the hosts of a span wait for each other before any of them is confirmed; broken where one cannot go."""

    def __init__(self, jobs: Sequence[Job], deny: Callable[[Target], object]) -> None:
        super().__init__(len(jobs))
        self.jobs = jobs
        # The first to wait may wait as long as the last may take to start.
        self.confirm_s = CONFIRM_S + max(int(job.deadline_s) for job in jobs)
        self._deny = deny

    def all_there(self) -> bool:
        """Wait for the others; False where one of them failed."""
        try:
            self.wait()
        except threading.BrokenBarrierError:
            return False
        return True

    def fail(self, job: Job) -> None:
        """Tell the others that one of them failed.

        Those that still start may wait for it to join; and it may be back only when their old services can join it.
        """
        self.abort()
        for other in self.jobs:
            if other is not job:
                self._deny(other.host)


def run_span(span: Span, run_one: Callable[..., Outcome]) -> Iterator[Outcome]:
    """Move hosts together: each is asked first, then all are switched, and none is confirmed before all can be."""
    jobs = span.jobs
    names = " and ".join(job.host.name for job in jobs)
    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        first = list(pool.map(lambda job: run_one(job, "dry-run"), jobs))
        if refused := [outcome for outcome in first if outcome.error]:
            why = f"{refused[0].host} cannot go along, and {names} move together"
            yield from (o if o.error else skipped(job, why) for job, o in zip(jobs, first, strict=True))
            return
        ended = list(pool.map(lambda job: _run_part(job, run_one, span), jobs))
        failed = next((outcome.host for outcome in ended if outcome.error), "")
        # Where a host failed after another one was confirmed, that one goes back too.
        back = [failed and outcome.result == "changed" for outcome in ended]
        yield from pool.map(lambda j, o, b: _take_back(j, o, run_one, failed) if b else o, jobs, ended, back)


def _run_part(job: Job, run_one: Callable[..., Outcome], span: Span) -> Outcome:
    try:
        outcome = run_one(job, span=span)
    except BaseException:
        span.abort()
        raise
    if outcome.error:
        span.fail(job)
    elif outcome.result != "changed":  # it had nothing to wait for
        span.all_there()
    return outcome


def _take_back(job: Job, outcome: Outcome, run_one: Callable[..., Outcome], failed: str) -> Outcome:
    """Roll back a host that was confirmed, because another host of its span was not."""
    ended = run_one(replace(job, verb="rollback", target=str(outcome.previous), payload=b""))
    what = f"{failed} failed, and they move together; generation {outcome.previous} is back"
    error = ended.error or UnhealthyError(what, where=job.host.name, hint=f"labdeploy status {failed}")
    return replace(ended, result="failed" if ended.error else "rolled-back", error=error)


def skipped(job: Job, why: str) -> Outcome:
    """Say that a host was left as it was."""
    return Outcome(job.host.name, "skipped", note=why)


def run_job(
    job: Job,
    folder: Path,
    push_id: str,
    options: str,
    watch_s: int,
    on_line: Callable[[str, Line], None],
    span: Span | None = None,
) -> Outcome:
    """Do one job: connect, run the program, confirm over a second connection when it asks, read its answer."""
    started = time.monotonic()
    confirm_s = span.confirm_s if span else CONFIRM_S
    lines: list[Line] = []

    def see(line: Line) -> None:
        lines.append(line)
        on_line(job.host.name, line)
        if line.kind == "confirm":
            _confirm(job.host, folder, push_id, span)
        elif line.kind == "failed" and span:
            span.fail(job)

    error: LabdeployError | None = None
    try:
        with HostConnection(job.host, folder) as connection:
            connection.run(
                job.verb,
                push_id,
                job.target,
                whoami(),
                str(watch_s),
                str(confirm_s),
                options,
                payload=job.payload,
                on_line=see,
                timeout_s=job.deadline_s + watch_s + confirm_s + SLACK_S,
                whole_s=2 * job.deadline_s + watch_s + confirm_s + 2 * SLACK_S,  # forward, and back if need be
            )
    except LabdeployError as problem:
        error = problem
    return outcome_of(job, lines, error, time.monotonic() - started)


def _confirm(host: Target, folder: Path, push_id: str, span: Span | None) -> None:
    """Confirm a push over a new connection: what the switch may have broken is just this way in.

    A host of a span is confirmed when all of them can be reached so; it is told at once where one cannot go along.
    """
    try:
        with HostConnection(host, folder) as connection:
            if span is None or span.all_there():
                connection.run("confirm", push_id)
                return
    except HostError:  # the host goes back by itself and says so over the first connection
        if span:
            span.abort()
        return
    _deny(host, folder, push_id)


def _deny(host: Target, folder: Path, push_id: str) -> None:
    """Tell a host that another one of its span failed; where it cannot be told it goes back by itself, later."""
    with contextlib.suppress(HostError), HostConnection(host, folder) as connection:
        connection.run("deny", push_id, DENIED)


def outcome_of(job: Job, lines: Sequence[Line], error: LabdeployError | None, seconds: float) -> Outcome:
    """Read the program's answer."""
    said = {line.kind: line for line in lines}
    result, failure = said.get("result"), said.get("failed")
    return Outcome(
        host=job.host.name,
        result=_TOLD.get(result.field(0), "failed") if result else "failed",
        generation=int(result.field(1)) if result else None,
        previous=int(result.field(2)) if result and result.field(2) else None,
        seconds=round(seconds, 2),
        error=_error(job, said, result, failure, error),
        services=_services(job, lines),
        log=tuple((line.field(0), line.field(1)) for line in lines if line.kind == "log"),
        would=tuple(line.field(0) for line in lines if line.kind == "would"),
        deployed={line.field(0): base64.b64decode(line.field(1)) for line in lines if line.kind == "deployed"},
        warnings=tuple(f"{line.field(0)}: {line.field(1)}" for line in lines if line.kind == "warning"),
        plan_before=_plan(said.get("plan-before")),
        plan_after=_plan(said.get("plan-after")),
    )


def _error(
    job: Job, said: Mapping[str, Line], result: Line | None, failure: Line | None, error: LabdeployError | None
) -> LabdeployError | None:
    """Turn what went wrong on a host into its error, with what the host did about it."""
    host = job.host
    if refused := refusal(said.values(), host.name, host.address or ""):
        return refused
    why = failure.field(0) if failure else "the push was cut off"
    service = why.partition(":")[0] if failure and ":" in why else next(iter(job.services), "SERVICE")
    logs = f"labdeploy logs {host.name} {service} -n 50"
    if result is None:
        return error or _silence(host, said)
    if result.field(0) == "needs-person":
        what = f"{why}; then generation {result.field(1)} did not come back either:{result.field(3)}"
        return NeedsPersonError(what, where=host.name, hint=logs)
    if result.field(0) == "rolled-back" and why == DENIED:
        return UnhealthyError(f"{why}; generation {result.field(1)} is back", where=host.name)
    if result.field(0) == "rolled-back":
        return UnhealthyError(f"{why}; generation {result.field(1)} is back", where=host.name, hint=logs)
    return None


def _silence(host: Target, said: Mapping[str, Line]) -> LabdeployError:
    """Say what is known of a host whose program ended without a result: power, network, or systemd-run itself."""
    if "stderr" in said:
        return LabdeployError(said["stderr"].field(0), where=host.name)
    return HostError(
        "the connection was lost before the end; the host goes back to its last good generation by itself",
        where=host.name,
        hint=f"labdeploy status {host.name}",
    )


def _services(job: Job, lines: Sequence[Line]) -> dict[str, ServiceOutcome]:
    found = {name: ServiceOutcome("unchanged") for name in job.services}
    for line in lines:
        if line.kind == "service":
            down, first = (float(text) if text else None for text in (line.field(2), line.field(3)))
            found[line.field(0)] = ServiceOutcome(line.field(1), down, first)
    return found


def _plan(line: Line | None) -> dict[str, Any]:
    try:
        plan = json.loads(line.field(0)) if line else {}
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}


def to_json(push_id: str, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Give the report of a push or rollback as the contract's JSON."""
    return {"push_id": push_id, "hosts": {outcome.host: _outcome_json(outcome) for outcome in outcomes}}


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "result": outcome.result,
        "generation": outcome.generation,
        "previous": outcome.previous,
        "seconds": outcome.seconds,
        "error": str(outcome.error) if outcome.error else None,
        "hint": outcome.error.hint if outcome.error else None,
        "services": {
            name: {
                "action": service.action,
                "downtime_s": service.downtime_s,
                "first_token_s": service.first_token_s,
            }
            for name, service in outcome.services.items()
        },
    }


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
