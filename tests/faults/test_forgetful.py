"""Power cuts on a file system that forgets all that was not synced, or by lot some of it; see forgetful.py.

Index and archive are on one such file system: it hides nothing, as a journal would. `blackout.py` says how.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.blackout import FORGETFUL
from tests.faults.forgetful import CUT, RESTORE, Tree, lacking, serving, set_word
from tests.faults.mounts import in_namespace, lack
from tests.faults.sweeping import NIGHTLY, POINT, TIMEOUT, ask, library, tell

__all__ = ["library"]  # the fixture

pytestmark = pytest.mark.timeout(TIMEOUT)
SHARDS = 2
EVERY = 4 if NIGHTLY else 60  # call is a point
LEAST_POINTS = 800 if NIGHTLY else 50
SECONDS = 60.0  # at most, for one of the small tests


@pytest.fixture
def root() -> Iterator[Path]:
    """Where a forgetful file system may be mounted."""
    lack(lacking() + (["root"] if os.geteuid() else []))
    with tempfile.TemporaryDirectory(prefix="forgetful-") as folder:
        yield Path(folder)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_power_cut_on_a_forgetful_file_system_loses_nothing(
    library: Path, shard: int, record_property: Callable[[str, object], None]
) -> None:
    points = ("--every", EVERY, "--shard", shard, "--shards", SHARDS)
    report = ask(library, "blackout", FORGETFUL, *points, *(["--point", POINT] if POINT else []))
    tell(record_property, "power cuts on a forgetful file system", report)
    if not POINT:
        assert report.points >= LEAST_POINTS / SHARDS


# --- the file system itself


def after_a_cut(root: Path, act_on: str) -> dict[str, bytes]:
    """What is left in an empty file system where this happened before the cut, and nothing else survived."""

    def work() -> dict[str, bytes]:
        with serving(Tree(), root):
            ACTS[act_on](root)
            set_word(root, CUT, "1 0")
            set_word(root, RESTORE, "")
            return {path.name: path.read_bytes() for path in root.iterdir()}

    return in_namespace(work, SECONDS)


def write(root: Path, *synced: str) -> None:
    """A file of four bytes; `synced` may name it, and its folder."""
    file = os.open(root / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(file, b"1234")
    folder = os.open(root, os.O_RDONLY)
    for name in synced:
        os.fsync({"file": file, "folder": folder}[name])
    os.close(file)
    os.close(folder)


def link_unsynced(root: Path) -> None:
    write(root, "file", "folder")
    os.link(root / "file", root / "link")


def rewrite_unsynced(root: Path) -> None:
    write(root, "file", "folder")
    (root / "file").write_bytes(b"5678")


def unlink_unsynced(root: Path) -> None:
    write(root, "file", "folder")
    (root / "file").unlink()


ACTS = {
    "nothing synced": write,
    "file synced": lambda root: write(root, "file"),
    "folder synced": lambda root: write(root, "folder"),
    "both synced": lambda root: write(root, "file", "folder"),
    "link unsynced": link_unsynced,
    "rewrite unsynced": rewrite_unsynced,
    "unlink unsynced": unlink_unsynced,
}


@pytest.mark.parametrize(
    ("act", "left"),
    [
        ("nothing synced", {}),
        ("file synced", {}),
        ("folder synced", {"file": b""}),
        ("both synced", {"file": b"1234"}),
        ("link unsynced", {"file": b"1234"}),
        ("rewrite unsynced", {"file": b"1234"}),
        ("unlink unsynced", {"file": b"1234"}),
    ],
)
def test_forgetful_file_system_keeps_what_was_synced_and_no_more(root: Path, act: str, left: dict[str, bytes]) -> None:
    assert after_a_cut(root, act) == left


def test_index_with_another_synchronous_loses_what_it_committed(root: Path) -> None:
    """Why `synchronous=FULL`: the switch sees the difference."""

    def rows(synchronous: str) -> list[tuple[int]]:
        with serving(Tree(), root):
            with closing(sqlite3.connect(root / "index.db", isolation_level=None)) as index:
                index.execute("PRAGMA journal_mode=WAL")
                index.execute(f"PRAGMA synchronous={synchronous}")
                index.execute("CREATE TABLE t (a)")
                index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                index.execute("INSERT INTO t VALUES (1)")
                set_word(root, CUT, "1 0")
            set_word(root, RESTORE, "")
            with closing(sqlite3.connect(root / "index.db")) as index:
                return index.execute("SELECT a FROM t").fetchall()

    assert in_namespace(lambda: rows("FULL"), SECONDS) == [(1,)]
    assert in_namespace(lambda: rows("NORMAL"), SECONDS) == []
