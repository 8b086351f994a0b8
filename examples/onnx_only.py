"""Matches two images by onnxruntime; PyTorch is not needed, and not imported.

kglmatch export --onnx -o onnx/
python examples/onnx_only.py onnx/ examples/data/sentinel2_red.tif examples/data/sentinel2_nir.tif
"""

from __future__ import annotations

import argparse
import sys

from kglmatch import KGLMatchError, Matcher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what `kglmatch export --onnx` wrote")
    parser.add_argument("vis")
    parser.add_argument("ir")
    parser.add_argument("--max-keypoints", type=int, default=300)
    parser.add_argument("--max-displacement", type=float, default=8.0, help="pixels")
    arguments = parser.parse_args()
    matcher = Matcher.from_onnx(arguments.folder)
    matches = matcher.match_images(
        arguments.vis,
        arguments.ir,
        max_keypoints=arguments.max_keypoints,
        max_displacement=arguments.max_displacement,
    )
    inliers = 0 if matches.inliers is None else int(matches.inliers.sum())
    print(f"{matcher}: {len(matches)} matches, {inliers} inliers; torch imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    try:
        main()
    except KGLMatchError as error:
        sys.exit(f"error: {error}")
