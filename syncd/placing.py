"""Placing: ask Open Dental to put one file, or the files of one folder, on the drop; journalled before it is asked.

What is archived already is adopted instead: before an item is placed, its archive folder is read. A placement is made
only from a listing of its patient that is less than an hour old.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from syncd import guards
from syncd.diff import DAY, HOUR, revision
from syncd.errors import ItemError, NoSuchMethodError, SiteError, SyncdError, TransientError, UnansweredError
from syncd.index import FAILING_AFTER
from syncd.listing import BAD_LIST_AGAIN, Lists, ListStep, Step, owe_confirmation
from syncd.model import KIND_OF, Attempt, Duty, Item, Kind, Listed, ListName, Method, PlacedName, Version
from syncd.naming import own_extension, staging_name
from syncd.pacing import retry_delay
from syncd.publishing import Publisher
from syncd.sites import Doors, Sites, nothing_vanishes

FRESH = HOUR
MISSING_AGAIN = 4 * HOUR
RESTLESS = 24  # revisions of one item in a day: a stamp that moves by itself; from then on one an hour
QUIET = 900.0  # seconds without a new image before a patient's thumbnails are asked for
GIVE_UP_THUMBNAILS = 3
THUMBNAILS_AGAIN = 30 * DAY
FIXED_EXTENSION: Mapping[str, str] = {"mount": "jpg", "sheet": "pdf"}


class PlaceStep:
    """One journalled placement."""

    def __init__(self, places: Places, attempt: Attempt, duty: Duty | None, bulk: bool) -> None:
        self._places, self._attempt, self._duty, self.bulk = places, attempt, duty, bulk
        self.method = attempt.method

    def ask(self) -> tuple[PlacedName, ...]:
        """One request; returning means 201, or 200 with the words that there is nothing to place."""
        api, now = self._places.doors.api, self._places.doors.clock.now()
        attempt = self._attempt = replace(self._attempt, asked_at=now)  # it may have been prepared long ago
        calls: dict[Method, Callable[[int, str], tuple[PlacedName, ...] | None]] = {
            "document": api.place_document,
            "mount": api.place_mount,
            "mount-image": api.place_document,
            "mount-images": api.place_mount_images,
            "sheet": api.place_sheet,
            "thumbnails": api.place_thumbnails,
        }
        number = attempt.pat_num if attempt.method == "thumbnails" else attempt.num
        return calls[attempt.method](number, attempt.staging) or ()

    def take(self, answer: object, now: float) -> Step | None:
        """The office has finished writing: the pull lane may read."""
        names = answer if isinstance(answer, tuple) else ()
        self._places.answered(self._attempt, names, now)
        return None

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """No 201: unanswered, refused, or never sent."""
        self._places.failed(self._attempt, self._duty, error, now)
        return None

    def abandon(self) -> None:
        """Not sent: nothing can be on the drop."""
        self._places.unsent(self._attempt, self._duty)

    def outdated(self, now: float) -> bool:
        """Whether its listing is too old by now: its number may mean another patient's file since."""
        return not is_fresh(self._attempt.listed_at, now)


class OwnerStep:
    """GET one image that only a mount's answer named, before it is placed by itself: is it this patient's at all?"""

    bulk = False

    def __init__(self, places: Places, duty: Duty) -> None:
        self._places, self._duty = places, duty

    def ask(self) -> Listed | None:
        """GET /documents/N, which answers for images in mounts, too."""
        return self._places.doors.api.document(self._duty.num)

    def take(self, answer: object, now: float) -> Step | None:
        """Place it, or let it go: the answer that named it was about somebody else's mount."""
        owner = answer.item if isinstance(answer, Listed) else None
        if owner is not None and owner.pat_num == self._duty.pat_num:
            return self._places.proven(self._duty, now)
        self._places.disown(self._duty, now)
        return None

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """An office that lacks the method cannot be asked; what else it says is a failure of this image: at once it
        would be the next one again.
        """
        if isinstance(error, NoSuchMethodError):
            return self._places.proven(self._duty, now)
        failure = "timeout_60s" if isinstance(error, TransientError) else "refused"
        count_failure(self._places.doors, self._duty, failure, now)
        return None

    def abandon(self) -> None:
        """The duty stands."""


class Places:
    """Prepares placements and records what became of the requests."""

    def __init__(self, doors: Doors, sites: Sites, lists: Lists, bulk: bool) -> None:
        self.doors = doors
        self._sites, self._lists, self._bulk = sites, lists, bulk
        self._publisher = Publisher(doors)
        sql = "SELECT method, pat_num, num, failure FROM duty WHERE failures >= ?"
        failed = doors.index.rows(sql, FAILING_AFTER)
        self._alike = guards.Breaker(own={(r["method"], r["pat_num"], r["num"]): r["failure"] for r in failed})
        self._thumbnails_after = 0.0  # a steady time

    def prepare(self, duty: Duty, now: float, proven: bool = False) -> Step | None:
        """The request this duty needs next, or None when it needed none: its bytes are archived already."""
        if duty.why in ("listed", "backfill", "retry") and self._needs_none(duty, now):
            return None
        restless = duty.why in ("listed", "backfill") and self._put_off(duty, now)
        if restless or self._left_its_mount(duty):
            return None
        if self._is_missing(duty):
            self.doors.index.put_off(duty, now + MISSING_AGAIN)
            return None
        name: ListName = "sheets" if duty.method == "sheet" else "documents"
        listed_at = self.doors.index.polled_at(duty.pat_num, name)
        if not is_fresh(listed_at, now):
            return self._read_first(duty, name, now)
        if duty.method == "mount-image" and not proven:  # a proof is for one placement at once: numbers are reused
            return OwnerStep(self, duty)
        attempt = self._journalled(duty, listed_at, now)
        return PlaceStep(self, attempt, duty, self._bulk or duty.why in ("refetch", "backfill")) if attempt else None

    def _read_first(self, duty: Duty, name: ListName, now: float) -> Step | None:
        """Its list is too old to place from. Nothing waits for one that could not be read lately: it has its time."""
        index = self.doors.index
        until = index.value("SELECT next_try_at FROM list WHERE pat_num = ? AND name = ?", duty.pat_num, name)
        if until is not None and until > now:
            if duty.why == "refetch":
                index.put_off(duty, until)
            else:
                index.duty_failed(duty, "list_unreadable", until)
            return None
        return ListStep(self._lists, (duty.pat_num, name), self._lists.limit)

    def _left_its_mount(self, duty: Duty) -> bool:
        """Whether an image is listed as a document: what it is by now never was in the mount. Then it is not owed."""
        if duty.method != "mount-image":
            return False
        listed = self.doors.index.known_item(Item(duty.pat_num, "document", duty.num))
        if listed is None or listed.missing_since_at is not None or listed.vanished:
            return False
        self.doors.index.duty_done(duty.method, duty.pat_num, duty.num)
        return True

    def _is_missing(self, duty: Duty) -> bool:
        """Whether the last complete listing lacks it (of an image: its mount). In a database that was restored the
        number may be another patient's by now, and the request would not say whose file it wants.
        """
        known = self.doors.index.known_item(Item(duty.pat_num, *_item_of(duty)))
        if duty.method == "mount-image" and known is not None:
            mount_num = self.doors.index.item_rows(known.item)[0]["mount_num"]
            known = self.doors.index.known_item(Item(duty.pat_num, "mount", mount_num or 0))
        return known is not None and (known.missing_since_at is not None or known.vanished)

    def _journalled(self, duty: Duty, listed_at: float, now: float) -> Attempt | None:
        kind_item = Item(duty.pat_num, *_item_of(duty))
        rows = self.doors.index.item_rows(kind_item)
        if not rows or duty.method in ("confirm", "thumbnails"):
            self.doors.index.duty_done(duty.method, duty.pat_num, duty.num)
            return None
        row = rows[0]
        extension = FIXED_EXTENSION.get(duty.method) or own_extension(row["file_name"])
        if duty.failure == "refused" and duty.failures % 2 and duty.method not in FIXED_EXTENSION:
            extension = None  # perhaps for the extension's sake: this time the office takes its own file name
        listed = {"file_name": row["file_name"], "fields": row["fields"], "mount_num": row["mount_num"]}
        return self._write_down(duty, None if duty.method == "mount-images" else extension, listed_at, listed, now)

    def _write_down(
        self, duty: Duty, extension: str | None, listed_at: float, listed: Mapping[str, object], now: float
    ) -> Attempt:
        settings = self.doors.settings
        day = datetime.fromtimestamp(now, settings.zone).strftime("%Y%m%d")
        method: Method = "document" if duty.method == "confirm" else duty.method
        attempt = Attempt(
            id=0,
            method=method,
            pat_num=duty.pat_num,
            num=duty.num,
            revision=duty.revision,
            staging=staging_name(settings.drop.folder, settings.name, day, secrets.token_hex(16), extension),
            state="asked",
            asked_at=now,
            placed_at=None,
            listed_at=listed_at,
            why=duty.why,
            listed=listed,
        )
        return replace(attempt, id=self.doors.index.journal(attempt))

    def proven(self, duty: Duty, now: float) -> Step | None:
        """The image is this patient's, as far as the office can tell: its placement may follow."""
        return self.prepare(duty, now, proven=True)

    def disown(self, duty: Duty, now: float) -> None:
        """The image is not this patient's, or not there any more: nothing of it is placed.

        One that was archived here does not vanish for one answer: its mount's own answers decide.
        """
        self.doors.log.warning("listing_refused", pat_num=duty.pat_num, list="mount", failure="ListingError")
        self.doors.index.duty_done(duty.method, duty.pat_num, duty.num)
        image = Item(duty.pat_num, *_item_of(duty))
        known = self.doors.index.known_item(image)
        if known is not None and known.archived_revision is None and not nothing_vanishes(self.doors.index):
            self.doors.index.vanish(image, now)

    def _put_off(self, duty: Duty, now: float) -> bool:
        """Whether the item changed so often today that it waits for an hour since the last time."""
        (row,) = self.doors.index.rows(
            "SELECT count(*) AS times, max(archived_at) AS last_at FROM version"
            " WHERE pat_num = ? AND kind = ? AND num = ? AND archived_at > ?",
            *(duty.pat_num, KIND_OF[duty.method], duty.num, now - DAY),
        )
        if row["times"] < RESTLESS or now - row["last_at"] >= HOUR:
            return False
        sql = "UPDATE duty SET next_try_at = ? WHERE pat_num = ? AND method = ? AND num = ?"
        self.doors.index.run(sql, row["last_at"] + HOUR, duty.pat_num, duty.method, duty.num)
        return True

    # --- what is archived already

    def _needs_none(self, duty: Duty, now: float) -> bool:
        """Whether its bytes are archived already. Where its folder cannot be read nothing is placed for it, either:
        that has failed, and is tried again as any failure.
        """
        try:
            return self._adopted(duty, now)
        except ItemError as error:
            count_failure(self.doors, duty, error.failure, now)
            return True

    def _adopted(self, duty: Duty, now: float) -> bool:
        if duty.method == "mount-images":
            return self._adopted_images(duty, now)
        item = Item(duty.pat_num, *_item_of(duty))
        held = self.doors.archive.read_item(item)
        # Only the newest one: an item that went back to an earlier revision is fetched, and becomes current, again.
        if not held or held[-1].revision != duty.revision or not self.doors.archive.intact(held[-1]):
            return False
        with self.doors.index.transaction():
            self._publisher.adopt(held, now)
            self.doors.index.duty_done(duty.method, duty.pat_num, duty.num, duty.revision)
        return True

    def _adopted_images(self, duty: Duty, now: float) -> bool:
        """Whether every image that DownloadMount named for this revision of the mount is in the archive."""
        found = self.doors.archive.mount_images(duty.pat_num, duty.num)
        newest = {version.item: version for version in found}  # in order of versions, image by image
        matching = [version for version in newest.values() if version.source_revision == duty.revision]
        named = next((version.mount_images for version in reversed(matching) if version.mount_images), ())
        have = {version.item.num for version in matching if self.doors.archive.intact(version)}
        if not named or not have.issuperset(named):
            return False
        with self.doors.index.transaction():
            self._publisher.adopt(found, now)
            self._publisher.images_are_whole(Item(duty.pat_num, "mount", duty.num), duty.revision, now)
            self.doors.index.duty_done(duty.method, duty.pat_num, duty.num, duty.revision)
        return True

    # --- thumbnails

    def prepare_thumbnails(self, now: float, quiet: float, only: frozenset[int] | None = None) -> Step | None:
        """One call for a patient whose images had no news for `quiet` seconds and who is owed nothing else, or first
        the patient's list, where that is too old.

        Where so many wait that the question takes long, it is asked in a twentieth of the time at most.
        """
        index, steady = self.doors.index, self.doors.clock.steady
        if (asked_at := steady()) < self._thumbnails_after:
            return None
        whose = None if only is None else json.dumps(sorted(only))
        row = index.rows(
            "SELECT i.pat_num, max(i.archived_at) AS last_image_at, max(l.polled_at) AS listed_at FROM item i"
            " JOIN patient p USING (pat_num) JOIN list l ON l.pat_num = i.pat_num AND l.name = 'documents'"
            " WHERE i.thumbnail_due = 1 AND p.thumbnails_after_at <= ?1 AND p.left_at IS NULL"
            " AND (?2 IS NULL OR i.pat_num IN (SELECT value FROM json_each(?2))) AND NOT EXISTS"
            " (SELECT 1 FROM duty d WHERE d.pat_num = i.pat_num AND d.method = 'document' AND d.why != 'refetch'"
            " AND d.failures < 3 AND NOT EXISTS (SELECT 1 FROM item m WHERE (m.pat_num, m.kind, m.num)"
            " = (d.pat_num, d.kind, d.num) AND m.missing_since_at IS NOT NULL))"  # it may have been deleted
            " GROUP BY i.pat_num HAVING last_image_at <= ?3 LIMIT 1",
            *(now, whose, now - quiet),
        )
        self._thumbnails_after = steady() + 20 * (steady() - asked_at)
        if not row or self._adopted_thumbnails(row[0]["pat_num"], now):
            return None
        pat_num, listed_at = row[0]["pat_num"], row[0]["listed_at"]
        duty = Duty("thumbnails", pat_num, 0, "", "listed", now)
        if not is_fresh(listed_at, now):
            if (step := self._read_first(duty, "documents", now)) is None:  # in its own time
                index.run("UPDATE patient SET thumbnails_after_at = ? WHERE pat_num = ?", now + BAD_LIST_AGAIN, pat_num)
            return step
        index.run("UPDATE patient SET thumbnails_after_at = ? WHERE pat_num = ?", now + HOUR, pat_num)
        return PlaceStep(self, self._write_down(duty, None, listed_at, {}, now), None, self._bulk)

    def _adopted_thumbnails(self, pat_num: int, now: float) -> bool:
        """Clear what is due and archived already (after a rebuilt index); whether nothing is left."""
        index = self.doors.index
        due = index.rows("SELECT num, sha256 FROM item WHERE pat_num = ? AND thumbnail_due = 1", pat_num)
        for row in due:
            held: Sequence[Version] = ()
            with suppress(ItemError):  # then it is fetched, and fails by itself
                held = self.doors.archive.read_item(Item(pat_num, "thumbnail", row["num"]))
            if held and held[-1].source_revision == row["sha256"]:
                with index.transaction():
                    self._publisher.adopt(held, now)
                    index.set_item(Item(pat_num, "document", row["num"]), "thumbnail_due = 0")
        return not index.value("SELECT 1 FROM item WHERE pat_num = ? AND thumbnail_due = 1", pat_num)

    # --- answers

    def answered(self, attempt: Attempt, names: tuple[PlacedName, ...], now: float) -> None:
        """201, or 200 where nothing could be placed."""
        pairs = [[name.doc_num, name.file_name] for name in names]
        columns = {"asked_at": attempt.asked_at, "placed_at": now, "answered": 1, "names": json.dumps(pairs)}
        with self.doors.index.transaction(durable=False):  # after a power cut it counts as unanswered, and heals
            self.doors.index.set_attempt(attempt.id, "placed", now, **columns)
        self._alike.succeeded((attempt.method, attempt.pat_num, attempt.num))
        if not self._alike.items:
            self._sites.works("placing", now)

    def failed(self, attempt: Attempt, duty: Duty | None, error: SyncdError, now: float) -> None:
        """Every answer but a 201."""
        if isinstance(error, UnansweredError):
            self.doors.index.set_attempt(attempt.id, "unanswered", now, asked_at=attempt.asked_at)
            self.doors.log.warning("placement_unanswered", pat_num=attempt.pat_num, method=attempt.method)
            self._count("timeout_60s", attempt, "api_error", now)
            return
        self.unsent(attempt, duty, cleaning=isinstance(error, ItemError) and error.failure != "not_found", now=now)
        if isinstance(error, SiteError) or (isinstance(error, TransientError) and error.reason != "api_error"):
            self._behind(attempt, duty, error, now)
            return  # else it was answered; at once it would be the next one again
        failure = error.failure if isinstance(error, ItemError) else "refused"
        if duty is None:
            self.thumbnails_failed(attempt.pat_num, now)
            return
        if failure == "not_found":
            self.doors.index.set_item(Item(duty.pat_num, *_item_of(duty)), "not_found = 1")
        count_failure(self.doors, duty, failure, now)
        if failure == "refused":
            self._count(failure, attempt, "placements_refused", now)

    def _count(self, failure: str, attempt: Attempt, reason: str, now: float) -> None:
        """Many alike failures are a state of the site: then they are not held against the items.

        All are due at once, in the order they had: the one that was tried goes behind the others. It may be bad by
        itself, and would for ever tell nothing of the site.
        """
        if not self._alike.failed(failure, (attempt.method, attempt.pat_num, attempt.num)):
            return
        self._sites.failed(SiteError(reason), now, lane="placing")
        with self.doors.index.transaction():
            one = "FROM duty WHERE (method, pat_num, num) = (?, ?, ?)"
            found = [row for each in self._alike.items for row in self.doors.index.rows(f"SELECT * {one}", *each)]
            for place, row in enumerate(sorted(found, key=lambda row: row["next_try_at"])):
                sql = "UPDATE duty SET failures = 0, next_try_at = ? WHERE (method, pat_num, num) = (?, ?, ?)"
                self.doors.index.run(sql, now + place / 1000, row["method"], row["pat_num"], row["num"])

    def _behind(self, attempt: Attempt, duty: Duty | None, error: SiteError | TransientError, now: float) -> None:
        """A state of the site is nothing of the item's, but it goes behind all that wait: where others worked since, it
        alone is answered so. Then it has failed.
        """
        tried = (attempt.method, attempt.pat_num, attempt.num)
        if duty is None:
            again = "UPDATE patient SET thumbnails_after_at = ? WHERE pat_num = ?"
            self.doors.index.run(again, now + HOUR, attempt.pat_num)
        elif self._alike.own.get(tried) == error.reason:
            count_failure(self.doors, duty, "refused", now)
            self._sites.works("placing", now)
        else:
            self._alike.failed(error.reason, tried)
            self.doors.index.put_off(duty, now + 0.001)

    def unsent(self, attempt: Attempt, duty: Duty | None, cleaning: bool = False, now: float = 0.0) -> None:
        """No file of it can be on the drop, or at most a fragment to clean. A duty must not stay busy without it."""
        index = self.doors.index
        with index.transaction():
            if cleaning:
                index.set_attempt(attempt.id, "cleaning", now, asked_at=attempt.asked_at)
            else:
                index.forget_attempt(attempt.id)
            if duty is None:
                index.run("UPDATE patient SET thumbnails_after_at = 0 WHERE pat_num = ?", attempt.pat_num)
            else:
                sql = "UPDATE duty SET busy = 0 WHERE pat_num = ? AND method = ? AND num = ?"
                index.run(sql, duty.pat_num, duty.method, duty.num)

    def thumbnails_failed(self, pat_num: int, now: float) -> None:
        """Count a failed call; after the third, again in 30 days."""
        thumbnails_failed(self.doors, pat_num, now)


def is_fresh(listed_at: float, now: float) -> bool:
    """Whether a listing is young enough to place from. Nobody knows how old one of the future is."""
    return 0 <= now - listed_at < FRESH


def thumbnails_failed(doors: Doors, pat_num: int, now: float) -> None:
    """Count a Thumbnails call that failed or went unanswered; after the third, again in 30 days.

    The third comes a day after the second: an outage of an evening must not cost a month.
    """
    failures = 1 + int(doors.index.value("SELECT thumbnails_failures FROM patient WHERE pat_num = ?", pat_num) or 0)
    wait = {1: retry_delay(1), GIVE_UP_THUMBNAILS - 1: DAY}.get(failures, THUMBNAILS_AGAIN)
    doors.index.run(
        "UPDATE patient SET thumbnails_failures = ?, thumbnails_after_at = ? WHERE pat_num = ?",
        *(failures, now + wait, pat_num),
    )


def count_failure(doors: Doors, duty: Duty, failure: str, now: float) -> None:
    """Record a failed try of an item; the log says so at 1, 2, 4, 8, ... tries."""
    next_try_at = now + retry_delay(duty.failures + 1)
    failures = doors.index.duty_failed(duty, failure, next_try_at)
    if failures & (failures - 1) == 0:
        item = Item(duty.pat_num, *_item_of(duty))
        doors.log.warning(
            "item_failed",
            item=item.full_id,
            method=duty.method,
            failure=failure,
            failures=failures,
            next_try_at=next_try_at,
        )


def images_denied(doors: Doors, attempt: Attempt, now: float) -> bool:
    """Whether a mount that names no image had some that are no documents by now: then the office could not read
    them, and the answer has failed. Each is asked for by its number: one that is deleted is missing from then on.
    """
    if attempt.method != "mount-images" or attempt.names:
        return False
    listed = "SELECT 1 FROM item d WHERE d.pat_num = i.pat_num AND d.kind = 'document' AND d.num = i.num"
    sql = "SELECT num, revision FROM item i WHERE pat_num = ? AND mount_num = ? AND vanished_at IS NULL AND NOT"
    sql += f" EXISTS ({listed} AND d.missing_since_at IS NULL AND d.vanished_at IS NULL)"
    for row in (images := doors.index.rows(sql, attempt.pat_num, attempt.num)):
        image = Item(attempt.pat_num, "mount-image", row["num"])
        owe_confirmation(doors.index, image, row["revision"], now)
    return bool(images)


def image_revision(mount_revision: str, file_name: str) -> str:
    """The revision of an image in a mount, which has no stamp: it is new when the mount or its name is."""
    return revision("mount-image", "", {"mountRevision": mount_revision, "FileName": file_name})


def thumbnail_revision(source_sha256: str, file_name: str) -> str:
    """The revision of a thumbnail: it is new when the archived image it was made from is."""
    return revision("thumbnail", "", {"sourceRevision": source_sha256, "FileName": file_name})


def _item_of(duty: Duty) -> tuple[Kind, int]:
    return KIND_OF[duty.method], duty.num
