"""File systems that lose power: ext4 and xfs on images in memory, in a mount namespace that dies with its process.

    disk = Disk(image, folder, "xfs")
    disk.mount()
    copy_image(disk.image, disk.kept)   # what the disk would hold, were the power to go now
    disk.image = disk.kept
    in_namespace(lambda: disk.mount() or work(), limit=60)   # the journal is replayed

Everything is done by system calls, not by mount(8): a point costs milliseconds. Needs root, loop devices and mkfs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pickle
import select
import shutil
import signal
import stat
import struct
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import pytest

FileSystem = Literal["ext4", "xfs"]
FILE_SYSTEMS: tuple[FileSystem, ...] = ("ext4", "xfs")
MEMORY = Path("/dev/shm")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# linux/mount.h, linux/sched.h
_CLONE_NEWNS = 0x00020000
_MS_NOATIME, _MS_REC, _MS_PRIVATE = 1 << 10, 1 << 14, 1 << 18
_MNT_DETACH = 2
# linux/loop.h
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_MAJOR = 0x4C82, 0x4C0A, 7
_LO_FLAGS_AUTOCLEAR = 4  # the device is free again once nothing is mounted from it and nobody has it open
_LOOP_CONFIG = struct.Struct("=II 40x 12x I 176x 64x")  # fd, block size, lo_flags; all else is zero

_MKFS: dict[FileSystem, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}
_BYTES: dict[FileSystem, int] = {"ext4": 48 << 20, "xfs": 304 << 20}  # mkfs.xfs makes nothing below 300 MB
_OPTIONS: dict[FileSystem, bytes] = {"ext4": b"", "xfs": b"nouuid"}  # copies of one image are mounted side by side

_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def need(*commands: str) -> None:
    """Root, loop devices and these commands, or the test cannot run: in CI it then fails, elsewhere it is skipped."""
    lacking = [command for command in commands if shutil.which(command, path=_PATH) is None]
    if os.geteuid():
        lacking.append("root")
    if not Path("/dev/loop-control").exists():
        lacking.append("loop devices")
    lack(lacking)


def lack(capabilities: list[str]) -> None:
    """What a test needs is missing: in CI that is a failure, elsewhere a skip with the reason."""
    if capabilities and os.environ.get("CI"):
        pytest.fail(f"CI must have: {', '.join(capabilities)}")
    if capabilities:
        pytest.skip(f"needs {', '.join(capabilities)}")


def _called(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def make_image(path: Path, kind: FileSystem) -> None:
    """A new file system in a sparse file."""
    made = path.with_suffix(".made")
    with made.open("wb") as image:
        image.truncate(_BYTES[kind])
    subprocess.run([*_MKFS[kind], str(made)], check=True, env={"PATH": _PATH})
    with made.open("rb") as image, path.open("wb") as sparse:  # mkfs.xfs writes a log of 64 MB of zeros
        while block := image.read(1 << 16):
            if block.count(0) < len(block):
                sparse.seek(image.tell() - len(block))
                sparse.write(block)
        sparse.truncate(_BYTES[kind])
    made.unlink()


def copy_image(source: Path, target: Path) -> list[tuple[int, int]]:
    """Copy what is not a hole: a few megabytes, whatever the size. Anew, if something was written meanwhile.

    Where there is what, for one image to be compared with another in this process.
    """
    with source.open("rb") as original:
        while True:
            before: list[tuple[int, int]] = []
            target.unlink(missing_ok=True)  # not written over: a mount that ends may still write to its own
            with target.open("wb") as copy:
                os.ftruncate(copy.fileno(), os.fstat(original.fileno()).st_size)
                for at, block in _blocks(original.fileno()):
                    os.pwrite(copy.fileno(), block, at)
                    before.append((at, hash(block)))
            if before == [(at, hash(block)) for at, block in _blocks(original.fileno())]:
                return before


def _blocks(image: int) -> Iterator[tuple[int, bytes]]:
    """What is not a hole, and where."""
    start = end = 0
    while True:
        try:
            start = os.lseek(image, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(image, start, os.SEEK_HOLE)
        yield start, os.pread(image, end - start, start)


def _attach(image: Path) -> tuple[Path, int]:
    """A free loop device over this image, and the descriptor that keeps it until it is mounted."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(100):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = Path(f"/dev/loop{number}")
            with contextlib.suppress(FileExistsError):
                os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, 0, _LO_FLAGS_AUTOCLEAR))
                return path, device
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another process was quicker
                    raise
        raise OSError(errno.EBUSY, "no loop device stays free")
    finally:
        os.close(backing)
        os.close(control)


class Disk:
    """One file system on an image."""

    def __init__(self, image: Path, folder: Path, kind: FileSystem) -> None:
        self.image, self.folder, self.kind = image, folder, kind

    def mount(self) -> None:
        """Mount; what the journal holds is replayed first."""
        path, device = _attach(self.image)
        try:
            arguments = (bytes(path), bytes(self.folder), self.kind.encode(), ctypes.c_ulong(_MS_NOATIME))
            _called(_libc.mount(*arguments, _OPTIONS[self.kind]))
        finally:
            os.close(device)

    @property
    def kept(self) -> Path:
        """Where a copy of its image may be."""
        return self.image.with_name(f"{self.image.name}.kept")

    def unmount(self) -> None:
        """At once, for whoever looks; in truth once nobody has a file open."""
        _called(_libc.umount2(bytes(self.folder), _MNT_DETACH))


def leave_namespace() -> None:
    """From here on this process has mounts of its own; they vanish with it, and nobody else sees or copies them."""
    _called(_libc.unshare(_CLONE_NEWNS))
    _called(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def in_namespace(work: Callable[[], T], limit: float) -> T:
    """Do this in a forked process with mounts of its own; its answer (pickled).

    An exception there is an AssertionError here, with its traceback. After `limit` seconds the process is killed.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _answer(work, writer)
    os.close(writer)
    try:
        content = _read_all(reader, time.monotonic() + limit)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert content is not None, f"no answer within {limit} s"
    assert content, "the process ended without an answer"
    said: tuple[T, str] = pickle.loads(content)
    answer, trouble = said
    assert not trouble, trouble
    return answer


def _answer(work: Callable[[], object], writer: int) -> None:
    """In the child: never returns, so that nothing of the test's own process is cleaned up twice."""
    try:
        leave_namespace()
        content = pickle.dumps((work(), ""))
    except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
        content = pickle.dumps((None, traceback.format_exc()))
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(content)
    os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes | None:
    """All that the child says until it closes the pipe; None when it takes too long."""
    content = bytearray()
    while True:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        block = os.read(reader, 1 << 16)
        if not block:
            return bytes(content)
        content += block
