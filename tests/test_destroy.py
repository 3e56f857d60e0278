"""`destroy`: nothing of what an order names is left, wherever it was; it never comes back; only a tombstone stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from syncd import checker, copies, destroy, repair, retrieve, scrub, wishes
from syncd.archive import Archive
from syncd.demo.practice import Practice
from syncd.errors import UsageError
from syncd.index import Index
from syncd.model import DESTROYED, Item
from tests.small import Small, small, troubles
from tests.world import World

SECRET = "Zzyzx-secret"  # in every text of the document
TICKET = "court order 7/2026"


class Doomed:
    """A mirror that has an image with a thumbnail, two versions, a set-aside file and a daily copy of the index."""

    def __init__(self, folder: Path) -> None:
        self.one: Small = small()
        self.practice: Practice = self.one.practice
        self.practice.edit_document(self.one.document, Description=SECRET, FileName=f"{SECRET}.jpg")
        self.world = World.start(folder, practice=self.practice, interval=60.0, sync={"vanish_after": "1h"})
        self.world.run()
        self.item = Item(self.one.patient, "document", self.one.document)
        self.practice.replace_bytes(self.one.document)
        self.world.run(hours=1)
        self.archive = Archive(self.world.archive, 0)
        aside = self.world.archive / "damaged" / str(self.item.pat_num) / self.item.id
        aside.mkdir(parents=True)
        (aside / "1-000000000000.jpg").write_bytes(self.media()[0])
        state = self.world.settings.state_path
        copies.make(self.world.index, state / "copies", "2026-01-01")
        (state / "index.db.before-reindex").write_bytes((state / "copies" / "index-2026-01-01.db").read_bytes())
        (self.world.archive / "published").mkdir(mode=0o700, exist_ok=True)
        (self.world.archive / "published" / "index.db").write_bytes(SECRET.encode())

    def media(self) -> list[bytes]:
        return self.world.media(self.item.pat_num, "document", self.item.num)

    def order(self, item: Item | None = None) -> None:
        wanted = item or self.item
        argument = [wanted.pat_num, wanted.kind, wanted.num, TICKET]
        wishes.make(self.world.index, "destroy", argument, self.world.clock.now(), "uid-7")

    def carried_out(self) -> bool:
        rows = self.world.index.rows("SELECT 1 FROM tombstone WHERE done_at IS NOT NULL")
        return bool(rows) and not self.world.index.value("SELECT 1 FROM tombstone WHERE done_at IS NULL")

    def left(self, content: list[bytes]) -> list[str]:
        """The files of archive, state and log that hold a text or the bytes of the document."""
        self.world.index.value("PRAGMA wal_checkpoint(TRUNCATE)")
        found = []
        for top in (self.world.archive, self.world.settings.state_path, self.world.settings.log_path):
            for path in top.rglob("*"):
                text = path.read_bytes() if path.is_file() else b""
                found += [str(path.relative_to(top.parent))] * (SECRET.encode() in text or text in content)
        return [name for name in found if not name.endswith("-shm")]

    def check(self, content: list[bytes]) -> None:
        """Gone, and staying so; the checker has nothing to say."""
        assert self.carried_out()
        assert self.left(content) == []
        for kind in ("document", "thumbnail"):
            assert self.world.files(self.item.pat_num, kind, self.item.num) == ["destroyed.json"]
        findings = list(filter(None, checker.check(self.world.index, self.archive, checker.Tally())))
        assert not [each for each in findings if each.code not in ("unfinished", "foreign")], findings
        assert self.world.state(self.item.pat_num, "document", self.item.num) == "vanished"
        (tombstone,) = [r for r in self.world.catalog().destroyed(self.item.pat_num) if r["kind"] == "document"]
        assert (tombstone["ticket"], tombstone["actor"]) == (TICKET, "uid-7")
        told = self.archive.read_tombstone(self.item)
        assert told is not None
        assert (told.ticket, told.actor, len(told.digests)) == (TICKET, "uid-7", len(content))


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Doomed]:
    made = Doomed(tmp_path)
    yield made
    with suppress(Exception):
        made.world.stop()


def test_nothing_of_a_destroyed_document_is_left_and_a_tombstone_says_so(doomed: Doomed) -> None:
    content = doomed.media()
    assert len(content) == 2
    assert doomed.left(content)
    doomed.order()
    doomed.world.run(seconds=120)
    doomed.check(content)
    row = doomed.world.item(doomed.item.pat_num, "document", doomed.item.num)
    assert (row["became"], row["description"], row["fields"], row["sha256"]) == (DESTROYED, None, "{}", None)
    (event,) = [e for e in doomed.world.catalog().history(doomed.item) if e["event"] == "destroyed"]
    assert (event["ticket"], event["actor"], len(event["digests"])) == (TICKET, "uid-7", 2)
    verbs = [(f["verb"], f["item"], f["ticket"]) for f in doomed.world.audit_facts() if f["verb"].startswith("destroy")]
    full = doomed.item.full_id
    assert verbs[0] == ("destroy", full, TICKET)
    assert ("destroyed", full, TICKET) in verbs
    assert len(verbs) == len(set(verbs))


def test_it_never_comes_back_under_its_number_whatever_the_office_does(doomed: Doomed) -> None:
    content, since = doomed.media(), len(doomed.world.office.arrivals)
    doomed.order()
    doomed.world.run(seconds=120)
    doomed.practice.edit_document(doomed.item.num)  # another revision
    doomed.world.run(hours=2)
    doomed.practice.replace_bytes(doomed.item.num)
    mount = doomed.one.mount
    doomed.practice.move_into_mount(doomed.item.num, mount)  # DownloadMount places it, unasked
    doomed.world.run(hours=6)
    doomed.practice.out_of_mount(doomed.item.num)
    doomed.world.run(hours=2)
    doomed.check(content)
    assert not doomed.world.sent("/documents/DownloadSftp", since, DocNum=doomed.item.num)
    doomed.world.check_drop()
    facts = doomed.world.catalog().status_facts(doomed.world.clock.now())
    assert (facts.owed, dict(facts.failing)) == (0, {})


def test_moved_to_the_right_patient_it_is_another_item_and_fetched(doomed: Doomed) -> None:
    doomed.order()
    doomed.world.run(seconds=120)
    doomed.practice.move_document(doomed.item.num, doomed.one.other, keep_number=True)
    doomed.world.run(hours=2)
    assert len(doomed.world.media(doomed.one.other, "document", doomed.item.num)) == 1
    assert not doomed.world.log.events("number_reused")


def test_a_destroyed_mount_goes_with_its_images_and_their_thumbnails(doomed: Doomed) -> None:
    mount = Item(doomed.one.patient, "mount", doomed.one.mount)
    images = [r["num"] for r in doomed.world.index.rows("SELECT num FROM item WHERE mount_num = ?", mount.num)]
    doomed.order(mount)
    doomed.world.run(seconds=120)
    assert len(images) == 3
    for item in (mount, *(Item(mount.pat_num, "mount-image", num) for num in images)):
        assert doomed.world.files(item.pat_num, item.kind, item.num) == ["destroyed.json"]
    assert doomed.world.media(doomed.item.pat_num, "document", doomed.item.num)


def test_an_index_made_of_the_archive_alone_or_put_back_from_before_keeps_it_destroyed(doomed: Doomed) -> None:
    content, state = doomed.media(), doomed.world.settings.state_path
    old = (state / "copies" / "index-2026-01-01.db").read_bytes()
    doomed.order()
    doomed.world.run(seconds=120)
    for before in (None, old):
        doomed.world.stop()
        for copy in (state / "copies").glob("*"):
            copy.unlink()
        if before is None:
            scrub.reindex(doomed.world.settings, doomed.archive, doomed.world.clock.now())
        else:
            (state / "index.db").write_bytes(before)
        doomed.world.restart()
        doomed.world.run(hours=3)
        doomed.check(content)


def test_an_archive_put_back_from_before_is_cleared_again_at_the_next_start(doomed: Doomed) -> None:
    content, folder = doomed.media(), doomed.world.archive / "patients" / str(doomed.item.pat_num) / doomed.item.id
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    doomed.order()
    doomed.world.run(seconds=120)
    (folder / "destroyed.json").unlink()
    for name, was in before.items():
        (folder / name).write_bytes(was)
    found = list(filter(None, checker.check_item(doomed.world.index, doomed.archive, doomed.item, checker.Tally())))
    assert {each.code for each in found} == {"leftover"}
    for each in found:
        assert repair.mend(doomed.world.index, doomed.archive, doomed.world.log, each, 0.0) == ""
    doomed.world.restart()
    doomed.world.run(seconds=120)
    doomed.check(content)


def test_no_version_of_what_was_destroyed_is_recorded_again(doomed: Doomed) -> None:
    version, index = doomed.archive.read_item(doomed.item)[-1], doomed.world.index
    doomed.order()
    doomed.world.run(seconds=120)
    index.put_version(version, doomed.world.clock.now())
    assert index.value("SELECT 1 FROM version WHERE seq = ?", version.seq) is None
    assert doomed.world.item(doomed.item.pat_num, "document", doomed.item.num)["sha256"] is None


def test_a_folder_that_somebody_made_beside_the_published_copy_stays(doomed: Doomed) -> None:
    published = doomed.world.archive / "published"
    (published / "notes").mkdir()
    doomed.order()
    doomed.world.run(seconds=120)
    assert doomed.carried_out()
    assert [path.name for path in published.iterdir()] == ["notes"]


def test_a_folder_that_somebody_made_among_its_files_stays_and_is_told(doomed: Doomed) -> None:
    content, folder = doomed.media(), doomed.world.archive / "patients" / str(doomed.item.pat_num) / doomed.item.id
    (folder / "@eaDir").mkdir()
    doomed.order()
    later = doomed.practice.add_document(doomed.one.other, "png")
    doomed.world.run(hours=2)
    assert (doomed.carried_out(), doomed.left(content)) == (True, [])
    assert sorted(path.name for path in folder.iterdir()) == ["@eaDir", "destroyed.json"]
    assert [line["count"] for line in doomed.world.log.events("foreign_left")] == [1]
    assert doomed.world.state(doomed.one.other, "document", later) == "archived"
    found = list(filter(None, checker.check_item(doomed.world.index, doomed.archive, doomed.item, checker.Tally())))
    assert [(each.code, each.path) for each in found] == [
        ("foreign", str((folder / "@eaDir").relative_to(folder.parents[2])))
    ]
    doomed.world.restart()
    doomed.world.run(hours=2)
    assert len(doomed.world.log.events("item_destroyed")) == 2  # it and its thumbnail, and not again


@pytest.mark.parametrize("code", [errno.EPERM, errno.EIO, errno.EUCLEAN])
def test_what_the_disk_does_not_let_go_keeps_its_order_open_and_nothing_else_waiting(
    doomed: Doomed, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    content, unlink = doomed.media(), os.unlink
    letter = Item(doomed.one.other, "document", doomed.one.letter)

    def refused(name: Any, *args: Any, **kwargs: Any) -> None:
        if str(name).startswith("2-"):
            raise OSError(code, "planted")
        unlink(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        doomed.order()
        doomed.order(letter)
        later = doomed.practice.add_document(doomed.one.other, "png")
        doomed.world.run(hours=2)
        assert doomed.world.files(letter.pat_num, "document", letter.num) == ["destroyed.json"]
        assert doomed.world.state(doomed.one.other, "document", later) == "archived"
        assert troubles(doomed.world) == {"destroy": "archive_damaged"}
        assert destroy.is_open(doomed.world.index, doomed.item)
        assert not destroy.is_open(doomed.world.index, letter)
        doomed.world.restart()
        doomed.world.run(hours=1)
        hindered = doomed.world.log.events("item_not_destroyed")
        assert {line["item"] for line in hindered} == {doomed.item.full_id, f"{doomed.item.pat_num}/thumbnail-1"}
        assert len(hindered) < 60  # with growing distance
    doomed.world.run(hours=2)
    doomed.check(content)
    assert troubles(doomed.world) == {}


def test_a_folder_that_is_none_at_the_start_hinders_no_start(doomed: Doomed) -> None:
    doomed.order()
    doomed.world.run(hours=1)
    folder = doomed.world.archive / "patients" / str(doomed.item.pat_num)
    folder.rename(doomed.world.folder / "moved")
    folder.symlink_to(doomed.world.folder / "moved")
    later = doomed.practice.add_document(doomed.one.other, "png")
    doomed.world.restart()
    doomed.world.run(hours=2)
    assert doomed.world.state(doomed.one.other, "document", later) == "archived"


def test_what_is_under_way_when_it_is_destroyed_is_not_archived(doomed: Doomed) -> None:
    doomed.practice.replace_bytes(doomed.item.num)
    placed = "SELECT 1 FROM attempt WHERE num = ? AND method = 'document' AND state = 'placed'"
    turn, doomed.world.lanes.pull_lane.turn = doomed.world.lanes.pull_lane.turn, lambda now: now + 1  # type: ignore[method-assign]
    doomed.world.run(until=lambda: doomed.world.index.value(placed, doomed.item.num))
    content = doomed.media()
    destroy.order(doomed.world.index, doomed.item, TICKET, doomed.world.clock.now(), "uid-7")
    doomed.world.lanes.pull_lane.turn = turn  # type: ignore[method-assign]
    doomed.world.run(hours=1)
    doomed.check(content)
    doomed.world.check_drop()


def test_a_past_state_names_what_was_destroyed_since(doomed: Doomed, tmp_path: Path) -> None:
    at = doomed.world.clock.now() - 1.0
    doomed.order()
    doomed.world.run(seconds=120)
    zone, catalog = doomed.world.settings.zone, doomed.world.catalog()
    done = retrieve.restore_patient(catalog, doomed.archive, doomed.item.pat_num, tmp_path / "to", at, zone)
    assert doomed.item.full_id in done.destroyed
    with pytest.raises(UsageError, match="was destroyed"):
        retrieve.restore(catalog, doomed.archive, doomed.item, tmp_path / "to", at, zone)


def test_what_has_the_same_bytes_elsewhere_is_named(doomed: Doomed) -> None:
    doomed.practice.move_document(doomed.item.num, doomed.one.other, keep_number=True)
    doomed.world.run(hours=2)
    told = destroy.doomed(doomed.world.index, doomed.item)
    assert told["equal"] == [f"{doomed.one.other}/document-{doomed.item.num}"]
    assert (told["files"], len(told["paths"])) == (4, 4)  # two versions of it, and of its thumbnail


def test_an_order_without_a_plain_ticket_or_for_what_is_unknown_or_destroyed_is_refused(doomed: Doomed) -> None:
    for ticket in ("", "Müller, Anna", "x" * 101, "a\nb"):
        with pytest.raises(UsageError, match="--ticket"):
            destroy.order(doomed.world.index, doomed.item, ticket, 0.0, "uid-7")
    with pytest.raises(UsageError, match="not known"):
        destroy.order(doomed.world.index, Item(99, "document", 1), TICKET, 0.0, "uid-7")
    destroy.order(doomed.world.index, doomed.item, TICKET, 0.0, "uid-7")
    with pytest.raises(UsageError, match="destroyed already"):
        destroy.order(doomed.world.index, doomed.item, TICKET, 0.0, "uid-7")


class _KilledError(BaseException):
    """The process ends here: nothing catches it."""


STEPS = ("unlink", "replace", "fsync", "mkdir", "rename")


def test_a_crash_at_any_step_is_made_good_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Doomed(tmp_path / "one")
    content, step, kills = one.media(), 0, 0
    one.world.stop()
    whole = tmp_path / "whole"
    (tmp_path / "one").rename(whole)
    while True:
        step += 1
        (tmp_path / "one").mkdir()
        for name in ("archive", "state", "log"):
            _copy(whole / name, tmp_path / "one" / name)
        one.world.restart()
        left = iter(range(step))

        def dying(real: Callable[..., Any], left: Iterator[int] = left) -> Callable[..., Any]:
            def step_or_die(*args: Any, **named: Any) -> Any:
                if next(left, None) is None:
                    raise _KilledError
                return real(*args, **named)

            return step_or_die

        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(Index, "run", dying(Index.run))
            try:
                destroy.order(one.world.index, one.item, TICKET, one.world.clock.now(), "uid-7")
                destroy.finish(one.world.index, one.archive, one.world.log, one.world.settings, one.world.clock.now())
            except _KilledError:
                kills += 1
        over = next(left, None) is not None
        one.world.restart()
        if not one.world.index.is_destroyed(one.item):  # it died before the order was written down
            assert one.media() == content
        else:
            one.world.lanes.pull_lane.turn(one.world.clock.now())
            one.check(content)
        one.world.stop()
        (tmp_path / "one").rename(tmp_path / f"done-{step}")
        if over:
            break
    assert kills > 30


def _copy(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700)
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(mode=0o700)
        elif "archive" in str(source) and "incoming" not in str(path) and path.name != ".syncd-archive":
            os.link(path, there)
        else:
            there.write_bytes(path.read_bytes())
            there.chmod(path.stat().st_mode)
