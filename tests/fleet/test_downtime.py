"""What is done while the old service still serves, so that the new one is there sooner."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

from lab import Lab

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

NEW = "/srv/models/new.gguf"


def cached_part(file: Path) -> float:
    """Give how much of a file is in the page cache: mincore(2)."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
        del start
    assert not failed
    return sum(page & 1 for page in pages) / len(pages)


def test_a_new_model_is_read_before_the_old_one_stops(
    fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path
) -> None:
    """A runner that ends before it opens the model: then only the push can have read it."""
    lab = Lab(tmp_path, [fresh_host], tiny_model)
    lab.push_ok()
    lab.on_host("cp", "/srv/models/tiny.gguf", NEW)
    lab.on_host("sync", NEW)
    lab.on_host("dd", f"if={NEW}", "iflag=nocache", "count=0", "status=none")
    new = fresh_host.upper / NEW.lstrip("/")  # its own files are read through the cache of this machine
    assert cached_part(new) < 0.5
    inventory = lab.inventory({"model": "new", "flags": ["--no-such-flag"]})
    inventory["models"] = {"new": {"path": "new.gguf", "local": str(tiny_model)}}
    lab.write(inventory)
    ended = lab.push("-v")
    assert ended.code == 5, ended.err
    wanted = [f"{lab.host.name}: reading the model of chat", f"{lab.host.name}: restarting chat"]
    assert [
        line for line in ended.err.splitlines() if line in wanted
    ] == wanted  # a slow step is told again with its time
    assert cached_part(new) == 1
    assert lab.complete()
