"""Models on hosts as text and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from labdeploy.errors import LabdeployError
from labdeploy.report import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from labdeploy.inventory import Host
    from labdeploy.model_copy import Copied
    from labdeploy.model_files import Store, Verified
    from labdeploy.models.files import ModelFile, StoredModel

SHORT = 12  # digits of a sum that are shown


def size_text(n_bytes: float) -> str:
    """Write a size with a unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:  # noqa: PLR2004 (the step between these units)
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


# --- ls -----------------------------------------------------------------------------------------------------------


def store_json(store: Store | LabdeployError, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Give a host's models as `models ls --json` reports them; `wanted` are names of services by their model's path."""
    if isinstance(store, LabdeployError):
        return {"error": str(store), "models": []}
    return {
        "models_dir": store.folder,
        "free_bytes": store.free_bytes,
        "models": [_model_json(model) for model in store.models],
        "cut_off": [{"name": name, "size_bytes": size} for name, size in store.parts],
        "missing": [{"name": path, "service": service} for path, service in _missing(store, wanted)],
    }


def _model_json(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "size_bytes": model.size_bytes,
        "sha256": model.sha256 or None,
        "changed": model.is_changed,
        "used_by": list(model.users),
        "missing_parts": list(model.missing),
        "files": [_file_json(file) for file in model.files],
    }


def _file_json(file: ModelFile) -> dict[str, Any]:
    keys = ("name", "size_bytes", "mtime", "sha256", "source")
    return {key: getattr(file, key) or None for key in keys} | {"size_bytes": file.size_bytes}


def _missing(store: Store, wanted: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    there = {model.name for model in store.models} | {file.name for model in store.models for file in model.files}
    yield from ((path, service) for path, service in wanted.items() if path.rstrip("/") not in there)


def wanted(host: Host, paths: Mapping[str, str]) -> dict[str, str]:
    """Give the services of a host by the path of their model, given the paths of models."""
    return {paths[name]: service.name for service in host.services.values() for name in service.models.values()}


def stores_text(stores: Mapping[str, Store | LabdeployError], wanted_by: Mapping[str, Mapping[str, str]]) -> str:
    """Say what is where, what is wrong with it, and what is not there but should be."""
    found = {host: store for host, store in stores.items() if not isinstance(store, LabdeployError)}
    rows = [
        (host, model.name, size_text(model.size_bytes), model.sha256[:SHORT] or "-", _users(model))
        for host, store in found.items()
        for model in store.models
    ]
    text = table(("HOST", "MODEL", "SIZE", "SHA256", "USED BY"), rows) if rows else "no models\n" if found else ""
    notes = [note for host, store in found.items() for note in _notes(host, store, wanted_by[host])]
    return text + "".join(f"{note}\n" for note in [*notes, *_differing(found)])


def _users(model: StoredModel) -> str:
    """Name generations and processes; the units of a generation say no more than it does."""
    generations = [user.split()[1] for user in model.users if user.startswith("generation ")]
    others = [user for user in model.users if not user.startswith(("generation ", "unit labdeploy-"))]
    named = [f"generation {', '.join(generations)}"] if generations else []
    return "; ".join([*named, *others]) or "-"


def _notes(host: str, store: Store, wanted: Mapping[str, str]) -> Iterator[str]:
    for model in store.models:
        if model.is_changed:
            yield f"warning: {host}: {model.name} is not what it was: labdeploy models verify {host}"
        if model.missing:
            yield f"warning: {host}: {model.name} lacks {len(model.missing)} parts, the first: {model.missing[0]}"
    for name, size in store.parts:
        yield f"{host}: {name} was cut off after {size_text(size)}; the same push goes on from there"
    for path, service in _missing(store, wanted):
        yield f"{host}: {path} is not there; {service} of the inventory serves it"


def _differing(stores: Mapping[str, Store]) -> Iterator[str]:
    """Tell where one name stands for several contents."""
    by_name: dict[str, dict[str, list[str]]] = {}
    for host, store in stores.items():
        for model in store.models:
            if model.sha256:
                by_name.setdefault(model.name, {}).setdefault(model.sha256, []).append(host)
    for name, sums in by_name.items():
        if len(sums) > 1:
            told = "; ".join(f"{', '.join(hosts)} {sha256[:SHORT]}" for sha256, hosts in sums.items())
            yield f"warning: {name} is not the same everywhere: {told}"


# --- copies and checks ------------------------------------------------------------------------------------------


def copied_text(host: str, copied: Copied) -> str:
    """Say how a copy ended."""
    if copied.result == "unchanged":
        done = f"{copied.name}: is there already"
    else:
        kept = f", {size_text(copied.kept_bytes)} were there" if copied.kept_bytes else ""
        cuts = f", the connection broke {copied.cuts} times" if copied.cuts else ""
        sent = f"{size_text(copied.sent_bytes)} sent{kept} in {copied.seconds:.1f} s{cuts}"
        done = f"{copied.name}: {copied.result}: {sent}, sha256 {copied.sha256[:SHORT]} verified there"
    return "".join(f"{host}: {line}\n" for line in [done, *(f"warning: {text}" for text in copied.warnings)])


def copied_json(copies: Sequence[Copied]) -> list[dict[str, Any]]:
    """Give copies as `models push --json` reports them."""
    return [asdict(copy) | {"seconds": round(copy.seconds, 2), "warnings": list(copy.warnings)} for copy in copies]


def verified_json(found: Sequence[Verified] | LabdeployError) -> dict[str, Any]:
    """Give checks as `models verify --json` reports them."""
    if isinstance(found, LabdeployError):
        return {"error": str(found), "files": []}
    keys = ("name", "result", "size_bytes", "sha256", "expected")
    return {"files": [{key: getattr(file, key) or None for key in keys} for file in found]}


def verified_text(answers: Mapping[str, Sequence[Verified] | LabdeployError]) -> str:
    """Say of each file what it turned out to be."""
    rows = [
        (host, file.name, size_text(file.size_bytes), file.sha256[:SHORT] or "-", file.result)
        for host, files in answers.items()
        if not isinstance(files, LabdeployError)
        for file in files
    ]
    return table(("HOST", "FILE", "SIZE", "SHA256", "RESULT"), rows) if rows else "no models\n"
