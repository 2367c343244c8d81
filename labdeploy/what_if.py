"""`plan --what-if`, `pick`: the inventory as it would be with some values written differently. Nothing is written.

A change goes into the parsed file before it is read, so that the inventory's own rules check it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from labdeploy import inventory as inventories
from labdeploy.errors import InventoryError
from labdeploy.inventory import Host, Inventory, ServiceKeys
from labdeploy.runners import RUNNERS
from labdeploy.schema import InventoryProblemsError, Place, did_you_mean, entries, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from labdeploy.plan import HostPlan

EXAMPLE = 'labdeploy plan --what-if "ctx_size=32768" --what-if "HOST.SERVICE.gpus=[0]"'
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_Key = str | int


@dataclass(frozen=True)
class _Change:
    """One value and where it goes: keys from the top of the inventory, list items by their number."""

    text: str
    keys: tuple[_Key, ...]
    value: yaml.Node

    @property
    def path(self) -> str:
        """Its place as problems name it: `hosts.gpu1.hardware.gpus[0].vram`."""
        steps = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys)
        return "".join(steps).removeprefix(".")


def load(inventory: Inventory, plans: Sequence[HostPlan], texts: Iterable[str]) -> Inventory:
    """Read the inventory again with changes made to the planned hosts: `ctx_size=32768`, `HOST.SERVICE.key=value`."""
    changes = [change for text in texts for change in _changes(text, inventory, plans)]

    def edit(root: yaml.Node) -> yaml.Node:
        for change in changes:
            root = _with_value(root, change.keys, change.value)
        return root

    try:
        return inventories.load(inventory.path, edit)
    except InventoryProblemsError as error:
        first = error.problems[0]
        text = next((c.text for c in changes if first.path.startswith(c.path)), changes[-1].text)
        raise InventoryError(f"{first.path}: {first.what}", where=f"--what-if {text}", hint=EXAMPLE) from None


def with_services(inventory: Inventory, name: str, services: Mapping[str, Mapping[str, Any]]) -> Inventory:
    """Read the inventory again with one more service on hosts, named alike on each: its keys by host."""

    def edit(root: yaml.Node) -> yaml.Node:
        for host, service in services.items():
            if node := yaml.compose(yaml.safe_dump(dict(service)), Loader=yaml.SafeLoader):
                root = _with_value(root, ("hosts", host, "services", name), node)
        return root

    return inventories.load(inventory.path, edit)


def _changes(text: str, inventory: Inventory, plans: Sequence[HostPlan]) -> Iterator[_Change]:
    """Find every place that a change means: those of the host or service it names, else all that know the key."""
    left, equals, right = text.partition("=")
    try:
        value = yaml.compose(right, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        value = None
    if not left.strip() or not equals or value is None:
        raise InventoryError("is not KEY=VALUE", where=f"--what-if {text}", hint=EXAMPLE)
    found = [keys for plan in plans for keys in _places(left.strip(), plan, inventory)]
    if not found:
        raise InventoryError(_nobody_knows(left.strip(), plans), where=f"--what-if {text}", hint=EXAMPLE)
    for keys in found:
        yield _Change(text, keys, value)
        if runner := _runner_to_write(keys, plans):
            yield _Change(text, (*keys[:4], "runner"), yaml.ScalarNode("tag:yaml.org,2002:str", runner))


def _places(left: str, plan: HostPlan, inventory: Inventory) -> Iterator[tuple[_Key, ...]]:
    """Give the places on one host; a name that begins with another one is the longer one."""
    host = plan.host
    named, rest = _named(left, inventory.hosts)
    if named not in ("", host.name):
        return
    at: tuple[_Key, ...] = ("hosts", host.name)
    service, key = _named(rest, [s.name for s in plan.services if s.answers])
    steps = tuple(int(n) if n else word for word, n in _STEP.findall(key))
    if service:
        yield (*at, "services", service, *steps)
    elif steps and steps[0] in settings_of(Host):
        yield (*at, *steps)
    elif steps:
        for each in (s for s in plan.services if s.answers):  # a worker of a span is written under the first host
            if steps[0] in settings_of(ServiceKeys) or steps[0] in settings_of(RUNNERS[each.runner].settings):
                yield (*at, "services", each.name, *steps)


def _named(text: str, names: Iterable[str]) -> tuple[str, str]:
    """Split `NAME.rest`, where the name is one of these and may hold dots itself."""
    found = max((name for name in names if text.startswith(f"{name}.")), key=len, default="")
    return found, text.removeprefix(f"{found}.") if found else text


def _runner_to_write(keys: tuple[_Key, ...], plans: Sequence[HostPlan]) -> str:
    """Name the runner of a service that leaves it open, where a setting of that runner is changed."""
    if len(keys) < 5 or keys[2] != "services" or keys[4] in settings_of(ServiceKeys):  # noqa: PLR2004
        return ""
    plan = next(plan for plan in plans if plan.host.name == keys[1])
    written = plan.host.services[str(keys[3])].runner
    return next(s.runner for s in plan.services if s.name == keys[3]) if written == "auto" else ""


def _nobody_knows(left: str, plans: Sequence[HostPlan]) -> str:
    runners = {service.runner for plan in plans for service in plan.services}
    keys = [*settings_of(Host), *settings_of(ServiceKeys)]
    keys += [key for runner in sorted(runners) for key in settings_of(RUNNERS[runner].settings)]
    scopes = [f"{plan.host.name}.{name}" for plan in plans for name in plan.host.services]
    near = did_you_mean(left.rpartition(".")[2], keys) or did_you_mean(left.rpartition(".")[0], scopes)
    return f"nothing that is planned has {left!r}{near}"


def _with_value(node: yaml.Node, keys: Sequence[_Key], value: yaml.Node) -> yaml.Node:
    """Give a copy of a node with the value at a place; what aliases share is copied, not changed for all."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        items = [_with_value(item, rest, value) if i == key else item for i, item in enumerate(node.value)]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if not isinstance(node, yaml.MappingNode) or isinstance(key, int):
        what = f"has no item {key}" if isinstance(key, int) else f"has no {key} below it"
        raise InventoryError(what, where=f"--what-if (line {node.start_mark.line + 1})", hint=EXAMPLE)
    known: Mapping[str, yaml.Node] = {k.value: v for k, v in entries(node, Place("", ""))}
    empty = yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
    child = _with_value(known.get(key, empty), rest, value)
    own = [(k, child if k.value == key else v) for k, v in node.value]
    if not any(k.value == key for k, _ in own):
        own.append((yaml.ScalarNode("tag:yaml.org,2002:str", key, node.start_mark, node.end_mark), child))
    return yaml.MappingNode(node.tag, own, node.start_mark, node.end_mark)
