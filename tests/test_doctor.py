"""`syncd doctor` against Open Dental and the SFTP site: each outage has a line that says what to do, and who."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from syncd import errors
from syncd.demo.build import build_practice
from syncd.demo.simulation import Simulation
from syncd.service import Lock
from tests.test_cli import Desk, practice

pytestmark = pytest.mark.slow  # HTTP and SFTP servers for each test

Arrange = Callable[[Simulation, Desk], object]
OUTSIDE = ("SFTP site", "Open Dental", "permissions", "clock", "placement", "pull", "clean-up")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with practice() as simulation:
        yield Desk(simulation, tmp_path)


def checks(desk: Desk, code: int = 0) -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in desk.json("doctor", code=code)["checks"]}


def rewrite(desk: Desk, **overrides: Any) -> None:
    desk.file = desk.simulation.write_config(desk.folder, **overrides)


def on_the_drop(desk: Desk) -> list[str]:
    assert desk.simulation.sftp is not None
    return sorted(path.name for path in desk.simulation.sftp.root.rglob("syncd-*"))


def test_a_whole_installation_is_looked_at_with_a_handful_of_requests_and_nothing_is_left(desk: Desk) -> None:
    before = desk.everything()
    found = checks(desk)
    assert {name: found[name]["result"] for name in OUTSIDE} == dict.fromkeys(OUTSIDE, "ok")
    assert len(desk.simulation.office.arrivals) <= 8
    assert on_the_drop(desk) == []
    assert desk.everything() == before


def test_one_document_is_tried_of_a_mirrored_practice_too(desk: Desk) -> None:
    assert desk.call("backfill", "--no-progress").exit_code == 0
    before = len(desk.simulation.office.arrivals)
    assert checks(desk)["pull"]["result"] == "ok"
    placed = [each for each in desk.simulation.office.arrivals[before:] if each.path.endswith("DownloadSftp")]
    assert len(placed) == 1
    assert desk.found("--kind", "document")
    assert on_the_drop(desk) == []


def test_a_patient_of_more_documents_than_a_page_has_is_no_trouble(desk: Desk) -> None:
    for _ in range(101):
        desk.simulation.practice.add_document(1, "txt")
    assert desk.call("backfill", "--no-progress", "--patient", "1").exit_code in (0, errors.EXIT_OWED)
    for _ in range(3):
        assert checks(desk)["pull"]["result"] == "ok"
    assert on_the_drop(desk) == []


@pytest.mark.parametrize("role", ["archive", "state", "log"])
def test_each_folder_has_a_line_for_its_space_that_says_what_to_do(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    names, real, folder = {"archive": "space"}, os.statvfs, desk.folder / role
    folder.mkdir(exist_ok=True)
    assert checks(desk)[names.get(role, f"{role} space")]["result"] == "ok"

    def nearly_full(path: int | Path) -> object:
        said = real(path)
        here = os.fstat(path) if isinstance(path, int) else path.stat()
        return os.statvfs_result((*said[:4], 100, *said[5:])) if here.st_ino == folder.stat().st_ino else said

    monkeypatch.setattr(os, "statvfs", nearly_full)
    found = checks(desk, code=errors.EXIT_DOCTOR)
    failed = {name: row for name, row in found.items() if row["result"] == "failed"}
    assert list(failed) == [names.get(role, f"{role} space")]
    (row,) = failed.values()
    assert row["who"] == "practice_it"
    assert "free" in row["message"]
    assert row["message"].endswith(": make room, or enlarge the disk")


@pytest.mark.parametrize(("section", "key", "check"), [("notify", "command", "notices"), ("hook", "archived", "hook")])
def test_a_program_that_cannot_be_started_is_found_before_it_is_needed(
    desk: Desk, tmp_path: Path, section: str, key: str, check: str
) -> None:
    program = tmp_path / "alert"
    rewrite(desk, **{section: {key: [str(program), "--now"]}})
    for _ in ("is not there", "may not be executed"):
        row = checks(desk, code=errors.EXIT_DOCTOR)[check]
        assert (row["result"], row["who"]) == ("failed", "practice_it")
        assert row["message"].startswith(f"[{section}] {key}: ")
        program.write_text("#!/bin/sh\n")
        program.chmod(0o644)
    program.chmod(0o755)
    assert checks(desk).get(check, {"result": "ok"})["result"] == "ok"


def test_a_version_that_is_none_is_not_repeated(desk: Desk) -> None:
    desk.simulation.office.version = "\x1b[2JMustermann"
    assert checks(desk)["Open Dental"]["message"].endswith("version unknown")


def test_offline_sends_nothing(desk: Desk) -> None:
    assert desk.call("doctor", "--offline").exit_code == 0
    assert desk.simulation.office.arrivals == []


OUTAGES: dict[str, tuple[Arrange, str, str, str, str]] = {
    "key revoked": (
        lambda sim, desk: sim.office.faults.add("key_revoked", times=None),
        *("Open Dental", "failed", "integrator", "`sudo syncd setup mirror --only keys`"),
    ),
    "key that can only list": (
        lambda sim, desk: setattr(sim.office, "permissions", ("ApiReadAll",)),
        *("permissions", "failed", "integrator", "the permission AllOthers"),
    ),
    "eConnector down": (
        lambda sim, desk: sim.office.faults.add("econnector_down", times=None),
        *("Open Dental", "failed", "practice_it", "start the eConnector"),
    ),
    "two eConnectors": (
        lambda sim, desk: sim.office.faults.add("two_econnectors", times=None),
        *("Open Dental", "failed", "practice_it", "stop one of them"),
    ),
    "nobody listens at the API's address": (
        lambda sim, desk: rewrite(desk, api={"url": "http://127.0.0.1:1/api/v1"}),
        *("Open Dental", "failed", "practice_it", "cannot be reached"),
    ),
    "server errors": (
        lambda sim, desk: sim.office.faults.add("status", status=500, times=None),
        *("Open Dental", "failed", "open_dental", "server errors"),
    ),
    "throttled": (
        lambda sim, desk: sim.office.faults.add("too_many", times=None),
        *("Open Dental", "warning", "nobody", "429"),
    ),
    "a web page instead of answers": (
        lambda sim, desk: sim.office.faults.add("html", times=None),
        *("Open Dental", "failed", "open_dental", "cannot be trusted"),
    ),
    "rows of another patient": (
        lambda sim, desk: sim.office.faults.add("foreign_row", path="/documents", times=None),
        *("documents", "failed", "open_dental", "cannot be trusted"),
    ),
    "wrong password of the site": (
        lambda sim, desk: (desk.folder / "sftp_password").write_text("wrong\n"),
        *("SFTP site", "failed", "practice_it", "login"),
    ),
    "another host key": (
        lambda sim, desk: rewrite(desk, drop={"host_key": OTHER_KEY}),
        *("SFTP site", "failed", "practice_it", "host key"),
    ),
    "nobody listens at the site's port": (
        lambda sim, desk: rewrite(desk, drop={"port": 1}),
        *("SFTP site", "failed", "practice_it", "cannot be reached"),
    ),
    "the office cannot reach the site": (
        lambda sim, desk: sim.office.faults.add("site_error", path="*/DownloadSftp", times=None),
        *("placement", "failed", "practice_it", "reaches [drop] address"),
    ),
    "the office writes to another site": (
        lambda sim, desk: sim.office.faults.add("no_file", path="*/DownloadSftp", times=None),
        *("pull", "failed", "practice_it", "does [drop] address lead to this very site?"),
    ),
    "an empty file": (
        lambda sim, desk: sim.office.faults.add("zero_byte", path="*/DownloadSftp", times=None),
        *("pull", "failed", "open_dental", "zero_bytes"),
    ),
    "another time zone": (
        lambda sim, desk: rewrite(desk, practice={"time_zone": "Asia/Tokyo"}),
        *("clock", "failed", "practice_it", "time_zone"),
    ),
    "no permission for queries": (
        lambda sim, desk: setattr(sim.office, "permissions", tuple(p for p in sim.office.permissions if p != QUERIES)),
        *("permissions", "warning", "integrator", "without the change feed"),
    ),
    "no patients": (
        lambda sim, desk: setattr(sim.office, "practice", build_practice(0, 9, sim.practice.clock)),
        *("patients", "warning", "integrator", "no patient"),
    ),
}
QUERIES = "ApiQueries"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


@pytest.mark.parametrize("name", OUTAGES)
def test_each_outage_has_a_line_that_says_what_to_do_and_who(desk: Desk, name: str) -> None:
    arrange, check, result, who, words = OUTAGES[name]
    arrange(desk.simulation, desk)
    found = checks(desk, code=errors.EXIT_DOCTOR if result == "failed" else 0)[check]
    assert (found["result"], found["who"]) == (result, who), found
    assert words in found["message"]
    assert on_the_drop(desk) == []


@pytest.mark.parametrize("reason", ["other_database", "throttled"])
def test_what_only_the_running_service_knows_is_told_while_it_runs(desk: Desk, reason: str) -> None:
    assert desk.call("backfill", "--no-progress").exit_code == 0
    assert (checks(desk)["service"]["result"], checks(desk)["service"]["who"]) == ("warning", "practice_it")
    with Lock(desk.state, "run"), contextlib.closing(sqlite3.connect(desk.state / "index.db")) as db:
        assert checks(desk)["service"]["message"].startswith("run, pid ")
        db.execute("INSERT INTO site VALUES ('x', ?, '', ?, 0, 3)", (reason, time.time()))
        db.commit()
        who, meaning, _ = errors.REASONS[reason]
        found = checks(desk, code=0 if who == "nobody" else errors.EXIT_DOCTOR)["service"]
    assert (found["who"], found["message"]) == (who, f"{reason}: {meaning}")


def test_bundle_is_packed_beside_what_is_said_and_never_over_a_file(desk: Desk, tmp_path: Path) -> None:
    assert desk.call("backfill", "--no-progress").exit_code == 0
    target = tmp_path / "bundle.tar.gz"
    assert checks(desk).keys() == {row["check"] for row in desk.json("doctor", "--bundle", str(target))["checks"]}
    with tarfile.open(target) as tar:
        assert {"doctor.json", "syncd.log", "configuration.json"} <= set(tar.getnames())
    before = target.read_bytes()
    asked = len(desk.simulation.office.arrivals)
    assert desk.call("doctor", "--bundle", str(target)).exit_code == errors.EXIT_USAGE
    assert (target.read_bytes(), len(desk.simulation.office.arrivals)) == (before, asked)


def test_without_credentials_nothing_is_asked(desk: Desk) -> None:
    (desk.folder / "customer_key").unlink()
    assert checks(desk, code=errors.EXIT_DOCTOR).keys().isdisjoint(OUTSIDE)
    assert desk.simulation.office.arrivals == []
