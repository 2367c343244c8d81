"""How long a service does not answer while it is restarted: by a push, and by `systemctl restart`."""

from __future__ import annotations

import http.client
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy import sandbox
from labdeploy.tiny_model import write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "fleet"))
from lab import UNIT, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.sandbox import SandboxHost

EVERY_S = 0.005
TIMEOUT_S = 2
BIG = {"n_layer": 8, "n_embd": 2048, "n_head": 16, "n_head_kv": 4, "n_ff": 8192}  # 1 GB of weights, quick to run


class Gap:
    """Asks a service again and again, and notes the longest time between two answers."""

    def __init__(self, address: str, port: int) -> None:
        self._place = (address, port)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.longest_s = 0.0

    def __enter__(self) -> Gap:  # noqa: PYI034 (typing.Self would say no more here)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(EVERY_S):
            if self._answers():
                self.longest_s = max(self.longest_s, time.monotonic() - last)
                last = time.monotonic()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(*self._place, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


COPIES = ("one", "two")


def measured(folder: Path, host: SandboxHost, *, n: int) -> list[dict[str, object]]:
    """Give the longest gap of each change of the model, both ways, with the new one in the page cache and without.

    The two models are copies, so that all starts do the same; what a runner has mapped stays in the cache, so that
    only a change to another file is ever cold.
    """
    folder.mkdir()
    model = write_tiny_model(folder / "big.gguf", **BIG)
    lab = Lab(folder, [host], model)
    for name in COPIES:
        sandbox.run(host, "cp", "/srv/models/tiny.gguf", f"/srv/models/{name}.gguf", timeout_s=300)
    _push(lab, "one")
    found: list[dict[str, object]] = []
    for _ in range(n):
        for cache in ("warm", "cold"):
            for way, change in {"push": _push, "systemctl restart": _restart}.items():
                _push(lab, "one")
                gap_s = _gap_s(lab, change, cold=cache == "cold")
                found.append({"way": way, "cache": cache, "gap_s": gap_s, "model_mib": model.stat().st_size / 2**20})
    return found


def _push(lab: Lab, name: str) -> None:
    inventory = lab.inventory({})
    inventory["models"] = {name: {"path": f"{name}.gguf", "local": str(lab.model)}}
    inventory["hosts"][lab.host.name]["services"]["chat"]["model"] = name
    lab.write(inventory)
    ended = lab.push("--overwrite-drift", watch_s=0)
    if ended.code:
        raise SystemExit(ended.err)


def _restart(lab: Lab, name: str) -> None:
    """Do the same by hand; `systemctl restart` returns when the service is ready, for ExecStartPost waits."""
    edit = f"sed -i 's|/srv/models/one.gguf|/srv/models/{name}.gguf|' /etc/systemd/system/{UNIT}"
    sandbox.run(lab.host, "sh", "-c", f"{edit} && systemctl daemon-reload && systemctl restart {UNIT}", timeout_s=300)


def _gap_s(lab: Lab, change: Callable[[Lab, str], None], *, cold: bool) -> float:
    option = "iflag=nocache" if cold else "bs=1M"
    count = ["count=0"] if cold else []
    sandbox.run(lab.host, "dd", "if=/srv/models/two.gguf", "of=/dev/null", option, *count, "status=none", timeout_s=300)
    with Gap(lab.host.address, lab.port) as gap:
        time.sleep(0.2)
        change(lab, "two")
        time.sleep(0.2)
    return gap.longest_s
