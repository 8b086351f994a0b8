"""The search behind `register`: structure maps, correlation, fitting, and what is made of it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

from kglmatch.errors import KGLMatchError
from kglmatch.geometry import (
    corner_error,
    resize_matrix,
    similarity_about,
    small_transform,
    transform_jacobian,
    transform_points,
)
from kglmatch.options import TRANSFORMS
from kglmatch.registration import align as registration
from kglmatch.registration import coarse, structure, surfaces
from kglmatch.registration import verdict as judge
from kglmatch.registration.limits import Limits, nominal_scales
from kglmatch.registration.results import Registration


def shifted(image, dx, dy):
    """The image with its content moved by (dx, dy) pixels."""
    size = image.shape[::-1]
    return cv2.warpAffine(image, np.float32([[1, 0, dx], [0, 1, dy]]), size, flags=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def scene():
    return texture(320, 256, seed=3)


def test_structure_does_not_see_contrast_sign_or_gain(scene):
    maps = structure.structure_maps(scene)
    assert maps.shape == (2, 256, 320)
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
    best = registration.align(scene, ir, Limits(max_rotation=9, max_scale=1.1))[0]
    assert corner_error(best.transform, true, (width, height)) < 1.0
    assert best.support > 0.5
    assert np.median(best.residuals[best.votes > 0.5]) < 0.7


def test_align_bridges_two_resolutions(scene):
    small = cv2.resize(other_sensor(scene), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    best = registration.align(scene, small, Limits(max_rotation=3, max_scale=1.05))[0]
    assert corner_error(best.transform, resize_matrix(0.5, 0.5), (320, 256)) < 1.0


@pytest.mark.parametrize("size", [(40, 32), (64, 50)], ids=["an eighth", "a fifth"])
def test_coarse_search_bridges_resolutions_far_apart(scene, size):
    small = other_sensor(cv2.resize(scene, size, interpolation=cv2.INTER_AREA))
    true = resize_matrix(size[0] / 320, size[1] / 256)
    best = next(coarse.search(scene, small, Limits(max_rotation=6, max_scale=1.1))).transform
    error = corner_error(best, true, (320, 256))
    assert error < 0.02 * size[0]


def test_a_clear_place_ends_the_search(scene, monkeypatch):
    climbed = []
    climb = coarse._climb
    monkeypatch.setattr(coarse, "_climb", lambda *args: climbed.append(args) or climb(*args))
    limits = Limits(max_rotation=9, max_scale=1.1)
    assert registration.align(scene, other_sensor(scene), limits)[0].support > 0.5
    assert len(climbed) == 1
    registration.align(scene, texture(320, 256, seed=77), limits)
    assert len(climbed) == 4


def test_a_place_that_rivals_the_clear_one_is_looked_at_too(scene):
    both_ways = (scene + scene[::-1, ::-1]) / 2
    limits = Limits(max_rotation=180, max_scale=1)
    assert next(coarse.search(both_ways, other_sensor(both_ways), limits)).has_rival
    assert not next(coarse.search(scene, other_sensor(scene), limits)).has_rival
    found = registration.align(both_ways, other_sensor(both_ways), limits)
    turns = sorted(float(np.degrees(np.arccos(f.transform[0, 0].clip(-1, 1)))) for f in found)
    assert turns == pytest.approx([0, 180], abs=2)


def test_a_long_strip_aligns():
    strip = texture(1600, 80, seed=4)
    moved = other_sensor(shifted(strip, 9, -3))
    best = registration.align(strip, moved, Limits(kind="translation"))[0]
    assert corner_error(best.transform, similarity_about(0, 1, (0, 0), (9, -3)), (1600, 80)) < 0.3


def test_structure_that_is_not_shared_is_not_supported(scene):
    found = registration.align(scene, texture(320, 256, seed=77), Limits(max_rotation=6, max_scale=1.06))
    assert all(alignment.support < 0.2 for alignment in found)


def test_images_without_structure_align_with_nothing():
    flat = np.full((200, 200), 0.5, np.float32)
    assert all(a.support < 0.1 for a in registration.align(flat, flat, Limits(max_rotation=0, max_scale=1)))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"kind": "elastic"}, "kind must be one of auto, translation, .* got 'elastic'"),
        ({"max_displacement": -1.0}, "max_displacement must be 0 pixels or more"),
        ({"max_rotation": 200.0}, r"max_rotation must be in \[0, 180\] degrees"),
        ({"max_scale": 0.5}, r"max_scale must be in \[1, 4\]"),
        ({"max_rotation": float("nan")}, "max_rotation"),
    ],
)
def test_limits_are_checked(limits, message):
    with pytest.raises(KGLMatchError, match=message):
        Limits(**limits)


def test_images_have_one_scale_or_two():
    image = np.zeros((200, 300), np.float32)
    assert nominal_scales(image, image) == nominal_scales(image, image[:195, :290]) == [1.0]
    assert nominal_scales(image, image[:100, :150]) == [1.0, 0.5]
    assert nominal_scales(image[:100, :150], image) == [1.0, 2.0]


def test_field_shows_where_an_image_is_locally_displaced(scene):
    ir = other_sensor(scene)
    ir[:, 200:] = shifted(ir, 3, 0)[:, 200:]
    field = registration.displacement_field(scene, ir, max_displacement=8)
    x, judged = field.points[:, 0], field.judged
    assert np.abs(np.median(field.displacement[judged & (x < 150)], axis=0)).max() < 0.5
    assert abs(np.median(field.displacement[judged & (x > 250), 0]) - 3) < 0.5


def test_mean_vote_tells_the_right_transform_from_others(scene):
    true = similarity_about(2, 1.02, (160, 128), (163, 125))
    ir = cv2.warpPerspective(other_sensor(scene), true, (320, 256), flags=cv2.INTER_CUBIC)
    right = registration.mean_vote(scene, ir, true)
    near = registration.mean_vote(scene, ir, similarity_about(0, 1, (0, 0), (3, 0)) @ true)
    far = registration.mean_vote(scene, ir, similarity_about(0, 1, (0, 0), (30, 20)) @ true)
    assert 1 < right <= 3 and far < 0.1 < near < right / 2
    assert registration.mean_vote(scene, ir, similarity_about(0, 1, (0, 0), (300, 0))) is None


NOWHERE = np.empty((0, 2), np.float32)


def through(a, b, kind="affine"):
    """Two registrations in a row, of confidences a and b; the second is shifted by 5 pixels."""
    points = np.array([[10, 20], [30, 40]], np.float32)
    first = registration_of("registered", a, similarity_about(0, 1, (0, 0), (2, 1)), points, kind)
    second = registration_of("registered", b, similarity_about(0, 1, (0, 0), (5, 0)), points, "similarity")
    return judge._through(first, second)


def registration_of(verdict, confidence, transform, points=NOWHERE, kind="similarity"):
    values = np.zeros(len(points), np.float32)
    return Registration(
        verdict, confidence, transform, kind if transform is not None else None, points, points, values,
        values, np.ones(len(points), bool), 1.0, 0.9, 0, (320, 256), (320, 256),
    )  # fmt: skip


def test_a_composed_registration_is_as_certain_as_both():
    found = through(0.9, 0.8)
    assert (found.verdict, found.kind) == ("registered", "affine") and found.confidence == pytest.approx(0.72)
    assert np.array_equal(found.transform[:2, 2], (7, 1))
    assert np.array_equal(found.keypoints_vis, [[8, 19], [28, 39]])
    weak = through(0.6, 0.55)
    assert weak.verdict == "doubtful" and weak.confidence == pytest.approx(0.33)
    with pytest.raises(KGLMatchError, match="cannot be composed"):
        judge._through(weak, registration_of("failed", 0.1, None))


@pytest.mark.parametrize(
    ("own", "first", "second", "direct", "expected"),
    [
        # Both certain: their product is enough.
        (("failed", 0.1), 0.9, 0.8, None, ("registered", 0.72, "anchor")),
        # Both only just registered: not to be called so, unless the two images themselves say it.
        (("failed", 0.1), 0.6, 0.55, None, ("doubtful", 0.33, "anchor")),
        (("failed", 0.1), 0.6, 0.55, 0.7, ("registered", 0.7, "anchor")),
        (("failed", 0.1), 0.6, 0.55, 0.2, ("doubtful", 0.33, "anchor")),
        # A direct registration that is more certain stays.
        (("doubtful", 0.4), 0.6, 0.55, None, ("doubtful", 0.4, None)),
        (("registered", 0.5), 0.9, 0.9, None, ("registered", 0.5, None)),
        # The second step fails.
        (("failed", 0.1), 0.9, None, None, ("failed", 0.1, None)),
    ],
)
def test_verdict_and_confidence_agree_through_another_band(monkeypatch, own, first, second, direct, expected):
    reference, anchor, band = (np.full((256, 320), value, np.float32) for value in (0, 1, 2))
    step = np.eye(3)

    def register(matcher, vis, ir, limits):
        if vis[0, 0] == 0 and ir[0, 0] == 1:
            return registration_of("registered", first, step)
        if vis[0, 0] == 0:
            return registration_of(*own, None if own[0] == "failed" else step)
        return registration_of(*(("failed", 0.1, None) if second is None else ("registered", second, step)))

    def refine(vis, ir, start, **options):
        none = np.empty((0, 2))
        return None if direct is None else judge.Alignment(start, "affine", none, none, none, none, 1.0)

    def look(matcher, vis, ir, alignment):
        assert (vis[0, 0], ir[0, 0]) == (0, 2)
        return registration_of("registered" if direct >= 0.5 else "doubtful", direct, alignment.transform)

    monkeypatch.setattr(judge, "register", register)
    monkeypatch.setattr(judge, "refine", refine)
    monkeypatch.setattr(judge, "judge", look)
    results = judge.register_stack(None, reference, [anchor, band], Limits(), names=["anchor", "band"])
    assert [r.name for r in results] == ["anchor", "band"] and results[0].via is None
    found = results[1].registration
    assert (found.verdict, pytest.approx(found.confidence), results[1].via) == expected


def test_a_band_is_registered_through_another(matcher, monkeypatch):
    """The third image shares nothing with the first, and the second something with each."""
    monkeypatch.setattr("kglmatch.registration.from_matches._KEYPOINTS", 30)
    monkeypatch.setattr(judge, "_PLACES", 16)
    first, third = texture(256, 200, seed=1), texture(256, 200, seed=2)
    anchor = np.clip(np.where(np.arange(256) < 128, first, third), 0, 1).astype(np.float32)
    band = other_sensor(shifted(third, 4, -3))
    results = matcher.register_stack(
        first, [band, anchor], names=["band", "anchor"], kind="translation", max_displacement=20
    )
    assert [(r.name, r.via) for r in results] == [("band", "anchor"), ("anchor", None)]
    found = results[0].registration
    assert found.verdict == ("registered" if found.confidence >= 0.5 else "doubtful")
    assert np.abs(found.transform[:2, 2] - (4, -3)).max() < 0.7


def test_agreement_is_one_for_the_right_places_and_half_by_chance():
    rng = np.random.default_rng(0)
    distances, sure = rng.uniform(0.5, 1.5, (60, 60)), np.ones(60, np.float32)
    assert abs(judge.agreement(distances, sure) - 0.5) < 0.1
    np.fill_diagonal(distances, 0.1)
    assert judge.agreement(distances, sure) == 1.0
    assert judge.agreement(distances[:1, :1], sure[:1]) == judge.agreement(distances[:0, :0], sure[:0]) == 0.5
    assert judge.agreement(distances[:6, :6], sure[:6]) == 0.75  # half of what 24 places would say


def test_agreement_is_limited_where_no_place_matches():
    distances = np.where(np.eye(30) > 0, 0.1, 1.0)
    limits = [judge.agreement(distances, np.full(30, p, np.float32)) for p in (0.0, 0.25, 0.5, 1.0)]
    assert limits == pytest.approx([0.62, 0.81, 1.0, 1.0])
    # Then structure has to bring more than unrelated images ever gave it by chance, which was 0.28.
    assert judge.give_verdict(0.28, limits[0]) == "doubtful"
    assert judge.give_verdict(0.4, limits[0]) == "registered"
    # Chance is not raised by it.
    assert judge.agreement(np.ones((30, 30)), np.zeros(30, np.float32)) <= 0.5


def test_a_small_overlap_that_agrees_by_chance_is_not_registered(matcher):
    # Two unrelated scenes; the best of all transforms leaves seven places, where agreement is 0.9.
    vis, ir = texture(208, 192, seed=0), other_sensor(texture(208, 192, seed=1))
    vis, ir = (np.rint(image * 255).astype(np.uint8) for image in (vis, ir))
    assert matcher.register(vis, ir).verdict == "failed"


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


@pytest.mark.parametrize("kind", ["translation", "similarity"])
def test_the_kind_that_was_asked_for_comes_out(scene, kind):
    """Whatever the images are related by; here, by shear and turn as well."""
    true = np.array([[1.005, 0.015, 4], [-0.005, 0.995, -3], [0, 0, 1]])
    moved = cv2.warpPerspective(scene, true, (scene.shape[1], scene.shape[0]))
    noise = np.random.default_rng(0).normal(0, 0.02, scene.shape).astype(np.float32)
    found = registration.align(scene, other_sensor(moved) + noise, Limits(kind=kind))[0]
    (a, b), (c, d) = found.transform[:2, :2]
    assert found.kind == kind
    assert (a, b) == (pytest.approx(d, abs=1e-4), pytest.approx(-c, abs=1e-4))
    if kind == "translation":
        assert (a, b) == (pytest.approx(1), pytest.approx(0))


@pytest.mark.parametrize("kind", ["translation", "similarity"])
def test_no_start_is_more_general_than_the_kind(kind):
    """Peaks of windows that a shear has moved."""
    x, y = np.meshgrid(np.arange(40, 300, 40), np.arange(40, 260, 40))
    centres = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)
    shear = np.array([[1, 0.03, -2], [0, 1.01, 1]])
    at = centres @ shear[:, :2].T + shear[:, 2] - centres
    found = surfaces.starting_points(
        surfaces.standardise(np.stack([bump(place) for place in at])), centres, kind, tolerance=1.5
    )
    assert len(found) == (2 if kind == "translation" else 3)
    for transform in found:
        (a, b), (c, d) = transform[:2, :2]
        assert (a, b) == (pytest.approx(d), pytest.approx(-c))
        assert kind == "similarity" or (a, b) == (1, 0)
    assert len(surfaces.starting_points(np.stack([bump(p) for p in at]) * 8, centres, "affine", 1.5)) == 4


def test_limits_of_no_turn_and_one_scale_are_kept_by_the_search(scene):
    turned = cv2.warpAffine(scene, np.array([[1.02, 0.02, 3.0], [-0.02, 1.02, 2.0]]), scene.shape[::-1])
    for start in coarse.search(scene, other_sensor(turned), Limits(max_rotation=0, max_scale=1)):
        np.testing.assert_allclose(start.transform[:2, :2], np.eye(2), atol=1e-9)
