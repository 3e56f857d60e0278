"""One file on its way from the site: whole, regular, unchanged, hashed while it is written; or why not."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from typing import Final

from syncd.errors import FailureClass, ItemError, SiteError, SyncdError, TransientError
from syncd.model import Pulled, PullJob, Seen
from syncd.sftp import (
    ATTRS,
    DATA,
    EOF,
    NO_SUCH_FILE,
    STATUS,
    U32,
    Packet,
    number_at,
    seen_in,
    string,
)

HEAD, TAIL = 512, 64  # bytes kept for whoever judges what a file is
LARGE: Final = 16 * 1024 * 1024  # bytes
CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
SYNC_FILE_RANGE_WRITE: Final = 2
_SYNC_FILE_RANGE: Final = getattr(ctypes.CDLL(None), "sync_file_range", None)  # not every libc has it
if _SYNC_FILE_RANGE:
    _SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
DISK_REASONS: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "archive_full"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "archive_read_only"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "archive_missing"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM), "resources_exhausted"),
}


class Transfer:
    """One file on its way; `outcome` ends it: Pulled, or why not."""

    def __init__(self, job: PullJob) -> None:
        self.job, self.path = job, string(job.remote)
        self.seen, self.handle = Seen(0, 0, regular=False), b""  # the handle still with its length before it
        self.outcome: Pulled | SyncdError | None = None
        self.waits_for = 0  # replies
        self.refused_once = False
        self._local: FileIO | None = None
        self._asked = self._written = 0
        self._overtaking = dict[int, bytes]()  # by offset
        self._digest, self._head, self._tail = hashlib.sha256(), b"", b""

    @property
    def large(self) -> bool:
        """Whether small files are to pass it."""
        return self.seen.size > LARGE

    @property
    def told(self) -> Pulled | SyncdError:
        """What became of it; without an outcome it was under way when the connection was lost."""
        return self.outcome or TransientError("drop_unreachable")

    def refuse(self, failure: FailureClass) -> None:
        """End the transfer, unless it has ended."""
        self.outcome = self.outcome or ItemError(failure)

    def looked(self, reply: Packet) -> None:
        """Judge the first LSTAT. A pipe must not even be opened: that would block OpenSSH's server for ever."""
        self.seen = seen_in(reply) or self.seen
        if reply[0] != ATTRS:
            self.refuse("missing_on_drop" if number_at(reply[1]) == NO_SUCH_FILE else "unreadable_on_drop")
        elif not self.seen.regular:
            self.refuse("not_a_file")
        elif not 0 < self.seen.size <= self.job.cap:
            self.refuse("too_large" if self.seen.size else "zero_bytes")

    @property
    def all_asked(self) -> bool:
        """Whether no more READs are to be sent."""
        return bool(self.outcome) or self._asked > self.seen.size

    def readings(self, most: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each READ to come, of `most` bytes, the last one a byte past the end.

        A refused file is left at once.
        """
        while not self.all_asked:
            offset, length = self._asked, min(most, self.seen.size - self._asked) or 1
            self._asked += length
            yield offset, length

    def came(self, offset: int, length: int, reply: Packet) -> int:
        """Take what a READ answered; the number of bytes to ask for again, after a short answer."""
        (kind, body), at_end = reply, offset == self.seen.size
        says_end = kind == STATUS and number_at(body) == EOF
        if self.outcome:
            return 0
        if at_end or says_end:
            if not (at_end and says_end):
                self.refuse("changed_while_read")
            return 0
        content = body[U32.size :]
        if kind != DATA or not 0 < len(content) <= length:
            self.refuse("io_error")
            return 0
        if offset == self._written:
            self._write(content)
            while early := self._overtaking.pop(self._written, None):
                self._write(memoryview(early))
        else:
            self._overtaking[offset] = bytes(content)
        return length - len(content)

    def _write(self, content: memoryview) -> None:
        try:
            self._local = self._local or os.fdopen(os.open(self.job.local, CREATE, 0o400), "wb", buffering=0)
            left = content
            while left:
                left = left[self._local.write(left) :]
        except OSError as error:
            raise of_the_disk(error) from error
        self._digest.update(content)
        self._written += len(content)
        if len(self._head) < HEAD:
            self._head += content[: HEAD - len(self._head)]
        self._tail = bytes(content[-TAIL:]) if len(content) >= TAIL else (self._tail + bytes(content))[-TAIL:]

    def confirm(self, reply: Packet) -> None:
        """Judge the last LSTAT."""
        if seen_in(reply) != self.seen:
            self.refuse("changed_while_read")

    def confirmed(self) -> None:
        """All replies came: what was not refused is Pulled."""
        if not self.outcome and self._local:
            if not self.large:  # of a large one the disk has most by now; a small one's sync then waits less
                _start_writing_out(self._local.fileno())
            try:
                self._local.close()
            except OSError as error:
                raise of_the_disk(error) from error
            self.outcome = Pulled(self.seen.size, self._digest.hexdigest(), self.seen.mtime, self._head, self._tail)

    def discard(self) -> None:
        """Leave no local file behind, except one that was there before."""
        if self._local:
            with suppress(OSError):
                self._local.close()
            with suppress(OSError):
                self.job.local.unlink()


def _start_writing_out(descriptor: int) -> None:
    """Have the disk begin (sync_file_range(2)), and not wait for its end. A sync follows, and tells what went wrong.

    Not posix_fadvise(2): that one waits until all processors have looked for the file's pages.
    """
    if _SYNC_FILE_RANGE:
        _SYNC_FILE_RANGE(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)


def of_the_disk(error: OSError) -> SiteError:
    """An error of the local disk as one of ours."""
    return SiteError(DISK_REASONS.get(error.errno or 0, "disk_error"), os.strerror(error.errno or 0))
