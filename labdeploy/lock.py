"""The lock: what machines and model files reported, kept in text beside the inventory so that plans need no host.

    models:
      qwen: {format: gguf, size_bytes: ..., metadata: {...}, tensors: [...]}
    hosts:
      gpu1: {os: ..., cpu: {...}, ram: {...}, gpus: [...], runners: {...}}     # facts/machine.py
    builds:
      gpu1: {vllm: {use: 0.33.0-1f2e3d4c, installed: [0.33.0-1f2e3d4c]}}

Written by `inspect --add`, `probe` and `runner`, never by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from labdeploy.errors import InventoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_PARTS = ("models", "hosts", "builds", "flags")
_HEAD = "# Written by labdeploy from what machines and model files report. Commit it; do not edit it.\n"


def read(path: Path) -> dict[str, Any]:
    """Read a lock file; a missing one is an empty one."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506 (it is a safe loader)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = f"cannot be read: {' '.join(str(error).split())}"
        raise InventoryError(what, where=str(path), hint=f"git checkout -- {path}") from None
    for part in _PARTS:
        if not isinstance(content, dict) or not isinstance(content.get(part, {}), dict):
            hint = f"git checkout -- {path}"
            raise InventoryError(f"is not a lock file: no mapping of {part} in it", where=str(path), hint=hint)
    return dict(content)


def add_model(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put one model's facts into the lock, replacing what was known of it."""
    content = read(path)
    content["models"] = dict(sorted({**content.get("models", {}), name: entry}.items()))
    write(path, content)


def set_builds(path: Path, host: str, runner: str, *, installed: Iterable[str], use: str | None) -> None:
    """Note which builds of a runner a host has, and which one its services name."""
    content = read(path)
    builds = content.setdefault("builds", {})
    entry = {"use": use, "installed": sorted(installed)} if use else {"installed": sorted(installed)}
    builds[host] = dict(sorted({**builds.get(host, {}), runner: entry}.items()))
    content["builds"] = dict(sorted(builds.items()))
    write(path, content)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a lock file whole, in one rename; the same content makes the same bytes."""
    ordered = {part: content[part] for part in (*_PARTS, *content) if part in content}
    replace(path, _HEAD + yaml.dump(ordered, Dumper=_DUMPER, sort_keys=False, width=110, allow_unicode=True))


def replace(path: Path, text: str) -> None:
    """Write a file whole, in one rename."""
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
