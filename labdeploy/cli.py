"""The command line: reads arguments, calls the core, prints. Heavy imports wait inside the commands that need them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labdeploy import __version__
from labdeploy.cli_base import (
    Options,
    ask,
    common,
    generations_for,
    hosts_argument,
    plans_for,
    plans_of,
    print_json,
    reporting,
    tell_all,
    unanswered,
    worst_code,
)
from labdeploy.cli_models import models
from labdeploy.cli_pick import pick
from labdeploy.cli_push import push, rollback
from labdeploy.cli_runner import runner
from labdeploy.cli_sandbox import sandbox
from labdeploy.errors import CheckError, InventoryError, first_hint

if TYPE_CHECKING:
    from labdeploy.generation import Generation


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="labdeploy")
@common
def cli() -> None:
    """Deploy tuned llama-server, Ollama and vLLM services to your own machines, with a way back.

    HOST takes host names, group names and globs; without one, most commands mean every host.
    """
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


for command in (push, rollback, runner, models, pick, sandbox):
    cli.add_command(command)


# --- plan and render ----------------------------------------------------------------------------------------------


@cli.command("plan")
@hosts_argument
@click.option(
    "--what-if",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Plan as if this stood in the inventory; write nothing. KEY may be SERVICE.key or HOST.SERVICE.key.",
)
@reporting
def plan_command(options: Options, hosts: tuple[str, ...], changes: tuple[str, ...]) -> None:
    """Show what fits: memory by device, and every setting with its reason."""
    from labdeploy import plan, report, what_if  # noqa: PLC0415

    now = plans_for(options, hosts)
    plans = plans_of(what_if.load(options.inventory, now, changes), hosts) if changes else now
    if options.json:
        warnings = {p.host.name: list(p.warnings) for p in plans if p.warnings}
        compared = {p.host.name: plan.changes(old, p) for old, p in zip(now, plans, strict=True)}
        asked = {"what_if": {"set": list(changes), "changes": compared}} if changes else {}
        print_json({"hosts": {p.host.name: plan.to_json(p) for p in plans}, "warnings": warnings} | asked)
    else:
        for old, p in zip(now, plans, strict=True):
            click.echo(report.plan_text(p), nl=False)
            click.echo(report.changes_text(plan.changes(old, p), p) if changes else "", nl=False)
    plan.require_fit(plans)


@cli.command()
@hosts_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("rendered"), help="Folder to write to.")
@click.option("--stdout", is_flag=True, help="Print instead of writing.")
@reporting
def render(options: Options, hosts: tuple[str, ...], output: Path, stdout: bool) -> None:
    """Write every file of every host to a folder; touches no host.

    The files are byte for byte what push installs.
    """
    from labdeploy import report  # noqa: PLC0415

    generations = generations_for(options, plans_for(options, hosts))
    if stdout and options.json:
        print_json({"hosts": {h: {p: d.decode() for p, d in g.files.items()} for h, g in generations.items()}})
        return
    if stdout:
        for host, generation in generations.items():
            click.echo(report.files_text(host, generation.files), nl=False)
        return
    for host, generation in generations.items():
        _write_tree(output / host, generation)
    if options.json:
        print_json({"output": str(output), "hosts": {h: sorted(g.files) for h, g in generations.items()}})
        return
    for host, generation in generations.items():
        click.echo(f"{host}: {len(generation.files)} files in {output / host}")


def _write_tree(folder: Path, generation: Generation) -> None:
    """Make a host's folder hold just this generation; only folders that render itself makes are cleaned."""
    for kind in ("systemd", "services", "stores"):
        for old in (folder / kind).rglob("*"):
            if not old.is_dir() and str(old.relative_to(folder)) not in generation.files:
                old.unlink()
    for path, data in generation.files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


# --- looking ------------------------------------------------------------------------------------------------------


@cli.command()
@hosts_argument
@reporting
def status(options: Options, hosts: tuple[str, ...]) -> int:
    """Show units, health, generation, uptime and memory used against planned."""
    from labdeploy import fleet, report  # noqa: PLC0415

    answers, code = ask(options, hosts, fleet.state)
    if options.json:
        print_json({"hosts": {h: report.state_json(a) for h, a in answers.items()}})
    else:
        click.echo(report.state_text(answers), nl=False)
    return code


@cli.command()
@hosts_argument
@reporting
def history(options: Options, hosts: tuple[str, ...]) -> int:
    """Show generations: number, push id, when, who, what changed, which is current."""
    from labdeploy import fleet, report  # noqa: PLC0415

    answers, code = ask(options, hosts, fleet.history)
    if options.json:
        print_json({"hosts": {h: report.history_json(a) for h, a in answers.items()}})
    else:
        click.echo(report.history_text(answers), nl=False)
    return code


@cli.command()
@hosts_argument
@click.option("--exit-code", is_flag=True, help="Exit with 1 where there are differences, as git does.")
@reporting
def diff(options: Options, hosts: tuple[str, ...], exit_code: bool) -> int:
    """Show rendered against deployed, and deployed against what is really on disk (drift)."""
    from labdeploy import fleet, report  # noqa: PLC0415

    generations = generations_for(options, plans_for(options, hosts))
    answers, code = ask(options, hosts, fleet.files)
    diffs = {h: report.diffs(generations[h], a) for h, a in answers.items() if isinstance(a, fleet.Files)}
    if options.json:
        print_json({"hosts": diffs | unanswered(answers)})
    else:
        click.echo(report.diff_text(diffs), nl=False)
    differs = any(found["pending"] or found["drift"] for found in diffs.values())
    return code or int(exit_code and differs)


@cli.command()
@hosts_argument
@click.option("--samples", type=click.IntRange(1, 1000), default=5, show_default=True, help="Completions to time.")
@click.option("--set-baseline", is_flag=True, help="Compare later checks with this one.")
@reporting
def check(options: Options, hosts: tuple[str, ...], samples: int, set_baseline: bool) -> int:
    """Ask every service for a few tokens: alive, ready, time to first token at this machine.

    The first check of a service with its model is its baseline; one that got twice as slow since then fails.
    """
    from labdeploy import check, report  # noqa: PLC0415

    inventory = options.inventory

    def question(connection: Any) -> dict[str, Any]:  # noqa: ANN401
        services = inventory.host(connection.name).services
        return {n: check.check_service(connection, s, samples=samples) for n, s in services.items() if s.answers}

    answers, code = ask(options, hosts, question)
    answers = check.against_baselines(answers, inventory, anew=set_baseline)
    if options.json:
        print_json({"hosts": {h: report.check_json(a) for h, a in answers.items()}})
    else:
        click.echo(report.check_text(answers), nl=False)
    found = [(h, n, r) for h, a in answers.items() if isinstance(a, dict) for n, r in a.items()]
    ill = [(host, name) for host, name, result in found if not result.healthy]
    slow = [host for host, _, result in found if result.regressed]
    told = [f"{host}: {name}: {r.error or f'got slower: {r.regressed}'}" for host, name, r in found if r.failed]
    hint = f"labdeploy logs {ill[0][0]} {ill[0][1]} -n 50" if ill else ""
    accept = f"labdeploy check {slow[0]} --set-baseline  # if it shall be so from now on" if slow else ""
    tell_all(told, hint or accept)
    return max(code, CheckError.exit_code if told else 0)


@cli.command()
@click.argument("host")
@click.argument("service")
@click.option("-f", "--follow", is_flag=True, help="Go on as new lines come.")
@click.option("-n", "--lines", type=click.IntRange(0), default=100, show_default=True, help="Lines to begin with.")
@reporting
def logs(options: Options, host: str, service: str, follow: bool, lines: int) -> None:
    """Show the journal of a service."""
    from labdeploy import journal  # noqa: PLC0415
    from labdeploy.host import HostConnection  # noqa: PLC0415
    from labdeploy.schema import did_you_mean  # noqa: PLC0415

    target = options.inventory.host(host)
    if service not in target.services:
        near = did_you_mean(service, target.services)
        what, hint = f"{host} has no service {service!r}{near}", f"labdeploy plan {host}  # names its services"
        raise InventoryError(what, where=str(options.inventory.path), hint=hint)
    if follow and options.json:
        raise InventoryError("--json is one document, and --follow has no end", hint=f"labdeploy logs {host} {service}")
    unit = target.services[service].unit or ""
    with HostConnection(target, options.inventory.folder) as connection:
        found = connection.stream(journal.command(unit, lines, follow=follow, as_json=options.json))
        if options.json:
            entries = [journal.entry(line) for line in found]
            print_json({"hosts": {host: {"services": {service: {"unit": unit, "lines": entries}}}}})
            return
        for line in found:
            click.echo(line)


# --- facts, models, schema -------------------------------------------------------------------------------------------


@cli.command()
@hosts_argument
@reporting
def probe(options: Options, hosts: tuple[str, ...]) -> int:
    """Ask hosts what they have: hardware, runner builds, model headers; into the lock.

    Changes nothing on them. The lock keeps what it has of hosts that were not asked or did not answer.
    """
    from labdeploy import lock, probe, report  # noqa: PLC0415

    inventory = options.inventory
    selected, before = inventory.select(hosts), lock.read(inventory.lock_path)
    answers = probe.probe(inventory, selected, before)
    after = probe.updated(before, answers)
    if after != before:
        lock.write(inventory.lock_path, after)
    warnings = {host.name: probe.warnings(inventory, host, answers[host.name], after) for host in selected}
    if options.json:
        found = {h: report.probe_json(a, warnings[h]) for h, a in answers.items()}
        print_json({"lock": str(inventory.lock_path), "hosts": found})
    else:
        click.echo(report.probe_text(answers, warnings), nl=False)
    errors = [error for host in selected for error in probe.errors(answers[host.name])]
    tell_all(map(str, errors), first_hint(errors))
    return worst_code(errors)


@cli.command()
@click.argument("source", metavar="FILE|DIR|URL|HOST:PATH")
@click.option("--add", "name", default=None, help="Put its shape into the lock under this model name.")
@reporting
def inspect(options: Options, source: str, name: str | None) -> None:
    """Show a model's shape and what it costs at several contexts.

    Only headers are read: of a GGUF file or a Hugging Face snapshot folder, here or on a host, or of a GGUF file
    behind an http(s) URL. One part of a split model stands for all of them.
    """
    from labdeploy import inspection, lock, sources  # noqa: PLC0415

    is_remote = ":" in source and not Path(source).exists() and not sources.is_url(source)
    needs_inventory = name is not None or is_remote
    found = inspection.inspect(source, options.inventory if needs_inventory else None)
    if name is not None:
        if name not in options.inventory.models:
            raise InventoryError(
                f"{name!r} is not under models in {options.inventory.path}",
                hint=f"add  {name}: {{path: {sources.file_name(source)}}}  below models:",
            )
        lock.add_model(options.inventory.lock_path, name, found.lock_entry)
    if options.json:
        print_json(found.json)
    else:
        click.echo(found.text, nl=False)
        if name is not None:
            click.echo(f"added to {options.inventory.lock_path} as {name}")


@cli.command()
@common
def schema() -> None:
    """Print the JSON Schema of inventory.yaml, for editors."""
    from labdeploy import inventory  # noqa: PLC0415

    print_json(inventory.json_schema())


@cli.command()
@reporting
def demo(_options: Options) -> int:
    """Show the whole story on a sandbox: push, ask, change, break, watch it come back, roll back."""
    from labdeploy.demo import run  # noqa: PLC0415

    return run()
