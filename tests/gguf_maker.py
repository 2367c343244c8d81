"""Write GGUF headers of believable models, and sparse files of their full length.

The shapes are the published ones; the weights are absent: `write_model` truncates the file to its full length, so a
40 GiB model takes a few megabytes of disk. llama.cpp reads such a file as the model that it says it is.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from labdeploy.models.gguf import TENSOR_TYPES, PrefixReader, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from labdeploy.models.gguf import GgufHeader

TYPE_NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}
SIZES = {kind.name: kind for kind in TENSOR_TYPES.values()}

TensorInfo = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Typed:
    """A metadata value of one GGUF type: 4 u32, 5 i32, 6 f32, 7 bool, 8 string, 9 array of `item`."""

    kind: int
    value: object
    item: int = 0


def text(value: str | bytes) -> bytes:
    """Encode a GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def typed(value: object) -> Typed:
    """Give a Python value the GGUF type that converters would."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, list | tuple):
        return Typed(9, value, typed(value[0]).kind if value else 5)
    for kind, number in ((bool, 7), (int, 4), (float, 6), (str, 8)):
        if isinstance(value, kind):
            return Typed(number, value)
    raise TypeError(value)


def encoded(value: object) -> bytes:
    """Encode the type and the value of one metadata entry."""
    entry = typed(value)
    if entry.kind == 9:
        return struct.pack("<II", 9, entry.item) + items(entry.item, entry.value)
    return struct.pack("<I", entry.kind) + one(entry.kind, entry.value)


def items(kind: int, values: Sequence[object]) -> bytes:
    """Encode the length and the items of an array."""
    if kind == 8:
        return struct.pack("<Q", len(values)) + b"".join(map(text, values))
    return struct.pack(f"<Q{len(values)}{FORMATS[kind]}", len(values), *values)


def one(kind: int, value: object) -> bytes:
    """Encode one value."""
    return text(value) if kind == 8 else struct.pack("<" + FORMATS[kind], value)


def pad(n: int, alignment: int = 32) -> int:
    """Round up to the alignment."""
    return -(-n // alignment) * alignment


def tensor_bytes(shape: Iterable[int], kind: str) -> int:
    """Bytes of one tensor."""
    return math.prod(shape) // SIZES[kind].block * SIZES[kind].n_bytes


def header(
    metadata: Mapping[str, object], tensors: Sequence[TensorInfo], *, version: int = 3, alignment: int = 32
) -> tuple[bytes, int]:
    """Return the header of a file and the full length of the file."""
    out = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    out += [text(key) + encoded(value) for key, value in metadata.items()]
    offset = 0
    for name, shape, kind in tensors:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out.append(text(name) + dims + struct.pack("<IQ", TYPE_NUMBERS[kind], offset))
        offset += pad(tensor_bytes(shape, kind), alignment)
    raw = b"".join(out)
    raw += bytes(pad(len(raw), alignment) - len(raw))
    return raw, len(raw) + offset


def write(path: Path, metadata: Mapping[str, object], tensors: Sequence[TensorInfo], **options: int) -> Path:
    """Write a sparse file of the full length."""
    raw, size = header(metadata, tensors, **options)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(size)
    return path


def use_more_bits(il: int, n_layer: int) -> bool:
    """Which layers Q4_K_M gives more bits (llama.cpp src/llama-quant.cpp)."""
    return il < n_layer // 8 or il >= 7 * n_layer // 8 or (il - n_layer // 8) % 3 == 2


@dataclass(frozen=True)
class Mix:
    """Which type a published quantisation gives each tensor."""

    base: str = "Q4_K"
    output: str = "Q6_K"
    more: str = ""  # attn_v and ffn_down of some layers
    embd: str = ""
    experts: str = ""

    def kind(self, part: str, il: int, n_layer: int) -> str:
        """Return the type of one matrix."""
        if part == "output":
            return self.output
        if part == "token_embd":
            return self.embd or self.base
        if part in ("attn_k_b", "attn_v_b"):
            return "Q8_0"
        if self.experts and part.endswith("_exps"):
            return self.experts
        if self.more and part.startswith(("attn_v", "ffn_down")) and use_more_bits(il, n_layer):
            return self.more
        return self.base


Q4_K = Mix()
Q4_K_M = Mix(more="Q6_K")
Q8_0 = Mix(base="Q8_0", output="Q8_0")
F16 = Mix(base="F16", output="F16")


@dataclass
class Model:
    """A model under construction: metadata, tensors, and how its matrices are quantised."""

    arch: str
    n_embd: int
    n_vocab: int
    n_layer: int
    mix: Mix = Q4_K
    n_ctx_train: int = 131072
    name: str = "model"
    file_type: int = 15
    vocabulary: bool = True
    keys: dict[str, object] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)

    def key(self, **keys: object) -> None:
        """Set keys of the architecture: `attention__head_count` is attention.head_count."""
        self.keys.update({f"{self.arch}.{key.replace('__', '.')}": value for key, value in keys.items()})

    def matrix(self, part: str, *shape: int, il: int = -1) -> None:
        """Add a quantised matrix."""
        kind = self.mix.kind(part, il, self.n_layer)
        if shape[0] % SIZES[kind].block:
            kind = "Q5_0" if shape[0] % 32 == 0 else "F16"  # as llama-quant.cpp falls back
        self._add(part, shape, kind, il)

    def vector(self, part: str, *shape: int, il: int = -1, suffix: str = "weight") -> None:
        """Add a small f32 tensor."""
        self._add(part, shape, "F32", il, suffix)

    def _add(self, part: str, shape: tuple[int, ...], kind: str, il: int, suffix: str = "weight") -> None:
        stem = part if il < 0 else f"blk.{il}.{part}"
        self.tensors.append((f"{stem}.{suffix}" if suffix else stem, shape, kind))

    def ends(self, *, tied: bool = False) -> None:
        """Add the input and output tensors."""
        if tied:  # llama-quant.cpp gives token_embd the type of the output it stands in for
            self.mix = replace(self.mix, embd=self.mix.embd or self.mix.output)
        self.matrix("token_embd", self.n_embd, self.n_vocab)
        self.vector("output_norm", self.n_embd)
        if not tied:
            self.matrix("output", self.n_embd, self.n_vocab)

    def metadata(self) -> dict[str, object]:
        """All metadata, the vocabulary last."""
        general = {
            "general.architecture": self.arch,
            "general.name": self.name,
            "general.file_type": self.file_type,
            f"{self.arch}.block_count": self.n_layer,
            f"{self.arch}.context_length": self.n_ctx_train,
            f"{self.arch}.embedding_length": self.n_embd,
        }
        return general | self.keys | (vocabulary(self.n_vocab) if self.vocabulary else {})

    def header(self) -> GgufHeader:
        """Return the header as labdeploy reads it, without a vocabulary."""
        raw, size = header(replace(self, vocabulary=False).metadata(), self.tensors)
        return read_header(PrefixReader(raw, size))

    def write(self, path: Path, **options: int) -> Path:
        """Write the sparse file."""
        return write(path, self.metadata(), self.tensors, **options)


def vocabulary(n_vocab: int) -> dict[str, object]:
    """Return a byte-fallback vocabulary that llama.cpp loads."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    tokens += [f"tok{number}" for number in range(len(tokens), n_vocab)]
    kinds += [1] * (n_vocab - len(kinds))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens[:n_vocab],
        "tokenizer.ggml.scores": Typed(9, [0.0] * n_vocab, 6),
        "tokenizer.ggml.token_type": Typed(9, kinds[:n_vocab], 5),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def with_vocabulary(model: Model, n_vocab: int) -> Model:
    """Return the same model with another vocabulary."""
    tensors = [
        (name, (shape[0], n_vocab) if name in ("token_embd.weight", "output.weight") else shape, kind)
        for name, shape, kind in model.tensors
    ]
    return replace(model, n_vocab=n_vocab, tensors=tensors)


def n_expert(model: Model) -> int:
    """Return how many experts a layer of it has."""
    return int(str(model.keys.get(f"{model.arch}.expert_count", 0)))


def with_experts(model: Model, n: int) -> Model:
    """Return the same model with so many experts in a layer."""
    before = n_expert(model)

    def cut(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        counts = "exp" in name.replace("shexp", "") or "ffn_gate_inp." in name
        return (*shape[:-1], n) if counts and shape[-1] == before else shape

    tensors = [(name, cut(name, shape), kind) for name, shape, kind in model.tensors]
    return replace(model, tensors=tensors, keys=model.keys | {f"{model.arch}.expert_count": n})


def largest_experts_bytes(model: Model) -> int:
    """Bytes of the largest stack of experts."""
    return max((tensor_bytes(shape, kind) for name, shape, kind in model.tensors if "_exps." in name), default=0)


# -- layers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer."""

    n_head: int
    n_head_kv: int
    size: int


def attention(model: Model, il: int, heads: Heads, *, qk_norm: bool = False, bias: bool = False) -> None:
    """Add grouped-query attention."""
    q, kv = heads.n_head * heads.size, heads.n_head_kv * heads.size
    model.vector("attn_norm", model.n_embd, il=il)
    for part, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
        model.matrix(part, model.n_embd, n, il=il)
        if bias:
            model.vector(part, n, il=il, suffix="bias")
    model.matrix("attn_output", q, model.n_embd, il=il)
    if qk_norm:
        model.vector("attn_q_norm", heads.size, il=il)
        model.vector("attn_k_norm", heads.size, il=il)


def swiglu(model: Model, il: int, n_ff: int, *, norm: str = "ffn_norm") -> None:
    """Add a dense feed-forward network."""
    if norm:
        model.vector(norm, model.n_embd, il=il)
    model.matrix("ffn_gate", model.n_embd, n_ff, il=il)
    model.matrix("ffn_up", model.n_embd, n_ff, il=il)
    model.matrix("ffn_down", n_ff, model.n_embd, il=il)


def experts(model: Model, il: int, n_expert: int, n_ff: int, *, norm: str = "ffn_norm") -> None:
    """Add a mixture of experts."""
    if norm:
        model.vector(norm, model.n_embd, il=il)
    model.vector("ffn_gate_inp", model.n_embd, n_expert, il=il)
    model.matrix("ffn_gate_exps", model.n_embd, n_ff, n_expert, il=il)
    model.matrix("ffn_up_exps", model.n_embd, n_ff, n_expert, il=il)
    model.matrix("ffn_down_exps", n_ff, model.n_embd, n_expert, il=il)


def shared_expert(model: Model, il: int, n_ff: int, *, gate: bool = False) -> None:
    """Add the expert that every token uses."""
    if gate:
        model.vector("ffn_gate_inp_shexp", model.n_embd, il=il)
    model.matrix("ffn_gate_shexp", model.n_embd, n_ff, il=il)
    model.matrix("ffn_up_shexp", model.n_embd, n_ff, il=il)
    model.matrix("ffn_down_shexp", n_ff, model.n_embd, il=il)


def attention_keys(model: Model, heads: Heads, n_ff: int | list[int]) -> None:
    """Set the metadata of attention and feed-forward."""
    model.key(
        feed_forward_length=n_ff,
        attention__head_count=heads.n_head,
        attention__head_count_kv=heads.n_head_kv,
        attention__key_length=heads.size,
        attention__value_length=heads.size,
        attention__layer_norm_rms_epsilon=1e-5,
        rope__dimension_count=heads.size,
        rope__freq_base=500000.0,
    )


# -- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Shape of a plain dense transformer."""

    arch: str
    n_embd: int
    n_vocab: int
    n_layer: int
    heads: Heads
    n_ff: int
    tied: bool = False
    qk_norm: bool = False
    bias: bool = False


def dense(shape: Dense, mix: Mix = Q4_K) -> Model:
    """Build a llama, qwen2 or qwen3."""
    model = Model(shape.arch, shape.n_embd, shape.n_vocab, shape.n_layer, mix)
    attention_keys(model, shape.heads, shape.n_ff)
    model.ends(tied=shape.tied)
    for il in range(shape.n_layer):
        attention(model, il, shape.heads, qk_norm=shape.qk_norm, bias=shape.bias)
        swiglu(model, il, shape.n_ff)
    return model


def gemma(shape: Dense, n_swa: int, mix: Mix = Q4_K) -> Model:
    """Build a gemma2 or gemma3."""
    model = Model(shape.arch, shape.n_embd, shape.n_vocab, shape.n_layer, mix)
    attention_keys(model, shape.heads, shape.n_ff)
    model.key(attention__sliding_window=n_swa)
    model.ends(tied=True)
    for il in range(shape.n_layer):
        attention(model, il, shape.heads, qk_norm=shape.arch == "gemma3")
        model.vector("post_attention_norm", shape.n_embd, il=il)
        swiglu(model, il, shape.n_ff)
        model.vector("post_ffw_norm", shape.n_embd, il=il)
    return model


def qwen3moe(shape: Dense, n_expert: int, n_expert_used: int, n_ff_exp: int, mix: Mix = Q4_K) -> Model:
    """Build a qwen3moe."""
    model = Model("qwen3moe", shape.n_embd, shape.n_vocab, shape.n_layer, mix)
    attention_keys(model, shape.heads, shape.n_ff)
    model.key(expert_count=n_expert, expert_used_count=n_expert_used, expert_feed_forward_length=n_ff_exp)
    model.ends()
    for il in range(shape.n_layer):
        attention(model, il, shape.heads, qk_norm=True)
        experts(model, il, n_expert, n_ff_exp)
    return model


def gpt_oss(n_layer: int, n_expert: int, mix: Mix) -> Model:
    """Build a gpt-oss."""
    heads, n_embd, n_ff = Heads(64, 8, 64), 2880, 2880
    model = Model("gpt-oss", n_embd, 201088, n_layer, mix, file_type=38)
    attention_keys(model, heads, n_ff)
    model.key(expert_count=n_expert, expert_used_count=4, expert_feed_forward_length=n_ff)
    model.key(attention__sliding_window=128)
    model.ends()
    for il in range(n_layer):
        attention(model, il, heads, bias=True)
        model.vector("attn_output", n_embd, il=il, suffix="bias")
        model.vector("attn_sinks", heads.n_head, il=il)
        experts(model, il, n_expert, n_ff, norm="post_attention_norm")
        model.vector("ffn_gate_inp", n_expert, il=il, suffix="bias")
        for part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            model.vector(part, n_ff, n_expert, il=il, suffix="bias")
    return model


@dataclass(frozen=True)
class Latent:
    """Shape of a DeepSeek with multi-head latent attention; head sizes and kv_lora are the same in all of them."""

    n_embd: int
    n_vocab: int
    n_layer: int
    n_head: int
    q_lora: int
    n_ff: int
    n_dense: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_shared: int


KV_LORA, ROPE, NOPE, VALUE = 512, 64, 128, 128


def latent(shape: Latent, mix: Mix = Q4_K) -> Model:
    """Build a deepseek2."""
    model = Model("deepseek2", shape.n_embd, shape.n_vocab, shape.n_layer, mix)
    attention_keys(model, Heads(shape.n_head, 1, KV_LORA + ROPE), shape.n_ff)
    model.key(
        attention__value_length=KV_LORA,
        attention__key_length_mla=NOPE + ROPE,
        attention__value_length_mla=VALUE,
        attention__kv_lora_rank=KV_LORA,
        rope__dimension_count=ROPE,
        expert_count=shape.n_expert,
        expert_used_count=shape.n_expert_used,
        expert_feed_forward_length=shape.n_ff_exp,
        expert_shared_count=shape.n_shared,
        expert_weights_scale=2.5,
        expert_gating_func=2,
        leading_dense_block_count=shape.n_dense,
    )
    if shape.q_lora:
        model.key(attention__q_lora_rank=shape.q_lora)
    model.ends()
    for il in range(shape.n_layer):
        latent_attention(model, il, shape)
        if il < shape.n_dense:
            swiglu(model, il, shape.n_ff)
        else:
            experts(model, il, shape.n_expert, shape.n_ff_exp)
            model.vector("exp_probs_b", shape.n_expert, il=il, suffix="bias")
            shared_expert(model, il, shape.n_shared * shape.n_ff_exp)
    return model


def latent_attention(model: Model, il: int, shape: Latent) -> None:
    """Add multi-head latent attention."""
    model.vector("attn_norm", shape.n_embd, il=il)
    model.vector("attn_kv_a_norm", KV_LORA, il=il)
    if shape.q_lora:
        model.vector("attn_q_a_norm", shape.q_lora, il=il)
        model.matrix("attn_q_a", shape.n_embd, shape.q_lora, il=il)
        model.matrix("attn_q_b", shape.q_lora, shape.n_head * (NOPE + ROPE), il=il)
    else:
        model.matrix("attn_q", shape.n_embd, shape.n_head * (NOPE + ROPE), il=il)
    model.matrix("attn_kv_a_mqa", shape.n_embd, KV_LORA + ROPE, il=il)
    model.matrix("attn_k_b", NOPE, KV_LORA, shape.n_head, il=il)
    model.matrix("attn_v_b", KV_LORA, VALUE, shape.n_head, il=il)
    model.matrix("attn_output", shape.n_head * VALUE, shape.n_embd, il=il)


def qwen3next(mix: Mix = Q4_K, n_layer: int = 48) -> Model:
    """Build a Qwen3-Next-80B-A3B: three gated delta nets to each attention layer."""
    n_embd, heads = 2048, Heads(16, 2, 256)
    d_inner, d_state, n_group, n_v = 4096, 128, 16, 32
    model = Model("qwen3next", n_embd, 151936, n_layer, mix)
    attention_keys(model, heads, 5120)
    model.key(expert_count=512, expert_used_count=10, expert_feed_forward_length=512)
    model.key(expert_shared_feed_forward_length=512)
    model.key(ssm__conv_kernel=4, ssm__inner_size=d_inner, ssm__state_size=d_state)
    model.key(ssm__time_step_rank=n_v, ssm__group_count=n_group)
    model.ends()
    for il in range(n_layer):
        model.vector("attn_norm", n_embd, il=il)
        model.vector("post_attention_norm", n_embd, il=il)
        if (il + 1) % 4:
            conv = d_inner + 2 * n_group * d_state
            model.matrix("attn_qkv", n_embd, conv, il=il)
            model.matrix("attn_gate", n_embd, d_inner, il=il)
            model.vector("ssm_conv1d", 4, conv, il=il)
            model.vector("ssm_dt", n_v, il=il, suffix="bias")
            model.vector("ssm_a", n_v, il=il, suffix="")
            model.matrix("ssm_ba", n_embd, 2 * n_v, il=il)
            model.vector("ssm_norm", d_inner // n_v, il=il)
            model.matrix("ssm_out", d_inner, n_embd, il=il)
        else:
            q, kv = heads.n_head * heads.size, heads.n_head_kv * heads.size
            model.matrix("attn_q", n_embd, 2 * q, il=il)
            model.matrix("attn_k", n_embd, kv, il=il)
            model.matrix("attn_v", n_embd, kv, il=il)
            model.matrix("attn_output", q, n_embd, il=il)
            model.vector("attn_q_norm", heads.size, il=il)
            model.vector("attn_k_norm", heads.size, il=il)
        experts(model, il, 512, 512, norm="")
        shared_expert(model, il, 512, gate=True)
    return model


def mamba2(mix: Mix = Q8_0, n_layer: int = 64) -> Model:
    """Build a Mamba2-7B (Codestral-Mamba)."""
    n_embd, d_inner, d_state, n_group, n_head, d_conv = 4096, 8192, 128, 8, 128, 4
    model = Model("mamba2", n_embd, 32768, n_layer, mix)
    model.key(attention__head_count=0, feed_forward_length=0, attention__layer_norm_rms_epsilon=1e-5)
    model.key(ssm__conv_kernel=d_conv, ssm__inner_size=d_inner, ssm__state_size=d_state)
    model.key(ssm__time_step_rank=n_head, ssm__group_count=n_group)
    model.ends()
    for il in range(n_layer):
        model.vector("attn_norm", n_embd, il=il)
        mamba2_mixer(model, il, d_inner, d_state, n_group, n_head, d_conv)
    return model


def mamba2_mixer(model: Model, il: int, d_inner: int, d_state: int, n_group: int, n_head: int, d_conv: int) -> None:
    """Add one Mamba2 state-space mixer."""
    conv = d_inner + 2 * n_group * d_state
    model.matrix("ssm_in", model.n_embd, 2 * d_inner + 2 * n_group * d_state + n_head, il=il)
    model.vector("ssm_conv1d", d_conv, conv, il=il)
    model.vector("ssm_conv1d", conv, il=il, suffix="bias")
    model.vector("ssm_dt", n_head, il=il, suffix="bias")
    model.vector("ssm_a", 1, n_head, il=il, suffix="")
    model.vector("ssm_d", 1, n_head, il=il, suffix="")
    model.vector("ssm_norm", d_inner // n_group, n_group, il=il)
    model.matrix("ssm_out", d_inner, model.n_embd, il=il)


def lfm2(mix: Mix = Q8_0) -> Model:
    """Build a LFM2-1.2B: short convolutions, attention in 6 of 16 layers."""
    n_embd, heads, n_ff = 2048, Heads(32, 8, 64), 8192
    attention_layers = (2, 5, 8, 10, 12, 14)
    model = Model("lfm2", n_embd, 65536, 16, mix)
    attention_keys(model, heads, n_ff)
    model.key(
        attention__head_count_kv=[8 if il in attention_layers else 0 for il in range(16)],
        shortconv__l_cache=3,
    )
    model.matrix("token_embd", n_embd, 65536)
    model.vector("token_embd_norm", n_embd)
    for il in range(16):
        if il in attention_layers:
            attention(model, il, heads, qk_norm=True)
        else:
            model.vector("attn_norm", n_embd, il=il)
            model.vector("shortconv.conv", 3, n_embd, il=il)
            model.matrix("shortconv.in_proj", n_embd, 3 * n_embd, il=il)
            model.matrix("shortconv.out_proj", n_embd, n_embd, il=il)
        swiglu(model, il, n_ff)
    return model


def granite_hybrid(mix: Mix = Q4_K) -> Model:
    """Build a Granite-4.0-H-Tiny: Mamba2 layers, attention in 4 of 40, 64 experts and a shared one."""
    n_embd, heads, n_layer = 1536, Heads(12, 4, 128), 40
    attention_layers = (5, 15, 25, 35)
    model = Model("granitehybrid", n_embd, 100352, n_layer, mix)
    attention_keys(model, heads, 512)
    model.key(attention__head_count_kv=[4 if il in attention_layers else 0 for il in range(n_layer)])
    model.key(expert_count=64, expert_used_count=6, expert_feed_forward_length=512)
    model.key(expert_shared_feed_forward_length=1024)
    model.key(ssm__conv_kernel=4, ssm__inner_size=3072, ssm__state_size=128)
    model.key(ssm__time_step_rank=48, ssm__group_count=1)
    model.ends(tied=True)
    for il in range(n_layer):
        if il in attention_layers:
            attention(model, il, heads)
        else:
            model.vector("attn_norm", n_embd, il=il)
            mamba2_mixer(model, il, 3072, 128, 1, 48, 4)
        experts(model, il, 64, 512)
        shared_expert(model, il, 1024)
    return model


def falcon_h1(mix: Mix = Q4_K) -> Model:
    """Build a Falcon-H1-1.5B: attention and Mamba2 side by side in every layer."""
    n_embd, heads, n_layer, n_ff = 2048, Heads(8, 2, 128), 24, 4096
    model = Model("falcon-h1", n_embd, 65537, n_layer, mix)
    attention_keys(model, heads, n_ff)
    model.key(ssm__conv_kernel=4, ssm__inner_size=3072, ssm__state_size=256)
    model.key(ssm__time_step_rank=48, ssm__group_count=1)
    model.ends()
    for il in range(n_layer):
        attention(model, il, heads)
        mamba2_mixer(model, il, 3072, 256, 1, 48, 4)
        swiglu(model, il, n_ff, norm="")
        model.vector("ffn_norm", n_embd, il=il, suffix="")
    return model


def nemotron_h(mix: Mix = Q4_K) -> Model:
    """Build a Nemotron-H-8B: each layer is a Mamba2, an attention or a feed-forward one."""
    n_embd, heads, n_ff = 4096, Heads(32, 8, 128), 21504
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    model = Model("nemotron_h", n_embd, 131072, len(pattern), mix)
    attention_keys(model, heads, [n_ff if kind == "-" else 0 for kind in pattern])
    model.key(attention__head_count_kv=[8 if kind == "*" else 0 for kind in pattern])
    model.key(attention__layer_norm_epsilon=1e-5)
    model.key(ssm__conv_kernel=4, ssm__inner_size=8192, ssm__state_size=128)
    model.key(ssm__time_step_rank=128, ssm__group_count=8)
    model.ends()
    for il, kind in enumerate(pattern):
        if kind == "*":
            attention(model, il, heads)
            continue
        model.vector("attn_norm", n_embd, il=il)
        if kind == "M":
            mamba2_mixer(model, il, 8192, 128, 8, 128, 4)
        else:
            model.matrix("ffn_up", n_embd, n_ff, il=il)
            model.matrix("ffn_down", n_ff, n_embd, il=il)
    return model


def glm4moe(mix: Mix = Q4_K, n_layer: int = 47) -> Model:
    """Build a GLM-4.5-Air: 46 layers and one that only drafts."""
    n_embd, heads = 4096, Heads(96, 8, 128)
    model = Model("glm4moe", n_embd, 151552, n_layer, mix)
    attention_keys(model, heads, 10944)
    model.key(expert_count=128, expert_used_count=8, expert_feed_forward_length=1408, expert_shared_count=1)
    model.key(leading_dense_block_count=1, nextn_predict_layers=1, rope__dimension_count=64)
    model.key(expert_weights_scale=1.0, expert_weights_norm=True)
    model.ends()
    for il in range(n_layer):
        attention(model, il, heads, bias=True)
        model.vector("post_attention_norm", n_embd, il=il)
        if il == 0:
            swiglu(model, il, 10944, norm="")
        else:
            experts(model, il, 128, 1408, norm="")
            model.vector("exp_probs_b", 128, il=il, suffix="bias")
            shared_expert(model, il, 1408)
    draft_tensors(model, n_layer - 1)
    return model


def draft_tensors(model: Model, il: int) -> None:
    """Add what a multi-token-prediction layer has on top."""
    model.matrix("nextn.eh_proj", 2 * model.n_embd, model.n_embd, il=il)
    for part in ("enorm", "hnorm", "shared_head_norm"):
        model.vector(f"nextn.{part}", model.n_embd, il=il)


def phi3(mix: Mix = Q4_K) -> Model:
    """Build a Phi-3-mini-4k: a window in the file that llama.cpp ignores."""
    n_embd, heads, n_ff, n_layer = 3072, Heads(32, 32, 96), 8192, 32
    model = Model("phi3", n_embd, 32064, n_layer, mix, n_ctx_train=4096)
    attention_keys(model, heads, n_ff)
    model.key(attention__sliding_window=2047)
    model.ends()
    for il in range(n_layer):
        model.vector("attn_norm", n_embd, il=il)
        model.matrix("attn_qkv", n_embd, 3 * n_embd, il=il)
        model.matrix("attn_output", n_embd, n_embd, il=il)
        model.vector("ffn_norm", n_embd, il=il)
        model.matrix("ffn_up", n_embd, 2 * n_ff, il=il)
        model.matrix("ffn_down", n_ff, n_embd, il=il)
    return model


LLAMA_1B = Dense("llama", 2048, 128256, 16, Heads(32, 8, 64), 8192, tied=True)
LLAMA_3B = Dense("llama", 3072, 128256, 28, Heads(24, 8, 128), 8192, tied=True)
LLAMA_8B = Dense("llama", 4096, 128256, 32, Heads(32, 8, 128), 14336)
LLAMA_70B = Dense("llama", 8192, 128256, 80, Heads(64, 8, 128), 28672)
MINISTRAL_3_8B = Dense("mistral3", 4096, 131072, 34, Heads(32, 8, 128), 14336)
MISTRAL_7B = Dense("llama", 4096, 32768, 32, Heads(32, 8, 128), 14336)
QWEN25_7B = Dense("qwen2", 3584, 152064, 28, Heads(28, 4, 128), 18944, bias=True)
QWEN3_06B = Dense("qwen3", 1024, 151936, 28, Heads(16, 8, 128), 3072, tied=True, qk_norm=True)
QWEN3_4B = Dense("qwen3", 2560, 151936, 36, Heads(32, 8, 128), 9728, tied=True, qk_norm=True)
QWEN3_8B = Dense("qwen3", 4096, 151936, 36, Heads(32, 8, 128), 12288, qk_norm=True)
QWEN3_14B = Dense("qwen3", 5120, 151936, 40, Heads(40, 8, 128), 17408, qk_norm=True)
QWEN3_30B = Dense("qwen3moe", 2048, 151936, 48, Heads(32, 4, 128), 6144, qk_norm=True)
GEMMA2_2B = Dense("gemma2", 2304, 256000, 26, Heads(8, 4, 256), 9216)
GEMMA3_12B = Dense("gemma3", 3840, 262208, 48, Heads(16, 8, 256), 15360)
GEMMA3_27B = Dense("gemma3", 5376, 262208, 62, Heads(32, 16, 128), 21504)

DEEPSEEK_V3 = Latent(7168, 129280, 61, 128, 1536, 18432, 3, 256, 8, 2048, 1)
DEEPSEEK_V2_LITE = Latent(2048, 102400, 27, 16, 0, 10944, 1, 64, 6, 1408, 2)

MODELS: dict[str, Callable[[], Model]] = {
    "llama-3.2-1b": lambda: dense(LLAMA_1B),
    "llama-3.2-3b": lambda: dense(LLAMA_3B),
    "llama-3.1-8b": lambda: dense(LLAMA_8B),
    "llama-3-70b": lambda: dense(LLAMA_70B),
    "ministral-3-8b": lambda: dense(MINISTRAL_3_8B),
    "mistral-7b": lambda: dense(MISTRAL_7B),
    "qwen2.5-7b": lambda: dense(QWEN25_7B),
    "qwen3-0.6b": lambda: dense(QWEN3_06B, Q8_0),
    "qwen3-4b": lambda: dense(QWEN3_4B),
    "qwen3-8b": lambda: dense(QWEN3_8B),
    "qwen3-14b": lambda: dense(QWEN3_14B),
    "qwen3-30b-a3b": lambda: qwen3moe(QWEN3_30B, 128, 8, 768),
    "gemma2-2b": lambda: gemma(GEMMA2_2B, 4096),
    "gemma3-12b": lambda: gemma(GEMMA3_12B, 1024),
    "gemma3-27b": lambda: gemma(GEMMA3_27B, 1024),
    "gpt-oss-20b": lambda: gpt_oss(24, 32, Mix(base="Q8_0", output="Q8_0", experts="MXFP4")),
    "deepseek-v3": lambda: latent(DEEPSEEK_V3),
    "deepseek-v2-lite": lambda: latent(DEEPSEEK_V2_LITE),
    "qwen3-next-80b": qwen3next,
    "mamba2-7b": mamba2,
    "lfm2-1.2b": lfm2,
    "granite-4-h-tiny": granite_hybrid,
    "falcon-h1-1.5b": falcon_h1,
    "nemotron-h-8b": nemotron_h,
    "glm-4.5-air": glm4moe,
    "phi3-mini": phi3,
    "llama-3.1-8b-q4_k_m": lambda: dense(LLAMA_8B, Q4_K_M),
    "qwen3-8b-q4_k_m": lambda: dense(QWEN3_8B, Q4_K_M),
}
