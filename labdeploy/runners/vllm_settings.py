"""What an inventory may say about a vLLM service, and what it may not because the plan sets it. Of vLLM 0.33.0."""

from __future__ import annotations

from dataclasses import dataclass

from labdeploy.schema import Bool, Int, IpAddress, ListOf, Mib, Name, Number, OneOf, OrWord, Port, Size, Text, setting

SPAN_PORTS = {"mp": 29501, "ray": 6379}  # vLLM's --master-port, Ray's --port
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class VllmSettings:
    """What an inventory may say about a vLLM service. Names are its flags with underscores."""

    max_model_len: int | None = setting(
        OrWord(Int(16, 16_777_216), {"auto": None}),
        "context of one request in tokens; default, and auto: the largest that fits",
        default=None,
    )
    max_num_seqs: int | None = setting(Int(1, 65_536), "requests computed at once", default=None)
    max_num_batched_tokens: int | None = setting(Int(16, 1_048_576), "tokens computed at once", default=None)
    gpu_memory_utilization: float | None = setting(
        Number(0.01, 1), "part of each GPU's whole memory; default: what is left of it, at most 0.92", default=None
    )
    kv_cache_memory: Mib | None = setting(
        Size(), "KV cache on each GPU, or in main memory on the CPU; default: all that is left", default=None
    )
    tensor_parallel_size: int | None = setting(
        Int(1, 64),
        "GPUs that hold a part of every layer each; default: as few as hold it with half its context",
        default=None,
    )
    gpus: tuple[int, ...] | None = setting(
        ListOf(Int(0, 63)), "indices of the host's GPUs it may use; default: as few as hold it", default=None
    )
    dtype: str | None = setting(
        OrWord(OneOf(tuple(DTYPE_BYTES)), {"auto": None}), "of weights and activations", default=None
    )
    quantization: str | None = setting(
        Text("a quantization", r"[a-z0-9_-]+"), "must be that of the model, where it has one", default=None
    )
    kv_cache_dtype: str | None = setting(
        OneOf(("auto", "fp8", "fp8_e4m3", "fp8_e5m2")), "type of the KV cache; auto: as dtype", default=None
    )
    enforce_eager: bool | None = setting(Bool(), "no compilation, no CUDA graphs", default=None)
    trust_remote_code: bool | None = setting(Bool(), "run Python code that the model brings along", default=None)
    served_model_name: str | None = setting(
        Text("a model name", r"[A-Za-z0-9][A-Za-z0-9._:/-]*"), "what clients call it; default: its name", default=None
    )
    shutdown_timeout: int | None = setting(
        Int(0, 3600), "seconds that running requests get to end when it stops", default=None
    )
    span: tuple[str, ...] | None = setting(
        ListOf(Name), "hosts that serve it together; this host first: it answers", default=None
    )
    span_addresses: tuple[str, ...] | None = setting(
        ListOf(IpAddress()), "where the hosts of the span reach each other; default: address: of each", default=None
    )
    span_port: int | None = setting(
        Port, "port of the first host at which the others join; default: 29501, with Ray 6379", default=None
    )
    engine: str | None = setting(
        OneOf(("mp", "ray")), "what joins the hosts of a span: vLLM itself (mp), or Ray; default: mp", default=None
    )

    @property
    def joins_at(self) -> int:
        """The port of the first host of a span at which the others join."""
        return self.span_port or SPAN_PORTS[self.engine or "mp"]


OWNED_FLAGS = {
    flag: f"write {key}:"
    for key, flags in {
        "max_model_len": ("--max-model-len",),
        "max_num_seqs": ("--max-num-seqs",),
        "max_num_batched_tokens": ("--max-num-batched-tokens",),
        "gpu_memory_utilization": ("--gpu-memory-utilization", "--device-memory-utilization"),
        "kv_cache_memory": ("--kv-cache-memory-bytes", "--kv-cache-memory"),
        "tensor_parallel_size": ("-tp", "--tensor-parallel-size"),
        "gpus": ("--device-ids",),
        "dtype": ("--dtype",),
        "quantization": ("-q", "--quantization"),
        "kv_cache_dtype": ("--kv-cache-dtype",),
        "enforce_eager": ("--enforce-eager", "--no-enforce-eager"),
        "trust_remote_code": ("--trust-remote-code", "--no-trust-remote-code"),
        "served_model_name": ("--served-model-name",),
        "shutdown_timeout": ("--shutdown-timeout",),
        "model": ("--model", "--model-tag"),
        "bind": ("--host", "--uds"),
        "port": ("--port",),
        "api_key_file": ("--api-key",),
    }.items()
    for flag in flags
} | {
    "--disable-access-log-for-endpoints": "health checks are kept out of the journal always",
    "--config": "write its keys as settings or flags here",
    **dict.fromkeys(
        ("-pp", "--pipeline-parallel-size", "-n", "--nnodes", "-r", "--node-rank", "--master-addr", "--headless"),
        "write span: [HOST, HOST]",
    ),
    "--master-port": "write span_port:",
    "--distributed-executor-backend": "write engine:",
}
# Flags that change what vLLM allocates, or how many GPUs it takes (arg_utils.py), and that no setting stands for.
UNCOUNTED_FLAGS = frozenset(
    (
        *("-dp", "--data-parallel-size", "-dcp", "--decode-context-parallel-size", "--enable-expert-parallel", "-ep"),
        *("--cpu-offload-gb", "--kv-offloading-size", "--kv-transfer-config", "--enable-sleep-mode", "--block-size"),
        *("--speculative-config", "-sc", "--enable-lora", "--max-loras", "--max-lora-rank", "--lora-modules"),
        *("--limit-mm-per-prompt", "--mm-processor-cache-gb", "--hf-overrides", "--load-format"),
        *("--compilation-config", "-cc", "--cudagraph-capture-sizes", "--max-cudagraph-capture-size"),
    )
)
OWNED_ENV = {
    "VLLM_API_KEY": "a key in a unit is readable by everyone on the host; write api_key_file:",
    "VLLM_PORT": "it is not the API's port but an internal one; write port:",
    "VLLM_CPU_KVCACHE_SPACE": "write kv_cache_memory:",
}
