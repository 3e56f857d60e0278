"""The figures of a status as node_exporter reads them from a file: one practice, numbers only. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Final, get_args

from syncd.report import Report, State

_GAUGES: Final = (  # name below `syncd_`, key of the status, what it is
    ("report_timestamp_seconds", "at", "When these figures were taken: an old one means that syncd stands still."),
    ("healthy", "healthy", "1 while the mirror is as fresh as promised."),
    ("owed_items", "owed", "Listed, and the newest revision is not archived."),
    ("failing_items", "failing", "Tried, and could not be fetched."),
    ("held_items", "held", "Held by a guard until somebody decides."),
    ("oldest_list_seconds", "oldest_list_seconds", "Since the list was read that was read longest ago."),
    ("last_complete_sweep_timestamp_seconds", "last_complete_sweep_at", "Every list was read since then."),
    ("last_archived_timestamp_seconds", "last_archived_at", "When a file was last archived."),
    ("eta_seconds", "eta_seconds", "Until nothing is owed."),
    ("archived_versions", "archived_versions", "Files in the archive."),
    ("archived_bytes", "archived_bytes", "Their size."),
    ("archive_free_bytes", "archive_free_bytes", "What the archive's file system has left."),
    ("requests_today", "requests_today", "Requests to Open Dental since midnight."),
    ("throttled_today", "throttled_today", "Of these, answered with 429."),
)


def exposition(said: Report) -> str:
    """The text format of Prometheus, 0.0.4; what is not known has no line. Seconds and bytes, times since the epoch."""
    return "".join(f"{line}\n" for line in _lines(said))


def _lines(said: Report) -> Iterator[str]:
    practice = f'practice="{said["practice"]}"'
    for name, key, meaning in _GAUGES:
        value = said[key]
        if value is not None:
            yield from _head(name, meaning)
            yield f"syncd_{name}{{{practice}}} {_number(value)}"
    yield from _head("state", "1 for the state in force; `reason` and `who` say why, and who must act.")
    for state in get_args(State):
        now = said["state"] == state
        because = f',reason="{said["reason"]}",who="{said["who"]}"' if now else ""
        yield f'syncd_state{{{practice},state="{state}"{because}}} {int(now)}'


def _head(name: str, meaning: str) -> tuple[str, str]:
    return f"# HELP syncd_{name} {meaning}", f"# TYPE syncd_{name} gauge"


def _number(value: str | float) -> float:
    """A time of a status is an ISO string, a truth a bool; everything else is a number already."""
    return dt.datetime.fromisoformat(value).timestamp() if isinstance(value, str) else float(value)
