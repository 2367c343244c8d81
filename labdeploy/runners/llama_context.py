"""What llama-server keeps of the tokens it has seen: KV cache and recurrent state, and checkpoints of them.

Exact against llama-server 0.7.0 (build 11669) in every setting of docs/planner-accuracy.md. Sources are of llama.cpp
0.5.0 (0c1e57098).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labdeploy.models.gguf import TYPE_BY_NAME
from labdeploy.runners.llama_placement import LlamaMemorySettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from labdeploy.models.shape import LayerShape, ModelShape

MIB = 1024 * 1024
F32, F16 = 4, 2
CTX_PAD_TOKENS = 256  # llama-context.cpp pads the context to this, llama-kv-cache-iswa.cpp the sliding cache

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
WHOLE_TYPES, KV_BLOCK = ("f32", "f16", "bf16"), 32  # the others keep 32 numbers in a block (ggml-common.h)


def refused_types(k: str, v: str, shape: ModelShape, *, flash_attn: bool) -> Iterator[tuple[str, str]]:
    """Say why llama-server would exit with these types of the KV cache: `k`, `v` or `both`, and why.

    Source: llama_init_from_model and llama_context (llama-context.cpp).
    """
    if not flash_attn and v not in WHOLE_TYPES:
        yield "v", f"{v} needs flash attention, which is off"
    layers = [layer for layer in shape.trunk if layer.has_kv] if flash_attn else []
    for which, kind, heads in (
        ("k", k, {layer.head_k for layer in layers}),
        ("v", v, {layer.head_v for layer in layers}),
    ):
        odd = sorted(head for head in heads if head % KV_BLOCK) if kind not in WHOLE_TYPES else []
        if odd:
            yield which, f"{kind} has blocks of {KV_BLOCK} numbers, heads of this model have {odd[0]}"
    if shape.is_mla and k != v:
        yield "both", f"{k} and {v} differ; this model keeps one cache for both"


def pad(n: int, to: int = CTX_PAD_TOKENS) -> int:
    """Round up to a multiple."""
    return -(-n // to) * to


def n_ctx_seq(settings: LlamaMemorySettings) -> int:
    """Cells of the cache of one stream, in tokens: the whole context when unified, else the slot's share, padded.

    Source: llama_context::llama_context (llama-context.cpp). Split over slots the total can grow by the padding.
    """
    n_ctx = pad(settings.ctx_size)
    return n_ctx if settings.kv_unified else pad(n_ctx // settings.parallel)


def n_stream(settings: LlamaMemorySettings) -> int:
    """Separate caches: one when unified, else one for each slot."""
    return 1 if settings.kv_unified else settings.parallel


def n_cells(layer: LayerShape, settings: LlamaMemorySettings, n_swa: int) -> int:
    """Cells of a layer's cache in one stream. A sliding layer holds its window and one micro-batch.

    Source: llama_kv_cache_iswa (llama-kv-cache-iswa.cpp).
    """
    full = n_ctx_seq(settings)
    if not layer.is_swa or settings.swa_full:
        return full
    window = n_swa * (settings.parallel if settings.kv_unified else 1) + n_ubatch(settings)
    return pad(min(full, window))


def n_ubatch(settings: LlamaMemorySettings) -> int:
    """Tokens that one graph computes."""
    return min(settings.ubatch_size, settings.batch_size, pad(settings.ctx_size))


def kv_bytes(n_elements: int, cache_type: str) -> float:
    """Bytes of this many cache elements: f16 2, q8_0 34/32, q4_0 18/32 and so on."""
    kind = TYPE_BY_NAME[cache_type.upper()]
    return n_elements * kind.n_bytes / kind.block


def kv_mib(layer: LayerShape, settings: LlamaMemorySettings, shape: ModelShape) -> float:
    """KV cache of one layer: streams x cells x (k elements x bytes of K + v elements x bytes of V).

    Exact against llama-server 0.7.0 on 25 models. Without flash attention V is padded to the widest layer. MLA
    keeps K only; a sparse attention adds its key index. Source: llama-kv-cache.cpp.
    """
    n_v = layer.n_v
    if n_v and not settings.flash_attn:
        n_v = max(each.n_v for each in shape.trunk)
    token_bytes = kv_bytes(layer.n_k + layer.n_indexer, settings.cache_type_k) + kv_bytes(n_v, settings.cache_type_v)
    return n_stream(settings) * n_cells(layer, settings, shape.n_swa) * token_bytes / MIB


def state_mib(layer: LayerShape, n_seq: int) -> float:
    """Recurrent state of one layer for `n_seq` sequences, always f32. Exact. Source: llama-memory-recurrent.cpp."""
    return n_seq * (layer.n_r + layer.n_s) * F32 / MIB


def context_mib(layers: Iterable[LayerShape], settings: LlamaMemorySettings, shape: ModelShape) -> float:
    """KV cache and recurrent state of these layers."""
    return sum(kv_mib(layer, settings, shape) + state_mib(layer, settings.parallel) for layer in layers)


def checkpoint_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """One context checkpoint of one slot, on the host: its sliding caches or its recurrent state, else nothing.

    An upper bound: a sliding cache is saved as far as it is filled. Source: server-context.cpp.
    """
    if not shape.has_swa and not shape.is_recurrent:
        return 0.0
    one_slot = LlamaMemorySettings(
        ctx_size=n_ctx_seq(settings),
        ubatch_size=n_ubatch(settings),
        cache_type_k=settings.cache_type_k,
        cache_type_v=settings.cache_type_v,
        swa_full=settings.swa_full,
    )
    sliding = sum(kv_mib(layer, one_slot, shape) for layer in shape.trunk if layer.is_swa)
    return sliding + sum(state_mib(layer, 1) for layer in shape.trunk)
