"""Protocols for what tests must fake, and nothing else: the API, the drop, the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Protocol

from syncd.errors import SyncdError
from syncd.model import Appointment, FieldValue, Listed, Page, Patient, PlacedName, Pulled, PullJob, Seen, Uploaded

Finished = Callable[[Sequence[tuple[PullJob, Pulled | SyncdError]]], Sequence[PullJob]]


class Clock(Protocol):
    """Time, as everything but the doors' own deadlines sees it."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        ...

    def steady(self) -> float:
        """Seconds that never jump, shared by all processes since boot (CLOCK_BOOTTIME)."""
        ...


class Api(Protocol):
    """Open Dental's reading and placing methods; one call is one HTTP request, never retried inside.

    Every method raises SiteError, TransientError (UnansweredError when the request may have been worked on) or
    NoSuchMethodError; listings also ListingError and OversizeError; placements also ItemError.
    """

    def when_sending(self, hold: Callable[[], None], sent: Callable[[], None]) -> None:
        """From now on call `hold` when a request's connection stands, and `sent` as soon as the request is out."""
        ...

    def list_documents(self, pat_num: int, offset: int, limit: int) -> Page:
        """GET /documents: documents outside mounts, and mounts. A 404 "Patient not found" is ItemError not_found."""
        ...

    def list_sheets(self, pat_num: int, offset: int, limit: int) -> Page:
        """GET /sheets."""
        ...

    def document(self, doc_num: int) -> Listed | None:
        """GET /documents/N (24.2.32). None: 404 "Document not found". The item carries the PatNum the office says."""
        ...

    def patients(self, offset: int, limit: int, since: str | None = None) -> tuple[Patient, ...]:
        """GET /patients/Simple, everybody but the status Deleted, by PatNum; those stamped `since` or later."""
        ...

    def appointments(self, first: str, last: str, offset: int) -> tuple[Appointment, ...]:
        """GET /appointments of these days, `2026-03-10`, both included."""
        ...

    def short_query(self, sql: str) -> Sequence[Mapping[str, object]]:
        """PUT /queries/ShortQuery (21.2). NoSuchMethodError: refused; the API as a whole may be well."""
        ...

    def place_document(self, doc_num: int, staging: str) -> None:
        """POST /documents/DownloadSftp for one document. Returning means 201: the office finished writing."""
        ...

    def place_mount(self, mount_num: int, staging: str) -> None:
        """POST /documents/DownloadSftp for a mount's composite."""
        ...

    def place_mount_images(self, mount_num: int, staging: str) -> tuple[PlacedName, ...]:
        """POST /documents/DownloadMount. Empty: the answer said that there is none."""
        ...

    def place_sheet(self, sheet_num: int, staging: str) -> None:
        """POST /sheets/DownloadSftp: a PDF, rendered anew at each call."""
        ...

    def place_thumbnails(self, pat_num: int, staging: str) -> tuple[PlacedName, ...]:
        """POST /documents/Thumbnails, all images of a patient. Empty: the answer said that there is none."""
        ...

    def upload_document(self, pat_num: int, staging: str, fields: Mapping[str, FieldValue]) -> Uploaded:
        """POST /documents/UploadSftp: the office makes a document of a file on the drop. Only `put-back` calls it."""
        ...

    def permissions(self) -> frozenset[str]:
        """GET /securityperms (22.2): the names of the permissions this key has."""
        ...

    def program_version(self) -> str:
        """GET /preferences?PrefName=ProgramVersion: the cheapest proof of life."""
        ...


class Drop(Protocol):
    """The SFTP site, read by syncd, and written by `put-back` alone. Paths are bytes, relative to the login folder.

    Raises SiteError (refused, host key) or TransientError (unreachable) for the site as a whole; what concerns one
    path comes back in its place in the answer.
    """

    def pull(self, jobs: Sequence[PullJob], finished: Finished | None = None) -> list[Pulled | SyncdError]:
        """One outcome a job, in order. A refused or failed job leaves no local file behind; none is synced to disk.

        `finished` is given each job with its outcome once, as they end, while others are still on their way: a file
        of gigabytes holds up no small one. Its local file is the caller's from then on. It may call the other methods;
        it is called every second or so, then perhaps with no job, and the jobs that it returns are taken along.
        """
        ...

    def look(self, paths: Sequence[bytes]) -> list[Seen | None]:
        """Attributes (lstat) of each path; None where there is nothing."""
        ...

    def names(self, folder: bytes) -> list[bytes] | None:
        """All names in a folder, as bytes, without `.` and `..`; None where there is no such folder."""
        ...

    def put(self, path: bytes, source: BinaryIO) -> None:
        """Write an open file to a name that does not exist yet. ItemError: the site did not take it, whole."""
        ...

    def remove(self, paths: Sequence[bytes]) -> list[bool]:
        """True: the file is not there any more (or never was). A path ending in `/` is an empty folder to remove."""
        ...

    def close(self) -> None:
        """Drop the connection; the next call makes a new one."""
        ...

    @property
    def received(self) -> int:
        """Bytes that came from the site so far: whoever watches a long pull sees it move. Safe from any thread."""
        ...
