"""Fitting one transform to many correlation surfaces at once.

Each window of an image has a surface that says how well it agrees with the other image at every
displacement. A transform moves all windows; the best one is high on as many surfaces as possible.
Peaks are not picked first: an ambiguous window votes for everything that it allows, and an edge
votes across itself only (the aperture problem).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import small_transform, transform_jacobian, transform_points
from kglmatch.options import TransformKind

Surfaces = NDArray[np.float32]
Matrix = NDArray[np.float64]

# A window agrees with a transform where its surface is this many standard deviations above its mean;
# the vote rises softly around it. Chance alone reaches it seldom.
_AGREEMENT = 1.5
_SOFTNESS = 0.4
_FLAT = 0.02  # correlation; surfaces that vary less say nothing
_MAX_CHANNELS = 64  # of an OpenCV image that is blurred
# From a 3 x 3 neighbourhood, row by row, to its middle, fx, fy, fxx, fyy and fxy by central differences.
_DIFFERENCES = np.array([
    [0, 0, 0, 0, 1, 0, 0, 0, 0],
    [0, 0, 0, -0.5, 0, 0.5, 0, 0, 0],
    [0, -0.5, 0, 0, 0, 0, 0, 0.5, 0],
    [0, 0, 0, 1, -2, 1, 0, 0, 0],
    [0, 1, 0, 0, -2, 0, 0, 1, 0],
    [0.25, 0, -0.25, 0, 0, 0, -0.25, 0, 0.25],
]).T  # fmt: skip


def standardise(surfaces: Surfaces) -> Surfaces:
    """(P, S, S) correlations -> standard deviations above each surface's mean."""
    mean = surfaces.mean(axis=(1, 2), keepdims=True)
    return (surfaces - mean) / (surfaces.std(axis=(1, 2), keepdims=True) + _FLAT)


def smooth(surfaces: Surfaces, sigma: float) -> Surfaces:
    """Each surface (P, S, S) blurred by a Gaussian of `sigma` pixels."""
    layers = np.ascontiguousarray(surfaces.transpose(1, 2, 0))
    for start in range(0, len(surfaces), _MAX_CHANNELS):
        part = np.ascontiguousarray(layers[:, :, start : start + _MAX_CHANNELS])
        blurred = cv2.GaussianBlur(part, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        layers[:, :, start : start + _MAX_CHANNELS] = blurred.reshape(part.shape)
    return np.ascontiguousarray(layers.transpose(2, 0, 1))


def expand(surfaces: Surfaces, at: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Second-order expansion of each surface at a displacement.

    Args:
        surfaces: (P, S, S); the middle is no displacement.
        at: (P, 2) displacements in pixels; beyond the surface its edge is taken.

    Returns:
        values (P,), gradients (P, 2), Hessians (P, 2, 2).
    """
    values, (fx, fy, fxx, fyy, fxy), x, y = _parabolas(surfaces, at)
    gradients = np.stack([fx + fxx * x + fxy * y, fy + fxy * x + fyy * y], axis=1)
    hessians = np.stack([fxx, fxy, fxy, fyy], axis=1).reshape(-1, 2, 2)
    return values, gradients, hessians


def _parabolas(surfaces: Surfaces, at: Matrix) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Values (P,) at displacements (P, 2), and what they come from.

    Returns:
        values; fx, fy, fxx, fyy and fxy (5, P) at the nearest pixel; x and y (P,) from there.
    """
    count, side, _ = surfaces.shape
    middle = side // 2
    cell = np.clip(np.rint(at).astype(np.int64), 1 - middle, side - 2 - middle)
    x, y = np.clip(at - cell, -1, 1).T
    first = (np.arange(count) * side + cell[:, 1] + middle - 1) * side + cell[:, 0] + middle - 1
    around = (np.arange(3)[:, None] * side + np.arange(3)).ravel()
    near = surfaces.reshape(-1)[first[:, None] + around].astype(np.float64)
    centre, *derivatives = (near @ _DIFFERENCES).T
    fx, fy, fxx, fyy, fxy = derivatives
    values = centre + fx * x + fy * y + (fxx * x * x + fyy * y * y) / 2 + fxy * x * y
    return values, np.stack(derivatives), x, y


def vote(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """How much a standardised correlation speaks for its place: near 0 for no, above 1 for clearly yes."""
    return _SOFTNESS * np.logaddexp(0, (values - _AGREEMENT) / _SOFTNESS)


def votes(surfaces: Surfaces, centres: Matrix, transform: Matrix) -> Matrix:
    """How much each window (P,) speaks for a transform, see `vote`."""
    return vote(_parabolas(surfaces, transform_points(transform, centres) - centres)[0])


def newton_steps(gradients: Matrix, hessians: Matrix, *, flat: float, longest: float) -> Matrix:
    """From where surfaces were expanded to their tops: (P, 2) pixels, 0 where a surface has no top.

    Args:
        gradients, hessians: (P, 2) and (P, 2, 2), of `expand`.
        flat: determinant of the Hessian below which there is no top.
        longest: pixels, in x and in y.
    """
    convex = (np.linalg.det(hessians) > flat) & (hessians[:, 0, 0] < 0)
    steps = np.zeros_like(gradients)
    steps[convex] = -np.linalg.solve(hessians[convex], gradients[convex][:, :, None])[:, :, 0]
    return np.clip(steps, -longest, longest)


def peaks(surfaces: Surfaces) -> tuple[Matrix, Matrix]:
    """Highest point of each surface, to a fraction of a pixel: displacements (P, 2), values (P,)."""
    count, side, _ = surfaces.shape
    y, x = np.divmod(surfaces.reshape(count, -1).argmax(axis=1), side)
    at = np.stack([x, y], axis=1).astype(np.float64) - side // 2
    values, gradients, hessians = expand(surfaces, at)
    return at + newton_steps(gradients, hessians, flat=1e-6, longest=0.7), values


def maximise_votes(
    levels: Sequence[Surfaces], centres: Matrix, kind: TransformKind, start: Matrix, *, iterations: int = 8
) -> Matrix:
    """Moves a transform uphill until the windows' votes rise no more (Levenberg-Marquardt).

    Args:
        levels: standardised surfaces, (P, S, S) each, from strongly smoothed to hardly.
        centres: (P, 2) xy pixels of the windows.
        kind: which transforms are allowed.
        start: (3, 3) from window centres to where they lie in the other image.

    Returns:
        (3, 3).
    """
    origin = centres.mean(axis=0)
    unit = float(np.abs(centres - origin).max()) + 1e-6
    to_unit = np.array([[1 / unit, 0, -origin[0] / unit], [0, 1 / unit, -origin[1] / unit], [0, 0, 1]])
    from_unit = np.linalg.inv(to_unit)
    transform = start
    for surfaces in levels:
        best = votes(surfaces, centres, transform).sum()
        damping = 1e-3
        for _ in range(iterations):
            moved = transform_points(transform, centres)
            normal, uphill = _normal_equations(surfaces, moved, moved - centres, kind, origin, unit)
            scale = np.diag(np.diag(normal)) + np.eye(len(normal)) * (1e-6 + 1e-6 * np.trace(normal))
            improved = None
            for _ in range(5):
                step = np.linalg.solve(normal + damping * scale, uphill)
                candidate = from_unit @ small_transform(kind, step) @ to_unit @ transform
                candidate = candidate / candidate[2, 2]
                total = votes(surfaces, centres, candidate).sum()
                if total > best:
                    improved = candidate
                    break
                damping *= 10
            if improved is None:
                break
            change = np.abs(transform_points(improved, centres) - moved).max()
            transform, best, damping = improved, total, max(damping / 10, 1e-4)
            if change < 0.02:
                break
    return transform


def _normal_equations(
    surfaces: Surfaces, moved: Matrix, displacement: Matrix, kind: TransformKind, origin: Matrix, unit: float
) -> tuple[Matrix, Matrix]:
    """Of a step that raises the votes: information (parameters, parameters) and gradient (parameters,).

    Args:
        moved, displacement: (P, 2) pixels, of the windows' centres.
        origin, unit: (2,) and pixels, the frame in which the step's parameters are.
    """
    values, gradients, hessians = expand(surfaces, displacement)
    weight = 1 / (1 + np.exp(-np.clip((values - _AGREEMENT) / _SOFTNESS, -30, 30)))
    reach = surfaces.shape[1] // 2 - 0.5
    weight *= (np.abs(displacement) <= reach).all(axis=1)
    information = _at_least_convex(-hessians)
    jacobian = transform_jacobian(kind, (moved - origin) / unit) * unit
    weighted = (weight[:, None, None] * jacobian).reshape(-1, jacobian.shape[2])
    normal = weighted.T @ (information @ jacobian).reshape(weighted.shape)
    uphill = weighted.T @ gradients.ravel()
    return normal, uphill


def _at_least_convex(hessians: Matrix) -> Matrix:
    """Hessians (P, 2, 2) whose curvatures are raised to 5 % of the larger one, in size, at least.

    Along an edge a window may slide, but not without end.
    """
    (xx, xy), (_, yy) = hessians.transpose(1, 2, 0)
    mean, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    least = 1e-4 + 0.05 * (np.abs(mean) + half)
    most, other = np.maximum(mean + half, least), np.maximum(mean - half, least)
    # The axes stay, the curvatures along them are mapped: a line through both does it.
    slope = (most - other) / np.maximum(2 * half, 1e-12)
    mapped = slope[:, None, None] * hessians
    mapped[:, [0, 1], [0, 1]] += ((most + other) / 2 - slope * mean)[:, None]
    return np.asarray(mapped)


def starting_points(
    surfaces: Surfaces, centres: Matrix, kind: TransformKind, tolerance: float
) -> list[Matrix]:
    """Transforms worth climbing from: none, the common shift, and what RANSAC makes of the peaks.

    Climbing only adds what its kind of transform allows, so that none of these is of a more general one.

    Args:
        surfaces: standardised, (P, S, S).
        centres: (P, 2).
        kind: the most general transform that may come out.
        tolerance: pixels, of RANSAC.
    """
    middle = surfaces.shape[1] // 2
    together = cv2.GaussianBlur(np.maximum(surfaces - 1, 0).mean(axis=0), (0, 0), 1.5)
    y, x = np.unravel_index(int(together.argmax()), together.shape)
    shift = np.eye(3)
    shift[:2, 2] = x - middle, y - middle
    found = [np.eye(3), shift]
    if kind == "translation":
        return found
    displacement, values = peaks(surfaces)
    clear = values > _AGREEMENT + 0.5
    if clear.sum() >= 6:
        a, b = centres[clear], (centres + displacement)[clear]
        similar, general = cv2.estimateAffinePartial2D, cv2.estimateAffine2D
        for estimate in (similar,) if kind == "similarity" else (general, similar):
            cv2.setRNGSeed(0)
            affine, _ = estimate(a, b, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=3000)
            if affine is not None and np.isfinite(affine).all():
                found.append(np.vstack([affine, [0, 0, 1]]))
    return found
