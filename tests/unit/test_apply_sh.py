"""The programs that run on hosts are plain POSIX sh: they parse, lint, and say no word that only bash knows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import labdeploy

PROGRAM = Path(labdeploy.__file__).parent / "apply.sh"
UNCHANGED = PROGRAM.parent / "unchanged.sh"
TEXT = UNCHANGED.read_text() + PROGRAM.read_text()
PROGRAMS = [PROGRAM, UNCHANGED, PROGRAM.parent / "model_files.sh", PROGRAM.parent / "facts" / "facts.sh"]
FOR_AWK = re.compile(r"(?ms)^[A-Z]+='\n.*?'$")


def code(program: Path) -> str:
    """Give a program without comments and what is in single quotes: sed, awk and printf have their own words."""
    lines = FOR_AWK.sub("", program.read_text()).splitlines()
    return "\n".join(re.sub(r"(^|\s)#.*$", "", re.sub(r"'[^']*'", "''", line)) for line in lines)


BASHISMS = {
    r"(^|\s)\[\[\s": "[[ ]]",
    r"^\s*function\s": "function",
    r"(^|[;{&|])\s*local\s": "local",
    r"\bdeclare\b|\btypeset\b": "declare",
    r"<<<": "<<<",
    r"&>|\|&": "&> or |&",
    r"<\(|>\(": "process substitution",
    r"(^|\s|=)\$'": "$'...'",
    r"\bsource\b": "source",
    r"==": "==",
    r"\becho -[en]": "echo -e",
    r"\$\{[A-Za-z_]+(\^|,|//|/|:[0-9])": "${x^}, ${x/a/b}, ${x:0:1}",
    r"\(\([^)]*\+\+": "++",
    r"\bread -[a-qs-z]": "read -p and its like",
    r"\$(RANDOM|SECONDS|EPOCHSECONDS|BASH\w*|PIPESTATUS|UID)\b": "bash's own variables",
    r"\bset -o pipefail": "pipefail",
    r"\bselect\b.*\bin\b|\bcoproc\b|\bmapfile\b|\bshopt\b": "bash's own words",
    r"\{[0-9a-z]+\.\.[0-9a-z]+\}": "{1..3}",
    r"^\s*\w+=\(": "arrays",
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
@pytest.mark.parametrize("shell", ["dash", "sh", "bash", "busybox"])
def test_it_parses(shell: str, program: Path):
    """With every shell that is here; which one a host has as /bin/sh nobody knows."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    argv = [shell, *(["sh"] if shell == "busybox" else ["--posix"] if shell == "bash" else []), "-n", str(program)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(program: Path):
    """What is switched off is said, with the reason, at the top of the program."""
    done = subprocess.run(["shellcheck", "-s", "sh", str(program)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
@pytest.mark.parametrize("pattern", BASHISMS)
def test_it_has_no_bashism(pattern: str, program: Path):
    """They parse in dash too, often, and mean something else there."""
    found = [line.strip() for line in code(program).splitlines() if re.search(pattern, line)]
    assert found == [], BASHISMS[pattern]


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p != UNCHANGED], ids=lambda path: path.name)
def test_it_ends_by_running_its_arguments(program: Path):
    """It is read from standard input and called with a verb; what follows the last line is the payload."""
    text = program.read_text()
    assert text.endswith('\n"$@"\n')
    assert text.isascii()


@pytest.mark.skipif(not shutil.which("dash"), reason="dash is not installed")
@pytest.mark.parametrize(("text", "number"), [("000000", "0"), ("000007", "7"), ("000120", "120"), ("010000", "10000")])
def test_numbers_of_generations_are_decimal(text: str, number: str):
    """A leading zero makes octal numbers in sh, and 000008 is none."""
    assert call("number", text) == number


@pytest.mark.skipif(not shutil.which("dash"), reason="dash is not installed")
def test_answers_are_fields_between_tabs():
    """host.py splits them there; words with spaces stay whole."""
    assert call("emit", "result", "a b", "c") == "result\ta b\tc\n"


@pytest.mark.skipif(not shutil.which("dash"), reason="dash is not installed")
def test_facts_of_a_service_are_data(tmp_path: Path):
    """What stands in services/NAME is read, never run."""
    marker = tmp_path / "ran"
    folder = tmp_path / "services"
    folder.mkdir()
    (folder / "x").write_text(f"unit=labdeploy-x.service\nmodel=$(touch {marker})\nbody=`touch {marker}`;a=b\n")
    script = 'load_service "$1" x; printf "%s|%s|%s" "$unit" "$model" "$body"'
    said = with_functions(script, str(tmp_path))
    assert said == f"labdeploy-x.service|$(touch {marker})|`touch {marker}`;a=b"
    assert not marker.exists()


@pytest.mark.skipif(not shutil.which("dash"), reason="dash is not installed")
@pytest.mark.parametrize(("removing", "pruning", "status"), [(0, 0, "0"), (1, 0, "1"), (0, 1, "0")])
def test_what_could_not_be_tidied_is_tried_again(tmp_path: Path, removing: int, pruning: int, status: str):
    """Where /etc is read-only labdeploy-recover must know; a store of models that stays is no reason to go on."""
    stubs = f"rm() {{ return {removing}; }}; prune_stores() {{ return {pruning}; }}; ROOT=$1 RUN=$1"
    assert with_functions(f"{stubs}; tidy; echo $?", str(tmp_path)).strip() == status


@pytest.mark.skipif(not shutil.which("dash"), reason="dash is not installed")
@pytest.mark.parametrize("bus", [True, False])
@pytest.mark.parametrize(
    ("meanwhile", "push", "service", "found"),
    [
        ("true", "inactive", "active", "000003"),
        ("true", "failed", "active", "000003"),
        ("mv units/multi-user.target.wants units/default.target.wants", "inactive", "active", "000003"),
        ("echo x >>units/x.service", "inactive", "active", ""),
        ("rm units/x.service", "inactive", "active", ""),
        ("mkdir units/x.service.d", "inactive", "active", ""),
        ("rm units/multi-user.target.wants/x.service", "inactive", "active", ""),
        ("echo x >>root/gen/000003/SHA256SUMS", "inactive", "active", ""),
        ("touch root/pending", "inactive", "active", ""),
        ("rm root/current", "inactive", "active", ""),
        ("true", "inactive", "activating", ""),
        ("true", "inactive", "failed", ""),
        ("true", "inactive", "inactive", ""),
        ("true", "activating", "active", ""),
        ("true", "active", "active", ""),
        ("busctl() { return 1; }; systemctl() { return 1; }", "inactive", "active", ""),
        ("busctl() { echo; }", "inactive", "active", ""),
    ],
)
def test_nothing_to_do_is_only_where_nothing_is(
    tmp_path: Path, meanwhile: str, push: str, service: str, found: str, *, bus: bool
):
    """Installed, unchanged by hand, active and enabled, and no transaction; else the whole program looks."""
    script = f"""
        cd "$1"; ROOT=$1/root UNITS=$1/units
        mkdir -p units/multi-user.target.wants root/gen/000003/systemd; ln -s gen/000003 root/current
        echo text >units/x.service; ln -s /nowhere/x.service units/multi-user.target.wants
        cp units/x.service root/gen/000003/systemd
        (cd root/gen/000003; sha256sum systemd/x.service >SHA256SUMS)
        hash=$(sha256sum <root/gen/000003/SHA256SUMS)
        busctl() {{ {f"echo '{told_by_busctl(push, service)}'" if bus else "return 1"}; }}
        systemctl() {{ case $1 in is-active) printf "{push}\n{service}\n"; return 3 ;; *) echo disabled ;; esac; }}
        {meanwhile}
        ! nothing_to_do "${{hash%% *}}" || printf "$FROM"
    """
    assert with_functions(script, str(tmp_path)) == found


def told_by_busctl(push: str, service: str) -> str:
    """Give the answer of systemd 262 to ListUnitsByNames, with a description that would like to be another one."""
    path = "/org/freedesktop/systemd1/unit"
    loaded = "not-found" if push == "inactive" else "loaded"
    liar = r"\"x.service\" \"\" \"loaded\" \"inactive\" \"dead\" \"\" \"/"
    return (
        f'a(ssssssouso) 2 "labdeploy-txn.service" "{liar}" "{loaded}" "{push}" "dead" ""'
        f' "{path}/labdeploy_2dtxn_2eservice" 0 "" "/"'
        f' "x.service" "{liar}" "loaded" "{service}" "running" "" "{path}/x_2eservice" 0 "" "/"'
    )


def test_what_comes_with_the_command_has_no_single_quotes():
    """It is quoted twice on its way, and each would become five characters, then twenty-five."""
    assert "'" not in UNCHANGED.read_text()


def call(*argv: str) -> str:
    """Call one function of the program."""
    return with_functions('"$@"', *argv)


def with_functions(script: str, *argv: str) -> str:
    """Run a script that has the functions of the program."""
    functions = TEXT.removesuffix('"$@"\n')
    done = subprocess.run(
        ["dash", "-c", f"PROGRAM=x\n{functions}\n{script}", "x", *argv], capture_output=True, check=True
    )
    return done.stdout.decode()
