"""The transform between two images, from structure alone: the search behind `Matcher.register`.

Coarse to fine. First the whole images are correlated over a grid of rotations and scales, all shifts
at once (`kglmatch.registration.coarse`). The best few are then refined on a pyramid: windows of the visible
image are correlated with their surroundings in the resampled other one, and one transform is fitted to all
surfaces together (`kglmatch.registration.surfaces`). What this finds, the network judges
(`kglmatch.registration.verdict`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import transform_points
from kglmatch.options import DEFAULT_KIND, TransformKind
from kglmatch.registration.coarse import search
from kglmatch.registration.limits import Limits
from kglmatch.registration.masks import Masks, clear_of_edges
from kglmatch.registration.structure import EDGE, Maps, correlate_windows, structure_maps, without_edge
from kglmatch.registration.surfaces import (
    expand,
    maximise_votes,
    newton_steps,
    peaks,
    smooth,
    standardise,
    starting_points,
    votes,
)
from kglmatch.resampling import resample, resize_between, shrink, shrinking

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

FIRST_SIDE = 256
_LEAST_SIDE = 64  # pixels that the shorter side of a strip keeps
_LAST_SIDE = 2048
_COVERED = 0.7  # of a window
_MIN_WINDOWS = 8
# A transform with more parameters must win this many times the held-out votes.
_KIND_GAIN = 1.01
_CANDIDATES: tuple[TransformKind, ...] = ("similarity", "affine", "homography")
# Held-out votes that leave no doubt of a place, unless one elsewhere was found as well supported, nearly.
_CLEAR, _RIVAL = 0.4, 0.6
# Mean vote of a fit that ends the search where no other place rivals it. On pairs of the training folders,
# related and not, wrong places reached 0.18.
_SETTLED = 0.3
_STARTS = 2  # of a fit, that are followed to their tops
_CHANCE = 0.1  # mean vote that a fit to unrelated images reaches
LEAST_SUPPORT = 0.12  # below it, structure says nothing
# Standard deviations above a surface's mean. A peak of this height is within 1.5 pixels of the
# right place for 85 % of the windows of Country and 81 % of RoadScene's; unrelated images seldom reach it.
_CLEAR_PEAK = 1.8
ENOUGH_JUDGED = 0.3


@dataclass(frozen=True)
class Level:
    """Correlation surfaces at one resolution, about a transform that is nearly right.

    Attributes:
        centres: (P, 2) xy pixels of the windows, at this resolution.
        surfaces: (P, S, S), standardised.
        to_level: (3, 3) from visible pixels to this resolution.
        predicted: (3, 3) from this resolution to ir pixels, the transform that was assumed.
    """

    centres: Matrix
    surfaces: NDArray[np.float32]
    to_level: Matrix
    predicted: Matrix

    def full(self, correction: Matrix) -> Matrix:
        """A correction at this resolution as a transform (3, 3) from visible to ir pixels."""
        transform = self.predicted @ correction @ self.to_level
        return transform / transform[2, 2]


@dataclass(frozen=True)
class Alignment:
    """What structure says about two images.

    Attributes:
        transform: (3, 3) from visible to ir pixels.
        kind: what kind of transform it is.
        points_vis, points_ir: (P, 2) xy pixels: window centres, and where they were found near the
            place that the transform predicts.
        votes: (P,) how clearly each window agrees, about 0 (not) to 3.
        residuals: (P,) ir pixels between the found and the predicted place.
        support: mean vote of windows for transforms that were fitted without them.
        num_matches: keypoint matches that agree with it and were found without it (`from_matches`); 0 where
            none were looked for.
    """

    transform: Matrix
    kind: TransformKind
    points_vis: Matrix
    points_ir: Matrix
    votes: Matrix
    residuals: Matrix
    support: float
    num_matches: int = 0


def align(vis: Image, ir: Image, limits: Limits, masks: Masks | None = None) -> list[Alignment]:
    """Finds transforms from a visible image to another sensor's, without a prior but the limits.

    Args:
        vis, ir: (H, W) float32 grey in [0, 1]; sizes may differ.
        limits: the kind of transform, and how far the images may be apart.
        masks: the pixels that count; None for all.

    Returns:
        alternatives, the best supported first; empty if the images hold too little structure, or
        overlap too little.
    """
    kind = limits.kind
    if kind == "translation":
        limits = dataclasses.replace(limits, max_rotation=0.0, max_scale=1.0)
    copies = Copies(vis, ir, masks)
    refined: list[tuple[float, Matrix]] = []
    for start in search(vis, ir, limits, masks):
        level = copies.level(start.transform, FIRST_SIDE, radius=10, across=9)
        if level is None:
            continue
        correction, vote = _fit(level, steps_to(kind), (2.0, 1.0))
        if vote > _CHANCE:
            refined.append((vote, level.full(correction)))
        if vote > _SETTLED and not start.has_rival:
            break
    refined.sort(key=lambda item: -item[0])
    alternatives: list[Alignment] = []
    for vote, transform in refined:
        if any(same_place(transform, other.transform, vis.shape) for other in alternatives):
            continue
        if alternatives and alternatives[0].support > _CLEAR and vote < _RIVAL * refined[0][0]:
            break
        alignment = _refine(copies, transform, kind)
        if alignment is not None and not any(
            same_place(alignment.transform, other.transform, vis.shape) for other in alternatives
        ):
            alternatives.append(alignment)
    return sorted(alternatives, key=lambda a: -a.support)


def refine(
    vis: Image,
    ir: Image,
    start: Matrix,
    *,
    kind: str = DEFAULT_KIND,
    first_radius: int = 10,
    masks: Masks | None = None,
) -> Alignment | None:
    """Refines a transform that is right to about a hundredth of the image's size.

    Args:
        vis, ir: (H, W) float32 grey.
        start: (3, 3) from visible to ir pixels.
        kind: as in `Limits`.
        first_radius: pixels at a width of 256 that the start may be wrong by.
        masks: the pixels that count; None for all.

    Returns:
        the alignment, or None if fewer than 8 windows are covered by both images.
    """
    return _refine(Copies(vis, ir, masks), start, kind, first_radius)


def _refine(copies: Copies, start: Matrix, kind: str, first_radius: int = 10) -> Alignment | None:
    sides = pyramid(max(copies.vis.shape))

    def level_at(depth: int, transform: Matrix) -> Level | None:
        radius, across = (first_radius, 9) if depth == 0 else (8, 12) if depth == 1 else (6, 14)
        return copies.level(transform, sides[depth], radius=radius, across=across)

    return refine_levels(start, len(sides), level_at, kind=kind)


def refine_levels(
    start: Matrix, depths: int, level_at: Callable[[int, Matrix], Level | None], *, kind: str = DEFAULT_KIND
) -> Alignment | None:
    """Refines a transform on levels from coarse to fine.

    Args:
        start: (3, 3) from visible to ir pixels.
        depths: number of levels.
        level_at: makes the level of a depth, from 0, about a transform; None where it cannot.
        kind: as in `Limits`.

    Returns:
        the alignment, or None without one of the levels.
    """
    transform = start
    levels: list[Level] = []
    kinds = steps_to(kind)
    for depth in range(depths):
        level = level_at(depth, transform)
        if level is None:
            return None
        levels.append(level)
        correction, _ = _fit(level, kinds, (2.0, 1.0) if depth == 0 else (1.0, 0.5))
        transform = level.full(correction)
    last = levels[-1]
    chosen, correction, held_out = _choose_kind(last, kind, correction)
    # Fine windows of a noisy sensor agree little where coarse ones agree well.
    support = max(held_out, _held_out(levels[0], "affine", None))
    return _finish(last, chosen, correction, support)


def best_start(vis: Image, ir: Image, starts: Sequence[Matrix], masks: Masks | None = None) -> Matrix | None:
    """The transform (3, 3) that the coarse structure of two images agrees with best; None of none."""
    if len(starts) < 2:
        return starts[0] if starts else None

    def coarse_vote(start: Matrix) -> float:
        level = make_level(vis, ir, start, FIRST_SIDE, radius=10, across=9, masks=masks)
        return (
            -1.0
            if level is None
            else float(votes(smooth(level.surfaces, 2.0), level.centres, np.eye(3)).mean())
        )

    return max(starts, key=coarse_vote)


def coarse_fit(
    vis: Image, ir: Image, start: Matrix, masks: Masks | None = None
) -> tuple[Matrix, float] | None:
    """The correction of a transform that coarse structure alone speaks for, and its support.

    A similarity at the coarsest level: where a sensor's fine structure is noise, more parameters and finer
    levels follow the noise.

    Returns:
        (3, 3) from visible to ir pixels and mean held-out vote, or None if fewer than 8 windows are covered.
    """
    level = make_level(vis, ir, start, FIRST_SIDE, radius=10, across=9, masks=masks)
    if level is None:
        return None
    correction, _ = _fit(level, ("similarity",), (2.0, 1.0))
    return level.full(correction), _held_out(level, "similarity", correction)


def mean_vote(vis: Image, ir: Image, transform: Matrix, masks: Masks | None = None) -> float | None:
    """How clearly the finest structure of two images agrees with a transform as it is: about 0 (not) to 3.

    Args:
        vis, ir: (H, W) float32 grey.
        transform: (3, 3) from visible to ir pixels.
        masks: the pixels that count; None for all.

    Returns:
        mean over the windows, or None if fewer than 8 are covered by both images.
    """
    side = pyramid(max(vis.shape))[-1]
    level = make_level(vis, ir, transform, side, radius=6, across=14, masks=masks)
    return (
        None if level is None else float(votes(smooth(level.surfaces, 1.0), level.centres, np.eye(3)).mean())
    )


@dataclass(frozen=True)
class Field:
    """Displacements on a grid, for images that should be aligned.

    Attributes:
        points: (G, 2) xy pixels.
        displacement: (G, 2) pixels, where the ir content is found minus where it should be, smoothed.
        certainty: (G,) in [0, 1].
        judged: (G,) bool, certain enough to count.
        alignment: the transform that explains most of it.
    """

    points: Matrix
    displacement: Matrix
    certainty: Matrix
    judged: NDArray[np.bool_]
    alignment: Alignment


def displacement_field(
    vis: Image, ir: Image, max_displacement: float, masks: Masks | None = None
) -> Field | None:
    """How far the content of two images of one size is apart, point by point.

    First a transform is fitted; then each window is looked for near the place that it predicts, and
    what is found is smoothed over the neighbours by medians weighted with certainty.

    Args:
        vis, ir: (H, W) float32 grey, of one size.
        max_displacement: pixels.
        masks: the pixels that count; None for all.

    Returns:
        the field, or None where the images hold too little structure.
    """
    factor = shrinking(vis, FIRST_SIDE, _LEAST_SIDE)
    radius = int(np.clip(np.ceil(max_displacement * factor) + 2, 4, 24))
    alignment = refine(vis, ir, np.eye(3), kind="affine", first_radius=radius, masks=masks)
    if alignment is None:
        return None
    best: Field | None = None
    # A noisy sensor is clear in wide windows only: from fine to coarse, until enough can be judged.
    for side in reversed(pyramid(max(vis.shape))):
        level = make_level(vis, ir, alignment.transform, side, radius=6, across=14, masks=masks)
        if level is None:
            continue
        field = field_of_level(level, alignment)
        if best is None or field.judged.mean() > best.judged.mean():
            best = field
        if field.judged.mean() >= ENOUGH_JUDGED:
            break
    return best


def field_of_level(level: Level, alignment: Alignment) -> Field:
    """The displacements in the windows of a level that was made about the transform of an alignment."""
    at, height = peaks(smooth(level.surfaces, 0.7))
    certainty = 1 / (1 + np.exp(-np.clip((height - _CLEAR_PEAK) / 0.3, -30, 30)))
    points = transform_points(np.linalg.inv(level.to_level), level.centres)
    found = transform_points(level.predicted, level.centres + at)
    model = transform_points(alignment.transform, points) - points
    raw = found - points - model
    smoothed = _median_of_neighbours(points, raw, certainty)
    return Field(points, model + smoothed, certainty, certainty > 0.5, alignment)


def _median_of_neighbours(points: Matrix, values: Matrix, weights: Matrix, count: int = 9) -> Matrix:
    """Weighted median of the values (G, 2) at each point's `count` nearest points, itself included."""
    squared = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    near = np.argsort(squared, axis=1, kind="stable")[:, :count]
    out = np.empty_like(values)
    for axis in (0, 1):
        order = np.argsort(values[near, axis], axis=1)
        sorted_near = np.take_along_axis(near, order, axis=1)
        cumulative = np.cumsum(weights[sorted_near] + 1e-6, axis=1)
        middle = (cumulative >= cumulative[:, -1:] / 2).argmax(axis=1)
        out[:, axis] = values[sorted_near[np.arange(len(points)), middle], axis]
    return out


# --- levels -----------------------------------------------------------------------------------


class Copies:
    """Two images at any resolution, and their structure; what is made once is kept.

    Args:
        vis, ir: (H, W) float32 grey.
        masks: the pixels that count; None for all.
    """

    def __init__(self, vis: Image, ir: Image, masks: Masks | None = None) -> None:
        self.vis, self.ir, self.masks = vis, ir, masks
        self._visible: dict[int, tuple[Maps, NDArray[np.float32] | None, Matrix]] = {}
        self._other: dict[int, Image] = {}

    def level(self, transform: Matrix, side: int, *, radius: int, across: int) -> Level | None:
        """Correlates windows of the visible image with the other one, resampled by a transform.

        Args:
            side: width or height, whichever is larger, that the visible image is shrunk to.
            radius: displacements searched, pixels at this resolution.
            across: windows along the longer side.

        Returns:
            the level, or None if fewer than 8 windows are covered by both images.
        """
        maps, valid_vis, to_level = self.visible_at(side)
        small_ir = self.other_for(side, transform)
        to_small_ir = resize_between(self.ir, small_ir)
        size = maps.shape[2], maps.shape[1]
        predicted = transform @ np.linalg.inv(to_level)
        valid_ir = None if self.masks is None else self.masks.ir
        moved, mask = resample(small_ir, to_small_ir @ predicted, size, edge=EDGE, valid=valid_ir)
        both = mask if valid_vis is None else mask * valid_vis
        window = 64 if min(size) >= 2 * 64 else 32
        centres = _grid(size, max(size) / across, window // 2 - 8)
        covered = cv2.blur(both, (window, window))[centres[:, 1], centres[:, 0]] > _COVERED
        centres = centres[covered]
        if len(centres) < _MIN_WINDOWS:
            return None
        surfaces = correlate_windows(maps, structure_maps(moved) * mask, centres, size=window, radius=radius)
        return Level(centres.astype(np.float64), standardise(surfaces), to_level, predicted)

    def visible_at(self, side: int) -> tuple[Maps, NDArray[np.float32] | None, Matrix]:
        """Structure of the visible image shrunk to a side, where that counts (None: all), (3, 3) to it."""
        if side not in self._visible:
            small = shrink(self.vis, shrinking(self.vis, side, _LEAST_SIDE))
            maps, valid = without_edge(structure_maps(small)), None
            if self.masks is not None:
                valid = clear_of_edges(self.masks.vis, small.shape)
                maps = maps * valid
            self._visible[side] = maps, valid, resize_between(self.vis, small)
        return self._visible[side]

    def other_for(self, side: int, transform: Matrix) -> Image:
        """The other image, shrunk for a side of the visible one by what the transform does not shrink.

        Thus nothing aliases when it is resampled.
        """
        zoom = float(np.sqrt(abs(np.linalg.det(transform[:2, :2]))))
        factor = min(1.0, shrinking(self.vis, side, _LEAST_SIDE) / max(zoom, 1e-3))
        key = round(float(np.log(factor)) * 64)  # a copy that is 1 % larger does as well
        if key not in self._other:
            self._other[key] = shrink(self.ir, factor)
        return self._other[key]


def make_level(
    vis: Image,
    ir: Image,
    transform: Matrix,
    side: int,
    *,
    radius: int,
    across: int,
    masks: Masks | None = None,
) -> Level | None:
    """`Copies.level` of two images that are looked at once."""
    return Copies(vis, ir, masks).level(transform, side, radius=radius, across=across)


def pyramid(side: int) -> list[int]:
    """Sides to refine at: 256, doubled while that brings the image's own resolution nearer."""
    sides = [FIRST_SIDE]
    while sides[-1] * 1.5 < min(side, _LAST_SIDE):
        sides.append(sides[-1] * 2)
    return sides


def _fit(level: Level, kinds: Sequence[TransformKind], sigmas: Sequence[float]) -> tuple[Matrix, float]:
    """The best supported correction of a level, and its mean vote."""
    blurred = [smooth(level.surfaces, sigma) for sigma in sigmas]
    best, best_vote = np.eye(3), -1.0
    starts = starting_points(level.surfaces, level.centres, kinds[-1], tolerance=1.5)
    starts.sort(key=lambda start: -float(votes(blurred[0], level.centres, start).sum()))
    for start in starts[:_STARTS]:
        correction = start
        for kind in kinds:
            correction = maximise_votes(blurred, level.centres, kind, correction)
        vote = float(votes(blurred[-1], level.centres, correction).mean())
        if vote > best_vote:
            best, best_vote = correction, vote
    return best, best_vote


def steps_to(kind: str) -> tuple[TransformKind, ...]:
    """Kinds that are fitted one after the other on the way to the one that was asked for."""
    if kind in ("translation", "similarity"):
        return (cast(TransformKind, kind),)
    return "similarity", "affine"


def _choose_kind(level: Level, kind: str, correction: Matrix) -> tuple[TransformKind, Matrix, float]:
    """The kind that was asked for, or the simplest that no other clearly beats on held-out windows.

    Returns:
        the kind, the correction (3, 3) that it is fitted by, and its mean held-out vote.
    """
    blurred = [smooth(level.surfaces, 0.5)]
    if kind != "auto":
        asked = cast(TransformKind, kind)
        fitted = maximise_votes(blurred, level.centres, asked, correction)
        return asked, fitted, _held_out(level, asked, fitted)
    best: tuple[TransformKind, Matrix, float] | None = None
    for candidate in _CANDIDATES:
        start = correction if candidate != "similarity" else nearest_similarity(level, correction)
        fitted = maximise_votes(blurred, level.centres, candidate, start)
        vote = _held_out(level, candidate, fitted)
        if best is None or vote > best[2] * _KIND_GAIN:
            best = candidate, fitted, vote
    assert best is not None
    return best


def nearest_similarity(level: Level, correction: Matrix) -> Matrix:
    """The similarity that makes the whole transform one, as near to the correction as can be."""
    found = transform_points(
        level.full(correction), transform_points(np.linalg.inv(level.to_level), level.centres)
    )
    source = transform_points(np.linalg.inv(level.to_level), level.centres)
    affine, _ = cv2.estimateAffinePartial2D(source, found, method=cv2.LMEDS)
    if affine is None:
        return correction
    whole = np.vstack([affine, [0, 0, 1]])
    back = np.linalg.inv(level.predicted) @ whole @ np.linalg.inv(level.to_level)
    return back / back[2, 2]


def _held_out(level: Level, kind: TransformKind, start: Matrix | None) -> float:
    """Mean vote of windows for transforms fitted to the others: two halves, in a checkerboard.

    Chance finds no support here, however many parameters are fitted.
    """
    blurred = [smooth(level.surfaces, 1.0)]
    if start is None:
        start, _ = _fit(level, (kind,), (2.0, 1.0))
    cell = np.unique(level.centres[:, 0], return_inverse=True)[1]
    row = np.unique(level.centres[:, 1], return_inverse=True)[1]
    half = (cell + row) % 2 == 0
    total = 0.0
    for part in (half, ~half):
        fitted = maximise_votes([b[part] for b in blurred], level.centres[part], kind, start)
        total += float(votes(blurred[0][~part], level.centres[~part], fitted).sum())
    return total / len(level.centres)


def _finish(level: Level, kind: TransformKind, correction: Matrix, support: float) -> Alignment:
    """Places where each window was found near its predicted place, in full resolution."""
    blurred = smooth(level.surfaces, 0.5)
    predicted = transform_points(correction, level.centres)
    _, gradients, hessians = expand(blurred, predicted - level.centres)
    found = predicted + newton_steps(gradients, hessians, flat=1e-4, longest=2)
    vote = votes(blurred, level.centres, correction)
    transform = level.full(correction)
    points_vis = transform_points(np.linalg.inv(level.to_level), level.centres)
    points_ir = transform_points(level.predicted, found)
    residuals = np.linalg.norm(points_ir - transform_points(transform, points_vis), axis=1)
    return Alignment(transform, kind, points_vis, points_ir, vote, residuals, support)


# --- images -----------------------------------------------------------------------------------


def _grid(size: tuple[int, int], step: float, edge: int) -> NDArray[np.int64]:
    """(P, 2) xy of a regular grid, row by row."""
    axes = []
    for side in size:
        count = max(2, round((side - 2 * edge) / step) + 1)
        axes.append(np.rint(np.linspace(edge, side - 1 - edge, count)).astype(np.int64))
    x, y = np.meshgrid(*axes)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def same_place(a: Matrix, b: Matrix, shape: tuple[int, ...]) -> bool:
    """Whether two transforms differ by less than a hundredth of the image's size at its corners."""
    height, width = shape
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    apart = np.linalg.norm(transform_points(a, corners) - transform_points(b, corners), axis=1)
    return bool(apart.mean() < 0.01 * max(shape))
