"""A new user installs syncd as the README says; the service mirrors the practice, behind its walls."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable

import pytest

from syncd.cli import cli
from syncd.errors import EXIT_LOCKED
from tests.boot.desk import Desk
from tests.boot.machine import CLONE, USER, Machine, install_section

COMMANDS, SECONDS = 5, 300.0


def test_every_command_of_the_readme_leads_to_a_running_service_that_mirrors(
    machine: Machine, desk: Desk, record_property: Callable[[str, object], None]
) -> None:
    section, began_at = install_section(), time.monotonic()
    lines = section[: section.index("sudo systemctl enable --now syncd@main") + 1]
    for line in lines:
        machine.type(line, typed=desk.typed if "setup" in line else "")
    assert machine.show(desk.unit, "ActiveState") == "active"
    desk.wait_until_mirrored()
    took = time.monotonic() - began_at
    record_property("figures", f"({len(lines)} commands, {took:.0f} s)")
    assert took < SECONDS
    assert len(lines) <= COMMANDS


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("systemd/install.sh", "only root can install: sudo systemd/install.sh"),
        (
            "sudo systemd/install.sh --upgrade",
            "usage: sudo systemd/install.sh [--no-restart | --rollback | --uninstall]",
        ),
        ("sudo systemd/install.sh --rollback", "there is no previous version to go back to"),
        ("sudo flock /opt/syncd/.lock systemd/install.sh", "another install.sh runs: wait for its end"),
        ("sudo env PATH=/root/no-venv:$PATH systemd/install.sh", "python3-venv is missing: apt install python3-venv"),
        ("sudo env PATH=/root/old:$PATH systemd/install.sh", "Python 3.11 or newer is needed: apt install python3"),
    ],
)
def test_install_that_cannot_begin_says_why_and_changes_nothing(machine: Machine, line: str, told: str) -> None:
    for name, lacks in (("no-venv", "*ensurepip*"), ("old", "*version_info*")):
        machine.inside(f"/root/{name}").mkdir(exist_ok=True)
        fake = machine.inside(f"/root/{name}/python3")
        fake.write_text(f'#!/bin/sh\ncase $* in {lacks}) exit 1 ;; esac\nexec /usr/bin/python3 "$@"\n')
        fake.chmod(0o755)
    before = machine.said("ls -l /opt/syncd")
    done = machine.run(f"cd {CLONE} && {line}", USER, check=False)
    assert (done.returncode, told in done.stderr) == (1, True), done.stderr
    assert machine.said("ls -l /opt/syncd") == before


def test_program_is_on_path_and_folders_are_closed_to_others(machine: Machine, desk: Desk) -> None:
    assert machine.said("syncd version", USER) == "syncd 0.1.0"
    assert machine.said("readlink /usr/local/bin/syncd") == "/opt/syncd/current/bin/syncd"
    for folder in ("/var/lib/syncd/main", "/var/log/syncd/main", str(desk.archive)):
        assert machine.said(f"stat -c '%a %U %G' {folder}") == "700 syncd-main syncd-main", folder
    assert machine.said("systemctl is-enabled syncd@main syncd.target").split() == ["enabled", "enabled"]


def test_ready_waits_for_no_answer_from_outside(machine: Machine, desk: Desk) -> None:
    machine.run(f"systemctl stop {desk.unit}")
    desk.office.office.latency, began_at = 30.0, time.monotonic()
    try:
        desk.restart()
        assert desk.is_active()
        ready_at = time.monotonic()
        assert ready_at - began_at < 20.0
        machine.run(f"systemctl stop {desk.unit}")
        assert time.monotonic() - ready_at < 10.0
    finally:
        desk.office.office.latency = 0.0
    assert machine.show(desk.unit, "Result") == "success"


def test_not_ready_without_the_lock_the_journal_says_who_has_it_and_the_service_comes_once_it_is_free(
    machine: Machine, desk: Desk
) -> None:
    machine.run(f"systemctl stop {desk.unit}")
    with machine.inside("/var/lib/syncd/main/lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert machine.run(f"systemctl start {desk.unit}", check=False).returncode != 0
        assert machine.show(desk.unit, "SubState") == "auto-restart"
        assert machine.show(desk.unit, "ExecMainStatus") == str(EXIT_LOCKED)
        assert "holds the lock of this practice" in machine.journal(desk.unit, "-n 20")
    machine.wait(lambda: machine.show(desk.unit, "ActiveState") == "active", 60.0, "started again by systemd")


def test_status_line_of_systemd_is_the_one_of_syncd(machine: Machine, desk: Desk) -> None:
    desk.wait_until_mirrored()
    said = "OK (ok): everything that is listed is archived; nobody needs to act"
    machine.wait(lambda: machine.show(desk.unit, "StatusText") == said, 70.0, "STATUS=")


def test_nothing_but_state_logs_and_archive_can_be_written(machine: Machine, desk: Desk) -> None:
    inside = f"nsenter --target={desk.pid} --mount --"
    mounts = [line.split() for line in machine.said(f"cat /proc/{desk.pid}/mountinfo").splitlines()]
    writable = {words[4] for words in mounts if "rw" in words[5].split(",")}
    kernel = ("/dev/pts", "/dev/hugepages", "/dev/mqueue", "/proc", "/sys", "/run/host")  # root's, or the process's own
    assert {each for each in writable if not each.startswith(kernel)} == {
        *("/var/lib/syncd/main", "/var/log/syncd/main", "/srv/archive", "/tmp", "/var/tmp"),
    }
    for folder in (
        "/",
        "/etc/syncd/main",
        "/opt/syncd/current/bin",
        "/usr",
        "/var/lib",
        "/var/lib/syncd",
        "/srv",
        "/run/lock",
        "/dev/shm",
    ):
        done = machine.run(f"{inside} touch {folder}/planted", check=False)  # even root, from inside those walls
        assert "Read-only file system" in done.stderr, folder
    assert machine.run(f"{inside} ls /home/{USER}", check=False).returncode != 0
    status = dict(line.split(":", 1) for line in machine.said(f"cat /proc/{desk.pid}/status").splitlines())
    assert status["CapEff"].strip() == status["CapBnd"].strip() == "0" * 16
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


FOR_ROOT = {  # verb -> arguments, and the exit code while the service runs and all is well
    "approve": ("guard-1", 2),
    "audit": ("--verify", 0),
    "backfill": ("--no-progress", 0),
    "demo": ("", 2),
    "destroy": ("document-999999 --ticket T-1 --yes", 2),
    "doctor": ("", 0),
    "export": ("--patient 999999 --to /tmp/export", 2),
    "find": ("--current", 0),
    "health": ("", 0),
    "held": ("", 0),
    "history": ("document-999999", 2),
    "pause": ("--until 2020-01-01", 2),
    "plan": ("", 0),
    "put-back": ("document-999999 --yes", 2),
    "reindex": ("", 11),
    "reject": ("guard-1", 2),
    "restore": ("document-999999 --to /tmp/restore", 2),
    "resume": ("", 0),
    "retry": ("", 0),
    "run": ("", 11),
    "setup": ("main -n --answers /root/answers.toml", 0),
    "show": ("document-999999", 2),
    "status": ("", 0),
    "verify": ("", 0),
    "version": ("", 0),
}


def test_every_verb_works_as_root_and_leaves_all_files_to_the_practices_user(machine: Machine, desk: Desk) -> None:
    assert FOR_ROOT.keys() == cli.commands.keys()
    desk.write_answers("/root/answers.toml")
    for verb, (words, code) in FOR_ROOT.items():
        done = machine.run(f"cd /tmp && syncd {verb} {words}", check=False)
        assert done.returncode == code, (verb, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, verb
    folders = f"/var/lib/syncd/main /var/log/syncd/main {desk.archive}"
    assert machine.said(f"find {folders} ! -user syncd-main") == ""


def test_every_verb_tells_an_ordinary_user_what_to_type(machine: Machine, desk: Desk) -> None:
    for verb, (words, _) in FOR_ROOT.items():
        done = machine.run(f"syncd {verb} {words}", USER, check=False)
        if verb in ("version", "demo"):
            continue
        assert done.returncode != 0, verb
        assert "sudo syncd" in done.stdout + done.stderr, (verb, done)
