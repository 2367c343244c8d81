"""How much memory llama-server takes, device by device, before it is started.

`memory` is the top; each formula below it is one function. model, context and compute mean what llama.cpp's own
memory breakdown means (`llama-server -lv 4`). Sources are llama.cpp 0.5.0 (0c1e57098) for the logic and 0.7.0
(build 11669) for the figures. Where they are exact and where they are an upper bound is said in each docstring.

n_embd and the like are elements, `_bytes` bytes, `_mib` MiB (2^20 bytes).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from labdeploy.models.gguf import TYPE_BY_NAME
from labdeploy.models.shape import total_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from labdeploy.models.gguf import Tensor
    from labdeploy.models.shape import LayerShape, ModelShape

MIB = 1024 * 1024
F32, F16 = 4, 2
CTX_PAD_TOKENS = 256  # llama-context.cpp pads the context to this, llama-kv-cache-iswa.cpp the sliding cache

# A CUDA or HIP context of one process on one GPU, in no table of llama.cpp: 573-596 MiB on an H100 once it is ready
# (0.5.0-dev, driver 580); 376 MiB (#25265), 451-456 MiB on an RTX 4090 (PR #15860), 614 MiB (#19379).
GPU_CONTEXT_MIB = 600.0
# What a CUDA process takes at the first prompts besides, all measured on an H100: for any model, for the workspace of
# cuBLAS where products go through it, for graphs of state-space mixers and for each further slot of theirs.
GPU_POOL_MIB, CUBLAS_MIB, MIXER_POOL_MIB, MIXER_SLOT_MIB = 20.0, 110.0, 40.0, 24.0
# Resident set of llama-server without weights, cache and buffers: 80-90 MiB, measured with 0.7.0.
PROCESS_MIB = 90.0
# Anonymous memory that CUDA adds to it: 20 to 80 MiB (H100, 0.5.0-dev).
GPU_PROCESS_MIB = 80.0
# One vocabulary entry in the tokenizer: 130 bytes measured with 0.7.0 on short tokens without merges; three times
# that for real tokens with merges.
TOKENIZER_BYTES_PER_TOKEN = 400
# Copies of the inputs when several GPUs work in a pipeline (GGML_SCHED_MAX_COPIES, ggml-backend.cpp).
PIPELINE_COPIES = 4
# From this many tokens on, a matrix on the CPU is copied to the GPU for the product (ggml-cuda.cu, ggml-vulkan.cpp).
OP_OFFLOAD_MIN_TOKENS = 32
ROTATION_WIDTH = 64  # least width of the rotation of a quantised cache (llama-kv-cache.cpp)

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

REPACK_AVX2 = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}
REPACK_AVX512 = {"Q2_K": 8}
REPACK_ARM = {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "Q8_0": 4, "IQ4_NL": 4, "MXFP4": 4, "Q1_0": 4}
ARM_FLAGS = frozenset(("dotprod", "asimddp", "i8mm"))


@dataclass(frozen=True)
class LlamaMemorySettings:
    """The settings of llama-server that decide its memory, by its own names.

    All are resolved: no `auto`, no ctx_size 0. `n_gpus` 0 is --device none. A cache_ram_mib of -1 has no limit, so it
    is not in the sum.
    """

    ctx_size: int
    parallel: int = 1
    kv_unified: bool = False
    gpu_layers: int = 0
    n_cpu_moe: int = 0
    batch_size: int = 2048
    ubatch_size: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: bool = True
    n_gpus: int = 0
    tensor_split: tuple[float, ...] = ()
    repack: bool = True
    cpu_flags: frozenset[str] = frozenset(("avx2",))
    cache_ram_mib: int = 8192
    swa_full: bool = False
    ctx_checkpoints: int = 32


@dataclass(frozen=True)
class DeviceMemory:
    """What the service takes on one GPU."""

    model_mib: float
    context_mib: float
    compute_mib: float
    overhead_mib: float

    @property
    def total_mib(self) -> float:
        """All of it."""
        return self.model_mib + self.context_mib + self.compute_mib + self.overhead_mib


@dataclass(frozen=True)
class HostMemory:
    """What the service takes of the RAM.

    `model_mib` is the table's figure and leaves out what was repacked; `mapped_mib` is all of the file that the CPU
    uses, which mmap keeps in the page cache beside the repacked copy. `cache_ram_mib` and `checkpoints_mib` are
    limits that a busy service grows to.
    """

    model_mib: float
    context_mib: float
    compute_mib: float
    overhead_mib: float
    repack_mib: float
    mapped_mib: float
    cache_ram_mib: float
    checkpoints_mib: float

    @property
    def anonymous_mib(self) -> float:
        """What the kernel cannot drop: everything but the mapped file."""
        start = self.context_mib + self.compute_mib + self.overhead_mib + self.repack_mib
        return start + self.cache_ram_mib + self.checkpoints_mib

    @property
    def total_mib(self) -> float:
        """All of it, the mapped file included: it can be dropped, but then every token reads the disk."""
        return self.anonymous_mib + self.mapped_mib


@dataclass(frozen=True)
class MemoryByDevice:
    """What a service takes on every GPU, in the order of --device, and on the host."""

    gpus: tuple[DeviceMemory, ...]
    host: HostMemory


def memory(shape: ModelShape, settings: LlamaMemorySettings) -> MemoryByDevice:
    """Return what llama-server will take with these settings, device by device."""
    places = place(shape, settings)
    return MemoryByDevice(
        gpus=tuple(_gpu(shape, settings, places, gpu) for gpu in range(settings.n_gpus)),
        host=_host(shape, settings, places),
    )


def _gpu(shape: ModelShape, settings: LlamaMemorySettings, places: Places, gpu: int) -> DeviceMemory:
    return DeviceMemory(
        model_mib=total_bytes(places.weights(gpu)) / MIB,
        context_mib=context_mib(places.layers(gpu), settings, shape),
        compute_mib=gpu_compute_mib(shape, settings, places),
        overhead_mib=gpu_overhead_mib(shape, settings),
    )


def _host(shape: ModelShape, settings: LlamaMemorySettings, places: Places) -> HostMemory:
    weights_mib = total_bytes(places.weights(CPU)) / MIB
    repacked, copied = repacked_mib(shape, settings), tied_repacked_mib(shape, settings)
    return HostMemory(
        model_mib=weights_mib - repacked,
        context_mib=context_mib(places.layers(CPU), settings, shape),
        compute_mib=host_compute_mib(shape, settings, places) if settings.n_gpus else cpu_compute_mib(shape, settings),
        overhead_mib=process_mib(shape, settings),
        repack_mib=repacked + copied,
        mapped_mib=weights_mib,
        cache_ram_mib=float(max(settings.cache_ram_mib, 0)),
        checkpoints_mib=settings.parallel * settings.ctx_checkpoints * checkpoint_mib(shape, settings),
    )


# -- where things live -----------------------------------------

CPU = -1


@dataclass(frozen=True)
class Places:
    """Which device holds each layer, the output layer, and the experts of each layer; -1 is the CPU."""

    shape: ModelShape
    layer_device: tuple[int, ...]
    output_device: int
    n_cpu_moe: int

    def layers(self, device: int) -> tuple[LayerShape, ...]:
        """Return the layers of a device: their context lives there."""
        return tuple(layer for layer, on in zip(self.shape.layers, self.layer_device, strict=True) if on == device)

    def weights(self, device: int) -> list[Tensor]:
        """Return the weights of a device: no draft layers, tied embeddings twice where they are offloaded."""
        tensors: list[Tensor] = []
        for layer in self.shape.trunk:
            tensors += self._layer_weights(layer, device)
        if device == CPU:
            tensors += self.shape.input_tensors
        if device == self.output_device:
            tensors += self.shape.output_tensors
            tensors += self._tied() if device != CPU else ()
        return tensors

    def _layer_weights(self, layer: LayerShape, device: int) -> Iterable[Tensor]:
        on = self.layer_device[layer.index]
        if layer.index >= self.n_cpu_moe or on == CPU:
            return layer.tensors if on == device else ()
        experts = set(layer.experts)
        if device == CPU:
            return experts
        return (tensor for tensor in layer.tensors if tensor not in experts) if on == device else ()

    def _tied(self) -> tuple[Tensor, ...]:
        if not self.shape.tied_embeddings:
            return ()
        return tuple(tensor for tensor in self.shape.input_tensors if tensor.name == "token_embd.weight")

    @property
    def all_on_gpu(self) -> bool:
        """Nothing but the input layer is on the CPU."""
        return CPU not in self.layer_device and self.output_device != CPU and not self.n_cpu_moe


def place(shape: ModelShape, settings: LlamaMemorySettings) -> Places:
    """Place the layers. gpu_layers counts from the end: 1 is the output layer alone, n_layer_all + 1 everything.

    Source: load_tensors in llama-model.cpp: layer il is offloaded from `n_layer_all + 1 - gpu_layers` on and goes to
    the GPU whose share of the cumulated tensor_split holds `(il - start) / offloaded`, in float.
    """
    n_all = shape.n_layer_all + 1
    n_offloaded = min(settings.gpu_layers, n_all) if settings.n_gpus else 0
    start = n_all - n_offloaded
    splits = split_points(settings.tensor_split or (1.0,) * settings.n_gpus)

    def device(il: int) -> int:
        return CPU if il < start else bisect_right(splits, _float((il - start) / n_offloaded))

    n_cpu_moe = settings.n_cpu_moe if shape.n_expert and n_offloaded else 0
    return Places(shape, tuple(map(device, range(shape.n_layer_all))), device(shape.n_layer_all), n_cpu_moe)


def split_points(tensor_split: Sequence[float]) -> list[float]:
    """Cumulate and normalise proportions as llama.cpp does, in single precision."""
    sums = list(accumulate(tensor_split, lambda a, b: _float(a + b)))
    return [_float(value / sums[-1]) for value in sums] if sums and sums[-1] > 0 else [1.0]


def _float(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


# -- context ---------------------------------------------------


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


# -- compute ---------------------------------------------------


def mask_bytes(shape: ModelShape, settings: LlamaMemorySettings) -> int:
    """KQ masks of one micro-batch: tokens x cells of each kind of cache, f16 with flash attention, else f32.

    The number of streams cancels out: each stream has its share of the tokens. Source: llama-graph.cpp.
    """
    cells = {layer.is_swa: n_cells(layer, settings, shape.n_swa) for layer in shape.trunk if layer.has_kv}
    return n_ubatch(settings) * sum(cells.values()) * (F16 if settings.flash_attn else F32)


def rotation_bytes(shape: ModelShape, settings: LlamaMemorySettings) -> int:
    """Rotations that go with a quantised cache: f32 squares, of K as wide as the head allows, of V 64 wide.

    One pair for the full layers and one for the sliding ones. Source: llama_kv_cache::build_input_k_rot.
    """
    kinds = {layer.is_swa: layer for layer in shape.trunk if layer.has_kv}.values()
    return sum(
        _rotation_bytes(layer.head_k, settings.cache_type_k, widest=True)
        + _rotation_bytes(layer.head_v, settings.cache_type_v, widest=False)
        for layer in kinds
    )


def _rotation_bytes(head: int, cache_type: str, *, widest: bool) -> int:
    if head % ROTATION_WIDTH or TYPE_BY_NAME[cache_type.upper()].block == 1:
        return 0
    power_of_two = head & -head
    return (power_of_two if widest else ROTATION_WIDTH) ** 2 * F32


def ffn_elements(shape: ModelShape, layer: LayerShape) -> int:
    """Elements of each token that the feed-forward network of a layer holds at its peak.

    Dense 3 x n_ff (gate, up, product), 2 x n_ff without a gate. MoE k x (3 x n_ff_exp + n_embd) with k experts used;
    where the experts have biases (gpt-oss) one of the three is reused.
    """
    if not layer.experts:
        gated = layer.rows("ffn_gate") or layer.rows("ffn_up") > layer.n_ff
        return (3 if gated else 2) * layer.n_ff
    hidden = 2 if layer.tensor("ffn_up_exps", "bias") else 3
    return layer.n_expert_used * (hidden * shape.n_ff_exp + shape.n_embd)


def attention_elements(shape: ModelShape, layer: LayerShape, *, flash_attn: bool) -> int:
    """Elements of each token that attention holds at its peak beside the residual stream.

    MLA: the query whole, absorbed, roped and put together again (exact for DeepSeek-V3). Without flash attention:
    query, roped query, k and v; a query as wide as n_embd reuses its place; sliding models hold one n_embd more.
    """
    if shape.is_mla:
        rope = layer.head_k - shape.n_lora_kv
        return layer.n_head * (shape.head_k_mla + shape.n_lora_kv + rope + layer.head_k)
    if flash_attn:
        return 0
    q, kv = layer.n_head * layer.head_k, layer.n_k + layer.n_v
    q_twice = (layer.rows("attn_q") or q) + (q if q != shape.n_embd else 0)
    return q_twice + kv + (shape.n_embd if shape.has_swa else 0)


def kq_elements(shape: ModelShape, layer: LayerShape, settings: LlamaMemorySettings) -> int:
    """Elements of each token in the attention scores, which only exist without flash attention: heads x cells."""
    if settings.flash_attn or not layer.has_kv:
        return 0
    return layer.n_head * n_cells(layer, settings, shape.n_swa)


def latent_value_bytes(shape: ModelShape, layer: LayerShape, settings: LlamaMemorySettings) -> int:
    """Return the transposed values that MLA without flash attention makes of the whole cache, f16."""
    if settings.flash_attn or not shape.is_mla:
        return 0
    return n_stream(settings) * n_cells(layer, settings, shape.n_swa) * shape.n_lora_kv * F16


def mixer_bytes(shape: ModelShape, layer: LayerShape, settings: LlamaMemorySettings) -> int:
    """Peak of a state-space mixer: projections and convolutions of each token, and the state of each sequence.

    Fitted to Mamba2-7B, Nemotron-H-8B and Granite-4.0-H-Tiny, and to Falcon-H1-1.5B, whose mixer runs beside the
    attention and holds more; 0 to +6 % there. CUDA holds the state twice.
    """
    conv, inner = layer.tensor("ssm_conv1d"), layer.tensor("ssm_out")
    if not conv or not inner or not layer.is_recurrent:
        return 0
    projected = layer.rows("ssm_in") or layer.rows("attn_qkv") + layer.rows("attn_gate")
    elements = projected + 2 * conv.shape[-1] + 3 * inner.shape[0] + (2 if layer.has_kv else 1) * shape.n_embd
    states = layer.n_s * 2 if layer.has_kv or settings.n_gpus else layer.n_s * 4 // 3
    return (elements * n_ubatch(settings) + settings.parallel * states) * F32


def graph_bytes(shape: ModelShape, layer: LayerShape, settings: LlamaMemorySettings, n_residual: int) -> int:
    """Peak of one layer: the greatest of its feed-forward network, its attention and its mixer.

    `n_residual` counts the tensors of n_embd x tokens alive beside them: 5 on the CPU, 4 on a GPU.
    """
    elements = ffn_elements(shape, layer) + n_residual * shape.n_embd
    if settings.n_gpus:
        elements += fused_experts_elements(shape, layer)
    ffn = elements * n_ubatch(settings) * F32
    return max(ffn, attention_bytes(shape, layer, settings, n_residual), mixer_bytes(shape, layer, settings))


def attention_bytes(shape: ModelShape, layer: LayerShape, settings: LlamaMemorySettings, n_residual: int) -> int:
    """Peak of the attention of one layer. On a GPU with what a large tensor in it keeps from being shared."""
    if not layer.has_kv:
        return 0
    elements = attention_elements(shape, layer, flash_attn=settings.flash_attn) + n_residual * shape.n_embd
    elements += kq_elements(shape, layer, settings)
    copies = flash_copy_bytes(layer, settings, shape) if settings.n_gpus else 0
    if copies and not shape.is_mla:
        elements += 2 * layer.n_head * layer.head_k
    if layer.experts and settings.n_gpus and (copies or not settings.flash_attn):
        elements += ffn_elements(shape, layer)
    beside = mixer_bytes(shape, layer, settings) if copies else 0
    return elements * n_ubatch(settings) * F32 + latent_value_bytes(shape, layer, settings) + copies + beside


def flash_copy_bytes(layer: LayerShape, settings: LlamaMemorySettings, shape: ModelShape) -> int:
    """Return the copies in f16 that flash attention on CUDA makes of a layer's whole cache where it is of another type.

    Seen on 24 models (H100, 0.5.0-dev): 512 MiB for Llama-3.1-8B with 131072 tokens in q8_0. Software Vulkan makes
    none. Source: ggml_cuda_flash_attn_ext_get_alloc_size (fattn.cu).
    """
    if not settings.flash_attn:
        return 0
    n_k = layer.n_k if settings.cache_type_k != "f16" else 0
    n_v = layer.n_v if settings.cache_type_v != "f16" else 0
    return n_stream(settings) * n_cells(layer, settings, shape.n_swa) * (n_k + n_v) * F16


def fused_experts_elements(shape: ModelShape, layer: LayerShape) -> int:
    """Return what CUDA keeps of the experts for its fused sum: their outputs, weighted and not, at once.

    They cost nothing more where the second fits in the place of gate, up and product. Source:
    ggml_backend_cuda_graph_optimize (ggml-cuda.cu); fitted to GLM-4.5-Air and Qwen3-Next-80B.
    """
    narrow = layer.experts and 3 * shape.n_ff_exp * 10 < 11 * shape.n_embd
    return layer.n_expert_used * shape.n_embd if narrow else 0


def cpu_compute_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Compute buffer of a host without a GPU: 4 x ubatch x (ffn + 5 x n_embd) and the masks.

    With flash attention exact to the MiB on 19 of 25 models measured with 0.7.0, and at most 7 MiB or 11 % high on
    the others (mamba2, hybrids, small MLA); without it exact on 17 and at most 5 % high. Never low.
    """
    graph = max(graph_bytes(shape, layer, settings, 5) for layer in shape.trunk)
    return (graph + mask_bytes(shape, settings) + rotation_bytes(shape, settings)) / MIB


def host_compute_mib(shape: ModelShape, settings: LlamaMemorySettings, places: Places) -> float:
    """Host part of the compute buffer beside a GPU: 4 x n_embd x ubatch f32 and the inputs.

    Exact with 0.7.0 on software Vulkan; CUDA (0.5.0-dev) has 2 x n_embd. What the CPU computes itself is an upper
    bound: small micro-batches and state-space mixers.
    """
    small = n_ubatch(settings) < OP_OFFLOAD_MIN_TOKENS and not places.all_on_gpu
    if small or any(layer.is_recurrent for layer in places.layers(CPU)):
        return cpu_compute_mib(shape, replace(settings, n_gpus=0))
    inputs = mask_bytes(shape, settings) + rotation_bytes(shape, settings)
    return (4 * shape.n_embd * n_ubatch(settings) * F32 + inputs) / MIB


def gpu_compute_mib(shape: ModelShape, settings: LlamaMemorySettings, places: Places) -> float:
    """Compute buffer of each GPU, also with gpu_layers 0: large products of the CPU's layers run on the GPU.

    All on the GPU: 4 x ubatch x (ffn + 4 x n_embd) and the masks; exact on 7 models (software Vulkan, 0.7.0). CUDA
    (H100, 0.5.0-dev, 28 models) takes less: the plan is 0 to 44 % high with an f16 cache, by 6 % in the median.
    """
    inputs = mask_bytes(shape, settings) + rotation_bytes(shape, settings)
    if places.all_on_gpu:
        graph = max(graph_bytes(shape, layer, settings, 4) for layer in shape.trunk)
        return (graph + inputs + pipeline_bytes(shape, settings)) / MIB
    return (mixed_graph_bytes(shape, settings, places) + inputs) / MIB


def mixed_graph_bytes(shape: ModelShape, settings: LlamaMemorySettings, places: Places) -> int:
    """Peak of the GPU's graph when layers or experts are on the CPU. An upper bound.

    Either one layer with 6 x n_embd or the attention of a CPU layer with its KV cache copied over, and the greatest
    weight that is copied over. On CUDA 27 % high in the median, and never low but for gpt-oss without flash attention.
    """
    graph = max(graph_bytes(shape, layer, settings, 6) for layer in shape.trunk)
    attention = offloaded_attention_bytes(shape, settings, places)
    return max(graph, attention) + copied_weight_bytes(settings, places)


def copied_weight_bytes(settings: LlamaMemorySettings, places: Places) -> int:
    """Return the greatest weight on the CPU that a GPU computes with: it is copied for each product.

    Between state-space mixers two stacks of experts can be there at once (Qwen3-Next-80B).
    """
    if n_ubatch(settings) < OP_OFFLOAD_MIN_TOKENS:
        return 0
    outside = (*places.shape.input_tensors, *places.shape.output_tensors)
    greatest = max((t.n_bytes for t in places.weights(CPU) if t not in outside), default=0)
    return 2 * greatest if places.n_cpu_moe and places.shape.is_recurrent else greatest


def offloaded_attention_bytes(shape: ModelShape, settings: LlamaMemorySettings, places: Places) -> int:
    """Attention of a layer on the CPU that a GPU computes, with the KV cache copied over, and with it a hole.

    The hole is up to half the copy (2.5 copies with MLA, whose K is K and V). An upper bound on CUDA.
    """
    if n_ubatch(settings) < OP_OFFLOAD_MIN_TOKENS and not shape.is_recurrent:
        return 0
    layers = [layer for layer in places.layers(CPU) if layer.has_kv and not layer.is_mtp]
    n_copies = 2.5 if shape.is_mla else 1.5

    def bytes_of(layer: LayerShape) -> int:
        cache, query = int(n_copies * kv_mib(layer, settings, shape) * MIB), 2 * layer.n_head * layer.head_k
        return cache + attention_bytes(shape, layer, settings, 5) + query * n_ubatch(settings) * F32

    return max(map(bytes_of, layers), default=0)


def gpu_overhead_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Memory of the process on each GPU outside every table: its context, and pools that grow with the first prompts.

    The pools hold the activations of one micro-batch in q8_1 and, without flash attention, the scores in f16. An upper
    bound on 60 runs with prompts of up to 8000 tokens on an H100 (0.5.0-dev), 7 to 169 MiB high with flash attention.
    """
    widest = max(max(layer.n_ff, layer.n_expert_used * shape.n_ff_exp, shape.n_embd) for layer in shape.trunk)
    pool = kv_bytes(widest * n_ubatch(settings), "q8_1") + F16 * n_ubatch(settings) * max(
        kq_elements(shape, layer, settings) for layer in shape.trunk
    )
    mixers = MIXER_POOL_MIB + (settings.parallel - 1) * MIXER_SLOT_MIB if shape.is_recurrent else 0
    return GPU_CONTEXT_MIB + GPU_POOL_MIB + mixers + pool / MIB + (CUBLAS_MIB if uses_cublas(shape, settings) else 0)


def uses_cublas(shape: ModelShape, settings: LlamaMemorySettings) -> bool:
    """Say whether some products of large batches go through cuBLAS: plain floats, which quantised dense models lack."""
    if shape.is_recurrent or not settings.flash_attn:
        return True
    return any(t.type in ("F32", "F16", "BF16") and len(t.shape) > 1 for t in shape.trunk[-1].tensors)


def pipeline_bytes(shape: ModelShape, settings: LlamaMemorySettings) -> int:
    """Return the copies of inputs and masks that a pipeline over several GPUs keeps. Upper bound, not measured."""
    copies = PIPELINE_COPIES - 1 if settings.n_gpus > 1 else 0
    return copies * (mask_bytes(shape, settings) + shape.n_embd * n_ubatch(settings) * F32)


# -- host ------------------------------------------------------


def process_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Memory of the process outside every table: itself, the tokenizer, and the logits of every slot."""
    logits = shape.n_vocab * settings.parallel * F32
    process = PROCESS_MIB + (GPU_PROCESS_MIB if settings.n_gpus else 0)
    return process + (shape.n_vocab * TOKENIZER_BYTES_PER_TOKEN + logits) / MIB


def repackable(tensor_type: str, shape: Sequence[int], cpu_flags: AbstractSet[str]) -> bool:
    """Say whether the CPU backend keeps a weight in its own interleaved form.

    By type and by the number of rows, which must divide by the interleave; matrices and stacks of experts only.
    Source: ggml_repack_get_optimal_repack_type (ggml-cpu/repack.cpp).
    """
    interleave: dict[str, int] = {}
    if "avx2" in cpu_flags:
        interleave |= REPACK_AVX2
    if "avx512f" in cpu_flags or "avx512" in cpu_flags:
        interleave |= REPACK_AVX512
    if ARM_FLAGS & cpu_flags:
        interleave |= REPACK_ARM
    return len(shape) in (2, 3) and shape[1] % interleave.get(tensor_type, shape[1] + 1) == 0


def repacked_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Weights that a host without a GPU repacks: of the layers and the output, not the token embeddings."""
    if settings.n_gpus or not settings.repack:
        return 0.0
    weights = [tensor for layer in shape.trunk for tensor in layer.tensors] + list(shape.output_tensors)
    return total_bytes(t for t in weights if _is_repacked(t, settings)) / MIB


def tied_repacked_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Tied embeddings, which as the output layer are repacked into a copy of their own."""
    if settings.n_gpus or not settings.repack or not shape.tied_embeddings:
        return 0.0
    return (
        total_bytes(t for t in shape.input_tensors if t.name == "token_embd.weight" and _is_repacked(t, settings)) / MIB
    )


def _is_repacked(tensor: Tensor, settings: LlamaMemorySettings) -> bool:
    return repackable(tensor.type, tensor.shape, settings.cpu_flags)
