"""Debian's Chromium without a screen, driven over plain WebDriver, and what it asked for and complained of."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--no-proxy-server"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Escape": "\ue00c", "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015", "Enter": "\ue007"}


class Browser:
    """One session of one window."""

    def __init__(self, port: int, profile: Path) -> None:
        self._http = requests.Session()
        self._http.trust_env = False
        self._url = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        started = self.ask("/session", capabilities={"alwaysMatch": wanted})
        self._url += f"/session/{started['sessionId']}"

    def ask(self, path: str, method: str = "POST", **body: Any) -> Any:
        answer = self._http.request(method, self._url + path, json=body if method == "POST" else None, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, value
        return value

    def close(self) -> None:
        self.ask("", "DELETE")

    def open(self, page: Path) -> None:
        self.ask("/url", url=page.as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        """What the script returns: it runs in the page, past the page's own policy."""
        return self.ask("/execute/sync", script=script, args=list(arguments))

    def press(self, *keys: str) -> None:
        """On the keyboard: letters, or names of KEYS."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def click(self, selector: str) -> None:
        found = self.ask("/element", using="css selector", value=selector)
        self.ask(f"/element/{found[ELEMENT]}/click")

    def wait(self, script: str, *arguments: object, seconds: float = 30.0) -> Any:
        """Until the script returns something that is true."""
        deadline = time.monotonic() + seconds
        while not (said := self.run(script, *arguments)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)
        return said

    def resize(self, width: int, height: int) -> None:
        self.ask("/window/rect", width=width, height=height)

    def picture(self) -> bytes:
        return base64.b64decode(self.ask("/screenshot", "GET"))

    def print(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self.ask("/print", background=True))

    def complaints(self) -> list[str]:
        """What stands in the console since the last time."""
        return [each["message"] for each in self.ask("/se/log", type="browser")]

    def requested(self) -> list[str]:
        """Every address that was asked for since the last time."""
        events = [json.loads(each["message"])["message"] for each in self.ask("/se/log", type="performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in the folder. Skips where there is none, but fails in CI."""
    if DRIVER is None or CHROMIUM is None:
        assert not os.environ.get("CI"), "chromium and chromium-driver are missing"
        pytest.skip("needs chromium and chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HOME": str(folder)}
    driver = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=OFF"], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(port)
        window = Browser(port, folder / "profile")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(20)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30.0
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "chromedriver does not listen"
            time.sleep(0.05)
