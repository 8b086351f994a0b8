"""The verdict on a transform, or on matches, from anywhere.

What is given is judged as it is given. The place where the images agree is looked for around it, as in
`register`: by structure, and where that is not enough by the keypoints that the network matches. What is
found there is judged as any registration, and the given transform holds only if it takes the image to the
same place, to within `VERIFY_TOLERANCE` pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import transform_points
from kglmatch.options import DEFAULT_KIND, VERIFY_TOLERANCE
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.registration.align import Alignment, best_start, coarse_fit, refine
from kglmatch.registration.from_matches import align_by_matches
from kglmatch.registration.limits import Limits
from kglmatch.registration.masks import Masks
from kglmatch.registration.proposals import Proposal, candidates, is_usable, transform_kind
from kglmatch.registration.results import Registration
from kglmatch.registration.verdict import judge, nothing_found
from kglmatch.resampling import covered_by, resample

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

_MOST = 95  # percentile of the places that must be within the tolerance
_INLIER_RESIDUAL = 2.0  # pixels
_AS_MUCH = 0.9  # of the support
# How far matched keypoints are looked for around the given transform, in the visible frame.
_AROUND_ROTATION, _AROUND_SCALE = 10.0, 1.2


def verify(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    given: Proposal,
    *,
    kind: str = DEFAULT_KIND,
    refined: bool = False,
    masks: Masks | None = None,
) -> Registration:
    """`Matcher.verify` on grey images (H, W) in [0, 1], of the pixels that count if not all do."""
    usable = [transform for transform in candidates(given, kind) if is_usable(transform, vis, ir)]
    transform = best_start(vis, ir, usable, masks)
    reference = None if transform is None else _nearby(matcher, vis, ir, transform, kind, given.name, masks)
    if transform is None or reference is None:
        return nothing_found(vis, ir, given.name)
    return reference if refined else as_given(transform, reference, coarse_fit(vis, ir, transform, masks))


def as_given(
    transform: Matrix, reference: Registration, coarse: tuple[Matrix, float] | None = None
) -> Registration:
    """A transform with the verdict that a registration near it allows.

    Up to `VERIFY_TOLERANCE` from the registration, its verdict and confidence are the transform's; up to
    twice that, the transform is doubtful at best, and beyond it has failed.

    Args:
        transform: (3, 3) from visible to ir pixels.
        reference: what holds around it.
        coarse: what coarse structure alone says, see `align.coarse_fit`: it decides how far the transform is
            off where it has about as much support as the reference, which then may follow noise.
    """
    if reference.transform is None:
        return reference
    places = reference.keypoints_vis.astype(np.float64)
    predicted = transform_points(transform, places)
    off = _distance(transform, reference.transform, places)
    if coarse is not None and coarse[1] >= _AS_MUCH * reference.support:
        off = min(off, _distance(transform, coarse[0], places))
    verdict, confidence = reference.verdict, reference.confidence
    if off > VERIFY_TOLERANCE:
        # Never 0.5, and nothing at twice the tolerance.
        confidence = min(confidence, 0.5 * max(0.0, 2 - off / VERIFY_TOLERANCE))
        verdict = "doubtful" if off <= 2 * VERIFY_TOLERANCE else "failed"
    failed = verdict == "failed"
    residuals = np.linalg.norm(reference.keypoints_ir - predicted, axis=1).astype(np.float32)
    return dataclasses.replace(
        reference,
        verdict=verdict,
        confidence=confidence,
        transform=None if failed else transform,
        kind=None if failed else transform_kind(transform),
        residuals=residuals,
        inliers=reference.inliers & (residuals < _INLIER_RESIDUAL),
    )


def _distance(transform: Matrix, other: Matrix, places: Matrix) -> float:
    """How far two transforms are apart at nearly all places (P, 2), in pixels of the coarser image."""
    zoom = float(np.sqrt(abs(np.linalg.det(other[:2, :2]))))
    apart = np.linalg.norm(transform_points(transform, places) - transform_points(other, places), axis=1)
    return float(np.percentile(apart, _MOST)) / max(1.0, zoom)


def _nearby(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    start: Matrix,
    kind: str,
    name: str,
    masks: Masks | None,
) -> Registration | None:
    """The registration that holds best around a transform; None where too little of the images overlaps."""
    alignment = refine(vis, ir, start, kind=kind, masks=masks)
    if alignment is None:
        return None
    found = judge(matcher, vis, ir, alignment, name, masks)
    if found.verdict == "registered":
        return found
    by_matches = _by_matches(matcher, vis, ir, start, kind, masks)
    if by_matches is None:
        return found
    return max(found, judge(matcher, vis, ir, by_matches, name, masks), key=lambda r: r.confidence)


def _by_matches(
    matcher: PatchMatcher, vis: Image, ir: Image, start: Matrix, kind: str, masks: Masks | None
) -> Alignment | None:
    """What the network's matches agree on, once a transform has taken the ir image to the visible one."""
    size = vis.shape[1], vis.shape[0]
    moved, _ = resample(ir, start, size, edge=1)
    if masks is not None:
        masks = Masks(masks.vis, covered_by(start, size, masks.ir))
    limits = Limits(kind, max_rotation=_AROUND_ROTATION, max_scale=_AROUND_SCALE)
    found = align_by_matches(matcher, vis, moved, limits, masks)
    if found is None:
        return None
    transform = start @ found.transform
    zoom = np.sqrt(abs(np.linalg.det(start[:2, :2])))
    return dataclasses.replace(
        found,
        transform=transform / transform[2, 2],
        points_ir=transform_points(start, found.points_ir),
        residuals=found.residuals * zoom,
    )
