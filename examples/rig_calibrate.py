"""Calibrates a multispectral rig on the captures of a flight, and stacks the bands of each capture.

    python examples/rig_calibrate.py FLIGHT OUT
    python examples/rig_calibrate.py

Without arguments a small flight is made of the example pair: parts of a scene in red and near infrared, of
which the near-infrared camera is turned and moved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

from kglmatch import KGLMatchError, Matcher, load_image
from kglmatch.batch import apply_rig, calibrate_rig, find_captures

DATA = Path(__file__).resolve().parent / "data"
SIDE = 160


def make_flight(folder: Path) -> None:
    """Writes SCENE_1.png (red) and SCENE_2.png (near infrared) of parts of the example pair."""
    folder.mkdir(exist_ok=True)
    red, nir = (load_image(DATA / f"sentinel2_{band}.tif") for band in ("red", "nir"))
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), 0.7, 1.01) + np.array([[0, 0, 4], [0, 0, -3]])
    for number, (x, y) in enumerate(((0, 0), (180, 160), (20, 180))):
        part = slice(y, y + SIDE), slice(x, x + SIDE)
        moved = cv2.warpAffine(nir[part], turn, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT)
        for band, image in (("1", red[part]), ("2", moved)):
            cv2.imwrite(str(folder / f"SCENE{number}_{band}.png"), np.rint(image * 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flight", metavar="FLIGHT", type=Path, nargs="?")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", default=Path("stacks"))
    parser.add_argument("--model", default="kglnet-vis-nir")
    args = parser.parse_args()
    if args.flight is None:
        args.flight = Path("flight")
        make_flight(args.flight)
    try:
        captures = find_captures(args.flight)
        rig = calibrate_rig(Matcher.from_pretrained(args.model), captures, max_displacement=20)
        for band in rig.bands:
            print(f"band {band.name}: {band.verdict}, {band.reason}")
        rig.save("rig.json")
        # A flight that one transform does not serve is refined capture by capture.
        done = apply_rig(rig, captures, args.out, crop=True, refine=not rig.serves)
    except KGLMatchError as error:
        sys.exit(f"error: {error}")
    for name, problem in done.problems.items():
        print(f"{name}: {problem}")
    print(f"{len(done.written)} stacks of {1 + len(rig.bands)} bands in {args.out}")


if __name__ == "__main__":
    main()
