"""What the units call with `python -m syncd.alert NAME`: OnFailure= when a service ended and is not started again,
ExecStopPost= whenever it ends, so that one that ends again and again is told, too.

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
    "11": "another process holds the lock of this practice: the service goes on once it has ended",
    "78": "the configuration is wrong: `syncd -p {name} doctor --offline` says where; mend it",
    "243": "a credential is missing: `systemctl cat {unit}` names the files after LoadCredential; make them",
}
_EARLY: Final[Mapping[str, str]] = {  # a backfill's
    "3": "it finished, and something is owed or failing: `syncd -p {name} status --failing` names it",
    "5": "Open Dental or the SFTP site was not available: `syncd -p {name} status` says which",
    "6": "somebody has to approve what is held: see `syncd -p {name} held`",
    "9": "it stopped at a limit",
    "11": "another process holds the lock of this practice",
}
_OTHER: Final = "`journalctl -u {unit}` and `syncd -p {name} status` say why"
TOLD_AFTER: Final = 5  # restarts, and then after twice as many each time: systemd counts on through good months
KEPT_OUT: Final = 1000  # restarts, a night of them: before that nobody need know that a backfill holds the lock


def shown(unit: str, name: str) -> str:
    """What `systemctl show` has of a unit's property; empty where it says nothing."""
    words = ("systemctl", "show", f"--property={name}", "--value", unit)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10.0, check=False)  # noqa: S603 - our own words
        return done.stdout.strip()
    return ""


def restarts(unit: str, environ: Mapping[str, str]) -> int | None:
    """How often systemd started the unit again by now; 0: it does not do so any more; None: nobody need be told.

    From version 254 on systemd calls OnFailure= also before it starts a unit again (systemd.service(5), RestartMode=).
    """
    if "SERVICE_RESULT" not in environ:  # called by OnFailure=
        return 0 if shown(unit, "ActiveState") in ("failed", "inactive", "") else None
    count = int(shown(unit, "NRestarts") or 0)
    counted = Path(environ.get("STATE_DIRECTORY", "/nonexistent"), "kept_out")  # restarts, when last kept out
    with contextlib.suppress(OSError, ValueError):
        if environ.get("EXIT_STATUS") == "11":
            counted.write_text(f"{count}\n", "ascii")
        else:
            before = int(counted.read_text("ascii"))
            count -= before if before <= count else 0
    if environ.get("EXIT_STATUS") == "11" and count < KEPT_OUT:
        return None
    times, rest = divmod(count, TOLD_AFTER)
    return count if environ["SERVICE_RESULT"] != "success" and not rest and times.bit_count() == 1 else None


def message(name: str, unit: str, environ: Mapping[str, str], count: int = 0) -> str:
    """What ended, how, and what to do. `environ`: as systemd gives it to OnFailure= (systemd.exec(5), MONITOR_*) or
    ExecStopPost= ($SERVICE_RESULT, $EXIT_STATUS). `count`: of restarts.
    """
    code = environ.get("MONITOR_EXIT_STATUS") or environ.get("EXIT_STATUS", "")
    result = environ.get("MONITOR_SERVICE_RESULT") or environ.get("SERVICE_RESULT", "failed")
    ended = f"exit code {code}" if code.isdigit() else f"{result} {code}".strip()
    remedies = {**_REMEDIES, **_EARLY} if is_backfill(unit) else _REMEDIES
    remedy = remedies.get(code, _OTHER).format(name=name, unit=unit)
    if is_backfill(unit):
        return f"{unit} ended before all was done ({ended}): {remedy}, then `systemctl start {unit}` goes on"
    if count:
        return f"{unit} ends again and again ({count} restarts, the last end: {ended}): {remedy}"
    return f"{unit} ended and is not started again ({ended}): {remedy}, then `systemctl start {unit}`"


def is_backfill(unit: str) -> bool:
    """Whether it ends by itself."""
    return unit.startswith("syncd-backfill@")


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
    count = restarts(unit, environ)
    if count is None:
        return
    said = message(name, unit, environ, count)
    print(f"<3>syncd {name}: {said}", file=sys.stderr)  # noqa: T201 - the journal reads it
    command = command_of(wiring.PRACTICES / name / "config.toml")
    state, reason = ("degraded", "backfill_unfinished") if is_backfill(unit) else ("stopped", "not_running")
    notice = {"schema_version": 1, "kind": "trouble", "practice": name, "at": iso(now), "state": state}
    notice |= {"reason": reason, "who": "practice_it", "message": said, "reasons": [reason], "lasted_seconds": 0.0}
    if command and (problem := notifier.run_command(command, notice | {"line": f"syncd {name}: {reason}: {said}"})):
        print(f"<3>syncd {name}: [notify] command failed: {problem}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], os.environ, time.time())
