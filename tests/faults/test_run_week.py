"""The daemon itself over a week of a busy office: its threads and its scheduler, real HTTP and real SFTP, and a clock
that runs ten thousand times as fast.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from syncd import cli, config, wiring, wishes
from syncd.backfill import Stop
from syncd.catalog import Catalog
from syncd.config import Settings
from syncd.daemon import Daemon
from syncd.demo.build import Past, build_practice
from syncd.demo.simulation import Simulation
from syncd.index import Index
from syncd.logs import open_logs
from syncd.mirror import Scope
from syncd.service import Systemd, read_credentials
from tests.test_story_week import staff
from tests.truth import Expected, Findings, compare_archive

pytestmark = [pytest.mark.racing, pytest.mark.timeout(400)]

SPEED = 10_000.0
HOUR = 3600.0
DAYS = 7
MOUNTS_AGAIN = 90  # days: a change inside an old mount shows only when the mount is fetched by its age
SETTLED_WITHIN = 20  # days


class RacingClock:
    """Time for the daemon and for the practice: SPEED seconds pass in each real one."""

    def __init__(self) -> None:
        self._epoch, self._began = time.time(), time.monotonic()

    def now(self) -> float:
        return self._epoch + (time.monotonic() - self._began) * SPEED

    def steady(self) -> float:
        return self.now() - self._epoch + 1000.0

    def leap(self, seconds: float) -> None:
        """Nothing happens for so long, in no time."""
        self._began -= seconds / SPEED

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds) / SPEED)

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds / SPEED, action)
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def running(settings: Settings, clock: RacingClock) -> Iterator[None]:
    """`syncd run`, in a thread of its own."""
    credentials, log, stop = read_credentials(settings), open_logs(settings, {}, verbose=-1, now=clock.now), Stop()
    api, drop = wiring.open_api(settings, credentials), wiring.open_drop(settings, credentials)
    lanes = wiring.build(settings, clock, log, Scope(), api, drop)
    daemon = Daemon(lanes, stop, Systemd({}), partial(cli._describe, settings, lanes.index))
    thread = threading.Thread(target=daemon.run, daemon=True)
    thread.start()
    try:
        yield
        assert thread.is_alive(), "the daemon ended by itself"
    finally:
        stop(terminated=True)
        thread.join(20)
        lanes.close()
    assert not thread.is_alive()


def test_daemon_mirrors_a_busy_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rng, expected = RacingClock(), random.Random(4), Expected()
    monkeypatch.setattr(cli, "SystemClock", lambda: clock)
    practice = build_practice(5, 4, clock, past=Past(documents=3, mounts=0.4))
    simulation = Simulation.start(practice=practice, clock=clock)
    try:
        path = simulation.write_config(tmp_path / "config")
        settings = config.parse(path.read_text(), name="main", folder=path.parent, environ={})
        settings.log_path.mkdir(parents=True, exist_ok=True)
        settings.archive.path.mkdir()
        with running(settings, clock), contextlib.closing(Index(settings.state_path / "index.db")) as index:

            def found() -> Findings:
                expected.note(practice)
                kinds = settings.sync.kinds
                return compare_archive(index, settings.archive.path, practice, expected, kinds)

            def owed() -> int:
                return Catalog(index).status_facts(clock.now()).owed

            began = clock.now()
            while clock.now() < began + DAYS * 24 * HOUR:
                staff(practice, rng)
                expected.note(practice)
                clock.sleep(2 * HOUR * rng.random() * 2)
            assert not found().wrong
            patient = int(practice.rows("SELECT PatNum FROM patient WHERE PatStatus = 0")[0]["PatNum"])
            photo = practice.add_document(patient, "jpg")  # a loaded machine sees few days' work: this much is certain
            end = clock.now() + SETTLED_WITHIN * 24 * HOUR
            while (
                not index.value("SELECT 1 FROM version WHERE kind = 'document' AND num = ?", photo)
                and clock.now() < end
            ):
                clock.sleep(6 * HOUR)
            practice.replace_bytes(photo)
            clock.leap(MOUNTS_AGAIN * 24 * HOUR)
            end = clock.now() + SETTLED_WITHIN * 24 * HOUR
            while (found().lacking or owed()) and clock.now() < end:
                for row in index.rows("SELECT id FROM guard WHERE state = 'held'"):  # so much is moved here in a day
                    wishes.make(index, "approve", f"guard-{row['id']}", clock.now())
                clock.sleep(6 * HOUR)
            last = found()
            assert not last.wrong + last.lacking, "\n".join(last.wrong + last.lacking)
            assert owed() == 0
            versions = cast("int", index.value("SELECT count(*) FROM version WHERE version > 1 AND sidecar = 1"))
            assert versions, "the week brought no new bytes"
    finally:
        simulation.stop()
    assert not [line for line in _events(settings) if "turn_failed" in line]


def _events(settings: Settings) -> list[str]:
    return (settings.log_path / "syncd.log").read_text().splitlines()
