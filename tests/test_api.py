"""The API door, over real HTTP on loopback against an office that may answer anything."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.api import OpenDentalApi, PlacementSite
from syncd.demo.simulation import Simulation
from syncd.drop import SftpDrop
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
from syncd.model import FieldValue, Item, PlacedName, Pulled, PullJob, Upload, Uploaded

EXAMPLE: list[dict[str, Any]] = [
    {
        "DocNum": 34, "MountNum": 0, "filePath": "\\\\server\\OpenDentImages\\S\\SmithJohn15\\exampleimage.jpg",
        "Description": "Scanned image", "PatNum": "101", "Note": "", "DateCreated": "2021-04-08 08:12:21",
        "docCategory": "Lab Cases", "DocCategory": 14, "ToothNumbers": "1,2,3,4,5", "ProvNum": "0",
        "PrintHeading": "false", "DateTStamp": "2021-04-18 11:45:01", "serverDateTime": "2021-05-20 13:30:54",
    },
    {
        "DocNum": 0, "MountNum": 15, "filePath": "", "Description": " 5/11/2021: 4BW", "PatNum": "101",
        "Note": "Bitewings", "DateCreated": "2021-05-11 13:26:39", "docCategory": "Lab Cases", "DocCategory": 14,
        "ToothNumbers": "", "ProvNum": "0", "PrintHeading": "", "DateTStamp": "", "serverDateTime": "",
    },
]  # fmt: skip
SHEET: dict[str, Any] = {
    "SheetNum": 45, "SheetType": "PatientLetter", "PatNum": 101, "DateTimeSheet": "2021-11-16 02:45:38",
    "InternalNote": "", "Description": "Custom Patient Letter", "IsWebForm": "false", "SheetDefNum": 25, "DocNum": 0,
    "ClinicNum": 0, "DateTSheetEdited": "2022-01-23 08:33:02",
}  # fmt: skip
Answer = bytes | Callable[[socket.socket], None]


def http(status: int, body: object = b"", *headers: str, length: int | None = None) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(content) if length is None else length
    lines = [f"HTTP/1.1 {status} X", *headers] + ([f"Content-Length: {size}"] if size >= 0 else [])
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Office:
    """Answers each request with `answer`, byte for byte, then closes; keeps what was asked."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answer: Answer = http(200, [])
        self.requests: list[bytes] = []
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            try:
                self._answer(self._context.wrap_socket(wire, server_side=True) if self._context else wire)
            except OSError:
                continue
            finally:
                wire.close()

    def _answer(self, wire: socket.socket) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += wire.recv(65536)
        head, _, body = asked.partition(b"\r\n\r\n")
        length = next(
            (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0
        )
        while len(body) < length:
            body += wire.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        if callable(self.answer):
            self.answer(wire)
        else:
            wire.sendall(self.answer)
        wire.shutdown(socket.SHUT_WR)
        wire.close()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # also wakes the thread in accept
        self._listener.close()


@pytest.fixture(scope="module")
def shared_office() -> Iterator[Office]:
    office = Office()
    yield office
    office.stop()


@pytest.fixture
def office(shared_office: Office) -> Office:
    shared_office.requests.clear()
    return shared_office


def api_of(office: Office, **changes: Any) -> OpenDentalApi:
    site = PlacementSite("sftp.example.org", "opendental", "s3cret")
    url = changes.pop("url", f"http://127.0.0.1:{office.port}/api/v1")
    return OpenDentalApi(url, "DEV", "CUST", site, **{"deadline": 5.0, **changes})


def test_address_that_no_server_can_have_is_told_before_the_start() -> None:
    with pytest.raises(ConfigError, match="url"):
        OpenDentalApi("http://127.0.0.1:99999/api", "DEV", "CUST", PlacementSite("site", "user", "s3cret"))


def place(api: OpenDentalApi) -> None:
    api.place_document(389, "syncd/a.png")


def listing(api: OpenDentalApi) -> None:
    api.list_documents(101, 0, 100)


# Requests -------------------------------------------------------------------------------------------------------------


def test_request_carries_keys_type_and_close_and_nothing_of_the_environment(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    office.answer = http(200, [])
    api_of(office).list_documents(101, 99, 100)
    (asked,) = office.requests
    assert asked.startswith(b"GET /api/v1/documents?PatNum=101&Offset=99&Limit=100 HTTP/1.1\r\n")
    for header in (b"Authorization: ODFHIR DEV/CUST", b"Content-Type: application/json", b"Connection: close"):
        assert header in asked


@pytest.mark.parametrize(
    ("call", "path", "what"),
    [
        (lambda api: api.place_document(389, "f/a.png"), "/documents/DownloadSftp", {"DocNum": 389}),
        (lambda api: api.place_mount(20, "f/a.png"), "/documents/DownloadSftp", {"MountNum": 20}),
        (lambda api: api.place_sheet(50, "f/a.png"), "/sheets/DownloadSftp", {"SheetNum": 50}),
        (lambda api: api.place_mount_images(15, "f/a.png"), "/documents/DownloadMount", {"MountNum": 15}),
        (lambda api: api.place_thumbnails(15, "f/a.png"), "/documents/Thumbnails", {"PatNum": 15}),
    ],
)
def test_placement_asks_as_the_vendor_says(
    office: Office, call: Callable[[OpenDentalApi], object], path: str, what: dict[str, int]
) -> None:
    office.answer = http(201, [])
    call(api_of(office))
    (asked,) = office.requests
    assert asked.startswith(f"POST /api/v1{path} HTTP/1.1".encode())
    assert json.loads(asked.split(b"\r\n\r\n")[1]) == {
        **what, "SftpAddress": "sftp.example.org/f/a.png", "SftpUsername": "opendental", "SftpPassword": "s3cret",
    }  # fmt: skip


@pytest.mark.parametrize("location", ["", "sftp.example.org/syncd/a.png", "/home/x/syncd/a.png", "\\syncd\\a.png"])
def test_location_of_our_own_name_is_taken_in_any_form(office: Office, location: str) -> None:
    office.answer = http(201, b"", *([f"Location: {location}"] if location else []))
    place(api_of(office))
    assert len(office.requests) == 1


def test_location_of_another_name_is_not_ours(office: Office) -> None:
    office.answer = http(201, b"", "location: sftp.example.org/syncd/other.png")
    with pytest.raises(ItemError) as caught:
        place(api_of(office))
    assert caught.value.failure == "wrong_location"


# Meaning of statuses and words ----------------------------------------------------------------------------------------

MEANINGS: list[tuple[int, object, type[SyncdError], str, type[SyncdError], str]] = [
    # status, body, error of a listing and its reason, error of a placement and its reason
    (400, "The office's eConnector is not running", SiteError, "econnector_down", SiteError, "econnector_down"),
    (400, b"the office's ECONNECTOR is not running.", SiteError, "econnector_down", SiteError, "econnector_down"),
    (
        400,
        "Two eConnectors use the same registration key",
        SiteError,
        "econnector_twice",
        SiteError,
        "econnector_twice",
    ),
    (400, "DownloadSftp is not a valid method.", NoSuchMethodError, "", NoSuchMethodError, ""),
    (404, "foo is not a valid resource.", NoSuchMethodError, "", NoSuchMethodError, ""),
    (400, "The version of the office is not high enough", NoSuchMethodError, "", NoSuchMethodError, ""),
    (410, b"", NoSuchMethodError, "", ItemError, "refused"),
    (410, "DownloadSftp is not a valid method.", NoSuchMethodError, "", NoSuchMethodError, ""),
    (401, "Invalid permissions", SiteError, "key_refused", SiteError, "key_cannot_download"),
    (401, "Invalid credentials", SiteError, "key_refused", SiteError, "key_refused"),
    (403, b"", SiteError, "key_refused", SiteError, "key_refused"),
    (404, "Patient not found", ItemError, "not_found", ItemError, "not_found"),
    (404, "Document not found", ItemError, "not_found", ItemError, "not_found"),
    (404, "Mount not found.", ItemError, "not_found", ItemError, "not_found"),
    (404, b"<html>not found: patient</html>", TransientError, "api_error", TransientError, "api_error"),
    (400, "SFTP connection timed out", TransientError, "api_error", ItemError, "refused"),
    (400, "Invalid file extension", TransientError, "api_error", ItemError, "refused"),
    (400, "Request timeout", TransientError, "api_error", UnansweredError, "api_error"),
    (404, b"", TransientError, "api_error", TransientError, "api_error"),
    (404, "It is elsewhere", TransientError, "api_error", ItemError, "refused"),
    (409, b"", TransientError, "api_error", ItemError, "refused"),
    (422, "The image is locked", TransientError, "api_error", ItemError, "refused"),
    (408, b"", TransientError, "api_error", UnansweredError, "api_error"),
    (429, "Too many requests", TransientError, "throttled", TransientError, "throttled"),
    (500, b"<html>", TransientError, "api_error", UnansweredError, "api_error"),
    (502, b"", TransientError, "api_error", UnansweredError, "api_error"),
    (504, b"", TransientError, "api_error", UnansweredError, "api_error"),
]


@pytest.mark.parametrize(("status", "body", "listed", "list_reason", "placed", "place_reason"), MEANINGS)
def test_status_and_words_decide_what_an_answer_means(
    office: Office,
    status: int,
    body: object,
    listed: type[SyncdError],
    list_reason: str,
    placed: type[SyncdError],
    place_reason: str,
) -> None:
    office.answer = http(status, body)
    for call, expected, reason in ((listing, listed, list_reason), (place, placed, place_reason)):
        with pytest.raises(SyncdError) as caught:
            call(api_of(office))
        assert type(caught.value) is expected
        assert getattr(caught.value, "reason", getattr(caught.value, "failure", "")) == reason


@pytest.mark.parametrize(
    ("status", "body", "meant"),
    [
        (400, "DocNum is locked", ItemError),
        (404, "It is elsewhere", ItemError),
        (409, b"", ItemError),
        (410, b"", ItemError),
        (422, "The image is locked", ItemError),
        (400, "documents is not a valid resource.", NoSuchMethodError),
        (401, "no", SiteError),
        (404, b"<html>", TransientError),
        (408, b"", TransientError),
        (400, "Request timed out", TransientError),
        (500, b"", TransientError),
    ],
)
def test_answer_about_a_single_document_concerns_it_alone_unless_it_says_more(
    office: Office, status: int, body: object, meant: type[SyncdError]
) -> None:
    office.answer = http(status, body)
    with pytest.raises(SyncdError) as caught:
        api_of(office).document(34)
    assert type(caught.value) is meant


def test_throttling_tells_how_long_to_wait(office: Office) -> None:
    office.answer = http(429, "Too many requests", "Retry-After: 7")
    with pytest.raises(TransientError) as caught:
        listing(api_of(office))
    assert caught.value.retry_after == 7
    assert len(office.requests) == 1


def test_redirect_is_not_followed_and_the_key_goes_nowhere_else(office: Office) -> None:
    elsewhere = Office()
    office.answer = http(302, b"", f"Location: http://127.0.0.1:{elsewhere.port}/")
    for call, expected in ((listing, TransientError), (place, UnansweredError)):
        with pytest.raises(TransientError) as caught:
            call(api_of(office))
        assert type(caught.value) is expected
    assert elsewhere.requests == []
    elsewhere.stop()


def test_only_a_201_proves_that_a_file_was_placed(office: Office) -> None:
    office.answer = http(200, "done")
    with pytest.raises(UnansweredError):
        place(api_of(office))


def test_error_tells_nothing_of_the_answer(office: Office) -> None:
    office.answer = http(400, "John Smith has no such tooth")
    for call in (listing, place):
        with pytest.raises(SyncdError) as caught:
            call(api_of(office))
        assert "Smith" not in str(caught.value)


def test_placed_names_are_told(office: Office) -> None:
    office.answer = http(201, [{"DocNum": 440, "FileName": "SmithJohn440.gif"}, {"DocNum": "441", "FileName": "b.gif"}])
    expected = (PlacedName(440, "SmithJohn440.gif"), PlacedName(441, "b.gif"))
    assert api_of(office).place_thumbnails(15, "syncd/x/") == expected
    assert api_of(office).place_mount_images(15, "syncd/x/") == expected


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (200, "No documents could be made into thumbnails."),
        (200, "No mount images could be downloaded."),
        (404, "No documents exist for this patient"),
    ],
)
def test_documented_words_for_none_are_no_names(office: Office, status: int, words: str) -> None:
    office.answer = http(status, words)
    assert api_of(office).place_thumbnails(15, "syncd/x/") == ()


@pytest.mark.parametrize("body", [[{"FileName": "x"}], [{"DocNum": 1, "FileName": 5}], ["x"], {"a": 1}, b"[{", b""])
def test_unreadable_names_are_unanswered(office: Office, body: object) -> None:
    office.answer = http(201, body)
    with pytest.raises(UnansweredError):
        api_of(office).place_mount_images(15, "syncd/x/")


# The wire -------------------------------------------------------------------------------------------------------------


def test_unreachable_office_is_transient_and_nothing_was_asked() -> None:
    office = Office()
    office.stop()
    for call in (listing, place):
        with pytest.raises(TransientError) as caught:
            call(api_of(office))
        assert type(caught.value) is TransientError
        assert caught.value.reason == "api_unreachable"


WHOLE = http(200, EXAMPLE)
HEAD_SIZE = WHOLE.index(b"\r\n\r\n") + 4


@pytest.mark.parametrize("sent", [0, 10, HEAD_SIZE - 2, HEAD_SIZE, HEAD_SIZE + 1, len(WHOLE) // 2, len(WHOLE) - 1])
def test_cut_answer_is_never_taken_for_whole(office: Office, sent: int) -> None:
    office.answer = WHOLE[:sent]
    with pytest.raises(TransientError):
        listing(api_of(office))
    with pytest.raises(UnansweredError):
        place(api_of(office))


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_cut_answer_without_a_length_is_never_taken_for_whole(office: Office, kept: int) -> None:
    office.answer = http(200, json.dumps(EXAMPLE).encode()[:kept], length=-1)
    with pytest.raises(ListingError):
        listing(api_of(office))


def drip(content: bytes) -> Callable[[socket.socket], None]:
    def send(wire: socket.socket) -> None:
        for at in range(len(content)):
            wire.sendall(content[at : at + 1])
            time.sleep(0.05)

    return send


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 200 X\r\n" + b"X-Pad: 1\r\n" * 90,
        b"HTTP/1.1 200 X\r\nContent-Length: 500\r\n\r\n" + b" " * 500,
        b"HTTP/1.1 200 X\r\n\r\n[" + b" " * 500,
    ],
)
def test_answer_that_drips_is_ended_by_the_deadline(content: bytes) -> None:
    for call, expected in ((listing, TransientError), (place, UnansweredError)):
        office = Office()
        office.answer = drip(content)
        began = time.monotonic()
        with pytest.raises(TransientError) as caught:
            call(api_of(office, deadline=0.5))
        assert time.monotonic() - began < 2
        assert type(caught.value) is expected
        office.stop()


def test_silent_office_is_ended_by_the_deadline() -> None:
    office, released = Office(), threading.Event()

    def wait(_wire: socket.socket) -> None:
        released.wait(10)

    office.answer = wait
    with pytest.raises(UnansweredError):
        place(api_of(office, deadline=0.3))
    released.set()
    office.stop()


def test_body_over_the_cap_is_refused_after_decoding(office: Office) -> None:
    office.answer = http(200, gzip.compress(b"[" + b" " * 50_000_000 + b"]"), "Content-Encoding: gzip")
    with pytest.raises(OversizeError):
        listing(api_of(office, size_cap=1_000_000))
    with pytest.raises(UnansweredError):
        place(api_of(office, size_cap=1_000_000))


def test_body_without_an_end_is_left_at_the_cap(office: Office) -> None:
    def pour(wire: socket.socket) -> None:
        wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
        with suppress(OSError):  # until the reader leaves
            while True:
                wire.sendall(b" " * 65_536)

    office.answer = pour
    with pytest.raises(OversizeError):
        listing(api_of(office, size_cap=1_000_000, deadline=5.0))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def test_certificate_must_be_trusted_and_for_this_host(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    office = Office(context)
    bundle = certificate.with_suffix(".crt")
    good = f"https://localhost:{office.port}"
    assert api_of(office, url=good, ca_bundle=bundle).list_documents(101, 0, 100).rows == ()
    for url, trusted in ((good, None), (f"https://127.0.0.1:{office.port}", bundle)):
        for call in (listing, place):
            with pytest.raises(SiteError) as caught:
                call(api_of(office, url=url, ca_bundle=trusted))
            assert caught.value.reason == "tls_failed"
    assert len(office.requests) == 1
    office.stop()


# Rows -----------------------------------------------------------------------------------------------------------------


def test_example_of_the_vendor_is_read(office: Office) -> None:
    office.answer = http(200, EXAMPLE)
    document, mount = api_of(office).list_documents(101, 0, 100).rows
    assert document.item == Item(101, "document", 34)
    assert document.revision == document.stamp == "2021-04-18 11:45:01"
    assert document.server_time == "2021-05-20 13:30:54"
    assert document.file_name == "exampleimage.jpg"
    assert document.fields["PatNum"] == 101
    assert document.fields["ProvNum"] == 0
    assert document.fields["ImgType"] is None
    assert len(document.fields) == 16
    assert mount.item == Item(101, "mount", 15)
    assert mount.revision.startswith("digest:")
    assert mount.file_name is None


def test_sheets_are_read(office: Office) -> None:
    office.answer = http(200, [SHEET, {**SHEET, "SheetNum": 46, "DateTSheetEdited": "0001-01-01 00:00:00"}])
    first, old = api_of(office).list_sheets(101, 0, 100).rows
    assert first.item == Item(101, "sheet", 45)
    assert first.revision == "2022-01-23 08:33:02"
    assert first.date_created == "2021-11-16 02:45:38"
    assert first.fields["SheetDefNum"] == 25
    assert old.revision.startswith("digest:")


def test_file_name_of_the_row_goes_before_its_path(office: Office) -> None:
    office.answer = http(200, [{**EXAMPLE[0], "FileName": "named.png"}, {**EXAMPLE[0], "filePath": "a/b/c.tif"}])
    first, second = api_of(office).list_documents(101, 0, 100).rows
    assert (first.file_name, second.file_name) == ("named.png", "c.tif")


@pytest.mark.parametrize(
    "change",
    [
        {"PatNum": "102"}, {"PatNum": None}, {"PatNum": "0101"}, {"PatNum": 101.0}, {"PatNum": " 101"},
        {"PatNum": "1e2"}, {"DocNum": True}, {"DocNum": -34}, {"DocNum": 2**63}, {"DocNum": "34.0"},
        {"DocNum": 0}, {"DocNum": "٣"},
        {"MountNum": 5}, {"MountNum": "x"}, {"Description": 5}, {"Note": ["x"]}, {"DocCategory": 1.5},
        {"ProvNum": False},
    ],
)  # fmt: skip
def test_row_that_is_not_proven_refuses_the_page(office: Office, change: dict[str, object]) -> None:
    office.answer = http(200, [EXAMPLE[1], {**EXAMPLE[0], **change}])
    with pytest.raises(ListingError):
        listing(api_of(office))


@pytest.mark.parametrize("lacking", ["DocNum", "MountNum", "PatNum", "DateTStamp", "DateCreated"])
def test_row_without_a_required_field_refuses_the_page(office: Office, lacking: str) -> None:
    office.answer = http(200, [{name: value for name, value in EXAMPLE[0].items() if name != lacking}])
    with pytest.raises(ListingError):
        listing(api_of(office))


@pytest.mark.parametrize("body", [
    b"<html>sign in</html>", b"", b"null", b"{}", b'"no documents"', b"[[]]", b"[null]", b"[NaN]", b"\xff\xfe[]",
    b"[" * 100_000, b"[1" + b"0" * 10_000 + b"]", b"[] []",
])  # fmt: skip
def test_what_is_no_list_of_rows_is_refused(office: Office, body: bytes) -> None:
    office.answer = http(200, body)
    with pytest.raises(ListingError):
        listing(api_of(office))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*EXAMPLE[0], "X"]), inner, max_size=5),
    max_leaves=20,
)


@given(body=JSON, changes=st.dictionaries(st.sampled_from(list(EXAMPLE[0])), JSON))
def test_any_json_is_a_page_of_this_patient_or_refused(
    shared_office: Office, body: object, changes: dict[str, object]
) -> None:
    for answer in (body, [{**EXAMPLE[0], **changes}]):
        shared_office.answer = http(200, answer)
        try:
            page = api_of(shared_office).list_documents(101, 0, 100)
        except ListingError:
            continue
        for row in page.rows:
            assert row.item.pat_num == 101
            assert row.item.num > 0
            json.dumps(dict(row.fields)).encode()
            assert all("\0" not in v and v.encode() for v in row.fields.values() if isinstance(v, str) and v)


def test_texts_that_no_file_could_hold_are_made_harmless(office: Office) -> None:
    row = json.dumps({**EXAMPLE[0], "Description": "a\0b"}).replace("Scanned", "x").encode()
    office.answer = http(200, b"[" + row.replace(b'"Note": ""', b'"Note": "\\ud800 \\ud83d\\ude00 \xc3\xa4"') + b"]")
    (listed,) = api_of(office).list_documents(101, 0, 100).rows
    assert listed.fields["Description"] == "a\ufffdb"
    assert listed.fields["Note"] == "\ufffd \U0001f600 ä"


@pytest.mark.parametrize(
    ("note", "upload"),
    [
        ("_rawBase64_:.jpg_" + base64.b64encode(b"\xff\xd8picture").decode(), Upload("jpg", b"\xff\xd8picture")),
        ("_rawBase64_:.pdf_aGVs bG8= ", Upload("pdf", b"hello")),
        ("_rawBase64_:.jpg_???", Upload("", None, bad=True)),
        ("_rawBase64_:.jpg_aGVsbG8", Upload("", None, bad=True)),
        ("_rawBase64_:.jpg_", Upload("", None, bad=True)),
        ("_rawBase64_:nothing", Upload("", None, bad=True)),
        ("_download_:https://example.org/a.jpg", Upload("", None)),
        ("about _rawBase64_: nothing", None),
        ("", None),
    ],
)
def test_upload_leaves_the_note(office: Office, note: str, upload: Upload | None) -> None:
    office.answer = http(200, [{**EXAMPLE[0], "Note": note}])
    (listed,) = api_of(office).list_documents(101, 0, 100).rows
    assert listed.upload == upload
    assert listed.fields["Note"] == (note.partition(":")[0] if upload else note)


SINGLE = {name: value for name, value in EXAMPLE[0].items() if name not in ("MountNum", "serverDateTime", "filePath")}


def test_single_document_tells_whose_it_is(office: Office) -> None:
    office.answer = http(200, {**SINGLE, "PatNum": 15, "FileName": "SmithJohn7.jpg"})
    listed = api_of(office).document(34)
    assert listed is not None
    assert listed.item == Item(15, "document", 34)
    assert listed.file_name == "SmithJohn7.jpg"
    assert b"GET /api/v1/documents/34 HTTP" in office.requests[0]


SENT: dict[str, FieldValue] = {
    "DocCategory": 14,
    "ToothNumbers": "1-3,8",
    "PrintHeading": "true",
    "Description": "Left",
}


def test_an_upload_answers_the_new_number_and_what_was_not_taken(office: Office) -> None:
    office.answer = http(201, {"DocNum": 411, "DocCategory": "14", "ToothNumbers": "1,2,3,8", "Description": ""})
    assert api_of(office).upload_document(101, "syncd/a.jpg", SENT) == Uploaded(411, ("Description",))
    asked = office.requests[-1]
    assert b"POST /api/v1/documents/UploadSftp" in asked
    assert b'"PatNum": 101' in asked


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, "DocCategory is invalid", ItemError),
        (404, "Patient not found", ItemError),
        (401, "no permission", SiteError),
        (504, "<html>", UnansweredError),
        (200, {"DocNum": 411}, UnansweredError),
        (201, [], UnansweredError),
        (201, {"DocNum": None}, UnansweredError),
    ],
)
def test_an_upload_that_is_not_answered_with_a_number_counts_as_refused_or_unanswered(
    office: Office, status: int, body: object, error: type[Exception]
) -> None:
    office.answer = http(status, body)
    with pytest.raises(error):
        api_of(office).upload_document(101, "syncd/a.jpg", SENT)


def test_single_document_is_gone_only_by_the_documented_words(office: Office) -> None:
    office.answer = http(404, "Document not found")
    assert api_of(office).document(34) is None
    for body in ("Patient not found", "foo is not a valid resource.", b"", b"<html>Document not found</html>"):
        office.answer = http(404, body)
        with pytest.raises(SyncdError):
            api_of(office).document(34)


def test_another_document_than_asked_is_refused(office: Office) -> None:
    office.answer = http(200, SINGLE)
    with pytest.raises(ListingError):
        api_of(office).document(35)


def test_roster_keeps_what_a_mirror_needs(office: Office) -> None:
    row = {"PatNum": 11, "LName": "Allowed", "FName": "Allen", "Preferred": "", "Birthdate": "1980-01-02", "SSN": "123"}
    office.answer = http(200, [{**row, "PatStatus": "Patient", "DateTStamp": "2024-01-01 00:00:00"}])
    (patient,) = api_of(office).patients(0, 100)
    assert (patient.pat_num, patient.last_name, patient.status) == (11, "Allowed", "Patient")
    assert "123" not in repr(patient)


def test_permissions_and_version_are_told(office: Office) -> None:
    office.answer = http(200, [{"Permission": "ApiReadAll", "HasPermission": "true"},
                               {"Permission": "ApiComm", "HasPermission": "false"}])  # fmt: skip
    assert api_of(office).permissions() == {"ApiReadAll"}
    office.answer = http(200, [{"PrefName": "ProgramVersion", "ValueString": "25.4.48.0"}])
    assert api_of(office).program_version() == "25.4.48.0"
    office.answer = http(200, [])
    with pytest.raises(ListingError):
        api_of(office).program_version()


# The simulated practice -----------------------------------------------------------------------------------------------


def test_everything_a_simulated_practice_lists_is_placed_and_pulled(tmp_path: Path) -> None:
    """Listing, placing and pulling together, against a second reading of the vendor's pages."""
    practice = Simulation.start(patients=4, seed=3)
    site = practice.outside
    placement = PlacementSite(f"{site.host}:{site.port}", site.username, site.password)
    api = OpenDentalApi(practice.url, practice.office.developer_key, practice.office.customer_key, placement)
    drop = SftpDrop(site.host, site.port, site.username, site.password, None, site.host_key, None)
    try:
        jobs = [
            PullJob(staging.encode(), tmp_path / f"{number}", 2**30)
            for number, staging in enumerate(placed_of_all(api))
        ]
        assert len(jobs) > 4
        outcomes = drop.pull(jobs)
        assert [outcome for outcome in outcomes if not isinstance(outcome, Pulled)] == []
        assert all(drop.remove([job.remote for job in jobs]))
        assert api.permissions()
        assert api.program_version()
    finally:
        drop.close()
        practice.stop()


def placed_of_all(api: OpenDentalApi) -> Iterator[str]:
    """Have every document, mount and sheet of every patient placed under a name of its own."""
    for patient in api.patients(0, 100):
        rows = [*api.list_documents(patient.pat_num, 0, 100).rows, *api.list_sheets(patient.pat_num, 0, 100).rows]
        for row in rows:
            place_it, end = {
                "document": (api.place_document, Path(row.file_name or "").suffix),
                "mount": (api.place_mount, ".jpg"),
                "sheet": (api.place_sheet, ".pdf"),
            }[row.item.kind]
            if row.upload:
                continue
            staging = f"syncd/{row.item.id}{end}"
            place_it(row.item.num, staging)
            yield staging
