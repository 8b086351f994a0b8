"""Which image pairs of a data set are registered wrongly, by their published transforms?

    python benchmarks/published_registration.py DATA/vis-nir/field DATA/vis-nir/water

Refines the published affine (or the identity) as a homography, by structure alone, and prints for each pair
how far that moves the corners of the visible image, and how clearly the finest structure agrees before and
after ("mean vote"; unrelated images reach 0.1). Pairs that move by more than 3 pixels and agree clearly
better are listed at the end, in the form that `kglmatch eval --exclude` takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kglmatch.datasets import ImagePair, find_patch_sources
from kglmatch.geometry import corner_error
from kglmatch.images import load_image
from kglmatch.registration.align import mean_vote, refine

OFF = 3.0  # pixels
LARGEST = 40.0  # pixels; more is not a correction but a mistake
CLEAR = 0.2  # mean vote, twice what chance reaches
GAIN = 0.05
ROUNDS = 2  # the second starts nearer, so that its windows overlap better


def measure(pair: ImagePair) -> tuple[float, float, float] | None:
    """Pixels that the refined transform moves the corners by, and the mean votes before and after."""
    vis, ir = load_image(pair.vis), load_image(pair.ir)
    published = np.eye(3) if pair.affine is None else np.vstack([pair.affine, [0, 0, 1]])
    transform = published
    for _ in range(ROUNDS):
        found = refine(vis, ir, transform, kind="homography")
        if found is not None:
            transform = found.transform
    before, after = (mean_vote(vis, ir, t) for t in (published, transform))
    if before is None or after is None:
        return None
    return corner_error(transform, published, (vis.shape[1], vis.shape[0])), before, after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+", help="folders of image pairs, or of such folders")
    off = []
    for source in find_patch_sources(parser.parse_args().data):
        for pair in source.pairs:
            name, found = f"{source.name}/{pair.name}", measure(pair)
            if found is None:
                print(f"{name}: too little structure", flush=True)
                continue
            moved, before, after = found
            print(f"{name}: {moved:.1f} px, mean vote {before:.2f} -> {after:.2f}", flush=True)
            if OFF < moved < LARGEST and after > max(CLEAR, before + GAIN):
                off.append(name)
    print(f"off by more than {OFF:g} px: {','.join(off) or 'none'}")


if __name__ == "__main__":
    main()
