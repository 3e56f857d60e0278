"""Section C of the catalogue: the SFTP site; its connection is in test_drop_line.py.

Real bytes through OpenSSH and a site that plays tricks; whole mirrors in simulated time where a duty takes hours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from syncd.demo.site import DropFile
from syncd.demo.site import SiteError as OfficeSiteError
from syncd.drop import SftpDrop
from syncd.errors import ItemError, SiteError, SyncdError, TransientError
from syncd.model import Pulled, PullJob
from syncd.naming import staging_name
from syncd.ports import Finished
from syncd.wiring import Lanes, build
from tests.sites import OpenSshSite, TrickFile, TrickSite, make_key, public_part
from tests.small import backfilling, failing, serving, settle, small, troubles, versions
from tests.test_drop import open_ssh_drop, trick_drop
from tests.world import DropInMemory, World, make_api

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

MIB = 1024 * 1024
PIECE = 32 * 1024  # bytes that one READ asks for


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSshSite]:
    site = OpenSshSite(tmp_path_factory.mktemp("sshd"))
    try:
        yield site.start()
    finally:
        site.stop()


@pytest.fixture
def box(sshd: OpenSshSite, tmp_path: Path) -> Path:
    """A folder of its own on the site, seen from the server's side."""
    folder = sshd.root / tmp_path.name
    folder.mkdir()
    return folder


@pytest.fixture
def trick() -> Iterator[TrickSite]:
    site = TrickSite()
    yield site
    site.stop()


# --- C14, C15, C16: what lies at the name


def test_packet_over_all_bounds_ends_the_connection_and_is_not_kept(trick: TrickSite, tmp_path: Path) -> None:
    trick.files["/a"] = TrickFile(b"x" * 100, read=lambda *_: b"z" * (5 * MIB))
    drop = trick_drop(trick)
    (outcome,) = drop.pull([PullJob(b"a", tmp_path / "a", 100 * MIB)])
    assert isinstance(outcome, TransientError)
    assert list(tmp_path.iterdir()) == []
    drop.close()


def test_endless_file_is_read_one_byte_past_the_size_it_told(trick: TrickSite, tmp_path: Path) -> None:
    asked: list[int] = []

    def endless(offset: int, length: int) -> bytes:
        asked.append(offset + length)
        return b"x" * length

    trick.files["/a"] = TrickFile(b"", [(3 * PIECE, 7)], read=endless)
    drop = trick_drop(trick)
    (outcome,) = drop.pull([PullJob(b"a", tmp_path / "a", 3 * PIECE)])
    assert isinstance(outcome, ItemError)
    assert max(asked) == 3 * PIECE + 1
    assert list(tmp_path.iterdir()) == []
    drop.close()


def test_folder_of_ours_that_became_a_link_is_not_emptied(sshd: OpenSshSite, box: Path) -> None:
    """The site's other users may write where Open Dental does: nothing outside our own names is ever removed."""
    theirs, ours = box / "letters", box / "syncd-main-20260301-aa"
    theirs.mkdir()
    (theirs / "letter.pdf").write_bytes(b"x")
    ours.symlink_to(theirs)
    drop = open_ssh_drop(sshd)
    at = os.fsencode(box.name + "/" + ours.name)
    with pytest.raises(ItemError, match="not_a_file"):
        drop.names(at + b"/")
    assert drop.remove([at + b"/"]) == [False]
    assert drop.remove([at]) == [True]
    assert sorted(path.name for path in box.rglob("*")) == ["letter.pdf", "letters"]
    drop.close()


# --- C12, C13, C18: the folder on the site


@dataclass
class RealLane:
    """The lanes of a small mirror whose drop is real."""

    world: World
    drop: SftpDrop
    lanes: Lanes

    def sweep(self) -> int:
        return self.lanes.pull_lane.cleaner.sweep(self.world.clock.now())


@pytest.fixture
def lane(sshd: OpenSshSite, box: Path, tmp_path: Path) -> Iterator[RealLane]:
    world, drop = World.start(tmp_path / "mirror", drop={"folder": box.name}), open_ssh_drop(sshd)
    world.stop()
    api = make_api(world.settings, world.office)
    lanes = build(world.settings, world.clock, world.log, world.scope, api, drop)
    yield RealLane(world, drop, lanes)
    lanes.close()


def test_twenty_thousand_foreign_and_hostile_names_are_left_alone_and_ours_are_swept(
    lane: RealLane, box: Path, tmp_path: Path
) -> None:
    hostile = [b"caf\xe9.jpg", b"line\nbreak", b"\x1b[31mred", b"x" * 255, "Zahnärztin.pdf".encode(), b"-rf", b" "]
    foreign = {b"foreign-%d.jpg" % number for number in range(20_000)} | set(hostile)
    folder = os.fsencode(box)
    for name in foreign:
        os.close(os.open(folder + b"/" + name, os.O_CREAT))
    old = b"syncd-main-20260301-" + b"a" * 32
    (box / os.fsdecode(old + b".jpg")).touch()
    (box / os.fsdecode(old)).mkdir()
    for name in hostile:  # as a file name that the office chose, inside a folder of ours
        os.close(os.open(folder + b"/" + old + b"/" + name, os.O_CREAT))
    young = os.fsencode(staging_name(box.name, "main", "20260310", "b" * 32, "jpg"))
    (box.parent / os.fsdecode(young)).touch()
    assert lane.sweep() == 2
    assert {os.fsencode(path.name) for path in box.iterdir()} == foreign | {young.rpartition(b"/")[2]}
    (outcome,) = lane.drop.pull([PullJob(young, tmp_path / "local", MIB)])
    assert isinstance(outcome, ItemError)
    assert outcome.failure == "zero_bytes"


def test_ordinary_work_never_lists_the_drop_folder(tmp_path: Path) -> None:
    world, listed = serving(tmp_path, small(documents=3)), list[bytes]()
    names = world.drop.names

    def spy(folder: bytes) -> list[bytes] | None:
        listed.append(folder)
        return names(folder)

    world.drop.names = spy  # type: ignore[method-assign]  # the real answers, noted
    world.run(hours=20)
    world.check()
    assert listed.count(b"syncd") == 1  # the daily sweep
    assert all(re.fullmatch(rb"syncd/syncd-main-\d{8}-[0-9a-f]{32}/", folder) for folder in set(listed) - {b"syncd"})
    world.stop()


@pytest.mark.parametrize(
    ("login", "folder", "warned"),
    [(0o755, 0o755, 1), (0o755, 0o733, 1), (0o755, 0o700, 0), (0o700, 0o777, 0), (0o755, 0o711, 0)],
    ids=lambda value: f"{value:o}",
)
def test_drop_that_other_users_of_the_site_may_enter_is_warned_of(
    lane: RealLane, sshd: OpenSshSite, box: Path, login: int, folder: int, warned: int
) -> None:
    before = sshd.root.stat().st_mode
    sshd.root.chmod(login)
    box.chmod(folder)
    try:
        lane.sweep()
    finally:
        sshd.root.chmod(before)
    (*events,) = lane.world.log.events("drop_open_to_others")
    assert [event["level"] for event in events] == ["warning"] * warned


# --- C08, C09, C17, C20: logins


@dataclass
class DropBehindLogin(DropInMemory):
    """Every call logs in to a real site first."""

    door: SftpDrop | None = None

    def _talk(self) -> None:
        super()._talk()
        assert self.door
        self.door.look([b"x"])


def test_refused_login_is_tried_at_most_four_times_an_hour(trick: TrickSite, tmp_path: Path) -> None:
    world = backfilling(tmp_path, small())
    world.drop = DropBehindLogin(world.site, door=trick_drop(trick, password="expired"))
    world.restart()
    world.run(hours=5)
    assert 5 <= trick.logins <= 5 * 4 + 1
    assert troubles(world) == {"drop": "drop_refused"}
    world.drop.door = trick_drop(trick)
    settle(world)
    assert troubles(world) == {}
    world.drop.door.close()
    world.stop()


def test_site_that_breaks_every_reading_is_not_stormed_with_logins(tmp_path: Path) -> None:
    """Each broken reading costs a login; a look in between succeeds, and must not start the distances anew."""
    world = backfilling(tmp_path, small(documents=20))
    breaks: list[float] = []

    def broken(jobs: Sequence[PullJob], finished: Finished) -> list[Pulled | SyncdError]:
        breaks.append(world.clock.now())
        cut = [(job, TransientError("drop_unreachable")) for job in jobs]
        finished(cut)
        return [error for _, error in cut]

    whole = world.drop.pull
    world.drop.pull = broken  # type: ignore[method-assign, assignment]  # the site's doing
    world.run(hours=6)
    assert troubles(world) == {"drop": "drop_unreachable"}
    assert len(breaks) <= 6 * 12
    world.drop.pull = whole  # type: ignore[method-assign]  # it is well again
    settle(world)
    assert set(versions(world)) == {1}
    world.stop()


WEAK = {
    "kex": "KexAlgorithms diffie-hellman-group14-sha1",
    "host key signature": "HostKeyAlgorithms ssh-rsa",
    "cipher": "Ciphers aes256-cbc",
    "mac": "Ciphers aes256-ctr\nMACs hmac-sha1",
}


@pytest.mark.parametrize("weak", WEAK)
def test_openssh_with_weak_algorithms_only_is_refused_before_any_login(tmp_path: Path, weak: str) -> None:
    site = OpenSshSite(tmp_path, "rsa", extra=WEAK[weak]).start()
    try:
        drop = open_ssh_drop(site)
        with pytest.raises(SiteError, match="no algorithm in common") as caught:
            drop.look([b"x"])
        assert caught.value.reason == "drop_unreachable"
    finally:
        site.stop()


def test_changed_host_key_is_never_taken_over(sshd: OpenSshSite, box: Path, tmp_path: Path) -> None:
    """The known_hosts file stays as it is, and no login reaches the stranger, however often it is tried."""
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{sshd.port} {public_part(make_key(tmp_path / 'other'))}\n")
    before, logged = known.read_bytes(), (sshd.root.parent / "sshd.log")
    drop = open_ssh_drop(sshd, host_key=None, known_hosts=known)
    accepted = logged.read_text().count("Accepted")
    for _ in range(3):
        with pytest.raises(SiteError) as caught:
            drop.look([b"x"])
        assert caught.value.reason == "host_key_changed"
    assert known.read_bytes() == before
    assert logged.read_text().count("Accepted") == accepted


# --- C02, C05, C10, C11, C19: a whole mirror


def test_file_that_stays_empty_is_failing_and_never_archived(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("zero_byte", times=None, **one.request("document"))
    world.run(hours=2)
    assert failing(world) == {"zero_bytes": 1}
    assert world.files(one.patient, "document", one.document) == []
    world.check_drop()
    world.office.faults.clear()
    settle(world)
    assert failing(world) == {}


def test_every_placement_asks_for_a_name_of_128_bits_that_was_never_asked_for(tmp_path: Path) -> None:
    one = small(documents=20)
    world = backfilling(tmp_path, one)
    for method in ("document", "mount", "sheet"):
        world.office.faults.add("gateway_timeout", times=3, **one.request(method))
    settle(world, days=2.0)
    asked = [str(each.params["SftpAddress"]).partition("/")[2].rstrip("/") for each in world.placements()]
    assert len(asked) >= 30
    names = [re.fullmatch(r"syncd/syncd-main-2026\d{4}-([0-9a-f]{32})(\.\w+)?", each) for each in asked]
    drawn = {name[1] for name in names if name}
    assert len(drawn) == len(asked)
    assert len({each[at : at + 4] for each in drawn for at in range(0, 32, 4)}) > 7.8 * len(asked)  # bits of its own


@pytest.mark.parametrize("denied", ["remove", "read"])
def test_what_the_site_does_not_permit_is_told_by_openssh(tmp_path: Path, denied: str) -> None:
    requests = {"remove": "remove,rmdir", "read": "open,opendir"}[denied]
    site = OpenSshSite(tmp_path, extra=f"Match all\n  ForceCommand internal-sftp -d {tmp_path}/drop -P {requests}")
    site.start()
    (site.root / "a").write_bytes(b"content")
    (site.root / "folder").mkdir()
    try:
        drop = open_ssh_drop(site)
        (outcome,) = drop.pull([PullJob(b"a", tmp_path / "local", MIB)])
        if denied == "read":
            assert isinstance(outcome, ItemError)
            assert outcome.failure == "unreadable_on_drop"
            assert not (tmp_path / "local").exists()
            with pytest.raises(ItemError, match="unreadable_on_drop"):
                drop.names(b"folder")
        else:
            assert isinstance(outcome, Pulled)
            assert drop.remove([b"a", b"folder/", b"none"]) == [False, False, True]
        drop.close()
    finally:
        site.stop()


def test_leftover_that_cannot_be_removed_is_counted_warned_of_and_removed_when_that_is_allowed(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small())
    remove = world.drop.remove
    world.drop.remove = lambda paths: [False for _ in paths]  # type: ignore[method-assign]  # the site's doing
    world.run(hours=30)
    left = world.catalog().status_facts(world.clock.now()).drop_leftovers
    assert left == len(world.placements()) > 0
    warned = world.log.events("drop_leftover")
    assert left <= len(warned) <= 10 * left  # with growing distance
    assert not any("syncd-main" in str(line) for line in warned)
    assert set(versions(world)) == {1}
    world.drop.remove = remove  # type: ignore[method-assign]  # it is allowed again
    settle(world, days=2.0)


def test_file_that_may_not_be_read_is_failing_under_its_own_name(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    pulled = world.drop.pull
    refused: SyncdError = ItemError("unreadable_on_drop")

    def denied(jobs: Sequence[PullJob], finished: Finished) -> list[Pulled | SyncdError]:
        finished([(job, refused) for job in jobs])
        return [refused for _ in jobs]

    world.drop.pull = denied  # type: ignore[method-assign, assignment]  # the site's doing
    world.run(hours=2)
    assert failing(world).keys() == {"unreadable_on_drop"}
    assert versions(world) == []
    world.drop.pull = pulled  # type: ignore[method-assign]  # it is allowed again
    settle(world)


def test_full_site_is_a_failure_of_placing_and_its_fragments_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = backfilling(tmp_path, small(documents=8))
    world.run(until=lambda: sum(versions(world)) >= 3)
    put = world.site._put

    def full(path: str, data: bytes, *, append: bool) -> None:
        put(path, data[:1000], append=append)
        if data:
            raise OfficeSiteError("Failure")

    with monkeypatch.context() as patched:
        patched.setattr(world.site, "_put", full)
        world.run(hours=3)
        assert troubles(world) == {"placing": "placements_refused"}
        assert failing(world) == {}
        world.check_safe()
        world.check_drop()
    settle(world, days=2.0)
    assert troubles(world) == {}
    assert set(versions(world)) == {1}


def test_removed_file_that_is_back_is_removed_again_and_never_archived_twice(tmp_path: Path) -> None:
    world = serving(tmp_path, small())
    world.run()
    names = [str(each.params["SftpAddress"]).partition("/")[2] for each in world.placements()]
    held = versions(world)
    for name in names:
        if name.endswith("/"):
            world.site.folders.add(name.rstrip("/"))
        world.site.files[name + ("1.jpg" if name.endswith("/") else "")] = DropFile(b"restored", world.clock.now())
    world.run(hours=80)
    world.check()
    assert versions(world) == held
