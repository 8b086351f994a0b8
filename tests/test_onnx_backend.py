"""The onnxruntime backend: PyTorch's answers without PyTorch, device memory, providers, damaged folders."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import other_sensor, texture

from kglmatch import Features, Matcher
from kglmatch.backends import onnx as backend_module
from kglmatch.backends.onnx import (
    CPU,
    CUDA,
    CUDA_OPTIONS,
    TENSORRT,
    DeviceMaps,
    OnnxBackend,
    choose_providers,
    count_cuda_devices,
    gather_graph,
)
from kglmatch.errors import BackendError, ConfigError, KGLMatchError, WeightsError
from kglmatch.models.config import CHANNELS, STRIDES, KGLNetConfig
from kglmatch.models.cost import cpu_batch, largest_layer
from kglmatch.models.files import DESCRIPTOR_FILES, GRAPH_FILES, HEAD_FILE
from kglmatch.patches import extract_patches

CHECKOUT = Path(__file__).resolve().parents[1]
EXAMPLES = CHECKOUT / "examples" / "data"


@pytest.fixture(scope="module")
def patches():
    """Seven matching pairs, (7, 64, 64) float32 each."""
    vis = texture(540, 90, seed=5)
    xy = np.array([[40 + 70 * i, 45] for i in range(7)], np.float32)
    return extract_patches(vis, xy), extract_patches(other_sensor(vis), xy)


@pytest.fixture(scope="module")
def onnx_matcher(exported):
    return Matcher.from_onnx(exported.folder, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def thin(thin_exported) -> Path:
    """The folder of a thin network's graphs; not to be changed."""
    return thin_exported[1].folder


@pytest.fixture
def folder(thin, tmp_path):
    """A copy of a thin network's graphs to spoil, without checksums."""
    copy = tmp_path / "graphs"
    shutil.copytree(thin, copy)
    (copy / "SHA256SUMS").unlink()
    return copy


def set_metadata(path: Path, **values: str) -> None:
    model = onnx.load(path)
    meta = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**meta, **{f"kglmatch.{k}": v for k, v in values.items()}})
    onnx.save(model, path)


# --- the same answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_pytorchs_numbers_for_any_n(matcher, onnx_matcher, patches, n):
    features = {}
    for name, by in (("torch", matcher), ("onnx", onnx_matcher)):
        features[name] = by.describe(patches[0][:n], "vis"), by.describe(patches[1][:n], "ir")
    for ours, theirs in zip(features["onnx"], features["torch"], strict=True):
        assert ours.descriptors.shape == (n, 128)
        assert ours.descriptors.dtype == ours.maps.dtype == np.float32
        assert np.abs(ours.descriptors - theirs.descriptors).max(initial=0) < 1e-5
        assert np.abs(ours.maps - theirs.maps.numpy()).max(initial=0) < 1e-4
    score = onnx_matcher.score(*features["onnx"])
    assert score.shape == (n,)
    assert score.dtype == np.float32
    assert np.abs(score - matcher.score(*features["torch"])).max(initial=0) < 1e-5


def test_a_row_does_not_depend_on_its_batch(onnx_matcher, patches):
    together = onnx_matcher.describe(patches[0], "vis")
    alone = onnx_matcher.describe(patches[0][5:6], "vis")
    assert np.abs(together.descriptors[5] - alone.descriptors[0]).max() < 1e-6
    assert np.abs(together.maps[5] - alone.maps[0]).max() < 1e-5


def test_kinds_of_patches(onnx_matcher, patches):
    eight_bit = np.rint(patches[0][:2] * 255).astype(np.uint8)
    given = eight_bit.copy()
    expected = onnx_matcher.describe(eight_bit, "vis", maps=False).descriptors
    assert np.array_equal(eight_bit, given)
    for same in (eight_bit / 255.0, (eight_bit / 255).astype(np.float32), np.asfortranarray(eight_bit)):
        assert np.abs(onnx_matcher.describe(same, "vis", maps=False).descriptors - expected).max() < 1e-6
    as_torch = onnx_matcher.describe(torch.from_numpy(eight_bit), "vis")
    assert isinstance(as_torch.descriptors, torch.Tensor)
    assert np.abs(as_torch.descriptors.numpy() - expected).max() < 1e-6
    assert isinstance(
        onnx_matcher.score(torch.from_numpy(eight_bit), torch.from_numpy(eight_bit)), torch.Tensor
    )


def test_descriptors_alone_do_not_run_the_metric_branch(exported, patches, monkeypatch):
    by = Matcher.from_onnx(exported.folder, device="cpu")
    ran = []
    monkeypatch.setattr(
        type(by.backend._memory),
        "encode",
        lambda self, session, patches, maps, at: ran.append(session) or np.zeros((len(patches), 128)),
    )
    assert by.describe(patches[0], "ir", maps=False).maps is None
    assert set(ran) == {by.backend._session(DESCRIPTOR_FILES["ir"])}  # a session a batch
    assert [output.name for output in ran[0].get_outputs()] == ["descriptor"]


def test_chosen_rows(onnx_matcher, patches):
    vis, ir = (onnx_matcher.describe(p, m).maps for p, m in zip(patches, ("vis", "ir"), strict=True))
    rows_vis, rows_ir = np.array([6, 0, 0, 3]), np.array([1, 1, 6, 3])
    chosen = onnx_matcher.backend.score(vis, ir, rows_vis, rows_ir)
    assert np.abs(chosen - onnx_matcher.backend.score(vis[rows_vis], ir[rows_ir])).max() < 1e-6
    assert onnx_matcher.backend.score(vis, ir, rows_vis[:0], rows_ir[:0]).shape == (0,)


@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"decide": "descriptor"}, {"decide": "metric"}])
def test_the_same_matches(matcher, onnx_matcher, patches, options):
    ours, theirs = (by.match(*patches, min_score=0, **options) for by in (onnx_matcher, matcher))
    assert len(ours) >= 5
    # Scores that differ by less than a last digit may change places.
    ours, theirs = (found[np.lexsort(found.indices.T)] for found in (ours, theirs))
    assert np.array_equal(ours.indices, theirs.indices)
    assert np.abs(ours.scores - theirs.scores).max() < 1e-4
    assert np.abs(ours.distances - theirs.distances).max() < 1e-4


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the example images are not here")
def test_the_same_matches_of_a_real_pair(matcher, exported):
    by_onnx = Matcher.from_onnx(exported.folder, device="cpu")
    pair = EXAMPLES / "sentinel2_red.tif", EXAMPLES / "sentinel2_nir.tif"
    ours, theirs = (by.match_images(*pair, max_keypoints=96) for by in (by_onnx, matcher))
    assert len(ours) > 5
    assert np.array_equal(ours.indices, theirs.indices)
    assert np.abs(ours.scores - theirs.scores).max() < 1e-5
    assert np.abs(ours.distances - theirs.distances).max() < 1e-5
    assert np.array_equal(ours.inliers, theirs.inliers)
    assert np.allclose(ours.homography, theirs.homography, atol=1e-6)


def test_features_travel_between_backends(matcher, onnx_matcher, patches, tmp_path):
    ours, theirs = onnx_matcher.describe(patches[0], "vis"), matcher.describe(patches[1], "ir")
    ours.save(tmp_path / "vis.npz")
    score = onnx_matcher.score(Features.load(tmp_path / "vis.npz"), theirs)
    assert np.abs(score - matcher.score(ours, theirs)).max() < 1e-5


def test_without_pytorch(exported, image_pair, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
forbidden = "torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"
for name in forbidden:
    sys.modules[name] = None  # importing it raises
import numpy as np
from kglmatch import Features, Matcher
folder, vis, ir, out = sys.argv[1:]
matcher = Matcher.from_onnx(folder, device="cpu")
patches = np.random.default_rng(0).random((3, 64, 64))
a, b = matcher.describe(patches, "vis"), matcher.describe(patches, "ir")
assert matcher.score(a, b).shape == (3,)
assert matcher.match(a[:2], b, min_score=0).indices.shape[1] == 2
matches = matcher.match_images(vis, ir, max_keypoints=16)
assert len(matches) and matches.keypoints_vis.shape == (len(matches), 2)
assert matcher.match_images(vis, ir, max_keypoints=16, max_displacement=4, decide="descriptor")
a.save(out)
assert matcher.score(Features.load(out), b).shape == (3,)
assert "onnx" in repr(matcher)
assert not [name for name in sys.modules if name.split(".")[0] in forbidden and sys.modules[name]]
"""
    )
    command = [sys.executable, script, exported.folder, *image_pair, tmp_path / "features.npz"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the example images are not here")
def test_the_example_without_pytorch(exported, tmp_path):
    # Found before every other: importing it raises.
    (tmp_path / "torch.py").write_text("raise ImportError('PyTorch is not installed')")
    pair = EXAMPLES / "sentinel2_red.tif", EXAMPLES / "sentinel2_nir.tif"
    command = [sys.executable, CHECKOUT / "examples" / "onnx_only.py", exported.folder, *pair]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(CHECKOUT)))}

    def run(*arguments):
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    done = run(*command, "--max-keypoints", "48")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Matcher(onnx, ")
    assert done.stdout.endswith("torch imported: False\n")
    done = run(*command[:2], tmp_path / "nowhere", *pair)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(
    "ONNXRUNTIME_ROOT" not in os.environ or shutil.which("cmake") is None,
    reason="needs CMake, and ONNXRUNTIME_ROOT: a folder with include/ and lib/ of onnxruntime",
)
def test_the_example_in_cpp(exported, matcher, patches, tmp_path):
    source, build = CHECKOUT / "examples" / "onnxruntime_cpp", tmp_path / "build"
    root = f"-DONNXRUNTIME_ROOT={os.environ['ONNXRUNTIME_ROOT']}"
    subprocess.run(["cmake", "-S", source, "-B", build, root], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    vis, ir = (np.rint(p[:4] * 255).astype(np.uint8) for p in patches)
    scores = []
    for i, pair in enumerate(zip(vis, ir, strict=True)):
        files = [tmp_path / f"{modality}{i}.pgm" for modality in ("vis", "ir")]
        for file, patch in zip(files, pair, strict=True):
            file.write_bytes(b"P5\n64 64\n255\n" + patch.tobytes())
        command = [build / "score_pair", exported.folder / "pair_score.onnx", *files]
        scores.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert np.abs(matcher.score(vis, ir) - scores).max() < 2e-6

    files[1].write_bytes(b"P5\n64 64\n255\nshort")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"score_pair: {files[1]} ends too early\n"


def test_it_says_what_it_is(onnx_matcher, matcher, tmp_path):
    assert repr(onnx_matcher) == "Matcher(onnx, device='cpu', dtype='float32')"
    assert onnx_matcher.config == matcher.config
    with pytest.raises(KGLMatchError, match="holds no weights"):
        onnx_matcher.save_pretrained(tmp_path / "model")


def test_threads_as_in_pytorch(exported, monkeypatch):
    for given, threads, batch in (("1", 1, 4), ("3", 3, 12), ("all", 0, 4 * os.cpu_count())):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        backend = OnnxBackend(exported.folder, device="cpu")
        assert backend._session(HEAD_FILE).get_session_options().intra_op_num_threads == threads
        assert backend.batch_size == cpu_batch(backend.config, batch)


def test_a_light_network_goes_in_larger_batches():
    published = KGLNetConfig(channels=CHANNELS, strides=STRIDES)
    light = KGLNetConfig(channels=(16, 16, 32, 32, 64, 64, 128, 64), strides=(2, 1, 2, 1, 2, 1, 1, 1))
    assert largest_layer(published) == 32 * 64 * 64 and largest_layer(light) == 16 * 32 * 32
    assert cpu_batch(published, 16) == 16 and cpu_batch(light, 16) == 128
    wide = KGLNetConfig(channels=(64,) * 8, strides=STRIDES)
    assert cpu_batch(wide, 16) == 16  # never less: 8 was slower


# --- device memory, tried on the CPU's ------------------------------------------------------------


@pytest.fixture
def bound(exported, monkeypatch):
    """A backend that treats the CPU's memory as a device's: bound buffers, padded batches, gathering."""
    monkeypatch.setattr(backend_module, "DEVICE_MEMORY", {CPU: "cpu"})
    return OnnxBackend(exported.folder, device="cpu", batch_size=4)


@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_bound_memory_gives_the_same(bound, onnx_matcher, patches, n):
    expected, expected_maps = onnx_matcher.backend.encode(patches[0][:n], "vis", maps=True)
    descriptors, maps = bound.encode(patches[0][:n], "vis", maps=True)
    assert isinstance(maps, DeviceMaps)
    assert len(maps) == n
    assert maps.shape == (n, 256, 8, 8)
    assert np.abs(descriptors - expected).max(initial=0) < 1e-6
    assert np.abs(maps.numpy() - expected_maps).max(initial=0) < 1e-5
    alone, none = bound.encode(patches[0][:n], "vis", maps=False)
    assert none is None
    assert np.abs(alone - expected).max(initial=0) < 1e-6
    assert (
        np.abs(bound.score(maps, maps) - onnx_matcher.backend.score(expected_maps, expected_maps)).max(
            initial=0
        )
        < 1e-5
    )


def test_results_are_not_overwritten_by_the_next_batch(bound, patches):
    first, first_maps = bound.encode(patches[0], "vis", maps=True)
    kept, kept_maps = first.copy(), first_maps.numpy().copy()
    second, second_maps = bound.encode(patches[1], "vis", maps=True)
    assert np.array_equal(first, kept)
    assert np.array_equal(first_maps.numpy(), kept_maps)
    assert np.abs(second - first).max() > 1e-3
    assert np.abs(second_maps.numpy() - kept_maps).max() > 1e-3


def test_device_maps_are_indexed_without_a_copy(bound, onnx_matcher, patches):
    by = Matcher(bound)
    vis, ir = by.describe(patches[0], "vis"), by.describe(patches[1], "ir")
    whole = vis.maps.numpy()
    mask = np.array([True, False, True, True, False, False, True])
    for rows in (slice(2, 6), mask, np.array([5, 5, 0]), np.empty(0, np.int64)):
        part = vis[rows]
        assert part.maps.store is vis.maps.store
        assert np.array_equal(part.maps.numpy(), whole[rows])
    assert np.array_equal(vis[2:][mask[2:]].maps.numpy(), whole[2:][mask[2:]])
    rows = np.array([6, 1, 1])
    expected = onnx_matcher.backend.score(whole, ir.maps.numpy())
    assert np.abs(by.score(vis[rows], ir[rows]) - expected[rows]).max() < 1e-5
    assert np.array_equal(
        by.match(vis, ir, min_score=0).indices, onnx_matcher.match(*patches, min_score=0).indices
    )


def test_maps_from_elsewhere_are_taken_to_the_device(bound, patches, tmp_path):
    by = Matcher(bound)
    vis, ir = by.describe(patches[0], "vis"), by.describe(patches[1], "ir")
    vis.save(tmp_path / "vis.npz")
    loaded = Features.load(tmp_path / "vis.npz")
    assert np.abs(by.score(loaded, ir) - by.score(vis, ir)).max() < 1e-6
    assert by.score(loaded[:0], ir[:0]).shape == (0,)


def test_the_gather_graph_is_valid_onnx():
    model = onnx.load_from_string(gather_graph())
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(gather_graph(), providers=[CPU])
    maps, rows = np.random.default_rng(0).random((5, 2, 3, 3), dtype=np.float32), np.array([4, 0, 0])
    assert np.array_equal(session.run(None, {"maps": maps, "rows": rows})[0], maps[rows])


def test_a_cuda_graph_is_not_asked_of_the_gathering(exported, monkeypatch):
    asked = []
    make = backend_module._make_session

    def spy(graph, providers):
        asked.append((graph, providers))
        return make(graph, [(CPU, {})])

    monkeypatch.setattr(backend_module, "_make_session", spy)
    providers = [(TENSORRT, {}), (CUDA, {"enable_cuda_graph": "1", "device_id": "0"})]
    backend_module._DeviceMemory((256, 8, 8), 4, "cpu", 0, providers)
    assert asked == [(gather_graph(), [(CUDA, {"device_id": "0"})])]


# --- providers ------------------------------------------------------------------------------------


@pytest.fixture
def with_gpu(monkeypatch):
    """An onnxruntime that lists CUDA and TensorRT, and a driver that reports two GPUs."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(backend_module, "count_cuda_devices", lambda: 2)


def cuda(index: int, **options: str) -> tuple[str, dict[str, str]]:
    return CUDA, {**CUDA_OPTIONS, "device_id": str(index), **options}


def test_providers_by_device(with_gpu):
    assert choose_providers(None, "auto") == ([cuda(0)], True)
    assert choose_providers("auto", "auto") == ([cuda(0)], True)
    assert choose_providers(None, "cuda") == ([cuda(0)], False)
    assert choose_providers(None, "cuda:1") == ([cuda(1)], False)
    assert choose_providers(None, "cpu") == ([(CPU, {})], False)
    with pytest.raises(BackendError, match="reports 2 GPUs"):
        choose_providers(None, "cuda:2")


def test_providers_by_name(with_gpu):
    chosen, automatic = choose_providers([(TENSORRT, {"trt_fp16_enable": True}), CUDA, CPU], "auto")
    assert chosen == [(TENSORRT, {"trt_fp16_enable": "True"}), (CUDA, CUDA_OPTIONS), (CPU, {})]
    assert not automatic
    (_, options), *_ = choose_providers([(CUDA, {"use_tf32": 1})], "auto")[0]
    assert options["use_tf32"] == "1"


def test_tf32_is_off():
    assert CUDA_OPTIONS["use_tf32"] == "0"


def test_auto_without_a_gpu(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(backend_module, "count_cuda_devices", lambda: 0)
    assert choose_providers(None, "auto") == ([(CPU, {})], True)
    with pytest.raises(BackendError, match="reports 0 GPUs"):
        choose_providers(None, "cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cpu:1", "", "auto:1"])
def test_a_device_that_is_none(thin, device):
    with pytest.raises(BackendError, match="device must be"):
        Matcher.from_onnx(thin, device=device)


def test_providers_that_this_onnxruntime_lacks(thin, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(BackendError, match=r"NoSuchProvider was asked for, but this onnxruntime has CPU"):
        Matcher.from_onnx(thin, providers=["NoSuchProvider"])
    with pytest.raises(BackendError, match=r'device "cuda:0" was asked for.*onnxruntime-gpu'):
        Matcher.from_onnx(thin, device="cuda:0")
    with pytest.raises(BackendError, match="not both"):
        Matcher.from_onnx(thin, providers=[CPU], device="cpu")
    for none in ("CUDAExecutionProvider", []):
        with pytest.raises(BackendError, match=r'must be "auto" or a list'):
            Matcher.from_onnx(thin, providers=none)


def test_two_packages_at_once_are_explained(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.23.0")
    with pytest.raises(
        BackendError, match=r"both onnxruntime and onnxruntime-gpu are installed.*pip uninstall"
    ):
        choose_providers(None, "cuda")


def test_one_package_is_not_two():
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    both = {"onnxruntime", "onnxruntime-gpu"} <= installed
    assert backend_module.both_packages_installed() == both


def test_the_driver_is_asked_for_gpus(monkeypatch):
    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(backend_module.ctypes, "CDLL", no_driver)
    assert count_cuda_devices() == 0


@pytest.fixture
def cuda_that_fails(with_gpu, monkeypatch):
    """CUDA is listed, and the session that is asked for it runs on the CPU, as onnxruntime does."""
    make = backend_module._make_session
    monkeypatch.setattr(backend_module, "_make_session", lambda graph, providers: make(graph, [(CPU, {})]))


def test_a_provider_that_did_not_come_up(thin, cuda_that_fails):
    for options in ({"device": "cuda"}, {"providers": [CUDA, CPU]}):
        with pytest.raises(BackendError, match=r"CUDAExecutionProvider did not come up \(running: CPU"):
            Matcher.from_onnx(thin, **options)


def test_a_provider_that_raises(thin, with_gpu, monkeypatch):
    def fail(*_):
        raise backend_module.ort_state.EPFail("cuDNN is\nnot here")

    monkeypatch.setattr(backend_module, "_make_session", fail)
    with pytest.raises(BackendError, match=r"did not start for encoder_vis.onnx: cuDNN is not here"):
        Matcher.from_onnx(thin, device="cuda")


def test_auto_says_what_it_chose(thin, cuda_that_fails, caplog):
    with caplog.at_level(logging.INFO, logger="kglmatch"):
        by = Matcher.from_onnx(thin)
    assert by.device == "cpu"
    warning, chosen = caplog.records
    assert warning.levelname == "WARNING"
    assert "did not come up" in warning.message
    assert chosen.message.endswith(f"runs by {CPU} on cpu")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kglmatch"):
        Matcher.from_onnx(thin, device="cpu")
    assert not caplog.records


# --- folders --------------------------------------------------------------------------------------


def load(folder: Path) -> Matcher:
    return Matcher.from_onnx(folder, device="cpu")


def test_checksums_are_not_needed(folder):
    assert load(folder).device == "cpu"


def test_what_is_no_folder_of_graphs(thin, tmp_path):
    for wrong in (tmp_path / "nowhere", thin / HEAD_FILE):
        with pytest.raises(WeightsError, match="is not a folder"):
            load(wrong)
    with pytest.raises(WeightsError, match=r"it lacks config.json, encoder_vis.onnx.*kglmatch export"):
        load(tmp_path)


@pytest.mark.parametrize("file", GRAPH_FILES)
def test_a_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(WeightsError, match=f"it lacks {file};"):
        load(folder)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_damaged_graph(folder, damage):
    path = folder / "encoder_ir.onnx"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1000], "noise": b"\x01" * 5000, "empty": b""}[damage])
    with pytest.raises(WeightsError, match=r"encoder_ir.onnx") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_flipped_bit_is_found_by_the_checksum(thin, folder):
    shutil.copy(thin / "SHA256SUMS", folder)
    load(folder)
    path = folder / DESCRIPTOR_FILES["vis"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"descriptor_vis.onnx is damaged or of another export"):
        load(folder)
    (folder / "SHA256SUMS").write_bytes(b"\xff\x00 nonsense")
    with pytest.raises(WeightsError, match="its checksum is not that in SHA256SUMS"):
        load(folder)


def test_graphs_that_were_mixed_up(folder):
    shutil.copy(folder / "encoder_vis.onnx", folder / "encoder_ir.onnx")
    with pytest.raises(WeightsError, match=r"encoder_ir.onnx is encoder_vis.onnx under another name"):
        load(folder)


@pytest.mark.parametrize(("key", "value"), [("weights", "0" * 64), ("dtype", "float16")])
def test_a_graph_of_another_model(folder, key, value):
    set_metadata(folder / HEAD_FILE, **{key: value})
    with pytest.raises(WeightsError, match=r"metric_head.onnx is of another model or precision"):
        load(folder)


def test_a_descriptor_graph_of_another_model_is_noticed_on_first_use(folder, patches):
    set_metadata(folder / DESCRIPTOR_FILES["ir"], weights="0" * 64)
    by = load(folder)
    with pytest.raises(WeightsError, match="of another model"):
        by.describe(patches[1], "ir", maps=False)


@pytest.mark.parametrize("graph", [gather_graph(), None])
def test_a_foreign_graph(folder, graph):
    path = folder / "encoder_vis.onnx"
    if graph is None:
        set_metadata(path, architecture="{")
    else:
        path.write_bytes(graph)
    with pytest.raises(WeightsError, match="is not a graph that kglmatch export --onnx wrote"):
        load(folder)


def test_graphs_of_a_version_with_fewer_settings(folder):
    values = json.loads((folder / "config.json").read_text())
    for path in folder.glob("*.onnx"):
        meta = {p.key: p.value for p in onnx.load(path).metadata_props}
        architecture = json.loads(meta["kglmatch.architecture"])
        assert architecture.pop("head_input") == "difference"
        set_metadata(path, architecture=json.dumps(architecture))
    expected = load(folder).config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "head_input"}))
    assert load(folder).config == expected
    (folder / "config.json").write_text(json.dumps({**values, "head_input": "difference-product"}))
    with pytest.raises(
        WeightsError, match="head_input is 'difference' in the graph and 'difference-product'"
    ):
        load(folder)


def test_a_configuration_of_another_model(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "patch_size": 32}))
    with pytest.raises(WeightsError, match=r"patch_size is 64 in the graph and 32 in the configuration"):
        load(folder)
    path.write_text(json.dumps({**values, "metric_trunk": "own"}))
    with pytest.raises(WeightsError, match="metric_trunk is 'descriptor' in the graph and 'own' in"):
        load(folder)
    path.write_text(json.dumps({**values, "head_norm": "frn"}))
    with pytest.raises(WeightsError, match="head_norm is 'none' in the graph and 'frn' in"):
        load(folder)
    path.write_text(json.dumps({**values, "inference": {"detector": "grid"}}))
    assert load(folder).config.inference == {"detector": "grid"}
    path.write_text("{}")
    with pytest.raises(ConfigError):
        load(folder)


def test_a_bad_batch(thin):
    with pytest.raises(KGLMatchError, match="batch_size must be at least 1"):
        Matcher.from_onnx(thin, device="cpu", batch_size=0)


# --- from_pretrained ------------------------------------------------------------------------------


@pytest.fixture
def exports(monkeypatch, thin):
    """Counts exports; each copies the graphs that are there."""
    made = []

    def copy(state, config, folder, **options):
        made.append(options)
        shutil.copytree(thin, folder)

    monkeypatch.setattr("kglmatch.export.export_onnx", copy)
    return made


def test_a_model_is_exported_once(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"backend": "onnx", "device": "cpu"}
    for _ in range(2):
        assert Matcher.from_pretrained("kglnet-vis-nir", **options).backend.name == "onnx"
    assert exports == [{"name": "kglnet-vis-nir", "half": False}]
    assert [p.parent.name for p in (tmp_path / "cache").glob("*/*")] == ["kglmatch-onnx"]
    Matcher.from_pretrained("kglnet-vis-nir", cache_dir=tmp_path / "mine", **options)
    assert len(exports) == 2


@pytest.mark.parametrize("checksums", [True, False])
def test_graphs_of_the_model_are_taken(exports, thin, tmp_path, checksums):
    model = tmp_path / "model"
    shutil.copytree(thin, model / "onnx")
    if not checksums:
        (model / "onnx" / "SHA256SUMS").unlink()
    for place in (model, model / "onnx"):
        by = Matcher.from_pretrained(place, backend="onnx", device="cpu", batch_size=5)
        assert (by.backend.name, by.backend.batch_size) == ("onnx", 5)
    with pytest.raises(BackendError, match="are in float32"):
        Matcher.from_pretrained(model, backend="onnx", device="cpu", dtype="float16")
    assert not exports


def test_without_pytorch_and_without_graphs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kglmatch.export", None)
    with pytest.raises(BackendError, match=r"needs PyTorch and onnx.*kglmatch export --onnx"):
        Matcher.from_pretrained("kglnet-vis-nir", backend="onnx", device="cpu", cache_dir=tmp_path)


def test_graphs_are_no_model_folder(thin):
    with pytest.raises(WeightsError, match=r"lacks model.safetensors; Matcher.from_onnx loads graphs"):
        Matcher.from_pretrained(thin)


def test_bad_backends(tmp_path):
    with pytest.raises(BackendError, match="backend must be one of"):
        Matcher.from_pretrained(backend="tensorflow")
    with pytest.raises(BackendError, match='give backend="onnx"'):
        Matcher.from_pretrained(providers=[CPU])
    with pytest.raises(BackendError, match="dtype must be"):
        Matcher.from_pretrained(backend="onnx", device="cpu", dtype="bfloat16")
    with pytest.raises(WeightsError, match="unknown model"):
        Matcher.from_pretrained("no-such-model", backend="onnx", device="cpu", cache_dir=tmp_path)
