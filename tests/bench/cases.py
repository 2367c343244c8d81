"""What the benchmark measures: models, and settings for the CPU, one software GPU and two."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy.runners.llama_memory import LlamaMemorySettings

sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker as maker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labdeploy.models.shape import ModelShape

MODELS = (
    "llama-3.1-8b",
    "llama-3.2-1b",
    "mistral-7b",
    "ministral-3-8b",
    "qwen2.5-7b",
    "qwen3-8b-q4_k_m",
    "qwen3-30b-a3b",
    "qwen3-next-80b",
    "gemma2-2b",
    "gemma3-27b",
    "gpt-oss-20b",
    "deepseek-v2-lite",
    "deepseek-v3",
    "phi3-mini",
    "glm-4.5-air",
    "granite-4-h-tiny",
    "nemotron-h-8b",
    "falcon-h1-1.5b",
    "mamba2-7b",
    "lfm2-1.2b",
)
# The software GPU takes no tensor beyond 128 MiB: for it vocabularies and counts of experts are cut to what it takes.
GPU_VOCABULARY = 16384
GPU_TENSOR_BYTES = 128 * 1024 * 1024

BASE = LlamaMemorySettings(8192, repack=False)
ON_CPU = (
    BASE,
    replace(BASE, repack=True),
    replace(BASE, ctx_size=32768),
    replace(BASE, ctx_size=131072),
    replace(BASE, ctx_size=32768, parallel=4),
    replace(BASE, ctx_size=32768, parallel=4, kv_unified=True),
    replace(BASE, ctx_size=5000, parallel=3),
    replace(BASE, ubatch_size=128),
    replace(BASE, ubatch_size=2048),
    replace(BASE, ctx_size=16384, batch_size=256),
    replace(BASE, cache_type_k="q8_0", cache_type_v="q8_0"),
    replace(BASE, ctx_size=16384, parallel=2, cache_type_k="q8_0", cache_type_v="q4_0"),
    replace(BASE, cache_type_k="f32", cache_type_v="f32"),
    replace(BASE, flash_attn=False),
    replace(BASE, ctx_size=16384, parallel=4, flash_attn=False, ubatch_size=256),
    replace(BASE, ctx_size=16384, swa_full=True),
)
GPU = replace(BASE, gpu_layers=999, n_gpus=1, gpu_api="vulkan")
WHOLE = (
    GPU,
    replace(GPU, ctx_size=2048),
    replace(GPU, ctx_size=16384, parallel=4),
    replace(GPU, ctx_size=16384, parallel=4, kv_unified=True),
    replace(GPU, ubatch_size=128),
    replace(GPU, ubatch_size=1024),
    replace(GPU, cache_type_k="q8_0", cache_type_v="q8_0"),
    replace(GPU, ctx_size=2048, ubatch_size=64, flash_attn=False),
    replace(GPU, n_gpus=2),
    replace(GPU, ctx_size=16384, parallel=4, n_gpus=2, tensor_split=(3, 1)),
)
PARTLY = (0, 1, 0.3, 0.5, 0.8)  # layers on the GPU: one is the output layer, the others are shares
MIXED = (
    replace(GPU, ctx_size=16384),
    replace(GPU, ctx_size=16384, parallel=4),
    replace(GPU, ctx_size=2048, ubatch_size=128),
    replace(GPU, cache_type_k="q8_0", cache_type_v="q8_0"),
    replace(GPU, ctx_size=2048, ubatch_size=64, flash_attn=False),
    replace(GPU, n_gpus=2),
)
EXPERTS_ON_CPU = (1, 0.5, 0.9)
# One tensor of its attention is larger than the software GPU takes, with any vocabulary.
CPU_ONLY = ("deepseek-v3",)


def settings_for(model: str, shape: ModelShape) -> Iterator[LlamaMemorySettings]:
    """Yield every setting that a model is measured with."""
    yield from ON_CPU if not shape.is_mla else (each for each in ON_CPU if each.cache_type_v != "q4_0")
    yield from () if model in CPU_ONLY else _on_gpus(shape)


def _on_gpus(shape: ModelShape) -> Iterator[LlamaMemorySettings]:
    n = shape.n_layer_all
    yield from WHOLE
    for share in PARTLY:
        yield replace(GPU, gpu_layers=share if share in (0, 1) else round(share * n))
    yield from (replace(each, gpu_layers=n // 2) for each in MIXED)
    if shape.n_expert:
        yield from (replace(GPU, n_cpu_moe=share if share == 1 else round(share * n)) for share in EXPERTS_ON_CPU)
        yield replace(GPU, gpu_layers=n * 2 // 3, n_cpu_moe=n // 2)


def build(name: str, *, gpu: bool) -> maker.Model:
    """Return a model, cut to what the software GPU takes if it shall go there."""
    model = maker.MODELS[name]()
    if not gpu:
        return model
    cut = maker.with_vocabulary(model, GPU_VOCABULARY)
    n_expert = maker.n_expert(cut)
    while n_expert and maker.largest_experts_bytes(cut) > GPU_TENSOR_BYTES:
        n_expert //= 2
        cut = maker.with_experts(cut, n_expert)
    return cut
