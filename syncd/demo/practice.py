"""The simulated practice: its patients, documents, mounts and sheets, and everything that staff do to them.

Method names say what somebody in the office did. The rules (which stamp moves, which number stays) are the vendor's,
as written in the vendor's pages and in the notes collected beside them; nothing here is arranged to suit a mirror.
"""

import base64
import hashlib
import random
import sqlite3
from dataclasses import dataclass, replace
from typing import Literal

from syncd.demo.clock import Clock
from syncd.demo.files import IMAGE_EXTENSIONS, FileSpec, drawn_size, sheet_pdf
from syncd.demo.schema import CATEGORIES, IMG_TYPES, PAT_STATUSES, SHEET_DEFS, SHEET_TYPES
from syncd.demo.store import Row, Store, locked
from syncd.demo.truth import RAW_MARK, URL_MARK, Event, PatientTruth, collect

_XRAY = 190
_SHARE = "\\\\server\\OpenDentImages"


@dataclass(frozen=True)
class Snapshot:
    """A backup of the practice: rows, next numbers and files."""

    rows: sqlite3.Connection
    next_numbers: dict[str, int]
    specs: dict[int, FileSpec]


class Practice(Store):
    """One Open Dental database with its image store.

    `name` and `seed` go into the files' identities and sizes. `in_database`: the storage method, under which lists
    have a blank filePath. `workstation_offset`: seconds by which the workstations' clocks, which stamp the sheets,
    differ from the server's. `history`: every change of every item, in order.
    """

    def __init__(
        self,
        clock: Clock,
        time_zone: str = "America/Chicago",
        *,
        seed: int = 1,
        name: str | None = None,
        in_database: bool = False,
        workstation_offset: float = 0.0,
    ) -> None:
        super().__init__(clock, time_zone)
        self.name = name or f"demo-{seed}"
        self.rng = random.Random(f"practice {seed}")
        self.in_database = in_database
        self.workstation_offset = workstation_offset
        self.history: list[Event] = []
        self._specs: dict[int, FileSpec] = {}
        self._file_from: dict[int, float] = {}
        self._renderings = 0

    # Patients

    @locked
    def add_patient(
        self, last: str = "Mustermann", first: str = "Max", status: str = "Patient", **columns: object
    ) -> int:
        """A new patient, with invented personal data; `status` by name. Returns the PatNum."""
        rng = self.rng
        row: Row = {
            "LName": last,
            "FName": first,
            "PatStatus": PAT_STATUSES.index(status),
            "Birthdate": f"{rng.randint(1935, 2022)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
            "SSN": f"900{rng.randint(0, 999_999):06}",
            "Address": f"{rng.randint(1, 999)} Nowhere Street",
            "City": "Salem",
            "State": "OR",
            "Zip": "00000",
            "HmPhone": f"(503)555-01{rng.randint(0, 99):02}",
            "Email": f"{first.lower()}@example.org",
        }
        return self.insert("patient", {**row, **columns})

    def touch_patient(self, pat_num: int) -> None:
        """Something in the patient's own row changes (check-in, balance, aging): only that row's stamp moves."""
        self.update("patient", pat_num, {"ChartNumber": f"C{self.rng.randint(1, 10**9)}"})

    def set_patient_status(self, pat_num: int, status: str) -> None:
        """Archive, delete or revive a patient; `status` by name."""
        self.update("patient", pat_num, {"PatStatus": PAT_STATUSES.index(status)})

    @locked
    def merge_patients(self, source: int, into: int) -> None:
        """Merge: the source becomes Archived, its documents keep their DocNum under the other PatNum, sheets and
        mounts too.
        """
        self.need("patient", into)
        for row in self.rows("SELECT DocNum FROM document WHERE PatNum = ?", source):
            self._record("gone", "document", row["DocNum"])
            self.update("document", row["DocNum"], {"PatNum": into, **self._free_name(row["DocNum"], into)})
            self._record("appeared", "document", row["DocNum"])
        for table, key in (("mount", "MountNum"), ("sheet", "SheetNum")):
            found = self.rows(f"SELECT {key} FROM {table} WHERE PatNum = ?", source)  # noqa: S608  (constants)
            for row in found:
                self._record("gone", table, row[key])
                self.update(table, row[key], {"PatNum": into})
                self._record("appeared", table, row[key])
        self.set_patient_status(source, "Archived")

    # Documents

    @locked
    def add_document(
        self,
        pat_num: int,
        extension: str = "jpg",
        *,
        file_name: str | None = None,
        description: str = "",
        size: int | None = None,
        file_after: float = 0.0,
        data: bytes | None = None,
        **columns: object,
    ) -> int:
        """A new document with its file. `size`: bytes, about. `file_after`: seconds until the file is there. Returns
        the DocNum.
        """
        image = extension.lower() in IMAGE_EXTENSIONS
        row: Row = {
            "PatNum": pat_num,
            "Description": description,
            "DateCreated": self.local(),
            "DocCategory": next(iter(CATEGORIES)),
            "ImgType": IMG_TYPES.index("Radiograph" if image else "Document"),
            **columns,
        }
        number = int(row.get("DocNum") or self.next_numbers["document"])
        row["FileName"] = self._unused_name(
            pat_num, file_name or self._default_name(pat_num, number, extension), number
        )
        number = self.insert("document", row)
        wanted = size or drawn_size(random.Random(f"{self.name} {number}"))
        self._specs[number] = FileSpec(self.name, pat_num, "document", number, "1", extension, wanted, data=data)
        if file_after:
            self._file_from[number] = self.now() + file_after
        self._record("appeared", "document", number)
        return number

    @locked
    def edit_document(self, doc_num: int, **columns: object) -> None:
        """Change columns of the row (default: another description); the stamp moves if one really changes, the bytes
        stay.
        """
        changes = columns or {"Description": f"edited {self.rng.randint(1, 10**9)}"}
        if self.update("document", doc_num, changes):
            self._record("stamped", "document", doc_num)

    @locked
    def replace_bytes(self, doc_num: int, *, bump: bool = True, data: bytes | None = None) -> None:
        """New bytes in the same file. `bump=False`: another program edited the file, so the stamp does not move."""
        old = self._specs[doc_num]
        content = str(int(old.content) + 1)
        self._specs[doc_num] = replace(old, content=content, data=data)
        if bump:
            self.update("document", doc_num, {"WindowingMin": int(content)})
        self._record("changed", "document", doc_num)

    @locked
    def delete_document(self, doc_num: int) -> None:
        """Delete row and file; no trace is left."""
        self._record("gone", "document", doc_num)
        self.delete("document", doc_num)
        self._specs.pop(doc_num, None)

    @locked
    def move_document(self, doc_num: int, to_pat: int, *, keep_number: bool = False) -> int:
        """Move to patient: a new DocNum there and a delete here; or the same number. Returns the DocNum."""
        row, spec = self.need("document", doc_num), self._specs.get(doc_num)
        if keep_number:
            self._record("gone", "document", doc_num)
            self.update("document", doc_num, {"PatNum": to_pat, **self._free_name(doc_num, to_pat)})
            self._record("appeared", "document", doc_num)
            return doc_num
        self.delete_document(doc_num)
        return self._insert_again(row, spec, PatNum=to_pat, MountItemNum=0)

    # Uploaded rows, whose file exists only once somebody has opened them

    def add_raw_document(self, pat_num: int, data: bytes, extension: str = ".jpg", **columns: object) -> int:
        """A row as `Documents POST Upload` makes it: the file stands base64-coded in Note. Returns the DocNum."""
        note = f"{RAW_MARK}{extension}_{base64.b64encode(data).decode()}"
        return self._add_virtual(
            pat_num, note, FileSpec(self.name, pat_num, "document", 0, "1", extension, data=data), columns
        )

    def add_url_document(self, pat_num: int, url: str, **columns: object) -> int:
        """A row as `Documents POST SetByUrl` makes it: the office has not fetched the file yet. Returns the DocNum."""
        return self._add_virtual(pat_num, URL_MARK + url, None, columns)

    @locked
    def materialise(self, doc_num: int) -> int:
        """Somebody clicks on an uploaded row: a new DocNum with a real file, and the old row is deleted. Returns the
        new one.
        """
        row, spec = self.need("document", doc_num), self._specs.get(doc_num)
        if not row["Note"].startswith((RAW_MARK, URL_MARK)):
            raise ValueError(f"document {doc_num} has its file already")
        self.delete_document(doc_num)
        number, pat_num = self.next_numbers["document"], row["PatNum"]
        if spec is None:
            spec = FileSpec(self.name, pat_num, "document", number, "1", "jpg")
        extension = spec.extension.lstrip(".")
        name = self._unused_name(pat_num, self._default_name(pat_num, number, extension), number)
        return self._insert_again(row, replace(spec, extension=extension), Note="", FileName=name)

    @locked
    def _add_virtual(self, pat_num: int, note: str, spec: FileSpec | None, columns: dict[str, object]) -> int:
        row: Row = {
            "PatNum": pat_num,
            "FileName": self._unused_name(pat_num, "x", 0),
            "DateCreated": self.local(),
            "DocCategory": next(iter(CATEGORIES)),
            **columns,
            "Note": note,
        }
        number = self.insert("document", row)
        if spec is not None:
            self._specs[number] = replace(spec, num=number)
        self._record("appeared", "document", number)
        return number

    def _insert_again(self, row: Row, spec: FileSpec | None, **columns: object) -> int:
        """The same document as a new row."""
        fresh = {**row, **columns, "DocNum": self.next_numbers["document"]}
        del fresh["DateTStamp"]
        fresh["FileName"] = self._unused_name(fresh["PatNum"], fresh["FileName"], fresh["DocNum"])
        number = self.insert("document", fresh)
        if spec is not None:
            self._specs[number] = spec
        self._record("appeared", "document", number)
        return number

    # Mounts

    @locked
    def add_mount(
        self, pat_num: int, images: int = 4, description: str = "4BW", extension: str = "jpg", **columns: object
    ) -> int:
        """A new mount with that many images inside. Returns the MountNum."""
        row: Row = {
            "DocCategory": _XRAY,
            **columns,
            "PatNum": pat_num,
            "Description": description,
            "DateCreated": self.local(),
        }
        mount_num = self.insert("mount", row)
        for _ in range(images):
            item = self._add_mount_item(mount_num)
            self.add_document(pat_num, extension, MountItemNum=item, DocCategory=row["DocCategory"])
        self._record("appeared", "mount", mount_num)
        return mount_num

    @locked
    def change_mount(self, mount_num: int, **columns: object) -> None:
        """Change the mount's fields (default: its description); no stamp moves, because mounts have none."""
        changes = columns or {"Description": f"edited {self.rng.randint(1, 10**9)}"}
        if self.update("mount", mount_num, changes):
            self._record("changed", "mount", mount_num)

    @locked
    def delete_mount(self, mount_num: int) -> None:
        """Delete a mount with its images."""
        for row in self.mount_images(mount_num):
            self.delete_document(row["DocNum"])
        self._record("gone", "mount", mount_num)
        self.delete("mount", mount_num)
        self.db.execute("DELETE FROM mountitem WHERE MountNum = ?", (mount_num,))

    @locked
    def move_into_mount(self, doc_num: int, mount_num: int) -> None:
        """An image goes into a mount: it leaves the listing, the single GET still answers, its stamp moves."""
        self._record("gone", "document", doc_num)
        self.update("document", doc_num, {"MountItemNum": self._add_mount_item(mount_num)})
        self._record("appeared", "document", doc_num)

    @locked
    def out_of_mount(self, doc_num: int) -> None:
        """An image leaves its mount and is listed again; its stamp moves."""
        item = self.need("mountitem", self.need("document", doc_num)["MountItemNum"])
        self._record("gone", "document", doc_num)
        self.update("document", doc_num, {"MountItemNum": 0})
        self._record("appeared", "document", doc_num)
        self._record("changed", "mount", item["MountNum"])

    def mount_images(self, mount_num: int) -> list[Row]:
        """The document rows inside a mount, by position."""
        sql = "SELECT d.* FROM document d JOIN mountitem i ON i.MountItemNum = d.MountItemNum WHERE i.MountNum = ?"
        return self.rows(f"{sql} ORDER BY i.ItemOrder, d.DocNum", mount_num)

    def _add_mount_item(self, mount_num: int) -> int:
        taken = len(self.rows("SELECT 1 FROM mountitem WHERE MountNum = ?", mount_num))
        self.need("mount", mount_num)
        row = {
            "MountNum": mount_num,
            "Xpos": 100 * taken,
            "Ypos": 0,
            "ItemOrder": taken + 1,
            "Width": 100,
            "Height": 75,
        }
        return self.insert("mountitem", row)

    # Sheets

    @locked
    def add_sheet(self, pat_num: int, sheet_def: int = 24, *, stamp: str | None = None, **columns: object) -> int:
        """A new sheet, stamped by a workstation's clock, or with `stamp` as very old ones. Returns the SheetNum."""
        kind, description = SHEET_DEFS[sheet_def]
        row: Row = {
            "SheetType": SHEET_TYPES.index(kind),
            "Description": description,
            "SheetDefNum": sheet_def,
            "PatNum": pat_num,
            "DateTimeSheet": self.local(),
            "DateTSheetEdited": stamp or self._workstation_now(),
        }
        num = self.insert("sheet", {**row, **columns})
        self._record("appeared", "sheet", num)
        return num

    @locked
    def edit_sheet(self, sheet_num: int, **columns: object) -> None:
        """Somebody presses OK in a sheet: the stamp moves, even where nothing else changes."""
        self.update("sheet", sheet_num, {**columns, "DateTSheetEdited": self._workstation_now()})
        self._record("changed", "sheet", sheet_num)

    @locked
    def delete_sheet(self, sheet_num: int) -> None:
        """A deleted sheet is only flagged, and leaves the list."""
        self._record("gone", "sheet", sheet_num)
        self.update("sheet", sheet_num, {"IsDeleted": 1})

    def render_sheet(self, sheet_num: int) -> bytes:
        """The sheet's PDF, rendered anew: other bytes at each call, the same SheetNum, PatNum and stamp inside."""
        row = self.need("sheet", sheet_num)
        self._renderings += 1
        rendering = f"{self.local()} no. {self._renderings}"
        return sheet_pdf(self.name, row["PatNum"], sheet_num, row["DateTSheetEdited"], row["Description"], rendering)

    def _workstation_now(self) -> str:
        return self.local(self.now() + self.workstation_offset)

    # Appointments

    def add_appointment(self, pat_num: int, at: float, **columns: object) -> int:
        """An appointment at `at` (seconds since the epoch). Returns the AptNum."""
        return self.insert("appointment", {"PatNum": pat_num, "AptDateTime": self.local(at), **columns})

    # Files

    def spec(self, doc_num: int) -> FileSpec | None:
        """What the document's file holds; None for rows whose file the office has not fetched."""
        return self._specs.get(doc_num)

    def file_is_there(self, doc_num: int) -> bool:
        """False while the row exists but its file does not yet."""
        return doc_num in self._specs and self.now() >= self._file_from.get(doc_num, 0.0)

    def has_thumbnail(self, doc_num: int) -> bool:
        """Thumbnails are made of standard image files outside mounts."""
        row, spec = self.row("document", doc_num), self._specs.get(doc_num)
        if row is None or spec is None or row["MountItemNum"] or not self.file_is_there(doc_num):
            return False
        return "." in row["FileName"] and spec.extension.lower() in IMAGE_EXTENSIONS

    def thumbnail(self, doc_num: int, *, grey: bool = False) -> bytes:
        """The document's thumbnail, 100 x 100, in the original's format; `grey`: the placeholder of a failed one."""
        spec = self._specs[doc_num]
        return replace(spec, kind="thumbnail", num=doc_num, size=0, grey=grey, data=None).render()

    @locked
    def composite(self, mount_num: int) -> FileSpec:
        """The mount as one picture: the same bytes as long as neither its fields nor its images change."""
        mount = self.need("mount", mount_num)
        state = repr(sorted(mount.items()))
        for image in self.mount_images(mount_num):
            spec = self._specs[image["DocNum"]]
            state += f"|{image['DocNum']} {image['MountItemNum']} {spec.content} {spec.pat_num}"
        digest = hashlib.sha256(state.encode()).hexdigest()[:12]
        return FileSpec(self.name, mount["PatNum"], "mount", mount_num, digest, "jpg", 2_500)

    def file_path(self, row: Row) -> str:
        """The full Windows path of a document's file; blank where files are in the database."""
        return self.folder_path(row["PatNum"]) + row["FileName"] if not self.in_database else ""

    def folder_path(self, pat_num: int) -> str:
        """The Windows path of a patient's folder, with its last backslash; blank where files are in the database."""
        if self.in_database:
            return ""
        patient = self.need("patient", pat_num)
        name = "".join(c for c in patient["LName"] + patient["FName"] if c.isalpha()) or "X"
        return f"{_SHARE}\\{name[0]}\\{name}{pat_num}\\"

    def _default_name(self, pat_num: int, doc_num: int, extension: str) -> str:
        """The vendor's own naming: letters of the patient's name, and the DocNum."""
        patient = self.need("patient", pat_num)
        name = "".join(c for c in patient["LName"] + patient["FName"] if c.isalpha())
        return f"{name}{doc_num}.{extension}"

    def _unused_name(self, pat_num: int, name: str, doc_num: int) -> str:
        """No two files of a patient's folder have the same name."""
        sql = "SELECT 1 FROM document WHERE PatNum = ? AND FileName = ?"
        while self.rows(sql, pat_num, name):
            stem, dot, extension = name.rpartition(".")
            name = f"{stem}_{doc_num}{dot}{extension}" if dot else name + "x"
        return name

    def _free_name(self, doc_num: int, pat_num: int) -> Row:
        return {"FileName": self._unused_name(pat_num, self.need("document", doc_num)["FileName"], doc_num)}

    # Backups and truth

    @locked
    def snapshot(self) -> Snapshot:
        """A backup of the practice as it is now."""
        return Snapshot(self.copy_rows(), dict(self.next_numbers), dict(self._specs))

    @locked
    def restore_from_backup(self, snapshot: Snapshot) -> None:
        """The practice goes back to a backup: what came after it is gone, and its numbers will be given again."""
        snapshot.rows.backup(self.db)
        self.next_numbers, self._specs = dict(snapshot.next_numbers), dict(snapshot.specs)

    @locked
    def truth(self) -> dict[int, PatientTruth]:
        """What a perfect mirror must hold now, by PatNum."""
        return collect(self)

    def _record(self, what: Literal["appeared", "changed", "stamped", "gone"], kind: str, num: int) -> None:
        """Write into the history; a change of an image in a mount is a change of the mount as well."""
        row, spec = self.need(kind, num), None
        stamp = row.get("DateTStamp") or row.get("DateTSheetEdited") or ""
        if kind == "mount":
            spec = self.composite(num)
        elif kind == "document":
            spec = self._specs.get(num)
            if row["MountItemNum"]:
                kind = "mount-image"
        self.history.append(Event(self.now(), what, kind, num, row["PatNum"], stamp, spec))
        if kind == "mount-image" and what != "gone":
            self._record_mount_of(row)

    def _record_mount_of(self, image: Row) -> None:
        mount_num = self.need("mountitem", image["MountItemNum"])["MountNum"]
        spec = self.composite(mount_num)
        self.history.append(Event(self.now(), "changed", "mount", mount_num, image["PatNum"], "", spec))
