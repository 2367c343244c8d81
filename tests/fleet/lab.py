"""A lab for fleet tests: an inventory for sandbox hosts, and the labdeploy command run on it as a person would."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from labdeploy import sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

UNIT = "labdeploy-chat.service"
TIMEOUT_S = 180


@dataclass
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its report."""
        return json.loads(self.out)


@dataclass
class Lab:
    """A folder with an inventory of sandbox hosts, each with the service `chat` on the tiny model."""

    folder: Path
    hosts: list[SandboxHost]
    model: Path
    services: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """More keys of every host."""

    def __post_init__(self) -> None:
        for host in self.hosts:
            sandbox.copy_in(host, self.model, "/srv/models/tiny.gguf")
        self.set()

    def set(self, **settings: Any) -> None:  # noqa: ANN401
        """Write the inventory, with these settings of the service `chat` beside the usual ones."""
        self.write(self.inventory(settings))

    def inventory(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Give the inventory of these settings."""
        models = {"tiny": {"path": "tiny.gguf", "local": str(self.model)}}
        return {"models": models, "hosts": {host.name: self._host(host, settings) for host in self.hosts}}

    def write(self, inventory: dict[str, Any]) -> None:
        """Write the inventory as given."""
        (self.folder / "inventory.yaml").write_text(yaml.safe_dump(inventory, sort_keys=False))

    def _host(self, host: SandboxHost, settings: dict[str, Any]) -> dict[str, Any]:
        chat = {
            "runner": "llama-server",
            "model": "tiny",
            "port": self.port,
            "bind": host.address,
            "ctx_size": 2048,
            "cache_ram": "64MiB",
        }
        # on older suites the runner is a wrapper that borrows the newest one's files
        binary = "/usr/bin/llama-server" if host.suite == "sid" else "/usr/local/bin/llama-server"
        return {
            "address": host.address,
            "ssh": {
                "user": "root",
                "port": host.port,
                "key": str(host.key),
                "known_hosts": str(host.known_hosts),
            },
            "hardware": {"cpu": {"cores": 2}, "ram": "8GiB"},
            "runners": {"llama-server": binary},
            "services": {"chat": chat | settings, **self.services},
            **self.extra,
        }

    port = 8080

    def run(self, *words: str, timeout_s: float = TIMEOUT_S) -> Ended:
        """Type one labdeploy command in the folder."""
        argv = [sys.executable, "-m", "labdeploy", *words]
        ended = subprocess.run(
            argv,
            cwd=self.folder,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in ended.stderr, ended.stderr
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def push(self, *words: str, watch_s: int = 1) -> Ended:
        """Push to the first host, with a short watch."""
        return self.run("push", self.host.name, "--watch", str(watch_s), *words)

    def push_ok(self, *words: str) -> dict[str, Any]:
        """Push to the first host and give its part of the report; it must end well."""
        ended = self.push("--json", *words)
        assert ended.code == 0, ended.err
        return ended.json["hosts"][self.host.name]

    @property
    def host(self) -> SandboxHost:
        """The first host."""
        return self.hosts[0]

    def host_keys(self) -> list[str]:
        """Give the keys of the first host alone, each as `TYPE KEY`."""
        lines = [line.split(" ", 1) for line in self.host.known_hosts.read_text().splitlines()]
        names = (self.host.address, f"[{self.host.address}]:{self.host.port}")
        return [key for name, key in lines if name in names]

    def on_host(self, *argv: str, check: bool = True) -> str:
        """Run a command as root on the first host, past SSH."""
        return sandbox.run(self.host, *argv, check=check).stdout.strip()

    def show(self, key: str, unit: str = UNIT) -> str:
        """Give a property of a unit."""
        return self.on_host("systemctl", "show", "-p", key, "--value", unit)

    def snapshot(self) -> dict[str, str]:
        """Give all that a push could change on the host: files with their sums, unit states, enabled links."""
        sums = self.on_host(
            "sh",
            "-c",
            "find /etc/labdeploy /etc/systemd/system -type f -exec sha256sum {} + 2>/dev/null | sort -k2;"
            " find /etc/labdeploy /etc/systemd/system -type l -exec readlink -v {} + -print 2>/dev/null | sort;"
            " systemctl list-units --all --plain --no-legend 'labdeploy-*' | sort; ls /run/labdeploy 2>/dev/null; true",
        )
        return {"files": sums, "since": self.show("ActiveEnterTimestampMonotonic")}

    def complete(self, max_tokens: int = 4) -> str:
        """Ask the service for a completion, at its port."""
        body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": max_tokens}).encode()
        url = f"http://{self.host.address}:{self.port}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return str(json.loads(answer.read())["choices"][0]["text"])

    def n_ctx(self) -> int:
        """Give the context that the service says it has."""
        url = f"http://{self.host.address}:{self.port}/v1/models"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(json.loads(answer.read())["data"][0]["meta"]["n_ctx"])
