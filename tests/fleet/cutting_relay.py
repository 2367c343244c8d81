"""A relay in front of a host's sshd that breaks connections after so many bytes, as a bad network does."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

RESET = struct.pack("ii", 1, 0)  # close without a goodbye


class CuttingRelay:
    """Passes connections on; the first ones break after so many bytes, either way, as `cuts` says one by one."""

    def __init__(self, target: tuple[str, int], cuts: Iterable[int]) -> None:
        self._target = target
        self._cuts = iter(cuts)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._broken: set[int] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    @property
    def done(self) -> int:
        """Give how many connections were broken."""
        return len(self._broken)

    def _serve(self) -> None:
        for number in itertools.count():
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            left = [next(self._cuts, 1 << 62)]
            host = socket.create_connection(self._target)
            for one, other in ((client, host), (host, client)):
                threading.Thread(target=self._pass_on, args=(one, other, left, number), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, left: list[int], number: int) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data[: left[0]])
                left[0] -= len(data)
                if left[0] <= 0:
                    self._broken.add(number)  # once, though both ways may come here
                    for end in (one, other):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
