"""The archive on disk: published once, never overwritten, deleted by order only; its sidecars can rebuild the index.

Nothing below the root is reached through a symlink: folders are opened one by one with O_NOFOLLOW, files relative to
them. No call touches a folder whose marker is absent or belongs to another archive.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import io
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from syncd.errors import ConfigError, ItemError, SiteError, SyncdError, UnreadableError
from syncd.folders import (
    READ,
    REFUSED,
    Entry,
    Folders,
    one_file,
    open_regular,
    put,
    read_json,
    remove,
    settle_file,
    side_by_side,
    size_of,
    translated,
    write,
)
from syncd.layout import PATIENT_KEYS, patient_in, patients_in, read_version, scan, tombstone_in, walk_patient
from syncd.model import TOMBSTONE, Item, Patient, Tombstone, Version
from syncd.sidecar import SCHEMA_VERSION, decode, encode, iso, path_is_ours, sidecar_content, tombstone_content

MARKER: Final = ".syncd-archive"
ROOT_NAMES: Final = frozenset({MARKER, "incoming", "published", "patients", "damaged", "lost+found"})
NOT_IN_GROUP: Final = (
    "[archive] group: syncd's user is not in it, or may not be inside the service: `usermod -aG GROUP USER`, and for"
    " the service the drop-in that the README names"
)
_SIDECAR: Final = re.compile(r"(?:\.([1-9][0-9]{0,17}))?\.json")  # after the name of its version
_MEDIA: Final = re.compile(r"([1-9][0-9]{0,17})-[0-9a-f]{12}\.(?!json$)[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Publication:
    """One sidecar to publish, with the pulled file in ARCHIVE/incoming, or None when its bytes are archived already."""

    version: Version
    source: Path | None


@dataclass(slots=True)
class _Draft:
    """A publication on its way. Names in incoming of what is new here: the pulled file, the sidecar and its content."""

    version: Version
    source: Path | None
    pulled: str = ""
    sidecar: str = ""
    content: bytes = b""


def _prepare(folders: Folders, draft: _Draft) -> None:
    """Look at what is there, make the folders that are lacking, say what the sidecar will hold."""
    version, source = draft.version, draft.source
    if not path_is_ours(version):
        raise ItemError("io_error", "not a path of the archive")
    if source is None:  # its one file is written by the commit
        return
    folder = folders.get(version.folder, make=True)
    names = {} if version.folder in folders.made else folders.entries(version.folder)
    files = {name: int(found[1]) for name in names if (found := _MEDIA.fullmatch(name))}
    rivals = {name for name, number in files.items() if number == version.version}
    media, sidecar = Path(version.path).name, Path(version.sidecar_path).name
    if rivals == {media}:
        with one_file(), open_regular(media, folder) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != version.sha256:
                raise ItemError("io_error", "other bytes have this version's name")
    elif rivals:
        raise ItemError("io_error", "another file has this version's number")
    else:
        draft.pulled = source.name
    if not files:
        folders.settle(version.folder)
    folders.touched.add(version.folder)
    if not rivals or sidecar not in names:
        draft.sidecar, draft.content = f"{source.name}.json", encode(sidecar_content(version))
        folders.undo.callback(remove, draft.sidecar, folders.get("incoming", make=True))  # the batch may come again


def _sync(folders: Folders, draft: _Draft) -> None:
    """Make durable what was pulled, and the sidecar, which is written now; for many at once."""
    if draft.pulled:
        settle_file(folders, draft.pulled, draft.version.bytes)
    if draft.sidecar:
        write(folders, draft.content, draft.sidecar)


def _place(folders: Folders, draft: _Draft) -> None:
    """Put the sidecar, now durable, beside where the file will be."""
    if draft.sidecar:
        there, name = folders.get(draft.version.folder), Path(draft.version.sidecar_path).name
        with one_file(REFUSED):
            os.replace(draft.sidecar, name, src_dir_fd=folders.get("incoming"), dst_dir_fd=there)


def _commit(folders: Folders, draft: _Draft) -> None:
    """The link that makes the version exist; for one without a source, its sidecar."""
    version, folder = draft.version, folders.get(draft.version.folder)
    folders.touched.add(version.folder)
    if draft.source is None:
        _commit_revision(folders, version)
    elif draft.pulled:
        name = Path(version.path).name
        with one_file({errno.EACCES}):  # EPERM of a link: a file system that has none
            os.link(draft.pulled, name, src_dir_fd=folders.get("incoming"), dst_dir_fd=folder, follow_symlinks=False)
        folders.undo.callback(remove, name, folder)


def _commit_revision(folders: Folders, version: Version) -> None:
    """One more sidecar of a file that is archived."""
    folder, name = folders.get(version.folder), Path(version.sidecar_path).name
    with one_file():
        if size_of(Path(version.path).name, folder) != version.bytes:
            raise ItemError("io_error", "the file of this sidecar is not archived")
        there = size_of(name, folder)
    if there is not None:
        known = read_version(version.sidecar_path, folder)
        if known is None or known.revision != version.revision:
            raise ItemError("io_error", "another sidecar has this number")
        return
    with one_file(REFUSED):
        put(folders, sidecar_content(version), version.folder, name)
    folders.undo.callback(remove, name, folder)


class Archive:
    """One practice's archive. `reserve`: bytes to leave free; `group`: its members may read what is published.
    `owner`: the machine that may write; empty: whoever comes, for readers.

    Every method may raise SiteError archive_missing, archive_read_only, archive_full or disk_error.
    """

    def __init__(self, root: Path, reserve: int, group: str | None = None, owner: str = "") -> None:
        self.root, self._owner = root, owner
        self._reserve = reserve
        self._expected: str | None = None
        self.publishing = threading.Lock()  # held by whoever numbers, publishes and records
        try:
            self._gid = grp.getgrnam(group).gr_gid if group else None
        except KeyError as error:
            raise ConfigError(("[archive] group: this machine has no such group",)) from error
        if owner and self._gid not in (None, os.getegid(), *os.getgroups()) and os.geteuid() != 0:
            raise ConfigError((NOT_IN_GROUP,))

    @contextlib.contextmanager
    def _opened(self, marked: bool = True) -> Iterator[Folders]:
        """The root, after a look at its marker; OSErrors inside become ours."""
        with translated("archive_missing"):
            root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        folders = Folders(root, self._gid)
        try:
            with translated():
                folders.marker = read_json(MARKER, root, lenient=())
                found = folders.marker.get("id")
                if marked and (not isinstance(found, str) or self._expected not in (None, found)):
                    raise SiteError("archive_missing")
                if marked and self._owner and folders.marker.get("owner", self._owner) != self._owner:
                    raise SiteError("archive_taken")
                yield folders
        finally:
            folders.close()

    def create(self, archive_id: str) -> None:
        """Make the marker in an existing, empty folder (but for `lost+found`). Else SiteError archive_missing."""
        with self._opened(marked=False) as folders:
            if folders.entries("").keys() - {"lost+found", "incoming"}:
                raise SiteError("archive_missing")
            content = {"schema_version": SCHEMA_VERSION, "id": archive_id, "created": iso(time.time())}
            content |= {"owner": self._owner} if self._owner else {}
            put(folders, content, "", MARKER)
            folders.sync()

    def take_over(self, owner: str) -> None:
        """From now on only the machine `owner` (service.owner_id) writes here: any other finds archive_taken."""
        with self._opened() as folders:
            if owner and folders.marker.get("owner") != owner:
                put(folders, folders.marker | {"owner": owner}, "", MARKER)
                folders.sync()

    def marker_id(self) -> str | None:
        """The id in the marker; None where there is no folder, no marker, or none of ours."""
        try:
            with self._opened() as folders:
                return str(folders.marker["id"])
        except SiteError:
            return None

    def check(self, expected_id: str) -> None:
        """Raise unless this is that archive, writable, its reserve free. From then on no other one is accepted here."""
        self._expected = expected_id
        with self._opened() as folders:
            state = os.statvfs(folders.get(""))
            folders.share_root()
        if state.f_flag & os.ST_RDONLY or not os.access(self.root, os.W_OK | os.X_OK, effective_ids=True):
            raise SiteError("archive_read_only")
        if state.f_bavail * state.f_frsize < self._reserve or (state.f_files and not state.f_favail):
            raise SiteError("archive_full")
        self.take_over(self._owner)  # one that was made before there were owners

    def free_bytes(self) -> int:
        """What the file system leaves to this user."""
        with self._opened(marked=False) as folders:
            state = os.statvfs(folders.get(""))
            return state.f_bavail * state.f_frsize

    def new_incoming(self) -> Path:
        """A path in ARCHIVE/incoming that does not exist yet, for one pull."""
        with self._opened() as folders:
            folders.get("incoming", make=True)
        return self.root / "incoming" / secrets.token_hex(16)

    def discard(self, path: Path) -> None:
        """Remove one file of ARCHIVE/incoming, if it is there; what a disk keeps is removed at the next start."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def clear_incoming(self) -> int:
        """Remove what an earlier process left in flight; the number of files. Only the lock's holder may ask."""
        with self._opened() as folders:
            incoming = folders.get("incoming", make=True)
            names = [name for name, is_folder in folders.entries("incoming").items() if not is_folder]
            for name in names:
                os.unlink(name, dir_fd=incoming)
            return len(names)

    def publish(self, batch: Sequence[Publication]) -> list[SyncdError | None]:
        """Archive a batch: sidecars durable, then files linked without overwriting, then durable. One outcome each.

        None: archived, also when an equal file was there already (a crash came between; its first sidecar stays).
        The source is gone after an outcome. A SiteError is for the whole batch: no new file of it stays, sources do
        (but for one that could not be made durable), and the same batch may be published again.
        """
        outcomes: list[SyncdError | None] = [None] * len(batch)
        drafts = [_Draft(each.version, each.source) for each in batch]

        def each(step: Callable[[Folders, _Draft], None], number: int) -> None:
            if outcomes[number] is None:
                try:
                    with translated():
                        step(folders, drafts[number])
                except ItemError as error:
                    outcomes[number] = error
                    if drafts[number].sidecar:
                        remove(drafts[number].sidecar, folders.get("incoming"))

        with self._opened() as folders, folders.undo:
            for step in (_prepare, _sync, _place, _commit):
                if step is _sync:
                    side_by_side(partial(each, step), range(len(batch)))
                    continue
                for number in range(len(batch)):
                    each(step, number)
                if step is not _prepare:
                    folders.sync()
            folders.undo.pop_all()
            for publication in batch:
                if publication.source:
                    remove(publication.source.name, folders.get("incoming", make=True))
        return outcomes

    def read_item(self, item: Item) -> list[Version]:
        """Every sound sidecar whose file is there with its size, by (version, sidecar)."""
        with self._opened() as folders:
            found = scan(folders, f"patients/{item.pat_num}/{item.id}")
        return [each for each in found if isinstance(each, Version)]

    def highest_version(self, item: Item) -> int:
        """The highest number of a file of the item, set aside or not, whatever its sidecar says; 0 for none."""
        with self._opened() as folders:
            tops = (f"{top}/{item.pat_num}/{item.id}" for top in ("patients", "damaged"))
            names = [name for top in tops for name in folders.entries(top)]
        return max((int(found[1]) for name in names if (found := _MEDIA.fullmatch(name))), default=0)

    def highest_sidecar(self, version: Version) -> int:
        """The highest number of a sidecar of this version, whatever it says; 0 for none."""
        stem = Path(version.path).stem
        with self._opened() as folders:
            found = [_SIDECAR.fullmatch(name.removeprefix(stem)) for name in folders.entries(version.folder)]
        return max((int(each[1] or 1) for each in found if each), default=0)

    def open_file(self, path: str) -> io.BufferedReader:
        """A file of the archive, for reading. Raises ItemError io_error when it is not there or no regular file,
        UnreadableError when the disk does not give it.
        """
        folder, _, name = path.rpartition("/")
        with self._opened() as folders:
            there = folders.get(folder)
            with one_file():
                return open_regular(name, there)

    def open_media(self, version: Version) -> io.BufferedReader:
        """The archived file, for reading. Raises what `open_file` raises."""
        return self.open_file(version.path)

    def survey(self, relative: str = "") -> dict[str, Entry]:
        """What lies in one folder, sorted by name; nothing where there is none. No symlink is followed.

        Raises ItemError where something else bears its name, UnreadableError where the disk does not give it.
        """
        with self._opened() as folders:
            found = {name: folders.entry(relative, name) for name in folders.entries(relative)}
            return {name: entry for name, entry in found.items() if entry is not None}

    def set_aside(self, path: str) -> str:
        """Move what is no longer what was archived to ARCHIVE/damaged, durably; its new path. Nothing is deleted."""
        (folder, _, name), aside = path.rpartition("/"), f"damaged/{Path(path).parent.relative_to('patients')}"
        with self._opened() as folders:
            source, target = folders.get(folder), folders.get(aside, make=True)
            folders.settle(aside)
            taken = folders.entries(aside)
            free = next(each for each in (name, *(f"{name}.{n}" for n in range(2, 1000))) if each not in taken)
            with one_file():
                os.rename(name, free, src_dir_fd=source, dst_dir_fd=target)
            folders.touched |= {folder, aside}
            folders.sync()
        return f"{aside}/{free}"

    def read_tombstone(self, item: Item) -> Tombstone | None:
        """What says that the item was destroyed; None where it was not."""
        with self._opened() as folders:
            return tombstone_in(folders, f"patients/{item.pat_num}/{item.id}")

    def bury(self, tombstone: Tombstone) -> int:
        """The one deletion: put the tombstone into the item's folder, durably, then remove all else that is there, and
        what was set aside of it. May be called again; what a crash interrupts is seen by the tombstone beside files.

        Folders that somebody made there are not syncd's and stay: how many. Raises ItemError where the disk lets a file
        not go.
        """
        item, foreign = tombstone.item, 0
        place, aside = f"patients/{item.pat_num}/{item.id}", f"damaged/{item.pat_num}/{item.id}"
        with self._opened() as folders, translated():
            if tombstone_in(folders, place) != tombstone:
                folders.get(place, make=True)
                folders.settle(place)
                put(folders, tombstone_content(tombstone), place, TOMBSTONE)
                folders.sync()
            for top in (place, aside):
                entries = folders.entries(top)
                foreign += sum(entries.values())
                for name in [name for name, is_folder in entries.items() if name != TOMBSTONE and not is_folder]:
                    with one_file():
                        os.unlink(name, dir_fd=folders.get(top))
                    folders.touched.add(top)
            folders.sync()
        return foreign

    def withdraw_published(self) -> None:
        """Remove the published copies of the index: they tell of what was destroyed; the next is made in its time."""
        with self._opened() as folders, translated():
            for name, is_folder in folders.entries("published").items():
                if not is_folder:
                    os.unlink(name, dir_fd=folders.get("published"))
                    folders.touched.add("published")
            folders.sync()

    def read_sidecar(self, version: Version) -> Version | None:
        """The first sidecar of a version as it was written, whether or not its file is there; None for no sound one."""
        with contextlib.suppress(ItemError), translated(), one_file(), self.open_file(version.sidecar_path) as file:
            found = decode(file.read())
            return found if found is not None and found.sidecar_path == version.sidecar_path else None
        return None

    def settle_mode(self, path: str) -> None:
        """Give a file or folder the mode of the contract again. Raises ItemError where it is not ours to give."""
        folder, _, name = path.rpartition("/")
        with self._opened() as folders:
            entry, there = folders.entry(folder, name), folders.get(folder)
            mode = 0o700 if entry is not None and entry.kind == "folder" else 0o400
            with one_file():
                if entry is not None and entry.kind in ("file", "folder"):
                    os.chmod(name, mode, dir_fd=there)  # by its name: with that of now it may not let itself be opened
                descriptor = os.open(name, READ, dir_fd=there)
                try:
                    folders.own(descriptor, mode)
                finally:
                    os.close(descriptor)

    def write_sidecar(self, version: Version) -> None:
        """Write a sidecar that is missing, durably. Raises ItemError where something bears its name."""
        name = Path(version.sidecar_path).name
        with self._opened() as folders:
            if size_of(name, folders.get(version.folder)) is not None:
                raise ItemError("io_error", "a sidecar is there already")
            put(folders, sidecar_content(version), version.folder, name)
            folders.sync()

    def intact(self, version: Version) -> bool:
        """Whether the file is there with the bytes that were archived."""
        return self.digest(version.path) == version.sha256

    def digest(self, path: str) -> str | None:
        """The sha256 of a file's bytes, in hex; None where it is not there, or the disk does not give it."""
        with contextlib.suppress(ItemError), translated(), one_file(), self.open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return None

    def seen(self, path: str) -> list[int] | None:
        """Size, time of the last change in ns, and mode of a regular file; None for anything else."""
        folder, _, name = path.rpartition("/")
        with self._opened() as folders, contextlib.suppress(OSError), open_regular(name, folders.get(folder)) as file:
            found = os.fstat(file.fileno())
            return [found.st_size, found.st_mtime_ns, found.st_mode]
        return None

    def put_published(self, draft: Path) -> None:
        """Put a file of ARCHIVE/incoming in the place of ARCHIVE/published/index.db, atomically and durably."""
        with self._opened() as folders:
            target = folders.get("published", make=True)
            folders.settle("published")
            with translated():
                settle_file(folders, draft.name, draft.stat().st_size)
            os.replace(draft.name, "index.db", src_dir_fd=folders.get("incoming"), dst_dir_fd=target)
            folders.touched.add("published")
            folders.sync()

    def patients(self) -> list[int]:
        """Every PatNum that has a folder, rising."""
        with self._opened() as folders:
            return sorted(int(name) for name, is_patient in patients_in(folders).items() if is_patient)

    def walk(self) -> Iterator[Version | Tombstone | str]:
        """Everything, for rebuilding the index: versions in order, tombstones, and paths of all else as str.

        One patient's folder is open at a time.
        """
        with self._opened() as folders:
            yield from sorted(folders.entries("").keys() - ROOT_NAMES)
            yield from (f"patients/{name}" for name, is_patient in patients_in(folders).items() if not is_patient)
        for pat_num in self.patients():
            with self._opened() as folders:
                yield from walk_patient(folders, pat_num)

    def write_patient(self, patient: Patient) -> bool:
        """Put who the patient is beside the documents, atomically; False when that is there already."""
        content: dict[str, object] = {key: getattr(patient, key) for key in PATIENT_KEYS}
        with self._opened() as folders:
            folder = f"patients/{patient.pat_num}"
            if read_json("patient.json", folders.get(folder, make=True)) == content:
                return False
            folders.settle(folder)
            put(folders, content, folder, "patient.json")
            folders.sync()
        return True

    def read_patient(self, pat_num: int) -> Patient | None:
        """Who the patient is, as last written; `stamp` is not kept and is empty. None where no file says it."""
        with self._opened() as folders, contextlib.suppress(UnreadableError):
            return patient_in(folders, pat_num) if folders.entries(f"patients/{pat_num}") else None
        return None

    def mount_images(self, pat_num: int, mount_num: int) -> list[Version]:
        """Every archived version of every image that was ever in this mount."""
        with self._opened() as folders:
            found = [each for each in walk_patient(folders, pat_num) if isinstance(each, Version)]
        return [version for version in found if version.mount_num == mount_num]

    def write_incoming(self, path: Path, content: bytes) -> str:
        """Put bytes that came in an answer into a path of `new_incoming`, durable; their sha256 in hex."""
        with self._opened() as folders:
            write(folders, content, path.name)
        return hashlib.sha256(content).hexdigest()

    def note_seq(self, seq: int) -> None:
        """Keep in the marker, durably, the last sequence number given out: an index that is older will notice."""
        with self._opened() as folders:
            put(folders, folders.marker | {"last_seq": seq}, "", MARKER)
            folders.sync()

    def last_seq(self) -> int:
        """The last sequence number noted; 0 for none."""
        with self._opened() as folders:
            return int(str(folders.marker.get("last_seq", 0)))
