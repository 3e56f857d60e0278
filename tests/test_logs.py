"""What may stand in the logs, where it goes, and that logging never stops the work."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from syncd.config import Settings, parse
from syncd.errors import REASONS, SiteError
from syncd.logs import EVENTS, KEYS, Log, StatusFiles, open_logs
from syncd.report import Budget, StatusFacts, Surroundings, status

CANARY = "Mustermann-Canary"
AROUND = Surroundings("main", "0.1.0", Budget(1, 1, 1))


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before


def settings(folder: Path, max_size: str = "1 MB", keep: int = 2) -> Settings:
    text = f"""
    [practice]
    time_zone = "UTC"
    [drop]
    host = "sftp.example.org"
    username = "x"
    known_hosts_file = "known_hosts"
    [archive]
    path = "/srv/archive"
    [log]
    path = "{folder}"
    max_size = "{max_size}"
    keep = {keep}
    """
    return parse(text, name="north", folder=folder, environ={})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "syncd.log").read_text("ascii").splitlines()]


def test_line_begins_with_the_utc_time_and_names_level_event_and_practice(tmp_path: Path) -> None:
    log = open_logs(settings(tmp_path), {}, now=lambda: 1_795_000_000.25)
    log.info("document_archived", item="101/document-34", bytes=12, version=1)
    assert lines(tmp_path) == [
        {
            "time": "2026-11-18T11:06:40.250Z",
            "level": "info",
            "event": "document_archived",
            "item": "101/document-34",
            "bytes": 12,
            "version": 1,
            "practice": "north",
        }
    ]
    assert next(iter(lines(tmp_path)[0])) == "time"


def test_times_are_utc_text_as_everywhere_and_not_seconds_since_the_epoch(tmp_path: Path) -> None:
    log = open_logs(settings(tmp_path), {})
    log.warning("state_changed", lane="api", reason="throttled", next_try_at=1_795_000_000.25)
    log.warning("item_failed", next_try_at=None)
    log.warning("item_failed", next_try_at=float("inf"))
    assert [line["next_try_at"] for line in lines(tmp_path)] == ["2026-11-18T11:06:40.250Z", None, "?"]


def test_unlisted_keys_are_dropped_and_values_that_are_no_plain_words_blanked(tmp_path: Path) -> None:
    log = open_logs(settings(tmp_path), {})
    log.info(
        "item_failed",
        name=CANARY,
        reason=f"{CANARY}\n",
        failure=f"«{CANARY}»",
        item={"kind": "sheet", "description": CANARY, "num": [1, {"note": CANARY}, object()]},
        now="x" * 201,
        seq=float("nan"),
        wait_seconds=1.23456,
        who=None,
    )
    event = f"hello {CANARY}"
    log.info(event)
    text = (tmp_path / "syncd.log").read_text("ascii")
    assert CANARY not in text
    first, second = lines(tmp_path)
    assert (first["reason"], first["failure"], first["now"], first["seq"]) == ("?", "?", "?", "?")
    assert first["item"] == "?"
    assert (first["wait_seconds"], first["who"]) == (1.235, None)
    assert second["event"] == "unlisted_event"


@profile(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(value=st.recursive(st.text() | st.floats() | st.integers() | st.binary(), st.lists))
def test_one_event_is_one_line_of_json_whatever_its_values(tmp_path: Path, value: object) -> None:
    log = open_logs(settings(tmp_path), {})
    before = len(lines(tmp_path)) if (tmp_path / "syncd.log").exists() else 0
    log.info("item_failed", reason=value, exc_info=ValueError(value))
    assert len(lines(tmp_path)) == before + 1


def test_exception_leaves_types_and_places_but_no_text_and_no_locals(tmp_path: Path) -> None:
    log = open_logs(settings(tmp_path), {})
    patient = CANARY
    try:
        try:
            raise OSError(28, f"no space for {patient}")
        except OSError as error:
            raise SiteError("disk_error", patient) from error
    except SiteError as error:
        log.error("turn_failed", where="pull", exc_info=error)
    (first,) = lines(tmp_path)
    assert (first["exception"], first["message_code"]) == ("SiteError/OSError", "ENOSPC")
    assert first["where"].startswith("pull test_logs:")
    assert CANARY not in (tmp_path / "syncd.log").read_text("ascii")


def test_library_warnings_come_without_their_text(tmp_path: Path) -> None:
    open_logs(settings(tmp_path), {})
    open_logs(settings(tmp_path), {})  # opening again replaces: one line a warning
    logging.getLogger("urllib3.connectionpool").warning("GET /patients/%s", CANARY)
    logging.getLogger("apscheduler").info("quiet %s", CANARY)
    (line,) = lines(tmp_path)
    assert (line["event"], line["logger"]) == ("library_warning", "urllib3.connectionpool")
    assert line["log_level"] == "WARNING"
    assert CANARY not in (tmp_path / "syncd.log").read_text("ascii")


def test_debug_events_are_kept_only_when_verbose(tmp_path: Path) -> None:
    open_logs(settings(tmp_path), {}).debug("list_polled")
    assert not (tmp_path / "syncd.log").exists()
    open_logs(settings(tmp_path), {}, verbose=1).debug("list_polled")
    assert lines(tmp_path)[0]["level"] == "debug"


def test_files_and_folder_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    open_logs(settings(folder), {}).info("started")
    StatusFiles(folder).write_json({"state": "ok"})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_log_is_capped_and_keeps_the_newest(tmp_path: Path) -> None:
    log = open_logs(settings(tmp_path, max_size="1 kB", keep=2), {})
    for num in range(100):
        log.info("document_archived", num=num)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["syncd.log", "syncd.log.1", "syncd.log.2"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    ordered = [
        json.loads(line)["num"] for name in reversed(names) for line in (tmp_path / name).read_text().splitlines()
    ]
    assert ordered == list(range(ordered[0], 100))


def shown(log: Log, capsys: pytest.CaptureFixture[str]) -> list[str]:
    log.info("started", pid=7)
    log.info("document_archived", num=1)
    log.info("state_changed", state="blocked", reason="archive_full", who="practice_it")
    log.warning("throttled", wait_seconds=5)
    log.error("turn_failed")
    return capsys.readouterr().err.splitlines()


def test_lane_that_works_again_does_not_claim_that_everything_is_archived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_logs(settings(tmp_path), {}).info("state_changed", lane="archive", reason="ok")
    assert capsys.readouterr().err.endswith("works again\n")


def test_under_systemd_starts_states_and_warnings_are_shown_with_priority_and_action(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, state, warning, error = shown(open_logs(settings(tmp_path), {"JOURNAL_STREAM": "8:9"}), capsys)
    assert first.startswith("<6>syncd north: started pid=7")
    assert state.startswith("<6>syncd north: state_changed state=blocked reason=archive_full")
    assert state.endswith(REASONS["archive_full"][1])
    assert warning.startswith("<4>")
    assert error.startswith("<3>")


def test_on_a_terminal_there_is_no_priority_and_verbosity_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(shown(open_logs(settings(tmp_path), {}), capsys)) == 4
    loud = shown(open_logs(settings(tmp_path), {}, verbose=1), capsys)
    assert len(loud) == 5
    assert loud[0].startswith("syncd north: started")
    assert len(shown(open_logs(settings(tmp_path), {}, verbose=-1), capsys)) == 1


def test_closed_or_missing_stderr_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_logs(settings(tmp_path), {})
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        log.error("turn_failed")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1, errors="replace") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        log.error("turn_failed")
        os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())  # so that closing does not fail
    assert len(lines(tmp_path)) == 3


def test_log_that_cannot_be_written_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.write_text("a file where the folder should be")
    log = open_logs(settings(folder), {})
    log.info("started")
    log.info("stopped")
    folder.unlink()
    log.info("started")
    log.info("stopped")
    assert [line.get("lines_lost") for line in lines(folder)] == [2, None]


def test_line_that_does_not_fit_on_the_disk_leaves_no_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "syncd.log"
    code = """
import pathlib, resource, sys
from syncd.logs import CappedFile
file = CappedFile(pathlib.Path(sys.argv[1]), 1000, 1)
file.append("whole\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    file.append("does not fit\\n")
except OSError:
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "refused\n"
    assert path.read_text() == "whole\n"


def test_status_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    files = StatusFiles(tmp_path)
    files.write_json({"state": "ok", "owed": 3})
    files.write_json({"state": "paused"})
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "paused"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_metrics_are_for_another_user_and_replaced_as_a_whole(tmp_path: Path) -> None:
    metrics = tmp_path / "node" / "syncd.prom"
    files = StatusFiles(tmp_path / "log", metrics_file=metrics)
    assert files.write_json(status(StatusFacts(), AROUND, 0.0))  # a folder that is missing: doctor says so
    metrics.parent.mkdir()
    for at in (60.0, 120.0):
        files.write_json(status(StatusFacts(), AROUND, at))
    assert 'syncd_report_timestamp_seconds{practice="main"} 120.0\n' in metrics.read_text()
    assert stat.S_IMODE(metrics.stat().st_mode) == 0o644
    assert list(metrics.parent.iterdir()) == [metrics]


def test_report_is_appended_and_capped(tmp_path: Path) -> None:
    files = StatusFiles(tmp_path, max_size=100, keep=1)
    for number in range(20):
        files.append_report(f"report {number}: all is well\n")
    assert (tmp_path / "status.log").read_text().endswith("report 19: all is well\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status.log", "status.log.1"]


def test_status_that_cannot_be_written_raises_nothing_and_is_written_once_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files = StatusFiles(tmp_path / "file")
    files.write_json({})
    files.append_report("x\n")
    (tmp_path / "status.json").mkdir()
    StatusFiles(tmp_path).write_json({})
    assert (tmp_path / "status.json").is_dir()
    (tmp_path / "status.json").rmdir()
    StatusFiles(tmp_path).write_json({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "status.json"]


def test_every_event_has_its_meaning_in_one_line() -> None:
    assert list(EVENTS) == sorted(EVENTS)
    assert all(meaning and "\n" not in meaning for meaning in EVENTS.values())
    assert not {"name", "path", "description", "note", "password", "file_name"} & KEYS


def logged() -> Iterator[tuple[str, set[str], set[str]]]:
    """Place, possible event names and keys of each call of a log in the product."""
    for path in sorted((Path(__file__).parents[1] / "syncd").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=owner, attr="debug" | "info" | "warning" | "error"), args=[event]
                ):
                    if ast.unparse(owner).split(".")[-1].lstrip("_") == "log":
                        names = {part.value for part in ast.walk(event) if isinstance(part, ast.Constant)}
                        keys = {keyword.arg or "**" for keyword in node.keywords}
                        yield f"{path.name}:{node.lineno}", {str(name) for name in names}, keys


@pytest.mark.parametrize(("environ", "lines"), [({}, 0), ({"JOURNAL_STREAM": "8:9"}, 1)])
def test_head_of_the_audit_log_is_for_the_journal_and_not_for_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], environ: dict[str, str], lines: int
) -> None:
    open_logs(settings(tmp_path), environ).info("audit_head", n=3, hash="ab" * 32)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_every_event_and_key_that_syncd_logs_is_listed() -> None:
    calls = list(logged())
    assert calls
    for place, names, keys in calls:
        assert names, place
        assert names <= EVENTS.keys(), place
        assert keys <= KEYS | {"exc_info", "**"}, place
