"""Faults while stores of models are made and pruned: what serves has its store, and the next push works.

With the stand-in for Ollama: what is tried is what labdeploy does on the host. Points and faults as in test_faults.py.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import faults
import pytest
from faults import ALL, SEED, Result, Victim
from ollama_lab import OllamaLab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = ("kill", "power", "full", "readonly")
OWN = ("make_stores", "make_store", "prune_stores")
STORES = r"""
sed -n 's/.*OLLAMA_MODELS=\(\S*\).*/named \1/p' /etc/systemd/system/labdeploy-chat.service
for s in /srv/models/.ollama/*; do [ ! -e "$s" ] || echo "store $s"; done
for l in /etc/labdeploy/stores/*; do [ ! -L "$l" ] || echo "link $(readlink $l)"; done
for g in current good previous; do sed -n 's/^store=/kept /p' /etc/labdeploy/$g/services/* 2>/dev/null; done
find /srv/models/.ollama -samefile /srv/models/tiny.gguf -printf 'blob %h\n'
"""


class Served(Victim):
    """A host whose service is served by Ollama, from another store in each generation."""

    def inventory(self, turn: int, **settings: Any) -> None:  # noqa: ANN401
        """Write inventory number `turn`."""
        self.lab.set(context_length=1024 + 256 * (turn % 8), **settings)

    def stores(self) -> dict[str, set[str]]:
        """Give stores: those that the unit names, are there, links lead to, generations keep, and have the model."""
        found: dict[str, set[str]] = {kind: set() for kind in ("named", "store", "link", "kept", "blob")}
        for line in sandbox.run(self.host, "sh", "-c", STORES, check=False).stdout.splitlines():
            kind, _, path = line.partition(" ")
            found[kind].add(path.removesuffix("/blobs"))
        return found

    def problems(self) -> list[str]:
        """Say what is wrong with a host that should be whole; a store too many is one that the next push takes away."""
        wrong = [each for each in faults.problems(faults.look(self.host)) if each != "stray stores"]
        stores = self.stores()
        wrong += [f"no model in {store}" for store in stores["named"] | stores["kept"] if store not in stores["blob"]]
        wrong += [
            f"nothing leads to {store}" for store in stores["store"] if store.removesuffix(".new") not in stores["link"]
        ]
        return wrong

    def forward(self) -> list[str]:
        """Push the next inventory; it must end well, and leave no store that nobody needs."""
        self.turn += 1
        self.inventory(self.turn)
        code, out = self.push()
        stores = self.stores()
        wrong = [] if code == 0 else [f"exit code {code}: {out[-300:]}"]
        wrong += [f"{kind} {left} is left" for kind in ("store", "link") for left in stores[kind] - stores["kept"]]
        return wrong + self.problems()


@pytest.fixture(scope="module")
def victim(sandbox_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return a host on a small disk with three generations."""
    suite = random.Random(f"{SEED} ollama").choice(sandbox.SUITES)  # noqa: S311
    host = faults.on_small_disk(sandbox.up([f"stores-{suite}"], suite, state_dir=sandbox_dir)[0])
    try:
        lab = OllamaLab(tmp_path_factory.mktemp("stores"), [host], tiny_model)
        lab.install(lab.versions()[0])
        made = Served(lab, faults.write_program(tmp_path_factory.mktemp("program")))
        for _ in range(3):
            assert made.forward() == []
        yield made
    finally:
        sandbox.power_cut(host)
        faults.unmount(host)


@pytest.fixture(scope="module")
def points(victim: Served) -> list[str]:
    """Return the points of the functions for stores that a push passes."""
    victim.turn += 1
    victim.inventory(victim.turn)
    victim.order(("-", 1, "trace"))
    assert victim.push()[0] == 0
    found = [point for point in dict.fromkeys(victim.trace()) if point.split(":")[0] in OWN]
    victim.order()
    assert {point.split(":")[0] for point in found} == set(OWN)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", OWN)
def test_a_fault_while_a_store_is_made_or_pruned(
    victim: Served, points: list[str], results: Path, function: str, kind: str
) -> None:
    """Whatever runs afterwards has its model, and what a crash left is gone with the next push."""
    own = [point for point in points if point.split(":")[0] == function]
    chosen = own if ALL else [random.Random(f"{SEED} {function} {kind}").choice(own)]  # noqa: S311
    wrong: list[Result] = []
    for point in chosen:
        victim.turn += 1
        victim.inventory(victim.turn)
        result = victim.strike(kind, (point, 1), "push", victim.host.name, "--watch", "0")
        result.story, result.silent_s = "store", None  # its port is asked another way
        result.problems += victim.problems() + victim.forward()
        faults.note(results, result)
        wrong += [result] if result.problems else []
    assert not wrong, "\n".join(map(str, wrong))
