"""`python -m syncd.demo`: a simulated practice to try things on, with a configuration to reach it."""

import signal
import tempfile
import threading
from pathlib import Path

import click

from syncd.demo.life import Life
from syncd.demo.simulation import OutsideSite, Simulation

_LIVE_SECONDS = 5.0


@click.command()
@click.option("--patients", default=500, show_default=True, help="How many patients to invent.")
@click.option("--seed", default=1, show_default=True, help="Same seed, same practice.")
@click.option("--port", default=0, help="Port of the HTTP API (default: any free one).")
@click.option("--sftp-port", default=0, help="Port of the embedded SFTP site (default: any free one).")
@click.option("--interval", default=1.0, show_default=True, help="Throttle in seconds, start to start; 0 for none.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Root of the embedded SFTP site (default: a temporary one)."
)
@click.option(
    "--config-dir", type=click.Path(path_type=Path), help="Where to write the configuration (default: a new folder)."
)
@click.option("--address", help="HOST:PORT of another SFTP site to use instead of the embedded one.")
@click.option("--sftp-user", default="opendental", show_default=True, help="Login on that site.")
@click.option(
    "--sftp-password-file", type=click.Path(path_type=Path, exists=True), help="File with that login's password."
)
@click.option("--sftp-host-key", default="", help="That site's host key, as in a known_hosts file, without the host.")
@click.option("--live", is_flag=True, help="Let the practice live: visits, scans, edits, as time passes.")
def main(
    patients: int,
    seed: int,
    port: int,
    sftp_port: int,
    interval: float,
    folder: Path | None,
    config_dir: Path | None,
    address: str | None,
    sftp_user: str,
    sftp_password_file: Path | None,
    sftp_host_key: str,
    live: bool,
) -> None:
    """Serve a simulated practice until interrupted: the vendor's API over HTTP, and an SFTP site."""
    outside = None
    if address is not None:
        if sftp_password_file is None:
            raise click.UsageError("--address needs --sftp-password-file")
        host, _, number = address.partition(":")
        password = sftp_password_file.read_text().strip()
        outside = OutsideSite(host, int(number or 22), sftp_user, password, sftp_host_key)
    ended = threading.Event()
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, lambda *_: ended.set())
    running = Simulation.start(patients, seed, interval, folder, port=port, sftp_port=sftp_port, outside=outside)
    with running as simulation:
        target = config_dir or Path(tempfile.mkdtemp(prefix="simulated-")) / "practice"  # its folder names a practice
        path = simulation.write_config(target)
        (target / "archive").mkdir(mode=0o700, exist_ok=True)  # ready to be mirrored into
        click.echo(f"# {path}\n{path.read_text()}")
        click.echo(f"# {patients} invented patients at {simulation.url}; Ctrl-C ends it")
        life = Life(simulation.practice, seed) if live else None
        while not ended.wait(_LIVE_SECONDS):
            if life is not None:
                life.advance(simulation.practice.clock.now())


if __name__ == "__main__":
    main()
