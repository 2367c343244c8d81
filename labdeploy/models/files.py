"""Models as files below a folder: which files are one model, what identifies it, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from labdeploy.errors import InventoryError, ModelError
from labdeploy.models import gguf

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Kind = Literal["gguf", "split", "snapshot", "file"]
CONFIG = "config.json"
FORMAT = 1  # of a manifest; a later one that older programs cannot read gets another number


@dataclass(frozen=True)
class ModelFile:
    """A file below a folder of models."""

    name: str
    """Its path below the folder."""
    size_bytes: int
    mtime: str = ""
    """Seconds since 1970, with nanoseconds."""
    sha256: str = ""
    """Empty where it is not known."""
    reference: str = ""
    """What it had when it came, or when it was first read."""
    source: str = ""
    """Where it was copied from; empty where labdeploy did not copy it."""
    users: tuple[str, ...] = ()
    """`generation 7`, `unit llama.service`, `process llama-server (812)`."""


@dataclass(frozen=True)
class StoredModel:
    """What a service would name: a file, the parts of a split one, or a snapshot folder."""

    name: str
    """The path below the folder that a service names: of a split model, that of its first part."""
    kind: Kind
    files: tuple[ModelFile, ...]
    """In the order to write them: the one by which runners find the model comes last."""
    missing: tuple[str, ...] = ()
    """Parts of a split model that are not there."""

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """Give the sum of its one file; of several, the sum of what `sha256sum` prints of them, sorted by name."""
        if any(not file.sha256 for file in self.files):
            return ""
        if self.kind in ("gguf", "file"):
            return self.files[0].sha256
        folder = self.name if self.kind == "snapshot" else self.name.rpartition("/")[0]
        lines = [f"{f.sha256}  {f.name.removeprefix(f'{folder}/')}\n" for f in sorted(self.files, key=_name)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def users(self) -> tuple[str, ...]:
        """Who uses any of its files, each once."""
        return tuple(dict.fromkeys(user for file in self.files for user in file.users))

    @property
    def is_changed(self) -> bool:
        """Whether a file is not what it was when it came."""
        return any(f.sha256 and f.reference and f.sha256 != f.reference for f in self.files)


def _name(file: ModelFile) -> str:
    return file.name


def grouped(files: Iterable[ModelFile]) -> list[StoredModel]:
    """Put files together that are one model; what belongs to no other is one by itself."""
    by_name = {file.name: file for file in files}
    folders = _snapshot_folders(by_name)
    groups: dict[tuple[Kind, str], list[ModelFile]] = {}
    for file in by_name.values():
        groups.setdefault(_model_of(file.name, folders), []).append(file)
    models = [_stored(kind, name, found) for (kind, name), found in groups.items()]
    return sorted(models, key=lambda model: model.name)


def _snapshot_folders(names: Iterable[str]) -> list[str]:
    """Find the folders that hold a config.json and weights; one inside another belongs to the outer one."""
    names = set(names)
    weights = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    found = sorted(folder for folder in weights if folder and f"{folder}/{CONFIG}" in names)
    return [folder for folder in found if not any(folder.startswith(f"{outer}/") for outer in found)]


def _model_of(name: str, snapshots: Sequence[str]) -> tuple[Kind, str]:
    for folder in snapshots:
        if name.startswith(f"{folder}/"):
            return "snapshot", folder
    if not name.endswith(".gguf"):
        return "file", name
    parts = parts_of(name)
    return ("split", parts[0]) if len(parts) > 1 else ("gguf", name)


def parts_of(name: str) -> tuple[str, ...]:
    """Name all parts of a split model with their folder, given one of them; the name itself for any other."""
    folder, slash, file = name.rpartition("/")
    try:
        return tuple(f"{folder}{slash}{part}" for part in gguf.part_names(file))
    except ModelError:  # part 7 of 3: whatever it is, it is a file
        return (name,)


def _stored(kind: Kind, name: str, files: Sequence[ModelFile]) -> StoredModel:
    there = {file.name for file in files}
    missing = tuple(part for part in parts_of(name) if part not in there) if kind == "split" else ()
    return StoredModel(
        name, kind, tuple(sorted(files, key=lambda file: (_finds(kind, name, file), file.name))), missing
    )


def _finds(kind: Kind, name: str, file: ModelFile) -> bool:
    """Say whether this is the file by which runners find the model."""
    return file.name == (f"{name}/{CONFIG}" if kind == "snapshot" else name)


def require_plain(name: str) -> str:
    """Give a path below a models folder as it is; refuse what leads out of it or could not be seen there."""
    steps = name.split("/")
    bad = next((step for step in steps if step in ("", "..") or step.startswith(".")), None)
    if bad is not None or not name.isprintable():
        what = "must be relative, without `..`, hidden names and control characters"
        raise InventoryError(f"{name!r} is no place below models_dir: it {what}", hint="labdeploy models push --help")
    return name


# --- the manifest ---------------------------------------------------------------------------------------------


def manifest(hosts: Mapping[str, tuple[str, Sequence[StoredModel]]], at: str) -> dict[str, Any]:
    """List what is on hosts (folder and models by host), so that it can be put there again."""
    return {
        "labdeploy_models": FORMAT,
        "at": at,
        "hosts": {
            host: {"models_dir": folder, "models": [_model_entry(model) for model in models]}
            for host, (folder, models) in hosts.items()
        },
    }


def _model_entry(model: StoredModel) -> dict[str, Any]:
    return {"name": model.name, "kind": model.kind, "files": [_file_entry(file) for file in model.files]}


def _file_entry(file: ModelFile) -> dict[str, Any]:
    keys = ("name", "size_bytes", "sha256", "mtime", "source")
    return {key: value for key in keys if (value := getattr(file, key)) != ""}


def read_manifest(path: Path) -> dict[str, list[StoredModel]]:
    """Read a manifest: the models of each host; InventoryError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["labdeploy_models"] != FORMAT:
            raise InventoryError(f"has format {found['labdeploy_models']}, not {FORMAT}", where=str(path))
        return {str(host): list(_models(entry["models"])) for host, entry in found["hosts"].items()}
    except OSError as error:
        hint = "labdeploy models backup -o FILE  # writes one"
        raise InventoryError(f"cannot be read: {error.strerror}", where=str(path), hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "labdeploy models backup -o FILE  # writes one"
        what = f"is not a manifest of models: {type(error).__name__}: {error}"
        raise InventoryError(what, where=str(path), hint=hint) from None


def _models(entries: Iterable[Mapping[str, Any]]) -> Iterator[StoredModel]:
    for entry in entries:
        files = [
            ModelFile(
                name=require_plain(str(file["name"])),
                size_bytes=int(file["size_bytes"]),
                mtime=str(file["mtime"]),
                sha256=str(file["sha256"]),
                source=str(file.get("source", "")),
            )
            for file in entry["files"]
        ]
        yield StoredModel(str(entry["name"]), entry["kind"], tuple(files))
