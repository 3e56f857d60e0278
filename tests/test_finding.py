"""What `find` finds and how: by an index of texts that follows every change, by date, tooth, state; and followers."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncd.catalog import Catalog
from syncd.errors import SiteError, UsageError
from syncd.index import Index
from syncd.model import Item, Patient
from syncd.naming import folded
from syncd.publishing import Arrival, Publisher
from syncd.search import STATES, Filters
from tests.small import serving, small
from tests.test_catalog import DOCUMENT, T0, Practice, found, listed, practice

__all__ = ["practice"]  # a fixture
TEXTS = (
    "Left bitewing",
    "LEFT BITEWING",
    "Überweisung Dr. Müller",
    'a "b" AND c*',
    "ﬁssure OR NEAR(x)",
    "",
    "né\0vus é",
    "日本語の書類",
)
DESCRIPTIONS = (
    "SELECT folded, pat_num, kind, num FROM described r JOIN description d ON d.id = r.description ORDER BY 1, 2"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Practice]:
    """A document for each of TEXTS."""
    index = Index(tmp_path_factory.mktemp("library") / "index.db")
    made = Practice(index, Catalog(index, "main"))
    made.roster(Patient(101, "Patient", "", "Smith", "John", "", "1975-12-01"))
    made.list(101, *(listed(Item(101, "document", num), Description=text) for num, text in enumerate(TEXTS, 1)))
    yield made
    index.close()


def integrity(index: Index) -> None:
    """FTS5's own check of its index against the texts."""
    index.run("INSERT INTO description_text (description_text) VALUES ('integrity-check')")


TERMS = st.text(max_size=8) | st.text("aeblftn\"'*^()%_:-+ \0é", max_size=6)
PARTS = st.builds(
    lambda text, a, b: text[min(a, b) : max(a, b)].swapcase(),
    st.sampled_from(TEXTS),
    st.integers(0, 22),
    st.integers(0, 22),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(term=TERMS | PARTS)
def test_any_text_finds_exactly_the_descriptions_that_hold_it(library: Practice, term: str) -> None:
    expected = [f"101/document-{num}" for num, text in enumerate(TEXTS, 1) if folded(term) in folded(text)]
    assert found(library, text=term) == expected
    assert found(library, text=term, name="smith") == expected
    for name in ("name", "category", "born", "dated", "tooth"):
        found(library, **{name: term})


def test_a_word_from_a_shell_that_is_no_text_finds_nothing(library: Practice) -> None:
    assert found(library, text="bite\udce9wing") == []


def test_a_text_longer_than_any_description_is_an_ordinary_one(library: Practice) -> None:
    assert found(library, text="left bitewing" * 5000) == []


def test_the_text_index_follows_every_change_of_an_item(practice: Practice) -> None:
    other = Item(102, "document", 7)
    practice.list(101, listed(DOCUMENT, Description="Left bitewing"))
    practice.list(102, listed(other, Description="LEFT bitewing"))
    assert found(practice, text="ft bite") == ["101/document-34", "102/document-7"]
    practice.list(101, listed(DOCUMENT, "r2", Description="Panorex"))
    assert found(practice, text="left bite") == ["102/document-7"]
    assert found(practice, text="anore") == ["101/document-34"]
    practice.index.run("DELETE FROM item WHERE pat_num = 102")
    practice.list(101, listed(DOCUMENT, "r3", Description=""))
    assert practice.index.rows(DESCRIPTIONS) == []
    assert practice.index.rows("SELECT * FROM description") == []
    assert found(practice, text="left bite") == found(practice, text="anore") == []
    integrity(practice.index)


def test_an_index_of_before_is_searched_as_if_it_had_always_been_so(practice: Practice) -> None:
    practice.list(101, *(listed(Item(101, "document", num), Description=text) for num, text in enumerate(TEXTS, 1)))
    before, path = practice.index.rows(DESCRIPTIONS), practice.index.path
    practice.index.close()
    with contextlib.closing(sqlite3.connect(path)) as old, old:
        for name in ("item_new", "item_described_anew", "item_gone"):
            old.execute(f"DROP TRIGGER {name}")
        for name in ("description_text", "description", "described"):
            old.execute(f"DROP TABLE {name}")
        old.execute("DELETE FROM _sqlite_migrations WHERE name = 'text_search'")
    index = Index(path)
    assert index.rows(DESCRIPTIONS) == before
    assert [row["num"] for row in Catalog(index).find(Filters(text="bitewing"))] == [1, 2]
    integrity(index)
    index.close()


@pytest.mark.parametrize(
    "wanted",
    [
        {"patient": 101},
        {"name": "anna muller"},
        {"name": "anna", "born": "1980"},
        {"text": "bitewing"},
        {"text": "bitewing", "name": "anna", "kind": "document", "state": "archived", "current": True},
        {"since": T0},
        *({"state": state, "patient": 101} for state in STATES),
    ],
    ids=str,
)
def test_no_search_by_patient_name_or_text_reads_a_whole_table(practice: Practice, wanted: dict[str, Any]) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.archive(DOCUMENT)
    ran: list[str] = []
    practice.index.db.conn.set_trace_callback(ran.append)
    list(practice.catalog.find(Filters(**wanted)))
    practice.index.db.conn.set_trace_callback(None)
    steps = [row["detail"] for sql in ran if sql.startswith(("SELECT", "WITH")) for row in plan(practice.index, sql)]
    assert any("SEARCH i" in step for step in steps)
    assert [step for step in steps if step.startswith("SCAN") and step.split()[1] in SCANNED] == []


SCANNED = {
    "item",
    "i",
    "version",
    "v",
    "n",
    "described",
    "duty",
    "d",
}  # tables of a million rows, and what they are called


def plan(index: Index, sql: str) -> list[dict[str, Any]]:
    return index.rows(f"EXPLAIN QUERY PLAN {sql}")


def test_what_is_found_in_very_many_places_is_looked_for_patient_by_patient(
    practice: Practice, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pat_num in (101, 102):
        practice.list(pat_num, listed(Item(pat_num, "document", pat_num)))
    once = found(practice, text="bitewing")
    monkeypatch.setattr("syncd.search.MANY", 1)
    monkeypatch.setattr("syncd.catalog.MANY", 1)
    assert found(practice, text="bitewing") == once == ["101/document-101", "102/document-102"]


@pytest.mark.parametrize(
    ("wanted", "nums"),
    [
        ({"born": "1980"}, [34, 35]),
        ({"born": "1980-01"}, [34, 35]),
        ({"born": "1980-02"}, []),
        ({"born": "1980", "patient": 102}, []),
        ({"born": "1980", "patient": 101}, [34, 35]),
        ({"dated": "2021"}, [34, 35, 7]),
        ({"dated": "2021-04-08"}, [34, 35, 7]),
        ({"dated": "2022"}, []),
        ({"tooth": "3"}, [34]),
        ({"tooth": "b"}, [7]),
        ({"tooth": "1"}, []),
        ({"state": "vanished"}, [35]),
        ({"state": "owed"}, [34, 7]),
        ({"state": "failing"}, []),
    ],
    ids=str,
)
def test_birth_year_date_tooth_and_state(practice: Practice, wanted: dict[str, Any], nums: list[int]) -> None:
    practice.list(101, listed(DOCUMENT, ToothNumbers="3,14"), listed(Item(101, "document", 35)))
    practice.list(102, listed(Item(102, "document", 7), ToothNumbers="A, B"))
    practice.index.vanish(Item(101, "document", 35), T0)
    assert [row["num"] for row in practice.catalog.find(Filters(**wanted))] == nums


def test_a_failing_item_is_found_by_its_state(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT), listed(Item(101, "document", 35)))
    practice.fail(DOCUMENT, 3)
    assert found(practice, state="failing") == ["101/document-34"]


# --- followers


def test_a_follower_killed_at_fifty_moments_misses_nothing_and_sees_it_in_order(
    practice: Practice, tmp_path: Path
) -> None:
    """It keeps the last seq that it read whole; the index is made anew under it now and then."""
    rng, catalog = random.Random(5), practice.catalog
    items = [Item(101, "document", num) for num in range(1, 6)]
    practice.list(101, *map(listed, items))
    seen: list[int] = []
    archived: list[int] = []
    versions = dict.fromkeys(items, 0)
    for moment in range(50):
        for _ in range(rng.randint(0, 3)):
            item = rng.choice(items)
            if versions[item] and rng.random() < 0.3:
                practice.archive(item, versions[item], sidecar=2 + practice.seq, revision=f"r{practice.seq}")
                continue
            versions[item] += 1
            archived.append(practice.archive(item, versions[item]).seq)
        if rng.random() < 0.2:
            practice.index.close()
            shutil.copy(practice.index.path, path := tmp_path / f"{moment}.db")
            practice.index = Index(path)
            catalog = Catalog(practice.index)
        rows = catalog.follow(seen[-1] if seen else 0, limit=rng.randint(1, 3))
        seen += [row["seq"] for row in rows[: rng.randint(0, len(rows))]]  # killed there
    while rows := catalog.follow(seen[-1] if seen else 0):
        seen += [row["seq"] for row in rows]
    assert seen == archived
    assert len(seen) > 30


def test_an_index_put_back_from_a_copy_tells_a_follower_nothing_until_the_archive_is_adopted(
    practice: Practice,
) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.archive(DOCUMENT)
    practice.seq = 19
    practice.archive(DOCUMENT, 9)  # adopted already; 2 to 19 are not yet
    practice.index.remember("last_seq", "1")  # as the copy knew it
    assert practice.catalog.follow(0, noted=20) == []
    assert practice.catalog.follow(12, noted=20) == []  # known to the archive: no mistake of the follower
    with pytest.raises(UsageError):
        practice.catalog.follow(21, noted=20)
    practice.index.remember("last_seq", "20")
    assert [row["seq"] for row in practice.catalog.follow(0, noted=20)] == [1, 20]


def test_what_a_failed_record_left_is_recorded_before_any_higher_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = serving(tmp_path, small(documents=1))
    world.run()
    doors = world.lanes.pull_lane._doors
    publisher, last = Publisher(doors), doors.index.meta("last_seq")

    def arrival(num: int) -> Arrival:
        sha256 = doors.archive.write_incoming(source := doors.archive.new_incoming(), content := b"%d" % num)
        told: dict[str, Any] = {"file_name": "a.txt", "method": "document", "listing": {}}
        told |= {"listed_at": T0, "placed_at": T0, "revision": "r", "extension": "txt", "media_type": "text/plain"}
        return Arrival(Item(999, "document", num), source, sha256, len(content), **told)

    first = arrival(1)
    with monkeypatch.context() as broken:
        broken.setattr(Index, "put_version", lambda *_: (_ for _ in ()).throw(SiteError("disk_error")))
        with pytest.raises(SiteError):
            publisher.take([first], T0, lambda _: None)
    publisher.take([arrival(2)], T0, lambda _: None)
    rows = Catalog(doors.index).follow(int(last or 0))
    assert [row["num"] for row in rows] == [1, 2]
    world.stop()
