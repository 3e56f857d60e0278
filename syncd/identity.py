"""Is it still the database whose documents are in the archive? Numbers mean other people in another one.

At the start, after a change of key and daily, up to twenty random known documents are asked for again; until the
verdict nothing else is asked.
"""

from __future__ import annotations

from syncd import catalog, guards
from syncd.diff import DAY
from syncd.errors import NoSuchMethodError, SiteError, SyncdError, TransientError
from syncd.holding import end_guard, hold
from syncd.index import Index
from syncd.listing import Step
from syncd.model import Item, Listed
from syncd.sites import Doors, Sites

EVERY = DAY
SOON = 900.0  # another database: is it ours again?
BELIEVED_FOR = 2 * DAY  # what an approved database that went back lacks needs so long to be marked


def drawn(index: Index) -> list[Listed]:
    """Up to twenty random known documents, as they were listed."""
    known = "SELECT 1 FROM item i WHERE i.pat_num = v.pat_num AND i.kind = v.kind AND i.num = v.num"
    rows = catalog.drawn(
        index,
        guards.PROBED_ITEMS,
        f"kind = 'document' AND EXISTS ({known} AND vanished_at IS NULL AND held_by IS NULL)",
    )
    found = (index.listed(Item(row["pat_num"], "document", row["num"])) for row in rows)
    return [row for row in found if row is not None]


def compared(known: Listed, answer: object) -> guards.Probe:
    """A known document, and what Open Dental says of its number: patient and DateCreated agree, or not."""
    if not isinstance(answer, Listed):
        return guards.Probe("missing")
    same = (answer.item.pat_num, answer.date_created) == (known.item.pat_num, known.date_created)
    return guards.Probe("agrees" if same else "disagrees")


class IdentityStep:
    """Ask again for one known document: does its number still mean the same?"""

    bulk = False

    def __init__(self, identity: Identity, row: Listed) -> None:
        self._identity, self._row = identity, row

    def ask(self) -> Listed | None:
        """GET /documents/N."""
        return self._identity.doors.api.document(self._row.item.num)

    def take(self, answer: object, now: float) -> Step | None:
        """Number, patient and DateCreated agree, or not."""
        return self._identity.probed(compared(self._row, answer), now)

    def failed(self, error: SyncdError, now: float) -> Step | None:
        """An office that lacks the method cannot be asked. There may be a row that it cannot show: others are asked."""
        if isinstance(error, NoSuchMethodError):
            self._identity.settled("same", 0, now)
        else:
            self._identity.unprobed(error, now)
        return None

    def abandon(self) -> None:
        """It is asked at the next start."""


class Identity:
    """The comparison, one request a turn. `due_at`: when the next one begins; 0, at every start."""

    def __init__(self, doors: Doors, sites: Sites) -> None:
        self.doors, self._sites = doors, sites
        self.due_at = 0.0
        self._probes: list[guards.Probe] = []
        self._to_probe: list[Listed] = []
        self._drawn = 0

    def compare_soon(self) -> None:
        """The scheduler says that the comparison is due; the lane makes it in its turn."""
        self.due_at = 0.0

    def next(self, now: float) -> Step | None:
        """The next request of a comparison that is due; None where no document is known: then it is settled."""
        if not self._to_probe:
            self._probes = []
            self._to_probe = drawn(self.doors.index)
            self._drawn = len(self._to_probe)
        if not self._to_probe:
            self.settled("same", 0, now)
            return None
        return IdentityStep(self, self._to_probe[-1])

    def probed(self, said: guards.Probe, now: float) -> Step | None:
        """One more answer; after the last the verdict. Fewer answers than half of what was asked for prove nothing."""
        self._probes.append(said)
        self._to_probe[-1:] = []  # none is left where the verdict could not be recorded at first
        if self._to_probe:
            return IdentityStep(self, self._to_probe[-1])
        if 2 * len(self._probes) >= self._drawn:  # else others are drawn, and nothing is done before
            self.settled(guards.identity(self._probes, self._drawn), len(self._probes), now)
        return None

    def unprobed(self, error: SyncdError, now: float) -> None:
        """An answer that says nothing: the others are asked; where none is left to ask, others are drawn.

        Nothing is done before: so an office that shows too few is a state, asked with growing distance.
        """
        self._to_probe[-1:] = []
        self.due_at = now
        known = isinstance(error, (SiteError, TransientError))  # it is a state already
        if not (known or self._to_probe or 2 * len(self._probes) >= self._drawn):
            self._sites.failed(SiteError("bad_answers"), now, lane="listings")

    def settled(self, verdict: guards.Verdict, count: int, now: float) -> None:
        """Act on the verdict: go on, or hold everything until somebody approves."""
        index = self.doors.index
        self.due_at = now + EVERY
        self.doors.log.info("identity_checked", count=count, reason=verdict)
        approved = index.meta("database_approved")  # the verdict that somebody approved: no other one is let through
        if approved is not None:
            index.remember("database_approved", None)
        if approved == "database_went_back" and verdict != "other_database":
            index.remember("database_believed_at", repr(now))
        believed = now - index.meta_time("database_believed_at") < BELIEVED_FOR
        if verdict == approved or (verdict == "database_went_back" and believed):
            verdict = "same"
        if verdict == "same":
            self._sites.works("database", now)
            for row in index.rows("SELECT id FROM guard WHERE scope = 'database' AND state = 'held'"):
                end_guard(index, self.doors.log, row["id"], "over", now)
            return
        self.due_at = now + SOON if verdict == "other_database" else now + EVERY
        self._sites.failed(SiteError(verdict), now)
        held = index.rows("SELECT id, reason FROM guard WHERE scope = 'database' AND state = 'held'")
        for row in held:
            if row["reason"] != verdict:  # what is held from now on is another thing to decide
                end_guard(index, self.doors.log, row["id"], "over", now)
        if verdict not in {row["reason"] for row in held}:
            differ = sum(p.answer != "agrees" for p in self._probes)
            hold(index, self.doors.log, "database", differ, count, now, verdict)
