"""Copies of the index in STATE/copies, consistent, durable, 0600: one a day, made by the holder of the lock, some kept;
one before each migration, for the syncd that knew what was before.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Final

from sqlite_utils import Database

from syncd.errors import ConfigError, SiteError, state_reason
from syncd.index import Index
from syncd.schema import DiskErrors, number_of, row_is_sound

KEPT: Final = 7
_KEY: Final = "copy_number"  # in table meta of the copy
_NAME: Final = "index-{}.db"
_REMEDY: Final = "index.db is damaged: `syncd reindex` makes it anew from its copies and the archive"
_DRAFT: Final = "index.new"


def make(index: Index, folder: Path, day: str) -> bool:
    """Copy the index as it is now, unless there is a copy of this day (yyyy-mm-dd); whether one was made.

    Raises SiteError disk_error, state_full: nothing that is half there is left, nothing that is damaged is kept.
    """
    made = _make(index.db.conn, folder, _NAME.format(day))
    for old in [copy for copy in found(folder) if len(copy.name) == len(_NAME.format(day))][KEPT:]:
        old.unlink(missing_ok=True)
    return made


def renew(index: Index, state: Path, day: str) -> None:
    """Of all copies in STATE/copies make one, of the index as it is now; what `reindex` left beside it goes, too."""
    folder = state / "copies"
    if older := found(folder):
        _make(index.db.conn, folder, _NAME.format(day), anew=True)
    with DiskErrors(OSError):
        leftovers = [*state.glob("index.db.before-reindex*"), *state.glob("index.db.new*")]
        for path in (*leftovers, *(copy for copy in older if copy.name != _NAME.format(day))):
            path.unlink(missing_ok=True)


def keep_older(path: Path, db: sqlite3.Connection, number: int) -> None:
    """Before an index is migrated: a copy of it, from which the earlier syncd's `reindex` begins. Raises SiteError."""
    _make(db, path.parent / "copies", _NAME.format(f"{time.strftime('%Y-%m-%d')}-schema-{number}"))


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _make(db: sqlite3.Connection, folder: Path, name: str, anew: bool = False) -> bool:
    target, draft = folder / name, folder / _DRAFT
    if target.exists() and not anew:
        return False
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        draft.unlink(missing_ok=True)
        draft.touch(0o600)
        try:
            _write(db, draft, 1 + max(map(_number, found(folder)), default=0))
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        _sync(folder)
    except (OSError, sqlite3.Error) as error:
        code = getattr(error, "sqlite_errorname", type(error).__name__)
        raise SiteError(state_reason(error), f"a copy of index.db: {code}") from error
    return True


def _write(db: sqlite3.Connection, draft: Path, number: int) -> None:
    with contextlib.closing(sqlite3.connect(draft)) as copy:
        db.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, which needs no other
        with copy:
            copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, str(number)))
        if copy.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
            raise SiteError("disk_error", _REMEDY)
    _sync(draft)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_torn(path: Path) -> None:
    """Look at an index whose write-ahead log is left: of a process that did not end well, or of another database.

    SQLite replays whatever log bears the name. Raises SiteError disk_error for what does not make one whole index;
    it is only read here, for at its first writing, or its end, the two would be mixed for good.
    """
    log = path.with_name(path.name + "-wal")
    try:
        if not log.exists() or log.stat().st_size == 0:
            return
        with contextlib.closing(_reading(path)) as db:
            whole = db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok"
            db.execute("SELECT value FROM meta LIMIT 1").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise SiteError("disk_error", _REMEDY) from error
    if not whole:
        raise SiteError("disk_error", _REMEDY)


def found(folder: Path) -> list[Path]:
    """The copies, newest first, by the order in which they were made: a clock that was ahead dates them wrongly."""
    copies = folder.glob(_NAME.format("[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]*"))
    return sorted(copies, key=lambda path: (_number(path), path.stem), reverse=True)


def _number(copy: Path) -> int:
    """1, 2, 3, ... as copies were made; 0 of one that cannot be read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            found = db.execute("SELECT CAST(value AS INTEGER) FROM meta WHERE key = ?", (_KEY,)).fetchone()
            return int(found[0]) if found else 0
    except sqlite3.Error:
        return 0


def is_sound(copy: Path, archive_id: str) -> bool:
    """Whether a copy is whole, of this archive, of no later syncd, and every version row in it is what was written."""
    try:
        with contextlib.closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            number_of(Database(db))
            db.row_factory = sqlite3.Row
            whole = db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok"
            known = db.execute("SELECT value FROM meta WHERE key = 'archive_id'").fetchone()
            rows = db.execute("SELECT * FROM version")
            return whole and known is not None and known[0] == archive_id and all(row_is_sound(dict(r)) for r in rows)
    except (sqlite3.Error, ConfigError):
        return False
