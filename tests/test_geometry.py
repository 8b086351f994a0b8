"""Homographies from matches."""

from __future__ import annotations

import numpy as np
import pytest

from kglmatch.errors import KGLMatchError
from kglmatch.geometry import (
    corner_error,
    estimate_homography,
    fit_robustly,
    parabola_vertex,
    small_transform,
    transform_points,
)
from kglmatch.options import TRANSFORMS

TRUE = np.array([[1.02, 0.03, 4.0], [-0.02, 0.99, -7.0], [1e-5, 2e-5, 1.0]])


def test_homography_is_found_among_outliers():
    rng = np.random.default_rng(0)
    vis = rng.uniform(0, 500, (200, 2))
    ir = transform_points(TRUE, vis) + rng.normal(0, 0.3, (200, 2))
    ir[:80] = rng.uniform(0, 500, (80, 2))
    homography, inliers = estimate_homography(vis, ir, threshold=2.0)
    assert corner_error(homography, TRUE, (500, 500)) < 1.0
    assert inliers[80:].mean() > 0.95
    assert inliers[:80].mean() < 0.05


def test_the_same_matches_give_the_same_homography():
    rng = np.random.default_rng(1)
    vis = rng.uniform(0, 500, (60, 2))
    ir = transform_points(TRUE, vis) + rng.normal(0, 2, (60, 2))
    first, second = (estimate_homography(vis, ir)[0] for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_matches_give_none(n):
    homography, inliers = estimate_homography(np.zeros((n, 2)), np.zeros((n, 2)))
    assert homography is None
    assert inliers.shape == (n,)
    assert not inliers.any()


def test_points_on_one_spot_give_none():
    homography, inliers = estimate_homography(np.ones((10, 2)), np.ones((10, 2)))
    assert homography is None
    assert not inliers.any()


@pytest.mark.parametrize("threshold", [0, -1, float("nan")])
def test_bad_threshold(threshold):
    with pytest.raises(KGLMatchError, match="threshold"):
        estimate_homography(np.zeros((5, 2)), np.zeros((5, 2)), threshold=threshold)


def test_shapes_must_fit():
    with pytest.raises(KGLMatchError, match="alike"):
        estimate_homography(np.zeros((5, 2)), np.zeros((4, 2)))


def test_corner_error_of_a_shift_is_its_length():
    shift = np.array([[1.0, 0, 3], [0, 1, 4]])
    assert corner_error(shift, np.eye(3), (100, 80)) == pytest.approx(5.0)
    assert corner_error(shift, shift, (100, 80)) == 0


def test_a_parabola_is_highest_at_its_vertex():
    tops = np.array([-0.4, 0.0, 0.25, 0.5])
    before, centre, after = (5 - 2 * (at - tops) ** 2 for at in (-1, 0, 1))
    assert np.abs(parabola_vertex(before, centre, after) - tops).max() < 1e-12
    for dtype in (np.float32, np.float64):
        level, rising = np.ones(1, dtype), np.array([1, 2, 4], dtype)
        assert parabola_vertex(level, level, level) == 0  # no top
        assert parabola_vertex(*rising[:, None]) == 0 and parabola_vertex(level, level, level).dtype == dtype
    assert parabola_vertex(np.zeros(1), np.ones(1), np.ones(1)) == 0.5
    assert parabola_vertex(*np.zeros((3, 0))).shape == (0,)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_robust_fit_uses_all_inliers_and_no_outlier(kind):
    rng = np.random.default_rng(0)
    step = np.array([12.0, -7.0, 0.05, -0.03, 0.02, 0.04, 1e-5, -2e-5])
    step = step[: {"translation": 2, "similarity": 4, "affine": 6, "homography": 8}[kind]]
    true = small_transform(kind, step)
    vis = rng.uniform(0, 500, (120, 2))
    ir = transform_points(true, vis) + rng.normal(0, 1.0, (120, 2))
    ir[:50] = rng.uniform(0, 500, (50, 2))
    start = np.array([[1, 0, step[0] + 4], [0, 1, step[1] - 3], [0, 0, 1.0]])
    found = fit_robustly(kind, vis, ir, start, (20.0, 3.0))
    assert corner_error(found, true, (500, 500)) < 1.0
