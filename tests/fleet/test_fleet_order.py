"""Several hosts: canaries first, so many at a time, an end after too many failures, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import yaml
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost


@pytest.fixture
def lab(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab with three hosts, one of each suite."""
    return Lab(tmp_path, [make_host(suite) for suite in sandbox.SUITES], tiny_model)


def break_host(lab: Lab, index: int) -> None:
    """Give one host's service a flag that its runner does not know."""
    path = lab.folder / "inventory.yaml"
    inventory = yaml.safe_load(path.read_text())
    inventory["hosts"][lab.hosts[index].name]["services"]["chat"]["flags"] = ["--no-such-flag"]
    path.write_text(yaml.safe_dump(inventory, sort_keys=False))


def generations(lab: Lab) -> list[int]:
    """Give the generation that each host runs."""
    return [host["generation"] for host in lab.run("status", "--json").json["hosts"].values()]


def push_all(lab: Lab, *words: str) -> tuple[int, list[str], str]:
    """Push to all; give the exit code, each host's result, and what was said."""
    ended = lab.run("push", "--all", "-y", "--watch", "1", "--json", *words)
    return ended.code, [host["result"] for host in ended.json["hosts"].values()], ended.err


def test_a_canary_that_fails_keeps_the_rest_as_it_was(lab: Lab) -> None:
    """The first host is undone, no other is touched, and the report says so of each."""
    assert push_all(lab)[1] == ["changed"] * 3
    lab.set(ctx_size=4096)
    break_host(lab, 0)
    code, results, said = push_all(lab, "--canary", "1")
    assert (code, results) == (5, ["rolled-back", "skipped", "skipped"])
    assert "1 of 3 hosts failed" in said
    assert generations(lab) == [1, 1, 1]
    text = lab.run("push", "--all", "-y", "--watch", "0", "--canary", "1").out
    assert f"{lab.hosts[1].name}: skipped: the canary {lab.hosts[0].name} failed; it is as it was" in text


def test_one_at_a_time_until_too_many_failed(lab: Lab) -> None:
    """With --serial 1 --max-failures 0 the hosts after the first failure are not started."""
    push_all(lab)
    lab.set(ctx_size=4096)
    break_host(lab, 1)
    code, results, _ = push_all(lab, "--serial", "1", "--max-failures", "0")
    assert (code, results) == (5, ["changed", "rolled-back", "skipped"])
    assert generations(lab) == [2, 1, 1]


def test_a_canary_that_is_well_lets_the_rest_follow(lab: Lab) -> None:
    """All hosts end on the new generation."""
    code, results, said = push_all(lab, "--canary", "1", "--serial", "2")
    assert (code, results) == (0, ["changed"] * 3), said
    assert generations(lab) == [1, 1, 1]


def test_ctrl_c_ends_the_host_in_flight_and_starts_no_other(lab: Lab) -> None:
    """One Ctrl-C: the host in flight finishes, the rest is skipped, the recap is printed, exit code 130."""
    argv = [sys.executable, "-m", "labdeploy", "push", "--all", "-y", "--serial", "1", "--watch", "3", "-v"]
    push = subprocess.Popen(argv, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in push.stderr or ():
            if "watching" in line:
                push.send_signal(signal.SIGINT)
                break
        out, err = push.communicate(timeout=60)
    finally:
        push.kill()
    assert push.returncode == 130, err
    assert f"{lab.hosts[0].name}: generation 1 (was 0)" in out
    assert out.count("skipped: interrupted before it was started") == 2
    assert "Traceback" not in err
    assert generations(lab) == [1, 0, 0]


def test_two_controllers_at_once(lab: Lab) -> None:
    """One wins whole, the other is told who holds the host and changes nothing."""
    name = lab.host.name
    for round_ in range(4):
        lab.set(ctx_size=2048 + 256 * round_)
        argv = [sys.executable, "-m", "labdeploy", "push", name, "--watch", "1"]
        both = [
            subprocess.Popen(argv, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        ended = [push.communicate(timeout=60) for push in both]
        codes = sorted(push.returncode for push in both)
        assert codes in ([0, 6], [0, 0]), (
            ended
        )  # 0 and 0: the second came when the first had ended, and found no change
        assert sum("generation" in out for out, _ in ended) == 1, ended
        assert lab.n_ctx() == 2048 + 256 * round_
    history = lab.run("history", name, "--json").json["hosts"][name]
    assert [entry["to"] for entry in history["journal"]] == [1, 2, 3, 4]


def test_a_controller_that_sleeps(lab: Lab) -> None:
    """A laptop that falls asleep in the middle of a push: the host goes back by itself, and the lock is free again."""
    lab.push_ok()
    lab.set(ctx_size=4096)
    argv = [sys.executable, "-m", "labdeploy", "push", lab.host.name, "--watch", "2", "-v"]
    push = subprocess.Popen(argv, cwd=lab.folder, stderr=subprocess.PIPE, text=True)
    try:
        for line in push.stderr or ():
            if "watching" in line:
                push.send_signal(signal.SIGSTOP)
                break
        deadline = time.monotonic() + 60
        while lab.on_host("systemctl", "is-active", "labdeploy-txn.service", check=False) != "inactive":
            assert time.monotonic() < deadline, "the host still waits for a controller that sleeps"
            time.sleep(0.5)
        assert lab.n_ctx() == 2048
        assert generations(lab)[0] == 1
        assert lab.push_ok()["generation"] == 3
    finally:
        push.kill()
        push.communicate()
