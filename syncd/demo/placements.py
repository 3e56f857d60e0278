"""The methods of the vendor's page "API Documents" that move files to or from an SFTP site."""

from contextlib import suppress

from syncd.demo.call import Call, NotTaken, Row
from syncd.demo.documents import category_names, given_columns, needed
from syncd.demo.site import SiteError, Target
from syncd.demo.wire import Refusal, Response, json_response

_BAD, _MISSING, _CREATED = 400, 404, 201


def download_sftp(call: Call) -> Response:
    """Documents POST DownloadSftp: a document's file, or a mount's composite as .jpg."""
    target = call.target()
    if "DocNum" in call.body:
        name, data = _document(call, call.number("DocNum"))
    elif "MountNum" in call.body:
        name, data = _composite(call, call.number("MountNum"))
    else:
        raise Refusal(_BAD, "DocNum or MountNum is required")
    return place_named(call, target, name, data)


def place_named(call: Call, target: Target, name: str, data: bytes) -> Response:
    """Place one file: under the address's name, which must have the right extension, else under its own."""
    if not target.file_name:
        target = target.named(name)
    elif _extension(target.file_name) != _extension(name) or not _extension(name):
        raise Refusal(_BAD, "SftpAddress has an invalid file extension")
    call.put(target, data)
    address = f"{target.host}/{target.path}"
    return Response(_CREATED, b"", {"location": call.office.location.format(address=address, path=target.path)})


def _document(call: Call, doc_num: int) -> tuple[str, bytes]:
    row = needed(call, doc_num)
    spec = call.practice.spec(doc_num)
    if spec is None or not call.practice.file_is_there(doc_num):
        raise Refusal(_BAD, "File not found")
    return str(row["FileName"]), spec.render()


def _composite(call: Call, mount_num: int) -> tuple[str, bytes]:
    if call.practice.row("mount", mount_num) is None:
        raise Refusal(_MISSING, "Mount not found")
    return f"mount{mount_num}.jpg", call.practice.composite(mount_num).render()


def _extension(name: str) -> str:
    _, dot, extension = name.rpartition(".")  # as .NET's Path.GetExtension: `...jpg` has one, too
    return f"{dot}{extension}".lower()


def _folder(target: Target) -> Target:
    """The address of these methods is a folder, with or without its last slash."""
    if target.path.endswith("/") or not target.path:
        return target
    return Target(target.host, target.port, target.path + "/", target.username, target.password)


def _put_all(call: Call, folder: Target, files: list[tuple[int, str, bytes]]) -> list[Row]:
    """Place files (DocNum, name, bytes) under their own names; those that the site does not take are left out."""
    placed: list[Row] = []
    for doc_num, name, data in files:
        with suppress(NotTaken):
            call.put(folder.named(name), data)
            placed.append({"DocNum": doc_num, "FileName": name})
    return placed


def download_mount(call: Call) -> Response:
    """Documents POST DownloadMount: all images inside one mount, under their own names."""
    folder = _folder(call.target())
    mount_num = call.number("MountNum")
    if call.practice.row("mount", mount_num) is None:
        raise Refusal(_MISSING, "Mount not found.")
    files: list[tuple[int, str, bytes]] = []
    for row in call.practice.mount_images(mount_num):
        spec = call.practice.spec(row["DocNum"])
        if spec is not None and call.practice.file_is_there(row["DocNum"]):
            files.append((row["DocNum"], row["FileName"], spec.render()))
    placed = _put_all(call, folder, files)
    if not placed:
        return json_response("No mount images could be downloaded.")
    return json_response(placed, _CREATED)


def thumbnails(call: Call) -> Response:
    """Documents POST Thumbnails: every standard image outside mounts, 100 x 100, under the original's name."""
    folder = _folder(call.target())
    pat_num = call.patient(call.number("PatNum"))
    rows = call.practice.rows("SELECT DocNum, FileName FROM document WHERE PatNum = ? ORDER BY DocNum", pat_num)
    if not rows and not call.practice.rows("SELECT 1 FROM mount WHERE PatNum = ? LIMIT 1", pat_num):
        raise Refusal(_MISSING, "No documents exist for this patient")
    grey = call.struck("grey_thumbnails") is not None
    files = [
        (row["DocNum"], row["FileName"], call.practice.thumbnail(row["DocNum"], grey=grey))
        for row in rows
        if call.practice.has_thumbnail(row["DocNum"])
    ]
    placed = _put_all(call, folder, files)
    if not placed:
        return json_response("No documents could be made into thumbnails.")
    return json_response(placed, _CREATED)


def upload_sftp(call: Call) -> Response:
    """Documents POST UploadSftp: the office fetches a file from the site and makes a document of it."""
    target = call.target()
    pat_num = call.patient(call.number("PatNum"))
    if not _extension(target.file_name):
        raise Refusal(_BAD, "SftpAddress has an invalid file extension")
    columns = given_columns(call)
    try:
        data = call.office.site.read(target)
    except SiteError as error:
        raise Refusal(_BAD, f"Sftp connection error: {error}") from error
    extension = _extension(target.file_name)[1:]
    number = call.practice.add_document(pat_num, extension, file_name=target.file_name, data=data, **columns)
    row = needed(call, number)
    answer = {
        "DocNum": number,
        "filePath": call.practice.file_path(row),
        "Description": row["Description"],
        "ToothNumbers": row["ToothNumbers"],
        "Note": row["Note"],
        "DateCreated": row["DateCreated"],
        "DateTStamp": row["DateTStamp"],
        "DocCategory": row["DocCategory"],
        "docCategory": category_names(call).get(row["DocCategory"], ""),
        "serverDateTime": call.practice.local(),
    }
    return json_response(answer, _CREATED, location=f"/api/v1/documents/{number}")
