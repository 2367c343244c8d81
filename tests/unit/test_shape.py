"""The description of a model: which layers cache, slide or keep a state, and where its bytes are."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from labdeploy.errors import ModelError
from labdeploy.models.gguf import GgufHeader, PrefixReader, Tensor, from_lock, read_header, to_lock
from labdeploy.models.shape import ARCH_RULES, PLAIN_ARCHS, ModelShape, model_shape, total_bytes, weight_class
from labdeploy.runners.llama_memory import LlamaMemorySettings, memory

sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker as maker

if TYPE_CHECKING:
    from labdeploy.models.gguf import Value


def shape_of(name: str) -> ModelShape:
    """Return the shape of one of the maker's models."""
    return model_shape(maker.MODELS[name]().header())


def bare(arch: str, n_layer: int = 8, **keys: Value) -> ModelShape:
    """Return the shape of a header with nothing but these keys and one tensor in each layer."""
    metadata: dict[str, Value] = {
        "general.architecture": arch,
        f"{arch}.block_count": n_layer,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": 1024,
        f"{arch}.attention.head_count": 8,
        f"{arch}.attention.head_count_kv": 2,
    }
    metadata |= {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}
    tensors = tuple(Tensor(f"blk.{il}.attn_q.weight", (1024, 1024), "F16") for il in range(n_layer))
    return model_shape(GgufHeader(metadata, {}, tensors, 10**9))


def layers_where(shape: ModelShape, name: str) -> list[int]:
    """Return the layers with a property."""
    return [layer.index for layer in shape.layers if getattr(layer, name)]


def test_a_dense_model():
    """The plain figures of a Qwen3-8B are the published ones."""
    shape = shape_of("qwen3-8b")
    assert (shape.arch, shape.n_layer, shape.n_embd, shape.n_vocab) == ("qwen3", 36, 4096, 151936)
    assert (shape.layers[0].n_head, shape.layers[0].n_head_kv, shape.layers[0].head_k) == (32, 8, 128)
    assert {layer.n_k for layer in shape.layers} == {1024}
    assert shape.n_params == 8_190_735_360
    assert shape.file_type == "Q4_K_M"
    assert shape.known_arch
    assert not shape.tied_embeddings
    assert layers_where(shape, "has_kv") == list(range(36))


@pytest.mark.parametrize("name", maker.MODELS)
def test_every_byte_is_somewhere(name: str):
    """Layers, input and output together hold all tensors, so any split of them can be summed exactly."""
    header = maker.MODELS[name]().header()
    shape = model_shape(header)
    parts = sum(layer.weights_bytes for layer in shape.layers) + shape.input_bytes
    assert parts + total_bytes(shape.output_tensors) == sum(tensor.n_bytes for tensor in header.tensors)
    assert all(0 <= layer.experts_bytes < layer.weights_bytes for layer in shape.layers)


@pytest.mark.parametrize("name", maker.MODELS)
def test_the_lock_makes_the_same_shape(name: str):
    """Whatever planners use survives the lock."""
    header = maker.MODELS[name]().header()
    assert dataclasses.asdict(model_shape(from_lock(to_lock(header)))) == dataclasses.asdict(model_shape(header))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "input"),
        ("per_layer_token_embd.weight", "input"),
        ("output.weight", "output"),
        ("output_norm.weight", "output"),
        ("cls.output.weight", "output"),
        ("blk.0.attn_q.weight", "attn"),
        ("blk.0.ssm_in.weight", "attn"),
        ("blk.0.ffn_up.weight", "ffn"),
        ("blk.0.ffn_gate_inp.weight", "ffn"),
        ("blk.0.ffn_up_shexp.weight", "ffn"),
        ("blk.0.ffn_up_exps.weight", "experts"),
        ("blk.0.ffn_gate_up_exps.bias", "experts"),
        ("blk.0.ffn_down_chexps.weight", "experts"),
        ("rope_freqs.weight", "attn"),
    ],
)
def test_weight_classes(name: str, expected: str):
    """Experts are what --cpu-moe moves; shared experts and the router stay."""
    assert weight_class(name) == expected


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("gemma3", {"attention__sliding_window": 1024}, [0, 1, 2, 3, 4, 6, 7]),
        ("gemma3", {}, []),
        ("gemma2", {}, [0, 2, 4, 6]),
        ("gpt-oss", {"attention__sliding_window": 128}, [0, 2, 4, 6]),
        ("smallthinker", {"attention__sliding_window": 1}, [1, 2, 3, 5, 6, 7]),
        ("llama4", {}, [0, 1, 2, 4, 5, 6]),
        ("llama4", {"attention__sliding_window": 0}, []),
        ("phi3", {"attention__sliding_window": 2047}, []),
        ("exaone4", {"attention__sliding_window": 4096}, []),
        ("gemma4", {"attention__sliding_window": 512}, []),
        ("cohere2", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 2}, [0, 2, 4, 6]),
        ("cohere2", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 1}, []),
        ("cohere2", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 0}, list(range(8))),
        (
            "gemma4",
            {"attention__sliding_window": 512, "attention__sliding_window_pattern": (True, False) * 4},
            [0, 2, 4, 6],
        ),
        ("llama", {"attention__sliding_window": 4096}, []),
    ],
)
def test_which_layers_slide(arch: str, keys: dict[str, Value], expected: list[int]):
    """A period of the architecture or the file, or an array of the file; phi3's window is ignored."""
    shape = bare(arch, **keys)
    assert layers_where(shape, "is_swa") == expected
    assert shape.has_swa == bool(expected)


@pytest.mark.parametrize(("arch", "n_swa"), [("llama4", 8192), ("smallthinker", 4096), ("gemma2", 512)])
def test_windows_that_the_code_fixes(arch: str, n_swa: int):
    """Some architectures have a window of their own whatever the file says."""
    assert bare(arch, attention__sliding_window=512).n_swa == n_swa


def test_sliding_layers_have_heads_of_their_own():
    """key_length_swa holds for sliding layers only."""
    shape = bare("gemma2", attention__key_length=256, attention__key_length_swa=128, attention__value_length=256)
    assert [layer.head_k for layer in shape.layers[:2]] == [128, 256]
    assert [layer.head_v for layer in shape.layers[:2]] == [256, 256]


def test_shared_caches():
    """gemma3n caches in its first 20 layers only, gemma4 in all but the shared ones."""
    assert layers_where(bare("gemma3n", n_layer=30, attention__sliding_window=512), "has_kv") == list(range(20))
    assert layers_where(bare("gemma4", attention__shared_kv_layers=3), "has_kv") == list(range(5))


def test_latent_attention_caches_k_only():
    """DeepSeek keeps 512 + 64 elements of K for each token and layer, and no V."""
    shape = shape_of("deepseek-v3")
    assert shape.is_mla
    assert {(layer.n_k, layer.n_v) for layer in shape.layers} == {(576, 0)}
    assert (shape.n_expert, shape.n_expert_used, shape.n_ff_exp, shape.n_ff_shexp) == (256, 8, 2048, 2048)


def test_sparse_attention_has_an_index():
    """An indexer adds its key; layers of type 0 share another's."""
    shape = bare("glm-dsa", attention__indexer__key_length=128, attention__indexer__types=(1, 0) * 4)
    assert [layer.n_indexer for layer in shape.layers[:2]] == [128, 0]


@pytest.mark.parametrize(
    ("name", "cached", "n_r", "n_s"),
    [
        ("qwen3-next-80b", list(range(3, 48, 4)), 3 * 8192, 128 * 4096),
        ("mamba2-7b", [], 3 * 10240, 128 * 8192),
        ("lfm2-1.2b", [2, 5, 8, 10, 12, 14], 2 * 2048, 0),
        ("granite-4-h-tiny", [5, 15, 25, 35], 3 * 3328, 128 * 3072),
        ("nemotron-h-8b", [7, 18, 29, 40], 3 * 10240, 128 * 8192),
        ("falcon-h1-1.5b", list(range(24)), 3 * 3584, 256 * 3072),
    ],
)
def test_recurrent_models(name: str, cached: list[int], n_r: int, n_s: int):
    """Which layers cache, and the state that the others keep (llama_hparams::n_embd_r and n_embd_s)."""
    shape = shape_of(name)
    assert layers_where(shape, "has_kv") == cached
    state = next(layer for layer in shape.layers if layer.is_recurrent)
    assert (state.n_r, state.n_s) == (n_r, n_s)
    both = set(cached) & set(layers_where(shape, "is_recurrent"))
    assert both == (set(cached) if name.startswith("falcon") else set())


def test_other_recurrent_rules():
    """RWKV shifts tokens, Kimi's delta attention has heads, MiniMax-01 has neither convolution nor interval 4."""
    rwkv = bare("rwkv7", wkv__head_size=64, token_shift_count=2)
    assert (rwkv.layers[0].n_r, rwkv.layers[0].n_s) == (2 * 1024, 64 * 1024)
    assert not layers_where(rwkv, "has_kv")
    kimi = bare("kimi-linear", kda__head_dim=128, ssm__conv_kernel=4, attention__head_count_kv=(0, 0, 0, 1) * 2)
    assert (kimi.layers[0].n_r, kimi.layers[0].n_s) == (3 * 3 * 8 * 128, 128 * 128 * 8)
    assert layers_where(kimi, "has_kv") == [3, 7]
    minimax = bare("minimax-01", attention__key_length=128)
    assert (minimax.layers[0].n_r, minimax.layers[0].n_s) == (0, 128 * 128 * 8)
    assert layers_where(minimax, "has_kv") == [7]
    given = bare("qwen3next", ssm__conv_kernel=4, ssm__inner_size=64, attention__recurrent_layers=(1, 0) * 4)
    assert layers_where(given, "is_recurrent") == [0, 2, 4, 6]


def test_encoders_have_no_cache():
    """BERT and its kin keep nothing between tokens."""
    assert not layers_where(bare("bert"), "has_kv")


def test_draft_layers_do_not_run():
    """GLM-4.5-Air has 47 layers; the last is for drafting: in the count of gpu_layers, not in the trunk."""
    shape = shape_of("glm-4.5-air")
    assert (shape.n_layer, shape.n_layer_all, len(shape.trunk)) == (46, 47, 46)
    assert layers_where(shape, "is_mtp") == [46]
    assert not shape.layers[46].has_kv
    assert shape.layers[46].weights_bytes > 10**9


def test_per_layer_arrays():
    """Heads and feed-forward sizes may differ between layers."""
    shape = bare("deci", attention__head_count_kv=(8, 4) * 4, feed_forward_length=(100, 200) * 4)
    assert [layer.n_k for layer in shape.layers[:2]] == [8 * 128, 4 * 128]
    assert [layer.n_ff for layer in shape.layers[:2]] == [100, 200]


def test_tied_embeddings_are_in_the_output_too():
    """Without output.weight the embeddings stand in for it where the output layer is offloaded."""
    shape = shape_of("llama-3.2-1b")
    assert shape.tied_embeddings
    assert shape.output_bytes == shape.input_bytes + 2048 * 4


def test_unknown_architectures_are_said_to_be():
    """A new architecture gets the general formula and is marked as a guess."""
    shape = bare("llama9")
    assert not shape.known_arch
    assert layers_where(shape, "has_kv") == list(range(8))
    assert not ARCH_RULES.keys() & PLAIN_ARCHS


def test_file_type_of_a_number_nobody_knows():
    """An unknown file type is named after the type with the most bytes."""
    header = maker.MODELS["gpt-oss-20b"]().header()
    strange = dataclasses.replace(header, metadata={**header.metadata, "general.file_type": 9999})
    assert model_shape(strange).file_type == "MXFP4"


BAD_KEYS: list[tuple[dict[str, Value], str]] = [
    ({"general.architecture": ""}, "general.architecture is missing"),
    ({"general.architecture": "clip"}, "projector"),
    ({"general.type": "adapter"}, "adapter"),
    ({"llama.block_count": 0}, "llama.block_count"),
    ({"llama.block_count": 10**6}, "llama.block_count"),
    ({"llama.block_count": 1}, "beyond the 1 layers"),
    ({"llama.embedding_length": "big"}, "llama.embedding_length"),
    ({"llama.context_length": -1}, "llama.context_length"),
    ({"llama.attention.head_count_kv": (1, 2)}, "llama.attention.head_count_kv"),
    ({"llama.attention.head_count_kv": (-1,) * 32}, "llama.attention.head_count_kv"),
    ({"llama.attention.key_length": -5}, "llama.attention.key_length"),
    ({"llama.attention.key_length": 0.5}, "llama.attention.key_length"),
]


@pytest.mark.parametrize(("keys", "expected"), BAD_KEYS, ids=[str(keys) for keys, _ in BAD_KEYS])
def test_metadata_that_makes_no_model(keys: dict[str, Value], expected: str):
    """Keys that cannot be are a ModelError that names them."""
    header = maker.MODELS["llama-3.1-8b"]().header()
    with pytest.raises(ModelError, match=expected) as caught:
        model_shape(dataclasses.replace(header, metadata={**header.metadata, **keys}), "qwen")
    assert caught.value.where == "qwen"


def test_a_file_without_layers_is_no_model():
    """A header without a single layer is refused."""
    header = maker.MODELS["llama-3.1-8b"]().header()
    with pytest.raises(ModelError, match="no layers"):
        model_shape(dataclasses.replace(header, tensors=header.tensors[-2:]))


def test_fuzz_a_damaged_header_never_crashes_the_planner():
    """Damaged metadata is refused, or planned with finite figures."""
    rng = random.Random(7)  # noqa: S311 - damage, not secrets
    model = maker.dense(dataclasses.replace(maker.LLAMA_1B, n_layer=2, n_vocab=8))
    raw, size = maker.header(dataclasses.replace(model, vocabulary=False).metadata(), model.tensors)
    planned = 0
    for _ in range(1500):
        data = bytearray(raw)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            shape = model_shape(read_header(PrefixReader(bytes(data), size)))
        except ModelError:
            continue
        planned += 1
        result = memory(shape, LlamaMemorySettings(4096, gpu_layers=2, n_gpus=1))
        assert 0 <= result.host.total_mib < float("inf")
    assert planned > 100
