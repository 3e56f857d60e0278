"""Copies out of the archive: named for people, verified, and never over what is there."""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.archive import Archive, Publication
from syncd.catalog import Catalog
from syncd.errors import SiteError, UsageError
from syncd.index import Index
from syncd.model import Item, Patient, Version
from syncd.retrieve import export, folder_name, restore

T0 = 1_795_000_000.0
ZONE = ZoneInfo("America/Chicago")
DOCUMENT = Item(101, "document", 34)
NAME = "2021-04-08 BWX - Left bitewing (document-34).jpg"


@dataclass
class Shelf:
    """A real archive and its index, filled by real publications."""

    index: Index
    catalog: Catalog
    archive: Archive
    seq: int = 0

    def put(self, item: Item, content: bytes, number: int = 1, at: float = T0, **fields: str) -> Version:
        self.seq += 1
        listing = {"DateCreated": "2021-04-08 10:00:00", "docCategory": "BWX", "Description": "Left bitewing"} | fields
        version = Version(
            seq=self.seq,
            item=item,
            mount_num=None,
            version=number,
            sidecar=1,
            revision=f"r{number}",
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            extension="jpg",
            media_type="image/jpeg",
            file_name="scan.jpg",
            listed_at=at,
            placed_at=at,
            archived_at=at,
            first_seen_at=at,
            method="document",
            listing=listing,
        )
        source = self.archive.new_incoming()
        source.write_bytes(content)
        assert self.archive.publish([Publication(version, source)]) == [None]
        self.index.put_version(version, at)
        return version

    def damage(self, version: Version, content: bytes) -> None:
        path = self.archive.root / version.path
        path.unlink()
        path.write_bytes(content)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    root = tmp_path / "archive"
    root.mkdir()
    archive = Archive(root, 0)
    archive.create("an-id")
    index = Index(tmp_path / "index.db")
    index.apply_roster([Patient(101, "Patient", "", "Smith", "John", "", "")], T0, names=True, only=None)
    yield Shelf(index, Catalog(index, "main"), archive)
    index.close()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_export_puts_verified_copies_into_a_folder_per_patient_and_category(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.put(Item(101, "sheet", 45), b"two", SheetType="Consent", Description="Consent form")
    shelf.put(Item(102, "document", 7), b"three", docCategory="")
    to = tmp_path / "new" / "out"
    done = export(shelf.catalog, shelf.archive, [101, 102], to, ZONE)
    assert (done.files, done.bytes, done.damaged, done.vanished) == (3, 11, (), 0)
    assert files(to)[0] == f"101/BWX/{NAME}"
    assert (to / "101" / "BWX" / NAME).read_bytes() == b"one"
    assert [name.rsplit("/", 1)[0] for name in files(to)] == ["101/BWX", "101/Consent", "102/Without category"]


def test_copies_are_private_and_bear_the_date_of_the_document(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.put(Item(101, "document", 35), b"two", DateCreated="0001-01-01 00:00:00")
    shelf.put(Item(101, "document", 36), b"three", DateCreated="soon")
    to = tmp_path / "new" / "out"
    export(shelf.catalog, shelf.archive, [101], to, ZONE)
    made = {path.read_bytes(): path.stat() for path in to.rglob("*.jpg")}
    assert made[b"one"].st_mtime == dt.datetime(2021, 4, 8, 10, tzinfo=ZONE).timestamp()
    assert made[b"two"].st_mtime == made[b"three"].st_mtime == T0
    assert {stat.st_mode & 0o777 for stat in made.values()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (to.parent, to, to / "101", to / "101" / "BWX")} == {0o700}


def test_export_copies_the_current_version_only(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"old", 1)
    shelf.put(DOCUMENT, b"new", 2)
    assert export(shelf.catalog, shelf.archive, [101], tmp_path / "out", ZONE).files == 1
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg")] == [b"new"]


def test_thumbnails_are_not_exported(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.put(Item(101, "thumbnail", 34), b"small")
    assert export(shelf.catalog, shelf.archive, [101], tmp_path / "out", ZONE).files == 1
    assert files(tmp_path / "out") == [f"101/BWX/{NAME}"]


def test_what_left_the_listing_is_counted_and_exported_only_when_asked_for(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.index.vanish(DOCUMENT, T0)
    done = export(shelf.catalog, shelf.archive, [101], tmp_path / "a", ZONE)
    assert (done.files, done.vanished) == (0, 1)
    assert export(shelf.catalog, shelf.archive, [101], tmp_path / "b", ZONE, vanished=True).files == 1


@pytest.mark.parametrize("content", [b"two", b"longer", b""])
def test_a_damaged_file_is_named_and_left_out_and_the_rest_is_exported(
    shelf: Shelf, tmp_path: Path, content: bytes
) -> None:
    shelf.damage(shelf.put(DOCUMENT, b"one"), content)
    missing = shelf.put(Item(101, "document", 35), b"gone")
    (shelf.archive.root / missing.path).unlink()
    shelf.put(Item(101, "document", 36), b"sound")
    done = export(shelf.catalog, shelf.archive, [101], tmp_path / "out", ZONE)
    assert (done.files, done.damaged) == (1, ("101/document-34", "101/document-35"))
    assert files(tmp_path / "out") == ["101/BWX/2021-04-08 BWX - Left bitewing (document-36).jpg"]


def test_a_file_that_is_there_is_never_overwritten(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    (tmp_path / NAME).write_bytes(b"somebody's own")
    (tmp_path / NAME.replace(".jpg", " (2).jpg")).symlink_to(tmp_path / "elsewhere")
    done = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path, None, ZONE)
    assert done.path == tmp_path / NAME.replace(".jpg", " (3).jpg")
    assert (tmp_path / NAME).read_bytes() == b"somebody's own"
    assert not (tmp_path / "elsewhere").exists()


def test_a_target_without_hard_links_gets_its_copies_too(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_named: object) -> None:
        raise OSError(errno.EPERM, "no links here")  # as a FAT file system answers

    shelf.put(DOCUMENT, b"one")
    (tmp_path / NAME).write_bytes(b"somebody's own")
    monkeypatch.setattr(os, "link", refuse)
    done = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path, None, ZONE)
    assert done.path is not None
    assert (done.path.name, done.path.read_bytes()) == (NAME.replace(".jpg", " (2).jpg"), b"one")
    assert (tmp_path / NAME).read_bytes() == b"somebody's own"


def test_restore_gives_the_version_of_that_time(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"old", 1, at=T0)
    shelf.put(DOCUMENT, b"new", 2, at=T0 + 100)
    then = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "out", T0 + 99, ZONE)
    newest = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "out", None, ZONE)
    assert (then.version, newest.version) == (1, 2)
    assert then.path is not None
    assert newest.path is not None
    assert (then.path.read_bytes(), newest.path.read_bytes()) == (b"old", b"new")
    assert "version 1" in then.path.name
    assert newest.path.name == NAME


def test_restore_before_the_first_version_or_of_an_item_without_one_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one", at=T0)
    with pytest.raises(UsageError, match="by then"):
        restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "out", T0 - 1, ZONE)
    with pytest.raises(UsageError, match="no archived version"):
        restore(shelf.catalog, shelf.archive, Item(101, "sheet", 1), tmp_path / "out", None, ZONE)
    assert not (tmp_path / "out").exists()


def test_restore_of_a_damaged_file_leaves_nothing_behind(shelf: Shelf, tmp_path: Path) -> None:
    shelf.damage(shelf.put(DOCUMENT, b"one"), b"eno")
    done = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "out", None, ZONE)
    assert done.path is None
    assert files(tmp_path / "out") == []


def test_a_vanished_document_can_still_be_restored(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.index.vanish(DOCUMENT, T0)
    done = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "out", None, ZONE)
    assert done.path is not None
    assert done.path.read_bytes() == b"one"


def test_the_archive_itself_is_no_target(shelf: Shelf) -> None:
    shelf.put(DOCUMENT, b"one")
    before = files(shelf.archive.root)
    for target in (shelf.archive.root, shelf.archive.root / "patients" / "101", shelf.archive.root / "patients" / ".."):
        with pytest.raises(UsageError):
            export(shelf.catalog, shelf.archive, [101], target, ZONE)
    assert files(shelf.archive.root) == before


def test_a_patient_of_whom_nothing_is_known_is_a_usage_error(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="patient-999"):
        export(shelf.catalog, shelf.archive, [999], tmp_path / "out", ZONE)


def test_a_target_that_cannot_be_written_is_the_callers_to_mend(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="ENOTDIR") as caught:
        restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "file" / "out", None, ZONE)
    assert str(tmp_path) not in str(caught.value)


def test_an_archive_that_is_not_there_is_no_damage(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    (shelf.archive.root / ".syncd-archive").rename(shelf.archive.root / "elsewhere")
    with pytest.raises(SiteError) as caught:
        export(shelf.catalog, shelf.archive, [101], tmp_path / "out", ZONE)
    assert caught.value.reason == "archive_missing"


@pytest.mark.parametrize("hostile", ["../../etc", "a/b", "..", "-rf", "\u202egnp", "CON", "x\0y", ".hidden", "\n"])
def test_a_category_cannot_leave_its_patients_folder(shelf: Shelf, tmp_path: Path, hostile: str) -> None:
    shelf.put(DOCUMENT, b"one", docCategory=hostile)
    export(shelf.catalog, shelf.archive, [101], tmp_path / "out", ZONE)
    (made,) = (tmp_path / "out").rglob("*.jpg")
    assert made.parent.parent == tmp_path / "out" / "101"


@given(st.text(max_size=300))
def test_every_category_becomes_one_plain_folder_name(category: str) -> None:
    name = folder_name(category)
    assert name
    assert name.isprintable()
    assert len(name.encode()) <= 255
    assert not set(name) & set('/\\:*?"<>|')
    assert name[0] not in ".- "
    assert name[-1] not in ". "
