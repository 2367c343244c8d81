"""Sandbox hosts: throwaway machines on this machine, with systemd as init, a real sshd and a runner.

What a host is made of is in sandbox_host.py, how it runs in sandbox_boot.py, what lies below it in
sandbox_root.py, and what this machine must have in sandbox_needs.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from labdeploy import sandbox_boot
from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.sandbox_host import (
    CLAIMS,
    SandboxHost,
    create,
    default_state_dir,
    forget_deleted_hosts,
    keep_address,
    look_up,
    machine_lock,
    names_in,
    write_index,
    write_inventory,
)
from labdeploy.sandbox_needs import missing_root, prerequisites
from labdeploy.sandbox_root import SUITES, architecture, ensure_root, in_use, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from typing import IO

    from labdeploy.sandbox_root import Progress

__all__ = [
    "SUITES",
    "SandboxHost",
    "boot",
    "copy_in",
    "default_state_dir",
    "down",
    "ls",
    "power_cut",
    "prerequisites",
    "reboot",
    "run",
    "ssh_argv",
    "up",
    "wait_ready",
    "write_inventory",
]

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def _silent(_: str) -> None:
    pass


def up(
    names: Sequence[str],
    suite: str = "sid",
    *,
    state_dir: Path | None = None,
    progress: Progress = _silent,
) -> list[SandboxHost]:
    """Bring hosts up and return them when they answer; what runs already stays as it is."""
    state = state_dir or default_state_dir()
    _check(names, state)
    root = ensure_root(suite, progress)
    sid_root = None if suite == "sid" else ensure_root("sid", progress)
    with machine_lock():
        hosts = [look_up(state, name) or create(state, name, suite, root, sid_root) for name in names]
        write_index(state)
    _check_suite(hosts, suite)
    started = time.monotonic()
    for host in hosts:
        _start(host)
    for host in hosts:
        wait_ready(host)
        progress(f"{host.name}: up after {time.monotonic() - started:.1f} s at {host.address}:{host.port}")
    return [host for host in ls(state_dir=state) if host.name in names]


def down(
    names: Iterable[str] | None = None, *, state_dir: Path | None = None, progress: Progress = _silent
) -> list[str]:
    """Kill and delete hosts (all when `names` is None); return the names of those that were there."""
    state = state_dir or default_state_dir()
    existing = names_in(state)
    if existing and (problem := missing_root("down")):
        raise problem
    doomed = existing if names is None else sorted(set(existing) & set(names))
    for name in doomed:
        if host := look_up(state, name):
            sandbox_boot.kill(host.address)
        remove_tree(state / "hosts" / name)
        progress(f"{name}: gone")
    if existing:
        with machine_lock():
            forget_deleted_hosts(CLAIMS)
            write_index(state)
    return doomed


def ls(*, state_dir: Path | None = None) -> list[SandboxHost]:
    """Return the hosts of this state folder, by name."""
    state = state_dir or default_state_dir()
    return [host for name in names_in(state) if (host := look_up(state, name))]


def power_cut(host: SandboxHost) -> None:
    """Stop a host as a power cut does: everything dies at once, its files stay.

    Milder than a real one in one way: what the host wrote without an fsync is still there, because the kernel
    of this machine goes on.
    """
    sandbox_boot.kill(host.address)


def boot(host: SandboxHost, *, timeout_s: float = 60) -> None:
    """Boot a host that is off, on the files it had, and return when it answers."""
    _start(host)
    wait_ready(host, timeout_s=timeout_s)


def reboot(host: SandboxHost, *, timeout_s: float = 60) -> None:
    """Let the host reboot itself, and return when it answers again."""
    before = sandbox_boot.leader(host.address)
    run(host, "systemctl", "reboot")
    deadline = time.monotonic() + timeout_s
    while sandbox_boot.leader(host.address) in {None, before} and time.monotonic() < deadline:
        time.sleep(0.05)
    wait_ready(host, timeout_s=timeout_s)


def run(
    host: SandboxHost, *argv: str, check: bool = True, timeout_s: float = 60, stdin: IO[bytes] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the host as root, past SSH, so that it works while the host's sshd is broken."""
    command = sandbox_boot.enter_argv(_leader(host), argv)
    source = stdin or subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=source, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        what = f"{' '.join(argv)} did not end within {timeout_s:.0f} s"
        raise LabdeployError(what, where=host.name) from None
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise LabdeployError(f"{' '.join(argv)} ended with {done.returncode}: {said}", where=host.name)
    return done


def copy_in(host: SandboxHost, local: Path, remote: str, *, mode: str = "0644") -> None:
    """Copy a file into a running host, with its folders; holes in a sparse file stay holes."""
    with local.open("rb") as source:
        run(host, "install", "-D", f"--mode={mode}", "/dev/stdin", remote, stdin=source, timeout_s=600)


def ssh_argv(host: SandboxHost, *command: str) -> list[str]:
    """Return the command line that logs in, trusting only the key that was made for this host."""
    return [
        *("ssh", "-F", "none", "-i", str(host.key), "-p", str(host.port)),
        *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"),
        *("-o", f"UserKnownHostsFile={host.known_hosts}", "-o", "GlobalKnownHostsFile=none"),
        f"{host.user}@{host.address}",
        *command,
    ]


def wait_ready(host: SandboxHost, *, timeout_s: float = 60) -> None:
    """Return when systemd has finished booting and sshd answers.

    `degraded` counts: it says that some unit failed, which whoever broke it may want to look at.
    """
    deadline = time.monotonic() + timeout_s
    while not _is_ready(host):
        alive = sandbox_boot.is_running(host.address)
        if not alive or time.monotonic() > deadline:
            what = f"not ready after {timeout_s:.0f} s" if alive else "died while it booted"
            raise LabdeployError(f"{what}: {_last_words(host)}", where=host.name, hint=f"less {host.console}")
        time.sleep(0.05)


def _check(names: Sequence[str], state_dir: Path) -> None:
    """Refuse what cannot work before anything is made."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise InventoryError(f"{name!r} is no host name", hint="lower-case letters, digits and dashes, 32 at most")
    if re.search(r"[\s:,\\]", str(state_dir)):
        raise InventoryError(f"{state_dir}: overlay mounts want no blank, colon, comma or backslash here")
    for problem in prerequisites():
        raise problem


def _check_suite(hosts: Sequence[SandboxHost], suite: str) -> None:
    for host in hosts:
        if host.suite != suite:
            raise InventoryError(
                f"is there already, and runs {host.suite}",
                where=host.name,
                hint=f"labdeploy sandbox down {host.name}",
            )


def _start(host: SandboxHost) -> None:
    """Start a host unless it runs; whoever comes second sees the first one's."""
    with machine_lock():
        if sandbox_boot.is_running(host.address):
            return
        _check_root(host)
        keep_address(host, CLAIMS)
        sandbox_boot.kill(host.address)  # removes what a crash left of its cgroups
        _launch(host)


def _check_root(host: SandboxHost) -> None:
    for root in (host.root, host.sid_root):
        if root and not root.is_dir():
            raise LabdeployError(
                f"what it stands on was deleted: {root}",
                where=host.name,
                hint=f"labdeploy sandbox down {host.name}",
            )


def _launch(host: SandboxHost) -> None:
    """Start the processes of a host and return when they are in its cgroup."""
    merged = host.folder / "merged"
    library_folder, _ = architecture()
    nspawn = sandbox_boot.nspawn_argv(
        host.name, host.address, merged, sid_root=host.sid_root, library_folder=library_folder
    )
    argv = sandbox_boot.launch_argv(host.address, sandbox_boot.overlay_options(host.root, host.folder), merged, nspawn)
    with ExitStack() as used, host.console.open("ab") as console:
        roots = [used.enter_context(in_use(root)) for root in (host.root, host.sid_root) if root]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console, pass_fds=roots, check=True)
    deadline = time.monotonic() + 5
    while not sandbox_boot.is_running(host.address) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_ready(host: SandboxHost) -> bool:
    try:
        state = run(host, "systemctl", "is-system-running", check=False, timeout_s=10).stdout.strip()
    except LabdeployError:  # there is no init yet, or it is between two boots
        return False
    return state in {"running", "degraded"} and _sshd_answers(host)


def _sshd_answers(host: SandboxHost) -> bool:
    try:
        with socket.create_connection((host.address, host.port), timeout=2) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _leader(host: SandboxHost) -> int:
    if pid := sandbox_boot.leader(host.address):
        return pid
    raise LabdeployError("is off", where=host.name, hint=f"labdeploy sandbox up {host.name}")


def _last_words(host: SandboxHost) -> str:
    """Return the end of what the host printed, else why there is nothing."""
    lines = host.console.read_text(errors="replace").split("\n") if host.console.exists() else []
    return " | ".join([line.strip() for line in lines if line.strip()][-3:]) or "it printed nothing"
