"""A whole backfill: requests against the least possible, slots used, how long the office waits for us, CPU and memory.

    .venv/bin/python -m tests.bench.backfill                     # all four; some minutes
    .venv/bin/python -m tests.bench.backfill --only unthrottled --documents 5000
    sudo .venv/bin/python -m tests.bench.backfill --only real --openssh

`simulated`: the lanes under a simulated clock, a second a request. `real`: the command over HTTP and SFTP on loopback,
one request in 0.05 s; with `--openssh` (root) over OpenSSH's sshd. `unthrottled`: mode service, an office that needs
40 ms for each placement, beside the time to write its file. Every file is compared with the practice in the end.
Prints a table; exit 1 only where something is missing, wrong or misfiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from syncd.demo.build import Past
from syncd.demo.practice import Practice
from syncd.demo.simulation import OutsideSite, Simulation
from syncd.demo.wire import Arrival
from tests.world import PLACEMENTS, World

USER = "syncd-bench"
JITTER = 0.002  # seconds by which two arrivals may be closer than the interval
OFFICE = 0.04  # seconds that the office needs for a placement

Facts = dict[str, float]


def least(practice: Practice, page: int = 100) -> int:
    """Requests that no mirror can do without (design.md section 8): pages, and one placement each."""
    truth = practice.truth()
    count = 1 + len(truth) // page
    for patient in truth.values():
        listed = len(patient.documents) + len(patient.pending) + len(patient.mounts)
        count += 1 + listed // page + 1 + len(patient.sheets) // page
        raw = "SELECT 1 FROM document WHERE PatNum = ? AND Note LIKE '\\_rawBase64\\_%' ESCAPE '\\'"
        count -= sum(1 for _ in practice.rows(raw, patient.pat_num))  # these come with their list
        count += len(patient.documents) + 2 * len(patient.mounts) + len(patient.sheets) + bool(patient.thumbnails)
    return count


def paced(arrivals: Sequence[Arrival], interval: float, times: Sequence[float]) -> Facts:
    """How the budget was used, and how close two arrivals came; `times`: when they arrived."""
    gaps = sorted(after - before for before, after in pairwise(times))
    wall = times[-1] - times[0] + max(interval, arrivals[-1].duration)
    used = sum(max(interval, arrival.duration) for arrival in arrivals)
    close = sum(gap < interval - JITTER for gap in gaps)
    return {"slots used": used / wall, "least gap, ms": gaps[0] * 1000, "gaps too close": close}


def in_flight(arrivals: Sequence[Arrival]) -> Facts:
    """Of the time from the first placement to the last: how much of it one was in flight, as the office sees it."""
    placements = [each for each in arrivals if each.path in PLACEMENTS]
    wall = placements[-1].steady + placements[-1].duration - placements[0].steady
    others = sum(each.duration for each in arrivals if each.path not in PLACEMENTS)
    waits = sorted(after.steady - before.steady - before.duration for before, after in pairwise(placements))
    share = sum(each.duration for each in placements) / wall
    told: Facts = {"a placement in flight": share, "others in flight": others / wall}
    return told | {"between two, median, ms": 1000 * waits[len(waits) // 2]}


# --- under a simulated clock


def simulated(patients: int, interval: float) -> tuple[Facts, list[str]]:
    """The lanes in this process, over the real API door, index and archive; the drop is in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world = World.start(Path(folder), patients, backfill=True, interval=interval)
        begun = time.process_time()
        world.run()
        cpu = time.process_time() - begun
        differs = world.findings()
        arrivals, versions = world.office.arrivals, world.index.value("SELECT count(*) FROM version")
        fewest = least(world.practice)
        facts = counted(len(arrivals), fewest) | paced(arrivals, interval, [each.at for each in arrivals])
        facts["plan, of the least"] = planned_by(world) / fewest
        world.stop()
        facts |= {"files": versions, "CPU, s per 1,000 files": 1000 * cpu / versions}
        return facts, differs.wrong + differs.lacking


def planned_by(world: World) -> int:
    """The requests that `plan` would tell once every list is read and nothing placed, with those sent for that."""
    again = World.start(world.folder / "again", practice=world.practice, backfill=True, interval=1.0)
    again.index.run("INSERT INTO site VALUES ('placing', 'placements_refused', '', 0, 9e12, 1)")
    again.run(until=lambda: again.index.value("SELECT min(polled_at) FROM list"))
    told = again.catalog().status_facts(again.clock.now()).requests_to_come + len(again.office.arrivals)
    again.stop()
    return told


def counted(requests: int, fewest: int) -> Facts:
    """Requests beside the fewest possible."""
    return {"requests": requests, "least": fewest, "of the least": requests / fewest}


# --- in real time


@contextlib.contextmanager
def openssh(base: Path) -> Iterator[OutsideSite]:
    """An sshd on loopback with internal-sftp, a password, and a throw-away account with a home folder of its own."""
    home, password = base / "home", secrets.token_hex(12)
    base.mkdir(mode=0o755)
    subprocess.run(["useradd", "--create-home", "--home-dir", str(home), USER], check=True)
    server = None
    try:
        subprocess.run(["chpasswd"], input=f"{USER}:{password}", text=True, check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / "host")], check=True)
        port = 20_000 + secrets.randbelow(20_000)
        (base / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {base}/host\nPidFile none\nUsePAM no\n"
            "PasswordAuthentication yes\nSubsystem sftp internal-sftp\nForceCommand internal-sftp\n"
            "MaxStartups 100:30:200\nLogLevel ERROR\n"
        )
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(base / "sshd_config")])
        time.sleep(1.0)
        kind, key = (base / "host.pub").read_text().split()[:2]
        yield OutsideSite("127.0.0.1", port, USER, password, f"{kind} {key}")
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        for attempt in range(20):
            if subprocess.run(["userdel", "--force", USER], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1 * attempt)


def syncd(config: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """One call of the command, as a user types it; its CPU seconds, and its peak memory in MB."""
    command = [str(Path(sys.executable).parent / "syncd"), "-c", str(config), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, text=True, capture_output=True, check=False, env={"PATH": os.environ["PATH"]})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, cpu, after.ru_maxrss / 1024


def wrong(practice: Practice, archive: Path, found: list[dict[str, object]]) -> list[str]:
    """What of the practice's truth the archive lacks, or holds otherwise; ids only."""
    current = {(row["pat_num"], row["kind"], row["num"]): row for row in found if row["current"]}
    problems, expected = [], set()

    def check(pat_num: int, kind: str, num: int, bytes_: bytes | None, inside: bytes = b"") -> None:
        expected.add((pat_num, kind, num))
        row = current.get((pat_num, kind, num))
        content = (archive / str(row["path"])).read_bytes() if row and row["path"] else None
        if content is None:
            problems.append(f"missing {pat_num}/{kind}-{num}")
        elif (bytes_ is not None and content != bytes_) or inside not in content:
            problems.append(f"other bytes {pat_num}/{kind}-{num}")

    for pat_num, patient in practice.truth().items():
        for kind, files in (("document", patient.documents), ("mount", patient.mounts)):
            for num, data in files.items():
                check(pat_num, kind, num, data)
        for num, (_, data) in patient.mount_images.items():
            check(pat_num, "mount-image", num, data)
        for num, sheet in patient.sheets.items():
            check(pat_num, "sheet", num, None, sheet.identity)
        for num in patient.thumbnails:
            check(pat_num, "thumbnail", num, practice.thumbnail(num))
    kinds = ("document", "mount", "mount-image", "sheet")
    extra = {key for key in current if key[1] in kinds and current[key]["path"]} - expected
    return problems + [f"not in the practice {key}" for key in sorted(extra)]


def real(
    simulation: Simulation, base: Path, interval: float, page: int, **overrides: object
) -> tuple[Facts, list[str]]:
    """The command against a simulated practice on loopback; what is not as in the practice."""
    archive = base / "archive"
    archive.mkdir(parents=True)
    config = simulation.write_config(base / "practice", archive, **overrides)
    begun = time.monotonic()
    first, cpu, peak = syncd(config, "backfill", "--no-progress")
    seconds = time.monotonic() - begun
    arrivals = list(simulation.office.arrivals)
    found = [json.loads(line) for line in syncd(config, "find", "--json")[0].stdout.splitlines()]
    versions = sum(bool(row["path"]) for row in found)
    times = [each.steady for each in arrivals]
    problems = wrong(simulation.practice, archive, found)
    pulls = (begun + seconds - arrivals[-1].steady - arrivals[-1].duration) / seconds
    facts = counted(len(arrivals), least(simulation.practice, page)) | paced(arrivals, interval, times)
    again = syncd(config, "backfill", "--no-progress")[0]
    placed = [each for each in simulation.office.arrivals[len(arrivals) :] if each.path in PLACEMENTS]
    facts |= {"placements of a second one": len(placed), "seconds": seconds, "files": versions}
    facts |= {"CPU, s per 1,000 files": 1000 * cpu / max(1, versions), "peak, MB": peak} | in_flight(arrivals)
    facts["pulls add to the wall time"] = pulls  # all that is done after the last answer, with the end of the process
    problems += [f"exit code {each.returncode}: {each.stderr[-500:]}" for each in (first, again) if each.returncode]
    return facts, problems


def throttled(asked: argparse.Namespace, base: Path) -> tuple[Facts, list[str]]:
    """One request in 0.05 s."""
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(openssh(base / "site")) if asked.openssh else None
        past = Past(documents=9.6, sheets=2.6)
        practice = Simulation.start(asked.patients, 1, asked.interval, outside=site, past=past)
        return real(stack.enter_context(practice), base, asked.interval, 100)


def unthrottled(documents: int, base: Path, office: float) -> tuple[Facts, list[str]]:
    """Mode service: as fast as the office's machine allows. `office`: seconds that it needs for a placement."""
    past = Past(documents=12.0, sheets=3.0)
    with Simulation.start(max(1, documents // 20), 1, 0.0, past=past) as simulation:
        simulation.office.page_size = 1000
        for path in PLACEMENTS:
            simulation.office.faults.add("slow", path=path, seconds=office, times=None)
        api = {"mode": "service", "min_interval": None}
        return real(simulation, base, 0.0, 1000, api=api)


def main() -> int:
    """Print the tables."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--only", choices=("simulated", "real", "unthrottled"))
    options.add_argument("--patients", type=int, default=100)
    options.add_argument("--interval", type=float, default=0.05)
    options.add_argument("--documents", type=int, default=5_000, help="of the unthrottled one")
    options.add_argument("--openssh", action="store_true", help="over OpenSSH's sshd: needs root")
    asked = options.parse_args()
    base, problems = Path(tempfile.mkdtemp(prefix="backfill-")), list[str]()
    base.chmod(0o755)  # the account logs in below it
    cases: dict[str, Callable[[], tuple[Facts, list[str]]]] = {
        "simulated": lambda: simulated(asked.patients, 1.0),
        "real": lambda: throttled(asked, base / "real"),
        "unthrottled": lambda: unthrottled(asked.documents, base / "unthrottled", OFFICE),
    }
    for name, case in cases.items():
        if asked.only not in (None, name):
            continue
        facts, found = case()
        problems += found
        sys.stdout.write(f"{name}\n")
        for fact, value in facts.items():
            shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"
            sys.stdout.write(f"  {fact:28}{shown:>12}\n")
        sys.stdout.write(f"  {'missing, wrong, misfiled':28}{len(found):>12}\n")
    sys.stdout.write("".join(f"{problem}\n" for problem in problems[:20]))
    shutil.rmtree(base, ignore_errors=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
