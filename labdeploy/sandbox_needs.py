"""What a machine must have to run sandbox hosts, and the command that gets what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path

from labdeploy.errors import LabdeployError

_TOOLS = {  # program: Debian package
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
}

_CAP_SYS_ADMIN = 21  # capabilities(7)
_FIRST_KERNEL = (5, 14)  # the first with cgroup.kill


def prerequisites() -> list[LabdeployError]:
    """Return what this machine lacks to run sandbox hosts; nothing when it can."""
    if not sys.platform.startswith("linux"):
        return [LabdeployError(f"sandbox hosts need Linux, this is {sys.platform}")]
    found = [_missing_tools(), _missing_keyring(), missing_root(), _missing_rights(), _old_kernel()]
    return [problem for problem in found if problem]


def _missing_tools() -> LabdeployError | None:
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if not missing:
        return None
    packages = " ".join(sorted({_TOOLS[tool] for tool in missing}))
    verb = "is" if len(missing) == 1 else "are"
    return LabdeployError(f"{' and '.join(missing)} {verb} missing", hint=f"sudo apt-get install {packages}")


def _missing_keyring() -> LabdeployError | None:
    """Ubuntu has mmdebstrap without the keys that Debian's packages are signed with."""
    if any(Path("/usr/share/keyrings").glob("debian-archive-keyring.*")):
        return None
    return LabdeployError(
        "the keys of the Debian archive are missing", hint="sudo apt-get install debian-archive-keyring"
    )


def missing_root(command: str = "up") -> LabdeployError | None:
    """Return what to say to somebody who is not root."""
    if os.geteuid() == 0:
        return None
    return LabdeployError("sandbox hosts need root, to mount and to boot", hint=f"sudo labdeploy sandbox {command}")


def _missing_rights() -> LabdeployError | None:
    """Root in a container often may not mount."""
    effective = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    may_mount = effective is not None and int(effective[1], 16) >> _CAP_SYS_ADMIN & 1
    if may_mount or os.geteuid() != 0:
        return None
    return LabdeployError(
        "root may not mount here (no CAP_SYS_ADMIN)", hint="docker run --privileged, or another machine"
    )


def _old_kernel() -> LabdeployError | None:
    version = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    if version >= _FIRST_KERNEL:
        return None
    return LabdeployError(f"sandbox hosts need Linux 5.14 or newer, this is {platform.release()}")
