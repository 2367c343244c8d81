"""The graph that llama.cpp builds for one micro-batch of a model, as far as memory depends on it.

`compute_bytes` is the top. What a layer does is told by the tensors it has, so that an architecture that is new but
built of known parts is planned as well. The order of nodes is that of llama.cpp's own list (GGML_SCHED_DEBUG=2 prints
it); nodes of a few bytes are left out. Sources: src/llama-graph.cpp and src/models/*.cpp of llama.cpp 0.5.0
(0c1e57098), and the lists that 0.7.0 (build 11669) prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from labdeploy.models.gguf import TYPE_BY_NAME
from labdeploy.models.shape import weight_class
from labdeploy.runners.llama_context import F16, F32, kv_bytes, n_cells, n_stream, n_ubatch
from labdeploy.runners.llama_placement import CPU
from labdeploy.runners.llama_schedule import OP_OFFLOAD_MIN_TOKENS, Devices, Node, buffer_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from labdeploy.models.shape import LayerShape, ModelShape
    from labdeploy.runners.llama_placement import LlamaMemorySettings, Places

I32, I64 = 4, 8
ROTATION_WIDTH = 64  # least width of the rotation of a quantised cache (llama-kv-cache.cpp)
# Copies of the inputs when several GPUs work in a pipeline (GGML_SCHED_MAX_COPIES, ggml-backend.cpp).
PIPELINE_COPIES = 4
# A run of equal layers takes what its first ones take: a sequence of so many that was there before is not built again.
SEQUENCE = 8

# Which adds the block to the residual stream, and not the other way round (src/models/*.cpp).
RESIDUAL_FIRST = frozenset(("jamba", "lfm2", "lfm2moe", "openelm"))
SQUARED = frozenset(("nemotron", "nemotron_h", "nemotron_h_moe"))  # their activation is a square
RESIDUAL_FIRST_AT_END = frozenset(("jamba", "lfm2", "lfm2moe", "phi3", "phimoe"))


def compute_bytes(shape: ModelShape, settings: LlamaMemorySettings, places: Places) -> tuple[int, ...]:
    """Return the compute buffer on each GPU and on the host, for the largest graph that the server reserves.

    How Vulkan reorders state-space mixers is not replayed in full: of them the larger of both orders is planned.
    """
    reorders = settings.n_gpus > 0 and settings.gpu_api == "vulkan"
    orders = {reorders, False} if shape.is_recurrent else {reorders}
    return tuple(map(max, zip(*(_laid_out(shape, settings, places, reorders=each) for each in orders), strict=True)))


def _laid_out(shape: ModelShape, settings: LlamaMemorySettings, places: Places, *, reorders: bool) -> tuple[int, ...]:
    in_pipeline = settings.n_gpus > 1 and places.all_on_gpu
    every_copy_stays = in_pipeline and shape.is_mla
    layers = tuple(shape.trunk if every_copy_stays else _telling_layers(shape, places))
    alike = tuple(_likeness(layer, places) for layer in layers)
    devices = Devices(settings.n_gpus, reorders=reorders, n_copies=PIPELINE_COPIES if in_pipeline else 1)
    told = replace(settings.alone, gpu_layers=0, n_cpu_moe=0, tensor_split=(), cache_ram_mib=0, ctx_checkpoints=0)
    return _replayed(_Case(shape, told, alike, places.output_device, devices, layers, places))


@dataclass(frozen=True)
class _Case:
    """A graph and its devices. Cases with equal layers in an equal order are equal, wherever those stand."""

    shape: ModelShape
    settings: LlamaMemorySettings
    alike: tuple[object, ...]
    output_device: int
    devices: Devices
    layers: tuple[LayerShape, ...] = field(compare=False)
    places: Places = field(compare=False)


@lru_cache(maxsize=4096)
def _replayed(case: _Case) -> tuple[int, ...]:
    """Replay a case once: layouts that differ in the number of equal layers on a device are the same case."""
    graph = _Graph(case.shape, case.settings, case.places)
    graph.build(case.layers)
    return buffer_bytes(graph.inputs, graph.nodes, case.devices)


def _likeness(layer: LayerShape, places: Places) -> tuple[object, ...]:
    """Give all that a graph takes from a layer: its kind and place, and what may be copied from the CPU."""
    on, experts_on_cpu = places.layer_device[layer.index], places.experts_on_cpu(layer)
    last = layer.index == places.shape.n_layer - 1
    cache_on = places.layer_device[places.shape.cache_layer(layer).index]
    copied_bytes = (layer.weights_bytes if on == CPU else 0, layer.experts_bytes if experts_on_cpu else 0)
    return places.shape.kinds[layer.index], on, experts_on_cpu, last, cache_on, copied_bytes


def _telling_layers(shape: ModelShape, places: Places) -> Iterable[LayerShape]:
    """Yield the layers that can differ in memory from those before them: a new sequence of kinds and devices."""
    seen: set[tuple[object, ...]] = set()
    before: tuple[object, ...] = ()
    for layer in shape.trunk:
        on = places.layer_device[layer.index]
        kind = (shape.kinds[layer.index], on, places.experts_on_cpu(layer), layer.index == shape.n_layer - 1)
        before = (*before[-(SEQUENCE - 1) :], (*kind, layer.weights_bytes if on == CPU else 0))
        if before not in seen:
            seen.add(before)
            yield layer


@dataclass
class _Graph:
    """The graph under construction. `n_tokens` of a micro-batch, then of the outputs in the last layer."""

    shape: ModelShape
    settings: LlamaMemorySettings
    places: Places
    inputs: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        slots = self.settings.parallel
        self.n_batch = -(-n_ubatch(self.settings) // slots) * slots
        self.n_tokens = self.n_batch
        self.settled = 0
        self.rotations: dict[tuple[bool, bool], Node] = {}
        self.masks: dict[bool, Node] = {}
        self.v_rows: dict[bool, Node] = {}

    # -- pieces ----------------------------------------

    def op(self, op: str, n_elements: int, *sources: Node | None, into: tuple[Node, ...] = (), views: int = 0) -> Node:
        """Add a node with an f32 result."""
        return self._add(Node(op, n_elements * F32, [s for s in sources if s is not None], into, n_views=views))

    def each(self, op: str, width: int, *sources: Node | None, into: tuple[Node, ...] = (), views: int = 0) -> Node:
        """Add a node with `width` elements for each token."""
        return self.op(op, width * self.n_tokens, *sources, into=into, views=views)

    def _add(self, node: Node) -> Node:
        node.n_rows = self.n_tokens
        self.nodes.append(node)
        return node

    def input(self, n_bytes: int) -> Node:
        """Add something that the server fills in."""
        node = Node("INPUT", n_bytes)
        self.inputs.append(node)
        return node

    def view(self, node: Node, width: int = 0) -> Node:
        """Return one of several views of a node: on another device each is a copy of its own, which may be reused."""
        return Node("VIEW", width * self.n_tokens * F32 or node.n_bytes, [node])

    def store(self, cache: Node, *sources: Node, views: int = 1) -> None:
        """Add a write into a cache, where the cache lies."""
        self._add(Node("STORE", 0, [*sources, cache], device=cache.device, n_views=views))

    def weight(self, layer: LayerShape, part: str, suffix: str = "weight") -> Node | None:
        """Return a weight of a layer, where it lies."""
        tensor = layer.tensor(part, suffix)
        if tensor is None:
            return None
        on_cpu = tensor in layer.experts and self.places.experts_on_cpu(layer)
        return Node("WEIGHT", tensor.n_bytes, device=self.settings.n_gpus if on_cpu else self.device(layer))

    def device(self, layer: LayerShape) -> int:
        """Return the device of a layer, the CPU being the last."""
        return self._numbered(self.places.layer_device[layer.index])

    def _numbered(self, device: int) -> int:
        return self.settings.n_gpus if device == CPU else device

    def cache(self, layer: LayerShape, n_bytes: float) -> Node:
        """Return the cache or state of a layer."""
        return Node("CACHE", int(n_bytes), device=self.device(layer))

    def linear(self, layer: LayerShape, part: str, x: Node, width: int, *, views: int = 0) -> Node:
        """Multiply with a matrix and add its bias, if it has one."""
        y = self.each("MUL_MAT", width, self.weight(layer, part), x, views=views)
        bias = self.weight(layer, part, "bias")
        return self.each("ADD", width, y, bias, into=(y,)) if bias else y

    def norm(self, x: Node, weight: Node | None, width: int, *, views: int = 0) -> Node:
        """Normalise `width` elements of each token. A view is never overwritten, but the result is."""
        y = self.each("RMS_NORM", width, x, into=() if views else (x,), views=views)
        return self.each("MUL", width, y, weight, into=(y,)) if weight else y

    def layer_norm(self, layer: LayerShape, part: str, x: Node) -> Node:
        """Normalise the residual stream, where the layer has such a norm; small batches do so on its device."""
        weight = self.weight(layer, part) or self.weight(layer, part, "")
        if weight is None:
            return x
        y = self.norm(x, weight, self.shape.n_embd)
        if self.settings.n_gpus and self.n_batch < OP_OFFLOAD_MIN_TOKENS:
            self.nodes[-2].device = self.device(layer)
        return y

    # -- the whole -------------------------------------

    def build(self, layers: Iterable[LayerShape]) -> None:
        """Add everything from the token embeddings to the logits."""
        x = self._embeddings()
        self.positions = self.input(I32 * self.n_batch)
        self.k_rows = self.input(I64 * self.n_batch)
        widest_v = max(layer.n_v for layer in self.shape.trunk)
        transposed = not self.settings.flash_attn
        kinds = {layer.is_swa: layer for layer in self.shape.trunk if layer.has_kv}
        for is_swa, layer in kinds.items():
            self.v_rows[is_swa] = self.input(I64 * self.n_batch * (widest_v if transposed else 1))
            mask = n_cells(layer, self.settings, self.shape.n_swa) * self.n_batch
            self.masks[is_swa] = self.input(mask * (F16 if self.settings.flash_attn else F32))
        self.outputs = self.input(I32 * self.settings.n_outputs)
        for layer in layers:
            x = self._layer(layer, x)
        self._logits(x)

    def _embeddings(self) -> Node:
        """Look up the tokens. The other two ways in, embeddings and a mix of both, are built but lead nowhere.

        Embeddings stay in their place from the first to the last; so does what the mix is copied to, as a view of it
        is never read.
        """
        n, table = self.n_tokens, Node("WEIGHT", 0, device=self.settings.n_gpus)
        tokens, embeddings = self.input(I32 * n), self.input(F32 * n * self.shape.n_embd)
        embeddings.kept = True
        x = self.each("GET_ROWS", self.shape.n_embd, table, tokens)
        if self.settings.mixed_inputs:
            mixed_tokens, slots = self.input(I32 * n), self.input(I64 * n)
            mixed_embeddings = self.input(F32 * n * self.shape.n_embd)
            mixed = self.each("GET_ROWS", self.shape.n_embd, table, mixed_tokens)
            copied = self.each("DUP", self.shape.n_embd, mixed_embeddings)
            copied.kept = True
            self._add(Node("STORE", 0, [mixed, slots, copied]))
        self._settle()
        return x

    def _logits(self, x: Node) -> None:
        on = self._numbered(self.places.output_device)
        norm, matrix = (Node("WEIGHT", n_bytes, device=on) for n_bytes in (0, self.places.output_matrix_bytes))
        self.n_tokens = min(self.settings.n_outputs, self.n_batch)
        x = self.norm(x, norm, self.shape.n_embd)
        self.each("MUL_MAT", self.shape.n_vocab, matrix, x)

    def _layer(self, layer: LayerShape, x: Node) -> Node:
        """Add attention or a mixer, and then a feed-forward network, or what of these the layer has."""
        self.n_tokens = self.n_batch
        normed = self.layer_norm(layer, "attn_norm", x)
        if not layer.has_kv and not layer.is_recurrent and not layer.tensor("attn_output"):
            return self._joined(layer, self._feed_forward(layer, normed), x)
        mixed = self._mix(layer, x, normed)
        if layer.has_post_norm:
            mixed = self.layer_norm(layer, "post_attention_norm", mixed)
        y = self._joined(layer, mixed, x)
        if not layer.has_feed_forward:
            return y
        z = self._feed_forward(layer, self._feed_forward_input(layer, normed, y))
        z = self.layer_norm(layer, "post_ffw_norm", z)
        return self._sum(y, z) if self.shape.arch in RESIDUAL_FIRST_AT_END else self._sum(z, y)

    def _sum(self, a: Node, b: Node) -> Node:
        """Add two streams; the sum takes the place of the first one that is not needed any more."""
        return self.each("ADD", self.shape.n_embd, a, b, into=(a, b))

    def _joined(self, layer: LayerShape, a: Node, b: Node) -> Node:
        """Add up a block and the residual stream; the last layer goes on with the tokens that were asked for."""
        if layer.index == self.shape.n_layer - 1 and self.settings.n_outputs < self.n_batch:
            self.n_tokens = self.settings.n_outputs
            a = self.each("GET_ROWS", self.shape.n_embd, a, self.outputs)
            b = self.each("GET_ROWS", self.shape.n_embd, b, self.outputs)
        return self._sum(b, a) if self.shape.arch in RESIDUAL_FIRST else self._sum(a, b)

    def _mix(self, layer: LayerShape, x: Node, normed: Node) -> Node:
        """Add what mixes tokens: attention, a state-space mixer, or both side by side."""
        if not layer.is_recurrent:
            return self._projected(layer, self._attention(layer, normed))
        if not layer.has_kv:
            return self._mixer(layer, normed)
        attended = self._attention(layer, normed)
        mixed = self._mixer(layer, self.layer_norm(layer, "attn_norm", x))
        y = self._projected(layer, attended)
        return self._sum(y, mixed)

    # -- attention -------------------------------------

    def _projected(self, layer: LayerShape, x: Node) -> Node:
        if layer.tensor("attn_output") is None:
            return x
        return self.linear(layer, "attn_output", x, self.shape.n_embd, views=1)

    def _attention(self, layer: LayerShape, x: Node) -> Node:
        """Add everything from the normalised stream to the heads' outputs, before the output projection."""
        if self.shape.is_mla:
            return self._latent_attention(layer, x)
        q, v, k, gate = self._query_value_key(layer, x)
        n_q, n_kv = layer.n_head * layer.head_k, layer.n_head_kv
        q, k = self._rotated(layer, q, n_q, k=True), self._rotated(layer, k, n_kv * layer.head_k, k=True)
        v = self._rotated(layer, v, n_kv * layer.head_v, k=False)
        keys, values = self._caches(layer)
        if layer.n_k:
            self.store(keys, k, self.k_rows)
            self.store(values, v, self.v_rows[layer.is_swa])
        y = self._scores(layer, q, keys, values, layer.n_head * layer.head_v)
        y = self._rotated(layer, y, layer.n_head * layer.head_v, k=False)
        return self._gated(layer, y, gate, x)

    def _query_value_key(self, layer: LayerShape, x: Node) -> tuple[Node, Node, Node, Node | None]:
        """Project and rotate; a query of twice the width holds a gate, a fused projection all three."""
        n_q = layer.n_head * layer.head_k
        n_k = layer.n_head_kv * layer.head_k
        n_v = layer.n_head_kv * layer.head_v
        if layer.tensor("attn_qkv"):
            fused = self.linear(layer, "attn_qkv", x, n_q + n_k + n_v)
            q = self._roped(layer, "attn_q_norm", self.view(fused), n_q)
            k = self._roped(layer, "attn_k_norm", self.view(fused), n_k)
            return q, self.view(fused), k, None
        whole = self.linear(layer, "attn_q", x, layer.rows("attn_q") or n_q)
        q = self._roped(layer, "attn_q_norm", whole, n_q)
        if not layer.n_k and self.masks:  # reads the cache of an earlier layer
            return q, q, q, None
        has_v = layer.tensor("attn_v") is not None
        if not self.shape.has_swa:  # V is listed before K, of sliding models behind it
            v = self.linear(layer, "attn_v", x, n_v) if has_v else None
            k, key = self._key(layer, x, n_k)
        else:
            k, key = self._key(layer, x, n_k)
            v = self.linear(layer, "attn_v", x, n_v, views=1) if has_v else None
        return q, v or key, k, whole if layer.rows("attn_q") == 2 * n_q else None

    def _key(self, layer: LayerShape, x: Node, width: int) -> tuple[Node, Node]:
        """Return the key, and what it was before it was normalised and rotated."""
        key = self.linear(layer, "attn_k", x, width, views=1)
        return self._roped(layer, "attn_k_norm", key, width), key

    def _roped(self, layer: LayerShape, norm: str, x: Node, width: int) -> Node:
        """Normalise the heads, if they have a norm, and rotate them; a view of what is behind it is not overwritten."""
        weight = self.weight(layer, norm)
        if weight is None:
            return self.each("ROPE", width, x, self.positions, views=1) if self.shape.has_rope else x
        x = self.norm(x, weight, width, views=1)
        return self.each("ROPE", width, x, self.positions, into=(x,))

    def _rotated(self, layer: LayerShape, x: Node, n: int, *, k: bool) -> Node:
        """Multiply with the rotation of a quantised cache (llama_kv_cache::build_input_k_rot)."""
        head, cache_type = (
            (layer.head_k, self.settings.cache_type_k) if k else (layer.head_v, self.settings.cache_type_v)
        )
        width = rotation_width(head, cache_type, widest=k)
        if not width or not layer.n_k:
            return x
        key = (layer.is_swa, k)
        if key not in self.rotations:
            self.rotations[key] = self.input(width * width * F32)
        return self.each("MUL_MAT", n, self.rotations[key], x, views=1)

    def _caches(self, layer: LayerShape) -> tuple[Node, Node]:
        """Return the K and the V cache of a layer."""
        source = self.shape.cache_layer(layer)
        cells = n_stream(self.settings) * n_cells(source, self.settings, self.shape.n_swa)
        k = kv_bytes(cells * source.n_k, self.settings.cache_type_k)
        return self.cache(source, k), self.cache(source, kv_bytes(cells * source.n_v, self.settings.cache_type_v))

    def _scores(self, layer: LayerShape, q: Node, keys: Node, values: Node, width: int) -> Node:
        """Attend: in one node with flash attention, else by way of the scores of all heads for all cells."""
        mask, sinks = self.masks.get(layer.is_swa), self.weight(layer, "attn_sinks")
        if self.settings.flash_attn:
            keys, values = self._as_f16(keys, "k"), self._as_f16(values, "v")
            y = self.each("FLASH_ATTN", width, q, keys, values, mask, sinks, views=6)
            y.scratch_bytes = self._flash_copy_bytes(layer)
            self._settle()
            return y
        cells = n_cells(layer, self.settings, self.shape.n_swa)
        scores = self.each("MUL_MAT", layer.n_head * cells, keys, q, views=5)
        scores = self.each("SOFT_MAX", layer.n_head * cells, scores, mask, sinks, into=(scores,))
        y = self.each("MUL_MAT", width, values, scores, views=2)
        y = self.each("CONT", width, y, views=1)
        self._settle()
        return y

    def _as_f16(self, cache: Node, which: str) -> Node:
        """Flash attention reads f16: an f32 cache is copied (llm_graph_context::build_attn_mha)."""
        cache_type = self.settings.cache_type_k if which == "k" else self.settings.cache_type_v
        return self._add(Node("COPY", cache.n_bytes // 2, [cache])) if cache_type == "f32" else cache

    def _flash_copy_bytes(self, layer: LayerShape) -> int:
        """Return the copies in f16 that flash attention on CUDA makes of a cache of another type, beside its result.

        Seen on 24 models (H100, 0.5.0-dev): 512 MiB for Llama-3.1-8B with 131072 tokens in q8_0. Source:
        ggml_cuda_flash_attn_ext_get_alloc_size (fattn.cu).
        """
        if self.settings.gpu_api == "vulkan":
            return 0
        n_k = layer.n_k if self.settings.cache_type_k not in ("f16", "f32") else 0
        n_v = layer.n_v if self.settings.cache_type_v not in ("f16", "f32") else 0
        return n_stream(self.settings) * n_cells(layer, self.settings, self.shape.n_swa) * (n_k + n_v) * F16

    def _gated(self, layer: LayerShape, y: Node, whole: Node | None, x: Node) -> Node:
        """Gate the heads' outputs: by the second half of the query (qwen3next), or by a projection of their own."""
        width = layer.n_head * layer.head_v
        if whole is not None:
            gate = self.each("CONT", width, whole, views=1)
        elif layer.tensor("attn_gate") and not layer.is_recurrent:
            gate = self.linear(layer, "attn_gate", x, layer.rows("attn_gate"))
        else:
            return y
        gate = self.each("UNARY", gate.n_bytes // F32 // self.n_tokens, gate, into=(gate,))
        return self.each("MUL", width, y, gate, into=(y,))

    def _latent_attention(self, layer: LayerShape, x: Node) -> Node:
        """Multi-head latent attention with absorbed matrices: one compressed K for all heads, and it is V as well."""
        latent, rope = self.shape.n_lora_kv, layer.head_k - self.shape.n_lora_kv
        q = self._latent_query(layer, x)
        absorbed = self.each("MUL_MAT", layer.n_head * latent, self.weight(layer, "attn_k_b"), q, views=3)
        roped = self.each("ROPE", layer.n_head * rope, q, self.positions, views=2)
        q = self.each("CONCAT", layer.n_head * layer.head_k, absorbed, roped)
        both = self.linear(layer, "attn_kv_a_mqa", x, layer.head_k)
        v = self.norm(both, self.weight(layer, "attn_kv_a_norm"), latent, views=1)
        k = self.each("CONCAT", layer.head_k, v, self.each("ROPE", rope, both, self.positions, views=2))
        keys, _ = self._caches(layer)
        self.store(keys, k, self.k_rows)
        width = layer.n_head * self.shape.head_v_mla
        if self.settings.flash_attn:
            y = self._scores(layer, q, self.view(keys), self.view(keys), layer.n_head * latent)
            y = self.each("MUL_MAT", width, self.weight(layer, "attn_v_b"), y, views=1)
            if self.settings.gpu_api == "vulkan" and n_stream(self.settings) > 1:
                y.device = self.settings.n_gpus  # Vulkan does not multiply with so many dimensions
            return self.each("CONT", width, y, views=1)
        cells = n_cells(layer, self.settings, self.shape.n_swa)
        scores = self.each("MUL_MAT", layer.n_head * cells, keys, q, views=5)
        scores = self.each("SOFT_MAX", layer.n_head * cells, scores, self.masks[layer.is_swa], into=(scores,))
        values = self._add(Node("CONT", n_stream(self.settings) * cells * latent * F16, [keys], n_views=1))
        y = self.each("MUL_MAT", layer.n_head * latent, values, scores)
        y = self.each("MUL_MAT", width, self.weight(layer, "attn_v_b"), y)
        return self.each("CONT", width, y, views=1)

    def _latent_query(self, layer: LayerShape, x: Node) -> Node:
        width = layer.n_head * self.shape.head_k_mla
        n_lora = layer.rows("attn_q_a")
        if not n_lora:
            return self.linear(layer, "attn_q", x, width)
        q = self.norm(self.linear(layer, "attn_q_a", x, n_lora), self.weight(layer, "attn_q_a_norm"), n_lora)
        return self.linear(layer, "attn_q_b", q, width)

    # -- feed-forward ----------------------------------

    def _feed_forward_input(self, layer: LayerShape, normed: Node, y: Node) -> Node:
        """Return what the feed-forward network reads: a norm of its own, or the attention's where both are parallel."""
        if layer.feed_forward_norm:
            return self.layer_norm(layer, layer.feed_forward_norm, y)
        return normed if layer.tensor("attn_norm") and self.n_tokens == self.n_batch else y

    def _feed_forward(self, layer: LayerShape, x: Node) -> Node:
        if not layer.experts:
            return self._dense(layer, x, "")
        y = self._experts(layer, x)
        if not layer.tensor("ffn_up_shexp"):
            return y
        shared = self._dense(layer, x, "_shexp")
        if layer.tensor("ffn_gate_inp_shexp"):
            gate = self.linear(layer, "ffn_gate_inp_shexp", x, 1)
            gate = self.each("UNARY", 1, gate, into=(gate,))
            shared = self.each("MUL", self.shape.n_embd, shared, gate, into=(shared,))
        return self._sum(y, shared)

    def _dense(self, layer: LayerShape, x: Node, suffix: str) -> Node:
        """Gate, up and their product; an up of twice the width holds the gate; without a gate up alone, in place."""
        rows, width = layer.rows(f"ffn_up{suffix}"), layer.columns(f"ffn_down{suffix}")
        gate = self.linear(layer, f"ffn_gate{suffix}", x, rows) if layer.tensor(f"ffn_gate{suffix}") else None
        up = self.linear(layer, f"ffn_up{suffix}", x, rows)
        if gate is not None:
            y = self.each("GLU", rows, gate, up)
        elif width and rows > width:
            y = self.each("GLU", width, up)
        else:
            y = self.each("UNARY", rows, up, into=(up,))
            y = self.each("SQR", rows, y, into=(y,)) if self.shape.arch in SQUARED else y
        return self.linear(layer, f"ffn_down{suffix}", y, self.shape.n_embd)

    def _experts(self, layer: LayerShape, x: Node) -> Node:
        """Route, up and gate, down, weigh, add up (llm_graph_context::build_moe_ffn)."""
        k, n_embd = layer.n_expert_used, self.shape.n_embd
        n_expert = self.shape.n_expert
        probabilities = self.linear(layer, "ffn_gate_inp", x, n_expert)
        probabilities = self.each("SOFT_MAX", n_expert, probabilities, into=(probabilities,))
        bias = self.weight(layer, "exp_probs_b", "bias")
        biased = self.each("ADD", n_expert, probabilities, bias, into=(probabilities,)) if bias else probabilities
        chosen = self.each("ARGSORT", n_expert, biased, views=1)
        weights = self.each("GET_ROWS", k, probabilities, chosen, views=1)
        total = self.each("SUM_ROWS", 1, weights, views=1)
        weights = self.each("DIV", k, weights, self.each("UNARY", 1, total, into=(total,)))
        hidden = self._hidden_of_experts(layer, x, chosen, k)
        down = self._with_expert(layer, "ffn_down_exps", hidden, chosen, k * n_embd)
        weighed = self.each("MUL", k * n_embd, down, weights, into=(down,))
        y = self.each("ADD", n_embd, weighed, views=k)
        for _ in range(k - 2):
            y = self.each("ADD", n_embd, y, weighed, into=(y,))
        if self.settings.gpu_api != "vulkan" and self.settings.n_gpus:
            y.holds = (down, weights)  # one fused sum on CUDA (ggml_backend_cuda_graph_optimize, ggml-cuda.cu)
        self._settle()
        return y

    def _hidden_of_experts(self, layer: LayerShape, x: Node, chosen: Node, k: int) -> Node:
        width = k * self.shape.n_ff_exp
        if layer.tensor("ffn_gate_up_exps"):
            return self.each("GLU", width, self._with_expert(layer, "ffn_gate_up_exps", x, chosen, 2 * width, views=2))
        has_gate = layer.tensor("ffn_gate_exps") is not None
        gate = self._with_expert(layer, "ffn_gate_exps", x, chosen, width, views=2) if has_gate else None
        up = self._with_expert(layer, "ffn_up_exps", x, chosen, width)
        return self.each("GLU", width, gate, up) if gate else self.each("UNARY", width, up, into=(up,))

    def _with_expert(self, layer: LayerShape, part: str, x: Node, chosen: Node, width: int, *, views: int = 0) -> Node:
        """Multiply with the matrices of the chosen experts."""
        y = self.each("MUL_MAT_ID", width, self.weight(layer, part), x, chosen, views=views)
        bias = self.weight(layer, part, "bias")
        return self.each("ADD_ID", width, y, bias, chosen, into=(y,)) if bias else y

    # -- mixers ----------------------------------------

    def _mixer(self, layer: LayerShape, x: Node) -> Node:
        """Add a mixer that keeps a state: a short convolution, Mamba2, a gated delta net, or one of another kind."""
        if layer.tensor("shortconv.in_proj"):
            return self._short_convolution(layer, x)
        if layer.tensor("ssm_in") and layer.tensor("ssm_conv1d") and not layer.tensor("ssm_x"):
            return self._mamba2(layer, x)
        if layer.tensor("attn_qkv") and layer.tensor("ssm_conv1d") and layer.tensor("ssm_out"):
            return self._delta_net(layer, x)
        return self._other_mixer(layer, x)

    def _early_state(self, layer: LayerShape) -> tuple[Node, Node]:
        """Add the state of a convolution where llama.cpp lists it: right behind what was settled last."""
        start = len(self.nodes)
        state = self._state(layer, layer.n_r)
        self.nodes[self.settled : self.settled] = self.nodes[start:]
        del self.nodes[-3:]
        return state

    def _settle(self) -> None:
        """Mark a place: what comes before it is listed (ggml_build_forward_expand), what comes later is not yet."""
        self.settled = len(self.nodes)

    def _state(self, layer: LayerShape, n_elements: int) -> tuple[Node, Node]:
        """Clear the state of new sequences, look up those of this batch, keep the others (build_rs)."""
        n_elements *= self.settings.parallel
        cache = self.cache(layer, n_elements * F32)
        self.store(cache, views=2)
        state = self.op("GET_ROWS", n_elements, cache)
        self.store(cache, state, views=3)
        return cache, state

    def _convolved(self, layer: LayerShape, x: Node, width: int, part: str, state: tuple[Node, Node]) -> Node:
        """Put the last inputs of each sequence before the new ones, convolve, and keep the last."""
        cache, last = state
        joined = self.op("CONCAT", width * self.n_tokens + last.n_bytes // F32, last, self.view(x), views=3)
        self.store(cache, self.view(joined), views=2)
        self._settle()
        y = self.each("SSM_CONV", width, joined, self.weight(layer, part), views=1)
        bias = self.weight(layer, part, "bias")
        return self.each("ADD", width, y, bias, into=(y,)) if bias else y

    def _short_convolution(self, layer: LayerShape, x: Node) -> Node:
        """LFM2: gate, convolve, gate again."""
        n_embd = self.shape.n_embd
        state = self._early_state(layer)
        three = self.linear(layer, "shortconv.in_proj", x, 3 * n_embd, views=1)
        gated = self.each("MUL", n_embd, self.view(three), self.view(three), views=2)
        convolved = self._convolved(layer, gated, n_embd, "shortconv.conv", state)
        y = self.each("MUL", n_embd, self.view(three), convolved, into=(convolved,))
        return self.linear(layer, "shortconv.out_proj", y, n_embd)

    def _mamba2(self, layer: LayerShape, x: Node) -> Node:
        """Mamba2 (llm_build_mamba_base::build_mamba2_layer)."""
        slots, inner = self.settings.parallel, layer.columns("ssm_out")
        width = layer.rows("ssm_conv1d")
        last = self._early_state(layer)
        projected = self.linear(layer, "ssm_in", x, layer.rows("ssm_in"))
        convolved = self._convolved(layer, projected, width, "ssm_conv1d", last)
        state = self.cache(layer, layer.n_s * slots * F32)
        self.store(state, views=2)
        active = self.each("UNARY", width, convolved, into=(convolved,))
        n_head = layer.rows("ssm_in") - inner - width
        steps = self.each("CONT", n_head, self.view(projected), views=2)
        steps = self.each("ADD", n_head, steps, self.weight(layer, "ssm_dt", "bias"), into=(steps,))
        decay, three = self.weight(layer, "ssm_a", ""), [self.view(active) for _ in range(3)]
        n_scanned = inner * self.n_tokens + layer.n_s * slots
        scanned = self.op("SSM_SCAN", n_scanned, state, decay, steps, *three, views=2)
        self.store(state, self.op("GET_ROWS", layer.n_s * (slots - 1), state), views=2)
        self.store(state, self.view(scanned), views=2)
        self._settle()
        gate = self.each("CONT", inner, self.view(projected), views=2)
        skipped = self.each("MUL", inner, three[0], self.weight(layer, "ssm_d", ""), views=1)
        y = self.view(scanned, inner)
        y = self.each("ADD", inner, y, skipped, into=(y, skipped))
        y = self.each("GLU", inner, gate, y)
        norm = self.weight(layer, "ssm_norm")
        y = self.norm(y, norm, inner, views=1) if norm else y
        return self.linear(layer, "ssm_out", y, self.shape.n_embd, views=1)

    def _delta_net(self, layer: LayerShape, x: Node) -> Node:
        """Gated delta net (Qwen3-Next): convolve q, k and v, repeat q and k for the heads of v, run, norm and gate."""
        slots, inner = self.settings.parallel, layer.columns("ssm_out")
        width = layer.rows("ssm_conv1d")
        n_k = (width - inner) // 2
        last = self._state(layer, layer.n_r)
        fused = self.linear(layer, "attn_qkv", x, width, views=1)
        convolved = self._convolved(layer, fused, width, "ssm_conv1d", last)
        state, before = self._state(layer, layer.n_s)
        active = self.each("UNARY", width, convolved, into=(convolved,))
        q, k = (self._repeated(self.view(active), n_k, inner) for _ in range(2))
        rates = self._rates(layer, x)
        n_run = inner * self.n_tokens + layer.n_s * slots
        y = self.op("DELTA_NET", n_run, q, k, self.view(active), *rates, before, views=3)
        self.store(state, self.view(y), views=2)
        y = self.norm(self.view(y), self.weight(layer, "ssm_norm"), inner, views=1)
        gate = self.linear(layer, "attn_gate", x, inner)
        gate = self.each("UNARY", inner, gate, views=1)
        y = self.each("MUL", inner, y, gate, into=(y, gate))
        return self.view(self.linear(layer, "ssm_out", y, self.shape.n_embd, views=1))

    def _repeated(self, x: Node, width: int, to: int) -> Node:
        """Normalise the heads of q or k, and repeat them for those of v."""
        y = self.each("RMS_NORM", width, x, views=1)
        y = self.each("SCALE", width, y, into=(y,))
        return self.each("REPEAT", to, y, views=1) if to > width else y

    def _rates(self, layer: LayerShape, x: Node) -> list[Node]:
        """Project to a decay and a rate of learning for each head."""
        n_head = layer.rows("ssm_ba") // 2 or layer.rows("ssm_beta")
        mixed = self.each("MUL_MAT", 2 * n_head, self.weight(layer, "ssm_ba") or self.weight(layer, "ssm_beta"), x)
        decay = self.each("CONT", n_head, self.view(mixed), views=2)
        decay = self.each("ADD", n_head, decay, self.weight(layer, "ssm_dt", "bias"), into=(decay,))
        decay = self.each("UNARY", n_head, decay, into=(decay,))
        decay = self.each("MUL", n_head, decay, self.weight(layer, "ssm_a", ""), into=(decay,))
        return [decay, self.each("UNARY", n_head, self.view(mixed), views=2)]

    def _other_mixer(self, layer: LayerShape, x: Node) -> Node:
        """Add a mixer of a kind not built here (RWKV, Mamba, KDA): an upper bound, all its products alive at once."""
        slots = self.settings.parallel
        state = self.cache(layer, (layer.n_s + layer.n_r) * slots * F32)
        parts = [t for t in layer.tensors if t.shape[1:] and weight_class(t.name) == "attn"]
        products = [
            self.each("MUL_MAT", t.shape[1], Node("WEIGHT", t.n_bytes, device=self.device(layer)), x) for t in parts
        ]
        return self.each("SCAN", self.shape.n_embd, state, *products)


def rotation_width(head: int, cache_type: str, *, widest: bool) -> int:
    """Width of the square that a quantised cache is rotated by: of K as wide as the head allows, of V 64."""
    if head % ROTATION_WIDTH or TYPE_BY_NAME[cache_type.upper()].block == 1:
        return 0
    return (head & -head) if widest else ROTATION_WIDTH
