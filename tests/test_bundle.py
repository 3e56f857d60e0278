"""`doctor --bundle`: what goes to strangers names nobody, nowhere and no moment, and still tells what happened."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import stat
import tarfile
from pathlib import Path

import pytest

from syncd.bundle import claim, write
from syncd.config import Settings
from syncd.errors import UsageError
from tests.world import make_settings

NOW = 1_795_000_000.0  # 2026-11-18 11:06:40 UTC, 05:06:40 in Chicago
CANARIES = (
    *("101", "4711", "998877", "Chicago", "northside", "drop.finch.example", "finchuser", "finch-group"),
    *("2026-11-18", "05:06", "10:05", "secret-token", "192.0.2.77", "mail@finch.example", "1795000300"),
)
LOG = """\
{"time": "2026-11-18T10:05:00.000Z", "event": "item_failed", "item": "101/document-4711", "practice": "northside"}
{"time": "2026-11-18T10:06:40.000Z", "event": "item_recovered", "item": "101/mount-image-998877"}
{"time": "2026-11-18T11:06:40.000Z", "event": "thumbnails_settled", "pat_num": 101, "count": 4711}
{"time": "2026-11-18T11:06:40.000Z", "event": "drop_leftover", "num": 4711, "mount_num": 998877}
{"time": "2026-11-18T11:06:40.000Z", "event": "hint_off", "next_try_at": "2026-11-18T11:11:40Z", "reason": "tls_failed"}
{"time": "2026-11-18T11:06:40.000Z", "event": "state_changed", "next_try_at": 1795000300.5, "reason": "tls_failed"}
""".replace('"count": 4711', '"count": 3')
REPORT = """\
northside: BLOCKED (drop_unreachable)
  the SFTP site cannot be reached from here (drop.finch.example)
  as of 2026-11-18 05:06:40-06:00
    guard-7: 30 of 40 items (patient-101)
  Wed 05:06-10:05  the SFTP site refuses finchuser of mail@finch.example (1 h), practice_it
  last seen 2026-11-18 05:06; never 2026-99-99; at 192.0.2.77 and https://ping.finch.example/secret-token
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = make_settings(
        tmp_path,
        1.0,
        {
            "practice": {"name": "northside"},
            "drop": {"host": "drop.finch.example", "username": "finchuser", "address": "drop.finch.example:2222"},
            "archive": {"group": "finch-group"},
            "notify": {"ping_url": "https://ping.finch.example/secret-token", "command": ["/opt/finch-alert", "x"]},
            "sync": {"patients": [101, 4711]},
        },
    )
    made.log_path.mkdir()
    (made.log_path / "syncd.log").write_text(LOG)
    (made.log_path / "syncd.log.1").write_text(LOG.replace("101", "102"))
    (made.log_path / "status.log").write_text(REPORT)
    (made.log_path / "status.json").write_text(json.dumps({"at": "2026-11-18T11:06:40.000Z", "practice": "northside"}))
    (made.log_path / "audit").mkdir()
    (made.log_path / "audit" / "2026-11.log").write_text("who did what")
    return made


def packed(path: Path, settings: Settings | None, message: str = "") -> dict[str, str]:
    """The members of a bundle made now, with their texts."""
    write(claim(path), [{"check": "service", "message": message}], settings, NOW)
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


def test_no_canary_is_in_it(settings: Settings, tmp_path: Path) -> None:
    said = f"{REPORT} {settings.archive.path} {settings.log_path}/x on {os.uname().nodename}"
    path = tmp_path / "bundle.tar.gz"
    texts = packed(path, settings, said)
    assert sorted(texts) == [
        *("configuration.json", "doctor.json", "status.json", "status.log", "syncd.log", "syncd.log.1")
    ]
    everything = "\n".join(texts.values()) + gzip.decompress(path.read_bytes()).decode("latin-1")
    canaries = (*CANARIES, str(tmp_path), os.uname().nodename)
    assert [each for each in canaries if re.search(rf"(?<![\w]){re.escape(each)}(?![\w])", everything)] == []
    assert all(each in LOG + said + repr(settings) for each in canaries)  # else the search proves nothing


def test_a_number_has_the_same_pseudonym_all_through(settings: Settings, tmp_path: Path) -> None:
    texts = packed(tmp_path / "bundle.tar.gz", settings)
    lines = [json.loads(line) for line in texts["syncd.log"].splitlines()]
    patient, item = re.fullmatch(r"(\d+)/document-(\d+)", lines[0]["item"]).groups()  # type: ignore[union-attr]
    image = lines[1]["item"].removeprefix(f"{patient}/mount-image-")
    assert (lines[2]["pat_num"], lines[3]["num"]) == (int(patient), int(item))
    assert str(lines[3]["mount_num"]) == image != item
    assert f"(patient-{patient})" in texts["status.log"]
    assert f'"{patient}/document' not in texts["syncd.log.1"]


def test_times_are_seconds_from_now(settings: Settings, tmp_path: Path) -> None:
    texts = packed(tmp_path / "bundle.tar.gz", settings)
    lines = [json.loads(line) for line in texts["syncd.log"].splitlines()]
    assert [line["time"] for line in lines[:3]] == ["-3700 s", "-3600 s", "+0 s"]
    assert lines[4]["next_try_at"] == "+300 s"
    assert lines[5]["next_try_at"] == 300, "as logs were written before it was a text"
    assert "as of +0 s\n" in texts["status.log"]
    assert "last seen -40 s; never (time); at (place) and (place)" in texts["status.log"]


def test_what_happened_is_still_told(settings: Settings, tmp_path: Path) -> None:
    texts = packed(tmp_path / "bundle.tar.gz", settings)
    assert '"reason": "tls_failed"' in texts["syncd.log"]
    assert "BLOCKED (drop_unreachable)" in texts["status.log"]
    told = json.loads(texts["configuration.json"])
    assert (told["api"]["mode"], told["api"]["min_interval"], told["drop"]["port"]) == ("remote", 1.0, 22)
    assert (told["drop"]["host"], told["sync"]["patients"], told["api"]["ca_bundle"]) == ("(set)", "(set)", None)


def test_invalid_configuration_leaves_what_the_doctor_says(tmp_path: Path) -> None:
    texts = packed(tmp_path / "bundle.tar.gz", None, "[drop] port: is wrong")
    assert sorted(texts) == ["configuration.json", "doctor.json"]
    assert "[drop] port: is wrong" in texts["doctor.json"]


def test_file_is_for_its_owner_only_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    packed(path, None)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to("/etc/passwd")
    for taken in (path, tmp_path / "link", tmp_path / "nowhere" / "x"):
        with pytest.raises(UsageError, match="--bundle"):
            claim(taken)
    assert path.read_bytes() == before
    assert io.BytesIO(before).read(8)[4:] == b"\0\0\0\0"  # no time in the head of gzip, either
