"""`Matcher`, end to end on the bundled weights."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import other_sensor, texture

from kglmatch import Features, Matcher
from kglmatch.errors import (
    BackendError,
    ImageError,
    KeypointError,
    KGLMatchError,
    PatchError,
    WeightsError,
)
from kglmatch.patches import extract_patches


@pytest.fixture(scope="module")
def patches():
    """Ten matching pairs of patches, (10, 64, 64) float32 each."""
    vis = texture(400, 170, seed=5)
    xy = np.array([[40 + 70 * (i % 5), 45 + 75 * (i // 5)] for i in range(10)], np.float32)
    return extract_patches(vis, xy), extract_patches(other_sensor(vis), xy)


@pytest.fixture(scope="module")
def features(matcher, patches):
    return matcher.describe(patches[0], "vis"), matcher.describe(patches[1], "ir")


def test_describe_gives_unit_descriptors_and_maps(features):
    vis, _ = features
    assert vis.descriptors.shape == (10, 128)
    assert vis.descriptors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vis.descriptors, axis=1), 1, atol=1e-5)
    assert tuple(vis.maps.shape) == (10, 256, 8, 8)


def test_the_two_modalities_are_not_the_same_network(matcher, patches):
    vis = matcher.describe(patches[0][:2], "vis", maps=False)
    ir = matcher.describe(patches[0][:2], "ir", maps=False)
    assert vis.maps is None
    assert np.abs(vis.descriptors - ir.descriptors).max() > 1e-2


def test_shape_and_type_of_patches_do_not_matter(matcher, patches):
    eight_bit = np.rint(patches[0][:3] * 255).astype(np.uint8)
    expected = matcher.describe(eight_bit, "vis", maps=False).descriptors
    for same in (eight_bit[:, None], eight_bit / 255.0, (eight_bit / 255).astype(np.float32)):
        assert np.abs(matcher.describe(same, "vis", maps=False).descriptors - expected).max() < 1e-5
    as_torch = matcher.describe(torch.from_numpy(eight_bit), "vis", maps=False).descriptors
    assert isinstance(as_torch, torch.Tensor)
    assert np.abs(as_torch.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("n", [0, 1])
def test_few_patches(matcher, patches, n):
    vis, ir = matcher.describe(patches[0][:n], "vis"), matcher.describe(patches[1][:n], "ir")
    assert vis.descriptors.shape == (n, 128)
    assert tuple(vis.maps.shape) == (n, 256, 8, 8)
    assert matcher.score(vis, ir).shape == (n,)
    matches = matcher.match(vis, ir, min_score=0)
    assert matches.indices.shape == (n, 2)
    assert matches.indices.dtype == np.int64
    assert matches.scores.dtype == matches.distances.dtype == np.float32


def test_a_result_does_not_depend_on_its_batch(matcher, patches, features):
    alone = matcher.describe(patches[0][7:8], "vis")
    assert np.abs(alone.descriptors[0] - features[0].descriptors[7]).max() < 1e-5
    score = matcher.score(*features)
    assert abs(matcher.score(features[0][7:8], features[1][7:8])[0] - score[7]) < 1e-5


def test_score_of_features_equals_score_of_patches(matcher, patches, features):
    score = matcher.score(*features)
    assert score.dtype == np.float32
    assert ((score >= 0) & (score <= 1)).all()
    assert np.abs(matcher.score(*patches) - score).max() < 1e-5
    as_torch = matcher.score(*(torch.from_numpy(p) for p in patches))
    assert isinstance(as_torch, torch.Tensor)
    assert np.abs(as_torch.numpy() - score).max() < 1e-5


@pytest.mark.parametrize("decide", ["metric", "descriptor"])
@pytest.mark.parametrize("top_k", [3, None])
def test_match_finds_the_pairs(matcher, features, decide, top_k):
    shuffled = np.random.default_rng(0).permutation(10)
    matches = matcher.match(features[0], features[1][shuffled], decide=decide, top_k=top_k, min_score=0)
    right = shuffled[matches.indices[:, 1]] == matches.indices[:, 0]
    assert right.sum() >= 8
    assert (np.diff(matches.scores) <= 0).all()
    assert len(set(matches.indices[:, 1])) == len(matches)
    expected = np.linalg.norm(
        features[0].descriptors[matches.indices[:, 0]]
        - features[1].descriptors[shuffled[matches.indices[:, 1]]],
        axis=1,
    )
    assert np.abs(matches.distances - expected).max() < 1e-3


def test_scoring_every_pair_in_chunks_equals_at_once(matcher, features, monkeypatch):
    whole = matcher.match(*features, top_k=None, min_score=0)
    monkeypatch.setattr("kglmatch.patch_matcher.CHUNK", 256 * 30)  # three rows at a time
    parts = matcher.match(*features, top_k=None, min_score=0)
    assert np.array_equal(whole.indices, parts.indices)


def test_a_shortlist_as_long_as_the_set_equals_every_pair(matcher, features):
    every, listed = (matcher.match(*features, top_k=k, min_score=0) for k in (None, 10))
    assert np.array_equal(every.indices, listed.indices)


def test_max_displacement_is_exact(matcher, patches):
    rng = np.random.default_rng(1)
    at = rng.uniform(0, 30, (10, 2)).astype(np.float32)
    vis = matcher.describe(patches[0], "vis", keypoints=at)
    ir = matcher.describe(patches[1], "ir", keypoints=at + 2)
    matches = matcher.match(vis, ir, max_displacement=4, min_score=0, mutual=False, one_to_one=False)
    moved = np.linalg.norm(matches.keypoints_vis - matches.keypoints_ir, axis=1)
    assert (moved <= 4).all()
    assert len(matches) == 10  # each has its own partner 2.8 pixels away
    assert len(matcher.match(vis, ir, max_displacement=0, min_score=0)) == 0


def test_one_to_one_and_mutual(matcher, patches, features):
    twice = matcher.describe(np.concatenate([patches[0][:3], patches[0][:3]]), "vis")
    loose = matcher.match(twice, features[1], mutual=False, one_to_one=False, min_score=0)
    assert len(loose) == 6
    for options in ({"mutual": False, "one_to_one": True}, {"mutual": True}):
        strict = matcher.match(twice, features[1], min_score=0, **options)
        assert len(set(strict.indices[:, 1])) == len(strict) <= 3


def test_features_from_a_file_match_the_same(matcher, features, tmp_path):
    features[0].save(tmp_path / "vis.npz")
    again = matcher.match(Features.load(tmp_path / "vis.npz"), features[1], min_score=0)
    assert np.array_equal(again.indices, matcher.match(*features, min_score=0).indices)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_k": "3"},
        {"top_k": float("nan")},
        {"top_k": np.array([3])},
        {"min_score": 1.5},
        {"min_score": float("nan")},
        {"min_score": None},
        {"max_displacement": -1},
        {"max_displacement": float("nan")},
        {"max_displacement": "3"},
        {"decide": "best"},
        {"max_displacement": 3},  # no keypoints
    ],
    ids=str,
)
def test_bad_parameters_of_match(matcher, features, patches, options):
    for sides in (features, patches):
        with pytest.raises(KGLMatchError, match=next(iter(options))) as caught:
            matcher.match(*sides, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("top_k", [np.int64(2), 10**30])
def test_any_whole_number_is_a_top_k(matcher, features, top_k):
    expected = matcher.match(*features, top_k=min(int(top_k), 10), min_score=0)
    assert np.array_equal(matcher.match(*features, top_k=top_k, min_score=0).indices, expected.indices)


@pytest.fixture
def idle_matcher(thin_matcher, monkeypatch):
    """A matcher whose network must not run."""

    def encode(*args, **kwargs):
        pytest.fail("the network ran before the mistake was reported")

    monkeypatch.setattr(thin_matcher.backend, "encode", encode)
    return thin_matcher


@pytest.mark.parametrize("threshold", [-1, 0, float("nan"), float("inf"), "3", None, True])
def test_a_bad_threshold_is_reported_before_the_work(idle_matcher, image_pair, threshold):
    with pytest.raises(KGLMatchError, match="threshold"):
        idle_matcher.match_images(*image_pair, threshold=threshold)


def test_mistakes_are_reported_before_the_network_runs(idle_matcher, image_pair):
    vis, ir = image_pair
    patches = np.zeros((3, 64, 64), np.float32)
    there = Features(np.zeros((3, 128), np.float32), "ir", keypoints=np.zeros((3, 2)), image_size=(99, 99))
    cases = [
        (ImageError, "missing.png", lambda: idle_matcher.match_images(vis, "missing.png")),
        (ImageError, "the ir image is 50 x 70", lambda: idle_matcher.match_images(vis, np.zeros((70, 50)))),
        (KGLMatchError, "order is vis, ir", lambda: idle_matcher.match_images(there, ir)),
        (KGLMatchError, "maps=True", lambda: idle_matcher.match_images(vis, there)),
        (KGLMatchError, "ir features with keypoints", lambda: idle_matcher.match_images(
            vis, dataclasses.replace(there, keypoints=None), decide="descriptor")),
        (KGLMatchError, "not features of it", lambda: idle_matcher.match_images(
            vis, there, dense=True, max_displacement=8, decide="descriptor")),
        (KGLMatchError, "3 visible and 2 ir", lambda: idle_matcher.score(patches, patches[:2])),
        (PatchError, "ir patches", lambda: idle_matcher.score(patches, patches[:, :9])),
        (PatchError, "ir patches", lambda: idle_matcher.match(patches, patches + 7)),
        (KGLMatchError, "maps=True", lambda: idle_matcher.match(patches, there)),
        (KGLMatchError, "order is vis, ir", lambda: idle_matcher.match(there, patches)),
        (KeypointError, "keypoints row 1", lambda: idle_matcher.describe(
            patches[:2], "vis", keypoints=[[0, 0], [np.nan, 1]])),
        (KGLMatchError, "width, height", lambda: idle_matcher.describe(patches, "vis", image_size=(5,))),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_features_of_another_model_are_refused(thin_matcher):
    other = [
        Features(np.zeros((3, 64), np.float32), modality, np.zeros((3, 256, 8, 8), np.float32))
        for modality in ("vis", "ir")
    ]
    with pytest.raises(KGLMatchError, match="length 64, this model makes 128"):
        thin_matcher.match(*other, decide="descriptor")
    coarse = [
        Features(np.zeros((3, 128), np.float32), modality, np.zeros((3, 256, 4, 4), np.float32))
        for modality in ("vis", "ir")
    ]
    with pytest.raises(KGLMatchError, match="maps of shape"):
        thin_matcher.score(*coarse)


def test_what_does_not_belong_together_is_refused(matcher, features, patches):
    vis, ir = features
    with pytest.raises(KGLMatchError, match="order is vis, ir"):
        matcher.match(ir, vis)
    with pytest.raises(KGLMatchError, match="row by row"):
        matcher.score(vis, ir[:3])
    with pytest.raises(KGLMatchError, match="maps=True"):
        matcher.match(dataclasses.replace(vis, maps=None), ir)
    with pytest.raises(KGLMatchError, match="modality"):
        matcher.describe(patches[0], "thermal")
    with pytest.raises(PatchError, match="keypoints"):
        matcher.describe(patches[0], "vis", keypoints=np.zeros((3, 2)))


def test_match_images_of_a_registered_pair(matcher, image_pair):
    matches = matcher.match_images(*image_pair, max_displacement=5, max_keypoints=40)
    assert len(matches) > 10
    moved = np.linalg.norm(matches.keypoints_vis - matches.keypoints_ir, axis=1)
    assert np.median(moved) < 2
    assert (moved <= 5).all()
    assert matches.inliers.shape == (len(matches),)
    assert matches.homography.shape == (3, 3)


def test_match_images_without_structure_is_empty(matcher):
    matches = matcher.match_images(np.full((80, 90), 0.5, np.float32), np.zeros((100, 70), np.uint8))
    assert len(matches) == 0
    assert matches.homography is None
    assert matches.keypoints_vis.shape == (0, 2)
    assert matches.inliers.dtype == bool


def test_extract_at_given_keypoints(matcher, image_pair):
    xy = np.array([[50, 60], [100.5, 80]], np.float32)
    features = matcher.extract(image_pair[0], "vis", keypoints=xy, maps=False)
    assert np.array_equal(features.keypoints, xy)
    assert features.image_size == (192, 160)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("modality", ["vis", "ir"])
def test_extract_at_no_keypoints(thin_matcher, image_pair, modality, upright):
    for nothing in ([], np.zeros(0), np.zeros((0, 2))):
        features = thin_matcher.extract(image_pair[0], modality, keypoints=nothing, upright=upright)
        assert features.keypoints.shape == (0, 2) and features.descriptors.shape == (0, 128)
        assert tuple(features.maps.shape) == (0, thin_matcher.config.map_channels, 8, 8)


@pytest.mark.parametrize("upright", [True, False])
def test_extract_refuses_keypoints_of_other_shapes_and_values(idle_matcher, image_pair, upright):
    for wrong in (
        np.full((2, 6), 60.0), np.zeros((0, 6)), [50, 60], np.zeros((1, 2, 2)), [["50", "60"]], [[1j, 2]],
        [[50, 60], [np.nan, 3]], [[50, 60], [np.inf, 3]], [[50, 60], [1e300, 3]], [[50], [60, 70]],
    ):  # fmt: skip
        with pytest.raises(KeypointError, match="keypoints") as caught:
            idle_matcher.extract(image_pair[0], "vis", keypoints=wrong, upright=upright)
        assert "\n" not in str(caught.value)


def test_turned_patches_match_images_that_are_turned(matcher):
    vis = texture(150, 150, seed=2)
    ir = np.rot90(other_sensor(vis), axes=(1, 0))  # a quarter turn: (x, y) moves to (149 - y, x)
    features = matcher.extract(ir, "ir", max_keypoints=10, maps=False, upright=False)
    half = len(features) // 2
    assert len(features) == 20 and np.array_equal(features.keypoints[:half], features.keypoints[half:])
    options = {"max_keypoints": 20, "decide": "descriptor", "min_score": 0}
    right = {}
    for upright in (True, False):
        matches = matcher.match_images(vis, ir, upright=upright, **options)
        where = np.stack([149 - matches.keypoints_vis[:, 1], matches.keypoints_vis[:, 0]], axis=1)
        right[upright] = (np.linalg.norm(where - matches.keypoints_ir, axis=1) < 3).sum()
    assert right[False] > 5 > right[True]
    with pytest.raises(KGLMatchError, match="upright"):
        matcher.match_images(vis, ir, upright=False, dense=True, max_displacement=8)


def test_an_image_smaller_than_a_patch(matcher):
    with pytest.raises(ImageError, match="50 x 70"):
        matcher.extract(np.zeros((70, 50), np.uint8), "vis")


def test_models_and_devices_that_are_not_there():
    with pytest.raises(WeightsError, match="kglnet-vis-nir"):
        Matcher.from_pretrained("kglnet-vis-uv")
    for device in ("cuda:99", "tpu", "mps"):
        with pytest.raises(BackendError, match="device"):
            Matcher.from_pretrained("kglnet-vis-nir", device=device)
    with pytest.raises(BackendError, match="dtype"):
        Matcher.from_pretrained("kglnet-vis-nir", device="cpu", dtype="int8")
    with pytest.raises(KGLMatchError, match="batch_size"):
        Matcher.from_pretrained("kglnet-vis-nir", device="cpu", batch_size=0)


def test_a_model_without_fusion_cannot_decide_by_one(matcher, features):
    backend = copy.copy(matcher.backend)
    backend.config = dataclasses.replace(matcher.config, inference={})
    with pytest.raises(KGLMatchError, match="carries no fusion"):
        Matcher(backend).match(*features, decide="fused")


def test_a_fusion_decides_where_the_model_carries_one(matcher, features):
    fusion = {"distance": -6.0, "logit": 0.5, "bias": 5.0}
    config = dataclasses.replace(matcher.config, inference={"fusion": fusion})
    backend = copy.copy(matcher.backend)
    backend.config = config
    fused = Matcher(backend).match(*features, min_score=0)
    metric = matcher.match(*features, min_score=0, top_k=None, decide="metric")
    assert len(fused) == len(metric) == 10
    scores = np.clip(metric.scores, 1e-7, 1 - 1e-7)
    logits = np.log(scores / (1 - scores))
    expected = 1 / (1 + np.exp(6.0 * metric.distances - 0.5 * logits - 5.0))
    by_pair = dict(zip(map(tuple, metric.indices.tolist()), expected, strict=True))
    for pair, score in zip(map(tuple, fused.indices.tolist()), fused.scores, strict=True):
        if pair in by_pair:
            assert abs(by_pair[pair] - score) < 1e-3


def test_network_inputs_do_not_depend_on_brightness(matcher, patches):
    # The first layer normalises: half the exposure is the same patch.
    bright = matcher.describe(patches[0][:4], "vis", maps=False).descriptors
    dark = matcher.describe(patches[0][:4] / 2, "vis", maps=False).descriptors
    assert np.abs(bright - dark).max() < 1e-2
