"""The rows of the simulated practice: SQLite in memory, with MySQL's stamps and the office's clock."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar, cast
from zoneinfo import ZoneInfo

from syncd.demo.clock import Clock
from syncd.demo.schema import CATEGORIES, IMAGE_CATEGORIES, KEYS, STAMPED, TABLES

Row = dict[str, Any]


M = TypeVar("M", bound=Callable[..., Any])


def locked(method: M) -> M:
    """A method during which nobody else reads or changes the practice."""

    @wraps(method)
    def guarded(self: "Store", *args: object, **kwargs: object) -> object:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast("M", guarded)


class Store:
    """Tables with Open Dental's column names. Thread-safe."""

    def __init__(self, clock: Clock, time_zone: str) -> None:
        self.clock = clock
        self.zone = ZoneInfo(time_zone)
        self.lock = threading.RLock()
        self.db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.executescript(TABLES)
        self.next_numbers = dict.fromkeys(KEYS, 1)
        self._past = threading.local()
        for order, (def_num, name) in enumerate(CATEGORIES.items()):
            row = {"DefNum": def_num, "Category": IMAGE_CATEGORIES, "ItemOrder": order, "ItemName": name}
            self.insert("definition", row)

    def now(self) -> float:
        """Seconds since the epoch: the clock's, or the time that `as_of` sets."""
        at: float | None = getattr(self._past, "at", None)
        return self.clock.now() if at is None else at

    @contextmanager
    def as_of(self, at: float) -> Iterator[None]:
        """Let what is done inside have happened at `at` (seconds since the epoch): how a practice gets a past.

        Other threads keep the clock's time.
        """
        with self.lock:
            before, self._past.at = getattr(self._past, "at", None), at
            try:
                yield
            finally:
                self._past.at = before

    def local(self, at: float | None = None) -> str:
        """`at` (default: now) as the office writes it: local time, no zone, whole seconds."""
        moment = datetime.fromtimestamp(int(self.now() if at is None else at), UTC)
        return moment.astimezone(self.zone).strftime("%Y-%m-%d %H:%M:%S")

    @locked
    def rows(self, sql: str, *values: object) -> list[Row]:
        """Rows of a SELECT as dictionaries."""
        return [dict(row) for row in self.db.execute(sql, values)]

    @locked
    def row(self, table: str, num: int) -> Row | None:
        """The row of that number, or None."""
        found = self.rows(f"SELECT * FROM {table} WHERE {KEYS[table]} = ?", num)  # noqa: S608  (names of ours)
        return found[0] if found else None

    def need(self, table: str, num: int) -> Row:
        """The row of that number; KeyError where there is none."""
        found = self.row(table, num)
        if found is None:
            raise KeyError(f"{table} {num}")
        return found

    @locked
    def insert(self, table: str, row: Row) -> int:
        """Insert a row, numbered and stamped unless it says so itself; returns its number."""
        key = KEYS[table]
        num = int(row.get(key) or self.next_numbers[table])
        self.next_numbers[table] = max(self.next_numbers[table], num + 1)
        full = {**row, key: num}
        if table in STAMPED:
            full.setdefault("DateTStamp", self.local())
        marks = ", ".join("?" * len(full))
        self.db.execute(f"INSERT INTO {table} ({', '.join(full)}) VALUES ({marks})", tuple(full.values()))  # noqa: S608
        return num

    @locked
    def update(self, table: str, num: int, changes: Row) -> bool:
        """Set columns; the stamp moves only if one of them really changes, as MySQL does it. True if something
        changed.
        """
        row = self.need(table, num)
        real = {column: value for column, value in changes.items() if row[column] != value}
        if not real:
            return False
        if table in STAMPED:
            real.setdefault("DateTStamp", self.local())
        columns = ", ".join(f"{column} = ?" for column in real)
        self.db.execute(f"UPDATE {table} SET {columns} WHERE {KEYS[table]} = ?", (*real.values(), num))  # noqa: S608
        return True

    @locked
    def delete(self, table: str, num: int) -> None:
        """Remove a row, leaving no trace."""
        self.need(table, num)
        self.db.execute(f"DELETE FROM {table} WHERE {KEYS[table]} = ?", (num,))  # noqa: S608  (names of ours)

    @locked
    def copy_rows(self) -> sqlite3.Connection:
        """A copy of all tables."""
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        self.db.backup(copy)
        return copy
