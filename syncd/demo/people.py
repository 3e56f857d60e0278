"""Invented patients and plausible papers: names, file names, descriptions. No real person is meant."""

import random

FIRST = (
    "Ada", "Bela", "Chidi", "Dora", "Emil", "Fatou", "Gus", "Hana", "Ines", "Jürgen", "Kemal", "Lotte", "Mei",
    "Noé", "Olga", "Pavel", "Quentin", "Rosa", "Søren", "Tariq", "Uma", "Vera", "Wim", "Ximena", "Yusuf",
    "Zoë",
)  # fmt: skip
LAST = (
    "Abendroth", "Birdsong", "Castellanos", "D'Amico", "Eastwick", "Fernándes", "Grünwald", "Hollowell",
    "Ivanova", "Jansson", "Kowalczyk", "Lindqvist", "McAlister", "Nakamura", "O'Rourke", "Popović", "Quill",
    "Rasmussen", "Świątek", "Thistle", "Ulrich", "Van der Meer", "Wren", "Xu", "Yarrow", "Zamora",
)  # fmt: skip

IMAGES = ("Periapical", "Pano", "Intraoral photo", "Extraoral", "Bitewing", "Occlusal", "Shade photo")
PAPERS = ("Insurance card", "Referral letter", "ID", "Treatment plan signed", "Lab slip", "Consent", "EOB")

_HOSTILE = ("../../etc/passwd", "scan\nline two", "x" * 300, "..", "-rf", "a/b/c", "nul")
_ODD = ("Müller, Jörg — Röntgen 12,3", "scan (2) #final", "写真", "été à la plage", "x" * 180, "What's this; really")


def image_extension(rng: random.Random) -> str:
    """An extension of an image: mostly jpg."""
    return rng.choices(("jpg", "png", "gif", "tif", "jpeg"), (78, 12, 3, 5, 2))[0]


def paper_extension(rng: random.Random) -> str:
    """An extension of what is no image: mostly pdf."""
    return rng.choices(("pdf", "txt", "dcm"), (92, 6, 2))[0]


def odd_name(rng: random.Random, extension: str) -> str:
    """A name as dropped-in Windows files have: spaces, commas, accents, length."""
    return f"{rng.choice(_ODD)} {rng.randint(1, 999)}.{extension}"


def hostile_name(rng: random.Random, extension: str) -> str:
    """A name that no file system should be trusted with: `../`, a newline, 300 letters."""
    return f"{rng.choice(_HOSTILE)}.{extension}"
