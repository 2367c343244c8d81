"""The example for other engines, with a real Ansible: rendered generations, and labdeploy's program on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab import UNIT, Lab

from labdeploy import host as hosts

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import push_tools

if TYPE_CHECKING:
    from labdeploy.sandbox import SandboxHost

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ansible"
PROGRAMS = Path(hosts.__file__).parent


def play(lab: Lab, programs: Path) -> str:
    """Render, and push with the playbook; give what Ansible said of the host at the end."""
    assert lab.run("render").code == 0
    host = lab.host
    login = f"ansible_host={host.address} ansible_port={host.port} ansible_user=root"
    (lab.folder / "hosts.ini").write_text(f"{host.name} {login} ansible_ssh_private_key_file={host.key}\n")
    known = f"-o UserKnownHostsFile={host.known_hosts} -o ControlMaster=auto -o ControlPersist=10s"
    (lab.folder / "ansible.cfg").write_text(f"[ssh_connection]\nssh_args = -F none {known}\n")
    argv = [str(programs / "ansible-playbook"), "-i", "hosts.ini", str(EXAMPLE / "push.yml"), "-e", "watch_s=1"]
    words = ["-e", f"rendered={lab.folder / 'rendered'}", "-e", f"programs={PROGRAMS}"]
    ended = subprocess.run([*argv, *words], cwd=lab.folder, check=False, capture_output=True, text=True, timeout=180)
    return ended.stdout.partition("PLAY RECAP")[2] or ended.stdout + ended.stderr


def test_ansible_carries_a_push(fresh_host: SandboxHost, tiny_model: Path, tmp_path: Path) -> None:
    """The host is confirmed on the generation, labdeploy finds nothing left to do, and a broken one comes back."""
    programs = push_tools.install(lambda _text: None)
    lab = Lab(tmp_path, [fresh_host], tiny_model)
    assert "changed=1" in play(lab, programs)
    assert lab.complete()
    assert lab.show("UnitFileState", UNIT) == "enabled"
    assert "changed=0" in play(lab, programs)
    assert lab.push_ok()["result"] == "unchanged"
    lab.set(flags=["--no-such-flag"])
    assert "failed=1" in play(lab, programs)
    lab.set()
    status = lab.run("status", "--json").json["hosts"][lab.host.name]
    assert (status["generation"], status["good"], status["pending"]) == (1, 1, False)
    assert lab.complete()
