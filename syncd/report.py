"""What `status`, `health` and `plan` say: facts of the index turned into one state, its reason, and figures.

Pure. Times come in as seconds since the epoch, UTC; in answers they are ISO 8601 strings in UTC, durations are seconds.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Final, Literal

from syncd.config import Settings
from syncd.errors import EXIT_ARCHIVE, EXIT_HELD, EXIT_REFUSED, REASONS, worded
from syncd.pacing import shares

State = Literal["ok", "catching_up", "degraded", "blocked", "paused", "stopped"]
Report = dict[str, Any]
SCHEMA_VERSION: Final = 1
HOUR: Final = 3600.0
DAY: Final = 24 * HOUR
WEEK: Final = 7 * DAY
LIVELY: Final = 30 * 60.0  # a first sync shows life within it; a blocked site may recover within it
FEED_IS_ON: Final = 1800.0  # seconds since it was last read; its longest period is 20 minutes
HEALTH_FACTOR: Final = 1.3  # of the floor: the polling policy lets no list rest longer than 1.15 of it
FIRST_SYNC_SHARE: Final = 0.01  # of all lists: fewer that were never polled are new patients, not a first sync
SILENT: Final = 15 * 60.0  # without a sign of life: then somebody is told
SUPPOSED_BYTES: Final = 500_000  # of one file, before anything is archived
SUPPOSED_ITEMS: Final = 8  # on one list, before any was polled: a median of 12 documents and 4 sheets a patient
TIERS: Final = (("free, 5 s", 5.0), ("paid, 1.1 s", 1.1), ("enterprise, 0.5 s", 0.5), ("unthrottled, 0.05 s", 0.05))
CHORES: Final = ("scrub", "index_copy", "drill")
_BLOCKING: Final = frozenset({EXIT_REFUSED, EXIT_ARCHIVE, EXIT_HELD})
_BLIPS: Final = 2  # tries in a row: before the second one failed too, trouble that may pass is no block
_FORESIGHT: Final = 3650 * DAY  # further ahead nobody knows when a disk is full
_BESIDE: Final = frozenset({"log_unwritable", "hook_failing"})  # the mirror goes on as ever
_URGENCY: Final = tuple(REASONS)
_COUNTS: Final = (  # figures that a status repeats as they are
    *("owed", "thumbnails_due", "held", "vanished", "pending_at_source", "drop_leftovers", "lists_unreadable"),
    *("archived_items", "archived_versions", "archived_bytes", "patients", "lists", "lists_never_polled"),
    *("archived_this_week", "vanished_this_week", "healed_this_week"),
)


@dataclass(frozen=True, slots=True)
class Trouble:
    """One open site state of one lane. `detail`: the error's own words; `failures`: tries in a row that met it."""

    lane: str
    reason: str
    detail: str
    since_at: float
    next_try_at: float
    failures: int


@dataclass(frozen=True, slots=True)
class Signs:
    """Signs of life of the lock's holder; times are steady (seconds since boot).

    `beat_at`: of its main loop. `parts`: when each last did its work, and the reason why not since, or "".
    """

    beat_at: float
    parts: Mapping[str, tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Incident:
    """One site state of the past days; `until_at` is None while it lasts."""

    lane: str
    reason: str
    since_at: float
    until_at: float | None


@dataclass(frozen=True, slots=True)
class Chore:
    """Something that is done again and again: when it was done last, when it is due, and whether it went well."""

    done_at: float | None = None
    due_at: float | None = None
    passed: bool | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """What one guard holds."""

    guard: int
    scope: str
    reason: str
    items: int
    of_items: int
    agreeing: int
    made_at: float


@dataclass(frozen=True, slots=True)
class StatusFacts:
    """What the index knows at one moment. Counts are items unless named otherwise.

    `owed_requests`: calls that the owed items take. `thumbnail_calls`: patients with an image whose thumbnail is due,
    or will be once it is archived.
    `first_sweep_lacks`: lists that were never polled, of patients as long known as any: none is of a new patient.
    `sweep_requests`: pages of all lists, as far as their lengths are known. `oldest_polled_at`: of the lists that were
    polled at all. `lists_unreadable`: read in vain for a day. `feed_at`: when the change feed was last read. `delays`:
    seconds from the appearance of a file to its archiving, of the last day's files, by kind. `grown`: bytes archived in
    each of the last seven days. `chores`: by name.
    """

    owed: int = 0
    owed_requests: int = 0
    failing: Mapping[str, int] = field(default_factory=dict)
    held: int = 0
    vanished: int = 0
    pending_at_source: int = 0
    thumbnails_due: int = 0
    thumbnail_calls: int = 0
    items: int = 0
    archived_items: int = 0
    archived_versions: int = 0
    archived_bytes: int = 0
    last_archived_at: float | None = None
    patients: int = 0
    lists: int = 0
    lists_never_polled: int = 0
    first_sweep_lacks: int = 0
    sweep_requests: int = 0
    oldest_polled_at: float | None = None
    last_listed_at: float | None = None
    lists_unreadable: int = 0
    roster_read_at: float | None = None
    drop_leftovers: int = 0
    feed_at: float | None = None
    feed_off_until: float | None = None
    delays: Mapping[str, Sequence[float]] = field(default_factory=dict)
    archived_this_week: int = 0
    vanished_this_week: int = 0
    healed_this_week: int = 0
    grown: tuple[int, ...] = ()
    chores: Mapping[str, Chore] = field(default_factory=dict)
    troubles: tuple[Trouble, ...] = ()
    holds: tuple[Hold, ...] = ()
    incidents: tuple[Incident, ...] = ()

    @property
    def last_complete_sweep_at(self) -> float | None:
        """The oldest `polled_at` of all lists; None before the first sweep. A new patient's list does not undo it."""
        return None if self.first_sweep_lacks else self.oldest_polled_at

    @property
    def mean_bytes(self) -> float:
        """Of one archived file; a supposition before the first."""
        return self.archived_bytes / self.archived_versions if self.archived_versions else SUPPOSED_BYTES

    @property
    def files_to_come(self) -> int:
        """What is owed, and what the lists that were never polled will hold if they are like the rest."""
        polled = self.lists - self.lists_never_polled
        each = self.items / polled if polled else SUPPOSED_ITEMS
        return self.owed + round(each * self.lists_never_polled)

    @property
    def requests_to_come(self) -> int:
        """Requests until nothing is owed, with the same estimate."""
        unseen = self.files_to_come - self.owed
        return self.owed_requests + self.thumbnail_calls + self.lists_never_polled + unseen


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds from start to start: at the full rate; on the mean of a week; the same for what is owed.

    `bulk_hours`: the last one for each hour of the week to come.
    """

    interval: float
    spacing: float
    bulk_spacing: float
    bulk_hours: tuple[float, ...] = ()

    @classmethod
    def of(cls, settings: Settings, now: float) -> Budget:
        """Shares, opening hours and windows of the week to come, hour by hour."""
        interval, hours = settings.api.expected_interval, range(168)
        each, bulk = zip(*(shares(settings, now + hour * HOUR) for hour in hours), strict=True)
        mean, bulk_mean = (interval * len(hours) / sum(of_hours) for of_hours in (each, bulk))
        return cls(interval, mean, bulk_mean, tuple(interval / share for share in bulk))

    def seconds_for(self, requests: float) -> float:
        """How long so many requests of bulk work take from now on, in and out of opening hours and windows."""
        for hour, seconds in enumerate(self.bulk_hours):
            if requests * seconds <= HOUR:
                return hour * HOUR + requests * seconds
            requests -= HOUR / seconds
        return len(self.bulk_hours) * HOUR + requests * self.bulk_spacing


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a status needs beside the index. `holder`: who holds the lock, as `run, pid 812`; None: nobody."""

    practice: str
    version: str
    budget: Budget
    holder: str | None = None
    requests_today: int = 0
    throttled_today: int = 0
    free_bytes: int | None = None
    reserve_bytes: int | None = None
    paused_until: float | None = None


def iso(at: float | None) -> str | None:
    """A time for programs: `2026-11-21T18:30:00.000Z`."""
    if at is None:
        return None
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def floor_seconds(facts: StatusFacts, budget: Budget) -> float:
    """The longest that a list may go unpolled: 24 hours, or three sweeps where these take longer."""
    return max(DAY, 3 * max(facts.sweep_requests, facts.lists) * budget.spacing)


def worst(troubles: tuple[Trouble, ...]) -> Trouble | None:
    """The site state that matters most: an archive that is missing comes before a site that answers slowly."""
    return min(troubles, key=lambda trouble: _URGENCY.index(trouble.reason), default=None)


def blocks(trouble: Trouble) -> bool:
    """Whether somebody must act before work goes on; trouble that may pass by itself only once it came twice."""
    who, _, exit_code = REASONS[trouble.reason]
    lasting = who != "nobody" and trouble.failures >= _BLIPS and trouble.reason not in _BESIDE
    return exit_code in _BLOCKING or lasting


def silent_parts(signs: Signs | None, steady: float, now: float) -> tuple[Trouble, ...]:
    """What hangs in the process that holds the lock. `steady`: seconds since boot; `now`: since the epoch."""
    if signs is None:
        return ()
    if steady - signs.beat_at > SILENT:
        return (Trouble("process", "not_responding", "", now - (steady - signs.beat_at), now, _BLIPS),)
    return tuple(
        _silent(part, reason, now - (steady - at), now)
        for part, (at, reason) in signs.parts.items()
        if steady - at > SILENT
    )


def _silent(part: str, reason: str, since_at: float, now: float) -> Trouble:
    reason = {"clock": "clock_stuck", "log": "log_unwritable"}.get(part, reason if reason in REASONS else "lane_stuck")
    failures = 1 if part == "log" else _BLIPS  # syncing goes on without a log
    return Trouble(part, reason, worded(reason, part), since_at, now, failures)


def absent(left_at: float) -> tuple[Trouble, ...]:
    """A service that shall mirror, and let the lock go then."""
    return (Trouble("service", "not_running", "", left_at, left_at, 1),)


def ripened(facts: StatusFacts, now: float) -> StatusFacts:
    """Throttling is a wait that was asked for; for an hour without one good answer somebody has to look."""
    long = {t for t in facts.troubles if t.reason == "throttled" and now - t.since_at > HOUR}
    changed = (replace(t, reason="throttled_long", detail="") if t in long else t for t in facts.troubles)
    return replace(facts, troubles=tuple(changed)) if long else facts


def _state(facts: StatusFacts, around: Surroundings, now: float) -> tuple[State, str]:
    """The first that applies, the worst before the rest, and the reason for it."""
    unread = not facts.lists and facts.roster_read_at is None
    roster_age = now - facts.roster_read_at if facts.roster_read_at else 0.0
    blind = next((t for t in facts.troubles if t.lane == "index"), None)  # then nothing else is known
    blocking = worst(tuple(t for t in facts.troubles if blocks(t)))
    floor = floor_seconds(facts, around.budget)
    smaller = [trouble.reason for trouble in facts.troubles]
    for reason, applies in (
        ("disappearances_held", facts.holds or facts.held),
        ("roster_unread", roster_age > floor),
        ("lists_unreadable", facts.lists_unreadable),
        ("sweep_overdue", not _fresh(facts, HEALTH_FACTOR * floor, now)[0]),
        ("items_failing", facts.failing),
    ):
        smaller += [reason] if applies else []
    degraded = min(smaller, key=_URGENCY.index, default="")
    claims: tuple[tuple[object, State, str], ...] = (
        ((around.paused_until or now) > now, "paused", "paused"),
        (blind, "blocked", blind.reason if blind else ""),
        (around.holder is None, "stopped", "not_running"),
        (blocking, "blocked", blocking.reason if blocking else ""),
        (degraded, "degraded", degraded),
        (facts.owed or facts.lists_never_polled or unread, "catching_up", "catching_up"),
    )
    return next(((state, reason) for applies, state, reason in claims if applies), ("ok", "ok"))


def _moments(
    facts: StatusFacts, around: Surroundings, state: State, trouble: Trouble | None, now: float
) -> tuple[float | None, float | None]:
    """Since when it is so, and when the next try is due."""
    if state == "paused":
        return None, around.paused_until
    if state == "stopped":
        last = max(filter(None, (facts.last_listed_at, facts.last_archived_at)), default=None)
        return trouble.since_at if trouble else last, None
    if trouble:
        return trouble.since_at, trouble.next_try_at if trouble.next_try_at > now else None
    return min((hold.made_at for hold in facts.holds), default=None), None


def status(facts: StatusFacts, around: Surroundings, now: float) -> Report:
    """`status --json`: every key of the contract (design.md section 3), and more figures that people ask for."""
    facts, floor = ripened(facts, now), floor_seconds(facts, around.budget)
    state, reason = _state(facts, around, now)
    trouble = next((t for t in facts.troubles if t.reason == reason), None)
    since, next_try_at = _moments(facts, around, state, trouble, now)
    message = (trouble.detail if trouble and trouble.detail else REASONS[reason][1]).replace("NAME", around.practice)
    swept, budget = facts.last_complete_sweep_at, around.budget
    at_work = state not in ("paused", "stopped", "blocked") and facts.requests_to_come
    eta = round(budget.seconds_for(facts.requests_to_come)) if at_work else None
    said: Report = {"schema_version": SCHEMA_VERSION, "practice": around.practice, "version": around.version}
    said |= {"at": iso(now), "state": state, "reason": reason, "message": message, "who": REASONS[reason][0]}
    said |= {"since": iso(since), "next_try_at": iso(next_try_at), "holder": around.holder, "eta_seconds": eta}
    said |= {name: getattr(facts, name) for name in _COUNTS}
    said |= {"failing": sum(facts.failing.values()), "failing_by_class": dict(sorted(facts.failing.items()))}
    said |= {"last_complete_sweep_at": iso(swept), "last_archived_at": iso(facts.last_archived_at)}
    said |= {"oldest_list_seconds": None if swept is None else max(0.0, round(now - swept, 1))}
    said |= {"requests_today": around.requests_today, "throttled_today": around.throttled_today}
    said |= {"requests_a_day": int(DAY / budget.spacing), "floor_seconds": round(floor)}
    said |= {"archive_free_bytes": around.free_bytes, "archive_reserve_bytes": around.reserve_bytes}
    said |= {"guards": [_hold(hold) for hold in facts.holds]}
    said |= {"incidents": [_incident(each, now) for each in facts.incidents]}
    said |= {"roster_read_at": iso(facts.roster_read_at), "ready_at": iso(now + eta if eta else None)}
    said |= {"expected_items": facts.archived_items + facts.files_to_come} | _space(facts, around, now)
    chores = {name: facts.chores.get(name, Chore()) for name in CHORES}
    said |= {f"{name}_last_at": iso(chore.done_at) for name, chore in chores.items()}
    said |= {f"{name}_next_at": iso(chore.due_at) for name, chore in chores.items()}
    said |= {"drill_passed": chores["drill"].passed}
    said |= _feed(facts, now) | {"freshness": {kind: _freshness(each) for kind, each in sorted(facts.delays.items())}}
    healthy, line = health(said, facts, None, floor, now)
    return said | {"healthy": healthy, "health": line}


def nothing_known(practice: str, version: str, invalid: bool, now: float) -> Report:
    """A status with every key, of a practice that cannot be asked: counts are None. `invalid`: its configuration."""
    told = status(StatusFacts(), Surroundings(practice, version, Budget(1.0, 1.0, 1.0)), now)
    said: Report = {name: type(value)() if isinstance(value, (list, dict)) else None for name, value in told.items()}
    said |= {name: told[name] for name in ("schema_version", "practice", "version", "at")} | {"who": "practice_it"}
    said |= {"state": "unknown", "reason": "unknown", "message": f"no answer: ask `sudo syncd -p {practice} status`"}
    if invalid:
        message = REASONS["config_invalid"][1].replace("NAME", practice)
        said |= {"state": "stopped", "reason": "config_invalid", "message": message}
    return said | {"healthy": False, "health": f"unhealthy: {said['reason']}: {said['message']}"}


def _space(facts: StatusFacts, around: Surroundings, now: float) -> Report:
    """How the archive grows, and when its disk is full (below the reserve) if the coming days are like the last ones.

    The middle one of seven days counts: a first sync among them says nothing of the days to come.
    """
    a_day, free, reserve = median(facts.grown or (0,)), around.free_bytes, around.reserve_bytes or 0
    full_at = None if free is None or not a_day else now + max(0, free - reserve) / a_day * DAY
    within_reason = full_at is not None and full_at - now < _FORESIGHT
    said: Report = {"grown_bytes_this_week": sum(facts.grown), "grown_bytes_a_day": round(a_day)}
    said |= {"archive_full_at": iso(full_at) if within_reason else None}
    return said | {"expected_bytes": round(facts.files_to_come * facts.mean_bytes)}


def _feed(facts: StatusFacts, now: float) -> Report:
    """Whether the change feed tells of changes, rests after it was refused or failed, or is off."""
    resting = facts.feed_off_until is not None and now < facts.feed_off_until
    reads = facts.feed_at is not None and now - facts.feed_at < FEED_IS_ON
    said = "resting" if resting else "on" if reads else "off"
    return {"change_feed": said, "change_feed_again_at": iso(facts.feed_off_until) if resting else None}


def _freshness(delays: Sequence[float]) -> Report:
    """Of the last day's files of a kind: how many, and seconds until half of them, 95 in 100 and all were archived."""
    many = len(ordered := sorted(delays))
    parts = (("median_seconds", 0.5), ("p95_seconds", 0.95), ("oldest_seconds", 1.0))
    return {"files": many} | {name: round(ordered[math.ceil(part * many) - 1], 1) for name, part in parts}


def _hold(hold: Hold) -> Report:
    named = {"id": f"guard-{hold.guard}", "scope": hold.scope, "reason": hold.reason, "made_at": iso(hold.made_at)}
    return named | {"items": hold.items, "of_items": hold.of_items, "agreeing_listings": hold.agreeing}


def _incident(incident: Incident, now: float) -> Report:
    seconds = round((incident.until_at or now) - incident.since_at, 1)
    times = {"since_at": iso(incident.since_at), "until_at": iso(incident.until_at), "lasted_seconds": seconds}
    return {"lane": incident.lane, "reason": incident.reason} | times


def health(said: Report, facts: StatusFacts, max_age: float | None, floor: float, now: float) -> tuple[bool, str]:
    """Whether the mirror is as fresh as promised, and one line that says why. `max_age` and `floor` in seconds.

    Nobody holding the lock is no verdict where no service is expected (a backfill may run once a night): the age of the
    oldest list is.
    """
    if said["state"] == "paused":
        return True, f"healthy: paused until {said['next_try_at']}"
    facts = ripened(facts, now)
    gone = max((now - t.since_at for t in facts.troubles if t.reason == "not_running"), default=0.0)
    if said["state"] == "stopped" and gone > SILENT:
        return False, f"unhealthy: not_running for {human_duration(gone)}: {said['message']}"
    since = [now - t.since_at for t in facts.troubles if blocks(t)]
    since += [
        now - hold.made_at for hold in facts.holds if hold.scope in ("all", "roster")
    ]  # is anything new true, or known?
    lasts = max(since, default=0.0)
    if said["state"] != "stopped" and (lasts > LIVELY or any(t.lane == "index" for t in facts.troubles)):
        return False, f"unhealthy: {said['reason']} for {human_duration(lasts)}: {said['message']}"
    healthy, words = _fresh(facts, HEALTH_FACTOR * floor if max_age is None else max_age, now)
    if said["state"] in ("stopped", "degraded", "blocked"):
        words += "; syncd is not running" if said["state"] == "stopped" else f"; {said['reason']}: {said['message']}"
    return healthy, f"{'healthy' if healthy else 'unhealthy'}: {words}"


def _fresh(facts: StatusFacts, limit: float, now: float) -> tuple[bool, str]:
    """Whether no list is older than `limit` seconds, or a first sync goes on; and how it stands."""
    if not facts.lists or facts.lists_never_polled > FIRST_SYNC_SHARE * facts.lists:
        return _first_sync_lives(facts, now)
    age = max(0.0, now - (facts.oldest_polled_at or 0.0))
    return age <= limit, f"the oldest list was read {human_duration(age)} ago, the limit is {human_duration(limit)}"


def _first_sync_lives(facts: StatusFacts, now: float) -> tuple[bool, str]:
    done = f"first sync, {facts.lists - facts.lists_never_polled} of {facts.lists} lists read"
    waits = [t for t in facts.troubles if REASONS[t.reason][0] == "nobody" and t.next_try_at > now]
    if waits:
        return True, f"{done}; a wait that was asked for ends {iso(waits[0].next_try_at)}"
    last = max(facts.last_listed_at or 0.0, facts.last_archived_at or 0.0)
    if now - last <= LIVELY:
        return True, done
    return False, f"{done}, and nothing was listed or archived for {human_duration(LIVELY)}"


def plan(facts: StatusFacts, budget: Budget) -> Report:
    """`plan --json`: what a sweep and what is owed cost, and how long that takes at each of the vendor's tiers."""
    sweep = max(facts.sweep_requests, facts.lists)
    tiers = []
    for name, interval in (*TIERS, ("as configured", budget.interval)):
        seconds = sweep * budget.spacing * interval / budget.interval
        days = facts.requests_to_come * budget.bulk_spacing * interval / budget.interval / DAY
        times = {"sweep_seconds": round(seconds, 1), "mean_age_seconds": round(seconds / 2, 1)}
        tiers.append({"tier": name, "days_to_finish": round(days, 4)} | times)
    planned: Report = {"patients": facts.patients, "lists": facts.lists}
    planned |= {"sweep_requests": sweep, "owed": facts.owed, "requests_to_come": facts.requests_to_come}
    expected_bytes = round(facts.files_to_come * facts.mean_bytes)
    planned |= {"expected_files": facts.files_to_come, "expected_bytes": expected_bytes}
    return planned | {"estimated": bool(facts.lists_never_polled or not facts.lists), "tiers": tiers}


def human_bytes(count: float) -> str:
    """`1.5 GB`: decimal units, as configuration writes them."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while round(count) >= 1000 and unit != "TB":  # noqa: PLR2004 - the next unit
        count, unit = count / 1000, next(units)
    return f"{count:,.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"  # noqa: PLR2004 - 3 digits


def human_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 5 min`, `2 d 3 h`: its two largest units, rounded down."""
    for size, unit, part, smaller in ((DAY, "d", HOUR, "h"), (HOUR, "h", 60.0, "min"), (60.0, "min", 60.0, "")):
        if seconds >= size:
            rest = int(seconds % size // part)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{int(seconds)} s"
