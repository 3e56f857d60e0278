"""What OnFailure= of the units starts, `python -m syncd.alert NAME`: a service ended and is not started again.

One line in the journal that says what to do, and a notice to [notify] command. The configuration may be what is wrong:
of it only that command is looked for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from syncd import notifier, wiring
from syncd.report import iso

_REMEDIES: Final[Mapping[str, str]] = {
    "11": "another process holds the lock of this practice: end it",
    "78": "the configuration is wrong: `syncd -p {name} doctor --offline` says where; mend it",
    "243": "a credential is missing: `systemctl cat {unit}` names the files after LoadCredential; make them",
}
_OTHER: Final = "`journalctl -u {unit}` and `syncd -p {name} status` say why"


def is_started_again(unit: str) -> bool:
    """Whether systemd starts the unit again: from version 254 on it calls OnFailure= then, too (systemd.service(5),
    RestartMode=).
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ("systemctl", "show", "--property=ActiveState", "--value", unit)
        done = subprocess.run(words, capture_output=True, text=True, timeout=10.0, check=False)  # noqa: S603 - our own words
        return done.stdout.strip() not in ("failed", "inactive", "")
    return False


def message(name: str, unit: str, environ: Mapping[str, str]) -> str:
    """What ended, how, and what to do. `environ`: as systemd gives it to OnFailure= (systemd.exec(5), MONITOR_*)."""
    code = environ.get("MONITOR_EXIT_STATUS", "")
    ended = (
        f"exit code {code}" if code.isdigit() else f"{environ.get('MONITOR_SERVICE_RESULT', 'failed')} {code}".strip()
    )
    remedy = _REMEDIES.get(code, _OTHER).format(name=name, unit=unit)
    return f"{unit} ended and is not started again ({ended}): {remedy}, then `systemctl start {unit}`"


def command_of(path: Path) -> Sequence[str]:
    """[notify] command of a configuration that may be wrong elsewhere; empty where none can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        command = tomllib.loads(path.read_text("utf-8"))["notify"]["command"]
        if isinstance(command, list) and all(isinstance(word, str) for word in command):
            return command
    return ()


def main(name: str, environ: Mapping[str, str], now: float) -> None:
    """Say it in the journal and to the command."""
    unit = environ.get("MONITOR_UNIT", f"syncd@{name}.service")
    if is_started_again(unit):
        return
    said = message(name, unit, environ)
    print(f"<3>syncd {name}: {said}", file=sys.stderr)  # noqa: T201 - the journal reads it
    reason, command = "not_running", command_of(wiring.PRACTICES / name / "config.toml")
    notice = {"schema_version": 1, "kind": "trouble", "practice": name, "at": iso(now), "state": "stopped"}
    notice |= {"reason": reason, "who": "practice_it", "message": said, "reasons": [reason], "lasted_seconds": 0.0}
    if command and (problem := notifier.run_command(command, notice | {"line": f"syncd {name}: {reason}: {said}"})):
        print(f"<3>syncd {name}: [notify] command failed: {problem}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], os.environ, time.time())
