"""Builds of llama-server on a real host: installed from an archive, cut off, chosen, pushed, removed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import time
from typing import TYPE_CHECKING

import pytest
from lab import Lab

from labdeploy import builds
from labdeploy.sandbox_root import root_path

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeHost

BALLAST_BYTES = 64 << 20  # so that an installation takes long enough to be cut off


def archive(path: Path, *, ballast_bytes: int = 0) -> str:
    """Pack sid's own llama-server as releases are packed, in a folder of its own; gives the sha256."""
    ballast = path.with_name("ballast")
    ballast.write_bytes(os.urandom(ballast_bytes))
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(root_path("sid") / "usr/bin/llama-server", "llama-1/llama-server")
        tar.add(ballast, "llama-1/ballast")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def lab(make_host: MakeHost, tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab whose inventory names no runner: the lock does."""
    lab = Lab(tmp_path, [make_host("sid")], tiny_model)
    lab.extra = {"runners": {}}
    lab.set()
    return lab


def install(lab: Lab, version: str, file: Path, sha256: str) -> tuple[str, ...]:
    """Give the words that install an archive."""
    return ("runner", "install", lab.host.name, "llama-server", version, "--from", str(file), "--sha256", sha256)


def rows(lab: Lab) -> dict[str, dict]:
    """Give the builds on the host by name."""
    ended = lab.run("runner", "ls", "--json")
    assert ended.code == 0, ended.err
    return {row["name"]: row for row in ended.json["hosts"][lab.host.name]}


def test_a_build_is_installed_used_replaced_and_removed(lab: Lab) -> None:
    """The unit names the versioned path; a rollback goes back to the first build; what is named stays."""
    host, file = lab.host.name, lab.folder / "llama.tar.gz"
    one = builds.name_of("b1", first := archive(file))
    ended = lab.run(*install(lab, "b1", file, first))
    assert ended.code == 0, ended.err
    assert f"{one}: installed" in ended.out
    assert "unchanged" in lab.run(*install(lab, "b1", file, first)).out
    lab.push_ok()
    assert builds.program("llama-server", one) in lab.show("ExecStart")
    assert lab.complete()

    two = builds.name_of("b2", second := archive(file, ballast_bytes=1))
    assert lab.run(*install(lab, "b2", file, second)).code == 0
    assert lab.push_ok()["result"] == "unchanged", "an installed build is not a used one"
    assert lab.run("runner", "use", host, "llama-server", "b2").code == 0
    lab.push_ok()
    assert builds.program("llama-server", two) in lab.show("ExecStart")
    assert [rows(lab)[name]["generations"] for name in (one, two)] == [[1], [2]]

    refused = lab.run("runner", "rm", host, "llama-server", "b1", "-y")
    assert (refused.code, "generation 1" in refused.err) == (2, True), refused.err
    lab.run("rollback", host)
    assert builds.program("llama-server", one) in lab.show("ExecStart")
    assert lab.complete()


def test_an_installation_that_is_cut_off_leaves_nothing_to_name(lab: Lab) -> None:
    """Killed in the middle there is no build; the same command again makes it whole, and nothing is left over."""
    file = lab.folder / "llama.tar.gz"
    name = builds.name_of("b1", sha256 := archive(file, ballast_bytes=BALLAST_BYTES))
    argv = [sys.executable, "-m", "labdeploy", *install(lab, "b1", file, sha256)]
    with subprocess.Popen(argv, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        new = f"/opt/labdeploy/runners/llama-server/.{name}.new/archive"
        while not lab.on_host("sh", "-c", f"[ ! -e {new} ] || echo there"):
            assert command.poll() is None, command.communicate()[0]
            time.sleep(0.01)
        lab.on_host("systemctl", "kill", "--signal=KILL", "labdeploy-build.service")
        assert command.wait(60) == 1, "it says that it was cut off"
    assert rows(lab) == {}
    ended = lab.run(*install(lab, "b1", file, sha256))
    assert ended.code == 0, ended.err
    assert list(rows(lab)) == [name]
    assert lab.on_host("ls", "-A", "/opt/labdeploy/runners/llama-server") == name

    assert lab.run("runner", "rm", lab.host.name, "llama-server", "b1", "-y").code == 0
    assert rows(lab) == {}


def test_what_is_no_good_is_refused_and_leaves_nothing(lab: Lab) -> None:
    """A wrong sum, an archive without the program, one that does not start; a push that is running."""
    file = lab.folder / "llama.tar.gz"
    sha256 = archive(file)
    wrong = lab.run(*install(lab, "b1", file, "0" * 64))
    assert (wrong.code, f"has the sha256 {sha256}" in wrong.err) == (2, True), wrong.err

    folder = lab.folder / "unpacked"
    (folder / "bin").mkdir(parents=True)
    empty = lab.run("runner", "install", lab.host.name, "llama-server", "b1", "--from", str(folder))
    assert (empty.code, "no program named llama-server in it" in empty.err) == (2, True), empty.err
    (folder / "bin" / "llama-server").write_text("#!/bin/sh\necho no such GPU >&2; exit 3\n")
    (folder / "bin" / "llama-server").chmod(0o755)
    broken = lab.run("runner", "install", lab.host.name, "llama-server", "b1", "--from", str(folder))
    assert (broken.code, "it does not start here: no such GPU" in broken.err) == (1, True), broken.err

    lab.on_host("systemd-run", "--unit=labdeploy-txn", "--description=push 1 by me", "--collect", "sleep", "60")
    for words in (
        install(lab, "b1", file, sha256),
        ("runner", "rm", lab.host.name, "llama-server", "b1-00000000", "-y"),
    ):
        held = lab.run(*words)
        assert (held.code, "a push holds it: push 1 by me" in held.err) == (6, True), held.err
    lab.on_host("systemctl", "stop", "labdeploy-txn")
    assert rows(lab) == {}
    assert lab.on_host("ls", "-A", "/opt/labdeploy/runners/llama-server") == ""
