"""The commands `labdeploy push` and `labdeploy rollback`: which hosts, what to each, and how it went."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import click

from labdeploy.cli_base import (
    Options,
    generations_for,
    hosts_argument,
    plans_for,
    print_json,
    reporting,
    tell_all,
    worst_code,
)
from labdeploy.errors import INTERRUPTED, InventoryError, LabdeployError, first_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from labdeploy.deploy import Outcome
    from labdeploy.fleet import History
    from labdeploy.generation import Generation
    from labdeploy.remembered import Push

T = TypeVar("T")

wait_option = click.option(
    "--wait",
    type=click.IntRange(0, 86_400),
    default=0,
    metavar="SECONDS",
    help="Wait so long for a host that another push holds, instead of failing at once.",
)


@click.command()
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
    from labdeploy.dial import dialing  # noqa: PLC0415

    if bool(hosts) == everything:
        raise click.UsageError("name the hosts to push to, or write --all")
    pushes, generations = _pushes(options, hosts)
    if everything and pushes and not dry_run:
        names = ", ".join(each.name for each in pushes)
        options.confirm(f"Push to {_counted(pushes)} ({names})?")
    flags = {"dry-run": dry_run, "overwrite-drift": overwrite_drift, "adopt": adopt}
    with dialing(pushes[: canary or serial or None]):
        from labdeploy import deploy  # noqa: PLC0415

        push_id = deploy.new_push_id()
        jobs = [deploy.push_job(each, generations, push_id) for each in pushes]
        return _run(
            options,
            jobs,
            push_id,
            order=deploy.Order(canary, serial or 0, max_failures),
            flags=[name for name, on in flags.items() if on],
            watch_s=deploy.WATCH_S if watch is None else watch,
            wait_s=wait,
            generations=generations,
        )


@click.command()
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
    unheard: Sequence[LabdeployError] = ()
    if hosts:
        targets = {host.name: "previous" if to is None else str(to) for host in selected}
    else:
        targets, unheard = _last_push(options, ask_each(host.name for host in selected))
    targets, pairs = companions.taken_along(targets, ask_each)
    _tell_companions(targets.keys() - {host.name for host in selected})
    push_id, groups = deploy.new_push_id(), spans.together(targets, pairs)
    jobs = [
        deploy.Job(host, "rollback", targets[name], tuple(host.services), together=groups[name])
        for name, host in options.inventory.hosts.items()
        if name in targets
    ]
    code = _run(options, jobs, push_id, wait_s=wait, flags=["overwrite-drift"] if overwrite_drift else [])
    return max(code, worst_code(unheard))


def _pushes(options: Options, hosts: Sequence[str]) -> tuple[Sequence[Push], Callable[[], Mapping[str, Generation]]]:
    """Give what to push, and a function that gives the files; where nothing has changed since, none are made yet."""
    from labdeploy.remembered import Memory, push_of  # noqa: PLC0415

    memory = Memory(options.path, hosts)
    if remembered := memory.recall():
        return remembered, _once(lambda: generations_for(options, plans_for(options, hosts)))
    from labdeploy import spans  # noqa: PLC0415

    plans = plans_for(options, _with_companions(options, hosts))
    generations = generations_for(options, plans)
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


def _last_push(
    options: Options, answers: Mapping[str, History | LabdeployError]
) -> tuple[dict[str, str], Sequence[LabdeployError]]:
    """Find the hosts that the last push changed, and what each had before; ask before touching them.

    Beside it come the errors of those that did not answer: where the last push was theirs, it is another that goes.
    """
    from labdeploy import fleet  # noqa: PLC0415

    switches = {h: a.last_switch for h, a in answers.items() if isinstance(a, fleet.History) and a.last_switch}
    errors = [a for a in answers.values() if isinstance(a, LabdeployError)]
    if errors and not switches:
        raise errors[0]
    tell_all([f"{error}; it is left as it is" for error in errors], first_hint(errors))
    if not switches:
        raise InventoryError("no host has a push to undo", hint="labdeploy history")
    last = max(switch.push_id for switch in switches.values() if switch)
    found = {h: str(s.from_) for h, s in switches.items() if s and s.push_id == last}
    went = ", ".join(f"{h} {s.to} -> {s.from_}" for h, s in switches.items() if s and h in found)
    unknown = f"; {_counted(errors)} did not answer, and may have had a later push" if errors else ""
    options.confirm(f"Undo {last} on {_counted(found)} ({went}){unknown}?")
    return found, errors


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


def _counted(hosts: Collection[object]) -> str:
    return f"{len(hosts)} host{'' if len(hosts) == 1 else 's'}"
