"""`syncd setup`: a practice is configured by questions or by a file of answers, after a look at what they lead to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from click.testing import CliRunner, Result

from syncd import errors
from syncd.cli import cli
from syncd.demo.build import build_practice
from syncd.demo.simulation import Simulation, to_toml
from syncd.service import Lock
from syncd.setup import Places
from tests.sites import SSHD
from tests.test_cli import practice

pytestmark = pytest.mark.slow  # HTTP and SFTP servers for each test

STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "{log}"
case "$(basename "$0")" in
    chpasswd) cat >> "{log}.stdin" ;;
    install) for last; do :; done; [ "$last" = /run/sshd ] || mkdir -m 700 -p {folders} ;;
esac
"""
STUBS = ("useradd", "install", "chown", "chpasswd", "systemctl")


class Server:
    """A scratch root with a simulated practice to configure; the system's own commands only take notes."""

    def __init__(self, simulation: Simulation, folder: Path) -> None:
        self.simulation, self.root = simulation, folder / "root"
        self.log = folder / "commands"
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name in STUBS:
            folders = '$(for each; do case "$each" in /*) echo "$each" ;; esac; done)'
            (self.commands / name).write_text(STUB.format(log=self.log, folders=folders))
            (self.commands / name).chmod(0o755)
        self.etc = self.root / "etc/syncd/main"
        self.archive = folder / "archive"
        self.state = folder / "state"
        self.file = folder / "answers.toml"
        self.root.mkdir()

    @property
    def answers(self) -> dict[str, object]:
        site = self.simulation.outside
        return {
            "mode": "service",
            "url": self.simulation.url,
            "time_zone": str(self.simulation.practice.zone),
            "developer_key": self.simulation.office.developer_key,
            "customer_key": self.simulation.office.customer_key,
            "sftp": "elsewhere",
            "sftp_host": site.host,
            "sftp_port": site.port,
            "sftp_username": site.username,
            "sftp_password": site.password,
            "sftp_folder": site.folder,
            "sftp_address": f"{site.host}:{site.port}",
            "trust_host_key": True,
            "archive": str(self.archive),
        }

    def call(self, *words: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(cli, ["setup", "main", *words], input=typed)

    def given(self, *words: str, code: int = 0, **changed: Any) -> Result:
        """A call with a file of answers; None leaves one out."""
        wanted = {name: value for name, value in (self.answers | changed).items() if value is not None}
        self.file.write_text(to_toml({"x": wanted}).removeprefix("[x]\n"))
        self.file.chmod(0o600)
        result = self.call("--answers", str(self.file), *words)
        assert result.exit_code == code, result.output
        return result

    def syncd(self, *words: str) -> Result:
        return CliRunner().invoke(cli, ["-c", str(self.etc / "config.toml"), *words])

    def said(self) -> str:
        """Every command of the system that was called."""
        return self.log.read_text() if self.log.exists() else ""

    def everything(self) -> dict[str, tuple[int, bytes]]:
        """Every file below the scratch root: mode and content."""
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        return {str(path): (path.stat().st_mode & 0o777, path.read_bytes()) for path in files}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with practice() as simulation:
        server = Server(simulation, tmp_path)
        monkeypatch.setattr("syncd.setup.PLACES", Places(server.root, os.geteuid()))
        monkeypatch.setenv("PATH", f"{server.commands}:{os.environ['PATH']}")
        monkeypatch.setenv("STATE_DIRECTORY", str(server.state))
        monkeypatch.setenv("LOGS_DIRECTORY", str(tmp_path / "log"))
        yield server


def test_a_file_of_answers_is_enough_for_a_mirror(server: Server) -> None:
    result = server.given()
    assert "sudo systemctl enable --now syncd@main" in result.stdout
    assert "syncd-backfill" not in result.stdout, "it would hold the lock for days, and keep the service out"
    assert server.syncd("backfill", "--no-progress").exit_code == 0
    assert server.syncd("doctor").exit_code == 0


def typed(server: Server, **changed: str) -> str:
    """What somebody types who is asked everything, for the first time."""
    site = server.simulation.outside
    lines = {
        "mode": "service",
        "url": server.simulation.url,
        "time_zone": str(server.simulation.practice.zone),
        "developer_key": server.simulation.office.developer_key,
        "customer_key": server.simulation.office.customer_key,
        "sftp": "",
        "sftp_host": site.host,
        "sftp_port": str(site.port),
        "sftp_username": site.username,
        "sftp_password": site.password,
        "sftp_folder": "",
        "sftp_address": f"{site.host}:{site.port}",
        "archive": str(server.archive),
        "notify_command": "",
        "ping_url": "",
        "trust": "y",
    }
    return "\n".join((lines | changed).values()) + "\n"


def secrets_of(server: Server) -> list[str]:
    office = server.simulation.office
    return [office.developer_key, office.customer_key, server.simulation.outside.password]


# --- what is asked


def test_a_dialogue_is_enough_for_a_mirror(server: Server) -> None:
    result = server.call(typed=typed(server))
    assert result.exit_code == 0, result.output
    assert server.syncd("backfill", "--no-progress").exit_code == 0


def test_the_dialogue_says_what_is_wrong_and_asks_again(server: Server) -> None:
    changed = {
        "mode": "remot\nservice",
        "time_zone": "Chicago\nAmerica/Chicago",
        "sftp": "there\nelsewhere",
        "sftp_port": f"ssh\n99999\n{server.simulation.outside.port}",
        "archive": f"archive\n{server.archive}",
        "notify_command": "'/bin/echo\nalert\n/bin/echo --now",
    }
    result = server.call(typed=typed(server, **changed))
    assert result.exit_code == 0, result.output
    for words in ("mode: must be", "is not a time zone", "must be here or elsewhere", "must be a valid integer"):
        assert words in result.stderr
    for words in ("less than or equal to 65535", "absolute path in quotes", "quotation mark", "absolute path first"):
        assert words in result.stderr
    written = tomllib.loads((server.etc / "config.toml").read_text())
    assert written["notify"]["command"] == ["/bin/echo", "--now"]


def test_enter_keeps_everything_byte_for_byte(server: Server) -> None:
    server.given(notify_command=["/bin/echo", "a b"], ping_url="https://example.org/token")
    path = server.etc / "config.toml"
    path.write_text(path.read_text().replace("[drop]", "# ours\n[drop] # the site\n\n") + '\n[log]\nkeep = 3 # "few"\n')
    before = server.everything()
    result = server.call(typed="\n" * 16)
    assert result.exit_code == 0, result.output
    assert server.everything() == before


def test_one_changed_answer_changes_one_line(server: Server) -> None:
    server.given()
    path = server.etc / "config.toml"
    path.write_text(path.read_text().replace("\n", "\r\n") + "# the end")
    before = path.read_bytes().split(b"\n")
    server.given(time_zone="America/Denver", accept_problems=True, code=errors.EXIT_DOCTOR)
    after = path.read_bytes().split(b"\n")
    assert [line for line in after if line not in before] == [b'time_zone = "America/Denver"\r']
    assert len(after) == len(before)


def test_who_mistyped_a_password_types_that_again_and_enter_for_the_rest(server: Server) -> None:
    words = typed(server, sftp_password="mistyped") + "\n" * 10 + f"{server.simulation.outside.password}\n" + "\n" * 5
    result = server.call(typed=words + "y\n")
    assert result.exit_code == 0, result.output
    assert "not written: the SFTP site refuses syncd's login" in result.stderr
    assert "sudo syncd setup main --only sftp" in result.stderr
    assert "NAME" not in result.stderr, "neither in what the doctor found nor in why it is not written"
    assert server.syncd("backfill", "--no-progress").exit_code == 0


def test_every_missing_answer_is_named_at_once(server: Server) -> None:
    left_out = dict.fromkeys(("time_zone", "customer_key", "sftp_host", "sftp_address"))
    result = server.given(code=errors.EXIT_CONFIG, time_zon="x", **left_out)
    assert {line.partition(":")[2].strip() for line in result.stderr.splitlines()} == {
        "time_zon: unknown answer; did you mean time_zone?",
        "time_zone: is missing",
        "customer_key: is missing",
        "sftp_host: is missing",
    }


def test_the_address_is_asked_for_where_only_the_office_knows_it(server: Server) -> None:
    result = server.given(code=errors.EXIT_CONFIG, sftp_address=None)
    assert "sftp_address: is missing" in result.stderr


def test_every_unknown_answer_is_named_with_the_nearest(server: Server) -> None:
    result = server.given(code=errors.EXIT_CONFIG, time_zon="x", sftp_pasword="secretive")
    assert "time_zon: unknown answer; did you mean time_zone?" in result.stderr
    assert "sftp_pasword: unknown answer; did you mean sftp_password?" in result.stderr
    assert "secretive" not in result.output


def test_every_wrong_answer_is_named_at_once_and_not_repeated(server: Server) -> None:
    wrong = {"mode": "far", "time_zone": "Chicago", "sftp_port": 0, "developer_key": "caffè nero", "archive": "here"}
    result = server.given(code=errors.EXIT_CONFIG, **wrong)
    assert {line.split(": ")[1] for line in result.stderr.splitlines()} == set(wrong)
    assert "caff" not in result.stderr
    assert not server.etc.exists()


def test_a_file_of_answers_that_others_may_read_is_refused(server: Server) -> None:
    server.given()
    server.file.chmod(0o640)
    result = server.call("--answers", str(server.file))
    assert result.exit_code == errors.EXIT_CONFIG
    assert "chmod 600" in result.stderr


@pytest.mark.parametrize("content", [None, "mode = ", b"\xff"])
def test_a_file_that_is_none_is_refused(server: Server, content: str | bytes | None) -> None:
    if content is not None:
        server.file.write_bytes(content if isinstance(content, bytes) else content.encode())
        server.file.chmod(0o600)
    result = server.call("--answers", str(server.file))
    assert result.exit_code == errors.EXIT_CONFIG
    assert "cannot be read" in result.stderr


def test_the_answers_in_the_readme_are_answers(server: Server) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (sample,) = re.findall(r"```toml\n(mode = .*?)```", text, re.DOTALL)
    server.file.write_text(sample)
    server.file.chmod(0o600)
    result = server.call("--answers", str(server.file))
    assert [line for line in result.stderr.splitlines() if "host_key: is not a key" not in line] == []


@pytest.mark.parametrize("name", ["Main", "a" * 26, "-x", "main/..", "", "über"])
def test_a_bad_name_is_a_wrong_call(server: Server, name: str) -> None:
    result = CliRunner().invoke(cli, ["setup", "--", name])
    assert result.exit_code == errors.EXIT_USAGE
    assert "1 to 25 of a-z" in result.stderr


def test_the_name_stands_alone(server: Server) -> None:
    result = CliRunner().invoke(cli, ["-p", "main", "setup", "main"])
    assert result.exit_code == errors.EXIT_USAGE
    assert "sudo syncd setup main" in result.stderr


def test_whoever_is_not_root_is_told_what_to_type(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.setup.PLACES", Places(server.root, os.geteuid() + 1))
    result = server.call()
    assert result.exit_code == errors.EXIT_USAGE
    assert "sudo syncd setup main" in result.stderr


def test_a_part_of_nothing_cannot_be_changed(server: Server) -> None:
    result = server.call("--only", "keys")
    assert result.exit_code == errors.EXIT_USAGE
    assert "not set up yet" in result.stderr


def test_credential_files_that_the_service_would_not_get_are_refused(server: Server) -> None:
    server.given()
    path = server.etc / "config.toml"
    path.write_text(path.read_text().replace("[api]\n", '[api]\ncustomer_key_file = "mine"\n'))
    assert "knows only the files" in server.given(code=errors.EXIT_CONFIG).stderr


@pytest.mark.parametrize("part", ["sftp", "host-key", "keys"])
def test_a_part_that_has_to_be_tried_needs_the_secrets_that_only_the_units_can_read(server: Server, part: str) -> None:
    server.given()
    for name in ("developer_key", "customer_key", "sftp_password"):
        (server.etc / name).rename(server.etc / f"{name}.cred")
    before = server.everything()
    result = server.call("--only", part, typed="\n" * 20)
    assert result.exit_code == errors.EXIT_USAGE
    missing = {"keys": "sftp_password", "sftp": "developer_key, customer_key"}
    assert f"{missing.get(part, 'developer_key, customer_key, sftp_password')} cannot be read here" in result.stderr
    assert "systemd-creds decrypt" in result.stderr
    assert server.everything() == before


@pytest.mark.parametrize("part", ["archive", "notify"])
def test_a_part_that_needs_no_secrets_is_changed_without_them(server: Server, part: str) -> None:
    server.given()
    (server.etc / "developer_key").rename(server.etc / "developer_key.cred")
    changed: dict[str, object] = {"archive": str(server.archive), "notify_command": ["/bin/echo"]}
    server.file.write_text(to_toml({"x": changed}).removeprefix("[x]\n"))
    result = server.call("--only", part, "--answers", str(server.file))
    assert result.exit_code == errors.EXIT_DOCTOR, "a shell has no keys, and doctor says so"
    assert "internal" not in result.stderr


# --- what is looked at before anything is written


def refused(server: Server, code: int, words: str, **changed: object) -> None:
    """The call ends with this code and words, and nothing was written or called."""
    before, commands = server.everything(), server.said()
    result = server.given(code=code, **changed)
    assert words in result.stderr
    assert server.everything() == before
    assert server.said() == commands


def test_a_refused_key_is_not_written(server: Server) -> None:
    refused(server, errors.EXIT_REFUSED, "integrator", customer_key="wrong")


def test_a_refused_key_does_not_replace_a_good_one(server: Server) -> None:
    server.given()
    refused(server, errors.EXIT_REFUSED, "syncd setup main --only keys", customer_key="wrong", accept_problems=True)


def test_a_key_that_can_only_list_is_not_written(server: Server) -> None:
    server.simulation.office.permissions = ("ApiReadAll",)
    refused(server, errors.EXIT_REFUSED, "can list, not download")


def test_a_wrong_password_of_the_site_is_not_written(server: Server) -> None:
    refused(server, errors.EXIT_REFUSED, "practice_it", sftp_password="wrong")


def test_another_host_key_than_the_one_given_is_not_written(server: Server) -> None:
    key = paramiko.ECDSAKey.generate()
    other = f"{key.get_name()} {key.get_base64()}"
    refused(server, errors.EXIT_REFUSED, "syncd setup main --only host-key", host_key=other, trust_host_key=None)


def test_a_host_key_that_is_none_is_refused(server: Server) -> None:
    refused(server, errors.EXIT_CONFIG, "host_key: is not a key", host_key="ssh-ed25519 x")


def test_a_site_that_is_not_there_ends_with_5(server: Server) -> None:
    refused(server, errors.EXIT_REMOTE, "cannot be reached", sftp_port=1)


def test_an_unconfirmed_host_key_is_not_pinned(server: Server) -> None:
    refused(server, errors.EXIT_CONFIG, "host_key: not confirmed", trust_host_key=False)
    result = server.call(typed=typed(server, trust="n\nn"))
    assert result.exit_code == errors.EXIT_CONFIG
    assert not server.etc.exists()


def test_a_given_host_key_needs_no_confirmation(server: Server) -> None:
    server.given(trust_host_key=None, host_key=server.simulation.outside.host_key + " a comment")
    written = tomllib.loads((server.etc / "config.toml").read_text())
    assert written["drop"]["host_key"] == " ".join(server.simulation.outside.host_key.split()[:2])


def test_the_shown_fingerprint_is_the_one_that_ssh_keygen_prints(server: Server, tmp_path: Path) -> None:
    public = tmp_path / "key.pub"
    public.write_text(server.simulation.outside.host_key + "\n")
    printed = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
    assert printed.split()[1] in server.given().stderr


def test_a_changed_host_key_is_shown_and_pinned_when_confirmed(server: Server) -> None:
    server.given()
    path = server.etc / "config.toml"
    right = path.read_text()
    path.write_text(re.sub("host_key = .*", f'host_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{"A" * 43}"', right))
    assert server.call("--only", "host-key", typed="n\nn\n").exit_code == errors.EXIT_CONFIG
    result = server.call("--only", "host-key", typed="y\n")
    assert result.exit_code == 0, result.output
    assert path.read_text() == right
    assert "it is the pinned one" in server.call("--only", "host-key").stderr


def test_a_pin_in_a_file_of_its_own_is_left_to_who_made_it(server: Server) -> None:
    server.given()
    path = server.etc / "config.toml"
    path.write_text(re.sub("host_key = .*", 'known_hosts_file = "known"', path.read_text()))
    assert "change that file by hand" in server.call("--only", "host-key", typed="n\n").stderr


def test_what_does_not_work_is_written_only_when_somebody_says_so(server: Server) -> None:
    server.simulation.office.faults.add("econnector_down", times=None)
    refused(server, errors.EXIT_REMOTE, "start the eConnector")
    assert "eConnector" in server.given(accept_problems=True, code=errors.EXIT_DOCTOR).stderr
    assert (server.etc / "config.toml").exists()


def test_a_wrong_time_zone_shows_before_it_is_written(server: Server) -> None:
    refused(server, errors.EXIT_USAGE, "Check [practice] time_zone", time_zone="Asia/Tokyo")


def mirrored(server: Server) -> None:
    server.given()
    assert server.syncd("backfill", "--no-progress").exit_code == 0


def test_a_new_key_is_put_in_and_nothing_else_changes(server: Server) -> None:
    mirrored(server)
    before = server.everything()
    server.simulation.office.customer_key = "new-customer-key"
    result = server.call("--only", "keys", typed="\nnew-customer-key\n")
    assert result.exit_code == 0, result.output
    assert "known documents are the same there" in result.stderr
    changed = {path for path, there in server.everything().items() if before[path] != there}
    assert changed == {str(server.etc / "customer_key")}
    assert server.everything()[str(server.etc / "customer_key")] == (0o600, b"new-customer-key\n")
    assert "sudo syncd -p main status" in result.stdout


def test_a_key_to_another_database_is_not_written_unless_somebody_says_so(server: Server) -> None:
    mirrored(server)
    office = server.simulation.office
    office.practice = build_practice(9, 77, server.simulation.practice.clock)
    office.customer_key = "key-of-others"
    before = server.everything()
    told = {"customer_key": "key-of-others", "accept_problems": True}
    for number in range(2):
        if number:
            result = server.call("--only", "keys", typed="\nkey-of-others\nn\nn\n")
        else:
            result = server.given("--only", "keys", code=errors.EXIT_HELD, **told)
        assert result.exit_code == errors.EXIT_HELD
        assert "numbers mean other people" in result.stderr
        assert server.everything() == before
    told = {"customer_key": "key-of-others", "accept_other_database": True}
    server.given("--only", "keys", code=errors.EXIT_DOCTOR, **told)
    assert (server.etc / "customer_key").read_text() == "key-of-others\n"


def test_a_restored_office_is_told_and_no_hindrance(server: Server) -> None:
    mirrored(server)
    documents = [row["DocNum"] for row in server.simulation.practice.rows("SELECT DocNum FROM document")]
    for number in documents[::2]:
        server.simulation.practice.delete_document(number)
    assert "lacks rows it had" in server.given("--only", "keys").stderr


def test_a_database_that_does_not_answer_is_no_proof(server: Server) -> None:
    mirrored(server)
    server.simulation.office.faults.add("html", path="/documents/*", times=None)
    refused(server, errors.EXIT_REMOTE, "cannot be trusted")


# --- the archive


def marker(folder: Path, name: str = "other") -> None:
    folder.mkdir(parents=True, mode=0o700)
    (folder / ".syncd-archive").write_text(json.dumps({"schema_version": 1, "id": name}))


def test_an_archive_that_is_there_is_taken_over_only_when_somebody_says_so(server: Server) -> None:
    marker(server.archive)
    refused(server, errors.EXIT_ARCHIVE, "index")
    result = server.given(take_over_archive=True)
    assert "sudo syncd -p main reindex" in result.stdout
    assert f"chown -R -h syncd-main {server.archive}" in server.said()


def test_a_folder_with_something_in_it_is_no_new_archive(server: Server) -> None:
    server.archive.mkdir()
    (server.archive / "holiday.jpg").touch()
    refused(server, errors.EXIT_ARCHIVE, "empty folder")


@pytest.mark.parametrize("inside", ["", "patients"])
def test_the_archive_of_another_practice_is_refused(server: Server, inside: str) -> None:
    server.given()
    other = server.root / "etc/syncd/other"
    server.etc.rename(other)
    refused(server, errors.EXIT_USAGE, "is the archive of other", archive=str(server.archive / inside))


def test_a_moved_archive_is_accepted_and_another_one_is_not(server: Server, tmp_path: Path) -> None:
    mirrored(server)
    marker(tmp_path / "foreign")
    moved = server.archive.rename(tmp_path / "moved")
    refused(server, errors.EXIT_ARCHIVE, "knows another archive", archive=str(tmp_path / "foreign"))
    refused(server, errors.EXIT_ARCHIVE, "knows another archive", archive=str(tmp_path / "empty"))
    server.given("--only", "archive", archive=str(moved))
    assert server.syncd("backfill", "--no-progress").exit_code == 0


def test_a_missing_archive_is_not_made_anew(server: Server, tmp_path: Path) -> None:
    mirrored(server)
    server.archive.rename(tmp_path / "unmounted")
    server.given(code=errors.EXIT_DOCTOR)
    assert not server.archive.exists()


def test_a_new_archive_has_its_price_and_needs_a_yes(server: Server, tmp_path: Path) -> None:
    mirrored(server)
    document = server.simulation.practice.rows("SELECT DocNum FROM document")[0]["DocNum"]
    server.simulation.practice.replace_bytes(document)
    assert server.syncd("backfill", "--no-progress").exit_code == 0
    found = [json.loads(line) for line in server.syncd("find", "--json").stdout.splitlines()]
    last, old = max(row["seq"] for row in found), [row for row in found if not row["current"]]
    assert old
    again = tmp_path / "again"
    before = server.everything()
    result = server.given("--new", code=errors.EXIT_USAGE, archive=str(again))
    assert f"only in the old archive, for ever: {len(old)} versions" in result.stderr
    assert "requests" in result.stderr
    assert "finished after" in result.stderr
    assert server.everything() == before
    with Lock(server.state, "run"):
        assert "systemctl stop" in server.given("--new", "--yes", code=errors.EXIT_LOCKED, archive=str(again)).stderr
    server.given("--new", "--yes", archive=str(again))
    assert server.syncd("backfill", "--no-progress").exit_code == 0
    found = [json.loads(line) for line in server.syncd("find", "--json").stdout.splitlines()]
    assert min(row["seq"] for row in found) > last
    assert server.archive.exists()


def test_an_archive_elsewhere_becomes_writable_for_the_units(server: Server) -> None:
    server.given()
    for unit in ("syncd", "syncd-backfill"):
        text = (server.root / f"etc/systemd/system/{unit}@main.service.d/archive.conf").read_text()
        assert f'ReadWritePaths="-{server.archive}"' in text
    server.given(archive=str(server.root / "srv/archive/main"))
    assert not list(server.root.glob("etc/systemd/system/*/archive.conf"))


def test_after_the_disk_died_everything_is_fetched_again_into_an_empty_folder(server: Server) -> None:
    mirrored(server)
    shutil.rmtree(server.archive)
    server.archive.mkdir(mode=0o700)
    assert server.syncd("backfill", "--no-progress").exit_code == errors.EXIT_ARCHIVE
    result = server.call("--only", "archive", "--new", "--yes", typed="\n")
    assert result.exit_code == 0, result.output
    assert server.syncd("backfill", "--no-progress").exit_code == 0
    assert server.syncd("verify").exit_code == 0
    assert (server.state / "index.db.before-new").exists()


def test_a_server_that_has_only_the_archive_goes_on_with_it(server: Server) -> None:
    mirrored(server)
    shutil.rmtree(server.state)
    shutil.rmtree(server.etc)
    result = server.call(typed=typed(server, trust="y\ny"))
    assert result.exit_code == 0, result.output
    assert server.syncd("reindex").exit_code == 0
    said = json.loads(server.syncd("backfill", "--no-progress", "--json").stdout)
    assert (said["exit_code"], said["files"]) == (0, 0)


def test_a_new_archive_needs_an_empty_folder(server: Server, tmp_path: Path) -> None:
    mirrored(server)
    marker(tmp_path / "foreign")
    before = server.everything()
    result = server.given("--new", "--yes", code=errors.EXIT_ARCHIVE, archive=str(tmp_path / "foreign"))
    assert "empty folder" in result.stderr
    assert server.everything() == before


def test_a_practice_without_an_index_needs_no_yes_for_a_new_archive(server: Server) -> None:
    server.given("--new")
    assert server.syncd("backfill", "--no-progress").exit_code == 0


# --- a site on this server

HERE: dict[str, Any] = {
    "sftp": "here",
    "sftp_address": "office.example.org",
    "sftp_sources": ["203.0.113.7"],
    "sftp_port": None,
}


@pytest.fixture
def privileges() -> None:
    assert SSHD.exists(), "these tests need OpenSSH's server: apt install openssh-server"
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # the system's own `install` makes it; here it takes notes


def test_a_site_on_this_server_gets_an_account_a_password_and_host_keys(server: Server, privileges: None) -> None:
    server.given(**HERE)
    password = (server.etc / "sftp_password").read_text().strip()
    assert re.fullmatch("[0-9a-f]{32}", password)
    assert server.log.with_name("commands.stdin").read_text() == f"drop-main:{password}\n"
    assert password not in server.said()
    settings = tomllib.loads((server.etc / "config.toml").read_text())["drop"]
    assert (settings["host"], settings["port"], settings["username"]) == ("127.0.0.1", 2222, "drop-main")
    assert settings["host_key"] in (server.etc / "sftp_host_ed25519.pub").read_text()
    assert (server.etc / "sftp_host_rsa").stat().st_mode & 0o777 == 0o600
    assert (server.root / "etc/systemd/system/syncd-sftp@main.service").exists()


def test_a_site_on_this_server_keeps_its_keys_and_password(server: Server, privileges: None) -> None:
    server.given(**HERE)
    before = server.everything()
    server.given("--only", "sftp", **HERE | {"sftp_sources": ["198.51.100.9"]}, accept_problems=True, code=7)
    changed = {path for path, there in server.everything().items() if before.get(path) != there}
    assert changed == {str(server.etc / "sshd_config")}


def test_a_configuration_that_sshd_refuses_is_never_activated(server: Server, privileges: None) -> None:
    (server.commands / "ssh-keygen").write_text(
        '#!/bin/sh\nfor last; do :; done; echo x > "$last"; echo "ssh-ed25519 '
        f'AAAAC3NzaC1lZDI1NTE5AAAAI{"A" * 43}" > "$last.pub"\n'
    )
    (server.commands / "ssh-keygen").chmod(0o755)
    result = server.given(**HERE, code=errors.EXIT_CONFIG)
    assert "/usr/sbin/sshd:" in result.stderr
    assert server.everything() == {}
    assert "useradd --system --user-group --no-create-home --home-dir / " not in server.said()


def test_a_site_on_this_server_is_started_and_looked_at(server: Server, privileges: None) -> None:
    (server.root / "run/systemd/system").mkdir(parents=True)
    result = server.given(**HERE, code=errors.EXIT_DOCTOR)  # nobody listens there: systemctl only takes notes
    assert "the SFTP site cannot be reached" in result.stdout
    assert "systemctl enable syncd-sftp@main.service\nsystemctl restart syncd-sftp@main.service" in server.said()


def test_a_site_that_goes_elsewhere_is_no_site_here_any_more(server: Server, privileges: None) -> None:
    server.given(**HERE)
    (server.root / "run/systemd/system").mkdir(parents=True)
    generated = (server.etc / "sftp_password").read_text().strip()
    result = server.call(typed=typed(server, sftp="elsewhere"))
    assert result.exit_code == 0, result.output
    assert not (server.etc / "sshd_config").exists()
    assert generated not in (server.etc / "sftp_password").read_text()
    assert "systemctl disable --now syncd-sftp@main.service" in server.said()


def test_dry_run_shows_the_site_without_its_secrets(server: Server) -> None:
    result = server.given("-n", **HERE)
    assert "AllowUsers drop-main@127.0.0.1 drop-main@203.0.113.7" in result.stdout
    assert "ExecStart=/usr/sbin/sshd" in result.stdout
    assert "PRIVATE KEY" not in result.stdout
    assert server.everything() == {}
    assert server.said() == ""


def test_the_address_and_who_may_come_are_asked_for(server: Server) -> None:
    result = server.given(code=errors.EXIT_CONFIG, sftp="here", sftp_address=None)
    assert "sftp_address: is missing" in result.stderr
    assert "sftp_sources: is missing" in result.stderr


# --- what is written


def test_files_have_the_modes_of_the_contract_and_secrets_stand_nowhere_else(server: Server) -> None:
    result = server.given()
    files = server.everything()
    names = {Path(path).name: mode for path, (mode, _) in files.items() if "/etc/syncd/main/" in path}
    expected = {"config.toml": 0o644} | dict.fromkeys(("developer_key", "customer_key", "sftp_password"), 0o600)
    assert names == expected
    assert server.etc.stat().st_mode & 0o777 == 0o750, "for root and the practice's user"
    assert f"chown root:syncd-main {server.root}" in server.said()
    told = [result.output, server.said()]
    told += [content.decode() for path, (mode, content) in files.items() if mode != 0o600]
    assert not [secret for secret in secrets_of(server) for text in told if secret in text]
    assert {path.name for path in (server.root / "etc").iterdir()} == {"syncd", "systemd"}


def test_users_and_folders_are_made(server: Server) -> None:
    server.given()
    said = server.said()
    assert "useradd --system" in said
    assert " syncd-main\n" in said
    assert f"install -d -m 0700 -o syncd-main -g syncd-main {server.state}" in said
    assert str(server.archive) in said


def test_dry_run_shows_what_would_be_written_and_changes_nothing(server: Server, tmp_path: Path) -> None:
    result = server.given("-n", ping_url="https://example.org/token")
    assert 'host = "127.0.0.1"' in result.stdout
    assert result.stdout.count("(hidden)") == 4
    assert not [secret for secret in (*secrets_of(server), "token") if secret in result.output]
    assert server.everything() == {}
    assert server.said() == ""
    assert server.simulation.office.arrivals == []
    assert not server.state.exists()
    server.given()
    before = server.everything()
    assert 'time_zone = "Asia/Tokyo"' in server.given("-n", time_zone="Asia/Tokyo").stdout
    assert server.given("-n").stdout == "nothing would change\n"
    assert json.loads(server.given("-n", "--json").stdout)["would_write"].keys() == set()
    assert server.everything() == before


def test_where_systemd_runs_the_units_are_restarted(server: Server) -> None:
    assert "systemd does not run here" in server.given().stdout
    (server.root / "run/systemd/system").mkdir(parents=True)
    said = json.loads(server.given("--json").stdout)
    assert said["restarted"] is True
    assert "systemctl daemon-reload\nsystemctl try-restart --no-block syncd@main.service" in server.said()


def test_a_command_that_fails_is_told_and_the_practice_stays_as_it_was(server: Server) -> None:
    (server.commands / "install").write_text("#!/bin/sh\necho no such disk >&2\nexit 1\n")
    assert "install: no such disk" in server.given(code=errors.EXIT_CONFIG).stderr
    assert not server.etc.exists()


def where_it_dies(server: Server, **changed: Any) -> list[dict[str, dict[str, str]]]:
    """What stands in /etc after each step that a call may die at, the whole call last: by folder, then by file."""
    server.given("-n", **changed)  # writes the answers
    line = [sys.executable, "-m", "tests.setup_steps", str(server.root), "main", "--answers", str(server.file)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=100)
    found: list[dict[str, dict[str, str]]] = []
    for stands in map(json.loads, done.stdout.splitlines()):
        found.append({"syncd/main": {}, "systemd/system/syncd@main.service.d": {}})
        for path, text in stands.items():
            found[-1].setdefault(str(Path(path).parent), {})[Path(path).name] = text
    return found


def test_a_first_call_that_dies_leaves_nothing_or_everything(server: Server) -> None:
    *died, whole = where_it_dies(server)
    assert len(died) > 20
    assert len(whole["syncd/main"]) == 4
    assert all(each["syncd/main"] in ({}, whole["syncd/main"]) for each in died)
    written = [each for each in died if each["syncd/main"]]
    assert written
    assert all("archive.conf" in each["systemd/system/syncd@main.service.d"] for each in written)


def test_a_later_call_that_dies_leaves_the_old_or_the_new_configuration_and_a_writable_archive(
    server: Server, tmp_path: Path
) -> None:
    server.given()
    site, office = server.simulation.sftp, server.simulation.office
    assert site is not None
    site.password, office.customer_key = "a-new-password", "a-new-customer-key"
    other = str(tmp_path / "other")
    *died, whole = where_it_dies(
        server, sftp_password="a-new-password", customer_key="a-new-customer-key", archive=other, time_zone="US/Central"
    )
    before, after = died[0]["syncd/main"], whole["syncd/main"]
    assert {name for name in after if after[name] != before[name]} == {"config.toml", "customer_key", "sftp_password"}
    assert {json.dumps(each["syncd/main"]) for each in died} == {json.dumps(before), json.dumps(after)}
    for each in died:
        archive = tomllib.loads(each["syncd/main"]["config.toml"])["archive"]["path"]
        assert archive in each["systemd/system/syncd@main.service.d"]["archive.conf"]
    assert str(server.archive) not in whole["systemd/system/syncd@main.service.d"]["archive.conf"]


def test_what_a_call_that_died_left_is_no_hindrance(server: Server) -> None:
    leftover = server.root / "etc/.syncd-main.new"
    leftover.mkdir(parents=True)
    (leftover / "customer_key").write_text("old")
    server.given()
    assert not leftover.exists()
    assert len(list(server.etc.iterdir())) == 4


def test_files_of_others_in_the_folder_stay_the_same_files(server: Server) -> None:
    server.given()
    (server.etc / "more").mkdir()
    mine, linked = server.etc / "more/known_hosts", server.etc / "link"
    mine.write_text("mine")
    mine.chmod(0o640)
    linked.symlink_to("more/known_hosts")
    before = mine.stat()
    server.given(ping_url="https://example.org/")
    assert (mine.stat().st_ino, mine.stat().st_mode) == (before.st_ino, before.st_mode)
    assert linked.is_symlink()


def test_a_doctor_that_hangs_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.setup.DOCTOR_TAKES", 0.001)
    assert "call syncd -p main doctor" in server.given(code=errors.EXIT_DOCTOR).stdout


def test_a_missing_command_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "has no such command" in server.given(code=errors.EXIT_CONFIG).stderr
    assert not server.etc.exists()


def test_ctrl_c_in_the_dialogue_leaves_nothing(server: Server) -> None:
    assert server.call(typed="service\n").exit_code == errors.EXIT_INTERRUPTED
    assert server.everything() == {}
