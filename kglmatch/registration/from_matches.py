"""The transform between two images, from the keypoints that the network matches.

Edges of a dark forest or of waves run in all directions, and their structure fits almost anywhere; the
network still tells one place from another. Keypoints of both images are matched without a prior, and a
similarity is fitted to them by RANSAC: few matches of unrelated images agree on one. All matches near it
are then fitted together. Structure refines that where it has support and the matches do not object.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.features import Features
from kglmatch.geometry import fit_robustly, transform_points
from kglmatch.options import TransformKind
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.registration.align import LEAST_SUPPORT, Alignment, refine
from kglmatch.registration.limits import Limits, nominal_scales, within_limits
from kglmatch.registration.masks import Masks
from kglmatch.resampling import enlarge, resize_between, shrink

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

LEAST = 10  # matches; of 500 unrelated pairs one reached it, two streets with 11

_SIDE = 1024  # pixels: both images are matched at this size, or smaller
_MAX_ENLARGED = 2.0
_KEYPOINTS = 300
_UPRIGHT = 30.0  # degrees: beyond it, patches are turned with their gradients
# Of the longer side. The similarity stands for whatever the transform is.
_TOLERANCE = 0.008
_NEAR = 0.005
_KEPT = 0.8  # of the matches: if structure loses more of them, it went astray
_REFINED_RADIUS = 5  # pixels at a width of 256


def align_by_matches(
    matcher: PatchMatcher, vis: Image, ir: Image, limits: Limits, masks: Masks | None = None
) -> Alignment | None:
    """The transform that most matched keypoints agree with.

    Args:
        matcher: describes and matches the patches.
        vis, ir: (H, W) float32 grey in [0, 1]; sizes may differ.
        limits: as for `registration.align`; kind "auto" fits a similarity to the matches.
        masks: the pixels that count; None for all.

    Returns:
        the alignment, with `num_matches` set; None where fewer than 10 matches agree, or what they agree on
        is outside the limits.
    """
    kind = limits.kind
    scales = nominal_scales(vis, ir)
    upright = limits.max_rotation <= _UPRIGHT
    found = [
        consensus
        for scale in scales
        if (consensus := _match(matcher, vis, ir, scale, upright, kind == "translation", masks)) is not None
        and within_limits(consensus.transform, vis, ir, limits)
    ]
    if not found:
        return None
    best = max(found, key=lambda consensus: consensus.agreeing(consensus.transform, _TOLERANCE).sum())
    if best.agreeing(best.transform, _TOLERANCE).sum() < LEAST:
        return None
    wanted = cast(TransformKind, "similarity" if kind == "auto" else kind)
    side = best.side
    transform = fit_robustly(
        wanted, best.points_vis, best.points_ir, best.transform, (_TOLERANCE * side, _NEAR * side)
    )
    near = best.agreeing(transform, _NEAR)
    alignment = refine(vis, ir, transform, kind=kind, first_radius=_REFINED_RADIUS, masks=masks)
    if (
        alignment is None
        or alignment.support < LEAST_SUPPORT
        or best.agreeing(alignment.transform, _NEAR).sum() < _KEPT * near.sum()
    ):
        residuals = best.residuals(transform)
        votes = near.astype(np.float64)
        alignment = Alignment(transform, wanted, best.points_vis, best.points_ir, votes, residuals, 0.0)
    num_matches = int(best.agreeing(alignment.transform, _TOLERANCE).sum())
    return dataclasses.replace(alignment, num_matches=num_matches)


@dataclasses.dataclass(frozen=True)
class _Consensus:
    """Matches, and the similarity or translation that most of them agree with.

    Attributes:
        points_vis, points_ir: (K, 2) xy pixels, row by row matching.
        transform: (3, 3) from visible to ir pixels.
        side: ir pixels that the longer side of the visible image is long: what tolerances are shares of.
    """

    points_vis: Matrix
    points_ir: Matrix
    transform: Matrix
    side: float

    def residuals(self, transform: Matrix) -> Matrix:
        """(K,) ir pixels between where a match is and where a transform takes it."""
        return np.linalg.norm(transform_points(transform, self.points_vis) - self.points_ir, axis=1)

    def agreeing(self, transform: Matrix, tolerance: float) -> NDArray[np.bool_]:
        """(K,) which matches a transform explains."""
        return self.residuals(transform) < tolerance * self.side


def _match(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    scale: float,
    upright: bool,
    translation: bool,
    masks: Masks | None,
) -> _Consensus | None:
    """Matches images of which a visible pixel is as wide as `scale` ir pixels."""
    factor = min(1.0, _SIDE / max(vis.shape), _SIDE * scale / max(ir.shape), _MAX_ENLARGED * scale)
    small_vis, small_ir = shrink(vis, factor), enlarge(shrink(ir, factor / scale), factor / scale)
    if min(*small_vis.shape, *small_ir.shape) < matcher.config.patch_size:
        return None
    features_vis = matcher.extract(small_vis, "vis", max_keypoints=_KEYPOINTS, upright=upright)
    features_ir = matcher.extract(small_ir, "ir", max_keypoints=_KEYPOINTS, upright=upright)
    if masks is not None:
        features_vis = with_data(features_vis, masks.vis)
        features_ir = with_data(features_ir, masks.ir)
    matches = matcher.match(features_vis, features_ir, top_k=1)  # more make no more matches here, but cost
    if matches.keypoints_vis is None or matches.keypoints_ir is None or len(matches) < LEAST:
        return None
    points_vis = transform_points(np.linalg.inv(resize_between(vis, small_vis)), matches.keypoints_vis)
    points_ir = transform_points(np.linalg.inv(resize_between(ir, small_ir)), matches.keypoints_ir)
    side = max(vis.shape) * scale
    estimate = _most_common_shift if translation else _similarity
    transform = estimate(points_vis, points_ir, scale, _TOLERANCE * side)
    return None if transform is None else _Consensus(points_vis, points_ir, transform, side)


def with_data(features: Features, valid: NDArray[np.bool_]) -> Features:
    """The features whose keypoints are on valid pixels of an image, or of a larger copy of it."""
    if features.keypoints is None or features.image_size is None:
        return features
    factors = np.array(valid.shape[::-1]) / np.array(features.image_size)
    at = np.floor((features.keypoints + 0.5) * factors).astype(np.int64)
    x, y = np.clip(at, 0, np.array(valid.shape[::-1]) - 1).T
    return features[valid[y, x]]


def _similarity(vis: Matrix, ir: Matrix, scale: float, tolerance: float) -> Matrix | None:
    cv2.setRNGSeed(0)  # the same matches give the same transform
    affine, _ = cv2.estimateAffinePartial2D(
        vis, ir, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=20_000, confidence=0.9999
    )
    return None if affine is None or not np.isfinite(affine).all() else np.vstack([affine, [0, 0, 1]])


def _most_common_shift(vis: Matrix, ir: Matrix, scale: float, tolerance: float) -> Matrix:
    moved = ir - scale * vis
    near = np.linalg.norm(moved[:, None] - moved[None], axis=2) < tolerance
    transform = np.diag([scale, scale, 1.0])
    transform[:2, 2] = moved[near[near.sum(axis=1).argmax()]].mean(axis=0)
    return transform
