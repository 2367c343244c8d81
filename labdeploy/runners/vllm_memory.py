"""How much memory vLLM takes, before it is started. `Engine` is one candidate; each formula below is one function.

Facts are of vLLM 0.33.0 unless said otherwise. Where vLLM measures at its start what we must say before
(activations, CUDA graphs), the formula here is an estimate on the safe side and says so.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labdeploy.runners.base import GpuBudget, Memory
from labdeploy.runners.vllm_settings import DTYPE_BYTES, VllmSettings

if TYPE_CHECKING:
    from labdeploy.models.safetensors import Snapshot

MIB = 1024 * 1024
MOST_UTILIZATION = 0.92  # vLLM's own --gpu-memory-utilization; the rest is for what it does not count
LEAST_LEN = 4096  # a chat with less context is hardly one
KV_MARGIN = 0.95  # of the KV cache that one request may take: what is left is for our estimates being low

# MiB of one GPU. The CUDA context is made before vLLM looks, so that it is not in its share (gpu_worker.py); drivers
# take 300-600 for it. NCCL, cuBLAS and the allocator are in the share and take 200-500.
CONTEXT_MIB = 512
NON_TORCH_MIB = 512
GRAPH_MIB = 16  # one captured batch size; 51 of them take 0.5-0.8 GiB with an 8B model
# MiB of main memory. Measured on 0.32, CPU: API server, engine and worker take 1.5-2.0 GiB together (PSS, 4
# processes). A CUDA worker has its libraries and pinned buffers beside.
PROCESSES_MIB = 2048
CUDA_WORKER_MIB = 3072
# Ray's own processes. Measured with 2.60.0: 468 MiB on the head, 316 on another node (PSS); and its object store, which
# takes nearly a third of the RAM unless it is told how much.
RAY_STORE_MIB = 128
RAY_MIB = 640 + RAY_STORE_MIB
CPU_BATCH = (16, 2048)  # (max_num_seqs, max_num_batched_tokens) without a GPU


@dataclass(frozen=True)
class Engine:
    """One candidate: what memory depends on. Sizes are MiB of one GPU, or of main memory where there is none."""

    asked: VllmSettings
    snapshot: Snapshot
    gpus: tuple[GpuBudget, ...]
    dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    share_mib: float
    """What it may take in all."""

    @property
    def hosts(self) -> int:
        """How many hosts it spans."""
        return len(self.asked.span or (None,))

    @property
    def tp(self) -> int:
        """How many hold a part of every layer each: the GPUs of a host, or on CPUs the hosts."""
        return len(self.gpus) or self.hosts

    @property
    def pp(self) -> int:
        """How many stages of layers follow one another: one on each host, where GPUs are far from those of others."""
        return self.hosts if self.gpus else 1

    @property
    def stage(self) -> Snapshot:
        """The model as the stage with most layers holds it."""
        return stage(self.snapshot, self.pp)

    @property
    def eager(self) -> bool:
        """On the CPU compiling would need a C++ compiler on the host."""
        return not self.gpus if self.asked.enforce_eager is None else self.asked.enforce_eager

    @property
    def model_mib(self) -> float:
        """Weights."""
        return stage_bytes(self.snapshot, self.dtype, self.pp) / self.tp / MIB

    @property
    def compute_mib(self) -> float:
        """Activations of the largest batch, and CUDA graphs."""
        activations = activation_bytes(
            self.snapshot,
            tokens=self.max_num_batched_tokens,
            seqs=self.max_num_seqs,
            tp=self.tp,
            dtype_bytes=DTYPE_BYTES[self.dtype],
        )
        return activations / MIB + (0 if self.eager else n_graphs(self.max_num_seqs) * GRAPH_MIB)

    @property
    def counted_mib(self) -> float:
        """What vLLM takes off its share before the KV cache gets the rest."""
        return self.model_mib + self.compute_mib + (NON_TORCH_MIB if self.gpus else 0)

    @property
    def uncounted_mib(self) -> float:
        """What it takes beside its share."""
        return CONTEXT_MIB if self.gpus else PROCESSES_MIB

    @property
    def utilization(self) -> float:
        """The part of the GPU's whole memory that vLLM counts as its own."""
        if self.asked.gpu_memory_utilization is not None:
            return self.asked.gpu_memory_utilization
        total = max(gpu.total_mib for gpu in self.gpus)
        most = min(MOST_UTILIZATION, hundredths(self.share_mib - self.uncounted_mib, total))
        if self.asked.kv_cache_memory is not None:
            # Nothing is sized by it then, but a start with less than this free is refused all the same.
            need = self.counted_mib + self.asked.kv_cache_memory
            return min(most, hundredths(need, total) + 0.01)
        return most

    @property
    def room_mib(self) -> float:
        """What is left for the KV cache; negative where not even the weights fit."""
        if self.asked.kv_cache_memory is not None:
            return self.asked.kv_cache_memory
        if self.gpus:
            return self.utilization * min(gpu.total_mib for gpu in self.gpus) - self.counted_mib
        left = self.share_mib - self.counted_mib - self.uncounted_mib
        useful = CPU_BATCH[0] * self.kv_mib(max(self.snapshot.default_model_len, self.least_len))
        return min(left, useful, max(left / 2, self.kv_mib(self.least_len)))

    @property
    def block_tokens(self) -> int:
        """Tokens of one block of the KV cache: 16 on GPUs with most backends, 128 seen on CPUs."""
        return 16 if self.gpus else 128

    @property
    def kv_cache(self) -> KvCache:
        """How the KV cache is laid out."""
        kv_bytes = 1 if (self.asked.kv_cache_dtype or "auto") != "auto" else DTYPE_BYTES[self.dtype]
        # Scheduling ahead of the GPU keeps a batch more in flight than there are stages (max_concurrent_batches); a CPU
        # does not do it.
        in_flight = self.max_num_batched_tokens * (self.pp + 1 if self.gpus else 1)
        return kv_cache(
            self.stage, tp=self.tp, element_bytes=kv_bytes, block_tokens=self.block_tokens, in_flight=in_flight
        )

    def kv_mib(self, n_tokens: int) -> float:
        """Give what one request of this length needs of the KV cache, with the null block; the margin is ours."""
        return (self.kv_cache.blocks_for(n_tokens) + 1) * self.kv_cache.block_bytes / MIB / KV_MARGIN

    @property
    def longest(self) -> int:
        """The longest request that fits, in whole blocks; at most what vLLM takes unasked."""
        cache, most = self.kv_cache, self.snapshot.default_model_len
        blocks = math.floor(self.room_mib * KV_MARGIN * MIB / cache.block_bytes) - 1
        if cache.blocks_for(most) <= blocks:
            return most
        lengths = range(0, most + 1, self.block_tokens)
        return lengths[max(0, bisect.bisect_right(lengths, blocks, key=cache.blocks_for) - 1)]

    @property
    def concurrency(self) -> float:
        """How many of the longest requests the KV cache holds at once; vLLM logs it at its start."""
        return self.kv_cache.concurrency(int(max(0.0, self.room_mib) * MIB), self.max_model_len)

    @property
    def least_len(self) -> int:
        """The context it must have: what is asked for, else the least useful."""
        return self.asked.max_model_len or min(LEAST_LEN, self.snapshot.default_model_len)

    @property
    def max_model_len(self) -> int:
        """The context one request may have."""
        return self.asked.max_model_len or max(self.longest, self.least_len)

    @property
    def need_mib(self) -> float:
        """All it takes: its whole share where it sizes itself, and never less than the least that works."""
        kv = max(self.room_mib, self.kv_mib(self.least_len))
        return self.counted_mib + self.uncounted_mib + kv

    @property
    def fits(self) -> bool:
        """Whether the least context and all else is within its share."""
        return self.room_mib >= self.kv_mib(self.least_len) and self.need_mib <= self.share_mib + 1


def weights_bytes(snapshot: Snapshot, dtype: str) -> int:
    """Give the bytes of all weights once loaded: as stored, but floats of an unquantized model become `dtype`.

    With tensor parallelism each GPU holds its part of this; norms are on all of them, which is below 0.1 %.
    """
    floats = {"F32": 4, "F16": 2, "BF16": 2}
    if snapshot.quantization is not None:
        return snapshot.weights_bytes
    return sum(
        n // floats[stored] * DTYPE_BYTES[dtype] if stored in floats else n
        for stored, n in snapshot.tensor_bytes.items()
    )


def stage(snapshot: Snapshot, pp: int) -> Snapshot:
    """Give the largest of `pp` stages: layers are dealt evenly, some stages have one more (distributed/utils.py)."""
    layers, sliding = (-(-n // pp) for n in (snapshot.n_layer, snapshot.n_sliding_layers))
    return dataclasses.replace(snapshot, n_layer=layers, n_sliding_layers=min(layers, sliding))


def stage_bytes(snapshot: Snapshot, dtype: str, pp: int) -> int:
    """Give the bytes of the weights of the largest stage: its layers, and the embedding or the output layer.

    The first stage has the one and the last has the other (get_pp_indices in distributed/utils.py).
    """
    whole = weights_bytes(snapshot, dtype)
    if pp == 1:
        return whole
    ends = snapshot.vocab_size * snapshot.hidden_size * DTYPE_BYTES[dtype]
    layers = max(0, whole - ends * (1 if snapshot.tie_word_embeddings else 2))
    return min(whole, layers * -(-snapshot.n_layer // pp) // snapshot.n_layer + ends)


@dataclass(frozen=True)
class KvCache:
    """How vLLM divides its KV cache on one GPU: blocks of some tokens, each for the layers of one group.

    Equal to what vLLM reports at its start (`num_gpu_blocks`, `Maximum concurrency`): tests/fleet/test_vllm.py.
    Source: v1/core/kv_cache_utils.py and v1/kv_cache_interface.py, vLLM 0.32.0.
    """

    block_tokens: int
    block_bytes: int
    full_groups: int
    sliding_groups: int
    window: int
    """Tokens that a layer with a sliding window looks back on; what is older is dropped."""
    in_flight: int
    """Tokens that may be scheduled and not yet computed: they are kept beside the window."""

    def blocks_for(self, n_tokens: int) -> int:
        """Count the blocks of one request; a window that straddles a boundary takes one more."""
        kept = min(self.window - 1 + self.in_flight, n_tokens)
        full, sliding = -(-n_tokens // self.block_tokens), -(-kept // self.block_tokens) + 1
        return self.full_groups * full + self.sliding_groups * sliding

    def n_blocks(self, cache_bytes: int) -> int:
        """Count the blocks of a cache of this size."""
        return cache_bytes // self.block_bytes

    def concurrency(self, cache_bytes: int, n_tokens: int) -> float:
        """Give how many requests of this length a cache holds at once."""
        return self.n_blocks(cache_bytes) / self.blocks_for(n_tokens)


def kv_cache(snapshot: Snapshot, *, tp: int, element_bytes: int, block_tokens: int, in_flight: int) -> KvCache:
    """Lay out the KV cache of a model on one of `tp` GPUs."""
    layers, full, sliding = _groups(snapshot)
    layer_bytes = kv_bytes_per_token(snapshot, tp=tp, element_bytes=element_bytes)
    return KvCache(
        block_tokens=block_tokens,
        block_bytes=block_tokens * layers * layer_bytes,
        full_groups=full,
        sliding_groups=sliding,
        window=snapshot.sliding_window or 0,
        in_flight=in_flight,
    )


def kv_bytes_per_token(snapshot: Snapshot, *, tp: int, element_bytes: int) -> int:
    """Give the bytes that one token takes in one layer on one GPU (v1/kv_cache_interface.py).

    K and V of `head_dim` for each of its KV heads; with MLA one latent vector, on every GPU.
    """
    if snapshot.is_mla:
        return (snapshot.kv_lora_rank + snapshot.qk_rope_head_dim) * element_bytes
    return max(1, snapshot.n_key_value_heads // tp) * 2 * snapshot.head_dim * element_bytes


def _groups(snapshot: Snapshot) -> tuple[int, int, int]:
    """Give the layers of a group, and how many groups keep all tokens and how many a window.

    All groups are of one size, the last ones padded: the smaller kind's, or the larger's where they differ little.
    """
    full, sliding = snapshot.n_layer - snapshot.n_sliding_layers, snapshot.n_sliding_layers
    if not full or not sliding:
        return snapshot.n_layer, int(full > 0), int(sliding > 0)
    small, large = sorted((full, sliding))
    size = large if 2 * large < 3 * small else small
    return size, -(-full // size), -(-sliding // size)


def activation_bytes(snapshot: Snapshot, *, tokens: int, seqs: int, tp: int, dtype_bytes: int) -> int:
    """Estimate the peak of one forward pass: vLLM measures it, with `tokens` tokens and `seqs` samples.

    Per token the residual and its norm, Q, K, V and the gate and up of the feed-forward; per sample the logits in
    32 bits, twice (v1/worker/gpu_model_runner.py, profile_run). An estimate of ours, not a figure of vLLM's.
    """
    per_token = 4 * snapshot.hidden_size + 2 * snapshot.intermediate_size // tp
    return tokens * per_token * dtype_bytes + seqs * snapshot.vocab_size * 4 * 2


def n_graphs(max_num_seqs: int) -> int:
    """Count the batch sizes that get a CUDA graph: 1, 2, 4, 8 to 248 by 8, from 256 by 16, to 2 x seqs or 512."""
    most = min(2 * max_num_seqs, 512)
    sizes = (1, 2, 4, *range(8, 249, 8), *range(256, 513, 16))
    return sum(size <= most for size in sizes)


def hundredths(part: float, whole: float) -> float:
    """Give a fraction rounded down to two decimals, at least 0.01: less is no utilization."""
    return max(1, int(part * 100 // whole)) / 100


def memory(engine: Engine) -> dict[str, Memory]:
    """Give the memory on each device: the GPUs by their names in the plan, then `host`."""
    kv = max(engine.room_mib, engine.kv_mib(engine.least_len))
    outside = engine.uncounted_mib + (NON_TORCH_MIB if engine.gpus else 0)
    taken = Memory(engine.model_mib, kv, engine.compute_mib, outside)
    if not engine.gpus:
        return {"host": taken}
    ray_mib = RAY_MIB if engine.asked.engine == "ray" else 0
    host = Memory(overhead_mib=PROCESSES_MIB + len(engine.gpus) * CUDA_WORKER_MIB + ray_mib)
    return {**{gpu.id: taken for gpu in engine.gpus}, "host": host}
