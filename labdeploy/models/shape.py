"""One description of a model that every planner reads: `ModelShape`, made from a GGUF header.

What llama.cpp keeps in its code and not in the file (which layers slide, which are recurrent) is one table
here, `ARCH_RULES`. An architecture in neither that table nor `PLAIN_ARCHS` gets the general formula and
`known_arch = False`, so that a plan can say that it is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from labdeploy.errors import ModelError
from labdeploy.models.gguf import VOCABULARY_KEY, split_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from labdeploy.models.gguf import GgufHeader, Tensor

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS, llama.cpp src/llama-hparams.h
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS, there
MAX_SIZE = 2**31 - 1

WeightClass = Literal["input", "output", "experts", "ffn", "attn"]
RecurrentRule = Literal["none", "all", "both", "no_kv_heads", "no_kv_heads_no_ff", "interval"]


@dataclass(frozen=True)
class ArchRule:
    """What an architecture fixes in llama.cpp's code (src/models/*.cpp, load_arch_hparams, 0.5.0)."""

    swa_period: int | None = None  # every n-th layer is full attention; None: only an array in the file says
    swa_dense_first: bool = False  # the full layer comes first in its period, not last
    n_swa: int = 0  # the window when the file does not say
    n_swa_fixed: int = 0  # the window, whatever number the file says
    swa: bool = True  # False: a window in the file is ignored
    swa_min_layers: int = 0  # only models of this many layers slide
    recurrent: RecurrentRule = "none"
    full_attention_interval: int = 4
    linear_attention: bool = False  # the state is head_dim^2 x n_head, without a convolution
    n_layer_kv: int | None = None  # only this many layers, from the first, keep a KV cache
    kv: bool = True  # False: encoder or diffusion model without a cache
    token_shift_count: int = 2


ARCH_RULES: Mapping[str, ArchRule] = {
    "afmoe": ArchRule(swa_period=4),
    "cohere2": ArchRule(swa_period=4),
    "cohere2moe": ArchRule(swa_period=4, swa_dense_first=True),
    "exaone-moe": ArchRule(swa_period=4, n_swa=128),
    "exaone4": ArchRule(swa_period=4, n_swa=4096, swa_min_layers=64),
    "gemma2": ArchRule(swa_period=2, n_swa=4096),
    "gemma3": ArchRule(swa_period=6),
    "gemma3n": ArchRule(swa_period=5, n_layer_kv=20),
    "gemma4": ArchRule(),
    "gpt-oss": ArchRule(swa_period=2),
    "granite_swa": ArchRule(),
    "laguna": ArchRule(swa_period=4, swa_dense_first=True),
    "llama4": ArchRule(swa_period=4, n_swa=8192, n_swa_fixed=8192),
    "mellum": ArchRule(swa_period=4),
    "mimo2": ArchRule(),
    "muse-glimmer": ArchRule(swa_period=4),
    "olmo2": ArchRule(swa_period=4),
    "plamo3": ArchRule(swa_period=8),
    "smallthinker": ArchRule(swa_period=4, swa_dense_first=True, n_swa_fixed=4096),
    "spark2_5": ArchRule(),
    "step35": ArchRule(),
    "phi3": ArchRule(swa=False),
    "phimoe": ArchRule(swa=False),
    "bailingmoe3": ArchRule(recurrent="no_kv_heads"),
    "falcon-h1": ArchRule(recurrent="both"),
    "granitehybrid": ArchRule(recurrent="no_kv_heads"),
    "jamba": ArchRule(recurrent="no_kv_heads"),
    "kimi-linear": ArchRule(recurrent="no_kv_heads"),
    "lfm2": ArchRule(recurrent="no_kv_heads", swa_period=0),
    "lfm2moe": ArchRule(recurrent="no_kv_heads", swa_period=0),
    "mamba": ArchRule(recurrent="all"),
    "mamba2": ArchRule(recurrent="all"),
    "minimax-01": ArchRule(recurrent="interval", full_attention_interval=8, linear_attention=True),
    "nemotron_h": ArchRule(recurrent="no_kv_heads_no_ff"),
    "nemotron_h_moe": ArchRule(recurrent="no_kv_heads_no_ff"),
    "plamo2": ArchRule(recurrent="no_kv_heads"),
    "qwen35": ArchRule(recurrent="interval"),
    "qwen35moe": ArchRule(recurrent="interval"),
    "qwen3next": ArchRule(recurrent="interval"),
    "arwkv7": ArchRule(recurrent="all"),
    "rwkv6": ArchRule(recurrent="all"),
    "rwkv6qwen2": ArchRule(recurrent="all"),
    "rwkv7": ArchRule(recurrent="all"),
    "bert": ArchRule(kv=False),
    "dream": ArchRule(kv=False),
    "eurobert": ArchRule(kv=False),
    "gemma-embedding": ArchRule(kv=False),
    "jina-bert-v2": ArchRule(kv=False),
    "jina-bert-v3": ArchRule(kv=False),
    "llada": ArchRule(kv=False),
    "llada-moe": ArchRule(kv=False),
    "modern-bert": ArchRule(kv=False),
    "neo-bert": ArchRule(kv=False),
    "nomic-bert": ArchRule(kv=False),
    "nomic-bert-moe": ArchRule(kv=False),
    "rnd1": ArchRule(kv=False),
}

# Architectures that the general rule describes in full: attention in every layer, nothing slides.
_PLAIN = """
    apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chameleon chatglm codeshell cogvlm
    command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 dots1 ernie4_5 ernie4_5-moe exaone falcon
    gemma glm-dsa glm4 glm4moe gpt2 gptj gptneox granite granitemoe grok grovemoe hunyuan-dense hunyuan-moe
    hunyuan_vl hy_v3 internlm2 jais jais2 llama llama-embed maincoder minicpm minicpm3 minimax-m2 mistral3
    mistral4 mpt nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 plamo plm qwen qwen2 qwen2moe
    qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm starcoder starcoder2 talkie
    xverse
"""
PLAIN_ARCHS = frozenset(_PLAIN.split())

# Positions are learnt, or in a bias, or left to the mixers (src/models/*.cpp).
WITHOUT_ROPE = frozenset(
    ("bloom", "gpt2", "jais", "jamba", "mpt", "nemotron_h", "nemotron_h_moe", "refact", "starcoder")
)

# llama.cpp include/llama.h, enum llama_ftype
FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
}

INPUT_STEMS = frozenset(("token_embd", "position_embd", "token_types", "per_layer_token_embd"))
OUTPUT_STEMS = frozenset(("cls", "dense_2", "dense_3", "altup_proj", "altup_unembd_proj", "fc", "d2t", "dec", "enc"))
EXPERT_PARTS = ("ffn_up_exps", "ffn_down_exps", "ffn_gate_exps", "ffn_gate_up_exps")
EXPERT_PARTS_CHUNKED = ("ffn_up_chexps", "ffn_down_chexps", "ffn_gate_chexps", "ffn_gate_up_chexps")


def weight_class(name: str) -> WeightClass:
    """Say which part of the model a tensor belongs to (llm_tensor_info_for, llama.cpp src/llama-arch.cpp).

    Experts are what --cpu-moe moves: names matching `ffn_(up|down|gate|gate_up)_(ch|)exps` (common/common.h).
    Tensors outside the layers that are neither input nor output go with the first layer, as attn.
    """
    layer = split_layer(name)
    if layer is None:
        return _outer_class(name.partition(".")[0])
    part = layer[2][1:].partition(".")[0]
    if part in EXPERT_PARTS or part in EXPERT_PARTS_CHUNKED:
        return "experts"
    return "ffn" if part.startswith("ffn_") else "attn"


def _outer_class(stem: str) -> WeightClass:
    if stem in INPUT_STEMS:
        return "input"
    return "output" if stem in OUTPUT_STEMS or stem.startswith("output") else "attn"


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors together."""
    return sum(tensor.n_bytes for tensor in tensors)


@dataclass(frozen=True, eq=False)
class LayerShape:
    """One layer: what it holds, and what it keeps for each token or sequence.

    `n_k` and `n_v` are the elements that one token adds to the K and V cache (heads x head size, 0 without a
    cache; n_v is 0 under MLA); `n_r` and `n_s` are the f32 elements of recurrent state of one sequence;
    `n_indexer` the elements of a sparse attention's key index. A layer with `is_mtp` is only loaded for drafting.
    """

    index: int
    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    n_ff: int
    n_expert_used: int
    n_k: int
    n_v: int
    n_r: int
    n_s: int
    n_indexer: int
    is_swa: bool
    is_mtp: bool
    tensors: tuple[Tensor, ...]

    @property
    def is_recurrent(self) -> bool:
        """The layer keeps a state of fixed size."""
        return self.n_r + self.n_s > 0

    @property
    def has_kv(self) -> bool:
        """The layer keeps something for every token."""
        return self.n_k + self.n_v > 0

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all weights of the layer."""
        return total_bytes(self.tensors)

    @cached_property
    def experts_bytes(self) -> int:
        """Bytes of the weights that --cpu-moe moves to the CPU."""
        return total_bytes(self.experts)

    @cached_property
    def experts(self) -> tuple[Tensor, ...]:
        """The tensors that --cpu-moe moves to the CPU."""
        return tuple(tensor for tensor in self.tensors if weight_class(tensor.name) == "experts")

    @cached_property
    def _by_name(self) -> Mapping[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def tensor(self, part: str, suffix: str = "weight") -> Tensor | None:
        """Return `blk.N.PART.SUFFIX`, or None where the layer has none."""
        return self._by_name.get(f"blk.{self.index}.{part}.{suffix}" if suffix else f"blk.{self.index}.{part}")

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """What its graph depends on: two layers of one kind take the same room."""
        prefix = f"blk.{self.index}."
        parts = tuple((tensor.name.removeprefix(prefix), tensor.shape) for tensor in self.tensors)
        caches = (self.n_head, self.n_head_kv, self.head_k, self.head_v, self.n_k, self.n_v, self.n_r, self.n_s)
        return (parts, caches, self.n_ff, self.n_expert_used, self.is_swa)

    @cached_property
    def has_feed_forward(self) -> bool:
        """It has a feed-forward network, dense or of experts."""
        return any(tensor.name.startswith(f"blk.{self.index}.ffn_down") for tensor in self.tensors)

    @cached_property
    def feed_forward_norm(self) -> str:
        """The norm before the feed-forward network: some architectures call it post_attention_norm."""
        if self.tensor("ffn_norm") or self.tensor("ffn_norm", ""):
            return "ffn_norm"
        return "post_attention_norm" if self.tensor("post_attention_norm") and not self.has_post_norm else ""

    @cached_property
    def has_post_norm(self) -> bool:
        """Attention is normalised before it is added to the residual stream."""
        another = self.tensor("ffn_norm") or self.tensor("post_ffw_norm")
        return bool(self.tensor("post_attention_norm") and another)

    def columns(self, part: str) -> int:
        """Columns of the matrix `blk.N.PART.weight`: the width of what it takes in; 0 where there is none."""
        tensor = self.tensor(part)
        return tensor.shape[0] if tensor else 0

    def rows(self, part: str) -> int:
        """Rows of the matrix `blk.N.PART.weight`: the width of what it puts out; 0 where there is none."""
        tensor = self.tensor(part)
        return tensor.shape[1] if tensor and tensor.shape[1:] else 0


@dataclass(frozen=True, eq=False)
class ModelShape:
    """All that a planner needs to know of a model. One shape equals itself alone, so that results can be kept by it."""

    arch: str
    name: str
    known_arch: bool
    file_type: str
    size_bytes: int
    n_params: int
    n_layer: int
    n_layer_all: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_ff_shexp: int
    n_swa: int
    n_lora_kv: int
    head_k_mla: int
    head_v_mla: int
    tied_embeddings: bool
    layers: tuple[LayerShape, ...]
    input_tensors: tuple[Tensor, ...]
    output_tensors: tuple[Tensor, ...]

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of the input layer: the token embeddings, always on the CPU."""
        return total_bytes(self.input_tensors)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the output layer where it is offloaded: tied embeddings are there a second time."""
        return total_bytes(self.output_tensors) + (self.tied_bytes if self.tied_embeddings else 0)

    @cached_property
    def tied_bytes(self) -> int:
        """Bytes of the token embeddings."""
        return total_bytes(tensor for tensor in self.input_tensors if tensor.name == "token_embd.weight")

    @cached_property
    def trunk(self) -> tuple[LayerShape, ...]:
        """The layers that run for every token: all but those that only draft."""
        return self.layers[: self.n_layer]

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each layer a number that layers of its kind share."""
        numbers: dict[tuple[object, ...], int] = {}
        return tuple(numbers.setdefault(layer.kind, len(numbers)) for layer in self.layers)

    def cache_layer(self, layer: LayerShape) -> LayerShape:
        """Return the layer whose cache a layer reads: its own, or that of the last one of its kind that has one."""
        kept = (each for each in reversed(self.trunk) if each.has_kv and each.is_swa == layer.is_swa)
        return layer if layer.has_kv else next(kept, layer)

    @property
    def has_rope(self) -> bool:
        """Queries and keys are rotated by their position."""
        return self.arch not in WITHOUT_ROPE

    @property
    def is_mla(self) -> bool:
        """Attention keeps one compressed K of each token and no V (multi-head latent attention)."""
        return self.head_k_mla > 0

    @cached_property
    def has_swa(self) -> bool:
        """Some layers see only a window."""
        return any(layer.is_swa for layer in self.trunk)

    @cached_property
    def is_recurrent(self) -> bool:
        """Some layers keep a state of fixed size."""
        return any(layer.is_recurrent for layer in self.trunk)


def model_shape(header: GgufHeader, where: str = "model") -> ModelShape:
    """Describe the model of a header; `where` names it in errors."""
    keys = _Keys(header, where)
    keys.check_is_model()
    rule = ARCH_RULES.get(header.arch, ArchRule())
    n_layer_all = keys.count("block_count", limit=MAX_LAYERS)
    n_layer = max(n_layer_all - keys.optional("nextn_predict_layers", 0), 0) or n_layer_all
    layers = _LayerReader(keys, rule, n_layer, n_layer_all).layers()
    outer = [tensor for tensor in header.tensors if split_layer(tensor.name) is None]
    n_expert, n_used = keys.optional("expert_count", 0), max(layer.n_expert_used for layer in layers)
    if not n_used <= n_expert <= MAX_EXPERTS:
        raise keys.fail(f"expert_used_count is {n_used}, expert_count {n_expert}; at most {MAX_EXPERTS} can be")
    return ModelShape(
        arch=header.arch,
        name=str(header.metadata.get("general.name", "")),
        known_arch=header.arch in ARCH_RULES or header.arch in PLAIN_ARCHS,
        file_type=file_type_name(header),
        size_bytes=header.size_bytes,
        n_params=sum(tensor.n_elements for tensor in header.tensors),
        n_layer=n_layer,
        n_layer_all=n_layer_all,
        n_ctx_train=keys.count("context_length"),
        n_embd=keys.count("embedding_length"),
        n_vocab=keys.n_vocab(),
        n_expert=n_expert,
        n_expert_used=n_used,
        n_ff_exp=max(_n_ff_exp(layer) for layer in layers),
        n_ff_shexp=max(layer.rows("ffn_up_shexp") for layer in layers),
        n_swa=keys.n_swa(rule) if any(layer.is_swa for layer in layers) else 0,
        n_lora_kv=keys.optional("attention.kv_lora_rank", 0),
        head_k_mla=keys.optional("attention.key_length_mla", 0) if keys.is_mla() else 0,
        head_v_mla=keys.optional("attention.value_length_mla", 0) if keys.is_mla() else 0,
        tied_embeddings=not any(tensor.name == "output.weight" for tensor in outer),
        layers=layers,
        input_tensors=tuple(tensor for tensor in outer if weight_class(tensor.name) == "input"),
        output_tensors=tuple(tensor for tensor in outer if weight_class(tensor.name) == "output"),
    )


def file_type_name(header: GgufHeader) -> str:
    """`Q4_K_M` and the like; for a number nobody knows, the type that holds the most bytes."""
    number = header.metadata.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    by_type: dict[str, int] = {}
    for tensor in header.tensors:
        by_type[tensor.type] = by_type.get(tensor.type, 0) + tensor.n_bytes
    return max(by_type, key=lambda name: by_type[name], default="")


def _n_ff_exp(layer: LayerShape) -> int:
    """Hidden size of one expert, from ffn_up_exps {n_embd, n_ff_exp, n_expert} or its fused kin."""
    return layer.rows("ffn_up_exps") or layer.rows("ffn_gate_up_exps") // 2


@dataclass(frozen=True)
class _Keys:
    """Typed reads of the metadata, each with an error that names the key."""

    header: GgufHeader
    where: str

    def name(self, key: str) -> str:
        return f"{self.header.arch}.{key}"

    def fail(self, what: str, hint: str = "") -> ModelError:
        return ModelError(what, where=self.where, hint=hint)

    def check_is_model(self) -> None:
        if not self.header.arch:
            raise self.fail("general.architecture is missing, so this is not a language model")
        if self.header.arch == "clip" or self.header.metadata.get("general.type") in ("mmproj", "adapter"):
            raise self.fail("is a projector or an adapter, not a language model", "name the file of the model itself")
        if not any(split_layer(tensor.name) for tensor in self.header.tensors):
            raise self.fail("has no layers, so it is not a language model")

    def count(self, key: str, limit: int = MAX_SIZE) -> int:
        value = self.header.metadata.get(self.name(key))
        if not isinstance(value, int) or not 1 <= value <= limit:
            raise self.fail(f"{self.name(key)} must be a number from 1 to {limit}, not {value!r}")
        return value

    def optional(self, key: str, default: int) -> int:
        value = self.header.metadata.get(self.name(key), default)
        if isinstance(value, tuple):
            value = max(value, default=default)
        if not isinstance(value, int | bool) or not 0 <= value <= MAX_SIZE:
            raise self.fail(f"{self.name(key)} must be a number from 0 to {MAX_SIZE}, not {value!r}")
        return int(value)

    def has(self, key: str) -> bool:
        return self.name(key) in self.header.metadata

    def per_layer(self, key: str, n: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """Read a key that is one number for all layers or a list with one for each."""
        value = self.header.metadata.get(self.name(key))
        if not isinstance(value, tuple):
            return (self.optional(key, 0),) * n if self.has(key) else default
        if len(value) < n or not all(isinstance(each, int) and 0 <= each <= MAX_SIZE for each in value):
            raise self.fail(f"{self.name(key)} must hold a number for each of {n} layers, it has {len(value)}")
        return tuple(int(each) for each in value[:n])

    def n_vocab(self) -> int:
        n_tokens = self.header.array_lengths.get(VOCABULARY_KEY, 0) or self.optional("vocab_size", 0)
        embeddings = (t.shape[1] for t in self.header.tensors if t.name == "token_embd.weight" and t.shape[1:])
        return n_tokens or next(embeddings, 0)

    def n_swa(self, rule: ArchRule) -> int:
        n_swa = self.optional("attention.sliding_window", rule.n_swa)
        return rule.n_swa_fixed or n_swa if n_swa else 0

    def is_mla(self) -> bool:
        return self.optional("attention.key_length_mla", 0) > 0 and self.optional("attention.value_length_mla", 0) > 0


@dataclass(frozen=True)
class _LayerReader:
    keys: _Keys
    rule: ArchRule
    n_layer: int
    n_layer_all: int

    def layers(self) -> tuple[LayerShape, ...]:
        tensors = self._tensors_by_layer()
        return tuple(self._layer(il, tuple(tensors[il])) for il in range(self.n_layer_all))

    def _tensors_by_layer(self) -> list[list[Tensor]]:
        """Sort tensors into layers; those outside that are neither input nor output belong to the first."""
        layers: list[list[Tensor]] = [[] for _ in range(self.n_layer_all)]
        for tensor in self.keys.header.tensors:
            split = split_layer(tensor.name)
            if split and split[1] >= self.n_layer_all:
                raise self.keys.fail(f"tensor {tensor.name} is beyond the {self.n_layer_all} layers of the header")
            if split or weight_class(tensor.name) == "attn":
                layers[split[1] if split else 0].append(tensor)
        return layers

    def _layer(self, il: int, tensors: tuple[Tensor, ...]) -> LayerShape:
        recurrent, cached = self._is_recurrent(il), self._has_kv(il)
        n_head_kv, head_k, head_v = (
            self.n_head_kv[il],
            self._head_size("key", il),
            self._head_size("value", il),
        )
        return LayerShape(
            index=il,
            n_head=self.n_head[il],
            n_head_kv=n_head_kv,
            head_k=head_k,
            head_v=head_v,
            n_ff=self.n_ff[il],
            n_expert_used=self.n_expert_used[il],
            n_k=n_head_kv * head_k if cached else 0,
            n_v=n_head_kv * head_v if cached and not self.keys.is_mla() else 0,
            n_r=self._n_r() if recurrent else 0,
            n_s=self._n_s() if recurrent else 0,
            n_indexer=self._n_indexer(il) if cached else 0,
            is_swa=self.is_swa[il],
            is_mtp=il >= self.n_layer,
            tensors=tensors,
        )

    @cached_property
    def n_head(self) -> tuple[int, ...]:
        return self._per_layer("attention.head_count", self._zeros)

    @cached_property
    def n_head_kv(self) -> tuple[int, ...]:
        return self._per_layer("attention.head_count_kv", self.n_head)

    @cached_property
    def n_ff(self) -> tuple[int, ...]:
        return self._per_layer("feed_forward_length", self._zeros)

    @cached_property
    def n_expert_used(self) -> tuple[int, ...]:
        return self._per_layer("expert_used_count", self._zeros)

    @property
    def _zeros(self) -> tuple[int, ...]:
        return (0,) * self.n_layer_all

    def _per_layer(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return self.keys.per_layer(key, self.n_layer_all, default)

    def _head_size(self, which: str, il: int) -> int:
        """Size of one head: the file's, else n_embd / n_head; sliding layers may have their own."""
        n_head = max(self.n_head)
        default = self.keys.count("embedding_length") // n_head if n_head else 0
        full = self.keys.optional(f"attention.{which}_length", default)
        return self.keys.optional(f"attention.{which}_length_swa", full) if self.is_swa[il] else full

    @cached_property
    def is_swa(self) -> tuple[bool, ...]:
        """Which layers see only a window: an array of the file, or a period of the file or the architecture."""
        if not self.rule.swa or not self.keys.n_swa(self.rule) or self.n_layer < self.rule.swa_min_layers:
            return (False,) * self.n_layer_all
        key = "attention.sliding_window_pattern"
        if isinstance(self.keys.header.metadata.get(self.keys.name(key)), tuple):
            return tuple(self._slides(il, bool(value)) for il, value in enumerate(self._per_layer(key, self._zeros)))
        if self.rule.swa_period is None and not self.keys.has(key):
            return (False,) * self.n_layer_all
        period = self.keys.optional(key, self.rule.swa_period or 0)
        return tuple(self._slides(il, self._in_window(il, period)) for il in range(self.n_layer_all))

    def _slides(self, il: int, slides: bool) -> bool:
        return slides and il < self.n_layer and not (self._is_recurrent(il) and self.rule.recurrent == "no_kv_heads")

    def _in_window(self, il: int, period: int) -> bool:
        """llama_hparams::set_swa_pattern: all but the last (or first) layer of each period."""
        if period == 0:
            return True
        return il % period != 0 if self.rule.swa_dense_first else il % period < period - 1

    def _is_recurrent(self, il: int) -> bool:
        if il >= self.n_layer or self.rule.recurrent == "none":
            return False
        if self.rule.recurrent == "interval":
            return self._is_recurrent_by_interval(il)
        no_kv = self.n_head_kv[il] == 0
        return {
            "all": True,
            "both": True,
            "no_kv_heads": no_kv,
            "no_kv_heads_no_ff": no_kv and self.n_ff[il] == 0,
        }[self.rule.recurrent]

    def _is_recurrent_by_interval(self, il: int) -> bool:
        if self.keys.has("attention.recurrent_layers"):
            return bool(self._per_layer("attention.recurrent_layers", self._zeros)[il])
        interval = self.keys.optional("full_attention_interval", self.rule.full_attention_interval)
        return (il + 1) % max(interval, 1) != 0

    def _has_kv(self, il: int) -> bool:
        if not self.rule.kv or il >= min(self.n_layer, self._n_layer_kv()) or self.rule.recurrent == "all":
            return False
        return self.rule.recurrent == "both" or not self._is_recurrent(il)

    def _n_layer_kv(self) -> int:
        """Layers after these reuse the cache of an earlier one (attention.shared_kv_layers)."""
        shared = self.keys.optional("attention.shared_kv_layers", 0)
        return self.n_layer_all - shared if self.rule.n_layer_kv is None else self.rule.n_layer_kv

    def _n_r(self) -> int:
        """Elements of convolution state of one sequence (llama_hparams::n_embd_r)."""
        keys = self.keys
        if keys.optional("wkv.head_size", 0):
            return keys.optional("token_shift_count", self.rule.token_shift_count) * keys.count("embedding_length")
        if keys.optional("shortconv.l_cache", 0):
            return keys.count("embedding_length") * (keys.optional("shortconv.l_cache", 0) - 1)
        n_conv = max(keys.optional("ssm.conv_kernel", 0) - 1, 0)
        if keys.optional("kda.head_dim", 0):
            return 3 * (n_conv or 3) * self.n_head[0] * keys.optional("kda.head_dim", 0)
        groups = 2 * keys.optional("ssm.group_count", 0) * keys.optional("ssm.state_size", 0)
        return n_conv * (keys.optional("ssm.inner_size", 0) + groups)

    def _n_s(self) -> int:
        """Elements of recurrent state of one sequence (llama_hparams::n_embd_s)."""
        keys = self.keys
        if keys.optional("wkv.head_size", 0):
            return keys.count("embedding_length") * keys.optional("wkv.head_size", 0)
        if keys.optional("kda.head_dim", 0):
            return keys.optional("kda.head_dim", 0) ** 2 * self.n_head[0]
        if self.rule.linear_attention:
            return self._head_size("key", 0) ** 2 * self.n_head[0]
        return keys.optional("ssm.state_size", 0) * keys.optional("ssm.inner_size", 0)

    def _n_indexer(self, il: int) -> int:
        """Elements a token adds to the index of a sparse attention (llama-kv-cache-dsa.cpp), 0 without one."""
        key_length = self.keys.optional("attention.indexer.key_length", 0)
        ones = (1,) * self.n_layer
        return key_length * min(self.keys.per_layer("attention.indexer.types", self.n_layer, ones)[il], 1)
