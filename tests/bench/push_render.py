"""How long planning and rendering takes, and how long Ansible's template module takes for one unit."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
N_TEMPLATES = 50
N_LINES = 60  # about what a unit of ours has
PLAY = """\
- hosts: localhost
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.template: {{src: unit.j2, dest: "out{{{{ item }}}}", mode: "0644"}}
      loop: "{{{{ range({n}) | list }}}}"
"""
OURS = """\
import json, sys, time
sys.path[:0] = [{unit!r}, {tests!r}]
import fleet_of_1000 as fleet
from labdeploy import plan as planning, render
hosts, book = list(fleet.hosts({n})), fleet.new_book()
list(book.known("/srv/models"))
before = time.process_time()
environment = render.environment()
files = [render.render_host(planning.plan_host(host, book), environment) for host in hosts]
print(json.dumps(time.process_time() - before))
"""


def measured(folder: Path, programs: Path, *, n_hosts: int) -> dict[str, float]:
    """Give processor seconds: ours for so many hosts with three services each, Ansible's for one unit."""
    folder.mkdir()
    tests = HERE.parent
    script = OURS.format(unit=str(tests / "unit"), tests=str(tests), n=n_hosts)
    ours = min(json.loads(subprocess.check_output([sys.executable, "-c", script])) for _ in range(3))
    (folder / "unit.j2").write_text("[Service]\n" + "".join(f"Setting{i}={{{{ item }}}}\n" for i in range(N_LINES)))
    with_all, with_none = (_ansible_s(folder, programs, n) for n in (N_TEMPLATES, 0))
    return {"n_hosts": n_hosts, "ours_s": ours, "ansible_unit_s": (with_all - with_none) / N_TEMPLATES}


def _ansible_s(folder: Path, programs: Path, n: int) -> float:
    (folder / "play.yml").write_text(PLAY.format(n=n))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python = f"ansible_python_interpreter={programs / 'python'}"
    argv = [str(programs / "ansible-playbook"), "-i", "localhost,", "-e", python, "play.yml"]
    subprocess.run(argv, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
