"""Every tool doing the same job on the same hosts: compare a unit with the one that is installed, run one command.

labdeploy and the two that run its program do more with that: lock, drift, state of the unit. The files that each tool
wants are written once; a run is one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

from labdeploy import host as hosts
from labdeploy.remembered import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from push_hosts import Fleet

HERE = Path(__file__).parent
PACKAGES = ("ansible-core==2.19.14", "mitogen==0.3.54", "pyinfra==3.10.0")
COMMAND = "systemctl is-active labdeploy-chat.service"
DEST = "/etc/systemd/system/labdeploy-chat.service"
FORKS = 50

PLAYBOOK = f"""\
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.copy: {{src: unit, dest: {DEST}, mode: "0644"}}
    - ansible.builtin.command: {COMMAND}
      changed_when: false
"""

ANSIBLE_CFG = """\
[defaults]
inventory = hosts.ini
forks = {forks}
gathering = explicit
interpreter_python = /usr/bin/python3
{strategy}
[ssh_connection]
pipelining = True
ssh_args = -F none -o ControlMaster=auto -o ControlPersist=60s -o UserKnownHostsFile={known} -o IdentitiesOnly=yes
control_path_dir = {folder}/cp
"""

PYINFRA_DEPLOY = f"""\
from pyinfra.operations import files, server

files.put(src="unit", dest="{DEST}", mode="644")
server.shell(commands=["{COMMAND}"])
"""


def cache() -> Path:
    """Return the folder of the tools' own environment."""
    return Path.home() / ".cache" / "labdeploy" / "bench"


def install(say: Callable[[str], None]) -> Path:
    """Return the folder of the tools' programs, installed first where they are not there or of other versions."""
    folder = cache() / "venv"
    done = folder / "packages"
    if not done.exists() or done.read_text() != " ".join(PACKAGES):
        say(f"installing {', '.join(PACKAGES)} into {folder}, once")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
        done.write_text(" ".join(PACKAGES))
    return folder / "bin"


def tools(fleet: Fleet, programs: Path) -> dict[str, list[str]]:
    """Write what each tool wants, and give the command line of each by its name."""
    folder = fleet.folder
    (folder / "unit").write_bytes(fleet.unit.read_bytes())
    _write_ansible(fleet, folder / "ansible", "")
    plugins = next(programs.parent.glob("lib/python*/site-packages/ansible_mitogen/plugins/strategy"))
    _write_ansible(fleet, folder / "mitogen", f"strategy_plugins = {plugins}\nstrategy = mitogen_linear\n")
    _write_pyinfra(fleet, folder / "pyinfra")
    command = _labdeploy_command(fleet)
    (folder / "bare.json").write_text(json.dumps(_job(fleet, command)))
    _write_ssh(fleet, folder / "openssh", command)

    def inside(where: str, *argv: str) -> list[str]:
        return ["env", "-C", str(folder / where), *argv]

    return {
        "labdeploy": [sys.executable, "-m", "labdeploy", "-i", str(folder / "inventory.yaml"), "push", "--all", "-y"],
        "bare paramiko": [sys.executable, str(HERE / "push_bare.py"), str(folder / "bare.json")],
        "OpenSSH": ["sh", str(folder / "openssh")],
        "pyinfra": inside("pyinfra", str(programs / "pyinfra"), "-y", "inventory.py", "deploy.py"),
        "Ansible": inside("ansible", str(programs / "ansible-playbook"), "play.yml"),
        "Ansible + mitogen": inside("mitogen", str(programs / "ansible-playbook"), "play.yml"),
    }


def _labdeploy_command(fleet: Fleet) -> str:
    """Give the very command that labdeploy runs on a host for a push."""
    (first, *_) = Memory(fleet.folder / "inventory.yaml", []).recall() or [None]
    if first is None:
        raise SystemExit("labdeploy remembers no push: run it once before")
    words = ("push", "20260101T000000Z-000000", first.content_hash, "bench@bench", "0", "30", "-")
    return hosts.start_kept(*words)


def _job(fleet: Fleet, command: str) -> dict[str, object]:
    return {
        "address": fleet.address,
        "ports": fleet.ports,
        "key": str(fleet.key),
        "known_hosts": str(fleet.known_hosts),
        "command": command,
    }


def _write_ansible(fleet: Fleet, folder: Path, strategy: str) -> None:
    folder.mkdir()
    (folder / "unit").write_bytes(fleet.unit.read_bytes())
    login = f"ansible_host={fleet.address} ansible_user=root ansible_ssh_private_key_file={fleet.key}"
    lines = "".join(f"h{i} ansible_port={port} {login}\n" for i, port in enumerate(fleet.ports))
    (folder / "hosts.ini").write_text(lines)
    (folder / "play.yml").write_text(PLAYBOOK)
    text = ANSIBLE_CFG.format(forks=FORKS, strategy=strategy, known=fleet.known_hosts, folder=folder)
    (folder / "ansible.cfg").write_text(text)


def _write_pyinfra(fleet: Fleet, folder: Path) -> None:
    folder.mkdir()
    (folder / "unit").write_bytes(fleet.unit.read_bytes())
    login = {
        "ssh_hostname": fleet.address,
        "ssh_user": "root",
        "ssh_key": str(fleet.key),
        "ssh_known_hosts_file": str(fleet.known_hosts),
        "ssh_strict_host_key_checking": "yes",
        "ssh_allow_agent": False,
        "ssh_look_for_keys": False,
    }
    found = [(f"h{i}", login | {"ssh_port": port}) for i, port in enumerate(fleet.ports)]
    (folder / "inventory.py").write_text(f"hosts = {found!r}\n")
    (folder / "deploy.py").write_text(PYINFRA_DEPLOY)


def _write_ssh(fleet: Fleet, file: Path, command: str) -> None:
    (file.parent / "command").write_text(command)
    options = f"-F none -i {fleet.key} -o IdentitiesOnly=yes -o BatchMode=yes -o UserKnownHostsFile={fleet.known_hosts}"
    ssh = f'exec ssh {options} -p "$0" root@{fleet.address} "$(cat {file.parent}/command)" </dev/null'
    ports = " ".join(map(str, fleet.ports))
    file.write_text(f"printf '%s\\n' {ports} | xargs -P {FORKS} -n 1 sh -c '{ssh}' >{file}.out\n")
