"""Which list to poll next. Pure and deterministic: times come in as seconds since the epoch, UTC.

The web crawler's question: many pages, a fixed number of requests, and what changed shall be found soon (Cho &
Garcia-Molina 2003; Azar et al., PNAS 2018). Each free request polls the list with the greatest

    files waiting / (rate^(1 - exponent) * sqrt(pages)),   files waiting = the rate, summed up since the last poll.

While a list's rate stands still this grows in a straight line. Lists of about the same slope therefore share a queue,
the earliest start first, and a decision compares the heads of some fifty queues, whatever the number of lists.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Final
from zoneinfo import ZoneInfo

from syncd.model import ListKey, ListName, ListState

__all__ = ["Agenda", "Curve", "ListKey", "ListState", "Policy"]

NAMES: Final[tuple[ListName, ListName]] = ("documents", "sheets")
MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86_400.0
BLOCK: Final = 900.0  # no time zone changes its offset within a quarter of an hour
BLOCKS: Final = 1000  # remembered: ten days
PAGE_ROWS: Final = 100  # the vendor's largest page
FINENESS: Final = 6.0  # queues for a factor e of slopes
# A list's floor begins early: by night at three quarters of it, so that few fall due while people are awake, when
# requests are worth most; else a little before it, because half of the slots cannot take a weekend's lists all at once.
BY_NIGHT: Final = 0.75
BY_DAY: Final = 0.95
LATE: Final = 1.05  # floors: a list that waited so long comes before named ones, too
AT_ONCE: Final = 64  # entries looked at in one decision


@dataclass(frozen=True, slots=True)
class Curve:
    """Files per hour to expect around an event: one rate between each two `edges` (seconds from it), none outside."""

    edges: tuple[float, ...]
    documents: tuple[float, ...]
    sheets: tuple[float, ...]

    def rate(self, name: ListName, after: float) -> float:
        """The rate `after` seconds from the event; negative is before it."""
        place = bisect_right(self.edges, after)
        rates = self.documents if name == "documents" else self.sheets
        return rates[place - 1] if 0 < place < len(self.edges) else 0.0

    def next_edge(self, after: float) -> float:
        """The first edge behind `after`, in seconds from the event; infinity when there is none."""
        place = bisect_right(self.edges, after)
        return self.edges[place] if place < len(self.edges) else math.inf


def _curve(minutes: tuple[float, ...], documents: tuple[float, ...], sheets: tuple[float, ...]) -> Curve:
    return Curve(tuple(MINUTE * edge for edge in minutes), documents, sheets)


# The defaults come from the practice model of freshness.md, not from a practice. In the week before an appointment:
# web forms.
FORMS: Final = _curve((-10_080, -120), (0.002,), (0.011,))
# Around its start: the visit itself; letters follow it.
VISIT: Final = _curve(
    (-120, -60, -30, -10, 10, 30, 60, 90, 120, 180, 240),
    (0.0, 0.01, 0.41, 0.99, 1.5, 0.81, 0.23, 0.15, 0.11, 0.02),
    (0.01, 0.02, 0.62, 1.3, 0.72, 0.35, 0.19, 0.14, 0.10, 0.02),
)
# After a file of the patient appeared: the rest of the batch, then edits for two days.
CHANGE: Final = _curve(
    (0, 2, 5, 15, 40, 90, 180, 2880),
    (7.3, 0.19, 0.21, 0.18, 0.08, 0.03, 0.007),
    (5.8, 0.22, 0.20, 0.16, 0.08, 0.03, 0.008),
)
# After the patient's own row changed: checked in, checked out, or the front desk at work.
ROW: Final = _curve((0, 5, 15, 40, 90), (0.9, 0.04, 0.01, 0.01), (0.32, 0.02, 0.01, 0.01))


def week(weekday: tuple[float, ...], weekend: float) -> tuple[float, ...]:
    """168 speeds of an operational clock, one for each hour from Monday 0:00, local time."""
    return weekday * 5 + (weekend,) * 48


# Open hours pass at full speed; in the evening web forms and letters still come in, at night next to nothing.
MONDAY_TO_FRIDAY: Final = week((0.003,) * 8 + (1.0,) * 9 + (0.21, 0.14, 0.10, 0.10, 0.12) + (0.003,) * 2, 0.003)
# Web forms are filled in at work and, as many again, after it.
AT_HOME: Final = week((0.003,) * 8 + (1.0,) * 14 + (0.003,) * 2, 0.003)


@dataclass(frozen=True, slots=True)
class Policy:
    """How requests are spent. Rates are files per hour; the slow ones count hours of an operational clock only."""

    exponent: float = 0.6  # 0.5 is best for the mean delay; a little more helps the median much
    idle: float = 0.1  # a list below this is not worth a request; infinity: each list once, then only named ones
    rest: float = 20.0  # seconds between two polls of one list, for nobody scans faster; sooner only if it is named
    floor: float = DAY  # seconds after which a list is polled, whatever is expected of it
    time_zone: str = "UTC"
    speeds: tuple[float, ...] = MONDAY_TO_FRIDAY
    speeds_of_forms: tuple[float, ...] = AT_HOME
    kappa: tuple[float, float] = (2.35, 0.9)  # background of documents, sheets: kappa / (young + age of newest), hours
    young: float = 20 * DAY  # seconds: a change of last week says no more than one of last month
    unknown_age: float = 125 * DAY  # seconds: of a patient without any stamp; typical of a practice
    quick: float = 0.02  # files per hour: from here on an event goes on after hours, too, and counts all the time
    row_files: float = 0.05  # expected at once when the patient's row changed
    booked_files: float = 0.02  # sheets expected at once when an appointment becomes known: web forms
    asleep: float = 0.05  # speed of the clock below which it is night: a changed row is an aging run, nobody's hand
    row_burst: int = 60  # more changed rows than these within `row_burst_seconds` are nobody's hand, either
    row_burst_seconds: float = 300.0
    forms: Curve = FORMS
    visit: Curve = VISIT
    change: Curve = CHANGE
    row: Curve = ROW

    @classmethod
    def for_interval(cls, seconds: float, patients: int, time_zone: str = "UTC") -> Policy:
        """The policy for one request every `seconds`, for a practice of so many patients in that zone.

        A small practice has every list polled more often than once a day, for that is a small part of its budget.
        """
        load = seconds * patients / 10_000  # 1: half a sweep takes 2.8 hours
        floor = max(60 * seconds, DAY * load) if load < 1 else max(DAY, 6 * patients * seconds)
        return cls(idle=0.1 * max(1.0, load) ** 0.86, floor=floor, time_zone=time_zone)

    @classmethod
    def once(cls) -> Policy:
        """Each list that was never polled once, in the order they were added: a backfill."""
        return cls(idle=math.inf, floor=math.inf)


class Hours:
    """The wall clock, in hours: for what goes on after hours, too."""

    def hours(self, now: float) -> float:
        """Hours at `now`."""
        return now / HOUR


_WALL: Final = Hours()


class _List:
    """One list and where it waits. `entry` is its only valid place in a queue; None: it is in hand, or it left."""

    __slots__ = ("clock", "entry", "key", "named", "pages", "polled_at", "rate", "until", "watched")

    def __init__(self, state: ListState) -> None:
        self.key = state.key
        self.polled_at = state.polled_at
        self.pages = state.rows // PAGE_ROWS + 1
        self.rate = 0.0  # files per hour; 0 while it waits in no queue of slopes
        self.clock: Hours = _WALL  # whose hours these are
        self.entry: _Entry | None = None
        self.named = False
        self.until = 0.0  # it failed, and is not handed out before
        self.watched = False  # among the deadlines

    def __lt__(self, other: object) -> bool:
        """Of a patient who left and came back an old list may wait beside the new one: neither comes first."""
        return False


_Entry = tuple[float, ListKey, _List]  # the keys break ties
_Slopes = dict[int, tuple[float, list[_Entry]]]  # heaps by start, in hours: where a list's straight line was 0


class Agenda:
    """Hands out each list once until `polled` or `failed` says what became of it. O(log n) a decision.

    The order: what was named; what was never polled; a list as old as the floor, at most every second time; the
    greatest index above the threshold. Unknown lists and patients are ignored everywhere.
    """

    def __init__(self, lists: Iterable[ListState], policy: Policy, now: float) -> None:
        self._policy = policy
        self._clock = _Clock(policy.speeds, policy.time_zone)
        self._home = _Clock(policy.speeds_of_forms, policy.time_zone)
        self._now = now
        self._lists: dict[ListKey, _List] = {}
        self._newest: dict[int, float] = {}
        self._row_at: dict[int, float] = {}
        self._starts: dict[int, tuple[float, ...]] = {}
        self._next_edge: dict[int, float] = {}  # of the patients around whom something happens
        self._edges: list[tuple[float, int]] = []
        self._rows_lately: deque[float] = deque()
        self._first: tuple[deque[_Entry], deque[_Entry]] = deque(), deque()  # named; never polled, or failed before
        self._failed: list[_Entry] = []  # by the time when they may be polled again
        self._slopes: dict[Hours, _Slopes] = {self._clock: {}, self._home: {}, _WALL: {}}
        self._polled: list[_Entry] = []  # by a time of a poll, not always the last one
        self._floor_next = True
        for state in lists:
            self.add(state, now)

    def urgent(self, now: float) -> bool:
        """Whether a list was named, or is as old as the floor: then no bulk work comes first."""
        self._advance(now)
        return self._head(known=True) is not None or (self._floor_next and self._oldest(now) is not None)

    def next(self, now: float, known: bool = False) -> ListKey | None:
        """The list that is most worth a request, or None: nothing is worth one now.

        `known`: none of those that were never polled; while a practice is mirrored for the first time these are many.
        """
        self._advance(now)
        oldest = self._oldest(now)
        chosen = self._head(known)
        late = oldest is not None and now - oldest.polled_at > LATE * self._policy.floor
        if chosen is None or (chosen.named and late and self._floor_next):
            chosen = oldest if self._floor_next else None
            chosen = chosen or self._greatest(now) or oldest
        self._floor_next = chosen is None or chosen is not oldest
        if chosen is None:
            return None
        chosen.entry, chosen.rate, chosen.named = None, 0.0, False
        return chosen.key

    def polled(self, key: ListKey, now: float, rows: int, newest: float | None) -> None:
        """A complete listing was read. `newest`: the youngest stamp of rows new to us, else None."""
        self._advance(now)
        polled = self._lists.get(key)
        if polled is None:
            return
        again = polled.named and polled.entry is None  # what it was named for may have come behind the page we read
        polled.polled_at, polled.pages, polled.until, polled.named = now, rows // PAGE_ROWS + 1, 0.0, False
        self._wait(polled, 0.0, now)
        if self._learn(key[0], newest, now):
            self._refresh(key[0], now)
        if again:
            self.named(key, now)

    def failed(self, key: ListKey, now: float, until: float) -> None:
        """The list could not be read: not again before `until`, whoever names it; then before most others."""
        self._advance(now)
        failed = self._lists.get(key)
        if failed is not None:
            failed.rate, failed.named, failed.until = 0.0, False, max(now, until)
            failed.entry = failed.until, key, failed
            heapq.heappush(self._failed, failed.entry)

    def named(self, key: ListKey, now: float) -> None:
        """Somebody says that this list changed: poll it next, and once more if it is being polled just now."""
        self._advance(now)
        named = self._lists.get(key)
        if named is None or named.named or named.until:
            return
        named.named = True
        if named.entry is not None:
            named.rate, named.entry = 0.0, (now, key, named)
            self._first[0].append(named.entry)

    def appointment(self, pat_num: int, start: float, now: float) -> None:
        """The patient is expected at `start`. May be told again and again; one that is cancelled just passes."""
        self._advance(now)
        starts = self._starts.get(pat_num, ())
        if start not in starts and now - start < self._policy.visit.edges[-1] and self._knows(pat_num):
            self._starts[pat_num] = (*starts, start)
            self._refresh(pat_num, now, sheets=self._policy.booked_files)

    def row_changed(self, pat_num: int, when: float, now: float) -> None:
        """The patient's own row changed at `when`: somebody works with it, unless at night or very many together."""
        self._advance(now)
        when = min(when, now)
        repeated = when <= self._row_at.get(pat_num, -math.inf)
        if repeated or not self._knows(pat_num) or self._clock.speed(when) < self._policy.asleep:
            return
        lately, policy = self._rows_lately, self._policy
        while lately and lately[0] <= now - policy.row_burst_seconds:
            lately.popleft()
        lately.append(now)
        if len(lately) <= policy.row_burst:
            self._row_at[pat_num] = when
            self._refresh(pat_num, now, policy.row_files, policy.row_files)

    def add(self, state: ListState, now: float) -> None:
        """A list that is new to us; polled at 0 means never, so it comes before what is expected of others."""
        self._advance(now)
        learnt = self._learn(state.key[0], state.newest, now)
        if state.key in self._lists:
            return
        added = self._lists[state.key] = _List(state)
        if state.polled_at:
            rate, clock = self._rate(state.key, now)
            self._wait(added, rate * (clock.hours(now) - clock.hours(min(state.polled_at, now))), now)
        else:
            added.entry = now, state.key, added
            self._first[1].append(added.entry)
        if learnt:
            self._refresh(state.key[0], now)

    def remove(self, pat_num: int) -> None:
        """The patient left: none of the patient's lists is handed out any more."""
        for name in NAMES:
            left = self._lists.pop((pat_num, name), None)
            if left is not None:
                left.entry = None
        for known in (self._newest, self._row_at, self._starts, self._next_edge):
            known.pop(pat_num, None)

    def due_at(self) -> float | None:
        """Before this time `next` has nothing, if nothing is told; None: it never will."""
        if self._head() is not None:
            return self._now
        now, policy = self._now, self._policy
        times = [queue[0][0] for queue in (self._failed, self._edges) if queue]
        for slope, queue in self._slopes[_WALL].values():
            times += [HOUR * (entry[0] + max(policy.idle / slope, policy.rest / HOUR)) for entry in queue[:1]]
        if self._polled:
            floor = self._polled[0][0] + BY_NIGHT * policy.floor
            if self._clock.speed(now) >= policy.asleep:
                floor = min(max(floor, now // BLOCK * BLOCK + BLOCK), self._polled[0][0] + BY_DAY * policy.floor)
            times.append(floor)
        for clock in (self._clock, self._home):
            slopes = self._slopes[clock].values()
            hours = min((queue[0][0] + policy.idle / slope for slope, queue in slopes if queue), default=math.inf)
            if hours < math.inf:
                times.append(clock.when(hours, now, min([now + 7 * DAY, *times])))
        due = min(times, default=math.inf)
        return None if due == math.inf else max(due, now)

    # --- time passes

    def _advance(self, now: float) -> None:
        """Let happen what was to happen until now: failed lists may be tried again, curves pass their edges."""
        self._now = now
        while self._failed and self._failed[0][0] <= now:
            entry = heapq.heappop(self._failed)
            if entry[2].entry is entry:
                entry[2].until = 0.0
                self._first[1].append(entry)
        while self._edges and self._edges[0][0] <= now:
            edge, pat_num = heapq.heappop(self._edges)
            if self._next_edge.get(pat_num) == edge:
                self._refresh(pat_num, edge)

    def _oldest(self, now: float) -> _List | None:
        """The list that was polled longest ago, if that is longer than the floor."""
        early = self._policy.floor * (BY_DAY if self._clock.speed(now) >= self._policy.asleep else BY_NIGHT)
        for _ in range(AT_ONCE):
            if not self._polled or self._polled[0][0] + early > now:
                break
            _, key, oldest = self._polled[0]
            if self._lists.get(key) is not oldest or oldest.entry is None or oldest.until:
                heapq.heappop(self._polled)  # `polled` puts it back
                oldest.watched = False
            elif oldest.polled_at + early > now:
                heapq.heapreplace(self._polled, (oldest.polled_at, key, oldest))
            else:
                return oldest
        return None

    # --- where lists wait

    def _head(self, known: bool = False) -> _List | None:
        """The first of those that come before any index: of the named ones only, or also of those never polled."""
        for queue in self._first[:1] if known else self._first:
            while queue and queue[0][2].entry is not queue[0]:
                queue.popleft()
            if queue:
                return queue[0][2]
        return None

    def _greatest(self, now: float) -> _List | None:
        """The list with the greatest index, if that is above the threshold."""
        best, greatest = None, self._policy.idle
        for clock, slopes in self._slopes.items():
            hours, least = clock.hours(now), self._policy.rest / HOUR if clock is _WALL else 0.0
            for slope, queue in slopes.values():
                while queue and queue[0][2].entry is not queue[0]:
                    heapq.heappop(queue)
                if queue and (waited := hours - queue[0][0]) >= least and slope * waited > greatest:
                    best, greatest = queue[0][2], slope * waited
        return best

    def _wait(self, waiting: _List, files: float, now: float) -> None:
        """Queue the list by its rate of now, with so many files expected already."""
        policy, key = self._policy, waiting.key
        waiting.rate, waiting.clock = rate, clock = self._rate(key, now)
        line = round(FINENESS * (policy.exponent * math.log(rate) - 0.5 * math.log(waiting.pages)))
        slopes = self._slopes[clock]
        _, queue = slopes.get(line) or slopes.setdefault(
            line, (math.exp(line / FINENESS) * HOUR ** (1 - policy.exponent), [])
        )
        if len(queue) > 2 * len(self._lists) + AT_ONCE:  # so that no course of events can fill the memory
            queue[:] = [entry for entry in queue if entry[2].entry is entry]
            heapq.heapify(queue)
        waiting.entry = clock.hours(now) - files / rate, key, waiting
        heapq.heappush(queue, waiting.entry)
        if not waiting.watched:
            waiting.watched = True
            heapq.heappush(self._polled, (waiting.polled_at, key, waiting))

    def _refresh(self, pat_num: int, now: float, documents: float = 0.0, sheets: float = 0.0) -> None:
        """Something happened to the patient: new rates for both lists, and so many files more expected in them."""
        passed = self._policy.visit.edges[-1]
        if pat_num in self._starts:
            self._starts[pat_num] = tuple(start for start in self._starts[pat_num] if now - start < passed)
        edge = min((at + curve.next_edge(now - at) for at, curve in self._events(pat_num)), default=math.inf)
        if edge == math.inf:
            for known in (self._next_edge, self._starts, self._row_at):
                known.pop(pat_num, None)
        else:
            self._next_edge[pat_num] = edge = max(edge, now + 1.0)  # rounding may name the edge that was just passed
            heapq.heappush(self._edges, (edge, pat_num))
        for name, more in zip(NAMES, (documents, sheets), strict=True):
            waiting = self._lists.get((pat_num, name))
            if waiting is not None and waiting.rate and waiting.entry is not None:
                files = waiting.rate * (waiting.clock.hours(now) - waiting.entry[0])
                self._wait(waiting, files + more, now)

    # --- what is expected

    def _rate(self, key: ListKey, now: float) -> tuple[float, Hours]:
        """Files per hour to be expected in the list, and the clock that counts these hours."""
        policy, (pat_num, name) = self._policy, key
        newest = self._newest.get(pat_num)
        age = policy.unknown_age if newest is None else max(0.0, now - newest)
        best: tuple[float, Hours] = policy.kappa[name == "sheets"] * HOUR / (policy.young + age), self._clock
        if pat_num in self._next_edge:
            for at, curve in self._events(pat_num):
                rate = curve.rate(name, now - at)
                if rate > best[0]:
                    slow = self._home if curve is policy.forms else self._clock
                    best = rate, _WALL if rate >= policy.quick else slow
        return best

    def _events(self, pat_num: int) -> Iterator[tuple[float, Curve]]:
        """What happens around the patient, and what follows from it."""
        policy = self._policy
        if pat_num in self._newest:
            yield self._newest[pat_num], policy.change
        if pat_num in self._row_at:
            yield self._row_at[pat_num], policy.row
        for start in self._starts.get(pat_num, ()):
            yield start, policy.visit
            yield start, policy.forms

    def _learn(self, pat_num: int, newest: float | None, now: float) -> bool:
        """Note the youngest stamp of the patient; true if it is news of the last days."""
        if newest is None or newest <= self._newest.get(pat_num, -math.inf):
            return False
        self._newest[pat_num] = newest = min(newest, now)  # a stamp from the future says no more than one of now
        return now - newest < self._policy.change.edges[-1]

    def _knows(self, pat_num: int) -> bool:
        return any((pat_num, name) in self._lists for name in NAMES)


class _Clock(Hours):
    """The operational clock: hours since long ago, at the speed that the local week gives to each hour."""

    def __init__(self, speeds: tuple[float, ...], time_zone: str) -> None:
        self._speeds = speeds
        self._passed = tuple(accumulate(speeds, initial=0.0))
        self._zone = ZoneInfo(time_zone)
        self._block: tuple[float, float, float] = 0.0, 0.0, 0.0  # start, s; hours at the start; speed
        self._blocks: dict[float, tuple[float, float, float]] = {}  # by their start

    def hours(self, now: float) -> float:
        """Operational hours at `now`. It may fall by a moment's worth when summer time ends, at night."""
        start, hours, speed = self._block
        if not start <= now < start + BLOCK:
            start = now // BLOCK * BLOCK
            self._block = start, hours, speed = self._blocks.get(start) or self._block_at(start)
        return hours + speed * (now - start) / HOUR

    def _block_at(self, start: float) -> tuple[float, float, float]:
        local = datetime.fromtimestamp(start, UTC).astimezone(self._zone)
        weeks, day = divmod(local.toordinal() - 1, 7)  # day 1 of the calendar was a Monday
        hour = 24 * day + local.hour
        speed = self._speeds[hour]
        hours = weeks * self._passed[-1] + self._passed[hour] + speed * local.minute / 60
        if len(self._blocks) > BLOCKS:
            self._blocks.clear()
        self._blocks[start] = block = start, hours, speed
        return block

    def speed(self, now: float) -> float:
        """1.0 while the practice is open, next to nothing at night."""
        self.hours(now)
        return self._block[2]

    def when(self, hours: float, now: float, limit: float) -> float:
        """The time when so many operational hours will have passed, or `limit` where that is earlier."""
        while now < limit:
            lacking = hours - self.hours(now)
            end = now // BLOCK * BLOCK + BLOCK
            speed = self._block[2]
            if lacking <= speed * (end - now) / HOUR:
                return min(limit, now + max(0.0, lacking) / speed * HOUR) if lacking > 0 else now
            now = end
        return limit
