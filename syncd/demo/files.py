"""Small real files that know whose they are: JPEG, PNG, GIF, TIFF and PDF with the identity written inside.

Everything is deterministic from the `FileSpec`, apart from sheet PDFs, which the vendor renders anew at each call.
Pictures are made from a handful of Pillow templates; the identity and the padding go in as comments, so that
thousands take seconds.
"""

import base64
import io
import random
import re
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw

_MARKS = {"document": "DocNum", "mount": "MountNum", "sheet": "SheetNum", "thumbnail": "ThumbnailOf"}
_KINDS = {mark: kind for kind, mark in _MARKS.items()}
_IDENTITY = re.compile(
    rb"PatNum=(\d+) (DocNum|MountNum|SheetNum|ThumbnailOf)=(\d+) Content=([\w:.-]+) Practice=([\w.-]+)"
)
_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF"}
_TEMPLATES = 8
_SEGMENT = 60_000
_TAG_BYTES = 200

IMAGE_EXTENSIONS = frozenset(_FORMATS)
"""Extensions of the standard image files: those the vendor makes thumbnails of."""


class Identity(NamedTuple):
    """Who a file says it is. `content` is the content version of a document, a digest for a mount, the stamp of a
    sheet.
    """

    pat_num: int
    kind: str
    num: int
    content: str


@dataclass(frozen=True)
class FileSpec:
    """What one file holds. `kind`: document, mount, sheet or thumbnail. `size`: wanted bytes, about. `data` overrides
    all.
    """

    practice: str
    pat_num: int
    kind: str
    num: int
    content: str
    extension: str
    size: int = 1_500
    grey: bool = False
    data: bytes | None = None

    def render(self) -> bytes:
        """The file's bytes: the same for the same spec, always."""
        return self.data if self.data is not None else _render(self)

    def line(self) -> str:
        """The identity as it is written inside the file."""
        mark = _MARKS[self.kind]
        return f"PatNum={self.pat_num} {mark}={self.num} Content={self.content} Practice={self.practice}"


def identity(content: bytes) -> Identity | None:
    """The identity inside a simulated file, or None where there is none."""
    found = _IDENTITY.search(content)
    if found is None:
        return None
    pat_num, mark, num, version, _ = (part.decode() for part in found.groups())
    return Identity(int(pat_num), _KINDS[mark], int(num), version)


def practice_of(content: bytes) -> str | None:
    """The name of the simulated practice that a file comes from, or None."""
    found = _IDENTITY.search(content)
    return None if found is None else found.group(5).decode()


def drawn_size(rng: random.Random) -> int:
    """A plausible size for a small simulated file, in bytes: 500 to 30,000, mostly near 2,000."""
    return round(min(30_000.0, max(500.0, rng.lognormvariate(7.6, 0.8))))


@lru_cache(maxsize=4_096)
def _render(spec: FileSpec) -> bytes:
    kind = _FORMATS.get(spec.extension.lower())
    if kind is None:
        return _document(spec)
    side = 100 if spec.kind == "thumbnail" else 48
    shade = -1 if spec.grey else (spec.pat_num * 31 + spec.num) % _TEMPLATES
    template = _template(kind, side, shade)
    padding = _padding(spec, spec.size - len(template) - _TAG_BYTES)
    return _WRITERS[kind](template, spec.line().encode(), padding)


def _document(spec: FileSpec) -> bytes:
    padding = _padding(spec, spec.size - 600)
    if spec.extension.lower() == "pdf":
        return pdf([spec.line(), "Simulated practice: invented patients only"], padding)
    if spec.extension.lower() == "dcm":
        return bytes(128) + b"DICM" + spec.line().encode() + b"\n" + padding
    return spec.line().encode() + b"\r\n" + padding + b"\r\n"


def _padding(spec: FileSpec, wanted: int) -> bytes:
    """Printable filler, so that no byte of it looks like a marker; deterministic."""
    if wanted <= 0:
        return b""
    rng = random.Random(spec.line() + spec.extension)
    return base64.b64encode(rng.randbytes(wanted * 3 // 4 + 3))[:wanted]


@lru_cache(maxsize=128)
def _template(kind: str, side: int, shade: int) -> bytes:
    level = 128 if shade < 0 else 30 + 24 * shade
    picture = Image.new("RGB", (side, side), (level, level, level))
    if shade >= 0:
        draw = ImageDraw.Draw(picture)
        draw.ellipse((side // 8, side // 6, side - side // 6, side - 4), fill=(255 - level, 200, level))
        draw.rectangle((shade, shade, side // 3 + shade, side // 4 + shade), fill=(level, 90, 255 - level))
    out = io.BytesIO()
    if kind == "TIFF":
        picture.convert("L").resize((16, 16)).save(out, kind, tiffinfo={270: "@" * _TAG_BYTES})
    else:
        picture.save(out, kind)
    return out.getvalue()


def _jpeg(template: bytes, line: bytes, padding: bytes) -> bytes:
    """Comment segments go behind the APP0 segment, whose length stands in bytes 4 and 5."""
    place = 4 + int(struct.unpack(">H", template[4:6])[0])
    parts = [line, *(padding[at : at + _SEGMENT] for at in range(0, len(padding), _SEGMENT))]
    comments = b"".join(b"\xff\xfe" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return template[:place] + comments + template[place:]


def _png(template: bytes, line: bytes, padding: bytes) -> bytes:
    """A text chunk goes in front of IEND, which is always the last 12 bytes."""
    body = b"tEXtComment\x00" + line + b" " + padding
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return template[:-12] + chunk + template[-12:]


def _gif(template: bytes, line: bytes, padding: bytes) -> bytes:
    """A comment extension, in blocks of at most 255 bytes, goes in front of the trailer."""
    text = line.ljust(255) + padding
    blocks = [text[at : at + 255] for at in range(0, len(text), 255)]
    comment = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\x00"
    return template[:-1] + comment + template[-1:]


def _tiff(template: bytes, line: bytes, padding: bytes) -> bytes:
    """The description tag has a fixed length; bytes behind the last strip belong to nobody and are allowed."""
    return template.replace(b"@" * _TAG_BYTES, line.ljust(_TAG_BYTES)) + padding


_WRITERS = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "TIFF": _tiff}


def pdf(lines: list[str], padding: bytes = b"") -> bytes:
    """A one-page PDF (1.4) with these text lines, a correct cross-reference table, ending in %%EOF."""
    shown = "".join(f"({line.replace(chr(92), '').replace('(', '').replace(')', '')}) Tj T*\n" for line in lines)
    page = f"BT /F1 11 Tf 14 TL 40 740 Td\n{shown}ET\n".encode("ascii", "replace")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources 7 0 R >>",
        b"<< /Length %d >>\nstream\n" % len(page) + page + b"endstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Length %d >>\nstream\n" % (len(padding) + 1) + padding + b"\nendstream",
        b"<< /Font << /F1 5 0 R >> >>",
    ]
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


def sheet_pdf(practice: str, pat_num: int, sheet_num: int, stamp: str, description: str, rendering: str) -> bytes:
    """A sheet as the vendor renders it: `rendering` (a counter, a time) makes each call's bytes differ; the identity
    stays.
    """
    spec = FileSpec(practice, pat_num, "sheet", sheet_num, stamp.replace(" ", "T"), "pdf")
    return pdf([spec.line(), description, f"Printed {rendering}"])
