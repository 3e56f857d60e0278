"""Door to the drop: the SFTP site that Open Dental writes to and syncd reads from.

Speaks SFTP version 3 (draft-ietf-secsh-filexfer-02) itself over a paramiko channel, because paramiko's own client
accepts truncated files, decodes names, logs paths and pays several round trips a file. The requests of one step are
sent together, so that a batch of small files costs four round trips.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import tee
from pathlib import Path
from struct import Struct
from struct import error as StructError  # noqa: N812  it is a class
from typing import BinaryIO, Final

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from syncd.errors import ConfigError, FailureClass, ItemError, SiteError, SyncdError, TransientError
from syncd.model import Pulled, PullJob, Seen

INIT, OPEN, CLOSE, READ, WRITE, LSTAT, OPENDIR, READDIR, REMOVE, RMDIR = 1, 3, 4, 5, 6, 7, 11, 12, 13, 15
VERSION, STATUS, HANDLE, DATA, NAME, ATTRS = 2, 101, 102, 103, 104, 105
OK, EOF, NO_SUCH_FILE = 0, 1, 2
U32, U64, PACKET, READING = Struct(">I"), Struct(">Q"), Struct(">IBI"), Struct(">QI")
NEW_FILE: Final = Struct(">III").pack(0x02 | 0x08 | 0x20, 4, 0o600)  # write, create, not there yet; its mode
SSH_PORT: Final = 22
READ_SIZE: Final = 32 * 1024  # bytes; every server answers so much in one piece, many no more
IN_FLIGHT: Final = 64  # requests; as many as OpenSSH's own client
LARGEST_PACKET: Final = 4 * 1024 * 1024  # bytes
CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
BATCH_FILES, BATCH_BYTES = 32, 16 * 1024 * 1024  # what a lost connection can cost beyond the file in hand
LOST: Final = (paramiko.SSHException, EOFError, OSError, StructError)  # the connection or the protocol, in all shapes
BAD_KEY: Final = (OSError, ValueError, TypeError, LookupError, paramiko.SSHException, paramiko.pkey.UnknownKeyType)
DISK_REASONS: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "archive_full"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "archive_read_only"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "archive_missing"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM), "resources_exhausted"),
}
Packet = tuple[int, bytes]  # its type, and all behind its number


class _Session:
    """SFTP on one channel. Raises one of LOST. `timeout`: seconds for one reply, however slowly it drips."""

    def __init__(self, channel: paramiko.Channel, timeout: float) -> None:
        self._channel, self._timeout = channel, timeout
        self.received = 0  # bytes
        self._inbox, self._arrived, self._number = bytearray(), dict[int, Packet](), 3
        channel.settimeout(timeout)
        channel.sendall(PACKET.pack(5, INIT, 3))
        if self._reply(3)[0] != VERSION:  # the version stands where other replies have their number
            raise paramiko.SSHException("not an SFTP server")

    def ask(self, kind: int, body: bytes) -> Packet:
        """One request, one reply; also between the replies of `answers`."""
        return next(self.answers([(kind, body)]))

    def answers(self, requests: Iterable[Packet]) -> Iterator[Packet]:
        """One reply a request, in the requests' order, IN_FLIGHT of them under way; requests are drawn when needed."""
        source, waiting = iter(requests), deque[int]()
        while True:
            outbox = bytearray()
            while len(waiting) < IN_FLIGHT and (request := next(source, None)):
                self._number = self._number % 0xFFFFFFFF + 1
                outbox += PACKET.pack(5 + len(request[1]), request[0], self._number) + request[1]
                waiting.append(self._number)
            if outbox:
                self._channel.settimeout(self._timeout)
                self._channel.sendall(bytes(outbox))
            if not waiting:
                return
            yield self._reply(waiting.popleft())
            while waiting and waiting[0] in self._arrived:  # all that came, before more is sent
                yield self._arrived.pop(waiting.popleft())

    def _reply(self, number: int) -> Packet:
        end = time.monotonic() + self._timeout
        while number not in self._arrived:
            self._channel.settimeout(max(0.001, end - time.monotonic()))
            if not (received := self._channel.recv(LARGEST_PACKET)):
                raise EOFError
            self._inbox += received
            self.received += len(received)
            while len(self._inbox) >= PACKET.size:
                size, kind, arrived = PACKET.unpack_from(self._inbox)
                if not PACKET.size - U32.size <= size <= LARGEST_PACKET:
                    raise paramiko.SSHException("not an SFTP packet")
                if len(self._inbox) < U32.size + size:
                    break
                self._arrived[arrived] = kind, bytes(self._inbox[PACKET.size : U32.size + size])
                del self._inbox[: U32.size + size]
        return self._arrived.pop(number)


class _Transfer:
    """One file on its way; `outcome` ends it: Pulled, or why not."""

    def __init__(self, job: PullJob) -> None:
        self.job, self.path = job, _string(job.remote)
        self.seen, self.handle = Seen(0, 0, regular=False), b""
        self.outcome: Pulled | SyncdError | None = None
        self._local: BinaryIO | None = None
        self._digest, self._head, self._tail = hashlib.sha256(), b"", b""

    def refuse(self, failure: FailureClass) -> None:
        """End the transfer, unless it has ended."""
        self.outcome = self.outcome or ItemError(failure)

    def looked(self, reply: Packet) -> None:
        """Judge the first LSTAT. A pipe must not even be opened: that would block OpenSSH's server for ever."""
        self.seen = _seen(reply) or self.seen
        if reply[0] != ATTRS:
            self.refuse("missing_on_drop" if _number(reply[1]) == NO_SUCH_FILE else "unreadable_on_drop")
        elif not self.seen.regular:
            self.refuse("not_a_file")
        elif not 0 < self.seen.size <= self.job.cap:
            self.refuse("too_large" if self.seen.size else "zero_bytes")

    def opened(self, reply: Packet) -> None:
        """Keep the handle, still with its length before it, as requests want it."""
        if reply[0] == HANDLE:
            self.handle = reply[1]
        else:
            self.refuse("missing_on_drop" if _number(reply[1]) == NO_SUCH_FILE else "unreadable_on_drop")

    def readings(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of each READ, the last one a byte past the end. A refused file is left at once."""
        for offset in [*range(0, self.seen.size, READ_SIZE), self.seen.size]:
            if not self.outcome:
                yield offset, min(READ_SIZE, self.seen.size - offset) or 1

    def read(self, session: _Session, offset: int, length: int, reply: Packet) -> None:
        """Write what a READ answered; the rest of a short answer is asked for here."""
        (kind, body), content, at_end = reply, reply[1][U32.size :], offset == self.seen.size
        says_end = kind == STATUS and _number(body) == EOF
        if self.outcome:
            return
        if at_end or says_end:
            if not (at_end and says_end):
                self.refuse("changed_while_read")
        elif kind != DATA or not 0 < len(content) <= length:
            self.refuse("io_error")
        else:
            self._write(content)
            if rest := length - len(content):
                offset += len(content)
                self.read(session, offset, rest, session.ask(READ, self.handle + READING.pack(offset, rest)))

    def _write(self, content: bytes) -> None:
        with _disk():
            self._local = self._local or os.fdopen(os.open(self.job.local, CREATE, 0o600), "wb")
            self._local.write(content)
        self._digest.update(content)
        self._head += content[: 512 - len(self._head)]
        self._tail = (self._tail + content[-64:])[-64:]

    def confirm(self, reply: Packet) -> None:
        """Judge the last LSTAT; unchanged, the local file is made durable and the transfer is Pulled."""
        if _seen(reply) != self.seen:
            self.refuse("changed_while_read")
        if not self.outcome and self._local:
            with _disk(), self._local:
                self._local.flush()
                os.fsync(self._local.fileno())
            self.outcome = Pulled(self.seen.size, self._digest.hexdigest(), self.seen.mtime, self._head, self._tail)

    def discard(self) -> None:
        """Leave no local file behind, except one that was there before."""
        if self._local:
            with suppress(OSError):
                self._local.close()
            with suppress(OSError):
                self.job.local.unlink()


class SftpDrop:
    """The drop over SFTP (implements `ports.Drop`). For one thread at a time; connects when first needed, then reuses.

    `timeout`: seconds for one reply. `connect_timeout`: seconds for TCP, and again for the whole handshake and login.
    A private key goes before the password. ConfigError: a key cannot be used, or no host key is pinned.
    """

    def __init__(
        self,
        host: str,
        port: int,
        username: str,
        password: str | None,
        private_key: Path | None,
        host_key: str | None,
        known_hosts: Path | None,
        timeout: float = 30.0,
        connect_timeout: float = 15.0,
    ) -> None:
        self._address, self._username, self._password = (host, port), username, password
        self._timeout, self._connect_timeout = timeout, connect_timeout
        try:
            self._pins = _pinned_keys(self._address, host_key, known_hosts)
        except BAD_KEY as error:
            raise ConfigError(("[drop] host_key or known_hosts_file holds no usable key of this site",)) from error
        try:
            self._key = paramiko.PKey.from_path(private_key) if private_key else None
        except BAD_KEY as error:
            raise ConfigError(("[drop] private_key_file is not a private key without passphrase",)) from error
        self._transport: paramiko.Transport | None = None
        self._session: _Session | None = None
        self._received_before = 0  # by the sessions that ended

    def pull(self, jobs: Sequence[PullJob]) -> list[Pulled | SyncdError]:
        """Read each remote file to its local file and sync it. SiteError from the local disk ends the whole call.

        A connection lost on the way is a TransientError in the place of each file that was not finished.
        """
        if not jobs:
            return []
        transfers = [_Transfer(job) for job in jobs]
        with self._talking() as session:
            try:
                for start in range(0, len(transfers), BATCH_FILES):
                    _pull_batch(session, transfers[start : start + BATCH_FILES])
            except LOST:
                self.close()
            except BaseException:
                for transfer in transfers:
                    transfer.outcome = None
                raise
            finally:
                for transfer in transfers:
                    if not isinstance(transfer.outcome, Pulled):
                        transfer.discard()
        return [transfer.outcome or TransientError("drop_unreachable") for transfer in transfers]

    def look(self, paths: Sequence[bytes]) -> list[Seen | None]:
        """Attributes of each path; None where nothing is. What may not be looked at is there, and no regular file."""
        with self._talking() as session:
            return [_seen(reply) for reply in session.answers((LSTAT, _string(path)) for path in paths)]

    def names(self, folder: bytes) -> list[bytes] | None:
        """All names in a folder but `.` and `..`; None where there is no such folder. ItemError: it cannot be read.

        One that ends in `/` is a folder of ours: a link in its place is not followed, its target is not ours to empty.
        """
        found: list[bytes] = []
        with self._talking() as session:
            if folder.endswith(b"/"):
                seen = _seen(session.ask(LSTAT, _string(folder.rstrip(b"/"))))
                if seen and stat.S_IFMT(seen.mode) not in (0, stat.S_IFDIR):
                    raise ItemError("not_a_file")
            kind, body = session.ask(OPENDIR, _string(folder or b"."))
            if kind == HANDLE:
                while (reply := session.ask(READDIR, body))[0] == NAME:
                    found += _names(reply[1])
                session.ask(CLOSE, body)
                body = reply[1]
        if _number(body) == NO_SUCH_FILE:
            return None
        if _number(body) != EOF:
            raise ItemError("unreadable_on_drop")
        return [name for name in found if name not in (b".", b"..")]

    def put(self, path: bytes, source: BinaryIO) -> None:
        """Write an open file to a name that does not exist yet, and see by LSTAT that it is whole; else it is removed.

        ItemError: the site did not take it. Only `put-back` writes here.
        """
        with self._talking() as session:
            kind, body = session.ask(OPEN, _string(path) + NEW_FILE)
            if kind != HANDLE:
                raise ItemError("refused", "the site does not let syncd write")
            handle = body
            pieces = iter(lambda: source.read(READ_SIZE), b"")
            writing = ((WRITE, handle + U64.pack(n * READ_SIZE) + _string(piece)) for n, piece in enumerate(pieces))
            codes = {_number(reply[1]) for reply in session.answers(writing)}
            session.ask(CLOSE, handle)
            seen = _seen(session.ask(LSTAT, _string(path)))
            if codes - {OK} or seen is None or seen.size != os.fstat(source.fileno()).st_size:
                session.ask(REMOVE, _string(path))
                raise ItemError("refused", "the site did not take the whole file")

    def remove(self, paths: Sequence[bytes]) -> list[bool]:
        """True: nothing of that name is there any more. A path that ends in `/` is an empty folder to remove."""
        asked = [(RMDIR if path.endswith(b"/") else REMOVE, _string(path.rstrip(b"/"))) for path in paths]
        with self._talking() as session:
            answers = zip(asked, session.answers(asked), strict=True)
            codes = [(kind, path, _number(body)) for (kind, path), (_, body) in answers]
            # of a folder, "no such file" is not believed: OpenSSH says so where something else bears the name, too
            return [
                code == OK or (code, kind) == (NO_SUCH_FILE, REMOVE) or not _seen(session.ask(LSTAT, path))
                for kind, path, code in codes
            ]

    def close(self) -> None:
        """Drop the connection; the next call makes a new one."""
        if self._transport:
            self._transport.close()
        self._received_before = self.received
        self._transport = self._session = None

    @property
    def received(self) -> int:
        """Bytes that came from the site so far."""
        session = self._session
        return self._received_before + (session.received if session else 0)

    @contextmanager
    def _talking(self) -> Iterator[_Session]:
        """A session for one call; after any error the connection is not used again."""
        try:
            if not (self._session and self._transport and self._transport.is_active()):
                self.close()
                self._session = self._connected()
            yield self._session
        except LOST as error:
            self.close()
            raise TransientError("drop_unreachable") from error
        except BaseException:
            self.close()
            raise

    def _connected(self) -> _Session:
        wire = socket.create_connection(self._address, self._connect_timeout)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._timeout * 1000))
        self._transport = paramiko.Transport(wire, default_window_size=8 << 20, default_max_packet_size=256 << 10)
        watchdog = threading.Timer(self._connect_timeout, self._transport.close)
        watchdog.daemon = True
        watchdog.start()  # paramiko waits without limit in places: invoke_subsystem heeds no timeout
        try:
            return self._log_in(self._transport)
        finally:
            watchdog.cancel()

    def _log_in(self, transport: paramiko.Transport) -> _Session:
        options = transport.get_security_options()
        options.ciphers = [name for mode in ("gcm", "ctr") for name in options.ciphers if mode in name]
        options.digests = [name for name in options.digests if "sha2" in name]
        options.key_types = [name for pin in self._pins for name in _signatures(pin.get_name())]
        transport.auth_timeout = transport.channel_timeout = 2 * self._connect_timeout  # the watchdog comes first
        try:
            transport.start_client(timeout=self._connect_timeout)
        except IncompatiblePeer as error:
            detail = "no algorithm in common: its SSH is too old, or it has no host key of the pinned type"
            raise SiteError("drop_unreachable", detail) from error
        if transport.get_remote_server_key() not in self._pins:
            raise SiteError("host_key_changed")
        try:
            if self._key:
                missing = transport.auth_publickey(self._username, self._key)
            else:
                missing = transport.auth_password(self._username, self._password or "")
        except paramiko.AuthenticationException as error:
            if not transport.is_active():  # cut during the login: paramiko calls that a refusal, too
                raise EOFError from error
            raise SiteError("drop_refused") from error
        if missing:
            raise SiteError("drop_refused", "the site wants another proof besides")
        transport.set_keepalive(15)
        channel = transport.open_session(timeout=self._connect_timeout)
        channel.invoke_subsystem("sftp")
        return _Session(channel, self._timeout)


def shown_host_key(host: str, port: int, kind: str = "ssh-ed25519", timeout: float = 15.0) -> str:
    """Type and base64 of the host key that a site shows, of this `kind` where it has one; nothing proves whose it is.

    Raises TransientError drop_unreachable.
    """
    try:
        with closing(paramiko.Transport(socket.create_connection((host, port), timeout))) as transport:
            options = transport.get_security_options()
            first = _signatures(kind)
            options.key_types = [*first, *(name for name in options.key_types if name not in first)]
            transport.start_client(timeout=timeout)
            key = transport.get_remote_server_key()
    except LOST as error:
        raise TransientError("drop_unreachable") from error
    return f"{key.get_name()} {key.get_base64()}"


def _pull_batch(session: _Session, batch: list[_Transfer]) -> None:
    """Look at all and open all; then read and confirm as many at once as BATCH_BYTES hold."""
    for transfer, reply in zip(batch, session.answers((LSTAT, t.path) for t in batch), strict=True):
        transfer.looked(reply)
    wanted = [t for t in batch if not t.outcome]
    opening = session.answers((OPEN, t.path + U64.pack(1 << 32)) for t in wanted)  # for reading, without attributes
    part: list[_Transfer] = []
    for transfer, reply in zip(wanted, opening, strict=True):
        transfer.opened(reply)
    for transfer in [t for t in wanted if t.handle]:
        part.append(transfer)
        if sum(t.seen.size for t in part) >= BATCH_BYTES:
            _read_and_confirm(session, part)
            part = []
    _read_and_confirm(session, part)


def _read_and_confirm(session: _Session, part: list[_Transfer]) -> None:
    asked, answered = tee((t, offset, length) for t in part for offset, length in t.readings())
    replies = session.answers((READ, t.handle + READING.pack(offset, length)) for t, offset, length in asked)
    for reply, (transfer, offset, length) in zip(replies, answered, strict=True):
        transfer.read(session, offset, length, reply)
    confirming = [request for t in part for request in ((LSTAT, t.path), (CLOSE, t.handle))]
    for transfer, reply in zip(part, list(session.answers(confirming))[::2], strict=True):
        transfer.confirm(reply)


def _signatures(kind: str) -> list[str]:
    """What a host key of this type may sign with."""
    return ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]


def _string(value: bytes) -> bytes:
    return U32.pack(len(value)) + value


def _number(body: bytes, at: int = 0) -> int:
    """A number in a packet; the first one of a STATUS is its code."""
    return int(U32.unpack_from(body, at)[0])


def _seen(reply: Packet) -> Seen | None:
    """What an LSTAT answered; None: no such file. Any other refusal is something that is no regular file."""
    kind, body = reply
    if kind == ATTRS:
        return _attributes(body, 0)[0]
    return None if _number(body) == NO_SUCH_FILE else Seen(0, 0, regular=False)


def _attributes(body: bytes, at: int) -> tuple[Seen, int]:
    """Attributes from `at`, and where they end. Where a site tells no file type, everything counts as a file."""
    flags, at = _number(body, at), at + 4
    size = U64.unpack_from(body, at)[0] if flags & 1 else 0
    at += 8 * (flags & 1) + 8 * (flags >> 1 & 1)  # size; owner
    mode = _number(body, at) if flags & 4 else 0
    at += flags & 4
    mtime = _number(body, at + 4) if flags & 8 else 0
    at += flags & 8
    for _ in range(2 * _number(body, at) if flags >> 31 else 0):
        at += 4 + _number(body, at + 4)  # each of the pairs' strings, seen from the number before it
    return Seen(size, mtime, stat.S_IFMT(mode) in (0, stat.S_IFREG), mode), at + 4 * (flags >> 31)


def _names(body: bytes) -> Iterator[bytes]:
    """The names of a NAME reply, each followed by a line for people and by its attributes."""
    at = 4
    for _ in range(_number(body)):
        end = at + 4 + _number(body, at)
        yield body[at + 4 : end]
        at = _attributes(body, end + 4 + _number(body, end))[1]


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SiteError(DISK_REASONS.get(error.errno or 0, "disk_error"), os.strerror(error.errno or 0)) from error


def _pinned_keys(address: tuple[str, int], host_key: str | None, known_hosts: Path | None) -> list[paramiko.PKey]:
    """The keys that this site may show. LookupError: none is pinned."""
    if host_key:
        name, encoded = host_key.split()[:2]
        return [paramiko.PKey.from_type_string(name, base64.b64decode(encoded, validate=True))]
    host, port = address
    known = paramiko.HostKeys(str(known_hosts or "/dev/null")).lookup(host if port == SSH_PORT else f"[{host}]:{port}")
    if not known:
        raise LookupError
    return list(known.values())
