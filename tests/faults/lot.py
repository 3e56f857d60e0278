"""Whatever the product draws at random, drawn from a seed: names on the drop and in `incoming`, ids, choices of SQLite.

For mirrors in one process: forked ones would draw the same.
"""

from __future__ import annotations

import random
import secrets
import sqlite3
import uuid
from collections.abc import Callable
from typing import Any


class Lot:
    """One seed, one sequence; `begin` starts another."""

    def __init__(self, seed: str) -> None:
        self._seed, self._rng = seed, random.Random(seed)

    def begin(self, *name: object) -> None:
        """The sequence of this name, from its start."""
        self._rng.seed(f"{self._seed} {name}")

    def install(self, put: Callable[[object, str, object], None]) -> None:
        """Put it (as `setattr` does) in the place of everything random in this process and its children."""
        rng, connect = self._rng, sqlite3.connect

        def opened(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*args, **kwargs)
            connection.create_function("random", 0, lambda: rng.getrandbits(62))
            connection.create_function("randomblob", 1, rng.randbytes)
            return connection

        put(sqlite3, "connect", opened)
        put(secrets, "token_hex", lambda size=32: rng.randbytes(size).hex())
        put(secrets, "randbelow", rng.randrange)
        put(secrets, "SystemRandom", lambda: rng)
        put(uuid, "uuid4", lambda: uuid.UUID(int=rng.getrandbits(128), version=4))
