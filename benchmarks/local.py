"""The local correction on pairs warped by known smooth fields, compared with the global transform alone.

    python benchmarks/local.py DATA/vis-nir                        # test categories with their affines
    python benchmarks/local.py DATA/vis-lwir/roadscene --first 160 --relative --model kglnet-vis-lwir
    python benchmarks/local.py DATA/vis-sar/sentinel/test --model kglnet-vis-sar
    python benchmarks/local.py DATA/vis-sar/high-resolution --third --model kglnet-vis-sar
    python benchmarks/local.py DATA/vis-nir/country --limit 1      # one pair, to see that it runs

The other image of each registered pair is warped by a small affine (up to 2 degrees, 2 % of scale, 6 pixels)
and by a sum of waves, of wavelengths from a quarter of the image (16 amplitudes at least) to one and a half
images, whose largest displacement is 2 to 8 pixels; both are drawn from the pair's own seed. The residual of
a pair is the median, over a grid of points that both images show, of the distance between where the
registration and the warp take them.

Pairs that are themselves off by some pixels in places (RoadScene) hide what is measured. `--relative` takes
as the truth where the same pair's own registration, without the warp but with the local correction, takes
each point, then warped: what is wrong with the set falls out, and so does what the method gets wrong in the
same way twice. `--offsets` takes the pairs' own offsets from a file that `maps.py --offsets` has written,
where two independent methods agree on them; the other pairs are left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kglmatch import Matcher, load_image
from kglmatch.datasets import ImagePair, find_image_pairs
from kglmatch.geometry import similarity_about, transform_points
from kglmatch.registration.corrected import correct_locally
from kglmatch.registration.results import Registration

Points = np.ndarray
Mapping = Callable[[Points], Points]

# Published with the two images apart by more than is measured here.
MISREGISTERED = {
    "field/0001", "forest/0015", "forest/0019", "mountain/0014", "oldbuilding/0010", "street/0009",
    "street/0012", "street/0014", "street/0016", "street/0018",
}  # fmt: skip
LARGEST = 8.0  # pixels
WAVES = 4  # a component
GRID = 8  # pixels between the points that are measured
EDGE = 4  # pixels along the border of the other image that do not count
WORSE = 0.02  # pixels: a residual that rises by less has not changed


def random_field(size: tuple[int, int], rng: np.random.Generator, largest: float = LARGEST) -> np.ndarray:
    """(H, W, 2) smooth displacement, whose length reaches an amplitude from 2 pixels to `largest`."""
    width, height = size
    amplitude = rng.uniform(2, largest)
    longest = max(size)
    shortest = max(16 * amplitude, 0.25 * longest)
    most = 1.5 * max(longest, shortest)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    field = np.zeros((height, width, 2))
    for axis in (0, 1):
        for _ in range(WAVES):
            wavelength = np.exp(rng.uniform(np.log(shortest), np.log(most)))
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            along = (np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / wavelength)
            field[..., axis] += rng.uniform(0.3, 1) * np.sin(along + phase)
    return field * (amplitude / np.linalg.norm(field, axis=2).max())


def warp(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Mapping]:
    """An image (H, W) warped by a field and a small affine, and where the warp takes points (N, 2) of it."""
    height, width = image.shape
    field = random_field((width, height), rng).astype(np.float32)
    centre = ((width - 1) / 2, (height - 1) / 2)
    rotation, scale = rng.uniform(-2, 2), float(np.exp(rng.uniform(-0.02, 0.02)))
    target = (centre[0] + rng.uniform(-6, 6), centre[1] + rng.uniform(-6, 6))
    affine = similarity_about(rotation, scale, centre, target)
    x, y = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    moved = np.stack([x + field[..., 0], y + field[..., 1]], axis=2).reshape(-1, 2)
    source = transform_points(np.linalg.inv(affine), moved).reshape(height, width, 2).astype(np.float32)
    warped = cv2.remap(image, source[..., 0], source[..., 1], cv2.INTER_CUBIC)

    def take(points: Points) -> Points:
        aim = transform_points(affine, points)
        found = aim.copy()
        for _ in range(60):  # the inverse of y + field(y), a contraction
            at = found.astype(np.float32)[:, None]
            v = cv2.remap(field, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            found = aim - v[:, 0]
        return found

    return np.clip(warped, 0, 1), take


def mapping(found: Registration, *, local: bool = True) -> Mapping:
    """Where a registration takes points of the visible image, with its local correction or without."""
    field = found.local if local else None

    def take(points: Points) -> Points:
        assert found.transform is not None
        return transform_points(found.transform, points if field is None else points + field.at(points))

    return take


def residual(take: Mapping, truth: Mapping, vis: np.ndarray, ir: np.ndarray) -> float:
    """Median distance in pixels over a grid of the visible image."""
    height, width = vis.shape
    x, y = np.meshgrid(np.arange(GRID, width - GRID, GRID), np.arange(GRID, height - GRID, GRID))
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)
    true = truth(points)
    last = np.array(ir.shape[::-1]) - 1 - EDGE
    shown = ((true >= EDGE) & (true <= last)).all(axis=1)
    return float(np.median(np.linalg.norm(take(points[shown]) - true[shown], axis=1)))


def every_pair(source: Path) -> list[tuple[str, ImagePair]]:
    """Image pairs of a folder, or of its subfolders that hold pairs with a known affine, with their names."""
    try:
        return [(pair.name, pair) for pair in find_image_pairs(source)]
    except ValueError:
        folders = [folder for folder in sorted(source.iterdir()) if folder.is_dir()]
        found = [
            (f"{folder.name}/{pair.name}", pair) for folder in folders for pair in find_image_pairs(folder)
        ]
        return [(name, pair) for name, pair in found if pair.affine is not None]


def pairs_of(source: Path) -> list[tuple[str, ImagePair]]:
    """`every_pair` without those that are published far apart."""
    return [(name, pair) for name, pair in every_pair(source) if name not in MISREGISTERED]


def load(pair: ImagePair) -> tuple[np.ndarray, np.ndarray]:
    """vis and ir (H, W) float32, the latter brought back onto vis where its affine is known."""
    vis, ir = load_image(pair.vis), load_image(pair.ir)
    if pair.affine is not None:
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        ir = np.clip(cv2.warpAffine(ir, pair.affine, vis.shape[::-1], flags=flags), 0, 1)
    return vis, ir


def measure(
    matcher: Matcher, name: str, pair: ImagePair, seed: int, relative: bool, offset: np.ndarray | None = None
) -> dict[str, Any]:
    """Residuals of one pair; None where the global registration failed.

    Args:
        offset: (3, 3) from visible pixels to those of the ir image on their grid; None for the set's word.
    """
    vis, original = load(pair)
    ir, warped_by = warp(original, np.random.default_rng(seed))
    first: Mapping = functools.partial(transform_points, np.eye(3) if offset is None else offset)
    if relative:
        own = matcher.register(vis, original, local=True)
        if own.transform is None:
            return {"pair": name, "verdict": "failed", "global": None, "local": None}
        first = mapping(own)

    def truth(points: Points) -> Points:
        return warped_by(first(points))

    began = time.perf_counter()
    plain = matcher.register(vis, ir)
    between = time.perf_counter()
    found = correct_locally(matcher, vis, ir, plain)
    seconds = time.perf_counter() - between
    if found.transform is None or found.correction is None:
        return {"pair": name, "verdict": "failed", "global": None, "local": None}
    return {
        "pair": name,
        "verdict": plain.verdict,
        "global": residual(mapping(found, local=False), truth, vis, ir),
        "local": residual(mapping(found), truth, vis, ir),
        "refused": found.correction.reason,
        "gain": found.correction.gain,
        "significance": found.correction.significance,
        "seconds_global": between - began,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of all pairs that were registered."""
    known = [row for row in rows if row["global"] is not None]
    lines = [f"{len(rows)} pairs, {len(rows) - len(known)} not registered at all"]
    if not known:
        return lines[0]
    before, after = (np.array([row[name] for row in known]) for name in ("global", "local"))
    refused = np.array([bool(row["refused"]) for row in known])
    lines += [
        f"median residual, px: global {np.median(before):.2f}, local {np.median(after):.2f}",
        f"residual within 0.5 / 1 / 1.5 px, %: global {within(before)}, local {within(after)}",
        f"refused {int(refused.sum())}, worse than global {int((after > before + WORSE).sum())}, "
        f"median seconds {np.median([row['seconds'] for row in known]):.1f}, in addition to "
        f"{np.median([row['seconds_global'] for row in known]):.1f} of the global registration",
    ]
    if 0 < refused.sum() < len(known):
        kept = ~refused
        lines.append(
            f"of the {int(kept.sum())} not refused: global {np.median(before[kept]):.2f} px, "
            f"local {np.median(after[kept]):.2f} px"
        )
    return "\n".join(lines)


def within(values: np.ndarray) -> str:
    return " / ".join(f"{100 * float((values <= limit).mean()):.0f}" for limit in (0.5, 1.0, 1.5))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of image pairs")
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--relative", action="store_true", help="to the registration of the unwarped pair")
    parser.add_argument("--offsets", type=Path, help="the pairs' own offsets, as maps.py wrote them")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out the first N pairs")
    parser.add_argument("--third", action="store_true", help="every third pair, the 3rd first")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth pair of those")
    parser.add_argument("--limit", type=int, metavar="N", help="take at most N pairs")
    parser.add_argument("--save", type=Path, help="write the single results as JSON")
    arguments = parser.parse_args(argv)
    matcher = Matcher.from_pretrained(arguments.model, device="cpu")
    numbered = list(enumerate(pairs_of(arguments.data)))[arguments.first :]
    numbered = numbered[2::3] if arguments.third else numbered
    offsets = json.loads(arguments.offsets.read_text("utf-8")) if arguments.offsets else None
    rows = []
    for seed, (name, pair) in numbered[:: arguments.every][: arguments.limit]:
        if offsets is not None and offsets.get(name) is None:
            continue
        offset = None if offsets is None else np.array(offsets[name])
        row = measure(matcher, name, pair, seed, arguments.relative, offset)
        rows.append(row)
        if row["global"] is None:
            print(name, "not registered", flush=True)
        else:
            print(
                f"{name} {row['verdict']}: global {row['global']:.2f} px, local {row['local']:.2f} px, "
                f"{row['seconds']:.1f} s {row['refused']}",
                flush=True,
            )
    print(table(rows))
    if arguments.save:
        arguments.save.write_text(json.dumps(rows, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
