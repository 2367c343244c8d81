"""A snapshot folder is somebody else's: what it says is read exactly, and what cannot be is refused in place."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from labdeploy.errors import InventoryError, ModelError
from labdeploy.models.safetensors import from_lock, read_header, read_snapshot, to_lock

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "sliding_window": None,
}
TENSORS = {"a": ("BF16", [4, 8], 64), "b": ("F32", [2], 8)}


def header_of(tensors: dict[str, tuple[str, list[int], int]], **extra: object) -> dict[str, Any]:
    """Lay tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, n_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    return header | extra


def write(path: Path, header: object, n_data: int) -> Path:
    """Write a safetensors file whose tensors are zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(n_data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a snapshot of one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write(tmp_path / "model.safetensors", header_of(TENSORS), 72)
    return tmp_path


def configured(folder: Path, **changes: object) -> Path:
    """Change keys of config.json."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_sizes_come_from_the_headers(folder: Path):
    """The files are what a start reads, the tensors are what memory holds."""
    snapshot = read_snapshot(folder)
    assert snapshot.size_bytes == (folder / "model.safetensors").stat().st_size
    assert snapshot.weights_bytes == 72
    assert snapshot.tensor_bytes == {"BF16": 64, "F32": 8}


def test_config_keys_are_read_under_every_name_they_have(folder: Path):
    """GPT-2 names the same numbers otherwise, and has as many KV heads as heads."""
    assert read_snapshot(folder).n_key_value_heads == 2
    old = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 10, "n_positions": 1024, "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(old))
    snapshot = read_snapshot(folder)
    assert (snapshot.n_layer, snapshot.n_key_value_heads, snapshot.head_dim) == (2, 4, 16)
    assert (snapshot.intermediate_size, snapshot.max_model_len, snapshot.dtype) == (256, 1024, "bfloat16")


def test_the_language_part_of_a_larger_model_counts(folder: Path):
    """Memory depends on text_config; what it leaves out is looked up outside."""
    outer = {"architectures": ["X"], "torch_dtype": "float16", "text_config": CONFIG | {"torch_dtype": None}}
    (folder / "config.json").write_text(json.dumps(outer))
    snapshot = read_snapshot(folder)
    assert (snapshot.n_layer, snapshot.dtype, snapshot.architectures) == (4, "float16", ("X",))


@pytest.mark.parametrize(
    ("changes", "derived", "default"),
    [
        ({}, 40960, 40960),
        ({"seq_length": 2048}, 2048, 2048),
        ({"max_position_embeddings": None}, 2048, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 81920, 81920),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 40960, 40960),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 40960, 40960),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 40960, 40960),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}}}, 81920, 81920),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 40960, 4096),
        ({"rope_scaling": {"type": "linear", "factor": None}}, 40960, 40960),
    ],
)
def test_the_length_is_derived_as_vllm_derives_it(folder: Path, changes: dict[str, Any], derived: int, default: int):
    """One token more and vLLM refuses to start (config/model.py, _get_and_verify_max_len)."""
    snapshot = read_snapshot(configured(folder, **changes))
    assert (snapshot.max_model_len, snapshot.default_model_len) == (derived, default)


@pytest.mark.parametrize(
    ("changes", "window", "n"),
    [
        ({"sliding_window": 4096}, 4096, 4),
        ({"sliding_window": 4096, "use_sliding_window": False}, None, 0),
        ({"sliding_window": 512, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, 512, 3),
        ({"sliding_window": 512, "sliding_window_pattern": 2}, 512, 2),
    ],
)
def test_sliding_layers_are_counted(folder: Path, changes: dict[str, Any], window: int | None, n: int):
    """Only they keep less than the whole context."""
    snapshot = read_snapshot(configured(folder, **changes))
    assert (snapshot.sliding_window, snapshot.n_sliding_layers) == (window, n)


def test_layers_that_keep_a_state_are_noticed(folder: Path):
    """Their memory is not that of a KV cache."""
    assert not read_snapshot(folder).keeps_state
    assert read_snapshot(configured(folder, layer_types=["linear_attention"] * 4)).keeps_state
    assert read_snapshot(configured(folder, model_type="falcon_h1")).keeps_state


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt_fp4"),
        ({}, None),
    ],
)
def test_the_quantization_is_named_as_vllm_names_it(folder: Path, section: dict[str, Any], name: str | None):
    """The checks of compute capability look it up by that name."""
    assert read_snapshot(configured(folder, quantization_config=section)).quantization == name


def test_modelopt_has_a_file_of_its_own(folder: Path):
    """Its config.json says nothing of the quantization."""
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert read_snapshot(folder).quantization == "modelopt"


# --- parts -------------------------------------------------------------------------------------------------------


def in_parts(folder: Path, total_size: object = 144) -> Path:
    """Put an index over two parts beside a stray file."""
    for name in ("part-1.safetensors", "part-2.safetensors"):
        write(folder / name, header_of(TENSORS), 72)
    weight_map = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_only_the_parts_of_the_index_count(folder: Path):
    """A folder may hold a consolidated copy too, which vLLM does not load."""
    assert read_snapshot(in_parts(folder)).weights_bytes == 144


def test_a_missing_part_is_named(folder: Path):
    """A download that stopped early must not be planned as a smaller model."""
    (in_parts(folder) / "part-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 parts are missing: part-2\.safetensors"):
        read_snapshot(folder)


def test_the_index_alone_is_enough(folder: Path):
    """A copy of the small files lets a plan be made before 40 GB are downloaded."""
    in_parts(folder, 144.0)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    snapshot = read_snapshot(folder)
    assert snapshot.size_bytes == snapshot.weights_bytes == 144


@pytest.mark.parametrize("total", [-1, True, "1", 1.5, 2**60])
def test_a_strange_total_is_refused(folder: Path, total: object):
    """It would become a plan."""
    with pytest.raises(ModelError, match="total_size"):
        read_snapshot(in_parts(folder, total))


def test_the_index_cannot_name_files_elsewhere(folder: Path):
    """Snapshots come from strangers."""
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    with pytest.raises(ModelError, match="name files of this folder"):
        read_snapshot(folder)


# --- broken files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "claims a header of 0 bytes"),
        (struct.pack("<Q", 100_000_001), "claims a header of 100000001 bytes"),
        (struct.pack("<Q", 2**63), "claims a header of"),
        (struct.pack("<Q", 50) + b"{}", "ends after 2 of 50 bytes"),
        (struct.pack("<Q", 2) + b"[]", "must hold a JSON object"),
        (struct.pack("<Q", 4) + b"{\xff\xff}", "not valid JSON"),
        (struct.pack("<Q", 2_000_000) + b"[" * 2_000_000, "not valid JSON"),
    ],
)
def test_a_broken_start_is_refused(tmp_path: Path, content: bytes, what: str):
    """Nothing is read on the word of a file."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=what) as caught:
        read_header(path)
    assert caught.value.where == str(path)


def entry(**changes: object) -> dict[str, Any]:
    """Give the entry of a tensor with some of it changed."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (entry(data_offsets=[4, 12]), "starts at byte 4 of the data, not at 0"),
        (entry(data_offsets=[8, 0]), "is not -8 bytes"),
        (entry(data_offsets=[0, 8, 9]), "two data_offsets"),
        (entry(data_offsets=[0, 2**70]), "two data_offsets"),
        (entry(data_offsets=[False, True]), "two data_offsets"),
        (entry(shape=[-1, -2]), "two data_offsets"),
        (entry(shape=[3]), "is not 8 bytes"),
        (entry(dtype="F128"), "unknown dtype"),
        (entry(dtype=["F32"]), "needs dtype"),
        ("no", "needs dtype"),
        (entry(shape=[4], data_offsets=[0, 16]), "8 bytes are missing: the tensors take 16, the file has 8"),
        (entry(shape=[1], data_offsets=[0, 4]), "4 bytes follow the last tensor"),
    ],
)
def test_a_broken_tensor_is_refused(tmp_path: Path, tensor: object, what: str):
    """Tensors lie back to back from the first byte to the last, each as long as its shape says."""
    with pytest.raises(ModelError, match=what):
        read_header(write(tmp_path / "x.safetensors", {"t": tensor}, 8))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 20, 100, 200])
def test_a_file_cut_anywhere_is_refused(folder: Path, n: int):
    """A download may stop at any byte."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(ModelError):
        read_snapshot(folder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads must be"),
        ({"vocab_size": 2**50}, "vocab_size must be"),
        ({"head_dim": "64"}, "head_dim must be"),
        ({"max_position_embeddings": [1]}, "max_position_embeddings must be"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "RoPE factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "RoPE factor"),
        ({"text_config": []}, "text_config is not a mapping"),
    ],
)
def test_a_broken_config_is_refused(folder: Path, changes: dict[str, Any], what: str):
    """Each with the key, in the file it is in."""
    with pytest.raises(ModelError, match=what) as caught:
        read_snapshot(configured(folder, **changes))
    assert caught.value.where == str(folder / "config.json")


def test_what_is_no_snapshot_says_what_to_name(tmp_path: Path):
    """The commonest mistake is the folder of a GGUF file."""
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        read_snapshot(tmp_path)
    assert "llama-server" in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        read_snapshot(tmp_path)


# --- lock --------------------------------------------------------------------------------------------------------


def test_the_lock_gives_back_what_went_in(folder: Path):
    """`render` must not need the files."""
    snapshot = read_snapshot(folder)
    lock = json.loads(json.dumps(to_lock(snapshot)))
    assert lock["format"] == "safetensors"
    assert from_lock(lock) == snapshot


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "gguf"),
        ("n_layer", "4"),
        ("n_layer", -1),
        ("n_layer", None),
        ("n_layer", True),
        ("dtype", None),
        ("quantization", 4),
        ("keeps_state", 1),
        ("architectures", [1]),
        ("tensor_bytes", {"BF16": "64"}),
        ("tensor_bytes", [1]),
        ("more", 1),
    ],
)
def test_a_broken_lock_says_where(folder: Path, key: str, value: object):
    """It is a file in git that people merge."""
    lock = to_lock(read_snapshot(folder)) | {key: value}
    with pytest.raises(InventoryError) as caught:
        from_lock(lock, "models.qwen")
    assert caught.value.where.startswith("models.qwen")
    assert caught.value.hint
