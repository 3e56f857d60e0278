"""The methods of the vendor's page "API Sheets"."""

from syncd.demo.call import Call, Row
from syncd.demo.documents import boolean
from syncd.demo.placements import place_named
from syncd.demo.schema import SHEET_DEFS, SHEET_TYPES
from syncd.demo.wire import Refusal, Response, json_response

_BAD, _MISSING = 400, 404


def get_many(call: Call) -> Response:
    """Sheets GET: a patient's sheets that are not deleted; PatNum is the only filter, and other parameters are
    ignored.
    """
    if not call.param("PatNum"):
        raise Refusal(_BAD, "PatNum is required")
    pat_num = call.patient(call.param("PatNum"))
    rows = call.practice.rows("SELECT * FROM sheet WHERE PatNum = ? AND IsDeleted = 0 ORDER BY SheetNum", pat_num)
    return call.page([_listed(row) for row in rows])


def _listed(row: Row) -> Row:
    return {
        "SheetNum": row["SheetNum"],
        "SheetType": SHEET_TYPES[row["SheetType"]],
        "PatNum": row["PatNum"],
        "DateTimeSheet": row["DateTimeSheet"],
        "InternalNote": row["InternalNote"],
        "Description": row["Description"],
        "IsWebForm": boolean(row["IsWebForm"]),
        "SheetDefNum": row["SheetDefNum"],
        "DocNum": row["DocNum"],
        "ClinicNum": row["ClinicNum"],
        "DateTSheetEdited": row["DateTSheetEdited"],
    }


def create(call: Call) -> Response:
    """Sheets POST: a sheet from an existing definition."""
    sheet_def = call.number("SheetDefNum")
    pat_num = call.patient(call.number("PatNum"))
    if sheet_def not in SHEET_DEFS:
        raise Refusal(_MISSING, "SheetDef not found")
    note = str(call.body.get("InternalNote", ""))
    num = call.practice.add_sheet(pat_num, sheet_def, InternalNote=note)
    return json_response(_listed(call.practice.need("sheet", num)), location=f"/api/v1/sheets/{num}")


def download_sftp(call: Call) -> Response:
    """Sheets POST DownloadSftp: the sheet as a PDF, rendered anew."""
    target = call.target()
    row = call.practice.row("sheet", call.number("SheetNum"))
    if row is None:
        raise Refusal(_MISSING, "Sheet not found")
    return place_named(call, target, "sheet.pdf", call.practice.render_sheet(row["SheetNum"]))
