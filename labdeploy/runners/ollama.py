"""Ollama: its settings, how they are chosen, and its environment.

Facts are of Ollama 0.33 and hold from 0.30 on, which runs llama.cpp's llama-server for each loaded model and hands
its own environment down to it: so LLAMA_ARG_* in the unit set what Ollama has no variable for. Before 0.30 they
do nothing. The memory of a loaded model is therefore llama-server's.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from labdeploy.errors import InventoryError
from labdeploy.models.gguf import part_names
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
    gpu_sets,
    prefer_choice,
    start_timeout_s,
    too_much,
)
from labdeploy.runners.llama_context import KV_TYPES, refused_types
from labdeploy.runners.llama_memory import LlamaMemorySettings
from labdeploy.runners.llama_tuning import needs
from labdeploy.runners.ollama_env import (
    LLAMA_SERVER_SINCE,
    OWNED_ENV,
    SAFE_SINCE,
    Version,
    environment,
    gpu_environment,
    host_port,
    numbers,
    version_text,
)
from labdeploy.runners.ollama_store import Recipe, store_path
from labdeploy.schema import AbsolutePath, Block, Bool, Int, ListOf, Mib, OneOf, Size, Text, Verbatim, setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from labdeploy.models.shape import ModelShape

CTX_STEP = 256  # llama.cpp pads the context to this
LEAST_CTX = 4096  # what Ollama itself falls back to
CACHE_RAM_DEFAULT_MIB = 8192  # llama-server's own --cache-ram, for each loaded model
FIT_TARGET_MIB = 256
PROXY_MIB = 128  # Ollama's own process beside llama-server: an estimate, it holds no tensors
BASE_START_S = 120  # GPU discovery may take 30 s for each backend and 30 s more, before anything answers
STOP_S = 15  # it cuts what runs, kills its children and is gone; nothing is drained
DURATION = r"-1|\d+|(?:\d+(?:ms|s|m|h))+"

OLDEST_ASSUMED = ">=0.30"  # where its version is not known; the host compares
_OF_OUR_STORE = ("import_by", "template", "stop", "num_gpu")

# Ollama serves these one request at a time, whatever OLLAMA_NUM_PARALLEL says (server/sched.go).
ONE_AT_A_TIME = ("mllama", "qwen3vl", "qwen35", "qwen3next", "lfm2", "nemotron_h")


@dataclass(frozen=True)
class OllamaSettings:
    """What an inventory may say about an Ollama service. Names are its variables, without OLLAMA_, in lower case."""

    context_length: int | None = setting(
        Int(256, 16_777_216), "context of one request in tokens; default: the largest that fits", default=None
    )
    num_parallel: int | None = setting(Int(1, 256), "requests served at once, each with its own context", default=None)
    max_loaded_models: int | None = setting(
        Int(1, 64), "models held at once; memory is planned for the one named here", default=None
    )
    keep_alive: str | None = setting(
        Text("a duration", DURATION, "such as 24h, 90m or 300; -1 for ever"),
        "how long an idle model stays loaded; default: for ever",
        default=None,
    )
    kv_cache_type: str | None = setting(OneOf(KV_TYPES), "type of the KV cache", default=None)
    flash_attention: bool | None = setting(Bool(), "flash attention; default: where every GPU has it", default=None)
    gpus: tuple[int, ...] | None = setting(
        ListOf(Int(0, 63)), "indices of the host's GPUs it may use; default: as few as hold it", default=None
    )
    threads: int | None = setting(
        Int(1, 4096), "threads; default: fast physical cores, shared by the host's services", default=None
    )
    cache_ram: Mib | None = setting(
        Size(), "main memory for cached prompts; default: half of what is left, at most 8GiB", default=None
    )
    fit_target: Mib | None = setting(
        Size(), "memory that must stay free on each GPU, else layers go to the CPU", default=None
    )
    ctx_checkpoints: int | None = setting(
        Int(0, 1024), "context checkpoints per slot, for sliding-window and recurrent models", default=None
    )
    models: str | None = setting(
        AbsolutePath,
        "a store that Ollama keeps itself, owned by the user ollama; default: one that is made of the model",
        default=None,
    )
    import_by: str | None = setting(
        OneOf(("link", "copy", "api")),
        "how the model gets into its store; default: link, which takes no room",
        default=None,
    )
    num_gpu: int | None = setting(
        Int(0, 1024),
        "layers on the GPU, the output layer counted; default: what fits, by its llama-server",
        default=None,
    )
    template: str | None = setting(
        Block(), "prompt template in Ollama's own language; default: the one in the model file", default=None
    )
    stop: tuple[str, ...] | None = setting(ListOf(Verbatim()), "texts that end an answer", default=None)
    origins: tuple[str, ...] | None = setting(
        ListOf(Text("an origin", r"[^\s,]+")), "web pages that may use it, beside those of this host", default=None
    )


@dataclass(frozen=True)
class _Tuning:
    """One candidate: settings that memory depends on, each with its reason, and the GPUs they are for."""

    shape: ModelShape
    budget: Budget
    gpus: tuple[GpuBudget, ...]
    gpu_layers: int
    choices: Mapping[str, Choice]

    @property
    def is_whole(self) -> bool:
        """Whether all layers are on the GPU, the output layer too."""
        return self.gpu_layers > self.shape.n_layer_all

    def value(self, key: str) -> Any:  # noqa: ANN401
        return self.choices[key].value

    def but(self, **changes: Choice) -> _Tuning:
        """Give the same candidate with some settings changed."""
        return dataclasses.replace(self, choices={**self.choices, **changes})


class Ollama:
    """The runner `ollama`."""

    name = "ollama"
    settings = OllamaSettings
    default_binary = "/usr/local/bin/ollama"
    owned_flags: Mapping[str, str] = {}
    owned_env = DEVICE_ENV | OWNED_ENV
    measures_gpu = True
    sizes_itself = False

    def plan(self, request: Request, budget: Budget) -> ServicePlan:
        """Choose every setting that matters; what the inventory says always wins and is still checked."""
        asked, shape = request.settings, _shape(request)
        text = version_text(request)
        version = numbers(text) if text else None
        tuning = _with_prompt_cache(asked, _tune(request, shape, budget), version)
        if version is None or version >= LLAMA_SERVER_SINCE:
            _refuse_cache_type(tuning)
        preferred = {"prefer": prefer_choice(request.prefer)} if tuning.gpus else {}
        threads = as_asked(asked.threads) or Choice(budget.threads, budget.threads_why)
        store = _store(request, shape, _parameters(asked, tuning, threads.value))
        settings = {**preferred, **tuning.choices, "threads": threads, **_server_choices(asked), **store.choices}
        deadline_s = start_timeout_s(request.model.size_bytes, budget.disk_mib_per_s, base_s=BASE_START_S)
        env = environment(request, settings, version, deadline_s)
        env |= gpu_environment(tuning.gpus, host_has_gpus=bool(budget.gpus))
        n_ctx = min(tuning.value("context_length"), shape.n_ctx_train)
        return ServicePlan(
            name=request.name,
            unit=request.unit,
            runner=self.name,
            model=request.model.name,
            bind=request.bind,
            port=request.port,
            settings=settings,
            memory=_memory(tuning),
            argv=(request.binary, "serve"),
            env={**env, **request.env},
            gpus=tuning.gpus,
            health=Health(ready_path="/api/version", model=request.model.name, deadline_s=deadline_s, n_ctx=n_ctx),
            stop_timeout_s=STOP_S,
            model_path="" if asked.models else request.model.path,
            model_bytes=request.model.size_bytes,
            shortfall=tuple(_shortfall(tuning)),
            offers=functools.partial(_offers, tuning),
            warnings=tuple(_warnings(request, tuning, version)),
            cpu_layers=not tuning.is_whole,
            facts={"store": asked.models or "", "keeps_models": asked.import_by == "api"},
            host_facts={
                "ladder": self.name,
                "version": text or OLDEST_ASSUMED,
                "offload": "full" if tuning.gpus and tuning.is_whole else "",
                **store.facts,
            },
            host_files=store.files,
        )


RUNNER = Ollama()


def _shape(request: Request) -> ModelShape:
    """Give the shape of the model, and refuse what Ollama cannot be asked for."""
    if request.api_key_file:
        hint = "keep bind: 127.0.0.1 and put a reverse proxy that asks for the key before it"
        _refuse(request, "Ollama has no API keys: whoever reaches its port may use and change it", hint)
    if request.flags:
        _refuse(request, "ollama serve takes no flags", "write its variables under env:")
    named = [key for key in _OF_OUR_STORE if getattr(request.settings, key) is not None]
    if request.settings.models and named:
        what = f"{named[0]} is for a store that labdeploy makes, and models: names one that Ollama keeps"
        _refuse(request, what, f"take out one of the two; what is in {request.settings.models} is served as it is")
    if not request.settings.models and len(part_names(request.model.path)) > 1:
        what = f"{request.model.path} is one of several parts, and Ollama wants a model in one file"
        _refuse(request, what, "llama-gguf-split --merge FIRST-PART MERGED.gguf, then name that file under models:")
    if request.model.shape is None:
        what = "Ollama is planned for GGUF files, this model is a snapshot folder"
        _refuse(request, what, "write runner: vllm, or name a GGUF file of the model")
    return request.model.shape


def _refuse(request: Request, what: str, hint: str) -> NoReturn:
    raise InventoryError(what, where=request.name, hint=hint)


# --- choosing ---------------------------------------------------------------------------------------------------


def _tune(request: Request, shape: ModelShape, budget: Budget) -> _Tuning:
    """Place the model: all on as few GPUs as give it the longest context, else some layers, else the CPU.

    Only the GPUs of the plan are shown to Ollama. How many layers go to them its llama-server decides when it
    loads: it keeps `fit_target` free and puts the rest on the CPU, without an error.
    """
    asked, every = request.settings, shape.n_layer_all + 1
    layers = every if asked.num_gpu is None else min(asked.num_gpu, every)
    sets = _gpu_sets(asked, budget) if layers else []
    starts = [_start(asked, shape, budget, gpus, layers) for gpus in sets]
    whole = [_grown(asked, start) for start in starts if _fits(start)]
    best = max(whole, key=_context, default=None)
    longest = request.prefer == "context" and not budget.least
    if best and (not longest or _context(best) == (asked.context_length or shape.n_ctx_train)):
        return best
    if asked.num_gpu and starts:  # the inventory wins: where so many layers do not fit, the plan says so
        return best or starts[-1]
    found = [best] if best else []
    for start in starts[-1:]:
        fewer = [dataclasses.replace(start, gpu_layers=n) for n in range(1, every)]
        if longest:
            found += [_grown(asked, each) for each in reversed(fewer) if _fits(each)]
        elif some := _last_that_fits(fewer):
            return some
    on_cpu = _start(asked, shape, budget, (), 0)
    # The context grows on the CPU unless GPUs are in play: then it would shrink as they do.
    on_cpu = _grown(asked, on_cpu) if longest or not sets else on_cpu
    return max((each for each in (*found, on_cpu) if _fits(each)), key=_context, default=on_cpu)


def _context(tuning: _Tuning) -> int:
    length: int = tuning.value("context_length")
    return length


def _gpu_sets(asked: OllamaSettings, budget: Budget) -> list[tuple[GpuBudget, ...]]:
    """List the sets of GPUs of one runtime to try, small ones first; as asked, where asked."""
    if asked.gpus is not None:
        allowed = tuple(gpu for gpu in budget.gpus if gpu.index in asked.gpus)
        return [allowed] if allowed else []
    allowed = tuple(gpu for gpu in budget.gpus if gpu.gpu.api == budget.gpus[0].gpu.api)
    return gpu_sets(allowed)


def _start(
    asked: OllamaSettings, shape: ModelShape, budget: Budget, gpus: tuple[GpuBudget, ...], gpu_layers: int
) -> _Tuning:
    """Give a candidate with the context asked for, or the least useful one."""
    least = Choice(min(LEAST_CTX, shape.n_ctx_train), "the least useful: no more fits")
    choices = {
        "context_length": as_asked(asked.context_length) or least,
        "num_parallel": as_asked(asked.num_parallel) or Choice(1, "one request at a time gets all of it"),
        "kv_cache_type": as_asked(asked.kv_cache_type) or Choice("f16", "exact; q8_0 halves it"),
        "flash_attention": as_asked(asked.flash_attention) or _flash_attention(gpus),
        "fit_target": as_asked(asked.fit_target) or _fit_target(gpus),
        "ctx_checkpoints": as_asked(asked.ctx_checkpoints) or checkpoints(shape),
        "cache_ram": Choice(0, ""),
        "max_loaded_models": as_asked(asked.max_loaded_models) or Choice(1, "memory is planned for this one model"),
    }
    return _Tuning(shape, budget, gpus, gpu_layers, choices)


def _fit_target(gpus: tuple[GpuBudget, ...]) -> Choice:
    why = "the plan keeps its reserve anyway; with 1024, the default, layers that fit would go to the CPU"
    return Choice(FIT_TARGET_MIB, why if gpus else "no GPU is used")


def _refuse_cache_type(tuning: _Tuning) -> None:
    """Refuse a type of the KV cache with which the llama-server that Ollama starts would exit."""
    if why := _why_refused(tuning):
        raise InventoryError(f"kv_cache_type: {why}", hint="write kv_cache_type: f16, or leave it out")


def _why_refused(tuning: _Tuning) -> str:
    kind, flash_attn = tuning.value("kv_cache_type"), tuning.value("flash_attention") is not False
    return next((why for _, why in refused_types(kind, kind, tuning.shape, flash_attn=flash_attn)), "")


def _flash_attention(gpus: tuple[GpuBudget, ...]) -> Choice:
    """Force it only where every GPU is known to have it: forced on another one, a model may fail to load.

    llama.cpp has it for CUDA from compute capability 7.5 on in full, and not below 6.0 and on 7.2.
    """
    known = [gpu.gpu.compute_capability for gpu in gpus]
    capabilities = [tuple(map(int, text.split("."))) for text in known if text]
    if any(capability < (6, 0) or capability == (7, 2) for capability in capabilities):
        return Choice(False, "compute capability below 6.0, and 7.2, lack it")  # noqa: FBT003
    if len(capabilities) == len(gpus) and all(capability >= (7, 5) for capability in capabilities):
        return Choice(True, "without it compute memory grows with the context")  # noqa: FBT003
    return Choice("auto", "Ollama turns it on where every GPU has it")


def _grown(asked: OllamaSettings, tuning: _Tuning) -> _Tuning:
    """Give the candidate the largest context that fits, up to the trained one, where the inventory names none."""
    if asked.context_length is not None or tuning.budget.least:
        return tuning
    least, most = tuning.value("context_length"), tuning.shape.n_ctx_train
    largest, all_of_it = f"the largest that fits, of {most} trained", f"all {most} trained tokens fit"

    def longer(step: int) -> _Tuning:
        n = min(least + step * CTX_STEP, most)
        return tuning.but(context_length=Choice(n, all_of_it if n == most else largest))

    steps = range(1, -(-(most - least) // CTX_STEP) + 1)
    found = bisect.bisect_left(steps, x=True, key=lambda step: not _fits(longer(step)))
    return longer(found) if found else tuning


def _last_that_fits(candidates: list[_Tuning]) -> _Tuning | None:
    """Find the last candidate that fits its GPUs and RAM, each wanting more of the GPUs than the one before it."""
    found = bisect.bisect_left(candidates, x=True, key=lambda tuning: any(_gpu_shortfall(tuning)))
    return candidates[found - 1] if found and _fits(candidates[found - 1]) else None


def _with_prompt_cache(asked: OllamaSettings, tuning: _Tuning, version: Version | None) -> _Tuning:
    """Give the prompt cache half of the RAM that is left: its default of 8 GiB is what OOM kills are made of."""
    if version and version < LLAMA_SERVER_SINCE:
        return tuning.but(cache_ram=Choice(0, "Ollama before 0.30 keeps none"))
    left = max(0.0, tuning.budget.ram_mib - _memory(tuning)["host"].total_mib)
    n = tuning.value("max_loaded_models")
    chosen = 0 if tuning.budget.least else int(min(CACHE_RAM_DEFAULT_MIB, left / 2 / n) // CTX_STEP * CTX_STEP)
    why = f"half of the {left:.0f} MiB RAM left, at most 8192 MiB" + (f", for each of {n} models" if n > 1 else "")
    return tuning.but(cache_ram=as_asked(asked.cache_ram) or Choice(chosen, why))


def _server_choices(asked: OllamaSettings) -> dict[str, Choice]:
    """Give the settings that neither memory nor the store depends on."""
    return {"keep_alive": as_asked(asked.keep_alive) or Choice("-1", "a service keeps its model loaded")}


# --- the model's way into its store -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """Where the service's store is and why, and what the host is told and sent to make it."""

    choices: Mapping[str, Choice]
    facts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def _parameters(asked: OllamaSettings, tuning: _Tuning, threads: int) -> dict[str, Any]:
    """Give the parameters that the model is served with, by their names in a Modelfile.

    No number of layers unless one is asked for: with one, llama-server would not look at what is free.
    """
    parameters: dict[str, Any] = {"num_ctx": tuning.value("context_length"), "num_thread": threads}
    if asked.num_gpu is not None:
        parameters["num_gpu"] = asked.num_gpu
    if asked.stop:
        parameters["stop"] = list(asked.stop)
    return parameters


def _store(request: Request, shape: ModelShape, parameters: Mapping[str, Any]) -> _Store:
    """Give the store: one that is there, one beside the model that is made of it, or its own that the API fills."""
    asked, name = request.settings, request.name
    if asked.models:
        return _Store({"models": Choice(asked.models, "as the inventory says")})
    recipe = Recipe(request.model.name, request.model.path, shape, parameters, asked.template)
    by = as_asked(asked.import_by) or Choice("link", "a hard link: the model is on the disk once")
    told = {"import": str(by.value)}
    if by.value == "api":
        place = Choice(f"/var/lib/labdeploy-{name}/models", "its own state folder, which it may write")
        return _Store({"import_by": by, "models": place}, told, {f"stores/{name}/create.json": recipe.request})
    place = Choice(store_path(request.model.path, name, recipe.content_hash), "beside the model, and read-only for it")
    files = {f"stores/{name}/{path}": data for path, data in recipe.files.items()}
    return _Store({"import_by": by, "models": place}, told | {"store": str(place.value)}, files)


# --- memory -----------------------------------------------------------------------------------------------------


def _batch(context_length: int) -> int:
    """Give the batch that Ollama picks by the context (server/sched.go); where memory is short it takes less."""
    if context_length > 32_768:  # noqa: PLR2004 (its own steps)
        return 2048
    return 1024 if context_length > 4096 else 512  # noqa: PLR2004


def _memory_settings(tuning: _Tuning) -> LlamaMemorySettings:
    """Name the settings that memory depends on: Ollama runs `-c num_ctx*np -np np`, `-b` and `-ub` alike."""
    batch, slots = _batch(tuning.value("context_length")), tuning.value("num_parallel")
    shares = tuple(float(round(gpu.free_mib)) for gpu in tuning.gpus)
    return LlamaMemorySettings(
        ctx_size=tuning.value("context_length") * slots,
        parallel=slots,
        kv_unified=False,
        gpu_layers=tuning.gpu_layers,
        batch_size=batch,
        ubatch_size=batch,
        cache_type_k=tuning.value("kv_cache_type"),
        cache_type_v=tuning.value("kv_cache_type"),
        flash_attn=tuning.value("flash_attention") is not False,
        n_gpus=len(tuning.gpus),
        tensor_split=shares if len(shares) > 1 else (),
        repack=not tuning.gpus,
        cache_ram_mib=tuning.value("cache_ram") * tuning.value("max_loaded_models"),
        ctx_checkpoints=tuning.value("ctx_checkpoints"),
        cpu_flags=frozenset(tuning.budget.cpu_features),
    )


def _memory(tuning: _Tuning) -> dict[str, Memory]:
    """Give the memory on each device: the GPUs by their names in the plan, then `host`.

    Without a GPU Ollama loads the file instead of mapping it (`--load-mode none`): what is repacked is there once,
    and nothing of it could be dropped.
    """
    taken = needs(tuning.shape, _memory_settings(tuning))
    on_gpus = {
        gpu.id: Memory(part.model_mib, part.context_mib, part.compute_mib, part.overhead_mib)
        for gpu, part in zip(tuning.gpus, taken.gpus, strict=True)
    }
    host = taken.host
    on_host = Memory(
        host.model_mib,
        host.context_mib,
        host.compute_mib,
        host.overhead_mib + PROXY_MIB,
        host.repack_mib,
        host.cache_ram_mib + host.checkpoints_mib,
    )
    return {**on_gpus, "host": on_host}


def _gpu_shortfall(tuning: _Tuning) -> Iterator[str]:
    taken, target = _memory(tuning), tuning.value("fit_target")
    for gpu in tuning.gpus:
        yield from too_much(gpu.id, taken[gpu.id].total_mib + target, gpu.free_mib)


def _shortfall(tuning: _Tuning) -> Iterator[str]:
    """Say by how much each device is too small."""
    yield from _gpu_shortfall(tuning)
    yield from too_much("RAM", _memory(tuning)["host"].total_mib, tuning.budget.ram_mib)


def _fits(tuning: _Tuning) -> bool:
    return not any(_shortfall(tuning))


def _offers(tuning: _Tuning) -> Iterator[str]:
    """Give lines that make it fit where it does not, cheapest for its quality first."""
    if _fits(tuning.but(cache_ram=Choice(0, ""))):
        yield "cache_ram: 0MiB"
    smaller = tuning.but(kv_cache_type=Choice("q8_0", ""))
    if tuning.value("kv_cache_type") == "f16" and not _why_refused(smaller) and _fits(smaller):
        yield "kv_cache_type: q8_0"
    shorter = [*range(tuning.value("context_length") // 1024 * 1024, 1023, -1024), 512]
    shorter = [n for n in shorter if n < tuning.value("context_length")]
    found = bisect.bisect_left(shorter, x=True, key=lambda n: _fits(tuning.but(context_length=Choice(n, ""))))
    if found < len(shorter):
        yield f"context_length: {shorter[found]}"
    fewer = (n for n in (8, 4, 2, 1) if n < tuning.value("num_parallel"))
    if n := next((n for n in fewer if _fits(tuning.but(num_parallel=Choice(n, "")))), None):
        yield f"num_parallel: {n}"


def _warnings(request: Request, tuning: _Tuning, version: Version | None) -> Iterator[str]:
    shape, asked = tuning.shape, request.settings
    if request.bind not in ("127.0.0.1", "::1"):
        writable = asked.models or asked.import_by == "api"
        can = "use, replace and delete its models" if writable else "use it; its models it cannot change"
        yield (
            f"listens on {request.bind}: Ollama has no authentication, so whoever reaches port {request.port} can"
            f" {can}; bind 127.0.0.1, or let only trusted hosts through a firewall"
        )
    if not shape.known_arch:
        yield f"architecture {shape.arch} is planned by the general formula; expect more or less memory"
    if tuning.gpus and not tuning.is_whole:
        n, most = tuning.gpu_layers, shape.n_layer_all + 1
        yield f"only some {n} of {most} layers fit on the GPU; Ollama puts the others on the CPU, which is slow"
    elif tuning.budget.gpus and not tuning.gpus and asked.gpus != () and asked.num_gpu != 0:
        yield "no GPU can take a layer, so it runs on the CPU"
    if tuning.value("context_length") > shape.n_ctx_train:
        yield f"context_length is beyond the {shape.n_ctx_train} tokens the model was trained for: Ollama caps it"
    if tuning.value("num_parallel") > 1 and shape.arch.startswith(ONE_AT_A_TIME):
        yield f"Ollama serves {shape.arch} models one request at a time, whatever num_parallel says"
    if tuning.value("max_loaded_models") > 1:
        yield "max_loaded_models: memory is planned for one model; a second one pushes layers to the CPU"
    if asked.models:
        yield f"models: {asked.models} must belong to the user ollama: install -d -o ollama -g ollama {asked.models}"
        yield _create_line(request)
    yield from _version_warnings(tuning, asked, version)


def _version_warnings(tuning: _Tuning, asked: OllamaSettings, version: Version | None) -> Iterator[str]:
    """Say what an older Ollama does otherwise."""
    if version is None or version >= LLAMA_SERVER_SINCE:
        return
    shown_version = ".".join(map(str, version))
    if version < SAFE_SINCE:
        hole = "gives away its memory to whoever reaches its port (CVE-2026-7482)"
        yield f"Ollama {shown_version} {hole}: take 0.17.1 or newer"
    if idle := [key for key in ("cache_ram", "ctx_checkpoints") if getattr(asked, key) is not None]:
        yield f"{' and '.join(idle)}: nothing before Ollama 0.30, this is {shown_version}"
    if tuning.value("kv_cache_type") not in ("f16", "f32") and tuning.value("flash_attention") is not True:
        yield f"kv_cache_type: Ollama {shown_version} ignores it unless flash_attention: true stands beside it"


def _create_line(request: Request) -> str:
    """Say how the model gets into a store that is not ours."""
    source = shlex.quote(f"FROM {request.model.path}")
    at = f"OLLAMA_HOST={host_port(request)}"
    create = f"echo {source} > Modelfile && {at} {request.binary} create {request.model.name} -f Modelfile"
    return f"the model must be in this Ollama's store under the name {request.model.name}; once it runs: {create}"
