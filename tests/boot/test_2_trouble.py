"""What goes wrong on a server, and that the service comes back or says who must act."""

from __future__ import annotations

import json
import re

from syncd.errors import EXIT_CONFIG
from tests.boot.desk import Desk
from tests.boot.machine import Machine

AT_ONCE = "RestartSec=100ms"


def test_stuck_daemon_is_restarted_by_the_watchdog_and_shows_where_it_stood(machine: Machine, desk: Desk) -> None:
    desk.drop_in("test", f"{AT_ONCE}\nWatchdogSec=3s")
    desk.restart()
    stuck = desk.pid
    machine.run(f"kill -STOP {stuck}")
    machine.wait(lambda: desk.pid not in (0, stuck) and desk.is_active(), 30.0, "another process is READY")
    said = machine.journal(desk.unit, "-n 200")
    assert "Watchdog timeout" in said
    assert "Fatal Python error: Aborted" in said
    assert "most recent call first" in said


def test_killed_daemon_is_restarted_and_goes_on(machine: Machine, desk: Desk) -> None:
    new, killed, alerts = desk.add(), desk.pid, "journalctl -b -o cat -t syncd-alert"
    before = machine.said(alerts)
    machine.run(f"kill -KILL {killed}")
    machine.wait(lambda: desk.pid not in (0, killed) and desk.is_active(), 30.0, "another process is READY")
    desk.wait_for_document(new)
    assert machine.said(alerts) == before, "it did not end for good"
    desk.drop_in("test", "")


def test_service_that_ends_again_and_again_is_told_once_in_a_while(machine: Machine, desk: Desk) -> None:
    desk.drop_in("test", f"{AT_ONCE}\nExecStart=\nExecStart=/bin/false")
    told = f"journalctl -b -o cat -p err -u {desk.unit} --grep 'ends again and again'"
    machine.run(f"systemctl restart --no-block {desk.unit}")
    machine.wait(lambda: "5 restarts, the last end: exit code 1" in machine.said(f"{told} || true"), 60.0, "it is told")
    desk.drop_in("test", "")
    desk.restart()
    counts = re.findall(r"\((\d+) restarts", machine.said(told))
    assert counts == ["5", "10", "20", "40"][: len(counts)]


def test_service_is_back_after_a_reboot(machine: Machine, desk: Desk) -> None:
    machine.reboot()
    machine.wait(desk.is_active, 30.0, "the service runs")
    desk.wait_for_document(desk.add())


def test_target_stops_and_starts_all_practices(machine: Machine, desk: Desk) -> None:
    machine.run("systemctl stop syncd.target")
    assert machine.show(desk.unit, "ActiveState") == "inactive"
    machine.run("systemctl start syncd.target")
    machine.wait(desk.is_active, 30.0, "the service runs")


def test_archive_that_is_mounted_late_is_waited_for(machine: Machine, desk: Desk) -> None:
    machine.run(f"systemctl stop {desk.unit}; mkdir /mnt/disk; mv {desk.archive} /mnt/disk/main")
    machine.run(f"install -d -m 0700 -o syncd-main -g syncd-main {desk.archive}")
    machine.run(f"systemctl start {desk.unit}")
    said = desk.wait_for("blocked", "archive_missing")
    assert (said["who"], desk.is_active()) == ("practice_it", True)
    assert machine.said(f"ls -A {desk.archive}") == ""
    machine.run(f"mount --bind /mnt/disk/main {desk.archive}")
    desk.wait_for_document(desk.add(), 180.0)
    machine.run(f"systemctl stop {desk.unit}; umount {desk.archive} && rmdir {desk.archive}")
    machine.run(f"mv /mnt/disk/main {desk.archive}; systemctl start {desk.unit}")


def test_missing_credential_ends_the_service_once_and_is_told(machine: Machine, desk: Desk) -> None:
    machine.run(f"systemctl stop {desk.unit}; mv /etc/syncd/main/customer_key /root")
    assert machine.run(f"systemctl start {desk.unit}", check=False).returncode != 0
    assert (machine.show(desk.unit, "ActiveState"), machine.show(desk.unit, "NRestarts")) == ("failed", "0")
    alert = "journalctl -b -o cat -t syncd-alert -p err"
    machine.wait(lambda: "a credential is missing" in machine.said(alert), 10.0, "the alert")
    machine.run(f"mv /root/customer_key /etc/syncd/main/; systemctl start {desk.unit}")


def test_wrong_configuration_ends_the_service_with_78_one_clear_line_and_a_notice(machine: Machine, desk: Desk) -> None:
    script, config = "/usr/local/bin/tell", "/etc/syncd/main/config.toml"
    machine.inside(script).write_text("#!/bin/sh\nsystemd-cat -t told\n")
    machine.run(f"chmod 755 {script}; cp -a {config} /root/config.toml")
    machine.run(f'printf \'[notify]\\ncommand = ["{script}"]\\naftre = "1h"\\n\' >> {config}')
    assert machine.run(f"systemctl restart {desk.unit}", check=False).returncode != 0
    assert machine.show(desk.unit, "ExecMainStatus") == str(EXIT_CONFIG)
    assert (machine.show(desk.unit, "ActiveState"), machine.show(desk.unit, "NRestarts")) == ("failed", "0")
    told = "journalctl -b -o cat -t told"
    lines = [line for line in machine.said("journalctl -b -o cat -t syncd").splitlines() if "aftre" in line]
    assert lines == ["syncd: [notify] aftre: unknown key; did you mean after?"]
    machine.wait(lambda: machine.said(told), 10.0, "the notice")
    assert "exit code 78" in json.loads(machine.said(told))["line"]
    machine.run(f"cp -a /root/config.toml {config}; systemctl start {desk.unit}")


def test_changed_key_is_a_named_state_until_the_new_one_is_there(machine: Machine, desk: Desk) -> None:
    desk.office.office.customer_key = "another-customer-key"
    said = desk.wait_for("blocked", "key_refused")
    assert (said["who"], desk.is_active()) == ("integrator", True)
    new = desk.add()
    machine.run("syncd setup main --only keys", typed="\nanother-customer-key\n")
    desk.wait_for_document(new)
