"""Pictures: who is where, in which colour, and what the strip says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import texture

from kglmatch.errors import ImageError, KGLMatchError
from kglmatch.features import Matches
from kglmatch.visualize import INLIER, OUTLIER, UNDECIDED, draw_checkerboard, draw_matches, draw_overlay


def some_matches(points_vis, points_ir, inliers=None, homography=None):
    count = len(points_vis)
    return Matches(
        np.stack([np.arange(count)] * 2, axis=1).astype(np.int64),
        np.ones(count, np.float32),
        np.zeros(count, np.float32),
        np.asarray(points_vis, np.float32).reshape(-1, 2),
        np.asarray(points_ir, np.float32).reshape(-1, 2),
        homography,
        None if inliers is None else np.asarray(inliers, bool),
    )


def coloured(picture, colour, tolerance=40):
    """Where the picture is about of that colour."""
    return np.abs(picture.astype(int) - colour).max(axis=2) <= tolerance


def test_images_of_different_size_and_depth_stand_side_by_side():
    vis = texture(600, 400)
    ir = (texture(300, 300, seed=1) * 4000 + 500).astype(np.uint16)
    picture = draw_matches(vis, ir, some_matches([], []))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert 1000 <= picture.shape[1] <= 2000
    # The panes: equal heights, widths 600/400 and 300/300 of it; the 16-bit one is stretched.
    rows = (picture.shape[1] - 8) / 2.5
    left, right = picture[: int(rows), : int(1.5 * rows)], picture[: int(rows), int(1.5 * rows) + 9 :]
    again = cv2.resize(left[..., 0], (600, 400), interpolation=cv2.INTER_AREA) / 235
    assert np.abs(again - vis)[5:-5, 5:-5].mean() < 0.02
    assert right.min() < 20 and right.max() > 220
    assert all((pane == pane[..., :1]).all() for pane in (left, right))  # no line, all grey


@pytest.mark.parametrize(("size", "width"), [((64, 64), 1000), ((3000, 1500), 2000), ((700, 500), 1408)])
def test_width_suits_the_eye(size, width):
    image = np.full(size[::-1], 0.5, np.float32)
    assert abs(draw_matches(image, image, some_matches([], [])).shape[1] - width) <= 2


def test_points_lie_where_the_keypoints_are_and_inliers_differ_from_outliers():
    image = np.full((500, 750), 0.5, np.float32)  # 750 + 750 + gap: drawn one to one
    vis, ir = [[100, 100], [600, 50]], [[700, 300], [200, 450]]
    picture = draw_matches(image, image, some_matches(vis, ir, [True, False]), max_lines=0)
    for point, other, colour in zip(vis, ir, (INLIER, OUTLIER), strict=True):
        ys, xs = np.nonzero(coloured(picture[:500], colour))
        for x, y in (point, (other[0] + 758, other[1])):
            near = np.hypot(xs - x, ys - y) < 6
            assert near.sum() >= 9
            assert abs(xs[near].mean() - x) < 0.4 and abs(ys[near].mean() - y) < 0.4
        # Nothing of that colour elsewhere: no lines were asked for.
        assert (np.hypot(xs - point[0], ys - point[1]) < 6).sum() * 2 == pytest.approx(len(xs), abs=6)


def test_inlier_lines_are_thicker_and_lie_above():
    image = np.full((500, 750), 0.5, np.float32)
    # The two lines cross in the middle of the left image.
    matches = some_matches([[0, 100], [0, 400]], [[0, 400], [0, 100]], [True, False])
    picture = draw_matches(image, image, matches).astype(int)
    green, orange = (picture[:500] @ [-1, 2, -1] > 60), (picture[:500] @ [2, -1, -1] > 60)
    columns = slice(200, 300)
    assert green[:, columns].sum() > 1.2 * orange[:, columns].sum() > 100
    crossing = picture[250, 379]
    assert crossing[1] > crossing[0]


def test_undecided_matches_have_a_colour_of_their_own():
    image = np.full((500, 750), 0.5, np.float32)
    picture = draw_matches(image, image, some_matches([[100, 100]], [[100, 100]]))
    assert coloured(picture[:500], UNDECIDED).sum() >= 18
    assert not coloured(picture[:500], INLIER).any() and not coloured(picture[:500], OUTLIER).any()


def test_thousands_of_matches_are_thinned_evenly():
    rng = np.random.default_rng(0)
    image = np.full((500, 750), 0.5, np.float32)
    # Crowded on the left: nine in ten of the keypoints.
    crowd = rng.random((1800, 2)) * [75, 500]
    points = np.concatenate([crowd, rng.random((200, 2)) * [675, 500] + [75, 0]])
    matches = some_matches(points, points, np.ones(2000, bool))
    # Columns of the gap, where only lines are drawn, cut by every line.
    gap = [
        draw_matches(image, image, matches, max_lines=n)[:500, 754].max(axis=1) > 60 for n in (0, 20, 2000)
    ]
    assert gap[0].sum() == 0
    assert 20 <= gap[1].sum() <= 20 * 4
    assert gap[2].sum() > 450
    from kglmatch.visualize import _spread

    chosen = points[_spread(points, 100)]
    assert len(chosen) == 100
    assert (chosen[:, 0] > 75).sum() > 70


def test_few_inliers_among_many_outliers_keep_their_lines():
    rng = np.random.default_rng(0)
    image = np.full((500, 750), 0.5, np.float32)
    points = rng.random((500, 2)) * [750, 500]
    inliers = np.arange(500) < 10
    picture = draw_matches(image, image, some_matches(points, points, inliers), max_lines=20)[:500]
    green = picture.astype(int)[:, 754] @ [-1, 2, -1] > 60
    starts = np.flatnonzero(np.diff(np.concatenate([[0], green.astype(int)])) == 1)
    assert 8 <= len(starts) <= 10  # lines may touch


def test_the_outline_of_the_visible_image_is_drawn():
    image = np.full((500, 750), 0.5, np.float32)
    homography = np.array([[0.5, 0, 100], [0, 0.5, 50], [0, 0, 1]])
    matches = some_matches([[10, 10]], [[105, 55]], [True], homography)
    yellow = draw_matches(image, image, matches)[:500].astype(int) @ [1, 1, -2] > 120
    ys, xs = np.nonzero(yellow)
    assert abs(xs.min() - 758 - 99.75) < 2 and abs(xs.max() - 758 - 474.75) < 2
    assert abs(ys.min() - 49.75) < 2 and abs(ys.max() - 299.75) < 2
    # A homography whose horizon crosses the image has no outline; nothing breaks.
    homography = np.array([[1, 0, 0], [0, 1, 0], [-0.01, 0, 1.0]])
    picture = draw_matches(image, image, some_matches([[10, 10]], [[11, 11]], [True], homography))
    assert not (picture[:500].astype(int) @ [1, 1, -2] > 120).any()


def test_the_strip_counts():
    image = np.full((500, 750), 0.5, np.float32)
    points = np.random.default_rng(0).random((12, 2)) * 400
    strips = [
        draw_matches(image, image, some_matches(points, points, np.arange(12) < n))[500:] for n in (3, 3, 9)
    ]
    assert 20 <= strips[0].shape[0] <= 80
    assert (strips[0] == strips[1]).all() and (strips[0] != strips[2]).any()
    assert coloured(strips[0], INLIER).any() and coloured(strips[0], OUTLIER).any()


def test_match_pictures_refuse_what_they_cannot_draw():
    image = np.zeros((80, 80), np.float32)
    rows = np.zeros((1, 2), np.int64)
    without = Matches(rows, np.ones(1, np.float32), np.zeros(1, np.float32))
    with pytest.raises(KGLMatchError, match="without keypoints"):
        draw_matches(image, image, without)
    for wrong in (-1, 2.5, True, "3", float("nan"), None):
        with pytest.raises(KGLMatchError, match="max_lines"):
            draw_matches(image, image, some_matches([], []), max_lines=wrong)
    with pytest.raises(ImageError, match="no such file"):
        draw_matches("missing.png", image, some_matches([], []))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e9, -1e6, 3e38])
def test_keypoints_that_are_not_in_the_image_are_refused(value):
    image = np.zeros((80, 90), np.float32)
    near, far = [[5, 5], [9, 9]], [[5, 5], [value, 9]]
    for sides, name in (((far, near), "visible"), ((near, far), "ir")):
        with pytest.raises(
            KGLMatchError, match=f"the {name} keypoint .* far outside the image of 90 x 80"
        ) as e:
            draw_matches(image, image, some_matches(*sides))
        assert "\n" not in str(e.value)
    # What is a little outside is drawn as far as it can be seen.
    assert draw_matches(image, image, some_matches([[-50, 5]], [[500, 9]])).dtype == np.uint8


def test_a_homography_that_is_no_number_has_no_outline():
    image = np.full((80, 90), 0.5, np.float32)
    plain = draw_matches(image, image, some_matches([], [], []))
    for value in (np.nan, np.inf, 1e300):
        homography = np.diag([value, 1, 1])
        picture = draw_matches(image, image, some_matches([], [], [], homography))
        assert np.array_equal(picture[:400], plain[:400])


# --- the checkerboard -----------------------------------------------------------------------------


def squares(size, cells):
    """Which pixels of a (H, W) board are from the ir image."""
    side = max(size) / cells
    row, column = (np.floor((np.arange(n) + 0.5) / side).astype(int) for n in size)
    return (row[:, None] + column) % 2 == 1


def test_checkerboard_brings_the_ir_image_onto_the_visible_one():
    scene = texture(1200, 900)
    vis = scene[:800, :1000]
    homography = np.array([[1, 0, -30], [0, 1, -20], [0, 0, 1.0]])  # ir starts at (30, 20) of vis
    board = draw_checkerboard(vis, scene[20:, 30:], homography, cells=10)
    assert board.shape[1] == 1000 and board.shape[0] > 800 and board.dtype == np.uint8
    grey = board[:800, :, 0] / 255  # the tint leaves red as it is
    assert np.abs(grey - vis).max() < 0.02
    tinted = board[:800, :, 2] < board[:800, :, 0] * 0.8
    covered = np.zeros((800, 1000), bool)
    covered[20:, 30:] = True
    bright = vis > 0.1
    assert (tinted == (squares((800, 1000), 10) & covered))[bright].all()


def test_what_ir_does_not_cover_shows_the_visible_image():
    vis = texture(1000, 700)
    far = np.array([[1, 0, 5000], [0, 1, 0], [0, 0, 1.0]])
    board = draw_checkerboard(vis, vis, far)[:700]
    assert (board == np.rint(vis * 255).astype(np.uint8)[..., None]).all()


def test_checkerboard_scales_small_and_large_images():
    for width, expected in ((100, 1000), (1500, 1500), (3000, 2000)):
        image = np.clip(cv2.resize(texture(100, 50), (width, width // 2)), 0, 1)
        board = draw_checkerboard(image, image, np.eye(3))
        scale = expected / width
        assert board.shape[1] == expected
        inner = cv2.resize(board[: round(width // 2 * scale), :, 0], (width, width // 2)) / 255
        assert np.abs(inner - image).mean() < 0.05


def test_beyond_the_horizon_there_is_no_ir_image():
    vis, ir = np.zeros((500, 1000), np.float32), np.ones((500, 1000), np.float32)
    # The horizon is at x = 800; right of it the same pixels of ir would be seen, from behind.
    homography = np.array([[1, 0, 0], [0, 1, 0], [-1 / 800, 0, 1.0]])
    board = draw_checkerboard(vis, ir, homography)[:500]
    assert board[:, :400].any() and not board[:, 801:].any()


@pytest.mark.parametrize(
    "homography",
    [np.eye(2), np.full((3, 3), np.nan), None, np.full((3, 3), "a"), np.zeros((99, 99))],
    ids=["2 x 2", "NaN", "None", "text", "large"],
)
def test_checkerboard_refuses_other_transforms(homography):
    image = np.zeros((80, 80), np.float32)
    with pytest.raises(KGLMatchError, match="homography must be"):
        draw_checkerboard(image, image, homography)
    with pytest.raises(KGLMatchError, match="homography must be") as caught:
        draw_overlay(image, image, homography)
    assert len(str(caught.value)) < 200
    for wrong in (0, 2.5, True, "3", float("nan")):
        with pytest.raises(KGLMatchError, match="cells"):
            draw_checkerboard(image, image, np.eye(3), cells=wrong)


def test_transforms_that_shrink_or_enlarge_without_bound_show_no_ir_image():
    vis = texture(100, 80)
    plain = draw_checkerboard(vis, vis, np.diag([1.0, 1, 1]) + np.array([[0, 0, 1e6], [0, 0, 0], [0, 0, 0]]))
    for factor in (1e9, 1e300):
        assert np.array_equal(
            draw_checkerboard(vis, vis, np.diag([factor, factor, 1]))[20:-20], plain[20:-20]
        )
    for homography in (np.zeros((3, 3)), np.ones((3, 3)), np.diag([1e-9, 1e-9, 1])):
        assert draw_checkerboard(vis, vis, homography).dtype == np.uint8
