"""Which list is polled next: the one from which most is to be expected, and none is forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import cast
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from syncd.agenda import Agenda, Curve, Policy
from syncd.model import ListKey, ListName, ListState

HOUR, DAY = 3600.0, 86_400.0
MONDAY = 1_794_787_200.0  # 2026-11-16 00:00 UTC
T0 = MONDAY + 10 * HOUR  # the practice is open
EVENING = MONDAY + 18 * HOUR
NIGHT = MONDAY + 26.5 * HOUR
POLICY = Policy()


def key(pat_num: int, name: str = "documents") -> ListKey:
    return pat_num, cast("ListName", name)


def state(
    pat_num: int, polled_at: float = 0.0, name: str = "documents", *, rows: int = 0, newest: float | None = None
) -> ListState:
    return ListState(key(pat_num, name), polled_at, rows, newest)


def agenda(*states: ListState, policy: Policy = POLICY, now: float = T0) -> Agenda:
    return Agenda(states, policy, now)


def practice(patients: int, now: float, policy: Policy = POLICY) -> Agenda:
    """Everybody has two lists, polled one after the other in the last hours; stamps from a day to two years old."""
    lists = [(pat_num, name) for pat_num in range(1, patients + 1) for name in ("documents", "sheets")]
    return agenda(
        *(
            state(pat_num, now - 1 - n, name, rows=10, newest=now - DAY * (1 + pat_num * 37 % 700))
            for n, (pat_num, name) in enumerate(lists)
        ),
        policy=policy,
        now=now,
    )


def drained(lists: Agenda, now: float) -> list[ListKey]:
    found = []
    while (each := lists.next(now)) is not None:
        found.append(each)
    return found


def polls(
    lists: Agenda,
    start: float,
    seconds: float,
    interval: float = 1.0,
    before: Callable[[float], None] = lambda now: None,
) -> list[tuple[float, ListKey]]:
    """What is polled in that time, nothing new being found."""
    found = []
    for slot in range(int(seconds / interval)):
        now = start + slot * interval
        before(now)
        chosen = lists.next(now)
        if chosen is not None:
            found.append((now, chosen))
            lists.polled(chosen, now, 10, None)
    return found


# --- nothing twice, nothing lost


def test_lists_never_polled_come_first_in_the_order_they_came() -> None:
    lists = agenda(state(1, T0 - 7200), state(3), state(2))
    assert drained(lists, T0) == [key(3), key(2), key(1)]


def test_the_same_past_gives_the_same_future() -> None:
    assert polls(practice(100, T0), T0, 2 * HOUR) == polls(practice(100, T0), T0, 2 * HOUR)


def test_of_equal_lists_the_one_polled_longest_ago_comes_first() -> None:
    lists = agenda(state(1, T0 - 7100), state(2, T0 - 7300), state(3, T0 - 7200))
    assert drained(lists, T0) == [key(2), key(3), key(1)]


def test_a_list_in_hand_is_not_given_out_again_until_it_is_known_what_became_of_it() -> None:
    lists = agenda(state(1))
    assert lists.next(T0) == key(1)
    lists.add(state(1), T0)
    lists.appointment(1, T0, T0)
    lists.row_changed(1, T0, T0)
    assert lists.next(T0 + 10 * DAY) is None
    lists.polled(key(1), T0 + 10 * DAY, 3, None)
    assert lists.next(T0 + 12 * DAY) == key(1)


def test_a_list_that_could_not_be_read_waits_as_long_as_was_said_whoever_names_it() -> None:
    lists = agenda(state(1), state(2, T0 - 7200))
    assert lists.next(T0) == key(1)
    lists.named(key(1), T0)
    lists.failed(key(1), T0, T0 + 900)
    lists.named(key(1), T0 + 1)
    assert drained(lists, T0 + 899) == [key(2)]
    assert lists.due_at() == T0 + 900
    assert lists.next(T0 + 900) == key(1)
    lists.failed(key(1), T0 + 900, T0)  # a time that is over: now
    assert lists.next(T0 + 900) == key(1)


def test_a_list_that_failed_and_was_read_all_the_same_waits_no_longer() -> None:
    lists = agenda(state(1, T0 - 7200))
    lists.failed(key(1), T0, T0 + DAY)
    lists.polled(key(1), T0, 0, None)
    assert lists.next(T0 + 7200) == key(1)
    lists.polled(key(1), T0 + 7200, 0, None)
    assert lists.next(T0 + DAY) is not None
    assert lists.next(T0 + DAY) is None  # the time that was said is no second turn


def test_a_list_that_failed_twice_waits_for_the_second_time() -> None:
    lists = agenda(state(1))
    lists.failed(key(1), T0, T0 + 100)
    lists.failed(key(1), T0 + 1, T0 + 900)
    assert lists.next(T0 + 200) is None
    lists.named(key(1), T0 + 200)
    assert lists.next(T0 + 899) is None
    assert lists.next(T0 + 900) == key(1)


def test_a_list_whose_time_has_come_can_be_named_like_any_other() -> None:
    lists = agenda(state(1), state(2))
    assert lists.next(T0) == key(1)
    lists.named(key(1), T0)
    lists.failed(key(1), T0, T0 + 900)
    lists.named(key(1), T0 + 900)
    assert drained(lists, T0 + 900) == [key(1), key(2)]


def test_named_lists_are_polled_next_in_the_order_they_were_named() -> None:
    lists = agenda(state(1, T0 - 7200), state(2, T0 - 10), state(3, T0 - 10), state(4))
    for pat_num in (2, 3, 2):
        lists.named(key(pat_num), T0)
    assert lists.due_at() == T0
    assert drained(lists, T0) == [key(2), key(3), key(4), key(1)]


def test_a_list_named_while_it_is_read_is_read_again_right_after() -> None:
    lists = agenda(state(1), state(2))
    assert lists.next(T0) == key(1)
    lists.named(key(1), T0)  # what changed may have come after the page that was read
    assert lists.next(T0) == key(2)
    lists.polled(key(1), T0, 1, None)
    assert lists.next(T0) == key(1)
    lists.polled(key(1), T0, 1, None)
    assert lists.next(T0) is None


def test_a_list_that_was_named_and_then_read_unasked_is_read_once() -> None:
    lists = agenda(state(1, T0 - 10))
    lists.named(key(1), T0)
    lists.polled(key(1), T0, 1, None)
    assert lists.next(T0) is None


def test_names_nobody_knows_change_nothing() -> None:
    lists = agenda(state(1))
    lists.named(key(99), T0)
    lists.polled(key(98), T0, 0, None)
    lists.failed(key(97), T0, T0 + 9)
    lists.appointment(96, T0, T0)
    lists.row_changed(95, T0, T0)
    lists.remove(94)
    assert drained(lists, T0) == [key(1)]
    assert lists.due_at() is None


def test_a_patient_who_left_is_not_polled_and_may_come_back() -> None:
    lists = agenda(
        state(1), state(1, name="sheets"), state(2), state(3, T0 - 2 * DAY), state(4, T0), state(4, T0, "sheets")
    )
    assert lists.next(T0) == key(1)
    lists.appointment(4, T0, T0)
    lists.failed(key(4, "sheets"), T0, T0 + 9)
    for pat_num in (1, 3, 4):
        lists.remove(pat_num)
    lists.polled(key(1), T0, 0, None)  # the answer that was under way changes nothing
    assert drained(lists, T0 + 9 * DAY) == [key(2)]
    lists.add(state(1), T0 + 9 * DAY)
    assert drained(lists, T0 + 9 * DAY) == [key(1)]


def test_patient_who_leaves_and_comes_back_at_once_is_known_by_the_same_poll() -> None:
    lists = agenda(state(1, T0 - 100), state(2, T0 - 99))
    for _ in range(3):
        lists.remove(1)
        lists.add(state(1, T0 - 100), T0)
    lists.polled(key(1), T0, 0, None)
    assert sorted(drained(lists, T0 + 2 * DAY)) == [key(1), key(2)]


def test_adding_a_list_again_does_not_double_it_and_does_not_bring_it_forward() -> None:
    lists = agenda(state(1), state(1), state(2, T0 - 10))
    lists.add(state(2), T0)
    assert drained(lists, T0) == [key(1)]


# --- what is worth a request


def test_a_list_just_read_is_worth_nothing_and_one_that_rested_is() -> None:
    lists = agenda(state(1, T0, newest=T0 - 10))
    assert lists.next(T0 + POLICY.rest - 1) is None
    assert lists.next(T0 + POLICY.rest) == key(1)


def test_patients_whose_files_changed_lately_come_first() -> None:
    ages = {1: 300 * DAY, 2: 3 * DAY, 3: 90 * DAY}
    lists = agenda(*(state(pat_num, T0 - 7200, newest=T0 - age) for pat_num, age in ages.items()))
    assert drained(lists, T0) == [key(2), key(3), key(1)]


def test_a_list_that_costs_more_requests_comes_later() -> None:
    lists = agenda(state(1, T0 - 7200, rows=950), state(2, T0 - 7200, rows=50))
    assert drained(lists, T0) == [key(2), key(1)]
    lists.polled(key(1), T0, 50, None)
    lists.polled(key(2), T0, 950, None)
    assert drained(lists, T0 + 7200) == [key(1), key(2)]


def test_a_patient_in_the_chair_is_polled_far_more_often_than_the_others() -> None:
    lists = practice(300, T0)
    lists.appointment(7, T0, T0)
    lists.appointment(7, T0, T0)  # each reading of the appointments tells it again
    often = Counter(key for _, key in polls(lists, T0, HOUR))
    assert min(often[7, "documents"], often[7, "sheets"]) > 5 * often[8, "documents"]


def test_an_appointment_that_is_over_is_no_hint() -> None:
    lists = practice(300, T0)
    lists.appointment(7, T0 - 5 * HOUR, T0)
    often = Counter(key for _, key in polls(lists, T0, HOUR))
    assert often[7, "documents"] <= often[8, "documents"] + 1


def test_an_appointment_passes() -> None:
    lists = practice(300, T0)
    lists.appointment(7, T0 - 3.9 * HOUR, T0)
    later = polls(lists, T0, 2 * HOUR)
    often = Counter(key for now, key in later if now > T0 + HOUR)
    assert often[7, "documents"] <= often[8, "documents"] + 1


def test_a_known_appointment_brings_the_sheets_forward_for_web_forms() -> None:
    lists = agenda(state(1, T0 - 60), state(1, T0 - 60, "sheets"), policy=Policy(idle=0.2))
    lists.appointment(1, T0 + 2 * DAY, T0)
    assert drained(lists, T0) == [key(1, "sheets")]
    lists.polled(key(1, "sheets"), T0, 0, None)
    lists.appointment(1, T0 + 2 * DAY, T0 + 1)
    assert drained(lists, T0 + 1) == []
    lists.appointment(1, T0 - 5 * HOUR, T0 + 2)
    assert drained(lists, T0 + 2) == []


def test_a_list_becomes_urgent_when_its_appointment_comes_though_nothing_is_told_by_then() -> None:
    lists = agenda(state(1, T0), policy=Policy(idle=3.0))
    lists.appointment(1, T0 + 3 * HOUR, T0)
    assert lists.next(T0 + 2 * HOUR) is None
    assert lists.next(T0 + 3.3 * HOUR) == key(1)


def test_web_forms_are_looked_for_in_the_evenings_before_the_visit_and_not_at_night() -> None:
    lists = practice(100, EVENING)
    lists.appointment(50, EVENING + 3 * DAY, EVENING)
    of_forms = [at for at, each in polls(lists, EVENING, 8 * HOUR) if each == key(50, "sheets")]
    by_ten = [at for at in of_forms if at < EVENING + 4 * HOUR]
    assert len(by_ten) >= 20, "several times an hour"
    assert len(of_forms) - len(by_ten) <= 2
    of_another = [at for at, each in polls(practice(100, EVENING), EVENING, 8 * HOUR) if each == key(51, "sheets")]
    assert len(of_another) < len(by_ten) / 4


@pytest.mark.timeout(10)
def test_edges_that_no_float_can_hold_are_passed_all_the_same() -> None:
    curve = Curve((0.0, 0.1, 0.3, 0.7, 9.0), (1.0,) * 4, (1.0,) * 4)
    lists = agenda(
        *(state(n, T0, newest=T0 - n / 100) for n in range(30)), policy=Policy(change=curve, idle=1e9), now=T0
    )
    assert lists.next(T0 + 60) is None


def test_a_found_change_makes_both_lists_of_the_patient_urgent() -> None:
    lists = practice(300, T0)
    lists.polled(key(299), T0, 11, T0 - 30)
    found = polls(lists, T0, 120)
    assert key(299, "sheets") in [key for _, key in found[:20]]
    assert key(299) in [key for _, key in found]
    lists = practice(300, T0)
    lists.polled(key(299), T0, 11, T0 - 40 * DAY)  # a row new to us, and old
    assert key(299) not in [key for _, key in polls(lists, T0, 120)]


def test_a_stamp_from_the_future_counts_as_now() -> None:
    lists = practice(300, T0)
    lists.polled(key(299), T0, 11, T0 + 400 * DAY)
    assert key(299, "sheets") in [key for _, key in polls(lists, T0, 120)[:20]]
    assert len(polls(agenda(state(1, T0, newest=T0 + 400 * DAY)), T0, DAY)) < 400


def test_a_changed_row_of_the_patient_brings_both_lists_forward_once() -> None:
    lists = agenda(*(state(pat_num, T0 - 30, name) for pat_num in (1, 2) for name in ("documents", "sheets")))
    lists.row_changed(2, T0 - 10, T0)
    assert sorted(drained(lists, T0)) == [key(2), key(2, "sheets")]
    for name in ("documents", "sheets"):
        lists.polled(key(2, name), T0, 0, None)
    lists.row_changed(2, T0 - 10, T0 + 1)  # told again, because two readings overlap
    assert lists.next(T0 + 1) is None


def test_nothing_ages_at_night() -> None:
    by_day = polls(practice(500, T0), T0, 4 * HOUR)
    by_night = polls(practice(500, NIGHT), NIGHT, 4 * HOUR)
    assert len(by_night) < 0.1 * len(by_day)


@pytest.mark.parametrize(("start", "more"), [(NIGHT, 0), (T0, 4 * POLICY.row_burst)])
def test_an_aging_run_floods_nothing(start: float, more: int) -> None:
    policy = Policy(idle=10.0)  # few lists are worth a request
    quiet = polls(practice(10_000, start, policy), start, HOUR)
    lists = practice(10_000, start, policy)
    for pat_num in range(1, 10_001, 20):
        lists.row_changed(pat_num, start - 60, start)
    assert len(polls(lists, start, HOUR)) <= len(quiet) + more


def test_a_row_changed_after_a_burst_is_a_hint_again() -> None:
    lists = practice(100, T0)
    for n in range(POLICY.row_burst + 1):
        lists.row_changed(1, T0 + n, T0 + n)
    drained(lists, T0 + 70)
    lists.row_changed(2, T0 + 70, T0 + 70)
    assert lists.next(T0 + 70) is None
    lists.row_changed(3, T0 + 400, T0 + 400)
    assert {(3, "documents"), (3, "sheets")} <= {lists.next(T0 + 400) for _ in range(4)}


@pytest.mark.parametrize("friday", ["2026-10-30", "2026-11-06", "2027-03-12"])  # summer time ends, neither, begins
def test_opening_hours_are_those_of_the_practice_on_nights_when_the_clocks_change_too(friday: str) -> None:
    zone = ZoneInfo("America/Chicago")
    closing = datetime.fromisoformat(f"{friday}T22:00").replace(tzinfo=zone)
    policy = Policy(idle=0.5, floor=30 * DAY, time_zone="America/Chicago")
    lists = agenda(state(1, closing.timestamp()), policy=policy, now=closing.timestamp())
    assert lists.next(closing.timestamp()) is None
    due = lists.due_at()
    assert due is not None
    local = datetime.fromtimestamp(due, zone)
    assert (local.weekday(), local.hour) == (0, 9)
    assert lists.next(due - 1) is None
    assert lists.next(due + 1) == key(1)


# --- the floor


@pytest.mark.parametrize("interval", [1.0, 5.0])
def test_no_list_waits_longer_than_the_floor_promises_though_all_were_polled_at_once(interval: float) -> None:
    policy = Policy.for_interval(interval, 5000 if interval == 5 else 1000)
    patients = 1000
    start = MONDAY + 5 * DAY
    lists = agenda(
        *(state(n, start, name, newest=start - n * DAY) for n in range(patients) for name in ("documents", "sheets")),
        policy=policy,
        now=start,
    )
    last = {(n, name): start for n in range(patients) for name in ("documents", "sheets")}
    longest = 0.0
    slow = policy.floor / (6 * patients)  # as slow as the floor of three sweeps allows
    for now, each in polls(lists, start, 3 * policy.floor, slow):
        longest, last[each] = max(longest, now - last[each]), now
    assert max(longest, start + 3 * policy.floor - min(last.values())) <= 1.15 * policy.floor


def test_a_list_as_old_as_the_floor_takes_at_most_every_second_turn_from_the_others() -> None:
    old = [state(n, T0 - 2 * DAY, newest=T0 - 3000 * DAY) for n in range(100)]
    worth = [state(n, T0 - 7200, newest=T0 - DAY) for n in range(100, 200)]
    first = drained(agenda(*old, *worth, policy=Policy(idle=0.0, floor=2.05 * DAY)), T0)
    assert all((pat_num < 100) == (place % 2 == 0) for place, (pat_num, _) in enumerate(first))
    assert len(first) == 200


def test_lists_never_polled_can_be_left_out() -> None:
    lists = agenda(state(1), state(2, T0 - 2 * DAY))
    assert lists.next(T0, known=True) == key(2)
    assert lists.next(T0, known=True) is None
    lists.named(key(1), T0)
    assert lists.next(T0, known=True) == key(1), "somebody waits for it"


def test_what_is_named_is_urgent_and_what_is_as_old_as_the_floor_every_second_time() -> None:
    lists = agenda(state(1), state(2, T0 - 7200), policy=Policy(floor=DAY))
    assert not lists.urgent(T0)
    lists.named(key(2), T0)
    assert lists.urgent(T0)
    assert lists.next(T0) == key(2)
    assert not lists.urgent(T0)
    old = [state(n, T0 - 2 * DAY, newest=T0 - 3000 * DAY) for n in range(4)]
    worth = [state(n, T0 - 7200, newest=T0 - DAY) for n in range(10, 14)]
    lists = agenda(*old, *worth, policy=Policy(idle=0.0, floor=2.05 * DAY))
    assert [(lists.urgent(T0), lists.next(T0) in {each.key for each in old}) for _ in range(6)] == [
        (True, True),
        (False, False),
    ] * 3


def test_no_list_starves_though_another_is_named_all_the_time() -> None:
    lists = practice(100, T0, Policy.for_interval(60.0, 100))
    last = {each: now for now, each in polls(lists, T0, 3 * DAY, 60.0, lambda now: lists.named(key(1), now))}
    assert len(last) == 200
    assert min(last.values()) > T0 + 3 * DAY - 1.15 * DAY


def test_a_list_under_way_or_failing_is_not_polled_for_its_age() -> None:
    lists = agenda(state(1, T0 - 3 * DAY), state(2, T0 - 3 * DAY))
    assert lists.next(T0) == key(1)
    lists.failed(key(2), T0, T0 + 900)
    assert lists.next(T0) is None
    lists.polled(key(1), T0, 0, None)
    assert lists.next(T0 + 900) == key(2)


def test_very_many_lists_that_need_no_floor_yet_take_no_long_decision() -> None:
    lists = agenda(*(state(n, T0 - DAY) for n in range(200)), policy=Policy(idle=1e9))
    for n in range(199):
        lists.polled(key(n), T0, 0, None)
    assert lists.next(T0) is None  # it looked at some only, and goes on in the next decision
    found = [lists.next(T0 + n) for n in range(5)]
    assert key(199) in found


def test_by_day_a_list_is_due_for_its_age_later_than_by_night() -> None:
    policy = Policy(idle=1e9)
    lists = agenda(state(1, T0 - 0.8 * DAY), policy=policy)
    assert lists.next(T0) is None
    assert (lists.due_at() or 0.0) > T0
    assert agenda(state(1, NIGHT - 0.8 * DAY), policy=policy, now=NIGHT).next(NIGHT) == key(1)
    evening = agenda(state(1, EVENING - 0.8 * DAY), policy=policy, now=EVENING)
    assert evening.next(EVENING) is None, "something is still to be found"
    assert EVENING < (evening.due_at() or 0.0) <= EVENING + 0.15 * DAY


# --- policies


def test_the_policy_follows_the_interval_and_the_practice() -> None:
    assert Policy.for_interval(1.0, 10_000).idle == pytest.approx(0.1)
    assert Policy.for_interval(5.0, 10_000).idle == pytest.approx(0.4, rel=0.01)
    small = Policy.for_interval(1.0, 500)  # a sweep takes 17 minutes: no list needs to wait for a day
    assert small.idle == pytest.approx(0.1)
    assert small.floor == DAY / 20
    assert Policy.for_interval(1.0, 3).floor == 60, "and none is hammered"
    assert Policy.for_interval(1.0, 10_000).floor == DAY
    assert Policy.for_interval(5.0, 10_000).floor == 3 * 20_000 * 5.0
    assert Policy.for_interval(1.0, 0, "America/Chicago").time_zone == "America/Chicago"


def test_a_small_practice_has_each_list_polled_again_and_again_and_keeps_most_of_its_budget() -> None:
    lists = practice(500, T0, Policy.for_interval(1.0, 500))
    found = polls(lists, T0, 3 * HOUR)
    times = Counter(key for _, key in found)
    assert len(times) == 1000
    assert min(times.values()) >= 2
    assert len(found) < 0.65 * 3 * HOUR


def test_a_small_practice_is_not_hammered() -> None:
    lists = practice(10, T0)
    lists.appointment(3, T0 + 600, T0)
    found = polls(lists, T0, HOUR)
    assert len(found) < 0.2 * HOUR
    assert max(Counter(key for _, key in found).values()) <= HOUR / POLICY.rest


def test_a_backfill_takes_every_list_once() -> None:
    lists = agenda(state(3), state(1), state(2, T0 - 30 * DAY), policy=Policy.once())
    assert [key for _, key in polls(lists, T0, 100 * DAY, 600.0)] == [key(3), key(1)]
    assert lists.due_at() is None
    lists.named(key(1), T0 + 100 * DAY)
    assert drained(lists, T0 + 100 * DAY) == [key(1)]


def test_a_curve_has_rates_between_its_edges_only() -> None:
    curve = Curve((0.0, 10.0, 20.0), (3.0, 2.0), (1.0, 0.5))
    assert [curve.rate("documents", after) for after in (-1, 0, 9, 10, 19, 20)] == [0, 3, 3, 2, 2, 0]
    assert curve.rate("sheets", 10) == 0.5
    assert [curve.next_edge(after) for after in (-5, 0, 10, 20)] == [0, 10, 20, float("inf")]


def test_no_course_of_events_fills_the_memory() -> None:
    lists = practice(50, T0)
    for n in range(5000):
        lists.named(key(1), T0 + n)
        assert lists.next(T0 + n) == key(1)
        lists.polled(key(1), T0 + n, 10, None)
    assert sum(len(queue) for slopes in lists._slopes.values() for _, queue in slopes.values()) < 1000


# --- whatever happens


@settings(max_examples=40)
@given(st.integers(0, 14 * 24 * 60), st.floats(0, 40 * DAY), st.booleans())
def test_before_it_is_due_nothing_is_worth_a_request(minute: int, age: float, quick: bool) -> None:
    now = MONDAY + 60.0 * minute
    lists = agenda(state(1, now - 1, newest=now - age), state(2, now - 300, "sheets"), now=now)
    if quick:
        lists.appointment(2, now + 1800, now)
    while lists.next(now) is not None:
        pass
    lists = agenda(state(1, now, newest=now - age), now=now)
    due = lists.due_at()
    assert due is not None
    assert lists.next(due - 1) is None or due == now
    for _ in range(500):
        if lists.next(due) is not None:
            return
        later = lists.due_at()
        assert later is not None
        due = max(later, due + 0.1)
    pytest.fail("it never came")


class AnyCourse(RuleBasedStateMachine):
    """Whatever happens in whatever order: no list in hand twice, none before its time, all of them in the end."""

    @initialize(pats=st.sets(st.integers(1, 8)), when=st.integers(0, 167))
    def begin(self, pats: set[int], when: int) -> None:
        self.now = MONDAY + when * HOUR
        self.lists = agenda(*(state(pat_num) for pat_num in sorted(pats)), now=self.now)
        self.known = {key(pat_num) for pat_num in pats}
        self.in_hand: set[ListKey] = set()
        self.not_before: dict[ListKey, float] = {}
        self.due: float | None = None

    def told(self) -> None:
        self.due = None

    @rule()
    def take(self) -> None:
        found = self.lists.next(self.now)
        if found is not None:
            assert found in self.known - self.in_hand
            assert self.not_before.get(found, 0.0) <= self.now
            assert self.due is None or self.now >= self.due
            self.in_hand.add(found)
            self.told()

    @rule(
        data=st.data(),
        wait=st.sampled_from([None, None, 0.0, 900.0]),
        found=st.sampled_from([None, 0.0, 4000.0, -99.0]),
    )
    def end(self, data: st.DataObject, wait: float | None, found: float | None) -> None:
        if self.in_hand:
            done = data.draw(st.sampled_from(sorted(self.in_hand)))
            if wait is None:
                self.lists.polled(done, self.now, 1, None if found is None else self.now - found)
            else:
                self.lists.failed(done, self.now, self.now + wait)
            self.not_before[done] = self.now + (wait or 0.0)
            self.in_hand.discard(done)
            self.told()

    @rule(
        pat_num=st.integers(1, 8), what=st.sampled_from(["name", "row", "appointment"]), ahead=st.floats(-9000, 9 * DAY)
    )
    def hint(self, pat_num: int, what: str, ahead: float) -> None:
        if what == "name":
            self.lists.named(key(pat_num), self.now)
        elif what == "row":
            self.lists.row_changed(pat_num, self.now - ahead, self.now)
        else:
            self.lists.appointment(pat_num, self.now + ahead, self.now)
        self.told()

    @rule(pat_num=st.integers(1, 8))
    def leave(self, pat_num: int) -> None:
        self.lists.remove(pat_num)
        self.known.discard(key(pat_num))
        self.in_hand.discard(key(pat_num))
        self.not_before.pop(key(pat_num), None)

    @rule(pat_num=st.integers(1, 8), ago=st.sampled_from([None, 0.0, 100.0, 9 * DAY]))
    def come(self, pat_num: int, ago: float | None) -> None:
        self.lists.add(state(pat_num, 0.0 if ago is None else self.now - ago), self.now)
        self.known.add(key(pat_num))
        self.told()

    @rule(seconds=st.sampled_from([1.0, 30.0, 1000.0, 20_000.0, 3e6]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def nothing_comes_before_it_is_due(self) -> None:
        if self.due is None:
            self.due = self.lists.due_at()

    def teardown(self) -> None:
        if hasattr(self, "lists"):
            waiting = self.known - self.in_hand
            found = set()
            for hour in range(1000):
                found |= set(drained(self.lists, self.now + hour * HOUR))
            assert found == waiting


AnyCourse.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestAnyCourse = AnyCourse.TestCase
