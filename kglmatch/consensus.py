"""How one image lies on another, from the keypoints that the network matches.

Edges of a dark forest or of waves lie in all directions, and their structure fits almost anywhere; the
network still tells one place from another. Keypoints of both images are matched without a prior, and a
similarity is fitted to them by RANSAC: few matches of unrelated images agree on one. Through it the
images are matched again, near the predicted places only. Structure refines what that gives where it has
support, and the matches do not object.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import TransformKind, estimate_homography, transform_points
from kglmatch.registration import LEAST_SUPPORT, Alignment, refine
from kglmatch.resampling import enlarge, resample, resize_between, shrink

if TYPE_CHECKING:
    from kglmatch.features import Features
    from kglmatch.matcher import Matcher

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

LEAST = 8  # matches; of 24 unrelated pairs no more than 6 agreed on a similarity

_SIDE = 1024  # pixels: both images are matched at this size, or smaller
_MAX_ENLARGED = 2.0
_KEYPOINTS = 300
_UPRIGHT = 30.0  # degrees: beyond it, patches are turned with their gradients
_EDGE = 4  # pixels
# Of the longer side. The first similarity stands for whatever the transform is, the second is near it.
_TOLERANCE = 0.008
_NEAR_TOLERANCE = 0.003
_NEAR = 0.03
_KEPT = 0.8  # of the matches: if structure loses more of them, it went astray
_REFINED_RADIUS = 5  # pixels at a width of 256
_SAME_SCALE = 0.06  # of log scale
_SLACK = 1.1  # a limit is not overrun by the noise of a match


def align_by_matches(
    matcher: Matcher,
    vis: Image,
    ir: Image,
    *,
    kind: str = "auto",
    max_displacement: float | None = None,
    max_rotation: float = 15.0,
    max_scale: float = 1.25,
) -> Alignment | None:
    """The transform that most matched keypoints agree with.

    Args:
        matcher: describes and matches the patches.
        vis, ir: (H, W) float32 grey in [0, 1]; sizes may differ.
        kind, max_displacement, max_rotation, max_scale: as for `registration.align`.

    Returns:
        the alignment, with `matched` set; None where fewer than 8 matches agree, or what they agree on
        lies outside the limits.
    """
    pair = _best_scale(matcher, vis, ir, max_displacement, max_rotation, max_scale, kind)
    if pair is None:
        return None
    found = _match_again(matcher, vis, ir, pair, kind)
    matches_vis, matches_ir = pair.matches
    tolerance = _TOLERANCE * max(vis.shape) * _zoom(pair.transform)
    apart = np.linalg.norm(transform_points(found.transform, matches_vis) - matches_ir, axis=1)
    return dataclasses.replace(found, matched=int((apart < tolerance).sum()))


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two images at the size at which they are matched.

    Attributes:
        features: of the shrunk visible image.
        size: (width, height) of that.
        to_small: (3, 3) from visible pixels to it.
        matches: (K, 2) and (K, 2) xy pixels of the original images.
        transform: (3, 3) from visible to ir pixels, the similarity that most matches agree with.
        count: how many do.
    """

    features: Features
    size: tuple[int, int]
    to_small: Matrix
    matches: tuple[Matrix, Matrix]
    transform: Matrix
    count: int


def _best_scale(
    matcher: Matcher,
    vis: Image,
    ir: Image,
    max_displacement: float | None,
    max_rotation: float,
    max_scale: float,
    kind: str,
) -> _Pair | None:
    """Matches without a prior, at the same field of view and, if sizes differ, at the same pixel size."""
    ratio = float(np.sqrt(ir.size / vis.size))
    scales = [ratio, 1.0] if abs(np.log(ratio)) > _SAME_SCALE else [ratio]
    pairs = []
    for scale in scales:
        pair = _match(matcher, vis, ir, scale, max_rotation <= _UPRIGHT, kind)
        if pair is not None and pair.count >= LEAST:
            limits = (max_displacement, max_rotation, max_scale)
            if _within(pair.transform, scales, vis.shape, ir.shape, limits):
                pairs.append(pair)
    return max(pairs, key=lambda p: p.count, default=None)


def _match(matcher: Matcher, vis: Image, ir: Image, scale: float, upright: bool, kind: str) -> _Pair | None:
    """Matches where a visible pixel is as wide as `scale` ir pixels."""
    factor = min(1.0, _SIDE / max(vis.shape), _SIDE * scale / max(ir.shape), _MAX_ENLARGED * scale)
    small_vis, small_ir = shrink(vis, factor), enlarge(shrink(ir, factor / scale), factor / scale)
    if min(*small_vis.shape, *small_ir.shape) < matcher.config.patch_size:
        return None
    to_small_vis, to_small_ir = resize_between(vis, small_vis), resize_between(ir, small_ir)
    features = matcher.extract(small_vis, "vis", max_keypoints=_KEYPOINTS, upright=upright)
    points_vis, points_ir = _matches(matcher, features, small_ir, None, upright)
    tolerance = _TOLERANCE * max(small_vis.shape)
    transform = _fit(
        "translation" if kind == "translation" else "similarity", points_vis, points_ir, tolerance
    )
    if transform is None:
        return None
    apart = np.linalg.norm(transform_points(transform, points_vis) - points_ir, axis=1)
    from_small_ir = np.linalg.inv(to_small_ir)
    return _Pair(
        features=features,
        size=(small_vis.shape[1], small_vis.shape[0]),
        to_small=to_small_vis,
        matches=(
            transform_points(np.linalg.inv(to_small_vis), points_vis),
            transform_points(from_small_ir, points_ir),
        ),
        transform=from_small_ir @ transform @ to_small_vis,
        count=int((apart < tolerance).sum()),
    )


def _match_again(matcher: Matcher, vis: Image, ir: Image, pair: _Pair, kind: str) -> Alignment:
    """Matches near the predicted places, and the transform that fits them best."""
    frame = np.linalg.inv(pair.to_small)
    predicted = pair.transform @ frame
    small_ir = shrink(ir, 1 / max(_zoom(predicted), 1e-3))
    moved, mask = resample(small_ir, resize_between(ir, small_ir) @ predicted, pair.size, edge=_EDGE)
    side = max(pair.size)
    points_vis, points_ir = _matches(matcher, pair.features, moved, _NEAR * side, True)
    column, row = np.rint(points_ir).astype(np.int64).T
    covered = mask[row, column] > 0
    points_vis, points_ir = points_vis[covered], points_ir[covered]
    wanted = cast(TransformKind, "similarity" if kind == "auto" else kind)
    tolerance = _NEAR_TOLERANCE * side
    correction = _fit(wanted, points_vis, points_ir, tolerance)
    correction = np.eye(3) if correction is None else correction

    def agreeing(transform: Matrix) -> NDArray[np.bool_]:
        found = transform_points(np.linalg.inv(predicted) @ transform @ frame, points_vis)
        return np.linalg.norm(found - points_ir, axis=1) < tolerance

    transform = predicted @ correction @ pair.to_small
    transform = transform / transform[2, 2]
    near = agreeing(transform)
    refined = refine(vis, ir, transform, kind=kind, first_radius=_REFINED_RADIUS)
    if (
        refined is not None
        and refined.support >= LEAST_SUPPORT
        and agreeing(refined.transform).sum() >= _KEPT * near.sum()
    ):
        return refined
    full_vis, full_ir = transform_points(frame, points_vis), transform_points(predicted, points_ir)
    residuals = np.linalg.norm(full_ir - transform_points(transform, full_vis), axis=1)
    return Alignment(transform, wanted, full_vis, full_ir, near.astype(np.float64), residuals, 0.0)


def _matches(
    matcher: Matcher, features: Features, ir: Image, reach: float | None, upright: bool
) -> tuple[Matrix, Matrix]:
    """Matches of visible features with an image: xy pixels (K, 2), (K, 2)."""
    matches = matcher.match(
        features,
        matcher.extract(ir, "ir", max_keypoints=_KEYPOINTS, upright=upright),
        max_displacement=reach,
    )
    points_vis, points_ir = (
        np.empty((0, 2)) if points is None else points.astype(np.float64)
        for points in (matches.keypoints_vis, matches.keypoints_ir)
    )
    return points_vis, points_ir


def _fit(kind: TransformKind, vis: Matrix, ir: Matrix, tolerance: float) -> Matrix | None:
    """The transform (3, 3) of a kind that most matches agree with, or None."""
    if len(vis) < LEAST:
        return None
    if kind == "homography":
        return estimate_homography(vis, ir, threshold=tolerance)[0]
    if kind == "translation":
        moved = ir - vis
        near = np.linalg.norm(moved[:, None] - moved[None], axis=2) < tolerance
        transform = np.eye(3)
        transform[:2, 2] = moved[near[near.sum(axis=1).argmax()]].mean(axis=0)
        return transform
    estimate = cv2.estimateAffine2D if kind == "affine" else cv2.estimateAffinePartial2D
    cv2.setRNGSeed(0)  # the same matches give the same transform
    affine, _ = estimate(
        vis, ir, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=20_000, confidence=0.9999
    )
    return None if affine is None or not np.isfinite(affine).all() else np.vstack([affine, [0, 0, 1]])


def _zoom(transform: Matrix) -> float:
    """Ir pixels a visible pixel is wide."""
    return float(np.sqrt(abs(np.linalg.det(transform[:2, :2]))))


def _within(
    transform: Matrix,
    scales: list[float],
    vis_shape: tuple[int, ...],
    ir_shape: tuple[int, ...],
    limits: tuple[float | None, float, float],
) -> bool:
    """Whether a similarity lies within max_displacement, max_rotation and max_scale."""
    max_displacement, max_rotation, max_scale = limits
    turned = abs(np.rad2deg(np.arctan2(transform[1, 0], transform[0, 0])))
    zoomed = min(abs(np.log(_zoom(transform) / scale)) for scale in scales)
    if turned > max_rotation * _SLACK + 1 or zoomed > np.log(max_scale) * _SLACK + 0.01:
        return False
    if max_displacement is None:
        return True
    centres = ((np.array(shape[1::-1], np.float64) - 1) / 2 for shape in (vis_shape, ir_shape))
    centre_vis, centre_ir = centres
    moved = (transform_points(transform, centre_vis[None])[0] - centre_ir) / _zoom(transform)
    return bool((np.abs(moved) <= max_displacement * _SLACK + 1).all())
