"""A registration with its local correction: what `Matcher.register(..., local=True)` adds."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import transform_points
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.patches import extract_patches
from kglmatch.registration.local import correct
from kglmatch.registration.masks import Masks
from kglmatch.registration.results import Registration

Image = NDArray[np.float32]

_PLACES = 48  # that the network looks at
_INLIER_CERTAINTY, _INLIER_RESIDUAL = 0.5, 2.0  # pixels


def correct_locally(
    matcher: PatchMatcher, vis: Image, ir: Image, found: Registration, masks: Masks | None = None
) -> Registration:
    """The registration with a `LocalCorrection`, applied where the images support it.

    Args:
        vis, ir: (H, W) float32 grey, the images that were registered.
        found: their registration; one that failed stays as it is.
        masks: the pixels that count; None for all.
    """
    if found.transform is None:
        return found
    correction = correct(vis, ir, found.transform, masks)
    corrected = dataclasses.replace(found, correction=correction)
    field = correction.field
    if field is None:
        return corrected
    points = correction.points
    places = transform_points(found.transform, points + correction.displacement)
    predicted = transform_points(found.transform, points + field.at(points))
    residuals = np.linalg.norm(places - predicted, axis=1)
    inliers = (correction.certainty > _INLIER_CERTAINTY) & (residuals < _INLIER_RESIDUAL)
    return dataclasses.replace(
        corrected,
        keypoints_vis=points.astype(np.float32),
        keypoints_ir=places.astype(np.float32),
        scores=_scores(matcher, vis, corrected, ir, inliers, masks),
        residuals=residuals.astype(np.float32),
        inliers=inliers,
    )


def _scores(
    matcher: PatchMatcher,
    vis: Image,
    found: Registration,
    ir: Image,
    inliers: NDArray[np.bool_],
    masks: Masks | None,
) -> NDArray[np.float32]:
    """The network's scores at some of the inliers; 0 at the other places."""
    size = matcher.config.patch_size
    assert found.correction is not None
    points = found.correction.points
    covered = found.covered() if masks is None else found.covered(masks.ir) & masks.vis
    whole = cv2.erode(np.pad(covered.astype(np.uint8), size), np.ones((size, size), np.uint8), borderValue=0)
    x, y = np.rint(points).astype(np.int64).T + size
    rows = np.flatnonzero(inliers & (whole[y, x] > 0))
    rows = rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(len(rows), _PLACES)).astype(int))]
    scores = np.zeros(len(points), np.float32)
    if len(rows):
        at = np.rint(points[rows]).astype(np.float32)
        moved = found.warp(ir, interpolation="linear")
        scores[rows] = matcher.score(
            matcher.describe(extract_patches(vis, at, patch_size=size), "vis"),
            matcher.describe(extract_patches(moved, at, patch_size=size), "ir"),
        )
    return scores
