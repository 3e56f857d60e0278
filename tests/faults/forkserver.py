"""A process that imports everything once and takes the cycle through all of its points: crashes, or disks that fail.

    LD_PRELOAD=libfault.so python -m tests.faults.forkserver kills --seeds 0 1 2 --shard 0 --shards 8

It has office, drop, practice and the measure, and goes from stage to stage of the cycle. After every point the mirror's
folder and the outside are as they were before. The last line printed is a JSON object: `Report`.

`kills`, `some-kills`: each stage is lived once, by a forked mirror that is stopped at every persistence call. A crash
there would leave its folder as it is then, for a killed process loses nothing that it wrote: on a copy of it a new
mirror starts in this process, sweeps once, and is checked; then the stopped one goes on. `--point`: here a mirror
really dies.
`pairs`: mirrors that really die, and die again in the recovery.
`errors`: mirrors in this process, each on a copy of its own whose disk fails.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import gc
import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from syncd import guards
from syncd.schema import Row
from tests.faults.ailing import ail
from tests.faults.crashing import SECONDS, crash, watch
from tests.faults.cycle import FEW, Cycle, Stage, live, quicken
from tests.faults.injection import GO_ON, HALFWAY, TORN, Injection
from tests.faults.judging import judge, trial
from tests.faults.lot import Lot
from tests.faults.points import PLANS, Plan, Point, Report, only, sharded
from tests.world import World

COLLECTED_AFTER: Final = 25  # points; the collector of garbage is off in between


class Server:
    """Goes through the stages of a seed and strikes at every planned point; its `report`.

    `code`: the errno of a disk that fails; 0: crashes. `watched`: looked for in a mirror that goes on.
    """

    def __init__(self, folder: Path, injection: Injection, code: int, *, watched: bool) -> None:
        self.report = Report()
        self._folder, self._injection = folder / "live", injection
        self._code, self._watched = code, watched
        self._known: set[bytes] = set()
        self._lot = Lot("points")
        if code:  # mirrors that fare alike are then alike, to the byte
            self._lot.install(setattr)

    def sweep(self, seed: int, plan: Plan) -> None:
        """Every planned point of one seed."""
        cycle = Cycle(seed)
        shutil.rmtree(self._folder, ignore_errors=True)
        world = cycle.start(self._folder)
        for number, stage in enumerate(cycle.stages()):
            stage.happens(world)
            self._known.clear()
            gc.collect()
            gc.freeze()
            undisturbed = self._strike(world, stage, Point(seed, number, 0, code=self._code))
            assert "wrong" not in undisturbed, undisturbed["wrong"]
            kinds = str(undisturbed["calls"])
            self.report.count(kinds)
            points = list(plan(seed, number, kinds))
            if self._watched:
                self._look(world, stage, kinds, points)
            else:
                for point in points:
                    self._note(point, self._strike(world, stage, point))
                self._lot.begin(seed, number, "lived")
                live(world, stage)
            world.restart()
            world.check()
            world.stop()

    def _strike(self, world: World, stage: Stage, point: Point) -> Row:
        """Let it happen to a mirror; what was seen."""
        attempt = ail if point.code else crash
        self._lot.begin(point.seed, point.stage)
        with trial(world):
            return self._judged(lambda: attempt(world, stage, point, self._injection, self._known))

    def _look(self, world: World, stage: Stage, kinds: str, points: Sequence[Point]) -> None:
        """One life, stopped at each of these points: what would be, had it ended there?"""
        planned = {(point.call, point.torn): point for point in points}
        lines, made = len(world.log.lines), 0

        def look(what: bytes) -> bytes:
            nonlocal made
            halfway = what == HALFWAY
            made += not halfway
            if point := planned.pop((made, int(halfway)), None):
                seen = self._judged(lambda: judge(world, lines, self._known, within=trial(world)))
                self._note(point, {**seen, "struck": True})
            return TORN if (made, 1) in planned else GO_ON

        watch(world, stage, self._injection, look)
        assert made == len(kinds), f"{made} calls where there were {len(kinds)} before"
        assert not planned, f"never came to {sorted(planned)}"

    def _judged(self, attempt: Callable[[], Row]) -> Row:
        """What was seen, or what is `wrong`."""
        signal.alarm(2 * SECONDS)
        try:
            return attempt()
        except (Exception, SystemExit):  # noqa: BLE001 - a violation of any kind
            return {"wrong": traceback.format_exc(limit=-6)}
        finally:
            signal.alarm(0)

    def _note(self, point: Point, seen: Row) -> None:
        self.report.points += 1
        if "wrong" in seen:
            self.report.violations.append((str(point), str(seen["wrong"])))
        self.report.struck += bool(seen.get("struck"))
        self.report.known += bool(seen.get("known"))
        self.report.named += bool(seen.get("named"))
        if self.report.points % COLLECTED_AFTER == 0:
            gc.collect()


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
    one: Point | None = asked.point
    plan = only(one) if one else sharded(asked.plan, asked.shard, asked.shards, asked.stages)
    code = errno.EIO if "errors" in asked.plan else 0
    gc.disable()
    faulthandler.enable()
    signal.signal(signal.SIGALRM, out_of_time)
    quicken(probes=FEW if code else guards.PROBED_ITEMS)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="syncd-faults-", dir="/dev/shm"))
    try:
        server = Server(folder, Injection(), code, watched="kills" in asked.plan and not one)
        for seed in [one.seed] if one else asked.seeds:
            server.sweep(seed, plan)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    server.report.core_seconds = round(sum(os.times()[:4]), 1)
    server.report.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(server.report)))  # noqa: T201 - its answer


if __name__ == "__main__":
    main()
