"""A new user installs syncd from a clone as the README says, and the service mirrors the practice."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.boot.desk import Desk
from tests.boot.machine import CLONE, PROJECT, USER, Machine

COMMANDS, SECONDS = 5, 300.0


def install_lines() -> list[str]:
    """The commands of the README's install section, as they stand: those before the first list."""
    section = (PROJECT / "README.md").read_text().partition("## Install on a server")[2].partition("\n- ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def test_every_command_of_the_readme_leads_to_a_running_service_that_mirrors(
    machine: Machine, desk: Desk, record_property: Callable[[str, object], None]
) -> None:
    lines, began_at = install_lines(), time.monotonic()
    assert 1 <= len(lines) <= COMMANDS
    for line in lines:
        machine.run(f"cd {CLONE} && {line}", USER)
    assert machine.show(desk.unit, "ActiveState") == "active"
    desk.wait_until_mirrored()
    took = time.monotonic() - began_at
    record_property("figures", f"({len(lines)} commands, {took:.0f} s)")
    assert took < SECONDS
