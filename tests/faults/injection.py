"""The library of fault.c: built, preloaded into a process, and armed there.

Only a program that was started with it loaded (`environment`) can be armed; everything it forks can be, too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

KILLED: Final = 86  # the exit status of a process that died where it was told to
FOR_EVER: Final = 1 << 40
HALFWAY: Final = b"h"  # what a watcher hears inside a torn write
TORN: Final = b"t"  # its answer: do this write by halves, and say so in between
GO_ON: Final = b"g"
_SOURCE: Final = Path(__file__).with_name("fault.c")


class CompilerMissingError(Exception):
    """This machine has no C compiler: apt install gcc."""


def build(folder: Path) -> Path:
    """Compile the library into a folder; its path. Raises CompilerMissingError."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise CompilerMissingError
    library = folder / "libfault.so"
    options = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-result")
    subprocess.run([compiler, *options, "-o", str(library), str(_SOURCE), "-ldl"], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """The environment of a program that shall have the library; it writes no compiled modules, which would count."""
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONDONTWRITEBYTECODE": "1"}


class Injection:
    """The library in this very process. Raises AttributeError where it was not preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fault_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        self._library.fault_arm.restype = None
        self._library.fault_watch.argtypes, self._library.fault_watch.restype = [ctypes.c_int], None
        for name in ("fault_calls", "fault_failed", "fault_resynced"):
            getattr(self._library, name).restype = ctypes.c_long
        self._library.fault_kinds.restype = ctypes.POINTER(ctypes.c_char)

    def die_at(self, call: int, torn: bool = False) -> None:
        """End this process at its n-th call from now on (0: never); `torn`: after half of it, if it is a write."""
        self._library.fault_arm(call, int(torn), 0, 0, 0)

    def watch(self, socket: int) -> None:
        """Before each call from now on, tell its kind on a socket and wait for an answer, a byte; TORN: see there."""
        self._library.fault_watch(socket)

    def fail_at(self, call: int, code: int, lasting: bool) -> None:
        """Let the n-th call from now on fail with an errno; `lasting`: and every one after it."""
        self._library.fault_arm(0, 0, call, FOR_EVER if lasting else call, code)

    def disarm(self) -> None:
        """Let everything pass, and count no more."""
        self._library.fault_disarm()

    def kinds(self) -> str:
        """The calls since it was armed, a letter each: `enum kind` of fault.c; "w" is a write."""
        kinds: bytes = self._library.fault_kinds()[: self._library.fault_calls()]
        return kinds.decode()

    @property
    def failed(self) -> int:
        """How many calls were made to fail since it was armed."""
        return int(self._library.fault_failed())

    @property
    def resynced(self) -> int:
        """How many files were synced again on a descriptor whose sync had failed; the index's are SQLite's affair."""
        return int(self._library.fault_resynced())
