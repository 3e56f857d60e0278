"""What people see: tables on stdout, the progress of a backfill on stderr. Rich is used in the foreground only.

Texts of the practice may hold anything: whatever a terminal would obey is replaced before it is shown.
"""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from syncd import backfill
from syncd.report import SCHEMA_VERSION, human_bytes, human_duration

LINE_EVERY: Final = 60.0  # seconds between two plain lines
_WIDE: Final = 240  # columns where no terminal limits them
Fields = Mapping[str, object]


def emit(text: str) -> None:
    """One block of text on stdout. BrokenPipeError when nobody reads it any more; nothing else is written then."""
    try:
        click.echo(text.removesuffix("\n"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
        raise


def emit_json(fields: Fields) -> None:
    """One JSON object on one line, with `schema_version`."""
    emit(json.dumps({"schema_version": SCHEMA_VERSION, **fields}))


def plain(value: object) -> str:
    """A value as one line that no terminal obeys: control and formatting characters become a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in ("" if value is None else str(value)))


def local(at: object, zone: dt.tzinfo) -> str:
    """A time of a report (ISO, UTC) in the practice's zone, with its offset; empty for None."""
    if not at:
        return ""
    return dt.datetime.fromisoformat(str(at)).astimezone(zone).isoformat(sep=" ", timespec="seconds")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that fits the terminal; as wide as it needs to be where there is none."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        grid.add_column(name, overflow="fold", justify="right" if name in {"bytes", "seq"} else "left")
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    terminal = sys.stdout.isatty()
    paper = io.StringIO()
    width = shutil.get_terminal_size().columns if terminal else _WIDE
    Console(file=paper, force_terminal=terminal, width=width, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in paper.getvalue().splitlines())


class Meter:
    """Shows how far a backfill is: a bar on a terminal, else a line a minute, the first at once and the last at the

    end; nothing when `quiet`. Use as a context manager and call it with each Progress. `free_bytes`: what the
    archive's file system has left, None where nobody knows.
    """

    def __init__(self, quiet: bool, free_bytes: int | None) -> None:
        self._quiet, self._free = quiet, free_bytes
        self._terminal = sys.stderr.isatty() and not quiet
        self._started: tuple[float, int] | None = None
        self._lined_at = float("-inf")
        self.last: backfill.Progress | None = None
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(40),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True, highlight=False),
            disable=not self._terminal,
            transient=True,
        )
        self._lists = self._bar.add_task("counting", total=None, figures="")
        self._items = self._bar.add_task("documents", total=None, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self.last is not None and not self._terminal:
            self._line(self.last)

    def show(self, progress: backfill.Progress, now: float) -> None:
        """The figures of this moment; `now` in seconds since the epoch."""
        self.last = progress
        self._started = self._started or (now, progress.requests)
        if self._terminal:
            lists = f"{progress.lists:,} of {progress.of_lists:,} lists"
            self._bar.update(self._lists, completed=progress.lists, total=progress.of_lists or None, figures=lists)
            figures = self._figures(progress, now)
            self._bar.update(self._items, completed=progress.archived, total=progress.expected or None, figures=figures)
        elif now - self._lined_at >= LINE_EVERY:
            self._lined_at = now
            self._line(progress, now)

    def _line(self, progress: backfill.Progress, now: float | None = None) -> None:
        if not self._quiet:
            counted = f"{progress.lists:,} of {progress.of_lists:,} lists"
            click.echo(f"syncd: {counted}, {self._figures(progress, now)}", err=True)

    def _figures(self, progress: backfill.Progress, now: float | None) -> str:
        about = "about " if progress.lists < progress.of_lists else ""
        said = [f"{progress.archived:,} of {about}{progress.expected:,} items", human_bytes(progress.bytes)]
        said.append(f"{progress.requests:,} requests")
        began_at, before = self._started or (0.0, 0)
        if now is not None and now > began_at:
            said.append(f"{(progress.requests - before) / (now - began_at):.2g} a second")
        if progress.seconds_left:
            said.append(f"{human_duration(progress.seconds_left)} to go")
        if about or progress.owed:
            space = f"needs {human_bytes(progress.forecast_bytes)} in all"
            said.append(space if self._free is None else f"{space}, {human_bytes(self._free)} free")
        if progress.waiting:
            said.append(f"waiting: {progress.waiting}")
        return ", ".join(said)
