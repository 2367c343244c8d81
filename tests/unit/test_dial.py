"""Connections that are opened ahead: to whom, how often, and what becomes of those that fail."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from labdeploy import dial
from labdeploy.remembered import Login, Push

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S = 10


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Return a socket that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let there be one SSH configuration, which is not there yet."""
    file = tmp_path / "config"
    monkeypatch.setattr(dial, "CONFIGURATIONS", (file,))
    return file


def host(address: str, port: int | None) -> Push:
    """Return what a push knows of a host."""
    return Push("h1", address, Login("root", port, None, None), (), "0" * 64, 60)


def refused() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_one_who_needs_a_connection_finds_it_once(listener: socket.socket, address: str) -> None:
    """By number or by name; a second one gets none, for it is in use."""
    port = listener.getsockname()[1]
    with dial.dialing([host(address, port)]):
        there, _ = listener.accept()
        with contextlib.closing(there), connection(address, port) as sock:
            there.sendall(b"SSH-2.0-x\r\n")
            sock.settimeout(PATIENCE_S)
            assert sock.recv(100) == b"SSH-2.0-x\r\n"
        assert dial.dialed(address, port) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_one_that_nobody_needs_is_closed(listener: socket.socket, address: str) -> None:
    """Without a word."""
    with dial.dialing([host(address, listener.getsockname()[1])]):
        there, _ = listener.accept()
    with contextlib.closing(there):
        there.settimeout(PATIENCE_S)
        assert there.recv(100) == b""


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_one_that_was_refused_is_told_to_whom_it_was_for(address: str) -> None:
    """By the error that connecting there has."""
    port = refused()
    with dial.dialing([host(address, port)]), pytest.raises(ConnectionRefusedError):
        dial.dialed(address, port)


def test_a_network_that_is_not_there_is_met_by_whoever_needs_it(listener: socket.socket) -> None:
    """And the hosts after it are dialed as ever."""
    port = listener.getsockname()[1]
    with dial.dialing([host("fe80::1%nowhere", 22), host("255.255.255.255", 22), host("127.0.0.1", port)]):
        assert dial.dialed("fe80::1%nowhere", 22) is None
        with connection("127.0.0.1", port):
            pass


@pytest.mark.parametrize(
    ("text", "dials"),
    [
        ("Host *\n  SendEnv LANG\n  # ProxyJump is for others\nHost hostname\n", True),
        ("Host gpu\n  HostName 10.0.0.1\n", False),
        ("proxyjump=jump\n", False),
        ("Match all\n\tProxyCommand nc %h %p\n", False),
        ("Port 2222", False),
    ],
)
def test_where_your_ssh_configuration_knows_other_ways_nobody_is_dialed(
    listener: socket.socket, own_configuration: Path, text: str, *, dials: bool
) -> None:
    """A host that is meant to be reached through another one is not knocked at first."""
    own_configuration.write_text(text)
    at = listener.getsockname()
    with dial.dialing([host(*at)]):
        assert (at in dial._dialed) == dials


def test_no_more_are_dialed_than_are_talked_to_at_once(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server waits two minutes for one that says nothing."""
    monkeypatch.setattr(dial, "WORKERS", 1)
    at = listener.getsockname()
    with dial.dialing([host(*at), host("127.0.0.1", refused())]):
        assert list(dial._dialed) == [at]


def test_a_name_that_is_slow_to_be_looked_up_holds_nobody(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only whoever wants that one waits for it."""
    known = threading.Event()
    looked_up = socket.getaddrinfo

    def slow(name: str, *args: object, **kwargs: object) -> object:
        if name != "slow":
            return looked_up(name, *args, **kwargs)  # type: ignore[arg-type]
        known.wait(PATIENCE_S)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    at = listener.getsockname()
    with dial.dialing([host("slow", 22), host("slow", 23), host(*at)]):
        with connection(*at):
            pass
        known.set()
        with pytest.raises(socket.gaierror):
            dial.dialed("slow", 22)


def connection(address: str, port: int) -> contextlib.closing[socket.socket]:
    """Return the connection that was dialed there; it must be there."""
    return contextlib.closing(dial.dialed(address, port) or pytest.fail("none was dialed"))
