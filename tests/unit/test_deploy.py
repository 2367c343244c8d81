"""Pushes as data: lines that hosts said in, outcomes, batches and changes out. No host is touched here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from labdeploy import deploy, plan, report
from labdeploy.errors import (
    HostError,
    InventoryError,
    LabdeployError,
    LockedError,
    NeedsPersonError,
    UnhealthyError,
)
from labdeploy.fleet import History, Switch
from labdeploy.generation import Generation
from labdeploy.hardware import Cpu, Hardware
from labdeploy.host import Line
from labdeploy.inventory import Host
from labdeploy.schema import Mib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def host(name: str) -> Host:
    """Make a host."""
    return Host(Hardware(Cpu(1), Mib(1024)), address=name, name=name)


def job(name: str = "gpu1", *services: str) -> deploy.Job:
    """Make a push to a host."""
    return deploy.Job(host(name), "push", "0" * 64, services or ("chat", "code"))


def said(text: str) -> list[Line]:
    """Read lines as the program says them, with | for tabs."""
    split = (line.strip().split("|") for line in text.strip().splitlines())
    return [Line(kind, tuple(fields)) for kind, *fields in split]


def outcome(text: str, error: LabdeployError | None = None) -> deploy.Outcome:
    """Read an answer."""
    return deploy.outcome_of(job(), said(text) if text else [], error, 3.14159)


# --- what came back -----------------------------------------------------------------------------------------------

CHANGED = """
step|receive
plan-before|{"services": {"chat": {"settings": {"ctx_size": {"value": 8192}}}}}
plan-after|{"services": {"chat": {"settings": {"ctx_size": {"value": 4096}}}}}
step|switch|7
step|restarted|chat|90
step|probe|chat
service|chat|restarted|1.25
confirm|20260101T000000Z-abcdef
result|changed|7|6
"""
UNHEALTHY = """
step|restarted|chat|90
log|chat|error: out of memory
log|chat|exiting
failed|chat: ended while it started: exit-code, exit status 1
step|back|6
service|chat|restarted|2.10
result|rolled-back|6|7
"""


def test_a_push_that_changed():
    """Generations, what became of each service, how long it was away, and both plans."""
    found = outcome(CHANGED)
    assert (found.result, found.generation, found.previous, found.exit_code) == ("changed", 7, 6, 0)
    assert found.services == {
        "chat": deploy.ServiceOutcome("restarted", 1.25),
        "code": deploy.ServiceOutcome("unchanged"),
    }
    assert found.seconds == 3.14
    assert plan.setting_changes(found.plan_before, found.plan_after) == {"chat": ["ctx_size 8192 -> 4096"]}
    assert report.outcome_text(found).startswith("gpu1: generation 7 (was 6): chat ctx_size 8192 -> 4096\n")


def test_a_push_of_the_same():
    """Nothing happened, and that is said in two words."""
    found = outcome("result|unchanged|6")
    assert (found.result, found.generation, found.previous, found.exit_code) == ("unchanged", 6, None, 0)
    assert report.outcome_text(found) == "gpu1: no changes\n"


def test_a_dry_run():
    """What would happen, step by step, and the units as they are deployed, to compare with."""
    answer = "would|systemctl restart u\nservice|chat|restarted\ndeployed|systemd/u|YQo=\nresult|would-change|7|6"
    found = outcome(answer)
    assert (found.result, found.exit_code, found.services["chat"].downtime_s) == ("would-change", 0, None)
    text = report.outcome_text(found)
    assert "gpu1: would systemctl restart u\n" in text
    assert report.dry_run_diff(found, Generation({"systemd/u": b"b\n"})).endswith("-a\n+b\n")


def test_a_push_that_was_undone():
    """Exit code 5: why, that the old generation is back, the last words, and the command that shows more."""
    found = outcome(UNHEALTHY)
    assert (found.result, found.generation, found.exit_code) == ("rolled-back", 6, 5)
    assert isinstance(found.error, UnhealthyError)
    assert str(found.error) == "gpu1: chat: ended while it started: exit-code, exit status 1; generation 6 is back"
    assert found.error.hint == "labdeploy logs gpu1 chat -n 50"
    assert found.log == (("chat", "error: out of memory"), ("chat", "exiting"))
    assert "gpu1: | chat: exiting\n" in report.outcome_text(found)


def test_a_host_that_needs_a_person():
    """Exit code 7, with both failures."""
    found = outcome("failed|chat: not ready after 90 s\nresult|needs-person|6|7| code: ended while it started;")
    assert (found.result, found.exit_code) == ("failed", 7)
    assert isinstance(found.error, NeedsPersonError)
    assert "not ready after 90 s; then generation 6 did not come back either: code: ended" in str(found.error)


@pytest.mark.parametrize(
    ("line", "kind", "code"),
    [
        ("refused|6|another push holds it: push X by me@there|wait", LockedError, 6),
        ("refused|2|changed on the host by hand: changed x|labdeploy diff", InventoryError, 2),
        ("refused|1|only 3 KiB are free in /etc|make room", LabdeployError, 1),
    ],
)
def test_a_host_that_refused(line: str, kind: type[LabdeployError], code: int):
    """Nothing was changed there; its own words and its own hint."""
    found = outcome(line)
    assert found.result == "failed"
    assert type(found.error) is kind
    assert found.exit_code == code
    assert found.error.hint == line.split("|")[3]
    assert str(found.error) == f"gpu1: {line.split('|')[2]}"


def test_a_host_that_never_answered():
    """The connection's own error is the outcome's: exit code 4."""
    found = outcome("", HostError("10.0.0.1:22 does not answer within 10 s", where="gpu1"))
    assert (found.result, found.generation, found.exit_code) == ("failed", None, 4)


def test_a_connection_lost_after_the_end_is_no_failure():
    """The host said that it is done; what became of the line afterwards does not matter."""
    assert outcome(CHANGED, HostError("the connection was lost", where="gpu1")).exit_code == 0


def test_an_answer_that_breaks_off():
    """No result and no error is not success."""
    assert outcome("step|receive").exit_code == 4
    found = outcome("step|receive\nstderr|Failed to start transient service unit")
    assert str(found.error) == "gpu1: Failed to start transient service unit"
    assert "goes back to its last good generation by itself" in str(outcome("").error)


@pytest.mark.parametrize("text", ["", "not json", "[]", "null", '"x"'])
def test_a_plan_that_cannot_be_read_is_none(text: str):
    """An old host's plan must not break the report of a push that went well."""
    assert outcome(f"plan-before|{text}\nresult|changed|7|6").plan_before == {}


def test_the_report_as_json():
    """The contract's words."""
    document = deploy.to_json("id", [outcome(CHANGED), outcome(UNHEALTHY)])
    assert document["push_id"] == "id"
    last = document["hosts"]["gpu1"]
    assert (last["result"], last["generation"], last["seconds"]) == ("rolled-back", 6, 3.14)
    assert last["error"].startswith("gpu1: chat: ")
    assert last["services"]["chat"] == {"action": "restarted", "downtime_s": 2.1, "first_token_s": None}


# --- in which order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "sizes"),
    [
        (deploy.Order(), [5]),
        (deploy.Order(serial=2), [2, 2, 1]),
        (deploy.Order(canary=1), [1, 4]),
        (deploy.Order(canary=1, serial=2), [1, 2, 2]),
        (deploy.Order(canary=5), [5]),
        (deploy.Order(canary=9, serial=1), [5]),
    ],
)
def test_batches(order: deploy.Order, sizes: list[int]):
    """Every host once, in order; canaries first, the rest so many at a time."""
    jobs = [job(f"h{i}") for i in range(5)]
    batches = order.batches(jobs)
    assert [len(batch) for batch in batches] == sizes
    assert [each for batch in batches for each in batch] == jobs
    assert order.batches([]) == []


def run(
    monkeypatch: pytest.MonkeyPatch,
    order: deploy.Order,
    broken: set[str],
    during: Callable[[str], None] = lambda _: None,
) -> tuple[list[deploy.Outcome], list[str]]:
    """Go through five hosts of which some fail, and give the outcomes and the hosts that were touched."""
    touched: list[str] = []

    def pretend(job: deploy.Job, *_: object) -> deploy.Outcome:
        touched.append(job.host.name)
        during(job.host.name)
        text = UNHEALTHY if job.host.name in broken else "result|unchanged|6"
        return deploy.outcome_of(job, said(text), None, 0.0)

    monkeypatch.setattr(deploy, "run_job", pretend)
    jobs = [job(f"h{i}") for i in range(5)]
    return deploy.run_jobs(jobs, Path(), "id", order=order), touched


def results(outcomes: Sequence[deploy.Outcome]) -> list[str]:
    """Name the results."""
    return [each.result for each in outcomes]


def test_a_failed_canary_stops_the_rest(monkeypatch: pytest.MonkeyPatch):
    """The rest is as it was, and the report says so of each, and why."""
    outcomes, touched = run(monkeypatch, deploy.Order(canary=1), {"h0"})
    assert touched == ["h0"]
    assert results(outcomes) == ["rolled-back", *["skipped"] * 4]
    assert "interrupted" not in report.outcome_text(outcomes[1])
    assert "skipped: the canary h0 failed" in report.outcome_text(outcomes[1])
    assert max(each.exit_code for each in outcomes) == 5


def test_a_good_canary_lets_the_rest_go(monkeypatch: pytest.MonkeyPatch):
    """All five are touched."""
    outcomes, touched = run(monkeypatch, deploy.Order(canary=2), {"h4"})
    assert sorted(touched) == [f"h{i}" for i in range(5)]
    assert results(outcomes) == [*["unchanged"] * 4, "rolled-back"]


@pytest.mark.parametrize(("allowed", "touched"), [(0, 1), (1, 2), (2, 3), (None, 5)])
def test_more_than_max_failures_stop_the_rest(monkeypatch: pytest.MonkeyPatch, allowed: int | None, touched: int):
    """--max-failures N: with more than N failures no other host is started."""
    order = deploy.Order(serial=1, max_failures=allowed)
    _, done = run(monkeypatch, order, {f"h{i}" for i in range(5)})
    assert len(done) == touched


def test_outcomes_come_in_the_order_of_the_jobs(monkeypatch: pytest.MonkeyPatch):
    """Whoever is done first: two runs read the same."""
    outcomes, _ = run(monkeypatch, deploy.Order(), set())
    assert [each.host for each in outcomes] == [f"h{i}" for i in range(5)]


def test_the_exit_code_is_the_largest():
    """Of several hosts; a skipped host adds none."""
    texts = ("result|unchanged|6", UNHEALTHY, "refused|6|x|y", "result|needs-person|6|7|x")
    assert [outcome(text).exit_code for text in texts] == [0, 5, 6, 7]
    assert deploy.skipped(job(), "why").exit_code == 0


def test_push_ids_sort_by_time_and_are_safe_words():
    """They stand in file names, unit descriptions and command lines."""
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", deploy.new_push_id())
    assert re.fullmatch(r"[A-Za-z0-9@._-]+", deploy.whoami())


# --- what changed -------------------------------------------------------------------------------------------------


def planned(**services: dict[str, Any]) -> dict[str, Any]:
    """Write a plan as a generation keeps it."""
    return {
        "services": {
            name: {"runner": keys.pop("runner", "llama-server"), "model": keys.pop("model", "m")}
            | {"settings": {key: {"value": to, "why": "x"} for key, to in keys.items()}}
            for name, keys in services.items()
        }
    }


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (planned(a={"x": 1}), planned(a={"x": 1}), {}),
        (planned(a={"x": 1}), planned(a={"x": 2}), {"a": ["x 1 -> 2"]}),
        (planned(a={"x": 1, "y": 1}), planned(a={"x": 2, "y": 3}), {"a": ["x 1 -> 2", "y 1 -> 3"]}),
        (planned(a={"x": 1}), planned(a={"x": 1, "y": 2}), {"a": ["y None -> 2"]}),
        (planned(a={"model": "m"}), planned(a={"model": "n"}), {"a": ["model m -> n"]}),
        (planned(a={"runner": "ollama"}), planned(a={}), {"a": ["runner ollama -> llama-server"]}),
        (planned(), planned(a={"x": 1}), {"a": ["new"]}),
        (planned(a={"x": 1}), planned(), {"a": ["removed"]}),
        ({}, {}, {}),
    ],
)
def test_setting_changes(before: dict[str, Any], after: dict[str, Any], changes: dict[str, list[str]]):
    """Service by service, the value that was and the one that is; a reason that changed is no change."""
    assert plan.setting_changes(before, after) == changes


# --- what became of generations -----------------------------------------------------------------------------------


def switch(event: str, from_: int, to: int, result: str = "ok") -> Switch:
    """Write one entry of a host's journal."""
    return Switch(event, f"id-{event}-{to}", "me@here", "2026-01-01T00:00:00Z", from_, to, ("chat",), result)


JOURNALS: dict[str, tuple[tuple[Switch, ...], int, dict[int, str]]] = {
    "first": ((switch("push", 0, 1),), 1, {0: "adopted", 1: "good"}),
    "second": ((switch("push", 0, 1), switch("push", 1, 2)), 2, {1: "superseded", 2: "good"}),
    "rolled back": (
        (switch("push", 0, 1), switch("push", 1, 2), switch("rollback", 2, 1)),
        1,
        {1: "good", 2: "rolled-back"},
    ),
    "then on": (
        (switch("push", 0, 1), switch("push", 1, 2), switch("rollback", 2, 1), switch("push", 1, 3)),
        3,
        {1: "superseded", 2: "rolled-back", 3: "good"},
    ),
    "unhealthy": (
        (switch("push", 0, 1), switch("settle", 2, 1, "rolled back")),
        1,
        {1: "good", 2: "rolled-back"},
    ),
    "forward again": (
        (switch("push", 0, 1), switch("push", 1, 2), switch("rollback", 2, 1), switch("rollback", 1, 2)),
        2,
        {1: "rolled-back", 2: "good"},
    ),
    "the same again": (
        (switch("push", 0, 1), switch("push", 1, 2), switch("push", 2, 2)),
        2,
        {1: "superseded", 2: "good"},
    ),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_states_of_generations(name: str):
    """Good is the one that was confirmed last; left by a rollback or left for a newer one are two things."""
    journal, good, states = JOURNALS[name]
    found = History(good, good, {}, journal)
    assert {number: found.state_of(number) for number in states} == states


def test_the_last_switch_is_the_last_that_was_confirmed():
    """A push that settled by itself is nothing to undo."""
    journal = (switch("push", 0, 1), switch("push", 1, 2), switch("settle", 3, 2, "rolled back"))
    found = History(2, 2, {}, journal)
    assert found.last_switch == journal[1]
    assert History(0, 0, {}, ()).last_switch is None


def test_history_as_json_and_text():
    """Each generation with what its own push changed, also where that was undone."""
    manifests = {
        1: {"push_id": "id-push-1", "at": "2026-01-01T00:00:00Z", "by": "me@here"},
        2: {"push_id": "id-push-2", "at": "2026-01-02T00:00:00Z", "by": "me@here"},
    }
    journal = (switch("push", 0, 1), switch("push", 1, 2), switch("rollback", 2, 1))
    found = History(1, 1, manifests, journal)
    document = report.history_json(found)
    assert (document["current"], document["good"]) == (1, 1)
    assert [(each["number"], each["state"], each["changed"]) for each in document["generations"]] == [
        (1, "good", ["chat"]),
        (2, "rolled-back", ["chat"]),
    ]
    text = report.history_text({"gpu1": found}).splitlines()
    assert text[1].split()[:2] == ["gpu1", "2"]
    assert text[2].split()[:2] == ["gpu1", "*1"]
    assert "nothing was pushed yet" in report.history_text({"new": History(0, 0, {}, ())})


def locked(times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a host be held for so many tries; give a list that grows with each."""
    tries: list[str] = []

    def answer(each: deploy.Job, *_: object) -> deploy.Outcome:
        tries.append(each.host.name)
        held = len(tries) <= times
        error = LockedError("another push holds it: push X by me@there", where=each.host.name) if held else None
        return deploy.Outcome(each.host.name, "failed" if held else "changed", error=error)

    monkeypatch.setattr(deploy, "run_job", answer)
    monkeypatch.setattr(deploy, "LOCK_POLL_S", 0.01)
    return tries


@pytest.mark.parametrize(("wait_s", "result", "n"), [(0, "failed", 1), (60, "changed", 4)])
def test_a_held_host_is_waited_for(monkeypatch: pytest.MonkeyPatch, wait_s: int, result: str, n: int):
    """As long as asked for, and it is told who holds it; not at all unless asked."""
    tries, told = locked(3, monkeypatch), []
    (ended,) = deploy.run_jobs([job()], Path(), "id", wait_s=wait_s, on_line=lambda _, line: told.append(line))
    assert (ended.result, len(tries)) == (result, n)
    assert told == [Line("step", ("locked", "another push holds it: push X by me@there"))] * (n - 1)


def test_waiting_ends_in_time_and_on_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    """With what the host said."""
    tries = locked(10_000, monkeypatch)
    monkeypatch.setattr(deploy, "LOCK_POLL_S", 0.4)
    (late,) = deploy.run_jobs([job()], Path(), "id", wait_s=1)
    assert isinstance(late.error, LockedError)
    assert 3 <= len(tries) <= 4
    stop = deploy.Stop()
    (stopped,) = deploy.run_jobs([job()], Path(), "id", wait_s=60, stop=stop, on_line=lambda *_: stop.set())
    assert isinstance(stopped.error, LockedError)
