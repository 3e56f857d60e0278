"""README, "For programs": the names that other programs rely on are those that the product gives, and no others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from syncd.catalog import Catalog
from syncd.logs import EVENTS, KEYS
from syncd.metrics import exposition
from syncd.report import SCHEMA_VERSION, Incident, Report, status
from syncd.search import Filters
from tests.small import serving, small
from tests.test_report import AROUND, EVERYTHING, NOW

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
NAME = re.compile(r"`([a-z0-9_]+)`")


def section(heading: str) -> str:
    """What stands below a heading of "For programs"."""
    found = re.search(rf"^### {heading}\n(.*?)(?=^##)", README, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def rows(heading: str) -> list[tuple[str, str]]:
    """First and second column of the table below a heading."""
    return re.findall(r"^\| (`.*?) \| (.*) \|$", section(heading), re.MULTILINE)


def names(heading: str) -> list[str]:
    """Each name of the first column."""
    return [name for first, _ in rows(heading) for name in NAME.findall(first)]


def everything() -> Report:
    incidents = (Incident("api", "throttled", NOW - 90, NOW - 30),)
    around = replace(AROUND, free_bytes=10**12)
    facts = replace(EVERYTHING, incidents=incidents, delays={"document": [2.0]}, last_archived_at=NOW)
    return status(facts, around, NOW)


def test_every_field_of_a_status_is_explained_and_none_that_there_is_not() -> None:
    assert sorted(names("`status --json` and `status.json`")) == sorted(everything())


@pytest.mark.parametrize("name", ["guards", "incidents", "freshness"])
def test_every_field_inside_a_field_of_a_status_is_explained(name: str) -> None:
    said = everything()[name]
    (within,) = said.values() if isinstance(said, dict) else said
    (words,) = [words for first, words in rows("`status --json` and `status.json`") if f"`{name}`" in first]
    assert sorted(NAME.findall(words)) == sorted(within)


def test_every_field_that_find_tells_is_explained(tmp_path: Path) -> None:
    world = serving(tmp_path, small())
    world.run()
    (*_, row) = Catalog(world.index, "main").find(Filters())
    assert sorted(names("`find --json`")) == sorted({"schema_version", *row})
    world.stop()


def test_every_figure_of_the_metrics_file_is_explained() -> None:
    figures = re.findall(r"^# HELP (\S+) (.*)$", exposition(everything()), re.MULTILINE)
    assert [(NAME.findall(first)[0], words) for first, words in rows("`metrics_file`")] == figures


def test_every_event_of_the_log_is_explained_with_the_products_own_words() -> None:
    assert {NAME.findall(first)[0]: words for first, words in rows("`syncd.log`")} == EVENTS
    said = section("`syncd.log`").partition("\n\n| ")[0]
    assert sorted(NAME.findall(said.partition("what it is about: ")[2])) == sorted(KEYS - {"practice"})


def test_the_rule_of_the_schema_version_names_the_one_in_force() -> None:
    (rule,) = re.findall(r"^## For programs\n(.*?)(?=^###)", README, re.MULTILINE | re.DOTALL)
    assert f"`schema_version` is {SCHEMA_VERSION}" in rule
