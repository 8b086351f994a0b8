"""Conversions to OpenCV, kornia, hloc, COLMAP and image-matching-models, against the real libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import other_sensor, texture

from kglmatch import Features, Matcher, Matches, extract_patches, load_image
from kglmatch.errors import DataError, ImageError, KGLMatchError
from kglmatch.interop import (
    ImageMatchingModel,
    from_cv2_keypoints,
    from_cv2_matches,
    import_into_colmap,
    kornia_descriptor,
    to_cv2_keypoints,
    to_cv2_matches,
    to_kornia_lafs,
    write_hloc,
)


def random_features(count: int, modality: str = "vis", seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    descriptors = rng.standard_normal((count, 128)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    points = rng.uniform(0, 300, (count, 2)).astype(np.float32)
    return Features(descriptors, modality, keypoints=points, image_size=(400, 300))


def some_matches(rows: list[tuple[int, int]]) -> Matches:
    scores = np.linspace(0.9, 0.6, len(rows), dtype=np.float32)
    return Matches(np.array(rows, np.int64).reshape(-1, 2), scores, 2 - 2 * scores)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, matcher) -> tuple[Path, Features, Features, np.ndarray]:
    """A folder with two images related by a homography, their features, and that homography."""
    folder = tmp_path_factory.mktemp("scene")
    vis = texture(320, 240)
    homography = np.array([[0.98, 0.03, 4.0], [-0.02, 1.01, -3.0], [1e-5, 0, 1]])
    ir = cv2.warpPerspective(other_sensor(vis), homography, (320, 240), borderMode=cv2.BORDER_REFLECT)
    for name, image in (("vis/a.png", vis), ("ir/a.png", ir)):
        (folder / name).parent.mkdir()
        cv2.imwrite(str(folder / name), np.rint(image * 255).astype(np.uint8))
    features = [
        matcher.extract(folder / f"{modality}/a.png", modality, max_keypoints=60)
        for modality in ("vis", "ir")
    ]
    return folder, *features, homography


# --- OpenCV -----------------------------------------------------------------------------------


def test_cv2_keypoints_both_ways():
    features = random_features(5)
    converted = to_cv2_keypoints(features)
    assert all(isinstance(k, cv2.KeyPoint) and k.size == 64 for k in converted)
    assert np.array_equal(from_cv2_keypoints(converted), features.keypoints)
    assert to_cv2_keypoints(features.keypoints, size=10)[0].size == 10
    assert to_cv2_keypoints(np.zeros((0, 2))) == []
    assert from_cv2_keypoints([]).shape == (0, 2)
    for wrong in (np.zeros((3, 3)), Features(features.descriptors, "vis")):
        with pytest.raises(KGLMatchError, match="keypoints"):
            to_cv2_keypoints(wrong)


def test_cv2_detector_feeds_the_matcher(matcher, image_pair):
    grey = (load_image(image_pair[0]) * 255).astype(np.uint8)
    found = [k for k in cv2.ORB_create(40).detect(grey) if 32 < k.pt[0] < 150 and 32 < k.pt[1] < 120]
    features = matcher.extract(image_pair[0], "vis", keypoints=from_cv2_keypoints(found))
    assert len(features) == len(found) > 0
    assert [k.pt for k in to_cv2_keypoints(features)] == [k.pt for k in found]


def test_cv2_matches_both_ways():
    vis, ir = random_features(6), random_features(9, "ir", seed=1)
    matches = some_matches([(4, 8), (0, 2), (5, 0)])
    converted = to_cv2_matches(matches)
    assert [(m.queryIdx, m.trainIdx) for m in converted] == [(4, 8), (0, 2), (5, 0)]
    back = from_cv2_matches(converted[::-1], vis.keypoints, to_cv2_keypoints(ir))
    assert np.array_equal(back.indices, matches.indices)  # best first
    assert np.allclose(back.distances, matches.distances)
    assert np.allclose(back.scores, 1 - matches.distances / 2)
    assert np.array_equal(back.keypoints_vis, vis.keypoints[[4, 0, 5]])
    assert np.array_equal(back.keypoints_ir, ir.keypoints[[8, 2, 0]])
    assert len(from_cv2_matches([], vis.keypoints)) == len(to_cv2_matches(some_matches([]))) == 0
    with pytest.raises(KGLMatchError, match="ir keypoint 8, but there are 3"):
        from_cv2_matches(converted, vis.keypoints, ir.keypoints[:3])
    for distance in (57.0, -1.0, float("nan")):
        with pytest.raises(KGLMatchError, match=r"expected \[0, 2\]"):
            from_cv2_matches([cv2.DMatch(0, 0, distance)])
    with pytest.raises(KGLMatchError, match="match 1 has an index below 0"):
        from_cv2_matches([converted[0], cv2.DMatch(0, -1, 1.0)])
    with pytest.raises(KGLMatchError, match=r"flat list of cv2\.DMatch, got a tuple"):
        from_cv2_matches(cv2.BFMatcher().knnMatch(vis.descriptors, ir.descriptors, 2))
    with pytest.raises(KGLMatchError, match=r"flat list of cv2\.KeyPoint, got a tuple"):
        from_cv2_keypoints([(1.0, 2.0)])


def test_cv2_matcher_agrees_with_ours(matcher):
    vis, ir = random_features(40), random_features(60, "ir", seed=1)
    ours = matcher.match(vis, ir, decide="descriptor", min_score=0)
    found = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(vis.descriptors, ir.descriptors)
    theirs = from_cv2_matches(found, vis.keypoints, ir.keypoints)
    assert np.array_equal(theirs.indices, ours.indices)
    assert np.allclose(theirs.scores, ours.scores, atol=1e-5)
    assert np.array_equal(theirs.keypoints_ir, ours.keypoints_ir)


# --- kornia -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kornia_feature():
    return pytest.importorskip("kornia.feature", reason="kornia is not installed")


def test_kornia_cuts_our_patches(kornia_feature):
    image = texture(200, 150)
    points = np.array([[40, 60], [100.25, 70.5], [149.75, 110]], np.float32)
    lafs = to_kornia_lafs(points)
    found = kornia_feature.extract_patches_from_pyramid(torch.from_numpy(image)[None, None], lafs, PS=64)
    assert np.abs(found[0, :, 0].numpy() - extract_patches(image, points)).max() < 1e-4


@pytest.mark.parametrize("modality", ["vis", "ir"])
def test_kornia_laf_descriptor(kornia_feature, matcher, scene, modality):
    folder, vis, ir, _ = scene
    features = (vis if modality == "vis" else ir)[:20]
    descriptor = kornia_descriptor(matcher, modality)
    assert isinstance(descriptor, kornia_feature.LAFDescriptor)
    image = torch.from_numpy(load_image(folder / modality / "a.png"))
    lafs = to_kornia_lafs(features)
    found = descriptor(image[None, None], lafs)
    assert found.shape == (1, len(features), 128)
    assert np.abs(found[0].numpy() - features.descriptors).max() < 1e-3
    colour = descriptor(image.expand(1, 3, -1, -1), lafs[:, :5])
    assert torch.allclose(colour, found[:, :5], atol=1e-4)
    with pytest.warns(UserWarning, match="no keypoints"):
        assert descriptor(image[None, None], lafs[:, :0]).shape[:2] == (1, 0)
    (found.sum() * torch.ones(1, requires_grad=True)).backward()  # no inference tensor


def test_kornia_match_mnn_agrees_with_ours(kornia_feature, matcher, scene):
    _, vis, ir, _ = scene
    distances, rows = kornia_feature.match_mnn(
        torch.from_numpy(vis.descriptors), torch.from_numpy(ir.descriptors)
    )
    ours = matcher.match(vis, ir, decide="descriptor", min_score=0)
    assert len(ours) > 20
    theirs = {tuple(row): d for row, d in zip(rows.tolist(), distances[:, 0].tolist(), strict=True)}
    assert set(theirs) == {tuple(row) for row in ours.indices.tolist()}
    expected = [theirs[tuple(row)] for row in ours.indices.tolist()]
    assert np.allclose(ours.distances, expected, atol=1e-3)


def test_kornia_matches_find_the_homography(kornia_feature, matcher, scene):
    """The whole way in kornia: its detector, our descriptors, its matcher."""
    folder, _, _, homography = scene
    points, descriptors = [], []
    detector = kornia_feature.ScaleSpaceDetector(100)
    for modality in ("vis", "ir"):
        image = torch.from_numpy(load_image(folder / modality / "a.png"))[None, None]
        centres = kornia_feature.get_laf_center(detector(image)[0])[0].numpy()
        inside = ((centres > 32) & (centres < np.array([287, 207]))).all(1)
        points.append(centres[inside])
        descriptors.append(kornia_descriptor(matcher, modality)(image, to_kornia_lafs(centres[inside]))[0])
    rows = kornia_feature.match_mnn(*descriptors)[1].numpy()
    moved = cv2.perspectiveTransform(points[0][rows[:, 0]][:, None], homography)[:, 0]
    errors = np.linalg.norm(moved - points[1][rows[:, 1]], axis=1)
    assert (errors < 4).sum() >= 15


# --- hloc and COLMAP --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def h5py():
    return pytest.importorskip("h5py", reason="h5py is not installed")


def test_hloc_files_as_hloc_reads_them(h5py, tmp_path):
    images = {"vis/a.png": random_features(6), "ir/a.png": random_features(4, "ir", seed=1)}
    matches = some_matches([(4, 3), (0, 2), (5, 0)])
    write_hloc(tmp_path / "sfm", images, {("vis/a.png", "ir/a.png"): matches})
    with h5py.File(tmp_path / "sfm" / "features.h5") as file:
        for name, features in images.items():
            group = file[name]
            assert np.array_equal(group["keypoints"][:], features.keypoints)
            assert np.array_equal(group["descriptors"][:], features.descriptors.T)
            assert group["scores"].shape == (len(features),)
            assert group["image_size"][:].tolist() == [400, 300]
    with h5py.File(tmp_path / "sfm" / "matches.h5") as file:
        group = file["vis-a.png/ir-a.png"]
        assert group["matches0"][:].tolist() == [2, -1, -1, -1, 3, 0]
        expected = np.zeros(6, np.float32)
        expected[[4, 0, 5]] = matches.scores
        assert np.array_equal(group["matching_scores0"][:], expected)
    assert (tmp_path / "sfm" / "pairs.txt").read_text() == "vis/a.png ir/a.png\n"


def test_hloc_refuses_what_it_cannot_hold(h5py, tmp_path):
    vis, ir = random_features(6), random_features(4, "ir", seed=1)
    images, names = {"a": vis, "b": ir}, ("a", "b")
    wrong = [
        ({"a": vis}, {names: some_matches([(0, 0)])}, r"without features: \['b'\]"),
        (images, {names: some_matches([(0, 4)])}, "beyond their 6 and 4"),
        (images, {names: some_matches([(0, 1), (2, 1)])}, "one_to_one"),
        ({"a b": vis}, {}, "without spaces"),
        ({"a": Features(vis.descriptors, "vis")}, {}, "no keypoints"),
        (
            {"a/b": vis, "a-b": vis, "c": ir},
            {("a/b", "c"): some_matches([]), ("a-b", "c"): some_matches([])},
            "become one",
        ),
    ]
    for given, pairs, message in wrong:
        with pytest.raises(KGLMatchError, match=message):
            write_hloc(tmp_path / "sfm", given, pairs)
    assert not (tmp_path / "sfm").exists()
    write_hloc(tmp_path / "sfm", {"a": vis[:0], "b": ir}, {names: some_matches([])})


@pytest.fixture(scope="module")
def pycolmap():
    return pytest.importorskip("pycolmap", reason="pycolmap is not installed")


def test_colmap_imports_and_verifies(h5py, pycolmap, matcher, scene, tmp_path):
    folder, vis, ir, _ = scene
    matches = matcher.match(vis, ir, min_score=0.2)
    names = ("vis/a.png", "ir/a.png")
    write_hloc(tmp_path / "sfm", dict(zip(names, (vis, ir), strict=True)), {names: matches})
    database = tmp_path / "database.db"
    import_into_colmap(tmp_path / "sfm", folder, database)
    with pycolmap.Database.open(database) as db:
        ids = [db.read_image_with_name(name).image_id for name in names]
        for image_id, features in zip(ids, (vis, ir), strict=True):
            # COLMAP's origin is the image's corner.
            assert np.array_equal(db.read_keypoints(image_id), features.keypoints + np.float32(0.5))
        rows = db.read_matches(*ids)
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, matches.indices.tolist()))
        assert db.num_cameras() == 2
    pycolmap.verify_matches(database, tmp_path / "sfm" / "pairs.txt")
    with pycolmap.Database.open(database) as db:
        geometry = db.read_two_view_geometry(*ids)
    assert len(geometry.inlier_matches) >= 15
    assert {path.name for path in tmp_path.iterdir()} == {"sfm", "database.db"}


def test_colmap_with_files_that_are_missing(h5py, pycolmap, scene, tmp_path):
    folder, vis, ir, _ = scene
    with pytest.raises(DataError, match="write_hloc"):
        import_into_colmap(tmp_path, folder, tmp_path / "database.db")
    write_hloc(tmp_path / "sfm", {"a.png": vis, "vis/a.png": ir}, {})
    with pytest.raises(DataError, match=r"lacks 1 of the images \(first: a.png\)"):
        import_into_colmap(tmp_path / "sfm", folder, tmp_path / "database.db")
    for line in ("a.png\n", "a.png vis/a.png more\n", "a.png b.png\n"):
        (tmp_path / "sfm" / "pairs.txt").write_text(line)
        with pytest.raises(DataError, match="write_hloc"):
            import_into_colmap(tmp_path / "sfm", folder, tmp_path / "database.db")
    (tmp_path / "sfm" / "pairs.txt").write_text("")
    (tmp_path / "images" / "vis").mkdir(parents=True)
    for name in ("a.png", "vis/a.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="COLMAP cannot read"):
        import_into_colmap(tmp_path / "sfm", tmp_path / "images", tmp_path / "database.db")
    assert not (tmp_path / "database.db").exists()


# --- image-matching-models --------------------------------------------------------------------

IMM_KEYS = {
    "num_inliers", "H", "all_kpts0", "all_kpts1", "all_desc0", "all_desc1", "matched_kpts0", "matched_kpts1",
    "inlier_kpts0", "inlier_kpts1", "matched_confidences",
}  # fmt: skip


def test_image_matching_model(matcher, scene):
    folder, vis, ir, homography = scene
    model = ImageMatchingModel(matcher, max_keypoints=60, min_score=0.2)
    images = [model.load_image(folder / modality / "a.png") for modality in ("vis", "ir")]
    assert all(image.shape == (3, 240, 320) and image.dtype == torch.float32 for image in images)
    result = model(*images)
    assert set(result) == IMM_KEYS
    assert np.allclose(result["all_kpts0"], vis.keypoints, atol=0.05)
    assert result["all_desc1"].shape == (len(result["all_kpts1"]), 128)
    count = len(result["matched_kpts0"])
    assert result["matched_kpts1"].shape == (count, 2)
    assert result["matched_confidences"].shape == (count,)
    assert result["num_inliers"] == len(result["inlier_kpts0"]) == len(result["inlier_kpts1"]) >= 15
    moved = cv2.perspectiveTransform(result["inlier_kpts0"][:, None].astype(np.float64), result["H"])[:, 0]
    assert np.median(np.linalg.norm(moved - result["inlier_kpts1"], axis=1)) < 2
    truth = cv2.perspectiveTransform(result["inlier_kpts0"][:, None].astype(np.float64), homography)[:, 0]
    assert np.median(np.linalg.norm(truth - result["inlier_kpts1"], axis=1)) < 3
    assert np.allclose(result["all_desc1"], ir.descriptors, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"decide": "fused"},
        {"decide": None},
        {},
        {"decide": "metric"},
        {"decide": "descriptor"},
        {"dense": True, "max_displacement": 4},
        {"upright": False},
        {"top_k": None, "mutual": False, "one_to_one": False},
    ],
    ids=str,
)
def test_image_matching_model_takes_every_option_of_match_images(thin_matcher, image_pair, options):
    options = {"min_score": 0.0, **options}
    result = ImageMatchingModel(thin_matcher, max_keypoints=8, **options)(*image_pair)
    expected = thin_matcher.match_images(*image_pair, max_keypoints=8, **options)
    assert len(expected) > 0
    assert np.array_equal(result["matched_kpts0"], expected.keypoints_vis)
    assert np.array_equal(result["matched_kpts1"], expected.keypoints_ir)
    assert np.allclose(result["matched_confidences"], expected.scores, atol=1e-6)
    assert len(result["all_kpts0"]) == len(result["all_desc0"]) == 8
    assert len(result["all_kpts1"]) == (16 if options.get("upright") is False else 8)


@pytest.mark.parametrize("upright", [True, False])
def test_image_matching_model_extracts_one_image(thin_matcher, image_pair, upright):
    model = ImageMatchingModel(thin_matcher, max_keypoints=8, upright=upright)
    found, both = model.extract(str(image_pair[1]), "ir"), model(*image_pair)
    assert np.array_equal(found["all_kpts0"], both["all_kpts1"])
    assert np.allclose(found["all_desc0"], both["all_desc1"], atol=1e-5)


def test_image_matching_model_refuses_other_options(thin_matcher, image_pair):
    with pytest.raises(KGLMatchError, match=r"unknown options \['min_scores'\]"):
        ImageMatchingModel(thin_matcher, min_scores=0.5)
    for resize in (0, -5, 2.5, True, "a", (80,), (80, 0), (80, 90.0), (80, 90, 100)):
        with pytest.raises(KGLMatchError, match="resize"):
            ImageMatchingModel.load_image(image_pair[0], resize=resize)


def test_image_matching_model_without_a_match(thin_matcher):
    model = ImageMatchingModel(thin_matcher, min_score=1.0)
    blank = torch.full((3, 80, 90), 0.5)
    result = model(blank, blank)
    assert result["H"] is None
    assert result["num_inliers"] == 0
    for key in IMM_KEYS - {"num_inliers", "H"}:
        assert len(result[key]) == 0
    assert result["matched_kpts0"].shape == result["inlier_kpts1"].shape == (0, 2)


def test_image_matching_model_images(thin_matcher, image_pair):
    model = ImageMatchingModel(thin_matcher)
    assert model.load_image(image_pair[0], resize=96).shape == (3, 96, 96)
    assert model.load_image(image_pair[0], resize=(80, 100)).shape == (3, 80, 100)
    assert (model.name, model.device) == ("KGLNet", "cpu")
    with pytest.raises(ImageError):
        model("nowhere.png", image_pair[1])


# --- what is not installed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("kornia.feature", "kornia", lambda: kornia_descriptor(None, "vis")),
        ("h5py", "colmap", lambda: write_hloc("x", {}, {})),
        ("pycolmap", "colmap", lambda: import_into_colmap("x", "y", "z")),
    ],
)
def test_optional_library_that_is_missing(monkeypatch, module, extra, call):
    if module == "pycolmap":
        pytest.importorskip("h5py", reason="h5py is not installed")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(KGLMatchError, match=rf"pip install \"kglmatch\[{extra}\]\""):
        call()


def test_modality_is_checked(matcher):
    with pytest.raises(KGLMatchError, match="modality"):
        kornia_descriptor(matcher, "thermal")
    assert isinstance(matcher, Matcher)
