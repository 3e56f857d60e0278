"""The export: verified copies of patients' documents, each patient with a table and a gallery that need no server.

Copies are never overwritten; one that is there already with the bytes that were archived stays as it is. Only the two
pages that syncd makes itself, `index.html` and `index.csv`, are replaced, at once and as a whole.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import secrets
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Final

from syncd import gallery
from syncd.archive import Archive
from syncd.catalog import Catalog, Row
from syncd.errors import UsageError
from syncd.gallery import Entry, Pages, Person, Visit
from syncd.model import Item, Kind, Version
from syncd.naming import export_name, folder_name
from syncd.retrieve import DamagedError, copy, make_folder, possible_names, target
from syncd.search import Filters
from syncd.service import as_caller

EXPORTED: Final[frozenset[Kind]] = frozenset(("document", "mount", "mount-image", "sheet"))
PAGE_FILES: Final = ("gallery.html", "patients.html", "gallery.css", "gallery.js")  # package data beside this file
PAGE, TABLE, THUMBNAILS = "index.html", "index.csv", "thumbnails"


@dataclass(slots=True)
class Exported:
    """What became of an export.

    `files` and `bytes`: copies that are in the folder now, `kept` of them since before; thumbnails are not counted.
    `damaged`: full ids of what was left out because its file is not what it was. `vanished`: how many items were left
    out because they are not in the practice's listing any more; `owed`: how many are not archived yet. `unknown`:
    patients of whom there is no document. `page`: what to open.
    """

    files: int = 0
    bytes: int = 0
    kept: int = 0
    damaged: list[str] = field(default_factory=list)
    vanished: int = 0
    owed: int = 0
    unknown: list[int] = field(default_factory=list)
    page: Path | None = None


def export(
    catalog: Catalog,
    archive: Archive,
    patients: Mapping[int, Sequence[float]],
    to: Path,
    zone: dt.tzinfo,
    at: float,
    *,
    vanished: bool = False,
    title: str = "",
    facts: Sequence[str] = (),
) -> Exported:
    """Current versions of these patients' items: `TO/101/Lab Cases/2021-04-08 ... .jpg`, a table and a gallery each.

    `patients`: each with the times of its appointments, if a day was asked for; `at`: now (seconds since the epoch).
    With a `title` a page above all of them is made. `vanished`: also what left the listings; else it stays out, for it
    may have been another person's. Raises UsageError when the folder cannot be written, or holds what is not of this
    archive's export.
    """
    work = _Export(catalog, archive, to, zone, _time(at, zone), vanished)
    with target(archive, to):
        if title:
            work.refuse_foreign(to)
        for pat_num, starts in patients.items():
            work.patient(pat_num, starts)
        if title:
            work.overview(title, facts)
    return work.done


class _Export:
    def __init__(self, catalog: Catalog, archive: Archive, to: Path, zone: dt.tzinfo, at: str, vanished: bool) -> None:
        self.done = Exported()
        self._catalog, self._archive, self._to, self._zone, self._vanished = catalog, archive, to, zone, vanished
        self._at, self._id = at, archive.marker_id() or ""
        self._visits: list[Visit] = []
        package = resources.files("syncd")
        self._pages = Pages(*(package.joinpath(name).read_text("utf-8") for name in PAGE_FILES))

    def patient(self, pat_num: int, starts: Sequence[float]) -> None:
        """The copies, then the pages that show them."""
        rows = [row for row in self._catalog.find(Filters(patient=pat_num)) if row["current"] or row["seq"] is None]
        rows = [_in_its_mount(row, rows) for row in rows]
        folder, person, entries = self._to / str(pat_num), self._person(pat_num), list[Entry]()
        if rows:
            self.refuse_foreign(folder)
            entries = self._copies(folder, rows)
            _put(folder / PAGE, gallery.patient_page(self._pages, self._id, person, entries))
            _put(folder / TABLE, "\ufeff" + gallery.table(pat_num, entries))
            self.done.page = folder / PAGE
        else:
            self.done.unknown.append(pat_num)
        copied = sum(not entry.lack for entry in entries)
        times = ", ".join(f"{dt.datetime.fromtimestamp(at, self._zone):%H:%M}" for at in starts)
        self._visits.append(Visit(person, times, copied, len(entries) - copied))

    def overview(self, title: str, facts: Sequence[str]) -> None:
        """The page above all these patients."""
        practice = [f"practice {self._catalog.practice}"] if self._catalog.practice else []
        told = [*practice, *facts, f"exported {self._at}"]
        _put(self._to / PAGE, gallery.patients_page(self._pages, self._id, title, told, self._visits))
        self.done.page = self._to / PAGE

    def _person(self, pat_num: int) -> Person:
        row = self._catalog.person(pat_num)
        first = " ".join(filter(None, (row["first_name"], row["preferred"] and f"“{row['preferred']}”")))
        name = gallery.clean(", ".join(filter(None, (row["last_name"], first))))
        listed = "" if row["listed_at"] is None else _time(row["listed_at"], self._zone)
        return Person(pat_num, name, gallery.clean(row["birthdate"]), self._catalog.practice, listed, self._at)

    def _copies(self, folder: Path, rows: list[Row]) -> list[Entry]:
        """A copy of each item, or why there is none."""
        small = {
            row["num"]: row for row in rows if row["kind"] == "thumbnail" and row["media_type"] in gallery.PICTURES
        }
        taken = dict.fromkeys((PAGE, TABLE, THUMBNAILS), "")
        entries = []
        for row in rows:
            if row["kind"] not in EXPORTED:
                continue
            if _gone(row) and not self._vanished:
                self.done.vanished += 1
                entries.append(Entry(row, lack="vanished"))
            elif row["seq"] is None:
                self.done.owed += 1
                entries.append(Entry(row, lack="owed"))
            else:
                entries.append(self._entry(folder, row, small.get(row["num"]), taken))
        return entries

    def _entry(self, folder: Path, row: Row, small: Row | None, taken: dict[str, str]) -> Entry:
        version = self._version(row)
        if row["kind"] == "mount-image":
            told = {
                "DateCreated": row["date_created"],
                "docCategory": row["category"],
                "Description": row["description"],
            }
            version = replace(version, listing={**version.listing, **told})
        category = _one_spelling(folder_name(row["category"]), taken)
        file = self._copied(version, folder / category, export_name(version), counted=True)
        if file is None:
            return Entry(row, lack="damaged")
        entry = Entry(row | {"archived_at": _time(version.archived_at, self._zone)}, str(file.relative_to(folder)))
        if small is None or row["kind"] not in ("document", "mount-image"):
            return entry
        thumbnail = self._version(small)
        name = f"{thumbnail.item.id}.{gallery.PICTURES[thumbnail.media_type]}"  # it was made under the original's name
        made = self._copied(thumbnail, folder / THUMBNAILS, name, counted=False)
        return Entry(entry.row, entry.file, "" if made is None else str(made.relative_to(folder)))

    def _version(self, row: Row) -> Version:
        """The newest sidecar of the current version: its listing is the item's as it is known now."""
        versions = self._catalog.versions(Item(row["pat_num"], row["kind"], row["num"]))
        return max(versions, key=lambda version: version.seq)

    def _copied(self, version: Version, folder: Path, name: str, *, counted: bool) -> Path | None:
        path = _there(version, folder, name)
        kept = path is not None
        try:
            path = path or copy(self._archive, version, folder, name, self._zone)
        except DamagedError:
            self.done.damaged.append(version.item.full_id)
            return None
        if counted:
            self.done.files, self.done.bytes = self.done.files + 1, self.done.bytes + version.bytes
            self.done.kept += kept
        return path

    @as_caller()
    def refuse_foreign(self, folder: Path) -> None:
        """Pages are replaced only where this archive's export made them: a number means another patient elsewhere."""
        begins = gallery.first_line(self._id).encode()
        try:
            descriptor = os.open(folder / PAGE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            if not os.path.lexists(folder / TABLE):
                return
        except OSError:
            pass  # a link
        else:
            with os.fdopen(descriptor, "rb") as page:
                if page.read(len(begins)) == begins:
                    return
        raise UsageError(f"--to: it holds an {PAGE} or {TABLE} that is not of this practice's export: name another")


@as_caller()
def _put(path: Path, text: str) -> None:
    """Make or replace one of our own pages, as a whole, durably."""
    make_folder(path.parent)
    temporary = path.parent / f".syncd-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as page:
            page.write(text)
            page.flush()
            os.fsync(page.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _in_its_mount(row: Row, rows: list[Row]) -> Row:
    """Open Dental tells nothing of an image in a mount but its number: it is told by its mount."""
    if row["kind"] != "mount-image" or row["description"]:
        return row
    inside = ("mount-image", row["mount_num"])
    images = [each for each in rows if (each["kind"], each["mount_num"]) == inside and (each is row or not _gone(each))]
    for mount in rows:
        if (mount["kind"], mount["num"]) == ("mount", row["mount_num"]):
            words = f"{mount['description'] or 'mount'}, image {images.index(row) + 1} of {len(images)}"
            return row | {"description": words, "date_created": mount["date_created"], "category": mount["category"]}
    return row


def _gone(row: Mapping[str, object]) -> bool:
    return row["state"] == "vanished"


def _time(at: float, zone: dt.tzinfo) -> str:
    return dt.datetime.fromtimestamp(at, zone).isoformat(sep=" ", timespec="minutes")


def _one_spelling(name: str, taken: dict[str, str]) -> str:
    """The folder's name in its first spelling: `BWX` and `bwx` are one folder on Windows and macOS; none of ours."""
    key = unicodedata.normalize("NFC", name.casefold())
    if taken.setdefault(key, name) == "":
        return _one_spelling(f"{name} (category)", taken)
    return taken[key]


@as_caller()
def _there(version: Version, folder: Path, name: str) -> Path | None:
    """The copy of an earlier export under one of its names, if it has the bytes that were archived."""
    for path in possible_names(folder, name):
        try:
            state = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISREG(state.st_mode) and state.st_size == version.bytes and _digest(path) == version.sha256:
            return path
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
