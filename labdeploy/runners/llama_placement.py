"""The settings of llama-server that its memory depends on, and which device they put each layer on."""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from labdeploy.models.shape import total_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from labdeploy.models.projector import Projector
    from labdeploy.models.shape import LayerShape, ModelShape

GpuApi = Literal["cuda", "rocm", "vulkan"]


@dataclass(frozen=True)
class LlamaMemorySettings:
    """The settings of llama-server that decide its memory, by its own names.

    All are resolved: no `auto`, no ctx_size 0. `n_gpus` 0 is --device none; `gpu_api` is what computes on the GPUs. A
    cache_ram_mib of -1 has no limit, so it is not in the sum. `mixed_inputs` says that the build mixes tokens and
    embeddings in one batch, which takes room in every graph (0.7.0 does, 0.5.0-dev does not). `projector` and `draft`
    are loaded beside the model, and follow it onto GPUs: a draft with `draft_gpu_layers`, a projector unless
    `mmproj_offload` is False.
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
    gpu_api: GpuApi = "cuda"
    tensor_split: tuple[float, ...] = ()
    repack: bool = True
    cpu_flags: frozenset[str] = frozenset(("avx2",))
    cache_ram_mib: int = 8192
    swa_full: bool = False
    ctx_checkpoints: int = 32
    mixed_inputs: bool = True
    projector: Projector | None = None
    mmproj_offload: bool = True
    image_max_tokens: int | None = None
    draft: ModelShape | None = None
    draft_gpu_layers: int = 0
    draft_tokens: int = 0

    @property
    def n_outputs(self) -> int:
        """Tokens of a batch that are followed by logits: of each slot the last one, and those that were drafted.

        Source: server_n_outputs_max (server-context.cpp).
        """
        return self.parallel * (1 + self.draft_tokens)

    @property
    def alone(self) -> LlamaMemorySettings:
        """The same without what is loaded beside the model."""
        return replace(self, projector=None, image_max_tokens=None, draft=None, draft_gpu_layers=0)


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

    def weights_bytes(self, device: int) -> int:
        """Return the weights of a device: no draft layers, tied embeddings twice where they are offloaded."""
        taken = sum(self._layer_bytes(layer, device) for layer in self.shape.trunk)
        taken += self.shape.input_bytes if device == CPU else 0
        if device != self.output_device:
            return taken
        return taken + (total_bytes(self.shape.output_tensors) if device == CPU else self.shape.output_bytes)

    def _layer_bytes(self, layer: LayerShape, device: int) -> int:
        on = self.layer_device[layer.index]
        experts = layer.experts_bytes if self.experts_on_cpu(layer) else 0
        return (layer.weights_bytes - experts if on == device else 0) + (experts if device == CPU else 0)

    def experts_on_cpu(self, layer: LayerShape) -> bool:
        """Say whether the layer is on a GPU and its experts are not."""
        return layer.index < self.n_cpu_moe and self.layer_device[layer.index] != CPU

    @property
    def output_matrix_bytes(self) -> int:
        """Bytes of the matrix that makes the logits."""
        matrix = (tensor for tensor in self.shape.output_tensors if tensor.name == "output.weight")
        return total_bytes(matrix) or self.shape.tied_bytes

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
