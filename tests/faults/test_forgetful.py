"""Power cuts on a file system that forgets all that was not synced, or by lot some of it; see forgetful.py.

Index and archive are on one such file system: it hides nothing, as a journal would. The cycle, the switch and the
measure are those of test_power_cuts.py.
"""

from __future__ import annotations

import gc
import os
import random
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.cycle import Cycle, Stage, live
from tests.faults.forgetful import CUT, RESTORE, SAVE, Tree, lacking, load, serving, set_word
from tests.faults.mounts import in_namespace, lack
from tests.faults.power import Power, close_what_is_open_in, missing_versions, settled

SHARDS = 2
NIGHTLY = os.environ.get("SYNCD_FAULTS") == "nightly"
POINTS = 500 if NIGHTLY else 15  # of each stage in each shard
STAGES = {"first backfill": 600, "documents change": 300}  # and the fewest calls: "none was seen" proves nothing
CHANCES = (0.0, 0.5, 0.9)  # that what was not synced survives
POINT, SHARD = 60.0, 3600.0 if NIGHTLY else 600.0  # seconds at most


class Machine:
    """A mirror whose index and archive are on a forgetful file system."""

    def __init__(self, folder: Path, cycle: Cycle) -> None:
        self.root, self.saved, self.cycle = folder / "mirror", folder / "tree", cycle
        self.world = cycle.start(self.root)
        (self.root / "archive").rmdir()
        self.power = Power(self._cut, self.world.log)
        self.lot = "0 0"  # seed of the coins, chance to survive

    def _cut(self) -> None:
        set_word(self.root, CUT, self.lot)

    def install(self) -> None:
        """The folders that an installation makes, durably."""
        for name in ("archive", "state"):
            (self.root / name).mkdir()
        folder = os.open(self.root, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        """Close all that a mirror, dead or not, has open."""
        with self.power.until_dark():
            self.world.lanes.closing.close()
        gc.collect()
        close_what_is_open_in(self.root)

    def restore(self) -> None:
        """Power again, a minute later."""
        self.close()
        self.power.arm(0)
        self.world.clock.advance(60.0)
        set_word(self.root, RESTORE, "")


def prepare(machine: Machine, name: str) -> Stage:
    """Live through the stages before this one; the tree is saved as it is then."""
    with serving(Tree(), machine.root):
        machine.install()
        for stage in machine.cycle.stages():
            stage.happens(machine.world)
            if stage.name == name:
                set_word(machine.root, SAVE, str(machine.saved))
                return Stage(name, lambda _: None)
            live(machine.world, stage)
    raise AssertionError(f"the cycle has no stage {name}")


def die_and_live(machine: Machine, stage: Stage, at: int) -> int:
    """One life that ends at this call (0: does not), and the next; the calls that were counted."""
    world, power = machine.world, machine.power
    with serving(load(machine.saved), machine.root):
        power.arm(at)
        with power.until_dark():
            live(world, stage, again=True)
        calls = power.calls
        if at:
            power.cut()  # at the latest: it may have made fewer calls this time
            machine.restore()
        lost = missing_versions(world, power.acknowledged, in_index=True)
        live(world, stage, again=True)
        world.restart(since=world.scope.since)
        lost += settled(world) + missing_versions(world, power.acknowledged, in_index=True)
        machine.close()
    assert not lost, "\n".join(lost)
    return calls


@dataclass
class Explored:
    """What became of the points of a shard."""

    calls: int
    points: int = 0
    wrong: list[str] = field(default_factory=list)


def explore(folder: Path, name: str, shard: int) -> Explored:
    """In a namespace of its own: prepare, live once undisturbed, then die at points that are drawn by lot."""
    machine, lot = Machine(folder, Cycle(2)), random.Random(f"{name} {shard}")
    stage = prepare(machine, name)
    machine.world.expected.note(machine.world.practice)
    gc.disable()
    gc.freeze()
    found = Explored(in_namespace(lambda: die_and_live(machine, stage, 0), POINT))
    for number, at in enumerate(sorted(lot.choices(range(1, found.calls + 1), k=POINTS))):
        machine.lot = f"{lot.randrange(1 << 30)} {CHANCES[number % len(CHANCES)]}"
        found.points += 1
        try:
            in_namespace(lambda: die_and_live(machine, stage, at), POINT)  # noqa: B023 - called at once
        except AssertionError as error:
            found.wrong.append(f"power cut at call {at} (lot {machine.lot}): {error}")
    return found


@pytest.fixture
def root() -> Iterator[Path]:
    """Where a forgetful file system may be mounted."""
    lack(lacking() + (["root"] if os.geteuid() else []))
    with tempfile.TemporaryDirectory(prefix="forgetful-") as folder:
        yield Path(folder)


@pytest.mark.timeout(SHARD + 60)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("name", STAGES)
def test_power_cut_on_a_forgetful_file_system_loses_nothing(root: Path, name: str, shard: int) -> None:
    found = in_namespace(lambda: explore(root, name, shard), SHARD)
    print(f"forgetful, {name}: {found.points} cuts at {found.calls} calls")  # noqa: T201 - the amount is the result
    assert not found.wrong, f"{len(found.wrong)} of {found.points} points\n" + "\n".join(found.wrong[:3])
    assert found.calls >= STAGES[name]


# --- the file system itself


def after_a_cut(root: Path, act_on: str) -> dict[str, bytes]:
    """What is left in an empty file system where this happened before the cut, and nothing else survived."""

    def work() -> dict[str, bytes]:
        with serving(Tree(), root):
            ACTS[act_on](root)
            set_word(root, CUT, "1 0")
            set_word(root, RESTORE, "")
            return {path.name: path.read_bytes() for path in root.iterdir()}

    return in_namespace(work, POINT)


def write(root: Path, *synced: str) -> None:
    """A file of four bytes; `synced` may name it, and its folder."""
    file = os.open(root / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(file, b"1234")
    folder = os.open(root, os.O_RDONLY)
    for name in synced:
        os.fsync({"file": file, "folder": folder}[name])
    os.close(file)
    os.close(folder)


def link_unsynced(root: Path) -> None:
    write(root, "file", "folder")
    os.link(root / "file", root / "link")


def rewrite_unsynced(root: Path) -> None:
    write(root, "file", "folder")
    (root / "file").write_bytes(b"5678")


def unlink_unsynced(root: Path) -> None:
    write(root, "file", "folder")
    (root / "file").unlink()


ACTS = {
    "nothing synced": write,
    "file synced": lambda root: write(root, "file"),
    "folder synced": lambda root: write(root, "folder"),
    "both synced": lambda root: write(root, "file", "folder"),
    "link unsynced": link_unsynced,
    "rewrite unsynced": rewrite_unsynced,
    "unlink unsynced": unlink_unsynced,
}


@pytest.mark.parametrize(
    ("act", "left"),
    [
        ("nothing synced", {}),
        ("file synced", {}),
        ("folder synced", {"file": b""}),
        ("both synced", {"file": b"1234"}),
        ("link unsynced", {"file": b"1234"}),
        ("rewrite unsynced", {"file": b"1234"}),
        ("unlink unsynced", {"file": b"1234"}),
    ],
)
def test_forgetful_file_system_keeps_what_was_synced_and_no_more(root: Path, act: str, left: dict[str, bytes]) -> None:
    assert after_a_cut(root, act) == left


def test_index_with_another_synchronous_loses_what_it_committed(root: Path) -> None:
    """Why `synchronous=FULL`: the switch sees the difference."""

    def rows(synchronous: str) -> list[tuple[int]]:
        with serving(Tree(), root):
            with closing(sqlite3.connect(root / "index.db", isolation_level=None)) as index:
                index.execute("PRAGMA journal_mode=WAL")
                index.execute(f"PRAGMA synchronous={synchronous}")
                index.execute("CREATE TABLE t (a)")
                index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                index.execute("INSERT INTO t VALUES (1)")
                set_word(root, CUT, "1 0")
            set_word(root, RESTORE, "")
            with closing(sqlite3.connect(root / "index.db")) as index:
                return index.execute("SELECT a FROM t").fetchall()

    assert in_namespace(lambda: rows("FULL"), POINT) == [(1,)]
    assert in_namespace(lambda: rows("NORMAL"), POINT) == []
