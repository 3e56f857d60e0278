"""The SFTP site that `syncd setup` makes: the real sshd with the configuration that setup writes, and clients of today
and of 2016.

Here it runs as whoever runs the tests, who logs in with a key and without a jail; `tests/faults/test_setup_as_root.py`
has all of it: the account, its password, the jail.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from syncd.answers import Site
from syncd.drop import SftpDrop, shown_host_key
from syncd.errors import SiteError
from tests.sites import OpenSshSite, make_key, public_part

OLD: Final = {  # what SSH libraries of 2016 can do
    "group exchange": ("diffie-hellman-group-exchange-sha1", "ssh-rsa", "aes256-ctr", "hmac-sha1"),
    "group exchange, SHA-256": ("diffie-hellman-group-exchange-sha256", "ssh-rsa", "aes256-ctr", "hmac-sha2-256"),
    "group 14": ("diffie-hellman-group14-sha1", "ssh-rsa", "aes128-ctr", "hmac-sha1"),
}


def old_client(site: OpenSshSite, names: tuple[str, ...], *options: str) -> subprocess.CompletedProcess[str]:
    """OpenSSH's sftp with nothing but these algorithms lists the login folder."""
    kinds = ("KexAlgorithms", "HostKeyAlgorithms", "Ciphers", "MACs")
    told = [f"-o{kind}={name}" for kind, name in zip(kinds, names, strict=True)]
    told += ["-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oBatchMode=yes", *options]
    line = ["sftp", "-F/dev/null", "-b-", f"-i{site.key}", f"-P{site.port}", *told, f"{site.user}@127.0.0.1"]
    return subprocess.run(line, input="mkdir made\nls\n", capture_output=True, text=True, check=False, timeout=30)


class SetupSite(OpenSshSite):
    """OpenSshSite with setup's own configuration; only what needs root or a password is another."""

    def __init__(self, folder: Path, change: Callable[[str], str] = lambda text: text) -> None:
        super().__init__(folder)
        self._ed25519 = make_key(folder / "sftp_host_ed25519")
        make_key(folder / "sftp_host_rsa", "rsa")
        self.host_key = public_part(self._ed25519)
        self._change = change

    def configuration(self) -> str:
        site = Site("main", self._folder, self.root, self.port, ("203.0.113.7",))
        text = self._change(site.sshd_config)
        for before, after in {
            f"Port {self.port}\n": f"ListenAddress 127.0.0.1:{self.port}\n",
            f"{site.user}@": f"{self.user}@",
            "AuthenticationMethods password\n": f"AuthorizedKeysFile {self.key}.pub\nStrictModes no\n",
            "PubkeyAuthentication no\n": "",
            "PermitRootLogin no\n": "PermitRootLogin yes\n",
            f"ChrootDirectory {self.root}\n": "",
            "ForceCommand internal-sftp\n": f"ForceCommand internal-sftp -d {self.root}\n",
        }.items():
            assert before in text
            text = text.replace(before, after)
        return text


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SetupSite]:
    site = SetupSite(tmp_path)
    site.start()
    yield site
    site.stop()


def test_syncd_reads_and_pins_the_modern_host_key(site: SetupSite) -> None:
    assert shown_host_key("127.0.0.1", site.port) == site.host_key
    assert shown_host_key("127.0.0.1", site.port, "ssh-rsa").startswith("ssh-rsa ")
    drop = SftpDrop("127.0.0.1", site.port, site.user, None, site.key, site.host_key, None)
    assert drop.names(b".") == []
    drop.close()


@pytest.mark.parametrize("names", OLD.values(), ids=OLD)
def test_a_client_of_2016_can_write(site: SetupSite, names: tuple[str, ...]) -> None:
    done = old_client(site, names)
    assert done.returncode == 0, done.stderr
    assert (site.root / "made").is_dir()


@pytest.mark.parametrize("names", OLD.values(), ids=OLD)
def test_without_the_older_algorithms_it_could_not(tmp_path: Path, names: tuple[str, ...]) -> None:
    def modern(text: str) -> str:
        return "".join(line for line in text.splitlines(keepends=True) if "Algorithms +" not in line)

    site = SetupSite(tmp_path, modern)
    site.start()
    said = old_client(site, names).stderr
    site.stop()
    assert "no matching" in said


def test_another_address_is_refused(site: SetupSite) -> None:
    done = old_client(site, OLD["group 14"], "-oBindAddress=127.0.0.2")
    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    assert list(site.root.iterdir()) == []


def test_another_user_is_refused(site: SetupSite) -> None:
    with pytest.raises(SiteError, match="refuses"):
        SftpDrop("127.0.0.1", site.port, "nobody", None, site.key, site.host_key, None).names(b".")


def test_there_is_no_shell_and_no_tunnel(site: SetupSite) -> None:
    line = ["ssh", "-F/dev/null", f"-i{site.key}", f"-p{site.port}", "-oStrictHostKeyChecking=no"]
    line += ["-oUserKnownHostsFile=/dev/null", "-oBatchMode=yes", f"{site.user}@127.0.0.1"]
    done = subprocess.run(
        [*line, "touch", str(site.root / "made")], capture_output=True, check=False, timeout=30, input=b""
    )
    assert list(site.root.iterdir()) == [], done
    through = subprocess.run(
        [*line, "-W", f"127.0.0.1:{site.port}"], capture_output=True, check=False, timeout=30, input=b""
    )
    assert b"SSH-2.0" not in through.stdout
