"""Dense search: each visible keypoint finds its place in the other image, without a detector there."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

from kglmatch import KGLMatchError
from kglmatch.cli import main
from kglmatch.dense import STRIDE
from kglmatch.errors import ImageError

SHIFT = np.array([5.4, -3.7])


def extract_dense(matcher, vis, ir, reach, *, maps=True):
    """The ir side of `extract_pair`, given visible features."""
    return matcher.extract_pair(vis, ir, dense=True, max_displacement=reach, maps=maps)[1]


@pytest.fixture(scope="module")
def pair():
    vis = texture(176, 144, seed=3)
    matrix = np.array([[1, 0, SHIFT[0]], [0, 1, SHIFT[1]]])
    ir = cv2.warpAffine(
        other_sensor(vis), matrix, (176, 144), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return vis, np.clip(ir, 0, 1)


@pytest.fixture(scope="module")
def vis_features(matcher, pair):
    xy = np.array([[60, 60], [90.5, 70.25], [110, 85], [70, 90]], np.float32)
    return matcher.extract(pair[0], "vis", keypoints=xy)


def test_places_are_found_to_a_fraction_of_the_stride(matcher, pair, vis_features):
    found = extract_dense(matcher, vis_features, pair[1], 8, maps=False)
    error = np.linalg.norm(found.keypoints - vis_features.keypoints - SHIFT, axis=1)
    assert len(found) == 4 and found.modality == "ir" and found.maps is None
    assert error.max() < STRIDE / 2 and np.median(error) < 1


def test_no_place_is_farther_than_asked_for(matcher, pair, vis_features):
    for reach in (4, 5.5):  # less than the true displacement of 6.5 pixels
        found = extract_dense(matcher, vis_features, pair[1], reach, maps=False)
        assert len(found) == 4
        assert (np.linalg.norm(found.keypoints - vis_features.keypoints, axis=1) <= reach).all()


def test_a_keypoint_does_not_depend_on_the_others(matcher, pair, vis_features):
    together = extract_dense(matcher, vis_features, pair[1], 6, maps=False)
    for row in range(4):
        alone = extract_dense(matcher, vis_features[row : row + 1], pair[1], 6, maps=False)
        assert np.abs(alone.keypoints - together.keypoints[row]).max() < 1.5


def test_keypoints_out_of_reach_have_no_place(matcher, pair, vis_features):
    small = np.ascontiguousarray(pair[1][:100, :100])  # whole patches from (32, 32) to (68, 68)
    found = extract_dense(matcher, vis_features, small, 8, maps=False)
    assert len(found) == 1
    assert len(extract_dense(matcher, vis_features[:0], pair[1], 8)) == 0


def test_match_images_takes_every_place(matcher, pair):
    detected = matcher.match_images(*pair, max_displacement=8, max_keypoints=12, min_score=0)
    dense = matcher.match_images(*pair, max_displacement=8, max_keypoints=12, min_score=0, dense=True)
    assert len(dense) > len(detected)
    moved = dense.keypoints_ir - dense.keypoints_vis
    assert np.median(np.linalg.norm(moved - SHIFT, axis=1)) < 1
    assert (np.linalg.norm(moved, axis=1) <= 8).all()


def test_what_cannot_be_searched(matcher, pair, vis_features):
    for reach in (None, 0, 3.9, np.inf):
        with pytest.raises(KGLMatchError, match="max_displacement of at least 4"):
            matcher.match_images(*pair, max_displacement=reach, dense=True)
    with pytest.raises(KGLMatchError, match="needs the ir image"):
        matcher.match_images(pair[0], vis_features, max_displacement=8, dense=True)
    with pytest.raises(KGLMatchError, match="with keypoints"):
        extract_dense(matcher, matcher.describe(np.zeros((1, 64, 64)), "vis"), pair[1], 8)
    with pytest.raises(ImageError, match="smaller than a patch"):
        extract_dense(matcher, vis_features, np.zeros((50, 70), np.float32), 8)


def test_command(image_pair, capsys):
    argv = ["match", *map(str, image_pair), "--device", "cpu", "--max-keypoints", "10", "--dense"]
    assert main(argv) == 2
    assert "max_displacement" in capsys.readouterr().err
    assert main([*argv, "--max-displacement", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["keypoints_ir"] == answer["keypoints_vis"] == 10
