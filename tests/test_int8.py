"""Quantised graphs: what is in 8 bits, how close they come, and what they are refused for."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import once, other_sensor, texture
from onnx import numpy_helper
from thin_network import CHANNELS, export_thin, make_thin

from kglmatch import Matcher, quantization
from kglmatch.cli import main
from kglmatch.errors import KGLMatchError
from kglmatch.evaluation import speed
from kglmatch.export import export_onnx
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.files import DESCRIPTOR_FILES, ENCODER_FILES, HEAD_FILE, PAIR_FILE
from kglmatch.models.network import KGLNet
from kglmatch.options import CALIBRATION_PAIRS

CONFIG = KGLNetConfig(channels=CHANNELS, metric_trunk="descriptor", head_norm="none")
PATCHES = 32


def patches(count: int = PATCHES, first: int = 0) -> dict[str, np.ndarray]:
    scenes = [texture(64, 64, seed) for seed in range(first, first + count)]
    return {"vis": np.stack(scenes), "ir": np.stack([other_sensor(scene) for scene in scenes])}


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """A thin network, and the report of its export in int8."""
    return once(tmp_path_factory, "int8", lambda folder: export_thin(CONFIG, folder, calibration=patches()))


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


@pytest.mark.parametrize("file", [*ENCODER_FILES.values(), *DESCRIPTOR_FILES.values(), HEAD_FILE, PAIR_FILE])
def test_large_convolutions_are_in_8_bits_and_what_normalises_is_not(int8, file):
    model = onnx.load(int8[1].folder / file)
    onnx.checker.check_model(model, full_check=True)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    quantised = 0
    for node in (*nodes(model, "Conv"), *nodes(model, "Gemm")):
        weight = made_by.get(node.input[1])
        if weight is None:  # float32: the first of a stem, the attention, the layers after pooling
            _, inputs, *size = (*weights[node.input[1]].dims, 1, 1)
            assert inputs == 1 or size[:2] == [1, 1]
            continue
        quantised += 1
        assert weight.op_type == made_by[node.input[0]].op_type == "DequantizeLinear"
        values, scales = (weights[name] for name in weight.input[:2])
        assert values.data_type == onnx.TensorProto.INT8
        # Seven bits, and a scale for each output channel.
        assert np.abs(numpy_helper.to_array(values)).max() <= 64
        assert list(scales.dims) == [max(scales.dims)] and scales.dims[0] > 1
    assert quantised == {HEAD_FILE: 1, PAIR_FILE: 15}.get(file, 8)
    for kind in ("RMSNormalization", "Sigmoid", "Max", "ReduceMean"):
        for node in nodes(model, kind):
            assert made_by[node.output[0]] is node and "quantized" not in node.output[0]
    assert not [opset.domain for opset in model.opset_import if opset.domain]


def test_the_backend_runs_it_like_any_other(int8):
    net, report = int8
    by = Matcher.from_onnx(report.folder, device="cpu")
    assert by.backend.dtype == report.dtype == "int8"
    from kglmatch.backends.torch import TorchBackend

    reference = Matcher(thin_backend(net, TorchBackend))
    fresh = patches(8, first=100)
    for modality in ("vis", "ir"):
        ours, theirs = (m.describe(fresh[modality], modality) for m in (by, reference))
        assert (ours.descriptors * theirs.descriptors).sum(axis=1).min() > 0.98
        assert np.linalg.norm(ours.descriptors, axis=1) == pytest.approx(np.ones(8), abs=1e-5)
    score = by.score(fresh["vis"], fresh["ir"])
    assert np.abs(score - reference.score(fresh["vis"], fresh["ir"])).mean() < 0.05
    assert len(by.describe(fresh["vis"][:0], "vis")) == 0


def thin_backend(net, backend):
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        return backend(net.state_dict(), CONFIG, device="cpu", dtype="float32")


def test_the_error_is_measured_on_patches_that_were_kept_out(int8):
    report = int8[1]
    counts = {case.n for case in report.parity}
    assert counts == {1, 2, 7, PATCHES // 4}
    card = (report.folder / "README.md").read_text(encoding="utf-8")
    assert "int8" in card and "kept out of the calibration" in card
    worst = max(case.mean_error for case in report.parity)
    assert 0 < worst < 0.2


def test_channels_of_different_size_cost_nothing(thin_exported, monkeypatch):
    """FRN does not see the size of a channel, so neither may the quantisation."""
    feeds = {"patches": patches()["vis"][:, None]}
    model = onnx.load(thin_exported[1].folder / ENCODER_FILES["vis"])
    convolutions = quantization._convolutions(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in convolutions[0].input[1:]:
        values = numpy_helper.to_array(weights[name]).copy()
        values[0] *= 300
        weights[name].CopyFrom(numpy_helper.from_array(values, name))

    def error() -> float:
        found = [
            onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(
                ["descriptor"], feeds
            )[0]
            for each in (model, quantization.quantize(model, feeds))
        ]
        return float(np.abs(found[0] - found[1]).mean())

    equalised = error()
    monkeypatch.setattr(quantization, "_equalize", lambda model, feeds: None)
    assert equalised < 0.5 * error()


def test_bad_requests(tmp_path, monkeypatch):
    make_thin(monkeypatch)
    state = KGLNet(CONFIG).state_dict()
    few, many = patches(15), patches(16)
    for options, message in (
        ({"calibration": few}, r"at least 16 patches .* got \(15, 64, 64\)"),
        ({"calibration": {"vis": many["vis"], "ir": few["ir"]}}, "as many of one as of the other"),
        ({"calibration": {k: v[:, :32, :32] for k, v in many.items()}}, r"\(64, 64\)"),
        ({"calibration": many, "half": True}, "half"),
        ({"calibration": many, "batch": 4}, "batch"),
        ({"calibration": many, "opset": 18}, "opset 23"),
    ):
        with pytest.raises(KGLMatchError, match=message):
            export_onnx(state, CONFIG, tmp_path / "graphs", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked(monkeypatch, int8):
    """What `Matcher.export_onnx` is asked for by the command."""
    seen = []

    def export_nothing(self, folder, **options):
        seen.append(options)
        return int8[1]

    monkeypatch.setattr(Matcher, "export_onnx", export_nothing)
    return seen


def test_the_command_draws_patches_of_both_sensors(asked, tmp_path, image_pair, capsys):
    (tmp_path / "data").mkdir()
    vis, ir = image_pair
    vis.rename(tmp_path / "data" / "a_rgb.png")
    ir.rename(tmp_path / "data" / "a_nir.png")
    command = ["export", "--onnx", "-o", str(tmp_path / "out"), "--int8"]
    assert main([*command, "--calibrate", str(tmp_path / "data")]) == 0
    drawn_vis, drawn_ir = asked[0]["calibrate"]
    assert drawn_vis.shape == drawn_ir.shape and drawn_vis.dtype == np.uint8
    assert 0 < len(drawn_vis) <= CALIBRATION_PAIRS
    # Row by row of the same place: the sensors' contrast rises together.
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(drawn_vis, drawn_ir, strict=True)]
    assert np.mean(correlation) > 0.8
    assert "mean difference" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--int8"], ["--calibrate", "somewhere"]])
def test_the_command_wants_both_options(asked, options, capsys):
    assert main(["export", "--onnx", *options]) == 2
    error = capsys.readouterr().err
    assert "go together" in error and len(error.splitlines()) == 1
    assert not asked


def test_patches_of_the_api_are_as_for_describe(tmp_path, monkeypatch, thin_matcher):
    seen = {}
    monkeypatch.setattr(
        "kglmatch.export.export_onnx", lambda state, config, folder, **options: seen.update(options)
    )
    made = {k: np.rint(v * 255).astype(np.uint8) for k, v in patches(2).items()}
    thin_matcher.export_onnx(tmp_path / "graphs", calibrate=(made["vis"], made["ir"]))
    assert seen["calibration"]["vis"].dtype == np.float32
    assert np.array_equal(seen["calibration"]["ir"], made["ir"].astype(np.float32) / np.float32(255))
    with pytest.raises(KGLMatchError, match="calibrate, ir"):
        thin_matcher.export_onnx(tmp_path / "graphs", calibrate=(made["vis"], made["ir"][:, :9]))


# --- which backend is fastest -----------------------------------------------------------------------


@pytest.fixture
def exports_at_hand(monkeypatch, thin_exported, int8):
    """`export_onnx` gives what the tests have exported already."""
    net, report = int8

    def export(self, folder, *, calibrate=None, **_options):
        return thin_exported[1] if calibrate is None else report

    from kglmatch.backends.torch import TorchBackend

    monkeypatch.setattr(Matcher, "export_onnx", export)
    monkeypatch.setattr(Matcher, "from_pretrained", lambda *_, **__: Matcher(thin_backend(net, TorchBackend)))


def test_backends_are_compared(exports_at_hand, capsys, monkeypatch):
    with pytest.raises(KGLMatchError, match="at least 0"):
        speed.compare_backends(seconds=-1)
    found = speed.compare_backends(seconds=0)
    assert {(each.backend, each.dtype) for each in found} == {
        ("torch", "float32"),
        ("onnx", "float32"),
        ("onnx", "int8"),
    }
    assert [each.ratio for each in found] == sorted((each.ratio for each in found), reverse=True)
    assert next(each.ratio for each in found if each.backend == "torch") == 1
    monkeypatch.setattr(speed, "compare_backends", lambda _name: found)
    assert main(["info", "--benchmark"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[3] == f"fastest on this machine: {found[0].backend} {found[0].dtype}"
    assert main(["info", "--benchmark", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "kglnet-vis-nir"


@pytest.mark.parametrize(
    ("text", "expected"), [("flags\t: avx2 avx_vnni\n", True), ("flags : avx2\n", False), ("none", None)]
)
def test_vnni_is_read_from_the_processors_flags(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}")
    monkeypatch.setattr(speed, "CPU_FLAGS", tmp_path / "cpuinfo")
    assert speed.has_vnni() is expected
    monkeypatch.setattr(speed, "CPU_FLAGS", tmp_path / "missing")
    assert speed.has_vnni() is None
