"""vLLM: what is chosen for it, what it is told, and what is refused before it would refuse to start."""

from __future__ import annotations

import dataclasses
import subprocess
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from labdeploy.errors import InventoryError
from labdeploy.hardware import Gpu
from labdeploy.models.model import ModelFacts
from labdeploy.models.safetensors import Snapshot
from labdeploy.runners.base import Budget, GpuBudget, Request
from labdeploy.runners.vllm import RUNNER
from labdeploy.runners.vllm_memory import (
    KvCache,
    activation_bytes,
    kv_bytes_per_token,
    kv_cache,
    n_graphs,
    weights_bytes,
)
from labdeploy.runners.vllm_settings import VllmSettings
from labdeploy.schema import Mib

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.runners.base import ServicePlan

QWEN3_8B = Snapshot(
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    size_bytes=16_381_516_144,
    tensor_bytes={"BF16": 16_381_470_720},
    dtype="bfloat16",
    quantization=None,
    hidden_size=4096,
    intermediate_size=12288,
    n_layer=36,
    n_attention_heads=32,
    n_key_value_heads=8,
    head_dim=128,
    vocab_size=151_936,
    max_model_len=40960,
    default_model_len=40960,
    sliding_window=None,
    n_sliding_layers=0,
    kv_lora_rank=0,
    qk_rope_head_dim=0,
    keeps_state=False,
    tie_word_embeddings=False,
)
LLAMA_70B = dataclasses.replace(
    QWEN3_8B,
    model_type="llama",
    size_bytes=141 * 10**9,
    tensor_bytes={"BF16": 141 * 10**9},
    hidden_size=8192,
    intermediate_size=28672,
    n_layer=80,
    n_attention_heads=64,
    vocab_size=128_256,
    max_model_len=131_072,
    default_model_len=131_072,
)


def gpu(index: int = 0, vram_mib: int = 24576, *, free_mib: float | None = None, **about: Any) -> GpuBudget:  # noqa: ANN401
    """Give a GPU of which all but the reserve of 512 MiB is free."""
    card = Gpu(**{"name": "RTX 4090", "vram": Mib(vram_mib), "compute_capability": "8.9", **about})
    return GpuBudget(index, index, card, vram_mib, vram_mib - 512 if free_mib is None else free_mib)


def budget(*gpus: GpuBudget, ram_mib: float = 128 * 1024, **about: Any) -> Budget:  # noqa: ANN401
    """Give a host with these GPUs."""
    return Budget(gpus, ram_mib, threads=8, threads_why="8 physical cores", cpu_features=("avx2",), **about)


def request(snapshot: Snapshot | None = QWEN3_8B, *, more: dict[str, Any] | None = None, **settings: Any) -> Request:  # noqa: ANN401
    """Ask for a service with these settings; `more` are keys of the request itself."""
    size = snapshot.size_bytes if snapshot else 1
    facts = ModelFacts("qwen", "/srv/models/qwen", size, "safetensors", None, snapshot)
    common = Request(
        name="chat",
        unit="labdeploy-chat.service",
        runner="vllm",
        runner_why="as the inventory says",
        model=facts,
        binary="/opt/labdeploy/runners/vllm/current/bin/vllm",
        bind="127.0.0.1",
        port=8000,
        settings=VllmSettings(**settings),
        flags=(),
        env={},
        api_key_file=None,
    )
    return dataclasses.replace(common, **(more or {}))


def plan(asked: Request, host: Budget) -> ServicePlan:
    """Plan a service."""
    return RUNNER.plan(asked, host)


def value(planned: ServicePlan, key: str) -> Any:  # noqa: ANN401
    """Give a chosen setting."""
    return planned.settings[key].value


def after(argv: tuple[str, ...], flag: str) -> str:
    """Give the word that follows a flag, which must stand there once."""
    assert argv.count(flag) == 1, flag
    return argv[argv.index(flag) + 1]


# --- formulas ----------------------------------------------------------------------------------------------------


def test_kv_bytes_are_those_of_vllm():
    """Llama-3.1-8B in bfloat16 takes 2 MiB for a block of 16 tokens, as a real start logged."""
    llama_8b = dataclasses.replace(QWEN3_8B, n_layer=32)
    assert layout(llama_8b).block_bytes == 2 * 1024**2


@pytest.mark.parametrize(("head_dim", "cache_mib", "n_tokens"), [(16, 18, 36_864), (64, 75, 38_400)])
def test_a_cache_holds_the_tokens_that_vllm_logged(head_dim: int, cache_mib: int, n_tokens: int):
    """Measured: vLLM 0.32 on a CPU, 4 layers, 2 KV heads, bfloat16: `CPU KV cache size: 36,864 tokens` and 38,400."""
    tiny = dataclasses.replace(QWEN3_8B, n_layer=4, n_attention_heads=4, n_key_value_heads=2, head_dim=head_dim)
    assert cache_mib * 1024**2 // (4 * kv_bytes_per_token(tiny, tp=1, element_bytes=2)) == n_tokens


def test_kv_heads_split_until_each_gpu_has_one():
    """More GPUs than KV heads keep them several times; a latent cache does not split at all."""
    per_layer = [kv_bytes_per_token(QWEN3_8B, tp=tp, element_bytes=2) for tp in (1, 8, 16)]
    assert per_layer == [4096, 512, 512]
    latent = dataclasses.replace(QWEN3_8B, n_layer=61, kv_lora_rank=512, qk_rope_head_dim=64)
    assert kv_bytes_per_token(latent, tp=8, element_bytes=2) == 576 * 2


@pytest.mark.parametrize(
    ("full", "sliding", "padded"), [(2, 10, 12), (3, 10, 15), (6, 8, 16), (0, 12, 12), (12, 0, 12)]
)
def test_mixed_layers_are_counted_by_groups(full: int, sliding: int, padded: int):
    """All groups hold as many layers as one (v1/core/kv_cache_planning.py), the last ones padded."""
    mixed = dataclasses.replace(QWEN3_8B, n_layer=full + sliding, n_sliding_layers=sliding, sliding_window=1024)
    cache = layout(mixed)
    assert (cache.full_groups + cache.sliding_groups) * cache.block_bytes == padded * 4096 * 16


# What vLLM 0.32.0 (CPU, blocks of 128 tokens, 4096 in flight, cache of 16 MiB) logged at its start for small models.
MEASURED = {
    "full": ({"n_layer": 2, "n_key_value_heads": 4}, 4, 64, 4.0),
    "GQA": ({"n_layer": 2, "n_key_value_heads": 2}, 4, 128, 8.0),
    "tied, bfloat16": ({"n_layer": 2, "n_key_value_heads": 2, "tie_word_embeddings": True}, 2, 256, 16.0),
    "window": ({"n_layer": 2, "n_key_value_heads": 2, "sliding_window": 256, "n_sliding_layers": 2}, 4, 128, 7.53),
    "hybrid": ({"n_layer": 12, "n_key_value_heads": 2, "sliding_window": 256, "n_sliding_layers": 10}, 2, 256, 2.53),
    "fp8": ({"n_layer": 2, "n_key_value_heads": 2}, 1, 512, 32.0),
}


@pytest.mark.parametrize("name", MEASURED)
def test_blocks_and_concurrency_are_those_that_vllm_logged(name: str):
    """Measured once and kept here; tests/fleet/test_vllm.py asks the real engine again."""
    shape, element_bytes, n_blocks, concurrency = MEASURED[name]
    snapshot = dataclasses.replace(QWEN3_8B, head_dim=32, **shape)
    cache = kv_cache(snapshot, tp=1, element_bytes=element_bytes, block_tokens=128, in_flight=4096)
    assert cache.n_blocks(16 << 20) == n_blocks
    assert round(cache.concurrency(16 << 20, 2048), 2) == concurrency


def layout(snapshot: Snapshot) -> KvCache:
    """Lay out a cache in bfloat16 on one GPU."""
    return kv_cache(snapshot, tp=1, element_bytes=2, block_tokens=16, in_flight=4096)


def test_weights_are_loaded_in_the_dtype_unless_quantized():
    """A float32 checkpoint halves; packed integers stay as they are."""
    stored = dataclasses.replace(QWEN3_8B, tensor_bytes={"F32": 400, "BF16": 100, "I32": 7})
    assert weights_bytes(stored, "bfloat16") == 200 + 100 + 7
    assert weights_bytes(stored, "float32") == 400 + 200 + 7
    assert weights_bytes(dataclasses.replace(stored, quantization="awq"), "float16") == 507


def test_activations_grow_with_everything_they_are_made_of():
    """An estimate, so at least it must move the right way."""
    base = {"tokens": 2048, "seqs": 256, "tp": 1, "dtype_bytes": 2}
    for key, more in (("tokens", 4096), ("seqs", 512), ("dtype_bytes", 4)):
        assert activation_bytes(QWEN3_8B, **{**base, key: more}) > activation_bytes(QWEN3_8B, **base)
    assert activation_bytes(QWEN3_8B, **{**base, "tp": 2}) < activation_bytes(QWEN3_8B, **base)


@pytest.mark.parametrize(("seqs", "n"), [(1, 2), (4, 4), (64, 19), (128, 35), (256, 51), (1024, 51)])
def test_graphs_are_captured_up_to_twice_the_requests(seqs: int, n: int):
    """1, 2, 4, then by 8 to 248 and by 16 to 512."""
    assert n_graphs(seqs) == n


# --- choices -----------------------------------------------------------------------------------------------------


def test_a_gpu_of_its_own_is_taken_as_vllm_would():
    """With the reserve kept free, vLLM's own 0.92 of 24 GiB is there."""
    planned = plan(request(), budget(gpu()))
    assert planned.fits
    assert value(planned, "gpu_memory_utilization") == 0.92
    assert value(planned, "tensor_parallel_size") == 1
    assert 4096 <= value(planned, "max_model_len") < 40960
    assert planned.memory["gpu0"].total_mib <= 24576 - 512


def test_the_kv_cache_is_what_the_share_leaves():
    """Weights, activations and graphs come off the share; the CUDA context is beside it."""
    planned = plan(request(), budget(gpu()))
    taken = planned.memory["gpu0"]
    assert taken.total_mib == pytest.approx(0.92 * 24576 + 512, abs=1)
    assert taken.model_mib == pytest.approx(QWEN3_8B.weights_bytes / 1024**2)
    assert value(planned, "max_model_len") * 147_456 / 1024**2 < taken.context_mib


def test_the_whole_context_is_taken_where_it_fits():
    """And with it the wide batch of a large GPU."""
    planned = plan(request(), budget(gpu(vram_mib=81920)))
    assert value(planned, "max_model_len") == 40960
    assert (value(planned, "max_num_seqs"), value(planned, "max_num_batched_tokens")) == (1024, 8192)


def test_more_memory_never_means_less_context():
    """Wider batches on larger GPUs must not eat the context."""
    sizes = range(18 * 1024, 90 * 1024, 512)
    for asked in ({}, {"enforce_eager": True}, {"kv_cache_dtype": "fp8"}):
        plans = [plan(request(**asked), budget(gpu(vram_mib=size))) for size in sizes]
        lengths = [value(planned, "max_model_len") for planned in plans]
        assert all(less <= more for less, more in pairwise(lengths))
        assert all(planned.fits or not later.fits for later, planned in pairwise(plans))


def test_a_plan_that_fits_never_takes_more_than_is_free():
    """Whatever is free, on cards of every size."""
    for vram in (8192, 12288, 16384, 24576, 49152, 81920, 143_771):
        for free in (0.3, 0.5, 0.9, 0.97):
            card = gpu(vram_mib=vram, free_mib=vram * free)
            planned = plan(request(), budget(card))
            assert not planned.fits or planned.memory["gpu0"].total_mib <= card.free_mib


def test_what_the_inventory_says_wins():
    """And still appears with its reason."""
    planned = plan(
        request(max_model_len=8192, max_num_seqs=16, gpu_memory_utilization=0.8, dtype="float16", shutdown_timeout=5),
        budget(gpu()),
    )
    assert planned.fits
    assert after(planned.argv, "--max-model-len") == "8192"
    assert after(planned.argv, "--max-num-seqs") == "16"
    assert after(planned.argv, "--gpu-memory-utilization") == "0.8"
    assert after(planned.argv, "--dtype") == "float16"
    assert planned.settings["max_num_seqs"].why == "as the inventory says"
    assert planned.stop_timeout_s == 35


def test_an_explicit_cache_lowers_the_share_too():
    """Nothing is sized by the utilization then, but a start with less free than it says is refused all the same."""
    planned = plan(request(kv_cache_memory=Mib(2048)), budget(gpu(vram_mib=81920)))
    assert planned.fits
    assert after(planned.argv, "--kv-cache-memory-bytes") == "2048M"
    assert 0.2 < value(planned, "gpu_memory_utilization") < 0.4
    assert planned.memory["gpu0"].context_mib == 2048
    assert value(planned, "max_model_len") * 147_456 / 1024**2 < 2048


# --- several GPUs and several services ---------------------------------------------------------------------------


def test_two_services_share_a_gpu():
    """Each is planned with what the other left, and both shares and their CUDA contexts fit."""
    card = gpu(vram_mib=81920)
    first = plan(request(), budget(card, gpu_sharers=2))
    left = dataclasses.replace(card, free_mib=card.free_mib - first.memory["gpu0"].total_mib)
    second = plan(request(), budget(left, gpu_sharers=1))
    assert first.fits
    assert second.fits
    shares = [value(planned, "gpu_memory_utilization") for planned in (first, second)]
    assert shares[0] == pytest.approx(shares[1], abs=0.011)
    assert sum(shares) * 81920 + 2 * 512 <= card.free_mib


def test_with_a_gpu_for_each_nobody_shares():
    """Two services on two GPUs get one whole each."""
    cards = (gpu(0), gpu(1))
    first = plan(request(), budget(*cards, gpu_sharers=2))
    assert [card.id for card in first.gpus] == ["gpu0"]
    taken = dataclasses.replace(cards[0], free_mib=cards[0].free_mib - first.memory["gpu0"].total_mib)
    second = plan(request(), budget(taken, cards[1], gpu_sharers=1))
    assert [card.id for card in second.gpus] == ["gpu1"]
    assert value(first, "gpu_memory_utilization") == value(second, "gpu_memory_utilization") == 0.92


def test_services_pinned_to_one_gpu_share_it():
    """The other GPU of the host is of no use to them."""
    first = plan(request(gpus=(0,)), budget(gpu(0, 81920), gpu(1, 81920), gpu_sharers=2))
    assert value(first, "gpu_memory_utilization") < 0.5


@pytest.mark.parametrize(
    ("snapshot", "cards", "tp"),
    [
        (QWEN3_8B, [24576] * 4, 1),
        (QWEN3_8B, [12288] * 4, 2),
        (QWEN3_8B, [18 * 1024] * 2, 2),
        (LLAMA_70B, [81920] * 2, 2),
        (LLAMA_70B, [81920] * 4, 4),
        (LLAMA_70B, [49152] * 4, 4),
        (LLAMA_70B, [24576] * 8, 8),
    ],
)
def test_as_few_gpus_as_hold_it(snapshot: Snapshot, cards: list[int], tp: int):
    """Every GPU more costs time in each layer; what counts as held is the model and half of its context."""
    planned = plan(request(snapshot), budget(*(gpu(i, vram) for i, vram in enumerate(cards))))
    assert planned.fits
    assert value(planned, "tensor_parallel_size") == tp == len(planned.gpus)
    assert after(planned.argv, "--tensor-parallel-size") == str(tp)
    assert {card.id for card in planned.gpus} < set(planned.memory)


def test_a_preferred_context_takes_more_gpus():
    """One GPU holds most of the context, two hold all of it; the plan names the other choice."""
    cards, context = budget(gpu(0), gpu(1)), {"prefer": "context"}
    fewer, longer = plan(request(), cards), plan(request(more=context), cards)
    assert QWEN3_8B.max_model_len / 2 < value(fewer, "max_model_len") < QWEN3_8B.max_model_len
    assert "prefer: context takes more GPUs, for 40960" in fewer.settings["max_model_len"].why
    assert (value(longer, "tensor_parallel_size"), value(longer, "max_model_len")) == (2, 40960)
    assert value(plan(request(more=context, max_model_len=20480), cards), "tensor_parallel_size") == 1
    pinned = plan(request(more=context, tensor_parallel_size=1), cards)
    assert value(pinned, "max_model_len") == value(fewer, "max_model_len")


def test_more_memory_costs_half_of_the_context_at_most():
    """Where one GPU begins to be enough two had more room."""
    most = 0
    for vram in range(8 * 1024, 36 * 1024, 512):
        planned = plan(request(), budget(gpu(0, vram), gpu(1, vram)))
        most = max(most, planned.health.n_ctx or 0) if planned.fits else 0
        assert (planned.health.n_ctx or 0) >= most / 2
    assert most == QWEN3_8B.max_model_len


def test_flags_that_the_plan_does_not_count_are_told():
    """A second copy of the engine, for one."""
    flags = ("--data-parallel-size=2", "--enable-prefix-caching", "--enable-lora")
    told = plan(request(more={"flags": flags}), budget(gpu())).warnings
    assert "flags: --data-parallel-size=2 --enable-lora moves or takes memory that this plan does not count" in told


def test_attention_heads_must_split():
    """28 heads go over 2, 4 or 7 GPUs, not over 3."""
    odd = dataclasses.replace(QWEN3_8B, n_attention_heads=28, n_key_value_heads=4)
    cards = [gpu(i, 9 * 1024) for i in range(4)]
    assert len(plan(request(odd), budget(*cards[:3])).gpus) == 2
    assert len(plan(request(odd), budget(*cards)).gpus) == 4
    with pytest.raises(InventoryError, match="28 attention heads do not split") as caught:
        plan(request(odd, tensor_parallel_size=3), budget(*cards))
    assert "1 or 2 or 4" in caught.value.hint


def test_only_equal_gpus_work_together():
    """Tensor parallelism gives each the same part, so the smallest would decide."""
    mixed = budget(gpu(0, 12288, name="RTX 3060"), gpu(1, 16384), gpu(2, 16384))
    assert [card.id for card in plan(request(), mixed).gpus] == ["gpu1", "gpu2"]


def test_a_number_of_gpus_that_is_not_there_does_not_fit():
    """It says how many it needs."""
    planned = plan(request(tensor_parallel_size=4), budget(gpu(0), gpu(1)))
    assert not planned.fits
    assert "tensor_parallel_size 4 needs 4 equal GPUs" in planned.shortfall[0]


# --- what the hardware cannot ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "settings", "stored", "what"),
    [
        ("7.0", {}, {}, "compute capability 7.0, vLLM needs 7.5"),
        ("7.5", {"dtype": "bfloat16"}, {}, "bfloat16 needs 8.0"),
        ("8.6", {"kv_cache_dtype": "fp8"}, {}, "fp8 needs 8.9"),
        ("7.5", {}, {"quantization": "mxfp4"}, "mxfp4 needs 8.0"),
        ("8.0", {}, {"quantization": "quark"}, "quark needs 8.9"),
    ],
)
def test_old_gpus_are_refused_what_they_lack(
    capability: str, settings: dict[str, Any], stored: dict[str, Any], what: str
):
    """Its start would end with that after minutes."""
    card = gpu(vram_mib=49152, compute_capability=capability)
    planned = plan(request(dataclasses.replace(QWEN3_8B, **stored), **settings), budget(card))
    assert any(what in line for line in planned.shortfall)


@pytest.mark.parametrize(
    ("capability", "model", "dtype"),
    [
        ("8.0", {}, "bfloat16"),
        ("7.5", {}, "float16"),
        ("8.0", {"dtype": "float32"}, "bfloat16"),
        ("8.9", {"dtype": "float16"}, "float16"),
        ("8.9", {"dtype": "float16", "model_type": "gemma3_text"}, "bfloat16"),
        ("7.5", {"model_type": "gemma3_text"}, "float32"),
        (None, {}, "bfloat16"),
    ],
)
def test_the_dtype_is_what_auto_would_take(capability: str | None, model: dict[str, Any], dtype: str):
    """Said openly, so that another version's auto changes nothing."""
    card = gpu(vram_mib=81920, compute_capability=capability)
    planned = plan(request(dataclasses.replace(QWEN3_8B, **model)), budget(card))
    assert planned.fits
    assert after(planned.argv, "--dtype") == dtype


def test_what_is_not_known_is_said():
    """A plan never passes a guess off as knowledge."""
    hybrid = dataclasses.replace(QWEN3_8B, keeps_state=True, quantization="bitsandbytes")
    planned = plan(request(hybrid, trust_remote_code=True), budget(gpu(compute_capability=None)))
    said = " ".join(planned.warnings)
    assert all(word in said for word in ("not known", "a guess", "vllm-bnb-plugin", "whatever Python"))


def test_a_model_too_large_says_by_how_much():
    """And every line it offers would really make it fit."""
    host = budget(gpu(vram_mib=23552))
    planned = plan(request(max_model_len=40960), host)
    assert not planned.fits
    assert "gpu0: needs" in planned.shortfall[0]
    assert "MiB too much" in planned.shortfall[0]
    assert {way.split(": ")[0] for way in planned.offers()} == {"max_model_len", "kv_cache_dtype"}
    for way in planned.offers():
        key, text = way.split(": ")
        helped = {key: True if text == "true" else int(text) if text.isdigit() else text}
        assert plan(request(**{"max_model_len": 40960, **helped}), host).fits, way


def test_a_higher_utilization_is_offered_where_it_would_do():
    """The default of 0.92 leaves more than this GPU's neighbours need."""
    planned = plan(request(max_model_len=40960), budget(gpu()))
    assert planned.shortfall == ("gpu0: gpu_memory_utilization 0.92 gives 22610 MiB, it needs 22738 MiB",)
    assert next(iter(planned.offers())) == "gpu_memory_utilization: 0.95"
    assert plan(request(max_model_len=40960, gpu_memory_utilization=0.95), budget(gpu())).fits


@pytest.mark.parametrize(("utilization", "what"), [(0.99, "MiB are free"), (0.7, "it needs")])
def test_a_utilization_is_checked_from_both_sides(utilization: float, what: str):
    """Too much is not free at the start, too little does not hold the model."""
    planned = plan(request(gpu_memory_utilization=utilization), budget(gpu()))
    assert not planned.fits
    assert what in planned.shortfall[0]


def test_processes_need_main_memory():
    """Each GPU has a worker with libraries and buffers of its own."""
    planned = plan(request(), budget(gpu(), ram_mib=2048))
    assert planned.shortfall == ("RAM: needs 5120 MiB, 2048 MiB are free: 3072 MiB too much",)


# --- CPU ---------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_cache_is_always_named():
    """Left alone vLLM takes 92 % of the machine."""
    planned = plan(request(), budget(ram_mib=64 * 1024))
    assert planned.fits
    assert after(planned.argv, "--kv-cache-memory-bytes").endswith("M")
    assert "--enforce-eager" in planned.argv
    assert "--gpu-memory-utilization" not in planned.argv
    assert planned.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert planned.env["TORCHDYNAMO_DISABLE"] == "1", "some functions are compiled in spite of --enforce-eager"
    assert planned.env["OMP_NUM_THREADS"] == "7"
    assert planned.memory["host"].total_mib < 64 * 1024
    assert "made for CPUs" in planned.warnings[0]


def test_too_little_ram_does_not_fit():
    """15.3 GiB of weights are not served from 16 GiB with processes and a cache beside."""
    planned = plan(request(), budget(ram_mib=16 * 1024))
    assert planned.shortfall[0].startswith("RAM: needs")


def test_vulkan_gpus_are_of_no_use():
    """An AMD card needs ROCm and says so."""
    amd = gpu(name="RX 7900 XTX", compute_capability=None)
    planned = plan(request(), budget(amd))
    assert not planned.gpus
    assert planned.env["GGML_VK_VISIBLE_DEVICES"] == ""
    assert any("gpu0 (Vulkan) is not used" in line for line in planned.warnings)
    assert not plan(request(gpus=(0,)), budget(amd)).fits
    rocm = plan(request(), budget(gpu(name="RX 7900 XTX", backend="rocm", compute_capability=None)))
    assert rocm.env["ROCR_VISIBLE_DEVICES"] == "0"


# --- contradictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_model_len": 40961}, "beyond the 40960 tokens"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "less than max_num_seqs 512"),
        ({"tensor_parallel_size": 3}, "do not split"),
        ({"tensor_parallel_size": 2, "gpus": (0,)}, "needs 2 GPUs, gpus names 1"),
    ],
)
def test_contradictions_are_errors_of_the_inventory(settings: dict[str, Any], what: str):
    """No hardware would mend them."""
    with pytest.raises(InventoryError, match=what) as caught:
        plan(request(**settings), budget(gpu(0), gpu(1)))
    assert caught.value.where == "chat"
    assert caught.value.hint


def test_a_quantization_must_be_that_of_the_model():
    """A start would end with that after 20 s."""
    stored = dataclasses.replace(QWEN3_8B, quantization="awq")
    with pytest.raises(InventoryError, match="quantization gptq is not awq"):
        plan(request(stored, quantization="gptq"), budget(gpu()))
    planned = plan(request(stored), budget(gpu()))
    assert value(planned, "quantization") == "awq"
    assert "--quantization" not in planned.argv


def test_gguf_is_for_llama_server():
    """The GGUF loader left vLLM's core."""
    with pytest.raises(InventoryError, match="no longer loads GGUF") as caught:
        plan(request(None), budget(gpu()))
    assert "llama-server" in caught.value.hint


# --- command line ------------------------------------------------------------------------------------------------


def test_the_command_line_says_everything():
    """No default of another version may change what was planned."""
    planned = plan(request(more={"flags": ("--seed", "1")}), budget(gpu(uuid="GPU-aa11")))
    assert planned.argv[:3] == ("/opt/labdeploy/runners/vllm/current/bin/vllm", "serve", "/srv/models/qwen")
    assert after(planned.argv, "--host") == "127.0.0.1"
    assert after(planned.argv, "--port") == "8000"
    assert after(planned.argv, "--served-model-name") == "qwen"
    assert after(planned.argv, "--shutdown-timeout") == "30"
    assert after(planned.argv, "--disable-access-log-for-endpoints") == "/health,/metrics"
    assert planned.argv[-2:] == ("--seed", "1")
    assert planned.health.n_ctx == int(after(planned.argv, "--max-model-len"))
    assert planned.facts["exec"] == planned.argv


def test_every_flag_the_plan_writes_is_its_own():
    """Otherwise `flags:` could say it a second time."""
    many = {"kv_cache_memory": Mib(4096), "quantization": "fp8", "trust_remote_code": True, "enforce_eager": True}
    planned = plan(request(**many), budget(gpu()))
    flags = {word for word in planned.argv if word.startswith("--")}
    assert flags <= RUNNER.owned_flags.keys()


def test_the_environment_stays_at_home():
    """No statistics, no downloads, the GPU by its UUID."""
    env = plan(request(), budget(gpu(uuid="GPU-aa11"))).env
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-aa11",
    }
    assert wanted.items() <= env.items()


@pytest.mark.parametrize(
    ("key_file", "code", "shown"), [("s3cret\nother\n", 0, "s3cret|a b|$HOME"), ("\n", 2, ""), ("", 2, "")]
)
def test_the_key_reaches_the_environment_and_not_the_command_line(tmp_path: Path, key_file: str, code: int, shown: str):
    """The shell passes words as they are; without a key nothing starts, because vLLM would serve everyone."""
    credential = tmp_path / "api-key"
    credential.write_text(key_file)
    planned = plan(request(more={"api_key_file": "/etc/key"}), budget(gpu()))
    shell, _, script, credential_name, *rest = planned.facts["exec"]
    assert credential_name == "/run/credentials/labdeploy-chat.service/api-key"
    assert tuple(rest) == planned.argv
    show = ("/bin/sh", "-c", 'printf "%s|%s|%s" "$VLLM_API_KEY" "$1" "$2"', "x", "a b", "$HOME")
    done = subprocess.run([shell, "-c", script, str(credential), *show], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, shown)


def test_open_ports_are_warned_of():
    """With a key, wherever it listens, the routes that the key does not guard are named."""
    open_to_all = plan(request(more={"bind": "0.0.0.0"}), budget(gpu()))  # noqa: S104
    assert any("without an API key" in line for line in open_to_all.warnings)
    keyed = plan(request(more={"bind": "0.0.0.0", "api_key_file": "/etc/key"}), budget(gpu()))  # noqa: S104
    assert any("/tokenize, /metrics and /docs answer without it" in line for line in keyed.warnings)
    quiet = plan(request(more={"bind": "127.0.0.5", "binary": "/opt/x/bin/vllm"}), budget(gpu()))
    assert quiet.warnings == ()


def test_a_build_without_a_name_is_warned_of():
    """A unit that names no versioned build cannot bring its vLLM back."""
    assert any("no build is named" in line for line in plan(request(), budget(gpu())).warnings)


def test_time_limits_hold_a_cold_start():
    """torch.compile and CUDA graphs of a new model take minutes; a start limit must hold that many starts."""
    planned = plan(request(), budget(gpu()))
    assert planned.health.deadline_s >= 1800
    assert planned.facts["start_limit_s"] > planned.facts["starts"] * planned.health.deadline_s
    assert plan(request(enforce_eager=True), budget(gpu())).health.deadline_s < 1000
