"""What batches hold: the right patches, the right order, and the same ones for any number of processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import other_sensor, texture
from PIL import Image

from kglmatch.datasets import PatchPairs, Scene, ScenePairs, save_patch_npz
from kglmatch.errors import ConfigError, DataError
from kglmatch.training import Augmentation, DataSource, PatchSampler, TrainingConfig, TrainingSet, simulate
from kglmatch.training import sampling as sampling_module
from kglmatch.training.augmentation import Draws
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


def sampler(sources, **options):
    """Of one set of scenes, or of a list of sources."""
    sources = sources if isinstance(sources, list) else [TrainingSet(sources)]
    return PatchSampler(sources, **{"batch_size": 20, "patch_size": 32, "augmentation": NONE, **options})


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


def test_same_place_is_exact_far_from_the_first_pixel():
    scene = Scene("a", *[np.zeros((16, 12000), np.uint8)] * 2, np.ones((16, 12000), bool))
    steps = [(0, 0), (5, 6), (6, 5), (8, 0), (7, 3), (0, 8), (-8, 0), (4, -7), (3, 7), (5, 7)]
    points = np.array([9990, 9990]) + np.array(steps)
    drawn = sampler(ScenePairs((scene,), points, np.zeros(10, np.int64), 8), batch_size=10, patch_size=8)
    order = drawn.rows(0)
    apart = np.linalg.norm(points[order][:, None] - points[order][None], axis=2)
    assert np.array_equal(drawn._same_place(torch.from_numpy(order)).numpy(), apart < 8)
    # 7.81 and 8.06 apart are told apart; matrix products of float32 do not.
    assert (apart == 8).any() and ((apart > 7.7) & (apart < 8)).any() and ((apart > 8) & (apart < 8.3)).any()
    floats = torch.from_numpy(points[order]).float()
    by_products = torch.cdist(floats, floats, compute_mode="use_mm_for_euclid_dist")
    assert not np.array_equal((by_products < 8).numpy(), apart < 8)


def test_a_window_beyond_the_image_repeats_its_edge():
    image = np.full((40, 40), 100, np.uint8)
    image[:, -1] = 200
    scene = Scene("a", image, image, np.ones(image.shape, bool))
    drawn = sampler(ScenePairs((scene,), np.array([[24, 20]]), np.zeros(1, np.int64), 32))
    first = torch.tensor([0])
    windows = drawn._windows(drawn._vis, drawn._offset[first], first, 48)[0, 0] * 255
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
    (training,), (validation,) = load_training_data(config, 32)
    assert [scene.name for scene in training.pairs.scenes] == ["0000", "0001", "0002"]
    assert training.pairs.patch_size == 32 and len(training.pairs) <= 120 and training.colours is None
    assert validation.vis.shape == validation.ir.shape == (12, 32, 32) and validation.name == folder.name
    # Each has its partners, 6 by default, never itself.
    assert validation.partners.shape == (12, 6)
    assert (validation.partners != np.arange(12)[:, None]).all() and validation.partners.max() < 12
    # A matching pair shows one place: the visible patch is in the held-out image.
    image = cv2.imread(str(folder / "0003_rgb.png"), cv2.IMREAD_GRAYSCALE)
    everywhere = np.lib.stride_tricks.sliding_window_view(image, (32, 32))
    assert (everywhere == validation.vis[0]).all(axis=(2, 3)).any()


def test_matching_pairs_of_a_patch_file_are_trained_on(tmp_path):
    vis = grey(np.stack([texture(32, 32, i) for i in range(12)]))
    labels = np.arange(12) % 3 > 0  # 8 of them match
    save_patch_npz(tmp_path / "set.npz", PatchPairs("set", vis, 255 - vis, labels))
    config = TrainingConfig(data=str(tmp_path / "set.npz"), validation_images=3)
    (training,), (validation,) = load_training_data(config, 32)
    assert len(training.pairs) == 5 and len(validation.vis) == 3
    batch = sampler([training], batch_size=5)
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


def test_points_whose_second_patch_shows_nothing_are_left_out(tmp_path):
    vis = texture(150, 130)
    ir = other_sensor(vis)
    ir[:, :90] = 0.5 + 0.004 * np.random.default_rng(0).standard_normal((130, 90))
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}_rgb.png"), grey(vis))
        cv2.imwrite(str(tmp_path / f"{i}_nir.png"), grey(ir))
    config = TrainingConfig(data=str(tmp_path), validation_images=1)
    (everything,), _ = load_training_data(config, 32)
    (rest,), (held_out,) = load_training_data(dataclasses.replace(config, least_contrast=2.0), 32)
    left = everything.pairs.points[:, 0] + 16 <= 88  # wholly in the flat part
    assert left.any() and not (rest.pairs.points[:, 0] + 16 <= 88).any()
    kept = {tuple(p) for p in rest.pairs.points.tolist()}
    assert kept >= {tuple(p) for p in everything.pairs.points[everything.pairs.points[:, 0] >= 100].tolist()}
    rows = np.arange(len(rest.pairs))
    assert rest.pairs.patches(rows, "ir").std(axis=(1, 2)).min() > 1.9
    assert len(held_out.vis) > len(rest.pairs)  # validation keeps them all
    with pytest.raises(DataError, match="leaves 0 points to train on; 2 is the least"):
        load_training_data(dataclasses.replace(config, least_contrast=200.0), 32)


def test_a_simulated_source_holds_out_nothing_by_default():
    config = TrainingConfig.from_dict({"data": [{"path": "a"}, {"path": "b", "simulated": True}]})
    assert [source.validation_images for source in config.sources] == [6, 0]
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_wrong_data_sources_are_errors():
    for wrong, said in (
        ({"weight": 0.0}, "weight of a data source must be above 0, got 0.0"),
        ({"weight": float("inf")}, "weight"),
        ({"validation_images": -1}, "validation_images must be at least 0, got -1"),
        ({"simulated": True, "validation_images": 6}, "must be 0 for a simulated source, got 6"),
    ):
        with pytest.raises(ConfigError, match=said):
            DataSource("a", **wrong)
    for data, said in (
        ([], "data must be a path or a list of tables"),
        (["a"], "data must be a path or a list of tables"),
        ([{"weight": 1.0}], r"a \[\[data\]\] table lacks `path`"),
        ([{"path": "a", "share": 1}], r"\[\[data\]\] has unknown keys share; known are path, weight"),
        ([{"path": "a", "weight": "2"}], "weight must be float, got '2'"),
        ([{"path": "a", "validation_images": 0}], "no data source holds out validation images"),
        ([{"path": "a"}, {"path": "a", "weight": 2}], "a is listed twice"),
        (7, "data must be a path or a list of tables, got 7"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            TrainingConfig.from_dict({"data": data})
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="data must be a path or a tuple of DataSource"):
        TrainingConfig(data=Path("a"))


# --- several sources --------------------------------------------------------------------------


def parts(drawn, steps):
    """The source of each half of each batch."""
    bounds = [first for first, _ in drawn._ranges]
    found = []
    for step in range(steps):
        for half in np.split(drawn.rows(step), 2):
            source = np.searchsorted(bounds, half, side="right") - 1
            assert len(set(source)) == 1
            found.append(int(source[0]))
    return found


def test_the_shares_of_sources_follow_their_weights(scenes):
    sources = [TrainingSet(scenes, weight) for weight in (3.0, 1.0, 2.0)]
    drawn = sampler(sources)
    order = parts(drawn, 60)
    assert [order.count(source) for source in range(3)] == [60, 20, 40]
    for n in range(1, 121):  # at any time, not only at the end
        for source, share in enumerate((3 / 6, 1 / 6, 2 / 6)):
            assert abs(order[:n].count(source) - share * n) <= 1
    assert len(sampler(sources, batch_size=21).rows(0)) == 20


def test_an_epoch_of_each_source_visits_each_point_once(scenes):
    drawn = sampler([TrainingSet(scenes, 2.0), TrainingSet(scenes, 1.0)], batch_size=30)
    halves = [half for step in range(9) for half in np.split(drawn.rows(step), 2)]
    for source, epochs in ((0, 2), (1, 1)):
        first, end = drawn._ranges[source]
        own = [half for half in halves if first <= half[0] < end]
        assert len(own) == 6 * epochs
        for epoch in range(epochs):
            rows = np.concatenate(own[6 * epoch : 6 * epoch + 6])
            assert sorted(rows) == list(range(first, end))


def test_a_batch_is_never_larger_than_twice_the_smallest_source(scenes):
    few = ScenePairs(scenes.scenes, scenes.points[:7], scenes.scene_index[:7], 32)
    drawn = sampler([TrainingSet(scenes), TrainingSet(few)])
    assert drawn.batch_size == 14 and len(drawn.batch(5).vis) == 14


@pytest.fixture(scope="module")
def mixed(scenes):
    """A real source, and a simulated one of colour images."""
    rng = np.random.default_rng(1)
    colours = tuple(
        np.stack([grey(texture(*scene.vis.shape[::-1], seed)) for seed in rng.integers(99, size=3)], 2)
        for scene in scenes.scenes
    )
    greys = [cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY) for colour in colours]
    made = tuple(Scene(s.name, g, g, s.valid) for s, g in zip(scenes.scenes, greys, strict=True))
    pairs = ScenePairs(made, scenes.points, scenes.scene_index, 32)
    return [TrainingSet(scenes, 1.0), TrainingSet(pairs, 1.0, colours)]


def test_a_batch_of_several_sources_depends_on_seed_and_step_alone(mixed):
    options = {"augmentation": Augmentation(), "seed": 5}
    wanted = sampler(mixed, **options).batch(7)
    other = sampler(mixed, **options)
    for step in (0, 11, 7):
        again = other.batch(step)
    assert torch.equal(wanted.vis, again.vis) and torch.equal(wanted.ir, again.ir)
    assert torch.equal(wanted.same_place, again.same_place)
    assert not torch.equal(wanted.ir, sampler(mixed, augmentation=Augmentation(), seed=6).batch(7).ir)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_a_batch_of_several_sources(mixed, size):
    options = {"augmentation": Augmentation(), "seed": 1}
    whole = sampler(mixed, **options).batch(3)
    shared = [sampler(mixed, processes=Processes(rank, size), **options).batch(3) for rank in range(size)]
    for modality in ("vis", "ir"):
        joined = torch.cat([getattr(part, modality) for part in shared])
        assert torch.allclose(joined, getattr(whole, modality), atol=1e-5)


def test_a_simulated_source_shows_grey_and_what_no_camera_saw(mixed):
    drawn = sampler(mixed)
    batch, rows = drawn.batch(2), drawn.rows(2)
    first, end = drawn._ranges[1]
    simulated = (rows >= first) & (rows < end)
    assert simulated.sum() == 10
    vis, ir = ((side[:, 0] * 255).round().numpy().astype(np.uint8) for side in (batch.vis, batch.ir))
    assert np.array_equal(vis[simulated], mixed[1].pairs.patches(rows[simulated] - first, "vis"))
    assert np.array_equal(ir[~simulated], mixed[0].pairs.patches(rows[~simulated], "ir"))
    difference = np.abs(vis[simulated].astype(int) - ir[simulated]).mean(axis=(1, 2))
    assert difference.min() > 5 and ir[simulated].std(axis=(1, 2)).min() > 5
    # Another time the same place is seen by another sensor.
    places = dict(zip(rows[simulated], ir[simulated], strict=True))
    for step in range(3, 30):
        for row, patch in zip(drawn.rows(step), (drawn.batch(step).ir[:, 0] * 255).numpy(), strict=True):
            if row in places:
                assert np.abs(patch - places[row]).mean() > 3
                return
    pytest.fail("no place came twice")


def test_the_simulated_sensor_depends_on_its_draws_and_its_structure_on_the_image():
    colour = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    colour[0] = colour[0, :1]  # grey
    colour[1] = 0.5  # flat

    def seen(seed, rows=slice(0, 6)):
        draws = Draws(torch.Generator().manual_seed(seed), 6, rows)
        return simulate(colour[rows], draws)

    first = seen(3)
    assert first.shape == (6, 1, 24, 24) and first.isfinite().all() and 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, seen(3)) and not torch.allclose(first, seen(4), atol=0.05)
    assert torch.allclose(seen(3, slice(2, 5)), first[2:5], atol=1e-5)
    chosen = torch.tensor([True, False, True, True, False, False])
    draws = Draws(torch.Generator().manual_seed(3), 6, slice(0, 6)).of(chosen)
    assert torch.allclose(simulate(colour[chosen], draws), first[chosen], atol=1e-5)
    assert (first[0] - colour[0, :1]).abs().mean() > 0.02


@pytest.mark.parametrize("channels", ["grey", "grey-alpha", "rgb", "rgba"])
def test_a_simulated_source_is_a_folder_of_images(folder, tmp_path_factory, channels):
    colours = tmp_path_factory.mktemp("colours")
    planes = np.stack([grey(texture(100, 90, seed=i)) for i in range(4)], 2)
    shown = {"grey": planes[:, :, 0], "grey-alpha": planes[:, :, :2], "rgb": planes[:, :, :3], "rgba": planes}
    name = "a_rgb.png" if channels == "rgba" else "a_rgb.tif"
    Image.fromarray(shown[channels]).save(colours / name)
    Image.fromarray(planes[:, :, 1]).save(colours / "a_nir.png")  # another sensor's, not asked for
    data = (DataSource(str(folder), 1.0, 1), DataSource(str(colours), 1.0, 0, simulated=True))
    config = TrainingConfig(data=data, max_points=40)
    (_, simulated), (validation,) = load_training_data(config, 32)
    assert validation.name == folder.name and len(simulated.pairs.scenes) == 1
    expected = planes[:, :, :3] if "rgb" in channels else planes[:, :, [0, 0, 0]]
    assert np.array_equal(simulated.colours[0], expected)
    assert np.array_equal(simulated.pairs.scenes[0].vis, cv2.cvtColor(expected.copy(), cv2.COLOR_RGB2GRAY))


def test_a_simulated_source_of_16_bits_is_an_error(folder, tmp_path_factory):
    deep = tmp_path_factory.mktemp("deep")
    cv2.imwrite(str(deep / "a.png"), np.zeros((90, 100, 3), np.uint16))
    data = (DataSource(str(folder), 1.0, 1), DataSource(str(deep), 1.0, 0, simulated=True))
    with pytest.raises(DataError, match="takes 8-bit images, got uint16"):
        load_training_data(TrainingConfig(data=data), 32)
