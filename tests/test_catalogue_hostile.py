"""The catalogue of faults, part E, what no other test shows: names, notes and bytes that strangers made to do harm."""

from __future__ import annotations

import ast
import io
import json
import random
import re
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import syncd
from syncd.logs import open_logs
from syncd.model import KINDS, Item
from syncd.naming import EXTENSIONS, archive_path_is_ours, extension_of, own_extension, plain_words, staging_name
from syncd.screen import table
from syncd.search import Filters
from tests.small import DAY
from tests.world import START, RecordedLog, World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

PRODUCT = Path(syncd.__file__).parent
LARGEST = 2**63 - 1
LONGEST = 100  # bytes of one name that we make
PIECES = (
    *("../", "..\\", "/", "\\", "\\\\server\\share\\", "C:", "C:\\", "~/", "./", "//", "%2e%2e%2f", "file:///"),
    *("\0", "\n", "\r\n", "\x1b[2J", "\x07", "\u2028", "\u2029", "\u202e", "\u200b", "\ufeff", "\x85", "\x7f"),
    *("%n", "%s", "{0.__class__}", "{}", "$HOME", "`id`", ";rm -rf /", "|", "&", "*", "?", "<", ">", '"', "'"),
    *("CON", "NUL.txt", "COM1", "aux", "x.", "x ", "a:b", "::$DATA", ".", "..", "...", " ", "-rf", "--yes"),
    *("é", "e\u0301", "Å", "ß", "ſ", "K", "İ", "x" * 255, "é" * 128, "\U0001f600", "牙", "\ud800"),
    *("'; DROP TABLE item; --", '" OR 1=1', "%", "_", "patient.json", ".syncd-archive", "index.db", "1-3f2a.json"),
    *(".jpg", ".JPG", ".jpeg", ".pdf", ".json", ".exe", ".html", ".gz", ".jpg ", ".jpg.", ".jp\u0261", ".\u202egpj"),
)  # fmt: skip
TEXTS = (
    '{"event": "document_archived", "item": "101/document-1"}',
    '2026-03-10T09:00:00.000Z error "event": "started"\n{"level": "error", "event": "stopped"}\r\n\x85\u2028forged',
    "%s%n%(name)s {0.__class__.__init__.__globals__} {event!r} [red]bold[/red] [/] \\[",
    "'; DROP TABLE item; -- \" OR 1=1 /* \x1b[2J\x1b]0;title\x07 \u202egpj.exe\u2066",
)


def hostile_names(count: int) -> Iterator[str]:
    """So many names, the same ones each time."""
    rng = random.Random("hostile names")
    for _ in range(count):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 4)))


def test_hundred_thousand_hostile_names_leave_nothing_but_an_extension() -> None:
    for name in hostile_names(100_000):
        extension = extension_of(name)
        assert extension in EXTENSIONS
        staged = staging_name("syncd", "main", "20261121", "a" * 32, own_extension(name))
        assert re.fullmatch(r"syncd/syncd-main-20261121-a{32}(\.[a-z0-9]{1,8}|/)", staged), repr(name)
    for name in hostile_names(2_000):
        assert all(letter.isprintable() for letter in plain_words(name)), repr(name)
        assert not set(plain_words(name)) & set('<>:"/\\|?*'), repr(name)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_ours_are_short_plain_and_differ_in_more_than_their_case(kind: str) -> None:
    seen: set[str] = set()
    for num in (1, 34, 10**18, LARGEST):
        folder = f"patients/{num}/{Item(num, kind, num).id}"  # type: ignore[arg-type]  # one of the kinds
        for extension in EXTENSIONS:
            for path in (f"{folder}/1-{'f' * 12}.{extension}", f"{folder}/{10**17}-{'0' * 12}.{10**17}.json"):
                assert archive_path_is_ours(path)
                assert all(len(part.encode()) <= LONGEST for part in path.split("/"))
                assert re.fullmatch(r"[a-z0-9./-]+", path)
                seen.add(path)
    assert len({path.casefold() for path in seen}) == len(seen)
    assert len(staging_name("x" * 20, "x" * 20, "20261121", "a" * 32, "x" * 8).rpartition("/")[2]) <= LONGEST


# --- texts of strangers in a whole mirror


@pytest.fixture
def mirrored(tmp_path: Path) -> World:
    """A mirror of a patient all of whose texts are hostile, with the real log."""
    world = World.start(tmp_path, interval=10.0)
    log = open_logs(world.settings, {}, verbose=1, now=world.clock.now)
    world.log = cast("RecordedLog", log)
    world.restart()
    practice = world.practice
    with practice.as_of(START - 40 * DAY):
        for text in TEXTS:
            pat = practice.add_patient(text, text)
            practice.add_document(pat, "txt", description=text, Note=text, ToothNumbers=text)
            practice.add_mount(pat, 2, description=text, Note=text)
            practice.add_sheet(pat, InternalNote=text, Description=text)
    world.run(hours=3)
    return world


def test_hostile_texts_are_archived_as_they_are_and_never_obeyed(mirrored: World) -> None:
    mirrored.check()
    assert mirrored.index.value("SELECT count(*) FROM item WHERE kind IN ('document', 'mount', 'sheet')") == 12
    found = list(mirrored.catalog().find(Filters()))
    assert {row["state"] for row in found} == {"archived"}
    kept = [json.loads(path.read_text())["listing"] for path in mirrored.archive.glob("patients/*/document-*/*.json")]
    one_line = {re.sub(r"\r\n|\r|\n", " ", text) for text in TEXTS}  # as the office sends them
    assert {listing["Description"] for listing in kept} == one_line
    names = [json.loads(path.read_text())["last_name"] for path in mirrored.archive.glob("patients/*/patient.json")]
    assert set(names) == one_line


def test_hostile_texts_forge_no_line_of_the_log(mirrored: World) -> None:
    for path in mirrored.settings.log_path.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_text(encoding="utf-8")
        assert not any(piece in content for piece in ("forged", "DROP TABLE", "__class__", "[red]", "%n", "\x1b"))
        if path.name == "syncd.log":
            lines = [json.loads(line) for line in content.splitlines()]
            assert len(lines) > 20
            assert all(line.keys() >= {"time", "level", "event"} for line in lines)


def test_hostile_texts_stay_one_row_of_a_table() -> None:
    shown = table(("description",), [[text] for text in TEXTS])
    assert len(shown.splitlines()) == 1 + len(TEXTS)
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert "[red]bold[/red] [/]" in shown


# --- bytes of strangers


def zip_bomb() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"../../{number}", b"\0" * 8_000_000)
    return packed.getvalue()


def png_bomb() -> bytes:
    """60,000 by 60,000 pixels in some kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    pixels = zlib.compress(b"\0" * 8_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bombs_and_programs_are_archived_byte_for_byte_and_never_opened(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0, sync={"kinds": ["document"]})
    pat = world.practice.add_patient()
    files = {
        "zip": zip_bomb(), "png": png_bomb(), "pdf": b"%PDF-1.4\n" + zlib.compress(b"\0" * 8_000_000) + b"\n%%EOF\n",
        "jpg": b"MZ" + bytes(range(256)) * 40, "docx": zip_bomb(),
    }  # fmt: skip
    numbers = {name: world.practice.add_document(pat, name, data=content) for name, content in files.items()}
    tracemalloc.start()
    try:
        world.run(hours=1)
        assert tracemalloc.get_traced_memory()[1] < 24_000_000
    finally:
        tracemalloc.stop()
    world.check()
    assert {name: world.media(pat, "document", num) for name, num in numbers.items()} == {
        name: [content] for name, content in files.items()
    }
    assert all(path.stat().st_mode & 0o111 == 0 for path in world.archive.rglob("*") if path.is_file())


DECODERS = frozenset(
    {"PIL", "zipfile", "tarfile", "gzip", "zlib", "bz2", "lzma", "pickle", "marshal", "shelve", "xml", "html", "email"}
    | {"pypdf", "fitz", "cv2", "numpy", "pydicom", "lxml", "yaml"}
)


def test_no_module_of_the_product_can_unpack_or_decode_a_file() -> None:
    imported: dict[str, set[str]] = {}
    for path in PRODUCT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported.setdefault(path.name, set()).update(names)
    roots = {file: {name.partition(".")[0] for name in names} for file, names in imported.items()}
    assert len(roots) > 30
    found = {file: names & DECODERS for file, names in roots.items() if names & DECODERS}
    # Dates of HTTP: email.utils. The bundle for strangers is only ever packed. html.escape: what is written, not read.
    assert found == {"pacing.py": {"email"}, "bundle.py": {"gzip", "tarfile"}, "gallery.py": {"html"}}
    assert "unescape" not in (PRODUCT / "gallery.py").read_text("utf-8")
    assert not re.search(r"extract|getmember|mode=\"r", (PRODUCT / "bundle.py").read_text("utf-8"))


# --- a patient with more documents than all others


def test_patient_with_hundreds_of_documents_holds_up_no_other_longer_than_for_as_many_requests(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=1.0, nap=60.0)
    with world.practice.as_of(START - 40 * DAY):
        many, other = world.practice.add_patient(), world.practice.add_patient()
        for _ in range(300):
            world.practice.add_document(many, "txt", data=b"tiny\r\n")
    world.run(seconds=60)
    doc = world.practice.add_document(other, "txt", data=b"of another\r\n")
    world.run(until=lambda: world.media(other, "document", doc))
    assert world.clock.now() - START < 300 * 1.1 + 60
    world.run(seconds=60)
    world.check()


def test_list_of_thousands_of_rows_is_read_in_bounded_memory(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=1.0, sync={"kinds": ["sheet"]})
    world.index.run("INSERT INTO site VALUES ('placing', 'placements_refused', '', 0, 9e12, 1)")
    pat = world.practice.add_patient()
    rows = 3000
    with world.practice.as_of(START - 40 * DAY):
        for _ in range(rows):
            world.practice.add_sheet(pat)
    world.run(until=lambda: world.sent("/sheets"))
    tracemalloc.start()
    try:
        world.run(until=lambda: world.index.polled_at(pat, "sheets"))
        assert tracemalloc.get_traced_memory()[1] < rows * 8_000
    finally:
        tracemalloc.stop()
    assert world.index.value("SELECT count(*) FROM item") == rows
