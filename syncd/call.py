"""What all verbs share: which practice is meant, how an answer is given, how an error becomes an exit code."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import logging
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from traceback import walk_tb
from typing import Any, Final, NoReturn

import click

from syncd import audit, config, copies, errors, published, scrub, wiring, wishes
from syncd.archive import MARKER, Archive
from syncd.backfill import Stop
from syncd.catalog import Catalog
from syncd.config import Settings
from syncd.errors import ConfigError, LockHeldError, SiteError, SyncdError, UsageError
from syncd.index import Index
from syncd.logs import Log, open_logs
from syncd.mirror import Scope
from syncd.ports import Api, Drop
from syncd.screen import emit, emit_json, local, table
from syncd.service import Lock, SystemClock, become_owner, read_credentials
from syncd.sites import settle_audit, tell_audit_head

EXIT_CODES: Final = """\b
Exit codes:
   0  all asked work done, nothing owed
   1  internal error
   2  usage, or unknown ID
   3  finished, but something is owed or failing
   4  verify found damage
   5  remote unavailable, try later
   6  held: somebody must approve
   7  doctor found a failure
   8  health: too old
   9  stopped at a limit, resumable
  11  another process holds the lock (it is named)
  12  credentials refused or not enough
  13  archive not mounted, unknown, read-only or below its reserve
  78  configuration invalid
 130  interrupted by Ctrl-C, state consistent
 143  terminated by SIGTERM, state consistent
"""
BARE: Final = f"""
[practice]
time_zone = "UTC"
[drop]
host = "archive.invalid"
username = "nobody"
host_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{"A" * 43}"
[archive]
path = "/nowhere"
"""
WISH_WAIT: Final = 10.0  # seconds a verb waits for the lock's holder
POLL: Final = 0.2
MOUNT_HANGS_AFTER: Final = 5.0  # seconds
SPACE: Final = "space"
AT_REST: Final = 3600.0  # seconds after its marker was written: sidecars of a batch come after its numbers
Shelf = tuple[Catalog, Archive, Settings]
Outside = tuple[Api, Drop]
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # where no log is open, Python would print its texts


@dataclass
class Call:
    """One call of syncd: which practice it means, and how it wants its answer."""

    practice: str | None = None
    file: Path | None = None
    archive: Path | None = None
    verbose: int = 0
    as_json: bool = False
    dry_run: bool = False
    copying: bool = False  # its copies belong to whoever called, not to the owner of the state
    clock: SystemClock = field(default_factory=SystemClock)
    actor: str = field(default_factory=audit.actor)  # before this process becomes the owner of the state

    @cached_property
    def settings(self) -> Settings:
        """The practice's configuration. Raises ConfigError, UsageError."""
        if self.archive is not None:
            raise UsageError("--archive is for find, show, history, export and restore only")
        return wiring.load(wiring.locate(self.practice, self.file, os.environ), os.environ)

    def say(self, message: str) -> None:
        """One line for people, on stderr; not with -q."""
        if self.verbose >= 0:
            complain(errors.EXIT_OK, message)

    def table(self, columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> str:
        """A table for people; its times (columns that end in `at`) are in the practice's zone."""
        zone = dt.UTC if self.archive else self.settings.zone
        return table(columns, ([local(row[n], zone) if n.endswith("at") else row[n] for n in columns] for row in rows))

    def answer(self, fields: dict[str, Any], words: str, code: int = errors.EXIT_OK) -> int:
        """The data, on stdout, in the form that was asked for; the exit code, which is told also where nobody reads."""
        with contextlib.suppress(*((OSError,) if code else ())):
            emit_json(fields) if self.as_json else emit(words)
        return code


class Verbs(click.Group):
    """The one place where an error becomes a message on stderr and an exit code. No message names a patient."""

    def invoke(self, ctx: click.Context) -> NoReturn:
        """Run the verb; end with the exit code that it returns or that its error carries."""
        try:
            code = super().invoke(ctx) or errors.EXIT_OK
            sys.stdout.flush()
        except click.UsageError as error:
            raise _unquoted(error) from None
        except (click.exceptions.Exit, click.ClickException):
            raise
        except SyncdError as error:
            problems = error.problems if isinstance(error, ConfigError) else (str(error),)
            settings = vars(ctx.obj).get("settings") if ctx.obj else None  # as far as it got
            name = settings.name if settings else "NAME"
            code = complain(error.exit_code, *(each.replace("setup NAME", f"setup {name}") for each in problems))
        except (KeyboardInterrupt, click.Abort):
            code = errors.EXIT_INTERRUPTED
        except BrokenPipeError:
            code = errors.EXIT_OK
        except PermissionError:
            code = complain(
                errors.EXIT_USAGE, "permission denied: call `sudo syncd`, which becomes the practice's user"
            )
        except OSError as error:
            disk_error = SiteError("disk_error", errno.errorcode.get(error.errno or 0, ""))
            code = complain(disk_error.exit_code, str(disk_error))
        except Exception as error:  # noqa: BLE001 - the last catching place: types and places only, never a text
            code = complain(errors.EXIT_INTERNAL, f"internal error: {_place(error)}; please report it")
        ctx.exit(code)


def _unquoted(error: click.UsageError) -> click.UsageError:
    """What click says of a wrong call, without what was typed: that may be a name, and stderr may go to a log."""
    said = re.sub(r"(?<=: )(['\"]).*\1(?= is not )", "this", error.format_message(), flags=re.DOTALL)
    said = re.sub(r"(No such command) '.*'", r"\1", said, flags=re.DOTALL)
    said = re.sub(r"(Got unexpected extra arguments?) \(.*\)", r"\1", said, flags=re.DOTALL)
    return click.UsageError(said, error.ctx)


def complain(code: int, *messages: str) -> int:
    """One line each on stderr; the code."""
    with contextlib.suppress(OSError):
        for message in messages:
            click.echo(f"syncd: {message}", err=True)
    return code


def complain_of_thread(ended: threading.ExceptHookArgs) -> None:
    """For `threading.excepthook`: a library's thread that ended says its type and places, too, and never a text."""
    if ended.exc_value is not None:
        complain(errors.EXIT_INTERNAL, f"a thread ended: {_place(ended.exc_value)}")


def _place(error: BaseException) -> str:
    """An exception's type and the code it came from: no text, no locals, for these may name people."""
    frames = [f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in walk_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' '.join(frames[-4:])}"


# --- options


def asked(name: str, kind: click.ParamType[Any] = click.STRING, **rest: Any) -> Callable[[Any], Any]:
    """An option; `-` as its value asks on the terminal, so that no name need stand in argv."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            value = click.prompt(str(param.name), err=True) if value == "-" else value
        except click.Abort as error:
            if isinstance(error.__context__, EOFError):
                click.echo(err=True)
                raise UsageError(f"{name}: there is no terminal to ask on") from error
            raise
        if value is not None and not value.strip():
            raise click.BadParameter("is empty: leave it out, or say what to look for", ctx, param)
        return None if value is None else kind.convert(value, param, ctx)

    return click.option(name, callback=convert, **rest)


def written(parse: Callable[[str], Any], metavar: str) -> Callable[..., Any]:
    """Options whose values are written as in the configuration: `parse` raises ValueError with what to write."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return partial(click.option, callback=convert, metavar=metavar)


def _switch(*names: str, attribute: str, says: str) -> Callable[[Any], Any]:
    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        setattr(ctx.obj, attribute, value)

    return click.option(*names, is_flag=True, expose_value=False, callback=switch, help=says)


NUMBER: Final = click.IntRange(1, 2**63 - 1)  # a vendor's key, and what the index can hold
FILE: Final = click.Path(dir_okay=False, path_type=Path)
FOLDER: Final = click.Path(file_okay=False, path_type=Path)
duration = written(config.parse_duration, "DURATION")
json_too = _switch("--json", attribute="as_json", says="For programs; with schema_version.")
dry = _switch("-n", "--dry-run", attribute="dry_run", says="Change nothing, say what.")


def _practices(ctx: click.Context, param: click.Parameter, typed: str) -> list[str]:
    """For the shell: the practices of this machine that begin like this."""
    del ctx, param
    return [name for path in wiring.configured() if (name := path.parent.name).startswith(typed)]


@click.group(cls=Verbs, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-p",
    "--practice",
    metavar="NAME",
    shell_complete=_practices,
    help="The practice of /etc/syncd/NAME/config.toml.",
)
@click.option("-c", "--config", "file", type=FILE, help="Another config.toml.")
@click.option("--archive", type=FOLDER, help="Read this bare archive, without configuration.")
@click.option("-v", "--verbose", is_flag=True, help="Say more, on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
@click.pass_context
def cli(
    ctx: click.Context, practice: str | None, file: Path | None, archive: Path | None, verbose: bool, quiet: bool
) -> None:
    """Keep a second, verified copy of a dental practice's documents from Open Dental."""
    if sum(each is not None for each in (practice, file, archive)) > 1:
        raise click.UsageError("give one of -p, -c and --archive")
    if verbose and quiet:
        raise click.UsageError("give one of -v and -q")
    ctx.obj = Call(practice, file, archive, verbose - quiet)


def verb(name: str, *options: Callable[[Any], Any]) -> Callable[[Any], click.Command]:
    """A command of syncd: its first argument is the Call; every verb that prints knows --json."""

    def register(function: Any) -> click.Command:
        for option in reversed(options):
            function = option(function)
        return cli.command(name)(click.pass_obj(function))

    return register


# --- what a verb opens


def moment(text: str | None, settings: Settings, name: str) -> float | None:
    """A TIME of the option `name`, as seconds since the epoch. Raises UsageError."""
    try:
        return None if text is None else config.parse_time(text, settings.zone)
    except ValueError as error:
        raise UsageError(f"{name} {error}") from error


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM are wishes to stop; the second one changes nothing."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, _: stop(terminated=number == signal.SIGTERM)) for n in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


@contextlib.contextmanager
def locked(call: Call, verb: str) -> Iterator[tuple[Log, Index]]:
    """The practice's lock, log and index, as the owner of its state. Raises LockHeldError."""
    settings = call.settings
    become_owner(settings.state_path)
    settings.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with Lock(settings.state_path, verb):
        copies.refuse_torn(settings.state_path / "index.db")
        with contextlib.closing(wiring.open_index(settings)) as index:
            yield open_logs(settings, os.environ, call.verbose), index


def record(call: Call, index: Index, verb: str, **facts: object) -> None:
    """Tell the audit log what somebody does here: ids, counts, and which filters were given, never their text.

    A disk that fails is no reason to refuse what is asked for.
    """
    if call.archive is not None:
        return  # a bare archive, perhaps of another machine: no log goes with it
    try:
        index.record(verb, call.clock.now(), call.actor, None, **facts)
    except SiteError as error:
        call.say(f"this call does not come into the audit log: {error}")
    settle(call, index)


def settle(call: Call, index: Index) -> None:
    """Bring into the audit log what waits for it. A log that cannot be written gets it later; this is said."""
    try:
        settle_audit(index, wiring.open_audit(call.settings), call.clock.now())
    except SiteError as error:
        call.say(f"not in the audit log yet: {error}")


@contextlib.contextmanager
def on_record(call: Call, log: Log, index: Index, verb: str) -> Iterator[None]:
    """The mirror works in here: start and stop stand in the audit log, and its last line then in the journal."""
    try:
        with contextlib.suppress(SiteError):
            index.remember("mirrored_by", verb)  # a service is missed, a backfill ends by itself
        record(call, index, "started", what=verb)
        tell_audit_head(wiring.open_audit(call.settings), log)
        yield
    finally:
        record(call, index, "stopped", what=verb)
        tell_audit_head(wiring.open_audit(call.settings), log)


def outside_of(call: Call) -> Outside:
    """Open Dental and the SFTP site, with the practice's credentials; nothing is sent yet. Raises ConfigError.

    For root before it becomes the owner of the state, who may not read them.
    """
    settings, credentials = call.settings, read_credentials(call.settings)
    return wiring.open_api(settings, credentials), wiring.open_drop(settings, credentials)


def lanes_of(call: Call, outside: Outside, held: tuple[Log, Index], scope: Scope) -> closing[wiring.Lanes]:
    """Both lanes, ready to take turns; the caller holds the lock."""
    log, index = held
    return closing(wiring.build(call.settings, call.clock, log, scope, *outside, index.sibling()))


def granted(call: Call, index: Index, wish: str, argument: object) -> str:
    """Have the lock's holder do it, or do it here where nobody holds the lock; what became of it, in one line."""
    with contextlib.suppress(LockHeldError), locked(call, wish) as (log, own_index):
        said = wishes.grant(own_index, log, wish, argument, call.clock.now(), call.actor)
        settle(call, own_index)
        return said
    number = wishes.make(index, wish, argument, call.clock.now(), call.actor)
    answer = waited(call, WISH_WAIT, lambda: wishes.outcome(index, number))
    return answer or "written down: whoever holds the lock takes it up once the request in hand is answered"


def waited(call: Call, seconds: float, look: Callable[[], str | None]) -> str | None:
    """What a look tells, as soon as it tells anything; None after so many seconds."""
    deadline = call.clock.steady() + seconds
    while (said := look()) is None and call.clock.steady() < deadline:
        time.sleep(POLL)
    return said


def free_bytes(settings: Settings) -> int | None:
    """None where the archive cannot tell, or its mount hangs: whoever asks how things stand gets an answer."""
    found: list[int] = []

    def ask() -> None:
        with contextlib.suppress(SiteError):
            found.append(wiring.open_archive(settings).free_bytes())

    if SPACE not in {thread.name for thread in threading.enumerate()}:  # one that hangs is enough
        asking = threading.Thread(target=ask, name=SPACE, daemon=True)
        asking.start()
        asking.join(MOUNT_HANGS_AFTER)
    return next(iter(found), None)


@contextlib.contextmanager
def index_if_any(call: Call) -> Iterator[Index | None]:
    """The practice's index, or None where there is none yet: a reader makes nothing."""
    become_owner(call.settings.state_path, for_good=not call.copying)
    path = call.settings.state_path / "index.db"
    if not path.exists():
        yield None
        return
    if not os.access(path, os.R_OK | os.W_OK):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise SiteError("disk_error", "the file system of the state folder is read-only")
        raise PermissionError
    if Lock(path.parent).holder() is None:
        copies.refuse_torn(path)
    keep = _not_migrated if call.dry_run else partial(_keep_unless_in_use, path)
    with contextlib.closing(Index(path, keep, looks=call.dry_run)) as index:
        yield index


def _not_migrated(_db: sqlite3.Connection, _number: int) -> None:
    raise UsageError("the index is of an earlier syncd, and -n changes nothing: start the service first")


def _keep_unless_in_use(path: Path, db: sqlite3.Connection, number: int) -> None:
    if Lock(path.parent).holder():
        raise UsageError(
            "the service still runs an earlier version, and this one would change its index: restart it first"
        )
    copies.keep_older(path, db, number)


@contextlib.contextmanager
def index_of(call: Call) -> Iterator[Index]:
    """The practice's index. Raises UsageError where there is none yet."""
    with index_if_any(call) as index:
        if index is None:
            raise UsageError("nothing is mirrored yet: there is no index")
        yield index


@contextlib.contextmanager
def shelf_of(call: Call) -> Iterator[Shelf]:
    """The practice's archive and what is known of it; or a bare one, by an index in the user's cache."""
    if call.archive is not None:
        with _bare(call, call.archive.absolute()) as shelf:
            yield shelf
        return
    with index_of(call) as index:
        settings = call.settings
        yield Catalog(index, settings.name, settings.sync.kinds), wiring.open_archive(settings), settings


@contextlib.contextmanager
def _bare(call: Call, path: Path) -> Iterator[Shelf]:
    """An archive without its configuration: its zone is unknown, so times are UTC.

    Its index is of one moment of it: what vanished or was renamed since, or had not by then, needs another one.
    """
    archive = Archive(path, reserve=0)
    marker = archive.marker_id()
    if marker is None or not re.fullmatch("[0-9a-zA-Z-]{1,64}", marker):
        raise SiteError("archive_missing")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncd" / marker
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings = config.parse(BARE, name="archive", folder=cache, environ={})
    last, told = archive.last_seq(), archive.seen(published.PATH) or [0, 0]
    name = f"index-{last}-{told[1]}.db"
    for old in cache.glob("index*"):
        if not old.name.startswith(name):
            old.unlink(missing_ok=True)
    with contextlib.closing(Index(cache / name)) as index:
        if last == 0 or index.meta("adopted") is None:
            call.say("the archive is read into an index in your cache; this takes a while, once for each state of it")
            scrub.adopt_all(index, archive, settings, call.clock.now())
            index.run("DELETE FROM audit_entry")  # no log goes with a bare archive
            at_rest = call.clock.now() - (path / MARKER).stat().st_mtime > AT_REST
            index.remember("adopted", "yes" if at_rest else None)
        yield Catalog(index), archive, settings
