"""The archive against the index: adopt what the index does not know, rebuild the index, re-hash what is archived.

The archive alone is enough: every sidecar says which listing its file came from. Nothing here sends a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path

from syncd.archive import Archive
from syncd.config import Settings
from syncd.diff import local_time, refetch_at
from syncd.errors import UsageError
from syncd.index import Index
from syncd.model import Item, Version
from syncd.naming import is_image
from syncd.sites import Doors


@dataclass(slots=True)
class Findings:
    """What a walk found. `damaged`: full ids with their version; `foreign`: paths relative to the archive."""

    versions: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def adopt_newer(doors: Doors, now: float) -> int:
    """Adopt the whole archive where it carries sequence numbers that this index never gave out; how many versions.

    That is an index from a backup: what it does not know would otherwise be fetched again.
    """
    if doors.archive.last_seq() <= int(doors.index.meta("last_seq") or 0):
        return 0
    return adopt_all(doors.index, doors.archive, doors.settings, now).versions


def adopt_all(index: Index, archive: Archive, settings: Settings, now: float) -> Findings:
    """Record every version of the archive that the index does not know, patient by patient."""
    findings, last = Findings(), 0
    patients = [patient for patient in map(archive.read_patient, archive.patients()) if patient is not None]
    known = {row["pat_num"] for row in index.rows("SELECT pat_num FROM patient")}
    index.add_patients([patient for patient in patients if patient.pat_num not in known], settings.sync.patient_names)
    for _, versions in _by_patient(archive.walk(), findings):
        with index.transaction():
            for version in versions:
                if index.value("SELECT 1 FROM version WHERE seq = ?", version.seq) is None:
                    index.put_version(version, now)
                    findings.versions += 1
                    findings.bytes += version.bytes
                last = max(last, version.seq)
            _derive(index, versions, settings)
    with index.transaction():
        index.reserve_seqs(0, above=max(last, archive.last_seq()))
    return findings


def _by_patient(found: Iterable[Version | str], findings: Findings) -> Iterator[tuple[int, list[Version]]]:
    def versions() -> Iterator[Version]:
        for each in found:
            if isinstance(each, Version):
                yield each
            else:
                findings.foreign.append(each)

    for pat_num, group in groupby(versions(), key=lambda version: version.item.pat_num):
        yield pat_num, list(group)


def _derive(index: Index, versions: Sequence[Version], settings: Settings) -> None:
    """What the index remembers beside the versions: whole mounts, due thumbnails, the next fetch by age."""
    versions = sorted(versions, key=lambda version: version.seq)  # a mount's images come folder by folder
    newest = {version.item: version for version in versions}
    made_from = {(v.item.num, v.source_revision) for v in versions if v.item.kind == "thumbnail"}
    have = {(v.item.num, v.mount_num, v.source_revision) for v in versions if v.item.kind == "mount-image"}
    for image in versions:
        named = image.mount_images
        if image.mount_num is None or not named:
            continue
        if all((num, image.mount_num, image.source_revision) in have for num in named):
            mount = Item(image.item.pat_num, "mount", image.mount_num)
            index.set_item(mount, "images_revision = ?", image.source_revision)
    for item, version in newest.items():
        created_at = local_time(str(version.listing.get("DateCreated") or ""), settings.zone)
        again = refetch_at(item.kind, item.num, created_at, None, version.archived_at)
        index.set_item(item, "refetch_at = coalesce(refetch_at, ?)", again)
        if item.kind == "document":
            due = is_image(version.media_type) and (item.num, version.sha256) not in made_from
            index.set_item(item, "thumbnail_due = ?", int(due and "thumbnail" in settings.sync.kinds))


def reindex(settings: Settings, archive: Archive, now: float) -> Findings:
    """Rebuild index.db from the archive alone; the old file stays beside it as `index.db.before-reindex`.

    The caller holds the lock. Raises UsageError where there is no archive to read.
    """
    marker = archive.marker_id()
    if marker is None:
        raise UsageError("there is no archive at [archive] path: nothing to rebuild the index from")
    path = settings.state_path / "index.db"
    fresh = path.with_name("index.db.new")
    for leftover in _files(fresh):
        leftover.unlink(missing_ok=True)
    index = Index(fresh)
    try:
        index.remember("archive_id", marker)
        findings = adopt_all(index, archive, settings, now)
        index.value("PRAGMA wal_checkpoint(TRUNCATE)")  # not inside a transaction: there it is refused
    finally:
        index.close()
    for old in _files(path):
        if old.exists():
            old.replace(old.with_name(old.name.replace("index.db", "index.db.before-reindex", 1)))
    fresh.replace(path)
    return findings


def _files(path: Path) -> tuple[Path, Path, Path]:
    return path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def verify(index: Index, archive: Archive, versions: Iterable[Version], now: float, note: bool = True) -> Findings:
    """Re-hash archived files; `note` writes down when one was right. Read errors end the walk as SiteError."""
    findings = Findings()
    for version in versions:
        findings.versions += 1
        findings.bytes += version.bytes
        name = f"{version.item.full_id} version {version.version}"
        if archive.intact(version):
            if note:
                index.run("UPDATE version SET checked_at = ? WHERE seq = ?", now, version.seq)
        else:
            there = (archive.root / version.path).exists()
            (findings.damaged if there else findings.missing).append(name)
    return findings


def share_of(total: int, part: Fraction) -> int:
    """How many of `total` files a subset checks, at least one where there is any."""
    return min(total, -(-total * part.numerator // part.denominator))
