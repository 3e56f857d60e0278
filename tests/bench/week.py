"""A week end to end: the real mirror of a simulated practice, beside the lane of the benchmark in the same week.

    .venv/bin/python -m tests.bench.week                # 1,000 patients, a request in 10 s, with and without the feed
    .venv/bin/python -m tests.bench.week --feed off --seeds 1 2 3    # one week is luck: several are pooled

The practice model says who comes, what is scanned, signed and edited. Here it happens in the simulated practice, and
the real lanes, index and archive follow under a simulated clock, over the real API door and a drop in memory. A delay
is from the moment in the practice to the version in the archive. Prints a table; never fails for a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice as Office
from tests.bench.freshness import Case, Lane, Outcome, length
from tests.bench.practice_model import DAY, HOUR, MINUTE, MONDAY, File, Practice
from tests.faults.witness import Witness
from tests.world import World, make_settings

DAYS = 9
JUDGED = MONDAY + 2 * DAY, MONDAY + DAYS * DAY
CATCHES_UP = 3 * DAY  # after the last change
MIRRORED_AT = 0.05  # seconds from request to request, before the week begins
NAPS = 2  # looks of an idle mirror in the time of one request
KIND = {"documents": "document", "sheets": "sheet"}

Happening = tuple[float, int, Callable[[], object]]  # when, its place among those of one moment, what


class Week:
    """One practice and its mirror, which has archived what there is before the first Monday."""

    def __init__(self, folder: Path, model: Practice, interval: float, feed: bool) -> None:
        self.model = model
        self._office = Office(SimulatedClock(MONDAY - HOUR), "UTC", seed=model.seed)
        self._newest: dict[tuple[int, str], int] = {}  # the youngest row of each list
        self.done: list[tuple[File, int]] = []  # with the number of the document or sheet
        for pat_num in range(1, model.patients + 1):
            with self._office.as_of(model.newest[pat_num]):
                assert self._office.add_patient() == pat_num
                self._newest[pat_num, "documents"] = self._office.add_document(pat_num, "pdf")
                self._newest[pat_num, "sheets"] = self._office.add_sheet(pat_num)
        self.world = World.start(folder, practice=self._office, interval=MIRRORED_AT, backfill=True, hinted=True)
        self.world.expected = Witness(self._office)
        self.world.first_nap = 0.5
        self.world.run()
        said = {"change_feed": "auto" if feed else "off"}
        self.world.settings = make_settings(folder, interval, {"practice": {"time_zone": "UTC"}, "sync": said})
        self.world.nap = interval / NAPS
        self.world.clock.advance(MONDAY - self.world.clock.now())
        self.world.restart(backfill=False)

    def live(self) -> None:
        """Everything of the model happens in its time."""
        for at, _, happens in sorted(self._happenings(), key=lambda each: each[:2]):
            if at > self.world.clock.now():
                self.world.run(seconds=at - self.world.clock.now())
            happens()
        self.world.nap = HOUR  # nothing is measured any more
        self.world.run(seconds=CATCHES_UP)

    def _happenings(self) -> Iterator[Happening]:
        places = itertools.count()
        for file in self.model.files:
            yield file.at, next(places), partial(self._appears, file)
        for visit in self.model.appointments:
            if visit.listed:
                yield visit.booked, next(places), partial(self._office.add_appointment, visit.pat_num, visit.start)
        for at, pat_num in self.model.row_changes:
            yield at, next(places), partial(self._office.touch_patient, pat_num)

    def _appears(self, file: File) -> None:
        pat_num, name = file.key
        number = self._newest[pat_num, name]
        if name == "sheets" and file.edit:
            self._office.edit_sheet(number)
        elif file.edit:
            self._office.replace_bytes(number)
        elif name == "sheets":
            number = self._office.add_sheet(pat_num)
        else:
            number = self._office.add_document(pat_num, "jpg" if file.image else "pdf")
        self._newest[pat_num, name] = number
        self.done.append((file, number))

    def delays(self) -> list[float]:
        """Seconds of each file and edit that is judged, to the first version that shows it, sorted."""
        archived = defaultdict(list)
        sql = "SELECT pat_num, kind, num, revision, archived_at FROM version WHERE kind IN ('document', 'sheet')"
        for row in self.world.index.rows(f"{sql} ORDER BY seq"):
            archived[row["pat_num"], row["kind"], row["num"]].append((row["revision"], row["archived_at"]))
        found = []
        for file, number in self.done:
            stamp = self._office.local(file.at)
            versions = archived[file.key[0], KIND[file.key[1]], number]
            if JUDGED[0] <= file.at < JUDGED[1]:
                found.append(next(at for revision, at in versions if revision >= stamp) - file.at)
        return sorted(found)

    def lacking(self) -> list[str]:
        """What is not in the archive as it is in the practice."""
        expected = self.world.expected
        assert isinstance(expected, Witness)
        expected.note_all(self._office)
        found = self.world.findings()
        return found.wrong + found.lacking


def lived(model: Callable[[], Practice], interval: float, feed: bool) -> tuple[Outcome, list[str], int]:
    """The week of the real mirror; what it lacks in the end, and its requests of the judged days."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, contextlib.closing(_Stopped()) as closing:
        week = Week(Path(folder), model(), interval, feed)
        closing.world = week.world
        week.live()
        sent = sum(JUDGED[0] <= each.at < JUDGED[1] for each in week.world.office.arrivals)
        return Outcome(delays=week.delays()), week.lacking(), sent


class _Stopped:
    """Stops the mirror in the end."""

    world: World | None = None

    def close(self) -> None:
        if self.world is not None:
            self.world.stop()


def of_the_lane(model: Callable[[], Practice], interval: float, feed: bool) -> Outcome:
    """The same week in the benchmark."""
    practice = model()
    case = Case("lane", interval, practice.patients, practice.seed, feed=feed, judged=JUDGED)
    return Lane(case, practice, polled_within=1.0).run()


def main() -> int:
    """Print the table, row by row."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--patients", type=int, default=1_000)
    options.add_argument("--interval", type=float, default=10.0, help="seconds a request")
    options.add_argument("--seeds", type=int, nargs="+", default=[1])
    options.add_argument("--feed", choices=("off", "on"), help="only without, or only with it")
    asked = options.parse_args()
    tell = sys.stdout.write
    tell(f"{asked.patients:,} patients, a request in {asked.interval:g} s, seeds {', '.join(map(str, asked.seeds))}\n")
    tell(f"{'':28}{'files':>6} {'mean':>8} {'p50':>8} {'p95':>8} {'<=15m':>6} {'requests':>9}\n")
    for feed in (False, True) if asked.feed is None else (asked.feed == "on",):
        mirror, lane, requests, lacking = Outcome(), Outcome(), 0, list[str]()
        for seed in asked.seeds:

            def model(seed: int = seed) -> Practice:
                practice = Practice(seed, asked.patients, days=DAYS)
                practice.rows = dict.fromkeys(practice.rows, 1)
                return practice

            outcome, lacks, sent = lived(model, asked.interval, feed)
            outcome.put_to(mirror)
            lacking, requests = lacking + lacks, requests + sent
            of_the_lane(model, asked.interval, feed).put_to(lane)
        for name, each, spent in (("the mirror", mirror, requests), ("the benchmark's lane", lane, lane.spent)):
            each.delays.sort()
            times = " ".join(f"{length(t):>8}" for t in (fmean(each.delays), each.at(0.5), each.at(0.95)))
            way = f"{name}{', feed' if feed else ''}"
            tell(f"{way:28}{len(each.delays):6} {times} {each.within(15 * MINUTE):6.3f} {spent:9,}\n")
        ratio = fmean(mirror.delays) / fmean(lane.delays)
        tell(f"  mean of the mirror: {ratio:.2f} of the lane's; not as in the practice: {len(lacking)}\n")
        tell("".join(f"    {line}\n" for line in lacking[:10]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
