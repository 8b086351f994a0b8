"""Patches: exact cuts, interpolation, borders; and the check that every patch array passes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from kglmatch.errors import PatchError
from kglmatch.patches import check_patches, extract_patches, patches_inside


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((150, 200), dtype=np.float32)


def one_line_error(call, *parts):
    with pytest.raises(PatchError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# Cutting


def test_whole_pixels_are_exact_slices(image):
    for size in (1, 2, 7, 8, 64):
        half = size // 2
        positions = [(half, half), (100, 70), (200 - size + half, 150 - size + half)]
        for kind in (int, float):
            patches = extract_patches(image, np.array(positions, kind), patch_size=size)
            assert patches.dtype == np.float32 and patches.shape == (3, size, size)
            for patch, (x, y) in zip(patches, positions, strict=True):
                assert np.array_equal(patch, image[y - half : y - half + size, x - half : x - half + size])


def test_no_one_and_many(image):
    for empty in ([], np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2), int)):
        for options in ({}, {"scale": 2.0}, {"angle": []}):
            patches = extract_patches(image, empty, **options)
            assert patches.shape == (0, 64, 64) and patches.dtype == np.float32
    assert extract_patches(image, [[3, 4]]).shape == (1, 64, 64)


@pytest.mark.parametrize(
    ("border", "mode"), [("replicate", cv2.BORDER_REPLICATE), ("reflect", cv2.BORDER_REFLECT_101)]
)
def test_border(image, border, mode):
    padded = cv2.copyMakeBorder(image, 100, 100, 100, 100, mode)
    positions = np.array(
        [(0, 0), (199, 149), (0, 149), (5, 70), (100, 148), (-20, 30), (250, 200), (100, 70)]
    )
    patches = extract_patches(image, positions, border=border)
    for patch, (x, y) in zip(patches, positions + 100, strict=True):
        assert np.array_equal(patch, padded[y - 32 : y + 32, x - 32 : x + 32])
    between = extract_patches(image, positions + np.array([0.25, 0.75]), border=border)
    expected = extract_patches(padded, positions + np.array([100.25, 100.75]))
    np.testing.assert_allclose(between, expected, atol=1e-6)


def test_far_outside_and_images_smaller_than_a_patch():
    image = np.float32([[0.1, 0.2], [0.3, 0.4]])
    for border in ("replicate", "reflect"):
        for positions in ([[1000000, -1000000]], [[0, 0]], [[0.5, 0.5]]):
            patches = extract_patches(image, positions, border=border)
            assert patches.shape == (1, 64, 64) and np.isfinite(patches).all()
    assert (extract_patches(image, [[1000000, -1000000]]) == np.float32(0.2)).all()
    assert (extract_patches(np.float32([[0.7]]), [[3, 4]], border="reflect") == np.float32(0.7)).all()


def test_between_pixels_a_ramp_is_exact():
    y, x = np.mgrid[:150, :200]
    ramp = ((2 * x + 3 * y) / 1000).astype(np.float32)
    rng = np.random.default_rng(1)
    for _ in range(20):
        px, py = rng.uniform(40, 100, 2)
        scale, angle = rng.uniform(0.5, 1.2), rng.uniform(-400, 400)
        i, j = np.mgrid[:32, :32] - 16
        np.testing.assert_allclose(
            extract_patches(ramp, [[px, py]], patch_size=32)[0],
            (2 * (px + j) + 3 * (py + i)) / 1000,
            atol=1e-5,
        )
        cos, sin = scale * np.cos(np.deg2rad(angle)), scale * np.sin(np.deg2rad(angle))
        expected = (2 * (px + cos * j - sin * i) + 3 * (py + sin * j + cos * i)) / 1000
        patch = extract_patches(ramp, [[px, py]], patch_size=32, scale=scale, angle=angle)[0]
        np.testing.assert_allclose(patch, expected, atol=1e-5)


def test_quarter_turns_move_pixels_only(image):
    centre = np.array([[90, 80]])
    straight = extract_patches(image, centre, patch_size=33)[0]
    for quarter in range(-4, 5):
        turned = extract_patches(image, centre, patch_size=33, angle=90.0 * quarter)[0]
        np.testing.assert_allclose(turned, np.rot90(straight, quarter), atol=1e-5)


def test_orientation_becomes_the_x_axis():
    # Bright ahead of the keypoint, in direction 30 degrees from x towards y.
    y, x = np.mgrid[:100, :100] - 50
    ahead = (np.cos(np.deg2rad(30)) * x + np.sin(np.deg2rad(30)) * y > 0).astype(np.float32)
    patch = extract_patches(ahead, [[50, 50]], patch_size=32, angle=30)[0]
    assert patch[:, 20:].mean() > 0.99 and patch[:, :12].mean() < 0.01


def test_large_scales_do_not_alias():
    y, x = np.mgrid[:512, :512]
    checkers = ((x + y) % 2).astype(np.float32)
    for scale in (2.0, 3.0, 4.0, 5.7):
        patch = extract_patches(checkers, [[256, 256]], scale=scale)[0]
        assert patch.std() < 0.05 and abs(patch.mean() - 0.5) < 0.02


def test_large_scales_keep_positions():
    y, x = np.mgrid[:600, :600]
    for scale in (1.5, 2.0, 4.0, 6.0):
        image = np.exp(-((x - 310) ** 2 + (y - 290) ** 2) / (2 * (3 * scale) ** 2)).astype(np.float32)
        patch = extract_patches(image, [[310, 290]], scale=scale)[0]
        i, j = np.mgrid[:64, :64]
        weights = patch / patch.sum()
        assert abs((weights * j).sum() - 32) < 0.05 and abs((weights * i).sum() - 32) < 0.05


def test_a_patch_does_not_depend_on_the_others(image):
    rng = np.random.default_rng(2)
    xy = rng.uniform(-10, 210, (300, 2))
    xy[::3] = np.rint(xy[::3])
    scale, angle = rng.uniform(0.5, 5, 300), rng.uniform(0, 360, 300)
    scale[::2], angle[::2] = 1, 0
    for options in ({}, {"scale": scale, "angle": angle}, {"subpixel": False}):
        together = extract_patches(image, xy, **options)
        for row in range(0, 300, 7):
            alone = {k: v[row : row + 1] if isinstance(v, np.ndarray) else v for k, v in options.items()}
            assert np.array_equal(extract_patches(image, xy[row : row + 1], **alone)[0], together[row])


def test_neutral_scale_and_angle_change_nothing(image):
    xy = np.random.default_rng(3).uniform(0, 199, (50, 2))
    plain = extract_patches(image, xy)
    assert np.array_equal(extract_patches(image, xy, scale=1, angle=0), plain)
    np.testing.assert_allclose(extract_patches(image, xy, angle=360), plain, atol=1e-4)
    np.testing.assert_allclose(extract_patches(image, xy, scale=1 + 1e-9), plain, atol=1e-4)


def test_rounding():
    image = np.arange(100, dtype=np.float32).reshape(10, 10) / 100
    for x, expected in ((3.0, 3), (3.49, 3), (3.5, 4), (4.5, 5), (2.51, 3)):
        patch = extract_patches(image, [[x, 2.0]], patch_size=1, subpixel=False)
        assert patch[0, 0, 0] == image[2, expected]


def test_8_bit_images():
    image = np.random.default_rng(4).integers(0, 256, (100, 100), dtype=np.uint8)
    whole = np.array([[50, 50], [0, 3]])
    eight = extract_patches(image, whole)
    assert eight.dtype == np.uint8
    assert np.array_equal(extract_patches(image, whole + 0.2, subpixel=False), eight)
    for patches in (extract_patches(image, whole.astype(float)), extract_patches(image, whole, scale=1.0)):
        assert patches.dtype == np.float32
        assert np.array_equal(patches, eight.astype(np.float32) / np.float32(255))
    assert extract_patches(image, np.zeros((0, 2), int)).dtype == np.uint8


def test_memory_layouts_and_float_types(image):
    xy = [[50, 60], [70.5, 80.25]]
    expected = extract_patches(image, xy)
    for other in (np.asfortranarray(image), image.astype(np.float64), np.repeat(image, 2, 1)[:, ::2]):
        assert np.array_equal(extract_patches(other, xy), expected)
    assert extract_patches(image.astype(np.float16), xy).dtype == np.float32


def test_image_is_left_alone_and_shares_no_memory(image):
    copy = image.copy()
    extract_patches(image, [[50, 60]])[:] = 7
    extract_patches(image, [[50.5, 60]], scale=3)[:] = 7
    assert np.array_equal(image, copy)


def test_patches_inside(image):
    rng = np.random.default_rng(5)
    xy = np.concatenate([rng.uniform(-5, 205, (500, 2)), rng.integers(-5, 205, (500, 2))])
    height, width = image.shape
    inside = patches_inside(xy, (width, height), patch_size=8)
    # Where all is inside, what surrounds the image cannot matter.
    framed = cv2.copyMakeBorder(image, 50, 50, 50, 50, cv2.BORDER_CONSTANT, value=9.0)
    untouched = extract_patches(framed, xy + 50, patch_size=8).max(axis=(1, 2)) <= 1
    assert np.array_equal(inside, untouched)
    corners = [[32, 32], [31, 32], [168, 118], [169, 118]]
    assert patches_inside(corners, (width, height)).tolist() == [True, False] * 2
    assert patches_inside([], (width, height)).shape == (0,)


def test_the_size_of_patches_inside_is_that_of_features():
    from kglmatch import Features

    points = np.array([[150, 40], [40, 150]], np.float32)
    features = Features(np.ones((2, 4), np.float32), "vis", keypoints=points, image_size=(200, 100))
    assert patches_inside(features.keypoints, features.image_size).tolist() == [True, False]
    for wrong in (None, 5, "ab", (1, 2, 3), (0, 5), (200.0, 100), (np.nan, 3)):
        one_line_error(lambda size=wrong: patches_inside(points, size), "(width, height)")


def test_bad_arguments_of_extract(image):
    good = [[50, 60]]
    cases = [
        (lambda: extract_patches(image[:, :, None], good), "(150, 200, 1)"),
        (lambda: extract_patches(image.tolist(), good), "list"),
        (lambda: extract_patches((image * 9).astype(np.uint16), good), "uint16"),
        (lambda: extract_patches(image[:0], good), "(0, 200)"),
        (lambda: extract_patches(image, [[1, 2, 3]]), "(1, 3)"),
        (lambda: extract_patches(image, [1, 2]), "(2,)"),
        (lambda: extract_patches(image, np.zeros((0, 2, 2))), "(0, 2, 2)"),
        (lambda: extract_patches(image, np.zeros((0, 6))), "(0, 6)"),
        (lambda: extract_patches(image, np.zeros((5, 0))), "(5, 0)"),
        (lambda: extract_patches(image, np.zeros((2, 6))), "(2, 6)"),
        (lambda: extract_patches(image, good, patch_size=True), "patch_size"),
        (lambda: extract_patches(image, [["a", "b"]]), "xy"),
        (lambda: extract_patches(image, [[1, 2], [3]]), "xy"),
        (lambda: extract_patches(image, [[1, 2], [np.nan, 3]]), "row 1"),
        (lambda: extract_patches(image, [[1e30, 3]]), "row 0"),
        (lambda: extract_patches(image, good, patch_size=0), "patch_size"),
        (lambda: extract_patches(image, good, patch_size=6.5), "patch_size"),
        (lambda: extract_patches(image, good, border="drop"), "replicate, reflect"),
        (lambda: extract_patches(image, good, scale=0), "scale"),
        (lambda: extract_patches(image, good, scale=[1, 2]), "scale"),
        (lambda: extract_patches(image, good, scale=np.inf), "scale"),
        (lambda: extract_patches(image, good, angle=np.nan), "angle"),
        (lambda: extract_patches(image, good, angle="x"), "angle"),
    ]
    for call, part in cases:
        one_line_error(call, part)


# The check


def arrays_of(array):
    """The same values as numpy array and, if there is torch, as tensor."""
    yield array
    try:
        import torch
    except ImportError:
        return
    yield torch.from_numpy(array)


def test_good_patches_pass_unchanged():
    rng = np.random.default_rng(6)
    for count in (0, 1, 5):
        for dtype in ("uint8", "float16", "float32", "float64"):
            values = (rng.random((count, 64, 64)) * (255 if dtype == "uint8" else 1)).astype(dtype)
            for patches in arrays_of(values):
                assert check_patches(patches) is patches
            for patches in arrays_of(values[:, None]):
                checked = check_patches(patches)
                assert type(checked) is type(patches) and checked.dtype == patches.dtype
                assert checked.shape == (count, 64, 64) and np.array_equal(np.asarray(checked), values)
    assert check_patches(np.ones((2, 32, 32), np.float32), patch_size=32).shape == (2, 32, 32)


def test_rounding_errors_are_forgiven_and_byte_order_is_native():
    assert check_patches(np.full((1, 64, 64), 1 + 5e-7)).max() > 1
    foreign = np.full((1, 64, 64), 0.5, ">f4")
    assert check_patches(foreign).dtype.isnative and (check_patches(foreign) == 0.5).all()


def test_tensors_that_need_gradients_pass():
    torch = pytest.importorskip("torch")
    patches = torch.rand(2, 64, 64, requires_grad=True)
    assert check_patches(patches) is patches


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((64, 64), "patches[None]"),
        ((2, 3, 64, 64), "grey"),
        ((2, 64, 64, 3), "grey"),
        ((2, 64, 64, 1), "channels come first"),
        ((2, 32, 32), "(N, 64, 64)"),
        ((2, 64, 63), "(2, 64, 63)"),
        ((0,), "(0,)"),
        ((), "()"),
        ((1, 1, 1, 64, 64), "(1, 1, 1, 64, 64)"),
        ((0, 32, 32), "(0, 32, 32)"),
    ],
)
def test_wrong_shapes(shape, part):
    for patches in arrays_of(np.zeros(shape, np.float32)):
        one_line_error(lambda p=patches: check_patches(p, name="vis patches"), "vis patches", part)


@pytest.mark.parametrize(
    ("dtype", "part"),
    [
        ("int64", "uint8"),
        ("bool", "float32"),
        ("complex64", "complex64"),
        ("uint16", "load_image"),
        ("int16", "load_image"),
    ],
)
def test_wrong_types(dtype, part):
    for count in (0, 2):
        for patches in arrays_of(np.zeros((count, 64, 64), dtype)):
            one_line_error(lambda p=patches: check_patches(p), dtype, part)


def test_objects_lists_and_bfloat16():
    one_line_error(lambda: check_patches(np.zeros((1, 64, 64), object)), "object")
    one_line_error(lambda: check_patches([np.zeros((64, 64))]), "list", "np.stack")
    one_line_error(lambda: check_patches(None), "NoneType")
    torch = pytest.importorskip("torch")
    one_line_error(lambda: check_patches(torch.zeros(1, 64, 64).bfloat16()), "bfloat16", ".float()")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (np.nan, "NaN"),
        (np.inf, "infinite"),
        (-np.inf, "infinite"),
        (1.01, "255"),
        (255.0, "divide 8-bit values by 255"),
        (-0.5, "standardising"),
    ],
)
def test_wrong_values(value, part):
    for dtype in ("float16", "float32", "float64"):
        values = np.zeros((3, 64, 64), dtype)
        values[1, 5, 6] = value
        for patches in arrays_of(values):
            one_line_error(lambda p=patches: check_patches(p, name="ir patches"), "ir patches", part)
