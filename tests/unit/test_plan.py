"""What fits where: more memory is never worse, what people ask for wins, and every hint is one that helps."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import pytest
from conftest import MODELS

from labdeploy import plan as planning
from labdeploy import report
from labdeploy.errors import FitError, InventoryError

if TYPE_CHECKING:
    from conftest import Lab

    from labdeploy.plan import HostPlan
    from labdeploy.runners.base import ServicePlan

CPU = "cpu: {cores: 8, threads: 16}, ram: 64GiB"
RTX = CPU + ', gpus: [{name: RTX 3090, vram: 24GiB, compute_capability: "8.6"}]'


def gpu(vram: str, ram: str = "64GiB", cores: int = 8) -> str:
    """Write a machine with one NVIDIA GPU."""
    return f'cpu: {{cores: {cores}}}, ram: {ram}, gpus: [{{name: RTX 3090, vram: {vram}, compute_capability: "8.6"}}]'


def value(plan: HostPlan, key: str, service: str = "a") -> object:
    """Give one setting of a service."""
    return named(plan, service).settings[key].value


def named(plan: HostPlan, service: str = "a") -> ServicePlan:
    """Give the plan of a service."""
    return next(each for each in plan.services if each.name == service)


def on_gpu(plan: HostPlan) -> tuple[int, int]:
    """Count what the GPU has, best last: layers less those whose experts stay in RAM, then the context."""
    settings = named(plan).settings
    moe = settings["n_cpu_moe"].value if "n_cpu_moe" in settings else 0
    layers = settings["gpu_layers"].value
    return (layers * 1000 - moe if layers else 0, settings["ctx_size"].value)


# --- monotony -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["qwen3-8b", "qwen3-30b", "llama3-70b", "gemma3-27b"])
def test_more_vram_never_means_fewer_layers(lab: Lab, model: str):
    """Layers first, then experts, then the context."""
    keys = f"runner: llama-server, model: {model}, port: 8080"
    seen = [on_gpu(lab.plan(gpu(f"{mib}MiB"), a=keys)) for mib in range(1024, 65 * 1024, 2048 + 512)]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]


@pytest.mark.parametrize("model", ["qwen3-8b", "qwen3-30b"])
def test_more_vram_never_means_less_context_once_all_is_on_the_gpu(lab: Lab, model: str):
    """Every MiB goes to the context then, up to what the model was trained for."""
    keys = f"runner: llama-server, model: {model}, port: 8080, parallel: 2"
    plans = [lab.plan(gpu(f"{mib}MiB"), a=keys) for mib in range(20480, 49152, 2048)]
    contexts = [value(plan, "ctx_size") for plan in plans]
    assert contexts == sorted(contexts)
    assert contexts[-1] == 2 * 40960


@pytest.mark.parametrize(("runner", "key"), [("ollama", "context_length"), ("vllm", "max_model_len")])
def test_more_vram_never_means_less_context_with_other_runners(lab: Lab, runner: str, key: str):
    """From where the whole model is on the GPU."""
    model = "qwen2.5-7b-awq" if runner == "vllm" else "qwen3-8b"
    sizes = range(8192, 24577, 1024)
    plans = [lab.plan(gpu(f"{mib}MiB"), a=f"runner: {runner}, model: {model}, port: 1") for mib in sizes]
    contexts = [value(plan, key) for plan in plans if plan.fits and named(plan).gpus]
    assert contexts == sorted(contexts)
    assert contexts[-1] in (40960, 32768)


def test_more_ram_never_means_less_context_on_a_cpu(lab: Lab):
    """Where there is no GPU the context grows with main memory."""
    sizes = range(8, 33, 2)
    plans = [
        lab.plan(f"cpu: {{cores: 4}}, ram: {n}GiB", a="model: qwen3-8b, port: 1, runner: llama-server") for n in sizes
    ]
    contexts = [value(plan, "ctx_size") for plan in plans if plan.fits]
    assert contexts == sorted(contexts)
    assert len(contexts) > 5


def test_more_services_never_mean_more_threads_each(lab: Lab):
    """They share the cores: together they never want more than there are, while there are enough."""
    shares = []
    for n in range(1, 12):
        keys = "runner: llama-server, model: qwen3-4b, ctx_size: 1024"
        services = {f"s{i}": f"{keys}, port: {8000 + i}" for i in range(n)}
        plan = lab.plan("cpu: {cores: 8}, ram: 512GiB", **services)
        threads = [value(plan, "threads", name) for name in services]
        assert len(set(threads)) == 1
        assert n > 8 or sum(threads) <= 8
        shares.append(threads[0])
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 8
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("cpu", "threads", "why"),
    [
        ("cores: 8, threads: 16", 8, "8 physical cores"),
        ("cores: 14, performance_cores: 6, threads: 20", 6, "6 performance cores"),
        ("cores: 1", 1, "1 physical core"),
    ],
)
def test_threads_are_fast_physical_cores(lab: Lab, cpu: str, threads: int, why: str):
    """Slow cores hold the fast ones up, and a second thread on a core adds nothing."""
    plan = lab.plan(f"cpu: {{{cpu}}}, ram: 64GiB", a="model: qwen3-4b, port: 1")
    assert value(plan, "threads") == threads
    assert why in named(plan).settings["threads"].why


# --- asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("ctx_size", 3000),
        ("ctx_size", 8192),
        ("parallel", 3),
        ("gpu_layers", 7),
        ("gpu_layers", 0),
        ("threads", 3),
        ("threads_batch", 5),
        ("batch_size", 1024),
        ("ubatch_size", 256),
        ("cache_type_k", "q8_0"),
        ("cache_type_v", "q4_0"),
        ("flash_attn", "off"),
        ("cache_ram", "512MiB"),
        ("ctx_checkpoints", 3),
        ("load_mode", "none"),
        ("kv_unified", "true"),
    ],
)
def test_what_is_asked_for_wins(lab: Lab, key: str, asked: object):
    """It stands in the plan as asked, says that it was, and reaches the command line."""
    plan = lab.plan(RTX, a=f"runner: llama-server, model: qwen3-8b, port: 8080, {key}: {asked}")
    setting = named(plan).settings[key]
    wanted = {"512MiB": 512, "true": True}.get(str(asked), asked)
    assert (setting.value, setting.why) == (wanted, "as the inventory says")
    argv = " ".join(named(plan).argv)
    flag = "--kv-unified" if key == "kv_unified" else f"--{key.replace('_', '-')} {wanted}"
    assert flag in argv or (key, asked) == ("gpu_layers", 0)
    assert plan.fits


@pytest.mark.parametrize(
    ("hardware", "keys"),
    [
        (RTX, "runner: llama-server, model: qwen3-8b, gpu_layers: 37, ctx_size: 262144"),
        (RTX, "runner: llama-server, model: llama3-70b, gpu_layers: 81"),
        (RTX, "runner: llama-server, model: qwen3-8b, gpu_layers: 20, cache_ram: 70GiB"),
        (RTX, "runner: llama-server, model: qwen3-30b, n_cpu_moe: 0, gpu_layers: 49, ctx_size: 81920, parallel: 2"),
        (CPU, "runner: llama-server, model: qwen3-8b, ctx_size: 1000000"),
        ("cpu: {cores: 4}, ram: 4GiB", "runner: llama-server, model: qwen3-8b"),
        ("cpu: {cores: 4}, ram: 4GiB", "runner: ollama, model: qwen3-8b"),
        (CPU, "runner: llama-server, model: qwen3-8b, gpu_layers: 20"),
        (RTX, "runner: vllm, model: qwen2.5-7b-awq, gpu_memory_utilization: 0.2"),
        (RTX, "runner: ollama, model: qwen3-8b, context_length: 1000000"),
    ],
)
def test_what_is_asked_for_is_still_checked(lab: Lab, hardware: str, keys: str):
    """Too much is said with the numbers, before any host is touched; exit code 3."""
    plan = lab.plan(hardware, a=f"{keys}, port: 8080")
    assert not plan.fits
    with pytest.raises(FitError) as caught:
        planning.require_fit([plan])
    assert str(caught.value).startswith("h: a: does not fit: ")
    assert re.search(r"\d", str(caught.value).removeprefix("h: a: does not fit: "))
    assert caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("hardware", "keys"),
    [
        (RTX, "runner: llama-server, model: qwen3-8b, gpu_layers: 37, ctx_size: 262144"),
        (RTX, "runner: llama-server, model: qwen3-8b, gpu_layers: 37, ctx_size: 150000"),
        (RTX, "runner: llama-server, model: llama3-70b, gpu_layers: 81"),
        (RTX, "runner: llama-server, model: qwen3-8b, gpu_layers: 20, cache_ram: 70GiB"),
        (CPU, "runner: llama-server, model: qwen3-8b, ctx_size: 1000000"),
        (CPU, "runner: llama-server, model: qwen3-8b, ctx_size: 500000, parallel: 4"),
        (CPU, "runner: llama-server, model: qwen3-8b, gpu_layers: 20"),
        (RTX, "runner: ollama, model: qwen3-8b, context_length: 1000000"),
        (gpu("9GiB"), "runner: vllm, model: qwen2.5-7b-awq, max_model_len: 32768"),
        (RTX, "runner: vllm, model: qwen2.5-7b-awq, gpu_memory_utilization: 0.2"),
    ],
)
def test_every_hint_helps(lab: Lab, hardware: str, keys: str):
    """Each line that is offered, written instead of what was there, makes it fit."""
    plan = lab.plan(hardware, a=f"{keys}, port: 8080")
    ways = named(plan).ways_to_fit
    assert ways
    for way in ways:
        changed = dict(pair.split(": ") for pair in keys.split(", ")) | dict(
            pair.split(": ") for pair in way.split(", ")
        )
        written = ", ".join(f"{key}: {to}" for key, to in changed.items())
        assert lab.plan(hardware, a=f"{written}, port: 8080").fits, way


def test_hints_of_a_command_line(lab: Lab):
    """Stderr has the numbers and a line to write; nothing was rendered."""
    lab.copy_lock()
    lab.host(CPU, a="runner: llama-server, model: qwen3-8b, ctx_size: 1000000, port: 8080")
    for command in ("plan", "render"):
        ran = lab.run(command)
        assert ran.code == 3
        assert re.match(r"error: h: a: does not fit: RAM needs \d+ MiB, \d+ MiB are free: \d+ MiB too much\n", ran.err)
        assert "hint: hosts.h.services.a: `" in ran.err
    assert not (lab.folder / "rendered").exists()


def test_a_gpu_that_is_asked_for_is_used_though_another_is_larger(lab: Lab):
    """`gpus:` pins a service, and the process sees just that card."""
    cards = "gpus: [{name: RTX 4090, vram: 24GiB}, {name: RTX 3060, vram: 12GiB}]"
    plan = named(lab.plan(f"{CPU}, {cards}", a="runner: llama-server, model: qwen3-8b, port: 1, gpus: [1]"))
    assert [each.id for each in plan.gpus] == ["gpu1"]
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "1"
    largest = named(lab.plan(f"{CPU}, {cards}", a="runner: llama-server, model: qwen3-8b, port: 1"))
    assert [each.id for each in largest.gpus] == ["gpu0"]


def test_a_split_for_more_gpus_than_there_are_is_refused(lab: Lab):
    """llama-server would read the third share as a third GPU; the plan would lose the layers that go there."""
    cards = "gpus: [{name: RTX 4090, vram: 24GiB}, {name: RTX 4090, vram: 24GiB}]"
    with pytest.raises(InventoryError, match="tensor_split names 3 GPUs, it has 2"):
        lab.plan(f"{CPU}, {cards}", a="runner: llama-server, model: qwen3-8b, port: 1, tensor_split: [1, 1, 1]")


@pytest.mark.parametrize("split", ["[0, 0]", "[]"])
def test_a_split_of_zeros_is_none(lab: Lab, split: str):
    """llama.cpp then splits by what is free; planned as written, all layers would be on the first GPU."""
    cards = "gpus: [{name: RTX 3070, vram: 8GiB}, {name: RTX 3070, vram: 8GiB}]"
    base = "runner: llama-server, model: qwen3-8b, port: 1"
    plain, zeros = (named(lab.plan(f"{CPU}, {cards}", a=keys)) for keys in (base, f"{base}, tensor_split: {split}"))
    assert (zeros.argv, zeros.settings) == (plain.argv, plain.settings)


# --- budgets ------------------------------------------------------------------------------------------------------

MACHINES = {
    "cpu": (CPU, {"a": "model: qwen3-8b, port: 1", "b": "model: qwen3-4b, port: 2"}),
    "gpu": (RTX, {"a": "model: qwen3-30b, port: 1"}),
    "shared": (RTX, {"a": "model: qwen3-8b, port: 1", "b": "model: qwen3-4b, port: 2"}),
    "vllm": (
        RTX,
        {"a": "model: qwen2.5-7b-awq, port: 1", "b": "runner: llama-server, model: qwen3-4b, ctx_size: 8192, port: 2"},
    ),
    "split": (
        CPU + ", gpus: [{name: RTX 3090, vram: 24GiB}, {name: RTX 3090, vram: 24GiB}]",
        {"a": "model: llama3-70b, port: 1"},
    ),
    "few": (gpu("8GiB"), {"a": "model: gemma3-27b, port: 1"}),
    "moe": (gpu("12GiB"), {"a": "model: qwen3-30b, port: 1"}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_no_device_is_planned_fuller_than_it_may_be(lab: Lab, machine: str):
    """Usable is total less the reserve, and what fits is within it, device by device and with the sums right."""
    hardware, services = MACHINES[machine]
    plan = lab.plan(hardware, **services)
    document = planning.to_json(plan)
    assert plan.fits
    for device in document["devices"]:
        assert device["usable_mib"] == device["total_mib"] - 512
        assert device["planned_mib"] <= device["usable_mib"]
        taken = [service["memory"].get(device["id"], {}) for service in document["services"].values()]
        assert abs(sum(sum(each.values()) for each in taken) - device["planned_mib"]) < 1.1
    ram = document["ram"]
    assert ram["usable_mib"] == ram["total_mib"] - 1024
    assert ram["planned_mib"] <= ram["usable_mib"]


def test_a_reserve_is_left_alone(lab: Lab):
    """As much as is written, on every device; more of it never gives a larger context."""
    contexts = []
    for gib in (0, 2, 4, 8, 100):
        service = "{model: qwen3-8b, port: 1, runner: llama-server, parallel: 2}"
        reserve = f"{{ram: 4GiB, vram: {gib}GiB}}"
        text = f"hosts: {{h: {{hardware: {{{RTX}}}, reserve: {reserve}, services: {{a: {service}}}}}}}"
        plan = lab.plans(lab.load(text + "\nmodels: {qwen3-8b: {path: x.gguf}}"))["h"]
        document = planning.to_json(plan)
        assert document["devices"][0]["usable_mib"] == max(0, 24576 - gib * 1024)
        assert document["ram"]["usable_mib"] == 61440
        contexts.append((document["devices"][0]["planned_mib"] > 0, value(plan, "ctx_size")))
    assert contexts[:-1] == sorted(contexts[:-1], reverse=True)
    assert contexts[-1][0] is False


def test_several_services_share_a_gpu(lab: Lab):
    """Each is planned beside what the others take; none is put on the CPU while a shorter context would do."""
    services = {f"s{i}": f"runner: llama-server, model: qwen3-4b, port: {8000 + i}" for i in range(3)}
    plan = lab.plan(RTX, **services)
    assert all(named(plan, name).gpus for name in services)
    assert plan.planned_mib("gpu0") <= 24064


@pytest.mark.parametrize(
    ("hardware", "models"),
    [
        (gpu("24GiB"), ("qwen3-30b", "qwen3-4b")),
        (gpu("16GiB"), ("qwen3-8b", "qwen3-8b")),
        ("cpu: {cores: 8}, ram: 20GiB", ("qwen3-8b", "qwen3-4b")),
    ],
)
def test_the_first_service_leaves_room_for_the_next(lab: Lab, hardware: str, models: tuple[str, str]):
    """With a shorter context for the first one both fit, wholly on the GPU where there is one."""
    keys = [f"runner: llama-server, model: {model}, port: {8080 + i}" for i, model in enumerate(models)]
    short = lab.plan(hardware, a=f"{keys[0]}, ctx_size: 8192, cache_ram: 512MiB", b=f"{keys[1]}, ctx_size: 8192")
    assert short.fits
    plan = lab.plan(hardware, a=keys[0], b=keys[1])
    assert plan.fits
    assert value(plan, "gpu_layers", "b") == value(short, "gpu_layers", "b")


def test_those_who_take_what_is_left_are_planned_last(lab: Lab):
    """VLLM sizes itself: beside a service of a known size it gets the rest, whatever the order in the inventory."""
    fixed = "runner: llama-server, model: qwen3-4b, ctx_size: 8192, port: 2"
    for services in (
        {"a": "model: qwen2.5-7b-awq, port: 1", "b": fixed},
        {"b": fixed, "a": "model: qwen2.5-7b-awq, port: 1"},
    ):
        plan = lab.plan(RTX, **services)
        assert plan.fits
        assert [each.name for each in plan.services] == list(services)
        taken = named(plan, "b").memory["gpu0"].total_mib
        assert named(plan).memory["gpu0"].total_mib <= 24064 - taken
        assert named(plan, "b").gpus


def test_two_vllm_on_one_gpu_share_it_and_start_one_after_the_other(lab: Lab):
    """Each measures what is free while it starts, so that two at once would count each other's."""
    services = {name: f"model: qwen2.5-7b-awq, port: {port}" for name, port in (("a", 1), ("b", 2))}
    plan = lab.plan(RTX, **services)
    assert plan.fits
    assert plan.planned_mib("gpu0") <= 24064
    assert named(plan).after == ()
    assert named(plan, "b").after == ("labdeploy-a.service",)


def test_a_model_larger_than_ram_is_split_where_the_gpu_holds_the_rest(lab: Lab):
    """40 GiB of weights on 24 GiB of VRAM and 20.5 GiB of RAM: only some splits fit both, and one is found."""
    for ram in ("20.5GiB", "22GiB", "24GiB", "32GiB"):
        plan = lab.plan(gpu("24GiB", ram=ram), a="runner: llama-server, model: llama3-70b, port: 1")
        assert plan.fits, ram
        assert value(plan, "gpu_layers") == 45


# --- which runner -------------------------------------------------------------------------------------------------


def test_the_plan_says_why_this_runner(lab: Lab):
    """`runner: auto` picks one and says why, to people and in JSON; so does a runner that is written."""
    found = lab.plan(
        "cpu: {cores: 8}, ram: 64GiB", a="model: qwen3-8b, port: 1", b="runner: ollama, model: qwen3-8b, port: 2"
    )
    reported = planning.to_json(found)["services"]
    assert reported["a"]["runner_why"].startswith("for a service")
    assert reported["b"]["runner_why"] == "as the inventory says"
    assert "llama-server (for a service: one model" in " ".join(report.plan_text(found).split())


@pytest.mark.parametrize(
    ("keys", "runner", "why"),
    [
        ("model: qwen3-8b", "llama-server", "for a service"),
        ("model: qwen3-8b, purpose: service", "llama-server", "for a service"),
        ("model: qwen3-8b, purpose: experiment", "ollama", "for an experiment"),
        ("model: qwen3-8b, purpose: throughput", "llama-server", "does not load GGUF"),
        ("model: qwen2.5-7b-awq", "vllm", "only vLLM serves"),
        ("model: qwen2.5-7b-awq, purpose: throughput", "vllm", "only vLLM serves"),
        ("model: qwen2.5-7b-awq, purpose: experiment", "vllm", "only vLLM serves"),
        ("model: qwen3-8b, runner: ollama, purpose: throughput", "ollama", "as the inventory says"),
    ],
)
def test_auto_picks_a_runner_and_says_why(lab: Lab, keys: str, runner: str, why: str):
    """By what the model is, then by what it is for; a runner that is written is never overruled."""
    inventory = lab.host(RTX, a=f"{keys}, port: 8080")
    plan = lab.plans(inventory)["h"]
    assert named(plan).runner == runner
    service = inventory.host("h").services["a"]
    from labdeploy.models.book import ModelBook  # noqa: PLC0415

    book = ModelBook(inventory, lab.lock())
    assert why in planning.choose_runner(service, book.facts(service.model, "/srv"))[1]


@pytest.mark.parametrize(
    "keys",
    [
        "runner: llama-server, model: qwen2.5-7b-awq",
        "runner: vllm, model: qwen3-8b",
        "runner: ollama, model: qwen2.5-7b-awq",
        "runner: ollama, model: qwen3-8b, flags: [--x]",
        "runner: ollama, model: qwen3-8b, api_key_file: /etc/key",
    ],
)
def test_what_a_runner_cannot_do_names_host_and_service(lab: Lab, keys: str):
    """As every error does: `error: HOST: SERVICE: what`."""
    lab.copy_lock()
    lab.host(RTX, a=f"{keys}, port: 8080")
    ran = lab.run("plan")
    assert ran.code == 2
    assert ran.err.startswith("error: h: a: ")
    assert "\n\nhint: " in ran.err


def test_every_setting_says_why(lab: Lab):
    """`plan` explains each number; a number without a reason helps nobody."""
    for hardware, services in MACHINES.values():
        for service in lab.plan(hardware, **services).services:
            assert all(choice.why for choice in service.settings.values())
            assert not any("%" in choice.why or "\n" in choice.why for choice in service.settings.values())


def test_text_fits_a_terminal(lab: Lab):
    """80 columns, and true and false as people write them."""
    lab.copy_lock()
    lab.host(RTX, a="model: qwen3-30b, port: 8080", b="model: qwen2.5-7b-awq, port: 8081")
    out = lab.run("plan").out
    assert "True" not in out
    assert "False" not in out
    assert max(map(len, out.splitlines())) < 80


def test_a_gpu_without_memory_is_refused(lab: Lab):
    """A zero is a mistake; shares of it cannot be computed. A tiny one only holds nothing."""
    problems = lab.problems(f"hosts: {{h: {{hardware: {{{gpu('0GiB')}}}}}}}")
    assert "'0GiB' is no memory at all" in problems[0]
    for runner, model in (("llama-server", "qwen3-4b"), ("ollama", "qwen3-4b"), ("vllm", "qwen2.5-7b-awq")):
        plan = lab.plan(gpu("1MiB"), a=f"runner: {runner}, model: {model}, port: 1")
        assert plan.planned_mib("gpu0") == 0 or not plan.fits


# --- several services on one host ---------------------------------------------------------------------------------

BIG_AND_SMALL = "cpu: {cores: 8}, ram: 64GiB, gpus: [{name: RTX 3090, vram: 24GiB}, {name: RTX 3060, vram: 12GiB}]"
TRIO = {
    "small": "runner: llama-server, model: qwen3-4b, port: 1",
    "large": "runner: llama-server, model: qwen3-30b, port: 2",
    "middle": "runner: ollama, model: qwen3-8b, port: 3, context_length: 4096",
}


@pytest.mark.parametrize("names", list(itertools.permutations(TRIO)))
def test_the_order_of_the_inventory_decides_nothing(lab: Lab, names: tuple[str, ...]):
    """Whatever stands first, the large model has the large card to itself and all three are wholly on GPUs."""
    plan = lab.plan(BIG_AND_SMALL, **{name: TRIO[name] for name in names})
    assert plan.fits
    assert [each.name for each in plan.services] == list(names)
    assert not any(service.computes_on_cpu for service in plan.services)
    assert [gpu.id for gpu in named(plan, "large").gpus] == ["gpu0"]
    first = lab.plan(BIG_AND_SMALL, **TRIO)
    assert planning.to_json(plan)["services"] == {name: planning.to_json(first)["services"][name] for name in names}


def test_all_fit_where_they_can_in_any_order(lab: Lab):
    """30B needs the card that 4B would take first; with both pinned to nothing, nobody is put on the CPU."""
    hardware = "cpu: {cores: 8}, ram: 24GiB, gpus: [{name: RTX 3090, vram: 24GiB}, {name: GTX 1660, vram: 6GiB}]"
    for order in (("a", "b"), ("b", "a")):
        keys = {
            "a": "runner: llama-server, model: qwen3-4b, port: 1, ctx_size: 8192",
            "b": "runner: llama-server, model: qwen3-30b, port: 2, ctx_size: 16384",
        }
        plan = lab.plan(hardware, **{name: keys[name] for name in order})
        assert plan.fits
        assert [gpu.id for gpu in named(plan, "a").gpus] == ["gpu1"]
        assert [gpu.id for gpu in named(plan, "b").gpus] == ["gpu0"]


def test_who_measures_a_gpu_starts_after_the_others_on_it(lab: Lab):
    """First the fixed service, then Ollama, then vLLM, though the inventory names them the other way round."""
    services = {
        "v": "model: qwen2.5-7b-awq, port: 1",
        "o": "runner: ollama, model: qwen3-4b, port: 2, context_length: 4096",
        "l": "runner: llama-server, model: qwen3-4b, port: 3, ctx_size: 4096",
    }
    plan = lab.plan(RTX, **services)
    assert plan.fits
    assert [service.name for service in plan.start_order] == ["l", "o", "v"]
    assert named(plan, "l").after == ()
    assert named(plan, "o").after == ("labdeploy-l.service",)
    assert named(plan, "v").after == ("labdeploy-l.service", "labdeploy-o.service")


def test_cores_go_to_those_who_compute_on_them(lab: Lab):
    """A service wholly on the GPU feeds it with four threads; the one on the CPU has the others."""
    plan = lab.plan(
        gpu("24GiB", cores=16),
        a="runner: llama-server, model: qwen3-8b, port: 1",
        b="runner: llama-server, model: qwen3-4b, port: 2, gpus: []",
    )
    assert (value(plan, "threads", "a"), value(plan, "threads", "b")) == (4, 12)
    asked = lab.plan(
        "cpu: {cores: 16}, ram: 64GiB",
        a="runner: llama-server, model: qwen3-8b, port: 1, threads: 10",
        b="runner: llama-server, model: qwen3-4b, port: 2",
    )
    assert (value(asked, "threads", "a"), value(asked, "threads", "b")) == (10, 6)


# --- what would make it fit ---------------------------------------------------------------------------------------


def test_three_ways_to_fit_least_loss_first(lab: Lab):
    """A slower prompt, then a cache of half the precision, then less context."""
    keys = "runner: llama-server, model: qwen3-8b, gpu_layers: 37, ctx_size: 28672, port: 1"
    ways = named(lab.plan(gpu("9GiB"), a=keys)).ways_to_fit
    assert len(ways) == 3
    assert ways[0] == "cache_type_k: q8_0, cache_type_v: q8_0"
    assert ways[1].startswith("ctx_size: ")
    assert ways[2].startswith("gpu_layers: ")
    preferred = named(lab.plan(gpu("9GiB"), a=f"{keys}, prefer: context")).ways_to_fit
    assert [way.split(":")[0] for way in preferred[1:3]] == ["gpu_layers", "ctx_size"]


def test_a_model_that_fits_nowhere_is_answered_with_one_that_does(lab: Lab):
    """The largest of the inventory that fits, as the line to write; in the text, in JSON and in the error."""
    lab.copy_lock()
    lab.host(gpu("8GiB", ram="16GiB"), a="runner: llama-server, model: llama3-70b, port: 1")
    ran = lab.run("plan")
    assert ran.code == 3
    assert "would fit with: model: qwen3-30b" in ran.out
    assert "hint: hosts.h.services.a: `model: qwen3-30b`" in ran.err
    assert lab.plan(gpu("8GiB", ram="16GiB"), a="runner: llama-server, model: qwen3-30b, port: 1").fits


def test_a_way_to_fit_takes_no_other_service_its_place(lab: Lab):
    """What is offered was planned with the others of the host: written, all of them fit."""
    keys = {
        "a": "runner: llama-server, model: qwen3-8b, gpu_layers: 37, ctx_size: 40960, port: 1",
        "b": "runner: llama-server, model: qwen3-4b, gpu_layers: 37, ctx_size: 32768, port: 2",
    }
    plan = lab.plan(gpu("16GiB"), **keys)
    broken = [service for service in plan.services if not service.fits]
    assert broken
    for service in broken:
        assert service.ways_to_fit
        for way in service.ways_to_fit:
            changed = dict(pair.split(": ") for pair in (keys[service.name] + ", " + way).split(", "))
            written = {**keys, service.name: ", ".join(f"{key}: {to}" for key, to in changed.items())}
            assert lab.plan(gpu("16GiB"), **written).fits, way


def test_a_preference_without_effect_is_told(lab: Lab):
    """Layers are nothing that vLLM could give up; the others can."""
    vllm = lab.plan(RTX, a="model: qwen2.5-7b-awq, port: 1, prefer: context")
    assert any("prefer changes nothing" in text for text in named(vllm).warnings)
    other = lab.plan(RTX, a="model: qwen3-8b, port: 1, prefer: context")
    assert not any("prefer" in text for text in named(other).warnings)


@pytest.mark.parametrize(
    ("hardware", "services", "broken"),
    [
        (
            gpu("9GiB"),
            {"a": "model: qwen3-8b, ctx_size: 40960, gpu_layers: 37", "b": "model: qwen3-4b, gpus: []"},
            ["a"],
        ),
        ("cpu: {cores: 8}, ram: 8GiB", {"a": "model: qwen3-8b, ctx_size: 40960", "b": "model: qwen3-4b"}, ["a"]),
    ],
)
def test_what_does_not_fit_alone_does_not_fit_beside_others(
    lab: Lab, hardware: str, services: dict[str, str], broken: list[str]
):
    """A share that was left for a service is never more than what is free: the plan would promise too much.

    And one that will not run takes nothing that the other needs.
    """
    ports = {name: f"runner: llama-server, port: {8080 + i}, {keys}" for i, (name, keys) in enumerate(services.items())}
    plan = lab.plan(hardware, **ports)
    assert [each.name for each in plan.services if not each.fits] == broken
    assert not re.search(r"-\d+ MiB are free", " ".join(text for each in plan.services for text in each.shortfall))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("flash_attn: off, cache_type_v: q8_0", "cache_type_v: q8_0 needs flash attention, which is off"),
        ("cache_type_k: q4_0, cache_type_v: q8_0, flash_attn: off", "cache_type_v: q8_0 needs flash attention"),
    ],
)
def test_types_of_the_cache_that_end_llama_server_are_refused(lab: Lab, keys: str, said: str):
    """They would end it at its start; and no hint offers them."""
    lab.copy_lock()
    lab.host(RTX, a=f"runner: llama-server, model: qwen3-8b, port: 8080, {keys}")
    ran = lab.run("plan")
    assert ran.code == 2
    assert ran.err.startswith(f"error: h: a: {said}")
    tight = "ctx_size: 40960, gpu_layers: 37, ubatch_size: 32"
    lab.host(gpu("9GiB"), a=f"runner: llama-server, model: qwen3-8b, port: 8080, flash_attn: off, {tight}")
    ran = lab.run("plan")
    assert ran.code == 3
    assert "q8_0" not in ran.err


def test_what_cannot_be_served_is_told_of_all_services_at_once(lab: Lab):
    """Of all hosts too, and whether it shows when a service is looked up or when it is planned; each once."""
    lab.copy_lock()
    wrong = "runner: llama-server, flash_attn: off, cache_type_v: q8_0, model: qwen3-8b, port"
    snapshot = "runner: llama-server, model: qwen2.5-7b-awq, port"
    fine = "model: qwen3-8b, port"
    hosts = {"g": {"a": f"{wrong}: 1", "b": f"{wrong}: 2"}, "h": {"c": f"{snapshot}: 1", "d": f"{fine}: 2"}}
    services = {host: ", ".join(f"{name}: {{{keys}}}" for name, keys in found.items()) for host, found in hosts.items()}
    written = ", ".join(f"{host}: {{hardware: {{{RTX}}}, services: {{{found}}}}}" for host, found in services.items())
    lab.write(f"hosts: {{{written}}}\n{MODELS}")
    ran = lab.run("plan")
    assert ran.code == 2
    said = "cache_type_v: q8_0 needs flash attention, which is off"
    assert ran.err.splitlines()[:2] == [f"error: g: a: {said}", f"error: g: b: {said}"]
    assert ran.err.splitlines()[2].startswith("error: h: c: ")
    assert ran.err.count("error: ") == 3


def test_the_whole_context_of_sliding_layers(lab: Lab):
    """Fewer tokens fit, but no checkpoint is needed to go back; where it is too much, the window is offered."""
    keys = "runner: llama-server, model: gemma3-27b, port: 8080"
    window, full = (named(lab.plan(RTX, a=f"{keys}, ctx_size: 8192{more}")) for more in ("", ", swa_full: true"))
    assert "--swa-full" in full.argv
    assert "--swa-full" not in window.argv
    assert full.memory["gpu0"].context_mib > 2 * window.memory["gpu0"].context_mib
    assert [each.settings["ctx_checkpoints"].value for each in (window, full)] == [8, 0]
    big = named(lab.plan(RTX, a=f"{keys}, ctx_size: 65536, gpu_layers: all, swa_full: true"))
    assert "swa_full: false" in big.ways_to_fit
    qwen = named(lab.plan(RTX, a="runner: llama-server, model: qwen3-8b, port: 8080, swa_full: true"))
    assert qwen.fits


def test_flags_that_the_plan_does_not_count_are_told(lab: Lab):
    """They go to llama-server as they are; a flag that takes no memory is nobody's business."""
    keys = "runner: llama-server, model: qwen3-8b, port: 8080"
    moved = named(lab.plan(RTX, a=f"{keys}, flags: [--split_mode, row, --lora=a.gguf, --jinja]"))
    assert "flags: --split_mode --lora=a.gguf moves or takes memory that this plan does not count" in moved.warnings
    plain = named(lab.plan(RTX, a=f"{keys}, flags: [--jinja]"))
    assert not any("does not count" in text for text in plain.warnings)


def test_words_that_the_runners_take_for_numbers(lab: Lab):
    """`auto` is as if nothing were written, `all` is the number of layers."""
    base = "runner: llama-server, model: qwen3-8b, port: 8080"
    plain = named(lab.plan(RTX, a=base))
    auto = named(lab.plan(RTX, a=f"{base}, gpu_layers: auto, flash_attn: auto"))
    assert (auto.settings, auto.argv) == (plain.settings, plain.argv)
    every = named(lab.plan(RTX, a=f"{base}, gpu_layers: all"))
    assert (every.settings["gpu_layers"].value, every.settings["gpu_layers"].why) == (37, "as the inventory says")
    assert "gpu_layers 37 needs a GPU" in named(lab.plan(CPU, a=f"{base}, gpu_layers: all")).shortfall[0]
    awq = "runner: vllm, model: qwen2.5-7b-awq, port: 8080"
    chosen = [named(lab.plan(RTX, a=f"{awq}{more}")).argv for more in ("", ", dtype: auto, max_model_len: auto")]
    assert chosen[0] == chosen[1]


def test_a_key_without_a_value_is_as_one_that_is_not_there(lab: Lab):
    """As it is everywhere else in an inventory, and as the JSON Schema says."""
    empty = lab.plan(RTX, a="model: qwen3-8b, port: 8080, runner: llama-server, bind: , ctx_size: null")
    plain = lab.plan(RTX, a="model: qwen3-8b, port: 8080, runner: llama-server")
    assert planning.to_json(empty) == planning.to_json(plain)
    assert lab.problems(f"hosts: {{h: {{services: {{a: {{model: , port: null}}}}}}}}\n{MODELS}") == [
        "1: hosts.h.services.a: model is missing: a name under models",
        "1: hosts.h.services.a: port is missing: TCP port to serve on",
    ]
