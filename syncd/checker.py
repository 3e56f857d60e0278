"""The one checker: what lies in the archive against what the index says of it. Changes nothing, sends nothing.

Each folder is listed once, each sidecar parsed once, each file hashed once. A walk is a stream: a finding, or None for
each piece of work that is done, so that whoever walks can rest, or stop, between any two of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, cast

from syncd.archive import MARKER, ROOT_NAMES, Archive
from syncd.errors import ItemError, SiteError, UnreadableError, Who
from syncd.folders import Entry
from syncd.index import Index
from syncd.model import KINDS, TOMBSTONE, Item, Kind, Version
from syncd.naming import archive_path_is_ours
from syncd.schema import Row, row_is_sound
from syncd.sidecar import decode, iso

Code = Literal[
    "damaged", "missing", "unreadable", "bad_sidecar", "bad_row", "index_damaged", "unrecorded", "wrong_mode",
    "unhealable", "queued", "foreign", "leftover", "unfinished",
]  # fmt: skip
# code -> (who must act, what it means and what to do)
CODES: Final[Mapping[Code, tuple[Who, str]]] = {
    "damaged": ("practice_it", "its bytes are not those that were archived: `syncd verify --repair`"),
    "missing": ("practice_it", "its file is gone: `syncd verify --repair`"),
    "unreadable": ("practice_it", "the disk does not give it: check the disk, then `syncd verify --repair`"),
    "bad_sidecar": ("practice_it", "its sidecar is changed or gone: `syncd verify --repair`"),
    "bad_row": ("practice_it", "its row in the index is wrong: `syncd verify --repair`"),
    "index_damaged": ("practice_it", "index.db is not sound: stop the service, then `syncd reindex`"),
    "unrecorded": ("practice_it", "the index does not know it: `syncd verify --repair`"),
    "wrong_mode": ("practice_it", "its mode was changed: `syncd verify --repair`"),
    "unhealable": ("practice_it", "Open Dental cannot give it again: put it back from a backup of the archive"),
    "queued": ("nobody", "it was set aside and is fetched again"),
    "foreign": ("practice_it", "not syncd's: it is left alone"),
    "leftover": ("nobody", "in flight when a process ended: the next start removes it"),
    "unfinished": ("nobody", "a sidecar whose file never came: used when it does"),
}
HARMLESS: Final = frozenset({"foreign", "leftover", "unfinished"})
OF_MEDIA: Final = frozenset({"damaged", "missing", "unreadable"})
PIECE: Final = 8 << 20  # bytes hashed in one piece of work
_TEXTS: Final = (
    *("kind", "revision", "sha256", "extension", "media_type", "path", "method", "flags", "source_revision"),
    "checksum",
)
_NUMBERS: Final = (*("seq", "pat_num", "num", "version", "sidecar", "bytes", "listed_at", "placed_at", "archived_at"),)
_SAME: Final = ("seq", "version", "sidecar", "sha256", "bytes", "extension", "media_type", "method", "source_revision")
_TIMES: Final = ("listed_at", "placed_at", "archived_at")
_COLUMNS: Final = ", ".join([*_NUMBERS, *(f"CAST({name} AS BLOB) AS {name}" for name in _TEXTS)])
_NEWEST: Final = ("seq", "version", "revision", "sha256", "bytes", "media_type")
_CURRENT: Final = ", ".join(  # what an item's row says of it, and no time: that may be put right there alone
    f"CAST({name} AS BLOB) AS {name}"
    for name in ("current_seq", "current_version", "archived_revision", "sha256", "bytes", "media_type")
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. `path`: relative to the archive, or `index.db` with the row's seq.

    `version` and `seq` are those of the index, or of the sidecar where the index has none; `sidecar`: a sound one of
    this very version, for who mends its row.
    """

    code: Code
    path: str
    item: Item | None = None
    version: int | None = None
    seq: int | None = None
    sidecar: Version | None = None

    @property
    def name(self) -> str:
        """For people and programs: the version where there is one, else the path."""
        if self.item is None:
            return self.path
        return self.item.full_id + (f" version {self.version}" if self.version else "")


Walk = Iterator[Finding | None]


@dataclass
class Tally:
    """How much a walk has looked at so far: files hashed, their bytes, and the rows that were found right."""

    versions: int = 0
    bytes: int = 0
    right: list[int] = field(default_factory=list)


def check(index: Index, archive: Archive, tally: Tally, alone: bool = True) -> Walk:
    """Everything. `alone`: nobody else writes; else what lies in incoming is in flight."""
    if not is_whole(index):
        yield Finding("index_damaged", "index.db")
    for name, entry in archive.survey().items():
        if name not in ROOT_NAMES or (name == "published" and entry.kind != "folder"):
            yield Finding("foreign", name)
        elif name in {"patients", "incoming", "published", MARKER} and not entry.mode_is_right:
            yield Finding("wrong_mode", name)
    published = _survey(archive, "published")
    if published is None:
        yield Finding("unreadable", "published")
    for name, entry in (published or {}).items():
        if not archive_path_is_ours(f"published/{name}"):
            yield Finding("foreign", f"published/{name}")
        elif not entry.mode_is_right:
            yield Finding("wrong_mode", f"published/{name}")
    if alone:
        yield from (Finding("leftover", f"incoming/{name}") for name in archive.survey("incoming"))
    there = archive.survey("patients")
    yield from (Finding("foreign", f"patients/{name}") for name, entry in there.items() if not _patient(name, entry))
    folders = {int(name): entry for name, entry in there.items() if _patient(name, entry)}
    rows = index.rows("SELECT DISTINCT pat_num FROM version")
    for pat_num in sorted({*folders, *(row["pat_num"] for row in rows)}):
        yield from _check_patient(index, archive, pat_num, folders.get(pat_num), tally, alone)


def is_whole(index: Index) -> bool:
    """Whether SQLite finds its own pages in order; what its rows say is another question."""
    try:
        return bool(index.value("PRAGMA integrity_check(1)") == "ok")
    except SiteError:
        return False


def _patient(name: str, entry: Entry) -> bool:
    return entry.kind in ("folder", "unreadable") and archive_path_is_ours(f"patients/{name}/patient.json")


def _check_patient(
    index: Index, archive: Archive, pat_num: int, folder: Entry | None, tally: Tally, alone: bool
) -> Walk:
    top, items = f"patients/{pat_num}", set[tuple[str, int]]()
    for row in index.rows("SELECT DISTINCT CAST(kind AS BLOB) AS kind, num FROM version WHERE pat_num = ?", pat_num):
        items.add((str(text_of(row["kind"])), row["num"]))
    if folder is not None and not folder.mode_is_right:
        yield Finding("wrong_mode", top)
    inside = _survey(archive, top)
    if inside is None:
        yield Finding("unreadable", top)
    names = inside or {}
    for name, entry in names.items():
        kind, _, num = name.rpartition("-")
        if entry.kind in ("folder", "unreadable") and archive_path_is_ours(f"{top}/{name}/1-{'0' * 12}.bin"):
            items.add((kind, int(num)))
            if not entry.mode_is_right:
                yield Finding("wrong_mode", f"{top}/{name}")
        elif name != "patient.json":
            yield Finding("foreign", f"{top}/{name}")
        elif archive.read_patient(pat_num) is None:
            yield Finding("bad_sidecar", f"{top}/{name}")
        elif not entry.mode_is_right:
            yield Finding("wrong_mode", f"{top}/{name}")
    patient = index.patient(pat_num)
    if folder is not None and inside is not None and patient and patient.last_name and "patient.json" not in names:
        yield Finding("missing", f"{top}/patient.json")
    for kind, number in sorted(items):
        yield from check_item(index, archive, Item(pat_num, cast("Kind", kind), number), tally, alone)


def check_item(index: Index, archive: Archive, item: Item, tally: Tally, alone: bool = True) -> Walk:
    """One item, all its versions and sidecars. Where others write, what seems wrong is looked at once more."""
    seen = Tally()
    found = yield from _collected(_Look(index, archive, item, seen).walk())
    if found and not alone:
        seen = Tally()
        found = yield from _collected(_Look(index, archive, item, seen).walk())
    tally.versions, tally.bytes = tally.versions + seen.versions, tally.bytes + seen.bytes
    tally.right += seen.right
    yield from sorted(found, key=lambda each: each.code != "wrong_mode")  # of one path: what is worse, last


def _collected(walk: Walk) -> Generator[None, None, list[Finding]]:
    found: list[Finding] = []
    for each in walk:
        if each is None:
            yield None
        else:
            found.append(each)
    return found


class _Look:
    """One look at one item: its folder and its rows are read at one moment, its files are hashed after that."""

    def __init__(self, index: Index, archive: Archive, item: Item, tally: Tally) -> None:
        self._archive, self._item, self._tally = archive, item, tally
        self._folder = f"patients/{item.pat_num}/{item.id}"
        with archive.publishing:  # in this process nothing is half recorded
            there = _survey(archive, self._folder)
            self._given, self._entries = there is not None, there or {}
            where = "pat_num = ? AND kind = CAST(? AS TEXT) AND num = ? ORDER BY version, sidecar"
            key = (item.pat_num, item.kind.encode(errors="surrogateescape"), item.num)
            rows = index.rows(f"SELECT {_COLUMNS} FROM version WHERE {where}", *key)  # noqa: S608 - our own columns
            self._tombstone = TOMBSTONE in self._entries and archive.read_tombstone(item) is not None
            sql = "SELECT 1 FROM tombstone WHERE pat_num = ? AND kind = CAST(? AS TEXT) AND num = ?"
            self._destroyed = self._tombstone or bool(index.rows(sql, *key))
            sql = f"SELECT {_CURRENT} FROM item WHERE pat_num = ? AND kind = CAST(? AS TEXT) AND num = ?"  # noqa: S608
            self._current = [tuple(row.values()) for row in index.rows(sql, *key)]
            sql = "SELECT path, state FROM damage WHERE pat_num = ? AND kind = CAST(? AS TEXT) AND num = ?"
            self._known = {row["path"]: row["state"] for row in index.rows(sql, *key)}
        self._rows: list[Row] = [row | {name: text_of(row[name]) for name in _TEXTS} for row in rows]
        self._sidecars: dict[str, Version | None] = {}
        self._claimed: set[str] = set()
        self._all_recorded = True

    def walk(self) -> Walk:
        """Everything that is wrong with the item; of one that was destroyed, what an archive put back has of it."""
        if not self._given:
            yield self._finding("unreadable", self._folder)
            return
        if self._destroyed:
            for name in self._entries.keys() - ({TOMBSTONE} if self._tombstone else set()):
                is_folder = self._entries[name].kind == "folder"
                yield self._finding("foreign" if is_folder else "leftover", f"{self._folder}/{name}")
            return
        for name in [name for name in self._entries if name.endswith(".json")]:
            yield from self._read_sidecar(name)
        sound = [version for version in self._sidecars.values() if version is not None]
        told = {version.seq: version for version in sound}
        by_numbers = {(version.version, version.sidecar): version for version in sound}
        for row in self._rows:
            yield from self._check_row(row, told.get(row["seq"], by_numbers.get((row["version"], row["sidecar"]))))
        for name, version in self._sidecars.items():
            if version is not None and name not in self._claimed:
                yield from self._check_unrecorded(name, version)
        yield from self._check_current(told)
        for name in self._entries.keys() - self._claimed:
            path = f"{self._folder}/{name}"
            ours = name in self._sidecars and archive_path_is_ours(path)
            yield self._finding("bad_sidecar" if ours else "foreign", path)
        for name in self._claimed & self._entries.keys():
            if self._entries[name].kind == "file" and not self._entries[name].mode_is_right:
                yield self._finding("wrong_mode", f"{self._folder}/{name}")

    def _finding(
        self, code: Code, path: str, of: Row | Version | None = None, sidecar: Version | None = None
    ) -> Finding:
        """As it is known already: what was set aside is queued, what was tried in vain is unhealable."""
        self._all_recorded &= code not in ("bad_row", "unrecorded")
        known = self._known.get(path)
        if known in ("queued", "unhealable") and code not in ("foreign", "wrong_mode"):
            code = cast("Code", known)
        version = of.version if isinstance(of, Version) else of["version"] if of else None
        seq = of.seq if isinstance(of, Version) else of["seq"] if of else None
        return Finding(code, path, self._item, version, seq, sidecar)

    def _read_sidecar(self, name: str) -> Walk:
        path = f"{self._folder}/{name}"
        try:
            with self._archive.open_file(path) as file:
                version = decode(file.read())
            self._sidecars[name] = version if version is not None and version.sidecar_path == path else None
        except (UnreadableError, OSError):
            self._claimed.add(name)
            yield self._finding("unreadable", path)
        except ItemError:  # no regular file
            self._sidecars[name] = None

    def _check_row(self, row: Row, sidecar: Version | None) -> Walk:
        if not (row_is_sound(row) and _is_of(row, self._item)):
            yield from self._bad_row(row, sidecar)
            return
        path = Path(row["path"])
        suffix = ".json" if row["sidecar"] == 1 else f".{row['sidecar']}.json"
        name, of_sidecar = path.name, path.with_suffix(suffix).name
        if of_sidecar in self._claimed:  # it could not be read, and that was said
            pass
        elif self._sidecars.get(of_sidecar) is None:
            yield self._finding("bad_sidecar", f"{self._folder}/{of_sidecar}", row)
        elif not _agree(row, cast("Version", self._sidecars[of_sidecar])):
            yield self._finding("bad_row", f"index.db seq {row['seq']}", row, self._sidecars[of_sidecar])
        self._claimed.add(of_sidecar)
        if row["sidecar"] == 1:
            yield from self._check_media(name, row["sha256"], row["bytes"], row)

    def _bad_row(self, row: Row, sidecar: Version | None) -> Walk:
        """Nothing that it says is believed; the sidecar of its number, if there is one, speaks for the file."""
        yield self._finding("bad_row", f"index.db seq {row['seq']}", row, sidecar)
        if sidecar is not None:
            self._claimed.add(Path(sidecar.sidecar_path).name)
            if sidecar.sidecar == 1:
                yield from self._check_media(Path(sidecar.path).name, sidecar.sha256, sidecar.bytes, sidecar)

    def _check_current(self, told: Mapping[int, Version]) -> Walk:
        """The item's own row names its newest version: that is what `find`, `show` and `export` go by."""
        newest = max(self._rows, key=lambda row: int(row["seq"]), default=None)
        if newest is None or not self._all_recorded:  # which is the newest is not known yet
            return
        if self._current != [tuple(str(newest[name]).encode(errors="surrogateescape") for name in _NEWEST)]:
            path = f"index.db item {self._item.full_id}"
            yield self._finding("bad_row", path, newest, told.get(newest["seq"]))

    def _check_unrecorded(self, name: str, version: Version) -> Walk:
        media = Path(version.path).name
        self._claimed.add(name)
        if media not in self._entries and version.path in self._known:  # an index that was lost had it
            yield self._finding("missing", version.path, version)
            return
        if media not in self._entries:
            yield self._finding("unfinished", f"{self._folder}/{name}", version)
            return
        yield self._finding("unrecorded", f"{self._folder}/{name}", version, version)
        if media not in self._claimed:
            yield from self._check_media(media, version.sha256, version.bytes, version)

    def _check_media(self, name: str, sha256: str, size: int, of: Row | Version) -> Walk:
        """One archived file: there, regular, readable, of this size and digest."""
        path, entry = f"{self._folder}/{name}", self._entries.get(name)
        self._claimed.add(name)
        self._tally.versions += 1
        self._tally.bytes += size
        if entry is None or entry.kind == "unreadable":
            yield self._finding("unreadable" if entry else "missing", path, of)
            return
        digest, whole = hashlib.sha256(), entry.kind == "file" and entry.bytes == size
        try:
            with self._archive.open_file(path) if whole else contextlib.nullcontext() as file:
                while file is not None and (piece := file.read(PIECE)):
                    digest.update(piece)
                    yield None
        except (UnreadableError, OSError):
            yield self._finding("unreadable", path, of)
            return
        except ItemError:  # it has just gone
            whole = False
        if not whole or digest.hexdigest() != sha256:
            yield self._finding("damaged", path, of)
        elif not isinstance(of, Version):
            self._tally.right.append(of["seq"])


def _survey(archive: Archive, relative: str) -> dict[str, Entry] | None:
    """What lies in a folder; nothing where something else lies in its place; None where the disk does not give it."""
    try:
        return archive.survey(relative)
    except UnreadableError:
        return None
    except ItemError:
        return {}


def text_of(value: bytes | None) -> str | None:
    """A text of the index, whatever became of its bytes."""
    return None if value is None else value.decode(errors="surrogateescape")


def _is_of(row: Row, item: Item) -> bool:
    stem = f"patients/{item.pat_num}/{item.id}/{row['version']}-{row['sha256'][:12]}"
    return item.kind in KINDS and row["path"] == f"{stem}.{row['extension']}"


def _agree(row: Row, version: Version) -> bool:
    """Whether a row and a sidecar tell of the same version; the archive writes times to the microsecond."""
    times = all(iso(row[name]) == iso(getattr(version, name)) for name in _TIMES)
    equal = all(row[name] == getattr(version, name) for name in ("revision", *_SAME))
    return times and equal and row["flags"] == json.dumps(version.flags)
