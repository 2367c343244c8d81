"""Builds of llama-server differ in their flags: what each recorded build is told, and what is lost by that."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import yaml
from conftest import MACHINES, TOP
from test_machines import CHAT, bare, probed

from labdeploy.errors import InventoryError
from labdeploy.facts import machine as facts
from labdeploy.runners.llama_flags import FEATURES, spoken

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conftest import Lab

    from labdeploy.facts.build import Build

PROBES = TOP / "tests" / "data" / "probes"
TAIL = ("--metrics", "--my-own", "-1")


def build_of(machine: str, *, without: tuple[str, ...] = (), **changed: bool) -> Build:
    """Give a recorded build of llama-server, with some of its flags gone or of another form."""
    content = yaml.safe_load((PROBES / machine / "facts.yaml").read_text(encoding="utf-8"))
    found = facts.from_lock(content, machine)
    assert found
    build = found.runners["llama-server"]
    flags: Mapping[str, bool] = {flag: value for flag, value in build.flags.items() if flag not in without}
    return dataclasses.replace(build, flags={**flags, **changed})


OLD = build_of("workstation")  # spring 2025
NEW = build_of("cpu-only-sid")  # 0.7.0, its real help


def golden_argvs() -> list[list[str]]:
    """List every command line of llama-server in the golden trees."""
    plans = [json.loads(file.read_text(encoding="utf-8")) for file in MACHINES.glob("*/expected/*/plan.json")]
    services = [service for plan in plans for service in plan["services"].values()]
    return [service["argv"] for service in services if service["runner"] == "llama-server"]


def test_the_plan_speaks_the_build_that_it_is_written_for():
    """0.7.0 knows every flag that any plan uses, and needs no row of the table."""
    argvs = golden_argvs()
    assert len(argvs) >= 8
    for argv in argvs:
        assert spoken(tuple(argv), NEW) == (tuple(argv), ())
        assert spoken(tuple(argv), None) == (tuple(argv), ())
    # those that the inventories of the golden trees pass through by themselves are not the plan's
    ours = {word for argv in argvs for word in argv if word.startswith("--")} & {*NEW.flags, *FEATURES}
    assert ours >= {"--fit", "--load-mode", "--flash-attn", "--no-kv-unified", "--cache-ram", "--device"}


def test_an_older_build_is_told_nothing_that_it_does_not_know():
    """Each plan of the golden trees, said to a build of spring 2025."""
    for argv in golden_argvs():
        if {"--mmproj", "--spec-draft-model"} & set(argv):
            continue  # it has no such thing: test_beside.py
        said, _lost = spoken(tuple(argv), OLD)
        assert said[0] == argv[0]
        assert {word for word in said if word in FEATURES} <= OLD.flags.keys()
        assert not {"--fit", "--load-mode", "--cache-ram", "off"} & set(said)


@pytest.mark.parametrize(
    ("words", "said", "lost"),
    [
        (("--fit", "off"), (), ""),
        (("--flash-attn", "on"), ("--flash-attn",), ""),
        (("--flash-attn", "off"), (), ""),
        (("--load-mode", "auto"), (), ""),
        (("--load-mode", "mmap"), (), ""),
        (("--load-mode", "none"), ("--no-mmap",), ""),
        (("--load-mode", "mlock"), ("--no-mmap", "--mlock"), ""),
        (("--load-mode", "mmap+mlock"), ("--mlock",), ""),
        (("--load-mode", "dio"), ("--no-mmap",), "it cannot read past the page cache"),
        (("--kv-unified",), (), ""),
        (("--no-kv-unified",), (), "all slots share one KV pool"),
        (("--cache-ram", "0"), (), ""),
        (("--cache-ram", "512"), (), "it keeps no prompts in main memory"),
        (("--ctx-checkpoints", "8"), (), ""),
        (("--n-cpu-moe", "2"), ("--override-tensor", r"blk\.(0|1)\.ffn_(up|down|gate)_(ch|)exps=CPU"), ""),
        (("--device", "none"), ("--device", "none"), ""),
    ],
)  # fmt: skip
def test_older_spellings(words: tuple[str, ...], said: tuple[str, ...], lost: str):
    """What stands around a flag stays as it is; what cannot be had is told with the change that brought it."""
    argv, warnings = spoken(("/bin/ls", *words, *TAIL), OLD)
    assert argv == ("/bin/ls", *said, *TAIL)
    assert [warning.partition("): ")[2] for warning in warnings] == ([lost] if lost else [])
    if warnings:
        assert warnings[0].startswith(f"llama-server b5124 (build 5124) has no {words[0]} ({FEATURES[words[0]].since}")


@pytest.mark.parametrize(
    ("without", "words", "said"),
    [
        (("--ctx-checkpoints",), ("--ctx-checkpoints", "8"), ("--swa-checkpoints", "8")),
        (("--no-kv-unified",), ("--no-kv-unified",), ()),
        (("--load-mode",), ("--load-mode", "none"), ("--no-mmap",)),
        (("--device",), ("--device", "none"), ("--gpu-layers", "0")),
    ],
)  # fmt: skip
def test_builds_in_between(without: tuple[str, ...], words: tuple[str, ...], said: tuple[str, ...]):
    """A build may know some of them: each flag is looked up by itself."""
    argv, _warnings = spoken(("/bin/ls", *words, *TAIL), build_of("cpu-only-sid", without=without))
    assert argv == ("/bin/ls", *said, *TAIL)


def test_a_build_of_august_2025():
    """It has one name for checkpoints, a flag for one KV pool and none for several, and -fa without a value."""
    build = build_of(
        "workstation", **{"--kv-unified": False, "--swa-checkpoints": True, "--cpu-moe": False, "--n-cpu-moe": True}
    )
    asked = ("--parallel", "4", "--no-kv-unified", "--flash-attn", "on", "--n-cpu-moe", "3", "--ctx-checkpoints", "8")
    argv, warnings = spoken(("/bin/ls", *asked), build)
    assert argv == (
        *("/bin/ls", "--parallel", "4", "--flash-attn"),
        *("--n-cpu-moe", "3", "--swa-checkpoints", "8"),
    )
    assert warnings == ()


def test_memory_that_a_build_cannot_leave_alone_is_an_error():
    """A plan that counts experts in RAM is wrong for a build that puts them on the GPU."""
    build = build_of("workstation", without=("--override-tensor",))
    with pytest.raises(InventoryError, match=r"has no --n-cpu-moe .*cannot keep experts in main memory"):
        spoken(("/bin/ls", "--n-cpu-moe", "2"), build)


# --- through a plan -----------------------------------------------------------------------------------------------


def test_a_plan_says_it_in_the_words_of_the_probed_build(lab: Lab):
    """The program at the inventory's path was probed; where it is another one, nothing is known of it."""
    bare(lab, f"{CHAT}, load_mode: none")
    lab.write(
        lab.path.read_text().replace("  h:\n", "  h:\n    runners: {llama-server: /usr/local/bin/llama-server}\n")
    )
    probed(lab, "workstation")
    service = json.loads(lab.run("plan", "--json").out)["hosts"]["h"]["services"]["chat"]
    assert "--no-mmap" in service["argv"]
    assert "--load-mode" not in service["argv"]
    assert any("has no --cache-ram" in warning for warning in service["warnings"])
    assert not any("has no --no-kv-unified" in warning for warning in service["warnings"])  # there is one slot
    lab.write(lab.path.read_text().replace("/usr/local/bin/llama-server", "/opt/new/llama-server"))
    service = json.loads(lab.run("plan", "--json").out)["hosts"]["h"]["services"]["chat"]
    assert "--load-mode" in service["argv"]


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        ("[--verbose-promt]", ["--verbose-promt"]),
        ("{verbos: true, temp: 0.5}", ["--verbos"]),
        ("[--no-such, --seed, --neither, --nor]", ["--no-such", "--nor"]),
        ("[--seed, -1, --temp, --x]", []),
        ("[--rope_scale, '2', --temp=1, -lv, '4']", []),
        ("[]", []),
    ],
)
def test_flags_that_the_probed_build_does_not_know_are_an_error(lab: Lab, flags: str, wrong: list[str]):
    """It would end at once when it starts. A value is not taken for a flag, nor a negative number."""
    bare(lab, f"{CHAT}, flags: {flags}")
    probed(lab, "cpu-only-sid")
    ran = lab.run("plan")
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    at = "error: hosts.h.services.chat.flags: "
    assert [
        line.removeprefix(at).partition(" is no flag of llama-server 0.7.0 (build 11669)")[0] for line in lines
    ] == wrong
    assert ran.code == (2 if wrong else 0), ran.err
    if wrong:
        assert "\nhint: labdeploy probe h  # if another build is there now\n" in ran.err


def test_a_near_flag_is_named(lab: Lab):
    """A typing error, most of the time."""
    bare(lab, f"{CHAT}, flags: [--slot-save-pat, /x]")
    probed(lab, "cpu-only-sid")
    assert 'did you mean "--slot-save-path"?' in lab.run("plan").err


def test_vllm_takes_the_start_of_a_flag(lab: Lab):
    """Its parser completes what is not ambiguous, and takes keys of a JSON value after a dot."""
    service = "runner: vllm, model: qwen2.5-7b-awq, port: 8000, flags: [{}]"
    for flags, code in {"--enforce": 0, "--dtype.x=1": 0, "--no-such-flag": 2}.items():
        bare(lab, service.format(flags))
        lab.write(lab.path.read_text().replace("  h:\n", "  h:\n    runners: {vllm: /opt/vllm/bin/vllm}\n"))
        probed(lab, "vllm-server")
        assert lab.run("plan").code == code, flags
