"""The drop, against OpenSSH's sshd and against a site that plays tricks."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import paramiko
import pytest
from paramiko.sftp import SFTP_EOF, SFTP_FAILURE, SFTP_PERMISSION_DENIED

from syncd.drop import SftpDrop
from syncd.errors import ConfigError, ItemError, SiteError, SyncdError, TransientError
from syncd.model import Pulled, PullJob, Seen
from tests.sites import PASSWORD, USER, OpenSshSite, TrickFile, TrickSite, make_key, public_part

MIB = 1024 * 1024


@pytest.fixture(scope="session")
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


def open_ssh_drop(site: OpenSshSite, **changes: object) -> SftpDrop:
    settings: dict[str, object] = {
        "host": "127.0.0.1", "port": site.port, "username": site.user, "password": None, "private_key": site.key,
        "host_key": site.host_key, "known_hosts": None, "timeout": 10.0,
    }  # fmt: skip
    return SftpDrop(**{**settings, **changes})  # type: ignore[arg-type]  # settings by name


def trick_drop(site: TrickSite, password: str = PASSWORD, timeout: float = 1.0) -> SftpDrop:
    return SftpDrop("127.0.0.1", site.port, USER, password, None, site.host_key, None, timeout, connect_timeout=1.5)


@pytest.fixture
def drop(sshd: OpenSshSite) -> Iterator[SftpDrop]:
    drop = open_ssh_drop(sshd)
    yield drop
    drop.close()


@pytest.fixture
def trick() -> Iterator[TrickSite]:
    site = TrickSite()
    yield site
    site.stop()


def job(remote: bytes, local: Path, cap: int = 100 * MIB) -> PullJob:
    return PullJob(remote, local, cap)


def failure(outcome: Pulled | SyncdError) -> str:
    assert isinstance(outcome, ItemError), outcome
    return outcome.failure


def pull_one(drop: SftpDrop, remote: bytes, local: Path, cap: int = 100 * MIB) -> Pulled | SyncdError:
    (outcome,) = drop.pull([job(remote, local, cap)])
    return outcome


# OpenSSH ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 32768, 32769, 3 * MIB + 17])
def test_what_is_put_on_the_site_is_equal_in_every_byte(drop: SftpDrop, box: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "local").write_bytes(content := os.urandom(size))
    with (tmp_path / "local").open("rb") as source:
        drop.put(os.fsencode(box / "a.jpg"), source)
    assert (box / "a.jpg").read_bytes() == content
    assert (box / "a.jpg").stat().st_mode & 0o777 == 0o600


def test_nothing_is_put_over_what_is_there_or_where_no_folder_is(drop: SftpDrop, box: Path, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"new")
    (box / "a.jpg").write_bytes(b"somebody's own")
    for name in ("a.jpg", "none/a.jpg"):
        with (tmp_path / "local").open("rb") as source, pytest.raises(ItemError, match="refused"):
            drop.put(os.fsencode(box / name), source)
    assert (box / "a.jpg").read_bytes() == b"somebody's own"
    assert drop.look([os.fsencode(box / "a.jpg")])[0] is not None  # the connection still serves


@pytest.mark.parametrize("size", [1, 63, 512, 32767, 32768, 32769, 65536, 5 * MIB + 17])
def test_pulled_file_is_equal_in_every_byte(drop: SftpDrop, box: Path, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (box / "a.jpg").write_bytes(content)
    os.utime(box / "a.jpg", (1, 1_700_000_000))
    outcome = pull_one(drop, f"{box.name}/a.jpg".encode(), tmp_path / "local")
    expected = Pulled(size, hashlib.sha256(content).hexdigest(), 1_700_000_000, content[:512], content[-64:])
    assert outcome == expected
    assert (tmp_path / "local").read_bytes() == content
    assert (tmp_path / "local").stat().st_mode & 0o777 == 0o400


def test_many_files_come_in_order_and_fast(drop: SftpDrop, box: Path, tmp_path: Path) -> None:
    contents = [os.urandom(20_000 + 300 * number) for number in range(200)]
    for number, content in enumerate(contents):
        (box / f"{number}").write_bytes(content)
    drop.look([b"."])
    began = time.monotonic()
    outcomes = drop.pull([job(f"{box.name}/{n}".encode(), tmp_path / f"{n}") for n in range(200)])
    assert 200 / (time.monotonic() - began) >= 60
    assert [o.sha256 for o in outcomes if isinstance(o, Pulled)] == [hashlib.sha256(c).hexdigest() for c in contents]
    assert all((tmp_path / f"{n}").read_bytes() == content for n, content in enumerate(contents))


def test_each_refusal_stands_in_its_place_and_leaves_no_file(drop: SftpDrop, box: Path, tmp_path: Path) -> None:
    (box / "good").write_bytes(b"x" * 100_000)
    (box / "empty").touch()
    (box / "folder").mkdir()
    (box / "link").symlink_to(box / "good")
    os.mkfifo(box / "pipe")
    names = ["good", "empty", "folder", "link", "pipe", "gone", "good"]
    jobs = [job(f"{box.name}/{name}".encode(), tmp_path / f"{n}") for n, name in enumerate(names)]
    jobs[6] = job(jobs[6].remote, jobs[6].local, cap=99_999)
    first, *refused = drop.pull(jobs)
    assert isinstance(first, Pulled)
    expected = ["zero_bytes", "not_a_file", "not_a_file", "not_a_file", "missing_on_drop", "too_large"]
    assert [failure(outcome) for outcome in refused] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_file_that_existed_locally_is_neither_touched_nor_removed(drop: SftpDrop, box: Path, tmp_path: Path) -> None:
    (box / "a").write_bytes(b"new")
    (tmp_path / "taken").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("taken", "link"):
        with pytest.raises(SiteError):
            drop.pull([job(f"{box.name}/a".encode(), tmp_path / name)])
    assert (tmp_path / "taken").read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()


def test_missing_incoming_folder_stops_the_whole_call_and_leaves_nothing(
    drop: SftpDrop, box: Path, tmp_path: Path
) -> None:
    (box / "a").write_bytes(b"abc")
    remote = f"{box.name}/a".encode()
    with pytest.raises(SiteError) as caught:
        drop.pull([job(remote, tmp_path / "first"), job(remote, tmp_path / "no" / "second")])
    assert caught.value.reason == "archive_missing"
    assert list(tmp_path.iterdir()) == []
    assert isinstance(pull_one(drop, remote, tmp_path / "again"), Pulled)


def test_full_disk_is_named_and_leaves_nothing(drop: SftpDrop, box: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk here: both surface while the buffer is written."""
    (box / "small").write_bytes(b"x")
    (box / "big").write_bytes(b"x" * MIB)
    jobs = [job(f"{box.name}/{name}".encode(), tmp_path / name) for name in ("small", "big")]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limit[1]))
    try:
        with pytest.raises(SiteError) as caught:
            drop.pull(jobs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.reason == "archive_full"
    assert list(tmp_path.iterdir()) == []


def test_names_are_bytes_whatever_they_hold(drop: SftpDrop, box: Path) -> None:
    strange = {b"plain.jpg", b"caf\xe9.jpg", b"line\nbreak", b"\x1b[31mred", "Zahnärztin.pdf".encode()}
    for name in strange:
        (Path(os.fsdecode(os.fsencode(box) + b"/" + name))).write_bytes(b"x")
    found = drop.names(box.name.encode())
    assert found is not None
    assert set(found) == strange
    assert all(drop.remove([box.name.encode() + b"/" + name for name in found]))
    assert drop.names(box.name.encode()) == []


def test_long_folder_is_listed_whole(drop: SftpDrop, box: Path) -> None:
    for number in range(1500):
        (box / f"name-{number}").touch()
    found = drop.names(box.name.encode())
    assert found is not None
    assert len(set(found)) == 1500


def test_folder_that_does_not_exist_has_no_names(drop: SftpDrop) -> None:
    assert drop.names(b"no/such/folder") is None
    assert drop.names(b"") is not None


def test_look_tells_files_from_everything_else(drop: SftpDrop, box: Path) -> None:
    (box / "file").write_bytes(b"12345")
    os.utime(box / "file", (5, 1_600_000_000))
    (box / "link").symlink_to("file")
    at = box.name.encode()
    file, link, folder, nothing = drop.look([at + b"/file", at + b"/link", at, at + b"/none"])
    assert file == Seen(5, 1_600_000_000, regular=True)
    assert link is not None
    assert not link.regular
    assert folder is not None
    assert not folder.regular
    assert nothing is None


def test_remove_says_what_is_gone(drop: SftpDrop, box: Path) -> None:
    (box / "file").touch()
    (box / "empty").mkdir()
    (box / "full").mkdir()
    (box / "full" / "x").touch()
    at = box.name.encode()
    paths = [at + b"/file", at + b"/never", at + b"/empty/", at + b"/full/", at + b"/none/"]
    assert drop.remove(paths) == [True, True, True, False, True]
    assert [path.name for path in box.iterdir()] == ["full"]


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_every_usual_host_key_type_can_be_pinned(tmp_path: Path, kind: str) -> None:
    site = OpenSshSite(tmp_path, kind).start()
    try:
        drop = open_ssh_drop(site)
        assert drop.names(b".") == []
        drop.close()
    finally:
        site.stop()


def test_known_hosts_file_pins_as_well(sshd: OpenSshSite, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{sshd.port} {sshd.host_key}\n")
    drop = open_ssh_drop(sshd, host_key=None, known_hosts=known)
    assert drop.names(b".") is not None
    drop.close()


def test_other_host_key_stops_the_site_before_any_login(sshd: OpenSshSite, tmp_path: Path) -> None:
    drop = open_ssh_drop(sshd, host_key=public_part(make_key(tmp_path / "other")))
    with pytest.raises(SiteError) as caught:
        drop.look([b"x"])
    assert caught.value.reason == "host_key_changed"


def test_unknown_login_key_is_refused(sshd: OpenSshSite, tmp_path: Path) -> None:
    drop = open_ssh_drop(sshd, private_key=make_key(tmp_path / "stranger"))
    with pytest.raises(SiteError) as caught:
        drop.look([b"x"])
    assert caught.value.reason == "drop_refused"


@pytest.mark.parametrize(("offered", "pinned"), [("rsa", "ed25519"), ("ed25519", "rsa"), ("ecdsa", "ed25519")])
def test_host_key_of_another_type_than_the_pinned_one_is_another_host_key(
    tmp_path: Path, offered: str, pinned: str
) -> None:
    site = OpenSshSite(tmp_path, offered).start()
    try:
        drop = open_ssh_drop(site, host_key=public_part(make_key(tmp_path / "other", pinned)))
        with pytest.raises(SiteError, match=r"of another type.*--only host-key") as caught:
            drop.look([b"x"])
        assert caught.value.reason == "host_key_changed"
        assert "Accepted" not in (tmp_path / "sshd.log").read_text()
    finally:
        site.stop()


@pytest.mark.parametrize("change", [{"host_key": None}, {"host_key": "ssh-ed25519 ???"}, {"host_key": "nonsense"}])
def test_unusable_pin_is_a_configuration_error(sshd: OpenSshSite, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        open_ssh_drop(sshd, **change)


def test_connection_is_reused_until_it_breaks(drop: SftpDrop, box: Path, sshd: OpenSshSite) -> None:
    first = drop.names(b".")
    drop.close()
    drop.close()
    assert drop.names(b".") == first


# A site that plays tricks ------------------------------------------------------------------------------------


def test_password_login_pulls(trick: TrickSite, tmp_path: Path) -> None:
    trick.files["/a"] = TrickFile(b"content")
    drop = trick_drop(trick)
    outcome = pull_one(drop, b"a", tmp_path / "a")
    assert isinstance(outcome, Pulled)
    assert outcome.sha256 == hashlib.sha256(b"content").hexdigest()
    drop.look([b"a"])
    assert trick.connections == 1
    drop.close()


def test_wrong_password_is_refused_after_one_try(trick: TrickSite) -> None:
    with pytest.raises(SiteError) as caught:
        trick_drop(trick, password="wrong").look([b"a"])
    assert caught.value.reason == "drop_refused"
    assert trick.logins == 1


def dirty(offset: int, length: int) -> bytes | int:
    return b"z" * (length + 1)


TRICKS: dict[str, tuple[TrickFile | int, str]] = {
    "truncated": (TrickFile(b"x" * 50_000, [(100_000, 7)]), "changed_while_read"),
    "empty after all": (TrickFile(b"", [(100_000, 7)]), "changed_while_read"),
    "longer than told": (TrickFile(b"x" * 100_001, [(100_000, 7)]), "changed_while_read"),
    "grown meanwhile": (TrickFile(b"x" * 100_000, [(100_000, 7), (100_001, 7)]), "changed_while_read"),
    "rewritten meanwhile": (TrickFile(b"x" * 100_000, [(100_000, 7), (100_000, 8)]), "changed_while_read"),
    "more than asked": (TrickFile(b"x" * 100_000, read=dirty), "io_error"),
    "unreadable in the middle": (TrickFile(b"x" * 9, read=lambda *_: SFTP_FAILURE), "io_error"),
    "not to be looked at": (SFTP_PERMISSION_DENIED, "unreadable_on_drop"),
    "empty": (TrickFile(b""), "zero_bytes"),
    "over the cap": (TrickFile(b"x", [(2**40, 7)]), "too_large"),
    "a device": (TrickFile(b"x", mode=0o060600), "not_a_file"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_file_that_plays_a_trick_is_refused_and_the_next_one_pulled(
    trick: TrickSite, tmp_path: Path, name: str
) -> None:
    file, expected = TRICKS[name]
    if isinstance(file, TrickFile):
        file = TrickFile(file.content, list(file.told), file.read, file.mode)
    trick.files = {"/bad": file, "/good": TrickFile(b"good")}
    drop = trick_drop(trick)
    bad, good = drop.pull([job(b"bad", tmp_path / "bad"), job(b"good", tmp_path / "good")])
    assert failure(bad) == expected
    assert isinstance(good, Pulled)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    assert trick.connections == 1
    drop.close()


def test_what_is_not_wanted_is_never_opened(trick: TrickSite, tmp_path: Path) -> None:
    """Opening a pipe would block OpenSSH's server for ever."""
    trick.files = {"/pipe": TrickFile(b"x", mode=0o010600), "/empty": TrickFile(b"")}
    drop = trick_drop(trick)
    drop.pull([job(b"pipe", tmp_path / "1"), job(b"empty", tmp_path / "2"), job(b"gone", tmp_path / "3")])
    assert trick.opened == []
    drop.close()


def test_site_that_answers_in_small_pieces_is_read_whole(trick: TrickSite, tmp_path: Path) -> None:
    content = os.urandom(200_000)
    trick.files["/a"] = TrickFile(content, read=lambda at, n: content[at : at + min(n, 10_000)] or SFTP_EOF)
    drop = trick_drop(trick)
    assert isinstance(pull_one(drop, b"a", tmp_path / "a"), Pulled)
    assert (tmp_path / "a").read_bytes() == content
    drop.close()


@pytest.mark.parametrize("cut_at", [0, 32_768, 65_536, 99_999])
def test_connection_lost_in_a_file_is_transient_and_leaves_no_part(
    trick: TrickSite, tmp_path: Path, cut_at: int
) -> None:
    content = b"x" * 100_000

    cuts = iter([trick.cut])

    def cut(offset: int, length: int) -> bytes | int:
        if offset + length > cut_at:
            next(cuts, lambda: None)()
        return content[offset : offset + length] or SFTP_EOF

    trick.files = {"/a": TrickFile(content, read=cut), "/b": TrickFile(b"b")}
    drop = trick_drop(trick)
    outcomes = drop.pull([job(b"a", tmp_path / "a"), job(b"b", tmp_path / "b")])
    assert [type(outcome) for outcome in outcomes] == [TransientError, TransientError]
    assert list(tmp_path.iterdir()) == []
    assert isinstance(pull_one(drop, b"b", tmp_path / "b"), Pulled)
    drop.close()


def test_files_finished_before_the_cut_stay(trick: TrickSite, tmp_path: Path) -> None:
    def cut(offset: int, length: int) -> bytes | int:
        trick.cut()
        return SFTP_EOF

    trick.files = {f"/{n}": TrickFile(b"file") for n in range(40)}
    trick.files["/39"] = TrickFile(b"file", read=cut)
    ended: list[Path] = []

    def finished(some: Sequence[tuple[PullJob, Pulled | SyncdError]]) -> list[PullJob]:
        ended.extend(job.local for job, _ in some)
        return [job(b"39", tmp_path / "39")] if some and len(ended) == 39 else []

    outcomes = trick_drop(trick).pull([job(b"%d" % n, tmp_path / f"{n}") for n in range(39)], finished)
    done = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Pulled)]
    assert done == list(range(39))
    assert isinstance(outcomes[39], TransientError)
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}" for n in done}


def within(seconds: float, call: Callable[[], object]) -> None:
    """The call ends in time with a TransientError, and its threads end, too."""
    before = threading.active_count()
    began = time.monotonic()
    with pytest.raises(TransientError) as caught:
        call()
    assert time.monotonic() - began < seconds
    assert caught.value.reason == "drop_unreachable"
    while threading.active_count() > before + 3 and time.monotonic() - began < seconds + 5:
        time.sleep(0.05)
    assert threading.active_count() <= before + 3  # the site's own


@pytest.mark.parametrize("hang", ["banner", "login", "subsystem"])
def test_site_that_goes_silent_while_connecting_is_given_up(hang: str) -> None:
    site = TrickSite(hang)
    try:
        within(4, lambda: trick_drop(site).look([b"a"]))
    finally:
        site.stop()


def test_site_that_goes_silent_while_reading_is_given_up(trick: TrickSite, tmp_path: Path) -> None:
    trick.files["/a"] = TrickFile(b"x" * 9, read=lambda *_: (trick.released.wait(20), b"")[1])
    began = time.monotonic()
    outcome = pull_one(trick_drop(trick), b"a", tmp_path / "a")
    assert time.monotonic() - began < 4
    assert isinstance(outcome, TransientError)
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening_is_transient() -> None:
    site = TrickSite()
    site.stop()
    within(4, lambda: trick_drop(site).look([b"a"]))


def test_site_with_old_algorithms_only_is_explained() -> None:
    def old(transport: paramiko.Transport) -> None:
        transport.get_security_options().ciphers = ["3des-cbc"]

    site = TrickSite(configure=old)
    try:
        with pytest.raises(SiteError, match="no algorithm in common"):
            trick_drop(site).look([b"a"])
    finally:
        site.stop()


def test_remove_looks_again_where_the_site_only_says_failure(trick: TrickSite) -> None:
    trick.files = {"/stays": SFTP_PERMISSION_DENIED, "/goes": TrickFile(b"x")}
    drop = trick_drop(trick)
    assert drop.remove([b"stays", b"goes", b"never"]) == [False, True, True]
    drop.close()


def test_nothing_to_do_needs_no_connection(trick: TrickSite) -> None:
    assert trick_drop(trick).pull([]) == []
    assert trick.connections == 0
