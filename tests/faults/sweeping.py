"""How the tests run fork servers: one shard a test, its figures as a line at the end, its failures with a replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.faults.injection import CompilerMissingError, build, environment
from tests.faults.points import Report

ROOT: Final = Path(__file__).parents[2]
NIGHTLY: Final = os.environ.get("SYNCD_FAULTS") == "nightly"
POINT: Final = os.environ.get("SYNCD_FAULT_POINT", "")  # replay only this one
SHARDS: Final = 2  # so that two workers share the points; each lives the undisturbed cycles, too
TIMEOUT: Final = 7200 if NIGHTLY else 900  # seconds of real time


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of fault.c. Without a compiler: a failure in CI, a skip elsewhere."""
    try:
        return build(tmp_path_factory.mktemp("fault"))
    except CompilerMissingError:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: apt install gcc")
        pytest.skip("no C compiler: apt install gcc")


def sweep(library: Path, plan: str, seeds: Sequence[int], shard: int, shards: int = SHARDS) -> Report:
    """One fork server through one shard of a plan; its report."""
    replayed = ["--point", POINT] if POINT else []
    return ask(library, "forkserver", plan, "--seeds", *seeds, "--shard", shard, "--shards", shards, *replayed)


def ask(library: Path, server: str, *arguments: object) -> Report:
    """Run one of the servers beside this module, with the library loaded; its report."""
    command = [sys.executable, "-m", f"tests.faults.{server}", *map(str, arguments)]
    ended = subprocess.run(
        command, env=environment(library), cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    assert ended.returncode == 0, ended.stderr
    return Report(**json.loads(ended.stdout.splitlines()[-1]))


def tell(record: Callable[[str, object], None], what: str, report: Report) -> None:
    """Leave the figures for the end of the run, and fail for any violation, each with the command that replays it."""
    swept = report.points - report.known
    figures = f"{report.points} points, {report.struck} struck, {swept} different states"
    figures += f", {report.calls} calls in the undisturbed cycles"
    figures += f" ({report.writes} writes, {report.syncs} syncs), {report.named} named states"
    record("figures", f"{what}: {figures}, {report.seconds} s, {report.core_seconds} core-seconds")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    replay = f"SYNCD_FAULT_POINT={{}} .venv/bin/pytest '{test}'"
    lines = [f"{replay.format(point)}\n{wrong}" for point, wrong in report.violations]
    assert not lines, f"{len(lines)} violations; the first:\n" + "\n".join(lines[:5])
