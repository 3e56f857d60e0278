"""The first sync of a simulated practice over OpenSSH: everything there byte for byte, requests and slots counted.

    sudo .venv/bin/python tests/bench/first_sync.py --patients 300 --interval 0.05

Needs root and OpenSSH's sshd, because Open Dental logs in with a password: it makes a throw-away account, and removes
it at the end. Prints a table; exit 1 if anything is missing, wrong or misfiled. Times are figures, not judgements.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from syncd.demo.build import Past
from syncd.demo.simulation import OutsideSite, Simulation
from syncd.demo.wire import Arrival

USER = "syncd-bench"
JITTER = 0.002  # seconds by which two arrivals may be closer than the interval


@contextmanager
def openssh(base: Path) -> Iterator[tuple[OutsideSite, Path]]:
    """An sshd on loopback with internal-sftp, a password, and a home folder of its own."""
    home, password = base / "home", secrets.token_hex(12)
    subprocess.run(["useradd", "--create-home", "--home-dir", str(home), USER], check=True)
    server = None
    try:
        subprocess.run(["chpasswd"], input=f"{USER}:{password}", text=True, check=True)
        base.chmod(0o755)
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
        yield OutsideSite("127.0.0.1", port, USER, password, f"{kind} {key}"), home
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        for attempt in range(20):
            if subprocess.run(["userdel", "--force", USER], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1 * attempt)


def syncd(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One call of the command, as a user types it."""
    command = [str(Path(sys.executable).parent / "syncd"), "-c", str(config), *words]
    return subprocess.run(command, text=True, capture_output=True, check=False, env={"PATH": os.environ["PATH"]})


def least(simulation: Simulation) -> int:
    """Requests that no mirror can do without: pages, and one placement each (design.md section 8)."""
    truth = simulation.practice.truth()
    pages = 1 + len(truth) // 100
    for patient in truth.values():
        listed = len(patient.documents) + len(patient.pending) + len(patient.mounts)
        pages += 1 + listed // 100 + 1 + len(patient.sheets) // 100
        raw = sum(
            1
            for _ in simulation.practice.rows(
                "SELECT 1 FROM document WHERE PatNum = ? AND Note LIKE '\\_rawBase64\\_%' ESCAPE '\\'", patient.pat_num
            )
        )
        pages += len(patient.documents) - raw + 2 * len(patient.mounts) + len(patient.sheets)
        pages += bool(patient.thumbnails)
    return pages


def wrong(simulation: Simulation, archive: Path, found: list[dict[str, object]]) -> list[str]:
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

    for pat_num, patient in simulation.practice.truth().items():
        for num, data in patient.documents.items():
            check(pat_num, "document", num, data)
        for num, data in patient.mounts.items():
            check(pat_num, "mount", num, data)
        for num, (_, data) in patient.mount_images.items():
            check(pat_num, "mount-image", num, data)
        for num, sheet in patient.sheets.items():
            check(pat_num, "sheet", num, None, sheet.identity)
        for num in patient.thumbnails:
            check(pat_num, "thumbnail", num, simulation.practice.thumbnail(num))
    kinds = ("document", "mount", "mount-image", "sheet")
    extra = {key for key in current if key[1] in kinds and current[key]["path"]} - expected
    return problems + [f"not in the practice {key}" for key in sorted(extra)]


def paced(arrivals: list[Arrival], interval: float) -> dict[str, object]:
    """How the budget was used, and how close two arrivals came."""
    gaps = sorted(after.steady - before.steady for before, after in pairwise(arrivals))
    wall = arrivals[-1].steady - arrivals[0].steady + max(interval, arrivals[-1].duration)
    used = sum(max(interval, arrival.duration) for arrival in arrivals)
    close = sum(gap < interval - JITTER for gap in gaps)
    return {"slots_used": round(used / wall, 4), "least_gap_ms": round(gaps[0] * 1000, 1), "gaps_too_close": close}


def main() -> int:
    """Run both backfills, print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--patients", type=int, default=300)
    options.add_argument("--interval", type=float, default=0.05)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--documents", type=float, default=12.0, help="median a patient")
    options.add_argument("--sheets", type=float, default=4.0, help="median a patient")
    options.add_argument("--keep", type=Path, help="leave configuration, archive and logs in this folder")
    asked = options.parse_args()
    base = Path(tempfile.mkdtemp(prefix="first-sync-"))
    table: dict[str, object] = {}
    base.chmod(0o755)  # the account logs in below it
    (base / "site").mkdir()
    with openssh(base / "site") as (site, home):
        past = Past(documents=asked.documents, sheets=asked.sheets)
        with Simulation.start(asked.patients, asked.seed, asked.interval, outside=site, past=past) as simulation:
            archive = base / "archive"
            archive.mkdir()
            config = simulation.write_config(base / "practice", archive)
            table["least_requests"] = least(simulation)
            started = time.monotonic()
            first = syncd(config, "backfill", "--no-progress")
            table["exit_code"], table["seconds"] = first.returncode, round(time.monotonic() - started, 1)
            arrivals = list(simulation.office.arrivals)
            table["requests"] = len(arrivals)
            table["requests_ratio"] = round(len(arrivals) / int(str(table["least_requests"])), 4)
            table |= paced(arrivals, asked.interval)
            found = [json.loads(line) for line in syncd(config, "find", "--json").stdout.splitlines()]
            table["versions"] = dict(Counter(str(row["kind"]) for row in found if row["path"]))
            problems = wrong(simulation, archive, found)
            table["wrong"] = len(problems)
            table["left_on_drop"] = sum(1 for path in home.glob("syncd/**/*"))
            again = syncd(config, "backfill", "--no-progress")
            placed = [each for each in simulation.office.arrivals[len(arrivals) :] if each.method == "POST"]
            table["second_exit_code"], table["second_placements"] = again.returncode, len(placed)
    for name, value in table.items():
        print(f"{name:20} {value}")  # noqa: T201 - a benchmark prints its table
    for problem in problems[:20]:
        print(problem)  # noqa: T201
    print(first.stderr[-2000:] if first.returncode else "", end="")  # noqa: T201
    if asked.keep:
        shutil.copytree(base, asked.keep, dirs_exist_ok=True)
    shutil.rmtree(base, ignore_errors=True)
    return int(bool(problems) or first.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
