"""Keypoints: where they lie, how they are ordered, and what limits them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from kglmatch.errors import ImageError, KeypointError, KGLMatchError
from kglmatch.keypoints import DETECTORS, detect_keypoints, gradient_directions


@pytest.fixture(scope="module")
def textured():
    noise = np.random.default_rng(0).random((200, 300), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 2)
    return (noise - noise.min()) / (noise.max() - noise.min())


def check(found, image, most):
    count = len(found)
    assert count <= most
    assert found.xy.shape == (count, 2)
    for array in (found.scale, found.angle, found.response):
        assert array.shape == (count,)
    for array in (found.xy, found.scale, found.angle, found.response):
        assert array.dtype == np.float32 and array.flags.c_contiguous and np.isfinite(array).all()
    height, width = image.shape
    assert (found.xy >= 0).all() and (found.xy <= (width - 1, height - 1)).all()
    assert len(np.unique(found.xy, axis=0)) == count
    order = np.lexsort((found.xy[:, 0], found.xy[:, 1], -found.response))
    assert np.array_equal(order, np.arange(count))
    assert (found.scale >= 0).all() and (
        (found.angle == -1) | ((found.angle >= 0) & (found.angle <= 360))
    ).all()


@pytest.mark.parametrize("detector", DETECTORS)
class TestEveryDetector:
    def test_invariants(self, textured, detector):
        for most in (1, 7, 100, 100000):
            check(detect_keypoints(textured, detector=detector, max_keypoints=most), textured, most)
        assert len(detect_keypoints(textured, detector=detector, max_keypoints=100)) > 50

    def test_same_in_every_run(self, textured, detector):
        first = detect_keypoints(textured, detector=detector, max_keypoints=150)
        for _ in range(2):
            again = detect_keypoints(textured, detector=detector, max_keypoints=150)
            for name in ("xy", "scale", "angle", "response"):
                assert np.array_equal(getattr(first, name), getattr(again, name))

    def test_border(self, textured, detector):
        for border in (5, 32.5, 99):
            xy = detect_keypoints(textured, detector=detector, border=border, max_keypoints=5000).xy
            assert (xy >= border).all() and (xy <= (299 - border, 199 - border)).all()
        assert len(detect_keypoints(textured, detector=detector, border=32)) > 0
        assert len(detect_keypoints(textured, detector=detector, border=150)) == 0

    def test_mask(self, textured, detector):
        mask = np.zeros(textured.shape, bool)
        mask[40:160, 100:200] = True
        for dtype in (bool, np.uint8, np.float32):
            found = detect_keypoints(textured, detector=detector, mask=mask.astype(dtype))
            x, y = np.rint(found.xy).astype(int).T
            assert len(found) > 0 and mask[y, x].all()
        assert len(detect_keypoints(textured, detector=detector, mask=np.zeros_like(mask))) == 0

    def test_empty_image_gives_typed_empty_arrays(self, detector):
        for shape in ((80, 90), (1, 1), (1, 50), (50, 1), (2, 2), (5, 5)):
            found = detect_keypoints(np.full(shape, 0.5, np.float32), detector=detector)
            check(found, np.empty(shape), 2048)
            assert detector == "grid" or len(found) == 0

    def test_small_images(self, detector):
        rng = np.random.default_rng(0)
        for side in (1, 2, 3, 5, 8, 16, 33, 62, 63, 70):
            image = rng.random((side, side + 1), dtype=np.float32)
            check(detect_keypoints(image, detector=detector), image, 2048)

    def test_weak_contrast(self, textured, detector):
        weak = 0.4 + 0.05 * textured
        strong = detect_keypoints(textured, detector=detector, max_keypoints=200)
        found = detect_keypoints(weak, detector=detector, max_keypoints=200)
        assert len(found) > 0.9 * len(strong)

    def test_types(self, textured, detector):
        eight = np.rint(textured * 255).astype(np.uint8)
        a = detect_keypoints(eight, detector=detector, max_keypoints=50)
        for image in (
            eight / np.float32(255),
            eight / np.float64(255),
            np.asfortranarray(eight),
            eight[::-1][::-1],
        ):
            b = detect_keypoints(image, detector=detector, max_keypoints=50)
            assert np.array_equal(a.xy, b.xy)

    def test_strongest_are_kept(self, textured, detector):
        if detector in ("grid", "orb", "gftt"):
            pytest.skip("spreads its keypoints by other rules")
        few = detect_keypoints(textured, detector=detector, max_keypoints=20)
        many = detect_keypoints(textured, detector=detector, max_keypoints=60)
        assert np.array_equal(few.xy, many.xy[:20])


def test_positions_are_pixel_centres():
    y, x = np.mgrid[:120, :120]
    rng = np.random.default_rng(0)
    offsets = []
    for _ in range(10):
        centre = rng.uniform(50, 70, 2)
        image = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 18).astype(np.float32)
        offsets.append(detect_keypoints(image, max_keypoints=1).xy[0] - centre)
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.05


def test_corner_detectors_find_the_corner():
    image = np.zeros((100, 100), np.float32)
    image[40:60, 30:70] = 1
    # OpenCV's FAST drops corners whose neighbours are as strong, as on a step without any blur.
    image = cv2.GaussianBlur(image, (0, 0), 1)
    corners = np.array([[30, 40], [69, 40], [30, 59], [69, 59]])
    for detector in ("fast", "gftt", "structure"):
        xy = detect_keypoints(image, detector=detector, max_keypoints=4).xy
        distances = np.abs(corners[:, None] - xy[None]).max(axis=2).min(axis=1)
        assert distances.max() <= 2, detector


def test_what_detectors_know_of_scale_and_angle(textured):
    for detector in DETECTORS:
        found = detect_keypoints(textured, detector=detector)
        if detector in ("sift", "orb"):
            assert (found.scale > 0).all() and (found.angle >= 0).all()
        else:
            assert (found.scale == 0).all() and (found.angle == -1).all()


def test_fast_lowers_its_threshold():
    image = np.full((100, 100), 0.2, np.float32)
    image[20:30, 20:30] = 1
    image[60:70, 60:70] = 0.23
    image = cv2.GaussianBlur(image, (0, 0), 1)
    xy = detect_keypoints(image, detector="fast").xy
    assert (xy > 50).all(axis=1).any() and (xy < 50).all(axis=1).any()


def test_gradient_directions_are_axes():
    y, x = np.mgrid[:90, :120].astype(np.float32)
    for degrees in (-80, -45, 0, 30, 75):
        along = np.cos(np.deg2rad(degrees)) * x + np.sin(np.deg2rad(degrees)) * y
        waves = 0.5 + 0.5 * np.sin(along / 4)
        for image in (waves, 1 - waves):
            found = gradient_directions(image, np.array([[60, 45], [40.4, 50.6], [500, -3]]))
            assert found.shape == (3,) and np.abs(found[:2] - degrees).max() < 3
    assert gradient_directions(waves, np.zeros((0, 2))).shape == (0,)


def test_structure_finds_weak_corners_beside_strong_ones():
    """Half the contrast in one half of the image."""
    rng = np.random.default_rng(0)
    half = cv2.GaussianBlur(rng.random((200, 150), dtype=np.float32), (0, 0), 3)
    half = (half - half.min()) / np.ptp(half)
    image = np.hstack([half, 0.25 + 0.5 * half])

    def halves(detector):
        xy = detect_keypoints(image, detector=detector, max_keypoints=100).xy
        xy = xy[(xy[:, 0] < 130) | (xy[:, 0] > 170)]
        left, right = xy[xy[:, 0] < 150], xy[xy[:, 0] >= 150] - [150, 0]
        return left, right

    left, right = halves("gftt")
    assert len(right) == 0
    left, right = halves("structure")
    assert len(right) > 0.3 * len(left)
    nearest = np.linalg.norm(right[:, None] - left[None], axis=2).min(axis=1)
    assert (nearest <= 1).mean() > 0.7


def test_structure_lies_between_pixels():
    """A corner that moves by a quarter pixel at a time."""
    y, x = np.mgrid[:100, :100].astype(np.float32)
    found = []
    for shift in (0, 0.25, 0.5, 0.75):
        edges = [1 / (1 + np.exp(-(v - 50 - shift) / 0.7)) for v in (x, y)]
        found.append(detect_keypoints(edges[0] * edges[1], detector="structure", max_keypoints=1).xy[0])
    moved = np.array(found) - found[0]
    assert (np.diff(moved, axis=0) > 0.1).all()
    assert np.abs(moved - np.array([[0], [0.25], [0.5], [0.75]])).max() < 0.3


def test_structure_keeps_its_distance(textured):
    xy = detect_keypoints(textured, detector="structure").xy
    apart = np.abs(xy[:, None] - xy[None]).max(axis=2) + 99 * np.eye(len(xy))
    assert len(xy) > 50 and apart.min() >= 4  # 5 between pixels, less two fractions


def test_grid_is_regular_centred_and_as_dense_as_allowed():
    for shape in ((100, 100), (37, 211), (5, 400), (64, 64), (1, 1), (1, 9)):
        image = np.zeros(shape, np.float32)
        for most in (1, 2, 10, 100, 1000, 100000):
            found = detect_keypoints(image, detector="grid", max_keypoints=most)
            check(found, image, most)
            assert 1 <= len(found) <= most
            if most >= image.size:
                assert len(found) == image.size
            for axis in (0, 1):
                values = np.unique(found.xy[:, axis])
                assert len(np.unique(np.diff(values))) <= 1
                left, right = values[0], shape[1 - axis] - 1 - values[-1]
                assert abs(left - right) <= 1
    assert len(detect_keypoints(np.zeros((500, 700)), detector="grid", max_keypoints=1000)) > 800


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"detector": "surf"}, "sift, fast, orb, gftt, structure, grid"),
        ({"detector": None}, "sift, fast, orb, gftt, structure, grid"),
        ({"max_keypoints": 0}, "max_keypoints"),
        ({"max_keypoints": 2.5}, "max_keypoints"),
        ({"border": -1}, "border"),
        ({"border": float("nan")}, "border"),
        ({"mask": np.ones((3, 3))}, "(3, 3)"),
    ],
)
def test_bad_options(textured, options, part):
    with pytest.raises(KeypointError) as caught:
        detect_keypoints(textured, **options)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, KGLMatchError)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5, 3), np.float32),
        np.zeros((5, 5), np.uint16),
        np.zeros((5, 5), bool),
        np.zeros((0, 5), np.float32),
        np.full((5, 5), 255.0),
        np.full((5, 5), np.nan),
        [[0.0]],
    ],
)
def test_bad_images(image):
    with pytest.raises(ImageError) as caught:
        detect_keypoints(image)
    assert "\n" not in str(caught.value)
