"""Which list is polled next: every list in its turn, none twice before something became of it."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from syncd.agenda import Agenda, Policy
from syncd.model import ListKey, ListName, ListState

T0 = 1_795_000_000.0
REST = 60.0


def key(pat_num: int, name: str = "documents") -> ListKey:
    return pat_num, cast("ListName", name)


def state(pat_num: int, polled_at: float = 0.0, name: str = "documents") -> ListState:
    return ListState(key(pat_num, name), polled_at, 0, None)


def agenda(*states: ListState) -> Agenda:
    return Agenda(states, Policy(rest=REST), T0)


def drained(lists: Agenda, now: float) -> list[ListKey]:
    found = []
    while (each := lists.next(now)) is not None:
        found.append(each)
    return found


def test_every_list_comes_once_the_one_polled_longest_ago_first() -> None:
    lists = agenda(state(1, T0 - 100), state(2, T0 - 300), state(3, T0 - 200), state(2, T0 - 250, "sheets"))
    assert drained(lists, T0) == [key(2), key(2, "sheets"), key(3), key(1)]


def test_lists_never_polled_come_before_all_others_in_the_order_they_came() -> None:
    lists = agenda(state(1, T0 - 1000), state(3), state(2))
    assert drained(lists, T0) == [key(3), key(2), key(1)]


def test_the_same_past_gives_the_same_future() -> None:
    states = [state(n, T0 - 100 - n % 7, name) for n in range(1, 200) for name in ("documents", "sheets")]
    assert drained(agenda(*states), T0) == drained(agenda(*states), T0)


def test_a_list_in_hand_is_not_given_out_again_until_it_is_known_what_became_of_it() -> None:
    lists = agenda(state(1))
    assert lists.next(T0) == key(1)
    assert lists.next(T0 + 1e9) is None
    assert lists.due_at() is None
    lists.polled(key(1), T0, 3, None)
    assert lists.next(T0 + REST - 1) is None
    assert lists.due_at() == T0 + REST
    assert lists.next(T0 + REST) == key(1)


def test_a_list_that_could_not_be_read_waits_as_long_as_was_said() -> None:
    lists = agenda(state(1), state(2))
    assert lists.next(T0) == key(1)
    lists.failed(key(1), T0, T0 + 900)
    assert drained(lists, T0 + 899) == [key(2)]
    assert lists.next(T0 + 900) == key(1)
    lists.failed(key(1), T0 + 900, T0)  # a time that is over: now, not before everything else
    assert lists.due_at() == T0 + 900


def test_a_named_list_is_polled_next() -> None:
    lists = agenda(state(1, T0 - 300), state(2, T0 - 10))
    lists.named(key(2), T0)
    assert drained(lists, T0) == [key(2), key(1)]


def test_a_list_named_while_it_is_read_is_read_again_right_after() -> None:
    lists = agenda(state(1), state(2))
    assert lists.next(T0) == key(1)
    lists.named(key(1), T0)  # what changed may have come after the page that was read
    assert lists.next(T0) == key(2)
    lists.polled(key(1), T0, 1, None)
    assert lists.next(T0) == key(1)
    lists.polled(key(1), T0, 1, None)
    assert lists.next(T0) is None


def test_a_list_named_while_it_could_not_be_read_waits_all_the_same() -> None:
    lists = agenda(state(1))
    lists.next(T0)
    lists.named(key(1), T0)
    lists.failed(key(1), T0, T0 + 900)
    assert lists.next(T0 + 899) is None


def test_a_name_nobody_knows_is_no_list() -> None:
    lists = agenda(state(1))
    lists.named(key(99), T0)
    lists.polled(key(98), T0, 0, None)
    assert drained(lists, T0) == [key(1)]


def test_a_patient_who_left_is_not_polled_and_may_come_back() -> None:
    lists = agenda(state(1), state(1, name="sheets"), state(2))
    assert lists.next(T0) == key(1)
    lists.remove(1)
    lists.polled(key(1), T0, 0, None)  # the answer that was under way changes nothing
    assert drained(lists, T0 + 1e9) == [key(2)]
    lists.add(state(1, T0), T0)
    assert drained(lists, T0 + REST) == [key(1)]


def test_adding_a_list_again_does_not_double_it() -> None:
    lists = agenda(state(1), state(1))
    lists.add(state(1), T0)
    assert drained(lists, T0) == [key(1)]


def test_due_at_tells_when_the_next_list_comes_and_forgets_what_left() -> None:
    lists = agenda(state(1, T0 - 30), state(2, T0 - 10))
    assert lists.due_at() == T0 + 30
    lists.remove(1)
    assert lists.due_at() == T0 + 50
    assert agenda().due_at() is None
    assert agenda().next(T0) is None


@pytest.mark.parametrize("interval", [0.05, 1.1, 5.0])
def test_slower_requests_rest_longer(interval: float) -> None:
    assert Policy.for_interval(interval, 10_000, "America/Chicago").rest == pytest.approx(60 * interval)


class AnyCourse(RuleBasedStateMachine):
    """Whatever happens in whatever order, no list is in hand twice, and none that is due is forgotten."""

    @initialize(pats=st.sets(st.integers(1, 8)))
    def begin(self, pats: set[int]) -> None:
        self.now = T0
        self.lists = agenda(*(state(pat_num) for pat_num in sorted(pats)))
        self.known = {key(pat_num) for pat_num in pats}
        self.in_hand: set[ListKey] = set()
        self.named: set[ListKey] = set()
        self.not_before = dict.fromkeys(self.known, 0.0)

    @rule()
    def take(self) -> None:
        found = self.lists.next(self.now)
        if found is None:
            waiting = self.known - self.in_hand
            assert all(self.not_before[each] > self.now for each in waiting)
        else:
            assert found in self.known - self.in_hand
            assert self.not_before[found] <= self.now
            self.in_hand.add(found)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.in_hand:
            done = data.draw(st.sampled_from(sorted(self.in_hand)))
            wait = data.draw(st.sampled_from([None, 0.0, 900.0]))
            if wait is None:
                self.lists.polled(done, self.now, 1, None)
            else:
                self.lists.failed(done, self.now, self.now + wait)
            self.in_hand.discard(done)
            at_once = wait is None and done in self.named
            self.not_before[done] = 0.0 if at_once else self.now + (REST if wait is None else wait)
            self.named.discard(done)

    @rule(pat_num=st.integers(1, 8))
    def name(self, pat_num: int) -> None:
        self.lists.named(key(pat_num), self.now)
        if key(pat_num) in self.in_hand:
            self.named.add(key(pat_num))
        self.not_before[key(pat_num)] = 0.0

    @rule(pat_num=st.integers(1, 8))
    def leave(self, pat_num: int) -> None:
        self.lists.remove(pat_num)
        self.known.discard(key(pat_num))
        self.in_hand.discard(key(pat_num))
        self.named.discard(key(pat_num))

    @rule(pat_num=st.integers(1, 8))
    def come(self, pat_num: int) -> None:
        if key(pat_num) not in self.in_hand:
            self.lists.add(state(pat_num), self.now)
            self.known.add(key(pat_num))
            self.not_before[key(pat_num)] = 0.0

    @rule(seconds=st.sampled_from([1.0, 30.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def next_time_is_told(self) -> None:
        waiting = self.known - self.in_hand
        due = self.lists.due_at()
        assert due == min((self.not_before[each] for each in waiting), default=None)


AnyCourse.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyCourse = AnyCourse.TestCase
