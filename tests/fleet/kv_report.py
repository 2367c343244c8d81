"""Runs in the Python of a build of vLLM: starts its engine on one snapshot after another, prints what it reports.

argv: a JSON list of {"model": FOLDER, ...engine arguments}; stdout: one line of JSON for each, after `REPORT `.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1"}
os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def main() -> None:
    """Start each, print, end."""
    from vllm import LLM  # noqa: PLC0415
    from vllm.v1.core import kv_cache_utils  # noqa: PLC0415

    for arguments in json.loads(sys.argv[1]):
        llm = LLM(load_format="dummy", enforce_eager=True, disable_log_stats=True, **arguments)
        core = llm.llm_engine.engine_core.engine_core
        kv = core.scheduler.kv_cache_config
        config = llm.llm_engine.vllm_config
        report = {
            "num_gpu_blocks": kv.num_blocks,
            "block_size": config.cache_config.block_size,
            "concurrency": kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, kv),
            "groups": [[type(g.kv_cache_spec).__name__, len(g.layer_names)] for g in kv.kv_cache_groups],
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async": config.scheduler_config.async_scheduling,
        }
        print("REPORT", json.dumps(report), flush=True)  # noqa: T201
        core.shutdown()
        del llm, core


if __name__ == "__main__":
    main()
