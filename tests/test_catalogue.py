"""No case of the catalogue of faults is without a test that exists."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.catalogue import CASES, SECTIONS, Case

TESTS = Path(__file__).parent


@cache
def _tests_in(file: str) -> frozenset[str]:
    """The functions that pytest collects from a file below tests/; nothing where there is no such file."""
    path = TESTS / file
    if not path.name.startswith("test_") or not path.exists():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assigned = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    return frozenset(name for name in named if name.startswith("test_")) | frozenset(
        name for name in assigned if name.startswith("Test")
    )


def _missing(case: Case) -> list[str]:
    """What a case names that is no test."""
    return [name for name in case.tests if name.partition("::")[2] not in _tests_in(name.partition("::")[0])]


def _table() -> str:
    lines = []
    for case in CASES:
        lines.append(f"{case.id}  {case.fault}")
        lines += [f"       {name}" for name in case.tests]
        lines += [f"       {case.why}"] if case.why else []
    return "\n".join(lines)


def test_the_catalogue_has_each_of_its_112_cases_once() -> None:
    expected = [f"{letter}{number:02}" for letter, count in SECTIONS.items() for number in range(1, count + 1)]
    assert len(expected) == 112
    assert Counter(case.id for case in CASES) == Counter(expected)


def test_each_case_of_the_catalogue_has_a_test_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{_table()}")  # noqa: T201 - the table is what this test is read for
    assert not [case.id for case in CASES if not case.tests]
    assert not {case.id: _missing(case) for case in CASES if _missing(case)}
