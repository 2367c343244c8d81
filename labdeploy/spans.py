"""Services that span several hosts: who has which part, and who moves together. Pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from labdeploy.runners.base import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from labdeploy.inventory import Host, Service


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
