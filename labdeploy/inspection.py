"""Look into a model: a local file or folder, or a file on a host, of which only the header is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labdeploy.models import gguf, safetensors
from labdeploy.models.shape import ModelShape, model_shape
from labdeploy.runners.llama_memory import LlamaMemorySettings, memory

if TYPE_CHECKING:
    from labdeploy.host import HostConnection
    from labdeploy.inventory import Inventory

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Inspection:
    """What a model is, in every form that is asked for."""

    lock_entry: dict[str, Any]
    json: dict[str, Any]
    text: str


class _RemoteFile:
    """A file on a host, read in ranges over one SSH connection."""

    def __init__(self, connection: HostConnection, path: str) -> None:
        self._connection, self._path = connection, path
        self.size = connection.file_size(path)

    def read(self, offset: int, n: int) -> bytes:
        """Read a range."""
        return self._connection.read_file(self._path, offset, n)


def inspect(source: str, inventory: Inventory | None) -> Inspection:
    """Read a model's header and say what it costs; ModelError where it is none."""
    path = Path(source)
    if path.is_dir():
        snapshot = safetensors.read_snapshot(path)
        return _snapshot(source, snapshot)
    if inventory is not None and not path.exists() and ":" in source:
        return _gguf(source, _read_remote(source, inventory))
    return _gguf(source, gguf.read_header(path))


def _read_remote(source: str, inventory: Inventory) -> gguf.GgufHeader:
    from labdeploy.host import HostConnection  # noqa: PLC0415

    name, _, path = source.partition(":")
    folder, slash, file = path.rpartition("/")
    with HostConnection(inventory.host(name), inventory.folder) as connection:
        parts = [f"{folder}{slash}{part}" for part in gguf.part_names(file)]
        return gguf.read_parts([(f"{name}:{part}", _RemoteFile(connection, part)) for part in parts])


def _gguf(source: str, header: gguf.GgufHeader) -> Inspection:
    shape = model_shape(header, source)
    contexts = {str(n): round(_context_mib(shape, n), 2) for n in CONTEXTS if n <= max(shape.n_ctx_train, CONTEXTS[0])}
    facts = {
        "arch": shape.arch,
        "name": shape.name,
        "file_type": shape.file_type,
        "n_layer": shape.n_layer,
        "n_ctx_train": shape.n_ctx_train,
        "n_embd": shape.n_embd,
        "n_vocab": shape.n_vocab,
        "n_expert": shape.n_expert,
        "n_params": shape.n_params,
        "size_bytes": shape.size_bytes,
        "known_arch": shape.known_arch,
        "context_mib": contexts,
    }
    return Inspection({"format": "gguf", **gguf.to_lock(header)}, facts, _text(source, facts))


def _context_mib(shape: ModelShape, n_ctx: int) -> float:
    return float(memory(shape, LlamaMemorySettings(ctx_size=n_ctx)).host.context_mib)


def _snapshot(source: str, snapshot: safetensors.Snapshot) -> Inspection:
    entry = safetensors.to_lock(snapshot)
    facts = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    facts |= {"arch": snapshot.model_type, "n_ctx_train": snapshot.max_model_len}
    return Inspection(entry, facts, _text(source, facts))


def _text(source: str, facts: dict[str, Any]) -> str:
    lines = [source]
    for key, value in facts.items():
        if key == "context_mib":
            lines += [f"  context of {int(n):>6} tokens: {mib:>9.1f} MiB" for n, mib in value.items()]
        elif key == "size_bytes":
            lines.append(f"  {key}: {value} ({value / 2**30:.2f} GiB)")
        elif value not in (None, "", 0):
            lines.append(f"  {key}: {value}")
    return "\n".join(lines) + "\n"
