"""Whom to tell of trouble, when, and of its end. Pure: what was told so far and a status in, at most one notice out.

Each reason has an episode of its own: it begins with its first bad minute, is told once, when it has lasted some time,
and once more each day, and is over after thirty minutes without it. A status names the worst reason only: what that one
may hide goes on. Times are seconds since the epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Final, Literal

from syncd.errors import REASONS
from syncd.report import DAY, Report, human_duration

URGENT: Final = frozenset({"archive_damaged", "other_database", "archive_missing"})  # told at once
AT_THE_OFFICE: Final = frozenset({"econnector_down", "econnector_twice"})  # its computers may be off after hours
GOOD_FOR: Final = 1800.0
AGAIN: Final = 900.0  # seconds after one that could not be sent
MANY: Final = 4  # notices a day; the next one says that it goes on like that, and then there is silence for a day
LONGEST_STEP: Final = 300.0  # between two looks: what lay further apart was not seen

Kind = Literal["trouble", "reminder", "recovered", "flapping"]
Notice = dict[str, object]


_RANK: Final = {reason: place for place, reason in enumerate(REASONS)}  # the worst first


@dataclass(frozen=True, slots=True)
class Episode:
    """Of one reason. `seen_at`: when it last was, or a worse one may have hidden it; `lasted`: seconds that count."""

    began_at: float
    seen_at: float
    lasted: float = 0.0
    told_at: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What must outlive a process. `episodes`: by reason. `sent`: troubles and ends of the last day, with the reason of
    each trouble.
    """

    looked_at: float = 0.0
    good_since: float | None = None
    episodes: Mapping[str, Episode] = field(default_factory=dict)
    sent: tuple[tuple[float, str], ...] = ()
    silent_until: float = 0.0

    def to_json(self) -> str:
        """One line for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None) -> Memory:
        """The memory in `text`; a fresh one when it is empty or damaged."""
        try:
            read = cls(**json.loads(text or "{}"))
            episodes = {name: _episode(**fields) for name, fields in dict(read.episodes).items() if name in _RANK}  # type: ignore[arg-type]
            sent = tuple((float(at), str(reason)) for at, reason in read.sent)
            return cls(float(read.looked_at), _time(read.good_since), episodes, sent, float(read.silent_until))
        except (ValueError, TypeError):
            return cls()


def _episode(began_at: float, seen_at: float, lasted: float, told_at: float | None) -> Episode:
    return Episode(float(began_at), float(seen_at), float(lasted), _time(told_at))


def _time(read: float | None) -> float | None:
    return None if read is None else float(read)


def look(memory: Memory, said: Report, now: float, after: float, office_is_open: bool) -> tuple[Memory, Notice | None]:
    """Take note of a status. `after`: seconds that most trouble may last before anybody is told."""
    step = min(max(0.0, now - memory.looked_at), LONGEST_STEP) if memory.looked_at else 0.0
    memory = replace(memory, looked_at=now, sent=tuple(each for each in memory.sent if abs(now - each[0]) < DAY))
    if said["state"] == "paused":
        return memory, None
    if said["state"] in ("ok", "catching_up"):
        return _good(memory, said, now)
    reason = str(said["reason"])
    counts = step if office_is_open or reason not in AT_THE_OFFICE else 0.0
    hidden = {name: replace(each, seen_at=now) for name, each in memory.episodes.items() if _RANK[name] > _RANK[reason]}
    before = memory.episodes.get(reason, Episode(now, now))
    episode = replace(before, seen_at=now, lasted=before.lasted + counts)
    memory = replace(memory, good_since=None, episodes={**memory.episodes, **hidden, reason: episode})
    over = {name for name, each in memory.episodes.items() if abs(now - each.seen_at) >= GOOD_FOR}
    if over and not _silent(memory, now):
        return _ended(memory, over, said, now)
    told_at = episode.told_at
    if (episode.lasted < after and reason not in URGENT) or (told_at is not None and abs(now - told_at) < DAY):
        return memory, None
    kind: Kind = "trouble" if told_at is None else "reminder"
    told = {**memory.episodes, reason: replace(episode, told_at=now)}
    return _tell(replace(memory, episodes=told), kind, said, now, [reason], now - episode.began_at)


def unsent(memory: Memory, reason: str, now: float) -> Memory:
    """A notice of that reason reached nobody: while it lasts it is told again after a quarter of an hour."""
    if (episode := memory.episodes.get(reason)) is None or episode.told_at is None:
        return memory
    return replace(memory, episodes={**memory.episodes, reason: replace(episode, told_at=now - DAY + AGAIN)})


def _good(memory: Memory, said: Report, now: float) -> tuple[Memory, Notice | None]:
    if not memory.episodes:
        return memory, None
    memory = replace(memory, good_since=now if memory.good_since is None else memory.good_since)
    if abs(now - (memory.good_since or now)) < GOOD_FOR or _silent(memory, now):
        return memory, None
    return _ended(memory, set(memory.episodes), said, now)


def _ended(memory: Memory, over: set[str], said: Report, now: float) -> tuple[Memory, Notice | None]:
    """Forget these episodes; the end of those that were told is told, too."""
    told = sorted(name for name in over if memory.episodes[name].told_at is not None)
    ends = ((memory.good_since or memory.episodes[name].seen_at) - memory.episodes[name].began_at for name in told)
    lasted = max(ends, default=0.0)
    rest = {name: each for name, each in memory.episodes.items() if name not in over}
    memory = replace(memory, good_since=None, episodes=rest)
    return _tell(memory, "recovered", said, now, told, lasted) if told else (memory, None)


def _silent(memory: Memory, now: float) -> bool:
    return 0 < memory.silent_until - now <= DAY  # further ahead: the clock was set back


def _tell(
    memory: Memory, kind: Kind, said: Report, now: float, reasons: list[str], lasted: float
) -> tuple[Memory, Notice | None]:
    """The notice, unless there were too many; trouble that was not told for a day never is one too many."""
    news = kind == "trouble" and said["reason"] not in {reason for _, reason in memory.sent}
    if kind != "reminder" and said["reason"] not in URGENT:
        if _silent(memory, now) and not news:
            return memory, None
        if len(memory.sent) >= MANY and not news:
            memory, kind = replace(memory, silent_until=now + DAY), "flapping"
        memory = replace(memory, sent=(*memory.sent, (now, "" if kind == "recovered" else str(said["reason"]))))
    took, names = human_duration(max(0.0, lasted)), ", ".join(reasons)
    words = {
        "trouble": f"{said['reason']}: {said['message']}",
        "reminder": f"still {said['reason']}, since {took}: {said['message']}",
        "recovered": f"{names} is over, after {took}; still {said['reason']}",
        "flapping": f"it comes and goes, now {said['reason']}: no further notice of it for a day",
    }
    if not memory.episodes:
        words["recovered"] = f"it works again, after {took} ({names})"
    named = {name: said[name] for name in ("practice", "at", "state", "reason", "who", "message")}
    told: Notice = {"schema_version": 1, "kind": kind, **named, "reasons": reasons, "lasted_seconds": round(lasted, 1)}
    return memory, told | {"line": f"syncd {said['practice']}: {words[kind]}"}
