"""Builds of runners: their versions, the flags that they know, and the devices that they see."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from labdeploy.facts.answer import Answer, first
from labdeploy.facts.gpu import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Device:
    """A device that a build of llama-server computes on: `CUDA0`."""

    id: str
    name: str
    total_mib: int


@dataclass(frozen=True)
class Build:
    """One program that serves models, as it is installed at a path."""

    path: str
    version: str | None = None
    build: int | None = None
    """llama.cpp's number of commits: it grows from release to release, whatever the version is called."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """Each spelling of a flag, and whether a value follows it. Empty where the program's help was not understood."""
    devices: tuple[Device, ...] = ()
    config: str | None = None
    """A file of settings for the whole host, which the program reads unasked."""

    @property
    def shown(self) -> str:
        """Name it for people: `llama-server 0.7.0 (build 11669)`."""
        number = f" (build {self.build})" if self.build is not None else ""
        return f"{self.path.rpartition('/')[2]} {self.version or '?'}{number}"


def parse_builds(answer: Answer) -> dict[str, Build]:
    """List the runners that are installed, by their names."""
    found = {}
    for runner in ("llama-server", "ollama", "vllm"):
        if path := first(answer, f"{runner}.path"):
            version, number = _VERSIONS[runner](answer)
            found[runner] = Build(
                path=path,
                version=version,
                build=number,
                flags=dict(sorted(_flags(answer.get(f"{runner}.help", ())))),
                devices=tuple(_devices(answer.get(f"{runner}.devices", ()))),
                config=first(answer, f"{runner}.config") or None,
            )
    return found


def _llama_version(answer: Answer) -> tuple[str | None, int | None]:
    """Read `version: 0.7.0 (build 11669, commit Debian)`, or `version: 6327 (4bf55492)` before versions had dots."""
    said = "\n".join(answer.get("llama-server.version", ()))
    match = re.search(r"^version: (?P<version>[\w.+-]+)(?: \((?:build (?P<build>\d+))?.*\))?", said, re.MULTILINE)
    if not match:
        return None, None
    version = match["version"]
    number = match["build"] or (version if version.isdigit() else None)
    return (f"b{version}" if version.isdigit() else version), (int(number) if number else None)


def _ollama_version(answer: Answer) -> tuple[str | None, None]:
    """Read the client's version where the server runs another one: it is the program at this path."""
    said = "\n".join(answer.get("ollama.version", ()))
    match = re.search(r"client version is ([\w.+-]+)", said) or re.search(r"version is ([\w.+-]+)", said)
    return (match[1] if match else None), None


def _vllm_version(answer: Answer) -> tuple[str | None, None]:
    """Read the name of the installed distribution: `.../site-packages/vllm-0.33.0.dist-info`."""
    match = re.search(r"/vllm-([^/]+)\.dist-info$", first(answer, "vllm.dist"))
    return (match[1] if match else None), None


_VERSIONS = {"llama-server": _llama_version, "ollama": _ollama_version, "vllm": _vllm_version}

# `-ngl,  --gpu-layers, --n-gpu-layers N    max. number of ...`: spellings, a value after one blank, then the text.
_SPELLING = re.compile(r"(--?[A-Za-z][\w.-]*)(?:,\s*|$|(?=\s))")
_VALUE = re.compile(r" ?[^\s-]")


def _flags(lines: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Read the flags of a help text in llama.cpp's form, or in argparse's, which writes a value after each spelling."""
    for line in lines:
        rest, spellings, takes_value = line.strip(), [], False
        if line.startswith(" " * 8) or "has been removed" in line:  # the text of a flag; one that only says goodbye
            continue
        while match := _SPELLING.match(rest):
            spellings.append(match[1])
            rest = rest[match.end() :]
            if value := re.match(r" (?!\s|-)(?:\{[^}]*\}|\[[^\]]*\]|\S+?)(?:, (?=--?[A-Za-z])|(?=\s|$))", rest):
                takes_value = True
                rest = rest[value.end() :]
        yield from ((spelling, takes_value) for spelling in spellings)


def _devices(lines: tuple[str, ...]) -> Iterator[Device]:
    for line in lines:
        if device := DEVICE.fullmatch(line):
            yield Device(device["id"], device["name"], int(device["total"]))
