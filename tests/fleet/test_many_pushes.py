"""Many pushes in a row with random changes leave nothing behind."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import faults
from faults import ALL, SEED, Victim
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

PUSHES = 200 if ALL else 25
WARM_UP = 8  # until as many generations are kept as ever will be
_COUNT = r"""
echo files $(find /etc/systemd /etc/labdeploy /run/labdeploy ! -path '*/gen/*' | wc -l)
echo generations $(ls /etc/labdeploy/gen | wc -l)
echo units $(systemctl list-units --all --no-legend | grep -c labdeploy)
echo timers $(systemctl list-timers --all --no-legend | wc -l)
echo transient $(ls /run/systemd/transient 2>/dev/null | wc -l)
echo cgroups $(find /sys/fs/cgroup -maxdepth 3 -type d -name '*labdeploy*' | wc -l)
echo mounts $(grep -c labdeploy /proc/self/mounts)
echo shells $(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -c -e 'labdeploy[-]host' -e 'txn[/]program')
echo servers $(ls -d /proc/[0-9]*/exe | while read e; do readlink $e; done | grep -c -e llama -e ld-linux)
"""


def counted(host: SandboxHost) -> dict[str, int]:
    """Count all that could pile up."""
    lines = sandbox.run(host, "sh", "-c", _COUNT).stdout.splitlines()
    return {name: int(number) for name, number in (line.split() for line in lines)}


def test_many_pushes(fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path) -> None:
    """Generations are pruned to the limit, and no file, unit, link, timer, cgroup, mount or process is left over."""
    folder = tmp_path / "program"
    folder.mkdir()
    program = faults.write_program(folder)
    victim = Victim(Lab(tmp_path, [fresh_host], tiny_model), program)
    chance = random.Random(SEED)  # noqa: S311
    print("seed", SEED)  # noqa: T201
    base = {"runner": "llama-server", "model": "tiny", "bind": fresh_host.address, "cache_ram": "0MiB"}
    seen: dict[tuple[str, ...], dict[str, int]] = {}
    for number in range(PUSHES):
        change: dict[str, Any] = {"ctx_size": 1024 + 256 * chance.randrange(6), "threads": chance.choice([1, 2])}
        if broken := chance.random() < 0.1:
            change["flags"] = ["--no-such-flag"]
        names = tuple(name for name in ("extra0", "extra1") if chance.random() < 0.5)
        victim.lab.services = {name: base | {"port": 8090 + int(name[-1]), "ctx_size": 512} for name in names}
        victim.lab.set(**change)
        code, out = victim.push()
        assert code == (5 if broken else 0), out
        lines = faults.look(fresh_host)
        assert faults.problems(lines) == [], f"push {number}, seed {SEED}"
        assert len(faults.fields(lines, "gen")) <= faults.KEEP + 4
        if number >= WARM_UP and not broken:
            now = counted(fresh_host) | {"generations": 0}
            assert seen.setdefault(names, now) == now, f"push {number}, seed {SEED}"
    assert victim.lab.complete()
