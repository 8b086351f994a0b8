"""Warping images of any type and number of channels: what comes back exactly, and what does not spread."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import texture

from kglmatch.errors import ImageError, KGLMatchError
from kglmatch.geometry import similarity_about
from kglmatch.registration.results import Registration
from kglmatch.resampling import covered_by, warp_around_nodata, warp_image

INTEGERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
FLOATS = [np.float16, np.float32, np.float64]
TYPES = [bool, *INTEGERS, *FLOATS]
INTERPOLATIONS = ["cubic", "linear", "nearest"]


def shift(dx, dy):
    return np.array([[1.0, 0, dx], [0, 1, dy], [0, 0, 1]])


def extremes(dtype, shape=(30, 40), seed=0):
    """Values over the whole range of a type, both ends among them."""
    rng = np.random.default_rng(seed)
    if dtype is bool:
        return rng.random(shape) < 0.5
    if np.dtype(dtype).kind == "f":
        values = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape)
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    values[::3, ::3], values[1::3, 1::3] = limits.min, limits.max
    return values


@pytest.mark.parametrize("interpolation", [None, *INTERPOLATIONS])
@pytest.mark.parametrize("dtype", TYPES)
def test_whole_pixels_come_back_bit_for_bit(dtype, interpolation):
    image = extremes(dtype)
    moved = warp_image(image, np.eye(3), (40, 30), interpolation=interpolation)
    assert moved.dtype == image.dtype and np.array_equal(moved, image)
    moved = warp_image(image, shift(3, -2), (40, 30), interpolation=interpolation, nodata=1)
    assert np.array_equal(moved[2:, :-3], image[:-2, 3:])
    assert (moved[:2] == 1).all() and (moved[:, -3:] == 1).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32])
def test_any_number_of_channels(dtype, channels):
    image = extremes(dtype, (30, 40, channels))
    transform = similarity_about(3, 1.05, (19.5, 14.5), (20.2, 15.1))
    moved = warp_image(image, transform, (38, 31), nodata=1)
    assert moved.shape == (31, 38, channels) and moved.dtype == image.dtype
    for channel in range(channels):
        alone = warp_image(image[..., channel], transform, (38, 31), nodata=1)
        if dtype is np.float32:  # OpenCV sums in another order
            assert np.abs(moved[..., channel] - alone).max() <= 1e-6 * np.abs(image).max()
        else:
            assert np.array_equal(moved[..., channel], alone)


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_constant_stays_what_it_is_and_overshoot_is_clipped(dtype, interpolation):
    limits = np.iinfo(dtype)
    for value in (limits.min, limits.max):
        image = np.full((20, 20), value, dtype)
        moved = warp_image(image, shift(0.37, 0.61), (19, 19), interpolation=interpolation)
        assert (moved == value).all()
    image = np.full((20, 20), limits.min, dtype)
    image[:, 10:] = limits.max
    moved = warp_image(image, shift(0.5, 0), (19, 20), interpolation=interpolation)
    assert (moved[:, :8] == limits.min).all() and (moved[:, 11:] == limits.max).all()
    middle = float(limits.min) / 2 + float(limits.max) / 2
    assert np.abs(moved[:, 9].astype(float) - middle).max() <= 1 + middle * 1e-9


@pytest.mark.parametrize("dtype", [np.uint64, np.int64])
def test_the_last_digit_of_64_bits(dtype):
    base = np.iinfo(dtype).max - 1000
    ramp = (dtype(base) + np.arange(40, dtype=dtype) * dtype(10)) * np.ones((30, 1), dtype)
    for interpolation in ("linear", "cubic"):
        moved = warp_image(ramp, shift(0.5, 0), (39, 30), interpolation=interpolation)
        assert np.array_equal(moved[:, 2:-2], ramp[:, 2:-3] + dtype(5))


def test_large_floats_keep_their_fractions():
    image = 4e6 + texture(40, 30).astype(np.float64)
    moved = warp_image(image, shift(0.5, 0.25), (39, 29)) - 4e6
    assert np.abs(moved - warp_image(image - 4e6, shift(0.5, 0.25), (39, 29))).max() < 1e-8
    largest = np.full((8, 8), np.finfo(np.float32).max, np.float32)
    largest[:, :4] = 0
    for dtype in (np.float32, np.float64):
        assert np.isfinite(warp_image(largest.astype(dtype), shift(0.5, 0), (7, 8))).all()
    half = np.zeros((8, 8), np.float16)
    half[:, 4:] = np.finfo(np.float16).max
    assert warp_image(half, shift(0.5, 0), (7, 8)).max() == np.finfo(np.float16).max


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_types_that_opencv_lacks_are_interpolated_as_those_that_it_knows(dtype, interpolation):
    image = np.rint(texture(60, 50) * 1000).astype(np.float32)
    # Quarters of a pixel, for OpenCV rounds places to 1/32.
    transform = np.array([[1.25, 0.25, 2.5], [-0.25, 1.0, 4.75], [0, 0, 1]])
    expected = warp_image(image, transform, (45, 45), interpolation=interpolation)
    found = warp_image(image.astype(dtype), transform, (45, 45), interpolation=interpolation)
    assert np.abs(found - expected).max() <= (0.51 if dtype is np.int32 else 1e-3)


def test_masks_and_labels_do_not_grow():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    assert warp_image(mask, shift(0.5, 0.5), (40, 40)).sum() == 400
    labels = np.where(mask, 7, 2).astype(np.uint8)
    moved = warp_image(
        labels, similarity_about(10, 1.1, (20, 20), (20, 20)), (40, 40), interpolation="nearest", nodata=2
    )
    assert set(np.unique(moved)) == {2, 7}
    ramp = np.arange(20) * np.ones((20, 1), np.int64)
    moved = warp_image(ramp, shift(0.5, 0), (20, 20), interpolation="nearest", nodata=-1)
    assert (np.diff(moved[:, :-1], axis=1) == 1).all()  # none is skipped, none taken twice


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("interpolation", "reach"), [("nearest", 0), ("linear", 1), ("cubic", 2)])
def test_nan_spreads_as_far_as_the_interpolation_reaches(dtype, interpolation, reach, bad):
    image = np.ones((30, 40), dtype)
    image[15, 20] = bad
    same = warp_image(image, np.eye(3), (40, 30), interpolation=interpolation)
    assert np.array_equal(same, image, equal_nan=True)
    moved = warp_image(image, shift(0.25, 0.25), (39, 29), interpolation=interpolation)
    y, x = np.nonzero(moved != 1)
    assert len(x) == max(2 * reach, 1) ** 2
    assert np.abs(x + 0.25 - 20).max() <= max(reach, 0.5) and np.abs(y + 0.25 - 15).max() <= max(reach, 0.5)


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        (np.uint8, 255, 300),
        (np.uint8, 0.0, 0.5),
        (np.int16, -9999, 40_000),
        (np.uint32, 4294967295, -1),
        (np.uint64, 2**64 - 1, 2**64),
        (np.int32, -(2**31), float("nan")),
        (bool, 1, 2),
        (np.float16, 65504, 1e6),
        (np.float32, float("nan"), 1e39),
    ],
)
def test_nodata_is_what_the_type_holds(dtype, good, bad):
    image = np.ones((10, 10), dtype)
    moved = warp_image(image, shift(4, 0), (10, 10), nodata=good)
    assert np.array_equal(moved[:, -4:], np.full((10, 4), good, dtype), equal_nan=np.dtype(dtype).kind == "f")
    with pytest.raises(KGLMatchError, match=rf"nodata .* is no {np.dtype(dtype)} value; expected") as caught:
        warp_image(image, shift(4, 0), (10, 10), nodata=bad)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_warped():
    image = np.zeros((10, 10))
    with pytest.raises(KGLMatchError, match="cubic, linear, nearest, got 'lanczos'"):
        warp_image(image, np.eye(3), (10, 10), interpolation="lanczos")
    for wrong in (image.astype(complex), np.zeros((10,)), np.zeros((0, 10)), np.zeros((4, 5, 6, 7))):
        with pytest.raises(ImageError, match="cannot warp"):
            warp_image(wrong, np.eye(3), (10, 10))


def test_other_byte_orders():
    image = extremes(np.uint16)
    assert np.array_equal(
        warp_image(image.astype(">u2"), shift(0.5, 0), (40, 30)), warp_image(image, shift(0.5, 0), (40, 30))
    )


def test_a_registration_warps_any_image():
    points = np.empty((0, 2), np.float32)
    found = Registration(
        "registered", 0.9, shift(2, 1), "translation", points, points, points[:, 0], points[:, 0],
        np.empty(0, bool), 1.0, 0.9, 0, (40, 30), (40, 30),
    )  # fmt: skip
    image = extremes(np.uint32, (30, 40, 6))
    moved = found.warp(image, nodata=4294967295)
    assert np.array_equal(moved[:-1, :-2], image[1:, 2:])
    assert (moved[~found.covered()] == 4294967295).all() and found.covered().sum() == 29 * 38
    labels = found.warp(image[..., 0] % 3, interpolation="nearest")
    assert np.array_equal(labels[:-1, :-2], image[1:, 2:, 0] % 3)
    with pytest.raises(KGLMatchError, match="expected a whole number from 0 to 255"):
        found.warp(image.astype(np.uint8), nodata=300)
    with pytest.raises(KGLMatchError, match="the registered one was 40 x 30"):
        found.warp(image[1:])


def test_pixels_without_data_do_not_mix_into_others():
    image = np.full((30, 40), 1000, np.int32)
    image[10:14, 10:14] = -9999
    for nodata in (-9999, np.nan):
        holed = image if nodata == -9999 else np.where(image == -9999, np.nan, image)
        moved = warp_around_nodata(holed, shift(0.5, 0.5), (40, 30), nodata=nodata)
        hole = np.isnan(moved) if np.isnan(nodata) else moved == nodata
        expected = ~covered_by(shift(0.5, 0.5), (40, 30), image != -9999)
        assert np.array_equal(hole, expected) and expected[9:14, 9:14].sum() == 25
        assert (moved[~hole] == 1000).all()


def test_warping_in_tiles_is_warping(monkeypatch):
    image = texture(90, 70)
    transform = similarity_about(8, 1.1, (44.5, 34.5), (46.0, 30.0))
    transform[2, :2] = 1e-4, -2e-4
    whole = warp_image(image, transform, (100, 80), nodata=-1)
    monkeypatch.setattr("kglmatch.resampling._TILE", 32)
    tiles = warp_image(image, transform, (100, 80), nodata=-1)
    assert np.array_equal(whole == -1, tiles == -1) and 0 < (whole == -1).mean() < 0.5
    assert np.abs(whole - tiles).max() < 0.02
    colour = warp_image(np.dstack([image] * 3), transform, (100, 80), nodata=-1)
    assert np.array_equal(colour[..., 1], tiles)


def test_images_wider_than_opencv_warps():
    image = np.zeros((3, 40_000), np.uint8)
    image[1, 39_000:39_005] = 200
    moved = warp_image(image, np.array([[1, 0, 10], [0, 1, 0], [0, 0, 1.0]]), (40_000, 3))
    assert moved.shape == (3, 40_000)
    assert (moved[1, 38_990:38_995] == 200).all() and np.count_nonzero(moved[1]) <= 9
    with pytest.raises(ImageError, match="shrink that image first"):
        warp_image(image, np.diag([100.0, 1, 1]), (400, 3))
