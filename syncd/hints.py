"""Hints: cheap questions about the whole practice that say which lists are worth a request. None of them is a proof.

The change feed (where the key may use ShortQuery), patients whose row changed, appointments, and a nightly count. Each
is optional: one that is refused, fails again and again, or ignores what it was asked is left alone for a day, which
costs freshness only. A filter is trusted once an impossible value found nothing, for some methods ignore filters that
they do not know (facts.md).
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, cast

from syncd import changes
from syncd.agenda import Agenda
from syncd.changes import Change, Place, Rounds, Row
from syncd.diff import DAY, HOUR, local_time
from syncd.errors import ListingError, NoSuchMethodError, SiteError, SyncdError
from syncd.listing import Lists, Step
from syncd.model import LARGEST_KEY, Appointment, ListKey, Patient
from syncd.pacing import office_is_open

Days = tuple[str, str]  # first and last, yyyy-mm-dd in the office's time
Hint = Literal["permissions", "feed", "count", "patients", "today", "week"]
HINTS: Final[tuple[Hint, ...]] = ("permissions", "feed", "count", "patients", "today", "week")
EVERY: Final[dict[Hint, float]] = {
    "permissions": DAY,
    "feed": 60.0,
    "count": DAY,
    "patients": 180.0,
    "today": 1200.0,
    "week": DAY,
}
FEED_EVERY_CLOSED = 300.0
BUDGET_OF_A_HINT = 0.05  # at most, where requests are rarer than one a second
KEPT_DAYS = dt.timedelta(7)  # that appointments are kept after their day
NIGHT = 1  # o'clock in the practice: when the patients' documents are counted
AGING_RUN = 60  # rows at once: a nightly run over everybody, and no visits (freshness.md)
PAGES_A_ROUND = 10
MOST_PAGES = 100  # of patients or appointments, for one question
SLOW = 10.0  # seconds that an answer of the feed may take
TRIES = 3
IMPOSSIBLE_STAMP, IMPOSSIBLE_DAY = "2999-01-01 00:00:00", "1801-01-01"
WITHOUT_VISIT = ("Broken", "UnschedList", "Planned", "PtNote", "PtNoteCompleted")


class HintStep:
    """One request of a hint. `follow` takes its answer and says what must be asked next, if anything."""

    bulk = False

    def __init__(self, hints: Hints, hint: Hint, ask: Callable[[], object], follow: Callable[..., Step | None]) -> None:
        self._hints, self._hint, self._ask, self._follow = hints, hint, ask, follow

    def ask(self) -> object:
        """The request. A key that may not have this hint (401, 403) is good for all else, or the next list tells."""
        try:
            return self._ask()
        except SiteError as error:
            if error.reason == "key_refused":
                raise NoSuchMethodError(str(error)) from error
            raise

    def take(self, answer: object, now: float) -> Step | None:
        """Tell the agenda. What cannot be understood is no hint; only a last page is a success."""
        try:
            step = self._follow(answer, now)
        except ListingError as error:
            return self.failed(error, now)
        if step is None:
            self._hints.succeeded(self._hint)
        return step

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """Try again in its time; after three failures, or where it is refused, tomorrow."""
        self._hints.failed(self._hint, error, now)
        return None

    def abandon(self) -> None:
        """It is asked again in its time."""


class Hints:
    """When which hint is due, and what came of it, until `tell`: `named`, `visits`, `touched`."""

    def __init__(self, lists: Lists) -> None:
        self._lists, self._doors = lists, lists.doors
        sync = self._doors.settings.sync
        off = float("inf")
        self._at: dict[Hint, float] = dict.fromkeys(HINTS, 0.0)
        self._at["feed"] = self._at["count"] = off  # until the key is known to have the permission
        if sync.change_feed == "off":
            self._at["permissions"] = off
        if sync.appointments == "off":
            self._at["today"] = self._at["week"] = off
        self._failures: Counter[Hint] = Counter()
        self._trusted: set[str] = set()
        self._rounds, self._after, self._round_at = Rounds(), cast("Place | None", None), ""
        self._since: str | None = None  # patients whose rows were stamped since
        self._newest = ""
        self.named: list[ListKey] = []
        self.visits: list[tuple[int, float]] = []
        self.touched: list[tuple[int, float]] = []

    def due(self, now: float) -> Step | None:
        """The hint that is due, if one is. Before the first roster nobody is known whom it could concern."""
        if not self._doors.index.meta_time("roster_at"):
            return None
        for hint in HINTS:
            if now >= self._at[hint]:
                self._at[hint] = now + self._period(hint, now)
                return self._step(hint, now)
        return None

    def tell(self, agenda: Agenda, now: float) -> None:
        """Tell the agenda what was learnt since the last time."""
        for key in self.named:
            agenda.named(key, now)
        for pat_num, start in self.visits:
            agenda.appointment(pat_num, start, now)
        for pat_num, when in self.touched:
            agenda.row_changed(pat_num, when, now)
        for told in (self.named, self.visits, self.touched):
            told.clear()

    def put_right(self, now: float) -> None:
        """The machine's clock was set: nothing waits for the length of the leap."""
        self._at = {hint: at if at == float("inf") else min(at, now + EVERY[hint]) for hint, at in self._at.items()}

    def succeeded(self, hint: Hint) -> None:
        """It was answered."""
        del self._failures[hint]

    def failed(self, hint: Hint, error: SyncdError, now: float) -> None:
        """Refused (`NoSuchMethodError`), or three times in a row not answered well: off until tomorrow."""
        self._failures[hint] += 1
        if hint == "permissions":  # else its time is a day later
            self._at[hint] = now + HOUR / 4
        if hint == "feed":
            self._after = None
        if isinstance(error, NoSuchMethodError) or self._failures[hint] >= TRIES:
            self._at[hint] = now + DAY
            self.succeeded(hint)
            self._doors.log.warning("hint_off", hint=hint, failure=type(error).__name__)
            if hint == "feed":
                self._doors.index.remember("feed_off_until", repr(now + DAY))

    def _period(self, hint: Hint, now: float) -> float:
        settings = self._doors.settings
        every = EVERY[hint]
        if hint == "feed" and not office_is_open(settings, now):
            every = FEED_EVERY_CLOSED
        if hint == "count":
            every = _seconds_to(NIGHT, settings.zone, now)
        return max(every, settings.api.min_interval / BUDGET_OF_A_HINT)

    def _step(self, hint: Hint, now: float) -> Step:
        api, today = self._doors.api, dt.datetime.fromtimestamp(now, self._doors.settings.zone).date()
        if hint == "permissions":
            return HintStep(self, hint, api.permissions, self._permitted)
        if hint == "feed":
            return self._feed_step()
        if hint == "count":
            return self._count_step(0)
        if hint == "patients":
            return self._patients_step(0)
        ahead = (0, 1) if hint == "today" else (2, 7)  # tomorrow's, too: it is prepared today (`export --day tomorrow`)
        first, last = ((today + dt.timedelta(days)).isoformat() for days in ahead)
        return self._appointments_step(hint, (first, last))

    # --- the change feed

    def _permitted(self, answer: object, now: float) -> None:
        """Whether the key may use ShortQuery: any permission with Queries in its name."""
        allowed = isinstance(answer, frozenset) and any("queries" in name.lower() for name in answer)
        off_until = self._doors.index.meta_time("feed_off_until")
        self._at["feed"] = max(now, off_until) if allowed else float("inf")
        self._at["count"] = now + _seconds_to(NIGHT, self._doors.settings.zone, now) if allowed else float("inf")

    def _feed_step(self, pages: int = 0) -> Step:
        since = self._doors.index.meta("feed_server_time")
        ask = partial(self._queried, changes.query(since, self._after))
        return HintStep(self, "feed", ask, partial(self._changed, pages=pages, since=since))

    def _queried(self, sql: str) -> Sequence[Row]:
        """Raises ListingError for an answer that took the practice's database too long."""
        asked_at = self._doors.clock.steady()
        rows = self._doors.api.short_query(sql)
        if self._doors.clock.steady() - asked_at > SLOW:
            raise ListingError("the database answers slowly")
        return rows

    def _changed(self, rows: Sequence[Row], now: float, pages: int, since: str | None) -> Step | None:
        """One page of a round; a round that was read to its end moves the start of the next one."""
        page = changes.read(rows, first=self._after is None)
        self._round_at = page.server_time or self._round_at
        for change in self._rounds.news(page.changes):
            self._name(change, now)
        if page.more and since is not None and not changes.stale(since, self._round_at):
            self._after = page.more  # more pages than a round may have: the next one goes on from here
            return self._feed_step(pages + 1) if pages + 1 < PAGES_A_ROUND else None
        self._after = None
        with self._doors.index.transaction():
            self._doors.index.remember("feed_server_time", self._round_at)
            self._doors.index.remember("feed_at", repr(now))
        self._rounds.forget(self._round_at)
        return None

    def _name(self, change: Change, now: float) -> None:
        """What a row that changed makes worth a request: a list, or the mount that the image is in."""
        index, kind = self._doors.index, "document" if change.source == 1 else "sheet"
        if index.value("SELECT 1 FROM patient WHERE pat_num = ? AND left_at IS NULL", change.pat_num) is None:
            self._at["patients"] = now
            return
        row = index.rows(
            "SELECT revision FROM item WHERE pat_num = ? AND kind = ? AND num = ? AND vanished_at IS NULL"
            " AND missing_since_at IS NULL",
            *(change.pat_num, kind, change.num),
        )
        if not change.mount_num:
            if not row or row[0]["revision"] != change.stamp:
                self.named.append((change.pat_num, change.list_name))
            return
        fetched = self._lists.fetch_mounts(change.pat_num, now, change.mount_num)
        if row or not fetched:  # it went into the mount, or the mount is new
            self.named.append((change.pat_num, "documents"))

    # --- how many documents each patient has

    def _count_step(self, after: int) -> Step:
        sql = changes.count_query(after)
        return HintStep(self, "count", partial(self._queried, sql), partial(self._counted, after=after))

    def _counted(self, rows: Sequence[Row], now: float, after: int) -> Step | None:
        """Patients whose documents are others than the index knows: something was deleted, or missed."""
        del now
        counts = changes.read_counts(rows)
        last = counts[-1][0] if len(counts) >= changes.PAGE else LARGEST_KEY
        here = self._doors.index.rows(
            "SELECT pat_num, count(*) AS count, sum(num) AS total FROM item WHERE kind = 'document' AND pat_num > ?"
            " AND pat_num <= ? AND vanished_at IS NULL GROUP BY pat_num",
            *(after, last),
        )
        differ = {(row["pat_num"], row["count"], row["total"]) for row in here}.symmetric_difference(counts)
        self.named += [(pat_num, "documents") for pat_num in sorted({each[0] for each in differ})]
        return self._count_step(last) if last < LARGEST_KEY else None

    # --- patients and appointments

    def _patients_step(self, offset: int, before: Sequence[Patient] = ()) -> Step:
        if "patients" not in self._trusted:
            return self._proof("patients", partial(self._doors.api.patients, 0, 1, IMPOSSIBLE_STAMP))
        if self._since is None:
            self._since = self._doors.index.value("SELECT max(stamp) FROM patient") or IMPOSSIBLE_STAMP
        ask = partial(self._doors.api.patients, offset, self._lists.limit, self._since)
        return HintStep(self, "patients", ask, partial(self._patients, offset=offset, before=before))

    def _patients(self, answer: Sequence[Patient], now: float, offset: int, before: Sequence[Patient]) -> Step | None:
        """Who is new, and whose row changed: one page; the next round asks from the newest stamp on."""
        for pat_num in self._lists.met(answer, now):
            self.named += [(pat_num, "documents"), (pat_num, "sheets")]
        rows, since = offset + len(answer), self._since or ""
        fresh = [patient for patient in answer if patient.stamp > since]
        self._newest = max([self._newest, *(patient.stamp for patient in fresh)])
        if rows <= AGING_RUN:
            zone = self._doors.settings.zone
            self.touched += [(patient.pat_num, local_time(patient.stamp, zone) or now) for patient in fresh]
        no_end = rows >= MOST_PAGES * self._lists.limit
        if len(answer) >= self._lists.limit and not no_end:
            _advance([patient.pat_num for patient in answer], [patient.pat_num for patient in before])
            return self._patients_step(rows, answer)
        self._since = max(since, self._newest)
        if no_end:
            raise ListingError("the changed patients do not end")
        return None

    def _appointments_step(self, hint: Hint, days: Days, before: Sequence[Appointment] = ()) -> Step:
        if "appointments" not in self._trusted:
            return self._proof(hint, partial(self._doors.api.appointments, IMPOSSIBLE_DAY, IMPOSSIBLE_DAY, 0))
        ask = partial(self._doors.api.appointments, *days, len(before))
        return HintStep(self, hint, ask, partial(self._appointments, hint=hint, days=days, before=before))

    def _appointments(
        self, answer: Sequence[Appointment], now: float, hint: Hint, days: Days, before: Sequence[Appointment]
    ) -> Step | None:
        """Who is expected, and when, in the office's own time; kept once the last page of these days was read."""
        seen = [*before, *answer]
        if len(answer) >= changes.PAGE:
            _advance(answer, before)
            if len(seen) >= MOST_PAGES * changes.PAGE:
                raise ListingError("the appointments do not end")
            return self._appointments_step(hint, days, seen)
        zone = self._doors.settings.zone
        starts = ((each, local_time(each.starts, zone)) for each in seen if each.status not in WITHOUT_VISIT)
        visits = [(each.starts[:10], start, each.pat_num) for each, start in starts if start is not None]
        self.visits += [(pat_num, start) for _, start, pat_num in visits]
        self._keep([visit for visit in visits if days[0] <= visit[0] <= days[1]], days, now)
        return None

    def _keep(self, visits: Sequence[tuple[str, float, int]], days: Days, now: float) -> None:
        """These days are now known as this answer tells them; days long past are of no more use."""
        first, last = map(dt.date.fromisoformat, days)
        asked = [(first + dt.timedelta(n)).isoformat() for n in range((last - first).days + 1)]
        index, past = self._doors.index, (first - KEPT_DAYS).isoformat()
        with index.transaction():
            index.run("DELETE FROM appointment_day WHERE day BETWEEN ? AND ? OR day < ?", *days, past)
            for day in asked:
                index.run("INSERT INTO appointment_day VALUES (?, ?)", day, now)
            for visit in visits:
                index.run("INSERT OR IGNORE INTO appointment VALUES (?, ?, ?)", *visit)

    def _proof(self, hint: Hint, ask: Callable[[], Sequence[object]]) -> Step:
        """An impossible question: an answer shows that the filter is ignored, and what it would tell is nothing."""
        name = "patients" if hint == "patients" else "appointments"

        def proven(answer: Sequence[object], now: float) -> Step | None:
            if answer:
                raise ListingError(f"the filter of {name} is ignored")
            self._trusted.add(name)
            return self._step(hint, now)

        return HintStep(self, hint, ask, proven)


def _advance(page: Sequence[object], before: Sequence[object]) -> None:
    """Raises ListingError for a page without anything new: an office that ignores Offset would answer for ever."""
    if set(page) <= set(before):
        raise ListingError("the pages do not advance")


def _seconds_to(hour: int, zone: dt.tzinfo, now: float) -> float:
    """Seconds to that hour of the next night, in local time; at least an hour."""
    local = dt.datetime.fromtimestamp(now, zone)
    then = (local + dt.timedelta(days=1)).replace(hour=hour, minute=0, second=0, microsecond=0)
    return max(HOUR, then.timestamp() - now)
