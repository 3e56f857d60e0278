"""What a large index costs: the same questions to indexes of 10,000, 100,000 and 1,000,000 documents.

    .venv/bin/python -m tests.bench.scale                              # all three, some ten minutes
    .venv/bin/python -m tests.bench.scale --documents 10000 100000

A practice of 25 documents and sheets a patient, all archived, as a first sync leaves it: rows are written in bulk, but
in the order and with the checksums of the real ones. The real lanes then follow it for 24 simulated hours, over an
office in which nothing changes. Files exist for the first thousands of versions only. Each size has a process of its
own. Prints a table; never fails for a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import hashlib
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median

from syncd.archive import Archive
from syncd.catalog import Catalog
from syncd.checker import Tally
from syncd.config import Settings
from syncd.demo.clock import SimulatedClock
from syncd.demo.site import MemoryDrop
from syncd.diff import compare
from syncd.index import Index
from syncd.mirror import Scope
from syncd.model import (
    Appointment,
    FieldValue,
    Item,
    Kind,
    Listed,
    ListName,
    Page,
    Patient,
    PlacedName,
    Uploaded,
    Version,
)
from syncd.report import Budget, Surroundings, status
from syncd.schema import row_checksum
from syncd.scrub import reindex, verify
from syncd.search import Filters
from syncd.sidecar import sidecar_content
from syncd.wiring import Lanes, build
from tests.world import START, DropInMemory, RecordedLog, make_settings

EACH = 25  # documents and sheets a patient, on the mean
LONG = 100  # of every hundredth patient: the listing that is compared
LISTINGS = 200  # compared
DAY = 86_400.0
FILES = 10_000  # at most, that lie in the archive
WORDS = ("Bitewings", "Panoramic", "Periapical", "Consent", "Letter from Dr. Beispiel", "Insurance card", "Shade photo")
COMMON = ("bitewings", "panoramic", "dr. beispiel", "photo", "nothing of that")  # a seventh of all documents, mostly
BOUNDS: Mapping[str, tuple[float, str]] = {
    "start, s": (5.0, "until the first request could go out"),
    "diff of 100 rows, CPU ms": (2.0, "read, compared"),
    "decision p99, CPU ms": (0.5, "what to ask next"),
    "status, s": (1.0, ""),
    "find by patient, ms": (50.0, ""),
    "find by rare text, ms": (300.0, "every row"),
    "find by common text, ms": (300.0, "the first row; the others come as they are read"),
    "RSS, MB": (150.0, "after 24 simulated hours"),
    "RSS grown, MB": (5.0, "from the first hour to the last"),
    "index, bytes a document": (1_229.0, ""),
}

Facts = dict[str, float]


# --- an index as a first sync leaves it


def fill(settings: Settings, documents: int, files: int) -> None:
    """Make the index of so many documents, and an archive with the first `files` of them."""
    settings.state_path.mkdir(parents=True, exist_ok=True)
    archive = Archive(settings.archive.path, settings.archive.reserve)
    archive.create("bench")
    index = Index(settings.state_path / "index.db")
    db, draw = index.db.conn, random.Random(1)
    db.execute("PRAGMA synchronous=OFF")
    index.remember("archive_id", "bench")
    numbers = list(range(1, documents + 1))
    draw.shuffle(numbers)  # as they were given out: over the years, to whoever came
    seq = pat_num = 0
    while seq < documents:
        pat_num += 1
        many = min(documents - seq, LONG if pat_num % 100 == 0 else draw.randint(2, 2 * EACH - 4))
        with index.transaction():
            _patient(index, pat_num, many)
            rows = [_row(pat_num, number, place, draw) for place, number in enumerate(numbers[seq : seq + many])]
            db.executemany(_ITEM, (row for row, _ in rows))  # listed first, archived later: rows grow in their pages
            for _, unnumbered in rows:
                seq += 1
                version = dataclasses.replace(unnumbered, seq=seq)
                db.execute(_VERSION, _columns(version, 0.0 if seq <= files else START - DAY))
                db.execute(_ARCHIVED, _archived(version))
                if seq <= files:
                    _write(settings.archive.path, version)
    with index.transaction():
        for key, value in (("roster_at", START), ("scrub_due_at", START + DAY), ("index_copied_at", START)):
            index.remember(key, repr(value))
        for key, count in (("roster_rows", pat_num), ("last_seq", seq), ("scrub_left", 0)):
            index.remember(key, str(count))
    archive.note_seq(seq)
    index.value("PRAGMA wal_checkpoint(TRUNCATE)")
    index.close()


_ITEM = (
    "INSERT INTO item (pat_num, kind, num, revision, date_created, stamp, category, description, fields,"
    " first_seen_at, refetch_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_VERSION = f"INSERT INTO version VALUES ({', '.join('?' * 20)})"
_ARCHIVED = (
    "UPDATE item SET archived_revision = ?, current_version = 1, current_seq = ?, sha256 = ?, bytes = ?,"
    " media_type = ?, archived_at = ? WHERE pat_num = ? AND kind = ? AND num = ?"
)


def _patient(index: Index, pat_num: int, rows: int) -> None:
    polled_at = START - random.Random(pat_num).uniform(60.0, 0.7 * DAY)
    names = (f"Beispiel{pat_num}", "Erika", "", "1970-01-01")
    told = (pat_num, "Patient", "2026-03-01 10:00:00", *names, START)
    index.db.conn.execute(
        "INSERT INTO patient (pat_num, status, stamp, last_name, first_name, preferred, birthdate, roster_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        told,
    )
    for name in ("documents", "sheets"):
        newest = START - random.Random(pat_num).uniform(1.0, 900.0) * DAY
        index.db.conn.execute(
            "INSERT INTO list (pat_num, name, polled_at, rows, newest) VALUES (?, ?, ?, ?, ?)",
            (pat_num, name, polled_at, rows, newest),
        )


def _row(pat_num: int, number: int, place: int, draw: random.Random) -> tuple[tuple[object, ...], Version]:
    """The columns of one listed row, and its version but for the sequence number."""
    kind: Kind = "sheet" if place % 5 == 4 and pat_num % 100 else "document"
    day = dt.datetime(2018, 1, 1) + dt.timedelta(seconds=draw.randrange(8 * 365 * 86_400))  # noqa: DTZ001 - office time
    stamp, word = day.strftime("%Y-%m-%d %H:%M:%S"), WORDS[number % len(WORDS)]
    item = Item(pat_num, kind, number)
    fields = _sheet(item, stamp, word) if kind == "sheet" else _document(item, stamp, word)
    content = item.full_id.encode()
    extension, media = ("pdf", "application/pdf") if kind == "sheet" else ("jpg", "image/jpeg")
    version = Version(
        *(0, item, None, 1, 1, stamp, hashlib.sha256(content).hexdigest(), len(content), extension, media, None),
        *(START - 2 * DAY, START - 2 * DAY, START - 2 * DAY + number % DAY, START - 2 * DAY, "DownloadSftp"),
        listing=fields,
    )
    told = (*dataclasses.astuple(item), stamp, stamp, stamp, "Xray", word, json.dumps(fields), START - 2 * DAY)
    return (*told, START + (30 + number % 150) * DAY), version


def _document(item: Item, stamp: str, word: str) -> dict[str, FieldValue]:
    path = rf"\\server\OpenDentImages\B\Beispiel{item.pat_num}\Beispiel{item.num}.jpg"
    fields: dict[str, FieldValue] = {"DocNum": item.num, "MountNum": 0, "PatNum": item.pat_num, "DocCategory": 190}
    fields |= {"ProvNum": 0, "filePath": path, "Description": word, "Note": "", "DateCreated": stamp}
    fields |= {"docCategory": "Xray", "ToothNumbers": "", "PrintHeading": "false", "DateTStamp": stamp}
    return fields | {"serverDateTime": "2026-03-10 09:00:01", "FileName": None, "ImgType": None}


def _sheet(item: Item, stamp: str, word: str) -> dict[str, FieldValue]:
    fields: dict[str, FieldValue] = {"SheetNum": item.num, "PatNum": item.pat_num, "SheetDefNum": 25, "DocNum": 0}
    fields |= {"ClinicNum": 0, "SheetType": "PatientLetter", "DateTimeSheet": stamp, "InternalNote": ""}
    return fields | {"Description": word, "IsWebForm": "false", "DateTSheetEdited": stamp}


def _columns(version: Version, checked_at: float) -> tuple[object, ...]:
    item = dataclasses.astuple(version.item)
    told = (version.revision, version.sha256, version.bytes, version.extension, version.media_type, version.path)
    times = (version.listed_at, version.placed_at, version.archived_at)
    said = (*told, *times, version.method, json.dumps(version.flags), None, checked_at, row_checksum(version))
    return (version.seq, *item, 1, 1, *said)


def _archived(version: Version) -> tuple[object, ...]:
    told = (version.revision, version.seq, version.sha256, version.bytes, version.media_type, version.archived_at)
    return (*told, *dataclasses.astuple(version.item))


def _write(root: Path, version: Version) -> None:
    folder = root / version.folder
    for each in reversed([folder, *list(folder.parents)[:2]]):
        each.mkdir(mode=0o700, exist_ok=True)
    for path, content in (
        (root / version.path, version.item.full_id.encode()),
        (root / version.sidecar_path, json.dumps(sidecar_content(version)).encode()),
    ):
        path.write_bytes(content)
        path.chmod(0o400)


class Still:
    """An office in which nothing changes (ports.Api): what it lists is what the index knows."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.asked = 0

    def when_sending(self, hold: Callable[[], None], sent: Callable[[], None]) -> None:
        del hold, sent

    def upload_document(self, pat_num: int, staging: str, fields: Mapping[str, FieldValue]) -> Uploaded:
        raise NotImplementedError

    def list_documents(self, pat_num: int, offset: int, limit: int) -> Page:
        return self._page(pat_num, "document", offset, limit)

    def list_sheets(self, pat_num: int, offset: int, limit: int) -> Page:
        return self._page(pat_num, "sheet", offset, limit)

    def _page(self, pat_num: int, kind: Kind, offset: int, limit: int) -> Page:
        self.asked += 1
        sql = "SELECT * FROM item WHERE pat_num = ? AND kind = ? ORDER BY num LIMIT ? OFFSET ?"
        rows = self._index.rows(sql, pat_num, kind, limit, offset)
        return Page(tuple(_listed(Item(pat_num, kind, row["num"]), row) for row in rows))

    def document(self, doc_num: int) -> Listed | None:
        self.asked += 1
        (row,) = self._index.rows("SELECT * FROM item WHERE kind = 'document' AND num = ?", doc_num)
        return _listed(Item(row["pat_num"], "document", doc_num), row)

    def patients(self, offset: int, limit: int, since: str | None = None) -> tuple[Patient, ...]:
        self.asked += 1
        if since is not None:
            return ()
        names = "pat_num, status, stamp, last_name, first_name, preferred, birthdate"
        rows = self._index.rows(f"SELECT {names} FROM patient ORDER BY pat_num LIMIT ? OFFSET ?", limit, offset)
        return tuple(Patient(**row) for row in rows)

    def appointments(self, first: str, last: str, offset: int) -> tuple[Appointment, ...]:
        del first, last, offset
        self.asked += 1
        return ()

    def short_query(self, sql: str) -> Sequence[Mapping[str, object]]:
        raise NotImplementedError

    def place_document(self, doc_num: int, staging: str) -> None:
        raise NotImplementedError

    def place_mount(self, mount_num: int, staging: str) -> None:
        raise NotImplementedError

    def place_mount_images(self, mount_num: int, staging: str) -> tuple[PlacedName, ...]:
        raise NotImplementedError

    def place_sheet(self, sheet_num: int, staging: str) -> None:
        raise NotImplementedError

    def place_thumbnails(self, pat_num: int, staging: str) -> tuple[PlacedName, ...]:
        raise NotImplementedError

    def permissions(self) -> frozenset[str]:
        self.asked += 1
        return frozenset()

    def program_version(self) -> str:
        return "25.4.48.0"


def _listed(item: Item, row: Mapping[str, object]) -> Listed:
    told = (str(row["revision"]), str(row["stamp"]), str(row["date_created"]), "2026-03-10 09:00:01", None)
    return Listed(item, *told, fields=json.loads(str(row["fields"])))


# --- what is measured


@contextlib.contextmanager
def timed(into: list[float], clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
    """Seconds, appended: of this thread's CPU, which a crowded machine stretches least."""
    begun = clock()
    yield
    into.append(clock() - begun)


def once(work: Callable[[], object]) -> float:
    """Seconds of one call, on the wall."""
    taken: list[float] = []
    with timed(taken, time.perf_counter):
        work()
    return taken[0]


def p99(times: Sequence[float]) -> float:
    """The time within which 99 of 100 were."""
    return sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]


def rss() -> float:
    """MB of this process."""
    words = Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()
    return int(words[0]) / 1024


class Run:
    """One index under the real lanes."""

    def __init__(self, folder: Path, documents: int, interval: float, hours: float) -> None:
        (folder / "archive").mkdir(parents=True, exist_ok=True)
        self.settings = make_settings(folder, interval, {})
        self.path = self.settings.state_path / "index.db"
        self.files = min(FILES, documents // 10)
        if not self.path.exists():
            fill(self.settings, documents, self.files)
        self._documents, self._hours, self._interval = documents, hours, interval
        self.facts: Facts = {}

    def measure(self) -> Facts:
        """All of it."""
        facts = self.facts
        facts["index, bytes a document"] = self.path.stat().st_size / self._documents
        clock = SimulatedClock(START)
        lanes: Lanes | None = None

        def start() -> None:
            nonlocal lanes
            drop = DropInMemory(MemoryDrop(clock))
            office = Still(Index(self.path))
            lanes = build(self.settings, clock, RecordedLog(), Scope(), office, drop)
            assert lanes.api_lane.choose(clock.now()) is not None

        facts["start, s"] = once(start)
        assert lanes is not None
        self._day(lanes, clock)
        self._diff(lanes, clock.now())
        self._questions(lanes, clock.now())
        lanes.close()
        self._files(clock.now())
        return facts

    def _day(self, lanes: Lanes, clock: SimulatedClock) -> None:
        """Turns for so many hours: one request every `interval` seconds."""
        decisions, listings, grown = list[float](), list[float](), list[float]()
        lane, choose, complete = lanes.api_lane, lanes.api_lane.choose, lanes.api_lane.lists.complete

        def chosen(now: float) -> object:
            with timed(decisions):
                return choose(now)

        lane.choose, lane.lists.complete = chosen, complete  # type: ignore[method-assign,assignment]
        end, hour = clock.now() + self._hours * 3600, clock.now() + 3600
        pulled_at = 0.0
        begun = time.process_time()
        while clock.now() < end:
            steps = lane.requests
            before = time.thread_time()
            wake = lane.turn(clock.now())
            if lane.requests > steps:
                listings.append(time.thread_time() - before)
            if clock.now() - pulled_at > self._interval:
                lanes.pull_lane.turn(clock.now())
                pulled_at = clock.now()
            clock.advance(max(0.05, min(wake - clock.now(), end - clock.now())))
            if clock.now() >= hour:
                Catalog(lanes.index, "main").status_facts(clock.now())
                grown.append(rss())
                hour += 3600
        self.facts["requests"] = lane.requests
        self.facts["CPU a request, ms"] = (time.process_time() - begun) / max(1, lane.requests) * 1000
        self.facts["decision median, CPU ms"] = median(decisions) * 1000
        self.facts["decision p99, CPU ms"] = p99(decisions) * 1000
        self.facts["a turn, median, CPU ms"] = median(listings) * 1000
        self.facts["RSS, MB"] = grown[-1] if grown else rss()
        self.facts["RSS grown, MB"] = grown[-1] - grown[0] if grown else 0.0
        lane.choose = choose  # type: ignore[method-assign]

    def _diff(self, lanes: Lanes, now: float) -> None:
        """Listings of a hundred rows, in which nothing changed."""
        lists, index = lanes.api_lane.lists, lanes.api_lane.doors.index
        office = lanes.api_lane.doors.api
        sql = f"SELECT pat_num FROM list WHERE name = 'documents' AND rows = {LONG} AND pat_num % 100 = 0"
        long = itertools.cycle([row["pat_num"] for row in index.rows(sql)])  # a few, of few documents
        compared, taken = list[float](), list[float]()
        for pat_num in itertools.islice(long, LISTINGS):
            rows = office.list_documents(pat_num, 0, 1000).rows
            name: ListName = "documents"
            with timed(compared):
                compare(index.known(pat_num, name), rows, self.settings.sync.kinds, now)
            with timed(taken):
                lists.complete((pat_num, name), rows, now, now)
        self.facts["diff of 100 rows, CPU ms"] = median(compared) * 1000
        self.facts["listing of 100 rows, CPU ms"] = median(taken) * 1000

    def _questions(self, lanes: Lanes, now: float) -> None:
        """What people ask."""
        catalog = Catalog(lanes.index, "main", self.settings.sync.kinds)
        around = Surroundings("main", "0", Budget.of(self.settings, now))
        self.facts["status, s"] = median(once(lambda: status(catalog.status_facts(now), around, now)) for _ in range(3))
        patients = random.Random(2).sample(range(1, self._documents // EACH), 50)
        self.facts["find by patient, ms"] = 1000 * p99(
            [once(lambda n=n: list(catalog.find(Filters(patient=n)))) for n in patients]  # type: ignore[misc]
        )
        rare = Filters(text=f"beispiel{self._documents // EACH // 2}", current=True)
        self.facts["find by rare text, ms"] = 1000 * once(lambda: list(catalog.find(rare)))
        common = [once(lambda text=text: next(iter(catalog.find(Filters(text=text))), None)) for text in COMMON]  # type: ignore[misc]
        self.facts["find by common text, ms"] = 1000 * max(common)

    def _files(self, now: float) -> None:
        """What reads the archive itself."""
        index = Index(self.path)
        archive = Archive(self.settings.archive.path, self.settings.archive.reserve)
        tally = Tally()
        part = Fraction(min(1000, self.files), self._documents)
        seconds = once(lambda: list(verify(index, archive, tally, now, part)))
        self.facts["verify, s per 1,000"] = seconds / max(1, tally.versions) * 1000
        index.close()
        self.path.rename(self.path.with_name("kept.db"))
        try:
            seconds = once(lambda: reindex(self.settings, archive, now))
        finally:
            self.path.with_name("kept.db").replace(self.path)
        self.facts["reindex, s per 1,000"] = seconds / self.files * 1000


def measured(folder: Path, documents: int, interval: float, hours: float, pipe: object) -> None:
    """In a process of its own."""
    pipe.send(Run(folder, documents, interval, hours).measure())  # type: ignore[attr-defined]


def main() -> int:
    """Print the table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--hours", type=float, default=24.0)
    options.add_argument("--interval", type=float, default=10.0, help="simulated seconds a request")
    options.add_argument("--folder", type=Path, help="keep the indexes here, and use those that are there")
    asked = options.parse_args()
    tell = sys.stdout.write
    found: list[Facts] = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
        for documents in asked.documents:
            here, there = spawn.Pipe(duplex=False)
            folder = (asked.folder or Path(scratch)) / str(documents)
            work = (folder, documents, asked.interval, asked.hours, there)
            process = spawn.Process(target=measured, args=work)
            process.start()
            there.close()
            found.append(here.recv())
            process.join()
    tell(f"{'':36}" + "".join(f"{each:>12,}" for each in asked.documents) + f"{'growth':>9}{'bound':>9}\n")
    for name in found[0]:
        values = [facts[name] for facts in found]
        growth = f"{values[-1] / values[0]:>9.2f}" if values[0] > 0 and len(values) > 1 else f"{'':9}"
        bound = f"{BOUNDS[name][0]:>9,g}" if name in BOUNDS else ""
        tell(f"{name:36}" + "".join(f"{value:>12,.2f}" for value in values) + f"{growth}{bound}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
