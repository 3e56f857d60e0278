"""README, "The server is down": every line is executed as it stands, Open Dental is gone; what `export` answers."""

from __future__ import annotations

import datetime as dt
import json
import re
import shlex
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from syncd import errors
from syncd.cli import cli
from syncd.index import Index
from tests.test_cli import README, Desk, practice

pytestmark = pytest.mark.slow  # a simulated practice is mirrored, once

SECTION = re.search(
    r"^## The server is down: what now\n(.*?)(?=^## )", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A practice that was mirrored and then died; two patients are expected today, one of them twice, one tomorrow."""
    with practice(3) as simulation:
        desk = Desk(simulation, tmp_path_factory.mktemp("down"))
        assert desk.call("backfill").exit_code == 0
        zone = simulation.practice.zone
    today = dt.datetime.now(zone).replace(hour=12, minute=0, second=0, microsecond=0)
    hour = dt.timedelta(hours=1)
    tomorrow = today + dt.timedelta(days=1)
    visits = {today: [(today, 1), (today - 2 * hour, 2), (today + hour, 1)], tomorrow: [(tomorrow, 999)]}
    with closing(Index(desk.state / "index.db")) as index:
        for day, starts in visits.items():
            index.run("INSERT INTO appointment_day VALUES (?, 1795000000.0)", f"{day:%Y-%m-%d}")
            for start, pat_num in starts:
                index.run("INSERT INTO appointment VALUES (?, ?, ?)", f"{day:%Y-%m-%d}", start.timestamp(), pat_num)
    return desk


def person(desk: Desk) -> tuple[int, str, str]:
    with closing(Index(desk.state / "index.db")) as index:
        row = index.rows("SELECT pat_num, last_name, birthdate FROM patient WHERE pat_num = 1")[0]
    return row["pat_num"], row["last_name"], row["birthdate"][:10]


def test_the_lines_of_the_readme_lead_from_a_name_to_the_picture(
    mirrored: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SECTION
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = re.findall(r"^       (\S.*)$", SECTION[1], re.MULTILINE)
    pat_num, name, born = person(mirrored)
    shutil.copytree(mirrored.archive, tmp_path / "mnt/backup/main")
    found, opened = [], []
    for line in lines:
        told = line.replace("$HOME", str(tmp_path)).replace("/mnt/", f"{tmp_path}/mnt/").replace("101", str(pat_num))
        match shlex.split(told.replace("1980", born[:4])):
            case ["sudo", "syncd", *words]:
                own = [] if words[0] == "--archive" else ["-c", str(mirrored.file)]
                result = CliRunner().invoke(cli, [*own, *words], input=f"{name}\n")
                assert result.exit_code == 0, result.output
                found += [result.stdout] if "find" in words else []
                opened += re.findall(r"^open (.*)$", result.stdout, re.MULTILINE)
            case ["xdg-open", page]:
                assert page == opened[-1]
                assert Path(page).read_text("utf-8").count(f'"PatNum {pat_num}"') == 1
            case ["rm", "-r", *folders]:
                subprocess.run(["rm", "-r", *folders], check=True)
            case other:
                pytest.fail(f"nobody would know what to type: {other}")
    assert (len(lines), len(found), len(opened)) == (8, 2, 4)
    assert all(re.search(rf"^{pat_num}/[a-z-]+-[0-9]+ ", text, re.MULTILINE) for text in found)
    assert not [path for path in opened if Path(path).exists()]


def export(desk: Desk, to: Path, *words: str) -> Result:
    return desk.call("export", "--to", str(to), *words)


def said(desk: Desk, to: Path, *words: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(export(desk, to, *words, "--json").stdout)
    return told


def test_a_day_is_exported_in_the_order_of_its_appointments(mirrored: Desk, tmp_path: Path) -> None:
    told = said(mirrored, tmp_path / "out", "--day", "today")
    page = Path(told["page"]).read_text("utf-8")
    assert (told["patients"], told["without_documents"]) == (2, [])
    assert re.findall(r'<tr><td>([0-9:, ]*)<td><a href="([0-9]+)/', page) == [("10:00", "2"), ("12:00, 13:00", "1")]
    assert "3 appointments, as Open Dental had them 2026-11-18" in page
    words = export(mirrored, tmp_path / "morning", "--day", "tomorrow").stdout
    assert "no documents: patient-999" in words
    assert "1 appointments, as Open Dental had them 2026-11-18" in words


def test_a_day_that_was_never_seen_is_said_and_nothing_is_made(mirrored: Desk, tmp_path: Path) -> None:
    for words in (["--day", "2031-01-01"], ["--day", "soon"], ["--day", "2026-1-1"]):
        result = export(mirrored, tmp_path / "out", *words)
        assert result.exit_code == errors.EXIT_USAGE
    assert "never seen" in export(mirrored, tmp_path / "out", "--day", "2031-01-01").stderr
    assert not (tmp_path / "out").exists()


def test_everybody_is_exported_with_a_page_above_all(mirrored: Desk, tmp_path: Path) -> None:
    told = said(mirrored, tmp_path / "out", "--all")
    pages = re.findall(r'<a href="(.*?)"', Path(told["page"]).read_text("utf-8"))
    assert told["patients"] == len(pages) == 3
    assert all((tmp_path / "out" / page).is_file() for page in pages)
    again = said(mirrored, tmp_path / "out", "--patient", "1", "--patient", "2")
    assert again["kept"] == again["files"] > 0


@pytest.mark.parametrize("words", [[], ["--all", "--day", "today"], ["--patient", "1", "--all"], ["--patient", "999"]])
def test_whose_documents_must_be_said_in_one_way(mirrored: Desk, tmp_path: Path, words: list[str]) -> None:
    assert export(mirrored, tmp_path / "out", *words).exit_code == errors.EXIT_USAGE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--all"], ["--day", "today"], ["--patient", "1"]])
def test_dry_run_of_an_export_counts_and_changes_nothing(mirrored: Desk, tmp_path: Path, words: list[str]) -> None:
    kept = (mirrored.archive, mirrored.folder / "log")
    before = [(path, path.lstat().st_mtime_ns) for folder in kept for path in sorted(folder.rglob("*"))]
    told = said(mirrored, tmp_path / "out", *words, "-n")
    assert [(path, path.lstat().st_mtime_ns) for folder in kept for path in sorted(folder.rglob("*"))] == before
    assert not (tmp_path / "out").exists()
    real = said(mirrored, tmp_path / "out", *words)
    assert (told["would_copy"], told["bytes"]) == (real["files"], real["bytes"])


def test_every_patient_of_a_large_export_stands_in_the_audit_log(
    mirrored: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncd.reading.NAMED", 2)
    export(mirrored, tmp_path / "out", "--all")
    lines = [json.loads(line) for line in mirrored.call("audit", "--json").stdout.splitlines()]
    told = [(line["pat_nums"], line["filters"]) for line in lines if line["verb"] == "export" and "filters" in line]
    assert told[-2:] == [([1, 2], ["all"]), ([3], ["all"])]


def test_a_damaged_file_ends_an_export_with_4_and_is_named_in_words_and_page(mirrored: Desk, tmp_path: Path) -> None:
    path = next(mirrored.archive.glob("patients/3/document-*/1-*.[!j]*"))
    right = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    try:
        result = export(mirrored, tmp_path / "out", "--patient", "3")
    finally:
        path.write_bytes(right)
        path.chmod(0o400)
    assert result.exit_code == errors.EXIT_DAMAGE
    assert f"3/{path.parent.name}: the archived file is damaged" in result.stderr
    assert "damaged in the archive, left out" in (tmp_path / "out/3/index.html").read_text("utf-8")
