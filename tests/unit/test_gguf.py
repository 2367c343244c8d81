"""The GGUF reader: what it keeps, what it refuses, and that no file can make it take memory or time."""

from __future__ import annotations

import dataclasses
import random
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from labdeploy.errors import InventoryError, ModelError
from labdeploy.models.gguf import (
    MIB,
    TENSOR_TYPES,
    FileReader,
    GgufHeader,
    PrefixReader,
    Tensor,
    from_lock,
    part_names,
    read_header,
    read_parts,
    to_lock,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker as maker

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.models.gguf import TensorType

KEYS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "tokenizer.chat_template": "{{ messages }}" * 50,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "llama.attention.head_count_kv": [8, 4],
    "general.alignment": 32,
}
TENSORS: list[maker.TensorInfo] = [
    ("token_embd.weight", (64, 3), "F32"),
    ("blk.0.attn_q.weight", (64, 64), "Q8_0"),
    ("blk.1.attn_q.weight", (64, 64), "Q8_0"),
]


def read(raw: bytes, size: int | None = None) -> GgufHeader:
    """Read a header from memory."""
    return read_header(PrefixReader(raw, len(raw) if size is None else size))


def small(**changes: object) -> bytes:
    """Return a whole small file with some keys changed."""
    raw, size = maker.header(KEYS | changes, TENSORS)
    return raw + bytes(size - len(raw))


def refused(raw: bytes, size: int | None = None) -> str:
    """Return how the reader refuses a file, having checked that the refusal says where."""
    with pytest.raises(ModelError) as caught:
        read(raw, size)
    assert caught.value.where == "the model"
    return caught.value.what


def test_keeps_what_planning_needs():
    """Architecture keys, arrays of numbers and lengths of string arrays are kept; templates are not."""
    header = read(small())
    assert header.arch == "llama"
    assert header.metadata["llama.attention.head_count_kv"] == (8, 4)
    assert header.array_lengths == {"tokenizer.ggml.tokens": 3}
    assert "tokenizer.chat_template" not in header.metadata
    assert [tensor.name for tensor in header.tensors] == [
        "blk.0.attn_q.weight",
        "blk.1.attn_q.weight",
        "token_embd.weight",
    ]
    assert header.tensors[0].n_bytes == 64 * 64 // 32 * 34


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_bytes_of_every_type(kind: TensorType):
    """A row of every type takes a whole number of blocks."""
    assert Tensor("x", (kind.block * 4, 3), kind.name).n_bytes == 12 * kind.n_bytes


def test_version_2_is_read():
    """Version 2 has the same layout."""
    raw, size = maker.header(KEYS, TENSORS, version=2)
    assert read(raw, size).arch == "llama"


def test_a_prefix_with_the_known_size_is_enough():
    """A download of the front and the length of the whole make the same header as the whole file."""
    raw, size = maker.header(KEYS, TENSORS)
    assert read(raw, size) == read(small())


def test_other_alignment():
    """Offsets and the start of the data follow general.alignment."""
    raw, size = maker.header(KEYS | {"general.alignment": 128}, TENSORS, alignment=128)
    assert len(read(raw, size).tensors) == 3


def test_reads_windows_as_needed(tmp_path: Path):
    """A header longer than one window is read in pieces, none larger than asked."""
    asked = []

    class Recorder(PrefixReader):
        def read(self, offset: int, n: int) -> bytes:
            asked.append((offset, n))
            return super().read(offset, n)

    raw, size = maker.header(KEYS | {"tokenizer.ggml.merges": ["x" * 100_000] * 300}, TENSORS)
    assert len(raw) > 28 * MIB
    assert read_header(Recorder(raw, size)).array_lengths["tokenizer.ggml.merges"] == 300
    assert len(asked) <= 3
    assert max(n for _, n in asked) == 16 * MIB
    path = tmp_path / "prefix.gguf"
    path.write_bytes(raw)
    assert read_header(FileReader(path, size_bytes=size)).size_bytes == size


# -- split models ----------------------------------------------


def write_parts(folder: Path, count: int = 2) -> list[Path]:
    """Write a split model: metadata in the first part, tensors in all."""
    paths = [folder / name for name in part_names(f"m-00001-of-{count:05d}.gguf")]
    for no, path in enumerate(paths):
        keys = {
            "split.no": maker.Typed(2, no),
            "split.count": maker.Typed(2, count),
            "split.tensors.count": len(TENSORS),
        }
        maker.write(path, (KEYS if no == 0 else {}) | keys, TENSORS[no::count])
    return paths


def test_all_parts_are_found(tmp_path: Path):
    """The tensors and sizes of all parts are put together, whichever part is named."""
    paths = write_parts(tmp_path)
    header = read_header(paths[1])
    assert header == read_header(paths[0])
    assert header.n_parts == 2
    assert header.tensors == read(small()).tensors
    assert header.size_bytes == sum(path.stat().st_size for path in paths)
    remote = read_parts([(path.name, FileReader(path)) for path in paths])
    assert remote == header


def test_a_missing_part_is_named(tmp_path: Path):
    """The error names the part that is not there."""
    paths = write_parts(tmp_path, 3)
    paths[2].unlink()
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: this part of 3 is missing"):
        read_header(paths[0])


def test_parts_must_be_what_their_names_say(tmp_path: Path):
    """A part under another part's name, or a first part alone under a plain name, is refused."""
    paths = write_parts(tmp_path)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(ModelError, match="says part 1 of 2, but it was read as part 2 of 2"):
        read_header(paths[0])
    with pytest.raises(ModelError, match="says part 1 of 2, but it was read as part 1 of 1"):
        read_header(paths[0].rename(tmp_path / "plain.gguf"))


def test_parts_must_hold_all_tensors(tmp_path: Path):
    """A tensor that no part holds is noticed by the count."""
    paths = write_parts(tmp_path)
    keys = {"split.no": maker.Typed(2, 1), "split.count": maker.Typed(2, 2)}
    maker.write(paths[1], keys, [])
    with pytest.raises(ModelError, match="the parts hold 2 tensors, the header says 3"):
        read_header(paths[0])


@pytest.mark.parametrize("name", ["m-00003-of-00002.gguf", "m-00000-of-00002.gguf"])
def test_impossible_part_names(name: str):
    """A part beyond the count is refused before any file is looked for."""
    with pytest.raises(ModelError, match="the name says part"):
        part_names(name)


def test_missing_file_and_folder(tmp_path: Path):
    """A path that is no file says so."""
    with pytest.raises(ModelError, match="no such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        read_header(tmp_path)


# -- bad files -------------------------------------------------


def patched(what: bytes, by: bytes) -> bytes:
    """Replace the first occurrence of some bytes in a small file."""
    raw = small()
    assert what in raw
    return raw.replace(what, by, 1)


def counts(n_tensors: int, n_kv: int) -> bytes:
    """Return the front of a file that claims these counts, in front of plenty of zeros."""
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv) + bytes(4096)


def one_key(kind: int, payload: bytes, key: bytes = b"x.y") -> bytes:
    """Return a file with one metadata entry."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + maker.text(key) + struct.pack("<I", kind) + payload + bytes(64)


def one_tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    """Return a file with one tensor and no metadata."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + maker.text(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset) + bytes(4096)


HUGE = 2**60
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "other format": (b"PK\x03\x04" + bytes(100), "is not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 99": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    "only magic": (b"GGUF", "cut off"),
    "2^60 tensors": (counts(HUGE, 0), f"claims {HUGE} tensors"),
    "2^60 keys": (counts(0, HUGE), f"claims {HUGE} metadata keys"),
    "zeros for keys": (counts(0, 3), "is there twice"),
    "2^60 bytes of key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(64), f"claims {HUGE} bytes"),
    "2^60 bytes of string": (one_key(8, struct.pack("<Q", HUGE)), f"claims {HUGE} bytes"),
    "2^60 bytes of kept string": (one_key(8, struct.pack("<Q", HUGE), b"general.name"), f"claims {HUGE} bytes"),
    "2^60 strings": (one_key(9, struct.pack("<IQ", 8, HUGE)), "bytes"),
    "2^60 numbers": (one_key(9, struct.pack("<IQ", 4, HUGE)), "bytes"),
    "2^60 kept numbers": (one_key(9, struct.pack("<IQ", 4, HUGE), b"llama.block_count"), f"claims {HUGE} numbers"),
    "string past the end": (one_key(8, struct.pack("<Q", 1000)), "cut off"),
    "strings past the end": (one_key(9, struct.pack("<IQQ", 8, 2, 2**63)), "cut off"),
    "nested array": (one_key(9, struct.pack("<IQ", 9, 1)), "array of arrays"),
    "unknown value type": (one_key(13, b""), "unknown type 13"),
    "unknown item type": (one_key(9, struct.pack("<IQ", 77, 1)), "unknown type 77"),
    "alignment 24": (small(**{"general.alignment": 24}), "not a power of two"),
    "alignment 0": (small(**{"general.alignment": 0}), "not a power of two"),
    "alignment text": (small(**{"general.alignment": "32"}), "not a power of two"),
    "unknown tensor type": (one_tensor(b"t", (64,), 4), "unknown type 4"),
    "5 dimensions": (one_tensor(b"t", (1, 1, 1, 1, 1), 0), "5 dimensions"),
    "dimension 0": (one_tensor(b"t", (64, 0), 0), "not a positive number"),
    "dimension 2^63": (one_tensor(b"t", (2**63,), 0), "not a positive number"),
    "dimensions overflow": (one_tensor(b"t", (2**32, 2**32), 0), "overflow"),
    "bytes overflow": (one_tensor(b"t", (2**62,), 0), "overflow"),
    "half a block": (one_tensor(b"t", (48,), 8), "do not divide into the 32 of Q8_0"),
    "long name": (one_tensor(b"t" * 64, (64,), 0), "claims 64 bytes"),
    "name with a space": (one_tensor(b"a b", (64,), 0), "no name that llama.cpp writes"),
    "name with a range": (one_tensor(b"blk.0-3.x", (64,), 0), "no name that llama.cpp writes"),
    "offset not at the end": (one_tensor(b"t", (64,), 0, offset=32), "starts at 32 of the data, not at 0"),
    "duplicate tensors": (patched(b"blk.1.attn_q", b"blk.0.attn_q"), "blk.0.attn_q.weight is there twice"),
    "duplicate keys": (counts(0, 2)[:24] + 2 * (maker.text("a.b") + struct.pack("<II", 4, 7)), "'a.b' is there twice"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(name: str):
    """Every malformed header is a ModelError that says what and where, at once and without memory."""
    raw, expected = BAD_FILES[name]
    tracemalloc.start()
    started = time.perf_counter()
    what = refused(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any(part in what for part in expected.split("|")), what
    assert time.perf_counter() - started < 0.5
    assert peak < 4 * MIB


def test_an_incomplete_download_says_how_much_is_missing():
    """A file shorter than its tensors need is told with the bytes that are missing."""
    raw, size = maker.header(KEYS, TENSORS)
    assert refused(raw, size - 1000).startswith("1000 bytes are missing")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_truncated_header(kept: float):
    """A header that is cut anywhere is refused, whether the full size is known or not."""
    raw, size = maker.header(KEYS, TENSORS)
    end = int((len(raw) - 40) * kept)
    assert "cut off" in refused(raw[:end])
    assert "cut off" in refused(raw[:end], size)


def test_unreadable_file():
    """An error of the system becomes a ModelError with its text."""

    class Broken:
        size = 100

        def read(self, offset: int, n: int) -> bytes:
            raise OSError(5, "Input/output error", offset, n)

    with pytest.raises(ModelError, match="cannot be read: Input/output error"):
        read_header(Broken())


def test_sparse_zeros_cost_neither_memory_nor_time():
    """2^24 empty strings in a terabyte of zeros stop at the longest header there can be."""

    class Zeros:
        size = 2**40
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + maker.text("a.b") + struct.pack("<IIQ", 9, 8, 2**37)

        def read(self, offset: int, n: int) -> bytes:
            return (self.head[offset:] + bytes(n))[:n]

    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"claims|longer than"):
        read_header(Zeros())
    assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    tracemalloc.stop()
    assert time.perf_counter() - started < 5


def flipped(raw: bytes, rng: random.Random) -> bytes:
    """Flip a few bits, overwrite a few bytes, or cut."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        data[at] = rng.choice((data[at] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)))
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(1, len(data))))])


def test_fuzz_only_ever_raises_model_error():
    """Damaged headers are read or refused; no other exception comes out, and none costs memory or time."""
    rng = random.Random(20261122)  # noqa: S311 - damage, not secrets
    raw = small()
    tracemalloc.start()
    started = time.perf_counter()
    read_well = 0
    for _ in range(4000):
        damaged = flipped(raw, rng)
        try:
            header = read(damaged, rng.choice((len(damaged), len(raw), 2**40)))
        except ModelError:
            continue
        read_well += 1
        assert from_lock(to_lock(header)) == header
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read_well > 100
    assert peak < 32 * MIB
    assert time.perf_counter() - started < 30


def test_a_real_vocabulary_is_fast_and_small(tmp_path: Path):
    """A Qwen3 with 151,936 tokens and as many merges is read in well under a second."""
    model = maker.MODELS["qwen3-8b-q4_k_m"]()
    merges = [f"tok{number} tok{number + 1}" for number in range(151_387)]
    path = maker.write(tmp_path / "qwen.gguf", model.metadata() | {"tokenizer.ggml.merges": merges}, model.tensors)
    started = time.perf_counter()
    header = read_header(path)
    assert time.perf_counter() - started < 1
    assert header.array_lengths == {"tokenizer.ggml.merges": 151_387, "tokenizer.ggml.tokens": 151_936}
    tracemalloc.start()
    read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 24 * MIB
    tracemalloc.stop()


# -- lock ------------------------------------------------------


@pytest.mark.parametrize("name", maker.MODELS)
def test_lock_loses_nothing(name: str):
    """A header comes back from its lock form as it was, and the form is short enough to review."""
    header = maker.MODELS[name]().header()
    lock = to_lock(header)
    assert from_lock(yaml.safe_load(yaml.safe_dump(lock))) == header
    assert len(lock["tensors"]) < 40


def test_lock_reads_like_a_table():
    """Like tensors share a line with the ranges of their layers."""
    lines = to_lock(maker.MODELS["qwen3-8b-q4_k_m"]().header())["tensors"]
    assert "blk.0-35.attn_q.weight Q4_K 4096x4096" in lines
    assert "blk.0-3,6,9,12,15,18,21,24,27,30-35.ffn_down.weight Q6_K 12288x4096" in lines
    assert "output_norm.weight F32 4096" in lines


def test_lock_keeps_parts_and_scalars(tmp_path: Path):
    """A split model stays split; a tensor without dimensions stays one."""
    header = read_header(write_parts(tmp_path)[0])
    assert from_lock(to_lock(header)) == header
    scalar = dataclasses.replace(header, tensors=(Tensor("x", (), "F32"),))
    assert from_lock(to_lock(scalar)) == scalar


def change(path: str, value: object) -> Callable[[dict], None]:
    """Set one entry of a lock."""

    def apply(lock: dict) -> None:
        keys = path.split("/")
        for key in keys[:-1]:
            lock = lock[key]
        lock[keys[-1]] = value

    return apply


BAD_LOCKS = [
    (change("size_bytes", "big"), "qwen.size_bytes"),
    (change("size_bytes", -1), "qwen.size_bytes"),
    (change("n_parts", "2"), "qwen.n_parts"),
    (change("surprise", 1), "qwen.surprise"),
    (change("metadata", []), "qwen.metadata"),
    (change("metadata/llama.block_count", None), "qwen.metadata.llama.block_count"),
    (change("metadata/llama.block_count", ["x"]), "qwen.metadata.llama.block_count"),
    (change("array_lengths", {"tokenizer.ggml.tokens": "many"}), "qwen.array_lengths.tokenizer.ggml.tokens"),
    (change("tensors", "blk"), "qwen.tensors"),
    (change("tensors", [7]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0.x F32"] * 2), "qwen.tensors"),
    (change("tensors", ["blk.0.x F99 4"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0.x F32 4x"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0.x F32 0"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0.x F32 1x1x1x1x1"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0.x F32 9999999999x9999999999"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0.x Q8_0 33"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.3-1.x F32 4"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0-.x F32 4"]), "qwen.tensors[0]"),
    (change("tensors", ["blk.0-999999999.x F32 4"]), "qwen.tensors[0]"),
    (change("tensors", [f"blk.0-60000.x{n} F32 4" for n in range(9)]), "qwen.tensors[1]"),
]


@pytest.mark.parametrize(("damage", "where"), BAD_LOCKS, ids=[where for _, where in BAD_LOCKS])
def test_bad_locks_are_refused_with_their_path(damage: Callable[[dict], None], where: str):
    """A lock entry that someone damaged is an InventoryError that names the entry."""
    lock = to_lock(read(small()))
    damage(lock)
    with pytest.raises(InventoryError) as caught:
        from_lock(lock, "qwen")
    assert caught.value.where == where


@pytest.mark.parametrize("lock", [None, [], {}, {1: 2}, "x"])
def test_locks_that_are_no_lock(lock: object):
    """Whatever YAML holds in its place is refused, not crashed on."""
    with pytest.raises(InventoryError):
        from_lock(lock, "qwen")
