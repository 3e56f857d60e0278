"""The checker finds what is wrong with an archive and its index, once each, and nothing where all is well."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from syncd import checker
from syncd.archive import Archive
from syncd.catalog import Catalog
from syncd.checker import CODES, Tally, check, check_item
from syncd.errors import SiteError
from syncd.index import Index
from syncd.model import Item
from syncd.schema import row_checksum
from syncd.sidecar import decode, encode, sidecar_content
from tests.small import Small, serving, small
from tests.world import World


@pytest.fixture
def one() -> Small:
    return small()


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    """A whole mirror; its document has a second version and its letter a second sidecar."""
    world = serving(tmp_path, one)
    world.run()
    one.practice.replace_bytes(one.document)
    one.practice.edit_document(one.letter, Description="Renamed")
    world.sweep()
    yield world
    world.stop()


def archive_of(world: World) -> Archive:
    return Archive(world.archive, 0)


def found(world: World, alone: bool = True) -> set[str]:
    """Everything that the checker finds, as "code path"."""
    walk = check(world.index, archive_of(world), Tally(), alone)
    return {f"{each.code} {each.path}" for each in walk if each is not None}


def path_of(world: World, kind: str = "document", suffix: str = "", version: int = 1) -> str:
    """The file of a version, or its sidecar."""
    sql = "SELECT path FROM version WHERE kind = ? AND version = ? AND sidecar = 1 ORDER BY pat_num, num LIMIT 1"
    path = Path(world.index.value(sql, kind, version))
    return str(path.with_suffix(suffix or path.suffix))


def change(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(0o400)


def test_a_whole_mirror_has_no_findings_and_each_file_is_hashed_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = Archive.open_file

    def counted(self: Archive, path: str) -> Any:
        opened.append(path)
        return real(self, path)

    monkeypatch.setattr(Archive, "open_file", counted)
    tally = Tally()
    assert [each for each in check(world.index, archive_of(world), tally) if each is not None] == []
    media = [row["path"] for row in world.index.rows("SELECT path FROM version WHERE sidecar = 1")]
    assert sorted(path for path in opened if not path.endswith(".json")) == sorted(media)
    assert len(opened) == len(set(opened)) == len(media) + world.index.value("SELECT count(*) FROM version")
    assert sorted(tally.right) == sorted(
        row["seq"] for row in world.index.rows("SELECT seq FROM version WHERE sidecar = 1")
    )


def test_a_walk_may_rest_after_each_piece(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "PIECE", 100)
    item = Item(1, "document", 1)
    size = world.index.value("SELECT sum(bytes) FROM version WHERE pat_num = 1 AND kind = 'document' AND num = 1")
    pieces = list(check_item(world.index, archive_of(world), item, Tally()))
    assert set(pieces) == {None}
    assert len(pieces) >= size // 100


def test_other_bytes_of_the_same_size_and_another_size_are_damage(world: World) -> None:
    first, second = path_of(world), path_of(world, version=2)
    change(world.archive / first, b"x" * (world.archive / first).stat().st_size)
    change(world.archive / second, (world.archive / second).read_bytes() + b"x")
    assert found(world) == {f"damaged {first}", f"damaged {second}"}


def test_a_link_in_place_of_a_file_is_damage_whatever_it_leads_to(world: World, tmp_path: Path) -> None:
    path = world.archive / path_of(world)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert found(world) == {f"damaged {path_of(world)}"}


def test_a_file_that_is_gone_is_missing_and_so_is_a_whole_folder(world: World) -> None:
    (world.archive / path_of(world)).unlink()
    mount = (world.archive / path_of(world, "mount")).parent
    mount.rename(world.folder / "moved")
    assert f"missing {path_of(world)}" in found(world)
    assert f"missing {path_of(world, 'mount')}" in found(world)
    assert f"bad_sidecar {path_of(world, 'mount', '.json')}" in found(world)


def test_a_patient_whose_folder_is_gone_is_missing_item_by_item(world: World, one: Small) -> None:
    (world.archive / "patients" / str(one.other)).rename(world.folder / "moved")
    items = world.index.rows("SELECT path FROM version WHERE pat_num = ? AND sidecar = 1", one.other)
    assert {f"missing {row['path']}" for row in items} <= found(world)


def test_something_else_in_place_of_an_items_folder_is_foreign_and_its_files_are_missing(world: World) -> None:
    folder = (world.archive / path_of(world, "mount")).parent
    folder.rename(world.folder / "moved")
    folder.symlink_to(world.folder / "moved")
    assert found(world) >= {f"foreign {folder.relative_to(world.archive)}", f"missing {path_of(world, 'mount')}"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("suffix", ["", ".json"])
def test_a_read_error_is_no_damage_and_does_not_end_the_walk(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, suffix: str
) -> None:
    failing, other, real = Path(path_of(world, suffix=suffix)), path_of(world, "sheet"), os.open
    change(world.archive / other, b"changed")

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path) == failing.name:
            raise OSError(number, "broken")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", opened)
    assert found(world) == {f"unreadable {failing}", f"damaged {other}"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_folder_that_the_disk_does_not_give_is_told_and_does_not_end_the_walk(
    world: World, one: Small, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing, real, top = list[str](), os.open, f"patients/{one.other}"
    (world.archive / path_of(world, "sheet")).unlink()
    usual = {f"missing {path_of(world, 'sheet')}"}

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path in failing:
            raise OSError(number, "broken")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", opened)
    failing[:] = [f"document-{one.letter}"]
    assert found(world) == usual | {f"unreadable {top}/document-{one.letter}"}
    failing[:] = ["patient.json"]
    assert found(world) == usual | {
        f"bad_sidecar patients/{number}/patient.json" for number in (one.patient, one.other)
    }
    failing[:] = [str(one.other)]
    assert found(world) == usual | {f"unreadable {top}", f"unreadable {top}/document-{one.letter}"}
    (world.archive / "published").mkdir(mode=0o700, exist_ok=True)
    failing[:] = ["published"]
    assert found(world) == usual | {"unreadable published"}


@pytest.mark.parametrize("kind", ["patient", "item", "file"])
def test_what_the_disk_does_not_even_look_at_is_unreadable(
    world: World, one: Small, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, real = Path(path_of(world)), os.stat
    names = {"patient": path.parent.parent.name, "item": path.parent.name, "file": path.name}

    def looked(name: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if name == names[kind]:
            raise OSError(errno.EIO, "broken")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "stat", looked)
    assert found(world) == ({f"unreadable {path}"} if kind == "file" else set())  # a folder that opens is looked into


def test_a_read_error_in_the_midst_of_a_file_is_no_damage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = path_of(world), Archive.open_file

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, _: int) -> bytes:
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Archive, "open_file", lambda self, p: Broken() if p == path else real(self, p))
    assert found(world) == {f"unreadable {path}"}


def test_a_file_that_goes_while_it_is_looked_at_is_damage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = path_of(world), Archive.open_file

    def opened(self: Archive, wanted: str) -> Any:
        if wanted == path:
            (world.archive / path).unlink(missing_ok=True)
        return real(self, wanted)

    monkeypatch.setattr(Archive, "open_file", opened)
    assert found(world) == {f"damaged {path}"}


@pytest.mark.parametrize("where", ["media", "sidecar"])
def test_an_archive_that_goes_away_ends_the_walk(world: World, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    wanted, real = path_of(world, suffix=".json" if where == "sidecar" else ""), Archive.open_file

    def opened(self: Archive, path: str) -> Any:
        if path == wanted:
            raise SiteError("archive_missing")  # and is back at once: what came after it would be looked at
        return real(self, path)

    monkeypatch.setattr(Archive, "open_file", opened)
    with pytest.raises(SiteError) as told:
        found(world)
    assert told.value.reason == "archive_missing"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"null"])
def test_a_sidecar_that_tells_nothing_is_told(world: World, content: bytes) -> None:
    path = path_of(world, suffix=".json")
    change(world.archive / path, content)
    assert found(world) == {f"bad_sidecar {path}"}


def test_a_sidecar_that_is_a_folder_or_another_versions_is_bad(world: World) -> None:
    first, second = path_of(world, suffix=".json"), path_of(world, suffix=".json", version=2)
    change(world.archive / second, (world.archive / first).read_bytes())
    (world.archive / first).unlink()
    (world.archive / first).mkdir(0o700)
    assert found(world) == {f"bad_sidecar {first}", f"bad_sidecar {second}"}


def test_a_later_sidecar_that_is_gone_is_told(world: World) -> None:
    path = next((world.archive / "patients").rglob("1-*.2.json"))
    path.unlink()
    assert found(world) == {f"bad_sidecar {path.relative_to(world.archive)}"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("seq", 90_000), ("num", 77), ("version", 5), ("sidecar", 3), ("revision", "x"), ("sha256", "0" * 64),
        ("bytes", 1), ("extension", "png"), ("media_type", "x"), ("path", "x"), ("listed_at", 1.0), ("placed_at", 1.0),
        ("archived_at", 1.0), ("method", "x"), ("flags", '["x"]'), ("source_revision", "x"), ("checksum", "x"),
        ("kind", b"doc\xefment"), ("kind", b"d/cument"), ("pat_num", 999),
    ],
)  # fmt: skip
def test_no_column_of_a_version_can_change_unnoticed(world: World, column: str, value: object) -> None:
    seq = world.index.value("SELECT seq FROM version WHERE path = ?", path_of(world, "sheet"))
    cast = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
    world.index.run(f"UPDATE version SET {column} = {cast} WHERE seq = ?", value, seq)
    codes = {line.partition(" ")[0] for line in found(world)}
    assert "bad_row" in codes
    assert codes <= {"bad_row", "unrecorded"}


def test_a_row_and_a_sidecar_that_contradict_each_other_are_told(world: World) -> None:
    seq = world.index.value("SELECT seq FROM version WHERE path = ?", path_of(world, "sheet"))
    world.index.run("UPDATE version SET revision = 'other' WHERE seq = ?", seq)
    row = world.index.rows("SELECT * FROM version WHERE seq = ?", seq)[0]
    item = Item(row["pat_num"], row["kind"], row["num"])
    world.index.run("UPDATE version SET checksum = 'x' WHERE seq = ?", seq)
    with pytest.raises(SiteError):
        Catalog(world.index).versions(item)
    other = archive_of(world).read_item(item)[0]
    world.index.run(
        "UPDATE version SET checksum = ? WHERE seq = ?", row_checksum(replace(other, revision="other")), seq
    )
    assert found(world) == {f"bad_row index.db seq {seq}"}


def test_a_version_that_the_index_does_not_know_is_unrecorded_and_its_file_is_hashed_all_the_same(
    world: World,
) -> None:
    path = path_of(world, "sheet")
    sidecar = str(Path(path).with_suffix(".json"))
    world.index.run("DELETE FROM version WHERE path = ?", path)
    assert found(world) == {f"unrecorded {sidecar}"}
    change(world.archive / path, b"changed")
    assert found(world) == {f"unrecorded {sidecar}", f"damaged {path}"}


def test_foreign_things_are_told_wherever_they_lie(world: World, one: Small) -> None:
    planted = [
        "stray.txt",
        "patients/notes",
        "patients/0101",
        f"patients/{one.patient}/letter.pdf",
        f"{Path(path_of(world)).parent}/7-0123456789ab.jpg",
        f"{Path(path_of(world)).parent}/notes.json",
    ]
    for name in planted:
        (world.archive / name).write_bytes(b"mine")
    assert found(world) == {f"foreign {name}" for name in planted}
    assert all((world.archive / name).read_bytes() == b"mine" for name in planted)


def test_a_bad_sidecar_without_row_is_told_as_such(world: World) -> None:
    path, sidecar = path_of(world, "sheet"), path_of(world, "sheet", ".json")
    world.index.run("DELETE FROM version WHERE path = ?", path)
    change(world.archive / sidecar, b"{}")
    assert found(world) == {f"bad_sidecar {sidecar}", f"foreign {path}"}


def test_a_sidecar_whose_file_never_came_is_no_damage(world: World) -> None:
    path, sidecar = path_of(world, "sheet"), path_of(world, "sheet", ".json")
    world.index.run("DELETE FROM version WHERE path = ?", path)
    (world.archive / path).unlink()
    assert found(world) == {f"unfinished {sidecar}"}


def test_a_patient_whose_name_is_not_beside_the_documents_is_told_where_the_index_knows_it(
    world: World, one: Small
) -> None:
    path = f"patients/{one.patient}/patient.json"
    (world.archive / path).unlink()
    assert found(world) == {f"missing {path}"}
    world.index.run("UPDATE patient SET last_name = ''")
    assert found(world) == set()
    world.index.run("DELETE FROM patient")
    assert found(world) == set()


@pytest.mark.parametrize(
    "change",
    [
        *("current_version = current_version + 2", "current_seq = current_seq + 4096", "archived_revision = 'x'"),
        *("sha256 = 'ab'", "bytes = bytes + 1", "media_type = 'image/gif'", "current_seq = NULL"),
        "media_type = CAST(X'FF' AS TEXT)",
    ],
)
def test_an_item_that_names_another_version_than_its_newest_is_told(world: World, one: Small, change: str) -> None:
    world.index.run(f"UPDATE item SET {change} WHERE kind = 'document' AND num = ?", one.document)
    assert found(world) == {f"bad_row index.db item {one.patient}/document-{one.document}"}


def test_versions_without_their_item_are_told(world: World, one: Small) -> None:
    world.index.run("DELETE FROM item WHERE kind = 'document' AND num = ?", one.document)
    assert found(world) == {f"bad_row index.db item {one.patient}/document-{one.document}"}


def test_a_newest_row_that_is_wrong_says_nothing_of_its_item(world: World, one: Small) -> None:
    last = world.index.value("SELECT max(seq) FROM version WHERE kind = 'document' AND num = ?", one.document)
    world.index.run("UPDATE version SET bytes = bytes + 1 WHERE seq = ?", last)
    assert found(world) == {f"bad_row index.db seq {last}"}


def test_what_lies_in_incoming_is_in_flight_while_somebody_writes(world: World) -> None:
    (world.archive / "incoming" / "0123").write_bytes(b"half")
    assert found(world) == {"leftover incoming/0123"}
    assert found(world, alone=False) == set()


def test_changed_modes_are_told(world: World, one: Small) -> None:
    path = path_of(world)
    wrong = {
        "patients",
        f"patients/{one.patient}",
        str(Path(path).parent),
        path,
        f"patients/{one.patient}/patient.json",
    }
    for name in wrong:
        (world.archive / name).chmod(0o755)
    assert found(world) == {f"wrong_mode {name}" for name in wrong}


def test_a_patient_file_that_tells_nothing_is_told(world: World, one: Small) -> None:
    path = f"patients/{one.patient}/patient.json"
    change(world.archive / path, b"{}")
    assert found(world) == {f"bad_sidecar {path}"}


@pytest.mark.parametrize("state", ["queued", "unhealable"])
def test_known_damage_is_told_as_what_became_of_it(world: World, state: str) -> None:
    path = path_of(world)
    (world.archive / path).unlink()
    sql = "INSERT INTO damage VALUES (?, 1, 'document', 1, NULL, 'missing', ?, 0, NULL)"
    world.index.run(sql, path, state)
    assert found(world) == {f"{state} {path}"}


def test_an_index_with_a_torn_page_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.index.value("PRAGMA wal_checkpoint(TRUNCATE)")
    root = world.index.value("SELECT rootpage FROM sqlite_schema WHERE name = 'item_by_number'")
    size = world.index.value("PRAGMA page_size")
    with world.index.path.open("r+b") as file:
        file.seek((root - 1) * size + 100)
        file.write(b"\xff" * (size - 100))
    world.index.db.conn.execute("PRAGMA cache_size = 0")
    fresh = Index(world.index.path)
    assert not checker.is_whole(fresh)
    walk = check(fresh, archive_of(world), Tally())
    assert "index_damaged" in {each.code for each in walk if each is not None}
    monkeypatch.setattr(Index, "value", _raises)
    assert not checker.is_whole(fresh)
    monkeypatch.undo()
    fresh.close()


def _raises(*_: object) -> None:
    raise SiteError("disk_error")


def test_where_others_write_what_seems_wrong_is_looked_at_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_of(world)
    content = (world.archive / path).read_bytes()
    change(world.archive / path, b"half")
    real: Callable[..., Any] = checker._Look.walk

    def walked(self: Any) -> Any:
        yield from real(self)
        change(world.archive / path, content)  # meanwhile the other one is done

    monkeypatch.setattr(checker._Look, "walk", walked)
    assert found(world, alone=False) == set()


def test_every_code_says_who_must_act_and_what_to_do() -> None:
    assert all(who in ("nobody", "practice_it") and words for who, words in CODES.values())
    assert CODES.keys() > checker.HARMLESS
    assert checker.Finding("foreign", "x").name == "x"
    assert checker.Finding("damaged", "x", Item(1, "sheet", 2), 3).name == "1/sheet-2 version 3"
    assert checker.Finding("foreign", "x", Item(1, "sheet", 2)).name == "1/sheet-2"


def test_a_bad_row_of_a_later_sidecar_is_told_and_says_nothing_of_the_file(world: World) -> None:
    world.index.run("UPDATE version SET revision = 'x' WHERE sidecar = 2")
    seq = world.index.value("SELECT seq FROM version WHERE sidecar = 2")
    assert found(world) == {f"bad_row index.db seq {seq}"}


def test_a_sidecar_written_in_another_way_was_changed(world: World) -> None:
    path = world.archive / path_of(world, suffix=".json")
    version = decode(path.read_bytes())
    assert version is not None
    written = encode(sidecar_content(replace(version, listing={"Description": "\u00e9"})))
    assert decode(written) is not None
    assert b"\\u00e9" in written
    for other in (written.replace(b"\\u00e9", b"\\u00E9"), written.replace(b"\n", b"", 1), written + b"\n"):
        assert decode(other) is None


def test_a_later_sidecar_that_the_index_does_not_know_is_unrecorded_and_its_file_hashed_once(world: World) -> None:
    world.index.run("DELETE FROM version WHERE sidecar = 2")
    path = next((world.archive / "patients").rglob("1-*.2.json"))
    assert found(world) == {f"unrecorded {path.relative_to(world.archive)}"}
