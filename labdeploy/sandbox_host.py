"""What a sandbox host is made of: its folder, its address, its keys and the files that make it itself.

STATE/client_key, known_hosts, inventory.yaml     for whoever logs in
STATE/hosts/NAME/host.json                        written last: a folder without it is half made
STATE/hosts/NAME/upper/                           what the host has that its root has not
/run/labdeploy-sandbox/127.77.0.N -> STATE/hosts/NAME     who has which address, on the whole machine
"""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import subprocess
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from labdeploy.errors import LabdeployError
from labdeploy.sandbox_boot import RUNNER_PROGRAMS, is_running, kill, runner_wrapper
from labdeploy.sandbox_root import locked, remove_tree

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

# Machine-wide, because hosts of all people and test runs share the loopback addresses. Emptied when the
# machine boots, which also ends the hosts.
CLAIMS = Path("/run/labdeploy-sandbox")

ADDRESSES = tuple(f"127.77.0.{n}" for n in range(2, 255))

# 22, unless this machine's own sshd has it on all addresses, ours included.
PORTS = (22, 2222, 22022)


@dataclass(frozen=True)
class SandboxHost:
    """A sandbox host when it was looked at; `running` does not follow what happens later."""

    name: str
    suite: str
    address: str
    port: int
    folder: Path
    root: Path
    sid_root: Path | None  # where llama-server is borrowed from; None on sid, which has its own
    running: bool = False
    user: str = "root"

    @property
    def state_dir(self) -> Path:
        """The folder of all hosts that were brought up together with this one."""
        return self.folder.parent.parent

    @property
    def key(self) -> Path:
        """The private key that logs in."""
        return self.state_dir / "client_key"

    @property
    def known_hosts(self) -> Path:
        """The file that vouches for the key of each host."""
        return self.state_dir / "known_hosts"

    @property
    def upper(self) -> Path:
        """What the host changed over its root; to be written to only while the host is off."""
        return self.folder / "upper"

    @property
    def console(self) -> Path:
        """What the host printed on its console."""
        return self.folder / "console.log"


def default_state_dir() -> Path:
    """Return where a person's hosts are kept, also when the person said sudo."""
    given = os.environ.get("XDG_STATE_HOME")
    home = Path(_person().pw_dir) if "SUDO_UID" in os.environ else Path.home()
    return (Path(given) if given else home / ".local" / "state") / "labdeploy" / "sandbox"


def machine_lock() -> AbstractContextManager[None]:
    """Hold what makes addresses, keys and indexes consistent among processes; for milliseconds only."""
    return locked(CLAIMS / "lock")


def names_in(state_dir: Path) -> list[str]:
    """Return the hosts that have a folder, half made ones too."""
    hosts = state_dir / "hosts"
    return sorted(folder.name for folder in hosts.iterdir()) if hosts.is_dir() else []


def look_up(state_dir: Path, name: str) -> SandboxHost | None:
    """Return a host, or None when there is none or only half of one."""
    folder = state_dir / "hosts" / name
    try:
        known = json.loads((folder / "host.json").read_text())
    except FileNotFoundError:
        return None
    return SandboxHost(
        name=name,
        suite=known["suite"],
        address=known["address"],
        port=known["port"],
        folder=folder,
        root=Path(known["root"]),
        sid_root=Path(known["sid_root"]) if known["sid_root"] else None,
        running=is_running(known["address"]),
    )


def create(state_dir: Path, name: str, suite: str, root: Path, sid_root: Path | None) -> SandboxHost:
    """Make a host that is off. To be called with the machine lock held."""
    folder = state_dir / "hosts" / name
    _make_state_dir(state_dir)
    remove_tree(folder)
    forget_deleted_hosts(CLAIMS)
    for part in ("upper", "work", "merged"):
        (folder / part).mkdir(parents=True)
    (folder / "upper").chmod(0o755)  # it becomes the host's /
    address, port = claim_address(folder, CLAIMS)
    host = SandboxHost(name, suite, address, port, folder, root, sid_root)
    host_key = _make_key(folder / "host_key")
    client_key = _make_key(host.key)
    for path, (content, mode) in host_files(host, host_key, client_key).items():
        _put(host.upper, path, content, mode)
    record = {
        "suite": suite,
        "address": address,
        "port": port,
        "root": str(root),
        "sid_root": sid_root and str(sid_root),
    }
    write_whole(folder / "host.json", json.dumps(record, indent=2) + "\n")
    return host


def host_files(host: SandboxHost, host_key: Path, client_key: Path) -> dict[str, tuple[str, int]]:
    """Return the files, with their modes, that make a host itself."""
    sshd = f"ListenAddress {host.address}\nPort {host.port}\nHostKey /etc/ssh/ssh_host_ed25519_key\nUseDNS no\n"
    wrappers = {f"usr/local/bin/{program}": (runner_wrapper(), 0o755) for program in RUNNER_PROGRAMS}
    return {
        "etc/hostname": (f"{host.name}\n", 0o644),
        "etc/hosts": (f"127.0.0.1 localhost\n::1 localhost\n{host.address} {host.name}\n", 0o644),
        "etc/machine-id": (f"{uuid.uuid4().hex}\n", 0o444),
        "etc/ssh/sshd_config.d/10-sandbox.conf": (sshd, 0o644),
        "etc/ssh/ssh_host_ed25519_key": (host_key.read_text(), 0o600),
        "etc/ssh/ssh_host_ed25519_key.pub": (public(host_key), 0o644),
        "root/.ssh/authorized_keys": (public(client_key), 0o600),
        **(wrappers if host.sid_root else {}),
    }


def claim_address(folder: Path, claims: Path) -> tuple[str, int]:
    """Take a free address and port for the host in `folder`."""
    for address in ADDRESSES:
        claim = claims / address
        if not claim.is_symlink() and (port := _free_port(address)):
            claim.symlink_to(folder)
            return address, port
    raise LabdeployError(f"all of {ADDRESSES[0]} to {ADDRESSES[-1]} are taken", hint="labdeploy sandbox down --all")


def keep_address(host: SandboxHost, claims: Path) -> None:
    """Claim again the address that a host had before this machine rebooted."""
    claim = claims / host.address
    if claim.exists() and claim.resolve() != host.folder.resolve():
        raise LabdeployError(
            f"its address {host.address} was given to {claim.resolve()} since this machine booted",
            where=host.name,
            hint=f"labdeploy sandbox down {host.name}",
        )
    claim.unlink(missing_ok=True)
    claim.symlink_to(host.folder)


def forget_deleted_hosts(claims: Path) -> None:
    """Free the addresses of hosts whose folders are gone, and end those that were deleted while they ran."""
    for claim in claims.iterdir():
        if claim.is_symlink() and not claim.exists():
            kill(claim.name)
            claim.unlink()


def write_index(state_dir: Path) -> None:
    """Write what others read about the hosts (known_hosts, inventory), or remove it with the last host."""
    hosts = [host for name in names_in(state_dir) if (host := look_up(state_dir, name))]
    if hosts:
        write_whole(state_dir / "known_hosts", "".join(map(known_hosts_line, hosts)))
        write_inventory(state_dir)
        return
    for name in ("client_key", "client_key.pub", "known_hosts", "inventory.yaml"):
        (state_dir / name).unlink(missing_ok=True)
    with suppress(OSError):  # a person may keep a file of their own there
        (state_dir / "hosts").rmdir()
        state_dir.rmdir()


def known_hosts_line(host: SandboxHost) -> str:
    """Return the line that vouches for a host's key; the port is written when it is not 22 (sshd(8))."""
    address = host.address if host.port == PORTS[0] else f"[{host.address}]:{host.port}"
    return f"{address} {public(host.folder / 'host_key')}"


def write_inventory(state_dir: Path) -> Path:
    """Write an inventory of all hosts beside them, for a person to start from, and return its path."""
    path = state_dir / "inventory.yaml"
    hosts = [host for name in names_in(state_dir) if (host := look_up(state_dir, name))]
    head = "# Rewritten by every `labdeploy sandbox up` and `down`: copy it before you edit it.\n"
    write_whole(path, head + yaml.safe_dump(_inventory(hosts), sort_keys=False))
    return path


def _inventory(hosts: list[SandboxHost]) -> dict[str, object]:
    """Return an inventory without models and services, for those are the person's."""
    return {
        "defaults": {"models_dir": "/srv/models"},
        "hosts": {host.name: _inventory_entry(host) for host in hosts},
    }


def _inventory_entry(host: SandboxHost) -> dict[str, object]:
    """Return one host; its hardware is this machine's, which all hosts share."""
    login = {
        "user": host.user,
        "port": host.port,
        "key": str(host.key),
        "known_hosts": str(host.known_hosts),
    }
    cpu = {"cores": _cores(), "threads": os.cpu_count()}
    return {"address": host.address, "ssh": login, "hardware": {"cpu": cpu, "ram": f"{_ram_mib()}MiB"}}


def _cores() -> int:
    """Return the number of cores: threads that share one name the same siblings."""
    siblings = Path("/sys/devices/system/cpu").glob("cpu*/topology/thread_siblings_list")
    return len({file.read_text() for file in siblings}) or os.cpu_count() or 1


def _ram_mib() -> int:
    total = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(total[1]) // 1024 if total else 0


def _free_port(address: str) -> int | None:
    """Return the first port on which an sshd could listen now."""
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as sshd does
            with suppress(OSError):
                probe.bind((address, port))
                probe.listen()
                return port
    return None


def _make_key(path: Path) -> Path:
    if not path.exists():
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "labdeploy-sandbox", "-f", str(path)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        _give_to_person(path)
    return path


def public(key: Path) -> str:
    """Return the public half of a key as one line."""
    return key.with_name(f"{key.name}.pub").read_text()


def _put(upper: Path, path: str, content: str, mode: int) -> None:
    """Write one file of a host; a folder in `upper` gives its mode to the folder below it, so set it."""
    target = upper / path
    for folder in reversed(target.relative_to(upper).parents[:-1]):
        (upper / folder).mkdir(exist_ok=True)
        (upper / folder).chmod(0o700 if folder.parts[0] == "root" else 0o755)
    target.touch(0o600)
    target.write_text(content)
    target.chmod(mode)


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that nobody reads half of it."""
    half = path.with_name(f".{path.name}.tmp")
    half.write_text(text)
    _give_to_person(half)
    half.rename(path)


def _make_state_dir(state_dir: Path) -> None:
    """Make the folder with those above it, all the person's own and this one closed to others."""
    missing = [folder for folder in (state_dir / "hosts", *state_dir.parents, state_dir) if not folder.exists()]
    (state_dir / "hosts").mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _give_to_person(folder)
    state_dir.chmod(0o700)


def _give_to_person(path: Path) -> None:
    """Let whoever said sudo read what they will need without it."""
    if os.geteuid() == 0 and "SUDO_UID" in os.environ:
        person = _person()
        os.chown(path, person.pw_uid, person.pw_gid)


def _person() -> pwd.struct_passwd:
    """Return who said sudo."""
    return pwd.getpwuid(int(os.environ["SUDO_UID"]))
