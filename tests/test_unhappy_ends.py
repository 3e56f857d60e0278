"""Unhappy ends: two of us, a clock that is set, a network's disk, no descriptors, memory or terminal, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from syncd import wiring, wishes
from syncd.demo.build import Past
from syncd.demo.simulation import Simulation
from syncd.errors import ConfigError, SiteError
from syncd.logs import StatusFiles, open_logs
from syncd.report import SILENT
from syncd.service import Lock, SystemClock, network_file_system, owner_id
from tests.small import DAY, HOUR, backfilling, serving, settle, small, troubles, versions
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

YEAR = 365 * DAY

# --- the clock is set


@pytest.mark.parametrize("leap", [-HOUR, -DAY, -YEAR])
def test_clock_set_back_ends_every_wait_and_new_documents_still_arrive(tmp_path: Path, leap: float) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.run(hours=1)
    sent = len(world.office.arrivals)
    world.clock.set(world.clock.now() + leap)
    with one.practice.as_of(world.clock.now() - HOUR):
        number = one.practice.add_document(one.patient, "jpg")
    world.run(hours=3)
    assert world.has(one.patient, "document", number)
    assert world.files(one.patient, "document", number)
    assert world.log.events("clock_jumped")
    starts = [arrival.at for arrival in world.office.arrivals[sent:]]
    assert all(later - earlier >= 30.0 - 1e-6 for earlier, later in pairwise(starts)), "a burst of requests"
    assert set(versions(world)) == {1}
    world.stop()


@pytest.mark.parametrize("leap", [HOUR, DAY, YEAR])
def test_clock_set_forward_fetches_nothing_again_and_loses_nothing(tmp_path: Path, leap: float) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.run(hours=1)
    sent = len(world.office.arrivals)
    world.clock.set(world.clock.now() + leap)
    world.run(hours=3)
    world.clock.set(world.clock.now() - leap)
    world.run(hours=3)
    assert world.placements(since=sent) == []
    assert len(world.office.arrivals) - sent <= 6 * HOUR / 30.0 + 2
    assert world.index.value("SELECT count(*) FROM item WHERE vanished_at IS NOT NULL") == 0
    assert troubles(world) == {}
    world.stop()


def test_clock_set_forward_lets_nothing_vanish_before_its_time(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.office.faults.add("empty", path="/documents", params={"PatNum": one.other}, times=None)
    world.office.faults.add(
        "status", path=f"/documents/{one.letter}", status=404, text="Document not found", times=None
    )
    world.run(hours=2)
    assert world.item(one.other, "document", one.letter)["missing_since_at"] is not None
    world.clock.set(world.clock.now() + 2 * DAY)
    world.run(hours=3)
    assert world.state(one.other, "document", one.letter) != "vanished"
    world.stop()


def test_clock_set_back_while_syncd_was_down_is_put_right_at_the_start(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.clock.set(world.clock.now() - YEAR)
    world.restart()
    newest = world.index.value("SELECT max(polled_at) FROM list")
    assert newest <= world.clock.now()
    with one.practice.as_of(world.clock.now() - HOUR):
        number = one.practice.add_document(one.patient, "jpg")
    world.run(hours=3)
    assert world.files(one.patient, "document", number)
    world.stop()


@pytest.mark.parametrize(("age", "leap"), [(1.5, -2.0), (2.0, -1.5), (1.5, -1.5)])
def test_no_list_is_younger_after_the_clock_went_back(tmp_path: Path, age: float, leap: float) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.run(until=lambda: world.index.polled_at(one.patient, "sheets") > world.clock.now() - 60.0)
    world.clock.advance(age * HOUR)  # nothing is asked
    world.clock.set(world.clock.now() + leap * HOUR)
    before = len(world.office.arrivals)
    wishes.make(world.index, "retry", [[one.patient, "sheet", one.sheet]], world.clock.now())
    world.run(until=lambda: world.sent("/sheets/DownloadSftp", since=before))
    assert world.sent("/sheets", since=before, PatNum=one.patient), "placed from a list that nobody read lately"
    world.stop()


def test_guards_are_not_blind_until_a_time_that_the_clock_was_ahead_to(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0, nap=900.0)
    patient = world.practice.add_patient()
    sheets = [world.practice.add_sheet(patient) for _ in range(120)]
    world.run(hours=2)
    sql = "INSERT INTO guard (scope, reason, made_at, items, of_items, state, ended_at)"
    ended = world.clock.now() + YEAR
    world.index.run(f"{sql} VALUES ('all', 'disappearances_held', ?, 60, 120, 'approved', ?)", ended, ended)
    world.clock.set(world.clock.now() - HOUR)
    for number in sheets[:55]:
        world.practice.delete_sheet(number)
    world.run(hours=30)
    assert world.index.value("SELECT items FROM guard WHERE state = 'held'") == 55
    world.stop()


def test_placement_that_waits_while_the_clock_goes_back_is_made_from_a_new_listing(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    before = len(world.office.arrivals)
    world.office.faults.add("too_many", path="/sheets/DownloadSftp", seconds=3600.0)
    wishes.make(world.index, "retry", [[one.patient, "sheet", one.sheet]], world.clock.now())
    world.run(until=lambda: world.sent("/sheets/DownloadSftp", since=before))
    world.clock.advance(0.9 * HOUR)
    world.clock.set(world.clock.now() - 0.6 * HOUR)
    world.run(until=lambda: len(world.sent("/sheets/DownloadSftp", since=before)) > 1)
    refused = world.office.arrivals.index(world.sent("/sheets/DownloadSftp", since=before)[0])
    assert world.sent("/sheets", since=refused, PatNum=one.patient), "placed from a list that nobody read lately"
    world.stop()


def test_backfill_ends_although_the_clock_went_back(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small(documents=8))
    world.run(until=lambda: sum(versions(world)) >= 3)
    world.clock.set(world.clock.now() - DAY)
    settle(world)
    world.stop()


# --- two of us


def another_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on this machine has another id."""
    monkeypatch.setattr(wiring, "owner_id", lambda: name)


def test_archive_that_another_machine_took_over_is_not_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = small()
    another_machine(monkeypatch, "first")
    world = serving(tmp_path, one)
    world.run()
    wiring.open_archive(world.settings).take_over("second")  # as `reindex` there does
    with one.practice.as_of(world.clock.now() - HOUR):
        number = one.practice.add_document(one.patient, "jpg")
    world.run(hours=3)
    assert troubles(world) == {"archive": "archive_taken"}
    assert world.files(one.patient, "document", number) == []
    wiring.open_archive(world.settings).take_over("first")
    world.run(hours=3)
    assert troubles(world) == {}
    assert world.files(one.patient, "document", number)
    world.stop()


def test_copied_state_on_another_machine_is_refused_by_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_machine(monkeypatch, "first")
    world = serving(tmp_path, small())
    world.run()
    assert world.archive.exists()
    assert versions(world)
    before = sorted(path for path in world.archive.rglob("*") if path.is_file())
    another_machine(monkeypatch, "second")
    world.restart()
    world.run(hours=1)
    assert troubles(world) == {"archive": "archive_taken"}
    assert sorted(path for path in world.archive.rglob("*") if path.is_file()) == before
    world.stop()


def test_owner_of_an_archive_tells_machines_apart_and_not_their_id(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "two").write_text("fedcba9876543210fedcba9876543210\n")
    one, two = owner_id(tmp_path / "one"), owner_id(tmp_path / "two")
    assert one != two
    assert len(one) == 16
    assert one not in "0123456789abcdef0123456789abcdef"
    assert owner_id(tmp_path / "none") == ""


# --- a network's disk

MOUNTINFO = """\
22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
40 22 0:35 / /srv rw shared:2 - nfs4 nas:/export rw
41 40 8:2 / /srv/local\\040disk rw - xfs /dev/sdb1 rw
42 22 0:36 / /mnt rw - fuse.sshfs me@host: rw
43 22 0:37 / /media rw - ext4 /dev/sdc1 rw
44 22 0:38 / /media rw - cifs //nas/share rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/syncd", None),
        ("/srv/archive", "nfs4"),
        ("/srv/local disk/state", None),
        ("/srvother", None),
        ("/mnt/a/b", "fuse.sshfs"),
        ("/media/x", "cifs"),
    ],
)
def test_network_file_system_is_known_by_its_mount(tmp_path: Path, path: str, kind: str | None) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    assert network_file_system(Path(path), tmp_path / "mountinfo") == kind


def test_index_is_refused_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = serving(tmp_path, small())
    monkeypatch.setattr(wiring, "network_file_system", lambda path: "nfs4" if "state" in path.parts else None)
    with pytest.raises(ConfigError, match="nfs4"):
        wiring.open_index(world.settings)
    world.stop()


def test_real_mounts_of_this_machine_can_be_read(tmp_path: Path) -> None:
    assert network_file_system(tmp_path) is None


# --- the log


def test_lines_that_a_full_disk_swallowed_are_counted_and_nothing_stops(tmp_path: Path) -> None:
    world = serving(tmp_path, small())
    log = open_logs(world.settings, {}, verbose=-1)
    log.info("started", verb="run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        for _ in range(3):
            log.info("roster_read", count=1)
        assert not StatusFiles(world.settings.log_path).write_json({"state": "ok", "reason": "ok" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    log.info("roster_read", count=2)
    log.info("roster_read", count=3)
    lines = [json.loads(line) for line in (world.settings.log_path / "syncd.log").read_text().splitlines()]
    assert [line.get("lines_lost") for line in lines] == [None, 3, None]
    world.stop()


# --- real processes


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Simulation, Path]]:
    past = Past(documents=3.0, sheets=1.0, sigma=0.4, raw=0.0, urls=0.0, hostile_names=0.0, deleted=0.0)
    with Simulation.start(5, 3, 0.01, tmp_path / "site", past=past) as simulation:
        (tmp_path / "archive").mkdir()
        yield simulation, simulation.write_config(tmp_path / "main", tmp_path / "archive")


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "syncd.cli", "-c", str(config), *words]


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    """`syncd run`, once it holds the lock and gave its first sign of life."""
    state = wiring.load(config, {}).state_path
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(config, "run"), text=True, **pipes) as process:  # type: ignore[call-overload] # words
        try:
            end = time.monotonic() + 30
            while not ((holder := Lock(state).holder()) and holder.signs and "api" in holder.signs.parts):
                assert time.monotonic() < end
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def test_second_daemon_ends_with_11_and_a_killed_one_leaves_no_lock(site: tuple[Simulation, Path]) -> None:
    _, config = site
    with running(config) as first:
        second = subprocess.run(command(config, "run"), capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 11
        assert f"pid {first.pid}" in second.stderr
        first.kill()
        first.wait(10)
        assert Lock(wiring.load(config, {}).state_path).holder() is None
    with running(config) as third:
        third.terminate()
        assert third.wait(15) == 0


def test_stopped_daemon_is_not_responding_and_recovers(
    site: tuple[Simulation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner  # noqa: PLC0415 - only here

    from syncd.cli import cli  # noqa: PLC0415 - only here

    _, config = site

    def status() -> tuple[str, str, str]:
        said = json.loads(CliRunner().invoke(cli, ["-c", str(config), "status", "--json"]).stdout)
        return said["state"], said["reason"], said["who"]

    with running(config) as process:
        process.send_signal(signal.SIGSTOP)
        real = SystemClock.steady
        monkeypatch.setattr(SystemClock, "steady", lambda self: real(self) + SILENT + 5)
        assert status() == ("blocked", "not_responding", "practice_it")
        monkeypatch.setattr(SystemClock, "steady", real)
        process.send_signal(signal.SIGCONT)
        time.sleep(2.5)
        assert status()[1] != "not_responding"


def limited(which: int, amount: int, config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import resource, sys; resource.setrlimit({which}, ({amount}, {amount})); from syncd.cli import main; main()"
    )
    line = [sys.executable, "-c", code, "-c", str(config), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def whole(config: Path) -> None:
    done = subprocess.run(command(config, "backfill", "--no-progress"), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert subprocess.run(command(config, "verify"), capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("descriptors", [8, 16, 24, 32])
def test_few_descriptors_leave_no_half_state_and_are_no_internal_error(
    site: tuple[Simulation, Path], descriptors: int
) -> None:
    _, config = site
    words = ("backfill", "--no-progress", "--max-duration", "5s")  # else it waits for descriptors, minutes in all
    done = limited(resource.RLIMIT_NOFILE, descriptors, config, *words)
    assert done.returncode in (0, 3, 5, 9, 13, 78), done.stderr
    whole(config)


def test_closed_terminal_stops_nothing_and_no_file_takes_its_place(site: tuple[Simulation, Path]) -> None:
    _, config = site
    code = "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    line = [sys.executable, "-c", code, *command(config, "backfill", "--no-progress")[1:]]
    assert subprocess.run(line, timeout=60, check=False).returncode == 0
    whole(config)


def test_machine_without_descriptors_is_a_named_state(tmp_path: Path) -> None:
    world = serving(tmp_path, small())
    world.run()
    archive = wiring.open_archive(world.settings)
    held: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(SiteError) as caught:
            archive.free_bytes()
        with pytest.raises(SiteError) as pace, Lock(world.settings.state_path):
            pass
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (caught.value.reason, pace.value.reason) == ("resources_exhausted", "resources_exhausted")
    world.stop()


def test_answer_too_large_for_memory_is_asked_for_in_smaller_pieces_and_kills_nothing(
    site: tuple[Simulation, Path],
) -> None:
    simulation, config = site
    simulation.office.faults.add("huge", path="/documents", method="GET", size=60_000_000, times=2)
    with_room = 420 * 1024 * 1024
    done = limited(resource.RLIMIT_AS, with_room, config, "backfill", "--no-progress", "--max-duration", "20s")
    assert done.returncode in (0, 3, 5, 9), done.stderr
    whole(config)
