"""Registration with a verdict: structure proposes, the network judges.

Two witnesses that go wrong in different ways. Structure says how many windows support a transform
that was fitted without them. The network says whether patches at the same place are more alike than
patches at different places (a mean share of 0.5 is chance), and whether they match at all. A pair is
called registered only where both agree. Where they do not, the network proposes too (`from_matches`): then
the matches that it found without a prior, and that agree on one transform, take the place of structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import ConfigError, ImageError, KGLMatchError
from kglmatch.features import to_numpy
from kglmatch.geometry import corner_error, transform_points
from kglmatch.matching import distance_from_cosine
from kglmatch.options import CHECK_DISPLACEMENTS, TRANSFORMS
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.patches import extract_patches
from kglmatch.registration.align import (
    LEAST_SUPPORT,
    Alignment,
    align,
    best_start,
    displacement_field,
    refine,
    same_place,
)
from kglmatch.registration.from_matches import LEAST, align_by_matches
from kglmatch.registration.limits import Limits, within_limits
from kglmatch.registration.masks import Masks
from kglmatch.registration.proposals import Proposal, Proposer, candidates, is_usable, propose
from kglmatch.registration.results import (
    OURS,
    BandRegistration,
    Registration,
    RegistrationCheck,
    Verdict,
)
from kglmatch.resampling import covered_by, warp_image

Image = NDArray[np.float32]

# Places that the network looks at: first some, and the others where they leave any doubt.
_FIRST_PLACES, _PLACES = 24, 48
_BEYOND_DOUBT = 1.4  # evidence
_ENOUGH_PLACES = 24  # fewer say less: where little overlaps, the best of many alternatives agrees by chance
_ALTERNATIVES = 2
_JUDGED_SHARE = 0.05
_INLIER_VOTE, _INLIER_RESIDUAL = 0.5, 2.0  # vote of a window; pixels
# One witness may be weaker where the other is strong: their evidence is `agreement + 1.5 * support`. It
# and each witness alone must reach these. Set on pairs of the training folders and of RoadScene, related
# and not.
_SUPPORT_WEIGHT = 1.5
_LEAST_AGREEMENT = 0.62
_MATCHING = 0.5  # mean match probability from which the network's agreement counts in full
_DOUBTFUL, _REGISTERED = 1.0, 1.1
# A third witness may stand in for structure: matches found without a prior that agree on the transform.
_DOUBTFUL_MATCHES, _REGISTERED_MATCHES = LEAST, 16
_REGISTERED_CONFIDENCE = 0.5
_LEVEL = 1e-4
_ALIKE = 1.0  # ir pixels: two transforms that are nearer at the corners are judged once
_COMPOSED_RADIUS = 5  # pixels at a width of 256 that two registrations in a row may be wrong by


def agreement(distances: NDArray[np.floating], scores: NDArray[np.floating]) -> float:
    """Mean share of other places that are less alike than the right one, where the places match at all.

    Its excess over chance counts in full from 24 places on, and by the root of their number below. Where no
    patches match, some are still more alike than others: below a mean match probability of 0.5 the agreement
    is limited, down to 0.62, with which only clear structure makes a registration.

    Args:
        distances: (K, K) descriptor distances of patches at K places, visible rows, ir columns.
        scores: (K,) match probabilities of the metric head at the same places.

    Returns:
        in [0, 1]; 0.5 by chance, and for fewer than two places.
    """
    count = len(distances)
    if count < 2:
        return 0.5
    own = np.diagonal(distances)
    farther = (distances > own[:, None]).sum() + (distances > own[None, :]).sum()
    share = float(farther / (2 * count * (count - 1)))
    ranked = 0.5 + (share - 0.5) * min(1.0, float(np.sqrt(count / _ENOUGH_PLACES)))
    matching = min(1.0, float(scores.mean()) / _MATCHING)
    return min(ranked, _LEAST_AGREEMENT + (1 - _LEAST_AGREEMENT) * matching)


def evidence(support: float, agreed: float, num_matches: int = 0) -> float:
    """What the witnesses say together; short of "doubtful" where one that is needed says nothing."""
    lacking = max(LEAST_SUPPORT - support, _LEAST_AGREEMENT - agreed)
    total = agreed + _SUPPORT_WEIGHT * support
    total = min(total, _DOUBTFUL) - lacking if lacking > 0 else total
    if num_matches < _DOUBTFUL_MATCHES or agreed < _LEAST_AGREEMENT:
        return total
    step = (_REGISTERED - _DOUBTFUL) / (_REGISTERED_MATCHES - _DOUBTFUL_MATCHES)
    return max(total, _DOUBTFUL + step * (num_matches - _DOUBTFUL_MATCHES))


def confidence(
    support: float, agreed: float, num_matches: int = 0, calibration: Mapping[str, Any] | None = None
) -> float:
    """In [0, 1]; 0.5 or more exactly where the evidence reaches what "registered" asks for.

    Args:
        calibration: ``config.inference["confidence"]`` of the model, see `kglmatch.evaluation.confidence`:
            then it is the share of such registrations that were right. Without it, it only rises with the
            evidence.

    Raises:
        ConfigError: a calibration that is no rising curve.
    """
    total = evidence(support, agreed, num_matches)
    strength = (total - _REGISTERED) / (_REGISTERED - _DOUBTFUL)
    rising = float(1 / (1 + np.exp(-np.clip(1.5 * strength, -30, 30))))
    if calibration is None:
        return rising
    knots, shares = (np.asarray(calibration.get(name, ()), np.float64) for name in ("evidence", "share"))
    if (
        not len(knots) == len(shares) > 0
        or not (np.diff(knots) >= 0).all()
        or not (np.diff(shares) >= 0).all()
        or not 0 <= shares[0] <= shares[-1] <= 1
    ):
        raise ConfigError(
            'inference["confidence"] must hold rising lists of one length: "evidence" and "share"'
        )
    # Where the curve is level, more evidence still counts a little, so that the better of two is told.
    share = (1 - _LEVEL) * float(np.interp(total, knots, shares)) + _LEVEL * rising
    half = _REGISTERED_CONFIDENCE
    if total >= _REGISTERED:
        return share if share >= half else half + _LEVEL * rising
    return share if share < half else half - _LEVEL * (1 - rising)


def give_verdict(support: float, agreed: float, num_matches: int = 0) -> Verdict:
    """What the witnesses allow to say."""
    total = evidence(support, agreed, num_matches)
    return "registered" if total >= _REGISTERED else "doubtful" if total >= _DOUBTFUL else "failed"


def register(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    limits: Limits,
    proposers: Sequence[Proposer] = (),
    masks: Masks | None = None,
) -> Registration:
    """`Matcher.register` on grey images (H, W) in [0, 1], of the pixels that count if not all do."""
    proposals, errors = propose(proposers, vis, ir)
    found = choose(matcher, vis, ir, align(vis, ir, limits, masks), limits, proposals, masks)
    return dataclasses.replace(found, errors=errors) if errors else found


def choose(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    alternatives: Sequence[Alignment],
    limits: Limits,
    proposals: Sequence[Proposal] = (),
    masks: Masks | None = None,
) -> Registration:
    """The registration that holds best, of what `align` found within the limits and others propose."""
    judged: list[Registration] = []
    for alignment in alternatives[:_ALTERNATIVES]:
        judged.append(judge(matcher, vis, ir, alignment, masks=masks))
        if evidence(judged[0].support, judged[0].agreement) > _BEYOND_DOUBT:
            break
    for proposal in proposals:
        found = judge_proposal(matcher, vis, ir, proposal, limits, judged, masks)
        judged += [] if found is None else [found]
    if not any(r.verdict == "registered" for r in judged):
        # Costs as much again, and is seldom needed.
        by_matches = align_by_matches(matcher, vis, ir, limits, masks)
        if by_matches is not None:
            judged.append(judge(matcher, vis, ir, by_matches, masks=masks))
    return max(judged, key=lambda r: r.confidence) if judged else nothing_found(vis, ir)


def judge_proposal(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    proposal: Proposal,
    limits: Limits,
    known: Sequence[Registration] = (),
    masks: Masks | None = None,
) -> Registration | None:
    """Refines a proposal and judges it, as what `align` finds.

    Args:
        known: registrations that it is not judged again for, where it is refined to one of them.
        masks: the pixels that count; None for all.

    Returns:
        the registration; None where the proposal stands for no transform within the limits, too little of the
        images overlaps, or it is known.
    """
    starts = [
        transform
        for transform in candidates(proposal, limits.kind)
        if is_usable(transform, vis, ir) and within_limits(transform, vis, ir, limits)
    ]
    start = best_start(vis, ir, starts, masks)
    alignment = None if start is None else refine(vis, ir, start, kind=limits.kind, masks=masks)
    if alignment is None:
        return None
    size = (vis.shape[1], vis.shape[0])
    for other in known:
        if other.transform is not None and corner_error(alignment.transform, other.transform, size) < _ALIKE:
            return None
    return judge(matcher, vis, ir, alignment, proposal.name, masks)


def judge(
    matcher: PatchMatcher,
    vis: Image,
    ir: Image,
    alignment: Alignment,
    proposer: str = OURS,
    masks: Masks | None = None,
) -> Registration:
    """Lets the network compare patches that an alignment places at the same spot."""
    size = matcher.config.patch_size
    height, width = vis.shape
    moved = warp_image(ir, alignment.transform, (width, height), interpolation="linear")
    valid = np.ones(ir.shape, bool) if masks is None else masks.ir
    covered = covered_by(alignment.transform, (width, height), valid)
    if masks is not None:
        covered &= masks.vis
    half = size // 2
    whole = cv2.erode(covered.astype(np.uint8), np.ones((size, size), np.uint8), borderValue=0)
    places = np.rint(alignment.points_vis).astype(np.int64)
    x, y = places.T
    inside = (x >= half) & (y >= half) & (x <= width - half) & (y <= height - half)
    rows = spread(np.flatnonzero(inside & (whole[y.clip(0, height - 1), x.clip(0, width - 1)] > 0)))
    at = places[rows].astype(np.float32)
    patches_vis, patches_ir = (extract_patches(image, at, patch_size=size) for image in (vis, moved))
    ir_size = ir.shape[1], ir.shape[0]
    return judge_patches(
        matcher, alignment, rows, patches_vis, patches_ir, (width, height), ir_size, proposer
    )


def spread(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many of the rows as the network looks at, evenly chosen."""
    return rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(len(rows), _PLACES)).astype(int))]


def judge_patches(
    matcher: PatchMatcher,
    alignment: Alignment,
    rows: NDArray[np.int64],
    patches_vis: NDArray[np.float32],
    patches_ir: NDArray[np.float32],
    vis_size: tuple[int, int],
    ir_size: tuple[int, int],
    proposer: str = OURS,
) -> Registration:
    """`judge` on patches that are cut already.

    Args:
        rows: (R,) places of the alignment.
        patches_vis, patches_ir: (R, 64, 64) float32 around them, the ir image warped onto the visible one.
        vis_size, ir_size: (width, height) of the images.
        proposer: what found the alignment.
    """
    scores, agreed = np.zeros(len(alignment.points_vis), np.float32), 0.5
    staged = len(rows) >= 2 * _FIRST_PLACES
    seen: list[list[NDArray[np.floating]]] = [[], [], []]
    for some in (slice(0, None, 2), slice(1, None, 2)) if staged else (slice(None),):
        if len(rows) < 2:
            break
        features_vis = matcher.describe(patches_vis[some], "vis")
        features_ir = matcher.describe(patches_ir[some], "ir")
        found = matcher.score(features_vis, features_ir)
        scores[rows[some]] = found
        descriptors = (to_numpy(features.descriptors) for features in (features_vis, features_ir))
        for parts, values in zip(seen, (*descriptors, found), strict=True):
            parts.append(values)
        of_vis, of_ir, matching = (np.concatenate(parts) for parts in seen)
        agreed = agreement(distance_from_cosine(of_vis @ of_ir.T), matching)
        if evidence(alignment.support, agreed) > _BEYOND_DOUBT:
            break
    verdict = give_verdict(alignment.support, agreed, alignment.num_matches)
    failed = verdict == "failed"
    return Registration(
        verdict=verdict,
        confidence=confidence(
            alignment.support, agreed, alignment.num_matches, matcher.config.inference.get("confidence")
        ),
        transform=None if failed else alignment.transform,
        kind=None if failed else alignment.kind,
        keypoints_vis=alignment.points_vis.astype(np.float32),
        keypoints_ir=alignment.points_ir.astype(np.float32),
        scores=scores,
        residuals=alignment.residuals.astype(np.float32),
        inliers=(alignment.votes > _INLIER_VOTE) & (alignment.residuals < _INLIER_RESIDUAL),
        support=alignment.support,
        agreement=agreed,
        num_matches=alignment.num_matches,
        vis_size=vis_size,
        ir_size=ir_size,
        proposer=proposer,
    )


def nothing_found(vis: Image, ir: Image, proposer: str = OURS) -> Registration:
    """The failed registration of two images for which there is no transform to judge."""
    points, values = np.empty((0, 2), np.float32), np.empty(0, np.float32)
    return Registration(
        verdict="failed",
        confidence=confidence(0.0, 0.5),
        transform=None,
        kind=None,
        keypoints_vis=points,
        keypoints_ir=points,
        scores=values,
        residuals=values,
        inliers=np.empty(0, bool),
        support=0.0,
        agreement=0.5,
        num_matches=0,
        vis_size=(vis.shape[1], vis.shape[0]),
        ir_size=(ir.shape[1], ir.shape[0]),
        proposer=proposer,
    )


def check(
    matcher: PatchMatcher, vis: Image, ir: Image, *, max_displacement: float, masks: Masks | None = None
) -> RegistrationCheck:
    """`Matcher.check` on grey images (H, W) in [0, 1], of the pixels that count if not all do."""
    least, most = CHECK_DISPLACEMENTS
    if not least <= max_displacement <= most:
        raise KGLMatchError(
            f"max_displacement must be in [{least:g}, {most:g}] pixels, got {max_displacement}"
        )
    if vis.shape != ir.shape:
        sizes = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in (vis, ir))
        raise ImageError(f"check needs images of one size, got {sizes}; register takes any two")
    field = displacement_field(vis, ir, max_displacement, masks)
    if field is None:
        registration = nothing_found(vis, ir)
    else:
        registration = judge(matcher, vis, ir, field.alignment, masks=masks)
    size = (vis.shape[1], vis.shape[0])
    if field is None or not field.judged.any() or registration.verdict == "failed":
        points = np.empty((0, 2)) if field is None else field.points
        nothing = np.full(points.shape, np.nan, np.float32)
        return RegistrationCheck(
            verdict="failed" if registration.verdict == "failed" else "doubtful",
            points=points.astype(np.float32),
            displacement=nothing,
            certainty=np.zeros(len(points), np.float32),
            judged=np.zeros(len(points), bool),
            shift=np.full(2, np.nan, np.float32),
            median_error=float("nan"),
            p95_error=float("nan"),
            judged_share=0.0,
            image_size=size,
        )
    # A few points say little about an image.
    enough = field.judged.mean() >= _JUDGED_SHARE
    moved = field.displacement[field.judged]
    length = np.linalg.norm(moved, axis=1)
    return RegistrationCheck(
        verdict=registration.verdict if enough else "doubtful",
        points=field.points.astype(np.float32),
        displacement=field.displacement.astype(np.float32),
        certainty=field.certainty.astype(np.float32),
        judged=field.judged,
        shift=np.median(moved, axis=0).astype(np.float32),
        median_error=float(np.median(length)),
        p95_error=float(np.percentile(length, 95)),
        judged_share=float(field.judged.mean()),
        image_size=size,
    )


def register_stack(
    matcher: PatchMatcher,
    reference: Image,
    bands: Sequence[Image],
    limits: Limits,
    *,
    names: Sequence[str] | None = None,
) -> list[BandRegistration]:
    """`Matcher.register_stack` on grey images (H, W) in [0, 1]."""
    names = [str(i) for i in range(len(bands))] if names is None else list(names)
    if len(names) != len(bands):
        raise KGLMatchError(f"got {len(bands)} bands but {len(names)} names")
    direct = [register(matcher, reference, band, limits) for band in bands]
    ranked = np.argsort([-found.confidence for found in direct])
    anchors = [int(i) for i in ranked if direct[i].verdict == "registered"]
    results = []
    for name, band, own in zip(names, bands, direct, strict=True):
        best, via = own, None
        for j in anchors if own.verdict != "registered" else ():
            onward = register(matcher, bands[j], band, limits)
            if onward.verdict != "registered":
                continue
            found = _judge_through(matcher, reference, band, _through(direct[j], onward), limits.kind)
            if best.verdict == "failed" or found.confidence > best.confidence:
                best, via = found, names[j]
            if best.verdict == "registered":
                break
        results.append(BandRegistration(name, best, via))
    return results


def _through(first: Registration, second: Registration) -> Registration:
    """The registration from the first's visible image to the second's ir image.

    It holds where both hold: its confidence is their product, and the verdict follows from that.
    """
    if first.transform is None or second.transform is None:
        raise KGLMatchError("a registration that failed cannot be composed")
    transform = second.transform @ first.transform
    back = transform_points(np.linalg.inv(first.transform), second.keypoints_vis)
    both = first.confidence * second.confidence
    return Registration(
        verdict="registered" if both >= _REGISTERED_CONFIDENCE else "doubtful",
        confidence=both,
        transform=transform / transform[2, 2],
        kind=max(first.kind or "affine", second.kind or "affine", key=TRANSFORMS.index),
        keypoints_vis=back.astype(np.float32),
        keypoints_ir=second.keypoints_ir,
        scores=second.scores,
        residuals=second.residuals,
        inliers=second.inliers,
        support=min(first.support, second.support),
        agreement=min(first.agreement, second.agreement),
        num_matches=min(first.num_matches, second.num_matches),
        vis_size=first.vis_size,
        ir_size=second.ir_size,
    )


def _judge_through(
    matcher: PatchMatcher, reference: Image, band: Image, composed: Registration, kind: str
) -> Registration:
    """A composed registration, or what it becomes between the two images where they speak for more."""
    if composed.transform is None:
        return composed
    alignment = refine(reference, band, composed.transform, kind=kind, first_radius=_COMPOSED_RADIUS)
    if alignment is None or not same_place(alignment.transform, composed.transform, reference.shape):
        return composed
    return max(composed, judge(matcher, reference, band, alignment), key=lambda r: r.confidence)
