"""Starts of a refinement: whole images correlated over a grid of rotations and scales, all shifts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import corner_error, similarity_about
from kglmatch.registration.limits import SAME_SCALE, Limits, nominal_scales
from kglmatch.registration.masks import Masks, clear_of_edges
from kglmatch.registration.structure import GlobalCorrelator, in_threads, structure_maps, without_edge
from kglmatch.resampling import resize_between, shrink, shrinking

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]
Tried = tuple[float, float, float]  # evidence, rotation in degrees, log scale

_SIDE, _LEAST_SIDE = 160, 32  # pixels of the longer side, and what the shorter one keeps
_SCREENED_SIDE = 96  # where the hypotheses are many, all are tried on so few pixels,
_SCREENED = 150  # and only the best of them on more
_ROTATION = 3.0  # degrees between hypotheses
_SCALE = SAME_SCALE  # of log scale, between hypotheses
_OVERLAP = 0.35  # of the visible image
_HYPOTHESES = 3
_HALVINGS = 3  # of the grid's steps around each hypothesis
_RIVAL, _ELSEWHERE = 0.9, 0.08  # of the evidence; of the image's size, at its corners


@dataclass(frozen=True)
class Start:
    """A similarity that structure speaks for.

    Attributes:
        transform: (3, 3) from visible to ir pixels.
        has_rival: whether another place was found nearly as well supported.
    """

    transform: Matrix
    has_rival: bool


def search(vis: Image, ir: Image, limits: Limits, masks: Masks | None = None) -> Iterator[Start]:
    """The best supported similarities of a grid over rotation and scale.

    Args:
        vis, ir: (H, W) float32 grey; sizes may differ.
        limits: what is searched.
        masks: the pixels that count; None for all.

    Yields:
        at most three, the best supported first; each is improved when it is asked for.
    """
    scales = [float(np.log(scale)) for scale in nominal_scales(vis, ir)]
    correlation = _Correlation(vis, ir, _SIDE, limits.max_displacement, masks)
    rotations = _steps(limits.max_rotation, _ROTATION)
    steps = _steps(float(np.log(limits.max_scale)), _SCALE)
    log_scales = sorted({nominal + step for nominal in scales for step in steps})
    hypotheses = [(r, s) for r in rotations for s in log_scales]
    if len(hypotheses) > _SCREENED:
        screen = _Correlation(vis, ir, _SCREENED_SIDE, limits.max_displacement, masks)
        screened = sorted(screen.try_all(hypotheses), reverse=True)[:_SCREENED]
        hypotheses = [(r, s) for _, r, s in screened]
    grid = _apart(sorted(correlation.try_all(hypotheses), reverse=True))
    turn = _ROTATION if len(rotations) > 1 else 0.0
    zoom = _SCALE if len(steps) > 1 else 0.0
    size = vis.shape[1], vis.shape[0]
    places = [correlation.transform(r, s) for _, r, s in grid]
    for start, place in zip(grid, places, strict=True):
        has_rival = any(
            other[0] > _RIVAL * start[0] and corner_error(there, place, size) > _ELSEWHERE * max(size)
            for other, there in zip(grid, places, strict=True)
        )
        _, r, s = _climb(correlation, start, turn, zoom)
        yield Start(correlation.transform(r, s), has_rival)


class _Correlation:
    """How well two whole images agree for a rotation and scale, at the best shift; nothing is tried twice.

    Args:
        vis, ir: (H, W).
        side: pixels that the longer side of the visible image is shrunk to.
        max_displacement: pixels of the visible image, or None.
        masks: the pixels that count; None for all.
    """

    def __init__(
        self,
        vis: Image,
        ir: Image,
        side: int,
        max_displacement: float | None,
        masks: Masks | None = None,
    ) -> None:
        factor = shrinking(vis, side, _LEAST_SIDE)
        small = shrink(vis, factor)
        self._ir = ir
        self._valid_ir = None if masks is None else masks.ir
        self._size = small.shape[1], small.shape[0]
        self._to_small_vis = resize_between(vis, small)
        maps = without_edge(structure_maps(small, even=False))
        valid = None if masks is None else clear_of_edges(masks.vis, small.shape)
        self._correlator = GlobalCorrelator(maps, valid)
        self._factor = factor
        self._max_shift = None if max_displacement is None else max(1.0, max_displacement * factor)
        self._moving: dict[float, tuple[NDArray[np.float32], Matrix]] = {}
        self._tried: dict[tuple[float, float], tuple[float, Matrix]] = {}

    def try_all(self, hypotheses: Sequence[tuple[float, float]]) -> list[Tried]:
        """Evidence of each (rotation, log scale): minus infinity where no shift is allowed."""
        for log_scale in {log_scale for _, log_scale in hypotheses}:
            self._maps_at(log_scale)
        evidences = in_threads(lambda hypothesis: self._try(*hypothesis)[0], hypotheses)
        return [(found, r, s) for found, (r, s) in zip(evidences, hypotheses, strict=True)]

    def transform(self, rotation: float, log_scale: float) -> Matrix:
        """(3, 3) from visible to ir pixels, with the best shift."""
        transform = self._try(rotation, log_scale)[1]
        return transform / transform[2, 2]

    def _try(self, rotation: float, log_scale: float) -> tuple[float, Matrix]:
        key = round(rotation, 4), round(log_scale, 5)
        if key not in self._tried:
            self._tried[key] = self._correlate(rotation, log_scale)
        return self._tried[key]

    def _maps_at(self, log_scale: float) -> tuple[NDArray[np.float32], Matrix]:
        """Structure and coverage (H, W, 3) of the ir image in the visible one's scale; (3, 3) to it."""
        key = round(log_scale, 5)
        if key not in self._moving:
            small = shrink(self._ir, self._factor / float(np.exp(log_scale)))
            inside = np.ones(small.shape, np.float32)
            if self._valid_ir is not None:
                inside = clear_of_edges(self._valid_ir, small.shape)
            layers = [*without_edge(structure_maps(small, even=False)), without_edge(inside[None])[0]]
            layers = [layer * inside for layer in layers]
            self._moving[key] = cv2.merge(layers), resize_between(self._ir, small)
        return self._moving[key]

    def _correlate(self, rotation: float, log_scale: float) -> tuple[float, Matrix]:
        layers, to_small_ir = self._maps_at(log_scale)
        height, width = layers.shape[:2]
        centre_vis = (self._size[0] - 1) / 2, (self._size[1] - 1) / 2
        scale = float(np.exp(log_scale)) * to_small_ir[0, 0] / self._to_small_vis[0, 0]
        turn = similarity_about(rotation, scale, centre_vis, ((width - 1) / 2, (height - 1) / 2))
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cosine, sine, covered = cv2.split(cv2.warpAffine(layers, turn[:2], self._size, flags=flags))
        # Edges turn with the image, their doubled angles twice as far.
        c, s = (np.float32(f(2 * np.deg2rad(rotation))) for f in (np.cos, np.sin))
        maps = np.stack([c * cosine + s * sine, c * sine - s * cosine])
        mask = (covered > 0.99).astype(np.float32)
        found, dx, dy = self._correlator.best_shift(
            maps * mask, mask, min_overlap=_OVERLAP, max_shift=self._max_shift
        )
        shift = np.array([[1.0, 0, dx], [0, 1, dy], [0, 0, 1]])
        return found, np.linalg.inv(to_small_ir) @ turn @ shift @ self._to_small_vis


def _apart(grid: list[Tried]) -> list[Tried]:
    """The best few of a sorted grid that are no neighbours of each other."""
    kept: list[Tried] = []
    for item in grid:
        apart = all(
            abs(item[1] - other[1]) > _ROTATION * 1.01 or abs(item[2] - other[2]) > _SCALE * 1.01
            for other in kept
        )
        if apart and np.isfinite(item[0]):
            kept.append(item)
        if len(kept) == _HYPOTHESES:
            break
    return kept


def _climb(correlation: _Correlation, start: Tried, turn: float, zoom: float) -> Tried:
    """The best hypothesis around one of the grid, by steps that are halved; 0 keeps rotation or scale."""
    best = start
    for _ in range(_HALVINGS):
        turn, zoom = turn / 2, zoom / 2
        around = [(best[1] + i * turn, best[2] + j * zoom) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        best = max(correlation.try_all(around))
    return best


def _steps(limit: float, step: float) -> list[float]:
    """-limit .. limit in about equal steps, 0 included."""
    count = int(np.ceil(limit / step))
    return [0.0] if count == 0 else [float(x) for x in np.linspace(-limit, limit, 2 * count + 1)]
