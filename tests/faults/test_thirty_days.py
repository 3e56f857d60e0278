"""Thirty days with outages: what the daemon writes and tells, day by day; and days without any, in large practices.

The daemon's own parts (lanes, log, status files, bell, upkeep) live under a simulated clock, without its threads.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from syncd import cli
from syncd.backfill import Stop
from syncd.daemon import Daemon
from syncd.errors import REASONS, SiteError, TransientError
from syncd.logs import open_logs
from syncd.notices import GOOD_FOR, LONGEST_STEP, MANY
from syncd.report import HEALTH_FACTOR, LIVELY, Budget, StatusFacts, floor_seconds, health, human_duration
from syncd.service import Lock, Systemd
from tests.bench.freshness import Case, Lane
from tests.bench.practice_model import MONDAY
from tests.faults.sweeping import NIGHTLY
from tests.small import DAY, HOUR
from tests.test_notifier import script
from tests.test_outages import InWorld, broken_drop, fault, full, read_only, unmounted
from tests.test_story_frozen import full_practice, pat_nums
from tests.world import START, RecordedLog, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

DAYS = 30
STEP, CALM_STEP = 300.0, 900.0  # seconds between two looks, and where nothing happens
CAP, KEEP = 60_000, 2  # bytes of one log, and how many old ones
AFTERMATH = 3 * HOUR  # until the last retry was made, and every list was read again
FLAPPING = 21  # the day on which something comes and goes
COMES_AND_GOES = HOUR

# day, hours after 9 o'clock, what, its reason, how many hours
CALENDAR: tuple[tuple[int, float, InWorld, str, float], ...] = (
    (2, 1, fault("econnector_down"), "econnector_down", 4),
    (4, 14, fault("cut"), "api_unreachable", 6),
    (6, 2, fault("key_revoked"), "key_refused", 50),
    (9, 3, broken_drop(TransientError("drop_unreachable")), "drop_unreachable", 3),
    (10, 20, lambda world, stack: unmounted(world.archive, stack), "archive_missing", 5),
    (12, 5, fault("status", status=502), "api_error", 3),
    (13, 4, broken_drop(SiteError("host_key_changed")), "host_key_changed", 30),
    (16, 1, full, "archive_full", 4),
    (17, 6, fault("too_many"), "throttled_long", 5),
    (18, 8, fault("html"), "bad_answers", 5),
    (20, 0, fault("two_econnectors"), "econnector_twice", 3),
    (24, 3, read_only, "archive_read_only", 26),
    (27, 2, broken_drop(SiteError("drop_refused")), "drop_refused", 4),
)


@dataclass
class Service:
    """The daemon without its threads; looks at itself every five minutes."""

    world: World
    folder: Path
    daemon: Daemon = field(init=False)
    looks: list[tuple[float, bool, str]] = field(default_factory=list)  # when, health, reason
    patients: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.patients = cycle(pat_nums(self.world))
        self.start()

    def start(self) -> None:
        """As after a restart of the process."""
        log = open_logs(self.world.settings, {}, verbose=-1, now=self.world.clock.now)
        self.world.log = cast("RecordedLog", log)
        self.world.restart()
        describe = partial(cli._describe, self.world.settings, self.world.index)
        self.daemon = Daemon(self.world.lanes, Stop(), Systemd({}), describe)

    def live(self, hours: float, step: float = STEP) -> None:
        """So long; what the scheduler marks by the hour comes by the hour."""
        world, daemon = self.world, self.daemon
        for _ in range(round(hours * HOUR / step)):
            end = world.clock.now() + step
            while (now := world.clock.now()) < end:
                world.clock.advance(min(world._both_turns() or step / 4, end - now))
            for part in ("api", "pull"):
                daemon._pulse.works(part)
            daemon._pulse.beat()
            daemon._ticked()
            daemon._glance()
            said = json.loads((world.settings.log_path / "status.json").read_text())
            self.looks.append((now, said["healthy"], said["reason"]))
            if now % HOUR < step:
                daemon._mark_upkeep()
                daemon._tell(report=True)
            if now % (6 * HOUR) < step:
                self._scan()

    def _scan(self) -> None:
        """Another patient's each time, lest one list becomes a long one."""
        with self.world.practice.as_of(self.world.clock.now() - HOUR):
            self.world.practice.add_document(next(self.patients), "jpg")

    def until(self, day: int, hours: float) -> None:
        """Nothing happens until then but what follows from what was."""
        self.live(AFTERMATH / HOUR)
        self.live((START + day * DAY + hours * HOUR - self.world.clock.now()) / HOUR, CALM_STEP)

    def letters(self) -> list[dict[str, Any]]:
        """What [notify] command got; it is called in a thread of its own."""
        deadline = time.monotonic() + 20
        while not self.daemon._bell._waiting.empty() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        return [json.loads(line) for line in (self.folder / "letters").read_text().splitlines()]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Thirty days later."""
    quiet = {"change_feed": "off", "appointments": "off", "kinds": ["document", "sheet"]}
    command = script(f"cat >> {tmp_path}/letters; echo >> {tmp_path}/letters")
    capped = {"max_size": f"{CAP} B", "keep": KEEP}
    world = World.start(
        tmp_path, practice=full_practice(), interval=120.0, sync=quiet, notify={"command": command}, log=capped
    )
    world.run()
    with pytest.MonkeyPatch.context() as patch, Lock(world.settings.state_path, "run"):
        patch.setattr(cli, "SystemClock", lambda: world.clock)
        lived = Service(world, tmp_path)
        for day, hour, happens, _, hours in CALENDAR:
            if day > FLAPPING > lived.world.clock.now() / DAY - START / DAY:
                flap(lived)
            lived.until(day, hour)
            with ExitStack() as stack:
                happens(world, stack)
                lived.live(hours)
        lived.until(DAYS, 0)
        yield lived
    world.stop()


def flap(service: Service) -> None:
    """A day on which Open Dental comes and goes; the service is restarted in its midst."""
    service.until(FLAPPING, 0)
    for again in range(6):
        with ExitStack() as stack:
            fault("status", status=500)(service.world, stack)
            service.live(COMES_AND_GOES / HOUR)
        service.live(COMES_AND_GOES / HOUR)
        if again == 2:
            service.start()


def at(letter: dict[str, Any]) -> float:
    return dt.datetime.fromisoformat(letter["at"]).timestamp()


def spans() -> list[tuple[float, float]]:
    """From the beginning of each outage to the end of what follows from it."""
    found = [(START + day * DAY + hour * HOUR, hours * HOUR) for day, hour, _, _, hours in CALENDAR]
    found.append((START + FLAPPING * DAY, 12 * COMES_AND_GOES))
    return [(begins, begins + lasts + AFTERMATH) for begins, lasts in found]


def every_log_keeps_its_cap_and_was_rotated(service: Service) -> None:
    for name in ("syncd.log", "status.log"):
        sizes = [path.stat().st_size for path in service.world.settings.log_path.glob(f"{name}*")]
        assert len(sizes) == KEEP + 1
        assert max(sizes) <= CAP


def status_log_reads_as_reports_in_80_columns(service: Service) -> None:
    texts = [path.read_text() for path in sorted(service.world.settings.log_path.glob("status.log*"), reverse=True)]
    reports = re.split(r"^(?=main: )", "".join(texts), flags=re.MULTILINE)[1:]
    told = [re.match(r"main: (OK|CATCHING UP|DEGRADED|BLOCKED) \(([a-z_]+)\)\n", each) for each in reports]
    assert len(reports) > 48
    assert {match[2] for match in told if match} <= REASONS.keys()
    times = [dt.datetime.fromisoformat(re.findall(r"^  as of (.*)$", each, re.MULTILINE)[0]) for each in reports]
    assert times == sorted(times)
    for report in reports:
        assert max(map(len, report.splitlines())) <= 80
        headings = [line.partition(":")[0] for line in report.splitlines() if re.match(r"[a-z]", line)]
        assert {"owed", "failing", "oldest list", "requests", "archive", "space", "this week"} <= set(headings)


def each_outage_is_told_once_a_day_and_its_end_is_told(service: Service) -> None:
    letters = service.letters()
    for day, hour, _, reason, hours in CALENDAR:
        begins = START + day * DAY + hour * HOUR
        mine = [each for each in letters if begins <= at(each) <= begins + hours * HOUR + AFTERMATH]
        told = [each["kind"] for each in mine if each["reason"] == reason]
        assert told == ["trouble", *["reminder"] * int((hours * HOUR - 1800) // DAY)], (reason, mine)
        (end,) = [each for each in mine if each["kind"] == "recovered" and reason in each["reasons"]]
        assert abs(end["lasted_seconds"] - hours * HOUR) <= AFTERMATH
        assert at(end) >= begins + hours * HOUR + GOOD_FOR - LONGEST_STEP  # from when it was last seen


def no_notice_is_repeated_within_a_day(service: Service) -> None:
    letters = [each for each in service.letters() if each["kind"] in ("trouble", "reminder")]
    flapped = START + FLAPPING * DAY
    calm = [each for each in letters if not flapped <= at(each) <= flapped + DAY]
    for reason in {each["reason"] for each in calm}:
        times = [at(each) for each in calm if each["reason"] == reason]
        assert all(later - earlier >= DAY for earlier, later in pairwise(times)), reason


def what_comes_and_goes_is_said_in_one_word_and_then_there_is_silence(service: Service) -> None:
    flapped = START + FLAPPING * DAY
    told = [each["kind"] for each in service.letters() if flapped <= at(each) <= flapped + DAY]
    assert told == [*["trouble", "recovered"] * (MANY // 2), "flapping"]


def health_is_red_in_outages_and_never_on_a_good_day(service: Service) -> None:
    bad = spans()
    good_days = [look for look in service.looks if not any(begins <= look[0] <= ends for begins, ends in bad)]
    assert len(good_days) > 15 * DAY / CALM_STEP
    assert [look for look in good_days if not look[1]] == []
    for day, hour, _, reason, hours in CALENDAR:
        begins = START + day * DAY + hour * HOUR
        late = [look for look in service.looks if begins + LIVELY + HOUR < look[0] < begins + hours * HOUR]
        assert late
        assert not any(healthy for _, healthy, _ in late), reason


def nothing_is_lacking_after_all_that_and_the_drills_were_passed(service: Service) -> None:
    service.world.run(hours=26)
    service.world.check()
    facts = service.world.catalog().status_facts(service.world.clock.now())
    assert facts.chores["drill"].passed
    assert facts.chores["drill"].done_at > START + 21 * DAY  # type: ignore[operator]
    assert facts.archived_this_week > 20


CLAIMS = (
    every_log_keeps_its_cap_and_was_rotated,
    status_log_reads_as_reports_in_80_columns,
    each_outage_is_told_once_a_day_and_its_end_is_told,
    no_notice_is_repeated_within_a_day,
    what_comes_and_goes_is_said_in_one_word_and_then_there_is_silence,
    health_is_red_in_outages_and_never_on_a_good_day,
    nothing_is_lacking_after_all_that_and_the_drills_were_passed,
)


def test_thirty_days_are_written_down_and_told_as_promised(service: Service, subtests: pytest.Subtests) -> None:
    for claim in CLAIMS:
        with subtests.test(claim.__name__):
            claim(service)


# --- large practices, in the model of the freshness benchmark


@pytest.mark.parametrize("patients", [3_000, *([10_000, 30_000] if NIGHTLY else [])])
def test_health_is_never_red_on_a_good_day_of_a_large_practice(
    patients: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lane = Lane(Case("syncd", 1.0, patients, judged=(MONDAY + DAY, MONDAY + 5 * DAY)))
    outcome, now = lane.run(), MONDAY + 5 * DAY
    pages = sum(rows // 100 + 1 for rows in lane.practice.rows.values())
    oldest = now - outcome.longest_gap
    facts = StatusFacts(patients=patients, lists=2 * patients, sweep_requests=pages, oldest_polled_at=oldest)
    floor = floor_seconds(facts, Budget(1.0, 1.0, 1.0))
    healthy, line = health({"state": "ok", "reason": "ok", "message": ""}, facts, None, floor, now)
    with capsys.disabled():
        gap, limit = human_duration(outcome.longest_gap), human_duration(HEALTH_FACTOR * floor)
        print(f"\n{patients:>6,} patients: the longest that a list waited on working days {gap}, limit {limit}")  # noqa: T201
    assert healthy, line
    assert outcome.longest_gap > 0.9 * lane.policy.floor  # else it proves nothing: some list waits as long as it may
