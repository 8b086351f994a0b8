"""Published checkpoints: names, numbers, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from thin_network import make_thin

from kglmatch import Matcher
from kglmatch.errors import WeightsError
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.convert import convert_published, published_names
from kglmatch.models.network import KGLNet
from kglmatch.models.pretrained import check_fit, save_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> Tensors:
    """A thin network's parameters, each of its own random values."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        return {
            key: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
            for key, value in KGLNet().state_dict().items()
        }


@pytest.fixture
def published(state) -> tuple[Tensors, Tensors]:
    """The same under the published names, in two files' parts, with FRN's epsilon as they carry it."""
    net, metric = ({theirs: state[ours] for ours, theirs in names.items()} for names in published_names())
    net["layer1_com1.3.eps"] = torch.tensor([1e-6])
    metric["dif_conv.1.eps"] = torch.tensor([-1e-6])  # the published code takes its absolute value
    return net, metric


def write(folder: Path, published: tuple[Tensors, Tensors], suffix: str = ".pth") -> tuple[Path, Path]:
    paths = folder / f"net{suffix}", folder / f"metric{suffix}"
    for path, tensors in zip(paths, published, strict=True):
        if suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)
    return paths


def test_names_cover_the_network_once(state):
    net, metric = published_names()
    assert not set(net) & set(metric)
    assert net.keys() | metric.keys() == state.keys()
    assert len(set(net.values())) == len(net)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_tensor_arrives(state, published, tmp_path, suffix):
    converted = convert_published(*write(tmp_path, published, suffix))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], value) for key, value in state.items())


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module."])
def test_what_training_scripts_wrap_around(state, published, tmp_path, wrap):
    if wrap == "module.":  # DataParallel
        wrapped = tuple({wrap + key: value for key, value in part.items()} for part in published)
    else:
        wrapped = tuple({wrap: part} for part in published)
    converted = convert_published(*write(tmp_path, wrapped))
    assert torch.equal(converted["metric_head.fc3.weight"], state["metric_head.fc3.weight"])


def test_a_published_checkpoint_fits_the_default_configuration_alone(parity):
    converted = convert_published(parity / "net.safetensors", parity / "net_metric.safetensors")
    check_fit(converted, KGLNetConfig(), "published")
    for other, message in (
        ({"metric_trunk": "descriptor"}, r"0 tensors missing .* 44 unexpected .*metric_trunk"),
        ({"head_norm": "none"}, r"0 tensors missing .* 2 unexpected .*metric_head\.norm"),
    ):
        with pytest.raises(WeightsError, match=message):
            check_fit(converted, KGLNetConfig(**other), "published")


def test_numbers_of_the_published_code(parity, tmp_path):
    converted = convert_published(parity / "net.safetensors", parity / "net_metric.safetensors")
    save_model(tmp_path, converted, KGLNetConfig(), half=False)
    matcher = Matcher.from_pretrained(tmp_path, device="cpu")
    expected = np.load(parity / "forward.npz")
    vis, ir = (matcher.describe(expected[modality], modality) for modality in ("vis", "ir"))
    assert np.abs(vis.descriptors - expected["descriptor_vis"]).max() < 1e-5
    assert np.abs(ir.descriptors - expected["descriptor_ir"]).max() < 1e-5
    assert np.abs(matcher.score(vis, ir) - expected["score"]).max() < 1e-5
    for features, name in ((vis, "dif_vis"), (ir, "dif_ir")):
        found = features.maps[:2].numpy()
        assert np.abs(found - expected[name]).max() < 1e-5 * np.abs(expected[name]).max()


class _Trap:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_code_in_a_pickle_is_not_run(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = write(tmp_path, ({**published[0], "layer1_com1.0.weight": _Trap()}, published[1]))
    with pytest.raises(WeightsError, match=r"cannot read checkpoint .*net\.pth"):
        convert_published(*paths)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda net: net.pop("layer4_com2.0.weight"),
            r"1 keys missing \(first: \['layer4_com2.0.weight'\]\)",
        ),
        (lambda net: net.update(fc=torch.zeros(1)), r"1 unexpected \(first: \['fc'\]\)"),
        (lambda net: net.update({"layer1_com1.3.eps": torch.tensor([1e-3])}), "eps is 0.001"),
        (lambda net: net.update({"layer1_com1.0.weight": "text"}), "no state dict"),
    ],
)
def test_other_networks_are_refused(published, tmp_path, change, message):
    net = dict(published[0])
    change(net)
    with pytest.raises(WeightsError, match=message):
        convert_published(*write(tmp_path, (net, published[1])))


def test_files_that_cannot_be_read(published, tmp_path):
    net, metric = write(tmp_path, published)
    with pytest.raises(WeightsError, match=r"not found: .*nowhere\.pth"):
        convert_published(net, tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="not a published KGL-Net checkpoint"):
        convert_published(metric, net)  # the other way round
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(net.read_bytes()[:5000])
        with pytest.raises(WeightsError, match=r"broken\."):
            convert_published(tmp_path / name, metric)
