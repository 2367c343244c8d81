"""A push that has nothing to do plans nothing: what is remembered, and every change that makes it forget."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import TOP

from labdeploy import kept as kept_files
from labdeploy import remembered
from labdeploy.remembered import Memory, Push, push_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Lab

NOT_NEEDED = ("jinja2", "labdeploy.plan", "labdeploy.render", "labdeploy.inventory", "labdeploy.runners", "rich")
NOT_NEEDED += ("http.client", "unittest.mock", "asyncio")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember nothing of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def ready(lab: Lab) -> Lab:
    """Give an inventory of one host that cannot be reached, with a model that has a local copy in a folder."""
    lab.copy_lock()
    (lab.folder / "known_hosts").touch()
    lab.write("""
        models:
          qwen3-4b: {path: Qwen3-4B-Q4_K_M.gguf, local: copies/tiny.gguf}
        hosts:
          h:
            address: 127.0.0.1
            ssh: {user: me, port: 1, known_hosts: known_hosts}
            hardware: {cpu: {cores: 4}, ram: 64GiB}
            services: {a: {runner: llama-server, model: qwen3-4b, port: 8080}}
    """)
    return lab


def kept(lab: Lab, *words: str) -> list[Push]:
    """Keep what the inventory's host would be pushed."""
    inventory = lab.load(lab.path.read_text())
    pushes = [push_of(host, "0" * 64, 60) for host in inventory.hosts.values()]
    Memory(lab.path, words).keep(pushes, inventory)
    return pushes


def test_the_same_inputs_are_remembered(ready: Lab):
    """For the same choice of hosts; login, services and hash as they were."""
    assert Memory(ready.path, ["h"]).recall() is None
    assert Memory(ready.path, ["h"]).recall() is None
    pushes = kept(ready, "h")
    assert Memory(ready.path, ["h"]).recall() == pushes
    assert pushes[0].ssh.port == 1
    assert Memory(ready.path, []).recall() is None


CHANGES: dict[str, Callable[[Path], object]] = {
    "the inventory": lambda folder: _append(folder / "inventory.yaml"),
    "the lock": lambda folder: _append(folder / "inventory.lock.yaml"),
    "the lock is gone": lambda folder: (folder / "inventory.lock.yaml").unlink(),
    "a template": lambda folder: _put(folder / "templates" / "base.service.j2"),
    "a local copy": lambda folder: _put(folder / "copies" / "tiny.gguf"),
}


def _append(path: Path) -> None:
    path.write_text(f"{path.read_text()}# more\n")


def _put(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("x")


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_is_seen(ready: Lab, name: str):
    """Nothing that a plan or a template reads is missed."""
    kept(ready)
    CHANGES[name](ready.folder)
    assert Memory(ready.path, []).recall() is None


def test_another_labdeploy_remembers_nothing(ready: Lab, monkeypatch: pytest.MonkeyPatch):
    """A file of its own that changed, or another version of what it renders with."""
    kept(ready)
    own = [str(path) for path in remembered._own_files(TOP / "labdeploy")]
    assert {"apply.sh", "plan.py", "base.service.j2"} <= {os.path.basename(path) for path in own}  # noqa: PTH119
    monkeypatch.setattr(remembered, "_own_files", lambda _package: iter([ready.path]))
    assert Memory(ready.path, []).recall() is None


def test_an_input_that_changes_meanwhile_is_not_kept(ready: Lab):
    """What was rendered may be of either text."""
    inventory = ready.load(ready.path.read_text())
    memory = Memory(ready.path, [])
    CHANGES["the inventory"](ready.folder)
    memory.keep([], inventory)
    assert Memory(ready.path, []).recall() is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inputs": 1}', "\x00"])
def test_a_file_that_cannot_be_read_is_no_memory(ready: Lab, tmp_path: Path, text: str):
    """Cut off, or of an older labdeploy: everything is planned as if it were not there."""
    kept(ready)
    (file,) = (tmp_path / "cache" / "labdeploy" / "pushes").iterdir()
    file.write_text(text)
    assert Memory(ready.path, []).recall() is None


def test_a_folder_that_cannot_be_written_costs_only_time(ready: Lab, monkeypatch: pytest.MonkeyPatch):
    """A push works without."""
    (ready.folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(ready.folder / "file"))
    kept(ready)
    assert Memory(ready.path, []).recall() is None


def test_only_the_latest_are_kept(ready: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder does not grow without end."""
    monkeypatch.setattr(kept_files, "MOST", 3)
    for i in range(6):
        kept(ready, f"h{i}")
    assert len(list((tmp_path / "cache" / "labdeploy" / "pushes").iterdir())) == 3
    assert Memory(ready.path, ["h5"]).recall()


def test_a_second_push_imports_no_planner(ready: Lab):
    """What the first one needed to plan and render, the second one does not even read."""
    argv = [sys.executable, "-X", "importtime", "-m", "labdeploy", "-i", str(ready.path), "push", "h"]
    copies = ready.folder / "copies"
    assert not copies.exists()

    def imported() -> set[str]:
        ended = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert ended.returncode == 4, ended.stderr
        assert "127.0.0.1:1: Connection refused" in ended.stderr
        return {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")}

    assert set(NOT_NEEDED[:4]) <= imported()
    assert not set(NOT_NEEDED) & imported()


@pytest.mark.parametrize("wants", ["Mock", "AsyncMock"])
def test_invoke_is_whole_whatever_it_wants_of_mocks(wants: str):
    """An invoke that wants more than our stand-in has is imported as it is; nobody else gets the stand-in."""
    code = (
        "import sys, types, labdeploy.lean as lean\n"
        "for name in [n for n in sys.modules if n.startswith('invoke')]: del sys.modules[name]\n"
        f"module = types.ModuleType(lean.MOCK); module.{wants} = object\n"
        "lean._stand_in = lambda: module\n"
        "lean.import_invoke()\n"
        "import fabric, invoke, unittest.mock\n"
        "assert unittest.mock.patch and invoke.Context and fabric.Connection\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TOP)
