"""One `syncd setup` that dies before each step of its writing: `python -m tests.setup_steps ROOT WORDS...`.

Everything up to the first step is done once. There the process forks, once for each step to die at; what then stands
below ROOT/etc is printed as a line of JSON, and put back as it was. The last line is of the one that came to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from syncd import setup
from syncd.cli import cli

KILLED = 9
STEPS = {
    "open",
    "os.mkdir",
    "os.link",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "subprocess.Popen",
}


class Steps:
    """An audit hook: `limit` is the step to die before, None until the writing begins; -1: nobody counts."""

    def __init__(self, root: Path) -> None:
        self._etc, self._kept = root / "etc", root.with_name("kept")
        self.limit: int | None = None
        self._seen = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.limit is None and event == "os.mkdir" and str(arguments[0]).startswith(str(self._etc)):
            self._die_everywhere()  # not in a Popen: its pipes would stay open here
        if event in STEPS and self.limit is not None and self.limit >= 0:
            if self._seen == self.limit:
                os._exit(KILLED)
            self._seen += 1

    def _die_everywhere(self) -> None:
        self.limit = -1
        if self._etc.exists():
            shutil.copytree(self._etc, self._kept)
        for step in range(10_000):
            if (child := os.fork()) == 0:
                self.limit = step
                return
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(1, json.dumps(self._stands()).encode() + b"\n")
            if code != KILLED:
                os._exit(code)
            shutil.rmtree(self._etc, ignore_errors=True)
            if self._kept.exists():
                shutil.copytree(self._kept, self._etc)

    def _stands(self) -> dict[str, str]:
        files = (path for path in sorted(self._etc.rglob("*")) if path.is_file())
        return {str(path.relative_to(self._etc)): path.read_text() for path in files}


if __name__ == "__main__":
    places = setup.Places(Path(sys.argv[1]), os.geteuid())
    setup.PLACES = places  # type: ignore[misc]  # a scratch root
    sys.addaudithook(Steps(places.root))
    os._exit(CliRunner().invoke(cli, ["setup", *sys.argv[2:]]).exit_code)
