"""The hosts of the push benchmark: one real sandbox host, seen through as many sshd's as hosts are wanted.

Each sshd listens on a port of its own, so that each login costs what it costs on a host of its own. Behind them is one
systemd with one labdeploy service: a push without changes only reads, so it may do so many times at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from labdeploy import sandbox
from labdeploy.tiny_model import write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "fleet"))
from lab import Lab

if TYPE_CHECKING:
    from labdeploy.sandbox import SandboxHost

FIRST_PORT = 23000
START_SSHDS = """
mkdir -p /run/sshd
for port in $(seq {first} {last}); do
    /usr/sbin/sshd -p "$port" -o "ListenAddress {address}" -o "PidFile /run/sshd/$port.pid" -o MaxStartups=500
done
"""


@dataclass(frozen=True)
class Fleet:
    """A folder with an inventory of `n` hosts, all of which have what it says."""

    folder: Path
    n: int
    address: str
    ports: tuple[int, ...]
    key: Path
    known_hosts: Path

    @property
    def unit(self) -> Path:
        """The unit that every host has."""
        return self.folder / "rendered" / "h0" / "systemd" / "labdeploy-chat.service"


def prepare(folder: Path, n_most: int) -> SandboxHost:
    """Bring the host up, with Python for those tools that need it there, and start its sshd's."""
    host = sandbox.up(["bench"], "sid", state_dir=folder / "sandbox")[0]
    install = (
        "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3"
    )
    sandbox.run(host, "sh", "-c", f"{install} >/dev/null 2>&1", timeout_s=300)
    last = FIRST_PORT + n_most - 1
    script = START_SSHDS.format(first=FIRST_PORT, last=last, address=host.address)
    sandbox.run(host, "systemd-run", "--quiet", "--unit=bench-sshds", "--service-type=forking", "sh", "-c", script)
    return host


def fleet(folder: Path, host: SandboxHost, n: int) -> Fleet:
    """Write an inventory of n hosts, and push to the first so that all have its generation."""
    folder.mkdir()
    lab = Lab(folder, [host], write_tiny_model(folder / "tiny.gguf"))
    ports = tuple(range(FIRST_PORT, FIRST_PORT + n))
    inventory: dict[str, Any] = yaml.safe_load((folder / "inventory.yaml").read_text())
    (entry,) = inventory["hosts"].values()
    (_, *key), *_ = (line.split() for line in host.known_hosts.read_text().splitlines())
    known = folder / "known_hosts"
    known.write_text("".join(f"[{host.address}]:{port} {' '.join(key)}\n" for port in ports))
    ssh = entry["ssh"] | {"known_hosts": str(known)}
    inventory["hosts"] = {f"h{i}": entry | {"ssh": ssh | {"port": port}} for i, port in enumerate(ports)}
    lab.write(inventory)
    for words in (("push", "h0", "--watch", "0"), ("render", "h0")):
        ended = lab.run(*words)
        if ended.code:
            raise SystemExit(ended.err)
    return Fleet(folder, n, host.address, ports, host.key, known)
