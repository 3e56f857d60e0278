"""How the office writes to the SFTP site that a request names: over real SFTP, or into memory.

The vendor's client logs in with a password, checks no host key, makes missing folders level by level (stat, mkdir)
relative to the login folder, and writes straight to the final name: a reader can see a partial file.
"""

import posixpath
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import paramiko

from syncd.demo.clock import Clock

_SFTP_PORT = 22
_IDLE_SECONDS = 10.0
_CONNECT_SECONDS = 20.0
_NAME_BYTES = 255


class SiteError(Exception):
    """The site cannot be reached, refuses the login, or refuses the file."""


class FileRefused(SiteError):  # noqa: N818  (the site's doing)
    """The site lets the office in, and does not take this one file: a name too long, a folder of that name."""


@dataclass(frozen=True)
class Target:
    """Where a file goes: `path` is relative to the login folder, with `/`; it ends in `/` where no file name was
    given.
    """

    host: str
    port: int
    path: str
    username: str
    password: str

    @classmethod
    def parse(cls, address: str, username: str, password: str) -> "Target":
        """From `host[:port]/path/file.ext`. ValueError where there is no host, no path, or a scheme."""
        host, slash, path = address.partition("/")
        name, colon, port = host.partition(":")
        if not name or not slash or (colon and not port.isdigit()) or "//" in address:
            raise ValueError("SftpAddress is invalid")
        return cls(name, int(port) if colon else _SFTP_PORT, path, username, password)

    @property
    def file_name(self) -> str:
        """The last part of the path; empty for a folder."""
        return posixpath.basename(self.path)

    def named(self, file_name: str) -> "Target":
        """The same place with this file name in its folder."""
        return Target(
            self.host, self.port, posixpath.dirname(self.path) + "/" + file_name, self.username, self.password
        )


class Site(Protocol):
    """What the office does with an SFTP site; both methods raise SiteError."""

    def write(self, target: Target, chunks: Iterable[bytes], *, append: bool = False) -> None:
        """Write the file, making its folders; `append` goes on writing where an earlier call stopped."""
        ...

    def read(self, target: Target) -> bytes:
        """The file's bytes."""
        ...


@dataclass
class DropFile:
    """A file on the site in memory; `mtime` in seconds since the epoch."""

    data: bytes
    mtime: float


@dataclass
class MemoryDrop:
    """A site in memory, for one-thread tests with a simulated clock. Paths as in `files`: no leading slash.

    `down`: no connection. `objects`: files appear `appear_after` seconds later, as on object stores.
    """

    clock: Clock
    username: str = "opendental"
    password: str = "drop-password"  # noqa: S105  (a simulated site's)
    files: dict[str, DropFile] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    down: bool = False
    appear_after: float = 0.0
    logins: int = 0
    refused: int = 0

    def write(self, target: Target, chunks: Iterable[bytes], *, append: bool = False) -> None:
        """Write the file, visible from its first chunk on."""
        path = self._enter(target)
        for level in range(path.count("/")):
            self.folders.add("/".join(path.split("/")[: level + 1]))
        if path in self.folders or any(len(part.encode()) > _NAME_BYTES for part in path.split("/")):
            raise FileRefused("Failure")
        if self.appear_after:
            data = b"".join(chunks)
            self.clock.call_later(self.appear_after, lambda: self._put(path, data, append=append))
            return
        self._put(path, b"", append=append)
        for chunk in chunks:
            self._put(path, chunk, append=True)

    def read(self, target: Target) -> bytes:
        """The file's bytes."""
        path = self._enter(target)
        if path not in self.files:
            raise SiteError("No such file")
        return self.files[path].data

    def _put(self, path: str, data: bytes, *, append: bool) -> None:
        before = self.files[path].data if append and path in self.files else b""
        self.files[path] = DropFile(before + data, self.clock.now())

    def _enter(self, target: Target) -> str:
        if self.down:
            raise SiteError("Connection refused")
        if (target.username, target.password) != (self.username, self.password):
            self.refused += 1
            raise SiteError("Permission denied (password).")
        self.logins += 1
        return posixpath.normpath("/" + target.path).lstrip("/")


@dataclass
class _Login:
    """One logged-in connection, used by one thread at a time."""

    transport: paramiko.Transport
    client: paramiko.SFTPClient
    used_at: float


class SftpSite:
    """Any SFTP server. Keeps a login for some seconds; another password always means another login. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, int, str, str], list[_Login]] = {}

    def write(self, target: Target, chunks: Iterable[bytes], *, append: bool = False) -> None:
        """Write straight to the final name, making missing folders."""
        login = self._take(target)
        try:
            _make_folders(login.client, posixpath.dirname(target.path))
            with login.client.open(target.path, "ab" if append else "wb") as out:
                out.set_pipelined(True)
                for chunk in chunks:
                    out.write(chunk)
        except (PermissionError, FileNotFoundError) as error:
            self._give_back(target, login)
            raise FileRefused(str(error)) from error
        except (OSError, paramiko.SSHException, EOFError, ValueError) as error:
            alive = login.transport.is_active() and _is_status(error)
            login.transport.close()
            raise (FileRefused if alive else SiteError)(str(error) or "Failure") from error
        self._give_back(target, login)

    def read(self, target: Target) -> bytes:
        """The file's bytes."""
        login = self._take(target)
        try:
            with login.client.open(target.path, "rb") as source:
                found = source.read()
        except (OSError, paramiko.SSHException, EOFError, ValueError) as error:
            login.transport.close()
            raise SiteError(str(error) or "Failure") from error
        self._give_back(target, login)
        return found

    def close(self) -> None:
        """End all logins."""
        with self._lock:
            logins = [login for kept in self._idle.values() for login in kept]
            self._idle.clear()
        for login in logins:
            login.transport.close()

    def _take(self, target: Target) -> _Login:
        key = (target.host, target.port, target.username, target.password)
        with self._lock:
            kept = self._idle.get(key, [])
            while kept:
                login = kept.pop()
                if login.transport.is_active() and time.monotonic() - login.used_at < _IDLE_SECONDS:
                    return login
                login.transport.close()
        return _log_in(target)

    def _give_back(self, target: Target, login: _Login) -> None:
        login.used_at = time.monotonic()
        key = (target.host, target.port, target.username, target.password)
        with self._lock:
            self._idle.setdefault(key, []).append(login)


def _is_status(error: Exception) -> bool:
    """Whether the server answered with an SFTP status (paramiko: an OSError without a number), the link being sound."""
    return isinstance(error, OSError) and error.errno is None and not isinstance(error, TimeoutError | ConnectionError)


def _log_in(target: Target) -> _Login:
    try:
        link = socket.create_connection((target.host, target.port), timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise SiteError(str(error)) from error
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport = paramiko.Transport(link)
    try:
        transport.start_client(timeout=_CONNECT_SECONDS)
        transport.auth_password(target.username, target.password)
        channel = transport.open_session(timeout=_CONNECT_SECONDS)
        channel.settimeout(_CONNECT_SECONDS)
        channel.invoke_subsystem("sftp")
        client = paramiko.SFTPClient(channel)
    except (paramiko.SSHException, OSError, EOFError) as error:
        transport.close()
        raise SiteError(str(error) or "Connection closed") from error
    return _Login(transport, client, time.monotonic())


def _make_folders(client: paramiko.SFTPClient, folder: str) -> None:
    """Stat, then mkdir, on every level."""
    path = ""
    for part in folder.split("/"):
        path = posixpath.join(path, part)
        if not part:
            continue
        try:
            client.stat(path)
        except FileNotFoundError:
            client.mkdir(path)
