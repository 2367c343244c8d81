"""Models on real hosts: copied over a connection that breaks, checked, renamed, removed, put back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from cutting_relay import CuttingRelay
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeHost

    from labdeploy.sandbox import SandboxHost

BIG_BYTES = 100_000_003  # of no round number
N_CUTS = 10
LEAST_CUT_BYTES = 20_000  # somewhere in the login
PART = "/srv/models/.big.gguf.labdeploy-part"


class Models(Lab):
    """Hosts whose models are looked at; no service is pushed unless a test does."""

    def file(self, name: str, n_bytes: int, seed: int = 1) -> Path:
        """Write a file of random bytes, the same ones for the same seed."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.Random(seed).randbytes(n_bytes))  # noqa: S311 (any bytes do)
        return path

    def sum_on(self, host: SandboxHost, path: str) -> str:
        """Give the sha256 of a file on a host."""
        return sandbox.run(host, "sha256sum", path).stdout.split()[0]

    def rows(self, host: SandboxHost) -> dict[str, dict[str, Any]]:
        """Give the models of a host by name, as `models ls` tells them."""
        ended = self.run("models", "ls", host.name, "--json")
        assert ended.code == 0, ended.err
        return {row["name"]: row for row in ended.json["hosts"][host.name]["models"]}

    def through(self, port: int) -> None:
        """Reach the first host through a relay on this port from now on."""
        known = self.folder / "relay_known_hosts"
        known.write_text("".join(f"[127.0.0.1]:{port} {key}\n" for key in self.host_keys()))
        inventory = json.loads(json.dumps({"models": {}, "hosts": {h.name: self._host(h, {}) for h in self.hosts}}))
        entry = inventory["hosts"][self.host.name]
        entry |= {"address": "127.0.0.1", "ssh": entry["ssh"] | {"port": port, "known_hosts": str(known)}}
        self.write(inventory | {"models": {"tiny": {"path": "tiny.gguf", "local": str(self.model)}}})


@pytest.fixture
def lab(trixie: SandboxHost, bookworm: SandboxHost, tiny_model: Path, tmp_path: Path) -> Iterator[Models]:
    """Return two hosts; their models go with the test."""
    yield Models(tmp_path, [trixie, bookworm], tiny_model)
    for host in (trixie, bookworm):
        sandbox.run(host, "sh", "-c", "rm -rf /srv/models /var/lib/labdeploy/models")


def wait_for_part(lab: Models, n_bytes: int, command: subprocess.Popen[bytes]) -> None:
    """Return when so much of the big file has arrived."""
    while int(lab.on_host("sh", "-c", f"stat -c %s {PART} 2>/dev/null || echo 0")) < n_bytes:
        assert command.poll() is None, "it ended before it was killed"
        time.sleep(0.02)


def test_a_copy_that_is_cut_ten_times_ends_whole(lab: Models) -> None:
    """Nine broken connections, then the command itself is killed: the file is the same, and little was sent twice."""
    big = lab.file("big.gguf", BIG_BYTES)
    chosen = random.Random()  # noqa: S311 (another place each time; the sum decides)
    cuts = [chosen.randrange(LEAST_CUT_BYTES, BIG_BYTES // N_CUTS) for _ in range(N_CUTS - 1)]
    with CuttingRelay((lab.host.address, lab.host.port), cuts) as relay:
        lab.through(relay.port)
        argv = [sys.executable, "-m", "labdeploy", "models", "push", lab.host.name, str(big)]
        with subprocess.Popen(argv, cwd=lab.folder, stderr=subprocess.PIPE) as command:
            wait_for_part(lab, BIG_BYTES // 4, command)
            while relay.done < len(cuts):
                assert command.poll() is None, f"it ended after {cuts}: {command.communicate()[1].decode()}"
                time.sleep(0.02)
            command.kill()
        assert lab.on_host("sh", "-c", "ls /srv/models | grep big || echo none") == "none", "no part has the name"
        shown = lab.run("models", "ls", lab.host.name)
        assert "big.gguf was cut off after" in shown.out, shown.out
        ended = lab.run("models", "push", lab.host.name, str(big), "--json")
    assert ended.code == 0, f"{cuts}: {ended.err}"
    (copied,) = ended.json["hosts"][lab.host.name]
    assert copied["sent_bytes"] + copied["kept_bytes"] == BIG_BYTES, f"{cuts}: {copied}"
    assert copied["kept_bytes"] > 0, f"{cuts}: {copied}"
    expected = hashlib.sha256(big.read_bytes()).hexdigest()
    assert lab.sum_on(lab.host, "/srv/models/big.gguf") == copied["sha256"] == expected
    assert lab.on_host(
        "sh", "-c", f"ls -A /srv/models; ! test -e {PART}; stat -c %a.%U /srv/models/big.gguf"
    ).split() == [
        "big.gguf",
        "tiny.gguf",
        "644.root",
    ]
    assert abs(float(lab.on_host("stat", "-c", "%.Y", "/srv/models/big.gguf")) - big.stat().st_mtime) < 0.001


def test_a_part_that_is_not_of_this_file_is_not_used(lab: Models) -> None:
    """What lies there from another file of the same name, or was damaged meanwhile, is sent anew."""
    small = lab.file("big.gguf", 3_000_000)
    sandbox.run(lab.host, "sh", "-c", f"head -c 1000000 /dev/zero >{PART}")
    assert lab.run("models", "rm", lab.host.name, "big.gguf", "-y").code == 0
    assert lab.on_host("ls", "-A", "/srv/models") == "tiny.gguf", "what is left of a copy can be removed"
    sandbox.run(lab.host, "sh", "-c", f"head -c 1000000 /dev/zero >{PART}")
    ended = lab.run("models", "push", lab.host.name, str(small), "--json")
    assert ended.code == 0, ended.err
    (copied,) = ended.json["hosts"][lab.host.name]
    assert (copied["sent_bytes"], copied["kept_bytes"]) == (3_000_000, 0)
    again = lab.run("models", "push", lab.host.name, str(small))
    assert "is there already" in again.out, again.out


def test_a_flipped_byte_is_found_and_the_right_file_comes_back(lab: Models) -> None:
    """Whether or not the file's time tells of it; then a push of the right file puts it right."""
    file = lab.file("some model.gguf", 5_000_000)
    host = lab.host.name
    assert lab.run("models", "push", host, str(file)).code == 0
    assert lab.run("models", "verify").code == 0
    flip = "printf '\\377' | dd of='/srv/models/some model.gguf' bs=1 seek=4321000 conv=notrunc status=none"
    sandbox.run(
        lab.host,
        "sh",
        "-c",
        f"touch -r '/srv/models/some model.gguf' /tmp/t; {flip}; touch -r /tmp/t '/srv/models/some model.gguf'",
    )
    quick = lab.run("models", "ls", host)
    assert "is not what it was" not in quick.out, "ls trusts size and time"
    ended = lab.run("models", "verify", host, "--json")
    assert ended.code == 8, ended.err
    found = {row["name"]: row for row in ended.json["hosts"][host]["files"]}
    assert found["some model.gguf"]["result"] == "damaged"
    assert found["some model.gguf"]["expected"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "is not what it was" in lab.run("models", "ls", host).out

    refused = lab.run("models", "push", host, str(file))
    assert (refused.code, "Replace it?" in refused.err) == (2, True), refused.err
    assert lab.run("models", "push", host, str(file), "-y").code == 0
    assert lab.run("models", "verify", host).code == 0


def test_between_hosts_renamed_backed_up_and_put_back(lab: Models) -> None:
    """A snapshot folder and a split model go from host to host, are renamed, removed, and restored from a manifest."""
    one, two = (host.name for host in lab.hosts)
    for name in ("config.json", "tokenizer/vocab.json", "model-1.safetensors", ".hidden"):
        (lab.folder / "snap" / name).parent.mkdir(parents=True, exist_ok=True)
        lab.file(f"snap/{name}", 300_000, seed=len(name))
    for part in (1, 2):
        lab.file(f"s-0000{part}-of-00002.gguf", 400_000, seed=part)
    assert lab.run("models", "push", one, "snap", "--as", "qwen/snap").code == 0
    assert lab.run("models", "push", one, "s-00001-of-00002.gguf").code == 0
    with CuttingRelay((lab.host.address, lab.host.port), [1 << 30, 100_000]) as relay:  # the second one reads a file
        lab.through(relay.port)
        ended = lab.run("models", "push", two, f"{one}:qwen/snap")
        assert ended.code == 0, ended.err
        assert relay.done == 1, "it was cut while it read"
    lab.set()
    assert lab.run("models", "push", two, f"{one}:s-00002-of-00002.gguf", "--as", "t-00001-of-00002.gguf").code == 0
    rows = [lab.rows(host) for host in lab.hosts]
    assert rows[0]["qwen/snap"]["sha256"] == rows[1]["qwen/snap"]["sha256"]
    assert len(rows[0]["qwen/snap"]["files"]) == 3, "what is hidden stays here"
    assert rows[1]["t-00001-of-00002.gguf"]["size_bytes"] == 800_000

    manifest = str(lab.folder / "models.json")
    assert lab.run("models", "backup", "-o", manifest).code == 0
    assert lab.run("models", "mv", one, "qwen/snap", "gone").code == 0
    assert lab.run("models", "verify", one).code == 0, "sums go with the name"
    assert lab.run("models", "rm", one, "s-00001-of-00002.gguf").code == 2, "no terminal, no -y"
    assert lab.run("models", "rm", one, "s-00001-of-00002.gguf", "tiny.gguf", "-y").code == 0
    assert list(lab.rows(lab.host)) == ["gone"]
    for part in lab.folder.glob("s-*.gguf"):
        part.unlink()  # now only the other host has them, under another name
    ended = lab.run("models", "restore", manifest, "--json")
    assert ended.code == 0, ended.err
    assert {row["name"] for row in ended.json["hosts"][one]} == {"qwen/snap", "s-00001-of-00002.gguf", "tiny.gguf"}
    assert {n: r["sha256"] for n, r in lab.rows(lab.host).items() if n != "gone"} == {
        n: r["sha256"] for n, r in rows[0].items()
    }
    assert lab.run("models", "restore", manifest).out == "nothing is missing\n"


def test_what_is_in_use_stays(make_host: MakeHost, tiny_model: Path, tmp_path: Path) -> None:
    """By a generation that is kept, by a unit of somebody else, by a process: not replaced, renamed or removed."""
    lab = Models(tmp_path, [make_host()], tiny_model)
    host, other = lab.host.name, lab.file("other.gguf", 1_000_000)
    lab.push_ok()
    for words in (
        ("push", host, str(other), "--as", "tiny.gguf", "-y"),
        ("rm", host, "tiny.gguf", "-y"),
        ("mv", host, "tiny.gguf", "new.gguf"),
    ):
        ended = lab.run("models", *words)
        assert (ended.code, "tiny.gguf" in ended.err, "generation 1" in ended.err) == (2, True, True), ended.err
        assert "process llama-server" in ended.err, ended.err
    assert lab.complete()

    assert lab.run("models", "push", host, str(other)).code == 0
    unit = "/etc/systemd/system/mine.service"
    sandbox.run(lab.host, "sh", "-c", f"printf '[Service]\\nExecStart=/bin/x -m /srv/models/other.gguf\\n' >{unit}")
    ended = lab.run("models", "rm", host, "other.gguf", "-y")
    assert (ended.code, "unit mine.service" in ended.err) == (2, True), ended.err
    sandbox.run(lab.host, "rm", unit)
    with contextlib.ExitStack() as stack:
        stack.callback(sandbox.run, lab.host, "systemctl", "stop", "reader")
        sandbox.run(lab.host, "systemd-run", "--unit=reader", "tail", "-f", "/srv/models/other.gguf")
        ended = lab.run("models", "rm", host, "other.gguf", "-y")
        assert (ended.code, "process tail" in ended.err) == (2, True), ended.err
    assert lab.run("models", "rm", host, "other.gguf", "-y").code == 0


def test_without_room_no_byte_is_sent(lab: Models) -> None:
    """The refusal says how much there is and how much it takes."""
    huge = lab.folder / "huge.gguf"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    ended = lab.run("models", "push", lab.host.name, str(huge))
    assert (ended.code, "1048576 MiB" in ended.err, "MiB free" in ended.err) == (2, True, True), ended.err
    assert lab.on_host("ls", "-A", "/srv/models") == "tiny.gguf"


def test_two_copies_of_one_file_do_not_meet(lab: Models) -> None:
    """The second is refused while the first is at work, and takes over from one that has stood still; all end whole."""
    big = lab.file("big.gguf", BIG_BYTES // 2)
    words = ("models", "push", lab.host.name, str(big))
    with subprocess.Popen([sys.executable, "-m", "labdeploy", *words], cwd=lab.folder) as command:
        wait_for_part(lab, 1, command)
        command.send_signal(signal.SIGSTOP)
        time.sleep(1)  # what is on its way is written
        lab.on_host("touch", "-d", "1 hour", PART)
        second = lab.run(*words)
        lab.on_host("touch", "-d", "1 hour ago", PART)
        third = lab.run(*words)
        command.send_signal(signal.SIGCONT)
        assert command.wait(120) == 0, "it finds that the file is there"
    assert (second.code, "another copy is writing it" in second.err) == (6, True), second.err
    assert third.code == 0, third.err
    assert lab.sum_on(lab.host, "/srv/models/big.gguf") == hashlib.sha256(big.read_bytes()).hexdigest()
