"""The audit log: LOG/audit/2026-11.log, one file a month (UTC), one JSON line for each thing that was done.

    {"n":7,"at":"2026-11-18T11:06:40.250Z","actor":"daemon","verb":"stored",...,"prev":"...","hash":"..."}

`n` counts on across files; `hash` is the sha256 of everything before it in the line, and `prev` the hash of the line
before: who edits, drops, adds or moves a line breaks the chain there. Who cuts the end, or writes the whole chain anew,
is found by a head (n and hash) that was kept elsewhere: in the index and in the journal.

Lines are only ever added, by one process at a time (a flock on `.lock`), and fsynced once for each call of `append`. An
append that fails is taken back while the lock is held: it never was in the log. What a crash left of one is never cut:
the next append closes it with a newline, and its first line, of verb `torn`, tells how many bytes it is and their
sha256. Where the log no longer holds the head that it must, the next line goes on from that head: the break stays seen.

An *entry* is what waits to be written. It has a name of its own, and an entry that stands among the last lines is not
written twice: what was appended just before a crash may be given again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from syncd.errors import SiteError
from syncd.report import iso

DAEMON: Final = "daemon"  # the actor of whatever the mirror does on its own
TORN: Final = "torn"
_FACTS: Final = """
at actor verb entry became bytes code count filters guard item items more outcome pat_num pat_nums scope seq sha256
sidecar state ticket version what
"""
FACTS: Final = frozenset(_FACTS.split())  # what a line may tell; anything else is dropped
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:+ -]{0,100}")
_FILE: Final = re.compile(r"[0-9]{4}-(?:0[1-9]|1[0-2])\.log")
_SEAL: Final = b',"hash":"'
_NO_LOGIN: Final = 2**32 - 1  # /proc/self/loginuid of a process that no login leads to
_TRIES, _WAIT = 250, 0.02  # seconds between two looks at a lock that another process holds: five in all
_BLOCK: Final = 1 << 16
_OPEN: Final = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a log: its number and its hash."""

    n: int = 0
    hash: str = "0" * 64

    @classmethod
    def parse(cls, text: str | None) -> Head | None:
        """What `str` made of a head; None for None."""
        if text is None:
            return None
        n, _, digest = text.partition(" ")
        return cls(int(n), digest)

    def __str__(self) -> str:
        return f"{self.n} {self.hash}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was done: when (seconds since the epoch), by whom, and its facts: ids, digests and counts only."""

    name: str
    at: float
    actor: str
    verb: str
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """The first place where the chain is broken. `line` counts from 1; 0: the file has none."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"audit/{self.file} line {self.line}: {self.what}"


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a check: how many lines were sound, the last of them, and where it ended early."""

    lines: int
    head: Head
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class _Line:
    """A line whose hash is right."""

    head: Head
    facts: Mapping[str, Any]


def actor() -> str:
    """Who runs this process: `uid-998`, and who logged in for it where that is known: `uid-0 login-1000`."""
    login = _NO_LOGIN
    with contextlib.suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text("ascii"))
    return f"uid-{os.getuid()}" + ("" if login == _NO_LOGIN else f" login-{login}")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SiteError("log_unwritable", errno.errorcode.get(error.errno or 0, "")) from error


class AuditLog:
    """The door to the folder of one practice's audit log. Every method raises SiteError log_unwritable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def appending(self) -> Iterator[Appender]:
        """Hold the right to append; whoever else wants it waits up to five seconds. Not to be nested."""
        with contextlib.ExitStack() as closing:
            with _translated():
                if not any(self._folder.glob("*.log")):
                    _make_folder(self._folder)
                folder = _opened(closing, self._folder, os.O_RDONLY | os.O_DIRECTORY)
                lock = _opened(closing, Path(".lock"), os.O_RDWR | os.O_CREAT, folder)
                _take(lock, fcntl.LOCK_EX)
            yield Appender(folder)

    def head(self) -> Head:
        """The last sound line; that of an empty log has the number 0."""
        with _translated(), contextlib.ExitStack() as closing:
            folder, sizes = self._snapshot(closing)
            return _end(folder, sizes, None, 1).last

    def facts(self) -> Iterator[dict[str, Any]]:
        """Every sound line as it was written, the oldest first; as many as there are when the reading begins."""
        for _, _, raw in self._lines():
            line = _parse(raw)
            if line is not None:
                yield dict(line.facts)

    def verify(self, known: Head | None = None) -> Checked:
        """Check the whole chain, in one pass. `known`: a head that it must hold, for a cut or rewritten end."""
        return _check(self._lines(), known)

    def _lines(self) -> Iterator[tuple[str, int, bytes]]:
        """File, number and bytes of every line; only a line that lacks its newline at a file's end lacks it here."""
        with _translated(), contextlib.ExitStack() as closing:
            folder, sizes = self._snapshot(closing)
            for name, size in sorted(sizes.items()):
                with os.fdopen(os.open(name, os.O_RDONLY | _OPEN, dir_fd=folder), "rb") as file:
                    left = size
                    for number, raw in enumerate(file, 1):
                        if left <= 0:
                            break
                        yield name, number, raw[:left]
                        left -= len(raw)

    def _snapshot(self, closing: contextlib.ExitStack) -> tuple[int, dict[str, int]]:
        """The folder, and the size of each file while nobody appends; descriptor -1 where there is no log yet."""
        try:
            folder = _opened(closing, self._folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return -1, {}
        with contextlib.ExitStack() as reading:
            with contextlib.suppress(FileNotFoundError):  # without its lock file nobody appends
                _take(_opened(reading, Path(".lock"), os.O_RDONLY, folder), fcntl.LOCK_SH)
            return folder, _sizes(folder)


class Appender:
    """The right to append, held by one thread of one process."""

    def __init__(self, folder: int) -> None:
        self._folder = folder

    def append(self, entries: Sequence[Entry], known: Head | None, now: float) -> Head:
        """Write these entries, those that the log ends with left out; durable when it returns the new head.

        `known`: the head after the last append, or None for none. `now` (seconds since the epoch) decides the month; a
        clock that went back does not: lines go to the newest file there is.
        """
        with _translated():
            sizes = _sizes(self._folder)
            end = _end(self._folder, sizes, known, len(entries))
            fresh = [entry for entry in entries if entry.name not in end.names]
            if end.wreck and end.holds_known:
                facts = {"bytes": len(end.wreck), "sha256": hashlib.sha256(end.wreck).hexdigest()}
                fresh.insert(0, Entry(f"{TORN}-{end.last.n}-{len(end.wreck)}", now, DAEMON, TORN, facts))
            head = end.last if known is None or end.holds_known else known
            lines = [b"\n"] if end.unended else []
            for entry in fresh:
                line, head = _line(entry, head)
                lines.append(line)
            newest = max(sizes, default="")
            month = dt.datetime.fromtimestamp(now, dt.UTC).strftime("%Y-%m.log")
            _write(self._folder, newest if end.wreck or end.unended else max(newest, month), b"".join(lines))
        return head


def _make_folder(folder: Path) -> None:
    """The folder, durable, also where an earlier process got no further than this. One above it that may not even be
    opened was there before.
    """
    for each in (folder.parent, folder):  # with parents=True alone, those above get what the umask leaves
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    for above in (folder.parent, folder.parent.parent):
        with contextlib.suppress(PermissionError), contextlib.ExitStack() as closing:
            os.fsync(_opened(closing, above, os.O_RDONLY | os.O_DIRECTORY))


def _opened(closing: contextlib.ExitStack, path: Path, flags: int, folder: int | None = None) -> int:
    descriptor = os.open(path, flags | _OPEN, 0o600, dir_fd=folder)
    closing.callback(os.close, descriptor)
    return descriptor


def _take(lock: int, kind: int) -> None:
    """A process that was stopped with the lock in hand must not stop this one for longer than that."""
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, kind | fcntl.LOCK_NB)
        time.sleep(_WAIT)
    raise OSError(errno.EBUSY, "another process holds the audit log")


def _sizes(folder: int) -> dict[str, int]:
    names = filter(_FILE.fullmatch, os.listdir(folder))
    return {name: os.stat(name, dir_fd=folder, follow_symlinks=False).st_size for name in names}


def _write(folder: int, name: str, content: bytes) -> None:
    """Append and sync, the name of a new file before its content; what was written of a failing one is taken back."""
    descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _OPEN, 0o600, dir_fd=folder)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            os.fsync(folder)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _line(entry: Entry, before: Head) -> tuple[bytes, Head]:
    """The line of an entry, and the head after it."""
    told = {"at": iso(entry.at), "actor": entry.actor, "verb": entry.verb, "entry": entry.name, **entry.facts}
    told = {key: _plain(value) for key, value in told.items() if key in FACTS}
    body = json.dumps({"n": before.n + 1, **told, "prev": before.hash}, separators=(",", ":"))[:-1].encode()
    digest = hashlib.sha256(body).hexdigest()
    return body + _SEAL + digest.encode() + b'"}\n', Head(before.n + 1, digest)


def _plain(value: object) -> object:
    """Ids, digests and counts pass; anything else is a question mark, for it may name somebody."""
    match value:
        case None | bool() | int():
            return value
        case list():
            return [_plain(each) for each in value]
        case str() if _PLAIN.fullmatch(value):
            return value
        case _:
            return "?"


def _parse(raw: bytes) -> _Line | None:
    """A line whose hash is right; None for anything else."""
    raw = raw.removesuffix(b"\n")
    body, _, seal = raw.rpartition(_SEAL)
    digest = hashlib.sha256(body).hexdigest()
    if not body or seal != digest.encode() + b'"}':
        return None
    try:
        facts = json.loads(raw)
        return _Line(Head(int(facts["n"]), digest), facts)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


@dataclass(slots=True)
class _End:
    """How a log ends. `names`: the entries of its last lines; `wreck`: what lies behind the last sound line.

    `unended`: its last byte is no newline. `holds_known`: the head that it must hold is there.
    """

    last: Head = field(default_factory=Head)
    names: set[str] = field(default_factory=set)
    wreck: bytes = b""
    unended: bool = False
    holds_known: bool = False


def _end(folder: int, sizes: Mapping[str, int], known: Head | None, count: int) -> _End:
    """Read backwards: the last `count` lines, and down to the known head."""
    end, behind, seen = _End(holds_known=known is None or known.n == 0), list[bytes](), 0
    files = sorted(sizes, reverse=True)
    for name, raw in ((each, raw) for each in files for raw in _backwards(folder, each, sizes[each])):
        line = _parse(raw)
        if line is None:
            behind += [raw] if not seen and name == files[0] else []
            continue
        end.unended = end.unended or not (seen or behind)
        end.last = end.last if seen else line.head
        end.names.add(str(line.facts.get("entry")))
        end.holds_known = end.holds_known or line.head == known
        seen += 1
        if seen >= count and (known is None or line.head.n <= known.n):
            break
    if behind and behind[0]:
        end.unended, behind = True, [b"", *behind]  # it is closed before it is told of
    end.wreck = b"\n".join(reversed(behind))
    return end


def _backwards(folder: int, name: str, size: int) -> Iterator[bytes]:
    """A file's lines without their newlines, the last first; it is empty where the file ends with a newline."""
    with os.fdopen(os.open(name, os.O_RDONLY | _OPEN, dir_fd=folder), "rb") as file:
        first = b""
        while size > 0:
            step = min(_BLOCK, size)
            size -= step
            first, *lines = (os.pread(file.fileno(), step, size) + first).split(b"\n")
            yield from reversed(lines)
        yield first


def _check(lines: Iterator[tuple[str, int, bytes]], known: Head | None) -> Checked:
    """Follow the chain until its end or its first break."""
    head, at, wreck, wreck_at = Head(), ("", 0), b"", ("", 0)

    def broken(place: tuple[str, int], what: str) -> Checked:
        return Checked(head.n, head, Problem(*place, what))

    for name, number, raw in lines:
        at, line = (name, number), _parse(raw)
        if line is None:
            wreck, wreck_at = wreck + raw, at if not wreck else wreck_at
            continue
        if wreck and not _tells_of(line, wreck):
            return broken(wreck_at, "was changed after it was written")
        if (line.head.n, line.facts.get("prev")) != (head.n + 1, head.hash):
            return broken(at, "does not follow the line before it: lines were removed, added, moved or changed")
        head, wreck = line.head, b""
        if known is not None and head.n == known.n and head != known:
            return broken(at, "is not the line that was written: the log was written anew")
    if known is not None and head.n < known.n:
        return broken(wreck_at if wreck else at, f"the end is missing: {known.n - head.n} lines were there")
    if wreck.endswith(b"\n") and known is None:
        return broken(wreck_at, "was changed after it was written")
    return Checked(head.n, head, None)


def _tells_of(line: _Line, wreck: bytes) -> bool:
    """Whether this line was written because a crash had left that."""
    digest = hashlib.sha256(wreck).hexdigest()
    return (line.facts.get("verb"), line.facts.get("sha256")) == (TORN, digest)
