"""Ollama: what is chosen for it, what its environment says, and what is refused."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest

from labdeploy.errors import InventoryError
from labdeploy.hardware import Gpu
from labdeploy.models.gguf import GgufHeader, Tensor
from labdeploy.models.model import ModelFacts
from labdeploy.models.shape import ModelShape, model_shape
from labdeploy.runners.base import Budget, GpuBudget, Request, ServicePlan
from labdeploy.runners.ollama import RUNNER, OllamaSettings
from labdeploy.runners.ollama_env import OWNED_ENV
from labdeploy.schema import Mib


def llama(n_layer: int = 32, arch: str = "llama") -> ModelShape:
    """Describe Llama-3.1-8B in Q4_K: 4.4 GiB, 8 KV heads of 128, trained for 131072 tokens."""
    per_layer = {
        "attn_q": (4096, 4096),
        "attn_k": (4096, 1024),
        "attn_v": (4096, 1024),
        "attn_output": (4096, 4096),
        "ffn_gate": (4096, 14336),
        "ffn_up": (4096, 14336),
        "ffn_down": (14336, 4096),
    }
    ends = [Tensor("token_embd.weight", (4096, 128_256), "Q4_K"), Tensor("output.weight", (4096, 128_256), "Q6_K")]
    blocks = [
        Tensor(f"blk.{il}.{part}.weight", shape, "Q4_K") for il in range(n_layer) for part, shape in per_layer.items()
    ]
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": n_layer,
        f"{arch}.context_length": 131_072,
        f"{arch}.embedding_length": 4096,
        f"{arch}.feed_forward_length": 14336,
        f"{arch}.attention.head_count": 32,
        f"{arch}.attention.head_count_kv": 8,
    }
    tensors = (*ends, *blocks)
    lengths = {"tokenizer.ggml.tokens": 128_256}
    return model_shape(GgufHeader(metadata, lengths, tensors, sum(tensor.n_bytes for tensor in tensors)))


LLAMA_8B = llama()


def gpu(index: int = 0, vram_mib: int = 24576, **about: Any) -> GpuBudget:  # noqa: ANN401
    """Give a GPU of which all but the reserve of 512 MiB is free."""
    card = Gpu(**{"name": "RTX 3090", "vram": Mib(vram_mib), "compute_capability": "8.6", **about})
    return GpuBudget(index, index, card, vram_mib, vram_mib - 512)


def budget(*gpus: GpuBudget, ram_mib: float = 64 * 1024) -> Budget:
    """Give a host with these GPUs."""
    return Budget(gpus, ram_mib, threads=8, threads_why="8 physical cores", cpu_features=("avx2",))


def request(shape: ModelShape | None = LLAMA_8B, *, more: dict[str, Any] | None = None, **settings: Any) -> Request:  # noqa: ANN401
    """Ask for a service with these settings; `more` are keys of the request itself."""
    facts = ModelFacts("llama", "/srv/models/llama 8b.gguf", shape.size_bytes if shape else 1, "gguf", shape, None)
    common = Request(
        name="chat",
        unit="labdeploy-chat.service",
        runner="ollama",
        runner_why="as the inventory says",
        model=facts,
        binary="/usr/local/bin/ollama",
        bind="127.0.0.1",
        port=11434,
        settings=OllamaSettings(**settings),
        flags=(),
        env={},
        api_key_file=None,
    )
    return dataclasses.replace(common, **(more or {}))


def plan(asked: Request, host: Budget) -> ServicePlan:
    """Plan a service."""
    return RUNNER.plan(asked, host)


# --- choices -----------------------------------------------------------------------------------------------------


def test_the_environment_says_everything():
    """No default of another version may change what was planned, and the context never depends on VRAM tiers."""
    planned = plan(request(), budget(gpu(uuid="GPU-aa11")))
    assert planned.fits
    assert planned.argv == ("/usr/local/bin/ollama", "serve")
    assert planned.env["OLLAMA_HOST"] == "127.0.0.1:11434"
    assert planned.env["OLLAMA_MODELS"] == planned.host_facts["store"]
    assert planned.env["OLLAMA_CONTEXT_LENGTH"] == str(planned.settings["context_length"].value)
    fixed = {
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_KV_CACHE_TYPE": "f16",
        "OLLAMA_FLASH_ATTENTION": "1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_VULKAN": "0",
        "LLAMA_ARG_THREADS": "8",
        "LLAMA_ARG_FIT_TARGET": "256",
        "LLAMA_ARG_CACHE_RAM": "8192",
        "LLAMA_ARG_CTX_CHECKPOINTS": "0",
        "CUDA_VISIBLE_DEVICES": "GPU-aa11",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert fixed.items() <= planned.env.items()


def test_ipv6_addresses_are_bracketed():
    """Without brackets the port would be read as a part of the address."""
    assert plan(request(more={"bind": "::1"}), budget()).env["OLLAMA_HOST"] == "[::1]:11434"


def test_the_largest_context_that_fits_is_taken():
    """It leaves fit_target free, or llama-server would move layers to the CPU without a word."""
    card = gpu(vram_mib=12288)
    planned = plan(request(), budget(card))
    length = planned.settings["context_length"].value
    assert 4096 < length < 131_072
    assert planned.memory["gpu0"].total_mib + 256 <= card.free_mib
    longer = plan(request(context_length=length + 256), budget(card))
    assert any("layers fit on the GPU" in line for line in longer.warnings)


def test_more_memory_never_means_less_context():
    """The batch grows with the context in steps, which must not turn the choice around."""
    plans = [plan(request(), budget(gpu(vram_mib=size))) for size in range(7168, 32768, 1024)]
    lengths = [planned.settings["context_length"].value for planned in plans]
    assert all(planned.gpus for planned in plans)
    assert all(less <= more for less, more in pairwise(lengths))
    assert lengths[0] < lengths[-1] == 131_072


def test_what_the_inventory_says_wins():
    """And still appears with its reason."""
    asked = {"context_length": 8192, "num_parallel": 2, "kv_cache_type": "bf16", "keep_alive": "30m", "threads": 3}
    planned = plan(request(**asked, flash_attention=False, fit_target=Mib(1024), cache_ram=Mib(512)), budget(gpu()))
    assert planned.env["OLLAMA_CONTEXT_LENGTH"] == "8192"
    assert planned.env["OLLAMA_NUM_PARALLEL"] == "2"
    assert planned.env["OLLAMA_KV_CACHE_TYPE"] == "bf16"
    assert planned.env["OLLAMA_KEEP_ALIVE"] == "30m"
    assert planned.env["OLLAMA_FLASH_ATTENTION"] == "0"
    assert planned.env["LLAMA_ARG_FIT_TARGET"] == "1024"
    assert planned.env["LLAMA_ARG_CACHE_RAM"] == "512"
    assert planned.memory["host"].cache_mib == 512
    assert all(planned.settings[key].why == "as the inventory says" for key in asked)


def test_each_request_has_a_context_of_its_own():
    """OLLAMA_NUM_PARALLEL multiplies the KV cache: 128 KiB a token for each."""
    one, two = (plan(request(context_length=8192, num_parallel=n), budget(gpu())) for n in (1, 2))
    assert two.memory["gpu0"].context_mib == pytest.approx(2 * one.memory["gpu0"].context_mib)
    assert one.memory["gpu0"].context_mib == pytest.approx(1024)


@pytest.mark.parametrize(
    ("capability", "said"), [("8.6", "1"), ("7.5", "1"), ("7.0", None), ("5.2", "0"), ("7.2", "0"), (None, None)]
)
def test_flash_attention_is_forced_only_where_it_is_known(capability: str | None, said: str | None):
    """Forced on a GPU without it, loads may fail."""
    planned = plan(request(), budget(gpu(compute_capability=capability)))
    assert planned.env.get("OLLAMA_FLASH_ATTENTION") == said


def test_a_second_gpu_is_used_where_one_is_not_enough():
    """Only the GPUs of the plan are shown."""
    small = [gpu(i, 6144) for i in range(3)]
    assert plan(request(), budget(gpu(0, 12288), gpu(1))).env["CUDA_VISIBLE_DEVICES"] == "1"
    assert plan(request(llama(48)), budget(*small)).env["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert plan(request(gpus=(1,)), budget(gpu(0), gpu(1))).env["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_model_too_large_for_the_gpu_is_split():
    """Which is slow, and said; the rest is planned in main memory."""
    planned = plan(request(), budget(gpu(vram_mib=4096)))
    assert planned.fits
    assert planned.memory["host"].total_mib > 1024
    assert any("layers fit on the GPU" in line for line in planned.warnings)


# --- CPU ---------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_whole_file_is_in_memory():
    """Ollama does not map it there, so nothing of it can be dropped; and no GPU variable is set on such a host."""
    planned = plan(request(context_length=4096), budget())
    host = planned.memory["host"]
    assert planned.fits
    assert host.model_mib + host.repack_mib == pytest.approx(LLAMA_8B.size_bytes / 1024**2, rel=0.02)
    assert "CUDA_VISIBLE_DEVICES" not in planned.env


def test_no_gpu_means_none_by_any_runtime():
    """Vulkan lists NVIDIA cards too."""
    env = plan(request(gpus=()), budget(gpu())).env
    assert env["CUDA_VISIBLE_DEVICES"] == "-1"
    assert env["OLLAMA_LLM_LIBRARY"] == "cpu"
    assert env["OLLAMA_VULKAN"] == "0"
    amd = plan(request(), budget(gpu(name="RX 7900 XTX", compute_capability=None))).env
    assert (amd["OLLAMA_VULKAN"], amd["GGML_VK_VISIBLE_DEVICES"]) == ("1", "0")


def test_what_does_not_fit_says_by_how_much():
    """And every line it offers would really make it fit."""
    host = budget(ram_mib=8 * 1024)
    planned = plan(request(context_length=32768), host)
    assert not planned.fits
    assert planned.shortfall[0].startswith("RAM needs")
    assert list(planned.offers())
    for way in planned.offers():
        key, text = way.split(": ")
        helped = {"context_length": 32768, key: int(text) if text.isdigit() else text}
        assert plan(request(**helped), host).fits, way


@pytest.mark.parametrize(
    ("settings", "card", "said"),
    [
        ({"flash_attention": False}, {}, "kv_cache_type: q8_0 needs flash attention, which is off"),
        ({}, {"compute_capability": "5.2"}, "kv_cache_type: q8_0 needs flash attention, which is off"),
    ],
)
def test_types_of_the_cache_that_end_its_llama_server_are_refused(
    settings: dict[str, Any], card: dict[str, Any], said: str
):
    """Every load would fail; and no hint offers them."""
    host = budget(gpu(**card))
    with pytest.raises(InventoryError, match=said):
        plan(request(kv_cache_type="q8_0", **settings), host)
    assert plan(request(kv_cache_type="f16", **settings), host).fits
    tight = plan(request(context_length=131072, **settings), budget(gpu(**card), ram_mib=9 * 1024))
    assert "kv_cache_type: q8_0" not in list(tight.offers())


# --- refusals and warnings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "what", "hint"),
    [
        ({"api_key_file": "/etc/key"}, "no API keys", "reverse proxy"),
        ({"flags": ("--verbose",)}, "takes no flags", "env:"),
    ],
)
def test_what_ollama_cannot_do_is_refused(more: dict[str, Any], what: str, hint: str):
    """Each would be ignored in silence, or break every request."""
    with pytest.raises(InventoryError, match=what) as caught:
        plan(request(more=more), budget(gpu()))
    assert hint in caught.value.hint


def test_a_snapshot_folder_is_for_vllm():
    """Its memory is planned from a GGUF."""
    with pytest.raises(InventoryError, match="snapshot folder") as caught:
        plan(request(None), budget(gpu()))
    assert "vllm" in caught.value.hint


def test_every_variable_of_a_setting_is_owned():
    """Otherwise `env:` would overrule the plan in silence."""
    planned = plan(request(), budget(gpu()))
    settings = {"OLLAMA_" + key.upper() for key in planned.settings} | {
        "LLAMA_ARG_" + key.upper() for key in planned.settings
    }
    assert settings & planned.env.keys() <= OWNED_ENV.keys()


def test_anything_else_passes_through():
    """The last word on what labdeploy does not know."""
    assert plan(request(more={"env": {"OLLAMA_DEBUG": "1"}}), budget()).env["OLLAMA_DEBUG"] == "1"


def test_it_says_how_the_model_gets_into_a_store_of_its_users():
    """Labdeploy makes none of the model then, and paths may hold blanks."""
    line = plan(request(models="/srv/ollama"), budget(gpu())).warnings[-1]
    assert "echo 'FROM /srv/models/llama 8b.gguf' > Modelfile" in line
    assert "OLLAMA_HOST=127.0.0.1:11434 /usr/local/bin/ollama create llama -f Modelfile" in line


@pytest.mark.parametrize(
    ("settings", "said"), [({}, "cannot change"), ({"import_by": "api"}, "delete"), ({"models": "/srv/o"}, "delete")]
)
def test_an_open_port_is_warned_of(settings: dict[str, Any], said: str):
    """Anyone could use it, and delete its models where they are not in a store that is read-only for it."""
    warnings = plan(request(more={"bind": "0.0.0.0"}, **settings), budget(gpu())).warnings  # noqa: S104
    assert any("no authentication" in line and said in line for line in warnings)


def test_what_ollama_does_otherwise_is_warned_of():
    """It serves some architectures one request at a time, and caps the context."""
    asked = request(llama(arch="qwen3vl"), num_parallel=2, context_length=262_144, max_loaded_models=2)
    said = " ".join(plan(asked, budget(gpu(vram_mib=81920))).warnings)
    assert all(words in said for words in ("one request at a time", "caps it", "planned for one model"))


def test_a_store_that_was_there_belongs_to_ollama():
    """Its unit then runs as that user."""
    planned = plan(request(models="/usr/share/ollama/.ollama/models"), budget(gpu()))
    assert planned.env["OLLAMA_MODELS"] == planned.facts["store"] == "/usr/share/ollama/.ollama/models"
    assert any("must belong to the user ollama" in line for line in planned.warnings)
