"""Which keypoints repeat in the other spectral band, and which of them are matched.

    python benchmarks/keypoints.py DATA/vis-nir --slice ::10            # pairs with a known affine
    python benchmarks/keypoints.py aligned/vis-lwir --slice=-20: --model kglnet-vis-lwir --warp
    python benchmarks/keypoints.py aligned/vis-sar --slice=-6: --model kglnet-vis-sar --warp
    python benchmarks/keypoints.py aligned/vis-lwir --slice=-20: --model kglnet-vis-lwir --dense

Every detector gives the same number of keypoints, one per N pixels (`--pixels N`). "4 px" is the share of
keypoints with a keypoint of the other image within 4 pixels of the corresponding place, mean of both
directions; "by chance" is the same after a shift that leaves no place where it was. Matches are mutual
nearest descriptors, correct within 3 pixels; with a prior only keypoints within 16 pixels of the correct
place are candidates. `--warp` moves the second image of registered pairs by a seeded similarity (10 px, 3
degrees, 3 %), without which a grid would repeat by construction. `--dense` compares `match_images` with
and without `dense`, at its defaults, on pairs displaced by up to 5 px in x and y, with
`max_displacement=8`; "more" detects eight times as many keypoints, for about as many patches. The folders
"aligned" are made by `examples/training/align_pairs.py`: ground truth by this package's own registration,
where the published one is off by some pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from local import every_pair

from kglmatch import Matcher
from kglmatch.datasets import ImagePair
from kglmatch.geometry import similarity_about, transform_points
from kglmatch.images import load_image
from kglmatch.keypoints import DETECTORS, detect_keypoints
from kglmatch.patches import extract_patches

Image = np.ndarray
RIGHT = 3.0  # pixels
PRIOR = 16.0  # pixels


def chosen_pairs(data: Path, which: str) -> list[ImagePair]:
    """The pairs of a folder that a slice A:B:C takes."""
    pairs = [pair for _, pair in every_pair(data)]
    return pairs[slice(*(int(part) if part else None for part in which.split(":")))]


def move(ir: Image, true: Image, rotation: float, scale: float, shift: Any) -> tuple[Image, Image, Image]:
    """The ir image turned about its middle; its mask of valid pixels, and the new transform."""
    centre = np.array([(ir.shape[1] - 1) / 2, (ir.shape[0] - 1) / 2])
    step = similarity_about(rotation, scale, tuple(centre), tuple(centre + shift))
    size = ir.shape[::-1]
    moved = np.clip(cv2.warpPerspective(ir, step, size, flags=cv2.INTER_CUBIC), 0, 1)
    valid = cv2.warpPerspective(np.ones_like(ir), step, size) > 0.999
    return moved, valid, step @ true


def load(pair: ImagePair, seed: int | None, only_shift: bool = False) -> tuple[Image, Image, Image, Image]:
    """vis, ir (H, W) float32, the ir mask of valid pixels, the transform (3, 3) from vis to ir pixels."""
    vis, ir = load_image(pair.vis), load_image(pair.ir)
    true = np.vstack([np.eye(2, 3) if pair.affine is None else pair.affine, [0, 0, 1]])
    if seed is None:
        # What the warp of these pairs left uncovered is not valid.
        covered = cv2.warpPerspective(np.ones_like(vis), true, ir.shape[::-1]) > 0.999
        return vis, ir, covered, true
    rng = np.random.default_rng(seed)
    if only_shift:
        return vis, *move(ir, true, 0, 1, rng.uniform(-5, 5, 2))
    rotation, scale, shift = rng.uniform(-3, 3), rng.uniform(0.97, 1.03), rng.uniform(-10, 10, 2)
    return vis, *move(ir, true, rotation, scale, shift)


# --- detectors that the package does not hold ---------------------------------------------------


def gradient_magnitude(image: Image) -> Image:
    """Edge strength over its local mean, (H, W) in [0, 1]."""
    smooth = cv2.GaussianBlur(image, (0, 0), 1)
    strength = np.hypot(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1))
    local = cv2.GaussianBlur(strength, (0, 0), 12)
    return np.clip(strength / (local + 0.3 * strength.mean() + 1e-6) / 4, 0, 1)


def phase_corners(image: Image) -> Image:
    """Smallest moment of phase congruency, (H, W) (Kovesi, "Phase congruency detects corners and
    edges", DICTA 2003, with its parameters)."""
    height, width = image.shape
    rows, columns = (cv2.getOptimalDFTSize(side + 32) for side in image.shape)
    padded = cv2.copyMakeBorder(image, 0, rows - height, 0, columns - width, cv2.BORDER_REFLECT)
    fy, fx = np.fft.fftfreq(rows).astype(np.float32)[:, None], np.fft.fftfreq(columns).astype(np.float32)
    radius, theta = np.hypot(fx, fy), np.arctan2(-fy, fx)
    radius[0, 0] = 1
    spectrum = np.fft.fft2(padded) / (1 + (radius / 0.45) ** 30)
    spectrum[0, 0] = 0
    width_of = 2 * np.log(0.55) ** 2
    gabors = [spectrum * np.exp(-(np.log(radius * 3 * 2.1**s) ** 2) / width_of) for s in range(4)]
    a, b, c = np.zeros((3, height, width), np.float32)
    for angle in np.arange(6) * np.pi / 6:
        away = np.abs(np.arctan2(np.sin(theta - angle), np.cos(theta - angle)))
        spread = (np.cos(np.minimum(away * 3, np.pi)) + 1) / 2
        answers = [np.fft.ifft2(gabor * spread)[:height, :width] for gabor in gabors]
        total = sum(answers)
        turned = [answer * (total.conj() / (np.abs(total) + 1e-9)) for answer in answers]
        energy = sum(t.real - np.abs(t.imag) for t in turned)
        tau = np.median(np.abs(answers[0])) / np.sqrt(np.log(4)) * (1 - 2.1**-4) / (1 - 1 / 2.1)
        noise = tau * (np.sqrt(np.pi / 2) + 2 * np.sqrt((4 - np.pi) / 2))
        congruency = np.maximum(energy - noise, 0) / (sum(np.abs(t) for t in turned) + 1e-4)
        cos, sin = congruency * np.cos(angle), congruency * np.sin(angle)
        a, b, c = a + cos * cos, b + 2 * cos * sin, c + sin * sin
    return (a + c - np.sqrt(b * b + (a - c) ** 2)).astype(np.float32)


def peaks(strength: Image, count: int, mask: Image) -> Image:
    """(N, 2) xy of the highest local maxima, none within 4 pixels of a higher one."""
    strength = cv2.GaussianBlur(strength, (0, 0), 1)
    y, x = np.nonzero((strength == cv2.dilate(strength, np.ones((9, 9)))) & (strength > 0) & mask)
    order = np.argsort(-strength[y, x], kind="stable")[:count]
    return np.stack([x, y], axis=1)[order].astype(np.float32)


OWN = ("gradient", "phase", "random")


def detect(name: str, image: Image, count: int, mask: Image) -> Image:
    """(N, 2) xy pixels."""
    if name == "phase":
        return peaks(phase_corners(image), count, mask)
    if name == "random":
        at = np.argwhere(mask)[:, ::-1].astype(np.float32)
        return np.random.default_rng(len(at)).choice(at, count)
    if name == "gradient":
        image, name = gradient_magnitude(image), "gftt"
    return detect_keypoints(image, detector=name, max_keypoints=count, mask=mask).xy


# --- what is measured ---------------------------------------------------------------------------


def where_both_are(vis: Image, ir: Image, valid: Image, true: Image, size: int) -> tuple[Image, Image]:
    """Masks of the pixels whose patches lie in both images."""
    half = size // 2
    vis_mask = np.zeros(vis.shape, np.uint8)
    vis_mask[half:-half, half:-half] = 1
    whole = cv2.erode(valid.astype(np.uint8), np.ones((size + 1, size + 1), np.uint8), borderValue=0)
    back = cv2.warpPerspective(whole, np.linalg.inv(true), vis.shape[::-1], flags=cv2.INTER_NEAREST)
    there = cv2.warpPerspective(vis_mask, true, ir.shape[::-1], flags=cv2.INTER_NEAREST)
    return (vis_mask & back).astype(bool), (whole & there).astype(bool)


def distances(a: Image, b: Image) -> Image:
    """(N, M) pixels."""
    return np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1)).astype(np.float32)


def repeated(apart: Image, radius: float) -> float:
    if not apart.size:
        return 0.0
    return float(((apart.min(1) <= radius).mean() + (apart.min(0) <= radius).mean()) / 2)


def matched(similarity: Image, apart: Image, prior: float | None) -> tuple[int, int]:
    """Number of mutual nearest neighbours, and of those that are right."""
    if prior is not None:
        similarity = np.where(apart <= prior, similarity, -np.inf)
    if not similarity.size:
        return 0, 0
    rows = np.arange(len(similarity))
    best = similarity.argmax(1)
    mutual = (similarity.argmax(0)[best] == rows) & np.isfinite(similarity[rows, best])
    return int(mutual.sum()), int((apart[rows, best] <= RIGHT)[mutual].sum())


def describe(matcher: Matcher, image: Image, xy: Image, modality: Any, **how: Any) -> Image:
    patches = extract_patches(image, xy, patch_size=matcher.config.patch_size, **how)
    return matcher.describe(patches, modality, maps=False).descriptors


Rows = dict[str, list[list[float]]]


def compare_detectors(matcher: Matcher, pair: Any, names: list[str], pixels: float, rows: Rows) -> None:
    vis, ir, valid, true = pair
    masks = where_both_are(vis, ir, valid, true, matcher.config.patch_size)
    count = max(1, int(masks[0].sum() / pixels))
    for name in names:
        began = time.process_time()
        a, b = detect(name, vis, count, masks[0]), detect(name, ir, count, masks[1])
        seconds = time.process_time() - began
        apart = distances(transform_points(true, a), b)
        # The same keypoints, moved round the image: as clustered, but none where it was.
        first, side = a.min(0), np.ptp(a, axis=0) + 1
        moved = [(a + by - first) % side + first for by in ((37, 21), (-29, 43), (53, -31))]
        chance = np.mean([repeated(distances(transform_points(true, m), b), 4) for m in moved])
        alike = describe(matcher, vis, a, "vis") @ describe(matcher, ir, b, "ir").T
        rows.setdefault(name, []).append(
            [len(a), repeated(apart, 2), repeated(apart, 4), chance,
             *matched(alike, apart, PRIOR), *matched(alike, apart, None), seconds]
        )  # fmt: skip


def print_detectors(rows: Rows) -> None:
    print(f"{'':10}{'keypoints':>10}{'2 px':>7}{'4 px':>7}{'by chance':>11}"
          f"{'right of matches, prior':>27}{'right, no prior':>25}{'CPU s':>7}")  # fmt: skip
    for name, values in rows.items():
        n, two, four, chance, some, some_right, free, free_right, seconds = np.mean(values, axis=0)
        print(f"{name:10}{n:10.0f}{100 * two:7.1f}{100 * four:7.1f}{100 * chance:11.1f}"
              f"{some_right:11.1f} of {some:5.1f} {100 * some_right / max(some, 1e-9):5.1f}%"
              f"{free_right:9.1f} of {free:5.1f} {100 * free_right / max(free, 1e-9):5.1f}%"
              f"{seconds:7.2f}")  # fmt: skip


def compare_dense(matcher: Matcher, pair: Any, names: list[str | None], pixels: float, rows: Rows) -> None:
    vis, ir, _, true = pair
    count = max(1, int(vis.size / pixels))
    for name, many, dense in (("detected", count, False), ("more", 8 * count, False), ("dense", count, True)):
        began = time.process_time()
        how = {"detector": names[0], "max_keypoints": many, "max_displacement": 8, "dense": dense}
        found = matcher.match_images(vis, ir, **how)
        seconds = time.process_time() - began
        off = np.linalg.norm(transform_points(true, found.keypoints_vis) - found.keypoints_ir, axis=1)
        rows.setdefault(name, []).append([many, len(off), (off <= RIGHT).sum(), (off <= 1.5).sum(), seconds])


def print_dense(rows: Rows) -> None:
    print(f"{'':10}{'keypoints':>10}{'matches':>9}{'within 3 px':>17}{'1.5 px':>9}{'CPU s':>8}")
    for name, values in rows.items():
        count, found, right, closer, seconds = np.mean(values, axis=0)
        print(f"{name:10}{count:10.0f}{found:9.1f}{right:10.1f} {100 * right / max(found, 1e-9):5.1f}%"
              f"{closer:9.1f}{seconds:8.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of image pairs")
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--slice", default="::", metavar="A:B:C", help="which pairs, as Python slices")
    parser.add_argument("--warp", action="store_true", help="move the ir images of registered pairs")
    parser.add_argument("--pixels", type=float, default=1000, metavar="N", help="pixels a keypoint")
    parser.add_argument(
        "--detectors", nargs="+", help="all unless named; for --dense the model's, or the first"
    )
    parser.add_argument("--dense", action="store_true", help="measure dense search instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the single results")
    arguments = parser.parse_args()
    pairs = chosen_pairs(arguments.data, arguments.slice)
    matcher = Matcher.from_pretrained(arguments.model, device="cpu")
    rows: Rows = {}
    for index, pair in enumerate(pairs):
        if arguments.dense:
            names = arguments.detectors or [None]
            compare_dense(matcher, load(pair, index, only_shift=True), names, arguments.pixels, rows)
        else:
            loaded = load(pair, index if arguments.warp else None)
            names = arguments.detectors or [*DETECTORS, *OWN]
            compare_detectors(matcher, loaded, names, arguments.pixels, rows)
    print(f"{len(pairs)} pairs of {arguments.data}, means of a pair")
    (print_dense if arguments.dense else print_detectors)(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
