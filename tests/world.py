"""A whole mirror in one thread: a simulated practice, its office and drop in memory, the real API door, the real index
and archive in a folder, and the two lanes, which take turns under a simulated clock.

    world = World.start(tmp_path, patients=3)
    world.run(hours=2)
    world.check()

The clock jumps to the earliest wake of the two lanes. Where both are idle the jumps grow, from `first_nap` to `nap`
seconds, so that weeks take seconds; whatever falls due meanwhile is late by less than a nap.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from syncd import config
from syncd.api import OpenDentalApi, PlacementSite
from syncd.catalog import Catalog
from syncd.config import Settings
from syncd.demo.adapter import OfficeAdapter
from syncd.demo.build import Past, build_practice
from syncd.demo.clock import SimulatedClock
from syncd.demo.office import Office
from syncd.demo.practice import Practice
from syncd.demo.simulation import to_toml
from syncd.demo.site import DropFile, MemoryDrop
from syncd.demo.wire import Arrival
from syncd.errors import ItemError, SiteError, SyncdError, TransientError
from syncd.index import Index
from syncd.logs import EVENTS, KEYS
from syncd.mirror import IDLE, Scope
from syncd.model import Pulled, PullJob, Seen, lists_of
from syncd.ports import Finished
from syncd.schema import Row
from syncd.search import Filters
from syncd.sites import audit_head
from syncd.transfer import DISK_REASONS
from syncd.wiring import Lanes, build, open_audit
from tests.truth import Expected, Findings, compare_archive

__all__ = ["DropInMemory", "Expected", "Findings", "World", "compare_archive", "make_api", "make_settings"]

START = 1_773_151_200.0  # Tuesday, 10 March 2026, 9 o'clock in Chicago
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGVJ1c6zVYoA0rnYBMqBpTdTUDYo4gqUkbbYdR0CKlsk"
POLLED = (
    "SELECT 1 FROM list JOIN patient USING (pat_num) WHERE left_at IS NULL AND name IN (SELECT value FROM json_each(?))"
)
SIZE_CAP = 64 * 1024 * 1024  # bytes of one answer
PLACEMENTS = ("/documents/DownloadSftp", "/documents/DownloadMount", "/documents/Thumbnails", "/sheets/DownloadSftp")


class RecordedLog:
    """A `Log` that keeps its lines, and lets nothing pass that the real one would not write."""

    def __init__(self) -> None:
        self.lines: list[Row] = []

    def debug(self, event: str, **ids: object) -> None:
        self._keep("debug", event, ids)

    def info(self, event: str, **ids: object) -> None:
        self._keep("info", event, ids)

    def warning(self, event: str, **ids: object) -> None:
        self._keep("warning", event, ids)

    def error(self, event: str, **ids: object) -> None:
        self._keep("error", event, ids)

    def bind(self, **ids: object) -> Self:
        return self

    def _keep(self, level: str, event: str, ids: Row) -> None:
        assert event in EVENTS, event
        assert ids.keys() - {"exc_info"} <= KEYS, ids.keys() - KEYS
        self.lines.append({"level": level, "event": event, **ids})

    def events(self, event: str) -> list[Row]:
        """The lines of one event."""
        return [line for line in self.lines if line["event"] == event]


@dataclass
class DropInMemory:
    """`ports.Drop` over the office's `MemoryDrop`. `broken`: every call ends with this error. `calls` counts them.

    `meddle`: called between the two looks of a pull, as another writer on the site. `poison`: a path whose reading
    breaks the connection, so that it and what comes after it in the call is not read; "*" is the next one. `bad`: so
    does each file with such bytes. `refusing`:
    syncd may not write here.
    """

    site: MemoryDrop
    broken: SyncdError | None = None
    calls: int = 0
    meddle: Callable[[PullJob], None] | None = None
    poison: str = ""
    bad: frozenset[bytes] = frozenset()
    refusing: bool = False
    received: int = 0

    def _talk(self) -> None:
        self.calls += 1
        if self.broken is not None:
            raise self.broken
        if self.site.down:
            raise TransientError("drop_unreachable")

    def pull(self, jobs: Sequence[PullJob], finished: Finished | None = None) -> list[Pulled | SyncdError]:
        outcomes: list[Pulled | SyncdError] = []
        while jobs:
            outcomes += (ended := self._pull(jobs))
            jobs = finished(list(zip(jobs, ended, strict=True))) if finished else ()
        return outcomes

    def _pull(self, jobs: Sequence[PullJob]) -> list[Pulled | SyncdError]:
        self._talk()
        paths = [_text(job.remote) for job in jobs]
        self.poison = paths[0] if self.poison == "*" else self.poison
        breaks = [path == self.poison or self._is_bad(path) for path in paths]
        whole = breaks.index(True) if True in breaks else len(jobs)
        cut: list[Pulled | SyncdError] = [TransientError("drop_unreachable") for _ in jobs[whole:]]
        try:
            return [*(self._pulled(job) for job in jobs[:whole]), *cut]
        except SiteError:
            for job in jobs:
                with contextlib.suppress(OSError):
                    job.local.unlink(missing_ok=True)
            raise

    def _is_bad(self, path: str) -> bool:
        found = self.site.files.get(path) if self.bad else None
        return found is not None and found.data in self.bad

    def _pulled(self, job: PullJob) -> Pulled | SyncdError:
        found = self.site.files.get(_text(job.remote))
        if found is None:
            return ItemError("not_a_file" if _text(job.remote) in self.site.folders else "missing_on_drop")
        data, mtime = found.data, found.mtime
        if not 0 < len(data) <= job.cap:
            return ItemError("too_large" if data else "zero_bytes")
        if self.meddle is not None:
            self.meddle(job)
        again = self.site.files.get(_text(job.remote))
        if again is None or (again.data, again.mtime) != (data, mtime):
            return ItemError("changed_while_read")
        _write(job.local, data)
        return Pulled(len(data), hashlib.sha256(data).hexdigest(), int(mtime), data[:512], data[-64:])

    def look(self, paths: Sequence[bytes]) -> list[Seen | None]:
        self._talk()
        return [self._seen(_text(path)) for path in paths]

    def _seen(self, path: str) -> Seen | None:
        found = self.site.files.get(path)
        if found is not None:
            return Seen(len(found.data), int(found.mtime), regular=True)
        return Seen(0, 0, regular=False) if path in self.site.folders else None

    def names(self, folder: bytes) -> list[bytes] | None:
        self._talk()
        path = _text(folder)
        if path not in self.site.folders:
            return None
        inside = {*self.site.files, *self.site.folders}
        return sorted(os.fsencode(posixpath.basename(name)) for name in inside if posixpath.dirname(name) == path)

    def put(self, path: bytes, source: BinaryIO) -> None:
        self._talk()
        if self.refusing:
            raise ItemError("refused")
        self.site.files[_text(path)] = DropFile(source.read(), self.site.clock.now())

    def remove(self, paths: Sequence[bytes]) -> list[bool]:
        self._talk()
        return [self._removed(path) for path in paths]

    def _removed(self, path: bytes) -> bool:
        name = _text(path)
        if not path.endswith(b"/"):
            self.site.files.pop(name, None)
        elif not self.names(path):
            self.site.folders.discard(name)
        return name not in self.site.files and name not in self.site.folders

    def close(self) -> None:
        """Nothing is held."""


def _write(path: Path, content: bytes) -> None:
    """As the real drop does it, which leaves the sync to the archive; what the disk says is a SiteError."""
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(content)
    except OSError as error:
        raise SiteError(DISK_REASONS.get(error.errno or 0, "disk_error")) from error


def _text(path: bytes) -> str:
    return os.fsdecode(path).rstrip("/")


@dataclass
class World:
    """One practice and its mirror. Everything may be switched while it runs; `lanes` are the ones alive now."""

    folder: Path
    clock: SimulatedClock
    practice: Practice
    office: Office
    site: MemoryDrop
    drop: DropInMemory
    settings: Settings
    log: RecordedLog
    lanes: Lanes
    scope: Scope
    nap: float = 300.0
    first_nap: float = 8.0
    hinted: bool = False
    turns: int = 0
    expected: Expected = field(default_factory=Expected)
    _idle_at: float = -1.0  # when the pull lane found nothing to do: not asked twice in one moment

    @classmethod
    def start(
        cls,
        folder: Path,
        patients: int = 0,
        *,
        practice: Practice | None = None,
        past: Past | None = None,
        seed: int = 1,
        backfill: bool = False,
        interval: float = 30.0,
        latency: float = 0.0,
        in_database: bool = False,
        nap: float = 300.0,
        hinted: bool = False,
        window: str = "Mon-Sun 00:00-24:00",
        size_cap: int = SIZE_CAP,
        **overrides: Mapping[str, object],
    ) -> World:
        """A mirror that has not taken a turn yet.

        `interval`: seconds from request to request. `overrides`: sections of config.toml, as `sync={"kinds": [...]}`.
        """
        clock = practice.clock if practice is not None else SimulatedClock(START)
        assert isinstance(clock, SimulatedClock)
        own = practice or build_practice(patients, seed, clock, past=past, in_database=in_database)
        site = MemoryDrop(clock)
        office = Office(own, site, clock=clock, seed=seed)
        office.latency = latency
        (folder / "archive").mkdir(parents=True, exist_ok=True)
        there: dict[str, Mapping[str, object]] = {"practice": {"time_zone": own.zone.key}}
        settings = make_settings(folder, interval, {**there, "backfill": {"window": [window]}, **overrides})
        log, drop = RecordedLog(), DropInMemory(site)
        scope = Scope(backfill=backfill, since=clock.now())
        lanes = build(settings, clock, log, scope, make_api(settings, office, size_cap), drop)
        if not hinted:
            lanes.api_lane.hints = None
        return cls(folder, clock, own, office, site, drop, settings, log, lanes, scope, nap, hinted=hinted)

    @property
    def index(self) -> Index:
        """The shell's own connection to the index."""
        return self.lanes.index

    @property
    def archive(self) -> Path:
        return self.settings.archive.path

    def catalog(self) -> Catalog:
        """What `find`, `show` and `status` would answer now."""
        return Catalog(self.index, self.settings.name, self.settings.sync.kinds)

    # --- time

    def run(
        self, *, hours: float = 0.0, seconds: float = 0.0, until: Callable[[], object] | None = None, tick: float = 0.0
    ) -> None:
        """Take turns for so long, or until the condition holds; with neither until both lanes have nothing to do.

        `tick`: at most so many seconds between two turns while idle (default: grows up to `nap`, or to a hundredth of
        the time where that is longer, and an hour at most).
        """
        self.expected.note(self.practice)
        self._idle_at = -1.0
        span = hours * 3600.0 + seconds
        nap = self.nap if until is not None else max(self.nap, min(3600.0, span / 100))
        end = self.clock.now() + (span or 40 * 86_400.0)
        idle = itertools.count()
        while self.clock.now() < end and not (until is not None and until()):
            wait = self._both_turns()
            if wait is None:
                if not span and until is None and self.at_rest():
                    break
                wait = tick or min(nap, nap / self.nap * self.first_nap * 4.0 ** min(next(idle), 10))
            else:
                idle = itertools.count()
            self.clock.advance(min(wait, max(0.0, end - self.clock.now())))
        else:
            assert until is None or until(), "the condition did not come true in the time given"
        self.expected.note(self.practice)

    def _both_turns(self) -> float | None:
        """One turn of each lane; seconds until the next is worth it, None when both were idle."""
        before = (len(self.office.arrivals), self.drop.calls)
        wakes = [self.lanes.api_lane.turn(self.clock.now())]
        if len(self.office.arrivals) > before[0] or self.clock.now() != self._idle_at:
            wakes.append(self.lanes.pull_lane.turn(self.clock.now()))
            self._idle_at = self.clock.now() if wakes[1] > self.clock.now() else -1.0
        self.turns += len(wakes)
        wait, declared = min(wakes) - self.clock.now(), wakes[0] - self.clock.now()
        if (len(self.office.arrivals), self.drop.calls) != before or wait <= 0:
            return max(0.0, wait)
        return declared if declared > IDLE else None  # the pace of the key: the other lane is idle

    def at_rest(self) -> bool:
        """Nothing is owed, under way or due within the hour, and every list was polled."""
        now, value = self.clock.now(), self.index.value
        return not (
            value(
                "SELECT 1 FROM duty d JOIN patient USING (pat_num) WHERE left_at IS NULL AND next_try_at <= ?",
                now + 3600,
            )
            or value("SELECT 1 FROM attempt WHERE state != 'cleaning' OR next_look_at <= ?", now)
            or value("SELECT 1 FROM item WHERE thumbnail_due = 1")
            or value(f"{POLLED} AND polled_at = 0", json.dumps(lists_of(self.settings.sync.kinds)))
            or not self.index.meta_time("roster_at")
        )

    def sweep(self) -> None:
        """Run until every list was polled completely once more, and nothing is under way."""
        since = self.clock.now()
        sql, names = f"{POLLED} AND polled_at <= ?", json.dumps(lists_of(self.settings.sync.kinds))
        self.run(until=lambda: self.index.value(sql, names, since) is None and self.index.meta_time("roster_at") > 0)
        self.run(until=self.at_rest)

    def restart(self, *, backfill: bool | None = None, since: float | None = None) -> None:
        """The process dies where it stands, and another one starts on the same state, archive and drop."""
        self._idle_at = -1.0
        with contextlib.suppress(Exception):
            self.lanes.closing.close()
        self.scope = Scope(
            backfill=self.scope.backfill if backfill is None else backfill,
            since=self.clock.now() if since is None else since,
        )
        api = make_api(self.settings, self.office)
        self.lanes = build(self.settings, self.clock, self.log, self.scope, api, self.drop)
        if not self.hinted:
            self.lanes.api_lane.hints = None

    def stop(self) -> None:
        """End as an ordinary process ends."""
        self.lanes.close()

    def swap_practice(self, practice: Practice) -> None:
        """The key leads to another database from now on."""
        self.expected.note(self.practice)
        self.practice = self.office.practice = practice
        self.expected.note(practice)

    # --- looking

    def sent(self, path: str = "", since: int = 0, **params: object) -> list[Arrival]:
        """The requests that reached the office, of one path and with these parameters."""
        return [
            arrival
            for arrival in self.office.arrivals[since:]
            if arrival.path == (path or arrival.path)
            and all(str(arrival.params.get(name)) == str(value) for name, value in params.items())
        ]

    def placements(self, since: int = 0) -> list[Arrival]:
        """The requests to place something."""
        return [arrival for arrival in self.office.arrivals[since:] if arrival.path in PLACEMENTS]

    def item(self, pat_num: int, kind: str, num: int) -> Row:
        """The index row of an item; KeyError where there is none."""
        rows = self.index.rows("SELECT * FROM item WHERE pat_num = ? AND kind = ? AND num = ?", pat_num, kind, num)
        if not rows:
            raise KeyError(f"{pat_num}/{kind}-{num}")
        return rows[0]

    def has(self, pat_num: int, kind: str, num: int) -> bool:
        """Whether the index knows the item."""
        sql = "SELECT 1 FROM item WHERE pat_num = ? AND kind = ? AND num = ?"
        return bool(self.index.value(sql, pat_num, kind, num))

    def state(self, pat_num: int, kind: str, num: int) -> str:
        """The item's state, as `find` tells it."""
        found = self.catalog().find(Filters(patient=pat_num, num=num))
        return next(str(row["state"]) for row in found if row["kind"] == kind)

    def files(self, pat_num: int, kind: str, num: int) -> list[str]:
        """The names in an item's archive folder, sorted."""
        folder = self.archive / "patients" / str(pat_num) / f"{kind}-{num}"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def media(self, pat_num: int, kind: str, num: int) -> list[bytes]:
        """The bytes of an item's versions, oldest first."""
        folder = self.archive / "patients" / str(pat_num) / f"{kind}-{num}"
        names = [name for name in self.files(pat_num, kind, num) if not name.endswith(".json")]
        return [(folder / name).read_bytes() for name in sorted(names, key=lambda name: int(name.split("-")[0]))]

    # --- the measure

    def audit_facts(self) -> list[Row]:
        """What the audit log tells, and what waits in the index for it; each entry once."""
        written = list(open_audit(self.settings).facts())
        names = {facts["entry"] for facts in written}
        waiting = self.index.rows("SELECT * FROM audit_entry ORDER BY id")
        named = ({"verb": r["verb"], "entry": r["entry"], **json.loads(r["facts"])} for r in waiting)
        return [*written, *(facts for facts in named if facts["entry"] not in names)]

    def check_audit(self) -> None:
        """The chain is whole, and every version and everything that is marked vanished has exactly one line."""
        problem = open_audit(self.settings).verify(audit_head(self.index)).problem
        assert problem is None, str(problem)
        facts = self.audit_facts()
        entries = Counter(each["entry"] for each in facts)
        assert not [entry for entry, times in entries.items() if times > 1]
        stored = Counter((each["seq"], each["sha256"]) for each in facts if each["verb"] == "stored")
        rows = self.index.rows("SELECT seq, sha256 FROM version")
        assert stored == Counter((row["seq"], row["sha256"]) for row in rows)
        marked = {each["item"] for each in facts if each["verb"] == "vanished"}
        rows = self.index.rows("SELECT pat_num, kind, num FROM item WHERE vanished_at IS NOT NULL")
        assert {f"{r['pat_num']}/{r['kind']}-{r['num']}" for r in rows} <= marked

    def findings(self) -> Findings:
        """Everything in which the mirror is not what the practice is; nothing is changed."""
        self.expected.note(self.practice)
        return compare_archive(self.index, self.archive, self.practice, self.expected, self.settings.sync.kinds)

    def check(self) -> None:
        """The mirror is complete, right, durable and clean; everything it ever held is there unchanged."""
        found = self.findings()
        assert not found.wrong, "\n".join(found.wrong)
        assert not found.lacking, "\n".join(found.lacking)
        self.check_drop()
        self.check_audit()

    def check_safe(self) -> None:
        """Nothing false, lost or leaked, in whatever state the work is; it need not be complete."""
        found = self.findings()
        assert not found.wrong, "\n".join(found.wrong)

    def check_drop(self) -> None:
        """Nothing of ours is on the drop."""
        left = [*self.site.files, *(name for name in self.site.folders if name != self.settings.drop.folder)]
        assert not left, left


def make_settings(folder: Path, interval: float, overrides: Mapping[str, Mapping[str, object]]) -> Settings:
    """The configuration of a mirror whose outside is in memory."""
    sections: dict[str, dict[str, object]] = {
        "practice": {"name": "main", "time_zone": "America/Chicago"},
        "api": {
            "url": "http://127.0.0.1:9/api/v1",
            "mode": "remote",
            "min_interval": f"{interval:g}s",
            "share": 1.0,
            "share_closed": 1.0,
        },
        "drop": {"host": "drop.example.org", "username": "opendental", "address": "drop.example.org"},
        "archive": {"path": str(folder / "archive"), "reserve": "1 MB"},
        "state": {"path": str(folder / "state")},
        "log": {"path": str(folder / "log")},
        "backfill": {"window": ["Mon-Sun 00:00-24:00"]},
    }
    sections["drop"]["host_key"] = HOST_KEY
    for section, values in overrides.items():
        sections.setdefault(section, {}).update(values)
    return config.parse(to_toml(sections), name="main", folder=folder, environ={})


def make_api(settings: Settings, office: Office, size_cap: int = SIZE_CAP) -> OpenDentalApi:
    """The real door, with the office in-process behind it."""
    site = office.site
    assert isinstance(site, MemoryDrop)
    placement = PlacementSite(settings.drop.address, site.username, site.password)
    keys = (office.developer_key, office.customer_key)
    return OpenDentalApi(settings.api.url, *keys, placement, adapter=OfficeAdapter(office), size_cap=size_cap)
