"""What a verb asks of whoever holds the lock: taken up once, in order, and answered in one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from syncd import wishes
from syncd.diff import Owing
from syncd.index import Index
from syncd.model import Attempt, Duty, Item, Kind, Listed, Method, Patient
from tests.small import serving, small
from tests.world import RecordedLog

T0 = 1_795_000_000.0
LATER = T0 + 5.0
DOCUMENT = Item(101, "document", 34)


@dataclass
class Practice:
    """A real index, and what its log was told."""

    index: Index
    log: RecordedLog

    def name(self, kind: Kind, num: int, revision: str = "r1") -> Item:
        """An item that the last listing named; nothing is owed."""
        item = Item(101, kind, num)
        row = Listed(item, revision, revision, "2021-04-08 10:00:00", "", "scan.jpg", {})
        with self.index.transaction():
            self.index._put_item(row, T0)
        return item

    def owe(self, item: Item, method: Method = "document", failures: int = 0) -> None:
        self.index.owe(Owing(method, item, "r1", T0), "listed", T0)
        for count in range(failures):
            duty = Duty(method, item.pat_num, item.num, "r1", "listed", T0, count)
            self.index.duty_failed(duty, "zero_bytes", T0 + 90_000)

    def grant(self, verb: str, argument: object = None) -> str | None:
        """Make a wish, let it be granted, and read its outcome."""
        wish = wishes.make(self.index, verb, argument, T0)
        assert wishes.outcome(self.index, wish) is None
        wishes.grant_all(self.index, self.log, LATER)
        return wishes.outcome(self.index, wish)

    def duties(self) -> list[tuple[Any, ...]]:
        sql = "SELECT method, num, why, next_try_at, failures FROM duty ORDER BY method"
        return [tuple(row.values()) for row in self.index.rows(sql)]

    def guard(self, scope: str = "patient-101", reason: str = "disappearances_held") -> str:
        sql = "INSERT INTO guard (scope, reason, made_at, items, of_items) VALUES (?, ?, ?, 1, 1)"
        self.index.run(sql, scope, reason, T0)
        return f"guard-{self.index.value('SELECT max(id) FROM guard')}"


@pytest.fixture
def practice(tmp_path: Path) -> Iterator[Practice]:
    index = Index(tmp_path / "index.db")
    index.apply_roster([Patient(101, "Patient", "", "Müller", "Anna", "", "")], T0, names=True, only=None)
    yield Practice(index, RecordedLog())
    index.close()


# --- taken up


def test_wishes_are_granted_once_in_the_order_they_were_made(practice: Practice) -> None:
    for argument in (None, [101]):
        wishes.make(practice.index, "backfill", argument, T0)
    assert wishes.grant_all(practice.index, practice.log, LATER) == [("backfill", None), ("backfill", [101])]
    assert wishes.grant_all(practice.index, practice.log, LATER) == []
    assert [line["verb"] for line in practice.log.events("wish_taken")] == ["backfill", "backfill"]
    assert practice.index.rows("SELECT DISTINCT taken_at, done_at FROM wish") == [{"taken_at": LATER, "done_at": LATER}]


def test_numbers_of_wishes_rise(practice: Practice) -> None:
    made = [wishes.make(practice.index, "retry", [], T0) for _ in range(3)]
    assert made == sorted(set(made))


def test_unknown_wish_is_refused_and_stops_no_other(practice: Practice) -> None:
    wishes.make(practice.index, "dance", None, T0)
    assert practice.grant("backfill") == "lists are polled next"
    assert wishes.outcome(practice.index, 1) == "refused: nobody knows the wish dance"


# --- retry


def test_retry_of_everything_lifts_every_wait_and_forgets_every_failure(practice: Practice) -> None:
    index = practice.index
    practice.owe(practice.name("document", 34), failures=4)
    practice.owe(practice.name("document", 35))
    index.list_failed((101, "documents"), T0 + 900)
    index.run("UPDATE patient SET thumbnails_after_at = ?, thumbnails_failures = 3", T0 + 900)
    index.run("INSERT INTO site VALUES ('drop', 'drop_refused', '', ?, ?, 3)", T0, T0 + 900)
    assert practice.grant("retry", []) == "1 to be tried again now"
    assert practice.duties() == [("document", 34, "listed", LATER, 0), ("document", 35, "listed", T0, 0)]
    assert index.value("SELECT next_try_at FROM site") == LATER
    assert index.rows("SELECT thumbnails_after_at AS at, thumbnails_failures AS n FROM patient") == [{"at": 0, "n": 0}]
    assert index.rows("SELECT DISTINCT failures, next_try_at FROM list") == [{"failures": 0, "next_try_at": 0}]


def test_retry_leaves_a_placement_that_is_under_way_alone(practice: Practice) -> None:
    item = practice.name("document", 34)
    practice.owe(item, failures=1)
    told: dict[str, Any] = {"state": "asked", "asked_at": T0, "placed_at": None, "listed_at": T0, "why": "listed"}
    practice.index.journal(Attempt(0, "document", 101, 34, "r1", "syncd/name.jpg", listed={}, **told))
    practice.grant("retry", [])
    practice.grant("retry", [[101, "document", 34]])
    assert practice.duties() == [("document", 34, "listed", T0 + 90_000, 1)]
    assert practice.index.value("SELECT busy FROM duty") == 1


def test_retry_of_one_item_tries_that_item_only(practice: Practice) -> None:
    for num in (34, 35):
        practice.owe(practice.name("document", num), failures=3)
    assert practice.grant("retry", [[101, "document", 34]]) == "1 to be tried again now"
    assert practice.duties() == [("document", 34, "listed", LATER, 0), ("document", 35, "listed", T0 + 90_000, 3)]


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("document", ["document"]),
        ("mount", ["mount", "mount-images"]),
        ("mount-image", ["mount-image"]),
        ("sheet", ["sheet"]),
    ],
)
def test_retry_of_an_archived_item_fetches_it_again(practice: Practice, kind: Kind, methods: list[str]) -> None:
    practice.name(kind, 34)
    assert practice.grant("retry", [[101, kind, 34]]) == "1 to be tried again now"
    assert practice.duties() == [(method, 34, "repair", LATER, 0) for method in methods]


def test_retry_of_a_thumbnail_makes_it_due_at_its_document(practice: Practice) -> None:
    index = practice.index
    practice.name("document", 34)
    practice.name("thumbnail", 34)
    index.run("UPDATE patient SET thumbnails_after_at = ?, thumbnails_failures = 3", T0 + 900)
    assert practice.grant("retry", [[101, "thumbnail", 34]]) == "1 to be tried again now"
    assert practice.duties() == []
    assert index.item_rows(DOCUMENT)[0]["thumbnail_due"] == 1
    assert index.rows("SELECT thumbnails_after_at AS at, thumbnails_failures AS n FROM patient") == [{"at": 0, "n": 0}]


@pytest.mark.parametrize("kind", ["document", "thumbnail"])
def test_retry_of_what_is_not_listed_is_refused_and_changes_nothing(practice: Practice, kind: Kind) -> None:
    practice.owe(practice.name("document", 34), failures=3)
    gone = practice.name("document", 35)
    practice.index.vanish(gone, T0)
    before = practice.duties()
    for number in (35, 99):
        said = practice.grant("retry", [[101, "document", 34], [101, kind, number]])
        assert said is not None
        assert said.startswith(f"refused: 101/{kind}-{number} cannot be fetched again")
    assert practice.duties() == before


def test_retry_of_what_is_not_in_the_practice_yet_is_refused(practice: Practice) -> None:
    practice.index.set_item(practice.name("document", 34), "pending = 1")
    said = practice.grant("retry", [[101, "document", 34]])
    assert said is not None
    assert said.startswith("refused: 101/document-34 ")
    assert practice.duties() == []


# --- approve, reject


def test_approved_guard_lets_its_items_go_on_by_the_ordinary_rule(practice: Practice) -> None:
    guard, item = practice.guard(), practice.name("document", 34)
    practice.index.set_item(item, "held_by = 1, missing_since_at = ?", T0 - 90_000)
    assert practice.grant("approve", guard) == "guard-1 approved"
    assert practice.index.item_rows(item)[0]["held_by"] is None
    assert practice.index.rows("SELECT state, ended_at FROM guard") == [{"state": "approved", "ended_at": LATER}]
    assert practice.log.events("guard_ended")[0]["state"] == "approved"
    assert practice.index.meta("database_approved") is None


def test_rejected_guard_keeps_its_items_until_they_are_seen_again(practice: Practice) -> None:
    guard, item = practice.guard(), practice.name("document", 34)
    practice.index.set_item(item, "held_by = 1, missing_since_at = ?", T0 - 90_000)
    assert practice.grant("reject", guard) == "guard-1 rejected"
    assert practice.index.item_rows(item)[0]["held_by"] == -1
    assert practice.index.value("SELECT state FROM guard") == "rejected"


@pytest.mark.parametrize("reason", ["other_database", "database_went_back"])
@pytest.mark.parametrize("verb", ["approve", "reject"])
def test_only_what_was_said_of_an_approved_database_is_believed(practice: Practice, verb: str, reason: str) -> None:
    assert practice.grant(verb, practice.guard("database", reason)) is not None
    assert practice.index.meta("database_approved") == (reason if verb == "approve" else None)


@pytest.mark.parametrize("verb", ["approve", "reject"])
@pytest.mark.parametrize("guard", ["guard-7", "Müller, Anna", "guard-0", "document-1"])
def test_guards_that_nobody_holds_are_refused(practice: Practice, verb: str, guard: str) -> None:
    held = practice.guard()
    said = practice.grant(verb, guard)
    assert said is not None
    assert said.startswith("refused: ")
    assert "Müller" not in said
    assert practice.index.value("SELECT state FROM guard") == "held"
    assert practice.grant(verb, held) == f"guard-1 {verb}{'d' if verb == 'approve' else 'ed'}"
    again = practice.grant(verb, held)
    assert again is not None
    assert again.startswith("refused: guard-1 is not held")


# --- in the lane


def test_a_wish_for_a_backfill_polls_the_lists_it_names_next(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    sent = len(world.office.arrivals)
    wishes.make(world.index, "backfill", [one.other], world.clock.now())
    world.run(seconds=240)
    polled = [str(each.params.get("PatNum")) for each in world.office.arrivals[sent:] if "PatNum" in each.params]
    world.stop()
    assert polled[:2] == [str(one.other)] * 2


def test_a_retry_of_a_patients_lists_polls_them_next(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    sent = len(world.office.arrivals)
    world.index.run("UPDATE list SET failures = 4, next_try_at = 9e9")
    wishes.make(world.index, "retry", [[one.other, wishes.LISTS, 0]], world.clock.now())
    world.run(seconds=240)
    polled = [str(each.params.get("PatNum")) for each in world.office.arrivals[sent:] if "PatNum" in each.params]
    waiting = world.index.rows("SELECT DISTINCT pat_num FROM list WHERE failures > 0")
    world.stop()
    assert polled[:2] == [str(one.other)] * 2
    assert [row["pat_num"] for row in waiting] == [one.patient]


def test_thumbnails_of_a_wished_backfill_do_not_wait_though_a_slot_passed_without_a_look_at_them(
    tmp_path: Path,
) -> None:
    """Somebody looks on until none is due; where the question for them takes long it is not asked in every slot."""
    one = small()
    world = serving(tmp_path, one)
    world.run()
    one.practice.replace_bytes(one.document)
    world.run(until=lambda: len(world.media(one.patient, "document", one.document)) > 1)
    sent = len(world.sent("/documents/Thumbnails"))
    wishes.make(world.index, "backfill", None, world.clock.now())
    world.lanes.api_lane.places._thumbnails_after = world.clock.steady() + 360.0
    for pat_num in (one.patient, one.other):
        world.lanes.api_lane.agenda.remove(pat_num)  # no list is worth a request: idle slots
    world.run(seconds=600)
    world.stop()
    assert len(world.sent("/documents/Thumbnails")) == sent + 1


def test_a_wished_repair_brings_a_removed_file_back(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    media = [name for name in world.files(one.patient, "document", one.document) if not name.endswith(".json")]
    folder = world.archive / "patients" / str(one.patient) / f"document-{one.document}"
    for name in world.files(one.patient, "document", one.document):
        (folder / name).rename(tmp_path / name)
    wishes.make(world.index, "retry", [[one.patient, "document", one.document]], world.clock.now())
    world.run(hours=2)
    after = [name for name in world.files(one.patient, "document", one.document) if not name.endswith(".json")]
    world.stop()
    assert len(after) == 1
    assert after[0].split("-")[1] == media[0].split("-")[1]
