"""The verbs that bring something back, or away for good: restore, put-back, destroy."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import click
from click import option

from syncd import destroy, errors, report, retrieve, upload, wiring
from syncd.backfill import Stop
from syncd.call import (
    FOLDER,
    NUMBER,
    POLL,
    WISH_WAIT,
    Call,
    Outside,
    complain,
    dry,
    granted,
    index_of,
    json_too,
    lanes_of,
    locked,
    moment,
    outside_of,
    record,
    settle,
    shelf_of,
    signals,
    verb,
    waited,
)
from syncd.catalog import Catalog, Row
from syncd.errors import EXIT_OK, ItemError, LockHeldError, UsageError
from syncd.index import Index
from syncd.mirror import Scope
from syncd.model import Item
from syncd.screen import plain

UPLOAD_WAIT: Final = 120.0  # seconds
UPLOAD_CODES: Final = {"done": EXIT_OK, "refused": errors.EXIT_USAGE, "lost": errors.EXIT_OWED}
NOT_YET: Final = "ordered; it is carried out as soon as the archive can be written"


@verb(
    "restore",
    click.argument("wanted", metavar="[ID]", required=False),
    option("--patient", type=NUMBER, help="PatNum: all that this patient had then; with --as-of."),
    option("--to", type=FOLDER, required=True, help="Folder for the copy."),
    option("--as-of", metavar="TIME", help="What syncd had by then."),
    option("--version", "number", type=NUMBER, help="That version, as `show` numbers them."),
    dry,
    json_too,
)
def restore(
    call: Call, wanted: str | None, patient: int | None, to: Path, as_of: str | None, number: int | None
) -> int:
    """A verified copy of one item, or a patient's past state.

    Of an item: the newest version, what syncd had by then, or any.
    """
    call.copying = True
    with shelf_of(call) as (catalog, archive, settings):
        at = moment(as_of, settings, "--as-of")
        if patient is not None:
            if wanted or number or at is None:
                raise UsageError("--patient goes with --as-of, and with no ID; what is there now: `syncd export`")
            if call.dry_run:
                return _would_restore(call, catalog, patient, at)
            record(call, catalog.index, "restore", pat_num=patient, filters=["as_of"])
            return _told(call, retrieve.restore_patient(catalog, archive, patient, to, at, settings.zone))
        if wanted is None or (number and as_of):
            raise UsageError("give an ID with one of --as-of and --version at most, or --patient with --as-of")
        item = catalog.resolve(wanted)
        if call.dry_run:
            found = retrieve.wanted(catalog, item, at, number).version
            return call.answer({"would_copy": found}, f"would copy version {found} of {item.full_id}")
        filters = ["as_of"] if as_of else ["version"] if number else None
        record(call, catalog.index, "restore", item=item.full_id, filters=filters)
        done = retrieve.restore(catalog, archive, item, to, at, settings.zone, number=number)
    if done.path is None:
        return complain(errors.EXIT_DAMAGE, f"{item.full_id}: the archived file of version {done.version} is damaged")
    return call.answer({"full_id": item.full_id, "version": done.version, "path": str(done.path)}, plain(done.path))


def _would_restore(call: Call, catalog: Catalog, pat_num: int, at: float) -> int:
    versions = catalog.state_of(pat_num, at)
    size = sum(version.bytes for version in versions)
    said = {"would_copy": len(versions), "bytes": size, "items": [version.item.full_id for version in versions]}
    return call.answer(said, f"would copy {len(versions):,} files, {report.human_bytes(size)}")


def _told(call: Call, done: retrieve.PastState) -> int:
    words = f"{done.files:,} files, {report.human_bytes(done.bytes)}; destroyed since: {len(done.destroyed):,}"
    said = {"files": done.files, "bytes": done.bytes, "damaged": done.damaged, "destroyed": done.destroyed}
    complain(errors.EXIT_DAMAGE, *(f"{name}: the archived file is damaged" for name in done.damaged))
    return call.answer(said, "\n  ".join([words, *done.destroyed]), errors.EXIT_DAMAGE if done.damaged else EXIT_OK)


# --- away for good


@verb(
    "destroy",
    click.argument("wanted", metavar="ID"),
    option("--ticket", required=True, help="Who ordered it, or where that is written; no name of a patient."),
    option("--yes", is_flag=True, help="It cannot be undone."),
    dry,
    json_too,
)
def destroy_item(call: Call, wanted: str, ticket: str, yes: bool) -> int:
    """Destroy a wrong person's scan, or what a court orders: all versions and texts; a tombstone stays."""
    with index_of(call) as index:
        item = Catalog(index).resolve(wanted)
        told = destroy.doomed(index, item) | {"ticket": ticket}
        if call.dry_run:
            return call.answer(told, _doomed(told))
        if not yes:
            raise UsageError("destroy cannot be undone: see what goes with -n, then say --yes")
        if not destroy.is_open(index, item):
            outcome = granted(call, index, "destroy", [item.pat_num, item.kind, item.num, ticket])
            if outcome.startswith("refused"):
                return complain(errors.EXIT_USAGE, outcome)
        done = _carry_out(call, index, item)
    words = f"{item.full_id} is destroyed, {told['files']:,} files" if done else f"{item.full_id}: {NOT_YET}"
    words += "".join(f"\nthe same bytes are still archived as {name}" for name in told["equal"])
    said, code = told | {"full_id": item.full_id, "done": done}, EXIT_OK if done else errors.EXIT_OWED
    return call.answer(said, f"{words}\n{destroy.BEYOND}", code)


def _doomed(told: Row) -> str:
    words = [f"would destroy {', '.join(told['items'])}: {told['files']:,} files, {report.human_bytes(told['bytes'])}"]
    words += [f"  {plain(path)}" for path in told["paths"]]
    words += ["their sidecars, what was set aside of them, their texts in the index, and all copies of the index"]
    words += [f"the same bytes stay archived as {name}" for name in told["equal"]]
    return "\n".join([*words, destroy.BEYOND])


def _carry_out(call: Call, index: Index, item: Item) -> bool:
    """Here where nobody holds the lock; else its holder does it. Whether nothing of the item is left."""
    with contextlib.suppress(LockHeldError), locked(call, "destroy") as (log, own_index):
        archive = wiring.own_archive(call.settings, own_index.meta("archive_id") or "")  # a tombstone makes room
        with contextlib.suppress(ItemError):  # what the disk does not let go is told by its order, which stays open
            destroy.finish(own_index, archive, log, call.settings, call.clock.now())
        settle(call, own_index)
    return waited(call, WISH_WAIT, lambda: None if destroy.is_open(index, item) else "done") is not None


# --- back into Open Dental


@verb(
    "put-back",
    click.argument("wanted", metavar="ID"),
    option("--yes", is_flag=True, help="It writes into Open Dental."),
    dry,
    json_too,
)
def put_back(call: Call, wanted: str, yes: bool) -> int:
    """Put an archived document back into Open Dental, which must not have it any more; needs [api] allow_upload."""
    goes = yes and not call.dry_run and call.settings.api.allow_upload
    outside = outside_of(call) if goes else None  # now: the owner of the state may not read what it takes
    with shelf_of(call) as (catalog, archive, settings):
        item = catalog.resolve(wanted)
        planned = upload.plan(catalog, archive, item)
        if call.dry_run:
            said = {"full_id": item.full_id, "allowed": settings.api.allow_upload, "never_sent": upload.NEVER_SENT}
            call.answer(planned | said, _planned(item, planned))
        if not settings.api.allow_upload:
            raise UsageError(f"nothing is put back: {upload.NOT_ALLOWED}")
        if call.dry_run:
            return EXIT_OK
        if outside is None:
            raise UsageError("put-back writes into Open Dental: see what with -n, then say --yes")
        granted(call, catalog.index, "put-back", [item.pat_num, item.kind, item.num, planned["seq"]])
        try:
            _send(call, outside, item)
        except LockHeldError:
            waited(call, UPLOAD_WAIT, lambda: upload.ended(catalog.index, item))
        row = upload.latest(catalog.index, item)
    if row is None or row["state"] not in upload.ENDED:
        words = f"not yet: `syncd history {item.id}` tells what becomes of it"
        return call.answer({"full_id": item.full_id, "state": row and row["state"]}, words, errors.EXIT_OWED)
    became = row["became"] and Item(item.pat_num, item.kind, row["became"]).full_id
    told = {"full_id": item.full_id, "state": row["state"], "became": became, "outcome": row["outcome"]}
    return call.answer(told, f"{item.full_id}: {row['outcome']}", UPLOAD_CODES[row["state"]])


def _planned(item: Item, planned: Row) -> str:
    """Exactly what would be sent, and what not."""
    words = [f"would send {item.full_id} version {planned['version']}, {report.human_bytes(planned['bytes'])}, with:"]
    words += [f"  {name}: {plain(value)}" for name, value in planned["fields"].items()]
    if planned["unknown"]:
        words.append(f"not known, so Open Dental's default stands: {', '.join(planned['unknown'])}")
    return "\n".join([*words, "cannot be put back:", *(f"  {each}" for each in upload.NEVER_SENT)])


def _send(call: Call, outside: Outside, item: Item) -> None:
    """Where nobody holds the lock: both lanes take turns here until the put-back has ended and left the drop clean."""
    stop, until = Stop(), call.clock.steady() + UPLOAD_WAIT
    with locked(call, "put-back") as held, signals(stop):
        scope = Scope(backfill=True, since=call.clock.now(), patients=frozenset({item.pat_num}))
        with lanes_of(call, outside, held, scope) as lanes:
            while not stop.asked and call.clock.steady() < until and not upload.ended(held[1], item, clean=True):
                now = call.clock.now()
                wake = min(lanes.api_lane.turn(now), lanes.pull_lane.turn(now))
                stop.wait(max(0.0, min(wake - call.clock.now(), POLL)))
        settle(call, held[1])
