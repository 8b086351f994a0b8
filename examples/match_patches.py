"""Scores and matches patches, for users who cut their own.

Cuts 64 x 64 patches around the same places of the registered example pair, scores pairs that show the
same place and pairs that do not, and then matches one set against the other in shuffled order.

python examples/match_patches.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kglmatch import Matcher, detect_keypoints, extract_patches, load_image

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--patches", type=int, default=64, help="how many to cut from each image")
    args = parser.parse_args()

    vis_image, ir_image = load_image(DATA / "sentinel2_red.tif"), load_image(DATA / "sentinel2_nir.tif")
    xy = detect_keypoints(vis_image, max_keypoints=args.patches, border=32).xy  # (N, 2)
    vis_patches = extract_patches(vis_image, xy)  # (N, 64, 64) float32
    ir_patches = extract_patches(ir_image, xy)

    matcher = Matcher.from_pretrained("kglnet-vis-nir")
    # The expensive part, done once for each patch. Scoring and matching then work on features.
    vis, ir = matcher.describe(vis_patches, "vis"), matcher.describe(ir_patches, "ir")

    same = matcher.score(vis, ir)  # (N,) row by row
    different = matcher.score(vis, ir[np.roll(np.arange(len(ir)), 1)])
    print(f"{len(xy)} pairs of the same place:  median score {np.median(same):.3f}")
    print(f"{len(xy)} pairs of other places:    median score {np.median(different):.3f}")

    order = np.random.default_rng(0).permutation(len(ir))
    matches = matcher.match(vis, ir[order])
    right = int((order[matches.indices[:, 1]] == matches.indices[:, 0]).sum())
    print(f"matched in shuffled order: {len(matches)} matches, {right} of them right")


if __name__ == "__main__":
    main()
