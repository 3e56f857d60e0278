"""The words of syncd: frozen records that every floor may use.

Times named `_at` are seconds since the epoch, UTC, as float. Stamps and server times are the vendor's own strings, in
the office's local time without a zone; they are compared for equality only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Kind = Literal["document", "mount", "mount-image", "sheet", "thumbnail"]
KINDS: tuple[Kind, ...] = ("document", "mount", "mount-image", "sheet", "thumbnail")
ListName = Literal["documents", "sheets"]
ListKey = tuple[int, ListName]  # (pat_num, list)
# What one request asks Open Dental to place. mount-images: every image of one mount; mount-image: one of them alone,
# where the whole mount is too much for 60 s; thumbnails: of one patient.
Method = Literal["document", "mount", "mount-image", "mount-images", "sheet", "thumbnails"]
KIND_OF: Mapping[str, Kind] = {
    "document": "document",
    "mount": "mount",
    "mount-image": "mount-image",
    "mount-images": "mount",
    "sheet": "sheet",
    "thumbnails": "thumbnail",
    "confirm": "document",
}
FieldValue = str | int | None
LARGEST_KEY: Final = 2**63 - 1  # the vendor says bigint


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """The identity of everything archived. The same number under another patient is another item."""

    pat_num: int
    kind: Kind
    num: int

    @property
    def id(self) -> str:
        """As people type it: `document-34`."""
        return f"{self.kind}-{self.num}"

    @property
    def full_id(self) -> str:
        """Unambiguous where a number was seen under several patients: `101/document-34`."""
        return f"{self.pat_num}/{self.kind}-{self.num}"


@dataclass(frozen=True, slots=True)
class Upload:
    """A row that another program uploaded and nobody has opened yet: its bytes are in Note, or only a URL is.

    `content` is the decoded file (`_rawBase64_`), or None for `_download_`, whose URL is never followed; `bad`: there
    is a file, but it cannot be decoded, so a placement has to bring it. `extension` has no dot.
    """

    extension: str
    content: bytes | None
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """One row of a complete listing, or of the single GET.

    `fields` holds every known listing field under the vendor's name, None where the answer lacked it; Note never holds
    base64. `file_name` is None when the listing does not tell it.
    """

    item: Item
    revision: str
    stamp: str
    date_created: str
    server_time: str
    file_name: str | None
    fields: Mapping[str, FieldValue]
    upload: Upload | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a list method, in the vendor's order."""

    rows: tuple[Listed, ...]


@dataclass(frozen=True, slots=True)
class Patient:
    """What the roster tells and a mirror needs; everything else of the row is dropped at the parser."""

    pat_num: int
    status: str
    stamp: str
    last_name: str
    first_name: str
    preferred: str
    birthdate: str


@dataclass(frozen=True, slots=True)
class Appointment:
    """One row of GET /appointments. `starts`: AptDateTime, local time of the office; `status`: AptStatus."""

    pat_num: int
    starts: str
    status: str


@dataclass(frozen=True, slots=True)
class PlacedName:
    """One file of a Thumbnails or DownloadMount answer."""

    doc_num: int
    file_name: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The answer to an upload: the new number. `lacking`: names of sent fields that the answer shows otherwise."""

    doc_num: int
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One journalled placement: written before the request, so that no file on the drop is ever unknown to us.

    `staging` is a path on the drop, relative to the login folder; it ends in `/` where the names inside are not ours
    to choose. `names` is the answer of such a call. `seen` is (size, mtime) of an unanswered file at the first look.
    """

    id: int
    method: Method
    pat_num: int
    num: int
    revision: str
    staging: str
    state: Literal["asked", "placed", "unanswered", "cleaning"]
    asked_at: float
    placed_at: float | None
    listed_at: float
    why: str
    listed: Mapping[str, object]
    names: tuple[PlacedName, ...] = ()
    looks: int = 0
    next_look_at: float = 0.0
    seen: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Duty:
    """One thing the API lane owes a request for. `why`: listed, backfill, refetch, repair, retry, moved, confirm.

    "backfill" is what a list held when it was first read, until another revision of it is listed. `method` "confirm"
    asks the single GET about a document that left its listing.
    """

    method: Method | Literal["confirm"]
    pat_num: int
    num: int
    revision: str
    why: str
    next_try_at: float
    failures: int = 0
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class PullJob:
    """Read one remote file to one local file that does not exist yet. `cap` in bytes."""

    remote: bytes
    local: Path
    cap: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """A file that was read to exactly its size, with EOF right behind it and its attributes unchanged.

    `head` and `tail` are its first 512 and last 64 bytes, for recognising its type and its end. Not synced to disk: the
    archive does that when it publishes.
    """

    size: int
    sha256: str
    mtime: int
    head: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """Attributes of a remote name: size in bytes, mtime in whole seconds of the site's clock.

    `mode`: as st_mode, 0 where the site tells none; two looks may differ in it.
    """

    size: int
    mtime: int
    regular: bool
    mode: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Version:
    """One sidecar's content: what was archived, from which listing, when, and how.

    The first sidecar of a version carries new bytes; `sidecar` 2, 3, ... record newer revisions with equal bytes.
    `path` is the media file, relative to the archive. `listing` holds the listing's fields under the vendor's names.
    """

    seq: int
    item: Item
    mount_num: int | None
    version: int
    sidecar: int
    revision: str
    sha256: str
    bytes: int
    extension: str
    media_type: str
    file_name: str | None
    listed_at: float
    placed_at: float
    archived_at: float
    first_seen_at: float
    method: str
    flags: tuple[str, ...] = ()
    mount_images: tuple[int, ...] | None = None
    source_revision: str | None = None
    listing: Mapping[str, FieldValue] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The item's folder, relative to the archive."""
        return f"patients/{self.item.pat_num}/{self.item.id}"

    @property
    def path(self) -> str:
        """The media file, relative to the archive: integers, hex and an allow-listed extension only."""
        return f"{self.folder}/{self.version}-{self.sha256[:12]}.{self.extension}"

    @property
    def sidecar_path(self) -> str:
        """This sidecar, relative to the archive."""
        suffix = "json" if self.sidecar == 1 else f"{self.sidecar}.json"
        return f"{self.folder}/{self.version}-{self.sha256[:12]}.{suffix}"


WAS: Final = "was:"  # begins the flag by which the sidecars of a document that was put back tell its old full id
DESTROYED: Final = "destroyed"  # stands in `became` of an item that was destroyed by order


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of an item that was destroyed by order: ids, digests of its versions, who, when, and the ticket.

    `seq`: one number for all that one order destroyed.
    """

    item: Item
    seq: int
    at: float
    actor: str
    ticket: str
    digests: tuple[str, ...]

    @property
    def path(self) -> str:
        """Its place, relative to the archive: in the item's folder, whose only file it is in the end."""
        return f"patients/{self.item.pat_num}/{self.item.id}/{TOMBSTONE}"


TOMBSTONE: Final = "destroyed.json"


def kin(item: Item) -> tuple[Item, ...]:
    """All that one number can be of one patient: a document, later perhaps an image in a mount, and its thumbnail."""
    kinds: tuple[Kind, ...] = ("document", "mount-image", "thumbnail")
    return tuple(Item(item.pat_num, kind, item.num) for kind in kinds) if item.kind in kinds else (item,)


def lists_of(kinds: Collection[Kind]) -> list[ListName]:
    """The lists that these kinds come from; no other is polled. Sheets have their own, all else the documents'."""
    documents: list[ListName] = ["documents"] if set(kinds) - {"sheet"} else []
    return [*documents, "sheets"] if "sheet" in kinds else documents


@dataclass(frozen=True, slots=True)
class ListState:
    """What is known of one list: when it was last polled completely, its rows, its newest stamp (epoch seconds)."""

    key: ListKey
    polled_at: float
    rows: int
    newest: float | None
