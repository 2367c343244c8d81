"""How much memory llama-server takes, device by device, before it is started.

`memory` is the top. model, context and compute mean what llama.cpp's own memory breakdown means
(`llama-server -lv 4`): weights by tensor, `llama_context` for what is kept of the tokens, `llama_graph` for the compute
buffers. Sources are llama.cpp 0.5.0 (0c1e57098) for the logic and 0.7.0 (build 11669) for the figures;
docs/planner-accuracy.md lays both side by side. What stands outside every table is an estimate, said in each docstring.

n_embd and the like are elements, `_bytes` bytes, `_mib` MiB (2^20 bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from labdeploy.models.shape import total_bytes
from labdeploy.runners.llama_context import F16, F32, MIB, checkpoint_mib, context_mib, kv_bytes, n_cells, n_ubatch
from labdeploy.runners.llama_graph import compute_bytes
from labdeploy.runners.llama_mmproj import image_mib, projector_mib
from labdeploy.runners.llama_placement import CPU, GpuApi, LlamaMemorySettings, Places, place

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from labdeploy.models.gguf import Tensor
    from labdeploy.models.shape import ModelShape

__all__ = ["DeviceMemory", "GpuApi", "HostMemory", "LlamaMemorySettings", "MemoryByDevice", "memory"]

# The compute buffers of an architecture that nobody has looked at, over what its tensors tell.
UNKNOWN_ARCH_MARGIN = 1.5
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

REPACK_AVX2 = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}
REPACK_AVX512 = {"Q2_K": 8}
REPACK_ARM = {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "Q8_0": 4, "IQ4_NL": 4, "MXFP4": 4, "Q1_0": 4}
ARM_FLAGS = frozenset(("dotprod", "asimddp", "i8mm"))


@dataclass(frozen=True)
class DeviceMemory:
    """What the service takes on one GPU."""

    model_mib: float
    context_mib: float
    compute_mib: float
    overhead_mib: float
    mmproj_mib: float = 0.0
    draft_mib: float = 0.0

    @property
    def beside_layers_mib(self) -> float:
        """What it takes there wherever its layers are."""
        return self.compute_mib + self.overhead_mib + self.mmproj_mib + self.draft_mib

    @property
    def total_mib(self) -> float:
        """All of it."""
        return self.model_mib + self.context_mib + self.beside_layers_mib


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
    mmproj_mib: float = 0.0
    draft_mib: float = 0.0

    @property
    def anonymous_mib(self) -> float:
        """What the kernel cannot drop: everything but the mapped file."""
        start = self.context_mib + self.compute_mib + self.overhead_mib + self.repack_mib
        return start + self.mmproj_mib + self.draft_mib + self.cache_ram_mib + self.checkpoints_mib

    @property
    def planned_mib(self) -> float:
        """What a plan counts: pages of the mapped file that were repacked can be dropped."""
        return self.anonymous_mib + self.model_mib

    @property
    def total_mib(self) -> float:
        """All of it, the mapped file included: it can be dropped, but then every token reads the disk."""
        return self.anonymous_mib + self.mapped_mib


@dataclass(frozen=True)
class MemoryByDevice:
    """What a service takes on every GPU, in the order of --device, and on the host."""

    gpus: tuple[DeviceMemory, ...]
    host: HostMemory


@lru_cache(maxsize=4096)
def memory(shape: ModelShape, settings: LlamaMemorySettings) -> MemoryByDevice:
    """Return what llama-server will take with these settings, device by device."""
    places = place(shape, settings)
    margin = 1.0 if shape.known_arch else UNKNOWN_ARCH_MARGIN
    *on_gpus, on_host = (margin * n_bytes / MIB for n_bytes in compute_bytes(shape, settings, places))
    alone = MemoryByDevice(
        gpus=tuple(_gpu(shape, settings, places, gpu, compute_mib) for gpu, compute_mib in enumerate(on_gpus)),
        host=_host(shape, settings, places, on_host),
    )
    return _with_draft(_with_projector(alone, settings), settings)


def _gpu(
    shape: ModelShape, settings: LlamaMemorySettings, places: Places, gpu: int, compute_mib: float
) -> DeviceMemory:
    return DeviceMemory(
        model_mib=places.weights_bytes(gpu) / MIB,
        context_mib=context_mib(places.layers(gpu), settings, shape),
        compute_mib=compute_mib,
        overhead_mib=gpu_overhead_mib(shape, settings),
    )


def _host(shape: ModelShape, settings: LlamaMemorySettings, places: Places, compute_mib: float) -> HostMemory:
    weights_mib = places.weights_bytes(CPU) / MIB
    repacked, copied = repacked_mib(shape, settings), tied_repacked_mib(shape, settings)
    return HostMemory(
        model_mib=weights_mib - repacked,
        context_mib=context_mib(places.layers(CPU), settings, shape),
        compute_mib=compute_mib,
        overhead_mib=process_mib(shape, settings),
        repack_mib=repacked + copied,
        mapped_mib=weights_mib,
        cache_ram_mib=float(max(settings.cache_ram_mib, 0)),
        checkpoints_mib=settings.parallel * settings.ctx_checkpoints * checkpoint_mib(shape, settings),
    )


# -- beside the model ------------------------------------------


def _with_projector(alone: MemoryByDevice, settings: LlamaMemorySettings) -> MemoryByDevice:
    """Add an encoder of images: all of it on the first GPU, or on the host."""
    if not settings.projector:
        return alone
    taken = projector_mib(settings.projector, settings)
    if settings.n_gpus and settings.mmproj_offload:
        first = replace(alone.gpus[0], mmproj_mib=taken)
        host = replace(alone.host, mmproj_mib=image_mib(settings.projector, settings))
        return MemoryByDevice((first, *alone.gpus[1:]), host)
    return replace(alone, host=replace(alone.host, mmproj_mib=taken))


def _with_draft(alone: MemoryByDevice, settings: LlamaMemorySettings) -> MemoryByDevice:
    """Add a model that drafts: a second model in the same process, with a context of the same length.

    Its cache is f16 unless asked otherwise, and it keeps no prompts. Its layers are split as the model's are.
    """
    if not settings.draft:
        return alone
    taken = memory(settings.draft, draft_settings(settings))
    gpus = tuple(
        replace(part, draft_mib=own.total_mib - GPU_CONTEXT_MIB)
        for part, own in zip(alone.gpus, taken.gpus, strict=True)
    )
    return MemoryByDevice(gpus, replace(alone.host, draft_mib=taken.host.planned_mib - _empty_process_mib(settings)))


def draft_settings(settings: LlamaMemorySettings) -> LlamaMemorySettings:
    """Give the settings of the context that drafts, given those of the model's."""
    return replace(
        settings.alone,
        gpu_layers=settings.draft_gpu_layers,
        n_cpu_moe=0,
        cache_type_k="f16",
        cache_type_v="f16",
        cache_ram_mib=0,
        ctx_checkpoints=0,
        draft_tokens=0,
    )


# -- beside the tables ------------------------------------------


def gpu_overhead_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Memory of the process on each GPU outside every table: its context, and pools that grow with the first prompts.

    The pools hold the activations of one micro-batch in q8_1 and, without flash attention, the scores in f16. An upper
    bound on 60 runs with prompts of up to 8000 tokens on an H100 (0.5.0-dev), 7 to 169 MiB high with flash attention.
    """
    widest = max(max(layer.n_ff, layer.n_expert_used * shape.n_ff_exp, shape.n_embd) for layer in shape.trunk)
    cells = 0 if settings.flash_attn else max(n_cells(layer, settings, shape.n_swa) for layer in shape.trunk)
    scores = max(layer.n_head for layer in shape.trunk) * cells
    pool = kv_bytes(widest * n_ubatch(settings), "q8_1") + F16 * n_ubatch(settings) * scores
    mixers = MIXER_POOL_MIB + (settings.parallel - 1) * MIXER_SLOT_MIB if shape.is_recurrent else 0
    return GPU_CONTEXT_MIB + GPU_POOL_MIB + mixers + pool / MIB + (CUBLAS_MIB if uses_cublas(shape, settings) else 0)


def uses_cublas(shape: ModelShape, settings: LlamaMemorySettings) -> bool:
    """Say whether some products of large batches go through cuBLAS: plain floats, which quantised dense models lack."""
    if shape.is_recurrent or not settings.flash_attn:
        return True
    return any(t.type in ("F32", "F16", "BF16") and len(t.shape) > 1 for t in shape.trunk[-1].tensors)


# -- host ------------------------------------------------------


def _empty_process_mib(settings: LlamaMemorySettings) -> float:
    """Memory of the process before it has read any model."""
    return PROCESS_MIB + (GPU_PROCESS_MIB if settings.n_gpus else 0)


def process_mib(shape: ModelShape, settings: LlamaMemorySettings) -> float:
    """Memory of the process outside every table: itself, the tokenizer, and the logits of every slot."""
    logits = shape.n_vocab * settings.parallel * F32
    return _empty_process_mib(settings) + (shape.n_vocab * TOKENIZER_BYTES_PER_TOKEN + logits) / MIB


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
