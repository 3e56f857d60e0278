"""A dental practice as a stream of files: who comes when, what is scanned, signed, written and edited.

The model of freshness: one year of history, then `days` to judge, Monday to Friday 8 to 17. Times are seconds since
the epoch, local time is UTC, day 0 is a Monday. It knows nothing of HTTP: `syncd.demo` is the practice that speaks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from random import Random
from typing import Final

from syncd.model import ListKey, ListName

DAY: Final = 86_400.0
HOUR: Final = 3600.0
MINUTE: Final = 60.0
MONDAY: Final = 1_794_787_200.0  # 2026-11-16 00:00 UTC: day 0
OPENS, CLOSES = 8, 17
HISTORY_DAYS: Final = 364
BATCHES: Final = 31  # of the back office on a day, in a practice of 10,000
BATCH: Final = 1.5  # files, in the mean
LATELY: Final = 14  # days in which a visit keeps the back office busy
AGING_DAY: Final = 30  # once in so many days, at 02:30, rows of patients are touched by nobody's hand


@dataclass(frozen=True, slots=True)
class File:
    """A new row, or a new revision of one, that appears `at` in this list of this patient."""

    at: float
    key: ListKey
    image: bool = False
    edit: bool = False


@dataclass(frozen=True, slots=True)
class Appointment:
    """Booked at `booked`; `listed` is false for a walk-in, which no appointment list ever tells."""

    start: float
    pat_num: int
    booked: float
    listed: bool = True


@dataclass
class Practice:
    """Everything that happens from `seed`, drawn at once: files, appointments and touched patient rows, by time."""

    seed: int
    patients: int = 10_000
    days: int = 60
    walk_ins: float = 0.0
    files: list[File] = field(default_factory=list)
    appointments: list[Appointment] = field(default_factory=list)
    row_changes: list[tuple[float, int]] = field(default_factory=list)
    rows: dict[ListKey, int] = field(default_factory=dict)  # at the start of day 0
    newest: dict[int, float] = field(default_factory=dict)  # of each patient before day 0
    propensity: list[float] = field(default_factory=list)  # of a visit, of the active patients 1, 2, 3, ...

    def __post_init__(self) -> None:
        self._draw = Random(self.seed)
        self._scale = self.patients / 10_000
        active = max(1, self.patients // 4)
        self.propensity = [self._draw.gammavariate(1.2, 1.0) for _ in range(active)]
        self._shares = list(accumulate(self.propensity))
        for pat_num in range(1, self.patients + 1):
            self.rows[pat_num, "documents"] = round(12 * exp(self._draw.gauss(0, 1)))
            self.rows[pat_num, "sheets"] = round(4 * exp(self._draw.gauss(0, 1)))
            self.newest[pat_num] = MONDAY - DAY * (HISTORY_DAYS + self._draw.expovariate(1 / 365))
        self.came: dict[int, list[int]] = defaultdict(list)  # by day, in the past and the future
        self._visits()
        for day in range(-HISTORY_DAYS, self.days):
            if self._is_open(day):
                self._back_office(day)
            self._touched_rows(day)
        self.files += [edit for each in self.files if (edit := self._edit(each))]
        self._begin_at_day_0()

    # --- who comes when

    def _visits(self) -> None:
        follow_ups: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for day in range(-HISTORY_DAYS, self.days + 60):
            if not self._is_open(day):
                continue
            wanted = max(0, round(self._draw.gauss(50 * self._scale, 4 * self._scale**0.5)))
            come_back = follow_ups.pop(day, [])
            booked = come_back[:wanted] + [(self._somebody(0.06), -1.0) for _ in range(wanted - len(come_back))]
            for pat_num, booked_at in booked:
                start = _day(day) + OPENS * HOUR + 600 * self._draw.randrange(51)  # 8:00, 8:10, ... 16:20
                made = booked_at if booked_at >= 0 else self._booking(day, start)
                listed = self._draw.random() >= self.walk_ins
                self.appointments.append(Appointment(start, pat_num, made, listed))
                if self._draw.random() < 0.3:
                    later = day + self._draw.randint(7, 21)
                    while not self._is_open(later):
                        later += 1
                    follow_ups[later].append((pat_num, start + HOUR))
                if self._draw.random() >= 0.07:  # else nobody came
                    self._visit(pat_num, start)
                    self.came[day].append(pat_num)
                self._web_forms(pat_num, day, made)

    def _booking(self, day: int, start: float) -> float:
        chance = self._draw.random()
        if chance < 0.05:
            return self._draw.uniform(_day(day) + OPENS * HOUR - 1800, start)
        ahead = self._draw.randint(1, 3) if chance < 0.15 else self._draw.randint(8, 60)
        return _day(day - ahead) + HOUR * self._draw.uniform(OPENS, CLOSES)

    def _somebody(self, anybody: float) -> int:
        """An active patient by propensity; with the chance `anybody` one of all the others."""
        active = len(self.propensity)
        if self._draw.random() < anybody:
            return self._draw.randint(min(active + 1, self.patients), self.patients)
        return self._draw.choices(range(1, active + 1), cum_weights=self._shares)[0]

    # --- what they leave behind

    def _seen_lately(self, day: int) -> int:
        back = day - int(self._draw.uniform(0, LATELY))
        return self._draw.choice(self.came.get(back) or [self._somebody(0)])

    def _visit(self, pat_num: int, start: float) -> None:
        chance, minutes = self._draw.random, self._draw.uniform
        came = start + MINUTE * self._draw.gauss(0, 8)
        left = came + MINUTE * minutes(45, 65)
        if chance() < 0.7:  # signed at the desk
            self._burst((pat_num, "sheets"), came + MINUTE * minutes(-15, 25), 1 + self._poisson(0.6))
        if chance() < 0.4:
            kind = chance()
            many = 18 if kind < 0.05 else 4 if kind < 0.25 else 1 + self._poisson(1.5)
            self._burst((pat_num, "documents"), came + MINUTE * minutes(-18, 50), many, image=True)
        if chance() < 0.35:
            self._burst((pat_num, "sheets"), came + MINUTE * minutes(15, 150), 1)
        if chance() < 0.35:
            self._burst((pat_num, "documents"), left + MINUTE * minutes(0, 120), 1)
        for touched, at in ((chance() < 0.45, came), (chance() < 0.5, left)):
            if touched:
                self.row_changes.append((at, pat_num))

    def _web_forms(self, pat_num: int, day: int, booked: float) -> None:
        if self._draw.random() < 0.45:
            evening = self._draw.random() < 0.5
            hour = self._draw.uniform(18, 22) if evening else self._draw.uniform(OPENS, 18)
            at = _day(self._draw.choice([early for early in range(day - 7, day) if self._is_open(early)])) + hour * HOUR
            if at > booked:
                self._burst((pat_num, "sheets"), at, 1)

    def _back_office(self, day: int) -> None:
        for _ in range(self._poisson(BATCHES * self._scale)):
            pat_num = self._draw.randint(1, self.patients) if self._draw.random() < 0.3 else self._seen_lately(day)
            name: ListName = "documents" if self._draw.random() < 0.8 else "sheets"
            at = _day(day) + HOUR * self._draw.uniform(OPENS, CLOSES)
            self._burst((pat_num, name), at, 1 + self._poisson(BATCH - 1), image=name == "documents")
            if self._draw.random() < 0.3:
                self.row_changes.append((at, pat_num))

    def _touched_rows(self, day: int) -> None:
        for _ in range(self._poisson(60 * self._scale) if self._is_open(day) else 0):
            at = _day(day) + HOUR * self._draw.uniform(OPENS, CLOSES)
            self.row_changes.append((at, self._draw.randint(1, self.patients)))
        if day >= 0 and day % AGING_DAY == AGING_DAY // 2:
            touched = self._draw.sample(range(1, self.patients + 1), self.patients // 20)
            self.row_changes += [(_day(day) + 2.5 * HOUR, pat_num) for pat_num in touched]

    def _edit(self, file: File) -> File | None:
        if self._draw.random() >= 0.18:
            return None
        chance, uniform = self._draw.random(), self._draw.uniform
        at = file.at
        if chance < 0.5:
            at += MINUTE * uniform(1, 40)
        else:
            at = _open_time(at + (uniform(0, 2 * DAY) if chance < 0.8 else uniform(2 * DAY, 60 * DAY)))
        return File(at, file.key, file.image, edit=True)

    def _burst(self, key: ListKey, at: float, many: int, image: bool = False) -> None:
        for _ in range(many):
            self.files.append(File(at, key, image))
            at += self._draw.uniform(20, 90)

    # --- draws

    def _poisson(self, mean: float) -> int:
        """Knuth's way, in pieces small enough for exp()."""
        count = 0
        while mean > 0:
            limit, mean, product = exp(-min(mean, 50.0)), mean - 50.0, self._draw.random()
            while product > limit:
                count, product = count + 1, product * self._draw.random()
        return count

    @staticmethod
    def _is_open(day: int) -> bool:
        return day % 7 < 5

    def _begin_at_day_0(self) -> None:
        for file in sorted(self.files, key=lambda each: each.at):
            if file.at < MONDAY:
                pat_num = file.key[0]
                self.newest[pat_num] = max(self.newest[pat_num], file.at)
        end = _day(self.days)
        self.files = sorted((each for each in self.files if MONDAY <= each.at < end), key=lambda each: each.at)
        self.appointments = sorted(
            (each for each in self.appointments if each.start >= MONDAY and each.booked < end), key=lambda e: e.booked
        )
        self.row_changes = sorted(each for each in self.row_changes if MONDAY <= each[0] < end)


def _day(day: int) -> float:
    return MONDAY + day * DAY


def _open_time(at: float) -> float:
    """The same moment, or one spread over the next opening hours if the practice is closed then."""
    day, second = divmod(at - MONDAY, DAY)
    if day % 7 < 5 and OPENS * HOUR <= second < CLOSES * HOUR:
        return at
    day += second >= CLOSES * HOUR
    while day % 7 >= 5:
        day += 1
    return _day(int(day)) + OPENS * HOUR + second * (CLOSES - OPENS) / 24


def is_open(at: float) -> bool:
    """Whether the practice works at that moment."""
    day, second = divmod(at - MONDAY, DAY)
    return day % 7 < 5 and OPENS * HOUR <= second < CLOSES * HOUR
