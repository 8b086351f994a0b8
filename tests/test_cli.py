"""The commands: what they print, what they write, and that it is what the library says."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import make_thin

from kglmatch import Features, Matches, __version__
from kglmatch.cli import COMMANDS, build_parser, main
from kglmatch.commands import match as match_command
from kglmatch.images import read_image_raw
from kglmatch.progress import steps

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--max-keypoints", "40", "--device", "cpu")


def write(path, image):
    cv2.imwrite(str(path), np.rint(image * 255).astype(np.uint8))
    return str(path)


def patches(count, seed=0):
    """(count, 64, 64) of two sensors, uint8."""
    vis = np.stack([texture(64, 64, seed + i) for i in range(count)])
    ir = np.stack([other_sensor(patch) for patch in vis])
    return tuple(np.rint(side * 255).astype(np.uint8) for side in (vis, ir))


@pytest.fixture
def thin(tmp_path_factory, monkeypatch):
    """A model folder of random weights and few channels, and a `Matcher` of it: both sensors see alike."""
    import torch

    from kglmatch import Matcher
    from kglmatch.models.config import KGLNetConfig
    from kglmatch.models.network import KGLNet
    from kglmatch.models.pretrained import save_model

    torch.manual_seed(0)
    config = KGLNetConfig(channels=(4, 4, 8, 8, 8, 8, 8, 16), metric_trunk="descriptor", head_norm="none")
    state = KGLNet(config).state_dict()
    state |= {key: state[key.replace(".ir.", ".vis.")].clone() for key in state}
    folder = tmp_path_factory.mktemp("thin") / "model"
    save_model(folder, state, config, half=False)
    return folder, Matcher.from_pretrained(folder, device="cpu")


# --- help and the process -------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    modules = (ROOT / "kglmatch" / "commands").glob("[!_]*.py")
    names = sorted(path.stem.replace("_", "-") for path in modules if not path.stem.startswith("common"))
    assert set(names) <= set(COMMANDS)
    code = (
        "import sys\n"
        "from kglmatch.cli import main\n"
        f"codes = [main(['--help'])] + [main([name, '--help']) for name in {names}]\n"
        "heavy = {'torch', 'cv2', 'numpy', 'PIL', 'onnx', 'onnxruntime', 'huggingface_hub', 'tqdm'}\n"
        "print(codes, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == f"{[0] * (len(names) + 1)} []"
    for name in names:
        assert f"kglmatch {name}" in done.stdout


def test_module_and_version():
    command = [sys.executable, "-m", "kglmatch", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"kglmatch {__version__}" and done.stderr == ""


def test_choices_and_defaults_are_those_of_the_library():
    from kglmatch.backends.torch import DTYPES
    from kglmatch.commands import common
    from kglmatch.keypoints import DETECTORS
    from kglmatch.options import (
        DECISIONS,
        DEFAULT_MAX_KEYPOINTS,
        DEFAULT_MIN_SCORE,
        DEFAULT_MODEL,
        DEFAULT_TOP_K,
    )

    args = build_parser().parse_args(["match", "a", "b"])
    assert (args.max_keypoints, args.top_k, args.min_score, args.model) == (
        DEFAULT_MAX_KEYPOINTS,
        DEFAULT_TOP_K,
        DEFAULT_MIN_SCORE,
        DEFAULT_MODEL,
    )
    assert match_command.DETECTORS == DETECTORS and match_command.DECISIONS == DECISIONS
    assert tuple(DTYPES) == common.DTYPES
    # What the options name is what there is.
    from kglmatch.evaluation import baselines
    from kglmatch.options import PATCH_BASELINES, REGISTRATION_BASELINES

    assert set(PATCH_BASELINES) == {*baselines._DESCRIPTORS, *baselines._SIMILARITIES}
    assert set(REGISTRATION_BASELINES) == set(baselines._REGISTRATIONS)


def test_a_reader_that_goes_away_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as broken:
        command = [sys.executable, "-m", "kglmatch", "info"]
        done = subprocess.run(
            command, cwd=ROOT, stdout=broken, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "kglmatch", "info"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("kglmatch: error:") and "space" in done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), 2, "--batch-size"),
    ],
)
def test_interruption_and_lack_of_memory_are_one_line(monkeypatch, capsys, raised, code, words):
    def run(args):
        raise raised

    monkeypatch.setattr("kglmatch.commands.info.run", run)
    assert main(["info"]) == code
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(args):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("kglmatch.commands.info.run", run)
    with pytest.raises(RuntimeError, match="of ours"):
        main(["info"])


def test_progress_bars_need_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    drawn = []
    for stream, show in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(steps(range(3), "describe vis", show=show)) == [0, 1, 2]
        drawn.append(stream.getvalue())
    assert "describe vis" in drawn[0] and drawn[1] == drawn[2] == ""


# --- match ----------------------------------------------------------------------------------------


def test_match_writes_what_the_library_finds(image_pair, tmp_path, thin, capsys):
    model, matcher = thin
    out = {name: tmp_path / name for name in ("m.png", "board.jpg", "m.npz", "m.csv")}
    argv = ["match", *map(str, image_pair), *SMALL, "--max-displacement", "4", "--model", str(model)]
    argv += ["--decide", "descriptor"]  # a random head knows nothing
    outputs = ["-o", out["m.png"], "--checkerboard", out["board.jpg"], "--save", out["m.npz"]]
    assert main([*argv, *map(str, outputs)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""

    expected = matcher.match_images(*image_pair, max_keypoints=40, max_displacement=4, decide="descriptor")
    assert len(expected) >= 4
    saved = Matches.load(out["m.npz"])
    for name in ("indices", "keypoints_vis", "keypoints_ir", "inliers"):
        np.testing.assert_array_equal(getattr(saved, name), getattr(expected, name))
    np.testing.assert_allclose(saved.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(saved.homography, expected.homography, atol=1e-6)

    first, *wrote = captured.out.splitlines()
    assert first.startswith(f"{len(expected)} matches, homography found, {expected.inliers.sum()} inliers")
    assert [line.removeprefix("wrote ") for line in wrote] == [
        str(out[name]) for name in ("m.npz", "m.png", "board.jpg")
    ]
    for name in ("m.png", "board.jpg"):
        picture = read_image_raw(out[name])
        assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[1] >= 900
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"scene_vis.png", "scene_ir.png", "m.png", "board.jpg", "m.npz"}


def test_match_json_of_a_shifted_pair_of_16_bits(tmp_path, capsys):
    scene = texture(220, 190, seed=3)
    deep = [(image * 3000 + 200).astype(np.uint16) for image in (scene, other_sensor(scene))]
    vis, ir = tmp_path / "vis.tif", tmp_path / "ir.png"
    cv2.imwrite(str(vis), deep[0][:180, :200])
    cv2.imwrite(str(ir), deep[1][6:186, 11:211])
    argv = ["match", str(vis), str(ir), *SMALL, "--json", "--save", str(tmp_path / "m.json")]
    assert main([*argv, "--max-keypoints", "60"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found["device"] == "cpu" and found["written"] == [str(tmp_path / "m.json")]
    assert found["keypoints_vis"] == found["keypoints_ir"] == 60
    assert 4 <= found["inliers"] <= found["matches"] <= 60
    x, y, w = np.array(found["homography"]) @ [100, 90, 1]
    assert abs(x / w - 89) < 1 and abs(y / w - 84) < 1
    saved = json.loads((tmp_path / "m.json").read_text())
    assert len(saved["scores"]) == found["matches"] and sum(saved["inliers"]) == found["inliers"]


def test_match_options_reach_the_matcher(image_pair, monkeypatch, capsys):
    from kglmatch.matcher import Matcher

    given = {}

    def cut(grey, modality, **how):
        given[modality] = how
        return np.zeros((0, 2), np.float32), np.zeros((0, 64, 64), np.float32)

    def describe(self, patches, modality, *, maps, keypoints, image_size):
        given[modality]["maps"] = maps
        return Features(np.zeros((0, 128), np.float32), modality, keypoints=keypoints)

    monkeypatch.setattr("kglmatch.patch_matcher.cut_patches", cut)
    monkeypatch.setattr(Matcher, "describe", describe)
    original = Matcher.match_images

    def match_images(self, vis, ir, **how):
        given["match"] = how
        return original(self, vis, ir, **how)

    monkeypatch.setattr(Matcher, "match_images", match_images)
    options = "--detector grid --max-keypoints 7 --top-k all --min-score 0.25 --decide descriptor"
    more = "--max-displacement 3.5 --batch-size 5 --dtype float32 --device cpu"
    assert main(["match", *map(str, image_pair), *options.split(), *more.split()]) == 0
    assert (
        given["vis"]
        == given["ir"]
        == {
            "patch_size": 64,
            "keypoints": None,
            "detector": "grid",
            "max_keypoints": 7,
            "maps": False,
            "upright": True,
        }
    )
    assert given["match"] == {
        "top_k": None,
        "min_score": 0.25,
        "max_displacement": 3.5,
        "decide": "descriptor",
    }


def test_match_takes_no_maps_where_the_model_decides_by_its_descriptors(
    image_pair, thin, capsys, monkeypatch
):
    from kglmatch.matcher import Matcher

    model, _ = thin
    values = json.loads((model / "config.json").read_text())
    values["inference"]["decide"] = "descriptor"
    (model / "config.json").write_text(json.dumps(values))
    asked = []
    original = Matcher.describe

    def describe(self, *args, maps=True, **how):
        asked.append(maps)
        return original(self, *args, maps=maps, **how)

    monkeypatch.setattr(Matcher, "describe", describe)
    argv = ["match", *map(str, image_pair), *SMALL, "--json", "--model", str(model)]
    assert main(argv) == 0 and main([*argv, "--decide", "descriptor"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert asked == [False] * 4
    assert first["matches"] == second["matches"] > 0
    assert main([*argv, "--decide", "metric"]) == 0 and asked[4:] == [True, True]
    values["inference"]["decide"] = "coin"
    (model / "config.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert main(argv) == 2
    assert "inference.decide must be one of" in capsys.readouterr().err


def test_match_csv_has_a_row_a_match(image_pair, tmp_path, thin, capsys):
    path = tmp_path / "m.csv"
    argv = ["match", *map(str, image_pair), *SMALL, "--decide", "descriptor", "--save", str(path)]
    argv += ["--model", str(thin[0])]
    assert main([*argv, "--detector", "grid", "--max-displacement", "0"]) == 0
    rows = list(csv.DictReader(path.open()))
    assert int(capsys.readouterr().out.split()[0]) == len(rows) > 0
    for row in rows:
        assert 0 <= float(row["score"]) <= 1 and row["inlier"] in "01"
        assert (row["x_vis"], row["y_vis"]) == (row["x_ir"], row["y_ir"])  # as asked: no displacement


def test_match_of_a_flat_image_is_empty_not_an_error(image_pair, tmp_path, thin, capsys):
    flat = write(tmp_path / "flat.png", np.full((90, 100), 0.4))
    outputs = {"-o": "m.png", "--checkerboard": "board.png", "--save": "m.npz"}
    argv = [text for option, name in outputs.items() for text in (option, str(tmp_path / name))]
    argv += ["--model", str(thin[0])]
    assert main(["match", flat, str(image_pair[1]), *SMALL, "--json", *argv]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["matches"], found["inliers"], found["homography"], found["keypoints_vis"]) == (
        0,
        0,
        None,
        0,
    )
    words = captured.err.splitlines()
    assert len(words) == 2
    assert words[0].startswith(f"{flat}: no keypoints") and "board.png: not written" in words[1]
    saved = Matches.load(tmp_path / "m.npz")
    assert saved.indices.shape == (0, 2) and saved.indices.dtype == np.int64
    assert saved.scores.shape == (0,) and saved.scores.dtype == np.float32
    assert saved.keypoints_vis.shape == (0, 2) and saved.inliers.dtype == bool
    assert (tmp_path / "m.png").is_file() and not (tmp_path / "board.png").exists()


# --- score ----------------------------------------------------------------------------------------


def test_score_of_two_images(tmp_path, matcher, capsys):
    vis, ir = patches(1)
    paths = [write(tmp_path / name, side[0] / 255) for name, side in (("v.png", vis), ("i.png", ir))]
    assert main(["score", *paths, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    name, score = captured.out.rstrip("\n").split("\t")
    assert name == "v.png" and captured.err == ""
    assert float(score) == pytest.approx(float(matcher.score(vis, ir)[0]), abs=2e-6)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".npz"])
def test_score_of_folders_pairs_by_name(tmp_path, thin, capsys, suffix):
    model, matcher = thin
    vis, ir = patches(4)
    for folder in ("vis", "ir"):
        (tmp_path / folder).mkdir()
    for row, stem in enumerate("dbca"):
        write(tmp_path / "vis" / f"{stem}.png", vis[row] / 255)
        write(tmp_path / "ir" / f"{stem}.tif", ir[row] / 255)
    (tmp_path / "ir" / "a.tif").rename(tmp_path / "ir" / "alone.tif")
    (tmp_path / "vis" / ".hidden").write_text("not an image")
    saved = tmp_path / f"scores{suffix}"
    assert (
        main(
            [
                "score",
                *(str(tmp_path / name) for name in ("vis", "ir")),
                "--save",
                str(saved),
                "--model",
                str(model),
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    expected = dict(zip(["d.png", "b.png", "c.png"], matcher.score(vis[:3], ir[:3]).tolist(), strict=True))
    printed = [line.split("\t") for line in captured.out.splitlines()]
    assert [name for name, _ in printed] == ["b.png", "c.png", "d.png"]
    assert {name: float(score) for name, score in printed} == pytest.approx(expected, abs=2e-6)
    assert captured.err.splitlines() == [
        "left out, without a partner of that name in the other folder: a and 1 more",
        f"wrote {saved}",
    ]
    if suffix == ".npz":
        with np.load(saved) as file:
            table = dict(zip(file["names"].tolist(), file["scores"].tolist(), strict=True))
    else:
        rows = csv.DictReader(saved.open()) if suffix == ".csv" else json.loads(saved.read_text())
        table = {row["name"]: float(row["score"]) for row in rows}
    assert table == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("as_float", [False, True])
def test_score_of_an_npz(tmp_path, thin, capsys, as_float):
    model, matcher = thin
    vis, ir = patches(5)
    if as_float:
        vis, ir = vis / np.float64(255), ir.astype(np.float32) / 255
    path = tmp_path / "pairs.npz"
    np.savez(path, vis=vis[:, None], ir=ir)
    assert main(["score", str(path), "--json", "--batch-size", "2", "--model", str(model)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == "" and found["model"] == str(model)
    assert [pair["name"] for pair in found["pairs"]] == list("01234")
    np.testing.assert_allclose([pair["score"] for pair in found["pairs"]], matcher.score(vis, ir), atol=1e-5)


def test_score_of_no_pairs_says_so(tmp_path, thin, capsys):
    path = tmp_path / "none.npz"
    np.savez(path, vis=np.zeros((0, 64, 64), np.uint8), ir=np.zeros((0, 64, 64), np.uint8))
    assert main(["score", str(path), "--save", str(tmp_path / "s.npz"), "--model", str(thin[0])]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no pairs" in captured.err
    with np.load(tmp_path / "s.npz") as file:
        assert file["scores"].shape == (0,) and file["scores"].dtype == np.float32
        assert file["names"].shape == (0,)


# --- info and convert -----------------------------------------------------------------------------


def test_info_lists_the_bundled_models(capsys):
    assert main(["info"]) == 0
    assert "kglnet-vis-nir" in [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert main(["info", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert {"name": "kglnet-vis-nir", "ir_kind": "nir"} in models


def test_info_describes_a_model(capsys):
    import hashlib

    assert main(["info", "kglnet-vis-nir"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "kglnet-vis-nir", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = Path(found["weights_file"]).read_bytes()
    assert found["source"] == "bundled" and found["commit"] is None
    assert found["weights_bytes"] == len(weights)
    assert found["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert found["config"]["patch_size"] == 64
    # One trunk, two stems, two heads; the batch norm's running statistics are no parameters.
    assert found["parameters"] == 4_191_197
    assert "4,191,197" in text and found["weights_sha256"] in text


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A checkpoint pair of random weights under the published names, of few channels."""
    import torch

    from kglmatch.models.config import KGLNetConfig
    from kglmatch.models.convert import published_names
    from kglmatch.models.network import KGLNet

    make_thin(monkeypatch)
    torch.manual_seed(0)
    state = KGLNet(KGLNetConfig()).state_dict()
    paths = []
    for file, names in zip(("net.pth", "metric.pth"), published_names(), strict=True):
        paths.append(tmp_path / file)
        torch.save({theirs: state[ours].clone() for ours, theirs in names.items()}, paths[-1])
    return paths, state


@pytest.mark.parametrize("exact", [True, False])
def test_convert_makes_a_model_folder(published, tmp_path, capsys, exact):
    import torch

    from kglmatch.models.pretrained import load_model

    paths, state = published
    folder = tmp_path / "model"
    options = ["--float32"] if exact else []
    argv = ["convert", *map(str, paths), "-o", str(folder), "--ir-kind", "sar", "--name", "My net", *options]
    assert main(argv) == 0
    assert str(folder) in capsys.readouterr().out
    converted, config = load_model(folder)
    assert config.ir_kind == "sar"
    for key, value in state.items():
        expected = value if exact or not value.is_floating_point() else value.half().float()
        assert torch.equal(converted[key], expected), key
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert "# My net" in card and "net.pth" in card and ("float32" if exact else "float16") in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metric.pth", "model", "net.pth"]
    assert main(["info", str(folder)]) == 0
    assert f"the local folder {folder}" in capsys.readouterr().out
