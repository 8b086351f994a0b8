"""`kglmatch register` and the files of a registration: transforms, bit depth, verdicts, rigs."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import struct
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
from conftest import other_sensor, texture
from PIL import Image

import kglmatch.commands.register as command
from kglmatch import Matcher
from kglmatch.cli import build_parser, main
from kglmatch.errors import ImageError, KGLMatchError, OutputError
from kglmatch.geometry import corner_error, transform_points
from kglmatch.images import read_image_raw
from kglmatch.registration.files import (
    NO_MAP,
    MapFrame,
    read_map_frame,
    save_control_points,
    save_stack,
    save_yml,
)
from kglmatch.registration.limits import Limits
from kglmatch.registration.results import BandRegistration, Registration
from kglmatch.resampling import warp_image
from kglmatch.visualize import draw_overlay

WIDTH, HEIGHT = 256, 200
QUICK = ("--max-rotation", "3", "--max-scale", "1.02", "--device", "cpu")
TRUE = np.array([[1.004, 0.02, 6.3], [-0.02, 1.004, -4.6], [0, 0, 1.0]])  # visible to ir pixels


def scene(seed=0):
    """A visible image and what another camera sees of the same place, by the transform TRUE."""
    whole = texture(WIDTH + 64, HEIGHT + 60, seed)
    shift = np.array([[1, 0, -32.0], [0, 1, -30], [0, 0, 1]])
    ir = cv2.warpPerspective(other_sensor(whole), TRUE @ shift, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC)
    return whole[30 : 30 + HEIGHT, 32 : 32 + WIDTH].copy(), np.clip(ir, 0, 1)


def write(path, image, dtype=np.uint8):
    image = np.rint(image * np.iinfo(dtype).max).astype(dtype)
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)
    return str(path)


def made_up(verdict="registered", transform=TRUE):
    """A registration as if found, with five places of which the last is an outlier."""
    points = np.array([[10, 20], [200, 30], [50, 150], [220, 170], [100, 100]], np.float32)
    found = transform_points(TRUE, points).astype(np.float32)
    found[4] += 5
    return Registration(
        verdict=verdict,
        confidence=0.9 if transform is not None else 0.01,
        transform=transform,
        kind=None if transform is None else "similarity",
        keypoints_vis=points,
        keypoints_ir=found,
        scores=np.full(5, 0.8, np.float32),
        residuals=np.array([0, 0, 0, 0, 7], np.float32),
        inliers=np.array([True, True, True, True, False]),
        support=1.0,
        agreement=0.9,
        num_matches=0,
        vis_size=(WIDTH, HEIGHT),
        ir_size=(WIDTH, HEIGHT),
    )


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    """Enough for small images, and soon done."""
    monkeypatch.setattr("kglmatch.registration.from_matches._KEYPOINTS", 30)
    monkeypatch.setattr("kglmatch.registration.verdict._PLACES", 16)


@pytest.fixture
def loaded(monkeypatch, matcher):
    """The bundled model, for commands that need not load it again."""
    monkeypatch.setattr(command, "load_matcher", lambda args: matcher)


@pytest.fixture
def stub(monkeypatch):
    """Stands in for the matcher, for tests of what a command does with a result."""

    def use(*results):
        def register(vis, ir, **limits):
            return results[0]

        def register_stack(reference, bands, names, **limits):
            return [BandRegistration(n, r) for n, r in zip(names, results, strict=True)]

        config = SimpleNamespace(patch_size=64)
        matcher = SimpleNamespace(
            config=config, device="cpu", register=register, register_stack=register_stack
        )
        monkeypatch.setattr(command, "load_matcher", lambda args: matcher)

    return use


# --- the real thing -------------------------------------------------------------------------------


def test_a_pair_with_every_output(tmp_path, capsys):
    vis, ir = scene()
    colour = np.stack([ir, 0.5 * ir, 0.2 + 0.3 * ir], axis=2)
    vis_file, ir_file = write(tmp_path / "v.png", vis), write(tmp_path / "i.tif", colour, np.uint16)
    names = {
        "-o": "aligned.tif", "--overlay": "o.png", "--checkerboard": "c.jpg", "--matches": "m.png",
        "--yml": "t.yml", "--gcp": "t.points", "--save": "t.json",
    }  # fmt: skip
    options = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert main(["register", vis_file, ir_file, *options, "--json", *QUICK]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["verdict"] == "registered" and captured.err == ""
    assert [p.rsplit("/")[-1] for p in result["written"]] == list(names.values())
    transform = np.array(result["transform"])
    assert corner_error(transform, TRUE, (WIDTH, HEIGHT)) < 0.5

    aligned = read_image_raw(tmp_path / "aligned.tif")
    assert aligned.dtype == np.uint16 and aligned.shape == (HEIGHT, WIDTH, 3)
    raw = read_image_raw(ir_file)
    assert np.array_equal(aligned, warp_image(raw, transform, (WIDTH, HEIGHT)))
    # The red channel is what the other camera sees of the visible image.
    inner = np.s_[20:-20, 20:-20]
    error = np.abs(aligned[inner][..., 0] / 65535 - other_sensor(vis)[inner])
    assert np.median(error) < 0.01
    assert not list(tmp_path.glob(".tmp-*"))

    storage = cv2.FileStorage(str(tmp_path / "t.yml"), cv2.FILE_STORAGE_READ)
    assert np.allclose(storage.getNode("transform").mat(), transform, atol=1e-9)
    assert storage.getNode("verdict").string() == "registered"
    saved = json.loads((tmp_path / "t.json").read_text())
    assert saved["transform"] == result["transform"] and len(saved["residuals"]) == result["places"]
    with (tmp_path / "t.points").open() as file:
        rows = [[float(x) for x in row[:4]] for row in list(csv.reader(file))[1:]]
    assert len(rows) == result["inliers"] >= 8
    points = np.array(rows) * (1, -1, 1, -1) - 0.5  # pixel centres, y down
    apart = transform_points(transform, points[:, :2]) - points[:, 2:]
    assert np.linalg.norm(apart, axis=1).max() < 2


@pytest.mark.parametrize("what", ["unrelated", "blank", "edge"])
def test_what_does_not_fit_is_not_written(tmp_path, capsys, loaded, what):
    vis = scene()[0]
    if what == "edge":
        vis = np.zeros((HEIGHT, WIDTH), np.float32)
        vis[:, WIDTH // 2 :] = 1
    ir = {
        "unrelated": other_sensor(texture(WIDTH, HEIGHT, 9)),
        "blank": np.ones((HEIGHT, WIDTH)),
        "edge": np.roll(vis, 7, axis=1),
    }[what]
    vis_file, ir_file = write(tmp_path / "v.png", vis), write(tmp_path / "i.png", ir)
    out, saved = tmp_path / "aligned.png", tmp_path / "r.json"
    code = main(["register", vis_file, ir_file, "-o", str(out), "--save", str(saved), "--json", *QUICK])
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (code, result["verdict"], result["transform"]) == (1, "failed", None)
    assert result["written"] == [str(saved)] and not out.exists()
    assert captured.err.count("\n") == 1 and "not registered" in captured.err
    assert json.loads(saved.read_text())["verdict"] == "failed"


def test_a_rig_leaves_the_unrelated_band_out(tmp_path, capsys, loaded):
    vis, ir = scene()
    soft = cv2.GaussianBlur(np.roll(vis, (3, -5), (0, 1)), (0, 0), 1)
    reference = write(tmp_path / "green.tif", vis, np.uint16)
    bands = [
        write(tmp_path / "nir.tif", ir, np.uint16),
        write(tmp_path / "other.tif", texture(WIDTH, HEIGHT, 5), np.uint16),
        write(tmp_path / "red.tif", soft),
    ]
    out = tmp_path / "stack.tif"
    assert main(["register", reference, *bands, "-o", str(out), "--json", *QUICK]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [b["verdict"] for b in result["bands"]] == ["registered", "failed", "registered"]
    assert [b["band"] for b in result["bands"]] == bands and result["bands"][0]["via"] is None
    assert result["stack"] == [reference, bands[0], bands[2]]
    assert captured.err == f"{bands[1]}: not registered to {reference}; left out\n"
    assert np.allclose(np.array(result["bands"][2]["transform"])[:2, 2], (-5, 3), atol=0.5)

    ok, pages = cv2.imreadmulti(str(out), flags=cv2.IMREAD_UNCHANGED)
    assert ok and [p.dtype.name for p in pages] == ["uint16", "uint16", "uint8"]
    assert np.array_equal(pages[0], read_image_raw(reference))
    assert np.median(np.abs(pages[1][20:-20, 20:-20] / 65535 - other_sensor(vis)[20:-20, 20:-20])) < 0.01
    with Image.open(out) as stack:
        named = []
        for page in range(stack.n_frames):
            stack.seek(page)
            named.append(stack.tag_v2[285])
    assert named == ["green.tif", "nir.tif", "red.tif"]


# --- what the command does with a verdict ---------------------------------------------------------


def test_doubtful_is_written_and_said(tmp_path, capsys, stub):
    stub(made_up("doubtful"))
    vis, ir = scene()
    files = write(tmp_path / "v.png", vis), write(tmp_path / "i.png", ir)
    assert main(["register", *files, "-o", str(tmp_path / "a.png")]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "doubtful" in captured.err
    assert (tmp_path / "a.png").exists()
    first, second, _ = captured.out.splitlines()
    assert first.startswith("doubtful, confidence 0.90: similarity, 4 of 5 places agree")
    middle = transform_points(TRUE, np.array([[(WIDTH - 1) / 2, (HEIGHT - 1) / 2]]))[0]
    shift = middle - ((WIDTH - 1) / 2, (HEIGHT - 1) / 2)
    assert f"({shift[0]:+.2f}, {shift[1]:+.2f}) px" in second
    assert "turned by -1.14 degrees, scaled by 1.0042" in second


def test_a_rig_of_which_no_band_fits_writes_no_stack(tmp_path, capsys, stub):
    failed = made_up("failed", None)
    stub(failed, failed)
    files = [write(tmp_path / f"{n}.png", scene()[0]) for n in "abc"]
    assert main(["register", *files, "-o", str(tmp_path / "s.tif")]) == 1
    captured = capsys.readouterr()
    assert not (tmp_path / "s.tif").exists() and "no band was registered" in captured.err
    assert captured.out.splitlines()[1].split()[1:] == ["failed", "0.01", "-", "4/5", "-", "-"]


def test_nodata_does_not_mix_into_the_image(tmp_path, stub):
    stub(made_up())
    vis, ir = scene()
    values = (1000 + 500 * ir).astype(np.float32)
    values[60:80, 90:120] = -9999
    cv2.imwrite(str(tmp_path / "i.tif"), values)
    vis_file, out = write(tmp_path / "v.png", vis), tmp_path / "a.tif"
    assert main(["register", vis_file, str(tmp_path / "i.tif"), "-o", str(out), "--nodata", "-9999"]) == 0
    aligned = read_image_raw(out)
    hole = aligned == -9999
    assert hole[76, 97] and hole[-1, -1] and 0.02 < hole.mean() < 0.15
    assert aligned[~hole].min() > 900 and aligned[~hole].max() < 1600


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "a.xyz"), "extension"),
        (("-o", "missing/a.png"), "does not exist"),
        (("-o", "a.jpg"), "uint8, got uint16"),
        (("-o", "i.tif"), "also an input"),
        (("-o", "a.png", "--overlay", "a.png"), "the file of -o"),
        (("--overlay", "a.txt"), "extension"),
        (("--yml", "a.json"), ".yml or .yaml"),
        (("--gcp", "a.csv"), ".points or .txt or .gcp"),
        (("--save", "a.yml"), ".json"),
        (("-o", "a.tif", "--nodata", "-1"), "0 to 65535"),
        (("--nodata", "x"), "expected a number"),
        (("--max-rotation", "200"), "[0, 180]"),
        (("--max-scale", "0.5"), "[1, 4]"),
        (("--max-displacement", "-1"), "at least 0"),
        (("--kind", "rigid"), "invalid choice"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(command, "load_matcher", lambda args: pytest.fail("loaded the model"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "v.png", scene()[0])
    write(tmp_path / "i.tif", scene()[1], np.uint16)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["register", "v.png", "i.tif", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and captured.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_mistakes_with_bands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_matcher", lambda args: pytest.fail("loaded the model"))
    files = [write(tmp_path / f"{n}.png", scene()[0]) for n in "abc"]
    for options, message in (
        (("-o", str(tmp_path / "s.png")), ".tif or .tiff"),
        (("--overlay", str(tmp_path / "o.png")), "got 2 bands"),
    ):
        assert main(["register", *files, *options]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and message in captured.err


def test_an_image_smaller_than_a_patch(tmp_path, capsys, stub):
    stub(made_up())
    small = write(tmp_path / "small.png", np.zeros((40, 50)))
    assert main(["register", write(tmp_path / "v.png", scene()[0]), small]) == 2
    assert "small.png is 50 x 40 pixels, smaller than a patch" in capsys.readouterr().err


def test_defaults_are_those_of_the_library():
    for method, files in ((Matcher.register, "a b"), (Matcher.register_stack, "a b c")):
        given = inspect.signature(method).parameters
        expected = Limits(**{field.name: given[field.name].default for field in dataclasses.fields(Limits)})
        args = build_parser().parse_args(["register", *files.split()])
        assert command._limits(args, len(args.ir) > 1) == expected


# --- files ----------------------------------------------------------------------------------------


def test_yml_and_control_points_refuse_a_failed_registration(tmp_path):
    for save, name in ((save_yml, "t.yml"), (save_control_points, "t.points")):
        with pytest.raises(KGLMatchError, match="failed"):
            save(tmp_path / name, made_up("failed", None))
    assert not list(tmp_path.iterdir())


def test_control_points_on_a_map(tmp_path):
    frame = MapFrame(np.array([[10.0, 0, 500_005], [0, -10.0, 4_999_995]]), 32633)
    save_control_points(tmp_path / "g.txt", made_up(), frame)
    lines = (tmp_path / "g.txt").read_text().splitlines()
    assert lines[0].startswith("#") and lines[1] == "-a_srs EPSG:32633" and len(lines) == 2 + 4
    words = lines[2].split()
    column, row = transform_points(TRUE, np.array([[10, 20]]))[0] + 0.5
    assert words[0] == "-gcp" and words[3:] == ["500105", "4999795"]
    assert np.allclose([float(words[1]), float(words[2])], (column, row), atol=1e-3)

    save_control_points(tmp_path / "g.points", made_up(), frame)
    lines = (tmp_path / "g.points").read_text().splitlines()
    assert lines[0] == "#CRS: EPSG:32633" and lines[2].startswith("500105,4999795,")
    assert float(lines[2].split(",")[3]) == pytest.approx(-row, abs=1e-3)


def geotiff(path, point, image=None):
    """A GeoTIFF of 10 m pixels whose raster type is area (1) or point (2)."""
    image = np.zeros((70, 80), np.uint8) if image is None else image
    info = {33550: (10.0, 10.0, 0.0), 33922: (0.0, 0.0, 0.0, 5e5, 5e6, 0.0)}
    keys = struct.pack("<12H", 1, 1, 0, 2, 1025, 0, 1, point, 3072, 0, 1, 32633)
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    for tag, value in info.items():
        tags.tagtype[tag] = 12
        tags[tag] = value
    tags.tagtype[34735] = 3
    tags[34735] = struct.unpack("<12H", keys)
    tags.tagtype[34737] = 2
    tags[34737] = "WGS 84 / UTM zone 33N|"
    Image.fromarray(image).save(path, tiffinfo=tags)


def test_map_frame(tmp_path):
    geotiff(tmp_path / "area.tif", 1)
    geotiff(tmp_path / "point.tif", 2)
    area, point = read_map_frame(tmp_path / "area.tif"), read_map_frame(tmp_path / "point.tif")
    assert area.epsg == point.epsg == 32633
    assert np.allclose(area.matrix, [[10, 0, 500_005], [0, -10, 4_999_995]])
    assert np.allclose(point.matrix, [[10, 0, 500_000], [0, -10, 5_000_000]])
    assert read_map_frame(write(tmp_path / "plain.png", scene()[0])) is NO_MAP
    with pytest.raises(ImageError, match="no such file"):
        read_map_frame(tmp_path / "none.tif")


@pytest.mark.parametrize("bands", [1, 2])
def test_what_is_on_a_map_stays_on_it(tmp_path, stub, bands):
    stub(*[made_up()] * bands)
    vis, ir = scene()
    geotiff(tmp_path / "v.tif", 2, np.rint(vis * 255).astype(np.uint8))
    files = [write(tmp_path / f"i{n}.tif", ir, np.uint16) for n in range(bands)]
    out = tmp_path / "a.tif"
    assert main(["register", str(tmp_path / "v.tif"), *files, "-o", str(out), "--nodata", "7"]) == 0
    found, expected = read_map_frame(out), read_map_frame(tmp_path / "v.tif")
    assert found.epsg == 32633 and np.array_equal(found.matrix, expected.matrix)
    with Image.open(out) as image:
        assert image.n_frames == (1 if bands == 1 else 3)
        for page in range(image.n_frames):
            image.seek(page)
            assert image.tag_v2[34737] == "WGS 84 / UTM zone 33N|"
            assert float(image.tag_v2[42113]) == 7
            assert image.size == (WIDTH, HEIGHT)
    last = cv2.imreadmulti(str(out), flags=cv2.IMREAD_UNCHANGED)[1][-1]
    assert last.dtype == np.uint16 and np.array_equal(last == 7, ~made_up().covered())


def test_without_a_map_nothing_is_said_of_one(tmp_path, stub):
    stub(made_up())
    vis, ir = scene()
    files = write(tmp_path / "v.tif", vis), write(tmp_path / "i.tif", ir)
    assert main(["register", *files, "-o", str(tmp_path / "a.tif")]) == 0
    assert read_map_frame(tmp_path / "a.tif") is NO_MAP
    with Image.open(tmp_path / "a.tif") as image:
        assert not {33550, 33922, 34264, 34735} & set(image.tag_v2)


def test_stack_keeps_every_page_as_it_is(tmp_path):
    rng = np.random.default_rng(0)
    pages = [
        rng.integers(0, 65536, (700, 900, 3)).astype(np.uint16),
        rng.integers(0, 256, (41, 33)).astype(np.uint8),
        rng.normal(size=(50, 60)).astype(np.float32),
        rng.integers(-3000, 3000, (30, 31)).astype(np.int16),
        rng.integers(0, 65536, (20, 30, 4)).astype(np.uint16),
        rng.normal(size=(21, 22)),
        rng.integers(0, 2, (20, 30)).astype(bool),
    ]
    save_stack(tmp_path / "s.tif", pages, [f"page {i}" for i in range(len(pages))])
    ok, back = cv2.imreadmulti(str(tmp_path / "s.tif"), flags=cv2.IMREAD_UNCHANGED)
    assert ok and len(back) == len(pages)
    for page, read in zip(pages, back, strict=True):
        rgb = read[..., [2, 1, 0, 3][: read.shape[2]]] if read.ndim == 3 else read
        expected = page * np.uint8(255) if page.dtype == bool else page
        assert rgb.dtype == expected.dtype and np.array_equal(rgb, expected)


def test_a_large_stack_is_a_bigtiff(tmp_path, monkeypatch):
    pages = [np.arange(600, dtype=np.uint16).reshape(20, 30)] * 2
    for limit, big in ((2400, False), (2399, True)):
        monkeypatch.setattr("kglmatch.registration.files._CLASSIC_BYTES", limit)
        save_stack(tmp_path / "s.tif", pages, ["a", "b"])
        with tifffile.TiffFile(tmp_path / "s.tif") as file:
            assert file.is_bigtiff == big
        back = cv2.imreadmulti(str(tmp_path / "s.tif"), flags=cv2.IMREAD_UNCHANGED)[1]
        assert len(back) == 2 and np.array_equal(back[1], pages[1])


DAMAGED = {
    "five keys": ({34735: (3, (1, 1, 0, 1, 5))}, "key directory has 5 numbers, expected 8"),
    "one key": ({34735: (3, (1,))}, "key directory has 1 numbers"),
    "keys of text": ({34735: (2, "keys")}, "tag 34735 holds no numbers"),
    "one scale": ({33550: (12, (10.0,)), 33922: (12, (0, 0, 0, 5e5, 5e6, 0))}, "pixel scale is [10.0]"),
    "scale of 0": ({33550: (12, (0.0, 10.0, 0.0)), 33922: (12, (0, 0, 0, 5e5, 5e6, 0))}, "pixel scale"),
    "one tie": ({33550: (12, (10.0, 10.0, 0.0)), 33922: (12, (5.0,))}, "tie points have 1 numbers"),
    "one-value matrix": ({34264: (12, (1.0,))}, "matrix has 1 numbers, expected 16"),
    "nan": ({34264: (12, (float("nan"),) * 16)}, "not finite"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_geotiff_is_one_line_before_the_work(tmp_path, capsys, monkeypatch, what):
    monkeypatch.setattr(command, "load_matcher", lambda args: pytest.fail("loaded the model"))
    tags, message = DAMAGED[what]
    extra = [
        (tag, kind, len(values), values if len(values) > 1 else values[0], True)
        for tag, (kind, values) in tags.items()
    ]
    vis, ir = scene()
    reference = tmp_path / "v.tif"
    tifffile.imwrite(reference, np.rint(vis * 255).astype(np.uint8), metadata=None, extratags=extra)
    bands = [write(tmp_path / f"i{n}.tif", ir) for n in range(2)]
    before = sorted(p.name for p in tmp_path.iterdir())
    for files, option, name in (
        (bands[:1], "-o", "a.tif"),
        (bands[:1], "--gcp", "a.points"),
        (bands, "-o", "stack.tif"),
    ):
        assert main(["register", str(reference), *files, option, str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and message in captured.err and str(reference) in captured.err
        assert captured.out == "" and sorted(p.name for p in tmp_path.iterdir()) == before
    # Where its place on the map is not needed, it does not matter.
    monkeypatch.undo()
    matcher = SimpleNamespace(
        config=SimpleNamespace(patch_size=64), device="cpu", register=lambda vis, ir, **limits: made_up()
    )
    monkeypatch.setattr(command, "load_matcher", lambda args: matcher)
    assert main(["register", str(reference), bands[0], "-o", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize("bands", [1, 2])
def test_outputs_appear_together_or_not_at_all(tmp_path, capsys, monkeypatch, stub, bands):
    stub(*[made_up()] * bands)
    vis, ir = scene()
    files = [write(tmp_path / "v.png", vis), *(write(tmp_path / f"i{n}.png", ir) for n in range(bands))]
    (tmp_path / "a.tif").write_text("an older one")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full_disk(path, value):
        raise OutputError(f"cannot write {path}: no space left")

    monkeypatch.setattr("kglmatch.registration.files.save_json", full_disk)
    options = ["-o", str(tmp_path / "a.tif"), "--save", str(tmp_path / "r.json")]
    if bands == 1:
        options += ["--overlay", str(tmp_path / "o.png"), "--yml", str(tmp_path / "t.yml")]
    assert main(["register", *files, *options]) == 2
    assert "no space left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "a.tif").read_text() == "an older one"


def test_stack_refuses_what_it_cannot_hold(tmp_path):
    grey = np.zeros((4, 4), np.uint8)
    with pytest.raises(OutputError, match=r"\.tif or \.tiff"):
        save_stack(tmp_path / "s.png", [grey], ["a"])
    with pytest.raises(ImageError, match="complex64"):
        save_stack(tmp_path / "s.tif", [grey.astype(np.complex64)], ["a"])
    with pytest.raises(ImageError, match="4 channels"):
        save_stack(tmp_path / "s.tif", [np.zeros((4, 4, 5), np.uint8)], ["a"])
    assert not list(tmp_path.iterdir())


# --- the overlay ----------------------------------------------------------------------------------


def test_overlay_is_grey_where_both_agree_and_coloured_where_not():
    vis = scene()[0]

    def colour(transform):
        picture = draw_overlay(vis, vis, transform)[:780].astype(int)
        assert picture.shape[1] >= 1000 and np.array_equal(picture[..., 1], picture[..., 2])
        return picture[..., 0] - picture[..., 1], picture

    same, _ = colour(np.eye(3))
    apart, _ = colour(np.array([[1, 0, 4.0], [0, 1, 0], [0, 0, 1]]))
    assert np.abs(same).mean() < 4 and np.abs(apart).mean() > 20
    _, half = colour(np.array([[1, 0, WIDTH / 2], [0, 1, 0], [0, 0, 1.0]]))
    assert half[:, -100:, 1].max() == 0 and half[:, -100:, 0].mean() > 60  # not covered: red alone
    with pytest.raises(KGLMatchError, match="homography"):
        draw_overlay(vis, vis, np.eye(2))
