"""The commands `labdeploy models ...`: reads arguments, calls the core, prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labdeploy.cli_base import (
    Options,
    ask,
    common,
    errors_of,
    hosts_argument,
    print_json,
    reporting,
    tell_all,
    worst_code,
)
from labdeploy.errors import CheckError, HostError, InventoryError, LabdeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from labdeploy.host import HostConnection, Line
    from labdeploy.inventory import Host
    from labdeploy.model_copy import Copied, Item
    from labdeploy.progress import CopyProgress


@click.group()
@common
def models() -> None:
    """Keep models on hosts: what is where, by sha256; copy, check, rename, remove.

    A MODEL is named by its path below models_dir: a file, the first part of a split GGUF, or a snapshot folder.
    """


def _folder(host: Host) -> str:
    return (host.models_dir or "").rstrip("/")


def _heard(host: str, progress: CopyProgress) -> Callable[[Line], None]:
    """Show how far a host is with reading a file."""

    def heard(line: Line) -> None:
        if line.kind == "reading" and line.field(1):
            progress.at(f"{host}: reading {line.field(0)}", int(line.field(1)), 0)

    return heard


def _ask_stores(options: Options, hosts: Sequence[str], *, sums: bool) -> tuple[dict[str, Any], int]:
    from labdeploy import model_files  # noqa: PLC0415
    from labdeploy.progress import CopyProgress  # noqa: PLC0415

    inventory = options.inventory
    with CopyProgress(quiet=options.json) as progress:

        def question(connection: HostConnection) -> model_files.Store:
            folder, heard = _folder(inventory.host(connection.name)), _heard(connection.name, progress)
            return model_files.store(connection, folder, sums=sums, on_line=heard)

        return ask(options, hosts, question)


@models.command("ls")
@hosts_argument
@click.option("--no-sums", is_flag=True, help="Read no file whose sum is not known yet.")
@reporting
def models_ls(options: Options, hosts: tuple[str, ...], no_sums: bool) -> int:
    """List the models on hosts: size, sha256, who uses them.

    A file is read once for its sum, then only again after it was written to.
    """
    from labdeploy import report_models  # noqa: PLC0415

    answers, code = _ask_stores(options, hosts, sums=not no_sums)
    paths = {name: model.path for name, model in options.inventory.models.items()}
    wanted = {host: report_models.wanted(options.inventory.host(host), paths) for host in answers}
    if options.json:
        print_json({"hosts": {h: report_models.store_json(a, wanted[h]) for h, a in answers.items()}})
    else:
        click.echo(report_models.stores_text(answers, wanted), nl=False)
    return code


@models.command("push")
@click.argument("hosts", metavar="HOST")
@click.argument("source", metavar="FILE|DIR|HOST:MODEL|MODEL")
@click.option(
    "--as",
    "name",
    default=None,
    metavar="PATH",
    help="Its place below models_dir, or a folder there: DIR/. Default: its own name.",
)
@reporting
def models_push(options: Options, hosts: str, source: str, name: str | None) -> None:
    """Copy a model to a host (or a group of them, one after another); what was cut off goes on where it stopped.

    From here: a GGUF file (one part stands for all), or a snapshot folder. From another host: HOST:MODEL. MODEL alone
    is one of the inventory that has a local copy. What is there already is not sent; what is in use is not replaced.
    """
    from labdeploy import model_copy  # noqa: PLC0415

    items = model_copy.find(options.inventory, source, name)
    _copy_all(options, {host.name: [items] for host in options.inventory.select([hosts])})


def _copy_all(options: Options, wanted: Mapping[str, Sequence[Sequence[Item]]]) -> None:
    """Copy models to hosts one after another, and report each as it ends."""
    from labdeploy import report_models  # noqa: PLC0415

    done: dict[str, list[Copied]] = {}
    for host, models in wanted.items():
        for items in models:
            copied = _copy(options, host, items)
            done.setdefault(host, []).append(copied)
            click.echo(report_models.copied_text(host, copied), nl=False, err=options.json)
    if options.json:
        print_json({"hosts": {host: report_models.copied_json(copies) for host, copies in done.items()}})


def _copy(options: Options, host: str, items: Sequence[Item]) -> Copied:
    from labdeploy.model_copy import Copy  # noqa: PLC0415
    from labdeploy.progress import CopyProgress  # noqa: PLC0415

    with CopyProgress(quiet=options.json) as progress:
        return Copy(
            options.inventory,
            options.inventory.host(host),
            items,
            may_replace=options.confirm,
            at=lambda what, done, total: progress.at(f"{host}: {what}", done, total),
            say=lambda text: progress.say(f"{host}: {text}"),
        ).run()


@models.command("verify")
@hosts_argument
@click.option("--model", "names", multiple=True, metavar="MODEL", help="Only this one. May be repeated.")
@click.option("--accept", is_flag=True, help="What is there now is right; later checks compare with it.")
@reporting
def models_verify(options: Options, hosts: tuple[str, ...], names: tuple[str, ...], accept: bool) -> int:
    """Read models from the disk, every byte, and compare them with what they were when they came."""
    from labdeploy import model_files, report_models  # noqa: PLC0415
    from labdeploy.progress import CopyProgress  # noqa: PLC0415

    inventory = options.inventory
    if accept:
        which = ", ".join(names) or "all models"
        options.confirm(f"Take {which} on {', '.join(h.name for h in inventory.select(hosts))} as right?")
    with CopyProgress(quiet=options.json) as progress:

        def question(connection: HostConnection) -> list[model_files.Verified]:
            folder, heard = _folder(inventory.host(connection.name)), _heard(connection.name, progress)
            store = model_files.store(connection, folder, sums=False)
            chosen = [store.model(name, connection.name) for name in names] or list(store.models)
            files = [file.name for model in chosen for file in model.files]
            return model_files.verify(connection, folder, files, accept=accept, on_line=heard)

        answers, code = ask(options, hosts, question)
    if options.json:
        print_json({"hosts": {h: report_models.verified_json(a) for h, a in answers.items()}})
    elif any(isinstance(answer, list) for answer in answers.values()):
        click.echo(report_models.verified_text(answers), nl=False)
    bad = [(h, f) for h, a in answers.items() if isinstance(a, list) for f in a if f.result not in ("ok", "recorded")]
    tell_all(
        [f"{host}: {file.problem}" for host, file in bad], f"labdeploy models push {bad[0][0]} FILE" if bad else ""
    )
    return max(code, CheckError.exit_code if bad else 0)


@models.command("mv")
@click.argument("host")
@click.argument("model")
@click.argument("new", metavar="NEW-NAME")
@reporting
def models_mv(options: Options, host: str, model: str, new: str) -> None:
    """Rename a model on a host; refused while a kept generation, a unit or a process uses it."""
    from labdeploy import model_files  # noqa: PLC0415
    from labdeploy.host import HostConnection  # noqa: PLC0415
    from labdeploy.models.files import require_plain  # noqa: PLC0415

    target = options.inventory.host(host)
    new = require_plain(new.rstrip("/"))
    with HostConnection(target, options.inventory.folder) as connection:
        found = model_files.store(connection, _folder(target), sums=False).model(model, host)
        model_files.move(connection, _folder(target), found, new)
    if options.json:
        print_json({"host": host, "model": found.name, "new_name": new})
    else:
        click.echo(f"{host}: {found.name} is {new} now")


@models.command("rm")
@click.argument("host")
@click.argument("names", metavar="MODEL...", nargs=-1, required=True)
@reporting
def models_rm(options: Options, host: str, names: tuple[str, ...]) -> None:
    """Remove models from a host, or what is left of copies that were cut off.

    Refused while a kept generation, a unit or a process uses one of them.
    """
    from labdeploy import model_files, report_models  # noqa: PLC0415
    from labdeploy.host import HostConnection  # noqa: PLC0415

    target = options.inventory.host(host)
    with HostConnection(target, options.inventory.folder) as connection:
        store = model_files.store(connection, _folder(target), sums=False)
        found = [store.removable(name, host) for name in names]
        _refuse_used(host, found)
        told = ", ".join(f"{model.name} ({report_models.size_text(model.size_bytes)})" for model in found)
        options.confirm(f"Remove {told} from {host}?")
        model_files.remove(connection, _folder(target), found)
    if options.json:
        print_json({"host": host, "removed": [model.name for model in found]})
    else:
        click.echo(f"{host}: {told} {'are' if len(found) > 1 else 'is'} gone")


def _refuse_used(host: str, found: Sequence[Any]) -> None:
    """Say before anything is asked what would be refused; the host asks again when it has its lock."""
    what = [f"{host}: {model.name} is in use by {', '.join(model.users)}" for model in found if model.users]
    if what:
        hint = f"labdeploy history {host}  # it can go when no kept generation names it"
        raise InventoryError("\n".join(what), hint=hint)


@models.command("backup")
@hosts_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="File to write; default: stdout.")
@reporting
def models_backup(options: Options, hosts: tuple[str, ...], output: Path | None) -> int:
    """Write a manifest of the models on hosts: names, sizes, sha256, where from. It holds no weights.

    `models restore` puts on the hosts what it lists.
    """
    import datetime as dt  # noqa: PLC0415

    from labdeploy import lock  # noqa: PLC0415
    from labdeploy.models.files import manifest  # noqa: PLC0415

    answers, code = _ask_stores(options, hosts, sums=True)
    stores = {h: (a.folder, a.models) for h, a in answers.items() if not isinstance(a, LabdeployError)}
    found = manifest(stores, dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    if output is None:
        print_json(found)
        return code
    if code and output.exists():
        hint = "labdeploy models backup -o OTHER-FILE  # of those that answer"
        raise HostError("is left as it was, for not every host answered", where=str(output), hint=hint)
    lock.replace(output, json.dumps(found, indent=2) + "\n")
    if options.json:
        print_json({"manifest": str(output), "hosts": {host: len(models) for host, (_, models) in stores.items()}})
    else:
        counts = ", ".join(f"{host} {len(models)}" for host, (_, models) in stores.items())
        click.echo(f"{output}: models by host: {counts or 'none'}")
    return code


@models.command("restore")
@click.argument("manifest", type=click.Path(path_type=Path))
@hosts_argument
@click.option(
    "--from", "folders", multiple=True, type=click.Path(path_type=Path), metavar="DIR", help="More files here to take."
)
@reporting
def models_restore(options: Options, manifest: Path, hosts: tuple[str, ...], folders: tuple[Path, ...]) -> int:
    """Put on hosts what a manifest lists and they lack, from whoever has a file of the right sha256.

    Asked in turn: local copies of the inventory, folders given by --from, then every host of the inventory.
    """
    from labdeploy import model_restore  # noqa: PLC0415

    wanted = model_restore.wanted(options.inventory, manifest, hosts)
    stores, _ = _ask_stores(options, (), sums=True)
    unheard = {host: error for host, error in errors_of(stores).items() if host in wanted}
    heard = {host: models for host, models in wanted.items() if host not in unheard}
    todo = model_restore.items(options.inventory, heard, stores, folders)
    _copy_all(options, todo)
    if not todo and not unheard and not options.json:
        click.echo("nothing is missing")
    return worst_code(unheard.values())
