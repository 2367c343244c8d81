"""Find for each file of a manifest somebody who has it: here, or another host."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.model_copy import Item, LocalFile, host_item
from labdeploy.models.files import read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from labdeploy.inventory import Inventory
    from labdeploy.model_files import Store
    from labdeploy.models.files import ModelFile, StoredModel

    Stores = Mapping[str, Store | LabdeployError]


def wanted(inventory: Inventory, manifest: Path, hosts: Sequence[str]) -> dict[str, list[StoredModel]]:
    """Give the models that hosts shall have: those of the manifest, or of these of its hosts."""
    listed = read_manifest(manifest)
    names = [host.name for host in inventory.select(hosts)] if hosts else list(listed)
    missing = [name for name in names if name not in listed]
    if missing:
        what = f"lists nothing for {', '.join(missing)}"
        raise InventoryError(what, where=str(manifest), hint=f"it has {', '.join(listed) or 'no hosts'}")
    return {inventory.host(name).name: listed[name] for name in names}


def items(
    inventory: Inventory, wanted: Mapping[str, Sequence[StoredModel]], stores: Stores, folders: Iterable[Path]
) -> dict[str, list[list[Item]]]:
    """Give what to copy to each host, model by model; InventoryError names every file that nobody has."""
    here = _LocalFiles([*_copies(inventory), *folders])
    found: dict[str, list[list[Item]]] = {}
    nobody: list[str] = []
    for host, models in wanted.items():
        there = _sums(stores.get(host))
        for model in models:
            lacks = [file for file in model.files if there.get(file.name) != file.sha256]
            sources = [(file, here.item(file) or _elsewhere(inventory, stores, file)) for file in lacks]
            nobody += [f"{host}: nobody has {f.name} with sha256 {f.sha256}" for f, item in sources if item is None]
            if got := [item for _, item in sources if item]:
                found.setdefault(host, []).append(got)
    if nobody:
        raise InventoryError("\n".join(nobody), hint="labdeploy models restore MANIFEST --from DIR  # where they are")
    return found


def _copies(inventory: Inventory) -> Iterator[Path]:
    yield from (inventory.folder / model.local for model in inventory.models.values() if model.local)


def _sums(store: Store | LabdeployError | None) -> dict[str, str]:
    if store is None or isinstance(store, LabdeployError):
        return {}
    return {file.name: file.sha256 for model in store.models for file in model.files}


def _elsewhere(inventory: Inventory, stores: Stores, file: ModelFile) -> Item | None:
    """Find a host that has this content, under whatever name."""
    for name, store in stores.items():
        for model in () if isinstance(store, LabdeployError) else store.models:
            for other in model.files:
                if other.sha256 == file.sha256 and not isinstance(store, LabdeployError):
                    return host_item(inventory, inventory.host(name), store.folder, other, file.name)
    return None


class _LocalFiles:
    """Files of this machine by size; one is read only when a file of its size is looked for."""

    def __init__(self, places: Iterable[Path]) -> None:
        self._by_size: dict[int, list[Path]] = {}
        self._sums: dict[Path, str] = {}
        for place in places:
            for path in place.rglob("*") if place.is_dir() else [place]:
                if path.is_file():
                    self._by_size.setdefault(path.stat().st_size, []).append(path)

    def item(self, file: ModelFile) -> Item | None:
        """Give an item of the file with this content."""
        for path in self._by_size.get(file.size_bytes, []):
            if self._sum(path) == file.sha256:
                return Item(file.name, file.size_bytes, file.mtime, str(path.resolve()), lambda p=path: LocalFile(p))  # type: ignore[misc]
        return None

    def _sum(self, path: Path) -> str:
        if path not in self._sums:
            with path.open("rb") as opened:
                self._sums[path] = hashlib.file_digest(opened, "sha256").hexdigest()
        return self._sums[path]
