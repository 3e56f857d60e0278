"""Mirrors in processes of their own: one that is stopped at its calls and looked at, and ones that really die.

The world around them, office, drop and practice, is in this process, which serves it through a pipe (`cycle.Outside`).
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Final, NoReturn, cast

from syncd.schema import Row
from tests.faults.cycle import FarLog, Outside, Stage, join, live
from tests.faults.injection import KILLED, Injection
from tests.faults.judging import RESTARTED_AFTER, judge
from tests.faults.points import Point
from tests.world import World

SECONDS: Final = 20  # of real time until a mirror hangs
Look = Callable[[bytes], bytes]  # what a stopped mirror tells, to what it is answered: see `Injection.watch`


def watch(world: World, stage: Stage, injection: Injection, look: Look) -> None:
    """One life of a mirror, stopped at each of its calls until `look` has answered. Raises where it ends badly."""
    here, there = Pipe()
    calls, told = Pipe()
    child = os.fork()
    if child == 0:
        here.close()
        calls.close()
        _live(world, stage, there, lambda: injection.watch(told.fileno()), injection)
    there.close()
    told.close()
    before = len(world.log.lines)
    try:
        _serve(Outside(world), here, calls, look)
    finally:
        here.close()
        calls.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = _told(world, before)
    assert status == 0, f"the mirror ended with {status}: {seen}"


def _serve(outside: Outside, line: Connection, calls: Connection, look: Look) -> None:
    while ready := wait([line, calls], SECONDS):
        if line in ready:
            if not outside.serve_one(line):
                return
        elif what := os.read(calls.fileno(), 1):
            os.write(calls.fileno(), look(what))
        else:
            return
    raise TimeoutError


def crash(world: World, stage: Stage, point: Point, injection: Injection, known: set[bytes]) -> Row:
    """Let a mirror die at a point, and its successor at the `second`; what was seen. Raises for what is wrong."""
    before = len(world.log.lines)
    status = _outlive(world, stage, point, injection)
    seen = _told(world, before)
    assert status in (0, KILLED), f"the mirror ended with {status}: {seen}"
    if point.second:
        world.clock.advance(RESTARTED_AFTER)
        _outlive(world, Stage("recovery", stage.happens), replace(point, call=point.second, torn=0), injection)
    return {**seen, **judge(world, before, known), "struck": status == KILLED}


def _outlive(world: World, stage: Stage, point: Point, injection: Injection) -> int:
    """Fork a mirror that dies at a point, and be the world around it until it ends; its exit status."""
    here, there = Pipe()
    child = os.fork()
    if child == 0:
        here.close()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        _live(world, stage, there, lambda: injection.die_at(point.call, bool(point.torn)), injection)
    there.close()
    Outside(world).serve(here)
    here.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _live(world: World, stage: Stage, line: Connection, arm: Callable[[], None], injection: Injection) -> NoReturn:
    """The mirror's process: one life, armed."""
    try:
        join(world, line)
        arm()
        live(world, stage)
        kinds = injection.kinds()
        injection.disarm()
        _tell(world, {"calls": kinds})
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, the observer tells it
        injection.disarm()
        _tell(world, {"uncaught": traceback.format_exc(limit=-12)})
        os._exit(1)


def _tell(world: World, seen: Row) -> None:
    cast("FarLog", world.log).tell(seen)  # since `join`


def _told(world: World, lines: int) -> Row:
    """What mirrors told the observer alone, since so many lines of the log."""
    return {key: value for line in world.log.lines[lines:] if "event" not in line for key, value in line.items()}
