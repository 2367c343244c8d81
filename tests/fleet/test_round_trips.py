"""What a push costs on a slow line: connections, commands, round trips and bytes, counted on a real host."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import yaml
from lab import Lab
from relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

MOST_ROUND_TRIPS = 8  # 7 are seen, and one more where the host asks for the bundle
NOT_OURS = ("/var/log", "/var/lib/wtmpdb", "/var/lib/lastlog")  # what sshd, PAM and the journal note of any login


class FarLab(Lab):
    """A lab whose host is reached through a relay."""

    relay: Relay | None = None

    def set(self, **settings: object) -> None:
        """Write the inventory, and into it the relay's port."""
        super().set(**settings)
        if self.relay:
            path = self.folder / "inventory.yaml"
            inventory = yaml.safe_load(path.read_text())
            inventory["hosts"][self.host.name]["ssh"] |= {"port": self.relay.port, "known_hosts": "known_hosts"}
            path.write_text(yaml.safe_dump(inventory))
            here = f"[{self.host.address}]:{self.relay.port}"
            (self.folder / "known_hosts").write_text("".join(f"{here} {key}\n" for key in self.host_keys()))

    def n_commands(self) -> int:
        """Count the commands that sshd has started for logins."""
        return self.on_host("journalctl", "-o", "cat", "--no-pager").count("Starting session: command")


@pytest.fixture
def far(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Iterator[FarLab]:
    """Return a lab with one host, far away, that has one generation."""
    lab = FarLab(tmp_path, [make_host("sid")], tiny_model)
    lab.on_host("sh", "-c", "echo LogLevel VERBOSE > /etc/ssh/sshd_config.d/verbose.conf && systemctl restart ssh")
    with Relay(lab.host.address, lab.host.port) as relay:
        lab.relay = relay
        lab.set()
        assert lab.push_ok()["result"] == "changed"
        relay.conversations.clear()
        yield lab


def test_a_push_without_changes_is_one_command_and_writes_nothing(far: FarLab) -> None:
    """One connection, one command, at most 8 round trips; the program that the host has is not sent again."""
    before = far.n_commands()
    far.on_host("touch", "/run/before")
    time.sleep(0.1)
    assert far.push_ok()["result"] == "unchanged"
    (said,) = far.relay.conversations
    assert said.round_trips <= MOST_ROUND_TRIPS
    assert said.n_bytes["client"] < 6000
    assert far.n_commands() - before == 1
    elsewhere = " ".join(f"-not -path {folder}/*" for folder in NOT_OURS)
    newer = f"find / -xdev -newercc /run/before -type f {elsewhere}; find /run/labdeploy -newercc /run/before"
    assert far.on_host("sh", "-fc", newer, check=False) == ""


def test_a_push_with_changes_adds_only_its_confirmation(far: FarLab) -> None:
    """Two connections, one command each; neither takes more round trips than a push without changes may."""
    before = far.n_commands()
    far.set(ctx_size=4096)
    assert far.push_ok()["result"] == "changed"
    push, confirmation = far.relay.conversations
    assert push.round_trips <= MOST_ROUND_TRIPS
    assert confirmation.round_trips <= MOST_ROUND_TRIPS
    assert far.n_commands() - before == 2
