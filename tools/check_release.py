"""Is this tag the version that a release would publish? Usage: python tools/check_release.py v0.1.0

The version is written once, in `apollo_optim/__init__.py`; a release has a section of CHANGELOG.md with a date instead
of "unreleased", and CITATION.cff names it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """As the package says, without importing it."""
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "apollo_optim" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("error: apollo_optim/__init__.py has no __version__")
    return found[1]


def problems(tag: str) -> list[str]:
    """What is not ready for it."""
    now, found = version(), []
    if tag != f"v{now}":
        found.append(f"the tag is {tag}, the version {now}")
    if f"\nversion: {now}\n" not in (ROOT / "CITATION.cff").read_text():
        found.append(f"CITATION.cff does not say version: {now}")
    heading = re.search(rf"^## {re.escape(now)}(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heading is None:
        found.append(f"CHANGELOG.md has no section {now}")
    elif not re.fullmatch(r" \(\d{4}-\d\d-\d\d\)", heading[1]):
        found.append(f"CHANGELOG.md says {now}{heading[1]}: a release has its date there")
    return found


def main() -> int:
    """Say what is not ready; 1 if there is something."""
    found = problems(sys.argv[1])
    sys.stderr.writelines(f"error: {line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
