"""`syncd setup NAME`: a practice's configuration, as a dialogue or from a file of answers. Re-runnable; Enter keeps.

Everything is asked and looked at before anything is written. Then /etc/syncd/NAME changes as a whole, in one step:
whoever interrupts this, or starts the service meanwhile, has the old configuration or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
from click import option

from syncd import answers as asking
from syncd import config, doctor, errors, faces, report, wiring
from syncd.answers import QUESTIONS, Answers, Question, Site
from syncd.call import Call, dry, index_if_any, json_too, verb
from syncd.catalog import Catalog, Row
from syncd.errors import ConfigError, LockHeldError, SiteError, SyncdError, TransientError, UsageError
from syncd.index import Index
from syncd.machine import PUBLIC, SECRET, File, Files, make_user, put, run, switch, write
from syncd.service import Credentials, Lock, as_owner
from syncd.sites import NEW_ARCHIVE

HEAD: Final = (
    "# Practice {}, written by syncd setup. What you add here stays; config.toml of the clone shows all keys.\n"
)
ONLY_THERE: Final = (  # of no use to Open Dental any more, or not there any more: what a new archive will never have
    "SELECT count(*) AS versions, coalesce(sum(v.bytes), 0) AS bytes FROM version v JOIN item i USING (pat_num, kind,"
    " num) WHERE v.sidecar = 1 AND (i.vanished_at IS NOT NULL OR v.version <> i.current_version)"
)
AGAIN: Final = (  # a mount takes a request for its composite, and one for all of its images
    "SELECT count(*) AS owed, coalesce(sum(CASE kind WHEN 'mount' THEN 2 WHEN 'document' THEN 1 WHEN 'sheet' THEN 1"
    " ELSE 0 END), 0) AS owed_requests, count(DISTINCT CASE kind WHEN 'thumbnail' THEN pat_num END) AS thumbnail_calls"
    " FROM item WHERE vanished_at IS NULL AND current_version IS NOT NULL"
)
SECRETS: Final = tuple(question.file for question in QUESTIONS if question.file)
ED25519, RSA = "sftp_host_ed25519", "sftp_host_rsa"
DOCTOR_TAKES: Final = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie on this machine, and who may change them."""

    root: Path = Path("/")
    uid: int = 0

    @property
    def practices(self) -> Path:
        """A folder for each practice."""
        return self.root / "etc/syncd"

    @property
    def units(self) -> Path:
        """What the administrator adds to systemd's units."""
        return self.root / "etc/systemd/system"


PLACES: Final = Places()


@verb(
    "setup",
    click.argument("name", metavar="NAME"),
    option("--only", type=click.Choice(asking.PARTS), help="Ask for this alone."),
    option(
        "--answers", "file", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file instead of questions."
    ),
    option("--new", is_flag=True, help="Begin a new archive, where one is known already."),
    option("--yes", is_flag=True, help="With --new: fetch everything again."),
    dry,
    json_too,
)
def setup(call: Call, name: str, only: str | None, file: Path | None, new: bool, yes: bool) -> int:
    """Configure a practice by questions, at any time again.

    It asks, looks, writes, and starts nothing that did not run.
    """
    if call.practice or call.file or call.archive:
        raise UsageError(f"setup takes the name alone: sudo syncd setup {name}")
    if not asking.NAME.fullmatch(name):
        raise UsageError("a practice's name is 1 to 25 of a-z, 0-9 and '-', and begins with a letter or digit")
    if os.geteuid() != PLACES.uid:
        raise UsageError(f"only root may do this: sudo syncd setup {name}")
    return _Setup(call, PLACES, name, only, _given(file) if file else None, new).run(yes)


def _given(file: Path) -> Answers:
    """A file of answers. It holds keys: nobody else may read it."""
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError((f"{file}: others may read these secrets: chmod 600",))
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError((f"{file}: cannot be read ({type(error).__name__}): it must be TOML",)) from None


class _Setup:
    """One call: what is there (`before`), what is wanted (`answers`, `text`, `settings`), and what has to be done."""

    def __init__(
        self, call: Call, places: Places, name: str, only: str | None, given: Answers | None, new: bool
    ) -> None:
        self._call, self._places, self._name, self._only, self._given, self._new = call, places, name, only, given, new
        self._folder, self._user = places.practices / name, f"syncd-{name}"
        self._old_site = self._folder / "sshd_config"
        self._text = HEAD.format(name)
        self._before = self._read()
        self._draft = Answers()  # of an earlier round

    def _read(self) -> Answers:
        path, before = self._folder / "config.toml", Answers()
        if path.exists():
            settings = wiring.load(path, os.environ)
            if (
                settings.api.developer_key_file,
                settings.api.customer_key_file,
                settings.drop.password_file,
            ) != SECRETS:
                raise ConfigError((f"config.toml: setup, as the service, knows only the files {', '.join(SECRETS)}",))
            sources = asking.sources_of(self._old_site.read_text("ascii")) if self._old_site.exists() else ()
            self._text, before = path.read_bytes().decode(), asking.present(settings, sources)
        elif self._only:
            raise UsageError(f"{self._name} is not set up yet: sudo syncd setup {self._name}")
        for question in QUESTIONS:
            if question.file and (secret := self._folder / question.file).exists():
                before[question.name] = secret.read_text("utf-8", "replace").strip()
        lacking = [q.file for q in QUESTIONS if q.file and q.name not in before and q not in self._wanted()]
        if lacking and self._only not in ("archive", "notify"):
            words = f"setup tries what it writes, and {', '.join(lacking)} cannot be read here (encrypted?)"
            how = "`systemd-creds decrypt FILE.cred FILE` as root, and remove FILE afterwards"
            raise UsageError(f"{words}: make the plain file in {self._folder} for this call: {how}")
        return before

    def run(self, yes: bool) -> int:
        """Ask, look, write. Raises whatever forbids it, with nothing written."""
        while True:
            try:
                rows = self._asked_and_looked(yes)
            except (SiteError, TransientError, ConfigError) as error:
                if self._given is not None:
                    raise
                click.echo(f"not written: {error}".replace("NAME", self._name), err=True)
                if not click.confirm("Answer again", default=True, err=True):
                    raise
            else:
                return self._done(rows, self._files())

    def _done(self, rows: list[Row], files: Files) -> int:
        if self._call.dry_run:
            return self._shown(files)
        self._write(files)
        return self._finished(rows, files)

    def _asked_and_looked(self, yes: bool) -> list[Row]:
        self._answers = self._asked()
        edits = asking.edits(self._wanted(), self._answers, self._before)
        self._new_text = asking.edited(self._text, edits)
        settings = config.parse(self._new_text, name=self._name, folder=self._folder, environ=os.environ)
        self._call.settings = self._settings = settings
        with as_owner(settings.state_path), index_if_any(self._call) as index:
            self._known = index.meta("archive_id") if index else None
            if self._new and index and self._known:
                self._tell_price(index, yes or self._call.dry_run)
        self._look_at_archive()
        return [] if self._call.dry_run or self._only in ("archive", "notify") else self._looked_outside()

    # --- asking

    def _wanted(self) -> list[Question]:
        return [question for question in QUESTIONS if self._only in (None, question.part)]

    def _asked(self) -> Answers:
        known, answers = (*asking.BY_NAME, *asking.AGREEMENTS), dict(self._before)
        unknown = [key for key in self._given or () if key not in known]
        problems = [f"{key}: unknown answer; {config.nearest(key, known)}" for key in unknown]
        for question in self._wanted():
            if not asking.applies(question, answers):
                continue
            usual = asking.default(question, self._name, answers, self._draft or self._before)
            if self._given is None:
                value = self._prompted(question, usual, answers)
            else:
                value = self._given.get(question.name, usual)
                missing = value in (None, "", []) and not question.optional
                problem = f"{question.name}: is missing" if missing else asking.wrong(question, value, answers)
                problems += [problem] if problem else []
            answers[question.name] = value
            if (question.name, value) == ("sftp", "here"):
                answers |= {"sftp_host": asking.HERE, "sftp_username": f"drop-{self._name}", "sftp_folder": "syncd"}
        if problems:
            raise ConfigError(tuple(problems))
        self._draft = {"host_key": None} | answers
        if answers["sftp"] == "here":
            own = self._before.get("sftp") == "here" and self._before.get("sftp_password")
            answers["sftp_password"] = own or secrets.token_hex(16)
            self._host_keys = self._read_or_made_host_keys()
            answers["host_key"] = " ".join(self._host_keys[f"{ED25519}.pub"][0].split()[:2])
        elif self._only in (None, "sftp", "host-key"):
            answers["host_key"] = self._pinned(answers)
        return answers

    def _read_or_made_host_keys(self) -> dict[str, File]:
        """The SFTP site's own host keys, public parts too: file name -> text and mode."""
        names = [name + end for name in (ED25519, RSA) for end in ("", ".pub")]
        with tempfile.TemporaryDirectory(prefix="syncd-") as scratch:
            folder = self._folder
            if not (folder / names[-1]).exists():
                folder = Path(scratch)
                run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self._name, "-f", f"{folder / ED25519}")
                run("ssh-keygen", "-q", "-t", "rsa", "-b", "3072", "-N", "", "-C", self._name, "-f", f"{folder / RSA}")
            return {name: ((folder / name).read_text("ascii"), SECRET) for name in names}

    def _prompted(self, question: Question, usual: Any, answers: Answers) -> Any:
        words, shown = question.words, usual
        if isinstance(usual, list):
            shown = shlex.join(usual)
        if question.optional:
            words, shown = f"{words} (- for none)", shown or "-"
        if question.file and usual:
            words += " (Enter keeps it)"
        while True:
            secret = bool(question.file)
            said = click.prompt(words, default=shown, type=str, hide_input=secret, show_default=not secret, err=True)
            try:
                value = asking.typed(question, said)
                problem = asking.wrong(question, value, answers)
            except ValueError:
                problem = f"{question.name}: a quotation mark is missing"
            else:
                if problem is None:
                    return value
            click.echo(problem, err=True)

    def _agreed(self, name: str, words: str) -> bool:
        """A decision: asked for, or an answer of its own in the file."""
        if self._given is not None:
            return self._given.get(name) is True
        return click.confirm(words, default=False, err=True)

    def _pinned(self, answers: Answers) -> str | None:
        """The host key to pin: the one given, the one pinned if the site is the same, or the one it shows and somebody
        confirms.
        """
        question, before = asking.BY_NAME["host_key"], self._before.get("host_key")
        if self._given and "host_key" in self._given:
            if problem := asking.wrong(question, self._given["host_key"], answers):
                raise ConfigError((problem,))
            return " ".join(self._given["host_key"].split()[:2])
        host, port = answers["sftp_host"], answers["sftp_port"]
        same = (host, port) == (self._before.get("sftp_host"), self._before.get("sftp_port"))
        if same and self._only != "host-key":
            return before
        if "host_key" in self._before and before is None:
            raise ConfigError(("[drop] known_hosts_file: pins the site's key: change that file by hand",))
        key = wiring.shown_host_key(host, port, before.split()[0] if before else "ssh-ed25519")
        click.echo(f"{host} port {port} shows the host key {' '.join(asking.fingerprint(key))}", err=True)
        if key == before:
            click.echo("it is the pinned one", err=True)
        elif not self._agreed("trust_host_key", "Is it the site's own? Ask those who run it"):
            raise ConfigError(("host_key: not confirmed: give host_key, or trust_host_key = true",))
        return key

    # --- looking

    def _look_at_archive(self) -> None:
        """The rules of the archive's marker, before anything is written. Raises SiteError, ConfigError."""
        path, self._take_over, self._make_archive = self._settings.archive.path, False, False
        for other in self._places.practices.glob("*/config.toml"):
            if other.parent == self._folder:
                continue
            with contextlib.suppress(ConfigError):
                theirs = wiring.load(other, {}).archive.path
                if path.is_relative_to(theirs) or theirs.is_relative_to(path):
                    raise UsageError(f"{path} is the archive of {other.parent.name}: choose another folder")
        if str(path) == self._before.get("archive") and not self._new:
            return
        marker = wiring.open_archive(self._settings).marker_id()
        if self._known and not self._new:
            if marker != self._known:
                raise SiteError("archive_missing", "the index knows another archive; --new begins a new one")
            return
        if marker and self._known:
            raise SiteError("archive_missing", NEW_ARCHIVE)
        if marker:
            self._take_over = self._agreed("take_over_archive", f"{path} is an archive already. Take it over")
            if not self._take_over:
                raise SiteError("index_lost")
        elif path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - {"lost+found", "incoming"}):
            raise SiteError("archive_missing", NEW_ARCHIVE)
        self._make_archive = True

    def _tell_price(self, index: Index, yes: bool) -> None:
        """What a new archive means for a practice that has one. Raises UsageError without a yes."""
        if holder := Lock(self._settings.state_path).holder():
            raise LockHeldError(
                f"`syncd {holder.verb}` (pid {holder.pid}) is at work: systemctl stop syncd@{self._name}"
            )
        settings, now = self._settings, self._call.clock.now()
        facts = Catalog(index, settings.name, settings.sync.kinds).status_facts(now, settings.api.page_limit)
        lost, again = index.rows(ONLY_THERE)[0], index.rows(AGAIN)[0]
        again["owed_requests"] += facts.sweep_requests
        planned = report.plan(replace(facts, **again, lists_never_polled=0), report.Budget.of(settings, now))
        words = f"only in the old archive, for ever: {lost['versions']:,} versions, {report.human_bytes(lost['bytes'])}"
        click.echo(f"{words} (superseded, or vanished in Open Dental)\n{faces.plan_text(planned)}", err=True)
        if not yes:
            raise UsageError("--new fetches all of that again: call it with --yes if the old archive is lost")

    def _looked_outside(self) -> list[Row]:
        """Doctor's look outside, with what would be written. Raises what forbids to write it."""
        answers, settings, met = self._answers, self._settings, list[SyncdError]()
        private = settings.drop.private_key_file
        paths = settings.credential_path(private) if private else []
        keys = Credentials(
            answers["developer_key"],
            answers["customer_key"],
            answers.get("sftp_password") or "",
            next((path for path in paths if path.exists()), None),
        )
        to_be_made = answers["sftp"] == "here" and self._before.get("sftp") != "here"
        drop = None if to_be_made else wiring.open_drop(settings, keys)
        with as_owner(settings.state_path), index_if_any(self._call) as index:
            found = doctor.examine_outside(self._call, keys, drop, index, met.append)
            rows = list(doctor.rows_of(found, self._name))
        click.echo(doctor.text(rows), err=True)
        if refused := next((error for error in met if error.exit_code == errors.EXIT_REFUSED), None):
            raise refused
        others = next((error for error in met if error.exit_code == errors.EXIT_HELD), None)
        if others and not self._agreed("accept_other_database", "Other people have these numbers there. Write it"):
            raise others
        if not others and doctor.failed(rows) and not self._agreed("accept_problems", "Write it all the same?"):
            raise met[0] if met else UsageError("not written: see what failed; accept_problems = true writes it")
        return rows

    # --- writing

    @property
    def _site(self) -> Site | None:
        """The SFTP site to make or change on this server."""
        said, jail = self._answers, self._places.root / "srv/sftp" / self._name
        if said["sftp"] != "here" or self._only not in (None, "sftp"):
            return None
        return Site(self._name, self._folder, jail, said["sftp_port"], tuple(said["sftp_sources"]))

    def _files(self) -> Files:
        """What has to change in the practice's folder."""
        text, mode = self._there("config.toml") or ("", PUBLIC)
        wanted: dict[str, File | None] = {"config.toml": (self._new_text, mode)}
        for question in self._wanted():
            if question.file and (value := self._answers.get(question.name)):
                text, _ = self._there(question.file) or ("", SECRET)
                wanted[question.file] = text if text.strip() == value else f"{value}\n", SECRET
        if site := self._site:
            wanted |= {"sshd_config": (site.sshd_config, PUBLIC)} | self._host_keys
        elif self._answers["sftp"] != "here":
            wanted["sshd_config"] = None
        return {name: file for name, file in wanted.items() if file != self._there(name)}

    def _there(self, name: str) -> File | None:
        path = self._folder / name
        return (path.read_bytes().decode("utf-8", "replace"), path.stat().st_mode & 0o777) if path.exists() else None

    def _drop_ins(self, *archives: Path) -> dict[Path, str]:
        text = asking.drop_in(self._places.root, *archives)
        units = (self._places.units / f"{unit}@{self._name}.service.d" for unit in ("syncd", "syncd-backfill"))
        found = {folder / "archive.conf": text for folder in units}
        return {path: text for path, text in found.items() if text != (path.read_text() if path.exists() else "")}

    def _shown(self, files: Files) -> int:
        """What would be written."""
        archive, url = self._settings.archive.path, self._settings.notify.ping_url
        would = dict[str, str]()
        for name, file in files.items():
            text, mode = file or ("(removed)", PUBLIC)
            would[str(self._folder / name)] = "(hidden)" if mode == SECRET else text
        would |= {str(path): text for path, text in self._drop_ins(archive).items()}
        if site := self._site:
            would[str(self._places.units / site.unit_name)] = site.unit
        said = "\n".join(f"--- {path}\n{text.rstrip()}" for path, text in would.items()) or "nothing would change"
        if url:  # it may carry a token
            said, would = said.replace(url, "(hidden)"), {p: t.replace(url, "(hidden)") for p, t in would.items()}
        return self._call.answer({"would_write": would}, said)

    def _write(self, files: Files) -> None:
        """Everything, in an order that leaves the old or the new configuration working wherever it ends.

        What both can live with comes first: users, folders, the right to write into either archive.
        """
        settings, site = self._settings, self._site
        with contextlib.ExitStack() as held:
            if self._new and self._known:
                with as_owner(settings.state_path):
                    held.enter_context(Lock(settings.state_path, "setup"))
            make_user(self._user, "/nonexistent")
            folders = [settings.state_path, settings.log_path, *([settings.archive.path] if self._make_archive else [])]
            run("install", "-d", "-m", "0700", "-o", self._user, "-g", self._user, *map(str, folders))
            if self._take_over:
                run("chown", "-R", "-h", self._user, str(settings.archive.path))
            if site:
                self._make_site(site)
            old = [Path(self._before["archive"])] if "archive" in self._before else []
            for path, text in self._drop_ins(settings.archive.path, *old).items():
                write(path, text)
            if files:
                switch(self._folder, files, self._user)
            for path, text in self._drop_ins(settings.archive.path).items():
                write(path, text)
            if self._new and self._known:
                with as_owner(settings.state_path):
                    _begin_index(settings.state_path / "index.db")

    def _make_site(self, site: Site) -> None:
        """Account, jail and unit of the SFTP site. Raises ConfigError where sshd does not take its configuration."""
        run("install", "-d", "-m", "0755", "/run/sshd")
        with tempfile.TemporaryDirectory(prefix="syncd-") as scratch:
            folder = Path(scratch)
            for name, (text, mode) in self._host_keys.items():
                put(folder / name, text, mode)
            put(folder / "sshd_config", replace(site, folder=folder).sshd_config, SECRET)
            run("/usr/sbin/sshd", "-t", "-f", str(folder / "sshd_config"))
        make_user(site.user, "/")
        run("chpasswd", said=f"{site.user}:{self._answers['sftp_password']}\n")
        run("install", "-d", "-m", "0755", "-o", "root", "-g", "root", str(site.jail))
        run("install", "-d", "-m", "0700", "-o", site.user, "-g", site.user, str(site.jail / site.drop))
        write(self._places.units / site.unit_name, site.unit)

    def _finished(self, rows: list[Row], files: Files) -> int:
        """Start what ran before, look at this machine as doctor does, and say how to go on."""
        name, site = self._name, self._site
        systemd = (self._places.root / "run/systemd/system").is_dir()
        if systemd:
            run("systemctl", "daemon-reload")
            if site:
                run("systemctl", "enable", site.unit_name)
                run("systemctl", "restart", site.unit_name)
            if "sshd_config" in files and not site:
                run("systemctl", "disable", "--now", asking.UNIT.format(name))
        made_now = site and self._before.get("sftp") != "here"
        here = self._doctor([] if made_now and systemd else ["--offline"])
        here = [row for row in here if row["check"] != "service"]  # it still has the configuration of before
        for row in here:  # its index is the next command's work
            row["result"] = "warning" if self._take_over and row["check"] == "archive" else row["result"]
        rows += here
        if systemd:
            units = (f"syncd@{name}.service", f"syncd-backfill@{name}.service")
            run("systemctl", "try-restart", "--no-block", *units)  # one may wait for the lock that the other holds
        start = [f"systemctl enable --now syncd@{name}"]  # it mirrors what there is; a backfill would keep it out
        if self._take_over:
            start.insert(0, f"syncd -p {name} reindex")
        elif self._known and not self._new:
            start = [f"systemctl start syncd@{name}", f"syncd -p {name} status"]
        notes = [] if systemd else ["systemd does not run here: nothing was restarted"]
        words = [doctor.text(here), *notes, "next:", *(f"    sudo {line}" for line in start)]
        self._call.answer({"practice": name, "checks": rows, "restarted": systemd, "next": start}, "\n".join(words))
        return errors.EXIT_DOCTOR if doctor.failed(rows) else errors.EXIT_OK

    def _doctor(self, options: list[str]) -> list[Row]:
        """A process of its own: it becomes the user of the service for good."""
        file = str(self._folder / "config.toml")
        line = [sys.executable, "-P", "-m", "syncd.cli", "-c", file, "doctor", "--json", *options]
        try:
            done = subprocess.run(line, capture_output=True, timeout=DOCTOR_TAKES, check=False)  # noqa: S603 - ourselves
            return list(json.loads(done.stdout)["checks"])
        except (subprocess.TimeoutExpired, ValueError):
            words = f"did not answer: call syncd -p {self._name} doctor"
            return list(doctor.rows_of([("failed", "doctor", words, "practice_it")], self._name))


def _begin_index(path: Path) -> None:
    """An empty index in place of the one of a lost archive, which stays beside it. Numbers of versions go on."""
    fresh, kept = path.with_name("index.db.new"), path.with_name("index.db.before-new")
    fresh.unlink(missing_ok=True)
    with contextlib.closing(Index(path)) as old, contextlib.closing(Index(fresh)) as new:
        new.reserve_seqs(0, above=int(old.meta("last_seq") or 0))
        for index in (old, new):
            index.value("PRAGMA wal_checkpoint(TRUNCATE)")
    kept.unlink(missing_ok=True)
    kept.hardlink_to(path)
    for end in ("-wal", "-shm"):  # empty now; whoever still reads the old one keeps them open
        path.with_name(path.name + end).unlink(missing_ok=True)
    fresh.replace(path)
