"""Time pushes without changes beside other tools, on the same hosts: `make bench`.

    python tests/bench/push.py           measure, then write docs/benchmarks.md and its plot; about a quarter of an hour
    python tests/bench/push.py --quick   a minute: fewer runs and hosts, nothing is written
    python tests/bench/push.py --page    write the page and the plot from the recorded runs

Needs root, for sandbox hosts, and a quiet machine. The other tools are installed into ~/.cache/labdeploy/bench.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy import sandbox

sys.path.insert(0, str(Path(__file__).parent))
import push_downtime
import push_hosts
import push_many
import push_page
import push_render
import push_tools
from push_page import Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Of each fleet: hosts, rounds, and the tools that take part.
FAST = ("labdeploy", "bare paramiko", "OpenSSH", "pyinfra")
SIZES = ((1, 15, push_page.TOOLS), (50, 5, push_page.TOOLS), (200, 5, FAST[:3]))
HANGS_S = 300  # no tool takes so long; one that asks for what it is not given would wait for ever
QUICK_SIZES = ((1, 2, push_page.TOOLS), (20, 1, FAST))


def main(words: Sequence[str]) -> int:
    """Measure, record, write, judge."""
    if list(words) == ["--page"]:
        push_page.write(push_page.load())
        return 0
    quick = list(words) == ["--quick"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and take the host down
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # no tool shall compile itself at each start
    programs = push_tools.install(say)
    with tempfile.TemporaryDirectory(prefix="labdeploy-bench-") as name:
        folder = Path(name)
        try:
            results = measured(folder, programs, QUICK_SIZES if quick else SIZES, quick=quick)
        finally:
            sandbox.down(state_dir=folder / "sandbox")
    if not quick:
        push_page.save(results)
        push_page.write(results)
    for bar in push_page.bars(results):
        say(bar.line)
    return 0


def say(text: str) -> None:
    """Print progress."""
    sys.stderr.write(f"{text}\n")


def measured(
    folder: Path, programs: Path, sizes: Sequence[tuple[int, int, Sequence[str]]], *, quick: bool
) -> push_page.Results:
    """Run every tool on every fleet, then what needs no other tool."""
    host = push_hosts.prepare(folder, max(n for n, _, _ in sizes))
    runs = [run for i, size in enumerate(sizes) for run in rounds(folder / f"fleet{i}", host, programs, *size)]
    say("planning and rendering")
    render = push_render.measured(folder / "render", programs, n_hosts=100 if quick else 1000)
    say("time without an answer")
    downtime = push_downtime.measured(folder / "downtime", host, n=1 if quick else 9)
    few, many = sizes[0][0], sizes[-1][0]
    cpu_ms = push_page.cpu_ms_per_host(runs, few, many)
    say("simulating many hosts")
    simulated = push_many.measured(500 if quick else 10_000, cpu_ms)
    return push_page.Results(push_page.machine(), runs, render, downtime, simulated)


def rounds(
    folder: Path, host: sandbox.SandboxHost, programs: Path, n: int, n_rounds: int, names: Sequence[str]
) -> Iterator[Run]:
    """Run the tools in turn, round after round."""
    fleet = push_hosts.fleet(folder, host, n)
    warm_up(fleet)
    argvs = push_tools.tools(fleet, programs)
    for i in range(n_rounds):
        say(f"{n} hosts, round {i + 1} of {n_rounds}")
        for name in turns(names, i):
            yield one_run(name, n, i, argvs)


def turns(names: Sequence[str], round_: int) -> list[str]:
    """Give the order of a round: the slow tools once, the fast ones before, between and after them.

    How fast the machine is changes by a fifth from one second to the next, which falls on one run of a second and not
    on one of half a minute. Each pass and each round begins with another tool.
    """
    fast, slow = ([name for name in names if (name in FAST) == is_fast] for is_fast in (True, False))
    order = rotated(fast, round_)
    for i, name in enumerate(rotated(slow, round_), start=1):
        order += [name, *rotated(fast, round_ + i)]
    return order


def rotated(names: Sequence[str], n: int) -> list[str]:
    """Begin with another one."""
    return [names[(i + n) % len(names)] for i in range(len(names))]


def warm_up(fleet: push_hosts.Fleet) -> None:
    """Push once to all, which finds nothing to do, and remembers that."""
    argv = [sys.executable, "-m", "labdeploy", "-i", str(fleet.folder / "inventory.yaml"), "push", "--all", "-y"]
    subprocess.run(argv, check=True, capture_output=True)


def one_run(name: str, n: int, round_: int, argvs: Mapping[str, Sequence[str]]) -> Run:
    """Run one tool as a process of its own."""
    with tempfile.NamedTemporaryFile("r") as took, tempfile.TemporaryFile() as said:
        launch = [sys.executable, "-I", "-S", str(Path(__file__).with_name("push_launch.py")), took.name]
        argv = [*launch, *argvs[name]]
        ended = subprocess.run(argv, check=False, stdout=said, stderr=said, stdin=subprocess.DEVNULL, timeout=HANGS_S)
        said.seek(0)
        if ended.returncode:
            raise SystemExit(f"{name} on {n} hosts failed:\n{said.read().decode()[-2000:]}")
        wall_s, cpu_s, rss_mib = map(float, took.read().split())
    say(f"  {name}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU, {rss_mib:.0f} MiB")
    return Run(name, n, round_, wall_s, cpu_s, rss_mib)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
