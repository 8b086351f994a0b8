"""Draws the pictures of the registration guide, from the example pair.

The near infrared image is rotated by 6 degrees, enlarged by 1.05 and shifted, as if from a second camera,
and registered again: register.jpg shows both as a checkerboard, before and after. For check.jpg it is
only rotated by 0.4 degrees and shifted by (1, -0.5) pixels, and `Matcher.check` measures that.

python examples/make_registration_pictures.py
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from kglmatch import Matcher, load_image
from kglmatch.files import atomic_output
from kglmatch.geometry import corner_error, similarity_about
from kglmatch.visualize import draw_checkerboard, draw_displacement

ROOT = Path(__file__).resolve().parents[1]
QUALITY = 85
WIDTH = 1000  # pixels, of a picture


def write(path: Path, picture: np.ndarray) -> None:
    height = round(picture.shape[0] * WIDTH / picture.shape[1])
    encoded = io.BytesIO()
    shrunk = Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.LANCZOS)
    shrunk.save(encoded, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    with atomic_output(path) as temporary:
        temporary.write_bytes(encoded.getvalue())
    print(f"{path}: {len(encoded.getvalue()) / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--crop", type=int, default=512, help="pixels of the example pair to use")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", help="folder to write to")
    args = parser.parse_args()

    vis, ir = (
        load_image(ROOT / f"examples/data/sentinel2_{band}.tif")[: args.crop, : args.crop]
        for band in ("red", "nir")
    )
    size = (vis.shape[1], vis.shape[0])
    centre = (size[0] - 1) / 2, (size[1] - 1) / 2
    matcher = Matcher.from_pretrained("kglnet-vis-nir")

    true = similarity_about(6.0, 1.05, centre, (centre[0] + 14, centre[1] - 9))
    seen = np.clip(cv2.warpPerspective(ir, true, size, flags=cv2.INTER_CUBIC), 0, 1)
    found = matcher.register(vis, seen)
    if found.transform is None:
        raise SystemExit("the pair could not be registered")
    error = corner_error(found.transform, true, size)
    print(f"register: {found.verdict}, {found.kind}, corners {error:.2f} px from the truth")
    boards = [draw_checkerboard(vis, seen, transform) for transform in (np.eye(3), found.transform)]
    gap = np.full((boards[0].shape[0], 24, 3), 255, np.uint8)
    write(args.out / "register.jpg", np.hstack([boards[0], gap, boards[1]]))

    true = similarity_about(0.4, 1.0, centre, (centre[0] + 1, centre[1] - 0.5))
    seen = np.clip(cv2.warpPerspective(ir, true, size, flags=cv2.INTER_CUBIC), 0, 1)
    report = matcher.check(vis, seen)
    print(f"check: {report.verdict}, shift {report.shift.round(2)}, {100 * report.judged_share:.0f} % judged")
    write(args.out / "check.jpg", draw_displacement(vis, report))


if __name__ == "__main__":
    main()
