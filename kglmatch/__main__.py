"""`python -m kglmatch`."""

from __future__ import annotations

import sys

from kglmatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
