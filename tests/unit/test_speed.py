"""How long one waits: whole processes, the best of five, in processor seconds, which other work does not stretch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import fleet_of_1000 as fleet
from conftest import TOP

from labdeploy import plan as planning
from labdeploy import render

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from conftest import Lab

BEST_OF = 5


def best_ms(*argv: str) -> float:
    """Run a command line as a process of its own, and give the processor time of the fastest run."""
    times = []
    as_installed = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # not compiled at each start
    for _ in range(BEST_OF):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "labdeploy", *argv], check=True, capture_output=True, env=as_installed)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)
    return min(times)


def test_help_is_there_at_once(capsys: pytest.CaptureFixture[str]):
    """Under 300 ms: nothing that talks to hosts or draws tables is imported for it."""
    taken = best_ms("--help")
    with capsys.disabled():
        sys.stdout.write(f"\nlabdeploy --help: {taken:.0f} ms\n")
    assert taken < 300


def test_four_machines_are_rendered_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Under 800 ms for the shipped inventory, all plans and units."""
    taken = best_ms("-i", str(TOP / "inventory.yaml"), "render", "-o", str(tmp_path))
    with capsys.disabled():
        sys.stdout.write(f"\nlabdeploy render: {taken:.0f} ms\n")
    assert taken < 800


def test_what_fits_nowhere_is_told_soon(lab: Lab, capsys: pytest.CaptureFixture[str]):
    """Three services on three unequal GPUs, 300 ways to lay each out, and the lines that would help: under 8 s."""
    cards = ", ".join(f"{{name: RTX 3090, vram: {vram}GiB}}" for vram in (24, 12, 8))
    hardware = f"cpu: {{cores: 16}}, ram: 24GiB, gpus: [{cards}]"
    services = {
        "a": "model: llama3-70b, prefer: context",
        "b": "model: gemma3-27b, ctx_size: 65536",
        "c": "model: qwen3-30b, ctx_size: 262144, gpu_layers: 49",
    }
    before = time.process_time()
    ports = zip(services, range(8080, 8090), strict=False)
    plan = lab.plan(hardware, **{n: f"runner: llama-server, port: {port}, {services[n]}" for n, port in ports})
    taken = time.process_time() - before
    with capsys.disabled():
        sys.stdout.write(f"\nthree services of which two fit nowhere: {taken:.1f} s\n")
    assert [service.name for service in plan.services if not service.fits] == ["b", "c"]
    assert taken < 8


def plan_and_render_s(n_hosts: int) -> float:
    """Plan and render a fleet, cold: a new book is of new shapes, of which nothing is remembered."""
    hosts, book = list(fleet.hosts(n_hosts)), fleet.new_book()
    list(book.known("/srv/models"))  # as a command does once, for however many hosts
    before = time.process_time()
    environment = render.environment()
    plans = [planning.plan_host(host, book) for host in hosts]
    files = [render.render_host(plan, environment) for plan in plans]
    taken = time.process_time() - before
    assert all(plan.fits for plan in plans)
    assert sum(path.startswith("systemd/") for tree in files for path in tree) == n_hosts * 3
    return taken


def test_a_thousand_hosts_are_planned_and_rendered_in_two_seconds(capsys: pytest.CaptureFixture[str]):
    """3000 services of 8 kinds of hosts in 4 sizes: up to two GPUs, dense, MoE and hybrid models, all runners."""
    taken = min(plan_and_render_s(1000) for _ in range(3))
    with capsys.disabled():
        sys.stdout.write(f"\n1000 hosts x 3 services planned and rendered: {taken:.2f} s\n")
    assert taken < 2
