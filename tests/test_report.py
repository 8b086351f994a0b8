"""The report, tie points and residual field of `register` and `check`."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_check import made_up as checked
from test_local import DATA, SIDE, moved, wave
from test_register import made_up as registered

import kglmatch.commands.check as check_command
import kglmatch.commands.register as register_command
from kglmatch.cli import main
from kglmatch.errors import KGLMatchError, OutputError
from kglmatch.images import load_image, read_image_raw
from kglmatch.registration.evidence import save_residual_field, save_tie_points, tie_points_of
from kglmatch.registration.files import MapFrame
from kglmatch.report import _scatter, accuracy_of, save_report

VOID = {"meta", "img", "link", "br", "image", "path", "circle", "rect"}
FRAME = MapFrame(np.array([[10.0, 0, 441335], [0, -10, 4174955]]), 32618)
IMAGE = np.random.default_rng(0).random((200, 256)).astype(np.float32)


class Page(HTMLParser):
    """What a page refers to, its text, and whether its elements are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(path: Path) -> Page:
    page = Page(path)
    assert page.open == []
    assert page.references and all(value.startswith("data:image/jpeg;base64,") for value in page.references)
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    return page


# --- reports --------------------------------------------------------------------------------------


def test_a_report_opens_without_a_network_and_gives_the_figures(tmp_path):
    save_report(
        tmp_path / "r.html", IMAGE, IMAGE, checked(), registration=registered(), names=("a.tif", "<b>.tif"),
        model="m", command=["kglmatch", "register", "a b.tif"], pixel_size=10,
    )  # fmt: skip
    page = check_page(tmp_path / "r.html")
    accuracy = accuracy_of(checked())
    assert accuracy is not None and accuracy.rmse == pytest.approx(np.sqrt(5), abs=1e-6)
    for part in ("registered", "<b>.tif", "2.24 px", "22.4 m", "RMSE", "CE90", "kglmatch register 'a b.tif'",
                 "Checkerboard before", "4 of 5 places", "similarity", "1.004"):  # fmt: skip
        assert part in page.text, part
    assert len(page.references) == 4


def test_a_report_of_rasters_says_that_the_map_was_the_prior(tmp_path):
    save_report(tmp_path / "m.html", IMAGE, IMAGE, checked(), registration=registered(), on_map=True)
    text = check_page(tmp_path / "m.html").text
    assert "where the map puts the other image" in text and "on the grid of the visible image" in text
    assert "as the files are" not in text


@pytest.mark.parametrize("factor", [0.1, 0.11, 0.17, 0.23, 0.37, 1, 3, 8.5])
def test_the_components_have_a_scale(factor):
    """Ticks on either side of 0 on both axes, whatever the reach."""
    check = checked()
    check = dataclasses.replace(check, displacement=check.displacement * np.float32(factor))
    accuracy = accuracy_of(check)
    assert accuracy is not None
    labels = re.findall(r'class="tick"[^>]*>(-?[\d.e-]+)<', _scatter(check, accuracy))
    assert 6 <= len(labels) <= 18 and len(set(labels)) >= 3


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("verdict", ["registered", "doubtful", "failed"])
def test_reports_of_checks(tmp_path, judged, verdict):
    save_report(tmp_path / "c.html", IMAGE, IMAGE, checked(judged, verdict))
    page = check_page(tmp_path / "c.html")
    assert verdict in page.text and ("CE90 2.24" in page.text) == judged
    assert ("could not be measured" in page.text) != judged


def test_a_report_of_a_failed_registration_has_no_pictures(tmp_path):
    failed = dataclasses.replace(registered("failed", None), kind=None)
    save_report(tmp_path / "f.html", IMAGE, IMAGE[:100], None, registration=failed)
    page = Page(tmp_path / "f.html")
    assert "no result should be used" in page.text and not page.references


def test_perfect_agreement_can_be_drawn(tmp_path):
    still = dataclasses.replace(checked(), displacement=np.zeros((9, 2), np.float32))
    save_report(tmp_path / "s.html", IMAGE, IMAGE, still)
    assert "nan" not in check_page(tmp_path / "s.html").text


def test_mistakes_of_a_report(tmp_path):
    with pytest.raises(OutputError, match="html"):
        save_report(tmp_path / "r.pdf", IMAGE, IMAGE, checked())
    with pytest.raises(KGLMatchError, match="pixel_size"):
        save_report(tmp_path / "r.html", IMAGE, IMAGE, checked(), pixel_size=0)
    assert not list(tmp_path.iterdir())


# --- tie points and the residual field ------------------------------------------------------------


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tie_points_of_a_check_and_a_registration(tmp_path):
    save_tie_points(tmp_path / "c.csv", tie_points_of(checked()), FRAME)
    row = read(tmp_path / "c.csv")[0]
    assert (row["vis_x"], row["ir_x"], row["dx"], row["dy"]) == ("40.0000", "42.0000", "2.0000", "-1.0000")
    assert float(row["map_x"]) == 441335 + 400 and float(row["map_y"]) == 4174955 - 400
    save_tie_points(tmp_path / "r.csv", tie_points_of(registered()))
    rows = read(tmp_path / "r.csv")
    assert [row["used"] for row in rows] == ["1", "1", "1", "1", "0"] and "map_x" not in rows[0]
    assert float(rows[4]["displacement"]) == pytest.approx(np.hypot(5, 5), abs=1e-3)
    assert float(rows[4]["confidence"]) == 0 and float(rows[0]["confidence"]) == 1
    save_tie_points(tmp_path / "n.csv", tie_points_of(checked(judged=False)))
    assert read(tmp_path / "n.csv")[0]["dx"] == ""
    with pytest.raises(OutputError, match=r"\.csv or \.gpkg"):
        save_tie_points(tmp_path / "c.txt", tie_points_of(checked()))


@pytest.mark.parametrize("frame", [FRAME, None])
def test_tie_points_as_a_geopackage(tmp_path, frame, recwarn):
    raw = pytest.importorskip("pyogrio.raw")
    save_tie_points(tmp_path / "t.gpkg", tie_points_of(checked()), frame)
    assert [path.name for path in tmp_path.iterdir()] == ["t.gpkg"] and not recwarn.list
    meta, _, geometry, fields = raw.read(str(tmp_path / "t.gpkg"), layer="tie_points")
    x, y = np.frombuffer(geometry[0][-16:], "<f8")
    assert (meta["crs"] == "EPSG:32618") == (frame is not None)
    assert (x, y) == ((441735, 4174555) if frame is not None else (40.5, -40.5))
    table = dict(zip(meta["fields"], fields, strict=True))
    assert (table["dx"] == 2).all() and len(geometry) == 9


def test_the_residual_field_is_on_the_map(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    some = dataclasses.replace(checked(), judged=np.arange(9) != 4)
    save_residual_field(tmp_path / "f.tif", some, FRAME)
    with rasterio.open(tmp_path / "f.tif") as file:
        dx, dy = file.read()
        assert file.crs.to_epsg() == 32618 and file.descriptions == ("dx", "dy")
        # the middle of the first raster pixel is the first point of the check
        assert file.xy(0, 0) == pytest.approx((441335 + 400, 4174955 - 400))
        assert file.xy(2, 2) == pytest.approx((441335 + 2000, 4174955 - 1600))
        assert np.isnan(file.nodata)
    assert np.isnan(dx[1, 1]) and (dx[np.isfinite(dx)] == 2).all() and (dy[np.isfinite(dy)] == -1).all()


@pytest.mark.parametrize(("option", "name"), [("--tie-points", "t.gpkg"), ("--residual-field", "f.tif")])
def test_without_the_extra_the_way_out_is_named(tmp_path, monkeypatch, capsys, option, name):
    for module in ("pyogrio", "pyogrio.raw", "rasterio"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((80, 80), np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((80, 80), np.uint8))
    pair = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    for command in ("register", "check"):
        assert main([command, *pair, option, str(tmp_path / name)]) == 2
        assert 'pip install "kglmatch[geo]"' in capsys.readouterr().err
    assert not (tmp_path / name).exists()


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch, matcher):
    """A pair of which one image is displaced by a known field, as files."""
    for command in (register_command, check_command):
        monkeypatch.setattr(command, "load_matcher", lambda args: matcher)
    monkeypatch.setattr("kglmatch.registration.verdict._PLACES", 16)
    monkeypatch.setattr("kglmatch.registration.corrected._PLACES", 8)
    crop = np.s_[100 : 100 + SIDE, 60 : 60 + SIDE]
    vis, ir = (load_image(DATA / f"sentinel2_{band}.tif")[crop] for band in ("red", "nir"))
    for name, image in (("v", moved(vis, wave(amplitude=3.0))), ("i", ir)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.rint(image * 255).astype(np.uint8))
    return str(tmp_path / "v.png"), str(tmp_path / "i.png")


def test_register_with_everything_and_apply(tmp_path, files, capsys):
    names = {"-o": "a.png", "--report": "r.html", "--tie-points": "t.csv", "--save": "t.json",
             "--checkerboard": "c.png", "--overlay": "o.png"}  # fmt: skip
    options = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    quick = ("--max-rotation", "2", "--max-scale", "1.02", "--kind", "translation")
    assert main(["register", *files, "--local", *options, *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["local"]["applied"] and found["local"]["reason"] is None
    assert set(found["written"]) == {str(tmp_path / name) for name in names.values()}
    text = check_page(tmp_path / "r.html").text
    assert "Local correction applied" in text and "kglmatch register" in text
    rows = [row for row in read(tmp_path / "t.csv") if row["used"] == "1"]
    assert len(rows) > 50 and np.median([float(row["displacement"]) for row in rows]) < 0.5
    assert main(["apply", str(tmp_path / "t.json"), files[1], "-o", str(tmp_path / "b.png")]) == 0
    same = read_image_raw(tmp_path / "a.png"), read_image_raw(tmp_path / "b.png")
    np.testing.assert_array_equal(*same)


def test_check_writes_its_outputs_together(tmp_path, files, capsys):
    outputs = [tmp_path / name for name in ("c.html", "c.csv")]
    options = ["--report", str(outputs[0]), "--tie-points", str(outputs[1])]
    assert main(["check", *files, *options, "--pixel-size", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == [str(outputs[1]), str(outputs[0])]
    assert " m" in check_page(outputs[0]).text and read(outputs[1])


def test_an_interruption_leaves_nothing(tmp_path, files, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("kglmatch.report._page", interrupted)
    before = sorted(tmp_path.iterdir())
    options = ["-o", str(tmp_path / "x.png"), "--tie-points", str(tmp_path / "x.csv")]
    assert main(["check", *files, *options, "--report", str(tmp_path / "x.html")]) == 130
    assert sorted(tmp_path.iterdir()) == before


def test_local_and_reports_are_for_one_pair(tmp_path, files, capsys):
    bands = (*files, files[1])
    assert main(["register", *bands, "--local"]) == 2
    assert "--local is for one VIS and one IR" in capsys.readouterr().err
    assert main(["register", *bands, "--tie-points", str(tmp_path / "t.csv")]) == 2
    assert "--tie-points is for one VIS and one IR" in capsys.readouterr().err
    assert main(["check", *files, "--report", str(tmp_path / "r.pdf")]) == 2
    assert ".html" in capsys.readouterr().err


@pytest.mark.slow
def test_rasters_on_the_map_have_the_same_evidence(tmp_path, files, monkeypatch, capsys):
    rasterio = pytest.importorskip("rasterio")
    raw = pytest.importorskip("pyogrio.raw")
    monkeypatch.setattr("kglmatch.commands.common_register.load_matcher", register_command.load_matcher)
    rasters = []
    for file in files:
        pixels = cv2.imread(file, cv2.IMREAD_GRAYSCALE)
        rasters.append(file.replace(".png", ".tif"))
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": SIDE, "width": SIDE}
        place = rasterio.Affine(10, 0, 441330, 0, -10, 4174960)
        with rasterio.open(rasters[-1], "w", **profile, crs="EPSG:32618", transform=place) as output:
            output.write(pixels, 1)
    names = {"-o": "a.tif", "--report": "r.html", "--tie-points": "t.gpkg", "--residual-field": "f.tif"}
    options = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert main(["register", *rasters, "--local", "--kind", "translation", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["local"]["applied"]
    assert " m" in check_page(tmp_path / "r.html").text
    meta, _, geometry, _ = raw.read(str(tmp_path / "t.gpkg"))
    x, y = np.frombuffer(geometry[0][-16:], "<f8")
    assert meta["crs"] == "EPSG:32618" and 441330 < x < 443890 and 4172400 < y < 4174960
    with rasterio.open(tmp_path / "f.tif") as file:
        left = file.read()
        assert file.crs.to_epsg() == 32618
    with rasterio.open(tmp_path / "a.tif") as file:
        warped = file.read(1).astype(float)
    # What is left of 3 pixels, and the raster itself is where the pictures show it.
    assert np.nanmedian(np.hypot(*left)) < 0.7
    ir = cv2.imread(files[1], cv2.IMREAD_GRAYSCALE).astype(float)
    right = moved((ir / 255).astype(np.float32), wave(amplitude=3.0)) * 255
    inner = np.s_[30:-30, 30:-30]
    assert np.abs(warped - right)[inner].mean() < 0.5 * np.abs(ir - right)[inner].mean()
    assert main(["register", *rasters, "--local", "--shift-only", "-o", str(tmp_path / "b.tif")]) == 2
    assert "--shift-only" in capsys.readouterr().err
