"""The command `labdeploy`: runs the CLI and turns every failure into a message and an exit code."""

from __future__ import annotations

import contextvars
import gc
import shlex
import sys

import click

from labdeploy.cli import cli
from labdeploy.cli_base import tell_all
from labdeploy.errors import INTERRUPTED, InventoryError, LabdeployError


def main() -> None:
    """Run labdeploy and exit with its code."""
    code = run(sys.argv[1:])
    gc.freeze()  # else the interpreter looks through all modules for garbage on its way out: 40 of the 240 ms of a push
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line and give its exit code; whatever goes wrong is told on stderr, never as a traceback."""
    return contextvars.copy_context().run(_run, argv)


def _run(argv: list[str]) -> int:
    try:
        result = cli.main(argv, prog_name="labdeploy", standalone_mode=False)
    except LabdeployError as error:
        tell(error)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        only_help = isinstance(error, click.exceptions.NoArgsIsHelpError)
        print(("" if only_help else "error: ") + error.format_message(), file=sys.stderr)  # noqa: T201
        if isinstance(error, click.UsageError) and error.ctx and not only_help:
            print(f"\nhint: {error.ctx.command_path} --help", file=sys.stderr)  # noqa: T201
        return 2
    except (KeyboardInterrupt, click.Abort):
        tell_all(["interrupted"])
        return INTERRUPTED
    except Exception as error:
        if "-v" in argv or "--verbose" in argv:
            raise
        told = _told(error)
        tell(told)
        return told.exit_code
    return result if isinstance(result, int) else 0


def _told(error: Exception) -> LabdeployError:
    """Give what a person is told of a failure that no command foresaw: a file's own trouble, else a bug."""
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        return InventoryError(error.strerror or str(error), where=name, hint=f"ls -ld {shlex.quote(name)}")
    hint = "run it again with -v and report what it prints"
    return LabdeployError(f"unexpected: {type(error).__name__}: {error}", hint=hint)


def tell(error: LabdeployError) -> None:
    """Print an error: each of its lines, then what to type next."""
    tell_all([str(error)], error.hint)


if __name__ == "__main__":
    main()
