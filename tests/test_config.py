"""The contract of config.toml: every default, every mistake named with what to do, all of them at once."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from syncd.config import Settings, Window, is_loopback, parse, parse_duration, parse_size, parse_time, parse_window
from syncd.errors import ConfigError
from syncd.model import KINDS

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
MINIMAL: dict[str, dict[str, str]] = {
    "practice": {"time_zone": '"America/Chicago"'},
    "drop": {"host": '"sftp.example.org"', "username": '"opendental"', "host_key": f'"{HOST_KEY}"'},
    "archive": {"path": '"/srv/archive/main"'},
}


def read(text: str, environ: dict[str, str] | None = None, name: str = "main") -> Settings:
    return parse(text, name=name, folder=Path("/etc/syncd/main"), environ=environ or {})


def with_keys(section: str, **keys: str | None) -> str:
    """The smallest valid text with some keys of one section set to TOML values, or taken out (None)."""
    tables = {name: dict(table) for name, table in MINIMAL.items()}
    table = tables.setdefault(section, {})
    for key, value in keys.items():
        table.pop(key, None)
        if value is not None:
            table[key] = value
    return "\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {value}" for key, value in table.items()) for name, table in tables.items()
    )


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return caught.value.problems


def test_sample_parses_and_shows_the_defaults() -> None:
    sample = read((Path(__file__).parents[1] / "config.toml").read_text("utf-8"))
    smallest = read(with_keys("drop"))
    assert sample.drop.address == "sftp.example.org"
    for section in ("practice", "api", "archive", "state", "sync", "log", "status", "verify", "notify"):
        assert getattr(sample, section) == getattr(smallest, section), section


def test_defaults_are_those_of_the_contract() -> None:
    settings = read(with_keys("drop"))
    assert (settings.name, settings.zone) == ("main", ZoneInfo("America/Chicago"))
    assert (settings.api.mode, settings.api.url) == ("remote", "https://api.opendental.com/api/v1")
    assert (settings.api.min_interval, settings.api.share, settings.api.share_closed) == (1.1, 0.5, 1.0)
    assert (settings.api.page_limit, settings.api.allow_upload, settings.api.ca_bundle) == (100, False, None)
    assert (settings.drop.port, settings.drop.folder, settings.drop.address) == (22, "syncd", "sftp.example.org")
    assert (settings.archive.reserve, settings.archive.group) == (5 * 10**9, None)
    assert settings.state_path == Path("/var/lib/syncd/main")
    assert settings.log_path == Path("/var/log/syncd/main")
    assert (settings.sync.patients, settings.sync.kinds) == (None, frozenset(KINDS))
    assert (settings.sync.patient_names, settings.sync.vanish_after) == (True, 86_400)
    assert (settings.sync.change_feed, settings.sync.appointments) == ("auto", "auto")
    assert settings.backfill.window == ()
    assert (settings.log.max_size, settings.log.keep, settings.status.every) == (20 * 10**6, 10, 3600)
    assert (settings.status.metrics_file, settings.verify.every) == (None, 86_400)
    assert (settings.verify.subset, settings.notify.after) == (Fraction(1, 30), 1800)
    assert (settings.notify.ping_url, settings.notify.command) == (None, None)


def test_settings_are_frozen() -> None:
    settings = read(with_keys("drop"))
    with pytest.raises(ValidationError):
        settings.api.share = 1.0


@pytest.mark.parametrize(
    ("mode", "url", "interval", "limit"),
    [
        ("remote", "https://api.opendental.com/api/v1", 1.1, 100),
        ("service", "http://localhost:30223/api/v1", 0.01, 1000),
        ("local", "http://localhost:30222/api/v1", 0.01, 1000),
    ],
)
def test_mode_sets_url_interval_and_page_size(mode: str, url: str, interval: float, limit: int) -> None:
    api = read(with_keys("api", mode=f'"{mode}"')).api
    assert (api.url, api.min_interval, api.page_limit) == (url, interval, limit)


def test_all_problems_are_reported_at_once_with_section_and_key() -> None:
    text = """
    [practise]
    [api]
    shar = 0.5
    mode = "remot"
    min_interval = "0.2s"
    [drop]
    host = "localhost"
    port = "22"
    [sync]
    kinds = ["moun"]
    username = "x"
    [verify]
    qqq = 1
    """
    found = problems(text)
    assert [problem.split(":")[0] for problem in found] == [
        "[practice] time_zone",
        "[api] mode",
        "[api] min_interval",
        "[api] shar",
        "[drop] port",
        "[drop] username",
        "[drop] address",
        "[drop] known_hosts_file",
        "[archive] path",
        "[sync] kinds",
        "[sync] username",
        "[verify] qqq",
        "[practise]",
    ]
    by_key = dict(problem.split(": ", 1) for problem in found)
    assert "did you mean share?" in by_key["[api] shar"]
    assert "belongs in [drop]" in by_key["[sync] username"]
    assert "valid are every, subset" in by_key["[verify] qqq"]
    assert "did you mean practice?" in by_key["[practise]"]
    assert "host[:port]" in by_key["[drop] address"]


def test_empty_text_names_every_required_key() -> None:
    keys = {problem.split(":")[0] for problem in problems("")}
    assert {"[practice] time_zone", "[drop] host", "[drop] username", "[archive] path"} < keys


def test_syntax_error_names_its_line() -> None:
    (problem,) = problems("[api]\nshare = = 1\n")
    assert "line 2" in problem


def test_byte_order_mark_and_crlf_of_a_windows_editor_are_accepted() -> None:
    assert read("\ufeff" + with_keys("drop").replace("\n", "\r\n")).name == "main"


def test_key_in_the_place_of_a_section_is_named() -> None:
    assert "[api]: must be a table: write [api] on a line of its own" in problems("api = 3")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("practice", "name", '"Main Street"'),
        ("practice", "name", "7"),
        ("practice", "time_zone", '"Chicago"'),
        ("practice", "time_zone", '"../zone"'),
        ("practice", "time_zone", "6"),
        ("api", "mode", '"cloud"'),
        ("api", "url", '"http://api.example.org/v1"'),
        ("api", "url", '"ftp://api.example.org"'),
        ("api", "url", '"https://user:word@api.example.org/v1"'),
        ("api", "url", "1"),
        ("api", "min_interval", "1.1"),
        ("api", "min_interval", '"0s"'),
        ("api", "min_interval", '"0.4s"'),
        ("api", "share", "0"),
        ("api", "share", "1.1"),
        ("api", "share", "nan"),
        ("api", "share", "true"),
        ("api", "share_closed", "-1"),
        ("api", "developer_key_file", '""'),
        ("api", "allow_upload", '"yes"'),
        ("drop", "host", '"sftp://sftp.example.org"'),
        ("drop", "host", '"a b"'),
        ("drop", "port", "0"),
        ("drop", "port", "65536"),
        ("api", "url", "'https://127.0.0.1:65536/api'"),
        ("drop", "port", "true"),
        ("drop", "username", '"a\\nb"'),
        ("drop", "folder", '"../other"'),
        ("drop", "folder", '"/srv/drop"'),
        ("drop", "folder", '"a//b"'),
        ("drop", "address", '"sftp://sftp.example.org"'),
        ("drop", "address", '"::1:22"'),
        ("drop", "host_key", '"ssh-ed25519-only"'),
        ("drop", "host_key", "5"),
        ("drop", "host_key", '"ssh-ed25519 !!!!"'),
        ("drop", "host_key", '"ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAA"'),
        ("archive", "path", '"archive"'),
        ("archive", "path", '"/"'),
        ("archive", "path", '"/srv/../etc"'),
        ("archive", "reserve", '"5"'),
        ("archive", "reserve", '"0 GB"'),
        ("archive", "group", '"no group"'),
        ("state", "path", '"state"'),
        ("log", "path", "1"),
        ("sync", "patients", '"some"'),
        ("sync", "patients", "[]"),
        ("sync", "patients", "[0]"),
        ("sync", "patients", "[true]"),
        ("sync", "kinds", "[]"),
        ("sync", "kinds", '["document", "xray"]'),
        ("sync", "kinds", "[[]]"),
        ("sync", "change_feed", '"on"'),
        ("backfill", "window", "[]"),
        ("backfill", "window", '"Sat-Sun"'),
        ("backfill", "window", "[1]"),
        ("backfill", "window", '["Mon-Fri 18:00-25:00"]'),
        ("log", "keep", "0"),
        ("status", "metrics_file", '"syncd.prom"'),
        ("verify", "subset", '"31/30"'),
        ("verify", "subset", '"1/0"'),
        ("verify", "subset", '"0.1"'),
        ("notify", "ping_url", '"http://ping.example.org/token"'),
        ("notify", "command", '"/usr/local/bin/alert"'),
        ("notify", "command", '["alert"]'),
        ("notify", "command", "[]"),
    ],
)
def test_bad_value_is_one_problem_that_never_repeats_it(section: str, key: str, value: str) -> None:
    (problem,) = problems(with_keys(section, **{key: value}))
    assert problem.startswith(f"[{section}] {key}: ")
    assert len(value.strip('"')) < 9 or value.strip('"') not in problem


MISTAKES: tuple[tuple[str, str, str, str | None, str], ...] = (  # what, section, key, its value (None: left out), words
    ("no time zone", "practice", "time_zone", None, "is missing: add it"),
    ("a time zone as Windows names it", "practice", "time_zone", '"Central Standard Time"', '"America/Chicago"'),
    ("a name with a space", "practice", "name", '"Main Street"', "a-z, 0-9 and '-'"),
    ("a misspelt key", "api", "shar", "0.5", "did you mean share?"),
    ("a key of another section", "api", "username", '"opendental"', "it belongs in [drop]"),
    ("the key itself, not its file", "api", "customer_key", '"abc"', "did you mean customer_key_file?"),
    ("the password itself", "drop", "password", '"secret"', "did you mean password_file?"),
    ("an unknown mode", "api", "mode", '"cloud"', "'remote', 'service' or 'local'"),
    ("a pace that the vendor punishes", "api", "min_interval", '"100ms"', 'at least "0.5s"'),
    ("a duration without a unit", "sync", "vanish_after", '"24"', 'like "30m"'),
    ("a share in per cent", "api", "share", "50", "less than or equal to 1"),
    ("plain http to the vendor", "api", "url", '"http://api.opendental.com/api/v1"', "must start with https://"),
    ("no archive", "archive", "path", None, "is missing: add it"),
    ("a relative path", "archive", "path", '"archive/main"', "must be an absolute path in quotes"),
    ("a size without a unit", "archive", "reserve", '"5"', 'like "5 GB"'),
    ("a size that is a number", "archive", "reserve", "5", 'like "5 GB"'),
    ("a URL for a host", "drop", "host", '"sftp://sftp.example.org"', "its name or IP address alone"),
    ("a port in quotes", "drop", "port", '"22"', "must be a valid integer"),
    ("a fingerprint for a key", "drop", "host_key", '"SHA256:abcdefghijklmnopqrstuvwxyz01234"', "see ssh-keyscan"),
    ("an absolute folder of the site", "drop", "folder", '"/srv/drop"', 'a folder like "a" or "a/b"'),
    ("kinds in the plural", "sync", "kinds", '["documents"]', "document, mount, mount-image, sheet, thumbnail"),
    ("patients as texts", "sync", "patients", '["101"]', "a list like [101, 102]"),
    ("a switch that is no switch", "sync", "change_feed", "true", "'auto' or 'off'"),
    ("hours without minutes", "backfill", "window", '["Mon-Fri 18-7"]', '"Mon-Fri 18:00-07:00"'),
    ("a part in per cent", "verify", "subset", '"3%"', '"1/30"'),
    ("a command as one text", "notify", "command", '"/usr/local/bin/alert --now"', "a list, an absolute path first"),
    ("a switch called in plain http", "notify", "ping_url", '"http://ping.example.org/x"', "must start with https://"),
    ("a relative file", "status", "metrics_file", '"syncd.prom"', "must be an absolute path"),
)


@pytest.mark.parametrize(("what", "section", "key", "value", "words"), MISTAKES, ids=[each[0] for each in MISTAKES])
def test_each_typical_mistake_is_told_with_its_key_and_what_to_write(
    what: str, section: str, key: str, value: str | None, words: str
) -> None:
    (problem,) = problems(with_keys(section, **{key: value}))
    assert problem.startswith(f"[{section}] {key}: "), what
    assert words in problem


@pytest.mark.parametrize(("path", "words"), [("/srv/archive", "path: a text stands in quotes"), ('"C:\\x"', "twice")])
def test_text_without_quotes_or_with_a_backslash_is_told_with_its_line_and_key(path: str, words: str) -> None:
    (problem,) = problems(with_keys("archive", path=path))
    assert "at line 8" in problem
    assert words in problem
    assert "path:" not in problems("[archive\npath = 1")[0]
    assert problems("a = 1\na = 2")[0].startswith("config.toml is not valid TOML")
    assert problems("share = 1\nshare = 2\n[api]")[0].endswith("share stands there twice: remove one")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000], ids=["endless number", "brackets"])
def test_value_that_toml_cannot_hold_is_a_problem_of_the_file(value: str) -> None:
    (told,) = problems(f"share = {value}")
    assert told.startswith("config.toml is not valid TOML")
    assert value not in told


def test_mode_of_any_shape_is_a_problem_like_others() -> None:
    told = problems(with_keys("api", mode='["remote"]') + "\n[log]\nmax_sise = 1\n")
    assert [each.partition(":")[0] for each in told] == ["[api] mode", "[log] max_sise"]


def test_missing_pin_and_missing_address_are_told_with_both_ways_out() -> None:
    assert "host_key or known_hosts_file: set exactly one" in problems(with_keys("drop", host_key=None))[0]
    assert "write host[:port] as Open Dental reaches the site" in problems(with_keys("drop", host='"127.0.0.1"'))[0]
    misspelt = problems(with_keys("drop").replace("[archive]", "[archiv]"))
    assert "[archiv]: unknown section; did you mean archive?" in misspelt


def test_vendor_host_needs_half_a_second_but_no_other_host_does() -> None:
    vendor = with_keys("api", url='"https://eu.OpenDental.com/api/v1"', min_interval='"0.49s"')
    assert problems(vendor)[0].startswith("[api] min_interval: must be at least")
    other = with_keys("api", url='"https://notopendental.com/api/v1/"', min_interval='"1ms"')
    assert (read(other).api.min_interval, read(other).api.url) == (0.001, "https://notopendental.com/api/v1")


def test_plain_http_is_allowed_to_loopback_and_in_modes_service_and_local() -> None:
    assert read(with_keys("api", url='"http://127.0.0.1:8080/api/v1"')).api.url == "http://127.0.0.1:8080/api/v1"
    assert read(with_keys("api", url='"http://[::1]:8080/v1"')).api.url == "http://[::1]:8080/v1"
    assert read(with_keys("api", mode='"service"', url='"http://server:30223/v1"')).api.url == "http://server:30223/v1"


def test_loopback_host_needs_an_address_unless_mode_is_local() -> None:
    text = with_keys("drop", host='"127.0.0.1"', port="2222")
    assert problems(text) == (
        "[drop] address: is missing: write host[:port] as Open Dental reaches the site, for host is this machine",
    )
    assert read(text + '\n[api]\nmode = "local"').drop.address == "127.0.0.1:2222"


def test_address_follows_host_and_port() -> None:
    assert read(with_keys("drop", port="2022")).drop.address == "sftp.example.org:2022"
    assert read(with_keys("drop", host='"2001:db8::1"')).drop.address == "[2001:db8::1]"
    assert read(with_keys("drop", address='"office.example.org:2222"')).drop.address == "office.example.org:2222"


def test_host_key_is_pinned_in_exactly_one_way() -> None:
    both = problems(with_keys("drop", known_hosts_file='"known_hosts"'))
    none = problems(with_keys("drop", host_key=None))
    assert both == none
    assert "exactly one" in both[0]
    assert read(with_keys("drop", host_key=None, known_hosts_file='"hosts"')).drop.known_hosts_file == "hosts"
    assert len(problems(with_keys("drop", host_key='"x"', known_hosts_file='"known_hosts"'))) == 1


def test_comment_of_a_host_key_is_dropped() -> None:
    assert read(with_keys("drop", host_key=f'"{HOST_KEY} root@nas"')).drop.host_key == HOST_KEY


def test_folders_come_from_the_text_then_systemd_then_the_name() -> None:
    environ = {"STATE_DIRECTORY": "/run/state:/other", "LOGS_DIRECTORY": "/run/log"}
    settings = read(with_keys("practice", name='"north"'), environ)
    assert (settings.name, settings.state_path, settings.log_path) == ("north", Path("/run/state"), Path("/run/log"))
    assert read(with_keys("state", path='"/data/state"'), environ).state_path == Path("/data/state")


def test_name_defaults_to_the_folder_and_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"\[practice\] name"):
        read(with_keys("drop"), name="Not A Name")


def test_credentials_are_looked_up_with_systemd_first() -> None:
    environ = {"CREDENTIALS_DIRECTORY": "/run/credentials/syncd"}
    settings = read(with_keys("drop"), environ)
    assert settings.credentials_directory == Path("/run/credentials/syncd")
    assert settings.credential_path("key") == [Path("/run/credentials/syncd/key"), Path("/etc/syncd/main/key")]
    assert settings.credential_path("/secret/key") == [Path("/secret/key")]
    assert read(with_keys("drop")).credential_path("key") == [Path("/etc/syncd/main/key")]


def test_lists_and_windows_are_read() -> None:
    sync = read(with_keys("sync", patients="[101, 102, 101]", kinds='["sheet"]')).sync
    assert sync.patients == frozenset({101, 102})
    assert sync.kinds == frozenset({"sheet"})
    window = read(with_keys("backfill", window='["Fri-Mon 18:00-07:00", "Sat"]')).backfill.window
    assert window == (Window(frozenset({4, 5, 6, 0}), 1080, 420), Window(frozenset({5}), 0, 1440))
    notify = read(with_keys("notify", command='["/bin/a", "b"]', ping_url='"https://p.example.org/t?x=1/"')).notify
    assert (notify.command, notify.ping_url) == (("/bin/a", "b"), "https://p.example.org/t?x=1/")


@pytest.mark.parametrize(
    "text", ["", "Mon", "Xyz 10:00-11:00", "Mon-Xyz", "Mon 24:00-07:00", "Mon 7:00-8:00", "Mon 08:00-08:00", "Mon 8-9"]
)
def test_whole_days_and_spans_are_windows_and_nothing_else(text: str) -> None:
    if text == "Mon":
        assert parse_window(text) == Window(frozenset({0}), 0, 1440)
        return
    with pytest.raises(ValueError, match="window"):
        parse_window(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1.1s", 1.1),
        ("50 ms", 0.05),
        ("30m", 1800),
        ("24h", 86_400),
        ("7d", 604_800),
        ("1w", 604_800),
    ],
)
def test_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "-5s", "1.s", "5 s extra", "0h", "1e3s", "٣s", "9999999999s"])
def test_duration_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("5 GB", 5 * 10**9), ("20MB", 2 * 10**7), ("1.5 kB", 1500), ("4 GiB", 2**32), ("7 B", 7)]
)
def test_size_has_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5 gb", "-1 GB", "0.1 B", "5 XB"])
def test_size_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="5 GB"):
        parse_size(text)


@given(st.integers(1, 999_999_999), st.sampled_from(["ms", "s", "m", "h", "d", "w"]))
def test_every_whole_duration_is_read_and_finite(number: int, unit: str) -> None:
    assert 0 < parse_duration(f"{number}{unit}") < 1e15


@given(st.text())
def test_any_text_is_settings_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        read(text)


def test_time_without_an_offset_is_in_the_zone() -> None:
    zone = ZoneInfo("America/Chicago")
    assert parse_time("2026-11-21T18:30", zone) == datetime(2026, 11, 22, 0, 30, tzinfo=UTC).timestamp()
    assert parse_time(" 2026-11-21 ", zone) == datetime(2026, 11, 21, 6, tzinfo=UTC).timestamp()
    assert parse_time("2026-11-21T18:30+01:00", zone) == datetime(2026, 11, 21, 17, 30, tzinfo=UTC).timestamp()
    with pytest.raises(ValueError, match="2026-11-21"):
        parse_time("yesterday", zone)


@pytest.mark.parametrize(("host", "here"), [("localhost", True), ("127.8.0.1", True), ("::1", True), ("nas", False)])
def test_loopback_is_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) is here
