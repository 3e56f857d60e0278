"""Where the doors are built, and nowhere else: from a configuration to lanes that can take turns.

The two doors to the network are imported when one is built: their libraries cost more time than a whole `status`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from syncd import config, copies, hook
from syncd.archive import Archive
from syncd.audit import AuditLog
from syncd.config import Settings
from syncd.diff import DAY
from syncd.errors import ConfigError, SiteError, UsageError, state_reason
from syncd.hook import Hook
from syncd.index import Index
from syncd.logs import Log
from syncd.mirror import CLOCK_SLACK, ApiLane, Scope
from syncd.ports import Api, Clock, Drop
from syncd.pulling import PullLane
from syncd.service import Credentials, PaceFile, Pulse, network_file_system, owner_id
from syncd.sites import Doors, Sites, put_times_right

if TYPE_CHECKING:
    from syncd.api import OpenDentalApi
    from syncd.drop import SftpDrop

PRACTICES = Path("/etc/syncd")


def locate(practice: str | None, file: Path | None, environ: Mapping[str, str]) -> Path:
    """The configuration file that a call means: -c, -p, $SYNCD_CONFIG, or the only practice on this machine."""
    if file is not None:
        return file
    if practice is not None:
        return PRACTICES / practice / "config.toml"
    if environ.get("SYNCD_CONFIG"):
        return Path(environ["SYNCD_CONFIG"])
    found = configured()
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError("no practice is configured on this machine: say -c FILE, or make /etc/syncd/NAME/config.toml")
    raise UsageError("several practices: say -p NAME, one of " + ", ".join(path.parent.name for path in found))


def configured() -> list[Path]:
    """The configuration of each practice of this machine, also of those that this user may not look into."""
    files = (folder / "config.toml" for folder in sorted(PRACTICES.glob("*/")))
    return [file for file in files if not os.access(file.parent, os.X_OK) or file.exists()]


def load(path: Path, environ: Mapping[str, str]) -> Settings:
    """Read and check one configuration. Raises ConfigError, with all problems of the text at once."""
    try:
        text = path.read_text("utf-8")
    except PermissionError as error:
        raise ConfigError(
            (f"{path}: not for everybody: call `sudo syncd`, which becomes the practice's user",)
        ) from error
    except OSError as error:
        raise ConfigError((f"{path}: cannot be read ({error.strerror}): check -c, -p or $SYNCD_CONFIG",)) from error
    except UnicodeDecodeError as error:
        raise ConfigError((f"{path}: is not UTF-8 text: save it as UTF-8",)) from error
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 - `..` is no name, and a link's target is another one
    settings = config.parse(text, name=folder.name, folder=folder, environ=environ)
    open_archive(settings)  # its group is known here, or nothing goes on
    return settings


def open_index(settings: Settings) -> Index:
    """The practice's index; made when there is none. Raises ConfigError on a network file system, SiteError."""
    if kind := network_file_system(settings.state_path):
        raise ConfigError((f"[state] path: is on a network file system ({kind}), where SQLite loses data: move it",))
    try:
        settings.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        told = f"[state] path: {errno.errorcode.get(error.errno or 0, 'unknown')}"
        raise SiteError(state_reason(error), told) from error
    path = settings.state_path / "index.db"
    return Index(path, before_migrating=partial(copies.keep_older, path))


def open_archive(settings: Settings, owner: str = "") -> Archive:
    """The practice's archive; it may be missing. `owner`: of whoever mirrors into it, none for readers."""
    return Archive(settings.archive.path, settings.archive.reserve, settings.archive.group, owner)


def own_archive(settings: Settings, archive_id: str) -> Archive:
    """The practice's archive, to be written to, also where its reserve is not free.

    Raises SiteError where it is not that one, cannot be written, or was taken over by another installation.
    """
    archive = open_archive(settings, owner_id())
    try:
        archive.check(archive_id)
    except SiteError as error:
        if error.reason != "archive_full":
            raise
    return archive


def open_audit(settings: Settings) -> AuditLog:
    """The practice's audit log; the first entry makes it."""
    return AuditLog(settings.log_path / "audit")


def open_pace(settings: Settings, clock: Clock, folder: Path | None = None) -> PaceFile:
    """The pace of the practice's key, shared by all processes. `folder`: instead of the state folder."""
    return PaceFile((folder or settings.state_path) / "pace", clock, settings.zone)


def open_pulse(settings: Settings, clock: Clock) -> Pulse:
    """Where the lock's holder gives signs of life."""
    return Pulse(settings.state_path, clock)


def open_api(settings: Settings, credentials: Credentials) -> OpenDentalApi:
    """Open Dental's API; nothing is sent yet."""
    from syncd.api import OpenDentalApi, PlacementSite  # noqa: PLC0415 - see above

    bundle = _beside(settings, settings.api.ca_bundle)
    return OpenDentalApi(
        settings.api.url,
        credentials.developer_key,
        credentials.customer_key,
        PlacementSite(settings.drop.address, settings.drop.username, credentials.drop_password),
        ca_bundle=bundle,
    )


def open_drop(settings: Settings, credentials: Credentials) -> SftpDrop:
    """The SFTP site; no connection is made yet."""
    from syncd.drop import SftpDrop  # noqa: PLC0415 - see above

    drop = settings.drop
    known_hosts = _beside(settings, drop.known_hosts_file)
    password = None if credentials.private_key_path else credentials.drop_password
    return SftpDrop(
        drop.host, drop.port, drop.username, password, credentials.private_key_path, drop.host_key, known_hosts
    )


def shown_host_key(host: str, port: int, kind: str) -> str:
    """The host key that an SFTP site shows, for whoever has to confirm it. Raises TransientError drop_unreachable."""
    from syncd import drop  # noqa: PLC0415 - see above

    return drop.shown_host_key(host, port, kind)


def _beside(settings: Settings, name: str | None) -> Path | None:
    """A file that the configuration names: in $CREDENTIALS_DIRECTORY if it is there, else beside config.toml."""
    if name is None:
        return None
    candidates = settings.credential_path(name)
    return next((path for path in candidates if path.exists()), candidates[-1])


@dataclass
class Lanes:
    """Two lanes that are ready to take turns, each with an index connection of its own, and one for the shell.

    `hook`: the third one, where there is a [hook].
    """

    settings: Settings
    index: Index
    clock: Clock
    log: Log
    api_lane: ApiLane
    pull_lane: PullLane
    hook: Hook | None
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    abandoned: bool = False  # a lane hangs in a call: its connections are left to the end of the process

    def close(self) -> None:
        """Take back what was prepared, close every connection."""
        if not self.abandoned:
            with self.closing:  # also where the index cannot be written
                self.api_lane.close()


def build(
    settings: Settings, clock: Clock, log: Log, scope: Scope, api: Api, drop: Drop, index: Index | None = None
) -> Lanes:
    """Build both lanes. The caller holds the lock. An archive that is missing is a state, not an end."""
    index = index or open_index(settings)
    archive = open_archive(settings, owner_id())
    closing = contextlib.ExitStack()
    closing.callback(drop.close)
    closing.callback(index.close)
    lanes = []
    for _ in range(3 if settings.hook.archived else 2):
        own = index.sibling()
        closing.callback(own.close)
        lanes.append(Doors(settings, own, archive, api, drop, clock, log, open_audit(settings)))
    for_api, for_pull, *for_hook = lanes
    now = clock.now()
    index.run("UPDATE site SET failures = 0, next_try_at = ?", now)  # a fresh start tries everything once
    waits = " UNION ALL ".join(f"SELECT max(next_try_at) - {DAY} FROM {rows}" for rows in ("list", "duty"))  # noqa: S608 - our own text
    seen = f"SELECT max(polled_at) AS at FROM list UNION ALL SELECT max(asked_at) FROM attempt UNION ALL {waits}"  # noqa: S608
    if (index.value(f"SELECT max(at) FROM ({seen})") or 0.0) > now + CLOCK_SLACK:  # noqa: S608
        put_times_right(index, now, went_back=True)
    hook.begin(index, Sites(index, log), bool(for_hook), now)
    pull_lane = PullLane(for_pull, Sites(for_pull.index, log))
    pull_lane.start(now)
    api_lane = ApiLane(for_api, Sites(for_api.index, log), open_pace(settings, clock), scope, now)
    hooks = [Hook(doors, Sites(doors.index, log), settings.hook.archived or ()) for doors in for_hook]
    return Lanes(settings, index, clock, log, api_lane, pull_lane, next(iter(hooks), None), closing)
