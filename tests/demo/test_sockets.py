import base64
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paramiko
import pytest
import requests

from syncd.demo.adapter import OfficeAdapter
from syncd.demo.clock import SimulatedClock
from syncd.demo.office import Office
from syncd.demo.practice import Practice
from syncd.demo.simulation import OutsideSite, Simulation
from tests.demo.conftest import Desk


def session(office: Office) -> requests.Session:
    made = requests.Session()
    made.trust_env = False
    keys = f"{office.developer_key}/{office.customer_key}"
    made.headers.update({"Authorization": f"ODFHIR {keys}", "Content-Type": "application/json"})
    return made


def placement(simulation: Simulation, to: str, **fields: Any) -> dict[str, Any]:
    site = simulation.outside
    address = f"{site.host}:{site.port}/syncd/{to}"
    return {"SftpAddress": address, "SftpUsername": site.username, "SftpPassword": site.password, **fields}


def pulled(simulation: Simulation, path: str) -> bytes:
    with logged_in(simulation) as files, files.open(path) as source:
        return source.read()


@contextmanager
def logged_in(simulation: Simulation) -> Iterator[paramiko.SFTPClient]:
    site = simulation.outside
    with paramiko.SSHClient() as client:
        kind, _, key = site.host_key.partition(" ")
        pinned = paramiko.PKey.from_type_string(kind, base64.b64decode(key))
        client.get_host_keys().add(f"[{site.host}]:{site.port}", kind, pinned)
        client.connect(
            site.host, site.port, site.username, site.password, look_for_keys=False, allow_agent=False, timeout=10
        )
        with client.open_sftp() as files:
            yield files


def test_the_site_does_what_clients_need(running: Simulation) -> None:
    assert running.sftp is not None
    before = running.sftp.connections
    with logged_in(running) as files:
        files.mkdir("box")
        with files.open("box/é.bin", "wb") as out:
            out.write(b"12345")
        assert [(entry.filename, entry.st_size) for entry in files.listdir_attr("box")] == [("é.bin", 5)]
        files.posix_rename("box/é.bin", "box/b")
        with files.open("box/b", "ab") as out:
            out.write(b"6")
        assert files.stat("box/b").st_size == 6
        with pytest.raises(FileNotFoundError):
            files.stat("box/é.bin")
        files.remove("box/b")
        files.rmdir("box")
    assert running.sftp.connections == before + 1


def test_a_document_is_listed_placed_and_pulled_over_real_connections(running: Simulation) -> None:
    asking = session(running.office)
    truth = next(patient for patient in running.practice.truth().values() if patient.documents)
    listed = asking.get(f"{running.url}/documents", params={"PatNum": truth.pat_num}, timeout=10).json()
    assert {row["DocNum"] for row in listed} - {0} == set(truth.documents) | truth.pending
    for doc, content in list(truth.documents.items())[:3]:
        body = placement(running, f"{doc}/", DocNum=doc)
        answer = asking.post(f"{running.url}/documents/DownloadSftp", json=body, timeout=10)
        name = answer.headers["location"].rpartition("/")[2]
        assert answer.status_code == 201
        assert pulled(running, f"syncd/{doc}/{name}") == content


def test_a_name_that_no_file_system_takes_is_left_out(running: Simulation) -> None:
    practice = running.practice
    patient = practice.add_patient()
    practice.add_document(patient, file_name="y" * 300 + ".jpg")
    fine = practice.add_document(patient, file_name="Zoë, 2.jpg")
    body = placement(running, "thumbs/", PatNum=patient)
    answer = session(running.office).post(f"{running.url}/documents/Thumbnails", json=body, timeout=10)
    assert answer.json() == [{"DocNum": fine, "FileName": "Zoë, 2.jpg"}]
    assert pulled(running, "syncd/thumbs/Zoë, 2.jpg") == practice.thumbnail(fine)


def test_a_wrong_password_is_always_refused(running: Simulation) -> None:
    asking = session(running.office)
    doc = running.practice.add_document(1)
    good = placement(running, "p.jpg", DocNum=doc)
    for body, status in ((good, 201), ({**good, "SftpPassword": "guess"}, 400), (good, 201)):
        assert asking.post(f"{running.url}/documents/DownloadSftp", json=body, timeout=10).status_code == status
    assert running.sftp is not None
    assert running.sftp.refused >= 1


def test_the_site_keeps_clients_below_its_root(running: Simulation) -> None:
    asking = session(running.office)
    doc = running.practice.add_document(1)
    body = placement(running, "../../../../p.jpg", DocNum=doc)
    assert asking.post(f"{running.url}/documents/DownloadSftp", json=body, timeout=10).status_code == 201
    assert running.sftp is not None
    assert (running.sftp.root / "p.jpg").exists()


@pytest.mark.parametrize("details", [{"when": "before"}, {"when": "body"}])
def test_connections_break(running: Simulation, details: dict[str, Any]) -> None:
    running.office.faults.add("cut", **details)
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        _ = session(running.office).get(f"{running.url}/patients/Simple", timeout=10).content


def test_answers_hang_and_drip(running: Simulation) -> None:
    asking = session(running.office)
    running.office.faults.add("hang", seconds=1)
    with pytest.raises(requests.ReadTimeout):
        asking.get(f"{running.url}/patients/Simple", timeout=0.2)
    running.office.faults.add("drip", size=1_000, seconds=0.05)
    assert asking.get(f"{running.url}/patients/Simple", timeout=10).json()


def test_upload_sftp_reads_from_a_real_site(running: Simulation) -> None:
    assert running.sftp is not None
    (running.sftp.root / "syncd").mkdir(exist_ok=True)
    (running.sftp.root / "syncd" / "up.pdf").write_bytes(b"%PDF-1.4 back %%EOF")
    asking = session(running.office)
    body = placement(running, "up.pdf", PatNum=1)
    answer = asking.post(f"{running.url}/documents/UploadSftp", json=body, timeout=10)
    assert running.practice.truth()[1].documents[answer.json()["DocNum"]] == b"%PDF-1.4 back %%EOF"


def test_the_written_configuration_is_complete_and_private(running: Simulation, tmp_path: Path) -> None:
    path = running.write_config(
        tmp_path / "conf", tmp_path / "archive", sync={"kinds": ["document"]}, state={"path": None}
    )
    config = tomllib.loads(path.read_text())
    assert config["api"]["url"] == running.url
    assert config["drop"]["address"] == f"{running.outside.host}:{running.outside.port}"
    assert config["sync"] == {"kinds": ["document"]}
    assert config["state"] == {}
    for key in ("developer_key_file", "customer_key_file"):
        secret = path.parent / config["api"][key]
        assert secret.stat().st_mode & 0o777 == 0o600


def test_another_sftp_server_can_be_the_site(running: Simulation, tmp_path: Path) -> None:
    site = running.outside
    other = OutsideSite(site.host, site.port, site.username, site.password, site.host_key, folder="deep/er")
    with Simulation.start(patients=1, folder=tmp_path, outside=other) as simulation:
        assert simulation.sftp is None
        doc = simulation.practice.add_document(1)
        body = placement(simulation, "deep/er/q.jpg", DocNum=doc)
        answer = session(simulation.office).post(f"{simulation.url}/documents/DownloadSftp", json=body, timeout=10)
        assert answer.status_code == 201
        assert pulled(simulation, "syncd/deep/er/q.jpg") == simulation.practice.truth()[1].documents[doc]


def test_the_adapter_answers_without_a_socket(desk: Desk) -> None:
    asking = session(desk.office)
    asking.mount("http://", OfficeAdapter(desk.office))
    desk.practice.add_document(1)
    url = "http://office.example/api/v1/documents"
    with asking.get(url, params={"PatNum": 1}, stream=True) as answer:
        assert json.loads(b"".join(answer.iter_content(64)))[0]["DocNum"] == 1
    assert asking.get("http://office.example/elsewhere", timeout=5).status_code == 404
    desk.office.faults.add("drip", size=100, seconds=1)
    before = desk.clock.now()
    assert asking.get(url, params={"PatNum": 1}).json()
    assert desk.clock.now() > before


def test_the_adapter_breaks_as_a_network_would(desk: Desk) -> None:
    asking = session(desk.office)
    asking.mount("http://", OfficeAdapter(desk.office))
    desk.practice.add_document(1)
    url = "http://office.example/api/v1/documents?PatNum=1"
    desk.office.faults.add("cut", when="after")
    with pytest.raises(requests.ConnectionError):
        asking.get(url)
    desk.office.faults.add("cut", when="body")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        asking.get(url)
    desk.office.faults.add("hang", seconds=300)
    with pytest.raises(requests.ReadTimeout):
        asking.get(url, timeout=(5, 70))
    desk.office.faults.add("slow", seconds=90)
    with pytest.raises(requests.ReadTimeout):
        asking.get(url, timeout=(5, 70))
    desk.office.faults.add("redirect", text="http://elsewhere.example/")
    assert asking.get(url, allow_redirects=False).status_code == 302


def test_simulated_time_needs_no_time() -> None:
    clock = SimulatedClock(0.0)
    practice = Practice(clock)
    practice.add_patient()
    office = Office(practice, interval=3_600.0)
    asking = session(office)
    asking.mount("http://", OfficeAdapter(office))
    started = time.monotonic()
    for _ in range(200):
        assert asking.get("http://x/api/v1/documents?PatNum=1").json() == []
    assert clock.now() == 199 * 3_600.0
    assert time.monotonic() - started < 5


def test_the_demo_prints_a_configuration_and_ends_on_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "syncd.demo", "--patients", "2", "--config-dir", str(tmp_path), "--live"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"# {tmp_path / 'config.toml'}\n"
        lines = iter(process.stdout.readline, "")
        assert any("invented patients at" in line for line in lines)
        assert not any((tmp_path / "archive").iterdir()), "ready for a backfill"
        process.terminate()
        assert process.wait(10) == 0


def test_what_the_demo_prints_is_ready_to_be_used(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "syncd.demo", "--patients", "1", "--interval", "0.01"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        config = process.stdout.readline().removeprefix("# ").strip()
        assert any("invented patients at" in line for line in iter(process.stdout.readline, ""))
        syncd = [str(Path(sys.executable).with_name("syncd")), "-c", config]
        done = subprocess.run([*syncd, "backfill", "--no-progress"], capture_output=True, text=True, check=False)
        process.terminate()
    assert done.returncode == 0, done.stderr
