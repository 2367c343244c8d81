"""Headers of models that lie elsewhere: on a host over SSH, or behind a URL. Never more than the header is fetched."""

from __future__ import annotations

import http.client
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from labdeploy.errors import ModelError
from labdeploy.models import gguf, safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from labdeploy.host import HostConnection

_URL = re.compile(r"https?://\S+", re.IGNORECASE)
HTTP_S = 30
WHOLE_BYTES = 16 * 2**20  # so much is taken of a server that can only send whole files
SMALL_FILES = ("config.json", "hf_quant_config.json", safetensors.INDEX_NAME)
FRONT_BYTES = 2**20  # holds the header of most safetensors files: a hundred bytes for each tensor


# --- hosts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    """A file on a host, read in ranges over one SSH connection."""

    connection: HostConnection
    path: str
    size: int

    def read(self, offset: int, n: int) -> bytes:
        """Return up to `n` bytes at `offset`."""
        return self.connection.read_file(self.path, offset, n)


def remote_parts(path: str) -> tuple[str, ...]:
    """Give the paths of all parts of a model on a host, given that of one."""
    folder, slash, name = path.rpartition("/")
    return tuple(f"{folder}{slash}{part}" for part in gguf.part_names(name))


def read_remote_gguf(connection: HostConnection, path: str) -> gguf.GgufHeader:
    """Read the header of a GGUF file on a host, and of all its parts."""
    parts = [RemoteFile(connection, part, connection.file_size(part)) for part in remote_parts(path)]
    return gguf.read_parts([(f"{connection.name}:{part.path}", part) for part in parts])


def read_remote_snapshot(connection: HostConnection, path: str, sizes: Mapping[str, int]) -> safetensors.Snapshot:
    """Read a snapshot folder on a host through a hollow copy of it here: small files whole, of weights the header."""
    with tempfile.TemporaryDirectory(prefix="labdeploy-") as name:
        for file, size in sizes.items():
            if file in SMALL_FILES or file.endswith(".safetensors"):
                remote = RemoteFile(connection, f"{path.rstrip('/')}/{file}", size)
                _copy_front(remote, Path(name) / file, whole=file in SMALL_FILES)
        try:
            return safetensors.read_snapshot(Path(name))
        except ModelError as error:
            where = error.where.replace(name, f"{connection.name}:{path}")
            raise ModelError(error.what, where=where, hint=error.hint.replace(name, path)) from None


def read_remote(connection: HostConnection, path: str) -> gguf.GgufHeader | safetensors.Snapshot:
    """Read what lies at a path on a host: a GGUF file and all its parts, or a snapshot folder."""
    sizes = connection.folder_sizes(path)
    if sizes is None:
        return read_remote_gguf(connection, path)
    return read_remote_snapshot(connection, path, sizes)


def _copy_front(remote: RemoteFile, to: Path, *, whole: bool) -> None:
    """Copy what of a file is looked at; the rest is a hole, so that its length is right."""
    wanted = min(remote.size, safetensors.MAX_JSON_BYTES) if whole else FRONT_BYTES
    front = remote.read(0, wanted)
    header = 8 + int.from_bytes(front[:8], "little")
    if not whole and len(front) < header <= safetensors.MAX_HEADER_BYTES:
        front += remote.read(len(front), header - len(front))
    with to.open("wb") as file:
        file.write(front)
        file.truncate(remote.size)


# --- URLs -----------------------------------------------------------------------------------------------------


def is_url(source: str) -> bool:
    """Tell a URL from a path and from HOST:PATH."""
    return _URL.fullmatch(source) is not None


def _opener() -> urllib.request.OpenerDirector:
    """Make an opener that knows HTTP and nothing else: a redirect must not lead to files of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPRedirectHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


class UrlFile:
    """A file behind a URL, read by range requests; each asks for a few bytes, and no more are taken."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opener = _opener()
        self.size, self._front = self._open()

    def _open(self) -> tuple[int, bytes]:
        """Ask for the first window: the answer has the whole length too."""
        with self._get(0, gguf.FIRST_WINDOW_BYTES) as answer:
            length = answer.headers.get("Content-Length", "")
            total = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status == http.client.PARTIAL_CONTENT and total:
                size = int(total[1])
                return size, self._read(answer, min(size, gguf.FIRST_WINDOW_BYTES))
            if answer.status == http.client.OK and length.isdigit() and int(length) <= WHOLE_BYTES:
                return int(length), self._read(answer, int(length))  # the server knows no ranges
            return self._no_ranges(length)

    def read(self, offset: int, n: int) -> bytes:
        """Return up to `n` bytes at `offset`."""
        if offset + n <= len(self._front) or len(self._front) == self.size:
            return self._front[offset : offset + n]
        with self._get(offset, n) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                self._no_ranges(answer.headers.get("Content-Length", ""))
            got = answer.headers.get("Content-Range", "")
            if not got.startswith(f"bytes {offset}-"):
                what = f"the server was asked for bytes from {offset} on and sent {got!r:.60}"
                raise ModelError(what, where=self.url)
            return self._read(answer, n)

    def _get(self, offset: int, n: int) -> http.client.HTTPResponse:
        headers = {
            "Range": f"bytes={offset}-{offset + n - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": "labdeploy",
        }
        try:
            answer: http.client.HTTPResponse = self._opener.open(
                urllib.request.Request(self.url, headers=headers),  # noqa: S310 (the opener knows HTTP only)
                timeout=HTTP_S,
            )
        except urllib.error.HTTPError as error:
            error.close()
            said = str(error.reason).partition("\n")[0]  # of a redirect that leads back, urllib tells more
            raise ModelError(
                f"the server says {error.code} {said}", where=self.url, hint=f"curl -sIL '{self.url}'"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise ModelError(f"cannot be fetched: {said}", where=self.url, hint=f"curl -sIL '{self.url}'") from None
        return answer

    def _read(self, answer: http.client.HTTPResponse, n: int) -> bytes:
        """Take `n` bytes of an answer, whatever more it may hold."""
        try:
            data = answer.read(n)
        except (OSError, http.client.HTTPException) as error:
            data = getattr(error, "partial", b"")
        if len(data) < n:
            raise ModelError(f"the answer broke off after {len(data)} of {n} bytes", where=self.url)
        return data

    def _no_ranges(self, length: str) -> NoReturn:
        whole = f"all {int(length) / 2**30:.2f} GiB" if length.isdigit() else "the whole file"
        raise ModelError(
            f"the server ignores range requests and would send {whole}; only the header is wanted",
            where=self.url,
            hint="download the file, then labdeploy inspect FILE  # or HOST:PATH, where a host has it",
        )


def url_parts(url: str) -> tuple[str, ...]:
    """Give the URLs of all parts of a model, given that of one."""
    try:
        parsed = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ModelError(f"is no URL: {error}", where=url) from None
    folder, slash, name = parsed.path.rpartition("/")
    return tuple(
        urllib.parse.urlunsplit(parsed._replace(path=f"{folder}{slash}{part}")) for part in gguf.part_names(name)
    )


def read_url_gguf(url: str) -> gguf.GgufHeader:
    """Read the header of a GGUF file behind a URL, and of all its parts."""
    try:
        return gguf.read_parts([(part, UrlFile(part)) for part in url_parts(url)])
    except ModelError as error:
        if "/blob/" in url and "is not a GGUF file" in error.what:  # the page about the file, on Hugging Face
            hint = f"labdeploy inspect '{url.replace('/blob/', '/resolve/', 1)}'"
            raise ModelError(error.what, where=error.where, hint=hint) from None
        raise


def file_name(source: str) -> str:
    """Give the last part of a path, a HOST:PATH or a URL."""
    path = urllib.parse.urlsplit(source).path if is_url(source) else source.rpartition(":")[2]
    return path.rstrip("/").rpartition("/")[2]


def lock_entry(model: gguf.GgufHeader | safetensors.Snapshot) -> dict[str, Any]:
    """Give what the lock keeps of a model."""
    if isinstance(model, safetensors.Snapshot):
        return safetensors.to_lock(model)
    return {"format": "gguf", **gguf.to_lock(model)}
