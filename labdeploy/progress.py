"""What each host is doing while a push runs, told on stderr as it happens."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from labdeploy.deploy import Stop
from labdeploy.errors import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from labdeploy.deploy import Outcome
    from labdeploy.host import Line

HEARTBEAT_S = 10  # a step that says nothing for longer looks like a hang

_STEPS = {
    "locked": "waiting: {}",
    "receive": "sending",
    "verify": "checking files, room and units",
    "prove": "counting the memory of {}",
    "import": "making {}'s store of models",
    "read": "reading the model of {}",
    "stage": "writing generation {}",
    "arm": "preparing the way back",
    "switch": "installing generation {}",
    "started": "starting {}",
    "restarted": "restarting {}",
    "probe": "asking {} for one token",
    "watch": "watching for {} s whether it stays up",
    "back": "going back to generation {}",
}


class Progress:
    """What each host is doing: in place on a terminal, else a line when something took long; all on stderr.

    While it is open, the first Ctrl-C stops starting hosts and lets those in flight end; the second one interrupts.
    """

    def __init__(self, hosts: Sequence[str], *, verbose: bool, quiet: bool) -> None:
        self.stop = Stop()
        self.interrupted = False
        self._steps = dict.fromkeys(hosts, "connecting")
        self._since = dict.fromkeys(hosts, time.monotonic())
        self._lock = threading.Lock()
        self._verbose = verbose
        self._live: Any = None
        self._fancy = sys.stderr.isatty() and not quiet and not verbose
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._before: Any = None

    def __enter__(self) -> Progress:  # noqa: PYI034 (typing.Self would say no more here)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        if self._fancy:
            from rich.console import Console  # noqa: PLC0415
            from rich.live import Live  # noqa: PLC0415

            console = Console(stderr=True)
            self._live = Live(console=console, get_renderable=self._table, refresh_per_second=8, transient=True)
            self._live.start()
        else:
            self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._live:
            self._live.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def line(self, host: str, line: Line) -> None:
        """Take note of a line the host said."""
        if line.kind != "step":
            return
        self._step(host, _STEPS.get(line.field(0), line.field(0)).format(line.field(1)))

    def done(self, outcome: Outcome) -> None:
        """Take note that a host is done."""
        with self._lock:
            self._steps.pop(outcome.host, None)

    def _step(self, host: str, text: str) -> None:
        with self._lock:
            self._steps[host], self._since[host] = text, time.monotonic()
        if self._verbose:
            print(f"{host}: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            print("interrupted again: hosts in flight settle by themselves", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(INTERRUPTED)  # threads wait for hosts that need no one to wait for them
        self.interrupted = True
        self.stop.set()
        print("interrupted: hosts in flight finish, no other is started", file=sys.stderr)  # noqa: T201

    def _heartbeat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._lock:
                busy = [f"{h}: {text}, {time.monotonic() - self._since[h]:.0f} s" for h, text in self._steps.items()]
            for text in busy:
                print(text, file=sys.stderr, flush=True)  # noqa: T201

    def _table(self) -> Any:  # noqa: ANN401
        from rich.text import Text  # noqa: PLC0415

        with self._lock:
            rows = [f"{h}: {text}, {time.monotonic() - self._since[h]:.0f} s" for h, text in self._steps.items()]
        return Text("\n".join(rows))


class CopyProgress:
    """How far copies and readings of files are: a bar on a terminal, else a line now and then; all on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._fancy = sys.stderr.isatty() and not quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CopyProgress:  # noqa: PYI034 (typing.Self would say no more here)
        if self._fancy:
            from rich import progress  # noqa: PLC0415
            from rich.console import Console  # noqa: PLC0415

            columns = (progress.BarColumn(20), progress.DownloadColumn(binary_units=True))
            speed = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
            text = progress.TextColumn("{task.description}")
            self._bars = progress.Progress(text, *columns, *speed, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def at(self, what: str, done: int, total: int) -> None:
        """Take note of how many bytes of how many are done."""
        with self._lock:
            if self._bars:
                if what not in self._tasks:
                    self._tasks[what] = self._bars.add_task(what, total=total or None)
                self._bars.update(self._tasks[what], completed=done)
            elif time.monotonic() - self._told.setdefault(what, time.monotonic()) >= HEARTBEAT_S:
                self._told[what] = time.monotonic()
                of = f" of {total >> 20}" if total else ""
                print(f"{what}: {done >> 20}{of} MiB", file=sys.stderr, flush=True)  # noqa: T201

    def say(self, text: str) -> None:
        """Print a line, above the bars."""
        (self._bars.console.print if self._bars else functools.partial(print, file=sys.stderr, flush=True))(text)
