"""Door to this server as a whole: its commands and accounts, and files outside of syncd's own folders. Root's work."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from syncd.errors import ConfigError

RENAME_EXCHANGE: Final = 2  # renameat2(2)
AT_FDCWD: Final = -100
SECRET: Final = 0o600
PUBLIC: Final = 0o644
File = tuple[str, int]  # text and mode
Files = Mapping[str, File | None]  # by name; None: there shall be none


def run(*words: str, said: str | None = None) -> None:
    """A command of the system. `said`: on its stdin, for what must not stand in a process list. Raises ConfigError."""
    try:
        done = subprocess.run(words, input=said, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    except FileNotFoundError:
        raise ConfigError((f"{words[0]}: this server has no such command: install its package",)) from None
    if done.returncode:
        why = done.stderr.strip() if said is None else f"ended with {done.returncode}"
        raise ConfigError((f"{words[0]}: {why}",))


def make_user(user: str, home: str) -> None:
    """An account of the system that nobody can log in to, unless it is there."""
    with contextlib.suppress(KeyError):
        pwd.getpwnam(user)
        return
    shell = "/usr/sbin/nologin"
    run("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", home, "--shell", shell, user)


def put(path: Path, text: str, mode: int) -> None:
    """A durable new file, where there is none."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, text: str) -> None:
    """A file of systemd's, as a whole or not at all; without text there shall be none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if text:
        fresh = path.with_name(f".{path.name}.new")
        fresh.unlink(missing_ok=True)
        put(fresh, text, PUBLIC)
        fresh.replace(path)
    else:
        path.unlink(missing_ok=True)
    _sync(path.parent)


def switch(folder: Path, files: Files, group: str) -> None:
    """Put these files into a folder in one step: whoever looks sees all of them or none.

    A second folder is made beside /etc/syncd, with links to all other files, and the two change names. Only root and
    this group may look into it: an address to call may hold a token.
    """
    fresh = folder.parent.with_name(f".syncd-{folder.name}.new")
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    shutil.rmtree(fresh, ignore_errors=True)  # of a call that was cut
    try:
        if folder.exists():
            shutil.copytree(folder, fresh, copy_function=os.link, symlinks=True)
        else:
            fresh.mkdir()
        fresh.chmod(0o750)
        run("chown", f"root:{group}", str(fresh))
        for name, file in files.items():
            (fresh / name).unlink(missing_ok=True)  # a link: the old folder has the same file
            if file:
                put(fresh / name, *file)
        _sync(fresh)
        if folder.exists():
            _exchange(fresh, folder)
        else:
            fresh.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")
