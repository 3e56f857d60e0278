"""Locks, pace, credentials and files as several processes meet them."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from syncd.config import Settings, parse
from syncd.errors import ConfigError, LockHeldError, SiteError
from syncd.service import Claim, Lock, PaceFile, SystemClock, Systemd, become_owner, read_credentials

HOLDING = """
import sys, pathlib
from syncd.service import Lock
with Lock(pathlib.Path(sys.argv[1]), "backfill"):
    print("held", flush=True)
    sys.stdin.read()
"""
CLAIMING = """
import json, sys, pathlib, time
from syncd.service import Claim, PaceFile, SystemClock
clock = SystemClock()
path = pathlib.Path(sys.argv[1])
pace = PaceFile(path, clock)
left = int(sys.argv[2])
while left:
    claim = pace.claim(0.05)
    if not isinstance(claim, Claim):
        time.sleep(claim)
        continue
    with claim:
        start = json.loads(path.read_text())["last_start"]
        time.sleep(0.01)
        print(start, clock.steady(), flush=True)
    left -= 1
"""
OWNER = """
import os, sys, pathlib
from syncd.service import become_owner
become_owner(pathlib.Path(sys.argv[1]))
print(os.getuid(), os.geteuid(), os.getgid(), 0 in os.getgroups())
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


class StoppedClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.epoch, self.since_boot = 1_795_000_000.0, 5000.0

    def now(self) -> float:
        return self.epoch

    def steady(self) -> float:
        return self.since_boot


def claimed(pace: PaceFile, spacing: float = 1.0) -> Claim:
    claim = pace.claim(spacing)
    assert isinstance(claim, Claim), claim
    return claim


def test_system_clock_is_the_epoch_and_never_goes_back() -> None:
    clock = SystemClock()
    assert abs(clock.now() - time.time()) < 5
    assert clock.steady() <= clock.steady()


def test_taking_the_lock_is_no_sign_of_life_of_a_service_that_ends_again_and_again(tmp_path: Path) -> None:
    with Lock(tmp_path, "run"):
        pass
    os.utime(tmp_path / "lock", (1000.0, 1000.0))
    for _ in range(3):
        with Lock(tmp_path, "run"):
            pass
    assert Lock(tmp_path).left_at() == 1000.0


def test_second_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    with start(HOLDING, tmp_path) as other:
        assert first_line(other) == "held"
        holder = Lock(tmp_path).holder()
        assert holder
        assert (holder.pid, holder.verb) == (other.pid, "backfill")
        with pytest.raises(LockHeldError, match=rf"syncd backfill.*{other.pid}"), Lock(tmp_path, "run"):
            pass
        other.send_signal(signal.SIGKILL)
    assert Lock(tmp_path).holder() is None
    with Lock(tmp_path, "run"):
        holder = Lock(tmp_path).holder()
        assert holder
        assert holder.pid == os.getpid()
    assert Lock(tmp_path).holder() is None


def test_nobody_holds_a_lock_that_was_never_taken(tmp_path: Path) -> None:
    assert Lock(tmp_path).holder() is None
    assert not (tmp_path / "lock").exists()


def test_readers_never_keep_a_starter_from_the_lock(tmp_path: Path) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            Lock(tmp_path).holder()

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(50):
            with Lock(tmp_path, "run"):
                pass
    finally:
        done.set()
        for reader in readers:
            reader.join()


def test_missing_or_unreadable_state_folder_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="ENOENT"), Lock(tmp_path / "missing"):
        pass
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SiteError, match="ELOOP"):
        Lock(tmp_path).holder()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_state_folder_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: object) -> int:
        raise OSError(code, "no room")

    monkeypatch.setattr(os, "pwrite", full)
    for work in (lambda: Lock(tmp_path).__enter__(), lambda: PaceFile(tmp_path / "pace", SystemClock()).claim(1.0)):
        with pytest.raises(SiteError, match=errno.errorcode[code]) as told:
            work()
        assert (told.value.reason, told.value.who) == ("state_full", "practice_it")


def test_requests_leave_no_closer_than_the_spacing_however_long_connecting_takes(tmp_path: Path) -> None:
    clock, spacing, early, gaps, out_at = SystemClock(), 0.05, 0, [], 0.0
    pace = PaceFile(tmp_path / "pace", clock)
    for connecting in (0.0, 0.008, 0.0, 0.002, 0.012, 0.0, 0.0):
        while not isinstance(claim := pace.claim(spacing), Claim):
            time.sleep(claim)
        with claim:
            early += 0 < clock.steady() - out_at < spacing
            time.sleep(connecting)
            claim.hold()
            gaps.append(clock.steady() - out_at)
            time.sleep(0.004)  # a request takes its time to leave
            claim.sent()
            out_at = clock.steady()
    assert min(gaps) >= spacing - 0.001  # between our two looks at the clock
    assert early  # what connecting took before was not waited for once more


def test_start_that_was_noted_a_moment_ahead_is_no_leave_to_start_at_once(tmp_path: Path) -> None:
    clock = StoppedClock()
    pace = PaceFile(tmp_path / "pace", clock)
    first = claimed(pace)
    clock.since_boot += 0.2  # connecting
    first.hold()
    first.sent()
    first.__exit__(None)
    clock.since_boot += 0.8  # the next claim comes as much earlier as connecting took; then its process is gone
    claimed(pace).__exit__(None)
    other = PaceFile(tmp_path / "pace", clock).claim(1.0)
    assert isinstance(other, float)
    assert other > 1.0


def test_wait_before_sending_is_by_the_given_clock(tmp_path: Path) -> None:
    class FastClock(StoppedClock):
        def steady(self) -> float:
            return self.since_boot + 1000 * time.monotonic()

    pace = PaceFile(tmp_path / "pace", FastClock())
    began = time.monotonic()
    for connecting in (0.05, 0.0, 0.0):
        while not isinstance(claim := pace.claim(40.0), Claim):
            time.sleep(claim / 1000)
        with claim:
            time.sleep(connecting)
            claim.hold()
            claim.sent()
    assert time.monotonic() - began < 5  # and not ten of the clock's seconds a request


def test_two_processes_and_their_threads_never_start_closer_than_the_spacing(tmp_path: Path) -> None:
    path = tmp_path / "pace"
    others = [start(CLAIMING, path, 12) for _ in range(3)]
    spans: list[tuple[float, float]] = []
    for other in others:
        output, _ = other.communicate(timeout=60)
        assert other.returncode == 0
        spans += [(float(line.split()[0]), float(line.split()[1])) for line in output.splitlines()]
    spans.sort()
    assert len(spans) == 36
    assert all(later[0] - earlier[0] >= 0.05 - 1e-9 for earlier, later in pairwise(spans))
    assert all(later[0] >= earlier[1] for earlier, later in pairwise(spans))  # one in flight
    assert PaceFile(path, SystemClock()).counts().requests_today == 36


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    pace, in_flight, most = PaceFile(tmp_path / "pace", SystemClock()), [0], [0]

    def work() -> None:
        for _ in range(5):
            while not isinstance(claim := pace.claim(0.001), Claim):
                time.sleep(claim)
            with claim:
                in_flight[0] += 1
                most[0] = max(most[0], in_flight[0])
                time.sleep(0.002)
                in_flight[0] -= 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1]
    assert pace.counts().requests_today == 20


def test_start_is_on_file_before_the_request(tmp_path: Path) -> None:
    clock = StoppedClock()
    path = tmp_path / "pace"
    with claimed(PaceFile(path, clock)):
        after_a_crash = tmp_path / "copy"
        after_a_crash.write_bytes(path.read_bytes())
    assert PaceFile(after_a_crash, clock).claim(1.0) == 1.0


def test_other_process_in_flight_means_a_short_wait(tmp_path: Path) -> None:
    pace = PaceFile(tmp_path / "pace", StoppedClock())
    with claimed(pace):
        wait = pace.claim(1.0)
        assert isinstance(wait, float)
        assert 0 < wait <= 0.05


def test_throttled_answer_holds_back_every_later_claim(tmp_path: Path) -> None:
    clock = StoppedClock()
    with claimed(PaceFile(tmp_path / "pace", clock)) as claim:
        claim.throttled(90.0)
    assert PaceFile(tmp_path / "pace", clock).claim(1.0) == 90.0
    assert PaceFile(tmp_path / "pace", clock).counts().throttled_today == 1


def test_failed_request_does_not_end_throttling_but_a_good_one_does(tmp_path: Path) -> None:
    clock, path = StoppedClock(), tmp_path / "pace"
    pace = PaceFile(path, clock)
    for expected in (5.0, 10.0):
        with claimed(pace) as claim:
            claim.throttled(None)
        assert pace.claim(1.0) == expected
        clock.since_boot += expected
        with pytest.raises(RuntimeError), claimed(pace):
            raise RuntimeError
        clock.since_boot += 1
    with claimed(pace):
        pass
    clock.since_boot += 1
    with claimed(pace) as claim:
        claim.throttled(None)
    assert pace.claim(1.0) == 5.0


def test_counts_are_of_today_and_zero_without_a_file(tmp_path: Path) -> None:
    clock = StoppedClock()
    pace = PaceFile(tmp_path / "pace", clock)
    assert pace.counts().requests_today == 0
    with claimed(pace):
        pass
    assert pace.counts().requests_today == 1
    clock.epoch += 86_400
    assert pace.counts().requests_today == 0


def test_pace_that_cannot_be_kept_allows_no_request(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="ENOENT"):
        PaceFile(tmp_path / "missing" / "pace", StoppedClock()).claim(1.0)


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_each_word(tmp_path: Path, abstract: bool) -> None:
    name = f"@syncd-{secrets.token_hex(8)}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("\0" + name[1:] if abstract else name)
        supervisor.settimeout(10)
        systemd = Systemd({"NOTIFY_SOCKET": name})
        systemd.ready()
        systemd.status("two\nlines")
        systemd.watchdog()
        systemd.stopping()
        heard = [supervisor.recv(100) for _ in range(4)]
    assert heard == [b"READY=1", b"STATUS=two lines", b"WATCHDOG=1", b"STOPPING=1"]
    systemd.watchdog()  # nobody listens any more: no error


def test_without_systemd_nothing_is_said() -> None:
    Systemd({}).ready()


def settings(folder: Path, private_key: bool = False, credentials: Path | None = None) -> Settings:
    text = f"""
    [practice]
    time_zone = "UTC"
    [drop]
    host = "sftp.example.org"
    username = "x"
    known_hosts_file = "known_hosts"
    {'private_key_file = "id"' if private_key else ""}
    [archive]
    path = "/srv/archive"
    """
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)} if credentials else {}
    return parse(text, name="main", folder=folder, environ=environ)


def put(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text, "utf-8")
    path.chmod(mode)


def put_all(folder: Path, mode: int = 0o600) -> None:
    put(folder / "developer_key", "canary-developer\n", mode)
    put(folder / "customer_key", " canary-customer ", mode)
    put(folder / "sftp_password", "canary pass word\n", mode)


def test_credentials_are_read_and_never_shown(tmp_path: Path) -> None:
    put_all(tmp_path)
    put(tmp_path / "id", "-----BEGIN\nKEY\n-----END\n")
    found = read_credentials(settings(tmp_path, private_key=True))
    assert (found.developer_key, found.customer_key) == ("canary-developer", "canary-customer")
    assert (found.drop_password, found.private_key_path) == ("canary pass word", tmp_path / "id")
    assert "canary" not in repr(found)
    assert read_credentials(settings(tmp_path)).private_key_path is None


def test_all_credential_problems_come_at_once_without_any_content(tmp_path: Path) -> None:
    put(tmp_path / "developer_key", "canary", 0o640)
    put(tmp_path / "customer_key", "\n")
    (tmp_path / "sftp_password").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_credentials(settings(tmp_path, private_key=True))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "[api] developer_key_file",
        "[api] customer_key_file",
        "[drop] password_file",
        "[drop] private_key_file",
    ]
    assert "chmod 600" in caught.value.problems[0]
    assert "empty" in caught.value.problems[1]
    assert "regular" in caught.value.problems[2]
    assert "no such file" in caught.value.problems[3]
    assert "canary" not in str(caught.value)


def test_fifo_and_second_line_are_no_credentials(tmp_path: Path) -> None:
    put_all(tmp_path)
    put(tmp_path / "developer_key", "canary\nInjected: header")
    (tmp_path / "customer_key").unlink()
    os.mkfifo(tmp_path / "customer_key", 0o600)
    with pytest.raises(ConfigError) as caught:
        read_credentials(settings(tmp_path))
    assert "one line" in caught.value.problems[0]
    assert "regular" in caught.value.problems[1]
    assert "canary" not in str(caught.value)


def test_modes_do_not_count_below_the_folder_that_systemd_made(tmp_path: Path) -> None:
    given, beside = tmp_path / "credentials", tmp_path / "etc"
    given.mkdir()
    beside.mkdir()
    put_all(given, 0o440)
    put(beside / "developer_key", "the other one")
    assert read_credentials(settings(beside, credentials=given)).developer_key == "canary-developer"
    (given / "developer_key").unlink()
    assert read_credentials(settings(beside, credentials=given)).developer_key == "the other one"


def test_process_ends_up_as_owner_of_the_state_folder(tmp_path: Path) -> None:
    owner = 65_534 if os.geteuid() == 0 else os.geteuid()
    os.chown(tmp_path, owner, -1)
    with start(OWNER, tmp_path) as child:
        uid, effective, _, is_in_root_group = first_line(child).split()
    assert (int(uid), int(effective)) == (owner, owner)
    assert is_in_root_group == "False"


def test_folder_of_root_or_none_changes_no_user(tmp_path: Path) -> None:
    before = os.getresuid(), os.getresgid()
    become_owner(tmp_path / "missing")
    become_owner(Path("/"))
    assert (os.getresuid(), os.getresgid()) == before
