"""Which runner for a model, and on which host: the decision tree of `runner: auto`, then the real plan of each host."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from labdeploy import builds, plan, what_if
from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.inventory import Service
from labdeploy.models.book import ModelBook

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from labdeploy.inventory import Host, Inventory, Purpose
    from labdeploy.models.model import ModelFacts
    from labdeploy.plan import HostPlan
    from labdeploy.runners.base import ServicePlan

FIRST_PORT = 8080  # llama-server's own default
LOADS = {"gguf": ("llama-server", "ollama"), "safetensors": ("vllm",)}
AT_ONCE = {"llama-server": "parallel", "ollama": "num_parallel", "vllm": "max_num_seqs"}
SHARES_CONTEXT = ("llama-server",)  # its ctx_size is for all requests together; the others' is for each


@dataclass(frozen=True)
class Wish:
    """What is wanted of a new service."""

    model: str
    purpose: Purpose = "service"
    at_once: int = 1
    gpu: bool | None = None
    """Whether it shall run on GPUs; None: where there are some."""


@dataclass(frozen=True)
class Offer:
    """What a runner would do with the model on a host, beside what the inventory has there already."""

    host: str
    runner: str
    is_choice: bool
    keys: Mapping[str, Any]
    """What to write into the inventory for it."""
    plan: ServicePlan | None
    """None where the runner cannot be planned there at all; then `problems` says why."""
    problems: tuple[str, ...] = ()
    changes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Settings of other services that would be planned differently then, but for their threads."""

    @property
    def fits(self) -> bool:
        """Whether it would serve."""
        return not self.problems

    @property
    def context_tokens(self) -> int:
        """Context that each request has."""
        if self.plan is None:
            return 0
        tokens = plan.context_tokens(self.plan)
        return tokens // self._slots if self.runner in SHARES_CONTEXT else tokens

    @property
    def _slots(self) -> int:
        settings = self.plan.settings if self.plan else {}
        return max(1, int(settings["parallel"].value)) if "parallel" in settings else 1

    @property
    def on_gpu(self) -> bool:
        """Whether all of it runs on GPUs."""
        return self.plan is not None and not self.plan.computes_on_cpu

    @property
    def worth(self) -> tuple[bool, bool, bool, bool, int]:
        """Compare offers: the chosen runner, that fits, wholly on GPUs, at nobody's cost, with much context."""
        return self.is_choice, self.fits, self.on_gpu, not self.changes, self.context_tokens


@dataclass(frozen=True)
class Pick:
    """The answer: a runner with reasons, what every host offers, and the best of that."""

    wish: Wish
    service: str
    """A name for it that no service of these hosts has."""
    runner: str
    why: tuple[str, ...]
    offers: tuple[Offer, ...]

    @property
    def best(self) -> Offer | None:
        """The best offer of the chosen runner; None where it fits nowhere."""
        best = max(self.offers, key=lambda offer: offer.worth, default=None)
        return best if best and best.is_choice and best.fits else None

    def line(self, offer: Offer) -> str:
        """Give the line to write into the inventory."""
        keys = yaml.safe_dump(dict(offer.keys), default_flow_style=True, sort_keys=False, width=math.inf).strip()
        return f"hosts.{offer.host}.services.{self.service}: {keys}"


def pick(inventory: Inventory, lock: Mapping[str, Any], hosts: Sequence[Host], wish: Wish) -> Pick:
    """Walk the tree, then plan the model with every runner that loads it on every host."""
    if wish.model not in inventory.models:
        hint = f"--model NAME, one of: {', '.join(inventory.models) or 'none'}"
        raise InventoryError(f"{wish.model!r} is not under models", where=str(inventory.path), hint=hint)
    facts = ModelBook(inventory, lock).served(wish.model, "")
    runner, why = walk(wish, facts)
    names = [host.name for host in hosts]
    service = _free_name(wish.model, {taken for host in hosts for taken in host.services})
    offers = [
        offer
        for each in LOADS[facts.format]
        for offer in _offers(inventory, lock, names, wish, service, each, is_choice=each == runner)
    ]
    offers.sort(key=lambda offer: (names.index(offer.host), not offer.is_choice))
    return Pick(wish, service, runner, (*why, *_other_formats(inventory, lock, facts, wish)), tuple(offers))


def _free_name(model: str, taken: set[str]) -> str:
    numbered = (f"{model}-{i}" for i in itertools.count(2))
    return next(name for name in itertools.chain([model], numbered) if name not in taken)


def walk(wish: Wish, facts: ModelFacts) -> tuple[str, tuple[str, ...]]:
    """Choose the runner as `runner: auto` does, and say why, step by step."""
    service = Service(model=wish.model, port=FIRST_PORT, purpose=wish.purpose, name=wish.model)
    runner, why = plan.choose_runner(service, facts)
    loads = {
        "gguf": f"{wish.model} is a GGUF file: llama-server and Ollama load it, vLLM does not",
        "safetensors": f"{wish.model} is a Hugging Face snapshot: only vLLM loads it",
    }
    steps = [loads[facts.format], why] if facts.format == "gguf" else [loads[facts.format]]
    if wish.at_once > 1:
        shared = "they share ctx_size" if runner in SHARES_CONTEXT else "each has the whole context length"
        steps.append(f"{wish.at_once} requests at once: {AT_ONCE[runner]}: {wish.at_once}; {shared}")
    return runner, tuple(steps)


def _other_formats(inventory: Inventory, lock: Mapping[str, Any], facts: ModelFacts, wish: Wish) -> Iterator[str]:
    """Point at models of the other format where that would be the better choice."""
    book = ModelBook(inventory, lock)
    others = [other.name for other in book.known("") if other.format != facts.format]
    if facts.format == "gguf" and wish.purpose == "throughput" and others:
        yield f"vLLM would serve these models of the inventory: {', '.join(others)}"
    if facts.format == "safetensors" and wish.gpu is False and others:
        yield f"on CPUs llama-server is the usual choice, with one of: {', '.join(others)}"


def _offers(
    inventory: Inventory,
    lock: Mapping[str, Any],
    hosts: Sequence[str],
    wish: Wish,
    name: str,
    runner: str,
    *,
    is_choice: bool,
) -> Iterator[Offer]:
    """Plan the model with a runner on each host, as one more service there."""
    keys = {host: _keys(inventory.hosts[host], wish, runner) for host in hosts}
    tried = what_if.with_services(inventory, name, keys)
    now, then = ModelBook(inventory, lock), ModelBook(tried, lock)
    for host in hosts:
        try:
            before = plan.plan_host(builds.with_programs(inventory.hosts[host], lock), now)
            after = plan.plan_host(builds.with_programs(tried.hosts[host], lock), then)
        except LabdeployError as error:
            yield Offer(host, runner, is_choice, keys[host], None, (error.what,))
            continue
        own = next(service for service in after.services if service.name == name)
        problems = tuple(_problems(before, after, own, wish))
        yield Offer(host, runner, is_choice, keys[host], own, problems, _changes(before, after, own))


def _keys(host: Host, wish: Wish, runner: str) -> dict[str, Any]:
    """Give the keys of the new service on a host."""
    ports = {service.port for service in host.services.values()}
    port = next(port for port in itertools.count(FIRST_PORT) if port not in ports)
    keys: dict[str, Any] = {"runner": runner, "model": wish.model, "port": port}
    if wish.at_once > 1:
        keys[AT_ONCE[runner]] = wish.at_once
    if wish.gpu is False and runner != "vllm":
        keys["gpus"] = []
    return keys


def _problems(before: HostPlan, after: HostPlan, own: ServicePlan, wish: Wish) -> Iterator[str]:
    """Say what speaks against a service on a host: its own memory, a wish that is not met, what it would displace."""
    yield from own.shortfall
    if wish.gpu and own.computes_on_cpu:
        yield "part of it would run on the CPU" if own.gpus else "it would run on the CPU"
    if wish.gpu is False and own.gpus:
        yield "vLLM would take the GPU; it has no setting to leave it alone"
    fitted = {service.name for service in before.services if service.fits}
    lost = [service.name for service in after.services if service.name in fitted and not service.fits]
    if lost:
        yield f"then {', '.join(lost)} would not fit any more"


def _changes(before: HostPlan, after: HostPlan, own: ServicePlan) -> dict[str, list[str]]:
    """List what other services would lose; that threads are shared out anew costs no memory."""
    found = plan.setting_changes(plan.to_json(before), plan.to_json(after))
    told = {name: [each for each in what if not each.startswith("threads")] for name, what in found.items()}
    return {name: what for name, what in told.items() if what and name != own.name}


# --- as JSON ------------------------------------------------------------------------------------------------------


def to_json(found: Pick) -> dict[str, Any]:
    """Give the answer as `pick --json` reports it; memory as `plan --json` does."""
    hosts: dict[str, Any] = {}
    for offer in found.offers:
        hosts.setdefault(offer.host, {"runners": {}})["runners"][offer.runner] = _offer_json(found, offer)
    return {
        "model": found.wish.model,
        "purpose": found.wish.purpose,
        "at_once": found.wish.at_once,
        "gpu": found.wish.gpu,
        "runner": found.runner,
        "why": list(found.why),
        "host": found.best.host if found.best else None,
        "hosts": hosts,
    }


def _offer_json(found: Pick, offer: Offer) -> dict[str, Any]:
    memory = {name: plan.memory_json(name, part) for name, part in offer.plan.memory.items()} if offer.plan else {}
    return {
        "is_choice": offer.is_choice,
        "fits": offer.fits,
        "problems": list(offer.problems),
        "on_gpu": offer.on_gpu,
        "context_tokens_each": offer.context_tokens,
        "memory": memory,
        "changes": {name: list(told) for name, told in offer.changes.items()},
        "write": found.line(offer),
    }
