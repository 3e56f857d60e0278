"""What the simulated practice really holds: the measure for every mirror, and the history of every file."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from syncd.demo.files import FileSpec
from syncd.demo.schema import PAT_STATUSES

if TYPE_CHECKING:
    from syncd.demo.practice import Practice

RAW_MARK = "_rawBase64_:"
URL_MARK = "_download_:"

_SITE_NAME_BYTES = 255


@dataclass(frozen=True)
class Event:
    """One thing that happened to an item, as a perfect observer saw it.

    `at`: seconds since the epoch. `what`: appeared, changed (new bytes, or a sheet's new stamp), stamped (same
    bytes), gone. `kind`: document, mount, mount-image or sheet. `pat_num`: who held it then. `spec`: the bytes then;
    None for sheets and for rows without a file.
    """

    at: float
    what: Literal["appeared", "changed", "stamped", "gone"]
    kind: str
    num: int
    pat_num: int
    stamp: str
    spec: FileSpec | None

    @property
    def bytes(self) -> bytes | None:
        """The file's bytes at that time, or None."""
        return None if self.spec is None else self.spec.render()


@dataclass(frozen=True)
class SheetTruth:
    """A sheet that must be mirrored: its stamp, and the text that its PDF must hold, whenever it was rendered."""

    stamp: str
    identity: bytes


@dataclass
class PatientTruth:
    """What a perfect mirror holds of one patient now. Numbers are DocNum, MountNum and SheetNum.

    `documents`: not in mounts, with true bytes (uploaded rows decoded). `mounts`: composites. `mount_images`: DocNum
    -> (MountNum, bytes). `thumbnails`: documents that the vendor makes thumbnails of. `pending`: rows whose file the
    office has not fetched yet (`_download_`).
    """

    pat_num: int
    documents: dict[int, bytes] = field(default_factory=dict)
    mounts: dict[int, bytes] = field(default_factory=dict)
    mount_images: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    sheets: dict[int, SheetTruth] = field(default_factory=dict)
    thumbnails: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    stamps: dict[int, str] = field(default_factory=dict)


def collect(practice: "Practice") -> dict[int, PatientTruth]:
    """The truth of every patient who is not Deleted, by PatNum."""
    deleted = PAT_STATUSES.index("Deleted")
    patients = practice.rows("SELECT PatNum FROM patient WHERE PatStatus <> ?", deleted)
    truth = {row["PatNum"]: PatientTruth(row["PatNum"]) for row in patients}
    _collect_documents(practice, truth)
    for row in practice.rows("SELECT MountNum, PatNum FROM mount"):
        if row["PatNum"] in truth:
            truth[row["PatNum"]].mounts[row["MountNum"]] = practice.composite(row["MountNum"]).render()
    for row in practice.rows("SELECT SheetNum, PatNum, DateTSheetEdited FROM sheet WHERE IsDeleted = 0"):
        if row["PatNum"] in truth:
            stamp = row["DateTSheetEdited"]
            spec = FileSpec(practice.name, row["PatNum"], "sheet", row["SheetNum"], stamp.replace(" ", "T"), "pdf")
            truth[row["PatNum"]].sheets[row["SheetNum"]] = SheetTruth(stamp, spec.line().encode())
    return truth


def _collect_documents(practice: "Practice", truth: dict[int, PatientTruth]) -> None:
    columns = "d.DocNum, d.PatNum, d.FileName, d.Note, d.DateTStamp, i.MountNum"
    joined = "document d LEFT JOIN mountitem i ON i.MountItemNum = d.MountItemNum AND d.MountItemNum <> 0"
    for row in practice.rows(f"SELECT {columns} FROM {joined}"):  # noqa: S608  (constants above)
        patient = truth.get(row["PatNum"])
        if patient is None:
            continue
        doc_num, spec = row["DocNum"], practice.spec(row["DocNum"])
        patient.stamps[doc_num] = row["DateTStamp"]
        if spec is None:
            patient.pending.add(doc_num)
        elif row["MountNum"] is not None:
            patient.mount_images[doc_num] = (row["MountNum"], spec.render())
        else:
            patient.documents[doc_num] = spec.render()
            if practice.has_thumbnail(doc_num) and can_be_placed(row["FileName"]):
                patient.thumbnails.add(doc_num)


def can_be_placed(file_name: str) -> bool:
    """A name that stays in its folder, that a file system takes, and that an answer shows as it is.

    Thumbnails and the images of a mount keep their originals' names; what has another name may or may not arrive.
    """
    return "/" not in file_name and file_name.isprintable() and len(file_name.encode()) <= _SITE_NAME_BYTES
