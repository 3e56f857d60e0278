"""Faults that the simulated office can be told to have, each for some requests, for some time.

office.faults.add("gateway_timeout", path="/documents/DownloadSftp", when="after")     # the next placement
office.faults.add("econnector_down", times=None)                                       # until cleared
office.faults.add("cut", method="GET", probability=0.05, times=None)                   # one in twenty, by seed
"""

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from syncd.demo.wire import Request

Kind = Literal[
    "gateway_timeout",
    "cut",
    "econnector_down",
    "two_econnectors",
    "key_revoked",
    "too_many",
    "status",
    "html",
    "wrong_shape",
    "huge",
    "redirect",
    "hang",
    "slow",
    "drip",
    "foreign_row",
    "truncated",
    "empty",
    "shifted",
    "duplicated",
    "zero_byte",
    "partial",
    "wrong_bytes",
    "late_file",
    "no_file",
    "location",
    "site_error",
    "grey_thumbnails",
]
"""All faults.

Before any work: econnector_down (400), two_econnectors (400), key_revoked (401), too_many (429, `seconds`:
Retry-After), status (`status`, `text`), html (200), wrong_shape (200, an object where a list belongs), huge (200,
`size` bytes), redirect (302 to `text`), hang (`seconds`, then a break). By `when` (before, during, after the work):
gateway_timeout (504 after `seconds`), cut (the connection breaks). `during` applies to placements: half the file is
written; the rest follows `late` seconds afterwards, or never (None). Of answers: slow (`seconds`), drip (`size` bytes
each `seconds`), cut with `when="body"` (half the body arrives). Of listings: foreign_row, truncated (to `size` rows),
empty, shifted (each later page begins one row too late), duplicated (each page's last row comes twice). Of
placements, all answered with 201: zero_byte, partial (half), wrong_bytes (another file's), late_file (`late` seconds
after the 201), no_file, location (the header names `text`), grey_thumbnails; answered with 400: site_error.
"""

When = Literal["before", "during", "after", "body"]


@dataclass
class Fault:
    """One fault. `method` and `path` (a shell pattern) say where, "" everywhere; `params`: query or body fields that
    must match.

    `times`: how often, None until cleared. `skip`: so many matching requests are spared first. `fired`: how often it
    struck. Other fields as `Kind` says; times in seconds, sizes in bytes or rows.
    """

    kind: Kind
    method: str = ""
    path: str = ""
    params: Mapping[str, object] = field(default_factory=dict)
    times: int | None = 1
    skip: int = 0
    probability: float = 1.0
    when: When = "before"
    seconds: float = 0.0
    late: float | None = None
    status: int = 500
    text: str = ""
    size: int = 0
    fired: int = 0

    def concerns(self, request: Request) -> bool:
        """Whether the fault is meant for such a request, and not used up."""
        if self.times is not None and self.fired >= self.times:
            return False
        if self.method not in ("", request.method) or not fnmatchcase(request.path, self.path or "*"):
            return False
        given = {**request.query, **(request.fields() if self.params else {})}
        return all(str(given.get(name)) == str(value) for name, value in self.params.items())


class Faults:
    """The faults in force. Thread-safe; drawn by seed."""

    def __init__(self, seed: int = 1) -> None:
        self._rng = random.Random(f"faults {seed}")
        self._lock = threading.Lock()
        self._all: list[Fault] = []

    def add(self, kind: Kind, **details: Any) -> Fault:
        """Put a fault in force; `details` are fields of `Fault`. ValueError for an unknown kind."""
        if kind not in get_args(Kind):
            raise ValueError(f"no such fault: {kind}")
        fault = Fault(kind, **details)
        with self._lock:
            self._all.append(fault)
        return fault

    def clear(self, fault: Fault | None = None) -> None:
        """End one fault, or all."""
        with self._lock:
            self._all = [] if fault is None else [other for other in self._all if other is not fault]

    def draw(self, request: Request) -> list[Fault]:
        """The faults that strike this request; each is counted."""
        struck = []
        with self._lock:
            for fault in self._all:
                if not fault.concerns(request) or self._rng.random() >= fault.probability:
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.fired += 1
                struck.append(fault)
        return struck
