"""ARCHIVE/published/index.db: what `find` tells, in one file that any program may open; no trouble of the mirror's."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from syncd import copies, published, repair, scrub
from syncd.archive import MARKER, Archive
from syncd.call import cli
from syncd.catalog import Catalog
from syncd.checker import HARMLESS, Tally, check
from syncd.errors import SiteError
from syncd.index import Index
from syncd.model import Item
from syncd.schema import Row
from syncd.search import Filters
from tests.small import DAY, Small, serving, small, troubles
from tests.test_cli import README, Desk, practice, wait_until
from tests.world import World

QUESTIONS = re.findall(r"^```sql\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Small]]:
    """A practice with something of everything; tests only read it."""
    one = small()
    world = serving(tmp_path_factory.mktemp("lived"), one)
    world.run()
    one.practice.replace_bytes(one.document)
    world.sweep()
    world.index.vanish(Item(one.other, "document", one.letter), world.clock.now())
    assert marked(world)
    yield world, one
    world.stop()


@pytest.fixture
def one() -> Small:
    return small()


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    started = World.start(tmp_path, practice=one.practice, sync={"kinds": ["document"]})
    started.run()
    yield started
    started.stop()


def file(world: World) -> Path:
    return world.archive / published.PATH


def marked(world: World) -> int | None:
    """The scheduler's mark comes; which file is there then."""
    world.lanes.pull_lane.due("publish")
    world.run(seconds=60)
    return file(world).stat().st_ino if file(world).exists() else None


def asked(path: Path, sql: str) -> list[Row]:
    """The answer of SQLite to somebody who may only read."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(sql)]


def served(path: Path, sql: str) -> list[Row]:
    """The answer of Datasette, from its package."""
    site = import_module("datasette.app").Datasette([str(path)])
    answer = asyncio.run(site.client.get("/index.json", params={"sql": sql.strip().rstrip(";"), "_shape": "array"}))
    assert answer.status_code == 200, answer.text
    rows: list[Row] = answer.json()
    return rows


def test_it_tells_what_find_tells(lived: tuple[World, Small]) -> None:
    world, one = lived
    found = list(world.catalog().find(Filters()))
    names = ("seq", "path", "sha256", "bytes", "media_type", "archived_at", "pat_num", "kind", "num", "version")
    told = {row["seq"]: row for row in asked(file(world), "SELECT * FROM versions")}
    assert len(told) == len([row for row in found if row["path"]]) > 5
    for row in found:
        assert {name: told[row["seq"]][name] for name in names} == {name: row[name] for name in names}
        assert (told[row["seq"]]["is_current"], told[row["seq"]]["id"]) == (row["current"], row["full_id"])
    items = {row["full_id"]: row for row in found if row["current"]}
    for row in asked(file(world), "SELECT * FROM documents"):
        of = items.pop(row["id"])
        for name in ("seq", "state", "category", "description", "path", "version", "became"):
            assert row[name] == of[name], name
        assert row["date"] == of["date_created"]
        assert row["last_name"] == world.index.patient(row["pat_num"]).last_name  # type: ignore[union-attr]
    assert items == {}
    (gone,) = asked(file(world), "SELECT * FROM vanished")
    assert (gone["num"], gone["last_name"], (world.archive / gone["path"]).exists()) == (one.letter, "Beispiel", True)
    (patient,) = asked(file(world), f"SELECT * FROM patients WHERE pat_num = {one.other}")
    assert (patient["items"], patient["files"], patient["bytes"]) == (1, 1, gone["bytes"])
    meta = {row["key"]: row["value"] for row in asked(file(world), "SELECT * FROM meta")}
    assert (meta["practice"], meta["last_seq"]) == ("main", str(max(told)))


def test_what_is_private_or_only_syncds_is_not_in_it(lived: tuple[World, Small]) -> None:
    world, _ = lived
    tables = {
        row["name"] for row in asked(file(world), "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")
    }
    assert tables == {"meta", "patient", "item", "version", "documents", "versions", "patients", "vanished"}
    text = README.read_text("utf-8")
    assert not [name for name in tables if f"`{name}`" not in text]
    columns = {
        row["name"] for row in asked(file(world), "SELECT p.name FROM sqlite_schema s, pragma_table_info(s.name) p")
    }
    assert columns.isdisjoint({"fields", "staging", "revision", "actor", "detail", "stamp"})
    assert b"syncd-main-" not in file(world).read_bytes()  # a staging name


def test_it_is_one_file_that_nobody_may_write_and_alone(lived: tuple[World, Small]) -> None:
    world, _ = lived
    assert [path.name for path in file(world).parent.iterdir()] == ["index.db"]
    assert (file(world).stat().st_mode & 0o777, file(world).parent.stat().st_mode & 0o777) == (0o400, 0o700)
    assert asked(file(world), "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert asked(file(world), "PRAGMA journal_mode") == [{"journal_mode": "delete"}]
    assert [path.name for path in file(world).parent.iterdir()] == ["index.db"]
    assert list((world.archive / "incoming").iterdir()) == []


def test_it_is_made_anew_only_if_it_would_tell_something_else(world: World, one: Small) -> None:
    first = marked(world)
    assert marked(world) == first
    with file(world).open("rb"):  # who reads it keeps it, and its number is not used again
        one.practice.replace_bytes(one.document)
        world.sweep()
        second = marked(world)
        assert second != first
    with file(world).open("rb"):
        world.index.vanish(Item(one.other, "document", one.letter), world.clock.now())
        assert marked(world) not in (first, second)
    with file(world).open("rb"):
        third = marked(world)
        world.clock.advance(DAY)
        assert marked(world) != third  # and once a day
    assert len(world.log.events("index_published")) == 4


@pytest.mark.parametrize("harm", ["gone", "cut", "other bytes", "mode", "a link"])
def test_one_that_is_missing_or_damaged_heals_itself(world: World, harm: str, tmp_path: Path) -> None:
    marked(world)
    content = file(world).read_bytes()
    file(world).chmod(0o600)
    match harm:
        case "cut":
            os.truncate(file(world), 4096)
        case "other bytes":
            file(world).write_bytes(b"x" * len(content))
        case "mode":
            file(world).chmod(0o444)
        case _:
            file(world).unlink()
            if harm == "a link":
                file(world).symlink_to(tmp_path / "elsewhere")
    marked(world)
    assert len(asked(file(world), "SELECT * FROM versions")) == 2
    assert (file(world).is_symlink(), file(world).stat().st_mode & 0o777) == (False, 0o400)
    assert not (tmp_path / "elsewhere").exists()


def room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Archive, "free_bytes", lambda _: world.settings.archive.reserve)


def full(_: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("syncd.folders.os.fsync", refused)


def no_folder(world: World, _: pytest.MonkeyPatch) -> None:
    shutil.rmtree(file(world).parent)
    file(world).parent.write_bytes(b"a file in its place")


def index_unread(_: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_FILL", ("SELECT * FROM source.no_such_table",))


@pytest.mark.parametrize("trouble", [room, full, no_folder, index_unread])
def test_one_that_cannot_be_made_is_told_and_is_no_trouble_of_the_archive(
    world: World, one: Small, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    marked(world)
    before = file(world).read_bytes()
    one.practice.replace_bytes(one.document)
    world.sweep()
    with monkeypatch.context() as patch:
        trouble(world, patch)
        world.lanes.pull_lane.due("publish")
        world.lanes.pull_lane._upkeep.turn(world.clock.now())
    assert len(world.log.events("index_publish_failed")) == 1
    assert troubles(world) == {}
    assert list((world.archive / "incoming").iterdir()) == []
    if trouble is no_folder:
        assert world.findings().wrong == ["published: foreign"]
        return
    assert file(world).read_bytes() == before
    assert marked(world)
    assert file(world).read_bytes() != before
    world.check()


def test_nothing_is_published_before_anything_is_archived(tmp_path: Path, one: Small) -> None:
    world = serving(tmp_path, one)
    world.lanes.pull_lane.due("publish")
    world.lanes.pull_lane.turn(world.clock.now())
    assert not file(world).exists()
    world.stop()


def test_verify_knows_it_and_reindex_ignores_it(world: World) -> None:
    marked(world)
    archive = Archive(world.archive, 0)
    assert [each for each in check(world.index, archive, Tally()) if each] == []
    (file(world).parent / "index.db-wal").touch()
    file(world).chmod(0o644)
    found = {(each.code, each.path) for each in check(world.index, archive, Tally()) if each}
    assert found == {("foreign", "published/index.db-wal"), ("wrong_mode", published.PATH)}
    world.stop()
    assert scrub.reindex(world.settings, archive, world.clock.now()).foreign == []
    world.restart()


@pytest.mark.parametrize("question", QUESTIONS, ids=["newer images", "vanished this month", "bytes per category"])
def test_questions_of_the_readme_are_answered_by_sqlite_and_by_datasette(
    lived: tuple[World, Small], question: str
) -> None:
    world, one = lived
    question = question.replace("'2026-03-01'", "'2025-01-01'").replace("'now'", f"{world.clock.now()}, 'unixepoch'")
    rows = asked(file(world), question)
    assert rows
    assert served(file(world), question) == rows
    total = world.index.value("SELECT sum(bytes) FROM version WHERE sidecar = 1")
    if "vanished" in question:
        assert [row["id"] for row in rows] == [f"{one.other}/document-{one.letter}"]
    elif "category" in question:
        assert sum(row["bytes"] for row in rows) == total
    else:
        assert [row["pat_num"] for row in rows] == [one.patient]


@pytest.mark.slow
def test_datasette_answers_beside_a_running_daemon_that_has_just_put_it_in_its_place(tmp_path: Path) -> None:
    with practice() as simulation:
        desk, office = Desk(simulation, tmp_path), simulation.practice
        path = desk.archive / published.PATH
        office.add_document(office.rows("SELECT PatNum FROM patient")[0]["PatNum"], "png")
        desk.json("backfill")
        path.unlink()  # so that it is the daemon's
        with desk.process("run"):
            wait_until(path.exists)
            answers = [asked(path, question) for question in QUESTIONS]
            assert [served(path, question) for question in QUESTIONS] == answers
            assert desk.json("status")["state"] != "stopped"
        total = sum(row["bytes"] for row in desk.found())
        assert [sum(row["bytes"] for row in rows) for rows in answers if rows and "category" in rows[0]] == [total]


def test_readme_has_three_questions() -> None:
    assert len(QUESTIONS) == 3


def test_a_disk_that_is_full_while_it_is_written_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_SCHEMA", f"PRAGMA main.max_page_count = 2;\n{published._SCHEMA}")
    with pytest.raises(SiteError) as refusal:
        published.publish(world.index, Archive(world.archive, 0), world.settings, world.clock.now())
    assert refusal.value.reason == "archive_full"


@pytest.mark.parametrize("copy", ["sound", "damaged"])
def test_an_index_made_from_the_archive_alone_knows_what_had_vanished(
    lived: tuple[World, Small], tmp_path: Path, copy: str
) -> None:
    world, one = lived
    shutil.copytree(world.archive, tmp_path / "archive")
    if copy == "damaged":
        (tmp_path / "archive" / published.PATH).chmod(0o600)
        (tmp_path / "archive" / published.PATH).write_bytes(b"noise" * 1000)
    with closing(Index(tmp_path / "index.db")) as index:
        scrub.adopt_all(index, Archive(tmp_path / "archive", reserve=0), world.settings, world.clock.now())
        then, now = (
            {row["full_id"] for row in each.find(Filters()) if row["state"] == "vanished"}
            for each in (world.catalog(), Catalog(index))
        )
        at = index.value("SELECT vanished_at FROM item WHERE num = ? AND kind = 'document'", one.letter)
    assert now == (then if copy == "sound" else set())
    if copy == "sound":
        assert then
        known = world.index.value("SELECT vanished_at FROM item WHERE num = ? AND kind = 'document'", one.letter)
        assert at == pytest.approx(known, abs=0.01)


def reindexed(world: World) -> None:
    world.stop()
    scrub.reindex(world.settings, Archive(world.archive, 0), world.clock.now())
    world.restart()


@pytest.mark.parametrize("copied", [True, False])
def test_a_reindex_knows_what_vanished_after_the_copy_that_it_begins_with(
    world: World, one: Small, copied: bool
) -> None:
    if copied:
        copies.make(world.index, world.settings.state_path / "copies", "2026-03-10")
    one.practice.move_document(one.document, one.other, keep_number=True)
    world.sweep()
    assert marked(world)
    old = Item(one.patient, "document", one.document)
    before = world.item(old.pat_num, old.kind, old.num)
    assert before["became"] == Item(one.other, "document", one.document).full_id
    reindexed(world)
    after = world.item(old.pat_num, old.kind, old.num)
    assert (after["vanished_at"], after["became"]) == (pytest.approx(before["vanished_at"], abs=0.01), before["became"])
    assert world.index.rows("SELECT * FROM duty WHERE pat_num = ?", one.patient) == []


@pytest.mark.parametrize("by", ["the newer copy", "its new version"])
def test_what_came_back_after_it_was_published_is_not_marked_again(world: World, one: Small, by: str) -> None:
    letter = Item(one.other, "document", one.letter)
    if by == "its new version":
        copies.make(world.index, world.settings.state_path / "copies", "2026-03-10")
    world.index.vanish(letter, world.clock.now())
    assert marked(world)
    if by == "its new version":
        one.practice.replace_bytes(one.letter)
    world.sweep()
    if by == "the newer copy":
        copies.make(world.index, world.settings.state_path / "copies", "2026-03-10")
    assert world.item(letter.pat_num, letter.kind, letter.num)["vanished_at"] is None
    assert [gone[0] for gone in published.vanished(world.archive)[1]] == [letter]
    reindexed(world)
    assert world.item(letter.pat_num, letter.kind, letter.num)["vanished_at"] is None


def test_a_bare_archive_is_read_as_it_is_now_and_its_backup_as_it_was(
    world: World, one: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []

    def seen(archive: Path) -> tuple[dict[str, Any], set[str]]:
        os.utime(archive / MARKER, (1, 1))  # at rest
        result = CliRunner().invoke(cli, ["--archive", str(archive), "find", "--json"])
        said.append(result.stderr)
        rows = [row for row in map(json.loads, result.stdout.splitlines()) if row["num"] == one.document]
        (kept,) = (tmp_path / "cache").rglob("index*.db")
        with closing(Index(kept)) as index:
            names = {row["last_name"] for row in index.rows("SELECT last_name FROM patient")}
        return {row["full_id"]: (row["state"], row["sha256"]) for row in rows if row["current"]}, names

    assert marked(world)
    shutil.copytree(world.archive, tmp_path / "backup")
    before = seen(world.archive)
    assert seen(tmp_path / "backup") == before
    assert [bool(words) for words in said] == [True, False]
    old, new = (f"{pat_num}/document-{one.document}" for pat_num in (one.patient, one.other))
    assert before[0][old][0] == "archived"
    one.practice.move_document(one.document, one.other, keep_number=True)
    world.sweep()
    person = world.index.patient(one.other)
    assert person is not None
    Archive(world.archive, 0).write_patient(replace(person, last_name="Newname"))
    assert marked(world)
    now = seen(world.archive)
    assert {name: state for name, (state, _) in now[0].items()} == {old: "vanished", new: "archived"}
    assert now[1] > {"Newname"}
    assert seen(tmp_path / "backup") == before


def test_a_file_that_was_gone_before_a_reindex_is_missing(world: World, one: Small) -> None:
    world.index.vanish(Item(one.other, "document", one.letter), world.clock.now())
    assert marked(world)
    (path,) = (world.archive / f"patients/{one.other}/document-{one.letter}").glob("*.pdf")
    (document,) = (world.archive / f"patients/{one.patient}/document-{one.document}").glob("*.jpg")
    for file in (path, document, document.with_suffix(".json")):
        file.unlink()
    reindexed(world)
    name = str(path.relative_to(world.archive))
    assert [(row["path"], row["code"]) for row in world.index.rows("SELECT * FROM damage")] == [(name, "missing")]
    archive, now = Archive(world.archive, 0), world.clock.now()
    walk = list(scrub.verify(world.index, archive, Tally(), now))
    assert [(each.code, each.path) for each in walk if each.code not in HARMLESS] == [("missing", name)]
    scrub.note(world.index, world.log, walk, now, whole=True)
    (lost,) = [each for each in walk if each.code == "missing"]
    assert repair.mend(world.index, archive, world.log, lost, now) == "unhealable"
    assert [each.code for each in scrub.verify(world.index, archive, Tally(), now) if each.path == name] == [
        "unhealable"
    ]


def test_a_file_of_somebody_else_in_its_place_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    with closing(sqlite3.connect(tmp_path / published.PATH)) as db:
        db.execute("CREATE TABLE meta (key, value)")
    assert published.vanished(tmp_path) == (0, [])
