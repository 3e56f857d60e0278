"""What lies in the archive's folders, read back: sound sidecars with their files, tombstones, patients, and all else.

Only what is of the layout of design.md section 5 counts as syncd's; everything else is a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, cast

from syncd.errors import UnreadableError
from syncd.folders import Folders, one_file, read_json, size_of
from syncd.model import TOMBSTONE, Item, Kind, Patient, Tombstone, Version
from syncd.naming import archive_path_is_ours
from syncd.sidecar import tombstone_from, version_from_sidecar

PATIENT_KEYS: Final = {"pat_num", "last_name", "first_name", "preferred", "birthdate", "status"}


def read_version(relative: str, folder: int) -> Version | None:
    """A sound sidecar of this very place whose file is there with its size, else None."""
    try:
        version = version_from_sidecar(read_json(Path(relative).name, folder))
        with one_file():
            whole = size_of(Path(version.path).name, folder) == version.bytes
    except (ValueError, UnreadableError):
        return None
    return version if whole and version.sidecar_path == relative else None


def scan(folders: Folders, relative: str) -> list[Version | Tombstone | str]:
    """One item's folder: its versions in order, then the paths of all else; or its tombstone, and nothing beside it."""
    if (tombstone := tombstone_in(folders, relative)) is not None:
        return [tombstone]
    paths = {f"{relative}/{name}" for name in folders.entries(relative)}
    found = (read_version(path, folders.get(relative)) for path in paths if path.endswith(".json"))
    versions = sorted(filter(None, found), key=lambda version: (version.version, version.sidecar))
    claimed = {path for version in versions for path in (version.path, version.sidecar_path)}
    return [*versions, *sorted(paths - claimed)]


def tombstone_in(folders: Folders, relative: str) -> Tombstone | None:
    """What says that the item of this folder was destroyed."""
    if TOMBSTONE not in folders.entries(relative):
        return None
    kind, _, num = Path(relative).name.rpartition("-")
    item = Item(int(relative.split("/")[1]), cast("Kind", kind), int(num))
    return tombstone_from(read_json(TOMBSTONE, folders.get(relative)), item)


def patient_in(folders: Folders, pat_num: int) -> Patient | None:
    """A patient as a sound patient.json tells; None without one."""
    content = read_json("patient.json", folders.get(f"patients/{pat_num}"))
    if content.keys() != PATIENT_KEYS or content.pop("pat_num") != pat_num:
        return None
    fields = {key: value for key, value in content.items() if isinstance(value, str)}
    return Patient(pat_num=pat_num, stamp="", **fields) if fields == content else None


def patients_in(folders: Folders) -> dict[str, bool]:
    """What lies in `patients`, and whether it is a patient's folder."""
    entries = folders.entries("patients").items()
    return {name: is_folder and archive_path_is_ours(f"patients/{name}/patient.json") for name, is_folder in entries}


def walk_patient(folders: Folders, pat_num: int) -> Iterator[Version | Tombstone | str]:
    """Everything below a patient's folder, as `scan` has it; of a folder that the disk does not give, its path."""
    top = f"patients/{pat_num}"
    try:
        inside = folders.entries(top)
    except UnreadableError:
        yield top
        return
    for name, is_folder in inside.items():
        path = f"{top}/{name}"
        if is_folder and archive_path_is_ours(f"{path}/1-{'0' * 12}.bin"):
            try:
                found: Sequence[Version | Tombstone | str] = scan(folders, path)
                folders.close(path)
            except UnreadableError:
                found = [path]
            yield from found
        elif name != "patient.json" or patient_in(folders, pat_num) is None:
            yield path
