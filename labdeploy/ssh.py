"""One SSH connection to one host: the only import of Fabric and paramiko.

Fabric is here for your SSH configuration, jump hosts and authentication. What runs over a connection is host.py's.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import shlex
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import labdeploy.lean  # noqa: F401  # isort: skip (goes before the two that it makes lean)
import paramiko
from fabric import Config, Connection
from paramiko.hostkeys import HostKeyEntry

from labdeploy.deadlines import Watch
from labdeploy.dial import CONNECT_S, dialed
from labdeploy.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from _typeshed import ReadableBuffer

AUTH_S = 20
LOGIN_S = 45  # connecting and logging in as a whole: an agent may hold several keys, each with AUTH_S
CHANNEL_S = 20  # paramiko's own default is an hour
KEEPALIVE_S = 15
DEAD_S = 45  # what we sent was not acknowledged for so long, keepalives at least: the host is gone
SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
_WATCH = Watch()
logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it prints what we raise and explain


class Login(Protocol):
    """How a host is logged in to; what is None comes from your own SSH configuration."""

    @property
    def user(self) -> str | None:
        """Login name."""

    @property
    def port(self) -> int | None:
        """Port of its SSH server."""

    @property
    def key(self) -> str | None:
        """Private key file."""

    @property
    def known_hosts(self) -> str | None:
        """File of known host keys."""


class Target(Protocol):
    """What must be known of a host to reach it; the inventory's Host is one."""

    @property
    def name(self) -> str:
        """Its name in the inventory."""

    @property
    def address(self) -> str | None:
        """Host name or IP address."""

    @property
    def ssh(self) -> Login:
        """How it is logged in to."""


class SshConnection:
    """One SSH connection to one host. Use it as a context manager; it raises HostError for all that can go wrong."""

    def __init__(self, host: Target, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._connection: Any = None
        self._transport: paramiko.Transport | None = None

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self._host.name

    def __enter__(self) -> Self:
        at = self._connection = self._configured()
        try:
            with self._at_most(LOGIN_S, "no login"):
                for at in self._way():
                    self._trust_known_keys(at)
                    self._take_dialed(at)
                    at.open()
            self._connection.transport.set_keepalive(KEEPALIVE_S)
        except Exception as error:
            self.__exit__()
            raise self._translated(error, at) from error
        return self

    def __exit__(self, *_: object) -> None:
        for connection in reversed(self._way()):
            with contextlib.suppress(Exception):
                connection.close()

    # --- connecting ---------------------------------------------------------------------------------------------

    def _configured(self) -> _Connection:
        host, ssh, kwargs = self._host, self._host.ssh, self._connect_kwargs()
        try:
            return _Connection(
                host.address,
                user=ssh.user,
                port=ssh.port,
                config=_ssh_settings(),
                forward_agent=False,
                connect_timeout=CONNECT_S,
                connect_kwargs=kwargs,
            )
        except Exception as error:  # whatever Fabric does not take: it has no errors of its own for that
            what = f"your SSH configuration for {host.address} cannot be used ({type(error).__name__}: {error})"
            raise HostError(what, where=host.name, hint=f"ssh -G {host.address}  # shows what it says") from error

    def _connect_kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {**_DEADLINES, "transport_factory": self._new_transport}
        if self._host.ssh.key:  # only this key: an agent full of others runs into the server's limit of attempts
            key = self._file(self._host.ssh.key)
            if not key.is_file():
                hint = f"ls -l {key.absolute()}"
                raise HostError(f"SSH key {key} does not exist", where=self._host.name, hint=hint)
            try:
                kwargs |= {"pkey": _login_key(key), "look_for_keys": False, "allow_agent": False}
            except Exception as error:  # each kind of key has its own ways to be unreadable
                hint = f"ssh-keygen -y -f {key}  # or leave ssh.key out, and have it in your agent"
                raise HostError(f"SSH key {key}: {error}", where=self._host.name, hint=hint) from error
        return kwargs

    def _new_transport(self, sock: socket.socket, **kwargs: Any) -> paramiko.Transport:  # noqa: ANN401
        self._transport = _transport_on(sock, **kwargs)
        return self._transport

    def _way(self) -> list[Connection]:
        """List the jump hosts that your SSH configuration names, then the host, each with our deadlines.

        Fabric has none for jump hosts, and paramiko would wait an hour for a channel.
        """
        way = [self._connection]
        while isinstance(jump := way[0].gateway, Connection):
            jump.connect_timeout = jump.connect_timeout or CONNECT_S
            jump.connect_kwargs = {**jump.connect_kwargs, **_DEADLINES, "transport_factory": _transport_on}
            way.insert(0, jump)
        return way

    def _take_dialed(self, connection: Connection) -> None:
        """Let it use the TCP connection that was opened ahead; what reached its address directly is of no use else."""
        if not connection.gateway and (sock := dialed(connection.host, connection.port)):
            connection.connect_kwargs = {**connection.connect_kwargs, "sock": sock}

    def _file(self, name: str) -> Path:
        return self._folder / Path(name).expanduser()

    def _known_hosts_files(self, connection: Connection) -> list[Path]:
        own = [self._file(self._host.ssh.known_hosts)] if self._host.ssh.known_hosts else []
        if own and connection is self._connection:
            return own
        return [Path("~/.ssh/known_hosts").expanduser(), SYSTEM_KNOWN_HOSTS, *own]

    def _trust_known_keys(self, connection: Connection) -> None:
        """Load the keys known for a host and refuse all others; Fabric alone would accept any key."""
        client, name = connection.client, _key_name(connection)
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        for file in self._known_hosts_files(connection):
            for key in _known_keys(file, name):
                client.get_host_keys().add(name, key.get_name(), key)

    # --- talking ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_most(self, seconds: float, what: str) -> Iterator[None]:
        """Cut the connection off after so long: some of paramiko's waits have no end of their own."""
        late = threading.Event()

        def cut_off() -> None:
            late.set()
            if self._transport:
                self._transport.close()

        failure: Exception | None = None
        try:
            with _WATCH.at_most(seconds, cut_off):
                yield
        except Exception as error:  # noqa: BLE001 (whatever it was: where we are late, it was ours)
            failure = error
        if late.is_set():
            raise HostError(f"{what} within {seconds:.0f} s", where=self._host.name) from failure
        if failure:
            raise failure

    @contextlib.contextmanager
    def _channel(self, command: str, timeout_s: float | None, whole_s: float | None) -> Iterator[paramiko.Channel]:
        try:
            with self._at_most(CHANNEL_S, "no answer to a command"):
                channel = self._connection.transport.open_session(timeout=2 * CHANNEL_S)  # so that ours tells it
                channel.settimeout(timeout_s)
                channel.exec_command(command)
            with self._at_most(whole_s or math.inf, "not done"), contextlib.closing(channel):
                yield channel
        except TimeoutError as error:
            raise HostError(f"no answer for {timeout_s:.0f} s", where=self._host.name) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._translated(error, self._connection) from error

    def _tunnel(self, address: str, port: int, timeout_s: float) -> ChannelSocket:
        """Open a TCP connection from the host to an address there."""
        try:
            channel = self._connection.transport.open_channel(
                "direct-tcpip", (address, port), ("127.0.0.1", 0), timeout=CHANNEL_S
            )
        except paramiko.ChannelException as error:
            what = f"nothing answers at {address}:{port} on the host ({error.text})"
            raise HostError(what, where=self._host.name) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._translated(error, self._connection) from error
        channel.settimeout(timeout_s)
        return ChannelSocket(channel)

    def _lines(self, channel: paramiko.Channel) -> Iterator[str]:
        rest = b""
        while data := channel.recv(65536):
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        if rest:
            yield rest.decode(errors="replace")

    def _check_end(self, channel: paramiko.Channel, *, answered: bool) -> None:
        """Tell why a program ended without an answer: sudo, a missing shell, a lost connection."""
        if answered:
            return
        said = b"".join(iter(lambda: channel.recv_stderr(65536), b"")).decode(errors="replace").strip()
        if "sudo" in said:
            user = self._connection.user
            raise HostError(
                f"sudo refused: {said.splitlines()[-1]}",
                where=self._host.name,
                hint=f"echo '{user} ALL=(root) NOPASSWD: ALL' | sudo tee /etc/sudoers.d/labdeploy  # on the host",
            )
        status = channel.recv_exit_status()
        what = "the connection was lost" if status < 0 else f"the command failed with exit status {status}"
        raise HostError(f"{what}: {said}" if said else what, where=self._host.name)

    def _translated(self, error: BaseException, at: Connection) -> HostError:
        """Say in plain words why a host, or a jump host on the way to it, cannot be used, with a command to type."""
        if isinstance(error, HostError):
            return error
        address, port, user, where = at.host, at.port, at.user, self._host.name
        known_hosts = self._known_hosts_files(at)[0]
        if isinstance(error, paramiko.BadHostKeyException):
            return HostError(
                f"{address} shows another host key ({_fingerprint(error.key)}) than the known one "
                f"({_fingerprint(error.expected_key)}); somebody may be in between",
                where=where,
                hint=f"ssh-keygen -R '{_key_name(at)}' -f {known_hosts}  # only if you know why it changed",
            )
        ours = self._host.ssh.key if at is self._connection else None
        key = shlex.quote(str(self._file(ours))) if ours else ""
        with_key = f" -i {key}" if key else ""
        try_it = f"ssh{with_key} -o UserKnownHostsFile={known_hosts} -p {port} {user}@{address} true"
        if missed := _missed(error):
            return HostError(f"{address}:{port} {missed}", where=where, hint=try_it)
        if isinstance(error, paramiko.AuthenticationException):
            hint = f"ssh-copy-id{with_key} -p {port} {user}@{address}"
            what = f"{user}@{address} refused the login{f' with key {key}' if key else ''}"
            return HostError(what, where=where, hint=hint)
        if isinstance(error, paramiko.SSHException) and "not found in known_hosts" in str(error):
            return HostError(
                f"the host key of {address} is unknown",
                where=where,
                hint=f"ssh-keyscan -p {port} {address} >> {known_hosts}  # then compare: ssh-keygen -lf {known_hosts}",
            )
        if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
            error = next(iter(error.errors.values()))
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        return HostError(f"{address}:{port}: {said}", where=where, hint=try_it)


def _missed(error: BaseException) -> str:
    """Say which deadline of the way in was missed; paramiko tells some of them by its words alone."""
    said = str(error)
    if isinstance(error, paramiko.AuthenticationException) and "timeout" in said:
        return f"does not answer to the login within {AUTH_S} s"
    if isinstance(error, paramiko.SSHException) and ("banner" in said or "existing session" in said):
        return f"takes connections, but no SSH server answers within {CONNECT_S} s"
    return f"does not answer within {CONNECT_S} s" if isinstance(error, TimeoutError) else ""


class _ChannelBytes(io.RawIOBase):
    """A channel's bytes as a raw stream, so that a buffered reader can stand on it."""

    def __init__(self, channel: paramiko.Channel) -> None:
        super().__init__()
        self._channel = channel

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 (any writable buffer)
        """Read what is there into a buffer."""
        data = self._channel.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class ChannelSocket:
    """What http.client asks of a socket, on a channel."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self.sendall = channel.sendall
        self.close = channel.close

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Give the stream that answers are read from."""
        return io.BufferedReader(_ChannelBytes(self._channel))


class _PromptSocket(socket.socket):
    """A TCP socket that has what comes after something was sent acknowledged at once, not up to 40 ms later.

    sshd sends its first answers as separate small packets, and before OpenSSH 10 its kernel keeps each back until the
    one before is acknowledged (Nagle): opening a session took 47 ms instead of 6 (OpenSSH 9.2, loopback).
    """

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Send; the kernel forgets the wish for prompt acknowledgements with each one."""
        n = super().send(data, flags)
        with contextlib.suppress(OSError, AttributeError):  # gone meanwhile; only Linux has it
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return n


def _transport_on(sock: socket.socket, **kwargs: Any) -> paramiko.Transport:  # noqa: ANN401
    """Make a transport for a socket, or for a jump host's channel, which is none.

    It sends small packets at once: connect and login take 22 ms instead of 64 (loopback). It ends when the host is gone
    without a word: without TCP_USER_TIMEOUT Linux goes on sending for 15 minutes. And it prefers AES-GCM, as OpenSSH 10
    does: with other ciphers paramiko compares the checksum of each packet byte by byte in Python.
    """
    if isinstance(sock, socket.socket):
        sock = _PromptSocket(sock.family, sock.type, sock.proto, fileno=sock.detach())
        with contextlib.suppress(OSError, AttributeError):  # only Linux has the second
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)
    transport = paramiko.Transport(sock, **kwargs)
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    return transport


class _Connection(Connection):  # type: ignore[misc]
    """A connection that only reads its configuration, so that those of many threads can share one.

    Fabric 3.2 looks for each attribute that it sets whether it belongs into the configuration, and writes one there.
    """

    __setattr__ = object.__setattr__

    def get_gateway(self) -> Any:  # noqa: ANN401 (a connection, a command, or none)
        """Give the way in; `ProxyJump none` of ssh_config(5) is no host of that name."""
        return None if self.ssh_config.get("proxyjump", "").lower() == "none" else super().get_gateway()


@functools.cache
def _ssh_settings() -> Config:
    """Read your SSH configuration, once for however many hosts.

    Given as an object, for Fabric reads the files of any other again, into it, with each jump host (`Config.clone`).
    """
    return Config(ssh_config=Config(overrides={"load_ssh_configs": True}).base_ssh_config)


_DEADLINES = {"banner_timeout": CONNECT_S, "auth_timeout": AUTH_S, "channel_timeout": CHANNEL_S}


@functools.cache
def _login_key(file: Path) -> paramiko.PKey:
    """Read a key once for however many hosts; by its name alone paramiko would try to read it as each kind for each."""
    return paramiko.PKey.from_path(file)


def _key_name(connection: Connection) -> str:
    """Give the name under which known_hosts lists a host."""
    if connection.port == paramiko.config.SSH_PORT:
        return str(connection.host)
    return f"[{connection.host}]:{connection.port}"


def _known_keys(file: Path, name: str) -> list[paramiko.PKey]:
    """Give the keys a known_hosts file lists for a name, line by line: one odd line must not hide the rest."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found, revoked = [], []
    for text in lines:
        if name not in text and "|1|" not in text:
            continue  # reading keys is what takes time, and a fleet's file has one for each host
        marker, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        try:
            entry = HostKeyEntry.from_line(rest)
        except Exception:  # noqa: BLE001, S112 (an unreadable line vouches for nobody)
            continue
        if entry is None or entry.key is None or not _names(entry, name):
            continue
        if marker == "@revoked":
            revoked.append(entry.key)
        elif not marker:
            found.append(entry.key)
    return [key for key in found if key not in revoked]


def _names(entry: HostKeyEntry, name: str) -> bool:
    """Tell whether a known_hosts entry is for a name; paramiko matches plain and hashed ones."""
    keys = paramiko.HostKeys()
    keys._entries.append(entry)  # type: ignore[attr-defined]  # noqa: SLF001 (the public way in is a whole file)
    return keys.lookup(name) is not None


def _fingerprint(key: paramiko.PKey) -> str:
    return str(key.fingerprint)
