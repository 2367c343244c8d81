"""What an inventory was rendered to the last time, by hash alone: a push that has nothing to do need not plan again.

Planning and rendering are pure, so the same inputs have the same hash. What is kept is that hash for each host, how the
host is reached, and everything it depends on. Files are never kept: what a host asks for is planned and rendered anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labdeploy import kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from labdeploy.inventory import Host, Inventory

RENDERERS = ("jinja2", "yaml")  # packages of others that have a say in what a rendered file looks like

Stamp = tuple[int, ...] | None
"""What changes when a file does: size, times and inode; None where there is none."""


@dataclass(frozen=True)
class Login:
    """How a host is reached, as in the inventory."""

    user: str | None
    port: int | None
    key: str | None
    known_hosts: str | None


@dataclass(frozen=True)
class Push:
    """What a push has to know of a host before it asks for more."""

    name: str
    address: str | None
    ssh: Login
    services: tuple[str, ...]
    content_hash: str
    deadline_s: int
    """What all its services together are given to start."""
    together: tuple[str, ...] = ()
    """Hosts that move with it or not at all, itself among them."""


def push_of(host: Host, content_hash: str, deadline_s: int, together: Iterable[str] = ()) -> Push:
    """Cut a host of the inventory down to that."""
    ssh = Login(host.ssh.user, host.ssh.port, host.ssh.key, host.ssh.known_hosts)
    return Push(host.name, host.address, ssh, tuple(host.services), content_hash, deadline_s, tuple(sorted(together)))


class Memory:
    """What is remembered of one inventory and one choice of hosts."""

    def __init__(self, inventory: Path, words: Sequence[str]) -> None:
        self._inventory = inventory.absolute()
        self._file = kept.file("pushes", "XDG_CACHE_HOME", ".cache", inventory, words)
        self._inputs = _inputs(self._inventory)

    def recall(self) -> list[Push] | None:
        """Give what was kept if all that it depends on is as it was; else None."""
        try:
            known = json.loads(self._file.read_bytes())
            if known["inputs"] != self._inputs or any(_stamp(Path(p)) != _stamp_of(s) for p, s in known["models"]):
                return None
            return [_push(each) for each in known["pushes"]]
        except (OSError, ValueError, TypeError, KeyError):  # of an older labdeploy, or cut off: it is written anew
            return None

    def keep(self, pushes: Iterable[Push], inventory: Inventory) -> None:
        """Remember; where that cannot be written, or an input has just changed, nothing is lost but time."""
        if _inputs(self._inventory) != self._inputs:
            return
        models = [(str(path), _stamp(path)) for path in _model_files(inventory)]
        text = {"inputs": self._inputs, "models": models, "pushes": [asdict(each) for each in pushes]}
        kept.keep(self._file, json.dumps(text))


def _push(known: dict[str, Any]) -> Push:
    lists = {name: tuple(known[name]) for name in ("services", "together")}
    return Push(**{**known, "ssh": Login(**known["ssh"]), **lists})


def _inputs(inventory: Path) -> str:
    """Name all that rendering reads but models: this program, the inventory, its lock, templates beside it."""
    told = hashlib.sha256(f"{sys.version} {_program()}".encode())
    beside = sorted(path for path in (inventory.parent / "templates").rglob("*") if path.is_file())
    for path in (inventory, inventory.with_name(inventory.stem + ".lock.yaml"), *beside):
        told.update(f"{path} {_content_hash(path)}\n".encode())
    return told.hexdigest()


def _program() -> list[tuple[str, Stamp]]:
    """Stamp each file of labdeploy, and where the packages that it renders with lie."""
    here = Path(__file__).parent
    others = [Path(spec.origin) for name in RENDERERS if (spec := find_spec(name)) and spec.origin]
    return [(str(path), _stamp(path)) for path in (*sorted(_own_files(here)), *others)]


def _own_files(package: Path) -> Iterator[Path]:
    for top in (package, package.parent / "templates"):
        for at, folders, files in os.walk(top):
            folders[:] = [name for name in folders if name != "__pycache__"]
            yield from (Path(at, name) for name in files)


def _model_files(inventory: Inventory) -> Iterator[Path]:
    """Name the local copies of models, which shapes are read from, also those that are not there."""
    for model in inventory.models.values():
        if model.local:
            path = inventory.folder.absolute() / model.local
            yield path
            yield from sorted(path.iterdir()) if path.is_dir() else ()


def _content_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "-"


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _stamp_of(known: list[int] | None) -> Stamp:
    return None if known is None else tuple(known)
