"""One bit at a time, drawn at random, in an archived file, a sidecar or a row of the index: `verify` finds every one.

`checked_at` is the one column without a checksum: when a file was hashed last decides nothing but when it is next.
"""

from __future__ import annotations

import os
import random
import sqlite3
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from syncd.archive import Archive
from syncd.checker import HARMLESS, Tally
from syncd.schema import Row
from syncd.scrub import verify
from tests.small import serving, small
from tests.world import World

FLIPS = 1000 if os.environ.get("SYNCD_FAULTS") == "nightly" else 100  # of each kind
Undo = Callable[[], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A mirror of one item of every kind, with second versions and second sidecars."""
    one = small(documents=3)
    world = serving(tmp_path_factory.mktemp("flips"), one)
    world.run()
    one.practice.replace_bytes(one.document)
    one.practice.edit_document(one.letter, Description="Renamed")
    world.sweep()
    world.check()
    yield world
    world.stop()


def found(world: World) -> list[str]:
    walk = verify(world.index, Archive(world.archive, 0), Tally(), world.clock.now(), alone=True)
    return [f"{each.code} {each.path}" for each in walk if each.code not in HARMLESS]


def flip_file(world: World, rng: random.Random, suffix: bool) -> tuple[str, Undo]:
    """One bit of a sidecar, or of a media file."""
    every = sorted(path for path in (world.archive / "patients").glob("*/*-*/*") if (path.suffix == ".json") is suffix)
    path = rng.choice(every)
    before = path.read_bytes()
    at, bit = rng.randrange(len(before)), rng.randrange(8)
    _write(path, before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :])
    return f"{path.name} byte {at} bit {bit}", partial(_write, path, before)


def _write(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(0o400)


def flip_row(world: World, rng: random.Random) -> tuple[str, Undo]:
    """One bit of one value of one row of table version, as it is stored."""
    rows = world.index.rows("SELECT * FROM version")
    while True:
        before = rng.choice(rows)
        column = rng.choice([name for name, value in before.items() if value is not None and name != "checked_at"])
        value, number = _flipped(before[column], rng)
        sql = f"UPDATE version SET {column} = {'CAST(? AS TEXT)' if isinstance(value, bytes) else '?'} WHERE seq = ?"
        try:
            world.index.run(sql, value, before["seq"])
        except sqlite3.IntegrityError:  # NaN is no number, or the row would be another row's twin: drawn again
            continue
        seq = value if column == "seq" else before["seq"]
        return f"seq {before['seq']} {column} bit {number}", partial(_put_back, world, before, seq)


def _flipped(value: object, rng: random.Random) -> tuple[object, int]:
    """The value with one bit flipped: in 64 bits for a number, in UTF-8 for a text (then as bytes)."""
    packed = {int: ">q", float: ">d"}
    content = struct.pack(packed[type(value)], value) if type(value) in packed else str(value).encode()
    bit = rng.randrange(8 * len(content))
    changed = int.from_bytes(content) ^ 1 << bit
    back = changed.to_bytes(len(content))
    return (struct.unpack(packed[type(value)], back)[0] if type(value) in packed else back), bit


def _put_back(world: World, before: Row, seq: object) -> None:
    with world.index.transaction():
        world.index.run("DELETE FROM version WHERE seq = ?", seq)
        marks = ", ".join("?" * len(before))
        world.index.run(f"INSERT INTO version VALUES ({marks})", *before.values())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("where", ["file", "sidecar", "row"])
def test_every_flipped_bit_is_found(world: World, where: str, record_property: Callable[[str, object], None]) -> None:
    rng = random.Random(f"flip {where}")
    silent, seen = [], 0
    for _ in range(FLIPS):
        told, undo = flip_row(world, rng) if where == "row" else flip_file(world, rng, where == "sidecar")
        findings = found(world)
        seen += bool(findings)
        silent += [] if findings else [told]
        undo()
        assert found(world) == [], f"{told}: not put back"
    record_property("figures", f"{seen} of {FLIPS} flipped bits found")
    assert silent == []
