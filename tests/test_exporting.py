"""Exports: copies for people, verified, never over what is there; with pages that need no server."""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import errno
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from syncd import exporting
from syncd.archive import Archive
from syncd.catalog import Catalog
from syncd.errors import SiteError, UsageError
from syncd.exporting import Exported
from syncd.index import Index
from syncd.model import Item, Kind, Listed, Patient
from syncd.service import become_owner
from tests.faults.mounts import lack
from tests.test_retrieve import DOCUMENT, NAME, T0, ZONE, Shelf, files

AT = T0 + 7 * 86_400.0
PAGES = ("index.html", "index.csv")


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    root = tmp_path / "archive"
    root.mkdir()
    archive = Archive(root, 0)
    archive.create("an-id")
    index = Index(tmp_path / "index.db")
    index.apply_roster([Patient(101, "Patient", "", "Smith", "John", "", "1980-02-29")], T0, names=True, only=None)
    yield Shelf(index, Catalog(index, "main"), archive)
    index.close()


def export(shelf: Shelf, patients: Sequence[int], to: Path, title: str = "", vanished: bool = False) -> Exported:
    wanted: dict[int, list[float]] = {pat_num: [] for pat_num in patients}
    return exporting.export(shelf.catalog, shelf.archive, wanted, to, ZONE, AT, vanished=vanished, title=title)


def copies(folder: Path) -> list[str]:
    return [name for name in files(folder) if not name.endswith(PAGES)]


def shown(page: Path) -> dict[str, dict[str, object]]:
    """The items of a gallery, by id."""
    text = page.read_text("utf-8")
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    return {item["id"]: item for item in json.loads(found)["items"]}


def rows(table: Path) -> list[dict[str, str]]:
    assert table.read_bytes().startswith(b"\xef\xbb\xbf")
    with table.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_export_puts_verified_copies_into_a_folder_per_patient_and_category(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.put(Item(101, "sheet", 45), b"two", SheetType="Consent", Description="Consent form")
    shelf.put(Item(102, "document", 7), b"three", docCategory="")
    to = tmp_path / "new" / "out"
    done = export(shelf, [101, 102], to)
    assert (done.files, done.bytes, tuple(done.damaged), done.vanished) == (3, 11, (), 0)
    assert copies(to)[0] == f"101/BWX/{NAME}"
    assert (to / "101" / "BWX" / NAME).read_bytes() == b"one"
    assert [name.rsplit("/", 1)[0] for name in copies(to)] == ["101/BWX", "101/Consent", "102/Without category"]


def test_copies_are_private_and_bear_the_date_of_the_document(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.put(Item(101, "document", 35), b"two", DateCreated="0001-01-01 00:00:00")
    shelf.put(Item(101, "document", 36), b"three", DateCreated="soon")
    to = tmp_path / "new" / "out"
    export(shelf, [101], to)
    made = {path.read_bytes(): path.stat() for path in to.rglob("*.jpg")}
    assert made[b"one"].st_mtime == dt.datetime(2021, 4, 8, 10, tzinfo=ZONE).timestamp()
    assert made[b"two"].st_mtime == made[b"three"].st_mtime == T0
    assert {stat.st_mode & 0o777 for stat in made.values()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (to.parent, to, to / "101", to / "101" / "BWX")} == {0o700}


def test_export_copies_the_current_version_only(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"old", 1)
    shelf.put(DOCUMENT, b"new", 2)
    assert export(shelf, [101], tmp_path / "out").files == 1
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg")] == [b"new"]


def test_thumbnails_are_for_the_gallery_and_not_counted(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.put(Item(101, "thumbnail", 34), b"small")
    assert export(shelf, [101], tmp_path / "out").files == 1
    assert copies(tmp_path / "out") == [f"101/BWX/{NAME}", "101/thumbnails/thumbnail-34.jpg"]


def test_what_left_the_listing_is_counted_and_exported_only_when_asked_for(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.index.vanish(DOCUMENT, T0)
    done = export(shelf, [101], tmp_path / "a")
    assert (done.files, done.vanished) == (0, 1)
    assert export(shelf, [101], tmp_path / "b", vanished=True).files == 1


@pytest.mark.parametrize("content", [b"two", b"longer", b""])
def test_a_damaged_file_is_named_and_left_out_and_the_rest_is_exported(
    shelf: Shelf, tmp_path: Path, content: bytes
) -> None:
    shelf.damage(shelf.put(DOCUMENT, b"one"), content)
    missing = shelf.put(Item(101, "document", 35), b"gone")
    (shelf.archive.root / missing.path).unlink()
    shelf.put(Item(101, "document", 36), b"sound")
    done = export(shelf, [101], tmp_path / "out")
    assert (done.files, tuple(done.damaged)) == (1, ("101/document-34", "101/document-35"))
    assert copies(tmp_path / "out") == ["101/BWX/2021-04-08 BWX - Left bitewing (document-36).jpg"]


@pytest.mark.parametrize("of", ["file", "folder"])
def test_what_the_disk_does_not_give_is_named_and_left_out_and_the_rest_is_exported(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    bad, real = Path(shelf.put(DOCUMENT, b"one").path), os.open
    shelf.put(Item(101, "document", 36), b"sound")

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == (bad.name if of == "file" else bad.parent.name):
            raise PermissionError(errno.EACCES, "put back by root")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    done = export(shelf, [101], tmp_path / "out")
    assert (done.files, done.damaged) == (1, ["101/document-34"])
    assert copies(tmp_path / "out") == ["101/BWX/2021-04-08 BWX - Left bitewing (document-36).jpg"]


def test_a_patient_without_documents_is_named_and_gets_no_folder(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    done = export(shelf, [999, 101], tmp_path / "out", title="Monday")
    assert (done.files, done.unknown) == (1, [999])
    assert not (tmp_path / "out" / "999").exists()
    assert "no documents" in (tmp_path / "out" / "index.html").read_text("utf-8")


def test_an_archive_that_is_not_there_is_no_damage(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    (shelf.archive.root / ".syncd-archive").rename(shelf.archive.root / "elsewhere")
    with pytest.raises(SiteError) as caught:
        export(shelf, [101], tmp_path / "out")
    assert caught.value.reason == "archive_missing"


@pytest.mark.parametrize("hostile", ["../../etc", "a/b", "..", "-rf", "\u202egnp", "CON", "x\0y", ".hidden", "\n"])
def test_a_category_cannot_leave_its_patients_folder(shelf: Shelf, tmp_path: Path, hostile: str) -> None:
    shelf.put(DOCUMENT, b"one", docCategory=hostile)
    export(shelf, [101], tmp_path / "out")
    (made,) = (tmp_path / "out").rglob("*.jpg")
    assert made.parent.parent == tmp_path / "out" / "101"


def test_the_archive_itself_is_no_target(shelf: Shelf) -> None:
    shelf.put(DOCUMENT, b"one")
    before = files(shelf.archive.root)
    for target in (shelf.archive.root, shelf.archive.root / "patients" / "101", shelf.archive.root / "patients" / ".."):
        with pytest.raises(UsageError):
            export(shelf, [101], target)
    assert files(shelf.archive.root) == before


def test_categories_that_differ_only_in_case_or_composition_share_a_folder(shelf: Shelf, tmp_path: Path) -> None:
    for number, category in enumerate(("Röntgen", "RÖNTGEN", "Ro\u0308ntgen"), 1):
        shelf.put(Item(101, "document", number), b"%d" % number, docCategory=category)
    export(shelf, [101], tmp_path / "out")
    assert {name.split("/")[1] for name in copies(tmp_path / "out")} == {"Röntgen"}


@pytest.mark.parametrize("category", ["index.html", "Index.CSV", "thumbnails"])
def test_a_category_never_takes_the_name_of_a_page(shelf: Shelf, tmp_path: Path, category: str) -> None:
    shelf.put(DOCUMENT, b"one", docCategory=category)
    export(shelf, [101], tmp_path / "out")
    (name,) = copies(tmp_path / "out")
    assert name.split("/")[1] == f"{category} (category)"


def test_the_longest_path_has_room_on_windows(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(Item(101, "document", 2**63 - 1), b"one", docCategory="W" * 300, Description="é" * 300)
    export(shelf, [101], tmp_path / "out")
    (name,) = copies(tmp_path / "out")
    assert len(name) < 260 - len(r"C:\Users\Front Desk\Desktop\Open Dental is down")


def test_an_image_in_a_mount_is_told_by_its_mount(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(Item(101, "mount", 15), b"composite", Description="4/8/2021: 4BW")
    for number in (440, 441):
        shelf.put(Item(101, "mount-image", number), b"%d" % number, mount_num=15, DateCreated="", Description="")
    shelf.put(Item(101, "mount-image", 7), b"7", mount_num=99, DateCreated="", docCategory="", Description="")
    export(shelf, [101], tmp_path / "out")
    assert copies(tmp_path / "out") == [
        "101/BWX/2021-04-08 BWX - 4BW (mount-15).jpg",
        "101/BWX/2021-04-08 BWX - 4BW, image 1 of 2 (mount-image-440).jpg",
        "101/BWX/2021-04-08 BWX - 4BW, image 2 of 2 (mount-image-441).jpg",
        "101/Without category/undated (mount-image-7).jpg",
    ]
    items = shown(tmp_path / "out" / "101" / "index.html")
    assert list(items) == ["mount-15", "mount-image-440", "mount-image-441", "mount-image-7"]
    assert (items["mount-image-440"]["mount"], items["mount-image-7"]["mount"]) == ("mount-15", "mount-99")


def test_every_address_in_the_gallery_and_the_table_leads_to_its_copy(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(Item(101, "document", 1), b"1", Description="100 % #1? & more", docCategory="a#b")
    shelf.put(Item(101, "thumbnail", 1), b"small")
    shelf.put(Item(101, "document", 2), b"2", kind="image/tiff tif")
    shelf.put(Item(101, "thumbnail", 2), b"tiny", kind="image/tiff tif")
    shelf.put(Item(101, "document", 3), b"3", kind="image/tiff tif")
    shelf.put(Item(101, "thumbnail", 3), b"jpeg inside", kind="image/jpeg tif")
    export(shelf, [101], tmp_path / "out")
    folder = tmp_path / "out" / "101"
    items = shown(folder / "index.html")
    told = {row["id"]: (folder / row["file"]).read_bytes() for row in rows(folder / "index.csv")}
    assert told == {"document-1": b"1", "document-2": b"2", "document-3": b"3"}
    address = f"{folder.as_uri()}/{items['document-1']['file']}"
    assert Path.from_uri(address).read_bytes() == b"1" if hasattr(Path, "from_uri") else "%23" in address
    assert [items[id_]["thumbnail"] for id_ in sorted(items)] == [
        "thumbnails/thumbnail-1.jpg", "", "thumbnails/thumbnail-3.jpg",
    ]  # fmt: skip
    assert [items[id_]["show"] for id_ in sorted(items)] == ["image", "", ""]


def test_what_is_left_out_stands_on_the_page_and_in_the_table(shelf: Shelf, tmp_path: Path) -> None:
    shelf.damage(shelf.put(DOCUMENT, b"one"), b"eno")
    shelf.put(Item(101, "document", 35), b"two")
    shelf.index.vanish(Item(101, "document", 35), T0)
    with shelf.index.transaction():
        owed = Listed(Item(101, "document", 36), "r", "", "2021-04-09 10:00:00", "", None, {"Description": "new"})
        shelf.index._put_item(owed, T0)
    done = export(shelf, [101], tmp_path / "out")
    assert (done.files, done.damaged, done.vanished, done.owed) == (0, ["101/document-34"], 1, 1)
    page = (tmp_path / "out" / "101" / "index.html").read_text("utf-8")
    assert shown(tmp_path / "out" / "101" / "index.html") == {}
    for words in ("damaged in the archive, left out", "no longer in Open Dental, left out", "not archived yet"):
        assert words in page
    table = {row["id"]: (row["copy"], row["file"]) for row in rows(tmp_path / "out" / "101" / "index.csv")}
    assert set(table) == {"document-34", "document-35", "document-36"}
    assert {file for _, file in table.values()} == {""}


def test_a_second_export_keeps_equal_copies_and_renews_the_pages(shelf: Shelf, tmp_path: Path) -> None:
    to = tmp_path / "out"
    shelf.put(DOCUMENT, b"one")
    export(shelf, [101], to)
    before = (to / "101" / "BWX" / NAME).stat().st_ctime_ns
    shelf.put(Item(101, "document", 35), b"two")
    done = export(shelf, [101], to)
    assert (done.files, done.kept) == (2, 1)
    assert (to / "101" / "BWX" / NAME).stat().st_ctime_ns == before
    assert len(copies(to)) == 2
    assert set(shown(to / "101" / "index.html")) == {"document-34", "document-35"}
    shelf.put(DOCUMENT, b"new bytes", 2)
    done = export(shelf, [101], to)
    assert (done.files, done.kept) == (2, 1)
    assert (to / "101" / "BWX" / NAME).read_bytes() == b"one"
    assert shown(to / "101" / "index.html")["document-34"]["name"] == NAME.replace(".jpg", " (2).jpg")


def test_a_copy_that_somebody_changed_is_neither_kept_nor_touched(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    export(shelf, [101], tmp_path)
    (tmp_path / "101" / "BWX" / NAME).write_bytes(b"eno")
    assert export(shelf, [101], tmp_path).kept == 0
    assert sorted(path.read_bytes() for path in (tmp_path / "101" / "BWX").iterdir()) == [b"eno", b"one"]


@pytest.mark.parametrize("name", ["101/index.html", "101/index.csv", "index.html"])
def test_a_page_that_is_not_ours_is_never_replaced(shelf: Shelf, tmp_path: Path, name: str) -> None:
    shelf.put(DOCUMENT, b"one")
    (tmp_path / "101").mkdir()
    (tmp_path / name).write_text("<!doctype html>\nsomebody's own")
    with pytest.raises(UsageError, match="name another"):
        export(shelf, [101], tmp_path, title="all")
    assert (tmp_path / name).read_text() == "<!doctype html>\nsomebody's own"
    assert copies(tmp_path / "101") == []


def test_another_practice_does_not_export_into_the_same_folder(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    export(shelf, [101], tmp_path / "out")
    page = tmp_path / "out" / "101" / "index.html"
    page.write_text(page.read_text("utf-8").replace("archive an-id ", "archive other ", 1), "utf-8")
    with pytest.raises(UsageError, match="not of this practice"):
        export(shelf, [101], tmp_path / "out")
    page.unlink()
    page.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        export(shelf, [101], tmp_path / "out")


def test_interrupted_at_any_moment_it_leaves_whole_files_only(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 4):
        shelf.put(Item(101, "document", number), b"%d" % number * 10)
    real, to = os.fsync, tmp_path / "out"
    for moment in range(9):
        calls = iter(range(100))

        def interrupted(descriptor: int, moment: int = moment, calls: Iterator[int] = calls) -> None:
            if next(calls) == moment:
                raise KeyboardInterrupt
            real(descriptor)

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(shelf, [101], to / str(moment), title="all")
        monkeypatch.setattr(os, "fsync", real)
        there = [path for path in (to / str(moment)).rglob("*") if path.is_file()]
        assert not [path for path in there if path.name.startswith(".")]
        assert all(len(path.read_bytes()) == 10 for path in there if path.suffix == ".jpg")
        assert export(shelf, [101], to / str(moment), title="all").files == 3


def test_thousand_random_versions_are_exported_with_equal_digests(shelf: Shelf, tmp_path: Path) -> None:
    rng = random.Random(6)
    kinds: tuple[Kind, ...] = ("document", "mount-image", "sheet")
    with shelf.index.transaction():
        wanted = {
            shelf.put(Item(101 + number % 7, rng.choice(kinds), number), rng.randbytes(rng.randint(1, 4000))).sha256
            for number in range(1, 1001)
        }
    done = export(shelf, range(101, 108), tmp_path / "out", title="all")
    made = list((tmp_path / "out").rglob("*.jpg"))
    assert (done.files, len(made), len(wanted)) == (1000, 1000, 1000)
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in made} == wanted
    told = {row["sha256"] for table in (tmp_path / "out").rglob("index.csv") for row in rows(table)}
    assert told == wanted


def test_called_by_sudo_the_copies_are_the_callers_in_a_folder_that_is_closed_to_the_owner_of_the_state(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(["root"] if os.geteuid() else [])  # only root becomes somebody else
    owner, caller = 4321, 1234
    shelf.put(DOCUMENT, b"one")
    shelf.index.close()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ours, home = Path(folder) / "ours", Path(folder) / "home"
        shutil.copytree(tmp_path, ours, ignore=lambda *_: ["export"])
        home.mkdir(mode=0o700)
        Path(folder).chmod(0o755)
        os.chown(home, caller, caller)
        for path in (ours, *ours.rglob("*")):
            os.chown(path, owner, owner)
        monkeypatch.setenv("SUDO_UID", str(caller))
        monkeypatch.setenv("SUDO_GID", str(caller))
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                become_owner(ours, for_good=False)
                index = Index(ours / "index.db")
                there = Shelf(index, Catalog(index, "main"), Archive(ours / "archive", 0))
                export(there, [101], home / "out", title="all")
                code = 0 if os.geteuid() == owner else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        made = [home / "out", *(home / "out").rglob("*")]
        assert len(made) == 7
        assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(caller, caller)}
        assert {path.stat().st_uid for path in (ours, *ours.rglob("*"))} == {owner}
