"""Sandbox hosts are what they claim to be: real systemd, real sshd, a real runner, and gone when taken down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from labdeploy import inventory, sandbox, sandbox_boot, sandbox_host

if TYPE_CHECKING:
    from conftest import MakeHost

    from labdeploy.sandbox import SandboxHost

SYSTEMD = {"sid": 258, "trixie": 257, "bookworm": 252}  # sid's only grows
MODEL = "/srv/models/tiny.gguf"
UP = """
import pathlib, sys
from labdeploy import sandbox
sandbox.up(sys.argv[2:], state_dir=pathlib.Path(sys.argv[1]))
"""


def boot_id(host: SandboxHost) -> str:
    """Return what systemd calls this boot; the kernel's own is this machine's."""
    return sandbox.run(host, "systemctl", "show", "--property=UserspaceTimestampMonotonic", "--value").stdout


def serve(host: SandboxHost, model: Path, *options: str, environment: str = "A=b") -> str:
    """Start llama-server in a transient unit like those that are deployed, and return its address."""
    sandbox.copy_in(host, model, MODEL)
    properties = ("DynamicUser=yes", "ProtectSystem=strict", "PrivateTmp=yes", f"Environment={environment}")
    sandbox.run(
        host,
        *("systemd-run", "--unit=tiny", "--collect", *(f"--property={value}" for value in properties)),
        *("llama-server", "--model", MODEL, "--host", host.address, "--port", "8080", "--ctx-size", "256"),
        *options,
    )
    url = f"http://{host.address}:8080"
    sandbox.run(host, *("curl", "-sf", "--retry", "120", "--retry-delay", "1", "--retry-all-errors"), f"{url}/health")
    return url


def complete(host: SandboxHost, url: str, max_tokens: int) -> str:
    """Ask for the most likely next tokens."""
    asked = json.dumps({"prompt": "Hello", "max_tokens": max_tokens, "temperature": 0})
    said = sandbox.run(host, "curl", "-sf", f"{url}/v1/completions", "--data", asked).stdout
    text: str = json.loads(said)["choices"][0]["text"]
    return text


def stop(host: SandboxHost) -> None:
    """Stop what `serve` started."""
    sandbox.run(host, "systemctl", "stop", "tiny.service")


def test_it_boots_its_own_systemd_without_a_failed_unit(host: SandboxHost):
    """`running`, not `degraded`: a failed unit in a test is then the test's own."""
    version = sandbox.run(host, "systemctl", "--version").stdout.split()[1]
    assert int(version) >= SYSTEMD[host.suite]
    assert host.suite == "sid" or int(version) == SYSTEMD[host.suite]
    assert sandbox.run(host, "systemctl", "is-system-running").stdout == "running\n"
    assert sandbox.run(host, "systemctl", "--failed", "--no-legend", "--plain").stdout == ""
    assert sandbox.run(host, "stat", "-fc", "%T", "/sys/fs/cgroup").stdout == "cgroup2fs\n"


def test_it_can_be_logged_in_to_with_the_key_it_was_given(host: SandboxHost):
    """With StrictHostKeyChecking: known_hosts holds the key that sshd really shows."""
    done = subprocess.run(
        sandbox.ssh_argv(host, "hostname; id -u"), capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.returncode) == (f"{host.name}\n0\n", 0), done.stderr


def test_a_host_with_another_key_is_refused(sid: SandboxHost, trixie: SandboxHost, tmp_path: Path):
    """Each host has a key of its own, so that mixing them up is noticed."""
    wrong = tmp_path / "known_hosts"
    lines = sid.known_hosts.read_text().splitlines()
    trixies_key = next(line.split(" ", 1)[1] for line in lines if line.startswith(f"{trixie.address} "))
    wrong.write_text(f"{sid.address} {trixies_key}\n")
    argv = [word.replace(str(sid.known_hosts), str(wrong)) for word in sandbox.ssh_argv(sid, "true")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr


def test_llama_server_answers_from_a_locked_down_unit(host: SandboxHost, tiny_model: Path):
    """DynamicUser and ProtectSystem hold on each systemd, and on older suites for the borrowed runner too."""
    url = serve(host, tiny_model)
    try:
        assert complete(host, url, 1).isascii()
        words = complete(host, url, 8)
        assert len(words.split()) == 8
        assert words.isascii()
        assert complete(host, url, 8) == words
    finally:
        stop(host)


def test_the_memory_tool_of_llama_cpp_is_there_too(host: SandboxHost, tiny_model: Path):
    """It is what plans are compared with."""
    sandbox.copy_in(host, tiny_model, MODEL)
    done = sandbox.run(host, "llama-fit-params", "--model", MODEL, "--ctx-size", "256")
    assert "-c 256" in done.stdout


def test_layers_really_move_to_a_software_gpu(sid: SandboxHost, tiny_model: Path):
    """Mesa's llvmpipe is a Vulkan device to llama.cpp: weights, cache and compute buffers split as on a GPU."""
    serve(sid, tiny_model, "--n-gpu-layers", "3", "-lv", "4", environment="GGML_VK_VISIBLE_DEVICES=0")
    try:
        log = sandbox.run(sid, "journalctl", "--unit=tiny.service", "--output=cat").stdout
        assert "offloaded 3/5 layers to GPU" in log
        assert "Vulkan0 model buffer size" in log
        assert "Vulkan0 KV buffer size" in log
        assert "CPU KV buffer size" in log
    finally:
        stop(sid)


@pytest.mark.parametrize("suite", sandbox.SUITES)
def test_a_power_cut_keeps_the_files_and_loses_the_rest(make_host: MakeHost, suite: str):
    """Enabled units come back, as after pulling the plug; what ran does not."""
    host = make_host(suite)
    unit = "[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
    sandbox.run(host, "sh", "-c", f"printf '{unit}' > /etc/systemd/system/kept.service")
    sandbox.run(host, "systemctl", "enable", "--now", "kept.service")
    sandbox.run(host, "systemd-run", "--unit=lost", "sleep", "infinity")
    before = boot_id(host)

    sandbox.power_cut(host)
    assert not sandbox_boot.is_running(host.address)
    assert (host.upper / "etc/systemd/system/kept.service").exists()

    sandbox.boot(host)
    assert boot_id(host) != before
    states = sandbox.run(host, "systemctl", "is-active", "kept.service", "lost.service", check=False).stdout
    assert states == "active\ninactive\n"


def test_it_reboots_itself(fresh_host: SandboxHost):
    """`systemctl reboot` comes back, at the same address and with the same key."""
    before = boot_id(fresh_host)
    sandbox.reboot(fresh_host)
    assert boot_id(fresh_host) != before
    assert subprocess.run(sandbox.ssh_argv(fresh_host, "true"), timeout=30, check=False).returncode == 0


def test_it_can_be_shut_down_and_booted_again(fresh_host: SandboxHost):
    """A host that is off is still listed, and says so."""
    sandbox.run(fresh_host, "systemctl", "poweroff")
    deadline = time.monotonic() + 30
    while sandbox_boot.is_running(fresh_host.address) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = {host.name: host for host in sandbox.ls(state_dir=fresh_host.state_dir)}
    assert not found[fresh_host.name].running
    sandbox.boot(fresh_host)


def test_up_again_changes_nothing(sid: SandboxHost, sandbox_dir: Path):
    """A host that runs is left alone, not booted or made anew."""
    before = boot_id(sid)
    assert sandbox.up(["sid"], "sid", state_dir=sandbox_dir) == [sid]
    assert boot_id(sid) == before


def test_a_name_is_not_reused_for_another_suite(sid: SandboxHost, sandbox_dir: Path):
    """It would be a host other than the one that was asked for."""
    with pytest.raises(sandbox.InventoryError, match="sid: is there already, and runs sid"):
        sandbox.up([sid.name], "trixie", state_dir=sandbox_dir)


def test_a_host_outlives_the_command_that_made_it(tmp_path: Path):
    """`labdeploy sandbox up` ends, its terminal closes, its process group is killed: the host stays."""
    maker = subprocess.Popen([sys.executable, "-c", UP, str(tmp_path / "state"), "kept"], start_new_session=True)
    assert maker.wait(timeout=120) == 0
    try:
        (host,) = sandbox.ls(state_dir=tmp_path / "state")
        assert host.running
        with pytest.raises(ProcessLookupError):
            os.killpg(maker.pid, 0)
    finally:
        sandbox.down(state_dir=tmp_path / "state")


def test_processes_bring_up_hosts_at_the_same_time(tmp_path: Path):
    """Test workers do: each host gets an address of its own, and all answer."""
    states = [tmp_path / "one", tmp_path / "two"]
    makers = [subprocess.Popen([sys.executable, "-c", UP, str(state), "a", "b"]) for state in states]
    try:
        assert [maker.wait(timeout=120) for maker in makers] == [0, 0]
        hosts = [host for state in states for host in sandbox.ls(state_dir=state)]
        assert len({host.address for host in hosts}) == 4
        assert all(host.running for host in hosts)
    finally:
        for state in states:
            sandbox.down(state_dir=state)


def test_a_host_whose_folder_was_deleted_is_ended_by_the_next_one(make_host: MakeHost, tmp_path: Path):
    """Nobody can reach it any more, and it holds an address."""
    (lost,) = sandbox.up(["lost"], state_dir=tmp_path / "state")
    subprocess.run(["rm", "-rf", str(tmp_path / "state")], check=True)
    init = sandbox_boot.leader(lost.address)
    assert init
    make_host()
    assert sandbox_boot.leader(lost.address) != init  # the address may be the new host's by now


def test_a_half_made_host_is_made_again(tmp_path: Path):
    """Somebody interrupted `up`."""
    (tmp_path / "state/hosts/half/upper").mkdir(parents=True)
    try:
        (host,) = sandbox.up(["half"], state_dir=tmp_path / "state")
        assert host.running
    finally:
        assert sandbox.down(state_dir=tmp_path / "state") == ["half"]


def test_a_sparse_file_is_copied_with_its_holes(sid: SandboxHost, tmp_path: Path):
    """Models of any size are tested as headers with nothing behind them."""
    big = tmp_path / "big.gguf"
    big.write_bytes(b"GGUF")
    os.truncate(big, 40 << 30)
    sandbox.copy_in(sid, big, "/srv/models/big.gguf")
    size, blocks = sandbox.run(sid, "stat", "-c", "%s %b", "/srv/models/big.gguf").stdout.split()
    sandbox.run(sid, "rm", "/srv/models/big.gguf")
    assert int(size) == 40 << 30
    assert int(blocks) < 1000


def test_the_inventory_is_one_that_labdeploy_reads(sid: SandboxHost):
    """A person starts from it."""
    read = inventory.load(sid.state_dir / "inventory.yaml").hosts[sid.name]
    assert read.address == sid.address
    assert read.ssh.port == sid.port


def test_down_leaves_nothing(tmp_path: Path):
    """No process, mount, cgroup, address, note of nspawn's, or folder; and a second time nothing happens."""
    state = tmp_path / "state"
    hosts = sandbox.up(["one", "two"], "trixie", state_dir=state)
    addresses = [host.address for host in hosts]
    assert sandbox.down(["one"], state_dir=state) == ["one"]
    assert [host.name for host in sandbox.ls(state_dir=state)] == ["two"]
    assert sandbox.down(state_dir=state) == ["two"]
    assert sandbox.down(state_dir=state) == []

    assert not state.exists()
    for address in addresses:
        claim = sandbox_host.CLAIMS / address  # another worker may have taken the address since
        if not claim.is_symlink():
            assert not list(Path("/sys/fs/cgroup").rglob(sandbox_boot.scope_name(address)))
    for file in ("mounts", "net/unix"):
        assert str(state) not in Path("/proc/self", file).read_text()
    assert not [cmdline for cmdline in _command_lines() if str(state) in cmdline]
    assert not list(Path("/run/systemd/nspawn").rglob("*labdeploy*"))


def _command_lines() -> list[str]:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_text(errors="replace"))
        except OSError:  # it ended meanwhile
            continue
    return lines
