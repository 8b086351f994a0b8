"""Dense search: the place of a visible keypoint in the other image, whether a detector finds it or not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.geometry import parabola_vertex
from kglmatch.matching import neighbours_within, paired_cosine

STRIDE = 4  # pixels between the places that are described


def check_dense(max_displacement: float | None, upright: bool) -> float:
    """How far dense search looks, pixels.

    Raises:
        KGLMatchError: no bound to the search, or turned patches, which it does not know.
    """
    if max_displacement is None or not STRIDE <= max_displacement < np.inf:
        raise KGLMatchError(
            f"dense search needs a max_displacement of at least {STRIDE} pixels, got {max_displacement}"
        )
    if not upright:
        raise KGLMatchError("dense search looks at upright patches only")
    return max_displacement


def find_places(
    describe: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    patch_size: int,
    keypoints: NDArray[np.floating],
    descriptors: NDArray[np.float32],
    shape: tuple[int, ...],
    radius: float,
) -> NDArray[np.float32]:
    """The place within `radius` pixels of each keypoint whose descriptor is the nearest.

    Patches are described every 4 pixels wherever a keypoint may lie, each once. A parabola through
    the similarities of the neighbours in x and in y gives the fraction.

    Args:
        describe: descriptors (P, D) of the ir patches around places (P, 2), xy pixels.
        patch_size: pixels.
        keypoints: (N, 2) xy pixels.
        descriptors: (N, D), of the visible image.
        shape: (H, W) of the ir image.
        radius: pixels.

    Returns:
        (K, 2) float32 xy pixels, in the order of the keypoints, of which some may have none.
    """
    wanted = _lattice_within(keypoints, shape, patch_size, radius)

    def places_of(cells: NDArray[np.bool_]) -> NDArray[np.int64]:
        return patch_size // 2 + STRIDE * np.argwhere(cells)[:, ::-1]

    places = places_of(wanted)
    there = describe(places)
    nearest = [np.empty((0, 2), np.int64)]
    for rows_vis, rows_ir in neighbours_within(keypoints, places.astype(np.float64), radius):
        order = np.lexsort((rows_ir, -paired_cosine(descriptors, there, rows_vis, rows_ir), rows_vis))
        first = order[np.unique(rows_vis[order], return_index=True)[1]]
        nearest.append(np.stack([rows_vis[first], rows_ir[first]], axis=1))
    rows_vis, rows_ir = np.concatenate(nearest).T
    x, y = ((places[rows_ir] - patch_size // 2) // STRIDE + 1).T  # of the lattice with a frame around it
    steps = ((1, 0), (0, 1))
    around = np.zeros(np.add(wanted.shape, 2), bool)
    for dx, dy in steps:
        around[y + dy, x + dx] = around[y - dy, x - dx] = True
    around = around[1:-1, 1:-1] & ~wanted
    there = np.concatenate([there, describe(places_of(around))])
    numbers = np.full(np.add(wanted.shape, 2), -1)
    numbers[1:-1, 1:-1][wanted] = np.arange(len(places))
    numbers[1:-1, 1:-1][around] = np.arange(len(places), len(there))
    found = places[rows_ir].astype(np.float64)
    centre = paired_cosine(descriptors, there, rows_vis, rows_ir).astype(np.float64)
    for axis, (dx, dy) in enumerate(steps):
        before, after = numbers[y - dy, x - dx], numbers[y + dy, x + dx]
        left, right = (paired_cosine(descriptors, there, rows_vis, rows) for rows in (before, after))
        known = (before >= 0) & (after >= 0)
        found[known, axis] += STRIDE * parabola_vertex(left[known], centre[known], right[known])
    return _drawn_back(found, keypoints[rows_vis], radius)


def _lattice_within(
    keypoints: NDArray[np.floating], shape: tuple[int, ...], size: int, radius: float
) -> NDArray[np.bool_]:
    """Which places of the lattice of whole patches, (rows, columns), lie within `radius` of a keypoint."""
    rows, columns = ((side - size) // STRIDE + 1 for side in shape)
    y, x = (size // 2 + STRIDE * np.arange(count) for count in (rows, columns))
    wanted = np.zeros((rows, columns), bool)
    for kx, ky in keypoints:
        across = slice(*np.searchsorted(x, (kx - radius, kx + radius + 1)))
        down = slice(*np.searchsorted(y, (ky - radius, ky + radius + 1)))
        wanted[down, across] |= (x[across] - kx) ** 2 + (y[down, None] - ky) ** 2 <= radius**2
    return wanted


def _drawn_back(
    points: NDArray[np.float64], centres: NDArray[np.floating], radius: float
) -> NDArray[np.float32]:
    """Points at most `radius` from their centres; a hair less, for they are rounded after."""
    away = points - centres
    length = np.linalg.norm(away, axis=1, keepdims=True)
    limit = radius * (1 - 1e-6) - 1e-3
    return (centres + away * np.minimum(1, limit / np.maximum(length, limit))).astype(np.float32)
