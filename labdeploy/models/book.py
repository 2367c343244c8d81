"""The models of an inventory: each read once, from a local copy of its files, else from the lock."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.models import gguf
from labdeploy.models.model import ModelFacts
from labdeploy.models.shape import ModelShape, model_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from labdeploy.inventory import Inventory
    from labdeploy.models.safetensors import Snapshot


class ModelBook:
    """The models of one inventory, each read at most once."""

    def __init__(self, inventory: Inventory, lock: Mapping[str, Any]) -> None:
        self._inventory = inventory
        self._lock = lock.get("models", {})
        self._entries: dict[str, ModelShape | Snapshot] = {}

    def facts(self, name: str, models_dir: str) -> ModelFacts:
        """Give what is known of a model; InventoryError where nothing is."""
        if name not in self._entries:
            self._entries[name] = self._load(name)
        known = self._entries[name]
        return ModelFacts(
            name=name,
            path=f"{models_dir.rstrip('/')}/{self._inventory.models[name].path}",
            size_bytes=known.size_bytes,
            format="gguf" if isinstance(known, ModelShape) else "safetensors",
            shape=known if isinstance(known, ModelShape) else None,
            snapshot=None if isinstance(known, ModelShape) else known,
        )

    def known(self, models_dir: str) -> Iterator[ModelFacts]:
        """Give every model of the inventory whose shape is known."""
        for name in self._inventory.models:
            with contextlib.suppress(LabdeployError):
                yield self.facts(name, models_dir)

    def _load(self, name: str) -> ModelShape | Snapshot:
        from labdeploy.models import safetensors  # noqa: PLC0415

        local = self._inventory.models[name].local
        if local and (path := self._inventory.folder / local).exists():
            return safetensors.read_snapshot(path) if path.is_dir() else model_shape(gguf.read_header(path), str(path))
        if entry := self._lock.get(name):
            kind = entry.get("format") if isinstance(entry, dict) else None
            if kind == "safetensors":
                return safetensors.from_lock(entry, f"models.{name}")
            header = {key: value for key, value in entry.items() if key != "format"} if kind else entry
            return model_shape(gguf.from_lock(header, f"models.{name}"), f"models.{name}")
        tried = f"{self._inventory.folder / local} does not exist and " if local else ""
        raise InventoryError(
            f"nothing is known of its shape: {tried}{self._inventory.lock_path.name} has no entry for it",
            where=f"models.{name} ({self._inventory.path})",
            hint=f"labdeploy inspect FILE --add {name}  (a local copy, or HOST:/path of one on a host)",
        )
