"""Small files that are kept for the person who runs labdeploy: one for each inventory, not for ever."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST = 64  # files of one kind; those that were not written for longest go first


def file(kind: str, variable: str, default: str, inventory: Path, words: Sequence[str] = ()) -> Path:
    """Name the file of one kind for an inventory, and for some words on the command line.

    It lies in the folder that `variable` names (XDG_CACHE_HOME, XDG_STATE_HOME), else in `default` of the home folder.
    """
    name = hashlib.sha256(json.dumps([str(inventory.absolute()), *words]).encode()).hexdigest()
    top = Path(os.environ.get(variable) or Path.home() / default)
    return top / "labdeploy" / kind / f"{name[:32]}.json"


def keep(path: Path, text: str) -> None:
    """Write a file, and forget the oldest of its kind; where that cannot be, nothing is said and nothing is left."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(text)
        aside.rename(path)
        found = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime_ns, reverse=True)
        for old in found[MOST:]:
            old.unlink(missing_ok=True)
