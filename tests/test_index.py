"""The index on real SQLite files: durable, all or nothing, and right about what is owed next."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncd import mirror
from syncd.catalog import Catalog
from syncd.diff import Owing, compare
from syncd.errors import SiteError
from syncd.index import Index
from syncd.model import KINDS, Attempt, Duty, Item, Listed, ListName, Method, Patient, PlacedName, Version
from syncd.search import Filters
from tests.small import SCHEMA

T0 = 1_795_000_000.0
WHYS = mirror.OWED
DOCUMENT, MOUNT, SHEET = Item(101, "document", 34), Item(101, "mount", 15), Item(101, "sheet", 45)
IMAGE = Item(101, "mount-image", 440)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    made = Index(tmp_path / "index.db")
    yield made
    made.close()


def patient(pat_num: int, **changes: Any) -> Patient:
    return replace(Patient(pat_num, "Patient", "s1", "Müller", "Anna", "Annie", "1980-01-31"), **changes)


def roster(index: Index, *pat_nums: int, at: float = T0) -> dict[str, Any]:
    return index.apply_roster(map(patient, pat_nums), at, names=True, only=None)


def listed(item: Item, revision: str = "r1", date_created: str = "2021-04-08 10:00:00") -> Listed:
    fields = {"docCategory": "BWX", "Description": "Left bitewing"}
    return Listed(item, revision, revision, date_created, "", "scan.jpg", fields)


def poll(index: Index, pat_num: int, *rows: Listed, at: float = T0, name: ListName = "documents") -> None:
    difference = compare(index.known(pat_num, name), rows, KINDS, at)
    index.apply_listing((pat_num, name), difference, len(rows), None, at, at)


def archived(item: Item, seq: int, version: int = 1, sidecar: int = 1, revision: str = "r1", **changes: Any) -> Version:
    told: dict[str, Any] = {"extension": "jpg", "media_type": "image/jpeg", "file_name": "scan.jpg", "method": "x"}
    told |= dict.fromkeys(("listed_at", "placed_at", "archived_at", "first_seen_at"), T0 + seq) | {"mount_num": None}
    told |= {"sha256": f"{version:064x}", "bytes": 1000 + version, "listing": dict(listed(item).fields)} | changes
    return Version(seq=seq, item=item, version=version, sidecar=sidecar, revision=revision, **told)


def owe(index: Index, num: int, pat_num: int = 101, why: str = "listed", at: float = T0, revision: str = "r1") -> None:
    index.owe(Owing("document", Item(pat_num, "document", num), revision, at), why, at)


def due(index: Index, now: float = T0, whys: tuple[str, ...] = WHYS, **scope: Any) -> int | None:
    found = index.next_duty(now, whys, scope.pop("prefer", None), **scope)
    return found.num if found else None


def attempt(num: int = 34, method: Method = "document", **changes: Any) -> Attempt:
    staging = f"syncd/syncd-main-20261121-{num:032x}.jpg"
    told: dict[str, Any] = {"state": "asked", "asked_at": T0, "placed_at": None, "listed_at": T0, "why": "listed"}
    told |= {"id": 0, "revision": "r1", "staging": staging, "listed": {"file_name": "scan.jpg"}} | changes
    return Attempt(method=method, pat_num=101, num=num, **told)


# --- the file


def test_every_connection_is_durable_and_in_wal_mode(index: Index) -> None:
    other = index.sibling()
    for each in (index, other):
        assert each.value("PRAGMA synchronous") == 2
        assert each.value("PRAGMA journal_mode") == "wal"
        assert each.value("PRAGMA foreign_keys") == 1
    other.close()


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_index_and_its_side_files_are_private_from_their_first_byte(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        index = Index(tmp_path / "index.db")
        index.remember("key", "value")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    index.close()
    assert modes == dict.fromkeys(("index.db", "index.db-wal", "index.db-shm"), 0o600)


def test_migrations_are_applied_once(index: Index) -> None:
    tables = index.rows("SELECT name, sql FROM sqlite_schema ORDER BY name")
    for _ in range(2):
        index.sibling().close()
    assert index.rows("SELECT name, sql FROM sqlite_schema ORDER BY name") == tables
    assert index.value("SELECT count(*) FROM _sqlite_migrations") == SCHEMA


OPENING = """
import sys, time
from pathlib import Path
from syncd.index import Index
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
index = Index(Path(sys.argv[1]))
index.remember(sys.argv[3], "here")
"""


def test_processes_that_open_a_new_index_at_once_all_get_it(tmp_path: Path) -> None:
    path, go = tmp_path / "index.db", tmp_path / "go"
    opening = [sys.executable, "-c", OPENING, str(path), str(go)]
    processes = [subprocess.Popen([*opening, str(n)], stderr=subprocess.PIPE, text=True) for n in range(3)]
    time.sleep(0.3)
    go.touch()
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert ends == [("", 0)] * 3
    index = Index(path)
    assert index.value("SELECT count(*) FROM _sqlite_migrations") == SCHEMA
    assert [index.meta(str(number)) for number in range(3)] == ["here"] * 3
    index.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO meta VALUES ('key', x'00ff')",
        "INSERT INTO list (pat_num, name) VALUES ('Müller', 'documents')",
        "INSERT INTO duty VALUES ('document', 1, 2, 'document', 'r', 'listed', 'noon', 0, 0, NULL, 0)",
        "INSERT INTO item (pat_num, kind, num, revision, first_seen_at, fields) VALUES (1, 'x', 2.5, 'r', 0, '{}')",
        "INSERT INTO patient VALUES (1, 'a', 'b', 'c', 'd', 'e', 'f', NULL, NULL, 0, 0)",
    ],
)
def test_tables_are_strict(index: Index, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        index.run(statement)


def test_every_table_of_ours_is_strict(index: Index) -> None:
    tables = {row["name"]: row["strict"] for row in index.rows("PRAGMA table_list") if row["schema"] == "main"}
    assert len([name for name in tables if "sqlite" not in name]) >= 12
    ours = {name: strict for name, strict in tables.items() if "sqlite" not in name and "description_text" not in name}
    assert [name for name, strict in ours.items() if not strict] == []


# --- transactions


def test_a_transaction_is_all_or_nothing(index: Index) -> None:
    other = index.sibling()

    def half() -> None:
        with index.transaction():
            index.remember("one", "1")
            assert (index.meta("one"), other.meta("one")) == ("1", None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert index.meta("one") is None
    with index.transaction():
        index.remember("one", "1")
    assert other.meta("one") == "1"
    other.close()


def test_a_nested_transaction_joins_the_outer_one(index: Index) -> None:
    def outer() -> None:
        with index.transaction():
            with index.transaction():
                index.remember("inner", "1")
            assert index.meta("inner") == "1"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outer()
    assert index.meta("inner") is None


WRITING = """
import sys, time
from pathlib import Path
from syncd.index import Index
index = Index(Path(sys.argv[1]))
index.remember("committed", "1")
with index.transaction():
    for number in range(20_000):
        index.remember(f"half {number}", "x" * 500)
    print("half", flush=True)
    time.sleep(60)
"""


def test_killed_process_leaves_nothing_of_its_open_transaction(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    process = subprocess.Popen([sys.executable, "-c", WRITING, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    assert path.with_name("index.db-wal").stat().st_size > 5_000_000  # it was written, just not committed
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    index = Index(path)
    assert index.rows("SELECT key FROM meta") == [{"key": "committed"}]
    assert index.value("PRAGMA integrity_check") == "ok"
    index.close()


# --- a disk that fails


def test_wrong_statement_is_a_bug_and_no_disk_error(index: Index) -> None:
    with pytest.raises(sqlite3.OperationalError):
        index.rows("SELECT nothing FROM nowhere")


def test_anything_but_an_index_is_a_disk_error_that_names_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(b"Patient Smith" * 1000)
    with pytest.raises(SiteError, match="syncd reindex") as told:
        Index(path)
    assert (told.value.reason, told.value.who, "Smith" in str(told.value)) == ("disk_error", "practice_it", False)
    assert path.read_bytes() == b"Patient Smith" * 1000


def test_folder_that_is_missing_or_no_folder_is_a_disk_error(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    tmp_path.joinpath("index.db").mkdir()
    for path in (tmp_path / "nowhere" / "index.db", tmp_path / "file" / "index.db", tmp_path / "index.db"):
        with pytest.raises(SiteError) as told:
            Index(path)
        assert told.value.reason == "disk_error"


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Index]:
    """An index whose pages, but for the first, are noise."""
    whole = Index(tmp_path / "whole.db")
    roster(whole, *range(1, 2000))
    whole.close()
    path = tmp_path / "damaged.db"
    shutil.copy(tmp_path / "whole.db", path)
    size = path.stat().st_size
    index = Index(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    yield index
    index.close()


def test_corrupted_pages_are_a_disk_error_for_reads_and_writes(damaged: Index) -> None:
    for work in (
        lambda: damaged.rows("SELECT * FROM patient"),
        lambda: damaged.value("SELECT last_name FROM patient WHERE pat_num = 1000"),
        lambda: damaged.run("UPDATE patient SET status = 'x'"),
        lambda: damaged.next_duty(T0, WHYS, None),
        lambda: roster(damaged, 1, 2, 3),
    ):
        with pytest.raises(SiteError) as told:
            work()
        assert told.value.reason == "disk_error"
        assert isinstance(told.value.__cause__, sqlite3.DatabaseError)
        assert not damaged.db.conn.in_transaction  # else all that is written later would never be committed


def test_full_disk_of_the_state_folder_is_named_and_the_index_lives_on(index: Index) -> None:
    index.remember("before", "1")
    index.value(f"PRAGMA max_page_count = {index.value('PRAGMA page_count') + 4}")

    def fill() -> None:
        with index.transaction():
            index.remember("half", "1")
            index.remember("large", "x" * 1_000_000)

    with pytest.raises(SiteError, match="SQLITE_FULL") as told:
        fill()
    assert (told.value.reason, told.value.who) == ("state_full", "practice_it")
    assert "state folder" in str(told.value)
    assert "reindex" not in str(told.value)
    index.value("PRAGMA max_page_count = 1000000")
    index.remember("after", "1")
    assert [row["key"] for row in index.rows("SELECT key FROM meta ORDER BY key")] == ["after", "before"]


def test_mistakes_of_ours_are_not_blamed_on_the_disk(index: Index) -> None:
    with pytest.raises(sqlite3.IntegrityError), index.transaction():
        index.run("INSERT INTO meta VALUES ('key', NULL)")
    with pytest.raises(sqlite3.ProgrammingError):
        index.value("SELECT ?")
    with pytest.raises(OSError, match="not ours"), index.transaction():
        raise OSError("not ours")
    index.remember("key", "still works")


# --- sequence numbers


def test_sequence_numbers_rise_and_are_never_given_twice(index: Index) -> None:
    other = index.sibling()
    assert list(index.reserve_seqs(3, above=0)) == [1, 2, 3]
    assert list(other.reserve_seqs(1, above=2)) == [4]
    assert list(index.reserve_seqs(2, above=10)) == [11, 12]  # the archive knows more than this index
    assert list(index.reserve_seqs(0, above=20)) == []
    assert list(other.reserve_seqs(1, above=0)) == [21]
    other.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=10))
def test_no_order_of_reservations_repeats_a_number(index: Index, calls: list[tuple[int, int]]) -> None:
    given_out: list[int] = [int(index.meta("last_seq") or 0)]
    for count, above in calls:
        numbers = list(index.reserve_seqs(count, above))
        assert len(numbers) == count
        assert all(number > above for number in numbers)
        given_out += numbers
    assert given_out == sorted(set(given_out))


# --- the roster


def test_roster_tells_who_is_new_who_left_and_who_came_back(index: Index) -> None:
    assert roster(index, 101, 102) == {"new": [101, 102], "back": [], "left": [], "renamed": []}
    assert roster(index, 101, at=T0 + 1) == {"new": [], "back": [], "left": [102], "renamed": []}
    assert {state.key[0] for state in index.lists()} == {101}
    assert roster(index, 101, at=T0 + 2) == {"new": [], "back": [], "left": [], "renamed": []}
    assert roster(index, 101, 102, at=T0 + 3) == {"new": [], "back": [102], "left": [], "renamed": []}
    assert [state.key for state in index.lists()] == [
        (pat_num, name) for pat_num in (101, 102) for name in ("documents", "sheets")
    ]
    assert index.meta_time("roster_at") == T0 + 3


def test_patient_who_left_keeps_items_and_lists(index: Index) -> None:
    roster(index, 101)
    poll(index, 101, listed(DOCUMENT))
    roster(index, at=T0 + 1)
    roster(index, 101, at=T0 + 2)
    assert index.polled_at(101, "documents") == T0
    assert index.known_item(DOCUMENT) is not None


def test_names_are_kept_only_where_they_are_wanted(index: Index) -> None:
    index.apply_roster([patient(101)], T0, names=False, only=None)
    assert index.patient(101) == patient(101, last_name="", first_name="", preferred="", birthdate="")
    roster(index, 101)
    assert index.patient(101) == patient(101)
    index.apply_roster([patient(101)], T0, names=False, only=None)
    assert index.patient(101) == patient(101, last_name="", first_name="", preferred="", birthdate="")
    assert index.patient(999) is None


def test_a_patient_whose_name_or_status_changed_is_told(index: Index) -> None:
    roster(index, 101, 102, 103)
    told = [patient(101, stamp="newer"), patient(102, first_name="Ada"), patient(103, status="Archived"), patient(104)]
    assert index.apply_roster(told, T0, names=True, only=None)["renamed"] == [102, 103]


def test_only_the_patients_that_are_wanted_are_taken_over(index: Index) -> None:
    everybody = [patient(number) for number in (101, 102, 103)]
    assert index.apply_roster(everybody, T0, names=True, only=frozenset({102}))["new"] == [102]
    assert {state.key[0] for state in index.lists()} == {102}


def test_patients_of_the_archive_do_not_stand_for_a_roster(index: Index) -> None:
    index.add_patients([patient(101)], names=True)
    assert index.meta("roster_at") is None
    assert [state.polled_at for state in index.lists()] == [0.0, 0.0]
    roster(index, 101, 102)
    index.add_patients([patient(103)], names=True)
    assert index.meta_time("roster_at") == T0
    assert {state.key[0] for state in index.lists()} == {101, 102, 103}


# --- listings


def test_listing_is_taken_over_and_its_list_is_polled(index: Index) -> None:
    roster(index, 101)
    assert index.list_failed((101, "documents"), T0 + 900) == 1
    assert index.list_failed((101, "documents"), T0 + 900) == 2
    poll(index, 101, listed(DOCUMENT), listed(MOUNT))
    state = next(state for state in index.lists() if state.key == (101, "documents"))
    assert (state.polled_at, state.rows, state.newest) == (T0, 2, None)
    assert index.list_failed((101, "documents"), T0) == 1
    assert index.listed(DOCUMENT, "10:00") == replace(listed(DOCUMENT), server_time="10:00")
    assert index.listed(SHEET) is None
    assert {row["method"] for row in index.rows("SELECT method FROM duty")} == {"document", "mount", "mount-images"}


def test_newest_stamp_of_a_list_stays_when_a_listing_tells_none(index: Index) -> None:
    roster(index, 101)
    nothing = compare({}, [], KINDS, T0)
    index.apply_listing((101, "sheets"), nothing, 0, T0 - 5, T0, T0)
    index.apply_listing((101, "sheets"), nothing, 0, None, T0 + 1, T0 + 1)
    assert [state.newest for state in index.lists() if state.key[1] == "sheets"] == [T0 - 5]


def test_documents_and_sheets_are_known_apart(index: Index) -> None:
    poll(index, 101, listed(DOCUMENT), listed(MOUNT))
    poll(index, 101, listed(SHEET), name="sheets")
    assert set(index.known(101, "documents")) == {DOCUMENT, MOUNT}
    assert set(index.known(101, "sheets")) == {SHEET}
    assert index.known(102, "documents") == {}


def test_absence_is_dated_by_the_first_listing_that_lacks_the_item(index: Index) -> None:
    poll(index, 101, listed(DOCUMENT))
    for at in (T0 + 1, T0 + 2):
        poll(index, 101, at=at)
    known = index.known_item(DOCUMENT)
    assert known is not None
    assert (known.missing_since_at, known.vanished) == (T0 + 1, False)


def test_item_that_is_listed_again_is_as_if_it_had_never_been_away(index: Index) -> None:
    poll(index, 101, listed(DOCUMENT))
    poll(index, 101, at=T0 + 1)
    index.set_item(DOCUMENT, "held_by = 7, not_found = 1")
    index.vanish(DOCUMENT, T0 + 2, "102/document-34")
    poll(index, 101, listed(DOCUMENT), at=T0 + 3)
    row = index.item_rows(DOCUMENT)[0]
    assert [row[name] for name in ("missing_since_at", "vanished_at", "became", "held_by", "not_found")] == [
        *(None, None, None, None, 0)
    ]
    assert row["first_seen_at"] == T0
    assert index.duty("document", 101, 34) is not None


def thumbnail(of: int, seq: int = 8, pat_num: int = 101) -> Version:
    return archived(Item(pat_num, "thumbnail", 34), seq, version=seq, source_revision=f"{of:064x}")


@pytest.mark.parametrize(
    ("media_type", "thumbnails", "due"),
    [
        ("image/jpeg", [], 1),
        ("application/pdf", [], 0),
        ("image/jpeg", [thumbnail(of=1)], 0),
        ("image/jpeg", [thumbnail(of=2)], 1),
        ("image/jpeg", [thumbnail(of=1), thumbnail(of=2, seq=9)], 1),
        ("image/jpeg", [thumbnail(of=1, pat_num=102)], 1),
    ],
)
def test_thumbnail_is_due_unless_the_newest_was_made_of_the_newest_bytes(
    index: Index, media_type: str, thumbnails: list[Version], due: int
) -> None:
    for version in (archived(DOCUMENT, 7, media_type=media_type), *thumbnails):
        index.put_version(version, T0)
    index.owe_thumbnail(DOCUMENT)
    assert index.item_rows(DOCUMENT)[0]["thumbnail_due"] == due


@pytest.mark.parametrize("item", [MOUNT, IMAGE])
def test_only_documents_have_thumbnails(index: Index, item: Item) -> None:
    index.put_version(archived(item, 7), T0)
    index.owe_thumbnail(item)
    assert index.item_rows(item)[0]["thumbnail_due"] == 0


def test_mount_that_is_listed_again_has_its_images_back(index: Index) -> None:
    poll(index, 101, listed(MOUNT))
    for image in (IMAGE, Item(101, "mount-image", 441)):
        index.put_unlisted(image, MOUNT.num, "r1", T0)
    index.vanish(Item(101, "mount-image", 441), T0 + 1)  # taken out of the mount before
    poll(index, 101, at=T0 + 2)
    index.vanish(MOUNT, T0 + 3)
    poll(index, 101, listed(MOUNT), at=T0 + 4)
    gone = {row["num"]: row["vanished_at"] for row in index.rows("SELECT num, vanished_at FROM item")}
    assert gone == {15: None, 440: None, 441: T0 + 1}


def test_a_listing_that_lacks_the_file_name_forgets_nothing(index: Index) -> None:
    poll(index, 101, replace(listed(DOCUMENT), fields={"ImgType": "Photo"}))
    poll(index, 101, replace(listed(DOCUMENT, "r2"), file_name=None, fields={}))
    row = index.item_rows(DOCUMENT)[0]
    assert (row["file_name"], row["img_type"], row["revision"]) == ("scan.jpg", "Photo", "r2")


def test_number_under_another_patient_is_reused_and_the_same_item_only_if_its_date_agrees(index: Index) -> None:
    there = Item(102, "document", 34)
    poll(index, 101, listed(DOCUMENT))
    poll(index, 102, listed(there))
    poll(index, 103, listed(Item(103, "document", 34), date_created="2022-01-01 00:00:00"))
    assert index.elsewhere(DOCUMENT, "2021-04-08 10:00:00") == [there]
    assert index.elsewhere(Item(104, "document", 34), "2019-01-01 00:00:00") == []
    assert index.elsewhere(Item(101, "mount", 34), "2021-04-08 10:00:00") == []
    assert index.reused(Item(104, "document", 34))
    assert not index.reused(Item(101, "mount", 34))
    index.vanish(there, T0)
    assert index.elsewhere(DOCUMENT, "2021-04-08 10:00:00") == []


@pytest.mark.parametrize("no_date", ["", "0001-01-01 00:00:00"])
def test_dates_that_are_none_do_not_agree(index: Index, no_date: str) -> None:
    poll(index, 102, listed(Item(102, "document", 34), date_created=no_date))
    assert index.elsewhere(DOCUMENT, no_date) == []


def test_mount_takes_its_images_along_and_leaves_no_duty_not_even_one_under_way(index: Index) -> None:
    roster(index, 101)
    poll(index, 101, listed(MOUNT), listed(DOCUMENT))
    for number, mount_num in ((440, 15), (441, 15), (442, 16)):
        index.put_unlisted(Item(101, "mount-image", number), mount_num, "r1", T0)
        index.owe(Owing("mount-image", Item(101, "mount-image", number), "r1", T0), "listed", T0)
    index.journal(attempt(15, "mount"))
    gone = index.vanish(MOUNT, T0)
    assert gone == [MOUNT, IMAGE, Item(101, "mount-image", 441)]
    assert index.vanish(MOUNT, T0 + 9) == [MOUNT]
    left = {(row["method"], row["num"]) for row in index.rows("SELECT method, num FROM duty")}
    assert left == {("mount-image", 442), ("document", 34)}


def test_image_of_a_mount_is_put_down_once(index: Index) -> None:
    for revision in ("r1", "r2"):
        index.put_unlisted(IMAGE, 15, revision, T0)
    assert [(row["mount_num"], row["revision"]) for row in index.item_rows(IMAGE)] == [(15, "r1")]


# --- what is owed


def test_newer_revision_starts_the_tries_anew(index: Index) -> None:
    owe(index, 34)
    index.duty_failed(Duty("document", 101, 34, "r1", "listed", T0), "zero_bytes", T0 + 900)
    owe(index, 34)
    again = index.duty("document", 101, 34)
    assert again is not None
    assert (again.failures, again.next_try_at) == (1, T0 + 900)
    owe(index, 34, revision="r2", at=T0 + 3)
    newer = index.duty("document", 101, 34)
    assert newer is not None
    assert (newer.failures, newer.next_try_at, newer.revision) == (0, T0 + 3, "r2")


@pytest.mark.parametrize(
    ("first", "then", "why"),
    [
        ("listed", "refetch", "listed"),
        ("repair", "refetch", "repair"),
        ("refetch", "listed", "listed"),
        ("refetch", "repair", "repair"),
        ("listed", "moved", "moved"),
    ],
)
def test_stronger_reason_replaces_a_weaker_one_never_the_other_way(
    index: Index, first: str, then: str, why: str
) -> None:
    owe(index, 34, why=first)
    owe(index, 34, why=then)
    found = index.duty("document", 101, 34)
    assert found is not None
    assert found.why == why


@pytest.mark.parametrize("why", ["repair", "retry"])
def test_repair_is_tried_at_once_whatever_failed_before(index: Index, why: str) -> None:
    owe(index, 34)
    index.duty_failed(Duty("document", 101, 34, "r1", "listed", T0), "zero_bytes", T0 + 900)
    owe(index, 34, why=why)
    found = index.duty("document", 101, 34)
    assert found is not None
    assert (found.failures, found.next_try_at) == (0, T0)


def test_a_failed_duty_counts_and_waits(index: Index) -> None:
    roster(index, 101)
    owe(index, 34)
    index.journal(attempt())
    assert index.duty_failed(Duty("document", 101, 34, "r1", "listed", T0, 4), "zero_bytes", T0 + 900) == 5
    assert due(index, T0 + 899) is None
    assert due(index, T0 + 900) == 34
    assert index.value("SELECT failure FROM duty") == "zero_bytes"


def test_newer_revision_stays_owed_when_the_older_one_is_done(index: Index) -> None:
    roster(index, 101)
    owe(index, 34)
    index.journal(attempt())
    owe(index, 34, revision="r2")
    assert due(index) is None  # its placement is under way
    index.duty_done("document", 101, 34, "r1")
    found = index.next_duty(T0, WHYS, None)
    assert found is not None
    assert found.revision == "r2"
    index.duty_done("document", 101, 34, "r2")
    assert index.duty("document", 101, 34) is None


@pytest.mark.parametrize(("why", "left"), [("listed", False), ("refetch", False), ("moved", True)])
def test_what_is_asked_for_anew_while_it_is_placed_stays_owed_once(index: Index, why: str, left: bool) -> None:
    roster(index, 101)
    owe(index, 34)
    index.journal(attempt())
    owe(index, 34, why=why)
    assert due(index) is None  # its placement is under way
    index.duty_done("document", 101, 34, "r1")
    assert due(index) == (34 if left else None)
    index.journal(attempt(staging="syncd/other"))
    index.duty_done("document", 101, 34, "r1")
    assert index.duty("document", 101, 34) is None


@pytest.mark.parametrize(("why", "left"), [("listed", None), ("backfill", None), ("moved", "r1"), ("repair", "r1")])
def test_what_another_revision_made_necessary_ends_when_the_archived_one_is_listed_again(
    index: Index, why: str, left: str | None
) -> None:
    roster(index, 101)
    item = Item(101, "document", 34)
    poll(index, 101, listed(item))
    index.put_version(archived(item, 1), T0)
    index.duty_done("document", 101, 34)
    poll(index, 101, listed(item, "r2"))
    owe(index, 34, why=why, revision="r2")
    poll(index, 101, listed(item))
    duty = index.duty("document", 101, 34)
    assert (duty.revision if duty else None) == left


def test_the_duty_that_is_due_longest_comes_first_of_all_reasons_asked_for(index: Index) -> None:
    roster(index, 101)
    owe(index, 1, at=T0 - 1)
    owe(index, 2, why="repair", at=T0 - 3)
    owe(index, 3, why="moved", at=T0 - 2)
    owe(index, 4, why="refetch", at=T0 - 9)
    owe(index, 5, at=T0 + 1)
    order = []
    while (number := due(index)) is not None:
        order.append(number)
        index.duty_done("document", 101, number)
    assert order == [2, 3, 1]
    assert due(index, whys=("refetch",)) == 4
    assert due(index, T0 + 1) == 5
    assert index.next_duty(T0, (), None) is None


def test_the_patient_in_hand_is_finished_first(index: Index) -> None:
    roster(index, 101, 102)
    owe(index, 1, at=T0 - 9)
    owe(index, 2, 102, at=T0)
    owe(index, 3, 102, at=T0 + 5)
    assert due(index, prefer=102) == 2
    index.duty_done("document", 102, 2)
    assert due(index, prefer=102) == 1  # what is not due yet is waited for by nobody
    assert due(index, prefer=999) == 1


def test_only_the_patients_asked_for_have_duties(index: Index) -> None:
    roster(index, 101, 102)
    owe(index, 1, at=T0 - 9)
    owe(index, 2, 102)
    assert due(index, only=frozenset({102})) == 2
    assert due(index, prefer=101, only=frozenset({102})) == 2
    assert due(index, prefer=101, only=frozenset({101})) == 1
    assert due(index, only=frozenset()) is None


@pytest.mark.parametrize("prefer", [None, 101])
def test_nothing_is_fetched_of_a_patient_who_left(index: Index, prefer: int | None) -> None:
    roster(index, 101, 102)
    owe(index, 1, at=T0 - 9)
    owe(index, 2, 102)
    roster(index, 102, at=T0 + 1)
    assert due(index, prefer=prefer) == 2
    roster(index, 101, 102, at=T0 + 2)
    assert due(index, prefer=prefer) == 1


# --- placements


def test_placement_is_read_back_as_it_was_written_down(index: Index) -> None:
    roster(index, 101)
    owe(index, 34)
    number = index.journal(attempt())
    assert index.attempts("asked") == [attempt(id=number)]
    assert due(index) is None
    index.set_attempt(number, "placed", T0 + 2, placed_at=T0 + 1, names='[[440, "Müller.jpg"]]', looks=2)
    names = (PlacedName(440, "Müller.jpg"),)
    told: dict[str, Any] = {"state": "placed", "placed_at": T0 + 1, "next_look_at": T0 + 2, "names": names, "looks": 2}
    assert index.attempts("placed") == [attempt(id=number, **told)]
    assert index.attempts("asked") == index.attempts("placed", T0 + 1) == []
    index.set_attempt(number, "unanswered", 0.0, seen_size=5, seen_mtime=7)
    assert [each.seen for each in index.attempts("unanswered")] == [(5, 7)]
    index.forget_attempt(number)
    assert index.attempts("unanswered") == []


def test_placements_whose_look_is_due_come_oldest_first_and_not_all_at_once(index: Index) -> None:
    for number, look in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 10.0)):
        index.set_attempt(index.journal(attempt(number)), "cleaning", look)
    assert [each.num for each in index.attempts("cleaning", 20.0)] == [2, 4, 3]
    assert [each.num for each in index.attempts("cleaning", limit=2)] == [2, 4]


def test_a_staging_name_is_never_used_twice(index: Index) -> None:
    index.journal(attempt())
    with pytest.raises(sqlite3.IntegrityError):
        index.journal(attempt())
    index.forget_attempt(1)
    assert index.journal(attempt(35)) == 2  # nor the number of a placement that is over


# --- what is archived


def current(index: Index, item: Item = DOCUMENT) -> tuple[Any, ...]:
    row = index.item_rows(item)[0]
    return row["current_version"], row["current_seq"], row["archived_revision"], row["bytes"]


def test_version_is_recorded_with_its_item_which_may_be_new(index: Index) -> None:
    index.put_version(archived(IMAGE, 1, mount_num=15), T0)
    assert current(index, IMAGE) == (1, 1, "r1", 1001)
    assert index.item_rows(IMAGE)[0]["mount_num"] == 15
    assert index.item_rows(IMAGE)[0]["first_seen_at"] == T0 + 1


def test_version_does_not_touch_what_was_listed_meanwhile(index: Index) -> None:
    poll(index, 101, listed(DOCUMENT, "r2"))
    index.put_version(archived(DOCUMENT, 1), T0)
    known = index.known_item(DOCUMENT)
    assert known is not None
    assert (known.revision, known.archived_revision) == ("r2", "r1")


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (3, 1, 2)])
def test_adopting_an_older_version_never_moves_the_current_one_back(index: Index, order: tuple[int, ...]) -> None:
    versions = {
        1: archived(DOCUMENT, 11),
        2: archived(DOCUMENT, 12, sidecar=2, revision="r2"),
        3: archived(DOCUMENT, 15, version=2, revision="r3"),
    }
    for number in order:
        index.put_version(versions[number], T0)
    assert current(index) == (2, 15, "r3", 1002)
    assert index.value("SELECT count(*) FROM version") == 3


def test_recording_a_version_twice_is_recording_it_once(index: Index) -> None:
    for _ in range(2):
        index.put_version(archived(DOCUMENT, 1), T0)
    assert index.value("SELECT count(*) FROM version") == 1


@pytest.mark.parametrize(
    "flip",
    [
        "sha256 = replace(sha256, '1', '2')",
        "path = 'patients/102' || substr(path, 13)",
        "bytes = bytes + 1",
        "revision = 'r9'",
        "num = 35",
    ],
)
def test_a_flipped_column_of_a_version_is_noticed_before_it_is_told(index: Index, flip: str) -> None:
    for item, seq in ((DOCUMENT, 1), (Item(101, "document", 35), 2)):
        poll(index, 101, listed(item))
        index.put_version(archived(item, seq), T0)
    index.run("DELETE FROM version WHERE seq = 2")
    catalog = Catalog(index, "main")
    assert [row["seq"] for row in catalog.find(Filters(num=34))] == [1]
    index.run(f"UPDATE version SET {flip} WHERE seq = 1")
    with pytest.raises(SiteError) as told:
        list(catalog.find(Filters()))
    assert told.value.reason == "disk_error"


# --- no turn reads a whole table

WHOLE = ("SCAN item", "SCAN i", "SCAN version", "SCAN v", "SCAN duty", "SCAN d", "SCAN attempt", "SCAN wish")


def plan(index: Index, sql: str) -> list[str]:
    return [str(row["detail"]) for row in index.rows(f"EXPLAIN QUERY PLAN {sql}")]


def traced(index: Index, statements: set[str]) -> None:
    """Keep every statement that this connection runs, its parameters filled in."""
    index.db.conn.set_trace_callback(statements.add)


@pytest.mark.parametrize(("whys", "prefer"), [(WHYS, None), (("refetch",), None), (WHYS, 101)])
def test_the_next_duty_is_found_without_sorting_all_that_are_due(
    index: Index, whys: tuple[str, ...], prefer: int | None
) -> None:
    ran: set[str] = set()
    traced(index, ran)
    index.next_duty(T0, whys, prefer)
    index.db.conn.set_trace_callback(None)
    lines = {line for sql in ran if " why = " in sql for line in plan(index, sql)}
    assert "SEARCH d USING INDEX duty_due (why=? AND next_try_at<?)" in lines
    assert not [line for line in lines if "TEMP B-TREE" in line]
    of_one_patient = {line for sql in ran if "+why" in sql for line in plan(index, sql)}
    assert ("SEARCH d USING PRIMARY KEY (pat_num=?)" in of_one_patient) is (prefer is not None)


def test_a_turns_questions_follow_their_indexes(index: Index) -> None:
    ran: set[str] = set()
    traced(index, ran)
    index.attempts("placed", T0, 16)
    index.known(101, "documents")
    index.elsewhere(DOCUMENT, "2021-04-08 10:00:00")
    index.reused(DOCUMENT)
    index.vanish(MOUNT, T0)
    index.put_version(archived(DOCUMENT, 1), T0)
    index.db.conn.set_trace_callback(None)
    asked = [sql for sql in ran if sql.startswith(("SELECT", "UPDATE", "DELETE"))]
    assert len(asked) >= 8
    assert [(sql, line) for sql in asked for line in plan(index, sql) if "SCAN" in line] == []


def test_touch_does_not_wait_for_the_disk_and_the_next_transaction_does(index: Index) -> None:
    asked: list[str] = []
    index.db.conn.set_trace_callback(asked.append)
    index.touch("DELETE FROM meta WHERE key = ?", "x")
    index.remember("x", "1")
    index.touch("DELETE FROM meta WHERE key = ?", "y")
    assert [sql for sql in asked if "PRAGMA" in sql] == [
        *("PRAGMA synchronous=NORMAL", "PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL")
    ]


def test_touch_inside_a_transaction_is_as_durable_as_that(index: Index) -> None:
    with index.transaction():
        index.touch("INSERT INTO meta VALUES ('x', '1')")
        assert index.value("PRAGMA synchronous") == 2
    assert index.meta("x") == "1"
