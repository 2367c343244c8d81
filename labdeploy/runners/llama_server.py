"""llama-server (llama.cpp): its settings, how they are chosen, and its command line.

Facts about flags and memory are of llama.cpp 0.7.0 (build 11669) unless said otherwise; docs/planning.md explains
the choices for people.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError
from labdeploy.runners import llama_beside as beside
from labdeploy.runners.base import (
    DEVICE_ENV,
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
    prefer_choice,
    start_timeout_s,
    too_much,
    uncounted,
)
from labdeploy.runners.llama_beside import Models, models_of
from labdeploy.runners.llama_context import KV_TYPES, refused_types
from labdeploy.runners.llama_flags import spoken
from labdeploy.runners.llama_memory import LlamaMemorySettings
from labdeploy.runners.llama_tuning import CTX_STEP, LEAST_CTX, Layout, Room, Wish, choose, nearest, needs, sets_to_try
from labdeploy.schema import Bool, Int, ListOf, Mib, ModelName, Number, OneOf, OrWord, Size, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from labdeploy.models.shape import ModelShape
    from labdeploy.runners.base import Prefer

CACHE_RAM_DEFAULT_MIB = 8192  # llama-server's own --cache-ram
Q8_0: dict[str, Any] = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
BASE_START_S = 60  # program start, warm-up and a busy machine, before any byte of the model is read
GPU_START_S = 120  # more, for a first start: drivers compile shaders (31 s of two cores for Mesa's software Vulkan)
LOG_VERBOSITY = 4  # at its default of 3, 0.7.0 does not say which layers and buffers went where
STOP_S = 20  # with a request in flight a graceful stop waits for its client; measured on 0.7.0

ALL_LAYERS = 1001  # no number that can be written; becomes the number of layers once the model is known
LAYERS = OrWord(Int(0, 1000), {"auto": None, "all": ALL_LAYERS})


@dataclass(frozen=True)
class LlamaServerSettings:
    """What an inventory may say about a llama-server service. Names are its flags with underscores."""

    ctx_size: int | None = setting(
        Int(256, 16_777_216), "context in tokens, shared by all slots; default: the largest that fits", default=None
    )
    parallel: int | None = setting(Int(1, 256), "requests served at once; each gets ctx_size / parallel", default=None)
    kv_unified: bool | None = setting(Bool(), "one KV pool for all slots instead of one each", default=None)
    gpu_layers: int | None = setting(
        LAYERS, "layers on GPUs, the output layer counting as one; default, and auto: all that fit", default=None
    )
    n_cpu_moe: int | None = setting(
        Int(0, 1000), "layers whose experts stay in main memory; default: as few as fit", default=None
    )
    gpus: tuple[int, ...] | None = setting(
        ListOf(Int(0, 63)), "indices of the host's GPUs it may use; default: as few as hold it", default=None
    )
    tensor_split: tuple[float, ...] | None = setting(
        ListOf(Number(0, 1_000_000)), "share of each GPU; default: what each can hold", default=None
    )
    threads: int | None = setting(
        Int(1, 4096), "threads; default: fast physical cores, shared by the host's services", default=None
    )
    threads_batch: int | None = setting(Int(1, 4096), "threads for prompts; default: threads", default=None)
    batch_size: int | None = setting(Int(32, 1_048_576), "logical batch in tokens", default=None)
    ubatch_size: int | None = setting(Int(32, 65_536), "physical batch in tokens", default=None)
    cache_type_k: str | None = setting(OneOf(KV_TYPES), "type of the K cache", default=None)
    cache_type_v: str | None = setting(OneOf(KV_TYPES), "type of the V cache", default=None)
    flash_attn: str | None = setting(OrWord(OneOf(("on", "off")), {"auto": None}), "flash attention", default=None)
    cache_ram: Mib | None = setting(
        Size(), "main memory for cached prompts; default: half of what is left, at most 8GiB", default=None
    )
    ctx_checkpoints: int | None = setting(
        Int(0, 1024), "context checkpoints per slot, for sliding-window and recurrent models", default=None
    )
    swa_full: bool | None = setting(
        Bool(), "keep the whole context of layers with a sliding window too, so that prompts are reused", default=None
    )
    load_mode: str | None = setting(
        OneOf(("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")), "how the file is read", default=None
    )
    mmproj: str | None = setting(
        ModelName, "the model's encoder of images or sounds: a name under models", default=None
    )
    mmproj_offload: bool | None = setting(Bool(), "whether the encoder is on a GPU where there is one", default=None)
    image_max_tokens: int | None = setting(
        Int(1, 65_536), "tokens that an image becomes at most, where the encoder takes any size", default=None
    )
    spec_draft_model: str | None = setting(
        ModelName, "a small model that drafts what this one then checks: a name under models", default=None
    )
    spec_draft_ngl: int | None = setting(
        LAYERS, "layers of the drafting model on GPUs; default: all where there are any", default=None
    )
    spec_draft_n_max: int | None = setting(Int(1, 256), "tokens drafted at once", default=None)


# Flags and variables that say what a setting says. The command line wins over the variables, so that they would be read
# by people and by nobody else.
_SAID_BY = {
    "ctx_size": ("-c", "--ctx-size", "LLAMA_ARG_CTX_SIZE"),
    "parallel": ("-np", "--parallel", "LLAMA_ARG_N_PARALLEL"),
    "kv_unified": ("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified", "LLAMA_ARG_KV_UNIFIED"),
    "gpu_layers": ("-ngl", "--gpu-layers", "--n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS"),
    "n_cpu_moe": ("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe", "LLAMA_ARG_N_CPU_MOE"),
    "gpus": ("-dev", "--device", "LLAMA_ARG_DEVICE"),
    "tensor_split": ("-ts", "--tensor-split", "LLAMA_ARG_TENSOR_SPLIT"),
    "threads": ("-t", "--threads", "LLAMA_ARG_THREADS"),
    "threads_batch": ("-tb", "--threads-batch"),
    "batch_size": ("-b", "--batch-size", "LLAMA_ARG_BATCH"),
    "ubatch_size": ("-ub", "--ubatch-size", "LLAMA_ARG_UBATCH"),
    "cache_type_k": ("-ctk", "--cache-type-k", "LLAMA_ARG_CACHE_TYPE_K"),
    "cache_type_v": ("-ctv", "--cache-type-v", "LLAMA_ARG_CACHE_TYPE_V"),
    "flash_attn": ("-fa", "--flash-attn", "LLAMA_ARG_FLASH_ATTN"),
    "cache_ram": ("-cram", "--cache-ram", "LLAMA_ARG_CACHE_RAM"),
    "ctx_checkpoints": ("-ctxcp", "--ctx-checkpoints", "LLAMA_ARG_CTX_CHECKPOINTS"),
    "swa_full": ("--swa-full", "LLAMA_ARG_SWA_FULL"),
    "load_mode": ("-lm", "--load-mode", "LLAMA_ARG_LOAD_MODE"),
    "mmproj": (
        "-mm",
        "--mmproj",
        "-mmdev",
        "--mmproj-device",
        "--mmproj-auto",
        "--no-mmproj-auto",
        "--no-mmproj",
        "LLAMA_ARG_MMPROJ",
    ),
    "mmproj_offload": ("--mmproj-offload", "--no-mmproj-offload", "LLAMA_ARG_MMPROJ_OFFLOAD"),
    "image_max_tokens": ("--image-max-tokens",),
    "spec_draft_model": (
        "-md",
        "--model-draft",
        "--spec-draft-model",
        "-devd",
        "--device-draft",
        "--spec-draft-device",
    ),
    "spec_draft_ngl": ("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl"),
    "spec_draft_n_max": ("--spec-draft-n-max",),
    "model": ("-m", "--model", "-a", "--alias", "LLAMA_ARG_MODEL"),
    "bind": ("--host", "LLAMA_ARG_HOST"),
    "port": ("--port", "LLAMA_ARG_PORT"),
    "api_key_file": ("--api-key", "--api-key-file", "LLAMA_ARG_API_KEY_FILE"),
}
_OWNED = {word: f"write {key}:" for key, words in _SAID_BY.items() for word in words}
OWNED_FLAGS = {word: instead for word, instead in _OWNED.items() if word.startswith("-")} | {
    "-fit": "a plan leaves nothing to fit",
    "--fit": "a plan leaves nothing to fit",
}
OWNED_ENV = {
    **DEVICE_ENV,
    **{word: instead for word, instead in _OWNED.items() if not word.startswith("-")},
    "LLAMA_API_KEY": "a key in a unit is readable by everyone on the host; write api_key_file:",
}
# Flags that change what llama-server allocates, or where (common/arg.cpp), and that no setting stands for.
UNCOUNTED_FLAGS = frozenset(
    (
        *("-sm", "--split-mode", "-mg", "--main-gpu", "-ot", "--override-tensor", "-nkvo", "--no-kv-offload"),
        *("--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled", "--rpc", "-nr", "--no-repack"),
        *("--no-host", "--no-op-offload", "--embedding", "--embeddings", "--rerank", "--reranking", "--override-kv"),
        *("-otd", "--override-tensor-draft", "-ncmoed", "--n-cpu-moe-draft", "-mv", "--model-vocoder", "--spec-type"),
        *("-ncffn", "--n-cpu-ffn", "--moe-cache-mib", "-lzm", "--lazy-mode"),
    )
)


@dataclass(frozen=True)
class _Tuning:
    """What was chosen for a service: its layout, each setting with its reason, and what it takes by device."""

    layout: Layout
    choices: Mapping[str, Choice]
    memory: Mapping[str, Memory]
    shortfall: tuple[str, ...]

    @property
    def gpus(self) -> tuple[GpuBudget, ...]:
        return self.layout.gpus

    def value(self, key: str) -> Any:  # noqa: ANN401
        return self.choices[key].value

    def all_on_gpu(self, shape: ModelShape) -> bool:
        """Say whether the CPU has nothing to do but look up the token."""
        settings = self.layout.settings
        return settings.gpu_layers > shape.n_layer_all and not settings.n_cpu_moe


class LlamaServer:
    """The runner `llama-server`."""

    name = "llama-server"
    settings = LlamaServerSettings
    default_binary = "/usr/bin/llama-server"
    owned_flags = OWNED_FLAGS
    owned_env = OWNED_ENV
    measures_gpu = False
    sizes_itself = False

    def plan(self, request: Request, budget: Budget) -> ServicePlan:
        """Choose every setting that matters; what the inventory says always wins and is still checked."""
        models = models_of(request)
        request = dataclasses.replace(request, settings=_resolved(request.settings, models))
        shape, prefer = models.shape, request.prefer or "speed"
        for what, hint in _wrong_cache_types(request.settings, shape):
            raise InventoryError(what, hint=hint)
        tuning = _tune(request.settings, prefer, models, budget)
        settings = {**_that_matter(request, tuning, shape), **_thread_choices(request.settings, budget)}
        argv, lost = spoken(_argv(request, settings, tuning.gpus), request.build)
        return ServicePlan(
            name=request.name,
            unit=request.unit,
            runner=self.name,
            model=request.model.name,
            bind=request.bind,
            port=request.port,
            settings=settings,
            memory=tuning.memory,
            argv=argv,
            beside=tuple(request.beside.values()),
            proof=_proof(argv) if "--fit" in argv else (),
            env={**device_env(tuning.gpus, host_has_gpus=bool(tuning.gpus)), **request.env},
            gpus=tuning.gpus,
            health=Health(
                ready_path="/health",
                model=request.model.name,
                deadline_s=start_timeout_s(
                    request.all_bytes,
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
            shortfall=tuning.shortfall,
            offers=functools.partial(_offers, request.settings, prefer, models, budget),
            warnings=(*_warnings(request, tuning, shape), *lost),
            cpu_layers=not tuning.all_on_gpu(shape),
        )


RUNNER = LlamaServer()


def _resolved(asked: LlamaServerSettings, models: Models) -> LlamaServerSettings:
    """Give `all` layers their number, the output layer counting as one; a split of zeros is none to llama.cpp."""
    counts = {"gpu_layers": models.shape, "spec_draft_ngl": models.draft}
    known = {key: shape.n_layer_all + 1 for key, shape in counts.items() if shape}
    every: dict[str, Any] = {key: n for key, n in known.items() if getattr(asked, key) == ALL_LAYERS}
    split = asked.tensor_split if any(asked.tensor_split or ()) else None
    return dataclasses.replace(asked, tensor_split=split, **every)


# --- choosing --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8192)
def _tune(asked: LlamaServerSettings, prefer: Prefer, models: Models, budget: Budget) -> _Tuning:
    """Choose the layout and every other setting that memory depends on; llama_tuning.py says how layers are placed.

    Where nothing fits it is the layout that is short of the least memory.
    """
    if found := _fitting(asked, prefer, models, budget):
        return found
    return _tuning(asked, prefer, models.shape, budget, nearest(*_sought(asked, prefer, models, budget)))


@functools.lru_cache(maxsize=8192)
def _fitting(asked: LlamaServerSettings, prefer: Prefer, models: Models, budget: Budget) -> _Tuning | None:
    """Choose with the KV cache in f16, in q8_0 only where that fits nowhere and may be; None where neither fits."""
    _check_split(asked, _allowed(asked, budget))
    shape, wish, room = _sought(asked, prefer, models, budget)
    layout = choose(shape, wish, room)
    if not layout and _may_quantise_cache(asked, shape):
        q8_0 = dataclasses.replace(wish.base, **Q8_0)
        layout = choose(shape, dataclasses.replace(wish, base=q8_0), room)
    return _tuning(asked, prefer, shape, budget, layout) if layout else None


def _tuning(asked: LlamaServerSettings, prefer: Prefer, shape: ModelShape, budget: Budget, layout: Layout) -> _Tuning:
    layout, cache_ram = _with_prompt_cache(asked, layout, shape, budget)
    choices = {**_choices(asked, prefer, shape, layout), "cache_ram": cache_ram}
    memory = _memory(layout, shape)
    return _Tuning(layout, choices, memory, tuple(_shortfall(asked, layout, memory, budget)))


def _sought(
    asked: LlamaServerSettings, prefer: Prefer, models: Models, budget: Budget
) -> tuple[ModelShape, Wish, Room]:
    """Say what is to be laid out, what the inventory says of it, and what it may take."""
    wish = Wish(
        base=_base(asked, models, budget),
        ctx_size=asked.ctx_size,
        gpu_layers=asked.gpu_layers,
        n_cpu_moe=asked.n_cpu_moe,
        tensor_split=asked.tensor_split,
        prefer=prefer,
    )
    return models.shape, wish, Room(_gpu_sets(asked, _allowed(asked, budget)), budget.ram_mib, least=budget.least)


def _may_quantise_cache(asked: LlamaServerSettings, shape: ModelShape) -> bool:
    """Say whether the cache may become q8_0 unasked.

    Only where the inventory pins nothing that makes it large, so that who asks for too much is told.
    """
    pinned = (asked.ctx_size, asked.gpu_layers, asked.n_cpu_moe, asked.cache_type_k, asked.cache_type_v)
    return not any(each is not None for each in pinned) and _q8_0_works(asked, shape)


def _q8_0_works(asked: LlamaServerSettings, shape: ModelShape) -> bool:
    q8_0 = dataclasses.replace(asked, **Q8_0)
    return any(layer.has_kv for layer in shape.trunk) and not any(_wrong_cache_types(q8_0, shape))


def _wrong_cache_types(asked: LlamaServerSettings, shape: ModelShape) -> Iterator[tuple[str, str]]:
    """Say which types of the KV cache llama-server would exit with, each with what to write."""
    types = asked.cache_type_k or "f16", asked.cache_type_v or "f16"
    for which, why in refused_types(*types, shape, flash_attn=asked.flash_attn != "off"):
        if which == "both":
            yield f"cache_type_k and cache_type_v: {why}", "write one type for both"
        else:
            instead = "leave flash_attn out" if asked.flash_attn == "off" else "write f16"
            yield f"cache_type_{which}: {why}", f"{instead}, or leave cache_type_{which} out"


def _base(asked: LlamaServerSettings, models: Models, budget: Budget) -> LlamaMemorySettings:
    """Settle what does not depend on the layout. What is loaded beside the model goes to its GPUs, if it has any."""
    allowed, draft = _allowed(asked, budget), models.draft
    draft_layers = draft.n_layer_all + 1 if draft else 0
    return LlamaMemorySettings(
        ctx_size=asked.ctx_size or 0,
        parallel=asked.parallel or 1,
        kv_unified=bool(asked.kv_unified),
        batch_size=asked.batch_size or 2048,
        ubatch_size=asked.ubatch_size or 512,
        cache_type_k=asked.cache_type_k or "f16",
        cache_type_v=asked.cache_type_v or "f16",
        flash_attn=asked.flash_attn != "off",
        gpu_api=allowed[0].gpu.api if allowed else "cuda",
        cpu_flags=frozenset(budget.cpu_features),
        cache_ram_mib=asked.cache_ram or 0,
        ctx_checkpoints=_checkpoints(asked, models.shape).value,
        swa_full=bool(asked.swa_full),
        projector=models.projector,
        mmproj_offload=asked.mmproj_offload is not False,
        image_max_tokens=asked.image_max_tokens,
        draft=draft,
        draft_gpu_layers=draft_layers if asked.spec_draft_ngl is None else min(asked.spec_draft_ngl, draft_layers),
        draft_tokens=(asked.spec_draft_n_max or beside.DRAFT_TOKENS) if draft else 0,
    )


def _allowed(asked: LlamaServerSettings, budget: Budget) -> tuple[GpuBudget, ...]:
    """Give the GPUs a service may use: those asked for, else all of the first one's backend."""
    if asked.gpu_layers == 0:
        return ()
    if asked.gpus is not None:
        return tuple(gpu for gpu in budget.gpus if gpu.index in asked.gpus)
    return tuple(gpu for gpu in budget.gpus if gpu.gpu.api == budget.gpus[0].gpu.api)


def _gpu_sets(asked: LlamaServerSettings, allowed: tuple[GpuBudget, ...]) -> tuple[tuple[GpuBudget, ...], ...]:
    """List the sets of GPUs to try; one set where the inventory says which, or how to split over them."""
    if asked.gpus is not None or asked.tensor_split is not None:
        return (allowed,) if allowed else ()
    return sets_to_try(allowed)


def _check_split(asked: LlamaServerSettings, allowed: tuple[GpuBudget, ...]) -> None:
    """Refuse more shares than GPUs: llama-server drops the others, and the layers that were meant for them move."""
    n, n_gpus = len(asked.tensor_split or ()), len(allowed)
    if n_gpus and n > n_gpus:
        what = f"tensor_split names {n} GPUs, it has {n_gpus}"
        raise InventoryError(what, hint="write one share for each of its GPUs")


def _with_prompt_cache(
    asked: LlamaServerSettings, layout: Layout, shape: ModelShape, budget: Budget
) -> tuple[Layout, Choice]:
    """Give the prompt cache half of the RAM that is left: its default of 8 GiB is what OOM kills are made of."""
    if asked.cache_ram is not None:
        return layout, Choice(asked.cache_ram, "as the inventory says")
    left = max(0.0, budget.ram_mib - _memory(layout, shape)["host"].total_mib)
    chosen = 0 if budget.least else int(min(CACHE_RAM_DEFAULT_MIB, left / 2) // CTX_STEP * CTX_STEP)
    settings = dataclasses.replace(layout.settings, cache_ram_mib=chosen)
    why = f"half of the {left:.0f} MiB RAM left, at most 8192 MiB"
    return dataclasses.replace(layout, settings=settings), Choice(chosen, why)


def _checkpoints(asked: LlamaServerSettings, shape: ModelShape) -> Choice:
    return as_asked(asked.ctx_checkpoints) or checkpoints(shape, swa_full=bool(asked.swa_full))


# --- reasons ---------------------------------------------------------------------------------------------------


def _choices(asked: LlamaServerSettings, prefer: Prefer, shape: ModelShape, layout: Layout) -> dict[str, Choice]:
    """Give every setting that memory depends on with its reason."""
    settings = layout.settings
    return {
        "ctx_size": as_asked(asked.ctx_size) or Choice(layout.ctx_size, _ctx_why(prefer, shape, layout)),
        "parallel": as_asked(asked.parallel) or Choice(1, "one request at a time gets the whole context"),
        "kv_unified": as_asked(asked.kv_unified) or Choice(False, "each slot keeps its own share of the context"),  # noqa: FBT003
        "gpu_layers": as_asked(asked.gpu_layers) or Choice(settings.gpu_layers, _layers_why(shape, layout)),
        "n_cpu_moe": as_asked(asked.n_cpu_moe) or Choice(settings.n_cpu_moe, _experts_why(shape, layout)),
        "gpus": as_asked(asked.gpus) or Choice(tuple(gpu.index for gpu in layout.gpus), _gpus_why(layout)),
        "tensor_split": as_asked(asked.tensor_split) or Choice(_whole(settings.tensor_split), _split_why(layout)),
        "batch_size": as_asked(asked.batch_size) or Choice(2048, "llama-server's default"),
        "ubatch_size": as_asked(asked.ubatch_size)
        or Choice(512, "llama-server's default; compute memory grows with it"),
        "cache_type_k": as_asked(asked.cache_type_k) or _cache_choice(settings.cache_type_k),
        "cache_type_v": as_asked(asked.cache_type_v) or _cache_choice(settings.cache_type_v),
        "flash_attn": as_asked(asked.flash_attn) or Choice("on", "without it compute memory grows with the context"),
        "ctx_checkpoints": _checkpoints(asked, shape),
        **({} if asked.swa_full is None else {"swa_full": Choice(asked.swa_full, "as the inventory says")}),
        "load_mode": as_asked(asked.load_mode)
        or Choice("auto", "maps the file, so that a restart reads it from cache"),
        **beside.choices(asked, layout),
    }


def _ctx_why(prefer: Prefer, shape: ModelShape, layout: Layout) -> str:
    slots, settings = layout.settings.parallel, layout.settings
    most = shape.n_ctx_train * slots
    every = settings.gpu_layers > shape.n_layer_all
    if layout.ctx_size == most:
        return f"all {shape.n_ctx_train} trained tokens fit" + (f" for each of {slots} slots" if slots > 1 else "")
    if prefer == "context" or not layout.gpus or (every and not settings.n_cpu_moe):
        return f"the largest that fits, of {most} trained"
    if every:
        return f"what costs the experts of one block at most, of {most} trained; prefer: context takes more"
    return f"the least useful, so that more layers fit on the GPU; prefer: context takes up to {most}"


def _layers_why(shape: ModelShape, layout: Layout) -> str:
    most, names = shape.n_layer_all + 1, " and ".join(gpu.id for gpu in layout.gpus)
    if not layout.gpus:
        return "no GPU to put layers on"
    if layout.settings.gpu_layers == most:
        return f"all {most - 1} blocks and the output layer fit on {names}"
    free = " + ".join(f"{gpu.free_mib:.0f}" for gpu in layout.gpus)
    return f"{layout.settings.gpu_layers} of {most} layers fit in {free} MiB with this context"


def _experts_why(shape: ModelShape, layout: Layout) -> str:
    n, used = layout.settings.n_cpu_moe, f"{shape.n_expert_used} of {shape.n_expert}"
    if not n:
        return "no experts need to stay in RAM"
    if layout.settings.gpu_layers > shape.n_layer_all:
        return f"experts of {n} of {shape.n_layer_all} blocks stay in RAM, of which a token reads {used}; the rest fits"
    return f"all experts stay in RAM, of which a token reads {used}: so more of the other layers fits on the GPU"


def _gpus_why(layout: Layout) -> str:
    if not layout.gpus:
        return "none holds a layer of it"
    return "one is enough" if len(layout.gpus) == 1 else "fewer hold less of it, or less context"


def _whole(split: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(share) for share in split)


def _split_why(layout: Layout) -> str:
    frees = " and ".join(f"{gpu.free_mib:.0f}" for gpu in layout.gpus)
    return f"layers on each GPU, so that each keeps the same part of its {frees} MiB; the last one has the output layer"


def _cache_choice(kind: str) -> Choice:
    return Choice(kind, "exact; q8_0 halves it" if kind == "f16" else "in f16 it fits nowhere; q8_0 is half of that")


def _that_matter(request: Request, tuning: _Tuning, shape: ModelShape) -> dict[str, Choice]:
    """Leave out settings that mean nothing here, as a split over one GPU; say what is preferred where it matters."""
    dropped = set() if len(tuning.gpus) > 1 else {"tensor_split"}
    dropped |= set() if tuning.gpus and shape.n_expert else {"n_cpu_moe"}
    dropped |= set() if len(tuning.gpus) > 1 or request.settings.gpus is not None else {"gpus"}
    preferred = {"prefer": prefer_choice(request.prefer)} if tuning.gpus else {}
    return preferred | {key: choice for key, choice in tuning.choices.items() if key not in dropped}


# --- memory ----------------------------------------------------------------------------------------------------


def _memory(layout: Layout, shape: ModelShape) -> dict[str, Memory]:
    """Give the memory on each device: the GPUs by their names in the plan, then `host`."""
    taken = needs(shape, layout.settings)
    on_gpus = {
        gpu.id: Memory(
            part.model_mib,
            part.context_mib,
            part.compute_mib,
            part.overhead_mib,
            mmproj_mib=part.mmproj_mib,
            draft_mib=part.draft_mib,
        )
        for gpu, part in zip(layout.gpus, taken.gpus, strict=True)
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
            host.mmproj_mib,
            host.draft_mib,
        ),
    }


def _shortfall(
    asked: LlamaServerSettings, layout: Layout, taken: Mapping[str, Memory], budget: Budget
) -> Iterator[str]:
    """Say by how much each device is too small, and that layers were asked to go to a GPU where there is none."""
    if asked.gpu_layers and not layout.gpus:
        yield f"gpu_layers {asked.gpu_layers} needs a GPU, and there is none for it"
    for gpu in layout.gpus:
        yield from too_much(gpu.id, taken[gpu.id].total_mib, gpu.free_mib)
    yield from too_much("RAM", taken["host"].total_mib, budget.ram_mib)


# --- what would make it fit --------------------------------------------------------------------------------------


def _offers(asked: LlamaServerSettings, prefer: Prefer, models: Models, budget: Budget) -> Iterator[str]:
    """Give lines that make a service fit its budget, least loss first; docs/planning.md says the order."""

    def tuned(prefer_now: Prefer = prefer, **changes: Any) -> _Tuning | None:  # noqa: ANN401
        return _fitting(dataclasses.replace(asked, **changes), prefer_now, models, budget)

    yield from _lossless_ways(asked, tuned)
    yield from _slower_prompts(asked, models.shape, tuned)
    yield from beside.ways_to_fit(asked, models, tuned)
    q8_0_works = _q8_0_works(asked, models.shape)
    if q8_0_works and asked.cache_type_k is None and asked.cache_type_v is None and tuned(prefer, **Q8_0):
        yield "cache_type_k: q8_0, cache_type_v: q8_0"
    context, layers = list(_less_context(asked, tuned)), list(_fewer_layers(asked, tuned))
    yield from (*layers, *context) if prefer == "context" else (*context, *layers)
    for n in (n for n in (8, 4, 2, 1) if n < (asked.parallel or 1)):
        if tuned(parallel=n):
            yield f"parallel: {n}"
            break
    if not context and q8_0_works:
        yield from (f"{line}, cache_type_k: q8_0, cache_type_v: q8_0" for line in _less_context(asked, tuned, **Q8_0))
    if asked.gpu_layers and (both := tuned("context", gpu_layers=None, n_cpu_moe=None, ctx_size=None)):
        yield f"{_layers_line(both)}, ctx_size: {_round_ctx(both)}"


def _lossless_ways(asked: LlamaServerSettings, tuned: Callable[..., _Tuning | None]) -> Iterator[str]:
    """Give what costs no request anything: other GPUs, another split, flash attention, a smaller prompt cache."""
    if asked.gpus is not None and (found := tuned(gpus=None, tensor_split=None)) and found.gpus:
        yield f"gpus: [{','.join(str(gpu.index) for gpu in found.gpus)}]"
    if asked.tensor_split and (found := tuned(tensor_split=None)) and found.value("tensor_split"):
        yield f"tensor_split: [{','.join(map(str, found.value('tensor_split')))}]"
    if asked.flash_attn == "off" and tuned(flash_attn="on"):
        yield "flash_attn: on"
    if asked.cache_ram and (found := tuned(cache_ram=None)):
        yield f"cache_ram: {min(asked.cache_ram, 2 * found.value('cache_ram'))}MiB"
        yield f"cache_ram: {found.value('cache_ram')}MiB"


def _slower_prompts(
    asked: LlamaServerSettings, shape: ModelShape, tuned: Callable[..., _Tuning | None]
) -> Iterator[str]:
    """Give what makes prompts slower: fewer checkpoints to go back to, windows that slide, smaller batches."""
    if _checkpoints(asked, shape).value and tuned(ctx_checkpoints=0):
        yield "ctx_checkpoints: 0"
    if asked.swa_full and tuned(swa_full=False):
        yield "swa_full: false"
    smaller = [n for n in (512, 256, 128) if n < (asked.ubatch_size or 512)]
    if found := next((n for n in smaller if tuned(ubatch_size=n)), None):
        yield f"ubatch_size: {found}"


def _less_context(asked: LlamaServerSettings, tuned: Callable[..., _Tuning | None], **also: str) -> Iterator[str]:
    """Give the longest context that fits with all else as asked."""
    found = tuned("context", ctx_size=None, **also) if asked.ctx_size else None
    if found and found.layout.ctx_size < (asked.ctx_size or 0):
        yield f"ctx_size: {_round_ctx(found)}"
        return
    shorter = (n for n in (2048, 1024, 512) if n < (asked.ctx_size or LEAST_CTX) and tuned(ctx_size=n, **also))
    if n := next(shorter, None):
        yield f"ctx_size: {n}"


def _fewer_layers(asked: LlamaServerSettings, tuned: Callable[..., _Tuning | None]) -> Iterator[str]:
    """Give more experts in RAM, then fewer layers on the GPU, where the inventory says how many."""
    if asked.n_cpu_moe is not None and (found := tuned(n_cpu_moe=None)) and found.gpus:
        yield f"n_cpu_moe: {found.layout.settings.n_cpu_moe}"
    if asked.gpu_layers and (found := tuned(gpu_layers=None, n_cpu_moe=None)):
        yield _layers_line(found)


def _layers_line(found: _Tuning) -> str:
    settings = found.layout.settings
    experts = f", n_cpu_moe: {settings.n_cpu_moe}" if settings.n_cpu_moe else ""
    return f"gpu_layers: {settings.gpu_layers}{experts}"


def _round_ctx(found: _Tuning) -> int:
    """Round a context down to what people write."""
    return found.layout.ctx_size // 1024 * 1024 or found.layout.ctx_size


# --- what else to say --------------------------------------------------------------------------------------------


def _slot_ctx(tuning: _Tuning, shape: ModelShape) -> int:
    """Give the context one request gets: what /v1/models must report once it runs."""
    total = -(-tuning.layout.ctx_size // CTX_STEP) * CTX_STEP
    slots = 1 if tuning.layout.settings.kv_unified else tuning.layout.settings.parallel
    return min(-(-(total // slots) // CTX_STEP) * CTX_STEP, shape.n_ctx_train)


def _warnings(request: Request, tuning: _Tuning, shape: ModelShape) -> Iterator[str]:
    if not shape.known_arch:
        yield f"architecture {shape.arch} is planned by the general formula; expect more or less memory"
    if tuning.value("ctx_size") > shape.n_ctx_train * tuning.value("parallel"):
        yield f"ctx_size {tuning.value('ctx_size')} is beyond the {shape.n_ctx_train} tokens the model was trained for"
    if tuning.layout.settings.cache_type_k == "q8_0" and request.settings.cache_type_k is None:
        yield "the KV cache is in q8_0, because in f16 it fits nowhere: answers differ a little from those of f16"
    yield from beside.warnings(tuning.layout.settings, shape)
    yield from uncounted(request, UNCOUNTED_FLAGS)
    if pair := _slow_cache(tuning):
        yield f"cache types {pair}: CUDA builds have kernels for twice the same of f16, bf16, q8_0, q4_0 only"
    if not ipaddress.ip_address(request.bind).is_loopback and not request.api_key_file:
        yield f"listens on {request.bind} without an API key: anyone who reaches the port can use it"


def _slow_cache(tuning: _Tuning) -> str:
    """Name a pair of cache types that flash attention on CUDA has no kernel for, unless built for all (#28455)."""
    k, v = tuning.layout.settings.cache_type_k, tuning.layout.settings.cache_type_v
    on_cuda = any(gpu.gpu.api == "cuda" for gpu in tuning.gpus) and tuning.layout.settings.flash_attn
    return f"{k} and {v}" if on_cuda and (k != v or k not in ("f16", "bf16", "q8_0", "q4_0")) else ""


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
        *beside.words(request, value),
        *("--fit", "off"),
        *("--cache-ram", str(value["cache_ram"])),
        *("--ctx-checkpoints", str(value["ctx_checkpoints"])),
        *(("--swa-full",) if value.get("swa_full") else ()),
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
