"""Is a service well, and how soon does its first token come? Measured at the client, through the SSH connection."""

from __future__ import annotations

import dataclasses
import datetime as dt
import http.client
import json
import secrets
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labdeploy.baselines import MAX_TOKENS, Baselines
from labdeploy.errors import LabdeployError
from labdeploy.runners.base import reachable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from labdeploy.host import HostConnection
    from labdeploy.inventory import Inventory, Service

SAMPLES = 5  # after one warm-up; p95 of so few is their maximum
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Sample:
    """One streamed completion."""

    ttft_ms: float
    tokens: int
    decode_s: float
    """From the first token to the last."""


@dataclass(frozen=True)
class Report:
    """How a service answered."""

    healthy: bool
    samples: tuple[Sample, ...] = ()
    error: str | None = None
    baseline_ttft_ms: float | None = None
    """Its median time to first token when it was first checked; None where this is that time."""
    regressed: str = ""
    """In what it got slower since then."""

    @property
    def failed(self) -> bool:
        """Whether it does not answer, or slower than it did."""
        return not self.healthy or bool(self.regressed)

    @property
    def ttft_p50_ms(self) -> float | None:
        """Median time to first token."""
        return statistics.median(sample.ttft_ms for sample in self.samples) if self.samples else None

    @property
    def ttft_p95_ms(self) -> float | None:
        """The slowest but one in twenty."""
        times = sorted(sample.ttft_ms for sample in self.samples)
        return times[min(len(times) - 1, int(len(times) * 0.95))] if times else None

    @property
    def best_ttft_ms(self) -> float | None:
        """The shortest time to first token."""
        return min((sample.ttft_ms for sample in self.samples), default=None)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Median speed after the first token."""
        return statistics.median(self._speeds) if self._speeds else None

    @property
    def best_tokens_per_s(self) -> float | None:
        """The highest speed after the first token."""
        return max(self._speeds, default=None)

    @property
    def _speeds(self) -> list[float]:
        return [(s.tokens - 1) / s.decode_s for s in self.samples if s.tokens > 1 and s.decode_s > 0]


def against_baselines(answers: Mapping[str, Any], inventory: Inventory, *, anew: bool) -> dict[str, Any]:
    """Lay what hosts answered beside their baselines; what has none, or shall have a new one, gets this for one."""
    kept, today = Baselines(inventory.path), f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"

    def compared(host: str, name: str, found: Report) -> Report:
        model = inventory.host(host).services[name].model
        before = None if anew else kept.of(host, name, model)
        if before is None:
            kept.take(host, name, model, found, today)
            return found
        return dataclasses.replace(found, baseline_ttft_ms=before.ttft_p50_ms, regressed=before.worse(found))

    laid = {
        host: {name: compared(host, name, found) for name, found in answer.items()}
        if isinstance(answer, dict)
        else answer
        for host, answer in answers.items()
    }
    kept.keep()
    return laid


def check_service(connection: HostConnection, service: Service, *, samples: int = SAMPLES) -> Report:
    """Ask a service for a few short completions; the first one warms up and does not count."""
    try:
        headers = _headers(connection, service)
        taken = [_completion(connection, service, headers) for _ in range(samples + 1)]
    except LabdeployError as error:
        return Report(healthy=False, error=error.what)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Report(healthy=False, error=str(error) or type(error).__name__)
    return Report(healthy=True, samples=tuple(taken[1:]))


def _headers(connection: HostConnection, service: Service) -> dict[str, str]:
    """Give the headers of a request; an API key is read from the host for this one run and kept nowhere."""
    headers = {"Content-Type": "application/json"}
    if service.api_key_file:
        key = connection.read_file(service.api_key_file, 0, 4096).decode(errors="replace").split("\n")[0]
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _completion(connection: HostConnection, service: Service, headers: dict[str, str]) -> Sample:
    """Stream one completion; a fresh nonce leads the prompt, so that no cached prefix flatters the figure."""
    body = {
        "model": getattr(service.settings, "served_model_name", None) or service.model,
        "prompt": f"{secrets.token_hex(4)} Tell me about the weather today.",
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    web = connection.http(reachable(service.bind), service.port, TIMEOUT_S)
    started = time.monotonic()
    web.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = web.getresponse()
    if answer.status != http.client.OK:
        raise LabdeployError(f"HTTP {answer.status}: {answer.read(300).decode(errors='replace').strip()}")
    arrivals = [time.monotonic() for line in answer if _has_token(line)]
    web.close()
    if not arrivals:
        raise LabdeployError("the completion held no token")
    return Sample((arrivals[0] - started) * 1000, len(arrivals), arrivals[-1] - arrivals[0])


def _has_token(line: bytes) -> bool:
    """Tell whether a line of the event stream carries text."""
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[len(b"data: ") :]).get("choices") or [{}]
    return bool(choices[0].get("text"))
