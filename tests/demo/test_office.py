import base64
import itertools
import json
import re

import pytest

from syncd.demo.files import identity
from syncd.demo.schema import READ_ALL
from syncd.demo.wire import Request, Response
from tests.demo.conftest import Desk


def text(response: Response) -> object:
    return json.loads(response.body)


def test_keys_and_headers_are_needed(desk: Desk) -> None:
    keys = {"Authorization": "ODFHIR wrong/keys", "Content-Type": "application/json"}
    assert desk.office.handle(Request("GET", "/documents", {"PatNum": "1"})).status == 400
    assert desk.office.handle(Request("GET", "/documents", {"PatNum": "1"}, keys)).status == 401
    assert desk.office.handle(Request("GET", "/documents", {}, {"Authorization": keys["Authorization"]})).status == 400


def test_a_read_all_key_lists_but_never_downloads(desk: Desk) -> None:
    doc = desk.practice.add_document(1)
    desk.office.permissions = (READ_ALL,)
    assert len(desk.listed(1)) == 1
    assert desk.place(DocNum=doc).status == 401
    assert desk.ask("PUT", "/queries/ShortQuery", {"SqlCommand": "SELECT 1"}).status == 401
    assert desk.get("/securityperms")[0] == {"Permission": "ApiReadAll", "HasPermission": "true"}
    assert desk.get("/securityperms")[-1]["HasPermission"] == "false"


def test_explanations_are_plain_json_strings(desk: Desk) -> None:
    found = {
        "/documents": (400, "PatNum is required"),
        "/documents/77": (404, "Document not found"),
        "/teeth": (404, "'teeth' is not a valid resource."),
    }
    for path, (status, words) in found.items():
        response = desk.ask("GET", path)
        assert (response.status, text(response)) == (status, words)
    assert text(desk.ask("GET", "/documents", PatNum=99)) == "Patient not found"
    assert "is not a valid method" in str(text(desk.ask("POST", "/documents/Nonsense", {})))
    assert text(desk.ask("GET", "/documents", PatNum=1, Since=3)) == "'Since' is not a valid parameter"


def test_a_patient_without_documents_has_an_empty_list(desk: Desk) -> None:
    assert desk.listed(1) == []


def test_the_list_has_the_vendors_fields_and_types(desk: Desk) -> None:
    desk.practice.add_document(1, description="Scan")
    desk.practice.add_mount(1, images=1)
    document, mount = sorted(desk.listed(1), key=lambda row: str(row["MountNum"]))
    assert list(document) == list(mount)
    assert "FileName" not in document
    assert (document["DocNum"], document["PatNum"], document["ProvNum"]) == (1, "1", "0")
    assert str(document["filePath"]).startswith("\\\\server\\OpenDentImages\\A\\AbendrothAda1\\")
    assert document["PrintHeading"] == "false"
    assert document["serverDateTime"] == "2025-05-20 12:00:00"
    assert (mount["DocNum"], mount["MountNum"], mount["Description"]) == (0, 1, " 5/20/2025: 4BW")
    desk.office.list_names = True
    assert {row.get("ImgType") for row in desk.listed(1)} == {"Radiograph", None}


def test_pages_hold_a_hundred_rows_and_obey_limit_and_offset(desk: Desk) -> None:
    for _ in range(130):
        desk.practice.add_document(1)
        desk.practice.add_sheet(1)
    for path in ("/documents", "/sheets"):
        assert len(desk.get(path, PatNum=1)) == 100
        assert len(desk.get(path, PatNum=1, Offset=100)) == 30
        assert len(desk.get(path, PatNum=1, Limit=7, Offset=5)) == 7
        assert len(desk.get(path, PatNum=1, Limit=500)) == 100
    desk.office.page_size = 1_000
    assert len(desk.listed(1)) == 130


def test_rows_are_sorted_by_the_formatted_string(desk: Desk) -> None:
    for created in ("2025-10-01 08:00:00", "2025-09-01 08:00:00", "2024-10-01 08:00:00"):
        desk.practice.add_document(1, DateCreated=created)
    assert [row["DocNum"] for row in desk.listed(1)] == [3, 1, 2]
    desk.office.order = "iso"
    assert [row["DocNum"] for row in desk.listed(1)] == [3, 2, 1]


def test_a_placed_document_is_its_own_bytes_under_the_asked_name(desk: Desk) -> None:
    doc = desk.practice.add_document(2)
    response = desk.place(DocNum=doc)
    assert response.status == 201
    assert response.headers["location"] == "site.example/syncd/one.jpg"
    assert desk.drop.files["syncd/one.jpg"].data == desk.practice.truth()[2].documents[doc]
    assert "syncd" in desk.drop.folders


def test_without_a_file_name_the_documents_own_is_used(desk: Desk) -> None:
    doc, sheet = desk.practice.add_document(1, "pdf", file_name="Zoë, scan.pdf"), desk.practice.add_sheet(1)
    desk.place(to="syncd/a/", DocNum=doc)
    desk.place("/sheets/DownloadSftp", to="syncd/a/", SheetNum=sheet)
    assert set(desk.drop.files) == {"syncd/a/Zoë, scan.pdf", "syncd/a/sheet.pdf"}


def test_a_wrong_extension_login_or_address_is_a_400(desk: Desk) -> None:
    doc, mount, sheet = desk.practice.add_document(1, "png"), desk.practice.add_mount(1), desk.practice.add_sheet(1)
    assert desk.place(DocNum=doc).status == 400
    assert desk.place(to="x/y.png", DocNum=doc).status == 201
    assert desk.place(to="x/y.png", MountNum=mount).status == 400
    assert desk.place(MountNum=mount).status == 201
    assert desk.place("/sheets/DownloadSftp", SheetNum=sheet).status == 400
    assert desk.place(to="x/y.png", DocNum=doc, SftpPassword="wrong").status == 400
    assert desk.place(to="x/y.png", DocNum=doc, SftpAddress="sftp://site/x.png").status == 400
    assert desk.place(to="x/y.png").status == 400
    desk.drop.down = True
    assert "Sftp connection error" in str(text(desk.place(to="x/y.png", DocNum=doc)))


def test_what_does_not_exist_is_a_404(desk: Desk) -> None:
    assert text(desk.place(DocNum=9)) == "Document not found"
    assert text(desk.place(MountNum=9)) == "Mount not found"
    assert text(desk.place("/documents/DownloadMount", MountNum=9)) == "Mount not found."
    assert text(desk.place("/documents/Thumbnails", PatNum=9)) == "Patient not found"
    assert text(desk.place("/documents/Thumbnails", PatNum=1)) == "No documents exist for this patient"
    assert desk.place("/sheets/DownloadSftp", to="a.pdf", SheetNum=9).status == 404


def test_thumbnails_skip_pdfs_mounts_and_images_in_mounts(desk: Desk) -> None:
    practice = desk.practice
    image, paper = practice.add_document(1, "gif"), practice.add_document(1, "pdf")
    practice.add_mount(1)
    response = desk.place("/documents/Thumbnails", to="syncd/thumbs/", PatNum=1)
    assert response.status == 201
    assert [row["DocNum"] for row in json.loads(response.body)] == [image]
    assert practice.truth()[1].thumbnails == {image}
    (placed,) = desk.drop.files.values()
    assert identity(placed.data) == (1, "thumbnail", image, "1")
    practice.delete_document(image)
    assert paper
    answer = desk.place("/documents/Thumbnails", to="syncd/thumbs/", PatNum=1)
    assert (answer.status, text(answer)) == (200, "No documents could be made into thumbnails.")


def test_hostile_names_go_where_they_say_and_impossible_ones_nowhere(desk: Desk) -> None:
    for name in ("../../etc/x.jpg", "y" * 300 + ".jpg", "z.jpg"):
        desk.practice.add_document(1, file_name=name)
    answer = desk.place("/documents/Thumbnails", to="syncd/thumbs/", PatNum=1)
    assert [row["DocNum"] for row in json.loads(answer.body)] == [1, 3]
    assert set(desk.drop.files) == {"etc/x.jpg", "syncd/thumbs/z.jpg"}
    assert desk.practice.truth()[1].thumbnails == {3}


def test_download_mount_places_every_image_inside(desk: Desk) -> None:
    mount, empty = desk.practice.add_mount(1, images=3), desk.practice.add_mount(1, images=0)
    response = desk.place("/documents/DownloadMount", to="syncd/m", MountNum=mount)
    names = {row["DocNum"]: row["FileName"] for row in json.loads(response.body)}
    truth = desk.practice.truth()[1].mount_images
    assert {num: desk.drop.files[f"syncd/m/{name}"].data for num, name in names.items()} == {
        num: content for num, (_, content) in truth.items()
    }
    answer = desk.place("/documents/DownloadMount", to="syncd/m", MountNum=empty)
    assert (answer.status, text(answer)) == (200, "No mount images could be downloaded.")


def test_the_writing_methods_do_what_the_pages_say(desk: Desk) -> None:
    body = {"PatNum": 1, "rawBase64": base64.b64encode(b"hello").decode(), "extension": ".txt", "ToothNumbers": "1-3,8"}
    made = desk.ask("POST", "/documents/Upload", {**body, "ImgType": "Photo"})
    row = json.loads(made.body)
    assert (made.status, row["FileName"], row["ToothNumbers"], row["ImgType"]) == (201, "x", "1,2,3,8", "Photo")
    assert desk.listed(1)[0]["Note"] == "_rawBase64_:.txt_aGVsbG8="
    linked = desk.ask("POST", "/documents/SetByUrl", {"PatNum": 1, "url": "https://example.org/a.jpg"})
    assert (linked.status, json.loads(linked.body)["FileName"]) == (201, "xx")
    changed = desk.ask("PUT", f"/documents/{row['DocNum']}", {"Description": "Pano", "PrintHeading": "true"})
    assert (json.loads(changed.body)["Description"], json.loads(changed.body)["PrintHeading"]) == ("Pano", "true")
    assert desk.ask("PUT", f"/documents/{row['DocNum']}", {"ImgType": "Poem"}).status == 400
    assert desk.ask("DELETE", f"/documents/{row['DocNum']}").status == 200
    assert desk.ask("DELETE", f"/documents/{row['DocNum']}").status == 404
    sheet = json.loads(desk.ask("POST", "/sheets", {"PatNum": 1, "SheetDefNum": 25}).body)
    assert sheet["SheetType"] == "PatientLetter"


def test_upload_sftp_fetches_the_file_from_the_site(desk: Desk) -> None:
    doc = desk.practice.add_document(1)
    desk.place(to="up/scan.jpg", DocNum=doc)
    made = desk.place("/documents/UploadSftp", to="up/scan.jpg", PatNum=2, Description="back")
    number = json.loads(made.body)["DocNum"]
    assert made.status == 201
    assert desk.practice.truth()[2].documents[number] == desk.practice.truth()[1].documents[doc]
    assert desk.place("/documents/UploadSftp", to="up/none.jpg", PatNum=2).status == 400


def test_patients_come_by_number_without_the_deleted(desk: Desk) -> None:
    desk.practice.add_patient("Wren", "Wim", "Deleted")
    desk.practice.add_patient("Quill", "Rosa", "Deceased", ClinicNum=3)
    assert [row["PatNum"] for row in desk.get("/patients/Simple")] == [1, 2, 4]
    assert [row["PatNum"] for row in desk.get("/patients/Simple", ClinicNum=3)] == [4]
    assert {"SSN", "Address", "serverDateTime"} <= set(desk.get("/patients/Simple")[0])
    desk.clock.advance(60)
    since = desk.practice.local()
    desk.practice.add_document(1)
    assert desk.get("/patients/Simple", DateTStamp=since) == []
    desk.practice.touch_patient(2)
    assert [row["PatNum"] for row in desk.get("/patients/Simple", DateTStamp=since)] == [2]


def test_moments_come_in_the_form_that_is_asked_for(desk: Desk) -> None:
    desk.practice.add_document(1)
    shown = desk.get("/documents", PatNum=1, DateTimeFormatString="dd/MM/yyyy HH:mm:ss zzz")
    assert shown[0]["DateTStamp"] == "20/05/2025 12:00:00 -05:00"


def test_appointments_are_found_by_date_and_range(desk: Desk) -> None:
    for days in (0, 1, 5):
        desk.practice.add_appointment(1, desk.clock.now() + days * 86_400)
    assert len(desk.get("/appointments", date="2025-05-20")) == 1
    assert len(desk.get("/appointments", dateStart="2025-05-20", dateEnd="2025-05-21")) == 2
    assert desk.get("/appointments")[2]["AptDateTime"] == "2025-05-25 12:00:00"


def test_short_query_answers_as_mysql_would(desk: Desk) -> None:
    for _ in range(120):
        desk.practice.add_document(1)
    mount = desk.practice.add_mount(2, images=2)

    def query(sql: str, **params: object) -> Response:
        return desk.ask("PUT", "/queries/ShortQuery", {"SqlCommand": sql}, **params)

    sql = "SELECT DocNum,PatNum,DateTStamp,MountItemNum FROM document WHERE DateTStamp>='{}' ORDER BY DateTStamp,DocNum"
    for moment in ("2025-05-20 12:00:00", "2025-05-20T12:00:00"):
        rows = json.loads(query(sql.format(moment)).body)
        assert len(rows) == 100
        assert rows[0] == {"DocNum": 1, "PatNum": 1, "DateTStamp": "2025-05-20T12:00:00", "MountItemNum": 0}
    assert len(json.loads(query(sql.format("2025-01-01"), Offset=100).body)) == 22
    joined = (
        "SELECT mi.MountNum, MAX(d.DateTStamp) AS Latest FROM document d JOIN mountitem mi "
        "ON mi.MountItemNum=d.MountItemNum WHERE d.DateTStamp > NOW() - INTERVAL 2 MINUTE GROUP BY mi.MountNum"
    )
    assert json.loads(query(joined).body) == [{"MountNum": mount, "Latest": "2025-05-20T12:00:00"}]
    assert json.loads(query("SELECT DATE_SUB(NOW(), INTERVAL 1 HOUR) AS t").body) == [{"t": "2025-05-20T11:00:00"}]
    assert query("UPDATE document SET Note=''").status == 401
    assert query("SELECT 1; DELETE FROM document").status == 401
    assert query("SELECT Nothing FROM document").status == 400
    assert len(desk.office.audit_rows) == 8


def test_line_ends_in_strings_come_as_spaces(desk: Desk) -> None:
    desk.practice.add_document(1, Note="two\r\nlines")
    assert desk.listed(1)[0]["Note"] == "two lines"


def test_every_arrival_is_recorded_without_secrets(desk: Desk) -> None:
    doc = desk.practice.add_document(1)
    desk.place(DocNum=doc)
    desk.ask("GET", "/documents", PatNum=99)
    placed, refused = desk.office.arrivals
    assert (placed.method, placed.path, placed.status, placed.params["DocNum"]) == (
        "POST",
        "/documents/DownloadSftp",
        201,
        doc,
    )
    assert refused.status == 404
    assert not re.search(desk.drop.password, repr(desk.office.arrivals))


@pytest.mark.parametrize("retry_after", [True, False])
def test_early_requests_wait_in_a_queue_and_then_get_429(desk: Desk, retry_after: bool) -> None:
    desk.office.throttle.interval = 1.0
    desk.office.throttle.retry_after = retry_after
    for _ in range(3):
        assert desk.listed(1) == []
    starts = [arrival.at + arrival.waited for arrival in desk.office.arrivals]
    assert [round(later - earlier, 6) for earlier, later in itertools.pairwise(starts)] == [1.0, 1.0]
    desk.office.throttle.queue = 0
    refused = desk.ask("GET", "/documents", PatNum=1)
    assert (refused.status, refused.body) == (429, b"Too many requests")
    assert ("Retry-After" in refused.headers) is retry_after
    desk.clock.advance(1.0)
    assert desk.ask("GET", "/documents", PatNum=1).status == 200
