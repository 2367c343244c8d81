"""The file trees that sandbox hosts are made of: small Debian systems, built once by mmdebstrap, then cached.

A root is never written to after it was built: every host has its own overlay above it. Its folder is named by
a hash of the recipe, so a changed recipe builds a new one and never changes a host that runs on the old one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy.errors import InventoryError, LabdeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[str], None]

SUITES = ("sid", "trixie", "bookworm")

# What a small server has.
_PACKAGES = "systemd,systemd-sysv,dbus,openssh-server,iproute2,curl,ca-certificates,sudo,procps"

# Only sid packages llama.cpp: hosts of the other suites borrow it (see `sandbox_boot.runner_wrapper`).
_RUNNER_PACKAGES = "llama.cpp-tools,llama.cpp-tools-extra,libggml0-backend-vulkan,mesa-vulkan-drivers"

_TRIM = tuple(
    f"--dpkgopt=path-exclude=/usr/share/{folder}/*"
    for folder in ("doc", "man", "info", "locale", "lintian", "bash-completion")
)

# The hosts share the machine's network, so nothing in them may manage it; and a host must do nothing by
# itself in the middle of a test.
_MASKED = (
    "systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service "
    "systemd-resolved.service systemd-timesyncd.service "
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer"
)

# What must differ from host to host is left out of the root. The two `.updated` stamps say that nothing is
# left to do after an upgrade: without them each first boot runs ldconfig and rebuilds the journal catalogue.
_FINISH = (
    'cd "$1" && rm -f etc/ssh/ssh_host_* etc/resolv.conf etc/hostname && : > etc/machine-id'
    f" && for unit in {_MASKED}; do ln -sf /dev/null etc/systemd/system/$unit; done"
    " && mkdir -p var/log/journal srv/models && touch etc/.updated var/.updated"
)

_ARCHITECTURES = {  # machine: (folder of the libraries, file name of the dynamic loader)
    "x86_64": ("x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
    "aarch64": ("aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
}


def architecture() -> tuple[str, str]:
    """Return Debian's library folder and loader name for this machine."""
    try:
        return _ARCHITECTURES[platform.machine()]
    except KeyError:
        known = " and ".join(_ARCHITECTURES)
        raise LabdeployError(f"sandbox hosts are made for {known}, this machine is {platform.machine()}") from None


def cache_dir() -> Path:
    """Return the folder of the built roots."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labdeploy" / "roots"


def build_argv(suite: str, target: Path) -> list[str]:
    """Return the command that builds a root in `target`.

    `unshare` keeps mmdebstrap's mounts (its /proc and /dev) from outliving a killed build. No mirror is
    named: mmdebstrap knows the archive and the keyring of each suite. A copy of sid's archive may be days
    old, which apt refuses unless told otherwise; the signatures are checked all the same.
    """
    packages = f"{_PACKAGES},{_RUNNER_PACKAGES}" if suite == "sid" else _PACKAGES
    stale_copy_is_fine = ['--aptopt=Acquire::Check-Valid-Until "false"'] if suite == "sid" else []
    return [
        *("unshare", "--mount"),
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", f"--include={packages}"),
        *_TRIM,
        '--aptopt=Acquire::Languages "none"',
        *stale_copy_is_fine,
        f"--customize-hook={_FINISH}",
        suite,
        str(target),
    ]


def fingerprint(suite: str) -> str:
    """Return a short hash of all that goes into a root, but not of where it lies."""
    recipe = "\0".join([platform.machine(), *build_argv(suite, Path())])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def root_path(suite: str) -> Path:
    """Return where the root of this suite and recipe lies, built or not."""
    if suite not in SUITES:
        raise InventoryError(f"no suite {suite!r}", hint=f"--suite {'|'.join(SUITES)}")
    return cache_dir() / suite / fingerprint(suite)


def ensure_root(suite: str, progress: Progress) -> Path:
    """Return a complete root, built first if there is none; one process builds, the others wait."""
    root = root_path(suite)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.parent / "build.lock"):
        if not root.is_dir():
            _build(suite, root, progress)
            _remove_unused_siblings(root)
    return root


def _build(suite: str, root: Path, progress: Progress) -> None:
    """Build beside the final name and rename at the end, so that a killed build never counts as a root."""
    progress(f"building the {suite} root, once: about half a minute")
    started = time.monotonic()
    half_built = root.with_suffix(".tmp")
    log = root.parent / "build.log"
    remove_tree(half_built)
    with log.open("wb") as output:
        done = subprocess.run(build_argv(suite, half_built), stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        raise LabdeployError(f"mmdebstrap failed: {_complaints(log)}", where=f"{suite} root", hint=f"less {log}")
    half_built.rename(root)
    progress(f"built the {suite} root in {time.monotonic() - started:.0f} s")


def _complaints(log: Path) -> str:
    """Return the lines of mmdebstrap's log that begin with `E:`, else its last lines."""
    lines = log.read_text(errors="replace").splitlines()
    return " ".join([line for line in lines if line.startswith("E:")][-3:] or lines[-3:])


def _remove_unused_siblings(root: Path) -> None:
    """Remove the roots of older recipes that no host runs on; each is several hundred MB."""
    for old in root.parent.iterdir():
        if old.is_dir() and old != root and _is_unused(old):
            remove_tree(old)
            _use_lock(old).unlink(missing_ok=True)


def _is_unused(root: Path) -> bool:
    with _use_lock(root).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _use_lock(root: Path) -> Path:
    return root.parent / f"{root.name}.lock"


@contextmanager
def in_use(root: Path) -> Iterator[int]:
    """Mark a root as used for as long as the descriptor, or a copy that a child inherited, stays open."""
    with _use_lock(root).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield lock.fileno()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among processes; it frees itself when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_tree(path: Path) -> None:
    """Delete a folder if it is there, but nothing that is mounted in it."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", str(path)], check=True)
