"""Copy models onto hosts, from here or from another host: what is cut off goes on where it stopped.

The receiving host has the last word: a file gets its name there when all of it is on the disk and its sha256 is that
of the source. See model_files.sh.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from labdeploy import model_files
from labdeploy.errors import HostError, InventoryError, LabdeployError, LockedError
from labdeploy.host import HostConnection
from labdeploy.model_files import run
from labdeploy.models.files import ModelFile, StoredModel, grouped, parts_of, require_plain
from labdeploy.schema import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from labdeploy.host import Line, Write
    from labdeploy.inventory import Host, Inventory
    from labdeploy.model_files import OnLine

CHUNK = 1 << 17  # bytes read and sent at a time
TRIES = 6  # in a row in which nothing more arrived
FIRST_WAIT_S = 1.0  # doubled each time: 31 s in all, after which a host lets go of a copy that stands still


class Source(Protocol):
    """A file to copy from, while it is open."""

    def __enter__(self) -> Self:
        """Open it."""

    def __exit__(self, *_: object) -> None:
        """Close it."""

    def start(self, offset: int) -> str:
        """Go to an offset, and give the sha256 of what is before it."""

    def rest(self) -> Iterator[bytes]:
        """Give what comes after the offset."""

    def sha256(self) -> str:
        """Give the sha256 of all of it, after the rest was read."""


@dataclass(frozen=True)
class Item:
    """One file to copy: its place below the models folder of the receiving host, and where it comes from."""

    name: str
    size_bytes: int
    mtime: str
    origin: str
    open: Callable[[], Source]


@dataclass(frozen=True)
class Copied:
    """How a copy ended."""

    name: str
    result: str
    """`copied`, `replaced` or `unchanged`."""
    size_bytes: int
    sha256: str
    sent_bytes: int = 0
    kept_bytes: int = 0
    """What was there already from a copy that was cut off."""
    cuts: int = 0
    seconds: float = 0
    warnings: tuple[str, ...] = ()


# --- sources ------------------------------------------------------------------------------------------------------


class LocalFile:
    """A file of this machine; its sum is taken while it is sent, so that it is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise InventoryError(f"cannot be read: {error.strerror}", where=str(self._path)) from None
        self._before = os.fstat(self._file.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def start(self, offset: int) -> str:
        """Read up to an offset."""
        self._file.seek(0)
        self._digest = hashlib.sha256()
        for _ in self._read(offset):
            pass
        return self._digest.hexdigest()

    def rest(self) -> Iterator[bytes]:
        """Read on to the end."""
        return self._read(None)

    def sha256(self) -> str:
        """Give the sum of all that was read; InventoryError where the file changed meanwhile."""
        after = os.fstat(self._file.fileno())
        if (after.st_size, after.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            raise InventoryError("changed while it was copied", where=str(self._path), hint="the same command again")
        return self._digest.hexdigest()

    def _read(self, n: int | None) -> Iterator[bytes]:
        while chunk := self._chunk(CHUNK if n is None else min(n, CHUNK)):
            n = None if n is None else n - len(chunk)
            self._digest.update(chunk)
            yield chunk

    def _chunk(self, n: int) -> bytes:
        try:
            return self._file.read(n)
        except OSError as error:  # told as what it is, for an OSError is also how a connection ends
            raise InventoryError(f"cannot be read: {error.strerror}", where=str(self._path)) from error


class HostFile:
    """A file of another host, which takes the sums itself; what is sent only passes through here."""

    def __init__(self, host: Host, inventory_folder: Path, folder: str, name: str) -> None:
        self._connection = HostConnection(host, inventory_folder)
        self._folder = folder
        self._name = name
        self._offset = 0

    def __enter__(self) -> Self:
        self._connection.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__()

    def start(self, offset: int) -> str:
        """Have the host read up to an offset."""
        self._offset = offset
        return self._sum(str(offset)) if offset else ""

    def rest(self) -> Iterator[bytes]:
        """Fetch from the offset on."""
        return self._connection.read_on(f"{self._folder}/{self._name}", self._offset, model_files.SILENCE_S)

    def sha256(self) -> str:
        """Ask the host for the sum of all of it, which it knows if it was read once."""
        return self._sum("-")

    def _sum(self, n: str) -> str:
        lines = run(self._connection, "sum", self._folder, self._name, n)
        return next(line.field(0) for line in lines if line.kind == "result")


def find(inventory: Inventory, source: str, name: str | None) -> list[Item]:
    """Find what to copy: a file or folder here, `HOST:MODEL`, or a model of the inventory that has a local copy."""
    path = Path(source).expanduser()
    host, colon, place = source.partition(":")
    own_name = path.absolute().name if path.exists() else place.rstrip("/").rpartition("/")[2]
    if name and name.endswith("/"):  # a folder, as for cp
        name += own_name
    if path.exists():
        return local_items(path, name or _place_of(inventory, path) or own_name)
    if colon and host in inventory.hosts:
        return _host_items(inventory, inventory.host(host), place, name)
    if source in inventory.models and (local := inventory.models[source].local):
        return local_items(inventory.folder / local, name or inventory.models[source].path)
    here = f"{source} is no file here{did_you_mean(source, inventory.models)}"
    hint = "name a file or folder, HOST:MODEL, or a model of the inventory that has `local:`"
    raise InventoryError(here, hint=hint)


def _place_of(inventory: Inventory, path: Path) -> str | None:
    """Give the path below models_dir of the model whose local copy this is."""
    for model in inventory.models.values():
        if model.local and (inventory.folder / model.local).resolve() == path.resolve():
            return model.path
    return None


def local_items(path: Path, name: str) -> list[Item]:
    """List the files of a model here: one, all parts of a split one, or a folder without what is hidden in it."""
    found = dict(_local_files(path, require_plain(name.rstrip("/"))))
    files = [_local(target, file) for target, file in found.items() if file.is_file()]
    models = grouped(files)
    if len(models) != 1:
        what = f"holds {len(models)} models; a folder is one where a config.json lies beside .safetensors files"
        raise InventoryError(what, where=str(path), hint="push the files in it one by one")
    model = models[0]
    if model.missing:
        what = f"{len(model.missing)} of its parts are missing, the first: {model.missing[0]}"
        raise InventoryError(what, where=str(path), hint=f"ls -l {path.absolute().parent}")

    def opener(file: ModelFile) -> Callable[[], Source]:
        return lambda: LocalFile(found[file.name])

    return [Item(f.name, f.size_bytes, f.mtime, str(found[f.name].resolve()), opener(f)) for f in model.files]


def _local_files(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            below = file.relative_to(path)
            if file.is_file() and not any(step.startswith(".") for step in below.parts):
                yield require_plain(f"{name}/{below.as_posix()}"), file
        return
    parts, targets = parts_of(path.name), parts_of(name)
    if len(parts) != len(targets):
        what = f"{path.name} is one of {len(parts)} parts, {name} one of {len(targets)}"
        raise InventoryError(what, where="--as", hint=f"--as NAME{path.name[-len('-00001-of-00003.gguf') :]}")
    yield from ((target, path.with_name(part)) for target, part in zip(targets, parts, strict=True))


def _local(name: str, path: Path) -> ModelFile:
    about = path.stat()
    seconds, nanoseconds = divmod(about.st_mtime_ns, 10**9)
    return ModelFile(name, about.st_size, f"{seconds}.{nanoseconds:09d}")


def _host_items(inventory: Inventory, host: Host, place: str, name: str | None) -> list[Item]:
    """List the files of a model on a host; an absolute path may lie outside of its models folder."""
    folder = _folder(host)
    if place.startswith("/") and not place.startswith(f"{folder}/"):
        folder, _, place = place.rstrip("/").rpartition("/")
    with HostConnection(host, inventory.folder) as connection:
        model = model_files.store(connection, folder, sums=False).model(place.removeprefix(f"{folder}/"), host.name)
    if model.missing:
        what = f"{len(model.missing)} parts of {model.name} are missing, the first: {model.missing[0]}"
        raise InventoryError(what, where=host.name, hint=f"labdeploy models ls {host.name}")
    target = require_plain((name or model.name).rstrip("/"))
    return [host_item(inventory, host, folder, file, new) for file, new in _as_named(model, target)]


def _as_named(model: StoredModel, target: str) -> Iterator[tuple[ModelFile, str]]:
    if model.kind == "snapshot":
        yield from ((file, target + file.name.removeprefix(model.name)) for file in model.files)
    else:
        new = dict(model_files.renamed(model, target))
        yield from ((file, new[file.name]) for file in model.files)


def host_item(inventory: Inventory, host: Host, folder: str, file: ModelFile, name: str) -> Item:
    """Make an item of a file on a host."""

    def opener() -> Source:
        return HostFile(host, inventory.folder, folder, file.name)

    return Item(name, file.size_bytes, file.mtime, f"{host.name}:{folder}/{file.name}", opener)


def _folder(host: Host) -> str:
    return (host.models_dir or "").rstrip("/")


# --- copying ------------------------------------------------------------------------------------------------------


class _Looked:
    """What the receiving host has of the files that it shall get."""

    def __init__(self, connection: HostConnection, folder: str, items: Sequence[Item], on_line: OnLine) -> None:
        wanted = "".join(f"{item.size_bytes}\t{item.name}\n" for item in items).encode()
        lines = run(connection, "look", folder, payload=wanted, on_line=on_line)
        rows = [(line.kind, *line.fields) for line in lines if line.kind in ("file", "part")]
        self.free_bytes = model_files.free_bytes(lines)
        self.users = model_files.users_of(lines)
        self.files = {name: sha256 for kind, name, _, sha256 in rows if kind == "file"}
        self.parts = {name: (int(size), sha256) for kind, name, size, sha256 in rows if kind == "part"}


@dataclass
class Copy:
    """One model on its way to one host."""

    inventory: Inventory
    host: Host
    items: Sequence[Item]
    may_replace: Callable[[str], None]
    """Asked before another file of the same name goes; raises where it must not."""
    at: Callable[[str, int, int], None] = lambda _what, _done, _total: None
    """Told how far it is: of what, bytes, of how many."""
    say: Callable[[str], None] = lambda _text: None
    sent_bytes: int = 0
    kept_bytes: int = 0
    cuts: int = 0
    _sums: dict[str, str] = field(default_factory=dict)
    _replaced: set[str] = field(default_factory=set)
    _warnings: list[str] = field(default_factory=list)
    _reached: bool = False
    _arrived: int = 0
    """Bytes that were on the host when the last try began."""

    def run(self) -> Copied:
        """Copy; a connection that breaks is made anew for as long as each brings something."""
        started, failed = time.monotonic(), 0
        while True:
            before = self._arrived
            try:
                self._try()
                break
            except (HostError, LockedError) as error:
                failed = 1 if self._arrived > before else failed + 1
                others = isinstance(error, LockedError) and not self.cuts  # not an earlier try of ours
                if not self._reached or others or failed == TRIES:
                    raise self._given_up(error) from error
                self.cuts += 1
                self.say(f"{error.what}; going on where it stopped")
                time.sleep(FIRST_WAIT_S * 2 ** (failed - 1))
        return self._copied(time.monotonic() - started)

    def _given_up(self, error: LabdeployError) -> LabdeployError:
        if not self._reached or error.hint:
            return error
        return type(error)(
            f"{error.what}, {TRIES} times", where=error.where, hint="the same command goes on where it stopped"
        )

    def _try(self) -> None:
        with HostConnection(self.host, self.inventory.folder) as connection:
            self._reached = True
            waiting = [item for item in self.items if item.name not in self._sums]
            looked = _Looked(connection, _folder(self.host), waiting, self._heard)
            self._arrived = self._done_bytes + sum(size for size, _ in looked.parts.values())
            self._leave_out_what_is_there(looked, waiting)
            waiting = [item for item in waiting if item.name not in self._sums]
            self._require_room(looked, waiting)
            self._require_leave(looked, waiting)
            for item in waiting:
                with item.open() as source:
                    self._one(connection, looked, item, source)

    @property
    def _done_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items if item.name in self._sums)

    def _leave_out_what_is_there(self, looked: _Looked, items: Sequence[Item]) -> None:
        for item in items:
            if sha256 := looked.files.get(item.name):
                with item.open() as source:
                    if source.start(item.size_bytes) == sha256:
                        self._sums[item.name] = sha256

    def _require_room(self, looked: _Looked, items: Sequence[Item]) -> None:
        """Refuse before the first byte what has no room; a file that is replaced stays until the new one is whole."""
        need = sum(item.size_bytes - min(looked.parts.get(item.name, (0, ""))[0], item.size_bytes) for item in items)
        if need > looked.free_bytes:
            folder = _folder(self.host)
            what = f"{folder} has {_mib(looked.free_bytes)} MiB free, this needs {_mib(need)} MiB"
            hint = f"labdeploy models ls {self.host.name}  # shows what could go: labdeploy models rm"
            raise InventoryError(what, where=self.host.name, hint=hint)

    def _require_leave(self, looked: _Looked, items: Sequence[Item]) -> None:
        """Refuse to replace what is in use; ask for all else that is replaced, once."""
        other = [item.name for item in items if item.name in looked.files]
        for name in other:
            if users := looked.users.get(name):
                what = f"another {name} is there and in use by {', '.join(users)}"
                hint = f"labdeploy models push {self.host.name} FILE --as OTHER-NAME  # then name that in the inventory"
                raise InventoryError(what, where=self.host.name, hint=hint)
        if new := set(other) - self._replaced:
            self.may_replace(f"{self.host.name} has another {', '.join(sorted(new))}, which nothing uses. Replace it?")
            self._replaced |= new

    def _one(self, connection: HostConnection, looked: _Looked, item: Item, source: Source) -> None:
        offset, sha256 = looked.parts.get(item.name, (0, ""))
        if offset > item.size_bytes or source.start(offset) != sha256:
            offset = 0
            source.start(0)
        self.kept_bytes += offset if self.cuts == 0 else 0
        if offset < item.size_bytes or not item.size_bytes:
            self._send(connection, item, source, offset)
        sha256 = source.sha256()
        replace = "replace" if item.name in self._replaced else "-"
        words = (item.name, str(item.size_bytes), sha256, item.mtime, item.origin, replace)
        run(connection, "finish", _folder(self.host), *words, on_line=self._heard)
        self._sums[item.name] = sha256

    def _send(self, connection: HostConnection, item: Item, source: Source, offset: int) -> None:
        def payload(write: Write) -> None:
            done = offset
            for chunk in source.rest():
                write(chunk)
                done += len(chunk)
                self.sent_bytes += len(chunk)
                self.at(item.name, done, item.size_bytes)

        run(connection, "receive", _folder(self.host), item.name, str(offset), payload=payload)

    def _heard(self, line: Line) -> None:
        if line.kind == "warning":
            self._warnings.append(line.field(0))
        elif line.kind == "reading" and line.field(1):
            sizes = {item.name: item.size_bytes for item in self.items}
            self.at(f"reading {line.field(0)}", int(line.field(1)), sizes.get(line.field(0), 0))

    def _copied(self, seconds: float) -> Copied:
        files = [ModelFile(item.name, item.size_bytes, sha256=self._sums[item.name]) for item in self.items]
        (model, *_) = grouped(files)
        result = "replaced" if self._replaced else "copied" if self.sent_bytes or self.kept_bytes else "unchanged"
        return Copied(
            model.name,
            result,
            model.size_bytes,
            model.sha256,
            self.sent_bytes,
            self.kept_bytes,
            self.cuts,
            seconds,
            tuple(self._warnings),
        )


def _mib(n: int) -> int:
    return n // 2**20
