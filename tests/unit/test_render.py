"""What is written into units: whole trees as files to review, judged by systemd, and strings that try to break out.

pytest tests/unit/test_render.py --refresh-golden    writes tests/data/machines/*/expected anew
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import MACHINES, TOP

from labdeploy import inventory as inventories
from labdeploy import lock, render
from labdeploy.errors import LabdeployError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Lab

ENVIRONMENT = render.environment()
CASES = sorted(path.name for path in MACHINES.iterdir() if path.is_dir())
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
REAL_PROGRAM = re.compile(r"^(ExecStart=)(\"[^\"]*\"|\S+)", re.MULTILINE)


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, lab: Lab) -> Path:
    """Put a machine's inventory and lock into a folder of their own, and give the folder of the case."""
    of_case = MACHINES / request.param
    shipped = request.param == "shipped"
    shutil.copy(TOP / "inventory.yaml" if shipped else of_case / "inventory.yaml", lab.path)
    shutil.copy((TOP if shipped else MACHINES) / "inventory.lock.yaml", lab.folder)
    return of_case


# --- whole trees --------------------------------------------------------------------------------------------------


def test_the_tree_is_as_reviewed(case: Path, lab: Lab, request: pytest.FixtureRequest):
    """What a machine gets changes only where somebody meant it to, and saw it."""
    out = lab.folder / "rendered"
    ran = lab.run("render", "-o", str(out))
    assert (ran.code, ran.err) == (0, "")
    expected = case / "expected"
    if request.config.getoption("--refresh-golden"):
        shutil.rmtree(expected, ignore_errors=True)
        shutil.copytree(out, expected)
    assert tree(out) == tree(expected), "labdeploy renders otherwise; see --refresh-golden and git diff"


@needs_systemd
def test_systemd_accepts_every_unit(case: Path, lab: Lab):
    """`systemd-analyze verify` has nothing to say, once the program is one that this machine has."""
    for host in sorted((case / "expected").iterdir()):
        folder = lab.folder / host.name
        folder.mkdir()
        units = []
        for unit in sorted((host / "systemd").iterdir()):
            text, n = REAL_PROGRAM.subn(r"\1/bin/true", unit.read_text())
            assert n == 1
            units.append(folder / unit.name)
            units[-1].write_text(text)
        assert verify(*units) == ""


def verify(*units: Path) -> str:
    """Give what systemd says against units."""
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, units)]
    env = os.environ | {"SYSTEMD_LOG_LEVEL": "warning"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    return done.stderr + ("" if done.returncode == 0 else f"exit status {done.returncode}")


@needs_systemd
def test_the_judge_is_awake(tmp_path: Path):
    """A wrong directive would be told; a silent judge proves nothing."""
    unit = tmp_path / "labdeploy-x.service"
    unit.write_text("[Service]\nExecStart=/bin/true\nMemoryMux=1G\n")
    assert "MemoryMux" in verify(unit)


def test_the_same_input_gives_the_same_bytes(lab: Lab):
    """On any machine and in any process: hashes name generations, and a push of the same must change nothing."""
    trees = []
    for seed in ("1", "2"):
        out = lab.folder / seed
        argv = [sys.executable, "-m", "labdeploy", "-i", str(TOP / "inventory.yaml"), "render", "-o", str(out)]
        env = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": "C", "TZ": f"UTC{seed}"}
        subprocess.run(argv, check=True, capture_output=True, env=env, cwd=lab.folder)
        trees.append(tree(out))
    assert trees[0] == trees[1]
    assert trees[0] == tree(MACHINES / "shipped" / "expected")


def test_plans_of_a_rendered_tree_are_those_of_plan_json(case: Path, lab: Lab):
    """What a generation keeps as plan.json is what `plan --json` shows."""
    shown = json.loads(lab.run("plan", "--json").out)["hosts"]
    kept = {host.name: json.loads((host / "plan.json").read_text()) for host in (case / "expected").iterdir()}
    assert kept == shown


def test_what_is_gone_from_the_inventory_is_gone_from_the_tree(lab: Lab):
    """A stale unit in a reviewed tree would be one that no push installs; files of others stay."""
    lab.copy_lock()
    lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-4b, port: 1", b="model: qwen3-4b, port: 2")
    out = lab.folder / "rendered"
    assert lab.run("render", "-o", str(out)).code == 0
    (out / "README").write_text("mine")
    lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-4b, port: 1")
    assert lab.run("render", "-o", str(out)).code == 0
    assert sorted(tree(out)) == ["README", "h/plan.json", "h/services/a", "h/systemd/labdeploy-a.service", "h/units"]


def test_rendering_to_stdout_is_the_same_files(lab: Lab):
    """For eyes and for pipes; nothing is written."""
    lab.copy_lock()
    lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-4b, port: 8080")
    text = lab.run("render", "--stdout").out
    assert "==> h/systemd/labdeploy-a.service <==" in text
    document = json.loads(lab.run("render", "--stdout", "--json").out)
    assert sorted(document["hosts"]["h"]) == ["plan.json", "services/a", "systemd/labdeploy-a.service", "units"]
    assert document["hosts"]["h"]["systemd/labdeploy-a.service"] in text
    assert not (lab.folder / "rendered").exists()


# --- templates ----------------------------------------------------------------------------------------------------


def overridden(lab: Lab, template: str, name: str = "llama-server.service.j2") -> str:
    """Render one service with a template beside the inventory, and give its unit or the error."""
    lab.copy_lock()
    lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-4b, port: 8080")
    (lab.folder / "templates").mkdir(exist_ok=True)
    (lab.folder / "templates" / name).write_text(template)
    ran = lab.run("render", "-o", str(lab.folder / "out"))
    return ran.err if ran.code else (lab.folder / "out/h/systemd/labdeploy-a.service").read_text()


def test_a_template_beside_the_inventory_wins(lab: Lab):
    """Ours can be extended, block by block, or replaced."""
    text = overridden(lab, '{% extends "base.service.j2" %}{% block hardening %}\nNice=5\n{% endblock %}\n')
    assert "\nNice=5\n" in text
    assert "SystemCallFilter" not in text
    (lab.folder / "templates/llama-server.service.j2").unlink()
    assert overridden(lab, "[Service]\nExecStart={{ plan.argv | words }}\n", "base.service.j2").startswith(
        "[Service]\n"
    )


@pytest.mark.parametrize(
    ("template", "line", "what"),
    [
        ("[Service]\n{% if %}\n", 2, "template error"),
        ("[Service]\n{{ plan.argv | wrds }}\n", 2, "wrds"),
        ("[Service]\n\n{{ plam.name }}\n", 3, "'plam' is undefined"),
        ("[Service]\n{{ plan.nmae }}\n", 2, "has no attribute 'nmae'"),
        ("[Service]\n{{ plan.port + plan.name }}\n", 2, "template error"),
        ("[Service]\n{{ plan.port / 0 }}\n", 2, "template error"),
        ("[Service]\n{{ plan.settings['nope'].value }}\n", 2, "nope"),
        ('{% extends "bse.service.j2" %}\n', None, "no template named bse.service.j2"),
    ],
)
def test_a_template_error_is_one_clear_error(lab: Lab, template: str, line: int | None, what: str):
    """With the file and the line of the template; exit code 2, for it is part of the inventory."""
    err = overridden(lab, template)
    assert err.startswith("error: ")
    assert what in err
    assert line is None or f"llama-server.service.j2:{line}: " in err
    assert err.count("error: ") in (1, 2)  # "error: FILE:LINE: template error: ..."
    assert lab.run("render").code == 2


def test_a_template_cannot_write_what_was_not_escaped(lab: Lab):
    """Each value is escaped as a plain setting unless a filter says how."""
    lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-4b, port: 8080, env: {A: '50%'}")
    (lab.folder / "templates").mkdir()
    (lab.folder / "templates/llama-server.service.j2").write_text("[Service]\nX={{ plan.env.A }}\n")
    lab.copy_lock()
    assert lab.run("render", "-o", str(lab.folder / "out")).code == 0
    assert "X=50%%\n" in (lab.folder / "out/h/systemd/labdeploy-a.service").read_text()


# --- strings that try to break out --------------------------------------------------------------------------------

PIECES = [
    *" \"'\\%$;#=!@-+:|*?[]{}()<>&~^,./`",
    "$$",
    "%%",
    "%n",
    "%%n",
    "$HOME",
    "${HOME}",
    "$(id)",
    "\\n",
    "\\x41",
    "\\",
    "\\\\",
    '\\"',
    '" ',
    " ;",
    "; ",
    " # ",
    "ExecStartPre=/bin/x",
    "[Install]",
    "é",
    "→",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "a",
    "b c",
    "0",
]


def nasty(seed: int) -> str:
    """Make a string of pieces that mean something to YAML, systemd, shells or Jinja."""
    chance = random.Random(seed)  # noqa: S311 (the same strings in every run)
    return "".join(chance.choice([*PIECES, "{{ 1 }}", "{% x %}"]) for _ in range(chance.randint(0, 8)))


def logical_lines(unit: str) -> list[str]:
    """Join continued lines as systemd does; comments and empty lines are gone."""
    lines, whole = [], ""
    for line in unit.split("\n"):
        if line.lstrip().startswith(("#", ";")) or not line.strip():
            continue
        whole += line.lstrip() if whole else line
        if whole.endswith("\\"):
            whole = whole[:-1] + " "
        else:
            lines.append(whole)
            whole = ""
    assert whole == ""
    return lines


def unquoted(text: str) -> list[str]:
    """Split a setting into words as systemd's extract_first_word does, with C escapes, then specifiers."""
    words: list[str] = []
    word: str | None = None
    quote, i = "", 0
    while i < len(text):
        char = text[i]
        if char == "\\":
            escaped = text[i + 1]
            assert escaped in '\\"', f"an escape nobody wrote: \\{escaped}"
            word, i = (word or "") + escaped, i + 1
        elif quote:
            word = word or ""
            if char == quote:
                quote = ""
            else:
                word += char
        elif char in "\"'":
            quote, word = char, word or ""
        elif char in " \t":
            words += [] if word is None else [word]
            word = None
        else:
            assert not (char == ";" and word is None), "an unquoted ; would begin another command"
            word = (word or "") + char
        i += 1
    assert not quote
    return [specified(each) for each in [*words, *([] if word is None else [word])]]


def specified(text: str) -> str:
    """Replace `%%` by `%`; any other specifier is one that nobody wrote."""
    assert not re.search(r"%(?!%)", text.replace("%%", "")), text
    return text.replace("%%", "%")


def expanded(word: str) -> str:
    """Replace `$$` by `$`, as systemd does in command lines; any other `$` would be a variable."""
    assert "$" not in word.replace("$$", ""), word
    return word.replace("$$", "$")


def names_of(lines: list[str]) -> list[str]:
    """Name what each line is: a section, or a directive without its value."""
    return [line.split("=")[0] for line in lines]


def unit_with(lab: Lab, flags: list[str], env: dict[str, str]) -> str:
    """Render a service with these flags and variables."""
    text = {
        "models": {"qwen3-4b": {"path": "m.gguf"}},
        "hosts": {
            "h": {
                "hardware": {"cpu": {"cores": 4}, "ram": "64GiB"},
                "services": {
                    "a": {
                        "runner": "llama-server", "model": "qwen3-4b", "port": 8080, "ctx_size": 4096,
                        "flags": flags, "env": env,
                    },
                },
            },
        },
    }  # fmt: skip
    plan = lab.plans(lab.load(json.dumps(text)))["h"]
    return render.render_host(plan, ENVIRONMENT)["systemd/labdeploy-a.service"].decode()


def parsed_back(unit: str) -> tuple[list[str], dict[str, str]]:
    """Read argv and environment of a unit with our own idea of systemd."""
    lines = logical_lines(unit)
    argv = [line for line in lines if line.startswith("ExecStart=")]
    pairs = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    env = dict(word.split("=", 1) for pair in pairs[:-1] for word in unquoted(pair))  # the last is the template's own
    return [expanded(word) for word in unquoted(argv[0].removeprefix("ExecStart="))], env


def read_by_systemd(folder: Path, units: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
    """Let systemd read units: command line and environment of each, as its debug dump shows them."""
    for name, text in units.items():
        (folder / name).write_text(REAL_PROGRAM.sub(r"\1/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *(str(folder / name) for name in units)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SYSTEMD_LOG_LEVEL": "debug", "SYSTEMD_LOG_COLOR": "0"},
    )
    found = {}
    for part in re.split(r"^\s*-> Unit ", done.stdout, flags=re.MULTILINE)[1:]:
        name = part.split(":", 1)[0]
        environment = re.findall(r"^\t\tEnvironment: (.*)$", part, re.MULTILINE)
        commands = part.partition("-> ExecStart:\n")[2]
        found[name] = (re.findall(r"Command Line: (.*)$", commands, re.MULTILINE)[0], environment)
    return found


def shell_unquoted(text: str) -> list[str]:
    r"""Split what systemd quoted for a shell: words, or "words" in which `\` stands before " $ ` and itself."""
    words = re.findall(r'"((?:[^"\\]|\\.)*)"(?= |$)|([^" ]+)(?= |$)', text)
    return [bare or re.sub(r"\\(.)", r"\1", quoted) for quoted, bare in words]


def test_strings_come_back_as_they_were(lab: Lab):
    """Whatever a flag or a variable holds, the program gets it letter by letter, and the unit no other directive."""
    bare = names_of(logical_lines(unit_with(lab, ["--x"], {"A": "1", "B": "2"})))
    for seed in range(150):
        flags = ["--x", nasty(seed), nasty(seed + 1000), f"--y={nasty(seed + 2000)}"]
        env = {"A": nasty(seed + 3000), "B": nasty(seed + 4000)}
        unit = unit_with(lab, flags, env)
        argv, found = parsed_back(unit)
        assert argv[-4:] == flags, seed
        assert found == env, seed
        assert names_of(logical_lines(unit)) == bare, seed


@needs_systemd
def test_systemd_reads_strings_back_as_they_were(lab: Lab):
    """The same strings, and systemd itself as the judge: its own dump of the units that it read."""
    units, wanted = {}, {}
    for seed in range(60):
        flags, env = ["--x", nasty(seed), nasty(seed + 1000)], {"A": nasty(seed + 3000)}
        units[f"labdeploy-{seed}.service"] = unit_with(lab, flags, env)
        wanted[f"labdeploy-{seed}.service"] = (flags, [f"A={env['A']}"])
    found = read_by_systemd(lab.folder, units)
    assert found.keys() == wanted.keys()
    for name, (flags, env) in wanted.items():
        command, environment = found[name]
        assert [expanded(word) for word in shell_unquoted(command)][-3:] == flags, name
        assert environment[:1] == env, name
        assert len(environment) == 3, name


@pytest.mark.parametrize("evil", ["a\nb", "a\rb", "a\0b", "a\x1bb", "a\u2028b", "a\x85b", "a\ufdd0b"])
def test_what_no_quoting_holds_is_refused_where_it_is_written(evil: str):
    """The schema refuses these already; the last door is shut too."""
    for write in (render.plain, render.word, lambda text: render.assignment(("A", text))):
        with pytest.raises(LabdeployError, match="cannot be written"):
            write(evil)


def test_a_plain_setting_is_never_quoted():
    r"""Systemd does not unquote WorkingDirectory= and its like; `\` at the end would join the next line."""
    assert render.plain("/srv/100% it's") == "/srv/100%% it's"
    assert render.plain(render.plain("%")) == "%%"
    with pytest.raises(LabdeployError):
        render.plain("a\\")


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("a b", '"a b"'),
        ("it's", '"it\'s"'),
        ('"', '"\\""'),
        ("\\", '"\\\\"'),
        ("$HOME", "$$HOME"),
        ("%n", "%%n"),
        (";", '";"'),
        ("100%", "100%%"),
    ],
)
def test_words_of_a_command_line(word: str, wanted: str):
    """Quoted only where systemd would split or read it, so that units stay readable."""
    assert render.word(word) == wanted


def test_paths_with_spaces_are_one_path(lab: Lab):
    """A list of paths is split at spaces; a path is not."""
    plan = lab.plans(inventories.load(MACHINES / "home" / "inventory.yaml"))["laptop"]
    unit = render.render_host(plan, ENVIRONMENT)["systemd/labdeploy-try.service"].decode()
    assert 'ReadWritePaths="/home/ai/ollama store"\n' in unit
    assert "ProtectHome=read-only\n" in unit


def test_locks_are_what_the_maker_makes():
    """The example data is made by tests/make_lock.py, and says what the code reads today."""
    import make_lock  # noqa: PLC0415

    for path, data in make_lock.locks().items():
        assert path.read_bytes() == data, "python tests/make_lock.py writes it anew"
        assert lock.read(path)["models"]


def test_a_model_that_nobody_looked_into_is_an_error_with_the_way_out(lab: Lab):
    """Nothing is known of its shape, so nothing can be planned."""
    lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-4b, port: 8080")
    ran = lab.run("render")
    assert ran.code == 2
    assert "models.qwen3-4b" in ran.err
    assert "hint: labdeploy inspect FILE --add qwen3-4b" in ran.err


def test_the_environment_has_our_templates():
    """From a checkout and from an installed package alike."""
    names = render.environment().list_templates()
    assert {"base.service.j2", "llama-server.service.j2", "ollama.service.j2", "vllm.service.j2"} <= set(names)
