"""The word that goes out when a service ends for good: one line in the journal, one notice to the user's command."""

from __future__ import annotations

import datetime as dt
import json
import os
from pathlib import Path

import pytest

from syncd import alert, wiring

WRONG = {"MONITOR_UNIT": "syncd@main.service", "MONITOR_SERVICE_RESULT": "exit-code", "MONITOR_EXIT_STATUS": "78"}


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("78", "`syncd -p main doctor --offline` says where"),
        ("243", "`systemctl cat syncd@main.service` names the files"),
        ("1", "`journalctl -u syncd@main.service`"),
    ],
)
def test_alert_names_the_unit_the_exit_code_and_what_to_do(status: str, remedy: str) -> None:
    said = alert.message("main", "syncd@main.service", {**WRONG, "MONITOR_EXIT_STATUS": status})
    assert f"exit code {status}" in said
    assert remedy in said
    assert said.endswith("`systemctl start syncd@main.service`")


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("3", "something is owed or failing: `syncd -p main status --failing`"),
        ("5", "`syncd -p main status` says which"),
        ("6", "`syncd -p main held`"),
        ("9", "it stopped at a limit"),
        ("11", "another process holds the lock"),
        ("13", "`syncd -p main status` say why"),
    ],
)
def test_backfill_that_ends_early_is_told_as_that_and_not_as_a_service_that_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, remedy: str
) -> None:
    unit, told = "syncd-backfill@main.service", tmp_path / "told"
    says(tmp_path, monkeypatch, "echo failed", unit)
    configured(tmp_path, monkeypatch, f'[notify]\ncommand = ["/bin/sh", "-c", "cat > {told}"]\n')
    alert.main("main", {**WRONG, "MONITOR_UNIT": unit, "MONITOR_EXIT_STATUS": status}, 7.0)
    notice = json.loads(told.read_text())
    assert (notice["state"], notice["reason"], notice["reasons"]) == (
        *("degraded", "backfill_unfinished", ["backfill_unfinished"]),
    )
    assert f"{unit} ended before all was done (exit code {status}): " in notice["line"]
    assert remedy in notice["line"]
    assert notice["line"].endswith(f"then `systemctl start {unit}` goes on")
    assert "not_running" not in told.read_text()


@pytest.mark.parametrize(("count", "told"), [(5, False), (640, False), (1280, True), (1281, False), (2560, True)])
def test_service_that_another_process_keeps_out_is_told_after_half_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, told: bool
) -> None:
    says(tmp_path, monkeypatch, f"echo {count}")
    configured(tmp_path, monkeypatch, "")
    alert.main("main", {"SERVICE_RESULT": "exit-code", "EXIT_STATUS": "11"}, 7.0)
    said = capsys.readouterr().err
    assert bool(said) == told
    assert not said or "the service goes on once it has ended" in said


def test_alert_names_the_signal_that_killed_the_service() -> None:
    killed = {"MONITOR_SERVICE_RESULT": "signal", "MONITOR_EXIT_STATUS": "KILL"}
    assert "(signal KILL)" in alert.message("main", "syncd-backfill@main.service", killed)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("echo activating", False),
        ("echo active", False),
        ("echo failed", True),
        ("echo inactive", True),
        ("exit 1", True),
    ],
)
def test_service_that_systemd_starts_again_is_no_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, told: bool
) -> None:
    says(tmp_path, monkeypatch, line)
    configured(tmp_path, monkeypatch, "")
    alert.main("main", WRONG, 7.0)
    assert bool(capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("result", "count", "told"),
    [
        *[("exit-code", count, True) for count in (5, 10, 20, 40)],
        *[("watchdog", count, False) for count in (0, 1, 4, 6, 8, 15, 16)],
        ("success", 5, False),
    ],
)
def test_service_that_ends_again_and_again_is_told_now_and_then(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    result: str,
    count: int,
    told: bool,
) -> None:
    says(tmp_path, monkeypatch, f"echo {count}")
    configured(tmp_path, monkeypatch, "")
    alert.main("main", {"SERVICE_RESULT": result, "EXIT_STATUS": "1"}, 7.0)
    said = capsys.readouterr().err
    assert bool(said) == told
    assert not said or f"ends again and again ({count} restarts, the last end: exit code 1)" in said


def test_restarts_while_a_backfill_held_the_lock_do_not_count_against_a_service_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(tmp_path, monkeypatch, "")
    for code, count in (("11", 900), ("1", 901), ("1", 905)):
        says(tmp_path, monkeypatch, f"echo {count}")
        ended = {"SERVICE_RESULT": "exit-code", "EXIT_STATUS": code, "STATE_DIRECTORY": str(tmp_path)}
        alert.main("main", ended, 7.0)
    assert "ends again and again (5 restarts" in (said := capsys.readouterr().err)
    assert len(said.splitlines()) == 1


def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, unit: str = "syncd@main.service") -> None:
    """`systemctl` is a program that runs this line."""
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\n[ "$4" = {unit} ] && {line}\n')
    (tmp_path / "systemctl").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.fixture(autouse=True)
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs on this machine, `systemctl` says that the service failed."""
    says(tmp_path, monkeypatch, "echo failed")


def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "config.toml").write_text(text)
    monkeypatch.setattr(wiring, "PRACTICES", tmp_path)


def test_command_of_a_wrong_configuration_gets_the_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, told = tmp_path / "alert", tmp_path / "told"
    script.write_text(f"#!/bin/sh\ncat > {told}\n")
    script.chmod(0o700)
    configured(tmp_path, monkeypatch, f'[practise]\n[notify]\ncommand = ["{script}"]\n')
    alert.main("main", WRONG, 7.0)
    notice = json.loads(told.read_text())
    assert (notice["kind"], notice["practice"], notice["reason"]) == ("trouble", "main", "not_running")
    assert "exit code 78" in notice["line"]
    assert dt.datetime.fromisoformat(notice["at"]).tzinfo is not None
    assert capsys.readouterr().err.startswith("<3>syncd main: syncd@main.service ended")


@pytest.mark.parametrize("text", ["", "[notify]\n", "[notify]\ncommand = 7\n", "[notify]\ncommand = [7]\n", "no TOML"])
def test_without_a_command_the_journal_alone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    configured(tmp_path, monkeypatch, text)
    alert.main("main", WRONG, 7.0)
    assert capsys.readouterr().err.count("\n") == 1


def test_command_that_fails_is_told_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(tmp_path, monkeypatch, '[notify]\ncommand = ["/nonexistent/alert"]\n')
    alert.main("main", WRONG, 7.0)
    assert "command failed: FileNotFoundError" in capsys.readouterr().err
