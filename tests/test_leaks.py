"""Nothing leaks: every fault once, then everything that syncd says to anybody is searched for what it must not say.

Private by design, and not searched: the index, sidecars and patient.json.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest

from syncd import faces
from syncd.demo.build import Past, build_practice
from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from syncd.demo.simulation import Simulation
from syncd.errors import SiteError, SyncdError, TransientError
from syncd.logs import open_logs
from syncd.metrics import exposition
from syncd.model import PullJob
from syncd.notices import Memory, look
from syncd.report import Budget, Report, Surroundings, status
from tests.test_cli import wait_until
from tests.world import START, RecordedLog, World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

SYNCD = Path(sys.executable).with_name("syncd")
DAY = 86_400.0
SECRETS = {
    "developer_key": "canaryDeveloperKey77",
    "customer_key": "canaryCustomerKey88",
    "password": "canaryPassword99",
}
ECHO = (
    f"Invalid: ODFHIR canaryDeveloperKey77/canaryCustomerKey88, opendental:canaryPassword99, Kanarienvogel, {'x' * 50}"
)
NARRATIVE = ("Description", "Note", "FileName", "InternalNote", "filePath", "ToothNumbers")
PERSONAL = ("LName", "FName", "Birthdate", "SSN", "Address", "HmPhone", "Email")
ANSWERS: tuple[dict[str, Any], ...] = (
    {"kind": "gateway_timeout", "when": "before"},
    {"kind": "gateway_timeout", "when": "after"},
    {"kind": "cut"},
    {"kind": "cut", "when": "body"},
    {"kind": "econnector_down"},
    {"kind": "two_econnectors"},
    {"kind": "key_revoked"},
    {"kind": "too_many", "seconds": 5.0},
    *({"kind": "status", "status": status, "text": ECHO} for status in (400, 401, 403, 404, 409, 410, 418, 500, 503)),
    {"kind": "html", "text": f"<html>{ECHO}</html>"},
    {"kind": "wrong_shape", "text": ECHO},
    {"kind": "redirect", "text": f"https://example.org/?{ECHO.replace(' ', '+')}"},
    {"kind": "hang", "seconds": 100.0},
    {"kind": "slow", "seconds": 20.0},
)
LISTINGS: tuple[dict[str, Any], ...] = tuple(
    {"kind": kind} for kind in ("foreign_row", "duplicated", "shifted", "empty", "truncated")
)
FILES: tuple[dict[str, Any], ...] = (
    *({"kind": kind} for kind in ("zero_byte", "partial", "wrong_bytes", "no_file", "grey_thumbnails")),
    {"kind": "late_file", "late": 60.0},
    {"kind": "location", "text": f"{ECHO}/other.jpg"},
    {"kind": "site_error", "text": f"Sftp connection error: {ECHO}"},
    {"kind": "gateway_timeout", "when": "during", "late": 400.0},
)


def telling_practice(clock: SimulatedClock | None) -> Practice:
    """A practice in which every text names somebody or something."""
    own = clock or SimulatedClock(time.time())
    past = Past(documents=5.0, sheets=2.0, hostile_names=0.2, odd_names=0.2, deleted=0.0)
    practice = build_practice(2, 9, own, past=past)
    with practice.as_of(own.now() - 20 * DAY):
        for number in range(2):
            patient = practice.add_patient(f"Kanarienvogel{number}", "Tweetyline")
            mount = practice.add_mount(patient, 2, description="Canary mount text", Note="canary mount note")
            practice.change_mount(mount, Note="canary mount note, changed")
            practice.add_sheet(patient, InternalNote="canary internal note")
            for extension in ("jpg", "pdf"):
                practice.add_document(
                    patient,
                    extension,
                    file_name=f"Kanarienvogel scan {number}.{extension}",
                    description="canary description",
                    Note="canary document note",
                )
            practice.add_raw_document(patient, b"canary content", ".txt", Description="canary upload")
            practice.add_url_document(patient, "https://canary.example.org/secret", Description="canary link")
    return practice


def canaries(practice: Practice, addresses: list[str]) -> set[str]:
    """Every text that must not be said: long enough not to be found by chance."""
    said: set[str] = set(SECRETS.values())
    for table, columns in (("patient", PERSONAL), ("document", NARRATIVE), ("mount", NARRATIVE), ("sheet", NARRATIVE)):
        for row in practice.rows(f"SELECT * FROM {table}"):
            said |= {str(row[column]) for column in columns if row.get(column)}
    said |= {address.rstrip("/").rpartition("/")[2] for address in addresses}  # staged names
    said |= {found[0] for address in addresses if (found := re.search("[0-9a-f]{32}", address))}
    said |= {"Nowhere Street", "example.org/secret", "OpenDentImages", "canary", "Kanarienvogel", "Tweetyline"}
    everyday = {"document", "mount", "sheet"}  # words of ours that a description may be, too
    return {text for text in said if len(text) >= 6 and text.lower() not in everyday}


def leaks(said: Mapping[str, str], secret: set[str]) -> list[str]:
    """Where which text was found; as written, or as JSON writes it."""
    pattern = re.compile("|".join(re.escape(text) for text in sorted(secret, key=len, reverse=True)), re.IGNORECASE)
    return [f"{where}: {found[0]!r}" for where, text in said.items() if (found := pattern.search(text))]


def files_below(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text("utf-8", "replace") for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_search_finds_what_is_there() -> None:
    practice = telling_practice(SimulatedClock(START))
    secret = canaries(practice, ["drop.example.org/syncd/syncd-main-20260310-" + "ab" * 16 + ".jpg"])
    (row,) = practice.rows("SELECT * FROM patient WHERE LName = 'Kanarienvogel1'")
    for text in (
        row["SSN"],
        row["Birthdate"],
        row["Email"],
        "ab" * 16,
        SECRETS["password"],
        "Kanarienvogel scan 0.pdf",
    ):
        assert leaks({"log": f'{{"event": "x", "what": "{text}"}}'}, secret)
    assert not leaks({"log": '{"event": "item_failed", "item": "101/document-34"}'}, secret)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The text of every error of ours, as it is made."""
    made: list[str] = []
    plain = SyncdError.__init__

    def noted(self: SyncdError, *words: object) -> None:
        made.extend(str(word) for word in words)
        plain(self, *words)

    monkeypatch.setattr(SyncdError, "__init__", noted)
    return iter([made])


@pytest.mark.long
def test_nothing_leaks_whatever_goes_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], messages: Iterator[list[str]]
) -> None:
    made, notices = next(messages), list[str]()
    world = World.start(tmp_path, practice=telling_practice(SimulatedClock(START)))
    world.office.developer_key, world.office.customer_key = SECRETS["developer_key"], SECRETS["customer_key"]
    world.site.password = SECRETS["password"]
    log = open_logs(world.settings, {"JOURNAL_STREAM": "1:2"}, verbose=1, now=world.clock.now)
    world.log = cast("RecordedLog", log)
    world.restart()
    for trouble in troubles(world):
        trouble()
        world.run(hours=0.3)
        _, notice = look(Memory(), report_of(world), world.clock.now(), after=0.0, office_is_open=True)
        notices += [json.dumps(notice)] if notice else []
        world.office.faults.clear()
        world.drop.broken = world.drop.meddle = None
        world.site.down = False
    addresses = [str(each.params.get("SftpAddress", "")) for each in world.placements()]
    secret = canaries(world.practice, addresses) | {"Wandervogel"}
    said = files_below(world.settings.log_path)
    captured = capfd.readouterr()
    said |= {"stdout": captured.out, "stderr": captured.err, "errors": "\n".join(made)}
    report = report_of(world)
    said["status"] = repr(asdict(world.catalog().status_facts(world.clock.now()))) + repr(report)
    said |= {"faces": faces.text(report) + faces.line(report) + exposition(report), "notices": "\n".join(notices)}
    said["failing"] = repr(list(world.catalog().failing()))
    said["states"] = repr([world.index.rows(f"SELECT * FROM {t}") for t in ("site", "incident", "guard", "wish")])
    said["lock and pace"] = repr(files_below_but(world.settings.state_path, "index.db", "copies/"))
    said["names in the archive"] = "\n".join(str(path.relative_to(world.archive)) for path in world.archive.rglob("*"))
    assert len(made) > 200
    assert len(notices) > 10
    assert captured.err.count("\n") > 100
    assert leaks(said, secret) == []


def report_of(world: World) -> Report:
    """What `status` says now; somebody holds the lock."""
    now = world.clock.now()
    return status(world.catalog().status_facts(now), Surroundings("main", "0", Budget(1, 1, 1), holder="run"), now)


def files_below_but(folder: Path, *private: str) -> dict[str, str]:
    return {path: text for path, text in files_below(folder).items() if not any(name in path for name in private)}


def troubles(world: World) -> Iterator[Callable[[], object]]:
    """Everything that can go wrong, one after the other; between them staff change what brings about new work."""
    practice, faults = world.practice, world.office.faults
    documents = [row["DocNum"] for row in practice.rows("SELECT DocNum FROM document WHERE MountItemNum = 0")]
    numbers = iter(documents * 20)

    def changed(action: Callable[[], object]) -> Callable[[], object]:
        def act() -> None:
            for _ in range(2):
                number = next(numbers)
                if practice.row("document", number) is not None and practice.spec(number) is not None:
                    practice.replace_bytes(number)
            practice.change_mount(1)
            practice.edit_sheet(1)
            action()

        return act

    yield lambda: None
    for details in (*ANSWERS, *LISTINGS):
        yield changed(lambda details=details: faults.add(times=3, method="GET", **details))  # type: ignore[misc]
    for details in (*ANSWERS, *FILES):
        yield changed(lambda details=details: faults.add(times=4, method="POST", **details))  # type: ignore[misc]
    for error in (TransientError("drop_unreachable"), SiteError("host_key_changed"), SiteError("drop_refused")):
        yield changed(lambda error=error: setattr(world.drop, "broken", error))  # type: ignore[misc]
    yield changed(lambda: setattr(world.site, "down", True))
    yield changed(lambda: setattr(world.drop, "meddle", lambda job: gone(world, job)))
    yield lambda: [practice.delete_document(number) for number in documents if practice.row("document", number)]
    yield lambda: practice.merge_patients(1, 2)
    yield lambda: practice.set_patient_status(2, "Deleted")
    yield lambda: world.swap_practice(other_practice(world.clock))


def gone(world: World, job: PullJob) -> None:
    world.site.files.pop(job.remote.decode(), None)


def other_practice(clock: SimulatedClock) -> Practice:
    practice = Practice(clock, "America/Chicago", seed=77, name="other")
    for _ in range(5):
        patient = practice.add_patient("Wandervogel", "Tweetyline")
        for _ in range(5):
            practice.add_document(patient, "jpg", description="canary elsewhere")
    return practice


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, "key_revoked", "site_error"])
def test_commands_say_nothing_that_names_anybody(tmp_path: Path, fault: str | None) -> None:
    practice = telling_practice(None)
    practice.clock = SimulatedClock(time.time())
    with Simulation.start(practice=practice, interval=0.01, folder=tmp_path / "site") as simulation:
        simulation.office.developer_key = SECRETS["developer_key"]
        simulation.office.customer_key = SECRETS["customer_key"]
        assert simulation.sftp is not None
        simulation.sftp.password = simulation.outside.password = SECRETS["password"]
        (tmp_path / "archive").mkdir()
        metrics = tmp_path / "syncd.prom"
        told = {"metrics_file": str(metrics)}
        config = simulation.write_config(tmp_path / "main", tmp_path / "archive", status=told)
        said: dict[str, str] = {}

        def call(*words: str) -> None:
            command = [str(SYNCD), "-v", "-c", str(config), *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
            said[" ".join(words)] = done.stdout + done.stderr

        call("backfill", "--no-progress", "--max-requests", "40")
        if fault:
            simulation.office.faults.add(fault, text=ECHO, times=None)  # type: ignore[arg-type]  # of the list above
        call("backfill", "--no-progress", "--max-duration", "4s" if fault else "90s", "--json")
        with contextlib.closing(sqlite3.connect(tmp_path / "main" / "state" / "index.db")) as db:
            for row in db.execute("SELECT path FROM version").fetchall() if not fault else []:
                (tmp_path / "archive" / row[0]).unlink(missing_ok=True)  # whatever the drill draws fails, and says so
        daemon = subprocess.Popen([SYNCD, "-v", "-c", config, "run"], stdout=-1, stderr=-1, text=True)
        time.sleep(2.0)
        log = tmp_path / "main" / "log" / "syncd.log"
        wait_until(lambda: fault or "drill_failed" in log.read_text())
        for verb in (("status",), ("status", "--json", "--failing"), ("health",), ("held",)):
            call(*verb)
        daemon.send_signal(signal.SIGTERM)
        said["run"] = "".join(daemon.communicate(timeout=20))
        for verb in (("doctor",), *(() if fault else (("verify",), ("reindex",), ("retry",)))):
            call(*verb)
        addresses = [str(each.params.get("SftpAddress", "")) for each in simulation.office.arrivals]
        call("doctor", "--bundle", str(tmp_path / "bundle.tar.gz"))
        with tarfile.open(tmp_path / "bundle.tar.gz") as tar:
            packed = {name: tar.extractfile(name) for name in tar.getnames()}
            said |= {f"bundle {name}": file.read().decode() for name, file in packed.items() if file is not None}
        said["metrics"] = metrics.read_text()
        said |= files_below(tmp_path / "main" / "log")
        said |= files_below_but(tmp_path / "main" / "state", "index.db", "copies/")
    assert "ERROR" not in said["run"]
    assert "this week:" in said["status"]
    assert len(said["metrics"]) > 1000
    assert "syncd_state" in said["metrics"]
    assert "this week:" in said["bundle status.log"]
    assert fault or "drill_failed" in said["run"]
    assert leaks(said, canaries(practice, [each for each in addresses if each])) == []
