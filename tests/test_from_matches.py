"""Registration from the keypoints that the network matches, where structure alone is not enough."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

from kglmatch.geometry import corner_error, similarity_about
from kglmatch.registration import from_matches
from kglmatch.registration import verdict as judge
from kglmatch.registration.limits import Limits

SIZE = (256, 224)
CENTRE = (127.5, 111.5)


@pytest.fixture(scope="module")
def scene():
    return texture(*SIZE, seed=5)


@pytest.fixture(autouse=True, scope="module")
def extracted_once(matcher):
    """What is extracted from an image is kept: the tests look at one scene again and again."""
    known, extract = {}, matcher.extract

    def remembered(image, modality, **options):
        key = image.tobytes(), modality, tuple(sorted(options.items()))
        if key not in known:
            known[key] = extract(image, modality, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher, "extract", remembered)
        yield


@pytest.fixture(autouse=True)
def few_keypoints(monkeypatch):
    """Enough for small images, and soon done."""
    monkeypatch.setattr(from_matches, "_KEYPOINTS", 100)


def moved(scene, transform, size=SIZE):
    """The scene seen by another sensor, through a transform (3, 3) from its pixels to the sensor's."""
    image = cv2.warpPerspective(scene, transform, size, flags=cv2.INTER_CUBIC, borderValue=0.4)
    return other_sensor(np.clip(image, 0, 1))


def test_matches_agree_on_the_transform(matcher, scene):
    true = similarity_about(5, 1.08, CENTRE, (135.0, 106.0))
    found = from_matches.align_by_matches(matcher, scene, moved(scene, true), Limits())
    assert corner_error(found.transform, true, SIZE) < 2
    assert found.num_matches >= 20
    assert judge.give_verdict(0.0, 0.9, found.num_matches) == "registered"


def test_a_transform_outside_the_limits_is_not_taken(matcher, scene):
    ir = moved(scene, similarity_about(5, 1.08, CENTRE, (135.0, 106.0)))
    assert from_matches.align_by_matches(matcher, scene, ir, Limits(max_rotation=2)) is None
    assert from_matches.align_by_matches(matcher, scene, ir, Limits(max_displacement=4)) is None


def test_two_resolutions(matcher, scene):
    true = similarity_about(3, 0.6, CENTRE, (76.0, 68.0))
    found = from_matches.align_by_matches(matcher, scene, moved(scene, true, (154, 134)), Limits())
    assert corner_error(found.transform, true, SIZE) < 2


def test_nothing_where_the_scenes_differ(matcher, scene):
    assert (
        from_matches.align_by_matches(matcher, scene, other_sensor(texture(*SIZE, seed=6)), Limits()) is None
    )


@pytest.mark.parametrize("ir", [np.full((224, 256), 0.5, np.float32), texture(60, 80)], ids=["blank", "tiny"])
def test_nothing_where_there_is_nothing_to_match(matcher, scene, ir):
    assert from_matches.align_by_matches(matcher, scene, ir, Limits()) is None


def test_matches_decide_where_structure_fails(matcher, scene, monkeypatch):
    true = similarity_about(0, 1, CENTRE, (120.0, 117.0))
    ir = moved(scene, true)
    monkeypatch.setattr(judge, "align", lambda vis, ir, limits, masks: [])
    monkeypatch.setattr(from_matches, "refine", lambda *images, **options: None)  # no windows that fit
    found = matcher.register(scene, ir, kind="translation")
    assert found.verdict == "registered" and found.confidence > 0.5
    assert found.kind == "translation" and found.support == 0
    assert found.num_matches >= 20 and found.inliers.sum() >= 20
    assert corner_error(found.transform, true, SIZE) < 0.5
    assert found.to_dict()["num_matches"] == found.num_matches


def test_structure_may_not_lead_away_from_the_matches(matcher, scene, monkeypatch):
    true = similarity_about(4, 1.0, CENTRE, CENTRE)
    refine = from_matches.refine

    def astray(vis, ir, start, **options):
        return refine(vis, ir, start @ similarity_about(0, 1, (0, 0), (40, 0)), **options)

    monkeypatch.setattr(from_matches, "refine", astray)
    monkeypatch.setattr(from_matches, "LEAST_SUPPORT", -1)
    found = from_matches.align_by_matches(matcher, scene, moved(scene, true), Limits())
    assert corner_error(found.transform, true, SIZE) < 3


def test_the_third_witness_stands_in_for_structure_but_not_for_the_network():
    assert judge.give_verdict(0.0, 0.9, 9) == "failed"
    assert judge.give_verdict(0.0, 0.9, 10) == "doubtful"
    assert judge.give_verdict(0.0, 0.9, 16) == "registered"
    assert judge.give_verdict(0.0, 0.55, 40) == "failed"
    assert judge.give_verdict(1.0, 0.95, 0) == judge.give_verdict(1.0, 0.95, 11) == "registered"
    assert judge.confidence(0.0, 0.9, 15) < 0.5 <= judge.confidence(0.0, 0.9, 16)
