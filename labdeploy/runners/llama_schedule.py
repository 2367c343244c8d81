"""How llama.cpp lays out the compute buffers of a graph: which device runs each node, and where each result lies.

`buffer_bytes` replays in a small way what llama.cpp does before its first token: the scheduler (ggml-backend.cpp)
gives each node a device and copies what lies elsewhere, the Vulkan backend reorders its nodes, and the allocator
(ggml-alloc.c) packs the results into one buffer for each device, reusing what no later node reads. Only sizes matter
here: a weight or a cache is a node that has its place already. Read in llama.cpp 0.5.0 (0c1e57098), measured against
0.7.0 (build 11669).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ALIGNMENT_BYTES = 64  # of a tensor in a CPU buffer (TENSOR_ALIGNMENT); GPUs have 16 to 256
# From this many tokens on, a matrix on the CPU is copied to the GPU for the product (ggml-cuda.cu, ggml-vulkan.cpp).
OP_OFFLOAD_MIN_TOKENS = 32
# How many nodes ahead, views among them, the Vulkan backend looks for one that it can run now (ggml-vulkan.cpp).
VULKAN_LOOKAHEAD = 20
# A node right behind the one it reads stays there, because one shader runs both (ggml_vk_graph_optimize).
VULKAN_FUSED = frozenset(
    (
        ("MUL_MAT", "ADD"),
        ("MUL_MAT_ID", "ADD_ID"),
        ("MUL_MAT_ID", "MUL"),
        ("ADD", "ADD"),
        ("SSM_CONV", "ADD"),
        ("SSM_CONV", "UNARY"),
    )
)
# What is pulled along with a pair of nodes, if it reads the second of them and stands near.
VULKAN_FOLLOWERS = {
    ("RMS_NORM", "MUL"): "ROPE",
    ("MUL_MAT_ID", "ADD_ID"): "MUL",
    ("MUL_MAT", "ADD"): "ADD",
    ("SSM_CONV", "ADD"): "UNARY",
    ("", "UNARY"): "MUL",
}
VULKAN_FOLLOWED = 15
VULKAN_PATTERNS = (("RMS_NORM", "MUL", "ROPE", "VIEW", "STORE"), ("ROPE", "VIEW", "STORE"))
VULKAN_FUSED_FROM_AFAR = frozenset((("RMS_NORM", "MUL"), ("UNARY", "MUL")))
# The scheduler may run these elsewhere than where their small weight lies (ggml-backend.cpp).
PLACED_BY_NEIGHBOURS = frozenset(("ROPE", "FLASH_ATTN"))
# Nodes that a GPU does not take over: their results count as a batch of one (ggml_backend_cuda_get_op_batch_size).
NEVER_OFFLOADED = frozenset(("GET_ROWS", "SSM_SCAN"))
# Nodes that are there before the graph runs.
STORED = frozenset(("WEIGHT", "CACHE"))


@dataclass(eq=False, slots=True)
class Node:
    """One result of the graph. `into` are the sources whose place it may take over.

    A source that is a "VIEW" stands for one of several views of the node that is its own source: each is copied by
    itself. `n_views` are the views that stand before it in llama.cpp's list; `n_rows` tokens are in it; it takes
    `scratch_bytes` beside its result where a GPU runs it; `kept` is never freed; `holds` are earlier nodes that are not
    freed before this one.
    """

    op: str
    n_bytes: int
    sources: list[Node] = field(default_factory=list)
    into: tuple[Node, ...] = ()
    device: int | None = None
    n_views: int = 0
    n_rows: int = 0
    scratch_bytes: int = 0
    kept: bool = False
    holds: tuple[Node, ...] = ()
    n_uses: int = 0
    at: int | None = None

    @property
    def base(self) -> Node:
        """The node itself, or what it is a view of."""
        return self.sources[0] if self.op == "VIEW" else self

    @property
    def is_stored(self) -> bool:
        """It is a weight, a cache, or a write into one: no part of the compute buffer."""
        return self.op in STORED or self.op == "STORE"

    @property
    def is_input(self) -> bool:
        """It is filled in before the graph runs."""
        return self.op == "INPUT"


@dataclass(frozen=True)
class Devices:
    """The devices of a graph: GPUs from 0 on, then the CPU. With `reorders` GPUs choose the order of their nodes."""

    n_gpus: int
    reorders: bool
    n_copies: int = 1

    @property
    def cpu(self) -> int:
        """The number of the CPU: the last."""
        return self.n_gpus


@dataclass
class _Split:
    device: int
    copies: list[tuple[Node, Node]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def buffer_bytes(inputs: Sequence[Node], nodes: Sequence[Node], devices: Devices) -> tuple[int, ...]:
    """Return the size of the compute buffer on each device, the CPU last. The nodes are used up."""
    _assign(nodes, devices)
    for node in inputs:
        node.device = devices.cpu
    splits = _split(nodes)
    if devices.reorders:
        for split in splits:
            split.nodes = split.nodes if split.device == devices.cpu else _Reordering(split.nodes).order()
    return _Layout(devices).run(inputs, splits)


# -- which device runs what ----------------------------------------


def _assign(nodes: Sequence[Node], devices: Devices) -> None:
    """Give each node a device (ggml_backend_sched_split_graph, passes 1 to 4)."""
    for node in nodes:
        if node.device is None and node.op not in PLACED_BY_NEIGHBOURS:
            node.device = _device_of_weights(node, devices)
    for skipped, ordered in ((devices.cpu, nodes), (devices.cpu, nodes[::-1]), (None, nodes), (None, nodes[::-1])):
        _spread(ordered, skipped)
    for node in nodes:
        node.device = devices.cpu if node.device is None else node.device
        node.n_bytes += node.scratch_bytes if node.device != devices.cpu else 0
        for source in node.sources:
            base = source.base
            if base.device is None:
                base.device = devices.cpu if base.is_input else node.device
            source.device = base.device


def _device_of_weights(node: Node, devices: Devices) -> int | None:
    """Say where the weights of a node lie; the first GPU takes large products with weights of the CPU."""
    for source in node.sources:
        if source.op == "WEIGHT":
            offloaded = node.n_rows >= OP_OFFLOAD_MIN_TOKENS and node.op not in NEVER_OFFLOADED
            return 0 if offloaded and source.device == devices.cpu else source.device
    return None


def _spread(nodes: Iterable[Node], skipped: int | None) -> None:
    """Give nodes without a device that of the node before; not the skipped one."""
    current = None
    for node in nodes:
        if node.device is None:
            node.device = current
        else:
            current = None if node.device == skipped else node.device


def _split(nodes: Sequence[Node]) -> list[_Split]:
    """Cut the list where the device changes or another weight is copied, and add the copies (pass 5)."""
    splits: list[_Split] = []
    copies: dict[tuple[int, int], Node] = {}
    for node in nodes:
        device = _known(node)
        foreign = [source for source in node.sources if source.device != device]
        if not splits or splits[-1].device != device or (foreign and splits[-1].copies and _has_weight(foreign)):
            splits.append(_Split(device))
        for source in foreign:
            key = (id(source), device)
            if key not in copies:
                copies[key] = Node("COPY", source.n_bytes, device=device)
                splits[-1].copies.append((source.base, copies[key]))
            node.sources = [copies[key] if each is source else each for each in node.sources]
            node.into = tuple(copies[key] if each is source else each for each in node.into)
        splits[-1].nodes.append(node)
    return splits


def _has_weight(nodes: Sequence[Node]) -> bool:
    return any(node.op == "WEIGHT" for node in nodes)


def _known(node: Node) -> int:
    if node.device is None:
        raise RuntimeError(f"{node.op} has no device")
    return node.device


# -- in which order Vulkan runs them -------------------------------


class _Reordering:
    """Pulls forward what does not wait for the nodes before it (ggml_vk_graph_optimize, without the rarer fusions).

    `listed` is llama.cpp's list, where the views of a node stand before it; `waits_for` holds places in it.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.listed: list[Node] = []
        self.waits_for: list[list[int]] = []
        self.place: dict[int, int] = {}
        self.views: dict[int, list[int]] = {}  # of each node
        self.stores: dict[int, list[int]] = {}  # of each cache, and what reads it
        for node in nodes:
            self._list(node)
        self.done = [False] * len(self.listed)

    def _list(self, node: Node) -> None:
        read = [source.base for source in node.sources if not source.base.is_stored]
        viewed = [source.base for source in node.sources if source.op == "VIEW" and not source.base.is_stored]
        own = [self._list_view(viewed or read) for _ in range(node.n_views)]
        at = len(self.listed)
        found = [self.place[id(source)] for source in read if id(source) in self.place]
        for cache in {id(source.base) for source in node.sources if source.base.op == "CACHE"}:
            touching = self.stores.setdefault(cache, [])
            found += [i for i in touching if "STORE" in (node.op, self.listed[i].op)]
            touching.append(at)
        self._add(node, found + own)

    def _list_view(self, read: Sequence[Node]) -> int:
        at = len(self.listed)
        found = [self.place[id(source)] for source in read if id(source) in self.place]
        for source in read:
            others = self.views.setdefault(id(source), [])
            found += others
            others.append(at)
        self._add(Node("VIEW", 0), found)
        return at

    def _add(self, node: Node, waits_for: list[int]) -> None:
        self.place[id(node)] = len(self.listed)
        self.listed.append(node)
        self.waits_for.append(waits_for)

    def order(self) -> list[Node]:
        """Return the nodes in the order in which they run."""
        order: list[Node] = []
        for first in range(len(self.listed)):
            if self.done[first]:
                continue
            batch = self._fused_from(first) or self._batch(first)
            for i in batch:
                self.done[i] = True
                if self.listed[i].op != "VIEW":
                    order.append(self.listed[i])
        return order

    def _batch(self, first: int) -> list[int]:
        """Return a node, those of the next ones that wait for nothing, and then the views that these make possible."""
        batch = [first]
        ahead = range(first + 1, min(first + VULKAN_LOOKAHEAD, len(self.listed)))
        for i in ahead:
            if self.listed[i].op == "VIEW" or self.done[i] or self._fused_from(i):
                continue
            if all(self.done[before] or self._is_fused(before, i, batch) for before in self.waits_for[i]):
                batch.append(i)
                self._follow(i, batch)
        if self.listed[batch[-1]].op == "ADD":
            return batch
        for i in ahead:
            is_view = self.listed[i].op == "VIEW" and not self.done[i]
            if is_view and all(self.done[before] or before in batch for before in self.waits_for[i]):
                batch.append(i)
        return batch

    def _follow(self, i: int, batch: list[int]) -> None:
        """Pull what one shader runs together with a node, and a store of its rotation or norm."""
        wanted = VULKAN_FOLLOWERS.get((self.listed[i - 1].op, self.listed[i].op)) or VULKAN_FOLLOWERS.get(
            ("", self.listed[i].op)
        )
        ahead = range(i + 1, min(i + VULKAN_FOLLOWED, len(self.listed)))
        for k in ahead if wanted else ():
            others = [before for before in self.waits_for[k] if before != i]
            if self._is_follower(k, i, wanted) and all(self.done[before] for before in others):
                self._pull(k, batch)
                i = k
                break
        if self.listed[i].op in ("ROPE", "RMS_NORM"):
            self._follow_with_store(i, batch)

    def _follow_with_store(self, i: int, batch: list[int]) -> None:
        ahead = range(i + 1, min(i + VULKAN_FOLLOWED, len(self.listed)))
        view = next((k for k in ahead if self._is_follower(k, i, "VIEW")), None)
        store = view and next((k for k in ahead if k > view and self._is_follower(k, view, "STORE")), None)
        if view and store and all(self.done[c] or c <= i or c == view for c in self.waits_for[store]):
            self._pull(view, batch)
            self._pull(store, batch)

    def _is_follower(self, k: int, i: int, wanted: str | None) -> bool:
        return self.listed[k].op == wanted and not self.done[k] and i in self.waits_for[k]

    def _pull(self, k: int, batch: list[int]) -> None:
        batch.append(k)
        self.done[k] = True

    def _is_fused(self, before: int, i: int, batch: Sequence[int]) -> bool:
        """Say whether a node may follow the last of its batch, which it reads, because one shader runs both."""
        if before != batch[-1]:
            return False
        pair = (self.listed[before].op, self.listed[i].op)
        between = range(before + 1, i)
        far = pair in VULKAN_FUSED_FROM_AFAR and all(self.done[c] or self.listed[c].op == "VIEW" for c in between)
        return far or (pair in VULKAN_FUSED and not between)

    def _fused_from(self, first: int) -> list[int]:
        """Return the run from here that stays together: a norm and a rotation before they are stored."""
        for pattern in VULKAN_PATTERNS:
            run = range(first, first + len(pattern))
            if run.stop <= len(self.listed) and all(
                self.listed[i].op == op and not self.done[i] for i, op in zip(run, pattern, strict=True)
            ):
                return list(run)
        return []


# -- where each result lies ----------------------------------------


class _Buffer:
    """Free ranges of one device's buffer: best fit, and the end grows (ggml_dyn_tallocr)."""

    def __init__(self) -> None:
        self.free: list[tuple[int, int]] = [(0, 1 << 62)]  # (start, size), in order; the last has no end
        self.n_bytes = 0

    def take(self, size: int) -> int:
        """Take the smallest range that holds it; of equal ones the last, as ggml does."""
        best = len(self.free) - 1
        for i in range(len(self.free) - 1):
            if size <= self.free[i][1] and (best == len(self.free) - 1 or self.free[i][1] <= self.free[best][1]):
                best = i
        start, room = self.free[best]
        self.free[best : best + 1] = [(start + size, room - size)] if room > size else []
        self.n_bytes = max(self.n_bytes, start + size)
        return start

    def give(self, start: int, size: int) -> None:
        """Give a range back and join it with its neighbours."""
        i = 0
        while i < len(self.free) and self.free[i][0] < start:
            i += 1
        if i < len(self.free) and start + size == self.free[i][0]:
            size += self.free.pop(i)[1]
        if i and self.free[i - 1][0] + self.free[i - 1][1] == start:
            i -= 1
            start, size = self.free[i][0], size + self.free[i][1]
            self.free.pop(i)
        self.free.insert(i, (start, size))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class _Layout:
    """The buffers of all devices while the graph is gone through (ggml_gallocr_alloc_graph_impl)."""

    def __init__(self, devices: Devices) -> None:
        self.n_copies = devices.n_copies
        self.buffers = [_Buffer() for _ in range(devices.n_gpus + 1)]

    def run(self, inputs: Sequence[Node], splits: Sequence[_Split]) -> tuple[int, ...]:
        steps = list(_steps(splits))
        _count_uses(steps)
        if self.n_copies > 1:
            self._pin(inputs, splits)
        for node in inputs:
            self._place(node)
        for node, sources in steps:
            self._place(node)
            for source in sources:
                source.n_uses -= 1
                self._free_if_unused(source)
        return tuple(buffer.n_bytes for buffer in self.buffers)

    def _pin(self, inputs: Sequence[Node], splits: Sequence[_Split]) -> None:
        """Give a pipeline its copies of all inputs: they are never freed."""
        copies = [copy for split in splits for _, copy in split.copies]
        for node in (*inputs, *copies):
            node.kept = True
            self._place(node)
            for _ in range(self.n_copies - 1):
                self.buffers[_known(node)].take(_aligned(node.n_bytes))

    def _place(self, node: Node) -> None:
        if node.at is not None or node.is_stored:
            return
        for source in node.into:
            last = source.n_uses == 1 and source.n_bytes == node.n_bytes
            if last and source.at is not None and not source.kept and source.op != "VIEW":
                node.at, source.at = source.at, None
                return
        node.at = self.buffers[_known(node)].take(_aligned(node.n_bytes))

    def _free_if_unused(self, node: Node) -> None:
        if not node.n_uses and node.at is not None and not node.kept:
            self.buffers[_known(node)].give(node.at, _aligned(node.n_bytes))
            node.at = None


def _steps(splits: Sequence[_Split]) -> Iterator[tuple[Node, list[Node]]]:
    """Yield each node and what it uses: each split begins with its copies, which use the originals."""
    for split in splits:
        for original, copy in split.copies:
            yield original, [original]
            yield copy, []
        for node in split.nodes:
            yield node, [source.base for source in node.sources] + list(node.holds)


def _count_uses(steps: Sequence[tuple[Node, list[Node]]]) -> None:
    for _, sources in steps:
        for source in sources:
            source.n_uses += 1
