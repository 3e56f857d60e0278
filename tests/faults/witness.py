"""Who watches a mirror from outside its process: what was archived and recorded once has to be there ever after."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from syncd.demo.practice import Practice
from syncd.schema import Row
from tests.truth import Expected
from tests.world import World

Stat = tuple[int, int, int, int]  # inode, bytes, mtime in ns, mode
RECORDED = "seq, pat_num, kind, num, version, sidecar, revision, sha256, bytes, path"


class Witness(Expected):
    """Remembers every file of the archive and every row that says "archived", from the first time it saw them.

    Files are hashed when they are new; later a look at their attributes is enough, because nothing changes a file
    without changing those. `World.check` hashes all of them again.

    Only one practice's files may come into the archive: what another one behind the key holds is not noted.
    """

    def __init__(self, practice: Practice) -> None:
        super().__init__()
        self._practice = practice
        self.rows: dict[int, Row] = {}  # by seq
        self._files: dict[str, tuple[Stat, str]] = {}  # path below the archive -> attributes and sha256

    def note(self, practice: Practice) -> None:
        """What happened since the last time. Every change of the practice is in its history."""
        if practice is self._practice:
            self.note_history(practice)

    def note_all(self, practice: Practice) -> None:
        """What happened, and what is there now."""
        super().note(practice)

    def look(self, world: World) -> list[str]:
        """What is not as it has to be at any moment: lost, overwritten, misfiled, torn, or recorded too early."""
        names = dict(_walk(world.archive / "patients", "patients"))
        wrong = list(self._look_at_files(names))
        wrong += [f"{name}: gone" for name in self._files if name not in names]
        recorded = {row["seq"]: row for row in world.index.rows(f"SELECT {RECORDED} FROM version")}
        wrong += [f"seq {seq}: not recorded any more" for seq, row in self.rows.items() if recorded.get(seq) != row]
        for seq, row in recorded.items():
            found = self._files.get(row["path"])
            if found is None or (found[0][1], found[1]) != (row["bytes"], row["sha256"]):
                wrong.append(f"seq {seq}: recorded, but not so in the archive")
        self.rows |= recorded
        return wrong

    def _look_at_files(self, names: dict[str, os.DirEntry[str]]) -> Iterator[str]:
        media = {name.rpartition(".")[0] for name in names if not name.endswith(".json")}
        for name, entry in names.items():
            if name.rpartition("/")[2].split(".")[0] == "patient":
                continue
            if name.split(".")[0] not in media:
                continue  # a sidecar before its file: not archived yet
            seen = entry.stat(follow_symlinks=False)
            attributes = (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_mode)
            before = self._files.get(name)
            if before is None:
                yield from self._new(name, Path(entry.path).read_bytes(), attributes)
            elif before[0] != attributes:
                yield f"{name}: not the file that it was"

    def _new(self, name: str, content: bytes, attributes: Stat) -> Iterator[str]:
        digest = hashlib.sha256(content).hexdigest()
        self._files[name] = attributes, digest
        if not stat.S_ISREG(attributes[3]) or stat.S_IMODE(attributes[3]) != 0o400:
            yield f"{name}: mode {attributes[3]:o}"
        if name.endswith(".json"):
            return
        _, pat_num, item, file_name = name.split("/")
        kind, _, num = item.rpartition("-")
        if not file_name.split("-")[1].startswith(digest[:12]):
            yield f"{name}: its name is not its digest"
        if not self.could_be((int(pat_num), kind, int(num)), content):
            yield f"{name}: {kind} {num} of patient {pat_num} never was that"


def _walk(folder: Path, name: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    if not folder.exists():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/{entry.name}")
            else:
                yield f"{name}/{entry.name}", entry
