"""How a GGUF model is laid out on a host: which layers on which GPUs, whose experts in RAM, how much context.

Layouts stand on a ladder: each rung keeps more of what every token reads on the GPUs than the one below. `choose`
climbs as high as the budget allows. Because what a rung needs does not depend on the budget, and no rung has less
context or fewer layers than the one below, more memory never gives fewer layers or less context.

Sizes are MiB (2^20 bytes), contexts are tokens of all slots together.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from labdeploy.runners.base import gpu_sets
from labdeploy.runners.llama_context import MIB, context_mib
from labdeploy.runners.llama_memory import MemoryByDevice, gpu_overhead_mib, memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.models.shape import ModelShape
    from labdeploy.runners.base import GpuBudget, Prefer
    from labdeploy.runners.llama_placement import LlamaMemorySettings

CTX_STEP = 256  # llama.cpp pads the context to this (llama-context.cpp, GGML_PAD(n_ctx, 256))
LEAST_CTX = 4096  # for each slot: what llama.cpp's --fit-ctx keeps at least; a chat with less is hardly one
SPLIT_TRIES = 3  # rounds in which a split is mended by what `memory` says of it
GUESSES = 6  # guesses by interpolation before a search by halves, which a kink in the curve needs
LEAST_COMPUTE = 0.5  # of the smallest that was looked at: on no rung of 13 models, all of the tests, was it under 0.59
FILL_STEPS = 12  # halvings in the search for the most even split: to 1/4096 of a GPU


@dataclass(frozen=True)
class Rung:
    """One place on the ladder: layers on GPUs (counted from the end, the output layer as one), experts in RAM."""

    gpu_layers: int
    n_cpu_moe: int


@dataclass(frozen=True)
class Layout:
    """A model laid out on some GPUs, or on none: settings of which `memory` tells the need."""

    gpus: tuple[GpuBudget, ...]
    rank: int
    """Its rung, counted from the bottom of the ladder; -1 is the CPU alone."""
    settings: LlamaMemorySettings

    @property
    def ctx_size(self) -> int:
        """Context of all slots."""
        return self.settings.ctx_size


@dataclass(frozen=True)
class Wish:
    """What the inventory says about a layout; None where the choice is ours."""

    base: LlamaMemorySettings
    """All that is settled before: slots, batches, cache types, features of the CPU."""
    ctx_size: int | None
    gpu_layers: int | None
    n_cpu_moe: int | None
    tensor_split: tuple[float, ...] | None
    prefer: Prefer


@dataclass(frozen=True)
class Room:
    """What a layout may take."""

    gpu_sets: tuple[tuple[GpuBudget, ...], ...]
    """The sets of GPUs to try, those with fewer GPUs first; none where it shall run on the CPU."""
    ram_mib: float
    least: bool
    """Settle for the least useful context."""


def choose(shape: ModelShape, wish: Wish, room: Room) -> Layout | None:
    """Give the best layout that fits; None where none does."""
    return _Search(shape, wish, room).best()


def nearest(shape: ModelShape, wish: Wish, room: Room) -> Layout:
    """Give the layout that is short of the least memory, for a plan to say by how much."""
    return _Search(shape, wish, room).nearest()


@functools.lru_cache(maxsize=65_536)
def needs(shape: ModelShape, settings: LlamaMemorySettings) -> MemoryByDevice:
    """Give what these settings take, computed once: many hosts ask for the same."""
    return memory(shape, settings)


def _over_mib(taken: MemoryByDevice, gpus: tuple[GpuBudget, ...], free_ram_mib: float) -> float:
    """Give by how much the tightest device is too small; negative where all of them have room."""
    over = taken.host.planned_mib - free_ram_mib
    return max((over, *(part.total_mib - gpu.free_mib for part, gpu in zip(taken.gpus, gpus, strict=True))))


# --- which GPUs ---------------------------------------------------------------------------------------------------


def sets_to_try(allowed: tuple[GpuBudget, ...]) -> tuple[tuple[GpuBudget, ...], ...]:
    """List the sets of GPUs worth trying; of sets that have the same free memory only the first."""
    by_memory: dict[tuple[float, ...], tuple[GpuBudget, ...]] = {}
    for gpus in gpu_sets(allowed):
        by_memory.setdefault(tuple(gpu.free_mib for gpu in gpus), gpus)
    return tuple(by_memory.values())


# --- the ladder ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def ladder(shape: ModelShape, gpu_layers: int | None, n_cpu_moe: int | None, sparse_first: bool) -> tuple[Rung, ...]:
    """List the rungs from the fewest bytes on the GPUs to all of them.

    A dense model climbs layer by layer. Of a mixture of experts the layers come first without their experts, then the
    experts block by block: a token reads all of an attention, but few of the experts. `sparse_first` False climbs by
    whole layers there too.
    """
    every = shape.n_layer_all + 1
    layers = range(1, every + 1) if gpu_layers is None else (gpu_layers,)
    if n_cpu_moe is not None or not shape.n_expert or not sparse_first:
        return tuple(Rung(n, n_cpu_moe or 0) for n in layers)
    blocks = [layer.index + 1 for layer in shape.trunk if layer.experts]
    climbing = [Rung(n, blocks[-1] if blocks else 0) for n in layers[:-1]]
    return (*climbing, *(Rung(layers[-1], n) for n in (*reversed(blocks), 0)))


def experts_pay(shape: ModelShape, settings: LlamaMemorySettings) -> bool:
    """Say whether experts in RAM keep more bytes per token on the GPUs than whole layers there.

    A MiB of attention and its cache on a GPU serves `attention / (attention + cache)` MiB of each token's reading with
    an empty context, and all of it with a full one: half the cache is counted. A MiB of experts serves the part of
    them that a token reads. What serves more goes to the GPU first.
    """
    costs = _costs(shape, _plain(settings))
    attention, cache = sum(costs.dense), sum(costs.context)
    read = shape.n_expert_used / max(1, shape.n_expert)
    return (attention + cache / 2) >= read * (attention + cache)


@dataclass(frozen=True)
class _Costs:
    """What each layer puts on a GPU, in MiB: weights without experts, experts, context; and the output layer."""

    dense: tuple[float, ...]
    experts: tuple[float, ...]
    context: tuple[float, ...]
    output: float
    overhead: float

    def units(self, rung: Rung) -> list[float]:
        """Give the memory of each offloaded layer in order, the output layer last."""
        layers = [
            self.dense[i] + self.context[i] + (self.experts[i] if i >= rung.n_cpu_moe else 0.0)
            for i in range(self._first(rung), len(self.dense))
        ]
        return [*layers, self.output]

    def left_mib(self, rung: Rung) -> float:
        """Give what is left to the host at least: layers and experts that are not offloaded."""
        first = self._first(rung)
        return sum((*self.dense[:first], *self.context[:first], *self.experts[: max(first, rung.n_cpu_moe)]))

    def _first(self, rung: Rung) -> int:
        """Give the first layer that is offloaded."""
        return max(0, len(self.dense) + 1 - rung.gpu_layers)


@functools.lru_cache(maxsize=16_384)
def _costs(shape: ModelShape, settings: LlamaMemorySettings) -> _Costs:
    """Weigh the layers; those that only draft are not loaded, but count as layers."""
    n_trunk, layers = len(shape.trunk), shape.layers
    return _Costs(
        dense=tuple((x.weights_bytes - x.experts_bytes) / MIB if x.index < n_trunk else 0.0 for x in layers),
        experts=tuple(x.experts_bytes / MIB if x.index < n_trunk else 0.0 for x in layers),
        context=tuple(context_mib((layer,), settings, shape) for layer in layers),
        output=shape.output_bytes / MIB,
        overhead=gpu_overhead_mib(shape, settings),
    )


@functools.lru_cache(maxsize=16_384)
def _costs_at(shape: ModelShape, base: LlamaMemorySettings, ctx_size: int) -> _Costs:
    return _costs(shape, _plain(replace(base, ctx_size=ctx_size)))


def _plain(settings: LlamaMemorySettings) -> LlamaMemorySettings:
    """Leave out where layers go, which the costs of a layer do not depend on."""
    return replace(settings.alone, gpu_layers=0, n_cpu_moe=0, n_gpus=1, tensor_split=())


# --- splits over several GPUs -------------------------------------------------------------------------------------


def even_split(
    shape: ModelShape, settings: LlamaMemorySettings, rung: Rung, gpus: tuple[GpuBudget, ...]
) -> tuple[float, ...]:
    """Split layers so that the fullest GPU is as empty as can be; written as the number of layers on each GPU.

    llama.cpp deals layers out in order, and the last GPU has the output layer (`place` in llama_memory.py). Shares
    that are counts put each layer just where it was counted: both sides are the same division in float. What a GPU
    takes beside its layers comes from `memory`, for the split found so far.
    """
    units = _costs(shape, _plain(settings)).units(rung)
    counts = (len(units) // len(gpus),) * (len(gpus) - 1)
    split = tuple(map(float, (*counts, len(units) - sum(counts))))
    for _ in range(SPLIT_TRIES):
        taken = needs(shape, replace(settings, tensor_split=split))
        rooms = [gpu.free_mib - part.beside_layers_mib for gpu, part in zip(gpus, taken.gpus, strict=True)]
        found = _deal(units, rooms)
        if found == split:
            break
        split = found
    return split


def _deal(units: list[float], rooms: list[float]) -> tuple[float, ...]:
    """Deal units out in order, each GPU filled to the same part of its room, the smallest part that holds them all."""
    sums = [0.0, *accumulate(units)]
    rooms = [max(room, 1.0) for room in rooms]

    def dealt(part: float) -> tuple[float, ...] | None:
        return _filled(sums, [part * room for room in rooms])

    high = 1.0
    while dealt(high) is None:
        high *= 2
    low = 0.0 if high == 1.0 else high / 2
    for _ in range(FILL_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if dealt(middle) else (middle, high)
    return dealt(high) or ()


def _filled(sums: list[float], rooms: list[float]) -> tuple[float, ...] | None:
    """Fill GPUs in order, each as far as it goes, and count the units on each; None where some are left over."""
    ends = [0]
    for room in rooms:
        ends.append(max(ends[-1], bisect_right(sums, sums[ends[-1]] + room) - 1))
    return tuple(float(b - a) for a, b in itertools.pairwise(ends)) if ends[-1] == len(sums) - 1 else None


# --- the search ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    shape: ModelShape
    wish: Wish
    room: Room

    @functools.cached_property
    def least(self) -> int:
        """The context asked for, or the least useful."""
        slots = self.wish.base.parallel
        return self.wish.ctx_size or min(LEAST_CTX, self.shape.n_ctx_train) * slots

    @functools.cached_property
    def most(self) -> int:
        """The context asked for, or all that the model was trained for."""
        return self.wish.ctx_size or self.shape.n_ctx_train * self.wish.base.parallel

    @functools.cached_property
    def ladder(self) -> tuple[Rung, ...]:
        first = replace(self.wish.base, ctx_size=self.least)
        sparse_first = bool(self.shape.n_expert) and experts_pay(self.shape, first)
        return ladder(self.shape, self.wish.gpu_layers, self.wish.n_cpu_moe, sparse_first)

    @functools.cached_property
    def bare(self) -> int:
        """The rung where every layer is on the GPUs, and all experts are in RAM; the top of a dense model."""
        most = self.ladder[-1].gpu_layers
        return next(i for i, rung in enumerate(self.ladder) if rung.gpu_layers == most)

    @functools.cached_property
    def one_block_ctx(self) -> int:
        """The context above the least that the experts of one block would have to make room for."""
        costs = _costs_at(self.shape, self.wish.base, self.least)
        twice = _costs_at(self.shape, self.wish.base, 2 * self.least)
        per_token = (sum(twice.context) - sum(costs.context)) / self.least
        tokens = max(costs.experts) / per_token if per_token > 0 else self.most
        return min(self.most, self.least + int(tokens // 1024) * 1024)

    def ctx_at(self, rank: int) -> int:
        """Give the context that a rung must have.

        Of a mixture of experts the context may cost the experts of one block, because little of a block is read for
        a token: with the least context that memory would mostly lie idle between two rungs.
        """
        return self.one_block_ctx if rank > self.bare else self.least

    # one layout

    def at(self, gpus: tuple[GpuBudget, ...], rank: int, ctx_size: int) -> Layout:
        """Lay the model out on a rung, split over several GPUs so that it fits where it can."""
        wish = self.wish
        if not gpus:
            on_cpu = replace(wish.base, ctx_size=ctx_size, gpu_layers=wish.gpu_layers or 0)
            return Layout((), -1, on_cpu)
        rung = self.ladder[rank]
        settings = replace(
            wish.base,
            ctx_size=ctx_size,
            gpu_layers=rung.gpu_layers,
            n_cpu_moe=rung.n_cpu_moe,
            n_gpus=len(gpus),
            tensor_split=wish.tensor_split or (),
            repack=False,
        )
        if len(gpus) > 1 and wish.tensor_split is None:
            settings = replace(settings, tensor_split=even_split(self.shape, settings, rung, gpus))
        return Layout(gpus, rank, settings)

    def over_mib(self, layout: Layout, ram: float | None = None) -> float:
        free = self.room.ram_mib if ram is None else ram
        return _over_mib(needs(self.shape, layout.settings), layout.gpus, free)

    def fits(self, layout: Layout) -> bool:
        return self.over_mib(layout) <= 0

    def surely_too_big(self, gpus: tuple[GpuBudget, ...], rank: int, ctx_size: int) -> bool:
        """Say whether weights, context, overheads and the least compute buffers are more than the GPUs have; cheap."""
        costs = _costs_at(self.shape, self.wish.base, ctx_size)
        units = costs.units(self.ladder[rank])
        rooms = [gpu.free_mib - costs.overhead for gpu in gpus]
        if self._too_big(units, rooms):  # so that no graph is replayed for what is far from fitting
            return True
        return self._too_big(units, [r - least for r, least in zip(rooms, _least_compute(self, gpus), strict=True)])

    def _too_big(self, units: list[float], rooms: list[float]) -> bool:
        if self.wish.tensor_split:
            return sum(units) > sum(rooms)
        return min(rooms) < 0 or _filled([0.0, *accumulate(units)], rooms) is None

    # the best one

    def best(self) -> Layout | None:
        """Try every set of GPUs, then the CPU alone where the inventory asks for no layers on a GPU."""
        found: Layout | None = None
        for gpus in self.room.gpu_sets:
            layout = self.longest(gpus, found) if self.context_first else self.fastest(gpus, found)
            if layout and (found is None or self._worth(layout) > self._worth(found)):
                found = layout
            if found and found.rank == len(self.ladder) - 1 and found.ctx_size >= self.most:
                return found
        if not self.wish.gpu_layers and (self.context_first or not found):
            on_cpu = self.on_cpu()
            found = max((each for each in (found, on_cpu) if each), key=self._worth, default=None)
        return found

    @property
    def context_first(self) -> bool:
        """Whether layers are given up for context; never while the least need is asked for."""
        return self.wish.prefer == "context" and not self.room.least

    def on_cpu(self) -> Layout | None:
        """Run on the CPU alone. The context grows there unless GPUs are in play: then it would shrink as they do."""
        layout = self.at((), -1, self.least)
        if not self.fits(layout):
            return None
        return self.grown(layout, self.most) if self.context_first or not self.room.gpu_sets else layout

    def _worth(self, layout: Layout) -> tuple[int, int]:
        """Order layouts by what is preferred; of equals the first wins, which has the fewest GPUs."""
        return (layout.ctx_size, layout.rank) if self.context_first else (layout.rank, layout.ctx_size)

    def fastest(self, gpus: tuple[GpuBudget, ...], found: Layout | None) -> Layout | None:
        """Climb as high as fits, then take as much context as is left where no rung above is to be had.

        None where `found` is as high with as much context.
        """
        rank = self.highest(gpus, self.ctx_at, bottom=found.rank if found else 0)
        if rank is None:
            return None
        most = self.most if rank == len(self.ladder) - 1 else self.one_block_ctx if rank == self.bare else 0
        if found and rank == found.rank:
            more = min(found.ctx_size + CTX_STEP, most)
            if more <= found.ctx_size or self.surely_too_big(gpus, rank, more):
                return None
        return self.grown(self.at(gpus, rank, self.ctx_at(rank)), most)

    def longest(self, gpus: tuple[GpuBudget, ...], found: Layout | None) -> Layout | None:
        """Take the longest context that fits on any rung, and of those rungs the highest; None where `found` has more.

        A rung that is too big stays so with more context, so each try starts from where the last one fitted.
        """
        least = found.ctx_size if found else self.least
        steps = -(-(self.most - least) // CTX_STEP)

        def ctx_at(step: int, _rank: int) -> int:
            return min(least + step * CTX_STEP, self.most)

        rank = self.highest(gpus, functools.partial(ctx_at, 0))
        if rank is None:
            return None
        low, high = 0, steps + 1  # steps that fit, and that do not or are not to be had
        while high - low > 1:
            step = steps if high > steps else (low + high) // 2
            fitting = self.highest(gpus, functools.partial(ctx_at, step), top=rank)
            if fitting is None:
                high = step
            else:
                low, rank = step, fitting
        return self.at(gpus, rank, ctx_at(low, rank))

    def highest(
        self, gpus: tuple[GpuBudget, ...], ctx_at: Callable[[int], int], top: int | None = None, bottom: int = 0
    ) -> int | None:
        """Find the highest rung that fits, from the top: compute buffers shrink on some rungs, so no bisection."""
        for rank in reversed(range(bottom, len(self.ladder) if top is None else top + 1)):
            ctx_size = ctx_at(rank)
            if _costs_at(self.shape, self.wish.base, ctx_size).left_mib(self.ladder[rank]) > self.room.ram_mib:
                return None  # every rung below leaves more to the RAM
            if self.surely_too_big(gpus, rank, ctx_size):
                continue
            layout = self.at(gpus, rank, ctx_size)
            if self.fits(layout):
                return rank
            if needs(self.shape, layout.settings).host.planned_mib > self.room.ram_mib:
                return None
        return None

    def grown(self, layout: Layout, most: int) -> Layout:
        """Give a layout that fits the longest context that fits too, up to `most`, in steps of 256 tokens.

        Memory is nearly linear in the context, so the first guess is mostly right: by interpolation between what fits
        and what does not.
        """
        if self.room.least or layout.ctx_size >= most:
            return layout
        low, high = layout, self.at(layout.gpus, layout.rank, most)
        low_over, high_over = self.over_mib(low), self.over_mib(high)
        if high_over <= 0:
            return high
        for tries in itertools.count():
            steps = -(-(high.ctx_size - low.ctx_size) // CTX_STEP)
            if steps <= 1:
                return low
            part = low_over / (low_over - high_over) if tries < GUESSES else 0.5
            middle = self.at(
                layout.gpus, layout.rank, low.ctx_size + min(max(int(steps * part), 1), steps - 1) * CTX_STEP
            )
            over = self.over_mib(middle)
            if over <= 0:
                low, low_over = middle, over
            else:
                high, high_over = middle, over
        raise AssertionError

    def nearest(self) -> Layout:
        """Give the layout that is short of the least memory, of what the inventory leaves open; of equals the first.

        Those that cannot be nearer than the nearest so far are not laid out.
        """
        sets = [gpus for gpus in self.room.gpu_sets if gpus]
        places = [(gpus, rank) for gpus in sets for rank in (0, len(self.ladder) // 2, len(self.ladder) - 1)]
        if not self.wish.gpu_layers or not sets:
            places.append(((), -1))
        least = [self._least_missing_mib(*place) for place in places]
        found: list[tuple[float, int, Layout]] = []
        for i in sorted(range(len(places)), key=least.__getitem__):
            if found and least[i] > min(found)[0]:
                break
            layout = self.at(*places[i], self.least)
            found.append((self._missing_mib(layout), i, layout))
        return min(found)[-1]

    def _least_missing_mib(self, gpus: tuple[GpuBudget, ...], rank: int) -> float:
        """Give what a layout is short of at least: its weights, its context and overheads; cheap."""
        if not gpus:
            return 0.0
        costs = _costs_at(self.shape, self.wish.base, self.least)
        rung = self.ladder[rank]
        over = sum(costs.units(rung)) + len(gpus) * costs.overhead - sum(gpu.free_mib for gpu in gpus)
        return max(0.0, over) + max(0.0, costs.left_mib(rung) - self.room.ram_mib)

    def _missing_mib(self, layout: Layout) -> float:
        taken = needs(self.shape, layout.settings)
        over = [part.total_mib - gpu.free_mib for part, gpu in zip(taken.gpus, layout.gpus, strict=True)]
        return sum(max(0.0, each) for each in (*over, taken.host.planned_mib - self.room.ram_mib))


@functools.lru_cache(maxsize=4096)
def _least_compute(search: _Search, gpus: tuple[GpuBudget, ...]) -> tuple[float, ...]:
    """Give what a compute buffer takes at least on each GPU: the part LEAST_COMPUTE of the smallest of three rungs.

    It is not known how the buffer changes from rung to rung without replaying each, but it does not shrink to less: of
    the bottom, the middle and the top one, with the least context and equal shares.
    """
    ranks = {0, len(search.ladder) // 2, len(search.ladder) - 1}
    settings = replace(search.wish.base, ctx_size=search.least, n_gpus=len(gpus), repack=False)
    rungs = [search.ladder[rank] for rank in sorted(ranks)]
    taken = [needs(search.shape, replace(settings, gpu_layers=r.gpu_layers, n_cpu_moe=r.n_cpu_moe)) for r in rungs]
    return tuple(LEAST_COMPUTE * min(each.gpus[i].compute_mib for each in taken) for i in range(len(gpus)))
