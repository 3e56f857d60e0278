"""A file system in memory that forgets at a power cut whatever was not synced: the strictest reading of POSIX.

The bytes and the mode of a file survive if that file was synced; a name (made, linked, renamed, removed) survives if
its folder was synced. Everything else survives or not by a coin a piece, in any order, writes torn at 512 bytes: a
real file system is kinder, each in its own way (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).

It is served through FUSE by a forked process, and told what to do by extended attributes of its root:

    tree = Tree()
    with serving(tree, folder):
        ...
        set_word(folder, CUT, "7 0.5")    # seed of the coins, and the chance of what was not synced
        ...                               # every call fails with EIO; close all files
        set_word(folder, RESTORE, "")     # what survived is there
        set_word(folder, SAVE, "/path")   # the tree as it is, for another `serving(load(path), ...)`
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import itertools
import os
import pickle
import random
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

CUT, RESTORE, SAVE = "user.cut", "user.restore", "user.save"
SECTOR = 512
TORN = 0.3  # of the writes that survive without a sync
STARTUP = 10.0  # seconds
POWERED = (  # in the dark a file can be closed, and the power brought back: no more
    *("getattr", "readdir", "read", "statfs", "open", "create", "opendir", "write", "truncate", "fsync", "fsyncdir"),
    *("mkdir", "link", "rename", "unlink", "rmdir", "chmod", "chown", "utimens"),
)

OWNER = {"st_uid": 0, "st_gid": 0}
_numbers = itertools.count(1)

Change = tuple[int, bytes | None]  # bytes written at an offset; None: cut to, or filled up to, that length


def lacking() -> list[str]:
    """What this machine has not, and this file system needs."""
    binding = [] if _binding() else ["mfusepy and libfuse3"]
    return binding + ([] if os.access("/dev/fuse", os.R_OK | os.W_OK) else ["/dev/fuse"])


def _binding() -> ModuleType | None:
    """The binding to libfuse, without types; importing it loads that library."""
    try:
        return importlib.import_module("mfusepy")
    except (ImportError, OSError):
        return None


def set_word(root: Path, name: str, value: str) -> None:
    """Tell the file system at this mount point what to do."""
    os.setxattr(root, name, value.encode())


def _changed(content: bytearray, change: Change) -> None:
    offset, written = change
    if written is None:
        del content[offset:]
    content.extend(bytes(max(0, offset - len(content))))
    if written is not None:
        content[offset : offset + len(written)] = written


@dataclass(eq=False)
class Node:
    """A file or a folder: as it is now, and as it is on the disk."""

    mode: int
    synced_mode: int
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    changes: list[Change] = field(default_factory=list)  # since the last sync, in order
    names: dict[str, Node] = field(default_factory=dict)
    synced_names: dict[str, Node] = field(default_factory=dict)
    modified_at: int = 0  # ns
    number: int = 0

    @classmethod
    def new(cls, mode: int) -> Node:
        return cls(mode, mode, modified_at=time.time_ns(), number=next(_numbers))

    def change(self, change: Change) -> None:
        _changed(self.content, change)
        self.changes.append(change)
        self.modified_at = time.time_ns()

    def sync(self) -> None:
        self.synced, self.synced_mode, self.synced_names = bytes(self.content), self.mode, dict(self.names)
        self.changes.clear()

    def forget(self, coins: random.Random, chance: float) -> None:
        """Be what a disk would hold after the power went."""
        if coins.random() >= chance:
            self.mode = self.synced_mode
        content, names = bytearray(self.synced), dict(self.synced_names)
        for offset, written in self.changes:
            if coins.random() < chance:
                if written is not None and coins.random() < TORN:
                    written = written[: coins.randrange(len(written) + 1) // SECTOR * SECTOR]  # noqa: PLW2901 - torn
                _changed(content, (offset, written))
        for name in sorted({*self.names, *self.synced_names}):
            if self.names.get(name) is not self.synced_names.get(name) and coins.random() < chance:
                names.pop(name, None)
                if name in self.names:
                    names[name] = self.names[name]
        self.content, self.names = content, names
        self.sync()


class Tree:
    """The whole file system. Its root is on the disk."""

    def __init__(self) -> None:
        self.root = Node.new(stat.S_IFDIR | 0o700)
        self.dark = False

    def forget(self, seed: int, chance: float) -> None:
        """Every node that can still be reached forgets, once."""
        coins, waiting, seen = random.Random(seed), [self.root], set[int]()
        while waiting:
            node = waiting.pop()
            if id(node) not in seen:
                seen.add(id(node))
                node.forget(coins, chance)
                waiting += node.names.values()

    def find(self, path: str) -> Node:
        """Raises OSError ENOENT."""
        node = self.root
        for name in filter(None, path.split("/")):
            if name not in node.names:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            node = node.names[name]
        return node

    def parent(self, path: str) -> tuple[Node, str]:
        """The folder that a path's last name is in, and that name."""
        folder, _, name = path.rpartition("/")
        return self.find(folder), name


def load(path: Path) -> Tree:
    """A tree that was saved."""
    tree: Tree = pickle.loads(path.read_bytes())
    return tree


class Service:
    """The calls of FUSE on a tree; how they are named and called is the binding's. In the dark most of them fail."""

    use_ns = True

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._open: dict[int, Node] = {}
        self._last = 0
        for name in POWERED:
            setattr(self, name, self._powered(getattr(self, name)))

    def _powered(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def powered(*arguments: Any) -> Any:
            if self._tree.dark:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments)

        return powered

    def _node(self, path: str, handle: int | None) -> Node:
        return self._open[handle] if handle in self._open else self._tree.find(path)

    def _handle(self, node: Node) -> int:
        self._last += 1
        self._open[self._last] = node
        return self._last

    # --- what it was told

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        if name == CUT:
            seed, chance = value.decode().split()
            self._tree.forget(int(seed), float(chance))
            self._tree.dark = True
        elif name == RESTORE:
            self._tree.dark = False
        elif name == SAVE:
            sys.setrecursionlimit(100_000)
            Path(value.decode()).write_bytes(pickle.dumps(self._tree))
        return 0

    # --- looking

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        node = self._node(path, fh)
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), node.modified_at)
        return {
            "st_mode": node.mode,
            "st_size": len(node.content),
            "st_nlink": 1,
            "st_ino": node.number,
            **OWNER,
            **times,
        }

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        folder = self._node(path, fh)
        named = {".": folder, "..": folder, **folder.names}
        return [(name, {"st_ino": node.number, "st_mode": node.mode}, 0) for name, node in named.items()]

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return bytes(self._node(path, fh).content[offset : offset + size])

    def statfs(self, path: str) -> dict[str, int]:
        blocks = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"), 1 << 18)
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255, **blocks}

    # --- opening and closing

    def open(self, path: str, flags: int) -> int:
        node = self._tree.find(path)
        if flags & os.O_TRUNC:
            node.change((0, None))
        return self._handle(node)

    def create(self, path: str, mode: int, fi: object = None) -> int:
        folder, name = self._tree.parent(path)
        folder.names[name] = Node.new(stat.S_IFREG | stat.S_IMODE(mode))
        return self._handle(folder.names[name])

    def opendir(self, path: str) -> int:
        return self._handle(self._tree.find(path))

    def flush(self, path: str, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        self._open.pop(fh, None)
        return 0

    releasedir = release

    # --- changing

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._node(path, fh).change((offset, bytes(data)))
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._node(path, fh).change((length, None))
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._node(path, fh).sync()
        return 0

    fsyncdir = fsync

    def mkdir(self, path: str, mode: int) -> int:
        folder, name = self._tree.parent(path)
        folder.names[name] = Node.new(stat.S_IFDIR | stat.S_IMODE(mode))
        return 0

    def link(self, target: str, source: str) -> int:
        folder, name = self._tree.parent(target)
        folder.names[name] = self._tree.find(source)
        return 0

    def rename(self, old: str, new: str) -> int:
        (source, name), (folder, target) = self._tree.parent(old), self._tree.parent(new)
        folder.names[target] = source.names.pop(name)
        return 0

    def unlink(self, path: str) -> int:
        folder, name = self._tree.parent(path)
        del folder.names[name]
        return 0

    rmdir = unlink

    def chmod(self, path: str, mode: int) -> int:
        node = self._tree.find(path)
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        return 0


@contextlib.contextmanager
def serving(tree: Tree, folder: Path) -> Iterator[None]:
    """The tree, mounted at this folder by a process of its own. It ends, and its changes with it, on leaving."""
    before = folder.stat().st_dev
    pid = os.fork()
    if pid == 0:
        _serve(tree, folder)
    try:
        deadline = time.monotonic() + STARTUP
        while folder.stat().st_dev == before:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the file system ended at once"
            assert time.monotonic() < deadline, "the file system does not start"
            time.sleep(0.002)
        yield
    finally:
        ctypes.CDLL(None).umount2(bytes(folder), 2)  # MNT_DETACH
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(tree: Tree, folder: Path) -> None:
    """In the child; does not return. Nothing is cached by the kernel, so that what was forgotten is gone at once."""
    at_once = dict.fromkeys(("attr_timeout", "entry_timeout", "negative_timeout"), 0)
    with contextlib.suppress(BaseException):
        binding = _binding()
        assert binding is not None
        binding.FUSE(
            Service(tree), str(folder), foreground=True, nothreads=True, hard_remove=True, use_ino=True, **at_once
        )
    os._exit(1)
