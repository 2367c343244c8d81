"""A real vLLM for fleet tests: its wheels, downloaded once into the user's cache, and a lab whose service it is."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import TIMEOUT_S, Ended, Lab

from labdeploy import sandbox
from labdeploy.sandbox_root import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parents[1] / "data" / "vllm"
LOCK = DATA / "vllm-0.32.0-cpu-py311.lock.txt"
RAY = DATA / "ray.lock.txt"  # what `runner lock --with ray` adds to it
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # where pip finds torch for CPUs if nothing else names it
HOST_PACKAGES = ("python3", "libnuma1")  # what a host needs for this build
RAY_STAND_IN = Path(__file__).with_name("ray_stand_in.py")
BIG = "labdeploy-big.service"
START_S = 600


def wheels() -> Path:
    """Give the folder with all wheels of both locks: 661 MB, downloaded at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labdeploy" / "wheels"
    folder = cache / hashlib.sha256(LOCK.read_bytes() + RAY.read_bytes()).hexdigest()[:8]
    with locked(cache / "download.lock"):
        if not folder.is_dir():
            fresh = folder.with_suffix(".tmp")
            _download(fresh)
            fresh.rename(folder)
    return folder


def _download(folder: Path) -> None:
    """Download as pip is configured here; where that has no torch for CPUs, from its own index."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    argv += ["-r", str(LOCK), "-r", str(RAY), "-d", str(folder)]
    first = subprocess.run(argv, capture_output=True, text=True, check=False)
    if first.returncode != 0:
        second = subprocess.run([*argv, "--extra-index-url", TORCH_INDEX], capture_output=True, text=True, check=False)
        assert second.returncode == 0, first.stderr + second.stderr


def lock_with_ray(folder: Path) -> Path:
    """Write the lock of another build of the same version, as `runner lock --with ray` would: every package by name."""
    head, *packages = re.split(r"(?m)^(?=[a-z0-9].*==)", LOCK.read_text())
    packages += re.split(r"(?m)^(?=[a-z0-9].*==)", RAY.read_text())[1:]
    path = folder / LOCK.name
    path.write_text(head + "".join(sorted(packages)))
    return path


@contextmanager
def package_index(folder: Path) -> Iterator[str]:
    """Serve a folder of wheels over HTTP on loopback, which hosts share with this machine."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:  # noqa: ANN401
        """Say nothing."""


@dataclass
class VllmLab(Lab):
    """A host whose service `chat` is vLLM with a small random Llama."""

    port = 8000

    def __post_init__(self) -> None:
        for host in self.hosts:
            for file in self.model.iterdir():
                sandbox.copy_in(host, file, f"/srv/models/tiny/{file.name}")
        self.set()

    def set(self, **settings: Any) -> None:  # noqa: ANN401
        """Write the inventory, with these settings of the service beside the usual ones."""
        models = {"tiny": {"path": "tiny", "local": str(self.model)}}
        self.write({"models": models, "hosts": {host.name: self._host(host, settings) for host in self.hosts}})

    def _host(self, host: sandbox.SandboxHost, settings: dict[str, Any]) -> dict[str, Any]:
        known = super()._host(host, {})
        chat = {
            "runner": "vllm",
            "model": "tiny",
            "port": self.port,
            "bind": host.address,
            "kv_cache_memory": "64MiB",
            "max_num_seqs": 4,
            "dtype": "float32",
        }
        del known["runners"]
        return known | {"hardware": {"cpu": {"cores": 2}, "ram": "16GiB"}, "services": {"chat": chat | settings}}

    def run(self, *words: str, timeout_s: float = START_S + TIMEOUT_S) -> Ended:
        """Type one labdeploy command; vLLM takes its time to start."""
        return super().run(*words, timeout_s=timeout_s)

    def ok(self, *words: str) -> Any:  # noqa: ANN401
        """Type one labdeploy command, which must end well, and give its report."""
        ended = self.run(*words, "--json")
        assert ended.code == 0, ended.err
        return ended.json

    def n_ctx(self) -> int:
        """Give the context that the service says it has."""
        with urllib.request.urlopen(f"http://{self.host.address}:{self.port}/v1/models", timeout=10) as answer:
            return int(json.loads(answer.read())["data"][0]["max_model_len"])

    def stream(self, max_tokens: int) -> Iterator[str]:
        """Stream a completion of just so many tokens; gives the data of each event."""
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        url = f"http://{self.host.address}:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            yield from (line[6:].decode().strip() for line in answer if line.startswith(b"data: "))

    @contextmanager
    def streaming(self, max_tokens: int) -> Iterator[list[str]]:
        """Stream a completion while something else is done, which begins with the first token; gives what came."""
        events: list[str] = []
        client = threading.Thread(target=lambda: events.extend(self.stream(max_tokens)))
        client.start()
        while not events and client.is_alive():
            time.sleep(0.1)
        yield events
        client.join(60)
        assert not client.is_alive()

    def in_build(self, name: str, script: str, argument: Any) -> tuple[list[Any], str]:  # noqa: ANN401
        """Run a script of this folder in the Python of a build on the host; gives its reports and all it said."""
        sandbox.copy_in(self.host, Path(__file__).with_name(script), f"/srv/{script}")
        python = f"/opt/labdeploy/runners/vllm/{name}/bin/python"
        done = sandbox.run(self.host, python, f"/srv/{script}", json.dumps(argument), check=False, timeout_s=START_S)
        lines = [line.removeprefix("REPORT ") for line in done.stdout.splitlines() if line.startswith("REPORT ")]
        return [json.loads(line) for line in lines], done.stdout + done.stderr

    def program(self) -> str:
        """Give the program that runs as the service, as the unit that is loaded names it."""
        return self.show("ExecStart").partition("path=")[2].partition(" ;")[0]


@dataclass
class VllmSpanLab(VllmLab):
    """Two hosts that serve `big` together."""

    build: str = ""
    """The name of the build that both hosts have."""

    def set(self, **settings: Any) -> None:  # noqa: ANN401
        """Write the inventory, with these settings of the span beside the usual ones."""
        self._write(self._big() | settings, {"vllm": self.build}, [])

    def set_ray(self) -> None:
        """Write it for Ray and its stand-in, which takes hosts with GPUs; that these have some is made up."""
        python = f"/opt/labdeploy/runners/vllm/{self.build}/bin"
        (self.folder / "vllm").write_text(f"#!{python}/python\n{RAY_STAND_IN.read_text()}")
        for host in self.hosts:
            sandbox.copy_in(host, self.folder / "vllm", "/opt/stand-in/vllm", mode="0755")
            sandbox.run(host, "ln", "-sfn", f"{python}/ray", "/opt/stand-in/ray")
        gpu = {"name": "RTX 3090", "vram": "24GiB", "compute_capability": "8.6"}
        self._write(self._big() | {"engine": "ray", "span_port": 6390}, {"vllm": "/opt/stand-in/vllm"}, [gpu])

    def _big(self) -> dict[str, Any]:
        return {
            "runner": "vllm",
            "model": "tiny",
            "port": self.port,
            "bind": self.host.address,
            "span": [host.name for host in self.hosts],
            "kv_cache_memory": "64MiB",
            "max_num_seqs": 4,
            "dtype": "float32",
        }

    def _write(self, big: dict[str, Any], runners: dict[str, str], gpus: list[dict[str, Any]]) -> None:
        hosts = {host.name: self._host(host, {}) | {"runners": runners, "services": {}} for host in self.hosts}
        for known in hosts.values():
            known["hardware"] |= {"gpus": gpus}
        hosts[self.host.name]["services"] = {"big": big}
        self.write({"models": {"tiny": {"path": "tiny", "local": str(self.model)}}, "hosts": hosts})

    def invocations(self) -> list[str]:
        """Give which start of each part runs now; nothing of one that is not up."""
        shown = [sandbox.run(h, "systemctl", "show", "-p", "InvocationID,ActiveState", BIG).stdout for h in self.hosts]
        return [text if "ActiveState=active" in text else "" for text in shown]

    def kill(self, number: int) -> None:
        """Kill the part of one host, as a crash of all of it would."""
        sandbox.run(self.hosts[number], "systemctl", "kill", "--signal=KILL", BIG)

    def wait_healed(self, before: list[str]) -> None:
        """Return when both parts have started anew and answer."""
        deadline = time.monotonic() + START_S
        while not all(self.invocations()) or set(self.invocations()) & set(before) or not self.answers():
            assert time.monotonic() < deadline, (before, self.invocations())
            time.sleep(1)

    def answers(self) -> bool:
        """Tell whether a completion comes."""
        try:
            return bool(self.complete())
        except OSError:
            return False
