"""Features and Matches: rows, files, errors."""

from __future__ import annotations

import csv
import json
import types
import zipfile

import numpy as np
import pytest
import torch

from kglmatch import Features, Matches
from kglmatch.errors import DataError, KeypointError, KGLMatchError, OutputError
from kglmatch.features import check_keypoints, check_size


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
        (slice(None, None, -2), [4, 2, 0]),
        (np.array([1, 0], np.uint8), [1, 0]),
        (np.array([3], np.uint64), [3]),
        ([-1], [4]),
        (torch.tensor([False, True, True, False, False]), [1, 2]),
        (torch.tensor([2, 2], dtype=torch.int32), [2, 2]),
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


@pytest.mark.parametrize(
    "rows",
    [
        np.array([True, False]), 2, np.array([0.5]), np.zeros((2, 2), int), [5], [-6], [2**70], [[1], [1, 2]],
        slice(0.5, None), slice(None, None, 0), ["a"], None, torch.tensor([0.5]),
        torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_mean_nothing_are_refused(rows):
    for what in (make_features(), make_matches(5)):
        with pytest.raises(KGLMatchError) as caught:
            what[rows]
        assert "\n" not in str(caught.value)


class OnDevice:
    """A tensor of another device: numpy cannot read it, and it comes to the host by `cpu`."""

    def __init__(self, tensor):
        self.tensor, self.dtype, self.ndim = tensor, tensor.dtype, tensor.ndim

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self):
        return self

    def cpu(self):
        return self.tensor


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False, False, True, True]), torch.tensor([0, 3, 4])], ids=["mask", "indices"]
)
def test_rows_may_be_of_another_device_than_the_arrays(rows):
    taken_by = []

    class Maps(types.SimpleNamespace):
        """Maps on a device of their own, which take rows of the host alone."""

        ndim = 4

        def __len__(self):
            return 5

        def __getitem__(self, rows):
            assert isinstance(rows, np.ndarray)
            taken_by.append(rows)
            return self.values[rows]

    values = torch.arange(20.0).reshape(5, 1, 2, 2)
    features = make_features(descriptors=torch.ones(5, 128), maps=Maps(values=values))
    taken = features[OnDevice(rows)]
    assert len(taken_by) == 1
    assert torch.equal(taken.maps, values[[0, 3, 4]])
    assert np.array_equal(taken.keypoints, features.keypoints[[0, 3, 4]])
    assert np.array_equal(make_matches(5)[OnDevice(rows)].indices[:, 0], [0, 3, 4])


def test_lengths_and_modality_are_checked():
    with pytest.raises(KGLMatchError, match="keypoints has 3 rows"):
        make_features(keypoints=np.zeros((3, 2), np.float32))
    with pytest.raises(KGLMatchError, match="maps has 3 rows"):
        make_features(maps=torch.zeros(3, 1, 2, 2))
    with pytest.raises(KGLMatchError, match="modality"):
        make_features(modality="nir")


@pytest.mark.parametrize(
    "changes",
    [
        {"descriptors": np.float32(3)}, {"descriptors": np.zeros(5, np.float32)}, {"descriptors": "abcde"},
        {"descriptors": np.zeros((5, 128), int)}, {"descriptors": None}, {"maps": np.float32(3)},
        {"keypoints": np.zeros((5, 3))}, {"keypoints": np.full((5, 2), np.nan)}, {"keypoints": ["a"] * 5},
        {"image_size": 5}, {"image_size": (64, 48, 3)}, {"image_size": (0, 48)}, {"image_size": (64.5, 48)},
        {"image_size": "ab"},
    ],
    ids=str,
)  # fmt: skip
def test_features_of_other_shapes_or_types_are_refused(changes):
    with pytest.raises(KGLMatchError):
        make_features(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"indices": np.zeros((4, 3), int)}, {"indices": np.zeros((4, 2))}, {"indices": [[0, 1]] * 4},
        {"scores": np.ones(3, np.float32)}, {"scores": None}, {"distances": np.ones((4, 1))},
        {"keypoints_vis": np.zeros((3, 2))}, {"keypoints_ir": np.zeros((4, 3))},
        {"homography": np.eye(2)}, {"homography": np.full((3, 3), "a")},
        {"inliers": np.ones(4)}, {"inliers": np.ones(3, bool)},
    ],
    ids=str,
)  # fmt: skip
def test_matches_of_other_shapes_or_types_are_refused(changes):
    with pytest.raises(KGLMatchError, match=next(iter(changes))):
        make_matches(**changes)


def test_keypoints_are_two_columns_of_finite_numbers():
    for nothing in ([], (), np.zeros(0), np.zeros((0, 2), int), torch.zeros(0, 2)):
        points = check_keypoints(nothing)
        assert points.shape == (0, 2) and points.dtype == np.float32
    for good in ([[1, 2]], np.array([[1, 2]]), torch.tensor([[1.0, 2.0]]), [(1.0, 2)]):
        assert check_keypoints(good).tolist() == [[1.0, 2.0]]
    for wrong in (
        np.zeros((2, 6)), np.zeros((0, 6)), np.zeros((2, 0)), np.zeros(2), 3, None, "ab", [["1", "2"]],
        [[1, 2], [3]], [[1j, 2]], [[True, False]], np.zeros((1, 2, 2)),
    ):  # fmt: skip
        with pytest.raises(KeypointError, match=r"\(N, 2\)"):
            check_keypoints(wrong)
    for value in (np.nan, np.inf, -np.inf, 1e300):
        with pytest.raises(KeypointError, match="row 1 is"):
            check_keypoints([[0, 0], [value, 3]])


def test_sizes_are_plain_integers():
    assert check_size(np.array([64, 48])) == (64, 48)
    assert all(type(side) is int for side in make_features(image_size=np.array([64, 48])).image_size)
    for wrong in (None, 3, (1,), (1, 0), (1, -2), (True, 1), (1, np.nan), np.eye(2)):
        with pytest.raises(KGLMatchError, match="width, height"):
            check_size(wrong)


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
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("descriptors.npy", b"no array")
    with pytest.raises(DataError):
        Features.load(path)
    np.savez_compressed(path, descriptors=np.random.default_rng(0).random((9, 128)), modality="vis")
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError):
        Features.load(path)
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"no \.npz"):
        Features.load(tmp_path / "f.npy")
    with pytest.raises(DataError, match="directory"):
        Features.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"descriptors": np.float32(3)}, {"descriptors": np.array(["a", "b"])}, {"descriptors": "abc"},
        {"descriptors": np.zeros((3, 8), int)}, {"descriptors": np.zeros(3)},
        {"descriptors": np.full((3, 8), np.nan)}, {"descriptors": np.full((3, 8), 1e300)},
        {"modality": "nir"}, {"modality": ["vis", "ir"]}, {"maps": np.zeros(3)},
        {"maps": np.zeros((2, 1, 2, 2))}, {"maps": np.full((3, 1, 2, 2), np.inf)},
        {"maps": np.zeros((3, 1, 2, 2), int)}, {"keypoints": np.zeros((3, 3))},
        {"keypoints": np.zeros((2, 2))}, {"keypoints": np.full((3, 2), np.nan)}, {"image_size": 5},
        {"image_size": ["a", "b"]}, {"image_size": [640, 480, 3]},
    ],
    ids=str,
)  # fmt: skip
def test_files_with_other_arrays_hold_no_features(tmp_path, changes):
    np.savez(tmp_path / "f.npz", **{"descriptors": np.zeros((3, 8)), "modality": "vis", **changes})
    with np.errstate(over="ignore"), pytest.raises(DataError) as caught:
        Features.load(tmp_path / "f.npz")
    message = str(caught.value)
    assert "f.npz holds no features" in message and "\n" not in message and len(message) < 300


def test_descriptors_from_a_file_are_float32(tmp_path):
    np.savez(tmp_path / "f.npz", descriptors=np.ones((2, 8)), modality="ir", keypoints=np.ones((2, 2), int))
    features = Features.load(tmp_path / "f.npz")
    assert features.descriptors.dtype == features.keypoints.dtype == np.float32


def test_a_file_with_a_pickle_is_not_unpickled(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, descriptors=np.array([{}], dtype=object), modality=np.array("vis"))
    with pytest.raises(DataError):
        Features.load(path)


def test_filter_keeps_the_threshold_itself():
    matches = make_matches()
    assert len(matches.filter(float(matches.scores[1]))) == 2
    assert len(matches.filter(1.5)) == 0
    assert len(make_matches(0).filter(0.5)) == 0
    for wrong in (float("nan"), "0.5", None, True):
        with pytest.raises(KGLMatchError, match="min_score"):
            matches.filter(wrong)


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("bare", [True, False])
def test_matches_as_npz_json_and_csv(tmp_path, k, bare):
    nothing = {"keypoints_vis": None, "keypoints_ir": None, "homography": None, "inliers": None}
    matches = make_matches(k, **(nothing if bare else {}))
    for suffix in ("npz", "json", "csv"):
        matches.save(tmp_path / f"m.{suffix}")
    for suffix in ("npz", "json", "csv"):
        back = Matches.load(tmp_path / f"m.{suffix}")
        names = ["indices", "scores", "distances", "keypoints_vis", "keypoints_ir", "homography", "inliers"]
        if suffix == "csv":
            names.remove("homography")  # a table has no place for it
            assert back.homography is None
        for name in names:
            value, expected = getattr(back, name), getattr(matches, name)
            assert (value is None) == (expected is None), (suffix, name)
            if value is not None:
                assert (value.dtype, value.shape) == (expected.dtype, expected.shape), (suffix, name)
                assert np.array_equal(value, expected), (suffix, name)
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


WRONG_MATCHES = [
    {"scores": [1.0, 0.5]},
    {"scores": [0.9, 0.8, "a"]},
    {"scores": [0.9, 0.8, float("nan")]},
    {"scores": [0.9, 0.8, 7.0]},
    {"indices": [[0, 1, 2]] * 3},
    {"indices": [[0, 1], [1, 2], [2]]},
    {"indices": [[0.5, 1]] * 3},
    {"indices": [[-1, 1]] * 3},
    {"indices": [[2**70, 1]] * 3},
    {"indices": None},
    {"distances": [[0.5]] * 3},
    {"keypoints_vis": [[1.0, 2.0]] * 2},
    {"keypoints_ir": [[1.0, float("inf")]] * 3},
    {"homography": [[1, 0], [0, 1]]},
    {"inliers": [1, 0, 1]},
    {"inliers": 3},
]


@pytest.mark.parametrize("changes", WRONG_MATCHES, ids=str)
@pytest.mark.parametrize("suffix", ["npz", "json"])
def test_files_whose_rows_do_not_fit_hold_no_matches(tmp_path, suffix, changes):
    fields = {"indices": [[0, 1]] * 3, "scores": [0.5] * 3, "distances": [0.5] * 3, **changes}
    path = tmp_path / f"m.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(fields))
    else:
        ragged = "indices" in changes and [2] in (changes["indices"] or [])
        fields["indices"] = np.array(fields["indices"], object if ragged else None)
        np.savez(path, **{name: np.array(value) for name, value in fields.items()})
    with pytest.raises(DataError) as caught:
        Matches.load(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", "index_vis,index_ir,score\n0,1,0.5\n", "index_vis,index_ir,score,distance\n0,1,0.5\n",
        "index_vis,index_ir,score,distance\n0,1,0.5,x\n", "index_vis,index_ir,score,distance\n0.5,1,0.5,1\n",
        "index_vis,index_ir,score,distance,inlier\n0,1,0.5,1,yes\n",
        "index_vis,index_ir,score,distance\n0,1,inf,1\n", 'index_vis,index_ir,score,distance\n"0,1,0.5,1\n',
    ],
)  # fmt: skip
def test_tables_that_hold_no_matches(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=r"m\.csv") as caught:
        Matches.load(tmp_path / "m.csv")
    assert "\n" not in str(caught.value)


def test_columns_are_found_by_name_and_others_are_ignored(tmp_path):
    (tmp_path / "m.csv").write_text("note,distance,score,index_ir,index_vis\nhello,1.5,0.25,7,3\n")
    matches = Matches.load(tmp_path / "m.csv")
    assert matches.indices.tolist() == [[3, 7]]
    assert (matches.scores.tolist(), matches.distances.tolist()) == ([0.25], [1.5])
    assert matches.keypoints_vis is None and matches.inliers is None


@pytest.mark.parametrize("name", ["m.json", "m.csv", "m.npz", "m.txt", "m"])
def test_files_of_matches_that_cannot_be_read(tmp_path, name):
    path = tmp_path / name
    for content in (None, b"", b"\xff\xfe\x00", b"{", b"[1, 2]", b"[" * 100_000):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=name) as caught:
            Matches.load(path)
        assert "\n" not in str(caught.value)
    if name in ("m.txt", "m"):
        assert ".csv, .json, .npz" in str(caught.value)


def test_matches_without_descriptors_keep_their_missing_distances(tmp_path):
    matches = make_matches(distances=np.full(4, np.nan, np.float32))
    for suffix in ("npz", "json", "csv"):
        matches.save(tmp_path / f"m.{suffix}")
        assert np.isnan(Matches.load(tmp_path / f"m.{suffix}").distances).all()
