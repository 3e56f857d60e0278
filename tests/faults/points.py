"""Where something strikes, which points a run takes, and what it saw."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Final

CODES: Final = (errno.EIO, errno.ENOSPC, errno.EROFS)
PAIR_SEEDS: Final = 5
RECOVERY_CALLS: Final = 120  # a second crash comes within so many calls of the recovery
STRIDE: Final = 7  # shares no divisor with the six ways to fail: neighbouring calls fail in different ones
SAMPLED: Final = (0, 3)  # of each STRIDE ways to fail, these: every call fails in one of its six ways, or in two


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
    """What one run saw. `calls`: of the undisturbed cycles. `violations`: a point, and what was wrong."""

    points: int = 0
    struck: int = 0
    calls: int = 0
    writes: int = 0
    syncs: int = 0
    named: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    violations: list[tuple[str, str]] = field(default_factory=list)

    def count(self, kinds: str) -> None:
        """The calls of one stage that nothing disturbed."""
        self.calls += len(kinds)
        self.writes += kinds.count("w")
        self.syncs += kinds.count("s")


Plan = Callable[[int, int, str], Iterator[Point]]  # of a seed, a stage, and its calls, a letter each


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


def some_errors(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """Every call, in turn with one or two of the errnos and ways of `errors`."""
    for number, point in enumerate(errors(seed, stage, kinds)):
        if number % STRIDE in SAMPLED:
            yield point


PLANS: Final[dict[str, Plan]] = {"kills": kills, "pairs": pairs, "errors": errors, "some-errors": some_errors}


def sharded(plan: Plan, shard: int, shards: int, stages: Sequence[int]) -> Plan:
    """Every n-th point of a plan, so that several processes share it. `stages`: only these, if any are named."""

    def mine(seed: int, stage: int, kinds: str) -> Iterator[Point]:
        if not stages or stage in stages:
            points = list(plan(seed, stage, kinds))
            yield from points[(shard - seed - stage) % shards :: shards]

    return mine


def only(point: Point) -> Plan:
    """This one point."""
    return lambda seed, stage, _: iter([point] if (seed, stage) == (point.seed, point.stage) else [])
