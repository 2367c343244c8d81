"""How a sandbox host runs: one cgroup, and in it a small shell, systemd-nspawn and the host's own init.

The cgroup is what identifies a running host. It is named by the host's address, which is unique on this
machine; "is it running?" is the kernel's own answer (`cgroup.events`), and a power cut is one write to
`cgroup.kill`, which reaches every process at once and never a stranger that got a recycled pid. (Killing
nspawn is not enough: seen with systemd 252, the init inside lives on.)

The host's mounts live in a mount namespace of its own, so they end with its last process whatever ends it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy.errors import LabdeployError
from labdeploy.sandbox_root import architecture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RUNNER_PROGRAMS = ("llama-server", "llama-fit-params", "llama-bench")

_SID = "/opt/sid"

# $1: the cgroups, $2: overlay options, $3: where the overlay is mounted, the rest: nspawn's command line.
# - The shell waits in a cgroup beside nspawn's: in the same one it would keep controllers from being enabled.
# - Writing 0 to cgroup.procs moves the writer.
# - nspawn notes its containers in /run/systemd/nspawn and leaves the notes behind when it is killed: a tmpfs
#   that only this mount namespace sees takes them along.
# - nspawn ends with 133 when the host asks for a reboot under --keep-unit (nspawn.c, EXIT_FORCE_RESTART).
_SUPERVISE = """\
set -e
cgroups=$1 overlay=$2 merged=$3
shift 3
for cgroup in $cgroups; do
    mkdir -p "$cgroup/supervising"
    echo 0 > "$cgroup/supervising/cgroup.procs"
done
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
mount -t overlay overlay -o "$overlay" "$merged"
cd /
status=133
while [ "$status" = 133 ]; do
    status=0
    (
        for cgroup in $cgroups; do echo 0 > "$cgroup/cgroup.procs"; done
        exec "$@"
    ) || status=$?
done
exit "$status"
"""


def scope_name(address: str) -> str:
    """Return the name of a host's cgroup, which is also its systemd scope where this machine runs systemd."""
    return f"labdeploy-sandbox-{address}.scope"


def nspawn_argv(name: str, address: str, merged: Path, *, sid_root: Path | None, library_folder: str) -> list[str]:
    """Return the command that runs the host.

    `--keep-unit --register=no`: neither systemd-machined nor D-Bus is needed. No option for the network: the
    host shares this machine's. The environment gives the host a cgroup v2 tree even where this machine mixes
    v1 and v2, without which systemd 258 and later refuse to boot.
    """
    ggml = f"/usr/lib/{library_folder}/ggml"  # sid's libraries look here for the backend that suits the CPU
    borrowed = [f"--bind-ro={sid_root}:{_SID}", f"--bind-ro={sid_root}{ggml}:{ggml}"] if sid_root else []
    return [
        *("env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_LOCK=0"),
        *("systemd-nspawn", "--quiet", "--boot", "--keep-unit", "--register=no", "--console=pipe"),
        *("--link-journal=no", "--resolv-conf=copy-host", "--timezone=off"),
        f"--directory={merged}",
        f"--machine=labdeploy-{address}",
        f"--hostname={name}",
        *borrowed,
    ]


def overlay_options(root: Path, folder: Path) -> str:
    """Return the mount options of the overlay: `root` below, the host's own changes above."""
    return f"lowerdir={root},upperdir={folder / 'upper'},workdir={folder / 'work'}"


def launch_argv(address: str, overlay: str, merged: Path, nspawn: Sequence[str]) -> list[str]:
    """Return the command that starts a host and returns at once.

    Where this machine runs systemd, cgroups are systemd's to give: a scope with Delegate= is how to ask.
    """
    scope = [
        "systemd-run",
        "--scope",
        "--quiet",
        "--collect",
        "--property=Delegate=yes",
        "--description=labdeploy sandbox host",
    ]
    return [
        *("setsid", "--fork"),
        *([*scope, f"--unit={scope_name(address)}"] if _machine_runs_systemd() else []),
        *("unshare", "--mount"),
        *("sh", "-c", _SUPERVISE, scope_name(address)),
        " ".join(map(str, _cgroups(address))),
        overlay,
        str(merged),
        *nspawn,
    ]


def enter_argv(leader: int, argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` inside the host whose init has the pid `leader` out here."""
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return [
        *("nsenter", f"--target={leader}", "--all", "--root", "--wd"),
        *("env", "--ignore-environment", path, "HOME=/root", "LANG=C.UTF-8", *argv),
    ]


def runner_wrapper() -> str:
    """Return the script that runs sid's llama.cpp on an older suite.

    sid's C library is newer than the host's, so the program is started by sid's own loader. The libraries
    look for their CPU and GPU backends in a folder that is bound to the same place as on sid, and take the
    best one that this CPU can run; software Vulkan is found through the file that names its driver.
    """
    library_folder, loader = architecture()
    return (
        "#!/bin/sh\n"
        f"L={_SID}/usr/lib/{library_folder}\n"
        f'export VK_DRIVER_FILES="${{VK_DRIVER_FILES-{_SID}/usr/share/vulkan/icd.d/lvp_icd.json}}"\n'
        f'exec "$L/{loader}" --library-path "$L:$L/llama" --argv0 "$0" "{_SID}/usr/bin/${{0##*/}}" "$@"\n'
    )


def cgroups_of(address: str, mountinfo: str) -> list[Path]:
    """Return a host's cgroups, v2 first: one per hierarchy that systemd-nspawn works in.

    `mountinfo` is /proc/self/mountinfo (proc(5)): after the ` - ` come type, source and options. A machine
    that mixes v1 and v2 has both a v2 tree and a v1 tree named `systemd`.
    """
    unified, named = [], []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ")[:3]
        if kind == "cgroup2":
            unified.append(before.split(" ")[4])
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            named.append(before.split(" ")[4])
    parent = "system.slice" if _machine_runs_systemd() else ""
    return [Path(mount) / parent / scope_name(address) for mount in unified[:1] + named[:1]]


def is_running(address: str) -> bool:
    """Return whether any process of the host is alive."""
    try:
        return "populated 1" in (_cgroups(address)[0] / "cgroup.events").read_text()
    except (OSError, IndexError):
        return False


def leader(address: str) -> int | None:
    """Return the pid, out here, of the host's init, or None while there is none."""
    return next((pid for pid in _pids(address) if _is_init(pid)), None)


def kill(address: str, *, timeout_s: float = 20) -> None:
    """Kill all processes of the host at once and remove its cgroups; nothing happens when there are none."""
    for cgroup in _cgroups(address)[:1]:
        if cgroup.exists():
            (cgroup / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + timeout_s
    while is_running(address):
        if time.monotonic() > deadline:
            raise LabdeployError(f"its processes outlived SIGKILL by {timeout_s:.0f} s", where=address)
        time.sleep(0.02)
    for cgroup in _cgroups(address):
        _remove_cgroup(cgroup)


def _machine_runs_systemd() -> bool:
    """Return what sd_booted(3) does."""
    return Path("/run/systemd/system").is_dir()


def _cgroups(address: str) -> list[Path]:
    return cgroups_of(address, Path("/proc/self/mountinfo").read_text())


def _pids(address: str) -> Iterator[int]:
    for cgroup in _cgroups(address)[:1]:
        for folder, _, _ in os.walk(cgroup):  # it goes on where a cgroup ends meanwhile; rglob does not (Python 3.11)
            yield from map(int, _read(Path(folder, "cgroup.procs")).split())


def _is_init(pid: int) -> bool:
    """Return whether this is pid 1 one pid namespace further in (`NSpid:  4711  1`, proc(5))."""
    fields = next((line for line in _read(Path(f"/proc/{pid}/status")).splitlines() if "NSpid:" in line), "")
    return fields.split()[2:] == ["1"]


def _read(file: Path) -> str:
    """Return the text of a file of a process or cgroup, which may end at any moment."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _remove_cgroup(cgroup: Path) -> None:
    """Remove an empty cgroup and those below; systemd may be removing its scope at the same time."""
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()
