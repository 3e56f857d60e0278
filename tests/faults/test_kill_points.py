"""The mirror's process dies at every call that makes something durable, SQLite's own included, plain and torn (nightly
every write is torn; else in the long stages every third one).

Then it is started on what is left, its index is sound, and after one sweep everything is there: nothing lost, misfiled
or overwritten, nothing left on the drop or in `incoming`, index, archive and audit log agree. Most crashes are looked
for in a mirror that is stopped there, and of those that leave the same to the byte one is swept; the first of a pair of
crashes is a real death. `forkserver.py` and `judging.py` say how.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.sweeping import NIGHTLY, POINT, SHARDS, TIMEOUT, library, sweep, tell

__all__ = ["library"]  # the fixture

pytestmark = pytest.mark.timeout(TIMEOUT)
SEEDS = range(22) if NIGHTLY else range(2)  # one a backfill, one a daemon
PAIRED = range(22, 32) if NIGHTLY else range(2, 3)  # ten: each call of the cycle is in one of them
PLAN = "kills" if NIGHTLY else "some-kills"
LEAST_POINTS = 100_000 if NIGHTLY else 10_000
LEAST_STATES = 1_000 * len(SEEDS) // 2  # different ones that the crashes leave
PAIR_SHARDS = SHARDS if NIGHTLY else 1
PAIRS = "pairs" if NIGHTLY else "some-pairs"
LEAST_PAIRS = 3_000 if NIGHTLY else 100
LEAST_CALLS = 2_500  # of one undisturbed cycle: "no call was seen" must not pass for "no crash did harm"
LEAST_SYNCS = 300


@pytest.mark.parametrize("shard", range(SHARDS))
def test_crash_at_any_call_loses_nothing(
    library: Path, shard: int, record_property: Callable[[str, object], None]
) -> None:
    report = sweep(library, PLAN, SEEDS, shard)
    tell(record_property, "kill points", report)
    assert report.struck == report.points
    if not POINT:
        assert report.points >= LEAST_POINTS / SHARDS
        assert report.calls >= LEAST_CALLS * len(SEEDS)
        assert report.syncs >= LEAST_SYNCS * len(SEEDS)
        assert report.points - report.known >= LEAST_STATES / SHARDS


@pytest.mark.parametrize("shard", range(PAIR_SHARDS))
def test_crash_in_the_recovery_from_a_crash_loses_nothing(
    library: Path, shard: int, record_property: Callable[[str, object], None]
) -> None:
    report = sweep(library, PAIRS, PAIRED, shard, PAIR_SHARDS)
    tell(record_property, "pairs of kill points", report)
    assert report.struck == report.points
    if not POINT:
        assert report.points >= LEAST_PAIRS / PAIR_SHARDS
