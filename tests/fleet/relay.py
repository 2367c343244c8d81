"""A TCP relay between a controller and a host that counts the round trips a conversation needs.

Each piece of data has a number: one more than the highest that had reached its sender when it left. So an answer has
one more than its question, and what both sides say on their own have the same. The highest number that reached the
client is the longest chain of waits, halved the round trips, whatever the time things took. The delay keeps apart
what is sent without waiting from what is sent in answer; a side that is slower than it would be counted as waiting.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Self

DELAY_S = 0.15  # one way; far more than either side takes to say what it says unasked
HANDSHAKE = 1  # TCP's own round trip


@dataclass
class Conversation:
    """One connection through the relay."""

    reached: dict[str, int] = field(default_factory=lambda: {"client": 0, "server": 0})
    """The highest number that reached each side."""
    n_bytes: dict[str, int] = field(default_factory=lambda: {"client": 0, "server": 0})
    """What each side has sent."""
    over: bool = False
    """The client has hung up: what still comes is not waited for."""

    @property
    def round_trips(self) -> int:
        """TCP's own, and those of what was said."""
        return HANDSHAKE + (self.reached["client"] + 1) // 2


class Relay:
    """Listens on a port of its own and passes everything on to an address, each piece after the delay."""

    def __init__(self, address: str, port: int) -> None:
        self.target = (address, port)
        self.conversations: list[Conversation] = []
        self._listener = socket.create_server((address, 0))
        self._listener.settimeout(0.2)
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            server = socket.create_connection(self.target)
            self._sockets += [client, server]
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            said = Conversation()
            self.conversations.append(said)
            for sender, receiver, names in (
                (client, server, ("client", "server")),
                (server, client, ("server", "client")),
            ):
                pieces: queue.Queue[tuple[float, int, bytes]] = queue.Queue()
                self._start(self._take, said, sender, pieces, names[0])
                self._start(self._give, said, receiver, pieces, names[1])

    def _take(self, said: Conversation, sender: socket.socket, pieces: queue.Queue, name: str) -> None:
        while True:
            try:
                data = sender.recv(1 << 16)
            except OSError:
                data = b""
            said.n_bytes[name] += len(data)
            pieces.put((time.monotonic() + DELAY_S, said.reached[name] + 1, data))
            if not data:
                said.over |= name == "client"
                return

    def _give(self, said: Conversation, receiver: socket.socket, pieces: queue.Queue, name: str) -> None:
        data = b"-"
        while data:
            at, number, data = pieces.get()
            time.sleep(max(0.0, at - time.monotonic()))
            if data and not said.over:
                said.reached[name] = max(said.reached[name], number)
            try:
                receiver.sendall(data) if data else receiver.shutdown(socket.SHUT_WR)
            except OSError:
                return
