"""No request but those that no mirror could do without; and no time between two of them that an office would feel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from syncd.api import OpenDentalApi
from syncd.demo.adapter import OfficeAdapter
from syncd.errors import TransientError
from tests.small import LEAST, backfilling, small
from tests.world import World

LISTED = 5  # requests of the small practice's lists: the roster, and two of each patient


def reading(world: World) -> int:
    """Requests that read a list or the roster."""
    return sum(len(world.sent(path)) for path in ("/documents", "/sheets", "/patients/Simple"))


def to_come(world: World) -> int:
    return world.catalog().status_facts(world.clock.now()).requests_to_come


def test_patient_with_known_revisions_only_costs_two_requests(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small())
    world.run()
    world.clock.advance(60.0)
    world.office.arrivals.clear()
    world.restart(backfill=True)
    world.run()
    assert not world.placements()
    assert (len(world.sent("/documents")), len(world.sent("/sheets"))) == (2, 2)
    assert reading(world) == LISTED


def test_plan_counts_what_a_backfill_then_needs(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small(documents=3))
    world.index.run("INSERT INTO site VALUES ('placing', 'placements_refused', '', 0, 9e12, 1)")
    world.run(until=lambda: reading(world) == LISTED)
    planned = to_come(world)
    assert (len(world.office.arrivals), world.placements()) == (LISTED, [])
    world.index.run("DELETE FROM site")
    world.run()
    assert planned == len(world.placements()) == LEAST + 3
    assert to_come(world) == 0


def test_bytes_that_are_complete_on_the_drop_are_not_placed_again(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small())
    while not world.index.value("SELECT 1 FROM attempt WHERE state = 'placed'"):
        world.lanes.api_lane.turn(world.clock.now())  # nothing is pulled
        world.clock.advance(1.0)
    world.restart()
    world.drop.broken = TransientError("drop_unreachable")
    world.run(hours=2)
    world.drop.broken = None
    world.run()
    assert len(world.placements()) == LEAST
    world.check()


# --- unthrottled: what is done while the office works


class Wired(OfficeAdapter):
    """The office in-process, over a wire that says when a request is out, as the network does."""

    def __init__(self, world: World, api: OpenDentalApi) -> None:
        super().__init__(world.office)
        self._wire, self._world = api._wire, world
        self.asked: list[int] = []  # placements that were written down when one reached the office
        self.then: Callable[[], None] | None = None

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        assert self._wire.sent is not None
        self._wire.sent()
        self.asked.append(self._world.index.value("SELECT count(*) FROM attempt WHERE state = 'asked'"))
        if self.then is not None:
            self.then()
        return super().send(request, *args, **kwargs)


def wired(folder: Path) -> tuple[World, Wired]:
    world = World.start(folder, practice=small(documents=6).practice, backfill=True, interval=0.05)
    api = world.lanes.api_lane.doors.api
    assert isinstance(api, OpenDentalApi)
    adapter = Wired(world, api)
    api._adapter = adapter
    return world, adapter


def test_next_placement_is_written_down_while_the_office_works(tmp_path: Path) -> None:
    world, wire = wired(tmp_path)
    world.run()
    assert len(world.placements()) == LEAST + 6
    assert wire.asked.count(2) >= 6
    assert max(wire.asked) == 2
    assert world.office.in_flight_most == 1
    world.check()


def test_what_was_prepared_ahead_is_taken_back_when_the_drop_fails(tmp_path: Path) -> None:
    world, wire = wired(tmp_path)
    lane = world.lanes.api_lane

    def fails() -> None:
        if wire.asked[-1] == 2:
            lane._sites.failed(TransientError("drop_unreachable"), world.clock.now(), lane="drop")
            wire.then = None

    wire.then = fails
    world.run(until=lambda: wire.then is None)
    before = len(world.placements())
    lane.turn(world.clock.now() + 1.0)
    assert len(world.placements()) == before
    assert world.index.value("SELECT count(*) FROM attempt WHERE state = 'asked'") == 0
    world.run()
    assert len(world.placements()) == LEAST + 6
    world.check()


def test_end_with_one_in_flight_and_one_ahead_loses_nothing(tmp_path: Path) -> None:
    world, wire = wired(tmp_path)

    def dies() -> None:
        if wire.asked[-1] == 2:
            raise KeyboardInterrupt

    wire.then = dies
    try:
        world.run()
    except KeyboardInterrupt:
        world.restart()
    world.run()
    world.run(hours=30)
    assert len(world.placements()) <= LEAST + 6 + 1
    world.check()
