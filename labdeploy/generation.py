"""A generation: the files one push puts on one host, named by their content, and the bundle that carries them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class SpanMark:
    """A service that spans hosts, as it is in a generation: the same id on each of its hosts, the same parts."""

    id: str
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """Rendered files of one host: path below the host's folder to bytes."""

    files: Mapping[str, bytes]
    spans: Mapping[str, SpanMark] = field(default_factory=dict)
    """Parts of spans among its services, by name; a rollback reads them to take the other hosts along."""

    @property
    def sums(self) -> bytes:
        """The files' names and contents as `sha256sum -c` reads them."""
        lines = (f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in sorted(self.files.items()))
        return "".join(lines).encode()

    @property
    def content_hash(self) -> str:
        """Names the content: the same files have the same hash on every machine."""
        return hashlib.sha256(self.sums).hexdigest()

    def bundle(self, *, push_id: str, by: str, at: str, version: str) -> bytes:
        """Pack the generation for the host: a tar of its files, their sums, and a manifest of who pushed it when."""
        manifest = {"push_id": push_id, "by": by, "at": at, "labdeploy": version, "content": self.content_hash}
        spans = {"spans": {name: asdict(mark) for name, mark in self.spans.items()}} if self.spans else {}
        extra = {"SHA256SUMS": self.sums, "manifest.json": json.dumps(manifest | spans).encode() + b"\n"}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for folder in ("systemd", "services"):
                tar.addfile(_folder(folder))
            for path, data in sorted({**self.files, **extra}.items()):
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info
