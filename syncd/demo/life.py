"""The life of a practice: visits with scans, images and sheets, web forms, back office, edits, deletions, moves; by
seed.

The parameters are those of the project's practice model, each for 10,000 patients where it is a rate. Nothing is
measured in a real practice.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from syncd.demo.build import Past, add_any_document
from syncd.demo.practice import Practice
from syncd.demo.schema import APT_STATUSES, PAT_STATUSES
from syncd.demo.truth import can_be_placed

_MINUTE, _HOUR, _DAY = 60.0, 3_600.0, 86_400.0
_PER = 10_000
_SATURDAY = 5
_COMPLETE, _BROKEN = APT_STATUSES.index("Complete"), APT_STATUSES.index("Broken")
_SHEET_DEFS = (20, 22, 23, 24, 25)


@dataclass(frozen=True)
class Habits:
    """How a practice lives. Rates a day are for 10,000 patients; chances are for one visit or file unless they say
    otherwise.

    `appointments` (sd `appointments_sd`) a day; `active` share of patients with `inactive_visits` of the appointments
    from the rest; `propensity`: shape of the gamma distribution of visits among the active. `lateness`: minutes, sd.
    `series`, `bitewings`: of the visits with images, those with a full series of 18 or 4 bitewings in a mount.
    `batches` a day of back office work. `edits` of files. `false_rows`: row changes a day without cause. Of visits:
    `check_in`, `check_out`: the patient's row changes. Rare events a day: `deletes`, `moves`, `merges`,
    `mount_moves`, `replacements` (bytes), `quiet_replacements` (no stamp moves), `sheet_deletes`, `new_patients`,
    `uploads`.
    """

    opens: float = 8.0
    closes: float = 17.0
    appointments: float = 50.0
    appointments_sd: float = 4.0
    active: float = 0.25
    propensity: float = 1.2
    inactive_visits: float = 0.06
    follow_ups: float = 0.30
    no_shows: float = 0.07
    same_day: float = 0.05
    within_three: float = 0.10
    horizon_days: int = 60
    arrival_scans: float = 0.7
    more_scans: float = 0.6
    images: float = 0.4
    series: float = 0.05
    bitewings: float = 0.20
    more_images: float = 1.5
    sheets: float = 0.35
    letters: float = 0.35
    web_forms: float = 0.45
    lateness: float = 8.0
    batches: float = 31.0
    batch_documents: float = 0.8
    edits: float = 0.18
    check_in: float = 0.45
    check_out: float = 0.5
    false_rows: float = 60.0
    aging: float = 0.05
    new_patients: float = 5.0
    deletes: float = 6.0
    moves: float = 2.0
    merges: float = 0.3
    mount_moves: float = 2.0
    replacements: float = 4.0
    quiet_replacements: float = 1.0
    sheet_deletes: float = 1.0
    uploads: float = 1.0


class Life:
    """Makes a practice live from its clock's now on. `advance(now)` applies what is due; `applied` counts it by name.

    Everything is recorded in `practice.history` at the time it happened, not at the time of the call.
    """

    def __init__(self, practice: Practice, seed: int = 1, habits: Habits | None = None) -> None:
        self.practice = practice
        self.habits = habits or Habits()
        self.applied: dict[str, int] = {}
        self._rng = random.Random(f"life {seed}")
        self._due: list[tuple[float, int, str, Callable[[], object]]] = []
        self._order = itertools.count()
        everybody = [row["PatNum"] for row in practice.rows("SELECT PatNum FROM patient ORDER BY PatNum")]
        self._scale = max(1, len(everybody)) / _PER
        self._active = (
            self._rng.sample(everybody, max(1, round(len(everybody) * self.habits.active))) if everybody else []
        )
        self._weights = [self._rng.gammavariate(self.habits.propensity, 1.0) for _ in self._active]
        start = practice.clock.now()
        self._today = datetime.fromtimestamp(start, UTC).astimezone(practice.zone).replace(hour=0, minute=0, second=0)
        for day in range(self.habits.horizon_days):
            self._book_day(day, start)
        self._plan_day(start)

    def advance(self, now: float) -> int:
        """Apply everything that is due up to `now` (seconds since the epoch). Returns how many things happened."""
        count = 0
        while self._due and self._due[0][0] <= now:
            at, _, name, action = heapq.heappop(self._due)
            with self.practice.as_of(at):
                action()
            self.applied[name] = self.applied.get(name, 0) + 1
            count += 1
        return count

    def next_at(self) -> float:
        """When the next thing happens, in seconds since the epoch; infinity when nothing is planned."""
        return self._due[0][0] if self._due else math.inf

    # Planning

    def _at(self, at: float, name: str, action: Callable[[], object]) -> None:
        heapq.heappush(self._due, (at, next(self._order), name, action))

    def _midnight(self, days: int) -> datetime:
        """Local midnight that many calendar days from today."""
        return self._today + timedelta(days=days)

    def _next_day(self) -> None:
        self._today = self._midnight(1)
        start = self._today.timestamp()
        self._book_day(self.habits.horizon_days - 1, start)
        self._plan_day(start)

    def _book_day(self, days: int, now: float) -> None:
        """Book the appointments of a business day; each is entered when the patient calls."""
        day = self._midnight(days)
        if day.weekday() >= _SATURDAY or not self._active:
            return
        habits, rng = self.habits, self._rng
        count = round(
            max(0.0, rng.gauss(habits.appointments * self._scale, habits.appointments_sd * math.sqrt(self._scale)))
        )
        for _ in range(count):
            start = day.timestamp() + self._opening_seconds()
            chance = rng.random()
            lead = rng.uniform(8, 60)
            if chance < habits.same_day:
                lead = rng.uniform(0.05, 0.3)
            elif chance < habits.same_day + habits.within_three:
                lead = rng.uniform(1, 3)
            called = max(now, start - lead * _DAY)
            if start > now:
                self._at(called, "booking", self._booking(self._visitor(), start))

    def _opening_seconds(self) -> float:
        """A moment in opening hours, in seconds from midnight, on a quarter of an hour."""
        quarters = round((self.habits.closes - self.habits.opens) * 4) - 1
        return self.habits.opens * _HOUR + self._rng.randint(0, quarters) * 15 * _MINUTE

    def _visitor(self) -> int:
        if self._rng.random() < self.habits.inactive_visits:
            return self._anybody()
        chosen: list[int] = self._rng.choices(self._active, self._weights)
        return chosen[0]

    def _anybody(self) -> int:
        deleted = PAT_STATUSES.index("Deleted")
        sql = "SELECT PatNum FROM patient WHERE PatStatus <> ? ORDER BY PatNum LIMIT 1 OFFSET ?"
        count = self.practice.rows("SELECT COUNT(*) AS n FROM patient WHERE PatStatus <> ?", deleted)[0]["n"]
        return int(self.practice.rows(sql, deleted, self._rng.randrange(count))[0]["PatNum"])

    def _booking(self, pat_num: int, start: float) -> Callable[[], None]:
        def book() -> None:
            apt_num = self.practice.add_appointment(pat_num, start)
            self._plan_visit(pat_num, apt_num, start, self.practice.now())

        return book

    def _plan_visit(self, pat_num: int, apt_num: int, start: float, now: float) -> None:
        habits, rng = self.habits, self._rng
        if rng.random() < habits.web_forms:
            evening = rng.choice((rng.uniform(1, 7) * _DAY, rng.randint(1, 7) * _DAY - (18.5 * _HOUR - 12 * _HOUR)))
            if start - evening > now:
                self._at(start - evening, "web form", lambda: self.practice.add_sheet(pat_num, 23, IsWebForm=1))
        if rng.random() < habits.no_shows:
            broken = {"AptStatus": _BROKEN}
            self._at(start + 20 * _MINUTE, "no-show", lambda: self.practice.update("appointment", apt_num, broken))
            return
        arrived = max(now, start + rng.gauss(-5, habits.lateness) * _MINUTE)
        self._at(arrived, "visit", lambda: self._visit(pat_num, apt_num, arrived))

    def _visit(self, pat_num: int, apt_num: int, arrived: float) -> None:
        """Plan what happens around a patient who has just come in."""
        habits, rng = self.habits, self._rng
        if rng.random() < habits.check_in:
            self.practice.touch_patient(pat_num)
        if rng.random() < habits.arrival_scans:
            at = arrived + rng.uniform(0, 10) * _MINUTE
            for _ in range(1 + _poisson(rng, habits.more_scans)):
                self._new_file(at, "scan", pat_num, images=0.2)
                at += rng.uniform(5, 60)
        if rng.random() < habits.sheets:
            self._new_sheet(arrived + rng.uniform(0, 20) * _MINUTE, "sheet", pat_num)
        if rng.random() < habits.images:
            self._plan_images(pat_num, arrived + rng.uniform(10, 30) * _MINUTE)
        if rng.random() < habits.letters:
            self._new_sheet(arrived + rng.uniform(30, 150) * _MINUTE, "letter", pat_num, 25)
        leaving = arrived + rng.uniform(40, 80) * _MINUTE
        self._at(leaving, "check-out", lambda: self._check_out(pat_num, apt_num))

    def _check_out(self, pat_num: int, apt_num: int) -> None:
        self.practice.update("appointment", apt_num, {"AptStatus": _COMPLETE})
        if self._rng.random() < self.habits.check_out:
            self.practice.touch_patient(pat_num)
        if self._rng.random() < self.habits.follow_ups:
            day = self._midnight(self._rng.randint(7, 21))
            if day.weekday() < _SATURDAY:
                self._booking(pat_num, day.timestamp() + self._opening_seconds())()

    def _plan_images(self, pat_num: int, at: float) -> None:
        habits, rng = self.habits, self._rng
        chance = rng.random()
        if chance < habits.series + habits.bitewings:
            images = 18 if chance < habits.series else 4
            name = "FMX" if chance < habits.series else "4BW"
            self._at(at, "mount", lambda: self.practice.add_mount(pat_num, images, name, Note="Bitewings"))
            return
        for _ in range(1 + _poisson(rng, habits.more_images)):
            self._new_file(at, "image", pat_num, images=1.0)
            at += rng.uniform(20, 180)

    def _new_file(self, at: float, name: str, pat_num: int, images: float) -> None:
        paper = Past(images=images, raw=0.0, urls=0.0)
        self._at(at, name, lambda: self._plan_edit(add_any_document(self.practice, self._rng, pat_num, paper)))

    def _new_sheet(self, at: float, name: str, pat_num: int, sheet_def: int | None = None) -> None:
        chosen = sheet_def or self._rng.choice(_SHEET_DEFS)

        def add() -> None:
            num = self.practice.add_sheet(pat_num, chosen)
            if self._rng.random() < self.habits.edits:
                self._at(
                    self._edit_time(), "sheet edit", lambda: self._if_there("sheet", num, self.practice.edit_sheet)
                )

        self._at(at, name, add)

    def _plan_edit(self, doc_num: int) -> None:
        if self._rng.random() < self.habits.edits:
            self._at(
                self._edit_time(), "edit", lambda: self._if_there("document", doc_num, self.practice.edit_document)
            )

    def _edit_time(self) -> float:
        """Half within 40 minutes, 30 % within two days, the rest to 60 days."""
        chance, now = self._rng.random(), self.practice.now()
        if chance < 0.5:  # noqa: PLR2004  (half)
            return now + self._rng.uniform(1, 40) * _MINUTE
        return now + (self._rng.uniform(0.03, 2) if chance < 0.8 else self._rng.uniform(2, 60)) * _DAY  # noqa: PLR2004

    def _if_there(self, table: str, num: int, action: Callable[[int], None]) -> None:
        if self.practice.row(table, num) is not None:
            action(num)

    # Back office

    def _plan_day(self, now: float) -> None:
        """Plan today's back office work and rare events, and the planning of tomorrow."""
        habits, business = self.habits, self._today.weekday() < _SATURDAY
        rates: list[tuple[str, float, Callable[[], object]]] = [
            ("false row", habits.false_rows, lambda: self.practice.touch_patient(self._anybody())),
        ]
        if business:
            rates += [
                ("batch", habits.batches, self._batch),
                ("new patient", habits.new_patients, self._new_patient),
                ("delete", habits.deletes, lambda: self._on_document(self.practice.delete_document)),
                ("move", habits.moves, lambda: self._on_document(self._move)),
                ("merge", habits.merges, self._merge),
                ("mount move", habits.mount_moves, self._mount_move),
                ("replacement", habits.replacements, lambda: self._on_document(self.practice.replace_bytes)),
                ("quiet replacement", habits.quiet_replacements, lambda: self._on_document(self._replace_quietly)),
                ("sheet delete", habits.sheet_deletes, self._delete_sheet),
                ("upload", habits.uploads, self._upload),
            ]
        midnight = self._today.timestamp()
        for name, rate, action in rates:
            for _ in range(_poisson(self._rng, rate * self._scale)):
                at = midnight + self._rng.uniform(habits.opens, habits.closes) * _HOUR
                if at > now:
                    self._at(at, name, action)
        if self._today.day == 1 and midnight + 2.5 * _HOUR > now:
            self._at(midnight + 2.5 * _HOUR, "aging", self._aging)
        self._at(self._midnight(1).timestamp(), "midnight", self._next_day)

    def _batch(self) -> None:
        pat_num = self._anybody() if self._rng.random() < 0.3 else self._visitor()  # noqa: PLR2004  (30 % any patient)
        if self._rng.random() < 0.3:  # noqa: PLR2004  (the model's share of batches with a row change)
            self.practice.touch_patient(pat_num)
        for _ in range(1 + _poisson(self._rng, 1.0)):
            at = self.practice.now() + self._rng.uniform(0, 300)
            if self._rng.random() < self.habits.batch_documents:
                self._new_file(at, "back office file", pat_num, images=0.3)
            else:
                self._new_sheet(at, "back office sheet", pat_num)

    def _aging(self) -> None:
        """Once a month, by night, the rows of 5 % of all patients change without cause."""
        for row in self.practice.rows("SELECT PatNum FROM patient"):
            if self._rng.random() < self.habits.aging:
                self.practice.touch_patient(row["PatNum"])

    def _new_patient(self) -> None:
        pat_num = self.practice.add_patient("Newcomer", f"No{self._rng.randint(1, 9_999)}")
        self._active.append(pat_num)
        self._weights.append(self._rng.gammavariate(self.habits.propensity, 1.0))
        self._new_sheet(self.practice.now() + _HOUR, "sheet", pat_num, 23)

    def _on_document(self, action: Callable[[int], object]) -> None:
        """Do something to a document outside mounts that has a file of its own."""
        where = "FROM document WHERE MountItemNum = 0 AND Note = ''"
        top = self.practice.rows(f"SELECT COUNT(*) AS n {where}")[0]["n"]
        if top:
            offset = self._rng.randrange(top)
            row = self.practice.rows(f"SELECT DocNum {where} ORDER BY DocNum LIMIT 1 OFFSET ?", offset)[0]
            action(row["DocNum"])

    def _move(self, doc_num: int) -> None:
        self.practice.move_document(doc_num, self._anybody())

    def _replace_quietly(self, doc_num: int) -> None:
        self.practice.replace_bytes(doc_num, bump=False)

    def _merge(self) -> None:
        source, into = self._anybody(), self._anybody()
        if source != into:
            self.practice.merge_patients(source, into)

    def _mount_move(self) -> None:
        """An image goes into a mount of its patient, or comes out of one."""
        sql = "SELECT MountNum, PatNum FROM mount ORDER BY MountNum LIMIT 1 OFFSET ?"
        count = self.practice.rows("SELECT COUNT(*) AS n FROM mount")[0]["n"]
        if not count:
            return
        mount = self.practice.rows(sql, self._rng.randrange(count))[0]
        loose = (
            "SELECT DocNum, FileName FROM document WHERE PatNum = ? AND MountItemNum = 0 AND Note = '' AND ImgType = 1"
        )
        images = self.practice.mount_images(mount["MountNum"])
        candidates = [row for row in self.practice.rows(loose, mount["PatNum"]) if can_be_placed(row["FileName"])]
        if candidates and self._rng.random() < 0.6:  # noqa: PLR2004  (more go in than come out)
            self.practice.move_into_mount(candidates[0]["DocNum"], mount["MountNum"])
        elif len(images) > 1:
            self.practice.out_of_mount(images[-1]["DocNum"])

    def _delete_sheet(self) -> None:
        found = self.practice.rows("SELECT SheetNum FROM sheet WHERE IsDeleted = 0 ORDER BY SheetNum DESC LIMIT 50")
        if found:
            self.practice.delete_sheet(self._rng.choice(found)["SheetNum"])

    def _upload(self) -> None:
        """Another program uploads a file; most are opened by somebody within a day."""
        pat_num = self._anybody()
        data = f"PatNum={pat_num} uploaded, {self._rng.random()}\r\n".encode()
        num = self.practice.add_raw_document(pat_num, data, ".txt", Description="Uploaded")
        opened = self.practice.now() + self._rng.uniform(0, 1) * _DAY
        self._at(opened, "materialised", lambda: self._if_there("document", num, self._open))

    def _open(self, doc_num: int) -> None:
        self.practice.materialise(doc_num)


def _poisson(rng: random.Random, mean: float) -> int:
    """A Poisson number, by multiplying uniforms; means here are small."""
    limit, count, product = math.exp(-mean), 0, rng.random()
    while product > limit:
        count += 1
        product *= rng.random()
    return count
