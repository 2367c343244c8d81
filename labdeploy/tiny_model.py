"""A tiny model for tests and the demo: a real GGUF file that llama-server loads and that answers with words.

The weights are random, so the answers are word salad; everything else is as in a real model. Same arguments,
same bytes, on every machine: the randomness is SHAKE-256 of the seed and the tensor's name.

GGUF version 3 (ggml's docs/gguf.md): magic, version, counts; then key-value pairs; then one record per tensor;
then, from an aligned offset on, the tensors. All of it is little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_ALIGNMENT = 32

_UINT32, _FLOAT32, _STRING, _ARRAY = 4, 6, 8, 9  # GGUF value types
_INT32 = 5
_F32, _F16 = 0, 1  # ggml tensor types

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # llama.cpp token types

_WORD_LIST = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were her all she there would their we him been has when who will more no if out so said what "
    "up its about into than them can only other new some could time these two may then do first any my now such "
    "like our over man me even most made after also did many before must through back years where much your way "
    "well down should because each just those people how too little state good very make world still own see men "
    "work long get here between both life being under never day same another know while last might us great old "
    "year off come since against go came right used take three house machine model server layer memory disk rack "
    "light cable switch kernel driver token prompt answer question river mountain forest garden winter summer "
    "morning evening letter number window table paper music story friend mother father brother sister child city"
)
_WORDS = _WORD_LIST.split()


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # GGUF order: the first is the length of a row
    kind: int
    data: bytes


def write_tiny_model(
    path: Path,
    *,
    n_layer: int = 4,
    n_embd: int = 256,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ff: int = 512,
    n_ctx_train: int = 4096,
    seed: int = 1,
) -> Path:
    """Write a llama model of this shape with F16 weights (5 MB as it is) and return its path."""
    head_dim = n_embd // n_head
    tokens = _tokens()
    metadata = [
        _string("general.architecture", "llama"),
        _string("general.name", "tiny"),
        _uint32("general.alignment", _ALIGNMENT),
        _uint32("general.file_type", 1),  # mostly F16
        _uint32("llama.block_count", n_layer),
        _uint32("llama.context_length", n_ctx_train),
        _uint32("llama.embedding_length", n_embd),
        _uint32("llama.feed_forward_length", n_ff),
        _uint32("llama.attention.head_count", n_head),
        _uint32("llama.attention.head_count_kv", n_head_kv),
        _float32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        _uint32("llama.rope.dimension_count", head_dim),
        _uint32("llama.vocab_size", len(tokens)),
        *_tokenizer(tokens),
    ]
    n_kv = head_dim * n_head_kv
    tensors = _tensors(seed, n_vocab=len(tokens), n_layer=n_layer, n_embd=n_embd, n_kv=n_kv, n_ff=n_ff)
    path.write_bytes(_gguf(metadata, tensors))
    return path


def _tokens() -> list[tuple[str, int]]:
    """Return the vocabulary, text and type: three specials, every byte (any prompt can be read), then words."""
    specials = [("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)]
    every_byte = [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    return [*specials, *every_byte, *((f"▁{word}", _NORMAL) for word in _WORDS)]  # ▁ is SentencePiece's blank


def _tokenizer(tokens: list[tuple[str, int]]) -> list[bytes]:
    return [
        _string("tokenizer.ggml.model", "llama"),  # SentencePiece: no merges, unlike byte-level BPE
        _array("tokenizer.ggml.tokens", _STRING, [_text(text) for text, _ in tokens]),
        _array("tokenizer.ggml.scores", _FLOAT32, [struct.pack("<f", -n) for n in range(len(tokens))]),
        _array("tokenizer.ggml.token_type", _INT32, [struct.pack("<i", kind) for _, kind in tokens]),
        _uint32("tokenizer.ggml.unknown_token_id", 0),
        _uint32("tokenizer.ggml.bos_token_id", 1),
        _uint32("tokenizer.ggml.eos_token_id", 2),
    ]


def _tensors(seed: int, *, n_vocab: int, n_layer: int, n_embd: int, n_kv: int, n_ff: int) -> list[_Tensor]:
    """Return all tensors of a llama model, named as llama.cpp looks them up."""

    def weights(name: str, n_in: int, n_out: int) -> _Tensor:
        return _Tensor(f"{name}.weight", (n_in, n_out), _F16, _random_f16(f"{seed} {name}", n_in * n_out))

    def norm(name: str) -> _Tensor:
        return _Tensor(f"{name}.weight", (n_embd,), _F32, struct.pack("<f", 1.0) * n_embd)

    def block(n: int) -> Iterable[_Tensor]:
        yield norm(f"blk.{n}.attn_norm")
        yield weights(f"blk.{n}.attn_q", n_embd, n_embd)
        yield weights(f"blk.{n}.attn_k", n_embd, n_kv)
        yield weights(f"blk.{n}.attn_v", n_embd, n_kv)
        yield weights(f"blk.{n}.attn_output", n_embd, n_embd)
        yield norm(f"blk.{n}.ffn_norm")
        yield weights(f"blk.{n}.ffn_gate", n_embd, n_ff)
        yield weights(f"blk.{n}.ffn_up", n_embd, n_ff)
        yield weights(f"blk.{n}.ffn_down", n_ff, n_embd)

    return [
        weights("token_embd", n_embd, n_vocab),
        *(tensor for n in range(n_layer) for tensor in block(n)),
        norm("output_norm"),
        _words_only(weights("output", n_embd, n_vocab)),
    ]


def _words_only(output: _Tensor) -> _Tensor:
    """Zero the rows of the specials and bytes: words get far better scores, and no answer ends early."""
    row_bytes = 2 * output.shape[0]
    silent = row_bytes * (output.shape[1] - len(_WORDS))
    return _Tensor(output.name, output.shape, output.kind, bytes(silent) + output.data[silent:])


# The upper byte of an F16 is its sign, five bits of exponent and two of fraction. Every random byte keeps its
# sign and fraction and gets one of three exponents, for values of 1/32 to 1/4: never infinity, never NaN, and
# about as wide as the initial weights of a real model of a few hundred dimensions.
_UPPER_BYTE = bytes(byte & 0b1_00000_11 | (10 + (byte >> 2) % 3) << 2 for byte in range(256))


def _random_f16(name: str, count: int) -> bytes:
    values = bytearray(hashlib.shake_256(name.encode()).digest(2 * count))
    values[1::2] = values[1::2].translate(_UPPER_BYTE)
    return bytes(values)


def _gguf(metadata: list[bytes], tensors: list[_Tensor]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata)
    records, body = b"", bytearray()
    for tensor in tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        records += _text(tensor.name) + shape + struct.pack("<IQ", tensor.kind, len(body))
        body += _padded(tensor.data)
    return _padded(head + records) + body


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _string(key: str, value: str) -> bytes:
    return _text(key) + struct.pack("<I", _STRING) + _text(value)


def _uint32(key: str, value: int) -> bytes:
    return _text(key) + struct.pack("<II", _UINT32, value)


def _float32(key: str, value: float) -> bytes:
    return _text(key) + struct.pack("<If", _FLOAT32, value)


def _array(key: str, kind: int, values: list[bytes]) -> bytes:
    return _text(key) + struct.pack("<IIQ", _ARRAY, kind, len(values)) + b"".join(values)
