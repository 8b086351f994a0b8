"""Names to weights without the Hub: bundled models, folders, checksums, strict loading; saving."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from thin_network import make_thin

from kglmatch import Matcher
from kglmatch.backends.torch import TorchBackend
from kglmatch.cli import main
from kglmatch.errors import ConfigError, KGLMatchError, OutputError, WeightsError
from kglmatch.models import pretrained
from kglmatch.models.card import ModelCard, Result, TrainingSet
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.files import CHECKSUMS_FILE, list_pretrained, weights_root
from kglmatch.models.hub import HubOptions
from kglmatch.models.network import KGLNet
from kglmatch.models.pretrained import (
    CHECKSUMS_COMMAND,
    check_fit,
    load_config,
    load_model,
    resolve,
    save_model,
)
from kglmatch.options import DEFAULT_MODEL


@pytest.fixture
def bundled(tmp_path, monkeypatch) -> Path:
    """The folder of an installation of its own, with one bundled model."""
    root = tmp_path / "weights"
    shutil.copytree(weights_root() / DEFAULT_MODEL, root / DEFAULT_MODEL)
    shutil.copy(weights_root() / CHECKSUMS_FILE, root)
    monkeypatch.setattr(pretrained, "weights_root", lambda: root)
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder of its own."""
    return Path(shutil.copytree(weights_root() / DEFAULT_MODEL, tmp_path / "model"))


# --- names ------------------------------------------------------------------------------------


def test_default_model_is_bundled():
    assert DEFAULT_MODEL in list_pretrained()
    files = resolve(DEFAULT_MODEL)
    assert (files.source, files.commit) == ("bundled", None)
    assert "bundled" in files.origin


def test_every_bundled_model_has_its_checksum():
    lines = (weights_root() / CHECKSUMS_FILE).read_text().splitlines()
    known = {file.split("/")[0]: checksum for checksum, _, file in (line.partition("  ") for line in lines)}
    for name in list_pretrained():
        found = hashlib.sha256(resolve(name).weights.read_bytes()).hexdigest()
        assert known.get(name) == found, f"{name}: refresh by `{CHECKSUMS_COMMAND}` in {weights_root()}"
    assert sorted(known) == list_pretrained()


def test_bundled_name_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / DEFAULT_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(DEFAULT_MODEL).source == "bundled"


def test_folder_comes_before_the_hub(folder, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    folder.rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    files = resolve("owner/name", HubOptions(endpoint="http://127.0.0.1:9"))
    assert files.source == "folder"
    assert str(Path("owner/name")) in files.origin


@pytest.mark.parametrize("name", ["", "nonsense", "a/b/c", "owner/", "/nowhere/at/all", "owner/name@", "~/x"])
def test_name_that_is_nothing(name):
    with pytest.raises(WeightsError, match=f"unknown model.*{DEFAULT_MODEL}"):
        resolve(name)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors"):
        resolve(folder)


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "folder"])
def test_revision_is_for_the_hub_alone(name, folder):
    with pytest.raises(WeightsError, match="only models on the Hub"):
        resolve(folder if name == "folder" else name, HubOptions(revision="v1"))


def test_two_revisions():
    with pytest.raises(WeightsError, match="give one"):
        resolve("owner/name@v1", HubOptions(revision="v2"))


@pytest.mark.parametrize("name", list_pretrained())
def test_bundled_models_find_keypoints_alike(name):
    """Which detector finds what another sensor shows as well depends on the sensors, not on the network."""
    _, config = load_model(name)
    assert config.inference["detector"] == "structure"


# --- damaged and foreign files ----------------------------------------------------------------


def test_damaged_bundled_weights_are_noticed(bundled):
    load_model(DEFAULT_MODEL)
    path = bundled / DEFAULT_MODEL / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # a weight that is still a number
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"damaged.*install kglmatch again"):
        load_model(DEFAULT_MODEL)


def test_bundled_model_that_lacks_a_file(bundled):
    (bundled / DEFAULT_MODEL / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors; install kglmatch again"):
        load_model(DEFAULT_MODEL)


def test_bundled_weights_without_checksum(bundled):
    (bundled / CHECKSUMS_FILE).write_text("")
    with pytest.raises(WeightsError, match=f"lacks {DEFAULT_MODEL}"):
        load_model(DEFAULT_MODEL)
    (bundled / CHECKSUMS_FILE).unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*SHA256SUMS"):
        load_model(DEFAULT_MODEL)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a valid safetensors file"):
        load_model(folder)


class _Trap:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(WeightsError, match="not a valid safetensors file"):
        load_model(folder)
    torch.save({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="not a valid safetensors file"):
        load_model(folder)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("metric_head.fc3.bias"), "1 tensors missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected"),
        (
            lambda s: s.update({"metric_head.fc3.bias": torch.zeros(2)}),
            r"fc3.bias is \(2,\), expected \(1,\)",
        ),
        (lambda s: s.update({"metric_head.fc3.bias": torch.tensor([float("nan")])}), "NaN"),
    ],
)
def test_loading_is_strict(folder, change, message):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_model(folder)


def test_another_configuration_does_not_fit(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"metric_trunk": "own"}))
    with pytest.raises(WeightsError, match="does not fit"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "bert"}))
    with pytest.raises(ConfigError, match="not a KGL-Net configuration"):
        load_config(folder)


# --- saving -----------------------------------------------------------------------------------


def test_save_and_load_give_the_same_matcher(matcher, tmp_path):
    matcher.save_pretrained(tmp_path / "new" / "model")
    again = Matcher.from_pretrained(tmp_path / "new" / "model", device="cpu")
    assert again.config == matcher.config
    patches = np.random.default_rng(0).random((3, 64, 64), dtype=np.float32)
    for modality in ("vis", "ir"):
        expected, found = matcher.describe(patches, modality), again.describe(patches, modality)
        assert np.array_equal(found.descriptors, expected.descriptors)
        assert torch.equal(found.maps, expected.maps)


def test_half_and_full_precision(monkeypatch, tmp_path):
    make_thin(monkeypatch)
    torch.manual_seed(0)
    config = KGLNetConfig(patch_size=8)
    state = KGLNet(config).state_dict()
    save_model(tmp_path / "full", state, config, half=False)
    save_model(tmp_path / "half", state, config)
    full, half = load_model(tmp_path / "full")[0], load_model(tmp_path / "half")[0]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.51 * sizes[0]
    for key, value in state.items():
        assert torch.equal(full[key], value)
        assert torch.allclose(half[key].double(), value.double(), rtol=1e-3, atol=1e-7)


def test_what_float16_cannot_hold_is_not_saved(monkeypatch, tmp_path):
    make_thin(monkeypatch)
    config = KGLNetConfig(patch_size=8)
    state = KGLNet(config).state_dict()
    state["descriptor_head.shared.norm.running_var"][0] = 1e6
    with pytest.raises(WeightsError, match=r"running_var.*half=False"):
        save_model(tmp_path / "model", state, config)
    assert not (tmp_path / "model").exists()
    save_model(tmp_path / "model", state, config, half=False)
    assert load_model(tmp_path / "model")[0]["descriptor_head.shared.norm.running_var"][0] == 1e6


def test_lower_precision_is_not_saved_as_if_it_were_higher(tmp_path):
    matcher = Matcher.from_pretrained(device="cpu", dtype="bfloat16")
    with pytest.raises(KGLMatchError, match='dtype="float32"'):
        matcher.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_of_a_model_are_saved_together_or_not_at_all(folder, monkeypatch, tmp_path):
    make_thin(monkeypatch)
    config = KGLNetConfig(patch_size=16)
    thin = Matcher(TorchBackend(KGLNet(config).state_dict(), config, device="cpu"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match="unknown model"):
        thin.save_pretrained(folder, onnx=tmp_path / "nowhere")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    thin.save_pretrained(folder)
    assert load_config(folder) == config and len(list(folder.iterdir())) == 3


def test_save_into_a_file(matcher, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="it is a file"):
        matcher.save_pretrained(tmp_path / "file")


# --- which maps the head reads --------------------------------------------------------------------

MIXED = [
    ("descriptor", "none", "difference"),
    ("own", "none", "difference"),
    ("descriptor", "frn", "difference"),
    ("descriptor", "none", "difference-product"),
]


@pytest.mark.parametrize(("trunk", "norm", "read"), MIXED)
def test_every_kind_of_head_is_saved_and_loaded(monkeypatch, tmp_path, trunk, norm, read):
    make_thin(monkeypatch)
    config = KGLNetConfig(patch_size=16, metric_trunk=trunk, head_norm=norm, head_input=read, ir_kind="sar")
    net = KGLNet(config)
    Matcher(TorchBackend(net.state_dict(), config, device="cpu")).save_pretrained(tmp_path, half=False)
    assert json.loads((tmp_path / "config.json").read_text())["metric_trunk"] == trunk
    state, loaded = load_model(tmp_path)
    assert loaded == config == KGLNetConfig.from_json(config.to_json())
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    text = (tmp_path / "README.md").read_text()
    assert ("The maps come from the descriptor trunk." in text) == (trunk == "descriptor")
    with pytest.raises(WeightsError, match="does not fit its configuration"):
        check_fit(state, KGLNetConfig(patch_size=16), "model.safetensors")


def test_a_configuration_without_the_fields_is_the_papers():
    values = json.loads(KGLNetConfig().to_json())
    for name in ("metric_trunk", "head_norm", "head_input"):
        del values[name]
    assert KGLNetConfig.from_json(json.dumps(values)) == KGLNetConfig()


@pytest.mark.parametrize("name", ["metric_trunk", "head_norm", "head_input"])
@pytest.mark.parametrize("value", ["nothing", None, 1, ["own"], ""])
def test_no_such_head(name, value):
    text = json.dumps({"model_type": "kglnet", name: value})
    with pytest.raises(ConfigError, match=rf"config\.json: {name} must be one of \('.*got ") as caught:
        KGLNetConfig.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words", "costs"),
    [
        ({}, "metric trunks of its own", ("210.9 million", "324.1 million", "38.0 million")),
        (
            {"metric_trunk": "descriptor", "head_norm": "none"},
            "the descriptor trunk's maps",
            ("210.9 million", "210.9 million with", "38.0 million"),
        ),
        ({"metric_siamese": True}, "that both sensors share", ("324.1 million",)),
    ],
)
def test_info_says_what_the_head_reads_and_what_a_patch_costs(tmp_path, capsys, options, words, costs):
    net = KGLNet(KGLNetConfig(**options))
    save_model(tmp_path, net.state_dict(), net.config)
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert words in text and f"{sum(p.numel() for p in net.parameters()):,}" in text
    assert all(cost in text for cost in costs)
    assert main(["info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["multiply_adds"]["score"] == 38_011_136
    assert found["config"]["metric_trunk"] == net.config.metric_trunk


# --- model cards ------------------------------------------------------------------------------


def test_card_metadata_as_the_hub_reads_it(matcher, tmp_path):
    from huggingface_hub import ModelCard as HubCard

    card = ModelCard(
        "kglnet-example",
        license="cc-by-nc-4.0",
        terms="Research use only.",
        datasets={
            "rgb-nir-scene": TrainingSet("RGB-NIR scenes (Brown & Süsstrunk, CVPR 2011)", "research use")
        },
        pairs_seen=1_250_000,
        results=[Result("RGB-NIR scenes, field", "FPR95 (%)", 1.25), Result("TNO", "FPR95 (%)", 7.5, "all")],
        command="kglmatch eval --json data",
        base_model="owner/base",
        notes="## Limits\n\nNone is known.",
    )
    matcher.save_pretrained(tmp_path, card=card)
    read = HubCard.load(tmp_path / "README.md")
    data = read.data
    assert (data.library_name, data.pipeline_tag) == ("kglmatch", "image-feature-extraction")
    assert (data.license, data.datasets, data.base_model) == ("cc-by-nc-4.0", ["rgb-nir-scene"], "owner/base")
    assert data.metrics == ["fpr95"]
    assert "vis-nir" in data.tags
    found = [(r.dataset_name, r.dataset_split, r.metric_name, r.metric_value) for r in data.eval_results]
    assert found == [(r.dataset, r.split, r.metric, r.value) for r in card.results]
    assert "| TNO | all | FPR95 (%) | 7.5 |" in read.text
    assert "kglmatch eval --json data" in read.text
    assert "None is known" in read.text
    assert "| RGB-NIR scenes (Brown & Süsstrunk, CVPR 2011) | research use |" in read.text
    assert "1,250,000 patch pairs" in read.text
    assert read.text.split("\n\n")[1].strip() == "**Terms**: Research use only."


def test_card_of_the_weights_is_kept(folder, tmp_path):
    (folder / "README.md").write_text("# Trained on füld\n", encoding="utf-8")
    Matcher.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text(encoding="utf-8") == "# Trained on füld\n"


def test_short_card_says_what_is_not_known(folder, tmp_path):
    (folder / "README.md").unlink(missing_ok=True)
    Matcher.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    text = (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    assert "**Terms**: not stated" in text
    assert f'Matcher.from_pretrained("{tmp_path / "copy"}")' in text
    assert "license:" not in text


def test_card_says_whether_the_confidence_is_calibrated():
    calibrated = KGLNetConfig(inference={"confidence": {"evidence": [1.0], "share": [0.9]}})
    assert "is calibrated for these weights" in ModelCard("x").render(calibrated)
    assert "calibrated" not in ModelCard("x").render(KGLNetConfig())


def test_card_text_of_ones_own(matcher, tmp_path):
    matcher.save_pretrained(tmp_path, card="# Mine\n")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Mine\n"


def test_card_that_the_hub_would_refuse():
    with pytest.raises(KGLMatchError, match="Brown & S"):
        ModelCard("x", datasets={"Brown & Süsstrunk": TrainingSet("scenes", "")})
    with pytest.raises(KGLMatchError, match="command"):
        ModelCard("x", results=[Result("TNO", "FPR95", 1.0)])
