"""The methods of the vendor's page "API Documents" that touch rows only; `placements.py` has those that move files."""

import base64
import binascii
import re
from datetime import datetime

from syncd.demo.call import Call, Row, whole
from syncd.demo.schema import IMAGE_CATEGORIES, IMG_TYPES
from syncd.demo.wire import Refusal, Response, json_response

_BAD, _MISSING, _CREATED = 400, 404, 201
_LAST_TOOTH = 32
_LIST_PARAMS = frozenset({"PatNum", "Limit", "Offset", "DateTimeFormatString", "DateFormatString"})


def get_many(call: Call) -> Response:
    """Documents GET (multiple): documents outside mounts, and mounts, sorted by the formatted DateCreated."""
    for name in call.request.query:
        if call.office.strict and name not in _LIST_PARAMS:
            raise Refusal(_BAD, f"'{name}' is not a valid parameter")
    if not call.param("PatNum"):
        raise Refusal(_BAD, "PatNum is required")
    pat_num = call.patient(call.param("PatNum"))
    now = call.practice.local()
    categories = category_names(call)
    found = call.practice.rows("SELECT * FROM document WHERE PatNum = ? AND MountItemNum = 0 ORDER BY DocNum", pat_num)
    folder = call.practice.folder_path(pat_num)
    rows = [_listed_document(call, row, categories, folder) for row in found]
    mounts = call.practice.rows("SELECT * FROM mount WHERE PatNum = ? ORDER BY MountNum", pat_num)
    rows += [_listed_mount(row, categories) for row in mounts]
    rows.sort(key=lambda row: str(row["DateCreated"]) if call.office.order == "iso" else _culture(row["DateCreated"]))
    return call.page([{**row, "serverDateTime": now} for row in rows])


def _listed_document(call: Call, row: Row, categories: dict[int, str], folder: str) -> Row:
    description = row["Description"]
    if call.office.prefixed == "all":
        description = _prefixed(row["DateCreated"], description)
    listed = {
        "DocNum": row["DocNum"],
        "MountNum": 0,
        "filePath": folder + row["FileName"] if folder else "",
        "Description": description,
        "PatNum": str(row["PatNum"]),
        "Note": row["Note"],
        "DateCreated": row["DateCreated"],
        "docCategory": categories.get(row["DocCategory"], ""),
        "DocCategory": row["DocCategory"],
        "ToothNumbers": row["ToothNumbers"],
        "ProvNum": str(row["ProvNum"]),
        "PrintHeading": boolean(row["PrintHeading"]),
        "DateTStamp": row["DateTStamp"],
        "serverDateTime": "",
    }
    if call.office.list_names:
        listed |= {"FileName": row["FileName"], "ImgType": IMG_TYPES[row["ImgType"]]}
    return listed


def _listed_mount(row: Row, categories: dict[int, str]) -> Row:
    return {
        "DocNum": 0,
        "MountNum": row["MountNum"],
        "filePath": "",
        "Description": _prefixed(row["DateCreated"], row["Description"]),
        "PatNum": str(row["PatNum"]),
        "Note": row["Note"],
        "DateCreated": row["DateCreated"],
        "docCategory": categories.get(row["DocCategory"], ""),
        "DocCategory": row["DocCategory"],
        "ToothNumbers": "",
        "ProvNum": str(row["ProvNum"]),
        "PrintHeading": "",
        "DateTStamp": "",
        "serverDateTime": "",
    }


def _prefixed(created: str, description: str) -> str:
    """The server's culture is American; the vendor's example pads the date to ten characters."""
    moment = datetime.fromisoformat(created)
    return f"{f'{moment.month}/{moment.day}/{moment.year}':>10}: {description}"


def _culture(created: str) -> str:
    """DateCreated as an American Windows formats it: the string by which the vendor sorts."""
    moment = datetime.fromisoformat(created)
    hour = moment.hour % 12 or 12
    half = "AM" if moment.hour == moment.hour % 12 else "PM"
    return f"{moment.month}/{moment.day}/{moment.year} {hour}:{moment.minute:02}:{moment.second:02} {half}"


def get_one(call: Call) -> Response:
    """Documents GET (single): also answers for images inside mounts."""
    return json_response(single(call, call.num))


def single(call: Call, doc_num: int) -> Row:
    """The single row; 404 where there is none."""
    row = needed(call, doc_num)
    return {
        "DocNum": doc_num,
        "Description": row["Description"],
        "DateCreated": row["DateCreated"],
        "DocCategory": row["DocCategory"],
        "docCategory": category_names(call).get(row["DocCategory"], ""),
        "PatNum": row["PatNum"],
        "FileName": row["FileName"],
        "ImgType": IMG_TYPES[row["ImgType"]],
        "ToothNumbers": row["ToothNumbers"],
        "DateTStamp": row["DateTStamp"],
        "ProvNum": row["ProvNum"],
        "PrintHeading": boolean(row["PrintHeading"]),
    }


def update(call: Call) -> Response:
    """Documents PUT: only the fields that are given change."""
    needed(call, call.num)
    call.practice.edit_document(call.num, **(given_columns(call) or {"DocNum": call.num}))
    return json_response(single(call, call.num))


def delete(call: Call) -> Response:
    """Documents DELETE: row and file."""
    needed(call, call.num)
    call.practice.delete_document(call.num)
    return Response(200, b"")


def upload(call: Call) -> Response:
    """Documents POST Upload: the file goes into Note until somebody in the office clicks on it."""
    pat_num = call.patient(call.number("PatNum"))
    extension = call.text("extension")
    try:
        data = base64.b64decode(call.text("rawBase64"), validate=True)
    except binascii.Error as error:
        raise Refusal(_BAD, "rawBase64 is invalid") from error
    if not re.fullmatch(r"\.\w+", extension):
        raise Refusal(_BAD, "extension is invalid")
    number = call.practice.add_raw_document(pat_num, data, extension, **given_columns(call))
    return _created(call, number)


def set_by_url(call: Call) -> Response:
    """Documents POST SetByUrl: the URL goes into Note until somebody in the office clicks on it."""
    pat_num = call.patient(call.number("PatNum"))
    number = call.practice.add_url_document(pat_num, call.text("url"), **given_columns(call))
    return _created(call, number)


def _created(call: Call, doc_num: int) -> Response:
    return json_response(single(call, doc_num), _CREATED, location=f"/api/v1/documents/{doc_num}")


def needed(call: Call, doc_num: int) -> Row:
    """The document's row; 404 where there is none."""
    row = call.practice.row("document", doc_num)
    if row is None:
        raise Refusal(_MISSING, "Document not found")
    return row


def category_names(call: Call) -> dict[int, str]:
    """DefNum -> ItemName of the document categories."""
    rows = call.practice.rows("SELECT DefNum, ItemName FROM definition WHERE Category = ?", IMAGE_CATEGORIES)
    return {row["DefNum"]: row["ItemName"] for row in rows}


def boolean(value: int) -> str:
    """Booleans are strings in this API."""
    return "true" if value else "false"


def given_columns(call: Call) -> Row:
    """The optional fields of Upload, SetByUrl, UploadSftp and PUT, checked, as columns."""
    columns: Row = {}
    for name, value in call.body.items():
        if name == "Description":
            columns[name] = str(value)
        elif name == "DateCreated":
            columns[name] = _moment(str(value))
        elif name == "DocCategory":
            columns[name] = whole(name, value)
            if columns[name] not in category_names(call):
                raise Refusal(_BAD, "DocCategory is invalid")
        elif name == "ImgType":
            if value not in IMG_TYPES:
                raise Refusal(_BAD, "ImgType is invalid")
            columns[name] = IMG_TYPES.index(str(value))
        elif name == "ToothNumbers":
            columns[name] = _teeth(str(value))
        elif name == "ProvNum":
            columns[name] = whole(name, value)
        elif name == "PrintHeading":
            if str(value).lower() not in ("true", "false"):
                raise Refusal(_BAD, "PrintHeading is invalid")
            columns[name] = int(str(value).lower() == "true")
    return columns


def _moment(value: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", value):
        raise Refusal(_BAD, "DateCreated is invalid")
    return value


def _teeth(value: str) -> str:
    """`1-5,8` becomes `1,2,3,4,5,8`."""
    teeth: list[int] = []
    for part in filter(None, value.split(",")):
        first, dash, last = part.strip().partition("-")
        start, end = whole("ToothNumbers", first), whole("ToothNumbers", last if dash else first)
        if not 1 <= start <= end <= _LAST_TOOTH:
            raise Refusal(_BAD, "ToothNumbers is invalid")
        teeth += range(start, end + 1)
    return ",".join(map(str, teeth))
