"""One booted Debian a suite, shared by all tests in their order, and the practice that it mirrors."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator

import pytest
from _pytest.terminal import TerminalReporter

from syncd.demo.simulation import Simulation
from tests.boot.desk import PASSWORD, Desk, practice
from tests.boot.machine import SUITES, Machine, missing, root_of

SITE = """
PasswordAuthentication yes
UseDNS no
Subsystem sftp internal-sftp
"""


def pytest_sessionstart() -> None:
    """Nothing is skipped here: what cannot boot fails."""
    if lacking := missing():
        pytest.exit(f"make test-boot needs {', '.join(lacking)}", returncode=1)
    if [name for _, name in socket.if_nameindex()] != ["lo"] or not all(root_of(suite).exists() for suite in SUITES):
        pytest.exit("the booted system needs a network of its own, and a root: make test-boot", returncode=1)
    with socket.socket() as any_socket:  # netdevice(7): the loopback of a new network is down
        flags = struct.pack("16sH14x", b"lo", 1)
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS, IFF_UP


@pytest.fixture(scope="session", params=SUITES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A freshly made Debian with a user, a clone and an SFTP site, booted."""
    machine = Machine(request.param)
    machine.make()
    machine.inside("/etc/ssh/sshd_config").write_text(SITE)
    try:
        machine.boot()
        machine.run("useradd --create-home opendental && install -d -o opendental /home/opendental/syncd")
        machine.run(f"echo 'opendental:{PASSWORD}' | chpasswd")
        yield machine
    finally:
        machine.stop()
        if not request.session.testsfailed:
            machine.remove()


@pytest.fixture(scope="session")
def office(machine: Machine) -> Iterator[Simulation]:
    """The practice `main`."""
    with practice(machine, 10, 3) as simulation:
        yield simulation


@pytest.fixture(scope="session")
def desk(machine: Machine, office: Simulation) -> Desk:
    """The desk of the practice `main`."""
    return Desk(machine, office, "main")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """The list of checks, with their figures."""
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call" or outcome == "error":
                figures = [str(value) for name, value in report.user_properties if name == "figures"]
                name = report.nodeid.partition("::test_")[2].replace("_", " ")
                terminalreporter.write_line(f"{outcome:7} {report.duration:5.1f} s  {' '.join([name, *figures])}")
