"""Reading lists: the roster, a patient's documents and sheets, single rows; and what follows from a complete listing.

A listing is complete when its pages overlap by one unchanged row and end; anything else starts over, three times, and
then counts as not read. Only a complete listing says that something is missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Protocol

from syncd import guards, holding
from syncd.diff import HOUR, Difference, Known, Owing, compare, last_page, local_time, ripe, same_row
from syncd.errors import (
    ItemError,
    ListingError,
    NoSuchMethodError,
    OversizeError,
    SiteError,
    SyncdError,
    TransientError,
)
from syncd.index import Index
from syncd.model import Duty, Item, Kind, Listed, ListKey, ListName, Method, Page, Patient
from syncd.naming import extension_of, media_type
from syncd.pacing import retry_delay
from syncd.publishing import Arrival, Publisher, image_lacks
from syncd.sites import Doors, Sites, nothing_vanishes

TRIES = 3
SMALLER, SMALLEST = 10, 2  # Limit after an answer over the size cap, and after another one
BAD_LIST_AGAIN = 900.0  # seconds
BAD_LIST_OFTEN = 4  # times; then twice as long after each four more, up to four hours
LEFT_LIST_AGAIN = 3600.0
BROKEN_OFF = 900.0  # seconds between two pages: what lies between, as a pause, makes the first ones old
LANE_OF_LIST: dict[ListName, str] = {"documents": "listings", "sheets": "sheets"}  # without sheets all else goes on


class Step(Protocol):
    """One request, chosen but not sent. The shell of the API lane sends it when the pace allows."""

    bulk: bool

    def ask(self) -> object:
        """Send it; nothing else."""
        ...

    def take(self, answer: object, now: float) -> Step | None:
        """Record the answer; the step that must follow at once, if any."""
        ...

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """Record that it failed."""
        ...

    def abandon(self) -> None:
        """It will not be sent."""
        ...


class ListStep:
    """One page of one list, and what was read of it so far; `times`: when its first page came, and its last one."""

    bulk = False

    def __init__(
        self,
        lists: Lists,
        key: ListKey,
        limit: int,
        tries: int = 0,
        rows: Sequence[Listed] = (),
        times: tuple[float, float] | None = None,
    ) -> None:
        self._lists, self.key, self._limit, self._tries, self._rows = lists, key, limit, tries, tuple(rows)
        self._times = times

    def ask(self) -> Page:
        """GET one page, starting at the last row already read."""
        api, (pat_num, name) = self._lists.doors.api, self.key
        offset = max(0, len(self._rows) - 1)
        if name == "documents":
            return api.list_documents(pat_num, offset, self._limit)
        return api.list_sheets(pat_num, offset, self._limit)

    def take(self, answer: object, now: float) -> Step | None:
        """Join the page; a complete listing is taken over, an incomplete one goes on."""
        page = answer.rows if isinstance(answer, Page) else ()
        began, before = self._times or (now, now)
        if not 0 <= now - before <= BROKEN_OFF:
            return ListStep(self._lists, self.key, self._limit, self._tries)
        try:
            rows = join(self._rows, page)
        except ListingError as error:
            return self.failed(error, now)
        if not last_page(len(page), self._limit):
            limit = min(2 * self._limit, self._lists.limit)  # one large row is no reason to read the rest row by row
            return ListStep(self._lists, self.key, limit, self._tries, rows, (began, now))
        if now - began > HOUR:  # nothing can be placed from it: read again at once it would be read for ever
            self._lists.refused(self.key, ListingError("the list takes more than an hour to read"), now)
        else:
            self._lists.complete(self.key, rows, began, now)
        return None

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """Start over after a page that cannot be trusted; give the list up for now after the third."""
        if isinstance(error, OversizeError) and self._limit > SMALLEST:
            limit = SMALLER if self._limit > SMALLER else SMALLEST
            return ListStep(self._lists, self.key, limit, self._tries, self._rows, self._times)
        if isinstance(error, ListingError) and self._tries + 1 < TRIES:
            return ListStep(self._lists, self.key, self._limit, self._tries + 1)
        self._lists.refused(self.key, error, now)
        return None

    def abandon(self) -> None:
        """Nothing was recorded; the list is polled again in its turn."""


class RosterStep:
    """One page of patients/Simple."""

    bulk = False

    def __init__(self, lists: Lists, limit: int, tries: int = 0, patients: Sequence[Patient] = ()) -> None:
        self._lists, self._limit, self._tries, self._patients = lists, limit, tries, tuple(patients)

    def ask(self) -> tuple[Patient, ...]:
        """GET one page, starting at the last patient already read."""
        return self._lists.doors.api.patients(max(0, len(self._patients) - 1), self._limit)

    def take(self, answer: object, now: float) -> Step | None:
        """Join the page; the complete roster is taken over."""
        page: tuple[Patient, ...] = answer if isinstance(answer, tuple) else ()
        overlap = bool(self._patients)
        known = {patient.pat_num for patient in self._patients}
        if overlap and (not page or page[0].pat_num != self._patients[-1].pat_num):
            return self.failed(ListingError("the roster shifted between two pages"), now)
        fresh = page[1:] if overlap else page
        if len({p.pat_num for p in fresh} - known) != len(fresh):
            return self.failed(ListingError("the roster names a patient twice"), now)
        patients = (*self._patients, *fresh)
        if last_page(len(page), self._limit):
            self._lists.roster(patients, now)
            return None
        return RosterStep(self._lists, self._limit, self._tries, patients)

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """Start over, three times; then the roster is due again a quarter of an hour later."""
        if isinstance(error, ListingError) and self._tries + 1 < TRIES:
            return RosterStep(self._lists, self._limit, self._tries + 1)
        self._lists.roster_refused(error, now)
        return None

    def abandon(self) -> None:
        """Nothing was recorded."""


class ConfirmStep:
    """GET one document that left its listing: is it gone, did it move, or did it go into a mount?"""

    bulk = False

    def __init__(self, lists: Lists, duty: Duty) -> None:
        self._lists, self._duty = lists, duty

    def ask(self) -> Listed | None:
        """GET /documents/N."""
        return self._lists.doors.api.document(self._duty.num)

    def take(self, answer: object, now: float) -> Step | None:
        """Decide by what the office says of the number now."""
        self._lists.confirmed(self._duty, answer if isinstance(answer, Listed) else None, now)
        return None

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """An office that lacks the method leaves the two listings to decide."""
        if isinstance(error, NoSuchMethodError):
            self._lists.confirmed(self._duty, None, now)
        else:
            again = now + retry_delay(self._duty.failures + 1)
            self._lists.doors.index.duty_failed(self._duty, type(error).__name__, again)
        return None

    def abandon(self) -> None:
        """The duty stands."""


def join(before: Sequence[Listed], page: Sequence[Listed]) -> tuple[Listed, ...]:
    """Join a page to the rows before it, or raise ListingError where the two do not fit.

    The first row of a later page repeats the last one unchanged, and no id comes twice.
    """
    if before and (not page or not same_row(before[-1], page[0])):
        raise ListingError("the listing shifted between two pages")
    rows = (*before, *(page[1:] if before else page))
    if len({row.item for row in rows}) != len(rows):
        raise ListingError("the listing names a row twice")
    return rows


class Lists:
    """What complete listings do to the index. `limit`: rows a page, as the mode of the API allows."""

    def __init__(self, doors: Doors, sites: Sites) -> None:
        self.doors, self._sites = doors, sites
        self.limit = doors.settings.api.page_limit
        self.roster_not_before, self._roster_failures = 0.0, 0
        self.arrived: list[int] = []  # patients whose lists the agenda does not know yet
        self.departed: list[int] = []
        self.settled: list[tuple[ListKey, int, float | None]] = []  # lists that were read, for the agenda
        self.postponed: list[tuple[ListKey, float]] = []
        self._renamed = set[int]()  # whose patient.json may tell the name of before
        self._bad_answers: dict[ListName, guards.Breaker] = {name: guards.Breaker() for name in LANE_OF_LIST}
        self._publisher = Publisher(doors)
        self.seen: Callable[[ListKey, Sequence[Listed], float], None] = lambda *_: None  # first, of a complete listing

    def roster(self, patients: Sequence[Patient], now: float) -> None:
        """Take over a complete roster."""
        sync, index = self.doors.settings.sync, self.doors.index
        if not patients and index.value("SELECT 1 FROM patient WHERE left_at IS NULL"):
            self.roster_refused(ListingError("the roster is empty"), now)
            return
        with index.transaction():
            changes = index.apply_roster(patients, now, sync.patient_names, sync.patients)
            left = self._leaving(changes["left"], now)
            index.remember("roster_rows", str(len(patients)))
        self._rename(changes["renamed"])
        self.arrived += changes["new"] + changes["back"]  # first: no later roster tells of them again
        self.departed += left
        self._sites.works("roster", now)
        self._roster_failures = 0
        for pat_num in left:
            self.doors.log.warning("patient_left", pat_num=pat_num)
        self.doors.log.info("roster_read", count=len(patients), rows=len(changes["new"]))

    def _leaving(self, missing: Sequence[int], now: float) -> list[int]:
        """Of those whom a complete roster lacks, who has left. The others stay: so many at once are held.

        `roster_lacks` remembers who was held by which guard; once that is approved they leave with the next roster that
        lacks them, and once it is rejected they stay until a roster has them again. Nobody is held by the first roster
        of an index, which an archive filled with those who had left long ago.
        """
        index, only = self.doors.index, self.doors.settings.sync.patients
        wanted = {pat_num for pat_num in missing if only is None or pat_num in only}
        lacks = {pat: guard for pat, guard in json.loads(index.meta("roster_lacks") or "[]") if pat in wanted}
        held = index.value("SELECT id FROM guard WHERE scope = 'roster' AND state = 'held'")
        if held in lacks.values():
            holding.agree(index, self.doors.log, held, now)
        elif held is not None:
            holding.end_guard(index, self.doors.log, held, "over", now)
        states = {row["id"]: row["state"] for row in index.rows("SELECT id, state FROM guard WHERE scope = 'roster'")}
        fresh = wanted.difference(lacks)
        stay = {pat: guard for pat, guard in lacks.items() if states[guard] in ("held", "rejected")}
        if fresh and index.meta("roster_rows") is not None:
            before = len(missing) + int(index.value("SELECT count(*) FROM patient WHERE left_at IS NULL"))
            if guards.holds_roster(len(fresh) + [states[guard] for guard in lacks.values()].count("held"), before):
                guard = holding.hold(index, self.doors.log, "roster", len(fresh), before, now)
                stay |= dict.fromkeys(fresh, guard)
        index.remember("roster_lacks", json.dumps(sorted(stay.items())) if stay else None)
        sql = "UPDATE patient SET left_at = NULL WHERE pat_num IN (SELECT value FROM json_each(?))"
        index.run(sql, json.dumps(sorted(stay)))
        return [pat_num for pat_num in missing if pat_num not in stay]

    def met(self, patients: Sequence[Patient], now: float) -> list[int]:
        """Take over some rows of the roster: nobody left for not being among them. Answers who is new."""
        sync = self.doors.settings.sync
        changes = self.doors.index.apply_roster(patients, now, sync.patient_names, sync.patients, leaving=False)
        self._rename(changes["renamed"])
        arrived: list[int] = changes["new"] + changes["back"]
        self.arrived += arrived
        return arrived

    def _rename(self, pat_nums: Sequence[int]) -> None:
        """Beside their documents, too; an archive that is away gets it with the next roster."""
        self._renamed.update(pat_nums)
        with contextlib.suppress(SiteError):
            if self._renamed and self._sites.reason("archive") is None:
                self._publisher.name_patients(self._renamed.intersection(self.doors.archive.patients()))
                self._renamed.clear()

    def roster_refused(self, error: SyncdError, now: float) -> None:
        """The roster could not be read: everybody stays, and it is asked for again later."""
        self._roster_failures += 1
        self.roster_not_before = now + later(self._roster_failures)
        self.doors.log.warning("listing_refused", list="roster", failure=type(error).__name__)
        if not isinstance(error, (SiteError, TransientError)):  # those are a state of the API already
            self._sites.failed(SiteError("bad_answers"), now, lane="roster")

    def refused(self, key: ListKey, error: SyncdError, now: float) -> None:
        """A list could not be read: it waits; nothing else is concluded from that."""
        left = isinstance(error, ItemError)
        before = int(self.doors.index.value("SELECT failures FROM list WHERE pat_num = ? AND name = ?", *key) or 0)
        until = now + (LEFT_LIST_AGAIN if left else later(before + 1))
        failures = self.doors.index.list_failed(key, until)
        self.postponed.append((key, until))
        if failures & (failures - 1) == 0:
            self.doors.log.warning(
                "listing_refused", pat_num=key[0], list=key[1], failure=type(error).__name__, failures=failures
            )
        failure = "not_found" if left else "listing"  # of many patients: no patient's matter
        if isinstance(error, (ItemError, ListingError)) and self._bad_answers[key[1]].failed(
            failure, (key[1], key[0], 0)
        ):
            self._sites.failed(SiteError("bad_answers"), now, lane=LANE_OF_LIST[key[1]])

    def complete(self, key: ListKey, rows: Sequence[Listed], began: float, now: float) -> None:
        """Take over one complete listing, as old as its first page, which came at `began`.

        All actions are computed, then carried out in one transaction.
        """
        index = self.doors.index
        self.seen(key, rows, now)
        known = index.known(*key)
        sql = "SELECT kind, num FROM tombstone WHERE pat_num = ?"
        dead = {Item(key[0], row["kind"], row["num"]) for row in index.rows(sql, key[0])}
        found = compare(known, [row for row in rows if row.item not in dead], self.doors.settings.sync.kinds, now)
        newest = self._newest(rows)
        for row in found.uploads:  # first: nothing else would owe them once the list counts as polled
            self._upload(row, now)
        if not found.nothing:
            with index.transaction():
                index.apply_listing(key, found, len(rows), newest, began, now)
                for item in found.back if "thumbnail" in self.doors.settings.sync.kinds else ():
                    index.owe_thumbnail(item)
                self._moved_here(found, known, now)
                self._missing(key, found, known, now)
                holding.release(index, self.doors.log, now)
        else:
            index.apply_listing(key, found, len(rows), newest, began, now)
        self._bad_answers[key[1]].succeeded((key[1], key[0], 0))
        self._sites.works(LANE_OF_LIST[key[1]], now)
        self.settled.append((key, len(rows), newest if found.changed else None))
        self.doors.log.debug("list_polled", pat_num=key[0], list=key[1], rows=len(rows))

    def _newest(self, rows: Sequence[Listed]) -> float | None:
        """The youngest stamp as a time. Stamps sort as texts; those that are no times are passed over."""
        stamps = sorted({row.stamp or row.date_created for row in rows}, reverse=True)
        times = (local_time(stamp, self.doors.settings.zone) for stamp in stamps)
        return next((time for time in times if time is not None), None)

    def _moved_here(self, found: Difference, known: dict[Item, Known], now: float) -> None:
        created = {row.item: row.date_created for row in found.changed}
        for item in sorted({*created, *found.back}):
            self._left_its_mount(item, now)
        returned = {item for item in found.back if known[item].vanished}
        for item in sorted(returned.union(item for item in created if item not in known)):
            if not self.doors.index.reused(item):
                continue
            there = self.doors.index.elsewhere(item, created[item] if item in created else known[item].date_created)
            for old in there:
                self._vanish(old, now, item.full_id)
            if not there and item not in returned:
                self.doors.log.warning("number_reused", item=item.full_id)

    def _left_its_mount(self, item: Item, now: float) -> None:
        """A document that is listed, and was an image in a mount when last seen: the mount's row does not tell."""
        sql = "SELECT mount_num FROM item WHERE pat_num = ? AND num = ? AND kind = 'mount-image'"
        left = self.doors.index.value(f"{sql} AND vanished_at IS NULL", item.pat_num, item.num)
        if item.kind == "document" and left is not None:
            self.fetch_mounts(item.pat_num, now, left)

    def _missing(self, key: ListKey, found: Difference, known: dict[Item, Known], now: float) -> None:
        """What the listing lacks: moved at once, held by a guard, looked for, or vanished in time."""
        index = self.doors.index
        gone = []
        for each in found.newly_missing:
            there = index.elsewhere(each.item, each.date_created)
            if there:
                self._vanish(each.item, now, there[0].full_id)
            else:
                gone.append(each)
        live = sum(1 for each in known.values() if not each.vanished)
        self._hold(key, gone, live, now)
        if index.value("SELECT 1 FROM item WHERE pat_num = ? AND kind = 'mount' AND vanished_at IS NULL", key[0]):
            for each in gone:
                self._confirm(each, now)
        if nothing_vanishes(index):
            return
        for each in gone:
            seen = index.known_item(each.item)  # a guard may hold it by now
            if each.not_found and seen is not None and ripe(seen, now, self.doors.settings.sync.vanish_after):
                self._vanish(each.item, now)
        self._decide(found.still_missing, now)

    def _decide(self, missing: Sequence[Known], now: float) -> None:
        """What a second listing lacks: it agrees with a hold, is asked for by its number, or vanishes."""
        for each in missing:
            if each.held_by is not None and each.held_by > 0:
                holding.agree(self.doors.index, self.doors.log, each.held_by, now)
            elif ripe(each, now, self.doors.settings.sync.vanish_after):
                if each.item.kind == "document" and not each.not_found:
                    self._confirm(each, now)
                else:
                    self._vanish(each.item, now)

    def _hold(self, key: ListKey, gone: Sequence[Known], live: int, now: float) -> None:
        """Let the guards look at disappearances when they are first seen."""
        index = self.doors.index
        if not gone:
            return
        if guards.holds_patient(len(gone), live):
            holding.hold_items(index, self.doors.log, f"patient-{key[0]}", [each.item for each in gone], live, now)
            return
        recent = index.rows(
            "SELECT pat_num, kind, num, held_by, missing_since_at AS since FROM item WHERE missing_since_at > ?"
            " AND vanished_at IS NULL AND coalesce(held_by, 1) > 0 AND NOT EXISTS"
            " (SELECT 1 FROM guard WHERE scope IN ('all', 'patient-' || pat_num) AND ended_at >= since)",
            now - 86400.0,
        )
        if len(recent) < guards.PRACTICE_LEAST:
            return
        items = int(index.value("SELECT count(*) FROM item WHERE kind IN ('document', 'mount', 'sheet')") or 0)
        if guards.holds_practice(len(recent), items):
            free = [Item(r["pat_num"], r["kind"], r["num"]) for r in recent if r["held_by"] is None]
            holding.hold_items(index, self.doors.log, "all", free, items, now)

    def _confirm(self, known: Known, now: float) -> None:
        if known.item.kind == "document" and known.held_by is None:
            owe_confirmation(self.doors.index, known.item, known.revision, now)

    def confirmed(self, duty: Duty, row: Listed | None, now: float) -> None:
        """What the single GET said of a document that its listing lacks, or of an image that its mount denies."""
        index, item = self.doors.index, Item(duty.pat_num, "document", duty.num)
        index.duty_done("confirm", duty.pat_num, duty.num)
        known, gone = index.known_item(item), row is None or row.item.pat_num != item.pat_num
        if known is None or known.vanished:
            image = Item(item.pat_num, "mount-image", item.num)
            if gone:
                image_lacks(self.doors, image, now)
            else:
                index.set_item(image, "missing_since_at = NULL")
                self.fetch_mounts(item.pat_num, now)  # perhaps it is in another one by now
            return
        if known.missing_since_at is None or known.held_by is not None:
            return
        if row is not None and row.item.pat_num != item.pat_num and row.date_created == known.date_created:
            self._vanish(item, now, row.item.full_id)
        elif gone:  # or its number means another document now
            if ripe(known, now, self.doors.settings.sync.vanish_after):
                self._vanish(item, now)
        else:
            index.set_item(item, "missing_since_at = ?", now)  # it is there: looked for again a day later
            self.fetch_mounts(item.pat_num, now)

    def fetch_mounts(self, pat_num: int, now: float, only: int | None = None) -> bool:
        """An image went into a mount, or came out of `only` that one: mounts have no stamp that tells.

        False: no such mount is known.
        """
        kinds = self.doors.settings.sync.kinds
        methods: list[tuple[Method, Kind]] = [("mount", "mount"), ("mount-images", "mount-image")]
        sql = "SELECT num, revision FROM item WHERE pat_num = ? AND kind = 'mount' AND num = coalesce(?, num)"
        sql += " AND vanished_at IS NULL"
        mounts = self.doors.index.rows(sql, pat_num, only)
        for mount in mounts:
            for method in (method for method, kind in methods if kind in kinds):
                owing = Owing(method, Item(pat_num, "mount", mount["num"]), mount["revision"], now)
                self.doors.index.owe(owing, "moved", now)
        return bool(mounts)

    def _vanish(self, item: Item, now: float, became: str | None = None) -> None:
        if became is None and nothing_vanishes(self.doors.index):
            return
        for each in self.doors.index.vanish(item, now, became):
            with contextlib.suppress(ItemError, SiteError):  # an archive that is away: then the scrub finds it
                self._publisher.adopt_unknown(each, now)
            self.doors.log.info("item_moved" if became else "item_vanished", item=each.full_id, became=became or "")

    def _upload(self, row: Listed, now: float) -> None:
        """Archive an uploaded row's bytes, which came with the listing itself."""
        if row.upload is None or row.upload.content is None:
            return
        content, source = row.upload.content, self.doors.archive.new_incoming()
        sha256 = self.doors.archive.write_incoming(source, content)
        extension = extension_of(f"x.{row.upload.extension}")
        arrival = Arrival(
            *(row.item, source, sha256, len(content), extension, media_type(content[:512], extension), row.revision),
            *(row.file_name, now, now, "note", row.fields),
        )
        self._publisher.take_upload(arrival, now)


def owe_confirmation(index: Index, item: Item, revision: str, now: float) -> None:
    """A document, or an image in a mount, is to be asked for by its number."""
    index.run(
        "INSERT OR IGNORE INTO duty (method, pat_num, num, kind, revision, why, since_at, next_try_at)"
        " VALUES ('confirm', ?, ?, ?, ?, 'confirm', ?, ?)",
        *(item.pat_num, item.num, item.kind, revision, now, now),
    )


def later(failures: int) -> float:
    """Seconds until a list that could not be read is read again, after the n-th failure in a row."""
    return BAD_LIST_AGAIN * 2.0 ** min((failures - 1) // BAD_LIST_OFTEN, 4)
