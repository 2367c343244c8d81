"""A lab for Ollama: builds of the real one where it can be had, and of a small stand-in everywhere.

The real one is the program that $LABDEPLOY_OLLAMA names, else `ollama` on PATH; as its runner it gets the llama-server
of the Debian packages, which is what Ollama 0.30 and newer start for each model. Where there is none, the tests of
this folder run against ollama_stand_in.pl alone, and the summary of the run says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import Lab

if TYPE_CHECKING:
    from labdeploy.sandbox import SandboxHost

STAND_IN = Path(__file__).with_name("ollama_stand_in.pl")


def real_ollama() -> Path | None:
    """Find the real program; one that is named and is not there is an error, not a reason to go without."""
    if named := os.environ.get("LABDEPLOY_OLLAMA"):
        return Path(named).resolve(strict=True)
    found = shutil.which("ollama")
    return Path(found).resolve() if found else None


KINDS = ("stand-in", "real") if real_ollama() else ("stand-in",)


def told() -> str:
    """Say against what the tests of Ollama ran."""
    program = real_ollama()
    if program:
        return f"Ollama: tested with a stand-in and with {program}"
    return "Ollama: tested with a stand-in alone; no ollama is on PATH or in $LABDEPLOY_OLLAMA"


@dataclass
class OllamaLab(Lab):
    """A lab whose service `chat` is served by Ollama, or by llama-server where the test says so."""

    kind: str = "stand-in"

    def _host(self, host: SandboxHost, settings: dict[str, Any]) -> dict[str, Any]:
        made = super()._host(host, settings)
        if settings.get("runner") != "llama-server":
            usual = {"runner": "ollama", "model": "tiny", "port": self.port, "bind": host.address}
            made["services"]["chat"] = usual | {"context_length": 2048, "cache_ram": "64MiB"} | settings
        return made

    def install(self, version: str, release: int = 1) -> str:
        """Install a build of that version and give its name; another release of the same version is another build."""
        folder = self._build(version, release)
        ended = self.run("runner", "install", self.host.name, "ollama", version, "--from", str(folder))
        assert ended.code == 0, ended.err
        return str(re.search(rf"{re.escape(version)}-[0-9a-f]{{8}}", ended.out)[0])  # type: ignore[index]

    def _build(self, version: str, release: int) -> Path:
        folder = self.folder / f"ollama-{release}"
        (folder / "bin").mkdir(parents=True)
        program = real_ollama() if self.kind == "real" else STAND_IN
        assert program
        shutil.copy(program, folder / "bin" / "ollama")
        (folder / "bin" / "ollama").chmod(0o755)
        (folder / "version").write_text(version)  # of the stand-in
        (folder / "release").write_text(str(release))
        tools = folder / "lib" / "ollama"
        tools.mkdir(parents=True)
        for name in ("llama-server", "llama-quantize"):
            (tools / name).write_text(f'#!/bin/sh\nexec /usr/bin/{name} "$@"\n')
            (tools / name).chmod(0o755)
        return folder

    def versions(self) -> tuple[str, str]:
        """Give the versions of two builds to go to and fro between: of the real one there is only one."""
        if self.kind == "stand-in":
            return ("0.33.0", "0.33.1")
        said = subprocess.run([str(real_ollama()), "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"version is (\S+)", said.stdout + said.stderr)
        assert found, said
        return (found[1], found[1])

    def api(self, path: str) -> dict[str, Any]:
        """Ask the service over its own API."""
        with urllib.request.urlopen(f"http://{self.host.address}:{self.port}{path}", timeout=30) as answer:
            return dict(json.loads(answer.read()))

    def loaded(self) -> dict[str, Any]:
        """Give the one model that is loaded."""
        (model,) = self.api("/api/ps")["models"]
        return dict(model)

    def store(self) -> str:
        """Give the store that the unit names."""
        found = re.search(r"OLLAMA_MODELS=(\S+)", self.show("Environment"))
        return found[1] if found else ""

    def inode(self, path: str) -> str:
        """Give the inode of a file, through links; nothing where there is none."""
        return self.on_host("sh", "-c", f"stat -Lc %i {path} 2>/dev/null || true")

    def stores(self) -> list[str]:
        """List the stores on the host."""
        return self.on_host("sh", "-c", "ls -d /srv/models/.ollama/* 2>/dev/null || true").splitlines()

    def room_kib(self) -> int:
        """Give what the folder of models takes; hard links count once."""
        return int(self.on_host("du", "-sk", "/srv/models").split()[0])
