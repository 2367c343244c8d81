"""The inventory: what people write about their machines, models and services, read into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from labdeploy.addresses import is_ip
from labdeploy.errors import InventoryError
from labdeploy.hardware import UNKNOWN, Hardware, Reserve
from labdeploy.runners import RUNNERS
from labdeploy.runners.base import Part, Prefer, owned
from labdeploy.schema import (
    NULL_TAG,
    AbsolutePath,
    EnvName,
    Flags,
    Hostname,
    InventoryProblemsError,
    IpAddress,
    ListOf,
    LocalPath,
    Login,
    MapOf,
    Mib,
    ModelName,
    ModelPath,
    Name,
    OneOf,
    Place,
    Port,
    Problem,
    Record,
    Text,
    Verbatim,
    compose,
    did_you_mean,
    entries,
    models_named,
    read_record,
    record_schema,
    required,
    setting,
    settings_of,
)
from labdeploy.spans import edges, span_of, together, with_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import yaml

UnitName = Text("a unit name such as ollama.service", r"[A-Za-z0-9:_.-]{1,200}\.service")
# Units that nobody means when they name a service of theirs, our own two among them.
RESERVED_UNITS = ("labdeploy-txn.service", "labdeploy-recover.service", "systemd-*", "ssh*", "dbus*", "getty*")
LEAST_RESERVE = (Mib(1024), Mib(512))  # RAM and VRAM left to the system, its desktop and growth at run time
RunnerPlace = Text(
    "a path, or a version or build of `runner ls`",
    r"/(?!.*(?:^|/)\.\.(?:/|$)).+|[0-9A-Za-z][0-9A-Za-z.+_-]*",
    "/usr/bin/llama-server, 0.33.0 or 0.33.0-1f2e3d4c",
)
Purpose = Literal["experiment", "service", "throughput"]


@dataclass(frozen=True)
class Ssh:
    """How a host is reached. What is not written comes from your own SSH configuration."""

    user: str | None = setting(Login, "login name on the host", default=None)
    port: int | None = setting(Port, "port of its SSH server", default=None)
    key: str | None = setting(LocalPath, "private key file, relative to the inventory", default=None)
    known_hosts: str | None = setting(
        LocalPath, "file of known host keys, relative to the inventory; default: your own", default=None
    )


@dataclass(frozen=True)
class Defaults:
    """What holds for every host that does not say otherwise."""

    models_dir: str = setting(AbsolutePath, "folder on each host that holds the models", default="/srv/models")
    ssh: Ssh = setting(Record(Ssh), "how hosts are reached", default=Ssh())
    reserve: Reserve = setting(Record(Reserve), "memory that plans leave alone", default=Reserve())
    runners: Mapping[str, str] = setting(
        MapOf(Name, RunnerPlace), "where each runner's program is, or which build of it", default=dict
    )


@dataclass(frozen=True)
class Model:
    """A model: one GGUF file (or its first split part), or a Hugging Face snapshot folder."""

    path: str = setting(ModelPath, "its place below models_dir on the hosts")
    local: str | None = setting(
        LocalPath, "a copy here to read the header from, relative to the inventory", default=None
    )


@dataclass(frozen=True)
class ServiceKeys:
    """One runner serving one model on one host: one systemd unit. Keys that every runner knows."""

    model: str = setting(ModelName, "a name under models")
    port: int = setting(Port, "TCP port to serve on")
    runner: str = setting(OneOf((*RUNNERS, "auto")), "which program serves; auto decides by purpose", default="auto")
    purpose: Purpose = setting(
        OneOf(("experiment", "service", "throughput")), "what it is for, where runner is auto", default="service"
    )
    prefer: Prefer | None = setting(
        OneOf(("speed", "context")),
        "what to keep where not everything fits: layers on the GPU (of vLLM: fewer GPUs), or context; default: speed",
        default=None,
    )
    bind: str = setting(IpAddress(), "address to listen on", default="127.0.0.1")
    unit: str | None = setting(UnitName, "name of its systemd unit; default: labdeploy-NAME.service", default=None)
    api_key_file: str | None = setting(
        AbsolutePath, "file on the host that holds the API key; only root need be able to read it", default=None
    )
    flags: tuple[str, ...] = setting(Flags(), "more flags for the runner, passed as they are", default=())
    env: Mapping[str, str] = setting(
        MapOf(EnvName, Verbatim()), "more environment variables, passed as they are", default=dict
    )


@dataclass(frozen=True)
class Service(ServiceKeys):
    """A service with its name and the settings of its runner (None where the runner is still to be chosen)."""

    name: str = ""
    settings: Any = None
    part: Part | None = None
    """Which part it is, where the service spans hosts."""

    @property
    def answers(self) -> bool:
        """Whether it answers requests on this host: of one that spans hosts only the head does."""
        return self.part is None or self.part.is_head

    @property
    def models(self) -> dict[str, str]:
        """Every model it needs by the key that names it: the one it serves, then those beside it."""
        return {"model": self.model, **models_named(self.settings)}


@dataclass(frozen=True)
class ServiceKind:
    """Reads a service: the common keys plus those of its runner."""

    def read(self, node: yaml.Node, place: Place) -> Service:
        """Return the service: what is wrong is noted and left out; without a model its name is empty, its port 0."""
        known = settings_of(ServiceKeys)
        values: dict[str, Any] = {}
        rest: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        for key, value in entries(node, place):
            if key.value not in known:
                rest.append((key, value))
            elif value.tag != NULL_TAG:  # a key without a value is as one that is not there
                values[key.value] = known[key.value].metadata["kind"].read(value, place.key(key.value))
        for name, declared in known.items():
            if required(declared) and name not in values:
                place.problem(node, f"{name} is missing: {declared.metadata['doc']}")
        settings = self._runner_settings(values.get("runner", "auto"), rest, place)
        read = {name: value for name, value in values.items() if value is not None}
        return Service(**{"model": "", "port": 0, **read}, settings=settings)

    def _runner_settings(self, runner: str | None, rest: list[tuple[yaml.ScalarNode, yaml.Node]], place: Place) -> Any:  # noqa: ANN401
        """Read the keys that belong to the runner; a key of another runner is an unknown one here."""
        kind = RUNNERS[runner].settings if runner in RUNNERS else None
        known = settings_of(kind) if kind else {}
        values = {}
        for key, value in rest:
            if key.value in known:
                if value.tag != NULL_TAG:
                    values[key.value] = known[key.value].metadata["kind"].read(value, place.key(key.value))
            elif runner is not None:
                place.key(key.value).problem(key, self._unknown(key.value, runner, known))
        return kind(**values) if kind else None

    def _unknown(self, key: str, runner: str, known: Mapping[str, Any]) -> str:
        owners = [name for name, other in RUNNERS.items() if key in settings_of(other.settings)]
        if owners and runner == "auto":
            return f"is a setting of {owners[0]}; write runner: {owners[0]} to tune it"
        if owners:
            return f"is a setting of {owners[0]}, not of {runner}"
        return f"unknown key{did_you_mean(key, [*settings_of(ServiceKeys), *known])}"

    def json_schema(self) -> dict[str, Any]:
        """Describe a service: common keys always, a runner's own keys where that runner is named."""
        common = record_schema(ServiceKeys)
        everything: dict[str, Any] = {key: {} for runner in RUNNERS.values() for key in settings_of(runner.settings)}
        return {
            "type": "object",
            "required": common["required"],
            "properties": common["properties"] | {k: v for k, v in everything.items() if k not in common["properties"]},
            "additionalProperties": False,
            "allOf": [
                {
                    "if": {"properties": {"runner": {"const": name}}, "required": ["runner"]},
                    "then": _keys_of(runner.settings),
                }
                for name, runner in RUNNERS.items()
            ],
        }

    def words(self) -> str:
        """Point at the table of its keys."""
        return "see [Service](#service)"


def _keys_of(settings: type) -> dict[str, Any]:
    """Describe the settings of one runner, and refuse those of the others."""
    own = record_schema(settings)["properties"]
    return {"properties": own, "propertyNames": {"enum": [*settings_of(ServiceKeys), *own]}}


@dataclass(frozen=True)
class Host:
    """A machine."""

    hardware: Hardware = setting(Record(Hardware), "what it has; default: as probed", default=UNKNOWN)
    address: str | None = setting(Hostname, "host name or IP address; default: the host's own name", default=None)
    ssh: Ssh = setting(Record(Ssh), "how it is reached", default=Ssh())
    reserve: Reserve = setting(Record(Reserve), "memory that plans leave alone", default=Reserve())
    models_dir: str | None = setting(AbsolutePath, "folder that holds its models", default=None)
    runners: Mapping[str, str] = setting(
        MapOf(Name, RunnerPlace), "where each runner's program is, or which build of it", default=dict
    )
    services: Mapping[str, Service] = setting(MapOf(Name, ServiceKind()), "what it shall serve", default=dict)
    name: str = ""


@dataclass(frozen=True)
class InventoryKeys:
    """The whole file."""

    hosts: Mapping[str, Host] = setting(MapOf(Name, Record(Host)), "the machines")
    models: Mapping[str, Model] = setting(MapOf(Name, Record(Model)), "the models they serve", default=dict)
    groups: Mapping[str, tuple[str, ...]] = setting(
        MapOf(Name, ListOf(Name)), "names for several hosts at once", default=dict
    )
    defaults: Defaults = setting(Record(Defaults), "what holds for every host", default=Defaults())


@dataclass(frozen=True)
class Inventory(InventoryKeys):
    """A checked inventory; every host has its name, address, SSH settings, reserve and models folder filled in."""

    path: Path = field(default_factory=Path)

    @property
    def folder(self) -> Path:
        """Where relative paths of the inventory start."""
        return self.path.parent

    @property
    def lock_path(self) -> Path:
        """Its lock file, beside it."""
        return self.path.with_name(self.path.stem + ".lock.yaml")

    def at(self, path: str) -> str:
        """Say where a dotted path stands: `inventory.yaml:12: models.qwen`; the line of the deepest part there is."""
        return f"{self.path.name}:{_line(self._root, path.split('.'))}: {path}"

    @functools.cached_property
    def _root(self) -> yaml.Node:
        return compose(self.path)

    def select(self, patterns: Iterable[str]) -> list[Host]:
        """Give the hosts that names, groups and globs mean, in the inventory's order; all of them for no pattern."""
        wanted: set[str] = set()
        patterns = list(patterns)
        for pattern in patterns:
            found = set(fnmatch.filter(self.hosts, pattern))
            groups = fnmatch.filter(self.groups, pattern)
            found |= {member for group in groups for member in self.groups[group]}
            if groups and not found:
                hint = f"name its hosts in {self.path}"
                raise InventoryError(f"group {groups[0]} has no hosts", where=str(self.path), hint=hint)
            if not found:
                near = did_you_mean(pattern, [*self.hosts, *self.groups])
                raise InventoryError(
                    f"no host or group is named {pattern!r}{near}",
                    where=str(self.path),
                    hint="labdeploy plan  # without a name: every host",
                )
            wanted |= found
        return [host for name, host in self.hosts.items() if name in wanted or not patterns]

    def with_companions(self, hosts: Iterable[Host]) -> list[Host]:
        """Give hosts and those that share a service with them, in the inventory's order."""
        groups = together(self.hosts, edges(self.hosts.values()))
        wanted = {name for host in hosts for name in groups[host.name]}
        return [host for name, host in self.hosts.items() if name in wanted]

    def host(self, name: str) -> Host:
        """Give one host by its exact name."""
        if name not in self.hosts:
            what = f"no host is named {name!r}{did_you_mean(name, self.hosts)}"
            raise InventoryError(what, where=str(self.path), hint="labdeploy plan  # names every host")
        return self.hosts[name]


def load(path: Path, edit: Callable[[yaml.Node], yaml.Node] | None = None) -> Inventory:
    """Read and check an inventory; InventoryProblemsError lists everything that is wrong with it at once.

    `edit` changes the parsed file before it is read, for questions of the kind "what if".
    """
    place = Place(path.name, "")
    root = edit(compose(path)) if edit else compose(path)
    keys = read_record(InventoryKeys, root, place)
    if keys is not None:
        _check_across(keys, root, place)
    if keys is None or place.problems:
        raise InventoryProblemsError(place.problems, hint=f"labdeploy -i {path} render  # once they are mended")
    hosts = with_parts({name: _complete(name, host, keys.defaults) for name, host in keys.hosts.items()})
    return Inventory(hosts=hosts, models=keys.models, groups=keys.groups, defaults=keys.defaults, path=path)


def default_unit(service: str) -> str:
    """Name the systemd unit of a service that names none."""
    return f"labdeploy-{service}.service"


def _complete(name: str, host: Host, defaults: Defaults) -> Host:
    """Fill in what a host leaves to the defaults."""
    ssh = Ssh(*(getattr(host.ssh, key) or getattr(defaults.ssh, key) for key in settings_of(Ssh)))
    reserves = (host.reserve, defaults.reserve, Reserve(*LEAST_RESERVE))
    ram = next(reserve.ram for reserve in reserves if reserve.ram is not None)
    vram = next(reserve.vram for reserve in reserves if reserve.vram is not None)
    return dataclasses.replace(
        host,
        name=name,
        address=host.address or name,
        ssh=ssh,
        reserve=Reserve(ram, vram),
        models_dir=host.models_dir or defaults.models_dir,
        runners={**defaults.runners, **host.runners},
        services={
            n: dataclasses.replace(service, name=n, unit=service.unit or default_unit(n))
            for n, service in host.services.items()
        },
    )


# --- checks that need more than one key --------------------------------------------------------------------------


def _check_across(keys: InventoryKeys, root: yaml.Node, place: Place) -> None:
    """Note what no single key can see: names that point nowhere, ports used twice, flags that a setting owns."""
    hosts, models = _below(root, "hosts"), _below(root, "models")
    for name, members in keys.groups.items():
        at = f"groups.{name}"
        if name in hosts:
            _note(root, place, at, "is the name of a host too")
        for member in members:
            if member not in hosts:
                _note(root, place, at, f"{member!r} is not a host{did_you_mean(member, hosts)}")
    _check_runners(keys.defaults.runners, "defaults", root, place)
    _check_spans(keys.hosts, root, place)
    for name, node in hosts.items():
        host = keys.hosts.get(name) or Host(services=_services(node))
        _check_runners(host.runners, f"hosts.{name}", root, place)
        _check_services(name, host, models, root, place)
        if host.hardware.is_known and not any(p.path.startswith(f"hosts.{name}.hardware") for p in place.problems):
            _check_gpus(name, host, root, place)


def _below(node: yaml.Node, key: str) -> dict[str, yaml.Node]:
    """Give what stands below a key of a mapping by name, whether it could be read or not."""
    nodes = {k.value: v for k, v in entries(node, Place("", ""))}
    return {k.value: v for k, v in entries(nodes[key], Place("", ""))} if key in nodes else {}


def _services(host: yaml.Node) -> dict[str, Service]:
    """Give the services of a host that could not be read as a whole; what is wrong with them was noted already."""
    return {name: ServiceKind().read(node, Place("", "")) for name, node in _below(host, "services").items()}


def _check_runners(runners: Mapping[str, str], at: str, root: yaml.Node, place: Place) -> None:
    for name in runners:
        if name not in RUNNERS:
            _note(root, place, f"{at}.runners.{name}", f"is not a runner{did_you_mean(name, RUNNERS)}")


def _check_services(host_name: str, host: Host, models: Iterable[str], root: yaml.Node, place: Place) -> None:
    taken: dict[int, list[tuple[str, str]]] = {}
    units: dict[str, str] = {}
    for name, service in host.services.items():
        at = f"hosts.{host_name}.services.{name}"
        for key, model in service.models.items():
            if model and model not in models:
                _note(root, place, f"{at}.{key}", f"{model!r} is not under models{did_you_mean(model, models)}")
        for other, bind in taken.get(service.port, []):
            if service.port and _overlap(bind, service.bind):
                _note(root, place, f"{at}.port", f"{service.port} is already the port of {other} on this host")
        taken.setdefault(service.port, []).append((name, service.bind))
        unit = service.unit or default_unit(name)
        if unit in units:
            _note(root, place, f"{at}.unit", f"{unit} is already the unit of {units[unit]} on this host")
        if any(fnmatch.fnmatch(unit, reserved) for reserved in RESERVED_UNITS):
            _note(root, place, at, f"{unit} is a unit of labdeploy itself or of the system; take another name")
        units[unit] = name
        if service.runner in RUNNERS:
            for key, what in owned(service.flags, service.env, RUNNERS[service.runner]):
                _note(root, place, f"{at}.{key}", what)


def _check_spans(hosts: Mapping[str, Host], root: yaml.Node, place: Place) -> None:
    """Note what cannot be served together: hosts that are not there, a name twice, addresses that are none."""
    for host_name, host in hosts.items():
        taken: dict[int, str] = {}
        for name, service in host.services.items():
            found = _span_problems(service, host_name) if span_of(service) else _without_span(service)
            for key, what in (*found, *_member_problems(name, service, hosts)):
                _note(root, place, f"hosts.{host_name}.services.{name}.{key}", what)
            if span_of(service) and (other := taken.setdefault(service.settings.joins_at, name)) != name:
                what = f"other hosts join {other} at {service.settings.joins_at} already; write another span_port"
                _note(root, place, f"hosts.{host_name}.services.{name}.span_port", what)


def _without_span(service: Service) -> Iterator[tuple[str, str]]:
    for key in ("span_addresses", "span_port", "engine"):
        if getattr(service.settings, key, None) is not None:
            yield key, "belongs to a service that spans hosts; write span: [HOST, HOST] too"


def _span_problems(service: Service, host_name: str) -> Iterator[tuple[str, str]]:
    span, addresses = span_of(service), service.settings.span_addresses
    if span[0] != host_name:
        yield "span", f"begins with {span[0]}; the first host answers: write {host_name} first, or the service there"
    if len(span) < 2 or len(set(span)) < len(span):  # noqa: PLR2004 (one host is no span)
        yield "span", "must name two or more hosts, each once"
    if addresses and len(addresses) != len(span):
        yield "span_addresses", f"names {len(addresses)} addresses for {len(span)} hosts"


def _member_problems(name: str, service: Service, hosts: Mapping[str, Host]) -> Iterator[tuple[str, str]]:
    """Say what is wrong with the hosts that a service spans."""
    for i, member in enumerate(span_of(service)):
        if member not in hosts:
            yield "span", f"{member!r} is not a host{did_you_mean(member, hosts)}"
            continue
        if i and name in hosts[member].services:
            yield "span", f"{member} has a service {name} of its own; give one of them another name"
        if not service.settings.span_addresses and not is_ip(hosts[member].address or member):
            yield "span", f"{member} has no IP address under address:; write span_addresses: [ADDRESS, ADDRESS]"


def _check_gpus(host_name: str, host: Host, root: yaml.Node, place: Place) -> None:
    for name, service in host.services.items():
        for gpu in getattr(service.settings, "gpus", None) or ():
            if gpu >= len(host.hardware.gpus):
                what = f"names GPU {gpu}, the host has {len(host.hardware.gpus)}, counted from 0"
                _note(root, place, f"hosts.{host_name}.services.{name}.gpus", what)


def _overlap(one: str, other: str) -> bool:
    """Tell whether two listen addresses collide on the same port; a wildcard takes them all."""
    wildcards = {"0.0.0.0", "::"}  # noqa: S104 (a comparison, not a bind)
    return one == other or bool({one, other} & wildcards)


def _note(root: yaml.Node, place: Place, path: str, what: str) -> None:
    """Note a problem at a dotted path, at the line of the deepest part of it that the file has."""
    place.problems.append(Problem(place.file, _line(root, path.split(".")), path, what))


def _line(node: yaml.Node, path: list[str]) -> int:
    import yaml  # noqa: PLC0415

    line = int(node.start_mark.line) + 1
    for length in range(1, len(path) + 1):  # a name may hold dots, so the longest key that matches is taken
        if not isinstance(node, yaml.MappingNode):
            break
        name = ".".join(path[:length])
        for key, value in node.value:
            if key.value == name:
                below = _line(value, path[length:]) if path[length:] else 0
                return max(int(key.start_mark.line) + 1, below)
    return line


def json_schema() -> dict[str, Any]:
    """Describe inventory.yaml as a JSON Schema, for editors; generated from the same declarations that read it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "labdeploy inventory",
        **record_schema(InventoryKeys),
    }
