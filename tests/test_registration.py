"""The search behind `register`: structure maps, correlation, fitting, and what is made of it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

from kglmatch.errors import KGLMatchError
from kglmatch.geometry import (
    TRANSFORMS,
    corner_error,
    resize_matrix,
    similarity_about,
    small_transform,
    transform_jacobian,
    transform_points,
)
from kglmatch.registration import align as registration
from kglmatch.registration import structure, surfaces
from kglmatch.registration import verdict as judge


def shifted(image, dx, dy):
    """The image with its content moved by (dx, dy) pixels."""
    size = image.shape[::-1]
    return cv2.warpAffine(image, np.float32([[1, 0, dx], [0, 1, dy]]), size, flags=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def scene():
    return texture(320, 256, seed=3)


def test_structure_does_not_see_contrast_sign_or_gain(scene):
    maps = structure.structure_maps(scene)
    assert maps.shape == (structure.CHANNELS, 256, 320)
    for same in (1 - scene, 0.2 + 0.1 * scene):
        assert np.abs(structure.structure_maps(same) - maps).max() < 2e-2


def test_structure_of_nothing_is_nothing():
    assert np.abs(structure.structure_maps(np.full((40, 50), 0.3, np.float32))).max() < 1e-2


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-5, 5)])
def test_windows_correlate_best_where_the_content_went(scene, shift):
    a, b = (structure.structure_maps(x) for x in (scene, other_sensor(shifted(scene, *shift))))
    centres = np.array([[100, 100], [160, 128], [200, 90]])
    found = structure.correlate_windows(a, b, centres, size=64, radius=6)
    assert found.shape == (3, 13, 13)
    assert found.max() <= 1.0
    for surface in found:
        y, x = np.unravel_index(surface.argmax(), surface.shape)
        assert (x - 6, y - 6) == shift


def test_global_correlation_finds_the_shift_and_obeys_its_limit(scene):
    a = structure.structure_maps(scene)
    b = structure.structure_maps(shifted(scene, 31, -17))
    correlator = structure.GlobalCorrelator(a)
    mask = np.ones(scene.shape, np.float32)
    _, dx, dy = correlator.best_shift(b, mask, min_overlap=0.3, max_shift=None)
    assert (dx, dy) == (31, -17)
    _, dx, dy = correlator.best_shift(b, mask, min_overlap=0.3, max_shift=5)
    assert max(abs(dx), abs(dy)) <= 5
    evidence, _, _ = correlator.best_shift(b * 0, mask * 0, min_overlap=0.3, max_shift=None)
    assert evidence == -np.inf


def bump(at, side=21, sigma=2.0):
    """A surface with one peak at a displacement from its middle."""
    y, x = np.indices((side, side)) - side // 2
    return np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * sigma**2)).astype(np.float32)


def test_peaks_are_found_between_pixels():
    at = np.array([[1.3, -2.4], [0.0, 4.5], [-6.2, 3.1]])
    found, _ = surfaces.peaks(surfaces.standardise(np.stack([bump(a) for a in at])))
    assert np.abs(found - at).max() < 0.1


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_climb_finds_the_transform_that_made_the_surfaces(kind):
    rng = np.random.default_rng(0)
    centres = (
        np.stack(np.meshgrid(np.arange(40, 400, 40), np.arange(40, 300, 40)), 2).reshape(-1, 2).astype(float)
    )
    step = np.array([2.0, -1.5, 0.006, -0.004, 0.003, 0.005, 4e-6, -3e-6])
    step = step[: {"translation": 2, "similarity": 4, "affine": 6, "homography": 8}[kind]]
    true = small_transform(kind, step)
    at = transform_points(true, centres) - centres
    at[::4] = rng.uniform(-8, 8, at[::4].shape)  # a quarter of the windows are wrong
    made = surfaces.standardise(np.stack([bump(a) for a in at]))
    levels = [surfaces.smooth(made, sigma) for sigma in (2.0, 0.5)]
    found = surfaces.maximise_votes(levels, centres, kind, np.eye(3))
    assert corner_error(found, true, (440, 320)) < 0.5


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_jacobian_is_the_derivative(kind):
    points = np.random.default_rng(1).uniform(-1, 1, (7, 2))
    jacobian = transform_jacobian(kind, points)
    for i in range(jacobian.shape[2]):
        step = np.zeros(jacobian.shape[2])
        step[i] = 1e-6
        moved = transform_points(small_transform(kind, step), points) - points
        assert np.abs(moved / 1e-6 - jacobian[:, :, i]).max() < 1e-4


def test_resizing_keeps_pixel_centres():
    # The centre of a 2 x 2 block of pixels is the centre of one pixel at half the size.
    assert np.allclose(
        transform_points(resize_matrix(0.5, 0.5), np.array([[0.5, 0.5], [2.5, 4.5]])), [[0, 0], [1, 2]]
    )


@pytest.mark.parametrize(
    ("rotation", "scale", "shift"), [(0, 1, (0, 0)), (6, 1.08, (12, -9)), (-9, 0.93, (-20, 14))]
)
def test_align_recovers_a_similarity(scene, rotation, scale, shift):
    height, width = scene.shape
    centre = ((width - 1) / 2, (height - 1) / 2)
    true = similarity_about(rotation, scale, centre, (centre[0] + shift[0], centre[1] + shift[1]))
    ir = cv2.warpPerspective(other_sensor(scene), true, (width, height), flags=cv2.INTER_CUBIC)
    best = registration.align(scene, ir, max_rotation=12, max_scale=1.12)[0]
    assert corner_error(best.transform, true, (width, height)) < 1.0
    assert best.support > 0.5
    assert np.median(best.residuals[best.votes > 0.5]) < 0.7


def test_align_bridges_two_resolutions(scene):
    small = cv2.resize(other_sensor(scene), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    best = registration.align(scene, small, max_rotation=3, max_scale=1.05)[0]
    assert corner_error(best.transform, resize_matrix(0.5, 0.5), (320, 256)) < 1.0


@pytest.mark.parametrize("size", [(40, 32), (64, 50)], ids=["an eighth", "a fifth"])
def test_coarse_search_bridges_resolutions_far_apart(scene, size):
    small = other_sensor(cv2.resize(scene, size, interpolation=cv2.INTER_AREA))
    true = resize_matrix(size[0] / 320, size[1] / 256)
    best = registration._coarse(scene, small, None, 6.0, 1.1)[0]
    error = corner_error(best, true, (320, 256))
    assert error < 0.02 * size[0]


def test_a_long_strip_aligns():
    strip = texture(1600, 80, seed=4)
    moved = other_sensor(shifted(strip, 9, -3))
    best = registration.align(strip, moved, kind="translation")[0]
    assert corner_error(best.transform, similarity_about(0, 1, (0, 0), (9, -3)), (1600, 80)) < 0.3


def test_structure_that_is_not_shared_is_not_supported(scene):
    found = registration.align(scene, texture(320, 256, seed=77), max_rotation=6, max_scale=1.06)
    assert all(alignment.support < 0.2 for alignment in found)


def test_images_without_structure_align_with_nothing():
    flat = np.full((200, 200), 0.5, np.float32)
    assert all(a.support < 0.1 for a in registration.align(flat, flat, max_rotation=0, max_scale=1))


@pytest.mark.parametrize(
    "limits",
    [
        {"kind": "elastic"},
        {"max_displacement": -1.0},
        {"max_rotation": 200.0},
        {"max_scale": 0.5},
        {"max_rotation": float("nan")},
    ],
)
def test_limits_are_checked(limits):
    values = {"kind": "auto", "max_displacement": None, "max_rotation": 5.0, "max_scale": 1.1, **limits}
    with pytest.raises(KGLMatchError):
        registration.check_limits(**values)


def test_field_shows_where_an_image_is_locally_displaced(scene):
    ir = other_sensor(scene)
    ir[:, 200:] = shifted(ir, 3, 0)[:, 200:]
    field = registration.displacement_field(scene, ir, max_displacement=8)
    x, judged = field.points[:, 0], field.judged
    assert np.abs(np.median(field.displacement[judged & (x < 150)], axis=0)).max() < 0.5
    assert abs(np.median(field.displacement[judged & (x > 250), 0]) - 3) < 0.5


def test_agreement_is_one_for_the_right_places_and_half_by_chance():
    rng = np.random.default_rng(0)
    distances = rng.uniform(0.5, 1.5, (60, 60))
    assert abs(judge.agreement(distances) - 0.5) < 0.1
    np.fill_diagonal(distances, 0.1)
    assert judge.agreement(distances) == 1.0
    assert judge.agreement(distances[:1, :1]) == judge.agreement(distances[:0, :0]) == 0.5


def test_both_witnesses_are_needed():
    assert judge.give_verdict(1.0, 0.95) == "registered"
    assert judge.give_verdict(1.0, 0.5) == judge.give_verdict(0.05, 0.95) == "failed"
    assert judge.confidence(1.0, 0.95) > 0.9
    assert judge.confidence(0.1, 0.95) < 0.5
    assert judge.confidence(3.0, 0.6) < 0.5


def test_a_strong_witness_helps_a_weaker_one():
    assert judge.give_verdict(0.17, 0.95) == judge.give_verdict(0.35, 0.7) == "registered"
    assert judge.give_verdict(0.17, 0.7) == "failed"
    assert judge.give_verdict(0.2, 0.75) == "doubtful"


@pytest.mark.parametrize("support", [0.0, 0.119, 0.12, 0.2, 0.3, 1.5])
@pytest.mark.parametrize("agreed", [0.3, 0.619, 0.62, 0.8, 1.0])
def test_confidence_and_verdict_agree(support, agreed):
    registered = judge.give_verdict(support, agreed) == "registered"
    assert registered == (judge.confidence(support, agreed) >= 0.5)
