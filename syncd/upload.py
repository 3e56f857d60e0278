"""Putting an archived document back into Open Dental (`syncd put-back`): the one thing that writes there.

A row of table `put_back` goes through both lanes, so that a crash between any two steps heals: `wanted` (the office is
asked whether it has the document: its number by the single GET, its patient by a fresh complete listing) -> `checked`
(the pull lane puts the archived file on the drop) -> `staged` -> `asked` (UploadSftp, once) -> `done`, with the new
number. An answer that does not come is never asked for again: `unanswered` looks into complete listings for a new
document of that patient, date and category; without one in a day it is `lost`, and a person has to look.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from syncd.catalog import Catalog
from syncd.diff import NO_STAMP
from syncd.errors import (
    ItemError,
    NoSuchMethodError,
    SiteError,
    SyncdError,
    TransientError,
    UnansweredError,
    UsageError,
)
from syncd.index import Index
from syncd.listing import Lists, ListStep, Step
from syncd.model import DESTROYED, WAS, FieldValue, Item, Listed, ListKey, Uploaded, Version
from syncd.naming import bare_description, own_extension, staging_name
from syncd.pacing import retry_delay
from syncd.schema import Row
from syncd.sites import Doors

if TYPE_CHECKING:
    from syncd.archive import Archive

SENT: Final = ("Description", "DateCreated", "DocCategory", "ImgType", "ToothNumbers", "ProvNum", "PrintHeading")
NEVER_SENT: Final = (  # what UploadSftp cannot set
    "Note",
    "file name: Open Dental takes that of the staged file",
    "DocNum and DateTStamp: they are new",
    "crop, rotation, brightness, drawings, signature, and a place in a mount",
)
WHY_NOT: Final = {
    "mount": "a mount cannot be uploaded: `restore` its images, and mount them anew in Open Dental",
    "mount-image": "an image cannot be uploaded into its mount: `restore` it, and import it in Open Dental",
    "sheet": "a sheet cannot be uploaded, only its PDF: `restore` it, and import it in Open Dental",
    "thumbnail": "Open Dental makes thumbnails by itself",
}
LOOKS: Final = (60.0, 600.0, 3600.0, 86_400.0)  # seconds after an unanswered upload: its document may come late
FRESH: Final = 300.0  # seconds that the office's word for not having the document is good for
NOT_ALLOWED: Final = (
    "the configuration has no `[api] allow_upload = true`; a service that runs learns of it at its start"
)
ENDED: Final = ("done", "refused", "lost")
OPEN: Final = "state NOT IN ('done', 'refused', 'lost')"
LOST: Final = "Open Dental did not answer and lists no such document: look there before you try again"


def plan(catalog: Catalog, archive: Archive, item: Item) -> Row:
    """What would be sent: `version`, `seq`, `fields`; `unknown`: fields that the listing did not tell, so that Open
    Dental's default stands. Raises UsageError: nothing of this item can be put back.
    """
    index = catalog.index
    if item.kind in WHY_NOT:
        raise UsageError(f"{item.full_id}: {WHY_NOT[item.kind]}")
    version, patient = (
        catalog.as_of(item),
        index.value("SELECT left_at IS NULL FROM patient WHERE pat_num = ?", item.pat_num),
    )
    if version is None or not archive.intact(version):
        raise UsageError(f"{item.full_id} has no archived file that is whole: see `syncd history` and `syncd verify`")
    if not patient or _merged(index, item.pat_num):
        raise UsageError(f"patient-{item.pat_num} is not in Open Dental any more, or was merged with another one")
    _refuse_elsewhere(index, item)
    if index.value(f"SELECT 1 FROM put_back WHERE pat_num = ? AND num = ? AND {OPEN}", item.pat_num, item.num):  # noqa: S608 - our own text
        raise UsageError(f"{item.full_id} is being put back already: see `syncd history {item.id}`")
    told = archive.read_sidecar(version) or version
    fields = _fields(told)
    unknown = [name for name in SENT if told.listing.get(name) is None]
    return {
        "version": version.version,
        "seq": version.seq,
        "bytes": version.bytes,
        "fields": fields,
        "unknown": unknown,
    }


def _merged(index: Index, pat_num: int) -> bool:
    """An archived patient of whom a document is another patient's by now."""
    sql = "SELECT 1 FROM item JOIN patient p USING (pat_num) WHERE pat_num = ?1 AND p.status = 'Archived' AND became"
    return index.value(f"{sql} LIKE '%/%' AND became NOT LIKE ?1 || '/%'", pat_num) is not None


def _refuse_elsewhere(index: Index, item: Item) -> None:
    became = str(index.item_rows(item)[0]["became"] or "")
    pat_num, _, rest = became.partition("/")
    kind, _, num = rest.rpartition("-")
    if became and became != DESTROYED:
        sql = "SELECT vanished_at FROM item WHERE pat_num = ? AND kind = ? AND num = ?"
        if index.value(sql, int(pat_num), kind, int(num)) is None:  # perhaps not even listed yet
            raise UsageError(f"{item.full_id} is in Open Dental as {became}")


def _fields(version: Version) -> dict[str, FieldValue]:
    """The listing as UploadSftp takes it; what is empty or unknown is left to its default."""
    listing = version.listing
    created = str(listing.get("DateCreated") or "")
    fields = {name: listing.get(name) for name in SENT}
    fields["Description"] = bare_description(str(listing.get("Description") or ""), created)
    fields["DateCreated"] = None if created in NO_STAMP else created
    return {name: value for name, value in fields.items() if value not in (None, "", 0)}


def want(index: Index, item: Item, seq: int, now: float, actor: str) -> str:
    """Write down that this version shall be put back; the lanes do it."""
    with index.transaction():
        sql = "INSERT INTO put_back (state, fields, pat_num, kind, num, seq, actor, made_at) VALUES ('wanted', '{}'"
        index.run(sql + ", ?, ?, ?, ?, ?, ?)", item.pat_num, item.kind, item.num, seq, actor, now)
        index.record("put_back", now, actor, item=item.full_id, seq=seq)
    return f"{item.full_id} is put back"


def latest(index: Index, item: Item) -> Row | None:
    """The newest put-back of an item."""
    sql = "SELECT * FROM put_back WHERE pat_num = ? AND kind = ? AND num = ? ORDER BY id DESC LIMIT 1"
    return next(iter(index.rows(sql, item.pat_num, item.kind, item.num)), None)


def ended(index: Index, item: Item, clean: bool = False) -> str | None:
    """The state of the newest put-back of an item, once it has ended; `clean`: and the drop is as it was."""
    row = latest(index, item)
    over = row is not None and row["state"] in ENDED and not (clean and row["staging"])
    return row["state"] if row is not None and over else None


def flags_of(index: Index, item: Item) -> tuple[str, ...]:
    """The flag that the sidecar of a document bears which was put back: its old number."""
    sql = "SELECT pat_num, kind, num FROM put_back WHERE pat_num = ? AND became = ? AND kind = ? LIMIT 1"
    rows = index.rows(sql, item.pat_num, item.num, item.kind)
    return tuple(WAS + _item(row).full_id for row in rows)


def settle(index: Index, row: Row, state: str, outcome: str, now: float, became: int | None = None) -> None:
    """A put-back has ended; `became`: the new DocNum, to which the old history leads from now on."""
    item = _item(row)
    with index.transaction():
        sql = "UPDATE put_back SET state = ?, outcome = ?, became = ?, fields = '{}',"
        sql += " looks = 0, next_look_at = 0 WHERE id = ?"  # its file leaves the drop now
        index.run(sql, state, outcome, became, row["id"])
        new = None if became is None else Item(item.pat_num, item.kind, became).full_id
        if new is not None:
            index.set_item(item, "became = ?", new)
        sha256 = index.value("SELECT sha256 FROM version WHERE seq = ?", row["seq"])
        told = {"item": item.full_id, "became": new, "seq": row["seq"], "sha256": sha256, "outcome": state}
        index.record("put_back_ended", now, row["actor"], f"put-back-{row['id']}-{row['made_at']:.0f}", **told)


class UploadStep:
    """The one request that writes into Open Dental, journalled before it is sent."""

    bulk = False

    def __init__(self, uploads: Uploads, row: Row) -> None:
        self._uploads, self._row = uploads, row

    def ask(self) -> Uploaded:
        """POST /documents/UploadSftp."""
        row = self._row
        fields: dict[str, FieldValue] = json.loads(row["fields"])
        answer: Uploaded = self._uploads.doors.api.upload_document(row["pat_num"], row["staging"], fields)
        return answer

    def take(self, answer: object, now: float) -> Step | None:
        """201: the document has a new number."""
        if isinstance(answer, Uploaded):
            self._uploads.uploaded(self._row, answer.doc_num, now, answer.lacking)
        return None

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """Refused, never sent, or nobody knows."""
        index, row = self._uploads.doors.index, self._row
        if isinstance(error, UnansweredError) or not isinstance(error, (ItemError, SiteError, TransientError)):
            sql = "UPDATE put_back SET state = 'unanswered', looks = 0, next_look_at = ? WHERE id = ?"
            index.run(sql, now + LOOKS[0], row["id"])
        elif isinstance(error, TransientError):
            self.abandon()
            again = now + retry_delay(row["looks"])
            index.run("UPDATE put_back SET next_look_at = ? WHERE id = ?", again, row["id"])
        else:
            settle(index, row, "refused", f"Open Dental refuses it: {error}", now)
        return None

    def abandon(self) -> None:
        """Not sent: the office is asked again whether it has the document."""
        self._uploads.doors.index.run(
            "UPDATE put_back SET state = 'staged', absent_at = NULL, asked_at = NULL WHERE id = ?", self._row["id"]
        )

    def outdated(self, now: float) -> bool:
        """Whether the office's word for not having it is too old by now."""
        return not is_fresh(self._row, now)


class AbsenceStep:
    """GET the document by its number: does the office have it?"""

    bulk = False

    def __init__(self, uploads: Uploads, row: Row) -> None:
        self._uploads, self._row = uploads, row

    def ask(self) -> Listed | None:
        """GET /documents/N."""
        return self._uploads.doors.api.document(self._row["num"])

    def take(self, answer: object, now: float) -> Step | None:
        """Not found, or another document by now: the listing is asked next."""
        index, row = self._uploads.doors.index, self._row
        if isinstance(answer, Listed):
            known = index.known_item(_item(row))
            if known is None or answer.date_created == known.date_created:
                settle(index, row, "refused", f"Open Dental has it, of patient-{answer.item.pat_num}", now)
                return None
        index.run("UPDATE put_back SET absent_at = ? WHERE id = ?", now, row["id"])
        return ListStep(self._uploads.lists, (row["pat_num"], "documents"), self._uploads.lists.limit)

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """An office that lacks the method is believed by its complete listing alone."""
        return self.take(None, now) if isinstance(error, NoSuchMethodError) else None

    def abandon(self) -> None:
        """It is asked later."""


class Uploads:
    """The API lane's part."""

    def __init__(self, doors: Doors, lists: Lists) -> None:
        self.doors, self.lists = doors, lists
        lists.seen = self.listed
        sql = "UPDATE put_back SET state = 'unanswered', looks = 0 WHERE state = 'asked'"  # the last process ended
        doors.index.run(sql)

    def next(self, now: float) -> Step | None:
        """The next request of a put-back, if any is under way; none before the archive shows how old the index is."""
        sql = "SELECT * FROM put_back WHERE state IN ('wanted', 'staged', 'unanswered') AND next_look_at <= ?"
        sql += " AND NOT EXISTS (SELECT 1 FROM site WHERE lane = 'archive') LIMIT 1"
        for row in self.doors.index.rows(sql, now):
            if not self.doors.settings.api.allow_upload and row["state"] != "unanswered":
                settle(self.doors.index, row, "refused", NOT_ALLOWED, now)
            elif row["state"] == "unanswered":
                return self._look(row, now)
            elif not is_fresh(row, now):
                return self._absence(row, now)
            elif row["state"] == "staged":
                self.doors.index.run("UPDATE put_back SET state = 'asked', asked_at = ? WHERE id = ?", now, row["id"])
                return UploadStep(self, row)
        return None

    def _absence(self, row: Row, now: float) -> Step:
        """Ask for it by its number, then by the list. Whatever of that fails: others go before it is tried again."""
        looks = row["looks"] + 1
        sql = "UPDATE put_back SET looks = ?, next_look_at = ? WHERE id = ?"
        self.doors.index.run(sql, looks, now + retry_delay(looks), row["id"])
        return AbsenceStep(self, row)

    def _look(self, row: Row, now: float) -> Step | None:
        """Read the list: `listed` recognises what came of it."""
        looks = row["looks"] + 1
        if looks > len(LOOKS) + 2:  # nor can the list be read
            settle(self.doors.index, row, "lost", LOST, now)
            return None
        wait = LOOKS[looks] if looks < len(LOOKS) else retry_delay(looks - len(LOOKS) + 1)
        sql = "UPDATE put_back SET looks = ?, next_look_at = ? WHERE id = ?"
        self.doors.index.run(sql, looks, now + wait, row["id"])
        return ListStep(self.lists, (row["pat_num"], "documents"), self.lists.limit)

    def listed(self, key: ListKey, rows: Sequence[Listed], now: float) -> None:
        """A complete listing, before anything is owed by it: what it says of the put-backs of that patient."""
        sql = f"SELECT * FROM put_back WHERE pat_num = ? AND {OPEN}"  # noqa: S608 - our own text
        for row in self.doors.index.rows(sql, key[0]) if key[1] == "documents" else ():
            numbers = sorted(listed.item.num for listed in rows if listed.item.kind == "document")
            if row["state"] == "unanswered":
                self._recognise(row, [each for each in rows if each.item.kind == "document"], now)
            elif row["num"] in numbers:
                settle(self.doors.index, row, "refused", "Open Dental lists it", now)
            elif row["absent_at"] is not None:
                state = "checked" if row["state"] == "wanted" else row["state"]
                again = 0.0 if is_fresh(row | {"listed_at": now}, now) else row["next_look_at"]
                sql = "UPDATE put_back SET state = ?, listed_at = ?, known = ?, next_look_at = ? WHERE id = ?"
                self.doors.index.run(sql, state, now, json.dumps(numbers), again, row["id"])

    def _recognise(self, row: Row, documents: Sequence[Listed], now: float) -> None:
        known, sent = set(json.loads(row["known"])), json.loads(row["fields"])
        new = [
            each.item.num
            for each in documents
            if each.item.num not in known
            and each.date_created == sent.get("DateCreated")
            and each.fields.get("DocCategory") == sent.get("DocCategory", each.fields.get("DocCategory"))
        ]
        if len(new) == 1:
            self.uploaded(row, new[0], now)
        elif row["looks"] >= len(LOOKS):
            settle(self.doors.index, row, "lost", LOST, now)

    def uploaded(self, row: Row, doc_num: int, now: float, lacking: Sequence[str] = ()) -> None:
        """The document is back, under a new number; its list is read soon."""
        new = Item(row["pat_num"], row["kind"], doc_num)
        words = f"it is {new.full_id} now" + (f"; Open Dental did not take: {', '.join(lacking)}" if lacking else "")
        settle(self.doors.index, row, "done", words, now, doc_num)
        self.doors.log.info(
            "document_put_back", item=Item(row["pat_num"], row["kind"], row["num"]).full_id, became=new.full_id
        )


def is_fresh(row: Row, now: float) -> bool:
    """Whether the office said lately that it does not have the document, by its number and by the list."""
    asked = (row["absent_at"], row["listed_at"])
    return all(at is not None and 0 <= now - at <= FRESH for at in asked)


def stage(doors: Doors, now: float) -> bool:
    """The pull lane's part: files on the drop for what is checked, and off it for what has ended; whether any."""
    sql = f"SELECT * FROM put_back WHERE (state = 'checked' OR (staging IS NOT NULL AND NOT {OPEN}))"  # noqa: S608
    rows = doors.index.rows(sql + " AND next_look_at <= ?", now)
    for row in rows:
        again = "UPDATE put_back SET looks = looks + 1, next_look_at = ? WHERE id = ?"
        doors.index.run(again, now + retry_delay(row["looks"] + 1), row["id"])  # whatever comes: others go first
        if row["state"] == "checked":
            _put(doors, row, now)
        elif doors.drop.remove([row["staging"].encode()])[0]:
            doors.index.run("UPDATE put_back SET staging = NULL WHERE id = ?", row["id"])
    return bool(rows)


def _put(doors: Doors, row: Row, now: float) -> None:
    """Under a name of ours, journalled first; verified by digest before and by size after."""
    item, settings = _item(row), doors.settings
    version = next((v for v in Catalog(doors.index).versions(item) if v.seq == row["seq"]), None)
    if version is None or not doors.archive.intact(version):
        settle(doors.index, row, "refused", "its archived file is not whole", now)
        return
    day = datetime.fromtimestamp(now, settings.zone).strftime("%Y%m%d")
    extension = own_extension(version.file_name) or version.extension
    new = staging_name(settings.drop.folder, settings.name, day, secrets.token_hex(16), extension)
    staging, fields = row["staging"] or new, json.dumps(_fields(doors.archive.read_sidecar(version) or version))
    doors.index.run("UPDATE put_back SET staging = ?, fields = ? WHERE id = ?", staging, fields, row["id"])
    try:
        doors.drop.remove([staging.encode()])  # of a try that a crash or a cut ended
        with doors.archive.open_media(version) as source:
            doors.drop.put(staging.encode(), source)
    except ItemError:
        settle(doors.index, row, "refused", "the SFTP site does not let syncd write", now)
    else:
        doors.index.run("UPDATE put_back SET state = 'staged', next_look_at = 0 WHERE id = ?", row["id"])


def _item(row: Row) -> Item:
    return Item(row["pat_num"], row["kind"], row["num"])
