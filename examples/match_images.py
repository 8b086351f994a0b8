"""Matches two images of different sensors: prints what was found, writes a picture and a table.

python examples/match_images.py                                     (the example pair)
python examples/match_images.py scene_vis.png scene_nir.png
python examples/match_images.py scene_vis.png scene_nir.png --max-displacement 10    (nearly registered)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kglmatch import KGLMatchError, Matcher, load_image
from kglmatch.images import save_image
from kglmatch.visualize import draw_checkerboard, draw_matches

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vis", nargs="?", default=DATA / "sentinel2_red.tif", help="the visible image")
    parser.add_argument(
        "ir", nargs="?", default=DATA / "sentinel2_nir.tif", help="the image of the other sensor"
    )
    parser.add_argument("--model", default="kglnet-vis-nir", help="bundled name, folder or Hub id")
    parser.add_argument("--max-displacement", type=float, help="pixels; for registered images")
    parser.add_argument("--max-keypoints", type=int, default=1000, help="of each image")
    parser.add_argument("--out", type=Path, default=Path.cwd(), help="folder to write to")
    args = parser.parse_args()

    # Each image is read once; what follows takes arrays as well as paths.
    vis, ir = load_image(args.vis), load_image(args.ir)
    matcher = Matcher.from_pretrained(args.model)
    matches = matcher.match_images(
        vis, ir, max_displacement=args.max_displacement, max_keypoints=args.max_keypoints
    )
    args.out.mkdir(parents=True, exist_ok=True)
    matches.save(args.out / "matches.csv")
    save_image(args.out / "matches.png", draw_matches(vis, ir, matches))
    if matches.homography is None:
        print(f"{len(matches)} matches, too few agree on a homography")
        return
    print(f"{len(matches)} matches, {matches.inliers.sum()} agree on the homography (visible to ir pixels)")
    print(matches.homography.round(5))
    save_image(args.out / "checkerboard.png", draw_checkerboard(vis, ir, matches.homography))


if __name__ == "__main__":
    try:
        main()
    except KGLMatchError as error:
        sys.exit(f"error: {error}")
