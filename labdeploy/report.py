"""Results as text and JSON. Text reads the same without colour, in a pipe, and in a terminal of 80 columns."""

from __future__ import annotations

import difflib
import string
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from labdeploy.errors import LabdeployError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from labdeploy.builds import Build
    from labdeploy.check import Report
    from labdeploy.deploy import Outcome
    from labdeploy.facts.machine import Machine
    from labdeploy.fleet import Files, History, HostState
    from labdeploy.generation import Generation
    from labdeploy.pick import Offer, Pick
    from labdeploy.plan import HostPlan
    from labdeploy.probe import Probed
    from labdeploy.runners.base import ServicePlan

WIDTH = 79
BAR = 70  # cells of a device's bar


# --- plan and render ----------------------------------------------------------------------------------------------


def plan_text(plan: HostPlan) -> str:
    """Say what a host's devices hold and why each setting is what it is."""
    out = [plan.host.name]
    for i, gpu in enumerate(plan.host.hardware.gpus):
        out += _device_lines(plan, f"gpu{i}", gpu.name, plan.vram_usable_mib(i), gpu.vram)
    out += _device_lines(plan, "host", "", plan.ram_usable_mib, plan.host.hardware.ram)
    out += [_wrapped("warning:", text) for text in plan.warnings]
    for service in plan.services:
        out += _service_lines(service)
    return "\n".join(out) + "\n\n"


def _device_lines(plan: HostPlan, device: str, name: str, usable: int, total: int) -> list[str]:
    """Say what is planned on a device, and draw it: a letter for each service, `.` for what is left, `-` kept back."""
    planned = plan.planned_mib(device)
    label = f"{'ram' if device == 'host' else device} {name}".strip()
    head = f"  {label:<26} {planned:>7.0f} of {usable} MiB planned ({total} MiB in all)"
    marks = dict(zip((service.name for service in plan.services), string.ascii_letters, strict=False))
    taken = [(marks.get(s.name, "*"), s.name, s.memory[device].total_mib) for s in plan.services if device in s.memory]
    left = usable - planned
    rest = f"left {left:.0f}" if left >= 0 else f"TOO MUCH BY {-left:.0f}"
    legend = [f"{mark} {name} {mib:.0f}" for mark, name, mib in taken] + [rest]
    legend += [f"kept back {total - usable}"] if total > usable else []
    parts = [(mark, mib) for mark, _, mib in taken] + [(".", max(0.0, left)), ("-", total - max(usable, planned))]
    return [head, f"    [{_bar(parts)}]", *textwrap.wrap(", ".join(legend), WIDTH - 4, **_INDENTED)]


_INDENTED: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}


def _bar(parts: Iterable[tuple[str, float]]) -> str:
    """Draw amounts side by side as runs of their marks, BAR wide in all."""
    positive = [(mark, max(0.0, amount)) for mark, amount in parts]
    whole = sum(amount for _, amount in positive) or 1.0
    drawn, before = "", 0.0
    for mark, amount in positive:
        before += amount
        drawn += mark * (round(before / whole * BAR) - len(drawn))
    return drawn


def changes_text(changes: Mapping[str, Any], plan: HostPlan) -> str:
    """Say what a plan would change against now."""
    lines = [f"{plan.host.name}: what would change; nothing was written"]
    for name, found in changes["services"].items():
        lines += _fold(f"  {name}: {', '.join(found)}")
    lines += [f"  {device}: {was} -> {now} MiB planned" for device, (was, now) in changes["planned_mib"].items()]
    return "\n".join([*lines, *(["  nothing"] if len(lines) == 1 else [])]) + "\n\n"


def _service_lines(service: ServicePlan) -> list[str]:
    lines = [f"  {service.name}: {service.runner} {service.does}"]
    lines.append(_wrapped(f"{'runner':<22} {service.runner}", f"({service.runner_why})"))
    for key, choice in service.settings.items():
        lines.append(_wrapped(f"{key:<22} {choice.shown}", f"({choice.why})"))
    for device, part in service.memory.items():
        lines.append(f"    memory on {device}: {part.total_mib:.0f} MiB")
    lines += [_wrapped("does not fit:", text) for text in service.shortfall]
    lines += [_wrapped("would fit with:", text) for text in service.ways_to_fit]
    lines += [_wrapped("warning:", text) for text in service.warnings]
    return lines


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(f"{head} {text}", WIDTH, initial_indent="    ", subsequent_indent="      ")


def files_text(host: str, files: Mapping[str, bytes]) -> str:
    """Print rendered files one after another, each below its path."""
    return "".join(f"==> {host}/{path} <==\n{data.decode()}\n" for path, data in sorted(files.items()))


# --- push and rollback --------------------------------------------------------------------------------------------


def outcome_text(outcome: Outcome) -> str:
    """Say what became of a host: what changed, how long it took, what to know."""
    lines = [f"{outcome.host}: | {service}: {text}" for service, text in outcome.log]
    told = _told_changes(outcome) if outcome.plan_before or outcome.plan_after else ""
    if outcome.result == "unchanged":
        lines.append(f"{outcome.host}: no changes")
    elif outcome.result == "skipped":
        lines.append(f"{outcome.host}: skipped: {outcome.note}; it is as it was")
    elif outcome.result == "would-change":
        lines += _fold(f"{outcome.host}: would go to generation {outcome.generation}{f': {told}' if told else ''}")
        lines += [f"{outcome.host}: would {step}" for step in outcome.would]
    elif outcome.result == "changed":
        if outcome.generation != outcome.previous:
            numbers = f"generation {outcome.generation} (was {outcome.previous})"
            lines += _fold(f"{outcome.host}: {numbers}{f': {told}' if told else ''}")
        lines += _fold_all(f"{outcome.host}: warning: {text}" for text in outcome.warnings)
        lines.append(f"{outcome.host}: {_actions(outcome)}, {outcome.seconds:.1f} s in all")
    return "".join(f"{line}\n" for line in lines)


def _told_changes(outcome: Outcome) -> str:
    from labdeploy.plan import setting_changes  # noqa: PLC0415 (where nothing changed, no planner is needed)

    changes = setting_changes(outcome.plan_before, outcome.plan_after)
    return "; ".join(f"{name} {', '.join(found)}" for name, found in sorted(changes.items()))


def _actions(outcome: Outcome) -> str:
    done = []
    for name, service in outcome.services.items():
        after = f", ready after {service.downtime_s:.1f} s" if service.downtime_s is not None else ""
        if service.first_token_s is not None:
            after += f", first token {service.first_token_s * 1000:.0f} ms"
        if service.action != "unchanged":
            done.append(f"{name} {service.action}{after}")
    return "; ".join(done) or "nothing had to restart"


def dry_run_diff(outcome: Outcome, generation: Generation) -> str:
    """Show what a dry run would change in the units of a host."""
    rendered = {path: data for path, data in generation.files.items() if path in outcome.deployed}
    return _unified(outcome.deployed, rendered, "deployed", "rendered")


def _fold_all(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in _fold(text)]


def _fold(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


# --- probe ------------------------------------------------------------------------------------------------------


def probe_json(probed: Probed | LabdeployError, warnings: Sequence[str]) -> dict[str, Any]:
    """Give what a host said, as `probe --json` reports it: what the lock keeps of it, as it is now."""
    if isinstance(probed, LabdeployError):
        return {"reachable": False, "error": str(probed), "warnings": []}
    from labdeploy.facts import machine as facts  # noqa: PLC0415

    entry, flags = facts.to_lock(probed.machine)
    for build in entry["runners"].values():
        build["flags"] = [word.removesuffix("=") for word in flags.get(build["flags"], "").split()]
    models = {name: {"size_bytes": size, "read": name in probed.headers} for name, size in probed.sizes.items()}
    return {"reachable": True, **entry, "models": models, "warnings": list(warnings)}


def probe_text(answers: Mapping[str, Probed | LabdeployError], warnings: Mapping[str, Sequence[str]]) -> str:
    """Say what hosts have, a paragraph for each."""
    lines: list[str] = []
    for host, probed in answers.items():
        if isinstance(probed, LabdeployError):
            lines.append(f"{host}: unreachable; the lock keeps what it has of it")
            continue
        machine = probed.machine
        systemd = _of(machine.systemd, "", "systemd ")
        lines += _fold(f"{host}: {', '.join(_known(machine.os, machine.kernel, machine.arch, systemd))}")
        lines += [_fact(label, text) for label, text in _facts(machine)]
        lines += [_fact("model", _model_fact(name, size, probed)) for name, size in probed.sizes.items()]
        lines += [_wrapped("warning:", text) for text in warnings[host]]
    return "".join(f"{line}\n" for line in lines)


def _fact(label: str, text: str) -> str:
    return textwrap.fill(f"{label:<6}{text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 10)


def _facts(machine: Machine) -> Iterator[tuple[str, str]]:
    cpu, ram = machine.cpu, machine.ram
    if cpu:
        kinds = f" ({cpu.performance_cores} fast)" if cpu.performance_cores else ""
        nodes = f", {cpu.numa_nodes} NUMA nodes" if cpu.numa_nodes > 1 else ""
        quota = f", limited to the time of {cpu.quota:g}" if cpu.quota else ""
        counts = f"{cpu.cores} cores{kinds}, {cpu.threads} threads{nodes}{quota}"
        yield "cpu", f"{cpu.model or 'of an unknown kind'}: {counts}; {' '.join(cpu.features) or 'no known features'}"
    if ram:
        yield "ram", ", ".join(_known(f"{ram.total_mib} MiB", _of(ram.available_mib, "MiB available")))
    for i, gpu in enumerate(machine.gpus):
        memory = "shares main memory" if gpu.shares_ram else _of(gpu.vram_mib, "MiB") or "size unknown"
        kind = _of(gpu.compute_capability, "", "compute capability ") or gpu.gfx
        free = None if gpu.shares_ram else _of(gpu.free_mib, "MiB free")
        yield f"gpu{i}", f"{gpu.name}: {', '.join(_known(memory, free, kind, _of(gpu.driver, '', 'driver ')))}"
    if machine.disk_read_mib_per_s:
        yield "disk", f"reads {machine.disk_read_mib_per_s} MiB/s"
    for build in machine.runners.values():
        flags = f", {len(build.flags)} flags" if build.flags else ""
        yield "runs", f"{build.shown} at {build.path}{flags}"


def _of(value: object, unit: str, head: str = "") -> str | None:
    return None if value is None else f"{head}{value} {unit}".strip()


def _known(*texts: str | None) -> list[str]:
    return [text for text in texts if text]


def _model_fact(name: str, size: int, probed: Probed) -> str:
    entry = probed.headers.get(name)
    news = "" if entry is None else "; read into the lock" if isinstance(entry, dict) else "; cannot be read"
    return f"{name}: {size / 2**20:.1f} MiB{news}"


# --- looking ------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows below a head, columns as wide as they need, the last one free."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "".join(f"{line}\n" for line in lines)


def state_json(state: HostState | LabdeployError) -> dict[str, Any]:
    """Give a host's state as `status --json` reports it."""
    if isinstance(state, LabdeployError):
        return {"reachable": False, "error": str(state), "services": {}}
    return {
        "reachable": True,
        "generation": state.generation,
        "good": state.good,
        "pending": state.pending,
        "drift": list(state.drift),
        "services": {
            name: {
                "unit": service.unit,
                "active": service.active,
                "sub": service.sub,
                "healthy": service.healthy,
                "restarts": service.restarts,
                "since": service.since,
                "memory_mib": service.memory_mib,
                "planned_mib": _planned_ram(state, name),
                "layers_on_gpu": state.layers.get(name),
                "memory": _memory_json(state, name),
                "metrics": _of_plan(state, name).get("metrics"),
                "span": _of_plan(state, name).get("span"),
            }
            for name, service in state.services.items()
        },
    }


def _of_plan(state: HostState, service: str) -> dict[str, Any]:
    """Give what the deployed generation planned for a service."""
    planned: dict[str, Any] = state.plan.get("services", {}).get(service, {})
    return planned


def _planned(state: HostState, service: str) -> dict[str, dict[str, float]]:
    memory: dict[str, dict[str, float]] = _of_plan(state, service).get("memory", {})
    return memory


def _planned_ram(state: HostState, service: str) -> int | None:
    memory = _planned(state, service).get("host", {})
    return round(sum(memory.values())) if memory else None


def _memory_json(state: HostState, service: str) -> dict[str, Any]:
    """Lay beside each other, by device, what was planned and what the service said it had allocated."""
    real = state.real.get(service, {})
    return {
        device: {"planned": planned, "real": asdict(real[device]) if device in real else None}
        for device, planned in _planned(state, service).items()
    }


def _real_lines(state: HostState, host: str) -> Iterator[str]:
    """Say of each service that was read back what it allocated and what the plan was, device by device."""
    for name, devices in state.real.items():
        planned = _planned(state, name)
        for device, buffers in devices.items():
            parts = asdict(buffers)
            plan = planned.get(device, {})
            told = ", ".join(f"{key[:-4]} {mib:.0f} ({plan.get(key, 0):.0f})" for key, mib in parts.items())
            yield f"{host}: {name}: {device}: {told} MiB real (planned)"


def _metrics_lines(state: HostState, host: str) -> Iterator[str]:
    """Say where Prometheus finds what a service measures itself, and under which names."""
    for name in state.services:
        if metrics := _of_plan(state, name).get("metrics"):
            yield from _fold(f"{host}: {name}: {metrics['url']}: {', '.join(metrics['names'])}")


def _span_lines(states: Mapping[str, HostState | LabdeployError]) -> Iterator[str]:
    """Say of each service that spans hosts where they run different ones: a push of one was confirmed, of one not."""
    ids: dict[str, dict[str, str]] = {}
    for host, state in states.items():
        if isinstance(state, LabdeployError):
            continue
        for name in state.services:
            if span := _of_plan(state, name).get("span"):
                ids.setdefault(f"{name} of {' and '.join(span['hosts'])}", {})[host] = span["id"]
    for span, found in ids.items():
        if len(set(found.values())) > 1:
            yield f"{span} is not the same on all of them; labdeploy push {' '.join(found)} mends it"


def state_text(states: Mapping[str, HostState | LabdeployError]) -> str:
    """Lay out the state of hosts, a row for each service."""
    rows: list[Sequence[object]] = []
    notes = []
    for host, state in states.items():
        if isinstance(state, LabdeployError):
            rows.append((host, "-", "unreachable", "-", "-", "-", "-", "-"))
            continue
        for name, service in state.services.items():
            health = "healthy" if service.healthy else "NOT HEALTHY"
            planned = _planned_ram(state, name)
            memory = f"{service.memory_mib if service.memory_mib is not None else '?'}/{planned or '?'}"
            since = " ".join(service.since.split()[1:3]) if service.active == "active" else "-"
            rows.append((host, state.generation, name, service.active, health, since, service.restarts, memory))
        if not state.services:
            rows.append((host, state.generation, "no services", "-", "-", "-", "-", "-"))
        if state.pending:
            notes.append(f"{host}: a push is not confirmed yet, or was cut off")
        notes += _real_lines(state, host)
        notes += _metrics_lines(state, host)
        notes += [f"{host}: changed by hand: {text}" for text in state.drift]
    notes += _span_lines(states)
    head = ("HOST", "GEN", "SERVICE", "STATE", "HEALTH", "UP SINCE", "RESTARTS", "RAM MIB/PLAN")
    return table(head, rows) + "".join(f"{note}\n" for note in notes)


def history_json(found: History | LabdeployError) -> dict[str, Any]:
    """Give a host's history as `history --json` reports it."""
    if isinstance(found, LabdeployError):
        return {"reachable": False, "error": str(found), "generations": []}
    return {
        "current": found.current,
        "good": found.good,
        "generations": [
            {
                "number": number,
                "push_id": manifest["push_id"],
                "at": manifest["at"],
                "by": manifest["by"],
                "changed": _changed(found, number),
                "state": found.state_of(number),
            }
            for number, manifest in sorted(found.manifests.items())
        ],
        "journal": [
            {
                "event": e.event,
                "push_id": e.push_id,
                "by": e.by,
                "at": e.at,
                "from": e.from_,
                "to": e.to,
                "changed": list(e.changed),
                "result": e.result,
            }
            for e in found.journal
        ],
    }


def _changed(found: History, number: int) -> list[str]:
    """List the services that the push of a generation changed; also where it was undone."""
    if number == 0:
        return []
    first = next((e for e in found.journal if number in (e.from_, e.to) and e.push_id == _push_id(found, number)), None)
    return list(first.changed) if first else []


def _push_id(found: History, number: int) -> str:
    return str(found.manifests.get(number, {}).get("push_id", ""))


def history_text(histories: Mapping[str, History | LabdeployError]) -> str:
    """Lay out the generations of hosts, newest first."""
    rows: list[Sequence[object]] = []
    for host, found in histories.items():
        if isinstance(found, LabdeployError):
            continue
        for item in reversed(history_json(found)["generations"]):
            mark = "*" if item["number"] == found.current else " "
            what = ", ".join(item["changed"]) or "-"
            rows.append((host, f"{mark}{item['number']}", item["push_id"], item["by"], item["state"], what))
        if not found.manifests:
            rows.append((host, " -", "-", "-", "nothing was pushed yet", "-"))
    return table(("HOST", " GEN", "PUSH ID (WHEN, UTC)", "WHO", "STATE", "CHANGED"), rows)


def diffs(generation: Generation, files: Files) -> dict[str, Any]:
    """Compare rendered units with deployed ones, and deployed ones with what is on disk."""
    rendered = {path: data for path, data in generation.files.items() if path.startswith("systemd/")}
    return {
        "generation": files.current,
        "pending": _unified(files.deployed, rendered, "deployed", "rendered"),
        "drift": _unified(files.deployed, files.installed, "deployed", "on disk")
        + "".join(f"{text}\n" for text in files.drift if text.startswith("drop-in ")),
    }


def _unified(old: Mapping[str, bytes], new: Mapping[str, bytes], old_name: str, new_name: str) -> str:
    out: list[str] = []
    for path in sorted({*old, *new}):
        before = old.get(path, b"").decode(errors="replace").splitlines(keepends=True)
        after = new.get(path, b"").decode(errors="replace").splitlines(keepends=True)
        out += difflib.unified_diff(before, after, f"{old_name}/{path}", f"{new_name}/{path}")
    return "".join(out)


def diff_text(found: Mapping[str, dict[str, Any]]) -> str:
    """Print the differences of hosts."""
    out = []
    for host, item in found.items():
        if item["pending"]:
            out.append(f"{host}: a push would change generation {item['generation']}:\n{item['pending']}")
        if item["drift"]:
            out.append(f"{host}: changed by hand since generation {item['generation']}:\n{item['drift']}")
        if not item["pending"] and not item["drift"]:
            out.append(f"{host}: no differences\n")
    return "".join(out)


def check_json(reports: Mapping[str, Report] | LabdeployError) -> dict[str, Any]:
    """Give the check of a host as `check --json` reports it."""
    if isinstance(reports, LabdeployError):
        return {"reachable": False, "error": str(reports), "services": {}}
    return {"services": {name: _check_json(found) for name, found in reports.items()}}


def _check_json(found: Report) -> dict[str, Any]:
    return {
        "healthy": found.healthy,
        "error": found.error,
        "ttft_ms": {"p50": _rounded(found.ttft_p50_ms), "p95": _rounded(found.ttft_p95_ms)},
        "decode_tokens_per_s": _rounded(found.decode_tokens_per_s),
        "baseline_ttft_ms": _rounded(found.baseline_ttft_ms),
        "regressed": bool(found.regressed),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def check_text(answers: Mapping[str, Any]) -> str:
    """Lay out the checks of hosts."""
    rows: list[Sequence[object]] = []
    for host, reports in answers.items():
        if isinstance(reports, LabdeployError):
            rows.append((host, "-", "unreachable", "-", "-", "-", "-"))
            continue
        for name, found in reports.items():
            figures = (found.ttft_p50_ms, found.ttft_p95_ms, found.baseline_ttft_ms, found.decode_tokens_per_s)
            shown = ["-" if figure is None else f"{figure:.1f}" for figure in figures]
            health = ("SLOWER" if found.regressed else "healthy") if found.healthy else "NOT HEALTHY"
            rows.append((host, name, health, *shown))
    return table(("HOST", "SERVICE", "HEALTH", "TTFT MS P50", "P95", "BASELINE", "TOKENS/S"), rows)


def builds_json(answers: Mapping[str, Sequence[Build]], lock: Mapping[str, Any]) -> dict[str, Any]:
    """Give the builds of hosts, each with what it takes and who names it."""
    from labdeploy.builds import known, program  # noqa: PLC0415

    return {
        host: [
            {
                "runner": build.runner,
                "name": build.name,
                "path": program(build.runner, build.name),
                "size_mib": build.size_mib,
                "at": build.at,
                "used": known(lock, host, build.runner)[1] == build.name,
                "generations": [int(word) for word in build.named_by.split() if word.isdigit()],
                "installed": "installed" in build.named_by,
            }
            for build in found
        ]
        for host, found in answers.items()
    }


def builds_text(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Lay out the builds of hosts; `*` marks the chosen ones."""
    if not any(rows.values()):
        return "no builds; labdeploy runner install HOST RUNNER VERSION puts one there\n"
    return table(
        ("HOST", "RUNNER", "BUILD", "MIB", "INSTALLED", "GENERATIONS"),
        [
            (
                host,
                row["runner"],
                row["name"] + (" *" if row["used"] else ""),
                row["size_mib"],
                row["at"],
                " ".join(map(str, row["generations"])) or ("unit" if row["installed"] else "-"),
            )
            for host, found in rows.items()
            for row in found
        ],
    )


# --- pick ---------------------------------------------------------------------------------------------------------


def pick_text(found: Pick) -> str:
    """Say which runner and why, what each runner would cost on each host, and what to write."""
    wish = found.wish
    lines = [f"{wish.model}, for {_PURPOSES[wish.purpose]}: {found.runner}"]
    lines += [line for step in found.why for line in textwrap.wrap(f"- {step}", WIDTH, subsequent_indent="  ")]
    rows = [
        (o.host, o.runner, "yes" if o.fits else "no", _mib(o, "gpu"), _mib(o, "host"), o.context_tokens or "-")
        for o in found.offers
    ]
    lines += ["", table(("HOST", "RUNNER", "FITS", "GPU MIB", "RAM MIB", "CONTEXT EACH"), rows).rstrip(), ""]
    for offer in found.offers:
        changes = [f"then {name} {', '.join(told)}" for name, told in offer.changes.items()]
        for told in [*offer.problems, *changes]:
            lines += textwrap.wrap(f"{offer.host}: {offer.runner}: {told}", WIDTH, subsequent_indent="  ")
    if found.best:
        lines += [f"best: {found.best.host}. To have it there, write and push:", f"  {found.line(found.best)}"]
    return "\n".join(lines) + "\n"


_PURPOSES = {"experiment": "an experiment", "service": "a service", "throughput": "throughput"}


def _mib(offer: Offer, device: str) -> str:
    """Give what an offer takes on GPUs together, or in main memory."""
    parts = [m.total_mib for name, m in offer.plan.memory.items() if name.startswith(device)] if offer.plan else []
    return f"{sum(parts):.0f}" if parts else "-"
