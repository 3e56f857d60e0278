"""Whom to tell of trouble, when, and of its end. Pure: what was told so far and a status in, at most one notice out.

An episode begins with the first bad minute and is over after thirty good ones. In it each reason is told once, when it
has lasted long enough, and once more each day; then its end. Times are seconds since the epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Final, Literal

from syncd.report import DAY, Report, human_duration

URGENT: Final = frozenset({"archive_damaged", "other_database", "archive_missing"})  # told at once
AT_THE_OFFICE: Final = frozenset({"econnector_down", "econnector_twice"})  # its computers may be off after hours
GOOD_FOR: Final = 1800.0
AGAIN: Final = 900.0  # seconds after one that could not be sent
MANY: Final = 4  # notices a day; the next one says that it goes on like that, and then there is silence for a day
LONGEST_STEP: Final = 300.0  # between two looks: what lay further apart was not seen

Kind = Literal["trouble", "reminder", "recovered", "flapping"]
Notice = dict[str, object]


@dataclass(frozen=True, slots=True)
class Memory:
    """What must outlive a process. `lasted`: seconds of the episode that count, by reason; `told_at` likewise."""

    looked_at: float = 0.0
    began_at: float | None = None  # of the episode
    good_since: float | None = None
    lasted: Mapping[str, float] = field(default_factory=dict)
    told_at: Mapping[str, float] = field(default_factory=dict)
    sent: tuple[float, ...] = ()  # troubles and ends, of the last day
    silent_until: float = 0.0

    def to_json(self) -> str:
        """One line for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None) -> Memory:
        """The memory in `text`; a fresh one when it is empty or damaged."""
        try:
            read = cls(**json.loads(text or "{}"))
            lasted, told_at = ({each: float(many[each]) for each in many} for many in (read.lasted, read.told_at))
            began_at, good_since = (None if at is None else float(at) for at in (read.began_at, read.good_since))
            moments = float(read.looked_at), began_at, good_since, lasted, told_at
            return cls(*moments, tuple(map(float, read.sent)), float(read.silent_until))
        except (ValueError, TypeError):
            return cls()


def look(memory: Memory, said: Report, now: float, after: float, office_is_open: bool) -> tuple[Memory, Notice | None]:
    """Take note of a status. `after`: seconds that most trouble may last before anybody is told."""
    step = min(max(0.0, now - memory.looked_at), LONGEST_STEP) if memory.looked_at else 0.0
    memory = replace(memory, looked_at=now, sent=tuple(at for at in memory.sent if abs(now - at) < DAY))
    if said["state"] == "paused":
        return memory, None
    if said["state"] in ("ok", "catching_up"):
        return _good(memory, said, now)
    reason, began_at = str(said["reason"]), now if memory.began_at is None else memory.began_at
    counts = step if office_is_open or reason not in AT_THE_OFFICE else 0.0
    lasted = {**memory.lasted, reason: memory.lasted.get(reason, 0.0) + counts}
    memory = replace(memory, began_at=began_at, good_since=None, lasted=lasted)
    told_at = memory.told_at.get(reason)
    if (lasted[reason] < after and reason not in URGENT) or (told_at is not None and abs(now - told_at) < DAY):
        return memory, None
    kind: Kind = "trouble" if told_at is None else "reminder"
    return _tell(replace(memory, told_at={**memory.told_at, reason: now}), kind, said, now)


def unsent(memory: Memory, reason: str, now: float) -> Memory:
    """A notice of that reason reached nobody: while it lasts it is told again after a quarter of an hour."""
    told_at = {**memory.told_at, reason: now - DAY + AGAIN} if reason in memory.told_at else memory.told_at
    return replace(memory, told_at=told_at)


def _good(memory: Memory, said: Report, now: float) -> tuple[Memory, Notice | None]:
    if memory.began_at is None:
        return memory, None
    memory = replace(memory, good_since=now if memory.good_since is None else memory.good_since)
    if abs(now - (memory.good_since or now)) < GOOD_FOR or _silent(memory, now):
        return memory, None
    over = replace(memory, began_at=None, good_since=None, lasted={}, told_at={})
    return _tell(over, "recovered", said, now, memory) if memory.told_at else (over, None)


def _silent(memory: Memory, now: float) -> bool:
    return 0 < memory.silent_until - now <= DAY  # further ahead: the clock was set back


def _tell(
    memory: Memory, kind: Kind, said: Report, now: float, before: Memory | None = None
) -> tuple[Memory, Notice | None]:
    """The notice, unless there were too many. `before`: the episode that is over."""
    episode = before or memory
    if kind != "reminder" and said["reason"] not in URGENT:
        if _silent(memory, now):
            return memory, None
        if len(memory.sent) >= MANY:
            memory, kind = replace(memory, silent_until=now + DAY), "flapping"
        memory = replace(memory, sent=(*memory.sent, now))
    lasted = (episode.good_since or now) - (episode.began_at or now)
    reasons = sorted(episode.told_at)
    words = {
        "trouble": f"{said['reason']}: {said['message']}",
        "reminder": f"still {said['reason']}, since {human_duration(lasted)}: {said['message']}",
        "recovered": f"it works again, after {human_duration(lasted)} ({', '.join(reasons)})",
        "flapping": f"it comes and goes, now {said['reason']}: no further notice of it for a day",
    }
    named = {name: said[name] for name in ("practice", "at", "state", "reason", "who", "message")}
    told: Notice = {"schema_version": 1, "kind": kind, **named, "reasons": reasons, "lasted_seconds": round(lasted, 1)}
    return memory, told | {"line": f"syncd {said['practice']}: {words[kind]}"}
