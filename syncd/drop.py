"""Door to the drop: the SFTP site that Open Dental writes to and syncd reads from. Login, host key, errors as ours."""

from __future__ import annotations

import base64
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from syncd.errors import ConfigError, ItemError, SiteError, SyncdError, TransientError
from syncd.flight import Pulling
from syncd.model import Pulled, PullJob, Seen
from syncd.ports import Finished
from syncd.sftp import (
    CLOSE,
    EOF,
    HANDLE,
    LOST,
    LSTAT,
    NAME,
    NO_SUCH_FILE,
    OK,
    OPEN,
    OPENDIR,
    READ_SIZE,
    READDIR,
    REMOVE,
    RMDIR,
    U64,
    WRITE,
    Pieces,
    Session,
    Watch,
    names_in,
    number_at,
    seen_in,
    string,
)
from syncd.transfer import Transfer

NEW_FILE: Final = struct.pack(">III", 0x02 | 0x08 | 0x20, 4, 0o600)  # write, create, not there yet; its mode
SSH_PORT: Final = 22
WINDOW: Final = 32 << 20  # bytes that the site may send before we have taken them in
WIRE: Final = 256 << 10  # bytes taken in at once
TELL_EVERY: Final = 1.0  # seconds after which whoever takes the files is told that there are none
BAD_KEY: Final = (OSError, ValueError, TypeError, LookupError, paramiko.SSHException, paramiko.pkey.UnknownKeyType)
Outcome = Pulled | SyncdError
T = TypeVar("T")


class _Wire(socket.socket):
    """A socket that takes in all that has come, for paramiko asks twice for each packet, and each time all other
    threads may be served before it is.
    """

    _held = memoryview(b"")

    def recv(self, size: int, flags: int = 0) -> bytes:
        """The next bytes; of what came before them, if there is any."""
        if not self._held:
            self._held = memoryview(super().recv(WIRE, flags))
        taken, self._held = bytes(self._held[:size]), self._held[size:]
        return taken


class _Connection:
    """A session and its transport; a watchdog closes the transport when a wait has lasted too long.

    That frees every thread in paramiko at once, whatever it waits for: not all of its waits heed a timeout.
    """

    def __init__(self, transport: paramiko.Transport, period: float) -> None:
        self.transport, self.watch, self._period = transport, Watch(), period
        self._over = threading.Event()
        threading.Thread(target=self._guard, daemon=True).start()

    def _guard(self) -> None:
        while not self._over.wait(self._period):
            if time.monotonic() > self.watch.due:
                self.transport.close()

    def close(self) -> None:
        self._over.set()
        self.transport.close()


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
        self._connection: _Connection | None = None
        self._session: Session | None = None
        self._pulling: Pulling | None = None
        self._broken = False  # the last pull lost its connection
        self._received_before = 0  # by the sessions that ended

    def pull(self, jobs: Sequence[PullJob], finished: Finished | None = None) -> list[Outcome]:
        """Read each remote file to its local file; one outcome a job, in order. Nothing is synced to disk.

        `finished` is given each job with its outcome once, as they end, while others are still on their way; its
        local file is the caller's from then on. It is called every second or so, then perhaps with none, and may call
        the other methods. The jobs that it returns are taken along.
        SiteError from the local disk ends the whole call. A connection lost on the way is a TransientError in the
        place of each file that was not finished.
        """
        if not jobs:
            return []
        transfers = [Transfer(job) for job in jobs]
        ours, left = set(transfers), len(transfers)
        pulling = self._pulling = Pulling(self._do(lambda session: session), transfers, self._broken)
        try:
            while left and (ended := pulling.some(TELL_EVERY)) is not None:
                left -= len(ended)
                more: list[Transfer] = []
                if finished:
                    ours.difference_update(ended)
                    more = [Transfer(job) for job in finished([(each.job, each.told) for each in ended])]
                    transfers += more
                    ours.update(more)
                    left += len(more)
                pulling.add(more)
        except BaseException:
            self._stop(pulling, lost=True)
            for transfer in ours:
                transfer.discard()
            raise
        self._stop(pulling, lost=bool(left))
        for transfer in ours:
            if not isinstance(transfer.outcome, Pulled):
                transfer.discard()
        if left and finished:
            finished([(each.job, each.told) for each in transfers if each in ours])
        return [transfer.told for transfer in transfers]

    def _stop(self, pulling: Pulling, lost: bool) -> None:
        self._pulling, self._broken = None, lost
        if lost:
            self.close()
        pulling.stop()

    def look(self, paths: Sequence[bytes]) -> list[Seen | None]:
        """Attributes of each path; None where nothing is. What may not be looked at is there, and no regular file."""
        return self._do(lambda s: [seen_in(reply) for reply in s.answers((LSTAT, string(path)) for path in paths)])

    def names(self, folder: bytes) -> list[bytes] | None:
        """All names in a folder but `.` and `..`; None where there is no such folder. ItemError: it cannot be read.

        One that ends in `/` is a folder of ours: a link in its place is not followed, its target is not ours to empty.
        """
        return self._do(lambda session: _names(session, folder))

    def put(self, path: bytes, source: BinaryIO) -> None:
        """Write an open file to a name that does not exist yet, and see by LSTAT that it is whole; else it is removed.

        ItemError: the site did not take it. Only `put-back` writes here.
        """
        self._do(lambda session: _put(session, path, source))

    def remove(self, paths: Sequence[bytes]) -> list[bool]:
        """True: nothing of that name is there any more. A path that ends in `/` is an empty folder to remove."""
        return self._do(lambda session: _removed(session, paths))

    def close(self) -> None:
        """Drop the connection; the next call makes a new one."""
        if self._connection:
            self._connection.close()
        self._received_before = self.received
        self._connection = self._session = None

    @property
    def received(self) -> int:
        """Bytes that came from the site so far."""
        session = self._session
        return self._received_before + (session.received if session else 0)

    def _do(self, work: Callable[[Session], T]) -> T:
        """One call's work, in the thread of a pull where one is under way; after an error the connection is closed."""
        try:
            if self._pulling:
                return self._pulling.post(work).result()
            if not (self._session and self._connection and self._connection.transport.is_active()):
                self.close()
                self._session = self._connected()
            return work(self._session)
        except ItemError:  # the site's answer
            raise
        except LOST as error:
            self.close()
            raise TransientError("drop_unreachable") from error
        except BaseException:
            self.close()
            raise

    def _connected(self) -> Session:
        wire = _Wire(fileno=socket.create_connection(self._address, self._connect_timeout).detach())
        wire.settimeout(self._connect_timeout)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._timeout * 1000))
        transport = paramiko.Transport(wire, default_window_size=WINDOW, default_max_packet_size=256 << 10)
        self._connection = _Connection(transport, min(self._timeout, self._connect_timeout) / 4)
        watch = self._connection.watch
        watch.due = time.monotonic() + self._connect_timeout
        return Session(self._logged_in(transport), self._timeout, watch)

    def _has_other_types(self) -> bool:
        """Whether the site shows a host key, and none of a type that is pinned."""
        kinds = [pin.get_name() for pin in self._pins]
        try:
            return shown_host_key(*self._address, kinds[0], self._connect_timeout).split()[0] not in kinds
        except TransientError:
            return False

    def _logged_in(self, transport: paramiko.Transport) -> paramiko.Channel:
        options = transport.get_security_options()
        options.ciphers = [name for mode in ("gcm", "ctr") for name in options.ciphers if mode in name]
        options.digests = [name for name in options.digests if "sha2" in name]
        options.key_types = [name for pin in self._pins for name in _signatures(pin.get_name())]
        transport.auth_timeout = transport.channel_timeout = 2 * self._connect_timeout  # the watchdog comes first
        try:
            transport.start_client(timeout=self._connect_timeout)
        except IncompatiblePeer as error:
            if self._has_other_types():
                raise SiteError("host_key_changed", "of another type") from error
            raise SiteError("drop_unreachable", "no algorithm in common: its SSH is too old") from error
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
        channel.in_buffer = Pieces()
        channel.invoke_subsystem("sftp")
        return channel


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


def _put(session: Session, path: bytes, source: BinaryIO) -> None:
    kind, body = session.ask(OPEN, string(path) + NEW_FILE)
    if kind != HANDLE:
        raise ItemError("refused", "the site does not let syncd write")
    handle = bytes(body)  # still with its length before it, as requests want it
    pieces = iter(lambda: source.read(READ_SIZE), b"")
    writing = ((WRITE, handle + U64.pack(n * READ_SIZE) + string(piece)) for n, piece in enumerate(pieces))
    codes = {number_at(body) for _, body in session.answers(writing)}
    session.ask(CLOSE, handle)
    seen = seen_in(session.ask(LSTAT, string(path)))
    if codes - {OK} or seen is None or seen.size != os.fstat(source.fileno()).st_size:
        session.ask(REMOVE, string(path))
        raise ItemError("refused", "the site did not take the whole file")


def _names(session: Session, folder: bytes) -> list[bytes] | None:
    found: list[bytes] = []
    if folder.endswith(b"/"):
        seen = seen_in(session.ask(LSTAT, string(folder.rstrip(b"/"))))
        if seen and stat.S_IFMT(seen.mode) not in (0, stat.S_IFDIR):
            raise ItemError("not_a_file")
    kind, body = session.ask(OPENDIR, string(folder or b"."))
    if kind == HANDLE:
        handle = bytes(body)
        while (reply := session.ask(READDIR, handle))[0] == NAME:
            found += names_in(reply[1])
        session.ask(CLOSE, handle)
        body = reply[1]
    if number_at(body) == NO_SUCH_FILE:
        return None
    if number_at(body) != EOF:
        raise ItemError("unreadable_on_drop")
    return [name for name in found if name not in (b".", b"..")]


def _removed(session: Session, paths: Sequence[bytes]) -> list[bool]:
    asked = [(RMDIR if path.endswith(b"/") else REMOVE, string(path.rstrip(b"/"))) for path in paths]
    answers = zip(asked, session.answers(asked), strict=True)
    codes = [(kind, path, number_at(body)) for (kind, path), (_, body) in answers]
    # of a folder, "no such file" is not believed: OpenSSH says so where something else bears the name, too
    return [
        code == OK or (code, kind) == (NO_SUCH_FILE, REMOVE) or not seen_in(session.ask(LSTAT, path))
        for kind, path, code in codes
    ]


def _signatures(kind: str) -> list[str]:
    """What a host key of this type may sign with."""
    return ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]


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
