"""A simulated practice for a booted machine, and the desk of the person who looks after its mirror."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from syncd.demo.build import Past
from syncd.demo.simulation import OutsideSite, Simulation
from tests.boot.machine import Machine

PASSWORD: Final = "correct horse"
PAST = Past(documents=5.0, sheets=2.0, sigma=0.6, hostile_names=0.0, urls=0.0, deleted=0.0)


def practice(machine: Machine, patients: int, seed: int, folder: str = "syncd") -> Simulation:
    """A simulated practice whose office writes to the machine's SFTP site."""
    key = machine.said("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub")
    site = OutsideSite("127.0.0.1", 22, "opendental", PASSWORD, key, folder)
    return Simulation.start(patients, seed, 0.05, past=PAST, outside=site)


class Desk:
    """Where the practice's IT person sits."""

    def __init__(self, machine: Machine, office: Simulation, name: str) -> None:
        self.machine, self.office, self.name = machine, office, name
        self.unit, self.archive = f"syncd@{name}.service", Path("/srv/archive") / name

    def write(self, folder: str, **sections: dict[str, object]) -> None:
        """Fill in configuration and keys in a folder."""
        here = self.machine.inside(folder)
        settings: dict[str, dict[str, object]] = {
            "state": {"path": None},
            "log": {"path": None},
            "sync": {"vanish_after": "1s"},
            **sections,
        }
        self.office.write_config(here, self.archive, **settings)

    def syncd(self, words: str, user: str = "root", check: bool = True) -> str:
        """What a verb printed."""
        return self.machine.run(f"syncd -p {self.name} {words}", user, check).stdout.strip()

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        said: dict[str, Any] = json.loads(self.syncd("status --json"))
        return said

    def states(self) -> bool:
        """For waiting: nothing is owed and all is well."""
        said = self.status()
        return (said["state"], said["owed"], said["failing"]) == ("ok", 0, 0) and said["last_complete_sweep_at"]

    def archived(self) -> set[str]:
        """Full ids of what has a current version."""
        rows = map(json.loads, self.syncd("find --json --current").splitlines())
        return {f"{row['pat_num']}/{row['kind']}-{row['num']}" for row in rows if row["path"]}

    def wait_until_mirrored(self, seconds: float = 90.0) -> None:
        """Nothing is owed, and every document of the practice is there."""
        self.machine.wait(self.states, seconds, f"{self.name} is mirrored: {self.status()}")

    def restart(self) -> None:
        """Restart the service; it is READY when this returns."""
        self.machine.run(f"systemctl restart {self.unit}")
