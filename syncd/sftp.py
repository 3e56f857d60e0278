"""SFTP version 3 (draft-ietf-secsh-filexfer-02) over one channel: many requests under way, replies in any order.

Ours, because paramiko's own client decodes names, logs paths, and waits for ever in places.
"""

from __future__ import annotations

import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from struct import Struct
from struct import error as StructError  # noqa: N812  it is a class
from typing import Final

import paramiko
from paramiko.buffered_pipe import BufferedPipe, PipeTimeout

from syncd.model import Seen

INIT, OPEN, CLOSE, READ, WRITE, LSTAT, OPENDIR, READDIR, REMOVE, RMDIR = 1, 3, 4, 5, 6, 7, 11, 12, 13, 15
VERSION, STATUS, HANDLE, DATA, NAME, ATTRS = 2, 101, 102, 103, 104, 105
EXTENDED, EXTENDED_REPLY, LIMITS = 200, 201, b"limits@openssh.com"  # OpenSSH's PROTOCOL, 4.8
OK, EOF, NO_SUCH_FILE, DENIED = 0, 1, 2, 3
U32, U64, PACKET, READING = Struct(">I"), Struct(">Q"), Struct(">IBI"), Struct(">QI")
READ_SIZE: Final = 32 * 1024  # bytes; every server answers so much in one piece, many no more
MOST_READ: Final = 256 * 1024  # bytes, of a server that says that it answers more
LARGEST_PACKET: Final = 4 * 1024 * 1024  # bytes
INBOX: Final = 1024 * 1024  # bytes taken in at once
REQUESTS: Final = 64  # under way for one question of many parts; as many as OpenSSH's own client
LOST: Final = (paramiko.SSHException, EOFError, OSError, StructError)  # the connection or the protocol, in all shapes
Packet = tuple[int, memoryview]  # its type, and all behind its number


def _nothing() -> None:
    pass


class Watch:
    """What a watchdog looks at: from `due` (time.monotonic) on, a wait has lasted too long."""

    due = float("inf")


class Pieces(BufferedPipe):  # type: ignore[type-arg]  # generic in the stubs only
    """What came on a channel and was not taken in yet, instead of paramiko's buffer (`Channel.in_buffer`).

    That one moves each byte several times, which is a quarter of all that a large file costs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pieces, self._closed, self._news = deque[bytes](), False, threading.Condition()

    def feed(self, data: bytes) -> None:
        """Add what came."""
        if data:  # nothing would be taken for the end
            with self._news:
                self._pieces.append(data)
                self._news.notify_all()

    def read(self, nbytes: int, timeout: float | None = None) -> bytes:
        """Whole pieces, of so many bytes together, or one; b"" at the end. Raises PipeTimeout after so many seconds."""
        with self._news:
            if not self._news.wait_for(self._told, timeout):
                raise PipeTimeout
            taken, size = list[bytes](), 0
            while self._pieces and (not taken or size + len(self._pieces[0]) <= nbytes):
                taken.append(self._pieces.popleft())
                size += len(taken[-1])
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _told(self) -> bool:
        return bool(self._pieces) or self._closed

    def read_ready(self) -> bool:
        """Whether there is something to read."""
        return bool(self._pieces)

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def close(self) -> None:
        """Nothing more will come."""
        with self._news:
            self._closed = True
            self._news.notify_all()


class Session:
    """SFTP on one channel, for one thread. Raises SSHException, EOFError, OSError or struct.error, then it is over.

    `timeout`: seconds of waiting for the next reply, however slowly it drips.
    """

    def __init__(self, channel: paramiko.Channel, timeout: float, watch: Watch) -> None:
        self._channel, self._timeout, self._patience, self._watch = channel, timeout, timeout, watch
        self.received = 0  # bytes
        self.before_step = _nothing  # may send more
        self._waiting: dict[int, Callable[[Packet], object]] = {}
        self._inbox, self._outbox, self._number = b"", bytearray(PACKET.pack(5, INIT, 3)), 3
        said: list[Packet] = []
        self._waiting[3] = said.append  # the version stands where other replies have their number
        while not said:
            self.step()
        if said[0][0] != VERSION:
            raise paramiko.SSHException("not an SFTP server")
        self.read_size = self._read_size() if string(LIMITS) in bytes(said[0][1]) else READ_SIZE

    def _read_size(self) -> int:
        """How many bytes the server says that it answers in one piece; never so few that they cost memory."""
        kind, body = self.ask(EXTENDED, string(LIMITS))
        told = U64.unpack_from(body, U64.size)[0] if kind == EXTENDED_REPLY else 0  # after the longest packet
        return max(READ_SIZE, min(told, MOST_READ))

    @property
    def busy(self) -> bool:
        """Whether a reply is still to come."""
        return bool(self._waiting)

    def send(self, kind: int, body: bytes, then: Callable[[Packet], object]) -> None:
        """Queue a request for the next step. `then` gets the reply; it may send, not step; its bytes are lent."""
        self._number = self._number % 0xFFFFFFFF + 1
        self._waiting[self._number] = then
        self._outbox += PACKET.pack(5 + len(body), kind, self._number) + body

    def ask(self, kind: int, body: bytes) -> Packet:
        """One request, one reply."""
        return next(self.answers([(kind, body)]))

    def answers(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[Packet]:
        """One reply a request, in the requests' order, REQUESTS of them under way; requests are drawn when needed."""
        source, waiting = iter(requests), deque[list[Packet]]()
        while True:
            for kind, body in islice(source, REQUESTS - len(waiting)):
                said = list[Packet]()
                waiting.append(said)
                self.send(kind, body, said.append)
            if not waiting:
                return
            while not waiting[0]:
                self.step()
            yield waiting.popleft()[0]

    def step(self) -> None:
        """Send what is queued, in one piece; take in what has come, waiting for the first byte of it."""
        self.before_step()
        if self._outbox:
            outbox, self._outbox = bytes(self._outbox), bytearray()
            self._channel.settimeout(self._timeout)
            self._watch.due = time.monotonic() + self._timeout  # paramiko waits without limit in places
            self._channel.sendall(outbox)
            self._watch.due = Watch.due
        began = time.monotonic()
        self._channel.settimeout(max(0.001, self._patience))
        if not (content := self._channel.recv(INBOX)):
            raise EOFError
        self._patience -= time.monotonic() - began  # the time that we work ourselves does not count
        self.received += len(content)
        if self._take_in(memoryview(self._inbox + content if self._inbox else content)):
            self._patience = self._timeout

    def _take_in(self, inbox: memoryview) -> int:
        """Give every whole packet to whom it is for; how many bytes that were."""
        at = 0
        while len(inbox) - at >= PACKET.size:
            size, kind, number = PACKET.unpack_from(inbox, at)
            if not PACKET.size - U32.size <= size <= LARGEST_PACKET:
                raise paramiko.SSHException("not an SFTP packet")
            if len(inbox) - at < U32.size + size:
                break
            then = self._waiting.pop(number, None)
            if then is None:
                raise paramiko.SSHException("a reply to nothing")
            then((kind, inbox[at + PACKET.size : at + U32.size + size]))
            at += U32.size + size
        self._inbox = bytes(inbox[at:])
        return at


def string(value: bytes) -> bytes:
    """Bytes as packets carry them."""
    return U32.pack(len(value)) + value


def number_at(body: memoryview, at: int = 0) -> int:
    """A number in a packet; the first one of a STATUS is its code."""
    return int(U32.unpack_from(body, at)[0])


def seen_in(reply: Packet) -> Seen | None:
    """What an LSTAT answered; None: no such file. Any other refusal is something that is no regular file."""
    kind, body = reply
    if kind == ATTRS:
        return _attributes(body, 0)[0]
    return None if number_at(body) == NO_SUCH_FILE else Seen(0, 0, regular=False)


def _attributes(body: memoryview, at: int) -> tuple[Seen, int]:
    """Attributes from `at`, and where they end. Where a site tells no file type, everything counts as a file."""
    flags, at = number_at(body, at), at + 4
    size = U64.unpack_from(body, at)[0] if flags & 1 else 0
    at += 8 * (flags & 1) + 8 * (flags >> 1 & 1)  # size; owner
    mode = number_at(body, at) if flags & 4 else 0
    at += flags & 4
    mtime = number_at(body, at + 4) if flags & 8 else 0
    at += flags & 8
    for _ in range(2 * number_at(body, at) if flags >> 31 else 0):
        at += 4 + number_at(body, at + 4)  # each of the pairs' strings, seen from the number before it
    return Seen(size, mtime, stat.S_IFMT(mode) in (0, stat.S_IFREG), mode), at + 4 * (flags >> 31)


def names_in(body: memoryview) -> Iterator[bytes]:
    """The names of a NAME reply, each followed by a line for people and by its attributes."""
    at = 4
    for _ in range(number_at(body)):
        end = at + 4 + number_at(body, at)
        yield bytes(body[at + 4 : end])
        at = _attributes(body, end + 4 + number_at(body, end))[1]
