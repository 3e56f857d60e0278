"""A Debian that debootstrap made, booted under systemd-nspawn, and a new user's hands on it.

Called as a program it prepares what needs a network (`python -m tests.boot.machine`); all else runs without one.
Between runs everything is kept in $SYNCD_BOOT_CACHE, by default a folder below /var/tmp.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parents[2]
CACHE: Final = Path(os.environ.get("SYNCD_BOOT_CACHE") or "/var/tmp/syncd-boot")
SUITES: Final = tuple(os.environ.get("SYNCD_BOOT_SUITES", "bookworm").split())
PYTHONS: Final = {"bookworm": "3.11", "trixie": "3.13"}
BARE: Final = ("systemd", "systemd-sysv", "dbus", "ca-certificates", "sudo")  # what a server has
NEEDED: Final = ("python3", "python3-venv")  # what the README asks for
AROUND: Final = ("openssh-server",)  # the SFTP site
NEEDS: Final = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER: Final = "it"  # may use sudo
CLONE: Final = f"/home/{USER}/syncd"
# /sys/fs/cgroup may be a mixture of both versions outside; the booted system gets the second one alone.
BOOT: Final = """
mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"
"""


def missing() -> list[str]:
    """Debian packages that the booted system needs out here, and what else stands in the way."""
    packages = [package for command, package in NEEDS.items() if shutil.which(command, path=PATH) is None]
    return packages + ([] if os.geteuid() == 0 else ["root"])


def install_section() -> list[str]:
    """The commands of the README's install section, as they stand but for their comments."""
    section = (PROJECT / "README.md").read_text("utf-8").partition("## Install on a server\n")[2].partition("\n## ")[0]
    return [line.partition(" # ")[0].strip() for line in section.splitlines() if line.startswith("    ")]


def _kept(name: str, *content: str) -> Path:
    """A place in the cache for what depends on `content` alone."""
    return CACHE / f"{name}-{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}"


def root_of(suite: str) -> Path:
    """Where the pristine root of a suite lies."""
    return _kept(suite, *BARE, *NEEDED, *AROUND)


def wheels_of(suite: str) -> Path:
    """Where the locked libraries for a suite's Python lie."""
    return _kept(f"wheels-{suite}", (PROJECT / "requirements.txt").read_text())


def prepare(suite: str) -> None:
    """Make the root and fetch the libraries, each only where it is not there yet."""
    if lacking := missing():
        sys.exit(f"make test-boot needs {', '.join(lacking)}")
    CACHE.mkdir(mode=0o755, exist_ok=True)
    _once(root_of(suite), lambda place: _debootstrap(suite, place))
    _once(wheels_of(suite), lambda place: _download(PYTHONS[suite], place))


def _once(place: Path, make: Callable[[Path], None]) -> None:
    if place.exists():
        return
    draft = place.with_name(place.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    make(draft)
    draft.rename(place)


def _debootstrap(suite: str, place: Path) -> None:
    packages = ",".join((*BARE, *NEEDED, *AROUND))
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={packages}", suite, place], check=True)


def _download(python: str, place: Path) -> None:
    words = ["-q", "--require-hashes", "--only-binary=:all:", "--no-deps", f"--python-version={python}"]
    pip = [sys.executable, "-m", "pip", "download", *words, "-r", str(PROJECT / "requirements.txt"), "-d", str(place)]
    subprocess.run(pip, check=True)


class Machine:
    """One booted Debian. Its loopback is this process's: what listens on 127.0.0.1 here is reached from inside."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.root = CACHE / f"run-{suite}"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self.typed: set[str] = set()  # lines of the README that were executed

    def make(self) -> None:
        """A fresh root with a user, a clone, and libraries where pip finds them."""
        self.remove()
        subprocess.run(["cp", "-a", "--reflink=auto", root_of(self.suite), self.root], check=True)
        (self.root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        (self.root / "etc/hostname").write_text("server\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost server\n")
        self._chroot("useradd", "--create-home", "--shell", "/bin/bash", USER)
        (self.root / f"etc/sudoers.d/{USER}").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
        self.put_clone(CLONE)

    def put_clone(self, folder: str) -> None:
        """The project as a clone has it, in a folder inside, owned by the user."""
        listed = [
            "git",
            "-c",
            "safe.directory=*",
            "-C",
            str(PROJECT),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, names):
            target = self.inside(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (PROJECT / name).exists():
                shutil.copy(PROJECT / name, target)
        self._chroot("chown", "-R", f"{USER}:", folder)

    def inside(self, path: str) -> Path:
        """A path of the machine's, from out here."""
        return self.root / path.lstrip("/")

    def _chroot(self, *words: str) -> None:
        subprocess.run(["chroot", self.root, *words], check=True, env={"PATH": PATH})

    def boot(self) -> None:
        """Start it, and wait until systemd says that it is up. Raises AssertionError with the console's last lines."""
        nspawn = ["systemd-nspawn", "-q", "-D", str(self.root), "--boot", "--register=no", "--keep-unit"]
        nspawn += ["--link-journal=no", "--console=pipe", f"--bind-ro={wheels_of(self.suite)}:/wheels"]
        with (CACHE / f"console-{self.suite}.log").open("wb") as console:
            line = ["unshare", "-m", "bash", "-c", BOOT, "boot", *nspawn]
            self._nspawn = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        self.wait(self._has_booted, 60.0, "boot")
        said = self.run("systemctl is-system-running --wait", check=False).stdout.strip()
        assert said == "running", self.run("systemctl --failed --no-pager; journalctl -b -p warning --no-pager").stdout

    def _has_booted(self) -> bool:
        assert self._nspawn
        assert self._nspawn.poll() is None, (CACHE / f"console-{self.suite}.log").read_text(errors="replace")[-2000:]
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in children:
            status = Path(f"/proc/{child}/status").read_text()
            if any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in status.splitlines()):
                self._leader = int(child)
                return self.run("test -S /run/systemd/private", check=False).returncode == 0
        return False

    def reboot(self) -> None:
        """`systemctl reboot`, as somebody types it."""
        self.run("systemctl reboot", check=False)
        self._ended()
        self.boot()

    def stop(self) -> None:
        """Power it off, if it runs."""
        if self._nspawn is not None and self._nspawn.poll() is None:
            self.run("systemctl poweroff", check=False)
            self._ended()

    def remove(self) -> None:
        """Throw the root away."""
        subprocess.run(["rm", "-rf", "--one-file-system", self.root], check=True)

    def _ended(self) -> None:
        assert self._nspawn
        try:
            self._nspawn.wait(60.0)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(10.0)
            raise

    def run(
        self, line: str, user: str = "root", check: bool = True, timeout: float = 120.0, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """A shell's line inside. `check`: it must end with 0. `typed`: what it reads."""
        home = "/root" if user == "root" else f"/home/{user}"
        shell = ["bash", "-c", line] if user == "root" else ["runuser", "-u", user, "--", "bash", "-c", line]
        environ = {"PATH": PATH, "HOME": home, "LANG": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
        enter = ["nsenter", f"--target={self._leader}", "-m", "-u", "-i", "-p", "-C", "-r", "-w", "--", *shell]
        done = subprocess.run(
            enter, input=typed, capture_output=True, text=True, timeout=timeout, env=environ, check=False
        )
        if check:
            assert done.returncode == 0, f"{line}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def type(
        self, line: str, folder: str = CLONE, check: bool = True, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """What the README says, in a clone, as the user who may use sudo."""
        assert line in install_section(), line
        self.typed.add(line)
        return self.run(f"cd {folder} && {line}", USER, check, typed=typed)

    def said(self, line: str, user: str = "root") -> str:
        """What a line printed, without its last newline."""
        return self.run(line, user).stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.said(f"systemctl show --value -p {name} {unit}")

    def journal(self, unit: str, *words: str) -> str:
        """What the journal has of a unit, from this boot."""
        return self.said(f"journalctl -b --no-pager -o cat -u {unit} {' '.join(words)}")

    @staticmethod
    def wait(true: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until it is so."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.2)


def main(suites: Sequence[str]) -> None:
    """Prepare these suites."""
    for suite in suites:
        prepare(suite)


if __name__ == "__main__":
    main(SUITES)
