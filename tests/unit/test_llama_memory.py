"""The memory formulas against what llama-server printed, and properties that must hold for any setting.

llama.cpp prints whole MiB, rounded down: a figure is exact when it is 0 to 1 MiB above the printed one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from labdeploy.models.gguf import GgufHeader, Tensor
from labdeploy.models.shape import ModelShape, model_shape
from labdeploy.runners.llama_context import KV_TYPES, checkpoint_mib, context_mib, kv_bytes, n_ctx_seq
from labdeploy.runners.llama_memory import (
    GPU_CONTEXT_MIB,
    LlamaMemorySettings,
    MemoryByDevice,
    memory,
    repackable,
)
from labdeploy.runners.llama_placement import CPU, place

sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker as maker

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.models.gguf import Value

DATA = Path(__file__).parents[1] / "data"
ROUNDED_DOWN_MIB = 1.01


def rows(name: str) -> list[SimpleNamespace]:
    """Read a table of measurements."""
    table = json.loads((DATA / name).read_text())
    return [SimpleNamespace(**dict(zip(table["columns"], row, strict=True))) for row in table["rows"]]


@functools.cache
def shape_of(name: str, n_vocab: int = 0) -> ModelShape:
    """Return the shape of one of the maker's models, or of the same model with another vocabulary."""
    header = maker.MODELS[name]().header()
    if not n_vocab:
        return model_shape(header)
    tensors = tuple(
        dataclasses.replace(tensor, shape=(tensor.shape[0], n_vocab))
        if tensor.name in ("token_embd.weight", "output.weight")
        else tensor
        for tensor in header.tensors
    )
    return model_shape(dataclasses.replace(header, tensors=tensors))


def settings(row: SimpleNamespace, **more: object) -> LlamaMemorySettings:
    """Return the settings that a measurement was taken with."""
    names = {field.name for field in dataclasses.fields(LlamaMemorySettings)} & vars(row).keys()
    given = {name: getattr(row, name) for name in names}
    if hasattr(row, "cache_type"):
        given |= {"cache_type_k": row.cache_type, "cache_type_v": row.cache_type}
    return LlamaMemorySettings(**given | more)


def is_near(planned: float, printed: float) -> bool:
    """Say whether a compute buffer is within 10 % or 16 MiB."""
    return abs(planned - printed) <= max(16.0, 0.1 * printed) + ROUNDED_DOWN_MIB


def is_exact(planned: float, printed: float) -> bool:
    """Say whether a figure rounds down to the printed one, give or take the last digit."""
    return -0.01 <= planned - printed <= ROUNDED_DOWN_MIB


# -- against llama-server 0.7.0 without a GPU --------------------

CPU_ROWS = rows("llama_memory_cpu.json")


@pytest.mark.parametrize("model", sorted({row.model for row in CPU_ROWS}))
def test_cpu_only_is_what_llama_server_prints(model: str):
    """Weights and context are exact for every model and setting; compute is within 10 % or 16 MiB."""
    for row in CPU_ROWS:
        if row.model != model:
            continue
        host = memory(shape_of(model), settings(row, repack=False)).host
        assert is_exact(host.model_mib, row.model_mib), row
        assert is_exact(host.context_mib, row.context_mib), row
        assert is_near(host.compute_mib, row.compute_mib), row


def test_compute_is_mostly_exact():
    """Of all rows without a GPU at least 94 of 100 are planned to the MiB."""
    planned = [memory(shape_of(row.model), settings(row, repack=False)).host.compute_mib for row in CPU_ROWS]
    exact = [is_exact(mib, row.compute_mib) for mib, row in zip(planned, CPU_ROWS, strict=True)]
    assert sum(exact) >= 0.94 * len(CPU_ROWS)


GOLDEN = [
    ("llama-3.1-8b", 4437, 1024, 4096, 4096, (132, 132, 156)),
    ("llama-3-70b", 38110, 2560, 10240, 10240, (256, 256, 280)),
    ("qwen3-0.6b", 604, 896, 3584, 3584, (36, 36, 60)),
    ("qwen2.5-7b", 4220, 448, 1792, 1792, (154, 154, 178)),
    ("qwen3-30b-a3b", 16497, 768, 3072, 3072, (96, 96, 120)),
    ("gemma3-27b", 14839, 1264, 5056, 4432, (188, 188, 215)),
    ("gpt-oss-20b", 11536, 210, 840, 792, (104, 104, 128)),
    ("deepseek-v3", 361034, 549, 2196, 2196, (414, 414, 438)),
    ("qwen3-next-80b", 42987, 267, 1069, 1069, (98, 98, 122)),
    ("mamba2-7b", 7393, 263, 1054, 1054, (132, 148, 148)),
]


@pytest.mark.parametrize(("model", "weights", "one", "split", "unified", "compute"), GOLDEN, ids=[g[0] for g in GOLDEN])
def test_golden_table(model: str, weights: int, one: int, split: int, unified: int, compute: tuple[int, int, int]):
    """8192 tokens in one slot, 32768 in four of their own, 32768 shared by four: as measured with 0.7.0."""
    shape = shape_of(model)
    asked = (
        LlamaMemorySettings(8192, repack=False),
        LlamaMemorySettings(32768, parallel=4, repack=False),
        LlamaMemorySettings(32768, parallel=4, kv_unified=True, repack=False),
    )
    for each, context, printed in zip(asked, (one, split, unified), compute, strict=True):
        host = memory(shape, each).host
        assert is_exact(host.model_mib, weights) or round(host.model_mib) == weights + 1
        assert is_exact(host.context_mib, context)
        assert -0.01 <= host.compute_mib - printed <= max(1.0, 0.06 * printed)


def test_quantised_cache():
    """The golden 544 MiB of a Llama-3.1-8B with 8192 tokens in q8_0."""
    asked = LlamaMemorySettings(8192, cache_type_k="q8_0", cache_type_v="q8_0")
    assert memory(shape_of("llama-3.1-8b"), asked).host.context_mib == 544


@pytest.mark.parametrize("row", rows("llama_memory_repack.json"), ids=lambda row: row.model)
def test_repacked_weights_are_what_llama_server_leaves_out(row: SimpleNamespace):
    """The table leaves out what the CPU repacks; with mmap the copy comes on top of the mapped file."""
    host = memory(shape_of(row.model), LlamaMemorySettings(4096, cpu_flags=frozenset((row.cpu_flag,)))).host
    plain = memory(shape_of(row.model), LlamaMemorySettings(4096, repack=False)).host
    assert is_exact(host.model_mib, row.model_mib)
    assert host.mapped_mib == plain.model_mib
    assert host.model_mib + host.repack_mib == pytest.approx(plain.model_mib)
    assert host.total_mib == pytest.approx(plain.total_mib + host.repack_mib)


# -- against llama-server 0.7.0 with one GPU ----------------------

GPU_ROWS = rows("llama_memory_gpu.json")


@pytest.mark.parametrize("model", sorted({row.model for row in GPU_ROWS}))
def test_one_gpu_is_what_llama_server_prints(model: str):
    """Weights and context are exact for any gpu_layers and n_cpu_moe, compute is within 10 % or 16 MiB."""
    for row in GPU_ROWS:
        if row.model != model:
            continue
        planned = memory(shape_of(model, n_vocab=32768), settings(row, n_gpus=1, gpu_api="vulkan"))
        gpu, host = planned.gpus[0], planned.host
        assert is_exact(gpu.model_mib, row.gpu_model_mib), row
        assert is_exact(gpu.context_mib, row.gpu_context_mib), row
        assert is_exact(host.model_mib, row.host_model_mib), row
        assert is_exact(host.context_mib, row.host_context_mib), row
        assert is_near(host.compute_mib, row.host_compute_mib), row
        assert is_near(gpu.compute_mib, row.gpu_compute_mib), row


def test_a_split_model_on_cuda():
    """Llama-3.1-8B Q4_0, 32768 tokens, 15 of 33 layers on a GPU: the buffers of a log of 2026-06-28.

    That build is older than those measured here. Its compute buffer was 48 MiB larger than the plan.
    """
    model = maker.dense(maker.LLAMA_8B, maker.Mix(base="Q4_0"))
    planned = memory(model_shape(model.header()), LlamaMemorySettings(32768, gpu_layers=15, n_gpus=1, batch_size=512))
    assert planned.gpus[0].context_mib == 1792
    assert planned.host.context_mib == 2304
    assert planned.gpus[0].compute_mib == pytest.approx(248.0, abs=49)
    assert planned.host.compute_mib == pytest.approx(48.01, abs=17)
    assert planned.gpus[0].model_mib == pytest.approx(2049.43, rel=0.01)


# -- against older builds and other people's logs ----------------


@pytest.mark.parametrize("row", rows("llama_memory_cpu_0_5_0.json"), ids=lambda row: f"{row.model}-{row.ctx_size}")
def test_the_build_before_kept_the_same_cache(row: SimpleNamespace):
    """0.5.0-dev: weights and context are the same, compute is within 10 % or 16 MiB."""
    host = memory(shape_of(row.model), settings(row, repack=False, mixed_inputs=False)).host
    assert is_exact(host.model_mib, row.model_mib)
    assert is_exact(host.context_mib, row.context_mib)
    assert is_near(host.compute_mib, row.compute_mib)


@pytest.mark.parametrize("row", rows("llama_kv_allocated.json"), ids=lambda row: row.id)
def test_caches_that_were_really_allocated(row: SimpleNamespace):
    """Caches in the logs of other people and in our own runs are within 1 % of the formula."""
    keys: dict[str, Value] = {
        "block_count": row.n_layer,
        "context_length": row.ctx_size,
        "embedding_length": row.n_embd,
        "feed_forward_length": row.n_ff,
        "attention.head_count": row.n_head,
        "attention.head_count_kv": row.n_head_kv,
        "attention.key_length": row.head_size,
        "attention.value_length": row.head_size,
        "attention.sliding_window": row.n_swa,
    }
    metadata = {"general.architecture": row.arch} | {f"{row.arch}.{key}": value for key, value in keys.items()}
    shape = model_shape(GgufHeader(metadata, {}, (Tensor("blk.0.attn_norm.weight", (8,), "F32"),), 1))
    assert context_mib(shape.layers, settings(row), shape) == pytest.approx(row.kv_mib, rel=0.01)


# -- rules -------------------------------------------------------


def total(planned: MemoryByDevice) -> float:
    """Return everything on all devices."""
    return planned.host.total_mib + sum(gpu.total_mib for gpu in planned.gpus)


SPLIT_MODELS = ("llama-3.1-8b", "llama-3.2-1b", "gemma3-27b", "qwen3-30b-a3b", "qwen3-next-80b", "glm-4.5-air")


@pytest.mark.parametrize("model", SPLIT_MODELS)
def test_more_gpu_layers_never_mean_less_on_the_gpu(model: str):
    """Each further layer moves weights and context to the GPU and none back, and nothing is lost on the way."""
    shape = shape_of(model)
    plans = [memory(shape, LlamaMemorySettings(8192, gpu_layers=n, n_gpus=1)) for n in range(shape.n_layer_all + 2)]
    for fewer, more in pairwise(plans):
        assert more.gpus[0].model_mib >= fewer.gpus[0].model_mib
        assert more.gpus[0].context_mib >= fewer.gpus[0].context_mib
        assert more.host.model_mib <= fewer.host.model_mib
        assert more.host.context_mib <= fewer.host.context_mib
    context = {round(plan.gpus[0].context_mib + plan.host.context_mib, 3) for plan in plans}
    assert len(context) == 1
    assert plans[-1].host.context_mib == 0
    assert plans[-1].host.model_mib == pytest.approx(shape.input_bytes / 2**20)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "glm-4.5-air"])
def test_experts_on_the_cpu_free_the_gpu(model: str):
    """Each further layer of n_cpu_moe moves its experts, all of them and nothing else, to the host."""
    shape = shape_of(model)
    plans = [
        memory(shape, LlamaMemorySettings(8192, gpu_layers=999, n_cpu_moe=n, n_gpus=1))
        for n in range(shape.n_layer_all + 1)
    ]
    for n, (fewer, more) in enumerate(pairwise(plans)):
        moved = 0 if shape.layers[n].is_mtp else shape.layers[n].experts_bytes / 2**20
        assert fewer.gpus[0].model_mib - more.gpus[0].model_mib == pytest.approx(moved)
        assert more.host.model_mib - fewer.host.model_mib == pytest.approx(moved)
    assert plans[0].gpus[0].context_mib == plans[-1].gpus[0].context_mib


MORE = {
    "ctx_size": (2048, 8192, 32768, 131072),
    "ubatch_size": (128, 512, 2048),
    "cache_ram_mib": (0, 8192),
    "ctx_checkpoints": (0, 32),
    "swa_full": (False, True),
    "flash_attn": (True, False),
    "cache_type_k": ("q4_0", "q5_1", "q8_0", "f32"),  # f16 alone needs no copies in f16
    "parallel": (1, 2, 4, 8),
}


@pytest.mark.parametrize("model", SPLIT_MODELS)
@pytest.mark.parametrize("n_gpus", [0, 1])
@pytest.mark.parametrize("name", MORE)
def test_asking_for_more_never_takes_less(model: str, n_gpus: int, name: str):
    """Of context, micro-batch, slots with a shared cache, bits of K, prompt cache: more of it is never cheaper."""
    shape = shape_of(model)
    base = LlamaMemorySettings(16384, kv_unified=True, gpu_layers=20, n_gpus=n_gpus)
    plans = [memory(shape, dataclasses.replace(base, **{name: value})) for value in MORE[name]]
    for less, more in pairwise(plans):
        assert total(more) >= total(less)
        assert all(b.total_mib >= a.total_mib for a, b in zip(less.gpus, more.gpus, strict=True))


def test_gpu_layers_count_from_the_end():
    """1 is the output layer alone, n_layer the last layers without the first, n_layer + 1 everything."""
    shape = shape_of("llama-3.1-8b")

    def places(gpu_layers: int) -> tuple[list[int], int]:
        found = place(shape, LlamaMemorySettings(4096, gpu_layers=gpu_layers, n_gpus=1))
        return [il for il, device in enumerate(found.layer_device) if device != CPU], found.output_device

    assert places(0) == ([], CPU)
    assert places(1) == ([], 0)
    assert places(3) == ([30, 31], 0)
    assert places(32) == (list(range(1, 32)), 0)
    assert places(33) == (list(range(32)), 0)
    assert places(999) == (list(range(32)), 0)


def test_tensor_split_is_a_share_of_the_offloaded_layers():
    """Layers go to the GPU whose cumulated share they fall in; the last GPU holds the output."""
    shape = shape_of("llama-3.1-8b")
    asked = LlamaMemorySettings(4096, gpu_layers=33, n_gpus=3, tensor_split=(2, 1, 1))
    places = place(shape, asked)
    assert [places.layer_device.count(gpu) for gpu in range(3)] == [17, 8, 7]
    assert places.output_device == 2
    planned = memory(shape, asked)
    whole = memory(shape, LlamaMemorySettings(4096, gpu_layers=33, n_gpus=1))
    assert sum(gpu.model_mib for gpu in planned.gpus) == pytest.approx(whole.gpus[0].model_mib)
    assert sum(gpu.context_mib for gpu in planned.gpus) == whole.gpus[0].context_mib
    half = place(shape, dataclasses.replace(asked, gpu_layers=17))
    assert [half.layer_device.count(gpu) for gpu in (CPU, 0, 1, 2)] == [16, 9, 4, 3]


def test_no_split_is_even_and_a_zero_share_gets_nothing():
    """Without tensor_split the GPUs share evenly; a GPU with share 0 stays empty."""
    shape = shape_of("llama-3.1-8b")
    even = place(shape, LlamaMemorySettings(4096, gpu_layers=33, n_gpus=2))
    assert [even.layer_device.count(gpu) for gpu in range(2)] == [17, 15]
    one = place(shape, LlamaMemorySettings(4096, gpu_layers=33, n_gpus=2, tensor_split=(0, 1)))
    assert {*one.layer_device, one.output_device} == {1}


def test_a_gpu_without_layers_still_computes():
    """With gpu_layers 0 the GPU has a context and a compute buffer; with --device none there is no GPU."""
    shape = shape_of("llama-3.1-8b")
    gpu = memory(shape, LlamaMemorySettings(4096, gpu_layers=0, n_gpus=1)).gpus[0]
    assert gpu.model_mib == gpu.context_mib == 0
    assert gpu.compute_mib > 100
    assert GPU_CONTEXT_MIB < gpu.overhead_mib < 2 * GPU_CONTEXT_MIB
    assert memory(shape, LlamaMemorySettings(4096, gpu_layers=99)).gpus == ()


def test_tied_embeddings_are_paid_twice_once_offloaded():
    """The copy on the GPU comes with the output layer; the one for the input stays on the host."""
    shape = shape_of("llama-3.2-1b")
    none, output = (memory(shape, LlamaMemorySettings(4096, gpu_layers=n, n_gpus=1)) for n in (0, 1))
    assert output.gpus[0].model_mib == pytest.approx(shape.output_bytes / 2**20)
    assert none.host.model_mib - output.host.model_mib == pytest.approx(2048 * 4 / 2**20)


def test_draft_layers_are_counted_but_not_loaded():
    """GLM-4.5-Air: gpu_layers 48 is everything, and its 47th layer is on no device."""
    shape = shape_of("glm-4.5-air")
    planned = memory(shape, LlamaMemorySettings(8192, gpu_layers=48, n_gpus=1))
    loaded = sum(layer.weights_bytes for layer in shape.trunk) + shape.output_bytes
    assert planned.gpus[0].model_mib == pytest.approx(loaded / 2**20)
    assert memory(shape, LlamaMemorySettings(8192, gpu_layers=2, n_gpus=1)).gpus[0].context_mib == 0


@pytest.mark.parametrize(
    ("ctx_size", "parallel", "kv_unified", "expected"),
    [(8192, 1, False, 8192), (8000, 1, False, 8192), (8192, 3, False, 2816), (8192, 3, True, 8192), (1, 4, False, 256)],
)
def test_the_context_is_padded(ctx_size: int, parallel: int, kv_unified: bool, expected: int):
    """To 256 as a whole, then each slot's share again: three slots of 8192 get 2816, 8448 together."""
    asked = LlamaMemorySettings(ctx_size, parallel=parallel, kv_unified=kv_unified)
    assert n_ctx_seq(asked) == expected


def test_bytes_of_each_cache_type():
    """Bytes of an element as llama.cpp's blocks give them."""
    assert {kind: kv_bytes(1024, kind) / 1024 for kind in KV_TYPES} == {
        "f32": 4,
        "f16": 2,
        "bf16": 2,
        "q8_0": 1.0625,
        "q5_1": 0.75,
        "q5_0": 0.6875,
        "q4_1": 0.625,
        "q4_0": 0.5625,
        "iq4_nl": 0.5625,
    }


def test_checkpoints_only_where_there_is_something_to_save():
    """Qwen3-Next saves 75 MiB of state, a sliding model its windows, a plain model nothing."""
    asked = LlamaMemorySettings(32768, parallel=4)
    assert checkpoint_mib(shape_of("qwen3-next-80b"), asked) == pytest.approx(75, abs=1)
    assert checkpoint_mib(shape_of("llama-3.1-8b"), asked) == 0
    gemma = memory(shape_of("gemma3-27b"), asked).host
    assert gemma.checkpoints_mib == pytest.approx(4 * 32 * checkpoint_mib(shape_of("gemma3-27b"), asked))
    assert memory(shape_of("gemma3-27b"), dataclasses.replace(asked, ctx_checkpoints=0)).host.checkpoints_mib == 0


@pytest.mark.parametrize(
    ("kind", "shape", "flags", "expected"),
    [
        ("Q4_K", (4096, 4096), {"avx2"}, True),
        ("Q4_K", (4096, 4096), {"sse4_2"}, False),
        ("Q4_K", (4096, 4095), {"avx2"}, False),
        ("Q4_0", (4096, 1024), {"avx2"}, True),
        ("IQ4_NL", (4096, 1024), {"avx2"}, True),
        ("MXFP4", (2880, 2880, 32), {"avx2"}, True),
        ("Q6_K", (4096, 4096), {"avx2", "avx512f"}, False),
        ("Q2_K", (4096, 4096), {"avx2"}, False),
        ("Q2_K", (4096, 4096), {"avx2", "avx512f"}, True),
        ("Q6_K", (4096, 4096), {"dotprod"}, True),
        ("Q8_0", (4096, 4092), {"asimddp", "i8mm"}, True),
        ("Q5_K", (4096, 4092), {"i8mm"}, False),
        ("F16", (4096, 4096), {"avx2", "avx512f", "dotprod"}, False),
        ("Q4_K", (4096,), {"avx2"}, False),
        ("Q4_K", (256, 8, 8, 8), {"avx2"}, False),
    ],
)
def test_repackable(kind: str, shape: tuple[int, ...], flags: set[str], expected: bool):
    """By type and rows, and by what the CPU can do."""
    assert repackable(kind, shape, flags) == expected


def test_tied_embeddings_are_repacked_into_a_copy():
    """A tied Q4_K table is mapped for the input and repacked for the output: 662.9 MiB measured with 0.7.0."""
    shape = model_shape(maker.dense(maker.LLAMA_1B, maker.Mix(output="Q4_K")).header())
    host = memory(shape, LlamaMemorySettings(4096)).host
    assert is_exact(host.model_mib, 141)
    assert host.repack_mib == pytest.approx(662.9, abs=0.1)


def encoder() -> maker.Model:
    """Build a small encoder: attention without a cache, no gate."""
    model, heads = maker.Model("bert", 768, 30522, 2), maker.Heads(12, 12, 64)
    maker.attention_keys(model, heads, 3072)
    model.ends()
    for il in range(2):
        maker.attention(model, il, heads)
        model.matrix("ffn_up", 768, 3072, il=il)
        model.matrix("ffn_down", 3072, 768, il=il)
    return model


def rwkv() -> maker.Model:
    """Build a mixer whose graph is not built in detail."""
    model = maker.Model("rwkv7", 2048, 65536, 2)
    model.key(attention__head_count=0, feed_forward_length=7168, wkv__head_size=64)
    model.ends()
    for il in range(2):
        model.vector("attn_norm", 2048, il=il)
        model.matrix("time_mix_key", 2048, 2048, il=il)
        model.matrix("channel_mix_key", 2048, 7168, il=il)
    return model


@pytest.mark.parametrize(("build", "widest"), [(encoder, 3072), (rwkv, 2048 + 7168)])
@pytest.mark.parametrize("n_gpus", [0, 1, 2])
def test_what_is_not_built_in_detail_is_planned_all_the_same(
    build: Callable[[], maker.Model], widest: int, n_gpus: int
):
    """An encoder, and a mixer of another kind: at least its products are in the buffer of a device that computes it."""
    shape = model_shape(build().header())
    planned = memory(shape, LlamaMemorySettings(4096, n_gpus=n_gpus, gpu_layers=99))
    assert max(part.compute_mib for part in planned.gpus or (planned.host,)) >= widest * 512 * 4 / 2**20
