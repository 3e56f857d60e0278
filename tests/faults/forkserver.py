"""A process that imports everything once and forks a mirror for every point: it dies there, or its disk fails there.

    LD_PRELOAD=libfault.so python -m tests.faults.forkserver kills --seeds 0 1 2 --shard 0 --shards 8

Who lives where: this process has office, drop, practice and the measure, and makes the cycle's states, one after the
other. For each point it forks a mirror, which is armed and reaches the rest through a pipe. When that has ended, a new
mirror starts in this process on what is on the disk, sweeps once, and is checked; then folders and outside are put back
as they were. The last line printed is a JSON object: `Report`.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, cast

from syncd.errors import REASONS, SyncdError
from syncd.schema import Row
from tests.faults.cycle import HOUR, Cycle, FarLog, Moment, Outside, Stage, join, live
from tests.faults.injection import KILLED, Injection
from tests.world import World

CODES: Final = (errno.EIO, errno.ENOSPC, errno.EROFS)
SECONDS: Final = 20  # of real time that one life may take; then it hangs
FAULTY: Final = 1200.0  # simulated seconds that a disk fails "for ever"
PATIENCE: Final = 3 * 24 * HOUR  # simulated seconds until a mirror whose disk works is at rest
STEPS: Final = 4000  # rounds of turns until rest; more are a loop
RESTARTED_AFTER: Final = 5.0  # simulated seconds from the end of a process to the start of the next
PAIR_SEEDS: Final = 5
RECOVERY_CALLS: Final = 120  # a second crash comes within so many calls of the recovery


@dataclass(frozen=True)
class Point:
    """Where it strikes: the n-th call of a seed's stage, counted from 1.

    A crash: `torn` after half of the write; `second`: and once more at that call of the recovery (0: no). A failing
    disk: `code`, an errno; `lasting`; `restarted`: the process ends, too, and comes back once the disk works.
    """

    seed: int
    stage: int
    call: int
    torn: int = 0
    second: int = 0
    code: int = 0
    lasting: int = 0
    restarted: int = 1

    def __str__(self) -> str:
        return ":".join(map(str, astuple(self)))

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that `str` wrote."""
        return cls(*map(int, text.split(":")))


@dataclass
class Report:
    """What one run of the server saw. `calls`: of the undisturbed cycles. `violations`: a point, and what was wrong."""

    points: int = 0
    struck: int = 0
    calls: int = 0
    writes: int = 0
    syncs: int = 0
    named: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    violations: list[tuple[str, str]] = field(default_factory=list)


class SilentTimer(threading.Timer):
    """A deadline in real time, which nothing here comes near; a thread a request would cost more than the request."""

    def start(self) -> None:
        """No thread."""


Plan = Callable[[int, int, str], Iterator[Point]]


# --- the mirror's process


def mirror(world: World, stage: Stage, connection: Connection, point: Point, injection: Injection) -> None:
    """One life with a crash ahead, or with a disk that fails; never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        join(world, connection)
        if point.code:
            endure(world, stage, point, injection)
        else:
            injection.die_at(point.call, bool(point.torn))
            live(world, stage)
            kinds = injection.kinds()
            injection.disarm()
            _tell(world, {"calls": kinds})
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, the observer tells it
        injection.disarm()
        _tell(world, {"uncaught": traceback.format_exc(limit=-12)})
        os._exit(1)


def endure(world: World, stage: Stage, point: Point, injection: Injection) -> None:
    """Work on a disk that fails at this point; then end at once, or go on once it works again, until rest."""
    injection.fail_at(point.call, point.code, bool(point.lasting))
    named = serve(world, stage, PATIENCE, until=lambda: bool(point.lasting and injection.failed))
    if point.lasting and "start" not in named:
        named += serve(world, stage, FAULTY, started=True)
    ending = "start" not in named and (bool(point.restarted) or not injection.failed)  # not met yet: in the end, then
    if ending:
        named += stop(world)
    injection.disarm()
    seen = {"named": sorted(set(named)), "failed": injection.failed, "resynced": injection.resynced}
    seen["calls"] = injection.kinds()
    seen["swept"] = not ending and "start" not in named
    _tell(world, seen)
    if not seen["swept"]:
        return
    since = world.clock.now()
    healed = serve(world, stage, PATIENCE, started=True)
    assert at_rest(world, since), f"never at rest again: {sorted(set(healed))}"
    world.stop()


def stop(world: World) -> list[str]:
    """An orderly end; the reason, where the disk does not let it be one."""
    try:
        world.stop()
    except SyncdError as error:
        return [_name_of(error)]
    return []


def _tell(world: World, seen: Row) -> None:
    cast("FarLog", world.log).tell(seen)  # since `join`


def serve(
    world: World, stage: Stage, seconds: float, *, started: bool = False, until: Callable[[], bool] = lambda: False
) -> list[str]:
    """Turns as the daemon takes them: an error of ours takes a turn, not the process. The reasons of those errors.

    It ends when every list was polled and all work is done, or after so many simulated seconds, or `until` something.
    `started`: it goes on with the lanes that there are.
    """
    named: list[str] = []
    since = world.clock.now()
    if not started:
        try:
            world.restart(since=world.clock.now())
        except SyncdError as error:  # the verb ends with its exit code, and the unit starts it again
            return [_name_of(error), "start"]
    end, idle = world.clock.now() + seconds, 0.5
    rests_at = world.clock.now() + stage.hours * HOUR
    for _ in range(STEPS):
        before = (len(world.office.arrivals), world.drop.calls)
        for turn in (world.lanes.api_lane.turn, world.lanes.pull_lane.turn):
            try:
                turn(world.clock.now())
            except SyncdError as error:
                named.append(_name_of(error))
        busy = (len(world.office.arrivals), world.drop.calls) != before
        if until() or world.clock.now() >= end or (world.clock.now() >= rests_at and at_rest(world, since)):
            return named + troubles(world)
        idle = 0.5 if busy else min(2 * idle, HOUR)
        world.clock.advance(min(30.0, max(0.0, end - world.clock.now())) if busy else idle)
    raise AssertionError(f"no end in sight: {sorted(set(named))}")


def _name_of(error: SyncdError) -> str:
    return str(getattr(error, "reason", type(error).__name__))


def at_rest(world: World, since: float) -> bool:
    """Whether nothing is left to do, nothing is known to be wrong, and every list was polled after that time."""
    unread = "SELECT 1 FROM list JOIN patient USING (pat_num) WHERE left_at IS NULL AND polled_at < ?"
    try:
        return world.at_rest() and not troubles(world) and not world.index.value(unread, since)
    except SyncdError:
        return False


def troubles(world: World) -> list[str]:
    """The reasons that `status` would tell."""
    try:
        return [row["reason"] for row in world.index.rows("SELECT reason FROM site")]
    except SyncdError as error:
        return [_name_of(error)]


# --- the world around it


def strike(world: World, stage: Stage, point: Point, injection: Injection) -> Row:
    """Let a mirror live and end, restart it, let it sweep, and check; what was seen. Raises for what is wrong."""
    lines = len(world.log.lines)
    status = outlive(world, stage, point, injection)
    told = {key: value for line in world.log.lines[lines:] if "event" not in line for key, value in line.items()}
    assert "uncaught" not in told, f"uncaught: {told['uncaught']}"
    assert status in (0, KILLED), f"the mirror ended with {status}"
    if point.second:
        world.clock.advance(RESTARTED_AFTER)
        outlive(world, Stage("recovery", stage.happens), replace(point, call=point.second, torn=0), injection)
    if point.code:
        assert not told["resynced"], "a file was synced again after its sync had failed"
        assert set(told["named"]) <= REASONS.keys() | {"start"}, told["named"]
    judge(world, lines, swept=bool(told.get("swept")))
    return {**told, "struck": bool(told.get("failed")) or status == KILLED}


def outlive(world: World, stage: Stage, point: Point, injection: Injection) -> int:
    """Fork a mirror and be the world around it until it ends; its exit status."""
    here, there = Pipe()
    child = os.fork()
    if child == 0:
        here.close()
        mirror(world, stage, there, point, injection)
    there.close()
    Outside(world).serve(here)
    here.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def judge(world: World, lines: int, *, swept: bool) -> None:
    """Restart on what is left, sweep once, check. `lines`: of the log, before the mirror that ended wrote any."""
    sql = "SELECT seq, pat_num, kind, num, version, sidecar, revision, sha256, path FROM version ORDER BY seq"
    world.clock.advance(RESTARTED_AFTER)
    files = published(world.archive)
    world.restart(backfill=True, since=world.clock.now())
    rows = world.index.rows(sql)
    if not swept:
        world.run()
    world.check()
    now = {row["seq"]: row for row in world.index.rows(sql)}
    lost = [row["path"] for row in rows if now.get(row["seq"]) != row]
    assert not lost, f"recorded once, and not any more: {lost}"
    said = {line["seq"] for line in world.log.lines[lines:] if line.get("event") == "document_archived"}
    assert said <= now.keys(), f"said to be archived: {sorted(said - now.keys())}"
    assert world.index.value("PRAGMA integrity_check") == "ok"
    changed = files.items() - published(world.archive).items()
    assert not changed, f"published once, and not the same any more: {sorted(changed)}"
    assert not list((world.archive / "incoming").iterdir()), "incoming/ is not empty"
    world.stop()


def published(archive: Path) -> dict[str, tuple[int, int, int]]:
    """Every version's file: its inode, size and time of change."""
    found = {}
    for path in archive.glob("patients/*/*/*"):
        if path.suffix != ".json":
            seen = path.lstat()
            found[str(path.relative_to(archive))] = (seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return found


# --- the server


class Server:
    """Goes through the stages of a seed and strikes at every planned point, each time on a fresh copy."""

    def __init__(self, folder: Path, injection: Injection, code: int) -> None:
        self.report = Report()
        self._code = code  # of a disk that fails; 0: crashes
        self._live, self._kept, self._injection = folder / "live", folder / "kept", injection

    def sweep(self, seed: int, plan: Plan) -> None:
        """Every planned point of one seed."""
        cycle = Cycle(seed)
        shutil.rmtree(self._live, ignore_errors=True)
        world = cycle.start(self._live)
        for number, stage in enumerate(cycle.stages()):
            stage.happens(world)
            shutil.rmtree(self._kept, ignore_errors=True)
            shutil.copytree(self._live, self._kept)
            moment = Moment(world)
            gc.collect()
            gc.freeze()
            undisturbed = self._struck(world, stage, Point(seed, number, 0, code=self._code), moment)
            assert "wrong" not in undisturbed, undisturbed["wrong"]
            kinds = str(undisturbed["calls"])
            self._count(kinds)
            for point in plan(seed, number, kinds):
                self._note(point, self._struck(world, stage, point, moment))
            live(world, stage)
            world.restart()
            world.check()
            world.stop()

    def _count(self, kinds: str) -> None:
        self.report.calls += len(kinds)
        self.report.writes += kinds.count("w")
        self.report.syncs += kinds.count("s")

    def _note(self, point: Point, seen: Row) -> None:
        self.report.points += 1
        if "wrong" in seen:
            self.report.violations.append((str(point), str(seen["wrong"])))
        self.report.struck += bool(seen.get("struck"))
        self.report.named += bool(seen.get("named"))

    def _struck(self, world: World, stage: Stage, point: Point, moment: Moment) -> Row:
        """What was seen, or what is `wrong`; afterwards everything is as before."""
        signal.alarm(2 * SECONDS)
        try:
            return strike(world, stage, point, self._injection)
        except Exception:  # noqa: BLE001 - a violation of any kind
            return {"wrong": traceback.format_exc(limit=-6)}
        finally:
            signal.alarm(0)
            world.lanes.closing.close()
            moment.back()
            self._restore()

    def _restore(self) -> None:
        shutil.rmtree(self._live)
        shutil.copytree(self._kept, self._live)


# --- what is planned


def kills(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """Every call plain, every write torn."""
    for call, kind in enumerate(kinds, 1):
        yield Point(seed, stage, call)
        if kind == "w":
            yield Point(seed, stage, call, torn=1)


def pairs(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """A second crash in the recovery from one, plain or torn: each call of the cycle in one of PAIR_SEEDS seeds."""
    rng = random.Random(f"{seed} {stage}")
    for call in range(1 + seed % PAIR_SEEDS, len(kinds) + 1, PAIR_SEEDS):
        yield Point(seed, stage, call, torn=rng.randrange(2), second=rng.randint(1, RECOVERY_CALLS))


def errors(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """Every call with every errno, once and for ever, in turn with a restart and without."""
    for call in range(1, len(kinds) + 1):
        for number, code in enumerate(CODES):
            for lasting in (0, 1):
                yield Point(seed, stage, call, code=code, lasting=lasting, restarted=(call + number + lasting) % 2)


PLANS: Final[dict[str, Plan]] = {"kills": kills, "pairs": pairs, "errors": errors}


def sharded(plan: Plan, shard: int, shards: int, stages: Sequence[int]) -> Plan:
    """Every n-th point of a plan, so that several servers share it."""

    def mine(seed: int, stage: int, kinds: str) -> Iterator[Point]:
        if not stages or stage in stages:
            points = list(plan(seed, stage, kinds))
            yield from points[(shard - seed - stage) % shards :: shards]

    return mine


def out_of_time(*_: object) -> None:
    """What took so long is a violation."""
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", type=int, nargs="*", default=[])
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--point", type=Point.parse)
    asked = parser.parse_args()
    plan = sharded(PLANS[asked.plan], asked.shard, asked.shards, asked.stages)
    seeds = asked.seeds
    if asked.point:
        point, seeds = asked.point, [asked.point.seed]
        plan = lambda _, stage, __: iter([point] if stage == point.stage else [])  # noqa: E731 - one of the plans
    gc.disable()
    signal.signal(signal.SIGALRM, out_of_time)
    threading.Timer = SilentTimer  # type: ignore[misc]  # for this process and its children
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="syncd-faults-", dir="/dev/shm"))
    try:
        server = Server(folder, Injection(), errno.EIO if asked.plan == "errors" else 0)
        for seed in seeds:
            server.sweep(seed, plan)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    server.report.core_seconds = round(sum(os.times()[:4]), 1)
    server.report.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(server.report)), file=sys.stdout)  # noqa: T201 - its answer


if __name__ == "__main__":
    main()
