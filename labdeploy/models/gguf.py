"""Read what a GGUF header says, whatever the size of the file and whoever wrote it.

`read_header` takes a path (all parts of a split model are found) or one `Reader`; `read_parts` takes one
reader for each part. Only the front of a file is read, a window at a time: string arrays (the vocabulary, the
merges) are skipped and only their length is kept, so memory stays far below 64 MiB for any input.
Layout: ggml/include/gguf.h.

`to_lock` and `from_lock` turn a header into text that a person can review in the lock, and back, losing
nothing.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from labdeploy.errors import InventoryError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MIB = 1024 * 1024
FIRST_WINDOW_BYTES = 2 * MIB  # all of the header of a later part, which may come over a network
WINDOW_BYTES = 16 * MIB
MAX_HEADER_BYTES = 128 * MIB
MAX_KEPT_STRING_BYTES = 4096
MAX_KEPT_ARRAY = 16384
MAX_KEYS = 16384
MAX_KEY_BYTES = 1024
MAX_TENSORS = 65536
MAX_PARTS = 1024
MAX_DIMS = 4
MAX_NAME_BYTES = 63
MAX_ELEMENTS = 2**63 - 1
DEFAULT_ALIGNMENT = 32

Number = int | float | bool
Value = Number | str | tuple[Number, ...]


class Reader(Protocol):
    """A file that may be far away. `read` may return less than asked: that is where the known part ends."""

    @property
    def size(self) -> int:
        """Full length of the file in bytes, even if less of it can be read."""

    def read(self, offset: int, n: int) -> bytes:
        """Return up to `n` bytes at `offset`."""


@dataclass(frozen=True)
class FileReader:
    """A local file; `size_bytes` says its true length when only its front is here."""

    path: Path
    size_bytes: int | None = None

    @property
    def size(self) -> int:
        """Full length of the file in bytes."""
        return self.path.stat().st_size if self.size_bytes is None else self.size_bytes

    def read(self, offset: int, n: int) -> bytes:
        """Return up to `n` bytes at `offset`."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(n)


@dataclass(frozen=True)
class PrefixReader:
    """The front of a file in memory, and how long the whole is."""

    prefix: bytes
    size: int

    def read(self, offset: int, n: int) -> bytes:
        """Return up to `n` bytes at `offset`."""
        return self.prefix[offset : offset + n]


@dataclass(frozen=True)
class TensorType:
    """A ggml type: `block` elements take `n_bytes` bytes."""

    name: str
    block: int
    n_bytes: int


# ggml/include/ggml.h (enum ggml_type) and ggml-common.h (struct block_*), ggml 0.25
TENSOR_TYPES: Mapping[int, TensorType] = {
    number: TensorType(name, block, n_bytes)
    for number, name, block, n_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
    )
}
TYPE_BY_NAME: Mapping[str, TensorType] = {kind.name: kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True, order=True)
class Tensor:
    """One tensor of the file; `shape` is ggml's ne: the row length first."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def n_elements(self) -> int:
        """Elements in the tensor."""
        return math.prod(self.shape)

    @cached_property
    def n_bytes(self) -> int:
        """Bytes without alignment: prod(ne) / block x bytes of a block (ggml_nbytes, contiguous)."""
        kind = TYPE_BY_NAME[self.type]
        return self.n_elements // kind.block * kind.n_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What planning needs of a model file; for a split model, of all its parts together."""

    metadata: Mapping[str, Value]
    array_lengths: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    size_bytes: int
    n_parts: int = 1

    @property
    def arch(self) -> str:
        """`general.architecture`, or an empty string."""
        return str(self.metadata.get("general.architecture", ""))


# The keys planning uses: whole names, and names after the architecture's prefix.
_GENERAL_KEYS = """
    general.architecture general.name general.basename general.size_label general.type general.file_type
    general.quantization_version general.alignment split.no split.count split.tensors.count
    tokenizer.ggml.model tokenizer.ggml.pre
"""
GENERAL_KEYS = frozenset(_GENERAL_KEYS.split())
_ARCH_KEYS = """
    block_count context_length embedding_length embedding_length_out feed_forward_length vocab_size
    pooling_type attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.causal attention.key_length_swa attention.value_length_swa attention.key_length_mla
    attention.value_length_mla attention.q_lora_rank attention.kv_lora_rank attention.sliding_window
    attention.sliding_window_pattern attention.shared_kv_layers attention.recurrent_layers
    attention.indexer.key_length attention.indexer.head_count attention.indexer.types attention.indexer.top_k
    full_attention_interval rope.dimension_count nextn_predict_layers expert_count expert_used_count
    expert_feed_forward_length expert_shared_count expert_shared_feed_forward_length leading_dense_block_count
    attention.chunk_size ssm.conv_kernel ssm.inner_size ssm.state_size ssm.time_step_rank ssm.group_count
    shortconv.l_cache kda.head_dim wkv.head_size token_shift_count logit_scale
"""
ARCH_KEYS = frozenset(_ARCH_KEYS.split())
_PROJECTOR_KEYS = """
    clip.projector_type clip.vision.projector_type clip.audio.projector_type clip.vision.image_size
    clip.vision.patch_size clip.vision.block_count clip.vision.embedding_length clip.vision.feed_forward_length
    clip.vision.attention.head_count clip.vision.projector.scale_factor clip.vision.spatial_merge_size
    clip.vision.image_max_pixels clip.audio.block_count clip.audio.embedding_length
    clip.audio.feed_forward_length clip.audio.attention.head_count
"""
PROJECTOR_KEYS = frozenset(_PROJECTOR_KEYS.split())
VOCABULARY_KEY = "tokenizer.ggml.tokens"
LENGTH_KEYS = frozenset({VOCABULARY_KEY, "tokenizer.ggml.merges"})

STRING_TYPE, ARRAY_TYPE, BOOL_TYPE = 8, 9, 7
SCALARS: Mapping[int, struct.Struct] = {
    number: struct.Struct("<" + code)
    for number, code in enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d"))
    if code
}
U32, U64 = SCALARS[4], SCALARS[10]
SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
TENSOR_NAME = re.compile(r"[!-~]{1,63}")
LAYER_NAME = re.compile(r"(?P<front>(?:.*\.)?blk\.)(?P<layers>[^.]*)(?P<rest>\..+)")


def read_header(source: Path | Reader) -> GgufHeader:
    """Read the header of a model: a path finds all its split parts, a reader is one whole file."""
    if isinstance(source, Path):
        return read_parts([(str(path), FileReader(path)) for path in part_paths(source)])
    return read_parts([("the model", source)])


def part_names(name: str) -> tuple[str, ...]:
    """All file names of a split model, given one of them; the name itself for any other."""
    match = SPLIT_NAME.fullmatch(name)
    if not match:
        return (name,)
    prefix, count = match["prefix"], int(match["count"])
    if not 1 <= int(match["no"]) <= count <= MAX_PARTS:
        raise ModelError(f"the name says part {int(match['no'])} of {count}", where=name)
    return tuple(f"{prefix}-{no:05d}-of-{count:05d}.gguf" for no in range(1, count + 1))


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the model at `path`, each checked to be there."""
    paths = tuple(path.with_name(name) for name in part_names(path.name))
    for part in paths:
        _require_file(part, len(paths))
    return paths


def _require_file(path: Path, n_parts: int) -> None:
    if path.is_dir():
        raise ModelError("is a folder, not a GGUF file", where=str(path), hint=f"ls {path}")
    if not path.exists():
        what = "no such file" if n_parts == 1 else f"this part of {n_parts} is missing"
        raise ModelError(what, where=str(path), hint=f"ls -l {path.parent}")


def read_parts(parts: Sequence[tuple[str, Reader]]) -> GgufHeader:
    """Read the header of every part, first part first, and put them together."""
    files = [_PartReader(where, reader).read() for where, reader in parts]
    _check_parts(files)
    tensors = sorted((tensor for file in files for tensor in file.tensors), key=_by_layer)
    twice = _duplicate(tensors)
    if twice:
        raise ModelError(f"tensor {twice} is there twice", where=files[0].where, hint="download the file again")
    return GgufHeader(
        metadata=dict(sorted(files[0].metadata.items())),
        array_lengths=dict(sorted(files[0].array_lengths.items())),
        tensors=tuple(tensors),
        size_bytes=sum(file.size_bytes for file in files),
        n_parts=len(files),
    )


@dataclass(frozen=True)
class _Part:
    where: str
    metadata: Mapping[str, Value]
    array_lengths: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    size_bytes: int


def _check_parts(files: Sequence[_Part]) -> None:
    """Each part must say that it is the one its name says, and together they must hold all tensors."""
    first = files[0]
    for no, file in enumerate(files):
        said = file.metadata.get("split.count", 1), file.metadata.get("split.no", 0)
        if said != (len(files), no) and not (len(files) == 1 and said[0] in (0, 1)):
            raise ModelError(
                f"the header says part {_plus_one(said[1])} of {said[0]}, "
                f"but it was read as part {no + 1} of {len(files)}",
                where=file.where,
                hint="keep the names that the split model was published with: PREFIX-00001-of-0000N.gguf",
            )
    n_tensors, said_tensors = (
        sum(len(file.tensors) for file in files),
        first.metadata.get("split.tensors.count"),
    )
    if said_tensors is not None and said_tensors != n_tensors:
        raise ModelError(f"the parts hold {n_tensors} tensors, the header says {said_tensors}", where=first.where)


def _plus_one(value: Value) -> Value:
    return value + 1 if isinstance(value, int) else value


def _duplicate(tensors: Iterable[Tensor]) -> str:
    """Return the first name that comes twice, or nothing."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            return tensor.name
        seen.add(tensor.name)
    return ""


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Split `blk.7.attn_q.weight` into `("blk.", 7, ".attn_q.weight")`; None outside the layers."""
    match = LAYER_NAME.fullmatch(name)
    if not match or not match["layers"].isdecimal():
        return None
    return match["front"], int(match["layers"]), match["rest"]


def _by_layer(tensor: Tensor) -> tuple[str, int, str]:
    return split_layer(tensor.name) or (tensor.name, -1, "")


class _PartReader:
    """A cursor over one file that holds one window of it."""

    def __init__(self, where: str, reader: Reader) -> None:
        self.where = where
        self.reader = reader
        self.window = b""
        self.window_at = 0
        self.pos = 0
        try:
            self.size = reader.size
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", where=where) from error

    def read(self) -> _Part:
        n_tensors, n_kv = self._read_counts()
        metadata, array_lengths = self._read_metadata(n_kv)
        alignment = self._alignment(metadata)
        tensors = self._read_tensors(n_tensors, alignment)
        self._check_length(tensors, alignment)
        return _Part(self.where, metadata, array_lengths, tensors, self.size)

    def _fail(self, what: str, *, hint: str = "") -> NoReturn:
        raise ModelError(what, where=self.where, hint=hint)

    # -- bytes ----------------------------------------

    def _view(self, n: int) -> int:
        """Make `n` bytes at `pos` readable and return where they are in the window."""
        at = self.pos - self.window_at
        if at >= 0 and at + n <= len(self.window):
            return at
        self._check_room(n)
        try:
            wanted = WINDOW_BYTES if self.window else FIRST_WINDOW_BYTES
            self.window = self.reader.read(self.pos, min(max(n, wanted), self.size - self.pos))
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", where=self.where) from error
        self.window_at = self.pos
        if len(self.window) < n:
            self._truncated(self.pos + len(self.window))
        return 0

    def _check_room(self, n: int) -> None:
        if n > MAX_HEADER_BYTES:
            self._fail(f"a value at byte {self.pos} claims {n} bytes", hint="download the file again")
        if self.pos + n > self.size:
            self._truncated(self.size)
        if self.pos + n > MAX_HEADER_BYTES:
            self._fail(f"the header is longer than {MAX_HEADER_BYTES // MIB} MiB", hint="download the file again")

    def _truncated(self, end: int) -> NoReturn:
        self._fail(
            f"the header is cut off: only {end} bytes are there and it goes on",
            hint="the download is not complete: download the file again, or read more of its front",
        )

    def _skip(self, n: int) -> None:
        self._check_room(n)
        self.pos += n

    def _bytes(self, n: int) -> bytes:
        at = self._view(n)
        self.pos += n
        return self.window[at : at + n]

    def _number(self, kind: struct.Struct) -> Number:
        at = self._view(kind.size)
        self.pos += kind.size
        value: Number = kind.unpack_from(self.window, at)[0]
        return value

    def _u32(self) -> int:
        return int(self._number(U32))

    def _u64(self) -> int:
        return int(self._number(U64))

    def _text(self, limit: int, what: str) -> str:
        n = self._u64()
        if n > limit:
            self._fail(f"{what} at byte {self.pos - 8} claims {n} bytes, more than {limit}")
        return self._bytes(n).decode("utf-8", "replace")

    def _skip_strings(self, n: int) -> None:
        """Step over `n` strings without making them: the inner loop of every vocabulary."""
        unpack = U64.unpack_from
        left = n
        while left:
            at = self._view(8)
            window, end = self.window, len(self.window) - 8
            while left and at <= end:
                at += 8 + unpack(window, at)[0]
                left -= 1
            self.pos = self.window_at + at
            self._check_room(0)

    # -- header ----------------------------------------

    def _read_counts(self) -> tuple[int, int]:
        magic = self._bytes(min(4, self.size))
        if magic != b"GGUF":
            self._fail(f"is not a GGUF file: it starts with {magic!r}", hint="name a file that ends in .gguf")
        self._check_version(self._u32())
        n_tensors, n_kv = self._u64(), self._u64()
        if n_tensors > MAX_TENSORS:
            self._fail(f"the header claims {n_tensors} tensors, more than {MAX_TENSORS}")
        if n_kv > MAX_KEYS:
            self._fail(f"the header claims {n_kv} metadata keys, more than {MAX_KEYS}")
        return n_tensors, n_kv

    def _check_version(self, version: int) -> None:
        if version and version & 0xFFFF == 0:
            self._fail("is a big-endian GGUF file", hint="take the little-endian file of the same model")
        if version == 1:
            self._fail("is a GGUF file of version 1, which llama.cpp no longer reads", hint="convert the model anew")
        if version not in (2, 3):
            self._fail(f"is a GGUF file of version {version}; 2 and 3 are known", hint="update labdeploy")

    def _read_metadata(self, n_kv: int) -> tuple[dict[str, Value], dict[str, int]]:
        metadata: dict[str, Value] = {}
        array_lengths: dict[str, int] = {}
        seen: set[str] = set()
        for _ in range(n_kv):
            key = self._text(MAX_KEY_BYTES, "a metadata key")
            if key in seen:
                self._fail(f"metadata key {key!r} is there twice")
            seen.add(key)
            self._read_value(key, metadata, array_lengths)
        return metadata, array_lengths

    def _read_value(self, key: str, metadata: dict[str, Value], array_lengths: dict[str, int]) -> None:
        kind = self._u32()
        if kind == ARRAY_TYPE:
            self._read_array(key, metadata, array_lengths)
        elif kind == STRING_TYPE:
            self._read_string(key, metadata)
        elif kind in SCALARS:
            value = self._number(SCALARS[kind])
            if is_kept(key):
                metadata[key] = value
        else:
            self._fail(f"metadata key {key!r} has the unknown type {kind}")

    def _read_string(self, key: str, metadata: dict[str, Value]) -> None:
        if is_kept(key):
            metadata[key] = self._text(MAX_KEPT_STRING_BYTES, f"the text of {key!r}")
            return
        self._skip(self._u64())

    def _read_array(self, key: str, metadata: dict[str, Value], array_lengths: dict[str, int]) -> None:
        kind, n = self._u32(), self._u64()
        if kind == ARRAY_TYPE:
            self._fail(f"metadata key {key!r} is an array of arrays, which GGUF does not allow")
        if kind != STRING_TYPE and kind not in SCALARS:
            self._fail(f"metadata key {key!r} is an array of the unknown type {kind}")
        if key in LENGTH_KEYS:
            array_lengths[key] = n
        if kind == STRING_TYPE:
            self._check_room(8 * n)
            self._skip_strings(n)
        elif is_kept(key):
            metadata[key] = self._numbers(key, SCALARS[kind], n)
        else:
            self._skip(n * SCALARS[kind].size)

    def _numbers(self, key: str, kind: struct.Struct, n: int) -> Value:
        if n > MAX_KEPT_ARRAY:
            self._fail(f"metadata key {key!r} claims {n} numbers, more than {MAX_KEPT_ARRAY}")
        return tuple(value for (value,) in kind.iter_unpack(self._bytes(n * kind.size)))

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment}, which is not a power of two")
        return alignment

    # -- tensors ----------------------------------------

    def _read_tensors(self, n_tensors: int, alignment: int) -> tuple[Tensor, ...]:
        tensors = []
        expected = 0
        for _ in range(n_tensors):
            tensor, offset = self._read_tensor()
            if offset != expected:
                self._fail(f"tensor {tensor.name} starts at {offset} of the data, not at {expected}")
            expected += _pad(tensor.n_bytes, alignment)
            tensors.append(tensor)
        return tuple(tensors)

    def _read_tensor(self) -> tuple[Tensor, int]:
        name = self._text(MAX_NAME_BYTES, "a tensor name")
        self._check_name(name)
        n_dims = self._u32()
        if n_dims > MAX_DIMS:
            self._fail(f"tensor {name} claims {n_dims} dimensions, more than {MAX_DIMS}")
        shape = tuple(self._u64() for _ in range(n_dims))
        number = self._u32()
        if number not in TENSOR_TYPES:
            self._fail(f"tensor {name} has the unknown type {number}", hint="update labdeploy")
        kind = TENSOR_TYPES[number]
        problem = _shape_problem(shape, kind)
        if problem:
            self._fail(f"tensor {name}: {problem}")
        return Tensor(name, shape, kind.name), self._u64()

    def _check_name(self, name: str) -> None:
        match = LAYER_NAME.fullmatch(name)
        layers = match["layers"] if match else "0"
        if not TENSOR_NAME.fullmatch(name) or (layers[:1].isdigit() and layers != str(_int_or(layers, -1))):
            self._fail(f"a tensor is called {name!r}, which is no name that llama.cpp writes")

    def _check_length(self, tensors: Sequence[Tensor], alignment: int) -> None:
        """Compare the length of the file with what its tensors need: a download may have stopped early."""
        if not tensors:
            return
        padded = sum(_pad(tensor.n_bytes, alignment) for tensor in tensors[:-1])
        end = _pad(self.pos, alignment) + padded + tensors[-1].n_bytes
        if end > self.size:
            self._fail(
                f"{end - self.size} bytes are missing: the file has {self.size}, its tensors end at {end}",
                hint="the download is not complete: download the file again",
            )


def _shape_problem(shape: tuple[int, ...], kind: TensorType) -> str:
    """Say why a shape cannot be, or nothing."""
    if not all(0 < n <= MAX_ELEMENTS for n in shape):
        return f"a dimension of {_dims(shape)} is not a positive number"
    if math.prod(shape) > MAX_ELEMENTS // kind.n_bytes:
        return f"its dimensions {_dims(shape)} overflow"
    if (shape[0] if shape else 1) % kind.block:
        return f"rows of {shape[0] if shape else 1} elements do not divide into the {kind.block} of {kind.name}"
    return ""


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _int_or(text: str, default: int) -> int:
    return int(text) if text.isdecimal() and text.isascii() else default


def _dims(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def is_kept(key: str) -> bool:
    """Planning uses this key."""
    return key in GENERAL_KEYS or key in PROJECTOR_KEYS or key.partition(".")[2] in ARCH_KEYS


# -- lock ----------------------------------------


def to_lock(header: GgufHeader) -> dict[str, object]:
    """Return plain values for YAML; like tensors share a line: `blk.0-35.attn_q.weight Q4_K 4096x4096`."""
    lock: dict[str, object] = {"size_bytes": header.size_bytes}
    if header.n_parts > 1:
        lock["n_parts"] = header.n_parts
    lock["metadata"] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in header.metadata.items()
    }
    lock["array_lengths"] = dict(header.array_lengths)
    lock["tensors"] = _tensor_lines(header.tensors)
    return lock


def _tensor_lines(tensors: Iterable[Tensor]) -> list[str]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for tensor in tensors:
        front, layer, rest = _by_layer(tensor)
        groups.setdefault((front, rest, f"{tensor.type} {_dims(tensor.shape)}".rstrip()), []).append(layer)
    return [f"{front}{_ranges(layers) if rest else ''}{rest} {kind}" for (front, rest, kind), layers in groups.items()]


def _ranges(layers: Sequence[int]) -> str:
    """`[0, 1, 2, 7]` as `0-2,7`; the layers come sorted."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)


def from_lock(lock: object, where: str = "model") -> GgufHeader:
    """Read back what `to_lock` wrote; `where` is the path of this entry in the lock, for errors."""
    reader = _LockReader(where)
    entry = reader.mapping(lock, "", {"size_bytes", "n_parts", "metadata", "array_lengths", "tensors"})
    return GgufHeader(
        metadata=reader.metadata(entry.get("metadata")),
        array_lengths=reader.lengths(entry.get("array_lengths", {})),
        tensors=reader.tensors(entry.get("tensors")),
        size_bytes=reader.count(entry.get("size_bytes"), ".size_bytes"),
        n_parts=reader.count(entry.get("n_parts", 1), ".n_parts"),
    )


@dataclass(frozen=True)
class _LockReader:
    where: str

    def fail(self, path: str, what: str) -> NoReturn:
        raise InventoryError(what, where=self.where + path, hint="labdeploy inspect FILE --add NAME writes it anew")

    def mapping(self, value: object, path: str, allowed: Iterable[str] = ()) -> dict[str, object]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self.fail(path, f"must be a mapping, not {_brief(value)}")
        for key in value:
            if allowed and key not in allowed:
                self.fail(f"{path}.{key}", f"is not known here; known are {', '.join(sorted(allowed))}")
        return value

    def count(self, value: object, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_ELEMENTS:
            self.fail(path, f"must be a positive number, not {_brief(value)}")
        return value

    def lengths(self, value: object) -> dict[str, int]:
        entries = self.mapping(value, ".array_lengths")
        return {key: self.length(entry, f".array_lengths.{key}") for key, entry in sorted(entries.items())}

    def length(self, value: object, path: str) -> int:
        return 0 if value == 0 else self.count(value, path)

    def metadata(self, value: object) -> dict[str, Value]:
        entries = self.mapping(value, ".metadata")
        return {key: self.value(entry, f".metadata.{key}") for key, entry in sorted(entries.items())}

    def value(self, value: object, path: str) -> Value:
        if isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list) and len(value) <= MAX_KEPT_ARRAY:
            return self.numbers(value, path)
        return self.fail(path, f"must be a number, a text or a list of numbers, not {_brief(value)}")

    def numbers(self, values: list[object], path: str) -> Value:
        numbers = tuple(value for value in values if isinstance(value, bool | int | float))
        if len(numbers) < len(values):
            self.fail(path, "must be a list of numbers")
        return numbers

    def tensors(self, value: object) -> tuple[Tensor, ...]:
        if not isinstance(value, list):
            self.fail(".tensors", f"must be a list, not {_brief(value)}")
        tensors: list[Tensor] = []
        for no, line in enumerate(value):
            tensors += self.tensor_line(line, f".tensors[{no}]")
            if len(tensors) > MAX_TENSORS:
                self.fail(f".tensors[{no}]", f"more than {MAX_TENSORS} tensors")
        twice = _duplicate(tensors)
        if twice:
            self.fail(".tensors", f"tensor {twice} is there twice")
        return tuple(sorted(tensors, key=_by_layer))

    def tensor_line(self, line: object, path: str) -> list[Tensor]:
        words = line.split(" ") if isinstance(line, str) else []
        if len(words) not in (2, 3) or words[1] not in TYPE_BY_NAME:
            self.fail(
                path,
                f"must be NAME TYPE SHAPE, as in blk.0-35.attn_q.weight Q4_K 4096x4096, not {_brief(line)}",
            )
        shape = self.shape(words[2], path) if words[2:] else ()
        problem = _shape_problem(shape, TYPE_BY_NAME[words[1]])
        if problem:
            self.fail(path, problem)
        return [Tensor(name, shape, words[1]) for name in self.names(words[0], path)]

    def shape(self, text: str, path: str) -> tuple[int, ...]:
        sizes = text.split("x")
        if len(sizes) > MAX_DIMS or not all(_DIMENSION.fullmatch(size) for size in sizes):
            self.fail(path, f"the shape must read like 4096x4096, not {_brief(text)}")
        return tuple(map(int, sizes))

    def names(self, text: str, path: str) -> list[str]:
        match = LAYER_NAME.fullmatch(text)
        if not TENSOR_NAME.fullmatch(text) and not match:
            self.fail(path, f"{_brief(text)} is no tensor name")
        if not match or not match["layers"][:1].isdigit():
            return [text]
        return [f"{match['front']}{layer}{match['rest']}" for layer in self.layers(match["layers"], path)]

    def layers(self, text: str, path: str) -> Iterable[int]:
        for run in text.split(","):
            match = _RUN.fullmatch(run)
            first, last = (int(match["first"]), int(match["last"] or match["first"])) if match else (1, 0)
            if not first <= last < first + MAX_TENSORS:
                self.fail(path, f"the layers must read like 0-3,7,9-35, not {_brief(text)}")
            yield from range(first, last + 1)


_DIMENSION = re.compile(r"[1-9][0-9]{0,18}")
_RUN = re.compile(r"(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004 - one line of a terminal
