"""`syncd doctor`: is everything in order, here, at the SFTP site and at Open Dental? One line each, and who must act.

The online part spends about five requests, in the pace that all processes of the practice share, and places one
document on the site to pull and remove it. It changes nothing and needs no lock.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeVar

from click import option

from syncd import errors, guards, identity, pacing, report, wiring
from syncd.bundle import claim, write
from syncd.call import FILE, Call, index_if_any, json_too, verb
from syncd.catalog import Row
from syncd.config import Settings
from syncd.diff import local_time
from syncd.errors import (
    EXIT_OK,
    REASONS,
    ConfigError,
    ItemError,
    ListingError,
    NoSuchMethodError,
    SiteError,
    SyncdError,
    TransientError,
)
from syncd.index import Index
from syncd.model import Listed, Page, Pulled, PullJob
from syncd.naming import extension_of, staging_name
from syncd.ports import Api, Drop
from syncd.screen import table
from syncd.service import Credentials, Lock, network_file_system, read_credentials
from syncd.sites import NEW_ARCHIVE

CLOCKS_DIFFER: Final = 120.0  # seconds
PATIENTS: Final = 5  # looked at for a document to try
CAP: Final = 2**31  # bytes
LITTLE: Final = 200_000_000  # bytes: with less, logs and the day's copy of the index soon find no room
LONG: Final = 30.0  # seconds to wait for a request: then it is said why

Answer = TypeVar("Answer")
Result = Literal["ok", "warning", "failed"]
Check = tuple[Result, str, str, str]  # what was looked at; what to do; who
COLUMNS: Final = ("result", "check", "message", "who")
READ_ALL: Final = frozenset({"ApiReadAll"})  # the tier that can list, and nothing else


@verb(
    "doctor",
    option("--offline", is_flag=True, help="Without any request."),
    option("--bundle", type=FILE, metavar="FILE", help="Pack logs and status for strangers: no names, no numbers."),
    json_too,
)
def doctor(call: Call, offline: bool, bundle: Path | None) -> int:
    """Look at everything: what to do, and who.

    Configuration, credentials, clock, archive, SFTP site, Open Dental, and one real placement.
    """
    rows, credentials, drop, settings = list[Row](), None, None, None
    packed = claim(bundle) if bundle is not None else None  # before this process becomes the owner of the state
    with contextlib.suppress(ConfigError):  # told below
        settings = call.settings
        credentials = read_credentials(settings)  # now: root becomes the owner of the state, who may not
    if settings and credentials and not offline:
        drop = wiring.open_drop(settings, credentials)
    name = settings.name if settings else "NAME"
    rows += rows_of(_examine(call), name)
    if credentials and drop:
        rows += rows_of(examine_outside(call, credentials, drop), name)
    if packed is not None:
        write(packed, rows, settings, call.clock.now())
    return call.answer({"checks": rows}, text(rows), errors.EXIT_DOCTOR if failed(rows) else EXIT_OK)


def rows_of(checks: Iterable[Check], name: str) -> Iterator[Row]:
    """Checks of the practice of this name, as `doctor --json` has them."""
    for result, check, message, who in checks:
        yield dict(zip(COLUMNS, (result, check, message.replace("NAME", name), who), strict=True))


def text(rows: Iterable[Row]) -> str:
    """The same for people."""
    return table(COLUMNS, ([*row.values()] for row in rows))


def failed(rows: Iterable[Row]) -> bool:
    """Whether one of them found a failure."""
    return any(row["result"] == "failed" for row in rows)


# --- on this machine


def _examine(call: Call) -> Iterator[Check]:
    try:
        settings = call.settings
    except ConfigError as error:
        yield from (("failed", "configuration", problem, "practice_it") for problem in error.problems)
        return
    yield "ok", "configuration", "", "nobody"
    try:
        read_credentials(settings)
        yield "ok", "credentials", "", "nobody"
    except ConfigError as error:
        yield from (("failed", "credentials", problem, "practice_it") for problem in error.problems)
    known = None
    try:
        with index_if_any(call) as index:
            if index is None:
                yield "warning", "index", "there is none yet: the first `syncd backfill` or `run` makes it", "nobody"
            elif index.value("PRAGMA quick_check") == "ok":
                known = index.meta("archive_id")
                yield "ok", "index", "", "nobody"
                yield _service(call, index)
            else:
                yield "failed", "index", "index.db is damaged: stop the service, then `syncd reindex`", "practice_it"
    except PermissionError:
        yield "failed", "index", "this user may not open it: call `sudo syncd`", "practice_it"
    except SiteError as error:
        yield "failed", error.reason, str(error), error.who
    try:
        yield from _examine_archive(settings, known)
    except SiteError as error:
        yield "failed", error.reason, str(error), error.who
    if settings.state_path.exists() and settings.state_path.stat().st_mode & 0o077:
        yield "warning", "state folder", "others may enter it: chmod 700", "practice_it"
    yield from _examine_folders(settings)
    yield from _examine_programs(settings)
    metrics = settings.status.metrics_file
    if metrics is not None and not os.access(metrics.parent, os.W_OK | os.X_OK, effective_ids=True):
        words = f"syncd cannot write into {metrics.parent}: make it, give it to this user, ReadWritePaths= in a drop-in"
        yield "warning", "metrics file", words, "practice_it"
    here = dt.datetime.fromtimestamp(call.clock.now(), settings.zone).isoformat(sep=" ", timespec="seconds")
    yield "ok", "time zone", f"{settings.zone} has {here} now: compare it with a clock in the office", "practice_it"


def _service(call: Call, index: Index) -> Check:
    """What the running service says of itself: a part that hangs, or another database, nobody sees from here."""
    holder, clock = Lock(call.settings.state_path).holder(), call.clock
    if holder is None:
        return "warning", "service", REASONS["not_running"][1], "practice_it"
    told = tuple(report.Trouble(**row) for row in index.rows("SELECT * FROM site"))
    told += report.silent_parts(holder.signs, clock.steady(), clock.now())
    worst = report.worst(report.ripened(report.StatusFacts(troubles=told), clock.now()).troubles)
    if worst is None:
        return "ok", "service", f"{holder.verb}, pid {holder.pid}", "nobody"
    who, meaning, _ = REASONS[worst.reason]
    return ("warning" if who == "nobody" else "failed"), "service", f"{worst.reason}: {worst.detail or meaning}", who


def _examine_archive(settings: Settings, known: str | None) -> Iterator[Check]:
    archive, path = wiring.open_archive(settings), settings.archive.path
    if path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        words = "syncd's user may not read and write it: give it to the owner of the state folder, with chown"
        yield "failed", "archive", words, "practice_it"
        return
    if known is not None:
        archive.check(known)
        yield "ok", "archive", "", "nobody"
    elif archive.marker_id() is not None:
        yield "failed", "archive", "this index does not know it: `syncd reindex` takes it over", "practice_it"
    elif not path.is_dir() or {each.name for each in path.iterdir()} - {"lost+found", "incoming"}:
        yield "failed", "archive", NEW_ARCHIVE, "practice_it"
    else:
        yield "ok", "archive", "an empty folder: the first start makes it the archive", "nobody"
    if kind := network_file_system(path):
        words = f"a network's ({kind}): only one machine may write there, and `verify` matters more"
        yield "warning", "file system", words, "practice_it"
    free, reserve = archive.free_bytes(), settings.archive.reserve
    yield _space("space", free, reserve, f", {report.human_bytes(reserve)} of it reserved")


def _space(check: str, free: int, least: int, reserved: str = "") -> Check:
    result: Result = "failed" if free < least else "warning" if free < 2 * least else "ok"
    to_do = "" if result == "ok" else ": make room, or enlarge the disk"
    return result, check, f"{report.human_bytes(free)} free{reserved}{to_do}", "practice_it"


def _examine_folders(settings: Settings) -> Iterator[Check]:
    """The folders that syncd keeps for itself; one that is not there yet will be made on the disk of its parent."""
    for role, folder in (("state", settings.state_path), ("log", settings.log_path)):
        told = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
        yield _space(f"{role} space", told.f_bavail * told.f_frsize, LITTLE)


def _examine_programs(settings: Settings) -> Iterator[Check]:
    notify, hook = settings.notify.command, settings.hook.archived
    if not notify and not settings.notify.ping_url:
        yield "warning", "notices", "nobody will be told of trouble: set [notify] command or ping_url", "practice_it"
    for check, key, command in (("notices", "[notify] command", notify), ("hook", "[hook] archived", hook)):
        if command and not (os.access(command[0], os.X_OK, effective_ids=True) and Path(command[0]).is_file()):
            words = f"{key}: its program is not there, or syncd's user may not execute it: mend the path, or chmod 755"
            yield "failed", check, words, "practice_it"


# --- outside


def examine_outside(
    call: Call,
    credentials: Credentials,
    drop: Drop | None,
    known: Index | None = None,
    met: Callable[[SyncdError], None] = lambda _: None,
) -> Iterator[Check]:
    """The site first: without it (or with no `drop`) no placement is worth a request. `known`: compare the database
    with this index. `met` gets each error behind a failure. Closes the drop.
    """
    with (
        contextlib.closing(drop) if drop else contextlib.nullcontext(),
        tempfile.TemporaryDirectory(prefix="syncd-") as scratch,
    ):
        drop_works = False
        try:
            if drop:
                seen = drop.look([call.settings.drop.folder.encode()])[0]
                yield "ok", "SFTP site", "host key and login are right", "nobody"
                if seen is None:
                    words = "the one that [drop] folder names is not there yet"
                    yield "warning", "SFTP folder", words, "practice_it"
                drop_works = True
        except SyncdError as error:
            met(error)
            yield _found("SFTP site", error)
        outside = _Outside(call, credentials, drop if drop_works else None, Path(scratch))
        try:
            yield from outside.examine(known)
        except SyncdError as error:
            met(error)
            yield _found(outside.check, error)


def _found(check: str, error: SyncdError) -> Check:
    """What an error says of a check."""
    if isinstance(error, (SiteError, TransientError)):
        who = REASONS[error.reason][0]
        return ("warning" if who == "nobody" else "failed"), check, str(error), who
    if isinstance(error, ItemError) and check == "placement":
        who, meaning, _ = REASONS["placements_refused"]
        return "failed", check, f"{meaning} ({error.failure})", who
    if isinstance(error, ItemError):
        return "failed", check, f"the file that was placed cannot be archived ({error.failure})", "open_dental"
    return "failed", check, REASONS["bad_answers"][1], "open_dental"


class _Outside:
    """Questions to Open Dental, one after the other. `check`: what is being looked at."""

    def __init__(self, call: Call, credentials: Credentials, drop: Drop | None, scratch: Path) -> None:
        # Before the first start there is no state folder, nor another process to share the pace with.
        self._scratch, has_state = scratch, call.settings.state_path.exists()
        self._call, self._settings, self._drop = call, call.settings, drop
        self._api: Api = wiring.open_api(call.settings, credentials)
        self._pace = wiring.open_pace(call.settings, call.clock, None if has_state else scratch)
        self.check = "Open Dental"

    def examine(self, known: Index | None) -> Iterator[Check]:
        """Each finding as it comes. Raises SyncdError: `check` says where."""
        version = self._asked(self._api.program_version)
        told = version if re.fullmatch(r"[0-9.]{1,40}", version) else "unknown"  # the other side's words are not ours
        yield "ok", self.check, f"the API answers, version {told}", "nobody"
        self.check = "permissions"
        yield self._permissions()
        if known:
            self.check = "database"
            yield self._database(known)
        self.check = "patients"
        patients = [patient.pat_num for patient in self._asked(lambda: self._api.patients(0, PATIENTS))]
        if not patients:
            yield "warning", self.check, "Open Dental lists no patient to this key", "integrator"
            return
        self.check = "documents"
        row = self._listed([*self._known(), *patients])
        if row is None:
            yield "warning", self.check, "none found to try a placement with", "nobody"
            return
        self.check = "clock"
        yield self._clocks(row)
        if self._drop:
            self.check = "placement"
            yield from self._placement(row, self._drop)

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        """One request, when its time has come."""
        spacing = pacing.spacing(self._settings, self._call.clock.now(), bulk=False)
        while isinstance(claim := self._pace.claim(spacing), float):
            if claim > LONG:
                self._call.say(f"the next request may be sent in {report.human_duration(claim)}")
            time.sleep(claim)
        with claim:
            self._api.when_sending(claim.hold, claim.sent)
            try:
                return ask()
            except TransientError as error:
                if error.reason == "throttled":
                    claim.throttled(error.retry_after)
                raise

    def _permissions(self) -> Check:
        try:
            names = self._asked(self._api.permissions)
        except NoSuchMethodError:
            return "warning", self.check, "this version of Open Dental cannot tell them (before 22.2)", "nobody"
        if names == READ_ALL:
            raise SiteError("key_cannot_download")
        if any("queries" in name.lower() for name in names):
            return "ok", self.check, "with queries: the change feed can be used", "nobody"
        return "warning", self.check, "no queries: without the change feed, new documents are found later", "integrator"

    def _database(self, known: Index) -> Check:
        """Whether known documents are still the same ones there: the daemon's own comparison, before it starts."""
        probes, drawn = list[guards.Probe](), identity.drawn(known)
        self._call.say(f"comparing {len(drawn)} known documents with the database behind the key")
        try:
            for row in drawn:
                with contextlib.suppress(ItemError, ListingError):  # one that the office cannot show: others are asked
                    probes.append(identity.compared(row, self._asked(lambda n=row.item.num: self._api.document(n))))  # type: ignore[misc]
        except NoSuchMethodError:
            return "warning", self.check, "this version of Open Dental cannot be asked (before 24.2.32)", "nobody"
        if 2 * len(probes) < len(drawn):
            raise TransientError("bad_answers")
        verdict = guards.identity(probes, len(drawn))
        if verdict == "other_database":
            raise SiteError(verdict)
        if verdict != "same":
            return "warning", self.check, REASONS[verdict][1], "practice_it"
        return "ok", self.check, f"{len(probes)} known documents are the same there", "nobody"

    def _known(self) -> list[int]:
        """A patient with an archived document, drawn anew at each call; none before the first."""
        with index_if_any(self._call) as index:
            sql = "SELECT pat_num FROM item WHERE kind = 'document' AND vanished_at IS NULL"
            rows = index.rows(f"{sql} AND archived_revision IS NOT NULL ORDER BY random() LIMIT 1") if index else []
        return [row["pat_num"] for row in rows]

    def _listed(self, patients: list[int]) -> Listed | None:
        """Some document of these patients; one who is not there any more has none."""
        for pat_num in patients:
            page = Page(())
            with contextlib.suppress(ItemError):
                page = self._asked(lambda pat_num=pat_num: self._api.list_documents(pat_num, 0, 100))  # type: ignore[misc]
            for row in page.rows:
                if row.item.kind == "document" and row.upload is None:
                    return row
        return None

    def _clocks(self, row: Listed) -> Check:
        there, here = local_time(row.server_time, self._settings.zone), self._call.clock.now()
        if there is None:
            return "warning", self.check, "Open Dental does not tell its time", "nobody"
        off = abs(there - here)
        if off <= CLOCKS_DIFFER:
            return "ok", self.check, "the office's clock, read in this time zone, is this machine's", "nobody"
        words = (
            f"the office's clock says {row.server_time}: {report.human_duration(off)} off. Check [practice] time_zone"
        )
        return "failed", self.check, f"{words}, then both clocks", "practice_it"

    def _placement(self, row: Listed, drop: Drop) -> Iterator[Check]:
        """Have one document placed, pull it, and remove it from the site, whatever comes of it."""
        day = dt.datetime.fromtimestamp(self._call.clock.now(), dt.UTC).strftime("%Y%m%d")
        folder, extension = self._settings.drop.folder, extension_of(row.file_name) if row.file_name else None
        staging = staging_name(folder, self._settings.name, day, secrets.token_hex(16), extension).encode()
        try:
            self._asked(lambda: self._api.place_document(row.item.num, staging.decode()))
            yield "ok", self.check, "a document was placed on the site", "nobody"
            self.check = "pull"
            yield self._pull(staging, drop)
        finally:
            gone = all(drop.remove([*_placed(drop, staging), staging]))
        self.check = "clean-up"
        words = (
            "placed files can be removed" if gone else "a placed file cannot be removed: give this login the right to"
        )
        yield ("ok" if gone else "failed"), self.check, words, ("nobody" if gone else "practice_it")

    def _pull(self, staging: bytes, drop: Drop) -> Check:
        jobs = [PullJob(path, self._scratch / "pulled", CAP) for path in _placed(drop, staging)[:1]]
        outcome = next(iter(drop.pull(jobs)), ItemError("missing_on_drop"))
        if isinstance(outcome, Pulled):
            return "ok", self.check, f"{report.human_bytes(outcome.size)} came whole", "nobody"
        if isinstance(outcome, ItemError) and outcome.failure == "missing_on_drop":
            words = "Open Dental says it placed a file, and it is not here: does [drop] address lead to this very site?"
            return "failed", self.check, words, "practice_it"
        return _found(self.check, outcome)


def _placed(drop: Drop, staging: bytes) -> list[bytes]:
    """The file; in a folder, where Open Dental chooses the name, whatever was put there."""
    return [staging + name for name in drop.names(staging) or []] if staging.endswith(b"/") else [staging]
