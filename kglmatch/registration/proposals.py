"""Matches or a transform from anywhere, as the start of a refinement and the subject of a verdict.

A proposer is any callable that takes the two grey images (H, W), float32 in [0, 1], and returns one of

- `Matches` with keypoints, or a `Registration`;
- an array (N, 4): x and y in the visible image, x and y in the other one;
- two arrays (N, 2): xy pixels in the visible image, and in the other one;
- a transform (3, 3) or (2, 3), from visible to ir pixels;
- None, where it found nothing.

Pixels are those of the images that it was given, the centre of the first one is (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.features import Matches, to_numpy
from kglmatch.geometry import MIN_MATCHES, estimate_homography, transform_points
from kglmatch.options import DEFAULT_THRESHOLD, TransformKind
from kglmatch.registration.results import OURS, Registration

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]
Proposer = Callable[[Image, Image], Any]

_FORMS = (
    "Matches with keypoints, matches as (N, 4) or as two arrays (N, 2), or a transform (3, 3) or (2, 3) from "
    "visible to ir pixels"
)
# Fewer matches fit a homography by chance; a similarity needs half of them.
_FIRM_HOMOGRAPHY = 12
_ITERATIONS = 10_000


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a proposer returned, checked.

    Attributes:
        name: of the proposer.
        transform: (3, 3) from visible to ir pixels, or None where it gave matches.
        points_vis, points_ir: (N, 2) xy pixels, row by row matching; N = 0 where it gave a transform.
    """

    name: str
    transform: Matrix | None
    points_vis: Matrix
    points_ir: Matrix


def read_proposal(value: Any, name: str) -> Proposal:
    """Checks matches or a transform in any of the forms above.

    Args:
        name: of the proposer, for errors too.

    Raises:
        KGLMatchError: another form, numbers that are not finite, or a transform that cannot be inverted.
    """
    nothing = np.empty((0, 2))
    if value is None:
        return Proposal(name, None, nothing, nothing)
    if isinstance(value, Registration):
        return Proposal(name, value.transform, nothing, nothing)
    if isinstance(value, Matches):
        if value.keypoints_vis is None or value.keypoints_ir is None:
            raise KGLMatchError(f"{name}: the matches hold no keypoints: match features that have them")
        value = (value.keypoints_vis, value.keypoints_ir)
    array = _array(value, name)
    if array.shape in ((3, 3), (2, 3)):
        return Proposal(name, _transform(array, name), nothing, nothing)
    if array.size == 0 and array.ndim <= 3:
        return Proposal(name, None, nothing, nothing)
    if array.ndim == 3 and len(array) == 2 and array.shape[2] == 2:
        points_vis, points_ir = array
    elif array.ndim == 2 and array.shape[1] == 4:
        points_vis, points_ir = array[:, :2], array[:, 2:]
    else:
        raise KGLMatchError(f"{name}: expected {_FORMS}; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise KGLMatchError(f"{name}: the matches hold numbers that are not finite")
    # OpenCV takes no slices.
    return Proposal(name, None, np.ascontiguousarray(points_vis), np.ascontiguousarray(points_ir))


def propose(proposers: Sequence[Proposer], vis: Image, ir: Image) -> tuple[list[Proposal], tuple[str, ...]]:
    """Asks every proposer; what goes wrong with one does not keep the others from answering.

    Returns:
        what they returned, in their order, and one line for each that raised or returned another form.
    """
    proposals, errors = [], []
    for name, proposer in zip(proposer_names(proposers), proposers, strict=True):
        try:
            # Copies: a proposer may write into what it is given.
            proposals.append(read_proposal(proposer(vis.copy(), ir.copy()), name))
        except Exception as error:  # whatever somebody else's code raises
            text = " ".join(str(error).split())
            own = isinstance(error, KGLMatchError) and text.startswith(f"{name}: ")
            errors.append(text if own else f"{name}: {type(error).__name__}: {text}")
    return proposals, tuple(errors)


def proposer_names(proposers: Sequence[Proposer]) -> list[str]:
    """A name for each proposer, none twice: its `name`, its `__name__`, or that of its class.

    Raises:
        KGLMatchError: something that cannot be called.
    """
    names: list[str] = []
    for proposer in proposers:
        if not callable(proposer):
            raise KGLMatchError(
                f"a proposer is called with two images and returns {_FORMS}; got {type(proposer).__name__}"
            )
        own = getattr(proposer, "name", None) or getattr(proposer, "__name__", None)
        base = own if isinstance(own, str) else type(proposer).__name__
        taken = {OURS, *names}
        numbered = (f"{base} {number}" for number in range(2, len(names) + 3))
        names.append(base if base not in taken else next(name for name in numbered if name not in taken))
    return names


def candidates(proposal: Proposal, kind: str) -> list[Matrix]:
    """Transforms that a proposal stands for: its own, or what most of its matches agree on.

    Of matches these are a similarity and, where enough agree, a homography: with few matches the simpler one
    is better, with many the other. With another kind than "auto", it is one of that kind.

    Args:
        kind: as in `Limits`.

    Returns:
        (3, 3) each, the more general first; none where fewer than 4 matches agree.
    """
    if proposal.transform is not None:
        return [proposal.transform]
    vis, ir = proposal.points_vis, proposal.points_ir
    if len(vis) < MIN_MATCHES:
        return []
    found: list[Matrix] = []
    if kind in ("auto", "homography"):
        homography, inliers = estimate_homography(vis, ir, threshold=DEFAULT_THRESHOLD)
        if homography is not None and (kind != "auto" or inliers.sum() >= _FIRM_HOMOGRAPHY):
            found.append(homography / homography[2, 2])
    if kind == "translation":
        return [_most_common_shift(vis, ir)]
    if kind in ("auto", "similarity", "affine"):
        estimate = cv2.estimateAffine2D if kind == "affine" else cv2.estimateAffinePartial2D
        cv2.setRNGSeed(0)  # the same matches give the same transform
        affine, mask = estimate(
            vis, ir, method=cv2.RANSAC, ransacReprojThreshold=DEFAULT_THRESHOLD, maxIters=_ITERATIONS
        )
        if affine is not None and np.isfinite(affine).all() and mask.sum() >= MIN_MATCHES:
            found.append(np.vstack([affine, [0, 0, 1]]))
    return found


def transform_kind(transform: Matrix) -> TransformKind:
    """The simplest kind that a transform (3, 3) is, to the precision of numbers in a file."""
    scale = float(np.abs(transform[:2, :2]).max()) + 1e-12
    if np.abs(transform[2, :2]).max() > 1e-9 * scale:
        return "homography"
    (a, b), (c, d) = transform[:2, :2] / transform[2, 2]
    if max(abs(a - d), abs(b + c)) > 1e-6 * scale:
        return "affine"
    return "similarity" if max(abs(a - 1), abs(b)) > 1e-6 else "translation"


def is_usable(transform: Matrix, vis: Image, ir: Image) -> bool:
    """Whether a transform keeps the visible image finite, and takes some of it into the other one."""
    height, width = vis.shape
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)
    depth = corners @ transform[2, :2] + transform[2, 2]
    if not (np.isfinite(transform).all() and (depth > 0).all() and abs(np.linalg.det(transform)) > 1e-12):
        return False
    moved = transform_points(transform, corners).astype(np.float32)
    area = abs(cv2.contourArea(moved))
    frame = np.array([[0, 0], [ir.shape[1], 0], [ir.shape[1], ir.shape[0]], [0, ir.shape[0]]], np.float32)
    common, _ = cv2.intersectConvexConvex(moved, frame)
    # So much larger or smaller than the other image, it collapses or blows up this one.
    return bool(common > 0 and ir.size / 4096 < area < ir.size * 4096)


def _array(value: Any, name: str) -> NDArray[np.float64]:
    try:
        if isinstance(value, (tuple, list)):
            parts = [to_numpy(part) for part in value]
            shapes = [part.shape for part in parts]
            if len(parts) == 2 and len({len(shape) for shape in shapes}) == 1 and shapes[0] != shapes[1]:
                raise KGLMatchError(
                    f"{name}: the two sides of the matches have shapes {shapes[0]} and {shapes[1]}"
                )
            value = np.asarray(parts)
        return np.asarray(to_numpy(value), np.float64)
    except KGLMatchError:
        raise
    except (TypeError, ValueError) as error:
        raise KGLMatchError(f"{name}: expected {_FORMS}; got {type(value).__name__}") from error


def _transform(array: NDArray[np.float64], name: str) -> Matrix:
    whole = np.vstack([array, [0, 0, 1]]) if len(array) == 2 else array
    if not np.isfinite(whole).all():
        raise KGLMatchError(f"{name}: the transform holds numbers that are not finite")
    if abs(whole[2, 2]) < 1e-12 or abs(np.linalg.det(whole / whole[2, 2])) < 1e-12:
        raise KGLMatchError(f"{name}: the transform {array.tolist()} cannot be inverted")
    return whole / whole[2, 2]


def _most_common_shift(vis: Matrix, ir: Matrix) -> Matrix:
    moved = (ir - vis)[:2000]
    near = np.linalg.norm(moved[:, None] - moved[None], axis=2) < DEFAULT_THRESHOLD
    transform = np.eye(3)
    transform[:2, 2] = moved[near[near.sum(axis=1).argmax()]].mean(axis=0)
    return transform
