"""Where something strikes, which points a run takes, and what it saw."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import islice
from typing import Final

CODES: Final = (errno.EIO, errno.ENOSPC, errno.EROFS)
PAIR_SEEDS: Final = 10
SOME: Final = 3  # of so many one, where not all are taken
RECOVERY_CALLS: Final = 120  # a second crash comes within so many calls of the recovery
EVERY: Final = {0: 11, 1: 11, 3: 83, 6: 5}  # the long stages are sampled; prime to 6, so that the ways to fail change
# so many neighbours together: they often end the same
BLOCKS: Final = {"kills": 24, "some-kills": 24, "errors": 6, "some-errors": 6}


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
    """What one run saw. `calls`: of the undisturbed cycles. `violations`: a point, and what was wrong.

    `known`: points where the restarted mirror was, to the byte, in the state of one that was swept and checked already.
    """

    points: int = 0
    struck: int = 0
    known: int = 0
    calls: int = 0
    writes: int = 0
    syncs: int = 0
    named: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    violations: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """What another one saw, too."""
        for told in fields(self):
            setattr(self, told.name, getattr(self, told.name) + getattr(other, told.name))

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


def some_kills(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """Every call plain; every write torn, in the long stages every third one: each seed others."""
    writes = 0
    for point in kills(seed, stage, kinds):
        writes += point.torn
        if not point.torn or stage not in EVERY or writes % SOME == seed % SOME:
            yield point


def pairs(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """A second crash in the recovery from one, plain or torn: each call of the cycle in one of PAIR_SEEDS seeds."""
    rng = random.Random(f"{seed} {stage}")
    for call in range(1 + seed % PAIR_SEEDS, len(kinds) + 1, PAIR_SEEDS):
        yield Point(seed, stage, call, torn=rng.randrange(2), second=rng.randint(1, RECOVERY_CALLS))


def some_pairs(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """One in SOME of `pairs`."""
    return islice(pairs(seed, stage, kinds), 0, None, SOME)


def errors(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """Every call with every errno, once and for ever, in turn with a restart and without."""
    for call in range(1, len(kinds) + 1):
        for code in CODES:
            for lasting in (0, 1):
                yield Point(seed, stage, call, code=code, lasting=lasting, restarted=(call + lasting) % 2)


def some_errors(seed: int, stage: int, kinds: str) -> Iterator[Point]:
    """All of `errors` in the short stages, every n-th in the long ones: each seed others."""
    for number, point in enumerate(errors(seed, stage, kinds), seed):
        if number % EVERY.get(stage, 1) == 0:
            yield point


PLANS: Final[dict[str, Plan]] = {
    "kills": kills, "some-kills": some_kills, "pairs": pairs, "some-pairs": some_pairs, "errors": errors,
    "some-errors": some_errors,
}  # fmt: skip


def sharded(name: str, shard: int, shards: int, stages: Sequence[int]) -> Plan:
    """Every n-th block of a plan, so that several processes share it. `stages`: only these, if any are named."""
    block = BLOCKS.get(name, 1)

    def mine(seed: int, stage: int, kinds: str) -> Iterator[Point]:
        if not stages or stage in stages:
            for number, point in enumerate(PLANS[name](seed, stage, kinds), block * (seed + stage)):
                if number // block % shards == shard:
                    yield point

    return mine


def only(point: Point) -> Plan:
    """This one point."""
    return lambda seed, stage, _: iter([point] if (seed, stage) == (point.seed, point.stage) else [])
