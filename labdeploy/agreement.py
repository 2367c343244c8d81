"""What all parts of a service that spans several hosts must agree on. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError
from labdeploy.runners.base import Choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from labdeploy.inventory import Host
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
