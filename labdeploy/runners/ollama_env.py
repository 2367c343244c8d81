"""The environment of an Ollama service: what each variable says, and in which versions it means anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labdeploy.runners.base import device_env

if TYPE_CHECKING:
    from collections.abc import Mapping

    from labdeploy.runners.base import Choice, GpuBudget, Request

Version = tuple[int, ...]
LLAMA_SERVER_SINCE: Version = (0, 30, 0)  # models are run by llama-server, which inherits the environment
SAFE_SINCE: Version = (0, 17, 1)  # reads outside its heap for whoever reaches the port, before: CVE-2026-7482
LEAST_LOAD_TIMEOUT_S = 300  # Ollama's own

OWNED_ENV = {
    "OLLAMA_HOST": "write bind: and port:",
    "OLLAMA_MODELS": "write models:",
    "OLLAMA_ORIGINS": "write origins:",
    "OLLAMA_CONTEXT_LENGTH": "write context_length:",
    "OLLAMA_NUM_PARALLEL": "write num_parallel:",
    "OLLAMA_MAX_LOADED_MODELS": "write max_loaded_models:",
    "OLLAMA_KEEP_ALIVE": "write keep_alive:",
    "OLLAMA_KV_CACHE_TYPE": "write kv_cache_type:",
    "OLLAMA_FLASH_ATTENTION": "write flash_attention:",
    "OLLAMA_GPU_OVERHEAD": "it reserves nothing since Ollama 0.30; write fit_target:",
    "LLAMA_ARG_THREADS": "write threads:",
    "LLAMA_ARG_CACHE_RAM": "write cache_ram:",
    "LLAMA_ARG_FIT_TARGET": "write fit_target:",
    "LLAMA_ARG_CTX_CHECKPOINTS": "write ctx_checkpoints:",
    "LLAMA_API_KEY": "Ollama does not send it to its own llama-server, so that every request would fail",
    "LLAMA_ARG_HOST": "Ollama picks the address of its llama-server",
    "LLAMA_ARG_PORT": "Ollama picks the port of its llama-server",
}


@dataclass(frozen=True)
class Span:
    """The versions in which a variable means something."""

    since: Version = ()
    before: Version | None = None

    def holds(self, version: Version | None) -> bool:
        """Tell whether a version is one of them; one that is not known counts as a new one."""
        if version is None:
            return self.before is None
        return version >= self.since and (self.before is None or version < self.before)


# By the start of the name; what is not here is read by every version, or ignored by those that do not know it.
SPANS = {
    "LLAMA_ARG_": Span(since=LLAMA_SERVER_SINCE),
    "OLLAMA_GO_TEMPLATE": Span(since=LLAMA_SERVER_SINCE),
    "OLLAMA_GPU_OVERHEAD": Span(before=LLAMA_SERVER_SINCE),
}


def version_text(request: Request) -> str | None:
    """Give the version as the probe or the path of the build has it; None where neither says, or it was built bare."""
    probed = request.build.version if request.build else None
    in_path = re.search(r"/ollama/([^/]+)-[0-9a-f]{8}/bin/ollama$", request.binary)
    text = probed or (in_path[1] if in_path else None)
    return None if text is None or numbers(text) in ((), (0, 0, 0)) else text


def numbers(text: str) -> Version:
    """Give the numbers of a version: `0.33.0-rc2` is (0, 33, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def host_port(request: Request) -> str:
    """Write where it listens: without a scheme, which would change the default port."""
    return f"[{request.bind}]:{request.port}" if ":" in request.bind else f"{request.bind}:{request.port}"


def environment(
    request: Request, settings: Mapping[str, Choice], version: Version | None, deadline_s: int
) -> dict[str, str]:
    """Write every tuned value: what stands here no default of another version can change.

    Values that Ollama cannot read it replaces by a default in silence, so each is written in the form it parses.
    """
    value = {key: choice.value for key, choice in settings.items()}
    env = {
        "OLLAMA_HOST": host_port(request),
        "OLLAMA_MODELS": value["models"],
        "OLLAMA_CONTEXT_LENGTH": str(value["context_length"]),
        "OLLAMA_NUM_PARALLEL": str(value["num_parallel"]),
        "OLLAMA_MAX_LOADED_MODELS": str(value["max_loaded_models"]),
        "OLLAMA_KEEP_ALIVE": value["keep_alive"],
        "OLLAMA_LOAD_TIMEOUT": f"{max(LEAST_LOAD_TIMEOUT_S, deadline_s)}s",
        "OLLAMA_KV_CACHE_TYPE": value["kv_cache_type"],
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_GPU_OVERHEAD": str(value["fit_target"] * 2**20),
        "LLAMA_ARG_THREADS": str(value["threads"]),
        "LLAMA_ARG_CACHE_RAM": str(value["cache_ram"]),
        "LLAMA_ARG_CTX_CHECKPOINTS": str(value["ctx_checkpoints"]),
        "LLAMA_ARG_FIT_TARGET": str(value["fit_target"]),
    }
    if value["flash_attention"] != "auto":
        env["OLLAMA_FLASH_ATTENTION"] = "1" if value["flash_attention"] else "0"
    if request.settings.origins:
        env["OLLAMA_ORIGINS"] = ",".join(request.settings.origins)
    if request.settings.template:
        env["OLLAMA_GO_TEMPLATE"] = "1"  # else the template in the model file may win
    return {name: text for name, text in env.items() if _span(name).holds(version)}


def _span(name: str) -> Span:
    return next((span for start, span in SPANS.items() if name.startswith(start)), Span())


def gpu_environment(gpus: tuple[GpuBudget, ...], *, host_has_gpus: bool) -> dict[str, str]:
    """Show it the GPUs of the plan and no others, by any runtime.

    Vulkan lists NVIDIA cards too, so a card hidden from CUDA would come back through it. A library that does not
    exist (`cpu`) is how Ollama is told to use none.
    """
    env = device_env(gpus, host_has_gpus=host_has_gpus)
    if not env:
        return {}
    if not gpus:
        return {**env, "CUDA_VISIBLE_DEVICES": "-1", "OLLAMA_LLM_LIBRARY": "cpu", "OLLAMA_VULKAN": "0"}
    return {**env, "OLLAMA_VULKAN": "1" if any(gpu.gpu.api == "vulkan" for gpu in gpus) else "0"}
