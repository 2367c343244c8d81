"""The commands `labdeploy sandbox ...`: throwaway hosts to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labdeploy.cli_base import Options, common, print_json, reporting

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.group()
@common
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
