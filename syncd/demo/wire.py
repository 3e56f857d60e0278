"""Requests and responses of the simulated API as plain records, so that they need no socket."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Effect:
    """What the connection does to an answer.

    `cut`: only the first `after` bytes of the body leave, then the connection breaks (`after` < 0: not even a status
    line). `drip`: the body comes in pieces of `chunk` bytes, `seconds` apart. `hang`: nothing comes for `seconds`,
    then a break.
    """

    kind: Literal["cut", "drip", "hang"]
    after: int = -1
    chunk: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """One request. `path` below the API's base, as `/documents/7`; `query` decoded; header names in any case.

    `came`: when its first byte reached this machine, in monotonic seconds; 0 where nobody knows.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    came: float = 0.0

    def header(self, name: str) -> str:
        """The header's value, or an empty string."""
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")

    def fields(self) -> dict[str, object]:
        """The JSON object in the body; an empty one where there is none."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Response:
    """One answer; `effect` says what becomes of it on the way."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    effect: Effect | None = None


class Refusal(Exception):  # noqa: N818  (the vendor refuses; nothing is wrong with us)
    """The vendor's answer to a request it does not carry out: a status and an explanation."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass
class Arrival:
    """One request as the vendor's side saw it.

    `at`: seconds since the epoch by the office's clock. `steady`: the machine's monotonic seconds. `status`: 0 until
    answered, or cut. `duration`: seconds of that clock from arrival to answer, of which `waited` in the throttle's
    queue. `params`: query and body fields, without the SFTP password and uploaded content.
    """

    at: float
    steady: float
    method: str
    path: str
    params: dict[str, object]
    status: int = 0
    duration: float = 0.0
    waited: float = 0.0


def json_response(value: object, status: int = 200, **headers: str) -> Response:
    """An answer with a JSON body; explanations are JSON strings. Line ends inside strings come as spaces, as the
    vendor's do.
    """
    text = json.dumps(value)
    if any(end in text for end in (r"\r", r"\n")):
        text = json.dumps(_one_line(value))
    body = text.encode()
    return Response(status, body, {"Content-Type": "application/json; charset=utf-8", **headers})


def _one_line(value: object) -> object:
    if isinstance(value, str):
        return _LINE_END.sub(" ", value)
    if isinstance(value, dict):
        return {key: _one_line(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_one_line(item) for item in value]
    return value
