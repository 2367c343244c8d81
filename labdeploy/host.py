"""What runs on hosts over SSH: our programs, each in one exec on one raw channel, and a few questions beside them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy.errors import FitError, HostError, InventoryError, LabdeployError, LockedError, ModelError
from labdeploy.facts.answer import printable
from labdeploy.ssh import SshConnection

if TYPE_CHECKING:
    import http.client
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    import paramiko

    Write = Callable[[bytes], object]
    Payload = bytes | Callable[[Write], object]
    """What goes to a program's standard input: bytes, or a function that writes what is too big to hold."""

ANSWER_S = 60  # a question that changes nothing is never silent for so long,
WHOLE_S = 300  # and has ended by then
FACTS_S = 150  # the longest that facts.sh is silent: HELP_S of it, and the start of what follows
FACTS_WHOLE_S = 1800  # models on slow disks are read header by header
KEPT = "apply.sh"  # the program of which each push leaves a copy on the host,
KEPT_AT = "/etc/labdeploy/bin/labdeploy-host"  # here: the same is not sent again


@dataclass(frozen=True)
class Line:
    """One line of the program's answer: its kind and its fields."""

    kind: str
    fields: tuple[str, ...]

    def field(self, index: int) -> str:
        """Give a field, or nothing where the line has fewer."""
        return self.fields[index] if index < len(self.fields) else ""


_REFUSALS: dict[str, type[LabdeployError]] = {"2": InventoryError, "3": FitError, "6": LockedError}


def refusal(lines: Iterable[Line], name: str, address: str = "") -> LabdeployError | None:
    """Give the error of what a host's program refused; None where it refused nothing."""
    refused = next((line for line in lines if line.kind == "refused"), None)
    if refused is None:
        return None
    hint = refused.field(2).replace("{host}", name).replace("{address}", address or name)
    return _REFUSALS.get(refused.field(0), LabdeployError)(refused.field(1), where=name, hint=hint)


@functools.cache
def program(name: str = "apply.sh") -> bytes:
    """Read a program that runs on hosts."""
    return (Path(__file__).parent / name).read_bytes()


@functools.cache
def facts_program() -> bytes:
    """Read the questions that `probe` asks on hosts."""
    return (Path(__file__).parent / "facts" / "facts.sh").read_bytes()


class HostConnection(SshConnection):
    """A connection to a host, and what is asked and run there."""

    def run(
        self,
        verb: str,
        *args: str,
        payload: Payload = b"",
        on_line: Callable[[Line], None] | None = None,
        timeout_s: float = ANSWER_S,
        whole_s: float | None = WHOLE_S,
        name: str = KEPT,
    ) -> list[Line]:
        """Run one of our programs on the host and give its answer; `on_line` sees each line as it arrives.

        One exec: what is sent travels on the program's standard input, and of apply.sh only what the host asks for:
        the program where it has another, the payload where that changes something. Raises HostError when the
        connection breaks, sudo wants a password, the host is silent for `timeout_s`, or it is not done in `whole_s`.
        """
        if name == KEPT:
            asked = {"program": _kept_program(), "bundle": payload}
            return self._talk(start_kept(verb, *args), (), asked, on_line, timeout_s, whole_s)
        text = program(name)
        return self._talk(_start(len(text), verb, *args), (text, payload), {}, on_line, timeout_s, whole_s)

    def ask_facts(self, *args: str) -> dict[str, tuple[str, ...]]:
        """Ask the host what it has (facts.sh), in one exec; the answer is the lines of each fact by its name."""
        answer: dict[str, list[str]] = {}
        text = facts_program()
        for line in self._talk(_start(len(text), "facts", *args), (text,), {}, None, FACTS_S, FACTS_WHOLE_S):
            answer.setdefault(line.kind, []).append(printable(" ".join(line.fields)))
        if "end" not in answer:
            raise HostError("its answer broke off", where=self._host.name)
        return {name: tuple(lines) for name, lines in answer.items()}

    def _talk(
        self,
        command: str,
        sent: tuple[Payload, ...],
        asked: Mapping[str, Payload],
        on_line: Callable[[Line], None] | None,
        timeout_s: float,
        whole_s: float | None,
    ) -> list[Line]:
        """Start a command, send it what it is sent at once and then what it asks for, and give its other lines."""
        lines: list[Line] = []
        with self._channel(command, timeout_s, whole_s) as channel:
            if sent:
                _send(channel, *sent, ends=True)
            for said in self._lines(channel):
                kind, *fields = said.split("\t")
                if kind == "want":
                    _send(channel, asked[fields[0]], ends=fields[0] == "bundle")
                    continue
                lines.append(Line(kind, tuple(fields)))
                if on_line:
                    on_line(lines[-1])
            self._check_end(channel, answered=bool(lines))
        return lines

    def stream(self, argv: list[str]) -> Iterator[str]:
        """Run a command as root and give its lines as they come, for as long as it runs."""
        with self._as_root(shlex.join(argv), None, None) as channel:
            yield from self._lines(channel)
            self._check_end(channel, answered=channel.recv_exit_status() == 0)

    def read_file(self, path: str, offset: int, n: int) -> bytes:
        """Read up to `n` bytes of a file on the host, for headers of models that are too big to copy."""
        quoted = shlex.quote(path)
        with self._as_root(f"tail -c +{offset + 1} {quoted} | head -c {n}") as channel:
            return b"".join(iter(lambda: channel.recv(1 << 20), b""))

    def read_on(self, path: str, offset: int, timeout_s: float = ANSWER_S) -> Iterator[bytes]:
        """Read a file on the host from an offset to its end; HostError where the connection breaks before it."""
        command = f"exec tail -c +{offset + 1} {shlex.quote(path)}"
        with self._as_root(command, timeout_s, None) as channel:
            yield from iter(lambda: channel.recv(1 << 20), b"")
            self._check_end(channel, answered=channel.recv_exit_status() == 0)

    def folder_sizes(self, path: str) -> dict[str, int] | None:
        """Give the sizes of the files of a folder on the host by their names; None where it is no folder."""
        folder = shlex.quote(path)
        each = 'for f in *; do [ ! -f "$f" ] || stat -Lc "%s %n" "$f"; done'
        command = f"if [ -d {folder} ]; then cd {folder} && {each}; echo folder; else echo none; fi"
        with self._as_root(command) as channel:
            *rows, kind = [*self._lines(channel)] or [""]
            self._check_end(channel, answered=kind in ("folder", "none"))
        sizes = (row.partition(" ") for row in rows)
        return {name: int(size) for size, _, name in sizes} if kind == "folder" else None

    def file_size(self, path: str) -> int:
        """Give the size of a file on the host."""
        with self._as_root(f"stat -Lc %s {shlex.quote(path)}") as channel:
            said = b"".join(iter(lambda: channel.recv(1024), b"")).decode().strip()
            if not said.isdigit() and channel.recv_exit_status() == 1:
                raise ModelError(f"{path} is not there", where=self._host.name)
            self._check_end(channel, answered=said.isdigit())
            return int(said)

    def http(self, address: str, port: int, timeout_s: float) -> http.client.HTTPConnection:
        """Give an HTTP connection to a port of the host, through this SSH connection."""
        import http.client  # noqa: PLC0415 (a push has no use for it)

        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        connection.sock = self._tunnel(address, port, timeout_s)
        return connection

    def _as_root(
        self, command: str, timeout_s: float | None = ANSWER_S, whole_s: float | None = WHOLE_S
    ) -> AbstractContextManager[paramiko.Channel]:
        return self._channel(_as_root(command), timeout_s, whole_s)


def _send(channel: paramiko.Channel, *payloads: Payload, ends: bool) -> None:
    with contextlib.suppress(OSError):  # the program may answer and end without reading all of it
        for payload in payloads:
            payload(channel.sendall) if callable(payload) else channel.sendall(payload)
        if ends:
            channel.shutdown_write()


def _as_root(command: str) -> str:
    """Write a command for the host's login shell, whichever it is: as root, through sudo where need be."""
    root = '[ -O / ] || [ "$(id -u)" = 0 ]'  # the first one is no process more, and nearly always enough
    inner = f'C={shlex.quote(command)}; if {root}; then eval "$C"; else exec sudo -n /bin/sh -c "$C"; fi'
    return f"exec /bin/sh -c {shlex.quote(inner)}"


def _start(length: int, *words: str) -> str:
    """Write the command that reads a program of that length from standard input and runs one of its verbs."""
    start = f'PROGRAM=$(head -c {length}) && eval "$PROGRAM"'
    return _as_root(f"set -- {shlex.join(words)}; {start}")


@functools.cache
def _kept_program() -> bytes:
    """Give what a push leaves on the host: apply.sh, and ahead of it the functions that it calls."""
    return program("unchanged.sh") + program("ollama.sh") + program(KEPT)


def start_kept(*words: str) -> str:
    """Write the command that runs a verb of the program that the host has kept, and asks for it where it is another.

    A push looks first whether there is anything to do; stores of models are looked at by the program alone. The file is
    opened once: whoever replaces it meanwhile does so by a rename, and what was hashed is what runs.
    """
    text = _kept_program()
    kept = f'[ -r {KEPT_AT} ] && exec 4<{KEPT_AT} && [ "$(sha256sum <&4)" = "{_sum(text)}  -" ]'
    run = "PROGRAM_AT=/proc/self/fd/4; . /proc/self/fd/4"
    ask = f'printf "want\\tprogram\\n"; PROGRAM=$(head -c {len(text)}); eval "$PROGRAM"'
    start = f"if {kept}; then {run}; else {ask}; fi"
    if words[0] == "push":
        unchanged = 'nothing_to_do "$3" && [ ! -d "$ROOT/gen/$FROM/stores" ]'
        say = 'printf "result\\tunchanged\\t%s\\n" "${FROM#"${FROM%%[!0]*}"}"'
        start = f"{_look_first()}\nif {unchanged}; then {say}; else {start}; fi"
    return _as_root(f"set -- {shlex.join(words)}; {start}")


@functools.cache
def _look_first() -> str:
    """Give unchanged.sh without its comments, for it travels with each push."""
    lines = program("unchanged.sh").decode().splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("#"))


@functools.cache
def _sum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
