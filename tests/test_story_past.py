"""What `restore` gives of the past: against a simulated practice that lived, moment by moment, for weeks."""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from syncd.archive import Archive
from syncd.demo.practice import Practice
from syncd.model import Item
from syncd.retrieve import restore, restore_patient
from tests.small import HOUR, small
from tests.world import World

MOMENTS, RESTORES = 200, 1000
VANISH_AFTER, LAG = HOUR, 10 * HOUR  # a mirror of four patients knows within the latter what the office did
Key = tuple[int, str, int]
State = dict[Key, str]  # sha256; of a sheet, whose PDF is rendered anew at each call, its stamp
NAMED = re.compile(r".* \(([a-z-]+)-(\d+) version \d+\)\.[a-z]+")
STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def told(key: Key, content: bytes) -> str:
    stamps = STAMP.findall(content) if key[1] == "sheet" else []
    return stamps[0].decode() if stamps else hashlib.sha256(content).hexdigest()


@dataclass
class Truth:
    """What the office held at every time: of each item its contents, with the times since when; None: gone."""

    changes: defaultdict[Key, list[tuple[float, str | None]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, practice: Practice) -> Truth:
        truth = cls()
        for event in practice.history:
            key = (event.pat_num, event.kind, event.num)
            content = event.stamp.replace(" ", "T") if event.kind == "sheet" else told(key, event.bytes or b"")
            truth.changes[key].append((event.at, None if event.what == "gone" else content))
        return truth

    def could_be(self, key: Key, at: float, lag: float) -> set[str | None]:
        """What it was at some time of the last `lag` seconds."""
        changes = self.changes[key]
        first = bisect_right(changes, at - lag, key=lambda change: change[0])
        before = changes[first - 1][1] if first else None
        return {before, *(content for time, content in changes[first:] if time <= at)}


class Staff:
    """They do all that makes a past hard to tell, at random, on a few patients."""

    def __init__(self, practice: Practice, rng: random.Random) -> None:
        self._office, self._rng = practice, rng

    def act(self) -> None:
        practice, rng = self._office, self._rng
        patients = [row["PatNum"] for row in practice.rows("SELECT PatNum FROM patient")]
        free = [r["DocNum"] for r in practice.rows("SELECT DocNum FROM document WHERE MountItemNum = 0 ORDER BY 1")]
        inside = [r["DocNum"] for r in practice.rows("SELECT DocNum FROM document WHERE MountItemNum > 0 ORDER BY 1")]
        mounts = practice.rows("SELECT MountNum, PatNum FROM mount ORDER BY 1")
        sheets = practice.rows("SELECT SheetNum, IsDeleted FROM sheet ORDER BY 1")
        pat_num, mount = rng.choice(patients), rng.choice(mounts)
        doc_num = rng.choice(free) if len(free) > 6 else practice.add_document(pat_num, "png")
        sheet = rng.choice(sheets)
        match rng.randrange(10):
            case 0:
                practice.add_document(pat_num, rng.choice(("jpg", "pdf")), DocCategory=rng.choice((14, 47, 190)))
            case 1:
                practice.edit_document(doc_num, DocCategory=rng.choice((14, 47, 190)))  # equal bytes
            case 2 | 3:
                practice.replace_bytes(doc_num)
            case 4:
                practice.delete_document(doc_num)
            case 5 | 6:
                practice.move_document(doc_num, pat_num, keep_number=True)  # and back, now and then
            case 7 if len(inside) < 8 and practice.need("document", doc_num)["PatNum"] == mount["PatNum"]:
                practice.move_into_mount(doc_num, mount["MountNum"])
            case 8 if len(inside) > 3:
                practice.out_of_mount(rng.choice(inside))
            case _ if sheet["IsDeleted"]:
                practice.update("sheet", sheet["SheetNum"], {"IsDeleted": 0})  # a deleted one is only flagged
                practice._record("appeared", "sheet", sheet["SheetNum"])
            case _:
                practice.delete_sheet(sheet["SheetNum"])


@dataclass
class Lived:
    """A mirror that was there all the time, and what it knew at each of the moments."""

    world: World
    truth: Truth
    known: list[tuple[float, State]]


def known_now(world: World) -> State:
    sql = "SELECT i.*, path FROM item i JOIN version v ON v.seq = (SELECT max(seq) FROM version w WHERE w.pat_num ="
    sql += " i.pat_num AND w.kind = i.kind AND w.num = i.num) WHERE vanished_at IS NULL AND i.kind <> 'thumbnail'"
    rows = {(row["pat_num"], row["kind"], row["num"]): row["path"] for row in world.index.rows(sql)}
    return {key: told(key, (world.archive / path).read_bytes()) for key, path in rows.items()}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    rng, one = random.Random(6), small()
    for _ in range(2):
        patient = one.practice.add_patient()
        one.practice.add_sheet(patient)
    sync = {"vanish_after": f"{VANISH_AFTER:g}s", "kinds": ["document", "mount", "mount-image", "sheet"]}
    world = World.start(tmp_path_factory.mktemp("past"), practice=one.practice, sync=sync, interval=200.0)
    world.run()
    staff, known = Staff(one.practice, rng), []
    for _ in range(MOMENTS):
        staff.act()
        world.run(seconds=rng.uniform(60, 1.2 * HOUR))
        known.append((world.clock.now(), known_now(world)))
        world.clock.advance(1.0)  # what happens next does not happen at the same time
    yield Lived(world, Truth.of(one.practice), known)
    world.stop()


def test_a_patients_state_of_200_moments_is_what_was_known_and_what_the_office_held(
    lived: Lived, tmp_path: Path
) -> None:
    catalog, archive, zone = lived.world.catalog(), Archive(lived.world.archive, 0), lived.world.settings.zone
    patients, rng = sorted({key[0] for key in lived.truth.changes}), random.Random(8)
    returned = lived.world.index.value("SELECT count(*) FROM absence")
    assert returned >= 10, "too little came back for this to prove anything"
    for number, (at, known) in enumerate(lived.known):
        pat_num = rng.choice([key[0] for key in known])
        done = restore_patient(catalog, archive, pat_num, tmp_path / str(number), at, zone)
        files = [path for path in (tmp_path / str(number)).rglob("*") if path.is_file()]
        state: State = {}
        for path in files:
            found = NAMED.fullmatch(path.name)
            assert found is not None, path.name
            key = (pat_num, found[1], int(found[2]))
            state[key] = told(key, path.read_bytes())
        assert (len(state), done.damaged) == (len(files), ())
        assert state == {key: content for key, content in known.items() if key[0] == pat_num}, number
        everything = {(v.item.pat_num, v.item.kind, v.item.num) for n in patients for v in catalog.state_of(n, at)}
        assert everything == known.keys(), number
        for key in lived.truth.changes:
            if key[0] == pat_num:
                assert state.get(key) in lived.truth.could_be(key, at, LAG), (number, key)


@pytest.mark.long
def test_a_thousand_random_versions_are_restored_with_their_digests(lived: Lived, tmp_path: Path) -> None:
    catalog, archive, zone = lived.world.catalog(), Archive(lived.world.archive, 0), lived.world.settings.zone
    rows = lived.world.index.rows("SELECT * FROM version WHERE sidecar = 1 ORDER BY seq")
    for row in random.Random(9).choices(rows, k=RESTORES):
        item = Item(row["pat_num"], row["kind"], row["num"])
        done = restore(catalog, archive, item, tmp_path, None, zone, number=row["version"], name="one")
        assert done.path is not None
        assert hashlib.sha256(done.path.read_bytes()).hexdigest() == row["sha256"]
        done.path.unlink()


def test_a_past_state_is_filed_and_named_as_it_was_listed_then(tmp_path: Path) -> None:
    one = small()
    world = World.start(tmp_path, practice=one.practice, sync={"vanish_after": "1h"})
    world.run()
    before = world.clock.now()
    one.practice.edit_document(one.document, DocCategory=47, Description="Later")
    world.run(hours=2)
    catalog, archive = world.catalog(), Archive(world.archive, 0)
    for at, folder in ((before, "Lab Cases"), (world.clock.now(), "Patient Pictures")):
        restore_patient(catalog, archive, one.patient, tmp_path / folder, at, world.settings.zone)
        (made,) = (tmp_path / folder).rglob(f"*(document-{one.document} version 1).jpg")
        assert made.parent.name == folder
        assert ("Later" in made.name) == (at > before)
    world.stop()
