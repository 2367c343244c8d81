"""Layouts of GGUF models: what is given up first, which GPUs, how a model is split over unequal ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from labdeploy.runners import llama_server
from labdeploy.runners.llama_tuning import _Costs, _deal, _Search

if TYPE_CHECKING:
    from conftest import Lab

    from labdeploy.runners.base import ServicePlan


def machine(*vram: str, ram: str = "64GiB") -> str:
    """Write a machine with these NVIDIA GPUs."""
    cards = ", ".join(f"{{name: RTX 3090, vram: {each}}}" for each in vram)
    return f"cpu: {{cores: 8}}, ram: {ram}, gpus: [{cards}]"


def planned(lab: Lab, hardware: str, keys: str) -> ServicePlan:
    """Plan one llama-server service."""
    return lab.plan(hardware, a=f"runner: llama-server, port: 1, {keys}").services[0]


def chosen(service: ServicePlan, *keys: str) -> tuple[object, ...]:
    """Give settings of a service."""
    return tuple(service.settings[key].value for key in keys)


def test_speed_keeps_layers_and_context_keeps_context(lab: Lab):
    """On 8 GiB an 8B model has all layers with a shorter context, or the whole context with fewer layers."""
    speed = planned(lab, machine("8GiB"), "model: qwen3-8b")
    assert chosen(speed, "prefer", "gpu_layers") == ("speed", 37)
    assert 4096 <= chosen(speed, "ctx_size")[0] < 40960
    context = planned(lab, machine("8GiB"), "model: qwen3-8b, prefer: context")
    assert chosen(context, "prefer", "ctx_size") == ("context", 40960)
    assert 10 < chosen(context, "gpu_layers")[0] < 37
    assert "as the inventory says" in context.settings["prefer"].why


@pytest.mark.parametrize(
    ("vram", "ram", "keys"),
    [
        (("3GiB", "2GiB"), "12GiB", "model: qwen3-8b"),
        (("2GiB",), "3GiB", "model: qwen3-8b, ctx_size: 32768"),
        (("2GiB", "1GiB"), "2GiB", "model: qwen3-4b, gpu_layers: 37"),
        (("6GiB",), "16GiB", "model: qwen3-30b"),
        (("4GiB",), "6GiB", "model: qwen3-30b, gpu_layers: 49, n_cpu_moe: 48"),
        (("4GiB", "2GiB"), "9GiB", "model: qwen3-8b, prefer: context, tensor_split: [3, 1]"),
    ],
)
def test_what_is_left_out_as_too_big_would_not_have_been_taken(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, vram: tuple[str, ...], ram: str, keys: str
):
    """The search passes over layouts by cheap bounds; a search that computes every one finds the same."""
    quick = planned(lab, machine(*vram, ram=ram), keys)
    monkeypatch.setattr(_Search, "surely_too_big", lambda *_: False)
    monkeypatch.setattr(_Search, "_least_missing_mib", lambda *_: 0.0)
    monkeypatch.setattr(_Costs, "left_mib", lambda *_: 0.0)
    for cached in (llama_server._fitting, llama_server._tune):
        cached.cache_clear()
    whole = planned(lab, machine(*vram, ram=ram), keys)
    assert (quick.settings, quick.memory, quick.shortfall) == (whole.settings, whole.memory, whole.shortfall)
    assert quick.ways_to_fit == whole.ways_to_fit


def test_experts_leave_the_gpu_before_layers_do(lab: Lab):
    """A token reads 8 of 128 experts, but all of the attention."""
    service = planned(lab, machine("8GiB"), "model: qwen3-30b")
    assert chosen(service, "gpu_layers") == (49,)
    assert 20 < chosen(service, "n_cpu_moe")[0] < 48
    assert "8 of 128" in service.settings["n_cpu_moe"].why


def test_a_mixture_gets_the_context_that_one_block_of_experts_costs(lab: Lab):
    """324 MiB of experts of one block hold some 3000 tokens; with them in RAM there are 7168."""
    service = planned(lab, machine("8GiB"), "model: qwen3-30b")
    assert chosen(service, "ctx_size") == (7168,)
    one_less = chosen(service, "n_cpu_moe")[0] - 1
    denser = planned(lab, machine("8GiB"), f"model: qwen3-30b, n_cpu_moe: {one_less}, ctx_size: 7168, gpu_layers: 49")
    assert not denser.fits


def test_experts_are_read_less_than_attention_even_with_little_vram(lab: Lab):
    """Where not even all attention fits, layers come without experts."""
    service = planned(lab, machine("2304MiB"), "model: qwen3-30b, ctx_size: 16384")
    layers, experts = chosen(service, "gpu_layers", "n_cpu_moe")
    assert 0 < layers < 49
    assert experts == 48, layers


# --- several GPUs -------------------------------------------------------------------------------------------------


def test_unequal_gpus_get_what_they_hold(lab: Lab):
    """A split counts layers, and every GPU holds its part; by free memory alone gpu1 would be too full."""
    service = planned(lab, machine("24GiB", "12GiB", "16GiB"), "model: llama3-70b")
    assert service.fits
    split = chosen(service, "tensor_split")[0]
    assert sum(split) == chosen(service, "gpu_layers")[0] == 81
    frees = {gpu.id: gpu.free_mib for gpu in service.gpus}
    assert all(service.memory[name].total_mib <= free for name, free in frees.items())
    parts = [service.memory[name].total_mib / free for name, free in frees.items()]
    assert max(parts) - min(parts) < 0.08


def test_few_gpus_are_taken_where_they_are_enough(lab: Lab):
    """Of three cards the two that hold all of it; the third stays free."""
    service = planned(lab, machine("24GiB", "8GiB", "16GiB"), "model: gemma3-27b")
    assert [gpu.id for gpu in service.gpus] == ["gpu0", "gpu2"]
    assert chosen(service, "ctx_size", "gpus") == (131072, (0, 2))


def test_a_split_as_asked_wins(lab: Lab):
    """Also where it wastes a GPU; as many layers as fit with it."""
    service = planned(lab, machine("24GiB", "24GiB"), "model: llama3-70b, tensor_split: [3, 1]")
    assert chosen(service, "tensor_split") == ((3, 1),)
    assert service.fits
    assert chosen(service, "gpu_layers")[0] < 81


@pytest.mark.parametrize(
    ("units", "rooms", "dealt"),
    [
        ([1.0] * 10, [100.0, 100.0], (5.0, 5.0)),
        ([1.0] * 9, [200.0, 100.0], (6.0, 3.0)),
        ([1.0] * 8 + [4.0], [10.0, 10.0], (6.0, 3.0)),
        ([1.0], [1.0, 1.0], (1.0, 0.0)),
        ([5.0, 5.0], [1.0, 1.0], (1.0, 1.0)),
        ([2.0, 2.0, 2.0], [-50.0, 6.0], (0.0, 3.0)),
    ],
)
def test_layers_are_dealt_evenly(units: list[float], rooms: list[float], dealt: tuple[float, ...]):
    """Each GPU is filled to the same part; the output layer, the heaviest, is the last one's."""
    assert _deal(units, rooms) == dealt


# --- the KV cache -------------------------------------------------------------------------------------------------


def test_the_cache_is_exact_while_anything_fits(lab: Lab):
    """q8_0 comes last, where f16 fits nowhere and the inventory asks for nothing that makes it large; it is said."""
    needs = planned(lab, "cpu: {cores: 8}, ram: 64GiB", "model: qwen3-8b, ctx_size: 4096, cache_ram: 0MiB")
    f16, q8_0 = 576, 306
    least = needs.memory["host"].total_mib
    for short_mib, kind in ((-8, "f16"), (f16 - q8_0 - 16, "q8_0")):
        ram = f"{int(least - short_mib) + 1024}MiB"
        service = planned(lab, f"cpu: {{cores: 8}}, ram: {ram}", "model: qwen3-8b")
        assert service.fits
        assert chosen(service, "cache_type_k", "cache_type_v") == (kind, kind)
        assert any("q8_0" in text for text in service.warnings) == (kind == "q8_0")
    pinned = planned(lab, f"cpu: {{cores: 8}}, ram: {int(least - 200) + 1024}MiB", "model: qwen3-8b, ctx_size: 4096")
    assert not pinned.fits
    assert "cache_type_k: q8_0, cache_type_v: q8_0" in pinned.ways_to_fit


def test_cache_types_without_kernels_are_warned_of(lab: Lab):
    """A default CUDA build has none for unequal types, and moves attention to the CPU in silence."""
    service = planned(lab, machine("24GiB"), "model: qwen3-8b, cache_type_k: q8_0")
    assert any("q8_0 and f16" in text for text in service.warnings)
    same = planned(lab, machine("24GiB"), "model: qwen3-8b, cache_type_k: q8_0, cache_type_v: q8_0")
    assert not any("kernels" in text for text in same.warnings)
