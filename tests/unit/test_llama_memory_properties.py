"""What must hold for llama-server's memory with any setting, tried with settings that hypothesis makes up."""

from __future__ import annotations

import dataclasses
import functools
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labdeploy.models.shape import ModelShape, model_shape
from labdeploy.runners.llama_context import KV_TYPES
from labdeploy.runners.llama_memory import UNKNOWN_ARCH_MARGIN, LlamaMemorySettings, MemoryByDevice, memory
from labdeploy.runners.llama_schedule import Devices, Node, _Buffer, buffer_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker as maker

MODELS = ("llama-3.2-1b", "gemma2-2b", "qwen3-30b-a3b", "deepseek-v2-lite", "lfm2-1.2b", "granite-4-h-tiny")
FRAGMENTS_MIB = 16  # what two layouts may differ by for no reason of size: a hole that one result fits in and one not
tried = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@functools.cache
def shape_of(name: str) -> ModelShape:
    """Return the shape of one of the maker's models."""
    return model_shape(maker.MODELS[name]().header())


models = st.sampled_from(MODELS).map(shape_of)


@st.composite
def asked(draw: st.DrawFn) -> LlamaMemorySettings:
    """Make up any settings for one or two GPUs or none."""
    n_gpus = draw(st.integers(0, 2))
    return LlamaMemorySettings(
        ctx_size=draw(st.integers(256, 40_000)),
        parallel=draw(st.integers(1, 6)),
        kv_unified=draw(st.booleans()),
        gpu_layers=draw(st.integers(0, 60)),
        n_cpu_moe=draw(st.integers(0, 50)),
        ubatch_size=draw(st.sampled_from((32, 100, 256, 512, 1024))),
        cache_type_k=draw(st.sampled_from(KV_TYPES)),
        cache_type_v=draw(st.sampled_from(KV_TYPES)),
        flash_attn=draw(st.booleans()),
        n_gpus=n_gpus,
        gpu_api=draw(st.sampled_from(("cuda", "vulkan"))),
        tensor_split=tuple(draw(st.lists(st.integers(1, 9), min_size=n_gpus, max_size=n_gpus))),
        repack=False,
    )


def parts(plan: MemoryByDevice) -> list[tuple[float, float, float]]:
    """Return model, context and compute of every device."""
    return [(part.model_mib, part.context_mib, part.compute_mib) for part in (*plan.gpus, plan.host)]


def total(plan: MemoryByDevice, term: int) -> float:
    """Return one term over all devices."""
    return sum(part[term] for part in parts(plan))


@tried
@given(models, asked())
def test_weights_and_context_are_all_somewhere(shape: ModelShape, setting: LlamaMemorySettings):
    """However layers are split, the same weights and the same context are on the devices, tied embeddings twice."""
    plan = memory(shape, setting)
    alone = memory(shape, dataclasses.replace(setting, n_gpus=0))
    twice = shape.tied_bytes if shape.tied_embeddings and setting.n_gpus and setting.gpu_layers else 0
    assert total(plan, 0) == pytest.approx(total(alone, 0) + twice / 2**20)
    assert total(plan, 1) == pytest.approx(total(alone, 1))
    assert all(value >= 0 for part in parts(plan) for value in part)


@tried
@given(models, asked(), st.integers(1, 8))
def test_more_layers_never_leave_less_on_the_gpus(shape: ModelShape, setting: LlamaMemorySettings, more: int):
    """Of weights and context; the compute buffer may shrink once nothing is copied over any more."""
    fewer = memory(shape, dataclasses.replace(setting, n_gpus=1, tensor_split=()))
    further = dataclasses.replace(setting, n_gpus=1, tensor_split=(), gpu_layers=setting.gpu_layers + more)
    grown = memory(shape, further)
    assert grown.gpus[0].context_mib >= fewer.gpus[0].context_mib
    assert grown.gpus[0].model_mib >= fewer.gpus[0].model_mib
    assert grown.host.model_mib <= fewer.host.model_mib


@tried
@given(models, asked(), st.integers(1, 8))
def test_more_experts_on_the_cpu_never_take_more_of_the_gpu(shape: ModelShape, setting: LlamaMemorySettings, more: int):
    """Their weights go to the host; where the layers and their context are stays the same."""
    fewer = memory(shape, setting)
    further = memory(shape, dataclasses.replace(setting, n_cpu_moe=setting.n_cpu_moe + more))
    for before, after in zip(fewer.gpus, further.gpus, strict=True):
        assert after.model_mib <= before.model_mib
        assert after.context_mib == before.context_mib


@tried
@given(models, asked(), st.integers(1, 20_000))
def test_a_longer_context_never_takes_less(shape: ModelShape, setting: LlamaMemorySettings, more: int):
    """The cache of no device shrinks, and the compute buffer by no more than a hole."""
    shorter = parts(memory(shape, setting))
    longer = parts(memory(shape, dataclasses.replace(setting, ctx_size=setting.ctx_size + more)))
    for before, after in zip(shorter, longer, strict=True):
        assert after[0] == before[0]
        assert after[1] >= before[1]
        assert after[2] >= before[2] - FRAGMENTS_MIB


@tried
@given(models, asked())
def test_a_larger_cache_type_never_takes_less(shape: ModelShape, setting: LlamaMemorySettings):
    """q4_0, q8_0, f16 and f32 of K take more and more, on every device."""
    sizes = [parts(memory(shape, dataclasses.replace(setting, cache_type_k=k))) for k in ("q4_0", "q8_0", "f16", "f32")]
    for less, more in pairwise(sizes):
        assert all(after[1] >= before[1] for before, after in zip(less, more, strict=True))


@tried
@given(models, asked())
def test_an_unknown_architecture_gets_a_wider_margin(shape: ModelShape, setting: LlamaMemorySettings):
    """Half as much again for compute, everywhere; the rest is what the tensors say."""
    unknown = dataclasses.replace(shape, known_arch=False)
    for known, wider in zip(parts(memory(shape, setting)), parts(memory(unknown, setting)), strict=True):
        assert wider == pytest.approx((known[0], known[1], UNKNOWN_ARCH_MARGIN * known[2]))


# -- the allocator -----------------------------------------------


@tried
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=60), st.data())
def test_nothing_overlaps_in_a_buffer(steps: list[tuple[int, bool]], data: st.DataObject):
    """Whatever is taken and given back: two live ranges never overlap, and at the end all of it is one free range."""
    buffer, live = _Buffer(), {}
    for size, gives in steps:
        if gives and live:
            start = data.draw(st.sampled_from(sorted(live)))
            buffer.give(start, live.pop(start))
        start = buffer.take(size)
        assert all(start + size <= other or other + taken <= start for other, taken in live.items())
        live[start] = size
        assert buffer.n_bytes >= start + size
    for start, size in live.items():
        buffer.give(start, size)
    assert len(buffer.free) == 1


@tried
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_a_chain_needs_its_two_largest_neighbours(sizes: list[int]):
    """Each result is read by the next alone: the buffer is never smaller than two neighbours, nor larger than all."""
    nodes: list[Node] = []
    for size in sizes:
        nodes.append(Node("MUL_MAT", 64 * size, nodes[-1:]))
    (taken,) = buffer_bytes([], nodes, Devices(0, reorders=False))
    neighbours = [a + b for a, b in pairwise(sizes)] or sizes
    assert 64 * max(neighbours) <= taken <= 64 * sum(sizes)
