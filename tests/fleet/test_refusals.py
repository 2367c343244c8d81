"""What a push must refuse, each with a clear error and its exit code, and with nothing changed on the host."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from cutting_relay import CuttingRelay
from lab import UNIT, Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost


@pytest.fixture
def lab(fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab with a host to which generation 1 was pushed."""
    found = Lab(tmp_path, [fresh_host], tiny_model)
    found.push_ok()
    return found


@pytest.fixture
def unchanged(lab: Lab) -> Iterator[None]:
    """See that the test leaves the host as it was, serving."""
    before = lab.snapshot()
    yield
    assert lab.snapshot() == before
    assert lab.complete()


@pytest.mark.usefixtures("unchanged")
class TestOnTheHost:
    """Refused by what the host is like."""

    def test_model_missing(self, lab: Lab) -> None:
        """A model that is not on the host is named, with the command that brings it."""
        inventory = lab._host(lab.host, {"model": "other"})
        models = {"other": {"path": "gone.gguf", "local": str(lab.model)}}
        lab.write({"models": models, "hosts": {lab.host.name: inventory}})
        ended = lab.push()
        assert ended.code == 2
        assert "/srv/models/gone.gguf is not there" in ended.err
        assert "hint: labdeploy models push" in ended.err

    def test_model_is_another_file(self, lab: Lab) -> None:
        """A copy that was cut off is seen by its size, before anything stops."""
        lab.on_host("sh", "-c", "head -c 1000 /srv/models/tiny.gguf > /srv/models/cut.gguf")
        models = {"cut": {"path": "cut.gguf", "local": str(lab.model)}}
        lab.write({"models": models, "hosts": {lab.host.name: lab._host(lab.host, {"model": "cut"})}})
        ended = lab.push()
        assert ended.code == 2
        assert "has 1000 bytes" in ended.err

    def test_model_not_readable(self, lab: Lab) -> None:
        """The service runs as a user of its own; a model only root can read is refused."""
        lab.on_host(
            "sh", "-c", "cp /srv/models/tiny.gguf /srv/models/private.gguf && chmod 600 /srv/models/private.gguf"
        )
        models = {"private": {"path": "private.gguf", "local": str(lab.model)}}
        lab.write({"models": models, "hosts": {lab.host.name: lab._host(lab.host, {"model": "private"})}})
        ended = lab.push()
        assert ended.code == 2
        assert "not readable" in ended.err

    def test_runner_missing(self, lab: Lab) -> None:
        """A runner that is not installed is named."""
        lab.extra = {"runners": {"llama-server": "/opt/nowhere/llama-server"}}
        lab.set()
        ended = lab.push()
        assert ended.code == 2
        assert "/opt/nowhere/llama-server is not there" in ended.err

    def test_a_unit_that_is_not_ours(self, lab: Lab) -> None:
        """A unit of the same name that labdeploy did not write is never touched."""
        lab.on_host(
            "sh", "-c", "printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/labdeploy-web.service"
        )
        web = {"runner": "llama-server", "model": "tiny", "port": 8090, "bind": lab.host.address}
        lab.services = {"web": web}
        lab.set(threads=1)
        ended = lab.push()
        assert ended.code == 2
        assert "labdeploy-web.service exists and was not made by labdeploy" in ended.err
        lab.on_host("rm", "/etc/systemd/system/labdeploy-web.service")

    def test_a_unit_that_systemd_does_not_accept(self, lab: Lab) -> None:
        """A user's own template is verified by the host's systemd: any complaint is a refusal."""
        templates = lab.folder / "templates"
        templates.mkdir()
        (templates / "llama-server.service.j2").write_text(
            '{% extends "base.service.j2" %}\n{% block restart %}\nRestartSec=abc\n{% endblock %}\n', encoding="utf-8"
        )
        ended = lab.push()
        assert ended.code == 2
        assert "systemd does not accept" in ended.err
        assert "RestartSec" in ended.err


class TestConnecting:
    """Refused before anything runs on the host."""

    def test_no_answer(self, lab: Lab) -> None:
        """A host that does not answer is told apart from all else: exit code 4."""
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            lab.extra = {"ssh": lab._host(lab.host, {})["ssh"] | {"port": closed.getsockname()[1]}}
            lab.set()
            ended = lab.push()
        assert ended.code == 4
        assert ended.err.startswith(f"error: {lab.host.name}: ")

    def test_unknown_host_key(self, lab: Lab) -> None:
        """A host that nobody vouched for is refused, with the ssh-keyscan line."""
        (lab.folder / "empty").write_text("")
        self._known_hosts(lab, "empty")
        ended = lab.push()
        assert ended.code == 4
        assert "host key" in ended.err
        assert "hint: ssh-keyscan" in ended.err

    def test_changed_host_key(self, lab: Lab) -> None:
        """A key other than the known one is refused; an odd line in the file hides nothing."""
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", lab.folder / "other"], check=True)
        key = (lab.folder / "other.pub").read_text().split()[1]
        name = lab.host.address if lab.host.port == 22 else f"[{lab.host.address}]:{lab.host.port}"
        (lab.folder / "wrong").write_text(f"@cert-authority nonsense\n{name} ssh-ed25519 {key}\n")
        self._known_hosts(lab, "wrong")
        ended = lab.push()
        assert ended.code == 4
        assert "another host key" in ended.err
        assert ended.err.count("SHA256:") == 2

    def test_odd_lines_in_known_hosts(self, lab: Lab) -> None:
        """One line that nobody can read must not drop the whole file."""
        text = lab.host.known_hosts.read_text()
        (lab.folder / "odd").write_text(f"# comment\n@revoked\n{lab.host.address} ssh-rsa !!!not-base64\n{text}")
        self._known_hosts(lab, "odd")
        assert lab.push().code == 0

    def test_revoked_host_key(self, lab: Lab) -> None:
        """A key that is marked as revoked is not trusted, even where another line lists it."""
        text = lab.host.known_hosts.read_text()
        (lab.folder / "revoked").write_text(text + "".join(f"@revoked {line}\n" for line in text.splitlines()))
        self._known_hosts(lab, "revoked")
        assert lab.push().code == 4

    def test_wrong_login_key(self, lab: Lab) -> None:
        """A login that is refused says which key was tried."""
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", lab.folder / "stranger"], check=True)
        lab.extra = {"ssh": lab._host(lab.host, {})["ssh"] | {"key": "./stranger"}}
        lab.set()
        ended = lab.push()
        assert ended.code == 4
        assert "refused the login" in ended.err
        assert "stranger" in ended.err

    def test_a_jump_host_must_be_known_too(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """The way that your SSH configuration names is held to the same: its key is not taken unseen."""
        folder = lab.folder / "home" / ".ssh"
        folder.mkdir(parents=True)
        with CuttingRelay((lab.host.address, lab.host.port), []) as relay:
            (folder / "config").write_text(
                f"Host way-in\n  HostName 127.0.0.1\n  Port {relay.port}\n  User root\n  IdentityFile {lab.host.key}\n"
                f"Host {lab.host.address}\n  ProxyJump way-in\n"
            )
            monkeypatch.setenv("HOME", str(lab.folder / "home"))
            ended = lab.push()
            assert ended.code == 4
            assert f"hint: ssh-keyscan -p {relay.port} 127.0.0.1 >>" in ended.err
            here = f"[127.0.0.1]:{relay.port}"
            (folder / "known_hosts").write_text("".join(f"{here} {key}\n" for key in lab.host_keys()))
            assert lab.push().code == 0

    def _known_hosts(self, lab: Lab, name: str) -> None:
        lab.extra = {"ssh": lab._host(lab.host, {})["ssh"] | {"known_hosts": f"./{name}"}}
        lab.set()


class TestSudo:
    """A login that is not root."""

    @pytest.fixture
    def user(self, lab: Lab) -> Lab:
        """Give the lab a login `admin` on the host."""
        lab.on_host(
            "sh",
            "-c",
            "useradd -m -s /bin/bash admin && mkdir -p ~admin/.ssh && cp ~root/.ssh/authorized_keys ~admin/.ssh/"
            " && chown -R admin: ~admin/.ssh",
        )
        lab.extra = {"ssh": lab._host(lab.host, {})["ssh"] | {"user": "admin"}}
        lab.set(ctx_size=4096)
        return lab

    def test_sudo_that_asks(self, user: Lab) -> None:
        """Where sudo wants a password the push ends at once, changes nothing and says what to write."""
        before = user.snapshot()
        ended = user.push()
        assert ended.code == 4
        assert "sudo" in ended.err
        assert "NOPASSWD" in ended.err
        assert user.snapshot() == before

    def test_sudo_that_does_not_ask(self, user: Lab) -> None:
        """With NOPASSWD everything works as for root."""
        user.on_host("sh", "-c", "echo 'admin ALL=(root) NOPASSWD: ALL' > /etc/sudoers.d/admin")
        assert user.push_ok()["generation"] == 2
        assert user.run("status", "--json").json["hosts"][user.host.name]["services"]["chat"]["healthy"]
        assert user.run("rollback", "-y").code == 0
        assert user.n_ctx() == 2048


class TestFullDisk:
    """No room on the host."""

    @pytest.fixture
    def small_etc(self, make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Lab:
        """Return a lab whose host has /etc on a file system of its own, with generation 1 pushed."""
        lab = Lab(tmp_path, [make_host("sid")], tiny_model)
        lab.on_host(
            "sh",
            "-c",
            "mkdir /mnt/etc && mount -t tmpfs -o size=24m tmpfs /mnt/etc && cp -a /etc/. /mnt/etc/"
            " && mount --bind /mnt/etc /etc && systemctl daemon-reload",
        )
        lab.push_ok()
        return lab

    def test_refused_while_the_old_one_serves(self, small_etc: Lab) -> None:
        """A push to a full disk says how much is missing and changes nothing; with room again it just works."""
        lab = small_etc
        lab.on_host("sh", "-c", "dd if=/dev/zero of=/etc/filler bs=4k 2>/dev/null; true")
        before = lab.snapshot()
        lab.set(ctx_size=4096)
        ended = lab.push()
        assert ended.code == 1
        assert "KiB are free" in ended.err
        assert lab.snapshot() == before
        assert lab.complete()
        lab.on_host("rm", "/etc/filler")
        assert lab.push_ok()["generation"] == 2

    def test_rollback_works_on_a_nearly_full_disk(self, small_etc: Lab) -> None:
        """Going back after a failed push needs no new room: what it needs was staged before the switch."""
        lab = small_etc
        lab.set(ctx_size=4096, flags=["--no-such-flag"])
        ended = lab.push()
        assert ended.code == 5
        assert lab.n_ctx() == 2048
        assert lab.show("NeedDaemonReload") == "no"
        assert UNIT in lab.on_host("ls", "/etc/systemd/system")


def test_a_second_push_meets_the_lock(lab: Lab) -> None:
    """While one push runs, another is told who holds the host and changes nothing."""
    lab.set(ctx_size=4096)
    argv = ["push", lab.host.name, "--watch", "6", "--json"]
    import sys  # noqa: PLC0415

    first = subprocess.Popen(
        [sys.executable, "-m", "labdeploy", *argv], cwd=lab.folder, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(100):
            if lab.on_host("systemctl", "is-active", "labdeploy-txn", check=False) == "active":
                break
        second = lab.push()
        assert second.code == 6, second.err
        assert "another push holds it" in second.err
        assert "by " in second.err
        waited = lab.push("--wait", "60", "-v", watch_s=0)
        assert waited.code == 0, waited.err
        assert "waiting: another push holds it" in waited.err
        assert first.poll() is not None, "it did not wait"
    finally:
        out, _ = first.communicate(timeout=60)
    assert first.returncode == 0, out
    assert lab.n_ctx() == 4096
    assert sandbox.run(lab.host, "systemctl", "list-units", "--all", "labdeploy-txn*", "--no-legend").stdout == ""
