"""What several test files share: the parity folder, a bundled matcher, images made on the spot."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from filelock import FileLock
from thin_network import export_thin

MOST_WORKERS = 8  # each has its own copy of PyTorch and of the models in memory
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many workers `-n auto` starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each worker: they share the cores."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers inherit it
    elif "PYTEST_XDIST_WORKER" in os.environ:
        cv2.setNumThreads(1)


@pytest.fixture(scope="session")
def parity() -> Path:
    """Numbers made by the published code; not part of the repository."""
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip("the published code's numbers (../shared/parity) are not here")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image pairs that may not be redistributed; not part of the repository."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real image pairs (../shared/data) are not here")
    return folder


@pytest.fixture(scope="session")
def matcher():
    """The bundled VIS-NIR model on the CPU."""
    from kglmatch import Matcher

    return Matcher.from_pretrained("kglnet-vis-nir", device="cpu", batch_size=16)


@pytest.fixture(scope="session")
def thin_matcher():
    """A small untrained network on the CPU, for what does not depend on the weights."""
    import torch
    from thin_network import CHANNELS

    from kglmatch import KGLNetConfig, Matcher
    from kglmatch.backends.torch import TorchBackend
    from kglmatch.models.network import KGLNet

    fusion = {"distance": -4.0, "logit": 0.5, "bias": 4.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = KGLNetConfig(channels=CHANNELS, inference={"fusion": fusion})
        return Matcher(TorchBackend(KGLNet(config).state_dict(), config, device="cpu"))


@pytest.fixture(scope="session")
def exported(matcher, tmp_path_factory):
    """The report of the bundled model's export to ONNX, in float32; its folder is not to be changed."""
    return once(tmp_path_factory, "exported", matcher.export_onnx)


@pytest.fixture(scope="session")
def thin_exported(tmp_path_factory):
    """A thin network whose head reads the descriptor trunk's maps, and the report of its export."""
    from kglmatch.models.config import KGLNetConfig

    return once(
        tmp_path_factory,
        "thin_exported",
        lambda folder: export_thin(KGLNetConfig(metric_trunk="descriptor", head_norm="none"), folder),
    )


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What `make` returns for a folder of that name: done by one of pytest-xdist's processes for all."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    made = root / f"{name}.pickle"
    with FileLock(root / f"{name}.lock"):
        if not made.is_file():
            made.write_bytes(pickle.dumps(make(root / name)))
        return pickle.loads(made.read_bytes())


def texture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(height, width) float32 in [0, 1]: smooth random structure with corners at several scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width), np.float32)
    for sigma in (1.5, 4, 10):
        layer = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), sigma)
        image += layer / layer.std()
    for _ in range(width * height // 1500):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(4, 24, 2)
        cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + h)), float(rng.normal(0, 2)), -1)
    low, high = np.percentile(image, [0.5, 99.5])
    return np.clip((image - low) / (high - low), 0, 1).astype(np.float32)


def other_sensor(image: np.ndarray) -> np.ndarray:
    """The same scene as another sensor might see it: another tone curve, softer."""
    return cv2.GaussianBlur(np.clip(0.15 + 0.7 * image**1.6, 0, 1), (0, 0), 0.7).astype(np.float32)


@pytest.fixture
def image_pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two 8-bit PNG files of one registered scene, 192 x 160."""
    vis = texture(192, 160)
    paths = tmp_path / "scene_vis.png", tmp_path / "scene_ir.png"
    for path, image in zip(paths, (vis, other_sensor(vis)), strict=True):
        cv2.imwrite(str(path), np.rint(image * 255).astype(np.uint8))
    return paths


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 128 KiB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
