"""Packs the plugin for QGIS's plugin manager: python integrations/qgis/package.py -o kglmatch_qgis.zip"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

PLUGIN = Path(__file__).resolve().parent / "kglmatch_qgis"
FILES = ("*.py", "metadata.txt", "icon.svg", "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", metavar="ZIP", type=Path, default=Path("kglmatch_qgis.zip"))
    output = parser.parse_args().output
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as file:
        for pattern in FILES:
            for path in sorted(PLUGIN.glob(pattern)):
                file.write(path, f"{PLUGIN.name}/{path.name}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
