"""Stores of models as Ollama keeps them on disk: what is in one, and how the host makes, keeps and removes them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_ollama_runner import LLAMA_8B, budget, gpu, plan, request

import labdeploy
from labdeploy.errors import InventoryError
from labdeploy.facts.build import Build
from labdeploy.models.gguf import read_header
from labdeploy.models.model import ModelFacts
from labdeploy.models.shape import model_shape
from labdeploy.runners.ollama_store import MODEL_DIGEST, Recipe
from labdeploy.tiny_model import write_tiny_model

CODE = Path(labdeploy.__file__).parent
PROGRAM = (
    (CODE / "unchanged.sh").read_text()
    + (CODE / "ollama.sh").read_text()
    + (CODE / "apply.sh").read_text().removesuffix('"$@"\n')
)
MANIFEST = "manifests/registry.ollama.ai/library/llama/latest"


def files(**settings: Any) -> dict[str, bytes]:  # noqa: ANN401
    """Give the files of a store by their path in it."""
    planned = plan(request(**settings), budget(gpu()))
    return {path.removeprefix("stores/chat/"): data for path, data in planned.host_files.items()}


def parameters(found: dict[str, bytes]) -> dict[str, Any]:
    """Give the parameters that a store serves its model with."""
    layer = next(layer for layer in json.loads(found[MANIFEST])["layers"] if layer["mediaType"].endswith(".params"))
    return dict(json.loads(found["blobs/" + layer["digest"].replace(":", "-")]))


# --- what is in one ---------------------------------------------------------------------------------------------


def test_every_blob_is_named_by_its_content():
    """Ollama computes no sum when it loads, so a wrong name would stay unseen until it is pulled or created over."""
    found = files(stop=("</s>",), template="{{ .Prompt }}\n")
    blobs = {path: data for path, data in found.items() if path.startswith("blobs/")}
    assert len(blobs) == 3
    assert all(path == f"blobs/sha256-{hashlib.sha256(data).hexdigest()}" for path, data in blobs.items())


def test_the_manifest_names_every_blob_with_its_size():
    """A layer that is not named is removed at the next start; one that is named and missing fails the load."""
    found = files(template="{{ .Prompt }}")
    manifest = json.loads(found[MANIFEST])
    assert (manifest["schemaVersion"], manifest["mediaType"]) == (
        2,
        "application/vnd.docker.distribution.manifest.v2+json",
    )
    model, *others = manifest["layers"]
    assert model == {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": MODEL_DIGEST,
        "size": LLAMA_8B.size_bytes,
    }
    named = {f"blobs/{layer['digest'].replace(':', '-')}": layer["size"] for layer in (manifest["config"], *others)}
    assert named == {path: len(data) for path, data in found.items() if path.startswith("blobs/")}
    assert [layer["mediaType"].rpartition(".")[2] for layer in others] == ["params", "template"]


def test_the_config_says_what_kind_of_model_it_is():
    """`ollama show` and /api/ps tell it."""
    found = files()
    config = json.loads(found["blobs/" + json.loads(found[MANIFEST])["config"]["digest"].replace(":", "-")])
    assert (config["model_format"], config["model_family"], config["model_families"]) == ("gguf", "llama", ["llama"])
    assert config["model_type"] == "8.0B"


def test_blobs_are_those_that_ollama_writes(tmp_path: Path):
    """Byte for byte: these are the names that Ollama 0.33 gave them when it made the tiny model over its API."""
    shape = model_shape(read_header(write_tiny_model(tmp_path / "tiny.gguf")))
    recipe = Recipe("tiny", "/srv/models/tiny.gguf", shape, {"num_thread": 2, "num_ctx": 2048}, None)
    assert {path for path in recipe.files if path.startswith("blobs/")} == {
        "blobs/sha256-830e9514d424c0e267e9956c30c159a45dc1822ae4247a1cf5a09d030441eafd",
        "blobs/sha256-a5cc17a55464e6424d30cae49494eb4730a2d19c5e4988f1992933f0f7bf32d4",
    }


def test_parameters_are_those_of_the_plan():
    """The context of the plan, however a client asks; no number of layers unless one is asked for."""
    asked = {"context_length": 8192, "threads": 5}
    assert parameters(files(**asked)) == {"num_ctx": 8192, "num_thread": 5}
    more = parameters(files(**asked, num_gpu=20, stop=("</s>", '"')))
    assert more == {"num_ctx": 8192, "num_thread": 5, "num_gpu": 20, "stop": ["</s>", '"']}


def test_another_content_is_another_store():
    """So a store never changes, and each generation finds its own."""
    stores = [
        plan(request(**settings), budget(gpu())).host_facts["store"]
        for settings in ({}, {}, {"context_length": 4096}, {"stop": ("x",)}, {"template": "{{ .Prompt }}"})
    ]
    assert stores[0] == stores[1]
    assert len(set(stores)) == 4
    assert all(store.startswith("/srv/models/.ollama/chat-") for store in stores)


def test_with_the_api_ollama_makes_the_same_model():
    """Of a blob that it was sent, with the same parameters, in a store that it may write."""
    planned = plan(request(import_by="api", context_length=4096, template="{{ .Prompt }}"), budget(gpu()))
    assert planned.env["OLLAMA_MODELS"] == "/var/lib/labdeploy-chat/models"
    assert "store" not in planned.host_facts
    body = json.loads(planned.host_files["stores/chat/create.json"])
    assert body["files"] == {"llama 8b.gguf": MODEL_DIGEST}
    assert (body["parameters"]["num_ctx"], body["template"]) == (4096, "{{ .Prompt }}")


@pytest.mark.parametrize(
    ("settings", "more", "what", "hint"),
    [
        ({"models": "/srv/ollama", "stop": ("x",)}, {}, "stop is for a store that labdeploy makes", "take out one"),
        (
            {},
            {"model": ModelFacts("llama", "/srv/models/a-00001-of-00003.gguf", 1, "gguf", LLAMA_8B, None)},
            "one of several parts",
            "llama-gguf-split --merge",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(settings: dict[str, Any], more: dict[str, Any], what: str, hint: str):
    """Before anything is sent."""
    with pytest.raises(InventoryError, match=what) as caught:
        plan(request(more=more, **settings), budget(gpu()))
    assert hint in caught.value.hint


# --- versions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "has", "lacks"),
    [
        (None, "LLAMA_ARG_THREADS", "OLLAMA_GPU_OVERHEAD"),
        ("0.33.0-rc2", "LLAMA_ARG_FIT_TARGET", "OLLAMA_GPU_OVERHEAD"),
        ("0.24.0", "OLLAMA_GPU_OVERHEAD", "LLAMA_ARG_THREADS"),
    ],
)
def test_variables_follow_the_version(version: str | None, has: str, lacks: str):
    """What a version does not read would only look as if it were tuned."""
    build = Build("/usr/local/bin/ollama", version=version)
    planned = plan(request(more={"build": build}), budget(gpu()))
    assert has in planned.env
    assert lacks not in planned.env
    assert planned.host_facts["version"] == (version or ">=0.30")


def test_the_path_of_a_build_tells_its_version():
    """Builds that labdeploy installed need no probe."""
    asked = request(more={"binary": "/opt/labdeploy/runners/ollama/0.24.0-12345678/bin/ollama"})
    planned = plan(asked, budget(gpu()))
    assert planned.host_facts["version"] == "0.24.0"
    assert planned.env["OLLAMA_GPU_OVERHEAD"] == str(256 * 2**20)
    assert planned.memory["host"].cache_mib == 0


def test_what_an_older_version_does_otherwise_is_warned_of():
    """Holes, settings that do nothing, and a cache that stays as it was."""
    build = Build("/usr/local/bin/ollama", version="0.16.3")
    card = gpu(compute_capability="7.0")
    said = " ".join(
        plan(request(more={"build": build}, kv_cache_type="q8_0", ctx_checkpoints=4), budget(card)).warnings
    )
    assert all(words in said for words in ("CVE-2026-7482", "ctx_checkpoints: nothing before", "flash_attention: true"))


@pytest.mark.parametrize(
    ("planned", "found", "suits"),
    [
        (">=0.30", "0.33.0", 0),
        (">=0.30", "0.30.0-rc1", 0),
        (">=0.30", "0.9.6", 1),
        (">=0.30", "", 1),
        ("0.33.0", "0.33.0", 0),
        ("0.33.0", "0.0.0", 0),
        ("0.33.0", "0.33.1", 1),
        ("0.33.0", "", 1),
    ],
)
def test_the_host_compares_versions(planned: str, found: str, suits: int, tmp_path: Path):
    """A build that was not told its version says 0.0.0 and cannot be compared."""
    assert host(tmp_path, f"version='{planned}'; version_suits '{found}'; echo $?") == f"{suits}\n"


# --- on the host ------------------------------------------------------------------------------------------------


def host(folder: Path, script: str) -> str:
    """Run a script with the functions of the host's program, with its own folders below this one."""
    head = f"ROOT={folder}/etc; TXN={folder}/txn; NEW=$TXN/new; FROM=000000; VERB=push; _name=chat\n"
    done = subprocess.run(
        ["sh", "-c", f"PROGRAM=x\n{PROGRAM}\n{head}\n{script}", "x"], capture_output=True, check=False
    )
    assert done.stderr == b""
    return done.stdout.decode()


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Return a host's folders, with a generation in hand whose service has a store to be made."""
    new = tmp_path / "txn" / "new"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.gguf").write_bytes(b"GGUF" + bytes(100_000))
    found = {"blobs/sha256-1": b"{}", MANIFEST: b'{"layers":[{"digest":"@model-digest@"}]}'}
    for path, data in found.items():
        (new / "stores" / "chat" / path).parent.mkdir(parents=True, exist_ok=True)
        (new / "stores" / "chat" / path).write_bytes(data)
    (new / "services").mkdir()
    model, store = tmp_path / "models" / "m.gguf", tmp_path / "models" / ".ollama" / "chat-1"
    facts = {"unit": "u.service", "model": model, "model_bytes": 100_004, "import": "link", "store": store}
    (new / "services" / "chat").write_text("".join(f"{key}={value}\n" for key, value in facts.items()))
    (new / "units").write_text("u.service chat\n")
    return tmp_path


def test_a_store_is_made_of_a_link(lab: Path):
    """One inode, the true sum in the manifest; made once, and made again when it or the file is another."""
    assert host(lab, "stale_stores $NEW; make_stores; stale_stores $NEW") == " u.servicestep\timport\tchat\t0\n"
    model, store = lab / "models" / "m.gguf", lab / "models" / ".ollama" / "chat-1"
    blob = store / "blobs" / f"sha256-{hashlib.sha256(model.read_bytes()).hexdigest()}"
    assert blob.samefile(model)
    assert json.loads((store / MANIFEST).read_text())["layers"][0]["digest"] == f"sha256:{blob.name[7:]}"
    assert host(lab, "make_stores") == ""
    model.unlink()
    model.write_bytes(b"GGUF" + bytes(100_000))
    assert host(lab, "make_stores") == "step\timport\tchat\t0\n"
    assert blob.samefile(model)


def test_a_sum_is_computed_once_for_a_file(lab: Path):
    """A second store of the same file takes it from the first: models are large."""
    host(lab, "make_stores")
    made = lab / "models" / ".ollama" / "chat-1" / ".labdeploy" / "made"
    made.write_text(made.read_text().rpartition(" ")[0] + " c0ffee\n")
    assert host(lab, f"sum_of {lab}/models/m.gguf") == "c0ffee"


def test_a_store_that_cannot_be_made_leaves_nothing(lab: Path):
    """It says what a copy would take and what to write."""
    no_link = """ln() { case $1 in -sfn) command ln "$@" ;; *) echo 'ln: failed: Not permitted'; false ;; esac; }"""
    said = host(lab, f"{no_link}; make_stores")
    assert "refused\t2\tchat: no hard link" in said
    assert "(Not permitted); a copy takes 0 MiB" in said
    assert "import_by: copy" in said
    assert not list((lab / "models" / ".ollama").iterdir())


@pytest.mark.parametrize("kept", ["current", "good", "previous"])
def test_only_stores_that_nobody_needs_are_removed(lab: Path, kept: str):
    """Not what runs, not what a rollback needs, and not what another host serves from over a shared disk."""
    host(lab, "make_stores")
    (lab / "etc" / "gen").mkdir()
    (lab / "txn" / "new").rename(lab / "etc" / "gen" / "000001")
    (lab / "etc" / kept).symlink_to("gen/000001")
    store, link = lab / "models" / ".ollama" / "chat-1", lab / "etc" / "stores" / "chat-1"
    host(lab, "prune_stores")
    assert store.exists()
    (lab / "etc" / kept).unlink()
    other = store / ".labdeploy" / "users" / "another-host"
    other.touch()
    host(lab, "prune_stores")
    assert (store.exists(), link.is_symlink()) == (True, False)
    other.unlink()
    host(lab, f"mkdir -p $ROOT/stores; ln -s {store} {link}; prune_stores")
    assert (store.parent.exists(), link.is_symlink()) == (False, False)
    assert (lab / "models" / "m.gguf").stat().st_nlink == 1


def ps(**changes: Any) -> str:  # noqa: ANN401
    """Write an answer of /api/ps with a model of ours and another one; None leaves a key out."""
    ours = {
        "name": "tiny:latest",
        "model": "tiny:latest",
        "size": 5218 << 20,
        "digest": "00ff",
        "details": {"format": "gguf", "families": ["llama"], "parameter_size": "8.0B"},
        "expires_at": "2318-03-01T12:00:00.1+01:00",
        "size_vram": 5218 << 20,
        "context_length": 2048,
    }
    other = {"name": "tiny2:latest", "size": 1, "size_vram": 0, "context_length": 1}
    kept = {key: value for key, value in (ours | changes).items() if value is not None}
    return json.dumps({"models": [other, kept, other]}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"size_vram": 3912 << 20}, "chat: GPU: 3912 of 5218 MiB are on it, all was planned: the rest is on the CPU"),
        ({"size_vram": None}, "chat: GPU: 0 of 5218 MiB are on it, all was planned: the rest is on the CPU"),
        ({"context_length": 4096}, "chat: context: loaded with 4096 tokens, 2048 were planned"),
        ({"context_length": None}, ""),
        ({"name": "gone:latest"}, "chat: load: /api/ps does not list tiny after it was loaded"),
    ],
)
def test_where_a_model_lies_is_read_from_ps(changes: dict[str, Any], said: str, tmp_path: Path):
    """Of our model alone, whatever else is loaded; a version that does not tell the context is believed."""
    (tmp_path / "ps").write_text(ps(**changes))
    script = f"""
        http() {{ cat {tmp_path}/ps; }}
        last_words() {{ :; }}
        api=/api served=tiny offload=full n_ctx=2048 gpu=cuda
        rung_placed || printf '%s' "$reason"
    """
    assert host(tmp_path, script) == said
