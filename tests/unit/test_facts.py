"""What hosts answer to facts.sh, and what is made of it: machines as data, answers in, facts out."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from conftest import TOP

import labdeploy
from labdeploy.errors import InventoryError
from labdeploy.facts import cpu, machine
from labdeploy.facts.answer import documents, known, printable, whole

if TYPE_CHECKING:
    from labdeploy.facts.answer import Answer

PROBES = TOP / "tests" / "data" / "probes"
MACHINES = sorted(path.name for path in PROBES.iterdir())
PROGRAM = Path(labdeploy.__file__).parent / "facts" / "facts.sh"


def read(text: str) -> Answer:
    """Read a recorded answer: lines of `NAME<tab>LINE`."""
    answer: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, said = line.partition("\t")
        answer.setdefault(name, []).append(printable(said))
    return {name: tuple(lines) for name, lines in answer.items()}


def recorded(name: str) -> Answer:
    """Read the answer of one machine."""
    return read((PROBES / name / "answer.txt").read_text(encoding="utf-8"))


def facts(name: str) -> machine.Machine:
    """Give what is made of the answer of one machine."""
    return machine.parse_machine(recorded(name))


# --- machines as data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_facts_of_a_machine(name: str, request: pytest.FixtureRequest):
    """`pytest --refresh-golden` writes them anew; the diff is what a reviewer reads."""
    entry, flags = machine.to_lock(facts(name))
    text = yaml.safe_dump({"hosts": {name: entry}, "flags": flags}, sort_keys=False, width=110)
    file = PROBES / name / "facts.yaml"
    if request.config.getoption("--refresh-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MACHINES)
def test_the_lock_loses_nothing(name: str):
    """What is read from the lock is what was written."""
    content = yaml.safe_load((PROBES / name / "facts.yaml").read_text(encoding="utf-8"))
    assert machine.from_lock(content, name) == facts(name)


def test_a_host_that_says_nothing_is_known_for_nothing():
    """Nulls, no guesses."""
    assert facts("silent") == machine.Machine()


@pytest.mark.parametrize("name", MACHINES)
def test_no_answer_breaks_the_parsers(name: str):
    """Programs print what they like: any line may be cut, doubled, garbled or missing."""
    lines = (PROBES / name / "answer.txt").read_text(encoding="utf-8").splitlines()
    chance = random.Random(name)  # noqa: S311 (the same dice at each run)
    for _ in range(30):
        some = [_garbled(line, chance) for line in lines if chance.random() > 0.1]
        machine.to_lock(machine.parse_machine(read("\n".join(some))))


def _garbled(line: str, chance: random.Random) -> str:
    name, _, said = line.partition("\t")
    if said and chance.random() < 0.2:
        at = chance.randrange(len(said))
        said = (
            said[:at]
            + chance.choice(["", "-", ",", " ", "[N/A]", "{", "\ufffd", "99999999999999999999"])
            + said[at + 1 :]
        )
    return f"{name}\t{said}"


# --- single rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-3,8", {0, 1, 2, 3, 8}),
        ("0-62:31", {0, 31, 62}),
        ("7", {7}),
        ("", set()),
        ("x,1-,3", {3}),
        ("9-1", set()),
    ],
)
def test_lists_of_cpus(text: str, expected: set[int]):
    """As the kernel writes them; what is none is left out."""
    assert cpu.numbers(text) == expected


def test_no_answer_is_no_number():
    """Programs have many words for `I do not know`."""
    for text in ("[N/A]", "N/A", "n/a", "[Not Supported]", "[Unknown Error]", "", " ", "-", None):
        assert known(text) is None, text
        assert whole(text) is None, text
    assert (whole("24576"), whole("0x10"), whole("1e9"), whole("-1"), whole("9" * 40)) == (24576, 16, None, None, None)


def test_what_is_no_text_is_blanked_out():
    """A host's answer is shown on a terminal; colours, bells and line breaks are not for it to choose."""
    assert printable("RTX\x1b[31m 3090\x07\u2028") == "RTX [31m 3090  "
    assert printable("Intel(R) Arc(TM) \u00e9") == "Intel(R) Arc(TM) \u00e9"


def test_documents_are_found_between_other_lines():
    """Tools warn on stdout, and print one document for each device."""
    assert documents(("WARNING: low power", '{"a": 1}', "[oops", '[{"b": 2}]')) == [{"a": 1}, [{"b": 2}]]


def test_a_measurement_that_wobbles_is_kept():
    """Free memory and disk speed differ at each look; the lock must not, or every probe were a commit."""
    first = facts("workstation")
    text = "\n".join(f"{name}\t{line}" for name, lines in recorded("workstation").items() for line in lines)
    wobbled = machine.parse_machine(
        read(text.replace(" 24121,", " 24009,").replace("58211084", "57000000").replace("0.118204", "0.125"))
    )
    assert wobbled != first
    assert machine.to_lock(wobbled, before=first) == machine.to_lock(first)
    moved = machine.parse_machine(read(text.replace(" 24121,", " 2009,")))
    assert machine.to_lock(moved, before=first)[0]["gpus"][0]["free_mib"] == 2009


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"os": 3},
        {"cpu": []},
        {"cpu": {"cores": "many"}},
        {"cpu": {"cores": 2}},
        {"gpus": {}},
        {"gpus": [{"name": "x"}]},
        {"runners": {"llama-server": 3}},
        {"ram": {"total_mib": True, "available_mib": 1}},
        {"gpu": []},
    ],
    ids=str,
)
def test_a_mangled_lock_is_an_error(entry: object):
    """A merge conflict solved by hand, say: what is wrong, where, and how it is written anew."""
    with pytest.raises(InventoryError) as caught:
        machine.from_lock({"hosts": {"gpu1": entry}}, "gpu1")
    assert caught.value.where.startswith("hosts.gpu1")
    assert caught.value.hint.startswith("labdeploy probe gpu1")


# --- the program --------------------------------------------------------------------------------------------------


def test_the_program_says_what_this_machine_has(tmp_path: Path):
    """Run here, by the shell that is here, it agrees with what the kernel says by other ways."""
    model = tmp_path / "m.gguf"
    model.write_bytes(b"x" * 20_000_000)
    argv = ["sh", str(PROGRAM), "facts", str(tmp_path), "-", str(model), "--", "vllm=/nowhere/vllm", "--"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert said.stderr == ""
    answer = read(said.stdout)
    found = machine.parse_machine(answer)
    assert "end" in answer
    assert found.runners == {}
    assert found.cpu
    assert found.ram
    online = subprocess.run(["getconf", "_NPROCESSORS_ONLN"], capture_output=True, text=True, check=True).stdout
    assert found.cpu.threads <= int(online)
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert found.ram.total_mib <= int(total.split()[1]) // 1024
    assert machine.parse_sizes(answer) == {str(model): 20_000_000}


def test_the_program_writes_nothing():
    """It asks; what could write, start or stop something is not in it."""
    text = PROGRAM.read_text()
    code = "\n".join(line.partition(" #")[0] for line in text.splitlines() if not line.startswith("#"))
    for word in (
        " rm ",
        " mv ",
        " cp ",
        "mkdir",
        "touch",
        "tee ",
        "systemctl start",
        "kill",
        "of=/dev/sd",
        "> /",
        ">/etc",
    ):
        assert word not in code, word
    assert "of=/dev/null" in code
