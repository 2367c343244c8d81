"""Services that span hosts: what is refused, how a model is split, what units say, and who moves with whom."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from snapshot_maker import write_snapshot

from labdeploy import companions, deploy, plan, render, report, spans
from labdeploy.deploy import Job, Outcome
from labdeploy.errors import HostError, InventoryError, LabdeployError, UnhealthyError
from labdeploy.fleet import History, HostState, ServiceState, Switch
from labdeploy.generation import SpanMark
from labdeploy.hardware import Cpu, Hardware
from labdeploy.inventory import Host
from labdeploy.models.book import ModelBook
from labdeploy.runners.vllm_memory import stage, stage_bytes, weights_bytes
from labdeploy.schema import Mib
from tests.unit.test_vllm_runner import LLAMA_70B, after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from labdeploy.plan import HostPlan
    from tests.unit.conftest import Lab

GPU = '{name: RTX 3090, vram: 24GiB, compute_capability: "8.6"}'
SMALL = '{name: RTX 2080 Ti, vram: 11GiB, compute_capability: "7.5"}'


def inventory(
    service: str = "span: [a, b]", *, a: str = GPU, b: str = GPU, on_b: str = "{}", address: str = "10.0.0.2"
) -> str:
    """Write an inventory of two hosts, with a service on the first one."""
    return f"""
    models: {{tiny: {{path: tiny, local: tiny}}}}
    hosts:
      a:
        address: 10.0.0.1
        hardware: {{cpu: {{cores: 8}}, ram: 64GiB, gpus: [{a}]}}
        services:
          big: {{runner: vllm, model: tiny, port: 8000, {service}}}
      b:
        address: {address}
        hardware: {{cpu: {{cores: 8}}, ram: 64GiB, gpus: [{b}]}}
        services: {on_b}
    """


def plans(lab: Lab, text: str) -> dict[str, HostPlan]:
    """Plan both hosts."""
    if not (lab.folder / "tiny").exists():
        write_snapshot(lab.folder / "tiny")
    loaded = lab.load(text)
    return {p.host.name: p for p in plan.plan_hosts(loaded.hosts.values(), ModelBook(loaded, {}))}


# --- the inventory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "more", "problem"),
    [
        ("span: [b, a]", {}, "span: begins with b; the first host answers"),
        ("span: [a]", {}, "span: must name two or more hosts, each once"),
        ("span: [a, b, b]", {}, "span: must name two or more hosts, each once"),
        ("span: [a, bb]", {}, "span: 'bb' is not a host"),
        (
            "span: [a, b]",
            {"on_b": "{big: {runner: vllm, model: tiny, port: 8001}}"},
            "span: b has a service big of",
        ),
        ("span: [a, b]", {"address": "b.lan"}, "span: b has no IP address under address:; write span_addresses"),
        ("span: [a, b], span_addresses: [10.1.0.1]", {}, "span_addresses: names 1 addresses for 2 hosts"),
        ("span: [a, b], span_addresses: [10.1.0.1, x]", {}, "span_addresses[1]: 'x' is not an IP address"),
        ("engine: ray", {}, "engine: belongs to a service that spans hosts"),
        ("span_port: 5000", {}, "span_port: belongs to a service that spans hosts"),
        ("span: [a, b], engine: mpi", {}, "engine: 'mpi' is not one of mp, ray"),
        ("span: [a, b], flags: [--nnodes, '3']", {}, "flags: --nnodes is set by the plan; write span:"),
        ("span: [a, b], flags: [-pp, '3']", {}, "flags: -pp is set by the plan; write span:"),
    ],
)
def test_what_cannot_span_is_said_with_its_place(lab: Lab, service: str, more: dict[str, str], problem: str):
    """All of it before any host is asked."""
    assert any(problem in found for found in lab.problems(inventory(service, **more)))


def test_two_spans_of_a_host_are_joined_at_two_ports(lab: Lab):
    """The second one could not even listen."""
    second = "span: [a, b]}\n          more: {runner: vllm, model: tiny, port: 8001, span: [a, b]"
    assert any(
        "more.span_port: other hosts join big at 29501 already" in found for found in lab.problems(inventory(second))
    )
    assert lab.load(inventory(second + ", engine: ray"))


def test_each_host_has_its_part(lab: Lab):
    """The service stands under the first host; the others get theirs from it."""
    hosts = lab.load(inventory("span: [a, b], api_key_file: /etc/key")).hosts
    parts = [hosts[name].services["big"].part for name in "ab"]
    assert [(part.rank, part.address) for part in parts if part] == [(0, "10.0.0.1"), (1, "10.0.0.2")]
    assert [hosts[name].services["big"].api_key_file for name in "ab"] == ["/etc/key", None]


def test_another_network_may_join_them(lab: Lab):
    """What SSH reaches need not be what is fast."""
    found = plans(lab, inventory("span: [a, b], span_addresses: [10.9.0.1, 10.9.0.2]", address="b.lan"))
    assert [found[name].services[0].env["VLLM_HOST_IP"] for name in "ab"] == ["10.9.0.1", "10.9.0.2"]
    assert after(found["b"].services[0].argv, "--master-addr") == "10.9.0.1"


# --- the plan -----------------------------------------------------------------------------------------------------


def test_a_stage_is_the_largest_one():
    """80 layers in 3 stages are 27, 27 and 26; the ends hold the embedding or the output layer."""
    assert stage(LLAMA_70B, 3).n_layer == 27
    whole = weights_bytes(LLAMA_70B, "bfloat16")
    ends = 128_256 * 8192 * 2
    assert stage_bytes(LLAMA_70B, "bfloat16", 2) == (whole - 2 * ends) // 2 + ends
    assert stage_bytes(LLAMA_70B, "bfloat16", 1) == whole
    sizes = [stage_bytes(LLAMA_70B, "bfloat16", n) for n in (1, 2, 3, 4, 80)]
    assert sizes == sorted(sizes, reverse=True)


def test_gpus_hold_stages_and_cpus_parts_of_layers(lab: Lab):
    """Tensor parallelism stays within a host of GPUs; on CPUs it is all there is."""
    found = plans(lab, inventory())
    for rank, name in enumerate("ab"):
        argv = found[name].services[0].argv
        assert (after(argv, "--pipeline-parallel-size"), after(argv, "--tensor-parallel-size")) == ("2", "1")
        assert (after(argv, "--nnodes"), after(argv, "--node-rank")) == ("2", str(rank))
        assert ("--headless" in argv) == bool(rank)
    on_cpu = plans(lab, inventory(a="", b=""))["b"].services[0]
    assert (after(on_cpu.argv, "--pipeline-parallel-size"), after(on_cpu.argv, "--tensor-parallel-size")) == ("1", "2")
    alone = plans(lab, inventory("dtype: float32", a="", b=""))["a"].services[0]
    assert on_cpu.memory["host"].model_mib < alone.memory["host"].model_mib


def test_what_all_parts_need_alike_is_what_all_can(lab: Lab):
    """An old GPU decides the dtype of both, and the plan says which host it was."""
    found = plans(lab, inventory(b=SMALL))
    dtypes = [found[name].services[0].settings["dtype"] for name in "ab"]
    assert [choice.value for choice in dtypes] == ["float16", "float16"]
    assert dtypes[0].why == "all hosts of the span need the same, and b can do no other"
    shares = [found[name].services[0].settings["gpu_memory_utilization"].value for name in "ab"]
    assert shares[0] != shares[1], "what each GPU leaves is its own"
    assert "float16" in found["a"].services[0].argv


def test_hosts_with_and_without_gpus_do_not_mix(lab: Lab):
    """They could not even agree on the number of ranks."""
    with pytest.raises(InventoryError, match="b has none that vLLM can use"):
        plans(lab, inventory(b=""))


def test_both_parts_change_when_one_does(lab: Lab):
    """The id stands in each unit, so that none goes on running beside another one's new part."""
    before, same = plans(lab, inventory()), plans(lab, inventory())
    after_change = plans(lab, inventory(b='{name: RTX 3090, vram: 24GiB, compute_capability: "8.6", uuid: GPU-bb11}'))
    ids = [[found[name].services[0].span_id for name in "ab"] for found in (before, same, after_change)]
    assert ids[0] == ids[1]
    assert all(one == other for one, other in ids)
    assert ids[0] != ids[2]
    assert before["a"].services[0].argv == after_change["a"].services[0].argv


def test_a_worker_is_told_as_one(lab: Lab):
    """It has no port and no metrics; the head has both."""
    head, worker = (plan.to_json(found)["services"]["big"] for found in plans(lab, inventory()).values())
    assert head["metrics"]["url"] == "http://127.0.0.1:8000/metrics"
    assert "vllm:time_to_first_token_seconds" in head["metrics"]["names"]
    assert "metrics" not in worker
    assert (head["span"]["rank"], worker["span"]["rank"]) == (0, 1)
    assert head["span"]["id"] == worker["span"]["id"]
    text = report.plan_text(plans(lab, inventory())["b"])
    assert "big: vllm serves tiny with a, which answers" in text
    assert "is not encrypted" in text


def state(lab: Lab, host: str, text: str) -> HostState:
    """Give the state of a host to which this inventory was pushed."""
    service = ServiceState("labdeploy-big.service", "active", "running", healthy=True)
    return HostState(1, 1, False, (), {"big": service}, plan.to_json(plans(lab, text)[host]))  # noqa: FBT003


def test_status_names_metrics_and_tells_of_a_span_that_is_not_one(lab: Lab):
    """What is left when labdeploy was killed between two confirmations is seen, with the command that mends it."""
    same = {host: state(lab, host, inventory()) for host in "ab"}
    text = report.state_text(same)
    assert "a: big: http://127.0.0.1:8000/metrics: vllm:time_to_first_token_seconds" in text
    assert "b: big: http" not in text
    assert "not the same" not in text
    assert report.state_json(same["a"])["services"]["big"]["metrics"]["names"][2] == "vllm:num_requests_running"
    mixed = same | {"b": state(lab, "b", inventory("span: [a, b], max_num_seqs: 8"))}
    assert "big of a and b is not the same on all of them; labdeploy push a b mends it" in report.state_text(mixed)


def test_what_if_changes_the_service_where_it_is_written(lab: Lab):
    """A part on another host is no place to write to."""
    plans(lab, inventory())
    ran = lab.run("plan", "--what-if", "max_num_seqs=7", "--json")
    assert ran.code == 0, ran.err
    assert '"max_num_seqs 256 -> 7"' in ran.out


# --- units --------------------------------------------------------------------------------------------------------


def unit(lab: Lab, host: str, service: str = "span: [a, b]", **more: str) -> str:
    """Render the unit of one host, without its comments."""
    files = render.render_host(plans(lab, inventory(service, **more))[host], render.environment())
    return re.sub(r"^#.*\n", "", files["systemd/labdeploy-big.service"].decode(), flags=re.MULTILINE)


def test_a_unit_of_a_span_waits_for_ever_and_names_it(lab: Lab):
    """Its other hosts may be down for a day; a start limit would leave it failed."""
    for host in "ab":
        text = unit(lab, host)
        assert re.search(r"^X-LabdeploySpan=[0-9a-f]{12} a b$", text, re.MULTILINE)
        assert "StartLimitIntervalSec=0" in text
        assert "StartLimitBurst" not in text
        assert "Restart=always" in text
    alone = unit(lab, "a", "max_num_seqs: 8")
    assert "X-Labdeploy" not in alone
    assert "StartLimitBurst=4" in alone


def test_only_the_head_is_asked_over_http(lab: Lab):
    """A worker is ready when it has joined, and ends after the head."""
    assert "http://127.0.0.1:8000/health" in unit(lab, "a")
    assert "ExecStop=" not in unit(lab, "a")
    worker = unit(lab, "b")
    assert "/health;" not in worker
    assert f":{29501:04X} 01 " in worker.partition("ExecStartPost=")[2]
    assert f":{29501:04X} 01 " in worker.partition("ExecStop=")[2]
    files = render.render_host(plans(lab, inventory())["b"], render.environment())
    facts = dict(line.split("=", 1) for line in files["services/big"].decode().splitlines())
    assert (facts["ready"], facts["completions"], facts["port"]) == ("", "", "0")


def test_the_units_of_ray(lab: Lab):
    """The head's vLLM and its Ray are one unit, so that they start and stop as one; a worker is a Ray node alone."""
    head, worker = (unit(lab, host, "span: [a, b], engine: ray") for host in "ab")
    assert "/bin/ray start --node-ip-address=10.0.0.1 --num-gpus=1" in head
    assert "--head --port=6379" in head
    assert "--distributed-executor-backend ray" in head
    assert "Environment=RAY_ADDRESS=10.0.0.1:6379" in head
    assert "--nnodes" not in head
    assert "/bin/ray start --node-ip-address=10.0.0.2" in worker
    assert "--address=10.0.0.1:6379 --block" in worker
    assert "vllm serve" not in worker
    assert f"--object-store-memory={128 * 1024 * 1024}" in head
    joined = {
        engine: plans(lab, inventory(f"span: [a, b], engine: {engine}"))["a"].services[0] for engine in ("mp", "ray")
    }
    assert joined["ray"].memory["host"].total_mib - joined["mp"].memory["host"].total_mib == 768


def test_ray_on_cpus_is_refused(lab: Lab):
    """VLLM 0.32.0 for CPUs ends with "current platform cpu does not support ray"; that is told before."""
    with pytest.raises(InventoryError, match="engine: ray needs GPUs"):
        plans(lab, inventory("span: [a, b], engine: ray", a="", b=""))


def test_the_interface_is_the_one_with_the_address(lab: Lab):
    """NCCL and gloo would guess; on loopback there is nothing to look up."""
    assert "ip -o address show to 10.0.0.2" in unit(lab, "b")
    local = unit(lab, "b", "span: [a, b], span_addresses: [127.0.0.1, 127.0.0.2]")
    assert "ip -o" not in local
    assert "Environment=GLOO_SOCKET_IFNAME=lo" in local
    command = plans(lab, inventory())["b"].services[0].facts["exec"]
    done = subprocess.run([*command[:4], "true"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no interface of this host has 10.0.0.2\n")


def _command(lab: Lab, host: str, port: int, program: str) -> list[str]:
    """Give the start of one part, with a program of ours in place of vLLM."""
    service = f"span: [a, b], span_addresses: [127.0.0.1, 127.0.0.1], span_port: {port}"
    return [*plans(lab, inventory(service))[host].services[0].facts["exec"][:4], "sh", "-c", program]


def _pair(port_of: socket.socket) -> list[socket.socket]:
    client = socket.create_connection(port_of.getsockname())
    return [client, port_of.accept()[0]]


@pytest.mark.parametrize(("host", "ranks"), [("a", 2), ("b", 1)])
def test_a_part_ends_when_another_has_left(lab: Lab, host: str, ranks: int):
    """Run for real: once all are connected and one is not any more, it ends itself, with what it started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        argv = _command(lab, host, server.getsockname()[1], "exec sleep 600")
        pairs = [_pair(server) for _ in range(ranks)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as started:
            time.sleep(2.5)
            assert started.poll() is None
            for end in pairs[0]:
                end.close()
            assert started.stderr
            assert "a host of the span has left" in started.stderr.readline()
            assert started.wait(60) == 1
        for end in (end for pair in pairs[1:] for end in pair):
            end.close()


@pytest.mark.parametrize(("program", "code"), [("exit 2", 2), ("exit 0", 0), ("kill -9 $$", 137)])
def test_a_part_ends_as_what_it_runs(lab: Lab, program: str, code: int):
    """2 is a flag that vLLM does not know: systemd must see it."""
    done = subprocess.run(_command(lab, "a", 1, program), capture_output=True, timeout=60, check=False)
    assert done.returncode == code


def test_a_part_passes_on_the_wish_to_stop(lab: Lab):
    """SIGTERM goes to the first process only; vLLM must get it to drain."""
    program = 'trap "echo drained; exit 0" TERM; echo up; while :; do sleep 0.1; done'
    with subprocess.Popen(_command(lab, "a", 1, program), stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        assert started.stdout.readline() == "up\n"
        started.terminate()
        assert started.stdout.readline() == "drained\n"
        assert started.wait(60) == 0


# --- moving together ----------------------------------------------------------------------------------------------

BOTH = frozenset("ab")


def job(name: str, together: Iterable[str] = BOTH) -> Job:
    """Make a push to a host that may move with others."""
    host = Host(Hardware(Cpu(1), Mib(1024)), address=name, name=name)
    return Job(host, "push", "0" * 64, ("big",), deadline_s=60, together=frozenset(together))


def test_hosts_that_share_a_span_are_one_group():
    """Also over a host that is in two of them."""
    groups = spans.together("abcde", [("a", "b"), ("b", "c")])
    assert groups == {**dict.fromkeys("abc", frozenset("abc")), "d": frozenset("d"), "e": frozenset("e")}


@pytest.mark.parametrize(
    ("order", "sizes"),
    [
        (deploy.Order(), [["x", "a", "b", "y"]]),
        (deploy.Order(serial=1), [["x"], ["a", "b"], ["y"]]),
        (deploy.Order(canary=2), [["x", "a", "b"], ["y"]]),
        (deploy.Order(serial=2), [["x", "a", "b"], ["y"]]),
    ],
)
def test_a_span_is_never_cut_into_two_batches(order: deploy.Order, sizes: list[list[str]]):
    """One half would wait for the other for ever."""
    jobs = [job("x", "x"), job("a"), job("y", "y"), job("b")]
    assert [[each.host.name for each in batch] for batch in order.batches(jobs)] == sizes


def changed(name: str) -> Outcome:
    """Say that a host changed."""
    return Outcome(name, "changed", 2, 1)


def failed(name: str) -> Outcome:
    """Say that a host went back."""
    return Outcome(name, "rolled-back", 1, 2, error=UnhealthyError("did not start", where=name))


def run(
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Job, str, deploy.Span | None], Outcome],
    denied: list[str] | None = None,
) -> dict[str, Outcome]:
    """Push to both hosts, where `act` tells what a host does with a job, its options and the span that it waits in."""
    denied = [] if denied is None else denied

    def pretend(job: Job, *args: Any) -> Outcome:  # noqa: ANN401
        return act(job, args[2], args[5])

    monkeypatch.setattr(deploy, "run_job", pretend)
    monkeypatch.setattr(deploy, "_deny", lambda host, **_: denied.append(host.name))
    return {o.host: o for o in deploy.run_jobs([job("a"), job("b")], Path(), "id")}


def test_what_one_refuses_none_does(monkeypatch: pytest.MonkeyPatch):
    """Each is asked before any is switched."""
    asked = []

    def act(job: Job, options: str, _span: object) -> Outcome:
        asked.append((job.host.name, options))
        if job.host.name == "b":
            return Outcome("b", "failed", error=InventoryError("model file is not there", where="b"))
        return Outcome("a", "would-change")

    ended = run(monkeypatch, act)
    assert sorted(asked) == [("a", "dry-run"), ("b", "dry-run")]
    assert (ended["a"].result, ended["b"].exit_code) == ("skipped", 2)
    assert "b cannot go along, and a and b move together" in report.outcome_text(ended["a"])


@pytest.mark.parametrize("b_fails", [False, True])
def test_none_is_confirmed_before_all_can_be(monkeypatch: pytest.MonkeyPatch, b_fails: bool):
    """The first one waits; where the other fails it goes back too."""
    there = []

    def act(job: Job, options: str, span: deploy.Span | None) -> Outcome:
        if options == "dry-run" or span is None:
            return Outcome(job.host.name, "would-change")
        if job.host.name == "b":
            time.sleep(0.2)
            if b_fails:
                return failed("b")
        there.append(span.all_there())
        return changed(job.host.name) if there[-1] else failed(job.host.name)

    denied: list[str] = []
    ended = run(monkeypatch, act, denied)
    assert ("a" in denied) == b_fails, "it may still be starting, and wait for the one that failed"
    assert there == ([False] if b_fails else [True, True])
    assert {o.result for o in ended.values()} == ({"rolled-back"} if b_fails else {"changed"})


def test_a_host_that_has_nothing_to_do_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    """Only the other one's services changed."""

    def act(job: Job, _options: str, span: deploy.Span | None) -> Outcome:
        if job.host.name == "b":
            return Outcome("b", "unchanged", 1)
        assert span is None or span.all_there()
        return changed("a")

    assert {h: o.result for h, o in run(monkeypatch, act).items()} == {"a": "changed", "b": "unchanged"}


def test_a_host_that_was_confirmed_goes_back_where_the_other_was_lost(monkeypatch: pytest.MonkeyPatch):
    """Between two confirmations a line may break: then the one that got through is undone."""
    undone, a_passed = [], threading.Event()

    def act(job: Job, options: str, span: deploy.Span | None) -> Outcome:
        if job.verb == "rollback":
            undone.append((job.host.name, job.target))
            return Outcome(job.host.name, "changed", 1, 2)
        if options == "dry-run" or span is None:
            return Outcome(job.host.name, "would-change")
        assert span.all_there()
        if job.host.name == "a":
            a_passed.set()
            return changed("a")
        assert a_passed.wait(60)
        return failed("b")

    ended = run(monkeypatch, act)
    assert undone == [("a", "1")]
    assert {h: o.result for h, o in ended.items()} == {"a": "rolled-back", "b": "rolled-back"}
    assert str(ended["a"].error) == "a: b failed, and they move together; generation 1 is back"


def test_a_mistake_of_ours_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    """What nobody foresaw on one host must not hang the other."""

    def act(job: Job, options: str, span: deploy.Span | None) -> Outcome:
        if options == "dry-run" or span is None:
            return Outcome(job.host.name, "would-change")
        if job.host.name == "b":
            raise ZeroDivisionError
        assert not span.all_there()
        return failed("a")

    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, act)


# --- going back together --------------------------------------------------------------------------------------------

OLD, NEW = SpanMark("old", ("a", "b")), SpanMark("new", ("a", "b"))


def history(*marks: SpanMark | None, current: int = 0) -> History:
    """Give the history of a host whose generations 1, 2, ... have the span `big` like so."""
    manifests: dict[int, dict[str, Any]] = {
        n: {"push_id": f"p{n}"} | ({"spans": {"big": dataclasses.asdict(mark)}} if mark else {})
        for n, mark in enumerate(marks, 1)
    }
    journal = tuple(Switch("push", f"p{n}", "me", "", n - 1, n, ("big",), "ok") for n in manifests)
    return History(current or len(marks), current or len(marks), manifests, journal)


def taken(targets: dict[str, str], **known: History | LabdeployError) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Find who goes along."""
    return companions.taken_along(targets, lambda names: {name: known[name] for name in names})


def test_the_other_host_goes_to_the_generation_with_the_same_span():
    """Numbers differ from host to host; what the span is there does not."""
    a, b = history(OLD, NEW), history(None, OLD, OLD, NEW)
    assert taken({"a": "previous"}, a=a, b=b) == ({"a": "1", "b": "3"} | {"a": "previous"}, [("a", "b"), ("b", "a")])
    assert taken({"b": "3"}, a=a, b=b)[0] == {"b": "3", "a": "1"}


def test_who_has_the_span_already_stays():
    """A rollback that changes another service alone takes nobody along."""
    a = history(OLD, OLD)
    assert taken({"a": "previous"}, a=a) == ({"a": "previous"}, [])
    assert taken({"a": "1"}, a=history(OLD, NEW), b=history(OLD))[0] == {"a": "1", "b": "1"}


def test_a_generation_without_the_span_takes_it_from_all():
    """Back to before it was there."""
    assert taken({"a": "0"}, a=history(OLD, NEW), b=history(None, OLD, NEW))[0] == {"a": "0", "b": "1"}
    assert taken({"a": "0"}, a=history(OLD), b=history(OLD))[0] == {"a": "0", "b": "0"}


def test_a_span_that_cannot_go_back_whole_does_not():
    """The other host keeps no such generation, does not answer, or was sent elsewhere."""
    a = history(OLD, NEW)
    with pytest.raises(InventoryError, match="no generation that b could go to"):
        taken({"a": "previous"}, a=a, b=history(NEW))
    with pytest.raises(InventoryError, match="no generation that b could go to"):
        taken({"a": "previous", "b": "2"}, a=a, b=history(OLD, NEW))
    with pytest.raises(HostError):
        taken({"a": "previous"}, a=a, b=HostError("does not answer", where="b"))
    found, pairs = taken({"a": "1", "b": "1"}, a=a, b=HostError("does not answer", where="b"))
    assert (found, pairs) == ({"a": "1", "b": "1"}, [("a", "b")]), "it fails by itself, and takes a with it"
