"""`Matcher.check` and `kglmatch check`: known displacements, where they are, and what is not known."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

import kglmatch.commands.check as command
from kglmatch.cli import build_parser, main
from kglmatch.errors import KGLMatchError
from kglmatch.images import read_image_raw
from kglmatch.options import CHECK_DISPLACEMENTS
from kglmatch.registration.results import RegistrationCheck
from kglmatch.visualize import draw_displacement

WIDTH, HEIGHT = 256, 200


def write(path, image):
    cv2.imwrite(str(path), np.rint(image * 255).astype(np.uint8))
    return str(path)


def moved(image, dx, dy):
    """The image with its content moved by (dx, dy) pixels, numbers or (H, W) arrays."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    return cv2.remap(
        image,
        (x - dx).astype(np.float32),
        (y - dy).astype(np.float32),
        cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT,
    ).clip(0, 1)


def made_up(judged=True, verdict="registered"):
    """A check as if measured: everything moved by (2, -1) pixels."""
    points = np.array([[x, y] for y in (40, 100, 160) for x in (40, 120, 200)], np.float32)
    displacement = np.tile(np.array([2, -1], np.float32), (9, 1)) if judged else np.full((9, 2), np.nan)
    return RegistrationCheck(
        verdict=verdict,
        points=points,
        displacement=displacement.astype(np.float32),
        certainty=np.full(9, 0.9 if judged else 0, np.float32),
        judged=np.full(9, judged),
        shift=np.array([2, -1] if judged else [np.nan, np.nan], np.float32),
        median_error=np.sqrt(5) if judged else float("nan"),
        p95_error=np.sqrt(5) if judged else float("nan"),
        judged_share=float(judged),
        image_size=(WIDTH, HEIGHT),
    )


def test_a_shift_below_a_pixel_is_recovered(tmp_path, capsys):
    vis = texture(WIDTH, HEIGHT)
    files = (
        write(tmp_path / "v.png", vis),
        write(tmp_path / "i.png", other_sensor(moved(vis, 1.4, -0.6))),
    )
    out = tmp_path / "report.png"
    assert main(["check", *files, "-o", str(out), "--json", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["verdict"] == "registered" and captured.err == ""
    assert np.allclose(result["shift"], (1.4, -0.6), atol=0.3)
    assert result["median_error"] == pytest.approx(np.hypot(1.4, 0.6), abs=0.3)
    assert result["judged_share"] > 0.5 and result["written"] == [str(out)]
    assert len(result["points"]) == len(result["displacement"]) == len(result["judged"])
    assert read_image_raw(out).shape[1] >= 1000


def test_a_displaced_region_is_found_where_it_is(matcher):
    vis = texture(WIDTH, HEIGHT)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bump = np.exp(-((x - 190) ** 2 + (y - 100) ** 2) / (2 * 30**2))
    found = matcher.check(vis, other_sensor(moved(vis, 4 * bump, 0)))
    px, py = found.points.T
    inside = found.judged & (np.hypot(px - 190, py - 100) < 25)
    outside = found.judged & (np.hypot(px - 190, py - 100) > 90)
    assert found.verdict == "registered" and inside.any() and outside.any()
    assert np.median(found.displacement[inside, 0]) > 1.5
    assert np.linalg.norm(np.median(found.displacement[outside], axis=0)) < 0.7


def test_unrelated_images_fail(tmp_path, capsys, monkeypatch, matcher):
    monkeypatch.setattr(command, "load_matcher", lambda args: matcher)
    files = (
        write(tmp_path / "v.png", texture(WIDTH, HEIGHT)),
        write(tmp_path / "i.png", other_sensor(texture(WIDTH, HEIGHT, 9))),
    )
    assert main(["check", *files, "-o", str(tmp_path / "r.png"), "--json", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["verdict"] == "failed" and result["shift"] == [None, None]
    assert captured.err.count("\n") == 1 and "not found" in captured.err
    assert (tmp_path / "r.png").exists()


def test_the_output_names_the_numbers(tmp_path, capsys, monkeypatch):
    found = made_up()
    found.displacement[4] = (6, -8)
    matcher = SimpleNamespace(
        config=SimpleNamespace(patch_size=64), device="cpu", check=lambda vis, ir, max_displacement: found
    )
    monkeypatch.setattr(command, "load_matcher", lambda args: matcher)
    file = write(tmp_path / "v.png", texture(WIDTH, HEIGHT))
    assert main(["check", file, file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "registered: shift (+2.00, -1.00) px"
    assert lines[1].startswith("error: median 2.24 px, 95 % within 2.24 px, largest 10.00 px at (120, 100)")
    assert lines[2] == "100 % of the image could be judged"


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((200, 180), (), "one size"),
        ((WIDTH, HEIGHT), ("--max-displacement", "100"), "1 to 64"),
        ((WIDTH, HEIGHT), ("-o", "report.txt"), "extension"),
        ((WIDTH, HEIGHT), ("-o", "v.png"), "also an input"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch, size, options, message
):
    monkeypatch.setattr(command, "load_matcher", lambda args: pytest.fail("loaded the model"))
    monkeypatch.chdir(tmp_path)
    write("v.png", texture(WIDTH, HEIGHT))
    write("i.png", texture(*size))
    assert main(["check", "v.png", "i.png", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and captured.out == ""


def test_defaults_and_bounds_are_those_of_the_library(matcher):
    default = inspect.signature(type(matcher).check).parameters["max_displacement"].default
    assert build_parser().parse_args(["check", "a", "b"]).max_displacement == default
    for value in CHECK_DISPLACEMENTS:
        assert command._displacement(str(value)) == value
        outside = value / 2 if value == CHECK_DISPLACEMENTS[0] else value * 2
        with pytest.raises(KGLMatchError, match="max_displacement must be in"):
            matcher.check(texture(80, 80), texture(80, 80), max_displacement=outside)


# --- the picture ----------------------------------------------------------------------------------


def test_arrows_point_where_the_content_went():
    vis = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    picture = draw_displacement(vis, made_up()).astype(int)
    scale = picture.shape[1] / WIDTH
    height = round(HEIGHT * scale)
    coloured = np.ptp(picture[:height], axis=2) > 60
    rows, columns = np.nonzero(coloured)
    # Arrows go right and up from each point, so what is coloured lies right and above the points.
    x, y = columns / scale, rows / scale
    foot = (x > 118) & (x < 180) & (y > 60) & (y < 102)
    assert foot.sum() > 100 and coloured[: round(15 * scale)].sum() == 0
    assert ((x > 50) & (x < 60) & (y < 39)).any() and not ((x < 36) & (y > 45) & (y < 95)).any()


def test_what_was_not_judged_is_grey():
    vis = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    picture = draw_displacement(vis, made_up(judged=False, verdict="failed")).astype(int)
    height = round(HEIGHT * picture.shape[1] / WIDTH)
    assert np.ptp(picture[:height], axis=2).max() < 20
    assert len(np.unique(picture[:height, :, 0])) > 1  # the dots are there
    with pytest.raises(KGLMatchError, match="the one checked was 256 x 200"):
        draw_displacement(vis[:100], made_up())
