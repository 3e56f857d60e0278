"""Real SFTP sites for tests: OpenSSH's sshd on loopback, and a paramiko server that can misbehave on purpose."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from paramiko import SFTPAttributes, SFTPHandle, SFTPServer, SFTPServerInterface
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED
from paramiko.sftp import SFTP_EOF, SFTP_FAILURE, SFTP_NO_SUCH_FILE, SFTP_OK

SSHD = Path("/usr/sbin/sshd")
USER, PASSWORD = "opendental", "correct horse"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_key(path: Path, kind: str = "ed25519") -> Path:
    """A throw-away key pair: `path` and `path.pub`."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
    return path


def public_part(key: Path) -> str:
    """`ssh-ed25519 AAAA...`, as a configuration pins it."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


class OpenSshSite:
    """`sshd -D` with internal-sftp for whoever runs the tests, who logs in with `key` and lands in `root`."""

    def __init__(self, folder: Path, host_key_type: str = "ed25519", extra: str = "") -> None:
        assert SSHD.exists(), "these tests need OpenSSH's server: apt install openssh-server"
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation folder
        self.root = folder / "drop"
        self.root.mkdir()
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.key = make_key(folder / "login")
        self._host_key = make_key(folder / "host", host_key_type)
        self.host_key = public_part(self._host_key)
        self._folder, self._extra = folder, extra
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> OpenSshSite:
        for _ in range(5):  # another process may take the port between probe and start
            self.port = _free_port()
            config = self._folder / "sshd_config"
            config.write_text(self.configuration())
            log = (self._folder / "sshd.log").open("wb")
            self._process = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log, stdin=subprocess.DEVNULL)
            log.close()
            if self._answers():
                return self
        raise AssertionError("sshd did not start: " + (self._folder / "sshd.log").read_text())

    def configuration(self) -> str:
        """sshd_config for this port."""
        return (
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {self._host_key}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.key}.pub\nStrictModes no\nPasswordAuthentication no\n"
            f"PermitRootLogin yes\nSubsystem sftp internal-sftp\nForceCommand internal-sftp -d {self.root}\n"
            f"{self._extra}\n"
        )

    def _answers(self) -> bool:
        assert self._process
        end = time.monotonic() + 10
        while self._process.poll() is None and time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 2) as probe:
                    return probe.recv(4) == b"SSH-"
            except OSError:
                time.sleep(0.02)
        return False

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(10)


@dataclass
class TrickFile:
    """One file of a `TrickSite`. Each lstat takes the next (size, mtime) of `told`, the last one for ever.

    `read`: replaces what READ(offset, length) answers: bytes, or an SFTP error code.
    """

    content: bytes
    told: list[tuple[int, int]] = field(default_factory=list)
    read: Callable[[int, int], bytes | int] | None = None
    mode: int = 0o100600

    def attributes(self) -> SFTPAttributes:
        size, mtime = (
            (self.told.pop(0) if len(self.told) > 1 else self.told[0]) if self.told else (len(self.content), 7)
        )
        attributes = SFTPAttributes()
        attributes.st_size, attributes.st_mode = size, self.mode
        attributes.st_atime, attributes.st_mtime = mtime, mtime
        return attributes


class _Handle(SFTPHandle):
    def __init__(self, file: TrickFile) -> None:
        super().__init__()
        self._file = file

    def read(self, offset: int, length: int) -> bytes | int:
        if self._file.read:
            return self._file.read(offset, length)
        return self._file.content[offset : offset + length] or SFTP_EOF


class _Files(SFTPServerInterface):
    def __init__(self, server: paramiko.ServerInterface, *args: Any, site: TrickSite, **kwargs: Any) -> None:
        super().__init__(server, *args, **kwargs)
        self._site = site

    def lstat(self, path: str) -> SFTPAttributes | int:
        file = self._site.files.get("/" + path)
        return file.attributes() if isinstance(file, TrickFile) else file or SFTP_NO_SUCH_FILE

    def open(self, path: str, flags: int, attr: SFTPAttributes) -> SFTPHandle | int:
        self._site.opened.append(path)
        file = self._site.files.get("/" + path)
        return _Handle(file) if isinstance(file, TrickFile) else file or SFTP_NO_SUCH_FILE

    def remove(self, path: str) -> int:
        file = self._site.files.get("/" + path)
        if isinstance(file, TrickFile):
            del self._site.files["/" + path]
            return SFTP_OK
        return SFTP_FAILURE  # some sites do not tell "no such file" from other failures


class _Login(paramiko.ServerInterface):
    def __init__(self, site: TrickSite) -> None:
        self._site = site

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_auth_password(self, username: str, password: str) -> int:
        self._site.logins += 1
        if self._site.hang == "login":
            self._site.released.wait(30)
        good = (username, password) == (USER, PASSWORD)
        return AUTH_SUCCESSFUL if good else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_subsystem_request(self, channel: paramiko.Channel, name: str) -> bool:
        if self._site.hang == "subsystem":
            self._site.released.wait(30)
        return super().check_channel_subsystem_request(channel, name)


class TrickSite:
    """A paramiko SFTP server with password login, whose `files` (a name: a file, or an SFTP error) may play tricks.

    `hang`: at what it goes silent: banner, login, subsystem. `configure` sees each transport before it starts.
    """

    def __init__(self, hang: str = "", configure: Callable[[paramiko.Transport], None] = lambda _: None) -> None:
        self.files: dict[str, TrickFile | int] = {}
        self.opened: list[str] = []
        self.logins = self.connections = 0
        self.hang, self.released = hang, threading.Event()
        self._configure = configure
        self._key = paramiko.ECDSAKey.generate()
        self.host_key = f"{self._key.get_name()} {self._key.get_base64()}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._transports: list[paramiko.Transport] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(wire)
            if self.hang == "banner":
                continue
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport = paramiko.Transport(wire)
            transport.add_server_key(self._key)
            transport.set_subsystem_handler("sftp", SFTPServer, _Files, site=self)
            self._configure(transport)
            self._transports.append(transport)
            try:
                transport.start_server(server=_Login(self), event=threading.Event())
            except paramiko.SSHException:
                continue

    def cut(self) -> None:
        """Break every connection, as a firewall does."""
        wires, self._sockets = self._sockets, []
        transports, self._transports = self._transports, []
        for wire in wires:
            wire.close()
        for transport in transports:
            transport.close()

    def stop(self) -> None:
        self.released.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # also wakes the thread in accept
        self._listener.close()
        self.cut()
