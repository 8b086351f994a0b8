"""`kglmatch train` and its configuration files: what goes in, what comes out, and users' mistakes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from thin_network import make_thin, write_image_pairs

from kglmatch import training
from kglmatch.cli import main
from kglmatch.errors import ConfigError
from kglmatch.models.config import KGLNetConfig
from kglmatch.training import Augmentation, DataSource, TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples" / "training").glob("*.toml"))
SMALL = """
validation_images = 1
validation_pairs = 20
max_points = 30
steps = 50
batch_size = 4
compile = false
[network]
patch_size = 16
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of data and configurations, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    make_thin(monkeypatch)
    Path("data").mkdir()
    write_image_pairs(Path("data"))
    Path("good.toml").write_text('data = "data"' + SMALL)
    Path("without.toml").write_text(SMALL)
    return tmp_path


def message(capsys, *argv):
    """What a failing command says; it must be one line."""
    code = main(["train", *map(str, argv)])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert err.startswith("kglmatch: error: ")
    return err


# --- the command ------------------------------------------------------------------------------


def test_trains_and_says_what_was_kept(folder, capsys):
    argv = ["train", "without.toml", "--data", "data", "-o", "run", "--steps", "3", "--device", "cpu"]
    assert main([*argv, "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    assert "run/model: step 3, FPR95 on the images held out: descriptor" in out and out.count("\n") == 1
    assert "fused " in out and re.search(r"; decides by (fused|metric|descriptor)$", out.strip())
    assert "step 3: descriptor_fpr95" in err
    assert (folder / "run" / "model" / "model.safetensors").is_file()
    # Resumed with nothing left to do; --json says the same.
    assert main([*argv, "--seed", "5", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["step"] == 3 and 0 <= best["metric_fpr95"] <= 100
    inference = json.loads((folder / "run" / "model" / "config.json").read_text())["inference"]
    assert best["decide"] == inference["decide"] and out.strip().endswith(best["decide"])
    assert "seed 5 -> 6" in message(capsys, *argv[1:], "--seed", "6")


def test_one_path_takes_the_place_of_several_sources(folder, capsys):
    tables = "".join(f'[[data]]\npath = "{name}"\nvalidation_images = 1\n' for name in ("none", "data"))
    Path("several.toml").write_text(SMALL + tables)
    argv = ["several.toml", "-o", "run", "--steps", "1", "--device", "cpu"]
    assert "no such file or folder: none" in message(capsys, *argv)
    assert main(["train", *argv, "--data", "data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1


def test_a_branch_by_the_command(folder, capsys):
    shared = ["without.toml", "--data", "data", "--device", "cpu"]
    assert main(["train", *shared, "-o", "run", "--steps", "2"]) == 0
    assert main(["train", *shared, "-o", "decay", "--decay-from", "run", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 4


def test_mistakes_are_one_line(folder, capsys):
    good = ("good.toml", "-o", "run", "--device", "cpu")
    assert "cannot read none.toml: No such file" in message(capsys, "none.toml", "-o", "run")
    Path("bad.toml").write_text("data = ")
    assert "bad.toml is not valid TOML" in message(capsys, "bad.toml", "-o", "run")
    assert "lacks `data`" in message(capsys, "without.toml", "-o", "run")
    for line, said in (
        ("batchsize = 4", "unknown keys batchsize; known are data, "),
        ('steps = "many"', "steps must be int, got 'many'"),
        ("steps = true", "steps must be int, got True"),
        ("learning_rate = 0", "learning_rate must be above 0, got 0"),
        ("learning_rate = nan", "learning_rate must be above 0, got nan"),
        ("batch_size = 1", "batch_size must be a number of at least 2, got 1"),
        ('schedule = "linear"', "schedule must be one of constant, decay, cosine, one-cycle"),
        ("network = 3", "network must be a table, got 3"),
        ("[augmentation]\nblurr = 1", "[augmentation] has unknown keys blurr"),
        ("[augmentation]\nblur = -1", "blur must be a number of at least 0"),
        ("[network]\npatch_size = 60", "patch_size must be a positive multiple of 8"),
        ('[network]\npatch_size = "64"', "patch_size must be int"),
        ("[network]\nwidth = 3", "[network] has unknown keys width"),
        ("[network]\ninference = {}", "network.inference is measured by the run"),
        ('trained = "trunk"', "trained must be one of all, metric_head"),
        ("hard_negatives = 0", "the metric loss needs negatives"),
        ('trained = "metric_head"\nmetric_weight = 0', "leaves nothing to train"),
        ("negatives = 1", "unknown keys negatives"),
    ):
        Path("bad.toml").write_text(f'data = "data"\n{line}\n')
        said_by_us = message(capsys, "bad.toml", "-o", "run")
        assert said in said_by_us and "bad.toml" in said_by_us, said_by_us
    assert "no such file or folder: nowhere" in message(capsys, *good, "--data", "nowhere")
    Path("empty").mkdir()
    assert "no patch pairs in empty" in message(capsys, *good, "--data", "empty")
    assert "expected a number above 0, got '0'" in message(capsys, *good, "--time-budget", "0")
    assert "expected a whole number of at least 1" in message(capsys, *good, "--steps", "x")
    assert "seed" in message(capsys, *good, "--seed", "-1")
    assert "cuda:7" in message(capsys, "good.toml", "-o", "run", "--device", "cuda:7")
    assert "cannot read the checkpoint none" in message(capsys, *good, "--decay-from", "none")
    Path("file").write_text("")
    assert "it is a file; expected a folder" in message(capsys, "good.toml", "-o", "file", "--device", "cpu")
    assert "required: -o/--output" in message(capsys, "good.toml")


# --- configurations ---------------------------------------------------------------------------


def test_a_config_survives_its_own_dictionary():
    config = TrainingConfig(
        data="x", random_negatives=1, augmentation=Augmentation(blur=0.5), network={"split_after": 2}
    )
    assert TrainingConfig.from_dict(config.to_dict()) == config
    assert config.network_config(KGLNetConfig()).split_after == 2
    several = dataclasses.replace(config, data=(DataSource("a", 2.0), DataSource("b", 1, 0, simulated=True)))
    assert TrainingConfig.from_dict(several.to_dict()) == several
    assert several.sources == several.data and config.sources == (DataSource("x"),)


def test_the_defaults_are_the_papers():
    config = TrainingConfig(data="x")
    assert (config.margin, config.alpha, config.norm_weight) == (1.2, 2.0, 0.1)
    assert (config.guided_weight, config.metric_weight) == (1.0, 1.0)
    assert (config.hard_negatives, config.random_negatives) == (1, 0)
    assert config.trained == "all" and config.metric_loss_trains_trunk
    assert config.network_config(KGLNetConfig()) == KGLNetConfig()  # of its own trunks, with FRN
    assert (config.learning_rate, config.metric_head_learning_rate, config.batch_size) == (5e-3, 5e-5, 256)


def test_overrides_take_the_place_of_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("steps = 5\nseed = 1\n")
    config = TrainingConfig.from_toml(path, data="d", steps=9)
    assert (config.data, config.steps, config.seed) == ("d", 9, 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_good(path):
    config = TrainingConfig.from_toml(path, data="d")
    assert config.validation_images >= 1


def test_there_are_recipes():
    assert len(RECIPES) >= 4


def test_every_setting_is_described():
    for cls in (TrainingConfig, DataSource, Augmentation):
        for field in dataclasses.fields(cls):
            assert field.name in (cls.__doc__ or ""), field.name
    with pytest.raises(ConfigError, match="seed must be below"):
        TrainingConfig(data="x", seed=2**32)


# --- the package ------------------------------------------------------------------------------


def test_public_names_are_there():
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = training.nothing


def test_inference_does_not_import_training():
    code = (
        "import sys, numpy as np\n"
        "from kglmatch import Matcher\n"
        "m = Matcher.from_pretrained('kglnet-vis-nir', device='cpu')\n"
        "m.describe(np.zeros((1, 64, 64), np.uint8), 'vis')\n"
        "import kglmatch.training\n"
        "print([n for n in sys.modules if n.startswith('kglmatch.training.')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
