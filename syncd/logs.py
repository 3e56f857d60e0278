"""The log for machines (JSON lines), the report for people, the words on stderr. No personal data by construction:

an event has a listed name, its keys are listed, and its values are numbers or short plain words. Whatever cannot be
written (full disk, closed stderr) is counted and never stops the work.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from traceback import walk_tb
from typing import Final, Protocol

from syncd.config import Settings
from syncd.errors import REASONS
from syncd.metrics import exposition
from syncd.report import Report, iso

EVENTS: Final[dict[str, str]] = {
    "archive_scrubbed": "the day's part of the archive was hashed again",
    "audit_head": "the last line of the audit log now: who wrote the log anew cannot have changed this",
    "clock_jumped": "the machine's clock was set; waits and due times were put right",
    "damage_found": "an archived file, sidecar or row is not what it was; see `syncd verify`",
    "damage_set_aside": "a damaged file was moved to ARCHIVE/damaged and is fetched again",
    "document_archived": "new bytes of an item are in the archive",
    "document_put_back": "an archived document is in Open Dental again, under a new number",
    "drill_failed": "a random version could not be restored as it was archived; see `syncd verify`",
    "drill_passed": "the week's drill: a random version was restored, and is what was archived",
    "drop_cleaned": "a staged file was removed from the drop",
    "drop_leftover": "a staged file could not be removed from the drop; syncd tries again",
    "drop_open_to_others": "other users of the SFTP site may look into the drop folder: chmod 700 on the site",
    "foreign_left": "somebody made folders among the files of a destroyed item: they stay, look into them",
    "guard_ended": "what a guard held was approved, rejected, or agreed with by seven listings",
    "guard_held": "unusually many disappearances are held; see `syncd held`",
    "hint_off": "a hint was refused or failed three times; it rests until tomorrow: that costs freshness only",
    "hook_gave_up": "the program of [hook] failed again and again for this version, and not for the next: passed over",
    "identity_checked": "known items were compared with the database behind the key",
    "index_copied": "the day's copy of the index is in STATE/copies",
    "index_copy_failed": "the day's copy of the index could not be made; syncd tries again",
    "index_publish_failed": "ARCHIVE/published/index.db could not be made; syncd tries again",
    "index_published": "ARCHIVE/published/index.db is as the index is now",
    "item_destroyed": "an item was destroyed by order, see `syncd audit`; it is never fetched again",
    "item_failed": "one item could not be fetched; syncd tries again with growing distance",
    "item_moved": "an item is now under another patient; its files stay where they are",
    "item_not_destroyed": "the disk does not let files of an item go; syncd tries again; see `syncd verify`",
    "item_recovered": "an item that had failed is archived",
    "item_vanished": "an item left the listings; its files stay",
    "library_warning": "a library below syncd warned; its text is not kept, it may name people",
    "list_polled": "one list of one patient was read completely (debug)",
    "listing_refused": "a listing could not be trusted; nothing was recorded from it",
    "notice_failed": "nobody could be told: [notify] command or ping_url did not work",
    "notice_sent": "trouble, or its end, was told by [notify] command",
    "number_reused": "a number now means another document",
    "patient_left": "a patient is no longer in the roster; the archive stays",
    "placement_unanswered": "a placement may still happen; its staged name is watched",
    "revision_recorded": "a newer revision has the bytes that are archived already",
    "roster_read": "the list of patients was read completely",
    "started": "syncd holds the lock and works",
    "state_changed": "the state that `syncd status` shows changed",
    "stopped": "syncd ended",
    "throttled": "Open Dental answered 429; syncd waits as told",
    "thumbnails_settled": "a patient's thumbnails are archived",
    "turn_failed": "a lane met an error that syncd does not know; please report it",
    "unlisted_event": "an event without a place in this list",
    "version_healed": "a damaged version has its own bytes again",
    "version_unhealable": "a damaged version cannot be fetched again: put it back from a backup",
    "wish_taken": "an order of a command was taken up",
}
_KEYS: Final = """
practice item list pat_num mount_num kind num version seq bytes method mode reason who failure failures state now guard
hint count rows lane became attempt looks pid verb exit_code message_code exception where logger log_level lines_lost
next_try_at wait_seconds n hash
"""
KEYS: Final = frozenset(_KEYS.split())
_WORDS: Final = re.compile(r"[A-Za-z0-9_.:/+ -]{0,200}")
_ALWAYS_SHOWN: Final = frozenset({"started", "stopped", "state_changed"})
_FOR_THE_JOURNAL: Final = "audit_head"  # kept where nobody who writes the log can change it; no use to a terminal
_PRIORITY: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3}  # sd-daemon(3)
Event = MutableMapping[str, object]
_LAST_DAY: Final = 2.5e11  # seconds since the epoch: a calendar ends soon after it
_DEEPEST: Final = 6  # frames and causes that an exception is described by


class Log(Protocol):
    """What the story logs with: an event of EVENTS, and ids under KEYS. `exc_info=error` adds its type and place."""

    def debug(self, event: str, **ids: object) -> None:
        """Only with -v."""

    def info(self, event: str, **ids: object) -> None:
        """Ordinary work."""

    def warning(self, event: str, **ids: object) -> None:
        """Somebody may want to know; also on stderr."""

    def error(self, event: str, **ids: object) -> None:
        """Somebody must act; also on stderr."""


class CappedFile:
    """A file that lines are appended to; when full it becomes FILE.1, and so on, `keep` old ones in all."""

    def __init__(self, path: Path, max_size: int, keep: int) -> None:
        self._path, self._max_size, self._keep, self._turn = path, max_size, keep, threading.Lock()

    def append(self, text: str) -> None:
        """Write the text at the end, wholly or not at all. Raises OSError."""
        content = text.encode("utf-8", "replace")
        with self._turn:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size + len(content) > self._max_size:
                self._rotate()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._path, flags, 0o600)
            try:
                size = os.fstat(fd).st_size
                if os.write(fd, content) != len(content):
                    os.ftruncate(fd, size)
                    raise OSError(errno.ENOSPC, "short write")
            finally:
                os.close(fd)

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{age}") for age in range(1, self._keep + 1))]
        for younger, older in reversed(list(itertools.pairwise(names))):
            with contextlib.suppress(FileNotFoundError):
                younger.replace(older)


class StatusFiles:
    """status.json, replaced as a whole, and status.log, the report for people. One that cannot be written stays old.

    `metrics_file`: the same for node_exporter, which is another user; its own time tells whether it is old.
    """

    def __init__(
        self, log_path: Path, max_size: int = 20_000_000, keep: int = 10, metrics_file: Path | None = None
    ) -> None:
        self._report, self._json = CappedFile(log_path / "status.log", max_size, keep), log_path / "status.json"
        self._metrics = metrics_file

    @classmethod
    def of(cls, settings: Settings) -> StatusFiles:
        """The files of a practice."""
        log = settings.log
        return cls(settings.log_path, log.max_size, log.keep, settings.status.metrics_file)

    def write_json(self, status: Report) -> bool:
        """Replace status.json; it is made anew each minute. Whether it could be written."""
        if self._metrics is not None:
            _replace(self._metrics, exposition(status), 0o644)
        with contextlib.suppress(OSError):
            self._json.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _replace(self._json, json.dumps(status) + "\n", 0o600)

    def append_report(self, text: str) -> None:
        """Add lines to status.log."""
        with contextlib.suppress(OSError):
            self._report.append(text)


def _replace(path: Path, text: str, mode: int) -> bool:
    draft = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        draft.unlink(missing_ok=True)
        draft.touch(0o600)
        draft.write_text(text, "utf-8")
        draft.chmod(mode)
        draft.replace(path)
        return True
    return False


def open_logs(
    settings: Settings, environ: Mapping[str, str], verbose: int = 0, now: Callable[[], float] = time.time
) -> Log:
    """The practice's log. `verbose` 1 adds debug events and shows everything on stderr, -1 shows errors only.

    From here on the warnings of libraries go into it, too. `now`: seconds since the epoch.
    """
    import structlog  # noqa: PLC0415 - a tenth of a second, for verbs that write no log

    sink = _Sink(settings, under_systemd="JOURNAL_STREAM" in environ, verbose=verbose, now=now)
    wrapper = structlog.make_filtering_bound_logger(logging.DEBUG if verbose > 0 else logging.INFO)
    log: Log = structlog.wrap_logger(sink, [structlog.processors.add_log_level, _describe, _listed], wrapper)
    logging.basicConfig(handlers=[_LibraryWarnings(log)], force=True)
    return log


def _describe(_: object, __: str, event: Event) -> Event:
    """Replace an exception by the types of it and its causes, and by the code they came from: no text, no locals."""
    error = event.pop("exc_info", None)
    if isinstance(error, BaseException):
        chain = _causes(error)
        event["exception"] = "/".join(type(cause).__name__ for cause in chain)
        event["where"] = f"{event.get('where', '')} {'/'.join(_place(cause) for cause in chain)}".strip()
        for cause in chain:
            if isinstance(cause, OSError):
                event["message_code"] = errno.errorcode.get(cause.errno or 0, "?")
    return event


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < _DEEPEST:
        chain.append(cause)
    return chain


def _place(error: BaseException) -> str:
    frames = [(Path(frame.f_code.co_filename).stem, line) for frame, line in walk_tb(error.__traceback__)]
    return " ".join(f"{stem}:{line}" for stem, line in frames[-_DEEPEST:])


def _listed(_: object, __: str, event: Event) -> Event:
    """Let pass what is listed, drop or blank the rest."""
    name, level = event.pop("event"), event.pop("level")
    ids = {key: _plain(_dated(key, value)) for key, value in event.items() if key in KEYS}
    return {"level": level, "event": name if name in EVENTS else "unlisted_event", **ids}


def _dated(key: str, value: object) -> object:
    """A time is told as `time` is; anything else as it came."""
    return iso(value) if key.endswith("_at") and isinstance(value, float) and abs(value) < _LAST_DAY else value


def _plain(value: object) -> object:
    match value:
        case None | bool() | int():
            return value
        case float() if abs(value) < 1e15:  # noqa: PLR2004 - not NaN, which JSON does not know
            return round(value, 3)
        case str() if _WORDS.fullmatch(value):
            return value
        case _:
            return "?"


class _Sink:
    """Where events end: one line each in syncd.log, and some on stderr. structlog calls the method of the level."""

    def __init__(self, settings: Settings, under_systemd: bool, verbose: int, now: Callable[[], float]) -> None:
        self._practice, self._now, self._verbose, self._under_systemd = settings.name, now, verbose, under_systemd
        self._file = CappedFile(settings.log_path / "syncd.log", settings.log.max_size, settings.log.keep)
        self._lines_lost = 0

    def write(self, **event: object) -> None:
        record = {"time": iso(self._now()), **event, "practice": self._practice}
        if self._lines_lost:
            record["lines_lost"] = self._lines_lost
        try:
            self._file.append(json.dumps(record) + "\n")
            self._lines_lost = 0
        except OSError:
            self._lines_lost += 1
        self._show(event)

    debug = info = warning = error = write

    def _show(self, event: Mapping[str, object]) -> None:
        priority, name = _PRIORITY[str(event["level"])], str(event["event"])
        least = {-1: 3, 0: 4}.get(self._verbose, 7)
        always = name in _ALWAYS_SHOWN or (name == _FOR_THE_JOURNAL and self._under_systemd)
        if priority > least and not (always and self._verbose >= 0):
            return
        ids = " ".join(f"{key}={value}" for key, value in event.items() if key not in {"level", "event"})
        _, action, _ = REASONS.get(str(event.get("reason")), ("", EVENTS[name], 0))
        if event.get("reason") == "ok" and "lane" in event:
            action = "works again"  # this one: whether all is archived is for the status to say
        action, prefix = action.replace("NAME", self._practice), f"<{priority}>" if self._under_systemd else ""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all: the file has it
            print(f"{prefix}syncd {self._practice}: {name} {ids}: {action}", file=sys.stderr, flush=True)  # noqa: T201


class _LibraryWarnings(logging.Handler):
    """Takes warnings of libraries: which logger and level, never the text."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning("library_warning", logger=record.name, log_level=record.levelname)
