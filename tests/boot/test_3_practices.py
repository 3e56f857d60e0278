"""Two practices on one server: neither can read the other. The second one has its own SFTP site, its own disk, and
encrypted credentials.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from syncd.answers import SITE_PORT
from syncd.demo.simulation import Simulation
from tests.boot.desk import Desk, practice
from tests.boot.machine import Machine, install_section

KEYS = ("developer_key", "customer_key", "sftp_password")


@pytest.fixture(scope="session")
def other_office(machine: Machine) -> Iterator[Simulation]:
    """The practice `west`."""
    with practice(machine, 4, 8, folder="west") as simulation:
        yield simulation


@pytest.fixture(scope="session")
def west(machine: Machine, other_office: Simulation) -> Desk:
    """A second practice, with its archive on another disk and an SFTP site that `setup` makes on this server."""
    west = Desk(machine, other_office, "west", archives="/disks/second")
    west.disk = Path("/mnt/second/west")
    machine.run("mkdir -p /mnt/second /disks/second; echo /mnt/second /disks/second none bind >> /etc/fstab; mount -a")
    site = {"sftp": "here", "sftp_port": SITE_PORT, "sftp_address": f"127.0.0.1:{SITE_PORT}"}
    west.write_answers("/root/west.toml", **site, sftp_sources=["127.0.0.1"])
    machine.run("syncd setup west --answers /root/west.toml")
    return west


def test_second_practice_is_mirrored_beside_the_first(machine: Machine, desk: Desk, west: Desk) -> None:
    machine.run(f"systemctl enable --now {west.unit}")
    west.wait_until_mirrored()
    desk.wait_until_mirrored()
    lines = machine.said("syncd status --all").splitlines()
    assert [line.split()[:2] for line in lines[1:] if "syncd" not in line][-2:] == [["main", "ok"], ["west", "ok"]]
    assert "several practices: say -p NAME, one of main, west" in machine.run("syncd find", check=False).stderr


def test_setups_own_sftp_site_is_where_files_come_from_and_is_back_after_a_reboot(
    machine: Machine, desk: Desk, west: Desk
) -> None:
    placed_at = [str(each.params.get("SftpAddress", "")) for each in list(west.office.office.arrivals)]
    assert {address.partition("/")[0] for address in placed_at} == {f"127.0.0.1:{SITE_PORT}", ""}
    machine.reboot()  # the disk is mounted before the service starts
    machine.wait(lambda: west.is_active() and desk.is_active(), 30.0, "both services run")
    west.wait_for_document(west.add())


def test_disk_outside_srv_that_is_mounted_late_is_waited_for(machine: Machine, west: Desk) -> None:
    machine.run(f"systemctl stop {west.unit}; umount /disks/second; systemctl start {west.unit}")
    assert west.wait_for("blocked", "archive_missing")["who"] == "practice_it"
    machine.run("mount /disks/second")
    west.wait_for_document(west.add(), 180.0)


def test_one_practice_cannot_read_the_other(machine: Machine, desk: Desk, west: Desk) -> None:
    as_west = f"nsenter --target={west.pid} --mount -- setpriv --reuid=syncd-west --regid=syncd-west --clear-groups"
    assert machine.said(f"{as_west} ls {west.archive}/patients")  # so the walls let something through
    for path in (
        *("/var/lib/syncd/main/index.db", "/var/log/syncd/main/syncd.log", f"{desk.archive}/patients"),
        *("/etc/syncd/main/config.toml", "/etc/syncd/main/customer_key", f"/run/credentials/{desk.unit}/customer_key"),
    ):
        assert machine.run(f"test -e {path}").returncode == 0
        done = machine.run(f"{as_west} head -c1 {path}", check=False)
        assert "Permission denied" in done.stderr or "No such file" in done.stderr, path
        assert done.returncode != 0, path
    for name in ("environ", "mem", "root/etc/passwd", "fd/0", "status"):
        path = f"/proc/{desk.pid}/{name}"
        assert "No such file" in machine.run(f"{as_west} cat {path}", check=False).stderr, path
    assert machine.run(f"{as_west} touch {desk.archive}/planted", check=False).returncode != 0


def test_encrypted_credentials_serve_without_the_plain_ones(machine: Machine, west: Desk) -> None:
    folder = "/etc/syncd/west"
    loads, (line,) = [], [line for line in install_section() if line.startswith("systemd-creds")]
    machine.typed.add(line)
    for name in KEYS:
        machine.run(f"{line.replace('customer_key', name).replace('main', 'west')} && rm {folder}/{name}")
        loads.append(f"LoadCredentialEncrypted={name}:{folder}/{name}.cred")
    west.drop_in("credentials", "\n".join(loads))
    west.restart()
    west.wait_for_document(west.add())
    secret = west.office.office.customer_key
    assert machine.run(f"grep -rqF {secret} {folder}", check=False).returncode == 1
