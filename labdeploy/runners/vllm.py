"""vLLM: its settings, how they are chosen, and its command line.

Facts about flags are of vLLM 0.33.0 unless said otherwise; docs/planning.md explains the choices for people.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from labdeploy.errors import InventoryError
from labdeploy.runners import vllm_span
from labdeploy.runners.base import (
    DEVICE_ENV,
    Budget,
    Choice,
    GpuBudget,
    Health,
    Part,
    Prefer,
    Request,
    ServicePlan,
    as_asked,
    credential_path,
    device_env,
    start_timeout_s,
    uncounted,
)
from labdeploy.runners.vllm_memory import (
    CONTEXT_MIB,
    CPU_BATCH,
    MOST_UTILIZATION,
    Engine,
    hundredths,
    memory,
)
from labdeploy.runners.vllm_settings import OWNED_ENV, OWNED_FLAGS, UNCOUNTED_FLAGS, VllmSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from labdeploy.models.safetensors import Snapshot

COLD_START_S = 1800  # imports, a cold torch.compile and CUDA graphs of a new model or version
EAGER_START_S = 600  # imports of three processes on a busy machine; nothing is compiled
STOP_GRACE_S = 30  # beyond --shutdown-timeout, for the workers to leave
RESTART_S = 15
STARTS = 4  # that may fail in a row before the unit stays failed
METRICS = tuple(
    f"vllm:{name}"
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
    )
)

# (max_num_seqs, max_num_batched_tokens): vLLM's defaults from 70 GiB on and below (engine/arg_utils.py), then fewer
# requests, which leave more to the KV cache.
BIG_GPU_MIB = 70 * 1024
BIG_BATCH = (1024, 8192)
BATCHES = ((256, 2048), (128, 2048), (64, 2048))

NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")  # config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS
# Least compute capability by quantization (docs/features/quantization, quantization/*.get_min_capability).
LEAST_CAPABILITY = (7, 5)
QUANTIZATION_CAPABILITY = {
    "mxfp4": (8, 0),
    "modelopt": (8, 0),
    "experts_int8": (8, 0),
    "fbgemm_fp8": (8, 0),
    "quark": (8, 9),
    "fp_quant": (10, 0),
}
BF16_CAPABILITY = (8, 0)
ENOUGH_CONTEXT = 0.5  # of what more GPUs would hold, mostly the model's own; more GPUs pay for what is left by latency
FP8_CAPABILITY = (8, 9)


class Vllm:
    """The runner `vllm`."""

    name = "vllm"
    settings = VllmSettings
    default_binary = "/opt/labdeploy/runners/vllm/current/bin/vllm"
    owned_flags = OWNED_FLAGS
    owned_env = DEVICE_ENV | OWNED_ENV
    measures_gpu = True
    sizes_itself = True

    def plan(self, request: Request, budget: Budget) -> ServicePlan:
        """Choose every setting that matters; what the inventory says always wins and is still checked."""
        snapshot = _snapshot(request)
        _refuse_contradictions(request, snapshot)
        engine, most = _tune(request.settings, request.prefer or "speed", snapshot, budget)
        if request.part and not engine.gpus and vllm_span.engine_of(engine) == "ray":
            what = "engine: ray needs GPUs: vLLM's CPU builds do not support Ray"
            _refuse(request, what, "leave engine out: vLLM then joins the hosts itself")
        settings = _choices(request, engine, most)
        deadline_s = start_timeout_s(
            request.model.size_bytes, budget.disk_mib_per_s, base_s=EAGER_START_S if engine.eager else COLD_START_S
        )
        stop_timeout_s = settings["shutdown_timeout"].value + STOP_GRACE_S
        argv = _argv(request, engine, settings)
        part = request.part
        return ServicePlan(
            name=request.name,
            unit=request.unit,
            runner=self.name,
            model=request.model.name,
            bind=request.bind,
            port=request.port,
            settings=settings,
            memory=memory(engine),
            argv=argv,
            env={**_env(engine, budget, part), **request.env},
            gpus=engine.gpus,
            health=Health(
                ready_path="" if part and part.rank else "/health",
                model=settings["served_model_name"].value,
                deadline_s=deadline_s,
                n_ctx=None if part and part.rank else engine.max_model_len,
            ),
            metrics=() if part and part.rank else METRICS,
            part=part,
            stop_timeout_s=stop_timeout_s,
            model_path=request.model.path,
            model_bytes=request.model.size_bytes,
            api_key_file=request.api_key_file,
            shortfall=tuple(_shortfall(engine, budget)),
            offers=functools.partial(_offers, engine),
            warnings=tuple(_warnings(request, engine, budget)),
            facts={
                "exec": _with_key(request, vllm_span.command(engine, part, argv) if part else argv),
                "build": PurePosixPath(request.binary).parent.parent.name or "default",
                "restart_s": RESTART_S,
                "starts": STARTS,
                # A part waits for the others for as long as their hosts are down.
                "start_limit_s": 0 if part else STARTS * (deadline_s + stop_timeout_s + RESTART_S),
                **(vllm_span.facts(part, engine, settings["shutdown_timeout"].value) if part else {}),
            },
        )


RUNNER = Vllm()


# --- what vLLM would refuse -------------------------------------------------------------------------------------


def _snapshot(request: Request) -> Snapshot:
    if request.model.snapshot is None:
        _refuse(request, "vLLM no longer loads GGUF files", "write runner: llama-server, or name a snapshot folder")
    return request.model.snapshot


def _refuse_contradictions(request: Request, snapshot: Snapshot) -> None:
    """Raise what no hardware could mend: vLLM would exit with these some 20 s after its start."""
    asked = request.settings
    if asked.max_model_len and asked.max_model_len > snapshot.max_model_len:
        what = f"max_model_len {asked.max_model_len} is beyond the {snapshot.max_model_len} tokens of the model"
        _refuse(request, what, f"write max_model_len: {snapshot.max_model_len}, or leave it out")
    if asked.quantization and snapshot.quantization not in (None, asked.quantization):
        what = f"quantization {asked.quantization} is not {snapshot.quantization}, which the model is stored in"
        _refuse(request, what, "leave quantization out")
    seqs, tokens = asked.max_num_seqs, asked.max_num_batched_tokens
    if seqs and tokens and tokens < seqs:
        what = f"max_num_batched_tokens {tokens} is less than max_num_seqs {seqs}"
        _refuse(request, what, f"write max_num_batched_tokens: {seqs} or more")
    tp = asked.tensor_parallel_size
    if tp and not _splits(snapshot, tp):
        good = [str(n) for n in range(1, 65) if _splits(snapshot, n)]
        what = f"{snapshot.n_attention_heads} attention heads do not split over tensor_parallel_size {tp}"
        _refuse(request, what, f"write tensor_parallel_size: {' or '.join(good)}")
    if tp and asked.gpus is not None and len(asked.gpus) < tp:
        what = f"tensor_parallel_size {tp} needs {tp} GPUs, gpus names {len(asked.gpus)}"
        _refuse(request, what, "name more under gpus, or leave tensor_parallel_size out")


def _refuse(request: Request, what: str, hint: str) -> NoReturn:
    raise InventoryError(what, where=request.name, hint=hint)


def _splits(snapshot: Snapshot, tp: int) -> bool:
    """Tell whether attention splits over so many GPUs; fewer KV heads than GPUs are kept several times."""
    kv = snapshot.n_key_value_heads
    return snapshot.n_attention_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)


# --- choosing ---------------------------------------------------------------------------------------------------


def _tune(asked: VllmSettings, prefer: Prefer, snapshot: Snapshot, budget: Budget) -> tuple[Engine, int]:
    """Take as few equal GPUs as hold the model and enough context, else the CPU; with it, the most that any hold.

    Enough is half of the most, for every GPU more costs time in each layer; with `prefer: context` it is all of it.
    Only the model counts where the least need is asked for. Where nothing fits the largest set is planned, so that the
    plan says by how much.
    """
    sets = _gpu_sets(asked, snapshot, budget)
    engines = [_widest(asked, snapshot, gpus, budget) for gpus in sets] or [_on_cpu(asked, snapshot, budget)]
    fitting = [engine for engine in engines if engine.fits]
    most = max((engine.max_model_len for engine in fitting), default=0)
    enough = 0 if budget.least else most if prefer == "context" else ENOUGH_CONTEXT * most
    return next((engine for engine in fitting if engine.max_model_len >= enough), engines[-1]), most


def _usable(budget: Budget) -> tuple[GpuBudget, ...]:
    """Give the GPUs that vLLM has a build for: it computes with CUDA or ROCm, not with Vulkan."""
    return tuple(gpu for gpu in budget.gpus if gpu.gpu.api in ("cuda", "rocm"))


def _gpu_sets(asked: VllmSettings, snapshot: Snapshot, budget: Budget) -> list[tuple[GpuBudget, ...]]:
    """List the sets of GPUs to try: one GPU, then more, of one kind each, the emptiest first."""
    allowed = [gpu for gpu in _usable(budget) if asked.gpus is None or gpu.index in asked.gpus]
    kinds: dict[tuple[str, int], list[GpuBudget]] = {}
    for gpu in sorted(allowed, key=lambda gpu: (-gpu.free_mib, gpu.index)):
        kinds.setdefault((gpu.gpu.name, gpu.total_mib), []).append(gpu)
    most = max((len(kind) for kind in kinds.values()), default=0)
    counts = range(1, most + 1) if asked.tensor_parallel_size is None else (asked.tensor_parallel_size,)
    sets = [kind[:n] for n in counts if _splits(snapshot, n) for kind in kinds.values() if len(kind) >= n]
    in_order = [tuple(sorted(gpus, key=lambda gpu: gpu.index)) for gpus in sets]
    return sorted(in_order, key=lambda gpus: (len(gpus), -min(gpu.free_mib for gpu in gpus)))


def _share_mib(gpus: tuple[GpuBudget, ...], asked: VllmSettings, budget: Budget) -> float:
    """Give what this service may take of each of its GPUs, while others that size themselves still wait.

    With as many GPUs as services everyone gets one whole; what is pinned to the same GPU shares it.
    """
    pool = len(asked.gpus) if asked.gpus is not None else len(_usable(budget))
    sharers = -(-budget.gpu_sharers * len(gpus) // max(1, pool))
    free = min(gpu.free_mib for gpu in gpus)
    fixed = asked.gpu_memory_utilization is not None or asked.kv_cache_memory is not None
    return free if fixed else free / sharers


def _widest(asked: VllmSettings, snapshot: Snapshot, gpus: tuple[GpuBudget, ...], budget: Budget) -> Engine:
    """Give the widest batch that leaves room for the whole context, else the narrowest, with the longest context.

    So more memory never means less context.
    """
    big = min(gpu.total_mib for gpu in gpus) >= BIG_GPU_MIB
    for seqs, tokens in (BIG_BATCH, *BATCHES) if big else BATCHES:
        engine = _engine(asked, snapshot, gpus, (seqs, tokens), _share_mib(gpus, asked, budget))
        if engine.fits and (asked.max_model_len or engine.longest == snapshot.default_model_len):
            break
    return engine


def _on_cpu(asked: VllmSettings, snapshot: Snapshot, budget: Budget) -> Engine:
    return _engine(asked, snapshot, (), CPU_BATCH, budget.ram_mib)


def _engine(
    asked: VllmSettings,
    snapshot: Snapshot,
    gpus: tuple[GpuBudget, ...],
    batch: tuple[int, int],
    share_mib: float,
) -> Engine:
    tokens = asked.max_num_batched_tokens or max(batch[1], asked.max_num_seqs or 0)
    return Engine(
        asked=asked,
        snapshot=snapshot,
        gpus=gpus,
        dtype=asked.dtype or _dtype(snapshot, gpus),
        max_num_seqs=asked.max_num_seqs or min(batch[0], tokens),
        max_num_batched_tokens=tokens,
        share_mib=share_mib,
    )


def _dtype(snapshot: Snapshot, gpus: tuple[GpuBudget, ...]) -> str:
    """Do as vLLM's `auto` (config/model.py, _resolve_auto_dtype), and say it: bfloat16 needs 8.0 or a CPU."""
    wanted = "bfloat16" if snapshot.dtype == "float32" else snapshot.dtype
    too_old = (_capability(gpus) or BF16_CAPABILITY) < BF16_CAPABILITY
    if too_old and wanted == "bfloat16":
        wanted = "float16"
    if wanted == "float16" and snapshot.model_type in NO_FLOAT16:
        return "float32" if too_old else "bfloat16"
    return wanted


def _capability(gpus: tuple[GpuBudget, ...]) -> tuple[int, int] | None:
    """Give the least compute capability of NVIDIA GPUs, where all are known."""
    known = [gpu.gpu.compute_capability for gpu in gpus if gpu.gpu.api == "cuda"]
    if not known or None in known:
        return None
    return min((int(text.split(".")[0]), int(text.split(".")[1])) for text in known if text)


# --- what does not fit, and what to know ------------------------------------------------------------------------


def _shortfall(engine: Engine, budget: Budget) -> Iterator[str]:
    """Say by how much memory is too small, and what the GPUs cannot do."""
    asked = engine.asked
    if asked.tensor_parallel_size and len(engine.gpus) != asked.tensor_parallel_size:
        n = asked.tensor_parallel_size
        yield f"tensor_parallel_size {n} needs {n} equal GPUs with CUDA or ROCm, the host has fewer for it"
    elif asked.gpus and not engine.gpus:
        yield "gpus names none that vLLM can compute on: it needs CUDA or ROCm"
    yield from _too_little(engine)
    yield from _too_little_ram(engine, budget)
    yield from _too_old(engine)


def _too_little(engine: Engine) -> Iterator[str]:
    if engine.fits:
        return
    where = " and ".join(gpu.id for gpu in engine.gpus) or "RAM"
    kv, asked_kv = engine.kv_mib(engine.least_len), engine.asked.kv_cache_memory
    least = engine.counted_mib + engine.uncounted_mib + max(kv, asked_kv or 0)
    if asked_kv is not None and asked_kv < kv:
        yield f"kv_cache_memory {asked_kv} MiB does not hold {engine.least_len} tokens: they take {kv:.0f} MiB"
    if least > engine.share_mib:
        parts = f"weights {engine.model_mib:.0f}, compute {engine.compute_mib:.0f}"
        parts += f", {engine.least_len} tokens of KV cache {kv:.0f}"
        free, over = engine.share_mib, least - engine.share_mib
        yield f"{where}: needs {least:.0f} MiB ({parts}), {free:.0f} MiB are free for it: {over:.0f} MiB too much"
    elif engine.gpus and asked_kv is None:
        yield _wrong_utilization(engine, where, least)


def _too_little_ram(engine: Engine, budget: Budget) -> Iterator[str]:
    need = memory(engine)["host"].total_mib
    if engine.gpus and need > budget.ram_mib:
        over = need - budget.ram_mib
        yield f"RAM: needs {need:.0f} MiB, {budget.ram_mib:.0f} MiB are free: {over:.0f} MiB too much"


def _wrong_utilization(engine: Engine, where: str, least: float) -> str:
    """Say why a utilization does not work though the GPU is large enough."""
    total = engine.gpus[0].total_mib
    taken = engine.utilization * total + CONTEXT_MIB
    if taken > engine.share_mib:
        free = f"{engine.share_mib:.0f} MiB are free"
        return f"{where}: gpu_memory_utilization {engine.utilization} takes {taken:.0f} MiB, {free}"
    need = least - CONTEXT_MIB
    share = engine.utilization * total
    return f"{where}: gpu_memory_utilization {engine.utilization} gives {share:.0f} MiB, it needs {need:.0f} MiB"


def _too_old(engine: Engine) -> Iterator[str]:
    """Say what vLLM has no kernels for on these GPUs; its start would end with these."""
    capability = _capability(engine.gpus)
    if capability is None:
        return
    has = f"{' and '.join(gpu.id for gpu in engine.gpus)}: compute capability {_dotted(capability)}"
    quantization = engine.asked.quantization or engine.snapshot.quantization or ""
    wanted = QUANTIZATION_CAPABILITY.get(quantization, LEAST_CAPABILITY)
    if capability < LEAST_CAPABILITY:
        yield f"{has}, vLLM needs 7.5 or newer; serve a GGUF with llama-server there"
    elif capability < wanted:
        yield f"{has}, {quantization} needs {_dotted(wanted)}; take the model in another quantization"
    if engine.dtype == "bfloat16" and capability < BF16_CAPABILITY:
        yield f"{has}, bfloat16 needs 8.0; write dtype: float16"
    if (engine.asked.kv_cache_dtype or "").startswith("fp8") and capability < FP8_CAPABILITY:
        yield f"{has}, a KV cache in fp8 needs 8.9; write kv_cache_dtype: auto"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _offers(engine: Engine) -> Iterator[str]:
    """Give lines that make it fit where memory is too small, cheapest for its quality first."""
    asked = engine.asked
    changes: list[tuple[str, dict[str, Any]]] = []
    if engine.gpus and asked.kv_cache_memory is None:
        most = min(0.99, hundredths(engine.share_mib - engine.uncounted_mib, engine.gpus[0].total_mib))
        changes.append((f"gpu_memory_utilization: {most}", {"gpu_memory_utilization": most}))
    if asked.max_model_len and engine.longest:
        changes.append((f"max_model_len: {engine.longest}", {"max_model_len": engine.longest}))
    if engine.gpus and not engine.eager:
        changes.append(("enforce_eager: true", {"enforce_eager": True}))
    if engine.gpus and asked.kv_cache_dtype is None and (_capability(engine.gpus) or (0, 0)) >= FP8_CAPABILITY:
        changes.append(("kv_cache_dtype: fp8", {"kv_cache_dtype": "fp8"}))
    for line, change in changes:
        if dataclasses.replace(engine, asked=dataclasses.replace(asked, **change)).fits:
            yield line


def _warnings(request: Request, engine: Engine, budget: Budget) -> Iterator[str]:
    if request.prefer and len(_gpu_sets(request.settings, engine.snapshot, budget)) <= 1:
        yield "prefer changes nothing here: vLLM runs wholly on its devices, and it has no more GPUs to take"
    yield from _device_warnings(engine, budget)
    yield from _model_warnings(engine)
    yield from uncounted(request, UNCOUNTED_FLAGS)
    if part := request.part:
        yield f"what {' and '.join(part.hosts)} say to each other is not encrypted, and who can say it runs code there"
    if "/current/" in request.binary:
        yield "no build is named, so a rollback cannot bring back its vLLM: labdeploy runner install HOST vllm VERSION"
    if request.api_key_file:
        yield "the key guards /v1, /v2 and /inference; /invocations, /tokenize, /metrics and /docs answer without it"
    if ipaddress.ip_address(request.bind).is_loopback:
        return
    if not request.api_key_file and not (request.part and request.part.rank):
        yield f"listens on {request.bind} without an API key: anyone who reaches the port can use it"


def _device_warnings(engine: Engine, budget: Budget) -> Iterator[str]:
    capability = _capability(engine.gpus)
    if not engine.gpus:
        yield "runs on the CPU: that needs a build of vLLM made for CPUs, not the package for GPUs"
    if left_out := [gpu.id for gpu in budget.gpus if gpu not in _usable(budget)]:
        yield f"vLLM computes with CUDA or ROCm, so {' and '.join(left_out)} (Vulkan) is not used"
    if any(gpu.gpu.api == "rocm" for gpu in engine.gpus):
        yield "AMD GPUs need a build of vLLM made for ROCm, not the package for CUDA"
    elif engine.gpus and capability is None:
        yield "the compute capability of the GPU is not known, so what vLLM supports on it was not checked"


def _model_warnings(engine: Engine) -> Iterator[str]:
    snapshot, capability = engine.snapshot, _capability(engine.gpus)
    quantization = engine.asked.quantization or snapshot.quantization
    if snapshot.keeps_state:
        yield "some layers keep a state, not a KV cache: context memory is a guess, vLLM may refuse or fit more"
    if engine.dtype != snapshot.dtype and snapshot.dtype == "bfloat16":
        yield f"the model is in bfloat16, which these GPUs lack: it runs in {engine.dtype}"
    if quantization == "fp8" and capability and capability < FP8_CAPABILITY:
        yield "these GPUs do not compute in fp8: it saves memory, not time"
    if quantization == "bitsandbytes":
        yield "bitsandbytes left vLLM: install vllm-bnb-plugin beside it"
    if engine.asked.trust_remote_code:
        yield "trust_remote_code runs whatever Python the model brings along"


# --- settings, command line and environment ---------------------------------------------------------------------


def _choices(request: Request, engine: Engine, most: int) -> dict[str, Choice]:
    """Give every setting with its reason; `most` is the longest context that more GPUs would hold."""
    asked = request.settings
    choices = {
        **({"prefer": Choice(request.prefer, "as the inventory says")} if request.prefer else {}),
        "served_model_name": as_asked(asked.served_model_name)
        or Choice(request.model.name, "its name in the inventory"),
        "max_model_len": as_asked(asked.max_model_len) or _len_choice(engine, most),
        "max_num_seqs": as_asked(asked.max_num_seqs) or Choice(engine.max_num_seqs, _seqs_why(engine)),
        "max_num_batched_tokens": as_asked(asked.max_num_batched_tokens)
        or Choice(engine.max_num_batched_tokens, "vLLM's default for this memory; activations grow with it"),
        "dtype": as_asked(asked.dtype) or Choice(engine.dtype, f"the model is stored in {engine.snapshot.dtype}"),
        "kv_cache_dtype": as_asked(asked.kv_cache_dtype) or Choice("auto", "as dtype; fp8 halves it from 8.9 on"),
        "enforce_eager": as_asked(asked.enforce_eager) or _eager_choice(engine),
        "shutdown_timeout": as_asked(asked.shutdown_timeout)
        or Choice(30, "running requests end; vLLM's own 0 cuts them off, or hangs"),
    }
    if engine.gpus:
        choices["gpu_memory_utilization"] = as_asked(asked.gpu_memory_utilization) or _utilization_choice(engine)
        choices["tensor_parallel_size"] = as_asked(asked.tensor_parallel_size) or _tp_choice(request, engine)
    if request.part:
        choices |= _span_choices(request.part, engine)
    if asked.kv_cache_memory is not None or not engine.gpus:
        why = "half of the RAM left, at most what 16 requests use; vLLM would take nearly all RAM"
        choices["kv_cache_memory"] = as_asked(asked.kv_cache_memory) or Choice(max(1, int(_kv_mib(engine))), why)
    if quantization := asked.quantization or engine.snapshot.quantization:
        choices["quantization"] = as_asked(asked.quantization) or Choice(
            quantization, "as the model's config.json says"
        )
    if asked.trust_remote_code:
        choices["trust_remote_code"] = Choice(True, "as the inventory says")  # noqa: FBT003
    return choices


def _span_choices(part: Part, engine: Engine) -> dict[str, Choice]:
    """Say how a model is split over hosts."""
    asked, hosts = engine.asked, " and ".join(part.hosts)
    why_engine = "vLLM's own multi-node mode; ray, where the build has it too, does the same with more processes"
    choices = {
        "span": Choice(part.hosts, f"as the inventory says; {part.hosts[0]} answers"),
        "engine": as_asked(asked.engine) or Choice("mp", why_engine),
        "span_port": as_asked(asked.span_port)
        or Choice(asked.joins_at, f"where {part.hosts[0]} is joined, at {part.addresses[0]}"),
    }
    if engine.gpus:
        why = f"a stage of layers each on {hosts}: what passes between stages is little, between GPUs of a stage much"
        choices["pipeline_parallel_size"] = Choice(engine.pp, why)
    else:
        why = f"a part of every layer each on {hosts}: stages do not work in vLLM's CPU builds"
        choices["tensor_parallel_size"] = Choice(engine.tp, why)
    return choices


def _kv_mib(engine: Engine) -> float:
    return max(engine.room_mib, engine.kv_mib(engine.least_len))


def _len_choice(engine: Engine, most: int) -> Choice:
    every = engine.snapshot.default_model_len
    if engine.max_model_len == every:
        return Choice(every, f"all {every} tokens of the model fit, {engine.concurrency:.1f} such requests at once")
    kv = f"{max(0.0, engine.room_mib):.0f} MiB of KV cache"
    more = f"; prefer: context takes more GPUs, for {most}" if most > engine.max_model_len else ""
    return Choice(engine.max_model_len, f"the largest that fits one request in {kv}, of {every}{more}")


def _seqs_why(engine: Engine) -> str:
    if not engine.gpus:
        return "a CPU computes few requests at once"
    if engine.max_num_seqs >= BATCHES[0][0]:
        return "vLLM's default for a GPU of this size"
    return "fewer than vLLM's 256: their CUDA graphs and logits leave room for more context"


def _eager_choice(engine: Engine) -> Choice:
    if engine.gpus:
        return Choice(False, "compiled and with CUDA graphs, which decode faster")  # noqa: FBT003
    return Choice(True, "compiling for a CPU needs a C++ compiler on the host")  # noqa: FBT003


def _utilization_choice(engine: Engine) -> Choice:
    names = " and ".join(gpu.id for gpu in engine.gpus)
    total = engine.gpus[0].total_mib
    if engine.utilization == MOST_UTILIZATION:
        return Choice(engine.utilization, f"vLLM's default: {names} is its own")
    share = f"its {engine.share_mib:.0f} MiB of {total} MiB on {names}"
    return Choice(engine.utilization, f"{share}, less {CONTEXT_MIB} MiB for the CUDA context, which is not counted")


def _tp_choice(request: Request, engine: Engine) -> Choice:
    if engine.tp == 1:
        return Choice(1, f"{engine.gpus[0].id} alone holds it")
    names = " and ".join(gpu.id for gpu in engine.gpus)
    less = "less context" if request.prefer == "context" else "less than half of the context"
    return Choice(
        engine.tp, f"fewer equal GPUs hold {less}, or none: {engine.model_mib:.0f} MiB of weights on {names} each"
    )


def _argv(request: Request, engine: Engine, settings: Mapping[str, Choice]) -> tuple[str, ...]:
    """Write the command line; every tuned value stands here.

    `--quantization` only where the inventory names one: vLLM reads it from config.json and then takes the fastest
    kernels for it, while naming it can pin slower ones.
    """
    value = {key: choice.value for key, choice in settings.items()}
    words = [request.binary, "serve", request.model.path]
    words += ["--host", request.bind, "--port", str(request.port)]
    words += ["--served-model-name", value["served_model_name"]]
    for key in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "dtype", "kv_cache_dtype"):
        words += [_flag(key), str(value[key])]
    words += vllm_span.words(engine, request.part) if request.part else []
    for key in ("tensor_parallel_size", "gpu_memory_utilization") if engine.gpus else ():
        words += [_flag(key), f"{value[key]:g}"] if key in value else []
    if "kv_cache_memory" in value:
        words += ["--kv-cache-memory-bytes", f"{value['kv_cache_memory']}M"]  # vLLM's M is 1024 x 1024
    words += ["--enforce-eager"] if value["enforce_eager"] else []
    words += ["--quantization", value["quantization"]] if request.settings.quantization else []
    words += ["--trust-remote-code"] if value.get("trust_remote_code") else []
    words += ["--shutdown-timeout", str(value["shutdown_timeout"])]
    words += ["--disable-access-log-for-endpoints", "/health,/metrics"]
    return (*words, *request.flags)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _with_key(request: Request, argv: tuple[str, ...]) -> tuple[str, ...]:
    """Let vLLM find its API key where it looks for one that is not in argv: in its environment.

    The first line of the credential goes into VLLM_API_KEY. Without one it must not start: vLLM takes an empty
    key for none, and would serve everyone. The words of argv pass through the shell as they are.
    """
    if not request.api_key_file:
        return argv
    script = (
        'IFS= read -r VLLM_API_KEY < "$0";'
        ' [ -n "$VLLM_API_KEY" ] || { echo "the API key file holds no key in its first line" >&2; exit 2; };'
        ' export VLLM_API_KEY; exec "$@"'
    )
    return ("/bin/sh", "-c", script, credential_path(request), *argv)


def _env(engine: Engine, budget: Budget, part: Part | None) -> dict[str, str]:
    """Name the devices, and keep it from calling home or looking for models on the network."""
    env = {
        **device_env(engine.gpus, host_has_gpus=bool(budget.gpus)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_DISABLE_LOG_LOGO": "1",
        "PYTHONUNBUFFERED": "1",
        # Its processes find each other on this host alone; else gloo listens at the address of the host's name.
        **(vllm_span.env(engine, part) if part else {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}),
    }
    if engine.gpus:
        return env
    # One thread is left to the API server, which starves otherwise; binding is left to the kernel, because vLLM
    # does not know of the host's other services.
    threads = max(1, budget.threads - 1)
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    # --enforce-eager leaves some functions that are compiled at their first call, and that needs a C++ compiler: with
    # tensor parallelism the lookup of embeddings (vocab_parallel_embedding.py, 0.32.0).
    return env | {"TORCHDYNAMO_DISABLE": "1"} if engine.eager else env
