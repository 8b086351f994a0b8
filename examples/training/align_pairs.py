"""Lays the pairs of a data set onto each other more exactly than their makers did, before training on them.

    python examples/training/align_pairs.py DATA/vis-nir/country -o aligned/vis-nir

Public "registered" pairs are off by a few pixels, some by thirty; a matcher trained on them is told that
wrong places match. Writes a folder of links in the layout NAME_rgb.*, NAME_nir.* with NAME_nir.npy, the
affine that `kglmatch.datasets` reads, for each pair in which a transform is clearly better supported than
none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kglmatch.datasets import find_image_pairs
from kglmatch.files import make_folder
from kglmatch.geometry import corner_error
from kglmatch.images import load_image
from kglmatch.registration import refine

GAIN = 0.05  # of the mean vote, over the pair as it is
LARGEST = 40.0  # pixels; more is not a correction but a mistake


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kind", default="affine", help="similarity for radar, whose windows are noisy")
    arguments = parser.parse_args()
    folder = make_folder(arguments.output)
    corrected = 0
    pairs = find_image_pairs(arguments.data)
    for pair in pairs:
        for source, suffix in ((pair.vis, "rgb"), (pair.ir, "nir")):
            link = folder / f"{pair.name}_{suffix}{source.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(source.resolve())
        vis, ir = load_image(pair.vis), load_image(pair.ir)
        start = np.eye(3) if pair.affine is None else np.vstack([pair.affine, [0, 0, 1]])
        found = refine(vis, ir, start, kind=arguments.kind)
        if found is None:
            print(f"{pair.name}: too little structure")
            continue
        moved = corner_error(found.transform, start, (vis.shape[1], vis.shape[0]))
        better = found.support > found.support_at_start + GAIN and moved < LARGEST
        print(
            f"{pair.name}: {moved:.1f} px, support {found.support_at_start:.2f} -> {found.support:.2f}"
            f"{', corrected' if better else ''}"
        )
        if better:
            np.save(folder / f"{pair.name}_nir.npy", found.transform[:2])
        elif pair.affine is not None:
            np.save(folder / f"{pair.name}_nir.npy", pair.affine)
        corrected += better
    print(f"{corrected} of {len(pairs)} pairs corrected")


if __name__ == "__main__":
    main()
