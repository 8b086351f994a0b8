"""Ends with an error unless a tag is that of the version to release: `python .ci/check_tag.py v1.2.3`.

The version is written once, in kglmatch/options.py. The newest section of CHANGELOG.md must be of that
version, with its date; CITATION.cff states both.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def found(pattern: str, file: str) -> tuple[str, ...]:
    """The groups of the first line of a file that fits."""
    match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.M)
    return match.groups() if match else ("nothing", "nothing")


def problems(tag: str | None = None) -> list[str]:
    """What does not fit together; without a tag, of the files alone."""
    version, *_ = found(r'^__version__ = "(.+)"$', "kglmatch/options.py")
    newest, date = found(r"^## \[(\d[^\]]*)\] - (\d{4}-\d{2}-\d{2})$", "CHANGELOG.md")
    cited, *_ = found(r'^version: "?([^"\n]+)"?$', "CITATION.cff")
    released, *_ = found(r'^date-released: "?(\d{4}-\d{2}-\d{2})"?$', "CITATION.cff")
    pairs = [
        (newest, version, "the newest section of CHANGELOG.md"),
        (cited, version, "the version of CITATION.cff"),
        (released, date, "date-released of CITATION.cff"),
    ]
    if tag is not None:
        pairs.append((tag, f"v{version}", "the tag"))
    return [f"{what} is {is_}, expected {expected}" for is_, expected, what in pairs if is_ != expected]


if __name__ == "__main__":
    mistakes = problems(sys.argv[1])
    sys.exit("\n".join(mistakes) if mistakes else 0)
