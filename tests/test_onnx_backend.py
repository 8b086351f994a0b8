"""The matcher on onnxruntime: the answers of PyTorch, without PyTorch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kglmatch import Matcher
from kglmatch.errors import BackendError, KGLMatchError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(exported):
    return exported.folder


@pytest.fixture(scope="module")
def onnx_matcher(folder):
    return Matcher.from_onnx(folder, device="cpu", batch_size=8)


def patches(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 64, 64), dtype=np.uint8)


@pytest.mark.parametrize("n", [0, 1, 11])
def test_descriptors_and_scores_are_those_of_torch(matcher, onnx_matcher, n):
    vis, ir = patches(n), patches(n, 1)
    for modality, side in (("vis", vis), ("ir", ir)):
        ours = onnx_matcher.describe(side, modality)
        theirs = matcher.describe(side, modality)
        assert ours.descriptors.shape == (n, 128)
        assert np.abs(ours.descriptors - theirs.descriptors).max(initial=0) < 1e-4
        alone = onnx_matcher.describe(side, modality, maps=False)
        assert alone.maps is None
        assert np.abs(alone.descriptors - ours.descriptors).max(initial=0) < 1e-5
    assert np.abs(onnx_matcher.score(vis, ir) - matcher.score(vis, ir)).max(initial=0) < 1e-4


def test_matches_of_images_are_those_of_torch(matcher, onnx_matcher, image_pair):
    options = {"max_displacement": 5, "max_keypoints": 40}
    ours, theirs = (m.match_images(*image_pair, **options) for m in (onnx_matcher, matcher))
    assert len(ours) > 5
    assert np.array_equal(ours.indices, theirs.indices)
    assert np.abs(ours.scores - theirs.scores).max() < 1e-3


def test_pytorch_is_not_needed(folder):
    program = f"""
import sys
sys.modules["torch"] = None  # an import of it fails from here on
import numpy as np
from kglmatch import Matcher
matcher = Matcher.from_onnx({str(folder)!r}, device="cpu")
x = np.zeros((3, 64, 64), np.uint8)
x[:, 10:40, 20:50] = 200
features = matcher.describe(x, "vis"), matcher.describe(x, "ir")
print(matcher.score(*features).shape, len(matcher.match(*features, min_score=0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(3,)")


def test_a_provider_that_is_not_there_is_an_error(folder):
    with pytest.raises(BackendError):
        Matcher.from_onnx(folder, providers=["NoSuchExecutionProvider"])


def test_wrong_folders_and_damaged_graphs_are_errors(folder, tmp_path):
    with pytest.raises(KGLMatchError):
        Matcher.from_onnx(tmp_path / "missing", device="cpu")
    with pytest.raises(KGLMatchError):
        Matcher.from_onnx(tmp_path, device="cpu")
    for change in ("missing", "truncated"):
        copy = tmp_path / change
        shutil.copytree(folder, copy)
        graph = copy / "encoder_vis.onnx"
        if change == "missing":
            graph.unlink()
        else:
            graph.write_bytes(graph.read_bytes()[:1000])
        with pytest.raises(KGLMatchError):
            broken = Matcher.from_onnx(copy, device="cpu")
            broken.describe(patches(1), "vis")
