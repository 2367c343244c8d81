"""Models as files: what is one model, what identifies it, manifests, and what is found to copy from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from labdeploy import model_copy, model_files, model_restore, report_models
from labdeploy.errors import InventoryError
from labdeploy.host import Line
from labdeploy.model_files import Store
from labdeploy.models.files import ModelFile, StoredModel, grouped, manifest, read_manifest, require_plain

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Lab

SPLIT = [f"big/q-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
SNAPSHOT = ["hf/config.json", "hf/model-1.safetensors", "hf/tok/vocab.json"]
HOST = "cpu: {cores: 8}, ram: 64GiB"


def of(*names: str, **more: Any) -> list[StoredModel]:  # noqa: ANN401
    """Group files of these names, each with a sum made of its name."""
    return grouped(ModelFile(name, 10, "1.5", hashlib.sha256(name.encode()).hexdigest(), **more) for name in names)


# --- what is one model --------------------------------------------------------------------------------------------


def test_split_files_and_snapshots_are_one_model_each():
    """A projector, a template or a lone config.json are files by themselves."""
    found = of(*SPLIT, *SNAPSHOT, "a.gguf", "mmproj-a.gguf", "notes.txt", "lone/config.json")
    assert [(model.name, model.kind, len(model.files)) for model in found] == [
        ("a.gguf", "gguf", 1),
        (SPLIT[0], "split", 3),
        ("hf", "snapshot", 3),
        ("lone/config.json", "file", 1),
        ("mmproj-a.gguf", "gguf", 1),
        ("notes.txt", "file", 1),
    ]


def test_the_file_by_which_runners_find_a_model_is_written_last():
    """So that a copy which is cut off between two files is not taken for a model."""
    split, snapshot = of(*SPLIT, *SNAPSHOT)
    assert split.files[-1].name == SPLIT[0]
    assert snapshot.files[-1].name == "hf/config.json"


def test_a_snapshot_in_another_belongs_to_it():
    """Repositories keep original weights in a folder below."""
    (model,) = of(*SNAPSHOT, "hf/original/config.json", "hf/original/x.safetensors")
    assert (model.name, len(model.files)) == ("hf", 5)


def test_missing_parts_are_named():
    """Two of three parts are no model that could be served."""
    (model,) = of(SPLIT[0], SPLIT[2])
    assert model.missing == (SPLIT[1],)


@pytest.mark.parametrize("name", ["x-00004-of-00003.gguf", "x-00000-of-00003.gguf"])
def test_a_part_that_cannot_be_is_a_file(name: str):
    """What somebody named oddly is still listed."""
    assert of(name)[0].kind == "gguf"


def test_the_sum_of_several_files_is_that_of_their_list():
    """So that anyone can check it with sha256sum; the folder's own name is not in it."""
    (model,) = of(*SNAPSHOT)
    lines = "".join(f"{f.sha256}  {f.name[3:]}\n" for f in sorted(model.files, key=lambda f: f.name))
    assert model.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    moved = replace(model, name="x/hf", files=tuple(replace(f, name=f"x/{f.name}") for f in model.files))
    assert moved.sha256 == model.sha256
    unknown = replace(model, files=(replace(model.files[0], sha256=""), *model.files[1:]))
    assert unknown.sha256 == ""


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.gguf", "a//b.gguf", ".hidden.gguf", "a/.b/c.gguf", "a\tb", ""])
def test_a_place_outside_or_hidden_is_refused(name: str):
    """What could not be listed, or leads out of models_dir, is not written."""
    with pytest.raises(InventoryError, match="no place below models_dir"):
        require_plain(name)


def test_a_split_model_keeps_its_numbers_when_it_is_renamed():
    """Whether the new name is written with a number or without."""
    (model,) = of(*SPLIT)
    expected = [f"new/r-0000{i}-of-00003.gguf" for i in (2, 3, 1)]
    for new in ("new/r.gguf", "new/r-00001-of-00003.gguf"):
        assert [to for _, to in model_files.renamed(model, new)] == expected


# --- what a host says ---------------------------------------------------------------------------------------------


class Answers:
    """A connection that gives the same lines to whatever it is asked."""

    name = "gpu1"

    def __init__(self, *lines: str) -> None:
        self._lines = [Line(kind, tuple(fields)) for kind, *fields in (line.split("|") for line in lines)]

    def run(self, *_: object, **__: object) -> list[Line]:
        """Give the lines."""
        return self._lines


def test_a_listing_is_read():
    """Files with sums and users, a copy that was cut off, and the room that is left."""
    found = model_files.store(
        Answers(  # type: ignore[arg-type]
            "room|1024",
            "file|a.gguf|10|1.5|aa|bb|/home/me/a.gguf|2026",
            "part|sub/.b.gguf|7",
            "used|a.gguf|generation|9",
            "used|a.gguf|generation|10",
            "used|a.gguf|unit|labdeploy-chat.service",
            "used|a.gguf|process|llama-server (812)",
        ),
        "/srv/models",
    )
    assert (found.free_bytes, found.parts) == (1 << 20, (("sub/b.gguf", 7),))
    (model,) = found.models
    assert model.users[:2] == ("generation 10", "generation 9")
    assert model.is_changed, "it has another sum than when it came"
    text = report_models.stores_text({"gpu1": found}, {"gpu1": {"c.gguf": "chat"}})
    assert "generation 10, 9; process llama-server (812)" in text
    assert "gpu1: sub/b.gguf was cut off after 7 B" in text
    assert "gpu1: c.gguf is not there; chat of the inventory serves it" in text


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("verified|a|read|10|aa|aa", "ok"),
        ("verified|a|read|10|aa|bb", "damaged"),
        ("verified|a|read|10|aa|", "recorded"),
        ("verified|a|read|10||bb", "unreadable"),
        ("verified|a|missing", "missing"),
    ],
)
def test_a_check_is_read(line: str, result: str):
    """Each way that reading a file may end."""
    answers: Any = Answers(line, "result|verified")
    assert [file.result for file in model_files.verify(answers, "/srv/models", ["a"])] == [result]


def test_a_model_that_is_not_there_is_named_with_one_that_is_near():
    """A typing error must not cost a look at the list."""
    with pytest.raises(InventoryError, match=r'did you mean "qwen\.gguf"'):
        Store("/srv/models", 0, tuple(of("qwen.gguf"))).model("qwem.gguf", "gpu1")


def test_one_name_with_two_contents_is_told():
    """The same file name on two hosts should be the same file."""
    one, two = (Store("/srv/models", 0, tuple(of("a.gguf"))) for _ in range(2))
    two = replace(two, models=(replace(two.models[0], files=(ModelFile("a.gguf", 10, sha256="ff" * 32),)),))
    text = report_models.stores_text({"gpu1": one, "gpu2": two}, {"gpu1": {}, "gpu2": {}})
    assert "warning: a.gguf is not the same everywhere" in text


# --- sources ------------------------------------------------------------------------------------------------------


def local(folder: Path, *names: str) -> None:
    """Write small files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_local_sources(lab: Lab):
    """A file, a part for all parts, a folder, a model of the inventory by its name and by its local copy."""
    inventory = lab.load(f"models: {{q: {{path: x/q.gguf, local: a.gguf}}}}\nhosts: {{h: {{hardware: {{{HOST}}}}}}}")
    local(lab.folder, "a.gguf", "b.gguf", *SPLIT, *SNAPSHOT, "hf/.git/x")

    def names(source: str, name: str | None = None) -> list[str]:
        return [item.name for item in model_copy.find(inventory, source, name)]

    assert names(str(lab.folder / "b.gguf")) == ["b.gguf"]
    assert names("q") == names(str(lab.folder / "a.gguf")) == ["x/q.gguf"]
    assert names(str(lab.folder / SPLIT[1])) == [SPLIT[i][4:] for i in (1, 2, 0)]
    assert names(str(lab.folder / "hf"), "y") == ["y/model-1.safetensors", "y/tok/vocab.json", "y/config.json"]
    assert names("q", "y/q.gguf") == names(str(lab.folder / "b.gguf"), "y/q.gguf") == ["y/q.gguf"]
    assert names(str(lab.folder / "b.gguf"), "y/") == ["y/b.gguf"]


def test_sources_that_are_none(lab: Lab):
    """Each with what is wrong and where."""
    inventory = lab.load(f"models: {{q: {{path: q.gguf}}}}\nhosts: {{h: {{hardware: {{{HOST}}}}}}}")
    local(lab.folder, *SPLIT, "d/a.txt", "d/b.txt")
    for source, name, what in [
        ("nothing.gguf", None, "is no file here"),
        ("q", None, "is no file here"),
        (str(lab.folder / "d"), None, "holds 2 models"),
        (str(lab.folder / SPLIT[0]), "one.gguf", "is one of 3 parts"),
    ]:
        with pytest.raises(InventoryError, match=what):
            model_copy.find(inventory, source, name)
    (lab.folder / SPLIT[2]).unlink()
    with pytest.raises(InventoryError, match="1 of its parts are missing"):
        model_copy.find(inventory, str(lab.folder / SPLIT[0]), None)


def test_a_file_is_hashed_while_it_is_read(tmp_path: Path):
    """From any offset, with the sum of what came before; one that changes meanwhile is refused."""
    data = bytes(range(256)) * 2000
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with model_copy.LocalFile(path) as source:
        assert source.start(200_001) == hashlib.sha256(data[:200_001]).hexdigest()
        assert b"".join(source.rest()) == data[200_001:]
        assert source.sha256() == hashlib.sha256(data).hexdigest()
        path.write_bytes(data + b"x")
        with pytest.raises(InventoryError, match="changed while it was copied"):
            source.sha256()


def test_a_disk_that_cannot_be_read_is_told_as_that(tmp_path: Path):
    """Not as a host that does not answer: an OSError is also how connections end."""
    (tmp_path / "a.gguf").write_bytes(b"x")
    with model_copy.LocalFile(tmp_path / "a.gguf") as source:
        source._file.close()
        source._file = (tmp_path / "b").open("wb", buffering=0)  # reading from it is an OSError
        with pytest.raises(InventoryError, match="cannot be read"):
            source.start(1)


# --- manifests ----------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was(tmp_path: Path):
    """What backup writes, restore reads."""
    path, models = tmp_path / "m.json", of(*SPLIT, *SNAPSHOT, "a.gguf", source="gpu9:/srv/models/a.gguf")
    path.write_text(json.dumps(manifest({"gpu1": ("/srv/models", models)}, "2026-11-25T10:00:00Z")))
    assert read_manifest(path) == {"gpu1": models}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not a manifest"),
        ("[]", "is not a manifest"),
        ('{"labdeploy_models": 2}', "has format 2, not 1"),
        ('{"labdeploy_models": 1, "hosts": []}', "is not a manifest"),
        ('{"labdeploy_models": 1, "hosts": {"h": {"models": [{"files": [{}]}]}}}', "is not a manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, what: str, tmp_path: Path):
    """With the file's name, and never a traceback."""
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(InventoryError, match=what) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


def test_a_manifest_cannot_write_outside(tmp_path: Path):
    """Whoever wrote it."""
    path, models = tmp_path / "m.json", of("a.gguf")
    text = json.dumps(manifest({"gpu1": ("/srv/models", models)}, ""))
    path.write_text(text.replace("a.gguf", "../../etc/x"))
    with pytest.raises(InventoryError, match="no place below models_dir"):
        read_manifest(path)


def test_restore_takes_each_file_from_whoever_has_it(lab: Lab):
    """Here first, then another host, whatever its name there; what nobody has is named, all of it."""
    inventory = lab.load(f"hosts:\n  one: {{hardware: {{{HOST}}}}}\n  two: {{hardware: {{{HOST}}}}}")
    local(lab.folder, "disk/from-disk")
    here = ModelFile("x.gguf", 14, "1", hashlib.sha256(b"disk/from-disk").hexdigest())
    there, gone = (ModelFile(name, 10, "1", name * 8) for name in ("aaaaaaaa", "bbbbbbbb"))
    stores = {
        "one": Store("/srv/models", 0, ()),
        "two": Store("/m", 0, tuple(grouped([replace(there, name="other-name")]))),
    }
    folders = [lab.folder / "disk"]
    todo = model_restore.items(inventory, {"one": grouped([here, there])}, stores, folders)
    origins = [item.origin for items in todo["one"] for item in items]
    assert origins == ["two:/m/other-name", str(lab.folder / "disk/from-disk")]
    with pytest.raises(InventoryError, match="nobody has bbbbbbbb with sha256") as caught:
        model_restore.items(inventory, {"one": grouped([gone]), "two": grouped([gone])}, stores, folders)
    assert len(str(caught.value).splitlines()) == 2


def test_restore_asks_for_nothing_that_is_there(lab: Lab):
    """A host that has all of it gets nothing."""
    inventory = lab.load(f"hosts: {{one: {{hardware: {{{HOST}}}}}}}")
    models = of("a.gguf")
    assert model_restore.items(inventory, {"one": models}, {"one": Store("/m", 0, tuple(models))}, []) == {}
    path = lab.folder / "m.json"
    path.write_text(json.dumps(manifest({"gone": ("/m", models)}, "")))
    with pytest.raises(InventoryError, match="no host is named 'gone'"):
        model_restore.wanted(inventory, path, ())


@pytest.mark.parametrize(("n", "text"), [(7, "7 B"), (2048, "2 KiB"), (5 << 20, "5 MiB"), (5 << 30, "5.0 GiB")])
def test_sizes_are_written_with_their_unit(n: int, text: str):
    """As inventories write them."""
    assert report_models.size_text(n) == text


def test_a_long_copy_is_cut_off_by_silence_alone():
    """Gigabytes take longer than a question may: only a host that says nothing is given up."""
    given: dict[str, Any] = {}

    class Host:
        name = "gpu1"

        def run(self, *_: object, **options: object) -> list[Line]:
            given.update(options)
            return [Line("result", ("copied",))]

    model_files.run(Host(), "finish", "/srv/models", "a.gguf")  # type: ignore[arg-type]
    assert (given["timeout_s"], given["whole_s"]) == (model_files.SILENCE_S, None)
