"""Door to Open Dental's API: one call is one HTTP request, never retried, never redirected, bounded in time and bytes.

Answers are judged by status and words, because the office and the vendor's gateways put the same trouble under
several statuses (facts.md, "Access, modes, errors"). Rows are parsed strictly: what is not proven to be an answer to
the question asked is refused as a whole. No error quotes an answer; only statuses and fixed phrases are told.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import requests
import urllib3
from requests.adapters import BaseAdapter

from syncd.diff import revision
from syncd.errors import (
    ConfigError,
    ItemError,
    ListingError,
    NoSuchMethodError,
    OversizeError,
    SiteError,
    SyncdError,
    TransientError,
    UnansweredError,
)
from syncd.model import (
    LARGEST_KEY,
    Appointment,
    FieldValue,
    Item,
    Kind,
    Listed,
    Page,
    Patient,
    PlacedName,
    Upload,
    Uploaded,
)
from syncd.pacing import parse_retry_after
from syncd.wire import Wire

CONNECT_TIMEOUT: Final = 10.0  # seconds
CHUNK: Final = 64 * 1024
RAW_MARK, URL_MARK = "_rawBase64_", "_download_"
_DIGITS: Final = re.compile("0|[1-9][0-9]{0,18}")
_UNFIT: Final = re.compile("[\0\ud800-\udfff]")

# The fields of the two list methods (api-documents, api-sheets): whole numbers, texts.
DOCUMENT_NUMBERS = ("DocNum", "MountNum", "PatNum", "DocCategory", "ProvNum")
DOCUMENT_TEXTS = (
    *("filePath", "Description", "Note", "DateCreated", "docCategory", "ToothNumbers", "PrintHeading"),
    *("DateTStamp", "serverDateTime", "FileName", "ImgType"),
)
SHEET_NUMBERS = ("SheetNum", "PatNum", "SheetDefNum", "DocNum", "ClinicNum")
SHEET_TEXTS = ("SheetType", "DateTimeSheet", "InternalNote", "Description", "IsWebForm", "DateTSheetEdited")

Json = Any  # whatever json.loads returns; every use checks its shape first
Row = Mapping[str, Json]
Params = Mapping[str, str | int | None]
Fields = dict[str, FieldValue]


@dataclass(frozen=True, slots=True)
class PlacementSite:
    """The drop as the office reaches it. `address` is `host[:port]`, without scheme; both secrets stay out of repr."""

    address: str
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole HTTP answer, whatever its status."""

    status: int
    body: bytes
    location: str | None
    retry_after: str | None

    @property
    def words(self) -> str:
        """The explanation in lower case, from a JSON string or bare text; empty for a web page."""
        text = self.body[:2000].decode("utf-8", "replace").strip().strip('"').lower()
        return "" if text.startswith("<") else text

    def json(self) -> Json:
        """The body as JSON. ListingError: cut, not UTF-8, not JSON, or nested beyond reason."""
        try:
            return json.loads(self.body.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ListingError("the answer is not whole, valid JSON") from error
        except MemoryError as error:
            raise OversizeError("an answer does not fit into memory") from error


class OpenDentalApi:
    """Open Dental's API over HTTP (implements `ports.Api`). For one thread: it keeps one request in flight.

    `deadline`: seconds for one whole exchange, headers and body, however slowly they drip. `size_cap`: bytes of one
    decoded body. `adapter`: another transport than the network's: its placements that fail are all Unanswered.
    """

    def __init__(
        self,
        url: str,
        developer_key: str,
        customer_key: str,
        placement: PlacementSite,
        ca_bundle: Path | None = None,
        adapter: BaseAdapter | None = None,
        deadline: float = 75.0,
        size_cap: int = 64 * 1024 * 1024,
    ) -> None:
        self._placement = placement
        self._deadline, self._cap, self._foreign = deadline, size_cap, adapter is not None
        # Not a `requests.Session`: no redirect is followed, no cookie kept, nothing comes from the environment.
        self._wire = Wire()
        self._adapter: BaseAdapter = adapter or self._wire
        self._verify = str(ca_bundle) if ca_bundle else True
        headers = {
            "User-Agent": "syncd",
            "Accept-Encoding": "gzip, deflate",
            "Authorization": f"ODFHIR {developer_key}/{customer_key}",
            "Content-Type": "application/json",  # the vendor wants it on GET, too
            "Connection": "close",  # an idle connection is cut by the gateway just when it is used again
        }
        try:
            self._blank = requests.Request("GET", url, headers).prepare()
        except requests.RequestException as error:
            raise ConfigError(("[api] url: no server can have this address",)) from error
        self._url = str(self._blank.url).rstrip("/")

    def when_sending(self, hold: Callable[[], None], sent: Callable[[], None]) -> None:
        """From now on call `hold` when a request's connection stands, and `sent` as soon as the request is out."""
        self._wire.hold, self._wire.sent = hold, sent

    def list_documents(self, pat_num: int, offset: int, limit: int) -> Page:
        """GET /documents for one patient: documents outside mounts, and mounts; at most `limit` rows from `offset`."""
        rows = self._rows("/documents", {"PatNum": pat_num, "Offset": offset, "Limit": limit})
        return Page(tuple(_listed_document(row, pat_num) for row in rows))

    def list_sheets(self, pat_num: int, offset: int, limit: int) -> Page:
        """GET /sheets for one patient, deleted ones excepted."""
        rows = self._rows("/sheets", {"PatNum": pat_num, "Offset": offset, "Limit": limit})
        return Page(tuple(_listed_sheet(row, pat_num) for row in rows))

    def document(self, doc_num: int) -> Listed | None:
        """GET /documents/N, also for images in mounts. None only where the office says "Document not found"."""
        answer = self._exchange("GET", f"/documents/{doc_num}")
        if answer.status == HTTPStatus.NOT_FOUND and re.match(r"document (was )?not found", answer.words):
            return None
        row = _accepted(answer, of_item=True).json()
        if not isinstance(row, dict) or _key(row, "DocNum") != doc_num:
            raise ListingError("the answer is not the document asked for")
        return _listed_document({"MountNum": 0, **row, "DocNum": doc_num}, _key(row, "PatNum"))

    def patients(self, offset: int, limit: int, since: str | None = None) -> tuple[Patient, ...]:
        """GET /patients/Simple: everybody but the status Deleted. All other personal fields end here.

        `since`: only those whose DateTStamp, local time of the office, is not before.
        """
        params: Params = {"Offset": offset, "Limit": limit, **({"DateTStamp": since} if since else {})}
        return tuple(_patient(row) for row in self._rows("/patients/Simple", params))

    def appointments(self, first: str, last: str, offset: int) -> tuple[Appointment, ...]:
        """GET /appointments from one day to another, both included, as `2026-03-10`; pages of 100."""
        rows = self._rows("/appointments", {"dateStart": first, "dateEnd": last, "Offset": offset})
        names = ("AptDateTime", "AptStatus")
        return tuple(Appointment(_key(row, "PatNum"), *(_text(row, name) or "" for name in names)) for row in rows)

    def short_query(self, sql: str) -> list[Row]:
        """PUT /queries/ShortQuery (21.2, permission Queries), read-only; at most 100 rows.

        Neither NoSuchMethodError (400, 401 or 403: refused) nor ListingError (5xx) says anything of the API as a whole.
        """
        answer = self._exchange("PUT", "/queries/ShortQuery", body={"SqlCommand": sql})
        told = f"HTTP {answer.status}"
        if answer.status in (400, 401, 403) and "econnector" not in answer.words:
            raise NoSuchMethodError(told)
        if answer.status // 100 == 5:  # noqa: PLR2004 - a class of statuses
            raise ListingError(told)
        return _objects(_accepted(answer))

    def permissions(self) -> frozenset[str]:
        """GET /securityperms: the names of the permissions this key has."""
        rows = self._rows("/securityperms", {})
        return frozenset(_text(row, "Permission") or "" for row in rows if _text(row, "HasPermission") == "true")

    def program_version(self) -> str:
        """GET /preferences?PrefName=ProgramVersion, for example `25.4.48.0`."""
        for row in self._rows("/preferences", {"PrefName": "ProgramVersion"}):
            if _text(row, "PrefName") == "ProgramVersion" and (version := _text(row, "ValueString")):
                return version
        raise ListingError("the answer does not tell the program's version")

    def place_document(self, doc_num: int, staging: str) -> None:
        """Have one document written to `staging` on the drop. Returning means 201: the office finished writing."""
        self._place_file("/documents/DownloadSftp", {"DocNum": doc_num}, staging)

    def place_mount(self, mount_num: int, staging: str) -> None:
        """Have a mount's composite written: a rendering, not its originals."""
        self._place_file("/documents/DownloadSftp", {"MountNum": mount_num}, staging)

    def place_sheet(self, sheet_num: int, staging: str) -> None:
        """Have a sheet's PDF written, rendered anew at each call."""
        self._place_file("/sheets/DownloadSftp", {"SheetNum": sheet_num}, staging)

    def place_mount_images(self, mount_num: int, staging: str) -> tuple[PlacedName, ...]:
        """Have all images of a mount written into the folder `staging`. Empty: there is none."""
        return self._place_files("/documents/DownloadMount", {"MountNum": mount_num}, staging)

    def place_thumbnails(self, pat_num: int, staging: str) -> tuple[PlacedName, ...]:
        """Have thumbnails of all images of a patient written into the folder `staging`. Empty: there is none."""
        return self._place_files("/documents/Thumbnails", {"PatNum": pat_num}, staging)

    def upload_document(self, pat_num: int, staging: str, fields: Mapping[str, FieldValue]) -> Uploaded:
        """Have the office make a document of `staging` on the drop. ItemError: refused; UnansweredError: who knows."""
        answer = _created(self._place("/documents/UploadSftp", {"PatNum": pat_num, **fields}, staging))
        try:
            row = answer.json()
            lacking = [name for name in fields if name in row and _plain(row[name]) != _plain(fields[name])]
            return Uploaded(_key(row, "DocNum"), tuple(lacking))
        except (ListingError, AttributeError, TypeError) as error:
            raise UnansweredError("api_error", "an upload's answer cannot be read") from error

    def _place_file(self, path: str, what: Params, staging: str) -> None:
        """One file; the answer's `location` must not name another."""
        location = _created(self._place(path, what, staging)).location
        if location and not staging.endswith("/") and _last_part(location) != _last_part(staging):
            raise ItemError("wrong_location")

    def _place_files(self, path: str, what: Params, staging: str) -> tuple[PlacedName, ...]:
        """Many files. "No ..." with 200, or 404 for a patient without documents, is none; else 201 and a list."""
        answer = self._place(path, what, staging)
        none = ("no documents",) if answer.status == HTTPStatus.NOT_FOUND else ("no documents", "no mount images")
        if answer.status in (200, 201, 404) and answer.words.startswith(none):
            return ()
        try:
            rows = _objects(_created(answer))
            return tuple(PlacedName(_key(row, "DocNum"), _text(row, "FileName") or "") for row in rows)
        except ListingError as error:  # files were written, but which is not known
            raise UnansweredError("api_error", "a placement's answer cannot be read") from error

    def _place(self, path: str, what: Params, staging: str) -> _Answer:
        site = self._placement
        address = f"{site.address.rstrip('/')}/{staging}"
        login = {"SftpAddress": address, "SftpUsername": site.username, "SftpPassword": site.password}
        return self._exchange("POST", path, body={**what, **login}, placing=True)

    def _rows(self, path: str, params: Params) -> list[Row]:
        return _objects(_accepted(self._exchange("GET", path, params=params)))

    def _exchange(
        self, verb: str, path: str, params: Params | None = None, body: Params | None = None, *, placing: bool = False
    ) -> _Answer:
        """Send one request and read its whole answer, whatever its status."""
        content = bytearray()
        self._wire.sock, self._wire.end = None, time.monotonic() + self._deadline
        if not self._foreign:
            self._wire.watched(min(1.0, self._deadline / 10))
        try:
            asked = self._blank.copy()
            asked.method, asked.url = verb, f"{self._url}{path}{'?' if params else ''}{urlencode(params or {})}"
            asked.prepare_body(None, None, body)
            limits = (CONNECT_TIMEOUT, self._deadline)
            with self._adapter.send(asked, stream=True, timeout=limits, verify=self._verify, proxies={}) as response:
                for chunk in response.iter_content(CHUNK):
                    content += chunk
                    if len(content) > self._cap:
                        break
            if time.monotonic() >= self._wire.end:
                raise TimeoutError  # what was cut may look like a whole answer
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._lost(error, placing) from error
        except MemoryError as error:
            no_room = "an answer does not fit into memory"
            raise (UnansweredError("api_error", no_room) if placing else OversizeError(no_room)) from error
        finally:
            self._wire.end = float("inf")
            self._wire.close()  # nothing is kept, also where the office does not say that it will close
        if len(content) > self._cap:
            too_large = "an answer is over the size cap"
            raise UnansweredError("api_error", too_large) if placing else OversizeError(too_large)
        headers = response.headers
        return _Answer(response.status_code, bytes(content), headers.get("location"), headers.get("retry-after"))

    def _lost(self, error: Exception, placing: bool) -> SyncdError:
        """What a failed exchange means. Before the connection stood, nothing can have reached the office."""
        unsent = self._wire.sock is None and not self._foreign
        cut = "EOF" in str(error)  # in the midst of the handshake: the network's fault, not the certificate's
        if unsent and isinstance(error, requests.exceptions.SSLError) and not cut:
            return SiteError("tls_failed")
        if placing and not unsent:
            return UnansweredError("api_unreachable", "the connection was cut, or time ran out, during a placement")
        why = getattr(next(iter(error.args), None), "reason", None)  # as requests wraps it
        unknown = isinstance(why, urllib3.exceptions.NameResolutionError)
        return TransientError("name_unknown" if unknown else "api_unreachable", urlsplit(self._url).hostname or "")


def _created(answer: _Answer) -> _Answer:
    """The answer of a placement, if it is 201: only that proves that its files are finished."""
    if _accepted(answer, placing=True).status != HTTPStatus.CREATED:
        raise UnansweredError("api_error", f"HTTP {answer.status} to a placement")
    return answer


def _accepted(answer: _Answer, placing: bool = False, of_item: bool = False) -> _Answer:
    """The answer, if it is 200 or 201; else the error that its status and words mean.

    400 carries the eConnector's trouble, wrong versions and the office's network; 401 bad keys and lacking
    permissions alike (API Implementation, "Returned Status Codes"). `of_item`, as all that is `placing`: it was asked
    about one item, whose own trouble is any other 4xx; only a 404 without words may come from a gateway.
    """
    status, words, told = answer.status, answer.words, f"HTTP {answer.status}"
    if status in (200, 201):
        return answer
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise TransientError("throttled", told, parse_retry_after(answer.retry_after, time.time()))
    if status in (401, 403):
        denied = placing and re.search("permission|not have", words)
        raise SiteError("key_cannot_download" if denied else "key_refused", told)
    if "econnector" in words:
        twice = re.search(r"\b(two|another|multiple|same|more than one)\b", words)
        raise SiteError("econnector_twice" if twice else "econnector_down", told)
    of_item = of_item or placing
    no_method = re.search(r"is not a valid (method|resource)|\bversion\b", words)
    if (status == HTTPStatus.GONE and not of_item) or (status in (400, 404, 410) and no_method):
        raise NoSuchMethodError(told)
    not_found = re.search(r"\b(patient|document|mount|sheet)(num)?\b.*\bnot found|^no \w+ ", words)
    if status == HTTPStatus.NOT_FOUND and not_found:
        raise ItemError("not_found", told)
    late = status == HTTPStatus.REQUEST_TIMEOUT or ("sftp" not in words and re.search(r"timed?[ -]?out", words))
    gateway = status == HTTPStatus.NOT_FOUND and not words
    if of_item and status // 100 == 4 and not (late or gateway):  # noqa: PLR2004 - a class of statuses
        raise ItemError("refused", told)
    if placing and not gateway:
        raise UnansweredError("api_error", told)
    raise TransientError("api_error", told)


def _objects(answer: _Answer) -> list[Row]:
    """The body as a list of objects."""
    rows = answer.json()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ListingError("the answer is not a list of rows")
    return rows


def _number(row: Row, name: str) -> int | None:
    """A whole number >= 0, as a number or in canonical digits; None where null, blank or lacking."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if type(value) is not int or not 0 <= value <= LARGEST_KEY:
        raise ListingError(f"{name} is not a whole number")
    return value


def _key(row: Row, name: str) -> int:
    """A primary key: like `_number`, but present and above 0."""
    value = _number(row, name)
    if not value:
        raise ListingError(f"{name} is missing")
    return value


def _text(row: Row, name: str) -> str | None:
    """A text that any file can hold: NUL and lone surrogates become U+FFFD. None where null or lacking."""
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ListingError(f"{name} is not a text")
    return _UNFIT.sub("\ufffd", value) if _UNFIT.search(value) else value


def _plain(value: object) -> str:
    """A field as both sides may write it: numbers and truth as strings, teeth as a list or as ranges."""
    spans = [part.partition("-") for part in str(value).lower().split(",")]
    if not all(part.isdigit() for first, dash, last in spans for part in (first, *([last] if dash else []))):
        return str(value).lower()
    return ",".join(str(n) for first, _, last in spans for n in range(int(first), int(last or first) + 1))


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _fields(row: Row, numbers: tuple[str, ...], texts: tuple[str, ...], required: str, pat_num: int) -> Fields:
    """Every known field of a row of this patient; unknown ones are dropped."""
    if any(name not in row for name in ("PatNum", *required.split())):
        raise ListingError("a row lacks a required field")
    if _key(row, "PatNum") != pat_num:
        raise ListingError("a row for another patient")
    return {name: _number(row, name) for name in numbers} | {name: _text(row, name) for name in texts}


def _listed(kind: Kind, num: int, fields: Fields, stamp: str, created: str, upload: Upload | None = None) -> Listed:
    def text(name: str) -> str:
        return str(fields.get(name) or "")

    return Listed(
        item=Item(int(text("PatNum")), kind, num),
        revision=revision(kind, text(stamp), fields),
        stamp=text(stamp),
        date_created=text(created),
        server_time=text("serverDateTime"),
        file_name=text("FileName") or _last_part(text("filePath")) or None,
        fields=fields,
        upload=upload,
    )


def _listed_document(row: Row, pat_num: int) -> Listed:
    """A row of the documents list: exactly one of DocNum and MountNum is set. Mounts have no stamp (api-documents)."""
    fields = _fields(row, DOCUMENT_NUMBERS, DOCUMENT_TEXTS, "DocNum MountNum DateCreated", pat_num)
    doc_num, mount_num = int(fields["DocNum"] or 0), int(fields["MountNum"] or 0)
    if bool(doc_num) == bool(mount_num) or (doc_num and "DateTStamp" not in row):
        raise ListingError("a row is not one of document and mount, or lacks a required field")
    fields["Note"], upload = _without_upload(fields["Note"])
    kind: Kind = "document" if doc_num else "mount"
    return _listed(kind, doc_num or mount_num, fields, "DateTStamp", "DateCreated", upload)


def _listed_sheet(row: Row, pat_num: int) -> Listed:
    fields = _fields(row, SHEET_NUMBERS, SHEET_TEXTS, "SheetNum DateTimeSheet DateTSheetEdited", pat_num)
    return _listed("sheet", _key(row, "SheetNum"), fields, "DateTSheetEdited", "DateTimeSheet")


def _without_upload(note: FieldValue) -> tuple[FieldValue, Upload | None]:
    """A note and the upload that was in it: `_rawBase64_:.jpg_<base64>` or `_download_:<url>` (api-documents, POST).

    The upload's extension has no dot. Base64 that cannot be decoded, or no extension: a bad upload.
    """
    if not isinstance(note, str) or not note.startswith((f"{RAW_MARK}:", f"{URL_MARK}:")):
        return note, None
    if note.startswith(URL_MARK):
        return URL_MARK, Upload("", None)
    extension, _, encoded = note[len(RAW_MARK) + 1 :].partition("_")
    try:  # the office's JSON has spaces for line ends
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        content = b""
    sound = content and extension
    return RAW_MARK, Upload(extension.removeprefix("."), content) if sound else Upload("", None, bad=True)


def _patient(row: Row) -> Patient:
    names = ("PatStatus", "DateTStamp", "LName", "FName", "Preferred", "Birthdate")
    status, stamp, last_name, first_name, preferred, birthdate = (_text(row, name) or "" for name in names)
    return Patient(_key(row, "PatNum"), status, stamp, last_name, first_name, preferred, birthdate)
