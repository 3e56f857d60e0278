"""Daily copies of the index in STATE/copies: consistent, durable, 0600, the newest kept. Made by the lock's holder."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Final

from syncd.errors import SiteError
from syncd.index import Index
from syncd.schema import row_is_sound

KEPT: Final = 7
_NAME: Final = "index-{}.db"
_REMEDY: Final = "index.db is damaged: `syncd reindex` makes it anew from its copies and the archive"
_DRAFT: Final = "index.new"


def make(index: Index, folder: Path, day: str) -> bool:
    """Copy the index as it is now, unless there is a copy of this day (yyyy-mm-dd); whether one was made.

    Raises SiteError disk_error: nothing that is half there is left, nothing that is damaged is kept.
    """
    target, draft = folder / _NAME.format(day), folder / _DRAFT
    if target.exists():
        return False
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        draft.unlink(missing_ok=True)
        draft.touch(0o600)
        try:
            _write(index, draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        _sync(folder)
        for old in found(folder)[KEPT:]:
            old.unlink()
    except (OSError, sqlite3.Error) as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise SiteError("disk_error", f"the day's copy of index.db: {name}") from error
    return True


def _write(index: Index, draft: Path) -> None:
    with contextlib.closing(sqlite3.connect(draft)) as copy:
        index.db.conn.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, which needs no other
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
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            whole = db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok"
            db.execute("SELECT value FROM meta LIMIT 1").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise SiteError("disk_error", _REMEDY) from error
    if not whole:
        raise SiteError("disk_error", _REMEDY)


def found(folder: Path) -> list[Path]:
    """The copies, newest first."""
    return sorted(folder.glob(_NAME.format("[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]")), reverse=True)


def is_sound(copy: Path, archive_id: str) -> bool:
    """Whether a copy is whole, of this archive, and every version row in it is what was written."""
    try:
        with contextlib.closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            db.row_factory = sqlite3.Row
            whole = db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok"
            known = db.execute("SELECT value FROM meta WHERE key = 'archive_id'").fetchone()
            rows = db.execute("SELECT * FROM version")
            return whole and known is not None and known[0] == archive_id and all(row_is_sound(dict(r)) for r in rows)
    except sqlite3.Error:
        return False
