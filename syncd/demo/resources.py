"""The other resources that a mirror reads: patients, appointments, permissions, preferences."""

import re

from syncd.demo.call import Call, Row, whole
from syncd.demo.schema import ALL_PERMISSIONS, APT_STATUSES, PAT_STATUSES
from syncd.demo.wire import Refusal, Response, json_response

_BAD = 400
_FORMATS = {"Limit", "Offset", "DateTimeFormatString", "DateFormatString"}
_PATIENT_PARAMS = {"LName", "FName", "Birthdate", "PatStatus", "ClinicNum", "DateTStamp"} | _FORMATS
_DATE = r"\d{4}-\d\d-\d\d"
_MOMENT = rf"{_DATE}([ T]\d\d:\d\d:\d\d)?"


def patients_simple(call: Call) -> Response:
    """Patients GET Simple: everybody but the Deleted, by PatNum, with far more than a mirror needs."""
    for name in call.request.query:
        if call.office.strict and name not in _PATIENT_PARAMS:
            raise Refusal(_BAD, f"'{name}' is not a valid parameter")
    where, values = ["PatStatus <> ?"], [PAT_STATUSES.index("Deleted")]
    filters: list[object] = list(values)
    if status := call.param("PatStatus"):
        if status not in PAT_STATUSES:
            raise Refusal(_BAD, "PatStatus is invalid")
        where.append("PatStatus = ?")
        filters.append(PAT_STATUSES.index(status))
    if clinic := call.param("ClinicNum"):
        where.append("ClinicNum = ?")
        filters.append(whole("ClinicNum", clinic))
    for name in ("LName", "FName", "Birthdate"):
        if value := call.param(name):
            where.append(f"{name} = ?")
            filters.append(value)
    if since := call.param("DateTStamp"):
        where.append("DateTStamp >= ?")
        filters.append(_moment("DateTStamp", since))
    sql = f"SELECT * FROM patient WHERE {' AND '.join(where)} ORDER BY PatNum"  # noqa: S608  (column names of ours)
    now = call.practice.local()
    return call.page([_patient(row, now) for row in call.practice.rows(sql, *filters)])


def _patient(row: Row, now: str) -> Row:
    names = (
        "LName",
        "FName",
        "MiddleI",
        "Preferred",
        "Birthdate",
        "SSN",
        "Address",
        "City",
        "State",
        "Zip",
        "HmPhone",
        "Email",
    )
    return {
        "serverDateTime": now,
        "PatNum": row["PatNum"],
        **{name: row[name] for name in names},
        "PatStatus": PAT_STATUSES[row["PatStatus"]],
        "Gender": ("Male", "Female", "Unknown")[row["Gender"]],
        "ChartNumber": row["ChartNumber"],
        "PriProv": row["PriProv"],
        "ClinicNum": row["ClinicNum"],
        "DateTStamp": row["DateTStamp"],
    }


def appointments(call: Call) -> Response:
    """Appointments GET (multiple): by date, range of dates, patient, or DateTStamp; other parameters are ignored."""
    where, values = ["1 = 1"], list[object]()
    first, last = call.param("dateStart") or call.param("date"), call.param("dateEnd") or call.param("date")
    if first:
        where.append("AptDateTime >= ?")
        values.append(_moment("date", first)[:10])
    if last:
        where.append("AptDateTime <= ?")
        values.append(_moment("date", last)[:10] + " 23:59:59")
    if pat_num := call.param("PatNum"):
        where.append("PatNum = ?")
        values.append(call.patient(pat_num))
    if since := call.param("DateTStamp"):
        where.append("DateTStamp >= ?")
        values.append(_moment("DateTStamp", since))
    sql = f"SELECT * FROM appointment WHERE {' AND '.join(where)} ORDER BY AptDateTime, AptNum"  # noqa: S608  (ours)
    now = call.practice.local()
    return call.page([_appointment(row, now) for row in call.practice.rows(sql, *values)])


def _appointment(row: Row, now: str) -> Row:
    return {
        "AptNum": row["AptNum"],
        "PatNum": row["PatNum"],
        "AptStatus": APT_STATUSES[row["AptStatus"]],
        "Pattern": row["Pattern"],
        "Op": row["Op"],
        "Note": row["Note"],
        "ProvNum": row["ProvNum"],
        "AptDateTime": row["AptDateTime"],
        "IsNewPatient": "true" if row["IsNewPatient"] else "false",
        "ClinicNum": row["ClinicNum"],
        "DateTStamp": row["DateTStamp"],
        "serverDateTime": now,
    }


def security_permissions(call: Call) -> Response:
    """Securityperms GET: what the developer key may do."""
    held = call.office.permissions
    return json_response([{"Permission": name, "HasPermission": str(name in held).lower()} for name in ALL_PERMISSIONS])


def preferences(call: Call) -> Response:
    """Preferences GET: the cheap sign of life."""
    values = {"ProgramVersion": call.office.version, "PracticeTitle": "Simulated practice"}
    name = call.param("PrefName")
    return call.page([{"PrefName": key, "ValueString": values[key]} for key in values if name in (None, key)])


def _moment(name: str, value: str) -> str:
    if not re.fullmatch(_MOMENT, value):
        raise Refusal(_BAD, f"{name} is invalid")
    return value.replace("T", " ")
