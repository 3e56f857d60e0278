"""Orders the fault tests, and prints their figures when the run has ended: a line each test that recorded some."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

# Power cuts wait for the kernel half of their time, while another worker computes; the short ones fill the end.
LONG = ("test_power_cuts", "test_kill_points", "test_io_errors", "test_thirty_days", "test_years", "test_recovery")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: no worker goes on alone at the end."""
    here = Path(__file__).parent
    places = [place for place, item in enumerate(items) if item.path.parent == here]
    ordered = sorted((items[place] for place in places), key=_order)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _order(item: pytest.Item) -> int:
    return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Lines out of `record_property("figures", ...)`, of all workers."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "figures":
                    terminalreporter.write_line(f"{report.nodeid}: {value}")
