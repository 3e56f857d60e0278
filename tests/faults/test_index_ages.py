"""The index is disposable: lost, or put back from any age, it becomes what it was, and nothing is fetched again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from syncd.archive import Archive
from syncd.schema import Row
from syncd.scrub import reindex
from tests.small import Small, serving, small
from tests.world import World

AGES = 200 if os.environ.get("SYNCD_FAULTS") == "nightly" else 50
VERSIONS = "SELECT seq, pat_num, kind, num, version, sidecar, path, sha256, checksum FROM version ORDER BY seq"


def change(one: Small, number: int) -> None:
    """One of the things that happen in a practice."""
    practice = one.practice
    if number % 4 == 0:
        practice.replace_bytes(one.document)
    elif number % 4 == 1:
        practice.add_document(one.other, "png")
    elif number % 4 == 2:
        practice.edit_document(one.letter, Description=f"Renamed {number}")
    else:
        practice.edit_sheet(one.sheet)


def put_back(world: World, copy: Path | None) -> None:
    """The process ends, and index.db is that copy, or gone."""
    world.stop()
    for path in world.settings.state_path.glob("index.db*"):
        path.unlink()
    if copy is not None:
        shutil.copy(copy, world.settings.state_path / "index.db")


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, list[Path], list[Row]]:
    """A mirror with a history, a copy of its index from each moment of it, and its versions in the end."""
    folder, one = tmp_path_factory.mktemp("ages"), small()
    world = serving(folder / "mirror", one)
    world.run()
    copies = []
    for number in range(AGES):
        world.index.value("PRAGMA wal_checkpoint(TRUNCATE)")
        copies.append(Path(shutil.copy(world.index.path, folder / f"{number}.db")))
        change(one, number)
        world.sweep()
    world.run(hours=1)
    world.check()
    rows = world.index.rows(VERSIONS)
    assert len(rows) >= len({path.read_bytes() for path in copies}) == AGES
    return world, copies, rows


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["next start", "reindex"])
def test_index_of_any_age_becomes_what_it_was_and_nothing_is_fetched_again(
    aged: tuple[World, list[Path], list[Row]], how: str, record_property: Callable[[str, object], None]
) -> None:
    world, copies, rows = aged
    for copy in [*copies, *([None] if how == "reindex" else [])]:
        sent = len(world.office.arrivals)
        put_back(world, copy)
        if how == "reindex":
            reindex(world.settings, Archive(world.archive, 0), world.clock.now())
        world.restart()
        assert world.index.rows(VERSIONS) == rows, copy
        assert len(world.office.arrivals) == sent
        world.sweep()
        assert world.placements(since=sent) == [], copy
        assert world.index.rows(VERSIONS) == rows, copy
    world.check()
    record_property("figures", f"{len(copies)} ages, {len(rows)} versions each time, 0 files fetched again")
