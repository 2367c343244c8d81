"""The planner against what llama-server 0.7.0 said in every setting of `make bench-planner`, without asking again."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import page
import truth

ROWS = truth.load()
MODELS = sorted({row.model for row in ROWS})


@pytest.mark.parametrize("model", MODELS)
def test_every_bar_holds(model: str):
    """Model and context to 1 MiB, compute within 10 % or 16 MiB, never more than 16 MiB too low in all."""
    missed = {truth.changed_words(row): row.problems() for row in ROWS if row.model == model and row.problems()}
    assert missed == {}


def test_compute_is_mostly_exact():
    """To the MiB in at least nine of ten figures."""
    off = [page.off_mib(planned, said) for _, planned, said in page.figures(ROWS)]
    assert off.count(0) >= 0.9 * len(off)


def test_the_benchmark_is_broad():
    """At least 17 architectures, each in 12 settings or more, on the CPU, one GPU and two, all and part."""
    archs = Counter(truth.shape(row.model, gpu=False).arch for row in ROWS)
    assert len(archs) >= 17
    assert min(archs.values()) >= 12
    assert {row.kind for row in ROWS} == set(page.COLOURS)


def test_the_page_is_what_the_rows_give():
    """docs/planner-accuracy.md and its plot are those of the recorded rows."""
    assert (page.DOCS / "planner-accuracy.md").read_text() == page.text(ROWS)
    assert (page.DOCS / "planner-accuracy.svg").read_text() == page.plot(ROWS)


@pytest.mark.parametrize(
    ("model_mib", "context_mib", "compute_mib", "problem"),
    [
        (101.5, 50, 20, "model 101.5 for 99"),
        (99.5, 47.5, 20, "context 47.5 for 50"),
        (99.5, 50.5, 40, "compute 40.0 for 20"),
        (98.2, 49.2, 4.0, "MiB too low in all"),
    ],
)
def test_a_missed_bar_is_told(model_mib: float, context_mib: float, compute_mib: float, problem: str):
    """Each bar is one that can fail."""
    problems = truth.problems_of((model_mib, context_mib, compute_mib), truth.Taken(99, 50, 20))
    assert any(problem in each for each in problems)
