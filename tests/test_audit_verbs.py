"""What people do stands in the audit log: starts, stops, decisions, every look into the archive; and `syncd audit`."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from syncd import errors
from syncd.cli import cli
from syncd.demo.build import Past
from syncd.demo.simulation import Simulation
from syncd.index import Index
from syncd.schema import Row
from syncd.service import Lock
from tests.test_cli import Desk
from tests.test_story_audit import CANARY, failing

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    past = Past(documents=3.0, sheets=1.0, sigma=0.4, raw=0.0, urls=0.0, hostile_names=0.0, deleted=0.0)
    with Simulation.start(4, 3, 0.01, past=past) as simulation:
        patient = simulation.practice.add_patient(CANARY, "Erika")
        simulation.practice.add_document(patient, "png", description=CANARY)
        desk = Desk(simulation, tmp_path_factory.mktemp("desk"))
        assert desk.call("backfill", "--no-progress").exit_code == 0
        yield desk


def journal(desk: Desk) -> list[Row]:
    return [json.loads(line) for line in (desk.folder / "log" / "syncd.log").read_text().splitlines()]


def audited(desk: Desk, *words: str) -> list[Row]:
    result = desk.call("audit", "--json", *words)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def canary(desk: Desk) -> tuple[int, str]:
    """The PatNum of the one who must not be named, and the id of a document."""
    found = desk.found("--name", CANARY, "--kind", "document")
    return found[0]["pat_num"], f"{found[0]['pat_num']}/{found[0]['id']}"


def test_start_and_stop_of_a_backfill_are_told_and_the_head_is_in_the_journal(desk: Desk) -> None:
    lines = audited(desk)
    assert (lines[0]["verb"], lines[0]["what"]) == ("started", "backfill")
    assert lines[0]["actor"].startswith(f"uid-{os.getuid()}")
    stopped = next(line for line in lines if line["verb"] == "stopped")
    heads = [event for event in journal(desk) if event["event"] == "audit_head"]
    assert [head["n"] for head in heads] == [1, stopped["n"]]
    assert heads[1]["hash"] == stopped["hash"]
    stored = [line["n"] for line in lines if line["verb"] == "stored"]
    assert stored == list(range(2, len(stored) + 2))


@pytest.mark.parametrize(
    ("words", "verb", "filters"),
    [
        (["find", "--name", CANARY, "--text", CANARY, "--current"], "find", ["current", "name", "text"]),
        (["find", "--json", "--category", CANARY], "find", ["category"]),
        (["show", "ID"], "show", None),
        (["history", "ID"], "history", None),
        (["export", "--patient", "PATIENT", "--to", "TO", "--vanished"], "export", ["vanished"]),
        (["restore", "ID", "--to", "TO"], "restore", None),
        (["restore", "ID", "--to", "TO", "--as-of", "2200-01-01"], "restore", ["as_of"]),
    ],
)
def test_each_look_up_leaves_one_line_without_the_words_that_were_looked_for(
    desk: Desk, tmp_path: Path, words: list[str], verb: str, filters: list[str] | None
) -> None:
    patient, item = canary(desk)
    before = len(audited(desk))
    real = {"ID": item, "PATIENT": str(patient), "TO": str(tmp_path / "to")}
    (tmp_path / "to").mkdir()
    result = desk.call(*(real.get(word, word) for word in words))
    assert result.exit_code == 0, result.output
    lines = audited(desk)
    assert len(lines) == before + 1
    assert (lines[-1]["verb"], lines[-1].get("filters")) == (verb, filters)
    assert lines[-1]["actor"].startswith("uid-")
    assert CANARY not in json.dumps(lines)
    if verb != "find" or "--name" in words:
        assert lines[-1] in audited(desk, "--patient", str(patient))


def test_dry_run_looks_at_nothing_and_leaves_no_line(desk: Desk, tmp_path: Path) -> None:
    patient, item = canary(desk)
    before = len(audited(desk))
    for words in (["export", "--patient", str(patient), "--to", "x", "-n"], ["restore", item, "--to", "x", "-n"]):
        assert desk.call(*words).exit_code == 0
    assert len(audited(desk)) == before


def test_bare_archive_is_read_without_a_log(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = len(audited(desk))
    result = CliRunner().invoke(cli, ["--archive", str(desk.archive), "find"])
    assert result.exit_code == 0, result.output
    assert len(audited(desk)) == before
    assert CliRunner().invoke(cli, ["--archive", str(desk.archive), "audit"]).exit_code == errors.EXIT_USAGE


def test_what_concerns_a_patient_is_what_names_him_or_showed_too_many_to_name(desk: Desk) -> None:
    patient, item = canary(desk)
    other = next(row["pat_num"] for row in desk.found() if row["pat_num"] != patient)
    lines = audited(desk, "--patient", str(patient))
    assert {line["item"].split("/")[0] for line in lines if line["verb"] == "stored"} == {str(patient)}
    assert not any(line["verb"] in ("started", "stopped") for line in lines)
    assert all(str(other) != line.get("item", "").split("/")[0] for line in lines)
    desk.call("find", "--patient", str(other))
    assert audited(desk)[-1] not in audited(desk, "--patient", str(patient))
    assert item in {line["item"] for line in lines if line["verb"] == "stored"}


def test_broad_look_up_counts_as_one_of_everybody(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.reading.SHOWN", 2)
    found = desk.found()
    assert len(found) > 2  # all are shown, whatever the line says
    line = audited(desk)[-1]
    assert (line["count"], line["more"], "pat_nums" in line) == (2, True, False)
    assert line in audited(desk, "--patient", "123456")


def test_program_that_follows_leaves_one_line_however_much_it_is_given(desk: Desk) -> None:
    before = len(audited(desk))
    with desk.process("find", "--json", "--follow", "--after", "0") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["seq"] == 1
    lines = audited(desk)[before:]
    assert [(line["verb"], line["filters"], line["seq"]) for line in lines] == [("find", ["follow"], 0)]


def test_what_was_done_since_a_time(desk: Desk) -> None:
    assert audited(desk, "--since", "2200-01-01") == []
    assert audited(desk, "--since", "2000-01-01") == audited(desk)
    assert desk.call("audit", "--since", "yesterday-ish").exit_code == errors.EXIT_USAGE


def test_people_read_time_actor_and_verb_on_a_line(desk: Desk) -> None:
    result = desk.call("audit")
    first = result.stdout.splitlines()[0]
    assert result.exit_code == 0
    assert f"uid-{os.getuid()}" in first
    assert "what: backfill" in first
    assert "prev" not in result.stdout


def test_whole_log_verifies_while_the_lock_is_held(desk: Desk) -> None:
    with Lock(desk.state, "run"):
        said = desk.json("audit", "--verify")
    assert (said["lines"], said["problems"]) == (len(audited(desk)), [])
    assert desk.call("audit", "--verify", "--patient", "1").exit_code == errors.EXIT_USAGE


@pytest.mark.parametrize(
    ("touch", "line"),
    [
        (lambda lines: [lines[0].replace(b"started", b"stopped"), *lines[1:]], 1),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: lines[:-1], -1),
    ],
)
def test_touched_log_ends_with_4_and_names_file_and_line(
    desk: Desk, touch: Callable[[list[bytes]], list[bytes]], line: int
) -> None:
    path = next((desk.folder / "log" / "audit").glob("*.log"))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    try:
        path.write_bytes(b"".join(touch(lines)))
        result = desk.call("audit", "--verify")
        everything = desk.call("verify")
    finally:
        path.write_bytes(whole)
    number = line if line > 0 else len(lines) - 1
    assert result.exit_code == errors.EXIT_DAMAGE
    assert f"audit/{path.name} line {number}: " in result.stderr
    assert everything.exit_code == errors.EXIT_DAMAGE
    assert f"audit/{path.name} line {number}: " in everything.stderr


def test_log_that_cannot_be_written_refuses_nobody_and_gets_the_line_later(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(audited(desk))
    with monkeypatch.context() as patch:
        failing(patch, "write", OSError(errno.ENOSPC, "No space left on device"))
        result = desk.call("find", "--name", CANARY)
    assert result.exit_code == 0
    assert CANARY in result.stdout
    assert "not in the audit log yet" in result.stderr
    assert len(audited(desk)) == before
    desk.call("find", "--born", "1900-01-01")
    assert [line["filters"] for line in audited(desk)[before:]] == [["name"], ["born"]]


def test_full_index_disk_refuses_nobody_either(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(audited(desk))
    with monkeypatch.context() as patch:
        patch.setattr(Index, "record", full)
        result = desk.call("find", "--name", CANARY)
    assert result.exit_code == 0
    assert CANARY in result.stdout
    assert "does not come into the audit log" in result.stderr
    assert len(audited(desk)) == before


def full(*_: object, **__: object) -> None:
    raise errors.SiteError("disk_error", "index.db: SQLITE_FULL")
