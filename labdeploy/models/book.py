"""What is known beside the inventory: models, each read once from a local copy or the lock, and what hosts said."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.facts.machine import Machine, from_lock
from labdeploy.models import gguf
from labdeploy.models.model import ModelFacts
from labdeploy.models.projector import Projector, is_projector, projector
from labdeploy.models.shape import ModelShape, model_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from labdeploy.facts.build import Build
    from labdeploy.inventory import Host, Inventory
    from labdeploy.models.safetensors import Snapshot


class ModelBook:
    """The models of one inventory, each read at most once; and its machines, as far as they were probed."""

    def __init__(self, inventory: Inventory, lock: Mapping[str, Any]) -> None:
        self._inventory = inventory
        self._lock = lock
        self._entries: dict[str, ModelShape | Projector | Snapshot] = {}
        self._machines: dict[str, Machine | None] = {}

    def facts(self, name: str, models_dir: str) -> ModelFacts:
        """Give what is known of a model; InventoryError where nothing is."""
        if name not in self._entries:
            self._entries[name] = self._load(name)
        known = self._entries[name]
        return ModelFacts(
            name=name,
            path=f"{models_dir.rstrip('/')}/{self._inventory.models[name].path}",
            size_bytes=known.size_bytes,
            **_told(known),
        )

    def at(self, path: str) -> str:
        """Say where a dotted path stands in the inventory."""
        return self._inventory.at(path)

    def machine(self, host: str) -> Machine | None:
        """Give what a host said of itself; None where it was never probed."""
        if host not in self._machines:
            self._machines[host] = from_lock(self._lock, host)
        return self._machines[host]

    def build(self, host: Host, runner: str) -> Build | None:
        """Give the build of a runner on a host; None where another program, or none, was probed."""
        machine = self.machine(host.name)
        build = machine.runners.get(runner) if machine else None
        return build if build and build.path == host.runners.get(runner) else None

    def served(self, name: str, models_dir: str) -> ModelFacts:
        """Give what is known of a model that is to answer; InventoryError where it cannot."""
        facts = self.facts(name, models_dir)
        if facts.projector:
            raise InventoryError(
                f"model {name} is an encoder of images or sounds, which answers nothing by itself",
                hint=f"write mmproj: {name}, and under model: the model that it belongs to",
            )
        return facts

    def known(self, models_dir: str) -> Iterator[ModelFacts]:
        """Give every model of the inventory whose shape is known, and that can answer."""
        for name in self._inventory.models:
            with contextlib.suppress(LabdeployError):
                yield self.served(name, models_dir)

    def _load(self, name: str) -> ModelShape | Projector | Snapshot:
        from labdeploy.models import safetensors  # noqa: PLC0415

        local = self._inventory.models[name].local
        if local and (path := self._inventory.folder / local).exists():
            return safetensors.read_snapshot(path) if path.is_dir() else _described(gguf.read_header(path), str(path))
        if entry := self._lock.get("models", {}).get(name):
            kind = entry.get("format") if isinstance(entry, dict) else None
            if kind == "safetensors":
                return safetensors.from_lock(entry, f"models.{name}")
            header = {key: value for key, value in entry.items() if key != "format"} if kind else entry
            return _described(gguf.from_lock(header, f"models.{name}"), f"models.{name}")
        tried = f"{self._inventory.folder / local} does not exist and " if local else ""
        raise InventoryError(
            f"nothing is known of its shape: {tried}{self._inventory.lock_path.name} has no entry for it",
            where=self.at(f"models.{name}"),
            hint=f"labdeploy inspect FILE --add {name}  # a local copy, or HOST:/path of one on a host",
        )


def _described(header: gguf.GgufHeader, where: str) -> ModelShape | Projector:
    return projector(header, where) if is_projector(header) else model_shape(header, where)


def _told(known: ModelShape | Projector | Snapshot) -> dict[str, Any]:
    """Give what a model's facts say of its kind."""
    if isinstance(known, Projector):
        return {"format": "projector", "projector": known}
    if isinstance(known, ModelShape):
        return {"format": "gguf", "shape": known}
    return {"format": "safetensors", "snapshot": known}
