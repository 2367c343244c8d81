"""What fits is proven on the host before anything stops, and read back after the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from lab import UNIT, Lab

from labdeploy import sandbox
from labdeploy.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

DEEP = {"n_layer": 480, "n_embd": 64, "n_head": 1, "n_head_kv": 1, "n_ff": 64}
HUGE_CTX = (
    524_288  # 60 GiB of cache for the deep model, in tensors of 64 MiB: the software device takes no more than 128
)
WISHED = {"cpu": {"cores": 2}, "ram": "512GiB", "gpus": [{"name": "llvmpipe", "vram": "256GiB"}]}


@pytest.fixture(params=sandbox.SUITES)
def lab(
    request: pytest.FixtureRequest, make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path
) -> Lab:
    """Return a lab with one fresh host, of each suite in turn."""
    return Lab(tmp_path, [make_host(request.param)], tiny_model)


def status(lab: Lab) -> dict[str, Any]:
    """Give what `status` says of `chat`."""
    ended = lab.run("status", "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = ended.json["hosts"][lab.host.name]["services"]["chat"]
    return found


def test_what_is_read_back_is_what_was_planned(lab: Lab) -> None:
    """Buffers of the real process stand beside the plan's, in the generation."""
    lab.push_ok()
    on_cpu = status(lab)["memory"]["host"]
    assert on_cpu["real"]["context_mib"] == on_cpu["planned"]["context_mib"] == pytest.approx(4, abs=1)
    assert on_cpu["real"]["model_mib"] == pytest.approx(on_cpu["planned"]["model_mib"], abs=1)
    before = lab.on_host("cat", "/etc/labdeploy/current/real")
    notes = {"runner": "llama-server", "model": "tiny", "port": 8081, "bind": lab.host.address, "ctx_size": 512}
    lab.services = {"notes": notes}
    lab.set()
    lab.push_ok()
    assert before in lab.on_host("cat", "/etc/labdeploy/current/real"), "what went on keeps what was known of it"


def test_layers_on_a_gpu(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> None:
    """A service planned for two layers has two on the GPU, here Mesa's software Vulkan, and its buffers are planned."""
    lab = Lab(tmp_path, [make_host("sid")], tiny_model)
    lab.extra = {"hardware": WISHED | {"ram": "8GiB", "gpus": [{"name": "llvmpipe", "vram": "4GiB"}]}}
    lab.set(gpu_layers=2)
    lab.push_ok()
    assert lab.complete()
    assert status(lab)["layers_on_gpu"] == 2
    found = status(lab)["memory"]
    for device in ("gpu0", "host"):
        for part in ("model_mib", "context_mib"):
            assert found[device]["real"][part] == pytest.approx(found[device]["planned"][part], abs=1), (device, part)
        assert found[device]["real"]["compute_mib"] <= found[device]["planned"]["compute_mib"] + 16


@pytest.mark.parametrize("gpu", [False, True], ids=["main memory", "GPU"])
def test_what_does_not_fit_is_refused_while_the_old_one_serves(
    make_host: Callable[[str], SandboxHost], tmp_path: Path, *, gpu: bool
) -> None:
    """The inventory claims more than there is, so the plan fits; the runner's own count and the free memory say no."""
    lab = Lab(tmp_path, [make_host("sid")], write_tiny_model(tmp_path / "deep.gguf", **DEEP))
    lab.push_ok()
    since = lab.show("ActiveEnterTimestampMonotonic")
    before = lab.snapshot()
    lab.extra = {"hardware": WISHED if gpu else WISHED | {"gpus": []}}
    lab.set(ctx_size=HUGE_CTX, cache_ram="0MiB")
    ended = lab.push()
    assert ended.code == 3, ended.err
    assert f"error: {lab.host.name}: does not fit: chat needs " in ended.err
    assert "61440 context" in ended.err
    assert "are free" in ended.err
    assert ("of gpu0" if gpu else "of main memory") in ended.err
    assert lab.snapshot() == before
    assert lab.show("ActiveEnterTimestampMonotonic") == since
    assert lab.complete()
    if not gpu:  # the software device would take all of this machine's memory before it fails
        lab.on_host("systemctl", "stop", UNIT)
        assert start_anyway(lab) != 0, "what was refused does not start"


def start_anyway(lab: Lab) -> int:
    """Start what was refused, past labdeploy, and give the exit status; 0 says that it got ready."""
    unit = lab.run("render", "--stdout").out.partition("ExecStart=")[2].partition("\n# ")[0]
    argv = unit.replace("\\\n", " ").split()
    script = (
        f"env HOME=/tmp {' '.join(argv)} >/tmp/forced 2>&1 & p=$!;"
        f" until curl -fso /dev/null http://{lab.host.address}:{lab.port}/health; do"
        " kill -0 $p 2>/dev/null || { wait $p; exit $?; }; sleep 0.1; done; kill -9 $p"
    )
    return sandbox.run(lab.host, "sh", "-c", script, check=False).returncode


def test_a_runner_that_cannot_count_is_left_to_its_start(lab: Lab) -> None:
    """Where the proof says nothing, the start decides, as it would have without it."""
    lab.push_ok()
    lab.set(flags=["--no-such-flag"])
    ended = lab.push()
    assert ended.code == 5, ended.err
    assert lab.show("ActiveState") == "active"
    assert lab.on_host("sh", "-c", "ls /run/labdeploy; pgrep -f 'fit o[n]' || true") == ""
    assert UNIT in lab.on_host("systemctl", "list-units", "labdeploy-*")
