"""An SFTP site inside this process: password and public keys, one folder as its root."""

import logging
import os
import posixpath
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko
from paramiko import SFTPAttributes, SFTPHandle, SFTPServer, SFTPServerInterface
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_SUCCEEDED,
)
from paramiko.sftp import SFTP_FAILURE, SFTP_OK

_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class _OpenFile(SFTPHandle):
    """A file opened by a client; `filename` is its path on this machine."""

    def __init__(self, flags: int, path: Path, stream: Any) -> None:
        super().__init__(flags)
        self.readfile = stream
        self.writefile = stream
        self.filename = str(path)

    def stat(self) -> SFTPAttributes | int:
        return SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))

    def chattr(self, attr: SFTPAttributes) -> int:
        SFTPServer.set_file_attr(self.filename, attr)
        return SFTP_OK


class _Files(SFTPServerInterface):
    """File operations below one root; a client cannot name anything outside."""

    def __init__(self, server: paramiko.ServerInterface, *args: Any, root: Path, **kwargs: Any) -> None:
        super().__init__(server, *args, **kwargs)
        self._root = root

    def _path(self, path: str) -> Path:
        inside = posixpath.normpath("/" + path).lstrip("/")
        return self._root / inside if inside else self._root

    def list_folder(self, path: str) -> list[SFTPAttributes] | int:
        try:
            with os.scandir(self._path(path)) as entries:
                return [SFTPAttributes.from_stat(e.stat(follow_symlinks=False), e.name) for e in entries]
        except OSError as error:
            return _code(error)

    def stat(self, path: str) -> SFTPAttributes | int:
        try:
            return SFTPAttributes.from_stat(self._path(path).stat())
        except OSError as error:
            return _code(error)

    def lstat(self, path: str) -> SFTPAttributes | int:
        try:
            return SFTPAttributes.from_stat(self._path(path).lstat())
        except OSError as error:
            return _code(error)

    def open(self, path: str, flags: int, attr: SFTPAttributes) -> SFTPHandle | int:  # noqa: ARG002  (paramiko's)
        mode = {os.O_RDONLY: "rb", os.O_WRONLY: "wb"}.get(flags & _ACCESS, "r+b")
        if flags & os.O_APPEND:
            mode = "ab"
        try:
            descriptor = os.open(self._path(path), flags, 0o600)
            stream = os.fdopen(descriptor, mode)
        except OSError as error:
            return _code(error)
        return _OpenFile(flags, self._path(path), stream)

    def remove(self, path: str) -> int:
        return _done(self._path(path).unlink)

    def rename(self, oldpath: str, newpath: str) -> int:
        if self._path(newpath).exists():
            return SFTP_FAILURE
        return _done(lambda: self._path(oldpath).rename(self._path(newpath)))

    def posix_rename(self, oldpath: str, newpath: str) -> int:
        return _done(lambda: self._path(oldpath).replace(self._path(newpath)))

    def mkdir(self, path: str, attr: SFTPAttributes) -> int:  # noqa: ARG002  (paramiko's)
        return _done(lambda: self._path(path).mkdir(0o700))

    def rmdir(self, path: str) -> int:
        return _done(self._path(path).rmdir)

    def chattr(self, path: str, attr: SFTPAttributes) -> int:
        return _done(lambda: SFTPServer.set_file_attr(str(self._path(path)), attr))


def _code(error: OSError) -> int:
    return SFTPServer.convert_errno(error.errno or 0)


def _done(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return _code(error)
    return SFTP_OK


class _Door(paramiko.ServerInterface):
    """Who may log in."""

    def __init__(self, site: "SftpServer") -> None:
        self._site = site

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002  (paramiko's)
        return "password,publickey" if self._site.authorized_keys else "password"

    def check_auth_password(self, username: str, password: str) -> int:
        return self._site.admit(username == self._site.username and password == self._site.password)

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return self._site.admit(username == self._site.username and key in self._site.authorized_keys)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        del chanid
        return OPEN_SUCCEEDED if kind == "session" else OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED


class SftpServer:
    """An SFTP server on a loopback port, in threads. `root`: an existing folder, which is also the login folder.

    `username`, `password`, `authorized_keys` may be switched while it runs. `connections`, `logins`, `refused`:
    counted since the start. `public_host_key_line`: the host key as it stands in a known_hosts file, without the
    host.
    """

    def __init__(
        self,
        root: Path,
        username: str = "opendental",
        password: str = "drop-password",  # noqa: S107  (a simulated site's)
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        authorized_keys: Sequence[paramiko.PKey] = (),
    ) -> None:
        logging.getLogger("paramiko").addHandler(logging.NullHandler())
        self.root = root
        self.username = username
        self.password = password
        self.authorized_keys = list(authorized_keys)
        self.connections = 0
        self.logins = 0
        self.refused = 0
        self._host_key = paramiko.ECDSAKey.generate()
        self._transports: list[paramiko.Transport] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, port))
        self.host, self.port = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="sftp", daemon=True)
        self._thread.start()

    def rebuild(self) -> None:
        """As if the server was made anew: from now on it shows another host key."""
        self._host_key = paramiko.ECDSAKey.generate()

    @property
    def public_host_key_line(self) -> str:
        """The type of the host key and the key, as in `ecdsa-sha2-nistp256 AAAA...`."""
        return f"{self._host_key.get_name()} {self._host_key.get_base64()}"

    def admit(self, welcome: bool) -> int:
        """Count a login attempt and answer it in paramiko's terms."""
        with self._lock:
            self.logins += welcome
            self.refused += not welcome
        return AUTH_SUCCESSFUL if welcome else AUTH_FAILED

    def disconnect_all(self) -> None:
        """Break every open connection; new ones are welcome."""
        with self._lock:
            transports, self._transports = self._transports, []
        for transport in transports:
            transport.close()

    def stop(self) -> None:
        """End the server and its connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.disconnect_all()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(link,), name="sftp-login", daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        transport = paramiko.Transport(link)
        transport.add_server_key(self._host_key)
        transport.set_subsystem_handler("sftp", SFTPServer, _Files, root=self.root)
        with self._lock:
            self.connections += 1
            self._transports = [old for old in self._transports if old.is_active()]
            self._transports.append(transport)
        try:
            transport.start_server(server=_Door(self))
        except (paramiko.SSHException, EOFError, OSError):
            transport.close()
