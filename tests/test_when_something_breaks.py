"""README, "When something breaks": every line is executed as it stands, and then the mirror is whole again."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from syncd import errors
from syncd.service import Lock
from syncd.setup import Places
from tests.test_cli import README, practice, wait_until
from tests.test_setup import Server

pytestmark = pytest.mark.slow  # HTTP and SFTP servers, and a service of its own, for each test

SECTION = re.search(r"^## When something breaks\n(.*?)(?=^## )", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def blocks(heading: str) -> list[list[str]]:
    """The commands below a heading of the section, block by block."""
    assert SECTION
    (part,) = (part for part in SECTION[1].split("\n### ") if part.startswith(f"{heading}\n"))
    found = re.findall(r"(?:^    .*\n)+", part, re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in found]


class Office:
    """A practice that was set up and mirrored, on a server whose service the lines start and stop."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder, self.practice = server, folder, server.simulation.practice
        self.service: subprocess.Popen[str] | None = None
        self.before = set[str]()
        self.patient = self.practice.rows("SELECT PatNum FROM patient LIMIT 1")[0]["PatNum"]

    def follow(self, heading: str, block: int = 0, typed: str | None = None) -> list[Result]:
        """Execute the lines of a block below a heading as they stand; `typed` into those that ask."""
        results = [self._execute(line, typed) for line in blocks(heading)[block]]
        return [result for result in results if result is not None]

    def _execute(self, line: str, typed: str | None) -> Result | None:
        line = line.replace("/mnt/", f"{self.folder}/mnt/").replace("/srv/archive/main", str(self.server.archive))
        match shlex.split(line):
            case ["systemctl", "stop", "syncd@main"] | ["systemctl", "disable", "--now", "syncd@main"]:
                self.stop()
            case ["systemctl", "start", "syncd@main"] | ["systemctl", "enable", "--now", "syncd@main"]:
                self.start()
            case ["syncd", "setup", "main"]:  # its many questions answered from a file
                return self.server.given(take_over_archive=True)
            case ["syncd", "setup", "main", *words]:
                return self.server.call(*words, typed=typed)
            case ["syncd", "-p", "main", *words]:
                return self.server.syncd(*words)
            case ["cp", *words]:
                subprocess.run(["cp", *words], check=True)
            case other:
                pytest.fail(f"nobody would know what to type: {other}")
        return None

    def start(self) -> None:
        self.service = subprocess.Popen(
            [sys.executable, "-m", "syncd.cli", "-q", "-c", str(self.server.etc / "config.toml"), "run"], text=True
        )
        wait_until(lambda: Lock(self.server.state).holder() is not None)

    def stop(self) -> None:
        if self.service is not None:
            self.service.terminate()
            assert self.service.wait(20) == 0
            self.service = None

    def copy(self, name: str) -> None:
        """A copy of the archive, or the archive itself, where the lines look for it."""
        shutil.copytree(self.server.archive, self.folder / "mnt" / name / "main")

    def scanned(self) -> int:
        """A document that is twenty minutes old."""
        with self.practice.as_of(self.practice.clock.now() - 1200.0):
            return self.practice.add_document(self.patient, "jpg")

    def has(self, document: int) -> bool:
        return any(self.server.archive.glob(f"patients/{self.patient}/document-{document}/1-*.jpg"))

    def names(self) -> set[str]:
        """Folder and name of every document: sheets are rendered anew, thumbnails come after fifteen quiet minutes."""
        files = self.server.archive.glob("patients/*/document-*/*")
        return {f"{path.parent.name}/{path.name}" for path in files if path.suffix != ".json"}

    def whole(self) -> bool:
        """Whether every file that was there is there, and what it was."""
        return self.before <= self.names() and self.server.syncd("verify").exit_code == 0

    def state(self) -> str:
        said = self.server.syncd("status").stdout
        return said.splitlines()[0].partition(": ")[2]


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    with practice() as simulation, contextlib.ExitStack() as stack:
        server = Server(simulation, tmp_path)
        monkeypatch.setattr("syncd.setup.PLACES", Places(server.root, os.geteuid()))
        monkeypatch.setenv("PATH", f"{server.commands}:{os.environ['PATH']}")
        monkeypatch.setenv("STATE_DIRECTORY", str(server.state))
        monkeypatch.setenv("LOGS_DIRECTORY", str(tmp_path / "log"))
        server.given()
        office = Office(server, tmp_path)
        stack.callback(office.stop)
        assert server.syncd("backfill", "--no-progress").exit_code == 0
        office.before = office.names()
        assert len(office.before) > 9
        yield office


DISK = "The disk of the archive died"


def test_dead_disk_with_a_backup(office: Office) -> None:
    office.copy("backup")
    late = office.scanned()
    office.start()
    wait_until(lambda: office.has(late))
    shutil.rmtree(office.server.archive)
    office.server.archive.mkdir(mode=0o700)
    office.follow(DISK)
    wait_until(office.whole)
    assert office.has(late)


def test_dead_disk_without_a_backup(office: Office) -> None:
    office.start()
    shutil.rmtree(office.server.archive)
    asked, done = office.follow(DISK, block=1, typed="\n")
    assert asked.exit_code == errors.EXIT_USAGE
    assert "only in the old archive" in asked.stderr
    assert done.exit_code == 0
    wait_until(office.whole, seconds=60)


def test_new_key(office: Office) -> None:
    office.start()
    office.server.simulation.office.customer_key = "another-key"
    wait_until(lambda: office.state() == "BLOCKED (key_refused)", seconds=60)
    late = office.scanned()
    office.follow("The API key changed", typed="\nanother-key\n")
    office.stop()
    office.start()
    wait_until(lambda: office.has(late))


def test_rebuilt_sftp_server(office: Office) -> None:
    assert office.server.simulation.sftp
    office.server.simulation.sftp.rebuild()
    late = office.scanned()
    office.start()
    wait_until(lambda: office.state() == "BLOCKED (host_key_changed)")
    (said,) = office.follow("The SFTP server was rebuilt", typed="y\n")
    assert "SHA256:" in said.stderr
    office.stop()  # as systemd does for `setup`
    office.start()
    wait_until(lambda: office.has(late))


def test_practice_on_another_server(office: Office) -> None:
    (said,) = office.follow("The practice moves to another server")
    assert said.exit_code == 0


def test_office_restored_from_a_backup(office: Office) -> None:
    backup = office.practice.snapshot()
    lost = [office.scanned() for _ in range(10)]
    office.start()
    wait_until(lambda: all(map(office.has, lost)))
    office.stop()
    office.practice.restore_from_backup(backup)
    office.start()
    wait_until(lambda: office.state() == "BLOCKED (database_went_back)")
    held, approved, found = office.follow("The office was restored from a backup")
    assert "guard-1" in held.stdout
    assert approved.exit_code == 0
    assert all(f"document-{number} " in found.stdout for number in lost)
    assert all(map(office.has, lost))


def test_syncd_on_another_server(office: Office) -> None:
    heading, seqs = "syncd itself moves to another server", office.server.syncd("find", "--json").stdout
    office.start()
    office.follow(heading)
    office.copy("old")
    for folder in (office.server.root, office.server.state, office.server.archive):
        shutil.rmtree(folder)
    office.server.archive.mkdir(mode=0o700)
    office.server.root.mkdir()
    configured, rebuilt = office.follow(heading, block=1)
    assert "syncd -p main reindex" in configured.stdout
    assert rebuilt.exit_code == 0
    wait_until(office.whole)
    assert office.server.syncd("find", "--json").stdout == seqs


def test_document_deleted_by_mistake(office: Office) -> None:
    lost = office.practice.add_document(office.practice.add_patient(PatNum=101), "jpg", DocNum=34)
    assert office.server.syncd("backfill", "--no-progress").exit_code == 0
    office.practice.delete_document(lost)
    configuration = office.server.etc / "config.toml"
    text = configuration.read_text()
    configuration.chmod(0o600)
    configuration.write_text(text.replace("[api]\n", "[api]\nallow_upload = true\n"))
    found, planned, done = office.follow("A document was deleted by mistake")
    assert "document-34" in found.stdout
    assert "would send" in planned.stdout
    assert (done.exit_code, "document-34: it is" in done.stdout) == (0, True)
    back = office.practice.rows("SELECT max(DocNum) AS num FROM document")[0]["num"]
    assert back > lost
    assert f"document-{back}" in office.server.syncd("history", "document-34").stdout


def test_wrong_persons_scan(office: Office) -> None:
    office.practice.add_document(office.patient, "jpg", DocNum=34)
    assert office.server.syncd("backfill", "--no-progress").exit_code == 0
    planned, done = office.follow("A wrong person's scan, or a court's order")
    assert (planned.exit_code, done.exit_code) == (0, 0)
    (folder,) = office.server.archive.glob("patients/*/document-34")
    assert [path.name for path in folder.iterdir()] == ["destroyed.json"]
    assert office.server.syncd("backfill", "--no-progress").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["destroyed.json"]
    assert office.server.syncd("verify").exit_code == 0


def test_no_block_of_commands_is_left_out() -> None:
    assert SECTION
    headings = {part.partition("\n")[0] for part in SECTION[1].split("\n### ")[1:] if "\n    " in part}
    followed = Path(__file__).read_text("utf-8")
    assert len(headings) > 8
    assert [heading for heading in headings if f'"{heading}"' not in followed] == []


def test_lost_index(office: Office) -> None:
    before = office.server.syncd("find", "--json").stdout
    office.start()
    office.stop()
    for path in office.server.state.glob("index.db*"):
        path.unlink()
    office.follow("The index is lost or damaged")
    wait_until(office.whole)
    assert office.server.syncd("find", "--json").stdout == before


def test_larger_disk(office: Office) -> None:
    office.start()
    larger = office.folder / "mnt/larger/main"
    larger.mkdir(parents=True, mode=0o700)
    office.follow("The archive moves to a larger disk", typed=f"{larger}\n")
    shutil.rmtree(office.server.archive)
    office.server.archive = larger
    assert office.names() == office.before
    wait_until(lambda: office.state() == "OK (ok)")
    wait_until(office.whole)


def test_damaged_file(office: Office) -> None:
    path = next(office.server.archive.glob("patients/*/document-*/1-*.jpg"))
    right = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(right[:-1] + b"!")
    office.start()
    found, mended = office.follow("Files of the archive are not what they were")
    assert (found.exit_code, mended.exit_code) == (errors.EXIT_DAMAGE, errors.EXIT_DAMAGE)
    wait_until(office.whole, seconds=60)
    assert path.read_bytes() == right
