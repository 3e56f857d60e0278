"""Who is told what, when: once, once more a day, and of the end; not of every hiccup, and not all night."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.notices import AGAIN, GOOD_FOR, MANY, URGENT, Memory, Notice, look, unsent
from syncd.report import DAY, HOUR, Report

T0 = 1_775_000_000.0
MINUTE = 60.0
AFTER = 1800.0
BAD = ("blocked", "key_refused")
GOOD = ("ok", "ok")
FAILING = ("degraded", "items_failing")


class Watch:
    """A status a minute, and what is told."""

    def __init__(self) -> None:
        self.now, self.memory = T0, Memory()
        self.told: list[tuple[float, Notice]] = []

    def see(self, said: tuple[str, str], seconds: float = MINUTE, open_: bool = True) -> list[str]:
        """So long this status; the kinds of notices that came."""
        before, end = len(self.told), self.now + seconds
        while self.now < end:
            self.now += MINUTE
            self.memory = Memory.from_json(self.memory.to_json())  # each minute another process
            self.memory, notice = look(self.memory, status(*said, self.now), self.now, AFTER, open_)
            if notice is not None:
                self.told.append((self.now, notice))
        return [str(notice["kind"]) for _, notice in self.told[before:]]


def status(state: str, reason: str, now: float = T0) -> Report:
    named = {"practice": "main", "at": str(now), "who": "integrator", "message": "put the new key in"}
    return {**named, "state": state, "reason": reason, "owed": 3}


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_nothing_is_told_of_what_is_over_before_its_time(watch: Watch) -> None:
    assert watch.see(GOOD, HOUR) == watch.see(BAD, AFTER - MINUTE) == watch.see(GOOD, DAY) == []


def test_trouble_is_told_once_then_once_a_day_and_then_its_end(watch: Watch) -> None:
    assert watch.see(BAD, HOUR) == ["trouble"]
    assert watch.told[0][0] == pytest.approx(T0 + AFTER, abs=2 * MINUTE)
    assert watch.see(BAD, 2 * DAY) == ["reminder", "reminder"]
    assert watch.see(GOOD, GOOD_FOR) == []
    assert watch.see(GOOD, HOUR) == ["recovered"]
    assert watch.see(GOOD, 3 * DAY) == []


def test_notice_says_what_to_do_and_the_end_how_long_it_took(watch: Watch) -> None:
    watch.see(BAD, 3 * HOUR)
    watch.see(("catching_up", "ok"), 3 * HOUR)
    (_, trouble), (_, end) = watch.told
    assert trouble["line"] == "syncd main: key_refused: put the new key in"
    assert (trouble["who"], trouble["reason"], trouble["schema_version"]) == ("integrator", "key_refused", 1)
    assert (end["reasons"], end["lasted_seconds"]) == (["key_refused"], 3 * HOUR)
    assert end["line"] == "syncd main: it works again, after 3 h (key_refused)"


def test_notice_that_reached_nobody_is_told_again_after_a_quarter_of_an_hour(watch: Watch) -> None:
    assert watch.see(BAD, HOUR) == ["trouble"]
    watch.memory = unsent(watch.memory, "key_refused", watch.now)
    assert watch.see(BAD, AGAIN - MINUTE) == []
    assert watch.see(BAD, 2 * MINUTE) == ["reminder"]
    watch.memory = unsent(watch.memory, "drop_refused", watch.now)  # its episode is over
    assert watch.see(BAD, HOUR) == []
    watch.see(("degraded", "items_failing"), 2 * MINUTE)
    watch.memory = unsent(watch.memory, "items_failing", watch.now)  # it was not told yet
    assert watch.see(BAD, HOUR) == []


def test_a_short_calm_is_no_end(watch: Watch) -> None:
    watch.see(BAD, HOUR)
    for _ in range(5):
        assert watch.see(GOOD, GOOD_FOR / 2) == watch.see(BAD, GOOD_FOR / 2) == []


def test_another_reason_is_told_as_well(watch: Watch) -> None:
    watch.see(BAD, HOUR)
    assert sorted(watch.see(("degraded", "drop_refused"), HOUR)) == ["recovered", "trouble"]
    assert watch.see(GOOD, HOUR) == ["recovered"]
    assert watch.told[-1][1]["reasons"] == ["drop_refused"]


def test_reasons_that_end_together_are_told_in_one_word(watch: Watch) -> None:
    watch.see(FAILING, HOUR)
    watch.see(BAD, HOUR)
    assert watch.see(GOOD, HOUR) == ["recovered"]
    assert watch.told[-1][1]["line"] == "syncd main: it works again, after 2 h (items_failing, key_refused)"


def test_a_reason_that_came_back_is_trouble_again_though_a_smaller_one_never_ended(watch: Watch) -> None:
    assert watch.see(FAILING, HOUR) == ["trouble"]
    assert watch.see(BAD, HOUR) == ["trouble"]
    assert watch.see(FAILING, HOUR) == ["recovered"]
    said = watch.told[-1][1]
    assert (said["line"], said["reasons"]) == (
        "syncd main: key_refused is over, after 59 min; still items_failing",
        ["key_refused"],
    )
    assert watch.see(FAILING, 12 * HOUR) == []
    assert watch.see(BAD, HOUR) == ["trouble"]
    assert watch.told[-1][1]["line"] == "syncd main: key_refused: put the new key in"


def test_short_spells_of_a_reason_hours_apart_are_not_added_up_beside_a_smaller_one(watch: Watch) -> None:
    watch.see(FAILING, HOUR)
    for _ in range(5):
        assert watch.see(BAD, AFTER / 2) == []
        assert watch.see(FAILING, HOUR) == []


def test_what_a_worse_reason_hides_is_not_told_again_when_it_shows_again(watch: Watch) -> None:
    assert watch.see(FAILING, HOUR) == ["trouble"]
    assert watch.see(BAD, 5 * HOUR) == ["trouble"]
    assert watch.see(FAILING, 5 * HOUR) == ["recovered"]
    assert watch.see(GOOD, HOUR) == ["recovered"]
    assert watch.told[-1][1]["reasons"] == ["items_failing"]


def test_a_reminder_says_how_long_its_own_reason_lasts(watch: Watch) -> None:
    watch.see(FAILING, 10 * HOUR)
    watch.see(BAD, 26 * HOUR)
    assert str(watch.told[-1][1]["line"]).startswith("syncd main: still key_refused, since 1 d: ")


def test_a_new_reason_is_told_in_the_silence_of_another_that_comes_and_goes(watch: Watch) -> None:
    for _ in range(4):
        watch.see(FAILING, 35 * MINUTE)
        watch.see(GOOD, 35 * MINUTE)
    assert watch.told[-1][1]["kind"] == "flapping"
    assert watch.see(BAD, HOUR) == ["trouble"]
    assert watch.see(GOOD, 35 * MINUTE) == []


@pytest.mark.parametrize("reason", sorted(URGENT))
def test_what_may_cost_documents_is_told_at_once(watch: Watch, reason: str) -> None:
    assert watch.see(("blocked", reason)) == ["trouble"]


def test_an_office_that_switches_off_at_night_wakes_nobody(watch: Watch) -> None:
    down = ("blocked", "econnector_down")
    assert watch.see(down, 14 * HOUR, open_=False) == []
    assert watch.see(down, HOUR) == ["trouble"]


def test_coming_and_going_ends_in_silence_for_a_day_and_then_in_one_word(watch: Watch) -> None:
    for _ in range(9):
        watch.see(BAD, 35 * MINUTE)
        watch.see(GOOD, 35 * MINUTE)
    assert [notice["kind"] for _, notice in watch.told] == [*["trouble", "recovered"] * (MANY // 2), "flapping"]
    assert "no further notice" in str(watch.told[-1][1]["line"])
    assert watch.see(GOOD, 2 * DAY) == ["recovered"]


def test_damage_is_told_in_that_silence_too(watch: Watch) -> None:
    for _ in range(6):
        watch.see(BAD, 35 * MINUTE)
        watch.see(GOOD, 35 * MINUTE)
    assert watch.see(("degraded", "archive_damaged")) == ["trouble"]


def test_a_pause_is_neither_good_nor_bad(watch: Watch) -> None:
    watch.see(BAD, HOUR)
    assert watch.see(("paused", "paused"), 2 * DAY) == []
    assert watch.see(GOOD, HOUR) == ["recovered"]


def test_time_in_which_nobody_looked_does_not_count(watch: Watch) -> None:
    watch.see(BAD)
    watch.now += DAY  # switched off
    assert watch.see(BAD, 10 * MINUTE) == []


def test_a_clock_that_is_set_back_silences_nothing_for_years(watch: Watch) -> None:
    watch.see(BAD, HOUR)
    watch.now -= 400 * DAY
    assert watch.see(BAD, HOUR) == ["reminder"]


def test_neither_does_it_in_the_silence_of_a_flapping_day(watch: Watch) -> None:
    for _ in range(4):
        watch.see(BAD, 35 * MINUTE)
        watch.see(GOOD, 35 * MINUTE)
    assert watch.told[-1][1]["kind"] == "flapping"
    watch.now -= 400 * DAY
    assert watch.see(GOOD, HOUR) == ["recovered"]


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"sent": [3]}', '{"told_at": {"x": "y"}}', '{"episodes": {"ok": {}}}', "{", "7"]
)
def test_a_damaged_memory_is_a_fresh_one(text: str | None) -> None:
    assert Memory.from_json(text) == Memory()


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from([GOOD, BAD, ("degraded", "throttled_long")]), st.integers(1, 200)), max_size=40)
)
def test_no_trouble_is_told_twice_within_a_day_and_never_more_than_a_few_notices(
    course: list[tuple[tuple[str, str], int]],
) -> None:
    watch = Watch()
    for said, minutes in course:
        watch.see(said, minutes * MINUTE)
    for at, _ in watch.told:
        day = [notice["kind"] for then, notice in watch.told if at <= then < at + DAY and notice["kind"] != "reminder"]
        assert len(day) <= MANY + 1 + len({notice["reason"] for _, notice in watch.told}), "each new reason once"
    assert replace(watch.memory, looked_at=0.0) == replace(Memory.from_json(watch.memory.to_json()), looked_at=0.0)
