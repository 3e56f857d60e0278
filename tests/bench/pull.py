"""The pull lane's speed against the tools that people would use instead, on one OpenSSH server, in turns.

    .venv/bin/python -m tests.bench.pull                          # everything: an hour, mostly of the others
    .venv/bin/python -m tests.bench.pull --files 200 --large 0    # a look
    .venv/bin/python -m tests.bench.pull --cuts                   # the connection breaks at random: nothing is lost

Needs OpenSSH, and gcc for the delay (tests/bench/delay.c: half the round trip each way, no loss, no slow start).
*Pull alone* writes to memory; the *whole job* writes to a disk and empties the site. syncd's is SftpDrop and
Archive.publish, as the pull lane calls them: hashed, sidecar, file and folders synced, linked, then removed on the
site; the *lane* has its index, too. The others neither hash nor sync. A second is a second of the wall from the first
packet to the last file, and for the other tools their start; memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median

import paramiko

from syncd.archive import Archive, Publication
from syncd.drop import SftpDrop
from syncd.model import Attempt, Item, Pulled, PullJob, Version
from syncd.wiring import build
from tests.sites import OpenSshSite
from tests.world import World, make_api

KIB, MIB = 1024, 1024 * 1024
ROUND_TRIP = 30.0  # ms
LARGE = 200 * MIB
GCM = "aes128-gcm@openssh.com"
ROOMY = "MaxStartups 100:30:200\nMaxSessions 100"


@dataclass(frozen=True)
class Place:
    """A site, a port of it (perhaps behind a delay), and the folder to fetch."""

    site: OpenSshSite
    port: int
    folder: str

    def drop(self) -> SftpDrop:
        return SftpDrop(
            "127.0.0.1", self.port, self.site.user, None, self.site.key, self.site.host_key, None, timeout=30.0
        )

    @property
    def ssh(self) -> list[str]:
        known = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        return ["-i", str(self.site.key), *(word for each in known for word in ("-o", each))]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


Candidate = Callable[[Place, Path], list[str] | None]


# --- syncd, in a process of its own: `python -m tests.bench.pull --child HOW PLACE`


def jobs_of(drop: SftpDrop, folder: str, target: Path) -> list[PullJob]:
    names = sorted(drop.names(folder.encode()) or [])
    at = folder.encode() + b"/"
    return [PullJob(at + name, target / name.decode(), 2 << 30) for name in names]


def pull_alone(place: Place, target: Path) -> int:
    drop = place.drop()
    outcomes = drop.pull(jobs_of(drop, place.folder, target))
    drop.close()
    return sum(isinstance(outcome, Pulled) for outcome in outcomes)


def version_of(number: int, pulled: Pulled) -> Version:
    return Version(
        seq=number, item=Item(1 + number // 20, "document", number), mount_num=None, version=1, sidecar=1,
        revision="2026-03-01 10:00:00", bytes=pulled.size, sha256=pulled.sha256, extension="bin",
        media_type="application/octet-stream", file_name=f"{number}.bin", listed_at=1.0, placed_at=1.0,
        archived_at=1.0, first_seen_at=1.0, method="DownloadSftp", flags=(),
        listing={"Description": "Scan", "ProvNum": 0, "DocCategory": 134, "DateTStamp": "2026-03-01 10:00:00"},
    )  # fmt: skip


def whole_job(place: Place, target: Path) -> int:
    drop, archive = place.drop(), Archive(target, 0)
    archive.create("bench")
    archive.check("bench")
    archive.new_incoming()
    jobs = jobs_of(drop, place.folder, target / "incoming")
    numbers = {job.remote: number for number, job in enumerate(jobs, 1)}
    archived = 0

    def finished(batch: Sequence[tuple[PullJob, object]]) -> Sequence[PullJob]:
        nonlocal archived
        pulled = [(job, outcome) for job, outcome in batch if isinstance(outcome, Pulled)]
        ready = [Publication(version_of(numbers[job.remote], outcome), job.local) for job, outcome in pulled]
        if ready:
            outcomes = archive.publish(ready)
            gone = drop.remove([job.remote for job, _ in pulled])
            archived += sum(outcome is None and removed for outcome, removed in zip(outcomes, gone, strict=True))
        return ()

    drop.pull(jobs, finished)
    drop.close()
    return archived


def lane(place: Place, target: Path, names: Sequence[str]) -> tuple[int, float]:
    """The real pull lane, with index, journal and archive, until nothing is left to pull: versions, and seconds.

    Its clock is simulated: where it would wait after a cut, it goes on at once.
    """
    world = World.start(target)
    world.stop()
    api = make_api(world.settings, world.office)
    lanes = build(world.settings, world.clock, world.log, world.scope, api, place.drop())
    now = world.clock.now()
    with lanes.index.transaction():
        for number, name in enumerate(names, 1):
            listed = {"file_name": name, "fields": json.dumps({"Description": "Scan", "DocCategory": 134})}
            staging = f"{place.folder}/{name}"
            asked = Attempt(
                0, "document", 1 + number // 20, number, "r", staging, "asked", now, None, now, "listed", listed
            )
            lanes.index.set_attempt(lanes.index.journal(asked), "placed", now, placed_at=now)
    began = time.monotonic()
    while lanes.index.value("SELECT count(*) FROM attempt"):
        world.clock.advance(max(0.0, lanes.pull_lane.turn(world.clock.now()) - world.clock.now()))
    seconds = time.monotonic() - began
    count = lanes.index.value("SELECT count(*) FROM version WHERE sidecar = 1")
    lanes.close()
    return int(str(count)), seconds


def whole_lane(place: Place, target: Path) -> int:
    drop = place.drop()
    names = sorted(name.decode() for name in drop.names(place.folder.encode()) or [])
    drop.close()
    count, seconds = lane(place, target, names)
    say(json.dumps({"seconds": seconds}))  # without the making of the journal
    return count


def plain_get(place: Place, target: Path) -> int:
    """What a first version would do."""
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect("127.0.0.1", place.port, place.site.user, key_filename=str(place.site.key), look_for_keys=False)
    sftp = client.open_sftp()
    names = sftp.listdir(place.folder)
    for name in names:
        sftp.get(f"{place.folder}/{name}", str(target / name))
    client.close()
    return len(names)


def plain_job(place: Place, target: Path) -> int:
    """The same, with the file synced, renamed and its folder synced, and removed on the site."""
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect("127.0.0.1", place.port, place.site.user, key_filename=str(place.site.key), look_for_keys=False)
    sftp, folder = client.open_sftp(), os.open(target, os.O_RDONLY)
    names = sftp.listdir(place.folder)
    for name in names:
        part = target / f".{name}"
        with part.open("wb") as file:
            sftp.getfo(f"{place.folder}/{name}", file)
            file.flush()
            os.fsync(file.fileno())
        part.rename(target / name)
        os.fsync(folder)
        sftp.remove(f"{place.folder}/{name}")
    client.close()
    return len(names)


OURS: dict[str, Callable[[Place, Path], int]] = {
    "pull": pull_alone,
    "job": whole_job,
    "lane": whole_lane,
    "get": plain_get,
    "getjob": plain_job,
}


def child(how: str, said: str) -> None:
    """One measured run; a line of JSON."""
    words = json.loads(said)
    site = OpenSshSite.__new__(OpenSshSite)
    site.user, site.key, site.host_key = words["user"], Path(words["key"]), words["host_key"]
    place = Place(site, words["port"], words["folder"])
    gc.freeze()  # as the command does
    began = time.monotonic()
    files = OURS[how](place, Path(words["target"]))
    say(json.dumps({"files": files, "seconds": time.monotonic() - began}))


def ours(how: str, place: Place, target: Path) -> list[str]:
    site = place.site
    said = {"user": site.user, "key": str(site.key), "host_key": site.host_key, "port": place.port}
    words = json.dumps(said | {"folder": place.folder, "target": str(target)})
    return [sys.executable, "-m", "tests.bench.pull", "--child", how, words]


# --- the others


def sftp(place: Place, target: Path, cipher: str = "") -> list[str] | None:
    if not shutil.which("sftp"):
        return None
    batch = target.parent / "sftp.batch"
    batch.write_text(f"get -r {place.folder} {target}\n")
    chosen = ["-c", cipher] if cipher else []
    return ["sftp", "-q", *chosen, *place.ssh, "-P", str(place.port), "-b", str(batch), f"{place.site.user}@127.0.0.1"]


def lftp(place: Place, target: Path, parallel: int = 4, move: bool = False) -> list[str] | None:
    if not shutil.which("lftp"):
        return None
    ssh = " ".join(["ssh", "-a", "-x", *place.ssh])
    login = f"open -u {place.site.user}, sftp://127.0.0.1:{place.port}"
    moving = "--Remove-source-files " if move else ""
    mirror = f"mirror {moving}--parallel={parallel} {place.folder} {target}"
    return ["lftp", "-c", f'set sftp:connect-program "{ssh}"; set sftp:auto-confirm yes; {login}; {mirror}']


def rclone(place: Place, target: Path, transfers: int = 4, move: bool = False) -> list[str] | None:
    if not shutil.which("rclone"):
        return None
    site = place.site
    options = {"host": "127.0.0.1", "port": place.port, "user": site.user, "key-file": site.key}
    words = [f"--sftp-{name}={value}" for name, value in options.items()]
    words += ["--sftp-disable-hashcheck", f"--transfers={transfers}", "--config=/dev/null", "--log-level=ERROR"]
    return ["rclone", "move" if move else "copy", *words, f":sftp:{place.folder}", str(target)]


PULLS: dict[str, Candidate] = {
    "syncd": functools.partial(ours, "pull"),
    "sftp": sftp,
    f"sftp -c {GCM.partition('@')[0]}": functools.partial(sftp, cipher=GCM),
    "lftp --parallel=4": lftp,
    "lftp --parallel=8": functools.partial(lftp, parallel=8),
    "lftp --parallel=16": functools.partial(lftp, parallel=16),
    "rclone copy": rclone,
    "rclone copy --transfers 16": functools.partial(rclone, transfers=16),
    "SFTPClient.get": functools.partial(ours, "get"),
}
JOBS: dict[str, Candidate] = {
    "syncd": functools.partial(ours, "job"),
    "syncd, whole lane": functools.partial(ours, "lane"),
    "lftp --parallel=4": functools.partial(lftp, move=True),
    "lftp --parallel=8": functools.partial(lftp, parallel=8, move=True),
    "lftp --parallel=16": functools.partial(lftp, parallel=16, move=True),
    "rclone move": functools.partial(rclone, move=True),
    "rclone move --transfers 16": functools.partial(rclone, transfers=16, move=True),
    "SFTPClient.getfo, fsync": functools.partial(ours, "getjob"),
}


# --- measuring


@dataclass
class Run:
    seconds: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)  # seconds of the processor
    peak: int = 0  # bytes


@contextmanager
def delayed(port: int, round_trip: float, cut: int = 0, seed: int = 1) -> Iterator[int]:
    """A port on loopback that leads to another one, each way half of `round_trip` (ms) later."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "delay"
        source = Path(__file__).with_name("delay.c")
        subprocess.run(["gcc", "-O2", "-o", str(program), str(source)], check=True)
        words = [str(program), "0", str(port), str(round_trip / 2), str(cut), str(seed)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as proxy:
            assert proxy.stdout
            try:
                yield int(proxy.stdout.readline())
            finally:
                proxy.terminate()


def make_files(folder: Path, sizes: Sequence[int]) -> int:
    """Files of random bytes; how many bytes in all."""
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:05}.bin").write_bytes(os.urandom(size))
    return sum(sizes)


def small_sizes(count: int) -> list[int]:
    rng = random.Random(7)
    return [int(20_000 * 100 ** rng.random()) for _ in range(count)]


def serve(site: OpenSshSite, files: Path) -> str:
    """Put the files on the site, as links: a folder that may be emptied."""
    folder = site.root / "box"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files, folder, copy_function=os.link)
    return folder.name


def measured(words: list[str], count: int, left: Path | None, target: Path) -> tuple[float, float, int]:
    """Seconds, those of the processor, and peak memory of one process, which must fetch so many files.

    `left`: a folder that it must have emptied.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process, peak = subprocess.Popen(words, stdout=out, stderr=out), 0
        ended = os.pidfd_open(process.pid)
        while not select.select([ended], [], [], 0.05)[0]:  # ru_maxrss would count what this process was before exec
            with suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                peak = max(peak, int(found[1]) * KIB if found else 0)
        os.close(ended)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        out.seek(0)
        said = out.read().decode(errors="replace")
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if lines:
        seconds = lines[0]["seconds"]
    got = lines[-1]["files"] if lines else sum(path.is_file() for path in target.rglob("*"))
    if status or got != count or (left and any(path.is_file() for path in left.rglob("*"))):
        raise SystemExit(f"{words[:4]}: status {status}, {got} of {count} files\n{said[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, peak


def compare(
    title: str, candidates: dict[str, Candidate], site: OpenSshSite, port: int, files: Path, disk: Path, rounds: int
) -> dict[str, Run]:
    """Each candidate once a round, in turns; prints the table."""
    runs: dict[str, Run] = defaultdict(Run)
    count, move = len(list(files.iterdir())), candidates is not PULLS and "syncd, whole lane" in candidates
    missing = set()
    for turn in range(rounds):
        for name in sorted(candidates, key=list(candidates).index, reverse=bool(turn % 2)):
            place, target = Place(site, port, serve(site, files)), Path(tempfile.mkdtemp(dir=disk))
            words = candidates[name](place, target)
            if words is None:
                missing.add(name)
            else:
                os.sync()
                seconds, worked, peak = measured(words, count, site.root / "box" if move else None, target)
                runs[name].seconds.append(seconds)
                runs[name].worked.append(worked)
                runs[name].peak = max(runs[name].peak, peak)
                sys.stderr.write(f"  {name}: {seconds:.2f} s\n")
            for path in filter(Path.is_file, target.rglob("*")):
                path.chmod(0o600)
                os.truncate(path, 0)  # not deleted yet: before it gives an inode ext4 looks at each that was deleted
    for target in disk.glob("tmp*"):  # in the last five minutes, and thousands of them cost seconds of the next run
        shutil.rmtree(target)
    show(title, candidates, runs, missing)
    return runs


def show(title: str, candidates: dict[str, Candidate], runs: dict[str, Run], missing: set[str]) -> None:
    say(f"\n{title}\n\n| | median s | min - max | syncd is x of it | CPU s | peak MB |\n|---|---|---|---|---|---|")
    mine = runs["syncd"].seconds
    for name in candidates:
        if name in missing:
            say(f"| {name} | not installed | | | | |")
        elif taken := runs[name].seconds:
            ratios = [a / b for a, b in zip(mine, taken, strict=True)]
            spread = f"{min(taken):.2f} - {max(taken):.2f}"
            worked, peak = median(runs[name].worked), runs[name].peak / 1e6
            say(f"| {name} | {median(taken):.2f} | {spread} | {median(ratios):.2f} | {worked:.2f} | {peak:.0f} |")


def cuts(site: OpenSshSite, files: Path, disk: Path) -> None:
    """The whole lane over a line whose connections break at random: every byte archived once, the site empty."""
    sizes = [path.stat().st_size for path in files.iterdir()]
    expected = sorted(sha256(path.read_bytes()).hexdigest() for path in files.iterdir())
    names = sorted(path.name for path in files.iterdir())
    for seed in (1, 2, 3):
        target = disk / f"cuts{seed}"
        target.mkdir()
        folder = serve(site, files)
        with delayed(site.port, 2.0, max(MIB, sum(sizes) // 20), seed) as port:
            count, seconds = lane(Place(site, port, folder), target, names)
        archive = Archive(target / "archive", 0)
        found = [each for each in archive.walk() if isinstance(each, Version)]
        lost = [each for each in found if not archive.intact(each)]
        logins = (site.root.parent / "sshd.log").read_text().count("Accepted")
        whole = (
            sorted(each.sha256 for each in found) == expected and not lost and not any((site.root / "box").iterdir())
        )
        verdict = "nothing lost, nothing twice, the site empty" if whole else "LOST"
        say(f"cuts, seed {seed}: {count} files in {seconds:.1f} s, {logins} logins so far: {verdict}")
        shutil.rmtree(target)
        if not whole:
            raise SystemExit(1)


def without(candidates: dict[str, Candidate], *words: str) -> dict[str, Candidate]:
    return {name: each for name, each in candidates.items() if not any(word in name for word in words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="small files, 20 KB to 2 MB each")
    parser.add_argument("--far-files", type=int, default=200, help="of them, at 30 ms")
    parser.add_argument("--large", type=int, default=4, help="files of 200 MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--far-rounds", type=int, default=3)
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="where the whole job writes")
    parser.add_argument("--only", default="", help="tables whose title has this in it")
    parser.add_argument("--without", nargs="*", default=[], help="rows to leave out, by a part of their names")
    parser.add_argument("--cuts", action="store_true", help="break connections at random; nothing may be lost")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # its complaints of each cut
    if chosen.child:
        child(*chosen.child)
        return
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=chosen.disk)))
        site = OpenSshSite(base, extra=ROOMY).start()
        stack.callback(site.stop)
        sizes = small_sizes(chosen.files)
        total = make_files(base / "small", sizes)
        far_total = make_files(base / "far", sizes[: chosen.far_files])
        make_files(base / "large", [LARGE] * chosen.large)
        if chosen.cuts:
            cuts(site, base / "small", disk)
            return
        far = stack.enter_context(delayed(site.port, ROUND_TRIP))
        near, quick = site.port, base
        small, few, large = base / "small", base / "far", base / "large"
        said = f"{len(sizes)} files, {total / 1e6:.0f} MB"
        said_far = f"{chosen.far_files} files, {far_total / 1e6:.0f} MB"
        said_large = f"{chosen.large} files of 200 MB"
        tables = [
            (f"Loopback, pull alone: {said}", PULLS, near, small, quick, chosen.rounds),
            (f"Loopback, whole job: {said}", JOBS, near, small, disk, chosen.rounds),
            (f"Loopback, pull alone: {said_large}", PULLS, near, large, quick, chosen.rounds),
            (f"30 ms, pull alone: {said_far}", PULLS, far, few, quick, chosen.far_rounds),
            (f"30 ms, whole job: {said_far}", JOBS, far, few, disk, chosen.far_rounds),
            (f"30 ms, pull alone: {said_large}", PULLS, far, large, quick, chosen.far_rounds),
        ]
        for title, candidates, port, files, where, rounds in tables:
            if chosen.only in title and any(files.iterdir()):
                compare(title, without(candidates, *chosen.without), site, port, files, where, rounds)


if __name__ == "__main__":
    main()
