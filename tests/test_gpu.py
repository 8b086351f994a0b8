"""Every path on CUDA against the same on the CPU: `pytest -m gpu`, about a minute on a GPU.

Each test has a twin that runs the same body on the CPU, so that the bodies themselves are tested everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import once, other_sensor, texture
from thin_network import make_thin, write_image_pairs

from kglmatch import Features, Matcher
from kglmatch.backends import onnx as onnx_backend
from kglmatch.geometry import corner_error

N = 6
# Largest differences to float32 on the CPU: descriptors, whose numbers are about 0.09, and scores.
DESCRIPTOR_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
SCORE_ERROR = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
KEYPOINTS = 16
SIZE = (144, 128)  # of the scene, pixels


@pytest.fixture(scope="module", params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device here")
    return request.param


@pytest.fixture(scope="module")
def patches() -> tuple[np.ndarray, np.ndarray]:
    """(N, 64, 64) uint8 of both sensors, row by row of the same place; none of them flat."""
    scenes = [texture(64, 64, seed) for seed in range(N)]
    return tuple(
        np.rint(np.stack([to(scene) for scene in scenes]) * 255).astype(np.uint8)
        for to in (np.asarray, other_sensor)
    )


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    vis = texture(*SIZE)
    return vis, other_sensor(vis)


@pytest.fixture(scope="module")
def on_device(device) -> Matcher:
    return Matcher.from_pretrained("kglnet-vis-nir", device=device, dtype="float32")


def largest(a, b) -> float:
    """Largest difference of two arrays or tensors, wherever they are."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def describe(by: Matcher, patches) -> list:
    return [by.describe(patches[0], "vis"), by.describe(patches[1], "ir")]


def same_matches(ours, theirs) -> float:
    """Share of the matches that both have."""
    pairs = [set(map(tuple, found.indices.tolist())) for found in (ours, theirs)]
    return len(pairs[0] & pairs[1]) / max(1, len(pairs[0] | pairs[1]))


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_describe_and_score(device, dtype, matcher, patches):
    if device == "cpu" and dtype == "float16":
        pytest.skip("test_torch_backend.py has float16 on the CPU")
    by = Matcher.from_pretrained("kglnet-vis-nir", device=device, dtype=dtype)
    assert by.device.startswith(device) and by.backend.dtype == dtype
    ours, theirs = (describe(each, patches) for each in (by, matcher))
    for a, b in zip(ours, theirs, strict=True):
        assert a.maps.device.type == device
        assert largest(a.descriptors, b.descriptors) < DESCRIPTOR_ERROR[dtype]
    assert largest(by.score(*ours), matcher.score(*theirs)) < SCORE_ERROR[dtype]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_any_number_of_patches_in_batches(device, n, matcher, patches):
    by = Matcher.from_pretrained("kglnet-vis-nir", device=device, dtype="float32", batch_size=2)
    ours = by.describe(patches[0][:n], "vis"), by.describe(patches[1][:n], "ir")
    assert len(ours[0]) == n
    expected = matcher.describe(patches[0][:n], "vis").descriptors
    assert largest(ours[0].descriptors, expected) < DESCRIPTOR_ERROR["float32"]
    assert by.score(*ours).shape == (n,)


def test_tensors_stay_on_the_device(device, on_device, patches):
    given = torch.from_numpy(patches[0]).to(device)
    found = on_device.describe(given, "vis")
    assert isinstance(found.descriptors, torch.Tensor) and found.descriptors.device.type == device
    assert largest(found.descriptors, on_device.describe(patches[0], "vis").descriptors) < 1e-6
    assert found[[3, 1]].maps.device.type == device


@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"decide": "descriptor"}, {"decide": "metric"}])
def test_match(device, on_device, matcher, patches, options):
    ours, theirs = (by.match(*patches, **options) for by in (on_device, matcher))
    assert len(theirs) >= N // 2
    assert same_matches(ours, theirs) >= 0.9


def test_features_travel_by_file(device, on_device, matcher, patches, tmp_path):
    on_device.describe(patches[0], "vis").save(tmp_path / "vis.npz")
    loaded = Features.load(tmp_path / "vis.npz")
    ir = matcher.describe(patches[1], "ir")
    assert largest(matcher.score(loaded, ir), matcher.score(*patches)) < SCORE_ERROR["float32"]


# --- whole images ---------------------------------------------------------------------------------


def test_match_images(device, on_device, matcher, scene):
    ours, theirs = (by.match_images(*scene, max_keypoints=KEYPOINTS) for by in (on_device, matcher))
    assert len(theirs) > 3
    assert same_matches(ours, theirs) >= 0.8


def test_match_many(device, on_device, scene):
    single = on_device.match_images(*scene, max_keypoints=KEYPOINTS)
    found = list(on_device.match_many([scene, scene], max_keypoints=KEYPOINTS, workers=0))
    assert len(found) == 2
    assert all(same_matches(pair.matches, single) >= 0.9 for pair in found)


def test_register(device, on_device, matcher, scene):
    ours, theirs = (by.register(*scene, max_rotation=1, max_scale=1.01) for by in (on_device, matcher))
    assert ours.verdict == theirs.verdict == "registered"
    assert corner_error(ours.transform, theirs.transform, SIZE) < 0.2
    assert abs(ours.confidence - theirs.confidence) < 0.05


def test_check(device, on_device, matcher, scene):
    ours, theirs = (by.check(*scene) for by in (on_device, matcher))
    assert ours.verdict == theirs.verdict
    assert abs(ours.median_error - theirs.median_error) < 0.1


# --- onnxruntime ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_device(device) -> str:
    if device == "cuda":
        import onnxruntime

        if onnx_backend.CUDA not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA provider: install onnxruntime-gpu")
    return device


@pytest.fixture(scope="module")
def graphs(request, onnx_device, matcher, tmp_path_factory) -> dict[str, Path]:
    """Folders of graphs in both precisions; on the CPU, where half precision is slow to make, in one."""
    # Asked for here: a fixture of the session would be made before the device is looked for.
    folders = {"float32": request.getfixturevalue("exported").folder}
    if onnx_device == "cuda":
        report = once(tmp_path_factory, "exported_half", lambda path: matcher.export_onnx(path, half=True))
        folders["float16"] = report.folder
    return folders


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime(onnx_device, graphs, dtype, matcher, patches):
    if dtype not in graphs:
        pytest.skip("exported on a GPU alone: test_export.py has thin graphs in half precision")
    by = Matcher.from_onnx(graphs[dtype], device=onnx_device)
    assert by.device.startswith(onnx_device) and by.backend.dtype == dtype
    ours, theirs = (describe(each, patches) for each in (by, matcher))
    for a, b in zip(ours, theirs, strict=True):
        assert largest(a.descriptors, b.descriptors) < DESCRIPTOR_ERROR[dtype]
    if onnx_device == "cuda":
        assert isinstance(ours[0].maps, onnx_backend.DeviceMaps)
    assert largest(by.score(*ours), matcher.score(*theirs)) < SCORE_ERROR[dtype]
    assert same_matches(by.match(*patches), matcher.match(*patches)) >= 0.9
    assert len(by.describe(patches[0][:0], "vis")) == 0


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Settings of a run of a thin network, four steps."""
    from kglmatch.training import TrainingConfig

    make_thin(monkeypatch)
    (tmp_path / "data").mkdir()
    write_image_pairs(tmp_path / "data")
    return TrainingConfig(
        data=str(tmp_path / "data"),
        validation_images=1,
        validation_pairs=20,
        max_points=30,
        steps=4,
        batch_size=6,
        compile=False,
        precision="float32",
        warmup_steps=0,
        log_every=1,
        validate_every=4,
        checkpoint_every=2,
        network={"patch_size": 16, "descriptor_dim": 8},
    )


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["total"] for record in records if "total" in record]


def test_a_training_step(device, training, tmp_path):
    from kglmatch.training import Augmentation, Trainer

    # CUDA and the CPU draw other random numbers, and would augment otherwise.
    config = dataclasses.replace(training, steps=1, validate_every=1, augmentation=Augmentation.none())
    for where in (device, "cpu"):
        Trainer(config, tmp_path / f"run-{where}", device=where).train(progress=False)
    ours, theirs = losses(tmp_path / f"run-{device}"), losses(tmp_path / "run-cpu")
    assert len(ours) == 1
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_training_step_in_half_precision(device, training, precision, tmp_path):
    from kglmatch.training import Trainer

    if device == "cpu" and precision == "float16":
        pytest.skip("mixed precision in float16 needs CUDA")
    config = dataclasses.replace(training, steps=2, validate_every=2, precision=precision)
    best = Trainer(config, tmp_path / "run", device=device).train(progress=False)
    assert all(np.isfinite(value) for value in best.values())


def test_a_checkpoint_is_resumed(device, training, tmp_path, monkeypatch):
    """The losses that follow are those of an unbroken run."""
    from kglmatch.training import Trainer

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Trainer(training, whole, device=device).train(progress=False)

    one_step = Trainer.one_step

    def stop_after_three(self: Trainer) -> None:
        if self.step == 3:
            raise InterruptedError
        one_step(self)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "one_step", stop_after_three)
        Trainer(training, broken, device=device).train(progress=False)
    resumed = Trainer(training, broken, device=device)
    assert resumed.step == 2  # its last checkpoint
    resumed.train(progress=False)
    assert losses(broken)[-1] == pytest.approx(losses(whole)[-1], rel=1e-2)
