"""Candidates and selection, held against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from kglmatch import matching


def unit(rng, n, d=16):
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("n", "m", "k"), [(0, 5, 2), (5, 0, 2), (1, 1, 3), (40, 30, 1), (40, 30, 7), (4, 3, 3)]
)
def test_top_k_rows_are_the_nearest(n, m, k):
    rng = np.random.default_rng(1)
    a, b = unit(rng, n), unit(rng, m)
    found = matching.top_k_rows(a, b, k)
    assert found.shape == (n, min(k, m))
    expected = np.argsort(-(a @ b.T), axis=1)[:, :k]
    for row, wanted in zip(found, expected, strict=True):
        assert set(row) == set(wanted)


def test_top_k_rows_in_chunks_equal_those_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    a, b = unit(rng, 50), unit(rng, 20)
    whole = np.sort(matching.top_k_rows(a, b, 4), axis=1)
    monkeypatch.setattr(matching, "CHUNK", 60)
    assert np.array_equal(np.sort(matching.top_k_rows(a, b, 4), axis=1), whole)


def test_union_of_shortlists_has_no_repeats_and_loses_nothing():
    forward, backward = np.array([[0, 1], [2, 1]]), np.array([[0], [0], [1]])
    rows_vis, rows_ir = matching.union_of_shortlists(forward, backward)
    assert list(zip(rows_vis, rows_ir, strict=True)) == [(0, 0), (0, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize("radius", [0.0, 0.5, 3.0, 17.3, 500.0])
@pytest.mark.parametrize("chunk", [1 << 24, 800])
def test_neighbours_within_equals_brute_force(monkeypatch, radius, chunk):
    monkeypatch.setattr(matching, "CHUNK", chunk)
    rng = np.random.default_rng(3)
    vis = rng.uniform(-20, 120, (150, 2)).round(1)
    ir = np.concatenate([rng.uniform(-50, 150, (130, 2)).round(1), vis[:20]])
    found = set()
    for rows_vis, rows_ir in matching.neighbours_within(vis, ir, radius):
        found |= set(zip(rows_vis.tolist(), rows_ir.tolist(), strict=True))
    squared = ((vis[:, None] - ir[None]) ** 2).sum(2)
    assert found == set(zip(*(x.tolist() for x in np.nonzero(squared <= radius**2)), strict=True))


def test_neighbours_within_empty_sides():
    none, some = np.empty((0, 2)), np.ones((3, 2))
    assert list(matching.neighbours_within(none, some, 5)) == []
    assert list(matching.neighbours_within(some, none, 5)) == []


def test_neighbours_far_apart_cost_no_memory():
    # Cells as wide as the radius over this extent would be beyond any array.
    points = np.array([[0.0, 0.0], [1e9, 1e9]])
    pairs = [(a.tolist(), b.tolist()) for a, b in matching.neighbours_within(points, points, 1e-3)]
    assert [row for rows, _ in pairs for row in rows] == [0, 1]


def test_a_radius_beyond_all_numbers_reaches_every_point():
    vis, ir = np.array([[0.0, 0.0], [5.0, 9.0]]), np.array([[1e6, -1e6], [3.0, 4.0], [0.0, 1e30]])
    for radius in (1e200, np.inf):
        pairs = list(matching.neighbours_within(vis, ir, radius))
        assert sum(len(rows) for rows, _ in pairs) == 6


def test_keep_top_k_ranks_within_groups():
    groups = np.array([1, 0, 1, 1, 0])
    values = np.array([0.1, 0.9, 0.5, 0.3, 0.2], np.float32)
    assert matching.keep_top_k(groups, values, 1).tolist() == [False, True, True, False, False]
    assert matching.keep_top_k(groups, values, 2).tolist() == [False, True, True, True, True]
    assert matching.keep_top_k(groups[:0], values[:0], 2).shape == (0,)


def brute_force_select(score, distance, mutual, one_to_one):
    """The same rules, pair by pair."""
    n, m = score.shape

    def key(i, j):
        return (-score[i, j], distance[i, j], i, j)

    chosen = [(i, min(range(m), key=lambda j: key(i, j))) for i in range(n)]
    if mutual:
        chosen = [(i, j) for i, j in chosen if min(range(n), key=lambda r: key(r, j)) == i]
    chosen.sort(key=lambda p: key(*p))
    if one_to_one:
        seen: set[int] = set()
        chosen = [(i, j) for i, j in chosen if j not in seen and not seen.add(j)]
    return chosen


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("one_to_one", [True, False])
def test_select_matches_equals_brute_force(mutual, one_to_one):
    rng = np.random.default_rng(4)
    for n, m in ((1, 1), (7, 5), (20, 30)):
        # Coarse values, so that ties are common.
        score = rng.integers(0, 4, (n, m)).astype(np.float32) / 4
        distance = rng.integers(0, 3, (n, m)).astype(np.float32)
        rows_vis, rows_ir = (x.ravel() for x in np.indices((n, m)))
        order = rng.permutation(n * m)
        rows_vis, rows_ir = rows_vis[order], rows_ir[order]
        chosen = matching.select_matches(
            rows_vis,
            rows_ir,
            score[rows_vis, rows_ir],
            distance[rows_vis, rows_ir],
            mutual=mutual,
            one_to_one=one_to_one,
        )
        found = list(zip(rows_vis[chosen], rows_ir[chosen], strict=True))
        assert found == brute_force_select(score, distance, mutual, one_to_one)


def test_select_matches_of_nothing():
    rows, values = np.empty(0, np.int64), np.empty(0, np.float32)
    for mutual in (True, False):
        assert matching.select_matches(rows, rows, values, values, mutual=mutual, one_to_one=True).shape == (
            0,
        )
