"""What people see: tables on stdout, the progress of a backfill on stderr. Rich is used in the foreground only, and
imported where it is: it costs a tenth of a whole `health`.

Texts of the practice may hold anything: whatever a terminal would obey is replaced before it is shown.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import os
import select
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Self

import click

from syncd import backfill
from syncd.report import SCHEMA_VERSION, human_bytes, human_duration

COLOURS: Final = {"ok": "green", "catching_up": "green", "blocked": "red", "stopped": "red"}
LINE_EVERY: Final = 60.0  # seconds between two plain lines
_WHOLE: Final = frozenset({"id", "full_id", "date", "size"})  # columns that are never broken
_WIDE: Final = 240  # columns where no terminal limits them


def emit(text: str) -> None:
    """One block of text on stdout. OSError when nobody reads it any more or its disk is full: then it is given up."""
    try:
        click.echo(text.removesuffix("\n"))
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
        raise


def emit_json(fields: Mapping[str, object]) -> None:
    """One JSON object on one line, with `schema_version`."""
    emit(json.dumps({"schema_version": SCHEMA_VERSION, **fields}))


def nobody_reads(seconds: float) -> bool:
    """Wait so long; True at once where whoever read our stdout has gone, which else only the next line would show."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return bool(watch.poll(seconds * 1000))


def plain(value: object) -> str:
    """A value as one line that no terminal obeys: control and formatting characters become a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in ("" if value is None else str(value)))


def headed(text: str, state: str) -> str:
    """A report with its first line in the colour of its state; `emit` drops that where no terminal shows it."""
    head, rest = text.split("\n", 1)
    return click.style(head, fg=COLOURS.get(state, "yellow"), bold=True) + "\n" + rest


def local(at: object, zone: dt.tzinfo) -> str:
    """A time of a report (ISO, UTC) in the practice's zone, with its offset; empty for None."""
    if not at:
        return ""
    return dt.datetime.fromisoformat(str(at)).astimezone(zone).isoformat(sep=" ", timespec="seconds")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that fits the terminal; as wide as it needs to be where there is none."""
    from rich.console import Console  # noqa: PLC0415 - see above
    from rich.table import Table  # noqa: PLC0415 - see above
    from rich.text import Text  # noqa: PLC0415 - see above

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in {"bytes", "size", "seq"} else "left"
        grid.add_column(name, overflow="fold", justify=justify, no_wrap=name in _WHOLE)
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    terminal, paper = sys.stdout.isatty(), io.StringIO()
    width = shutil.get_terminal_size().columns if terminal else _WIDE
    Console(file=paper, force_terminal=terminal, width=width, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in paper.getvalue().splitlines())


def open_closed_streams() -> None:
    """Where whoever started this process closed stdin, stdout or stderr: else a file of ours would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for the process's whole life


class Meter:
    """Shows how far a backfill is: a bar on a terminal, else a line a minute, the first at once, one more at the end.

    Use as a context manager around calls of `show`. `free_bytes`: what the archive's file system has left, None where
    nobody knows. `quiet`: shows nothing.
    """

    def __init__(self, quiet: bool, free_bytes: int | None) -> None:
        from rich.console import Console  # noqa: PLC0415 - see above
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415 - see above
        from rich.table import Column  # noqa: PLC0415 - see above

        self._quiet, self._free, self._terminal = quiet, free_bytes, sys.stderr.isatty()
        self._started: tuple[float, int] | None = None  # when, and the requests until then
        self._lined_at, self._words = float("-inf"), ""
        columns = (  # on a narrow terminal the figures are wrapped, nothing is cut
            TextColumn("{task.description}", table_column=Column(width=9, no_wrap=True)),
            BarColumn(12, table_column=Column(width=12, no_wrap=True)),
            TextColumn("{task.fields[words]}", table_column=Column()),
        )
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(*columns, console=console, disable=quiet or not self._terminal, transient=True)
        self._task = self._bar.add_task("counting", total=None, words="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._words:
            self._line()

    def show(self, progress: backfill.Progress, now: float) -> None:
        """The figures of this moment; `now` in seconds since the epoch."""
        self._words = self._figures(progress, now)
        if self._terminal:
            phase, done, total = "documents", progress.archived, progress.expected
            if progress.lists < progress.of_lists:
                phase, done, total = "counting", progress.lists, progress.of_lists
            self._bar.update(self._task, description=phase, completed=done, total=total or None, words=self._words)
        elif now - self._lined_at >= LINE_EVERY:
            self._lined_at = now
            self._line()

    def _line(self) -> None:
        if not (self._quiet or self._terminal):
            with contextlib.suppress(OSError):  # the work goes on, seen or not
                click.echo(f"syncd: {self._words}", err=True)

    def _figures(self, progress: backfill.Progress, now: float) -> str:
        began_at, before = self._started = self._started or (now, progress.requests)
        about = "about " if progress.lists < progress.of_lists else ""
        said = [f"{progress.lists:,} of {progress.of_lists:,} lists"]
        said.append(f"{progress.archived:,} of {about}{progress.expected:,} items")
        if progress.seconds_left:
            said.append(f"{human_duration(progress.seconds_left)} to go")
        said += [human_bytes(progress.bytes), f"{progress.requests:,} requests"]
        if now > began_at:
            said.append(f"{(progress.requests - before) / (now - began_at):.2g} a second")
        if about or progress.owed:
            free = "" if self._free is None else f", {human_bytes(self._free)} free"
            said.append(f"needs {human_bytes(progress.forecast_bytes)} in all{free}")
        if progress.waiting:
            said.append(f"waiting: {progress.waiting}")
        return ", ".join(said)
