"""Publish and record: bytes that lie in `incoming` become versions of items, or turn out to be known already.

The order is the promise: sequence number reserved, sidecar durable, file linked and durable, one transaction in the
index. A crash between any two of them heals: what is published and not recorded is adopted when it is owed next.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from syncd import repair
from syncd.archive import Publication
from syncd.diff import local_time, refetch_at, stamp_age
from syncd.errors import ItemError, SyncdError, UnreadableError
from syncd.model import FieldValue, Item, Version
from syncd.schema import row_is_sound
from syncd.sites import Doors, nothing_vanishes


@dataclass(frozen=True, slots=True)
class Arrival:
    """One complete, verified file in `incoming`, and what is to be said of it."""

    item: Item
    source: Path
    sha256: str
    bytes: int
    extension: str
    media_type: str
    revision: str
    file_name: str | None
    listed_at: float
    placed_at: float
    method: str
    listing: Mapping[str, FieldValue]
    flags: tuple[str, ...] = ()
    mount_num: int | None = None
    mount_images: tuple[int, ...] | None = None
    source_revision: str | None = None
    refetch: bool = False


IN_HAND = "in_hand"  # remembered from a batch's numbers to its record: its items
Outcomes = list[Version | SyncdError]


class Publisher:
    """Turns arrivals into versions; used by both lanes, each with its own doors."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def take(self, arrivals: Sequence[Arrival], now: float, settle: Callable[[Outcomes], None]) -> Outcomes:
        """Archive and record a batch; one outcome an arrival: the version that holds its bytes, or what went wrong.

        `settle` is called with the outcomes inside the transaction that records them.
        No two arrivals of a batch may be of one item. Raises SiteError for the archive as a whole; then nothing of
        the batch is recorded, and all of it is fetched again: its files in `incoming` are gone whatever becomes of it.
        """
        try:
            self.name_patients(arrival.item.pat_num for arrival in arrivals)  # first: a crash leaves nobody nameless
            with self._doors.archive.publishing:  # versions are recorded in the order of their numbers, for followers
                return self._take(arrivals, now, settle)
        finally:
            for arrival in arrivals:  # what was linked is in the archive by another name
                self._doors.archive.discard(arrival.source)

    def _take(self, arrivals: Sequence[Arrival], now: float, settle: Callable[[Outcomes], None]) -> Outcomes:
        self.adopt_in_hand(now)
        planned = [self._planned(arrival, now) for arrival in arrivals]
        plans = [plan for plan in planned if isinstance(plan, Publication)]
        fresh = [plan for plan in plans if plan.source is not None or plan.version.seq == 0]
        publications = self._numbered(fresh)
        failures = dict(zip(map(id, fresh), self._doors.archive.publish(publications), strict=True))
        published = dict(zip(map(id, fresh), publications, strict=True))
        outcomes: Outcomes = []
        with self._doors.index.transaction():
            for arrival, plan in zip(arrivals, planned, strict=True):
                if isinstance(plan, ItemError):
                    outcomes.append(plan)
                    continue
                failure = failures.get(id(plan))
                version = published[id(plan)].version if id(plan) in published else plan.version
                outcomes.append(failure or version)
                if failure is None:
                    self._record(arrival, version, now)
            settle(outcomes)
            self._doors.index.remember(IN_HAND, None)
        for plan, outcome in zip(planned, outcomes, strict=True):
            if isinstance(plan, Publication):
                self._tell(plan, outcome)
        return outcomes

    def take_upload(self, arrival: Arrival, now: float) -> None:
        """Archive and record bytes that came with a listing."""
        self.take([arrival], now, lambda _: None)

    def images_are_whole(self, mount: Item, revision: str, now: float) -> None:
        """All of a mount's images are archived, or owed by themselves. They are fetched by its age also where its own
        picture is not wanted.
        """
        (row,) = self._doors.index.item_rows(mount)
        again = refetch_at(
            "mount", mount.num, local_time(row["date_created"] or "", self._doors.settings.zone), None, now
        )
        told = "images_revision = ?, refetch_at = coalesce(refetch_at, ?)"
        self._doors.index.set_item(mount, told, revision, again)

    def name_patients(self, pat_nums: Iterable[int]) -> None:
        """Put beside their documents who these patients are, as the last roster told."""
        named = sorted(set(pat_nums)) if self._doors.settings.sync.patient_names else []
        for patient in filter(None, map(self._doors.index.patient, named)):
            with suppress(ItemError):  # something else lies in its place: the document tells of that, and `verify`
                self._doors.archive.write_patient(patient)

    def adopt_in_hand(self, now: float) -> None:
        """Record what was numbered, perhaps published, and then a crash or a full disk came before the record.

        Before any higher number is recorded: a follower would have passed it by. And perhaps it is never owed again.
        """
        noted = self._doors.index.meta(IN_HAND)
        if noted is not None:
            for pat_num, kind, num in json.loads(noted):
                with suppress(ItemError):  # a folder that the disk does not give: others go on
                    self.adopt_unknown(Item(pat_num, kind, num), now)
            self._doors.index.remember(IN_HAND, None)

    def adopt(self, versions: Sequence[Version], now: float) -> None:
        """Record what the archive holds and the index does not know. The caller has seen the files."""
        index = self._doors.index
        with index.transaction():
            for version in sorted(versions, key=lambda each: (each.version, each.sidecar)):
                known = index.value("SELECT 1 FROM version WHERE seq = ?", version.seq) is not None
                index.put_version(version, now)
                if not known:  # a crash came before the record, and before what follows from it
                    index.set_item(version.item, "refetch_at = ?", again_at(version, self._doors.settings.zone, now))
                    self._owe_thumbnail(version.item)

    def _planned(self, arrival: Arrival, now: float) -> Publication | ItemError:
        """What to write, or why this one item takes nothing; then the batch goes on without it."""
        if self._doors.index.is_destroyed(arrival.item):
            return ItemError("destroyed")
        try:
            return self._plan(arrival, now)
        except ItemError as error:
            return error

    def _plan(self, arrival: Arrival, now: float) -> Publication:
        """What to write: a version, one more sidecar (seq 0, no source), or nothing (a known version, no source)."""
        highest = self._highest(arrival.item)
        self._heal(arrival)
        held = self._doors.archive.read_item(arrival.item)
        self._adopt_unknown(held, now)  # also where other bytes follow: what a crash left unrecorded is a version, too
        newest = held[-1] if held and held[-1].version >= highest else None  # what is set aside is followed, not aped
        same_bytes = newest is not None and newest.sha256 == arrival.sha256
        # A sheet is rendered anew at each call: another revision, not other bytes, makes its new version.
        rendered_again = newest is not None and arrival.item.kind == "sheet" and newest.revision == arrival.revision
        # A file that rotted is no copy: what was fetched is then a version of its own, and the damaged one stays.
        if newest is not None and (same_bytes or rendered_again) and self._doors.archive.intact(newest):
            if newest.revision == arrival.revision or rendered_again:
                return Publication(newest, None)
            further = 1 + self._highest_sidecar(newest)
            return Publication(self._version(arrival, newest.version, further, now, newest.extension), None)
        return Publication(self._version(arrival, highest + 1, 1, now, arrival.extension), arrival.source)

    def _highest(self, item: Item) -> int:
        """The highest number that a version of the item ever had, in the archive or in the index; 0 for none."""
        sql = "SELECT max(version) FROM version WHERE pat_num = ? AND kind = ? AND num = ?"
        recorded = self._doors.index.value(sql, item.pat_num, item.kind, item.num) or 0
        return max(self._doors.archive.highest_version(item), recorded)

    def _highest_sidecar(self, version: Version) -> int:
        """The highest number that a sidecar of the version ever had: one that rotted or is gone is followed, too."""
        sql = "SELECT max(sidecar) FROM version WHERE pat_num = ? AND kind = ? AND num = ? AND version = ?"
        item = version.item
        recorded = self._doors.index.value(sql, item.pat_num, item.kind, item.num, version.version) or 0
        return max(self._doors.archive.highest_sidecar(version), recorded)

    def _heal(self, arrival: Arrival) -> None:
        """Give the newest recorded version its file back where that is gone or rotted, and these are its bytes.

        Its place, number and sidecar stay; a sidecar that is gone, too, is made of this listing if it is the same one.
        """
        archive, item = self._doors.archive, arrival.item
        sql = "SELECT * FROM version WHERE pat_num = ? AND kind = ? AND num = ? AND sidecar = 1"
        sql += " ORDER BY version DESC LIMIT 1"
        for row in self._doors.index.rows(sql, item.pat_num, item.kind, item.num):
            names = ("seq", "revision", "listed_at", "placed_at", "archived_at", "media_type", "method")
            told = {name: row[name] for name in (*names, "source_revision")}
            remade = self._version(arrival, row["version"], 1, row["archived_at"], row["extension"])
            version = replace(remade, flags=tuple(json.loads(row["flags"])), **told)
            if row["sha256"] != arrival.sha256 or not row_is_sound(row) or archive.intact(version):
                continue
            sidecar = archive.read_sidecar(version)
            if sidecar is None and row["revision"] != arrival.revision:
                continue
            if Path(version.path).name in archive.survey(version.folder):
                try:
                    archive.set_aside(version.path)
                except UnreadableError:  # it stays where it is, and what was fetched is a version of its own
                    continue
            archive.publish([Publication(sidecar or version, arrival.source)])

    def _version(self, arrival: Arrival, number: int, sidecar: int, now: float, extension: str) -> Version:
        first_seen = self._doors.index.value(
            "SELECT first_seen_at FROM item WHERE pat_num = ? AND kind = ? AND num = ?",
            *(arrival.item.pat_num, arrival.item.kind, arrival.item.num),
        )
        return Version(
            seq=0,
            version=number,
            sidecar=sidecar,
            extension=extension,
            archived_at=now,
            first_seen_at=first_seen if first_seen is not None else arrival.listed_at,
            **{
                name: getattr(arrival, name)
                for name in (
                    *("item", "mount_num", "revision", "sha256", "bytes", "media_type", "file_name", "listed_at"),
                    *("placed_at", "method", "flags", "mount_images", "source_revision", "listing"),
                )
            },
        )

    def _numbered(self, plans: Sequence[Publication]) -> list[Publication]:
        """Give every new sidecar its sequence number; the archive learns of them before it carries one."""
        if not plans:
            return []
        archive, index = self._doors.archive, self._doors.index
        items = [plan.version.item for plan in plans]
        with index.transaction():
            numbers = index.reserve_seqs(len(plans), above=archive.last_seq())
            index.remember(IN_HAND, json.dumps([(item.pat_num, item.kind, item.num) for item in items]))
        archive.note_seq(numbers[-1])
        return [
            Publication(replace(plan.version, seq=seq), plan.source) for plan, seq in zip(plans, numbers, strict=True)
        ]

    def adopt_unknown(self, item: Item, now: float) -> None:
        """Record what a crash left published and unrecorded of an item that will not be owed again."""
        self._adopt_unknown(self._doors.archive.read_item(item), now)

    def _adopt_unknown(self, held: Sequence[Version], now: float) -> None:
        known = "SELECT 1 FROM version WHERE seq = ?"
        unknown = [version for version in held if self._doors.index.value(known, version.seq) is None]
        if unknown:
            self.adopt(unknown, now)

    def _record(self, arrival: Arrival, version: Version, now: float) -> None:
        index, item = self._doors.index, arrival.item
        if self._doors.index.value("SELECT 1 FROM version WHERE seq = ?", version.seq) is None:
            index.put_version(version, now)
            self._owe_thumbnail(item)
        index.set_item(item, "refetch_at = ?", again_at(arrival, self._doors.settings.zone, now))
        repair.settle(index, self._doors.archive, self._doors.log, item, now)

    def _owe_thumbnail(self, item: Item) -> None:
        """For a new revision of equal bytes, too: a call may have settled the image while it was in a mount."""
        if "thumbnail" in self._doors.settings.sync.kinds:
            self._doors.index.owe_thumbnail(item)

    def _tell(self, plan: Publication, outcome: Version | SyncdError) -> None:
        """The log names only what is committed."""
        if isinstance(outcome, Version) and (plan.source is not None or plan.version.seq == 0):
            item, log = outcome.item.full_id, self._doors.log
            if plan.source is not None:
                log.info("document_archived", item=item, version=outcome.version, seq=outcome.seq, bytes=outcome.bytes)
            else:
                log.info("revision_recorded", item=item, version=outcome.version, seq=outcome.seq)


def image_lacks(doors: Doors, image: Item, now: float) -> None:
    """An image is not where it was: missing from now on; vanished where that was so `vanish_after` ago."""
    index, known, after = doors.index, doors.index.known_item(image), doors.settings.sync.vanish_after
    if known is None or known.vanished:
        return
    if known.missing_since_at is None or nothing_vanishes(index):
        index.set_item(image, "missing_since_at = coalesce(missing_since_at, ?)", now)
        mount = Item(image.pat_num, "mount", index.item_rows(image)[0]["mount_num"])
        index.set_item(mount, "refetch_at = ?", now + after)
    elif now - known.missing_since_at >= after:
        index.vanish(image, now)
        doors.log.info("item_vanished", item=image.full_id)


def again_at(arrival: Arrival | Version, zone: dt.tzinfo, now: float) -> float | None:
    """When what is archived now is fetched once more; None for never."""
    if arrival.method == "note":
        return None  # its bytes come with every listing
    listing = arrival.listing
    age = stamp_age(str(listing.get("DateTStamp") or ""), str(listing.get("serverDateTime") or ""))
    if age is not None:
        refetched = isinstance(arrival, Arrival) and arrival.refetch
        age = None if refetched else age + max(0.0, arrival.placed_at - arrival.listed_at)
    created_at = local_time(str(listing.get("DateCreated") or ""), zone)
    return refetch_at(arrival.item.kind, arrival.item.num, created_at, age, now)
