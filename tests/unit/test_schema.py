"""What one key takes: every kind says yes to what is meant, and no with the line and what to write instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import yaml

from labdeploy import inventory
from labdeploy.errors import InventoryError
from labdeploy.schema import (
    AbsolutePath,
    Bool,
    EnvName,
    Flags,
    Hostname,
    Int,
    IpAddress,
    ListOf,
    LocalPath,
    Login,
    MapOf,
    ModelPath,
    Name,
    Number,
    OneOf,
    OrWord,
    Place,
    Port,
    Record,
    Size,
    Text,
    Verbatim,
    compose,
    setting,
)

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.schema import Kind

CONTROLS = ["\n", "\r", "\t", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"]
SPECIAL = ["%", "$", "$(id)", "`id`", '"', "\\"]


def read(kind: Kind, text: str) -> tuple[object, list[str]]:
    """Read a YAML text as one kind: the value, and what was wrong with it."""
    place = Place("inventory.yaml", "key")
    value = kind.read(yaml.compose(text, Loader=yaml.SafeLoader), place)
    return value, [str(problem) for problem in place.problems]


def quoted(value: str) -> str:
    """Write a string as YAML, whatever is in it."""
    return json.dumps(value)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Size(), "24GiB", 24576),
        (Size(), "512 MiB", 512),
        (Size(), "1.5GiB", 1536),
        (Size(), "1TiB", 1048576),
        (Port, "8080", 8080),
        (Port, "1", 1),
        (Port, "65535", 65535),
        (Int(0, 9), "+5", 5),
        (Number(0, 1), "0.5", 0.5),
        (Number(0, 1), ".5", 0.5),
        (Number(0, 1), "1", 1.0),
        (Bool(), "true", True),
        (Bool(), "false", False),
        (OneOf(("on", "off")), "on", "on"),
        (OrWord(Int(0, 9), {"auto": None, "all": 10}), "auto", None),
        (OrWord(Int(0, 9), {"auto": None, "all": 10}), "all", 10),
        (OrWord(Int(0, 9), {"auto": None, "all": 10}), "9", 9),
        (Name, "gpu-1.lan_x", "gpu-1.lan_x"),
        (Name, "1", "1"),
        (Name, "a" * 63, "a" * 63),
        (EnvName, "_X1", "_X1"),
        (Hostname, "192.168.1.10", "192.168.1.10"),
        (Hostname, "'[fe80::1]'", "[fe80::1]"),
        (Login, "admin", "admin"),
        (IpAddress(), "0.0.0.0", "0.0.0.0"),  # noqa: S104 (a value to read)
        (IpAddress(), "'::1'", "::1"),
        (AbsolutePath, "/srv/my models", "/srv/my models"),
        (ModelPath, "sub/Qwen3.gguf", "sub/Qwen3.gguf"),
        (LocalPath, "../key", "../key"),
        (LocalPath, "~/.ssh/id", "~/.ssh/id"),
        (Verbatim(), "'100% $(x) \"y\" \\'", '100% $(x) "y" \\'),
        (Verbatim(), "0755", "0755"),
        (Text(), "RTX 3090 Ti", "RTX 3090 Ti"),
        (ListOf(Int(0, 9)), "[1, 2]", (1, 2)),
        (ListOf(Int(0, 9)), "[]", ()),
        (MapOf(EnvName, Verbatim()), "{A: 1, B: x}", {"A": "1", "B": "x"}),
        (Flags(), "[--jinja, -x, 'a b']", ("--jinja", "-x", "a b")),
        (Flags(), "{c: 1, -ngl: 9, --no_mmap: true}", ("-c", "1", "-ngl", "9", "--no-mmap")),
        (
            Flags(),
            "{jinja: true, reasoning_format: none, '--seed': 1}",
            ("--jinja", "--reasoning-format", "none", "--seed", "1"),
        ),
    ],
)
def test_good_values(kind: Kind, text: str, value: object):
    """What people write means what they mean."""
    assert read(kind, text) == (value, [])


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (Size(), "24", "24 has no unit; write 24GiB or 24MiB"),
        (Size(), "24GB", "write 24GiB or 24MiB"),
        (Size(), "24G", "unit 'G' is not MiB, GiB or TiB"),
        (Size(), "-1GiB", "is not a size"),
        (Size(), "0.3MiB", "is not a whole number of MiB"),
        (Size(), "lots", "is not a size; write it like 24GiB or 512MiB"),
        (Size(), "~", "found nothing"),
        (Size(), "[24GiB]", "found a list"),
        (Port, "0", "out of range; it must be from 1 to 65535"),
        (Port, "65536", "out of range"),
        (Port, "-1", "out of range"),
        (Port, "http", "'http' is not a whole number"),
        (Port, "'8080'", "'8080' is not a whole number"),
        (Port, "80.5", "is not a whole number"),
        (Port, "0x1F90", "is not a whole number"),
        (Port, "8_080", "is not a whole number"),
        (Port, "1:30", "is not a whole number"),
        (Port, "true", "is not a whole number"),
        (Port, "9" * 5000, "out of range"),
        (Int(0, 9), "{}", "found a mapping"),
        (Number(0, 1), "1.5", "out of range"),
        (Number(0, 1), ".inf", "is not a number"),
        (Number(0, 1), ".nan", "is not a number"),
        (Number(0, 1), "much", "is not a number"),
        (Bool(), "yes", "'yes' is not true or false"),
        (Bool(), "1", "is not true or false"),
        (OneOf(("llama-server", "ollama")), "lama-server", 'did you mean "llama-server"?'),
        (OrWord(Int(0, 9), {"auto": None, "all": 10}), "10", "it must be from 0 to 9; auto and all are taken too"),
        (OrWord(Int(0, 9), {"auto": None, "all": 10}), "al", "'al' is not a whole number; auto and all are taken too"),
        (OneOf(("on", "off")), "maybe", "'maybe' is not one of on, off"),
        (Name, "'../x'", "is not a name"),
        (Name, "a/b", "is not a name"),
        (Name, "-x", "is not a name"),
        (Name, ".x", "is not a name"),
        (Name, "a b", "is not a name"),
        (Name, "x@y", "is not a name"),
        (Name, "''", "is not a name"),
        (Name, "é", "is not a name"),
        (Name, "a" * 64, "at most 63"),
        (EnvName, "A-B", "is not an environment variable name"),
        (EnvName, "A=B", "is not an environment variable name"),
        (Hostname, "a b", "is not a host name"),
        (Login, "'-oProxyCommand=x'", "is not a login name"),
        (IpAddress(), "localhost", "write 127.0.0.1 (this host only) or 0.0.0.0"),
        (IpAddress(), "1.2.3", "is not an IP address"),
        (AbsolutePath, "srv/models", "must be absolute"),
        (AbsolutePath, "/srv/../etc", "must not hold '..'"),
        (ModelPath, "/srv/x.gguf", "must be relative"),
        (ModelPath, "a/../../x.gguf", "must not hold '..'"),
        (ModelPath, "..", "must not hold '..'"),
        (ModelPath, "-x.gguf", "must not start with '-'"),
        (ModelPath, "''", "is not a path"),
        (ListOf(Int(0, 9)), "3", "expected a list"),
        (MapOf(EnvName, Verbatim()), "[A]", "expected a mapping"),
        (Flags(), "{jinja: false}", "false sets no flag"),
        (Flags(), "--jinja", "expected a mapping"),
        (Flags(), "[[--jinja]]", "found a list"),
    ],
)
def test_bad_values(kind: Kind, text: str, wanted: str):
    """What cannot be meant is refused, with what to write instead."""
    _, problems = read(kind, text)
    assert len(problems) == 1, problems
    assert problems[0].startswith("inventory.yaml:1: key")
    assert wanted in problems[0]


@pytest.mark.parametrize(
    "kind", [Name, AbsolutePath, ModelPath, LocalPath, Login, Hostname, IpAddress(), Text(), EnvName]
)
@pytest.mark.parametrize("evil", CONTROLS + SPECIAL)
def test_what_units_or_shells_read_specially_is_refused_in_plain_settings(kind: Kind, evil: str):
    """A name or a path never needs quoting, because nothing that would is let in."""
    for text in (evil, f"/srv/a{evil}b", f"a{evil}b", f"a{evil}", f"{evil}a"):
        value, problems = read(kind, quoted(text))
        assert value is None
        assert problems


@pytest.mark.parametrize("kind", [Verbatim(), ListOf(Verbatim()), Flags(), MapOf(EnvName, Verbatim())])
@pytest.mark.parametrize("evil", CONTROLS)
def test_line_breaks_and_controls_are_refused_even_where_text_is_passed_through(kind: Kind, evil: str):
    """A line break in a value would be another directive in the unit."""
    text = quoted(f"a{evil}ExecStartPre=/bin/x")
    whole = {"Verbatim": text, "MapOf": f"{{A: {text}}}"}.get(type(kind).__name__, f"[{text}]")
    _, problems = read(kind, whole)
    assert len(problems) == 1
    assert "holds a line break or control character" in problems[0]


@pytest.mark.parametrize("evil", CONTROLS)
def test_problems_never_print_controls(evil: str):
    """A key of a hostile inventory cannot colour the terminal, or fake a line of output."""
    _, problems = read(Record(Example), f"{{{quoted('a' + evil + 'b')}: 1, must: x}}")
    assert problems
    assert not any(evil in problem for problem in problems)


@pytest.mark.parametrize("text", ["\ufdd0", "\ufdef", "\ufffe", "\uffff", "\U0001fffe"])
def test_what_systemd_does_not_take_for_text_is_refused(text: str):
    """Systemd drops a whole line that holds a Unicode noncharacter, in silence: `Environment=` would be missing."""
    value, problems = read(Verbatim(), quoted(f"a{text}b"))
    assert value is None
    assert problems


@dataclass(frozen=True)
class Example:
    """A record."""

    must: str = setting(Name, "what must be there")
    may: int = setting(Int(0, 9), "what may be there", default=7)


def test_a_record_knows_its_keys():
    """What is not written has its default; what must be written and what nobody knows are said."""
    assert read(Record(Example), "{must: x}") == (Example("x", 7), [])
    assert read(Record(Example), "{must: x, may: null}") == (Example("x", 7), [])
    _, problems = read(Record(Example), "{mst: x}")
    assert problems == [
        'inventory.yaml:1: key.mst: unknown key; did you mean "must"?',
        "inventory.yaml:1: key: must is missing: what must be there",
    ]
    assert "expected a mapping" in read(Record(Example), "[1]")[1][0]


def test_a_key_written_twice_is_a_problem_with_both_lines():
    """YAML itself takes the last one in silence, and half an hour is gone."""
    _, problems = read(Record(Example), "must: x\nmay: 1\nmust: y\n")
    assert problems == ["inventory.yaml:3: key.must: written twice; first in line 1"]


def test_merge_keys_and_anchors():
    """`<<: *base` is how people share keys; what is written beside it wins."""
    text = "a: &a {must: x, may: 3}\nb: {<<: *a, may: 4}\nc: {<<: [{may: 5}, *a]}\n"
    value, problems = read(MapOf(Name, Record(Example)), text)
    assert problems == []
    assert value == {"a": Example("x", 3), "b": Example("x", 4), "c": Example("x", 5)}


@pytest.mark.parametrize("text", ["a: &a {<<: *a, must: x}", "a: &a\n  <<: [{may: 1}, *a]\n  must: x"])
def test_an_anchor_that_merges_itself_is_a_problem(text: str):
    """It has no end; Python's own limit is no message."""
    _, problems = read(MapOf(Name, Record(Example)), text)
    assert any("merges itself" in problem for problem in problems)


@pytest.mark.parametrize("text", ["{[1]: x, must: y}", "{{a: b}: x, must: y}", "{<<: x, must: y}"])
def test_odd_keys_are_problems(text: str):
    """A key that is no word, and a merge of no mapping."""
    _, problems = read(Record(Example), text)
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1\nb: 2\n", ":2"),
        ("a: 1\n\tb: 2\n", ":2"),
        ("a: 'x\n", ":"),
        ("a: *nowhere\n", ":1"),
        ("a: 1\n--- \nb: 1\n", ":2"),
        ("a: {b: c}}\n", ":1"),
        ("a: \x01\n", "inventory.yaml"),
    ],
)
def test_broken_yaml_is_one_error_with_its_line(tmp_path: Path, text: str, where: str):
    """The parser's own message, on one line, with the line to look at."""
    path = tmp_path / "inventory.yaml"
    path.write_text(text)
    with pytest.raises(InventoryError) as caught:
        compose(path)
    assert f"inventory.yaml{where if where.startswith(':') else ''}" in caught.value.where
    assert "not valid YAML" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path):
    """Missing, empty, a folder, not UTF-8: each says so."""
    path = tmp_path / "inventory.yaml"
    with pytest.raises(InventoryError, match="no such file"):
        compose(path)
    path.write_text("# nothing\n")
    with pytest.raises(InventoryError, match="is empty"):
        compose(path)
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(InventoryError, match="is not UTF-8"):
        compose(path)
    with pytest.raises(InventoryError, match="cannot be read"):
        compose(tmp_path)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000])
def test_a_file_nested_beyond_reason_is_an_error_not_a_crash(tmp_path: Path, text: str):
    """The parser gives up at Python's limit of recursion."""
    path = tmp_path / "inventory.yaml"
    path.write_text(text)
    with pytest.raises(InventoryError):
        inventory.load(path)


def test_every_setting_has_words_and_a_schema():
    """The reference page and the JSON Schema are made of these; an empty one would be a hole in both."""
    schema = json.dumps(inventory.json_schema())
    assert '"description": ""' not in schema
    for name in ("hosts", "ctx_size", "gpu_memory_utilization", "context_length", "api_key_file"):
        assert f'"{name}"' in schema
