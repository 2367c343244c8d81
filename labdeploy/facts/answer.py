"""What a host answered: the lines of each fact, by its name; and the few things that all parsers do with them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Answer = Mapping[str, tuple[str, ...]]

_NOT_KNOWN = re.compile(r"\[?(n/?a|not supported|unknown.*|insufficient permissions|none|-|)\]?", re.IGNORECASE)


def printable(line: str) -> str:
    """Blank out what is no text: what a host says is shown on terminals and written into units."""
    return line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)


def first(answer: Answer, name: str) -> str:
    """Give the first line of a fact, or nothing."""
    return next(iter(answer.get(name, ())), "")


def known(text: object) -> str | None:
    """Give a text as it is, or None for the many ways in which programs say that they do not know."""
    said = str(text).strip() if text is not None else ""
    return None if _NOT_KNOWN.fullmatch(said) else said


def whole(text: object) -> int | None:
    """Give the whole number a text is (decimal, or hexadecimal after 0x), or None."""
    said = str(text).strip() if text is not None else ""
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", said):
        return int(said, 16)
    return int(said) if re.fullmatch(r"\d{1,19}", said) else None


def mib(n_bytes: int | None) -> int | None:
    """Give bytes in whole MiB."""
    return None if n_bytes is None else n_bytes // 2**20


def documents(lines: tuple[str, ...]) -> list[Any]:
    """Give every JSON document in an answer: programs print one for each device, and warnings between them."""
    text, found, at = "\n".join(lines), [], 0
    decoder = json.JSONDecoder()
    while (start := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            document, at = decoder.raw_decode(text, start.start())
            found.append(document)
        except (ValueError, RecursionError):
            at = start.start() + 1
    return found
