"""What the people of a small practice do to its files in a year: one change of any kind at a time, by seed.

Whatever happens to the number of documents, it stays small: the more there are, the more often one is deleted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from syncd.demo.practice import Practice, Snapshot

DOCUMENTS = 40  # about so many outside mounts
PATIENTS = 8
MOUNTS = 5
LOOSE = "FROM document WHERE MountItemNum = 0 AND Note = ''"  # with a file of their own
LATE = (2.0, 900.0, 5 * 3600.0)  # seconds from a row to its file


class Staff:
    """Everybody who works with one practice's database.

    `done` counts the changes by name. `unseen` are documents and mounts whose files changed while no listing tells
    so: the mirror learns of it when it fetches them again by age (design.md section 7), or when somebody edits them.
    """

    def __init__(self, practice: Practice, seed: int) -> None:
        self.practice = practice
        self.done: Counter[str] = Counter()
        self.unseen: set[tuple[str, int]] = set()
        self._rng = random.Random(f"staff {seed}")
        self._backup: Snapshot | None = None
        self._away: int | None = None
        self._kinds: list[tuple[Callable[[], object], float]] = [
            (self._scan, 12),
            (self._x_ray, 14),
            (self._row_before_file, 3),
            (self._write_sheet, 6),
            (self._edit_sheet, 8),
            (self._delete_sheet, 5),
            (self._edit, 12),
            (self._replace, 14),
            (self._replace_quietly, 2),
            (self._delete, 8),
            (self._move, 4),
            (self._move_keeping_the_number, 2),
            (self._merge, 0.3),
            (self._new_patient, 1),
            (self._patient_leaves_or_returns, 2),
            (self._touch_patient, 2),
            (self._new_mount, 2),
            (self._delete_mount, 1),
            (self._change_mount, 4),
            (self._into_mount, 3),
            (self._out_of_mount, 2),
            (self._replace_in_mount, 2),
            (self._upload, 4),
            (self._link, 1),
            (self._materialise, 5),
            (self._back_up, 1),
            (self._restore, 0.5),
        ]

    def open_practice(self) -> None:
        """What is there before the mirror is: patients, one of them with a full list, and a mount."""
        for _ in range(4):
            self.practice.add_patient()
        for _ in range(24):
            self.practice.add_sheet(1)
        for _ in range(10):
            self._x_ray()
        self._new_mount()

    def act(self, times: int) -> None:
        """So many changes that are possible now; none after a restore, which takes the rest of the day."""
        for _ in range(times):
            if self._act() == "restore":
                return

    def _act(self) -> str:
        tasks, weights = zip(*self._kinds, strict=True)
        task = self._rng.choices(tasks, weights)[0]
        name: str = task.__name__.strip("_")
        self.done[name] += 1
        task()
        return name

    def show(self) -> None:
        """Edit what changed unseen, so that listings tell; whoever was away comes back."""
        if self._away is not None:
            self._patient_leaves_or_returns()
        for table, num in sorted(self.unseen):
            if self.practice.row(table, num) is not None:
                (self.practice.edit_document if table == "document" else self.practice.change_mount)(num)
        self.unseen.clear()

    # --- whom and what it concerns

    def _patient(self) -> int:
        sql = "SELECT PatNum FROM patient WHERE PatNum <> ? ORDER BY PatNum"
        return int(self._rng.choice(self.practice.rows(sql, self._away or 0))["PatNum"])

    def _one(self, key: str, source: str, *values: object) -> int | None:
        found = self.practice.rows(f"SELECT {key} {source} ORDER BY {key}", *values)
        return int(self._rng.choice(found)[key]) if found else None

    def _document(self) -> int:
        return self._one("DocNum", LOOSE) or self._x_ray()

    def _mount(self) -> int:
        return self._one("MountNum", "FROM mount") or self._new_mount()

    def _changed_unseen(self, mount_num: int) -> None:
        self.unseen.add(("mount", mount_num))

    # --- documents

    def _scan(self) -> int:
        return self.practice.add_document(self._patient(), self._rng.choice(("pdf", "tif", "txt", "docx")), size=900)

    def _x_ray(self) -> int:
        return self.practice.add_document(self._patient(), self._rng.choice(("jpg", "png")), size=900)

    def _row_before_file(self) -> None:
        self.practice.add_document(self._patient(), "jpg", size=900, file_after=self._rng.choice(LATE))

    def _edit(self) -> None:
        self.practice.edit_document(self._document())

    def _replace(self) -> None:
        self.practice.replace_bytes(self._document())

    def _replace_quietly(self) -> None:
        number = self._document()
        self.practice.replace_bytes(number, bump=False)
        self.unseen.add(("document", number))

    def _delete(self) -> None:
        self.practice.delete_document(self._document())
        while self.practice.rows(f"SELECT count(*) AS n {LOOSE}")[0]["n"] > DOCUMENTS:
            self.practice.delete_document(self._document())

    def _move(self) -> None:
        self.practice.move_document(self._document(), self._patient())

    def _move_keeping_the_number(self) -> None:
        self.practice.move_document(self._document(), self._patient(), keep_number=True)

    def _upload(self) -> None:
        pat_num = self._patient()
        text = f"PatNum={pat_num} uploaded, {self._rng.random()}\r\n"
        self.practice.add_raw_document(pat_num, text.encode(), ".txt")

    def _link(self) -> None:
        self.practice.add_url_document(self._patient(), "https://files.example.org/scan.jpg")

    def _materialise(self) -> None:
        number = self._one("DocNum", "FROM document WHERE Note <> ''")
        if number is not None:
            self.practice.materialise(number)

    # --- sheets and mounts

    def _write_sheet(self) -> None:
        self.practice.add_sheet(self._patient())

    def _edit_sheet(self) -> None:
        number = self._one("SheetNum", "FROM sheet WHERE IsDeleted = 0")
        if number is not None:
            self.practice.edit_sheet(number)

    def _delete_sheet(self) -> None:
        number = self._one("SheetNum", "FROM sheet WHERE IsDeleted = 0")
        if number is not None:
            self.practice.delete_sheet(number)

    def _new_mount(self) -> int:
        while self.practice.rows("SELECT count(*) AS n FROM mount")[0]["n"] >= MOUNTS:
            self._delete_mount()
        return self.practice.add_mount(self._patient(), self._rng.randint(1, 3))

    def _delete_mount(self) -> None:
        self.practice.delete_mount(self._mount())

    def _change_mount(self) -> None:
        self.practice.change_mount(self._mount())

    def _into_mount(self) -> None:
        mount = self._mount()
        where = f"{LOOSE} AND ImgType = 1 AND PatNum = ?"
        image = self._one("DocNum", where, self.practice.need("mount", mount)["PatNum"])
        if image is not None:
            self.practice.move_into_mount(image, mount)
            self._changed_unseen(mount)

    def _out_of_mount(self) -> None:
        mount = self._mount()
        images = self.practice.mount_images(mount)
        if len(images) > 1:
            self.practice.out_of_mount(images[-1]["DocNum"])
            self._changed_unseen(mount)

    def _replace_in_mount(self) -> None:
        mount = self._mount()
        for image in self.practice.mount_images(mount)[:1]:
            self.practice.replace_bytes(image["DocNum"])
            self._changed_unseen(mount)

    # --- patients and the whole database

    def _touch_patient(self) -> None:
        self.practice.touch_patient(self._patient())

    def _new_patient(self) -> None:
        if self.practice.rows("SELECT count(*) AS n FROM patient")[0]["n"] < PATIENTS:
            self.practice.add_patient()

    def _patient_leaves_or_returns(self) -> None:
        if self._away is None:
            self._away = self._patient()
            self.practice.set_patient_status(self._away, "Deleted")
        else:
            self.practice.set_patient_status(self._away, "Patient")
            self._away = None

    def _merge(self) -> None:
        source, into = self._patient(), self._patient()
        if source != into:
            self.practice.merge_patients(source, into)

    def _back_up(self) -> None:
        if self._away is None:
            self._backup = self.practice.snapshot()

    def _restore(self) -> None:
        """The database goes back to its last backup: what came later is gone, and its numbers come again."""
        if self._backup is None:
            return
        self.practice.restore_from_backup(self._backup)
        self._backup, self._away = self.practice.snapshot(), None
        self.forget()

    def forget(self) -> None:
        """Whatever anybody knew of what is in a mount, or in a file, may be wrong."""
        for table, key in (("document", "DocNum"), ("mount", "MountNum")):
            self.unseen |= {(table, row[key]) for row in self.practice.rows(f"SELECT {key} FROM {table}")}
