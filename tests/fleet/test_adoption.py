"""Units that were on a host before labdeploy: never touched without being asked, and always to be had back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost

UNIT = "ollama.service"
FOREIGN = """[Unit]
Description=Ollama Service (as its installer writes it)

[Service]
ExecStart=/bin/sleep infinity
Restart=always

[Install]
WantedBy=default.target
"""


@pytest.fixture
def lab(fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab whose host has an ollama.service with drop-in, odd mode, alias and enablement, running."""
    lab = Lab(tmp_path, [fresh_host], tiny_model)
    (tmp_path / "unit").write_text(FOREIGN)
    sandbox.copy_in(fresh_host, tmp_path / "unit", f"/etc/systemd/system/{UNIT}", mode="0600")
    lab.on_host("sh", "-ec", f"""
        cd /etc/systemd/system
        mkdir {UNIT}.d
        printf '[Service]\\nEnvironment=MINE=1\\n' > {UNIT}.d/10-mine.conf
        ln -s {UNIT} llm.service
        systemctl daemon-reload
        systemctl enable -q {UNIT}
        systemctl start {UNIT}
    """)  # fmt: skip
    lab.set(unit=UNIT)
    return lab


def as_found(lab: Lab) -> str:
    """Give all that belongs to the foreign unit: names, modes, owners, times, link targets, bytes, state."""
    return lab.on_host("sh", "-ec", f"""
        cd /etc/systemd/system
        find . \\( -path '*ollama*' -o -name 'llm*' \\) -printf '%p %m %U %G %T@ %l\\n' | sort
        sha256sum {UNIT} {UNIT}.d/*
        systemctl is-enabled {UNIT}
        systemctl is-active {UNIT}
        systemctl show -p Environment {UNIT}
    """)  # fmt: skip


def test_refused_without_being_asked(lab: Lab) -> None:
    """The refusal says what was found: file, state, enablement, drop-ins."""
    before, since = as_found(lab), lab.show("InvocationID", UNIT)
    ended = lab.push()
    assert ended.code == 2
    assert f"/etc/systemd/system/{UNIT}, active, enabled, with drop-ins" in ended.err
    assert "--adopt" in ended.err
    assert (as_found(lab), lab.show("InvocationID", UNIT)) == (before, since)


def test_adopted_and_given_back(lab: Lab) -> None:
    """What was there is generation 0: rollback restores bytes, mode, times, links, drop-ins and state."""
    before = as_found(lab)
    pushed = lab.push_ok("--adopt")
    assert pushed["result"] == "changed"
    assert lab.complete()
    assert lab.show("DropInPaths", UNIT) == ""
    history = lab.run("history", "--json").json["hosts"][lab.host.name]
    assert [(g["number"], g["state"]) for g in history["generations"]] == [(0, "adopted"), (1, "good")]
    assert lab.push_ok()["result"] == "unchanged"

    assert lab.run("rollback", "-y").code == 0
    assert as_found(lab) == before

    assert lab.run("rollback", lab.host.name).code == 0, "forward again, without being asked again"
    assert lab.complete()
    assert lab.run("rollback", lab.host.name, "--to", "0").code == 0
    assert as_found(lab) == before
    assert lab.on_host("ls", "/etc/labdeploy/adopted") == ""


def test_given_back_when_the_first_push_fails(lab: Lab) -> None:
    """An adoption that does not become healthy leaves the foreign unit as it was, running."""
    before = as_found(lab)
    lab.set(unit=UNIT, flags=["--no-such-flag"])
    ended = lab.push("--adopt")
    assert ended.code == 5, ended.err
    assert as_found(lab) == before


def test_given_back_when_the_service_leaves_the_inventory(lab: Lab) -> None:
    """A service that is taken out gives back what it had replaced."""
    before = as_found(lab)
    lab.push_ok("--adopt")
    lab.write({"hosts": {lab.host.name: lab._host(lab.host, {}) | {"services": {}}}})
    assert lab.push_ok()["result"] == "changed"
    assert as_found(lab) == before


def test_a_unit_of_a_package(fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path) -> None:
    """A unit that a package ships, never enabled: ours covers it, and rollback uncovers it as it was."""
    lab = Lab(tmp_path, [fresh_host], tiny_model)
    (tmp_path / "unit").write_text(FOREIGN)
    sandbox.copy_in(fresh_host, tmp_path / "unit", "/usr/lib/systemd/system/packaged.service")
    lab.on_host("systemctl", "daemon-reload")
    lab.set(unit="packaged.service")
    assert lab.push().code == 2
    lab.push_ok("--adopt")
    assert lab.show("FragmentPath", "packaged.service") == "/etc/systemd/system/packaged.service"
    assert lab.run("rollback", "-y").code == 0
    assert lab.show("FragmentPath", "packaged.service") == "/usr/lib/systemd/system/packaged.service"
    assert lab.show("ActiveState", "packaged.service") == "inactive"
    assert lab.on_host("systemctl", "is-enabled", "packaged.service", check=False) == "disabled"


@pytest.mark.parametrize("kind", ["service", "scope"])
def test_a_port_that_is_taken(lab: Lab, kind: str) -> None:
    """Who holds the port is named before anything stops: a service, or a program that somebody started by hand."""
    squatter = (
        "/usr/bin/llama-server --model /srv/models/tiny.gguf "
        f"--host {lab.host.address} --port 8080 --ctx-size 256 --device none"
    )
    start = {"service": squatter, "scope": f"--scope sh -c '{squatter} >/dev/null 2>&1 &'"}[kind]
    lab.on_host("sh", "-c", f"systemd-run --unit=squatter {start}")
    for _ in range(50):
        if str(8080) in lab.on_host("ss", "-Hltn", "sport = :8080"):
            break
    lab.set()
    ended = lab.push()
    assert ended.code == 2
    assert "port 8080 is taken by pid" in ended.err
    assert {"service": "squatter.service", "scope": "no unit"}[kind] in ended.err
