"""One real cycle on a tiny practice, in stages, each a life of the mirror's process: start, work until rest, end.

The mirror may live in another process than the office, the drop and the practice (`Outside`, `join`): when it dies,
they have what they had. From stage to stage the practice changes, so that all together hold: the first backfill
(index and archive made, an uploaded note), a new document, new bytes, a new revision with equal bytes, a changed sheet,
a mount with images, a move into it, an unanswered placement and its cleaning, a vanished document, and an index put
back from a copy, which adopts what the archive has.
"""

from __future__ import annotations

import copy
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast

from syncd import guards
from syncd.demo.clock import SimulatedClock
from syncd.demo.office import Office
from syncd.demo.practice import Practice
from syncd.demo.site import MemoryDrop
from syncd.demo.wire import Request, Response
from syncd.schema import Row
from syncd.scrub import reindex
from syncd.wiring import open_archive
from tests.world import START, DropInMemory, Expected, RecordedLog, World

DAY = 86_400.0
HOUR = 3600.0
FEW = 2  # known documents that a start asks for, instead of 20: what is asked is not what is kept
JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000") + b"a scan from the phone" + bytes.fromhex("ffd9")


@dataclass(frozen=True)
class Stage:
    """What happens before the mirror starts, and how long it goes on once it has nothing more to do.

    `first`: a command that is given on the mirror's machine before.
    """

    name: str
    happens: Callable[[World], None]
    hours: float = 0.0
    first: Callable[[World], None] = lambda _: None


class Cycle:
    """The tiny practice of one seed. `start` gives its mirror, which has not begun; then take the `stages` in order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.practice = Practice(SimulatedClock(START), "America/Chicago", seed=seed, in_database=seed % 3 == 2)
        practice = self.practice
        with practice.as_of(START - 40 * DAY):
            self.patient, self.other = practice.add_patient(), practice.add_patient("Beispiel", "Erika")
            self.document = practice.add_document(self.patient, ("jpg", "png", "tif")[seed % 3])
            self.letter = practice.add_document(self.other, "pdf")
            self.mount = practice.add_mount(self.patient, 2)
            self.sheet = practice.add_sheet(self.other)
            practice.add_raw_document(self.other, JPEG)

    def start(self, folder: Path) -> World:
        """The mirror's folders, empty, and what belongs to them; every other seed is a backfill, the rest daemons."""
        world = World.start(folder, practice=self.practice, backfill=self.seed % 2 == 0, interval=30.0)
        world.stop()
        for name in ("state", "archive"):
            shutil.rmtree(folder / name)
        (folder / "archive").mkdir()
        world.first_nap, world.nap = 30.0, HOUR
        world.expected = Noted()
        return world

    def stages(self) -> Iterator[Stage]:
        """In order; each expects that the ones before were lived through."""
        yield Stage("first backfill", lambda _: None)
        yield Stage("documents change", self._documents_change)
        yield Stage("a mount changes", self._mount_changes)
        yield Stage("an answer is lost", self._answer_is_lost, hours=1.5)
        yield Stage("a document is deleted", self._document_is_deleted)
        yield Stage("a document vanishes", self._a_day_passes)
        yield Stage("an old index is put back", self._index_is_put_back)

    def _documents_change(self, world: World) -> None:
        _copy_index(world, "index.db", "old.db")
        with self._a_while_ago(world):
            self.new = self.practice.add_document(self.other, "png")
            self.practice.replace_bytes(self.document)
            self.practice.edit_document(self.letter)
            self.practice.edit_sheet(self.sheet)

    def _mount_changes(self, world: World) -> None:
        with self._a_while_ago(world):
            self.practice.change_mount(self.mount)
            self.practice.move_into_mount(self.document, self.mount)

    def _answer_is_lost(self, world: World) -> None:
        with self._a_while_ago(world):
            self.practice.replace_bytes(self.new)
        words = {"path": "/documents/DownloadSftp", "params": {"DocNum": self.new}}
        world.office.faults.add("gateway_timeout", when="after", seconds=60.0, **words)

    def _document_is_deleted(self, world: World) -> None:
        world.clock.advance(HOUR)
        self.practice.delete_document(self.letter)

    def _a_day_passes(self, world: World) -> None:
        world.clock.advance(1.1 * DAY)

    def _index_is_put_back(self, world: World) -> None:
        world.clock.advance(HOUR)
        _copy_index(world, "old.db", "index.db")

    def _a_while_ago(self, world: World) -> Any:
        """An hour passes; what is done inside is half an hour old: no stamp is young enough to be fetched once more."""
        world.clock.advance(HOUR)
        return self.practice.as_of(world.clock.now() - 1800.0)


def sync(*paths: Path) -> None:
    """What was done by hand is durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _copy_index(world: World, name: str, copy: str) -> None:
    """Of a mirror that has ended: its index is one file then."""
    state = world.settings.state_path
    assert not list(state.glob("index.db-*")), "the index was not closed"
    shutil.copyfile(state / name, state / copy)
    sync(state / copy, state)


def _lose_index(world: World) -> None:
    for path in world.settings.state_path.glob("index.db*"):
        path.unlink()
    sync(world.settings.state_path)


def _rebuild_index(world: World) -> None:
    """`syncd reindex`, where there is no index."""
    if not (world.settings.state_path / "index.db").exists():
        reindex(world.settings, open_archive(world.settings), world.clock.now())


REINDEXING: Final = Stage("reindexing", _lose_index, first=_rebuild_index)  # after all others


def live(world: World, stage: Stage) -> None:
    """One life of the mirror's process: start, work until rest, end."""
    stage.first(world)
    world.restart(since=world.clock.now())
    world.run()
    if stage.hours:
        world.run(hours=stage.hours)
    world.stop()


class SilentTimer(threading.Timer):
    """A deadline in real time, which nothing here comes near; a thread a request would cost more than the request."""

    def start(self) -> None:
        """No thread."""


def quicken(probes: int = FEW) -> None:
    """This process and its children live many lives: none of them waits for what proves nothing here."""
    threading.Timer = SilentTimer  # type: ignore[misc]  # for this process and its children
    guards.PROBED_ITEMS = probes


class Moment:
    """Clock, office, drop and what was noted, as they are now: `back` puts them so again, once, with no mirror alive.

    Staff do nothing in between, so the practice stays as it is but for its count of renderings.
    """

    def __init__(self, world: World) -> None:
        parts: tuple[tuple[object, tuple[str, ...], Callable[[Any], Any]], ...] = (
            (world.clock, ("_now", "_skew", "_due"), copy.copy),
            (world.practice, ("_renderings",), copy.copy),
            (world.site, ("folders",), copy.copy),
            (world.site, ("files",), copy.deepcopy),  # the office adds to a file
            (world.office, ("arrivals",), copy.copy),
            (world.office.faults, ("_all", "_rng"), copy.deepcopy),  # they count
            (world.expected, ("kept",), copy.copy),
            (world.log, ("lines",), copy.copy),
            (world, ("scope",), copy.copy),
        )
        self._kept = [(part, name, copied(getattr(part, name))) for part, names, copied in parts for name in names]

    def back(self) -> None:
        """Everything is as it was."""
        for part, name, value in self._kept:
            setattr(part, name, value)


class Noted(Expected):
    """`Expected` that looks again only once something happened in the practice."""

    def __init__(self) -> None:
        super().__init__()
        self._events = -1

    def note(self, practice: Practice) -> None:
        if self._events != len(practice.history):
            self._events = len(practice.history)
            super().note(practice)


# --- the mirror in another process than the world around it


class Outside:
    """Office, drop and log of a world, served to a mirror in another process until that ends."""

    def __init__(self, world: World) -> None:
        self._world = world

    def serve(self, line: Connection) -> None:
        """Answer until the other end is closed."""
        while self.serve_one(line):
            pass

    def serve_one(self, line: Connection) -> bool:
        """Answer one call, or tell that the other end is closed; the clock follows the mirror's."""
        try:
            now, name, arguments = line.recv()
        except (EOFError, ConnectionResetError):
            return False
        clock = self._world.clock
        clock.advance(max(0.0, now - clock.now()))
        answer = self._answer(name, arguments)
        line.send((clock.now(), answer))
        return True

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> object:
        if name == "request":
            return self._world.office.handle(*arguments)
        if name == "log":
            self._world.log.lines.append(*arguments)
            return None
        part, method, *rest = arguments
        answer = getattr(getattr(self._world.site, part), method)(*rest)
        return list(answer) if method == "__iter__" else answer


class Line:
    """The mirror's end: every call carries its time there, and brings the outside's time back."""

    def __init__(self, connection: Connection, clock: SimulatedClock) -> None:
        self._connection, self._clock = connection, clock

    def call(self, name: str, *arguments: object) -> Any:
        """What the outside answers."""
        self._connection.send((self._clock.now(), name, arguments))
        now, answer = self._connection.recv()
        self._clock.advance(max(0.0, now - self._clock.now()))
        return answer


class FarOffice:
    """As much of an `Office` as the API's adapter and a World need."""

    def __init__(self, near: Office, line: Line) -> None:
        self.clock, self.site, self.faults, self.practice = near.clock, near.site, near.faults, near.practice
        self.developer_key, self.customer_key = near.developer_key, near.customer_key
        self.arrivals = list(near.arrivals)
        self._line = line

    def handle(self, request: Request) -> Response:
        """The office's answer."""
        self.arrivals.append(None)  # type: ignore[arg-type]  # only their number is looked at
        answer: Response = self._line.call("request", request)
        return answer


class _FarNames:
    """The files or the folders on the drop."""

    def __init__(self, line: Line, part: str) -> None:
        self._line, self._part = line, part

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._line.call("site", self._part, method, *arguments)

    def __contains__(self, name: str) -> bool:
        return bool(self._line.call("site", self._part, "__contains__", name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._line.call("site", self._part, "__iter__"))


class FarSite:
    """As much of a `MemoryDrop` as a `DropInMemory` needs."""

    down = False

    def __init__(self, line: Line) -> None:
        self.files, self.folders = _FarNames(line, "files"), _FarNames(line, "folders")


class FarLog(RecordedLog):
    """A log that somebody outside reads as it is written."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def _keep(self, level: str, event: str, ids: Row) -> None:
        super()._keep(level, event, ids)
        self.tell({name: value for name, value in self.lines[-1].items() if name != "exc_info"})

    def tell(self, seen: Row) -> None:
        """Something for the observer alone: it has no `event`."""
        self._line.call("log", seen)


def join(world: World, connection: Connection) -> None:
    """Let this process's world have its outside at the other end of a connection."""
    line = Line(connection, world.clock)
    world.office = cast("Office", FarOffice(world.office, line))
    world.drop = DropInMemory(cast("MemoryDrop", FarSite(line)))
    world.log = FarLog(line)
