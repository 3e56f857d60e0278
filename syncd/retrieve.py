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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from syncd.archive import Archive
from syncd.catalog import Catalog
from syncd.errors import ItemError, UsageError
from syncd.model import Item, Version
from syncd.naming import export_name, folder_name
from syncd.service import as_caller

_CHUNK: Final = 1 << 20
_NO_LINKS: Final = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))  # as on a FAT stick


class DamagedError(Exception):
    """The archived file is not there, or has other bytes than were archived."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one restore: the copy, or None when the archived file is damaged."""

    version: int
    path: Path | None


@dataclass(frozen=True, slots=True)
class PastState:
    """What became of a patient's restore. `damaged`: full ids of what was left out because its file is not what it was;
    `destroyed`: of what was destroyed by order since.
    """

    files: int
    bytes: int
    damaged: tuple[str, ...]
    destroyed: tuple[str, ...]


def restore(
    catalog: Catalog,
    archive: Archive,
    item: Item,
    to: Path,
    at: float | None,
    zone: dt.tzinfo,
    *,
    number: int | None = None,
    name: str = "",
) -> Restored:
    """One verified copy: of the newest version, of the one that was current at `at` (seconds since the epoch), or of
    that number.

    It is called `name`; without one it gets a name for people, which tells what it shows.
    Raises UsageError when there is no such version, or none by then, or the folder cannot be written.
    """
    version = _as_listed(archive, wanted(catalog, item, at, number))
    named = name or export_name(version, numbered=at is not None or number is not None)
    with target(archive, to):
        try:
            return Restored(version.version, copy(archive, version, to, named, zone))
        except DamagedError:
            return Restored(version.version, None)


def wanted(catalog: Catalog, item: Item, at: float | None, number: int | None) -> Version:
    """The version that `restore` copies. Raises UsageError when there is no such one, or none by then."""
    version = catalog.as_of(item, at, number)
    if version is None:
        gone = "was destroyed: see `syncd history`" if catalog.index.is_destroyed(item) else "has no archived version"
        raise UsageError(f"{item.full_id} {gone}" + (f" {number}" if number else "" if at is None else " by then"))
    return version


def restore_patient(
    catalog: Catalog, archive: Archive, pat_num: int, to: Path, at: float, zone: dt.tzinfo
) -> PastState:
    """Verified copies of what a patient had at `at`: `TO/101/Lab Cases/2021-04-08 ... (document-34 version 1).jpg`,
    named and filed as they were listed then.

    Raises UsageError for a patient of whom nothing was archived by then, or when the folder cannot be written.
    """
    versions = [_as_listed(archive, version) for version in catalog.state_of(pat_num, at)]
    destroyed = tuple(Item(r["pat_num"], r["kind"], r["num"]) for r in catalog.destroyed(pat_num, after=at))
    if not versions and not destroyed:
        raise UsageError(f"patient-{pat_num}: nothing of this patient was archived by then")
    damaged, size = [], 0
    with target(archive, to):
        for version in versions:
            folder = to / str(pat_num) / folder_name(_category(version))
            try:
                copy(archive, version, folder, export_name(version, numbered=True), zone)
                size += version.bytes
            except DamagedError:
                damaged.append(version.item.full_id)
    return PastState(len(versions) - len(damaged), size, tuple(damaged), tuple(item.full_id for item in destroyed))


def _as_listed(archive: Archive, version: Version) -> Version:
    """A version with the listing of its own sidecar; with the newest one where that is damaged."""
    told = archive.read_sidecar(version)
    return version if told is None or told.seq != version.seq else replace(version, listing=told.listing)


def _category(version: Version) -> str:
    return str(version.listing.get("SheetType" if version.item.kind == "sheet" else "docCategory") or "")


@contextlib.contextmanager
def target(archive: Archive, to: Path) -> Iterator[None]:
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


def copy(archive: Archive, version: Version, folder: Path, name: str, zone: dt.tzinfo) -> Path:
    """Copy under a temporary name, verify, make durable, then give it the first free one of its names."""
    try:
        source = archive.open_media(version)
    except ItemError as error:
        raise DamagedError from error
    with source, as_caller():
        make_folder(folder)
        temporary = folder / f".syncd-{secrets.token_hex(8)}"
        try:
            _write_verified(source, version, temporary)
            os.utime(temporary, (version.archived_at, _modified_at(version, zone)))
            path = _name_it(temporary, folder, name)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(folder)
    return path


def make_folder(folder: Path) -> None:
    """The folder and those above it that are missing, for the owner only."""
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
        raise DamagedError


def _read(source: BinaryIO) -> bytes:
    """A piece of the archived file; a disk that cannot read it back makes the file damaged, not the target."""
    try:
        return source.read(_CHUNK)
    except OSError as error:
        raise DamagedError from error


def _name_it(temporary: Path, folder: Path, name: str) -> Path:
    """Link the copy under the first name that is free: `name.jpg`, `name (2).jpg`, ..."""
    for path in possible_names(folder, name):
        with contextlib.suppress(FileExistsError):
            _link(temporary, path)
            break
    return path


def possible_names(folder: Path, name: str) -> Iterator[Path]:
    """The names that a copy may get, in order: `name.jpg`, `name (2).jpg`, ..."""
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
