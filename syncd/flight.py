"""Files in flight: many files read at once over one SFTP session, so that a small one costs hardly a round trip.

Ours, because paramiko's own client accepts truncated files and pays several round trips for each.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from syncd.errors import ItemError
from syncd.sftp import (
    CLOSE,
    DENIED,
    HANDLE,
    LOST,
    LSTAT,
    NO_SUCH_FILE,
    OPEN,
    READ,
    READING,
    U64,
    Packet,
    Session,
    number_at,
)
from syncd.transfer import Transfer

MIB: Final = 1024 * 1024
HANDLES: Final = 64  # open files; fewer where the site refuses
LARGE_HANDLES: Final = 8  # of them, for large files: small ones pass
TURN: Final = MIB  # bytes asked of one file before it is the next one's turn
AHEAD: Final = 256  # files looked at, read, or waiting for whoever takes them
LEAST_UNDER_WAY, FIRST_UNDER_WAY, MOST_UNDER_WAY = MIB // 4, 4 * MIB, 16 * MIB  # bytes
NEAR, FAR = 0.05, 1.0  # seconds that a reading may take longer than the fastest: below, more at once; above, less
T = TypeVar("T")
Errand = Callable[["Session | None"], None]


class Pulling:
    """Many files on their way over one session, in a thread of its own: whoever takes what has ended may be slow.

    What is under way (bytes, open files) follows what the site shows of itself. Small files do not wait for large ones.
    `singly`: one after another, so that one that breaks the connection is the first that did not end.
    """

    def __init__(self, session: Session, transfers: Iterable[Transfer], singly: bool = False) -> None:
        self._session = session
        self._ended, self._errands = SimpleQueue[Transfer | BaseException | None](), SimpleQueue[Errand]()
        self._new, self._small, self._large, self._reading = (deque[Transfer]() for _ in range(4))
        self._looked_at = self._open = self._large_open = self._under_way = 0
        self._handles, self._ahead = (1, 1) if singly else (HANDLES, AHEAD)
        self._allowed = FIRST_UNDER_WAY
        self._fastest, self._slowed_at = float("inf"), 0.0
        self._stopped = self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.add(transfers)

    def post(self, work: Callable[[Session], T]) -> Future[T]:
        """Have something done in the thread, between two steps. An ItemError of it does no harm to the others."""
        future = Future[T]()

        def errand(session: Session | None) -> None:
            try:
                if session is None:
                    raise EOFError  # noqa: TRY301  told to whoever waits
                future.set_result(work(session))
            except BaseException as error:
                future.set_exception(error)
                if session and not isinstance(error, ItemError):
                    raise

        self._errands.put(errand)
        if self._over:
            self._leave()
        return future

    def add(self, transfers: Iterable[Transfer]) -> None:
        """Take more files along; also said when some that ended were taken, for then there is room again."""
        self.post(lambda _: self._new.extend(transfers))

    def some(self, seconds: float) -> list[Transfer] | None:
        """Transfers that ended, all that there are; after so many seconds perhaps none. None: the connection is lost.

        Raises what else ended the thread.
        """
        found: list[Transfer] = []
        with suppress(Empty):
            while True:
                each = self._ended.get_nowait() if found else self._ended.get(timeout=seconds)
                if isinstance(each, Transfer):
                    found.append(each)
                elif found:
                    self._ended.put(each)  # next time: it is the last one
                    break
                elif each is None:
                    return None
                else:
                    raise each
        return found

    def stop(self) -> None:
        """Wait for the thread; it ends as soon as no reply is to come, or the transport is closed."""
        self.post(lambda _: setattr(self, "_stopped", True))
        self._thread.join()

    # --- in the thread

    def _run(self) -> None:
        self._session.before_step = self._refill
        try:
            while not (self._stopped and not self._session.busy):
                with suppress(Empty):
                    while True:
                        self._refill()
                        self._errands.get(block=not self._session.busy and not self._stopped)(self._session)
                if self._session.busy:
                    self._session.step()
        except LOST:
            self._ended.put(None)
        except BaseException as error:  # noqa: BLE001  whoever takes the transfers gets it
            self._ended.put(error)
        self._session.before_step = lambda: None
        self._over = True
        self._leave()

    def _leave(self) -> None:
        with suppress(Empty):
            while True:
                self._errands.get_nowait()(None)

    def _refill(self) -> None:
        """Send on, as far as the bounds allow."""
        send = self._session.send
        while self._new and self._looked_at + self._ended.qsize() < self._ahead:
            transfer = self._new.popleft()
            self._looked_at += 1
            send(LSTAT, transfer.path, partial(self._looked, transfer))
        while self._open < self._handles and (ready := self._next()):
            self._open += 1
            self._large_open += ready.large
            send(OPEN, ready.path + U64.pack(1 << 32), partial(self._opened, ready))  # for reading, no attributes
        while self._reading and self._under_way < self._allowed:
            transfer = self._reading[0]
            for offset, length in islice(transfer.readings(self._session.read_size), TURN // self._session.read_size):
                self._read(transfer, offset, length)
            self._reading.rotate(-1)
            if transfer.all_asked:
                self._reading.pop()

    def _next(self) -> Transfer | None:
        """The next one to open: the first small one, but one large one has its turn, too."""
        if self._large and self._large_open < (1 if self._small else LARGE_HANDLES):
            return self._large.popleft()
        return self._small.popleft() if self._small else None

    def _looked(self, transfer: Transfer, reply: Packet) -> None:
        transfer.looked(reply)
        if transfer.outcome:
            self._end(transfer)
        else:
            (self._large if transfer.large else self._small).append(transfer)

    def _opened(self, transfer: Transfer, reply: Packet) -> None:
        kind, body = reply
        if kind == HANDLE:
            transfer.handle = bytes(body)
            self._reading.append(transfer)
            return
        self._open -= 1
        self._large_open -= transfer.large
        code = number_at(body)
        if self._open and code not in (NO_SUCH_FILE, DENIED) and not transfer.refused_once:
            self._handles, transfer.refused_once = self._open, True  # perhaps the site has no more handles for us
            (self._large if transfer.large else self._small).append(transfer)
        else:
            transfer.refuse("missing_on_drop" if code == NO_SUCH_FILE else "unreadable_on_drop")
            self._end(transfer)

    def _read(self, transfer: Transfer, offset: int, length: int) -> None:
        transfer.waits_for += 1
        self._under_way += length
        asked = READING.pack(offset, length)
        then = partial(self._came, transfer, offset, length, time.monotonic())
        self._session.send(READ, transfer.handle + asked, then)

    def _came(self, transfer: Transfer, offset: int, length: int, asked_at: float, reply: Packet) -> None:
        transfer.waits_for -= 1
        self._under_way -= length
        self._learn(asked_at, length)
        if missing := transfer.came(offset, length, reply):
            self._read(transfer, offset + length - missing, missing)
        if not transfer.waits_for and transfer.all_asked:
            transfer.waits_for = 1
            if not transfer.outcome:
                transfer.waits_for = 2
                self._session.send(LSTAT, transfer.path, partial(self._closing, transfer, transfer.confirm))
            self._session.send(CLOSE, transfer.handle, partial(self._closing, transfer, lambda _: None))

    def _learn(self, asked_at: float, length: int) -> None:
        """More at once while readings do not queue, less where they do: a slow line is not filled for minutes."""
        took = time.monotonic() - asked_at
        self._fastest = min(self._fastest, took)
        if took < self._fastest + NEAR:
            self._allowed = min(MOST_UNDER_WAY, self._allowed + length)
        elif took > self._fastest + FAR and asked_at > self._slowed_at:
            self._allowed, self._slowed_at = max(LEAST_UNDER_WAY, self._allowed // 2), time.monotonic()

    def _closing(self, transfer: Transfer, then: Callable[[Packet], None], reply: Packet) -> None:
        then(reply)
        transfer.waits_for -= 1
        if not transfer.waits_for:
            self._open -= 1
            self._large_open -= transfer.large
            transfer.confirmed()
            self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        self._looked_at -= 1
        self._ended.put(transfer)
