"""A whole simulated practice that runs: database, HTTP API, SFTP site, and a configuration to reach it."""

import secrets
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from syncd.demo.build import Past, build_practice
from syncd.demo.clock import Clock, RealClock
from syncd.demo.office import Office
from syncd.demo.practice import Practice
from syncd.demo.server import HttpServer
from syncd.demo.sftp import SftpServer
from syncd.demo.site import SftpSite

__all__ = ["Config", "OutsideSite", "Past", "Simulation", "to_toml"]

Config = dict[str, dict[str, object]]


@dataclass
class OutsideSite:
    """An SFTP server that somebody else runs, as OpenSSH's. `folder` is relative to the login folder."""

    host: str
    port: int
    username: str
    password: str
    host_key: str
    folder: str = "syncd"


@dataclass
class Simulation:
    """Practice, office, HTTP server and SFTP server, running. `sftp` is None with an outside site. End it with
    `stop`.
    """

    practice: Practice
    office: Office
    http: HttpServer
    site: SftpSite
    sftp: SftpServer | None
    outside: OutsideSite
    interval: float
    _scratch: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        patients: int = 20,
        seed: int = 1,
        interval: float = 0.0,
        folder: Path | None = None,
        *,
        past: Past | None = None,
        practice: Practice | None = None,
        time_zone: str = "America/Chicago",
        port: int = 0,
        sftp_port: int = 0,
        outside: OutsideSite | None = None,
        clock: Clock | None = None,
    ) -> "Simulation":
        """Start everything on loopback.

        `interval`: the throttle in seconds, 0 for none. `folder`: root of the embedded SFTP site (default: a
        temporary one). `outside`: use that SFTP server instead. `practice`: an existing one instead of one built from
        `patients` and `seed`.
        """
        sys.setswitchinterval(0.0005)  # arrivals are stamped on time although the office writes files
        scratch = []
        if folder is None:
            scratch.append(tempfile.TemporaryDirectory(prefix="simulated-site-"))
            folder = Path(scratch[0].name)
        folder.mkdir(parents=True, exist_ok=True)
        time = clock or RealClock()
        own = practice or build_practice(patients, seed, time, time_zone=time_zone, past=past)
        site = SftpSite()
        sftp = None
        if outside is None:
            sftp = SftpServer(folder, password=secrets.token_hex(12), port=sftp_port)
            outside = OutsideSite(sftp.host, sftp.port, sftp.username, sftp.password, sftp.public_host_key_line)
        office = Office(own, site, clock=time, interval=interval, seed=seed)
        return cls(own, office, HttpServer(office, port=port), site, sftp, outside, interval, scratch)

    @property
    def url(self) -> str:
        """The API's base, as configurations want it."""
        return self.http.url

    def config(self, archive: Path, base: Path) -> Config:
        """The configuration of a mirror of this practice, by section; state and log go below `base`."""
        site = self.outside
        return {
            "practice": {"time_zone": str(self.practice.zone)},
            "api": {
                "mode": "remote",
                "url": self.url,
                "min_interval": f"{self.interval or 0.001:g}s",
                "share": 1.0,
                "share_closed": 1.0,
                "developer_key_file": "developer_key",
                "customer_key_file": "customer_key",
            },
            "drop": {
                "host": site.host,
                "port": site.port,
                "username": site.username,
                "password_file": "sftp_password",
                "folder": site.folder,
                "address": f"{site.host}:{site.port}",
                "host_key": site.host_key,
            },
            "archive": {"path": str(archive), "reserve": "10 MB"},
            "state": {"path": str(base / "state")},
            "log": {"path": str(base / "log")},
            "backfill": {"window": ["Mon-Sun 00:00-24:00"]},
        }

    def write_config(self, folder: Path, archive: Path | None = None, **overrides: Any) -> Path:
        """Write config.toml and its credential files (0600) into `folder`; returns the path of config.toml.

        `overrides`: `section={"key": value}`, added to or replacing what `config` gives; a value None removes the key.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = {
            "developer_key": self.office.developer_key,
            "customer_key": self.office.customer_key,
            "sftp_password": self.outside.password,
        }
        for name, secret in keys.items():
            path = folder / name
            path.touch(mode=0o600)
            path.chmod(0o600)
            path.write_text(secret + "\n")
        sections = self.config(archive or folder / "archive", folder)
        for section, values in overrides.items():
            merged = {**sections.get(section, {}), **values}
            sections[section] = {key: value for key, value in merged.items() if value is not None}
        path = folder / "config.toml"
        path.write_text(to_toml(sections))
        return path

    def stop(self) -> None:
        """End the servers and remove what was temporary."""
        self.http.stop()
        self.site.close()
        if self.sftp is not None:
            self.sftp.stop()
        for folder in self._scratch:
            folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def to_toml(sections: Config) -> str:
    """Sections of strings, numbers, booleans and lists of strings as TOML."""
    parts = []
    for section, values in sections.items():
        lines = [f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
        parts.append("\n".join(lines) + "\n")
    text = "\n".join(parts)
    tomllib.loads(text)
    return text


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
