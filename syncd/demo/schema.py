"""The part of Open Dental's database that a mirror meets: tables, columns and enumerations as the vendor's schema
names them.

The columns are a selection. DateTimes are text in the office's local time, without zone, to the second, as MySQL
gives them.
"""

TABLES = """
CREATE TABLE patient (PatNum INTEGER PRIMARY KEY, LName TEXT, FName TEXT, MiddleI TEXT DEFAULT '',
  Preferred TEXT DEFAULT '', PatStatus INTEGER, Gender INTEGER DEFAULT 0, Birthdate TEXT, SSN TEXT,
  Address TEXT, City TEXT,  State TEXT, Zip TEXT,
  HmPhone TEXT, Email TEXT, ChartNumber TEXT DEFAULT '', PriProv INTEGER DEFAULT 1, ClinicNum INTEGER DEFAULT 0,
  DateTStamp TEXT);
CREATE TABLE document (DocNum INTEGER PRIMARY KEY, Description TEXT DEFAULT '', DateCreated TEXT, DocCategory INTEGER,
  PatNum INTEGER, FileName TEXT, ImgType INTEGER DEFAULT 0, IsFlipped INTEGER DEFAULT 0, DegreesRotated REAL DEFAULT 0,
  ToothNumbers TEXT DEFAULT '', Note TEXT DEFAULT '', SigIsTopaz INTEGER DEFAULT 0, Signature TEXT DEFAULT '',
  CropX INTEGER DEFAULT 0, CropY INTEGER DEFAULT 0, CropW INTEGER DEFAULT 0, CropH INTEGER DEFAULT 0,
  WindowingMin INTEGER DEFAULT 0, WindowingMax INTEGER DEFAULT 255, MountItemNum INTEGER DEFAULT 0, DateTStamp TEXT,
  RawBase64 TEXT DEFAULT '', Thumbnail TEXT DEFAULT '', ExternalGUID TEXT DEFAULT '', ExternalSource TEXT DEFAULT '',
  ProvNum INTEGER DEFAULT 0, IsCropOld INTEGER DEFAULT 0, OcrResponseData TEXT DEFAULT '',
  PrintHeading INTEGER DEFAULT 0);
CREATE INDEX document_PatNum ON document (PatNum, MountItemNum);
CREATE INDEX document_MountItemNum ON document (MountItemNum);
CREATE TABLE mount (MountNum INTEGER PRIMARY KEY, PatNum INTEGER, DocCategory INTEGER, DateCreated TEXT,
  Description TEXT DEFAULT '', Note TEXT DEFAULT '', Width INTEGER DEFAULT 800, Height INTEGER DEFAULT 600,
  ColorBack INTEGER DEFAULT 0, ProvNum INTEGER DEFAULT 0, FlipOnAcquire INTEGER DEFAULT 0,
  AdjModeAfterSeries INTEGER DEFAULT 0);
CREATE INDEX mount_PatNum ON mount (PatNum);
CREATE TABLE mountitem (MountItemNum INTEGER PRIMARY KEY, MountNum INTEGER, Xpos INTEGER, Ypos INTEGER,
  ItemOrder INTEGER, Width INTEGER, Height INTEGER, RotateOnAcquire INTEGER DEFAULT 0, ToothNumbers TEXT DEFAULT '',
  TextShowing TEXT DEFAULT '', FontSize REAL DEFAULT 0);
CREATE INDEX mountitem_MountNum ON mountitem (MountNum);
CREATE TABLE sheet (SheetNum INTEGER PRIMARY KEY, SheetType INTEGER, PatNum INTEGER, DateTimeSheet TEXT,
  InternalNote TEXT DEFAULT '', Description TEXT DEFAULT '', IsWebForm INTEGER DEFAULT 0, IsDeleted INTEGER DEFAULT 0,
  SheetDefNum INTEGER DEFAULT 0, DocNum INTEGER DEFAULT 0, ClinicNum INTEGER DEFAULT 0, DateTSheetEdited TEXT);
CREATE INDEX sheet_PatNum ON sheet (PatNum);
CREATE TABLE appointment (AptNum INTEGER PRIMARY KEY, PatNum INTEGER, AptStatus INTEGER DEFAULT 1,
  Pattern TEXT DEFAULT '/XX/',
  Op INTEGER DEFAULT 1, Note TEXT DEFAULT '', ProvNum INTEGER DEFAULT 1, AptDateTime TEXT, ClinicNum INTEGER DEFAULT 0,
  IsNewPatient INTEGER DEFAULT 0, DateTStamp TEXT);
CREATE INDEX appointment_AptDateTime ON appointment (AptDateTime);
CREATE TABLE definition (DefNum INTEGER PRIMARY KEY, Category INTEGER, ItemOrder INTEGER, ItemName TEXT,
  IsHidden INTEGER DEFAULT 0);
"""

KEYS = {
    "patient": "PatNum",
    "document": "DocNum",
    "mount": "MountNum",
    "mountitem": "MountItemNum",
    "sheet": "SheetNum",
    "appointment": "AptNum",
    "definition": "DefNum",
}
"""Each table's primary key: numbered from 1 of its own, so that DocNum 5 and MountNum 5 are different things."""

STAMPED = frozenset({"patient", "document", "appointment"})
"""Tables whose DateTStamp MySQL sets whenever a column really changes. Mounts have none."""

IMAGE_CATEGORIES = 18
"""definition.Category of the document categories."""

CATEGORIES = {14: "Lab Cases", 47: "Patient Pictures", 135: "Scans", 136: "Letters", 190: "Xray", 191: "Insurance"}
"""The practice's document categories, by DefNum; the first is the default."""

IMG_TYPES = ("Document", "Radiograph", "Photo", "File", "Attachment")
PAT_STATUSES = ("Patient", "NonPatient", "Inactive", "Archived", "Deleted", "Deceased", "Prospective")
APT_STATUSES = ("None", "Scheduled", "Complete", "UnschedList", "ASAP", "Broken", "Planned")
SHEET_TYPES = (
    "LabelPatient", "LabelCarrier", "LabelReferral", "ReferralSlip", "LabelAppointment", "Rx", "Consent",
    "PatientLetter",
    "ReferralLetter", "PatientForm", "RoutingSlip", "MedicalHistory", "LabSlip", "ExamSheet", "DepositSlip",
)  # fmt: skip

SHEET_DEFS = {
    20: ("ExamSheet", "Exam"),
    22: ("Consent", "Consent to treatment"),
    23: ("PatientForm", "New patient form"),
    24: ("MedicalHistory", "Medical History Simple"),
    25: ("PatientLetter", "Custom Patient Letter"),
}
"""The sheet definitions of the practice: SheetDefNum -> (SheetType, Description)."""

NEVER = "0001-01-01 00:00:00"
"""How the vendor writes a DateTime that was never set, as on very old sheets."""

READ_ALL = "ApiReadAll"
"""The permission of a key that can list, but never download."""

ALL_PERMISSIONS = (READ_ALL, "ApiComm", "ApiDocuments", "ApiAllOthers", "ApiQueries")
"""What a key of the tier that downloads may do."""
