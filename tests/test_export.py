"""The ONNX export: the same numbers, lean graphs that say what they are, failures that leave nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import once
from thin_network import CHANNELS, export_thin, make_thin, perturbed

from kglmatch import export
from kglmatch.backends.onnx import OnnxBackend
from kglmatch.cli import main
from kglmatch.errors import ExportError, KGLMatchError, OutputError
from kglmatch.export import CHECKED_N, Parity, example_patches, export_onnx
from kglmatch.matcher import Matcher
from kglmatch.models.config import SPLITS, KGLNetConfig
from kglmatch.models.files import DESCRIPTOR_FILES, ENCODER_FILES, HEAD_FILE, PAIR_FILE, ModelFiles
from kglmatch.models.network import KGLNet

GRAPHS = (*ENCODER_FILES.values(), *DESCRIPTOR_FILES.values(), HEAD_FILE, PAIR_FILE)
SMALL = KGLNetConfig(patch_size=16, descriptor_dim=32, channels=CHANNELS)


def graph(folder, file: str) -> onnx.ModelProto:
    return onnx.load(folder / file)


# --- the lean network -----------------------------------------------------------------------------


def architectures() -> list[KGLNetConfig]:
    """All 20 of the paper with its head, and those whose head reads the descriptor's maps."""
    of_the_paper = [
        KGLNetConfig(patch_size=16, descriptor_siamese=a, metric_siamese=b, split_after=split)
        for a, b, split in itertools.product((True, False), (True, False), SPLITS)
    ]
    paper = KGLNetConfig(patch_size=16)
    one_trunk = [
        replace(paper, descriptor_siamese=a, split_after=split, metric_trunk="descriptor", head_norm="none")
        for a, split in itertools.product((True, False), SPLITS)
    ]
    mixed = [replace(paper, head_norm="none"), replace(paper, metric_trunk="descriptor")]
    product = [replace(one, head_input="difference-product") for one in (paper, one_trunk[0])]
    return [*of_the_paper, *one_trunk, *mixed, *product]


def compare_lean(net: KGLNet, opset: int) -> None:
    """The lean network gives the network's numbers."""
    size, maps = net.config.patch_size, {}
    with torch.inference_mode():
        for modality in ("vis", "ir"):
            x = torch.from_numpy(example_patches(8, size))[:, None]
            lean = export._Encoder(net, modality, torch.float32, opset)
            expected = net.encode(x, modality)
            for value, reference in zip(lean(x), expected, strict=True):
                assert (value - reference).abs().max() < 1e-4 * max(1, reference.abs().max())
            maps[modality] = expected[1]
        head = export._MetricHead(net.metric_head, net.config.map_size, torch.float32, opset)
        score = head(maps["vis"], maps["ir"])
        assert score.shape == (8,)
        assert (score - net.score(maps["vis"], maps["ir"])).abs().max() < 1e-5


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(
    "config", architectures(), ids=lambda c: "-".join(map(str, c.architecture().values()))
)
def test_the_lean_network_is_the_network(monkeypatch, config, opset):
    make_thin(monkeypatch)
    compare_lean(perturbed(config), opset)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(("trunk", "norm"), [("own", "frn"), ("descriptor", "none")])
def test_the_lean_network_of_full_width(trunk, norm, opset):
    compare_lean(perturbed(KGLNetConfig(patch_size=16, metric_trunk=trunk, head_norm=norm)), opset)


def test_the_examples_are_hard():
    patches = example_patches(8, 64)
    assert patches[3].max() == 0
    assert 0 < np.ptp(patches[4]) < 2e-3
    assert patches[5].max() == 65535
    assert np.array_equal(patches[:6], example_patches(70, 64)[:6])


# --- what is written ------------------------------------------------------------------------------


def test_every_output_was_compared_for_every_n(exported):
    outputs = {(case.file, case.output, case.n) for case in exported.parity}
    wanted = [(file, "descriptor") for file in (*ENCODER_FILES.values(), *DESCRIPTOR_FILES.values())]
    wanted += [(file, "metric_map") for file in ENCODER_FILES.values()]
    wanted += [(HEAD_FILE, "score"), (PAIR_FILE, "score")]
    assert outputs == {(*output, n) for output in wanted for n in CHECKED_N}
    assert all(0 <= case.mean_error <= case.max_error < 1e-4 for case in exported.parity)
    assert max(case.max_error for case in exported.parity if case.output != "metric_map") < 1e-5


def test_the_folder_holds_what_others_need(exported):
    names = {path.name for path in exported.folder.iterdir()}
    assert names == {*GRAPHS, "config.json", "README.md", "SHA256SUMS"}
    for line in (exported.folder / "SHA256SUMS").read_text().splitlines():
        checksum, file = line.split("  ")
        assert hashlib.sha256((exported.folder / file).read_bytes()).hexdigest() == checksum
    for written in exported.graphs:
        assert (exported.folder / written.file).stat().st_size == written.size
        assert len(graph(exported.folder, written.file).graph.node) == written.nodes


@pytest.mark.parametrize(
    ("file", "inputs", "outputs"),
    [
        *(
            (
                file,
                {"patches": ["N", 1, 64, 64]},
                {"descriptor": ["N", 128], "metric_map": ["N", 256, 8, 8]},
            )
            for file in ENCODER_FILES.values()
        ),
        *(
            (file, {"patches": ["N", 1, 64, 64]}, {"descriptor": ["N", 128]})
            for file in DESCRIPTOR_FILES.values()
        ),
        (
            HEAD_FILE,
            {"metric_map_vis": ["N", 256, 8, 8], "metric_map_ir": ["N", 256, 8, 8]},
            {"score": ["N"]},
        ),
        (PAIR_FILE, {"patches_vis": ["N", 1, 64, 64], "patches_ir": ["N", 1, 64, 64]}, {"score": ["N"]}),
    ],
)
def test_inputs_and_outputs(exported, file, inputs, outputs):
    session = onnxruntime.InferenceSession(exported.folder / file, providers=["CPUExecutionProvider"])
    for found, expected in ((session.get_inputs(), inputs), (session.get_outputs(), outputs)):
        assert {value.name: value.shape for value in found} == expected
        assert all(value.type == "tensor(float)" for value in found)


def test_graphs_are_lean_and_private(exported):
    for file in GRAPHS:
        model = graph(exported.folder, file)
        operators = [node.op_type for node in model.graph.node]
        # One reshape for each descriptor: the map becomes a row of the matrix product.
        reshapes = sum(operator in ("Reshape", "Flatten") for operator in operators)
        assert reshapes == (0 if "score" in file or "head" in file else 1)
        assert not {"Shape", "Expand", "Unsqueeze", "Squeeze", "Transpose", "BatchNormalization"} & set(
            operators
        )
        # Every activation but the metric head's follows an FRN, and a descriptor is normalised once.
        heads = int("score" in file or "head" in file)
        assert operators.count("RMSNormalization") == operators.count("Max") - heads + reshapes
        assert not any(i.external_data for i in model.graph.initializer)
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert [opset.version for opset in model.opset_import] == [23]
        used = {name for node in model.graph.node for name in node.input}
        assert {initializer.name for initializer in model.graph.initializer} <= used
        assert str(export.__file__).encode() not in model.SerializeToString()


def test_graphs_say_what_they_are(exported, matcher):
    weights = set()
    for file in GRAPHS:
        model = graph(exported.folder, file)
        meta = {entry.key: entry.value for entry in model.metadata_props}
        assert meta["kglmatch.graph"] == file
        assert meta["kglmatch.dtype"] == "float32"
        assert json.loads(meta["kglmatch.architecture"])["patch_size"] == 64
        weights.add(meta["kglmatch.weights"])
        assert model.producer_name == "kglmatch"
        assert all(value.doc_string for value in (*model.graph.input, *model.graph.output))
    assert len(weights) == 1
    assert KGLNetConfig.from_file(exported.folder / "config.json") == matcher.config


def test_the_card_names_everything(exported):
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    for word in (
        *GRAPHS,
        "(N, 1, 64, 64)",
        "(N, 256, 8, 8)",
        "divided by 255",
        "metric_map_vis",
        "patches_ir",
    ):
        assert word in card
    for case in exported.parity:
        line = f"| `{case.file}` | {case.output} | {case.n} | {case.max_error:.1e} | {case.mean_error:.1e} |"
        assert line in card


# --- half precision, a fixed batch, an older opset ------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return once(
        tmp_path_factory, "half", lambda folder: export_thin(SMALL, folder, half=True, batch=3, opset=18)
    )


def test_half_has_float16_convolutions_and_float32_statistics(half):
    _, report = half
    model = onnx.shape_inference.infer_shapes(graph(report.folder, "encoder_vis.onnx"))
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    types.update({initializer.name: initializer.data_type for initializer in model.graph.initializer})
    of = {
        "Conv": onnx.TensorProto.FLOAT16,
        "ReduceL2": onnx.TensorProto.FLOAT,
        "ReduceMean": onnx.TensorProto.FLOAT,
    }
    for operator, element in of.items():
        nodes = [node for node in model.graph.node if node.op_type == operator]
        assert nodes
        assert {types[node.input[0]] for node in nodes} == {element}
    assert report.dtype == "float16"
    assert [types[name] for name in ("patches", "descriptor", "metric_map")] == [onnx.TensorProto.FLOAT] * 3


def test_half_with_a_fixed_batch_serves_any_n(half):
    net, report = half
    backend = OnnxBackend(report.folder, device="cpu")
    assert (backend.batch_size, backend.dtype) == (3, "float16")
    patches = example_patches(8, 16)
    with torch.inference_mode():
        expected = net.encode(torch.from_numpy(patches)[:, None], "ir")
    for n in (0, 1, 3, 8):
        descriptors, maps = backend.encode(patches[:n], "ir", maps=True)
        assert descriptors.shape == (n, 32)
        for value, reference in zip((descriptors, maps), expected, strict=True):
            assert np.abs(value - reference[:n].numpy()).max(initial=0) < 0.1
            assert np.abs(value - reference[:n].numpy()).sum() / max(value.size, 1) < 3e-3
        assert backend.score(maps, maps).shape == (n,)
    with pytest.raises(KGLMatchError, match="fixed batch of 3"):
        OnnxBackend(report.folder, device="cpu", batch_size=4)


def test_inputs_of_16_bits_do_not_overflow(half):
    _, report = half
    backend = OnnxBackend(report.folder, device="cpu")
    patches = np.random.default_rng(0).uniform(0, 65535, (3, 16, 16)).astype(np.float32)
    for modality in ("vis", "ir"):
        for value in backend.encode(patches, modality, maps=True):
            assert np.isfinite(value).all()


def test_an_older_opset_has_older_operators(half):
    model = graph(half[1].folder, PAIR_FILE)
    assert [opset.version for opset in model.opset_import] == [18]
    assert "RMSNormalization" not in {node.op_type for node in model.graph.node}


# --- which maps the head reads --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled_half(tmp_path_factory):
    """The bundled models' architecture, in half precision."""
    config = replace(SMALL, metric_trunk="descriptor", head_norm="none")
    return once(tmp_path_factory, "bundled_half", lambda folder: export_thin(config, folder, half=True))


@pytest.fixture(params=["half", "thin_exported", pytest.param("bundled_half", marks=pytest.mark.slow)])
def any_export(request):
    """The published architecture in half precision, the bundled models' in both: network and report."""
    return request.getfixturevalue(request.param)


def convolutions(model: onnx.ModelProto) -> int:
    """3x3 convolutions; those of the channel attention are 1x1."""
    return sum(
        list(attribute.ints) == [3, 3]
        for node in model.graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
        if attribute.name == "kernel_shape"
    )


def test_one_trunk_where_the_head_reads_the_descriptors_maps(any_export):
    net, report = any_export
    own = net.config.metric_trunk == "own"
    for modality in ENCODER_FILES:
        encoder = graph(report.folder, ENCODER_FILES[modality])
        descriptor = graph(report.folder, DESCRIPTOR_FILES[modality])
        assert convolutions(descriptor) == 8
        assert convolutions(encoder) == (12 if own else 8)
        assert any("metric_trunk" in i.name for i in encoder.graph.initializer) == own
        if not own:  # a second output, and a cast to float32 at most
            assert len(encoder.graph.node) - len(descriptor.graph.node) <= 1
            assert {i.name for i in encoder.graph.initializer} == {
                i.name for i in descriptor.graph.initializer
            }
    # One convolution of the head; the descriptor head is not part of it.
    assert convolutions(graph(report.folder, PAIR_FILE)) == 2 * 8 + 1
    head = graph(report.folder, HEAD_FILE)
    normed = {"RMSNormalization", "ReduceL2"} & {node.op_type for node in head.graph.node}
    assert bool(normed) == (net.config.head_norm == "frn")


def test_the_backend_gives_the_networks_numbers(any_export):
    net, report = any_export
    backend = OnnxBackend(report.folder, device="cpu")
    assert backend.config == net.config
    size = net.config.patch_size
    patches = {"vis": example_patches(9, size)[:8], "ir": example_patches(9, size)[1:]}
    tolerance = 1e-4 if backend.dtype == "float32" else 0.1
    with torch.inference_mode():
        expected = {m: net.encode(torch.from_numpy(p)[:, None], m) for m, p in patches.items()}
        score = net.score(expected["vis"][1], expected["ir"][1]).numpy()
    for n in (0, 1, 8):
        maps = {}
        for modality, values in patches.items():
            descriptors, maps[modality] = backend.encode(values[:n], modality, maps=True)
            alone, none = backend.encode(values[:n], modality, maps=False)
            assert none is None and np.abs(alone - descriptors).max(initial=0) < 1e-5
            for found, reference in zip((descriptors, maps[modality]), expected[modality], strict=True):
                scale = max(1, reference.abs().max())
                assert np.abs(found - reference[:n].numpy()).max(initial=0) < tolerance * scale
        assert np.abs(backend.score(maps["vis"], maps["ir"]) - score[:n]).max(initial=0) < tolerance


def test_scores_of_pairs_in_one_graph(any_export):
    net, report = any_export
    size = net.config.patch_size
    vis, ir = example_patches(4, size)[:3, None], example_patches(4, size)[1:, None]
    session = onnxruntime.InferenceSession(report.folder / PAIR_FILE, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"patches_vis": vis, "patches_ir": ir})
    with torch.inference_mode():
        expected = net(torch.from_numpy(vis), torch.from_numpy(ir))[2].numpy()
    assert found.shape == (3,)
    assert np.abs(found - expected).max() < (1e-4 if report.dtype == "float32" else 0.1)


# --- failures -------------------------------------------------------------------------------------


def test_a_changed_weight_is_noticed(thin_exported, tmp_path, monkeypatch):
    net, report = thin_exported
    folder = tmp_path / "changed"
    shutil.copytree(report.folder, folder)
    model = graph(folder, HEAD_FILE)
    weight = next(i for i in model.graph.initializer if i.name == "fc2.weight")
    monkeypatch.setattr(export, "CHECKED_N", (2,))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.1, weight.name))
    onnx.save(model, folder / HEAD_FILE)
    with pytest.raises(ExportError, match=r"metric_head.onnx does not give PyTorch's numbers: score"):
        patches = export._split(None, net.config)[0]
        export._check(export._compare(folder, net, None, patches), "float32")


@pytest.fixture
def thin_state(monkeypatch):
    make_thin(monkeypatch)
    return perturbed(SMALL).state_dict()


@pytest.mark.parametrize("error", [2e-4, float("nan"), float("inf")])
def test_a_failed_export_leaves_nothing(monkeypatch, tmp_path, error, thin_state):
    monkeypatch.setattr(export, "_models", lambda *_: {})
    monkeypatch.setattr(
        export, "_compare", lambda *_: (Parity("encoder_vis.onnx", "descriptor", 7, error, 0),)
    )
    with pytest.raises(ExportError, match="nothing was written"):
        export_onnx(thin_state, SMALL, tmp_path / "graphs")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(monkeypatch, tmp_path, thin_state):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_to_onnx", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(thin_state, SMALL, tmp_path / "graphs")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(matcher, tmp_path):
    for options, message in (
        ({"opset": 17}, "18 to 23, got 17"),
        ({"opset": 24}, "got 24"),
        ({"batch": 0}, "got 0"),
    ):
        with pytest.raises(KGLMatchError, match=message):
            matcher.export_onnx(tmp_path / "graphs", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        matcher.export_onnx(tmp_path / "full")
    with pytest.raises(OutputError, match="does not exist"):
        matcher.export_onnx(tmp_path / "nowhere" / "graphs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_matchers_that_cannot_be_exported(thin_exported, tmp_path):
    by_onnx = Matcher.from_onnx(thin_exported[1].folder, device="cpu")
    with pytest.raises(KGLMatchError, match="exported already"):
        by_onnx.export_onnx(tmp_path / "graphs")
    for ask in (by_onnx.backend.state_dict, lambda: by_onnx.save_pretrained(tmp_path / "model")):
        with pytest.raises(
            KGLMatchError, match="holds no weights but exported graphs: load the model"
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KGLMatchError, match="bfloat16"):
        Matcher.from_pretrained(device="cpu", dtype="bfloat16").export_onnx(tmp_path / "graphs")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def requests(monkeypatch, exported):
    """What `kglmatch export` asks for; nothing is exported."""
    seen = []

    def export_nothing(self, folder, **options):
        seen.append((str(folder), options))
        return exported

    monkeypatch.setattr(Matcher, "export_onnx", export_nothing)
    return seen


def test_the_command(requests, capsys, exported):
    assert main(["export", "--onnx", "-o", "there", "--half", "--batch", "4", "--opset", "20"]) == 0
    assert requests == [("there", {"half": True, "calibrate": None, "batch": 4, "opset": 20})]
    out = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in out] == [g.file for g in exported.graphs]
    assert main(["export", "--onnx", "--json"]) == 0
    nothing = {"half": False, "calibrate": None, "batch": None, "opset": None}
    assert requests[1] == ("kglnet-vis-nir-onnx", nothing)
    report = json.loads(capsys.readouterr().out)
    assert report["opset"] == 23
    assert len(report["parity"]) == len(exported.parity)


def test_the_default_folder_is_named_after_the_model(requests, matcher, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "my@rig" / ".model"
    folder.mkdir(parents=True)
    (folder.parent / "link").symlink_to(folder)

    def load(name, **_):
        place = Path(name)
        return Matcher(matcher.backend, ModelFiles(name, "folder", place / "config.json", place / "w"))

    monkeypatch.setattr(Matcher, "from_pretrained", load)
    asked = {}
    for place, given in (
        (folder.parent, "."),
        (folder, "."),
        (tmp_path, "my@rig"),
        (tmp_path, "my@rig/link"),
    ):
        monkeypatch.chdir(place)
        assert main(["export", "--onnx", "--model", given]) == 0
        asked[place.name, given] = requests[-1][0]
    assert list(asked.values()) == ["my@rig-onnx", "model-onnx", "my@rig-onnx", "model-onnx"]
    on_hub = ModelFiles("owner/net@v1", "hub", folder / "c", folder / "w", "owner/net", "0" * 40)
    monkeypatch.setattr(Matcher, "from_pretrained", lambda *_, **__: Matcher(matcher.backend, on_hub))
    assert main(["export", "--onnx", "--model", "owner/net@v1"]) == 0
    assert requests[-1][0] == "net-onnx"


def test_the_command_without_a_format_or_a_model(capsys, tmp_path):
    assert main(["export"]) == 2
    assert "--onnx" in capsys.readouterr().err
    assert main(["export", "--onnx", "--model", str(tmp_path / "no model")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_int8_is_judged_by_the_mean_over_many():
    def parity(n, mean):
        return export.Parity("metric_head.onnx", "score", n, 0.3, mean)

    export._check([parity(1, 0.05), parity(8, 0.01)], "int8")
    for wrong in ([parity(1, 0.01), parity(8, 0.05)], [parity(1, float("nan")), parity(8, 0.01)]):
        with pytest.raises(ExportError, match="metric_head"):
            export._check(wrong, "int8")
