"""The measure of a mirror: an archive and its index against the simulated practice, its history and its own past."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from syncd import checker
from syncd.archive import Archive
from syncd.demo.files import FileSpec
from syncd.demo.practice import Practice
from syncd.index import Index

Key = tuple[int, str, int]  # (pat_num, kind, num)
TO_COME = {"unrecorded", "leftover", "queued"}  # what the next sweep settles


class Expected:
    """What the practice ever held, as digests of bytes or, for sheets, the text inside; and what the archive ever did.

    `note` reads the practice's history since the last time, and its truth now; `note_history` only the former.
    """

    def __init__(self) -> None:
        self.ever: defaultdict[Key, set[str]] = defaultdict(set)
        self.lines: defaultdict[Key, set[bytes]] = defaultdict(set)
        self.kept: dict[str, str] = {}  # path below the archive -> sha256, as first seen
        self._read: dict[Practice, int] = {}
        self._left: dict[int, tuple[float, Key]] = {}  # SheetNum -> when it last left a patient, and whose it was

    def note(self, practice: Practice) -> None:
        self.note_history(practice)
        for key, content in _truth(practice):
            self.ever[key].add(_sha(content))

    def note_history(self, practice: Practice) -> None:
        events = practice.history[self._read.get(practice, 0) :]
        self._read[practice] = len(practice.history)
        for event in events:
            key = (event.pat_num, event.kind, event.num)
            if event.spec is not None:
                self.ever[key].add(_sha(event.spec.render()))
                thumbnail = replace(event.spec, kind="thumbnail", num=event.num, size=0, data=None)
                self.ever[event.pat_num, "thumbnail", event.num].add(_sha(thumbnail.render()))
            elif event.kind == "sheet":
                stamp = event.stamp.replace(" ", "T")
                line = FileSpec(practice.name, *key[:1], "sheet", event.num, stamp, "pdf").line().encode()
                self.lines[key].add(line)
                if event.what == "gone":
                    self._left[event.num] = event.at, key
                elif self._left.get(event.num, (0.0, key))[0] == event.at:  # merged after its list was read: rendered
                    self.lines[self._left[event.num][1]].add(line)  # with the new patient's name, as it is then

    def could_be(self, key: Key, content: bytes) -> bool:
        """Whether these bytes were at some moment that item's."""
        if key[1] == "sheet":
            return any(line in content for line in self.lines[key])
        return _sha(content) in self.ever[key]


@dataclass
class Findings:
    """`wrong`: never allowed. `lacking`: not allowed once the mirror is at rest."""

    wrong: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _truth(practice: Practice) -> Iterator[tuple[Key, bytes]]:
    """Everything but sheets that a perfect mirror holds now."""
    for pat_num, truth in practice.truth().items():
        for num, content in truth.documents.items():
            yield (pat_num, "document", num), content
        for num, content in truth.mounts.items():
            yield (pat_num, "mount", num), content
        for num, (_, content) in truth.mount_images.items():
            yield (pat_num, "mount-image", num), content
        for num in truth.thumbnails:
            yield (pat_num, "thumbnail", num), practice.thumbnail(num)


def compare_archive(
    index: Index, archive: Path, practice: Practice, expected: Expected, kinds: Collection[str]
) -> Findings:
    """What the product's own checker finds, and the archive against the practice, its history and its own past."""
    found, opened = Findings(), Archive(archive, 0)
    if opened.marker_id() is not None:
        for each in checker.check(index, opened, checker.Tally()):
            if each is not None and each.code != "unfinished":
                lines = found.lacking if each.code in TO_COME else found.wrong
                lines.append(f"{each.path}: {each.code}")
    names = sorted(str(path.relative_to(archive)) for path in (archive / "patients").glob("*/*-*/*"))
    archived = {name.partition(".")[0] for name in names if not name.endswith(".json")}
    for name in names:
        if name.partition(".")[0] in archived:  # else a crash came before its file was linked: it will be replaced
            _check_file(name, (archive / name).read_bytes(), expected, found)
    for name in expected.kept:
        aside = archive / name.replace("patients", "damaged", 1)
        found.wrong += [f"{name}: gone"] if not (archive / name).exists() and not aside.exists() else []
    _compare_truth(index, archive, practice, kinds, found)
    return found


def _check_file(name: str, content: bytes, expected: Expected, found: Findings) -> None:
    """Its bytes never change, and they were its item's at some moment."""
    if expected.kept.setdefault(name, _sha(content)) != _sha(content):
        found.wrong.append(f"{name}: its bytes changed")
    if name.endswith(".json"):
        return
    _, pat_num, item, _ = name.split("/")
    kind, _, num = item.rpartition("-")
    if not expected.could_be((int(pat_num), kind, int(num)), content):
        found.wrong.append(f"{name}: {kind} {num} of patient {pat_num} never was that")


def _compare_truth(index: Index, archive: Path, practice: Practice, kinds: Collection[str], found: Findings) -> None:
    """What the practice holds now against the current versions, and what is current against the practice."""
    sql = "SELECT i.*, path FROM item i LEFT JOIN version v ON v.seq = i.current_seq"
    rows = {(row["pat_num"], row["kind"], row["num"]): row for row in index.rows(sql)}
    there: set[Key] = set()
    wanted: list[tuple[Key, Callable[[bytes], bool]]] = []
    for key, content in _truth(practice):
        wanted.append((key, content.__eq__))
    for pat_num, truth in practice.truth().items():
        there |= {(pat_num, "document", num) for num in truth.pending}
        for num, sheet in truth.sheets.items():
            wanted.append(((pat_num, "sheet", num), lambda content, line=sheet.identity: line in content))  # type: ignore[misc]
    for key, is_right in wanted:
        if key[1] not in kinds:
            continue
        there.add(key)
        row = rows.get(key)
        if row is None or row["path"] is None:
            found.lacking.append(f"{key}: never archived")
        elif not is_right((archive / row["path"]).read_bytes()):
            found.lacking.append(f"{key}: {row['path']} is not the newest")
        elif row["vanished_at"] is not None:
            found.wrong.append(f"{key}: is there, and is marked vanished")
    away = {row["pat_num"] for row in index.rows("SELECT pat_num FROM patient WHERE left_at IS NOT NULL")}
    for key, row in rows.items():
        mount = rows.get((key[0], "mount", row["mount_num"]), row)  # a mount goes with its images
        gone = row["vanished_at"] or row["missing_since_at"] or mount["missing_since_at"]
        if not gone and key not in there and key[0] not in away and key[1] != "thumbnail" and key[1] in kinds:
            found.lacking.append(f"{key}: is not there any more, and that was not noticed")
