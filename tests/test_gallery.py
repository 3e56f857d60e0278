"""The pages of an export: no text of a practice is ever markup or a formula, and nothing is asked of anybody."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd import gallery
from syncd.exporting import PAGE_FILES
from syncd.gallery import Entry, Pages, Person, Visit
from syncd.naming import folder_name

PACKAGE = resources.files("syncd")
PAGES = Pages(*(PACKAGE.joinpath(name).read_text("utf-8") for name in PAGE_FILES))
PERSON = Person(101, "Smith, John", "1980-02-29", "main", "2026-11-28 07:58-06:00", "2026-11-28 08:10-06:00")
NOBODY = Person(102, "", "", "", "", "2026-11-28 08:10-06:00")
HOSTILE = st.one_of(
    st.sampled_from(("</script><img src=x onerror=alert(1)>", "<!--<script>", "$content", "${script}", "'\"&")),
    st.sampled_from(("=1+1", "\r\n=x", "@SUM(1)", "\u202egpj.exe", "\ud800", "\0", "\u2028")),
    st.text(max_size=40),
)


def row(num: int = 34, kind: str = "document", **told: Any) -> dict[str, Any]:
    return {
        "id": f"{kind}-{num}",
        "kind": kind,
        "num": num,
        "mount_num": None,
        "version": 1,
        "state": "archived",
        "category": "BWX",
        "description": "Left",
        "tooth_numbers": "",
        "img_type": "Radiograph",
        "bytes": 3,
        "date_created": "2021-04-08 10:00:00",
        "media_type": "image/jpeg",
        "sha256": "ab",
        "archived_at": "then",
        **told,
    }


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def content(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    told: dict[str, Any] = json.loads(found)
    return told


PLAIN = Elements(gallery.patient_page(PAGES, "an-id", PERSON, [Entry(row(), "BWX/x.jpg")]))
PLAIN_TABLE = Elements(gallery.patients_page(PAGES, "an-id", "Monday", ["fact"], [Visit(PERSON, "08:30", 3, 1)]))


@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_text_becomes_markup(name: str, category: str, description: str) -> None:
    person = Person(101, name, category, description, name, category)
    told = row(category=category, description=description, tooth_numbers=name)
    entries = [Entry(told, f"{folder_name(category)}/x.jpg")]
    page = gallery.patient_page(PAGES, "an-id", person, entries)
    assert Elements(page).tags == PLAIN.tags
    assert len(Elements(page).attributes) == len(PLAIN.attributes)
    assert content(page)["items"][0]["category"] == gallery.clean(category)
    table = gallery.patients_page(PAGES, "an-id", name, [description], [Visit(person, f"8{category}", 3, 1)])
    assert Elements(table).tags == PLAIN_TABLE.tags
    assert len(Elements(table).attributes) == len(PLAIN_TABLE.attributes)


@given(HOSTILE, HOSTILE)
def test_no_cell_of_the_table_is_a_formula_and_each_item_is_one_line(category: str, description: str) -> None:
    text = gallery.table(101, [Entry(row(category=category, description=description)), Entry(row(35), lack="owed")])
    assert text.count("\r\n") == 3
    assert text.replace("\r\n", "").isprintable()
    lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert {len(line) for line in lines} == {len(gallery.COLUMNS)}
    assert not [cell for line in lines for cell in line if cell.startswith(("=", "+", "-", "@"))]


@given(HOSTILE)
def test_a_clean_text_is_one_line_that_turns_nothing_round(text: str) -> None:
    assert gallery.clean(text).isprintable()


@pytest.mark.parametrize("of", ["patient", "patients"])
def test_a_page_asks_nobody_and_runs_its_own_script_only(of: str) -> None:
    page = gallery.patient_page(PAGES, "i", PERSON, [])
    page = gallery.patients_page(PAGES, "i", "t", [], []) if of == "patients" else page
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)">', page)
    rules = {name: values for name, *values in (rule.split() for rule in policy.split(";"))}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert {value for name, values in rules.items() if name not in ("style-src", "script-src") for value in values} <= {
        "'none'", "'self'", "file:", "'script'",
    }  # fmt: skip
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
            assert rules[name] == [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"]
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("// ", ""))
    assert not [name for name, _ in Elements(page).attributes if name.startswith("on") or name == "style"]
    assert page.startswith(gallery.first_line("i"))


def test_the_newest_comes_first_and_a_mount_with_its_images() -> None:
    entries = [
        Entry(row(441, "mount-image", mount_num=15), "b"), Entry(row(1, date_created="2019-01-01"), "a"),
        Entry(row(440, "mount-image", mount_num=15), "b"), Entry(row(15, "mount", date_created="2020-01-01"), "c"),
        Entry(row(2, date_created=None), "d"), Entry(row(450, "mount-image", mount_num=16), "e"),
    ]  # fmt: skip
    items = content(gallery.patient_page(PAGES, "i", PERSON, entries))["items"]
    assert [item["id"] for item in items] == [
        "mount-image-450", "mount-15", "mount-image-440", "mount-image-441", "document-1", "document-2",
    ]  # fmt: skip
    assert [item["mount"] for item in items] == ["mount-16", "", "mount-15", "mount-15", "", ""]


@pytest.mark.parametrize(
    ("media", "name", "show"),
    [
        ("image/jpeg", "x.jpg", "image"), ("image/jpeg", "x.tif", ""), ("image/png", "x.jpg", "image"),
        ("image/tiff", "x.tif", ""), ("application/pdf", "x.pdf", "pdf"), ("application/pdf", "x.bin", ""),
        ("text/plain", "x.txt", "text"), ("video/mp4", "x.mp4", "video"), ("text/html", "x.bin", ""),
    ],
)  # fmt: skip
def test_only_what_a_browser_shows_by_itself_is_shown_in_the_page(media: str, name: str, show: str) -> None:
    (item,) = content(gallery.patient_page(PAGES, "i", PERSON, [Entry(row(media_type=media), name)]))["items"]
    assert item["show"] == show


@pytest.mark.parametrize(
    ("told", "title", "date"),
    [
        ({"description": "4/8/2021: 4BW"}, "4BW", "2021-04-08"),
        ({"description": None}, "BWX", "2021-04-08"),
        ({"description": "", "category": "", "date_created": "0001-01-01"}, "document", ""),
        ({"date_created": "<b>soon"}, "Left", ""),
    ],
)
def test_every_item_has_a_title_and_a_date_or_none(told: dict[str, Any], title: str, date: str) -> None:
    (item,) = content(gallery.patient_page(PAGES, "i", PERSON, [Entry(row(**told), "x")]))["items"]
    assert (item["title"], item["date"]) == (title, date)


def test_who_it_is_and_as_of_when_stands_above_all() -> None:
    told = content(gallery.patient_page(PAGES, "i", PERSON, []))["patient"]
    assert (told["name"], told["facts"][:3]) == ("Smith, John", ["born 1980-02-29", "PatNum 101", "practice main"])
    assert "as Open Dental had it 2026-11-28 07:58-06:00" in told["facts"]
    told = content(gallery.patient_page(PAGES, "i", NOBODY, []))["patient"]
    assert told["name"] == "Patient 102"
    assert told["facts"] == ["birthdate not known", "PatNum 102", "as it was archived", f"exported {NOBODY.exported}"]


def test_the_page_of_a_day_has_times_and_tells_who_has_no_documents() -> None:
    visits = [Visit(PERSON, "08:30", 3, 0), Visit(NOBODY, "09:00", 0, 0)]
    page = gallery.patients_page(PAGES, "i", "Monday", ["2 appointments"], visits)
    assert ("<th>time" in page, page.count("<a href="), "no documents" in page) == (True, 1, True)
    assert "<th>time" not in gallery.patients_page(PAGES, "i", "all", [], [Visit(PERSON, "", 3, 1)])
