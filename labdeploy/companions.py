"""Which hosts a rollback takes along, because they serve something together. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labdeploy.errors import InventoryError, LabdeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from labdeploy.fleet import History
    from labdeploy.generation import SpanMark


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
