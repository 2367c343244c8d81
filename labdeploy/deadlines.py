"""What cuts off waits that take too long: one thread looks after all of them, where Timers would be a thread each."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOK_S = 0.25  # how often it is looked whether something is late


class Watch:
    """Calls a function where a block of code is not left in time; its thread lives while there is such a block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, tuple[float, Callable[[], object]]] = {}
        self._watched = False

    @contextlib.contextmanager
    def at_most(self, seconds: float, cut_off: Callable[[], object]) -> Iterator[None]:
        """Call `cut_off`, once and in another thread, where the block still runs after so many seconds."""
        wait = object()
        with self._lock:
            self._waits[wait] = (time.monotonic() + seconds, cut_off)
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._look, name="deadlines", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(wait, None)

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_S)
            with self._lock:
                if not self._waits:
                    self._watched = False
                    return
                now = time.monotonic()
                late = [wait for wait, (when, _) in self._waits.items() if when <= now]
                calls = [self._waits.pop(wait)[1] for wait in late]
            for call in calls:  # one that hangs itself must not keep the others from being cut off
                threading.Thread(target=call, daemon=True).start()
