"""Features and Matches: rows, files, errors."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from kglmatch import Features, Matches
from kglmatch.errors import DataError, KGLMatchError, OutputError


def make_features(n=5, **changes):
    rng = np.random.default_rng(0)
    values = {
        "descriptors": rng.standard_normal((n, 128)).astype(np.float32),
        "modality": "vis",
        "maps": torch.arange(n * 4.0).reshape(n, 1, 2, 2),
        "keypoints": rng.uniform(0, 50, (n, 2)).astype(np.float32),
        "image_size": (64, 48),
    }
    return Features(**{**values, **changes})


def make_matches(k=4, **changes):
    values = {
        "indices": np.stack([np.arange(k), np.arange(k)[::-1]], 1).astype(np.int64),
        "scores": np.linspace(1, 0.1, k, dtype=np.float32),
        "distances": np.linspace(0.2, 1, k, dtype=np.float32),
        "keypoints_vis": np.arange(2.0 * k, dtype=np.float32).reshape(k, 2),
        "keypoints_ir": np.arange(2.0 * k, dtype=np.float32).reshape(k, 2) + 0.5,
        "homography": np.eye(3),
        "inliers": np.arange(k) % 2 == 0,
    }
    return Matches(**{**values, **changes})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(1, 3), [1, 2]),
        (np.array([True, False, False, True, False]), [0, 3]),
        (np.array([4, 0, 4]), [4, 0, 4]),
        ([2], [2]),
        ([], []),
        (slice(0, 0), []),
    ],
)
def test_rows_are_taken_from_every_field(rows, expected):
    features = make_features()
    taken = features[rows]
    assert len(taken) == len(expected)
    assert np.array_equal(taken.descriptors, features.descriptors[expected])
    assert np.array_equal(taken.keypoints, features.keypoints[expected])
    assert torch.equal(taken.maps, features.maps[expected])
    assert (taken.modality, taken.image_size) == ("vis", (64, 48))


@pytest.mark.parametrize("rows", [np.array([True, False]), 2, np.array([0.5]), np.zeros((2, 2), int)])
def test_rows_that_mean_nothing_are_refused(rows):
    with pytest.raises(KGLMatchError):
        make_features()[rows]


def test_lengths_and_modality_are_checked():
    with pytest.raises(KGLMatchError, match="keypoints has 3 rows"):
        make_features(keypoints=np.zeros((3, 2), np.float32))
    with pytest.raises(KGLMatchError, match="modality"):
        make_features(modality="nir")


@pytest.mark.parametrize("optional", [True, False])
def test_features_come_back_from_a_file(tmp_path, optional):
    features = make_features() if optional else make_features(maps=None, keypoints=None, image_size=None)
    features.save(tmp_path / "f.npz")
    back = Features.load(tmp_path / "f.npz")
    assert np.array_equal(back.descriptors, features.descriptors)
    assert (back.modality, back.image_size) == (features.modality, features.image_size)
    if optional:
        assert np.array_equal(back.maps, features.maps.numpy())
        assert np.array_equal(back.keypoints, features.keypoints)
    else:
        assert back.maps is None
        assert back.keypoints is None


def test_damaged_and_foreign_files_are_data_errors(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(DataError):
        Features.load(path)
    make_features().save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError):
        Features.load(path)
    path.write_text("not an archive")
    with pytest.raises(DataError):
        Features.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(DataError, match="lacks"):
        Features.load(path)


def test_a_file_with_a_pickle_is_not_unpickled(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, descriptors=np.array([{}], dtype=object), modality=np.array("vis"))
    with pytest.raises(DataError):
        Features.load(path)


def test_filter_keeps_the_threshold_itself():
    matches = make_matches()
    assert len(matches.filter(float(matches.scores[1]))) == 2
    assert len(matches.filter(1.5)) == 0


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("bare", [True, False])
def test_matches_as_npz_json_and_csv(tmp_path, k, bare):
    nothing = {"keypoints_vis": None, "keypoints_ir": None, "homography": None, "inliers": None}
    matches = make_matches(k, **(nothing if bare else {}))
    for suffix in ("npz", "json", "csv"):
        matches.save(tmp_path / f"m.{suffix}")
    back = Matches.load(tmp_path / "m.npz")
    for name in ("indices", "scores", "distances", "keypoints_vis", "keypoints_ir", "homography", "inliers"):
        value, expected = getattr(back, name), getattr(matches, name)
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.dtype == expected.dtype
            assert np.array_equal(value, expected)
    data = json.loads((tmp_path / "m.json").read_text())
    assert np.allclose(data["scores"], matches.scores)
    assert (data["homography"] is None) == bare
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert len(rows) == k
    if k and not bare:
        assert float(rows[0]["x_ir"]) == 0.5
        assert [int(r["inlier"]) for r in rows] == matches.inliers.astype(int).tolist()


def test_another_ending_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"\.csv"):
        make_matches().save(tmp_path / "m.xlsx")
    with pytest.raises(OutputError):
        make_matches().save(tmp_path / "missing" / "m.csv")
    assert list(tmp_path.iterdir()) == []
