"""When the next request may start, and how long to wait after trouble.

Pure. "Steady" times are seconds since boot (CLOCK_BOOTTIME), `now` is seconds since the epoch; all delays are seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from syncd.config import Settings, Window

LONGEST_PAUSE: Final = 3600.0  # whatever Retry-After says, or a damaged record
LONGEST_REQUEST: Final = 60.0  # the API answers 504 after it (facts.md)
SLOW_ANSWER: Final = 10.0  # the vendor queues before it throttles: slow answers are a sign, too (facts.md)
HOUR: Final = 3600.0
ANSWERS: Final = 30  # of one kind, that tell how long they take lately
SLOWED: Final = 3.0  # times as long as usual: the office has other work
NOTICED: Final = 0.2  # seconds: quicker answers are no sign of work
LONGEST_REST: Final = 10.0
FIRST_THROTTLE: Final = 5.0
LAST_THROTTLE: Final = 900.0
RETRY_DELAYS: Final = (5.0, 30.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0)
SITE_DELAYS: Final = (15.0, 60.0, 300.0, 900.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """What must outlive a process: when requests started, until when none may, and how many on `day`."""

    last_start: float = 0.0
    not_before: float = 0.0
    throttles_in_a_row: int = 0
    day: str = ""
    requests_today: int = 0
    throttled_today: int = 0

    def to_json(self) -> str:
        """One line for `from_json`."""
        return json.dumps({name: getattr(self, name) for name, _ in _KINDS})

    @classmethod
    def from_json(cls, text: str) -> Pace:
        """The record in `text`; a fresh one when it is empty or damaged."""
        try:
            pace = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return cls()
        sound = all(type(getattr(pace, name)) is kind for name, kind in _KINDS)
        return pace if sound and pace.last_start >= 0 and pace.not_before >= 0 else cls()  # false for NaN


_KINDS: Final = [(each.name, type(each.default)) for each in fields(Pace)]


def office_is_open(settings: Settings, now: float) -> bool:
    """Monday to Friday, 8 to 17, in the practice's zone."""
    local = datetime.fromtimestamp(now, settings.zone)
    return local.weekday() < 5 and 8 <= local.hour < 17  # noqa: PLR2004 - as above


def shares(settings: Settings, now: float) -> tuple[float, float]:
    """The share in force, and that of bulk work: half of it outside the backfill window."""
    local, windows = datetime.fromtimestamp(now, settings.zone), settings.backfill.window
    share = settings.api.share if office_is_open(settings, now) else settings.api.share_closed
    return share, share / 2 if windows and not in_window(windows, local) else share


def share(settings: Settings, now: float, bulk: bool) -> float:
    """One of `shares`."""
    return shares(settings, now)[bulk]


def spacing(settings: Settings, now: float, bulk: bool) -> float:
    """Seconds from start to start, at least."""
    return settings.api.min_interval / share(settings, now, bulk)


def expected_spacing(settings: Settings, now: float, bulk: bool) -> float:
    """Seconds from start to start to reckon with, for plans."""
    return settings.api.expected_interval / share(settings, now, bulk)


class Manners:
    """How much time an office that is not throttled has for the practice's own work, after each answer.

    Its own answers tell how busy it is: of each kind of request, how long they took lately (a mean), and how long they
    usually take: the least such mean, which may double in an hour, so that what stays slow becomes usual.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, float, float, float]] = {}  # answers, lately, usually, and when that was

    def rest(self, kind: str, seconds: float, share: float, steady_now: float) -> float:
        """Seconds to leave free after an answer that took `seconds`. `share`: of the time that is ours at most."""
        count, lately, usual, at = self._known.get(kind, (0, seconds, seconds, steady_now))
        count, lately = count + 1, lately + (seconds - lately) / min(count + 1, ANSWERS)
        usual = lately if count <= ANSWERS else min(lately, usual * 2 ** ((steady_now - at) / HOUR))
        self._known[kind] = count, lately, usual, steady_now
        slow = max(0.0, lately - SLOWED * usual) if lately > NOTICED else 0.0
        return max(seconds * (1 / share - 1), min(slow, LONGEST_REST))


def next_start(pace: Pace, spacing: float, steady_now: float) -> float:
    """The steady time before which no request may start.

    A start may be noted a moment before it is made, with no answer and so no pause yet. One that lies further ahead
    happened before a reboot: it then counts as made at boot, with its pause after it.
    """
    if steady_now < pace.last_start <= steady_now + spacing:
        return pace.last_start + spacing
    pause = pace.not_before - pace.last_start
    last = pace.last_start if pace.last_start <= steady_now else 0.0
    return last + max(spacing, min(pause, LONGEST_PAUSE + LONGEST_REQUEST))


def started(pace: Pace, steady_now: float, day: str) -> Pace:
    """A request starts now, on the wall-clock day `day` (ISO)."""
    if pace.day != day:
        pace = replace(pace, day=day, requests_today=0, throttled_today=0)
    return replace(pace, last_start=steady_now, not_before=0.0, requests_today=pace.requests_today + 1)


def answered(pace: Pace, steady_now: float, good: bool, rest: float = 0.0) -> Pace:
    """The request ended now: a slow one leaves a quarter of its duration free, a good one ends throttling.

    `rest`: seconds to leave free at least.
    """
    duration = steady_now - pace.last_start
    rest = max(rest, duration / 4 if duration > SLOW_ANSWER else 0.0)
    not_before = steady_now + rest if rest else 0.0
    return replace(pace, not_before=not_before, throttles_in_a_row=0 if good else pace.throttles_in_a_row)


def throttled(pace: Pace, steady_now: float, retry_after: float | None) -> Pace:
    """The request was answered with 429: 5 s, doubled each time in a row up to 15 min, or Retry-After if longer."""
    wait = min(FIRST_THROTTLE * 2 ** min(pace.throttles_in_a_row, 10), LAST_THROTTLE)
    wait = max(wait, min(retry_after or 0.0, LONGEST_PAUSE))
    in_a_row, today = pace.throttles_in_a_row + 1, pace.throttled_today + 1
    return replace(pace, not_before=steady_now + wait, throttles_in_a_row=in_a_row, throttled_today=today)


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait, from seconds or an HTTP date (RFC 9110, 10.2.3), 0 to one hour; None when it says nothing."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text[:300]), LONGEST_PAUSE)
    try:
        moment = parsedate_to_datetime(text)
        return min(max(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - now, 0.0), LONGEST_PAUSE)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def in_window(windows: Sequence[Window], local: datetime) -> bool:
    """Whether the local time lies in one of the windows, those that began yesterday included."""
    minute, today = local.hour * 60 + local.minute, local.weekday()
    return any(
        (today in window.days and window.start <= minute < (window.end if window.end > window.start else 1440))
        or (window.end < window.start and (today - 1) % 7 in window.days and minute < window.end)
        for window in windows
    )


def retry_delay(failures: int) -> float:
    """Seconds until an item is tried again, after its n-th failure in a row: growing, never "never"."""
    return RETRY_DELAYS[min(max(failures, 1), len(RETRY_DELAYS)) - 1]


def site_delay(failures: int) -> float:
    """Seconds until a site that refuses or does not answer is probed again, after the n-th failure in a row."""
    return SITE_DELAYS[min(max(failures, 1), len(SITE_DELAYS)) - 1]
