"""The scripts in benchmarks/ run as they stand, on little data, for a moment; their figures are plausible."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import make_thin

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> Run:
    """Runs a script as `python benchmarks/NAME ARGUMENTS` does; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)  # the scripts share functions

    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two registered pairs, 208 x 192."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed in (0, 1):
        vis = texture(208, 192, seed)
        for band, image in (("rgb", vis), ("nir", other_sensor(vis))):
            cv2.imwrite(str(folder / f"{seed:04}_{band}.png"), np.rint(image * 255).astype(np.uint8))
    return folder


def test_none_is_left_out():
    # test_rig_benchmark.py, test_geo.py; the last one needs AROSICS, which cannot be installed everywhere
    elsewhere = {"rig.py", "geo.py", "run_arosics.py"}
    tested = elsewhere | set(re.findall(r'run\(\s*"(\w+\.py)"', Path(__file__).read_text("utf-8")))
    assert tested == {path.name for path in BENCHMARKS.glob("*.py")}
    assert not [path for path in BENCHMARKS.rglob("*.*") if path.suffix not in (".py", ".pyc")]


def test_inference(run, matcher, exported, tmp_path):
    matcher.save_pretrained(tmp_path / "model")
    shutil.copytree(exported.folder, tmp_path / "model" / "onnx")
    report = json.loads(
        run("inference.py", "--model", tmp_path / "model", "--pairs", 2, "--seconds", 0, "--json")
    )
    assert [row["name"].split()[0] for row in report["contenders"]] == [
        "published,",
        "kglmatch,",
        "kglmatch,",
    ]
    assert report["contenders"][0]["pairs_ratio"] == 1
    assert all(row["pairs_per_second"] > 0 for row in report["contenders"])


def test_inference_of_a_head_that_sees_the_product(run):
    arguments = ("--no-onnx", "--pairs", 2, "--seconds", 0, "--json")
    report = json.loads(run("inference.py", "--model", "kglnet-vis-lwir-lite", *arguments))
    assert len(report["contenders"]) == 2


def test_training(run, monkeypatch):
    make_thin(monkeypatch)
    report = json.loads(run("training.py", "--pairs", 4, "--seconds", 0, "--eager", "--json"))
    assert report["rounds"] == 1 and report["ratio"] > 0
    assert all(rate > 0 for rate in report["pairs_per_second"].values())


def test_keypoints(run, pairs):
    table = run("keypoints.py", pairs, "--slice=:1", "--pixels", 1500, "--json", "rows.json")
    rows = {
        name: np.mean(values, axis=0) for name, values in json.loads(Path("rows.json").read_text()).items()
    }
    assert {"structure", "sift", "grid", "gradient", "phase", "random"} <= set(rows)
    assert all(name in table for name in rows)
    assert rows["structure"][2] > 2 * rows["structure"][3]  # within 4 px, and by chance


def test_keypoints_of_dense_search(run, pairs):
    run("keypoints.py", pairs, "--slice=:1", "--dense", "--pixels", 12000, "--json", "rows.json")
    rows = {name: values[0] for name, values in json.loads(Path("rows.json").read_text()).items()}
    assert list(rows) == ["detected", "more", "dense"]
    _, found, right, *_ = rows["dense"]
    assert 0 < right <= found


def test_patch_geometry(run, pairs):
    table = run("patch_geometry.py", pairs, "--slice=:1", "--pixels", 3000, "--json", "results.json")
    results = json.loads(Path("results.json").read_text())
    assert set(results["0 deg, 1x"]) == {"upright", "turned"} and "90 deg, 1x" in table
    (matches, right), *_ = results["0 deg, 1x"]["upright"]
    assert 0 < right <= matches


def test_check_by_known_shifts(run, pairs):
    printed = run("check.py", pairs, "--every", 2, "--save", "found.json")
    (error,) = json.loads(Path("found.json").read_text())["errors"]
    assert error < 0.3
    assert printed.splitlines()[-1] == f"1 of 1 judged; median error {error:.3f} px"


@pytest.mark.slow
def test_maps(run, pairs):
    """The map is wrong by a known shift, which all but the map itself find."""
    pytest.importorskip("rasterio", reason="maps need the extra geo")
    small = ("--limit", 1, "--truth", "set", "--displacements", 6, "--save", "rows.json")
    printed = run("maps.py", pairs, *small)
    rows = {row["method"]: row for row in json.loads(Path("rows.json").read_text())}
    ours, uncorrected = rows.pop("kglmatch"), rows.pop("none: as the map says")
    assert ours["error"] < 1 and ours["verdict"] == "registered" and 50 < ours["peak"] < 5000
    assert 0 < uncorrected["error"] <= 6 and uncorrected["peak"] < ours["peak"]
    assert rows and all(name.startswith("KLT") for name in rows)  # AROSICS is elsewhere
    assert "1 pairs, 1 of them" in printed and "kglmatch calls 1 registered, 0 of which" in printed


def test_what_arosics_says_becomes_a_transform(monkeypatch):
    pytest.importorskip("rasterio", reason="maps need the extra geo")
    monkeypatch.syspath_prepend(BENCHMARKS)
    maps = runpy.run_path(str(BENCHMARKS / "maps.py"))
    assert maps["from_arosics"]({"places": [], "shifts": []}, "affine") is None
    # The map of the second raster is wrong by 3 pixels to the east and 2 to the south.
    places = np.random.default_rng(0).uniform(0, 5000, (40, 2)) * [1, -1] + maps["CORNER"]
    shifts = np.tile([-30.0, 20.0], (40, 1))
    for kind in ("translation", "affine"):
        found = maps["from_arosics"]({"places": places.tolist(), "shifts": shifts.tolist()}, kind)
        np.testing.assert_allclose(found, [[1, 0, 3], [0, 1, 2], [0, 0, 1]], atol=1e-6)


@pytest.mark.slow
def test_local_correction(run, pairs):
    printed = run("local.py", pairs, "--limit", 1, "--save", "found.json")
    (row,) = json.loads(Path("found.json").read_text())
    assert row["verdict"] == "registered" and row["global"] > row["local"] - 0.02
    assert row["local"] < 1.5
    assert "1 pairs, 0 not registered at all" in printed and "worse than global 0" in printed

    # Its own offset counts: with a wrong one of 30 pixels the residual is as large.
    wrong = np.array([[1, 0, 30], [0, 1, 0], [0, 0, 1]])
    Path("offsets.json").write_text(json.dumps({row["pair"]: wrong.tolist(), "another": None}))
    run("local.py", pairs, "--limit", 2, "--offsets", "offsets.json", "--save", "found.json")
    (off,) = json.loads(Path("found.json").read_text())
    assert off["pair"] == row["pair"] and 28 < off["local"] < 32


def test_published_registration_lists_the_pair_that_is_off(run, pairs, tmp_path):
    folder = Path(shutil.copytree(pairs, tmp_path / "field"))
    ir = cv2.imread(str(folder / "0001_nir.png"), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(folder / "0001_nir.png"), np.roll(ir, (4, -5), axis=(0, 1)))
    printed = run("published_registration.py", folder)
    assert printed.splitlines()[-1] == "off by more than 3 px: field/0001"


def test_many(run, monkeypatch):
    pytest.importorskip("pyarrow", reason="tables need the extra many")
    make_thin(monkeypatch)  # undone afterwards, which the script itself does not
    small = ("--thin", "--pairs", 2, "--side", 112, "--keypoints", 8, "--rounds", 1, "--workers", 0)
    printed = run("many.py", "--throughput", *small)
    assert re.findall(r"(wall|processor) time:", printed) == ["wall", "processor"]
    printed = run("many.py", "--memory", "--pairs", 3, "--workers", 0)
    assert float(re.findall(r"^3 +([\d.]+)", printed, re.MULTILINE)[0]) > 10  # MiB
    assert "from pair 3 on" in printed


def test_gpu_on_the_cpu(run, monkeypatch):
    make_thin(monkeypatch)
    small = ("--device", "cpu", "--patches", 2, "--seconds", 0, "--no-onnx", "--keypoints", 8)
    monkeypatch.setattr("kglmatch.matcher.load_files", lambda files: thin_state())
    report = json.loads(run("gpu.py", *small, "--json"))
    assert [(row["backend"], row["dtype"]) for row in report["rows"]] == [
        ("PyTorch", dtype) for dtype in ("float32", "float16", "bfloat16")
    ]
    for row in report["rows"]:
        assert row["patches_per_second"] > 0 and row["scores_per_second"] > 0
        assert row["of_product"] > 0 and row["of_copy"] > 0
    for row in (*report["rows"], report["on_the_cpu"]):
        assert row["match_seconds"] > 0 and row["register_seconds"] > 0


def test_gpu_without_one_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run("gpu.py")
    assert "--device cpu" in capsys.readouterr().err


def thin_state():
    from kglmatch import KGLNetConfig
    from kglmatch.models.network import KGLNet

    config = KGLNetConfig()
    return KGLNet(config).state_dict(), config


@pytest.mark.slow
def test_start(run):
    report = json.loads(run("start.py", "--rounds", 1, "--max-keypoints", 8, "--modules", 5, "--json"))
    assert report["torch_imported"]
    assert 0 < report["imports_cpu"]["sys"] < report["imports_cpu"]["torch"] < report["cpu"]["best"] * 2
    assert len(report["modules"]) == 5
    assert any(name == "torch" or name.startswith("kglmatch") for name, _ in report["modules"])


def test_speed(run, matcher, pairs, tmp_path):
    matcher.save_pretrained(tmp_path / "model")
    pair = pairs / "0000_rgb.png", pairs / "0000_nir.png"
    arguments = ("--rounds", 1, "--max-keypoints", 50, "--json", "--baselines", "SIFT", "nobody")
    report = json.loads(run("speed.py", *pair, "--model", tmp_path / "model", *arguments))
    assert report["product"] > 1e8 and report["copy"] > 1e7
    names = {"register", "register, any rotation", "match_images, 50 keypoints", "SIFT"}
    assert names <= report["cpu"].keys() == report["wall"].keys()
    assert all(seconds > 0 for clock in ("cpu", "wall") for seconds in report[clock].values())
    narrow, wide = (report["cpu"][name] for name in ("register", "register, any rotation and a factor of 2"))
    assert wide > narrow
    assert sum(name.startswith("describe ") for name in report["cpu"]) == 2
    assert any(name.endswith("patches, published network") for name in report["cpu"])
    assert any(name.startswith("score ") for name in report["cpu"])
    assert len(report["missing"]) == 1 and "'nobody'" in report["missing"][0]
