"""What an export shows: pages that a browser opens from disk, and a table for Excel. Pure.

Every text of the practice may be hostile. In a page it stands escaped, or inside JSON in which nothing can end the
script element; in the table it is never a formula. A page asks nobody: its policy lets it load what lies beside it, and
run the one script whose hash it names.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, Final, Literal
from urllib.parse import quote

from syncd.naming import undated
from syncd.report import human_bytes

Row = Mapping[str, Any]
Lack = Literal["", "damaged", "vanished", "owed"]
LACKS: Final[dict[Lack, str]] = {
    "": "copied",
    "damaged": "damaged in the archive, left out",
    "vanished": "no longer in Open Dental, left out",
    "owed": "not archived yet",
}
COLUMNS: Final = (
    *("id", "patient", "copy", "date", "category", "description", "teeth", "image_type", "version", "archived_at"),
    *("bytes", "media_type", "sha256", "file"),
)
PICTURES: Final = {"image/jpeg": "jpg", "image/png": "png", "image/gif": "gif", "image/bmp": "bmp"}
_SHOWN: Final = {  # media types that browsers show by themselves, and the file names by which they know them
    **dict.fromkeys(PICTURES, ("image", "jpg jpeg png gif bmp bin")),
    "application/pdf": ("pdf", "pdf"),
    "text/plain": ("text", "txt"),
    "video/mp4": ("video", "mp4"),
}
_FORMULA: Final = ("=", "+", "-", "@")  # tabs and line ends are gone by then
_POLICY: Final = (
    "default-src 'none'; img-src 'self' file:; media-src 'self' file:; frame-src 'self' file:; object-src 'self' file:;"
    " style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One current item: its row as `find` tells it; `file` and `thumbnail` relative to the page, empty for none."""

    row: Row
    file: str = ""
    thumbnail: str = ""
    lack: Lack = ""


@dataclass(frozen=True, slots=True)
class Person:
    """Whom a page is about. `listed` and `exported`: times for people; `listed` is empty where nobody knows."""

    pat_num: int
    name: str
    born: str
    practice: str
    listed: str
    exported: str


@dataclass(frozen=True, slots=True)
class Visit:
    """A line of the page above all patients. `at`: `08:30`, empty where no day was asked for."""

    person: Person
    at: str
    files: int
    lacking: int


@dataclass(frozen=True, slots=True)
class Pages:
    """The parts of which pages are made: the package's own files."""

    patient: str
    patients: str
    style: str
    script: str


def clean(text: object) -> str:
    """A text as one line without control and formatting characters: nothing turns the direction of what follows."""
    letters = "" if text is None else str(text)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in letters).split())


def first_line(archive_id: str) -> str:
    """How a page of this archive begins: by this an export knows its own."""
    return f"<!doctype html>\n<!-- syncd export, archive {html.escape(archive_id)} -->\n"


def patient_page(pages: Pages, archive_id: str, person: Person, entries: Sequence[Entry]) -> str:
    """The gallery of one patient, whole in itself but for the copies beside it."""
    content = {
        "patient": {"name": _name(person), "facts": _facts(person)},
        "items": [_item(entry) for entry in _in_order(entry for entry in entries if not entry.lack)],
        "lacking": [
            {"id": each.row["id"], "text": _title(each.row), "date": _date(each.row), "why": LACKS[each.lack]}
            for each in sorted(entries, key=lambda each: each.lack)
            if each.lack
        ],
    }
    told = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return _fill(pages.patient, pages, archive_id, title=_name(person), content=told)


def patients_page(pages: Pages, archive_id: str, title: str, facts: Sequence[str], visits: Sequence[Visit]) -> str:
    """The page above all patients, in the order given; with a column of times where a day was asked for."""
    timed = any(visit.at for visit in visits)
    head = ("time",) * timed + ("patient", "born", "PatNum", "files", "left out")
    rows = ((html.escape(visit.at),) * timed + _line(visit) for visit in visits)
    told = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}\n" for row in rows)
    heads = "".join(f"<th>{name}" for name in head)
    return _fill(pages.patients, pages, archive_id, title=title, facts=told, head=heads, rows=lines)


def _line(visit: Visit) -> tuple[str, ...]:
    """The cells of one patient, as markup."""
    person, name = visit.person, f"<bdi>{html.escape(_name(visit.person))}</bdi>"
    if not visit.files and not visit.lacking:
        return name, html.escape(person.born), str(person.pat_num), "no documents", ""
    link = f'<a href="{person.pat_num}/index.html">{name}</a>'
    lacking = f"{visit.lacking:,}" if visit.lacking else ""
    return link, html.escape(person.born), str(person.pat_num), f"{visit.files:,}", lacking


def _name(person: Person) -> str:
    return person.name or f"Patient {person.pat_num}"


def table(pat_num: int, entries: Iterable[Entry]) -> str:
    """All of them as CSV (RFC 4180) that Excel opens: to be written with a byte order mark."""
    paper = io.StringIO()
    writer = csv.writer(paper)
    writer.writerow(COLUMNS)
    for entry in entries:
        row = entry.row
        told = [row["id"], pat_num, LACKS[entry.lack], _date(row), row["category"], undated(row["description"])]
        told += [row["tooth_numbers"], row["img_type"], row["version"], row["archived_at"], row["bytes"]]
        writer.writerow(map(_cell, (*told, row["media_type"], row["sha256"], entry.file)))
    return paper.getvalue()


def _cell(value: object) -> str:
    text = clean(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _fill(page: str, pages: Pages, archive_id: str, title: str, **parts: str) -> str:
    policy = _POLICY.format(style=_hash(pages.style), script=_hash(pages.script))
    parts |= {"policy": policy, "style": pages.style, "script": pages.script, "title": html.escape(title)}
    return first_line(archive_id) + Template(page).substitute(parts)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(person: Person) -> list[str]:
    born = f"born {person.born}" if person.born else "birthdate not known"
    listed = f"as Open Dental had it {person.listed}" if person.listed else "as it was archived"
    said = (born, f"PatNum {person.pat_num}", person.practice and f"practice {person.practice}", listed)
    return [*filter(None, said), f"exported {person.exported}"]


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The newest first; a mount's images right behind it, in the order of their numbers."""
    there = list(entries)
    mounts = {entry.row["num"]: entry for entry in there if entry.row["kind"] == "mount"}
    images: dict[int, list[Entry]] = {num: [] for num in mounts}
    tops = list[Entry]()
    for entry in there:
        images.get(_mount_of(entry.row), tops).append(entry)
    tops.sort(key=lambda entry: (str(entry.row["date_created"] or ""), entry.row["num"]), reverse=True)
    ordered = []
    for top in tops:
        ordered.append(top)
        if top.row["kind"] == "mount":
            ordered += sorted(images[top.row["num"]], key=lambda entry: int(entry.row["num"]))
    return ordered


def _mount_of(row: Row) -> int:
    return int(row["mount_num"] or 0) if row["kind"] == "mount-image" else 0


def _item(entry: Entry) -> dict[str, object]:
    """What the script needs of one item; every text is clean, every address is quoted."""
    row, (folder, _, name) = entry.row, entry.file.rpartition("/")
    extension = name.rpartition(".")[2]
    show, names = _SHOWN.get(row["media_type"], ("", ""))
    mount = _mount_of(row)
    return {
        "id": row["id"],
        "mount": f"mount-{mount}" if mount else "",
        "title": _title(row),
        "date": _date(row),
        "category": clean(row["category"]),
        "teeth": clean(row["tooth_numbers"]),
        "type": clean(row["img_type"]),
        "show": show if extension in names.split() else "",
        "format": extension.upper(),
        "file": quote(entry.file),
        "folder": folder,
        "name": name,
        "thumbnail": quote(entry.thumbnail),
        "size": human_bytes(row["bytes"]),
        "version": row["version"],
        "archived": row["archived_at"],
        "sha256": row["sha256"],
        "gone": row["state"] == "vanished",
    }


def _title(row: Row) -> str:
    return clean(undated(row["description"])) or clean(row["category"]) or str(row["kind"])


def _date(row: Row) -> str:
    """yyyy-mm-dd, empty for a date that is none."""
    date = clean(row["date_created"])[:10]
    return "" if date.startswith("0001") or not date.replace("-", "").isdigit() else date
