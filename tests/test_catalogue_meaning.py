"""The catalogue of faults, part B, what no other test shows: whole answers that say something else than they should."""

from __future__ import annotations

import json
import socket
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from syncd.api import OpenDentalApi
from syncd.demo.build import Past
from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from syncd.demo.wire import Request, Response
from syncd.errors import ListingError
from syncd.listing import join
from syncd.model import Item, Listed, Page
from syncd.naming import parse_id
from syncd.scrub import reindex
from syncd.search import Filters
from syncd.wiring import open_archive
from tests.small import DAY, HOUR, serving, small, troubles
from tests.wire import api_at, listening, read_request
from tests.world import START, World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

Json = Any  # whatever an office may send
Change = Callable[[Json, Request], Json]
LARGEST = 2**63 - 1
DOCUMENT: dict[str, Json] = {
    "DocNum": 34, "MountNum": 0, "filePath": "\\\\server\\S\\scan.jpg", "Description": "Scan", "PatNum": "101",
    "Note": "", "DateCreated": "2021-04-08 08:12:21", "docCategory": "Lab", "DocCategory": 14, "ToothNumbers": "1,2",
    "ProvNum": "0", "PrintHeading": "false", "DateTStamp": "2021-04-18 11:45:01", "serverDateTime": "",
}  # fmt: skip
SHEET: dict[str, Json] = {
    "SheetNum": 45, "SheetType": "PatientLetter", "PatNum": 101, "DateTimeSheet": "2021-11-16 02:45:38",
    "InternalNote": "", "Description": "Letter", "IsWebForm": "false", "SheetDefNum": 25, "DocNum": 0,
    "ClinicNum": 0, "DateTSheetEdited": "2022-01-23 08:33:02",
}  # fmt: skip
REQUIRED = {
    "documents": ("PatNum", "DocNum", "MountNum", "DateCreated", "DateTStamp"),
    "sheets": ("PatNum", "SheetNum", "DateTimeSheet", "DateTSheetEdited"),
}
NUMBERS = frozenset(("DocNum", "MountNum", "PatNum", "DocCategory", "ProvNum", "SheetNum", "SheetDefNum", "ClinicNum"))


# --- pages that may say anything, over real connections


class Liar:
    """An office that answers 200 with whatever `body` is; `api` is the real door to it."""

    def __init__(self) -> None:
        self.body = b""
        self.api: OpenDentalApi

    def talk(self, link: socket.socket) -> None:
        """Answer one request."""
        read_request(link)
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(self.body), self.body))

    def page(self, body: bytes, name: str = "documents") -> Page:
        """What the door makes of this answer to the question for patient 101's list."""
        self.body = body
        ask = self.api.list_documents if name == "documents" else self.api.list_sheets
        return ask(101, 0, 100)


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    lying = Liar()
    with listening(lying.talk) as port:
        lying.api = api_at(f"http://127.0.0.1:{port}/api/v1")
        yield lying


def near(number: int) -> st.SearchStrategy[Json]:
    """Values that are, or look like, a number."""
    forms = (number, str(number), float(number), f" {number}", f"0{number}", f"{number}.0", f"{number}e0", -number)
    return st.sampled_from((*forms, True, False, 0, "0", "", None, LARGEST, 2**63, 10**30, "٣", str(2**63), [number]))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
DROPPED = object()


@st.composite
def changed(draw: st.DrawFn, row: dict[str, Json]) -> dict[str, Json]:
    """The row with up to three fields that lack, lie or are unknown."""
    made = dict(row)
    for name in draw(st.lists(st.sampled_from([*row, "Unknown"]), max_size=3)):
        plain = near(int(row[name])) if name in NUMBERS & row.keys() else st.text()
        value = draw(st.one_of(plain, ANYTHING, st.just(DROPPED)))
        made[name] = value
        if value is DROPPED:
            del made[name]
    return made


def whole_number(value: Json) -> int | None:
    """What a field may mean: a whole number from 0 on, or its plain digits; None for blanks. ValueError for others."""
    if value is None or value == "":
        return None
    if type(value) is str and value.isascii() and value.isdigit() and str(int(value)) == value:
        value = int(value)
    if type(value) is int and 0 <= value <= LARGEST:
        return value
    raise ValueError(value)


def told_by(row: Json, name: str) -> Item:
    """The item that a row of patient 101 names. ValueError where the row is not to be believed."""
    if type(row) is not dict or any(field not in row for field in REQUIRED[name] if field != "DateTStamp"):
        raise ValueError("a field is missing")
    known = DOCUMENT.keys() if name == "documents" else SHEET.keys()
    numbers = {field: whole_number(row[field]) or 0 for field in NUMBERS & known & row.keys()}
    if any(type(row[field]) not in (str, type(None)) for field in known - NUMBERS & row.keys()):
        raise ValueError("a text is none")
    if numbers["PatNum"] != 101:
        raise ValueError("of another patient")
    if name == "sheets" and numbers["SheetNum"]:
        return Item(101, "sheet", numbers["SheetNum"])
    if name == "sheets" or bool(numbers["DocNum"]) == bool(numbers["MountNum"]):
        raise ValueError("neither one nor the other")
    if numbers["DocNum"] and "DateTStamp" not in row:
        raise ValueError("a document without a stamp")
    kind = "document" if numbers["DocNum"] else "mount"
    return Item(101, kind, numbers["DocNum"] or numbers["MountNum"])  # type: ignore[arg-type]  # one of two kinds


def check_page(liar: Liar, name: str, body: Json) -> None:
    """The page is refused, or it is what an independent reading of its rows says."""
    sent = json.dumps(body).encode()
    try:
        expected = [told_by(row, name) for row in body] if type(body) is list else None
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(ListingError):
            liar.page(sent, name)
        return
    rows = liar.page(sent, name).rows
    assert [row.item for row in rows] == expected
    assert all(type(value) in (str, int, type(None)) for row in rows for value in row.fields.values())
    json.dumps([dict(row.fields) for row in rows], ensure_ascii=False).encode()


@settings(max_examples=400)
@given(body=st.lists(changed(DOCUMENT), max_size=3))
def test_page_of_documents_is_believed_exactly_where_each_row_is_proven(liar: Liar, body: Json) -> None:
    check_page(liar, "documents", body)


@settings(max_examples=300)
@given(body=st.lists(changed(SHEET), max_size=3))
def test_page_of_sheets_is_believed_exactly_where_each_row_is_proven(liar: Liar, body: Json) -> None:
    check_page(liar, "sheets", body)


@settings(max_examples=300)
@given(body=ANYTHING | st.lists(ANYTHING, max_size=3), name=st.sampled_from(("documents", "sheets")))
def test_any_other_json_is_no_page(liar: Liar, body: Json, name: str) -> None:
    check_page(liar, name, body)


@settings(max_examples=200)
@given(cut=st.integers(0, 700), junk=st.binary(max_size=8), keep=st.booleans())
def test_page_that_is_cut_or_followed_by_anything_is_refused(liar: Liar, cut: int, junk: bytes, keep: bool) -> None:
    whole = json.dumps([DOCUMENT, {**DOCUMENT, "DocNum": 35}]).encode()
    body = whole + junk if keep else whole[:cut] + junk
    with suppress(ValueError):
        if json.loads(body.decode("utf-8-sig")) == json.loads(whole):
            return  # white space was added
        if isinstance(json.loads(body.decode("utf-8-sig")), list):
            return  # by chance another list
    with pytest.raises(ListingError):
        liar.page(body)


def test_megabytes_in_a_note_are_read_in_bounded_memory(liar: Liar) -> None:
    note = "_rawBase64_:.jpg_" + "QUJD" * 2_000_000
    body = json.dumps([{**DOCUMENT, "Note": note}]).encode()
    tracemalloc.start()
    try:
        (row,) = liar.page(body).rows
        assert tracemalloc.get_traced_memory()[1] < 12 * len(note)
    finally:
        tracemalloc.stop()
    assert row.upload is not None
    assert row.upload.content == b"ABC" * 2_000_000
    assert len(json.dumps(dict(row.fields))) < 1000


# --- pages together


def listed(num: int, stamp: str) -> Listed:
    return Listed(Item(101, "document", num), stamp, stamp, "", "", None, {"DateTStamp": stamp})


@settings(max_examples=300)
@given(st.lists(st.lists(st.builds(listed, st.integers(1, 12), st.sampled_from("ab")), min_size=1), min_size=1))
def test_id_that_comes_twice_refuses_the_listing_whether_its_rows_agree_or_not(pages: list[list[Listed]]) -> None:
    rows: Sequence[Listed] = ()
    read: list[int] = []
    for page in pages:
        fits = not rows or page[0] == rows[-1]
        read += [row.item.num for row in page[bool(rows) :]]
        if not fits or len(set(read)) != len(read):
            with pytest.raises(ListingError):
                join(rows, page)
            return
        rows = join(rows, page)
        assert [row.item.num for row in rows] == read


# --- an office that lies for some hours


def rewriting(world: World, path: str, change: Change) -> Callable[[], None]:
    """From now on the office's good answers on `path` are changed on their way; returns what ends it."""
    plain = world.office.handle

    def handle(request: Request) -> Response:
        answer = plain(request)
        if request.path.rstrip("0123456789") != path or answer.status not in (200, 201):
            return answer
        return replace(answer, body=json.dumps(change(json.loads(answer.body), request)).encode())

    setattr(world.office, "handle", handle)  # noqa: B010 - the type checker knows no method that is replaced
    return lambda: setattr(world.office, "handle", plain)


LIES: dict[str, Callable[[list[Json], int], Json]] = {
    "rows are missing": lambda rows, at: rows[: at % (len(rows) + 1)],
    "one is missing": lambda rows, at: rows[: at % len(rows)] + rows[at % len(rows) + 1 :] if rows else rows,
    "one comes twice": lambda rows, at: rows + rows[at % len(rows) :][:1] if rows else rows,
    "another order": lambda rows, at: rows[at % len(rows) :] + rows[: at % len(rows)] if rows else rows,
    "another patient": lambda rows, at: [*rows, {**rows[-1], "PatNum": str(at + 500)}] if rows else rows,
    "another number": lambda rows, at: [{**row, "DocNum": "x"} for row in rows],
    "no rows": lambda rows, at: [],
    "no list": lambda rows, at: {"rows": rows},
    "another stamp": lambda rows, at: [
        {k: f"2026-03-10 09:00:{at % 60:02}" if k.startswith("DateTS") and v else v for k, v in row.items()}
        for row in rows
    ],
}


class LyingOffice(RuleBasedStateMachine):
    """Staff work, the office lies for an hour now and then; no lie makes anything false, lost or gone."""

    @initialize()
    def begin(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.one = small(documents=6)
        self.world = World.start(Path(self._folder.name), practice=self.one.practice, interval=180.0, nap=900.0)
        self.world.run(hours=2)

    @rule(extension=st.sampled_from(("jpg", "txt")), other=st.booleans())
    def add(self, extension: str, other: bool) -> None:
        self.one.practice.add_document(self.one.other if other else self.one.patient, extension)

    @rule()
    def replace(self) -> None:
        self.one.practice.replace_bytes(self.one.document)

    @rule(lie=st.sampled_from(sorted(LIES)), at=st.integers(0, 9), path=st.sampled_from(("/documents", "/sheets")))
    def lie(self, lie: str, at: int, path: str) -> None:
        end = rewriting(self.world, path, lambda rows, _: LIES[lie](rows, at) if isinstance(rows, list) else rows)
        self.world.run(hours=1)
        end()

    @rule()
    def work(self) -> None:
        self.world.run(hours=1)

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def nothing_is_false_and_nothing_is_gone(self) -> None:
        self.world.check_safe()
        assert self.world.index.value("SELECT count(*) FROM item WHERE vanished_at IS NOT NULL") == 0

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run(hours=4)
            self.world.check()
            self.world.stop()
            self._folder.cleanup()


TestLyingOffice = LyingOffice.TestCase
TestLyingOffice.settings = settings(max_examples=8, stateful_step_count=8, suppress_health_check=[HealthCheck.too_slow])


# --- one lie at a time, in simulated time


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World.start(tmp_path, interval=30.0, nap=600.0)
    yield world
    world.stop()


def missing(world: World) -> int:
    return int(world.index.value("SELECT count(*) FROM item WHERE missing_since_at IS NOT NULL"))


@pytest.mark.parametrize("num", [2**31, 10**18, LARGEST])
def test_largest_keys_are_archived_and_found_again_in_the_archive(world: World, num: int) -> None:
    pat = world.practice.add_patient(PatNum=num)
    world.practice.add_document(pat, "txt", DocNum=num)
    world.run(hours=2)
    world.check()
    assert parse_id(f"{num}/document-{num}") == (num, "document", num)
    before = [row["sha256"] for row in world.catalog().find(Filters())]
    world.stop()
    (world.settings.state_path / "index.db").unlink()
    reindex(world.settings, open_archive(world.settings), START)
    world.restart()
    assert [row["sha256"] for row in world.catalog().find(Filters())] == before


def test_stamp_that_goes_back_when_summer_time_ends_is_a_change(tmp_path: Path) -> None:
    clock = SimulatedClock(1_793_515_800.0)  # 1 November 2026, 6:50 UTC: ten to two in Chicago, for the first time
    practice = Practice(clock, "America/Chicago", seed=5)
    world = World.start(tmp_path, practice=practice, interval=30.0)
    pat = practice.add_patient()
    doc = practice.add_document(pat)
    world.run(seconds=1200)
    first = world.item(pat, "document", doc)["archived_revision"]
    practice.replace_bytes(doc)
    assert practice.rows("SELECT DateTStamp FROM document WHERE DocNum = ?", doc)[0]["DateTStamp"] < first
    world.run(hours=3)
    world.check()
    assert len(world.media(pat, "document", doc)) == 2


def test_stamp_that_moves_at_each_poll_makes_no_version_and_at_most_49_placements_a_day(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=6.0, nap=300.0)
    pat = world.practice.add_patient()
    doc, other = world.practice.add_document(pat, "txt"), world.practice.add_document(pat, "txt")
    world.run(hours=2)
    polls = iter(range(100_000))

    def moved(rows: Json, _: Request) -> Json:
        stamp = f"2026-01-01 {next(polls) % 24:02}:{next(polls) % 60:02}:{next(polls) % 60:02}"
        return [{**row, "DateTStamp": stamp} if row["DocNum"] == doc else row for row in rows]

    end, sent = rewriting(world, "/documents", moved), len(world.office.arrivals)
    world.run(hours=24)
    assert len(world.sent("/documents", since=sent)) > 150
    assert 24 <= len(world.sent("/documents/DownloadSftp", since=sent, DocNum=doc)) <= 49
    assert world.sent("/documents/DownloadSftp", since=sent, DocNum=other) == []
    assert len(world.media(pat, "document", doc)) == 1
    end()
    world.run(hours=2)
    world.check()


def test_megabytes_in_a_note_go_into_the_archive_and_not_into_the_index(world: World) -> None:
    pat, content = world.practice.add_patient(), bytes(range(256)) * 20_000
    doc = world.practice.add_raw_document(pat, content, ".bin")
    world.run(until=lambda: world.media(pat, "document", doc))
    world.sweep()
    world.check()
    assert world.media(pat, "document", doc) == [content]
    assert sum(path.stat().st_size for path in world.settings.state_path.iterdir()) < 2_000_000
    assert len(json.dumps(world.log.lines)) < 100_000


@pytest.mark.parametrize("method", ["document", "mount", "sheet"])
def test_bytes_of_another_document_are_a_version_that_a_later_look_replaces(tmp_path: Path, method: str) -> None:
    """Nothing outside can prove which document bytes are of; what was fetched wrongly is mended by fetching again.

    A sheet, rendered anew at each call, is mended with its next revision only.
    """
    one = small()
    world = World.start(tmp_path, practice=one.practice, interval=60.0, nap=3600.0)
    fault = world.office.faults.add("wrong_bytes", **one.request(method))
    world.run(hours=3)
    assert fault.fired == 1
    num = {"document": one.document, "mount": one.mount, "sheet": one.sheet}[method]
    (wrong,) = world.media(one.patient, method, num)
    if method == "sheet":
        one.practice.edit_sheet(one.sheet)
    for _ in range({"document": 190, "mount": 95, "sheet": 1}[method]):
        world.clock.advance(23 * HOUR)
        world.run(hours=1)
    found = world.findings()
    assert found.lacking == []
    assert all("never was that" in line for line in found.wrong)
    assert len(found.wrong) == 1
    first, right = world.media(one.patient, method, num)
    assert first == wrong != right


def test_lists_of_two_patients_that_are_swapped_are_refused(tmp_path: Path) -> None:
    world = World.start(tmp_path, 2, past=Past(documents=5, mounts=0, deleted=0.0), interval=30.0)
    last: dict[str, Json] = {}
    rewriting(world, "/documents", lambda rows, asked: last.setdefault(asked.query["PatNum"], rows))
    world.run(hours=2)
    others = {"1": "2", "2": "1"}
    end = rewriting(world, "/documents", lambda _, asked: last[others[asked.query["PatNum"]]])
    world.run(hours=2)
    assert len(world.log.events("listing_refused")) >= 2
    assert missing(world) == 0
    end()
    world.run(hours=2)
    world.check()


def images_archived(world: World, pat: int) -> list[Json]:
    return world.index.rows("SELECT num FROM version WHERE kind = 'mount-image' AND pat_num = ?", pat)


def test_answers_about_two_mounts_that_are_swapped_misfile_nothing(tmp_path: Path) -> None:
    one = small()
    with one.practice.as_of(START - 30 * DAY):
        other = one.practice.add_mount(one.other, 2)
    one.practice.db.execute("UPDATE document SET FileName = 'of-' || MountItemNum || FileName WHERE MountItemNum > 0")
    world = serving(tmp_path, one)
    images = one.practice.mount_images(other)

    def swapped(rows: Json, request: Request) -> Json:
        if request.fields()["MountNum"] != one.mount:
            return rows
        return [{"DocNum": image["DocNum"], "FileName": image["FileName"]} for image in images]

    end = rewriting(world, "/documents/DownloadMount", swapped)
    world.run(hours=3)
    world.check_safe()
    assert not {row["num"] for row in images_archived(world, one.patient)} & {image["DocNum"] for image in images}
    end()
    one.practice.change_mount(one.mount)
    world.run(hours=4)
    world.check()
    assert {world.item(one.other, "mount-image", image["DocNum"])["mount_num"] for image in images} == {other}


@pytest.mark.parametrize(
    ("path", "name"), [(f"/{table}", name) for table, names in REQUIRED.items() for name in names]
    + [("/patients/Simple", "PatNum")],
)  # fmt: skip
def test_key_that_an_upgrade_renamed_is_a_state_within_the_hour_and_makes_nothing_vanish(
    tmp_path: Path, path: str, name: str
) -> None:
    world = World.start(tmp_path, 6, past=Past(documents=2, mounts=1, deleted=0.0), interval=60.0, nap=1800.0)
    world.run(hours=2)
    rows = world.index.rows("SELECT count(*) FROM item")
    end = rewriting(world, path, lambda rows, _: [{k.replace(name, f"{name}2"): v for k, v in r.items()} for r in rows])
    world.run(hours=1)
    assert "bad_answers" in troubles(world).values()
    world.run(hours=2)
    assert (world.index.rows("SELECT count(*) FROM item"), missing(world)) == (rows, 0)
    end()
    world.run(hours=3)
    world.check()
    assert troubles(world) == {}


@pytest.mark.parametrize("said", ["1999-12-31 23:59:59", "2099-01-01 00:00:00", "", "noon", "as the stamp says"])
def test_clock_of_the_office_decides_nothing(world: World, said: str) -> None:
    stamp = "DateTStamp" if said.startswith("as") else ""
    rewriting(world, "/documents", lambda rows, _: [{**row, "serverDateTime": row.get(stamp, said)} for row in rows])
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(hours=2)
    world.check()
    world.practice.replace_bytes(doc)
    world.run(hours=3)
    world.check()
    sent = len(world.office.arrivals)
    world.run(hours=24)
    assert world.placements(since=sent) == []
    assert world.index.value("SELECT min(polled_at) FROM list") > world.clock.now() - 2 * HOUR


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.dictionaries(st.text(min_size=1, max_size=5).map(lambda name: f"x{name}"), ANYTHING, max_size=4))
def test_fields_that_nobody_knows_change_nothing(liar: Liar, extra: dict[str, Json]) -> None:
    plain = liar.page(json.dumps([DOCUMENT]).encode())
    assert liar.page(json.dumps([{**extra, **DOCUMENT}]).encode()) == plain
