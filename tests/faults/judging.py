"""What must hold after a crash or a disk that failed; and how to try something, and have everything as before."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from syncd.schema import Row
from tests.faults.cycle import Moment
from tests.world import World

NOWHERE_ELSE: Final = contextlib.nullcontext()
RESTARTED_AFTER: Final = 5.0  # simulated seconds from the end of a process to the start of the next
_VERSIONS: Final = "SELECT seq, pat_num, kind, num, version, sidecar, revision, sha256, path FROM version ORDER BY seq"


def judge(
    world: World,
    lines: int,
    known: set[bytes],
    *,
    swept: bool = False,
    within: AbstractContextManager[None] = NOWHERE_ELSE,
) -> Row:
    """Restart on what is left, sweep once, check, all `within`; raises for what is wrong.

    `lines`: of the log, before the mirror that ended wrote any. `swept`: it has swept already. `known`: the `state_of`
    all that was found good, as it was left and as its next mirror started: what is in one of these states goes
    on, to the byte, in the same way, and is let be.
    """
    said = sorted(said_since(world, lines))
    left = state_of(world, _recovered(world.settings.state_path), swept, said)
    if left in known:
        return {"known": True}
    with within:
        seen = _judge(world, said, known, swept)
    known.add(left)
    return seen


def said_since(world: World, lines: int) -> set[int]:
    """What the log says was archived, by sequence number, since it had so many lines."""
    return {line["seq"] for line in world.log.lines[lines:] if line.get("event") == "document_archived"}


def _judge(world: World, said: list[int], known: set[bytes], swept: bool) -> Row:
    world.clock.advance(RESTARTED_AFTER)
    files = published(world.archive)
    world.restart(backfill=True, since=world.clock.now())
    assert world.index.value("PRAGMA integrity_check") == "ok"
    state = state_of(world, world.index.db.conn.serialize(), swept, sorted(files), said)
    if state in known:
        return {"known": True}
    rows = world.index.rows(_VERSIONS)
    if not swept:
        world.run()
    world.check()
    now = {row["seq"]: row for row in world.index.rows(_VERSIONS)}
    lost = [row["path"] for row in rows if now.get(row["seq"]) != row]
    assert not lost, f"recorded once, and not any more: {lost}"
    assert now.keys() >= set(said), f"said to be archived: {sorted(set(said) - now.keys())}"
    assert world.index.value("PRAGMA integrity_check") == "ok"
    changed = files.items() - published(world.archive).items()
    assert not changed, f"published once, and not the same any more: {sorted(changed)}"
    assert not list((world.archive / "incoming").iterdir()), "incoming/ is not empty"
    world.stop()
    known.add(state)
    return {"known": False}


def state_of(world: World, index: bytes, *asked: object) -> bytes:
    """A digest of all that the future depends on (index, files, names, outside, clock) and of what is `asked` then.

    Of the `index` it is every page as a mirror sees it, not the journal that made it so; of files not their times.
    """
    digest = hashlib.sha256(index)
    digest.update(repr((outside_of(world), asked)).encode())
    names: dict[int, int] = {}
    for folder, inside, files in os.walk(world.folder):
        inside.sort()
        digest.update(f"{folder} {inside}\n".encode())
        for name in sorted(files):
            if not name.startswith("index.db"):
                path = f"{folder}/{name}"
                seen = os.lstat(path)
                same = names.setdefault(seen.st_ino, len(names))
                digest.update(f"{path} {seen.st_mode} {seen.st_size} {same}\n".encode())
                digest.update(_content(path, seen.st_size))
    return digest.digest()


def outside_of(world: World) -> str:
    """Office, drop, practice and clock, as far as a mirror's future depends on them."""
    office, site = world.office, world.site
    outside = (len(office.arrivals), office.faults._all, site.files, sorted(site.folders), world.practice._renderings)
    return repr((outside, world.clock.now(), [(at, order) for at, order, _ in world.clock._due]))


def _content(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def _recovered(state: Path) -> bytes:
    """The pages of the index as whoever opens it next will find them, on a copy: to look must not be to recover."""
    there, folder = sorted(state.glob("index.db*")), state.parent.with_name("recovered")
    folder.mkdir()
    try:
        for path in there:
            shutil.copyfile(path, folder / path.name)
        with contextlib.closing(sqlite3.connect(folder / "index.db")) as copy:
            return copy.serialize()
    except sqlite3.DatabaseError:  # a start that was cut short: no index yet
        return b"".join(str(path).encode() + path.read_bytes() for path in there)
    finally:
        shutil.rmtree(folder)


def published(archive: Path) -> dict[str, tuple[int, int, int]]:
    """Every version's file: its inode, size and time of change."""
    found = {}
    for path in archive.glob("patients/*/*/*"):
        if path.suffix != ".json":
            seen = path.lstat()
            found[str(path.relative_to(archive))] = (seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return found


@contextlib.contextmanager
def trial(world: World) -> Iterator[None]:
    """What happens inside happens to a copy of the mirror's folder, at its own path; then all is as it was.

    So is the outside. A mirror that stands still meanwhile goes on with its own folder as if nothing had been.
    """
    aside = world.folder.with_name("aside")
    with contextlib.ExitStack() as after:
        after.callback(Moment(world).back)
        world.folder.rename(aside)
        after.callback(aside.rename, world.folder)
        after.callback(shutil.rmtree, world.folder, ignore_errors=True)
        copy_tree(aside, world.folder)
        after.callback(lambda: world.lanes.closing.close())  # noqa: PLW0108 - of the lanes that there are then
        yield


def copy_tree(source: Path, target: Path) -> None:
    """Folders and files with their modes; what has two names has two names in the copy."""
    named: dict[int, str] = {}
    target.mkdir(mode=source.stat().st_mode & 0o777)
    _copy_entries(str(source), str(target), named)


def _copy_entries(source: str, target: str, named: dict[int, str]) -> None:
    for entry in os.scandir(source):
        seen, path = entry.stat(follow_symlinks=False), f"{target}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            Path(path).mkdir(seen.st_mode & 0o777)
            _copy_entries(entry.path, path, named)
        elif seen.st_ino in named:
            os.link(named[seen.st_ino], path)
        else:
            _copy_file(entry.path, path, seen)
            if seen.st_nlink > 1:
                named[seen.st_ino] = path


def _copy_file(source: str, target: str, seen: os.stat_result) -> None:
    old = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, seen.st_mode & 0o777)
    copied = os.sendfile(new, old, 0, seen.st_size) if seen.st_size else 0
    os.close(old)
    os.close(new)
    assert copied == seen.st_size, f"{source}: {copied} of {seen.st_size} bytes copied"
