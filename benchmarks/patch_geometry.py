"""Upright patches of one scale, compared with patches at the keypoint's orientation and scale.

    python benchmarks/patch_geometry.py aligned/vis-nir --slice=-6::2
    python benchmarks/patch_geometry.py aligned/vis-nir --slice=-6::2 --detector sift

The second image of each pair is rotated and scaled by known amounts. Matches are mutual nearest
descriptors among all keypoints, correct within 3 pixels. "upright" cuts patches as they are; "turned"
rotates them to the dominant direction of the gradients around the keypoint, which is known up to 180
degrees, so that ir patches are cut both ways and the nearer one counts. SIFT's keypoints also have an
angle ("own angle", again both ways) and a scale.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from keypoints import chosen_pairs, describe, distances, load, matched, move, where_both_are

from kglmatch import Matcher
from kglmatch.geometry import transform_points
from kglmatch.keypoints import Keypoints, detect_keypoints, gradient_directions

# Turn in degrees and scale of the second image.
CONDITIONS = ((0.0, 1.0), (15.0, 1.0), (90.0, 1.0), (0.0, 1.25))
WAYS = ("upright", "turned", "own angle", "turned, scaled")  # the last two know SIFT alone
SIFT_UNIT = 4.0  # pixels: SIFT's size at which a patch is cut at scale 1; most are about this


def similarities(matcher: Matcher, way: str, vis: Any, ir: Any, kv: Keypoints, ki: Keypoints) -> np.ndarray:
    """(N, M) inner products of descriptors; the better of both half turns."""
    if way == "upright":
        return describe(matcher, vis, kv.xy, "vis") @ describe(matcher, ir, ki.xy, "ir").T
    angles = [
        k.angle if way == "own angle" else gradient_directions(i, k.xy) for i, k in ((vis, kv), (ir, ki))
    ]
    scaled = way.endswith("scaled")
    scales = [np.clip(k.scale / SIFT_UNIT, 0.7, 4) if scaled else None for k in (kv, ki)]
    a = describe(matcher, vis, kv.xy, "vis", angle=angles[0], scale=scales[0])
    turned = [describe(matcher, ir, ki.xy, "ir", angle=angles[1] + t, scale=scales[1]) for t in (0, 180)]
    return np.maximum(*(a @ b.T for b in turned))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of image pairs")
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--slice", default="::", metavar="A:B:C", help="which pairs, as Python slices")
    parser.add_argument("--detector", default="structure", choices=("structure", "sift"))
    parser.add_argument("--pixels", type=float, default=3000, metavar="N", help="pixels a keypoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the single results")
    arguments = parser.parse_args()
    pairs = chosen_pairs(arguments.data, arguments.slice)
    ways = WAYS if arguments.detector == "sift" else WAYS[:2]
    matcher = Matcher.from_pretrained(arguments.model, device="cpu")
    results: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for pair in pairs:
        vis, ir, _, true = load(pair, None)
        for turn, scale in CONDITIONS:
            moved, valid, truth = move(ir, true, turn, scale, np.zeros(2))
            masks = where_both_are(vis, moved, valid, truth, matcher.config.patch_size)
            count = max(1, int(masks[0].sum() / arguments.pixels))
            kv, ki = (
                detect_keypoints(image, detector=arguments.detector, max_keypoints=count, mask=mask)
                for image, mask in zip((vis, moved), masks, strict=True)
            )
            apart = distances(transform_points(truth, kv.xy), ki.xy)
            row = results.setdefault(f"{turn:g} deg, {scale:g}x", {})
            for way in ways:
                alike = similarities(matcher, way, vis, moved, kv, ki)
                row.setdefault(way, []).append(matched(alike, apart, None))
    print(
        f"{len(pairs)} pairs of {arguments.data}, {arguments.detector}: right of all matches, mean of a pair"
    )
    print(f"{'':16}" + "".join(f"{way:>24}" for way in ways))
    for condition, row in results.items():
        means = [np.mean(row[way], axis=0) for way in ways]
        cells = (f"{right:10.1f} of{n:6.1f}{100 * right / max(n, 1e-9):4.0f}%" for n, right in means)
        print(f"{condition:16}" + "".join(cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
