"""A power cut that loses what was never synced: the host's files lie on ext4, which is shut down without its log.

EXT4_IOC_SHUTDOWN with NOLOGFLUSH drops all that the file system had in memory, as a pulled plug does; the next mount
replays the journal. So a file that was renamed before it was made durable comes back empty, and these tests see it.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
from typing import TYPE_CHECKING

import faults
import pytest
from faults import ALL, SEED, Result, Victim, forward
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), fs/ext4/ext4.h
NOLOGFLUSH = 2
DRAWN = 4
DURABLE = {  # functions that write
    *("put", "stage", "arm", "switch", "turn", "place", "place_generation", "commit", "finish", "prune", "close"),
    *("journal", "restore", "uninstall", "undo", "settle", "enable_units", "reload", "restart_changed", "bring_back"),
}


def pull_the_plug(host: SandboxHost) -> None:
    """Lose all that the host's disk has not made durable, end the host, and mount what is left."""
    disk = os.open(host.folder, os.O_RDONLY)
    fcntl.ioctl(disk, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    os.close(disk)
    sandbox.power_cut(host)
    faults.unmount(host)
    image, copy = faults.image_of(host), faults.image_of(host).with_suffix(".copy")
    # a copy, because another host that was started since may still have the dead file system in its mount namespace
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    copy.rename(image)
    faults.mount(host)


@pytest.fixture
def victim(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Iterator[Victim]:
    """Return a host on a disk of its own, with two confirmed generations that were written back."""
    folder = tmp_path / "program"
    folder.mkdir()
    program = faults.write_program(folder)
    host = faults.on_small_disk(make_host("sid"))
    found = Victim(Lab(tmp_path, [host], tiny_model), program)
    for _ in range(2):
        forward(found)
    yield found
    sandbox.power_cut(host)
    faults.unmount(host)


def test_the_plug_loses_what_was_not_synced(victim: Victim) -> None:
    """The way to cut the power is worth something: an unsynced file is gone, a synced one is there."""
    faults.write_back(victim.host)
    sandbox.run(victim.host, "sh", "-c", "echo a >/root/synced; sync /root/synced /root; echo b >/root/unsynced")
    pull_the_plug(victim.host)
    sandbox.boot(victim.host)
    assert sandbox.run(victim.host, "ls", "/root").stdout.split() == ["synced"]


@pytest.mark.parametrize("story", ["push", "back"])
def test_power_cuts_that_lose_unsynced_writes(victim: Victim, results: Path, story: str) -> None:
    """At every step: what comes back after the cut is wholly the old or the new generation, and boots into it."""
    flags = {"flags": ["--no-such-flag"]} if story == "back" else {}
    passed = [name for name in trace(victim, flags) if name.split(":")[0] in DURABLE]
    decided = next((i for i, name in enumerate(passed) if name.startswith("finish:")), len(passed))
    chance = random.Random(f"{SEED} {story}")  # noqa: S311
    wrong: list[Result] = []
    for point in passed if ALL else chance.sample(passed, DRAWN):
        result = lose_power(victim, point, flags)
        must = "new" if passed.index(point) >= decided else "old"
        if result.ended != must:
            result.problems.append(f"is {result.ended}, must be {must}")
        faults.note(results, result)
        wrong += [result] if result.problems else []
        forward(victim)
    assert not wrong, "\n".join(map(str, wrong))


def trace(victim: Victim, flags: dict[str, list[str]]) -> list[str]:
    """Push without a fault, and give the points that were passed."""
    victim.turn += 1
    victim.inventory(victim.turn, **flags)
    victim.order(("-", 1, "trace"))
    victim.push()
    victim.settled()
    passed = list(dict.fromkeys(victim.trace()))
    victim.order()
    forward(victim)
    return passed


def lose_power(victim: Victim, point: str, flags: dict[str, list[str]]) -> Result:
    """Pull the plug at a point of a push, boot, and judge the host."""
    victim.turn += 1
    victim.inventory(victim.turn, **flags)
    old = current(victim)
    faults.write_back(victim.host)
    victim.order((point, 1, "wait"))
    watcher = faults.Watcher(victim.host.address, victim.lab.port)
    watcher.start()
    process = victim.start("push", victim.host.name, "--watch", "0")
    assert victim.wait_for_hit(process), point
    pull_the_plug(victim.host)
    faults.end(process)
    sandbox.boot(victim.host)
    victim.settled()
    victim.order()
    victim.lab.complete()
    result = Result(victim.host.suite, "push", "power, unsynced writes lost", point, silent_s=watcher.stop())
    result.ended = "old" if current(victim) == old else "new"
    result.problems += faults.problems(faults.look(victim.host))
    return result


def current(victim: Victim) -> str:
    """Give what is installed."""
    return sandbox.run(victim.host, "readlink", "/etc/labdeploy/current").stdout.strip()
