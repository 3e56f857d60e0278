"""The power goes at any persistence call, on ext4 and on xfs; the next start ends up where an undisturbed one would.

Index and archive are on two file systems, the normal install. `blackout.py` says how.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.mounts import FILE_SYSTEMS, FileSystem, need
from tests.faults.sweeping import NIGHTLY, POINT, TIMEOUT, ask, library, tell

__all__ = ["library"]  # the fixture

pytestmark = pytest.mark.timeout(TIMEOUT)
SHARDS = 2
SEEDS = (2, 3, 4) if NIGHTLY else (2,)  # even ones are backfills, odd ones daemons
EVERY = dict.fromkeys(FILE_SYSTEMS, 1 if NIGHTLY else 4)  # of so many calls one is a point
LEAST_POINTS = 20_000 if NIGHTLY else 2_000  # on both
LEAST_STATES = 150  # of a seed in a shard: were all cuts taken for one, none would be looked at
LEAST_CALLS, LEAST_SYNCS = 4_000, 500  # "no call was seen" must not pass for "no cut did harm"


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_power_cut_at_any_persistence_call_loses_nothing(
    library: Path, kind: FileSystem, shard: int, record_property: Callable[[str, object], None]
) -> None:
    need(f"mkfs.{kind}")
    offset = FILE_SYSTEMS.index(kind) * EVERY[kind] // len(FILE_SYSTEMS)
    points = ("--every", EVERY[kind], "--offset", offset, "--shard", shard, "--shards", SHARDS)
    report = ask(library, "blackout", kind, "--seeds", *SEEDS, *points, *(["--point", POINT] if POINT else []))
    tell(record_property, f"power cuts on {kind}", report)
    if not POINT:
        assert sum(report.calls / every for every in EVERY.values()) >= LEAST_POINTS  # in all shards, nearly equal
        assert report.points >= 0.9 * report.calls / EVERY[kind] / SHARDS
        assert report.points - report.known >= LEAST_STATES * len(SEEDS)
        assert report.calls >= LEAST_CALLS * len(SEEDS)
        assert report.syncs >= LEAST_SYNCS * len(SEEDS)
