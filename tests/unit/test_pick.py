"""`pick`: the decision tree, and what the real planner says of it on each host."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Lab

GPU = 'gpus: [{name: RTX 3090, vram: 24GiB, compute_capability: "8.6"}]'


@pytest.fixture
def fleet(lab: Lab) -> Lab:
    """Give a host with a GPU and a service, and one without a GPU."""
    lab.copy_lock()
    inventory = lab.host(
        f"cpu: {{cores: 8}}, ram: 64GiB, {GPU}", chat="runner: llama-server, model: qwen3-8b, port: 8080"
    )
    text = inventory.path.read_text()
    lab.write(text.replace("hosts:\n", "hosts:\n  small: {hardware: {cpu: {cores: 4}, ram: 16GiB}}\n", 1))
    return lab


def pick(lab: Lab, *words: str, code: int = 0) -> dict[str, Any]:
    """Give the report of `pick`."""
    ran = lab.run("pick", "--json", *words)
    assert ran.code == code, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


@pytest.mark.parametrize(
    ("words", "runner"),
    [
        (("--model", "qwen3-4b"), "llama-server"),
        (("--model", "qwen3-4b", "--for", "experiment"), "ollama"),
        (("--model", "qwen3-4b", "--for", "throughput"), "llama-server"),
        (("--model", "qwen2.5-7b-awq", "--for", "experiment"), "vllm"),
    ],
)
def test_the_tree_is_that_of_runner_auto(fleet: Lab, words: tuple[str, ...], runner: str):
    """What `pick` says is what `runner: auto` with that purpose does."""
    found = pick(fleet, *words)
    assert found["runner"] == runner
    assert found["host"] == "h", "all of it fits on the GPU there"
    purpose = found["purpose"]
    fleet.write(
        fleet.path.read_text().replace(
            "runner: llama-server, model: qwen3-8b", f"runner: auto, purpose: {purpose}, model: {words[1]}"
        )
    )
    plan = json.loads(fleet.run("plan", "h", "--json").out)
    assert plan["hosts"]["h"]["services"]["chat"]["runner"] == runner


def test_the_line_it_gives_makes_the_plan_it_promises(fleet: Lab):
    """Memory and context are those of `plan` once the line is written: the same planner, beside the same services."""
    found = pick(fleet, "h", "--model", "qwen3-4b", "--at-once", "4")
    offer = found["hosts"]["h"]["runners"]["llama-server"]
    place, _, keys = offer["write"].partition(": ")
    assert place == "hosts.h.services.qwen3-4b"
    assert "port: 8081" in keys, "8080 is taken"
    fleet.write(fleet.path.read_text().replace("      chat:", f"      qwen3-4b: {keys}\n      chat:"))
    planned = json.loads(fleet.run("plan", "h", "--json").out)["hosts"]["h"]["services"]["qwen3-4b"]
    assert planned["memory"] == offer["memory"]
    assert planned["settings"]["parallel"]["value"] == 4
    assert planned["settings"]["ctx_size"]["value"] // 4 == offer["context_tokens_each"]


def test_what_others_would_lose_is_told(fleet: Lab):
    """A second model on a GPU takes context from the first one; that is part of the price."""
    ran = fleet.run("pick", "h", "--model", "qwen3-30b")
    assert ran.code == 0, ran.err
    assert "h: llama-server: then chat " in ran.out, ran.out


def test_gpu_or_not(fleet: Lab):
    """With --gpu only what is wholly on GPUs counts; with --no-gpu GPUs stay free."""
    on = pick(fleet, "--model", "qwen3-4b", "--gpu")
    assert on["host"] == "h"
    assert on["hosts"]["small"]["runners"]["llama-server"]["problems"] == ["it would run on the CPU"]
    off = pick(fleet, "--model", "qwen3-4b", "--no-gpu")
    assert [name for name in off["hosts"]["h"]["runners"]["llama-server"]["memory"] if name != "host"] == []
    assert "gpus: []" in off["hosts"]["h"]["runners"]["llama-server"]["write"]


def test_what_fits_nowhere_is_exit_code_3(fleet: Lab):
    """The report is still there, with what is lacking by host."""
    found = pick(fleet, "small", "--model", "llama3-70b", code=3)
    assert found["host"] is None
    assert "too much" in found["hosts"]["small"]["runners"]["llama-server"]["problems"][0]
    assert "does not fit with llama-server on any of 1 hosts" in fleet.run("pick", "small", "--model", "llama3-70b").err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "--model NAME, one of: qwen3-4b"),
        (("--model", "qwen"), "'qwen' is not under models"),
        (("nope", "--model", "qwen3-4b"), "no host or group is named 'nope'"),
        (("--model", "qwen3-4b", "--for", "fun"), "'fun' is not one of"),
        (("--model", "qwen3-4b", "--at-once", "0"), "0 is not in the range"),
    ],
)
def test_bad_input_is_one_clear_error(fleet: Lab, words: tuple[str, ...], what: str):
    """With what to write in its place."""
    ran = fleet.run("pick", *words)
    assert (ran.code, what in ran.err) == (2, True), ran.err


def test_nothing_is_written(fleet: Lab):
    """It only answers."""
    before = fleet.path.read_bytes()
    pick(fleet, "--model", "qwen3-4b")
    assert fleet.path.read_bytes() == before
