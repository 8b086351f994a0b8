"""Aligns the pairs of a data set more exactly than published, before training on them.

    python examples/training/align_pairs.py DATA/vis-nir/country -o aligned/vis-nir

Public "registered" pairs are off by a few pixels, some by thirty, and a matcher trained on them learns to
match the wrong places. Writes a folder of links in the layout NAME_rgb.*, NAME_nir.*, with NAME_nir.npy,
the affine that `kglmatch.datasets` reads, for each pair in which a transform is clearly better supported
than none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kglmatch.datasets import find_image_pairs
from kglmatch.files import make_folder
from kglmatch.geometry import corner_error
from kglmatch.images import load_image
from kglmatch.registration.align import mean_vote, refine

GAIN = 0.05  # of the mean vote, over the pair as published
LARGEST = 40.0  # pixels; more is not a correction but a mistake
ROUNDS = 2  # the second starts nearer, so that its windows overlap better


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--kind",
        choices=("similarity", "affine"),
        default="affine",
        help="similarity for radar, whose windows are noisy",
    )
    parser.add_argument(
        "--leave-out-every", type=int, metavar="N", help="skip the Nth, 2Nth, ... pair: those are for testing"
    )
    arguments = parser.parse_args()
    folder = make_folder(arguments.output)
    corrected = 0
    pairs = find_image_pairs(arguments.data)
    if arguments.leave_out_every:
        pairs = [pair for i, pair in enumerate(pairs, 1) if i % arguments.leave_out_every]
    for pair in pairs:
        for source, suffix in ((pair.vis, "rgb"), (pair.ir, "nir")):
            link = folder / f"{pair.name}_{suffix}{source.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(source.resolve())
        affine = folder / f"{pair.name}_nir.npy"
        affine.unlink(missing_ok=True)
        start = np.eye(3) if pair.affine is None else np.vstack([pair.affine, [0, 0, 1]])
        transform = align(load_image(pair.vis), load_image(pair.ir), start, pair.name, arguments.kind)
        if transform is not start:
            corrected += 1
        if transform is not start or pair.affine is not None:
            np.save(affine, transform[:2])
    print(f"{corrected} of {len(pairs)} pairs corrected")


def align(vis: np.ndarray, ir: np.ndarray, start: np.ndarray, name: str, kind: str) -> np.ndarray:
    """The better supported transform (3, 3), or `start` itself."""
    transform = start
    for _ in range(ROUNDS):
        found = refine(vis, ir, transform, kind=kind)
        if found is not None:
            transform = found.transform
    before, after = (mean_vote(vis, ir, t) for t in (start, transform))
    if before is None or after is None or transform is start:
        print(f"{name}: too little structure")
        return start
    moved = corner_error(transform, start, (vis.shape[1], vis.shape[0]))
    better = after > before + GAIN and moved < LARGEST
    print(f"{name}: {moved:.1f} px, mean vote {before:.2f} -> {after:.2f}{', corrected' if better else ''}")
    return transform if better else start


if __name__ == "__main__":
    main()
