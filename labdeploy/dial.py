"""TCP connections that are opened ahead, while what speaks SSH over them is still being imported.

That import takes 0.1 s of one core. Meanwhile the network does its part, and each host's sshd what it does before it
has heard anything: it starts two processes, reads its keys and configuration, and says who it is (12 ms of processor
time, OpenSSH 10). A connection that is not wanted after all is one that closes without a word.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import select
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from labdeploy.addresses import is_ip

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from labdeploy.ssh import Target

WORKERS = 128  # hosts that are talked to at once; all logging in, they take 0.6 s of each other (5 ms each)
CONNECT_S = 10
SSH_PORT = 22
CONFIGURATIONS = (Path("~/.ssh/config"), Path("/etc/ssh/ssh_config"))
_OTHER_WAY = re.compile(r"^\s*(hostname|port|proxycommand|proxyjump)\b", re.IGNORECASE | re.MULTILINE)
_dialed: dict[tuple[str, int], socket.socket | Future[socket.socket]] = {}


@contextlib.contextmanager
def dialing(hosts: Iterable[Target]) -> Iterator[None]:
    """Start to connect to hosts, to the first so many; but to none where your SSH configuration knows other ways."""
    if not any(_OTHER_WAY.search(_text(file.expanduser())) for file in CONFIGURATIONS):
        _dial({(host.address or host.name, host.ssh.port or SSH_PORT) for host in itertools.islice(hosts, WORKERS)})
    try:
        yield
    finally:
        while _dialed:
            _hang_up(_dialed.popitem()[1])


def dialed(address: str, port: int) -> socket.socket | None:
    """Give the connection that was dialed to an address, for one to use; None where there is none.

    Raises OSError where that could not be reached.
    """
    found = _dialed.pop((address, port), None)
    if isinstance(found, Future):
        return found.result()
    return _connected(found) if found else None


def _dial(addresses: set[tuple[str, int]]) -> None:
    by_name = {at for at in addresses if not is_ip(at[0])}
    if by_name:  # to look a name up is to wait
        threads = ThreadPoolExecutor(len(by_name), "dial")
        _dialed.update({at: threads.submit(socket.create_connection, at, CONNECT_S) for at in by_name})
    for at in addresses - by_name:
        with contextlib.suppress(OSError):  # whoever needs it will meet that again
            _dialed[at] = _begun(*at)


def _hang_up(unused: socket.socket | Future[socket.socket]) -> None:
    if isinstance(unused, Future):
        unused.add_done_callback(lambda done: None if done.exception() else done.result().close())
    else:
        unused.close()


def _begun(address: str, port: int) -> socket.socket:
    """Begin to connect, without a wait and without a thread, which would have to wait for the one that imports."""
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.settimeout(0)
    if (code := sock.connect_ex(where)) not in (0, errno.EINPROGRESS):
        _fail(sock, code)
    return sock


def _connected(sock: socket.socket) -> socket.socket:
    ready = select.poll()
    ready.register(sock, select.POLLOUT)
    in_time = ready.poll(CONNECT_S * 1000)
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if in_time else errno.ETIMEDOUT:
        _fail(sock, code)
    return sock


def _fail(sock: socket.socket, code: int) -> NoReturn:
    sock.close()
    raise OSError(code, os.strerror(code))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
