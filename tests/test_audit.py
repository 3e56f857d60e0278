"""The audit log: whoever edits, drops, adds, moves or cuts a line is found; a crash or a full disk loses none."""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from syncd import audit
from syncd.audit import AuditLog, Entry, Head, actor
from syncd.errors import SiteError

NOVEMBER = 1_795_000_000.25  # 2026-11-18T11:06:40.250Z
DECEMBER = NOVEMBER + 20 * 86_400
FEBRUARY = NOVEMBER + 90 * 86_400
CANARY = "Müstermann, Änne"


def entry(number: int, **facts: object) -> Entry:
    return Entry(f"e{number}", NOVEMBER + number, "daemon", "stored", {"seq": number} | facts)


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "log" / "audit")


def add(log: AuditLog, *numbers: int, known: Head | None = None, now: float = NOVEMBER) -> Head:
    with log.appending() as appender:
        return appender.append([entry(number) for number in numbers], known, now)


def file(log: AuditLog, month: str = "2026-11") -> Path:
    return log._folder / f"{month}.log"


def lines(log: AuditLog, month: str = "2026-11") -> list[bytes]:
    return file(log, month).read_bytes().splitlines(keepends=True)


def seqs(log: AuditLog) -> list[int]:
    return [facts["seq"] for facts in log.facts() if "seq" in facts]


def three_months(log: AuditLog) -> Head:
    """Lines 1 to 3 in November, 4 to 6 in December, 7 to 9 in February; nothing happened in January."""
    add(log, 1, 2, 3)
    add(log, 4, 5, 6, now=DECEMBER)
    return add(log, 7, 8, 9, now=FEBRUARY)


# --- what a line is


def test_line_tells_when_who_what_and_is_bound_to_the_line_before(log: AuditLog) -> None:
    add(log, 1, 2)
    first, second = (json.loads(line) for line in lines(log))
    assert list(first) == ["n", "at", "actor", "verb", "entry", "seq", "prev", "hash"]
    assert (first["n"], first["at"], first["actor"]) == (1, "2026-11-18T11:06:41.250Z", "daemon")
    assert (first["prev"], second["n"], second["prev"]) == ("0" * 64, 2, first["hash"])


def test_only_ids_digests_and_counts_get_in(log: AuditLog) -> None:
    facts: dict[str, object] = {"item": CANARY, "items": ["101/document-34", CANARY], "count": 1.5, "more": True}
    with log.appending() as appender:
        appender.append([entry(1, description=CANARY, became=None, bytes=b"x", **facts)], None, NOVEMBER)
    told = json.loads(lines(log)[0])
    assert (told["item"], told["items"], told["count"], told["more"]) == ("?", ["101/document-34", "?"], "?", True)
    assert (told["became"], told["bytes"], "description" in told) == (None, "?", False)
    assert "stermann" not in file(log).read_text()


def recorded() -> Iterator[tuple[str, str]]:
    """Every fact that the product gives to `record`, and the module that does."""
    for path in sorted(Path(audit.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "record":
                yield from ((path.name, keyword.arg) for keyword in node.keywords if keyword.arg)


def test_every_fact_that_is_recorded_anywhere_may_stand_in_the_log() -> None:
    found = list(recorded())
    assert len(found) > 20
    assert {fact for _, fact in found} <= audit.FACTS


def test_one_file_a_month_and_one_chain_over_all_of_them(log: AuditLog) -> None:
    head = three_months(log)
    assert sorted(path.name for path in log._folder.glob("*.log")) == ["2026-11.log", "2026-12.log", "2027-02.log"]
    assert json.loads(lines(log, "2026-12")[0])["prev"] == json.loads(lines(log)[-1])["hash"]
    assert log.verify(head) == audit.Checked(9, head, None)
    assert log.head() == head
    assert seqs(log) == list(range(1, 10))


def test_clock_that_went_back_does_not_write_into_an_older_file(log: AuditLog) -> None:
    head = three_months(log)
    head = add(log, 10, known=head, now=NOVEMBER)
    assert len(lines(log, "2027-02")) == 4
    assert log.verify(head).problem is None


def test_files_are_for_the_owner_only(log: AuditLog) -> None:
    add(log, 1)
    assert stat.S_IMODE(log._folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in log._folder.iterdir()} == {0o600}


def test_empty_log_is_whole(log: AuditLog) -> None:
    assert log.verify() == audit.Checked(0, Head(), None)
    assert log.verify(Head()).problem is None
    assert log.head() == Head()
    assert list(log.facts()) == []


def test_head_survives_being_written_down(log: AuditLog) -> None:
    head = add(log, 1)
    assert Head.parse(str(head)) == head
    assert Head.parse(None) is None


def test_log_without_its_lock_file_can_be_read(log: AuditLog) -> None:
    head = add(log, 1)
    (log._folder / ".lock").unlink()
    assert log.verify(head).lines == 1


def test_foreign_files_in_the_folder_are_no_part_of_the_log(log: AuditLog) -> None:
    head = add(log, 1)
    (log._folder / "2026-13.log").write_text("not a month\n")
    (log._folder / "notes.txt").write_text("x")
    assert log.verify(head).problem is None


# --- whoever touches it is found

LinesOf = Callable[[list[bytes]], list[bytes]]


def edited(found: list[bytes]) -> list[bytes]:
    return [found[0], found[1].replace(b'"seq":', b'"seq":1'), *found[2:]]


def another_actor(found: list[bytes]) -> list[bytes]:
    return [found[0], found[1].replace(b'"daemon"', b'"uid-0"'), *found[2:]]


def sealed_anew(found: list[bytes]) -> list[bytes]:
    """One line changed by somebody who can compute a hash."""
    told = json.loads(found[1])
    line, _ = audit._line(Entry("e2", NOVEMBER, "uid-0", "stored", {"seq": 9}), Head(1, told["prev"]))
    return [found[0], line, *found[2:]]


@pytest.mark.parametrize("month", ["2026-11", "2026-12", "2027-02"])
@pytest.mark.parametrize(
    ("touch", "line"),
    [
        (lambda found: [found[0][:9] + b"9" + found[0][10:], *found[1:]], 1),
        (edited, 2),
        (another_actor, 2),
        (lambda found: [found[1], found[0], *found[2:]], 1),
        (lambda found: [found[0], found[0], *found[1:]], 2),
        (lambda found: [found[0], b"\n", *found[1:]], 2),
        (lambda found: [found[0], b'{"n":2}\n', *found[1:]], 2),
        (lambda found: [found[0], b"\n".join(found[1:])], 3),
        (lambda found: [found[0][:30], *found[1:]], 1),
    ],
)
def test_touched_line_is_found_with_its_file_and_number(log: AuditLog, touch: LinesOf, line: int, month: str) -> None:
    three_months(log)
    head = add(log, 10, now=FEBRUARY + 40 * 86_400)  # so that February's end is not the end of all
    file(log, month).write_bytes(b"".join(touch(lines(log, month))))
    problem = log.verify(head).problem
    assert problem is not None
    assert (problem.file, problem.line) == (f"{month}.log", line)
    assert str(problem).startswith(f"audit/{month}.log line {line}: ")


@pytest.mark.parametrize(
    ("dropped", "place"), [(0, ("2026-11.log", 1)), (1, ("2026-11.log", 2)), (2, ("2026-12.log", 1))]
)
def test_dropped_line_is_found_at_the_line_that_follows(log: AuditLog, dropped: int, place: tuple[str, int]) -> None:
    head = three_months(log)
    found = lines(log)
    file(log).write_bytes(b"".join(found[:dropped] + found[dropped + 1 :]))
    problem = log.verify(head).problem
    assert problem is not None
    assert (problem.file, problem.line) == place


@pytest.mark.parametrize(("month", "place"), [("2026-11", "2026-12.log"), ("2026-12", "2027-02.log")])
def test_missing_month_is_found(log: AuditLog, month: str, place: str) -> None:
    head = three_months(log)
    file(log, month).unlink()
    problem = log.verify(head).problem
    assert problem is not None
    assert (problem.file, problem.line) == (place, 1)


def test_line_sealed_anew_breaks_the_chain_at_the_next(log: AuditLog) -> None:
    head = three_months(log)
    file(log).write_bytes(b"".join(sealed_anew(lines(log))))
    problem = log.verify(head).problem
    assert problem is not None
    assert (problem.file, problem.line) == ("2026-11.log", 3)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_cut_end_is_found_by_the_head_that_the_index_keeps(log: AuditLog, cut: int) -> None:
    head = three_months(log)
    file(log, "2027-02").write_bytes(b"".join(lines(log, "2027-02")[:-cut]))
    assert log.verify().problem is None  # the chain alone cannot tell
    problem = log.verify(head).problem
    assert problem is not None
    assert f"{cut} lines were there" in problem.what


def test_line_cut_in_its_middle_is_found_by_the_head(log: AuditLog) -> None:
    head = three_months(log)
    path = file(log, "2027-02")
    path.write_bytes(path.read_bytes()[:-20])
    problem = log.verify(head).problem
    assert problem is not None
    assert (problem.file, problem.line) == ("2027-02.log", 3)


@pytest.mark.parametrize("kept", [None, Head(9, "f" * 64)])
def test_edited_last_line_is_found_with_and_without_a_head(log: AuditLog, kept: Head | None) -> None:
    three_months(log)
    path = file(log, "2027-02")
    path.write_bytes(path.read_bytes().replace(b'"seq":9', b'"seq":7'))
    problem = log.verify(kept).problem
    assert problem is not None
    assert (problem.file, problem.line) == ("2027-02.log", 3)


def test_whole_log_gone_is_found_by_the_head(log: AuditLog) -> None:
    head = three_months(log)
    for path in log._folder.glob("*.log"):
        path.unlink()
    assert log.verify(head).problem is not None


def test_log_written_anew_is_found_by_the_head(log: AuditLog, tmp_path: Path) -> None:
    head = add(log, 1, 2, 3)
    other = AuditLog(tmp_path / "other")
    add(other, 1, 9, 3, 4)
    file(other).replace(file(log))
    problem = log.verify(head).problem
    assert problem is not None
    assert (problem.line, "written anew" in problem.what) == (3, True)


@pytest.mark.parametrize("touch", [lambda found: found[:-1], lambda found: [*found[:-1], b"gone\n"], lambda _: []])
def test_what_is_appended_later_does_not_hide_a_cut_end(log: AuditLog, touch: LinesOf) -> None:
    head = add(log, 1, 2, 3)
    file(log).write_bytes(b"".join(touch(lines(log))))
    head = add(log, 4, known=head)
    assert head.n == 4
    assert log.verify(head).problem is not None
    head = add(log, 5, known=head)
    assert log.verify(head).problem is not None
    assert seqs(log)[-2:] == [4, 5]


def test_what_is_appended_later_does_not_hide_a_log_written_anew(log: AuditLog, tmp_path: Path) -> None:
    head = add(log, 1, 2, 3)
    other = AuditLog(tmp_path / "other")
    add(other, 1, 9, 3, 4)
    file(other).replace(file(log))
    assert log.verify(add(log, 5, known=head)).problem is not None


@pytest.mark.parametrize("sealed", [b"[1]", b"{}", b'{"n":null}', b'{"n":"x"}', b'{"n":1', b"[" * 100_000])
def test_sealed_line_that_is_none_of_ours_is_found(log: AuditLog, sealed: bytes) -> None:
    body = sealed.rstrip(b"}")
    digest = hashlib.sha256(body).hexdigest().encode()
    add(log, 1)
    file(log).write_bytes(body + b',"hash":"' + digest + b'"}\n' + lines(log)[0])
    assert log.verify().problem is not None


# --- crashes


def test_what_a_crash_left_of_a_line_is_closed_and_told_of_never_cut(log: AuditLog) -> None:
    head = add(log, 1, 2)
    torn = lines(log)[1][:50]
    with file(log).open("ab") as out:
        out.write(torn)
    assert log.verify(head).problem is None  # nothing that was promised is missing
    assert log.verify().problem is None
    after = add(log, 3, known=head, now=DECEMBER)
    assert lines(log)[2] == torn + b"\n"
    told = json.loads(lines(log)[3])
    assert (told["n"], told["verb"], told["bytes"], told["prev"]) == (3, "torn", 51, head.hash)
    assert not file(log, "2026-12").exists()  # beside what it tells of
    assert log.verify(after) == audit.Checked(4, after, None)
    assert seqs(log) == [1, 2, 3]


def test_crash_while_closing_a_torn_line_is_told_of_as_well(log: AuditLog) -> None:
    head = add(log, 1)
    with file(log).open("ab") as out:
        out.write(b'{"n":2,\n{"n":2,"at')
    after = add(log, 2, known=head)
    assert log.verify(after) == audit.Checked(3, after, None)
    with file(log).open("ab") as out:
        out.write(b"\0" * 4096)  # as a file system leaves it that knew the size and not the content
    after = add(log, 3, known=after)
    assert log.verify(after) == audit.Checked(5, after, None)


def test_torn_first_line_of_all_is_told_of(log: AuditLog) -> None:
    add(log, 1)
    torn = lines(log)[0][:-30]
    file(log).write_bytes(torn)
    head = add(log, 1)
    assert log.verify(head) == audit.Checked(2, head, None)
    assert lines(log)[0] == torn + b"\n"


def test_new_file_without_a_line_is_no_break(log: AuditLog) -> None:
    head = add(log, 1)
    file(log, "2026-12").touch()
    head = add(log, 2, known=head, now=DECEMBER)
    assert log.verify(head) == audit.Checked(2, head, None)


def test_torn_line_that_was_changed_afterwards_is_found(log: AuditLog) -> None:
    head = add(log, 1)
    with file(log).open("ab") as out:
        out.write(b"half of a line")
    head = add(log, 2, known=head)
    file(log).write_bytes(file(log).read_bytes().replace(b"half", b"hulf"))
    problem = log.verify(head).problem
    assert problem is not None
    assert problem.line == 2


def test_line_that_lacks_but_its_newline_is_whole(log: AuditLog) -> None:
    add(log, 1, 2)
    file(log).write_bytes(file(log).read_bytes()[:-1])
    assert log.verify().lines == 2
    head = add(log, 3)
    assert log.verify(head) == audit.Checked(3, head, None)
    assert len(lines(log)) == 3


def test_entry_that_is_there_already_is_not_written_twice(log: AuditLog) -> None:
    head = add(log, 1, 2, 3)
    again = add(log, 2, 3, 4, known=head)  # the process ended before it noted that 2 and 3 were written
    assert add(log, 2, 3, 4, known=head) == again
    assert seqs(log) == [1, 2, 3, 4]


def test_entries_of_many_blocks_and_files_are_found_again(log: AuditLog) -> None:
    first = add(log, *range(1, 500))
    last = add(log, *range(500, 1000), known=first, now=DECEMBER)
    assert file(log).stat().st_size > audit._BLOCK
    assert add(log, *range(1, 1000), known=None, now=DECEMBER) == last
    assert add(log, 1000, known=first, now=DECEMBER).n == 1000  # an index from a backup knows an older head
    assert log.verify(last).problem is None


# --- a disk that is full or fails


class Disk:
    """Fails one call of `os`, from its `at`-th use on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, code: int, at: int = 1) -> None:
        self._real, self._at, self._code, self.calls = getattr(os, call), at, code, 0
        monkeypatch.setattr(os, call, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls >= self._at:
            raise OSError(self._code, "from the disk")
        return self._real(*args, **kwargs)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("call", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO), ("open", errno.EROFS)])
def test_append_that_fails_was_never_in_the_log(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch, call: str, code: int, known: bool
) -> None:
    head = add(log, 1)
    before = file(log).read_bytes()
    with monkeypatch.context() as patch:
        Disk(patch, call, code)
        with pytest.raises(SiteError, match=errno.errorcode[code]) as caught:
            add(log, 2, 3, known=head if known else None)
    assert caught.value.reason == "log_unwritable"
    assert file(log).read_bytes() == before
    after = add(log, 2, 3, known=head)
    assert log.verify(after) == audit.Checked(3, after, None)


def test_disk_that_takes_half_of_a_line_gets_it_taken_back(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    head = add(log, 1)
    before, real = file(log).read_bytes(), os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) < 400:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(SiteError, match="ENOSPC"):
            add(log, 2, 3, known=head)
    assert file(log).read_bytes() == before


def test_whole_batch_is_synced_once(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    head = add(log, 1)
    disk = Disk(monkeypatch, "fsync", errno.EIO, at=2)
    add(log, *range(2, 102), known=head)
    assert disk.calls == 1


def test_name_of_a_new_file_is_durable_before_its_content(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    head = add(log, 1)
    real, synced = os.fsync, list[tuple[bool, int]]()

    def noted(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), file(log, "2026-12").stat().st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    add(log, 2, known=head, now=DECEMBER)
    assert synced == [(True, 0), (False, file(log, "2026-12").stat().st_size)]


def test_folder_above_that_may_not_be_opened_is_no_hindrance(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    real, above = os.open, log._folder.parent.parent

    def guarded(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == above:
            raise PermissionError(errno.EACCES, "not yours")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    assert add(log, 1).n == 1


def test_link_in_place_of_a_file_is_not_followed(log: AuditLog, tmp_path: Path) -> None:
    add(log, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    file(log).unlink()
    file(log).symlink_to(elsewhere)
    with pytest.raises(SiteError, match="ELOOP"):
        add(log, 2)
    assert elsewhere.read_bytes() == b""


# --- several who act


def _append_many(folder: Path, first: int) -> None:
    log = AuditLog(folder)
    for number in range(first, first + 40):
        add(log, number)


def test_processes_that_append_at_once_make_one_chain(log: AuditLog) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(log._folder, first)) for first in (1, 101, 201)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert log.verify().lines == 120
    assert len(set(seqs(log))) == 120


def test_reader_sees_the_log_as_it_is_when_it_begins(log: AuditLog) -> None:
    head = add(log, 1, 2)
    reading = log.facts()
    assert next(reading)["seq"] == 1
    add(log, 3, known=head)
    add(log, 4, now=DECEMBER)
    assert [facts["seq"] for facts in reading] == [2]


@pytest.mark.parametrize("action", [lambda log: add(log, 2), lambda log: log.verify()])
def test_process_that_sleeps_with_the_lock_does_not_stop_the_others(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch, action: Callable[[AuditLog], object]
) -> None:
    add(log, 1)
    waits, mine, sleep = [], threading.get_ident(), time.sleep

    def slept(seconds: float) -> None:
        if threading.get_ident() == mine:
            waits.append(seconds)
        else:  # what another test left behind
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", slept)
    with (log._folder / ".lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SiteError, match="EBUSY"):
            action(log)
    assert 4 <= sum(waits) <= 6
    action(log)


# --- who acts


@pytest.mark.parametrize(
    ("login", "named"),
    [("1000", "uid-{} login-1000"), (str(2**32 - 1), "uid-{}"), ("", "uid-{}"), (None, "uid-{}")],
)
def test_actor_is_the_user_and_who_logged_in(monkeypatch: pytest.MonkeyPatch, login: str | None, named: str) -> None:
    def read(path: Path, *_: Sequence[str]) -> str:
        assert str(path) == "/proc/self/loginuid"
        if login is None:
            raise FileNotFoundError
        return login

    monkeypatch.setattr(Path, "read_text", read)
    assert actor() == named.format(os.getuid())
