"""How fast each service answered when it was first checked from here, so that a later check can say it got slower.

Kept for each inventory in the state folder of who checks, because times are taken at this end of the connection.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labdeploy import kept

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.check import Report

# What got slower: the best of some completions takes twice as long, and so much more that no busy moment explains it.
FACTOR = 2.0
LEAST_MS = 50.0
MAX_TOKENS = 24  # of one completion of a check


@dataclass(frozen=True)
class Baseline:
    """What a check found of a service with a model."""

    model: str
    at: str
    ttft_p50_ms: float
    decode_tokens_per_s: float | None = None

    def worse(self, now: Report) -> str:
        """Say in what a service got slower, by the best of its completions; nothing where it did not."""
        ttft, decode = now.best_ttft_ms, now.best_tokens_per_s
        if ttft is not None and ttft > FACTOR * self.ttft_p50_ms and ttft > self.ttft_p50_ms + LEAST_MS:
            return f"first token after {ttft:.0f} ms or more, {self.ttft_p50_ms:.0f} ms on {self.at}"
        before = self.decode_tokens_per_s
        if decode and before and decode * FACTOR < before and MAX_TOKENS * 1000 * (1 / decode - 1 / before) > LEAST_MS:
            return f"{decode:.1f} tokens/s or less, {before:.1f} on {self.at}"
        return ""


class Baselines:
    """The baselines of one inventory. Those that cannot be read are made anew."""

    def __init__(self, inventory: Path) -> None:
        self._file = kept.file("baselines", "XDG_STATE_HOME", ".local/state", inventory)
        self._known = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self._file.read_bytes())
            return {key: dataclasses.asdict(Baseline(**value)) for key, value in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def of(self, host: str, service: str, model: str) -> Baseline | None:
        """Give a service's baseline; None where it has none with this model."""
        found = self._known.get(f"{host}/{service}")
        return Baseline(**found) if found and found["model"] == model else None

    def take(self, host: str, service: str, model: str, now: Report, at: str) -> None:
        """Make what a check found the baseline of a service."""
        if now.ttft_p50_ms is not None:
            taken = Baseline(model, at, now.ttft_p50_ms, now.decode_tokens_per_s)
            self._known[f"{host}/{service}"] = dataclasses.asdict(taken)

    def keep(self) -> None:
        """Write them down; where that cannot be, the next check takes new ones."""
        kept.keep(self._file, json.dumps(self._known, indent=1))
