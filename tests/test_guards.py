"""What syncd refuses to believe: mass disappearances, alike failures, another practice's database."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.guards import BREAKER_LEAST, Breaker, Probe, Verdict, holds_patient, holds_practice, holds_roster, identity


@pytest.mark.parametrize(
    ("missing", "items", "held"),
    [
        (19, 19, False),  # all of them, but too few to mean anything
        (20, 20, True),
        (20, 39, True),
        (20, 40, False),  # exactly half is not more than half
        (21, 41, True),
        (0, 0, False),
    ],
)
def test_a_patient_is_held_from_twenty_items_that_are_more_than_half(missing: int, items: int, held: bool) -> None:
    assert holds_patient(missing, items) is held


@pytest.mark.parametrize(
    ("missing", "items", "held"),
    [
        (49, 100, False),
        (50, 4_999, True),
        (50, 5_000, False),  # exactly 1 % is not more than 1 %
        (51, 5_000, True),
        (10_000, 1_000_000, False),
        (10_001, 1_000_000, True),
    ],
)
def test_a_practice_is_held_from_fifty_items_that_are_more_than_one_in_a_hundred(
    missing: int, items: int, held: bool
) -> None:
    assert holds_practice(missing, items) is held


@pytest.mark.parametrize(
    ("missing", "patients", "held"),
    [
        (19, 19, False),
        (20, 39, True),
        (20, 40, False),  # exactly half is not more than half
        (49, 4_000, False),
        (50, 4_999, True),
        (50, 5_000, False),  # exactly 1 % is not more than 1 %
        (9_000, 10_000, True),
    ],
)
def test_a_roster_is_held_that_lacks_more_than_half_or_one_in_a_hundred(
    missing: int, patients: int, held: bool
) -> None:
    assert holds_roster(missing, patients) is held


@given(st.integers(0, 20_000), st.integers(0, 2_000_000))
def test_one_in_a_hundred_is_exact_whatever_the_floating_point(missing: int, items: int) -> None:
    assert holds_practice(missing, items) is (missing >= 50 and Fraction(missing) > Fraction(items, 100))


@pytest.mark.parametrize(
    ("agrees", "disagrees", "missing", "verdict"),
    [
        (20, 0, 0, "same"),
        (0, 0, 0, "same"),  # nothing is known yet: nothing to compare with
        (18, 2, 0, "same"),
        (17, 3, 0, "other_database"),
        (18, 0, 2, "same"),  # two documents left the office: ordinary
        (17, 0, 3, "database_went_back"),
        (1, 0, 19, "database_went_back"),
        (0, 0, 20, "other_database"),  # nothing proves whose numbers these are
        (0, 0, 2, "same"),  # a practice of two documents may lose both
        (0, 2, 3, "other_database"),
        (0, 2, 1, "other_database"),  # a practice of few documents: nothing agrees, as in another one with few numbers
        (0, 1, 2, "other_database"),
        (1, 2, 2, "same"),
        (0, 1, 1, "same"),
        (1, 2, 3, "database_went_back"),
        (1, 3, 16, "other_database"),
    ],
)
def test_known_items_tell_whose_database_it_is(agrees: int, disagrees: int, missing: int, verdict: Verdict) -> None:
    probes = [Probe("agrees")] * agrees + [Probe("disagrees")] * disagrees + [Probe("missing")] * missing
    random.Random(agrees).shuffle(probes)
    assert identity(iter(probes), len(probes)) == verdict


def test_answers_about_few_of_many_prove_an_identity_only_where_one_agrees() -> None:
    assert identity([Probe("missing")] * 2, 4) == "other_database"
    assert identity([Probe("missing"), Probe("agrees")], 4) == "same"


def sheet(number: int) -> tuple[str, int, int]:
    return "sheet", 101, number


def test_alike_failures_of_different_items_trip_the_breaker() -> None:
    breaker = Breaker()
    assert [breaker.failed("refused", sheet(n)) for n in range(BREAKER_LEAST)] == [False] * 4 + [True]
    assert breaker.failed("refused", sheet(99))  # and it stays tripped until something works


def test_one_item_failing_again_and_again_is_its_own_trouble() -> None:
    breaker = Breaker()
    assert not any(breaker.failed("refused", sheet(34)) for _ in range(100))


def test_a_success_or_another_failure_between_them_starts_the_count_anew() -> None:
    breaker = Breaker(least=2)
    assert not breaker.failed("refused", sheet(1))
    breaker.succeeded(sheet(9))
    assert not breaker.failed("refused", sheet(2))
    assert not breaker.failed("timeout_60s", sheet(3))
    assert not breaker.failed("refused", sheet(4))
    assert breaker.failed("refused", sheet(5))


def test_what_failed_while_another_item_worked_never_trips_it_again() -> None:
    breaker = Breaker(least=2)
    assert [breaker.failed("refused", sheet(n)) for n in (1, 2)] == [False, True]
    breaker.succeeded(sheet(9))
    assert not any(breaker.failed("refused", sheet(n)) for n in (1, 2) * 9)
    assert not breaker.failed("refused", sheet(3))
    assert not breaker.failed("refused", sheet(1)), "nor does it start the count anew"
    assert breaker.failed("refused", sheet(4))
    assert breaker.failed("refused", sheet(1)), "while it is tripped nothing is known of this one"


@pytest.mark.parametrize(("method", "tripped"), [("document", False), ("mount", True), ("sheet", False)])
def test_document_that_works_says_more_than_what_is_placed_by_another_method(method: str, tripped: bool) -> None:
    breaker = Breaker(least=2)
    assert [breaker.failed("refused", sheet(n)) for n in (1, 2)] == [False, True]
    breaker.succeeded((method, 101, 9))
    assert [breaker.failed("refused", sheet(n)) for n in (1, 2)] == [tripped, tripped]


def test_sheets_that_work_between_documents_that_fail_hide_nothing() -> None:
    breaker, tripped = Breaker(), []
    for number in range(BREAKER_LEAST):
        tripped.append(breaker.failed("refused", ("document", 101, number)))
        breaker.succeeded(sheet(number))
    assert tripped == [False] * 4 + [True]


def test_item_in_other_trouble_than_its_own_counts() -> None:
    breaker = Breaker(least=2, own={sheet(1): "refused", sheet(2): "refused"})
    assert [breaker.failed("timeout_60s", sheet(n)) for n in (1, 2)] == [False, True]
    assert not breaker.failed("refused", sheet(1))


def test_where_one_of_the_failed_works_the_trouble_was_the_sites() -> None:
    breaker = Breaker(least=2)
    assert [breaker.failed("refused", sheet(n)) for n in (1, 2, 3)] == [False, True, True]
    breaker.succeeded(sheet(3))
    assert [breaker.failed("refused", sheet(n)) for n in (1, 2)] == [False, True]


def test_item_that_worked_counts_again() -> None:
    breaker = Breaker(least=2, own={sheet(1): "refused"})
    breaker.succeeded(sheet(1))
    assert [breaker.failed("refused", sheet(n)) for n in (1, 2)] == [False, True]
