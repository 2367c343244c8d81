"""A power cut that loses what was never synced: the host's files lie on ext4, which is shut down without its log.

EXT4_IOC_SHUTDOWN with NOLOGFLUSH drops all that the file system had in memory, as a pulled plug does; the next mount
replays the journal. So a file that was renamed before it was made durable comes back empty, and these tests see it.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import random
import struct
import subprocess
from typing import TYPE_CHECKING

import faults
import pytest
from faults import Victim
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), fs/ext4/ext4.h
NOLOGFLUSH = 2
ALL = os.environ.get("LABDEPLOY_FAULTS") == "all"
SEED = os.environ.get("LABDEPLOY_FAULT_SEED") or f"{dt.datetime.now(dt.UTC):%Y%m%d}"
DRAWN = 6
DURABLE = {"put", "stage", "arm", "switch", "turn", "place", "commit", "finish", "close", "journal", "restore", "undo"}


def pull_the_plug(host: SandboxHost) -> None:
    """Lose all that the host's disk has not made durable, end the host, and mount what is left."""
    disk = os.open(host.folder, os.O_RDONLY)
    fcntl.ioctl(disk, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    os.close(disk)
    sandbox.power_cut(host)
    faults.unmount(host)
    image, copy = faults.image_of(host), faults.image_of(host).with_suffix(".copy")
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)  # another host may still have the dead one mounted
    copy.rename(image)
    faults.mount(host)


@pytest.fixture
def victim(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Iterator[Victim]:
    """Return a host on a disk of its own, with two confirmed generations that were written back."""
    program = tmp_path / "program"
    program.write_text(faults.program_for_tests().text)
    host = faults.on_small_disk(make_host("sid"))
    found = Victim(Lab(tmp_path, [host], tiny_model), program)
    for _ in range(2):
        forward(found)
    yield found
    sandbox.power_cut(host)
    faults.unmount(host)


def forward(victim: Victim) -> None:
    """Push the next inventory; the host must be whole afterwards."""
    victim.turn += 1
    victim.inventory(victim.turn)
    code, out = victim.push()
    assert code == 0, out
    assert faults.problems(faults.look(victim.host)) == []


def test_the_plug_loses_what_was_not_synced(victim: Victim) -> None:
    """The way to cut the power is worth something: an unsynced file is gone, a synced one is there."""
    faults.write_back(victim.host)
    sandbox.run(victim.host, "sh", "-c", "echo a >/root/synced; sync /root/synced /root; echo b >/root/unsynced")
    pull_the_plug(victim.host)
    sandbox.boot(victim.host)
    assert sandbox.run(victim.host, "ls", "/root").stdout.split() == ["synced"]


def test_power_cuts_that_lose_unsynced_writes(victim: Victim) -> None:
    """At every step: what comes back after the cut is wholly the old or the new generation, and boots into it."""
    victim.order(("-", 1, "trace"))
    forward(victim)
    passed = [p for p in dict.fromkeys(victim.trace()) if p.split(":")[0] in DURABLE]
    victim.order()
    decided = next(p for p in passed if p.startswith("finish:"))
    chance = random.Random(SEED)  # noqa: S311
    chosen = passed if ALL else sorted(chance.sample(passed, DRAWN), key=passed.index)
    wrong: list[str] = []
    for point in chosen:
        victim.turn += 1
        victim.inventory(victim.turn)
        old = _current(victim)
        faults.write_back(victim.host)
        victim.order((point, 1, "wait"))
        process = victim.start("push", victim.host.name, "--watch", "0")
        assert victim.wait_for_hit(process), point
        pull_the_plug(victim.host)
        faults.end(process)
        sandbox.boot(victim.host)
        victim.settled()
        victim.order()
        found = faults.problems(faults.look(victim.host))
        is_new, must_be_new = _current(victim) != old, passed.index(point) >= passed.index(decided)
        if is_new != must_be_new:
            found.append(f"new: {is_new}, must be: {must_be_new}")
        victim.lab.complete()
        wrong += [f"{point}: {problem}" for problem in found]
        forward(victim)
    assert not wrong, "\n".join(wrong)


def _current(victim: Victim) -> str:
    return sandbox.run(victim.host, "readlink", "/etc/labdeploy/current").stdout.strip()
