"""Rasters on the map: reading, the map as prior, writing, and what cannot be done, in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")

from rasterio import Affine  # noqa: E402
from rasterio.crs import CRS  # noqa: E402
from rasterio.enums import ColorInterp, MaskFlags, Resampling  # noqa: E402
from rasterio.transform import array_bounds, from_origin  # noqa: E402
from rasterio.warp import calculate_default_transform, reproject  # noqa: E402

from kglmatch.batch.transforms import read_saved_transform  # noqa: E402
from kglmatch.cli import main  # noqa: E402
from kglmatch.errors import DataError, ImageError, KGLMatchError, OutputError  # noqa: E402
from kglmatch.features import Features  # noqa: E402
from kglmatch.geo import register as register_module  # noqa: E402
from kglmatch.geo.grid import Grid, pixels_between  # noqa: E402
from kglmatch.geo.raster import Raster  # noqa: E402
from kglmatch.geo.register import (  # noqa: E402
    check_rasters,
    common_scene,
    displacement_in_pixels,
    parse_displacement,
    register_rasters,
)
from kglmatch.geo.windows import place_tiles, steps  # noqa: E402
from kglmatch.geo.write import creation_options, save_on_grid, save_shifted  # noqa: E402
from kglmatch.geometry import transform_points  # noqa: E402
from kglmatch.registration.align import Alignment  # noqa: E402
from kglmatch.registration.limits import Limits  # noqa: E402
from kglmatch.registration.masks import Masks  # noqa: E402
from kglmatch.registration.results import BandRegistration  # noqa: E402
from kglmatch.registration.structure import structure_maps  # noqa: E402

UTM = CRS.from_epsg(32633)
PLACE = from_origin(500_000, 5_400_000, 10, 10)  # of the example pair's first pixel
CUT = 64  # pixels from the example's edge to the visible raster's
SIDE = 256
ERROR = (43.0, -31.0)  # metres east and north by which the ir raster's map is wrong
BANDS = ("B08", "B04", "B8A", "B11", "B12")


def example(band):
    with rasterio.open(f"examples/data/sentinel2_{band}.tif") as file:
        return file.read(1)


def write(path, pixels, crs=UTM, transform=PLACE, *, mask=None, colours=None, tags=None, **profile):
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    count, height, width = pixels.shape
    profile = {
        "driver": "GTiff",
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
    } | profile
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path,
            "w",
            width=width,
            height=height,
            count=count,
            dtype=pixels.dtype,
            crs=crs,
            transform=transform,
            **profile,
        ) as file,
    ):
        if colours is not None:
            file.colorinterp = colours  # before the pixels: then it is too late
        file.write(pixels)
        if tags is not None:
            file.update_tags(**tags)
        if mask is not None:
            file.write_mask(mask)
    return path


def on_grid(pixels, transform, crs, resolution, shift=ERROR):
    """Pixels of the example's grid, on another one whose map is wrong; 0 where there are none."""
    moved = Affine.translation(*shift) @ transform
    height, width = pixels.shape[1:]
    bounds = array_bounds(height, width, moved)
    target, width, height = calculate_default_transform(
        UTM, crs, width, height, *bounds, resolution=resolution
    )
    out = np.zeros((len(pixels), height, width), pixels.dtype)
    reproject(
        pixels,
        out,
        src_transform=moved,
        src_crs=UTM,
        dst_transform=target,
        dst_crs=crs,
        resampling=Resampling.cubic,
        src_nodata=0,
        dst_nodata=0,
    )
    return out, target


def five_bands():
    red, nir = example("red"), example("nir")
    return np.stack([nir, red, nir // 2, nir + 100, nir // 4]).astype(np.uint16)


class Edges:
    """Stands in for the matcher: a patch is described by the directions of its edges, which takes no time."""

    config = SimpleNamespace(patch_size=64, inference={})
    device = "cpu"

    def describe(self, patches, modality):
        rows = [cv2.resize(structure_maps(p).transpose(1, 2, 0), (8, 8)).ravel() for p in patches]
        norms = np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6
        return Features((rows / norms).astype(np.float32), modality)

    def score(self, vis, ir):
        return np.einsum("nd,nd->n", vis.descriptors, ir.descriptors).clip(0, 1)

    def extract(self, image, modality, **_options):
        empty = np.empty((0, 128), np.float32)
        return Features(empty, modality)

    def match(self, vis, ir, **_options):
        return SimpleNamespace(keypoints_vis=None, keypoints_ir=None)


@pytest.fixture(scope="module")
def edges():
    return Edges()


@pytest.fixture(scope="module")
def vis(tmp_path_factory):
    """256 x 256 pixels of red, EPSG:32633, 10 m."""
    cut = example("red")[CUT : CUT + SIDE, CUT : CUT + SIDE]
    return write(
        tmp_path_factory.mktemp("geo") / "vis.tif", cut, transform=PLACE @ Affine.translation(CUT, CUT)
    )


@pytest.fixture(scope="module")
def mercator(tmp_path_factory):
    """Five bands, EPSG:3857, 15 m of the map (10 on the ground), nodata 0."""
    pixels, target = on_grid(five_bands(), PLACE, CRS.from_epsg(3857), 15)
    path = write(
        tmp_path_factory.mktemp("geo") / "ir.tif",
        pixels,
        CRS.from_epsg(3857),
        target,
        nodata=0,
        tags={"SENSOR": "MSI"},
    )
    with rasterio.open(path, "r+") as file:
        for number, name in enumerate(BANDS, 1):
            file.set_band_description(number, name)
        file.update_tags(2, GAIN="3")
        file.build_overviews([2, 4], Resampling.average)
    return path


@pytest.fixture(scope="module")
def found(edges, vis, mercator):
    return register_rasters(edges, vis, mercator)


def shift_of(found):
    """(2,) pixels at the middle."""
    middle = np.array([(SIDE - 1) / 2, (SIDE - 1) / 2, 1])
    moved = found.registration.transform @ middle
    return moved[:2] / moved[2] - middle[:2]


SENTINEL = 4  # of the pairs, one whose radar image is registered well
EXPECTED = np.array([ERROR[0], -ERROR[1]]) / 10


# --- the map as prior -----------------------------------------------------------------------------


def test_another_reference_system_and_resolution(found):
    assert found.registration.verdict == "registered"
    np.testing.assert_allclose(shift_of(found), EXPECTED, atol=0.3)
    np.testing.assert_allclose(found.shift_metres, [-ERROR[0], -ERROR[1]], atol=3)
    told = found.to_dict()
    assert told["crs"] == "EPSG:32633" and told["geotransform"][0] == 10


@pytest.mark.parametrize(
    ("crs", "resolution", "turn"),
    [(4326, 0.0001, "north"), (32633, 20, "north"), (32634, 10, "south"), (32633, 10, "rotated")],
)
def test_any_grid(tmp_path, edges, vis, crs, resolution, turn):
    pixels, target = on_grid(example("nir")[None], PLACE, CRS.from_epsg(crs), resolution)
    if turn == "south":
        target = target @ Affine.translation(0, pixels.shape[1]) @ Affine.scale(1, -1)
        pixels = pixels[:, ::-1]
    elif turn == "rotated":
        turned = target @ Affine.rotation(20, (256, 256))
        out = np.zeros_like(pixels)
        reproject(
            pixels,
            out,
            src_transform=target,
            src_crs=UTM,
            dst_transform=turned,
            dst_crs=UTM,
            resampling=Resampling.cubic,
            src_nodata=0,
            dst_nodata=0,
        )
        pixels, target = out, turned
    ir = write(tmp_path / "ir.tif", pixels, CRS.from_epsg(crs), target, nodata=0)
    found = register_rasters(edges, vis, ir, kind="translation", max_displacement="80m")
    assert found.registration.verdict == "registered"
    np.testing.assert_allclose(shift_of(found), EXPECTED, atol=0.5)


def test_the_first_raster_may_be_rotated_or_south_up(tmp_path, edges):
    red = example("red")
    ir = write(tmp_path / "ir.tif", example("nir"), transform=Affine.translation(*ERROR) @ PLACE)
    turned = PLACE @ Affine.rotation(30, (256, 256)) @ Affine.translation(100, 100)
    out = np.zeros((SIDE, SIDE), red.dtype)
    reproject(
        red,
        out,
        src_transform=PLACE,
        src_crs=UTM,
        dst_transform=turned,
        dst_crs=UTM,
        resampling=Resampling.cubic,
    )
    rotated = write(tmp_path / "rotated.tif", out, transform=turned)
    found = register_rasters(edges, rotated, ir, kind="translation")
    assert found.registration.verdict == "registered"
    np.testing.assert_allclose(found.shift_metres, [-ERROR[0], -ERROR[1]], atol=4)
    np.testing.assert_allclose(found.map_shift(), [-ERROR[0], -ERROR[1]], atol=4)
    with Raster(ir) as raster:
        save_on_grid(raster, tmp_path / "out.tif", found.grid, found.registration.transform)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.transform.almost_equals(turned, 1e-6)
        aligned = file.read(1)
    reproject(
        example("nir"),
        out,
        src_transform=PLACE,
        src_crs=UTM,
        dst_transform=turned,
        dst_crs=UTM,
        resampling=Resampling.cubic,
    )
    assert np.corrcoef(aligned.ravel(), out.ravel())[0, 1] > 0.98


def test_a_part_of_one_in_the_whole_of_the_other(tmp_path, edges, vis):
    nir = example("nir")[20:200, 150:400]
    place = Affine.translation(*ERROR) @ PLACE @ Affine.translation(150, 20)
    ir = write(tmp_path / "ir.tif", nir, transform=place)
    found = register_rasters(edges, vis, ir, kind="translation")
    assert found.registration.verdict == "registered" and found.registration.vis_size == (SIDE, SIDE)
    np.testing.assert_allclose(shift_of(found), EXPECTED, atol=0.8)


def test_windows_of_large_rasters(monkeypatch, edges, vis, mercator):
    """The way of rasters over 3072 pixels a side, at a twelfth of the size."""
    monkeypatch.setattr(register_module, "WHOLE", 200)
    monkeypatch.setattr(register_module, "_COARSE", 128)
    found = register_rasters(edges, vis, mercator)
    assert found.registration.verdict == "registered"
    np.testing.assert_allclose(shift_of(found), EXPECTED, atol=0.3)
    assert found.registration.keypoints_vis.max() > 128  # in full resolution


def test_levels_between_coarse_and_fine():
    assert steps(1.5) == [1.0]
    assert steps(10.0) == pytest.approx([10**0.5, 1.0])


def test_tiles_are_where_there_is_structure():
    image = np.zeros((100, 200), np.float32)
    image[30:60, 120:180] = np.random.default_rng(0).random((30, 60), np.float32)
    valid = np.ones(image.shape, bool)
    valid[:, 150:] = False
    tiles = place_tiles(image, image, valid, 10.0, 100.0)
    assert len(tiles)
    assert (tiles[:, 0] > 1150).all() and (tiles[:, 0] < 1550).all() and (tiles[:, 1] < 660).all()


def test_the_better_supported_of_two_searches_is_judged(monkeypatch):
    """A tight limit on radar: from the map's place the same transform is found with less support."""

    def alignment(shift, support):
        empty = np.empty((0, 2))
        transform = np.array([[1, 0, shift], [0, 1, 0], [0, 0, 1.0]])
        return Alignment(transform, "affine", empty, empty, np.empty(0), np.empty(0), support)

    near, found, far = alignment(4.0, 0.1), alignment(4.5, 0.28), alignment(60.0, 0.3)
    judged = []
    monkeypatch.setattr(register_module, "refine", lambda *_, **__: near)
    monkeypatch.setattr(register_module, "align", lambda *_: [far, found])
    monkeypatch.setattr(
        register_module,
        "choose",
        lambda *arguments: judged.append(arguments[3]) or SimpleNamespace(errors=()),
    )
    image = np.zeros((256, 256), np.float32)
    masks = Masks(*np.ones((2, 256, 256), bool))
    register_module._register_images(None, image, image, Limits(max_displacement=10), masks, [])
    assert judged == [[found]]


def test_nothing_is_found_where_there_is_nothing(tmp_path, edges, vis):
    noise = np.random.default_rng(0).integers(0, 9999, (512, 512)).astype(np.uint16)
    found = register_rasters(edges, vis, write(tmp_path / "ir.tif", noise))
    assert found.registration.verdict == "failed" and np.isnan(found.shift_metres).all()
    with pytest.raises(KGLMatchError, match="no shift"):
        found.map_shift()


def test_displacements_between_rasters(edges, vis, mercator):
    result = check_rasters(edges, vis, mercator, max_displacement="160m")
    assert result.check.verdict == "registered" and result.check.image_size == (SIDE, SIDE)
    np.testing.assert_allclose(result.check.shift, EXPECTED, atol=0.4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60m", (60, "m")),
        ("0.5 km", (500, "m")),
        (12, (12, "px")),
        ("12px", (12, "px")),
        ("1e2m", (100, "m")),
    ],
)
def test_displacements(text, expected):
    assert parse_displacement(text) == expected


@pytest.mark.parametrize("text", ["", "m", "-3", "60 miles", "nan", "1.2.3m"])
def test_what_is_no_displacement(text):
    with pytest.raises(KGLMatchError, match="pixels or metres"):
        parse_displacement(text)


@pytest.mark.parametrize(
    ("crs", "side", "x", "y"),
    [
        (32633, 10.0, 5e5, 5.4e6),
        (3857, 10 / np.cos(np.deg2rad(60)), 0, 8_399_738),
        (4326, 1 / 11132, 10, 0.0),
    ],
)
def test_metres_are_on_the_ground(crs, side, x, y):
    grid = Grid.from_affine(CRS.from_epsg(crs), from_origin(x, y, side, side), 10, 10)
    assert displacement_in_pixels("60m", grid) == pytest.approx(6, rel=0.01)
    assert displacement_in_pixels(7, grid) == 7 and displacement_in_pixels(None, grid) is None


# --- reading --------------------------------------------------------------------------------------


def test_bands_by_number_and_name(mercator):
    for band, number in (("B8A", 3), ("b8a", 3), (5, 5), ("5", 5), (None, 1)):
        with Raster(mercator, band) as raster:
            assert raster.bands == (number,)
    with Raster(f"{mercator}:B11") as raster:
        assert raster.bands == (4,) and raster.path == str(mercator)
    with pytest.raises(ImageError, match=r"has no band '9'; it has 1 \(B08\), 2 \(B04\)"):
        Raster(mercator, "9")


def test_colours_become_grey(tmp_path):
    rgb = np.zeros((4, 70, 80), np.uint8)
    rgb[0], rgb[1], rgb[2], rgb[3] = 100, 200, 50, 255
    rgb[3, :10] = 0
    colours = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    with Raster(write(tmp_path / "rgba.tif", rgb, colours=colours)) as raster:
        grey, valid = raster.read((0, 0, 80, 70), (80, 70))
    assert grey[20, 20] == pytest.approx((0.299 * 100 + 0.587 * 200 + 0.114 * 50) / 255)
    assert not valid[:10].any() and valid[10:].all()


@pytest.mark.parametrize("way", ["nodata", "mask", "alpha", "given", "nan", "inf"])
def test_invalid_pixels_are_in_no_percentile_and_no_result(tmp_path, way):
    values = np.random.default_rng(0).integers(1000, 3000, (90, 100)).astype(np.float32)
    values[:, :30] = {"nan": np.nan, "inf": np.inf}.get(way, -9999)
    options = {
        "nodata": {"nodata": -9999},
        "mask": {"mask": np.where(np.arange(100) < 30, 0, 255).astype(np.uint8) * np.ones((90, 1), np.uint8)},
    }.get(way, {})
    if way == "alpha":
        values = np.stack([values, np.where(np.arange(100) < 30, 0, 1) * np.ones((90, 1), np.float32)])
        values = values.astype(np.float32)
        options = {"colours": [ColorInterp.gray, ColorInterp.alpha]}
    path = write(tmp_path / "r.tif", values, **options)
    with Raster(path, nodata=-9999 if way == "given" else None) as raster:
        grey, valid = raster.read((0, 0, 100, 90), (100, 90))
        small, small_valid = raster.on(raster.grid.part(0, 0, 50, 45, step=2))
        shifted, _ = raster.on(raster.grid.part(0.5, 0.5, 99, 89))
    assert not valid[:, :30].any() and valid[:, 30:].all() and not grey[:, :30].any()
    assert np.median(grey[valid]) == pytest.approx(0.5, abs=0.05)
    assert small_valid[:, 15:].all() and not small_valid[:, :14].any() and small[small_valid].min() > 0.02
    assert shifted[:, 40:].std() > 0.05


def test_whole_numbers_beyond_float32(tmp_path):
    """Values above 2^24, and beyond those of int32, keep their differences."""
    base = np.uint32(4_294_000_000)
    values = base + np.arange(100 * 90, dtype=np.uint32).reshape(90, 100) % np.uint32(64)
    path = write(tmp_path / "r.tif", values)
    with Raster(path) as raster:
        grey, _ = raster.read((0, 0, 100, 90), (100, 90))
        save_on_grid(raster, tmp_path / "out.tif", raster.grid, np.eye(3))
        grid = raster.grid
    assert len(np.unique(grey)) > 60
    with rasterio.open(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.read(1), values)
        assert file.dtypes == ("uint32",) and grid.width == 100


def test_pixels_on_a_coarser_grid_are_averages(tmp_path):
    values = np.random.default_rng(0).random((64, 64), np.float32)
    with Raster(write(tmp_path / "r.tif", values)) as raster:
        small, valid = raster.on(raster.grid.part(0, 0, 16, 16, step=4))
    assert valid.all()
    np.testing.assert_allclose(small, values.reshape(16, 4, 16, 4).mean(axis=(1, 3)), atol=1e-5)


# --- writing --------------------------------------------------------------------------------------


def test_all_bands_on_the_first_grid(tmp_path, vis, mercator, found):
    out = tmp_path / "out.tif"
    with Raster(mercator) as raster:
        save_on_grid(raster, out, found.grid, found.registration.transform)
    with rasterio.open(out) as file, rasterio.open(vis) as first, rasterio.open(mercator) as source:
        assert file.crs == first.crs and file.transform == first.transform and file.shape == first.shape
        assert file.count == 5 and file.dtypes == ("uint16",) * 5 and file.nodata == 0
        assert file.descriptions == BANDS and file.colorinterp == source.colorinterp
        assert file.tags()["SENSOR"] == "MSI" and file.tags(2)["GAIN"] == "3"
        assert file.compression.name == "deflate" and file.block_shapes == source.block_shapes
        assert file.overviews(1) == [2, 4]
        pixels = file.read()
    cut = five_bands()[:, CUT : CUT + SIDE, CUT : CUT + SIDE].astype(float)
    for band, expected in zip(pixels.astype(float), cut, strict=True):
        assert np.corrcoef(band[8:-8, 8:-8].ravel(), expected[8:-8, 8:-8].ravel())[0, 1] > 0.99
    assert not list(tmp_path.glob("*.xml")) and not list(tmp_path.glob(".tmp*"))


def test_one_resampling(tmp_path, mercator, found):
    """What is written is what GDAL makes of the file's own pixels in a single step."""
    with Raster(mercator) as raster, rasterio.open(mercator) as source:
        save_on_grid(raster, tmp_path / "out.tif", found.grid, found.registration.transform)
        single = np.zeros((SIDE, SIDE), np.uint16)
        reproject(
            rasterio.band(source, 1),
            single,
            dst_transform=found.grid.moved(found.registration.transform).affine,
            dst_crs=UTM,
            dst_nodata=0,
            resampling=Resampling.cubic,
            tolerance=0.0,
        )
    with rasterio.open(tmp_path / "out.tif") as file:
        assert np.abs(file.read(1).astype(int) - single).max() <= 0.02 * np.ptp(single)
        assert np.corrcoef(file.read(1).ravel(), single.ravel())[0, 1] > 0.9999


def test_a_cog_stays_one(tmp_path, mercator, found):
    cog = tmp_path / "cog.tif"
    rasterio.shutil.copy(mercator, cog, driver="COG", BLOCKSIZE="128", COMPRESS="LZW")
    with Raster(cog) as raster:
        save_on_grid(raster, tmp_path / "out.tif", found.grid, found.registration.transform)
        save_shifted(raster, tmp_path / "shifted.tif", found.map_shift())
    for name in ("out.tif", "shifted.tif"):
        with rasterio.open(tmp_path / name) as file:
            structure = file.tags(ns="IMAGE_STRUCTURE")
            assert structure["LAYOUT"] == "COG" and structure["COMPRESSION"] == "LZW"
            assert file.block_shapes[0] == (128, 128) and file.overviews(1)
            assert file.descriptions == BANDS and file.nodata == 0 and file.tags(2)["GAIN"] == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cog.tif", "out.tif", "shifted.tif"]


def test_shift_only_changes_no_pixel(tmp_path, mercator, found):
    with Raster(mercator) as raster:
        save_shifted(raster, tmp_path / "out.tif", found.map_shift())
    with rasterio.open(tmp_path / "out.tif") as file, rasterio.open(mercator) as source:
        np.testing.assert_array_equal(file.read(), source.read())
        assert (
            file.tags() == source.tags() and file.overviews(1) == [2, 4] and file.profile["crs"] == source.crs
        )
        moved = np.array(file.transform @ (0, 0)) - np.array(source.transform @ (0, 0))
        np.testing.assert_allclose(moved, found.map_shift(), atol=1e-6)
    # In Mercator, a metre on the ground is longer on the map.
    stretch = 1 / np.cos(np.deg2rad(48.75))
    np.testing.assert_allclose(moved, np.array([-ERROR[0], -ERROR[1]]) * stretch, atol=5)


@pytest.mark.parametrize("kind", ["rotated", "vrt", "sidecar"])
def test_shift_only_of_other_files(tmp_path, kind):
    pixels = example("nir")[:100, :120]
    place = PLACE @ Affine.rotation(10) if kind == "rotated" else PLACE
    path = write(tmp_path / "in.tif", pixels, transform=place)
    if kind == "vrt":
        rasterio.shutil.copy(path, tmp_path / "in.vrt", driver="VRT")
        path = tmp_path / "in.vrt"
    elif kind == "sidecar":
        (tmp_path / "in.tif.aux.xml").write_text(
            '<PAMDataset><Metadata><MDI key="MADE">2020</MDI></Metadata></PAMDataset>'
        )
    with Raster(path) as raster:
        save_shifted(raster, tmp_path / "out.tif", np.array([25.0, -5.0]))
    with rasterio.open(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.read(1), pixels)
        assert file.transform.almost_equals(Affine.translation(25, -5) @ place, 1e-6)
        assert kind != "sidecar" or file.tags()["MADE"] == "2020"
    assert not (tmp_path / "out.tif.aux.xml").exists()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64", "complex64"])
@pytest.mark.parametrize("way", ["plain", "nodata", "mask", "alpha"])
def test_types_and_what_is_valid(tmp_path, dtype, way):
    if way == "alpha" and dtype == "complex64":
        pytest.skip("no complex alpha")
    values = np.random.default_rng(0).integers(1, 100, (2, 80, 90)).astype(dtype)
    options = {}
    if way == "nodata":
        values[:, :20] = 0
        options["nodata"] = 0
    elif way == "mask":
        options["mask"] = np.where(np.arange(80) < 20, 0, 255).astype(np.uint8)[:, None] * np.ones(
            (1, 90), np.uint8
        )
    elif way == "alpha":
        values[1] = 255 if dtype == "uint8" else 1000
        values[1, :20] = 0
        options["colours"] = [ColorInterp.gray, ColorInterp.alpha]
    path = write(tmp_path / "in.tif", values, **options)
    moved = np.array([[1.0, 0, 5], [0, 1, -3], [0, 0, 1]])
    with Raster(path) as raster:
        save_on_grid(raster, tmp_path / "out.tif", raster.grid, moved)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.dtypes == (dtype,) * 2 and file.colorinterp[1] == (
            ColorInterp.alpha if way == "alpha" else file.colorinterp[1]
        )
        np.testing.assert_array_equal(file.read(1)[23:, :85], values[0, 20:77, 5:])
        with Raster(tmp_path / "out.tif") as raster:
            valid = raster.read((0, 0, 90, 80), (90, 80))[1]
    expected = np.zeros((80, 90), bool)
    expected[3 if way == "plain" else 23 :, :85] = True
    np.testing.assert_array_equal(valid, expected)


def test_a_palette_is_not_mixed(tmp_path):
    classes = np.random.default_rng(0).integers(0, 3, (80, 90)).astype(np.uint8) * 100
    path = write(tmp_path / "in.tif", classes, photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (0, 0, 0, 255), 100: (255, 0, 0, 255), 200: (0, 255, 0, 255)})
    with Raster(path) as raster:
        save_on_grid(raster, tmp_path / "out.tif", raster.grid.part(0.4, 0.4, 80, 70), np.eye(3))
    with rasterio.open(tmp_path / "out.tif") as file:
        assert set(np.unique(file.read(1))) == {0, 100, 200}
        assert file.colormap(1)[100] == (255, 0, 0, 255)


def test_a_homography_and_a_smooth_mapping(tmp_path):
    values = example("nir")
    path = write(tmp_path / "in.tif", values)
    bent = np.array([[1, 0.01, 3], [0, 1, 2], [2e-5, 0, 1]])

    def mapping(points):
        return points + 3 * np.sin(points[:, ::-1] / 80)

    x, y = np.meshgrid(np.arange(300.0), np.arange(300.0))
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    for each in (bent, mapping):
        there = (each(points) if callable(each) else transform_points(each, points)).astype(np.float32)
        expected = cv2.remap(
            values, there[:, 0].reshape(300, 300), there[:, 1].reshape(300, 300), cv2.INTER_CUBIC
        )
        with Raster(path) as raster:
            save_on_grid(raster, tmp_path / "out.tif", raster.grid.part(0, 0, 300, 300), each)
        with rasterio.open(tmp_path / "out.tif") as file:
            off = np.abs(file.read(1).astype(float) - expected)[10:-10, 10:-10]
        assert np.percentile(off, 99) < 0.04 * np.ptp(expected)


def test_a_hole_in_one_band_is_none_in_another(tmp_path):
    pixels = np.full((2, 128, 128), 50, np.int16)
    pixels[0, 40:60, 40:60] = -1000
    path = write(tmp_path / "ir.tif", pixels, nodata=-1000)
    with Raster(path) as raster:
        save_on_grid(
            raster, tmp_path / "out.tif", raster.grid, np.array([[1, 0, 0.4], [0, 1, 0.3], [0, 0, 1]])
        )
    with rasterio.open(tmp_path / "out.tif") as out:
        first, second = out.read()
    assert set(np.unique(first)) == {-1000, 50} and (first == -1000).sum() > 300
    assert (second[:120, :120] == 50).all()


def test_pieces_fit_together(tmp_path, monkeypatch, mercator, found):
    from kglmatch.geo import write as write_module

    with Raster(mercator) as raster:
        save_on_grid(raster, tmp_path / "whole.tif", found.grid, found.registration.transform)
        monkeypatch.setattr(write_module, "_PIECE", 100)
        save_on_grid(raster, tmp_path / "pieces.tif", found.grid, found.registration.transform)
    with rasterio.open(tmp_path / "whole.tif") as a, rasterio.open(tmp_path / "pieces.tif") as b:
        off = np.abs(a.read().astype(int) - b.read())
    assert np.median(off) <= 2 and off.max() <= 150  # of 5000, where 1/50 pixel may be up to 100


def test_a_large_file_is_a_bigtiff(tmp_path):
    """Of 4.7 GiB, sparse: nothing is written of it but its head."""
    path = tmp_path / "big.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=50_000,
        height=50_000,
        count=1,
        dtype="uint16",
        crs=UTM,
        transform=PLACE,
        sparse_ok=True,
        **creation_options(),
    ):
        pass
    assert path.read_bytes()[:4] == b"II+\0" and path.stat().st_size < 1 << 27


# --- what cannot be done --------------------------------------------------------------------------


def error_line(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert out == "" and lines[-1].startswith("kglmatch: error: ") and "Traceback" not in err
    return lines[-1]


def test_extents_that_do_not_meet(tmp_path, vis, capsys):
    far = write(tmp_path / "far.tif", example("nir"), transform=Affine.translation(90_000, 0) @ PLACE)
    line = error_line(capsys, "register", vis, far, "-o", tmp_path / "out.tif")
    assert "do not overlap on the map" in line and not (tmp_path / "out.tif").exists()


def test_no_map_on_one_side(tmp_path, vis, capsys):
    bare = write(tmp_path / "bare.tif", example("nir")[:SIDE, :SIDE], None, Affine.identity())
    for option in ("--shift-only", "--max-displacement=60m"):
        line = error_line(capsys, "register", vis, bare, "-o", tmp_path / "out.tif", option)
        assert "bare.tif has no place on the map" in line
    no_crs = write(tmp_path / "no_crs.tif", example("nir"), None)
    with pytest.raises(ImageError, match="no coordinate reference system"), Raster(no_crs) as raster:
        _ = raster.grid


def test_all_nodata(quick, tmp_path, vis, capsys):
    empty = write(tmp_path / "empty.tif", np.zeros((512, 512), np.uint16), nodata=0)
    assert "no pixel with data" in error_line(capsys, "register", vis, empty, "-o", tmp_path / "out.tif")
    half = example("nir")
    half[: CUT + SIDE + 8] = 0
    path = write(tmp_path / "half.tif", half, nodata=0)
    assert "no pixel with data where" in error_line(capsys, "register", vis, path, "-o", tmp_path / "out.tif")


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (40, 300)])
def test_strips(quick, tmp_path, vis, capsys, shape):
    strip = write(
        tmp_path / "strip.tif",
        example("nir")[100 : 100 + shape[0], 100 : 100 + shape[1]],
        transform=PLACE @ Affine.translation(100, 100),
    )
    assert "smaller than a patch" in error_line(capsys, "register", vis, strip, "-o", tmp_path / "out.tif")


def test_a_reference_system_that_proj_does_not_know(tmp_path, vis, capsys):
    local = CRS.from_wkt('LOCAL_CS["our own grid",UNIT["metre",1]]')
    own = write(tmp_path / "own.tif", example("nir"), local)
    line = error_line(capsys, "register", vis, own, "-o", tmp_path / "out.tif")
    assert "cannot transform coordinates" in line and "our own grid" in line


def test_a_reference_system_of_both_needs_no_proj(tmp_path):
    local = CRS.from_wkt('LOCAL_CS["our own grid",UNIT["metre",1]]')
    a, b = (write(tmp_path / f"{n}.tif", example(n), local) for n in ("red", "nir"))
    with Raster(a) as first, Raster(b) as second:
        scene, _ = common_scene(first, second)
        assert scene.grid.width == 512 and displacement_in_pixels("60m", scene.grid) == pytest.approx(6)


def test_the_antimeridian(tmp_path, edges):
    """A raster in UTM zone 1 and one in degrees from 179.9 to 180.1, or from -180.1 to -179.9."""
    zone = CRS.from_epsg(32601)
    lon, lat = rasterio.warp.transform(CRS.from_epsg(4326), zone, [180.0], [50.0])
    place = from_origin(lon[0] - 2560, lat[0] + 2560, 10, 10)
    vis = write(tmp_path / "vis.tif", example("red"), zone, place)
    degrees = from_origin(179.95, 50.04, 0.00012, 0.00009)
    nir = np.zeros((1, 900, 850), np.uint16)
    # GDAL's own way from UTM, at longitudes on both sides.
    moved = Affine.translation(*ERROR) @ place
    reproject(
        example("nir")[None],
        nir,
        src_transform=moved,
        src_crs=zone,
        dst_transform=degrees,
        dst_crs=CRS.from_epsg(4326),
        resampling=Resampling.cubic,
        src_nodata=0,
        dst_nodata=0,
    )
    assert (nir[0] > 0).mean() > 0.3
    for turn in (0, -360):
        ir = write(
            tmp_path / "ir.tif", nir, CRS.from_epsg(4326), Affine.translation(turn, 0) @ degrees, nodata=0
        )
        found = register_rasters(edges, vis, ir, kind="translation")
        assert found.registration.verdict == "registered"
        np.testing.assert_allclose(found.shift_metres, [-ERROR[0], -ERROR[1]], atol=5)
        with Raster(ir) as raster:
            save_on_grid(
                raster, tmp_path / "out.tif", found.grid, found.registration.transform, own=found.ir_grid
            )
        with rasterio.open(tmp_path / "out.tif") as file:
            pixels = file.read(1)[20:-20, 20:-20]
        assert np.corrcoef(pixels.ravel(), example("nir")[20:-20, 20:-20].ravel())[0, 1] > 0.98
        other = write(tmp_path / "v4326.tif", nir, CRS.from_epsg(4326), degrees, nodata=0)
        with Raster(other) as first, Raster(ir) as second:
            scene, corner = common_scene(first, second)
            at = pixels_between(first.grid, scene.ir_grid, np.array([[3.0, 4.0]]))
        assert corner == (0, 0) and np.allclose(at, [[3, 4]], atol=1e-5)


def test_a_read_only_folder(quick, tmp_path, vis, mercator, capsys):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        (folder / "try").touch()
    except OSError:
        assert "cannot write" in error_line(capsys, "register", vis, mercator, "-o", folder / "out.tif")
    else:
        pytest.skip("this user may write anywhere")
    finally:
        folder.chmod(0o700)


def test_mistakes_of_the_command(quick, tmp_path, vis, mercator, capsys):
    for arguments, expected in (
        (("-o", "out.png"), "must end in .tif or .tiff"),
        (("--shift-only",), "name the file by -o"),
        (("--ir-band", "B99"), "has no band 'B99'"),
        (("--yml", tmp_path / "t.yml"), "different coordinate reference systems"),
        (("--max-displacement", "sixty"), "pixels or metres"),
        (("-o", tmp_path / "o.tif", "--nodata", "-1"), "nodata -1 is no uint16 value"),
    ):
        assert expected in error_line(capsys, "register", vis, mercator, *arguments)
    with Raster(mercator) as raster:
        with pytest.raises(KGLMatchError, match="resampling must be one of"):
            save_on_grid(raster, tmp_path / "o.tif", raster.grid, np.eye(3), resampling="magic")
        with pytest.raises(OutputError, match=r"must end in \.tif"):
            save_on_grid(raster, tmp_path / "o.img", raster.grid, np.eye(3))
    assert not list(tmp_path.iterdir())


def test_damaged_rasters(quick, tmp_path, vis, mercator, capsys):
    data = Path(mercator).read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 3])
    line = error_line(capsys, "register", vis, tmp_path / "cut.tif", "-o", tmp_path / "out.tif")
    assert "cannot read" in line
    assert "no such file" in error_line(capsys, "register", vis, tmp_path / "none.tif")
    (tmp_path / "text.vrt").write_text("no raster")
    assert "cannot read" in error_line(capsys, "register", vis, tmp_path / "text.vrt")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name or "tmp" in path.name] == []


def test_without_rasterio(tmp_path, monkeypatch, vis, mercator, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    for arguments in (("--shift-only", "-o", "o.tif"), ("--max-displacement", "60m"), ("--ir-band", "2")):
        from kglmatch.commands.common_rasters import is_map_pair, load_grey

        needs = {arguments[0]: arguments[0] != "--ir-band"}
        band = "2" if arguments[0] == "--ir-band" else None
        with pytest.raises(KGLMatchError, match=r'needs rasterio: pip install "kglmatch\[geo\]"'):
            is_map_pair(vis, mercator, None, band, needs)
    assert not is_map_pair(vis, mercator, None, None, {})
    with pytest.raises(KGLMatchError, match="needs rasterio"):
        load_grey(mercator, "2")
    with pytest.raises(ImageError, match=r"if it is a raster for GIS programs: pip install"):
        load_grey(mercator)  # five bands
    with pytest.raises(ImageError, match=r"no such file$"):
        load_grey(tmp_path / "none.tif")
    grey, valid = load_grey(vis)
    assert grey.shape == (SIDE, SIDE) and valid is None


@pytest.fixture
def quick(monkeypatch, edges):
    """The commands with `Edges` for their model."""
    for command in ("common_register", "check"):
        monkeypatch.setattr(f"kglmatch.commands.{command}.load_matcher", lambda args: edges)


# --- the commands ---------------------------------------------------------------------------------


def test_register_writes_everything(quick, tmp_path, vis, mercator, capsys):
    out, points, saved = tmp_path / "out.tif", tmp_path / "p.points", tmp_path / "r.json"
    overlay = tmp_path / "overlay.png"
    arguments = ["register", vis, f"{mercator}:B08", "-o", out, "--gcp", points, "--save", saved]
    arguments += ["--overlay", overlay, "--max-displacement", "80m", "--json", "--device", "cpu"]
    assert main([str(a) for a in arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "registered" and told["written"][-1] == str(saved)
    assert np.allclose(told["shift_metres"], [-ERROR[0], -ERROR[1]], atol=3)
    with rasterio.open(out) as file:
        assert file.count == 5 and file.crs == UTM
    # The saved transform does the same to any raster there.
    assert main([str(a) for a in ("apply", saved, mercator, "-o", tmp_path / "again.tif")]) == 0
    with rasterio.open(out) as file, rasterio.open(tmp_path / "again.tif") as again:
        assert again.crs == UTM and again.transform == file.transform
        np.testing.assert_array_equal(again.read(), file.read())
    arguments = ["apply", saved, mercator, "-o", tmp_path / "small.tif", "--size", "128x128"]
    assert main([str(a) for a in arguments]) == 0
    with rasterio.open(tmp_path / "small.tif") as small, rasterio.open(out) as file:
        assert small.transform.a == 20 and small.bounds == file.bounds
        means = file.read().reshape(5, 128, 2, 128, 2).astype(float).mean(axis=(2, 4))
        assert np.median(np.abs(small.read() - means)[:, 8:-8, 8:-8]) < 0.05 * means.mean()
    with pytest.raises(DataError, match="kglmatch apply takes it"):
        read_saved_transform(saved)
    capsys.readouterr()
    damaged = tmp_path / "damaged.json"
    for change, message in (({"crs": "EPSG:1"}, "damaged.json"), ({"geotransform": [1, 2]}, "six numbers")):
        damaged.write_text(json.dumps(json.loads(saved.read_text()) | change))
        line = error_line(capsys, "apply", damaged, mercator, "-o", tmp_path / "wrong.tif")
        assert message in line and not (tmp_path / "wrong.tif").exists()
    assert json.loads(saved.read_text())["crs"] == "EPSG:32633" and overlay.stat().st_size > 10_000
    # A control point is a pixel of the file, and the place on the map where its content belongs.
    lines = points.read_text().splitlines()
    assert lines[0] == "#CRS: EPSG:32633"
    rows = np.array([line.split(",")[:4] for line in lines[2:]], float)
    with rasterio.open(mercator) as file:
        x, y = file.transform @ (rows[:, 2], -rows[:, 3])
        east, north = rasterio.warp.transform(file.crs, UTM, x, y)
    apart = np.median(np.stack([east - rows[:, 0], north - rows[:, 1]]), axis=1)
    assert np.allclose(apart, ERROR, atol=4)


def test_register_shift_only(quick, tmp_path, vis, mercator, capsys):
    out = tmp_path / "out.tif"
    assert main(["register", str(vis), str(mercator), "-o", str(out), "--shift-only", "--device", "cpu"]) == 0
    assert "42" in (text := capsys.readouterr().out) or "43" in text
    with rasterio.open(out) as file, rasterio.open(mercator) as source:
        np.testing.assert_array_equal(file.read(), source.read())
        assert file.transform != source.transform


def test_check(quick, tmp_path, vis, mercator, capsys):
    picture = tmp_path / "arrows.png"
    arguments = ["check", vis, mercator, "--max-displacement", "160m", "-o", picture, "--json"]
    assert main([str(a) for a in arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert np.allclose(told["shift"], EXPECTED, atol=0.5) and picture.exists()


def test_match(matcher, monkeypatch, vis, mercator, capsys):
    monkeypatch.setattr("kglmatch.commands.match.load_matcher", lambda args: matcher)
    arguments = ["match", vis, f"{mercator}:1", "--max-displacement", "12", "--max-keypoints", "80", "--json"]
    assert main([*map(str, arguments), "--decide", "descriptor"]) == 0
    told = json.loads(capsys.readouterr().out)
    homography = np.array(told["homography"])
    moved = homography @ [128, 128, 1]
    assert np.allclose(moved[:2] / moved[2] - 128, EXPECTED, atol=1)


def test_a_killed_run_leaves_no_output(tmp_path, mercator):
    """The process dies while it writes."""
    code = f"""
import os, signal
import numpy as np
from kglmatch.geo import write
from kglmatch.geo.raster import Raster
write._PIECE = 64
calls = []
warp = write._Warp.__call__
def dying(self, grid):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return warp(self, grid)
write._Warp.__call__ = dying
with Raster({str(mercator)!r}) as raster:
    write.save_on_grid(raster, {str(tmp_path / "out.tif")!r}, raster.grid, np.eye(3))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == -9, result.stderr
    assert not (tmp_path / "out.tif").exists()
    with Raster(mercator) as raster:
        save_on_grid(raster, tmp_path / "out.tif", raster.grid, np.eye(3))
    assert [path.name for path in tmp_path.iterdir()] == ["out.tif"]  # what the first one left is cleared


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    script = Path(__file__).resolve().parents[1] / "benchmarks/geo.py"
    arguments = ["--size", "300", "--crs", "EPSG:3857", "--folder", tmp_path]
    result = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "registered, " in result.stdout and "GiB" in result.stdout
    assert float(result.stdout.split("corner error: ")[1].split()[0]) < 1


def test_bands_of_one_file_as_a_rig(monkeypatch, tmp_path, edges):
    """Without a map, and one band at a time: pixels of their own type, named as they were given."""
    results = []

    def register_stack(reference, bands, names, **_limits):
        results.extend([reference.shape, *[band.shape for band in bands]])
        found = register_module.Registration(
            "registered",
            0.9,
            np.eye(3),
            "affine",
            *[np.empty((0, 2), np.float32)] * 2,
            *[np.empty(0, np.float32)] * 2,
            np.empty(0, bool),
            1.0,
            0.9,
            0,
            (128, 100),
            (128, 100),
        )
        return [BandRegistration(name, found) for name in names]

    stub = SimpleNamespace(config=edges.config, device="cpu", register_stack=register_stack)
    monkeypatch.setattr("kglmatch.commands.register.load_matcher", lambda args: stub)
    path = write(tmp_path / "five.tif", five_bands()[:, :100, :128], None, Affine.identity())
    out = tmp_path / "stack.tif"
    assert main(["register", *[f"{path}:{n}" for n in (2, 1, 5)], "-o", str(out)]) == 0
    assert results == [(100, 128)] * 3
    for page, band in enumerate((1, 0, 4), 1):
        with rasterio.open(f"GTIFF_DIR:{page}:{out}") as file:
            np.testing.assert_array_equal(file.read(1), five_bands()[band, :100, :128])


@pytest.mark.slow
def test_sentinel(shared_data, tmp_path):
    """Optical and radar of Sentinel, 10 m a pixel, moved on the map by 60 m east and 50 m south."""
    from kglmatch import Matcher
    from kglmatch.images import read_image_raw

    matcher = Matcher.from_pretrained("kglnet-vis-sar", device="cpu")
    folder = shared_data / "vis-sar/sentinel/test"
    name = sorted(path.name for path in (folder / "optical").iterdir())[SENTINEL]
    optical, radar = (read_image_raw(folder / kind / name) for kind in ("optical", "sar"))
    vis = write(tmp_path / "vis.tif", np.moveaxis(optical, -1, 0) if optical.ndim == 3 else optical)
    shifts = []
    for east, north in ((0, 0), (60, -50)):
        ir = write(
            tmp_path / "ir.tif",
            radar if radar.ndim == 2 else radar[..., 0],
            transform=Affine.translation(east, north) @ PLACE,
        )
        found = register_rasters(matcher, vis, ir, kind="translation", max_displacement="300m")
        assert found.registration.verdict == "registered"
        shifts.append(found.shift_metres)
    np.testing.assert_allclose(shifts[1] - shifts[0], [-60, 50], atol=20)  # two pixels, for radar


def test_a_mask_that_is_needed_late(tmp_path, monkeypatch):
    """The first pieces are covered in full; the last ones are not."""
    from kglmatch.geo import write as write_module

    monkeypatch.setattr(write_module, "_PIECE", 64)
    values = example("nir")[:200, :200]
    path = write(tmp_path / "in.tif", values)
    with Raster(path) as raster:
        save_on_grid(raster, tmp_path / "part.tif", raster.grid.part(5, 5, 150, 150), np.eye(3))
        save_on_grid(raster, tmp_path / "beyond.tif", raster.grid.part(20, 20, 250, 250), np.eye(3))
    with rasterio.open(tmp_path / "part.tif") as file:
        assert file.mask_flag_enums[0] == [MaskFlags.all_valid]
    with rasterio.open(tmp_path / "beyond.tif") as file:
        assert file.mask_flag_enums[0] == [MaskFlags.per_dataset]
        expected = np.zeros((250, 250), bool)
        expected[:180, :180] = True
        np.testing.assert_array_equal(file.dataset_mask() > 0, expected)
        np.testing.assert_array_equal(file.read(1)[:180, :180], values[20:, 20:])
