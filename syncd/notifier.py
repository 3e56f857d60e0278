"""The way out for notices: a command of the user's, which gets JSON on stdin, and a dead-man's switch that is called.

Neither is waited for by anything that matters, and what goes wrong is told as a word, never raised.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Final

PATIENCE: Final = 30.0  # seconds that a command may take
CONNECT, READ = 5.0, 10.0
ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ")  # nothing else of ours goes to somebody's script


def run_command(command: Sequence[str], notice: Mapping[str, object]) -> str:
    """Give the notice to the command; what went wrong in a word, or ""."""
    environ = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(  # noqa: S603 - the user's own command, from the configuration
            command,
            input=json.dumps(notice).encode(),
            stdout=quiet,
            stderr=quiet,
            timeout=PATIENCE,
            env=environ,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    except OSError as error:
        return type(error).__name__
    return f"exit {done.returncode}" if done.returncode else ""


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
