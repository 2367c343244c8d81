"""Models on hosts: what is where, is it whole, rename and remove it. The host's part is model_files.sh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from labdeploy.errors import HostError, InventoryError
from labdeploy.host import refusal
from labdeploy.models.files import ModelFile, StoredModel, grouped
from labdeploy.schema import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from labdeploy.host import HostConnection, Line, Payload

    OnLine = Callable[[Line], None]

PROGRAM = "model_files.sh"
SILENCE_S = 60  # while it reads a file, the host says every 5 s how far it is


@dataclass(frozen=True)
class Store:
    """The models of one host."""

    folder: str
    """The models_dir of the inventory."""
    free_bytes: int
    models: tuple[StoredModel, ...]
    parts: tuple[tuple[str, int], ...] = ()
    """Copies that were cut off: name and size so far."""

    def model(self, name: str, host: str) -> StoredModel:
        """Give a model by its name, or by that of any of its files."""
        names = {model.name: model for model in self.models}
        names = {file.name: model for model in self.models for file in model.files} | names
        if name.rstrip("/") not in names:
            what = f"there is no model {name!r} in {self.folder}{did_you_mean(name, names)}"
            raise InventoryError(what, where=host, hint=f"labdeploy models ls {host}")
        return names[name.rstrip("/")]

    def removable(self, name: str, host: str) -> StoredModel:
        """Give a model by its name, or what is left of a copy that was cut off."""
        sizes = dict(self.parts)
        if name in sizes and name not in {model.name for model in self.models}:
            return StoredModel(name, "file", (ModelFile(name, sizes[name]),))
        return self.model(name, host)


@dataclass(frozen=True)
class Verified:
    """What a file turned out to be when it was read from the disk."""

    name: str
    result: str
    """`ok`, `recorded` (nothing was known of it), `damaged`, `unreadable` or `missing`."""
    size_bytes: int = 0
    sha256: str = ""
    expected: str = ""

    @property
    def problem(self) -> str:
        """Say what is wrong with it."""
        if self.result == "damaged":
            return f"{self.name} has the sha256 {self.sha256} and had {self.expected}"
        return f"{self.name} is not there" if self.result == "missing" else f"{self.name} cannot be read: a bad disk?"


def run(
    connection: HostConnection,
    verb: str,
    folder: str,
    *args: str,
    payload: Payload = b"",
    on_line: OnLine | None = None,
) -> list[Line]:
    """Run the host's part and raise what it refused; HostError where the connection broke before its answer."""
    lines = connection.run(
        verb, folder, *args, payload=payload, on_line=on_line, timeout_s=SILENCE_S, whole_s=None, name=PROGRAM
    )
    if refused := refusal(lines, connection.name):
        raise refused
    if verb in ("list", "look") and any(line.kind == "room" for line in lines):
        return lines
    if not any(line.kind == "result" for line in lines):
        ended = (
            "it was stopped on the host" if any(line.kind == "ended" for line in lines) else "the connection was lost"
        )
        said = next((line.field(0) for line in lines if line.kind == "stderr"), ended)
        raise HostError(said, where=connection.name)
    return lines


def store(connection: HostConnection, folder: str, *, sums: bool = True, on_line: OnLine | None = None) -> Store:
    """Ask a host for its models; with `sums`, files whose sum is not known yet are read."""
    lines = run(connection, "list", folder, "sums" if sums else "-", on_line=on_line)
    users = users_of(lines)
    files = [
        ModelFile(*_front(line), sha256=line.field(3), reference=line.field(4), source=line.field(5))
        for line in lines
        if line.kind == "file"
    ]
    return Store(
        folder=folder,
        free_bytes=free_bytes(lines),
        models=tuple(grouped(replace(file, users=users.get(file.name, ())) for file in files)),
        parts=tuple((_unhidden(line.field(0)), int(line.field(1))) for line in lines if line.kind == "part"),
    )


def _front(line: Line) -> tuple[str, int, str]:
    return line.field(0), int(line.field(1)), line.field(2)


def _unhidden(name: str) -> str:
    """Give the name of a file by that of its partial copy, which a dot hides."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.removeprefix('.')}"


def free_bytes(lines: Iterable[Line]) -> int:
    """Give the room that a host said it has."""
    return next(int(line.field(0)) for line in lines if line.kind == "room") * 1024


def users_of(lines: Iterable[Line]) -> dict[str, tuple[str, ...]]:
    """Tell by file who uses it: generations first, the newest one first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        if line.kind == "used":
            found.setdefault(line.field(0), []).append((line.field(1), line.field(2)))
    return {name: tuple(f"{kind} {what}" for kind, what in sorted(users, key=_rank)) for name, users in found.items()}


def _rank(user: tuple[str, str]) -> tuple[str, int, str]:
    kind, what = user
    return kind, -int(what) if what.isdigit() else 0, what


def verify(
    connection: HostConnection,
    folder: str,
    names: Sequence[str],
    *,
    accept: bool = False,
    on_line: OnLine | None = None,
) -> list[Verified]:
    """Read files from the disk and hold them against what they were; `accept` takes them as they are from now on."""
    payload = "".join(f"{name}\n" for name in names).encode()
    lines = run(connection, "verify", folder, "accept" if accept else "-", payload=payload, on_line=on_line)
    return [_verified(line) for line in lines if line.kind == "verified"]


def _verified(line: Line) -> Verified:
    name, kind = line.field(0), line.field(1)
    if kind == "missing":
        return Verified(name, "missing")
    size, sha256, expected = int(line.field(2)), line.field(3), line.field(4)
    if not sha256:
        result = "unreadable"
    elif not expected:
        result = "recorded"
    else:
        result = "ok" if sha256 == expected else "damaged"
    return Verified(name, result, size, sha256, expected)


def remove(connection: HostConnection, folder: str, models: Iterable[StoredModel]) -> None:
    """Remove models that nothing uses; a snapshot goes with its whole folder."""
    names = [
        n for model in models for n in ([model.name] if model.kind == "snapshot" else [f.name for f in model.files])
    ]
    run(connection, "remove", folder, *names)


def move(connection: HostConnection, folder: str, model: StoredModel, new: str) -> None:
    """Rename a model that nothing uses; the parts of a split one keep their numbers."""
    run(connection, "move", folder, *(word for pair in renamed(model, new) for word in pair))


def renamed(model: StoredModel, new: str) -> list[tuple[str, str]]:
    """Give each old name with its new one, in the order to rename them."""
    if model.kind != "split":
        return [(model.name, new)]
    stem = model.name.removesuffix(".gguf")
    numbered = stem[-len("-00001-of-00003") :]
    head, new_head = stem.removesuffix(numbered), new.removesuffix(".gguf").removesuffix(numbered)
    return [(file.name, new_head + file.name.removeprefix(head)) for file in model.files]
