"""Planted bugs: one broken rule of the protocol each, and the test that must notice.

    python -m tests.faults.mutants            # all of them, a table; exit 1 if one was not caught
    python -m tests.faults.mutants fsync      # those whose name has that word

Each is a change of a few words, made in a copy of the tree. A test that fails there, and passes in the tree itself,
has caught it. A mutant whose text is not found exactly once is an error: it has to follow the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import apscheduler.schedulers.background  # noqa: F401 - this and the next ones: imported once, for all forks
import hypothesis  # noqa: F401
import paramiko  # noqa: F401
import PIL.Image  # noqa: F401
import pydantic  # noqa: F401
import pytest
import requests  # noqa: F401
import rich.progress  # noqa: F401
import sqlite_utils  # noqa: F401
import structlog  # noqa: F401
import werkzeug.serving  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
RAM = Path("/dev/shm")
SAID = "said.txt"
FEWEST = 30  # planted bugs in all
FAILED = 1  # pytest's exit code for "a test failed"; everything else is no verdict
PASSED = 0
AT_ONCE = 1 + (os.cpu_count() or 1)  # a few of them wait


@dataclass(frozen=True)
class Mutant:
    """`old` (found exactly once in `path`) becomes `new`; `tests` as pytest takes them: a file, and words for -k."""

    name: str
    path: str
    old: str
    new: str
    test_file: str
    words: str


MUTANTS = (
    # --- the archive: durable, in order, never over anything
    Mutant(
        "no fsync of the file",
        "syncd/folders.py",
        "            os.fsync(descriptor)\n        except",
        "            pass\n        except",
        "tests/test_archive.py",
        "durable_before_the_link",
    ),
    Mutant(
        "no fsync of the sidecar",
        "syncd/folders.py",
        "            os.fsync(descriptor)  # the mode, too, is durable only now\n",
        "",
        "tests/test_archive.py",
        "durable_before_the_link",
    ),
    Mutant(
        "no fsync of the folders",
        "syncd/folders.py",
        "side_by_side(lambda relative: os.fsync(self._open[relative]), sorted(self.touched, reverse=True))",
        "pass",
        "tests/test_archive.py",
        "durable_before_the_link",
    ),
    Mutant(
        "a failed fsync is tried again",
        "syncd/folders.py",
        "        except OSError:\n            remove(name, incoming)\n            raise\n    finally:",
        "        except OSError:\n            os.fsync(descriptor)\n    finally:",
        "tests/test_archive.py",
        "fsync_failed",
    ),
    Mutant(
        "file before sidecar",
        "syncd/archive.py",
        "for step in (_prepare, _sync, _place, _commit):",
        "for step in (_prepare, _commit, _sync, _place):",
        "tests/test_archive.py",
        "durable_before_the_link or read_back_whole",
    ),
    Mutant(
        "in place",
        "syncd/archive.py",
        'os.link(draft.pulled, name, src_dir_fd=folders.get("incoming"), dst_dir_fd=folder, follow_symlinks=False)',
        'os.replace(draft.pulled, name, src_dir_fd=folders.get("incoming"), dst_dir_fd=folder)',
        "tests/test_archive.py",
        "at_the_last_moment",
    ),
    Mutant(
        "another file's number is taken",
        "syncd/archive.py",
        '        raise ItemError("io_error", "another file has this version\'s number")',
        "        pass",
        "tests/test_archive.py",
        "nothing_is_ever_overwritten",
    ),
    Mutant(
        "the marker is not looked at",
        "syncd/archive.py",
        "if marked and (not isinstance(found, str) or self._expected not in (None, found)):",
        "if False:",
        "tests/test_archive.py",
        "right_marker",
    ),
    Mutant(
        "symlinks are followed",
        "syncd/folders.py",
        "_FOLDER: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY",
        "_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY",
        "tests/test_archive.py",
        "symlink",
    ),
    Mutant(
        "the reserve is not kept",
        "syncd/archive.py",
        "if state.f_bavail * state.f_frsize < self._reserve or (state.f_files and not state.f_favail):",
        "if state.f_files and not state.f_favail:",
        "tests/test_archive.py",
        "too_little_space",
    ),
    # --- publishing: numbers, copies, the order of file and row
    Mutant(
        "a version's number is used again",
        "syncd/publishing.py",
        "self._version(arrival, highest + 1, 1,",
        "self._version(arrival, max(1, highest), 1,",
        "tests/test_story_week.py",
        "new_bytes_become_a_second_version",
    ),
    Mutant(
        "a rotted file counts as a copy",
        "syncd/publishing.py",
        "and self._doors.archive.intact(newest):",
        ":",
        "tests/test_story_faults.py",
        "retry_of_a_damaged_sheet",
    ),
    Mutant(
        "an old index is believed",
        "syncd/scrub.py",
        '    if doors.archive.last_seq() <= int(doors.index.meta("last_seq") or 0):\n',
        "    if True:\n",
        "tests/test_story_crashes.py",
        "backup_of_any_age",
    ),
    Mutant(
        "the archive is not told the numbers",
        "syncd/publishing.py",
        "        archive.note_seq(numbers[-1])\n",
        "",
        "tests/test_scrub.py",
        "no_version_is_recorded_before",
    ),
    # --- the drop: whole, regular, unchanged, of the right site
    Mutant(
        "no read past the end",
        "syncd/transfer.py",
        "return bool(self.outcome) or self._asked > self.seen.size",
        "return bool(self.outcome) or self._asked >= self.seen.size",
        "tests/test_drop.py",
        "plays_a_trick",
    ),
    Mutant(
        "no second look",
        "syncd/transfer.py",
        '        if seen_in(reply) != self.seen:\n            self.refuse("changed_while_read")\n',
        "        pass\n",
        "tests/test_drop.py",
        "plays_a_trick",
    ),
    Mutant(
        "no size check",
        "syncd/transfer.py",
        '            if not (at_end and says_end):\n                self.refuse("changed_while_read")',
        "            pass",
        "tests/test_drop.py",
        "plays_a_trick",
    ),
    Mutant(
        "anything but a file is opened",
        "syncd/transfer.py",
        '        elif not self.seen.regular:\n            self.refuse("not_a_file")\n',
        "",
        "tests/test_drop.py",
        "never_opened or each_refusal",
    ),
    Mutant(
        "any size is read",
        "syncd/transfer.py",
        "elif not 0 < self.seen.size <= self.job.cap:",
        "elif not 0 < self.seen.size:",
        "tests/test_drop.py",
        "each_refusal or never_opened",
    ),
    Mutant(
        "the host key is not compared",
        "syncd/drop.py",
        "if transport.get_remote_server_key() not in self._pins:",
        "if False:",
        "tests/test_drop.py",
        "other_host_key",
    ),
    # --- the API: proven answers only
    Mutant(
        "no PatNum check",
        "syncd/api.py",
        '    if _key(row, "PatNum") != pat_num:\n        raise ListingError("a row for another patient")\n',
        "",
        "tests/test_api.py",
        "not_proven",
    ),
    Mutant(
        "200 proves a placement",
        "syncd/api.py",
        "if _accepted(answer, placing=True).status != HTTPStatus.CREATED:",
        "if _accepted(answer, placing=True).status not in (200, 201):",
        "tests/test_api.py",
        "only_a_201",
    ),
    Mutant(
        "a cut placement was never sent",
        "syncd/api.py",
        "        if placing and not unsent:\n",
        "        if False:\n",
        "tests/test_story_faults.py",
        "one_fault_costs and cut",
    ),
    Mutant(
        "redirects are followed",
        "syncd/api.py",
        "self._adapter.send(asked,",
        "requests.Session().send(asked,",
        "tests/test_api.py",
        "redirect",
    ),
    Mutant(
        "a body has no end",
        "syncd/api.py",
        "                    if len(content) > self._cap:\n                        break\n",
        "",
        "tests/test_api.py",
        "without_an_end",
    ),
    Mutant(
        "any body is parsed",
        "syncd/api.py",
        "        if len(content) > self._cap:\n            too_large",
        "        if False:\n            too_large",
        "tests/test_api.py",
        "over_the_cap",
    ),
    Mutant(
        "another location is believed",
        "syncd/api.py",
        '            raise ItemError("wrong_location")',
        "            pass",
        "tests/test_api.py",
        "location_of_another_name",
    ),
    # --- listings: complete, or nothing
    Mutant(
        "trust a page",
        "syncd/listing.py",
        "if before and (not page or not same_row(before[-1], page[0])):",
        "if before and not page:",
        "tests/test_story_listing.py",
        "shift_between or edited_between",
    ),
    Mutant(
        "a row may come twice",
        "syncd/listing.py",
        "    if len({row.item for row in rows}) != len(rows):",
        "    if False:",
        "tests/test_story_protocol.py",
        "names_a_row_twice",
    ),
    Mutant(
        "a hundred rows are the end",
        "syncd/diff.py",
        "return rows < limit and rows != VENDOR_CAP",
        "return rows <= limit",
        "tests/test_story_listing.py",
        "list_of_any_length",
    ),
    Mutant(
        "vanish on the first lack",
        "syncd/diff.py",
        "    return now - known.missing_since_at >= vanish_after",
        "    return True",
        "tests/test_story_week.py",
        "deleted_document_vanishes_after_a_day",
    ),
    Mutant(
        "vanish on an empty list",
        "syncd/guards.py",
        "return missing >= PATIENT_LEAST and missing * 2 > items",
        "return False",
        "tests/test_story_guards.py",
        "suddenly_empty",
    ),
    Mutant(
        "a whole practice may go",
        "syncd/guards.py",
        "return missing_in_a_day >= PRACTICE_LEAST and missing_in_a_day > PRACTICE_SHARE * items",
        "return False",
        "tests/test_story_guards.py",
        "fifty_disappearances",
    ),
    Mutant(
        "a roster cut short is believed",
        "syncd/listing.py",
        'if fresh and index.meta("roster_rows") is not None:',
        "if False:",
        "tests/test_story_guards.py",
        "suddenly_lacks_nearly_everybody",
    ),
    Mutant(
        "a hold is forgotten",
        "syncd/diff.py",
        "if known.held_by is not None or known.missing_since_at is None:",
        "if known.missing_since_at is None:",
        "tests/test_story_guards.py",
        "rejected_disappearances_stay",
    ),
    Mutant(
        "any database is ours",
        "syncd/guards.py",
        '        return "other_database"',
        '        return "same"',
        "tests/test_story_guards.py",
        "other_database_stops",
    ),
    Mutant(
        "row before file",
        "syncd/diff.py",
        "ROW_BEFORE_FILE = 3.0",
        "ROW_BEFORE_FILE = 0.0",
        "tests/test_story_week.py",
        "younger_than_three_seconds",
    ),
    Mutant(
        "no second look at a young stamp",
        "syncd/diff.py",
        "YOUNG_STAMP = 600.0",
        "YOUNG_STAMP = 0.0",
        "tests/test_story_week.py",
        "second_edit_within",
    ),
    # --- placing: journalled first, under a name of its own, from a fresh listing
    Mutant(
        "a staging name is used again",
        "syncd/placing.py",
        "secrets.token_hex(16)",
        '"0" * 32',
        "tests/test_story_protocol.py",
        "share_a_name",
    ),
    Mutant(
        "requests in flight are forgotten at a restart",
        "syncd/pulling.py",
        '"unanswered", now, why=why, asked_at=now)\n        self._publisher',
        '"unanswered", now)\n            self._doors.index.forget_attempt(attempt.id)\n        self._publisher',
        "tests/test_story_crashes.py",
        "costs_at_most_one_placement",
    ),
    Mutant(
        "an unanswered file is used at once",
        "syncd/pulling.py",
        "        if now < judged_at:",
        "        if False:",
        "tests/test_story_protocol.py",
        "five_minutes",
    ),
    Mutant(
        "an unanswered file needs no end",
        "syncd/naming.py",
        "    if not answered and not properly_ended(head, tail):",
        "    if False:",
        "tests/test_naming.py",
        "answered",
    ),
    Mutant(
        "an unanswered file may change",
        "syncd/pulling.py",
        "if seen is not None and attempt.seen == (seen.size, seen.mtime):",
        "if seen is not None:",
        "tests/test_story_protocol.py",
        "changed_between_two_looks",
    ),
    Mutant(
        "late writes stay on the drop",
        "syncd/cleaning.py",
        "LATE_LOOKS = (600.0, 3600.0, DAY)",
        "LATE_LOOKS: tuple[float, ...] = ()",
        "tests/test_story_faults.py",
        "emptied_again",
    ),
    Mutant(
        "the revision at the end of a pull",
        "syncd/pulling.py",
        "revision=named_revision or attempt.revision,",
        'revision=named_revision or str(self._doors.index.item_rows(target.item)[0]["revision"]),',
        "tests/test_story_protocol.py",
        "seen_before_placing",
    ),
    Mutant(
        "placed from an old listing",
        "syncd/placing.py",
        "return 0 <= now - listed_at < FRESH",
        "return True",
        "tests/test_story_protocol.py",
        "older_than_an_hour",
    ),
    Mutant(
        "an older revision fulfils the newer duty",
        "syncd/index.py",
        "(*key, revision or None)",
        "(*key, None)",
        "tests/test_index.py",
        "newer_revision_stays_owed",
    ),
    Mutant(
        "no owner check",
        "syncd/placing.py",
        "if owner is not None and owner.pat_num == self._duty.pat_num:",
        "if owner is not None:",
        "tests/test_catalogue_meaning.py",
        "two_mounts_that_are_swapped",
    ),
    Mutant(
        "one answer makes an archived image vanish",
        "syncd/placing.py",
        "if known is not None and known.archived_revision is None and not",
        "if known is not None and not",
        "tests/test_story_protocol.py",
        "one_answer_that_denies_it",
    ),
    Mutant(
        "a duty outlives its revision",
        "syncd/index.py",
        "for sql in schema.OTHER_REVISION:",
        "for sql in ():",
        "tests/test_index.py",
        "what_another_revision_made_necessary",
    ),
    Mutant(
        "another database hides the disk",
        "syncd/pulling.py",
        "if not archive_waits and self._archive_unseen(now):",
        "if False:",
        "tests/test_story_guards.py",
        "trouble_begins_and_ends_while_another_database",
    ),
    Mutant(
        "keep the connection",
        "syncd/api.py",
        "            self._wire.close()  # nothing is kept, also where the office does not say that it will close\n",
        "",
        "tests/test_catalogue_api.py",
        "connection_of_its_own",
    ),
    # --- the index and the machine
    Mutant(
        "commits are not durable",
        "syncd/index.py",
        "PRAGMA synchronous=FULL",
        "PRAGMA synchronous=NORMAL",
        "tests/test_index.py",
        "every_connection_is_durable",
    ),
    Mutant(
        "rows are not compared with their checksum",
        "syncd/catalog.py",
        'if row_checksum(version) != row["checksum"] or version.path != row["path"]:',
        "if False:",
        "tests/test_index.py",
        "flipped_column",
    ),
    Mutant(
        "an older version becomes the current one",
        "syncd/schema.py",
        ' AND coalesce(current_seq, 0) <= ?"',
        ' AND ? > 0"',
        "tests/test_index.py",
        "never_moves_the_current_one_back",
    ),
    Mutant(
        "two processes at once",
        "syncd/service.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB)\n            except BlockingIOError:\n                time.sleep",
        "fcntl.LOCK_SH | fcntl.LOCK_NB)\n            except BlockingIOError:\n                time.sleep",
        "tests/test_service.py",
        "second_process_is_refused",
    ),
    Mutant(
        "the pace is forgotten",
        "syncd/service.py",
        "            _write_pace(fd, pace)\n            undo.pop_all()",
        "            undo.pop_all()",
        "tests/test_service.py",
        "on_file_before_the_request",
    ),
    Mutant(
        "Retry-After is not obeyed",
        "syncd/pacing.py",
        "wait = max(wait, min(retry_after or 0.0, LONGEST_PAUSE))",
        "wait = max(wait, 0.0)",
        "tests/test_pacing.py",
        "retry_after_is_obeyed",
    ),
)


def _copied(tree: Path) -> None:
    for name in ("syncd", "tests", "systemd", "config.toml", "README.md", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)


def _start(tree: Path, tests: Iterable[str], words: str = "") -> int:
    """Fork a process for pytest in that tree, where what others wrote is imported already; its pid."""
    if pid := os.fork():
        return pid
    output = os.open(tree / SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)  # of the processes that tests start
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "syncd")]:
        del sys.modules[name]
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", f"--rootdir={tree}")
    os._exit(pytest.main([*options, *tests, *(["-k", words] if words else [])]))


def _seen(tree: Path) -> str:
    """The first test that failed, or the last line."""
    lines = (tree / SAID).read_text("utf-8", "replace").splitlines()
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines if line.startswith("FAILED")]
    return (failed or lines or ["pytest said nothing"])[0 if failed else -1]


def _planted(mutant: Mutant, tree: Path) -> str:
    """A copy of the tree with the bug in it; what is wrong, where that cannot be."""
    _copied(tree)
    target = tree / mutant.path
    text = target.read_text("utf-8")
    if text.count(mutant.old) != 1:
        return f"its text is {text.count(mutant.old)} times in {mutant.path}"
    target.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    return ""


def results(chosen: Sequence[Mutant], folder: Path) -> dict[str, tuple[bool, str]]:
    """By name: whether its test fails with the bug in place, and which did."""
    found: dict[str, tuple[bool, str]] = {}
    running: dict[int, tuple[str, Path]] = {}
    waiting = list(enumerate(chosen))
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, mutant = waiting.pop(0)
            tree = folder / str(number)
            if wrong := _planted(mutant, tree):
                found[mutant.name] = False, wrong
            else:
                running[_start(tree, [mutant.test_file], mutant.words)] = mutant.name, tree
        if running:
            pid, status = os.wait()
            name, tree = running.pop(pid)
            found[name] = os.waitstatus_to_exitcode(status) == FAILED, _seen(tree)
            shutil.rmtree(tree)
    return found


def unsound(tests: Iterable[str], folder: Path) -> list[str]:
    """Of these tests the first ones that fail without any bug."""
    there = sorted(set(tests))
    running: dict[int, Path] = {}
    for number, some in enumerate(there[core::AT_ONCE] for core in range(min(AT_ONCE, len(there)))):
        _copied(tree := folder / f"sound-{number}")
        running[_start(tree, some)] = tree
    ended = (os.wait() for _ in tuple(running))
    return [_seen(running[pid]) for pid, status in ended if os.waitstatus_to_exitcode(status) != PASSED]


def main() -> int:
    """Run those whose name holds the word given, some at once; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="")
    word = parser.parse_args().word
    chosen = [mutant for mutant in MUTANTS if word in mutant.name]
    with tempfile.TemporaryDirectory(dir=RAM if RAM.is_dir() else None, prefix="mutants-") as folder:
        found = results(chosen, Path(folder))
        wrong = unsound((test for caught, test in found.values() if caught), Path(folder))
    for mutant in chosen:
        caught, seen = found[mutant.name]
        sys.stdout.write(f"{'caught' if caught else 'MISSED':<8}{mutant.name:<48}{seen}\n")
    if wrong:
        sys.stdout.write(f"no verdict: without any bug fails already: {', '.join(wrong)}\n")
        return 2
    number = sum(caught for caught, _ in found.values())
    sys.stdout.write(f"{number} of {len(chosen)} planted bugs caught\n")
    return 0 if number == len(chosen) and (word or number >= FEWEST) else 1


if __name__ == "__main__":
    sys.exit(main())
