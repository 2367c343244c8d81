"""Lay labdeploy's memory planner beside the real llama-server: `make bench-planner`.

    python tests/bench/planner.py            measure everything again, then write the truth file, the page and the plot
    python tests/bench/planner.py MODEL...   measure some models and print where the plan misses the bars
    python tests/bench/planner.py --mmproj   measure projectors alone
    python tests/bench/planner.py --page     write the page and the plot from the truth file

Needs root for the sandbox's sid root, which has the llama-server that is asked. Files have the published shapes, full
length and no weights. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy import sandbox_root

sys.path.insert(0, str(Path(__file__).parent))
import cases
import mmproj
import page
import truth
from llama import Llama

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORKERS = 2


def main(words: Sequence[str]) -> int:
    """Measure, record, write, judge."""
    if list(words) == ["--page"]:
        return judge(truth.load(), write_from=truth.load())
    with tempfile.TemporaryDirectory() as folder:
        llama = Llama(sandbox_root.ensure_root("sid", say), Path(folder))
        if list(words) == ["--mmproj"]:
            mmproj.save(mmproj.measured(llama), llama.build())
            return judge(truth.load(), write_from=truth.load())
        rows = [row for model in words or cases.MODELS for row in measured(llama, model)]
        if not words:
            mmproj.save(mmproj.measured(llama), llama.build())
            truth.FILE.write_text(truth.saved(rows, llama.build()))
    return judge(rows, write_from=None if words else rows)


def say(text: str) -> None:
    """Print progress."""
    sys.stderr.write(f"{text}\n")


def measured(llama: Llama, model: str) -> Iterator[truth.Row]:
    """Ask about one model in every setting, whole for the CPU and cut for the software GPU."""
    started, n = time.monotonic(), 0
    for gpu in (False, True):
        file = cases.build(model, gpu=gpu).write(llama.models / f"{model}.gguf")
        settings = [each for each in cases.settings_for(model, truth.shape(model, gpu=gpu)) if bool(each.n_gpus) == gpu]
        with ThreadPoolExecutor(WORKERS) as workers:
            said_of_all = workers.map(partial(llama.table, file.name), settings)
            for asked, said in zip(settings, said_of_all, strict=True):
                n += 1
                yield truth.Row(model, asked, said)
        file.unlink()
    say(f"{model}: {n} settings in {time.monotonic() - started:.0f} s")


def judge(rows: Sequence[truth.Row], write_from: Sequence[truth.Row] | None) -> int:
    """Print every bar that is missed, and write the page."""
    missed = [(row, problem) for row in rows for problem in row.problems()]
    for row, problem in missed:
        say(f"error: {row.model}: {row.kind}: {problem}, with {truth.changed_words(row)}")
    if write_from is not None:
        page.write(write_from)
    say(f"{len(rows)} settings, {len(missed)} bars missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
