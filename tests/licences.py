"""The licences of everything that syncd is installed with: a table, and exit code 1 where one needs a look.

`make licences` prints it. A package's own words come first (License-Expression, License), then its classifiers.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
ALLOWED = ("Apache", "BSD", "LGPL", "MIT", "Mozilla Public License", "MPL", "PSF", "Public Domain")  # used unchanged
NEEDS_A_LOOK = re.compile(r"(?<!L)GPL|AGPL|Commercial|Proprietary")


def locked() -> list[str]:
    """The names of the packages that an installation takes, and no other."""
    lines = REQUIREMENTS.read_text("utf-8").splitlines()
    return [line.partition("==")[0] for line in lines if "==" in line]


def licence(name: str) -> str:
    """What the installed package says of its licence; "" where it says nothing."""
    said = metadata.metadata(name)
    classes = [each.rpartition(" :: ")[2] for each in said.get_all("Classifier") or () if each.startswith("License")]
    return said["License-Expression"] or (said["License"] or "").strip().partition("\n")[0] or ", ".join(classes)


def acceptable(words: str) -> bool:
    """Whether these words name a licence that allows a practice to run the package unchanged."""
    return any(each in words for each in ALLOWED) and not NEEDS_A_LOOK.search(words)


def main() -> int:
    """Print the table; 1 where a package has another licence than those allowed, or names none."""
    found = {name: licence(name) for name in locked()}
    for name, words in found.items():
        sys.stdout.write(f"{name:22} {metadata.version(name):12} {words}\n")
    odd = [name for name, words in found.items() if not acceptable(words)]
    sys.stdout.write(f"{len(found)} packages; to be looked at: {', '.join(odd) or 'none'}\n")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
