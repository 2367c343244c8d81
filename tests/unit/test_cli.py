"""The command line from outside: what it prints, where, and with which exit code. Hosts are never reached here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest
from conftest import TOP

from labdeploy import __main__ as program
from labdeploy import __version__, cli, errors, journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Lab

SHIPPED = str(TOP / "inventory.yaml")
HARDWARE = "cpu: {cores: 4}, ram: 64GiB"
SERVICE = "model: qwen3-4b, port: 8080"


def commands() -> Iterator[list[str]]:
    """List every command with its place: `["sandbox", "up"]`."""

    def below(group: click.Group, path: list[str]) -> Iterator[list[str]]:
        for name, command in group.commands.items():
            yield [*path, name]
            if isinstance(command, click.Group):
                yield from below(command, [*path, name])

    return below(cli.cli, [])


COMMANDS = list(commands())


@pytest.fixture
def ready(lab: Lab) -> Lab:
    """Give an inventory of one host that can be planned."""
    lab.copy_lock()
    lab.host(HARDWARE, a=SERVICE)
    return lab


@pytest.mark.parametrize("path", [[], *COMMANDS], ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_reads_no_inventory(lab: Lab, monkeypatch: pytest.MonkeyPatch, path: list[str], flag: str):
    """It is what one asks for when nothing works yet; it says what the command does and takes."""
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("LABDEPLOY_INVENTORY", "/nowhere/inventory.yaml")
    lab.write("{broken")
    ran = lab.bare(*path, flag)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: labdeploy {' '.join(path)}".rstrip())
    assert max(map(len, ran.out.splitlines())) <= 80


def test_every_command_of_the_contract_is_there():
    """Acceptance checks call them by these names."""
    names = "render plan push rollback history diff status check logs probe inspect sandbox demo"
    assert set(names.split()) <= {path[0] for path in COMMANDS}
    assert {"up", "down", "ls"} == {path[1] for path in COMMANDS if len(path) == 2 and path[0] == "sandbox"}


def test_version(lab: Lab):
    """One line, for bug reports."""
    assert lab.bare("--version").out.strip().endswith(__version__)


def test_no_command_shows_the_help(lab: Lab):
    """Without `error:` before it: nothing was wrong but that nothing was said."""
    ran = lab.bare()
    assert ran.code == 2
    assert (ran.out + ran.err).startswith("Usage: labdeploy")


@pytest.mark.parametrize(
    "argv",
    [
        ["-i", SHIPPED, "--json", "plan", "gpu1"],
        ["--json", "plan", "gpu1", "-i", SHIPPED],
        ["plan", "-i", SHIPPED, "--json", "gpu1"],
        ["plan", "gpu1", "--json", "--inventory", SHIPPED],
        ["-y", "-v", "-i", SHIPPED, "plan", "--json", "gpu1"],
    ],
)
def test_global_options_stand_before_or_after_the_command(lab: Lab, argv: list[str]):
    """Nobody remembers which side an option belongs to."""
    ran = lab.bare(*argv)
    assert ran.code == 0, ran.err
    assert list(json.loads(ran.out)["hosts"]) == ["gpu1"]


def test_the_option_after_the_command_wins(ready: Lab):
    """The later one is the one that was added by hand."""
    assert ready.bare("-i", "/nowhere.yaml", "plan", "-i", str(ready.path)).code == 0


@pytest.mark.parametrize("argv", [["plan"], ["render", "-o", "out"], ["render", "--stdout"]])
def test_json_is_one_document_and_nothing_else(ready: Lab, monkeypatch: pytest.MonkeyPatch, argv: list[str]):
    """So that `| jq` works."""
    monkeypatch.chdir(ready.folder)
    ran = ready.run(*argv, "--json")
    assert ran.code == 0
    assert list(json.loads(ran.out)["hosts"]) == ["h"]
    assert ran.err == ""


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["push", "h"], 3, "h: a: does not fit: RAM needs "),
        (["push", "nobody"], 2, "no host or group is named 'nobody'"),
        (["push", "--serial", "0"], 2, "Invalid value for '--serial'"),
        (["logs", "h", "a", "-f"], 2, "--json is one document, and --follow has no end"),
        (["push", "--all"], 3, "h: a: does not fit"),
        (["inspect", "missing.gguf"], 2, "missing.gguf"),
    ],
)
def test_an_error_is_the_document_where_nothing_else_is(lab: Lab, argv: list[str], code: int, said: str):
    """Whoever reads JSON gets it, whatever goes wrong; people read the same on stderr."""
    lab.copy_lock()
    lab.host("cpu: {cores: 4}, ram: 2GiB", a=SERVICE)
    ran = lab.run(*argv, "--json")
    document = json.loads(ran.out)
    assert (ran.code, list(document)) == (code, ["error", "hint"])
    assert said in document["error"]
    assert ran.err.startswith(f"error: {document['error'].splitlines()[0]}")


def test_a_line_of_the_journal_as_json():
    """Text as it is, bytes and what journald left out too; the time in UTC."""
    at = '"__REALTIME_TIMESTAMP": "1764342000123456"'
    told = {"at": "2025-11-28T15:00:00.123Z"}
    assert journal.entry(f'{{{at}, "MESSAGE": "a\\nb"}}') == told | {"message": "a\nb"}
    assert journal.entry(f'{{{at}, "MESSAGE": [104, 255]}}') == told | {"message": "h\ufffd"}
    assert journal.entry(f'{{{at}, "MESSAGE": null}}') == told | {"message": ""}


def test_json_of_a_plan_that_does_not_fit(lab: Lab):
    """The document is whole all the same; the error is on stderr, and the exit code is 3."""
    lab.copy_lock()
    lab.host("cpu: {cores: 4}, ram: 2GiB", a=SERVICE)
    ran = lab.run("plan", "--json")
    assert ran.code == 3
    assert json.loads(ran.out)["hosts"]["h"]["services"]["a"]["fits"] is False
    assert ran.err.startswith("error: h: a: does not fit: RAM needs ")


def test_plan_json_has_what_the_contract_names(ready: Lab):
    """Key by key; more may be there."""
    document: dict[str, Any] = json.loads(ready.run("plan", "--json").out)["hosts"]["h"]
    assert document["devices"] == []
    assert {"total_mib", "usable_mib", "planned_mib"} <= document["ram"].keys()
    service = document["services"]["a"]
    assert service["unit"] == "labdeploy-a.service"
    assert service["fits"] is True
    assert (service["runner"], service["model"]) == ("llama-server", "qwen3-4b")
    assert service["settings"]["ctx_size"].keys() == {"value", "why"}
    wanted = {"model_mib", "context_mib", "compute_mib", "overhead_mib", "repack_mib"}
    assert wanted <= service["memory"]["host"].keys()
    assert service["argv"][0] == "/usr/bin/llama-server"
    assert isinstance(service["env"], dict)


@pytest.mark.parametrize(
    ("argv", "code", "err"),
    [
        (["frobnicate"], 2, "error: No such command 'frobnicate'"),
        (["plan", "--frob"], 2, "error: No such option"),
        (["plan", "nobody"], 2, "error: "),
        (["push"], 2, "error: name the hosts to push to, or write --all"),
        (["push", "h", "--all"], 2, "error: name the hosts to push to, or write --all"),
        (["push", "h", "--serial", "0"], 2, "error: Invalid value for '--serial'"),
        (["push", "h", "--max-failures", "-1"], 2, "error: Invalid value for '--max-failures'"),
        (["push", "--all"], 2, "error: Push to 1 host (h)? There is no terminal to ask on"),
        (["rollback", "--to", "3"], 2, "error: --to needs the hosts it is for"),
        (["logs", "h"], 2, "error: Missing argument 'SERVICE'"),
        (["logs", "h", "b"], 2, "h has no service 'b'"),
        (["logs", "x", "a"], 2, "no host is named 'x'"),
        (["inspect", "/nowhere.gguf"], 2, "error: "),
        (["probe", "x"], 2, "no host or group is named 'x'"),
        (["sandbox", "down"], 2, "error: name the hosts to take down, or write --all"),
        (["sandbox", "up", "--suite", "potato"], 2, "error: Invalid value for '--suite'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors(ready: Lab, monkeypatch: pytest.MonkeyPatch, argv: list[str], code: int, err: str):
    """Exit code 2; what was wrong, and a command to type next; never a traceback."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    ran = ready.run(*argv)
    assert ran.code == code
    assert ran.out == ""
    assert err in ran.err
    assert ran.err.startswith("error: ")
    assert "\n\nhint: " in ran.err
    assert "Traceback" not in ran.err


def test_an_inventory_that_is_not_there(lab: Lab):
    """The path as it was written."""
    ran = lab.bare("-i", "/nowhere/inventory.yaml", "plan")
    assert ran.code == 2
    assert ran.err.startswith("error: /nowhere/inventory.yaml: no such file\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.LabdeployError("x"), 1),
        (errors.InventoryError("x"), 2),
        (errors.ModelError("x"), 2),
        (errors.FitError("x"), 3),
        (errors.HostError("x"), 4),
        (errors.UnhealthyError("x"), 5),
        (errors.LockedError("x"), 6),
        (errors.NeedsPersonError("x"), 7),
        (errors.CheckError("x"), 8),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (click.UsageError("x"), 2),
        (RuntimeError("x"), 1),
        (click.exceptions.Exit(3), 3),
    ],
    ids=repr,
)
def test_exit_codes(lab: Lab, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    """One for each kind of failure, so that scripts can tell them apart."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "plans_for", fail)
    ran = lab.bare("plan")
    assert ran.code == code
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_an_error_says_what_where_and_what_to_type(capsys: pytest.CaptureFixture[str]):
    """`error: HOST: SERVICE: what` for each line of it, an empty line, `hint: `."""
    program.tell(errors.FitError("one\ntwo", where="gpu1: chat", hint="labdeploy plan gpu1"))
    assert capsys.readouterr().err == "error: gpu1: chat: one\nerror: two\n\nhint: labdeploy plan gpu1\n"


def test_a_bug_is_told_in_a_line_and_shown_with_v(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """A traceback is for whoever asks for it."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(cli, "plans_for", fail)
    ran = lab.bare("plan")
    assert ran.err == (
        "error: unexpected: ZeroDivisionError: by zero\n\nhint: run it again with -v and report what it prints\n"
    )
    with pytest.raises(ZeroDivisionError):
        lab.bare("plan", "-v")


def test_the_largest_exit_code_of_several_hosts(ready: Lab, monkeypatch: pytest.MonkeyPatch):
    """A script has one number to look at: the worst."""
    from labdeploy import deploy  # noqa: PLC0415

    text = "hosts: {a: {hardware: {cpu: {cores: 1}, ram: 1GiB}}, b: {hardware: {cpu: {cores: 1}, ram: 1GiB}}}"
    ready.load(text)
    problems = {"a": errors.LockedError("held", where="a", hint="wait"), "b": errors.HostError("gone", where="b")}
    monkeypatch.setattr(
        deploy, "run_job", lambda job, *_: deploy.Outcome(job.host.name, "failed", error=problems[job.host.name])
    )
    ran = ready.run("push", "a", "b", "--json")
    assert ran.code == 6
    assert json.loads(ran.out)["hosts"]["b"]["error"] == "b: gone"
    assert ran.err == "error: a: held\nerror: b: gone\nerror: 2 of 2 hosts failed\n\nhint: wait\n"


def test_json_never_implies_yes(ready: Lab, monkeypatch: pytest.MonkeyPatch):
    """A machine that reads the answer is not a person that gave it."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    ran = ready.run("push", "--all", "--json")
    assert (ran.code, list(json.loads(ran.out))) == (2, ["error", "hint"])
    assert "add -y to go ahead" in ran.err


def test_inspect_adds_to_the_lock(lab: Lab):
    """What it shows is what the lock gets; a name that the inventory lacks is refused with the line to add."""
    import make_lock  # noqa: PLC0415

    inventory = lab.host(HARDWARE, a=SERVICE)
    file = make_lock.MAKERS["qwen3-4b"](lab.folder)
    document = json.loads(lab.run("inspect", str(file), "--json").out)
    assert (document["arch"], document["n_layer"], document["n_ctx_train"]) == ("qwen3", 36, 40960)
    assert document["size_bytes"] == file.stat().st_size
    assert document["context_mib"]["4096"] == 576.0
    assert not inventory.lock_path.exists()
    ran = lab.run("inspect", str(file), "--add", "qwen3-4b")
    assert (ran.code, ran.err) == (0, "")
    assert inventory.lock_path.is_file()
    assert lab.run("plan").code == 0
    refused = lab.run("inspect", str(file), "--add", "qwen")
    assert refused.code == 2
    assert "hint: add  qwen: {path: Qwen3-4B-Q4_K_M.gguf}  below models:" in refused.err


def test_a_local_copy_needs_no_lock(lab: Lab):
    """`local:` names a copy here, relative to the inventory; a copy that is gone leaves the lock."""
    import make_lock  # noqa: PLC0415

    make_lock.MAKERS["qwen3-4b"](lab.folder)
    hosts = f"hosts: {{h: {{hardware: {{{HARDWARE}}}, services: {{a: {{{SERVICE}}}}}}}}}\n"
    text = hosts + "models: {qwen3-4b: {path: x.gguf, local: Qwen3-4B-Q4_K_M.gguf}}"
    lab.load(text)
    assert lab.run("plan").code == 0
    lab.load(text.replace("local: Qwen3", "local: gone/Qwen3"))
    ran = lab.run("plan")
    assert ran.code == 2
    assert "gone/Qwen3-4B-Q4_K_M.gguf does not exist and inventory.lock.yaml has no entry for it" in ran.err


def test_a_lock_that_was_mangled_is_an_error(ready: Lab):
    """A merge conflict in it, say."""
    for text in ("<<<<<<< HEAD\n", "[]", "models: []", "models: {qwen3-4b: 3}", "models: {qwen3-4b: {size_bytes: x}}"):
        (ready.folder / "inventory.lock.yaml").write_text(text)
        ran = ready.run("plan")
        assert ran.code == 2, text
        assert ran.err.startswith("error: "), text
        assert "unexpected" not in ran.err, text


# --- whole processes ----------------------------------------------------------------------------------------------


def modules_after(*argv: str) -> set[str]:
    """Name the top-level modules that a command line has imported when it is done."""
    code = (
        "import sys; from labdeploy.__main__ import run; code = run(sys.argv[1:]);"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    argv = (sys.executable, "-c", code, *argv)
    return set(subprocess.run(argv, capture_output=True, text=True, check=True).stderr.split())


def test_help_imports_nothing_heavy():
    """It is there before one has let go of the key."""
    assert not modules_after("--help") & {"paramiko", "fabric", "invoke", "cryptography", "jinja2", "yaml", "rich"}


def test_render_imports_nothing_of_ssh(tmp_path: Path):
    """It touches no host, and SSH libraries take most of the start."""
    heavy = {"paramiko", "fabric", "invoke", "cryptography", "rich"}
    assert not modules_after("-i", SHIPPED, "render", "-o", str(tmp_path)) & heavy


def test_the_way_out_collects_no_garbage():
    """It is 40 of the 240 ms of a push: the interpreter would look through all modules that were ever imported."""
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000));"
        "from labdeploy.__main__ import main; main()"
    )
    argv = (sys.executable, "-c", code, "--version")
    assert "frozen True" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    """`labdeploy schema | head -1` ends in silence, as every tool does."""
    argv = [sys.executable, "-m", "labdeploy", "schema"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    "env", [{}, {"NO_COLOR": "1"}, {"COLUMNS": "200", "FORCE_COLOR": "1", "TERM": "xterm-256color"}]
)
def test_text_is_plain_and_the_same_everywhere(env: dict[str, str]):
    """In a pipe, in a terminal, with and without colour."""
    argv = [sys.executable, "-m", "labdeploy", "-i", SHIPPED, "plan", "minipc"]
    done = subprocess.run(argv, capture_output=True, check=True, env=os.environ | env)
    assert b"\x1b" not in done.stdout
    assert done.stdout.startswith(b"minipc\n")


def test_a_hint_names_the_inventory_that_was_given(lab: Lab):
    """So that it works where it is typed; one of the next command line is its own."""
    lab.load("hosts: {}")
    (lab.folder / "a b").mkdir()
    path = (lab.folder / "inventory.yaml").rename(lab.folder / "a b" / "inventory.yaml")
    assert lab.bare("plan", "nobody", "-i", str(path)).err.endswith(
        f"\nhint: labdeploy -i '{path}' plan  # without a name: every host\n"
    )
    assert str(path) not in lab.bare("plan", "nobody").err


def test_a_file_that_cannot_be_written_is_told_as_that(ready: Lab):
    """It is no mistake of labdeploy's."""
    (ready.folder / "taken").write_text("")
    ran = ready.run("render", "-o", str(ready.folder / "taken"))
    assert ran.code == 2
    assert ran.err.startswith(f"error: {ready.folder / 'taken'}")
    assert "hint: ls -ld " in ran.err


def test_no_is_130(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """As Ctrl-C at the same question."""
    lab.load("hosts: {a: {hardware: {cpu: {cores: 1}, ram: 1GiB}}}")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda *_args, **_more: False)
    ran = lab.run("push", "--all")
    assert (ran.code, ran.err) == (130, "error: nothing was done\n")


def test_global_options_may_stand_anywhere(ready: Lab):
    """Before the group, after it, after the command."""
    said = [
        ready.bare(*words).out
        for words in (
            ("--json", "-i", str(ready.path), "plan"),
            ("-i", str(ready.path), "plan", "--json"),
        )
    ]
    assert said[0] == said[1] != ""
    assert ready.bare("runner", "--json", "-i", str(ready.path), "ls", "--help").code == 0
    assert ready.bare("models", "-i", str(ready.path), "ls", "--help").code == 0
    assert ready.bare("sandbox", "--json", "ls", "--help").code == 0


def test_a_rollback_of_all_says_that_it_could_not_ask_all(ready: Lab, monkeypatch: pytest.MonkeyPatch):
    """What it could undo is undone; but the last push may have been of the host that is silent."""
    from labdeploy import deploy, fleet  # noqa: PLC0415

    host = "{hardware: {cpu: {cores: 1}, ram: 1GiB}}"
    ready.load(f"hosts: {{a: {host}, b: {host}}}")
    switch = fleet.Switch("push", "p1", "me", "2026-01-01T00:00:00Z", 1, 2, (), "ok")
    answers = {
        "a": fleet.History(2, 2, {}, (switch,)),
        "b": errors.HostError("gone", where="b", hint="ssh b true"),
    }
    monkeypatch.setattr(fleet, "ask_all", lambda hosts, *_: {host.name: answers[host.name] for host in hosts})
    monkeypatch.setattr(deploy, "run_job", lambda job, *_: deploy.Outcome(job.host.name, "changed", generation=1))
    ran = ready.run("rollback", "-y", "--json")
    assert ran.code == 4
    assert list(json.loads(ran.out)["hosts"]) == ["a"]
    assert "error: b: gone; it is left as it is\n" in ran.err
    assert "hint: ssh b true" in ran.err


def test_render_leaves_nothing_of_an_older_one(lab: Lab):
    """Not in the stores of models either: what is there is what a push installs."""
    lab.copy_lock()
    trees = []
    for stop in ("END", "STOP"):
        keys = f"runner: ollama, model: qwen3-8b, port: 8080, stop: [{stop}]"
        lab.host("cpu: {cores: 8}, ram: 64GiB", a=keys)
        assert lab.run("render", "-o", str(lab.folder / "out")).code == 0
        trees.append({str(p.relative_to(lab.folder)) for p in (lab.folder / "out").rglob("*") if p.is_file()})
    lab.run("render", "-o", str(lab.folder / "fresh"))
    fresh = {str(p.relative_to(lab.folder / "fresh")) for p in (lab.folder / "fresh").rglob("*") if p.is_file()}
    assert {name.removeprefix("out/") for name in trees[1]} == fresh
    assert trees[0] != trees[1]
