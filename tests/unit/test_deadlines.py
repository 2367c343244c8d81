"""A host that hangs, at each step of the way in and after it, is given up in time and holds no other."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

import paramiko
import pytest

from labdeploy import deploy, dial, ssh
from labdeploy.errors import HostError
from labdeploy.hardware import Cpu, Hardware
from labdeploy.host import HostConnection
from labdeploy.inventory import Host, Ssh
from labdeploy.schema import Mib
from labdeploy.ssh import SshConnection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fabric import Connection

SHORT_S = 1
PATIENCE_S = 30  # of the test itself; what it waits for takes a second on an idle machine
KEY = paramiko.ECDSAKey.generate()


class Steps(paramiko.ServerInterface):
    """An SSH server that gets as far as a step and then hangs."""

    def __init__(self, hangs_at: str, released: threading.Event) -> None:
        self._hangs_at = hangs_at
        self._released = released

    def _step(self, name: str) -> None:
        if name == self._hangs_at:
            self._released.wait(PATIENCE_S)

    def get_allowed_auths(self, _username: str) -> str:
        """Keys."""
        return "publickey"

    def check_auth_publickey(self, _username: str, _key: paramiko.PKey) -> int:
        """Any key will do."""
        self._step("auth")
        return paramiko.common.AUTH_SUCCESSFUL

    def check_channel_request(self, _kind: str, _number: int) -> int:
        """Any channel will do."""
        self._step("channel")
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, _command: bytes) -> bool:
        """Take the command, and say nothing, or something again and again, but never all."""
        self._step("exec")
        if self._hangs_at == "end":
            threading.Thread(target=self._chatter, args=(channel,), daemon=True).start()
        if self._hangs_at == "result":
            threading.Thread(target=self._answer, args=(channel,), daemon=True).start()
        return True

    def _chatter(self, channel: paramiko.Channel) -> None:
        with contextlib.suppress(OSError):
            while not self._released.wait(0.05):
                channel.sendall(b"step\twatch\t6\n")

    def _answer(self, channel: paramiko.Channel) -> None:
        self._released.wait(PATIENCE_S)
        with contextlib.suppress(OSError):
            channel.sendall(b"result\tunchanged\t1\n")
            channel.shutdown_write()


class HangingHost:
    """A loopback server that hangs at a step.

    `connect` has a queue that is full, so that SYNs are dropped; `result` answers once it is released.
    """

    def __init__(self, hangs_at: str) -> None:
        self.hangs_at = hangs_at
        self.released = threading.Event()
        self.n_connections = 0
        self._open: list[socket.socket | paramiko.Transport] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0 if hangs_at == "connect" else 64)
        self.port = self._listener.getsockname()[1]
        if hangs_at == "connect":
            self._fill_queue()
        else:
            threading.Thread(target=self._serve, daemon=True).start()

    def _fill_queue(self) -> None:
        for _ in range(4):
            full = socket.socket()
            full.setblocking(False)  # noqa: FBT003
            full.connect_ex(("127.0.0.1", self.port))
            self._open.append(full)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.n_connections += 1
                self._open.append(sock)
                if self.hangs_at == "kex":
                    sock.sendall(b"SSH-2.0-hangs\r\n")
                elif self.hangs_at != "banner":
                    transport = paramiko.Transport(sock)
                    transport.add_server_key(KEY)
                    self._open.append(transport)
                    transport.start_server(server=Steps(self.hangs_at, self.released), event=threading.Event())

    def close(self) -> None:
        """Let go of everything."""
        self.released.set()
        self._listener.close()
        for each in self._open:
            each.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every deadline short."""
    for name, seconds in {"CONNECT_S": 1, "AUTH_S": 1, "CHANNEL_S": 1, "LOGIN_S": 3}.items():
        monkeypatch.setattr(ssh, name, seconds * SHORT_S)
    monkeypatch.setattr(dial, "CONNECT_S", SHORT_S)
    for name in ssh._DEADLINES:
        monkeypatch.setitem(ssh._DEADLINES, name, SHORT_S)


@pytest.fixture
def hanging(request: pytest.FixtureRequest) -> Iterator[HangingHost]:
    """Return a host that hangs at the step that the test names."""
    server = HangingHost(request.param)
    yield server
    server.close()


def reachable(folder: Path, port: int, name: str = "h1") -> Host:
    """Return a host at a port of this machine, and write its key and a login's key."""
    if not (folder / "key").exists():
        paramiko.ECDSAKey.generate().write_private_key_file(str(folder / "key"))
    with (folder / "known_hosts").open("a") as file:
        file.write(f"[127.0.0.1]:{port} {KEY.get_name()} {KEY.get_base64()}\n")
    ssh = Ssh("root", port, "key", "known_hosts")
    return Host(Hardware(Cpu(1), Mib(1024)), address="127.0.0.1", ssh=ssh, name=name)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("hanging", "said"),
    [
        ("connect", "does not answer within"),
        ("banner", "no SSH server answers"),
        ("kex", "no SSH server answers"),
        ("auth", "does not answer to the login within"),
        ("channel", "no answer to a command within"),
        ("exec", "no answer to a command within"),
        ("answer", "no answer for"),
        ("end", "not done within"),
    ],
    indirect=["hanging"],
)
def test_a_host_that_hangs_is_given_up(hanging: HangingHost, said: str, tmp_path: Path) -> None:
    """At each step within its own deadline, and told as what it is; never the hour that paramiko would wait."""
    started = time.monotonic()
    with (
        pytest.raises(HostError, match=said) as raised,
        HostConnection(reachable(tmp_path, hanging.port), tmp_path) as there,
    ):
        there.run("state", timeout_s=SHORT_S * 2, whole_s=SHORT_S * 4)
    assert time.monotonic() - started < PATIENCE_S
    assert str(raised.value).startswith("h1: ")


def test_hosts_that_hang_hold_no_other(tmp_path: Path) -> None:
    """However many of them wait: one that answers is done first, though it is the last in the inventory."""
    slow, good = HangingHost("result"), HangingHost("result")
    good.released.set()
    done: list[str] = []

    def note(outcome: deploy.Outcome) -> None:
        done.append(outcome.host)
        slow.released.set()

    hosts = [*(reachable(tmp_path, slow.port, f"slow{i}") for i in range(40)), reachable(tmp_path, good.port, "good")]
    try:
        outcomes = deploy.run_jobs(
            [deploy.Job(each, "push", "0" * 64) for each in hosts], tmp_path, "id", on_outcome=note
        )
    finally:
        slow.close()
        good.close()
    assert done[0] == "good"
    assert [str(outcome.error) for outcome in outcomes if outcome.result != "unchanged"] == []


def test_a_host_that_is_gone_without_a_word_is_noticed(tmp_path: Path) -> None:
    """The kernel gives a connection up when what it sent, keepalives at least, is not acknowledged."""
    good = HangingHost("result")
    try:
        with HostConnection(reachable(tmp_path, good.port), tmp_path) as there:
            sock = there._connection.transport.sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == ssh.DEAD_S * 1000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert there._connection.transport.packetizer._Packetizer__keepalive_interval == ssh.KEEPALIVE_S
    finally:
        good.close()


def test_an_answer_in_two_packets_is_not_kept_back() -> None:
    """A server with Nagle keeps the second back until the first is acknowledged: 40 ms, where Linux is not asked."""
    answer, took = b"ab", []

    def serve(there: socket.socket) -> None:
        with there:
            while there.recv(1):
                for byte in answer:
                    time.sleep(0.001)
                    there.send(bytes([byte]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        here, (there, _) = socket.create_connection(listener.getsockname()), listener.accept()
    server = threading.Thread(target=serve, args=(there,), daemon=True)
    server.start()
    transport = ssh._transport_on(here)
    with contextlib.closing(transport.sock) as sock:
        sock.settimeout(PATIENCE_S)
        for _ in range(15):
            started = time.monotonic()
            sock.send(b"?")
            assert sock.recv(1) + sock.recv(1) == answer
            took.append(time.monotonic() - started)
        sock.shutdown(socket.SHUT_WR)
        server.join(PATIENCE_S)
    assert sorted(took)[len(took) // 2] < 0.03


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("hanging", ["connect", "banner", "result"], indirect=True)
def test_a_connection_that_was_dialed_ahead_is_the_one_that_is_used(hanging: HangingHost, tmp_path: Path) -> None:
    """Once; and what goes wrong with it is told as ever, in the same time."""
    host = reachable(tmp_path, hanging.port)
    with dial.dialing([host]):
        if hanging.hangs_at == "result":
            with HostConnection(host, tmp_path), HostConnection(host, tmp_path):
                assert hanging.n_connections == 2
            return
        started = time.monotonic()
        said = "does not answer within" if hanging.hangs_at == "connect" else "no SSH server answers"
        with pytest.raises(HostError, match=said), HostConnection(host, tmp_path):
            pass
        assert time.monotonic() - started < 3 * SHORT_S


def test_a_connection_that_has_ended_is_told_as_that_hosts_error(tmp_path: Path) -> None:
    """Whatever is asked of it next, a check of its service through a tunnel, too."""
    good = HangingHost("result")
    try:
        with HostConnection(reachable(tmp_path, good.port), tmp_path) as there:
            there._connection.transport.close()
            with pytest.raises(HostError, match="h1: "):
                there.http("127.0.0.1", 8080, 1)
    finally:
        good.close()


def test_many_connections_share_one_configuration_and_write_nothing_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fabric writes what is set on a connection into its configuration, and merges it anew under whoever reads it."""
    shared = ssh._ssh_settings()
    monkeypatch.setattr(type(shared), "merge", lambda _self: pytest.fail("the configuration is merged again"))
    before = repr(shared)
    good = HangingHost("result")
    good.released.set()
    try:
        with HostConnection(reachable(tmp_path, good.port), tmp_path) as there:
            assert there._connection.config is shared
            assert there._connection.transport.get_security_options().ciphers[0] == "aes128-gcm@openssh.com"
    finally:
        good.close()
    assert repr(shared) == before


def test_your_ssh_configuration_is_read_once_and_what_it_cannot_say_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jump hosts add nothing to it, `none` is no host, and what Fabric does not take is an error of that host."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text(
        "Host behind\n  ProxyJump jump\nHost here\n  ProxyJump none\nHost wrong\n  ConnectTimeout soon\n  Port ssh\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    ssh._ssh_settings.cache_clear()
    shared = ssh._ssh_settings()
    rules = len(shared.base_ssh_config._config)

    def configured(address: str) -> Connection:
        host = Host(Hardware(Cpu(1), Mib(1024)), address=address, ssh=Ssh(None, None, None, None), name="h1")
        return SshConnection(host, tmp_path)._configured()

    try:
        assert configured("behind").gateway.host == "jump"
        assert configured("here").gateway is None
        assert len(shared.base_ssh_config._config) == rules
        with pytest.raises(HostError, match="your SSH configuration for wrong cannot be used") as raised:
            configured("wrong")
        assert raised.value.hint.startswith("ssh -G wrong")
    finally:
        ssh._ssh_settings.cache_clear()
