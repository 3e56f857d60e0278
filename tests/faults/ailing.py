"""A mirror whose disk fails, in this very process: its one end is a named state, and it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from syncd.errors import REASONS, SyncdError
from syncd.schema import Row
from tests.faults.cycle import HOUR, Stage
from tests.faults.injection import Injection
from tests.faults.judging import judge
from tests.faults.points import Point
from tests.world import World

FAULTY: Final = 300.0  # simulated seconds that a disk fails "for ever"
PATIENCE: Final = 3 * 24 * HOUR  # simulated seconds until a mirror whose disk works is at rest
STEPS: Final = 4000  # rounds of turns until rest; more are a loop


def ail(world: World, stage: Stage, point: Point, injection: Injection, known: set[bytes]) -> Row:
    """Let a mirror live on a failing disk, then restart it or let it go on; what was seen. Raises for what is wrong."""
    lines = len(world.log.lines)
    try:
        seen = _endure(world, stage, point, injection)
    finally:
        injection.disarm()
    assert not seen["resynced"], "a file was synced again after its sync had failed"
    assert set(seen["named"]) <= REASONS.keys() | {"start"}, seen["named"]
    if seen["swept"]:
        since = world.clock.now()
        healed = _serve(world, stage, PATIENCE, started=True)
        assert _at_rest(world, since), f"never at rest again: {sorted(set(healed))}"
        world.stop()
    return {**seen, **judge(world, lines, known, swept=bool(seen["swept"])), "struck": bool(seen["failed"])}


def _endure(world: World, stage: Stage, point: Point, injection: Injection) -> Row:
    """Work on a disk that fails at this point, and end unless the point says to go on once it works again."""
    injection.fail_at(point.call, point.code, bool(point.lasting))
    at_once = bool(point.lasting or point.restarted)  # else it goes on as if nothing had been
    named = _serve(world, stage, PATIENCE, until=lambda: at_once and bool(injection.failed))
    if point.lasting and "start" not in named:
        named += _serve(world, stage, FAULTY, started=True)
    ending = "start" not in named and (bool(point.restarted) or not injection.failed)  # not met yet: in the end, then
    if ending:
        named += _stop(world)
    seen: Row = {"named": sorted(set(named)), "failed": injection.failed, "resynced": injection.resynced}
    return {**seen, "calls": injection.kinds(), "swept": not ending and "start" not in named}


def _stop(world: World) -> list[str]:
    """An orderly end; the reason, where the disk does not let it be one."""
    try:
        world.stop()
    except SyncdError as error:
        return [_name_of(error)]
    return []


def _serve(
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
    end, idle = world.clock.now() + seconds, world.first_nap
    rests_at = world.clock.now() + stage.hours * HOUR
    for _ in range(STEPS):
        before = (len(world.office.arrivals), world.drop.calls)
        for turn in (world.lanes.api_lane.turn, world.lanes.pull_lane.turn):
            try:
                turn(world.clock.now())
            except SyncdError as error:
                named.append(_name_of(error))
        busy = (len(world.office.arrivals), world.drop.calls) != before
        if until() or world.clock.now() >= end or (world.clock.now() >= rests_at and _at_rest(world, since)):
            return named + _troubles(world)
        idle = world.first_nap if busy else min(2 * idle, HOUR)
        world.clock.advance(min(30.0, max(0.0, end - world.clock.now())) if busy else idle)
    raise AssertionError(f"no end in sight: {sorted(set(named))}")


def _name_of(error: SyncdError) -> str:
    return str(getattr(error, "reason", type(error).__name__))


def _at_rest(world: World, since: float) -> bool:
    """Whether nothing is left to do, nothing is known to be wrong, and every list was polled after that time."""
    unread = "SELECT 1 FROM list JOIN patient USING (pat_num) WHERE left_at IS NULL AND polled_at < ?"
    try:
        return world.at_rest() and not _troubles(world) and not world.index.value(unread, since)
    except SyncdError:
        return False


def _troubles(world: World) -> list[str]:
    """The reasons that `status` would tell."""
    try:
        return [row["reason"] for row in world.index.rows("SELECT reason FROM site")]
    except SyncdError as error:
        return [_name_of(error)]
