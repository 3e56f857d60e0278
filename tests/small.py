"""A small practice with one item of every kind, and what the tests of faults ask of its mirror."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from syncd.backfill import Look, Stop, Wanted
from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from syncd.schema import migrations
from tests.world import START, World

DAY = 86_400.0
HOUR = 3600.0
METHODS = ("document", "mount", "mount-images", "sheet", "thumbnails")
SCHEMA = len(migrations.pending(Database(memory=True)))  # the number of the index's schema
LEAST = 6  # placements that the small practice needs: two documents, a mount, its images, a sheet, thumbnails


@dataclass(frozen=True)
class Small:
    """Two patients; everything is old enough not to be fetched again within days. Numbers are the vendor's."""

    practice: Practice
    patient: int
    other: int
    document: int
    letter: int
    mount: int
    sheet: int

    def request(self, method: str) -> dict[str, object]:
        """What the request of one way of placing looks like, as fields of a `Fault`."""
        path, named = {
            "document": ("/documents/DownloadSftp", {"DocNum": self.document}),
            "mount": ("/documents/DownloadSftp", {"MountNum": self.mount}),
            "mount-images": ("/documents/DownloadMount", {"MountNum": self.mount}),
            "sheet": ("/sheets/DownloadSftp", {"SheetNum": self.sheet}),
            "thumbnails": ("/documents/Thumbnails", {"PatNum": self.patient}),
        }[method]
        return {"path": path, "params": named}


def small(in_database: bool = False, documents: int = 0) -> Small:
    """The small practice, with so many more documents of the first patient."""
    practice = Practice(SimulatedClock(START), "America/Chicago", seed=5, in_database=in_database)
    with practice.as_of(START - 40 * DAY):
        patient, other = practice.add_patient(), practice.add_patient("Beispiel", "Erika")
        document, letter = practice.add_document(patient, "jpg"), practice.add_document(other, "pdf")
        mount, sheet = practice.add_mount(patient, 3), practice.add_sheet(patient)
        for _ in range(documents):
            practice.add_document(patient, "png")
    return Small(practice, patient, other, document, letter, mount, sheet)


def backfilling(folder: Path, one: Small) -> World:
    """A backfill of the practice, one request a second at most: it goes round once, so that days are soon simulated."""
    return World.start(folder, practice=one.practice, backfill=True, interval=1.0)


def serving(folder: Path, one: Small) -> World:
    """The daemon's lanes, one request a minute."""
    return World.start(folder, practice=one.practice, interval=60.0)


def settle(world: World, days: float = 1.2, without_thumbnails: bool = False) -> None:
    """Run until nothing is under way, and past the last look at an unanswered name; then nothing is lacking."""
    world.run()
    world.run(hours=24 * days)
    found = world.findings()
    lacking = [line for line in found.lacking if not (without_thumbnails and "'thumbnail'" in line)]
    assert not found.wrong + lacking, "\n".join(found.wrong + lacking)
    world.check_drop()
    world.check_audit()
    assert world.index.value("SELECT count(*) FROM attempt") == 0


def versions(world: World) -> list[int]:
    """How many versions with new bytes each item has."""
    sql = "SELECT count(*) AS n FROM version WHERE sidecar = 1 GROUP BY pat_num, kind, num"
    return [row["n"] for row in world.index.rows(sql)]


def troubles(world: World) -> dict[str, str]:
    """What `status` knows to be wrong: the reason, by lane."""
    facts = world.catalog().status_facts(world.clock.now())
    return {trouble.lane: trouble.reason for trouble in facts.troubles}


def failing(world: World) -> Mapping[str, int]:
    """Items that were tried often enough, by class."""
    return world.catalog().status_facts(world.clock.now()).failing


def verdict(world: World) -> int | None:
    """The exit code that a backfill would end with now; None: it would go on."""
    wanted = Wanted(world.scope.since, world.scope.patients, world.scope.max_requests)
    requests = world.lanes.api_lane
    return Look(world.settings, world.index, world.clock, wanted, lambda: requests.requests).verdict(Stop())


def not_given(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """From now on the disk does not give this file or folder, wherever it is moved to."""
    number, real = path.stat().st_ino, os.open

    def opened(*args: Any, **kwargs: Any) -> int:
        descriptor = real(*args, **kwargs)
        if os.fstat(descriptor).st_ino == number:
            os.close(descriptor)
            raise OSError(errno.EIO, "planted")
        return descriptor

    monkeypatch.setattr(os, "open", opened)
