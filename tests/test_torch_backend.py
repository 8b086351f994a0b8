"""The PyTorch backend: batches, kinds of arrays, precisions, chosen rows, bad devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from thin_network import CHANNELS, make_thin

from kglmatch.backends.torch import TorchBackend, choose_device
from kglmatch.errors import BackendError, KGLMatchError
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.network import KGLNet

OWN, ONE_TRUNK, PRODUCT = (
    KGLNetConfig(patch_size=16, channels=CHANNELS),
    KGLNetConfig(patch_size=16, channels=CHANNELS, metric_trunk="descriptor", head_norm="none"),
    KGLNetConfig(
        patch_size=16,
        channels=CHANNELS,
        metric_trunk="descriptor",
        head_norm="none",
        head_input="difference-product",
    ),
)


@pytest.fixture(scope="module", autouse=True)
def thin():
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        yield


@pytest.fixture(scope="module", params=[OWN, ONE_TRUNK, PRODUCT], ids=["own", "one-trunk", "product"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def state(config):
    torch.manual_seed(0)
    return KGLNet(config).state_dict()


@pytest.fixture(scope="module")
def backend(state, config):
    return TorchBackend(state, config, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).integers(0, 256, (11, 16, 16), dtype=np.uint8)


@pytest.mark.parametrize("n", [0, 1, 4, 11])
def test_any_number_of_patches(backend, patches, n):
    descriptors, maps = backend.encode(patches[:n], "vis", maps=True)
    assert descriptors.shape == (n, 128)
    assert descriptors.dtype == np.float32
    assert tuple(maps.shape) == (n, CHANNELS[-1], 2, 2)
    assert backend.encode(patches[:n], "vis", maps=False)[1] is None
    assert backend.score(maps, maps).shape == (n,)


def test_the_batch_size_does_not_matter(config, backend, state, patches):
    whole = TorchBackend(state, config, device="cpu", batch_size=64)
    for a, b in zip(
        backend.encode(patches, "ir", maps=True), whole.encode(patches, "ir", maps=True), strict=True
    ):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5
    alone = backend.encode(patches[7:8], "ir", maps=False)[0]
    assert np.abs(alone - whole.encode(patches, "ir", maps=False)[0][7]).max() < 1e-5


def test_numpy_for_numpy_and_torch_for_torch(backend, patches):
    as_numpy, _ = backend.encode(patches, "vis", maps=False)
    as_torch, _ = backend.encode(torch.from_numpy(patches), "vis", maps=False)
    assert isinstance(as_numpy, np.ndarray)
    assert isinstance(as_torch, torch.Tensor)
    for same in (patches / 255.0, (patches / 255).astype(np.float32), np.asfortranarray(patches)):
        assert np.abs(backend.encode(same, "vis", maps=False)[0] - as_numpy).max() < 1e-5
    assert np.abs(as_torch.numpy() - as_numpy).max() < 1e-6


def test_chosen_rows_score_like_the_maps_taken_out(backend, patches):
    _, vis = backend.encode(patches, "vis", maps=True)
    _, ir = backend.encode(patches, "ir", maps=True)
    rows_vis, rows_ir = np.array([3, 3, 0, 10, 5, 1]), np.array([2, 7, 7, 0, 5, 9])
    chosen = backend.score(vis, ir, rows_vis, rows_ir)
    assert np.abs(chosen - backend.score(vis[rows_vis], ir[rows_ir])).max() < 1e-6
    assert np.abs(chosen - backend.score(vis.numpy(), ir.numpy(), rows_vis, rows_ir)).max() < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_near_full(config, backend, state, patches, dtype):
    half = TorchBackend(state, config, device="cpu", dtype=dtype)
    assert half.dtype == dtype
    tolerance = 0.01 if dtype == "float16" else 0.06
    expected, expected_maps = backend.encode(patches, "vis", maps=True)
    descriptors, maps = half.encode(patches, "vis", maps=True)
    assert descriptors.dtype == np.float32
    assert str(maps.dtype) == f"torch.{dtype}"
    assert np.abs(descriptors - expected).max() < tolerance
    assert np.allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
    score = half.score(maps, maps.flip(0))
    assert np.abs(score - backend.score(expected_maps, expected_maps.flip(0))).max() < tolerance


def test_half_precision_does_not_overflow(config, state):
    half = TorchBackend(state, config, device="cpu", dtype="float16")
    bright = np.random.default_rng(1).uniform(0, 65535, (2, 16, 16)).astype(np.float32)
    for value in half.encode(bright, "vis", maps=True):
        assert np.isfinite(np.asarray(value)).all()


def test_the_state_is_that_of_the_network(backend, state):
    found = backend.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_top_k_finds_the_nearest(backend):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 8)).astype(np.float32), rng.standard_normal((5, 8)).astype(np.float32)
    expected = np.argsort(-(a @ b.T), axis=1)
    for k in (1, 3, 5, 9):
        found = backend.top_k(a, torch.from_numpy(b), k)
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.sort(expected[:, :k]))
    assert backend.top_k(a, b[:0], 3).shape == (6, 0)
    assert backend.top_k(a[:0], b, 3).shape == (0, 3)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "", "cpu:foo"])
def test_a_device_that_is_none(device):
    with pytest.raises(BackendError, match="device must be"):
        choose_device(device)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(BackendError, match="no CUDA here"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"
    with pytest.raises(BackendError, match="there are 1"):
        choose_device("cuda:1")


def test_bad_precision_and_batch(config, state):
    with pytest.raises(BackendError, match="dtype must be one of"):
        TorchBackend(state, config, device="cpu", dtype="int8")
    with pytest.raises(KGLMatchError, match="batch_size must be at least 1"):
        TorchBackend(state, config, device="cpu", batch_size=0)


def test_float32_on_cuda_is_no_tf32(monkeypatch):
    """Set while the network runs, and as before afterwards; nothing of it needs a GPU."""
    from kglmatch.backends.torch import _full_precision

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with _full_precision(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    with _full_precision(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32
