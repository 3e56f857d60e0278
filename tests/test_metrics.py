"""The figures of a status as a file for node_exporter."""

from __future__ import annotations

import re
from typing import get_args

from syncd.errors import SiteError
from syncd.metrics import exposition
from syncd.report import Budget, Report, State, StatusFacts, Surroundings, Trouble, status

NOW = 1_775_000_000.0
AROUND = Surroundings("main", "0.1.0", Budget(1, 1, 1), holder="run, pid 812", requests_today=7, throttled_today=1)
FACTS = StatusFacts(owed=3, failing={"timeout_60s": 2}, lists=4, oldest_polled_at=NOW - 60.0, archived_bytes=5 * 10**11)
LINE = re.compile(r'(?P<name>syncd_[a-z_]+)\{practice="main"(?P<labels>[^}]*)\} (?P<value>[-+0-9.e]+)')


def told(facts: StatusFacts = FACTS, around: Surroundings = AROUND) -> dict[str, float]:
    """Every line of figures, read as node_exporter reads it: name and further labels, value."""
    lines = exposition(said(facts, around)).splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found)
    return {match["name"] + match["labels"]: float(match["value"]) for match in found if match}


def said(facts: StatusFacts = FACTS, around: Surroundings = AROUND) -> Report:
    return status(facts, around, NOW)


def test_figures_are_those_of_the_status() -> None:
    figures = told()
    assert figures["syncd_report_timestamp_seconds"] == NOW
    assert (figures["syncd_owed_items"], figures["syncd_failing_items"]) == (3, 2)
    assert (figures["syncd_requests_today"], figures["syncd_throttled_today"]) == (7, 1)
    assert figures["syncd_oldest_list_seconds"] == 60
    assert figures["syncd_last_complete_sweep_timestamp_seconds"] == NOW - 60
    assert figures["syncd_archived_bytes"] == 5 * 10**11


def test_what_is_not_known_has_no_line() -> None:
    figures = told(StatusFacts(lists=4, lists_never_polled=4))
    assert "syncd_archive_free_bytes" not in figures
    assert "syncd_last_complete_sweep_timestamp_seconds" not in figures
    assert told(around=Surroundings("main", "0.1.0", Budget(1, 1, 1), free_bytes=9))["syncd_archive_free_bytes"] == 9


def test_one_state_is_in_force_and_says_why_and_who_must_act() -> None:
    refused = Trouble("api", "key_refused", str(SiteError("key_refused")), NOW - 9999, NOW + 300, 9)
    figures = told(StatusFacts(lists=4, troubles=(refused,)))
    states = {name: value for name, value in figures.items() if name.startswith("syncd_state")}
    assert len(states) == len(get_args(State))
    assert [name for name, value in states.items() if value] == [
        'syncd_state,state="blocked",reason="key_refused",who="integrator"'
    ]
    assert figures["syncd_healthy"] == 0


def test_every_figure_is_named_once_with_its_meaning_and_its_type() -> None:
    lines = exposition(said()).splitlines()
    helped = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    typed = [line.split()[2] for line in lines if re.fullmatch(r"# TYPE \S+ gauge", line)]
    assert helped == typed == list(dict.fromkeys(line.split("{")[0] for line in lines if not line.startswith("#")))
    assert exposition(said()).endswith("\n")
