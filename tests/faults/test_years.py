"""Simulated years: whatever befalls the mirror of a practice, nothing is lost, misfiled, overwritten or left behind.

One that failed is lived once more by the command that it printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.perils import Crash, Machine
from tests.faults.years import Year
from tests.small import HOUR, Small, backfilling, serving, small
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NIGHTLY = os.environ.get("SYNCD_FAULTS") == "nightly"
SEEDS = range(1, 101 if NIGHTLY else 11)
CRASHES, FAULTS = 200, 1000  # a year with fewer would prove little
RAM = Path("/dev/shm")


@pytest.fixture
def ram_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that costs no disk's time, where the machine has one."""
    with tempfile.TemporaryDirectory(dir=RAM if os.access(RAM, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def live(folder: Path, seed: int, tell: Callable[[str, object], None]) -> Year:
    print(f"once more: SYNCD_YEAR_SEED={seed} .venv/bin/pytest -s tests/faults/test_years.py -k one_seed")  # noqa: T201 - shown when it fails
    year = Year(folder, seed)
    year.live(days=365)
    tell("figures", year.figures())
    return year


@pytest.mark.parametrize("seed", SEEDS)
def test_year_of_crashes_and_faults_loses_nothing(
    ram_disk: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    year = live(ram_disk, seed, record_property)
    assert year.crashes >= CRASHES
    assert year.faults >= FAULTS
    assert year.faults >= 0.01 * year.world.turns


def test_one_seed_that_is_asked_for_loses_nothing(
    ram_disk: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = int(os.environ.get("SYNCD_YEAR_SEED", "0"))
    if seed:
        live(ram_disk, seed, record_property)


TRACE = """
import sys
from pathlib import Path
from tests.faults.years import Year
year = Year(Path(sys.argv[1]), seed=int(sys.argv[2]))
year.live(days=20)
sys.stdout.write(year.trace)
"""


def test_one_seed_is_one_trace_in_any_process(ram_disk: Path) -> None:
    def trace(seed: int, hash_seed: int) -> str:
        folder = ram_disk / f"{seed}-{hash_seed}"
        folder.mkdir()
        environ = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        call = [sys.executable, "-c", TRACE, str(folder), str(seed)]
        return subprocess.run(call, env=environ, check=True, capture_output=True, text=True).stdout

    first, again, other = trace(3, 1), trace(3, 2), trace(4, 1)
    assert len(first) == len(other) > 0
    assert first == again
    assert first != other


# --- what the years found, each by itself


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def dies(world: World, machine: Machine, calls: int) -> bool:
    """Run until the process is gone after so many calls that matter, or until there is nothing to do."""
    machine.start_again()
    machine.die_in(calls)
    machine.running = True
    try:
        world.run()
    except Crash:
        return True
    finally:
        machine.running = False
        machine.start_again()
    return False


def test_crash_at_any_call_around_a_refusal_leaves_no_duty_that_nobody_takes_up(
    tmp_path: Path, machine: Machine
) -> None:
    after_the_refusal = 0
    for calls in range(1, 120):
        one = small()
        world = backfilling(tmp_path / str(calls), one)
        refusal = world.office.faults.add("site_error", **one.request("document"))
        assert dies(world, machine, calls)
        after_the_refusal += refusal.fired
        sql = "SELECT 1 FROM duty WHERE busy = 1 AND (pat_num, method, num) NOT IN"
        assert world.index.value(f"{sql} (SELECT pat_num, method, num FROM attempt WHERE state != 'cleaning')") is None
        world.stop()
    assert after_the_refusal > 20


@pytest.mark.parametrize("then", ["changed", "moved"])
def test_version_that_a_dead_process_had_published_is_recorded_though_its_document_is(
    tmp_path: Path, machine: Machine, then: str
) -> None:
    world, one, _ = dead_before_the_record(tmp_path, machine, lambda one: one.document)
    world.site.files.clear()  # somebody tidied the drop: what was placed cannot be pulled again
    if then == "changed":
        one.practice.replace_bytes(one.document)
    else:
        one.practice.move_document(one.document, one.other, keep_number=True)
    world.restart()
    while world.index.value("SELECT 1 FROM attempt WHERE state = 'placed'"):
        world.lanes.pull_lane.turn(world.clock.now())
        world.clock.advance(20)
    world.index.run("UPDATE duty SET next_try_at = ?", world.clock.now() + HOUR)  # lists are read before it is tried
    key, came = (one.patient, "document", one.document), "current_version" if then == "changed" else "vanished_at"
    world.run(until=lambda: world.has(*key) and (world.item(*key)[came] or 0) > 1)
    sql = "SELECT count(*) FROM version WHERE pat_num = ? AND kind = ? AND num = ? AND version = 1"
    assert world.index.value(sql, *key) == 1  # at once, and not only when the scrub comes by
    world.run(hours=60)
    world.check()


def test_upload_that_a_dead_process_had_published_is_recorded_though_somebody_opened_it(
    tmp_path: Path, machine: Machine
) -> None:
    def uploaded(one: Small) -> int:
        return one.practice.add_raw_document(one.patient, b"PatNum=1 uploaded\r\n", ".txt")

    world, one, upload = dead_before_the_record(tmp_path, machine, uploaded)
    one.practice.materialise(upload)
    world.restart()
    sql = "SELECT count(*) FROM version WHERE kind = 'document' AND num = ?"
    assert world.index.value(sql, upload) == 1
    world.run(hours=60)
    world.check()


def dead_before_the_record(folder: Path, machine: Machine, which: Callable[[Small], int]) -> tuple[World, Small, int]:
    """A process that died when that document's file was in the archive and its row was not in the index."""
    for calls in range(1, 400):
        one = small()
        num = which(one)
        world = serving(folder / str(calls), one)
        assert dies(world, machine, calls), "there is no such moment"
        sql = "SELECT count(*) FROM version WHERE kind = 'document' AND num = ?"
        if world.media(one.patient, "document", num) and not world.index.value(sql, num):
            return world, one, num
        world.stop()
    raise AssertionError("there is no such moment")
