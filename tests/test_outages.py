"""Each outage by its name: what status, log, doctor and `health` say of it, and how soon. `pytest -s` shows the table.

What is outside fails for the lanes under a simulated clock, with the real API door where the network itself fails; what
is inside freezes in a real daemon whose clock the test steps. The doctor meets the same over real HTTP and real SFTP.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from paramiko import ECDSAKey

from syncd import doctor, errors
from syncd.api import OpenDentalApi, PlacementSite
from syncd.call import Call
from syncd.demo.practice import Practice
from syncd.demo.schema import READ_ALL
from syncd.errors import REASONS, SiteError, TransientError
from syncd.faces import line
from syncd.report import LIVELY, SILENT, Report, human_duration
from syncd.service import Lock
from tests import test_doctor
from tests.small import HOUR
from tests.test_catalogue_api import certificate
from tests.test_cli import Desk, practice
from tests.test_story_frozen import Running, a_daemon, new_document, seconds_until, synced, told
from tests.wire import listening
from tests.world import World

pytestmark = pytest.mark.slow

SOON = 900.0  # seconds
STEP = 60.0
INTERVAL = 15.0  # seconds from request to request
Check = dict[str, Any]
InWorld = Callable[[World, ExitStack], object]
AtDesk = Callable[[Desk, ExitStack], object]


@dataclass(frozen=True)
class Outage:
    """`world`: how it comes about under the simulated clock, `desk`: for the doctor, whose line is named `check`."""

    reason: str
    world: InWorld
    desk: AtDesk
    check: str
    within: float = SOON


@dataclass(frozen=True)
class Row:
    """What the table tells of one outage."""

    name: str
    reason: str
    noticed: float
    unhealthy: float | None
    status: str
    log: str
    doctor: Check

    def __str__(self) -> str:
        health = "stays 0" if self.unhealthy is None else f"8 after {human_duration(self.unhealthy)}"
        told = f"{self.doctor['check']}: {self.doctor['result']}: {self.doctor['message']} ({self.doctor['who']})"
        head = f"{self.name:<44}noticed after {human_duration(self.noticed):<12}health {health}"
        return f"{head}\n    status  {self.status}\n    log     {self.log}\n    doctor  {told}\n"


# --- how it comes about: for the lanes


def fault(kind: str, **details: Any) -> InWorld:
    def happens(world: World, stack: ExitStack) -> None:
        world.office.faults.add(cast("Any", kind), times=None, **details)
        stack.callback(world.office.faults.clear)

    return happens


def leads(world: World, stack: ExitStack, url: str) -> None:
    """The API's address leads there, over the real network."""
    doors, drop = world.lanes.api_lane.doors, world.settings.drop
    before = doors.api
    elsewhere = OpenDentalApi(url, "developer", "customer", PlacementSite(drop.address, drop.username, "password"))
    object.__setattr__(doors, "api", elsewhere)
    stack.callback(object.__setattr__, doors, "api", before)


def distrusted(stack: ExitStack) -> str:
    """The address of a server whose certificate nobody here trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    context.load_cert_chain(certificate(Path(folder), 30))
    port = stack.enter_context(listening(lambda link: context.wrap_socket(link, server_side=True).close()))
    return f"https://127.0.0.1:{port}/api/v1"


def broken_drop(error: SiteError | TransientError) -> InWorld:
    def happens(world: World, stack: ExitStack) -> None:
        world.drop.broken = error
        stack.callback(setattr, world.drop, "broken", None)
        new_document(world)

    return happens


def may_only_list(world: World, stack: ExitStack) -> None:
    stack.callback(setattr, world.office, "permissions", world.office.permissions)
    world.office.permissions = (READ_ALL,)
    new_document(world)


def office_reaches_no_site(world: World, stack: ExitStack) -> None:
    fault("site_error", path="*/DownloadSftp")(world, stack)
    for _ in range(6):
        new_document(world)


def unmounted(folder: Path, stack: ExitStack) -> None:
    away = folder.with_name("disk")
    folder.rename(away)
    folder.mkdir()

    def mounted_again() -> None:
        folder.rmdir()
        away.rename(folder)

    stack.callback(mounted_again)


def disk_says(stack: ExitStack, place: int, change: Callable[[int], int]) -> None:
    """What the kernel says of every disk."""
    real, patch = os.statvfs, stack.enter_context(pytest.MonkeyPatch.context())
    told = lambda at: os.statvfs_result([change(n) if i == place else n for i, n in enumerate(real(at))])  # noqa: E731
    patch.setattr(os, "statvfs", told)


def full(_: object, stack: ExitStack) -> None:
    disk_says(stack, 4, lambda _: 0)


def read_only(_: object, stack: ExitStack) -> None:
    disk_says(stack, 8, lambda flags: flags | os.ST_RDONLY)


def another_practice(own: Practice) -> Practice:
    """With the same numbers for other people."""
    other = Practice(own.clock, own.zone.key, seed=77, name="other")
    for _ in range(8):
        patient = other.add_patient("Beispiel", "Erika")
        for _ in range(9):
            other.add_document(patient, "jpg")
    return other


def other_database(world: World, stack: ExitStack) -> None:
    own = world.practice

    def back() -> None:
        world.swap_practice(own)
        world.restart()

    world.swap_practice(another_practice(own))
    world.restart()
    stack.callback(back)


# --- how it comes about: for the doctor


def like(name: str) -> AtDesk:
    """As in the doctor's own tests."""

    def happens(desk: Desk, stack: ExitStack) -> None:
        sim = desk.simulation
        before = sim.office.permissions, (desk.folder / "sftp_password").read_text(), sim.practice

        def back() -> None:
            sim.office.faults.clear()
            sim.office.permissions = before[0]
            desk.file = sim.write_config(desk.folder)
            (desk.folder / "sftp_password").write_text(before[1])

        stack.callback(back)
        test_doctor.OUTAGES[name][0](sim, desk)

    return happens


def configured(**overrides: Any) -> AtDesk:
    def happens(desk: Desk, stack: ExitStack) -> None:
        stack.callback(test_doctor.rewrite, desk)
        test_doctor.rewrite(desk, **overrides)

    return happens


def rebuilt(desk: Desk, stack: ExitStack) -> None:
    """The site has a new key of the same kind."""
    key = ECDSAKey.generate()
    configured(drop={"host_key": f"{key.get_name()} {key.get_base64()}"})(desk, stack)


def behind_another_key(desk: Desk, stack: ExitStack) -> None:
    """The mirror found it; its process still holds the lock."""
    office = desk.simulation.office
    stack.callback(setattr, office, "practice", office.practice)
    office.practice = another_practice(office.practice)
    assert desk.call("backfill", "--no-progress").exit_code == errors.EXIT_HELD
    stack.enter_context(Lock(desk.state, "run"))


OUTAGES: dict[str, Outage] = {
    "name resolution": Outage(
        "name_unknown",
        lambda world, stack: leads(world, stack, "http://office.invalid/api/v1"),
        configured(api={"url": "https://office.invalid/api/v1"}),
        "Open Dental",
    ),
    "the API's host is down": Outage(
        "api_unreachable",
        lambda world, stack: leads(world, stack, "http://127.0.0.1:1/api/v1"),
        like("nobody listens at the API's address"),
        "Open Dental",
    ),
    "server errors": Outage("api_error", fault("status", status=500), like("server errors"), "Open Dental"),
    "a proxy's page with status 200": Outage(
        "bad_answers", fault("html"), like("a web page instead of answers"), "Open Dental"
    ),
    "TLS that cannot be trusted": Outage(
        "tls_failed",
        lambda world, stack: leads(world, stack, distrusted(stack)),
        lambda desk, stack: configured(api={"url": distrusted(stack)})(desk, stack),
        "Open Dental",
    ),
    "key revoked": Outage("key_refused", fault("key_revoked"), like("key revoked"), "Open Dental"),
    "key that can only list": Outage(
        "key_cannot_download", may_only_list, like("key that can only list"), "permissions"
    ),
    "eConnector down": Outage("econnector_down", fault("econnector_down"), like("eConnector down"), "Open Dental"),
    "two eConnectors": Outage("econnector_twice", fault("two_econnectors"), like("two eConnectors"), "Open Dental"),
    "SFTP host down": Outage(
        "drop_unreachable",
        broken_drop(TransientError("drop_unreachable")),
        like("nobody listens at the site's port"),
        "SFTP site",
    ),
    "SFTP login refused": Outage(
        "drop_refused", broken_drop(SiteError("drop_refused")), like("wrong password of the site"), "SFTP site"
    ),
    "SFTP host key changed": Outage(
        "host_key_changed", broken_drop(SiteError("host_key_changed")), rebuilt, "SFTP site"
    ),
    "the office does not reach the SFTP site": Outage(
        "placements_refused", office_reaches_no_site, like("the office cannot reach the site"), "placement"
    ),
    "archive not mounted": Outage(
        "archive_missing",
        lambda world, stack: unmounted(world.archive, stack),
        lambda desk, stack: unmounted(desk.archive, stack),
        "archive_missing",
    ),
    "archive full": Outage("archive_full", full, full, "archive_full"),
    "archive read-only": Outage("archive_read_only", read_only, read_only, "archive_read_only"),
    "another practice's database": Outage("other_database", other_database, behind_another_key, "service"),
}


def in_world(world: World, name: str, outage: Outage, found: Check) -> Row:
    """Let it happen under the simulated clock, look each minute, and let it end."""
    zone = world.settings.zone
    world.log.lines.clear()
    with ExitStack() as stack:
        outage.world(world, stack)
        noticed = seconds_until(world, lambda said: said["reason"] == outage.reason, outage.within, STEP)
        status = line(told(world), zone)
        if told(world)["state"] != "blocked" and noticed >= outage.within / 2:  # seen late, but then soon for certain
            noticed += seconds_until(world, lambda said: said["state"] == "blocked", outage.within - noticed, STEP)
            status = line(told(world), zone)
        unhealthy = noticed + seconds_until(world, lambda said: not said["healthy"], LIVELY + SOON, STEP)
        assert outage.reason in told(world)["health"]
    events = [each for each in world.log.events("state_changed") if each["reason"] == outage.reason]
    log = " ".join(str(events[0][key]) for key in ("event", "lane", "reason"))
    seconds_until(world, lambda said: said["state"] == "ok", 30 * HOUR, 10 * STEP)
    return Row(name, outage.reason, noticed, unhealthy, status, log, found)


def doctors_lines(folder: Path) -> Iterator[tuple[str, Check]]:
    """What the doctor says in each outage, beside a mirror that has archived everything."""
    with practice() as simulation:
        desk = Desk(simulation, folder)
        assert desk.call("backfill", "--no-progress").exit_code == 0
        for name, outage in OUTAGES.items():
            with ExitStack() as stack:
                outage.desk(desk, stack)
                yield name, test_doctor.checks(desk, code=errors.EXIT_DOCTOR)[outage.check]


# --- inside, and what only an hour shows: in a daemon on its threads


@contextlib.contextmanager
def throttled(one: Running) -> Iterator[None]:
    endless = one.world.office.faults.add("too_many", times=None)
    yield
    one.world.office.faults.clear(endless)


@contextlib.contextmanager
def stuck(one: Running) -> Iterator[None]:
    one.gate.shut = one.release
    yield
    one.gate.shut = None
    one.release.set()


@contextlib.contextmanager
def log_disk_full(one: Running) -> Iterator[None]:
    folder = one.world.settings.log_path
    folder.rename(folder.with_name("away"))
    folder.write_text("not a folder")
    yield
    folder.unlink()
    folder.with_name("away").rename(folder)


@contextlib.contextmanager
def clock_stands_still(one: Running) -> Iterator[None]:
    one.clock.stop()
    yield
    one.clock.stands = False


INSIDE: Mapping[str, tuple[str, Callable[[Running], contextlib.AbstractContextManager[None]], str, float]] = {
    "429 for an hour": ("throttled_long", throttled, "", HOUR),
    "a lane hangs": ("lane_stuck", stuck, "api", SILENT),
    "the log's disk is full": ("log_unwritable", log_disk_full, "log", SILENT),
    "this machine's clock stands still": ("clock_stuck", clock_stands_still, "clock", SILENT),
}


def in_daemon(one: Running, name: str) -> Row:
    """Let it happen in the daemon, step its clock by minutes, and let it end."""
    reason, happens, frozen, limit = INSIDE[name]

    def minutes(claim: Callable[[Report], object], most: float) -> float:
        began = one.clock.ahead
        while not claim(one.told()):
            assert one.clock.ahead - began <= most, one.told()
            one.live(STEP, frozen)
        return one.clock.ahead - began

    one.log.lines.clear()
    with happens(one):
        noticed = minutes(lambda said: said["reason"] == reason, limit + SOON)
        said = one.told()
        one.live(STEP, frozen)
        call = Call(clock=one.clock)  # type: ignore[arg-type]  # what the doctor asks of a clock, it has
        call.__dict__["settings"] = one.world.settings
        found = dict(zip(("result", "check", "message", "who"), doctor._service(call, one.lanes.index), strict=True))
        blocked = said["state"] == "blocked"
        unhealthy = noticed + minutes(lambda said: not said["healthy"], LIVELY + SOON) if blocked else None
        events = [each for each in one.log.events("state_changed") if each["reason"] == reason]
    minutes(lambda said: said["state"] == "ok", 3 * HOUR)
    log = " ".join(str(events[0][key]) for key in ("event", "state", "reason"))
    return Row(name, reason, noticed, unhealthy, line(said, one.world.settings.zone), log, found)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    found = dict(doctors_lines(tmp_path_factory.mktemp("desk")))
    world = synced(tmp_path_factory.mktemp("world"), INTERVAL)
    table = [in_world(world, name, outage, found[name]) for name, outage in OUTAGES.items()]
    world.stop()
    for name in INSIDE:
        with pytest.MonkeyPatch.context() as patch, a_daemon(tmp_path_factory.mktemp("daemon"), patch) as one:
            table.append(in_daemon(one, name))
    return table


@pytest.mark.long
@pytest.mark.timeout(400)
def test_each_outage_has_a_name_of_its_own_who_must_act_and_what_to_do_and_is_noticed_within_minutes(
    rows: list[Row],
) -> None:
    sys.stdout.write("\n" + "".join(map(str, rows)))
    assert len(rows) >= 16
    assert len({row.reason for row in rows}) == len(rows)
    limits = {reason: limit for reason, _, _, limit in INSIDE.values()}
    for row in rows:
        who, message, _ = REASONS[row.reason]
        what, _, to_do = message.replace("NAME", "main").partition(": ")
        assert f"({row.reason})" in row.status
        assert what in row.status
        assert f"{who}: {to_do}"[:60] in row.status
        assert who != "nobody"
        assert row.noticed <= limits.get(row.reason, 0.0) + SOON
        assert row.unhealthy is None or row.unhealthy <= row.noticed + LIVELY + 2 * STEP
        assert (row.doctor["result"], row.doctor["who"]) == ("failed", who)
        assert to_do.split("`")[0].split(";")[0][:40] in row.doctor["message"]
        assert row.reason in row.log
