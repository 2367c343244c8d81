"""The tiny model, read back with a reader that shares no code with the writer."""

from __future__ import annotations

import hashlib
import math
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

from labdeploy.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = {4: "<I", 5: "<i", 6: "<f"}


class Reader:
    """GGUF, as ggml's docs/gguf.md describes it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        assert self._take("<4sI") == (b"GGUF", 3)
        n_tensors, n_pairs = self._take("<QQ")
        self.pairs = {self._text(): self._value(*self._take("<I")) for _ in range(n_pairs)}
        self.tensors = {self._text(): self._record() for _ in range(n_tensors)}
        self.start = math.ceil(self.at / 32) * 32

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def _text(self) -> str:
        (length,) = self._take("<Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._take("<IQ")
            return [self._value(inner) for _ in range(count)]
        return self._take(FORMATS[kind])[0]

    def _record(self) -> tuple[tuple[int, ...], int, int]:
        (n_dims,) = self._take("<I")
        shape, (kind, offset) = self._take(f"<{n_dims}Q"), self._take("<IQ")
        return shape, kind, offset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Return the tiny model, read back."""
    return Reader(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf").read_bytes())


def test_same_arguments_same_bytes(tmp_path: Path):
    """A checksum in a lock or a recorded answer holds on every machine."""
    first, again, other = (
        write_tiny_model(tmp_path / f"{n}.gguf", seed=seed).read_bytes() for n, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other
    assert hashlib.sha256(first).hexdigest() == "886b06ee14d32841b191a7aaa7d1b599a5e06c8980a8d14c4a4d52e513756674"


def test_it_is_small_and_quick(tmp_path: Path):
    """It is written in every test session and in the demo."""
    started = time.monotonic()
    assert write_tiny_model(tmp_path / "tiny.gguf").stat().st_size < 6 << 20
    assert time.monotonic() - started < 1


def test_the_shape_is_as_asked(tmp_path: Path):
    """Every parameter reaches its key and its tensors."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, n_layer=2, n_embd=128, n_head=4, n_head_kv=1, n_ff=192, n_ctx_train=1024)
    model = Reader(path.read_bytes())
    wanted = {
        "block_count": 2,
        "embedding_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "feed_forward_length": 192,
        "context_length": 1024,
    }
    assert {key: model.pairs[f"llama.{key}"] for key in wanted} == wanted
    assert model.tensors["blk.1.attn_k.weight"][0] == (128, 32)
    assert model.tensors["blk.1.ffn_down.weight"][0] == (192, 128)
    assert "blk.2.attn_k.weight" not in model.tensors


def test_every_tensor_lies_within_the_file_and_none_overlap(tiny: Reader):
    """In llama.cpp's own words otherwise: data is not within the file bounds, model is corrupted."""
    end = 0
    for shape, kind, offset in tiny.tensors.values():
        assert offset % 32 == 0
        assert offset >= end
        end = offset + math.prod(shape) * {0: 4, 1: 2}[kind]
    assert math.ceil(end / 32) * 32 == len(tiny.data) - tiny.start


def test_every_weight_is_finite_and_most_differ(tiny: Reader):
    """One NaN makes every answer NaN."""
    shape, _, offset = tiny.tensors["blk.0.ffn_up.weight"]
    values = struct.unpack_from(f"<{math.prod(shape)}e", tiny.data, tiny.start + offset)
    assert all(1 / 32 <= abs(value) < 1 / 4 for value in values)
    assert len(set(values)) > 1000
    assert abs(sum(values) / len(values)) < 0.01


def test_only_words_can_be_answered(tiny: Reader):
    """Bytes and specials score zero, and the end of text among them: max_tokens decides the length."""
    (n_embd, n_vocab), _, offset = tiny.tensors["output.weight"]
    n_words = tiny.pairs["tokenizer.ggml.token_type"].count(1)
    silent = 2 * n_embd * (n_vocab - n_words)
    start = tiny.start + offset
    assert not any(tiny.data[start : start + silent])
    assert all(tiny.data[start + silent + row * 2 * n_embd + 1] for row in range(n_words))


def test_the_vocabulary_reads_every_byte_and_answers_in_ascii(tiny: Reader):
    """Any prompt can be tokenised, and any answer printed on any terminal."""
    tokens, kinds = (tiny.pairs[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert len(tokens) == len(set(tokens)) == len(kinds) == len(tiny.pairs["tokenizer.ggml.scores"])
    assert len(tokens) == tiny.tensors["token_embd.weight"][0][1] == tiny.pairs["llama.vocab_size"]
    assert [token for token, kind in zip(tokens, kinds, strict=True) if kind == 6] == [
        f"<0x{byte:02X}>" for byte in range(256)
    ]
    words = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 1]
    assert all(word[0] == "▁" and word[1:].isascii() for word in words)
