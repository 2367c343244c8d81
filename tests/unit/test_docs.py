"""The documents: generated pages are fresh, links lead somewhere, and no command or setting is left out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import jsonschema
import pytest
import yaml

from labdeploy import errors, inventory
from labdeploy.cli import cli
from labdeploy.runners import RUNNERS
from labdeploy.schema import settings_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import make_docs

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", TOP / "CHANGELOG.md", *sorted((TOP / "docs").glob("*.md"))]
VALIDATOR = jsonschema.Draft202012Validator(inventory.json_schema())


def text(name: str) -> str:
    """Read a page."""
    return (TOP / name).read_text(encoding="utf-8")


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """List all commands by what is typed after `labdeploy`."""
    for name, command in group.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", each) for below, each in commands(command))


COMMANDS = dict(commands(cli))


@pytest.mark.parametrize("path", make_docs.pages(), ids=lambda path: path.name)
def test_generated_page_is_fresh(path: Path):
    """A change of a flag, a key or a default shows in the documents in the same commit."""
    assert path.read_text(encoding="utf-8") == make_docs.pages()[path], f"{path.name} is stale: run `make docs`"


# --- links --------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """Give a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path):
    """A link leads to a file that is there, and to a heading that it has."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken, f"{page.name} links to what is not there: {broken}"


def test_where_is_table_names_what_is_there():
    """A newcomer who follows a row of the README's table finds the name it gives in the file it gives."""
    rows = re.findall(r"^\| .+ \| \[[^]]+\]\(([^)]+)\)(.*) \|$", text("README.md"), re.MULTILINE)
    assert len(rows) > 10
    for file, names in rows:
        content = text(file.partition("#")[0])
        for name in re.findall(r"`([^`]+)`", names):
            assert name in content, f"README.md says that {name} is in {file}"


# --- commands and settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_section(name: str):
    """The CLI reference leaves no command out."""
    assert f"\n## labdeploy {name}\n" in text("docs/cli.md")


def test_every_exit_code_is_in_the_table():
    """The table of exit codes is that of the tree of errors."""
    tree = [errors.LabdeployError, *errors.LabdeployError.__subclasses__()]
    for code in {0, 130, *(error.exit_code for error in tree)}:
        assert f"\n| {code} | " in text("docs/cli.md")


def examples() -> list[tuple[str, str]]:
    """List every labdeploy command line that a code block of a page shows."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            lines = re.findall(r"^(?:\$ |sudo |hint: )*labdeploy ([^#\n(]+)", block, re.MULTILINE)
            found += [(page.name, line.strip()) for line in lines]
    return found


@pytest.mark.parametrize(("page", "line"), examples())
def test_examples_are_commands(page: str, line: str):
    """What a page shows to type is a command that exists, with flags that it has."""
    words = line.split()
    while words and words[0] in ("-i", "--inventory"):
        words = words[2:]
    if words[0].startswith("-"):
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS, f"{page}: labdeploy {line}"
    known = {flag for param in COMMANDS[name].params for flag in param.opts} | {"--help"}
    flags = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    assert set(flags) <= known, f"{page}: labdeploy {line}"


def declared_keys() -> list[tuple[str, str]]:
    """List every key of the inventory, and every setting of a runner."""
    kinds = [*make_docs.records(inventory.InventoryKeys), *(runner.settings for runner in RUNNERS.values())]
    return [(kind.__name__, key) for kind in kinds for key in settings_of(kind)]


@pytest.mark.parametrize(("record", "key"), declared_keys())
def test_every_key_is_in_the_reference(record: str, key: str):
    """The inventory reference leaves no key out."""
    assert f"\n| `{key}` | " in text("docs/inventory.md"), f"{record}.{key}"


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_setting_is_explained(runner: str):
    """The page about planning says of every setting of a runner how it is chosen."""
    missing = [key for key in settings_of(RUNNERS[runner].settings) if f"`{key}`" not in text("docs/planning.md")]
    assert not missing


# --- schema -------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Any]:
    """Read the shipped inventory."""
    content: dict[str, Any] = yaml.safe_load(text("inventory.yaml"))
    return content


def test_shipped_inventory_is_valid():
    """The inventory to start from has no red underline in an editor, and labdeploy reads it."""
    jsonschema.Draft202012Validator.check_schema(inventory.json_schema())
    VALIDATOR.validate(shipped())
    inventory.load(TOP / "inventory.yaml")


MISTAKES: dict[str, tuple[tuple[str, ...], Any]] = {
    "unknown key": (("hosts", "gpu1", "adress"), "192.168.1.11"),
    "size without a unit": (("hosts", "gpu1", "hardware", "ram"), 64),
    "hardware is no mapping": (("hosts", "gpu1", "hardware"), ["RTX 3090"]),
    "GPU without memory": (("hosts", "gpu1", "hardware", "gpus"), [{"name": "RTX 3090"}]),
    "blank in a name": (("hosts", "gpu 1"), {"hardware": {"cpu": {"cores": 8}, "ram": "64GiB"}}),
    "unknown runner": (("hosts", "gpu1", "services", "chat", "runner"), "llama"),
    "port out of range": (("hosts", "gpu1", "services", "chat", "port"), 80800),
    "word for a number": (("hosts", "gpu1", "services", "chat", "parallel"), "two"),
    "hosts is a list": (("hosts",), ["gpu1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_schema_sees_mistakes(mistake: str, tmp_path: Path):
    """What labdeploy refuses in one key, the schema shows in the editor."""
    content = shipped()
    (*above, last), value = MISTAKES[mistake]
    target = content
    for key in above:
        target = target[key]
    target[last] = value
    assert not VALIDATOR.is_valid(content)
    (tmp_path / "inventory.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(errors.InventoryError):
        inventory.load(tmp_path / "inventory.yaml")
