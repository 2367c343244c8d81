"""A simulation: ten thousand hosts through labdeploy's own engine, with connections that only wait and compute.

Each takes the processor time that a real one took on this machine, and seven round trips of a line with latency; one in
a hundred hosts is off. What is real: jobs, order, workers, outcomes, recap. What is not: the hosts, SSH, the network.

    python tests/bench/push_many.py HOSTS CPU_MS RTT_MS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from labdeploy import deploy, report
from labdeploy.dial import CONNECT_S
from labdeploy.errors import HostError
from labdeploy.host import Line
from labdeploy.remembered import Login, Push

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.ssh import Target

ROUND_TRIPS = 7
OFF_EVERY = 100


def measured(n: int, cpu_ms: float, rtt_ms: float = 50) -> dict[str, float]:
    """Run the simulation in a process of its own, and give what it took."""
    argv = [sys.executable, __file__, str(n), str(cpu_ms), str(rtt_ms)]
    return {"n": n, "cpu_ms": cpu_ms, "rtt_ms": rtt_ms, **json.loads(subprocess.check_output(argv))}


class SimulatedConnection:
    """What HostConnection is to the engine."""

    cpu_s = 0.0
    rtt_s = 0.0

    def __init__(self, host: Target, _folder: Path) -> None:
        self._name = host.name

    def __enter__(self) -> Self:
        if int(self._name) % OFF_EVERY == 0:
            time.sleep(CONNECT_S)
            raise HostError(f"does not answer within {CONNECT_S} s", where=self._name)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, *_words: str, on_line: Callable[[Line], None], **_options: object) -> None:
        """Wait as long as the round trips take, compute as long as SSH does, and find nothing to do."""
        time.sleep(ROUND_TRIPS * self.rtt_s)
        until = time.thread_time() + self.cpu_s
        while time.thread_time() < until:
            pass
        on_line(Line("result", ("unchanged", "1")))


def peak_mib() -> float:
    """Give the most memory that this program had; ru_maxrss would count what started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main(n: int, cpu_ms: float, rtt_ms: float) -> None:
    """Push to n hosts and print what it took."""
    SimulatedConnection.cpu_s, SimulatedConnection.rtt_s = cpu_ms / 1000, rtt_ms / 1000
    deploy.HostConnection = SimulatedConnection  # type: ignore[assignment,misc]
    login = Login("root", 22, None, None)
    pushes = [Push(str(i), f"10.0.{i // 256}.{i % 256}", login, ("a", "b", "c"), "0" * 64, 60) for i in range(n)]
    started = time.monotonic()
    jobs = [deploy.push_job(push, dict, "id") for push in pushes]
    outcomes = deploy.run_jobs(jobs, Path(), "id")
    recap = "".join(report.outcome_text(outcome) for outcome in outcomes)
    took = time.monotonic() - started
    rss = peak_mib()
    each = sorted(outcome.seconds for outcome in outcomes)
    said = {"wall_s": took, "rss_mib": rss, "off": sum(bool(o.error) for o in outcomes), "lines": recap.count("\n")}
    sys.stdout.write(json.dumps(said | {"p50_s": each[n // 2]}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
