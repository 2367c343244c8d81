"""A real vLLM on a real host: installed, pushed, changed while it streams, killed, upgraded, rolled back."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from snapshot_maker import write_snapshot
from vllm_lab import HOST_PACKAGES, LOCK, START_S, VllmLab, VllmSpanLab, lock_with_ray, package_index, wheels

from labdeploy import builds, sandbox
from labdeploy.hardware import Gpu
from labdeploy.models.model import ModelFacts
from labdeploy.models.safetensors import read_snapshot
from labdeploy.runners.base import Budget, GpuBudget, Part, Request
from labdeploy.runners.vllm import RUNNER
from labdeploy.runners.vllm_memory import kv_cache
from labdeploy.runners.vllm_settings import DTYPE_BYTES, VllmSettings
from labdeploy.schema import Mib, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from labdeploy.models.safetensors import Snapshot
    from labdeploy.sandbox import SandboxHost

FIRST = builds.read_lock(LOCK).name


def host_with_python(name: str, sandbox_dir: Path) -> SandboxHost:
    """Bring up a host on which the build can run."""
    host = sandbox.up([name], "bookworm", state_dir=sandbox_dir)[0]
    script = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(HOST_PACKAGES)}"
    sandbox.run(host, "sh", "-c", f"DEBIAN_FRONTEND=noninteractive; {script}", timeout_s=300)
    return host


@pytest.fixture(scope="module")
def lab(sandbox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmLab]:
    """Return a host with Python 3.11 and the first build of vLLM; its tests follow one another."""
    folder = tmp_path_factory.mktemp("vllm")
    host = host_with_python("vllm1", sandbox_dir)
    lab = VllmLab(folder, [host], write_snapshot(folder / "tiny"))
    (folder / "runners").mkdir()
    (folder / "runners" / LOCK.name).write_bytes(LOCK.read_bytes())
    lab.ok("runner", "install", host.name, "vllm", "0.32.0", "--wheels", str(wheels()))
    yield lab
    sandbox.down(["vllm1"], state_dir=sandbox_dir)


@pytest.fixture(scope="module")
def pair(lab: VllmLab, sandbox_dir: Path) -> Iterator[VllmSpanLab]:
    """Return that host and another one, both with the build that has Ray too."""
    other = host_with_python("vllm2", sandbox_dir)
    lock = lock_with_ray(lab.folder)
    pair = VllmSpanLab(lab.folder, [lab.host, other], lab.model, build=builds.read_lock(lock).name)
    for host in pair.hosts:
        pair.ok("runner", "install", host.name, "vllm", "0.32.0", "--lock", str(lock), "--wheels", str(wheels()))
    yield pair
    sandbox.down(["vllm2"], state_dir=sandbox_dir)


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
    with lab.streaming(3000) as events:
        lab.set(max_model_len=4096)
        changed = lab.push_ok()
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
    lock = lock_with_ray(lab.folder)
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


# --- over two hosts -----------------------------------------------------------------------------------------------


def test_two_hosts_serve_one_model(pair: VllmSpanLab) -> None:
    """A part of every layer on each: pushed, changed while it streams, a crash of either healed, rolled back."""
    pair.set()
    pushed = pair.ok("push", pair.host.name)["hosts"]
    assert [host["result"] for host in pushed.values()] == ["changed", "changed"]
    assert pair.complete()
    assert pair.n_ctx() == 8192

    with pair.streaming(500) as events:
        pair.set(max_model_len=4096)
        assert pair.ok("push", pair.host.name)["hosts"][pair.hosts[1].name]["result"] == "changed"
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert pair.n_ctx() == 4096

    before = pair.invocations()
    pair.kill(1)
    pair.wait_healed(before)

    assert pair.run("rollback", pair.hosts[1].name).code == 0
    assert pair.n_ctx() == 8192
    assert pair.complete()


def test_ray_joins_two_hosts(pair: VllmSpanLab) -> None:
    """A head and a node of a real Ray cluster, each in its unit: joined, a crash of either healed. Not a real vLLM."""
    pair.set_ray()
    pair.ok("push", pair.host.name)
    addresses = {host.address for host in pair.hosts}
    assert set(pair.complete().split()) == addresses
    for number in (1, 0):
        before = pair.invocations()
        pair.kill(number)
        pair.wait_healed(before)
        assert set(pair.complete().split()) == addresses


# --- what is planned, against what vLLM says itself ---------------------------------------------------------------

CACHE_BYTES = 16 << 20
MIXED = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 12,
    "sliding_window": 256,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
SLIDING = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}
# name: (config.json, engine arguments); fp8 last: on a CPU without AVX-512 vLLM sizes the cache, says so, and gives up.
KV_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"num_key_value_heads": 4}, {"dtype": "float32"}),
    "gqa": ({}, {"dtype": "float32"}),
    "tied": ({"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
    "sliding": (SLIDING, {"dtype": "float32"}),
    "mixed": (MIXED, {"dtype": "bfloat16"}),
    "fp8": ({}, {"dtype": "float32", "kv_cache_dtype": "fp8"}),
}


def test_the_kv_cache_is_as_vllm_reports_it(lab: VllmLab) -> None:
    """Blocks and concurrency of six models: equal, not near."""
    snapshots = {name: write_snapshot(lab.folder / "kv" / name, **config) for name, (config, _) in KV_CASES.items()}
    for name, folder in snapshots.items():
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            sandbox.copy_in(lab.host, folder / file, f"/srv/models/kv/{name}/{file}")
    common = {"kv_cache_memory_bytes": CACHE_BYTES, "max_model_len": 2048, "max_num_seqs": 4}
    asked = [{"model": f"/srv/models/kv/{name}", **common, **more} for name, (_, more) in KV_CASES.items()]
    reports, said = lab.in_build(FIRST, "kv_report.py", asked)
    logged = re.findall(
        r"KV cache size: [\d,]+ tokens, Maximum concurrency for 2,048 tokens per request: ([\d.]+)x", said
    )
    assert len(reports) >= len(KV_CASES) - 1, said[-3000:]
    assert len(logged) == len(KV_CASES), said[-3000:]
    for i, (name, (_, more)) in enumerate(KV_CASES.items()):
        element_bytes = 1 if "kv_cache_dtype" in more else DTYPE_BYTES[more["dtype"]]
        report = reports[min(i, len(reports) - 1)]
        cache = kv_cache(
            read_snapshot(snapshots[name]),
            tp=1,
            element_bytes=element_bytes,
            block_tokens=report["block_size"],
            in_flight=report["max_num_batched_tokens"],
        )
        assert f"{cache.concurrency(CACHE_BYTES, 2048):.2f}" == logged[i], name
        if i < len(reports):
            assert cache.n_blocks(CACHE_BYTES) == report["num_gpu_blocks"], name


def test_the_parser_of_vllm_takes_every_flag_that_is_rendered(lab: VllmLab) -> None:
    """Each setting at once and alone, on the CPU and on GPUs; a flag that it does not know shows that it looks."""
    argvs = list(rendered_argvs(read_snapshot(lab.model)))
    flags = {word for argv in argvs for word in argv if word.startswith("--")}
    assert len(flags) >= 16, flags
    [said], _ = lab.in_build(FIRST, "flags_report.py", [*argvs, [argvs[0][0], "--no-such-flag"]])
    assert [(argv, error) for argv, error in zip(argvs, said, strict=False) if error] == []
    assert "--no-such-flag" in said[-1]


def rendered_argvs(snapshot: Snapshot) -> Iterator[list[str]]:
    """Give what follows `vllm serve` for services with each setting that an inventory may have."""
    everything = {
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory": Mib(64),
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "enforce_eager": True,
        "trust_remote_code": True,
        "served_model_name": "tiny",
        "shutdown_timeout": 10,
    }
    over_hosts = {"span", "span_addresses", "span_port", "engine"}
    assert set(everything) | over_hosts == set(settings_of(VllmSettings)) - {"gpus"}, "devices are named by env"
    gpus = tuple(
        GpuBudget(i, i, Gpu(name="RTX 4090", vram=Mib(24576), compute_capability="8.9"), 24576, 24064) for i in (0, 1)
    )
    for some in ({}, everything, *({key: value} for key, value in everything.items())):
        for has in ((), gpus):
            settings = {key: value for key, value in some.items() if has or key != "tensor_parallel_size"}
            yield list(serve_argv(snapshot, has, settings))
    for (engine, has), rank in itertools.product((("mp", ()), ("mp", gpus), ("ray", gpus)), (0, 1)):
        part = Part(rank, ("a", "b"), ("10.0.0.1", "10.0.0.2"))
        yield list(serve_argv(snapshot, has, {"span": part.hosts, "engine": engine, "span_port": 29600}, part))


def serve_argv(
    snapshot: Snapshot, gpus: tuple[GpuBudget, ...], settings: dict[str, Any], part: Part | None = None
) -> tuple[str, ...]:
    """Plan one service and give the words after `serve`."""
    request = Request(
        name="chat",
        unit="labdeploy-chat.service",
        runner="vllm",
        runner_why="",
        model=ModelFacts("tiny", "/srv/models/tiny", snapshot.size_bytes, "safetensors", None, snapshot),
        binary="/opt/x/bin/vllm",
        bind="127.0.0.1",
        port=8000,
        settings=VllmSettings(**settings),
        flags=(),
        env={},
        api_key_file=None,
        part=part,
    )
    budget = Budget(gpus, 65536, threads=2, threads_why="", cpu_features=("avx2",))
    return RUNNER.plan(request, budget).argv[2:]
