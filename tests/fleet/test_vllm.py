"""A real vLLM on a real host: installed, pushed, changed while it streams, killed, upgraded, rolled back."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

import pytest
from snapshot_maker import write_snapshot
from vllm_lab import HOST_PACKAGES, LOCK, START_S, VllmLab, package_index, second_lock, wheels

from labdeploy import builds, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST = builds.read_lock(LOCK).name


@pytest.fixture(scope="module")
def lab(sandbox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmLab]:
    """Return a host with Python 3.11 and the first build of vLLM; its tests follow one another."""
    folder = tmp_path_factory.mktemp("vllm")
    host = sandbox.up(["vllm1"], "bookworm", state_dir=sandbox_dir)[0]
    script = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(HOST_PACKAGES)}"
    sandbox.run(host, "sh", "-c", f"DEBIAN_FRONTEND=noninteractive; {script}", timeout_s=300)
    lab = VllmLab(folder, [host], write_snapshot(folder / "tiny"))
    (folder / "runners").mkdir()
    (folder / "runners" / LOCK.name).write_bytes(LOCK.read_bytes())
    lab.ok("runner", "install", host.name, "vllm", "0.32.0", "--wheels", str(wheels()))
    yield lab
    sandbox.down(["vllm1"], state_dir=sandbox_dir)


def test_installed_pushed_and_asked(lab: VllmLab) -> None:
    """The unit names the build by its versioned path; a token comes, and its time is measured."""
    pushed = lab.push_ok()
    assert pushed["services"]["chat"]["action"] == "started"
    assert lab.program() == f"/opt/labdeploy/runners/vllm/{FIRST}/bin/vllm"
    assert lab.complete()
    assert lab.n_ctx() == 8192
    chat = lab.ok("check")["hosts"][lab.host.name]["services"]["chat"]
    assert chat["healthy"]
    assert 0 < chat["ttft_ms"]["p50"] <= chat["ttft_ms"]["p95"]
    assert lab.push_ok()["result"] == "unchanged"


def test_nothing_but_the_api_listens_where_others_can_reach(lab: VllmLab) -> None:
    """What its processes say to each other stays on 127.0.0.1; the API is where the inventory says."""
    group = lab.show("ControlGroup")
    processes = lab.on_host("sh", "-c", f"cat /sys/fs/cgroup{group}/cgroup.procs").split()
    listening = [line.split(maxsplit=5) for line in lab.on_host("ss", "-ltnpH").splitlines()]
    ours = {line[3] for line in listening if any(f"pid={pid}," in line[-1] for pid in processes)}
    assert f"{lab.host.address}:8000" in ours
    assert not [place for place in ours - {f"{lab.host.address}:8000"} if not place.startswith("127.0.0.1:")], ours


def test_a_change_lets_a_running_stream_end(lab: VllmLab) -> None:
    """A restart for a new setting waits for the request that runs: all its tokens come, and no error."""
    events: list[str] = []
    client = threading.Thread(target=lambda: events.extend(lab.stream(3000)))
    client.start()
    while not events and client.is_alive():
        time.sleep(0.1)
    lab.set(max_model_len=4096)
    changed = lab.push_ok()
    client.join(60)
    assert not client.is_alive()
    assert changed["services"]["chat"]["action"] == "restarted"
    assert events[-1] == "[DONE]"
    answers = [json.loads(event) for event in events[:-1]]
    assert not [answer for answer in answers if "error" in answer]
    assert answers[-1]["choices"][0]["finish_reason"] == "length"
    assert lab.n_ctx() == 4096


def test_a_killed_engine_comes_back(lab: VllmLab) -> None:
    """When its engine dies vLLM exits with 0; systemd starts it again all the same."""
    before = lab.show("InvocationID")
    engine = lab.on_host("pgrep", "-f", "VLLM::EngineCore").split()
    lab.on_host("kill", "-9", *engine)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if lab.show("InvocationID") != before and lab.show("ActiveState") == "active":
            break
        time.sleep(1)
    assert lab.complete()
    assert lab.show("NRestarts") == "1"
    assert lab.show("MainPID") != "0"


def test_an_upgrade_is_another_build_and_a_rollback_the_first(lab: VllmLab) -> None:
    """Both builds lie side by side; the unit says which one runs. What a generation names cannot be removed."""
    name = lab.host.name
    lock = second_lock(lab.folder)
    second = builds.read_lock(lock).name
    with package_index(wheels()) as url:
        config = f'no-index = true\nfind-links = ["{url}"]\n'
        lab.on_host("sh", "-c", f"mkdir -p /etc/uv && printf '%s' '{config}' >/etc/uv/uv.toml")
        installed = lab.ok("runner", "install", name, "vllm", "0.32.0", "--lock", str(lock))
    assert (installed["build"], installed["use"]) == (second, FIRST)
    assert lab.push_ok()["result"] == "unchanged", "an installed build is not a used one"

    lab.ok("runner", "use", name, "vllm", second)
    assert lab.push_ok()["services"]["chat"]["action"] == "restarted"
    assert lab.program() == f"/opt/labdeploy/runners/vllm/{second}/bin/vllm"
    assert lab.complete()

    refused = lab.run("runner", "rm", name, "vllm", FIRST, "-y")
    assert refused.code == 2
    assert "generation 1 2" in refused.err

    lab.ok("rollback", name)
    assert lab.program() == f"/opt/labdeploy/runners/vllm/{FIRST}/bin/vllm"
    assert lab.complete()
    rows = {row["name"]: row for row in lab.ok("runner", "ls")["hosts"][name]}
    assert rows[second]["generations"] == [3]
    assert rows[FIRST]["installed"]
