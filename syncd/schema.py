"""The index's tables, named for people who open it with any SQLite tool, and their migrations.

Times end in `_at` (seconds since the epoch, UTC). Everything here can be rebuilt from the archive, except what is not
archived yet: `duty` (what is owed a request), `attempt` (placements whose file may lie on the drop), `wish`, `guard`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations

from syncd.diff import Known
from syncd.errors import ConfigError, SiteError, state_reason
from syncd.model import Attempt, Duty, Item, PlacedName, Version
from syncd.naming import folded

Row = dict[str, Any]
STATEMENTS = 512  # kept compiled: of 128 each would be dropped before it is used again
BeforeMigrating = Callable[[sqlite3.Connection, int], object]

migrations = Migrations("syncd")

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE patient (
    pat_num INTEGER PRIMARY KEY, status TEXT NOT NULL, stamp TEXT NOT NULL, last_name TEXT NOT NULL,
    first_name TEXT NOT NULL, preferred TEXT NOT NULL, birthdate TEXT NOT NULL,
    roster_at REAL NOT NULL,  -- in the roster that last told something new of the patient
    left_at REAL,             -- missing in the roster since: no list of this patient is polled
    thumbnails_after_at REAL NOT NULL DEFAULT 0, thumbnails_failures INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE list (
    pat_num INTEGER NOT NULL, name TEXT NOT NULL, polled_at REAL NOT NULL DEFAULT 0,  -- last complete listing began
    rows INTEGER NOT NULL DEFAULT 0, newest REAL, failures INTEGER NOT NULL DEFAULT 0,
    next_try_at REAL NOT NULL DEFAULT 0, PRIMARY KEY (pat_num, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE item (
    pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL,
    mount_num INTEGER,        -- of a mount-image
    revision TEXT NOT NULL,   -- as last listed
    archived_revision TEXT,   -- of the newest archived version or sidecar
    images_revision TEXT,     -- of a mount: the revision whose images are all archived
    pending INTEGER NOT NULL DEFAULT 0,  -- 1: its bytes are not in the practice yet (uploaded as a URL)
    first_seen_at REAL NOT NULL, missing_since_at REAL, vanished_at REAL, became TEXT,  -- moved to / now: a full id
    held_by INTEGER, not_found INTEGER NOT NULL DEFAULT 0,
    thumbnail_due INTEGER NOT NULL DEFAULT 0, refetch_at REAL,
    current_version INTEGER, current_seq INTEGER, sha256 TEXT, bytes INTEGER, media_type TEXT, archived_at REAL,
    date_created TEXT, stamp TEXT, category TEXT, description TEXT, img_type TEXT, tooth_numbers TEXT, file_name TEXT,
    fields TEXT NOT NULL,     -- JSON: every listing field under the vendor's name
    PRIMARY KEY (pat_num, kind, num)
) STRICT, WITHOUT ROWID;
CREATE INDEX item_by_number ON item (kind, num);
CREATE INDEX item_missing ON item (missing_since_at) WHERE missing_since_at IS NOT NULL;
CREATE INDEX item_refetch ON item (refetch_at) WHERE refetch_at IS NOT NULL;
CREATE INDEX item_thumbnail_due ON item (pat_num) WHERE thumbnail_due = 1;
CREATE INDEX item_in_mount ON item (mount_num) WHERE mount_num IS NOT NULL;
CREATE INDEX item_odd ON item (pat_num) WHERE vanished_at IS NOT NULL OR pending = 1 OR held_by IS NOT NULL;
CREATE TABLE version (
    seq INTEGER PRIMARY KEY, pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL,
    version INTEGER NOT NULL, sidecar INTEGER NOT NULL,  -- 1: new bytes; 2, 3, ...: newer revisions with equal bytes
    revision TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, extension TEXT NOT NULL,
    media_type TEXT NOT NULL, path TEXT NOT NULL, listed_at REAL NOT NULL, placed_at REAL NOT NULL,
    archived_at REAL NOT NULL, method TEXT NOT NULL, flags TEXT NOT NULL, source_revision TEXT,
    checked_at REAL NOT NULL,  -- when its bytes were last hashed and found right
    checksum TEXT NOT NULL,    -- over all columns but checked_at: a flipped bit in this file is noticed
    UNIQUE (pat_num, kind, num, version, sidecar)
) STRICT;
CREATE INDEX version_checked ON version (checked_at) WHERE sidecar = 1;
CREATE INDEX version_archived ON version (archived_at);
CREATE TABLE damage (
    path TEXT PRIMARY KEY,    -- of the file or sidecar that is not what was archived, relative to the archive
    pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL, seq INTEGER, code TEXT NOT NULL,
    state TEXT NOT NULL,      -- wanted: a person asked for the repair; found; queued: fetched again; unhealable
    found_at REAL NOT NULL,
    seen_at REAL              -- a person was told that it cannot be healed
) STRICT, WITHOUT ROWID;
CREATE TABLE duty (
    method TEXT NOT NULL, pat_num INTEGER NOT NULL, num INTEGER NOT NULL, kind TEXT NOT NULL, revision TEXT NOT NULL,
    why TEXT NOT NULL, since_at REAL NOT NULL, next_try_at REAL NOT NULL, failures INTEGER NOT NULL DEFAULT 0,
    failure TEXT, busy INTEGER NOT NULL DEFAULT 0,  -- 1: a placement is under way; 2: and is asked for anew
    PRIMARY KEY (pat_num, method, num)
) STRICT, WITHOUT ROWID;
CREATE INDEX duty_due ON duty (why, next_try_at) WHERE busy = 0;
CREATE TABLE attempt (
    id INTEGER PRIMARY KEY AUTOINCREMENT, method TEXT NOT NULL, pat_num INTEGER NOT NULL, num INTEGER NOT NULL,
    revision TEXT NOT NULL, staging TEXT NOT NULL UNIQUE, state TEXT NOT NULL, asked_at REAL NOT NULL, placed_at REAL,
    listed_at REAL NOT NULL, why TEXT NOT NULL, listed TEXT NOT NULL, names TEXT NOT NULL DEFAULT '[]',
    looks INTEGER NOT NULL DEFAULT 0, next_look_at REAL NOT NULL DEFAULT 0, seen_size INTEGER, seen_mtime INTEGER,
    answered INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX attempt_due ON attempt (state, next_look_at);
CREATE TABLE guard (
    id INTEGER PRIMARY KEY AUTOINCREMENT, scope TEXT NOT NULL,  -- patient-101, all, roster, or database
    reason TEXT NOT NULL, made_at REAL NOT NULL, items INTEGER NOT NULL, of_items INTEGER NOT NULL,
    agreeing INTEGER NOT NULL DEFAULT 0, agreed_day TEXT, state TEXT NOT NULL DEFAULT 'held', ended_at REAL
) STRICT;
CREATE TABLE wish (
    id INTEGER PRIMARY KEY AUTOINCREMENT, verb TEXT NOT NULL, argument TEXT NOT NULL, made_at REAL NOT NULL,
    taken_at REAL, done_at REAL, outcome TEXT,
    actor TEXT NOT NULL DEFAULT 'daemon'  -- who made it, as the audit log names people
) STRICT;
CREATE INDEX wish_waiting ON wish (id) WHERE done_at IS NULL;
CREATE TABLE audit_entry (   -- done, and not in the audit log yet: written with what it tells of, gone once it is there
    id INTEGER PRIMARY KEY AUTOINCREMENT, entry TEXT NOT NULL UNIQUE,  -- its name in the log
    at REAL NOT NULL, actor TEXT NOT NULL, verb TEXT NOT NULL, facts TEXT NOT NULL  -- JSON: ids, digests, counts
) STRICT;
CREATE TABLE site (
    lane TEXT PRIMARY KEY, reason TEXT NOT NULL, detail TEXT NOT NULL, since_at REAL NOT NULL,
    next_try_at REAL NOT NULL, failures INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE incident (
    id INTEGER PRIMARY KEY, lane TEXT NOT NULL, reason TEXT NOT NULL, since_at REAL NOT NULL, until_at REAL
) STRICT;
CREATE INDEX incident_open ON incident (lane) WHERE until_at IS NULL;
"""


@migrations()
def first_tables(db: Database) -> None:
    """Everything of the first release, with what later ones need."""
    for statement in _TABLES.split(";\n"):
        if statement.strip():
            db.conn.execute(statement)


_TEXT_SEARCH = """
CREATE TABLE description (    -- each text once, as `find` compares it: without case and accents
    id INTEGER PRIMARY KEY, folded TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE described (      -- which items have it
    description INTEGER NOT NULL, pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL,
    PRIMARY KEY (description, pat_num, kind, num)
) STRICT, WITHOUT ROWID;
CREATE VIRTUAL TABLE description_text USING fts5 (
    folded, content='description', content_rowid='id', tokenize='trigram', detail='none', columnsize=0
);
INSERT INTO description (folded) SELECT DISTINCT folded(description) FROM item WHERE description != '';
INSERT INTO described SELECT d.id, i.pat_num, i.kind, i.num FROM item i JOIN description d
    ON d.folded = folded(i.description) WHERE i.description != '' ORDER BY 1, 2, 3, 4;
INSERT INTO description_text (description_text) VALUES ('rebuild');
CREATE TRIGGER description_new AFTER INSERT ON description BEGIN
    INSERT INTO description_text (rowid, folded) VALUES (new.id, new.folded);
END;
CREATE TRIGGER description_gone AFTER DELETE ON description BEGIN
    INSERT INTO description_text (description_text, rowid, folded) VALUES ('delete', old.id, old.folded);
END;
CREATE TRIGGER described_gone AFTER DELETE ON described
WHEN NOT EXISTS (SELECT 1 FROM described WHERE description = old.description) BEGIN
    DELETE FROM description WHERE id = old.description;
END;
CREATE TRIGGER item_new AFTER INSERT ON item WHEN new.description != '' BEGIN
    {ADD}
END;
CREATE TRIGGER item_described_anew AFTER UPDATE OF description ON item WHEN new.description IS NOT old.description BEGIN
    {REMOVE}
    {ADD}
END;
CREATE TRIGGER item_gone AFTER DELETE ON item WHEN old.description != '' BEGIN
    {REMOVE}
END;
"""
# Not INSERT OR IGNORE: inside a trigger the conflict clause of the statement outside counts.
_ADD = """INSERT INTO description (folded) SELECT folded(new.description) WHERE new.description != ''
        AND NOT EXISTS (SELECT 1 FROM description WHERE folded = folded(new.description));
    INSERT INTO described SELECT id, new.pat_num, new.kind, new.num FROM description
        WHERE new.description != '' AND folded = folded(new.description);"""
_REMOVE = """DELETE FROM described WHERE (pat_num, kind, num) = (old.pat_num, old.kind, old.num)
        AND description = (SELECT id FROM description WHERE folded = folded(old.description));"""


@migrations()
def text_search(db: Database) -> None:
    """What `find --text` searches. Triggers keep it right; they need the function `folded`, which class Index gives."""
    text = _TEXT_SEARCH.replace("{ADD}", _ADD).replace("{REMOVE}", _REMOVE)
    for statement in re.split(r";\n(?=CREATE|INSERT)", text):
        db.conn.execute(statement)


_RECOVERY = """
CREATE TABLE absence (        -- times that are over: an item had vanished, and was listed again
    pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL, vanished_at REAL NOT NULL,
    back_at REAL NOT NULL, became TEXT, PRIMARY KEY (pat_num, kind, num, back_at)
) STRICT, WITHOUT ROWID;
CREATE TABLE tombstone (      -- destroyed by order, and never fetched again under this patient
    pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL,
    seq INTEGER NOT NULL,     -- one for all that one order destroyed
    at REAL NOT NULL, actor TEXT NOT NULL, ticket TEXT NOT NULL,
    digests TEXT NOT NULL,    -- JSON: sha256 of every version that was destroyed
    done_at REAL,             -- nothing of it is left here; NULL: ordered, and under way
    PRIMARY KEY (pat_num, kind, num)
) STRICT, WITHOUT ROWID;
CREATE INDEX tombstone_open ON tombstone (done_at) WHERE done_at IS NULL;
CREATE TABLE put_back (       -- archived documents that were, or shall be, put back into Open Dental
    id INTEGER PRIMARY KEY AUTOINCREMENT, pat_num INTEGER NOT NULL, kind TEXT NOT NULL, num INTEGER NOT NULL,
    seq INTEGER NOT NULL,     -- of the version whose bytes are sent
    fields TEXT NOT NULL,     -- JSON: what is sent with them, under the vendor's names
    state TEXT NOT NULL,      -- wanted, checked, staged, asked, unanswered; done, refused, lost
    actor TEXT NOT NULL, made_at REAL NOT NULL, absent_at REAL, listed_at REAL, asked_at REAL, staging TEXT,
    known TEXT NOT NULL DEFAULT '[]',  -- JSON: the patient's document numbers before it was sent
    looks INTEGER NOT NULL DEFAULT 0, next_look_at REAL NOT NULL DEFAULT 0, became INTEGER, outcome TEXT
) STRICT;
CREATE INDEX put_back_open ON put_back (pat_num) WHERE state NOT IN ('done', 'refused', 'lost') OR staging IS NOT NULL;
"""


@migrations()
def recovery_tables(db: Database) -> None:
    """What `restore --as-of`, `destroy` and `put-back` remember."""
    for statement in _RECOVERY.split(";\n"):
        if statement.strip():
            db.conn.execute(statement)


@migrations()
def large_indexes(db: Database) -> None:
    """A status of a million documents, and the oldest list of eighty thousand, without reading whole tables."""
    db.conn.execute("DROP INDEX version_archived")
    db.conn.execute("CREATE INDEX version_archived ON version (archived_at, sidecar, version, bytes)")
    db.conn.execute("CREATE INDEX list_polled ON list (polled_at)")


@migrations()
def appointments(db: Database) -> None:
    """Who is expected when, as the appointments' hint saw it: `export --day`. Days are the office's own."""
    db.conn.execute("CREATE TABLE appointment_day (day TEXT PRIMARY KEY, seen_at REAL NOT NULL) STRICT, WITHOUT ROWID")
    db.conn.execute(
        "CREATE TABLE appointment (day TEXT NOT NULL REFERENCES appointment_day ON DELETE CASCADE,"
        " starts_at REAL NOT NULL, pat_num INTEGER NOT NULL, PRIMARY KEY (day, starts_at, pat_num))"
        " STRICT, WITHOUT ROWID"
    )


def connect(path: Path, looks: bool = False) -> sqlite3.Connection:
    """A connection to an index, which is made, 0600, where there is none. Raises sqlite3.Error, OSError.

    `looks`: changes no file. Where nobody else has it open, SQLite then makes none beside it, either.
    """
    rest: dict[str, Any] = {"timeout": 30, "isolation_level": None, "check_same_thread": False}
    connection: sqlite3.Connection
    if looks:
        log = path.with_name(path.name + "-wal")
        alone = "" if log.exists() else "&immutable=1"
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{alone}", uri=True, **rest)
    else:
        if not path.exists():  # its -wal and -shm take over its mode. An open file is left alone: closing it here
            path.touch(0o600)  # would drop the locks of this process (sqlite.org/howtocorrupt.html, 2.2)
        path.chmod(0o600)
        connection = sqlite3.connect(path, cached_statements=STATEMENTS, **rest)
    connection.create_function("folded", 1, lambda text: folded(text or ""), deterministic=True)
    return connection


def number_of(db: Database) -> int:
    """The number of an index's schema; 0 where there is none yet.

    Raises ConfigError where a later syncd migrated it: what this one would write there is not known.
    """
    known, applied = _names(migrations), {migration.name for migration in migrations.applied(db)}
    if applied - known:
        found = f"index.db is of schema {len(known | applied)}, this syncd knows schema {len(known)}"
        raise ConfigError((f"{found}: install the later syncd again, or put back the index from before it",))
    return len(applied)


def is_older(db: Database, before_migrating: BeforeMigrating | None) -> bool:
    """Whether an index has to be migrated; what an earlier syncd left is then given to `before_migrating`, first."""
    older = (number := number_of(db)) < len(_names(migrations))
    if older and number and before_migrating:
        before_migrating(db.conn, number)
    return older


@functools.cache
def _names(migrations: Migrations) -> frozenset[str]:
    return frozenset(migration.name for migration in migrations.pending(Database(memory=True)))


def row_checksum(version: Version) -> str:
    """16 hex digits over all that a row of table version says but `checked_at`: a silently wrong row is noticed."""
    item = version.item
    place = (version.seq, item.pat_num, item.kind, item.num, version.version, version.sidecar, version.path)
    content = (version.revision, version.sha256, version.bytes, version.extension, version.media_type)
    times = (float(version.listed_at), float(version.placed_at), float(version.archived_at))
    return _checksum((*place, *content, *times, version.method, json.dumps(version.flags), version.source_revision))


def version_values(version: Version, checked_at: float) -> tuple[object, ...]:
    """A row of table version, in the order of its columns."""
    item = version.item
    return (
        *(version.seq, item.pat_num, item.kind, item.num, version.version, version.sidecar),
        *(version.revision, version.sha256, version.bytes, version.extension, version.media_type),
        *(version.path, version.listed_at, version.placed_at, version.archived_at, version.method),
        *(json.dumps(version.flags), version.source_revision, checked_at, row_checksum(version)),
    )


def newest_values(version: Version) -> tuple[object, ...]:
    """The values of IS_NEWEST."""
    item = version.item
    told = (version.revision, version.version, version.seq, version.sha256, version.bytes, version.media_type)
    return (*told, version.archived_at, version.mount_num, item.pat_num, item.kind, item.num, version.seq)


def row_is_sound(row: Row) -> bool:
    """Whether a row of table version is what was once written."""
    names = "seq pat_num kind num version sidecar path revision sha256 bytes extension media_type listed_at placed_at"
    told = (row[name] for name in f"{names} archived_at method flags source_revision".split())
    return bool(_checksum(tuple(told)) == row["checksum"])


def _checksum(values: tuple[object, ...]) -> str:
    text = "\x1f".join(map(str, values))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def duty_of(row: Row) -> Duty:
    """A row of table duty."""
    key = (row["method"], row["pat_num"], row["num"])
    return Duty(*key, row["revision"], row["why"], row["next_try_at"], row["failures"], row["failure"])


KNOWN = (  # a row of table item, as far as a comparison needs it: what `known_of` takes
    "SELECT pat_num, kind, num, revision, archived_revision, images_revision, coalesce(date_created, ''), pending,"
    " missing_since_at, vanished_at IS NOT NULL, held_by, not_found FROM item"
)


def known_of(row: Sequence[Any]) -> Known:
    """A row of KNOWN. Thousands a second: by place, not by name."""
    pat_num, kind, num, revision, archived, images, created, pending, missing, vanished, held_by, not_found = row
    flags = pending == 1, vanished == 1, not_found == 1
    item = Item(pat_num, kind, num)
    return Known(item, revision, archived, images, created, flags[0], missing, flags[1], held_by, flags[2])


# What another revision than the one listed now made necessary is not any more; what is fetched for other reasons (a
# mount into which an image went is "moved") is of this one. Who was owed something new has its revision already.
_OF_ANOTHER = "method != 'confirm' AND revision != ?1 AND (pat_num, kind, num) = (?2, ?3, ?4)"
OTHER_REVISION = (
    f"DELETE FROM duty WHERE why IN ('listed', 'backfill') AND {_OF_ANOTHER}",  # noqa: S608 - our own text
    f"UPDATE duty SET revision = ?1 WHERE {_OF_ANOTHER}",  # noqa: S608 - as above
)
PUT_ITEM = (  # what a listing says
    "INSERT INTO item (revision, pending, date_created, stamp, category, description, img_type, tooth_numbers,"
    " file_name, fields, pat_num, kind, num, first_seen_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET revision = excluded.revision, pending = excluded.pending, date_created ="
    " excluded.date_created, stamp = excluded.stamp, category = excluded.category, description ="
    " excluded.description, img_type = coalesce(excluded.img_type, img_type), tooth_numbers ="
    " excluded.tooth_numbers, file_name = coalesce(excluded.file_name, file_name), fields = excluded.fields,"
    " not_found = 0"
)
PUT_VERSION = f"INSERT OR IGNORE INTO version VALUES ({', '.join('?' * 20)})"  # noqa: S608 - marks only
IS_NEWEST = (  # of an item, unless a higher seq is there
    "UPDATE item SET archived_revision = ?, current_version = ?, current_seq = ?, sha256 = ?, bytes = ?,"
    " media_type = ?, archived_at = ?, mount_num = coalesce(?, mount_num), not_found = 0"
    " WHERE pat_num = ? AND kind = ? AND num = ? AND coalesce(current_seq, 0) <= ?"
)
PUT_PATIENT = (
    "INSERT INTO patient (pat_num, stamp, status, last_name, first_name, preferred, birthdate,"
    " roster_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET status = excluded.status,"
    " stamp = excluded.stamp, last_name = excluded.last_name, first_name = excluded.first_name,"
    " preferred = excluded.preferred, birthdate = excluded.birthdate,"
    " roster_at = excluded.roster_at, left_at = NULL"
)


def attempt_of(row: Row) -> Attempt:
    """A row of table attempt."""
    names = tuple(PlacedName(number, name) for number, name in json.loads(row["names"]))
    seen = None if row["seen_size"] is None else (row["seen_size"], row["seen_mtime"])
    return Attempt(
        **{name: row[name] for name in ("id", "method", "pat_num", "num", "revision", "staging", "state", "asked_at")},
        **{name: row[name] for name in ("placed_at", "listed_at", "why", "looks", "next_look_at")},
        listed=json.loads(row["listed"]),
        names=names,
        seen=seen,
    )


class DiskErrors:
    """What SQLite says of the disk (`foreign`) becomes SiteError disk_error or state_full; a wrong call stays a bug."""

    def __init__(self, *foreign: type[Exception]) -> None:
        self._foreign = foreign

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            return
        ours = isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError))
        ours = ours or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR  # a statement that is wrong
        if ours or not isinstance(error, self._foreign):
            return
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        reason = state_reason(error)
        raise SiteError(reason, f"index.db: {name}" + _REINDEX * (reason == "disk_error")) from error


_REINDEX = "; if it stays: `syncd reindex`"
DISK = DiskErrors(sqlite3.DatabaseError)  # thousands of times a minute
