"""Every call that makes something durable fails with EIO, ENOSPC or EROFS, once or for ever.

Of the long stages it is a sample; nightly all of one seed, and samples of more seeds.

The process goes on in a named state, or ends with one; a file whose sync failed is thrown away and never synced again;
once the disk works, with a restart or without, one sweep makes everything good. `forkserver.py` says how.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.sweeping import NIGHTLY, POINT, SHARDS, TIMEOUT, library, sweep, tell

__all__ = ["library"]  # the fixture

pytestmark = pytest.mark.timeout(TIMEOUT)
SAMPLED = range(3, 15, 2)  # odd seeds: a daemon, which goes on
PLANS = {"errors": [1], "some-errors": SAMPLED} if NIGHTLY else {"some-errors": [1]}
LEAST_RUNS = {"errors": 20_000, "some-errors": 5_000}  # of a seed
LEAST_CALLS = 2_500
LEAST_STATES = 500  # of a seed in a shard: were all outcomes taken for one, none would be looked at
STRUCK = 0.95  # of the runs: one that ends early may not come to its call


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("plan", PLANS)
def test_failing_disk_is_a_named_state_and_loses_nothing(
    library: Path, plan: str, shard: int, record_property: Callable[[str, object], None]
) -> None:
    seeds = PLANS[plan]
    report = sweep(library, plan, seeds, shard)
    tell(record_property, "I/O errors", report)
    if not POINT:
        assert report.points >= LEAST_RUNS[plan] * len(seeds) / SHARDS
        assert report.struck >= STRUCK * report.points
        assert report.named > 0
        assert report.points - report.known >= LEAST_STATES * len(seeds)
        assert report.calls >= LEAST_CALLS * len(seeds)
