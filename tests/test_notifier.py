"""How notices leave the machine: a real command, a real address on loopback, and the daemon that sends them."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from syncd import notifier
from syncd.daemon import SWITCH_EVERY, Bell
from syncd.demo.clock import SimulatedClock
from syncd.index import Index
from syncd.notifier import call_switch, run_command
from syncd.report import DAY, HOUR, Report
from tests.wire import listening
from tests.world import START, RecordedLog, make_settings

NOTICE = {"schema_version": 1, "kind": "trouble", "line": "syncd main: key_refused: put the new key in"}


def script(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def saying(status: str, requests: list[bytes]) -> Callable[[socket.socket], None]:
    def talk(link: socket.socket) -> None:
        requests.append(link.recv(65536))
        link.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nLocation: http://127.0.0.1:1/\r\n\r\n".encode())

    return talk


# --- the command


def test_command_gets_the_notice_as_json_on_stdin(tmp_path: Path) -> None:
    assert run_command(script(f"cat > {tmp_path}/notice"), NOTICE) == ""
    assert json.loads((tmp_path / "notice").read_text()) == NOTICE


def test_what_goes_wrong_with_a_command_is_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(script("exit 3"), NOTICE) == "exit 3"
    assert run_command([str(tmp_path / "missing")], NOTICE) == "FileNotFoundError"
    monkeypatch.setattr(notifier, "PATIENCE", 0.2)
    assert run_command(script("exec sleep 60"), NOTICE) == "timeout"


def test_command_is_not_shown_where_the_keys_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/syncd@main.service")
    assert run_command(script(f"env > {tmp_path}/env"), NOTICE) == ""
    assert "CREDENTIALS" not in (tmp_path / "env").read_text()
    assert "PATH=" in (tmp_path / "env").read_text()


# --- the switch


def test_switch_is_called_without_a_proxy_and_says_nothing_of_us(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bytes] = []
    with listening(saying("200 OK", requests)) as port:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        assert call_switch(f"http://127.0.0.1:{port}/alive?x=1") == ""
    assert requests[0].startswith(b"GET /alive?x=1 HTTP/1.1\r\n")
    assert b"User-Agent: syncd\r\n" in requests[0]


@pytest.mark.parametrize("status", ["500 No", "302 Found", "404 Not Found"])
def test_answer_that_is_no_yes_is_told_and_no_redirect_followed(status: str) -> None:
    with listening(saying(status, [])) as port:
        assert call_switch(f"http://127.0.0.1:{port}/") == f"HTTP {status[:3]}"


def test_switch_that_nobody_answers_is_told() -> None:
    assert call_switch("http://127.0.0.1:1/") == "ConnectionError"


# --- the bell


class Post:
    """A bell whose command and switch write down what they get."""

    def __init__(self, folder: Path, **notify: object) -> None:
        self.letters, self.clock, self.log = folder / "letters", SimulatedClock(START), RecordedLog()
        self.settings = make_settings(folder, 1.0, {"notify": {"after": "30m", **notify}})
        self.index = Index(folder / "index.db")
        self.bell = self.again()

    def again(self) -> Bell:
        """As after a restart."""
        return Bell(self.settings, self.clock, self.log, self.index)

    def see(self, hours: float, state: str, reason: str, healthy: bool = False) -> None:
        named = {"practice": "main", "at": "", "who": "integrator", "message": "put the new key in", "healthy": healthy}
        said: Report = {**named, "state": state, "reason": reason}
        for _ in range(round(hours * 60)):
            self.clock.advance(60.0)
            self.bell.look(said)

    def kinds(self, wanted: int) -> list[str]:
        """What arrived, once there are so many; they are sent in a thread of their own."""
        deadline = time.monotonic() + 10
        while len(found := self._read()) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        return [str(each["kind"]) for each in found]

    def _read(self) -> list[dict[str, object]]:
        with contextlib.suppress(OSError, ValueError):
            return [json.loads(line) for line in self.letters.read_text().splitlines()]
        return []


def test_trouble_and_its_end_are_told_once_over_restarts(tmp_path: Path) -> None:
    post = Post(tmp_path, command=script(f"cat >> {tmp_path}/letters; echo >> {tmp_path}/letters"))
    post.see(1, "blocked", "key_refused")
    post.bell = post.again()
    post.see(1, "blocked", "key_refused")
    post.bell = post.again()
    post.see(1, "ok", "ok", healthy=True)
    assert post.kinds(2) == ["trouble", "recovered"]
    assert [line["now"] for line in post.log.events("notice_sent")] == ["trouble", "recovered"]


def test_notice_whose_command_failed_is_sent_again_after_a_quarter_of_an_hour(tmp_path: Path) -> None:
    post = Post(tmp_path, command=script(f"cat >> {tmp_path}/letters; echo >> {tmp_path}/letters; exit 1"))
    post.see(0.6, "blocked", "key_refused")
    deadline = time.monotonic() + 10
    while not post.log.events("notice_failed") and time.monotonic() < deadline:
        time.sleep(0.02)
    post.see(0.2, "blocked", "key_refused")
    assert post.kinds(1) == ["trouble"]
    post.see(0.1, "blocked", "key_refused")
    assert post.kinds(2) == ["trouble", "reminder"]


def test_switch_is_called_each_quarter_of_an_hour_while_all_is_well(tmp_path: Path) -> None:
    requests: list[bytes] = []
    with listening(saying("200 OK", requests)) as port:
        post = Post(tmp_path, ping_url=f"http://127.0.0.1:{port}/")
        post.see(1, "ok", "ok", healthy=True)
        post.see(3, "blocked", "key_refused")
        deadline = time.monotonic() + 10
        while len(requests) < HOUR / SWITCH_EVERY and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(requests) == HOUR / SWITCH_EVERY
    assert post.log.lines == []


def test_notifier_that_fails_is_only_logged(tmp_path: Path) -> None:
    post = Post(tmp_path, command=script("exit 4"), ping_url="http://127.0.0.1:1/")
    post.see(0.1, "degraded", "archive_damaged", healthy=True)
    deadline = time.monotonic() + 10
    while len(post.log.events("notice_failed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    told = {(line["mode"], line["failure"]) for line in post.log.events("notice_failed")}
    assert told == {("command", "exit 4"), ("ping_url", "ConnectionError")}


def test_trouble_with_the_index_itself_is_told(tmp_path: Path) -> None:
    post = Post(tmp_path, command=script(f"cat >> {tmp_path}/letters; echo >> {tmp_path}/letters"))
    post.index.db.execute("PRAGMA query_only=ON")  # no write succeeds any more
    post.see(1, "blocked", "disk_error")
    assert post.kinds(1) == ["trouble"]


def test_without_an_index_trouble_is_told_all_the_same(tmp_path: Path) -> None:
    post = Post(tmp_path, command=script(f"cat >> {tmp_path}/letters; echo >> {tmp_path}/letters"))
    post.bell = Bell(post.settings, post.clock, post.log, None)
    post.see(DAY / HOUR + 1, "blocked", "index_lost")
    assert post.kinds(2) == ["trouble", "reminder"]
