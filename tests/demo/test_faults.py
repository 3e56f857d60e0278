import json
from typing import Any

import pytest

from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from tests.demo.conftest import Desk

PLACE = "/documents/DownloadSftp"


@pytest.mark.parametrize(
    ("kind", "details", "status", "words"),
    [
        ("econnector_down", {}, 400, "The office's eConnector is not running"),
        ("two_econnectors", {}, 400, "Two eConnectors"),
        ("key_revoked", {}, 401, "disabled"),
        ("too_many", {"seconds": 7}, 429, "Too many requests"),
        ("status", {"status": 503, "text": "down"}, 503, "down"),
        ("html", {}, 200, "<html>"),
        ("wrong_shape", {}, 200, "Message"),
        ("huge", {"size": 50_000}, 200, "xxxx"),
        ("redirect", {"text": "https://example.org/login"}, 302, ""),
        ("gateway_timeout", {}, 504, "504"),
    ],
)
def test_a_fault_strikes_once_and_is_over(
    desk: Desk, kind: Any, details: dict[str, Any], status: int, words: str
) -> None:
    fault = desk.office.faults.add(kind, **details)
    response = desk.ask("GET", "/documents", PatNum=1)
    assert response.status == status
    assert words in response.body.decode()
    assert desk.ask("GET", "/documents", PatNum=1).status == 200
    assert fault.fired == 1


def test_a_fault_strikes_only_what_it_is_meant_for(desk: Desk) -> None:
    first, second = desk.practice.add_document(1), desk.practice.add_document(1)
    desk.office.faults.add("econnector_down", path=PLACE, params={"DocNum": second}, times=None)
    assert desk.place(DocNum=first).status == 201
    assert desk.place(DocNum=second).status == 400
    assert desk.listed(1)
    desk.office.faults.clear()
    assert desk.place(DocNum=second).status == 201


def test_chance_is_drawn_by_seed_and_skips_are_spared(desk: Desk) -> None:
    desk.office.faults.add("status", probability=0.5, times=None)
    struck = [desk.ask("GET", "/documents", PatNum=1).status for _ in range(40)]
    assert 5 < struck.count(500) < 35
    desk.office.faults.clear()
    desk.office.faults.add("status", skip=2)
    assert [desk.ask("GET", "/documents", PatNum=1).status for _ in range(4)] == [200, 200, 500, 200]


@pytest.mark.parametrize("kind", ["gateway_timeout", "cut"])
def test_work_that_breaks_before_during_or_after_leaves_nothing_half_or_all(desk: Desk, kind: Any) -> None:
    doc = desk.practice.add_document(1)
    whole = desk.practice.truth()[1].documents[doc]
    desk.office.faults.add(kind, when="before")
    desk.place(to="a.jpg", DocNum=doc)
    assert "a.jpg" not in desk.drop.files
    desk.office.faults.add(kind, when="after", seconds=60)
    before = desk.clock.now()
    response = desk.place(to="a.jpg", DocNum=doc)
    assert response.status == 504 or (response.effect is not None and response.effect.kind == "cut")
    assert desk.clock.now() == before + 60
    assert desk.drop.files["a.jpg"].data == whole
    desk.office.faults.add(kind, when="during", late=30)
    desk.place(to="b.jpg", DocNum=doc)
    assert desk.drop.files["b.jpg"].data == whole[: len(whole) // 2]
    desk.clock.advance(31)
    assert desk.drop.files["b.jpg"].data == whole


def test_placements_that_answer_201_and_lie(desk: Desk) -> None:
    doc, other = desk.practice.add_document(1), desk.practice.add_document(2)
    truth = desk.practice.truth()
    placed: dict[str, bytes | None] = {}
    kinds: tuple[Any, ...] = ("zero_byte", "partial", "wrong_bytes", "no_file", "late_file")
    for kind in kinds:
        desk.office.faults.add(kind, late=10)
        assert desk.place(to=f"{kind}.jpg", DocNum=doc).status == 201
        placed[kind] = desk.drop.files[f"{kind}.jpg"].data if f"{kind}.jpg" in desk.drop.files else None
    assert placed["zero_byte"] == b""
    assert placed["partial"] == truth[1].documents[doc][: len(truth[1].documents[doc]) // 2]
    assert placed["wrong_bytes"] == truth[2].documents[other]
    assert placed["no_file"] is placed["late_file"] is None
    desk.clock.advance(11)
    assert desk.drop.files["late_file.jpg"].data == truth[1].documents[doc]
    desk.office.faults.add("location", text="elsewhere/x.jpg")
    assert desk.place(DocNum=doc).headers["location"] == "elsewhere/x.jpg"
    desk.office.faults.add("site_error")
    assert desk.place(DocNum=doc).status == 400


def test_listings_that_lie(desk: Desk) -> None:
    for _ in range(5):
        desk.practice.add_document(1)
    numbers = [row["DocNum"] for row in desk.listed(1)]
    faults = desk.office.faults
    faults.add("foreign_row")
    assert desk.listed(1)[-1]["PatNum"] == "2"
    faults.add("truncated", size=2)
    assert len(desk.listed(1)) == 2
    faults.add("empty")
    assert desk.listed(1) == []
    faults.add("duplicated")
    assert [row["DocNum"] for row in desk.listed(1)] == [*numbers, numbers[-1]]
    faults.add("shifted")
    assert [row["DocNum"] for row in desk.get("/documents", PatNum=1, Offset=2)] == numbers[3:]
    assert [row["DocNum"] for row in desk.listed(1)] == numbers


def test_a_row_can_be_there_before_its_file(desk: Desk) -> None:
    doc = desk.practice.add_document(1, file_after=5)
    assert len(desk.listed(1)) == 1
    assert desk.place(DocNum=doc).status == 400
    desk.clock.advance(5)
    assert desk.place(DocNum=doc).status == 201


def test_another_database_can_come_behind_the_key(desk: Desk) -> None:
    other = Practice(SimulatedClock(desk.clock.now()), seed=9)
    other.add_patient()
    other.add_document(1)
    desk.office.practice = other
    assert len(desk.listed(1)) == 1


def test_an_unknown_fault_is_refused(desk: Desk) -> None:
    unknown: Any = "flood"
    with pytest.raises(ValueError, match="no such fault"):
        desk.office.faults.add(unknown)


def test_slow_writing_takes_the_offices_time(desk: Desk) -> None:
    doc = desk.practice.add_document(1, size=10_000)
    desk.office.chunk_bytes, desk.office.chunk_seconds = 1_000, 2.0
    before = desk.clock.now()
    desk.place(DocNum=doc)
    assert desk.clock.now() - before > 15
    desk.office.faults.add("drip", size=10, seconds=1)
    dripping = desk.ask("GET", "/documents", PatNum=1)
    assert dripping.effect is not None
    assert json.loads(dripping.body)
