"""The floors hold, and the tool that guards them bites: every kind of wrong import, planted in a copy, is found.

So do the planted bugs of tests/faults/mutants.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutants import MUTANTS

ROOT = Path(__file__).parent.parent
LINT = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The product and its configuration, to be spoilt."""
    shutil.copytree(ROOT / "syncd", tmp_path / "syncd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> tuple[int, str]:
    """What the floors' tool says of the tree in this folder: exit code and text."""
    ran = subprocess.run(
        [LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False, timeout=100, env={"PATH": ""}
    )
    return ran.returncode, ran.stdout + ran.stderr


def plant(folder: Path, module: str, line: str) -> None:
    """Put one import into a module, behind its other imports."""
    path = folder / "syncd" / f"{module}.py"
    path.write_text(f"{path.read_text('utf-8')}\n\ndef planted() -> None:\n    {line}\n", "utf-8")


def test_the_tree_as_it_is_keeps_every_rule(copy: Path) -> None:
    assert (ROOT / "syncd" / "cli.py").exists()
    code, said = lint(copy)
    assert code == 0, said
    assert " 0 broken" in said
    assert "0 kept" not in said


PLANTED = (
    ("naming", "import syncd.mirror", "Floors: imports go down only"),
    ("model", "from syncd.naming import parse_id", "Floors: imports go down only"),
    ("archive", "import syncd.index", "Floors: imports go down only"),  # doors never import each other
    ("listing", "import syncd.daemon", "Floors: imports go down only"),
    ("diff", "import time", "Decisions and words touch nothing outside"),
    ("guards", "import sqlite3", "Decisions and words touch nothing outside"),
    ("index", "import logging", "Doors do not log"),
    ("mirror", "import apscheduler", "One module knows the scheduler"),
    ("pulling", "import syncd.drop", "Only wiring builds the doors to the outside"),
    ("config", "import syncd.demo.clock", "The product does not know the simulated practice"),
)


def test_every_planted_import_is_found_and_its_rule_is_named(copy: Path) -> None:
    for module, line, _ in PLANTED:
        plant(copy, module, line)
    code, said = lint(copy)
    assert code == 1, said
    for module, line, rule in PLANTED:
        assert f"{rule} BROKEN" in said
        told = said.partition(f"{rule}\n---")[2].partition("\n---")[0]  # until the next heading
        assert f"syncd.{module} -> {line.split()[1]} " in told, line


def test_a_new_module_without_a_floor_is_found(copy: Path) -> None:
    (copy / "syncd" / "helper.py").write_text('"""Somebody was in a hurry."""\n')
    code, said = lint(copy)
    assert code != 0
    assert "helper" in said


def test_a_module_that_is_given_a_floor_exists(copy: Path) -> None:
    (copy / "syncd" / "guards.py").unlink()
    code, said = lint(copy)
    assert code != 0
    assert "guards" in said


def test_verbs_that_ask_nobody_load_no_library_that_they_do_not_use() -> None:
    """`status` on a small machine: half of its time would be spent on them."""
    code = "import sys, syncd.cli; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    loaded = set(ran.stdout.split())
    assert "syncd.catalog" in loaded
    assert loaded & {"requests", "urllib3", "paramiko", "cryptography", "apscheduler", "structlog", "rich"} == set()


def test_every_planted_bug_still_has_its_place_in_the_product() -> None:
    """Who moves a line that a mutant changes is told here, and not after half an hour of `make test-faults`."""
    texts = {mutant.path: (ROOT / mutant.path).read_text("utf-8") for mutant in MUTANTS}
    assert [mutant.name for mutant in MUTANTS if texts[mutant.path].count(mutant.old) != 1] == []
