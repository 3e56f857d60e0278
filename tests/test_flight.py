"""Many files in flight, over sites that answer late, in pieces, in any order, falsely, or not at all.

The site speaks SFTP over a plain socket: what SSH adds is tested with OpenSSH in test_drop.py and test_drop_line.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paramiko.buffered_pipe import PipeTimeout

from syncd.drop import SftpDrop
from syncd.errors import ItemError, SyncdError, TransientError
from syncd.model import Pulled, PullJob
from syncd.sftp import CLOSE, EXTENDED, LIMITS, LSTAT, OPEN, READ, Pieces, Session, Watch

KIB, MIB = 1024, 1024 * 1024
REMOVE = 13
KEY = paramiko.ECDSAKey.generate()


@dataclass
class Site:
    """An SFTP server on one socket. `most`: bytes in one DATA; `handles`: open at most; `meddle` sees each reply.

    `limits`: how many bytes it says that it answers in one DATA; None: it does not say.
    """

    files: dict[bytes, bytes]
    most: int = 1 << 20
    handles: int = 1000
    shuffled: random.Random | None = None
    piece: int = 0  # bytes sent at once; 0: all
    meddle: Callable[[int, bytes], bytes | None] = lambda kind, reply: reply
    asked: list[tuple[int, bytes]] = field(default_factory=list)
    most_open: int = 0
    limits: int | None = None

    def serve(self, wire: socket.socket) -> None:
        self._open: dict[bytes, bytes] = {}
        with contextlib.suppress(OSError, struct.error, KeyError), wire:
            inbox = b""
            while content := wire.recv(MIB):
                inbox, replies = inbox + content, []
                while len(inbox) >= 9 and len(inbox) >= 4 + (size := struct.unpack_from(">I", inbox)[0]):
                    reply = self._answer(inbox[4], inbox[5:9], inbox[9 : 4 + size])
                    said = self.meddle(inbox[4], struct.pack(">I", len(reply)) + reply)
                    inbox = inbox[4 + size :]
                    replies += [said] if said is not None else []
                    if not self.shuffled:
                        self._send(wire, replies)
                if self.shuffled:
                    self.shuffled.shuffle(replies)
                    self._send(wire, replies)

    def _send(self, wire: socket.socket, replies: list[bytes]) -> None:
        said = b"".join(replies)
        replies.clear()
        step = self.piece or max(1, len(said))
        for at in range(0, len(said), step):
            wire.sendall(said[at : at + step])

    def _answer(self, kind: int, number: bytes, body: bytes) -> bytes:  # noqa: PLR0911  one a request
        def status(code: int) -> bytes:
            return bytes([101]) + number + struct.pack(">III", code, 0, 0)

        if kind == 1:
            offers = struct.pack(">I", len(LIMITS)) + LIMITS + struct.pack(">I", 1) + b"1"
            return bytes([2]) + b"\0\0\0\3" + (b"" if self.limits is None else offers)
        name = body[4 : 4 + struct.unpack_from(">I", body)[0]]
        self.asked.append((kind, name))
        if kind == EXTENDED:
            return bytes([201]) + number + struct.pack(">QQQQ", MIB, self.limits or 0, 0, 0)
        if kind == LSTAT:
            if name not in self.files:
                return status(2)
            return bytes([105]) + number + struct.pack(">IQIII", 13, len(self.files[name]), 0o100600, 7, 7)
        if kind == OPEN:
            if len(self._open) >= self.handles:
                return status(4)
            self._open[name] = self.files[name]
            self.most_open = max(self.most_open, len(self._open))
            return bytes([102]) + number + struct.pack(">I", len(name)) + name
        if kind == READ:
            offset, length = struct.unpack_from(">QI", body, 4 + len(name))
            content = self._open[name][offset : offset + min(length, self.most)]
            return bytes([103]) + number + struct.pack(">I", len(content)) + content if content else status(1)
        if kind == CLOSE:
            del self._open[name]
        if kind == REMOVE:
            del self.files[name]
        return status(0)


class WireDrop(SftpDrop):
    """The door, at a site without SSH. Each connection takes the next of `sites`, the last one for ever."""

    def __init__(self, *sites: Site, timeout: float = 20.0) -> None:
        key = f"{KEY.get_name()} {KEY.get_base64()}"
        super().__init__("127.0.0.1", 1, "x", "x", None, key, None, timeout)
        self.sites, self.logins = list(sites), 0

    def _connected(self) -> Session:
        near, far = socket.socketpair()
        site = self.sites.pop(0) if len(self.sites) > 1 else self.sites[0]
        self.logins += 1
        threading.Thread(target=site.serve, args=(far,), daemon=True).start()

        def close() -> None:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
            near.close()

        self._connection = SimpleNamespace(transport=SimpleNamespace(is_active=lambda: True), close=close)  # type: ignore[assignment]  # as much of one as is used
        channel: Any = near
        return Session(channel, self._timeout, Watch())


def jobs(folder: Path, names: Sequence[bytes]) -> list[PullJob]:
    return [PullJob(name, folder / name.decode(), 1 << 40) for name in names]


def wrong(folder: Path, files: dict[bytes, bytes], outcomes: Sequence[Pulled | SyncdError]) -> list[bytes]:
    """Names of files that are not, in outcome and on disk, what the site has."""
    return [
        name
        for (name, content), outcome in zip(files.items(), outcomes, strict=True)
        if not isinstance(outcome, Pulled)
        or outcome.sha256 != sha256(content).hexdigest()
        or (outcome.size, outcome.head, outcome.tail) != (len(content), content[:512], content[-64:])
        or (folder / name.decode()).read_bytes() != content
    ]


SIZES = st.lists(st.sampled_from([1, 63, 64, 511, 512, 513, 32767, 32768, 32769, 65536, 100_000]), max_size=30)


@settings(max_examples=25)
@given(
    SIZES,
    st.integers(0, 99),
    st.sampled_from([900, 10_000, MIB]),
    st.sampled_from([0, 1000]),
    st.integers(1, 9),
    st.sampled_from([None, 0, 1000, 65_536, 261_120, 1 << 63]),
)
def test_every_file_is_whole_in_whatever_order_and_pieces_the_answers_come(
    sizes: list[int], seed: int, most: int, piece: int, handles: int, limits: int | None
) -> None:
    files = {b"%d" % number: random.Random(number).randbytes(size) for number, size in enumerate(sizes)}
    site = Site(files, most, handles, random.Random(seed), piece, limits=limits)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(WireDrop(site)) as drop:
        outcomes = drop.pull(jobs(Path(folder), list(files)))
        assert wrong(Path(folder), files, outcomes) == []
    assert site.most_open <= handles


def test_more_files_than_the_site_opens_at_once_cost_no_outcome(tmp_path: Path) -> None:
    files = {b"%d" % number: os.urandom(50_000) for number in range(100)}
    site = Site(files, handles=3)
    with contextlib.closing(WireDrop(site)) as drop:
        assert wrong(tmp_path, files, drop.pull(jobs(tmp_path, list(files)))) == []
        assert drop.logins == 1


def test_small_files_pass_large_ones(tmp_path: Path) -> None:
    large, small = {b"large-%d" % n: b"x" * (17 * MIB) for n in range(10)}, {b"%d" % n: b"y" * 9000 for n in range(50)}
    ended: list[bytes] = []

    def finished(some: Sequence[tuple[PullJob, Pulled | SyncdError]]) -> list[PullJob]:
        ended.extend(job.remote for job, _ in some)
        return []

    with contextlib.closing(WireDrop(Site(large | small))) as drop:
        outcomes = drop.pull(jobs(tmp_path, [*large, *small]), finished)
    assert all(isinstance(outcome, Pulled) for outcome in outcomes)
    assert set(ended[: len(small)]) == set(small)


def test_who_takes_the_files_may_remove_them_and_ask_for_more_while_others_come(tmp_path: Path) -> None:
    files = {b"%d" % number: os.urandom(200_000) for number in range(40)}
    site, given_out = Site(dict(files)), iter(list(files)[10:])

    def finished(some: Sequence[tuple[PullJob, Pulled | SyncdError]]) -> list[PullJob]:
        assert all(drop.remove([job.remote for job, _ in some]))
        return jobs(tmp_path, [name for _ in some if (name := next(given_out, b""))])

    with contextlib.closing(WireDrop(site)) as drop:
        assert wrong(tmp_path, files, drop.pull(jobs(tmp_path, list(files)[:10]), finished)) == []
        assert drop.logins == 1
    assert site.files == {}


def test_what_the_taker_raises_ends_the_pull_and_leaves_only_what_was_handed_over(tmp_path: Path) -> None:
    files = {b"%d" % number: os.urandom(100_000) for number in range(300)}
    handed: list[Path] = []

    def finished(some: Sequence[tuple[PullJob, Pulled | SyncdError]]) -> list[PullJob]:
        handed.extend(job.local for job, _ in some)
        raise ZeroDivisionError

    with contextlib.closing(WireDrop(Site(files))) as drop:
        with pytest.raises(ZeroDivisionError):
            drop.pull(jobs(tmp_path, list(files)), finished)
        assert sorted(tmp_path.iterdir()) == sorted(handed)
        assert drop.look([b"0"]) != [None]


def replaced(kind: int, make: Callable[[bytes], bytes | None], after: int = 0) -> Callable[[int, bytes], bytes | None]:
    """A site that answers requests of one kind falsely, after so many true answers."""
    seen = [0]

    def meddle(asked: int, reply: bytes) -> bytes | None:
        if asked == kind:
            seen[0] += 1
        return make(reply) if asked == kind and seen[0] > after else reply

    return meddle


FALSE: dict[str, Callable[[bytes], bytes | None]] = {
    "a wrong id": lambda reply: reply[:5] + b"\xde\xad\xbe\xef" + reply[9:],
    "the same answer twice": lambda reply: reply + reply,
    "silence": lambda reply: None,
    "half an answer": lambda reply: reply[: len(reply) // 2],
    "a packet of gigabytes": lambda reply: b"\xff\xff\xff\xff" + reply[4:] + b"x" * 1000,
    "a packet without a number": lambda reply: b"\0\0\0\1\2",
    "nothing but noise": lambda reply: bytes(range(256)) * 40,
    "cut off in a field": lambda reply: struct.pack(">I", 6) + reply[4:10],
}


@pytest.mark.parametrize("false", FALSE)
@pytest.mark.parametrize(
    ("kind", "after"), [(LSTAT, 0), (OPEN, 0), (READ, 0), (READ, 3), (LSTAT, 1), (CLOSE, 0)], ids=str
)
def test_false_answer_at_any_step_loses_no_byte_and_no_time(tmp_path: Path, false: str, kind: int, after: int) -> None:
    """Refused or transient, never a false file; the next connection brings it."""
    files = {b"a": os.urandom(100_000)}
    bad = Site(files, meddle=replaced(kind, FALSE[false], after))
    with contextlib.closing(WireDrop(bad, Site(files), timeout=0.5)) as drop:
        began = time.monotonic()
        (outcome,) = drop.pull(jobs(tmp_path, [b"a"]))
        assert time.monotonic() - began < 20
        if isinstance(outcome, Pulled):  # only what came after all was proven may be garbled
            assert kind == CLOSE
        else:
            assert isinstance(outcome, TransientError | ItemError)
            assert list(tmp_path.iterdir()) == []
            outcome = drop.pull(jobs(tmp_path, [b"a"]))[0]
        assert wrong(tmp_path, files, [outcome]) == []


@pytest.mark.parametrize("false", FALSE)
def test_site_that_says_falsely_how_much_it_answers_is_asked_again_in_time(tmp_path: Path, false: str) -> None:
    files = {b"a": os.urandom(100_000)}
    bad = Site(files, limits=1000, meddle=replaced(EXTENDED, FALSE[false]))
    with contextlib.closing(WireDrop(bad, Site(files), timeout=0.5)) as drop:
        began = time.monotonic()
        try:
            outcomes = drop.pull(jobs(tmp_path, [b"a"]))
        except TransientError:
            outcomes = drop.pull(jobs(tmp_path, [b"a"]))
        assert time.monotonic() - began < 10
        assert wrong(tmp_path, files, outcomes) == []


@pytest.mark.parametrize(
    ("limits", "readings"), [(None, 32), (0, 32), (1, 32), (65_536, 16), (261_120, 5), (1 << 63, 4)]
)
def test_site_is_asked_for_as_much_at_once_as_it_says_that_it_answers(
    tmp_path: Path, limits: int | None, readings: int
) -> None:
    files = {b"a": os.urandom(MIB)}
    site = Site(files, limits=limits)
    with contextlib.closing(WireDrop(site)) as drop:
        assert wrong(tmp_path, files, drop.pull(jobs(tmp_path, [b"a"]))) == []
    assert sum(kind == READ for kind, _ in site.asked) == readings + 1  # and one for the end


def test_endless_short_answers_end_at_the_size_that_was_told(tmp_path: Path) -> None:
    files = {b"a": os.urandom(3000)}
    site = Site(files, most=1)
    with contextlib.closing(WireDrop(site)) as drop:
        assert wrong(tmp_path, files, drop.pull(jobs(tmp_path, [b"a"]))) == []
    assert sum(kind == READ for kind, _ in site.asked) == 3000 + 1


def test_file_that_breaks_every_connection_is_known_at_the_second_time(tmp_path: Path) -> None:
    """The first loss takes all that was under way with it; then one after another, so that the culprit shows."""
    files = {b"%d" % number: os.urandom(20_000) for number in range(40)}

    class Poisoned(Site):
        def _answer(self, kind: int, number: bytes, body: bytes) -> bytes:
            if kind == OPEN and body[4:6] == b"23":
                raise OSError
            return super()._answer(kind, number, body)

    with contextlib.closing(WireDrop(Poisoned(files))) as drop:
        drop.pull(jobs(tmp_path / "first", list(files)))
        outcomes = drop.pull(jobs(tmp_path, list(files)))
    lost = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, TransientError)]
    assert lost == list(range(23, 40))


def test_slow_line_is_not_filled_for_minutes(tmp_path: Path) -> None:
    """Where readings queue, less is under way: the next question of another kind would wait behind all of it."""
    under_way: list[int] = []

    class Slow(Site):
        def _answer(self, kind: int, number: bytes, body: bytes) -> bytes:
            if kind == READ:
                time.sleep(0.012)
                under_way.append(drop._pulling._under_way if drop._pulling else 0)
            return super()._answer(kind, number, body)

    files = {b"a": os.urandom(8 * MIB)}
    with contextlib.closing(WireDrop(Slow(files))) as drop:
        assert wrong(tmp_path, files, drop.pull(jobs(tmp_path, [b"a"]))) == []
    assert max(under_way) > 4 * MIB
    assert under_way[len(under_way) * 3 // 4] < 3 * MIB


# --- what came on a channel


def test_pieces_come_out_in_order_whole_and_as_many_as_were_asked_for() -> None:
    pieces = Pieces()
    for content in (b"", b"abc", b"de", b"fghijkl", b"m"):
        pieces.feed(content)
    assert len(pieces) == 13
    assert pieces.read(5, 1.0) == b"abcde"
    assert pieces.read(5, 1.0) == b"fghijkl"  # a server may send more at once than it was allowed to
    assert pieces.read_ready()
    pieces.close()
    assert pieces.read(5, 1.0) == b"m"  # what came before the end is not lost
    assert not pieces.read_ready()
    assert pieces.read(5, 1.0) == b""


def test_nothing_that_comes_is_waited_for_as_long_as_was_said() -> None:
    pieces, began = Pieces(), time.monotonic()
    pieces.feed(b"")  # nothing is not the end
    with pytest.raises(PipeTimeout):
        pieces.read(5, 0.2)
    assert 0.15 < time.monotonic() - began < 5


@pytest.mark.parametrize("end", ["feed", "close"])
def test_whoever_waits_is_woken_by_what_comes_and_by_the_end(end: str) -> None:
    pieces = Pieces()
    timer = threading.Timer(0.1, (lambda: pieces.feed(b"a")) if end == "feed" else pieces.close)
    timer.start()
    assert pieces.read(5, 20.0) == (b"a" if end == "feed" else b"")
    timer.join()
