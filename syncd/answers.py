"""What `syncd setup` asks, and what follows from the answers: an edited config.toml, drop-ins, an sshd's configuration.

Pure: text in, text out.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from syncd import config
from syncd.config import MODES, Settings
from syncd.errors import ConfigError

Part = Literal["practice", "keys", "sftp", "host-key", "archive", "notify"]
PARTS: Final = ("keys", "sftp", "host-key", "archive", "notify")  # that can be asked for alone
Answers = dict[str, Any]
Edits = Mapping[tuple[str, str], Any]  # (section, key) -> value; None takes the key out
NAME: Final = re.compile("[a-z0-9][a-z0-9-]{0,24}")  # systemd takes no user name over 31, and it is `syncd-NAME`
AGREEMENTS: Final = ("trust_host_key", "accept_other_database", "accept_problems", "take_over_archive")
ARCHIVES: Final = "srv/archive"  # the units may write below it
SITE_PORT: Final = 2222  # of an SFTP site here: 22 is the server's own sshd
HERE: Final = "127.0.0.1"
UNIT: Final = "syncd-sftp@{}.service"
_ELSEWHERE: Final = frozenset({"sftp_host", "sftp_username", "sftp_password", "sftp_folder"})


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to know. `name`: in a file of answers; `key`: where it stands in config.toml; `file`: or in which
    file of its own, for a secret. An `optional` one may be answered with nothing.
    """

    name: str
    part: Part
    words: str
    key: tuple[str, str] | None = None
    file: str = ""
    optional: bool = False


QUESTIONS: Final = (
    Question("mode", "practice", "Open Dental's API: remote, service or local", ("api", "mode")),
    Question("url", "practice", "Address of the API Service", ("api", "url")),
    Question("time_zone", "practice", "Time zone of the office, like America/Chicago", ("practice", "time_zone")),
    Question("developer_key", "keys", "Developer key", file="developer_key"),
    Question("customer_key", "keys", "Customer key", file="customer_key"),
    Question("sftp", "sftp", "SFTP site: elsewhere, or here (made on this server)"),
    Question("sftp_host", "sftp", "SFTP host, as this server reaches it", ("drop", "host")),
    Question("sftp_port", "sftp", "SFTP port", ("drop", "port")),
    Question("sftp_username", "sftp", "SFTP user", ("drop", "username")),
    Question("sftp_password", "sftp", "SFTP password", file="sftp_password"),
    Question("sftp_folder", "sftp", "Folder on the SFTP site", ("drop", "folder")),
    Question("sftp_address", "sftp", "host[:port] of the site as Open Dental reaches it", ("drop", "address")),
    Question("sftp_sources", "sftp", "Addresses that the office connects from, like 203.0.113.7 198.51.100.0/28"),
    Question("host_key", "host-key", "", ("drop", "host_key")),
    Question("archive", "archive", "Folder of the archive", ("archive", "path")),
    Question("notify_command", "notify", "Program that is told of trouble", ("notify", "command"), optional=True),
    Question("ping_url", "notify", "Address to call while all is well", ("notify", "ping_url"), optional=True),
)
BY_NAME: Final = {question.name: question for question in QUESTIONS}


def applies(question: Question, answers: Answers) -> bool:
    """Whether a question makes sense after the answers before it. The host key is not asked for, but shown."""
    match question.name:
        case "url":
            return bool(answers["mode"] == "service")
        case "sftp_sources":
            return bool(answers["sftp"] == "here")
        case "host_key":
            return False
        case name:
            return name not in _ELSEWHERE or answers["sftp"] != "here"


def present(settings: Settings, sources: Sequence[str]) -> Answers:
    """The answers that a configuration holds. `sources`: of the SFTP site on this server; none: it is elsewhere."""
    found = {
        question.name: getattr(getattr(settings, question.key[0]), question.key[1])
        for question in QUESTIONS
        if question.key
    }
    command = found["notify_command"]
    found |= {"time_zone": str(settings.zone), "archive": str(settings.archive.path)}
    found |= {"notify_command": list(command) if command else None}
    return found | {"sftp": "here" if sources else "elsewhere", "sftp_sources": list(sources) or None}


def default(question: Question, name: str, answers: Answers, before: Answers) -> Any:
    """What Enter means: what is there, unless an answer before it says that it cannot be right; else the usual."""
    site, moved = answers.get("sftp"), answers.get("sftp") != before.get("sftp")
    moved |= "host_key" in before and answers.get("sftp_host") != before["sftp_host"]
    match question.name:
        case "sftp_port" if moved or "sftp_port" not in before:
            return SITE_PORT if site == "here" else config.SFTP_PORT
        case "sftp_address" if moved or answers["sftp_port"] != before["sftp_port"]:
            host, port = str(answers["sftp_host"]), answers["sftp_port"]
            if config.is_loopback(host) and answers["mode"] != "local":
                return None  # only the office knows how it reaches this server
            return (f"[{host}]" if ":" in host else host) + (f":{port}" if port != config.SFTP_PORT else "")
        case "sftp_host" | "sftp_username" | "sftp_password" if before.get("sftp") == "here":
            return None
        case "url" if before.get("mode") != "service":
            return MODES["service"][0]
    usual = {"mode": "remote", "sftp": "elsewhere", "sftp_folder": "syncd", "archive": f"/{ARCHIVES}/{name}"}
    return before.get(question.name, usual.get(question.name))


def typed(question: Question, text: str) -> Any:
    """An answer typed by somebody, as a file of answers would have it; `-` is nothing. Raises ValueError."""
    text = text.strip()
    if question.optional and text == "-":
        return None
    match question.name:
        case "sftp_port" if text.isdecimal():
            return int(text)
        case "notify_command":
            return shlex.split(text)
        case "sftp_sources":
            return text.replace(",", " ").split()
    return text


def wrong(question: Question, value: Any, answers: Answers) -> str | None:
    """What is wrong with one answer, never with its value; None: nothing."""
    if question.optional and value in (None, "", []):
        return None
    if question.file:
        plain = isinstance(value, str) and re.fullmatch("[!-~]([ -~]*[!-~])?", value)
        return None if plain else f"{question.name}: must be one line of plain text"
    if question.key is None:
        return _wrong_site(question.name, value)
    section, key = question.key
    alone = {("api", "mode"): answers.get("mode", "remote"), question.key: value}
    try:
        config.parse(edited("", alone), name="x", folder=Path("/"), environ={})
    except ConfigError as error:  # always: one answer is no whole configuration
        for problem in error.problems:
            if problem.startswith("config.toml"):
                return f"{question.name}: must be plain text"
            if problem.startswith(f"[{section}] {key}:"):
                return f"{question.name}: {problem.partition(': ')[2]}"
    return None


def _wrong_site(name: str, value: Any) -> str | None:
    if name == "sftp":
        return None if value in ("here", "elsewhere") else "sftp: must be here or elsewhere"
    try:
        good = isinstance(value, list) and [ipaddress.ip_network(each) for each in value]
    except ValueError:
        good = False
    return None if good else f"{name}: must be addresses or networks, like 203.0.113.7 or 198.51.100.0/28"


def edits(asked: Sequence[Question], answers: Answers, before: Answers) -> Edits:
    """What has to change in config.toml: nothing that says already what was answered."""
    moved = answers["mode"] not in (before.get("mode", answers["mode"]), "service")  # then the url is the other mode's
    said = {question: answers.get(question.name) for question in asked if not (moved and question.name == "url")}
    said |= {BY_NAME["url"]: None} if moved else {}
    return {
        question.key: value or None
        for question, value in said.items()
        if question.key and (question.name not in before or before[question.name] != value)
    }


def edited(text: str, edits: Edits) -> str:
    """A config.toml with other values in the lines of these keys, and every other line as it was, byte for byte.

    Raises ConfigError where that is not possible: nothing is guessed.
    """
    bom, body = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    wanted = tomllib.loads(body)
    lines = body.splitlines(keepends=True)
    end = "\r\n" if "\r\n" in body else "\n"
    for (section, key), value in edits.items():
        _put_line(lines, end, section, key, value)
        if value is None:
            wanted.get(section, {}).pop(key, None)
        else:
            wanted.setdefault(section, {})[key] = value
    new = "".join(lines)
    try:
        same = tomllib.loads(new) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        keys = ", ".join(f"[{section}] {key}" for section, key in edits)
        raise ConfigError((f"config.toml: is written in a way that setup cannot edit: change {keys} by hand",))
    return bom + new


def _put_line(lines: list[str], end: str, section: str, key: str, value: Any) -> None:
    """Set, add or take out one key, in place."""
    heads = [at for at, line in enumerate(lines) if re.match(r"\s*\[", line)]
    head = next((at for at in heads if re.match(rf"\s*\[\s*{section}\s*\]\s*(#.*)?$", lines[at])), None)
    written = f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}"
    if head is None:
        if value is not None:
            lines[-1:] = [line.rstrip("\r\n") + end for line in lines[-1:]]
            lines += [*([end] if lines else []), f"[{section}]{end}", written + end]
        return
    stop = next((at for at in heads if at > head), len(lines))
    at = next((at for at in range(head + 1, stop) if re.match(rf"\s*{key}\s*=", lines[at])), None)
    if at is not None:
        after, comment = _value_end(lines, at, stop)
        lines[at:after] = [written + comment] if value is not None else []
    elif value is not None:
        last = max(at for at in range(head, stop) if at == head or re.match(r"\s*[^#\s]", lines[at]))
        lines[last] = lines[last].rstrip("\r\n") + end
        lines.insert(last + 1, written + end)


def _value_end(lines: Sequence[str], at: int, stop: int) -> tuple[int, str]:
    """Where a key's value ends: the next line, and what stands behind it, a comment or the end of the line."""
    for after in range(at + 1, stop + 1):
        text = "".join(lines[at:after])
        for mark in [*(found.start() for found in re.finditer(r"\s*#", text)), len(text.rstrip("\r\n"))]:
            try:
                tomllib.loads(text[:mark])
            except tomllib.TOMLDecodeError:
                continue
            return after, text[mark:]
    return stop, ""  # what comes of it does not say what it should: `edited` sees that


def drop_in(root: Path, *archives: Path) -> str:
    """The units' drop-in for archives outside of what they may write anyway; empty where none is.

    No RequiresMountsFor=: the service starts without its archive, and says `archive_missing` in its status.
    """
    outside = [path for path in dict.fromkeys(archives) if not path.is_relative_to(root / ARCHIVES)]
    said = "".join(
        f"ReadWritePaths={json.dumps(f'-{path}', ensure_ascii=False).replace('%', '%%')}\n" for path in outside
    )
    return f"# Written by syncd setup: the archive.\n[Service]\n{said}" if said else ""


def fingerprint(host_key: str) -> tuple[str, str]:
    """Type and SHA256 fingerprint of a host key, as ssh-keygen prints them."""
    kind, encoded = host_key.split()[:2]
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(encoded)).digest()).decode().rstrip("=")
    return kind, f"SHA256:{digest}"


# --- an SFTP site on this server


@dataclass(frozen=True, slots=True)
class Site:
    """An SFTP site for one practice: an sshd of its own, so that the server's sshd is not touched at all."""

    practice: str
    folder: Path  # of sshd_config and host keys
    jail: Path
    port: int
    sources: tuple[str, ...]
    drop: str = "syncd"  # the folder in it that may be written

    @property
    def user(self) -> str:
        """The account, in which nobody can do anything but SFTP."""
        return f"drop-{self.practice}"

    @property
    def unit_name(self) -> str:
        """Of the service."""
        return UNIT.format(self.practice)

    @property
    def sshd_config(self) -> str:
        """For OpenSSH 9 and 10: what modern clients want, and beside it what an SSH library of 2016 can do."""
        allowed = " ".join(f"{self.user}@{source}" for source in dict.fromkeys((HERE, *self.sources)))
        return f"""\
# The SFTP site of practice {self.practice}: Open Dental writes, syncd reads. Written by syncd setup, which changes it.
Port {self.port}
PidFile none
HostKey {self.folder}/sftp_host_ed25519
HostKey {self.folder}/sftp_host_rsa
# Open Dental's client is of 2016: RSA host keys signed with SHA-1, and the older key exchanges.
HostKeyAlgorithms +ssh-rsa
KexAlgorithms +diffie-hellman-group-exchange-sha256,diffie-hellman-group14-sha256,diffie-hellman-group-exchange-sha1,\
diffie-hellman-group14-sha1
# One account, from these addresses, with its password, and nothing but SFTP in its own folder.
AllowUsers {allowed}
AuthenticationMethods password
PubkeyAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin no
MaxAuthTries 3
LoginGraceTime 30
ChrootDirectory {self.jail}
Subsystem sftp internal-sftp
ForceCommand internal-sftp
DisableForwarding yes
PermitTTY no
PermitUserRC no
"""

    @property
    def unit(self) -> str:
        """The service of this sshd."""
        return f"""\
# Written by syncd setup {self.practice}.
[Unit]
Description=SFTP site of practice {self.practice}
After=network.target

[Service]
ExecStartPre=/usr/sbin/sshd -t -f {self.folder}/sshd_config
ExecStart=/usr/sbin/sshd -D -e -f {self.folder}/sshd_config
Restart=on-failure
RestartSec=10
# The folder that sshd wants; the server's own sshd shares it.
RuntimeDirectory=sshd
RuntimeDirectoryPreserve=yes
ProtectSystem=strict
ReadWritePaths={self.jail}
ProtectHome=yes
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""


def sources_of(sshd_config: str) -> tuple[str, ...]:
    """The addresses that such a configuration lets in, but for this server's own."""
    allowed = re.findall(r"^AllowUsers (.*)$", sshd_config, re.MULTILINE)
    found = [each.partition("@")[2] for line in allowed for each in line.split()]
    return tuple(source for source in found if source != HERE)
