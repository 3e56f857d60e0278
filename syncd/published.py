"""ARCHIVE/published/index.db: what the archive holds, in one SQLite file for Datasette and other programs.

index.db itself stays private: it is written to all the time, and holds what only syncd understands. This one is made
anew where it would tell something else, as a whole, of one moment of the index; who has it open keeps the one before.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from syncd import __version__
from syncd.archive import Archive
from syncd.config import Settings
from syncd.errors import SiteError
from syncd.index import FAILING_AFTER, Index
from syncd.model import Item
from syncd.report import iso
from syncd.search import STATE

SCHEMA_VERSION: Final = 1
PATH: Final = "published/index.db"
_KEY: Final = "published"
_JULIAN_1970: Final = 2440587.5
# No STRICT: a program may bring an older SQLite. The comments are kept in the file, and Datasette shows them.
_SCHEMA: Final = """
CREATE TABLE meta (             -- of this file: practice, time_zone, published_at, last_seq, syncd, schema_version
    key TEXT PRIMARY KEY, value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE patient (
    pat_num INTEGER PRIMARY KEY,
    last_name TEXT NOT NULL, first_name TEXT NOT NULL, preferred TEXT NOT NULL,
    birthdate TEXT NOT NULL,    -- yyyy-mm-dd
    status TEXT NOT NULL,       -- as Open Dental says it
    left_at TEXT                -- since then Open Dental's list of patients lacks this one
);
CREATE TABLE item (             -- everything that is or was in Open Dental
    pat_num INTEGER NOT NULL,
    kind TEXT NOT NULL,         -- document, mount, mount-image, sheet, thumbnail
    num INTEGER NOT NULL,       -- Open Dental's number
    id TEXT NOT NULL,           -- as syncd's verbs take it: 101/document-34
    mount_num INTEGER,          -- of a mount-image
    state TEXT NOT NULL,        -- archived, vanished, owed, failing, pending_at_source, held
    category TEXT, description TEXT, img_type TEXT, tooth_numbers TEXT, file_name TEXT,
    date TEXT,                  -- DateCreated, or of a sheet DateTimeSheet, in the practice's time zone
    first_seen_at TEXT NOT NULL,
    vanished_at TEXT,           -- two complete listings lacked it; its files stay
    became TEXT,                -- the id under which it is now
    current_seq INTEGER,        -- its newest version; NULL: none is archived
    PRIMARY KEY (pat_num, kind, num)
) WITHOUT ROWID;
CREATE TABLE version (
    seq INTEGER PRIMARY KEY,    -- rises, and is never used again
    pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL,
    version INTEGER NOT NULL,   -- 1, 2, 3, ... of its item
    path TEXT NOT NULL,         -- of the file, relative to the archive
    sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, media_type TEXT NOT NULL,
    archived_at TEXT NOT NULL,
    damage TEXT                 -- what is known to be wrong with the file, as `syncd verify` says it
);
CREATE VIEW documents AS        -- one row an item, with the patient's name and the newest file
SELECT i.pat_num, p.last_name, p.first_name, p.birthdate, i.id, i.kind, i.num, i.category, i.description,
    i.tooth_numbers, i.date, i.state, i.vanished_at, i.became, v.version, v.seq, v.path, v.bytes, v.media_type,
    v.archived_at, v.damage
FROM item i LEFT JOIN patient p ON p.pat_num = i.pat_num LEFT JOIN version v ON v.seq = i.current_seq;
CREATE VIEW versions AS         -- one row a file
SELECT v.seq, v.pat_num, p.last_name, p.first_name, p.birthdate, i.id, v.kind, v.num, i.category, i.description,
    i.date, v.version, v.seq = i.current_seq AS is_current, v.path, v.sha256, v.bytes, v.media_type, v.archived_at,
    v.damage
FROM version v JOIN item i ON i.pat_num = v.pat_num AND i.kind = v.kind AND i.num = v.num
LEFT JOIN patient p ON p.pat_num = v.pat_num;
CREATE VIEW patients AS         -- each patient, with how much there is and of when
SELECT p.*, (SELECT count(*) FROM item i WHERE i.pat_num = p.pat_num) AS items,
    (SELECT count(*) FROM version v WHERE v.pat_num = p.pat_num) AS files,
    (SELECT sum(v.bytes) FROM version v WHERE v.pat_num = p.pat_num) AS bytes,
    (SELECT max(v.archived_at) FROM version v WHERE v.pat_num = p.pat_num) AS newest_at
FROM patient p;
CREATE VIEW vanished AS         -- what Open Dental no longer has; `path` is there
SELECT * FROM documents WHERE state = 'vanished';
"""
_AFTER: Final = """
CREATE INDEX version_of_item ON version (pat_num, kind, num, version);
CREATE INDEX version_archived ON version (archived_at);
CREATE INDEX item_vanished ON item (vanished_at) WHERE vanished_at IS NOT NULL;
"""


def _time(column: str) -> str:
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column}, 'unixepoch')"


_FILL: Final = (
    (
        "INSERT INTO patient SELECT pat_num, last_name, first_name, preferred, substr(birthdate, 1, 10), status,"
        f" {_time('left_at')} FROM source.patient"
    ),
    (
        "INSERT INTO item SELECT i.pat_num, i.kind, i.num, i.pat_num || '/' || i.kind || '-' || i.num, i.mount_num,"
        f" {STATE}, i.category, i.description, i.img_type, i.tooth_numbers, i.file_name, i.date_created,"
        f" {_time('i.first_seen_at')}, {_time('i.vanished_at')}, i.became, (SELECT v.seq FROM source.version v"
        " WHERE v.pat_num = i.pat_num AND v.kind = i.kind AND v.num = i.num AND v.version = i.current_version"
        " AND v.sidecar = 1) FROM source.item i WHERE i.current_version IS NOT NULL OR i.kind IN"
        " (SELECT value FROM json_each(?)) ORDER BY i.pat_num, i.kind, i.num"
    ),
    (
        "INSERT INTO version SELECT seq, pat_num, kind, num, version, path, sha256, bytes, media_type,"
        f" {_time('archived_at')}, (SELECT d.code FROM source.damage d WHERE d.path = v.path) FROM source.version v"
        " WHERE sidecar = 1 ORDER BY seq"
    ),
)
_ODD: Final = "vanished_at IS NOT NULL OR pending = 1 OR held_by IS NOT NULL"  # as the index item_odd has it
_CONTENT: Final = (  # cheap, also where there are a million: whether the file would tell something else
    "SELECT (SELECT max(seq) FROM version),"
    f" (SELECT json_array(count(*), sum(vanished_at), sum(held_by), sum(pending)) FROM item WHERE {_ODD}),"
    " (SELECT json_array(count(*), max(stamp), sum(left_at), sum(length(last_name))) FROM patient),"
    f" (SELECT json_array(count(*), sum(failures >= {FAILING_AFTER}), max(since_at)) FROM duty),"
    " (SELECT json_array(count(*), max(found_at)) FROM damage)"
)


def vanished(root: Path) -> tuple[int, list[tuple[Item, float, str | None]]]:
    """What had vanished when an archive's copy was made, since when, and what it became; nothing without a sound copy.

    First the highest sequence number of then. For an index that is made anew: sidecars do not tell it.
    """
    sql = f"SELECT pat_num, kind, num, (julianday(vanished_at) - {_JULIAN_1970}) * 86400, became FROM vanished"
    try:
        with contextlib.closing(_reading(root)) as db:
            (last,) = db.execute("SELECT value FROM meta WHERE key = 'last_seq'").fetchone()
            return int(last), [(Item(*key), at, became) for *key, at, became in db.execute(sql).fetchall()]
    except (sqlite3.Error, TypeError):  # damaged, or not made by syncd
        return 0, []


def versions(root: Path) -> Iterator[tuple[int, Item, str]]:
    """Every file that the index knew when an archive's copy was made: its seq, its item, its path."""
    sql = "SELECT seq, path, pat_num, kind, num FROM version"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_reading(root)) as db:
        yield from ((seq, Item(*key), path) for seq, path, *key in db.execute(sql))


def _reading(root: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{(root / PATH).absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def publish(index: Index, archive: Archive, settings: Settings, now: float) -> bool:
    """Make the file anew where it would tell something else, is not as it was made, or a day old; whether it was.

    It takes no room from the reserve of the archive. Raises SiteError, ItemError; then the one before is still there.
    """
    today = dt.datetime.fromtimestamp(now, settings.zone).date().isoformat()
    content = [SCHEMA_VERSION, __version__, today, *index.rows(_CONTENT)[0].values()]
    if content[3] is None or index.meta(_KEY) == json.dumps([content, archive.seen(PATH)]):
        return False
    if archive.free_bytes() < settings.archive.reserve + index.path.stat().st_size:
        raise SiteError("archive_full")
    draft = archive.new_incoming()
    try:
        _write(draft, index.path, settings, now)
        archive.put_published(draft)
    finally:
        archive.discard(draft)
    index.remember(_KEY, json.dumps([content, archive.seen(PATH)]))
    return True


def _write(draft: Path, source: Path, settings: Settings, now: float) -> None:
    """The whole file, not durable yet. Nobody else knows of it: without a journal, without locks."""
    draft.touch(0o600)
    try:
        with contextlib.closing(sqlite3.connect(f"{draft.as_uri()}?nolock=1", uri=True, isolation_level=None)) as db:
            db.execute("ATTACH ? AS source", (f"{source.absolute().as_uri()}?mode=ro",))
            for setting in ("main.journal_mode=OFF", "main.synchronous=OFF", "main.cache_size=-16000"):
                db.execute(f"PRAGMA {setting}")
            db.execute("BEGIN")  # all of one moment
            _execute(db, _SCHEMA)
            for statement in _FILL:
                db.execute(statement, (json.dumps(sorted(settings.sync.kinds)),) if "?" in statement else ())
            _execute(db, _AFTER)
            told = {"practice": settings.name, "time_zone": settings.zone.key, "published_at": iso(now)}
            told |= {"syncd": __version__, "schema_version": str(SCHEMA_VERSION)}
            db.executemany("INSERT INTO meta VALUES (?, ?)", told.items())
            db.execute("INSERT INTO meta SELECT 'last_seq', max(seq) FROM source.version")
            db.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        code = getattr(error, "sqlite_errorname", type(error).__name__)
        raise SiteError("archive_full" if code == "SQLITE_FULL" else "disk_error", f"{PATH}: {code}") from error


def _execute(db: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            db.execute(statement)
