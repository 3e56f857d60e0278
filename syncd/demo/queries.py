"""`PUT /queries/ShortQuery`: read-only SQL over the practice's tables, in as much of MySQL's dialect as a mirror
uses.
"""

import re
import sqlite3
from datetime import datetime, timedelta

from syncd.demo.call import Call, whole
from syncd.demo.wire import Refusal, Response, json_response

_BAD, _UNAUTHORIZED = 400, 401
_READING = re.compile(r"\s*(SELECT|WITH)\b", re.IGNORECASE)
_WRITING = re.compile(
    r"\b(INSERT|UPDATE|DELETE|DROP|ALTER|CREATE|REPLACE|TRUNCATE|GRANT|ATTACH|PRAGMA)\b", re.IGNORECASE
)
_LITERAL = re.compile(r"'(?:[^']|'')*'")
_ISO_LITERAL = re.compile(r"'(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)'")
_STORED = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)")
_INTERVAL = re.compile(r"DATE_(ADD|SUB)\s*\((.+?),\s*INTERVAL\s+(\d+)\s+(SECOND|MINUTE|HOUR|DAY)\s*\)", re.IGNORECASE)
_ARITHMETIC = re.compile(r"NOW\(\)\s*([+-])\s*INTERVAL\s+(\d+)\s+(SECOND|MINUTE|HOUR|DAY)", re.IGNORECASE)
_SECONDS = {"SECOND": 1, "MINUTE": 60, "HOUR": 3600, "DAY": 86400}
_ROWS = 100


def short_query(call: Call) -> Response:
    """Queries PUT ShortQuery: at most 100 rows from Offset on; 401 for anything that writes, 400 for an SQL error.

    DateTimes come as `2021-05-01T00:00:00`, enumerations as their numbers. Each call is a row in the practice's audit
    trail.
    """
    command = call.text("SqlCommand")
    offset = whole("Offset", call.param("Offset") or 0)
    call.office.audit_rows.append(command)
    bare = _LITERAL.sub("''", command)
    if not _READING.match(command) or _WRITING.search(bare) or ";" in bare.rstrip().rstrip(";"):
        raise Refusal(_UNAUTHORIZED, "Only read-only queries are allowed")
    practice = call.practice
    with practice.lock:
        practice.db.create_function("NOW", 0, practice.local)
        practice.db.create_function("SHIFTED", 2, _shifted)
        try:
            rows = practice.rows(_translate(command))[offset : offset + _ROWS]
        except sqlite3.Error as error:
            raise Refusal(_BAD, f"Query failed: {error}") from error
    return json_response([{key: _shown(value) for key, value in row.items()} for row in rows])


def _translate(command: str) -> str:
    """MySQL to SQLite: both ways to write a moment, and intervals."""
    sql = command.strip().rstrip(";")
    sql = _ISO_LITERAL.sub(r"'\1 \2'", sql)
    sql = _ARITHMETIC.sub(lambda m: f"SHIFTED(NOW(), {m[1]}{int(m[2]) * _SECONDS[m[3].upper()]})", sql)
    return _INTERVAL.sub(
        lambda m: f"SHIFTED({m[2]}, {'-' if m[1].upper() == 'SUB' else ''}{int(m[3]) * _SECONDS[m[4].upper()]})", sql
    )


def _shifted(moment: str, seconds: int) -> str:
    return (datetime.fromisoformat(moment) + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S")


def _shown(value: object) -> object:
    if isinstance(value, str) and (found := _STORED.fullmatch(value)):
        return f"{found[1]}T{found[2]}"
    return value
