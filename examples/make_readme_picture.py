"""Draws the picture of the README: the example pair and its matches.

The pair is registered, but the matcher does not use that: any keypoint may match any other. Correct
matches are horizontal lines; a wrong one can have any direction.

python examples/make_readme_picture.py
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from kglmatch import Matcher, load_image
from kglmatch.files import atomic_output
from kglmatch.visualize import draw_matches

ROOT = Path(__file__).resolve().parents[1]
QUALITY = 85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--max-keypoints", type=int, default=900, help="of each image")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/matches.jpg", help="file to write")
    args = parser.parse_args()

    vis, ir = (load_image(ROOT / f"examples/data/sentinel2_{band}.tif") for band in ("red", "nir"))
    matcher = Matcher.from_pretrained("kglnet-vis-nir")
    matches = matcher.match_images(vis, ir, max_keypoints=args.max_keypoints)
    picture = Image.fromarray(draw_matches(vis, ir, matches, max_lines=60))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=QUALITY, optimize=True, progressive=True, subsampling=0)
    with atomic_output(args.out) as temporary:
        temporary.write_bytes(encoded.getvalue())
    print(f"{args.out}: {len(matches)} matches, {len(encoded.getvalue()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
