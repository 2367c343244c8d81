"""Look into a model, wherever it lies, and say what it is and what its memory is at several contexts.

A local file or folder, a file or folder on a host, or a file behind a URL: of all of them only headers are read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labdeploy import sources
from labdeploy.models import gguf, safetensors
from labdeploy.models.projector import is_projector, projector
from labdeploy.models.shape import ModelShape, model_shape
from labdeploy.runners.llama_memory import LlamaMemorySettings, memory
from labdeploy.runners.llama_mmproj import compute_bytes
from labdeploy.runners.vllm_memory import kv_cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from labdeploy.inventory import Inventory

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
PLOT_WIDTH = 54  # what is left of 79 columns beside the context and the sum
MARKS = "#=+"
KV_BLOCK_TOKENS = 16  # vLLM's block_size unasked (config/cache.py)


@dataclass(frozen=True)
class Inspection:
    """What a model is, in every form that is asked for."""

    lock_entry: dict[str, Any]
    json: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Row:
    """What a GGUF model takes at one context, in MiB: one slot, flash attention, nothing kept of earlier prompts."""

    n_ctx: int
    context: float
    context_q8_0: float
    weights: float
    scratch: float
    """On one GPU that holds all layers: compute buffers and what the driver takes for a process."""
    beside_gpu: float
    """In main memory, while all layers are on a GPU."""
    cpu: float
    """In main memory, without any GPU."""

    @property
    def gpu(self) -> float:
        """All of the GPU's memory."""
        return self.weights + self.context + self.scratch


def inspect(source: str, inventory: Inventory | None) -> Inspection:
    """Read a model's header and say what it costs; ModelError where it is none."""
    model = _read(source, inventory)
    if isinstance(model, safetensors.Snapshot):
        return _snapshot(source, model)
    return _projector(source, model) if is_projector(model) else _gguf(source, model)


def _read(source: str, inventory: Inventory | None) -> gguf.GgufHeader | safetensors.Snapshot:
    path = Path(source)
    if sources.is_url(source):
        return sources.read_url_gguf(source)
    if inventory is not None and not path.exists() and ":" in source:
        return _read_remote(source, inventory)
    return safetensors.read_snapshot(path) if path.is_dir() else gguf.read_header(path)


def _read_remote(source: str, inventory: Inventory) -> gguf.GgufHeader | safetensors.Snapshot:
    from labdeploy.host import HostConnection  # noqa: PLC0415

    name, _, path = source.partition(":")
    with HostConnection(inventory.host(name), inventory.folder) as connection:
        return sources.read_remote(connection, path)


# --- GGUF -----------------------------------------------------------------------------------------------------


def _gguf(source: str, header: gguf.GgufHeader) -> Inspection:
    shape = model_shape(header, source)
    rows = [_row(shape, n) for n in _contexts(shape.n_ctx_train)]
    facts = {
        "arch": shape.arch,
        "name": shape.name,
        "file_type": shape.file_type,
        "n_layer": shape.n_layer,
        "n_ctx_train": shape.n_ctx_train,
        "n_embd": shape.n_embd,
        "n_vocab": shape.n_vocab,
        "n_expert": shape.n_expert,
        "n_params": shape.n_params,
        "size_bytes": shape.size_bytes,
        "known_arch": shape.known_arch,
    }
    memory_mib = {str(row.n_ctx): _json_row(row) for row in rows}
    json = facts | {"context_mib": {str(row.n_ctx): round(row.context, 2) for row in rows}, "memory_mib": memory_mib}
    text = f"{_heading(source, facts)}\n{_table(rows)}\n{plot(rows)}"
    return Inspection(sources.lock_entry(header), json, text)


def _contexts(trained: int) -> list[int]:
    """Give the contexts to show: powers of two up to the trained one, and that one; 4096 always."""
    return sorted({n for n in (*CONTEXTS, trained) if n <= trained} | {CONTEXTS[0]})


def _row(shape: ModelShape, n_ctx: int) -> Row:
    alone = LlamaMemorySettings(ctx_size=n_ctx, cache_ram_mib=0, ctx_checkpoints=0)
    on_gpu = dataclasses.replace(alone, n_gpus=1, gpu_layers=shape.n_layer_all + 1, repack=False)
    cpu, with_gpu = memory(shape, alone).host, memory(shape, on_gpu)
    q8_0 = memory(shape, dataclasses.replace(alone, cache_type_k="q8_0", cache_type_v="q8_0")).host
    gpu = with_gpu.gpus[0]
    return Row(
        n_ctx=n_ctx,
        context=cpu.context_mib,
        context_q8_0=q8_0.context_mib,
        weights=gpu.model_mib,
        scratch=gpu.total_mib - gpu.model_mib - gpu.context_mib,
        beside_gpu=with_gpu.host.total_mib,
        cpu=cpu.total_mib,
    )


def _json_row(row: Row) -> dict[str, float]:
    figures = {key: value for key, value in dataclasses.asdict(row).items() if key != "n_ctx"}
    return {key: round(value, 2) for key, value in {**figures, "gpu": row.gpu}.items()}


def _table(rows: Iterable[Row]) -> str:
    head = ("CONTEXT", "KV F16", "KV Q8_0", "ON ONE GPU", "RAM BESIDE IT", "CPU ALONE")
    lines = [f"  {head[0]:>8}" + "".join(f"{title:>{max(9, len(title) + 2)}}" for title in head[1:])]
    for row in rows:
        figures = (row.context, row.context_q8_0, row.gpu, row.beside_gpu, row.cpu)
        widths = (max(9, len(title) + 2) for title in head[1:])
        cells = "".join(f"{figure:>{width}.0f}" for figure, width in zip(figures, widths, strict=True))
        lines.append(f"  {row.n_ctx:>8}{cells}")
    return "  memory in MiB, with one slot:\n" + "".join(f"{line}\n" for line in lines)


def plot(rows: Sequence[Row]) -> str:
    """Draw a bar for each context, of marks alone: it reads the same without colour and in a pipe."""
    most = max(row.gpu for row in rows)
    lines = [f"  all layers on one GPU: {MARKS[0]} weights  {MARKS[1]} context (f16)  {MARKS[2]} scratch"]
    for row in rows:
        bar = _bar((row.weights, row.context, row.scratch), most)
        lines.append(f"  {row.n_ctx:>8} |{bar:<{PLOT_WIDTH}} {row.gpu / 1024:>6.1f} GiB")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _bar(parts: Sequence[float], most: float) -> str:
    """Stack the parts; each ends where the sum up to it is, so that rounding does not add up."""
    ends = [round(sum(parts[: i + 1]) / most * PLOT_WIDTH) for i in range(len(parts))]
    starts = [0, *ends]
    return "".join(mark * (end - start) for mark, start, end in zip(MARKS, starts, ends, strict=False))


# --- projectors -----------------------------------------------------------------------------------------------


def _projector(source: str, header: gguf.GgufHeader) -> Inspection:
    found = projector(header, source)
    facts = {
        "arch": header.arch,
        "projector_type": found.kind,
        "name": found.name,
        "n_layer": found.n_layer,
        "n_embd": found.n_embd,
        "size_bytes": found.size_bytes,
        "known": found.is_known,
    }
    memory_mib = {"weights": found.weights_bytes / 2**20, "compute": compute_bytes(found, found.n_patches()) / 2**20}
    memory_mib = {key: round(mib, 2) for key, mib in memory_mib.items()}
    side = round(found.image_max_pixels**0.5)
    text = (
        f"{_heading(source, facts)}\n  memory in MiB, on the device that encodes: {memory_mib['weights']:.0f} weights, "
        f"{memory_mib['compute']:.0f} scratch\n  for an image of {side}x{side} pixels, the largest it takes at once\n"
    )
    return Inspection(sources.lock_entry(header), facts | {"memory_mib": memory_mib}, text)


# --- snapshots ------------------------------------------------------------------------------------------------


def _snapshot(source: str, snapshot: safetensors.Snapshot) -> Inspection:
    entry = safetensors.to_lock(snapshot)
    facts = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    facts |= {"arch": snapshot.model_type, "n_ctx_train": snapshot.max_model_len}
    cache = kv_cache(snapshot, tp=1, element_bytes=2, block_tokens=KV_BLOCK_TOKENS, in_flight=0)
    contexts = {
        str(n): round(cache.blocks_for(n) * cache.block_bytes / 2**20, 2) for n in _contexts(snapshot.max_model_len)
    }
    lines = ["  KV cache in 16 bits, in MiB (vLLM shares one cache among all requests):"]
    lines += [f"  {n:>8}{mib:>9.0f}" for n, mib in contexts.items()]
    text = f"{_heading(source, facts)}\n" + "".join(f"{line}\n" for line in lines)
    return Inspection(entry, facts | {"context_mib": contexts}, text)


def _heading(source: str, facts: Mapping[str, Any]) -> str:
    lines = [source]
    for key, value in facts.items():
        if key == "size_bytes":
            lines.append(f"  {key}: {value} ({value / 2**30:.2f} GiB)")
        elif value not in (None, "", 0):
            lines.append(f"  {key}: {value}")
    return "\n".join(lines) + "\n"
