"""The protocol on made-up scenes, every file format, and what bad files say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from kglmatch import datasets
from kglmatch.datasets import (
    MIN_NEGATIVE_DISTANCE,
    ImagePair,
    PatchPairs,
    Scene,
    ScenePairs,
    find_image_pairs,
    find_patch_sources,
    load_csv_patches,
    load_patch_npz,
    load_patch_sets,
    load_scene,
    load_scene_pairs,
    load_sos_patches,
    pair_folders,
    protocol_points,
    sample_patch_pairs,
    save_patch_npz,
)
from kglmatch.errors import DataError, ImageError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def texture(seed: int, height: int = 160, width: int = 200) -> np.ndarray:
    """A grey image full of blobs, so that SIFT finds keypoints in it."""
    random = np.random.default_rng(seed)
    image = cv2.GaussianBlur(random.normal(size=(height, width)), (0, 0), 3)
    return np.rint(255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)


def write_pair(folder: Path, name: str, seed: int, affine: np.ndarray | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image = texture(seed)
    cv2.imwrite(str(folder / f"{name}_rgb.png"), image)
    other = 255 - image
    if affine is not None:
        other = cv2.warpAffine(other, affine, other.shape[::-1], flags=cv2.INTER_CUBIC)
        np.save(folder / f"{name}_nir.npy", affine)
    cv2.imwrite(str(folder / f"{name}_nir.png"), other)


def digest(pairs: PatchPairs) -> str:
    return hashlib.sha256(pairs.vis.tobytes() + pairs.ir.tobytes() + pairs.labels.tobytes()).hexdigest()


def protocol_digest(pairs: PatchPairs) -> str:
    """Of the patches in the protocol's order: the matching pair of each point, then its first other."""
    each = len(pairs) // int(pairs.labels.sum())
    rows = np.sort(np.concatenate([np.arange(0, len(pairs), each), np.arange(1, len(pairs), each)]))
    return digest(PatchPairs(pairs.name, pairs.vis[rows], pairs.ir[rows], pairs.labels[rows]))


# --- finding image pairs ------------------------------------------------------------------------


def test_pairs_by_suffix_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, seed in (("0002", 2), ("0000", 0), ("0001", 1)):
        write_pair(tmp_path, name, seed, np.float64([[1, 0, 3], [0, 1, 0]]) if seed == 1 else None)
    pairs = find_image_pairs(tmp_path)
    assert [p.name for p in pairs] == ["0000", "0001", "0002"]
    assert [p.affine is not None for p in pairs] == [False, True, False]
    assert pairs[0].vis.name == "0000_rgb.png"
    assert pairs[0].ir.name == "0000_nir.png"


@pytest.mark.parametrize(
    ("vis", "ir"), [("visible", "infrared"), ("optical", "sar"), ("RGB", "Thermal"), ("vis", "lwir")]
)
def test_two_folders_pair_by_name_whatever_the_ending(tmp_path: Path, vis: str, ir: str) -> None:
    for folder, ending in ((vis, "png"), (ir, "bmp")):
        (tmp_path / folder).mkdir()
        for name in ("b", "a"):
            cv2.imwrite(str(tmp_path / folder / f"{name}.{ending}"), texture(0))
    pairs = find_image_pairs(tmp_path)
    assert [(p.name, p.vis.parent.name, p.ir.name) for p in pairs] == [
        ("a", vis, "a.bmp"),
        ("b", vis, "b.bmp"),
    ]
    assert [p.name for p in pair_folders(tmp_path / ir, tmp_path / vis)] == ["a", "b"]


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        find_image_pairs(tmp_path / "none")
    with pytest.raises(DataError, match="no image pairs"):
        find_image_pairs(tmp_path)
    write_pair(tmp_path / "a", "0", 0)
    (tmp_path / "a" / "0_nir.png").unlink()
    with pytest.raises(DataError, match=r"0_rgb\.png has no partner 0_nir"):
        find_image_pairs(tmp_path / "a")
    write_pair(tmp_path / "b", "0", 0)
    cv2.imwrite(str(tmp_path / "b" / "0_rgb.jpg"), texture(0))
    with pytest.raises(DataError, match="have one name"):
        find_image_pairs(tmp_path / "b")
    for folder in ("vis", "nir"):
        (tmp_path / "c" / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "c" / "nir" / "x.png"), texture(0))
    with pytest.raises(DataError, match=r"x\.png has no partner"):
        find_image_pairs(tmp_path / "c")
    (tmp_path / "c" / "lwir").mkdir()
    with pytest.raises(DataError, match="more than two folders"):
        find_image_pairs(tmp_path / "c")


@pytest.mark.parametrize(
    "bad", [np.eye(3), np.full((2, 3), np.nan), np.zeros((2, 3)), np.array([["a"] * 3] * 2), np.array([{}])]
)
def test_bad_affines(tmp_path: Path, bad: np.ndarray) -> None:
    write_pair(tmp_path, "0", 0)
    np.save(tmp_path / "0_nir.npy", bad)
    with pytest.raises(DataError, match="affine"):
        find_image_pairs(tmp_path)


# --- the protocol -------------------------------------------------------------------------------


def test_a_warped_image_is_laid_back(tmp_path: Path) -> None:
    affine = np.array([[0.98, -0.06, 14.3], [0.06, 0.98, -5.2]])
    write_pair(tmp_path, "0", 3, affine)
    scene = load_scene(find_image_pairs(tmp_path)[0])
    inner = scene.valid.copy()
    inner[:3], inner[-3:], inner[:, :3], inner[:, -3:] = False, False, False, False
    # The inverse warp rounds positions to 1/32 pixel.
    difference = np.abs(scene.ir.astype(int) - (255 - scene.vis.astype(int)))[inner]
    assert difference.mean() < 1.5
    assert 0.5 < scene.valid.mean() < 1


def test_valid_pixels_read_nothing_outside(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", 4, np.array([[1.0, 0.02, 7.4], [-0.02, 1.0, 3.6]]))
    pair = find_image_pairs(tmp_path)[0]
    size = load_scene(pair).vis.shape[::-1]
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    ir = cv2.imread(str(pair.ir), cv2.IMREAD_GRAYSCALE).astype(np.float32)
    dark, bright = (cv2.warpAffine(ir, pair.affine, size, flags=flags, borderValue=v) for v in (0, 255))
    np.testing.assert_allclose(dark[load_scene(pair).valid], bright[load_scene(pair).valid], atol=0.3)


def test_points_are_unique_whole_strongest_and_wholly_inside() -> None:
    image = texture(5)
    valid = np.ones(image.shape, bool)
    valid[:, 150:] = False
    points = protocol_points(Scene("s", image, image, valid))
    assert len(points) > 20
    assert points.dtype == np.int64
    assert len(np.unique(points, axis=0)) == len(points)
    for x, y in points:
        assert valid[y - 32 : y + 32, x - 32 : x + 32].shape == (64, 64)
        assert valid[y - 32 : y + 32, x - 32 : x + 32].all()
    np.testing.assert_array_equal(protocol_points(Scene("s", image, image, valid), 7), points[:7])
    keypoints = cv2.SIFT_create().detect(image, None)
    strength = {}
    for k in keypoints:
        at = tuple(np.rint(k.pt).astype(int))
        strength[at] = max(strength.get(at, 0), k.response)
    responses = [strength[tuple(p)] for p in points]
    assert responses == sorted(responses, reverse=True)
    everywhere = protocol_points(Scene("s", image, image, np.ones_like(valid)))
    assert {tuple(p) for p in points} < {tuple(p) for p in everywhere}


def test_points_do_not_depend_on_threads() -> None:
    scene = Scene("s", texture(6), texture(6), np.ones((160, 200), bool))
    before = cv2.getNumThreads()
    try:
        found = []
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            found.append(protocol_points(scene))
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(*found)


def test_images_without_points() -> None:
    flat = np.full((160, 200), 90, np.uint8)
    assert protocol_points(Scene("flat", flat, flat, flat > 0)).shape == (0, 2)
    small = texture(0, 63, 200)
    assert protocol_points(Scene("small", small, small, small >= 0)).shape == (0, 2)
    with pytest.raises(DataError, match="no keypoint"):
        load_scene_pairs([])


def test_each_point_gives_one_matching_and_one_other_pair(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", 7)
    write_pair(tmp_path, "1", 8)
    scenes = load_scene_pairs(tmp_path)
    pairs = sample_patch_pairs(scenes, name="x", seed=3)
    assert len(pairs) == 2 * len(scenes)
    np.testing.assert_array_equal(pairs.labels, [True, False] * len(scenes))
    np.testing.assert_array_equal(pairs.vis[0::2], pairs.vis[1::2])
    np.testing.assert_array_equal(pairs.vis[0::2], 255 - pairs.ir[0::2])
    assert (pairs.vis[1::2] != 255 - pairs.ir[1::2]).any(axis=(1, 2)).all()
    x, y = scenes.points[0]
    np.testing.assert_array_equal(pairs.vis[0], scenes.scenes[0].vis[y - 32 : y + 32, x - 32 : x + 32])


def test_more_negatives_leave_the_protocols_pairs_in_place(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", 7)
    write_pair(tmp_path, "1", 8)
    scenes = load_scene_pairs(tmp_path, max_points=30)
    one, four = (sample_patch_pairs(scenes, max_pairs=20, negatives=n, seed=3) for n in (1, 4))
    assert (len(one), len(four)) == (40, 100)
    np.testing.assert_array_equal(four.labels, [True, False, False, False, False] * 20)
    assert protocol_digest(four) == digest(one)
    others = four.ir.reshape(20, 5, -1)[:, 1:]
    assert len({patches.tobytes() for patches in others.reshape(80, -1)}) > 15
    assert any((others[:, 0] != others[:, i]).any() for i in (1, 2, 3))
    with pytest.raises(DataError, match="negatives"):
        sample_patch_pairs(scenes, negatives=0)


def test_pairs_know_their_images(tmp_path: Path) -> None:
    write_pair(tmp_path, "b", 7)
    write_pair(tmp_path, "a", 8)
    scenes = load_scene_pairs(tmp_path, max_points=10)
    pairs = sample_patch_pairs(scenes, negatives=2)
    np.testing.assert_array_equal(pairs.images, np.repeat(["a", "b"], 30))
    inside = scenes.scenes[1].vis.tobytes()
    assert pairs.vis[pairs.images == "b"][0, 0].tobytes() in inside
    save_patch_npz(tmp_path / "set.npz", pairs)
    np.testing.assert_array_equal(load_patch_npz(tmp_path / "set.npz").images, pairs.images)
    drawn = load_patch_npz(tmp_path / "set.npz", max_pairs=3)
    rows = [next(i for i in range(60) if (pairs.vis[i] == patch).all()) for patch in drawn.vis]
    np.testing.assert_array_equal(drawn.images, pairs.images[rows])
    np.savez(tmp_path / "set.npz", vis=pairs.vis, ir=pairs.ir, labels=pairs.labels, images=np.arange(59))
    with pytest.raises(DataError, match=r"images must be \(60,\)"):
        load_patch_npz(tmp_path / "set.npz")


def test_contrast_ignores_noise_and_finds_what_is_there() -> None:
    random = np.random.default_rng(0)
    flat, saturated, noise = np.full((64, 64), 90), np.full((64, 64), 255), random.normal(90, 6, (64, 64))
    blocks = 90 + np.kron(random.normal(0, 1.5, (8, 8)), np.ones((8, 8)))  # as JPEG leaves them
    scene = flat.copy()
    scene[30:] += 10
    patches = np.stack([flat, saturated, noise, blocks, scene]).round().astype(np.uint8)
    found = datasets.contrast(patches)
    assert found[:2].tolist() == [0, 0]
    assert (found < datasets.LEAST_CONTRAST).tolist() == [True, True, True, True, False]
    assert found[4] == pytest.approx(5, abs=0.3)
    assert datasets.contrast(patches[:0]).shape == (0,)


def test_contrast_of_scenes_is_that_of_their_second_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    image = texture(5)
    scene = Scene("s", 255 - image // 2, image, np.ones(image.shape, bool))
    scenes = load_points(scene, 9)
    whole = scenes.contrast()
    np.testing.assert_array_equal(whole, datasets.contrast(scenes.patches(np.arange(9), "ir")))
    monkeypatch.setattr(datasets, "_CHUNK", 4)
    np.testing.assert_array_equal(scenes.contrast(), whole)
    assert load_points(scene, 0).contrast().shape == (0,)


def load_points(scene: Scene, count: int) -> ScenePairs:
    points = protocol_points(scene)[:count]
    return ScenePairs((scene,), points, np.zeros(len(points), np.int64))


def test_a_draw_is_seeded_and_its_partners_come_from_it(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", 9)
    write_pair(tmp_path, "1", 10)
    scenes = load_scene_pairs(tmp_path)
    first, again, other = (sample_patch_pairs(scenes, max_pairs=12, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 24
    assert digest(first) == digest(again) != digest(other)
    drawn = {patch.tobytes() for patch in first.ir[0::2]}
    assert all(patch.tobytes() in drawn for patch in first.ir[1::2])
    assert len(sample_patch_pairs(scenes, max_pairs=10**6)) == 2 * len(scenes)
    with pytest.raises(DataError, match="max_pairs"):
        sample_patch_pairs(scenes, max_pairs=0)


def test_partners_are_never_nearly_the_same_place() -> None:
    # 30 points within 3 pixels of each other and one far away: it is everyone's partner.
    image = texture(11)
    cluster = np.stack([100 + np.arange(30) % 3, 80 + np.arange(30) % 2], axis=1)
    points = np.concatenate([cluster, [[50, 60]]]).astype(np.int64)
    scenes = ScenePairs((Scene("s", image, image, image >= 0),), points, np.zeros(31, np.int64))
    pairs = sample_patch_pairs(scenes)
    np.testing.assert_array_equal(pairs.ir[1::2][:30], np.repeat(pairs.ir[60:61], 30, axis=0))
    near = ScenePairs(scenes.scenes, points[:30], np.zeros(30, np.int64))
    with pytest.raises(DataError, match=f"{MIN_NEGATIVE_DISTANCE:g} pixels"):
        sample_patch_pairs(near)


def test_partners_are_spread_evenly() -> None:
    points = np.stack([40 + 10 * np.arange(8), np.full(8, 60)], axis=1)
    draws = [
        datasets.draw_partners(points, np.zeros(8, np.int64), np.random.RandomState(seed), "x")
        for seed in range(350)
    ]
    counts = np.bincount(np.stack(draws)[:, 0], minlength=8)
    assert counts[0] == 0
    # 50 each is expected; five standard deviations are 33.
    assert (abs(counts[1:] - 50) < 33).all()


def test_registered_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", 0)
    cv2.imwrite(str(tmp_path / "0_nir.png"), texture(0, 100, 100))
    with pytest.raises(DataError, match="one size"):
        load_scene_pairs(tmp_path)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", 0)
    (tmp_path / "0_nir.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"0_nir\.png"):
        load_scene_pairs(tmp_path)


# --- patch files --------------------------------------------------------------------------------


def random_pairs(n: int, seed: int = 0) -> PatchPairs:
    random = np.random.default_rng(seed)
    vis, ir = random.integers(0, 256, (2, n, 64, 64), dtype=np.uint8)
    return PatchPairs("x", vis, ir, np.arange(n) % 3 == 0)


def write_sos(folder: Path, pairs: PatchPairs, scale: float | None = None) -> Path:
    patches = np.stack([pairs.vis, pairs.ir], axis=1).reshape(-1, 1, 64, 64)
    np.save(folder / "x_sos.npy", patches if scale is None else patches * np.float32(scale))
    ids = [f"{i} 0\n{i if same else i + 1000} 0\n" for i, same in enumerate(pairs.labels)]
    (folder / "x_info.txt").write_text("".join(ids))
    return folder / "x_sos.npy"


@pytest.mark.parametrize("scale", [None, 1.0, 1 / 255])
def test_sos_files_give_back_their_pairs(tmp_path: Path, scale: float | None) -> None:
    pairs = random_pairs(9)
    read = load_sos_patches(write_sos(tmp_path, pairs, scale))
    assert read.name == "x"
    assert read.vis.dtype == np.uint8
    assert digest(read) == digest(pairs)
    drawn = load_sos_patches(tmp_path / "x_sos.npy", max_pairs=2, seed=1)
    assert drawn.labels.sum() == 2
    assert len(drawn) == 4
    rows = [next(i for i in range(9) if (pairs.vis[i] == patch).all()) for patch in drawn.vis]
    assert rows == sorted(rows)
    np.testing.assert_array_equal(drawn.ir, pairs.ir[rows])
    np.testing.assert_array_equal(drawn.labels, pairs.labels[rows])


def test_npz_files_give_back_their_pairs(tmp_path: Path) -> None:
    pairs = random_pairs(5)
    save_patch_npz(tmp_path / "set.npz", pairs)
    read = load_patch_npz(tmp_path / "set.npz")
    assert read.name == "set"
    assert digest(read) == digest(pairs)
    assert len(load_patch_npz(tmp_path / "set.npz", max_pairs=1)) == 2
    np.savez(tmp_path / "f.npz", vis=pairs.vis[:, None] / 255, ir=pairs.ir / 255.0, labels=pairs.labels * 1.0)
    assert digest(load_patch_npz(tmp_path / "f.npz")) == digest(pairs)


def test_dark_integer_patches_are_not_taken_for_fractions(tmp_path: Path) -> None:
    pairs = random_pairs(2)
    np.savez(tmp_path / "d.npz", vis=pairs.vis % 2 * np.int64(1), ir=pairs.ir, labels=pairs.labels)
    np.testing.assert_array_equal(load_patch_npz(tmp_path / "d.npz").vis, pairs.vis % 2)


def test_bad_patch_files(tmp_path: Path) -> None:
    pairs = random_pairs(4)
    path = write_sos(tmp_path, pairs)
    (tmp_path / "x_info.txt").write_text("1\n1\n2\n")
    with pytest.raises(DataError, match="3 ids"):
        load_sos_patches(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot read"):
        load_sos_patches(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot read"):
        load_sos_patches(path)
    (tmp_path / "y_sos.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"y_info\.txt"):
        find_patch_sources(tmp_path / "y_sos.npy")
    npz = tmp_path / "z.npz"
    for arrays, word in (
        ({"vis": pairs.vis, "ir": pairs.ir}, "lacks labels"),
        ({"vis": pairs.vis, "ir": pairs.ir, "labels": [0, 1, 2, 3]}, "labels must be"),
        ({"vis": pairs.vis, "ir": pairs.ir[:2], "labels": pairs.labels}, "must both be"),
        ({"vis": pairs.vis, "ir": pairs.ir, "labels": pairs.labels[:2]}, "labels must be"),
        ({"vis": pairs.vis * np.nan, "ir": pairs.ir, "labels": pairs.labels}, "grey values"),
        ({"vis": pairs.vis * 3.0, "ir": pairs.ir, "labels": pairs.labels}, "grey values"),
        ({"vis": pairs.vis.astype(str), "ir": pairs.ir, "labels": pairs.labels}, "numbers"),
        ({"vis": np.array([{}]), "ir": pairs.ir, "labels": pairs.labels}, "cannot read"),
    ):
        np.savez(npz, **arrays)
        with pytest.raises(DataError, match=word):
            load_patch_npz(npz)
    for content in (b"", b"PK\x03\x04 no zip", npz.read_bytes()[:300]):
        npz.write_bytes(content)
        with pytest.raises(DataError, match="cannot read"):
            load_patch_npz(npz)
    with pytest.raises(DataError, match="cannot read"):
        load_patch_npz(tmp_path / "none.npz")


HEADER = "type,rgb,rgb_x,rgb_y,nir,nir_x,nir_y\n"


def test_csv_lists(tmp_path: Path) -> None:
    write_pair(tmp_path / "water", "0000", 12)
    image = texture(12)
    start = "0000_rgb.tiff,60,70,0000_nir.tiff"
    rows = f"positive,{start},60,70\nnegative,{start},168,128\n"
    (tmp_path / "water.csv").write_text(HEADER + rows)
    pairs = load_csv_patches(tmp_path / "water.csv")
    assert pairs.name == "water"
    np.testing.assert_array_equal(pairs.labels, [True, False])
    np.testing.assert_array_equal(pairs.vis[1], image[70 - 32 : 70 + 32, 60 - 32 : 60 + 32])
    np.testing.assert_array_equal(pairs.ir[1], 255 - image[128 - 32 : 160, 168 - 32 : 200])
    assert pairs.images.tolist() == ["0000_rgb"] * 2
    # The list in a folder of lists, the images in a folder beside it or named.
    (tmp_path / "csv").mkdir()
    moved = (tmp_path / "water.csv").rename(tmp_path / "csv" / "water.csv")
    assert digest(load_csv_patches(moved)) == digest(pairs)
    assert digest(load_csv_patches(moved, tmp_path / "water")) == digest(pairs)
    assert len(load_csv_patches(moved, max_pairs=1)) == 2


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "columns"),
        ("a,b\n1,2\n", "columns"),
        (HEADER, "columns"),
        (HEADER + "maybe,0_rgb.png,60,70,0_nir.png,60,70\n", "line 2: type"),
        (HEADER + "positive,0_rgb.png,60\n", "line 2: fewer"),
        (HEADER + "positive,0_rgb.png,sixty,70,0_nir.png,60,70\n", "line 2"),
        (HEADER + "positive,0_rgb.png,nan,70,0_nir.png,60,70\n", "line 2"),
        (HEADER + "positive,0_rgb.png,31,70,0_nir.png,60,70\n", "not wholly inside"),
        (HEADER + "positive,0_rgb.png,60,70,0_nir.png,169,70\n", "not wholly inside"),
        (HEADER + "positive,0_rgb.png,-40,-40,0_nir.png,60,70\n", "not wholly inside"),
        (HEADER + "positive,0_rgb.png,60,70,1_nir.png,60,70\n", "no image 1_nir"),
        (HEADER + "positive,7_rgb.png,60,70,7_nir.png,60,70\n", "no image 7_rgb"),
    ],
)
def test_bad_csv_lists(tmp_path: Path, text: str, word: str) -> None:
    write_pair(tmp_path, "0", 13)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=word) as caught:
        load_csv_patches(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


# --- what an evaluation reads -------------------------------------------------------------------


def test_sources_of_every_kind(tmp_path: Path) -> None:
    write_pair(tmp_path / "scenes" / "water", "0", 14)
    write_pair(tmp_path / "scenes" / "field", "0", 15)
    (tmp_path / "scenes" / ".cache").mkdir()
    (tmp_path / "scenes" / "README.md").write_text("words")
    (tmp_path / "files").mkdir()
    write_sos(tmp_path / "files", random_pairs(4))
    save_patch_npz(tmp_path / "files" / "a.npz", random_pairs(4))
    assert [s.name for s in find_patch_sources(tmp_path / "scenes")] == ["field", "water"]
    assert [s.name for s in find_patch_sources(tmp_path / "scenes" / "water")] == ["water"]
    assert [s.name for s in find_patch_sources(tmp_path / "files")] == ["a", "x"]
    both = find_patch_sources([tmp_path / "files" / "x_sos.npy", tmp_path / "scenes" / "water"])
    assert [s.name for s in both] == ["x", "water"]
    loaded = list(load_patch_sets([tmp_path / "scenes", tmp_path / "files"], max_pairs=2))
    assert [(p.name, len(p), int(p.labels.sum())) for p in loaded] == [
        (name, 4, 2) for name in ("field", "water", "a", "x")
    ]


def test_what_is_no_source_is_said_before_anything_is_read(tmp_path: Path) -> None:
    for path, word in ((tmp_path / "none", "no such file"), (tmp_path, "no patch pairs")):
        with pytest.raises(DataError, match=word):
            find_patch_sources(path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no file of patch pairs"):
        find_patch_sources(tmp_path / "a.txt")
    write_pair(tmp_path / "good", "0", 0)
    (tmp_path / "odd").mkdir()
    with pytest.raises(DataError, match=r"no image pairs in .*odd"):
        find_patch_sources(tmp_path)


def test_a_source_of_named_folders() -> None:
    pair = ImagePair("0", Path("v.png"), Path("i.png"))
    source = datasets.PatchSource("mine", Path(), (pair,))
    with pytest.raises(ImageError, match=r"v\.png"):
        source.load()


def test_warped_scenes_of_the_data_set() -> None:
    folder = SHARED / "vis-nir" / "oldbuilding"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    scenes = load_scene_pairs(find_image_pairs(folder)[:1])
    pairs = sample_patch_pairs(scenes, max_pairs=20)
    # Registered patches correlate, in size if not in sign.
    a, b = (
        np.stack([p - p.mean() for p in side.astype(float)]).reshape(40, -1) for side in (pairs.vis, pairs.ir)
    )
    correlation = np.abs((a * b).sum(1)) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    assert correlation[pairs.labels].mean() > correlation[~pairs.labels].mean() + 0.3
