"""Section D of the catalogue: the local machine. What kill points, I/O errors, power cuts and bit flips do not show."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from syncd.demo.build import Past
from syncd.demo.simulation import Simulation
from syncd.errors import ConfigError, SiteError
from syncd.index import Index
from syncd.schema import Row
from syncd.scrub import reindex
from syncd.wiring import load, open_archive
from tests.small import HOUR, SCHEMA, Small, serving, settle, small, troubles
from tests.test_cli import Desk
from tests.test_end_to_end import Site, left_on_drop
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

VERSIONS = "SELECT seq, path, sha256, checksum FROM version ORDER BY seq"


# --- D27: schemas

MIGRATING = """
import os, signal, sys
from pathlib import Path
from syncd import schema
from syncd.index import Index

path, deaths = Path(sys.argv[1]), int(sys.argv[2])
STATEMENTS = (
    "ALTER TABLE item ADD COLUMN colour TEXT", "CREATE TABLE shade (id INTEGER PRIMARY KEY) STRICT",
    "UPDATE item SET colour = 'red', description = 'migrated'", "DROP TABLE incident",
)

@schema.migrations()
def later_tables(db):
    for number, statement in enumerate((*STATEMENTS, "SELECT 1")):
        if number == deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        db.conn.execute(statement)

Index(path).close()
"""
CREATING = """
import os, signal, sys
from pathlib import Path
from sqlite_utils import Migrations
from syncd import schema
from syncd.index import Index

schema._TABLES = ";\\n".join(schema._TABLES.split(";\\n")[: int(sys.argv[2])])
schema.migrations = Migrations("syncd")
schema.migrations(name="first_tables")(schema.first_tables)
schema.migrations(name="death")(lambda db: os.kill(os.getpid(), signal.SIGKILL))
Index(Path(sys.argv[1]))
"""
STATEMENTS = 4


def run_python(code: str, *words: object) -> int:
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], timeout=60, check=False).returncode


def contents(path: Path) -> dict[str, list[Row]]:
    """Every table of an index, as any program sees it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {name: db.execute(f'SELECT * FROM "{name}"').fetchall() for name in tables}


@pytest.fixture
def one() -> Small:
    return small(documents=2)


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    """A mirror at rest; its whole archive is scrubbed each day that the test asks for it."""
    world = World.start(tmp_path, practice=one.practice, interval=300.0, verify={"subset": "1/1"})
    world.run()
    world.check()
    yield world
    world.stop()


def test_upgrade_killed_at_any_statement_leaves_the_old_index_whole(world: World) -> None:
    path = world.index.path
    world.stop()
    before = contents(path)
    assert before["version"]
    for deaths in range(STATEMENTS + 1):
        assert run_python(MIGRATING, path, deaths) == -signal.SIGKILL
        assert contents(path) == before, deaths
    Index(path).close()
    assert run_python(MIGRATING, path, -1) == 0
    after = contents(path)
    assert after.keys() == (before.keys() | {"shade"}) - {"incident"}
    assert after["version"] == before["version"]


@pytest.mark.parametrize("statements", [0, 1, 7, 20])
def test_first_start_killed_while_it_makes_its_tables_leaves_none(tmp_path: Path, statements: int) -> None:
    path = tmp_path / "index.db"
    assert run_python(CREATING, path, statements) == -signal.SIGKILL
    assert contents(path) == {}
    with contextlib.closing(Index(path)) as index:
        assert index.rows(VERSIONS) == []


def test_index_of_a_later_syncd_is_refused_and_both_schemas_are_named(world: World) -> None:
    path = world.index.path
    world.stop()
    assert run_python(MIGRATING, path, -1) == 0
    before = contents(path)
    with pytest.raises(ConfigError, match=rf"index\.db is of schema {SCHEMA + 1}, this syncd knows schema {SCHEMA}"):
        Index(path)
    assert contents(path) == before


def test_every_verb_refuses_the_index_of_a_later_syncd_with_78(tmp_path: Path) -> None:
    with Simulation.start(3, 1, 0.01) as simulation:
        desk = Desk(simulation, tmp_path)
        desk.state.mkdir(mode=0o700)
        Index(desk.state / "index.db").close()
        assert run_python(MIGRATING, desk.state / "index.db", -1) == 0
        for words in ("run", "backfill", "status", "health", "find", "verify", "retry", "held"):
            result = desk.call(words)
            assert result.exit_code == 78, words
            assert f"schema {SCHEMA + 1}" in result.stderr, words
        assert simulation.office.arrivals == []


# --- D28: nobody listens

STREAMS = {
    "all closed": "<&- >&- 2>&-",
    "both on a full disk": ">/dev/full 2>/dev/full",
}


@pytest.mark.parametrize("streams", STREAMS)
def test_backfill_that_nobody_can_hear_mirrors_everything_and_ends_with_0(tmp_path: Path, streams: str) -> None:
    past = Past(documents=2.0, sheets=1.0, hostile_names=0.0, urls=0.0, deleted=0.0)
    with Simulation.start(3, 1, 0.005, tmp_path / "site", past=past) as simulation:
        (tmp_path / "archive").mkdir()
        config = simulation.write_config(tmp_path / "main", tmp_path / "archive")
        mirror = Site(simulation, config, load(config, {}))
        words = f"exec {sys.executable} -m syncd.cli -c {config} backfill {STREAMS[streams]}"
        assert subprocess.run(["sh", "-c", words], timeout=100, check=False).returncode == 0
        assert mirror.versions() > 0
        assert mirror.wrong() == []
        assert left_on_drop(mirror) == []
        assert contents(mirror.settings.state_path / "index.db")


# --- D03, D04, D10: what a process is not given (descriptors: test_unhappy_ends.py)

LIMITS = {
    "too little memory": "-v 130000",
    "too small files": "-f 100",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_backfill_that_lacks_what_it_needs_leaves_no_half_state_and_the_next_one_finishes(
    tmp_path: Path, limit: str
) -> None:
    past = Past(documents=2.0, sheets=1.0, hostile_names=0.0, urls=0.0, deleted=0.0)
    with Simulation.start(3, 1, 0.005, tmp_path / "site", past=past) as simulation:
        (tmp_path / "archive").mkdir()
        config = simulation.write_config(tmp_path / "main", tmp_path / "archive")
        mirror = Site(simulation, config, load(config, {}))
        words = f"{sys.executable} -m syncd.cli -c {config} backfill --no-progress --max-duration 4s"
        done = subprocess.run(
            ["bash", "-c", f"ulimit {LIMITS[limit]}; exec {words}"], capture_output=True, timeout=100, check=False
        )
        assert done.returncode != 0, "the limit did not bite"
        assert b"Traceback" not in done.stderr
        mirror.settings.state_path.mkdir(mode=0o700, exist_ok=True)
        assert mirror.finish() == 0
        assert mirror.wrong() == []
        assert left_on_drop(mirror) == []
        with contextlib.closing(Index(mirror.settings.state_path / "index.db")) as index:
            assert index.value("SELECT count(*) FROM version WHERE version > 1") == 0


def test_disk_without_inodes_is_a_full_archive_and_goes_on_later(
    tmp_path: Path, one: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.start(tmp_path, practice=one.practice, backfill=True, interval=1.0)
    world.run(until=lambda: world.index.value("SELECT count(*) FROM version") >= 3)
    real = os.statvfs

    def without_inodes(folder: int) -> os.statvfs_result:  # what the kernel says of the disk
        values = list(real(folder))
        values[5:8] = 1000, 0, 0
        return os.statvfs_result(values)

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", without_inodes)
        world.run(hours=2)
        assert troubles(world) == {"archive": "archive_full"}
        world.check_safe()
    settle(world)
    assert troubles(world) == {}
    world.stop()


# --- D20: an archive that is older than the index


def put_back(world: World, backup: Path) -> None:
    """The archive's disk was replaced; what was on its backup is there now."""
    shutil.rmtree(world.archive)
    shutil.copytree(backup, world.archive)


def damage(world: World) -> Counter[str]:
    """How many damaged things are in which state."""
    return Counter(row["state"] for row in world.index.rows("SELECT state FROM damage"))


@pytest.mark.parametrize("running", [False, True], ids=["restarted", "running"])
def test_archive_from_a_backup_is_told_within_minutes_and_its_gaps_are_fetched_again(
    world: World, one: Small, tmp_path: Path, running: bool
) -> None:
    shutil.copytree(world.archive, tmp_path / "backup")
    one.practice.replace_bytes(one.document)
    with one.practice.as_of(world.clock.now() - HOUR):
        one.practice.add_document(one.patient, "jpg")
    world.run(hours=12)
    world.check()
    put_back(world, tmp_path / "backup")
    if not running:
        world.restart()
    world.run(seconds=900)
    assert troubles(world) == {"verify": "archive_damaged"}
    scrub(world)
    world.check()
    assert troubles(world) == {}
    assert damage(world) == Counter()


def test_version_that_neither_backup_nor_practice_has_is_told_as_lost_until_somebody_acts(
    world: World, one: Small, tmp_path: Path
) -> None:
    shutil.copytree(world.archive, tmp_path / "backup")
    one.practice.replace_bytes(one.document)
    world.run(hours=12)
    one.practice.replace_bytes(one.document)  # the version between is nowhere but here
    world.run(hours=12)
    world.check()
    put_back(world, tmp_path / "backup")
    world.restart()
    scrub(world, days=2)
    assert troubles(world) == {"verify": "archive_damaged"}
    lost = [row["path"].split("/")[2:] for row in world.index.rows("SELECT path FROM damage")]
    assert f"document-{one.document}" in {folder for folder, _ in lost}
    assert {name[0] for _, name in lost} == {"2"}
    current = one.practice.truth()[one.patient].documents[one.document]
    assert world.media(one.patient, "document", one.document)[-1] == current


# --- D16, D22: what hands and disks do to archived files


def scrub(world: World, days: int = 2) -> None:
    """The scrub's parts of some days: what the first finds, a later one sees healed."""
    for _ in range(days):
        world.run(hours=24)
        world.lanes.pull_lane.due("scrub")
        world.run(hours=2)


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(0o400)


def put_in_place(path: Path, make: Callable[[Path], None]) -> None:
    """Something else bears the name."""
    path.unlink()
    make(path)


HANDS: dict[str, Callable[[Path], object]] = {
    "edited": lambda path: rewrite(path, b"edited by hand"),
    "one bit rotted": lambda path: rewrite(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "emptied": lambda path: rewrite(path, b""),
    "cut by a disk that lied": lambda path: rewrite(path, path.read_bytes()[:-1]),
    "zeroed by a disk that lied": lambda path: rewrite(path, bytes(path.stat().st_size)),
    "deleted": Path.unlink,
    "renamed": lambda path: path.rename(path.with_name("Smith.png")),
    "replaced by a link": lambda path: put_in_place(path, lambda path: path.symlink_to("/etc/hostname")),
    "replaced by a pipe": lambda path: put_in_place(path, os.mkfifo),
}


def test_archived_files_that_hands_or_disks_changed_are_kept_aside_and_fetched_again(tmp_path: Path) -> None:
    one = small(documents=len(HANDS))
    world = World.start(tmp_path, practice=one.practice, interval=300.0, verify={"subset": "1/1"})
    world.run()
    world.lanes.pull_lane.due("scrub")
    world.run(hours=1)
    paths = sorted(world.archive.glob(f"patients/{one.patient}/document-*/1-*.png"))
    whole, sent, changed = [path.read_bytes() for path in paths], len(world.placements()), set[bytes]()
    for path, hand in zip(paths, HANDS.values(), strict=True):
        hand(path)
        changed |= {path.read_bytes()} if path.is_file() and not path.is_symlink() else set()
    scrub(world)
    for path, content, name in zip(paths, whole, HANDS, strict=True):
        assert not path.is_symlink(), name
        assert path.read_bytes() == content, name
        assert path.stat().st_mode & 0o777 == 0o400, name
    assert len(world.placements()) <= sent + len(HANDS) + 1  # and one for thumbnails
    assert {each.read_bytes() for each in (world.archive / "damaged").rglob("*") if each.is_file()} >= changed
    assert len(changed) == 5
    (renamed,) = world.archive.rglob("Smith.png")
    assert renamed.read_bytes() in whole
    renamed.unlink()
    assert troubles(world) == {}
    world.check()
    world.stop()


def test_file_whose_mode_was_changed_by_hand_is_told(world: World, one: Small) -> None:
    world.lanes.pull_lane.due("scrub")
    world.run(hours=1)
    (path,) = (world.archive / f"patients/{one.patient}/document-{one.document}").glob("1-*.jpg")
    path.chmod(0o666)
    scrub(world, days=1)
    assert troubles(world) == {"verify": "archive_damaged"}
    assert [row["code"] for row in world.index.rows("SELECT code FROM damage")] == ["wrong_mode"]
    path.chmod(0o400)
    scrub(world, days=1)
    assert troubles(world) == {}
    world.check()


# --- D21: an index of which parts are corrupt, lost or another's


def crashed(world: World, tmp_path: Path) -> Path:
    """The state of a process that died: its index still has a -wal and a -shm."""
    kept = tmp_path / "crashed"
    kept.mkdir()
    for path in world.settings.state_path.glob("index.db*"):
        shutil.copy(path, kept)
    world.stop()
    for path in world.settings.state_path.glob("index.db*"):
        path.unlink()
    for path in kept.iterdir():
        shutil.copy(path, world.settings.state_path)
    return world.settings.state_path / "index.db"


def beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def lose(path: Path, *ends: str) -> None:
    for end in ends:
        beside(path, end).unlink()


def replace_all(path: Path, content: bytes) -> None:
    lose(path, "-wal", "-shm")
    path.write_bytes(content)


BREAKING: dict[str, Callable[[Path], object]] = {
    "-shm lost": lambda path: lose(path, "-shm"),
    "-shm garbage": lambda path: beside(path, "-shm").write_bytes(os.urandom(32_768)),
    "-wal lost": lambda path: lose(path, "-wal", "-shm"),
    "-wal cut": lambda path: os.truncate(beside(path, "-wal"), beside(path, "-wal").stat().st_size // 2),
    "-wal garbage": lambda path: overwrite(beside(path, "-wal"), 4096, os.urandom(8192)),
    "header zeroed": lambda path: overwrite(path, 0, bytes(100)),
    "no database": lambda path: replace_all(path, b"text" * 5000),
    "emptied": lambda path: replace_all(path, b""),
    "a folder": lambda path: put_in_place(path, Path.mkdir),
}


@pytest.mark.parametrize("broken", BREAKING)
def test_broken_index_is_refused_or_made_whole_and_nothing_is_fetched_again(
    world: World, tmp_path: Path, broken: str
) -> None:
    versions, sent = world.index.rows(VERSIONS), len(world.office.arrivals)
    path = crashed(world, tmp_path)
    BREAKING[broken](path)
    try:
        world.restart()
        world.run(hours=1)
        refused = bool(troubles(world))
        world.stop()
    except SiteError:
        refused = True
    if refused:
        assert world.placements(sent) == []
        reindex(world.settings, open_archive(world.settings), world.clock.now())
    world.restart()
    world.sweep()
    world.run(hours=26)
    assert world.index.rows(VERSIONS) == versions
    assert world.placements(sent) == []
    world.check()


def test_wal_of_another_practices_index_is_never_worked_with(world: World, tmp_path: Path) -> None:
    other = serving(tmp_path / "other", small(documents=4))
    other.run()
    versions, sent = world.index.rows(VERSIONS), len(world.office.arrivals)
    path = crashed(world, tmp_path)
    foreign = crashed(other, tmp_path / "other")
    shutil.copy(beside(foreign, "-wal"), beside(path, "-wal"))
    beside(path, "-shm").unlink()
    files = {each: each.read_bytes() for each in world.archive.rglob("*") if each.is_file()}
    with contextlib.suppress(SiteError):
        world.restart()
        world.run(hours=1)
        assert troubles(world).get("archive") == "archive_missing"
        world.stop()
    assert world.placements(sent) == []
    assert {each: each.read_bytes() for each in world.archive.rglob("*") if each.is_file()} == files
    reindex(world.settings, open_archive(world.settings), world.clock.now())
    world.restart()
    world.sweep()
    world.run(hours=26)
    assert world.index.rows(VERSIONS) == versions
    assert world.placements(sent) == []
    world.check()
