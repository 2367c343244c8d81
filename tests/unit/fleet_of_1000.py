"""A made-up fleet for measuring: what people have, many times over."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from test_plan_properties import AWQ, book, host, llama

from labdeploy.inventory import Service
from labdeploy.runners.ollama import OllamaSettings
from labdeploy.runners.vllm import VllmSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labdeploy.inventory import Host
    from labdeploy.models.book import ModelBook


def new_book() -> ModelBook:
    """Give the models of the tests, read anew, so that nothing is remembered of them."""
    return book.__wrapped__()


def ollama(model: str, port: int) -> Service:
    """Give an Ollama service with a context of 8192 tokens."""
    return Service(model, port, runner="ollama", settings=OllamaSettings(context_length=8192))


def vllm(port: int) -> Service:
    """Give a vLLM service."""
    return Service(AWQ, port, runner="vllm", settings=VllmSettings())


# VRAM of each GPU in MiB, main memory in GiB, services.
KINDS: list[tuple[list[int], int, list[Service]]] = [
    ([], 32, [llama("qwen3-4b", port=1), llama("lfm2-1.2b", port=2), llama("granite-4-h-tiny", port=3)]),
    ([12288], 64, [llama("llama-3.1-8b", port=1), llama("lfm2-1.2b", port=2), llama("qwen3-4b", port=3, gpus=())]),
    ([24576], 64, [llama("qwen3-30b-a3b", port=1), llama("qwen3-4b", port=2, ctx_size=16384), ollama("lfm2-1.2b", 3)]),
    ([24576, 12288], 128, [vllm(1), llama("llama-3.1-8b", port=2, gpus=(1,)), llama("qwen3-4b", port=3, gpus=())]),
    ([24576, 24576], 128, [llama("llama-3-70b", port=1), llama("lfm2-1.2b", port=2), llama("qwen3-4b", port=3)]),
    ([8192], 64, [llama("gpt-oss-20b", port=1), llama("lfm2-1.2b", port=2, ctx_size=4096), ollama("qwen3-4b", 3)]),
    ([81920], 256, [llama("qwen3-next-80b", port=1), llama("gemma3-27b", port=2), ollama("granite-4-h-tiny", 3)]),
    ([49152, 24576], 128, [llama("gemma3-27b", port=1), llama("falcon-h1-1.5b", port=2), vllm(3)]),
]


def hosts(n: int) -> Iterator[Host]:
    """Give hosts of every kind in turn, each kind in four sizes of main memory, under names of their own."""
    for i in range(n):
        vrams, ram_gib, services = KINDS[i % len(KINDS)]
        size = i // len(KINDS) % 4
        alike = host(vrams, (ram_gib + 16 * size) * 1024, *services)
        yield dataclasses.replace(alike, name=f"h{i}", address=f"10.0.{i // 250}.{i % 250}")
