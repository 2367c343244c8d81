"""The command `labdeploy`: runs the CLI and turns every failure into a message and an exit code."""

from __future__ import annotations

import contextvars
import gc
import shlex
import sys

import click

from labdeploy.cli import cli
from labdeploy.cli_base import has_reported, print_json, tell_all
from labdeploy.errors import DeclinedError, InventoryError, LabdeployError


def main() -> None:
    """Run labdeploy and exit with its code."""
    code = run(sys.argv[1:])
    gc.freeze()  # else the interpreter looks through all modules for garbage on its way out: 40 of the 240 ms of a push
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line and give its exit code; whatever goes wrong is told on stderr, never as a traceback."""
    return contextvars.copy_context().run(_run, argv)


def _run(argv: list[str]) -> int:
    failure: LabdeployError
    try:
        result = cli.main(argv, prog_name="labdeploy", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return InventoryError.exit_code
    except LabdeployError as error:
        failure = error
    except click.ClickException as error:
        hint = f"{error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        failure = InventoryError(error.format_message(), hint=hint)
    except (KeyboardInterrupt, click.Abort):
        failure = DeclinedError("interrupted")
    except Exception as error:
        if "-v" in argv or "--verbose" in argv:
            raise
        failure = _told(error)
    else:
        return result if isinstance(result, int) else 0
    tell(failure, as_json="--json" in argv)
    return failure.exit_code


def tell(error: LabdeployError, *, as_json: bool = False) -> None:
    """Print an error: each of its lines, then what to type next; as the report too, where none is out yet."""
    tell_all([str(error)], error.hint)
    if as_json and not has_reported():
        print_json({"error": str(error), "hint": error.hint})


def _told(error: Exception) -> LabdeployError:
    """Give what a person is told of a failure that no command foresaw: a file's own trouble, else a bug."""
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        return InventoryError(error.strerror or str(error), where=name, hint=f"ls -ld {shlex.quote(name)}")
    hint = "run it again with -v and report what it prints"
    return LabdeployError(f"unexpected: {type(error).__name__}: {error}", hint=hint)


if __name__ == "__main__":
    main()
