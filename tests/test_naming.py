"""Names and types: what a hostile name can never do, and what the first and last bytes of a file prove."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncd import naming
from syncd.errors import ItemError, UsageError
from syncd.model import KINDS, FieldValue, Item, Kind, Version

TOKEN = "0123456789abcdef0123456789abcdef"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(40)
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(20)
PDF = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)
ZIP = b"PK\x03\x04\x14\x00\x00\x00" + bytes(22) + b"something.xml"
DOCX = b"PK\x03\x04\x14\x00\x00\x00" + bytes(22) + b"word/document.xml"
ENDS = {"jpg": b"\xff\xd9", "png": b"\x00\x00\x00\x00IEND\xaeB`\x82", "pdf": b"startxref\n9\n%%EOF\n"}
HEADS = {"jpg": JPEG, "png": PNG, "pdf": PDF}
HOSTILE = st.text(
    st.one_of(st.characters(), st.sampled_from('./\\:*?<>|"-~ \0\r\n\u202e\u2066\u200b\u2028\ud800\x1b%{}éA'))
)


def version(listing: dict[str, FieldValue], extension: str = "jpg", number: int = 1) -> Version:
    return Version(
        seq=1, item=Item(101, "document", 34), mount_num=None, version=number, sidecar=1, revision="r",
        sha256="ab" * 32, bytes=3, extension=extension, media_type="image/jpeg", file_name=None, listed_at=0.0,
        placed_at=0.0, archived_at=0.0, first_seen_at=0.0, method="document", listing=listing,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file_name", "extension"),
    [
        ("SmithJohn389.PNG", "png"), ("a.b.Jpeg", "jpeg"), ("x.json", "bin"), ("x.exe", "bin"), ("x.jpg ", "bin"),
        ("jpg", "bin"), ("x.", "bin"), ("", "bin"), (None, "bin"), ("../../etc/passwd", "bin"), ("x.tif\n", "bin"),
    ],
)  # fmt: skip
def test_archive_extension_is_allow_listed(file_name: str | None, extension: str) -> None:
    assert naming.extension_of(file_name) == extension


def test_staged_name_keeps_the_documents_own_extension() -> None:
    assert naming.own_extension("Brief.ODT") == "odt"
    name = naming.staging_name("syncd", "main", "20261121", TOKEN, "odt")
    assert name == f"syncd/syncd-main-20261121-{TOKEN}.odt"


@pytest.mark.parametrize("extension", [None, "", "a/b", "../x", "ABC", "ninechars", "jpg\n"])
def test_without_a_plain_extension_a_folder_is_staged(extension: str | None) -> None:
    assert naming.staging_name("a/b", "main", "20261121", TOKEN, extension) == f"a/b/syncd-main-20261121-{TOKEN}/"


@given(file_name=HOSTILE, practice=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True))
def test_clean_up_recognises_every_name_that_was_staged(file_name: str, practice: str) -> None:
    name = naming.staging_name("drop", practice, "20261121", TOKEN, naming.own_extension(file_name))
    assert naming.is_staging_name(name.removeprefix("drop/").rstrip("/").encode(), practice) == "20261121"


@pytest.mark.parametrize(
    "name",
    [
        f"syncd-other-20261121-{TOKEN}.jpg".encode(), f"syncd-main-2-20261121-{TOKEN}.jpg".encode(),
        f"syncd-main-20261121-{TOKEN}.jpg\n".encode(), f"x/syncd-main-20261121-{TOKEN}.jpg".encode(),
        f"syncd-main-20261121-{TOKEN[:-1]}.jpg".encode(), f"syncd-main-20261121-{TOKEN}.j\xff".encode("latin-1"), b"",
        f"syncd-main-20261399-{TOKEN}.jpg".encode(), f"syncd-main-00000101-{TOKEN}".encode(),
    ],
)  # fmt: skip
def test_clean_up_leaves_every_other_name_alone(name: bytes) -> None:
    assert naming.is_staging_name(name, "main") is None


@given(pat_num=st.none() | st.integers(1, 10**18 - 1), kind=st.sampled_from(KINDS), num=st.integers(1, 10**18 - 1))
def test_ids_are_read_as_they_are_printed(pat_num: int | None, kind: Kind, num: int) -> None:
    text = f"{kind}-{num}" if pat_num is None else Item(pat_num, kind, num).full_id
    assert naming.parse_id(text) == (pat_num, kind, num)


@pytest.mark.parametrize(
    "text", ["", "document", "document-0", "document-034", "document--3", "0/document-3", "document-34\n", "doc-3",
             "document-٣", "101/102/document-3", "document-" + "9" * 19, "Smith"],
)  # fmt: skip
def test_what_is_no_id_is_refused_without_an_echo(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        naming.parse_id(text)
    assert "Smith" not in str(refusal.value)


def test_lists_of_a_patient_have_an_id_too() -> None:
    assert naming.parse_list_id("patient-101") == 101
    for text in ("patient-0", "patient-", "101", "Smith", "patient-" + "9" * 19):
        assert naming.parse_list_id(text) is None


def test_guard_ids() -> None:
    assert naming.parse_guard_id("guard-7") == 7
    for wrong in ("patient-7", "guard-", "guard-0", "101"):
        with pytest.raises(UsageError):
            naming.parse_guard_id(wrong)


@pytest.mark.parametrize(
    ("head", "extension", "media"),
    [
        (JPEG, "jpg", "image/jpeg"), (JPEG, "png", "image/jpeg"), (PNG, "png", "image/png"),
        (PNG[:8] + b"\x00\x00\x00\x08acTL" + bytes(20), "png", "image/png"), (PDF, "pdf", "application/pdf"),
        (b"\r\n\r\n" + PDF, "pdf", "application/pdf"),
        (b"MM\x00*" + bytes(124) + b"DICM" + bytes(9), "dcm", "application/dicom"),
        (OLE, "doc", "application/msword"), (OLE, "xls", "application/vnd.ms-excel"),
        (OLE, "jpg", "application/x-ole-storage"),
        (ZIP, "zip", "application/zip"),
        (ZIP, "xlsx", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
        (b"{\\rtf1\\ansi", "rtf", "application/rtf"), (b"BMI of the patient", "txt", "text/plain"),
        (b"solid cube\n", "stl", "model/stl"), (b"\x00\x01", "txt", "application/octet-stream"),
        (b"\x01" * 200, "jpg", "application/octet-stream"),
        (b"<html>", "bin", "text/html"), (b"GIF89a\x01\x00\x01\x00", "gif", "image/gif"),
    ],
)  # fmt: skip
def test_media_type_follows_the_bytes(head: bytes, extension: str, media: str) -> None:
    assert naming.media_type(head, extension) == media


def test_thumbnails_are_for_images() -> None:
    assert naming.is_image(naming.media_type(JPEG, "bin"))
    assert not naming.is_image("application/pdf")


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><html>", b"\xef\xbb\xbf\r\n <HTML lang=en>", b"<h1>404</h1>",
        b'"Document not found"', b'{"a": 1}',
        b"{}", b"[]", b"null", b"12", b'[{"DocNum": 34}]', "\ufeff<html>".encode("utf-16-le"), b"<!-- x --><html>",
        b'<?xml version="1.0"?><!DOCTYPE html><html>', b'<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code></Error>',
    ],
)  # fmt: skip
@pytest.mark.parametrize("extension", ["jpg", "pdf", "docx", "doc"])
def test_web_page_under_an_image_pdf_or_office_extension_is_refused(page: bytes, extension: str) -> None:
    with pytest.raises(ItemError) as refusal:
        naming.check_body(page, page, len(page), extension, answered=True)
    assert refusal.value.failure == "web_page"


@pytest.mark.parametrize(
    ("body", "extension"),
    [(b"<html>", "txt"), (b'{"a": 1}', "bin"), (b"{\\rtf1 x}", "rtf"), (b"[Content]\x00", "jpg"),
     (b'<?xml version="1.0"?><?mso-application progid="Word.Document"?>', "doc"), (b"[" * 10_000, "bin")],
)  # fmt: skip
def test_what_is_no_web_page_is_archived(body: bytes, extension: str) -> None:
    assert naming.check_body(body, body, len(body), extension, answered=True) == ()


def test_empty_file_is_refused() -> None:
    with pytest.raises(ItemError) as refusal:
        naming.check_body(b"", b"", 0, "jpg", answered=True)
    assert refusal.value.failure == "zero_bytes"


@pytest.mark.parametrize("extension", ["jpg", "png", "pdf"])
def test_end_marker_is_found_before_padding_and_missed_when_absent(extension: str) -> None:
    head, tail = HEADS[extension], ENDS[extension] + b"\0\r\n\0"
    assert naming.check_body(head, tail, 900, extension, answered=True) == ()
    assert naming.check_body(head, tail[:-8], 900, extension, answered=True) == ("no_end_marker",)


@pytest.mark.parametrize(
    ("head", "extension", "flags"),
    [
        (OLE, "jpg", ("other_type",)), (JPEG, "pdf", ("other_type", "no_end_marker")),
        (JPEG, "bin", ("no_end_marker",)),
        (DOCX, "zip", ()), (DOCX, "docx", ()), (DOCX, "xlsx", ("other_type",)), (b"\x01\x02", "jpg", ()),
        (OLE, "txt", ("other_type",)),
    ],
)  # fmt: skip
def test_another_known_type_is_flagged_not_refused(head: bytes, extension: str, flags: tuple[str, ...]) -> None:
    assert naming.check_body(head, b"", 900, extension, answered=True) == flags


@pytest.mark.parametrize("extension", ["jpg", "png", "pdf"])
def test_unanswered_file_is_used_only_when_its_end_is_proven(extension: str) -> None:
    head, end = HEADS[extension], ENDS[extension]
    assert naming.check_body(head, end, 900, extension, answered=False) == ()
    for tail in (end + b"more", end[:-3], b""):
        with pytest.raises(ItemError) as refusal:
            naming.check_body(head, tail, 900, extension, answered=False)
        assert refusal.value.failure == "timeout_60s"


def test_unanswered_file_of_a_type_without_an_end_is_never_proven() -> None:
    assert not naming.properly_ended(OLE, ENDS["jpg"] + ENDS["pdf"])


def test_export_name_is_for_people() -> None:
    listing: dict[str, FieldValue] = {
        "DateCreated": "2021-04-08 08:12:21", "docCategory": "Lab Cases", "Description": "Scanned image",
    }  # fmt: skip
    assert naming.export_name(version(listing)) == "2021-04-08 Lab Cases - Scanned image (document-34).jpg"
    numbered = naming.export_name(version(listing, number=2), numbered=True)
    assert numbered == "2021-04-08 Lab Cases - Scanned image (document-34 version 2).jpg"


@pytest.mark.parametrize(
    ("listing", "name"),
    [
        ({}, "undated (document-34).jpg"),
        ({"DateTimeSheet": "2024-02-03 10:00:00", "Description": "Consent"}, "2024-02-03 Consent (document-34).jpg"),
        ({"DateCreated": "0001-01-01 00:00:00", "Description": " 5/11/2021: 4BW"}, "undated 4BW (document-34).jpg"),
        ({"DateCreated": "../../etc", "Description": "..", "docCategory": None}, "undated (document-34).jpg"),
    ],
)
def test_export_name_copes_with_missing_and_odd_fields(listing: dict[str, FieldValue], name: str) -> None:
    assert naming.export_name(version(listing)) == name


@settings(max_examples=700)  # of three strings each
@given(date=HOSTILE, category=HOSTILE, description=HOSTILE, extension=st.sampled_from(sorted(naming.EXTENSIONS)))
@example("", "CON", "NUL.txt", "pdf")
@example("2021-04-08", "\u202egpj", "é" * 300, "jpg")
def test_export_name_is_safe_on_every_system(date: str, category: str, description: str, extension: str) -> None:
    listing: dict[str, FieldValue] = {"DateCreated": date, "docCategory": category, "Description": description}
    name = naming.export_name(version(listing, extension))
    assert len(name.encode()) <= 255
    assert name.endswith(f"(document-34).{extension}")
    assert re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2} |undated ", name)  # so never reserved, never `-x`, never `.x`
    assert not set(name) & set('<>:"/\\|?*')
    assert all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in name)


@settings(max_examples=1_000)
@given(HOSTILE)
@example("K.jpg\u202egpj")
def test_hostile_name_leaves_nothing_but_an_extension(file_name: str) -> None:
    item = version({}, naming.extension_of(file_name))
    assert naming.archive_path_is_ours(item.path)
    assert naming.archive_path_is_ours(item.sidecar_path)
    assert (naming.own_extension(file_name) or "x").isalnum()


@pytest.mark.parametrize(
    "path",
    [
        ".syncd-archive", f"incoming/{TOKEN}", "published/index.db", "patients/101/patient.json",
        "patients/101/document-34/1-3f2a9c1b7d20.jpg", "patients/101/mount-image-440/12-3f2a9c1b7d20.json",
        "patients/101/sheet-45/1-3f2a9c1b7d20.2.json", "patients/101/sheet-45/1-3f2a9c1b7d20.10.json",
    ],
)  # fmt: skip
def test_layout_of_the_archive_is_ours(path: str) -> None:
    assert naming.archive_path_is_ours(path)


@pytest.mark.parametrize(
    "path",
    [
        "patients/0/patient.json", "patients/101/document-34/1-3f2a9c1b7d20.exe", "incoming/x", "",
        "patients/101/x-34/1-3f2a9c1b7d20.jpg",
        "patients/101/document-34/1-3F2A9C1B7D20.jpg", "patients/101/document-34/1-3f2a9c1b7d20.1.json",
        "patients/101/document-34/../1-3f2a9c1b7d20.jpg", "patients/101/patient.json\n", "/patients/101",
        "patients/101/document-34/1-3f2a9c1b7d20.2.jpg", "patients/101/document-34/0-3f2a9c1b7d20.jpg",
    ],
)  # fmt: skip
def test_everything_else_is_foreign(path: str) -> None:
    assert not naming.archive_path_is_ours(path)


@settings(max_examples=700)
@given(st.binary(max_size=512), st.binary(max_size=64), st.sampled_from(sorted(naming.EXTENSIONS)), st.booleans())
def test_any_bytes_are_judged_without_a_surprise(head: bytes, tail: bytes, extension: str, answered: bool) -> None:
    try:
        flags = naming.check_body(head, tail, len(head), extension, answered)
    except ItemError as refusal:
        flags = (refusal.failure,)
    known = {"zero_bytes", "web_page", "timeout_60s", "other_type", "no_end_marker"}
    assert set(flags) <= known
    assert answered or flags or naming.properly_ended(head, tail)


@given(HOSTILE)
def test_every_category_becomes_one_plain_folder_name(category: str) -> None:
    name = naming.folder_name(category)
    assert name
    assert name.isprintable()
    assert len(name) <= 41
    assert len(name.encode()) <= 255
    assert unicodedata.is_normalized("NFC", name)
    assert not set(name) & set('/\\:*?"<>|')
    assert name[0] not in ".- "
    assert name[-1] not in ". "


@pytest.mark.parametrize("reserved", ["con", "AUX .x", "COM¹", "conin$", "LPT1.txt", "nul. "])
def test_no_folder_bears_the_name_of_a_device_of_windows(reserved: str) -> None:
    stems = [name.partition(".")[0].strip().casefold() for name in (naming.folder_name(reserved), reserved)]
    assert stems[0] != stems[1]


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (" 11/5/2025: Left", "Left"),
        ("05.11.2025: Left", "Left"),
        ("2025-11-05: Left", "Left"),
        ("11/5/25: Left", "Left"),
        ("11/6/2025: Left", "11/6/2025: Left"),
        ("Left: 11/5/2025", "Left: 11/5/2025"),
        ("", ""),
    ],
)
def test_only_the_date_that_the_list_puts_before_a_description_is_taken_off(text: str, bare: str) -> None:
    assert naming.bare_description(text, "2025-11-05 08:16:46") == bare


@pytest.mark.parametrize(
    ("text", "found_as"),
    [
        ("Zoë MÜLLER", "zoe muller"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("a\0b", "a b"),
        ("é\0\ud800", "e ?"),
    ],
)
def test_texts_are_searched_without_case_and_accents_and_sqlite_can_hold_them(text: str, found_as: str) -> None:
    assert naming.folded(text) == found_as
    naming.folded(text).encode()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "..\\x", "a\0"])
def test_name_that_leaves_its_folder_is_not_plain(name: str) -> None:
    assert not naming.plain_name(name)
    assert naming.plain_name(f"x{len(name)}.jpg")
