"""The verbs that look: into the archive, at the index, at the installation. None of them sends a request."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, cast

import click
from click import option

from syncd import errors, exporting, report, scrub, wiring, wishes
from syncd.audit import Problem
from syncd.call import (
    FOLDER,
    NUMBER,
    Call,
    asked,
    complain,
    dry,
    index_if_any,
    json_too,
    moment,
    record,
    settle,
    shelf_of,
    verb,
    written,
)
from syncd.catalog import Catalog, Row
from syncd.checker import CODES, HARMLESS, Code, Finding, Tally
from syncd.config import Settings
from syncd.errors import EXIT_OK, SiteError, UsageError
from syncd.logs import open_logs
from syncd.model import KINDS, Version
from syncd.naming import folded
from syncd.repair import OUTCOMES, mend
from syncd.screen import emit, emit_json, local, nobody_reads, plain
from syncd.search import STATES, Filters
from syncd.service import Lock, become_owner, owner_id
from syncd.sites import audit_head

SHOWN: Final = 1000  # rows that `find` has in hand before it shows the first
PROMPT: Final = 0.5  # seconds between two looks for new versions
NAMED: Final = 50  # patients that one line of the audit log names; of more it gives no number
FOUND: Final = ("id", "version", "date", "category", "tooth", "description", "state", "archived_at")
OF_A_VERSION: Final = ("version", "archived_at", "size", "media_type", "sha256")
CARD: Final = ("id", "state", "date", "category", "tooth", "description", "file_name", "mount_num", "became")
DULL: Final = {"version": (None, 1), "tooth": (None, ""), "state": ("archived",)}  # columns that then say nothing
DATES: Final = r"\d{4}(-\d\d){0,2}"
TEETH: Final = "[1-9]|[1-9][0-9]|[A-Ta-t][Ss]?"


@verb(
    "find",
    asked("--patient", NUMBER, help="PatNum."),
    asked("--name", help="Words of a patient's name."),
    asked("--born", metavar="DATE", help="Birthdate, like 1980-02-29, or only 1980 or 1980-02."),
    asked("--kind", click.Choice(KINDS), metavar="|".join(KINDS)),
    asked("--category", help="Part of an image category."),
    asked("--text", help="Part of a description."),
    asked("--dated", metavar="DATE", help="The document's own date, like 2021-04-08, or only 2021 or 2021-04."),
    asked("--tooth", help="1 to 32, or A to T."),
    asked("--state", click.Choice(STATES), metavar="|".join(STATES)),
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
        return _follow_versions(call, after)
    for name, pattern, like in (("born", DATES, "1980-02-29 or 1980"), ("dated", DATES, "2021-04-08 or 2021")):
        if wanted[name] and not re.fullmatch(pattern, wanted[name]):
            raise UsageError(f"--{name}: write it like {like}")
    if wanted["tooth"] and not re.fullmatch(TEETH, wanted["tooth"]):
        raise UsageError("--tooth: write it like 14 or B")
    for name in ("name", "category", "text"):
        if wanted[name] is not None and not folded(wanted[name]).strip(" ,"):
            raise UsageError(f"--{name}: nothing of that can be looked for")
    with shelf_of(call) as (catalog, _, settings):
        for name in ("since", "until"):
            wanted[name] = moment(wanted[name], settings, f"--{name}")
        rows = catalog.find(Filters(**wanted))
        first = list(itertools.islice(rows, SHOWN))
        _record_find(call, catalog, wanted, first)
        rows = itertools.chain(first, rows)
        if call.as_json:
            for row in rows:
                emit_json(row)
        else:
            _emit_tables(call, catalog, rows, wanted)
    return EXIT_OK


def _emit_tables(call: Call, catalog: Catalog, rows: Iterable[Row], wanted: Row) -> None:
    """For people: a table a patient, of the columns that say something; thumbnails only where they are asked for."""
    seen = (row for row in rows if row["kind"] != "thumbnail" or wanted["kind"])
    empty = True
    for pat_num, group in itertools.groupby(seen, key=lambda row: row["pat_num"]):
        told = [_told(row) for row in group]
        dull = {name for name, value in DULL.items() if all(row[name] in value for row in told)}
        if wanted["since"] is None and wanted["until"] is None:
            dull.add("archived_at")
        head = _heading(catalog, pat_num) if empty else "\n" + _heading(catalog, pat_num)
        emit(f"{head}\n{call.table(tuple(name for name in FOUND if name not in dull), told)}")
        empty = False
    if empty:
        call.say("nothing found")


def _heading(catalog: Catalog, pat_num: int) -> str:
    """Who it is, as far as that is known: `Smith, Anna Maria (Annie), born 1980-01-31, patient 101`."""
    patient, said = catalog.index.patient(pat_num), f"patient {pat_num}"
    if patient is None or not (patient.last_name or patient.first_name):
        return said
    preferred = f" ({patient.preferred})" if patient.preferred else ""
    born = "" if patient.birthdate.startswith("0001") or not patient.birthdate else f", born {patient.birthdate[:10]}"
    name = ", ".join(filter(None, (patient.last_name, patient.first_name)))
    return click.style(plain(f"{name}{preferred}{born}, {said}"), bold=True)


def _told(row: Row) -> Row:
    """A row of `find` as people read it."""
    date = (row["date_created"] or "")[:10]
    told = {"id": row["full_id"], "date": "" if date.startswith("0001") else date, "tooth": row["tooth_numbers"]}
    size = "" if row["bytes"] is None else report.human_bytes(row["bytes"])
    described = row["description"] or ("" if row["mount_num"] is None else f"of mount-{row['mount_num']}")
    return row | told | {"description": described.strip(), "size": size}


def _record_find(call: Call, catalog: Catalog, wanted: Row, first: list[Row]) -> None:
    """Whose documents are shown stands in the audit log before they are; of very many only that they are more."""
    filters = sorted(name for name, value in wanted.items() if value not in (None, False))
    shown = sorted({row["pat_num"] for row in first})
    more = len(first) == SHOWN or None
    pat_nums = None if len(shown) > NAMED or more else shown
    facts = {"pat_num": wanted["patient"], "pat_nums": pat_nums, "more": more}
    record(call, catalog.index, "find", filters=filters, count=len(first), **facts)


def _follow_versions(call: Call, after: int | None) -> int:
    """New versions as they are archived, until nobody reads them; 0. Goes on in the index that `reindex` made anew."""
    path, told = call.settings.state_path / "index.db", False
    while True:
        opened = _inode(path)
        with shelf_of(call) as (catalog, archive, _):
            if not told:
                record(call, catalog.index, "find", filters=["follow"], seq=after, more=True)
            told = True
            while _inode(path) in (opened, None):
                noted = archive.last_seq()
                if after is None:
                    after = max(catalog.last_seq(), noted)
                rows = catalog.follow(after, noted)
                for row in rows:
                    emit_json(row)
                    after = row["seq"]
                if not rows and nobody_reads(PROMPT):
                    return EXIT_OK


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


@verb("show", click.argument("wanted", metavar="ID"), json_too)
def show(call: Call, wanted: str) -> int:
    """One item and its versions."""
    with shelf_of(call) as (catalog, archive, _):
        item = catalog.resolve(wanted)
        rows = catalog.show(item)
        record(call, catalog.index, "show", item=item.full_id)
        told = [_told(row) for row in rows]
        newest = next((row for row in told if row["current"]), told[-1])
        lines = [
            _heading(catalog, item.pat_num),
            *(f"{name:<12} {plain(newest[name])}" for name in CARD if newest[name]),
        ]
        if newest["path"]:
            lines.append(f"{'file':<12} {plain(archive.root / newest['path'])}")
        versions = [row | {"sha256": row["sha256"][:12]} for row in told if row["path"]]
    words = "\n".join([*lines, *(["", call.table(OF_A_VERSION, versions)] if versions else [])])
    return call.answer({"id": rows[0]["id"], "versions": rows}, words)


@verb("history", click.argument("wanted", metavar="ID"), json_too)
def history(call: Call, wanted: str) -> int:
    """What happened to one item, in order of time."""
    with shelf_of(call) as (catalog, _, _):
        item = catalog.resolve(wanted)
        events = catalog.history(item)
        record(call, catalog.index, "history", item=item.full_id)
        head = _heading(catalog, item.pat_num)
    rows = [event | {"details": _details(event)} for event in events]
    said = {"id": item.id, "full_id": item.full_id, "events": events}
    return call.answer(said, f"{head}\n{item.full_id}\n\n{call.table(('at', 'event', 'details'), rows)}")


def _details(event: Row) -> str:
    """What belongs to an event, for people: digests are short, and what every first sidecar has is left out."""
    short = {"sha256": lambda digest: digest[:12], "bytes": report.human_bytes, "flags": ", ".join}
    said = {key: value for key, value in event.items() if value and (key, value) != ("sidecar", 1)}
    said = {key: short[key](value) if key in short else value for key, value in said.items()}
    return ", ".join(f"{key}: {value}" for key, value in said.items() if key not in {"at", "event"})


@verb(
    "export",
    option("--patient", "patients", type=NUMBER, multiple=True, help="PatNum; may be repeated."),
    option("--all", "everybody", is_flag=True, help="Every patient."),
    option("--day", metavar="DATE", help="Whoever has an appointment: today, tomorrow or yyyy-mm-dd."),
    option("--to", type=FOLDER, required=True, help="Folder for the copies."),
    option("--vanished", is_flag=True, help="Also what left the listings."),
    dry,
    json_too,
)
def export(call: Call, patients: tuple[int, ...], everybody: bool, day: str | None, to: Path, vanished: bool) -> int:
    """Verified copies for people, with a gallery that opens from disk. 4 when an archived file is damaged."""
    if sum(map(bool, (patients, everybody, day))) != 1:
        raise UsageError("say whose documents: --patient, --all or --day")
    call.copying = True
    with shelf_of(call) as (catalog, archive, settings):
        wanted, title, facts = _wanted(catalog, settings, patients, _day(call, settings, day))
        if call.dry_run:
            return _would_export(call, catalog, wanted, vanished)
        options = [name for name, given in (("all", everybody), ("day", day), ("vanished", vanished)) if given]
        pat_nums = list(wanted)
        for first in range(0, len(pat_nums), NAMED):
            some = pat_nums[first : first + NAMED]
            record(call, catalog.index, "export", pat_nums=some, filters=options or None)
        zone, now = settings.zone, call.clock.now()
        done = exporting.export(catalog, archive, wanted, to, zone, now, vanished=vanished, title=title, facts=facts)
    words = [f"{done.files:,} files, {report.human_bytes(done.bytes)}; vanished and left out: {done.vanished:,}"]
    words[0] += f"; there already: {done.kept:,}" if done.kept else ""
    words[0] += f"; not archived yet: {done.owed:,}" if done.owed else ""
    words += [f"no documents: {', '.join(f'patient-{each}' for each in done.unknown)}"] if done.unknown else []
    words += [*facts, f"open {plain(done.page)}"] if done.page else facts
    said: Row = {"patients": len(wanted), "files": done.files, "bytes": done.bytes, "kept": done.kept}
    said |= {"damaged": done.damaged, "vanished_left_out": done.vanished, "not_archived_yet": done.owed}
    said |= {"without_documents": done.unknown, "page": str(done.page) if done.page else None}
    complain(errors.EXIT_DAMAGE, *(f"{name}: the archived file is damaged" for name in done.damaged))
    return call.answer(said, "\n".join(words), errors.EXIT_DAMAGE if done.damaged else EXIT_OK)


def _day(call: Call, settings: Settings, day: str | None) -> dt.date | None:
    """`today`, `tomorrow` or yyyy-mm-dd, as the practice's calendar has it."""
    if day is None:
        return None
    today = dt.datetime.fromtimestamp(call.clock.now(), settings.zone).date()
    try:
        known = {"today": today, "tomorrow": today + dt.timedelta(1)}
        return known[day] if day in known else dt.date.fromisoformat(day)
    except ValueError as error:
        raise UsageError("--day: write today, tomorrow, or a date like 2026-11-30") from error


def _wanted(
    catalog: Catalog, settings: Settings, patients: tuple[int, ...], day: dt.date | None
) -> tuple[dict[int, list[float]], str, list[str]]:
    """Whose documents are asked for, with the times of their appointments; title and facts of the page above them."""
    if day is not None:
        seen_at, starts = catalog.day(day.isoformat())
        if seen_at is None:
            raise UsageError(
                f"the appointments of {day} were never seen: syncd asks for today's and the next seven days'"
            )
        expected: dict[int, list[float]] = {}
        for start, pat_num in starts:
            expected.setdefault(pat_num, []).append(start)
        facts = f"{len(starts):,} appointments, as Open Dental had them {local(report.iso(seen_at), settings.zone)}"
        return expected, f"{day:%A} {day}", [facts]
    for pat_num in patients:
        if not catalog.knows(pat_num):
            raise UsageError(f"patient-{pat_num}: nothing of this patient is known")
    everybody = patients or catalog.everybody()
    title = "" if len(set(patients)) == 1 else f"{len(everybody):,} patients"
    return {pat_num: [] for pat_num in everybody}, title, []


def _would_export(call: Call, catalog: Catalog, wanted: Iterable[int], vanished: bool) -> int:
    rows = [row for number in wanted for row in catalog.find(Filters(patient=number, current=True))]
    rows = [row for row in rows if row["kind"] in exporting.EXPORTED]
    sizes = [row["bytes"] for row in rows if vanished or row["state"] != "vanished"]
    words = f"would copy {len(sizes):,} files, {report.human_bytes(sum(sizes))}"
    return call.answer({"would_copy": len(sizes), "bytes": sum(sizes)}, words)


# --- the archive against the index


@verb("reindex", dry, json_too)
def reindex(call: Call) -> int:
    """Rebuild the index from the archive, without a request."""
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
        archive.take_over(owner_id())
    words = [f"{found.known:,} sidecars known, {found.versions:,} of them ({report.human_bytes(found.bytes)}) read now"]
    words[0] += f"; not syncd's: {len(found.foreign):,}"
    words += [f"  {plain(path)}" for path in found.foreign]
    said = {"versions": found.versions, "bytes": found.bytes, "known": found.known, "foreign": found.foreign}
    return call.answer(said, "\n".join(words))


def _part(text: str) -> Fraction:
    if not re.fullmatch("[1-9][0-9]{0,4}/[1-9][0-9]{0,4}", text) or Fraction(text) > 1:
        raise ValueError('is not a part like "1/30" or "1/1"')
    return Fraction(text)


_subset = written(_part, "PART")


@verb(
    "verify",
    _subset("--subset", default="1/1", show_default=True, help="Checked longest ago first, like 1/30."),
    option("--repair", is_flag=True, help="Set what is damaged aside, and fetch it again."),
    dry,
    json_too,
)
def verify(call: Call, subset: Fraction, repair: bool) -> int:
    """Hash archived files again, and compare.

    With index and sidecars; 4 when something is damaged or missing.
    """
    with index_if_any(call) as index, contextlib.ExitStack() as stack:
        archive = wiring.open_archive(call.settings)
        if index is None or archive.marker_id() != (index.meta("archive_id") or ""):
            raise SiteError("archive_missing")
        total = index.value("SELECT count(*) FROM version WHERE sidecar = 1")
        if call.dry_run:
            count = scrub.share_of(total, subset)
            words = f"would verify {count:,} of {total:,} files" + (" and repair what is damaged" if repair else "")
            return call.answer({"would_verify": count}, words)
        if repair:
            archive = wiring.own_archive(call.settings, index.meta("archive_id") or "")
        lock = Lock(call.settings.state_path, "verify")
        alone = lock.holder() is None  # beside the daemon it only reads, and asks it for the repair
        if alone:
            stack.enter_context(lock)
        tally, now = Tally(), call.clock.now()
        found = list(scrub.verify(index, archive, tally, now, subset, alone))
        outcomes = dict.fromkeys(found, "")
        if alone:
            log = open_logs(call.settings, os.environ, call.verbose)
            scrub.note(index, log, found, now, whole=subset == 1)
            if repair:
                outcomes = {each: mend(index, archive, log, each, now, actor=call.actor) for each in found}
        elif repair:
            wishes.make(index, "repair", scrub.wish_of(found), now, call.actor)
        settle(call, index)
        broken = wiring.open_audit(call.settings).verify(audit_head(index)).problem
    return _verified(call, tally, outcomes, broken, "handed to `syncd run`" if repair and not alone else "")


def _verified(call: Call, tally: Tally, outcomes: dict[Finding, str], broken: Problem | None, handed: str) -> int:
    """What was found, and what became of it; 4 unless everything is whole now."""
    named: dict[str, list[str]] = {code: [each.name for each in outcomes if each.code == code] for code in CODES}
    became = {word: [each.name for each, said in outcomes.items() if said == word] for word in OUTCOMES}
    words = [f"{tally.versions:,} files, {report.human_bytes(tally.bytes)}"]
    words[0] += "".join(f"; {code.replace('_', ' ')}: {len(names):,}" for code, names in named.items() if names)
    words += [f"  {word}: {len(names):,}" for word, names in became.items() if names] + ([handed] if handed else [])
    words += [f"  {plain(each.path)}" for each in outcomes if each.code in HARMLESS]
    said = {"versions": tally.versions, "bytes": tally.bytes, **named, "outcomes": became}
    wrong = [(each, said) for each, said in outcomes.items() if each.code not in HARMLESS and said != "healed"]
    complain(errors.EXIT_DAMAGE, *(f"{each.name}: {said or each.code}: {_advice(each, said)}" for each, said in wrong))
    complain(errors.EXIT_DAMAGE, *([str(broken)] if broken else []))
    code = errors.EXIT_DAMAGE if wrong or broken else EXIT_OK
    return call.answer(said | {"audit_log": str(broken) if broken else None}, "\n".join(words), code)


def _advice(found: Finding, outcome: str) -> str:
    return CODES[cast("Code", outcome or found.code)][1]


# --- who did what


@verb(
    "audit",
    option("--patient", type=NUMBER, help="What concerns this PatNum, and what may."),
    option("--since", metavar="TIME", help="Done then or later."),
    option("--verify", "check", is_flag=True, help="Check that the log is whole; 4 when it is not."),
    json_too,
)
def audit(call: Call, patient: int | None, since: str | None, check: bool) -> int:
    """Who did what, and whether that log is whole.

    Everything that was stored, marked, decided, looked at or copied out.
    """
    if check:
        if patient is not None or since is not None:
            raise UsageError("--verify checks the whole log: give it alone")
        return _verify_audit(call)
    settings = call.settings
    after = moment(since, settings, "--since") or 0.0
    become_owner(settings.state_path)
    for facts in wiring.open_audit(settings).facts():
        if dt.datetime.fromisoformat(facts["at"]).timestamp() >= after and _concerns(facts, patient):
            emit_json(facts) if call.as_json else emit(_line(facts, settings.zone))
    return EXIT_OK


def _concerns(facts: Row, patient: int | None) -> bool:
    """Whether this is about the patient, or showed so many that it may have been."""
    if patient is None or facts.get("pat_num") == patient or patient in (facts.get("pat_nums") or ()):
        return True
    items = [facts.get("item"), facts.get("became"), *(facts.get("items") or ())]
    if any(str(item).startswith(f"{patient}/") for item in items) or facts.get("scope") == f"patient-{patient}":
        return True
    return facts["verb"] == "find" and facts.get("pat_num") is None and facts.get("pat_nums") is None


def _line(facts: Row, zone: dt.tzinfo) -> str:
    known = {"n", "at", "actor", "verb", "entry", "prev", "hash"}
    told = "  ".join(f"{name}: {plain(_words(value))}" for name, value in facts.items() if name not in known)
    return f"{facts['n']:>8}  {local(facts['at'], zone)}  {facts['actor']:<8}  {facts['verb']:<11}  {told}".rstrip()


def _words(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _verify_audit(call: Call) -> int:
    """Check the chain, against the last line that the index knows of."""
    with index_if_any(call) as index:
        known = audit_head(index) if index else None
        found = wiring.open_audit(call.settings).verify(known)
    problems = [] if found.problem is None else [str(found.problem)]
    words = f"{found.lines:,} lines are whole" + (f", up to {found.head.hash[:12]}" if found.lines else "")
    code = complain(errors.EXIT_DAMAGE, *problems) if problems else EXIT_OK
    return call.answer({"lines": found.lines, "head": found.head.hash, "problems": problems}, words, code)
