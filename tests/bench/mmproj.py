"""Lay the planned memory of projectors beside what llama-server says; part of `make bench-planner`."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy.models.projector import projector
from labdeploy.runners.llama_mmproj import compute_bytes

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker
import mmproj_maker
from llama import running

if TYPE_CHECKING:
    from llama import Llama

    from labdeploy.models.projector import Projector

FILE = Path(__file__).parents[1] / "data" / "mmproj_truth.json"
MIB = 1024 * 1024
# Each projector once as it is, and those with large scores or images of any size once more.
CASES = (
    *((name, ()) for name in mmproj_maker.SHAPES if name != "gemma3-27b"),
    ("gemma3-4b", ("--flash-attn", "off")),
    ("smolvlm2-2b", ("--flash-attn", "off")),
    ("qwen2.5-vl-7b", ("--image-max-tokens", "1024")),
    ("qwen3-vl-4b", ("--image-max-tokens", "1024")),
)
_SAID = {
    "weights_mib": re.compile(r"load_hparams: model size: +([0-9.]+) MiB"),
    "side": re.compile(r"warmup with image size = ([0-9]+)"),
    "compute_mib": re.compile(r"reserve_compute_meta: .* compute buffer size = +([0-9.]+) MiB"),
}


@dataclass(frozen=True)
class Row:
    """What llama-server said of one projector: weights, the side of its first image in pixels, the buffer for that."""

    name: str
    flags: tuple[str, ...]
    weights_mib: float
    side: float
    compute_mib: float

    @property
    def projector(self) -> Projector:
        """The projector as labdeploy reads it."""
        return projector(mmproj_maker.header(self.name))

    @property
    def planned_compute_mib(self) -> float:
        """What labdeploy plans for an image of that size."""
        n_patches = (int(self.side) // self.projector.patch_size) ** 2
        return compute_bytes(self.projector, n_patches, flash_attn="off" not in self.flags) / MIB


def measured(llama: Llama) -> list[Row]:
    """Ask llama-server about every case; it loads weights that are not there, which are zeros."""
    return [_asked(llama, name, flags) for name, flags in CASES]


def _asked(llama: Llama, name: str, flags: tuple[str, ...]) -> Row:
    shape = mmproj_maker.SHAPES[name]
    mmproj_maker.write(llama.models / "mmproj.gguf", name)
    width = shape.projection_dim * (1 + len(mmproj_maker.DEEPSTACK) if shape.kind == "qwen3vl_merger" else 1)
    heads = gguf_maker.Heads(width // 128, 1, 128)
    gguf_maker.dense(gguf_maker.Dense("llama", width, 512, 1, heads, 512)).write(llama.models / "model.gguf")
    words = ("--model", "/mnt/model.gguf", "--mmproj", "/mnt/mmproj.gguf", "--host", "/tmp/x.sock", "-lv", "4")  # noqa: S108
    said: dict[str, float] = {}
    with running(llama.argv(*words, "--ctx-size", "512", "--device", "none", "--fit", "off", *flags), 0) as lines:
        for line in lines:
            said |= {key: float(found[1]) for key, told in _SAID.items() if (found := told.search(line))}
            if len(said) == len(_SAID):
                return Row(name, flags, **said)
    raise RuntimeError(f"llama-server did not say what {name} takes: {said}")


def save(rows: list[Row], build: str) -> None:
    """Write the rows, one a line."""
    lines = [json.dumps([row.name, list(row.flags), row.weights_mib, row.side, row.compute_mib]) for row in rows]
    head = {
        "source": f"llama-server {build}, -lv 4, on a CPU",
        "columns": ["projector", "flags", "weights MiB", "side of the image in pixels", "compute MiB"],
    }
    FILE.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def load() -> list[Row]:
    """Read the rows that were recorded."""
    return [Row(name, tuple(flags), *figures) for name, flags, *figures in json.loads(FILE.read_text())["rows"]]
