"""The errors syncd knows, each with a code, who must act, and what happens next.

Doors translate foreign errors into these, always `raise ... from`. They are caught in two places only: per item in the
story, per turn in the shell. A message never carries a name, a description, a remote path or a secret.
"""

from __future__ import annotations

import errno
from typing import Final, Literal

Who = Literal["nobody", "practice_it", "integrator", "open_dental"]

# Exit codes (design.md section 3); `run` ends only for LOCKED, CONFIG or INTERNAL.
EXIT_OK: Final = 0
EXIT_INTERNAL: Final = 1
EXIT_USAGE: Final = 2
EXIT_OWED: Final = 3
EXIT_DAMAGE: Final = 4
EXIT_REMOTE: Final = 5
EXIT_HELD: Final = 6
EXIT_DOCTOR: Final = 7
EXIT_UNHEALTHY: Final = 8
EXIT_LIMIT: Final = 9
EXIT_LOCKED: Final = 11
EXIT_REFUSED: Final = 12
EXIT_ARCHIVE: Final = 13
EXIT_CONFIG: Final = 78
EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143

_IT: Final = "practice_it"
_FULL: Final = frozenset({"ENOSPC", "EDQUOT", "SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"})  # the last: of index.db-shm
# reason -> (who must act, "what is wrong: what to do", exit code while it lasts): the documented list of `status`, the
# most urgent first. Of several troubles `status` names the first. NAME stands for the practice.
REASONS: Final[dict[str, tuple[Who, str, int]]] = {
    "not_responding": (
        _IT,
        "syncd holds the lock but has shown no sign of life for 15 minutes: restart the service",
        1,
    ),
    "index_lost": (
        _IT,
        "index.db is new or another one and does not know this archive: stop the service, `syncd reindex`, start it",
        13,
    ),
    "archive_missing": (
        _IT,
        "the archive is not mounted, or has no marker, or is another archive: mount the right disk",
        13,
    ),
    "archive_taken": (
        _IT,
        "another installation has taken over this archive: stop one of the two; `syncd reindex` here takes it back",
        13,
    ),
    "archive_read_only": (_IT, "the archive cannot be written: check the file system and its permissions", 13),
    "archive_full": (_IT, "free space is below [archive] reserve: make room or enlarge the disk", 13),
    "state_full": (_IT, "the disk of the state folder is full: make room there, or enlarge it", 13),
    "disk_error": (_IT, "a local disk reports errors: check the disk of the state or archive folder", 13),
    "resources_exhausted": (
        _IT,
        "this machine is out of open files or memory: end other programs, or raise the limits of the service",
        5,
    ),
    "lane_stuck": (
        _IT,
        "a part of syncd hangs, or fails again and again: restart the service, and report it with syncd.log",
        1,
    ),
    "clock_stuck": (
        _IT,
        "this machine's clock stands still: check its time synchronisation, then restart the service",
        1,
    ),
    "other_database": (
        _IT,
        "the key leads to another practice's database, where numbers mean other people: see `syncd held`",
        6,
    ),
    "database_went_back": (
        _IT,
        "the office's database lacks rows it had, nothing is marked vanished: was a backup restored? See `syncd held`",
        6,
    ),
    "key_refused": (
        "integrator",
        "Open Dental refuses the API keys: put the right ones in with `sudo syncd setup NAME --only keys`",
        12,
    ),
    "key_cannot_download": (
        "integrator",
        "this key can list, not download: have Open Dental give it the permission AllOthers",
        12,
    ),
    "tls_failed": (
        _IT,
        "the API's certificate is not valid here: check the clock and any firewall that re-signs TLS",
        5,
    ),
    "name_unknown": (_IT, "nobody here knows the address of Open Dental's API by its name: check this server's DNS", 5),
    "api_unreachable": (_IT, "Open Dental's API cannot be reached: check this server's network and firewall", 5),
    "econnector_down": (_IT, "the office's eConnector is not running: start the eConnector service in the office", 5),
    "econnector_twice": (_IT, "two eConnectors use the same registration key: stop one of them", 5),
    "api_error": (
        "open_dental",
        "Open Dental's API answers with server errors: syncd tries again by itself; where it lasts, call Open Dental",
        5,
    ),
    "bad_answers": (
        "open_dental",
        "the API's answers cannot be trusted, none was recorded: see that no proxy answers, then call Open Dental",
        5,
    ),
    "host_key_changed": (
        _IT,
        "the SFTP site has another host key: confirm it with its owner, then `sudo syncd setup NAME --only host-key`",
        12,
    ),
    "drop_refused": (
        _IT,
        "the SFTP site refuses syncd's login: put the right one in with `sudo syncd setup NAME --only sftp`",
        12,
    ),
    "drop_unreachable": (_IT, "the SFTP site cannot be reached from here: check [drop] host and port", 5),
    "placements_refused": (
        _IT,
        "Open Dental refuses to place files: check that the office reaches [drop] address with its user and password",
        5,
    ),
    "throttled_long": (
        "integrator",
        "Open Dental answered nothing but 429 for an hour: find what else uses this key, or ask Open Dental",
        5,
    ),
    "throttled": ("nobody", "Open Dental asked for fewer requests: syncd waits as told", 5),
    "archive_damaged": (
        _IT,
        "archived files are not what they were: `syncd verify` names them, `syncd verify --repair` mends what it can",
        4,
    ),
    "disappearances_held": (
        _IT,
        "many documents or patients left their lists at once: see `syncd held`, then approve or reject",
        6,
    ),
    "roster_unread": (
        "open_dental",
        "the list of patients could not be read for a day, new ones are missed: see syncd.log, ask Open Dental",
        5,
    ),
    "lists_unreadable": (
        "open_dental",
        "lists of some patients could not be read for a day: see listing_refused in syncd.log, ask Open Dental",
        3,
    ),
    "sweep_overdue": (
        _IT,
        "some lists were not read for longer than promised: see the incidents; where none is read now, restart syncd",
        3,
    ),
    "items_failing": (_IT, "some documents cannot be fetched: see `syncd status --failing`", 3),
    "log_unwritable": (_IT, "the log folder cannot be written, syncing goes on: make room, or check its disk", 3),
    "hook_failing": (_IT, "the program of [hook] fails, it is called again, the mirror goes on: see what it says", 3),
    "backfill_unfinished": (
        _IT,
        "a backfill ended before all was done: see `syncd -p NAME status`, then start it again",
        3,
    ),
    "catching_up": ("nobody", "documents are owed and being fetched", 3),
    "paused": (_IT, "paused by hand until the time shown: `syncd resume` ends it", 9),
    "config_invalid": (
        _IT,
        "the configuration is invalid, no syncd can start: see `syncd -p NAME doctor --offline`, mend what it names",
        78,
    ),
    "not_running": (_IT, "no syncd holds the lock: start the service, `sudo systemctl start syncd@NAME`", 0),
    "ok": ("nobody", "everything that is listed is archived", 0),
}

# Failure classes of one item. They name what happened to it, never its content.
FailureClass = Literal[
    "changed_while_read",
    "destroyed",  # by order, while its file was under way
    "io_error",
    "list_unreadable",  # its patient's list, which is read before a file is placed
    "missing_on_drop",  # answered, but no file appeared, or of a mount whose images are known none was named
    "mount_too_large",  # DownloadMount went unanswered again and again
    "not_a_file",  # a folder, link or device where the file should be
    "not_found",
    "refused",  # 400: the office names no reason that concerns the whole site
    "timeout_60s",
    "too_large",
    "unreadable_on_drop",
    "web_page",  # an HTML or JSON body under an image, PDF or office extension
    "wrong_location",  # the answer names another file than was asked for
    "zero_bytes",
]


def state_reason(error: BaseException) -> str:
    """Why the state folder cannot be read or written: SQLite's own word, where it has one, or the system's."""
    name = getattr(error, "sqlite_errorname", errno.errorcode.get(getattr(error, "errno", None) or 0))
    return "state_full" if name in _FULL else "disk_error"


def worded(reason: str, detail: str = "") -> str:
    """What is wrong, in detail, and what to do: `the API cannot be reached (HTTP 502): check the network`.

    The first colon parts the one from the other, also for those who read it: a detail has none.
    """
    what, colon, to_do = REASONS[reason][1].partition(": ")
    return f"{what} ({detail.replace(': ', ', ')}){colon}{to_do}" if detail else REASONS[reason][1]


class SyncdError(Exception):
    """Base of all errors of syncd. `exit_code` is what a one-shot verb ends with."""

    exit_code: int = EXIT_INTERNAL


class UsageError(SyncdError):
    """The call is wrong, or names an ID that does not exist."""

    exit_code = EXIT_USAGE


class ConfigError(SyncdError):
    """The configuration is invalid: every problem at once. The operator acts, before any start."""

    exit_code = EXIT_CONFIG

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class LockHeldError(SyncdError):
    """Another syncd process holds this practice's lock."""

    exit_code = EXIT_LOCKED


class SiteError(SyncdError):
    """All work of one lane stops until somebody acts. `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        who, _, exit_code = REASONS[reason]
        super().__init__(worded(reason, detail))
        self.reason = reason
        self.who: Who = who
        self.exit_code = exit_code


class TransientError(SyncdError):
    """Nobody acts; the same request is worth another try later. `reason` is a key of REASONS.

    `retry_after`: seconds the other side asked for, or None.
    """

    exit_code = EXIT_REMOTE

    def __init__(self, reason: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(worded(reason, detail))
        self.reason = reason
        self.retry_after = retry_after


class UnansweredError(TransientError):
    """The request may have been worked on, now or later: 504, a cut, a deadline. Only a placement must care."""


class OversizeError(SyncdError):
    """An answer is over the size cap: the same listing is asked again with a smaller Limit."""


class ListingError(SyncdError):
    """A page cannot be trusted (shape, patient, overlap): the listing starts over, three times."""


class ItemError(SyncdError):
    """This one item is skipped, recorded and tried again with growing distance, never "never"."""

    def __init__(self, failure: FailureClass, detail: str = "") -> None:
        super().__init__(f"{failure}: {detail}" if detail else failure)
        self.failure: FailureClass = failure


class UnreadableError(ItemError):
    """The disk does not give one file or folder: a bad sector, a wrong mode. All others are read and written."""

    def __init__(self, code: str) -> None:
        super().__init__("io_error", code)


class NoSuchMethodError(SyncdError):
    """The office's version of Open Dental is too old for this API method (or the method is not offered)."""
