"""The commands: each asks the floors below, and prints. call.py turns their errors into exit codes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, cast

import click
from click import option

from syncd import __version__, backfill, config, doctor, errors, faces, reading, recovery, report, setup, wiring, wishes
from syncd.backfill import Look, Stop, Wanted
from syncd.call import (
    NUMBER,
    Call,
    Outside,
    cli,
    complain,
    complain_of_thread,
    dry,
    duration,
    free_bytes,
    granted,
    index_if_any,
    index_of,
    json_too,
    lanes_of,
    locked,
    on_record,
    outside_of,
    signals,
    verb,
)
from syncd.catalog import Catalog, Row
from syncd.config import Settings
from syncd.daemon import Bell, Daemon
from syncd.errors import EXIT_OK, LockHeldError, SiteError, UsageError
from syncd.index import LONGEST_BREAK, Index
from syncd.logs import Log, StatusFiles, open_logs
from syncd.mirror import Scope
from syncd.naming import parse_guard_id, parse_list_id
from syncd.screen import Meter, emit, headed, open_closed_streams, table
from syncd.service import Lock, SystemClock, Systemd

__all__ = ["cli", "doctor", "main", "reading", "recovery", "setup"]  # importing these told the group of their verbs
INDEX_AGAIN: Final = 60  # seconds until another look at an index that cannot be opened
ONE_STATUS: Final = 30.0  # seconds
Held = tuple[Log, Index]  # what the holder of the lock works with
CAUSES: Final = {  # of what a guard holds, by its scope
    "patient": "a merge of two patients, a wrong patient deleted, or a list that Open Dental cut short",
    "all": "a restored backup, a changed folder for images, or a clean-up in the office",
    "roster": "a list of patients that Open Dental cut short, or a clean-up in the office",
    "database": "the key or the server changed, or a backup was restored: numbers may mean other people",
}


# --- the mirror


@verb("run", dry)
def run(call: Call) -> int:
    """The daemon, in the foreground. SIGTERM ends it with 0."""
    settings, stop = call.settings, Stop()
    outside = outside_of(call)
    if call.dry_run:
        emit(f"{settings.name}: configuration and credentials can be read; the daemon would start")
        return EXIT_OK
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals(stop))
        _wait_for_index(call, stop)
        if stop.asked:
            return EXIT_OK if stop.terminated else errors.EXIT_INTERRUPTED
        held = stack.enter_context(locked(call, "run"))
        stack.enter_context(on_record(call, *held, "run"))
        lanes = stack.enter_context(lanes_of(call, outside, held, Scope()))
        Daemon(lanes, stop, Systemd(os.environ), partial(_describe, settings, held[1])).run()
        _tell_end(settings, held[1])
    return EXIT_OK if stop.terminated else errors.EXIT_INTERRUPTED


def _tell_end(settings: Settings, index: Index) -> None:
    """What reads the files of a status, and not the lock, is told, too, that nobody mirrors any more."""
    said, text = _describe(settings, index, ended=True)
    files = StatusFiles.of(settings)
    files.write_json(said)
    files.append_report(text)


def _wait_for_index(call: Call, stop: Stop) -> None:
    """Until the index can be opened, say everywhere what to do, and look again each minute.

    The daemon lives on, as for all trouble outside; it leaves the lock free, so that `syncd reindex` can be called.
    """
    settings, systemd, bell = call.settings, Systemd(os.environ), cast("Bell | None", None)
    files = StatusFiles.of(settings)
    while not stop.asked:
        try:
            with locked(call, "run"):
                return
        except SiteError as error:
            said, _ = _status(settings, None, blind=error)
            files.write_json(said)
            if bell is None:
                log = open_logs(settings, os.environ, call.verbose)
                log.error("state_changed", lane="index", reason=error.reason)  # noqa: TRY400 - our Log has no exception()
                files.append_report(faces.text(said, settings.zone))
                complain(error.exit_code, str(said["message"]))
                bell = Bell(settings, call.clock, log, None)
            bell.look(said)
        systemd.ready()
        systemd.status(faces.line(said, settings.zone))
        for _ in range(INDEX_AGAIN):
            systemd.watchdog()
            if stop.wait(1.0):
                return


def _describe(settings: Settings, index: Index, *, ended: bool = False) -> tuple[report.Report, str]:
    try:
        said, _ = _status(settings, index, ended=ended)
    except SiteError as error:
        said, _ = _status(settings, None, blind=error)
    return said, faces.text(said, settings.zone)


@verb(
    "backfill",
    option("--patient", "patients", type=NUMBER, multiple=True, help="Only this PatNum; may be repeated."),
    option("--max-requests", type=NUMBER, help="Stop after so many requests."),
    duration("--max-duration", help="Stop after that time, like 10h."),
    option("--no-progress", is_flag=True, help="No bar, no lines."),
    dry,
    json_too,
)
def mirror(
    call: Call, patients: tuple[int, ...], max_requests: int | None, max_duration: float | None, no_progress: bool
) -> int:
    """Mirror until nothing is owed any more, then end.

    It also ends where no owed document can be fetched within the hour. Resumable at any point.
    """
    if call.dry_run:
        return _plan(call)
    outside, stop, now = outside_of(call), Stop(), call.clock.now()
    until = now + max_duration if max_duration else None
    wanted, quiet = Wanted(now, frozenset(patients) or None, max_requests, until), no_progress or call.verbose < 0
    with signals(stop), contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(locked(call, "backfill"))
            stack.enter_context(on_record(call, *held, "backfill"))
        except LockHeldError:
            holder = Lock(call.settings.state_path).holder()
            if holder is None or holder.verb != "run":
                raise
            call.say(f"`syncd run` (pid {holder.pid}) does the work; Ctrl-C ends this view only")
            return _follow(call, wanted, stop, quiet)
        return _backfill(call, outside, held, wanted, stop, quiet)


def _backfill(call: Call, outside: Outside, held: Held, wanted: Wanted, stop: Stop, quiet: bool) -> int:
    """The lock is ours: do the work here."""
    (log, index), began_at = held, call.clock.now()
    wanted = replace(wanted, since=backfill.since(index, began_at, whole=wanted.patients is None))
    scope = Scope(backfill=True, since=wanted.since, patients=wanted.patients, max_requests=wanted.max_requests)
    log.info("started", verb="backfill")
    tell = backfill.telling(call.settings, call.clock, partial(_describe, call.settings, index))
    with lanes_of(call, outside, held, scope) as lanes, Meter(quiet, free_bytes(call.settings)) as meter:

        def show(progress: backfill.Progress) -> None:
            meter.show(progress, call.clock.now())
            tell(False)

        code = backfill.run(lanes, wanted, stop, show)
        requests = lanes.api_lane.requests
    tell(True)
    log.info("stopped", verb="backfill", exit_code=code)
    return _summary(call, index, wanted, began_at, requests, code)


def _follow(call: Call, wanted: Wanted, stop: Stop, quiet: bool) -> int:
    """The daemon holds the lock: hand it the work and look on."""
    settings, clock, ended = call.settings, call.clock, threading.Event()
    pace, lock = wiring.open_pace(settings, clock), Lock(settings.state_path)
    before = pace.counts().requests_today

    def requests() -> int:
        return max(0, pace.counts().requests_today - before)

    def show(progress: backfill.Progress) -> None:
        meter.show(progress, clock.now())
        if lock.holder() is None:
            ended.set()

    with contextlib.closing(wiring.open_index(settings)) as index:
        wishes.make(index, "backfill", sorted(wanted.patients) if wanted.patients else None, clock.now(), call.actor)
        with Meter(quiet, free_bytes(settings)) as meter:
            code = backfill.watch(Look(settings, index, clock, wanted, requests), stop, ended, show)
        if ended.is_set() and not stop.asked:
            call.say("`syncd run` ended; the work goes on when it starts again")
            code = errors.EXIT_LIMIT
        return _summary(call, index, wanted, wanted.since, requests(), code)


def _summary(call: Call, index: Index, wanted: Wanted, began_at: float, requests: int, code: int) -> int:
    """One line (or object) about what a backfill did; the exit code."""
    now, (stands, facts) = call.clock.now(), _status(call.settings, index)
    sql = "SELECT count(*) AS files, coalesce(sum(bytes), 0) AS bytes FROM version WHERE sidecar = 1 AND"
    done: Row = index.rows(f"{sql} archived_at >= ?", began_at)[0]
    known = {row["pat_num"] for row in index.rows("SELECT pat_num FROM patient WHERE left_at IS NULL")}
    unknown, trouble = sorted((wanted.patients or frozenset()) - known), report.worst(facts.troubles)
    words = f"{done['files']:,} files, {report.human_bytes(done['bytes'])}, {requests:,} requests"
    words += f" in {report.human_duration(now - began_at)}; owed: {facts.owed:,}, failing: {stands['failing']:,}"
    words += "".join(f", {name}: {count:,}" for name, count in stands["failing_by_class"].items())
    words += "; not in the roster: " + ", ".join(f"patient-{number}" for number in unknown) if unknown else ""
    said = done | {name: stands[name] for name in ("owed", "failing", "failing_by_class", "held")}
    said |= {"requests": requests, "duration_seconds": round(now - began_at, 1), "unknown_patients": unknown}
    said |= {"reason": trouble.reason if trouble else None, "exit_code": code}
    if trouble and code in (*backfill.AT_ONCE, errors.EXIT_REMOTE):
        complain(code, trouble.detail.replace("NAME", call.settings.name))
    with contextlib.suppress(OSError):  # nobody reads, or the disk is full: the work is done all the same
        call.answer(said, words, code)
    return code


# --- how it is


def _status(
    settings: Settings,
    index: Index | None,
    days: float = 7,
    blind: SiteError | None = None,
    *,
    ended: bool = False,
) -> tuple[report.Report, report.StatusFacts]:
    """The status of this moment, with or without an index; without a lock. `blind`: why the index cannot be read.

    `ended`: by whoever still holds the lock, and lets it go now.
    """
    clock, facts = SystemClock(), report.StatusFacts()
    now = clock.now()
    if index is not None:
        catalog = Catalog(index, settings.name, settings.sync.kinds)
        facts = catalog.status_facts(now, settings.api.page_limit, days, settings.zone)
    lock, counts = Lock(settings.state_path), wiring.open_pace(settings, clock).counts()
    holder = None if ended else lock.holder()
    troubles = report.silent_parts(holder.signs if holder else None, clock.steady(), now)
    if holder is None and index is not None and index.meta("mirrored_by") == "run":
        troubles += report.absent(lock.left_at())
    if blind is not None:
        troubles += (report.Trouble("index", blind.reason, str(blind), now, now, backfill.GIVE_UP_AFTER),)
    facts = replace(facts, troubles=facts.troubles + troubles)
    around = report.Surroundings(
        practice=settings.name,
        version=__version__,
        budget=report.Budget.of(settings, now),
        holder=f"{holder.verb}, pid {holder.pid}" if holder else None,
        requests_today=counts.requests_today,
        throttled_today=counts.throttled_today,
        free_bytes=free_bytes(settings),
        reserve_bytes=settings.archive.reserve,
        paused_until=index.paused_until(now) if index is not None else None,
    )
    said = report.status(facts, around, now)
    if index is None and blind is None:
        said["message"] = f"syncd never ran here: `sudo systemctl start syncd@{settings.name}`, or `syncd backfill`"
    return said, facts


def _standing(
    call: Call, days: float = 7, failing: bool = False
) -> tuple[report.Report, report.StatusFacts, list[Row]]:
    """The status, its facts, and the failing items if asked for. An index that cannot be read is a state to tell."""
    try:
        with index_if_any(call) as index:
            rows = list(Catalog(index).failing()) if failing and index else []
            return *_status(call.settings, index, days), rows
    except SiteError as error:
        return *_status(call.settings, None, days, error), []


@verb(
    "status",
    option("--failing", is_flag=True, help="Name the items that cannot be fetched, and why."),
    duration("--since", default="7d", show_default=True, help="How far back incidents are shown."),
    option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C."),
    option("--all", "every", is_flag=True, help="A line for each practice of this machine."),
    json_too,
)
def status(call: Call, failing: bool, since: float, watch: bool, every: bool) -> int:
    """How the mirror is, and who must act.

    State and reason, freshness, what is owed or failing, budget, space, incidents.
    """
    if every:
        return _every_status(call)
    while True:
        said, _, rows = _standing(call, since / report.DAY, failing)
        if watch and sys.stdout.isatty():
            click.clear()
        words = headed(faces.text(said, call.settings.zone), said["state"])
        if failing:
            words += "\n" + call.table(("full_id", "failure", "failures", "since_at", "next_try_at"), rows)
        call.answer(said | ({"failing_items": rows} if failing else {}), words)
        if not watch:
            return EXIT_OK
        time.sleep(2.0)


def _every_status(call: Call) -> int:
    """One call of syncd for each: practices have users of their own, and one that hangs holds up no other."""
    said = [_status_of(path) for path in wiring.configured()]
    columns = ("practice", "state", "reason", "who", "owed", "failing", "oldest list")
    rows = ([*(each.get(name) for name in columns[:-1]), _age(each.get("oldest_list_seconds"))] for each in said)
    return call.answer({"practices": said}, table(columns, rows))


def _status_of(path: Path) -> report.Report:
    # -P: root may call this in a folder of somebody's, and nothing there is to be imported.
    line = [sys.executable, "-P", "-m", "syncd.cli", "-c", str(path), "status", "--json"]
    code = None
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=ONE_STATUS, check=False)  # noqa: S603 - ourselves
        code = done.returncode if os.access(path, os.R_OK) else None  # who may not read it knows nothing of it
        said: report.Report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        invalid = code == errors.EXIT_CONFIG
        return report.nothing_known(path.parent.name, __version__, invalid, SystemClock().now())
    return said


def _age(seconds: float | None) -> str:
    return "" if seconds is None else report.human_duration(seconds)


@verb("health", duration("--max-age", help="Of the oldest list; default: 1.3 x the floor."), json_too)
def health(call: Call, max_age: float | None) -> int:
    """One line; 0 when healthy, 8 when not."""
    said, facts, _ = _standing(call)
    healthy, line = report.health(said, facts, max_age, said["floor_seconds"], call.clock.now())
    limit = max_age or report.HEALTH_FACTOR * said["floor_seconds"]
    code = EXIT_OK if healthy else errors.EXIT_UNHEALTHY
    return call.answer({"healthy": healthy, "health": line, "max_age_seconds": limit}, line, code)


def _plan(call: Call) -> int:
    """Requests and days that are left, at each tier.

    What a sweep and what is owed cost. Sends no request.
    """
    with index_if_any(call) as index:
        _, facts = _status(call.settings, index)
    planned = report.plan(facts, report.Budget.of(call.settings, call.clock.now()))
    return call.answer(planned, faces.plan_text(planned))


verb("plan", json_too)(_plan)


# --- wishes


def _wish(call: Call, wish: str, argument_of: Callable[[Index], object]) -> int:
    """Have the lock's holder do it, or do it here where nobody holds the lock."""
    with index_of(call) as index:
        argument = argument_of(index)
        if call.dry_run:
            named = isinstance(argument, list) and ", ".join(wishes.told(each) for each in argument)
            whom = {"retry": named or "everything that fails or waits", "approve": argument, "reject": argument}
            said = f"would {wish} {whom.get(wish, '')}".rstrip()
        else:
            said = granted(call, index, wish, argument)
    code = errors.EXIT_USAGE if said.startswith("refused") else EXIT_OK
    return call.answer({"verb": wish, "outcome": said}, said, code)


@verb("retry", click.argument("ids", nargs=-1, metavar="[ID]..."), dry, json_too)
def retry(call: Call, ids: tuple[str, ...]) -> int:
    """Try again now: these items, the lists of these patients, or all that fail or wait."""

    def meant(index: Index) -> object:
        found = []
        for each in ids:
            if pat_num := parse_list_id(each):
                if index.patient(pat_num) is None:
                    raise UsageError(f"patient-{pat_num}: the roster has no such patient")
                found.append((pat_num, wishes.LISTS, 0))
            else:
                item = Catalog(index).resolve(each)
                found.append((item.pat_num, item.kind, item.num))
        return found

    return _wish(call, "retry", meant)


def _decision(name: str, says: str) -> None:
    def decide(call: Call, guard: str) -> int:
        number = parse_guard_id(guard)

        def known(index: Index) -> object:
            if index.value("SELECT 1 FROM guard WHERE id = ? AND state = 'held'", number) is None:
                raise UsageError(f"guard-{number} is not held: see `syncd held`")
            return f"guard-{number}"

        return _wish(call, name, known)

    decide.__doc__ = says
    verb(name, click.argument("guard", metavar="ID"), dry, json_too)(decide)


_decision("approve", "Let happen what a guard holds.")
_decision("reject", "Do not let it happen: nothing of it is marked vanished.")


@verb("pause", option("--until", required=True, metavar="TIME", help="At most 7 days from now."), dry, json_too)
def pause(call: Call, until: str) -> int:
    """Send no requests until then.

    It ends by itself, after 7 days at most; health stays 0 and says so.
    """
    now = call.clock.now()
    try:
        at = config.parse_time(until, call.settings.zone)
    except ValueError as error:
        raise UsageError(f"--until {error}") from error
    if not now < at <= now + LONGEST_BREAK:
        raise UsageError("--until: must lie ahead, at most 7 days from now")
    return _wish(call, "pause", lambda _: at)


@verb("resume", dry, json_too)
def resume(call: Call) -> int:
    """End a pause now."""
    return _wish(call, "resume", lambda _: None)


@verb("held", json_too)
def held(call: Call) -> int:
    """What the guards hold, and why that may be.

    Then `approve ID` or `reject ID`.
    """
    with index_if_any(call) as index:
        guards = _status(call.settings, index)[0]["guards"]
    for guard in guards:
        guard["usual_causes"] = CAUSES[guard["scope"].partition("-")[0]]
    columns = ("id", "scope", "items", "of_items", "agreeing_listings", "made_at", "usual_causes")
    return call.answer({"guards": guards}, call.table(columns, guards) if guards else "nothing is held")


@verb("version", json_too)
def version(call: Call) -> int:
    """Print the version."""
    return call.answer({"version": __version__}, f"syncd {__version__}")


@verb("demo", option("--patients", type=click.IntRange(4, 500), default=25, show_default=True, help="How many."))
def demo(call: Call, patients: int) -> int:
    """Mirror a simulated practice, and watch it change."""
    try:
        from syncd.demo.tour import Tour  # noqa: PLC0415 - its libraries are an extra
    except ImportError as error:
        raise UsageError("the demo needs werkzeug and pillow: install syncd[demo], or call `make demo`") from error
    stop = Stop()
    with signals(stop):
        return Tour(call.verbose < 0, stop, emit).show(patients)


def main() -> None:
    """The entry point."""
    open_closed_streams()
    threading.excepthook = complain_of_thread
    gc.freeze()  # what was imported stays, and need not be looked through again and again
    cli(prog_name="syncd")


if __name__ == "__main__":
    main()
