"""From similarities to matches: candidates, neighbourhoods, selection. Pure functions on numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Entries of the largest temporary matrix: 64 MiB of float32.
CHUNK = 1 << 24


def distance_from_cosine(cosine: NDArray[np.float32]) -> NDArray[np.float32]:
    """L2 distances of unit vectors from their inner products."""
    return np.sqrt(np.maximum(2 - 2 * cosine, 0)).astype(np.float32)


def top_k_rows(a: NDArray[np.float32], b: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """For each row of `a` the `k` rows of `b` of the largest inner product, in no order.

    Args:
        a, b: (N, D) and (M, D).

    Returns:
        (N, min(k, M)) int64. Memory stays bounded: the N x M matrix is made in chunks of rows.
    """
    k = min(k, len(b))
    out = np.empty((len(a), k), np.int64)
    if not out.size:
        return out
    rows = max(1, CHUNK // len(b))
    for start in range(0, len(a), rows):
        similarity = a[start : start + rows] @ b.T
        if k == len(b):
            out[start : start + rows] = np.arange(k)
        elif k == 1:
            out[start : start + rows, 0] = similarity.argmax(1)
        else:
            out[start : start + rows] = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return out


def union_of_shortlists(
    forward: NDArray[np.int64], backward: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Candidate pairs that either side proposes, without repeats.

    Args:
        forward: (N, K) for each visible row its candidates in ir.
        backward: (M, L) for each ir row its candidates in vis.

    Returns:
        rows_vis (P,) and rows_ir (P,), sorted by visible row.
    """
    n, m = len(forward), len(backward)
    keys = np.concatenate(
        [
            (np.arange(n)[:, None] * m + forward).ravel(),
            (backward * m + np.arange(m)[:, None]).ravel(),
        ]
    )
    keys = np.unique(keys)
    return keys // max(m, 1), keys % max(m, 1)


def neighbours_within(
    points_vis: NDArray[np.floating], points_ir: NDArray[np.floating], radius: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of points nearer than `radius` (or as near), without the N x M matrix.

    The ir points are sorted into square cells as wide as the radius; a visible point looks at the
    nine cells around it.

    Args:
        points_vis, points_ir: (N, 2), (M, 2) xy pixels.
        radius: pixels, at least 0.

    Yields:
        rows_vis (P,), rows_ir (P,), sorted by visible row; chunks hold whole visible rows.
    """
    if not len(points_vis) or not len(points_ir):
        return
    vis, ir = points_vis.astype(np.float64), points_ir.astype(np.float64)
    # Cells wider than the radius are as correct; a floor keeps their number bounded.
    origin = np.minimum(vis.min(0), ir.min(0))
    extent = float((np.maximum(vis.max(0), ir.max(0)) - origin).max())
    cell = max(radius, extent / 4096, 1e-9)
    cells_vis, cells_ir = (np.floor((p - origin) / cell).astype(np.int64) + 1 for p in (vis, ir))
    width = int(max(cells_vis[:, 0].max(), cells_ir[:, 0].max())) + 2
    keys = cells_ir[:, 1] * width + cells_ir[:, 0]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    # Three cells of one row are neighbours in the order too: one range for each of three rows.
    key_vis = cells_vis[:, 1] * width + cells_vis[:, 0]
    rows = np.array([-width, 0, width])
    first = np.searchsorted(keys, key_vis[:, None] + rows - 1, side="left")
    last = np.searchsorted(keys, key_vis[:, None] + rows + 1, side="right")
    counts = (last - first).sum(1)
    total = np.cumsum(counts)
    limit = CHUNK // 8
    limit_squared = float(radius) * float(radius)  # no power: that raises where it overflows
    start = 0
    while start < len(vis):
        base = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, base + limit, side="right")))
        lengths = (last[start:stop] - first[start:stop]).ravel()
        begins = first[start:stop].ravel()
        # Positions begins[0], begins[0] + 1, ... of every range, one range after the other.
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths) + np.repeat(begins, lengths)
        rows_ir = order[at]
        rows_vis = np.repeat(np.arange(start, stop), counts[start:stop])
        near = ((vis[rows_vis] - ir[rows_ir]) ** 2).sum(1) <= limit_squared
        yield rows_vis[near], rows_ir[near]
        start = stop


def paired_cosine(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    rows_a: NDArray[np.int64],
    rows_b: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Inner products of chosen row pairs, (P,), in chunks of bounded memory."""
    out = np.empty(len(rows_a), np.float32)
    size = max(1, CHUNK // max(a.shape[1], 1) // 4)
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        out[part] = np.einsum("nd,nd->n", a[rows_a[part]], b[rows_b[part]])
    return out


def keep_top_k(groups: NDArray[np.int64], values: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """Which entries are among the `k` largest values of their group, (P,) bool."""
    order = np.lexsort((-values, groups))
    ordered = groups[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, bool)
    starts = np.flatnonzero(new)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    keep = np.empty(len(order), bool)
    keep[order] = rank < k
    return keep


def select_matches(
    rows_vis: NDArray[np.int64],
    rows_ir: NDArray[np.int64],
    scores: NDArray[np.float32],
    distances: NDArray[np.float32],
    *,
    mutual: bool,
    one_to_one: bool,
) -> NDArray[np.int64]:
    """Which candidates become matches.

    A match is the best candidate of its visible row; with `mutual` it is the best of its ir row too;
    with `one_to_one` an ir row that several visible rows chose keeps the best of them. Better is a
    higher score, then a smaller distance, then smaller indices, so that the outcome is unique.

    Args:
        rows_vis, rows_ir, scores, distances: (P,) candidates, in any order, without repeats.

    Returns:
        (K,) positions among the candidates, best first.
    """
    order = np.lexsort((rows_ir, rows_vis, distances, -scores))
    best_vis = order[np.sort(np.unique(rows_vis[order], return_index=True)[1])]
    if mutual:
        best_ir = order[np.sort(np.unique(rows_ir[order], return_index=True)[1])]
        return best_vis[np.isin(best_vis, best_ir)]
    if one_to_one:
        return best_vis[np.sort(np.unique(rows_ir[best_vis], return_index=True)[1])]
    return best_vis
