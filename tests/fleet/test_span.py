"""A service that spans two hosts moves as one, and comes back as one.

What serves here is a stand-in (stand_in.pl): it joins hosts as vLLM does and computes nothing.
"""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import Lab
from snapshot_maker import write_snapshot

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.sandbox import SandboxHost

UNIT = "labdeploy-big.service"
PROGRAM = "/usr/local/bin/stand-in"


class SpanLab(Lab):
    """Two hosts that serve `big` together."""

    def __post_init__(self) -> None:
        for host in self.hosts:
            sandbox.copy_in(host, Path(__file__).with_name("stand_in.pl"), PROGRAM)
            sandbox.run(host, "chmod", "755", PROGRAM)
            for file in self.model.iterdir():
                sandbox.copy_in(host, file, f"/srv/models/tiny/{file.name}")
        self.set()

    def set(self, **settings: Any) -> None:  # noqa: ANN401
        """Write the inventory, with these settings of the service beside the usual ones."""
        models = {"tiny": {"path": "tiny", "local": str(self.model)}}
        hosts = {host.name: self._host(host, {}) for host in self.hosts}
        big = {"runner": "vllm", "model": "tiny", "port": self.port, "kv_cache_memory": "64MiB", "max_model_len": 2048}
        big |= {"bind": self.host.address, "span": list(hosts), "span_port": self.span_port, "shutdown_timeout": 1}
        big |= settings
        for host in hosts.values():
            host |= {"runners": {"vllm": PROGRAM}, "services": {}}
        hosts[self.host.name]["services"] = {"big": big}
        self.write({"models": models, "hosts": hosts})

    @property
    def span_port(self) -> int:
        """A port of its own: sandbox hosts share this machine's network, and the parts count connections by port."""
        return 29500 + int(self.host.address.rpartition(".")[2])

    def generations(self) -> list[int]:
        """Give the generation that each host runs."""
        return [host["generation"] for host in self.run("status", "--json").json["hosts"].values()]

    def ids(self) -> set[str]:
        """Give what the installed units name the span; one id where all parts are of the same one."""
        found = [sandbox.run(host, "grep", "^X-LabdeploySpan", f"/etc/systemd/system/{UNIT}") for host in self.hosts]
        return {ended.stdout.strip() for ended in found}

    def context(self) -> int:
        """Give the context of the service that answers."""
        with urllib.request.urlopen(f"http://{self.host.address}:{self.port}/v1/models", timeout=10) as answer:
            return int(json.loads(answer.read())["data"][0]["max_model_len"])

    def pushed(self, *words: str) -> tuple[int, list[str], str]:
        """Push, naming the first host alone; give the exit code, each host's result, and what was said."""
        # A worker takes the head's own connection for its own here, and is only found dead while it is watched.
        ended = self.push("--json", *words, watch_s=5)
        return ended.code, [host["result"] for host in ended.json["hosts"].values()], ended.err


@pytest.fixture
def lab(make_host: Callable[[str], SandboxHost], tmp_path: Path) -> SpanLab:
    """Return two hosts with the oldest and the newest systemd."""
    hosts = [make_host("bookworm"), make_host("sid")]
    return SpanLab(tmp_path, hosts, write_snapshot(tmp_path / "tiny"))


def test_all_hosts_of_a_span_move_or_none(lab: SpanLab) -> None:
    """Forward, refused by one, failed on one, back by the name of either."""
    first, second = lab.hosts
    code, results, said = lab.pushed()
    assert (code, results) == (0, ["changed", "changed"]), said
    assert f"{second.name}: goes along" in said
    assert lab.pushed()[:2] == (0, ["unchanged", "unchanged"])
    state = lab.run("status", "--json").json["hosts"][second.name]["services"]["big"]
    assert (state["active"], state["healthy"]) == ("active", True)
    assert list(lab.run("check", "--json").json["hosts"][second.name]["services"]) == []

    lab.set(max_model_len=1024)
    assert lab.pushed()[:2] == (0, ["changed", "changed"])
    assert (lab.context(), len(lab.ids())) == (1024, 1)

    lab.set(max_model_len=512)
    sandbox.run(second, "mv", "/srv/models/tiny", "/srv/models/away")
    before = lab.snapshot()
    code, results, said = lab.pushed()
    assert (code, results) == (2, ["skipped", "failed"]), said
    assert lab.snapshot() == before, "what one host refuses must not touch the other"
    sandbox.run(second, "mv", "/srv/models/away", "/srv/models/tiny")

    sandbox.run(second, "touch", "/etc/no-context-of-512")
    code, results, said = lab.pushed()
    assert (code, results) == (5, ["rolled-back", "rolled-back"]), said
    assert "another host of its span failed; generation 2 is back" in said
    assert (lab.context(), lab.generations(), len(lab.ids())) == (1024, [2, 2], 1)

    # Its old head waits for the old worker, and is not ready before that is back: each must be told at once.
    sandbox.run(second, "mv", "/etc/no-context-of-512", "/etc/not-any-more")
    sandbox.run(first, "sh", "-c", "echo 8 >/etc/no-context-of-512")
    lab.set(max_model_len=512, span_port=lab.span_port + 1000)
    code, results, said = lab.pushed()
    assert (code, results) == (5, ["rolled-back", "rolled-back"]), said
    assert (lab.context(), lab.generations(), len(lab.ids())) == (1024, [2, 2], 1)

    ended = lab.run("rollback", second.name, "--json")
    assert ended.code == 0, ended.err
    assert f"{first.name}: goes along" in ended.err
    assert (lab.context(), lab.generations(), len(lab.ids())) == (2048, [1, 1], 1)


def test_a_span_comes_back_as_one(lab: SpanLab) -> None:
    """A worker that is killed takes its head along, and both join again."""
    assert lab.pushed()[0] == 0
    before = [sandbox.run(h, "systemctl", "show", "-p", "InvocationID", UNIT).stdout for h in lab.hosts]
    sandbox.run(lab.hosts[1], "systemctl", "kill", "--signal=KILL", UNIT)
    deadline = time.monotonic() + 120
    while True:
        now = [sandbox.run(h, "systemctl", "show", "-p", "InvocationID", UNIT).stdout for h in lab.hosts]
        states = [sandbox.run(h, "systemctl", "is-active", UNIT, check=False).stdout.strip() for h in lab.hosts]
        if states == ["active", "active"] and not set(now) & set(before):
            break
        assert time.monotonic() < deadline, (states, now, before)
        time.sleep(0.5)
    assert lab.context() == 2048
