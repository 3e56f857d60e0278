"""Copies out of the archive: named for people, verified, and never over what is there."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from syncd.archive import Archive, Publication
from syncd.catalog import Catalog
from syncd.errors import UsageError
from syncd.index import Index
from syncd.model import Item, Patient, Version
from syncd.retrieve import restore, restore_patient

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

    def put(
        self,
        item: Item,
        content: bytes,
        number: int = 1,
        at: float = T0,
        kind: str = "image/jpeg jpg",
        mount_num: int | None = None,
        **fields: str,
    ) -> Version:
        """Archive it; `kind`: media type and extension."""
        self.seq += 1
        listing = {"DateCreated": "2021-04-08 10:00:00", "docCategory": "BWX", "Description": "Left bitewing"} | fields
        version = Version(
            seq=self.seq,
            item=item,
            mount_num=mount_num,
            version=number,
            sidecar=1,
            revision=f"r{number}",
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            extension=kind.split()[1],
            media_type=kind.split(maxsplit=1)[0],
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


def test_what_the_disk_does_not_give_ends_no_restore_of_a_patient(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bad = shelf.put(DOCUMENT, b"one"), shelf.put(Item(101, "document", 35), b"two")
    names, real = {Path(whole.sidecar_path).name, Path(bad.path).name}, os.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        if path in names:
            raise OSError(errno.EIO, "planted")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    done = restore_patient(shelf.catalog, shelf.archive, 101, tmp_path / "out", T0, ZONE)
    assert (done.files, done.damaged) == (1, ("101/document-35",))  # without its sidecar it is named as listed now
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg")] == [b"one"]


def test_a_vanished_document_can_still_be_restored(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    shelf.index.vanish(DOCUMENT, T0)
    done = restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "out", None, ZONE)
    assert done.path is not None
    assert done.path.read_bytes() == b"one"


def test_a_target_that_cannot_be_written_is_the_callers_to_mend(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(DOCUMENT, b"one")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="ENOTDIR") as caught:
        restore(shelf.catalog, shelf.archive, DOCUMENT, tmp_path / "file" / "out", None, ZONE)
    assert str(tmp_path) not in str(caught.value)
