"""Make the example data: inventory.lock.yaml for the shipped inventory, without downloading 60 GB of models.

    python tests/make_lock.py    writes inventory.lock.yaml at the top, and tests/data/machines/inventory.lock.yaml,
                                 which all example machines of the tests share and which knows more models

The files are sparse and of full length: the shapes, types and settings of the published models, no weights. They are
looked into by `labdeploy inspect FILE --add NAME` as real ones would be, so the lock is what anyone gets from real
files, but for metadata that memory does not depend on. The same checkout makes the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import gguf_maker
import mmproj_maker
from gguf_maker import GEMMA3_27B, LLAMA_70B, Q4_K_M, QWEN3_4B, QWEN3_8B, QWEN3_30B, Dense, Model

from labdeploy import inventory
from labdeploy.__main__ import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TOP = Path(__file__).parent.parent
SHIPPED = TOP / "inventory.lock.yaml"
OF_TESTS = TOP / "tests" / "data" / "machines" / "inventory.lock.yaml"

# config.json of Qwen/Qwen2.5-7B-Instruct-AWQ.
AWQ_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "quantization_config": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
DTYPE_BYTES = {"F16": 2, "I32": 4}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def named(model: Model, name: str, n_ctx_train: int, rope_base: float) -> Model:
    """Give a made model what its publisher wrote into the header."""
    model.name, model.n_ctx_train = name, n_ctx_train
    model.key(rope__freq_base=rope_base, attention__layer_norm_rms_epsilon=1e-6)
    return model


def qwen3(shape: Dense, name: str) -> Model:
    """Make a dense Qwen3."""
    return named(gguf_maker.dense(shape, Q4_K_M), name, 40960, 1e6)


def qwen3_30b() -> Model:
    """Make Qwen3-30B-A3B: 128 experts, 8 used."""
    return named(gguf_maker.qwen3moe(QWEN3_30B, 128, 8, 768, Q4_K_M), "Qwen3 30B A3B", 40960, 1e6)


def gemma3_27b() -> Model:
    """Make Gemma 3 27B: five of six layers see a window of 1024 tokens."""
    return named(gguf_maker.gemma(GEMMA3_27B, 1024, Q4_K_M), "Gemma 3 27b It", 131072, 1e6)


def llama_70b() -> Model:
    """Make Llama 3.3 70B, for the machines of the tests."""
    return named(gguf_maker.dense(LLAMA_70B, Q4_K_M), "Llama 3.3 70B Instruct", 131072, 5e5)


def awq_tensors() -> list[Tensors]:
    """Name the tensors of the snapshot's two files: AWQ packs eight weights of 4 bits into an I32 along the rows."""
    hidden, kv, wide, vocab = 3584, 512, 18944, 152064
    files: list[Tensors] = [{"model.embed_tokens.weight": ("F16", (vocab, hidden))}, {}]
    for layer in range(28):
        to = files[layer >= 20]
        stem = f"model.layers.{layer}"
        matrices = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv)}
        for part, (rows, columns) in matrices.items():
            to |= packed(f"{stem}.self_attn.{part}", rows, columns)
            to[f"{stem}.self_attn.{part}.bias"] = ("F16", (columns,))
        to |= packed(f"{stem}.self_attn.o_proj", hidden, hidden)
        to |= packed(f"{stem}.mlp.gate_proj", hidden, wide) | packed(f"{stem}.mlp.up_proj", hidden, wide)
        to |= packed(f"{stem}.mlp.down_proj", wide, hidden)
        to[f"{stem}.input_layernorm.weight"] = to[f"{stem}.post_attention_layernorm.weight"] = ("F16", (hidden,))
    files[1] |= {"model.norm.weight": ("F16", (hidden,)), "lm_head.weight": ("F16", (vocab, hidden))}
    return files


def packed(stem: str, rows: int, columns: int) -> Tensors:
    """Name the three tensors of one quantised matrix: weights, zeros and scales of groups of 128 rows."""
    return {
        f"{stem}.qweight": ("I32", (rows, columns // 8)),
        f"{stem}.qzeros": ("I32", (rows // 128, columns // 8)),
        f"{stem}.scales": ("F16", (rows // 128, columns)),
    }


def write_awq(folder: Path) -> Path:
    """Write the snapshot folder: config.json, two sparse files, and the index that names both."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(AWQ_CONFIG, indent=2))
    weight_map, total = {}, 0
    for i, tensors in enumerate(awq_tensors(), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        total += write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_safetensors(path: Path, tensors: Tensors) -> int:
    """Write one sparse file, and give the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


# How each model is made: its file or folder in a folder.
MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "qwen3-4b": lambda folder: qwen3(QWEN3_4B, "Qwen3 4B").write(folder / "Qwen3-4B-Q4_K_M.gguf"),
    "qwen3-8b": lambda folder: qwen3(QWEN3_8B, "Qwen3 8B").write(folder / "Qwen3-8B-Q4_K_M.gguf"),
    "qwen3-30b": lambda folder: qwen3_30b().write(folder / "Qwen3-30B-A3B-Q4_K_M.gguf"),
    "gemma3-27b": lambda folder: gemma3_27b().write(folder / "gemma-3-27b-it-Q4_K_M.gguf"),
    "gemma3-27b-mmproj": lambda folder: mmproj_maker.write(folder / "mmproj-gemma-3-27b-it-f16.gguf", "gemma3-27b"),
    "llama3-70b": lambda folder: llama_70b().write(folder / "Llama-3.3-70B-Instruct-Q4_K_M.gguf"),
    "qwen2.5-7b-awq": lambda folder: write_awq(folder / "Qwen2.5-7B-Instruct-AWQ"),
}


def make_lock(names: Iterable[str]) -> bytes:
    """Look into the named models as `labdeploy inspect FILE --add NAME` does, and give the lock that comes of it."""
    names = list(names)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "inventory.yaml"
        path.write_text(json.dumps({"hosts": {}, "models": {name: {"path": name} for name in names}}))
        for name in names:
            with contextlib.redirect_stdout(io.StringIO()):
                code = run(["-i", str(path), "inspect", str(MAKERS[name](folder)), "--add", name])
            if code:
                raise SystemExit(code)
        return (folder / "inventory.lock.yaml").read_bytes()


def locks() -> dict[Path, bytes]:
    """Give both locks by their places."""
    shipped = inventory.load(TOP / "inventory.yaml").models
    return {SHIPPED: make_lock(shipped), OF_TESTS: make_lock(MAKERS)}


def main() -> None:
    """Write both locks."""
    for path, data in locks().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sys.stdout.write(f"{path.relative_to(TOP)}: {len(data)} bytes\n")


if __name__ == "__main__":
    main()
