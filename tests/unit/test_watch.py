"""What takes too long is cut off by one thread, however much is waited for."""

from __future__ import annotations

import contextlib
import threading

import pytest

from labdeploy import deadlines

LATE_S = 30  # of the tests themselves


def watching(others: set[threading.Thread]) -> list[threading.Thread]:
    """List the threads that look for what is late, but for those of others."""
    return [each for each in threading.enumerate() if each.name == "deadlines" and each not in others]


@pytest.fixture
def others() -> set[threading.Thread]:
    """Return the threads that other tests have left."""
    return set(threading.enumerate())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> deadlines.Watch:
    """Return one that looks often."""
    monkeypatch.setattr(deadlines, "LOOK_S", 0.01)
    return deadlines.Watch()


def test_what_is_late_is_cut_off_once(watch: deadlines.Watch):
    """In another thread, while the block still runs."""
    late = threading.Event()
    calls = []
    with watch.at_most(0.02, lambda: (calls.append(threading.current_thread()), late.set())):
        assert late.wait(LATE_S)
        looked_again = threading.Event()
        with watch.at_most(0.02, looked_again.set):
            assert looked_again.wait(LATE_S)
    assert len(calls) == 1
    assert calls[0] is not threading.current_thread()


def test_what_ends_in_time_is_left_alone_and_the_thread_ends(watch: deadlines.Watch, others: set[threading.Thread]):
    """However the block ends; and the next wait is watched again."""
    calls = []
    for _ in range(2):
        with contextlib.suppress(KeyError), watch.at_most(LATE_S, lambda: calls.append(1)):
            (thread,) = watching(others)
            raise KeyError
        thread.join(LATE_S)
        assert not thread.is_alive()
    assert calls == []


def test_one_thread_looks_and_what_hangs_holds_no_other(watch: deadlines.Watch, others: set[threading.Thread]):
    """A connection can hang in being cut off, too."""
    late, over = threading.Event(), threading.Event()
    with watch.at_most(0.01, over.wait), watch.at_most(0.02, late.set), watch.at_most(LATE_S, late.set):
        assert len(watching(others)) == 1
        assert late.wait(LATE_S)
    over.set()
