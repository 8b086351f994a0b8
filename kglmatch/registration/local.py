"""The local correction: a smooth displacement field that a global transform leaves over.

Windows of the visible image are correlated with their surroundings in the other one, warped by what is known
so far, as in `kglmatch.registration.align`; one cubic B-spline is fitted to all surfaces together, from
coarse windows to fine ones. The spline's slope and bending cost, and so does its size: where no window says
anything, the field tends to zero and the global transform holds.

A field is kept only if fields that are fitted to a part of the windows predict the others clearly better than
the global transform does, and if it folds nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.registration.align import Copies
from kglmatch.registration.displacement import DisplacementField, LocalCorrection
from kglmatch.registration.masks import Masks, clear_of_edges
from kglmatch.registration.structure import EDGE, Maps, structure_maps
from kglmatch.registration.surfaces import expand, peaks, smooth, standardise
from kglmatch.resampling import displaced_places, resize_between

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

_COVERED = 0.7  # of a window
_MIN_WINDOWS = 12
_CELL = 40.0  # pixels of the visible image, at least, between control points
_MOST_CELLS = 16  # along the longer side
_SLOPE, _BEND, _SIZE = 0.0008, 0.003, 0.0005  # what a field costs, by window
_LARGEST_SIDE = 1280  # pixels that the longer side is shrunk to
_HALVED = 640  # pixels; larger images are measured at half their size first
_CLEAR = 1.5  # as in `align`: standard deviations of a peak that counts
_AGREEMENT, _SOFTNESS = 1.2, 0.4
# Determinant of the Jacobian.
_FOLD = (0.3, 3.0)
_SUPPORT = 16  # control displacements that a cubic B-spline has at a point
_ITERATIONS, _TRIES = 8, 4  # of Levenberg-Marquardt
_STILL = 0.02  # pixels: a step that ends it
# What a field costs falls from round to round: the windows get finer, and the field nearly right.
_RELAXED = 0.5
_STIFFER = 3  # attempts at a field that does not fold
_POOL = 4  # pixels that are added up before windows are formed
_STRIDE = 1.5  # of a window's spread, between windows
_OVERLAP = 6.0  # windows that say what one says
_LEAST_GAIN, _LEAST_SIGNIFICANCE = 0.012, 4.0


@dataclass(frozen=True)
class _Pass:
    """One round of measuring: the image's longer side, the windows' side and what is searched, pixels."""

    side: int
    spread: float
    radius: int


@dataclass(frozen=True)
class _Measured:
    """Correlation surfaces of windows, about a field that is nearly right.

    Attributes:
        points: (P, 2) xy pixels of the visible image, the windows' centres.
        factor: pixels of the surfaces for one of the visible image.
        surfaces: (P, S, S), standardised.
        assumed: (P, 2) visible pixels, the displacement in the middle of each surface.
    """

    points: Matrix
    factor: float
    surfaces: NDArray[np.float32]
    assumed: Matrix

    def __getitem__(self, rows: NDArray[np.bool_]) -> _Measured:
        return _Measured(self.points[rows], self.factor, self.surfaces[rows], self.assumed[rows])


class _Pair:
    """Two images and the transform between them."""

    def __init__(self, vis: Image, ir: Image, transform: Matrix, masks: Masks | None = None) -> None:
        self.copies, self.transform = Copies(vis, ir, masks), transform
        self.size = vis.shape[1], vis.shape[0]
        self._clear: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def _ir_clear(self, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """1 where the ir image, shrunk to (H, W), shows data alone; None where all does."""
        if self.copies.masks is None:
            return None
        if shape not in self._clear:
            self._clear[shape] = clear_of_edges(self.copies.masks.ir, shape)
        return self._clear[shape]

    def measure(self, field: DisplacementField, step: _Pass) -> _Measured:
        """Surfaces of one round, about a field."""
        points, factor, surfaces = self._correlate(field, step)
        return _Measured(points, factor, standardise(surfaces), field.at(points))

    def agreement(self, field: DisplacementField, step: _Pass) -> tuple[Matrix, Matrix]:
        """Windows of one round (P, 2), and their correlation (P,) with a field; NaN if not covered."""
        points, _, surfaces = self._correlate(field, dataclasses.replace(step, radius=0), every=True)
        return points, surfaces[:, 0, 0].astype(np.float64)

    def _correlate(
        self, field: DisplacementField, step: _Pass, *, every: bool = False
    ) -> tuple[Matrix, float, NDArray[np.float32]]:
        maps, vis_clear, to_small = self.copies.visible_at(step.side)
        ir = self.copies.other_for(step.side, self.transform)
        ir_clear = self._ir_clear(ir.shape)
        height, width = maps.shape[1:]
        transform = resize_between(self.copies.ir, ir) @ self.transform @ np.linalg.inv(to_small)
        x, y = displaced_places(transform, field.resized((width, height)).on_grid, (0, 0), (width, height))
        x, y = x.astype(np.float32), y.astype(np.float32)
        moved = cv2.remap(ir, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        last_x, last_y = ir.shape[1] - 1 - EDGE, ir.shape[0] - 1 - EDGE
        inside = (x >= EDGE) & (y >= EDGE) & (x <= last_x) & (y <= last_y)
        if ir_clear is not None:
            inside &= cv2.remap(ir_clear, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) > 0.99
        mask = cv2.erode(inside.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0).astype(np.float32)
        both = mask if vis_clear is None else mask * vis_clear
        centres, surfaces = correlate_everywhere(
            maps,
            structure_maps(moved) * mask,
            both,
            spread=step.spread,
            radius=step.radius,
            every=every,
        )
        factor = width / self.size[0]
        points = (centres + 0.5) / factor - 0.5
        return points, factor, surfaces


def correlate_everywhere(
    a: Maps, b: Maps, mask: NDArray[np.float32], *, spread: float, radius: int, every: bool = False
) -> tuple[Matrix, NDArray[np.float32]]:
    """`correlate_windows` for Gaussian windows everywhere, one displacement after the other.

    Args:
        a, b: (K, H, W).
        mask: (H, W), where both have pixels.
        spread: pixels, standard deviation of a window.
        radius: displacements searched.
        every: also windows that are not covered; their surfaces are NaN.

    Returns:
        centres (P, 2) xy pixels, of the windows; surfaces (P, S, S).
    """
    height, width = a.shape[1:]
    small = max(1, round(width / _POOL)), max(1, round(height / _POOL))
    sigma = spread / _POOL
    stride = max(1, round(spread * _STRIDE / _POOL))

    def windows(values: NDArray[np.float32]) -> NDArray[np.float32]:
        pooled = cv2.resize(values, small, interpolation=cv2.INTER_AREA)
        return cv2.GaussianBlur(pooled, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)

    offset = [(n - 1) % stride // 2 for n in small]
    rows, columns = (np.arange(offset[1], small[1], stride), np.arange(offset[0], small[0], stride))
    at = np.ix_(rows, columns)
    covered = windows(mask)[at] > _COVERED
    keep = np.ones_like(covered) if every else covered
    x, y = np.meshgrid((columns + 0.5) * width / small[0] - 0.5, (rows + 0.5) * height / small[1] - 0.5)
    centres = np.stack([x[keep], y[keep]], axis=1)
    side = 2 * radius + 1
    padded = np.pad(b, ((0, 0), (radius, radius), (radius, radius)))
    square = cv2.GaussianBlur(np.square(padded).sum(axis=0), (0, 0), spread, borderType=cv2.BORDER_CONSTANT)
    left, top = np.rint(centres).astype(np.int64).T
    own = windows(np.square(a).sum(axis=0))[at][keep] + 0.1
    surfaces = np.empty((side, side, len(centres)), np.float32)
    for j in range(side):
        for i in range(side):
            part = padded[:, j : j + height, i : i + width]
            product = a[0] * part[0]
            for k in range(1, len(a)):
                product += a[k] * part[k]
            there = square[top + j, left + i] + 0.1
            surfaces[j, i] = windows(product)[at][keep] / np.sqrt(own * there)
    surfaces[:, :, ~covered[keep]] = np.nan
    return centres, np.ascontiguousarray(surfaces.transpose(2, 0, 1))


def passes(longest: int) -> list[_Pass]:
    """Rounds of measuring for a visible image whose longer side is this, from coarse to fine."""
    own = min(longest, _LARGEST_SIDE)
    first = _Pass(round(own / 2), 12.0, 8) if own >= _HALVED else _Pass(own, 16.0, 8)
    return [first, _Pass(own, 12.0, 4), _Pass(own, 8.0, 4)]


def cells_of(size: tuple[int, int]) -> tuple[int, int]:
    """Cells (columns, rows) of a field over an image of this size."""
    cell = max(_CELL, max(size) / _MOST_CELLS)
    columns, rows = (max(2, round(side / cell)) for side in size)
    return columns, rows


class _Penalty:
    """What a field of some cells costs: slope, bending and size of its control displacements."""

    def __init__(self, cells: tuple[int, int]) -> None:
        across, down = cells[0] + 3, cells[1] + 3
        self.size = np.eye(across * down)

        def differences(order: int, axis: int) -> Matrix:
            count = (across, down)[axis]
            d = np.diff(np.eye(count), order, axis=0)
            parts = (np.eye(down), d) if axis == 0 else (d, np.eye(across))
            return np.asarray(np.kron(*parts), np.float64)

        slope = [differences(1, axis) for axis in (0, 1)]
        bend = [differences(2, axis) for axis in (0, 1)]
        cross = np.kron(np.diff(np.eye(down), axis=0), np.diff(np.eye(across), axis=0))
        self.slope: Matrix = slope[0].T @ slope[0] + slope[1].T @ slope[1]
        self.bend: Matrix = bend[0].T @ bend[0] + bend[1].T @ bend[1] + 2 * cross.T @ cross

    def matrix(self, by_cell: float, stiffness: float) -> Matrix:
        """(K, K); `by_cell` is the windows' number by cell, so that density does not matter."""
        whole: Matrix = _SLOPE * self.slope + _BEND * self.bend + _SIZE * self.size
        return np.asarray((by_cell * stiffness) * whole, np.float64)


class _Basis:
    """Weights (P, K) of K control displacements at P points, `_SUPPORT` of which are not zero at a point."""

    def __init__(self, weights: Matrix) -> None:
        self.weights = weights
        self._count = weights.shape[1]
        columns = np.argpartition(-weights, _SUPPORT - 1, axis=1)[:, :_SUPPORT]
        values = np.take_along_axis(weights, columns, axis=1)
        self._products = values[:, :, None] * values[:, None, :]
        self._places = (columns[:, :, None] * self._count + columns[:, None, :]).ravel()

    def normal(self, weight: NDArray[np.floating]) -> Matrix:
        """``weights.T @ diag(weight) @ weights`` (K, K), for a weight (P,) of each point."""
        values = (weight[:, None, None] * self._products).ravel()
        whole = np.bincount(self._places, values, self._count**2).reshape(self._count, self._count)
        return np.asarray(whole, np.float64)


def _fit(
    measured: _Measured,
    start: DisplacementField,
    penalty: _Penalty,
    sigmas: Sequence[float],
    stiffness: float,
) -> DisplacementField:
    """The field that wins most votes of the windows less its own cost, uphill from `start` or the peaks."""
    basis = _Basis(start.basis(measured.points))
    by_cell = len(measured.points) / (start.cells[0] * start.cells[1])
    cost = penalty.matrix(by_cell, stiffness)
    starts = [start.control.reshape(-1, 2), _from_peaks(measured, basis, cost)]
    for sigma in sigmas:
        blurred = smooth(measured.surfaces, sigma)
        climbed = [_climb(measured, blurred, basis, cost, control) for control in starts]
        starts = [max(climbed, key=lambda found: found[0])[1]]
    return DisplacementField(starts[0].reshape(start.control.shape), start.size)


def _climb(
    measured: _Measured, surfaces: NDArray[np.float32], basis: _Basis, cost: Matrix, control: Matrix
) -> tuple[float, Matrix]:
    """Levenberg-Marquardt: the score that is reached from control displacements (K, 2), and where."""
    count = len(cost)

    def displaced(at: Matrix) -> Matrix:
        """In pixels of the surfaces, from their middles."""
        return (basis.weights @ at - measured.assumed) * measured.factor

    def score(at: Matrix) -> float:
        values = expand(surfaces, displaced(at))[0]
        votes = _SOFTNESS * np.logaddexp(0, (values - _AGREEMENT) / _SOFTNESS)
        return float(votes.sum()) - 0.5 * float((at * (cost @ at)).sum())

    total, damping = score(control), 1e-2
    for _ in range(_ITERATIONS):
        information, uphill = _evidence(surfaces, displaced(control))
        normal = np.empty((2, count, 2, count))
        for a, b in ((0, 0), (0, 1), (1, 1)):
            block = basis.normal(information[:, a, b] * measured.factor**2)
            normal[a, :, b] = normal[b, :, a] = block + cost if a == b else block
        square = normal.reshape(2 * count, 2 * count)
        right = (measured.factor * (basis.weights.T @ uphill) - cost @ control).T.ravel()
        for _ in range(_TRIES):
            damped = square + damping * np.diag(np.diag(square))
            change = np.linalg.solve(damped, right).reshape(2, -1).T
            value = score(control + change)
            if value > total:
                break
            damping *= 10
        else:
            break
        control, total, damping = control + change, value, max(damping / 10, 1e-3)
        if np.abs(change).max() < _STILL:
            break
    return total, control


def _from_peaks(measured: _Measured, basis: _Basis, cost: Matrix) -> Matrix:
    """Control displacements fitted to the highest points of the surfaces, robustly."""
    at, height = peaks(smooth(measured.surfaces, 0.7))
    certainty = 1 / (1 + np.exp(-np.clip((height - _CLEAR) / 0.3, -30, 30)))
    found = measured.assumed + at / measured.factor
    weight: NDArray[np.floating] = certainty
    control: Matrix = np.zeros((len(cost), 2))
    for spread in (8.0, 4.0, 2.0, 1.5, 1.5):
        right = basis.weights.T @ (weight[:, None] * found)
        control = np.asarray(np.linalg.solve(basis.normal(weight) + cost, right), np.float64)
        off = np.linalg.norm(found - basis.weights @ control, axis=1) * measured.factor
        weight = certainty / (1 + (off / spread) ** 2) ** 2
    return control


def _evidence(surfaces: NDArray[np.float32], at: Matrix) -> tuple[Matrix, Matrix]:
    """Information (P, 2, 2) and gradient (P, 2) of each window's vote at its displacement."""
    values, gradients, hessians = expand(surfaces, at)
    weight = 1 / (1 + np.exp(-np.clip((values - _AGREEMENT) / _SOFTNESS, -30, 30)))
    reach = surfaces.shape[1] // 2 - 0.5
    weight = weight * (np.abs(at) <= reach).all(axis=1)
    curvature, axes = np.linalg.eigh(-hessians)
    largest = np.abs(curvature).max(axis=1, keepdims=True)
    curvature = np.maximum(curvature, 1e-4 + 0.05 * largest)
    information = np.einsum("pij,pj,pkj->pik", axes, curvature, axes)
    return weight[:, None, None] * information, weight[:, None] * gradients


def correct(vis: Image, ir: Image, transform: Matrix, masks: Masks | None = None) -> LocalCorrection:
    """Fits the displacement that a transform leaves over, and decides whether to keep it.

    Args:
        vis, ir: (H, W) float32 grey.
        transform: (3, 3) from visible to ir pixels.
        masks: the pixels that count; None for all.
    """
    pair = _Pair(vis, ir, transform, masks)
    rounds = passes(max(pair.size))
    nothing = DisplacementField.zero(pair.size, cells_of(pair.size))
    first = pair.measure(nothing, rounds[0])
    if len(first.points) < _MIN_WINDOWS:
        none = np.empty((0, 2))
        reason = f"too few windows: {len(first.points)}, of {_MIN_WINDOWS}"
        return LocalCorrection(None, reason, none, none, np.empty(0), 0.0, 0.0)
    gain, significance = _held_out(pair, nothing, first, rounds)
    stiffness, field, last, folding = 1.0, nothing, first, (1.0, 1.0)
    for _ in range(_STIFFER):
        field, last = _fit_all(pair, nothing, first, rounds, stiffness)
        folding = field.folding()
        if _FOLD[0] <= folding[0] and folding[1] <= _FOLD[1]:
            break
        stiffness *= 4
    points, displacement, certainty = _evidence_of(last)
    reason = ""
    if (certainty > 0.5).sum() < _MIN_WINDOWS:
        reason = f"too few clear windows: {int((certainty > 0.5).sum())}, of {_MIN_WINDOWS}"
    elif gain < _LEAST_GAIN or significance < _LEAST_SIGNIFICANCE:
        reason = (
            "no clear gain on held-out windows: correlation "
            f"{gain:+.3f}, {significance:.1f} standard errors, of {_LEAST_GAIN} and {_LEAST_SIGNIFICANCE}"
        )
    elif not (_FOLD[0] <= folding[0] and folding[1] <= _FOLD[1]):
        reason = f"the field would fold: areas change by factors of {folding[0]:.2f} to {folding[1]:.2f}"
    return LocalCorrection(
        None if reason else field, reason, points, displacement, certainty, gain, significance
    )


def _fit_all(
    pair: _Pair,
    start: DisplacementField,
    first: _Measured,
    rounds: Sequence[_Pass],
    stiffness: float,
    part: NDArray[np.bool_] | None = None,
) -> tuple[DisplacementField, _Measured]:
    """The field after all rounds, and what the last one measured; `part`, of the blocks, is fitted to."""
    penalty = _Penalty(start.cells)
    field, measured = start, first
    for number, step in enumerate(rounds):
        if number:
            measured = pair.measure(field, step)
        used = measured if part is None else measured[part[_blocks(measured.points, pair.size)]]
        sigmas = (2.0, 1.0) if number == 0 else (1.0, 0.5)
        field = _fit(used, field, penalty, sigmas, stiffness * _RELAXED**number)
    return field, measured


def _blocks(points: Matrix, size: tuple[int, int]) -> NDArray[np.int64]:
    """0 or 1 for each point: the fields of a checkerboard over the image."""
    side = np.clip(max(size) / 8, 32, 128)
    return (np.floor(points / side).astype(np.int64).sum(axis=1)) % 2


def _held_out(
    pair: _Pair, start: DisplacementField, first: _Measured, rounds: Sequence[_Pass]
) -> tuple[float, float]:
    """Rise of the correlation of windows that fits did not see; the same in standard errors."""
    own = rounds[-1]
    points, before = pair.agreement(start, own)
    block = _blocks(points, pair.size)
    rise = np.zeros(len(points))
    for number in (0, 1):
        part = np.array([number == 0, number == 1])
        field, _ = _fit_all(pair, start, first, rounds[:2], 1.0, part)
        _, after = pair.agreement(field, own)
        held = block != number
        rise[held] = (after - before)[held]
    known = np.isfinite(rise)
    if known.sum() < 2:
        return 0.0, 0.0
    rise = rise[known]
    independent = max(1.0, len(rise) / _OVERLAP)
    return float(rise.mean()), float(rise.mean() / (rise.std() / np.sqrt(independent) + 1e-9))


def _evidence_of(measured: _Measured) -> tuple[Matrix, Matrix, Matrix]:
    """Where each window was found: points, displacements and certainty."""
    at, height = peaks(smooth(measured.surfaces, 0.7))
    certainty = 1 / (1 + np.exp(-np.clip((height - _CLEAR) / 0.3, -30, 30)))
    return measured.points, measured.assumed + at / measured.factor, certainty
