"""What strangers may see, as `doctor --bundle` writes it: logs, status and configuration without whom, where and when.

Numbers of patients and items become other ones, the same ones all through; times become seconds from now; names,
addresses and paths become a word. No credential, neither the index nor the audit log is read.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from syncd.config import MODES, Settings, parse_time
from syncd.errors import UsageError
from syncd.model import KINDS

_KEPT: Final = frozenset({"all", "auto", "off", *MODES, *KINDS})  # words of a configuration that name nobody
_ITEM: Final = "|".join(sorted(KINDS, reverse=True))  # mount-image before mount
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?")
_DAY: Final = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) "
_CLOCK: Final = re.compile(rf"{_DAY}\d\d:\d\d(?:-(?:{_DAY})?\d\d:\d\d)?")
_EPOCH: Final = re.compile(r'(?<="next_try_at": )\d+(?:\.\d+)?')  # of logs from before it was written as a text
_PATIENT: Final = re.compile(rf'(patient-|"pat_num": |(?<!\d)(?=\d+/(?:{_ITEM})-))(\d+)')
_NUMBER: Final = re.compile(rf'((?:{_ITEM})-|"(?:mount_)?num": )(\d+)')
_PLACE: Final = re.compile(
    r"\b[a-z]+://[^\s\"')]+|(?<![\w/.])/[\w.@+-]+/[\w.@+/-]+|\b\d{1,3}(?:\.\d{1,3}){3}\b|[\w.+-]+@[\w.-]+"
)


def claim(path: Path) -> BinaryIO:
    """The new file, for its owner's eyes only. UsageError where one lies there, or none can be made."""
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")
    except OSError as error:
        raise UsageError(f"--bundle: {error.strerror}: name a new file in a folder that you may write to") from error


def write(file: BinaryIO, checks: list[dict[str, Any]], settings: Settings | None, now: float) -> None:
    """Fill the new file, and close it. `checks`: what the doctor found; `settings`: None where they are invalid."""
    met: dict[str, int] = {}  # pseudonyms: in the order in which the numbers were met
    names = re.compile("|".join(rf"(?<![\w.-]){re.escape(name)}(?![\w-])" for name in _names(settings)))

    def other(found: re.Match[str]) -> str:
        return f"{found[1]}{met.setdefault(f'{found.re is _PATIENT} {found[2]}', len(met) + 1)}"

    def moment(found: re.Match[str]) -> str:
        try:
            return f"{parse_time(found[0], settings.zone if settings else ZoneInfo('UTC')) - now:+.0f} s"
        except ValueError:  # no day of any calendar
            return "(time)"

    def disguised(text: str) -> str:
        text = _EPOCH.sub(lambda found: f"{float(found[0]) - now:.0f}", _CLOCK.sub("(time)", _TIME.sub(moment, text)))
        return names.sub("(name)", _PLACE.sub("(place)", _NUMBER.sub(other, _PATIENT.sub(other, text))))

    texts = {"doctor.json": json.dumps(checks, indent=1)}
    if settings:
        for log in (path for name in ("status.*", "syncd.log*") for path in sorted(settings.log_path.glob(name))):
            texts[log.name] = log.read_text("utf-8", "replace")
    told = {name: disguised(text) for name, text in texts.items()}
    told["configuration.json"] = json.dumps(_public(settings.model_dump(mode="json") if settings else None), indent=1)
    with file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in told.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content := text.encode()), 0o600
            tar.addfile(member, io.BytesIO(content))


def _names(settings: Settings | None) -> list[str]:
    """Every text that may name somebody or something, and may stand in a log; the longest first."""
    named = [os.uname().nodename]
    if settings:
        drop, notify = settings.drop, settings.notify
        named += [settings.name, settings.zone.key, urlsplit(settings.api.url).hostname or "", drop.host, drop.username]
        named += [drop.address, drop.address.rpartition(":")[0], settings.archive.group or "", notify.ping_url or ""]
        named += [*(notify.command or ()), *(settings.hook.archived or ())]
        named += [*map(str, (settings.archive.path, settings.state_path, settings.log_path))]
    return sorted(filter(None, named), key=len, reverse=True)


def _public(value: Any) -> Any:
    """A value of the configuration where it is a number or one of a few words; else only whether it is set."""
    if isinstance(value, dict):
        return {name: _public(each) for name, each in value.items()}
    kept = value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and value in _KEPT)
    return value if kept else "(set)"
