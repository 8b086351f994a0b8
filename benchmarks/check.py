"""Does `Matcher.check` find known shifts? Median error in pixels, on registered pairs.

    python benchmarks/check.py DATA/vis-nir/country
    python benchmarks/check.py DATA/vis-lwir/roadscene --model kglnet-vis-lwir --every 9
    python benchmarks/check.py DATA/vis-sar/sentinel/test --model kglnet-vis-sar

Shifts the ir image of each pair by a known amount, up to 4 pixels in x and y, and compares it with the change
of the displacement that `check` reports: what a pair is off by before it is shifted falls out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from kglmatch import Matcher
from kglmatch.datasets import ImagePair, find_image_pairs
from kglmatch.files import atomic_output
from kglmatch.images import load_image

LARGEST = 4.0  # pixels


def measure(matcher: Matcher, pairs: list[ImagePair]) -> list[float | None]:
    """Error in pixels of each pair; None where `check` did not judge it."""
    rng = np.random.default_rng(0)
    errors: list[float | None] = []
    for pair in pairs:
        vis, ir = load_image(pair.vis), load_image(pair.ir)
        known = rng.uniform(-LARGEST, LARGEST, 2)
        shift = np.array([[1, 0, known[0]], [0, 1, known[1]]])
        moved = cv2.warpAffine(
            ir, shift, ir.shape[::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        before, after = (matcher.check(vis, image) for image in (ir, np.clip(moved, 0, 1)))
        error = float(np.linalg.norm(after.shift - before.shift - known))
        errors.append(error if np.isfinite(error) else None)
        print(pair.name, before.verdict, "own shift", before.shift.round(2), f"error {error:.2f}", flush=True)
    return errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of registered image pairs")
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth pair")
    parser.add_argument("--limit", type=int, metavar="N", help="N pairs at most")
    parser.add_argument("--save", type=Path, help="write the errors as JSON")
    args = parser.parse_args(argv)
    pairs = find_image_pairs(args.data)[:: args.every][: args.limit]
    errors = measure(Matcher.from_pretrained(args.model, device="cpu"), pairs)
    judged = [error for error in errors if error is not None]
    median = f"; median error {np.median(judged):.3f} px" if judged else ""
    print(f"{len(judged)} of {len(errors)} judged{median}")
    if args.save:
        with atomic_output(args.save) as temporary:
            temporary.write_text(json.dumps({"errors": errors}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
