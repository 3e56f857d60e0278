"""[archive] group: from the archive's folder down all is the group's to read, and nobody else's; no root needed."""

from __future__ import annotations

import grp
import os
import shutil
import stat
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from syncd.archive import NOT_IN_GROUP, Archive
from syncd.checker import Tally, check
from syncd.errors import EXIT_CONFIG, ConfigError
from syncd.repair import mend
from tests.small import small
from tests.test_cli import Desk, practice
from tests.world import RecordedLog, World

ROOT = os.geteuid() == 0
DAEMON, READER = (65_534, 65_533) if ROOT else (os.geteuid(), os.geteuid())
# Without root: a further group of this user's, where there is one.
GROUP = next(each for each in grp.getgrall() if each.gr_gid not in (0, DAEMON)) if ROOT else grp.getgrgid(
    next((gid for gid in os.getgroups() if gid != os.getegid()), os.getegid())
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The daemon's own, where its user may go; what that has to import is there by then."""
    mirror(tmp_path)
    made = Path(tempfile.mkdtemp())
    os.chown(made, DAEMON, -1)
    yield made
    shutil.rmtree(made)


def as_daemon(work: Callable[[], None], groups: list[int]) -> int:
    """Do it in a process of the daemon's user; its exit code, 1 where it raised."""
    if (child := os.fork()) == 0:
        try:
            if ROOT:
                os.setgroups(groups)
                os.setgid(DAEMON)
                os.setuid(DAEMON)
            work()
            os._exit(0)
        except ConfigError as error:
            os._exit(error.exit_code)
        except BaseException:  # noqa: BLE001 - pytest's own, too
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mirror(folder: Path) -> None:
    """Archive something of every kind, publish the index, set something aside."""
    world = World.start(folder, practice=small().practice, archive={"group": GROUP.gr_name})
    world.run()
    world.lanes.pull_lane.due("publish")
    world.run(seconds=60)
    archive = Archive(world.archive, 0, GROUP.gr_name)
    assert [each for each in check(world.index, archive, Tally()) if each] == []
    row = world.index.rows("SELECT path FROM version WHERE kind = 'sheet' LIMIT 1")[0]
    archive.set_aside(row["path"])
    world.stop()


def test_everything_is_the_groups_and_nothing_anybody_elses(folder: Path) -> None:
    assert as_daemon(lambda: mirror(folder), [GROUP.gr_gid]) == 0
    archive = folder / "archive"
    seen = {path: path.lstat() for path in (archive, *archive.rglob("*"))}
    names = {path.relative_to(archive).parts[0] for path in seen if path != archive}
    assert names == {".syncd-archive", "incoming", "patients", "published", "damaged"}
    assert {path.name for path in seen} >= {"patient.json", "index.db"}
    for path, found in seen.items():
        assert (found.st_uid, found.st_gid) == (DAEMON, GROUP.gr_gid), path
        assert stat.S_IMODE(found.st_mode) == (0o750 if path.is_dir() else 0o440), path
    read = ["find", ".", "-type", "f", "-exec", "sha256sum", "{}", "+"]
    other = {"user": READER, "group": READER, "extra_groups": [GROUP.gr_gid]} if ROOT else {}
    done = subprocess.run(read, cwd=archive, capture_output=True, text=True, check=False, **other)  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == sum(stat.S_ISREG(found.st_mode) for found in seen.values())


def test_group_that_the_user_is_not_in_is_a_configuration_error(folder: Path) -> None:
    strange = next(each for each in grp.getgrall() if each.gr_gid not in (DAEMON, os.getegid(), *os.getgroups()))
    assert as_daemon(lambda: _open(folder, strange.gr_name), []) == EXIT_CONFIG
    assert as_daemon(lambda: _open(folder, strange.gr_name, owner=""), []) == 0  # a reader shares nothing
    assert "usermod" in NOT_IN_GROUP


def test_whoever_is_not_in_the_group_is_told_who_must_do_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: DAEMON)
    strange = next(each for each in grp.getgrall() if each.gr_gid not in (os.getegid(), *os.getgroups()))
    with pytest.raises(ConfigError, match="usermod"):
        _open(tmp_path, strange.gr_name)


def _open(folder: Path, group: str, owner: str = "this machine") -> None:
    Archive(folder, 0, group, owner)


def test_group_that_does_not_exist_ends_the_daemon_with_78(tmp_path: Path) -> None:
    with practice() as simulation:
        desk = Desk(simulation, tmp_path)
        text = desk.file.read_text().replace("[archive]", '[archive]\ngroup = "no-such-group"')
        desk.file.write_text(text)
        result = desk.call("run")
        for words in (["health"], ["status"], ["backfill"]):
            assert desk.call(*words).exit_code == EXIT_CONFIG
        assert not list(desk.folder.glob("log/*")), "nothing was begun"
    assert result.exit_code == EXIT_CONFIG
    assert "[archive] group: this machine has no such group" in result.output


def test_archive_that_had_no_group_is_given_to_it_by_a_repair(folder: Path) -> None:
    assert as_daemon(lambda: _shared_later(folder), [GROUP.gr_gid]) == 0
    archive = folder / "archive"
    for path in (archive, *archive.rglob("*")):
        assert path.lstat().st_gid == GROUP.gr_gid
        assert stat.S_IMODE(path.lstat().st_mode) == (0o750 if path.is_dir() else 0o440), path


def _shared_later(folder: Path) -> None:
    world = World.start(folder, practice=small().practice)
    world.run()
    world.lanes.pull_lane.due("publish")
    world.run(seconds=60)
    archive = Archive(world.archive, 0, GROUP.gr_name)
    archive.check(str(archive.marker_id()))
    for found in [each for each in check(world.index, archive, Tally()) if each]:
        assert (found.code, mend(world.index, archive, RecordedLog(), found, world.clock.now())) == (
            "wrong_mode",
            "healed",
        )
    assert [each for each in check(world.index, archive, Tally()) if each] == []
    world.stop()
