"""What syncd needs of the machine: the clock, the lock, the pace file, systemd, credentials, the user it runs as."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import re
import socket
import stat
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Final, Self

from syncd import pacing
from syncd.config import Settings
from syncd.errors import ConfigError, LockHeldError, SiteError, state_reason
from syncd.ports import Clock
from syncd.report import Signs

IN_FLIGHT_WAIT: Final = 0.02  # seconds until another look while another process has its request in flight
READER_TRIES: Final = 20  # a reader's look at the lock takes microseconds; a starter outlasts it
PACE_BYTES: Final = 512  # always overwritten as a whole, within one page and one sector: never half a record
SIGNS_AT: Final = 128  # where in the lock file the signs of life stand; before them, who holds it
SIGNS_BYTES: Final = 896  # always overwritten as a whole, as the pace is
MIRRORING: Final = ("run", "backfill")  # verbs that give signs of life; others hold the lock as long as they need
HOLD_SLICE: Final = 0.005  # seconds of real time, however fast the clock goes
LEADS: Final = 20  # requests whose connecting is remembered
CREDENTIAL_CAP: Final = 65_536
MACHINE_ID: Final = Path("/etc/machine-id")  # machine-id(5); not to be shown as it is
MOUNTS: Final = Path("/proc/self/mountinfo")  # proc(5): the mount point is the fifth word, the type follows "-"
NETWORK: Final = (  # file systems whose locks and mappings SQLite cannot rely on (sqlite.org/wal.html, "Overview" 2)
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "ncpfs", "davfs"),
    *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.glusterfs", "fuse.davfs2", "fuse.smbnetfs", "fuse.curlftpfs"),
)
_SHORT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OPEN: Final = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class SystemClock:
    """The real time (ports.Clock)."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        return time.time()

    def steady(self) -> float:
        """Seconds since boot, sleep included; the same for all processes."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "resources_exhausted" if error.errno in _SHORT else state_reason(error)
        raise SiteError(reason, errno.errorcode.get(error.errno or 0, "unknown")) from error


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds the lock, as it wrote itself down; pid 0 in the instant before it has.

    `signs`: of life; None for a verb that gives none.
    """

    pid: int
    verb: str
    signs: Signs | None = None


class Lock:
    """The one writer of a practice: a flock on STATE/lock, gone with its process. Use as a context manager."""

    def __init__(self, state_path: Path, verb: str = "run") -> None:
        self._path, self._verb, self._fd = state_path / "lock", verb, -1

    def __enter__(self) -> Self:
        """Take the lock. Raises LockHeldError (who holds it) or SiteError disk_error."""
        with _disk_errors(), contextlib.ExitStack() as undo:
            self._fd = os.open(self._path, _OPEN, 0o600)
            undo.callback(os.close, self._fd)
            self._take(self._fd)
            known = os.fstat(self._fd)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()} {self._verb}\n".encode(), 0)
            if self._verb in MIRRORING:  # whoever hangs before its first turn is missed, too
                _write_signs(self._fd, Signs(SystemClock().steady(), {}))
            if known.st_size:  # taking it is no sign of life yet: a service may end again and again
                os.utime(self._fd, ns=(known.st_atime_ns, known.st_mtime_ns))
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        os.close(self._fd)

    def _take(self, fd: int) -> None:
        for _ in range(READER_TRIES):
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(IN_FLIGHT_WAIT)
        holder = _read_holder(fd)
        raise LockHeldError(f"`syncd {holder.verb}` (pid {holder.pid}) holds the lock of this practice")

    def left_at(self) -> float:
        """When a holder gave its last sign of life, in seconds since the epoch; now where nobody ever held it."""
        with contextlib.suppress(FileNotFoundError), _disk_errors():
            return self._path.stat().st_mtime
        return time.time()

    def holder(self) -> Holder | None:
        """Who holds the lock now; None: nobody. For readers; raises SiteError when the file cannot be read."""
        with _disk_errors():
            try:
                fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return _read_holder(fd)
        finally:
            os.close(fd)


def _read_holder(fd: int) -> Holder:
    line = os.pread(fd, SIGNS_AT, 0).decode("ascii", "replace").partition("\n")[0]
    pid, _, verb = line.strip().partition(" ")
    signs = _read_signs(os.pread(fd, SIGNS_BYTES, SIGNS_AT))
    return Holder(int(pid) if pid.isdecimal() else 0, verb if verb.replace("-", "").isalnum() else "?", signs)


def _read_signs(content: bytes) -> Signs | None:
    """What `_write_signs` wrote; None where that is nothing, or damaged."""
    try:
        beat_at, parts = json.loads(content)
        return Signs(float(beat_at), {str(part): (float(at), str(reason)) for part, (at, reason) in parts.items()})
    except (ValueError, TypeError, AttributeError):
        return None


def _write_signs(fd: int, signs: Signs) -> None:
    content = json.dumps([signs.beat_at, dict(signs.parts)]).ljust(SIGNS_BYTES - 1) + "\n"
    os.pwrite(fd, content.encode("ascii"), SIGNS_AT)


class Pulse:
    """Signs of life of the lock's holder, in the lock file: a reader sees what hangs, though the index may say "ok".

    A part is a lane, the scheduler, the clock or the log. One that says nothing for too long hangs (report.py).
    """

    def __init__(self, state_path: Path, clock: Clock) -> None:
        self._clock, self._parts = clock, dict[str, tuple[float, str]]()
        with _disk_errors():
            self._fd = os.open(state_path / "lock", _OPEN, 0o600)

    def works(self, part: str) -> None:
        """The part did what it is there for."""
        self._parts[part] = (self._clock.steady(), "")

    def ails(self, part: str, reason: str) -> None:
        """The part tried and failed; since when is kept. `reason`: a key of REASONS."""
        at, _ = self._parts.get(part, (self._clock.steady(), ""))
        self._parts[part] = (at, reason)

    def beat(self) -> None:
        """Write it all down; from the main loop only. A disk that refuses makes the signs old, which is seen."""
        with contextlib.suppress(OSError):
            _write_signs(self._fd, Signs(self._clock.steady(), self._parts.copy()))

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class PaceFile:
    """The pace of one customer key, shared by all processes. `zone` decides when a day of the counts begins."""

    def __init__(self, path: Path, clock: Clock, zone: tzinfo = UTC) -> None:
        self._path, self._clock, self._zone = path, clock, zone
        self._leads: deque[float] = deque(maxlen=LEADS)

    def claim(self, spacing: float) -> Claim | float:
        """The right to send one request now, to be held until its answer is in; or seconds to wait, then ask again.

        The start is on file before this returns. Each claim opens the file anew: a flock belongs to an open file, so
        threads exclude each other as processes do. Raises SiteError disk_error: then nothing may be sent.
        """
        with _disk_errors(), contextlib.ExitStack() as undo:
            fd = os.open(self._path, _OPEN, 0o600)
            undo.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return IN_FLIGHT_WAIT
            steady = self._clock.steady()  # read under the lock
            pace = pacing.Pace.from_json(os.pread(fd, PACE_BYTES, 0).decode("ascii", "replace"))
            lead = min(max(self._leads, default=0.0), spacing / 4)  # connecting may begin as much earlier
            if (earliest := pacing.next_start(pace, spacing, steady + lead)) > steady + lead:
                return earliest - steady - lead
            pace = pacing.started(pace, max(steady, earliest), self._today())
            _write_pace(fd, pace)
            undo.pop_all()
            return Claim(fd, pace, self._clock, steady, self._leads)

    def counts(self) -> pacing.Pace:
        """The pace with today's counts, for readers; zeros when there is no such file yet, or it may not be read."""
        pace = pacing.Pace()
        with contextlib.suppress(OSError):
            pace = pacing.Pace.from_json(self._path.read_text("ascii", "replace"))
        return pace if pace.day == self._today() else pacing.Pace()

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock.now(), self._zone).date().isoformat()


def _write_pace(fd: int, pace: pacing.Pace) -> None:
    os.pwrite(fd, pace.to_json().ljust(PACE_BYTES - 1).encode("ascii") + b"\n", 0)


class Claim:
    """One request in flight. A context manager around it; leaving records how it was answered."""

    def __init__(self, fd: int, pace: pacing.Pace, clock: Clock, made_at: float, leads: deque[float]) -> None:
        self._fd, self._pace, self._clock, self._made_at, self._leads = fd, pace, clock, made_at, leads
        self._throttled, self._retry_after, self._rest = False, 0.0, 0.0

    def hold(self) -> None:
        """The connection stands: note how long that took, and wait until the request may be sent."""
        self._leads.append(self._clock.steady() - self._made_at)
        while (early := self._pace.last_start - self._clock.steady()) > 0:  # at most a quarter of the distance
            time.sleep(min(early, HOLD_SLICE))

    def sent(self) -> None:
        """The request is out: the next one keeps its distance from here, however long connecting and sending took."""
        self._pace = replace(self._pace, last_start=self._clock.steady())

    def answered(self) -> float:
        """Seconds that the request has taken so far."""
        return self._clock.steady() - self._pace.last_start

    def rest(self, seconds: float) -> None:
        """Leave so many seconds free after this answer."""
        self._rest = seconds

    def throttled(self, retry_after: float | None) -> None:
        """The answer is a 429, which asked for `retry_after` seconds of quiet, or for none."""
        self._throttled, self._retry_after = True, retry_after or 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Record the answer and let others go. An error inside means that the answer was no good one."""
        steady = self._clock.steady()
        if self._throttled:
            pace = pacing.throttled(self._pace, steady, self._retry_after)
        else:
            pace = pacing.answered(self._pace, steady, error is None, self._rest)
        with contextlib.suppress(OSError):  # the answer counts for more; a disk that fails stops the next claim
            _write_pace(self._fd, pace)
        os.close(self._fd)


def owner_id(machine_id: Path = MACHINE_ID) -> str:
    """Who this machine is to an archive that several may reach: 16 hex digits; empty where machines have no id."""
    try:
        named = machine_id.read_text("ascii", "replace").strip()
    except OSError:
        return ""
    return hashlib.sha256(f"syncd archive owner {named}".encode()).hexdigest()[:16] if named else ""


def network_file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the file system that holds `path` if that is a network's, else None, also where none can be told."""
    try:
        lines = [line.split() for line in mounts.read_text("utf-8", "surrogateescape").splitlines()]
    except OSError:
        return None
    here, found = f"{path.resolve()}/", ("", "")
    for words in lines:
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])
        below = here.startswith(f"{point.rstrip('/')}/")
        if below and len(point) >= len(found[0]):  # a later mount covers an earlier one
            found = point, words[words.index("-") + 1]
    return found[1] if found[1] in NETWORK else None


class Systemd:
    """Words to the service supervisor (sd_notify(3)); does nothing where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self) -> None:
        """The start is complete."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={' '.join(text.split())}")

    def watchdog(self) -> None:
        """There was progress: call it for nothing else."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.setblocking(False)
                channel.sendto(message.encode(), self._address)


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """The secrets; none of them shows in a repr."""

    developer_key: str
    customer_key: str
    drop_password: str
    private_key_path: Path | None = None


def read_credentials(settings: Settings) -> Credentials:
    """Read every credential file. Raises ConfigError with all problems: which key, what to do, never any content."""
    api, drop, trusted = settings.api, settings.drop, settings.credentials_directory
    problems: list[str] = []

    def secret(key: str, file_name: str, one_line: bool = True) -> tuple[Path | None, str]:
        try:
            return _read_secret(settings.credential_path(file_name), trusted, one_line)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            return None, ""

    _, developer = secret("[api] developer_key_file", api.developer_key_file)
    _, customer = secret("[api] customer_key_file", api.customer_key_file)
    _, password = secret("[drop] password_file", drop.password_file)
    private = drop.private_key_file and secret("[drop] private_key_file", drop.private_key_file, one_line=False)[0]
    if problems:
        raise ConfigError(tuple(problems))
    return Credentials(developer, customer, password, private or None)


def _read_secret(candidates: list[Path], trusted: Path | None, one_line: bool) -> tuple[Path, str]:
    """The first file that is there, and its text. ValueError says why it cannot be used."""
    for path in candidates:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a fifo must not make us wait
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            how = ": call `sudo syncd`" if isinstance(error, PermissionError) else ""
            raise ValueError(f"cannot be read ({errno.errorcode.get(error.errno or 0)}){how}") from error
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError("is not a regular file: put the secret into a file")
            if mode & 0o077 and not (trusted and path.is_relative_to(trusted)):
                raise ValueError("others may read or write this file: chmod 600")
            text = os.read(fd, CREDENTIAL_CAP).decode("utf-8", "replace").strip()
        finally:
            os.close(fd)
        if not text:
            raise ValueError("the file is empty: put the secret into it, then chmod 600")
        if one_line and not (text.isprintable() and "\ufffd" not in text):
            raise ValueError("must hold one line of plain text: the secret and nothing else")
        return path, text
    raise ValueError("no such file: create it in the folder of config.toml, then chmod 600")


def become_owner(state_path: Path, for_good: bool = True) -> None:
    """As root, become the owner of an existing state folder, with that user's groups. Otherwise nothing changes.

    Not `for_good`: `as_caller` finds the way back.
    """
    try:
        owner = state_path.stat()
    except FileNotFoundError:
        return
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    try:
        user = pwd.getpwuid(owner.st_uid)
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
    except KeyError:  # a number without a name: systemd's DynamicUser=, seen while the service is down
        os.setgroups([])
        os.setgid(owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid if for_good else 0)


@contextlib.contextmanager
def as_caller() -> Iterator[None]:
    """In here be whoever called `sudo`, or root: copies for people are theirs, and lie where they may write.

    Nothing changes for a process that was not called by root, or became another user for good.
    """
    user, group = (int(os.environ.get(name) or 0) for name in ("SUDO_UID", "SUDO_GID"))
    before, in_group, groups = os.geteuid(), os.getegid(), os.getgroups()
    if 0 not in os.getresuid() or user == before:
        yield
        return
    os.seteuid(0)
    try:
        os.setgroups(os.getgrouplist(_name_of(user), group))
        os.setegid(group)
        os.seteuid(user)
        yield
    finally:
        os.seteuid(0)
        os.setegid(in_group)
        os.setgroups(groups)
        os.seteuid(before)


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


@contextlib.contextmanager
def as_owner(state_path: Path) -> Iterator[None]:
    """As root, make and change files in here as the owner of an existing state folder does; then be root again."""
    owner = state_path.stat() if state_path.exists() else None
    if owner is None or os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
