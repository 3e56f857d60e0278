"""The ways out to programs of the user's, which get JSON on stdin, and to a dead-man's switch that is called.

None is waited for by anything that matters, and what goes wrong is told as a word, never raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Final

PATIENCE: Final = 30.0  # seconds that a command may take
GLANCE: Final = 0.25
CONNECT, READ = 5.0, 10.0
ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ")  # nothing else of ours goes to somebody's script


def run_command(
    command: Sequence[str],
    told: Mapping[str, object],
    patience: float | None = None,
    end: str = "",
    over: Callable[[], bool] = lambda: False,
) -> str:
    """Give a JSON object, and `end`, to the command; what went wrong in a word, or "".

    After `patience` seconds (PATIENCE), or as soon as `over` says so, it is killed with all that it started.
    """
    environ = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
    quiet, deadline = subprocess.DEVNULL, time.monotonic() + (PATIENCE if patience is None else patience)
    try:
        process = subprocess.Popen(  # noqa: S603 - the user's own command, from the configuration
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=environ, start_new_session=True
        )
    except OSError as error:
        return type(error).__name__
    content: bytes | None = (json.dumps(told) + end).encode()
    with process:
        try:
            while not over() and (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(content, timeout=min(GLANCE, left))
                    return f"exit {process.returncode}" if process.returncode else ""
                content = None  # it goes on with what is left of it
            return "timeout"
        finally:
            if process.poll() is None:  # a session of its own: all that it started is in its group
                os.killpg(process.pid, signal.SIGKILL)


def call_switch(url: str) -> str:
    """GET the address; what went wrong in a word, or "". TLS is verified, no proxy, no redirect, no body is read."""
    import requests  # noqa: PLC0415 - costs more time than `status`, which tells nobody
    from requests.adapters import HTTPAdapter  # noqa: PLC0415 - the same

    try:
        asked = requests.Request("GET", url, headers={"User-Agent": "syncd", "Connection": "close"}).prepare()
        with closing(HTTPAdapter()) as wire, wire.send(asked, stream=True, timeout=(CONNECT, READ)) as answer:
            good = answer.status_code // 100 == 2  # noqa: PLR2004 - a class of statuses
            return "" if good else f"HTTP {answer.status_code}"
    except requests.RequestException as error:
        return type(error).__name__
