"""One request in work: its fields, its page of rows, and the files it places, with the faults that strike it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from syncd.demo.faults import Fault, Kind, When
from syncd.demo.site import FileRefused, SiteError, Target
from syncd.demo.wire import Effect, Refusal, Request, Response, json_response

if TYPE_CHECKING:
    from syncd.demo.office import Office
    from syncd.demo.practice import Practice

_BAD, _MISSING = 400, 404
_STORED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_DIRECTIVES = {
    "yyyy": "%Y",
    "MM": "%m",
    "dd": "%d",
    "HH": "%H",
    "hh": "%I",
    "mm": "%M",
    "ss": "%S",
    "tt": "%p",
    "zzz": "\x01",
}
_LETTERS = re.compile("|".join(_DIRECTIVES))

Row = dict[str, Any]


class Interrupted(Exception):  # noqa: N818  (an event on the vendor's side)
    """The work stops in the middle: this is all the caller will hear."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class NotTaken(Refusal):
    """The site does not take this one file: methods that place many skip it, if any other arrives."""


@dataclass
class Call:
    """What a method of the API works with. `num`: the number in the URL, 0 where there is none."""

    office: Office
    request: Request
    faults: list[Fault]
    num: int = 0
    body: dict[str, object] = field(default_factory=dict)

    @property
    def practice(self) -> Practice:
        """The database behind the customer key."""
        return self.office.practice

    def struck(self, kind: Kind, when: When | None = None) -> Fault | None:
        """The fault of that kind which strikes this request, or None."""
        fitting = (fault for fault in self.faults if fault.kind == kind and when in (None, fault.when))
        return next(fitting, None)

    # Fields and parameters

    def text(self, name: str) -> str:
        """A required string field of the body."""
        value = self.body.get(name)
        if not isinstance(value, str) or not value:
            raise Refusal(_BAD, f"{name} is required")
        return value

    def number(self, name: str) -> int:
        """A required number of the body; digits in a string count."""
        value = self.body.get(name)
        if value is None:
            raise Refusal(_BAD, f"{name} is required")
        return whole(name, value)

    def param(self, name: str) -> str | None:
        """A query parameter, or None."""
        return self.request.query.get(name)

    def patient(self, value: object) -> int:
        """The PatNum of an existing patient; 404 otherwise."""
        num = whole("PatNum", value)
        if self.practice.row("patient", num) is None:
            raise Refusal(_MISSING, "Patient not found")
        return num

    def target(self) -> Target:
        """Where the request wants its file."""
        address, username = self.text("SftpAddress"), self.text("SftpUsername")
        password = self.text("SftpPassword")
        try:
            return Target.parse(address, username, password)
        except ValueError as error:
            raise Refusal(_BAD, str(error)) from error

    # Answers

    def page(self, rows: list[Row]) -> Response:
        """The page of `rows` that Limit and Offset ask for, at most the mode's page size."""
        size = self.office.page_size
        limit = min(size, whole("Limit", self.param("Limit") or size))
        offset = whole("Offset", self.param("Offset") or 0)
        if (fault := self.struck("foreign_row")) and rows:
            rows = [*rows, self._of_somebody_else(rows[-1])]
        if fault := self.struck("truncated"):
            rows = rows[: fault.size]
        if self.struck("empty"):
            rows = []
        if self.struck("shifted") and offset:
            offset += 1
        shown = rows[offset : offset + (limit or size)]
        if self.struck("duplicated"):
            shown = [*shown, *shown[-1:]]
        return json_response(self._formatted(shown))

    def _formatted(self, rows: list[Row]) -> list[Row]:
        """DateTimes in the form that DateTimeFormatString asks for (the usual letters of .NET formats)."""
        wanted = self.param("DateTimeFormatString")
        if wanted is None:
            return rows
        form = _LETTERS.sub(lambda found: _DIRECTIVES[found[0]], wanted.replace("%", "%%"))
        return [{key: self._moment(value, form) for key, value in row.items()} for row in rows]

    def _moment(self, value: object, form: str) -> object:
        if not isinstance(value, str) or not _STORED.fullmatch(value):
            return value
        moment = datetime.fromisoformat(value).replace(tzinfo=self.practice.zone)
        offset = moment.strftime("%z")
        return moment.strftime(form).replace("\x01", f"{offset[:3]}:{offset[3:]}")

    def _of_somebody_else(self, row: Row) -> Row:
        other = self.practice.rows("SELECT PatNum FROM patient WHERE PatNum <> ? LIMIT 1", int(row["PatNum"]))
        pat_num = other[0]["PatNum"] if other else int(row["PatNum"]) + 1
        return {**row, "PatNum": type(row["PatNum"])(pat_num)}

    # Placements

    def put(self, target: Target, data: bytes) -> None:
        """Place a file on the site, as well as the faults allow; 400 where the site refuses."""
        if fault := self.struck("site_error"):
            raise Refusal(_BAD, fault.text or "Sftp connection error: Connection refused")
        if self.struck("zero_byte"):
            data = b""
        if self.struck("wrong_bytes"):
            data = self._another_file(data)
        if self.struck("partial"):
            data = data[: len(data) // 2]
        if self.struck("no_file"):
            return
        if fault := self.struck("late_file"):
            self.office.clock.call_later(fault.late or fault.seconds, lambda: self._write_late(target, data))
            return
        self._stop_in_the_middle(target, data)
        self._write(target, data)

    def _stop_in_the_middle(self, target: Target, data: bytes) -> None:
        fault = self.struck("gateway_timeout", "during") or self.struck("cut", "during")
        if fault is None:
            return
        half = len(data) // 2
        self._write(target, data[:half])
        if fault.late is not None:
            self.office.clock.call_later(fault.late, lambda: self._write_late(target, data[half:], append=True))
        raise Interrupted(broken(self.office, fault))

    def _write_late(self, target: Target, data: bytes, *, append: bool = False) -> None:
        """Nobody hears of it where the site does not take the file any more."""
        with suppress(Refusal):
            self._write(target, data, append=append)

    def _write(self, target: Target, data: bytes, *, append: bool = False) -> None:
        try:
            self.office.site.write(target, self._chunks(data), append=append)
        except FileRefused as error:
            raise NotTaken(_BAD, f"Sftp connection error: {error}") from error
        except SiteError as error:
            raise Refusal(_BAD, f"Sftp connection error: {error}") from error

    def _chunks(self, data: bytes) -> Iterator[bytes]:
        size, pause = self.office.chunk_bytes, self.office.chunk_seconds
        for at in range(0, len(data), size):
            if at and pause:
                self.office.clock.sleep(pause)
            yield data[at : at + size]

    def _another_file(self, data: bytes) -> bytes:
        """The bytes of some other document in the practice."""
        for row in self.practice.rows("SELECT DocNum FROM document ORDER BY DocNum DESC"):
            spec = self.practice.spec(row["DocNum"])
            if spec is not None and spec.render() != data:
                return spec.render()
        return b"another file"


def whole(name: str, value: object) -> int:
    """A number given as a number or as a string; 400 otherwise."""
    try:
        return int(str(value))
    except ValueError as error:
        raise Refusal(_BAD, f"{name} is invalid") from error


def broken(office: Office, fault: Fault) -> Response:
    """What is heard of a request that broke: a 504 after the fault's seconds, or nothing."""
    office.clock.sleep(fault.seconds)
    if fault.kind == "cut":
        return Response(200, b"", {}, Effect("cut"))
    text = b"<html><head><title>504 Gateway Time-out</title></head></html>"
    return Response(504, text, {"Content-Type": "text/html"})
