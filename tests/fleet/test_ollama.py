"""Ollama on a real host: a model without a copy, the ladder after a start, builds, and from one runner to another."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from ollama_lab import KINDS, OllamaLab

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeHost

GPU = {"name": "RTX 3090", "vram": "24GiB", "compute_capability": "8.6"}


@pytest.fixture(params=KINDS)
def lab(request: pytest.FixtureRequest, make_host: MakeHost, tiny_model: Path, tmp_path: Path) -> OllamaLab:
    """Return a lab with the stand-in, and another one with the real Ollama where there is one."""
    return OllamaLab(tmp_path, [make_host("sid")], tiny_model, kind=request.param)


@pytest.fixture
def stand_in(make_host: MakeHost, tiny_model: Path, tmp_path: Path) -> OllamaLab:
    """Return a lab with the stand-in alone, which can be told to misbehave; on the oldest systemd."""
    return OllamaLab(tmp_path, [make_host("bookworm")], tiny_model)


def test_a_model_is_served_without_a_copy(lab: OllamaLab) -> None:
    """It is a hard link in a store that its generation names: idempotent, undone by rollback, safe from Ollama's GC."""
    one, two = lab.versions()
    old = lab.install(one)
    before = lab.room_kib()
    first = lab.push_ok()
    assert first["services"]["chat"]["action"] == "started"
    store = lab.store()
    (blob,) = lab.on_host("find", store, "-size", "+1000k").splitlines()
    assert lab.inode(blob) == lab.inode("/srv/models/tiny.gguf")
    assert lab.room_kib() - before < 64, "a second copy"
    assert blob.endswith(lab.on_host("sha256sum", blob).split()[0])
    assert lab.api("/api/tags")["models"][0]["name"] == "tiny:latest"
    assert lab.loaded()["context_length"] == 2048
    assert lab.push_ok()["result"] == "unchanged"

    lab.set(context_length=1024, stop=["</s>"])
    lab.push_ok()
    assert lab.store() != store
    assert lab.loaded()["context_length"] == 1024
    assert lab.run("rollback", lab.host.name).code == 0
    assert (lab.store(), lab.loaded()["context_length"]) == (store, 2048)

    lab.on_host("find", store, "-exec", "touch", "-h", "-d", "3 hours ago", "{}", "+")
    files = lab.on_host("find", store, "-type", "f")
    lab.set(env={"OLLAMA_NOPRUNE": "0"})
    lab.push_ok()
    assert lab.on_host("find", store, "-type", "f") == files, "Ollama's own garbage collection"
    assert lab.complete()

    lab.extra = {"hardware": {"cpu": {"cores": 2}, "ram": "8GiB", "gpus": [GPU]}}
    lab.set()
    fell = lab.push(watch_s=0)
    assert fell.code == 5, fell.err
    assert re.search(r"GPU: 0 of \d+ MiB are on it, all was planned", " ".join(fell.err.split())), fell.err
    assert lab.complete(), "the old generation serves again"
    lab.extra = {}
    lab.set()

    new = lab.install(two, release=2)
    assert lab.run("runner", "use", lab.host.name, "ollama", new).code == 0
    lab.push_ok()
    assert f"/{new}/bin/ollama" in lab.show("ExecStart")
    assert lab.api("/api/version")["version"] == two
    assert lab.run("rollback", lab.host.name).code == 0
    assert f"/{old}/bin/ollama" in lab.show("ExecStart")
    assert lab.api("/api/version")["version"] == one


def test_from_one_runner_to_the_other_and_back(lab: OllamaLab) -> None:
    """Same file, same port, same story; a rollback goes the other way, and no store is left that nobody needs."""
    lab.install(lab.versions()[0])
    inode = lab.inode("/srv/models/tiny.gguf")
    for runner in ("llama-server", "ollama", "llama-server"):
        lab.set(runner=runner)
        pushed = lab.push_ok()
        assert pushed["result"] == "changed"
        assert lab.complete(), runner
        assert runner in lab.show("Description")
        assert lab.run("check").code == 0
    assert lab.run("rollback", lab.host.name).code == 0
    assert lab.loaded()["name"] == "tiny:latest"
    for context in (1024, 1536):
        lab.set(runner="llama-server", ctx_size=context)
        lab.push_ok()
    assert lab.stores() == []
    assert lab.inode("/srv/models/tiny.gguf") == inode
    assert lab.on_host("stat", "-c", "%h", "/srv/models/tiny.gguf") == "1"


def test_what_ollama_says_fails_a_push(stand_in: OllamaLab) -> None:
    """Each rung of the ladder brings the old generation back and says why, with the numbers."""
    lab = stand_in
    lab.install("0.33.0")
    lab.set(env={"STAND_IN": "slow=3"})
    lab.push_ok()
    since = lab.show("InvocationID")
    lab.extra = {"hardware": {"cpu": {"cores": 2}, "ram": "8GiB", "gpus": [GPU]}}
    for odd, said in {
        "vram=70": "GPU: 3 of 4 MiB are on it, all was planned",
        "load=503": "maximum pending requests exceeded",
        "blind": "does not list tiny, which lies in its store; import_by: api",
    }.items():
        lab.set(env={"STAND_IN": odd})
        ended = lab.push(watch_s=0)
        assert (ended.code, said in " ".join(ended.err.split())) == (5, True), ended.err
        assert "generation 1 is back" in " ".join(ended.err.split())
    assert lab.show("InvocationID") != since
    assert lab.complete()

    lab.set(env={"STAND_IN": "vram=100"})
    ended = lab.push(watch_s=0)
    assert ended.code == 0, ended.err
    assert "first token" in ended.out
    lab.on_host(
        "sh",
        "-c",
        "echo 0.24.0 > $(dirname $(dirname $(readlink -f /opt/labdeploy/runners/ollama/*/bin/ollama)))/version",
    )
    lab.set(env={"STAND_IN": "vram=100"}, context_length=1024)
    ended = lab.push()
    assert (ended.code, "is Ollama 0.24.0, the plan is for 0.33.0" in " ".join(ended.err.split())) == (2, True), (
        ended.err
    )


def test_a_model_that_cannot_be_linked(stand_in: OllamaLab) -> None:
    """It says what a copy costs; a file that was replaced is served anew."""
    lab = stand_in
    lab.install("0.33.0")
    lab.on_host("sh", "-c", "mv /srv/models/tiny.gguf /run/tiny.gguf && ln -s /run/tiny.gguf /srv/models/tiny.gguf")
    ended = lab.push()
    assert ended.code == 2, ended.err
    assert "a copy takes 4 MiB" in " ".join(ended.err.split())
    assert "import_by: copy" in ended.err
    assert lab.stores() == []
    lab.set(import_by="copy")
    lab.push_ok()
    assert lab.complete()

    lab.on_host("sh", "-c", "rm /srv/models/tiny.gguf && mv /run/tiny.gguf /srv/models/tiny.gguf")
    lab.set()
    lab.push_ok()
    assert lab.push_ok()["result"] == "unchanged"
    lab.on_host("sh", "-c", "cd /srv/models && cp tiny.gguf new && mv new tiny.gguf")
    assert lab.push_ok()["services"]["chat"]["action"] == "restarted"
    (blob,) = lab.on_host("find", lab.store(), "-size", "+1000k").splitlines()
    assert lab.inode(blob) == lab.inode("/srv/models/tiny.gguf")


def test_the_api_is_the_last_way(lab: OllamaLab) -> None:
    """Where a version does not take what lies in its store, Ollama makes the model; once for each set of parameters."""
    lab.install(lab.versions()[0])
    lab.set(import_by="api", env={"STAND_IN": "blind"})
    first = lab.push("--json")
    assert first.code == 0, first.err
    assert lab.loaded()["context_length"] == 2048
    assert lab.complete()
    made = lab.api("/api/tags")["models"][0]["digest"]
    assert lab.push_ok()["result"] == "unchanged"
    lab.set(import_by="api", context_length=1024)
    lab.push_ok()
    assert lab.loaded()["context_length"] == 1024
    assert lab.api("/api/tags")["models"][0]["digest"] != made
    assert lab.run("rollback", lab.host.name).code == 0
    assert lab.loaded()["context_length"] == 2048
