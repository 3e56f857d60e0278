"""A listing against the index: no row is lost, no stamp is ordered, nothing is owed twice or too late."""

from __future__ import annotations

import datetime as dt
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.diff import (
    DAY,
    DIGESTED,
    DOCUMENT_EVERY,
    MOUNT_EVERY,
    NO_STAMP,
    Known,
    compare,
    is_pending,
    last_page,
    local_time,
    refetch_at,
    revision,
    ripe,
    same_row,
    settle_wait,
    spread,
    stamp_age,
)
from syncd.model import KINDS, Item, Kind, Listed, Upload
from tests.small import serving, small
from tests.world import World

T0 = 1_795_000_000.0
DOCUMENT, MOUNT, SHEET = Item(101, "document", 5), Item(101, "mount", 5), Item(101, "sheet", 45)
# Wall-clock texts that look like times and decide nothing: twice in one night, never, long ago, to come, garbage.
STAMPS = (
    *("2026-11-01 01:30:00", "2026-03-08 02:30:00", "0001-01-01 00:00:00", "9999-12-31 23:59:59", "", "yesterday"),
    *("2026-11-21 10:00:00", "2026-11-21 09:59:59", "2026-11-21T10:00:00+01:00", "\ud800", "2026-02-30 00:00:00"),
)
stamps = st.sampled_from(STAMPS) | st.text(max_size=30)
uploads = st.none() | st.builds(Upload, st.just("jpg"), st.none() | st.binary(max_size=3), st.booleans())
items = st.builds(Item, st.just(101), st.sampled_from(("document", "mount")), st.integers(1, 6))


def listed(item: Item = DOCUMENT, stamp: str = "s1", upload: Upload | None = None, **fields: Any) -> Listed:
    return Listed(item, stamp, stamp, "2021-04-08 10:00:00", "", "scan.jpg", fields, upload)


def known(item: Item = DOCUMENT, stamp: str = "s1", **changes: Any) -> Known:
    plain = Known(item, stamp, stamp, stamp, "2021-04-08 10:00:00", False, None, False, None, False)
    return replace(plain, **changes)


@st.composite
def knowns(draw: st.DrawFn) -> dict[Item, Known]:
    revisions, times = st.none() | stamps, st.none() | st.just(T0 - DAY)
    return {
        item: known(
            item,
            draw(stamps),
            archived_revision=draw(revisions),
            images_revision=draw(revisions),
            pending=draw(st.booleans()),
            missing_since_at=draw(times),
            vanished=draw(st.booleans()),
            held_by=draw(st.none() | st.just(7)),
            not_found=draw(st.booleans()),
        )
        for item in draw(st.sets(items))
    }


rows_of_a_listing = st.lists(st.builds(listed, items, stamps, uploads), unique_by=lambda row: row.item)


# --- nothing is lost


@given(knowns(), rows_of_a_listing)
def test_no_row_and_no_known_item_is_ever_lost(before: dict[Item, Known], rows: list[Listed]) -> None:
    found = compare(before, rows, KINDS, T0)
    after = {item: each.revision for item, each in before.items()} | {row.item: row.revision for row in found.changed}
    assert {row.item: row.revision for row in rows}.items() <= after.items()
    missing = {each.item for each in (*found.newly_missing, *found.still_missing)}
    gone_before = {item for item, each in before.items() if each.vanished}
    assert missing | gone_before | {row.item for row in rows} == before.keys() | {row.item for row in rows}
    assert missing.isdisjoint(row.item for row in rows)


@given(knowns(), rows_of_a_listing)
def test_a_row_is_owed_its_bytes_unless_they_are_archived_or_not_there_yet(
    before: dict[Item, Known], rows: list[Listed]
) -> None:
    found = compare(before, rows, KINDS, T0)
    fetched = {owing.item for owing in found.owing if owing.method in ("document", "mount")}
    fetched |= {row.item for row in found.uploads}
    for row in rows:
        there = before[row.item].archived_revision if row.item in before else None
        assert (row.item in fetched) is (there != row.revision and not is_pending(row))
    images = {owing.item for owing in found.owing if owing.method == "mount-images"}
    for row in rows:
        if row.item.kind == "mount" and not is_pending(row) and (row.upload is None or row.upload.content is None):
            there = before[row.item].images_revision if row.item in before else None
            assert (row.item in images) is (there != row.revision)


@given(knowns(), rows_of_a_listing, st.randoms())
def test_the_order_of_rows_decides_nothing(before: dict[Item, Known], rows: list[Listed], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    one, other = compare(before, rows, KINDS, T0), compare(before, shuffled, KINDS, T0)
    assert set(one.owing) == set(other.owing)
    assert {row.item for row in one.changed} == {row.item for row in other.changed}
    assert (set(one.back), one.newly_missing, one.still_missing) == (
        set(other.back),
        other.newly_missing,
        other.still_missing,
    )


@given(st.sampled_from(STAMPS), st.sampled_from(STAMPS))
def test_stamps_are_never_ordered(older: str, newer: str) -> None:
    found = compare({DOCUMENT: known(stamp=older)}, [listed(stamp=newer)], KINDS, T0)
    assert bool(found.changed) is bool(found.owing) is (older != newer)


@given(rows_of_a_listing)
def test_a_listing_that_is_archived_already_says_nothing(rows: list[Listed]) -> None:
    before = {row.item: known(row.item, row.revision, pending=is_pending(row)) for row in rows}
    assert compare(before, rows, KINDS, T0).nothing


# --- one row


def test_same_number_as_document_and_as_mount_is_two_items() -> None:
    found = compare({DOCUMENT: known()}, [listed(), listed(MOUNT)], KINDS, T0)
    assert [row.item for row in found.changed] == [MOUNT]
    assert {(owing.method, owing.item) for owing in found.owing} == {("mount", MOUNT), ("mount-images", MOUNT)}
    assert not found.newly_missing


def test_new_rows_are_owed_by_the_method_of_their_kind() -> None:
    found = compare({}, [listed(), listed(MOUNT), listed(SHEET)], KINDS, T0)
    methods = [owing.method for owing in found.owing]
    assert methods == ["document", "mount", "mount-images", "sheet"]
    assert {owing.revision for owing in found.owing} == {"s1"}
    assert not found.nothing


@pytest.mark.parametrize(
    ("kinds", "methods"),
    [
        (("sheet",), []),
        (("document",), ["document"]),
        (("mount",), ["mount"]),
        (("mount-image",), ["mount-images"]),
    ],
)
def test_unwanted_kinds_are_known_and_never_owed(kinds: tuple[Kind, ...], methods: list[str]) -> None:
    found = compare({}, [listed(), listed(MOUNT)], kinds, T0)
    assert [row.item for row in found.changed] == [DOCUMENT, MOUNT]
    assert [owing.method for owing in found.owing] == methods


def test_mount_whose_images_lag_behind_owes_only_the_images() -> None:
    found = compare({MOUNT: known(MOUNT, images_revision="s0")}, [listed(MOUNT)], KINDS, T0)
    assert [owing.method for owing in found.owing] == ["mount-images"]


def test_item_that_came_back_is_told_once_whether_missing_or_vanished() -> None:
    for before in (known(missing_since_at=T0 - 1), known(vanished=True), known(missing_since_at=T0, vanished=True)):
        assert compare({DOCUMENT: before}, [listed()], KINDS, T0).back == (DOCUMENT,)
    assert compare({DOCUMENT: known()}, [listed()], KINDS, T0).back == ()


def test_vanished_item_stays_gone_without_another_word() -> None:
    assert compare({DOCUMENT: known(vanished=True)}, [], KINDS, T0).nothing


def test_first_and_second_absence_are_told_apart() -> None:
    first, second = known(), known(MOUNT, missing_since_at=T0 - DAY)
    found = compare({DOCUMENT: first, MOUNT: second}, [], KINDS, T0)
    assert (found.newly_missing, found.still_missing) == ((first,), (second,))


def test_uploaded_bytes_come_with_the_row_and_cost_no_request() -> None:
    row = listed(upload=Upload("jpg", b"bytes"))
    found = compare({}, [row], KINDS, T0)
    assert (found.uploads, found.owing, found.changed) == ((row,), (), (row,))
    assert compare({DOCUMENT: known()}, [row], KINDS, T0).uploads == ()
    only_mounts: tuple[Kind, ...] = ("mount",)
    assert compare({}, [row], only_mounts, T0).uploads == ()


def test_url_of_another_program_is_pending_and_never_followed() -> None:
    found = compare({}, [listed(upload=Upload("jpg", None))], KINDS, T0)
    assert not found.owing
    assert not found.uploads
    assert len(found.changed) == 1


def test_row_whose_bytes_arrived_in_the_practice_is_owed_though_its_stamp_stands_still() -> None:
    before = known(archived_revision=None, pending=True)
    found = compare({DOCUMENT: before}, [listed()], KINDS, T0)
    assert [row.item for row in found.changed] == [DOCUMENT]
    assert [owing.method for owing in found.owing] == ["document"]


def test_upload_that_cannot_be_decoded_is_brought_by_a_placement() -> None:
    found = compare({}, [listed(upload=Upload("jpg", None, bad=True))], KINDS, T0)
    assert [owing.method for owing in found.owing] == ["document"]


# --- revisions


@given(stamps.filter(lambda stamp: stamp not in NO_STAMP), st.sampled_from(KINDS), st.text())
def test_a_stamp_is_the_revision_and_nothing_else_is(stamp: str, kind: Kind, text: str) -> None:
    assert revision(kind, stamp, {"Description": text}) == stamp


@pytest.mark.parametrize("stamp", NO_STAMP)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_stamp_every_named_field_makes_a_revision(kind: Kind, stamp: str) -> None:
    fields: dict[str, str | int | None] = dict.fromkeys(DIGESTED[kind], "x")
    plain = revision(kind, stamp, fields)
    assert plain.startswith("digest:")
    changed = {revision(kind, stamp, fields | {name: other}) for name in DIGESTED[kind] for other in ("y", None, 1)}
    assert len(changed) == 3 * len(DIGESTED[kind])
    assert plain not in changed


@pytest.mark.parametrize("kind", KINDS)
def test_the_servers_time_and_a_renamed_category_change_nothing(kind: Kind) -> None:
    moved = {"serverDateTime": "2026-11-21 10:00:00", "docCategory": "Renamed"}
    assert revision(kind, "", {"Note": "n"}) == revision(kind, "", {"Note": "n"} | moved)


def test_fields_do_not_run_into_each_other() -> None:
    one, other = {"Description": "ab", "Note": "c"}, {"Description": "a", "Note": "bc"}
    assert revision("document", "", one) != revision("document", "", other)
    assert revision("document", "", {"Note": None}) != revision("document", "", {"Note": "null"})


def test_row_that_overlaps_two_pages_may_differ_in_the_servers_time_only() -> None:
    row = listed(serverDateTime="10:00:00", Note="n")
    assert same_row(row, replace(row, fields={"serverDateTime": "10:00:01", "Note": "n"}))
    assert not same_row(row, replace(row, fields={"serverDateTime": "10:00:00", "Note": "m"}))
    assert not same_row(row, replace(row, fields={"Note": "n", "ImgType": "Photo"}))
    assert not same_row(row, replace(row, item=MOUNT))
    assert not same_row(row, replace(row, upload=Upload("jpg", b"x")))


# --- pages


@pytest.mark.parametrize(
    ("rows", "limit", "last"),
    [
        (0, 100, True),
        (99, 100, True),
        (100, 100, False),
        (101, 100, False),  # an office that ignores the Limit: more may follow
        (99, 1000, True),
        (100, 1000, False),  # an office that caps every answer at 100, whatever Limit was sent
        (101, 1000, True),
        (200, 1000, True),
        (999, 1000, True),
        (1000, 1000, False),
        (9, 10, True),
        (10, 10, False),
        (1, 2, True),  # the overlapping row alone
        (2, 2, False),
    ],
)
def test_a_page_ends_the_listing_only_below_its_limit_and_never_at_a_hundred(rows: int, limit: int, last: bool) -> None:
    assert last_page(rows, limit) is last


# --- times


@pytest.mark.parametrize(
    ("stamp", "wait"),
    [
        ("2026-11-21 10:00:00", 3.0),
        ("2026-11-21 09:59:58.500", 1.5),
        ("2026-11-21 09:59:57", 0.0),
        ("2026-11-20 10:00:00", 0.0),
        ("2026-11-21 10:00:01", 0.0),  # of the future: passes at once
        ("0001-01-01 00:00:00", 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("2026-11-21 10:00:00+00:00", 0.0),  # an offset cannot be compared with a local time
    ],
)
def test_a_young_rows_file_is_waited_for_by_the_servers_own_clock(stamp: str, wait: float) -> None:
    assert settle_wait(stamp, "2026-11-21 10:00:00") == wait
    row = replace(listed(stamp=stamp), server_time="2026-11-21 10:00:00")
    assert [owing.not_before for owing in compare({}, [row], KINDS, T0).owing] == [T0 + wait]


@given(stamps, stamps)
def test_no_stamp_whatever_it_says_holds_a_file_back_longer_than_three_seconds(stamp: str, server_time: str) -> None:
    assert 0.0 <= settle_wait(stamp, server_time) <= 3.0


def test_age_of_a_stamp_is_told_in_office_time_also_in_the_hour_that_comes_twice() -> None:
    assert stamp_age("2026-11-01 01:59:50", "2026-11-01 01:00:10") == -3580.0
    assert stamp_age("2026-11-21 09:00:00", "2026-11-21 10:00:00") == 3600.0
    assert stamp_age("", "2026-11-21 10:00:00") is None


@given(
    st.datetimes().map(str) | stamps,
    st.sampled_from(["America/Chicago", "Pacific/Kiritimati", "Asia/Kathmandu", "UTC"]),
)
def test_any_text_is_a_local_time_or_none(text: str, zone: str) -> None:
    found = local_time(text, ZoneInfo(zone))
    assert found is None or isinstance(found, float)


def test_local_time_is_read_in_the_practices_zone() -> None:
    assert local_time("2026-11-21 10:00:00", ZoneInfo("America/Chicago")) == T0_CHICAGO
    assert local_time("not a time", ZoneInfo("UTC")) is None


T0_CHICAGO = dt.datetime(2026, 11, 21, 16, tzinfo=dt.UTC).timestamp()


# --- fetched again


@pytest.mark.parametrize(
    ("age_days", "next_days"), [(0, 1), (0.9, 1), (1, 3), (2.9, 3), (3, 7), (6.9, 7), (7, 30), (29.9, 30)]
)
def test_mounts_are_fetched_again_at_one_three_seven_and_thirty_days(age_days: float, next_days: float) -> None:
    assert refetch_at("mount", 15, T0 - age_days * DAY, None, T0) == T0 + (next_days - age_days) * DAY


@given(st.integers(1, 2**62), st.none() | st.floats(-1e11, T0 - 30 * DAY))
def test_older_mounts_are_fetched_again_within_ninety_days_spread_by_number(num: int, created_at: float | None) -> None:
    wait = (refetch_at("mount", num, created_at, None, T0) or 0.0) - T0
    assert 81 * DAY - 1 <= wait <= MOUNT_EVERY


def test_mount_with_a_date_of_the_future_is_not_forgotten_until_then() -> None:
    far = local_time("9998-12-31 00:00:00", ZoneInfo("UTC"))
    assert (refetch_at("mount", 15, far, None, T0) or 0.0) <= T0 + MOUNT_EVERY


def test_what_was_archived_together_is_not_fetched_again_together() -> None:
    times = sorted(refetch_at("mount", num, None, None, T0) or 0.0 for num in range(1, 1001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[-1] - times[0] > 8 * DAY
    assert max(gaps) < DAY / 4


@given(st.integers(0, 2**62), st.floats(1.0, 1e8))
def test_spread_is_a_fixed_point_inside_its_width(num: int, width: float) -> None:
    assert 0.0 <= spread(num, width) < width
    assert spread(num, width) == spread(num, width)


@pytest.mark.parametrize(
    ("age", "young"), [(0.0, True), (599.9, True), (600.0, False), (-1.0, False), (None, False), (1e9, False)]
)
def test_version_placed_while_its_stamp_was_young_is_fetched_once_more_soon(age: float | None, young: bool) -> None:
    wait = (refetch_at("document", 34, T0, age, T0) or 0.0) - T0
    assert wait == 600.0 if young else DOCUMENT_EVERY <= wait < DOCUMENT_EVERY + 7 * DAY


@pytest.mark.parametrize("kind", ["sheet", "mount-image", "thumbnail"])
def test_sheets_images_and_thumbnails_are_not_fetched_again_by_age(kind: Kind) -> None:
    assert refetch_at(kind, 45, T0, 1.0, T0) is None


# --- vanishing


@pytest.mark.parametrize(
    ("changes", "decides"),
    [
        ({"missing_since_at": T0 - DAY}, True),
        ({"missing_since_at": T0 - DAY + 1}, False),
        ({"missing_since_at": None}, False),
        ({"missing_since_at": T0 + 1}, False),  # the clock was put back
        ({"missing_since_at": T0 - DAY, "held_by": 7}, False),
        ({"missing_since_at": T0 - DAY, "held_by": -7}, False),  # rejected: kept until seen again
        ({"missing_since_at": T0, "not_found": True, "archived_revision": None}, True),
        ({"missing_since_at": T0, "not_found": True}, False),  # it has a version: the ordinary rule
        ({"missing_since_at": T0, "not_found": True, "archived_revision": None, "held_by": 7}, False),
        ({"missing_since_at": T0, "archived_revision": None}, False),
    ],
)
def test_an_absence_decides_when_it_lasted_and_nothing_holds_it(changes: dict[str, Any], decides: bool) -> None:
    assert ripe(known(**changes), T0, DAY) is decides


def test_item_that_the_office_never_found_vanishes_with_the_next_listing_that_lacks_it(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    num = one.practice.add_document(one.other, "png")
    world.run(hours=3, until=lambda: world.has(one.other, "document", num))
    one.practice.delete_document(num)
    world.run(hours=1, until=lambda: world.item(one.other, "document", num)["not_found"])
    assert world.state(one.other, "document", num) == "owed"
    world.sweep()
    state = world.state(one.other, "document", num)
    world.stop()
    assert state == "vanished"


def test_image_that_is_put_back_into_its_mount_is_not_vanished_any_more(tmp_path: Path) -> None:
    one = small()
    world = World.start(tmp_path, practice=one.practice, sync={"vanish_after": "1h"})
    world.run()
    num = int(one.practice.mount_images(one.mount)[0]["DocNum"])
    one.practice.out_of_mount(num)
    one.practice.change_mount(one.mount)
    world.run(hours=30, until=lambda: world.state(one.patient, "mount-image", num) == "vanished")
    one.practice.move_into_mount(num, one.mount)
    one.practice.change_mount(one.mount)
    world.sweep()
    state = world.state(one.patient, "mount-image", num)
    world.stop()
    assert state == "archived"
