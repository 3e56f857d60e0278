"""The unit files: they parse, name commands that exist, and do not restart what a restart cannot mend."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from syncd.cli import cli
from syncd.config import parse
from syncd.errors import EXIT_CONFIG, EXIT_LOCKED, EXIT_TERMINATED, ConfigError

UNITS = Path(__file__).parent.parent / "systemd"
NAMES = ("syncd@.service", "syncd-backfill@.service")
OTHERS = ("syncd-alert@.service", "syncd.target")
SECTIONS = {"Unit", "Service", "Install"}
Unit = dict[tuple[str, str], list[str]]


def read(name: str) -> Unit:
    """A unit's values by (section, directive), in order. Raises AssertionError for a line that systemd would skip."""
    unit: Unit = {}
    section = ""
    for line in (UNITS / name).read_text("ascii").splitlines():
        if not line or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[([A-Z][a-z]+)\]", line):
            section = heading[1]
            assert section in SECTIONS
            continue
        directive = re.fullmatch(r"([A-Z][A-Za-z]+)=(.*)", line)
        assert directive, f"{name}: not a directive: {line}"
        assert section, f"{name}: before any section: {line}"
        unit.setdefault((section, directive[1]), []).append(directive[2])
    return unit


@pytest.fixture(params=NAMES)
def unit(request: pytest.FixtureRequest) -> Unit:
    return read(request.param)


def sandbox(name: str) -> list[str]:
    """Every directive from User= on: who runs it, with what, inside which walls."""
    lines = (UNITS / name).read_text("ascii").partition("[Install]")[0].splitlines()
    return [line for line in lines[lines.index("User=syncd-%i") :] if line and not line.startswith("#")]


def test_no_other_unit_lies_unchecked() -> None:
    assert sorted(path.name for path in UNITS.iterdir()) == sorted([*NAMES, *OTHERS, "install.sh"])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The units with a program that exists, as `systemd-analyze verify` wants."""
    for name in (*NAMES, *OTHERS):
        text = (UNITS / name).read_text("ascii").replace("/opt/syncd/current/bin/", "/bin/")
        (tmp_path / name).write_text(text.replace("/bin/syncd", "/bin/true").replace("/bin/python", "/bin/true"))
    return tmp_path


def analyze(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze; where it is missing these tests fail: apt install systemd."""
    environ = {**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_PAGER": ""}
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, env=environ, check=False)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_systemd_finds_nothing_to_say_against_a_unit(copied: Path, name: str) -> None:
    told = analyze(copied, "verify", str(copied / name.replace("@.", "@main.")))
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_exposure_is_1_1_at_most(copied: Path, name: str) -> None:
    told = analyze(copied, "security", "--offline=true", "--threshold=11", str(copied / name))
    assert told.returncode == 0, told.stdout
    assert "Overall exposure level" in told.stdout


def test_all_practices_stop_with_the_target_and_an_end_for_good_is_told(unit: Unit) -> None:
    assert unit["Unit", "PartOf"] == ["syncd.target"]
    assert unit["Unit", "OnFailure"] == ["syncd-alert@%i.service"]


def test_unit_calls_a_verb_that_exists_with_options_that_it_has(unit: Unit) -> None:
    (start,) = unit["Service", "ExecStart"]
    program, option, practice, verb, *rest = shlex.split(start)
    assert (program, option, practice) == ("/opt/syncd/current/bin/syncd", "-p", "%i")
    command = cli.commands[verb]
    command.make_parser(click.Context(command)).parse_args(rest)


def test_unit_is_not_restarted_for_what_a_restart_cannot_mend(unit: Unit) -> None:
    no_user, no_credentials = 217, 243  # systemd.exec(5), "Process Exit Codes"
    (codes,) = unit["Service", "RestartPreventExitStatus"]
    locked = {EXIT_LOCKED} if unit["Service", "Restart"] == ["on-abnormal"] else set()
    assert {int(code) for code in codes.split()} == {EXIT_CONFIG, no_user, no_credentials} | locked


def test_daemon_that_another_process_keeps_out_is_started_again_after_a_pause() -> None:
    daemon = read("syncd@.service")
    assert str(EXIT_LOCKED) not in daemon["Service", "RestartPreventExitStatus"][0].split()
    assert int(daemon["Service", "RestartSec"][0]) >= 30


def test_daemon_is_restarted_for_ever_and_supervised() -> None:
    daemon = read("syncd@.service")
    assert daemon["Service", "Type"] == ["notify"]
    assert daemon["Service", "Restart"] == ["always"]
    assert daemon["Unit", "StartLimitIntervalSec"] == ["0"]
    assert daemon["Service", "WatchdogSec"]


def test_stopping_a_backfill_is_no_failure() -> None:
    assert read("syncd-backfill@.service")["Service", "SuccessExitStatus"] == [str(EXIT_TERMINATED)]


def test_stopping_has_twice_the_promised_ten_seconds(unit: Unit) -> None:
    assert unit["Service", "TimeoutStopSec"] == ["20"]


def test_credentials_are_those_that_the_sample_configuration_names(unit: Unit) -> None:
    folder = UNITS.parent
    settings = parse((folder / "config.toml").read_text("utf-8"), name="main", folder=folder, environ={})
    wanted = {settings.api.developer_key_file, settings.api.customer_key_file, settings.drop.password_file}
    loaded = dict(each.split(":") for each in unit["Service", "LoadCredential"])
    assert loaded == {name: f"/etc/syncd/%i/{name}" for name in wanted}


def test_longest_name_of_a_practice_makes_a_users_name_that_systemd_takes() -> None:
    folder = UNITS.parent
    text = (folder / "config.toml").read_text("utf-8")
    assert (
        len("syncd-" + parse(text, name="x" * 25, folder=folder, environ={}).name) == 31
    )  # systemd.syntax, UT_NAMESIZE
    with pytest.raises(ConfigError):
        parse(text, name="x" * 26, folder=folder, environ={})


def test_each_practice_has_a_user_of_its_own(unit: Unit) -> None:
    assert unit["Service", "User"] == unit["Service", "Group"] == ["syncd-%i"]


def test_both_units_run_inside_the_same_walls() -> None:
    assert sandbox("syncd@.service") == sandbox("syncd-backfill@.service")


def test_the_service_may_write_the_sample_configurations_archive(unit: Unit) -> None:
    folder = UNITS.parent
    settings = parse((folder / "config.toml").read_text("utf-8"), name="main", folder=folder, environ={})
    writable = [Path(value.removeprefix("-")) for value in unit["Service", "ReadWritePaths"]]
    assert any(settings.archive.path.is_relative_to(path) for path in writable)
