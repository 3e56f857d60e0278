"""The verbs that look: into the archive, at the index, at the installation. None of them sends a request."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import click
from click import option

from syncd import config, errors, report, retrieve, scrub, wiring
from syncd.call import FOLDER, NUMBER, Call, asked, complain, dry, index_if_any, json_too, shelf_of, verb, written
from syncd.catalog import Catalog, Filters, Row
from syncd.config import Settings
from syncd.errors import EXIT_OK, ConfigError, SiteError, UsageError
from syncd.model import KINDS, Item, Version
from syncd.screen import emit, emit_json, plain, table
from syncd.service import Lock, become_owner, read_credentials

FOUND: Final = ("full_id", "version", "state", "category", "description", "bytes", "archived_at", "path")


def _moment(text: str | None, settings: Settings, name: str) -> float | None:
    try:
        return None if text is None else config.parse_time(text, settings.zone)
    except ValueError as error:
        raise UsageError(f"{name} {error}") from error


@verb(
    "find",
    asked("--patient", NUMBER, help="PatNum."),
    asked("--name", help="Words of a patient's name."),
    asked("--born", help="Birthdate, yyyy-mm-dd."),
    asked("--kind", click.Choice(KINDS), metavar="|".join(KINDS)),
    asked("--category", help="Part of an image category."),
    asked("--text", help="Part of a description."),
    asked("--since", metavar="TIME", help="Archived then or later."),
    asked("--until", metavar="TIME", help="Archived before."),
    option("--current", is_flag=True, help="Only the newest version of each item."),
    option("--follow", is_flag=True, help="With --json: go on with newly archived versions."),
    option("--after", type=click.IntRange(min=0), metavar="SEQ", help="With --follow: what came after this seq."),
    json_too,
)
def find(call: Call, /, follow: bool, after: int | None, **wanted: Any) -> int:
    """Find documents. `-` as a value asks for it, so that no name need stand on the command line."""
    if follow or after is not None:
        if not (follow and call.as_json) or any(wanted.values()) or call.archive:
            raise UsageError("--follow --after SEQ goes with --json, and with nothing else")
        _follow_versions(call, after)
    if wanted["born"] and not re.fullmatch(r"\d{4}-\d\d-\d\d", wanted["born"]):
        raise UsageError("--born: write it like 1980-02-29")
    with shelf_of(call) as (catalog, _, settings):
        for name in ("since", "until"):
            wanted[name] = _moment(wanted[name], settings, f"--{name}")
        rows = catalog.find(Filters(**wanted))
        if not call.as_json:
            emit(call.table(FOUND, rows))
        else:
            for row in rows:
                emit_json(row)
    return EXIT_OK


def _follow_versions(call: Call, after: int | None) -> None:
    """New versions as they are archived, for ever; `reindex` may replace the index, so it is opened each time."""
    while True:
        with shelf_of(call) as (catalog, _, _):
            if after is None:
                after = int(catalog.index.value("SELECT max(seq) FROM version") or 0)
            rows = catalog.follow(after)
        for row in rows:
            emit_json(row)
            after = row["seq"]
        if not rows:
            time.sleep(1.0)


@verb("show", click.argument("wanted", metavar="ID"), json_too)
def show(call: Call, wanted: str) -> int:
    """One item and its versions."""
    with shelf_of(call) as (catalog, _, _):
        rows = catalog.show(catalog.resolve(wanted))
    return call.answer({"id": rows[0]["id"], "versions": rows}, call.table(FOUND, rows))


@verb("history", click.argument("wanted", metavar="ID"), json_too)
def history(call: Call, wanted: str) -> int:
    """What happened to one item, in order of time."""
    with shelf_of(call) as (catalog, _, _):
        item = catalog.resolve(wanted)
        events = catalog.history(item)
    rows = [event | {"details": _details(event)} for event in events]
    said = {"id": item.id, "full_id": item.full_id, "events": events}
    return call.answer(said, call.table(("at", "event", "details"), rows))


def _details(event: Row) -> str:
    return ", ".join(f"{key}: {value}" for key, value in event.items() if key not in {"at", "event"} and value)


@verb(
    "export",
    option("--patient", "patients", type=NUMBER, multiple=True, required=True, help="PatNum; may be repeated."),
    option("--to", type=FOLDER, required=True, help="Folder for the copies."),
    option("--vanished", is_flag=True, help="Also what left the listings."),
    dry,
    json_too,
)
def export(call: Call, patients: tuple[int, ...], to: Path, vanished: bool) -> int:
    """Verified copies of a patient's documents, with names for people. 4 when an archived file is damaged."""
    with shelf_of(call) as (catalog, archive, settings):
        if call.dry_run:
            rows = [row for number in patients for row in catalog.find(Filters(patient=number, current=True))]
            rows = [row for row in rows if row["kind"] in retrieve.EXPORTED]
            sizes = [row["bytes"] for row in rows if vanished or row["state"] != "vanished"]
            words = f"would copy {len(sizes):,} files, {report.human_bytes(sum(sizes))}"
            return call.answer({"would_copy": len(sizes), "bytes": sum(sizes)}, words)
        done = retrieve.export(catalog, archive, patients, to, settings.zone, vanished=vanished)
    words = f"{done.files:,} files, {report.human_bytes(done.bytes)}; vanished and left out: {done.vanished:,}"
    said = {"files": done.files, "bytes": done.bytes, "damaged": done.damaged, "vanished_left_out": done.vanished}
    call.answer(said, words)
    complain(errors.EXIT_DAMAGE, *(f"{name}: the archived file is damaged" for name in done.damaged))
    return errors.EXIT_DAMAGE if done.damaged else EXIT_OK


@verb(
    "restore",
    click.argument("wanted", metavar="ID"),
    option("--to", type=FOLDER, required=True, help="Folder for the copy."),
    option("--as-of", metavar="TIME", help="What syncd had by then."),
    dry,
    json_too,
)
def restore(call: Call, wanted: str, to: Path, as_of: str | None) -> int:
    """A verified copy of one item: the newest version, or what syncd had by then."""
    with shelf_of(call) as (catalog, archive, settings):
        item, at = catalog.resolve(wanted), _moment(as_of, settings, "--as-of")
        if call.dry_run:
            number = catalog.as_of(item, float("inf") if at is None else at)
            return call.answer({"would_copy": number}, f"would copy version {number} of {item.full_id}")
        done = retrieve.restore(catalog, archive, item, to, at, settings.zone)
    if done.path is None:
        return complain(errors.EXIT_DAMAGE, f"{item.full_id}: the archived file of version {done.version} is damaged")
    return call.answer({"full_id": item.full_id, "version": done.version, "path": str(done.path)}, plain(done.path))


# --- the archive against the index


@verb("reindex", dry, json_too)
def reindex(call: Call) -> int:
    """Rebuild the index from the archive alone, without one request."""
    settings = call.settings
    become_owner(settings.state_path)
    archive = wiring.open_archive(settings)
    if archive.marker_id() is None:
        raise SiteError("archive_missing")
    if call.dry_run:
        count = sum(isinstance(each, Version) for each in archive.walk())
        return call.answer({"would_record": count}, f"would record {count:,} sidecars")
    settings.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with Lock(settings.state_path, "reindex"):
        found = scrub.reindex(settings, archive, call.clock.now())
    words = [f"{found.versions:,} sidecars, {report.human_bytes(found.bytes)}; not syncd's: {len(found.foreign):,}"]
    words += [f"  {plain(path)}" for path in found.foreign]
    said = {"versions": found.versions, "bytes": found.bytes, "foreign": found.foreign}
    return call.answer(said, "\n".join(words))


def _part(text: str) -> Fraction:
    if not re.fullmatch("[1-9][0-9]{0,4}/[1-9][0-9]{0,4}", text) or Fraction(text) > 1:
        raise ValueError('is not a part like "1/30" or "1/1"')
    return Fraction(text)


_subset = written(_part, "PART")


@verb(
    "verify",
    _subset("--subset", default="1/1", show_default=True, help="Checked longest ago first, like 1/30."),
    dry,
    json_too,
)
def verify(call: Call, subset: Fraction) -> int:
    """Hash archived files again and compare. 4 when one is damaged or missing."""
    with index_if_any(call) as index, contextlib.ExitStack() as stack:
        archive = wiring.open_archive(call.settings)
        if index is None or archive.marker_id() != (index.meta("archive_id") or ""):
            raise SiteError("archive_missing")
        total = index.value("SELECT count(*) FROM version WHERE sidecar = 1")
        count = scrub.share_of(total, subset)
        if call.dry_run:
            return call.answer({"would_verify": count}, f"would verify {count:,} of {total:,} files")
        lock = Lock(call.settings.state_path, "verify")
        alone = lock.holder() is None  # beside the daemon it only reads, and notes nothing
        if alone:
            stack.enter_context(lock)
        found = scrub.verify(index, archive, _oldest_checked(Catalog(index), count), call.clock.now(), note=alone)
    wrong = {"damaged": found.damaged, "missing": found.missing}
    words = f"{found.versions:,} files, {report.human_bytes(found.bytes)}"
    words += "".join(f"; {word}: {len(names):,}" for word, names in wrong.items())
    call.answer({"versions": found.versions, "bytes": found.bytes, **wrong}, words)
    complain(errors.EXIT_DAMAGE, *(f"{name}: {word}" for word, names in wrong.items() for name in names))
    return errors.EXIT_DAMAGE if found.damaged or found.missing else EXIT_OK


def _oldest_checked(catalog: Catalog, count: int) -> Iterator[Version]:
    sql = "SELECT pat_num, kind, num, version FROM version WHERE sidecar = 1 ORDER BY checked_at, seq LIMIT ?"
    for row in catalog.index.rows(sql, count):
        versions = catalog.versions(Item(row["pat_num"], row["kind"], row["num"]))
        yield next(each for each in versions if (each.version, each.sidecar) == (row["version"], 1))


# --- whether all is in order


@verb("doctor", option("--offline", is_flag=True, help="Without any request."), json_too)
def doctor(call: Call, offline: bool) -> int:
    """Look at configuration, credentials, archive, space, index and zone: what to do, and who."""
    columns = ("result", "check", "message", "who")
    rows: list[Row] = [dict(zip(columns, found, strict=True)) for found in _examine(call)]
    call.answer({"checks": rows}, table(columns, ([*row.values()] for row in rows)))
    if not offline:
        call.say("the online checks (keys, eConnector, SFTP site, one placement) come with a later release")
    return errors.EXIT_DOCTOR if any(row["result"] == "failed" for row in rows) else EXIT_OK


Check = tuple[str, str, str, str]  # ok | warning | failed; what was looked at; what to do; who


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
            else:
                yield "failed", "index", "index.db is damaged: stop the service, then `syncd reindex`", "practice_it"
        yield from _examine_archive(settings, known)
    except SiteError as error:
        yield "failed", error.reason, str(error), error.who
    if settings.state_path.exists() and settings.state_path.stat().st_mode & 0o077:
        yield "warning", "state folder", "others may enter it: chmod 700", "practice_it"
    here = dt.datetime.fromtimestamp(call.clock.now(), settings.zone).isoformat(sep=" ", timespec="seconds")
    yield "ok", "time zone", f"{settings.zone} has {here} now: compare it with a clock in the office", "practice_it"


def _examine_archive(settings: Settings, known: str | None) -> Iterator[Check]:
    archive, path = wiring.open_archive(settings), settings.archive.path
    if known is not None:
        archive.check(known)
        yield "ok", "archive", "", "nobody"
    elif archive.marker_id() is not None:
        yield "failed", "archive", "this index does not know it: `syncd reindex` takes it over", "practice_it"
    elif not path.is_dir() or {each.name for each in path.iterdir()} - {"lost+found", "incoming"}:
        yield "failed", "archive", "a new archive needs an existing, empty folder", "practice_it"
    else:
        yield "ok", "archive", "an empty folder: the first start makes it the archive", "nobody"
    free, reserve = archive.free_bytes(), settings.archive.reserve
    words = f"{report.human_bytes(free)} free, {report.human_bytes(reserve)} of it reserved"
    yield "failed" if free < reserve else "warning" if free < 2 * reserve else "ok", "space", words, "practice_it"
