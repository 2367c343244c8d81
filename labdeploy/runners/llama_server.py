"""llama-server (llama.cpp): its settings, how they are chosen, and its command line.

Facts about flags and memory are of llama.cpp 0.7.0 (build 11669) unless said otherwise; docs/planning.md explains
the choices for people.
"""

from __future__ import annotations

import bisect
import dataclasses
import ipaddress
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError
from labdeploy.runners.base import (
    Budget,
    Choice,
    GpuBudget,
    Health,
    Memory,
    Request,
    ServicePlan,
    as_asked,
    checkpoints,
    credential_path,
    device_env,
    gpu_sets,
    start_timeout_s,
)
from labdeploy.runners.llama_flags import spoken
from labdeploy.runners.llama_memory import LlamaMemorySettings, memory
from labdeploy.schema import Bool, Int, ListOf, Mib, Number, OneOf, Size, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from labdeploy.models.shape import ModelShape

CTX_STEP = 256  # llama.cpp pads the context to this (llama-context.cpp, GGML_PAD(n_ctx, 256))
LEAST_CTX = 4096  # what --fit-ctx keeps at least; a chat with less is hardly one
CACHE_RAM_DEFAULT_MIB = 8192  # llama-server's own --cache-ram
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
BASE_START_S = 60  # program start, warm-up and a busy machine, before any byte of the model is read
GPU_START_S = 120  # more, for a first start: drivers compile shaders (31 s of two cores for Mesa's software Vulkan)
LOG_VERBOSITY = 4  # at its default of 3, 0.7.0 does not say which layers and buffers went where
STOP_S = 20  # with a request in flight a graceful stop waits for its client; measured on 0.7.0


@dataclass(frozen=True)
class LlamaServerSettings:
    """What an inventory may say about a llama-server service. Names are its flags with underscores."""

    ctx_size: int | None = setting(
        Int(256, 16_777_216), "context in tokens, shared by all slots; default: the largest that fits", default=None
    )
    parallel: int | None = setting(Int(1, 256), "requests served at once; each gets ctx_size / parallel", default=None)
    kv_unified: bool | None = setting(Bool(), "one KV pool for all slots instead of one each", default=None)
    gpu_layers: int | None = setting(
        Int(0, 1000), "layers on GPUs, the output layer counting as one; default: all that fit", default=None
    )
    n_cpu_moe: int | None = setting(
        Int(0, 1000), "layers whose experts stay in main memory; default: as few as fit", default=None
    )
    gpus: tuple[int, ...] | None = setting(
        ListOf(Int(0, 63)), "indices of the host's GPUs it may use; default: as few as hold it", default=None
    )
    tensor_split: tuple[float, ...] | None = setting(
        ListOf(Number(0, 1_000_000)), "share of each GPU; default: by free memory", default=None
    )
    threads: int | None = setting(
        Int(1, 4096), "threads; default: fast physical cores, shared by the host's services", default=None
    )
    threads_batch: int | None = setting(Int(1, 4096), "threads for prompts; default: threads", default=None)
    batch_size: int | None = setting(Int(32, 1_048_576), "logical batch in tokens", default=None)
    ubatch_size: int | None = setting(Int(32, 65_536), "physical batch in tokens", default=None)
    cache_type_k: str | None = setting(OneOf(KV_TYPES), "type of the K cache", default=None)
    cache_type_v: str | None = setting(OneOf(KV_TYPES), "type of the V cache", default=None)
    flash_attn: str | None = setting(OneOf(("on", "off")), "flash attention", default=None)
    cache_ram: Mib | None = setting(
        Size(), "main memory for cached prompts; default: half of what is left, at most 8GiB", default=None
    )
    ctx_checkpoints: int | None = setting(
        Int(0, 1024), "context checkpoints per slot, for sliding-window and recurrent models", default=None
    )
    load_mode: str | None = setting(
        OneOf(("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")), "how the file is read", default=None
    )


OWNED_FLAGS = {
    flag: f"write {key}:"
    for key, flags in {
        "ctx_size": ("-c", "--ctx-size"),
        "parallel": ("-np", "--parallel"),
        "kv_unified": ("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"),
        "gpu_layers": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
        "n_cpu_moe": ("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"),
        "gpus": ("-dev", "--device"),
        "tensor_split": ("-ts", "--tensor-split"),
        "threads": ("-t", "--threads"),
        "threads_batch": ("-tb", "--threads-batch"),
        "batch_size": ("-b", "--batch-size"),
        "ubatch_size": ("-ub", "--ubatch-size"),
        "cache_type_k": ("-ctk", "--cache-type-k"),
        "cache_type_v": ("-ctv", "--cache-type-v"),
        "flash_attn": ("-fa", "--flash-attn"),
        "cache_ram": ("-cram", "--cache-ram"),
        "ctx_checkpoints": ("-ctxcp", "--ctx-checkpoints"),
        "load_mode": ("-lm", "--load-mode"),
        "model": ("-m", "--model", "-a", "--alias"),
        "bind": ("--host",),
        "port": ("--port",),
        "api_key_file": ("--api-key", "--api-key-file"),
    }.items()
    for flag in flags
} | {"-fit": "a plan leaves nothing to fit", "--fit": "a plan leaves nothing to fit"}


@dataclass(frozen=True)
class _Tuning:
    """One candidate: settings that memory depends on, each with its reason, and the GPUs they are for."""

    choices: Mapping[str, Choice]
    gpus: tuple[GpuBudget, ...]
    repack: bool
    cpu_flags: frozenset[str]

    def value(self, key: str) -> Any:  # noqa: ANN401
        return self.choices[key].value

    def but(self, **changes: Choice) -> _Tuning:
        """Give the same candidate with some settings changed."""
        return dataclasses.replace(self, choices={**self.choices, **changes})


class LlamaServer:
    """The runner `llama-server`."""

    name = "llama-server"
    settings = LlamaServerSettings
    default_binary = "/usr/bin/llama-server"
    owned_flags = OWNED_FLAGS
    sizes_itself = False

    def plan(self, request: Request, budget: Budget) -> ServicePlan:
        """Choose every setting that matters; what the inventory says always wins and is still checked."""
        shape = _shape(request)
        tuning = _tune(request.settings, shape, budget)
        _check_split(tuning)
        taken = _memory(tuning, shape)
        tuning, taken = _with_prompt_cache(request.settings, tuning, taken, budget)
        settings = {**_that_matter(tuning, shape), **_thread_choices(request.settings, budget)}
        argv, lost = spoken(_argv(request, settings, tuning.gpus), request.build)
        return ServicePlan(
            name=request.name,
            unit=request.unit,
            runner=self.name,
            model=request.model.name,
            bind=request.bind,
            port=request.port,
            settings=settings,
            memory=taken,
            argv=argv,
            proof=_proof(argv) if "--fit" in argv else (),
            env={**device_env(tuning.gpus, host_has_gpus=bool(tuning.gpus)), **request.env},
            gpus=tuning.gpus,
            health=Health(
                ready_path="/health",
                model=request.model.name,
                deadline_s=start_timeout_s(
                    request.model.size_bytes,
                    budget.disk_mib_per_s,
                    base_s=BASE_START_S + (GPU_START_S if tuning.gpus else 0),
                ),
                n_ctx=_slot_ctx(tuning, shape),
                gpu_layers=min(tuning.value("gpu_layers"), shape.n_layer_all + 1) if tuning.gpus else None,
            ),
            stop_timeout_s=STOP_S,
            model_path=request.model.path,
            model_bytes=request.model.size_bytes,
            api_key_file=request.api_key_file,
            shortfall=(*_no_gpu(tuning), *_shortfall(taken, tuning.gpus, budget)),
            ways_to_fit=tuple(_ways_to_fit(tuning, shape, budget)),
            warnings=(*_warnings(request, tuning, shape), *lost),
        )


RUNNER = LlamaServer()


def _shape(request: Request) -> ModelShape:
    if request.model.shape is None:
        raise InventoryError(
            f"llama-server serves GGUF files, and model {request.model.name} is a Hugging Face snapshot folder",
            hint="write runner: vllm, or name a GGUF file of the model",
        )
    return request.model.shape


def _check_split(tuning: _Tuning) -> None:
    """Refuse more shares than GPUs: llama-server drops the others, and the layers that were meant for them move."""
    n, n_gpus = len(tuning.value("tensor_split")), len(tuning.gpus)
    if tuning.gpus and n > n_gpus:
        what = f"tensor_split names {n} GPUs, it has {n_gpus}"
        raise InventoryError(what, hint="write one share for each of its GPUs")


# --- choosing --------------------------------------------------------------------------------------------------


def _tune(asked: LlamaServerSettings, shape: ModelShape, budget: Budget) -> _Tuning:
    """Place the model: all on one GPU, else all on several, else experts in RAM, else fewer layers, else the CPU."""
    for gpus in _gpu_sets(asked, budget):
        whole = _grown(asked, _start(asked, shape, gpus, budget), shape, budget)
        if _fits(whole, shape, budget):
            return whole
    gpus = _allowed(asked, budget)
    start = _start(asked, shape, gpus, budget)
    if gpus and asked.gpu_layers is None:
        if shape.n_expert and asked.n_cpu_moe is None:
            for split in _experts_to_ram(start, shape):
                if _fits(split, shape, budget):
                    return _grown(asked, split, shape, budget)
        fewer = _fewest_layers_lost(start, shape, budget)
        if fewer is not None:
            return fewer
        start = _start(asked, shape, (), budget)
    return _grown(asked, start, shape, budget)


def _allowed(asked: LlamaServerSettings, budget: Budget) -> tuple[GpuBudget, ...]:
    """Give the GPUs a service may use: those asked for, else all of the first one's backend."""
    if asked.gpu_layers == 0:
        return ()
    if asked.gpus is not None:
        return tuple(gpu for gpu in budget.gpus if gpu.index in asked.gpus)
    return tuple(gpu for gpu in budget.gpus if gpu.gpu.api == budget.gpus[0].gpu.api)


def _gpu_sets(asked: LlamaServerSettings, budget: Budget) -> list[tuple[GpuBudget, ...]]:
    """List the sets of GPUs to try; one set where the inventory says which, or how to split over them."""
    allowed = _allowed(asked, budget)
    if asked.gpus is not None or asked.tensor_split is not None:
        return [allowed] if allowed else []
    return gpu_sets(allowed)


def _start(asked: LlamaServerSettings, shape: ModelShape, gpus: tuple[GpuBudget, ...], budget: Budget) -> _Tuning:
    """Give the candidate that wants most: every layer on the GPUs, and the context asked for or the least useful."""
    parallel = as_asked(asked.parallel) or Choice(1, "one request at a time gets the whole context")
    trained = shape.n_ctx_train * parallel.value
    choices = {
        "ctx_size": as_asked(asked.ctx_size) or Choice(min(LEAST_CTX * parallel.value, trained), "the least useful"),
        "parallel": parallel,
        "kv_unified": as_asked(asked.kv_unified) or Choice(False, "each slot keeps its own share of the context"),  # noqa: FBT003
        "gpu_layers": _gpu_layers(asked, shape, gpus),
        "n_cpu_moe": as_asked(asked.n_cpu_moe) or Choice(0, "no experts need to stay in RAM"),
        "tensor_split": as_asked(asked.tensor_split) or Choice(_split(gpus), "by the free memory of each GPU"),
        "batch_size": as_asked(asked.batch_size) or Choice(2048, "llama-server's default"),
        "ubatch_size": as_asked(asked.ubatch_size)
        or Choice(512, "llama-server's default; compute memory grows with it"),
        "cache_type_k": as_asked(asked.cache_type_k) or Choice("f16", "exact; q8_0 halves it"),
        "cache_type_v": as_asked(asked.cache_type_v) or Choice("f16", "exact; q8_0 halves it"),
        "flash_attn": as_asked(asked.flash_attn) or Choice("on", "without it compute memory grows with the context"),
        "ctx_checkpoints": as_asked(asked.ctx_checkpoints) or checkpoints(shape),
        "load_mode": as_asked(asked.load_mode)
        or Choice("auto", "maps the file, so that a restart reads it from cache"),
    }
    return _Tuning(choices, gpus, repack=not gpus, cpu_flags=frozenset(budget.cpu_features))


def _gpu_layers(asked: LlamaServerSettings, shape: ModelShape, gpus: tuple[GpuBudget, ...]) -> Choice:
    most = shape.n_layer_all + 1
    if not gpus:
        return as_asked(asked.gpu_layers) or Choice(0, "no GPU to put layers on")
    names = " and ".join(gpu.id for gpu in gpus)
    asked_layers = as_asked(asked.gpu_layers)
    return asked_layers or Choice(most, f"all {most - 1} blocks and the output layer fit on {names}")


def _split(gpus: tuple[GpuBudget, ...]) -> tuple[int, ...]:
    """Give each GPU a share by its free memory, in whole GiB-like numbers a person can read."""
    return tuple(round(gpu.free_mib / 256) for gpu in gpus) if len(gpus) > 1 else ()


def _grown(asked: LlamaServerSettings, tuning: _Tuning, shape: ModelShape, budget: Budget) -> _Tuning:
    """Give the candidate the largest context that fits, up to the trained one, where the inventory names none."""
    if asked.ctx_size is not None or budget.least:
        return tuning
    slots = tuning.value("parallel")
    least, most = tuning.value("ctx_size"), shape.n_ctx_train * slots

    def with_ctx(step: int) -> _Tuning:
        n = min(least + step * CTX_STEP, most)
        all_of_it = f"all {shape.n_ctx_train} trained tokens fit for each of {slots} slots"
        return tuning.but(ctx_size=Choice(n, all_of_it if n == most else f"the largest that fits, of {most} trained"))

    return _last_that_fits(with_ctx, -(-(most - least) // CTX_STEP) + 1, shape, budget) or tuning


def _last_that_fits(
    candidate: Callable[[int], _Tuning], count: int, shape: ModelShape, budget: Budget
) -> _Tuning | None:
    """Find the last of `count` candidates that fits, each wanting more memory than the one before it."""
    found = bisect.bisect_left(range(count), x=True, key=lambda i: not _fits(candidate(i), shape, budget))
    return candidate(found - 1) if found else None


def _experts_to_ram(tuning: _Tuning, shape: ModelShape) -> Iterator[_Tuning]:
    """Move the experts of more and more layers to main memory: attention stays fast on the GPU."""
    for n in range(1, shape.n_layer_all + 1):
        why = f"experts of {n} of {shape.n_layer_all} blocks stay in RAM; everything else fits on the GPU"
        yield tuning.but(n_cpu_moe=Choice(n, why))


def _fewest_layers_lost(tuning: _Tuning, shape: ModelShape, budget: Budget) -> _Tuning | None:
    most = shape.n_layer_all + 1
    free = " + ".join(f"{gpu.free_mib:.0f}" for gpu in tuning.gpus)

    def with_layers(i: int) -> _Tuning:
        return tuning.but(gpu_layers=Choice(i + 1, f"{i + 1} of {most} layers fit in {free} MiB with this context"))

    # Few layers may not fit in RAM, many not on the GPU: the last that fits on the GPU leaves the least to RAM.
    best = _last_that_fits(with_layers, most, shape, dataclasses.replace(budget, ram_mib=math.inf))
    return best if best and _fits(best, shape, budget) else None


def _that_matter(tuning: _Tuning, shape: ModelShape) -> dict[str, Choice]:
    """Leave out settings that mean nothing here: a split over one GPU, experts of a dense model."""
    dropped = set() if len(tuning.gpus) > 1 else {"tensor_split"}
    dropped |= set() if tuning.gpus and shape.n_expert else {"n_cpu_moe"}
    return {key: choice for key, choice in tuning.choices.items() if key not in dropped}


# --- memory ----------------------------------------------------------------------------------------------------


def _memory_settings(tuning: _Tuning) -> LlamaMemorySettings:
    """Name the settings that memory depends on."""
    return LlamaMemorySettings(
        ctx_size=tuning.value("ctx_size"),
        parallel=tuning.value("parallel"),
        kv_unified=tuning.value("kv_unified"),
        gpu_layers=tuning.value("gpu_layers"),
        n_cpu_moe=tuning.value("n_cpu_moe"),
        batch_size=tuning.value("batch_size"),
        ubatch_size=tuning.value("ubatch_size"),
        cache_type_k=tuning.value("cache_type_k"),
        cache_type_v=tuning.value("cache_type_v"),
        flash_attn=tuning.value("flash_attn") == "on",
        n_gpus=len(tuning.gpus),
        gpu_api=tuning.gpus[0].gpu.api if tuning.gpus else "cuda",
        tensor_split=tuple(float(share) for share in tuning.value("tensor_split")),
        repack=tuning.repack,
        cpu_flags=tuning.cpu_flags,
        cache_ram_mib=tuning.choices["cache_ram"].value if "cache_ram" in tuning.choices else 0,
        ctx_checkpoints=tuning.value("ctx_checkpoints"),
    )


def _memory(tuning: _Tuning, shape: ModelShape) -> dict[str, Memory]:
    """Give the memory on each device: the GPUs by their names in the plan, then `host`."""
    taken = memory(shape, _memory_settings(tuning))
    on_gpus = {
        gpu.id: Memory(part.model_mib, part.context_mib, part.compute_mib, part.overhead_mib)
        for gpu, part in zip(tuning.gpus, taken.gpus, strict=True)
    }
    host = taken.host
    return {
        **on_gpus,
        "host": Memory(
            host.model_mib,
            host.context_mib,
            host.compute_mib,
            host.overhead_mib,
            host.repack_mib,
            host.cache_ram_mib + host.checkpoints_mib,
        ),
    }


def _shortfall(taken: Mapping[str, Memory], gpus: tuple[GpuBudget, ...], budget: Budget) -> Iterator[str]:
    """Say by how much each device is too small."""
    for gpu in gpus:
        need = taken[gpu.id].total_mib
        if need > gpu.free_mib:
            yield _too_much(gpu.id, need, gpu.free_mib)
    need = taken["host"].total_mib
    if need > budget.ram_mib:
        yield _too_much("RAM", need, budget.ram_mib)


def _no_gpu(tuning: _Tuning) -> tuple[str, ...]:
    """Say that layers were asked to go to a GPU where the service has none."""
    layers = tuning.value("gpu_layers")
    return () if tuning.gpus or not layers else (f"gpu_layers {layers} needs a GPU, and there is none for it",)


def _too_much(device: str, need_mib: float, free_mib: float) -> str:
    return f"{device} needs {need_mib:.0f} MiB, {free_mib:.0f} MiB are free: {need_mib - free_mib:.0f} MiB too much"


def _fits(tuning: _Tuning, shape: ModelShape, budget: Budget) -> bool:
    return not any(_shortfall(_memory(tuning, shape), tuning.gpus, budget))


def _with_prompt_cache(
    asked: LlamaServerSettings, tuning: _Tuning, taken: Mapping[str, Memory], budget: Budget
) -> tuple[_Tuning, dict[str, Memory]]:
    """Give the prompt cache half of the RAM that is left: its default of 8 GiB is what OOM kills are made of."""
    left = max(0.0, budget.ram_mib - taken["host"].total_mib)
    chosen = 0 if budget.least else int(min(CACHE_RAM_DEFAULT_MIB, left / 2) // CTX_STEP * CTX_STEP)
    cache = as_asked(asked.cache_ram) or Choice(chosen, f"half of the {left:.0f} MiB RAM left, at most 8192 MiB")
    host = dataclasses.replace(taken["host"], cache_mib=taken["host"].cache_mib + cache.value)
    return tuning.but(cache_ram=cache), {**taken, "host": host}


def _ways_to_fit(tuning: _Tuning, shape: ModelShape, budget: Budget) -> Iterator[str]:
    """Where it does not fit: the lines that would make it fit, cheapest for its quality first."""
    if _no_gpu(tuning):
        yield "gpu_layers: 0"
    if _fits(tuning, shape, budget):
        return
    uncached = tuning.but(cache_ram=Choice(0, ""))
    if _fits(uncached, shape, budget):
        left = budget.ram_mib - _memory(uncached, shape)["host"].total_mib
        yield f"cache_ram: {int(left // CTX_STEP * CTX_STEP)}MiB"
        return
    q8 = Choice("q8_0", "")
    halved = tuning.but(cache_type_k=q8, cache_type_v=q8)
    if _fits(halved, shape, budget):
        yield "cache_type_k: q8_0, cache_type_v: q8_0"
    sizes = range(CTX_STEP, tuning.value("ctx_size"), CTX_STEP)
    shorter = _last_that_fits(lambda i: tuning.but(ctx_size=Choice(sizes[i], "")), len(sizes), shape, budget)
    if shorter:
        yield f"ctx_size: {shorter.value('ctx_size')}"
    fewer = _fewest_layers_lost(tuning, shape, budget) if tuning.gpus else None
    if fewer:
        yield f"gpu_layers: {fewer.value('gpu_layers')}"


def _slot_ctx(tuning: _Tuning, shape: ModelShape) -> int:
    """Give the context one request gets: what /v1/models must report once it runs."""
    total = -(-int(tuning.value("ctx_size")) // CTX_STEP) * CTX_STEP
    slots = 1 if tuning.value("kv_unified") else int(tuning.value("parallel"))
    return min(-(-(total // slots) // CTX_STEP) * CTX_STEP, shape.n_ctx_train)


def _warnings(request: Request, tuning: _Tuning, shape: ModelShape) -> Iterator[str]:
    if not shape.known_arch:
        yield f"architecture {shape.arch} is planned by the general formula; expect more or less memory"
    if tuning.value("ctx_size") > shape.n_ctx_train * tuning.value("parallel"):
        yield f"ctx_size {tuning.value('ctx_size')} is beyond the {shape.n_ctx_train} tokens the model was trained for"
    if not ipaddress.ip_address(request.bind).is_loopback and not request.api_key_file:
        yield f"listens on {request.bind} without an API key: anyone who reaches the port can use it"


# --- command line ----------------------------------------------------------------------------------------------


def _thread_choices(asked: LlamaServerSettings, budget: Budget) -> dict[str, Choice]:
    threads = as_asked(asked.threads) or Choice(budget.threads, budget.threads_why)
    batch = as_asked(asked.threads_batch) or Choice(threads.value, "the same cores read the prompt")
    return {"threads": threads, "threads_batch": batch}


def _argv(request: Request, settings: Mapping[str, Choice], gpus: tuple[GpuBudget, ...]) -> tuple[str, ...]:
    """Write the command line. Every tuned value stands here: a host-wide config.ini or a default cannot change it."""
    value = {key: choice.value for key, choice in settings.items()}
    unified = "--kv-unified" if value["kv_unified"] else "--no-kv-unified"
    return (
        request.binary,
        *("--model", request.model.path),
        *("--alias", request.model.name),
        *("--host", request.bind),
        *("--port", str(request.port)),
        *("--threads", str(value["threads"])),
        *("--threads-batch", str(value["threads_batch"])),
        *("--ctx-size", str(value["ctx_size"])),
        *("--parallel", str(value["parallel"])),
        unified,
        *("--batch-size", str(value["batch_size"])),
        *("--ubatch-size", str(value["ubatch_size"])),
        *("--flash-attn", value["flash_attn"]),
        *("--cache-type-k", value["cache_type_k"]),
        *("--cache-type-v", value["cache_type_v"]),
        *_gpu_words(value, gpus),
        *("--fit", "off"),
        *("--cache-ram", str(value["cache_ram"])),
        *("--ctx-checkpoints", str(value["ctx_checkpoints"])),
        *("--load-mode", value["load_mode"]),
        "--metrics",
        *("--log-verbosity", str(LOG_VERBOSITY)),
        *(("--api-key-file", credential_path(request)) if request.api_key_file else ()),
        *request.flags,
    )


def _gpu_words(value: Mapping[str, Any], gpus: tuple[GpuBudget, ...]) -> tuple[str, ...]:
    """Say where layers go. Without GPUs the device is `none`: `--gpu-layers 0` alone still takes GPU memory."""
    if not gpus:
        return ("--device", "none")
    words = ["--gpu-layers", str(value["gpu_layers"])]
    if value.get("n_cpu_moe"):
        words += ["--n-cpu-moe", str(value["n_cpu_moe"])]
    if value.get("tensor_split"):
        words += ["--tensor-split", ",".join(f"{share:g}" for share in value["tensor_split"])]
    return tuple(words)


def _proof(argv: tuple[str, ...]) -> tuple[str, ...]:
    """Write the command line that counts memory: the service's own, on a port nobody else has, without its key.

    With --fit on, llama-server first sizes all buffers without allocating one and prints them as a table
    (common/fit.cpp); what the command line sets it leaves as it is.
    """
    instead = {"--host": "127.0.0.1", "--port": "0", "--fit": "on"}
    words = [instead.get(before, word) for before, word in pairwise(("", *argv))]
    if "--api-key-file" in words:
        at = words.index("--api-key-file")
        del words[at : at + 2]
    return tuple(words)
