"""The archive on real files: nothing overwritten, nothing half there, whatever fails and wherever it stops."""

from __future__ import annotations

import dataclasses
import errno
import grp
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.archive import Archive, Publication
from syncd.errors import ConfigError, ItemError, SiteError, SyncdError, UnreadableError
from syncd.folders import side_by_side
from syncd.model import KINDS, Item, Patient, Version
from syncd.naming import EXTENSIONS
from syncd.sidecar import sidecar_content, version_from_sidecar

ITEM = Item(101, "document", 34)
PATIENT = Patient(101, "Patient", "2024-01-01 00:00:00", "Smith", "Zoë", "", "1980-02-03")


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    made = Archive(tmp_path, reserve=0)
    made.create("archive-1")
    made.check("archive-1")
    return made


def version(content: bytes = b"one", **changes: Any) -> Version:
    plain = Version(
        seq=7, item=ITEM, mount_num=None, version=1, sidecar=1, revision="2021-04-18 11:45:01", bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(), extension="jpg", media_type="image/jpeg", file_name="é\ud800.jpg",
        listed_at=1.5, placed_at=2.25, archived_at=3.000001, first_seen_at=0.0, method="document",
        flags=("other_type",), listing={"Description": "Scan", "ProvNum": 0, "ImgType": None},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def pulled(archive: Archive, content: bytes = b"one", **changes: Any) -> Publication:
    source = archive.new_incoming()
    source.write_bytes(content)
    return Publication(version(content, **changes), source)


def files(archive: Archive) -> dict[str, bytes]:
    return {str(p.relative_to(archive.root)): p.read_bytes() for p in archive.root.rglob("*") if p.is_file()}


def media(archive: Archive) -> dict[str, bytes]:
    return {path: content for path, content in files(archive).items() if path.endswith((".jpg", ".pdf"))}


def strays(archive: Archive) -> list[str]:
    return [found for found in archive.walk() if isinstance(found, str)]


class Fault:
    """Make the n-th call of functions of `os` fail, as a disk would; n = 0 counts only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], code: int, at: int) -> None:
        self.calls, self._code, self._at = 0, code, at
        for name in names:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                raise OSError(self._code, "planted")
            return real(*args, **kwargs)

        return call


# The archive as a whole


def test_marker_is_made_only_in_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    archive = Archive(tmp_path, reserve=0)
    assert archive.marker_id() is None
    archive.create("archive-1")
    assert archive.marker_id() == "archive-1"
    with pytest.raises(SiteError) as again:
        archive.create("archive-2")
    assert again.value.reason == "archive_missing"
    assert archive.marker_id() == "archive-1"


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"id": 3}', b'{"id": "other"}', b"\xff"])
def test_nothing_is_written_where_the_right_marker_is_not(archive: Archive, content: bytes | None) -> None:
    publication = pulled(archive)
    (archive.root / ".syncd-archive").unlink()
    if content is not None:
        (archive.root / ".syncd-archive").write_bytes(content)
    before = files(archive)
    calls: tuple[Callable[[], object], ...] = (
        lambda: archive.check("archive-1"), lambda: archive.publish([publication]), archive.new_incoming,
        archive.clear_incoming, lambda: archive.write_patient(PATIENT), lambda: archive.read_item(ITEM),
        lambda: list(archive.walk()), lambda: archive.highest_version(ITEM),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(SiteError) as refusal:
            call()
        assert refusal.value.reason == "archive_missing"
    assert files(archive) == before


def test_absent_folder_is_a_missing_archive(tmp_path: Path) -> None:
    for root in (tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(SiteError) as refusal:
            Archive(root, reserve=0).check("archive-1")
        assert refusal.value.reason == "archive_missing"
        assert Archive(root, reserve=0).marker_id() is None


def test_too_little_space_is_told_before_it_is_gone(archive: Archive) -> None:
    assert archive.free_bytes() > 0
    with pytest.raises(SiteError) as refusal:
        Archive(archive.root, reserve=1 << 62).check("archive-1")
    assert refusal.value.reason == "archive_full"


def test_read_only_archive_is_told(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_args, **_kwargs: False)
    with pytest.raises(SiteError) as refusal:
        archive.check("archive-1")
    assert refusal.value.reason == "archive_read_only"


def test_incoming_is_cleared_at_start(archive: Archive) -> None:
    names = {archive.new_incoming() for _ in range(3)}
    for name in names:
        name.write_bytes(b"half")
    (archive.root / "incoming" / "folder").mkdir()
    assert len(names) == 3
    assert archive.clear_incoming() == 3
    assert archive.clear_incoming() == 0


# Publishing


def test_published_version_is_read_back_whole(archive: Archive) -> None:
    publication = pulled(archive)
    assert archive.publish([publication]) == [None]
    assert archive.read_item(ITEM) == [publication.version]
    assert strays(archive) == []
    with archive.open_media(publication.version) as file:
        assert file.read() == b"one"
    assert archive.intact(publication.version)
    assert not any((archive.root / "incoming").iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_published_files_are_private_and_read_only_whatever_the_umask(archive: Archive, umask: int) -> None:
    before = os.umask(umask)
    try:
        archive.publish([pulled(archive)])
        archive.write_patient(PATIENT)
    finally:
        os.umask(before)
    for path in (archive.root / "patients").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o400), path


def test_folders_do_not_inherit_setgid(archive: Archive) -> None:
    (archive.root / "incoming").rmdir()
    archive.root.chmod(0o2700)
    archive.publish([pulled(archive)])
    for path in (archive.root / "incoming", archive.root / "patients", *(archive.root / "patients").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o400), path


def test_group_may_read_and_enter(tmp_path: Path) -> None:
    archive = Archive(tmp_path, reserve=0, group=grp.getgrgid(os.getgid()).gr_name)
    archive.create("archive-1")
    archive.publish([pulled(archive)])
    for path in (archive.root / "patients").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o440), path
        assert path.stat().st_gid == os.getgid()
    assert stat.S_IMODE((archive.root / "incoming").stat().st_mode) == 0o750


def test_unknown_group_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Archive(tmp_path, reserve=0, group="no-such-group-here")


def test_refused_group_names_who_must_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(tmp_path, reserve=0, group=grp.getgrgid(os.getgid()).gr_name)
    archive.create("archive-1")
    publication = pulled(archive)
    Fault(monkeypatch, ("fchown",), errno.EPERM, at=1)
    with pytest.raises(SiteError) as refusal:
        archive.publish([publication])
    assert (refusal.value.reason, refusal.value.who) == ("archive_read_only", "practice_it")


def test_publishing_again_after_a_crash_is_success(archive: Archive) -> None:
    archive.publish([pulled(archive)])
    before = files(archive)
    assert archive.publish([pulled(archive, seq=9)]) == [None]
    assert files(archive) == before


def test_lost_sidecar_of_an_equal_file_is_written_again(archive: Archive) -> None:
    first = pulled(archive)
    archive.publish([first])
    (archive.root / first.version.sidecar_path).unlink()
    assert strays(archive) == [first.version.path]
    assert archive.publish([pulled(archive)]) == [None]
    assert archive.read_item(ITEM) == [first.version]


@pytest.mark.parametrize("rival", ["path", "number", "symlink"])
def test_nothing_is_ever_overwritten(archive: Archive, rival: str) -> None:
    archive.publish([pulled(archive, b"two", version=2)])
    publication = pulled(archive)
    path = archive.root / publication.version.path
    if rival == "symlink":
        path.symlink_to("/etc/hostname")
    else:
        (path if rival == "path" else path.with_name(f"1-{'0' * 12}.pdf")).write_bytes(b"eno")
    before = {path: content for path, content in files(archive).items() if not path.startswith("incoming/")}
    (outcome,) = archive.publish([publication])
    assert isinstance(outcome, ItemError)
    assert outcome.failure == "io_error"
    assert files(archive) == before


def test_file_that_appears_at_the_last_moment_is_not_overwritten(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication = pulled(archive)
    path = archive.root / publication.version.path

    def after_a_rival(real: Callable[..., None]) -> Callable[..., None]:
        def move(*args: Any, **kwargs: Any) -> None:
            if args[1] == path.name:
                path.write_bytes(b"somebody else's")
            real(*args, **kwargs)

        return move

    for name in ("link", "rename", "replace"):
        monkeypatch.setattr(os, name, after_a_rival(getattr(os, name)))
    (outcome,) = archive.publish([publication])
    assert isinstance(outcome, ItemError)
    assert path.read_bytes() == b"somebody else's"


def test_leftover_sidecar_without_its_file_is_replaced(archive: Archive) -> None:
    publication = pulled(archive)
    path = archive.root / publication.version.sidecar_path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}")
    assert archive.highest_version(ITEM) == 0
    assert archive.publish([publication]) == [None]
    assert archive.read_item(ITEM) == [publication.version]


def test_new_revision_with_equal_bytes_is_one_more_sidecar(archive: Archive) -> None:
    second = version(sidecar=2, revision="later", seq=8)
    assert archive.publish([pulled(archive), Publication(second, None)]) == [None, None]
    assert archive.publish([Publication(second, None)]) == [None]
    assert archive.read_item(ITEM) == [version(), second]
    assert list(media(archive).values()) == [b"one"]
    (clash,) = archive.publish([Publication(dataclasses.replace(second, revision="other"), None)])
    assert isinstance(clash, ItemError)


def test_sidecar_without_an_archived_file_is_refused(archive: Archive) -> None:
    (outcome,) = archive.publish([Publication(version(sidecar=2), None)])
    assert isinstance(outcome, ItemError)


def test_sidecar_of_a_file_that_is_gone_is_refused(archive: Archive) -> None:
    first = pulled(archive)
    assert archive.publish([first]) == [None]
    (archive.root / first.version.path).unlink()
    (outcome,) = archive.publish([Publication(version(sidecar=2, seq=8, revision="later"), None)])
    assert isinstance(outcome, ItemError)


def test_sidecar_that_is_there_is_not_written_again(archive: Archive) -> None:
    first = pulled(archive)
    archive.publish([first])
    before = files(archive)
    with pytest.raises(ItemError):
        archive.write_sidecar(dataclasses.replace(first.version, revision="other"))
    assert files(archive) == before


def test_one_bad_item_does_not_stop_the_batch(archive: Archive) -> None:
    absent = Publication(version(item=Item(101, "sheet", 1)), archive.root / "incoming" / "absent")
    short = pulled(archive, b"short", item=Item(101, "sheet", 2), bytes=6)
    hostile = pulled(archive, item=Item(101, "sheet", 3), extension="../x")
    outcomes = archive.publish([absent, short, hostile, pulled(archive)])
    assert [type(outcome) for outcome in outcomes] == [ItemError, ItemError, ItemError, type(None)]
    assert list(media(archive)) == [version().path]
    assert not any((archive.root / "incoming").iterdir())


def test_symlink_in_the_way_is_not_followed(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (archive.root / "patients").mkdir()
    (archive.root / "patients" / "101").symlink_to(outside)
    (outcome,) = archive.publish([pulled(archive)])
    assert isinstance(outcome, ItemError)
    assert not any(outside.iterdir())
    assert list(archive.walk()) == ["patients/101"]


STEPS = ("fsync", "link", "replace", "mkdir", "open", "unlink", "fchmod", "scandir")


def _three(archive: Archive) -> list[Publication]:
    return [
        pulled(archive), Publication(version(sidecar=2, revision="later"), None),
        pulled(archive, b"three", item=Item(102, "sheet", 5), extension="pdf"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "archive_full"), (errno.EROFS, "archive_read_only"), (errno.EIO, "disk_error"), (errno.EMFILE, "")],
)
def test_failure_at_any_call_leaves_nothing_half_done(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    """Every single call fails once, as a full, read-only or broken disk would; the same batch then goes through."""
    at, hit = 0, True
    while hit:
        at += 1
        root = archive.root / f"run{at}"
        root.mkdir()
        run = Archive(root, reserve=0)
        run.create("archive-1")
        batch = _three(run)
        with monkeypatch.context() as patch:
            fault = Fault(patch, STEPS, code, at)
            outcomes: list[SyncdError | None]
            try:
                outcomes = run.publish(batch)
            except SyncdError as error:
                outcomes = [error] * len(batch)
        hit = fault.calls >= at
        for raised in (one for one in outcomes if one and reason):
            if code != errno.EIO:  # of which one folder may be the cause
                assert isinstance(raised, SiteError)
            assert getattr(raised, "reason", reason) == reason
        done = [one for one, outcome in zip(batch, outcomes, strict=True) if outcome is None]
        assert [one for one in batch if one.version in run.read_item(one.version.item)] == done
        assert len(media(run)) == sum(one.source is not None for one in done)
        for publication in batch:  # what was thrown away is pulled again
            if publication.source and not publication.source.exists():
                publication.source.write_bytes(b"three" if publication.version.item.num == 5 else b"one")
        assert run.publish(batch) == [None, None, None]
        run.clear_incoming()
        assert strays(run) == []
        assert sorted(media(run).values()) == [b"one", b"three"]
    assert at > 40


class _Killed(BaseException):
    """Stands for SIGKILL: nothing catches it and, as `undo` does not run after a kill, every later call fails too."""


def test_crash_before_any_call_heals(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    at, done = 0, False
    while not done:
        at += 1
        root = archive.root / f"run{at}"
        root.mkdir()
        run = Archive(root, reserve=0)
        run.create("archive-1")
        batch = _three(run)
        calls = 0

        def wrapped(real: Callable[..., Any], last: int = at) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= last:
                    raise _Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, wrapped(getattr(os, name)))
            try:
                run.publish(batch)
                done = True
            except _Killed:
                pass
        for found in run.walk():  # whatever exists is whole
            assert not isinstance(found, Version) or run.intact(found)
        run.clear_incoming()
        again = [dataclasses.replace(one, source=one.source and run.new_incoming()) for one in batch]
        for publication, content in zip(again, (b"one", b"", b"three"), strict=True):
            if publication.source:
                publication.source.write_bytes(content)
        assert run.publish(again) == [None, None, None]
        assert strays(run) == []
    assert at > 40


def test_source_whose_fsync_failed_is_thrown_away(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    publication = pulled(archive)
    Fault(monkeypatch, ("fsync",), errno.EIO, at=1)
    with pytest.raises(SiteError) as refusal:
        archive.publish([publication])
    assert refusal.value.reason == "disk_error"
    assert publication.source is not None
    assert not publication.source.exists()


def test_source_whose_mode_cannot_be_set_stays_for_the_next_time(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication, fchmod = pulled(archive), os.fchmod

    def refused(descriptor: int, mode: int) -> None:
        if mode == 0o400:
            raise OSError(errno.EIO, "planted")
        fchmod(descriptor, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", refused)
        with pytest.raises(SiteError):
            archive.publish([publication])
    assert publication.source is not None
    assert publication.source.exists()
    assert archive.publish([publication]) == [None]


def test_everything_is_durable_before_the_link_and_the_link_before_success(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication = pulled(archive)
    trace: list[str] = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        trace.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removeprefix(str(archive.root)))
        real_fsync(descriptor)

    def link(*args: Any, **kwargs: Any) -> None:
        trace.append("link")
        real_link(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    assert publication.source is not None
    archive.publish([publication])
    before = trace[: trace.index("link")]
    folder = f"/{version().folder}"
    assert {f"/incoming/{publication.source.name}", folder, "/patients/101", "/patients", ""} <= set(before)
    assert len([path for path in before if path.startswith("/incoming/")]) == 2
    assert trace[trace.index("link") + 1 :] == [folder]


def test_full_disk_under_a_real_limit_loses_nothing(archive: Archive) -> None:
    """RLIMIT_FSIZE makes the kernel itself refuse the sidecar's bytes (EFBIG), without root."""
    publication = pulled(archive)
    script = f"""
import resource, signal
from pathlib import Path
from syncd.archive import Archive, Publication
from syncd.errors import SiteError
from syncd.sidecar import version_from_sidecar
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
archive = Archive(Path({str(archive.root)!r}), reserve=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    one = version_from_sidecar({sidecar_content(publication.version)!r})
    archive.publish([Publication(one, Path({str(publication.source)!r}))])
except SiteError as error:
    print(error.reason)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "archive_full\n"
    assert media(archive) == {}
    assert archive.publish([publication]) == [None]


# Reading


def test_damage_is_told_from_a_failing_disk(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    publication = pulled(archive)
    assert not archive.intact(publication.version)
    archive.publish([publication])
    path = archive.root / publication.version.path
    path.chmod(0o600)
    path.write_bytes(b"onE")
    assert not archive.intact(publication.version)
    Fault(monkeypatch, ("fstat",), errno.EIO, at=2)
    with pytest.raises(SiteError) as refusal:
        archive.intact(publication.version)
    assert refusal.value.reason == "disk_error"


def test_opening_what_is_no_archived_file_fails(archive: Archive) -> None:
    publication = pulled(archive)
    with pytest.raises(ItemError):
        archive.open_media(publication.version)
    archive.publish([publication])
    path = archive.root / publication.version.path
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ItemError):
        archive.open_media(publication.version)
    path.unlink()
    (archive.root / "equal").write_bytes(b"one")
    path.symlink_to(archive.root / "equal")
    assert not archive.intact(publication.version)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"schema_version": 1}'],
)
def test_corrupt_sidecar_is_reported_and_its_file_still_counts(archive: Archive, content: bytes) -> None:
    archive.publish([pulled(archive), pulled(archive, b"two", version=2)])
    path = archive.root / version().sidecar_path
    path.chmod(0o600)
    path.write_bytes(content)
    (archive.root / version().folder / "stray.txt").touch()
    (archive.root / version().folder / "9-0.json").symlink_to("/etc/hostname")
    assert [found.version for found in archive.read_item(ITEM)] == [2]
    folder = version().folder
    odd = sorted([version().path, version().sidecar_path, f"{folder}/9-0.json", f"{folder}/stray.txt"])
    assert strays(archive) == odd
    path.unlink()
    (archive.root / version(b"two", version=2).path).rename(archive.root / folder / f"12-{'0' * 12}.jpg")
    assert archive.highest_version(ITEM) == 12


def test_sidecar_of_another_place_is_foreign(archive: Archive) -> None:
    archive.publish([pulled(archive)])
    moved = archive.root / "patients" / "102"
    (archive.root / "patients" / "101").rename(moved)
    assert archive.read_item(Item(102, "document", 34)) == []
    assert len(strays(archive)) == 2


def test_file_of_another_size_is_no_version(archive: Archive) -> None:
    archive.publish([pulled(archive)])
    path = archive.root / version().path
    path.chmod(0o600)
    path.write_bytes(b"longer")
    assert archive.read_item(ITEM) == []


# What the disk does not give of one item

NOT_GIVEN = (errno.EIO, errno.EACCES, errno.EPERM, errno.EUCLEAN, errno.EBADMSG)
OTHER = Item(102, "sheet", 5)


def plant(monkeypatch: pytest.MonkeyPatch, call: str, name: str, code: int) -> None:
    """A call of `os` fails where one of its names is this one."""
    real = getattr(os, call)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if name in args:
            raise OSError(code, "planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)


def another(archive: Archive) -> Publication:
    """What goes through beside the item that fails."""
    return pulled(archive, b"three", item=OTHER, extension="pdf")


@pytest.mark.parametrize("code", NOT_GIVEN)
@pytest.mark.parametrize("name", ["101", "document-34"])
def test_a_folder_that_the_disk_does_not_give_concerns_its_item_alone(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    archive.publish([pulled(archive)])
    batch = [pulled(archive, b"two", seq=8, version=2), another(archive)]
    with monkeypatch.context() as patch:
        plant(patch, "open", name, code)
        failed, done = archive.publish(batch)
        assert (str(failed), done) == (f"io_error: {errno.errorcode[code]}", None)
        for call in (archive.read_item, archive.highest_version):
            with pytest.raises(UnreadableError):
                call(ITEM)
        with pytest.raises(UnreadableError):
            archive.survey(version().folder)
        assert not archive.intact(version())
        assert archive.read_sidecar(version()) is None
    assert [found.item for found in archive.walk() if isinstance(found, Version)] == [ITEM, OTHER]
    assert not any((archive.root / "incoming").iterdir())
    assert archive.publish([pulled(archive, b"two", seq=8, version=2)]) == [None]


@pytest.mark.parametrize(
    ("call", "name", "codes"),
    [
        ("mkdir", "document-34", {errno.EACCES, errno.EPERM}),
        ("replace", Path(version().sidecar_path).name, {errno.EACCES, errno.EPERM}),
        ("link", Path(version().path).name, {errno.EACCES}),
    ],
)
@pytest.mark.parametrize("code", NOT_GIVEN)
def test_a_folder_that_takes_nothing_concerns_its_item_alone_unless_the_disk_fails(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, call: str, name: str, codes: set[int], code: int
) -> None:
    (archive.root / "patients" / "101").mkdir(parents=True)
    batch = [pulled(archive), another(archive)]
    plant(monkeypatch, call, name, code)
    if code in codes:
        failed, done = archive.publish(batch)
        assert (str(failed), done) == (f"io_error: {errno.errorcode[code]}", None)
        assert not any((archive.root / "incoming").iterdir())
    elif code not in (errno.EUCLEAN, errno.EBADMSG):
        with pytest.raises(SiteError):
            archive.publish(batch)
        assert media(archive) == {}


@pytest.mark.parametrize("code", NOT_GIVEN)
def test_a_further_sidecar_that_its_folder_does_not_take_concerns_its_item_alone(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    archive.publish([pulled(archive)])
    further = version(seq=8, sidecar=2, revision="later")
    plant(monkeypatch, "stat", Path(further.sidecar_path).name, code)
    failed, done = archive.publish([Publication(further, None), another(archive)])
    assert (str(failed), done) == (f"io_error: {errno.errorcode[code]}", None)
    monkeypatch.undo()
    plant(monkeypatch, "replace", Path(further.sidecar_path).name, errno.EACCES)
    (failed,) = archive.publish([Publication(further, None)])
    assert str(failed) == "io_error: EACCES"
    assert not any((archive.root / "incoming").iterdir())


@pytest.mark.parametrize("code", NOT_GIVEN)
def test_what_the_disk_does_not_give_of_a_file_is_not_intact_and_the_others_are_read(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    first, second = pulled(archive), pulled(archive, b"two", seq=8, version=2)
    archive.publish([first, second])
    name = Path(version().path).name
    for call, of in (("open", name), ("stat", name), ("open", Path(version().sidecar_path).name)):
        with monkeypatch.context() as patch:
            plant(patch, call, of, code)
            assert archive.intact(version()) == (of != name or call == "stat")
            held = archive.read_item(ITEM)
            assert held == ([first.version, second.version] if (call, of) == ("open", name) else [second.version])
            assert archive.intact(held[-1])
            assert archive.survey(version().folder)[name].kind == ("unreadable" if call == "stat" else "file")
            assert (archive.publish([first])[0] is None) == ((call, of) != ("open", name))
    plant(monkeypatch, "rename", name, code)
    with pytest.raises(UnreadableError):
        archive.set_aside(version().path)


def test_a_mode_is_given_to_files_and_folders_only(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> None:
    archive.publish([pulled(archive)])
    outside = tmp_path_factory.mktemp("outside") / "file"
    outside.touch(0o644)
    link = archive.root / version().folder / "link"
    link.symlink_to(outside)
    for path in (f"{version().folder}/link", f"{version().folder}/absent"):
        with pytest.raises(ItemError):
            archive.settle_mode(path)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    for path, mode in ((version().path, 0o400), (version().folder, 0o700)):
        (archive.root / path).chmod(0o000)
        archive.settle_mode(path)
        assert stat.S_IMODE((archive.root / path).stat().st_mode) == mode


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("name", [".syncd-archive", "patients", "incoming", "damaged"])
def test_a_folder_or_marker_of_all_that_the_disk_does_not_give_stops_everything(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    (archive.root / "damaged").mkdir()
    batch = [pulled(archive)]
    plant(monkeypatch, "open", name, code)
    calls: tuple[Callable[[], object], ...] = (lambda: archive.publish(batch), lambda: archive.highest_version(ITEM))
    with pytest.raises(SiteError) as refusal:
        calls[name == "damaged"]()
    assert refusal.value.reason == {errno.EIO: "disk_error"}.get(code, "archive_read_only")


def test_walk_tells_everything(archive: Archive) -> None:
    assert list(archive.walk()) == []
    other = pulled(archive, b"x", item=Item(9, "mount-image", 440), version=1, mount_images=(1, 2))
    archive.publish([pulled(archive), pulled(archive, b"two", version=2), other])
    archive.write_patient(PATIENT)
    for stray in ("stray", "patients/x", "patients/101/y", "patients/9/patient.json", "patients/101/document-9"):
        (archive.root / stray).touch()
    assert archive.patients() == [9, 101]
    found = list(archive.walk())
    assert [one for one in found if isinstance(one, Version)] == [other.version, version(), version(b"two", version=2)]
    odd = ["stray", "patients/x", "patients/9/patient.json", "patients/101/document-9", "patients/101/y"]
    assert strays(archive) == odd


# Patients


def test_patient_is_written_once_and_replaced_when_changed(archive: Archive) -> None:
    assert archive.read_patient(101) is None
    assert archive.write_patient(PATIENT)
    path = archive.root / "patients" / "101" / "patient.json"
    inode = path.stat().st_ino
    assert not archive.write_patient(PATIENT)
    assert path.stat().st_ino == inode
    married = dataclasses.replace(PATIENT, last_name="Jones")
    assert archive.write_patient(married)
    assert archive.read_patient(101) == dataclasses.replace(married, stamp="")


@pytest.mark.parametrize("change", [{"pat_num": 102}, {"status": 3}, {"extra": "x"}])
def test_patient_file_of_another_shape_is_not_believed(archive: Archive, change: dict[str, object]) -> None:
    archive.write_patient(PATIENT)
    path = archive.root / "patients" / "101" / "patient.json"
    content = json.loads(path.read_bytes()) | change
    path.chmod(0o600)
    path.write_text(json.dumps(content))
    assert archive.read_patient(101) is None


# Sidecars

_TIME = st.floats(0, 4e9).map(lambda moment: round(moment, 6))
_NUM = st.integers(1, 10**17)
_TEXT = st.text(st.characters())
VERSIONS = st.builds(
    Version, seq=st.integers(), item=st.builds(Item, _NUM, st.sampled_from(KINDS), _NUM), mount_num=st.none() | _NUM,
    version=_NUM, sidecar=_NUM, revision=_TEXT, sha256=st.binary(min_size=32, max_size=32).map(bytes.hex), bytes=_NUM,
    extension=st.sampled_from(sorted(EXTENSIONS)), media_type=_TEXT, file_name=st.none() | _TEXT, listed_at=_TIME,
    placed_at=_TIME, archived_at=_TIME, first_seen_at=_TIME, method=_TEXT, flags=st.lists(_TEXT, max_size=3).map(tuple),
    mount_images=st.none() | st.lists(_NUM, max_size=3).map(tuple), source_revision=st.none() | _TEXT,
    listing=st.dictionaries(_TEXT, st.none() | st.integers() | _TEXT, max_size=5),
)  # fmt: skip


@given(VERSIONS)
def test_sidecar_round_trip_is_exact(one: Version) -> None:
    assert version_from_sidecar(json.loads(json.dumps(sidecar_content(one)))) == one


@given(st.floats(-1e9, 4e9))
def test_sidecar_time_is_exact_to_the_microsecond(moment: float) -> None:
    back = version_from_sidecar(sidecar_content(version(listed_at=moment)))
    assert abs(back.listed_at - moment) <= 1e-6
    assert sidecar_content(back) == sidecar_content(version(listed_at=moment))


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2}, {"extra": 1}, {"num": True}, {"num": 0}, {"num": "34"}, {"pat_num": 1.0}, {"kind": "x"},
        {"sha256": "AB" * 32}, {"sha256": "ab"}, {"bytes": 0}, {"extension": "json"}, {"flags": [1]}, {"flags": None},
        {"mount_images": ["1"]}, {"listing": {"a": []}}, {"listing": {"a": 1.5}}, {"listed_at": "2021-04-08"},
        {"listed_at": "2021-04-08T08:12:21.000000+00:00"}, {"listed_at": 5}, {"file_name": 3}, {"sidecar": 0},
    ],
)  # fmt: skip
def test_sidecar_of_another_shape_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - fromisoformat's own message is one of them
        version_from_sidecar(sidecar_content(version()) | change)


@pytest.mark.parametrize("key", sorted(sidecar_content(version())))
def test_sidecar_that_lacks_a_field_is_refused(key: str) -> None:
    content = sidecar_content(version())
    del content[key]
    with pytest.raises(ValueError, match="schema"):
        version_from_sidecar(content)


@pytest.mark.parametrize("room", [0, 3, 100])
def test_what_is_made_durable_side_by_side_is_done_once_each_however_few_threads_there_are(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a memory limit no thread can be started; the one that asks does what nobody else does."""
    start, left = threading.Thread.start, [room]

    def started(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        if number in (7, 30):
            raise OSError(errno.EIO, str(number))
        return -number

    assert side_by_side(lambda number: -number, range(40)) == [-number for number in range(40)]
    with pytest.raises(OSError, match="7"):
        side_by_side(work, range(40))
    assert sorted(done) == list(range(40))
