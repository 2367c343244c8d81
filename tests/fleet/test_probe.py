"""Probing real hosts of all suites: what they say is what is seen from outside; one connection, and no change."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from lab import Lab

from labdeploy import sandbox

sys.path.insert(0, str(Path(__file__).parents[1]))
import make_lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from labdeploy.sandbox import SandboxHost


@pytest.fixture
def lab(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab with three hosts, one of each suite, whose inventory says nothing of what they have."""
    found = Lab(tmp_path, [make_host(suite) for suite in sandbox.SUITES], tiny_model)
    change(found, lambda host: host.pop("hardware"))
    inventory = read(found, "inventory.yaml")
    inventory["models"]["tiny"].pop("local")
    found.write(inventory)
    return found


@pytest.fixture
def one(fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab with one host."""
    return Lab(tmp_path, [fresh_host], tiny_model)


def read(lab: Lab, name: str) -> dict[str, Any]:
    """Read a YAML file of the lab's folder."""
    content: dict[str, Any] = yaml.safe_load((lab.folder / name).read_text())
    return content


def change(lab: Lab, how: Callable[[dict[str, Any]], object]) -> None:
    """Change every host of the inventory."""
    inventory = read(lab, "inventory.yaml")
    for host in inventory["hosts"].values():
        how(host)
    lab.write(inventory)


def logins(host: SandboxHost) -> int:
    """Count the logins that a host has seen."""
    journal = sandbox.run(host, "journalctl", "-q", "--no-pager", "-t", "sshd", "-t", "sshd-session").stdout
    return journal.count("Accepted publickey")


def test_what_hosts_say_is_what_they_have(lab: Lab) -> None:
    """Compared with what is seen without labdeploy; then plans and pushes need no hardware in the inventory."""
    names = [host.name for host in lab.hosts]
    refused = lab.run("plan")
    assert refused.code == 2
    assert refused.err.endswith(f"\nhint: labdeploy probe {' '.join(names)}\n")

    before = [logins(host) for host in lab.hosts]
    probed = lab.run("probe", "--json")
    assert (probed.code, probed.err) == (0, "")
    assert [logins(host) for host in lab.hosts] == [n + 1 for n in before], "one connection for each host"

    total = re.search(r"^MemTotal: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert total
    for host in lab.hosts:
        said = probed.json["hosts"][host.name]
        pretty = sandbox.run(host, "sh", "-c", '. /etc/os-release; echo "$PRETTY_NAME"').stdout.strip()
        systemd = sandbox.run(host, "systemctl", "--version").stdout.splitlines()[0]
        assert (said["os"], f"systemd {said['systemd']}") == (pretty, systemd)
        assert (said["kernel"], said["arch"]) == (os.uname().release, os.uname().machine)
        assert said["ram"]["total_mib"] == int(total[1]) // 1024
        assert said["ram"]["available_mib"] <= said["ram"]["total_mib"]
        assert said["cpu"]["threads"] == len(os.sched_getaffinity(0))
        assert 1 <= said["cpu"]["cores"] <= said["cpu"]["threads"]
        assert ("avx2" in said["cpu"]["features"]) == (" avx2 " in Path("/proc/cpuinfo").read_text())
        assert said["gpus"] == []
        build = said["runners"]["llama-server"]
        version = sandbox.run(host, "sh", "-c", f"{build['path']} --version 2>&1").stdout
        assert f"version: {build['version']} (build {build['build']}," in version
        assert {"--metrics", "--load-mode", "--fit", "-ngl"} <= set(build["flags"])
        assert list(said["runners"]) == ["llama-server"]
        assert said["models"] == {"tiny": {"size_bytes": lab.model.stat().st_size, "read": True}}

    shutil.copy(lab.folder / "inventory.lock.yaml", lab.folder / "first.yaml")
    assert lab.run("inspect", str(lab.model), "--add", "tiny").code == 0
    assert read(lab, "inventory.lock.yaml") == read(lab, "first.yaml"), "a header read there is one read here"

    pushed = lab.run("push", "--all", "-y", "--watch", "1", "--json")
    assert [host["result"] for host in pushed.json["hosts"].values()] == ["changed"] * 3, pushed.err
    again = lab.run("probe")
    assert again.code == 0
    assert (lab.folder / "inventory.lock.yaml").read_bytes() == (lab.folder / "first.yaml").read_bytes()
    assert lab.run("push", "--all", "-y", "--json").json["hosts"][names[0]]["result"] == "unchanged"


def test_a_host_that_is_away_costs_no_other_its_place(lab: Lab) -> None:
    """Exit code 4; the others are in the lock, and of the one that is away stays what was known."""
    away, *there = [host.name for host in lab.hosts]
    assert lab.run("probe", away).code == 0
    known = read(lab, "inventory.lock.yaml")["hosts"][away]
    inventory = read(lab, "inventory.yaml")
    inventory["hosts"][away]["ssh"]["port"] = 9
    lab.write(inventory)
    probed = lab.run("probe")
    assert probed.code == 4
    assert f"error: {away}: " in probed.err
    assert f"{away}: unreachable; the lock keeps what it has of it\n" in probed.out
    hosts = read(lab, "inventory.lock.yaml")["hosts"]
    assert sorted(hosts) == sorted([away, *there])
    assert hosts[away] == known


def test_probing_changes_nothing_on_the_host(one: Lab) -> None:
    """Not while a service runs, either: it asks beside it."""
    one.push_ok()
    before = one.snapshot()
    files = "find / -xdev -newer /tmp/mark -type f -not -path '/proc/*' -not -path '/sys/*' -not -path '/var/log/*'"
    one.on_host("sh", "-c", "sleep 1.1; touch /tmp/mark; sleep 1.1")
    assert one.run("probe").code == 0
    written = one.on_host("sh", "-c", f"{files} | grep -v '^/run/\\|^/dev/\\|^/var/lib/systemd/' || true")
    assert written == ""
    assert one.snapshot() == before


def test_the_software_gpu_is_asked_for_where_the_inventory_counts_on_it(one: Lab) -> None:
    """Vulkan hides it otherwise; what it has differs from what is written here, which is told."""
    gpu = {"name": "llvmpipe", "vram": "2GiB"}
    change(one, lambda host: host["hardware"].update(gpus=[gpu]))
    probed = one.run("probe", "--json").json["hosts"][one.host.name]
    assert [(found["vendor"], found["shares_ram"]) for found in probed["gpus"]] == [("software", True)]
    assert probed["gpus"][0]["vram_mib"] > 2048
    path = f"hosts.{one.host.name}.hardware.gpus[0].vram"
    assert any(warning.startswith(f"{path} says 2GiB, the host has ") for warning in probed["warnings"])
    assert path in one.run("plan").out.replace("\n      ", "")


def test_the_speed_of_the_disk_is_measured_by_a_model_file(one: Lab) -> None:
    """Past the page cache; by the largest file beside the models where those of the services are short."""
    one.on_host("sh", "-c", "head -c 64M /dev/urandom > /srv/models/large.gguf; sync")
    change(one, lambda host: host["hardware"].pop("disk_read", None))
    assert one.run("probe").code == 0
    speed = read(one, "inventory.lock.yaml")["hosts"][one.host.name]["disk_read_mib_per_s"]
    assert 1 <= speed <= 200_000


def test_headers_are_read_anew_when_a_file_has_another_length(one: Lab) -> None:
    """And only then; a file that was cut off is one error, and leaves what was known."""
    inventory = read(one, "inventory.yaml")
    inventory["models"]["tiny"].pop("local")
    one.write(inventory)
    assert one.run("probe", "--json").json["hosts"][one.host.name]["models"]["tiny"]["read"] is True
    assert one.run("probe", "--json").json["hosts"][one.host.name]["models"]["tiny"]["read"] is False
    known = read(one, "inventory.lock.yaml")["models"]
    one.on_host("sh", "-c", "head -c 100000 /srv/models/tiny.gguf > /tmp/cut; mv /tmp/cut /srv/models/tiny.gguf")
    ended = one.run("probe")
    assert ended.code == 2
    assert f"error: {one.host.name}:/srv/models/tiny.gguf: " in ended.err
    assert "bytes are missing" in ended.err
    assert read(one, "inventory.lock.yaml")["models"] == known
    one.on_host("rm", "/srv/models/tiny.gguf")
    ended = one.run("probe")
    assert ended.code == 0
    assert "warning: models.tiny: /srv/models/tiny.gguf is not there" in ended.out


def test_a_snapshot_folder_on_a_host(one: Lab, tmp_path: Path) -> None:
    """Of its weights only the headers travel; what is read is what is read of the folder here."""
    make_lock.MAKERS["qwen2.5-7b-awq"](tmp_path)
    folder = tmp_path / "Qwen2.5-7B-Instruct-AWQ"
    one.on_host("mkdir", "/srv/models/Qwen2.5-7B-Instruct-AWQ")
    for file in folder.iterdir():
        target = f"/srv/models/Qwen2.5-7B-Instruct-AWQ/{file.name}"
        with file.open("rb") as whole:
            (tmp_path / "front").write_bytes(whole.read(2_000_000))  # the weights are holes
        sandbox.copy_in(one.host, tmp_path / "front", target)
        one.on_host("truncate", "-s", str(file.stat().st_size), target)
    there = one.run("inspect", f"{one.host.name}:/srv/models/Qwen2.5-7B-Instruct-AWQ", "--json")
    assert there.code == 0, there.err
    assert there.json == one.run("inspect", str(folder), "--json").json
    one.on_host("rm", "/srv/models/Qwen2.5-7B-Instruct-AWQ/config.json")
    gone = one.run("inspect", f"{one.host.name}:/srv/models/Qwen2.5-7B-Instruct-AWQ")
    assert gone.code == 2
    assert gone.err.startswith(f"error: {one.host.name}:/srv/models/Qwen2.5-7B-Instruct-AWQ: has no config.json")


def test_flags_that_the_build_does_not_know_stop_before_the_host(one: Lab) -> None:
    """After a probe a typing error is seen by the plan; before it, by the service that does not start."""
    one.set(flags=["--no-such-flag"])
    assert one.run("plan").code == 0
    assert one.run("probe").code == 0
    before = one.snapshot()
    ended = one.push()
    assert ended.code == 2
    assert "chat.flags: --no-such-flag is no flag of llama-server 0.7.0 (build 11669)" in ended.err
    assert one.snapshot() == before
