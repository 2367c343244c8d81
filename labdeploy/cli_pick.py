"""The command `labdeploy pick`: asks what is not given, and prints the answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import click

from labdeploy.cli_base import Options, hosts_argument, print_json, reporting
from labdeploy.errors import FitError, InventoryError

if TYPE_CHECKING:
    from labdeploy.inventory import Purpose
    from labdeploy.pick import Wish

PURPOSES = ("experiment", "service", "throughput")


@click.command()
@hosts_argument
@click.option("--model", default=None, metavar="MODEL", help="A name under models of the inventory.")
@click.option("--for", "purpose", type=click.Choice(PURPOSES), default=None, help="What it is for.  [default: service]")
@click.option("--at-once", type=click.IntRange(1, 256), default=None, help="Requests at the same time.  [default: 1]")
@click.option("--gpu/--no-gpu", default=None, help="On GPUs alone, or on none.  [default: where there are some]")
@reporting
def pick(
    options: Options,
    hosts: tuple[str, ...],
    model: str | None,
    purpose: str | None,
    at_once: int | None,
    gpu: bool | None,
) -> None:
    """Say which runner a model should have, why, and what it costs in memory on each host.

    Plans it as one more service beside those of the inventory; writes nothing. What is not given is asked on a
    terminal; without one the defaults hold.
    """
    from labdeploy import lock, machines, pick, report  # noqa: PLC0415
    from labdeploy.models.book import ModelBook  # noqa: PLC0415

    inventory = options.inventory
    wish = _wish(options, model, purpose, at_once, gpu)
    known, selected = lock.read(inventory.lock_path), inventory.select(hosts)
    machines.require_known(selected, ModelBook(inventory, known))
    found = pick.pick(inventory, known, selected, wish)
    if options.json:
        print_json(pick.to_json(found))
    else:
        click.echo(report.pick_text(found), nl=False)
    if not found.best:
        hint = f"labdeploy plan --what-if  # tries other settings; or another model: {', '.join(inventory.models)}"
        raise FitError(f"{wish.model} does not fit with {found.runner} on any of {len(selected)} hosts", hint=hint)


def _wish(options: Options, model: str | None, purpose: str | None, at_once: int | None, gpu: bool | None) -> Wish:
    """Fill in what was not given: by questions on a terminal, else by defaults."""
    from labdeploy.pick import Wish  # noqa: PLC0415

    asks = sys.stdin.isatty() and not options.yes and not options.json
    names = tuple(options.inventory.models)
    if model is None and len(names) == 1:
        model = names[0]
    elif model is None and asks:
        model = click.prompt("Which model?", type=click.Choice(names), err=True)
    elif model is None:
        raise InventoryError("which model is not said", hint=f"labdeploy pick --model NAME, one of: {', '.join(names)}")
    if purpose is None:
        choice = click.Choice(PURPOSES)
        purpose = click.prompt("What is it for?", type=choice, default="service", err=True) if asks else "service"
    if at_once is None:
        at_once = click.prompt("How many requests at once?", type=int, default=1, err=True) if asks else 1
    if gpu is None and asks and purpose != "experiment":
        answer = click.prompt("On a GPU?", type=click.Choice(("yes", "no", "either")), default="either", err=True)
        gpu = {"yes": True, "no": False}.get(answer)
    return Wish(model, cast("Purpose", purpose), at_once, gpu)
