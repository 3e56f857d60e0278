"""Upgrade, roll back, remove: what runs goes on, and nothing that matters is lost."""

from __future__ import annotations

import re

from syncd.errors import EXIT_CONFIG
from tests.boot.desk import Desk
from tests.boot.machine import CLONE, USER, Machine, install_section

NEWER, BROKEN = f"/home/{USER}/newer", f"/home/{USER}/broken"
MIGRATION = '''

@migrations()
def next_tables(db: Database) -> None:
    """Of the next release."""
    db.conn.execute("ALTER TABLE item ADD COLUMN colour TEXT")
'''
BREAKAGE = """

def _end(_: Daemon) -> int:
    sys.exit(1)


Daemon.run = _end
"""
BACKFILL = "syncd-backfill@main"


def clone(machine: Machine, folder: str, version: str, **added: str) -> None:
    """A clone of another version, with text added to modules."""
    machine.put_clone(folder)
    for name in ("pyproject.toml", "syncd/__init__.py"):
        path = machine.inside(folder) / name
        path.write_text(path.read_text().replace('"0.1.0"', f'"{version}"'))
    for name, text in added.items():
        path = machine.inside(folder) / f"syncd/{name}.py"
        path.write_text(path.read_text() + text)


def versions(machine: Machine) -> list[str]:
    """The versions that lie in /opt/syncd, oldest first."""
    return [name.rpartition("-")[0] for name in machine.said("ls -rt /opt/syncd").splitlines() if "-2" in name]


def test_install_that_is_interrupted_leaves_what_ran(machine: Machine, desk: Desk) -> None:
    before, current, pid = versions(machine), machine.said("readlink /opt/syncd/current"), desk.pid
    done = machine.run(f"cd {CLONE} && timeout -s INT 4 sudo systemd/install.sh", USER, check=False)
    assert done.returncode != 0
    assert "not installed, nothing was changed" in done.stdout
    assert (versions(machine), machine.said("readlink /opt/syncd/current"), desk.pid) == (before, current, pid)


def test_upgrade_in_the_middle_of_a_backfill_resumes_it_and_keeps_what_is_archived(
    machine: Machine, desk: Desk
) -> None:
    machine.run(f"systemctl stop {desk.unit} && systemctl disable {desk.unit}")
    new, before = [desk.add() for _ in range(60)], desk.placements()
    machine.run(f"systemctl start {BACKFILL}")
    machine.wait(lambda: desk.placements() - before >= 3, 90.0, "the backfill works")
    desk.office.office.latency = 3.0  # so that it outlasts the installation
    old = machine.show(BACKFILL, "MainPID")
    clone(machine, NEWER, "0.1.1", schema=MIGRATION)
    said = machine.type("sudo systemd/install.sh", NEWER).stdout
    assert f"restarting {BACKFILL}.service" in said
    assert machine.said("syncd version") == "syncd 0.1.1"
    assert machine.show(BACKFILL, "MainPID") not in ("0", old)
    assert desk.placements() - before < 60, "it was over before the upgrade"
    desk.office.office.latency = 0.0
    machine.wait(lambda: machine.show(BACKFILL, "ActiveState") == "inactive", 90.0, "the backfill ends")
    assert machine.show(BACKFILL, "ExecMainStatus") == "0"
    assert set(new) <= desk.archived()
    desk.syncd("verify")
    assert 60 <= desk.placements() - before <= 62  # one may have been under way, and thumbnails
    assert versions(machine) == ["0.1.0", "0.1.1"]


def test_rollback_brings_the_earlier_index_back_and_adopts_what_came_since(machine: Machine, desk: Desk) -> None:
    machine.run(f"systemctl enable --now {desk.unit}")
    since = desk.add()
    desk.wait_for_document(since)
    before = desk.placements()
    said = machine.type("sudo systemd/install.sh --rollback", NEWER).stdout
    assert "the index of main is of the later version" in said
    assert machine.said("syncd version") == "syncd 0.1.0"
    assert desk.is_active()
    assert desk.has(since)
    desk.wait_until_mirrored()
    assert desk.placements() == before
    assert "index of" not in machine.type("sudo systemd/install.sh --rollback", NEWER).stdout  # nothing to do


def test_index_of_a_later_version_is_78_and_both_are_named(machine: Machine, desk: Desk) -> None:
    machine.run(f"systemctl stop {desk.unit}; cp -a /var/lib/syncd/main/index.db /root/index.db")
    machine.run("cp -a /var/lib/syncd/main/index.db.before-reindex /var/lib/syncd/main/index.db")
    assert machine.run(f"systemctl start {desk.unit}", check=False).returncode != 0
    assert machine.show(desk.unit, "ExecMainStatus") == str(EXIT_CONFIG)
    said = re.search(r"index.db is of schema (\d+), this syncd knows schema (\d+)", machine.journal(desk.unit, "-n 20"))
    assert said
    assert int(said[1]) == int(said[2]) + 1
    machine.run(f"mv /root/index.db /var/lib/syncd/main/index.db; systemctl start {desk.unit}")


def test_upgrade_stops_at_the_first_service_that_does_not_come_up(machine: Machine, desk: Desk) -> None:
    machine.run("systemctl start syncd@west")
    west = machine.show("syncd@west", "MainPID")
    clone(machine, BROKEN, "0.1.2", daemon=BREAKAGE)
    done = machine.type("sudo systemd/install.sh", BROKEN, check=False)
    assert done.returncode != 0
    assert "syncd@main.service does not come up with 0.1.2" in done.stderr
    assert "sudo systemd/install.sh --rollback" in done.stderr
    assert machine.show("syncd@west", "MainPID") == west, "the next one was restarted, too"
    machine.type("sudo systemd/install.sh --rollback", BROKEN)
    assert machine.said("syncd version") == "syncd 0.1.0"
    machine.wait(desk.is_active, 30.0, "the service runs")


def test_old_versions_go_but_not_the_current_one_the_previous_one_or_one_in_use(machine: Machine, desk: Desk) -> None:
    machine.run("systemd-run --unit=old /opt/syncd/current/bin/python -c 'import pydantic, time; time.sleep(600)'")
    machine.type("sudo systemd/install.sh --no-restart", NEWER)
    assert machine.show(desk.unit, "ActiveState") == "active"
    assert versions(machine)[-1] == "0.1.1"
    machine.type("sudo systemd/install.sh", NEWER)
    assert versions(machine) == ["0.1.0", "0.1.1", "0.1.1"]
    machine.run("systemctl stop old")


def test_uninstall_removes_the_program_and_keeps_what_the_practice_owns(machine: Machine, desk: Desk) -> None:
    kept = ("/etc/syncd/main/config.toml", "/var/lib/syncd/main/index.db", "/var/log/syncd/main/syncd.log")
    count = f"find {desk.archive} /etc/syncd -type f | wc -l"
    machine.run(f"systemctl stop {desk.unit}")
    before = machine.said(count)
    machine.run(f"systemctl start {desk.unit}")
    said = machine.type("sudo systemd/install.sh --uninstall", CLONE).stdout
    assert all(word in said for word in ("/etc/syncd", "/var/lib/syncd", "/var/log/syncd", "/srv/archive"))
    assert machine.said("ls -d /opt/syncd /usr/local/bin/syncd 2>/dev/null || true") == ""
    units = machine.said("systemctl list-units --all --plain --no-legend 'syncd*'")
    assert [line.split()[0] for line in units.splitlines()] == ["syncd-sftp@west.service"], "the office may write there"
    left = machine.said("cd /etc/systemd/system && find . -name '*syncd*'").split()
    settings = {"./syncd@west.service.d", "./syncd-backfill@west.service.d"}
    site = {"./syncd-sftp@west.service", "./multi-user.target.wants/syncd-sftp@west.service"}
    assert set(left) == settings | site
    assert "/opt/syncd" not in machine.said("ps -eo args --no-headers | grep -v grep | grep syncd || true")
    assert machine.said(count) == before
    assert all(machine.inside(path).exists() for path in kept)


def test_every_line_of_the_readmes_install_section_was_executed(machine: Machine) -> None:
    assert machine.typed == set(install_section())
