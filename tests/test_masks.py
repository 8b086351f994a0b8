"""Registration of images of which some pixels hold no data."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from kglmatch.geometry import transform_points
from kglmatch.images import load_image
from kglmatch.registration.align import (
    align,
    best_start,
    coarse_fit,
    displacement_field,
    make_level,
    mean_vote,
)
from kglmatch.registration.limits import Limits
from kglmatch.registration.local import correct
from kglmatch.registration.masks import Masks, clear_of_edges, fill
from kglmatch.registration.verdict import register

SHIFT = np.array([6.0, -4.0])


@pytest.fixture(scope="module")
def holed():
    """A visible and an ir image, the latter shifted, each with a wedge of other pixels; and their masks."""
    vis, ir = (load_image(f"examples/data/sentinel2_{band}.tif")[:320, :320] for band in ("red", "nir"))
    ir = np.roll(ir, (int(SHIFT[1]), int(SHIFT[0])), axis=(0, 1))
    y, x = np.mgrid[:320, :320]
    masks = Masks(x + y > 200, (x - y < 160) & (y < 316) & (x > 5))
    # What is not data is structured, and equal in both: it would register without a displacement.
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((320, 320), np.float32), (0, 0), 2)
    noise = (noise - noise.min()) / np.ptp(noise)
    return np.where(masks.vis, vis, noise), np.where(masks.ir, ir, noise), masks


def test_fill_takes_the_nearest_pixel_with_data():
    image = np.array([[1.0, 0, 0, 2.0]] * 3, np.float32)
    valid = np.array([[True, False, False, True]] * 3)
    np.testing.assert_array_equal(fill(image, valid)[1], [1, 1, 2, 2])
    assert fill(image, np.zeros((3, 4), bool)) is image  # nothing to take


def test_clear_of_edges_keeps_away_from_what_has_no_data():
    valid = np.ones((80, 80), bool)
    valid[:, 40:] = False
    clear = clear_of_edges(valid, (40, 40))
    assert clear[20, 15] == 1 and not clear[:, 16:].any() and not clear[:3].any()


def test_pixels_without_data_are_not_compared(holed):
    vis, ir, masks = holed
    best = align(vis, ir, Limits("translation", 16, 0, 1), masks)[0]
    np.testing.assert_allclose(best.transform[:2, 2], SHIFT, atol=0.6)
    x, y = np.rint(best.points_vis).astype(int).T
    moved_x, moved_y = np.rint(best.points_vis + SHIFT).astype(int).T
    assert masks.vis[y, x].mean() > 0.95 and masks.ir[moved_y, moved_x].mean() > 0.95


def test_what_is_behind_the_mask_does_not_matter(holed):
    vis, ir, masks = holed
    other_vis, other_ir = np.where(masks.vis, vis, 0), np.where(masks.ir, ir, 1)
    start = np.eye(3)
    a = make_level(fill(vis, masks.vis), fill(ir, masks.ir), start, 256, radius=8, across=9, masks=masks)
    b = make_level(
        fill(other_vis, masks.vis), fill(other_ir, masks.ir), start, 256, radius=8, across=9, masks=masks
    )
    assert a is not None and b is not None
    np.testing.assert_array_equal(a.surfaces, b.surfaces)


def test_field_and_verdict_take_masks(holed, thin_matcher):
    vis, ir, masks = holed
    field = displacement_field(vis, ir, 12, masks)
    assert field is not None
    np.testing.assert_allclose(np.median(field.displacement[field.judged], axis=0), SHIFT, atol=0.6)
    found = register(thin_matcher, vis, ir, Limits("translation", 16, 0, 1), masks=masks)
    assert found.vis_size == (320, 320)


def shifted(x, y):
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


@pytest.fixture(scope="module")
def bait():
    """A pair of which the right part holds no data, but one strong pattern at the same place in both: it
    speaks for no displacement."""
    vis, ir = (load_image(f"examples/data/sentinel2_{band}.tif")[:320, :320] for band in ("red", "nir"))
    ir = np.roll(ir, (int(SHIFT[1]), int(SHIFT[0])), axis=(0, 1))
    blocks = np.random.default_rng(1).random((64, 64), np.float32).repeat(5, 0).repeat(5, 1)
    valid = np.broadcast_to(np.arange(320) < 120, (320, 320))
    return np.where(valid, vis, blocks), np.where(valid, ir, blocks), Masks(valid, valid)


def test_the_vote_on_a_transform_takes_masks(bait):
    vis, ir, masks = bait
    none, true = np.eye(3), shifted(*SHIFT)
    assert mean_vote(vis, ir, true, masks) > mean_vote(vis, ir, none, masks) + 0.1
    # What is not data speaks for no displacement.
    assert mean_vote(vis, ir, none) > mean_vote(vis, ir, none, masks) + 0.1
    far = shifted(-9, 11)
    assert best_start(vis, ir, [far, none, true], masks) is true
    assert best_start(vis, ir, [far, none, true]) is none


def test_coarse_structure_takes_masks(bait):
    vis, ir, masks = bait
    middle = np.array([60.0, 160.0])
    off = [
        np.linalg.norm(transform_points(found[0], middle[None])[0] - middle - SHIFT)
        for found in (coarse_fit(vis, ir, np.eye(3), masks), coarse_fit(vis, ir, np.eye(3)))
    ]
    assert off[0] < 1 < off[1]


def test_verify_does_not_see_pixels_without_data(bait, matcher):
    vis, ir, masks = bait
    pair = np.ma.MaskedArray(vis, mask=~masks.vis), np.where(masks.ir, ir, np.float32(np.nan))
    assert matcher.verify(*pair, shifted(*SHIFT)).verdict == "registered"
    assert matcher.verify(*pair, np.eye(3)).verdict == "failed"
    assert matcher.verify(vis, ir, shifted(*SHIFT)).verdict == "failed"


def test_a_local_correction_takes_masks(bait):
    vis, ir, masks = bait
    found = correct(fill(vis, masks.vis), fill(ir, masks.ir), shifted(*SHIFT), masks)
    assert len(found.points) > 12 and found.points[:, 0].max() < 120
    assert found.field is None  # the transform is exact
    seen = correct(vis, ir, shifted(*SHIFT))
    assert seen.points[:, 0].max() > 250 and seen.field is not None  # led astray


def test_nothing_with_data_is_nothing_found(holed, thin_matcher):
    vis, ir, masks = holed
    none = Masks(np.zeros_like(masks.vis), masks.ir)
    found = register(thin_matcher, vis, ir, Limits("translation", 16, 0, 1), masks=none)
    assert found.verdict == "failed" and found.transform is None


def test_masked_and_nan_pixels_of_images_do_not_count(holed, thin_matcher):
    """`Matcher.register` and `Matcher.extract` take them from numpy's masked arrays and from NaN."""
    vis, ir, masks = holed
    masked = np.ma.MaskedArray(vis, mask=~masks.vis)
    holes = np.where(masks.ir, ir, np.float32(np.nan))
    limits = {"kind": "translation", "max_displacement": 16, "max_rotation": 0, "max_scale": 1}
    found = thin_matcher.register(masked, holes, **limits)
    images = fill(vis, masks.vis), fill(ir, masks.ir)
    expected = register(thin_matcher, *images, Limits("translation", 16, 0, 1), masks=masks)
    assert found.support == pytest.approx(expected.support, abs=0.02)
    x, y = np.rint(found.keypoints_vis).astype(int).T
    assert masks.vis[y, x].mean() > 0.95
    features = thin_matcher.extract(holes, "ir", max_keypoints=100)
    x, y = np.rint(features.keypoints).astype(int).T
    assert len(features) > 10 and masks.ir[y, x].all()
    both = thin_matcher.extract_pair(masked, holes, max_keypoints=100)
    for one, mask in zip(both, (masks.vis, masks.ir), strict=True):
        x, y = np.rint(one.keypoints).astype(int).T
        assert len(one) > 10 and mask[y, x].all()
    everything = thin_matcher.extract(ir, "ir", max_keypoints=100)
    x, y = np.rint(everything.keypoints).astype(int).T
    assert not masks.ir[y, x].all()
