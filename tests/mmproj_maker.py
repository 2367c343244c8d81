"""Write projectors (mmproj files) of believable shapes without weights, as llama.cpp reads them; see gguf_maker.py.

Names of tensors and keys: tools/mtmd/clip-impl.h and clip.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf_maker as maker

from labdeploy.models.gguf import PrefixReader, read_header

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.models.gguf import GgufHeader


@dataclass(frozen=True)
class Encoder:
    """The shape of a vision transformer, and what follows it."""

    kind: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    patch_size: int
    image_size: int
    projection_dim: int
    n_merge: int = 1
    gated: bool = False
    fused: bool = False
    weights: str = "F16"

    @property
    def merged(self) -> int:
        """Width of the patches that become one token."""
        return self.n_embd * self.n_merge**2


QWEN = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger")
DEEPSTACK = (5, 11, 17)

SHAPES = {
    "gemma3-4b": Encoder("gemma3", 27, 1152, 4304, 16, 14, 896, 2560, n_merge=4),
    "gemma3-27b": Encoder("gemma3", 27, 1152, 4304, 16, 14, 896, 5376, n_merge=4),
    "qwen2-vl-7b": Encoder("qwen2vl_merger", 32, 1280, 5120, 16, 14, 560, 3584, n_merge=2),
    "qwen2.5-vl-7b": Encoder("qwen2.5vl_merger", 32, 1280, 3420, 16, 14, 560, 3584, n_merge=2, gated=True),
    "qwen3-vl-4b": Encoder("qwen3vl_merger", 24, 1024, 4096, 16, 16, 768, 2560, n_merge=2, fused=True),
    "qwen3-vl-8b": Encoder("qwen3vl_merger", 27, 1152, 4304, 16, 16, 768, 4096, n_merge=2, fused=True),
    "pixtral-12b": Encoder("pixtral", 24, 1024, 4096, 16, 16, 1024, 5120, gated=True),
    "mistral-small-3.1": Encoder("pixtral", 24, 1024, 4096, 16, 14, 1540, 5120, n_merge=2, gated=True),
    "llava-1.5-7b": Encoder("mlp", 23, 1024, 4096, 16, 14, 336, 4096),
    "smolvlm2-2b": Encoder("idefics3", 27, 1152, 4304, 16, 14, 384, 2048, n_merge=3),
    "internvl3-8b": Encoder("internvl", 24, 1024, 4096, 16, 14, 448, 3584, n_merge=2),
}


def metadata(shape: Encoder) -> dict[str, object]:
    """Give the metadata of a projector."""
    front = "clip.vision."
    keys: dict[str, object] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": shape.kind,
        "clip.use_gelu": shape.kind not in ("qwen2.5vl_merger", "pixtral"),
        "clip.use_silu": shape.kind in ("qwen2.5vl_merger", "pixtral"),
        f"{front}image_size": shape.image_size,
        f"{front}patch_size": shape.patch_size,
        f"{front}embedding_length": shape.n_embd,
        f"{front}feed_forward_length": shape.n_ff,
        f"{front}projection_dim": shape.projection_dim,
        f"{front}block_count": shape.n_layer,
        f"{front}attention.head_count": shape.n_head,
        f"{front}attention.layer_norm_epsilon": 1e-6,
        f"{front}image_mean": maker.Typed(9, [0.5, 0.5, 0.5], 6),
        f"{front}image_std": maker.Typed(9, [0.5, 0.5, 0.5], 6),
    }
    if shape.kind == "qwen2.5vl_merger":
        keys[f"{front}n_wa_pattern"] = 8
    if shape.kind == "pixtral" and shape.n_merge > 1:
        keys[f"{front}spatial_merge_size"] = shape.n_merge
    if shape.kind in ("idefics3", "internvl"):
        keys[f"{front}projector.scale_factor"] = shape.n_merge
    if shape.kind == "qwen3vl_merger":
        keys[f"{front}is_deepstack_layers"] = maker.Typed(9, [i in DEEPSTACK for i in range(shape.n_layer)], 7)
    return keys


@dataclass
class _Tensors:
    """The tensors of a projector under construction."""

    weights: str
    found: list[maker.TensorInfo]

    def matrix(self, name: str, *dims: int) -> None:
        self.found.append((f"{name}.weight", dims, self.weights))

    def vector(self, name: str, *dims: int) -> None:
        self.found.append((name, dims, "F32"))

    def linear(self, name: str, n_in: int, n_out: int, *, bias: bool = True) -> None:
        self.matrix(name, n_in, n_out)
        if bias:
            self.vector(f"{name}.bias", n_out)

    def norm(self, name: str, size: int, *, bias: bool = True) -> None:
        self.vector(f"{name}.weight", size)
        if bias:
            self.vector(f"{name}.bias", size)


def tensors(shape: Encoder) -> list[maker.TensorInfo]:
    """Give the tensors of a projector."""
    made = _Tensors(shape.weights, [])
    _patches(shape, made)
    for il in range(shape.n_layer):
        _layer(shape, made, f"v.blk.{il}")
    if shape.kind not in ("mlp", "pixtral", "internvl"):
        made.norm("v.post_ln", shape.n_embd, bias=shape.kind != "qwen2.5vl_merger")
    AFTER[shape.kind](shape, made)
    return made.found


def _patches(shape: Encoder, made: _Tensors) -> None:
    side, n = shape.patch_size, shape.n_embd
    has_class = shape.kind in ("mlp", "internvl")
    made.matrix("v.patch_embd", side, side, 3, n)
    if shape.kind in QWEN:
        made.found.append(("v.patch_embd.weight.1", (side, side, 3, n), shape.weights))
    if shape.kind not in ("qwen2vl_merger", "qwen2.5vl_merger", "pixtral"):
        made.vector("v.patch_embd.bias", n)
        made.vector("v.position_embd.weight", n, (shape.image_size // side) ** 2 + has_class)
    if has_class:
        made.vector("v.class_embd", n)
    if shape.kind in ("mlp", "pixtral"):
        made.norm("v.pre_ln", n, bias=shape.kind == "mlp")


def _layer(shape: Encoder, made: _Tensors, at: str) -> None:
    n, ff, biased = shape.n_embd, shape.n_ff, shape.kind != "pixtral"
    for part in ("ln1", "ln2"):
        made.norm(f"{at}.{part}", n, bias=shape.kind not in ("qwen2.5vl_merger", "pixtral"))
    for part in ("attn_qkv",) if shape.fused else ("attn_q", "attn_k", "attn_v"):
        made.linear(f"{at}.{part}", n, 3 * n if shape.fused else n, bias=biased)
    made.linear(f"{at}.attn_out", n, n, bias=biased)
    if shape.kind == "internvl":
        made.vector(f"{at}.ls1.weight", n)
        made.vector(f"{at}.ls2.weight", n)
    for part in ("ffn_gate", "ffn_up") if shape.gated else ("ffn_up",):
        made.linear(f"{at}.{part}", n, ff, bias=biased)
    made.linear(f"{at}.ffn_down", ff, n, bias=biased)


def _gemma3(shape: Encoder, made: _Tensors) -> None:
    made.matrix("mm.input_projection", shape.projection_dim, shape.n_embd)
    made.vector("mm.soft_emb_norm.weight", shape.n_embd)


def _merger(shape: Encoder, made: _Tensors) -> None:
    made.linear("mm.0", shape.merged, shape.merged)
    made.linear("mm.2", shape.merged, shape.projection_dim)
    for il in DEEPSTACK if shape.kind == "qwen3vl_merger" else ():
        made.norm(f"v.deepstack.{il}.norm", shape.merged)
        made.linear(f"v.deepstack.{il}.fc1", shape.merged, shape.merged)
        made.linear(f"v.deepstack.{il}.fc2", shape.merged, shape.projection_dim)


def _pixtral(shape: Encoder, made: _Tensors) -> None:
    made.linear("mm.1", shape.n_embd, shape.projection_dim)
    made.linear("mm.2", shape.projection_dim, shape.projection_dim)
    made.vector("v.token_embd.img_break", shape.projection_dim)
    if shape.n_merge > 1:
        made.vector("mm.input_norm.weight", shape.n_embd)
        made.matrix("mm.patch_merger", shape.merged, shape.n_embd)


def _mlp(shape: Encoder, made: _Tensors) -> None:
    made.linear("mm.0", shape.n_embd, shape.projection_dim)
    made.linear("mm.2", shape.projection_dim, shape.projection_dim)


def _idefics3(shape: Encoder, made: _Tensors) -> None:
    made.matrix("mm.model.fc", shape.merged, shape.projection_dim)


def _internvl(shape: Encoder, made: _Tensors) -> None:
    made.norm("mm.model.mlp.0", shape.merged)
    made.linear("mm.model.mlp.1", shape.merged, shape.projection_dim)
    made.linear("mm.model.mlp.3", shape.projection_dim, shape.projection_dim)


AFTER = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "mlp": _mlp,
    "pixtral": _pixtral,
    **dict.fromkeys(QWEN, _merger),
}


def header(name: str) -> GgufHeader:
    """Give the header as labdeploy reads it."""
    shape = SHAPES[name]
    raw, size = maker.header(metadata(shape), tensors(shape))
    return read_header(PrefixReader(raw, size))


def write(path: Path, name: str) -> Path:
    """Write the sparse file."""
    shape = SHAPES[name]
    return maker.write(path, metadata(shape), tensors(shape))
