"""The gallery as people open it: from a folder, in a real browser, without a server and without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from syncd import gallery
from syncd.demo.files import FileSpec
from syncd.exporting import PAGE_FILES
from syncd.gallery import Entry, Pages, Person
from tests.browser import Browser, browser
from tests.test_cli import Desk, practice

pytestmark = pytest.mark.slow  # starts a browser, once

HOSTILE = (
    "</script><img src=x onerror=document.title='pwned'>",
    "exe.\u202egpj\nline two",
    "100 % #1? &amp; 'x' \"y\"",
)
CARD = '#years [data-id="%s"]'
IDS = (
    "return [...document.querySelectorAll('#years [data-id]')].filter(each => each.checkVisibility())"
    ".map(each => each.dataset.id)"
)
STAGE = (
    "const picture = document.querySelector('#stage > img');"
    "return picture && picture.complete && picture.naturalWidth && picture.style.transform"
)
LOOK = "return document.querySelector('#stage > img').style.filter"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as window:
        window.resize(1300, 900)
        yield window


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The folder of a simulated patient with everything in it, moved elsewhere; and the ids of all its items."""
    with practice(2) as simulation:
        office = simulation.practice
        patient = office.rows("SELECT PatNum FROM patient LIMIT 1")[0]["PatNum"]
        office.add_mount(patient, 3, "4BW")
        for text in HOSTILE:
            office.add_document(patient, "jpg", description=text)
        for extension in ("pdf", "tif", "txt", "dcm", "png", "gif"):
            office.add_document(patient, extension, description=f"one {extension}", DocCategory=135)
        desk = Desk(simulation, tmp_path_factory.mktemp("office"))
        assert desk.call("backfill").exit_code == 0
        said = desk.json("export", "--patient", str(patient), "--to", str(desk.folder / "out"))
        rows = desk.found("--patient", str(patient), "--current")
    moved = tmp_path_factory.mktemp("stick") / "Ein Ordner #1 %20"
    shutil.copytree(Path(said["page"]).parent, moved)
    return moved, {row["id"] for row in rows if row["kind"] != "thumbnail"}


@pytest.fixture
def page(window: Browser, exported: tuple[Path, set[str]]) -> Iterator[Browser]:
    """The page, open; afterwards: it has asked no host, and complained of nothing."""
    window.ask("/url", url="about:blank")
    window.complaints(), window.requested()
    window.open(exported[0] / "index.html")
    window.wait("return document.readyState === 'complete' && !!document.querySelector('.card')")
    yield window
    assert window.complaints() == []
    asked = {address.partition(":")[0] for address in window.requested()}
    assert "file" in asked
    assert asked <= {"file", "about", "data", "chrome", "chrome-extension"}, "its own pictures, and its PDF viewer"


def opened(page: Browser, item: str) -> None:
    page.run("document.querySelector(arguments[0]).click()", CARD % item)
    page.wait("return document.getElementById('viewer').open")


def numbers(transform: str) -> list[float]:
    """What a picture's style says: pixels to the right, pixels down, degrees, scale."""
    moved = transform.split("translate(")[2].partition(")")[0].replace("px", "").split(",")
    return [*map(float, moved), *(float(part.split("(")[1].rstrip("deg)")) for part in transform.split(" ")[-2:])]


def test_every_item_of_the_patient_is_shown_and_every_picture_loads(
    page: Browser, exported: tuple[Path, set[str]]
) -> None:
    assert set(page.run(IDS)) == exported[1]
    page.run("for (const image of document.images) image.loading = 'eager'")
    page.wait("return [...document.images].every(image => image.complete)")
    assert page.run("return [...document.images].filter(image => !image.naturalWidth).length") == 0
    assert page.run("return document.images.length") > 5


def test_hostile_texts_are_texts(page: Browser) -> None:
    titles = page.run("return [...document.querySelectorAll('.caption .title')].map(e => e.textContent)")
    assert {HOSTILE[0], "exe. gpj line two", HOSTILE[2]} <= set(titles)
    assert page.run("return document.title") != "pwned"
    assert page.run("return document.querySelectorAll('[onerror], img[src=x]').length") == 0


def test_text_category_and_date_filter_and_show_all_takes_it_back(page: Browser) -> None:
    everything = page.run(IDS)
    page.press("/", *"one pdf")
    assert len(page.wait(f"const ids = (() => {{ {IDS} }})(); return ids.length < {len(everything)} && ids")) == 1
    page.click("#clear")
    page.wait(f"return (() => {{ {IDS} }})().length === {len(everything)}")
    page.run("[...document.querySelectorAll('#categories button')].find(b => b.dataset.category === 'Scans').click()")
    assert 6 <= len(page.run(IDS)) < len(everything)
    page.click("#clear")
    page.run("const from = document.getElementById('from'); from.value = '2999-01-01';"
             "from.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    assert page.run(IDS) == []
    assert page.run("return document.getElementById('count').textContent").startswith("0 of ")


def test_a_picture_is_zoomed_moved_and_changed_by_keys_and_taken_back(page: Browser) -> None:
    picture = page.run(
        "return JSON.parse(document.getElementById('content').textContent).items.find(i => i.show === 'image').id"
    )
    opened(page, picture)
    fitted = numbers(page.wait(STAGE))
    page.press("+", "+", "t", "i")
    turned = numbers(page.run(STAGE))
    assert turned[2] == 90.0
    page.press("+", "+", "-")
    assert numbers(page.run(STAGE))[3] == pytest.approx(turned[3] * 1.25)
    assert "invert(1)" in page.run(LOOK)
    page.run("const b = document.getElementById('brightness'); b.value = 180; b.dispatchEvent(new Event('input'))")
    assert "brightness(180%)" in page.run(LOOK)
    drag = [{"type": "pointerMove", "x": 400, "y": 400}, {"type": "pointerDown", "button": 0}]
    drag += [{"type": "pointerMove", "x": 430, "y": 380, "duration": 50}, {"type": "pointerUp", "button": 0}]
    page.ask("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": drag}])
    assert numbers(page.run(STAGE))[:2] == [30.0, -20.0]
    page.press("r")
    assert numbers(page.run(STAGE)) == pytest.approx(fitted)
    page.press("Escape")
    page.wait("return !document.getElementById('viewer').open")
    page.wait("return document.activeElement.dataset.id === arguments[0]", picture)  # a task of its own


def test_arrow_keys_walk_over_the_cards_and_through_the_viewer(page: Browser) -> None:
    ids = page.run(IDS)
    page.run("document.querySelector('#years .open').focus()")
    page.press("Right", "Right", "Left")
    assert page.run("return document.activeElement.dataset.id") == ids[1]
    page.press("Down")
    below = page.run("return document.activeElement.dataset.id")
    assert below not in ids[:2]
    page.press("Enter")
    page.wait("return document.getElementById('viewer').open")
    seen = [page.run("return document.getElementById('position').textContent")]
    page.press("Right")
    seen.append(page.run("return document.getElementById('position').textContent"))
    at = ids.index(below) + 1
    assert seen == [f"{at} of {len(ids)}", f"{at + 1} of {len(ids)}"]


def test_a_mount_is_shown_with_its_images(page: Browser) -> None:
    mount = next(each for each in page.run(IDS) if each.startswith("mount-") and each.count("-") == 1)
    assert page.run(f"return document.querySelectorAll('.card:has({CARD[7:]}) .strip .open').length" % mount) == 3
    opened(page, mount)
    strip = page.run("return [...document.querySelectorAll('#strip .open')].map(e => e.dataset.id)")
    assert (strip[0], len(strip)) == (mount, 4)
    page.run("document.querySelectorAll('#strip .open')[2].click()")
    assert page.run("return document.getElementById('title').textContent") == "4BW, image 2 of 3"


@pytest.mark.parametrize("extension", ["pdf", "txt", "tif", "dcm"])
def test_papers_are_shown_in_the_page_and_what_browsers_cannot_show_is_said(page: Browser, extension: str) -> None:
    page.run("[...document.querySelectorAll('.open')].find(e => e.title === arguments[0]).click()", f"one {extension}")
    frame = "const f = document.querySelector('#stage iframe'); return f ? decodeURI(f.src) : ''"
    if extension in ("pdf", "txt"):
        assert page.wait(frame).endswith(f".{extension}")
    else:
        assert page.run(frame) == ""
        assert f"cannot show {extension.upper()}" in page.run("return document.getElementById('stage').textContent")
        assert page.run("return decodeURI(document.querySelector('#stage a').href)").endswith(f".{extension}")


def test_it_prints_all_of_them_and_one(page: Browser, exported: tuple[Path, set[str]]) -> None:
    assert page.print().startswith(b"%PDF")
    opened(page, page.run(IDS)[0])
    assert page.print().startswith(b"%PDF")


def test_two_thousand_items_are_a_page_that_opens_and_filters(window: Browser, tmp_path: Path) -> None:
    """How fast is a figure of tests/bench/gallery.py, not a claim."""
    window.open(many(tmp_path, 2000) / "index.html")
    window.wait("return document.querySelectorAll('.card').length === 2000")
    loaded = window.run("return [...document.images].filter(image => image.complete && image.naturalWidth).length")
    assert loaded < 1000, "what is far below is not loaded"
    window.press("/", *"number 77")
    window.wait("return document.getElementById('count').textContent === '38 of 2,000'")


def many(folder: Path, count: int, large: bytes = b"") -> Path:
    """The exported folder of a patient with so many radiographs, with thumbnails; `large`: each one's bytes."""
    spec = FileSpec("main", 101, "thumbnail", 1, "1", "jpg")
    for name, content in (("large", large or spec.render()), ("small", spec.render())):
        (folder / name).write_bytes(content)
    (folder / "thumbnails").mkdir()
    told = {"kind": "document", "mount_num": None, "version": 1, "state": "archived", "bytes": 3, "sha256": "ab" * 32}
    told |= {"tooth_numbers": "", "img_type": "Radiograph", "media_type": "image/jpeg", "archived_at": "then"}
    entries = []
    for number in range(1, count + 1):
        row = told | {"id": f"document-{number}", "num": number, "description": f"Number {number}"}
        row |= {"date_created": f"{2026 - number // 250}-01-02", "category": f"Category {number % 9}"}
        entries.append(Entry(row, f"document-{number}.jpg", f"thumbnails/thumbnail-{number}.jpg"))
        (folder / entries[-1].file).hardlink_to(folder / "large")
        (folder / entries[-1].thumbnail).hardlink_to(folder / "small")
    pages = Pages(*(resources.files("syncd").joinpath(name).read_text("utf-8") for name in PAGE_FILES))
    person = Person(101, "Smith, John", "1980-02-29", "main", "", "now")
    (folder / "index.html").write_text(gallery.patient_page(pages, "an-id", person, entries), "utf-8")
    return folder
