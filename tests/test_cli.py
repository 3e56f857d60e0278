import contextlib
import datetime
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from syncd import errors
from syncd.archive import Archive
from syncd.backfill import Stop
from syncd.call import Call, Verbs
from syncd.cli import cli
from syncd.demo.build import Past
from syncd.demo.simulation import Simulation
from syncd.index import Index
from syncd.screen import plain, table
from syncd.service import Lock

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

README = Path(__file__).parent.parent / "README.md"
EXIT_CODES = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
STATUS_KEYS = (
    *("practice", "version", "state", "reason", "message", "who", "since", "next_try_at", "healthy", "owed", "failing"),
    *("thumbnails_due", "held", "vanished", "pending_at_source", "last_complete_sweep_at", "oldest_list_seconds"),
    *("eta_seconds", "requests_today", "throttled_today", "drop_leftovers", "archive_free_bytes", "incidents"),
)
FIND_KEYS = (
    *("practice", "id", "seq", "kind", "num", "pat_num", "version", "current", "path", "sha256", "bytes"),
    *("media_type", "category", "revision", "archived_at", "state"),
)


class Desk:
    """A simulated practice, its configuration, and `syncd -c` in this process or in one of its own."""

    def __init__(self, simulation: Simulation, folder: Path, **overrides: Any) -> None:
        self.simulation, self.folder = simulation, folder / "mirror"
        self.file = simulation.write_config(self.folder, **overrides)
        self.archive, self.state = self.folder / "archive", self.folder / "state"
        self.archive.mkdir(mode=0o700)

    def call(self, *words: str, answers: str | None = None) -> Result:
        return CliRunner().invoke(cli, ["-c", str(self.file), *words], input=answers)

    def json(self, *words: str, code: int = 0) -> dict[str, Any]:
        result = self.call(*words, "--json")
        assert result.exit_code == code, result.output
        said: dict[str, Any] = json.loads(result.stdout)
        assert said["schema_version"] == 1
        return said

    def found(self, *words: str) -> list[dict[str, Any]]:
        result = self.call("find", "--json", *words)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    @contextlib.contextmanager
    def process(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        line = [sys.executable, "-m", "syncd.cli", "-c", str(self.file), *words]
        line = ["env", "--default-signal=INT", *line]  # whoever started the tests in the background ignores Ctrl-C
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait_for_lock(self, verb: str) -> None:
        wait_until(lambda: (holder := Lock(self.state).holder()) is not None and holder.verb == verb)

    def everything(self) -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in sorted(self.folder.rglob("*"))}


def wait_until(there: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@contextlib.contextmanager
def practice(patients: int = 5, interval: float = 0.01) -> Iterator[Simulation]:
    past = Past(documents=3.0, sheets=1.0, sigma=0.4, raw=0.0, urls=0.0, hostile_names=0.0, deleted=0.0)
    with Simulation.start(patients, 3, interval, past=past) as simulation:
        yield simulation


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with practice() as simulation:
        yield Desk(simulation, tmp_path)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A practice that was mirrored once; tests only read it."""
    with practice() as simulation:
        patient = simulation.practice.rows("SELECT PatNum FROM patient LIMIT 1")[0]["PatNum"]
        simulation.practice.add_document(patient, "png", description="red \x1b[31m alarm")
        desk = Desk(simulation, tmp_path_factory.mktemp("mirrored"))
        assert desk.call("backfill").exit_code == 0
        yield desk


# --- exit codes and messages


def test_help_lists_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^ +(\d+)  ", CliRunner().invoke(cli, ["--help"]).stdout, re.MULTILINE)}
    assert listed == EXIT_CODES


@pytest.mark.parametrize(
    "words", [["nonsense"], ["find", "--kind", "x"], ["-v", "-q", "version"], ["-p", "a", "-c", "b", "plan"]]
)
def test_wrong_call_ends_with_2(words: list[str]) -> None:
    assert CliRunner().invoke(cli, words).exit_code == errors.EXIT_USAGE


def test_invalid_configuration_ends_with_78_and_names_each_problem_on_a_line(desk: Desk) -> None:
    desk.file.write_text(desk.file.read_text().replace("reserve =", "reservee =").replace("mode =", "mod ="))
    result = desk.call("status")
    assert result.exit_code == errors.EXIT_CONFIG
    assert len(result.stderr.splitlines()) == 2
    assert all(line.startswith("syncd: [") for line in result.stderr.splitlines())
    assert result.stdout == ""


def test_internal_error_tells_type_and_place_but_not_its_text() -> None:
    group = Verbs("syncd")

    @group.command()
    def fail() -> None:
        raise ValueError("Abendroth, Ada")

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == errors.EXIT_INTERNAL
    assert "ValueError at" in result.stderr
    assert "test_cli.py:" in result.stderr
    assert "Abendroth" not in result.output


def test_thread_of_a_library_that_ends_tells_type_and_place_but_not_its_text() -> None:
    thread = "threading.Thread(target=int, args=('Abendroth',)).start()"
    fail = f"import threading; from syncd import cli; cli.cli = lambda **_: {thread}; cli.main()"
    done = subprocess.run([sys.executable, "-c", fail], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("syncd: a thread ended: ValueError at")
    assert "Abendroth" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupt_ends_with_130() -> None:
    group = Verbs("syncd")

    @group.command()
    def wait() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(group, ["wait"]).exit_code == errors.EXIT_INTERRUPTED


def test_version_is_told_for_people_and_programs() -> None:
    said = json.loads(CliRunner().invoke(cli, ["version", "--json"]).stdout)
    assert said["version"] in CliRunner().invoke(cli, ["version"]).stdout


# --- backfill


def test_backfill_archives_every_document_and_the_second_one_only_lists(desk: Desk) -> None:
    said = desk.json("backfill")
    assert said["owed"] == said["failing"] == 0
    truth = desk.simulation.practice.rows("SELECT DocNum, PatNum FROM document")
    archived = {(row["pat_num"], row["num"]) for row in desk.found() if row["kind"] in ("document", "mount-image")}
    assert archived == {(row["PatNum"], row["DocNum"]) for row in truth}
    again = desk.json("backfill")
    assert again["files"] == 0
    lists = 2 * len(desk.simulation.practice.rows("SELECT 1 FROM patient"))
    documents = sum(row["kind"] == "document" for row in desk.found())
    assert lists <= again["requests"] <= lists + 1 + min(20, documents)  # a roster page, and the database's identity


def test_backfill_stops_at_its_limit_and_goes_on_from_there(desk: Desk) -> None:
    first = desk.json("backfill", "--max-requests", "15", code=errors.EXIT_LIMIT)
    assert first["requests"] == 15
    second = desk.json("backfill")
    assert second["owed"] == 0
    assert first["files"] + second["files"] == len(desk.found())


def test_backfill_says_which_patient_the_roster_lacks(desk: Desk) -> None:
    patient = desk.simulation.practice.rows("SELECT PatNum FROM document LIMIT 1")[0]["PatNum"]
    said = desk.json("backfill", "--patient", str(patient), "--patient", "999999", code=errors.EXIT_USAGE)
    assert said["unknown_patients"] == [999999]
    assert {row["pat_num"] for row in desk.found()} == {patient}


def test_backfill_of_one_patient_is_done_though_another_one_is_owed_something(desk: Desk) -> None:
    first, second = [row["PatNum"] for row in desk.simulation.practice.rows("SELECT PatNum FROM patient LIMIT 2")]
    desk.json("backfill")
    with contextlib.closing(sqlite3.connect(desk.state / "index.db")) as db, db:
        db.create_function("folded", 1, str)
        db.execute(
            "INSERT INTO duty (method, pat_num, num, kind, revision, why, since_at, next_try_at)"
            " SELECT 'document', pat_num, num, kind, revision, 'repair', 0, unixepoch() + 72000 FROM item"
            " WHERE pat_num = ? AND kind = 'document' LIMIT 1",
            (second,),
        )
    assert desk.json("backfill", "--patient", str(first))["owed"] == 1
    assert desk.json("backfill", "--patient", str(second), code=errors.EXIT_OWED)["owed"] == 1


@pytest.mark.parametrize("words", [["backfill"], ["run"], ["reindex"], ["export", "--patient", "1", "--to", "out"]])
def test_dry_run_changes_nothing_at_all(desk: Desk, words: list[str]) -> None:
    before = desk.everything()
    desk.call(*words, "-n")
    assert desk.everything() == before


DRY = (
    *("backfill", "retry", "retry ID", "pause --until TIME", "resume", "verify --repair", "reindex", "run"),
    *("export --all --to out", "restore ID --to out", "destroy ID --ticket 7"),
)


def test_dry_run_changes_nothing_of_a_mirror_that_is_there(mirrored: Desk) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    meant = {"ID": mirrored.found("--kind", "document")[0]["full_id"], "TIME": soon.isoformat()}
    for line in DRY:
        words = [meant.get(word, word) for word in line.split()]
        before, changed = mirrored.everything(), (mirrored.state / "index.db").stat().st_ctime_ns
        assert mirrored.call(*words, "-n").exit_code == errors.EXIT_OK, words
        assert mirrored.everything() == before, words
        assert (mirrored.state / "index.db").stat().st_ctime_ns == changed, words


def test_dry_run_does_not_migrate_an_index_of_an_earlier_syncd(desk: Desk) -> None:
    desk.json("backfill")
    with contextlib.closing(sqlite3.connect(desk.state / "index.db")) as db, db:
        db.execute("DELETE FROM _sqlite_migrations WHERE name = 'appointments'")
    before = desk.everything()
    told = desk.call("retry", "-n")
    assert (told.exit_code, desk.everything()) == (errors.EXIT_USAGE, before)
    assert "earlier syncd" in told.stderr


def test_dry_retry_names_what_it_would_try(desk: Desk) -> None:
    desk.json("backfill")
    full_id = desk.found()[0]["full_id"]
    assert desk.call("retry", full_id, "-n").stdout == f"would retry {full_id}\n"


def test_second_backfill_is_refused_and_told_who_holds_the_lock(desk: Desk) -> None:
    desk.state.mkdir()
    with Lock(desk.state, "backfill"):
        result = desk.call("backfill")
    assert result.exit_code == errors.EXIT_LOCKED
    assert f"`syncd backfill` (pid {os.getpid()})" in result.stderr


def test_refused_key_ends_with_12_and_the_right_one_goes_on(desk: Desk) -> None:
    key = desk.folder / "customer_key"
    right = key.read_text()
    key.write_text("wrong")
    said = desk.call("backfill")
    assert said.exit_code == errors.EXIT_REFUSED
    assert ("setup mirror --only keys" in said.stderr, "NAME" in said.stderr) == (True, False)
    key.write_text(right)
    desk.json("retry")
    assert desk.json("backfill")["owed"] == 0


def test_backfill_of_an_archive_put_back_from_a_backup_ends_with_3_until_what_it_lacks_is_back(desk: Desk) -> None:
    desk.json("backfill")
    shutil.copytree(desk.archive, backup := desk.folder / "backup")
    practice = desk.simulation.practice
    patient = practice.rows("SELECT PatNum FROM patient LIMIT 1")[0]["PatNum"]
    with practice.as_of(practice.clock.now() - 1200.0):
        practice.add_document(patient, "jpg")
    desk.json("backfill")
    before = sorted(path.name for path in desk.archive.rglob("*.jpg"))
    shutil.rmtree(desk.archive)
    backup.rename(desk.archive)
    assert desk.json("backfill", code=errors.EXIT_OWED)["reason"] == "archive_damaged"
    assert desk.call("verify", "--repair").exit_code == errors.EXIT_DAMAGE
    assert desk.json("backfill")["owed"] == 0
    assert sorted(path.name for path in desk.archive.rglob("*.jpg")) == before


def test_backfill_leaves_a_report_and_everything_private(desk: Desk) -> None:
    desk.json("backfill")
    logs = desk.folder / "log"
    assert json.loads((logs / "status.json").read_text())["reason"] == "ok"
    assert (logs / "status.log").read_text().count("everything that is listed is archived") == 1
    private = [path for folder in (logs, desk.state, desk.archive) for path in (folder, *folder.rglob("*"))]
    assert [path for path in private if path.stat().st_mode & 0o077] == []


def test_new_archive_without_a_folder_is_told_to_make_it(desk: Desk) -> None:
    desk.archive.rmdir()
    result = desk.call("backfill")
    assert result.exit_code == errors.EXIT_ARCHIVE
    assert "make [archive] path" in result.stderr


def test_archive_that_is_not_mounted_ends_with_13(desk: Desk) -> None:
    desk.json("backfill")
    desk.archive.rename(desk.folder / "elsewhere")
    assert desk.call("backfill").exit_code == errors.EXIT_ARCHIVE
    assert not desk.archive.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_a_backfill_that_then_goes_on(desk: Desk, number: signal.Signals, code: int) -> None:
    desk.simulation.office.throttle.interval = 0.0
    desk.file.write_text(re.sub(r'min_interval = ".*"', 'min_interval = "0.1s"', desk.file.read_text()))
    with desk.process("backfill") as process:
        wait_until(lambda: list(desk.archive.glob("patients/*/*/*")))
        process.send_signal(number)
        process.send_signal(number)  # the second one is harmless
        assert process.wait(15) == code
    desk.file.write_text(re.sub(r'min_interval = ".*"', 'min_interval = "0.01s"', desk.file.read_text()))
    assert desk.json("backfill")["owed"] == 0
    assert desk.json("verify")["damaged"] == []


def test_progress_is_a_line_at_once_and_one_at_the_end_where_there_is_no_terminal(desk: Desk) -> None:
    lines = [line for line in desk.call("-q", "backfill").stderr.splitlines() if "requests" in line]
    assert lines == []
    lines = [line for line in desk.call("backfill").stderr.splitlines() if "requests" in line]
    assert len(lines) == 2


# --- the daemon


def test_daemon_takes_up_wishes_and_a_backfill_and_ends_with_0(desk: Desk) -> None:
    # Without thumbnails: the daemon rightly waits 15 quiet minutes for them.
    desk.file.write_text(desk.file.read_text() + '[sync]\nkinds = ["document", "mount", "mount-image", "sheet"]\n')
    with desk.process("run") as process:
        desk.wait_for_lock("run")
        result = desk.call("backfill")
        assert result.exit_code == 0, result.output
        assert "owed: 0" in result.stdout
        some = desk.found("--kind", "document")[0]["full_id"]
        assert desk.json("retry", some)["outcome"].startswith("1 ")
        refused = desk.call("run")
        assert refused.exit_code == errors.EXIT_LOCKED
        assert f"pid {process.pid}" in refused.stderr
        assert desk.json("status")["state"] in ("ok", "catching_up")
        wait_until((desk.folder / "log" / "status.json").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    told = json.loads((desk.folder / "log" / "status.json").read_text())
    assert (told["practice"], told["state"], told["reason"]) == ("mirror", "stopped", "not_running")
    assert "STOPPED (not_running)" in (desk.folder / "log" / "status.log").read_text()
    assert desk.json("status")["state"] == "stopped"


def test_follow_streams_versions_as_they_are_archived(desk: Desk) -> None:
    desk.json("backfill")
    last = max(row["seq"] for row in desk.found())
    with desk.process("find", "--json", "--follow", "--after", str(last)) as process:
        assert process.stdout is not None
        patient = desk.found()[0]["pat_num"]
        number = desk.simulation.practice.add_document(patient, "pdf")
        desk.json("backfill")
        assert select.select([process.stdout], [], [], 15)[0]
        row = json.loads(process.stdout.readline())
    assert (row["seq"] > last, row["id"]) == (True, f"document-{number}")


def test_follower_goes_on_in_an_index_made_anew_and_ends_once_nobody_reads(desk: Desk) -> None:
    desk.json("backfill")
    expected = sorted(row["seq"] for row in desk.found() if row["seq"])
    with desk.process("find", "--json", "--follow", "--after", "0") as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline())["seq"] for _ in expected]
        desk.json("reindex")
        desk.simulation.practice.add_document(desk.found()[0]["pat_num"], "pdf")
        desk.json("backfill")
        seen.append(json.loads(process.stdout.readline())["seq"])
        process.stdout.close()
        assert process.wait(30) == 0
    assert (seen[:-1], seen[-1] > expected[-1]) == (expected, True)
    result = desk.call("find", "--json", "--follow", "--after", "999999")
    assert result.exit_code == errors.EXIT_USAGE
    with desk.process("find", "--json", "--follow", "--after", "0") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == errors.EXIT_INTERRUPTED


FOLLOWERS = 50


@pytest.mark.long
@pytest.mark.timeout(400)
def test_follower_killed_at_fifty_random_moments_beside_a_daemon_misses_no_version(desk: Desk) -> None:
    """It keeps the last seq that it read whole, as the README says, and asks for what comes after that."""
    rng, office, seen = random.Random(7), desk.simulation.practice, list[int]()
    patients = [row["PatNum"] for row in office.rows("SELECT PatNum FROM patient")]
    with desk.process("run"):
        wait_until(lambda: desk.call("find", "--json").exit_code == 0)  # the index comes after the lock
        for _ in range(FOLLOWERS):
            for _ in range(rng.randrange(3)):
                office.add_document(rng.choice(patients), "pdf")
            last = seen[-1] if seen else 0
            behind = any((row["seq"] or 0) > last for row in desk.found())
            with desk.process("find", "--json", "--follow", "--after", str(last)) as process:
                assert process.stdout is not None
                if behind and rng.random() < 0.8:  # the others may die while they start
                    assert select.select([process.stdout], [], [], 30)[0]
                read, dies_at = b"", time.monotonic() + rng.uniform(0.0, 0.6)
                while (left := dies_at - time.monotonic()) > 0 and select.select([process.stdout], [], [], left)[0]:
                    if not (more := os.read(process.stdout.fileno(), rng.choice((7, 200, 5000)))):
                        break
                    read += more
                process.kill()
                seen += [json.loads(line)["seq"] for line in read.split(b"\n")[:-1]]
        desk.json("backfill")
    with desk.process("find", "--json", "--follow", "--after", str(seen[-1])) as process:
        assert process.stdout is not None
        expected = sorted(row["seq"] for row in desk.found() if row["seq"])
        seen += [json.loads(process.stdout.readline())["seq"] for _ in expected[len(seen) :]]
    assert seen == expected
    assert len(seen) > FOLLOWERS


# --- how it is


def test_status_without_an_index_says_stopped_and_makes_nothing(desk: Desk) -> None:
    said = desk.json("status")
    assert (said["state"], said["reason"]) == ("stopped", "not_running")
    assert "never ran" in said["message"]
    assert not desk.state.exists()


def test_status_answers_though_the_archives_mount_hangs(mirrored: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    mount, real, asked = threading.Event(), os.statvfs, []

    def hang(folder: int) -> os.statvfs_result:
        asked.append(folder)
        mount.wait()
        return real(folder)

    monkeypatch.setattr("syncd.call.MOUNT_HANGS_AFTER", 0.2)
    monkeypatch.setattr(os, "statvfs", hang)
    try:
        assert [mirrored.json("status")["archive_free_bytes"] for _ in range(3)] == [None] * 3
        assert len(asked) == 1  # nobody piles up before a mount that hangs
    finally:
        mount.set()
    wait_until(lambda: mirrored.json("status")["archive_free_bytes"])


def test_status_has_every_key_of_the_contract(mirrored: Desk) -> None:
    said = mirrored.json("status", "--failing")
    assert said.keys() >= set(STATUS_KEYS)
    assert (said["owed"], said["failing_items"]) == (0, [])
    assert "-06:00" in (text := mirrored.call("status").stdout) or "-05:00" in text


def test_all_practices_of_a_machine_stand_in_one_table(
    mirrored: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncd.wiring.PRACTICES", tmp_path)
    for name, text in (("broken", "[practice]\n"), ("main", mirrored.file.read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(text)
    (tmp_path / "syncd").mkdir()
    (tmp_path / "syncd" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)  # a folder of somebody's: nothing in it is run
    result = CliRunner().invoke(cli, ["status", "--all", "--json"])
    assert result.exit_code == 0, result.output
    said = {each["practice"]: each for each in json.loads(result.stdout)["practices"]}
    broken, keys = said["broken"], desk_keys(mirrored)
    assert broken.keys() == keys, "programs need not tell the two apart"
    assert (broken["schema_version"], broken["state"], broken["reason"]) == (1, "stopped", "config_invalid")
    assert (broken["who"], broken["healthy"], broken["owed"], broken["incidents"]) == ("practice_it", False, None, [])
    assert "syncd -p broken doctor --offline" in broken["message"]
    whole = next(each for name, each in said.items() if name != "broken")
    assert (whole["state"], whole["owed"]) == ("stopped", 0)
    table = CliRunner().invoke(cli, ["status", "--all"]).stdout.splitlines()
    assert len(table) == 1 + len(said)
    assert "config_invalid  practice_it" in next(line for line in table if line.startswith("broken"))


def desk_keys(desk: Desk) -> Set[str]:
    return desk.json("status").keys()


def test_a_practice_whose_status_cannot_be_asked_for_has_a_line_of_its_own(
    mirrored: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncd.wiring.PRACTICES", tmp_path)
    monkeypatch.setattr("syncd.cli.ONE_STATUS", 0.001)  # seconds: none starts as fast
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "config.toml").write_text(mirrored.file.read_text())
    (said,) = json.loads(CliRunner().invoke(cli, ["status", "--all", "--json"]).stdout)["practices"]
    assert said.keys() == desk_keys(mirrored)
    assert (said["practice"], said["state"], said["reason"]) == ("main", "unknown", "unknown")
    assert "`sudo syncd -p main status`" in said["message"]


def test_health_is_8_when_the_oldest_list_is_older_than_asked(mirrored: Desk) -> None:
    assert mirrored.call("health").exit_code == 0
    assert mirrored.call("health", "--max-age", "1ms").exit_code == errors.EXIT_UNHEALTHY


def test_health_is_8_once_the_service_is_gone_but_not_where_backfills_mirror_now_and_then(desk: Desk) -> None:
    with desk.process("run") as process:
        wait_until(lambda: desk.call("health").exit_code == 0 and desk.json("status")["owed"] == 0)
        process.kill()
        process.wait(15)
    assert desk.call("health").exit_code == 0, "it may be started again at once"
    gone = time.time() - 1000
    os.utime(desk.state / "lock", (gone, gone))
    said = desk.call("health")
    assert said.exit_code == errors.EXIT_UNHEALTHY
    assert said.stdout.startswith("unhealthy: not_running for 16 min: no syncd holds the lock: start the service")
    assert desk.json("status")["healthy"] is False
    assert desk.call("backfill", "--max-requests", "1").exit_code in (0, errors.EXIT_LIMIT)  # no wait for what was cut
    os.utime(desk.state / "lock", (gone, gone))
    assert desk.call("health").exit_code == 0


def test_verdict_is_told_though_nobody_reads_the_words(mirrored: Desk) -> None:
    with mirrored.process("health", "--max-age", "1ms") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(15) == errors.EXIT_UNHEALTHY


def test_plan_tells_the_price_of_a_sweep(mirrored: Desk) -> None:
    said = mirrored.json("plan")
    assert said["sweep_requests"] == said["lists"] > 0


def test_doctor_finds_a_credential_that_others_may_read(desk: Desk) -> None:
    assert desk.call("doctor", "--offline").exit_code == 0
    (desk.folder / "customer_key").chmod(0o644)
    said = desk.json("doctor", "--offline", code=errors.EXIT_DOCTOR)
    assert [c["check"] for c in said["checks"] if c["result"] == "failed"] == ["credentials"]


def test_metrics_are_written_by_the_daemon_and_doctor_finds_a_folder_that_is_missing(tmp_path: Path) -> None:
    metrics = tmp_path / "node" / "syncd.prom"
    with practice() as simulation:
        desk = Desk(simulation, tmp_path, status={"metrics_file": str(metrics)})
        found = [c for c in desk.json("doctor", "--offline")["checks"] if c["check"] == "metrics file"]
        assert [(c["result"], c["who"]) for c in found] == [("warning", "practice_it")]
        assert str(metrics.parent) in found[0]["message"]
        metrics.parent.mkdir()
        assert "metrics file" not in desk.call("doctor", "--offline").stdout
        with desk.process("run"):
            wait_until(metrics.exists)
        assert 'syncd_report_timestamp_seconds{practice="' in metrics.read_text()


def test_archive_that_is_gone_is_told_at_once(tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    with practice() as simulation:
        desk = Desk(simulation, tmp_path, notify={"command": ["/bin/sh", "-c", f"cat > {letter}"]})
        with desk.process("run"):
            wait_until(lambda: list(desk.archive.glob("patients/*/*")))
            desk.archive.rename(tmp_path / "elsewhere")
            simulation.practice.add_document(1, "png")
            wait_until(lambda: letter.exists() and letter.read_text(), 60)
    notice = json.loads(letter.read_text())
    assert (notice["kind"], notice["reason"], notice["who"]) == ("trouble", "archive_missing", "practice_it")


def test_doctor_finds_an_archive_that_syncds_user_may_not_use(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, *a, **k: path != desk.archive and real(path, *a, **k)
    )  # root may all
    (found,) = [c for c in desk.json("doctor", "--offline", code=7)["checks"] if c["check"] == "archive"]
    assert (found["result"], found["who"]) == ("failed", "practice_it")
    assert "chown" in found["message"]


def test_state_on_a_disk_that_turned_read_only_is_no_matter_of_permissions(
    mirrored: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, access, space = mirrored.state / "index.db", os.access, os.statvfs
    monkeypatch.setattr(os, "access", lambda path, *a, **k: path != index and access(path, *a, **k))
    monkeypatch.setattr(os, "statvfs", lambda path: space("/sys" if path == index else path))
    monkeypatch.setattr(os, "ST_RDONLY", space("/sys").f_flag)  # any flag of another file system
    said = mirrored.json("status")
    assert (said["state"], said["reason"], "read-only" in said["message"]) == ("blocked", "disk_error", True)
    assert mirrored.call("health").exit_code == errors.EXIT_UNHEALTHY


def test_doctor_says_that_its_caller_may_not_open_the_index(mirrored: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    index, real = mirrored.state / "index.db", os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: path != index and real(path, *a, **k))
    told = mirrored.json("doctor", "--offline", code=7)["checks"]
    assert "sudo syncd" in next(c["message"] for c in told if c["check"] == "index")
    assert [c["result"] for c in told if c["check"] == "time zone"] == ["ok"]


def test_doctor_warns_that_nobody_will_be_told(desk: Desk) -> None:
    found = [c for c in desk.json("doctor", "--offline")["checks"] if c["check"] == "notices"]
    assert [(c["result"], c["who"]) for c in found] == [("warning", "practice_it")]


def test_doctor_reports_an_invalid_configuration_as_its_finding(desk: Desk) -> None:
    desk.file.write_text("[practice]\n")
    result = desk.call("doctor", "--offline")
    assert result.exit_code == errors.EXIT_DOCTOR
    assert "time_zone" in result.stdout


def test_pause_sends_nothing_says_so_and_is_ended_by_resume(desk: Desk) -> None:
    assert desk.call("backfill", "--max-requests", "3", "--no-progress").exit_code == 9
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    assert desk.call("pause", "--until", until.isoformat()).exit_code == 0
    said = desk.json("status")
    assert (said["state"], said["reason"], said["healthy"]) == ("paused", "paused", True)
    assert said["next_try_at"].startswith(until.isoformat()[:19])
    assert "paused until" in desk.call("health").stdout
    before = len(desk.simulation.office.arrivals)
    assert desk.call("backfill", "--no-progress").exit_code == 9
    assert len(desk.simulation.office.arrivals) == before
    assert desk.call("resume").exit_code == 0
    assert desk.json("status")["state"] != "paused"
    assert desk.call("backfill", "--no-progress").exit_code == 0


@pytest.mark.parametrize("days", [-1, 8])
def test_pause_that_is_over_or_too_long_is_refused(mirrored: Desk, days: int) -> None:
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    result = mirrored.call("pause", "--until", until.isoformat())
    assert result.exit_code == 2
    assert "at most 7 days" in result.output
    assert mirrored.json("status")["state"] != "paused"


def test_nothing_is_held_and_an_unknown_guard_is_a_usage_error(mirrored: Desk) -> None:
    assert mirrored.json("held")["guards"] == []
    assert mirrored.call("approve", "guard-7", "-n").exit_code == errors.EXIT_USAGE


def test_held_names_usual_causes_of_each_kind_of_hold_which_can_be_rejected(desk: Desk) -> None:
    desk.json("backfill")
    scopes = ("patient-101", "all", "roster", "database")
    with contextlib.closing(Index(desk.state / "index.db")) as index:
        for scope in scopes:
            columns = "scope, reason, made_at, items, of_items"
            index.run(f"INSERT INTO guard ({columns}) VALUES (?, 'disappearances_held', 1e9, 30, 40)", scope)
    guards = desk.json("held")["guards"]
    assert [guard["scope"] for guard in guards] == list(scopes)
    assert len({guard["usual_causes"] for guard in guards}) == len(scopes)
    for guard in guards:
        assert desk.json("reject", guard["id"])["outcome"] == f"{guard['id']} rejected"
    assert desk.json("held")["guards"] == []


# --- looking into the archive


def test_find_names_files_that_have_the_told_bytes(mirrored: Desk) -> None:
    rows = mirrored.found("--current")
    assert rows
    for row in rows:
        assert row.keys() >= {*FIND_KEYS, "schema_version"}
        assert hashlib.sha256((mirrored.archive / row["path"]).read_bytes()).hexdigest() == row["sha256"]


def test_find_asks_for_a_value_of_dash(mirrored: Desk) -> None:
    patient = mirrored.simulation.practice.rows("SELECT PatNum, LName, Birthdate FROM patient LIMIT 1")[0]
    result = mirrored.call(
        "find", "--json", "--name", "-", "--born", "-", answers=f"{patient['LName']}\n{patient['Birthdate']}\n"
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["pat_num"] for row in rows} == {patient["PatNum"]}


def test_table_obeys_no_escape_sequence_of_a_description(mirrored: Desk) -> None:
    shown = mirrored.call("find").stdout
    assert "alarm" in shown
    assert "\x1b" not in shown
    assert plain("a\x1b[31m\u202eb\n") == "a?[31m?b?"
    assert "[red]" in table(("description",), [["[red]"]])


def test_unknown_id_ends_with_2_and_an_id_that_is_none_is_not_repeated(mirrored: Desk) -> None:
    assert mirrored.call("show", "document-999999").exit_code == errors.EXIT_USAGE
    result = mirrored.call("show", "Abendroth")
    assert result.exit_code == errors.EXIT_USAGE
    assert "Abendroth" not in result.output


@pytest.mark.parametrize(
    "words", [["find", "Abendroth"], ["find", "--patient", "Abendroth"], ["find", "--kind", "Abendroth"], ["Abendroth"]]
)
def test_wrong_call_does_not_repeat_what_may_be_a_name(words: list[str]) -> None:
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == errors.EXIT_USAGE
    assert "Error: " in told.output
    assert "Abendroth" not in told.output


def test_question_without_a_terminal_is_a_usage_error(mirrored: Desk) -> None:
    told = mirrored.call("find", "--name", "-", answers="")
    assert told.exit_code == errors.EXIT_USAGE
    assert "no terminal" in told.stderr


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_empty_filter_shows_nobody(mirrored: Desk, empty: str) -> None:
    told = mirrored.call("find", "--name", empty)
    assert (told.exit_code, told.stdout) == (errors.EXIT_USAGE, "")


def test_number_that_no_key_can_have_is_a_usage_error(mirrored: Desk) -> None:
    assert mirrored.call("find", "--patient", str(2**63)).exit_code == errors.EXIT_USAGE
    assert mirrored.call("find", "--patient", str(2**63 - 1)).exit_code == errors.EXIT_OK


def test_item_of_a_kind_that_is_not_mirrored_is_shown(tmp_path: Path) -> None:
    with practice() as simulation:
        patient = simulation.practice.rows("SELECT PatNum FROM patient LIMIT 1")[0]["PatNum"]
        number = simulation.practice.add_mount(patient, 1)
        desk = Desk(simulation, tmp_path, sync={"kinds": ["document"]})
        desk.json("backfill")
        shown = desk.json("show", f"mount-{number}")["versions"]
        assert [row["path"] for row in shown] == [None]


def test_lists_of_a_patient_are_tried_again(mirrored: Desk) -> None:
    assert mirrored.call("retry", "patient-1", "-n").stdout == "would retry patient-1\n"
    assert mirrored.json("retry", "patient-1")["outcome"] == "1 to be tried again now"
    assert mirrored.call("retry", "patient-999999").exit_code == errors.EXIT_USAGE


def test_show_and_history_tell_an_items_versions(mirrored: Desk) -> None:
    wanted = mirrored.found("--kind", "document")[0]
    assert mirrored.json("show", wanted["full_id"])["versions"][0]["sha256"] == wanted["sha256"]
    events = [event["event"] for event in mirrored.json("history", wanted["full_id"])["events"]]
    assert events == ["first_seen", "archived"]


def test_bare_archive_answers_as_the_index_does(
    mirrored: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def rows(*words: str) -> list[tuple[Any, ...]]:
        result = CliRunner().invoke(cli, [*words, "find", "--json"])
        assert result.exit_code == 0, result.output
        return [
            tuple(row[key] for key in ("full_id", "seq", "path", "sha256", "current"))
            for row in map(json.loads, result.stdout.splitlines())
        ]

    assert rows("--archive", str(mirrored.archive)) == rows("-c", str(mirrored.file)) != []
    assert CliRunner().invoke(cli, ["--archive", str(mirrored.archive), "status"]).exit_code == errors.EXIT_USAGE
    assert CliRunner().invoke(cli, ["--archive", str(tmp_path), "find"]).exit_code == errors.EXIT_ARCHIVE


def test_export_and_restore_copy_verified_bytes(mirrored: Desk, tmp_path: Path) -> None:
    wanted = mirrored.found("--kind", "document")[0]
    said = mirrored.json("export", "--patient", str(wanted["pat_num"]), "--to", str(tmp_path / "out"))
    copies = [path for path in (tmp_path / "out").rglob("*(*).*") if path.is_file()]
    assert said["files"] == len(copies) > 0
    copy = Path(mirrored.json("restore", wanted["full_id"], "--to", str(tmp_path / "one"))["path"])
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == wanted["sha256"]
    early = mirrored.call("restore", wanted["full_id"], "--to", str(tmp_path), "--as-of", "2001-01-01")
    assert early.exit_code == errors.EXIT_USAGE


def test_reader_that_leaves_ends_find_quietly(mirrored: Desk) -> None:
    with mirrored.process("find", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(15) == 0


# --- the archive against the index


def test_reindex_rebuilds_what_find_shows(desk: Desk) -> None:
    desk.json("backfill")
    before = [(row["full_id"], row["seq"], row["sha256"]) for row in desk.found()]
    for path in desk.state.glob("index.db*"):
        path.unlink()
    assert desk.call("find").exit_code == errors.EXIT_USAGE
    assert desk.call("backfill").exit_code == errors.EXIT_ARCHIVE
    for path in desk.state.glob("index.db*"):
        path.unlink()
    assert desk.json("reindex")["foreign"] == []
    assert [(row["full_id"], row["seq"], row["sha256"]) for row in desk.found()] == before
    assert desk.json("backfill")["owed"] == 0


def test_verify_finds_changed_and_missing_files(desk: Desk) -> None:
    desk.json("backfill")
    assert desk.json("verify", "--subset", "1/30")["versions"] >= 1
    changed, missing = [desk.archive / row["path"] for row in desk.found("--kind", "document")[:2]]
    changed.chmod(0o600)
    changed.write_bytes(b"x" * changed.stat().st_size)
    missing.unlink()
    said = desk.json("verify", code=errors.EXIT_DAMAGE)
    assert len(said["damaged"]) + len(said["missing"]) == 2


def test_verify_repair_sets_aside_and_the_next_backfill_heals(desk: Desk) -> None:
    desk.json("backfill")
    before = [(row["full_id"], row["version"], row["sha256"]) for row in desk.found()]
    (desk.archive / "stray.txt").write_bytes(b"mine")
    changed = desk.archive / desk.found("--kind", "document")[0]["path"]
    changed.chmod(0o600)
    changed.write_bytes(b"x")
    assert "and repair" in desk.call("verify", "--repair", "-n").stdout
    assert changed.exists()
    said = desk.json("verify", "--repair", code=errors.EXIT_DAMAGE)
    assert (len(said["outcomes"]["queued"]), said["foreign"]) == (1, ["stray.txt"])
    assert not changed.exists()
    assert desk.call("verify").exit_code == errors.EXIT_DAMAGE
    desk.json("backfill")
    assert desk.json("verify")["damaged"] == []
    assert [(row["full_id"], row["version"], row["sha256"]) for row in desk.found()] == before


@pytest.mark.parametrize("held", [False, True])
def test_an_archive_that_was_taken_over_is_verified_and_not_repaired(desk: Desk, held: bool) -> None:
    desk.json("backfill")
    changed = desk.archive / desk.found("--kind", "document")[0]["path"]
    changed.chmod(0o600)
    changed.write_bytes(b"x")
    Archive(desk.archive, 0).take_over("0" * 16)  # `syncd reindex` on another machine
    with Lock(desk.state, "run") if held else contextlib.nullcontext():
        said = desk.call("verify", "--repair")
    assert (said.exit_code, "taken over" in said.stderr) == (errors.EXIT_ARCHIVE, True)
    assert not (desk.archive / "damaged").exists()
    assert desk.call("verify").exit_code == errors.EXIT_DAMAGE
    assert changed.read_bytes() == b"x"


def test_an_archive_below_its_reserve_is_repaired(desk: Desk) -> None:
    desk.json("backfill")
    changed = desk.archive / desk.found("--kind", "document")[0]["path"]
    changed.chmod(0o644)
    desk.file.write_text(re.sub('reserve = ".*"', 'reserve = "900000 GB"', desk.file.read_text()))
    assert desk.call("verify", "--repair").exit_code == 0
    assert changed.stat().st_mode & 0o777 == 0o400


def test_daemon_with_an_index_that_nobody_can_read_lives_on_and_says_what_to_do(desk: Desk) -> None:
    desk.json("backfill")
    before = [(row["full_id"], row["seq"], row["sha256"]) for row in desk.found()]
    (desk.state / "index.db").write_bytes(b"noise" * 1000)
    with desk.process("run") as process:
        wait_until(lambda: "syncd reindex" in json.loads((desk.folder / "log/status.json").read_text())["message"])
        assert "syncd reindex" in desk.call("status").stdout
        assert desk.json("reindex")["foreign"] == []
        assert process.poll() is None
        process.terminate()
        assert process.wait(15) == 0
    assert [(row["full_id"], row["seq"], row["sha256"]) for row in desk.found()] == before


def test_the_log_of_another_database_is_refused(desk: Desk) -> None:
    desk.json("backfill")
    before = len(desk.found())
    path = desk.state / "index.db"
    with contextlib.closing(sqlite3.connect(desk.state / "other.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("CREATE TABLE version (noise)")
        other.executemany("INSERT INTO version VALUES (?)", [("x" * 500,) for _ in range(100)])
        shutil.copy(desk.state / "other.db-wal", path.with_name("index.db-wal"))
    torn = path.read_bytes()
    assert "syncd reindex" in desk.call("status").stdout
    assert desk.call("find").exit_code == errors.EXIT_ARCHIVE
    said = desk.call("backfill")
    assert said.exit_code == errors.EXIT_ARCHIVE
    assert "syncd reindex" in said.stderr
    assert path.read_bytes() == torn, "whoever only looks mixes nothing"
    desk.json("reindex")
    assert len(desk.found()) == before


def test_verify_beside_a_holder_of_the_lock_hands_the_repair_over(desk: Desk) -> None:
    desk.json("backfill")
    (desk.archive / desk.found("--kind", "document")[0]["path"]).unlink()
    with Lock(desk.state, "run"):
        told = desk.call("verify", "--repair")
    assert told.exit_code == errors.EXIT_DAMAGE
    assert "handed to `syncd run`" in told.stdout
    with contextlib.closing(sqlite3.connect(desk.state / "index.db")) as db:
        assert db.execute("SELECT verb FROM wish WHERE done_at IS NULL").fetchall() == [("repair",)]


# --- the demonstration, and what is written about all this


@pytest.mark.timeout(100)
def test_demo_shows_every_change_arriving() -> None:
    result = CliRunner().invoke(cli, ["demo", "--patients", "4"])
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^ +\d+\.\d s  .*(?:archived|version 2|vanished)$", result.stdout, re.MULTILINE)) == 6


def test_demo_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "syncd.demo.tour", None)
    result = CliRunner().invoke(cli, ["demo"])
    assert result.exit_code == errors.EXIT_USAGE
    assert "syncd[demo]" in result.stderr


def test_readme_lists_every_reason_and_every_exit_code() -> None:
    rows = re.findall(r"^\| `?([a-z_]+|\d+)`? \|", README.read_text("utf-8"), re.MULTILINE)
    assert set(errors.REASONS) <= set(rows)
    assert {str(code) for code in EXIT_CODES} <= set(rows)
    for reason, (who, message, code) in errors.REASONS.items():
        assert f"| `{reason}` | {who} | {message} | {code} |" in README.read_text("utf-8")


def test_call_of_a_bare_archive_has_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError):
        _ = Call(archive=tmp_path).settings


def test_signal_in_the_midst_of_a_wait_does_not_block_the_process() -> None:
    stop = Stop()
    lock = vars(stop.event)["_cond"]  # where a handler can find the main thread: inside Event.wait, its lock held
    with lock:
        asking = threading.Thread(target=stop, daemon=True)
        asking.start()
        asking.join(5)
        assert not asking.is_alive()
    assert stop.wait(5)
    assert stop.event.is_set()


# --- the shell


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("syncd sta", {"status"}),
        ("syncd status --fa", {"--failing"}),
        ("syncd -p n", {"north", "northwest"}),
        ("syncd -p north doctor --off", {"--offline"}),
    ],
)
def test_shell_completes_verbs_options_and_names_of_practices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: str, offered: set[str]
) -> None:
    for name in ("north", "northwest", "south"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").touch()
    monkeypatch.setattr("syncd.wiring.PRACTICES", tmp_path)
    words = {"_SYNCD_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    said = CliRunner().invoke(cli, [], env=words, prog_name="syncd", complete_var="_SYNCD_COMPLETE").stdout
    assert {line.partition(",")[2] for line in said.splitlines()} == offered


def test_shell_gets_the_script_that_the_readme_names() -> None:
    (line,) = re.findall(r"^ +(_SYNCD_COMPLETE=bash_source syncd.*)$", README.read_text("utf-8"), re.MULTILINE)
    command = line.partition(">")[0].replace("syncd", f"{sys.executable} -m syncd.cli", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert "complete -o nosort" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=30, check=False).returncode == 0


# --- the faces of a status


def on_a_terminal(desk: Desk, *words: str, until: bytes) -> bytes:
    """What a person sees until the last of these bytes came; then Ctrl-C."""
    here, there = os.openpty()
    line = [sys.executable, "-m", "syncd.cli", "-c", str(desk.file), *words]
    with subprocess.Popen(line, stdout=there, stderr=there, stdin=there) as process:
        os.close(there)
        seen, end = b"", time.monotonic() + 30
        while seen.count(until) < 2 and time.monotonic() < end:
            try:
                seen += os.read(here, 65_536)
            except OSError:  # it ended
                break
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # whoever runs the tests in the background ignores Ctrl-C
            process.wait(10)
        process.kill()
    os.close(here)
    return seen


def test_colours_are_for_terminals_and_watch_redraws_there(desk: Desk) -> None:
    plain_text = desk.call("status").stdout
    assert "\x1b" not in plain_text
    assert plain_text.startswith("mirror: STOPPED (not_running)\n")
    seen = on_a_terminal(desk, "status", "--watch", until=b"this week:")
    assert seen.count(b"this week:") == 2
    assert seen.count(b"\x1b[31m\x1b[1mmirror: STOPPED (not_running)\x1b[0m") == 2
    assert seen.count(b"\x1b[2J") >= 2
    assert seen.index(b"\x1b[2J") < seen.index(b"mirror:")


def test_all_faces_of_a_status_tell_the_same(desk: Desk, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(20)
        desk.simulation.office.faults.add("key_revoked", times=None)
        line = [sys.executable, "-m", "syncd.cli", "-c", str(desk.file), "run"]
        with subprocess.Popen(
            line, stderr=subprocess.DEVNULL, env=os.environ | {"NOTIFY_SOCKET": str(address)}
        ) as daemon:
            said = ""
            while "key_refused" not in said:
                said = systemd.recv(4096).decode()
            told, shown = desk.json("status"), desk.call("status").stdout
            wait_until(lambda: json.loads((desk.folder / "log" / "status.json").read_text())["reason"] == "key_refused")
            daemon.send_signal(signal.SIGTERM)
    words = "Open Dental refuses the API keys (HTTP 401)"
    to_do = "put the right ones in with `sudo syncd setup mirror --only keys`"
    assert said.startswith(f"STATUS=BLOCKED (key_refused): {words}; integrator: {to_do}; next try ")
    assert "\n" not in said
    assert (told["state"], told["reason"], told["who"]) == ("blocked", "key_refused", "integrator")
    assert told["message"] == f"{words}: {to_do}"
    flat = " ".join(shown.split())
    assert f"mirror: BLOCKED (key_refused) {words} integrator: {to_do}; next try " in flat
    assert "mirror: " in (desk.folder / "log" / "status.log").read_text()
