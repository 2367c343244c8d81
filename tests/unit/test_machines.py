"""What the inventory says of a host's hardware, what the host says, and what plans make of both."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import MODELS, TOP

from labdeploy import lock, machines, probe
from labdeploy.errors import HostError, ModelError
from labdeploy.facts import machine as facts

if TYPE_CHECKING:
    from conftest import Lab

PROBES = TOP / "tests" / "data" / "probes"
CHAT = "runner: llama-server, model: qwen3-4b, port: 8080"


def probed(lab: Lab, name: str, host: str = "h") -> facts.Machine:
    """Put a recorded machine into the lock as a host; give its facts."""
    lab.copy_lock()
    known = yaml.safe_load((PROBES / name / "facts.yaml").read_text(encoding="utf-8"))
    content = lock.read(lab.folder / "inventory.lock.yaml")
    content |= {"hosts": {host: known["hosts"][name]}, "flags": known["flags"]}
    lock.write(lab.folder / "inventory.lock.yaml", content)
    found = facts.from_lock(content, host)
    assert found
    return found


def bare(lab: Lab, service: str = CHAT) -> None:
    """Write an inventory that does not say what its host has."""
    lab.write(f"hosts:\n  h:\n    services:\n      chat: {{{service}}}\n{MODELS}")


def plan(lab: Lab) -> dict[str, Any]:
    """Plan the host as JSON."""
    ran = lab.run("plan", "--json")
    assert ran.code == 0, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return document


# --- hardware that is left out ------------------------------------------------------------------------------------


def test_hardware_may_be_left_out_where_the_host_was_asked(lab: Lab):
    """Cores, memory, GPUs with their UUIDs and the speed of the disk are then what it said."""
    bare(lab)
    probed(lab, "workstation")
    document = plan(lab)["hosts"]["h"]
    assert [(device["name"], device["total_mib"]) for device in document["devices"]] == [
        ("NVIDIA GeForce RTX 3090", 24576),
        ("NVIDIA GeForce RTX 3060", 12288),
    ]
    assert document["ram"]["total_mib"] == 64191
    chat = document["services"]["chat"]
    assert chat["settings"]["threads"]["value"] == 8
    assert chat["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-7d1f0c52-93b4-4e6a-a1c8-5b2e8f60d934"


def test_hardware_that_nobody_knows_is_one_error(lab: Lab):
    """All hosts of which nothing is known at once, with what is not known of models, and what to type."""
    service = f"services: {{chat: {{{CHAT}}}}}"
    lab.write(f"hosts: {{a: {{{service}}}, b: {{hardware: {{cpu: {{cores: 4}}, ram: 9GiB}}}}, c: {{}}}}\n{MODELS}")
    ran = lab.run("plan")
    assert ran.code == 2
    assert ran.err == (
        "error: inventory.yaml:1: hosts.a.hardware: is not all written, and the lock does not know it\n"
        "error: inventory.yaml:1: hosts.c.hardware: is not all written, and the lock does not know it\n"
        "error: inventory.yaml:4: models.qwen3-4b: nothing is known of its shape: "
        "inventory.lock.yaml has no entry for it\n"
        "\nhint: labdeploy probe a c\n"
    )


def test_what_shares_main_memory_is_no_gpu_to_plan_for(lab: Lab):
    """An iGPU's memory would be counted twice; a plan takes it only where the inventory names it."""
    for name, expected in {"amd-rocm7": ["AMD Radeon RX 7900 XTX"], "nvidia-unified": [], "no-driver": []}.items():
        bare(lab)
        probed(lab, name)
        assert [device["name"] for device in plan(lab)["hosts"]["h"]["devices"]] == expected, name


@pytest.mark.parametrize(
    ("name", "threads"), [("intel-hybrid", 8), ("arm-board", 4), ("numa-container", 16), ("workstation", 8)]
)
def test_threads_are_those_that_help(lab: Lab, name: str, threads: int):
    """Fast cores of a hybrid, and no more than a control group gives the time of."""
    bare(lab)
    probed(lab, name)
    assert plan(lab)["hosts"]["h"]["services"]["chat"]["settings"]["threads"]["value"] == threads


def test_a_gpu_that_is_not_there_is_told(lab: Lab):
    """Also where hardware comes from the lock, so that reading the inventory could not see it."""
    bare(lab, f"{CHAT}, gpus: [2]")
    probed(lab, "workstation")
    ran = lab.run("plan")
    assert ran.code == 2
    assert ran.err.startswith("error: hosts.h.services.chat.gpus: names GPU 2, the host has 2, counted from 0\n")


# --- hardware that is written -------------------------------------------------------------------------------------

SAME = (
    "cpu: {cores: 8, threads: 16}, ram: 62.5GiB, gpus: [{name: RTX 3090, vram: 24GiB}, {name: RTX 3060, vram: 12GiB}]"
)


def told(lab: Lab, hardware: str, machine: str = "workstation") -> list[str]:
    """Give the differences between an inventory and a machine."""
    lab.host(hardware, chat=CHAT)
    host = lab.host(hardware, chat=CHAT).hosts["h"]
    return [str(found).removeprefix("hosts.h.hardware") for found in machines.differences(host, probed(lab, machine))]


def test_the_inventory_wins_and_what_it_leaves_out_is_filled_in(lab: Lab):
    """UUIDs of GPUs by their order on the bus, features of the processor, the speed of the disk."""
    host = lab.host("cpu: {cores: 4}, ram: 32GiB, gpus: [{name: RTX 3090, vram: 20GiB}]", chat=CHAT).hosts["h"]
    done = machines.completed(host, probed(lab, "workstation")).hardware
    assert (done.cpu.cores, done.ram, done.gpus[0].vram) == (4, 32768, 20480)
    assert done.gpus[0].uuid == "GPU-7d1f0c52-93b4-4e6a-a1c8-5b2e8f60d934"
    assert done.gpus[0].compute_capability == "8.6"
    assert done.disk_mib_per_s == 1083
    written = lab.host("cpu: {cores: 4, features: [avx]}, ram: 32GiB, disk_read: 500MiB", chat=CHAT).hosts["h"]
    done = machines.completed(written, probed(lab, "workstation")).hardware
    assert (done.cpu.known_features, done.disk_mib_per_s) == (("avx",), 500)


def test_a_part_of_the_hardware_may_be_written(lab: Lab):
    """One line about the GPU or the disk, and the rest as probed; what is written is still compared."""
    machine = probed(lab, "workstation")
    text = f"hosts: {{h: {{hardware: {{KEYS}}, services: {{chat: {{{CHAT}}}}}}}}}\n{MODELS}"
    host = lab.load(text.replace("KEYS", "disk_read: 500MiB")).hosts["h"]
    done = machines.completed(host, machine).hardware
    assert (done.cpu.cores, done.ram, len(done.gpus), done.disk_mib_per_s) == (8, 64191, 2, 500)
    assert machines.differences(host, machine) == []
    host = lab.load(text.replace("KEYS", "ram: 32GiB, gpus: [{name: RTX 3090, vram: 20GiB}]")).hosts["h"]
    done = machines.completed(host, machine).hardware
    assert (done.cpu.cores, done.ram, [gpu.vram for gpu in done.gpus]) == (8, 32768, [20480])
    assert [str(found).removeprefix("hosts.h.hardware") for found in machines.differences(host, machine)] == [
        ".ram says 32GiB, the host has 62.5GiB",
        ".gpus[0].vram says 20GiB, the host has 24GiB",
        ".gpus does not name NVIDIA GeForce RTX 3060 with 12GiB at 0000:0b:00.0",
    ]
    assert lab.run("plan").code == 0
    (lab.folder / "inventory.lock.yaml").unlink()
    lab.copy_lock()
    assert "hosts.h.hardware: is not all written, and the lock does not know it" in lab.run("plan").err


def test_a_uuid_names_a_card_wherever_it_sits(lab: Lab):
    """The second card of the bus is the first of the inventory."""
    gpu = "{name: RTX 3060, vram: 12GiB, uuid: GPU-2b90e7a4-61cd-0f35-8e42-c9d4a7b31f06}"
    assert told(lab, f"cpu: {{cores: 8}}, ram: 62.5GiB, gpus: [{gpu}]") == [
        ".gpus does not name NVIDIA GeForce RTX 3090 with 24GiB at 0000:0a:00.0"
    ]


def test_the_same_is_no_difference(lab: Lab):
    """Sizes on the box and sizes of drivers are a little apart."""
    assert told(lab, SAME) == []
    assert told(lab, SAME.replace("24GiB", "24564MiB")) == []


GONE = ".gpus does not name NVIDIA GeForce RTX 3060 with 12GiB at 0000:0b:00.0"
DIFFERENCES = [
    ("62.5GiB", "128GiB", [".ram says 128GiB, the host has 62.5GiB"]),
    ("62.5GiB", "512MiB", [".ram says 512MiB, the host has 62.5GiB"]),
    ("cores: 8", "cores: 12", [".cpu.cores says 12, the host has 8"]),
    ("threads: 16", "threads: 8", [".cpu.threads says 8, the host has 16"]),
    ("threads: 16", "features: [avx512f]", [".cpu.features names avx512f, which the host has not"]),
    ("24GiB", "48GiB", [".gpus[0].vram says 48GiB, the host has 24GiB"]),
    ("12GiB", "8GiB", [".gpus[1].vram says 8GiB, the host has 12GiB"]),
    ("12GiB", '12GiB, compute_capability: "8.9"', [".gpus[1].compute_capability says 8.9, the host has 8.6"]),
    ("RTX 3060", "RX 7600", [".gpus[1] says RX 7600, the host shows no such GPU", GONE]),
]


@pytest.mark.parametrize(("old", "new", "expected"), DIFFERENCES)
def test_differences_are_told(lab: Lab, old: str, new: str, expected: list[str]):
    """Each with its path in the inventory, what it says, and what the host has."""
    assert told(lab, SAME.replace(old, new)) == expected


def test_a_card_without_a_driver_is_told(lab: Lab):
    """The inventory counts on memory of which the host says nothing."""
    gpu = "gpus: [{name: GTX 1080 Ti, vram: 11GiB}]"
    assert told(lab, f"cpu: {{cores: 4}}, ram: 15921MiB, {gpu}", "no-driver") == [
        ".gpus[0].vram says 11GiB, the host does not say: no driver tells",
        ".gpus does not name nvidia GPU at 0000:02:00.0",
    ]


def test_a_limit_of_a_container_is_told(lab: Lab):
    """Threads beyond the time it gets make all others wait."""
    assert told(lab, "cpu: {cores: 24}, ram: 64GiB", "numa-container") == [
        ".cpu.cores says 24, a control group of the host allows the time of 16"
    ]


def test_a_plan_warns_of_what_it_may_go_wrong_by(lab: Lab):
    """More memory than there is; not that half of it is left alone, which may be meant."""
    lab.host(SAME.replace("62.5GiB", "32GiB").replace("24GiB", "48GiB"), chat=CHAT)
    probed(lab, "workstation")
    assert plan(lab)["warnings"] == {"h": ["hosts.h.hardware.gpus[0].vram says 48GiB, the host has 24GiB"]}
    assert "    warning: hosts.h.hardware.gpus[0].vram says 48GiB, the host has 24GiB\n" in lab.run("plan").out


# --- the lock -----------------------------------------------------------------------------------------------------


def answer(name: str, **about: Any) -> probe.Probed:  # noqa: ANN401
    """Give what a probe of a recorded machine brings."""
    known = yaml.safe_load((PROBES / name / "facts.yaml").read_text(encoding="utf-8"))
    found = facts.from_lock(known, name)
    assert found
    return probe.Probed(found, **about)


def test_the_lock_keeps_what_it_had_of_others():
    """Hosts that were not asked or did not answer, models; and no set of flags that no host has."""
    first = probe.updated({}, {"b": answer("vllm-server"), "a": answer("workstation")})
    assert list(first["hosts"]) == ["a", "b"]
    assert len(first["flags"]) == 2
    again = probe.updated(first, {"a": HostError("away"), "b": answer("silent")})
    assert again["hosts"]["a"] == first["hosts"]["a"]
    assert again["hosts"]["b"]["cpu"] is None
    assert list(again["flags"]) == [first["hosts"]["a"]["runners"]["llama-server"]["flags"]]


@pytest.mark.parametrize("entry", [3, {"os": 3}, {"runners": 3}, {"runners": {"vllm": 3}}, None])
def test_a_mangled_entry_is_written_anew(entry: object):
    """As the hint of the error about it says; also one of a host that was not asked is no hindrance."""
    lock = {"hosts": {"a": entry, "b": entry}}
    after = probe.updated(lock, {"a": answer("workstation")})
    assert after["hosts"]["a"]["os"] == "Ubuntu 24.04.3 LTS"
    assert after["hosts"]["b"] == entry


def test_the_same_answers_make_the_same_bytes(lab: Lab):
    """Whatever order hosts were asked in."""
    for order in (("a", "b"), ("b", "a")):
        answers = {name: answer({"a": "workstation", "b": "amd-rocm7"}[name]) for name in order}
        lock.write(lab.folder / f"{order[0]}.yaml", probe.updated({}, answers))
    assert (lab.folder / "a.yaml").read_bytes() == (lab.folder / "b.yaml").read_bytes()
    lock.write(lab.folder / "c.yaml", probe.updated(lock.read(lab.folder / "a.yaml"), answers))
    assert (lab.folder / "a.yaml").read_bytes() == (lab.folder / "c.yaml").read_bytes()


def test_the_first_host_decides_which_file_a_model_is(lab: Lab):
    """Two hosts with different files of one name: the lock has one of them, and the other host is warned of."""
    inventory = lab.load(f"hosts: {{a: {{services: {{x: {{{CHAT}}}}}}}, b: {{services: {{x: {{{CHAT}}}}}}}}}\n{MODELS}")
    answers = {
        "a": answer("silent", sizes={"qwen3-4b": 5}, headers={"qwen3-4b": {"size_bytes": 5}}),
        "b": answer("silent", sizes={"qwen3-4b": 7}, headers={"qwen3-4b": {"size_bytes": 7}}),
    }
    after = probe.updated({}, answers)
    assert after["models"] == {"qwen3-4b": {"size_bytes": 5}}
    assert probe.warnings(inventory, inventory.hosts["a"], answers["a"], after) == ()
    path = "/srv/models/Qwen3-4B-Q4_K_M.gguf"
    assert probe.warnings(inventory, inventory.hosts["b"], answers["b"], after) == (
        f"models.qwen3-4b: {path} has 7 bytes here, the lock is of a file with 5",
    )
    assert probe.warnings(inventory, inventory.hosts["b"], answer("silent"), after) == (
        f"models.qwen3-4b: {path} is not there, or not all of it",
    )


def test_a_header_that_cannot_be_read_leaves_the_lock_alone():
    """The error is told; what was known before is still there."""
    broken = answer("silent", sizes={"m": 7}, headers={"m": ModelError("is cut off", where="a:/srv/models/m.gguf")})
    assert probe.updated({"models": {"m": {"size_bytes": 5}}}, {"a": broken})["models"] == {"m": {"size_bytes": 5}}
    whole = answer("silent", sizes={"m": 9}, headers={"m": {"size_bytes": 9}})
    assert (
        probe.updated({"models": {"m": {"size_bytes": 5}}}, {"a": broken, "b": whole})["models"]["m"]["size_bytes"] == 9
    )
    assert list(map(str, probe.errors(broken))) == ["a:/srv/models/m.gguf: is cut off"]


def test_what_is_odd_on_a_host_is_told(lab: Lab):
    """A build that sees no GPU, a file that changes every service, a card without a driver."""
    inventory = lab.host(SAME, chat=CHAT)
    found = answer("workstation", sizes={"qwen3-4b": 5})
    build = found.machine.runners["llama-server"]
    blind = dataclasses.replace(build, devices=(), config="/etc/llama.cpp/config.ini")
    odd = dataclasses.replace(found, machine=dataclasses.replace(found.machine, runners={"llama-server": blind}))
    sees, config = probe.warnings(inventory, inventory.hosts["h"], odd, {"models": {"qwen3-4b": {"size_bytes": 5}}})
    assert sees.startswith("/usr/local/bin/llama-server sees no GPU, the host has NVIDIA GeForce RTX 3090, NVIDIA ")
    assert config.startswith("/etc/llama.cpp/config.ini is read by every llama-server of the host")
