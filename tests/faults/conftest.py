"""Prints the figures of the fault tests when the run has ended: a line each test that recorded some."""

from __future__ import annotations

from _pytest.terminal import TerminalReporter


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Lines out of `record_property("figures", ...)`, of all workers."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "figures":
                    terminalreporter.write_line(f"{report.nodeid}: {value}")
