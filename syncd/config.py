"""Turns config.toml into frozen Settings, or into every problem it has, each with what to do.

Pure: text in, settings out; no file is read here (time zone names are looked up by zoneinfo). Durations are seconds,
sizes bytes. A problem never repeats a value: an address may carry a token.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo
from pydantic import field_validator as checks
from pydantic_core import ErrorDetails

from syncd.errors import ConfigError
from syncd.model import KINDS, Kind

Mode = Literal["remote", "service", "local"]
T = TypeVar("T")

# mode -> (url, seconds from start to start, rows a page). facts.md, "Throttle" and "Access, modes, errors".
MODES: Final[dict[Mode, tuple[str, float, int]]] = {
    "remote": ("https://api.opendental.com/api/v1", 1.1, 100),
    "service": ("http://localhost:30223/api/v1", 0.05, 1000),
    "local": ("http://localhost:30222/api/v1", 0.05, 1000),
}
VENDOR_DOMAIN: Final = "opendental.com"
VENDOR_MIN_INTERVAL: Final = 0.5  # the fastest tier there is (enterprise)
SFTP_PORT: Final = 22
DAY_MINUTES: Final = 1440
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BYTES: Final = {"B": 1} | {
    prefix + unit: base ** (power + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT" if base == 1024 else "kMGT")  # noqa: PLR2004 - 1024 is what "iB" means
}
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?(ms|s|m|h|d|w)")
_SIZE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([kKMGT]?i?B)")
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_WINDOW: Final = re.compile(r"([a-z]{3})(?:-([a-z]{3}))?(?: ([0-9]{2}:[0-9]{2})-([0-9]{2}:[0-9]{2}))?")


def parse_duration(text: str) -> float:
    """Seconds of "1.1s", "30m", "24h", "7d" or "1h 30m"; more than zero. ValueError says what to write."""
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text))
    if not re.fullmatch(rf"(?:{_DURATION.pattern} ?)+", text) or seconds <= 0:
        raise ValueError('is not a duration: write a number and ms, s, m, h, d or w, like "30m"')
    return float(seconds)


def parse_size(text: str) -> int:
    """Bytes of "5 GB", "20 MB" (decimal) or "4 GiB" (binary); more than zero. ValueError says what to write."""
    match = _SIZE.fullmatch(text)
    size = int(Fraction(match[1]) * _BYTES.get(match[2], 0)) if match else 0
    if size <= 0:
        raise ValueError('is not a size: write a number and B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, like "5 GB"')
    return size


def parse_time(text: str, zone: ZoneInfo) -> float:
    """Seconds since the epoch of an ISO date or datetime; without an offset it is in `zone`. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError('is not a time: write it like "2026-11-21" or "2026-11-21T18:30"') from error


@dataclass(frozen=True, slots=True)
class Window:
    """A span of the local week. It starts on each of `days` (Monday is 0); `start` and `end` are minutes of the day.

    An `end` at or before `start` lies on the following day.
    """

    days: frozenset[int]
    start: int
    end: int


def parse_window(text: str) -> Window:
    """The Window of "Mon-Fri 18:00-07:00", "Sat-Sun" or "Mon 00:00-24:00". Raises ValueError."""
    match = _WINDOW.fullmatch(text.lower())
    if match and match[1] in DAYS and (match[2] or match[1]) in DAYS:
        first, last = DAYS.index(match[1]), DAYS.index(match[2] or match[1])
        days = frozenset((first + step) % 7 for step in range((last - first) % 7 + 1))
        start, end = _minutes(match[3] or "00:00"), _minutes(match[4] or "24:00")
        if start < DAY_MINUTES and end <= DAY_MINUTES and start != end:
            return Window(days, start, end)
    raise ValueError('is not a window: write "Mon-Fri 18:00-07:00", or "Sat-Sun" for whole days')


def _minutes(clock: str) -> int:
    hour, minute = int(clock[:2]), int(clock[3:])
    return hour * 60 + minute if minute < 60 else DAY_MINUTES + 1  # noqa: PLR2004 - minutes of an hour


def is_loopback(host: str) -> bool:
    """True for this machine itself: localhost, 127.0.0.0/8, ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _from_text(read: Callable[[str], T]) -> BeforeValidator:
    """A validator that reads a TOML string, and says so when the value is none."""

    def check(value: object) -> T:
        if isinstance(value, str):
            return read(value)
        raise ValueError("must be text in quotes")

    return BeforeValidator(check)


def _listed(value: object, reason: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise ValueError(reason)


def _nearest(word: object, words: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(word), words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(words)}"


def _plain(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError("must be plain text: not empty, no line break, no blank at either end")
    return text


def _zone(text: str) -> ZoneInfo:
    try:
        return ZoneInfo(text)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError('is not a time zone: write its IANA name, like "America/Chicago"') from error


def _absolute(text: str) -> Path:
    path = Path(_plain(text))
    if not path.is_absolute() or ".." in path.parts or path == Path("/"):
        raise ValueError('must be an absolute path below "/", without ".."')
    return path


def _host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if _HOST.fullmatch(text):
            return text.lower()
    raise ValueError('is not a host: write its name or IP address alone, without "sftp://" or port')


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":") if re.search(r":[0-9]+$", text) else (text, "", "22")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (colon and ":" in host and bare == host) or not 0 < int(port[:6]) <= 65_535:  # noqa: PLR2004 - highest port
        raise ValueError('is not an address: write "host" or "host:port"')
    _host(bare)
    return text


def _remote_folder(text: str) -> str:
    folder = text.removesuffix("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._ -]{0,99}", part) for part in folder.split("/")):
        raise ValueError("must be a folder below the login folder: letters, digits, '.', '_', '-' and '/' between")
    return folder


def _host_key(text: str) -> str:
    """Type and base64 of an OpenSSH public key; the blob is walked, so that a cut paste is found here."""
    kind, encoded = ([*text.split(), "", ""])[:2]
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        blob = b""
    at, fields = 0, list[bytes]()
    while at < len(blob):  # RFC 4253, section 5: a string is four bytes of length, then its bytes
        size = int.from_bytes(blob[at : at + 4], "big")
        fields.append(blob[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(blob) or len(fields) < 2 or fields[0] != kind.encode():  # noqa: PLR2004 - the type and its numbers
        raise ValueError('is not a host key: write type and base64 as ssh-keyscan prints them, like "ssh-ed25519 AAAA"')
    return f"{kind} {encoded}"


def _subset(text: str) -> Fraction:
    match = re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", text)
    if not match or int(match[1]) > int(match[2]):
        raise ValueError('is not a part: write it like "1/30", or "1/1" for all')
    return Fraction(int(match[1]), int(match[2]))


def _url(text: str, mode: object) -> SplitResult:
    """The parts of a URL that this mode may send to; plain http only to loopback or in the modes service and local."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = SplitResult("", "", "", "", ""), ""
    if parts.scheme not in {"http", "https"} or not host or not re.fullmatch(r"[!-~]+", text) or "@" in parts.netloc:
        raise ValueError('is not a web address: write it like "https://host/path", without a user or password')
    if parts.scheme == "http" and mode not in {"service", "local"} and not is_loopback(host):
        raise ValueError("must start with https:// (plain http only to this machine, or in the modes service and local)")
    return parts


def _patients(value: object) -> frozenset[int] | None:
    if value == "all":
        return None
    reason = 'must be "all" or a list of patient numbers, like [101, 102]'
    numbers = _listed(value, reason)
    if any(type(number) is not int or number <= 0 for number in numbers):
        raise ValueError(reason)
    return frozenset(numbers)


def _kinds(value: object) -> frozenset[Kind]:
    kinds = _listed(value, f"must be a list of: {', '.join(KINDS)}")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind; {_nearest(wrong[0], KINDS)}")
    return frozenset(kinds)


def _windows(value: object) -> tuple[Window, ...]:
    reason = "must be a list of windows; leave the key out to allow any time"
    texts = _listed(value, reason)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(reason)
    return tuple(parse_window(text) for text in texts)


def _command(value: object) -> tuple[str, ...]:
    reason = 'must be a list: the absolute path of a program, then its arguments, like ["/usr/local/bin/alert"]'
    words = _listed(value, reason)
    if not all(isinstance(word, str) and "\0" not in word for word in words) or not words[0].startswith("/"):
        raise ValueError(reason)
    return tuple(words)


Duration = Annotated[float, _from_text(parse_duration)]
Size = Annotated[int, _from_text(parse_size)]
Text = Annotated[str, _from_text(_plain)]
AbsolutePath = Annotated[Path, _from_text(_absolute)]
Share = Annotated[float, Field(gt=0, le=1)]
Later: Final[Any] = Field(default=None, validate_default=True)  # the default follows from other keys


@dataclass(frozen=True, slots=True)
class _Around:
    """What surrounds the text: names and folders, and the one key that other sections look at."""

    name: object
    mode: object
    folder: Path
    environ: Mapping[str, str]

    def folder_of(self, variable: str, base: str) -> str:
        return self.environ.get(variable, "").split(":")[0] or f"{base}/{self.name}"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class PracticeSettings(_Section):
    """[practice]."""

    name: str = Later
    time_zone: Annotated[ZoneInfo, _from_text(_zone)]

    @checks("name", mode="before")
    @classmethod
    def _name(cls, value: object, at: ValidationInfo[_Around]) -> str:
        name = at.context.name if value is None else value
        if isinstance(name, str) and re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
            return name
        raise ValueError("must be 1 to 32 of a-z, 0-9 and '-', not starting with '-' (default: the folder's name)")


class ApiSettings(_Section):
    """[api]. `min_interval` is seconds from start to start before any share; `url` has no slash at its end."""

    mode: Mode = "remote"
    url: str = Later
    min_interval: float = Later
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

    @checks("url", mode="before")
    @classmethod
    def _check_url(cls, value: object, at: ValidationInfo) -> str:
        text = MODES[at.data.get("mode", "remote")][0] if value is None else _plain_text(value)
        parts = _url(text, at.data.get("mode", "service"))
        if parts.query or parts.fragment:
            raise ValueError("must end with the path: no '?' and no '#'")
        return text.rstrip("/")

    @checks("min_interval", mode="before")
    @classmethod
    def _check_interval(cls, value: object, at: ValidationInfo) -> float:
        interval = MODES[at.data.get("mode", "remote")][1] if value is None else parse_duration(_plain_text(value))
        host = (urlsplit(at.data.get("url", "")).hostname or "").rstrip(".")
        if f".{host}".endswith(f".{VENDOR_DOMAIN}") and interval < VENDOR_MIN_INTERVAL:
            raise ValueError('must be at least "0.5s" for the vendor\'s host: a faster key gets suspended')
        return interval
