"""The power goes at any persistence call, on ext4 and on xfs; the next start ends up where an undisturbed one would.

Index and archive are on two file systems, the normal install: on one, SQLite's fsync would make the archive's names
durable, too, and hide a missing fsync. At the chosen call both file systems are shut down without a flush of their
logs, unmounted and mounted again; what is left is what a disk would hold. The office and the drop are other machines:
they remember all.

A point is a forked process: it starts from images and a simulated practice as they were prepared once.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from syncd.scrub import reindex
from syncd.wiring import open_archive
from tests.faults.cycle import Cycle, Stage, live, quicken
from tests.faults.mounts import FILE_SYSTEMS, MEMORY, Disk, FileSystem, copy_image, in_namespace, make_image, need
from tests.faults.power import Power, close_what_is_open_in, missing_versions, settled
from tests.world import World

SHARDS = 2
NIGHTLY = os.environ.get("SYNCD_FAULTS") == "nightly"
SEEDS = range(2, 14, 2) if NIGHTLY else (2,)  # even ones are backfills
POINT, SHARD = 60.0, 600.0 * len(SEEDS)  # seconds at most


class Machine:
    """A mirror with a disk for its index and one for its archive, and the switch that darkens both."""

    def __init__(self, folder: Path, kind: FileSystem, cycle: Cycle) -> None:
        self.cycle, self.world = cycle, cycle.start(folder / "mirror")
        self.power = Power(self._cut, self.world.log)
        self.disks = [Disk(folder / f"{name}.now", folder / "mirror" / name, kind) for name in ("archive", "state")]
        for disk in self.disks:
            make_image(disk.image, kind)
            disk.mount()

    def _cut(self) -> None:
        for disk in self.disks:
            disk.cut()

    def let_go(self) -> None:
        """Unmount. A dead mirror's files are closed first; with the power off nothing that happens here is written."""
        with self.power.until_dark():
            self.world.lanes.closing.close()
        gc.collect()  # connections that a failing start had opened; what was there before the fork is frozen
        for disk in self.disks:
            close_what_is_open_in(disk.folder)
            disk.unmount()

    def replay(self) -> None:
        """Power again, a minute later: both journals are replayed."""
        self.let_go()
        self.power.arm(0)
        self.world.clock.advance(60.0)
        for disk in self.disks:
            disk.mount()

    def swap(self, name: str) -> None:
        """Go on with copies of the unmounted disks."""
        for disk in self.disks:
            source, disk.image = disk.image, disk.image.with_suffix(f".{name}")
            copy_image(source, disk.image)
            disk.mount()

    def remove(self, name: str) -> None:
        """Forget copies."""
        for disk in self.disks:
            disk.image.with_suffix(f".{name}").unlink(missing_ok=True)


# --- what is going on when the power goes


@dataclass(frozen=True)
class Scenario:
    """`prepare`: what happened before. `act`: what is disturbed at each of its calls.

    `keeps_index`: whether what was recorded has to be in the index at once, before the next start could heal it.
    `fewest`: calls; "no call was seen" must not pass for "no cut did harm". `points`: so many of them, by lot, others
    on the other file system; nightly all calls.
    """

    prepare: Callable[[Machine], None]
    act: Callable[[World], None]
    fewest: int
    points: int
    keeps_index: bool = True


def _staged(name: str, fewest: int, points: int, *, keeps_index: bool = True) -> Scenario:
    """One stage of the cycle, after those before it."""
    hours = 1.5 if name == "an answer is lost" else 0.0

    def prepare(machine: Machine) -> None:
        for stage in machine.cycle.stages():
            stage.happens(machine.world)
            if stage.name == name:
                return
            live(machine.world, stage)
        raise AssertionError(f"the cycle has no stage {name}")

    stage = Stage(name, lambda _: None, hours)
    return Scenario(prepare, lambda world: live(world, stage, again=True), fewest, points, keeps_index)


FIRST = _staged("first backfill", 780, 150)


def _cut_before(machine: Machine) -> None:
    """The power went in the middle of the first backfill."""
    machine.power.arm(FIRST.fewest // 2)
    with machine.power.until_dark():
        FIRST.act(machine.world)
    assert not machine.power.on
    machine.replay()


def _lose_index(machine: Machine) -> None:
    """A complete mirror; then somebody removed the index."""
    FIRST.act(machine.world)
    for path in machine.world.settings.state_path.glob("index.db*"):
        path.unlink()


def _rebuild(world: World) -> None:
    """`syncd reindex` where there is no index, and a life."""
    if not (world.settings.state_path / "index.db").exists():
        reindex(world.settings, open_archive(world.settings), world.clock.now())
    FIRST.act(world)


SCENARIOS = {
    "first backfill": FIRST,
    "documents change": _staged("documents change", 540, 250),
    "a mount changes": _staged("a mount changes", 280, 140),
    "an answer is lost": _staged("an answer is lost", 260, 130),
    "an old index is put back": _staged("an old index is put back", 290, 140, keeps_index=False),
    "recovering": Scenario(_cut_before, FIRST.act, 500, 110),
    "reindexing": Scenario(_lose_index, _rebuild, 250, 100, keeps_index=False),
}


# --- one point


def die_and_live(machine: Machine, scenario: Scenario, at: int) -> tuple[int, int]:
    """One life that ends at this call (0: does not), and the next; calls counted, in all and of SQLite."""
    world, power = machine.world, machine.power
    machine.swap(str(at))
    power.arm(at)
    with power.until_dark():
        scenario.act(world)
    assert at or power.on
    counted = power.calls, power.of_sqlite
    if at:
        power.cut()  # at the latest: it may have made fewer calls this time
    machine.replay()
    lost = missing_versions(world, power.acknowledged, in_index=scenario.keeps_index)
    scenario.act(world)
    world.restart(since=world.scope.since)
    lost += settled(world) + missing_versions(world, power.acknowledged, in_index=True)
    machine.let_go()
    assert not lost, "\n".join(lost)
    return counted


# --- all of them


@dataclass
class Explored:
    """What became of the points of a shard."""

    calls: int
    of_sqlite: int
    points: int = 0
    wrong: list[str] = field(default_factory=list)


def points(calls: int, wanted: int, lot: str) -> list[int]:
    """Which calls of so many are the last ones, rising."""
    wanted = calls if NIGHTLY else min(calls, wanted)
    return sorted(random.Random(lot).sample(range(1, calls + 1), wanted))


def explore(folder: Path, kind: FileSystem, scenario: Scenario, seed: int, shard: int) -> Explored:
    """In a namespace of its own: prepare, live once undisturbed, then die at every point of the shard."""
    quicken()
    machine = Machine(folder, kind, Cycle(seed))
    scenario.prepare(machine)
    machine.let_go()
    machine.world.expected.note(machine.world.practice)  # files that are drawn here need not be drawn at each point
    gc.disable()
    gc.freeze()
    found = Explored(*in_namespace(lambda: die_and_live(machine, scenario, 0), POINT))
    for at in points(found.calls, scenario.points, f"{kind} {seed}")[shard::SHARDS]:
        found.points += 1
        try:
            in_namespace(lambda: die_and_live(machine, scenario, at), POINT)  # noqa: B023 - called at once
        except AssertionError as error:
            found.wrong.append(f"power cut at call {at}: {error}")
        machine.remove(str(at))
    return found


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder on the RAM disk, for images."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="power-") as folder:
        yield Path(folder)


@pytest.mark.timeout(SHARD + 60)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_power_cut_at_any_persistence_call_loses_nothing(
    memory: Path, kind: FileSystem, name: str, shard: int, seed: int
) -> None:
    need(f"mkfs.{kind}")
    found = in_namespace(lambda: explore(memory, kind, SCENARIOS[name], seed, shard), SHARD)
    print(f"{kind}, {name}, {seed}: {found.points} of {found.calls} calls")  # noqa: T201 - the amount is the result
    assert not found.wrong, f"{len(found.wrong)} of {found.points} points\n" + "\n".join(found.wrong[:3])
    assert found.calls >= SCENARIOS[name].fewest
    assert found.of_sqlite >= SCENARIOS[name].fewest // 3


def test_there_are_2000_power_cuts_or_more() -> None:
    assert sum(scenario.points for scenario in SCENARIOS.values()) * len(FILE_SYSTEMS) >= 2000
