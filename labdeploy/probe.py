"""Ask hosts what they have, and headers of the models that they serve, and keep it in the lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labdeploy import fleet, machines, sources
from labdeploy.builds import with_programs
from labdeploy.errors import InventoryError, LabdeployError, ModelError
from labdeploy.facts import machine as facts
from labdeploy.runners import RUNNERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from labdeploy.facts.machine import Machine
    from labdeploy.host import HostConnection
    from labdeploy.inventory import Host, Inventory


@dataclass(frozen=True)
class Probed:
    """What one host said: of itself, how long its models are, and the headers that the lock did not have."""

    machine: Machine
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each model of its services that is there, all parts together, by the model's name."""
    headers: Mapping[str, dict[str, Any] | ModelError] = field(default_factory=dict)
    """What the lock shall keep of a model that is new to it or has another length; or why it cannot be read."""


def probe(inventory: Inventory, hosts: Sequence[Host], lock: Mapping[str, Any]) -> dict[str, Probed | LabdeployError]:
    """Ask hosts at once; one that cannot answer has its error in place of an answer."""

    def question(connection: HostConnection) -> Probed:
        return _probe_host(connection, inventory, inventory.host(connection.name), lock)

    return fleet.ask_all(hosts, inventory.folder, question)


def _probe_host(connection: HostConnection, inventory: Inventory, host: Host, lock: Mapping[str, Any]) -> Probed:
    paths = model_paths(inventory, host)
    software = any(gpu.maker == "software" for gpu in host.hardware.gpus)
    programs = {name: runner.default_binary for name, runner in RUNNERS.items()}
    programs.update(with_programs(host, lock).runners)
    runners = [f"{name}={path}" for name, path in sorted(programs.items())]
    parts = dict.fromkeys(part for path in paths.values() for part in sources.remote_parts(path))
    answer = connection.ask_facts(host.models_dir or "", "software" if software else "-", *parts, "--", *runners, "--")
    files = facts.parse_sizes(answer)
    sizes = {name: size for name, path in paths.items() if (size := _size(path, files)) is not None}
    known = lock.get("models", {})
    new = [name for name, size in sizes.items() if _locked_size(known.get(name)) != size]
    headers = {name: _header(connection, paths[name], files) for name in new}
    read = {name: entry["size_bytes"] for name, entry in headers.items() if isinstance(entry, dict)}
    return Probed(facts.parse_machine(answer), {**sizes, **read}, headers)  # an index may leave out files of a folder


def model_paths(inventory: Inventory, host: Host) -> dict[str, str]:
    """Give the place of each model that a host's services use."""
    models_dir = (host.models_dir or "").rstrip("/")
    names = dict.fromkeys(name for service in host.services.values() for name in service.models.values())
    return {name: f"{models_dir}/{inventory.models[name].path}" for name in names}


def _size(path: str, files: Mapping[str, int]) -> int | None:
    """Add up the parts of a model as the lock counts them; None where one is missing."""
    inside = [size for file, size in files.items() if file.startswith(f"{path}/") and file.endswith(".safetensors")]
    if inside:
        return sum(inside)
    parts = [files.get(part) for part in sources.remote_parts(path)]
    found = [part for part in parts if part is not None]
    return sum(found) if len(found) == len(parts) else None


def _locked_size(entry: object) -> object:
    return entry.get("size_bytes") if isinstance(entry, dict) else None


def _header(connection: HostConnection, path: str, files: Mapping[str, int]) -> dict[str, Any] | ModelError:
    inside = {file.removeprefix(f"{path}/"): size for file, size in files.items() if file.startswith(f"{path}/")}
    try:
        if inside:
            return sources.lock_entry(sources.read_remote_snapshot(connection, path, inside))
        return sources.lock_entry(sources.read_remote_gguf(connection, path))
    except ModelError as error:
        return error


# --- the lock -------------------------------------------------------------------------------------------------


def updated(lock: Mapping[str, Any], answers: Mapping[str, Probed | LabdeployError]) -> dict[str, Any]:
    """Give the lock with what hosts said in it; what it had of others stays as it is.

    Where hosts have different files under one model's name, the first of the inventory that was asked decides.
    """
    hosts, flags = dict(lock.get("hosts", {})), dict(lock.get("flags", {}))
    models, decided = dict(lock.get("models", {})), set()
    for name, probed in answers.items():
        if isinstance(probed, LabdeployError):
            continue
        hosts[name], known = facts.to_lock(probed.machine, _known_before(lock, name))
        flags |= known
        for model in probed.sizes:
            entry = probed.headers.get(model)
            if model in decided or isinstance(entry, ModelError):
                continue
            decided.add(model)
            models[model] = entry or models[model]
    used = {build.get("flags") for host in hosts.values() for build in _mappings(_mapping(host).get("runners"))}
    return {
        **lock,
        "models": dict(sorted(models.items())),
        "hosts": dict(sorted(hosts.items())),
        "flags": {digest: words for digest, words in sorted(flags.items()) if digest in used},
    }


def _known_before(lock: Mapping[str, Any], name: str) -> Machine | None:
    """Give what the lock has of a host; an entry that was mangled is written anew."""
    try:
        return facts.from_lock(lock, name)
    except InventoryError:
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [_mapping(inner) for inner in _mapping(value).values()]


# --- what to tell ---------------------------------------------------------------------------------------------


def errors(probed: Probed | LabdeployError) -> list[LabdeployError]:
    """List what went wrong with a host: it did not answer, or headers of models could not be read."""
    if isinstance(probed, LabdeployError):
        return [probed]
    return [entry for entry in probed.headers.values() if isinstance(entry, ModelError)]


def warnings(
    inventory: Inventory, host: Host, probed: Probed | LabdeployError, lock: Mapping[str, Any]
) -> tuple[str, ...]:
    """Say what is odd about a host, given what the inventory says and the lock now has."""
    if isinstance(probed, LabdeployError):
        return ()
    machine = probed.machine
    config = [build.config for build in machine.runners.values() if build.config]
    return (
        *map(str, machines.differences(host, machine)),
        *_gpu_warnings(host, machine),
        *_model_warnings(inventory, host, probed, lock),
        *(f"{path} is read by every llama-server of the host, and changes what a plan does not set" for path in config),
    )


def _gpu_warnings(host: Host, machine: Machine) -> Iterator[str]:
    for gpu in machine.gpus:
        if gpu.vram_mib is None and not gpu.shares_ram:
            yield f"{gpu.name} at {gpu.pci}: no driver tells its memory; it cannot be used as it is"
    build = machine.runners.get("llama-server")
    serves = any(service.runner in ("llama-server", "auto") for service in host.services.values())
    own = [gpu.name for gpu in machine.gpus if gpu.vram_mib and not gpu.shares_ram]
    if build and build.flags and serves and own and not build.devices:
        yield f"{build.path} sees no GPU, the host has {', '.join(own)}: is it a build for CPUs alone?"


def _model_warnings(inventory: Inventory, host: Host, probed: Probed, lock: Mapping[str, Any]) -> Iterator[str]:
    for name, path in model_paths(inventory, host).items():
        size, locked = probed.sizes.get(name), _locked_size(lock.get("models", {}).get(name))
        readers = [s for s in host.services.values() if s.model == name and not getattr(s.settings, "models", None)]
        if size is None and readers:
            yield f"models.{name}: {path} is not there, or not all of it"
        elif size is not None and size != locked and not isinstance(probed.headers.get(name), ModelError):
            yield f"models.{name}: {path} has {size} bytes here, the lock is of a file with {locked}"
