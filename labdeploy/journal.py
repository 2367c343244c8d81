"""What a unit wrote into its host's journal: the command that shows it, and its lines as JSON."""

from __future__ import annotations

import datetime as dt
import json


def command(unit: str, n_lines: int, *, follow: bool, as_json: bool) -> list[str]:
    """Give the command that shows the last lines of a unit, and with `follow` those that come."""
    form = ["json", "--output-fields=MESSAGE", "--quiet"] if as_json else ["short-iso"]
    return ["journalctl", "--no-pager", "-o", *form, "-n", str(n_lines), "-u", unit, *(["-f"] if follow else [])]


def entry(line: str) -> dict[str, str]:
    """Read an entry as journalctl writes JSON: its time in UTC, and what was said; bytes that are no text as U+FFFD."""
    read = json.loads(line)
    message = read.get("MESSAGE") or ""  # null: longer than journald shows
    if isinstance(message, list):
        message = bytes(message).decode(errors="replace")
    at = dt.datetime.fromtimestamp(int(read["__REALTIME_TIMESTAMP"]) / 1e6, tz=dt.UTC)
    return {"at": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "message": message}
