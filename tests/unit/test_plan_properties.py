"""What holds for every plan, tried on hosts and settings that nobody thought of.

Models have the shapes of published ones, from gguf_maker. LABDEPLOY_EXAMPLES=2000 tries more than the usual number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import TYPE_CHECKING, Any

import gguf_maker
from conftest import Lab
from hypothesis import HealthCheck, Phase, assume, given, reject, settings
from hypothesis import strategies as st

from labdeploy import plan as planning
from labdeploy import render
from labdeploy.hardware import Cpu, Gpu, Hardware, Reserve
from labdeploy.inventory import Host, Inventory, Model, Service, default_unit
from labdeploy.models.book import ModelBook
from labdeploy.models.gguf import to_lock
from labdeploy.runners import RUNNERS, llama_server
from labdeploy.runners.llama_server import LlamaServerSettings
from labdeploy.runners.ollama import OllamaSettings
from labdeploy.runners.vllm import VllmSettings
from labdeploy.schema import Mib, read_line

if TYPE_CHECKING:
    from labdeploy.plan import HostPlan
    from labdeploy.runners.base import ServicePlan

EXAMPLES = int(os.environ.get("LABDEPLOY_EXAMPLES", "4"))
# Without making examples smaller: a plan of three GPUs takes a second, and that would take hours.
tried = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate],
)
GGUFS = [
    *("llama-3.1-8b", "llama-3-70b", "qwen3-4b", "qwen3-30b-a3b", "gemma3-27b", "gpt-oss-20b", "deepseek-v2-lite"),
    *("qwen3-next-80b", "mamba2-7b", "lfm2-1.2b", "granite-4-h-tiny", "falcon-h1-1.5b", "nemotron-h-8b"),
]
AWQ = "qwen2.5-7b-awq"


@functools.cache
def book() -> ModelBook:
    """Give every model by its name, as if an inventory named them all."""
    models = {name: Model(f"{name}.gguf") for name in (*GGUFS, AWQ)}
    entries = {name: to_lock(gguf_maker.MODELS[name]().header()) for name in GGUFS}
    entries[AWQ] = Lab.lock()["models"][AWQ]  # type: ignore[index]
    return ModelBook(Inventory(hosts={}, models=models), {"models": entries})


def host(vrams: list[int], ram: int, *services: Service, cores: int = 8) -> Host:
    """Give a host with these GPUs, main memory and services, all filled in as a read inventory has it."""
    named = {f"s{i}": dataclasses.replace(s, name=f"s{i}", unit=default_unit(f"s{i}")) for i, s in enumerate(services)}
    return Host(
        Hardware(Cpu(cores), Mib(ram), tuple(Gpu("RTX 3090", Mib(n), compute_capability="8.6") for n in vrams)),
        address="h",
        reserve=Reserve(Mib(1024), Mib(512)),
        models_dir="/srv/models",
        runners={name: runner.default_binary for name, runner in RUNNERS.items()},
        services=named,
        name="h",
    )


def llama(model: str, prefer: Any = None, port: int = 8080, **keys: Any) -> Service:  # noqa: ANN401
    """Give a llama-server service, of settings with which it would start at all."""
    settings, shape = LlamaServerSettings(**keys), book().facts(model, "").shape
    if any(llama_server._wrong_cache_types(settings, shape)):
        reject()
    return Service(model, port, runner="llama-server", prefer=prefer, settings=settings)


def plan(host: Host) -> HostPlan:
    """Plan a host."""
    return planning.plan_host(host, book())


def alone(vrams: list[int], ram: int, service: Service) -> ServicePlan:
    """Plan one service that has a host to itself."""
    return plan(host(vrams, ram, service)).services[0]


def placed(service: ServicePlan) -> tuple[int, int]:
    """Count layers on GPUs, and tokens of context."""
    layers = service.settings["gpu_layers"].value if service.gpus else 0
    return layers, service.settings["ctx_size"].value


models = st.sampled_from(GGUFS)
prefers = st.sampled_from(["speed", "context"])
vram = st.integers(600, 100 * 1024)
gpus = st.lists(vram, max_size=3)
rams = st.integers(2 * 1024, 256 * 1024)
asked = st.fixed_dictionaries(
    {},
    optional={
        "ctx_size": st.sampled_from([512, 4096, 30_000, 131_072]),
        "parallel": st.sampled_from([1, 2, 4]),
        "kv_unified": st.booleans(),
        "gpu_layers": st.integers(0, 90),
        "n_cpu_moe": st.integers(0, 60),
        "batch_size": st.sampled_from([512, 4096]),
        "ubatch_size": st.sampled_from([64, 2048]),
        "cache_type_k": st.sampled_from(["f16", "q8_0"]),
        "cache_type_v": st.sampled_from(["f16", "q8_0"]),
        "flash_attn": st.sampled_from(["on", "off"]),
        "cache_ram": st.sampled_from([0, 256, 16_384]),
        "ctx_checkpoints": st.integers(0, 4),
        "threads": st.integers(1, 16),
        "load_mode": st.sampled_from(["none", "mmap"]),
    },
)


@st.composite
def services(draw: st.DrawFn) -> list[Service]:
    """Give one to three services of any runner."""
    found = []
    for i in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["llama-server", "llama-server", "ollama", "vllm"]))
        if kind == "llama-server":
            optional = {"ctx_size": st.sampled_from([2048, 16_384, 131_072]), "gpu_layers": st.integers(0, 90)}
            keys = draw(st.fixed_dictionaries({}, optional=optional))
            found.append(llama(draw(models), draw(prefers), 8080 + i, **keys))
        elif kind == "ollama":
            found.append(Service(draw(models), 8080 + i, runner="ollama", settings=OllamaSettings()))
        else:
            found.append(Service(AWQ, 8080 + i, runner="vllm", settings=VllmSettings()))
    return found


# --- more is never worse ------------------------------------------------------------------------------------------


@tried
@given(models, prefers, st.lists(vram, min_size=1, max_size=3), rams, st.integers(1, 32 * 1024), st.data())
def test_more_vram_never_gives_fewer_layers_or_less_context(
    model: str, prefer: str, vrams: list[int], ram: int, more: int, data: st.DataObject
):
    """On any GPU of a host: neither goes down; layers and experts go only for context that is preferred."""
    which = data.draw(st.integers(0, len(vrams) - 1))
    larger = [n + (more if i == which else 0) for i, n in enumerate(vrams)]
    before = alone(vrams, ram, llama(model, prefer))
    after = alone(larger, ram, llama(model, prefer))
    assume(before.fits)
    assert after.fits
    assume(before.settings["cache_type_k"].value == after.settings["cache_type_k"].value)
    assert placed(before)[1] <= placed(after)[1]
    assume(prefer == "speed" or placed(before)[1] == placed(after)[1])
    assert placed(before)[0] <= placed(after)[0]
    if before.gpus and after.gpus and "n_cpu_moe" in before.settings and placed(before)[0] == placed(after)[0]:
        assert before.settings["n_cpu_moe"].value >= after.settings["n_cpu_moe"].value


@tried
@given(models, prefers, gpus, rams, st.integers(1, 64 * 1024))
def test_more_ram_never_makes_it_fit_worse(model: str, prefer: str, vrams: list[int], ram: int, more: int):
    """What fits goes on fitting, with as many layers and as much context."""
    before = alone(vrams, ram, llama(model, prefer))
    after = alone(vrams, ram + more, llama(model, prefer))
    assume(before.fits)
    assert after.fits
    assume(before.settings["cache_type_k"].value == after.settings["cache_type_k"].value)
    if prefer == "speed":
        assert placed(before)[0] <= placed(after)[0]
    assert placed(before)[1] <= placed(after)[1]


@tried
@given(services(), gpus, rams, st.integers(1, 64 * 1024))
def test_more_ram_never_makes_a_shared_host_fit_worse(shared: list[Service], vrams: list[int], ram: int, more: int):
    """Of several services as many fit as before."""
    before, after = plan(host(vrams, ram, *shared)), plan(host(vrams, ram + more, *shared))
    assert sum(s.fits for s in before.services) <= sum(s.fits for s in after.services)


# --- nothing is promised that is not there ------------------------------------------------------------------------


@tried
@given(services(), gpus, rams)
def test_what_fits_is_within_every_device(shared: list[Service], vrams: list[int], ram: int):
    """The sum over services, device by device; and the threads are no more than the cores."""
    found = plan(host(vrams, ram, *shared))
    assume(found.fits)
    for i in range(len(vrams)):
        assert found.planned_mib(f"gpu{i}") <= found.vram_usable_mib(i) + 1
    assert found.planned_mib("host") <= found.ram_usable_mib + 1
    assert sum(s.settings["threads"].value for s in found.services if "threads" in s.settings) <= 8


@tried
@given(models, asked, gpus, rams)
def test_what_the_inventory_says_wins(model: str, keys: dict[str, Any], vrams: list[int], ram: int):
    """Whether it fits or not; and a plan that fits with it holds it."""
    service = alone(vrams, ram, llama(model, **keys))
    for key, value in keys.items():
        if key in service.settings:
            assert service.settings[key].value == value
            assert service.settings[key].why == "as the inventory says"
    if service.fits:
        assert all(service.memory[gpu.id].total_mib <= gpu.free_mib for gpu in service.gpus)
        assert service.memory["host"].total_mib <= ram - 1024


@tried
@given(models, asked, gpus, rams)
def test_every_way_to_fit_fits(model: str, keys: dict[str, Any], vrams: list[int], ram: int):
    """Each line that is offered, written into the inventory, gives a plan that fits."""
    asked_for = llama(model, **keys)
    broken = alone(vrams, ram, asked_for)
    assume(not broken.fits)
    assert len(broken.ways_to_fit) <= 3
    for way in broken.ways_to_fit:
        if way.startswith("model: "):
            changed = dataclasses.replace(asked_for, model=way.removeprefix("model: "))
        else:
            changed_keys = keys | read_line(LlamaServerSettings, way)
            changed = dataclasses.replace(asked_for, settings=LlamaServerSettings(**changed_keys))
        assert alone(vrams, ram, changed).fits, way


# --- the same again -----------------------------------------------------------------------------------------------


@tried
@given(services(), gpus, rams)
def test_the_same_again_is_the_same(shared: list[Service], vrams: list[int], ram: int):
    """Planned and rendered twice, with nothing remembered in between: the same bytes, and JSON without surprises."""
    trees = []
    for _ in range(2):
        llama_server._tune.cache_clear()
        found = plan(host(vrams, ram, *shared))
        trees.append(render.render_host(found, render.environment()))
        json.dumps(planning.to_json(found), allow_nan=False)
    assert trees[0] == trees[1]
