"""What commands share: global options, plans, questions to people and hosts, how reports and errors are printed."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from labdeploy.errors import DeclinedError, InventoryError, LabdeployError, all_of, first_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from labdeploy.generation import Generation
    from labdeploy.inventory import Host, Inventory
    from labdeploy.models.book import ModelBook
    from labdeploy.plan import HostPlan

F = TypeVar("F", bound="Callable[..., Any]")
_given_inventory: ContextVar[Path | None] = ContextVar("given_inventory", default=None)
_reported: ContextVar[bool] = ContextVar("reported", default=False)


class Options:
    """The global options, wherever on the command line they stood."""

    inventory_path: Path | None = None
    json: bool = False
    yes: bool = False
    verbose: bool = False

    @functools.cached_property
    def path(self) -> Path:
        """Where the inventory is."""
        from labdeploy import place  # noqa: PLC0415

        return place.find(self.inventory_path)

    @functools.cached_property
    def inventory(self) -> Inventory:
        """The inventory, read once."""
        from labdeploy import inventory  # noqa: PLC0415

        return inventory.load(self.path)

    def confirm(self, question: str) -> None:
        """Ask on a terminal; without one, -y must have been given."""
        if self.yes:
            return
        if not sys.stdin.isatty():
            raise InventoryError(f"{question} There is no terminal to ask on", hint="add -y to go ahead")
        if not click.confirm(question, err=True):
            raise DeclinedError("nothing was done")


def tell_all(whats: Iterable[str], hint: str = "") -> None:
    """Print errors on stderr, each of their lines, then what to type next."""
    for line in (line for what in whats for line in what.splitlines()):
        click.echo(f"error: {line}", err=True)
    if hint:
        click.echo(f"\nhint: {_with_inventory(hint)}", err=True)


def _with_inventory(hint: str) -> str:
    """Give a hint's command the inventory that this one was given, so that it works as it stands."""
    path = _given_inventory.get()
    if path is None or not hint.startswith("labdeploy ") or " -i " in hint:
        return hint
    return hint.replace("labdeploy ", f"labdeploy -i {shlex.quote(str(path))} ", 1)


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, _param: click.Parameter, value: Any) -> None:  # noqa: ANN401
        options = ctx.ensure_object(Options)
        if not value:
            return
        setattr(options, name, value)
        if name == "inventory_path":
            _given_inventory.set(value)

    return callback


def common(command: F) -> F:
    """Give a command the global options, so that they may stand before or after its name."""
    flags = [
        click.option(
            "-i",
            "--inventory",
            type=click.Path(path_type=Path),
            help="The inventory; else $LABDEPLOY_INVENTORY, else the nearest inventory.yaml upwards.",
            expose_value=False,
            callback=_set("inventory_path"),
        ),
        click.option("--json", is_flag=True, help="Report as JSON.", expose_value=False, callback=_set("json")),
        click.option("-y", "--yes", is_flag=True, help="Do not ask.", expose_value=False, callback=_set("yes")),
        click.option("-v", "--verbose", is_flag=True, help="Say more.", expose_value=False, callback=_set("verbose")),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the global options and pass them as its first argument."""
    return common(click.make_pass_decorator(Options, ensure=True)(command))


hosts_argument = click.argument("hosts", metavar="[HOST]...", nargs=-1)


def ask(options: Options, hosts: Sequence[str], question: Any) -> tuple[dict[str, Any], int]:  # noqa: ANN401
    """Ask hosts and split answers from errors; errors are told on stderr at once."""
    from labdeploy import fleet  # noqa: PLC0415

    answers = fleet.ask_all(options.inventory.select(hosts), options.inventory.folder, question)
    errors = errors_of(answers).values()
    tell_all(map(str, errors), first_hint(errors))
    return answers, worst_code(errors)


def errors_of(answers: Mapping[str, Any]) -> dict[str, LabdeployError]:
    """Give the hosts that did not answer, each with its error."""
    return {h: a for h, a in answers.items() if isinstance(a, LabdeployError)}


def worst_code(errors: Iterable[LabdeployError]) -> int:
    """Give the exit code of several errors, the largest; 0 where there are none."""
    return max((error.exit_code for error in errors), default=0)


def unanswered(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Give the part of a JSON report for the hosts that did not answer."""
    return {h: {"error": str(error), "hint": error.hint} for h, error in errors_of(answers).items()}


def print_json(document: Any) -> None:  # noqa: ANN401
    """Print a report as the one JSON document of stdout."""
    _reported.set(True)
    click.echo(json.dumps(document, indent=2))


def has_reported() -> bool:
    """Say whether the one JSON document is printed."""
    return _reported.get()


def plans_for(options: Options, hosts: Sequence[str]) -> list[HostPlan]:
    """Plan hosts of the inventory."""
    return plans_of(options.inventory, hosts)


def plans_of(inventory: Inventory, hosts: Sequence[str]) -> list[HostPlan]:
    """Plan hosts of an inventory; of the others only what these need."""
    from labdeploy import builds, lock, plan  # noqa: PLC0415
    from labdeploy.models.book import ModelBook  # noqa: PLC0415

    known = lock.read(inventory.lock_path)
    book, selected = ModelBook(inventory, known), inventory.select(hosts)
    needed = inventory.with_companions(selected)
    all_of(_what_must_be_known(needed, book))
    plans = plan.plan_hosts((builds.with_programs(host, known) for host in needed), book)
    wanted = {host.name for host in selected}
    return [p for p in plans if p.host.name in wanted]


def _what_must_be_known(hosts: Sequence[Host], book: ModelBook) -> Iterator[Callable[[], object]]:
    """Give what asks whether the inventory or the lock know the hosts and their models."""
    from labdeploy import machines  # noqa: PLC0415

    models = {
        name: host.models_dir or "" for host in hosts for s in host.services.values() for name in s.models.values()
    }
    yield functools.partial(machines.require_known, hosts, book)
    yield from (functools.partial(book.facts, name, folder) for name, folder in models.items())


def generations_for(options: Options, plans: Sequence[HostPlan]) -> dict[str, Generation]:
    """Render plans; FitError where one of them does not fit."""
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
