"""`syncd setup` as root, with the system's own commands: accounts, owners, and an SFTP site in its jail.

All of it happens in a mount namespace of its own, where /etc, /srv, /var/lib and /var/log are copies or empty.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from syncd.demo.simulation import Simulation, to_toml
from tests.sites import _free_port
from tests.test_cli import practice, wait_until
from tests.test_setup_site import OLD

ROOM = """
cp -a /etc {room}/etc
mkdir {room}/srv {room}/lib {room}/log {room}/systemd
mount --make-rprivate /
mount --bind {room}/etc /etc; mount --bind {room}/srv /srv
mount --bind {room}/lib /var/lib; mount --bind {room}/log /var/log
[ ! -d /run/systemd ] || mount --bind {room}/systemd /run/systemd
echo ready; exec sleep 1000
"""
# A Python below somebody's home is not readable for the practice's user: what it imports late is imported here.
LATE = "encodings.idna, encodings.utf_8_sig, apscheduler.schedulers.background, structlog, syncd.api, syncd.drop"
SYNCD = f"import {LATE}, syncd.cli; syncd.cli.main()"


class Server:
    """A server of its own in a namespace; the practice and its office are outside."""

    def __init__(self, simulation: Simulation, room: Path) -> None:
        self.simulation, self.port = simulation, _free_port()
        line = ["unshare", "--mount", "sh", "-ec", ROOM.format(room=room)]
        self.holder = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout
        assert self.holder.stdout.readline() == "ready\n"
        self.sshd: subprocess.Popen[bytes] | None = None
        self.room = room

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        line = ["nsenter", f"--target={self.holder.pid}", "--mount", "--wd=/", *words]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=100)

    def syncd(self, *words: str, code: int = 0) -> str:
        done = self.run(sys.executable, "-c", SYNCD, *words)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def setup(self, *words: str, **changed: object) -> str:
        answers = {
            "mode": "service",
            "url": self.simulation.url,
            "time_zone": str(self.simulation.practice.zone),
            "developer_key": self.simulation.office.developer_key,
            "customer_key": self.simulation.office.customer_key,
            "sftp": "here",
            "sftp_port": self.port,
            "sftp_address": f"127.0.0.1:{self.port}",
            "sftp_sources": ["203.0.113.7", "198.51.100.0/28"],
        }
        file = self.room / "etc/answers.toml"
        file.write_text(to_toml({"x": answers | changed}).removeprefix("[x]\n"))
        file.chmod(0o600)
        return self.syncd("setup", "main", "--answers", "/etc/answers.toml", *words)

    def start_site(self) -> None:
        """As the unit does it."""
        unit = self.run("cat", "/etc/systemd/system/syncd-sftp@main.service").stdout.splitlines()
        (check,) = (line.removeprefix("ExecStartPre=") for line in unit if line.startswith("ExecStartPre="))
        assert self.run(*shlex.split(check)).returncode == 0
        (start,) = (line.removeprefix("ExecStart=") for line in unit if line.startswith("ExecStart="))
        line = ["nsenter", f"--target={self.holder.pid}", "--mount", *shlex.split(start)]
        with (self.room / "sshd.log").open("wb") as log:
            self.sshd = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=log)

        def answers() -> bool:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 2) as probe:
                    return probe.recv(4) == b"SSH-"
            except OSError:
                return False

        wait_until(answers)

    @property
    def password(self) -> str:
        return (self.room / "etc/syncd/main/sftp_password").read_text().strip()

    def login(self, user: str = "drop-main", password: str = "", source: str = "127.0.0.1") -> paramiko.Transport:
        wire = socket.create_connection(("127.0.0.1", self.port), 10, (source, 0))
        transport = paramiko.Transport(wire)
        try:
            transport.connect(username=user, password=password or self.password)
        except BaseException:
            transport.close()
            raise
        return transport

    def stop(self) -> None:
        if self.sshd:
            self.sshd.terminate()
            self.sshd.wait(10)
        self.holder.terminate()
        self.holder.wait(10)
        assert self.holder.stdout
        self.holder.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    assert os.geteuid() == 0, "make test-faults needs root"
    room = Path(tempfile.mkdtemp(prefix="setup-"))
    with practice() as simulation:
        server = Server(simulation, room)
        try:
            assert "systemd does not run here" in server.setup()
            server.start_site()
            yield server
        finally:
            server.stop()
    shutil.rmtree(room)


def test_root_mirrors_through_the_site_and_everything_belongs_to_the_practice(server: Server) -> None:
    for _ in range(2):  # before and after the first start
        said = server.syncd("-p", "main", "doctor")
        assert "came whole" in said
        assert "failed" not in said
        server.syncd("-p", "main", "backfill", "--no-progress")
    found = server.run(
        "find", "/srv/archive/main", "/var/lib/syncd/main", "/var/log/syncd/main", "!", "-user", "syncd-main"
    )
    assert found.stdout == found.stderr == ""
    assert server.run("stat", "-c", "%a", "/srv/archive/main", "/var/lib/syncd/main").stdout.split() == ["700", "700"]


def test_a_new_key_is_compared_with_the_index_and_its_files_stay_the_practices(server: Server) -> None:
    server.syncd("-p", "main", "backfill", "--no-progress")
    server.simulation.office.customer_key = "new-customer-key"
    said = server.setup("--only", "keys", "--json", customer_key="new-customer-key")
    assert "known documents are the same there" in said
    found = server.run("find", "/var/lib/syncd/main", "!", "-user", "syncd-main")
    assert found.stdout == found.stderr == ""
    assert "new-customer-key" in (server.room / "etc/syncd/main/customer_key").read_text()


def test_root_reads_what_the_practice_s_user_may_not_before_it_becomes_that_user(server: Server) -> None:
    server.syncd("-p", "main", "backfill", "--no-progress")
    config, key = server.room / "etc/syncd/main/config.toml", server.room / "etc/syncd/main/id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    before = config.read_text()
    try:
        config.write_text(before.replace("[drop]\n", '[drop]\nprivate_key_file = "id_ed25519"\n'))
        server.syncd("-p", "main", "backfill", "--no-progress")  # nothing is owed: the key is read, and not tried
        config.write_text(before.replace("[api]\n", "[api]\nallow_upload = true\n"))
        number = server.simulation.practice.rows("SELECT DocNum FROM document LIMIT 1")[0]["DocNum"]
        server.simulation.practice.delete_document(number)
        server.syncd("-p", "main", "backfill", "--no-progress")
        assert "done" in server.syncd("-p", "main", "put-back", f"document-{number}", "--yes", "--json")
    finally:
        config.write_text(before)


def test_the_account_is_in_a_jail(server: Server) -> None:
    with server.login() as transport:
        sftp = paramiko.SFTPClient.from_transport(transport)
        assert sftp is not None
        assert sftp.listdir("/") == sftp.listdir(".") == sftp.listdir("../..") == ["syncd"]
        for path in ("/etc/passwd", "../../etc/passwd", "/etc/syncd/main/customer_key"):
            with pytest.raises(OSError, match="No such file"):
                sftp.stat(path)
        with pytest.raises(PermissionError):
            sftp.mkdir("/other")
        sftp.mkdir("syncd/ours")
        sftp.rmdir("syncd/ours")


def test_only_this_account_with_its_password_from_its_addresses_gets_in(server: Server) -> None:
    server.login().close()
    for changed in ({"password": "wrong"}, {"user": "root"}, {"user": "syncd-main"}, {"source": "127.0.0.2"}):
        with pytest.raises(paramiko.AuthenticationException):
            server.login(**changed)


def test_there_is_no_shell_behind_the_login(server: Server) -> None:
    with server.login() as transport:
        channel = transport.open_session()
        channel.exec_command("id")
        assert b"uid" not in channel.makefile().read(1000)


@pytest.mark.parametrize("names", OLD.values(), ids=OLD)
def test_a_client_of_2016_gets_in_with_the_password(server: Server, tmp_path: Path, names: tuple[str, ...]) -> None:
    asked = tmp_path / "askpass"
    asked.write_text(f"#!/bin/sh\necho {server.password}\n")
    asked.chmod(0o700)
    kinds = ("KexAlgorithms", "HostKeyAlgorithms", "Ciphers", "MACs")
    told = [f"-o{kind}={name}" for kind, name in zip(kinds, names, strict=True)]
    told += ["-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oPubkeyAuthentication=no"]
    line = ["sftp", "-F/dev/null", f"-P{server.port}", *told, "drop-main@127.0.0.1"]
    around = {**os.environ, "SSH_ASKPASS": str(asked), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
    done = subprocess.run(
        line, input="cd syncd\npwd\n", capture_output=True, text=True, env=around, check=False, timeout=30
    )
    assert "Remote working directory: /syncd" in done.stdout, done.stderr


def test_the_sites_password_is_in_no_log_and_in_its_file_only(server: Server) -> None:
    found = server.run("grep", "-rl", server.password, "/etc", "/var/log", "/var/lib", "/srv").stdout.split()
    assert found == ["/etc/syncd/main/sftp_password"]
