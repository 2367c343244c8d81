"""Sandbox hosts without booting one: command lines, addresses, refusals."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from pathlib import Path

import pytest

from labdeploy import sandbox, sandbox_boot, sandbox_host, sandbox_needs, sandbox_root
from labdeploy.errors import InventoryError, LabdeployError

HYBRID = """\
34 24 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
35 24 0:30 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
36 24 0:31 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw
37 24 254:0 / / rw,relatime - ext4 /dev/vda rw
"""
UNIFIED = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def host(tmp_path: Path):
    """Return a host that was never made."""
    folder = tmp_path / "hosts" / "gpu1"
    return sandbox.SandboxHost("gpu1", "trixie", "127.77.0.9", 22, folder, Path("/roots/trixie"), Path("/roots/sid"))


@pytest.mark.parametrize("suite", sandbox.SUITES)
def test_no_root_names_a_mirror(suite: str):
    """The archives are known to mmdebstrap; a mirror written here would be one more thing to be wrong."""
    argv = sandbox_root.build_argv(suite, Path("/new"))
    assert argv[:3] == ["unshare", "--mount", "mmdebstrap"]
    assert argv[-2:] == [suite, "/new"]
    assert "://" not in " ".join(argv)


def test_only_sid_brings_llama_cpp_and_accepts_an_old_copy_of_the_archive():
    """The other suites do not package llama.cpp, and their release files stay valid for longer."""
    sid, trixie = (" ".join(sandbox_root.build_argv(suite, Path("/new"))) for suite in ("sid", "trixie"))
    assert "llama.cpp-tools" in sid
    assert "Check-Valid-Until" in sid
    assert "llama.cpp-tools" not in trixie
    assert "Check-Valid-Until" not in trixie


def test_a_changed_recipe_is_a_new_root(monkeypatch: pytest.MonkeyPatch):
    """Otherwise hosts would go on running on what an older labdeploy built."""
    before = sandbox_root.root_path("sid")
    monkeypatch.setattr(sandbox_root, "_PACKAGES", "systemd")
    assert sandbox_root.root_path("sid") != before
    assert sandbox_root.root_path("sid").parent == before.parent


def test_a_root_lies_in_the_cache_of_whoever_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """XDG_CACHE_HOME is honoured, and two suites never share a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {sandbox_root.root_path(suite) for suite in sandbox.SUITES}
    assert len(paths) == len(sandbox.SUITES)
    assert all(path.is_relative_to(tmp_path / "labdeploy" / "roots") for path in paths)


def test_an_unknown_suite_says_which_there_are():
    """A usage error, before anything is built."""
    with pytest.raises(InventoryError, match="jessie") as caught:
        sandbox_root.root_path("jessie")
    assert caught.value.hint == "--suite sid|trixie|bookworm"


def test_a_failed_build_leaves_no_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A root counts only when it is complete."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    half_built = "mkdir -p {0}/etc; echo 'E: no space left' >&2; exit 1"
    monkeypatch.setattr(
        sandbox_root, "build_argv", lambda suite, target: ["sh", "-c", half_built.format(target), suite]
    )
    with pytest.raises(LabdeployError, match="E: no space left"):
        sandbox_root.ensure_root("sid", lambda _: None)
    assert not sandbox_root.root_path("sid").exists()


def test_a_root_in_use_survives_a_new_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The old root goes when its last host is gone, not while one runs on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sandbox_root, "build_argv", lambda _, target: ["mkdir", str(target)])
    roots = []
    for recipe in ("one", "two", "three"):
        monkeypatch.setattr(sandbox_root, "fingerprint", lambda _, recipe=recipe: recipe)
        if recipe == "two":
            with sandbox_root.in_use(roots[0]):
                roots.append(sandbox_root.ensure_root("sid", lambda _: None))
            assert roots[0].exists()
        else:
            roots.append(sandbox_root.ensure_root("sid", lambda _: None))
    assert [root.exists() for root in roots] == [False, False, True]


def test_a_host_runs_without_any_daemon_of_this_machine():
    """systemd-machined, D-Bus and image locks may be absent here; cgroup v2 is what new systemd insists on."""
    argv = sandbox_boot.nspawn_argv("gpu1", "127.77.0.9", Path("/m"), sid_root=None, library_folder="x86_64-linux-gnu")
    assert argv[:3] == ["env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_LOCK=0"]
    assert {"--boot", "--keep-unit", "--register=no", "--link-journal=no"} <= set(argv)
    assert not [word for word in argv if word.startswith("--bind") or "network" in word]


def test_older_suites_borrow_the_runner_of_sid_read_only():
    """Programs, and the folder in which ggml looks for its backends."""
    argv = sandbox_boot.nspawn_argv(
        "gpu1", "127.77.0.9", Path("/m"), sid_root=Path("/roots/sid"), library_folder="x86_64-linux-gnu"
    )
    ggml = "/usr/lib/x86_64-linux-gnu/ggml"
    assert argv[-2:] == ["--bind-ro=/roots/sid:/opt/sid", f"--bind-ro=/roots/sid{ggml}:{ggml}"]


def test_the_borrowed_runner_starts_through_the_loader_of_sid(monkeypatch: pytest.MonkeyPatch):
    """The host's own C library is older than the one that llama-server was linked with."""
    monkeypatch.setattr(sandbox_root.platform, "machine", lambda: "x86_64")
    script = sandbox_boot.runner_wrapper()
    assert script.startswith("#!/bin/sh\nL=/opt/sid/usr/lib/x86_64-linux-gnu\n")
    assert 'exec "$L/ld-linux-x86-64.so.2" --library-path "$L:$L/llama"' in script


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Better than a path that does not exist."""
    monkeypatch.setattr(sandbox_root.platform, "machine", lambda: "s390x")
    with pytest.raises(LabdeployError, match="this machine is s390x"):
        sandbox_root.architecture()


@pytest.mark.parametrize(
    ("mountinfo", "systemd", "cgroups"),
    [
        (HYBRID, False, ["/sys/fs/cgroup/unified/NAME", "/sys/fs/cgroup/systemd/NAME"]),
        (UNIFIED, False, ["/sys/fs/cgroup/NAME"]),
        (UNIFIED, True, ["/sys/fs/cgroup/system.slice/NAME"]),
        ("", False, []),
    ],
)
def test_a_host_has_a_cgroup_in_each_hierarchy(
    monkeypatch: pytest.MonkeyPatch, mountinfo: str, systemd: bool, cgroups: list[str]
):
    """The v2 one comes first: it is the one that can be asked and killed. systemd's machines have slices."""
    monkeypatch.setattr(sandbox_boot, "_machine_runs_systemd", lambda: systemd)
    expected = [Path(path.replace("NAME", "labdeploy-sandbox-127.77.0.9.scope")) for path in cgroups]
    assert sandbox_boot.cgroups_of("127.77.0.9", mountinfo) == expected


@pytest.mark.parametrize("systemd", [True, False])
def test_a_host_starts_detached(monkeypatch: pytest.MonkeyPatch, systemd: bool):
    """It outlives the command that made it; where systemd runs, it is in a scope that systemd gave away."""
    monkeypatch.setattr(sandbox_boot, "_machine_runs_systemd", lambda: systemd)
    argv = sandbox_boot.launch_argv("127.77.0.9", "lowerdir=/l", Path("/m"), ["systemd-nspawn", "--boot"])
    assert argv[:2] == ["setsid", "--fork"]
    assert ("--property=Delegate=yes" in argv) is systemd
    assert ("--unit=labdeploy-sandbox-127.77.0.9.scope" in argv) is systemd
    assert argv[-4:] == ["lowerdir=/l", "/m", "systemd-nspawn", "--boot"]


def test_nothing_runs_at_an_address_that_nobody_has():
    """No cgroup is an answer, not an error."""
    assert not sandbox_boot.is_running("127.77.0.255")
    assert sandbox_boot.leader("127.77.0.255") is None


def test_cgroups_that_end_while_they_are_looked_at_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A host that reboots loses one after another."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text("1\n")
    monkeypatch.setattr(sandbox_boot, "_cgroups", lambda _address: [tmp_path])
    found = sandbox_boot._pids("127.77.0.9")
    assert next(found) == 1
    for name in ("a", "b", "c"):
        shutil.rmtree(tmp_path / name)
    assert list(found) == []


def test_commands_in_a_host_inherit_nothing():
    """A caller's environment would make a test pass here and fail on a real host."""
    argv = sandbox_boot.enter_argv(4711, ["systemctl", "status"])
    assert argv[:3] == ["nsenter", "--target=4711", "--all"]
    assert "--ignore-environment" in argv
    assert argv[-2:] == ["systemctl", "status"]


def test_ssh_trusts_only_the_key_made_for_the_host(host: sandbox.SandboxHost):
    """Neither the person's own known_hosts nor their configuration takes part."""
    argv = sandbox.ssh_argv(host, "uptime")
    assert "StrictHostKeyChecking=yes" in argv
    assert f"UserKnownHostsFile={host.known_hosts}" in argv
    assert argv[1:3] == ["-F", "none"]
    assert argv[-2:] == ["root@127.77.0.9", "uptime"]


def test_a_host_listens_on_its_own_address_only(host: sandbox.SandboxHost, tmp_path: Path):
    """Many hosts, and this machine's own sshd, share one network."""
    keys = {name: tmp_path / name for name in ("host_key", "client_key")}
    for key in keys.values():
        key.write_text("private\n")
        key.with_name(f"{key.name}.pub").write_text("ssh-ed25519 AAAA\n")
    files = sandbox_host.host_files(host, keys["host_key"], keys["client_key"])
    sshd, _ = files["etc/ssh/sshd_config.d/10-sandbox.conf"]
    assert "ListenAddress 127.77.0.9\n" in sshd
    assert files["etc/ssh/ssh_host_ed25519_key"] == ("private\n", 0o600)
    assert files["usr/local/bin/llama-server"][1] == 0o755
    assert len(files["etc/machine-id"][0].strip()) == 32


@pytest.mark.parametrize(("port", "address"), [(22, "127.77.0.9"), (2222, "[127.77.0.9]:2222")])
def test_known_hosts_names_an_unusual_port(host: sandbox.SandboxHost, port: int, address: str):
    """sshd(8): the port is part of the name unless it is 22."""
    host.folder.mkdir(parents=True)
    (host.folder / "host_key.pub").write_text("ssh-ed25519 AAAA\n")
    at_port = sandbox.SandboxHost(**{**vars(host), "port": port})
    assert sandbox_host.known_hosts_line(at_port) == f"{address} ssh-ed25519 AAAA\n"


def test_each_host_gets_an_address_of_its_own(tmp_path: Path):
    """And keeps it while it is off: the claim is a link to its folder."""
    claims, hosts = tmp_path / "claims", [tmp_path / name for name in ("one", "two")]
    claims.mkdir()
    given = [sandbox_host.claim_address(host, claims) for host in hosts]
    assert len({address for address, _ in given}) == 2
    for (address, port), host in zip(given, hosts, strict=True):
        assert address in sandbox_host.ADDRESSES
        assert port in sandbox_host.PORTS
        assert (claims / address).readlink() == host


def test_the_address_of_a_deleted_host_is_free_again(tmp_path: Path):
    """Nobody has to clean up after a `rm -r`."""
    (tmp_path / "127.77.0.254").symlink_to(tmp_path / "deleted")
    (tmp_path / "127.77.0.253").symlink_to(tmp_path)
    sandbox_host.forget_deleted_hosts(tmp_path)
    assert [claim.name for claim in tmp_path.iterdir()] == ["127.77.0.253"]


def test_no_free_address_says_how_to_free_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """253 hosts are more than one machine wants."""
    monkeypatch.setattr(sandbox_host, "ADDRESSES", ("127.77.0.2",))
    (tmp_path / "127.77.0.2").symlink_to(tmp_path)
    with pytest.raises(LabdeployError, match=r"127\.77\.0\.2") as caught:
        sandbox_host.claim_address(tmp_path, tmp_path)
    assert caught.value.hint == "labdeploy sandbox down --all"


def test_a_port_that_this_machine_listens_on_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    """A machine with an sshd of its own has port 22 on all addresses, ours included."""
    with socket.socket() as ours, socket.socket() as other:
        ours.bind(("0.0.0.0", 0))  # noqa: S104
        ours.listen()
        other.bind(("127.77.0.254", 0))
        free = other.getsockname()[1]
        other.close()
        monkeypatch.setattr(sandbox_host, "PORTS", (ours.getsockname()[1], free))
        assert sandbox_host._free_port("127.77.0.254") == free


def test_an_address_that_went_to_another_host_is_not_taken_back(host: sandbox.SandboxHost, tmp_path: Path):
    """After a reboot of this machine, hosts claim again; whoever is second is told."""
    claims, other = tmp_path / "claims", tmp_path / "other"
    claims.mkdir()
    other.mkdir()
    (claims / host.address).symlink_to(other)
    with pytest.raises(LabdeployError, match=r"gpu1: its address 127\.77\.0\.9 was given to") as caught:
        sandbox_host.keep_address(host, claims)
    assert caught.value.hint == "labdeploy sandbox down gpu1"


@pytest.mark.parametrize("name", ["", "GPU1", "a b", "../etc", "-x", "x" * 33])
def test_a_name_that_is_no_host_name_is_refused(name: str, tmp_path: Path):
    """It becomes a folder, a hostname and an inventory key."""
    with pytest.raises(InventoryError, match="is no host name"):
        sandbox.up([name], state_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_tools_come_with_the_command_that_gets_them(monkeypatch: pytest.MonkeyPatch):
    """All of them in one line, to be pasted once."""
    missing = {"systemd-nspawn", "mmdebstrap"}
    monkeypatch.setattr(sandbox_needs.shutil, "which", lambda tool: None if tool in missing else tool)
    problem = sandbox_needs.prerequisites()[0]
    assert str(problem) == "systemd-nspawn and mmdebstrap are missing"
    assert problem.hint == "sudo apt-get install mmdebstrap systemd-container"


def test_not_being_root_is_a_hint_away(monkeypatch: pytest.MonkeyPatch):
    """Only root may mount and boot."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    hints = [problem.hint for problem in sandbox_needs.prerequisites()]
    assert "sudo labdeploy sandbox up" in hints


def test_an_old_kernel_is_named(monkeypatch: pytest.MonkeyPatch):
    """cgroup.kill came with Linux 5.14."""
    monkeypatch.setattr(sandbox_needs.platform, "release", lambda: "5.10.0-30-amd64")
    assert any("5.10.0-30-amd64" in str(problem) for problem in sandbox_needs.prerequisites())


def test_the_state_folder_is_the_persons_also_behind_sudo(monkeypatch: pytest.MonkeyPatch):
    """Otherwise the key would lie where whoever said sudo cannot read it."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("SUDO_UID", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert sandbox.default_state_dir() == Path("/home/me/.local/state/labdeploy/sandbox")
    monkeypatch.setenv("SUDO_UID", "65534")
    home = Path(pwd.getpwuid(65534).pw_dir)
    assert sandbox.default_state_dir() == home / ".local/state/labdeploy/sandbox"
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert sandbox.default_state_dir() == Path("/elsewhere/labdeploy/sandbox")


def test_taking_down_nothing_is_fine(tmp_path: Path):
    """Also the second time, and for names that were never up."""
    assert sandbox.down(state_dir=tmp_path / "none") == []
    assert sandbox.down(["gpu1"], state_dir=tmp_path / "none") == []
    assert sandbox.ls(state_dir=tmp_path / "none") == []


def test_a_host_whose_root_was_deleted_says_so(host: sandbox.SandboxHost):
    """The cache may be emptied at any time; the host's own changes are nothing without it."""
    with pytest.raises(LabdeployError, match="gpu1: what it stands on was deleted: /roots/trixie") as caught:
        sandbox._check_root(host)
    assert caught.value.hint == "labdeploy sandbox down gpu1"
