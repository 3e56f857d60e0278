"""The whole test run is searched for what syncd must never say: when it ends, every log, status file and archive path
that any test left behind, and everything that was printed on stderr. One hit fails the run.

Searched for are the invented names and texts of `syncd/demo/people.py`, staged names, and the secrets that lie in the
tests' own credential files. Private by design, and not searched: the index, sidecars, patient.json, stdout.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from syncd.demo.people import FIRST, IMAGES, LAST, PAPERS

SHORTEST = 5  # letters: shorter ones are found by chance
SPOKEN = re.compile(r".*/(syncd\.log[^/]*|status\.log[^/]*|status\.json|audit/[^/]*\.log)")  # of the paths in a run
CREDENTIALS = ("developer_key", "customer_key", "sftp_password")
STAGED = r"syncd-[a-z0-9-]+-[0-9]{8}-[0-9a-f]{32}"
MARKER = ".syncd-archive"

RAM_DISK = Path("/dev/shm")  # where there is one: hundreds of archives on it wait for no disk

_printed: list[tuple[str, str]] = []

settings.register_profile("untimed", deadline=None)  # the machines are shared: slow is not wrong
settings.load_profile("untimed")

os.environ.pop("SUDO_UID", None)  # `sudo make test`: what the tests export stays root's
if os.access(RAM_DISK, os.W_OK):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(RAM_DISK))


def secrets_of(folder: Path) -> set[str]:
    """What stands in the credential files below a folder."""
    found = (path for name in CREDENTIALS for path in folder.rglob(name) if path.is_file())
    return {text for path in found if len(text := path.read_text("utf-8", "replace").strip()) > SHORTEST}


def spoken(folder: Path) -> Iterator[tuple[str, str]]:
    """Everything that was said below a folder, and where: logs, status files, the paths of archives."""
    for place, _, files in os.walk(folder):  # once: there are hundreds of thousands
        for path in filter(SPOKEN.fullmatch, (f"{place}/{name}" for name in files)):
            if Path(path).is_file():
                yield path, Path(path).read_text("utf-8", "replace")
        if MARKER in files:
            yield place, "\n".join(name for _, *both in os.walk(place) for names in both for name in names)


def leaks(said: Iterator[tuple[str, str]], secrets: set[str]) -> list[str]:
    """Where which text was found."""
    words = [re.escape(text) for text in (*FIRST, *LAST, *IMAGES, *PAPERS, *secrets) if len(text) >= SHORTEST]
    pattern = re.compile(rf"{STAGED}|(?<![A-Za-z])(?:{'|'.join(words)})(?![A-Za-z])")
    return [f"{where}: {found[0]!r}" for where, text in said if (found := pattern.search(text))]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: else one worker may work on when all others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what one test printed on stderr."""
    _printed.extend((f"stderr of {report.nodeid}", text) for name, text in report.sections if "stderr" in name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Search what the tests left behind, those of all workers at once."""
    if hasattr(session.config, "workerinput"):
        return
    folder = session.config._tmp_path_factory._basetemp  # type: ignore[attr-defined]  # the factory has no public way to ask without making it
    found = leaks(iter(_printed), set())
    if folder is not None:
        found += leaks(spoken(folder), secrets_of(folder))
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        raise pytest.UsageError("the test run said what syncd must never say:\n" + "\n".join(found))
    if folder is not None and session.exitstatus == pytest.ExitCode.OK and folder.is_relative_to(RAM_DISK):
        shutil.rmtree(folder, ignore_errors=True)  # it is memory
