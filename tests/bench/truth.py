"""What llama-server said, beside what labdeploy plans: the rows, the bars, and the file they are kept in."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy.models.shape import model_shape
from labdeploy.runners.llama_memory import LlamaMemorySettings, memory

sys.path.insert(0, str(Path(__file__).parent))
import cases
from llama import Taken

if TYPE_CHECKING:
    from collections.abc import Iterable

    from labdeploy.models.shape import ModelShape

FILE = Path(__file__).parents[1] / "data" / "planner_truth.json"
# llama.cpp rounds every figure down to whole MiB: one is exact when it is 0 to 1 MiB above what was printed.
EXACT_MIB = 1.0
COMPUTE_SHARE, COMPUTE_MIB = 0.10, 16.0
UNDER_MIB = 16.0
DEFAULTS = asdict(LlamaMemorySettings(0))


@dataclass(frozen=True)
class Row:
    """One setting of one model: what was said of each GPU, then of the host."""

    model: str
    settings: LlamaMemorySettings
    said: tuple[Taken, ...]

    @property
    def planned(self) -> tuple[tuple[float, float, float], ...]:
        """What labdeploy plans for the same devices: model, context and compute."""
        plan = memory(shape(self.model, gpu=self.settings.n_gpus > 0), self.settings)
        return tuple((part.model_mib, part.context_mib, part.compute_mib) for part in (*plan.gpus, plan.host))

    @property
    def kind(self) -> str:
        """Where the layers are."""
        if not self.settings.n_gpus:
            return "CPU"
        layers = shape(self.model, gpu=True).n_layer_all
        whole = self.settings.gpu_layers > layers and not self.settings.n_cpu_moe
        return f"{self.settings.n_gpus} GPU{'s' * (self.settings.n_gpus > 1)}, {'all' if whole else 'part'}"

    def problems(self) -> list[str]:
        """Return every bar that a device misses."""
        pairs = zip(self.planned, self.said, strict=True)
        return [problem for planned, said in pairs for problem in problems_of(planned, said)]


@cache
def shape(name: str, *, gpu: bool) -> ModelShape:
    """Return the shape of a model of the benchmark."""
    return model_shape(cases.build(name, gpu=gpu).header())


def problems_of(planned: tuple[float, float, float], said: Taken) -> list[str]:
    """Return every bar that a device misses."""
    model, context, compute = planned
    found = []
    for what, mib, printed in (("model", model, said.model_mib), ("context", context, said.context_mib)):
        if not -EXACT_MIB <= mib - printed <= 2 * EXACT_MIB:
            found.append(f"{what} {mib:.1f} for {printed}")
    if abs(compute - said.compute_mib) > max(COMPUTE_MIB, COMPUTE_SHARE * said.compute_mib) + EXACT_MIB:
        found.append(f"compute {compute:.1f} for {said.compute_mib}")
    if sum(planned) < said.total_mib - UNDER_MIB:
        found.append(f"{said.total_mib - sum(planned):.1f} MiB too low in all")
    return found


def is_exact(planned: float, printed: int) -> bool:
    """Say whether a figure is the printed one, give or take the last digit."""
    return -0.02 <= planned - printed <= EXACT_MIB + 0.02


def saved(rows: Iterable[Row], build: str) -> str:
    """Write the rows as JSON, one a line, only what differs from the defaults."""
    lines = [
        json.dumps([row.model, _changed(row.settings), [list(asdict(t).values()) for t in row.said]]) for row in rows
    ]
    head = {
        "source": f"llama-server {build}, -lv 4, before it loads weights; GPUs are llvmpipe, Vulkan's software device",
        "columns": ["model", "settings", "model, context and compute MiB of each GPU, then of the host, rounded down"],
    }
    return json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def _changed(settings: LlamaMemorySettings) -> dict[str, object]:
    return {key: value for key, value in asdict(settings).items() if key != "cpu_flags" and value != DEFAULTS[key]}


def changed_words(row: Row) -> str:
    """Return the settings of a row that are not the defaults, in words."""
    skipped = {"repack", "gpu_api"}
    return ", ".join(f"{key} {value}" for key, value in _changed(row.settings).items() if key not in skipped)


def load() -> list[Row]:
    """Read the rows that were recorded."""
    rows = json.loads(FILE.read_text())["rows"]
    return [Row(model, _settings(changed), tuple(Taken(*said) for said in devices)) for model, changed, devices in rows]


def _settings(changed: dict[str, object]) -> LlamaMemorySettings:
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in changed.items()}
    return LlamaMemorySettings(**{"ctx_size": 0, **lists})
