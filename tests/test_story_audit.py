"""Who did what: one line for everything that is stored, marked, decided or looked at, whatever happens on the way."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from syncd import wishes
from syncd.audit import Appender, AuditLog
from syncd.backfill import Stop
from syncd.daemon import Daemon
from syncd.demo.build import Past, build_practice
from syncd.index import Index
from syncd.report import blocks
from syncd.schema import Row
from syncd.scrub import adopt_newer
from syncd.service import Systemd
from syncd.sites import settle_audit
from syncd.wiring import open_audit
from tests.small import DAY, Small, serving, small, troubles, verdict
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

CANARY = "Mustermann-Canary"


class Crash(BaseException):
    """The process is gone."""


@pytest.fixture
def one() -> Small:
    return small()


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    world = serving(tmp_path, one)
    yield world
    world.stop()


def told(world: World, verb: str) -> list[Row]:
    """The lines of one verb, out of the log itself."""
    return [facts for facts in open_audit(world.settings).facts() if facts["verb"] == verb]


def waiting(world: World) -> int:
    return int(world.index.value("SELECT count(*) FROM audit_entry"))


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """From now on this call of the operating system fails for the audit log, and for nothing else."""
    real: Callable[..., Any] = getattr(os, name)
    append = Appender.append

    def appended(self: Appender, *args: Any) -> Any:
        def fails(*_: Any, **__: Any) -> Any:
            raise error

        setattr(os, name, fails)
        try:
            return append(self, *args)
        finally:
            setattr(os, name, real)

    monkeypatch.setattr(Appender, "append", appended)


# --- what the mirror does


def test_every_version_has_one_line_in_the_order_of_their_numbers(world: World, one: Small) -> None:
    world.run()
    one.practice.replace_bytes(one.document)
    one.practice.edit_document(one.letter)  # a new revision with equal bytes: one more sidecar
    world.run(hours=3)
    stored = told(world, "stored")
    assert [line["seq"] for line in stored] == list(range(1, len(stored) + 1))
    assert {line["actor"] for line in stored} == {"daemon"}
    assert [line["sidecar"] for line in stored if line["item"] == f"{one.other}/document-{one.letter}"] == [1, 2]
    assert [line["version"] for line in stored if line["item"] == f"{one.patient}/document-{one.document}"] == [1, 2]
    world.check()


def test_item_that_vanishes_has_one_line_at_the_time_it_was_marked(world: World, one: Small) -> None:
    world.run()
    one.practice.delete_mount(one.mount)
    world.run(hours=60)
    gone = world.index.rows("SELECT pat_num, kind, num, vanished_at FROM item WHERE vanished_at IS NOT NULL")
    assert len(gone) == 4
    marked = {f"{row['pat_num']}/{row['kind']}-{row['num']}": row["vanished_at"] for row in gone}
    lines = {line["item"]: dt.datetime.fromisoformat(line["at"]).timestamp() for line in told(world, "vanished")}
    assert lines == pytest.approx(marked, abs=0.001)
    assert len(told(world, "vanished")) == 4
    world.check()


def test_item_that_moved_says_where(world: World, one: Small) -> None:
    world.run()
    number = one.practice.move_document(one.document, one.other, keep_number=True)
    world.run(hours=3)
    (line,) = (line for line in told(world, "vanished") if line["item"].endswith(f"/document-{one.document}"))
    assert line["became"] == f"{one.other}/document-{number}"


def test_what_a_guard_holds_and_who_let_it_happen_is_told(world: World, one: Small) -> None:
    for _ in range(24):
        one.practice.add_sheet(one.patient)
    world.run()
    world.office.faults.add("empty", path="/sheets", params={"PatNum": one.patient}, times=None)
    world.run(hours=2)
    (held,) = told(world, "guard_held")
    assert (held["guard"], held["scope"], held["count"]) == ("guard-1", f"patient-{one.patient}", 25)
    wishes.make(world.index, "approve", "guard-1", world.clock.now(), "uid-0 login-1000")
    world.run(hours=1)
    (ended,) = told(world, "guard_ended")
    assert (ended["guard"], ended["state"], ended["actor"]) == ("guard-1", "approved", "uid-0 login-1000")


def test_other_database_is_a_hold_like_any_other(world: World, one: Small) -> None:
    for _ in range(4):
        one.practice.add_document(one.patient, "png")
    world.run()
    world.swap_practice(build_practice(6, 99, world.clock, past=Past(documents=3.0)))
    world.restart()
    world.run(hours=1)
    (guard,) = world.index.rows("SELECT id, items FROM guard WHERE scope = 'database'")
    (held,) = told(world, "guard_held")
    assert (held["scope"], held["guard"], held["count"]) == ("database", f"guard-{guard['id']}", guard["items"])


def test_retry_tells_who_wanted_which_items(world: World, one: Small) -> None:
    world.run()
    wishes.make(world.index, "retry", [[one.patient, "document", one.document]], world.clock.now(), "uid-7")
    wishes.make(world.index, "retry", [], world.clock.now(), "uid-8")
    wishes.make(world.index, "backfill", [one.other], world.clock.now(), "uid-9")
    world.run(hours=1)
    named, everything = told(world, "retry")
    assert (named["actor"], named["items"]) == ("uid-7", [f"{one.patient}/document-{one.document}"])
    assert (everything["actor"], "items" in everything) == ("uid-8", False)
    assert [(line["actor"], line["pat_nums"]) for line in told(world, "backfill")] == [("uid-9", [one.other])]


def test_wish_that_was_refused_left_nothing_behind_and_no_line(world: World, one: Small) -> None:
    world.run()
    number = wishes.make(
        world.index, "retry", [[one.patient, "document", one.document], [one.patient, "document", 9999]], 0.0
    )
    world.run(seconds=120)
    assert str(wishes.outcome(world.index, number)).startswith("refused")
    assert told(world, "retry") == []
    assert world.index.value("SELECT 1 FROM duty WHERE why = 'repair'") is None


def test_no_line_names_anybody(world: World, one: Small) -> None:
    one.practice.add_document(one.patient, "pdf", description=CANARY)
    one.practice.add_patient(CANARY, CANARY)
    world.run()
    text = "".join(path.read_text() for path in (world.settings.log_path / "audit").glob("*.log"))
    assert len(text.splitlines()) > 5
    assert CANARY not in text
    assert "Beispiel" not in text
    assert "?" not in text  # nothing had to be blanked


def test_batch_is_one_append(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    append = Appender.append

    def counted(self: Appender, entries: Any, *rest: Any) -> Any:
        sizes.append(len(entries))
        return append(self, entries, *rest)

    world.run()
    one = world.index.value("SELECT count(*) FROM version")
    with world.index.transaction():
        for number in range(1200):
            world.index.record("stored", world.clock.now(), seq=number)
    monkeypatch.setattr(Appender, "append", counted)
    world.run(seconds=60)
    assert sizes == [500, 500, 200]
    assert open_audit(world.settings).verify().lines == one + 1200


# --- crashes and full disks


def test_crash_at_any_call_of_the_audit_log_leaves_one_line_for_each(world: World) -> None:
    world.run()
    audit, clock, points = open_audit(world.settings), world.clock, 0
    while True:
        points += 1
        world.index.record("find", clock.now(), "uid-1", count=points)
        world.index.record("show", clock.now(), "uid-1", count=points)
        with pytest.MonkeyPatch.context() as patch:
            blow_at(patch, points)
            try:
                settle_audit(world.index, audit, clock.now())
                break
            except Crash:
                pass
        settle_audit(world.index, audit, clock.now())
        for verb in ("find", "show"):
            assert [line["count"] for line in told(world, verb)] == list(range(1, points + 1))
        world.check_audit()
    assert points > 4


def blow_at(patch: pytest.MonkeyPatch, at: int) -> None:
    """The process is gone at the `at`-th call that opens, writes or syncs a file, or writes to the index."""
    calls = 0

    def fused(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise Crash
            return real(*args, **kwargs)

        return call

    for name in ("open", "write", "fsync"):
        patch.setattr(os, name, fused(getattr(os, name)))
    patch.setattr(Index, "run", fused(Index.run))


def test_crash_after_half_of_a_line_is_told_and_nothing_is_lost(world: World) -> None:
    world.run()
    path = next((world.settings.log_path / "audit").glob("*.log"))
    whole = path.read_bytes()
    world.index.record("find", world.clock.now(), "uid-1", count=1)
    settle_audit(world.index, open_audit(world.settings), world.clock.now())
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole)  # once more, and now the process dies halfway
    facts = json.loads(line)
    world.index.run("UPDATE meta SET value = ? WHERE key = 'audit_head'", f"{facts['n'] - 1} {facts['prev']}")
    world.index.record("find", world.clock.now(), "uid-1", entry=facts["entry"], count=1)
    path.write_bytes(whole + line[:40])
    world.check_audit()
    world.run(seconds=60)
    assert len(told(world, "find")) == 1
    assert len(told(world, "torn")) == 1
    world.check_audit()


def test_full_log_disk_is_a_state_stops_nothing_and_loses_no_line(
    world: World, one: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "write", OSError(errno.ENOSPC, "No space left on device"))
        world.run(hours=2)
        assert troubles(world) == {"audit": "log_unwritable"}
        assert waiting(world) == world.index.value("SELECT count(*) FROM version") > 6
        assert told(world, "stored") == []
        one.practice.delete_document(one.document)
        world.run(hours=30)
        world.check()  # everything was mirrored all the same
        assert not any(map(blocks, world.catalog().status_facts(world.clock.now()).troubles))
        assert verdict(world) in (None, 0)
        before = waiting(world)
    world.run(hours=2)
    assert troubles(world) == {}
    assert waiting(world) == 0
    assert before == len(told(world, "stored")) + len(told(world, "vanished"))
    incidents = world.index.rows("SELECT reason, until_at FROM incident WHERE lane = 'audit'")
    assert [(row["reason"], row["until_at"] is not None) for row in incidents] == [("log_unwritable", True)]
    world.check()


def test_lines_that_were_not_synced_are_written_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "fsync", OSError(errno.EIO, "Input/output error"))
        world.run(hours=1)
        assert told(world, "stored") == []
    world.run(hours=2)
    world.check()


# --- another index


def test_index_rebuilt_from_the_archive_tells_nothing_twice(world: World, one: Small) -> None:
    world.run()
    for _ in range(5):  # so that what is told already is not among the last lines
        world.index.record("find", world.clock.now(), "uid-1", count=0)
    world.run(seconds=60)
    before = told(world, "stored")
    world.index.remember("last_seq", "0")  # as an index from a backup, from before everything
    world.index.run("DELETE FROM version")
    assert adopt_newer(world.lanes.pull_lane._doors, world.clock.now()) == len(before)
    assert waiting(world) == len(before)
    one.practice.add_document(one.patient, "jpg")
    world.run(hours=2)
    assert [line["seq"] for line in told(world, "stored")][: len(before)] == [line["seq"] for line in before]
    world.check()


def test_versions_that_the_log_does_not_tell_of_are_told_when_the_archive_is_taken_over(world: World) -> None:
    world.run()
    shutil.rmtree(world.settings.log_path / "audit")
    world.index.remember("audit_head", None)
    world.index.run("DELETE FROM version")
    world.index.remember("last_seq", "0")
    adopt_newer(world.lanes.pull_lane._doors, world.clock.now())
    world.run(hours=1)
    world.check()


def test_index_from_a_backup_goes_on_with_the_log_as_it_is(world: World, one: Small, tmp_path: Path) -> None:
    world.run()
    copy = tmp_path / "old.db"
    world.index.value("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(world.index.path, copy)
    one.practice.replace_bytes(one.document)
    world.run(hours=3)
    world.stop()
    for suffix in ("-wal", "-shm"):
        Path(f"{world.index.path}{suffix}").unlink(missing_ok=True)
    shutil.copy(copy, world.index.path)
    world.restart()
    world.run(hours=3)
    world.check()


def test_versions_taken_over_while_somebody_brings_the_log_up_to_date_wait(world: World) -> None:
    world.run()
    world.index.record("stored", world.clock.now(), entry="seq-1", seq=1)
    real = AuditLog.facts

    def meanwhile(self: AuditLog) -> Iterator[dict[str, Any]]:
        yield from real(self)
        if world.index.meta("audit_unsure") != "2":
            world.index.remember("audit_unsure", "2")
            world.index.record("stored", world.clock.now(), entry="seq-2", seq=2)

    world.index.remember("audit_unsure", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AuditLog, "facts", meanwhile)
        assert settle_audit(world.index, open_audit(world.settings), world.clock.now()) == 0
    assert waiting(world) == 0
    world.check_audit()


# --- the head in the journal


def test_daemon_tells_the_head_of_the_audit_log_once_a_day(world: World) -> None:
    world.run()
    (world.settings.state_path / "lock").touch()
    daemon = Daemon(world.lanes, Stop(), Systemd({}), lambda: ({}, ""))
    jobs = [job for job in daemon._scheduler().get_jobs() if job.trigger.interval.total_seconds() == DAY]
    for job in jobs:
        job.args[0]()
    head = open_audit(world.settings).head()
    assert world.log.events("audit_head") == [{"level": "info", "event": "audit_head", "n": head.n, "hash": head.hash}]
