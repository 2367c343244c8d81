"""Put builds of runners on a host, list them, choose one, remove one. The host's part is builds.sh."""

from __future__ import annotations

import hashlib
import io
import platform
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy import builds, lock
from labdeploy.builds import Build, Facts
from labdeploy.builds_lock import uv_program, uv_version
from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.host import HostConnection, Line, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from labdeploy.inventory import Host, Inventory

    Write = Callable[[bytes], object]

PROGRAM = "builds.sh"
SILENCE_S = 1800  # 4 GiB of wheels at 20 Mbit/s take half an hour, in which uv says nothing
CHUNK = 1 << 20
PACKINGS = {".tar.gz": "gz", ".tgz": "gz", ".tar.zst": "zst", ".tar": "none"}


@dataclass(frozen=True)
class Done:
    """How an installation ended."""

    name: str
    result: str
    use: str | None
    """The build that the host's services name now."""
    seconds: float = 0


@dataclass
class Installer:
    """Everything that is done to the builds of one host; the lock is kept in step with it."""

    inventory: Inventory
    host: Host
    tell: Callable[[str], None] = lambda _text: None
    verbose: bool = False

    def vllm(self, version: str, *, lock_path: Path | None = None, wheels: Path | None = None) -> Done:
        """Install vLLM from a lock: what speaks against it is said before a byte is downloaded."""
        with HostConnection(self.host, self.inventory.folder) as connection:
            facts, there = look(connection)
            wanted = (
                builds.read_lock(lock_path) if lock_path else builds.find_lock(self.inventory.folder, version, facts)
            )
            self._refuse(wanted, version, self._with_inventory(facts), offline=wheels is not None)
            if wanted.name in [build.name for build in there if build.runner == "vllm"]:
                return Done(wanted.name, "unchanged", self._note("vllm", added=wanted.name))
            files = builds.wheels_of(wanted, wheels) if wheels else []
            uv, bring_uv = _uv_for(facts, self.host.name)
            args = (wanted.name, wanted.python, wanted.shim, wanted.asks.device, uv)
            options = ("--torch-backend", wanted.torch_backend) if wanted.torch_backend and not wheels else ()
            self.tell(f"installing vLLM {wanted.name} ({wanted.variant}, Python {wanted.python})")
            return self._install(
                connection, "vllm", wanted.name, ("install-wheels", *args, *options), _bundle(wanted, files, bring_uv)
            )

    def archive(self, runner: str, version: str, source: Path, sha256: str | None) -> Done:
        """Install llama-server or Ollama from a release archive, or from a folder that it was unpacked to."""
        builds.require_version(version)
        packing, content = _packed(source, sha256)
        digest = _sha256(content)
        if sha256 and digest != sha256.lower():
            raise InventoryError(f"has the sha256 {digest}, not {sha256.lower()}", where=str(source))
        name = builds.name_of(version, digest)
        with HostConnection(self.host, self.inventory.folder) as connection:
            self.tell(f"installing {runner} {name}")
            args = ("install-archive", runner, name, digest, packing)
            return self._install(connection, runner, name, args, lambda write: _copy(content, write))

    def use(self, runner: str, build: str) -> str:
        """Choose the build that services name; it must be there."""
        with HostConnection(self.host, self.inventory.folder) as connection:
            there = [b.name for b in builds_on(connection) if b.runner == runner]
        name = builds.one_build(self.host.name, runner, build, there)
        if name not in there:
            hint = f"labdeploy runner ls {self.host.name}"
            raise InventoryError(f"there is no build {name} of {runner}", where=self.host.name, hint=hint)
        if named := self.host.runners.get(runner):
            what = f"the inventory names {named} already, and it wins"
            hint = f"take runners.{runner} out of it, or write {name} there"
            raise InventoryError(what, where=f"hosts.{self.host.name}.runners.{runner}", hint=hint)
        lock.set_builds(self.inventory.lock_path, self.host.name, runner, installed=there, use=name)
        return name

    def the_build(self, runner: str, build: str) -> str:
        """Give the build that a name or version means."""
        installed, _ = builds.known(lock.read(self.inventory.lock_path), self.host.name, runner)
        return builds.one_build(self.host.name, runner, build, installed)

    def remove(self, runner: str, name: str) -> None:
        """Remove a build that no generation names."""
        with HostConnection(self.host, self.inventory.folder) as connection:
            _run(connection, "rm", runner, name)
        self._note(runner, removed=name)

    def _install(
        self,
        connection: HostConnection,
        runner: str,
        name: str,
        command: Sequence[str],
        payload: Callable[[Write], None],
    ) -> Done:
        started = time.monotonic()
        lines = _run(connection, *command, payload=payload, on_line=self._said)
        result = next(line.field(0) for line in lines if line.kind == "result")
        use = self._note(runner, added=name)
        return Done(name, result, use, 0 if result == "unchanged" else time.monotonic() - started)

    def _said(self, line: Line) -> None:
        if line.kind in ("step", "version") or (self.verbose and line.kind == "log"):
            self.tell(line.field(0))

    def _note(self, runner: str, *, added: str | None = None, removed: str | None = None) -> str | None:
        """Keep the lock in step; the first build is the chosen one."""
        installed, use = builds.known(lock.read(self.inventory.lock_path), self.host.name, runner)
        now = ({*installed, added} if added else {*installed}) - {removed, None}
        use = (use or added) if use != removed or removed is None else None
        names = sorted(name for name in now if name)
        lock.set_builds(self.inventory.lock_path, self.host.name, runner, installed=names, use=use)
        return self.host.runners.get(runner) or use

    def _with_inventory(self, facts: Facts) -> Facts:
        """Take what the inventory knows of GPUs where the host could not say it."""
        known = [gpu.compute_capability for gpu in self.host.hardware.gpus if gpu.api == "cuda"]
        capabilities = facts.capabilities or tuple(c for c in known if c)
        return Facts(**{**vars(facts), "capabilities": capabilities})

    def _refuse(self, wanted: builds.WheelLock, version: str, facts: Facts, *, offline: bool) -> None:
        problems = list(builds.refusals(wanted, facts))
        if wanted.version != version:
            problems.append(
                (f"{wanted.path.name} is a lock of {wanted.version}, not of {version}", "take another --lock")
            )
        if offline and wanted.python not in facts.pythons:
            hint = f"apt-get install python{wanted.python} on it, or leave out --wheels: uv then brings one"
            problems.append((f"there is no python{wanted.python} on it and nothing may be downloaded", hint))
        if problems:
            what = "\n".join(f"{self.host.name}: {what}" for what, _ in problems)
            raise InventoryError(what, hint=problems[0][1])


def look(connection: HostConnection) -> tuple[Facts, list[Build]]:
    """Ask a host what it has."""
    lines = _run(connection, "ls")
    said = [(line.field(0), line.field(1)) for line in lines if line.kind == "fact" and line.field(1)]
    one = dict(said)

    def every(kind: str) -> tuple[str, ...]:
        return tuple(value for key, value in said if key == kind)

    facts = Facts(
        arch=one.get("arch", ""),
        pythons=every("python"),
        uv=one.get("uv"),
        tools=every("tool"),
        room_mib=int(one["room_kib"]) // 1024 if "room_kib" in one else None,
        driver=one.get("driver"),
        capabilities=every("capability"),
    )
    found = [
        Build(line.field(0), line.field(1), int(line.field(2) or 0) // 1024, line.field(3), line.field(4))
        for line in lines
        if line.kind == "build"
    ]
    return facts, found


def builds_on(connection: HostConnection) -> list[Build]:
    """List the builds of a host."""
    return look(connection)[1]


def _run(
    connection: HostConnection,
    verb: str,
    *args: str,
    payload: bytes | Callable[[Write], None] = b"",
    on_line: Callable[[Line], None] | None = None,
) -> list[Line]:
    """Run the host's part and raise what it refused."""
    lines = connection.run(
        verb, *args, payload=payload, on_line=on_line, timeout_s=SILENCE_S, whole_s=None, name=PROGRAM
    )
    if refused := refusal(lines, connection.name):
        raise refused
    if verb != "ls" and not any(line.kind == "result" for line in lines):
        said = next(
            (line.field(0) for line in lines if line.kind == "stderr"), "it was cut off; nothing can name it yet"
        )
        raise LabdeployError(said, where=connection.name, hint="the same command again begins anew")
    return lines


# --- what is sent -------------------------------------------------------------------------------------------------


def _uv_for(facts: Facts, host: str) -> tuple[str, Path | None]:
    """Give the path of uv on the host, and ours to bring along where it is not there yet: the same one everywhere."""
    if facts.arch != platform.machine():
        if facts.uv:
            return "uv", None
        what = f"uv is not on it, and ours is for {platform.machine()}, not {facts.arch}"
        raise InventoryError(what, where=host, hint="install uv on it: https://docs.astral.sh/uv")
    name = f"uv-{uv_version()}"
    return f"/opt/labdeploy/tools/{name}", None if name in facts.tools else Path(uv_program())


def _bundle(wanted: builds.WheelLock, wheels: Iterable[Path], uv: Path | None) -> Callable[[Write], None]:
    """Give what writes the tar of an installation: the lock, uv where it is brought along, wheels where offline."""

    def write_to(write: Write) -> None:
        with tarfile.open(fileobj=_Writer(write), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            about = tarfile.TarInfo("lock.txt")
            about.size = len(wanted.content)
            tar.addfile(about, io.BytesIO(wanted.content))
            if uv:
                tar.add(uv, "uv")
            for wheel in wheels:
                tar.add(wheel, f"wheels/{wheel.name}")

    return write_to


class _Writer(io.RawIOBase):
    """A function that takes bytes, as a file that tarfile writes to."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def writable(self) -> bool:
        """Say that it can be written to."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Pass the bytes on."""
        self._write(bytes(data))
        return len(data)


def _packed(source: Path, sha256: str | None) -> tuple[str, Path | bytes]:
    """Give how an archive is packed and its content; a folder is packed here, the same bytes each time."""
    if source.is_dir():
        if sha256:
            raise InventoryError("is a folder; --sha256 is for an archive", where=str(source))
        return "none", _tar_of(source)
    if not source.is_file():
        raise InventoryError("does not exist", where=str(source))
    packing = next((kind for end, kind in PACKINGS.items() if source.name.endswith(end)), None)
    if packing is None:
        hint = "unpack it here and give the folder: --from FOLDER"
        raise InventoryError(f"is not one of {', '.join(PACKINGS)}", where=str(source), hint=hint)
    if not sha256:
        hint = f"--sha256 {_sha256(source)}  # if that is what its publisher says"
        raise InventoryError("an archive needs the sha256 that its publisher gives", where=str(source), hint=hint)
    return packing, source


def _tar_of(folder: Path) -> bytes:
    """Pack a folder so that the same files give the same bytes: in order, without times and owners."""

    def plain(about: tarfile.TarInfo) -> tarfile.TarInfo:
        about.mtime, about.uid, about.gid, about.uname, about.gname = 0, 0, 0, "", ""
        return about

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, str(path.relative_to(folder)), recursive=False, filter=plain)
    return buffer.getvalue()


def _chunks(content: Path | bytes) -> Iterable[bytes]:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        yield from iter(lambda: file.read(CHUNK), b"")


def _sha256(content: Path | bytes) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(content):
        digest.update(chunk)
    return digest.hexdigest()


def _copy(content: Path | bytes, write: Write) -> None:
    for chunk in _chunks(content):
        write(chunk)
