"""The JSON beside each archived file: everything the index needs to be rebuilt. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any, Final

from syncd.model import Item, Tombstone, Version
from syncd.naming import EXTENSIONS, archive_path_is_ours

SCHEMA_VERSION: Final = 1
_TIMES: Final = ("listed_at", "placed_at", "archived_at", "first_seen_at")
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("schema_version", "seq", "num", "pat_num", "version", "sidecar", "bytes"), (int,)),
    **dict.fromkeys(("kind", "revision", "sha256", "extension", "media_type", "method", *_TIMES, "checksum"), (str,)),
    **dict.fromkeys(("file_name", "source_revision"), (str, type(None))),
    **{"mount_images": (list, type(None)), "mount_num": (int, type(None)), "listing": (dict,), "flags": (list,)},  # noqa: PIE800 - one line
}


def iso(moment: float) -> str:
    """A time as the archive writes it: ISO 8601, UTC, to the microsecond."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text).timestamp()
    if iso(moment) != text:
        raise ValueError("not a time as syncd writes it")
    return moment


def sidecar_content(version: Version) -> dict[str, object]:
    """What a sidecar holds: the version, flat, and a checksum over all of it."""
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    content |= {field.name: getattr(version, field.name) for field in fields(Version)}  # asdict() copies the listing
    content |= asdict(content.pop("item"))
    content |= {key: iso(content[key]) for key in _TIMES}
    content |= {key: list(content[key]) for key in ("flags", "mount_images") if content[key] is not None}
    content["listing"] = dict(content["listing"])
    return content | {"checksum": _checksum(content)}


def encode(content: Mapping[str, object]) -> bytes:
    """A small JSON file as the archive writes it: one form only, so that every changed bit shows."""
    return json.dumps(content, sort_keys=True, indent=1).encode()


def _checksum(content: Mapping[str, object]) -> str:
    said = json.dumps({key: value for key, value in content.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def decode(text: bytes) -> Version | None:
    """The version that a sidecar's bytes tell of; None when they are not, to the bit, what was written."""
    try:
        content = json.loads(text.decode())
        version = version_from_sidecar(content) if isinstance(content, dict) else None
    except (ValueError, RecursionError):
        return None
    return version if encode(content) == text else None


def tombstone_content(tombstone: Tombstone) -> dict[str, object]:
    """What a tombstone's file holds: the tombstone, flat, and a checksum over all of it."""
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(tombstone)}
    content |= content.pop("item")
    content |= {"at": iso(tombstone.at), "digests": list(tombstone.digests)}
    return content | {"checksum": _checksum(content)}


def tombstone_from(content: Mapping[str, Any], item: Item) -> Tombstone | None:
    """The tombstone of this very item; None for anything that is not, to the letter, what was written."""
    try:
        told = (content["seq"], _moment(content["at"]), content["actor"], content["ticket"], tuple(content["digests"]))
        tombstone = Tombstone(item, *told)
    except (KeyError, TypeError, ValueError):
        return None
    return tombstone if tombstone_content(tombstone) == content else None


def version_from_sidecar(content: Mapping[str, object]) -> Version:
    """The version a sidecar tells of. Raises ValueError for any other shape: nothing is guessed."""
    if content.keys() != _TYPES.keys() or content["schema_version"] != SCHEMA_VERSION:
        raise ValueError("not a sidecar of this schema")
    if any(type(content[key]) not in types for key, types in _TYPES.items()):
        raise ValueError("a field has another type")
    if _checksum(content) != content["checksum"]:
        raise ValueError("a field was changed after it was written")
    unwanted = {"schema_version", "checksum"}
    told: dict[str, Any] = {key: value for key, value in content.items() if key not in unwanted}
    told["item"] = Item(told.pop("pat_num"), told.pop("kind"), told.pop("num"))
    told |= {key: _moment(told[key]) for key in _TIMES} | {"flags": tuple(told["flags"])}
    told["mount_images"] = None if told["mount_images"] is None else tuple(told["mount_images"])
    version = Version(**told)
    sound = (
        path_is_ours(version)
        and version.bytes > 0
        and all(type(flag) is str for flag in version.flags)
        and all(type(number) is int for number in version.mount_images or ())
        and all(type(value) in (str, int, type(None)) for value in version.listing.values())
    )
    if not sound:
        raise ValueError("a field has a value that syncd never writes")
    return version


def path_is_ours(version: Version) -> bool:
    """Whether the version's file and sidecar are of the archive's layout, and its name has a whole sha256."""
    named = version.extension in EXTENSIONS and re.fullmatch("[0-9a-f]{64}", version.sha256)
    return bool(named) and archive_path_is_ours(version.path) and archive_path_is_ours(version.sidecar_path)
