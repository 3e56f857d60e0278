"""The line to the drop (C01, C03, C06, C07 of the catalogue): OpenSSH behind a proxy that cuts, drips, goes silent, or
waits while the file is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from syncd.demo.build import Past
from syncd.demo.simulation import Simulation
from syncd.drop import SftpDrop
from syncd.errors import ItemError, SyncdError, TransientError
from syncd.index import Index
from syncd.model import Pulled, PullJob
from syncd.wiring import load
from tests.sites import OpenSshSite
from tests.test_drop import open_ssh_drop
from tests.test_end_to_end import Site
from tests.world import START

KIB, MIB = 1024, 1024 * 1024
PIECE = 32 * KIB  # what one READ asks for
Kind = Literal["reset", "end", "silence", "drip"]


@dataclass(frozen=True)
class Fault:
    """What happens to one connection once `at` bytes went `down` to syncd (or up to the site).

    `reset` and `end` cut it, `silence` passes nothing more, `drip` goes on at 6 KB/s; `first` is called before.
    """

    kind: Kind | None
    at: int
    down: bool = True
    first: Callable[[], object] = lambda: None


@dataclass
class Wire:
    """A TCP proxy on loopback before `port`. Each connection takes the next of `faults`, none where there is none."""

    target: int
    faults: list[Fault] = field(default_factory=list)
    carried: list[dict[bool, int]] = field(default_factory=list)  # bytes of each connection, by `down`

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._stopped = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                fault = self.faults.pop(0) if self.faults else None
                threading.Thread(target=self._carry, args=(near, fault), daemon=True).start()

    def _carry(self, near: socket.socket, fault: Fault | None) -> None:
        carried = {True: 0, False: 0}
        self.carried.append(carried)
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target), 5) as far:
            near.settimeout(20)
            while not self._stopped.is_set():
                if fault and carried[fault.down] >= fault.at:
                    fault.first()
                    self._strike(fault, near, far)
                    fault = None
                for source in select.select([near, far], [], [], 0.05)[0]:
                    down = source is far
                    left = fault.at - carried[down] if fault and fault.down == down else 64 * KIB
                    content = source.recv(min(64 * KIB, max(1, left)))
                    if not content:
                        return
                    (near if down else far).sendall(content)
                    carried[down] += len(content)

    def _strike(self, fault: Fault, near: socket.socket, far: socket.socket) -> None:
        if fault.kind == "silence":
            self._stopped.wait(30)
        elif fault.kind == "drip":
            while content := far.recv(64):
                near.sendall(content)
                time.sleep(0.01)
        elif fault.kind:
            if fault.kind == "reset":
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionAbortedError

    def stop(self) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSshSite]:
    site = OpenSshSite(tmp_path_factory.mktemp("sshd"))
    try:
        yield site.start()
    finally:
        site.stop()


@pytest.fixture
def wire(sshd: OpenSshSite) -> Iterator[Wire]:
    wire = Wire(sshd.port)
    yield wire
    wire.stop()


@pytest.fixture
def box(sshd: OpenSshSite, tmp_path: Path) -> Path:
    """A folder of its own on the site, seen from the server's side."""
    folder = sshd.root / tmp_path.name
    folder.mkdir()
    return folder


def through(wire: Wire, sshd: OpenSshSite) -> SftpDrop:
    return open_ssh_drop(sshd, port=wire.port, timeout=1.0, connect_timeout=1.5)


def pull(drop: SftpDrop, file: Path, local: Path) -> Pulled | SyncdError:
    """One file of the site; a site that cannot even be reached is an outcome as well."""
    try:
        (outcome,) = drop.pull([PullJob(f"{file.parent.name}/{file.name}".encode(), local, 100 * MIB)])
    except TransientError as error:
        return error
    finally:
        drop.close()
    return outcome


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- C06, C07: the connection


def requests_in_bytes(wire: Wire, sshd: OpenSshSite, file: Path, local: Path) -> int:
    """Bytes that go up to the site for a whole pull; the same each time, which those that come down are not."""
    assert isinstance(pull(through(wire, sshd), file, local), Pulled)
    local.unlink()
    return wire.carried[-1][False]


@pytest.mark.parametrize("kind", ["reset", "end"])
def test_connection_cut_at_any_byte_leaves_no_part_and_the_next_pull_is_whole(
    wire: Wire, sshd: OpenSshSite, box: Path, tmp_path: Path, kind: Kind
) -> None:
    content, file, local = os.urandom(5 * PIECE + 17), box / "a.jpg", tmp_path / "local"
    file.write_bytes(content)
    last = requests_in_bytes(wire, sshd, file, local)
    points = [Fault(kind, at) for at in (0, 1, *range(PIECE, len(content), PIECE))]
    points += [Fault(kind, at, down=False) for at in (0, 1, last // 2, last - 1, last)]
    for fault in points:
        wire.faults = [fault]
        outcome = pull(through(wire, sshd), file, local)
        assert isinstance(outcome, TransientError), fault
        assert not wire.faults, "no connection was made"
        assert list(tmp_path.iterdir()) == [], fault
        again = pull(through(wire, sshd), file, local)
        assert isinstance(again, Pulled), fault
        assert again.sha256 == sha(local.read_bytes()) == sha(content)
        local.unlink()


@pytest.mark.parametrize(
    "fault",
    [*(Fault("silence", at) for at in (0, 1, 100_000)), Fault("silence", 1_600, down=False), Fault("drip", 100_000)],
    ids=lambda fault: f"{fault.kind} {fault.at}",
)
def test_half_open_or_dripping_connection_is_given_up_in_time(
    wire: Wire, sshd: OpenSshSite, box: Path, tmp_path: Path, fault: Fault
) -> None:
    content, file, local = os.urandom(20 * PIECE), box / "a.jpg", tmp_path / "local"
    file.write_bytes(content)
    wire.faults = [fault]
    began = time.monotonic()
    assert isinstance(pull(through(wire, sshd), file, local), TransientError)
    assert time.monotonic() - began < 5.0
    assert list(tmp_path.iterdir()) == []
    assert isinstance(pull(through(wire, sshd), file, local), Pulled)
    assert local.read_bytes() == content


@pytest.mark.slow
def test_backfill_over_a_line_that_keeps_breaking_archives_everything_once(tmp_path: Path) -> None:
    past = Past(documents=4.0, sheets=1.0, hostile_names=0.0, urls=0.0, deleted=0.0)
    with Simulation.start(6, 1, 0.005, tmp_path / "site", past=past) as simulation:
        wire = Wire(simulation.outside.port)
        (tmp_path / "archive").mkdir()
        config = simulation.write_config(tmp_path / "main", tmp_path / "archive", drop={"port": wire.port})
        mirror = Site(simulation, config, load(config, {}))
        mirror.settings.state_path.mkdir(mode=0o700)
        cuts = [Fault("reset", at) for at in (0, 1, 900, *range(2_000, 200_000, 11_000))]
        wire.faults = list(cuts)
        assert mirror.finish() == 0
        wire.stop()
        assert len(cuts) - len(wire.faults) >= 10, "hardly any connection was cut"
        assert mirror.wrong() == []
        assert mirror.log.events("state_changed")
        with contextlib.closing(Index(mirror.settings.state_path / "index.db")) as index:
            assert index.value("SELECT count(*) FROM version WHERE version > 1") == 0
            assert index.value("SELECT count(*) FROM attempt") == 0
        assert simulation.sftp is not None
        assert list((simulation.sftp.root / "syncd").iterdir()) == []


# --- C01, C03: a file that does not hold still, read through OpenSSH

MEDDLING: dict[str, Callable[[Path], object]] = {
    "grows": lambda file: file.open("ab").write(b"more" * 10_000),
    "grows by one byte": lambda file: file.open("ab").write(b"x"),
    "shrinks": lambda file: os.truncate(file, 3 * MIB),
    "becomes empty": lambda file: os.truncate(file, 0),
    "is rewritten in place": lambda file: file.open("r+b").write(b"another patient's"),
    "is replaced by one of the same size": lambda file: file.with_name("new").rename(file),
    "is removed": lambda file: file.unlink(),
    "becomes a link": lambda file: file.with_name("link").rename(file),
}


@pytest.mark.parametrize("meddle", MEDDLING)
def test_file_that_changes_while_openssh_serves_it_is_not_taken(
    wire: Wire, sshd: OpenSshSite, box: Path, tmp_path: Path, meddle: str
) -> None:
    file, local = box / "a.jpg", tmp_path / "local"
    for path in (file, box / "new"):
        path.write_bytes(os.urandom(8 * MIB))
    os.utime(file, (START, START))
    (box / "link").symlink_to("new")
    wire.faults = [Fault(None, 2 * MIB, first=lambda: MEDDLING[meddle](file))]
    outcome = pull(through(wire, sshd), file, local)
    assert isinstance(outcome, ItemError), outcome
    assert outcome.failure == "changed_while_read"
    assert list(tmp_path.iterdir()) == []
