"""Recovery after a crash of a practice with 100,000 documents: how long until the first request."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from syncd.diff import compare
from syncd.model import Attempt, Item, Listed, Patient, Version
from syncd.naming import staging_name
from syncd.sidecar import encode, sidecar_content
from syncd.wiring import open_archive
from tests.faults.test_years import RAM
from tests.world import START, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENTS, DOCUMENTS_EACH = 2_000, 50
IN_FLIGHT = 200  # placements that the crash left open: as many as there may be
GOAL, LIMIT = 5.0, 15.0  # seconds; the limit leaves room for a machine that does other things as well


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=RAM if RAM.exists() else tmp_path) as folder:
        yield Path(folder)


def content_of(num: int) -> bytes:
    return f"document {num}\n".encode()


def version_of(pat_num: int, num: int) -> Version:
    content = content_of(num)
    return Version(
        seq=num,
        item=Item(pat_num, "document", num),
        mount_num=None,
        version=1,
        sidecar=1,
        revision="2026-01-01 10:00:00",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        extension="txt",
        media_type="text/plain",
        file_name=f"D{num}.txt",
        listed_at=START - 60,
        placed_at=START - 50,
        archived_at=START - 40,
        first_seen_at=START - 60,
        method="DownloadSftp",
        listing={"DocNum": num, "PatNum": pat_num, "DateCreated": "2026-01-01 10:00:00"},
    )


def fill(world: World) -> None:
    """Lists, versions, files and sidecars as the product leaves them, and what a crash leaves open."""
    index = world.index
    numbers = itertools.count(1)
    everybody = [Patient(n, "Patient", "", "Mustermann", "Max", "", "1970-01-01") for n in range(1, PATIENTS + 1)]
    with index.transaction():
        index.apply_roster(everybody, START - 3600, True, None)
        for pat_num in range(1, PATIENTS + 1):
            versions = [version_of(pat_num, next(numbers)) for _ in range(DOCUMENTS_EACH)]
            rows = [Listed(v.item, v.revision, v.revision, v.revision, "", None, v.listing) for v in versions]
            found = compare({}, rows, ["document"], START - 60)
            index.apply_listing((pat_num, "documents"), found, len(rows), None, START - 60, START - 60)
            for version in versions:
                index.put_version(version, START - 40)
                index.duty_done("document", pat_num, version.item.num)
                write(world.archive, version)
        index.reserve_seqs(0, above=PATIENTS * DOCUMENTS_EACH)
        open_archive(world.settings).note_seq(PATIENTS * DOCUMENTS_EACH)
        for n in range(IN_FLIGHT):
            leave_open(world, 1 + n, n)


def write(archive: Path, version: Version) -> None:
    name = f"{archive}/{version.path}"
    for folder in (name.rsplit("/", depth)[0] for depth in (3, 2, 1)):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102 - a path object costs more than the call
    contents = {name: content_of(version.item.num)}
    contents[f"{name.rpartition('.')[0]}.json"] = encode(sidecar_content(version))
    for path, content in contents.items():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        os.write(descriptor, content)
        os.close(descriptor)


def leave_open(world: World, pat_num: int, number: int) -> None:
    name = staging_name("syncd", "main", "20260310", f"{number:032x}", "txt")
    attempt = Attempt(
        id=0,
        method="document",
        pat_num=pat_num,
        num=pat_num * DOCUMENTS_EACH,
        revision="2026-01-01 10:00:00",
        staging=name,
        state="asked",
        asked_at=START - 30,
        placed_at=None,
        listed_at=START - 60,
        why="refetch",
        listed={},
    )
    world.index.journal(attempt)
    (world.archive / "incoming" / f"{number:032x}").write_bytes(b"half")


def test_first_request_follows_soon_after_a_crash_with_100_000_documents(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    world = World.start(folder, practice=Practice(SimulatedClock(START), "America/Chicago"), interval=1.0)
    (world.archive / "incoming").mkdir(exist_ok=True)
    fill(world)
    assert world.index.value("SELECT count(*) FROM version") == PATIENTS * DOCUMENTS_EACH
    started = time.monotonic()
    world.restart()
    world.run(until=lambda: world.office.arrivals)
    asked, done = world.office.arrivals[0].steady - started, time.monotonic() - started
    goal = f"goal {GOAL:g} s; first turns of both lanes {done:.1f} s"
    record_property("figures", f"first request {asked:.1f} s after a crash with 100,000 documents ({goal})")
    assert world.index.value("SELECT count(*) FROM attempt WHERE state = 'asked'") == 0
    assert list((world.archive / "incoming").iterdir()) == []
    assert asked < LIMIT
