"""Correlation surfaces of many captures about one transform: what they say together, and each on its own.

The windows of all captures are pooled before anything is decided (`kglmatch.registration.surfaces`). A
capture whose windows are too few or too unclear to be registered alone still adds its votes to the sum, and
one that shows sky adds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from kglmatch.batch.rig_results import Residuals
from kglmatch.errors import ImageError
from kglmatch.geometry import transform_points
from kglmatch.images import load_image
from kglmatch.options import DEFAULT_KIND, TransformKind
from kglmatch.progress import steps
from kglmatch.registration.align import (
    FIRST_SIDE,
    LEAST_SUPPORT,
    Level,
    make_level,
    nearest_similarity,
    pyramid,
)
from kglmatch.registration.surfaces import (
    expand,
    maximise_votes,
    peaks,
    smooth,
    starting_points,
    vote,
    votes,
)

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]
T = TypeVar("T")

_FINE = {"radius": 6, "across": 14}
_WIDE = {"radius": 16, "across": 9}  # for captures that lie far from the others
_CLEAR_PEAK = 1.8  # standard deviations, as in `registration.align`
_CONSISTENT = 1.5  # pixels of the band
_LEAST_CLEAR = 5  # windows at one place of the grid
_MAX_STARTS = 20_000  # windows; with more, nothing but the start is climbed from
_CANDIDATES: tuple[TransformKind, ...] = ("similarity", "affine", "homography")
_KIND_GAIN = 1.01
_ENOUGH_TO_TEST = 8  # captures


@dataclass
class Pairs:
    """Two bands of many captures, read when they are looked at.

    Attributes:
        names: of the captures.
        vis, ir: their images, row by row: paths, or whatever `load_image` takes.
        vis_size, ir_size: (width, height) that they must have.
        workers: threads that read and correlate.
        progress: draw progress bars on a terminal.
        problems: filled with what could not be used: capture -> why.
    """

    names: Sequence[str]
    vis: Sequence[Any]
    ir: Sequence[Any]
    vis_size: tuple[int, int]
    ir_size: tuple[int, int]
    workers: int = 1
    progress: bool = False
    problems: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, row: int) -> tuple[Image, Image] | None:
        """Both images (H, W) in [0, 1]; None, with the problem noted, where they cannot be used."""
        try:
            images = load_image(self.vis[row]), load_image(self.ir[row])
        except ImageError as error:
            self.problems[self.names[row]] = str(error)
            return None
        for image, size in zip(images, (self.vis_size, self.ir_size), strict=True):
            if image.shape[::-1] != size:
                self.problems[self.names[row]] = (
                    f"is {image.shape[1]} x {image.shape[0]}, where the others are {size[0]} x {size[1]}"
                )
                return None
        return images

    def each(self, rows: Iterable[int], task: Callable[[int], T], what: str) -> list[T]:
        """What a task gives for each row, by several threads."""
        rows = list(rows)
        if self.workers == 1 or len(rows) < 2:
            return [task(row) for row in steps(rows, what, show=self.progress)]
        with ThreadPoolExecutor(self.workers) as threads:
            futures = [threads.submit(task, row) for row in rows]
            try:
                return [future.result() for future in steps(futures, what, show=self.progress)]
            finally:
                for future in futures:
                    future.cancel()


@dataclass(frozen=True)
class Pool:
    """The windows of several captures at one resolution.

    Attributes:
        level: centres and surfaces of all of them, about one transform.
        rows: (P,) the capture of each window.
    """

    level: Level
    rows: NDArray[np.int64]

    def per_capture(self, values: Matrix) -> dict[int, float]:
        """Mean of a value (P,) for each capture."""
        captures, index = np.unique(self.rows, return_inverse=True)
        means = np.bincount(index, values) / np.bincount(index)
        return dict(zip(captures.tolist(), means.tolist(), strict=True))


def gather(
    pairs: Pairs, rows: Iterable[int], transform: Matrix, side: int, *, radius: int, across: int
) -> Pool | None:
    """The pool of these captures about a transform; None where none of them can be used."""

    def level_of(row: int) -> Level | None:
        images = pairs.load(row)
        if images is None:
            return None
        return make_level(*images, transform, side, radius=radius, across=across)

    rows = list(rows)
    found = [
        (row, level)
        for row, level in zip(rows, pairs.each(rows, level_of, "correlating"), strict=True)
        if level is not None
    ]
    if not found:
        return None
    first = found[0][1]
    level = Level(
        np.concatenate([level.centres for _, level in found]),
        np.concatenate([level.surfaces for _, level in found]),
        first.to_level,
        first.predicted,
    )
    return Pool(level, np.repeat([row for row, _ in found], [len(level.centres) for _, level in found]))


def fit(pool: Pool, kinds: Sequence[TransformKind], sigmas: Sequence[float]) -> tuple[Matrix, Matrix]:
    """The best supported correction (3, 3) of a pool, and what each window (P,) votes for it."""
    level = pool.level
    blurred = [smooth(level.surfaces, sigma) for sigma in sigmas]
    many = len(level.centres) > _MAX_STARTS
    starts = [np.eye(3)] if many else starting_points(level.surfaces, level.centres, kinds[-1], tolerance=1.5)
    best, best_votes = np.eye(3), np.full(len(level.centres), -1.0)
    for start in starts:
        correction = start
        for kind in kinds:
            correction = maximise_votes(blurred, level.centres, kind, correction)
        given = votes(blurred[-1], level.centres, correction)
        if given.sum() > best_votes.sum():
            best, best_votes = correction, given
    return best, best_votes


def choose_kind(pool: Pool, kind: str, correction: Matrix) -> tuple[TransformKind, Matrix]:
    """The kind asked for, or the simplest that no other beats on captures that were held out of the fit.

    Returns:
        the kind, and the correction (3, 3) of that kind fitted to all windows.
    """
    level = pool.level
    blurred = [smooth(level.surfaces, 0.5)]
    candidates = _CANDIDATES if kind == DEFAULT_KIND else (cast(TransformKind, kind),)
    chosen, fitted, best = candidates[0], correction, np.zeros(0)
    half = _halves(pool, correction)
    grid = Level(np.unique(level.centres, axis=0), level.surfaces[:0], level.to_level, level.predicted)
    for candidate in candidates:
        start = nearest_similarity(grid, correction) if candidate == "similarity" else correction
        moved = maximise_votes(blurred, level.centres, candidate, start)
        given = _held_out_by_capture(pool, candidate, moved, half) if len(candidates) > 1 else best
        if not len(best) or _clearly_more(given, best):
            chosen, fitted, best = candidate, moved, given
    return chosen, fitted


def _halves(pool: Pool, start: Matrix) -> NDArray[np.bool_]:
    """(P,) windows of every other capture, as ranked by their votes for a correction.

    So both halves hold as much to see, also where captures of sky alternate with others. A single capture is
    halved in a checkerboard.
    """
    index = np.unique(pool.rows, return_inverse=True)[1]
    if not index.max():
        return checkerboard(pool.level.centres)
    given = votes(smooth(pool.level.surfaces, 1.0), pool.level.centres, start)
    best_first = np.argsort([-vote for vote in pool.per_capture(given).values()], kind="stable")
    return np.isin(index, best_first[::2])


def _held_out_by_capture(pool: Pool, kind: TransformKind, start: Matrix, half: NDArray[np.bool_]) -> Matrix:
    """Mean vote of each capture for a correction fitted to the half of the windows without it."""
    level = pool.level
    blurred = smooth(level.surfaces, 1.0)
    given = np.empty(len(level.centres))
    for part in (half, ~half):
        fitted = maximise_votes([blurred[part]], level.centres[part], kind, start)
        given[~part] = votes(blurred[~part], level.centres[~part], fitted)
    return np.array(list(pool.per_capture(given).values()))


def _clearly_more(a: Matrix, b: Matrix) -> bool:
    """Whether the votes (N,) of captures for one thing exceed those for another by more than chance."""
    # Captures that show nothing say nothing of either.
    telling = np.maximum(a, b) >= LEAST_SUPPORT
    if telling.sum() < _ENOUGH_TO_TEST:
        return bool(a.sum() > b.sum() * _KIND_GAIN)
    gained = (a - b)[telling]
    return bool(gained.mean() > 2 * gained.std() / np.sqrt(len(gained)))


def checkerboard(centres: Matrix) -> NDArray[np.bool_]:
    """(P,) every other window of a grid."""
    column = np.unique(centres[:, 0], return_inverse=True)[1]
    row = np.unique(centres[:, 1], return_inverse=True)[1]
    half: NDArray[np.bool_] = (column + row) % 2 == 0
    return half


# --- each capture on its own ----------------------------------------------------------------------


@dataclass(frozen=True)
class OwnShift:
    """Where one capture lies, from its windows alone.

    Attributes:
        at: (2,) pixels of the level, from the predicted place.
        error: pixels of the level by which two halves of the windows disagree.
        support: mean vote of each half for the shift that the other found.
    """

    at: Matrix
    error: float
    support: float


def own_shift(surfaces: NDArray[np.float32], centres: Matrix) -> OwnShift:
    """The shift that most windows of one capture vote for, among all that the surfaces hold.

    Args:
        surfaces: (P, S, S), standardised and smoothed.
        centres: (P, 2).
    """
    given = vote(surfaces)
    half = checkerboard(centres)
    if half.all() or not half.any():
        return OwnShift(np.zeros(2), np.inf, 0.0)
    halves = np.stack([given[half].mean(axis=0), given[~half].mean(axis=0), given.mean(axis=0)])
    at, _ = peaks(halves.astype(np.float32))
    # Each half is asked about the other's peak.
    crossed, _, _ = expand(halves[[1, 0]].astype(np.float32), at[:2])
    return OwnShift(at[2], float(np.linalg.norm(at[0] - at[1]) / 2), float(crossed.mean()))


def measure(
    pairs: Pairs, rows: Sequence[int], transform: Matrix, known: tuple[Pool, Matrix] | None = None
) -> Residuals:
    """How far each capture lies from where a transform takes it.

    At the finest resolution first; captures that say nothing there are looked at again over a wider range
    of a coarser one.

    Args:
        rows: captures to look at.
        transform: (3, 3) from visible to ir pixels.
        known: a pool of these captures at the finest resolution, and the small correction (3, 3) that led
            from it to the transform; None gathers one.
    """
    finest = pyramid(max(pairs.vis_size))[-1]
    names = tuple(pairs.names[row] for row in rows)
    number = {row: i for i, row in enumerate(rows)}
    shifts, errors = np.full((len(rows), 2), np.nan), np.full(len(rows), np.nan)
    support = np.zeros(len(rows))
    points, displaced = np.empty((0, 2)), np.empty((0, 2))
    near: list[NDArray[np.bool_]] = []
    pool: Pool | None
    todo = list(rows)
    for side, search in ((finest, _FINE), (FIRST_SIDE, _WIDE)):
        expected = np.zeros(2)
        if known is not None and search is _FINE:
            pool, correction = known
            centres = pool.level.centres
            expected = (transform_points(correction, centres) - centres).mean(axis=0)
        elif not todo or (pool := gather(pairs, todo, transform, side, **search)) is None:
            continue
        to_ir = _pixels_of(pool.level)
        reach = search["radius"] - 1.0
        for row in np.unique(pool.rows):
            mine = pool.rows == row
            surfaces, centres = smooth(pool.level.surfaces[mine], 0.7), pool.level.centres[mine]
            found = own_shift(surfaces, centres)
            i = number[int(row)]
            support[i] = max(support[i], found.support)
            if found.support < LEAST_SUPPORT or np.abs(found.at).max() > reach:
                continue
            shifts[i], errors[i] = (
                to_ir @ (found.at - expected),
                found.error * np.sqrt(abs(np.linalg.det(to_ir))),
            )
            todo.remove(int(row))
            at, height = peaks(surfaces)
            clear = height > _CLEAR_PEAK
            away = (at[clear] - found.at) @ to_ir.T
            near.append(np.linalg.norm(away, axis=1) < _CONSISTENT)
            if side == finest:
                places = transform_points(np.linalg.inv(pool.level.to_level), centres[clear])
                points, displaced = np.concatenate([points, places]), np.concatenate([displaced, away])
    consistent = float(np.concatenate(near).mean()) if near and sum(map(len, near)) else float("nan")
    grid, means = _field(points, displaced)
    return Residuals(names, shifts, errors, support, consistent, grid, means)


def _pixels_of(level: Level) -> Matrix:
    """(2, 2) that takes a small displacement at the middle of a level to ir pixels."""
    middle = level.centres.mean(axis=0)
    ends = transform_points(level.predicted, middle + np.array([[0, 0], [1.0, 0], [0, 1.0]]))
    return (ends[1:] - ends[0]).T


def _field(points: Matrix, displaced: Matrix) -> tuple[Matrix, Matrix]:
    """Median displacement (G, 2) at each place (G, 2) of the grid; NaN where few windows are clear."""
    if not len(points):
        return np.empty((0, 2)), np.empty((0, 2))
    grid, index = np.unique(np.round(points, 3), axis=0, return_inverse=True)
    means = np.full((len(grid), 2), np.nan)
    for i in range(len(grid)):
        mine = displaced[index == i]
        if len(mine) >= _LEAST_CLEAR:
            means[i] = np.median(mine, axis=0)
    return grid, means


def refine_capture(vis: Image, ir: Image, transform: Matrix) -> Matrix | None:
    """A transform that one capture supports more than that of its rig; None if it supports none more.

    Support is what windows vote for a correction that was fitted without them. A correction is a shift first,
    and a similarity where that gains more.

    Args:
        vis, ir: (H, W) float32 grey.
        transform: (3, 3) from visible to ir pixels.
    """
    best: Matrix | None = None
    for side, search in ((FIRST_SIDE, _WIDE), (pyramid(max(vis.shape))[-1], _FINE)):
        start = transform if best is None else best
        level = make_level(vis, ir, start, side, radius=search["radius"], across=search["across"])
        if level is None:
            continue
        surfaces = smooth(level.surfaces, 0.7)
        found = own_shift(surfaces, level.centres)
        if found.support < LEAST_SUPPORT or np.abs(found.at).max() > search["radius"] - 1:
            continue
        correction = np.eye(3)
        support = float(votes(surfaces, level.centres, correction).mean())
        shift = np.eye(3)
        shift[:2, 2] = found.at
        if found.support > support * _KIND_GAIN:
            correction, support = shift, found.support
        one = Pool(level, np.zeros(len(level.centres), np.int64))
        turned = float(_held_out_by_capture(one, "similarity", shift, checkerboard(level.centres))[0])
        if turned > support * _KIND_GAIN:
            correction = maximise_votes([surfaces], level.centres, "similarity", shift)
        if not np.array_equal(correction, np.eye(3)):
            best = level.full(correction)
    return best
