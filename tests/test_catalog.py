"""What can be found in the index, and what it says of itself."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from syncd.catalog import Catalog
from syncd.diff import Owing, compare
from syncd.errors import SiteError, UsageError
from syncd.index import FAILING_AFTER, Index
from syncd.model import KINDS, Duty, Item, Kind, Listed, ListName, Patient, Upload, Version
from syncd.report import DAY, iso
from syncd.search import Filters

T0 = 1_795_000_000.0
DOCUMENT, SHEET = Item(101, "document", 34), Item(101, "sheet", 45)


def listed(item: Item, revision: str = "r1", upload: Upload | None = None, **fields: str) -> Listed:
    named = {"docCategory": "BWX", "Description": "Left bitewing"} | fields
    return Listed(item, revision, revision, "2021-04-08 10:00:00", "", "scan.JPG", named, upload)


@dataclass
class Practice:
    """A real index, filled as the story does it."""

    index: Index
    catalog: Catalog
    seq: int = 0

    def roster(self, *patients: Patient, at: float = T0) -> None:
        self.index.apply_roster(patients, at, names=True, only=None)

    def list(self, pat_num: int, *rows: Listed, at: float = T0, name: ListName = "documents") -> None:
        difference = compare(self.index.known(pat_num, name), rows, KINDS, at)
        self.index.apply_listing((pat_num, name), difference, len(rows), None, at, at)

    def archive(self, item: Item, version: int = 1, sidecar: int = 1, revision: str = "r1", at: float = T0) -> Version:
        self.seq += 1
        self.index.remember("last_seq", str(self.seq))
        sha256 = hashlib.sha256(f"{item}{version}".encode()).hexdigest()
        places = {"seq": self.seq, "version": version, "sidecar": sidecar, "revision": revision, "method": item.kind}
        content = {"sha256": sha256, "bytes": 1000, "extension": "jpg", "media_type": "image/jpeg", "mount_num": None}
        times = dict.fromkeys(("listed_at", "placed_at", "archived_at", "first_seen_at"), at)
        told: dict[str, Any] = {**places, **content, **times, "file_name": "scan.JPG", "listing": listed(item).fields}
        done = Version(item=item, **told)
        self.index.put_version(done, at)
        for method in ("document", "mount", "sheet"):
            self.index.duty_done(method, item.pat_num, item.num, revision)
        return done

    def fail(self, item: Item, times: int, failure: str = "timeout_60s", method: str = "document") -> None:
        for failures in range(times):
            duty = Duty(method, item.pat_num, item.num, "r1", "listed", T0, failures)  # type: ignore[arg-type]  # any method
            self.index.duty_failed(duty, failure, T0 + 60)

    def one(self, item: Item) -> dict[str, Any]:
        return self.catalog.show(item)[-1]


@pytest.fixture
def practice(tmp_path: Path) -> Iterator[Practice]:
    index = Index(tmp_path / "index.db")
    made = Practice(index, Catalog(index, "main"))
    made.roster(
        Patient(101, "Patient", "", "Müller", "Anna Maria", "Annie", "1980-01-31"),
        Patient(102, "Patient", "", "Smith", "John", "", "1975-12-01"),
    )
    yield made
    index.close()


def found(practice: Practice, **filters: Any) -> list[str]:
    return [row["full_id"] for row in practice.catalog.find(Filters(**filters))]


def test_find_has_the_keys_of_the_contract_for_a_version_and_for_an_item_without_one(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT), listed(Item(101, "document", 35)))
    done = practice.archive(DOCUMENT)
    with_version, without = practice.catalog.find(Filters())
    assert (
        with_version
        | {
            "practice": "main",
            "id": "document-34",
            "seq": 1,
            "kind": "document",
            "num": 34,
            "pat_num": 101,
            "version": 1,
            "current": True,
            "path": done.path,
            "sha256": done.sha256,
            "bytes": 1000,
            "media_type": "image/jpeg",
            "category": "BWX",
            "revision": "r1",
            "archived_at": iso(T0),
            "state": "archived",
        }
        == with_version
    )
    assert without.keys() == with_version.keys()
    nothing = dict.fromkeys(("seq", "version", "path", "sha256", "bytes", "media_type", "archived_at"))
    assert without | nothing | {"current": False, "state": "owed", "revision": "r1"} == without


def test_find_is_ordered_by_patient_kind_number_and_version(practice: Practice) -> None:
    practice.list(102, listed(Item(102, "document", 7)))
    practice.list(101, listed(SHEET), name="sheets")
    practice.list(101, listed(DOCUMENT), listed(Item(101, "document", 5)))
    for version in (1, 2):
        practice.archive(DOCUMENT, version)
    rows = [(row["full_id"], row["version"]) for row in practice.catalog.find(Filters())]
    assert rows == [
        ("101/document-5", None),
        ("101/document-34", 1),
        ("101/document-34", 2),
        ("101/sheet-45", None),
        ("102/document-7", None),
    ]


def test_a_version_shows_the_newest_revision_that_has_its_bytes(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT, "r2"))
    practice.archive(DOCUMENT, revision="r1")
    practice.archive(DOCUMENT, sidecar=2, revision="r2")
    (row,) = practice.catalog.find(Filters())
    assert (row["revision"], row["seq"], row["state"]) == ("r2", 1, "archived")


def test_find_filters_by_everything_that_is_given(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT), listed(Item(101, "mount", 15), docCategory="FMX", Description="Mouth"))
    practice.list(102, listed(Item(102, "document", 7), Description="Letter", docCategory="Letters"))
    practice.archive(DOCUMENT, 1, at=T0)
    practice.archive(DOCUMENT, 2, at=T0 + 100)
    assert found(practice, patient=102) == ["102/document-7"]
    assert found(practice, kind="mount") == ["101/mount-15"]
    assert found(practice, category="fm") == ["101/mount-15"]
    assert found(practice, text="LETTER") == ["102/document-7"]
    assert found(practice, born="1975-12-01") == ["102/document-7"]
    assert found(practice, num=34, current=True) == ["101/document-34"]
    assert [row["version"] for row in practice.catalog.find(Filters(since=T0 + 1))] == [2]
    assert [row["version"] for row in practice.catalog.find(Filters(until=T0 + 100))] == [1]
    assert found(practice, patient=101, born="1975-12-01") == []


@pytest.mark.parametrize("name", ["müller", "MÜLLER", "annie", "maria müller", "Müller, Anna", "üll", "muller"])
def test_a_name_is_found_in_any_case_and_order_and_without_accents(practice: Practice, name: str) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.list(102, listed(Item(102, "document", 7)))
    assert found(practice, name=name) == ["101/document-34"]
    assert found(practice, name=f"{name} smith") == []


def test_text_of_a_filter_is_never_sql_or_a_pattern(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    assert found(practice, text="%") == []
    assert found(practice, category="' OR 1=1 --") == []


def test_a_kind_that_is_not_mirrored_appears_only_where_it_was_archived(practice: Practice) -> None:
    practice.list(101, listed(Item(101, "mount", 15)), listed(Item(101, "mount", 16)))
    practice.archive(Item(101, "mount", 16))
    catalog = Catalog(practice.index, "main", ["document"])
    assert [row["full_id"] for row in catalog.find(Filters())] == ["101/mount-16"]


def test_state_follows_an_item_from_owed_to_vanished(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    assert practice.one(DOCUMENT)["state"] == "owed"
    practice.fail(DOCUMENT, FAILING_AFTER - 1)
    assert practice.one(DOCUMENT)["state"] == "owed"
    practice.fail(DOCUMENT, 1)
    assert practice.one(DOCUMENT)["state"] == "failing"
    practice.archive(DOCUMENT)
    assert practice.one(DOCUMENT)["state"] == "archived"
    practice.list(101, listed(DOCUMENT, "r2"))
    assert practice.one(DOCUMENT)["state"] == "owed"
    practice.list(101)
    practice.index.set_item(DOCUMENT, "held_by = 7")
    assert practice.one(DOCUMENT)["state"] == "held"
    practice.index.set_item(DOCUMENT, "held_by = NULL")
    practice.index.vanish(DOCUMENT, T0 + 1)
    assert practice.one(DOCUMENT)["state"] == "vanished"


def test_an_upload_that_is_only_a_url_is_pending_at_its_source(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT, upload=Upload("jpg", None)))
    assert practice.one(DOCUMENT)["state"] == "pending_at_source"


def test_an_archived_item_is_owed_again_while_it_is_repaired_but_not_for_a_refetch(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.archive(DOCUMENT)
    practice.index.owe(Owing("document", DOCUMENT, "r1", T0), "refetch", T0)
    assert practice.one(DOCUMENT)["state"] == "archived"
    practice.index.owe(Owing("document", DOCUMENT, "r1", T0), "repair", T0)
    assert practice.one(DOCUMENT)["state"] == "owed"


def test_an_image_of_a_mount_without_its_bytes_is_not_called_archived(practice: Practice) -> None:
    practice.index.put_unlisted(Item(101, "mount-image", 440), 15, "r1", T0)
    assert practice.one(Item(101, "mount-image", 440))["state"] == "owed"


def test_follow_streams_new_bytes_in_the_order_they_were_archived(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT), listed(Item(101, "document", 5)))
    practice.archive(DOCUMENT)
    practice.archive(Item(101, "document", 5))
    practice.archive(DOCUMENT, sidecar=2, revision="r2")
    practice.archive(DOCUMENT, version=2, revision="r3")
    assert [row["seq"] for row in practice.catalog.follow(0)] == [1, 2, 4]
    assert [row["current"] for row in practice.catalog.follow(0)] == [False, True, True]
    assert [row["seq"] for row in practice.catalog.follow(0, limit=1)] == [1]
    assert practice.catalog.follow(4) == []


@pytest.mark.parametrize("after", [1, -1])
def test_following_from_a_seq_of_the_future_is_refused(practice: Practice, after: int) -> None:
    with pytest.raises(UsageError):
        practice.catalog.follow(after)


def test_an_id_means_one_item_or_is_refused(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    assert practice.catalog.resolve("document-34") == DOCUMENT
    with pytest.raises(UsageError, match="document-35"):
        practice.catalog.resolve("document-35")
    practice.list(102, listed(replace(DOCUMENT, pat_num=102)))
    with pytest.raises(UsageError, match="101/document-34, 102/document-34"):
        practice.catalog.resolve("document-34")
    assert practice.catalog.resolve("102/document-34").pat_num == 102
    with pytest.raises(UsageError):
        practice.catalog.resolve("103/document-34")


def test_versions_come_back_as_they_were_recorded(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    recorded = [practice.archive(DOCUMENT), practice.archive(DOCUMENT, sidecar=2, revision="r2")]
    assert practice.catalog.versions(DOCUMENT) == recorded
    assert practice.catalog.versions(SHEET) == []


@pytest.mark.parametrize("change", ["sha256 = 'ff'", "revision = 'r9'", "path = 'patients/9/x'", "bytes = 1"])
def test_a_row_with_a_flipped_bit_is_reported_and_never_answered(practice: Practice, change: str) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.archive(DOCUMENT)
    practice.index.run(f"UPDATE version SET {change}")
    with pytest.raises(SiteError, match="seq 1") as caught:
        practice.catalog.versions(DOCUMENT)
    assert caught.value.reason == "disk_error"
    with pytest.raises(SiteError):
        list(practice.catalog.find(Filters()))


def test_as_of_is_the_version_that_was_current_then(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.archive(DOCUMENT, 1, at=T0)
    practice.archive(DOCUMENT, 2, at=T0 + 10)
    then = [practice.catalog.as_of(DOCUMENT, T0 + after) for after in (-1, 0, 9, 10)]
    assert [version and version.version for version in then] == [None, 1, 1, 2]


def test_history_tells_everything_in_order_of_time(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT), at=T0)
    practice.archive(DOCUMENT, at=T0 + 1)
    practice.archive(DOCUMENT, sidecar=2, revision="r2", at=T0 + 2)
    practice.list(101, listed(DOCUMENT, "r3"), at=T0 + 3)
    practice.fail(DOCUMENT, 1)
    practice.list(101, at=T0 + 4)
    told = practice.catalog.history(DOCUMENT)
    assert [event["event"] for event in told] == ["first_seen", "archived", "revised", "owed", "missing"]
    assert [event["at"] for event in told] == [iso(T0 + after) for after in range(5)]
    assert (told[3]["failures"], told[3]["failure"]) == (1, "timeout_60s")
    practice.index.vanish(DOCUMENT, T0 + 5, "102/document-34")
    assert practice.catalog.history(DOCUMENT)[-1] == {
        "at": iso(T0 + 5),
        "event": "vanished",
        "became": "102/document-34",
    }


def test_facts_of_an_empty_index_are_all_nothing(tmp_path: Path) -> None:
    facts = Catalog(Index(tmp_path / "index.db"), "main").status_facts(T0)
    assert (facts.owed, facts.failing, facts.lists, facts.last_complete_sweep_at) == (0, {}, 0, None)


def test_facts_count_what_find_shows(practice: Practice) -> None:
    items = [Item(101, "document", num) for num in range(1, 9)]
    practice.list(101, *map(listed, items[:7]), listed(items[7], upload=Upload("jpg", None)))
    practice.list(101, listed(SHEET), name="sheets")
    for item in items[:2]:
        practice.archive(item, at=T0)
    practice.fail(items[2], FAILING_AFTER, "zero_bytes")
    practice.index.vanish(items[3], T0)
    practice.index.set_item(items[4], "held_by = 7")
    practice.index.owe(Owing("document", items[0], "r1", T0), "refetch", T0)
    facts = practice.catalog.status_facts(T0 + 60)
    states = [row["state"] for row in practice.catalog.find(Filters())]
    counted = {
        "owed": facts.owed,
        "failing": sum(facts.failing.values()),
        "held": facts.held,
        "vanished": facts.vanished,
        "pending_at_source": facts.pending_at_source,
        "archived": 2,
    }
    assert {state: states.count(state) for state in counted} == counted
    assert counted == {"owed": 3, "failing": 1, "held": 1, "vanished": 1, "pending_at_source": 1, "archived": 2}
    assert facts.failing == {"zero_bytes": 1}
    assert (facts.archived_items, facts.archived_versions, facts.archived_bytes) == (2, 2, 2000)
    assert (facts.last_archived_at, facts.mean_bytes) == (T0, 1000)


def stamped(seconds: float) -> str:
    return dt.datetime.fromtimestamp(T0 + seconds, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


def test_delays_are_of_news_and_of_each_revision_once(practice: Practice) -> None:
    item, mount = Item(101, "document", 35), Item(101, "mount", 15)
    practice.list(101, listed(DOCUMENT), listed(item), replace(listed(mount), date_created=stamped(100)))
    practice.archive(DOCUMENT, revision=stamped(-10), at=T0)  # the mirror begins: what is older says nothing
    practice.archive(DOCUMENT, 2, revision=stamped(10), at=T0 + 50)
    practice.archive(DOCUMENT, 3, revision=stamped(10), at=T0 + 900)  # fetched again: no news
    practice.archive(item, revision=stamped(60), at=T0 + 40)  # a clock that is ahead
    practice.archive(SHEET, revision="digest:ab", at=T0 + 60)  # no stamp at all
    practice.archive(mount, revision="digest:cd", at=T0 + 160)
    practice.archive(mount, 2, revision="digest:ef", at=T0 + 900)
    assert practice.catalog.status_facts(T0 + 1000).delays == {"document": [0.0, 40.0], "mount": [60.0]}
    assert practice.catalog.status_facts(T0 + DAY + 45).delays == {"document": [40.0], "mount": [60.0]}


def test_a_mount_that_needs_two_calls_is_one_item_and_two_requests(practice: Practice) -> None:
    practice.list(101, listed(Item(101, "mount", 15)))
    facts = practice.catalog.status_facts(T0)
    assert (facts.owed, facts.owed_requests) == (1, 2)
    practice.fail(Item(101, "mount", 15), FAILING_AFTER, "mount_too_large", "mount-images")
    facts = practice.catalog.status_facts(T0)
    assert (facts.owed, facts.owed_requests, facts.failing) == (0, 0, {"mount_too_large": 1})
    assert practice.one(Item(101, "mount", 15))["state"] == "failing"
    assert [row["failure"] for row in practice.catalog.failing()] == ["mount_too_large"]


def test_nothing_is_owed_for_a_patient_who_left(practice: Practice) -> None:
    practice.list(101, listed(DOCUMENT))
    practice.roster(Patient(102, "Patient", "", "Smith", "John", "", "1975-12-01"))
    facts = practice.catalog.status_facts(T0)
    assert (facts.owed, facts.lists, facts.patients) == (0, 2, 1)


def test_the_sweep_is_complete_once_each_wanted_list_was_polled(practice: Practice) -> None:
    practice.list(101, at=T0 + 1)
    practice.list(102, at=T0 + 2)
    facts = practice.catalog.status_facts(T0 + 3)
    assert (facts.lists, facts.lists_never_polled, facts.last_complete_sweep_at) == (4, 2, None)
    assert facts.last_listed_at == T0 + 2
    without_sheets = Catalog(practice.index, "main", set[Kind](KINDS) - {"sheet"}).status_facts(T0 + 3)
    assert (without_sheets.lists, without_sheets.last_complete_sweep_at) == (2, T0 + 1)


def test_new_patient_does_not_undo_the_first_sweep(practice: Practice) -> None:
    for pat_num in (101, 102):
        for name in ("documents", "sheets"):
            practice.list(pat_num, name=name, at=T0 + 1)
    known = [practice.index.patient(pat_num) for pat_num in (101, 102)]
    newcomer = Patient(103, "Patient", "", "Smith", "Ann", "", "1975-12-01")
    practice.roster(*(each for each in known if each), newcomer, at=T0 + 9)
    facts = practice.catalog.status_facts(T0 + 10)
    assert (facts.lists, facts.lists_never_polled, facts.last_complete_sweep_at) == (6, 2, T0 + 1)


def test_a_list_of_many_rows_takes_several_requests_of_a_sweep(practice: Practice) -> None:
    practice.list(101, *(listed(Item(101, "document", num)) for num in range(1, 251)))
    assert practice.catalog.status_facts(T0, page_rows=100).sweep_requests == 3 + 3
    assert practice.catalog.status_facts(T0, page_rows=1000).sweep_requests == 4


def test_site_states_guards_incidents_and_leftovers_are_reported(practice: Practice) -> None:
    run = practice.index.run
    run("INSERT INTO site VALUES ('drop', 'drop_refused', 'the words', ?, ?, 3)", T0 - 60, T0 + 60)
    run(
        "INSERT INTO guard (scope, reason, made_at, items, of_items) VALUES ('all', 'disappearances_held', ?, 60, 99)",
        T0,
    )
    run(
        "INSERT INTO guard (scope, reason, made_at, items, of_items, state) VALUES ('all', 'x', ?, 1, 2, 'approved')",
        T0,
    )
    old, fresh = T0 - 9 * 86_400, T0 - 86_400
    for since, until in ((old, old + 5), (old, None), (fresh, fresh + 5)):
        run("INSERT INTO incident (lane, reason, since_at, until_at) VALUES ('api', 'throttled', ?, ?)", since, until)
    for staging, looks in (("a", 0), ("b", 2)):
        run(
            "INSERT INTO attempt (method, pat_num, num, revision, staging, state, asked_at, listed_at, why, listed,"
            " looks) VALUES ('document', 101, 34, 'r1', ?, 'cleaning', ?, ?, 'listed', '{}', ?)",
            *(staging, T0, T0, looks),
        )
    practice.list(101, listed(DOCUMENT), listed(Item(101, "document", 35)))
    practice.index.set_item(DOCUMENT, "thumbnail_due = 1")
    practice.index.set_item(Item(101, "document", 35), "thumbnail_due = 1")
    facts = practice.catalog.status_facts(T0)
    assert [(each.lane, each.reason, each.failures) for each in facts.troubles] == [("drop", "drop_refused", 3)]
    assert [(each.guard, each.items, each.of_items) for each in facts.holds] == [(1, 60, 99)]
    assert [(each.since_at, each.until_at) for each in facts.incidents] == [(old, None), (fresh, fresh + 5)]
    assert (facts.drop_leftovers, facts.thumbnails_due, facts.thumbnail_calls) == (1, 2, 1)
