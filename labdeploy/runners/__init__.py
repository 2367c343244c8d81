"""The programs that serve models. To add one, add a module beside these and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labdeploy.runners import llama_server, ollama, vllm

if TYPE_CHECKING:
    from labdeploy.runners.base import Runner

RUNNERS: dict[str, Runner] = {runner.name: runner for runner in (llama_server.RUNNER, ollama.RUNNER, vllm.RUNNER)}
