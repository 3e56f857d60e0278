"""What syncd is built from: locked with hashes, wheels only, under licences that a practice may use."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from flit_core import buildapi  # type: ignore[import-untyped]  # it has no types

from syncd.exporting import PAGE_FILES
from tests.licences import acceptable, licence, locked

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.txt", "requirements-dev.txt")


def test_every_locked_package_has_a_licence_that_allows_its_use() -> None:
    assert len(locked()) > 20
    assert {name: licence(name) for name in locked() if not acceptable(licence(name))} == {}


@pytest.mark.parametrize(
    "words", ["", "GPL-3.0-only", "GNU General Public License v3 (GPLv3)", "AGPL-3.0", "Commercial"]
)
def test_licence_that_is_unknown_or_forbids_is_seen(words: str) -> None:
    assert not acceptable(words)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes_and_no_address(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    packages = re.split(r"\n(?=[a-z0-9])", text.replace("\\\n", " "))
    assert len(packages) > 20
    assert [line for line in packages if "==" not in line or "--hash=sha256:" not in line] == []
    assert "://" not in text


@pytest.mark.parametrize("name", LOCKS)
def test_what_the_project_asks_for_is_locked(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = {re.split(r"[^\w-]", each)[0].lower() for each in project["dependencies"]}
    assert asked
    assert asked <= {line.partition("==")[0] for line in (ROOT / name).read_text("utf-8").splitlines()}


def test_nothing_is_installed_unhashed_or_built_from_source() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if "$(PIP) install" in line]
    assert len(installs) == 2
    for line in installs:
        assert (
            "--require-hashes --only-binary :all: -r" in line or "--no-deps --no-build-isolation --editable ." in line
        )


def test_a_wheel_holds_the_pages_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / buildapi.build_wheel(str(tmp_path))) as wheel:
        assert {f"syncd/{name}" for name in PAGE_FILES} <= set(wheel.namelist())
