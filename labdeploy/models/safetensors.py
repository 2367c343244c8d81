"""Hugging Face snapshot folders: config.json and the headers of their safetensors files, as one `Snapshot`.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (`{name: {dtype, shape,
data_offsets}}`) and the tensors, back to back (safetensors 0.6, src/tensor.rs). Only the JSON is read.
Everything in a snapshot is somebody else's: every number is bounded, and what cannot be is a ModelError.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from labdeploy.errors import InventoryError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000  # MAX_HEADER_SIZE of safetensors 0.6, src/tensor.rs
MAX_JSON_BYTES = 64 * 1024 * 1024  # config.json is a few KiB; the index of a 600 GB model is 10 MiB
MAX_NUMBER = 2**40
MAX_BYTES = 2**53  # far above any model, and exact in every JSON reader
INDEX_NAME = "model.safetensors.index.json"
NO_LENGTH_KNOWN = 2048  # what vLLM takes where config.json names no length

# Bits of one element (safetensors 0.6, src/tensor.rs, enum Dtype).
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The keys that vLLM takes the least of (0.33, config/model.py, _get_and_verify_max_len).
LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# RoPE kinds whose `factor` is already in max_position_embeddings (same place).
ROPE_IN_LENGTH = (
    "su",
    "longrope",
    "llama3",
    "yarn",
    "deepseek_yarn",
    "deepseek_llama_scaling",
)
# Layer kinds that keep a state of fixed size instead of, or beside, keys and values.
_STATE_KINDS = re.compile(r"linear|mamba|recurrent|ssm|conv|rwkv|gdn|kda", re.IGNORECASE)
_STATE_MODELS = re.compile(r"mamba|jamba|rwkv|bamba|zamba|falcon_h1|nemotron_h|lfm2|minimax_text", re.IGNORECASE)


@dataclass(frozen=True)
class Snapshot:
    """What is known of a snapshot without loading it. Sizes in bytes, lengths in tokens."""

    architectures: tuple[str, ...]
    model_type: str
    size_bytes: int
    """All *.safetensors files: what a start reads from disk."""
    tensor_bytes: Mapping[str, int]
    """Bytes of the tensors by safetensors dtype (`BF16`); `?` where only the index was there to say."""
    dtype: str
    """`bfloat16`, `float16` or `float32`: of config.json, else of most of the tensors."""
    quantization: str | None
    hidden_size: int
    intermediate_size: int
    n_layer: int
    n_attention_heads: int
    n_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    """The longest context vLLM accepts for it."""
    default_model_len: int
    """The context vLLM takes unasked: shorter only where the model was stretched by LongRoPE."""
    sliding_window: int | None
    n_sliding_layers: int
    kv_lora_rank: int
    """Above 0: multi-head latent attention keeps this many numbers and `qk_rope_head_dim` more per token."""
    qk_rope_head_dim: int
    keeps_state: bool
    """Some layers keep a state of fixed size (Mamba and its kin)."""
    tie_word_embeddings: bool

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.tensor_bytes.values())

    @property
    def is_mla(self) -> bool:
        """Whether it keeps one latent vector per token and layer instead of keys and values."""
        return self.kv_lora_rank > 0


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot folder; ModelError says what is missing or malformed, and where."""
    config = _Config.read(path)
    size_bytes, tensor_bytes = _weights(path)
    return Snapshot(
        architectures=config.words("architectures"),
        model_type=config.word("model_type"),
        size_bytes=size_bytes,
        tensor_bytes=tensor_bytes,
        dtype=config.dtype(tensor_bytes),
        quantization=_quantization(path, config),
        hidden_size=config.count("hidden_size", "n_embd", "d_model"),
        intermediate_size=config.intermediate_size(),
        n_layer=config.count("num_hidden_layers", "n_layer", "n_layers"),
        n_attention_heads=config.n_heads(),
        n_key_value_heads=config.n_key_value_heads(),
        head_dim=config.head_dim(),
        vocab_size=config.count("vocab_size"),
        max_model_len=config.max_model_len(),
        default_model_len=config.default_model_len(),
        sliding_window=config.sliding_window(),
        n_sliding_layers=config.n_sliding_layers(),
        kv_lora_rank=config.optional("kv_lora_rank"),
        qk_rope_head_dim=config.optional("qk_rope_head_dim"),
        keeps_state=config.keeps_state(),
        tie_word_embeddings=bool(config.value("tie_word_embeddings")),
    )


# --- config.json --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """Typed reads of config.json, each with an error that names the key.

    A model of several parts keeps its language part under `text_config`: that one says what memory depends
    on, and the outer one is asked where it is silent.
    """

    where: str
    outer: Mapping[str, Any]
    text: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Config:
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError("has no config.json", where=str(folder), hint=_folder_hint(folder))
        outer = _json_object(path)
        text = outer.get("text_config", outer)
        if not isinstance(text, dict):
            raise ModelError("text_config is not a mapping", where=str(path))
        return cls(str(path), outer, text)

    def fail(self, what: str) -> NoReturn:
        raise ModelError(what, where=self.where, hint="is the download complete, and of a language model?")

    def value(self, *keys: str) -> Any:  # noqa: ANN401 (JSON)
        found = (part[key] for part in (self.text, self.outer) for key in keys if part.get(key) is not None)
        return next(found, None)

    def count(self, *keys: str) -> int:
        """Give a number that must be there, under the first of its names that is."""
        value = self.value(*keys)
        if value is None:
            self.fail(f"{keys[0]} is missing")
        return self._number(value, keys[0], least=1)

    def optional(self, *keys: str) -> int:
        """Give a number that may be missing: 0 then."""
        value = self.value(*keys)
        return 0 if value is None else self._number(value, keys[0], least=0)

    def _number(self, value: object, key: str, *, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_NUMBER:
            self.fail(f"{key} must be a whole number from {least} on, not {_brief(value)}")
        return value

    def word(self, key: str) -> str:
        value = self.value(key)
        return value if isinstance(value, str) else ""

    def words(self, key: str) -> tuple[str, ...]:
        value = self.outer.get(key)
        return tuple(word for word in value if isinstance(word, str)) if isinstance(value, list) else ()

    def n_heads(self) -> int:
        return self.count("num_attention_heads", "n_head", "n_heads")

    def n_key_value_heads(self) -> int:
        return self.optional("num_key_value_heads", "num_kv_heads", "n_head_kv") or self.n_heads()

    def head_dim(self) -> int:
        hidden, heads = self.count("hidden_size", "n_embd", "d_model"), self.n_heads()
        found = self.optional("head_dim") or hidden // heads
        if found < 1:
            self.fail(f"hidden_size {hidden} is less than num_attention_heads {heads}")
        return found

    def intermediate_size(self) -> int:
        """Give the width of the widest feed-forward; 4 x hidden where none is named, as GPT-2 has it."""
        hidden = self.count("hidden_size", "n_embd", "d_model")
        return self.optional("intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden

    def dtype(self, tensor_bytes: Mapping[str, int]) -> str:
        """Name the dtype of the checkpoint: as config.json has it, else that of most tensors."""
        named = self.value("dtype", "torch_dtype")  # the second is how it was called before Transformers 5
        if isinstance(named, str) and named.removeprefix("torch.") in DTYPE_NAMES.values():
            return named.removeprefix("torch.")
        floats = {DTYPE_NAMES[name]: n for name, n in tensor_bytes.items() if name in DTYPE_NAMES}
        return max(floats, key=lambda name: floats[name], default="float32")

    # -- lengths

    def _ropes(self) -> list[dict[str, Any]]:
        """List what is said of RoPE; since Transformers 5 there may be one for each kind of layer."""
        rope = self.value("rope_parameters", "rope_scaling")
        if not isinstance(rope, dict):
            return []
        inner = [each for each in rope.values() if isinstance(each, dict)]
        return inner or [rope]

    def _rope_kinds(self) -> list[str]:
        return [str(rope.get("rope_type", rope.get("type", "default"))) for rope in self._ropes()]

    def max_model_len(self) -> int:
        """Give the longest context vLLM 0.33 accepts (config/model.py): the least length times RoPE."""
        lengths = [self._number(self.text[key], key, least=1) for key in LENGTH_KEYS if self.text.get(key)]
        if not lengths:
            return NO_LENGTH_KNOWN
        if "gemma3" in self.word("model_type"):
            return min(lengths)
        return int(min(lengths) * self._rope_factor())

    def _rope_factor(self) -> float:
        factor: float = 1
        for rope, kind in zip(self._ropes(), self._rope_kinds(), strict=True):
            if kind not in ROPE_IN_LENGTH and rope.get("factor") is not None:
                factor = rope["factor"]
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not number or not 1 <= factor <= MAX_NUMBER:
            self.fail(f"the RoPE factor must be a number from 1 on, not {_brief(factor)}")
        return factor

    def default_model_len(self) -> int:
        """Give the context vLLM takes unasked: with LongRoPE the length before it was stretched."""
        kinds = self._rope_kinds()
        if kinds and all(kind in ("longrope", "su") for kind in kinds):
            inner = self._ropes()[0].get("original_max_position_embeddings")
            original = self.value("original_max_position_embeddings") or inner
            if original:
                return min(
                    self._number(original, "original_max_position_embeddings", least=1),
                    self.max_model_len(),
                )
        return self.max_model_len()

    # -- layers

    def _layer_types(self) -> tuple[str, ...]:
        value = self.value("layer_types", "layers_block_type")
        return tuple(map(str, value)) if isinstance(value, list) else ()

    def sliding_window(self) -> int | None:
        """Give the window in tokens, where there is one and it is in use."""
        if self.value("use_sliding_window") is False:
            return None
        return self.optional("sliding_window") or None

    def n_sliding_layers(self) -> int:
        """Count the layers that see only a window: as listed, else by the pattern, else all of them."""
        if self.sliding_window() is None:
            return 0
        n_layer = self.count("num_hidden_layers", "n_layer", "n_layers")
        if kinds := self._layer_types():
            return min(n_layer, sum("sliding" in kind for kind in kinds))
        if period := self.optional("sliding_window_pattern"):
            return n_layer - n_layer // period
        return n_layer

    def keeps_state(self) -> bool:
        kinds = any(_STATE_KINDS.search(kind) for kind in self._layer_types())
        return kinds or bool(_STATE_MODELS.search(self.word("model_type")))


def _quantization(folder: Path, config: _Config) -> str | None:
    """Name the quantization as vLLM does: of config.json, else of ModelOpt's own file."""
    section = config.value("quantization_config", "compression_config")
    if isinstance(section, dict):
        method = section.get("quant_method", "")
        return _modelopt(str(section.get("quant_algo", ""))) if method == "modelopt" else str(method) or None
    own = folder / "hf_quant_config.json"
    if own.is_file():
        section = _json_object(own).get("quantization")
        return _modelopt(str(section.get("quant_algo", "")) if isinstance(section, dict) else "")
    return None


def _modelopt(algorithm: str) -> str:
    return "modelopt_fp4" if "FP4" in algorithm else "modelopt"


def _json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; bounded, so that no file can fill the memory."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"is {size} bytes long, more than {MAX_JSON_BYTES}", where=str(path))
        return _parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not valid JSON: {error}", where=where, hint="download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"must hold a JSON object, not {_brief(value)}", where=where)
    return value


def _folder_hint(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return "name the .gguf file itself and serve it with llama-server"
    return "name the snapshot folder: the one that holds config.json and *.safetensors"


# --- weights ------------------------------------------------------------------------------------------------


def _weights(folder: Path) -> tuple[int, dict[str, int]]:
    """Give the bytes of the files, and of their tensors by dtype.

    Where there is an index, it says which files count. A copy that holds the small files only (config.json
    and the index) is good enough for a plan: the index has the total.
    """
    index = _read_index(folder)
    files = sorted(folder.glob("*.safetensors"))
    if index and not files:
        return index.total_size, {"?": index.total_size}
    if not files:
        raise ModelError("has no *.safetensors files", where=str(folder), hint=_folder_hint(folder))
    if index:
        files = _listed(folder, files, index)
    tensor_bytes: dict[str, int] = {}
    for path in files:
        for dtype, n in read_header(path):
            tensor_bytes[dtype] = tensor_bytes.get(dtype, 0) + n
    return sum(path.stat().st_size for path in files), dict(sorted(tensor_bytes.items()))


@dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json: the files of a model in parts, and the bytes of all tensors."""

    files: frozenset[str]
    total_size: int


def _read_index(folder: Path) -> _Index | None:
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    content = _json_object(path)
    metadata, weight_map = content.get("metadata", {}), content.get("weight_map", {})
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
        raise ModelError("metadata and weight_map must be mappings", where=str(path))
    total, files = metadata.get("total_size", 0), weight_map.values()
    if isinstance(total, float) and total.is_integer():  # some writers leave a float here
        total = int(total)
    if isinstance(total, bool) or not isinstance(total, int) or not 0 <= total <= MAX_BYTES:
        raise ModelError(f"total_size must be a number of bytes, not {_brief(total)}", where=str(path))
    if not all(isinstance(name, str) and "/" not in name for name in files):
        raise ModelError("weight_map must name files of this folder", where=str(path))
    return _Index(frozenset(files), total)


def _listed(folder: Path, files: list[Path], index: _Index) -> list[Path]:
    """Give the files that the index names; all of them must be there."""
    here = {path.name: path for path in files}
    if missing := sorted(index.files - here.keys()):
        raise ModelError(
            f"{len(missing)} of {len(index.files)} parts are missing: {missing[0]}"
            + (f" to {missing[-1]}" if missing[1:] else ""),
            where=str(folder),
            hint="the download is not complete: fetch the missing parts",
        )
    return [here[name] for name in sorted(index.files)] or files


def read_header(path: Path) -> list[tuple[str, int]]:
    """Give the dtype and the bytes of each tensor of one file; its data must be all there."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0  # noqa: PLR2004 (bytes of a u64)
            if not 2 <= length <= MAX_HEADER_BYTES:  # noqa: PLR2004 (the shortest JSON object is {})
                _broken(path, f"claims a header of {length} bytes; 2 to {MAX_HEADER_BYTES} are possible")
            text = file.read(length)
        data_bytes = path.stat().st_size - 8 - length
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if len(text) < length:
        _broken(path, f"ends after {len(text)} of {length} bytes of its header")
    header = _parse_object(text, str(path))
    return list(_tensors(path, header, data_bytes))


def _tensors(path: Path, header: Mapping[str, Any], data_bytes: int) -> Iterator[tuple[str, int]]:
    """Check that the tensors lie back to back from the first byte of the data to the last, and yield them."""
    entries = [_entry(path, name, value) for name, value in header.items() if name != "__metadata__"]
    end = 0
    for name, dtype, begin, stop in sorted(entries, key=lambda entry: entry[2:]):
        if begin != end:
            _broken(path, f"tensor {_brief(name)} starts at byte {begin} of the data, not at {end}")
        end = stop
        yield dtype, stop - begin
    if end > data_bytes:
        _broken(path, f"{end - data_bytes} bytes are missing: the tensors take {end}, the file has {data_bytes}")
    if end < data_bytes:
        _broken(path, f"{data_bytes - end} bytes follow the last tensor")


def _entry(path: Path, name: str, value: object) -> tuple[str, str, int, int]:
    """Read one tensor of a header: its name, dtype, first byte and the byte after its last."""
    entry = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (
        entry.get("dtype"),
        _counts(entry.get("shape")),
        _counts(entry.get("data_offsets")),
    )
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:  # noqa: PLR2004 (two)
        _broken(path, f"tensor {_brief(name)} needs dtype, shape and two data_offsets, it has {_brief(value)}")
    begin, stop = offsets
    if dtype not in BITS:
        _broken(path, f"tensor {_brief(name)} has the unknown dtype {_brief(dtype)}", hint="update labdeploy")
    if (stop - begin) * 8 != math.prod(shape) * BITS[dtype]:
        _broken(path, f"tensor {_brief(name)}: {shape} of {dtype} is not {stop - begin} bytes")
    return name, dtype, begin, stop


def _counts(value: object) -> list[int] | None:
    """Give a JSON value back if it is a list of numbers that sizes can be."""
    if not isinstance(value, list):
        return None
    good = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= MAX_BYTES for x in value)
    return value if good else None


def _broken(path: Path, what: str, *, hint: str = "the download is not complete: fetch the file again") -> NoReturn:
    raise ModelError(what, where=str(path), hint=hint)


# --- lock ---------------------------------------------------------------------------------------------------


def to_lock(snapshot: Snapshot) -> dict[str, Any]:
    """Give a snapshot as plain values for the lock."""
    values: dict[str, Any] = {"format": "safetensors"}
    for declared in dataclasses.fields(Snapshot):
        value = getattr(snapshot, declared.name)
        values[declared.name] = list(value) if isinstance(value, tuple) else value
    return values | {"tensor_bytes": dict(snapshot.tensor_bytes)}


def from_lock(lock: object, where: str = "model") -> Snapshot:
    """Read back what `to_lock` wrote; `where` is the path of this entry in the lock, for errors."""
    if not isinstance(lock, dict) or lock.get("format") != "safetensors":
        _lock_problem(where, "must be a mapping with format: safetensors")
    known = {declared.name: str(declared.type) for declared in dataclasses.fields(Snapshot)}
    for name in lock:
        if name not in known and name != "format":
            _lock_problem(f"{where}.{name}", "is not known here")
    return Snapshot(**{name: _lock_value(lock.get(name), kind, f"{where}.{name}") for name, kind in known.items()})


def _lock_value(value: Any, kind: str, where: str) -> Any:  # noqa: ANN401 (of the kind the field declares)
    """Check one value against the type its field declares."""
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    if kind.startswith("Mapping") and isinstance(value, dict):
        return {str(key): _lock_value(size, "int", f"{where}.{key}") for key, size in value.items()}
    if not _is_plain(value, kind):
        _lock_problem(where, f"must be of type {kind}, not {_brief(value)}")
    return value


def _is_plain(value: object, kind: str) -> bool:
    """Tell whether a value is of a plain type such as `int | None`; numbers within bounds."""
    if value is None or isinstance(value, bool):
        return kind.endswith("None") if value is None else kind == "bool"
    if isinstance(value, int):
        return kind.startswith("int") and 0 <= value <= MAX_BYTES
    return isinstance(value, str) and kind.startswith("str")


def _lock_problem(where: str, what: str) -> NoReturn:
    raise InventoryError(what, where=where, hint="labdeploy inspect DIR --add NAME writes it anew")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004 (one line of a terminal)
