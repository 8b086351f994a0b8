"""What batches hold: the right patches, the right order, and the same ones for any number of processes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import other_sensor, texture

from kglmatch.datasets import PatchPairs, Scene, ScenePairs, save_patch_npz
from kglmatch.errors import ConfigError, DataError
from kglmatch.training import Augmentation, PatchSampler, TrainingConfig
from kglmatch.training import sampling as sampling_module
from kglmatch.training.data import load_training_data
from kglmatch.training.parallel import Processes

NONE = Augmentation.none()


def grey(image):
    return np.rint(image * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes():
    """Three scenes of different sizes, with 30 points each."""
    rng = np.random.default_rng(0)
    made, points = [], []
    for i, (width, height) in enumerate(((96, 80), (70, 110), (120, 64))):
        image = texture(width, height, seed=i)
        made.append(Scene(str(i), grey(image), grey(other_sensor(image)), np.ones((height, width), bool)))
        points.append(np.stack([rng.integers(16, width - 15, 30), rng.integers(16, height - 15, 30)], 1))
    return ScenePairs(tuple(made), np.concatenate(points), np.repeat(np.arange(3), 30), 32)


def sampler(scenes, **options):
    return PatchSampler(scenes, **{"batch_size": 20, "patch_size": 32, "augmentation": NONE, **options})


def test_patches_are_those_of_the_data_set(scenes):
    drawn = sampler(scenes)
    batch, rows = drawn.batch(2), drawn.rows(2)
    for modality in ("vis", "ir"):
        patches = getattr(batch, modality)
        assert patches.shape == (20, 1, 32, 32) and patches.dtype == torch.float32
        assert np.array_equal((patches[:, 0] * 255).round().numpy(), scenes.patches(rows, modality))
    assert batch.rows == slice(0, 20)


def test_an_epoch_visits_each_point_once_and_the_next_one_in_another_order(scenes):
    drawn = sampler(scenes, batch_size=30)
    assert len(drawn) == 3
    epochs = [np.concatenate([drawn.rows(step) for step in range(e * 3, e * 3 + 3)]) for e in (0, 1)]
    assert all(sorted(rows) == list(range(90)) for rows in epochs)
    assert not np.array_equal(*epochs)


def test_a_batch_depends_on_seed_and_step_alone(scenes):
    options = {"augmentation": Augmentation(), "seed": 5}
    first, second = sampler(scenes, **options), sampler(scenes, **options)
    wanted = first.batch(7)
    for step in (0, 11, 7):
        again = second.batch(step)
    assert torch.equal(wanted.vis, again.vis) and torch.equal(wanted.ir, again.ir)
    other = sampler(scenes, augmentation=Augmentation(), seed=6).batch(7)
    assert not torch.equal(wanted.vis, other.vis)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_batch_that_one_alone_would_have(scenes, size):
    options = {"augmentation": Augmentation(), "seed": 1}
    whole = sampler(scenes, **options).batch(3)
    parts = [sampler(scenes, processes=Processes(rank, size), **options).batch(3) for rank in range(size)]
    for modality in ("vis", "ir"):
        joined = torch.cat([getattr(part, modality) for part in parts])
        assert torch.allclose(joined, getattr(whole, modality), atol=1e-6)
    assert all(torch.equal(part.same_place, whole.same_place) for part in parts)
    assert [part.first for part in parts] == [20 // size * rank for rank in range(size)]
    with pytest.raises(ConfigError, match="20 pairs cannot be shared evenly by 3 processes"):
        sampler(scenes, processes=Processes(0, 3))


def test_same_place_is_near_in_one_image():
    image = grey(texture(100, 60))
    scene = Scene("a", image, image, np.ones(image.shape, bool))
    points = np.array([[20, 20], [26, 20], [29, 20], [20, 20], [60, 30]])
    pairs = ScenePairs((scene, scene), points, np.array([0, 0, 0, 1, 0]), 32)
    drawn = sampler(pairs, batch_size=5, min_distance=8.0)
    rows = drawn.rows(0)
    near = {(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (0, 1), (1, 0), (1, 2), (2, 1)}
    order = rows.argsort()
    found = drawn.batch(0).same_place.numpy()[np.ix_(order, order)]
    assert {(int(i), int(j)) for i, j in zip(*found.nonzero(), strict=True)} == near
    everyone = sampler(pairs, batch_size=5, min_distance=0.0).batch(0).same_place
    assert torch.equal(everyone, torch.eye(5, dtype=torch.bool))


def test_a_window_beyond_the_image_repeats_its_edge():
    image = np.full((40, 40), 100, np.uint8)
    image[:, -1] = 200
    scene = Scene("a", image, image, np.ones(image.shape, bool))
    drawn = sampler(ScenePairs((scene,), np.array([[24, 20]]), np.zeros(1, np.int64), 32))
    windows = drawn._windows(drawn._vis, torch.tensor([0]), 48)[0, 0] * 255
    assert windows.shape == (48, 48)
    assert (windows[:, :39] == 100).all() and (windows[:, 39:] == 200).all()


def test_a_batch_is_never_larger_than_the_data(scenes):
    assert sampler(scenes, batch_size=1000).batch_size == 90
    assert len(sampler(scenes, batch_size=1000).batch(4).vis) == 90


def test_images_that_do_not_fit_on_the_gpu_stay_in_memory(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert sampling_module._fits(500, cuda) and not sampling_module._fits(501, cuda)
    assert sampling_module._fits(10**15, torch.device("cpu"))


# --- what a run reads -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        image = texture(150, 130, seed=i)
        cv2.imwrite(str(tmp_path / f"{i:04}_rgb.png"), grey(image))
        cv2.imwrite(str(tmp_path / f"{i:04}_nir.png"), grey(other_sensor(image)))
    return tmp_path


def test_the_last_images_are_held_out(folder):
    config = TrainingConfig(data=str(folder), validation_images=1, validation_pairs=12, max_points=40)
    training, validation = load_training_data(config, 32)
    assert [scene.name for scene in training.scenes] == ["0000", "0001", "0002"]
    assert training.patch_size == 32 and len(training) <= 120
    assert validation.vis.shape == (24, 32, 32) and validation.labels.sum() == 12
    # A matching pair shows one place: the visible patch is in the held-out image.
    image = cv2.imread(str(folder / "0003_rgb.png"), cv2.IMREAD_GRAYSCALE)
    everywhere = np.lib.stride_tricks.sliding_window_view(image, (32, 32))
    assert (everywhere == validation.vis[0]).all(axis=(2, 3)).any()


def test_matching_pairs_of_a_patch_file_are_trained_on(tmp_path):
    vis = grey(np.stack([texture(32, 32, i) for i in range(12)]))
    labels = np.arange(12) % 3 > 0  # 8 of them match
    save_patch_npz(tmp_path / "set.npz", PatchPairs("set", vis, 255 - vis, labels))
    config = TrainingConfig(data=str(tmp_path / "set.npz"), validation_images=3)
    training, validation = load_training_data(config, 32)
    assert len(training) == 5 and validation.labels.sum() == 3
    batch = sampler(training, batch_size=5)
    assert np.array_equal((batch.batch(0).ir[:, 0] * 255).round().numpy(), (255 - vis[labels])[batch.rows(0)])
    with pytest.raises(DataError, match="patches of 32 x 32 pixels, but the network takes 64 x 64"):
        load_training_data(config, 64)


def test_too_little_data_is_an_error(folder):
    with pytest.raises(DataError, match="4 image pairs, and 4 are held out"):
        load_training_data(TrainingConfig(data=str(folder), validation_images=4), 64)
    with pytest.raises(DataError, match="no such file or folder"):
        load_training_data(TrainingConfig(data=str(folder / "none")), 64)
    two = folder / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        for file in folder.glob("*.png"):
            (two / name / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"several sets \(a, b\)"):
        load_training_data(TrainingConfig(data=str(two)), 64)
