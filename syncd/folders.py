"""The archive's folders on disk: opened one by one below its root, without a symlink on the way; files in them made
durable, or thrown away.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from syncd.errors import ItemError, SiteError, UnreadableError
from syncd.sidecar import encode

READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted FIFO must not block the opening
_FOLDER: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
MANY, AT_ONCE = 16, 5  # things to make durable from which on threads pay; so many: more get in each other's way
_JSON_CAP: Final = 1 << 24  # bytes; a listing's Note can be a long text
T = TypeVar("T")
R = TypeVar("R")
_SITE: Final[Mapping[int | None, str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "archive_full"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "archive_read_only"),
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ENODEV), "archive_missing"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM), "resources_exhausted"),
    errno.EIO: "disk_error",
}
REFUSED: Final = frozenset({errno.EACCES, errno.EPERM})
_NOT_GIVEN: Final = REFUSED | {errno.EIO, errno.EUCLEAN, errno.EBADMSG}  # the last two: its own structure is broken
_OF_ALL: Final = frozenset({"", "incoming", "patients", "damaged"})  # folders without which nothing can be archived


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies at one name of a folder; `mode_is_right`: 0400 and 0700; with a group its own, 0440 and 0750.

    `unreadable`: the disk does not even say what it is.
    """

    kind: Literal["file", "folder", "other", "unreadable"]
    bytes: int
    mode_is_right: bool


@contextlib.contextmanager
def translated(otherwise: str = "") -> Iterator[None]:
    """An OSError becomes the SiteError that it means, else `otherwise`, else ItemError io_error. Without its path."""
    try:
        yield
    except OSError as error:
        reason, code = _SITE.get(error.errno, otherwise), errno.errorcode.get(error.errno or 0, "")
        raise (SiteError(reason, code) if reason else ItemError("io_error", code)) from error


@contextlib.contextmanager
def one_file(codes: Collection[int] = _NOT_GIVEN) -> Iterator[None]:
    """Around work on one file or folder of an item: with these codes it is this one that fails, not the archive."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        raise UnreadableError(errno.errorcode.get(error.errno or 0, "")) from error


def _one(relative: str, codes: Collection[int] = _NOT_GIVEN) -> contextlib.AbstractContextManager[None]:
    """As `one_file`, around work on a folder, if it is not one that concerns everything."""
    return contextlib.nullcontext() if relative in _OF_ALL else one_file(codes)


def open_regular(name: str, folder: int) -> io.BufferedReader:
    """A regular file, for reading. Raises OSError, also for a symlink, a pipe or a folder of that name."""
    return os.fdopen(_opened(name, folder)[0], "rb")


def _opened(name: str, folder: int) -> tuple[int, os.stat_result]:
    """A regular file: its descriptor, and what fstat says."""
    descriptor = os.open(name, READ, dir_fd=folder)
    seen = os.fstat(descriptor)
    if not stat.S_ISREG(seen.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor, seen


def size_of(name: str, folder: int) -> int | None:
    """Bytes of a regular file; -1 for what is none, None for nothing."""
    try:
        seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return seen.st_size if stat.S_ISREG(seen.st_mode) else -1


def remove(name: str, folder: int) -> None:
    """Unlink, as far as that goes: what is left is found by whoever looks next."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def read_json(name: str, folder: int, lenient: Collection[int] = _NOT_GIVEN) -> dict[str, object]:
    """The JSON object in a file; empty for anything else, for nothing, and for what gives one of these codes.

    Raises OSError where the disk as a whole is to blame.
    """
    try:
        with open_regular(name, folder) as file:
            size = os.fstat(file.fileno()).st_size  # not the cap: read() makes room for as much as it is asked for
            content = json.loads(file.read(min(size, _JSON_CAP)).decode())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in _SITE and error.errno not in lenient:
            raise
        return {}
    return content if isinstance(content, dict) else {}


class Folders:
    """Open folders of one call, by relative path.

    `touched` are those that gained an entry which is not durable yet, `made` those that were not there before.
    """

    def __init__(self, root: int, gid: int | None) -> None:
        self._open, self._gid = {"": root}, gid
        self.touched, self.made, self._settled = set[str](), set[str](), set[str]()
        self.undo = contextlib.ExitStack()  # takes back what a failing batch linked
        self.marker: dict[str, object] = {}

    def get(self, relative: str, make: bool = False) -> int:
        """The folder's descriptor. Raises OSError: FileNotFoundError, ENOTDIR for a symlink in the way.

        UnreadableError: the disk does not give it, or lets nothing be made there.
        """
        if relative not in self._open:
            parent, _, name = relative.rpartition("/")
            above = self.get(parent, make)
            if make:
                with contextlib.suppress(FileExistsError), _one(parent, REFUSED):
                    os.mkdir(name, 0o700, dir_fd=above)
                    self.made.add(relative)
            with _one(relative):
                self._open[relative] = os.open(name, _FOLDER, dir_fd=above)
            if relative in self.made:
                self.own(self._open[relative], 0o700)  # above it may be setgid, which is inherited
        return self._open[relative]

    def entries(self, relative: str) -> dict[str, bool]:
        """What lies in a folder, sorted, and whether it is a folder itself; nothing where there is none."""
        try:
            folder = self.get(relative)
            with _one(relative), os.scandir(folder) as entries:
                return dict(sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries))
        except FileNotFoundError:
            return {}

    def own(self, descriptor: int, mode: int) -> None:
        """The modes of the contract; where there is a group, it may read and enter, too."""
        if self._gid is not None:
            os.fchown(descriptor, -1, self._gid)
        os.fchmod(descriptor, self._shared(mode))

    def share(self, descriptor: int, mode: int) -> None:
        """The same for a file made with this mode: where there is no group, all is as it should be."""
        if self._gid is not None:
            self.own(descriptor, mode)

    def _shared(self, mode: int) -> int:
        return mode if self._gid is None else mode | (mode & 0o500) >> 3

    def entry(self, relative: str, name: str) -> Entry | None:
        """What lies at a name of a folder; None where it has just gone."""
        folder = self.get(relative)
        try:
            with one_file():
                seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except UnreadableError:
            return Entry("unreadable", 0, mode_is_right=True)
        right = self.is_right(seen)
        if stat.S_ISDIR(seen.st_mode):
            return Entry("folder", 0, right)
        return Entry("file" if stat.S_ISREG(seen.st_mode) else "other", seen.st_size, right)

    def is_right(self, seen: os.stat_result) -> bool:
        """Whether something has the mode of the contract, and the group where there is one."""
        right = self._shared(0o700 if stat.S_ISDIR(seen.st_mode) else 0o400)
        return stat.S_IMODE(seen.st_mode) == right and self._gid in (None, seen.st_gid)

    def share_root(self) -> None:
        """Where there is a group it may enter the archive itself, too, if that is ours to say."""
        root = self._open[""]
        seen = os.fstat(root)
        if self._gid is not None and not self.is_right(seen) and seen.st_uid == os.geteuid():
            self.own(root, 0o700)

    def settle(self, relative: str) -> None:
        """For a folder without content: its mode, and its own entry and those above, which a crash may have left."""
        while relative:
            if relative not in self._settled and relative not in self.made:
                self.own(self.get(relative), 0o700)
                self._settled.add(relative)
            relative = relative.rpartition("/")[0]
            self.touched.add(relative)

    def sync(self) -> None:
        """Make every new entry durable, each folder once. A failure concerns the disk, never one item."""
        with translated("disk_error"):
            side_by_side(lambda relative: os.fsync(self._open[relative]), sorted(self.touched, reverse=True))
        self.touched.clear()

    def close(self, *relatives: str) -> None:
        """Close the folders named, else all."""
        for relative in relatives or tuple(self._open):
            os.close(self._open.pop(relative))


def write(folders: Folders, content: bytes, name: str = "") -> str:
    """A new, durable file in incoming; its name there. A failed one is thrown away."""
    incoming, name = folders.get("incoming", make=True), name or secrets.token_hex(16)
    descriptor = os.open(name, _CREATE, 0o400, dir_fd=incoming)
    try:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            folders.share(descriptor, 0o400)
            os.fsync(descriptor)  # the mode, too, is durable only now
        finally:
            os.close(descriptor)
    except OSError:
        remove(name, incoming)
        raise
    return name


def put(folders: Folders, content: Mapping[str, object], relative: str, name: str) -> None:
    """Write a small file in place of what bears its name, atomically; its folder is still to be synced."""
    temporary = write(folders, encode(content))
    try:
        os.replace(temporary, name, src_dir_fd=folders.get("incoming"), dst_dir_fd=folders.get(relative))
    except OSError:
        remove(temporary, folders.get("incoming"))
        raise
    folders.touched.add(relative)


def settle_file(folders: Folders, name: str, size: int) -> None:
    """Make the mode of a file of incoming final, and the file durable. Raises ItemError where it is not of this size.

    One whose fsync failed is thrown away, never synced again.
    """
    incoming = folders.get("incoming")
    descriptor, seen = _opened(name, incoming)
    try:
        if seen.st_size != size:
            raise ItemError("io_error", "the pulled file has another size")
        if not folders.is_right(seen):
            folders.own(descriptor, 0o400)
        try:
            os.fsync(descriptor)
        except OSError:
            remove(name, incoming)
            raise
    finally:
        os.close(descriptor)


def side_by_side(work: Callable[[T], R], things: Sequence[T]) -> list[R]:
    """What each gave, in order. Many at once, for a disk makes many things durable in the time of one.

    Raises what the first that failed did. Where the machine has no room for another thread, those there are do it.
    """
    if len(things) < MANY:
        return list(map(work, things))
    given, failed = dict[int, R](), dict[int, BaseException]()
    places = iter(range(len(things)))  # each is drawn once, whichever thread asks

    def take_some() -> None:
        for place in places:
            try:
                given[place] = work(things[place])
            except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
                failed[place] = error

    started = list[threading.Thread]()
    try:
        with contextlib.suppress(RuntimeError):
            for _ in range(AT_ONCE - 1):
                thread = threading.Thread(target=take_some)
                thread.start()
                started.append(thread)
        take_some()
    finally:  # none works on in folders that are closed by then
        for thread in started:
            thread.join()
    if failed:
        raise failed[min(failed)]
    return [given[place] for place in range(len(things))]
