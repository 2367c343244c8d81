"""Stands in for a vLLM whose ranks are joined by Ray, for vLLM's CPU builds refuse Ray. It computes nothing.

The cluster is a real one, and it is used as vLLM uses it: a placement group with one GPU for each rank, which waits for
the hosts to join; an actor in each; and the end, with exit code 0, as soon as one of them is gone. Each completion asks
every rank, and says on which hosts they are. The GPUs are what `ray start --num-gpus` says.
"""

from __future__ import annotations

import argparse
import http.server
import json
import mmap
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LOOK_S = 1


@ray.remote(num_gpus=1, num_cpus=0)
class Rank:
    """One rank; it knows where it runs."""

    def host(self) -> str:
        """Give the address of its host."""
        return str(ray.util.get_node_ip_address())


def arguments() -> argparse.Namespace:
    """Read what a test looks at."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    return parser.parse_known_args()[0]


def start_ranks(n: int) -> list[ray.actor.ActorHandle]:
    """Wait until the cluster has a GPU for each rank, and start them there."""
    group = placement_group([{"GPU": 1}] * n, strategy="SPREAD")
    ray.get(group.ready())
    strategies = (PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(n))
    return [Rank.options(scheduling_strategy=strategy).remote() for strategy in strategies]


def end_with(ranks: list[ray.actor.ActorHandle]) -> None:
    """Look after the ranks; when one dies all ends, as vLLM's engine does."""
    while True:
        try:
            ray.get([rank.host.remote() for rank in ranks])
        except ray.exceptions.RayError as error:
            sys.stderr.write(f"a rank is gone: {type(error).__name__}\n")
            os._exit(0)
        time.sleep(LOOK_S)


def main() -> None:
    """Serve what a push asks for."""
    asked = arguments()
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    ranks = start_ranks(asked.pipeline_parallel_size * asked.tensor_parallel_size)
    ray.get([rank.host.remote() for rank in ranks])
    threading.Thread(target=end_with, args=(ranks,), daemon=True).start()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say({"data": [{"id": "tiny", "max_model_len": asked.max_model_len}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say({"choices": [{"text": " ".join(ray.get([rank.host.remote() for rank in ranks]))}]})

        def _say(self, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    # A push looks whether a GPU is used, or what computes as one: its driver is mapped.
    driver = Path(tempfile.mkdtemp()) / "llvmpipe"
    driver.write_bytes(bytes(mmap.PAGESIZE))
    with driver.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        http.server.ThreadingHTTPServer((asked.host, asked.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
