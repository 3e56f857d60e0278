"""A power switch for one process: it counts every call that makes something durable, and at one of them all is dark.

The calls of the product itself are counted in module `os`, those of SQLite at its own seam for tests, the system calls
of its VFS (sqlite.org/c3ref/vfs.html, xSetSystemCall). Not counted: what goes through a Python file object, which is
on no disk before the fsync that follows, and is counted; and SQLite's fsync, which leaves the disk as its last write
found it. Meant for forked processes: nothing is put back.
"""

from __future__ import annotations

import _sqlite3
import contextlib
import ctypes
import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from syncd.demo.adapter import OfficeAdapter
from tests.world import DropInMemory, RecordedLog, World

DURABLE = (
    *("fsync", "fdatasync", "write", "pwrite", "ftruncate", "link", "rename", "replace", "unlink", "mkdir", "rmdir"),
    *("chmod", "fchmod", "fchown"),
)
OUTSIDE = ("pull", "remove", "look", "names")


class PowerCutError(BaseException):
    """The machine is dark: no `except Exception` and no clean-up code goes on."""


class Power:
    """`arm(at)`: at the at-th call from now `cut` is called, and that call and all later ones fail. 0: never.

    `acknowledged`: sequence numbers of versions that were reported archived, and whose transaction was committed
    while there was power: what an outside witness may rely on.
    """

    def __init__(self, cut: Callable[[], None], log: RecordedLog) -> None:
        self._cut, self._log, self._read = cut, log, 0
        self.at = self.calls = self.of_sqlite = 0
        self.on = True
        self.acknowledged: set[int] = set()
        _watch_os(self)
        _watch_sqlite(self)
        _watch_outside(self)

    def arm(self, at: int) -> None:
        self.at, self.calls, self.of_sqlite, self.on = at, 0, 0, True
        self._read = len(self._log.lines)  # what a dead process said last was perhaps never committed

    def cut(self) -> None:
        """Now, if there still is power."""
        if self.on:
            self._cut()
            self.on = False

    def draw(self) -> bool:
        """One more call; whether there is power for it."""
        if self.on:
            self.calls += 1
            if self.calls == self.at:
                self.cut()
        return self.on

    def require(self) -> None:
        if not self.on:
            raise PowerCutError

    def committed(self) -> None:
        self.require()
        new, self._read = self._log.lines[self._read :], len(self._log.lines)
        self.acknowledged |= {int(line["seq"]) for line in new if line["event"] == "document_archived"}

    @contextlib.contextmanager
    def until_dark(self) -> Iterator[None]:
        """What fails in here fails for want of power, or it is a bug."""
        try:
            yield
        except BaseException:
            if self.on:
                raise


def _watch_os(power: Power) -> None:
    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            power.draw()
            power.require()
            return real(*args, **kwargs)

        return call

    for name in DURABLE:
        setattr(os, name, watched(getattr(os, name)))
    plain_open, making_open = os.open, watched(os.open)

    def either_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        power.require()
        opened: int = (making_open if flags & os.O_CREAT else plain_open)(path, flags, *args, **kwargs)
        return opened

    setattr(os, "open", either_open)  # noqa: B010 - a plain assignment would have to lie about overloads


def _watch_outside(power: Power) -> None:
    """The office and the drop are other machines: they go on, but hear nothing from a dark one."""

    def powered(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            power.require()
            return real(*args, **kwargs)

        return call

    for owner, names in ((OfficeAdapter, ("send",)), (DropInMemory, OUTSIDE)):
        for name in names:
            setattr(owner, name, powered(getattr(owner, name)))


# --- after a power cut


def close_what_is_open_in(folder: Path) -> None:
    """Descriptors that a mirror had when it died: the kernel would have closed them."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very listing is gone already
            if descriptor.readlink().is_relative_to(folder):
                os.close(int(descriptor.name))


def missing_versions(world: World, acknowledged: set[int], in_index: bool) -> list[str]:
    """What was reported, and is not in the archive as it was, or (`in_index`) not in the index."""
    missing = []
    for line in world.log.events("document_archived"):
        pat_num, _, name = str(line["item"]).partition("/")
        files = (world.archive / "patients" / pat_num / name).glob(f"{line['version']}-*")
        media = [path for path in files if path.suffix != ".json"]
        sound = [path for path in media if hashlib.sha256(path.read_bytes()).hexdigest()[:12] in path.name]
        if line["seq"] in acknowledged and not sound:
            missing.append(f"{line['item']} version {line['version']} was reported, and is not in the archive")
    if in_index and acknowledged:
        lost = acknowledged - _recorded(world.settings.state_path)
        missing += [f"seq {seq} was reported, and is not in the index" for seq in sorted(lost)]
    return missing


def _recorded(state: Path) -> set[int]:
    """The sequence numbers in a copy of the index: to look must not be to recover."""
    with tempfile.TemporaryDirectory() as folder:
        for path in state.glob("index.db*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, folder)
        with contextlib.closing(sqlite3.connect(Path(folder, "index.db"))) as copy:
            return {row[0] for row in copy.execute("SELECT seq FROM version")}


def settled(world: World) -> list[str]:
    """After a clean sweep and the late looks at the drop: in what the mirror is not what it would have been."""
    world.nap = 3600.0
    world.run()
    world.run(until=lambda: not world.index.value("SELECT count(*) FROM attempt"))
    found = world.findings()
    wrong = found.wrong + found.lacking + [f"on the drop: {name}" for name in world.site.files]
    for table in ("attempt", "duty"):
        left = world.index.value(f"SELECT count(*) FROM {table}")
        wrong += [f"{left} rows in {table}"] if left else []
    if (said := world.index.value("PRAGMA integrity_check")) != "ok":
        wrong.append(f"integrity_check: {said}")
    return wrong


# --- SQLite

_MEMBERS = (
    *("xOpen", "xDelete", "xAccess", "xFullPathname", "xDlOpen", "xDlError", "xDlSym", "xDlClose", "xRandomness"),
    *("xSleep", "xCurrentTime", "xGetLastError", "xCurrentTimeInt64"),
)
_SET_CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_GET_CALL = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


class _Vfs(ctypes.Structure):
    """struct sqlite3_vfs, version 3."""

    _fields_ = (
        *(("version", ctypes.c_int), ("file_size", ctypes.c_int), ("longest_path", ctypes.c_int)),
        *(("next", ctypes.c_void_p), ("name", ctypes.c_char_p), ("app", ctypes.c_void_p)),
        *((member, ctypes.c_void_p) for member in _MEMBERS),
        *(("set_call", _SET_CALL), ("get_call", _GET_CALL)),
    )


_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_SYSTEM_CALLS: dict[bytes, Any] = {
    b"open": ctypes.CFUNCTYPE(_INT, _POINTER, _INT, _INT),
    b"write": ctypes.CFUNCTYPE(ctypes.c_ssize_t, _INT, _POINTER, _SIZE),
    b"pwrite": ctypes.CFUNCTYPE(ctypes.c_ssize_t, _INT, _POINTER, _SIZE, ctypes.c_int64),
    b"pwrite64": ctypes.CFUNCTYPE(ctypes.c_ssize_t, _INT, _POINTER, _SIZE, ctypes.c_int64),
    b"ftruncate": ctypes.CFUNCTYPE(_INT, _INT, ctypes.c_int64),
    b"unlink": ctypes.CFUNCTYPE(_INT, _POINTER),
}
_kept: list[object] = []  # SQLite holds only addresses


def _watch_sqlite(power: Power) -> None:
    library = ctypes.CDLL(_sqlite3.__file__)  # whichever SQLite Python itself uses
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    pointer = library.sqlite3_vfs_find(None)
    vfs = pointer.contents
    assert vfs.version >= 3, "this SQLite has no seam for its system calls"
    for name, prototype in _SYSTEM_CALLS.items():
        address = vfs.get_call(ctypes.addressof(vfs), name)
        if address:
            call = prototype(_counted(power, prototype(address), is_open=name == b"open"))
            assert vfs.set_call(ctypes.addressof(vfs), name, ctypes.cast(call, ctypes.c_void_p)) == 0
            _kept.append(call)
    _watch_commits(power)


def _counted(power: Power, real: Callable[..., int], is_open: bool) -> Callable[..., int]:
    """The file system itself answers a call that comes too late: with an I/O error."""

    def call(*args: int) -> int:
        if not is_open or args[1] & os.O_CREAT:
            power.of_sqlite += power.on
            power.draw()
        return real(*args)

    return call


def _watch_commits(power: Power) -> None:
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            power.require()
            return super().execute(sql, *parameters)

        def commit(self) -> None:
            power.require()
            super().commit()
            power.committed()

    setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Connection, **k))  # noqa: B010 - as above
