import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from syncd.demo.clock import SimulatedClock
from syncd.demo.office import Office
from syncd.demo.practice import Practice
from syncd.demo.simulation import Simulation
from syncd.demo.site import MemoryDrop
from syncd.demo.wire import Request, Response

NOON = 1_747_760_400.0
"""2025-05-20 12:00:00 in Chicago."""


@dataclass
class Desk:
    """A practice behind an office, in one thread with a simulated clock."""

    clock: SimulatedClock
    practice: Practice
    office: Office
    drop: MemoryDrop

    def ask(self, method: str, path: str, body: object = None, **query: object) -> Response:
        headers = {
            "Authorization": f"ODFHIR {self.office.developer_key}/{self.office.customer_key}",
            "Content-Type": "application/json",
        }
        content = b"" if body is None else json.dumps(body).encode()
        return self.office.handle(
            Request(method, path, {name: str(value) for name, value in query.items()}, headers, content)
        )

    def get(self, path: str, **query: object) -> list[dict[str, object]]:
        response = self.ask("GET", path, **query)
        assert response.status == 200, response.body
        found = json.loads(response.body)
        assert isinstance(found, list)
        return found

    def listed(self, pat_num: int) -> list[dict[str, object]]:
        return self.get("/documents", PatNum=pat_num)

    def place(self, path: str = "/documents/DownloadSftp", to: str = "syncd/one.jpg", **fields: object) -> Response:
        body = {
            "SftpAddress": f"site.example/{to}",
            "SftpUsername": self.drop.username,
            "SftpPassword": self.drop.password,
            **fields,
        }
        return self.ask("POST", path, body)


@pytest.fixture
def desk() -> Desk:
    clock = SimulatedClock(NOON)
    practice = Practice(clock)
    practice.add_patient("Abendroth", "Ada")
    practice.add_patient("Birdsong", "Bela")
    drop = MemoryDrop(clock)
    return Desk(clock, practice, Office(practice, drop), drop)


@pytest.fixture(scope="module")
def running() -> Iterator[Simulation]:
    with Simulation.start(patients=3, seed=2) as simulation:
        yield simulation
