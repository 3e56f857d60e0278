"""The commands: each asks the floors below, and prints. call.py turns their errors into exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click import option

from syncd import __version__, backfill, errors, reading, report, wiring, wishes
from syncd.backfill import Look, Stop, Wanted
from syncd.call import (
    DURATION,
    NUMBER,
    Call,
    cli,
    complain,
    dry,
    index_if_any,
    json_too,
    locked,
    patients_option,
    signals,
    verb,
)
from syncd.catalog import Catalog, Filters, Row
from syncd.config import Settings
from syncd.daemon import Daemon
from syncd.errors import EXIT_OK, LockHeldError, SiteError, UsageError
from syncd.index import Index
from syncd.logs import Log
from syncd.mirror import Scope
from syncd.model import Item
from syncd.naming import parse_guard_id
from syncd.screen import Meter, emit
from syncd.service import Credentials, Lock, SystemClock, Systemd, become_owner, read_credentials

if TYPE_CHECKING:
    from syncd.demo.practice import Practice

__all__ = ["cli", "main", "reading"]  # importing `reading` told the group of its verbs
WISH_WAIT: Final = 10.0  # seconds a verb waits for the lock's holder
POLL: Final = 0.2
Held = tuple[Log, Index]  # what the holder of the lock works with
CAUSES: Final = {  # of what a guard holds, by its scope
    "patient": "a merge of two patients, a wrong patient deleted, or a list that Open Dental cut short",
    "all": "a restored backup, a changed folder for images, or a clean-up in the office",
    "database": "the key or the server changed, or a backup was restored: numbers may mean other people",
}


# --- the mirror


@contextlib.contextmanager
def _lanes(settings: Settings, credentials: Credentials, held: Held, scope: Scope) -> Iterator[wiring.Lanes]:
    (log, index), api, drop = held, wiring.open_api(settings, credentials), wiring.open_drop(settings, credentials)
    lanes = wiring.build(settings, SystemClock(), log, scope, api, drop, index.sibling())
    try:
        yield lanes
    finally:
        lanes.close()


@verb("run", dry)
def run(call: Call) -> int:
    """The daemon, in the foreground. SIGTERM ends it with 0."""
    settings, stop = call.settings, Stop()
    credentials = read_credentials(settings)
    if call.dry_run:
        emit(f"{settings.name}: configuration and credentials can be read; the daemon would start")
        return EXIT_OK
    become_owner(settings.state_path)
    with signals(stop), locked(call, "run") as held, _lanes(settings, credentials, held, Scope()) as lanes:
        Daemon(lanes, stop, Systemd(os.environ), partial(_describe, settings, held[1])).run()
    return EXIT_OK if stop.terminated else errors.EXIT_INTERRUPTED


def _describe(settings: Settings, index: Index) -> tuple[report.Report, str]:
    said, _ = _status(settings, index)
    return said, report.text(said, settings.zone)


@verb(
    "backfill",
    patients_option(help="Only this PatNum; may be repeated."),
    option("--max-requests", type=NUMBER, help="Stop after so many requests."),
    option("--max-duration", type=DURATION, help="Stop after that time, like 10h."),
    option("--no-progress", is_flag=True, help="No bar, no lines."),
    dry,
    json_too,
)
def mirror(
    call: Call, patients: tuple[int, ...], max_requests: int | None, max_duration: float | None, no_progress: bool
) -> int:
    """Mirror until nothing is owed that could be fetched within the hour, then end. Resumable at any point."""
    if call.dry_run:
        return _plan(call)
    settings, stop, now = call.settings, Stop(), call.clock.now()
    credentials = read_credentials(settings)
    become_owner(settings.state_path)
    until = now + max_duration if max_duration else None
    wanted, quiet = Wanted(now, frozenset(patients) or None, max_requests, until), no_progress or call.verbose < 0
    with signals(stop), contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(locked(call, "backfill"))
        except LockHeldError:
            holder = Lock(settings.state_path).holder()
            if holder is None or holder.verb != "run":
                raise
            call.say(f"`syncd run` (pid {holder.pid}) does the work; Ctrl-C ends this view only")
            return _follow(call, wanted, stop, quiet)
        return _backfill(call, credentials, held, wanted, stop, quiet)


def _backfill(call: Call, credentials: Credentials, held: Held, wanted: Wanted, stop: Stop, quiet: bool) -> int:
    """The lock is ours: do the work here."""
    (log, index), settings, began_at = held, call.settings, call.clock.now()
    since = backfill.since(index, began_at, whole=wanted.patients is None)
    wanted = Wanted(since, wanted.patients, wanted.max_requests, wanted.until)
    scope = Scope(backfill=True, since=since, patients=wanted.patients, max_requests=wanted.max_requests)
    log.info("started", verb="backfill")
    with _lanes(settings, credentials, held, scope) as lanes, Meter(quiet, _free_bytes(settings)) as meter:
        code = backfill.run(lanes, wanted, stop, lambda progress: meter.show(progress, call.clock.now()))
        requests = lanes.api_lane.requests
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

    with contextlib.closing(wiring.open_index(settings)) as index, Meter(quiet, _free_bytes(settings)) as meter:
        wishes.make(index, "backfill", sorted(wanted.patients) if wanted.patients else None, clock.now())
        code = backfill.watch(Look(settings, index, clock, wanted, requests), stop, ended, show)
    if ended.is_set() and not stop.event.is_set():
        call.say("`syncd run` ended; the work goes on when it starts again")
        code = errors.EXIT_LIMIT
    with contextlib.closing(wiring.open_index(settings)) as index:
        return _summary(call, index, wanted, wanted.since, requests(), code)


def _free_bytes(settings: Settings) -> int | None:
    with contextlib.suppress(SiteError):
        return wiring.open_archive(settings).free_bytes()
    return None


def _summary(call: Call, index: Index, wanted: Wanted, began_at: float, requests: int, code: int) -> int:
    """One line (or object) about what a backfill did; the exit code."""
    facts = Catalog(index, call.settings.name, call.settings.sync.kinds).status_facts(call.clock.now())
    sql = "SELECT count(*) AS files, coalesce(sum(bytes), 0) AS bytes FROM version WHERE sidecar = 1 AND"
    said: Row = index.rows(f"{sql} archived_at >= ?", began_at)[0]
    seconds, trouble = round(call.clock.now() - began_at, 1), report.worst(facts.troubles)
    known = {row["pat_num"] for row in index.rows("SELECT pat_num FROM patient WHERE left_at IS NULL")}
    unknown = sorted((wanted.patients or frozenset()) - known)
    failing = sum(facts.failing.values())
    words = f"{said['files']:,} files, {report.human_bytes(said['bytes'])}, {requests:,} requests"
    words += f" in {report.human_duration(seconds)}; owed: {facts.owed:,}, failing: {failing:,}"
    words += "".join(f", {name}: {count:,}" for name, count in sorted(facts.failing.items()))
    words += "; not in the roster: " + ", ".join(f"patient-{number}" for number in unknown) if unknown else ""
    said |= {"requests": requests, "duration_seconds": seconds, "owed": facts.owed, "failing": failing}
    said |= {"failing_by_class": dict(facts.failing), "held": facts.held, "unknown_patients": unknown}
    said |= {"reason": trouble.reason if trouble else None, "exit_code": code}
    if trouble and code in (*backfill.AT_ONCE, errors.EXIT_REMOTE):
        complain(code, trouble.detail)
    with contextlib.suppress(BrokenPipeError):  # nobody reads: the exit code is still told
        call.answer(said, words)
    return code


# --- how it is


def _status(settings: Settings, index: Index | None, days: float = 7) -> tuple[report.Report, report.StatusFacts]:
    """The status of this moment, with or without an index; without a lock."""
    clock, facts = SystemClock(), report.StatusFacts()
    now = clock.now()
    if index is not None:
        facts = Catalog(index, settings.name, settings.sync.kinds).status_facts(now, settings.api.page_limit, days)
    holder, counts = Lock(settings.state_path).holder(), wiring.open_pace(settings, clock).counts()
    around = report.Surroundings(
        practice=settings.name,
        version=__version__,
        budget=report.Budget.of(settings, now),
        holder=f"{holder.verb}, pid {holder.pid}" if holder else None,
        requests_today=counts.requests_today,
        throttled_today=counts.throttled_today,
        free_bytes=_free_bytes(settings),
        reserve_bytes=settings.archive.reserve,
    )
    said = report.status(facts, around, now)
    if index is None:
        said["message"] = "syncd never ran here: start the service, or call `syncd backfill`"
    return said, facts


@verb(
    "status",
    option("--failing", is_flag=True, help="Name the items that cannot be fetched, and why."),
    option("--since", type=DURATION, default="7d", show_default=True, help="How far back incidents are shown."),
    option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C."),
    json_too,
)
def status(call: Call, failing: bool, since: float, watch: bool) -> int:
    """State, who must act, freshness, what is owed, failing, budget, space, incidents."""
    while True:
        with index_if_any(call) as index:
            said, _ = _status(call.settings, index, since / report.DAY)
            rows = list(Catalog(index).failing()) if failing and index else []
        if watch and sys.stdout.isatty():
            click.clear()
        words = report.text(said, call.settings.zone)
        if failing:
            words += "\n" + call.table(("full_id", "failure", "failures", "since_at", "next_try_at"), rows)
        call.answer(said | ({"failing_items": rows} if failing else {}), words)
        if not watch:
            return EXIT_OK
        time.sleep(2.0)


@verb("health", option("--max-age", type=DURATION, help="Of the oldest list; default: 1.3 x the floor."), json_too)
def health(call: Call, max_age: float | None) -> int:
    """One line; 0 when healthy, 8 when not."""
    with index_if_any(call) as index:
        said, facts = _status(call.settings, index)
    healthy, line = report.health(said, facts, max_age, said["floor_seconds"], call.clock.now())
    limit = max_age or report.HEALTH_FACTOR * said["floor_seconds"]
    call.answer({"healthy": healthy, "health": line, "max_age_seconds": limit}, line)
    return EXIT_OK if healthy else errors.EXIT_UNHEALTHY


def _plan(call: Call) -> int:
    with index_if_any(call) as index:
        _, facts = _status(call.settings, index)
    planned = report.plan(facts, report.Budget.of(call.settings, call.clock.now()))
    return call.answer(planned, report.plan_text(planned))


@verb("plan", json_too)
def plan(call: Call) -> int:
    """What a sweep and what is owed cost, and how long they take at each tier. Sends no request."""
    return _plan(call)


# --- wishes


def _wish(call: Call, wish: str, argument_of: Callable[[Index], object]) -> int:
    """Have the lock's holder do it, or do it here where nobody holds the lock."""
    with index_if_any(call) as index:
        if index is None:
            raise UsageError("nothing is mirrored yet: there is no index")
        argument = argument_of(index)
        if call.dry_run:
            said = f"would {wish} {argument or 'everything that fails or waits'}"
        else:
            said = _granted_here(call, wish, argument) or _granted_there(call, index, wish, argument)
    call.answer({"verb": wish, "outcome": said}, said)
    return errors.EXIT_USAGE if said.startswith("refused") else EXIT_OK


def _granted_here(call: Call, wish: str, argument: object) -> str | None:
    try:
        with locked(call, wish) as (log, index):
            return wishes.grant(index, log, wish, argument, call.clock.now())
    except LockHeldError:
        return None


def _granted_there(call: Call, index: Index, wish: str, argument: object) -> str:
    number, deadline = wishes.make(index, wish, argument, call.clock.now()), call.clock.steady() + WISH_WAIT
    while call.clock.steady() < deadline:
        said = wishes.outcome(index, number)
        if said is not None:
            return said
        time.sleep(POLL)
    return "written down: whoever holds the lock takes it up once the request in hand is answered"


@verb("retry", click.argument("ids", nargs=-1, metavar="[ID]..."), dry, json_too)
def retry(call: Call, ids: tuple[str, ...]) -> int:
    """Try again now: these items, or all that fail or wait."""

    def items(index: Index) -> object:
        found = [Catalog(index).resolve(each) for each in ids]
        return [(item.pat_num, item.kind, item.num) for item in found]

    return _wish(call, "retry", items)


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


@verb("held", json_too)
def held(call: Call) -> int:
    """What the guards hold, with numbers and usual causes; then `approve ID` or `reject ID`."""
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


# --- the demonstration


@verb("demo", option("--patients", type=click.IntRange(4, 500), default=25, show_default=True, help="How many."))
def demo(call: Call, patients: int) -> int:
    """A simulated practice: mirror it, change it, watch the changes arrive."""
    try:
        from syncd.demo.build import Past  # noqa: PLC0415 - its libraries are an extra
        from syncd.demo.simulation import Simulation  # noqa: PLC0415 - its libraries are an extra
    except ImportError as error:
        raise UsageError("the demo needs werkzeug and pillow: install syncd[demo], or call `make demo`") from error
    stop, past = Stop(), Past(documents=7.0, sheets=2.0, sigma=0.7)
    simulation = Simulation.start(patients, seed=5, interval=0.05, past=past)
    with simulation, signals(stop), tempfile.TemporaryDirectory(prefix="syncd-") as folder:
        file = simulation.write_config(Path(folder) / "demo", sync={"vanish_after": "1s"})
        simulated = Call(file=file, verbose=-1)
        simulated.settings.archive.path.mkdir(mode=0o700)
        credentials = read_credentials(simulated.settings)
        emit(f"A simulated practice with {patients} invented patients; one request every 0.05 s.\n\nbackfill:")
        with locked(simulated, "demo") as held:
            code = _backfill(simulated, credentials, held, Wanted(0.0), stop, call.verbose < 0)
            if stop.event.is_set():
                return code
            rows = Catalog(held[1]).find(Filters(kind="document", current=True))
            changes = _changes(simulation.practice, [row for row in rows if row["state"] == "archived"])
            with _lanes(simulated.settings, credentials, held, Scope()) as lanes:
                return _live(simulated, lanes, changes, stop)


Change = tuple[str, Item, str]  # in words, the item to look for, and what its newest row then says


def _changes(practice: Practice, archived: list[Row]) -> Iterator[Change]:
    """Change the practice, one step at each `next`. `archived`: rows of documents, as `find` has them."""
    edited, deleted, moved = (archived[len(archived) * part // 4] for part in (1, 2, 3))
    here, there = edited["pat_num"], deleted["pat_num"]
    yield "a new X-ray", Item(here, "document", practice.add_document(here, "jpg", description="Bitewing")), "archived"
    practice.replace_bytes(edited["num"])
    yield "an image was edited", Item(here, "document", edited["num"]), "version 2"
    practice.delete_document(deleted["num"])
    yield "a document was deleted", Item(there, "document", deleted["num"]), "vanished"
    new_number = practice.move_document(moved["num"], there)
    yield "a scan was moved to another patient", Item(there, "document", new_number), "archived"
    yield "a form was filled in", Item(here, "sheet", practice.add_sheet(here)), "archived"
    yield "a mount with four images", Item(there, "mount", practice.add_mount(there, 4)), "archived"


def _live(call: Call, lanes: wiring.Lanes, changes: Iterable[Change], stop: Stop) -> int:
    """Let the daemon run while the practice changes; 0 when every change arrived and nothing is owed."""
    ended, describe = Stop(), partial(_describe, call.settings)
    daemon = Daemon(lanes, ended, Systemd({}), partial(describe, lanes.index))
    thread = threading.Thread(target=daemon.run)
    with contextlib.closing(lanes.index.sibling()) as index:
        thread.start()
        try:
            emit("\nthe practice goes on working; each change, and when it was in the archive:")
            arrived = _arrivals(call, Catalog(index), changes, stop)
            said, text = describe(index)
            emit("\n" + text)
        finally:
            ended()
            thread.join()
    if stop.event.is_set():
        return errors.EXIT_TERMINATED if stop.terminated else errors.EXIT_INTERRUPTED
    return EXIT_OK if arrived and not said["owed"] else errors.EXIT_OWED


def _arrivals(call: Call, catalog: Catalog, changes: Iterable[Change], stop: Stop) -> bool:
    """Tell each change when it is in the archive; False when one was not after a minute."""
    now = call.clock.steady
    pending, deadline = [(now(), *change) for change in changes], now() + 60.0
    while pending and now() < deadline and not stop.event.wait(POLL):
        for change in list(pending):
            since, words, item, becomes = change
            rows = catalog.show(item)
            if any(becomes in (row["state"], f"version {row['version']}") for row in rows):
                pending.remove(change)
                emit(f"  {now() - since:5.1f} s  {words}: {item.full_id} {becomes}")
    return not pending


def main() -> None:
    """The entry point."""
    cli(prog_name="syncd")


if __name__ == "__main__":
    main()
