"""Turns config.toml into frozen Settings, or into every problem it has, each with what to do.

Pure: text in, settings out; no file is read here (time zone names are looked up by zoneinfo). Durations are seconds,
sizes bytes. A problem never repeats a value: an address may carry a token.
"""

from __future__ import annotations

import base64
import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from syncd.errors import ConfigError
from syncd.model import KINDS, Kind

Mode = Literal["remote", "service", "local"]

# mode -> (url, seconds from start to start, rows a page). facts.md, "Throttle" and "Access, modes, errors".
MODES: Final[dict[Mode, tuple[str, float, int]]] = {
    "remote": ("https://api.opendental.com/api/v1", 1.1, 100),
    "service": ("http://localhost:30223/api/v1", 0.01, 1000),
    "local": ("http://localhost:30222/api/v1", 0.01, 1000),
}
UNTHROTTLED_REQUEST: Final = 0.05  # seconds that a request is supposed to take where nothing but the office limits it
VENDOR_HOST: Final = re.compile(r"(?:.*\.)?opendental\.com")
VENDOR_MIN_INTERVAL: Final = 0.5  # the fastest tier there is (enterprise)
SFTP_PORT: Final = 22
DAY_MINUTES: Final = 1440
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MILLISECONDS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_BYTES: Final = {"B": 1, "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4} | {
    unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)
}
_HOST: Final = "[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?"
_BRACKETED: Final = r"\[[0-9A-Fa-f:.]{2,45}\]"
_PORT: Final = "(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
_ADDRESS: Final = f"(?:{_HOST}|{_BRACKETED}){_PORT}"
_URL: Final = re.compile(rf"(https?)://({_HOST}|{_BRACKETED}){_PORT}(/[!-~]*)?")
_STEP: Final = r"(?!\.)[A-Za-z0-9._-]{1,100}"
_DAY: Final = "|".join(DAYS)
_CLOCK: Final = "((?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00)"
_WINDOW: Final = re.compile(rf"({_DAY})(?:-({_DAY}))?(?: {_CLOCK}-{_CLOCK})?")
NOT_A_DURATION: Final = 'is not a duration: write a number and ms, s, m, h, d or w in quotes, like "30m"'
NOT_A_SIZE: Final = 'is not a size: write a number and B, kB, MB, GB, TB, MiB, GiB or TiB in quotes, like "5 GB"'
NOT_A_TIME: Final = 'is not a time: write it like "2026-11-21" or "2026-11-21T18:30"'
NOT_A_WINDOW: Final = 'is not a list of windows like ["Mon-Fri 18:00-07:00", "Sat-Sun"]; leave the key out for any time'


def _quantity(text: str, units: Mapping[str, int], problem: str) -> Fraction:
    match = re.fullmatch(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,6}})?) ?({'|'.join(units)})", text)
    amount = Fraction(match[1]) * units[match[2]] if match else Fraction()
    if amount < 1:
        raise ValueError(problem)
    return amount


def parse_duration(text: str) -> float:
    """Seconds of "1.1s", "30m", "24h" or "7d"; at least 1 ms. ValueError says what to write."""
    return float(_quantity(text, _MILLISECONDS, NOT_A_DURATION) / 1000)


def parse_size(text: str) -> int:
    """Bytes of "5 GB", "20 MB" (decimal) or "4 GiB" (binary); at least one. ValueError says what to write."""
    return int(_quantity(text, _BYTES, NOT_A_SIZE))


def parse_time(text: str, zone: ZoneInfo) -> float:
    """Seconds since the epoch of an ISO date or datetime; without an offset it is in `zone`. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(NOT_A_TIME) from error


@dataclass(frozen=True, slots=True)
class Window:
    """A span of the local week. It starts on each of `days` (Monday is 0); `start` and `end` are minutes of the day.

    An `end` before `start` lies on the following day.
    """

    days: frozenset[int]
    start: int
    end: int


def parse_window(text: str) -> Window:
    """The Window of "Mon-Fri 18:00-07:00", "Sat-Sun" or "Mon 00:00-24:00". Raises ValueError."""
    match = _WINDOW.fullmatch(text.lower())
    if not match:
        raise ValueError(NOT_A_WINDOW)
    first, last = DAYS.index(match[1]), DAYS.index(match[2] or match[1])
    start, end = (int(clock[:2]) * 60 + int(clock[3:]) for clock in (match[3] or "00:00", match[4] or "24:00"))
    if start in {end, DAY_MINUTES}:
        raise ValueError(NOT_A_WINDOW)
    return Window(frozenset((first + step) % 7 for step in range((last - first) % 7 + 1)), start, end)


def is_loopback(host: str) -> bool:
    """True for this machine itself: localhost, 127.0.0.0/8, ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _read(convert: Callable[[Any], object], reason: str) -> BeforeValidator:
    """A validator: whatever `convert` trips over, the problem is `reason`."""

    def check(value: object) -> object:
        try:
            return convert(value)
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            raise ValueError(reason) from error

    return BeforeValidator(check)


def _fitting(pattern: str, text: str) -> str:
    if re.fullmatch(pattern, text):
        return text
    raise ValueError


def _absolute(text: str) -> Path:
    path = Path(_fitting("/[^\0\n\r]+", text))
    if ".." in path.parts or path == Path("/"):
        raise ValueError
    return path


def _host(text: str) -> str:
    return text if re.fullmatch(_HOST, text) else str(ipaddress.IPv6Address(text))


def _host_key(text: str) -> str:
    """Type and base64 of an OpenSSH public key; a comment behind them is dropped."""
    kind, encoded, *_ = text.split()
    name = kind.encode("ascii")
    if not base64.b64decode(encoded, validate=True).startswith(len(name).to_bytes(4, "big") + name):  # RFC 4253, 6.6
        raise ValueError
    return f"{kind} {encoded}"


def _each(values: object, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    if isinstance(values, list) and values and all(fits(value) for value in values):
        return tuple(values)
    raise ValueError


def _patients(value: object) -> frozenset[int] | None:
    return None if value == "all" else frozenset(_each(value, lambda number: type(number) is int and number > 0))


def _kinds(value: object) -> frozenset[Kind]:
    return frozenset(_each(value, KINDS.__contains__))


def _windows(value: object) -> tuple[Window, ...]:
    return tuple(parse_window(text) for text in _each(value, lambda text: isinstance(text, str)))


def _part(text: str) -> Fraction:
    part = Fraction(_fitting("[1-9][0-9]{0,4}/[1-9][0-9]{0,4}", text))
    if part > 1:
        raise ValueError
    return part


def _command(value: object) -> tuple[str, ...]:
    words = _each(value, lambda word: isinstance(word, str) and "\0" not in word)
    return (str(_absolute(words[0])), *words[1:])


def _web_address(text: str, mode: object) -> str:
    """A URL that this mode may send to: plain http only to loopback, or in the modes service and local."""
    match = _URL.fullmatch(text)
    if not match:
        raise ValueError('is not a web address: write it like "https://host/path", without user and password')
    if match[1] == "http" and mode not in {"service", "local"} and not is_loopback(match[2].strip("[]")):
        raise ValueError("must start with https:// (plain http: only to this machine, or in mode service or local)")
    return text


def nearest(word: str, words: Iterable[str]) -> str:
    """What somebody may have meant, for the end of a message about an unknown word."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid are {', '.join(words)}"


Text = Annotated[str, _read(partial(_fitting, r"[!-~]([ -~]*[!-~])?"), "must be plain text in quotes")]
Duration = Annotated[float, _read(parse_duration, NOT_A_DURATION)]
Size = Annotated[int, _read(parse_size, NOT_A_SIZE)]
AbsolutePath = Annotated[Path, _read(_absolute, 'must be an absolute path in quotes, without ".."')]
Folder = Annotated[str, _read(partial(_fitting, f"{_STEP}(/{_STEP})*"), 'must be a folder like "a" or "a/b"')]
Group = Annotated[str, _read(partial(_fitting, "[a-z_][a-z0-9_.-]{0,31}"), "is not the name of a group")]
Share = Annotated[float, Field(gt=0, le=1)]
Watch = Literal["auto", "off"]


class _Section(BaseModel):
    model_config = {"frozen": True, "extra": "forbid", "strict": True, "arbitrary_types_allowed": True}


class PracticeSettings(_Section):
    """[practice]."""

    name: Annotated[str, _read(partial(_fitting, "[a-z0-9][a-z0-9-]{0,24}"), "must be 1 to 25 of a-z, 0-9 and '-'")]
    time_zone: Annotated[ZoneInfo, _read(ZoneInfo, 'is not a time zone like "America/Chicago"')]


class ApiSettings(_Section):
    """[api]. `min_interval`: seconds from start to start before any share; `url` has no slash at its end."""

    mode: Mode
    url: str
    min_interval: Duration
    share: Share = 0.5
    share_closed: Share = 1.0
    developer_key_file: Text = "developer_key"
    customer_key_file: Text = "customer_key"
    ca_bundle: Text | None = None
    allow_upload: bool = False

    @property
    def page_limit(self) -> int:
        """Rows that one page may hold in this mode."""
        return MODES[self.mode][2]

    @property
    def is_throttled(self) -> bool:
        """Whether the vendor spaces requests; else only the office's own speed does."""
        return self.mode == "remote"

    @property
    def expected_interval(self) -> float:
        """Seconds from start to start to reckon with, before any share."""
        return self.min_interval if self.is_throttled else max(self.min_interval, UNTHROTTLED_REQUEST)

    @field_validator("url")
    @classmethod
    def _url(cls, url: str, beside: ValidationInfo) -> str:
        return _web_address(url, beside.data.get("mode", "service")).rstrip("/")

    @field_validator("min_interval")
    @classmethod
    def _interval(cls, interval: float, beside: ValidationInfo) -> float:
        vendor = VENDOR_HOST.fullmatch(urlsplit(beside.data.get("url", "")).hostname or "")
        if vendor and interval < VENDOR_MIN_INTERVAL:
            raise ValueError('must be at least "0.5s" for the vendor\'s host, which suspends faster keys')
        return interval


class DropSettings(_Section):
    """[drop]. `address` is `host[:port]` as Open Dental knows the site; exactly one pin of the host key is set."""

    host: Annotated[str, _read(_host, "is not a host: write its name or IP address alone")]
    port: Annotated[int, Field(ge=1, le=65_535)] = SFTP_PORT
    username: Text
    password_file: Text = "sftp_password"  # noqa: S105 - the name of a file
    private_key_file: Text | None = None
    folder: Folder = "syncd"
    address: Annotated[str, _read(partial(_fitting, _ADDRESS), 'is not an address: write "host" or "host:port"')]
    host_key: Annotated[str, _read(_host_key, 'is not a key like "ssh-ed25519 AAAA...": see ssh-keyscan')] | None = None
    known_hosts_file: Text | None = Field(default=None, validate_default=True)

    @field_validator("known_hosts_file")
    @classmethod
    def _pin(cls, known_hosts_file: str | None, beside: ValidationInfo) -> str | None:
        if "host_key" in beside.data and (known_hosts_file is None) == (beside.data["host_key"] is None):
            raise ValueError("the server's key must be pinned by host_key or known_hosts_file: set exactly one of them")
        return known_hosts_file


class ArchiveSettings(_Section):
    """[archive]. `reserve`: bytes that stay free; `group`: who else may read."""

    path: AbsolutePath
    reserve: Size = 5 * 1000**3
    group: Group | None = None


class StateSettings(_Section):
    """[state]."""

    path: AbsolutePath


class SyncSettings(_Section):
    """[sync]. `patients` is None for all; `vanish_after` in seconds."""

    patients: Annotated[frozenset[int] | None, _read(_patients, 'must be "all" or a list like [101, 102]')] = None
    kinds: Annotated[frozenset[Kind], _read(_kinds, f"must be a list of {', '.join(KINDS)}")] = frozenset(KINDS)
    patient_names: bool = True
    change_feed: Watch = "auto"
    appointments: Watch = "auto"
    vanish_after: Duration = 86_400.0


class BackfillSettings(_Section):
    """[backfill]. No window: bulk work at any time."""

    window: Annotated[tuple[Window, ...], _read(_windows, NOT_A_WINDOW)] = ()


class LogSettings(_Section):
    """[log]. `max_size` in bytes of one file; `keep`: how many old files stay beside it."""

    path: AbsolutePath
    max_size: Size = 20 * 1000**2
    keep: Annotated[int, Field(ge=1, le=1000)] = 10


class StatusSettings(_Section):
    """[status]. `every` in seconds."""

    every: Duration = 3600.0
    metrics_file: AbsolutePath | None = None


class VerifySettings(_Section):
    """[verify]. Each `every` seconds, `subset` of the archive is hashed again."""

    every: Duration = 86_400.0
    subset: Annotated[Fraction, _read(_part, 'is not a part like "1/30" or "1/1"')] = Fraction(1, 30)


class NotifySettings(_Section):
    """[notify]. `after`: seconds of trouble before `command` is told."""

    ping_url: Annotated[str, AfterValidator(lambda url: _web_address(url, "remote"))] | None = None
    command: Annotated[tuple[str, ...], _read(_command, "must be a list, an absolute path first")] | None = None
    after: Duration = 1800.0


class HookSettings(_Section):
    """[hook]. `archived`: the program that is called for each newly archived version."""

    archived: Annotated[tuple[str, ...], _read(_command, "must be a list, an absolute path first")] | None = None


class Settings(_Section):
    """A valid configuration, complete with every default."""

    practice: PracticeSettings
    api: ApiSettings
    drop: DropSettings
    archive: ArchiveSettings
    state: StateSettings
    sync: SyncSettings
    backfill: BackfillSettings
    log: LogSettings
    status: StatusSettings
    verify: VerifySettings
    notify: NotifySettings
    hook: HookSettings
    _folder: Path = Path()
    _credentials: Path | None = None

    @property
    def name(self) -> str:
        """The practice's name on this machine: ^[a-z0-9][a-z0-9-]{0,24}$."""
        return self.practice.name

    @property
    def zone(self) -> ZoneInfo:
        """The practice's time zone."""
        return self.practice.time_zone

    @property
    def state_path(self) -> Path:
        """The folder of index, lock and pace."""
        return self.state.path

    @property
    def log_path(self) -> Path:
        """The folder of the logs."""
        return self.log.path

    @property
    def credentials_directory(self) -> Path | None:
        """$CREDENTIALS_DIRECTORY, where systemd puts what only this service may read."""
        return self._credentials

    def model_post_init(self, context: tuple[Path, str | None], /) -> None:
        """Keep the folders of credentials: they surround the text."""
        folder, credentials = context
        self._folder, self._credentials = folder, Path(credentials) if credentials else None

    def credential_path(self, file_name: str) -> list[Path]:
        """Where the file of a `*_file` key may be, best first: $CREDENTIALS_DIRECTORY, then beside config.toml."""
        folders = [folder for folder in (self._credentials, self._folder) if folder]
        return list(dict.fromkeys(folder / file_name for folder in folders))  # an absolute name stands alone


def parse(text: str, *, name: str, folder: Path, environ: Mapping[str, str]) -> Settings:
    """The settings of one config.toml in `folder`; `name` counts where [practice] has none. Raises ConfigError."""
    try:
        document = tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # an endless number is the former, brackets in brackets the latter
        told = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "a value that cannot be read"
        raise ConfigError((f"config.toml is not valid TOML: {told}{_hint(text, told)}",)) from error
    _complete(document, name, environ)
    try:
        return Settings.model_validate(document, context=(folder, environ.get("CREDENTIALS_DIRECTORY")))
    except ValidationError as error:
        raise ConfigError(tuple(_problem(wrong) for wrong in error.errors())) from None  # it quotes values


def _hint(text: str, told: str) -> str:
    """The key of the line that TOML complains of; most often its quotes are missing."""
    line = re.search(r"at line (\d+)", told)
    key = re.match(r"\s*([a-z_]+)\s*=", text.splitlines()[int(line[1]) - 1]) if line else None
    if key and told.startswith("Cannot overwrite"):
        return f": {key[1]} stands there twice: remove one"
    return f": {key[1]}: a text stands in quotes, and a backslash in it twice" if key else ""


def _complete(document: dict[str, Any], name: str, environ: Mapping[str, str]) -> None:
    """Fill in the defaults that follow from other keys or from the surroundings."""
    tables = {section: document.setdefault(section, {}) for section in Settings.model_fields}
    practice, api, drop, state, log = (
        tables[name] if isinstance(tables[name], dict) else {} for name in ("practice", "api", "drop", "state", "log")
    )
    practice.setdefault("name", name)
    for table, variable, base in ((state, "STATE_DIRECTORY", "/var/lib"), (log, "LOGS_DIRECTORY", "/var/log")):
        table.setdefault("path", environ.get(variable, "").split(":")[0] or f"{base}/syncd/{practice['name']}")
    mode = api.setdefault("mode", "remote")
    url, interval, _ = MODES[mode if isinstance(mode, str) and mode in MODES else "remote"]
    api.setdefault("url", url)
    api.setdefault("min_interval", f"{interval}s")
    host, port = str(drop.get("host", "")), drop.get("port", SFTP_PORT)
    if mode == "local" or not is_loopback(host):
        address = (f"[{host}]" if ":" in host else host) + (f":{port}" if port != SFTP_PORT else "")
        drop.setdefault("address", address if re.fullmatch(_ADDRESS, address) else "host")  # host or port is reported


def _problem(wrong: ErrorDetails) -> str:
    """One problem as `[section] key: what is wrong, what to do`."""
    section, key, *_ = (*map(str, wrong["loc"]), "")
    keys = {name: tuple(getattr(field.annotation, "model_fields", ())) for name, field in Settings.model_fields.items()}
    match wrong["type"]:
        case "extra_forbidden" if key:
            home = next((name for name, names in keys.items() if key in names), None)
            what = f"unknown key; it belongs in [{home}]" if home else f"unknown key; {nearest(key, keys[section])}"
        case "extra_forbidden":
            what = f"unknown section; {nearest(section, keys)}"
        case "missing" if key == "address":
            what = "is missing: write host[:port] as Open Dental reaches the site, for host is this machine"
        case "missing":
            what = "is missing: add it"
        case "model_type":
            what = f"must be a table: write [{section}] on a line of its own"
        case _:
            what = wrong["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"[{section}] {key}: {what}" if key else f"[{section}]: {what}"
