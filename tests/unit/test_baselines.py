"""A check says what got slower since a service was first checked from here."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from labdeploy import fleet, report
from labdeploy.baselines import Baseline, Baselines
from labdeploy.check import Report, Sample
from labdeploy.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Lab


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Know nothing of other tests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Give an inventory of one service whose host is not asked: each check gets what the test put there."""
    lab.write("""
        models: {m: {path: m.gguf}, other: {path: o.gguf}}
        hosts:
          h: {hardware: {cpu: {cores: 4}, ram: 8GiB}, services: {chat: {runner: llama-server, model: m, port: 8080}}}
    """)
    monkeypatch.setattr(fleet, "ask_all", lambda *_: {"h": {"chat": taking(*lab.times_ms)}})  # type: ignore[attr-defined]
    lab.times_ms = (100, 110, 120)  # type: ignore[attr-defined]
    return lab


def taking(*ttft_ms: float, tokens_per_s: float = 100) -> Report:
    """Make a report of completions that took so long."""
    return Report(healthy=True, samples=tuple(Sample(ms, 21, 20 / tokens_per_s) for ms in ttft_ms))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (taking(100, 100, 100), ""),
        (taking(199, 500, 900), ""),  # one was quick enough: the machine was busy
        (taking(201, 500, 900), "first token after 201 ms or more, 100 ms on 2026-01-01"),
        (taking(100, tokens_per_s=51), ""),
        (taking(100, tokens_per_s=49), "49.0 tokens/s or less, 100.0 on 2026-01-01"),
    ],
)
def test_what_got_twice_as_slow_is_told(now: Report, said: str):
    """By the best of its completions."""
    assert Baseline("m", "2026-01-01", 100, 100).worse(now) == said


def test_a_few_milliseconds_are_nothing():
    """Three times as long, but 40 ms more; half as fast, but 40 ms more for all of it."""
    assert Baseline("m", "2026-01-01", 20, 1000).worse(taking(60, tokens_per_s=400)) == ""


def test_the_first_check_is_the_baseline(one: Lab):
    """Later ones are laid beside it, and say when they got slower: exit code 8, and what to type."""
    first = one.run("check")
    assert (first.code, first.err) == (0, "")
    one.times_ms = (300, 300, 300)  # type: ignore[attr-defined]
    ran = one.run("check")
    assert ran.code == 8
    assert "SLOWER" in ran.out
    assert "110.0" in ran.out
    assert "error: h: chat: got slower: first token after 300 ms or more, 110 ms on 20" in ran.err
    assert "hint: labdeploy check h --set-baseline" in ran.err
    found = json.loads(one.run("--json", "check").out)["hosts"]["h"]["services"]["chat"]
    assert (found["healthy"], found["regressed"], found["baseline_ttft_ms"]) == (True, True, 110.0)


def test_a_baseline_can_be_set_anew(one: Lab):
    """With --set-baseline, or by another model."""
    one.run("check")
    one.times_ms = (300, 300, 300)  # type: ignore[attr-defined]
    assert one.run("check", "--set-baseline").code == 0
    assert one.run("check").code == 0
    one.times_ms = (900, 900, 900)  # type: ignore[attr-defined]
    assert one.run("check").code == 8
    one.path.write_text(one.path.read_text().replace("model: m,", "model: other,"))
    assert one.run("check").code == 0


def test_what_is_ill_or_away_is_no_baseline(one: Lab, monkeypatch: pytest.MonkeyPatch):
    """A service that does not answer, a host that cannot be reached."""
    monkeypatch.setattr(fleet, "ask_all", lambda *_: {"h": {"chat": Report(healthy=False, error="HTTP 500")}})
    ran = one.run("check")
    assert (ran.code, "error: h: chat: HTTP 500" in ran.err) == (8, True)
    monkeypatch.setattr(fleet, "ask_all", lambda *_: {"h": HostError("away", where="h")})
    assert one.run("check").code == 4
    assert Baselines(one.path).of("h", "chat", "m") is None


@pytest.mark.parametrize("text", ["", "[]", '{"h/chat": 3}', '{"h/chat": {"model": "m"}}'])
def test_a_file_that_cannot_be_read_is_made_anew(one: Lab, tmp_path: Path, text: str):
    """Cut off, or of another labdeploy."""
    one.run("check")
    (file,) = (tmp_path / "state" / "labdeploy" / "baselines").iterdir()
    file.write_text(text)
    assert one.run("check").code == 0
    assert Baselines(one.path).of("h", "chat", "m") == Baseline(
        "m", Baselines(one.path).of("h", "chat", "m").at, 110, 100
    )


def test_a_folder_that_cannot_be_written_costs_only_the_baseline(one: Lab, monkeypatch: pytest.MonkeyPatch):
    """The check itself is as good."""
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert one.run("check").code == 0


def test_the_table_has_80_columns():
    """Whatever the figures."""
    answers = {"gpu-server-1": {"chat-large": dataclasses.replace(taking(12345.6), baseline_ttft_ms=12345.6)}}
    assert max(map(len, report.check_text(answers).splitlines())) <= 80
