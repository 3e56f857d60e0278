"""Every call that makes something durable fails with EIO, ENOSPC or EROFS, once or for ever; nightly all of them.

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
SEEDS = range(1, 9, 2) if NIGHTLY else [1]  # a daemon: it goes on
PLAN = "errors" if NIGHTLY else "some-errors"  # of every stage
LEAST_RUNS = 50_000 if NIGHTLY else 5_000
LEAST_CALLS = 2_500
STRUCK = 0.95  # of the runs: one that ends early may not come to its call


@pytest.mark.parametrize("shard", range(SHARDS))
def test_failing_disk_is_a_named_state_and_loses_nothing(
    library: Path, shard: int, record_property: Callable[[str, object], None]
) -> None:
    report = sweep(library, PLAN, SEEDS, shard)
    tell(record_property, "I/O errors", report)
    if not POINT:
        assert report.points >= LEAST_RUNS / SHARDS
        assert report.struck >= STRUCK * report.points
        assert report.named > 0
        assert report.calls >= LEAST_CALLS * len(SEEDS)
