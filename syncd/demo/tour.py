"""What `syncd demo` shows: an invented practice in this process, and syncd beside it, called as a user calls it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from syncd import wiring
from syncd.backfill import Stop
from syncd.catalog import Catalog, Row
from syncd.config import Settings
from syncd.demo.build import Past
from syncd.demo.practice import Practice
from syncd.demo.simulation import Simulation
from syncd.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_OWED, EXIT_TERMINATED
from syncd.model import Item
from syncd.search import Filters
from syncd.service import Lock

POLL: Final = 0.2
Emit = Callable[[str], None]
Change = tuple[str, Item, str]  # in words, the item to look for, and what its newest row then says


class Tour:
    """One demonstration. `quiet`: without the progress of the backfill."""

    def __init__(self, quiet: bool, stop: Stop, emit: Emit) -> None:
        self._stop, self._emit, self._quiet = stop, emit, quiet
        self._line = [sys.executable, "-m", "syncd.cli"]

    def show(self, patients: int) -> int:
        """Mirror an invented practice, then let it change; 0 when every change arrived and nothing is owed."""
        past = Past(documents=7.0, sheets=2.0, sigma=0.7)
        simulation = Simulation.start(patients, seed=5, interval=0.05, past=past)
        with simulation, tempfile.TemporaryDirectory(prefix="syncd-") as folder:
            file = simulation.write_config(Path(folder) / "demo", sync={"vanish_after": "1s"})
            self._line += ["-c", str(file)]
            settings = wiring.load(file, {})
            settings.archive.path.mkdir(mode=0o700)
            self._emit(
                f"A simulated practice with {patients} invented patients; one request every 0.05 s.\n\nbackfill:"
            )
            code = self._mirror() or self._live(settings, simulation.practice)
        if self._stop.asked:
            return EXIT_TERMINATED if self._stop.terminated else EXIT_INTERRUPTED
        return code

    def _mirror(self) -> int:
        with self._running(*(["-q"] if self._quiet else []), "backfill", stdout=subprocess.PIPE) as backfill:
            if not self._wait(lambda: backfill.poll() is not None, seconds=600.0):
                return EXIT_OWED
            self._emit(backfill.communicate()[0])
        return backfill.returncode

    def _live(self, settings: Settings, practice: Practice) -> int:
        with self._running("-q", "run"), contextlib.closing(wiring.open_index(settings)) as index:
            self._wait(lambda: Lock(settings.state_path).holder() is not None, seconds=20.0)
            self._emit("\nthe practice goes on working; each change, and when it was in the archive:")
            if not self._all_arrive(practice, Catalog(index, settings.name, settings.sync.kinds)):
                return EXIT_OWED
            self._emit("\n" + self._said("status"))
            return EXIT_OWED if json.loads(self._said("status", "--json"))["owed"] else EXIT_OK

    @contextlib.contextmanager
    def _running(self, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen([*self._line, *words], text=True, **options) as process:  # noqa: S603 - syncd itself
            try:
                yield process
            finally:
                process.terminate()

    def _said(self, *words: str) -> str:
        line = [*self._line, *words]
        return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603 - syncd itself

    def _wait(self, there: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not there():
            if time.monotonic() > deadline or self._stop.wait(POLL):
                return False
        return True

    def _all_arrive(self, practice: Practice, catalog: Catalog) -> bool:
        """Tell each change when it is in the archive; False when one was not after a minute."""
        rows = catalog.find(Filters(kind="document", current=True))
        archived = [row for row in rows if row["state"] == "archived"]
        pending = [(time.monotonic(), *change) for change in _changes(practice, archived)]

        def all_arrived() -> bool:
            for change in list(pending):
                since, words, item, becomes = change
                if any(becomes in (row["state"], f"version {row['version']}") for row in catalog.show(item)):
                    pending.remove(change)
                    self._emit(f"  {time.monotonic() - since:5.1f} s  {words}: {item.full_id} {becomes}")
            return not pending

        return self._wait(all_arrived, seconds=60.0)


def _changes(practice: Practice, archived: Sequence[Row]) -> Iterator[Change]:
    """Change the practice, one step at each `next`. `archived`: rows of documents, as `find` has them."""
    edited, deleted, moved = (archived[len(archived) * part // 4] for part in (1, 2, 3))
    here, there = edited["pat_num"], deleted["pat_num"]
    yield "a new X-ray", Item(here, "document", practice.add_document(here, "jpg", description="Bitewing")), "archived"
    practice.replace_bytes(edited["num"])
    yield "an image was edited", Item(here, "document", edited["num"]), "version 2"
    practice.delete_document(deleted["num"])
    yield "a document was deleted", Item(there, "document", deleted["num"]), "vanished"
    new_number = practice.move_document(moved["num"], there)
    yield "a scan was moved to another patient", Item(there, "document", new_number), "archived"
    yield "a form was filled in", Item(here, "sheet", practice.add_sheet(here)), "archived"
    yield "a mount with four images", Item(there, "mount", practice.add_mount(there, 4)), "archived"
