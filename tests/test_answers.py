"""What follows from the answers of `syncd setup`: the edit of a config.toml above all."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd import answers, config
from syncd.answers import BY_NAME, NAME, QUESTIONS, Site, edited
from syncd.errors import ConfigError

SAMPLE = (Path(__file__).parent.parent / "config.toml").read_text("utf-8")
ROOT = Path("/")


def change(text: str, key: tuple[str, str], value: Any) -> str:
    return edited(text, {key: value})


# --- the edit


@pytest.mark.parametrize(
    ("before", "key", "value", "after"),
    [
        ("", ("drop", "host"), "a", '[drop]\nhost = "a"\n'),
        ('[drop]\nhost = "a"', ("drop", "host"), "b", '[drop]\nhost = "b"'),
        ('[drop]\nhost="a"# mine\n', ("drop", "host"), "b", '[drop]\nhost = "b"# mine\n'),
        ('[drop]\nhost = "a # b"  # mine\n', ("drop", "host"), "c", '[drop]\nhost = "c"  # mine\n'),
        ("[drop]\n# port = 22\n\n[log]\n", ("drop", "port"), 23, "[drop]\nport = 23\n# port = 22\n\n[log]\n"),
        ('[drop]\nhost = "a"\n\n[log]\n', ("drop", "port"), 23, '[drop]\nhost = "a"\nport = 23\n\n[log]\n'),
        ('[drop]\nhost = "a"', ("drop", "port"), 23, '[drop]\nhost = "a"\nport = 23\n'),
        ('[drop]\nhost = "a"', ("log", "keep"), 3, '[drop]\nhost = "a"\n\n[log]\nkeep = 3\n'),
        ('[drop]\r\nhost = "a"\r\n', ("drop", "port"), 23, '[drop]\r\nhost = "a"\r\nport = 23\r\n'),
        ('\ufeff[drop]\nhost = "a"\n', ("drop", "host"), "b", '\ufeff[drop]\nhost = "b"\n'),
        ('[drop]\nhost = "a"\nport = 22\n', ("drop", "host"), None, "[drop]\nport = 22\n"),
        ("[drop]\nport = 22\n", ("drop", "host"), None, "[drop]\nport = 22\n"),
        ("[drop]\nport = 22\n", ("log", "path"), None, "[drop]\nport = 22\n"),
        ('[a]\nx = [ # one\n  "1", # two\n] # three\ny = 2\n', ("a", "x"), ["2"], '[a]\nx = ["2"] # three\ny = 2\n'),
        ('[a]\nx = [\n"1",\n]\ny = 2\n', ("a", "x"), None, "[a]\ny = 2\n"),
        ('[a]\nx = """\n[a]\n"""\n[b]\n', ("b", "y"), True, '[a]\nx = """\n[a]\n"""\n[b]\ny = true\n'),
        ("[ drop ] # site\nport = 22\n", ("drop", "port"), 23, "[ drop ] # site\nport = 23\n"),
    ],
)
def test_one_value_is_put_and_the_rest_stays(before: str, key: tuple[str, str], value: Any, after: str) -> None:
    assert change(before, key, value) == after


@pytest.mark.parametrize(
    "before",
    [
        'drop = { host = "a" }\n',
        'drop.host = "a"\n',
        '[drop]\n"host" = "a"\n',
        '[x]\ny = """\n[drop]\nhost = "a"\n"""\n[drop]\nhost = "b"\n',
        '["drop"]\nhost = "a"\n',
        '[drop]\nhost = """\n[x]\n"""\n',
    ],
)
def test_what_cannot_be_edited_is_refused_not_spoilt(before: str) -> None:
    tomllib.loads(before)
    with pytest.raises(ConfigError, match=r"change \[drop\] host by hand"):
        change(before, ("drop", "host"), "c")


@given(st.data())
def test_the_commented_sample_keeps_every_other_line(data: st.DataObject) -> None:
    question = data.draw(st.sampled_from([each for each in QUESTIONS if each.key]))
    value = data.draw(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20))
    assert question.key
    text = change(SAMPLE, question.key, value)
    section, key = question.key
    wanted = tomllib.loads(SAMPLE)
    wanted.setdefault(section, {})[key] = value
    assert tomllib.loads(text) == wanted
    before, after = SAMPLE.splitlines(), text.splitlines()
    there = key in tomllib.loads(SAMPLE)[section]
    assert len(after) == len(before) + (not there)
    new = [line for line in after if line not in before]
    assert len(new) <= 1
    assert [line for line in before if line not in after] == (
        [] if not (there and new) else [before[after.index(new[0])]]
    )


# --- questions and their answers


def asked(before: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """All answers of somebody who says `told` and else Enter."""
    said = dict(before)
    for question in QUESTIONS:
        if answers.applies(question, said):
            said[question.name] = told.get(question.name, answers.default(question, "main", said, before))
            if (question.name, said[question.name]) == ("sftp", "here"):
                said["sftp_host"] = answers.HERE
    return said


FIRST = {
    "time_zone": "America/Chicago",
    "sftp_host": "sftp.example.org",
    "sftp_username": "office",
    "host_key": f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{'A' * 43}",
}


def settings(said: dict[str, Any], before: dict[str, Any], text: str = "") -> tuple[str, config.Settings]:
    text = edited(text, answers.edits(QUESTIONS, said | {"host_key": FIRST["host_key"]}, before))
    return text, config.parse(text, name="main", folder=ROOT, environ={})


def test_what_is_written_is_what_is_there_at_the_next_call() -> None:
    said = asked({}, FIRST)
    text, written = settings(said, {})
    assert text.count("\n") < 25
    before = answers.present(written, ())
    again = asked(before, {})
    assert settings(again, before, text)[0] == text
    assert before["archive"] == "/srv/archive/main"
    assert before["sftp_address"] == "sftp.example.org"


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ({"sftp_host": "2001:db8::1", "sftp_port": 2022}, "[2001:db8::1]:2022"),
        ({"sftp_port": 2022}, "sftp.example.org:2022"),
        ({"sftp_host": "127.0.0.1"}, None),
        ({"sftp_host": "127.0.0.1", "mode": "local"}, "127.0.0.1"),
        ({"sftp": "here"}, None),
    ],
)
def test_the_address_follows_from_the_host_where_it_can(told: dict[str, Any], address: str | None) -> None:
    assert asked({}, FIRST | told)["sftp_address"] == address


def test_a_site_that_moved_loses_its_old_address_and_port() -> None:
    text, there = settings(asked({}, FIRST | {"sftp_port": 2022}), {})
    before = answers.present(there, ())
    kept = asked(before, {})
    assert (kept["sftp_port"], kept["sftp_address"]) == (2022, "sftp.example.org:2022")
    moved = asked(before, {"sftp_host": "other.example.org"})
    assert (moved["sftp_port"], moved["sftp_address"]) == (22, "other.example.org")
    assert asked(before, {"sftp_port": 2023})["sftp_address"] == "sftp.example.org:2023"
    here = asked(before, {"sftp": "here", "sftp_address": "office.example.org"})
    assert here["sftp_port"] == answers.SITE_PORT
    back = answers.present(settings(here, before, text)[1], ("203.0.113.7",))
    assert back["sftp"] == "here"
    elsewhere = asked(back, {"sftp": "elsewhere"})
    assert (elsewhere["sftp_username"], elsewhere["sftp_host"]) == (None, None)


def test_another_mode_has_another_url() -> None:
    text, there = settings(asked({}, FIRST | {"mode": "service", "url": "http://office:30223/api/v1"}), {})
    before = answers.present(there, ())
    assert asked(before, {})["url"] == "http://office:30223/api/v1"
    text, there = settings(asked(before, {"mode": "remote"}), before, text)
    assert there.api.url == config.MODES["remote"][0]
    assert "url" not in tomllib.loads(text)["api"]
    before = answers.present(there, ())
    assert asked(before, {"mode": "service"})["url"] == config.MODES["service"][0]


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("sftp_port", " 2022 ", 2022),
        ("sftp_port", "ssh", "ssh"),
        ("notify_command", "/bin/alert 'a b'", ["/bin/alert", "a b"]),
        ("notify_command", "-", None),
        ("sftp_sources", "203.0.113.7, 198.51.100.0/28", ["203.0.113.7", "198.51.100.0/28"]),
        ("sftp_folder", "-", "-"),
    ],
)
def test_what_is_typed_becomes_what_a_file_of_answers_would_say(name: str, typed: str, value: object) -> None:
    assert answers.typed(BY_NAME[name], typed) == value


def test_an_open_quotation_mark_is_an_error() -> None:
    with pytest.raises(ValueError, match="quotation"):
        answers.typed(BY_NAME["notify_command"], "'/bin/alert")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("mode", "far", "must be 'remote', 'service' or 'local'"),
        ("time_zone", {"a": 1}, "must be plain text"),
        ("sftp", "there", "must be here or elsewhere"),
        ("sftp", "here", None),
        ("sftp_sources", ["203.0.113.7/24"], "must be addresses"),
        ("sftp_sources", [], "must be addresses"),
        ("sftp_sources", "203.0.113.7", "must be addresses"),
        ("sftp_sources", ["203.0.113.7", "2001:db8::/32"], None),
        ("developer_key", "two words", None),
        ("developer_key", "two\nlines", "one line of plain text"),
        ("developer_key", 7, "one line of plain text"),
        ("notify_command", None, None),
        ("notify_command", ["alert"], "absolute path first"),
        ("archive", "/srv/archive/main", None),
        ("archive", "/", "must be an absolute path"),
        ("host_key", "ssh-ed25519 x", "is not a key"),
    ],
)
def test_a_wrong_answer_is_told_without_its_value(name: str, value: object, problem: str | None) -> None:
    said = answers.wrong(BY_NAME[name], value, {"mode": "remote"})
    assert said is None if problem is None else said is not None and said.startswith(f"{name}: ") and problem in said


def test_a_name_makes_a_user_that_systemd_takes() -> None:
    assert len("syncd-" + "a" * 25) == len("drop--" + "a" * 25) == 31
    assert NAME.fullmatch("a" * 25)
    assert not NAME.fullmatch("a" * 26)


# --- texts for the machine


def test_only_an_archive_outside_needs_a_drop_in() -> None:
    assert answers.drop_in(ROOT, Path("/srv/archive/main"), Path("/srv/archive/a/b")) == ""
    said = answers.drop_in(
        ROOT, Path("/mnt/a b"), Path('/mnt/100% "full"'), Path("/mnt/a b"), Path("/srv/archive/main")
    )
    assert said.splitlines()[1:] == [
        "[Service]",
        'ReadWritePaths="-/mnt/a b"',
        r'ReadWritePaths="-/mnt/100%% \"full\""',
    ]


def test_the_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    public = tmp_path / "key.pub"
    public.write_text(FIRST["host_key"])
    printed = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout.split()
    assert answers.fingerprint(FIRST["host_key"]) == ("ssh-ed25519", printed[1])


def test_the_sites_texts_agree_with_each_other() -> None:
    site = Site("main", Path("/etc/syncd/main"), Path("/srv/sftp/main"), 2222, ("203.0.113.7", "198.51.100.0/28"))
    assert answers.sources_of(site.sshd_config) == site.sources
    assert f"-f {site.folder}/sshd_config" in site.unit
    assert f"ReadWritePaths={site.jail}\n" in site.unit
    assert site.unit_name == "syncd-sftp@main.service"
    assert f"AllowUsers {site.user}@127.0.0.1 {site.user}@203.0.113.7 " in site.sshd_config
