"""A simulated practice for a booted machine, and the desk of the person who looks after its mirror."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Final

from syncd.answers import QUESTIONS, applies
from syncd.demo.build import Past
from syncd.demo.simulation import OutsideSite, Simulation, to_toml
from syncd.index import Index
from syncd.model import KINDS
from tests.boot.machine import Machine
from tests.truth import Expected, compare_archive

PASSWORD: Final = "correct horse"
PLACEMENTS: Final = ("DownloadSftp", "DownloadMount")
PAST = Past(documents=5.0, sheets=2.0, sigma=0.6, hostile_names=0.0, urls=0.0, deleted=0.0)


def practice(machine: Machine, patients: int, seed: int, folder: str = "syncd") -> Simulation:
    """A simulated practice whose office writes to the machine's SFTP site."""
    key = machine.said("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub")
    site = OutsideSite("127.0.0.1", 22, "opendental", PASSWORD, key, folder)
    return Simulation.start(patients, seed, 0.05, past=PAST, outside=site)


class Desk:
    """Where the practice's IT person sits."""

    def __init__(self, machine: Machine, office: Simulation, name: str, archives: str = "/srv/archive") -> None:
        self.machine, self.office, self.name = machine, office, name
        self.unit, self.archive = f"syncd@{name}.service", Path(archives) / name
        self.disk = self.archive  # where it lies as seen from outside, where nothing is mounted

    @property
    def answers(self) -> dict[str, Any]:
        """What `setup` wants to know."""
        site = self.office.outside
        return {
            "mode": "service",
            "url": self.office.url,
            "time_zone": str(self.office.practice.zone),
            "developer_key": self.office.office.developer_key,
            "customer_key": self.office.office.customer_key,
            "sftp": "elsewhere",
            "sftp_host": site.host,
            "sftp_port": site.port,
            "sftp_username": site.username,
            "sftp_password": site.password,
            "sftp_folder": site.folder,
            "sftp_address": f"{site.host}:{site.port}",
            "archive": str(self.archive),
            "notify_command": "-",
            "ping_url": "-",
        }

    @property
    def typed(self) -> str:
        """The same, typed into the dialogue, with the consent to the host key."""
        asked = [
            question for question in QUESTIONS if question.name in self.answers and applies(question, self.answers)
        ]
        return "".join(f"{self.answers[question.name]}\n" for question in asked) + "y\n"

    def write_answers(self, path: str, **others: Any) -> None:
        """The same, as a file for `setup --answers`. `others`: where the answer is another."""
        wanted = (
            {name: value for name, value in self.answers.items() if value != "-"} | {"trust_host_key": True} | others
        )
        file = self.machine.inside(path)
        file.write_text(to_toml({"x": wanted}).removeprefix("[x]\n"))
        file.chmod(0o600)

    def syncd(self, words: str, user: str = "root", check: bool = True) -> str:
        """What a verb printed."""
        return self.machine.run(f"syncd -p {self.name} {words}", user, check).stdout.strip()

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        said: dict[str, Any] = json.loads(self.syncd("status --json"))
        return said

    def is_mirrored(self) -> bool:
        """Nothing is owed, and every list was read."""
        said = self.status()
        done = (said["state"], said["owed"], said["failing"]) == ("ok", 0, 0)
        return done and said["last_complete_sweep_at"] is not None

    def wait_until_mirrored(self, seconds: float = 90.0) -> None:
        """Until the archive holds what the practice holds, and nothing else."""
        self.machine.wait(self.is_mirrored, seconds, f"{self.name} is mirrored")
        assert self.wrong() == []

    def wait_for(self, state: str, reason: str, seconds: float = 60.0) -> dict[str, Any]:
        """Until the status says so; that status."""
        self.machine.wait(
            lambda: (self.status()["state"], self.status()["reason"]) == (state, reason), seconds, f"{state} {reason}"
        )
        return self.status()

    def wrong(self) -> list[str]:
        """Everything in which the archive is not what the practice is."""
        expected, practice = Expected(), self.office.practice
        expected.note(practice)
        root = self.machine.inside
        with contextlib.closing(Index(root(f"/var/lib/syncd/{self.name}/index.db"))) as index:
            kinds = set(KINDS) - {"thumbnail"}  # they wait for fifteen quiet minutes
            found = compare_archive(index, root(str(self.disk)), practice, expected, kinds)
        return found.wrong + found.lacking

    def placements(self) -> int:
        """How often a document, a sheet or a mount was asked for so far."""
        return sum(each.path.rpartition("/")[2] in PLACEMENTS for each in list(self.office.office.arrivals))

    def add(self) -> str:
        """A new document in the practice: its full id."""
        practice = self.office.practice
        pat_num = min(practice.truth())
        return f"{pat_num}/document-{practice.add_document(pat_num, 'jpg', description='Bitewing')}"

    def wait_for_document(self, full_id: str, seconds: float = 60.0) -> None:
        """Until it is archived."""
        self.machine.wait(lambda: self.has(full_id), seconds, f"{full_id} is archived")

    def has(self, full_id: str) -> bool:
        """Whether an item has a version."""
        done = self.machine.run(f"syncd -p {self.name} show --json {full_id}", check=False)
        return done.returncode == 0 and '"state": "archived"' in done.stdout

    def restart(self) -> None:
        """Restart the service; it is READY when this returns."""
        self.machine.run(f"systemctl restart {self.unit}")

    def archived(self) -> set[str]:
        """Full ids of what has a current version."""
        rows = map(json.loads, self.syncd("find --json --current").splitlines())
        return {f"{row['pat_num']}/{row['kind']}-{row['num']}" for row in rows if row["path"]}

    @property
    def pid(self) -> int:
        """The service's process, as seen inside; 0 when there is none."""
        return int(self.machine.show(self.unit, "MainPID"))

    def is_active(self) -> bool:
        """Whether the service is up."""
        return self.machine.show(self.unit, "ActiveState") == "active"

    def drop_in(self, name: str, text: str) -> None:
        """Settings of the service that are not the unit's; an empty text takes them back."""
        path = self.machine.inside(f"/etc/systemd/system/{self.unit}.d/{name}.conf")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"[Service]\n{text}\n")
        if not text:
            path.unlink()
            path.parent.rmdir()
        self.machine.run("systemctl daemon-reload")
