"""Every way labdeploy can fail, and the exit code of each.

LabdeployError                    1  something nobody foresaw
├── InventoryError                2  the inventory, the lock or the command line is wrong
│   └── ModelError                2  a model file is missing, truncated or malformed
├── FitError                      3  the plan needs more memory than a device has
├── HostError                     4  unreachable, refused, or its key is unknown
├── UnhealthyError                5  pushed but unhealthy; the old generation is back
├── LockedError                   6  another push holds the host
├── NeedsPersonError              7  a rollback failed: a person has to look
└── CheckError                    8  a check failed

The core raises these; only cli.py turns them into text and an exit code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")
INTERRUPTED = 130  # as shells report a program that SIGINT ended


class LabdeployError(Exception):
    """A failure that is shown to a person: what and where with the numbers, and a command to type next.

    `where` is a path such as `gpu1: chat` or `hosts.gpu1.gpus[0].vram (inventory.yaml:12)`; `hint` is a
    command or a line to write, without the word "hint".
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {what}" if where else what)
        self.what = what
        self.where = where
        self.hint = hint


class InventoryError(LabdeployError):
    """The inventory, the lock or the command line is wrong; nothing was done."""

    exit_code = 2


class DeclinedError(LabdeployError):
    """Somebody was asked and said no; nothing was done."""

    exit_code = INTERRUPTED


class ModelError(InventoryError):
    """A model file is missing, truncated or malformed."""


class FitError(LabdeployError):
    """The plan needs more memory than a device has; nothing was done."""

    exit_code = 3


class HostError(LabdeployError):
    """A host could not be reached, refused us, or showed a key nobody vouched for."""

    exit_code = 4


class UnhealthyError(LabdeployError):
    """The new generation did not become healthy; the old one is back."""

    exit_code = 5


class LockedError(LabdeployError):
    """Another push holds the host; nothing was changed there."""

    exit_code = 6


class NeedsPersonError(LabdeployError):
    """A rollback failed on the host: a person has to look."""

    exit_code = 7


class CheckError(LabdeployError):
    """A check of a running service failed."""

    exit_code = 8


def first_hint(errors: Iterable[LabdeployError]) -> str:
    """Give the first hint that there is."""
    return next((error.hint for error in errors if error.hint), "")


def all_of(asks: Iterable[Callable[[], T]]) -> list[T]:
    """Return what each gives; where some raise InventoryError, raise one that says all of them, each once."""
    given: list[T] = []
    errors: dict[str, InventoryError] = {}
    for ask in asks:
        try:
            given.append(ask())
        except InventoryError as error:
            errors.setdefault(str(error), error)
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise InventoryError("\n".join(errors), hint=first_hint(errors.values()))
    return given
