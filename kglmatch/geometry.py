"""Transforms between two images: robust estimation, application, corner error."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.options import TransformKind

_ITERATIONS = 30

MIN_MATCHES = 4  # a homography has eight degrees of freedom, a point pair gives two


def estimate_homography(
    points_vis: NDArray[np.floating], points_ir: NDArray[np.floating], *, threshold: float = 3.0
) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_]]:
    """The homography that most matches agree with, by MAGSAC++ (Barath et al., CVPR 2020).

    Args:
        points_vis, points_ir: (K, 2) xy pixels, row by row matching.
        threshold: pixels; matches farther from the model are outliers.

    Returns:
        (3, 3) from visible to ir pixels, or None if fewer than 4 matches agree on one;
        and (K,) bool, which matches agree (all false without a homography).

    Raises:
        KGLMatchError: shapes that do not fit, or a threshold that is no finite number above 0.
    """
    if points_vis.shape != points_ir.shape or points_vis.ndim != 2 or points_vis.shape[1] != 2:
        raise KGLMatchError(f"points must be (K, 2) alike, got {points_vis.shape} and {points_ir.shape}")
    if not 0 < threshold < np.inf:
        raise KGLMatchError(f"threshold must be a number of pixels above 0, got {threshold}")
    none = np.zeros(len(points_vis), bool)
    if len(points_vis) < MIN_MATCHES:
        return None, none
    cv2.setRNGSeed(0)  # the same matches give the same homography
    homography, mask = cv2.findHomography(
        points_vis.astype(np.float64),
        points_ir.astype(np.float64),
        cv2.USAC_MAGSAC,
        threshold,
        maxIters=10_000,
        confidence=0.9999,
    )
    if homography is None or not np.isfinite(homography).all():
        return None, none
    inliers = mask.ravel().astype(bool)
    return (homography, inliers) if inliers.sum() >= MIN_MATCHES else (None, none)


def transform_points(transform: NDArray[np.floating], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Applies a (3, 3) homography or a (2, 3) affine to (N, 2) xy pixels."""
    moved = points.astype(np.float64) @ transform[:, :2].T + transform[:, 2]
    return moved if len(transform) == 2 else moved[:, :2] / moved[:, 2:]


def corner_error(estimated: NDArray[np.floating], true: NDArray[np.floating], size: tuple[int, int]) -> float:
    """Mean distance in pixels between where two transforms take the corners of an image.

    Args:
        estimated, true: (3, 3) or (2, 3).
        size: (width, height) of the image that they transform.
    """
    width, height = size
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)
    difference = transform_points(estimated, corners) - transform_points(true, corners)
    return float(np.linalg.norm(difference, axis=1).mean())


def transform_jacobian(kind: TransformKind, points: NDArray[np.floating]) -> NDArray[np.float64]:
    """How points move with the parameters of `small_transform`, at the identity: (P, 2, parameters).

    Args:
        points: (P, 2) xy.
    """
    x, y = points.astype(np.float64).T
    one, none = np.ones_like(x), np.zeros_like(x)
    rows = {
        "translation": ([one, none], [none, one]),
        "similarity": ([one, none, x, -y], [none, one, y, x]),
        "affine": ([one, none, x, y, none, none], [none, one, none, none, x, y]),
        "homography": (
            [one, none, x, y, none, none, -x * x, -x * y],
            [none, one, none, none, x, y, -x * y, -y * y],
        ),
    }[kind]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def small_transform(kind: TransformKind, step: NDArray[np.floating]) -> NDArray[np.float64]:
    """The (3, 3) transform near the identity with these parameters (see `transform_jacobian`)."""
    transform = np.eye(3)
    transform[:2, 2] = step[:2]
    if kind == "similarity":
        transform[:2, :2] += [[step[2], -step[3]], [step[3], step[2]]]
    elif kind != "translation":
        transform[:2, :2] += [[step[2], step[3]], [step[4], step[5]]]
        transform[2, :2] = step[6:] if kind == "homography" else 0
    return transform


def fit_robustly(
    kind: TransformKind,
    points_vis: NDArray[np.floating],
    points_ir: NDArray[np.floating],
    start: NDArray[np.float64],
    scales: tuple[float, float],
) -> NDArray[np.float64]:
    """The transform that fits matches best near a first guess; outliers hardly count.

    Iteratively reweighted least squares with Geman and McClure's weights, whose scale shrinks on the way.
    A consensus by RANSAC takes one of many sets that agree within a tolerance; this takes them all.

    Args:
        kind: which transforms are allowed.
        points_vis, points_ir: (K, 2) xy pixels, row by row matching.
        start: (3, 3) from visible to ir pixels, of that kind or a simpler one.
        scales: ir pixels, first and last: a match so far off counts a quarter.

    Returns:
        (3, 3).
    """
    middle = points_ir.mean(axis=0)
    unit = float(np.abs(points_ir - middle).max()) + 1e-6
    to_unit = np.array([[1 / unit, 0, -middle[0] / unit], [0, 1 / unit, -middle[1] / unit], [0, 0, 1]])
    transform, wanted = to_unit @ start, transform_points(to_unit, points_ir)
    for scale in np.geomspace(*scales, _ITERATIONS) / unit:
        moved = transform_points(transform, points_vis)
        off = wanted - moved
        weight = 1 / (1 + np.square(off).sum(axis=1) / scale**2) ** 2
        jacobian = transform_jacobian(kind, moved)
        normal = np.einsum("p,pia,pib->ab", weight, jacobian, jacobian)
        normal += 1e-9 * np.eye(len(normal))
        step = np.linalg.solve(normal, np.einsum("p,pia,pi->a", weight, jacobian, off))
        transform = small_transform(kind, step) @ transform
    transform = np.linalg.inv(to_unit) @ transform
    return transform / transform[2, 2]


def parabola_vertex(
    before: NDArray[np.floating], centre: NDArray[np.floating], after: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Where parabolas through values at -1, 0 and 1 are highest, in [-0.5, 0.5]; 0 where they have no top.

    Args:
        before, centre, after: (N,) values; the one at 0 is the largest.

    Returns:
        (N,) of the type of the values.
    """
    curvature = 2 * centre - before - after
    rounded = curvature <= 0
    return np.where(rounded, 0, np.clip((after - before) / np.where(rounded, 1, 2 * curvature), -0.5, 0.5))


def similarity_about(
    rotation: float, scale: float, centre_vis: tuple[float, float], centre_ir: tuple[float, float]
) -> NDArray[np.float64]:
    """(3, 3) that turns by `rotation` degrees, scales, and takes one centre to the other (xy pixels)."""
    cos, sin = scale * np.cos(np.deg2rad(rotation)), scale * np.sin(np.deg2rad(rotation))
    transform = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    transform[:2, 2] = np.array(centre_ir) - transform[:2, :2] @ np.array(centre_vis)
    return transform


def resize_matrix(factor_x: float, factor_y: float) -> NDArray[np.float64]:
    """(3, 3) from the pixels of an image to those of its resized copy: pixel centres, not corners, scale."""
    return np.array([[factor_x, 0, 0.5 * factor_x - 0.5], [0, factor_y, 0.5 * factor_y - 0.5], [0, 0, 1.0]])
