"""[hook]: the program hears of each version at least once, in order; the mirror never waits for it."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from syncd import hook, notifier
from syncd.backfill import hook_thread
from syncd.hook import TRIES
from syncd.published import PATH
from syncd.report import Budget, Surroundings, status
from syncd.schema import Row
from tests.small import Small, small, troubles
from tests.test_cli import Desk, practice, wait_until
from tests.test_notifier import script
from tests.world import World

NAMES = ("Beispiel", "Erika")  # of the small practice's second patient


@pytest.fixture
def one() -> Small:
    return small(documents=3)


def hooked(folder: Path, one: Small, command: str) -> World:
    """A mirror whose lanes have done their work; its hook has taken no turn yet."""
    world = World.start(folder, practice=one.practice, hook={"archived": script(command)})
    world.run()
    return world


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    started = hooked(tmp_path, one, f"cat >> {tmp_path}/told")
    yield started
    started.stop()


def told(folder: Path) -> list[Row]:
    """What the program was given, one line a call."""
    path = folder / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def poke(world: World, turns: int = 1) -> None:
    """So many turns, the waits in between are over at once."""
    assert world.lanes.hook is not None
    for _ in range(turns):
        world.clock.advance(3600.0)
        world.lanes.hook.turn(world.clock.now())


def seqs(world: World) -> list[int]:
    return [row["seq"] for row in world.index.rows("SELECT seq FROM version WHERE sidecar = 1 ORDER BY seq")]


def test_every_version_is_told_once_in_order_with_ids_and_path_and_no_name(
    world: World, tmp_path: Path, one: Small
) -> None:
    poke(world, 3)
    assert [row["seq"] for row in told(tmp_path)] == seqs(world)
    found = {row["seq"]: row for row in world.catalog().follow(0)}
    for row in told(tmp_path):
        assert row["archive"] == str(world.archive)
        assert {name: found[row["seq"]][name] for name in hook._TOLD} == {name: row[name] for name in hook._TOLD}
        assert row.keys() == {"schema_version", "archive", *hook._TOLD}
    text = (tmp_path / "told").read_text()
    for row in world.index.rows("SELECT description, file_name, category FROM item"):
        assert not [word for word in row.values() if word and word in text]
    assert not [name for name in NAMES if name in text]
    before = len(told(tmp_path))
    one.practice.replace_bytes(one.document)
    world.sweep()
    poke(world)
    assert [row["version"] for row in told(tmp_path)[before:] if row["kind"] == "document"] == [2]


@pytest.mark.parametrize("looks", [5, 6, 7])
def test_killed_process_tells_again_what_was_not_written_down_and_misses_none(
    tmp_path: Path, one: Small, looks: int
) -> None:
    world = hooked(tmp_path, one, f"cat >> {tmp_path}/told")
    assert world.lanes.hook is not None
    assert len(seqs(world)) > 6
    calls = iter(range(100))
    world.lanes.hook.turn(world.clock.now(), lambda: next(calls) > looks)  # ends in the midst of its versions
    done = len(told(tmp_path))
    assert 0 < done < len(seqs(world))
    world.restart()
    poke(world, 3)
    assert sorted({row["seq"] for row in told(tmp_path)}) == seqs(world)
    assert len(told(tmp_path)) <= len(seqs(world)) + 1
    world.stop()


@pytest.mark.parametrize(
    ("command", "failure"), [("exit 3", "exit 3"), ("exec sleep 60", "timeout"), ("cat >&- ; exit 1", "exit 1")]
)
def test_hook_that_fails_or_hangs_is_told_once_and_is_no_failure_of_any_item(
    tmp_path: Path, one: Small, command: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "PATIENCE", 0.3)
    world = hooked(tmp_path, one, command)
    poke(world, 2)
    assert [line["reason"] for line in world.log.events("state_changed") if line["level"] == "warning"] == [
        "hook_failing"
    ]
    assert troubles(world) == {"hook": "hook_failing"}
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.failing, facts.owed, failure in facts.troubles[0].detail) == ({}, 0, True)
    around = Surroundings("main", "1", Budget.of(world.settings, world.clock.now()), holder="run, pid 1")
    said = status(facts, around, world.clock.now())
    assert (said["state"], said["reason"], said["healthy"]) == ("degraded", "hook_failing", True)
    one.practice.replace_bytes(one.document)
    world.sweep()
    world.check()
    world.stop()


def test_hook_that_works_again_hears_of_everything_and_the_state_ends(tmp_path: Path, one: Small) -> None:
    world = hooked(tmp_path, one, f"test -e {tmp_path}/works && cat >> {tmp_path}/told")
    poke(world, 5)
    assert told(tmp_path) == []
    (tmp_path / "works").touch()
    poke(world, 3)
    assert [row["seq"] for row in told(tmp_path)] == seqs(world)
    assert troubles(world) == {}
    world.stop()


def test_version_that_the_program_cannot_take_holds_up_no_other_for_ever(tmp_path: Path, one: Small) -> None:
    poison = f'read -r line; case "$line" in *\'"seq": 2,\'*) exit 1;; esac; echo "$line" >> {tmp_path}/told'
    world = hooked(tmp_path, one, poison)
    poke(world, TRIES - 1)
    assert [row["seq"] for row in told(tmp_path)] == [1]
    poke(world, 3)
    assert [row["seq"] for row in told(tmp_path)] == [seq for seq in seqs(world) if seq != 2]
    (line,) = world.log.events("hook_gave_up")
    assert (line["seq"], line["failure"], troubles(world)) == (2, "exit 1", {})
    world.stop()


def test_version_that_is_recorded_late_is_told_late(world: World, tmp_path: Path) -> None:
    kept = world.index.rows("SELECT * FROM version WHERE seq = 3")[0]
    world.index.run("DELETE FROM version WHERE seq = 3")  # as a crash leaves it: published, and not recorded
    poke(world, 3)
    assert 3 not in [row["seq"] for row in told(tmp_path)]
    world.index.run(f"INSERT INTO version VALUES ({', '.join('?' * len(kept))})", *kept.values())
    poke(world)
    assert [row["seq"] for row in told(tmp_path)][-1] == 3
    assert sorted(row["seq"] for row in told(tmp_path)) == seqs(world)


def test_new_hook_hears_of_what_is_archived_from_then_on_and_one_taken_away_leaves_nothing(
    tmp_path: Path, one: Small
) -> None:
    world = World.start(tmp_path, practice=one.practice)
    world.run()
    assert (world.lanes.hook, world.index.meta("hook")) == (None, None)
    without = world.settings
    world.settings = hooked_settings = without.model_copy(
        update={"hook": without.hook.model_copy(update={"archived": tuple(script(f"cat >> {tmp_path}/told; exit 1"))})}
    )
    world.restart()
    poke(world)
    assert told(tmp_path) == []
    one.practice.replace_bytes(one.document)
    world.sweep()
    poke(world)
    assert {row["version"] for row in told(tmp_path) if row["kind"] == "document"} == {2}
    assert troubles(world) == {"hook": "hook_failing"}
    world.settings = without
    world.restart()
    assert (troubles(world), world.index.meta("hook")) == ({}, None)
    assert hooked_settings.hook.archived
    world.stop()


def test_what_the_program_started_ends_with_it(tmp_path: Path) -> None:
    started = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    assert notifier.run_command(script(started), {}, 1.0) == "timeout"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_end_of_the_process_ends_a_call_that_hangs(tmp_path: Path) -> None:
    began = time.monotonic()
    assert notifier.run_command(script("exec sleep 60"), {}, 50.0, over=lambda: time.monotonic() > began + 0.3)
    assert time.monotonic() - began < 40


def test_thread_lives_through_an_index_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def turn(*_: object) -> float:
        end.set()
        raise ZeroDivisionError

    monkeypatch.setattr(hook.Hook, "turn", turn)
    (thread,) = hook_thread(world.lanes, end)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert [line["where"] for line in world.log.events("turn_failed")] == ["hook"]


# --- real processes


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with practice(patients=2) as simulation:
        yield Desk(simulation, tmp_path)


def with_hook(desk: Desk, command: str) -> None:
    with desk.file.open("a") as file:
        file.write(f"\n[hook]\narchived = {json.dumps(script(command))}\n")


@pytest.mark.slow
def test_backfill_ends_when_the_hook_has_heard_of_everything_and_the_index_is_published(
    desk: Desk, tmp_path: Path
) -> None:
    with_hook(desk, f"cat >> {tmp_path}/told")
    assert desk.call("backfill").exit_code == 0
    found = sorted(row["seq"] for row in desk.found() if row["path"])
    assert [row["seq"] for row in told(tmp_path)] == found
    with closing(sqlite3.connect(f"{(desk.archive / PATH).as_uri()}?mode=ro", uri=True)) as db:
        assert [seq for (seq,) in db.execute("SELECT seq FROM versions ORDER BY seq")] == found


@pytest.mark.slow
def test_daemon_mirrors_beside_a_hook_that_hangs_and_takes_it_along_when_it_ends(desk: Desk, tmp_path: Path) -> None:
    with_hook(desk, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    with desk.process("run") as process:
        wait_until(lambda: len(list(desk.archive.glob("patients/*/*/*.json"))) > 3, 60)
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert desk.json("status")["failing"] == 0
