"""A practice with a past, for demonstrations, tests and benchmarks."""

import random
from dataclasses import dataclass

from syncd.demo import people
from syncd.demo.clock import Clock
from syncd.demo.practice import Practice
from syncd.demo.schema import IMG_TYPES, NEVER

_DAY = 86_400.0
_MOST_MOUNTS = 5
_XRAY, _PICTURES, _SCANS, _LETTERS = 190, 47, 135, 136


@dataclass(frozen=True)
class Past:
    """How full a practice is.

    `documents`, `sheets`: medians of the log-normal numbers a patient, `sigma` theirs. `mounts`: mean number a
    patient, at most 5. `images`: share of images among documents. `years`: how far back it goes. `archived`,
    `deceased`, `deleted`: shares of patients. `odd_names`, `hostile_names`: shares of documents. `raw`, `urls`:
    shares of uploaded rows. `old_sheets`: share of sheets without a stamp.
    """

    documents: float = 12.0
    sheets: float = 4.0
    sigma: float = 1.0
    mounts: float = 0.6
    images: float = 0.8
    years: float = 6.0
    archived: float = 0.05
    deceased: float = 0.01
    deleted: float = 0.01
    odd_names: float = 0.03
    hostile_names: float = 0.003
    raw: float = 0.002
    urls: float = 0.001
    old_sheets: float = 0.01


def build_practice(
    patients: int,
    seed: int,
    clock: Clock,
    *,
    time_zone: str = "America/Chicago",
    past: Past | None = None,
    in_database: bool = False,
    name: str | None = None,
) -> Practice:
    """A practice of that many invented patients, with history up to the clock's now; the same for the same seed."""
    practice = Practice(clock, time_zone, seed=seed, name=name, in_database=in_database)
    rng = random.Random(f"past {seed}")
    shape = past or Past()
    now = clock.now()
    for _ in range(patients):
        joined = now - rng.uniform(30.0, shape.years * 365.0) * _DAY
        with practice.as_of(joined):
            pat_num = practice.add_patient(rng.choice(people.LAST), rng.choice(people.FIRST))
        _fill(practice, rng, shape, pat_num, (joined, now - 2 * _DAY))
        with practice.as_of(now - rng.uniform(1.0, 30.0) * _DAY):
            _settle(practice, rng, shape, pat_num)
    return practice


def _fill(practice: Practice, rng: random.Random, shape: Past, pat_num: int, span: tuple[float, float]) -> None:
    """Give one patient documents, mounts and sheets, at visits spread over `span` (seconds since the epoch)."""
    visits = sorted(rng.uniform(*span) for _ in range(rng.randint(1, 12)))
    for _ in range(_drawn(rng, shape.documents, shape.sigma)):
        with practice.as_of(rng.choice(visits) + rng.uniform(0.0, 7_200.0)):
            add_any_document(practice, rng, pat_num, shape)
    for _ in range(sum(rng.random() < shape.mounts / _MOST_MOUNTS for _ in range(_MOST_MOUNTS))):
        with practice.as_of(rng.choice(visits)):
            practice.add_mount(pat_num, rng.choices((4, 18, 2), (80, 5, 15))[0], Note="Bitewings")
    for _ in range(_drawn(rng, shape.sheets, shape.sigma)):
        with practice.as_of(rng.choice(visits) - rng.uniform(0.0, 3_600.0)):
            stamp = NEVER if rng.random() < shape.old_sheets else None
            practice.add_sheet(pat_num, rng.choice((20, 22, 23, 24, 25)), stamp=stamp)


def _drawn(rng: random.Random, median: float, sigma: float) -> int:
    """A log-normal number, at most 40 times the median."""
    if median <= 0:
        return 0
    return min(round(40 * median), int(median * rng.lognormvariate(0.0, sigma)))


def add_any_document(practice: Practice, rng: random.Random, pat_num: int, shape: Past) -> int:
    """One document as practices have them: an image or a paper, seldom with an odd name. Returns the DocNum."""
    if rng.random() < shape.raw:
        data = f"PatNum={pat_num} uploaded by another program, {rng.random()}\r\n".encode()
        return practice.add_raw_document(pat_num, data, ".txt", Description="Uploaded")
    if rng.random() < shape.urls:
        return practice.add_url_document(pat_num, "https://files.example.org/scan.jpg", Description="Linked")
    image = rng.random() < shape.images
    extension = people.image_extension(rng) if image else people.paper_extension(rng)
    chance, name = rng.random(), None
    if chance < shape.hostile_names:
        name = people.hostile_name(rng, extension)
    elif chance < shape.hostile_names + shape.odd_names:
        name = people.odd_name(rng, extension)
    return practice.add_document(
        pat_num,
        extension,
        file_name=name,
        description=rng.choice(people.IMAGES if image else people.PAPERS),
        DocCategory=rng.choice((_XRAY, _XRAY, _PICTURES)) if image else rng.choice((_SCANS, _LETTERS)),
        ImgType=IMG_TYPES.index(rng.choice(("Radiograph", "Photo")) if image else "Document"),
        ToothNumbers=str(rng.randint(1, 32)) if image and rng.random() < 0.5 else "",  # noqa: PLR2004  (half)
    )


def _settle(practice: Practice, rng: random.Random, shape: Past, pat_num: int) -> None:
    """Some patients are archived, deceased or deleted by now."""
    chance = rng.random()
    for status, share in (("Deleted", shape.deleted), ("Deceased", shape.deceased), ("Archived", shape.archived)):
        if chance < share:
            practice.set_patient_status(pat_num, status)
            return
        chance -= share
