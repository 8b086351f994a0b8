"""The scripts in examples/ run as they stand, with few keypoints so that they take seconds."""

from __future__ import annotations

import csv
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kglmatch import KGLMatchError, Matches

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
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


@pytest.mark.parametrize(
    "name", sorted(p.name for p in EXAMPLES.glob("*.py") if "argparse" in p.read_text("utf-8"))
)
def test_help_tells_how_to_run_it(run, name: str, capsys):
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


def test_match_patches_tells_same_from_different(run, capsys):
    run("match_patches.py", "--patches", 16)
    same, different = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert same > different + 0.2


def test_match_folder_survives_a_bad_image_and_goes_on_where_it_stopped(run, tmp_path: Path, monkeypatch):
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
    for vis, words in (
        (None, "the visible one is missing"),
        (str(bad), "notes.png"),
        (str(small), "small.png"),
    ):
        with pytest.raises(KGLMatchError, match=words):
            app["match_files"](vis, PAIR[1], "kglnet-vis-nir", None, 24)


def test_app_page_is_built_and_serves_nothing_by_itself(app, tmp_path: Path):
    pytest.importorskip("gradio", reason="the page needs the demo extra")
    page = app["build"](tmp_path)
    labels = {component.label for component in page.blocks.values() if getattr(component, "label", None)}
    assert {"Visible image", "Image of the other sensor", "Model", "Largest displacement, pixels"} <= labels
    assert not page.is_running
