"""The API lane: what to ask Open Dental next, one request in flight, and where its trouble goes.

The agenda says which list is next; rows of the index say what is owed; this lane spends the budget on them. It never
waits for a pull: so many placed files at most may lie on the drop, then it lists only.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from syncd import identity, wishes
from syncd.agenda import Agenda, Policy
from syncd.diff import DAY, Owing
from syncd.errors import (
    ItemError,
    ListingError,
    NoSuchMethodError,
    OversizeError,
    SiteError,
    SyncdError,
    TransientError,
    UnansweredError,
)
from syncd.hints import Hints
from syncd.identity import Identity
from syncd.index import FAILING_AFTER
from syncd.listing import LANE_OF_LIST, ConfirmStep, Lists, ListStep, RosterStep, Step
from syncd.model import Item, Kind, ListState, Method, lists_of
from syncd.pacing import Manners, in_window, share, spacing
from syncd.placing import QUIET, Places, PlaceStep
from syncd.sites import LANE_OF, Doors, Sites, put_times_right
from syncd.upload import Uploads, UploadStep

if TYPE_CHECKING:
    from syncd.service import Claim, PaceFile

PLACED_CAP = 200  # files on the drop that are not pulled yet
ROSTER_EVERY = 900.0
ROSTER_SHARE = 0.02  # of the budget, at most, for reading the roster again and again
CLOCK_SLACK = 60.0  # seconds: a clock that is slewed never leaps so far between two turns
BLIPS = 2  # answers 429 in a row that are no state yet: other software shares the key
PATIENTS_MORE = 1.25  # times as many as the agenda was planned for
POLLS_A_REFETCH = 50  # where lists are always due, as with thousands of patients: no slot would ever be idle
IDLE = 0.5
SHORT = 0.25  # seconds from start to start: what is done between an answer and the next request costs slots
FIRST_TRIES = 64  # duties looked at in one turn; those found in the archive cost no request
OWED = ("listed", "moved", "repair", "retry", "confirm")
BULK = ("backfill",)
REFETCH = ("refetch",)
THUMBNAILS_DUE = (
    "SELECT 1 FROM item JOIN patient USING (pat_num)"
    " WHERE thumbnail_due = 1 AND thumbnails_after_at <= ? AND left_at IS NULL LIMIT 1"
)
PROBES = 4  # that failed: then one request that is due shows whether the probe alone is refused
EVERY_WHY = OWED + BULK + REFETCH


@dataclass
class Scope:
    """What this process was asked to do. A backfill polls every list once; the daemon goes round for ever.

    `since`: lists polled completely after this moment count as polled. `patients`: only these, or None for all.
    """

    backfill: bool = False
    since: float = 0.0
    patients: frozenset[int] | None = None
    max_requests: int | None = None


class ProbeStep:
    """The cheapest request while the API is in trouble: an item whose placement goes unanswered would wait for it."""

    bulk = False

    def __init__(self, lane: ApiLane) -> None:
        self._lane = lane

    def ask(self) -> str:
        """GET /preferences for one value."""
        return self._lane.doors.api.program_version()

    def take(self, answer: object, now: float) -> Step | None:
        """It answers again, whatever it says."""
        del answer, now
        self._lane.answers = self._lane.proven = True
        return None

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """The trouble goes on; the lane has noted it. Or the probe alone is refused: now and then it is not asked."""
        del error, now
        self._lane.probes_failed += 1
        self._lane.answers = self._lane.probes_failed % PROBES == 0
        return None

    def abandon(self) -> None:
        """Nothing depends on it."""


class ApiLane:
    """Turns without thread or sleep: `turn(now)` sends one request at most and says when it wants the next."""

    def __init__(self, doors: Doors, sites: Sites, pace: PaceFile, scope: Scope, now: float) -> None:
        self.doors, self.scope = doors, scope
        self._sites, self._pace = sites, pace
        self.lists = Lists(doors, sites)
        self.places = Places(doors, sites, self.lists, bulk=scope.backfill)
        self.hints = None if scope.backfill else Hints(self.lists)
        self._planned_for = self._arrived = 0  # patients, and those who came since
        self._plan(now)
        self._prepared: Step | None = None
        self._ahead: Step | None = None  # prepared while the office works on the one before it
        self._manners = Manners()
        self._in_hand: tuple[Step, object] | None = None  # answered, and not recorded yet
        self._throttles = BLIPS  # 429 in a row; not 0 at first, for a row of the last process may stand
        self._clock = (now, doors.clock.steady())
        self._refetch_after = 0.0
        self._polls = 0  # since the last refetch
        self._bulk_next = True
        self._due: tuple[str, ...] = ()  # the reasons for which anything is due, as the last decision found them
        self._patient: int | None = None
        self._quiet = 0.0 if scope.backfill else QUIET
        self.identity = Identity(doors, sites)
        self.uploads = Uploads(doors, self.lists)
        self.answers = False  # the API does again, after trouble: the next request shows whether the trouble is over
        self.proven = False  # it does, shown just now by a probe
        self.requests = self.probes_failed = 0
        self._retried = False
        for name, lane in LANE_OF_LIST.items():
            if name not in lists_of(doors.settings.sync.kinds):
                sites.works(lane, now)

    def _plan(self, now: float) -> None:
        """A new agenda, for as many patients as there are now."""
        states, api = self._lists(), self.doors.settings.api
        self._planned_for, self._arrived = len({state.key[0] for state in states}), 0
        interval = api.expected_interval / api.share
        policy = Policy.for_interval(interval, self._planned_for, self.doors.settings.zone.key)
        self.agenda = Agenda(states, Policy.once() if self.scope.backfill else policy, now)

    def _lists(self, only: frozenset[int] | None = None) -> list[ListState]:
        """Those of this scope, or of `only` these patients of it; a backfill's as if never polled."""
        wanted, once, names = self.scope.patients, self.scope.backfill, lists_of(self.doors.settings.sync.kinds)
        every = self.doors.index.lists(wanted if only is None else only if wanted is None else only & wanted)
        mine = [state for state in every if state.key[1] in names]
        return [replace(s, polled_at=0.0) for s in mine if s.polled_at < self.scope.since] if once else mine

    def refill(self, now: float, arrived: frozenset[int]) -> None:
        """Give the agenda the lists of patients who just arrived; a new policy where there are many more by now."""
        self._arrived += len(arrived)
        if not self.scope.backfill and self._arrived > (PATIENTS_MORE - 1) * self._planned_for:
            self._plan(now)
        else:
            for state in self._lists(arrived):
                self.agenda.add(state, now)

    # --- one turn

    def turn(self, now: float) -> float:
        """Send the next request if the pace allows; seconds since the epoch of the next turn."""
        self._note_clock(now)
        if self._in_hand is not None:
            self._record(*self._in_hand, now)  # raises while the index takes nothing: then nothing is asked, either
        for verb, argument in wishes.grant_all(self.doors.index, self.doors.log, now):
            self._granted(verb, argument, now)
        self._sites.look_again()
        wait = self._sites.wait_until("api", "listings")
        if wait > now or self._at_limit() or self.doors.index.paused_until(now):
            return now + IDLE
        if (step := self._ready(now)) is None:
            return now + IDLE
        settings, bulk = self.doors.settings, self.scope.backfill or step.bulk
        try:
            claim = self._pace.claim(spacing(settings, now, bulk))
        except SiteError as error:  # without a pace on disk nothing is sent
            self._sites.failed(error, now)
            return now + IDLE
        if isinstance(claim, float):
            return now + claim
        self._prepared = None
        self._in_hand = step, UnansweredError("api_error", "a bug came between")  # until there is an outcome
        with claim:
            self.doors.api.when_sending(claim.hold, partial(self._sent, step, claim, now))
            outcome = self._asked(step)
            if not settings.api.is_throttled:
                kind = step.method if isinstance(step, PlaceStep) else type(step).__name__
                part, steady = share(settings, now, bulk), self.doors.clock.steady()
                claim.rest(self._manners.rest(kind, claim.answered(), part, steady))
            if isinstance(outcome, TransientError) and outcome.reason == "throttled":
                claim.throttled(outcome.retry_after)
        self.requests += 1
        done_at = self.doors.clock.now()
        self._in_hand = step, outcome
        self._record(step, outcome, done_at)
        return done_at

    def _ready(self, now: float) -> Step | None:
        """The next request, prepared. One that waited too long, or whose site is in trouble by now, is taken back."""
        if self._prepared is None and self._ahead is not None:
            self._prepared, self._ahead = self._ahead, None
            if self._placing_waits(now):
                self.close()
        if isinstance(self._prepared, (PlaceStep, UploadStep)) and self._prepared.outdated(now):
            self.close()  # an outage or a 429 came between: its list is read again first
        if self._prepared is None:
            self._prepared = self._guarded(lambda: self.choose(now), now)
        return self._prepared

    def _sent(self, step: Step, claim: Claim, now: float) -> None:
        """The request is out. While the office writes a file the next placement is prepared, where time is short."""
        claim.sent()
        short = self.doors.settings.api.min_interval < SHORT and not self._at_limit(in_flight=1)
        if isinstance(step, PlaceStep) and self._ahead is None and short:
            self._ahead = self._guarded(lambda: self._next_owed(now), now)

    def _next_owed(self, now: float) -> Step | None:
        self._due = self._whys_due(now)
        return self._owed(now, OWED + BULK if self.scope.backfill else OWED, tries=1)

    def _at_limit(self, in_flight: int = 0) -> bool:
        return self.scope.max_requests is not None and self.requests + in_flight >= self.scope.max_requests

    def _record(self, step: Step, outcome: object, now: float) -> None:
        """Take over the answer in hand. What cannot be taken over counts as not answered; what cannot even be written
        down as that stays in hand: else its list would never be polled again.
        """
        try:
            self._prepared = self._taken(step, outcome, now)
        except Exception as error:
            self._prepared = step.failed(UnansweredError("api_error", "the answer could not be recorded"), now)
            self._in_hand = None
            self._tell_agenda(now)
            if not isinstance(error, SiteError):
                raise
            self._sites.failed(error, now)
        self._in_hand = None
        self._tell_agenda(now)

    def _note_clock(self, now: float) -> None:
        """See whether the machine's clock was set: no wait may last for the length of the leap, nothing comes early."""
        steady = self.doors.clock.steady()
        leap = (now - self._clock[0]) - (steady - self._clock[1])
        if abs(leap) > CLOCK_SLACK:
            self._clock_leapt(leap, now)
        self._clock = now, steady

    def _clock_leapt(self, leap: float, now: float) -> None:
        put_times_right(self.doors.index, now, went_back=leap < 0)
        self.doors.log.warning("clock_jumped", wait_seconds=leap)
        self._refetch_after = now + DAY  # until then the clock is right again, or what is due is due
        self.identity.due_at = min(self.identity.due_at, now + identity.EVERY)
        self.lists.roster_not_before = min(self.lists.roster_not_before, now)
        if self.hints is not None:
            self.hints.put_right(now)
        if leap < 0:
            if isinstance(self._prepared or self._ahead, (ListStep, PlaceStep)):  # it waited for longer than it seems
                self.close()
            self.scope.since = min(self.scope.since, now - CLOCK_SLACK)
            self._plan(now)

    def _granted(self, verb: str, argument: object, now: float) -> None:
        """A wish was granted that changes what is next."""
        if verb == "backfill":
            self._poll_next(frozenset(argument) if isinstance(argument, list) else None, now)
            self.lists.roster_not_before = 0.0
            self.doors.index.remember("roster_at", None)
            self._quiet = 0.0  # somebody watches: thumbnails do not wait for a quiet quarter of an hour
        elif verb == "retry" and isinstance(argument, list):
            self._poll_next(frozenset(each[0] for each in argument if each[1] == wishes.LISTS), now)
        elif verb == "approve" and self._sites.reason("database"):
            self.identity.due_at = now

    def _poll_next(self, patients: frozenset[int] | None, now: float) -> None:
        """The lists of these patients, or all, before any other."""
        for state in self.doors.index.lists():
            if patients is None or state.key[0] in patients:
                self.agenda.failed(state.key, now, now)  # one that failed has its time, and cannot be named before
                self.agenda.named(state.key, now)

    def close(self) -> None:
        """Take back what was prepared and not sent."""
        for step in filter(None, (self._prepared, self._ahead)):
            step.abandon()
        self._prepared = self._ahead = None

    def _asked(self, step: Step) -> object:
        try:
            return step.ask()
        except SyncdError as error:
            return error

    def _taken(self, step: Step, outcome: object, now: float) -> Step | None:
        probing = isinstance(step, ProbeStep)
        if isinstance(outcome, TransientError) and outcome.reason == "throttled":
            self.doors.log.warning("throttled", wait_seconds=outcome.retry_after or 0.0)
            self._throttles += 1
            if self._throttles > BLIPS:
                self._sites.failed(outcome, now, lane="throttle")
            return step if self._throttles <= 2 * BLIPS else step.failed(outcome, now)  # perhaps it is this one alone
        if self._throttles:
            self._sites.works("throttle", now)
            self._throttles = 0
        if not isinstance(outcome, SyncdError):
            if not probing:
                self._sites.works("api", now)
            self.proven = False
            return step.take(outcome, now)
        answered = isinstance(outcome, (ItemError, ListingError, OversizeError, NoSuchMethodError))
        placing = isinstance(step, (PlaceStep, UploadStep))
        lane = LANE_OF.get(outcome.reason) if isinstance(outcome, SiteError) else None
        if probing and answered:
            return step.take(None, now)
        unanswered = placing and isinstance(outcome, UnansweredError) and outcome.reason == "api_error"
        odd = isinstance(outcome, SiteError) or (isinstance(outcome, TransientError) and outcome.reason == "api_error")
        if odd and isinstance(step, PlaceStep) and self.proven and lane is None and not unanswered:
            outcome, answered = ItemError("refused", "right after another request was answered"), True
        if placing and not answered:
            self._patient = None  # others go first
        self.proven = False
        if answered or lane is not None:
            self._sites.works("api", now)
        if isinstance(step, UploadStep) and lane is not None:  # a right to write is no matter of the mirror's
            return step.failed(outcome, now)
        self.answers = answered or lane is not None
        if not answered and not (unanswered and not self._sites.reason("api")):
            self._sites.failed(outcome, now, lane)
        return step.failed(outcome, now)

    def _guarded(self, work: Callable[[], Step | None], now: float) -> Step | None:
        """Local trouble (index, archive) takes the lane's turn, not the process."""
        try:
            return work()
        except SiteError as error:
            self._sites.failed(error, now)
            return None

    def _tell_agenda(self, now: float) -> None:
        lists = self.lists
        for key, rows, newest in lists.settled:
            self.agenda.polled(key, now, rows, newest)
        for key, until in lists.postponed:
            self.agenda.failed(key, now, until)
        for pat_num in lists.departed:
            self.agenda.remove(pat_num)
        if lists.arrived:
            self.refill(now, frozenset(lists.arrived))
        for pending in (lists.settled, lists.postponed, lists.departed, lists.arrived):
            pending.clear()
        if self.hints is not None:
            self.hints.tell(self.agenda, now)

    # --- what is next

    def choose(self, now: float) -> Step | None:
        """The most useful request, or None: nothing is worth one now."""
        if now >= self.identity.due_at and (step := self.identity.next(now)) is not None:
            return step
        if self._sites.reason("database") == "other_database" or self._sites.reason("archive") == "index_lost":
            return None
        if self._sites.reason("api") and not self.answers:
            return ProbeStep(self)
        if (step := self.uploads.next(now)) is not None:
            return step
        if (step := self._useful(now)) is None and self.answers:
            self._sites.works("api", now)  # and nothing else is to be asked
        return step

    def _useful(self, now: float) -> Step | None:
        self._due = self._whys_due(now)
        if self._roster_due(now):
            return RosterStep(self.lists, self.lists.limit)
        if self.hints is not None and (step := self.hints.due(now)) is not None:
            return step
        turn_for_it = self._polls >= POLLS_A_REFETCH
        step = self._placement(now) or (turn_for_it and self._refetch(now)) or self._shared(now) or self._refetch(now)
        return step or self._placement(now)  # what failed before, where nothing else is due

    def _shared(self, now: float) -> Step | None:
        """Bulk work, which is what the first look at each list brings, and the search for news.

        In turns; but nothing keeps urgent lists waiting, and in the window of the backfill bulk work goes first.
        """
        if self.scope.backfill:
            return self._poll(now)
        local = dt.datetime.fromtimestamp(now, self.doors.settings.zone)
        if self.agenda.urgent(now) or not (self._bulk_next or in_window(self.doors.settings.backfill.window, local)):
            self._bulk_next = True
            return self._poll(now, known=True) or self._bulk(now)
        self._bulk_next = False
        return self._bulk(now)

    def _bulk(self, now: float) -> Step | None:
        return self._owed(now, BULK) or self._poll(now)

    def _poll(self, now: float, known: bool = False) -> Step | None:
        key = self.agenda.next(now, known)
        if key is None:
            return None
        self._patient = key[0]
        self._polls += 1
        return ListStep(self.lists, key, self.lists.limit)

    def _roster_due(self, now: float) -> bool:
        if now < self.lists.roster_not_before:
            return False
        read_at = self.doors.index.meta_time("roster_at")
        if self.scope.backfill:
            return read_at < self.scope.since
        pages = int(self.doors.index.meta("roster_rows") or 0) / self.lists.limit
        every = max(ROSTER_EVERY, pages * self.doors.settings.api.min_interval / ROSTER_SHARE)
        return now - read_at >= every or read_at > now

    def _placing_waits(self, now: float) -> bool:
        """Whether something is in trouble; the pull lane finds out by itself when drop and archive are back."""
        waits = self._sites.reason("drop") or self._sites.reason("archive")
        return bool(waits) or self._sites.wait_until("placing") > now

    def _may_place(self, now: float) -> bool:
        if self._placing_waits(now):
            return False
        on_drop = self.doors.index.value("SELECT count(*) FROM attempt WHERE state IN ('placed', 'asked')")
        return int(on_drop) < PLACED_CAP

    def _placement(self, now: float) -> Step | None:
        """What is owed; in a backfill all of it, else what is news. Then thumbnails.

        A site in trouble is tried with what waits longest, of all that is owed: not with the same item again and again.
        """
        trouble = self._sites.reason("placing") or self._sites.reason("api") or self._sites.reason("throttle")
        if trouble:
            self._patient = None
        step = self._owed(now, OWED + BULK if self.scope.backfill or trouble else OWED)
        if step is not None or "thumbnail" not in self.doors.settings.sync.kinds or not self._may_place(now):
            return step
        if (step := self.places.prepare_thumbnails(now, self._quiet, self.scope.patients)) is None:
            left = "SELECT 1 FROM duty WHERE method != 'confirm' UNION ALL SELECT 1 FROM attempt WHERE state = 'asked'"
            if self._sites.reason("placing") and self.doors.index.value(f"{left} LIMIT 1") is None:
                self._sites.works("placing", now)  # nothing is left that could show that it is over
        return step

    def _whys_due(self, now: float) -> tuple[str, ...]:
        """For which reasons any duty is due; mostly for none, and then this is the only question."""
        one = "SELECT * FROM (SELECT why FROM duty WHERE why = ? AND busy = 0 AND next_try_at <= ? LIMIT 1)"
        asked = (each for why in EVERY_WHY for each in (why, now))
        return tuple(row["why"] for row in self.doors.index.rows(" UNION ALL ".join([one] * len(EVERY_WHY)), *asked))

    def _owed(self, now: float, whys: tuple[str, ...], tries: int = FIRST_TRIES) -> Step | None:
        if not set(whys) & set(self._due) or not self._may_place(now):
            return None
        for _ in range(tries):
            duty = self.doors.index.next_duty(now, whys, self._patient, self.scope.patients)
            if duty is None:
                break
            failing = duty.failures >= FAILING_AFTER
            if failing and self._retried:  # every other turn is for all else, however many fail
                self._retried = False
                break
            self._retried = failing
            self._patient = duty.pat_num
            step = ConfirmStep(self.lists, duty) if duty.method == "confirm" else self.places.prepare(duty, now)
            if step is not None:
                return step
        return None

    def _refetch(self, now: float) -> Step | None:
        """An idle slot: fetch again what has no usable stamp, or was placed while its stamp was young."""
        step = self._due_refetch(now)
        if step is not None:  # its list is polled first, and it comes soon after
            self._polls = POLLS_A_REFETCH - 2 if isinstance(step, ListStep) else 0
        return step

    def _due_refetch(self, now: float) -> Step | None:
        if self.scope.backfill or now < self._refetch_after or not self._may_place(now):
            return None
        index = self.doors.index
        if self._quiet != QUIET and not index.value(THUMBNAILS_DUE, now):  # nobody looks on any more
            self._quiet = QUIET
        duty = index.next_duty(now, REFETCH, None, None) if REFETCH[0] in self._due else None
        if duty is not None:
            return self.places.prepare(duty, now)
        rows = index.rows(
            "SELECT i.* FROM item i JOIN patient p USING (pat_num) WHERE i.refetch_at <= ?"
            " AND i.vanished_at IS NULL AND i.missing_since_at IS NULL AND i.pending = 0 AND p.left_at IS NULL"
            " ORDER BY i.refetch_at LIMIT 1",
            now,
        )
        for row in rows:
            item = Item(row["pat_num"], row["kind"], row["num"])
            methods: tuple[tuple[Method, Kind], ...] = (("mount", "mount"), ("mount-images", "mount-image"))
            with index.transaction():
                index.set_item(item, "refetch_at = NULL")
                for method, kind in (("document", "document"),) if item.kind == "document" else methods:
                    if kind in self.doors.settings.sync.kinds:
                        index.owe(Owing(method, item, row["revision"], now), "refetch", now)
        duty = index.next_duty(now, REFETCH, None, None) if rows else None
        return self.places.prepare(duty, now) if duty is not None else None
