"""Services that span several hosts: who has which part, what all parts must agree on, who moves together. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.runners.base import Choice, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from labdeploy.fleet import History
    from labdeploy.generation import SpanMark
    from labdeploy.inventory import Host, Service
    from labdeploy.plan import HostPlan
    from labdeploy.runners.base import ServicePlan

# Settings that all parts must have alike, and which of the parts' own choices all can live with.
AGREED: Mapping[str, Callable[[Iterable[Any]], Any]] = {
    "max_model_len": min,
    "max_num_seqs": min,
    "max_num_batched_tokens": min,
    "tensor_parallel_size": max,
    "enforce_eager": any,
    "dtype": max,  # where they differ it is float16 on old GPUs and bfloat16 on new ones, and the old have only one
    "kv_cache_memory": min,
}


def span_of(service: Service) -> tuple[str, ...]:
    """Give the hosts that a service spans; none for one that runs on its host alone."""
    return getattr(service.settings, "span", None) or ()


def with_parts(hosts: Mapping[str, Host]) -> dict[str, Host]:
    """Give each host of a span its part of the service; the inventory has it under its first host only."""
    parts: dict[str, dict[str, Service]] = {name: dict(host.services) for name, host in hosts.items()}
    for host in hosts.values():
        for name, service in host.services.items():
            for rank, member in enumerate(span_of(service)):
                parts[member][name] = _part(service, rank, hosts)
    return {name: dataclasses.replace(host, services=parts[name]) for name, host in hosts.items()}


def _part(service: Service, rank: int, hosts: Mapping[str, Host]) -> Service:
    members = span_of(service)
    addresses = service.settings.span_addresses or tuple(hosts[member].address or member for member in members)
    part = Part(rank, members, addresses)
    return dataclasses.replace(service, part=part, api_key_file=None if rank else service.api_key_file)


def together(hosts: Iterable[str], edges: Iterable[Iterable[str]]) -> dict[str, frozenset[str]]:
    """Give for each host all that move with it: hosts that share a span, and those that share one with them."""
    groups = {host: frozenset([host]) for host in hosts}
    for edge in edges:
        joined = frozenset().union(*(groups.get(host, frozenset([host])) for host in edge))
        groups |= dict.fromkeys(joined, joined)
    return groups


def edges(hosts: Iterable[Host]) -> list[tuple[str, ...]]:
    """List the spans of hosts, each as its hosts."""
    return [s.part.hosts for host in hosts for s in host.services.values() if s.part is not None]


# --- planning -----------------------------------------------------------------------------------------------------


def disagreements(plans: Iterable[HostPlan]) -> Iterator[tuple[str, dict[str, Choice]]]:
    """Give for each span whose parts chose otherwise what all of them can live with, by the service's name."""
    for name, parts in _by_span(plans):
        kinds = {bool(plan.gpus) for plan in parts.values()}
        if len(kinds) > 1:
            without = next(host for host, plan in parts.items() if not plan.gpus)
            raise InventoryError(
                f"spans hosts with and without GPUs: {without} has none that vLLM can use",
                where=f"{next(iter(parts))}: {name}",
                hint="name hosts of one kind in span:",
            )
        common: dict[str, Choice] = {}
        for key, least in AGREED.items():
            values = {host: plan.settings[key].value for host, plan in parts.items() if key in plan.settings}
            if len(set(values.values())) > 1:
                value = least(values.values())
                host = next(host for host, own in values.items() if own == value)
                common[key] = Choice(value, f"all hosts of the span need the same, and {host} can do no other")
        if common:
            yield name, common


def with_settings(host: Host, agreed: Mapping[str, Mapping[str, Choice]]) -> Host:
    """Write into a host's parts of spans what all parts agreed on."""
    services = {
        name: dataclasses.replace(
            service,
            settings=dataclasses.replace(service.settings, **{k: choice.value for k, choice in agreed[name].items()}),
        )
        if service.part is not None and name in agreed
        else service
        for name, service in host.services.items()
    }
    return dataclasses.replace(host, services=services)


def with_reasons(plan: HostPlan, agreed: Mapping[str, Mapping[str, Choice]]) -> HostPlan:
    """Say of what was agreed on that it was, and not that the inventory says so."""
    services = tuple(
        dataclasses.replace(s, settings={**s.settings, **agreed[s.name]}) if s.part and s.name in agreed else s
        for s in plan.services
    )
    return dataclasses.replace(plan, services=services)


def with_ids(plans: Iterable[HostPlan]) -> list[HostPlan]:
    """Give all parts of a span one id, made of everything that any part is started with."""
    plans = list(plans)
    ids = {name: _id(parts.values()) for name, parts in _by_span(plans)}
    return [
        dataclasses.replace(
            plan,
            services=tuple(dataclasses.replace(s, span_id=ids[s.name]) if s.part else s for s in plan.services),
        )
        for plan in plans
    ]


def _id(parts: Iterable[ServicePlan]) -> str:
    facts = [[p.argv, dict(p.env), p.facts, p.memory_max_mib, p.health.deadline_s] for p in parts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _by_span(plans: Iterable[HostPlan]) -> Iterator[tuple[str, dict[str, ServicePlan]]]:
    """Give each span's name and its parts by host, the head first."""
    parts: dict[tuple[str, tuple[str, ...]], dict[str, ServicePlan]] = {}
    for plan in plans:
        for service in plan.services:
            if service.part is not None:
                parts.setdefault((service.name, service.part.hosts), {})[plan.host.name] = service
    for (name, hosts), found in parts.items():
        yield name, {host: found[host] for host in hosts if host in found}


# --- going back ---------------------------------------------------------------------------------------------------


def taken_along(
    targets: Mapping[str, str], ask: Callable[[Iterable[str]], Mapping[str, History | LabdeployError]]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Add to hosts that go to a generation those that serve something with them, and tell who moves with whom.

    Each goes to the generation in which the span is as it is in that of the first host. Targets are numbers, or
    `previous`. A host that cannot be asked is left to fail by itself, unless another one would take it along.
    """
    found, pairs = dict(targets), []
    histories = dict(ask(found))
    todo = list(found)
    while todo:
        wanted = {}
        for host in todo:
            history = histories[host]
            if isinstance(history, LabdeployError):
                continue
            for other, (name, mark) in _companions(host, history, _number(found[host], history)).items():
                pairs.append((host, other))
                wanted[other] = (name, mark)
        todo = [other for other in wanted if other not in found]
        histories |= ask(todo)
        for other, (name, mark) in wanted.items():
            found[other] = _matching(found.get(other), other, histories[other], name, mark)
    return found, pairs


def _companions(host: str, history: History, to: int) -> dict[str, tuple[str, SpanMark | None]]:
    """Give the hosts that must move where one goes to a generation: each with the span and what it is there.

    None where the span is not part of that generation.
    """
    here, there = history.spans(history.current), history.spans(to)
    moving = {name for name in {*here, *there} if here.get(name) != there.get(name)}
    return {
        other: (name, there.get(name))
        for name in sorted(moving)
        for mark in (here.get(name), there.get(name))
        if mark
        for other in mark.hosts
        if other != host
    }


def _matching(asked: str | None, host: str, history: History | LabdeployError, name: str, mark: SpanMark | None) -> str:
    """Give the generation of a host in which a span is as it is to be: what was asked for, else the nearest before."""
    if isinstance(history, LabdeployError):
        if asked is None:
            raise history
        return asked  # it fails by itself, and the others with it
    kept = sorted(history.manifests.keys() | {0}, key=lambda n: (n != history.current, n > history.current, -n))
    candidates = kept if asked is None else [_number(asked, history)]
    for number in candidates:
        if history.spans(number).get(name) == mark:
            return asked or str(number)
    raise InventoryError(
        f"{name} spans its hosts, and no generation that {host} could go to has it as the others would",
        where=host,
        hint=f"labdeploy history {host}",
    )


def _number(target: str, history: History) -> int:
    return history.previous if target == "previous" else int(target)
