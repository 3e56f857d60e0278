"""The archive on disk: published once, never overwritten, never deleted; its sidecars alone can rebuild the index.

Nothing below the root is reached through a symlink: folders are opened one by one with O_NOFOLLOW, files relative to
them. No call is made on a folder whose marker is absent or belongs to another archive.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, cast, get_args

from syncd.errors import ItemError, SiteError, SyncdError
from syncd.model import FieldValue, Item, Kind, Patient, Version
from syncd.naming import EXTENSIONS, archive_path_is_ours

MARKER: Final = ".syncd-archive"
SCHEMA_VERSION: Final = 1
_ROOT_NAMES: Final = frozenset({MARKER, "incoming", "published", "patients", "lost+found"})
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted FIFO must not block the opening
_FOLDER: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_CHUNK: Final = 1 << 20
_SIDECAR_CAP: Final = 1 << 24  # bytes; Note can be a long text
_NAME: Final = re.compile(r"([1-9][0-9]*)-[0-9a-f]{12}\.(?:[0-9]+\.)?([a-z]+[0-9]?)")
_SITE: Final[Mapping[int, str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "archive_full"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "archive_read_only"),
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ENODEV), "archive_missing"),
    errno.EIO: "disk_error",
}
_TIMES: Final = ("listed_at", "placed_at", "archived_at", "first_seen_at")
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("schema_version", "seq", "num", "pat_num", "version", "sidecar", "bytes"), (int,)),
    **dict.fromkeys(("kind", "revision", "sha256", "extension", "media_type", "method", *_TIMES), (str,)),
    **dict.fromkeys(("file_name", "source_revision"), (str, type(None))),
    **{"mount_num": (int, type(None)), "mount_images": (list, type(None)), "flags": (list,), "listing": (dict,)},
}


@dataclass(frozen=True, slots=True)
class Publication:
    """One sidecar to publish, with the pulled file in ARCHIVE/incoming, or None when its bytes are archived already."""

    version: Version
    source: Path | None


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def sidecar_content(version: Version) -> dict[str, object]:
    """What a sidecar holds. Times are ISO 8601, UTC, to the microsecond."""
    scalars = _TYPES.keys() - {"schema_version", "kind", "num", "pat_num", "flags", "mount_images", "listing"}
    content: dict[str, object] = {key: getattr(version, key) for key in scalars}
    content |= {key: _iso(getattr(version, key)) for key in _TIMES}
    content |= {"schema_version": SCHEMA_VERSION, "flags": list(version.flags), "listing": dict(version.listing)}
    content |= {"kind": version.item.kind, "num": version.item.num, "pat_num": version.item.pat_num}
    return content | {"mount_images": None if version.mount_images is None else list(version.mount_images)}


def version_from_sidecar(content: Mapping[str, object]) -> Version:
    """The version a sidecar tells of. Raises ValueError for any other shape: nothing is guessed."""
    if content.keys() != _TYPES.keys() or content["schema_version"] != SCHEMA_VERSION:
        raise ValueError("not a sidecar of this schema")
    if any(type(content[key]) not in types for key, types in _TYPES.items()):
        raise ValueError("a field has another type")
    get = cast("dict[str, object]", dict(content)).pop
