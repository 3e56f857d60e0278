"""When syncd must not believe what it sees: mass disappearances, alike failures, another practice's database. Pure.

Guards hold disappearances only; new and changed rows are never held (design.md section 7).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

PATIENT_LEAST = 20  # items of one patient, and more than half of them
PRACTICE_LEAST = 50  # items in 24 h, and more than 1 % of all
PRACTICE_SHARE = 0.01
ROSTER_LEAST = 20  # patients whom one roster lacks, and more than half; from PRACTICE_LEAST on more than 1 % is enough
AGREEING_LISTINGS = 7  # on as many days: then a hold ends by itself
BREAKER_LEAST = 5
PROBED_ITEMS = 20
DISAGREEMENTS = 2

Verdict = Literal["same", "other_database", "database_went_back"]
Tried = tuple[str, int, int]


def holds_patient(missing: int, items: int) -> bool:
    """Whether so many items of one patient may not go at once. `items`: those that were there before."""
    return missing >= PATIENT_LEAST and missing * 2 > items


def holds_practice(missing_in_a_day: int, items: int) -> bool:
    """Whether so many items of the whole practice may not go within 24 h."""
    return missing_in_a_day >= PRACTICE_LEAST and missing_in_a_day > PRACTICE_SHARE * items


def holds_roster(missing: int, patients: int) -> bool:
    """Whether so many patients may not have left at once. `patients`: those who were there before.

    A roster that was cut short looks complete; whom it lacks would not be polled any more, and nobody would notice.
    """
    return (missing >= ROSTER_LEAST and missing * 2 > patients) or holds_practice(missing, patients)


@dataclass(frozen=True, slots=True)
class Probe:
    """One known item, asked for again: does the database behind the key still mean the same by its number?"""

    answer: Literal["agrees", "disagrees", "missing"]


def identity(probes: Iterable[Probe], drawn: int) -> Verdict:
    """Judge what was answered about `drawn` random known items, up to 20.

    More than two with another patient or another DateCreated: numbers mean other people there. Rows missing while the
    rest agree: a practice restored from backup. Where more than two were drawn and none agrees, no identity is proven:
    that counts as another database, and never ends a hold of it.
    """
    answers = [probe.answer for probe in probes]
    disagreeing, missing = answers.count("disagrees"), answers.count("missing")
    if disagreeing > DISAGREEMENTS or (drawn > DISAGREEMENTS and "agrees" not in answers):
        return "other_database"
    return "database_went_back" if missing > DISAGREEMENTS else "same"


@dataclass(slots=True)
class Breaker:
    """Many alike failures of different items in a row are a state of the site, not failures of the items.

    What failed while another one of its method, or any document, worked had trouble of its `own` (item: failure):
    failing in that way again, it neither counts nor starts the count anew, until it works. Where one works that had
    failed itself, the trouble was the site's. An item is (method, PatNum, number). A sheet that works says nothing of
    documents: it needs no folder of images.
    """

    least: int = BREAKER_LEAST
    failure: str = ""
    items: set[Tried] = field(default_factory=set)
    own: dict[Tried, str] = field(default_factory=dict)

    def failed(self, failure: str, item: Tried) -> bool:
        """Count one failure; True when it trips: since the last success, `least` items failed in this one way."""
        if self.own.get(item) != failure:
            if failure != self.failure:
                self.failure, self.items = failure, set()
            self.items.add(item)
        return failure == self.failure and len(self.items) >= self.least

    def succeeded(self, item: Tried) -> None:
        """This one worked."""
        if self.items and item[0] != "document" and item[0] not in {method for method, *_ in self.items}:
            return
        if item not in self.items:
            self.own |= {each: self.failure for each in self.items if item[0] in (each[0], "document")}
        self.own.pop(item, None)
        self.failure, self.items = "", set()
