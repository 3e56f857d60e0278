"""Names and types: staging names, IDs, archive paths, export names, and what a file's first and last bytes say. Pure.

A name from Open Dental is personal health information and hostile: only an allow-listed extension of it goes on.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import unicodedata
from contextlib import suppress
from typing import Final, cast

import filetype
from pathvalidate import sanitize_filename

from syncd.errors import ItemError, UsageError
from syncd.model import KINDS, TOMBSTONE, Kind, Version

_OFFICE: Final = "application/vnd.openxmlformats-officedocument"
_OLE: Final = "application/x-ole-storage"  # Office 97-2003: the first 512 bytes do not tell which program
_ZIP: Final = "application/zip"
# Extension in the archive (design.md section 5) -> media types that bear it; the first is the ordinary one.
_TYPES: Final[dict[str, tuple[str, ...]]] = {
    **{name: (f"image/{name}",) for name in ("jpeg", "png", "gif", "bmp", "tiff")},
    **{"jpg": ("image/jpeg",), "tif": ("image/tiff",)},  # noqa: PIE800 - one line
    "pdf": ("application/pdf",),
    "dcm": ("application/dicom",),
    "txt": ("text/plain",),
    "rtf": ("application/rtf",),
    "doc": ("application/msword", _OLE),
    "docx": (f"{_OFFICE}.wordprocessingml.document", _ZIP),
    "xls": ("application/vnd.ms-excel", _OLE),
    "xlsx": (f"{_OFFICE}.spreadsheetml.sheet", _ZIP),
    "zip": (_ZIP,),
    "stl": ("model/stl",),
    "mp4": ("video/mp4", "video/x-m4v", "video/quicktime"),
    "avi": ("video/x-msvideo",),
}
EXTENSIONS: Final = frozenset(_TYPES) | {"bin"}
_NEVER_WEB: Final = EXTENSIONS - {"bin", "txt", "dcm", "zip", "stl", "mp4", "avi"}  # image, PDF or office
_IMAGES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/bmp", "image/tiff"})

_PADDING: Final = b"\0\r\n\t "
_ENDS: Final = {  # media type -> the bytes every whole file ends with
    "image/jpeg": b"\xff\xd9",
    "image/png": b"IEND\xaeB`\x82",
    "application/pdf": b"%%EOF",
}
_CONTROLS: Final = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_HTML: Final = re.compile(
    rb"<!--|<(!doctype\s+html|html|head|body|title|meta|script|style|link|center|table|div|span|h[1-6]|p|br)\b"
    rb"|<\?xml(?=.*<(!doctype\s+html|html|error)\b)",
    re.IGNORECASE | re.DOTALL,
)
_JSON: Final = re.compile(rb'\{\s*["}]|\[\s*[\[{"\]]|"[^"\\\x00-\x1f]*["\\]')

_N: Final = "([1-9][0-9]{0,18})"  # every vendor key: a positive 64-bit integer, with random keys a large one
_LARGEST: Final = 2**63 - 1
_SANE: Final = re.compile(r"[a-z0-9]{1,8}")
_ITEM_ID: Final = re.compile(rf"(?:{_N}/)?({'|'.join(KINDS)})-{_N}")
_ARCHIVE_PATH: Final = re.compile(
    r"\.syncd-archive|incoming/[0-9a-f]{32}|published/index\.db"
    rf"|patients/{_N}/patient\.json"
    rf"|patients/{_N}/(?:{'|'.join(KINDS)})-{_N}/{re.escape(TOMBSTONE)}"
    rf"|patients/{_N}/(?:{'|'.join(KINDS)})-{_N}"
    rf"/{_N}-[0-9a-f]{{12}}\.(?:(?:(?:[2-9]|[1-9][0-9]{{1,17}})\.)?json|{'|'.join(sorted(EXTENSIONS))})"
)
_DATE_PREFIX: Final = re.compile(r"\s*\d{1,4}[./-]\d{1,2}[./-]\d{1,4}:")  # the list's Description has one (facts.md)
_EXPORT_BYTES: Final = 120  # with the folders above it, below the 260 letters that a path has on Windows
_CATEGORY_LETTERS: Final = 40
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)  # Windows


def own_extension(file_name: str | None) -> str | None:
    """The document's own extension, lower case, when it is plain letters and digits: what Open Dental will check."""
    extension = (file_name or "").rpartition(".")[2].lower() if "." in (file_name or "") else ""
    return extension if _SANE.fullmatch(extension) else None


def extension_of(file_name: str | None) -> str:
    """The extension in the archive: from the last dot of a remote name, allow-listed, else `bin`."""
    extension = own_extension(file_name)
    return extension if extension in EXTENSIONS else "bin"


def staging_name(folder: str, practice: str, day: str, token: str, extension: str | None) -> str:
    """A name on the drop that nobody can guess. `day`: yyyymmdd, `token`: 32 hex digits.

    It ends in `/`, a folder, when the extension is None or not plain: then Open Dental chooses the name inside.
    """
    ending = f".{extension}" if extension and _SANE.fullmatch(extension) else "/"
    return f"{folder}/syncd-{practice}-{day}-{token}{ending}"


def is_staging_name(name: bytes, practice: str) -> str | None:
    """The day (yyyymmdd) of a name in the drop folder that this practice's syncd chose, None for all other names.

    One of a day that no calendar has is another's.
    """
    ours = rb"syncd-%s-([0-9]{8})-[0-9a-f]{32}(?:\.[a-z0-9]{1,8})?" % re.escape(practice.encode())
    found = re.fullmatch(ours, name)
    day = found[1].decode() if found else ""
    with suppress(ValueError):
        dt.date.fromisoformat(day)
        return day
    return None


def _holdable(found: re.Match[str]) -> bool:
    """Whether the numbers of an ID or a path fit into 64 bits, as the vendor's keys and the index's columns do."""
    return all(int(number) <= _LARGEST for number in found.groups() if number and number.isdigit())


def parse_id(text: str) -> tuple[int | None, Kind, int]:
    """`document-34` or `101/document-34` as (pat_num or None, kind, num). The text is not echoed: it may be a name."""
    if not (found := _ITEM_ID.fullmatch(text)) or not _holdable(found):
        raise UsageError("that is not an ID: write for example document-34 or 101/document-34")
    return int(found[1]) if found[1] else None, cast("Kind", found[2]), int(found[3])


def parse_list_id(text: str) -> int | None:
    """The patient whose lists `patient-101` means; None for a text that is no such ID."""
    found = re.fullmatch(f"patient-{_N}", text)
    return int(found[1]) if found and _holdable(found) else None


def parse_guard_id(text: str) -> int:
    """The number of `guard-7`."""
    if not (found := re.fullmatch(f"guard-{_N}", text)) or not _holdable(found):
        raise UsageError("that is not an ID: write for example guard-7")
    return int(found[1])


def _recognised(head: bytes) -> str | None:
    """The media type that the signature proves; None for text and for what has no signature."""
    if head[128:132] == b"DICM":  # before all else: a DICOM preamble may hold a TIFF header
        return "application/dicom"
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return _OLE
    mime = cast("str | None", filetype.guess_mime(head))
    if mime not in ("application/pdf", "application/rtf") and not _CONTROLS.search(head):
        return None  # two letters such as BM or MZ at the start of plain text
    return "image/png" if mime == "image/apng" else mime


def _web_type(head: bytes) -> str | None:
    """text/html or application/json for a body that a web server made, None for everything else."""
    text = head.replace(b"\0", b"")[2:] if head[:2] in (b"\xff\xfe", b"\xfe\xff") else head
    text = text.removeprefix(b"\xef\xbb\xbf").strip()
    if _HTML.match(text):
        return "text/html"
    if _JSON.match(text):
        return "application/json"
    try:
        json.loads(text)  # `null`, a number, a short list
    except (ValueError, RecursionError):
        return None
    return "application/json"


def media_type(head: bytes, extension: str) -> str:
    """What the file is, by its first 512 bytes; its extension in the archive only decides where bytes cannot."""
    expected = _TYPES.get(extension, ())
    found = _recognised(head)
    if found is not None:
        return expected[0] if found in expected else found
    if extension == "pdf" and b"%PDF-" in head:  # readers accept some bytes before the header
        return "application/pdf"
    if extension == "stl" or (extension == "txt" and not _CONTROLS.search(head)):
        return expected[0]
    return _web_type(head) or "application/octet-stream"


def is_image(media: str) -> bool:
    """Whether Open Dental's Thumbnails can make a small picture of this media type."""
    return media in _IMAGES


def properly_ended(head: bytes, tail: bytes) -> bool:
    """Whether the last bytes prove that writing was finished. Only JPEG, PNG and PDF can be proven."""
    end = _ENDS.get(media_type(head, "pdf"))
    return end is not None and tail.rstrip(_PADDING).endswith(end)


def check_body(head: bytes, tail: bytes, size: int, extension: str, answered: bool) -> tuple[str, ...]:
    """Flags of a body that may be archived: `other_type`, `no_end_marker`. `size` in bytes.

    Raises ItemError zero_bytes, web_page, or timeout_60s: an unanswered placement whose end nothing proves.
    """
    if size == 0:
        raise ItemError("zero_bytes")
    found = media_type(head, extension)
    if extension in _NEVER_WEB and found in ("text/html", "application/json"):
        raise ItemError("web_page")
    if not answered and not properly_ended(head, tail):
        raise ItemError("timeout_60s", "unanswered, and nothing proves that the file is whole")
    named = _TYPES.get(extension, (found,))
    zipped = extension == "zip" and head.startswith(b"PK")  # every office file is a zip file too
    other = _recognised(head) is not None and found not in named and not zipped
    open_end = found in _ENDS and _ENDS[found] not in tail
    return ("other_type",) * other + ("no_end_marker",) * open_end


def plain_words(text: object) -> str:
    """A piece of a file name, safe on Windows, macOS and Linux: no control, bidi or unassigned character in it."""
    words = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in unicodedata.normalize("NFC", str(text)))
    return " ".join(sanitize_filename(words, platform="universal", replacement_text=" ").split()).strip(" .-")


def folder_name(category: str | None) -> str:
    """A category as a folder's name, safe on Windows, macOS and Linux."""
    name = plain_words(category or "")[:_CATEGORY_LETTERS].rstrip(" .-") or "Without category"
    return f"_{name}" if _DEVICE.fullmatch(name) else name


def undated(description: object) -> str:
    """A description without the date that Open Dental's list puts before some."""
    return _DATE_PREFIX.sub("", str(description or ""), count=1)


def export_name(version: Version, numbered: bool = False) -> str:
    """`2021-04-08 Lab Cases - Scanned image (document-34).jpg`: safe on Windows, macOS and Linux.

    It starts with a date or `undated`, so that no hostile text stands first; ID and extension are always whole.
    `numbered` adds the version's number, for exports of more than the current one.
    """
    listing = version.listing
    date = str(listing.get("DateCreated") or listing.get("DateTimeSheet") or "")[:10]
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", date) or date.startswith("0001"):
        date = "undated"
    texts = (listing.get("docCategory"), undated(listing.get("Description")))
    title = f"{date} {' - '.join(filter(None, (plain_words(text or '') for text in texts)))}"
    number = f" version {version.version}" if numbered else ""
    ending = f" ({version.item.id}{number}).{version.extension}"
    return title.encode()[: _EXPORT_BYTES - len(ending)].decode(errors="ignore").rstrip(" .-") + ending


def folded(text: str) -> str:
    """For searching: without case and accents, as somebody in a hurry types it; always text that SQLite can hold."""
    if text.isascii():  # nearly all are, and this is much faster
        return text.lower().replace("\0", " ")
    plain = unicodedata.normalize("NFKD", text.casefold().replace("\0", " ").encode(errors="replace").decode())
    return "".join(each for each in plain if not unicodedata.combining(each))


def bare_description(text: str, created: str) -> str:
    """A description without the date that the list puts before it, whichever way the server writes dates (facts.md).

    `created`: DateCreated. Another date at its start is the practice's own text.
    """
    found = _DATE_PREFIX.match(text)
    if found is None:
        return text
    prefix = sorted(int(part) % 100 for part in re.findall(r"\d+", found[0]))
    own = sorted(int(part) % 100 for part in re.findall(r"\d+", created)[:3])
    return text[found.end() :].removeprefix(" ") if prefix == own else text


def archive_path_is_ours(relative: str) -> bool:
    """Whether a path below the archive is of the layout of design.md section 5."""
    found = _ARCHIVE_PATH.fullmatch(relative)
    return found is not None and _holdable(found)


def plain_name(name: str) -> bool:
    """Whether a file name from an answer stays inside its folder."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\x00" not in name
