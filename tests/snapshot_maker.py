"""Hugging Face snapshot folders for tests: config.json, random weights and a tokenizer of single bytes.

`load_format: dummy` needs no weights, so a snapshot of any shape can be had from its config alone.
"""

from __future__ import annotations

import json
import random
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 257  # the bytes, and the token that ends a text
END = "<|end|>"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": VOCAB - 1,
    "eos_token_id": VOCAB - 1,
    "torch_dtype": "float32",
}


def write_snapshot(folder: Path, *, weights: bool = True, **config: Any) -> Path:  # noqa: ANN401
    """Write a snapshot: a small Llama, with what `config` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**LLAMA, **config}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    write_tokenizer(folder)
    if weights:
        write_weights(folder / "model.safetensors", llama_tensors(settings))
    return folder


def llama_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a Llama with their shapes, as transformers' LlamaForCausalLM does."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def write_weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write random float32 tensors as a safetensors file: length of the header, the header, the data."""
    dice = random.Random(1)  # noqa: S311 (weights, not secrets)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in tensors.items():
        n = 1
        for dimension in shape:
            n *= dimension
        values = [1.0] * n if len(shape) == 1 else [dice.gauss(0, 0.1) for _ in range(n)]
        start = len(data)
        data += struct.pack(f"<{n}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE without merges: every byte is a token."""
    vocab = {character: number for number, character in enumerate(_byte_characters())}
    end = {"id": VOCAB - 1, "content": END, "special": True}
    added = end | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [added],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab | {END: VOCAB - 1}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "model_max_length": 8192}))


def _byte_characters() -> list[str]:
    """Give the printable character that byte-level BPE writes for each byte: GPT-2's table."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
