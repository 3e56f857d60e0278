"""Copies out of the archive, with names for people, each verified while it is copied. The archive is only read.

A copy exists under its final name only when it is complete, has the bytes that were archived, and is durable; nothing
that lies in the target folder is ever overwritten.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import itertools
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from syncd.archive import Archive
from syncd.catalog import Catalog
from syncd.errors import ItemError, UsageError
from syncd.model import Item, Version
from syncd.naming import export_name
from syncd.service import as_caller

_CHUNK: Final = 1 << 20
_NO_LINKS: Final = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))  # as on a FAT stick


class _DamagedError(Exception):
    """The archived file is not there, or has other bytes than were archived."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one restore: the copy, or None when the archived file is damaged."""

    version: int
    path: Path | None


def restore(
    catalog: Catalog, archive: Archive, item: Item, to: Path, at: float | None, zone: dt.tzinfo, *, name: str = ""
) -> Restored:
    """One verified copy: of the newest version, or of the one that was current at `at` (seconds since the epoch).

    It is called `name`; without one it gets a name for people, which tells what it shows.
    Raises UsageError when there is no version, or none by then, or the folder cannot be written.
    """
    number = catalog.as_of(item, float("inf") if at is None else at)
    if number is None:
        raise UsageError(f"{item.full_id} has no archived version" + ("" if at is None else " by then"))
    version = next(version for version in catalog.versions(item) if version.version == number)
    with _target(archive, to):
        try:
            return Restored(number, _copy(archive, version, to, name or export_name(version, at is not None), zone))
        except _DamagedError:
            return Restored(number, None)


@contextlib.contextmanager
def _target(archive: Archive, to: Path) -> Iterator[None]:
    """Around all work on the target folder: it may not be the archive, and its OSErrors are the caller's to mend."""
    with as_caller():
        inside = to.resolve().is_relative_to(archive.root.resolve())
    if inside:
        raise UsageError("--to: copies cannot be put into the archive itself")
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "error")
        raise UsageError(f"--to: the folder cannot be written ({code})") from error


def _copy(archive: Archive, version: Version, folder: Path, name: str, zone: dt.tzinfo) -> Path:
    """Copy under a temporary name, verify, make durable, then give it the first free one of its names."""
    try:
        source = archive.open_media(version)
    except ItemError as error:
        raise _DamagedError from error
    with source, as_caller():
        _make_folder(folder)
        temporary = folder / f".syncd-{secrets.token_hex(8)}"
        try:
            _write_verified(source, version, temporary)
            os.utime(temporary, (version.archived_at, _modified_at(version, zone)))
            path = _name_it(temporary, folder, name)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(folder)
    return path


def _make_folder(folder: Path) -> None:
    for missing in [each for each in (*reversed(folder.parents), folder) if not each.exists()]:
        missing.mkdir(mode=0o700)


def _write_verified(source: BinaryIO, version: Version, temporary: Path) -> None:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as copy:
        while chunk := _read(source):
            digest.update(chunk)
            size += len(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    if (size, digest.hexdigest()) != (version.bytes, version.sha256):
        raise _DamagedError


def _read(source: BinaryIO) -> bytes:
    """A piece of the archived file; a disk that cannot read it back makes the file damaged, not the target."""
    try:
        return source.read(_CHUNK)
    except OSError as error:
        raise _DamagedError from error


def _name_it(temporary: Path, folder: Path, name: str) -> Path:
    """Link the copy under the first name that is free: `name.jpg`, `name (2).jpg`, ..."""
    for path in _names(folder, name):
        with contextlib.suppress(FileExistsError):
            _link(temporary, path)
            break
    return path


def _names(folder: Path, name: str) -> Iterator[Path]:
    stem, dot, extension = name.rpartition(".")
    yield folder / name
    for number in itertools.count(2):
        yield folder / f"{stem} ({number}){dot}{extension}"


def _link(temporary: Path, path: Path) -> None:
    """Raises FileExistsError; without hard links the name is taken by an empty file first, then replaced."""
    try:
        os.link(temporary, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise


def _modified_at(version: Version, zone: dt.tzinfo) -> float:
    """DateCreated, which is in the office's time; when the file was archived, where that is no usable time."""
    created = version.listing.get("DateCreated") or version.listing.get("DateTimeSheet")
    try:
        at = dt.datetime.fromisoformat(str(created)).replace(tzinfo=zone).timestamp()
    except (ValueError, OverflowError):
        return version.archived_at
    return at if at > 0 else version.archived_at  # 0001-01-01 stands for none


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
