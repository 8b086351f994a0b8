"""`DataArray.kglmatch`: arrays of numpy and dask on the map, and what cannot be registered, in one line."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

xarray = pytest.importorskip("xarray")
pytest.importorskip("rioxarray")
dask = pytest.importorskip("dask")

from rasterio.crs import CRS  # noqa: E402
from rasterio.enums import Resampling  # noqa: E402
from test_geo import BANDS, CUT, ERROR, EXPECTED, PLACE, SIDE, UTM, Edges, example, five_bands, on_grid  # noqa: E402

import kglmatch.geo.xarray  # noqa: E402, F401
from kglmatch.errors import ImageError, KGLMatchError  # noqa: E402
from kglmatch.geo import register as register_module  # noqa: E402
from kglmatch.geo.arrays import ArrayRaster, ArrayWarp, grid_of  # noqa: E402
from kglmatch.geo.grid import pixels_between  # noqa: E402
from kglmatch.geo.raster import Raster  # noqa: E402
from kglmatch.geo.write import save_on_grid  # noqa: E402
from kglmatch.registration.displacement import DisplacementField, LocalCorrection  # noqa: E402


def array_of(pixels, transform, crs=UTM, *, name=None, nodata=None, dims=("band", "y", "x"), **coords):
    dims = dims[-pixels.ndim :]
    height, width = pixels.shape[-2:]
    x = transform.c + (np.arange(width) + 0.5) * transform.a
    y = transform.f + (np.arange(height) + 0.5) * transform.e
    array = xarray.DataArray(pixels, {dims[-2]: y, dims[-1]: x, **coords}, dims, name)
    array = array.rio.write_crs(crs)
    return array if nodata is None else array.rio.write_nodata(nodata)


@pytest.fixture(scope="module")
def edges():
    return Edges()


@pytest.fixture(scope="module")
def red():
    """256 x 256 pixels, EPSG:32633, 10 m."""
    whole = array_of(example("red"), PLACE, name="red")
    return whole.isel(y=slice(CUT, CUT + SIDE), x=slice(CUT, CUT + SIDE))


@pytest.fixture(scope="module")
def stack():
    """Five bands in EPSG:3857, 15 m of the map, nodata 0, their map wrong by `ERROR`."""
    pixels, target = on_grid(five_bands(), PLACE, CRS.from_epsg(3857), 15)
    array = array_of(pixels, target, CRS.from_epsg(3857), name="nir", nodata=0, band=list(BANDS))
    return array.assign_attrs(sensor="MSI").assign_coords(time=np.datetime64("2026-01-01", "ns"))


@pytest.fixture(scope="module")
def found(edges, red, stack):
    return stack.kglmatch.registration_to(red, edges)


@pytest.fixture(scope="module")
def aligned(red, stack, found):
    return stack.kglmatch.register_to(red, found=found)


def test_the_registration_is_that_of_the_files(tmp_path, edges, red, stack, found):
    assert found.registration.verdict == "registered"
    np.testing.assert_allclose(found.shift_metres, [-ERROR[0], -ERROR[1]], atol=3)
    red.rio.to_raster(tmp_path / "red.tif")
    stack.rio.to_raster(tmp_path / "nir.tif")
    files = register_module.register_rasters(edges, tmp_path / "red.tif", tmp_path / "nir.tif")
    np.testing.assert_allclose(files.registration.transform, found.registration.transform, atol=2e-3)


def test_the_result_is_on_the_other_grid_with_all_that_it_was(red, stack, found, aligned):
    assert aligned.dims == ("band", "y", "x") and aligned.shape == (5, SIDE, SIDE)
    np.testing.assert_array_equal(aligned.x, red.x)
    np.testing.assert_array_equal(aligned.y, red.y)
    assert aligned.rio.crs == UTM and aligned.rio.transform().almost_equals(red.rio.transform())
    assert aligned.dtype == stack.dtype and aligned.name == "nir" and aligned.rio.nodata == 0
    assert aligned.attrs["sensor"] == "MSI" and list(aligned.band.values) == list(BANDS)
    assert aligned.time.values == stack.time.values
    assert aligned.attrs["kglmatch_verdict"] == "registered"
    np.testing.assert_allclose(aligned.attrs["kglmatch_shift_metres"], found.shift_metres, atol=1e-3)
    nir = example("nir")[CUT : CUT + SIDE, CUT : CUT + SIDE]
    assert np.corrcoef(aligned[0].values[8:-8, 8:-8].ravel(), nir[8:-8, 8:-8].ravel())[0, 1] > 0.99


def test_the_pixels_are_those_that_the_command_writes(tmp_path, stack, found, aligned):
    stack.rio.to_raster(tmp_path / "nir.tif")
    with Raster(tmp_path / "nir.tif") as nir:
        save_on_grid(nir, tmp_path / "aligned.tif", found.grid, found.mapping())
    with Raster(tmp_path / "aligned.tif") as file:
        written = file.source.read()
    apart = np.abs(written.astype(int) - aligned.values)
    assert np.quantile(apart, 0.99) <= 1


def test_attributes_survive_a_file(tmp_path, aligned):
    aligned.rio.to_raster(tmp_path / "aligned.tif")
    with Raster(tmp_path / "aligned.tif") as file:
        assert file.source.tags()["kglmatch_verdict"] == "registered"
        assert file.source.nodata == 0


@pytest.mark.parametrize("chunks", [{"y": 90, "x": 110}, {"band": 2, "y": -1, "x": 64}])
def test_dask_gives_the_same_and_is_lazy(red, stack, found, aligned, chunks):
    lazy = stack.chunk(chunks)
    result = lazy.kglmatch.register_to(red.chunk({"y": 100, "x": 100}), found=found)
    assert dask.is_dask_collection(result.data)
    assert result.chunks[0] == lazy.chunks[0]
    np.testing.assert_array_equal(result.values, aligned.values)
    np.testing.assert_array_equal(result.x, aligned.x)


def test_dask_is_registered_alike(edges, red, stack, found, aligned):
    result = stack.chunk({"y": 90}).kglmatch.register_to(red.chunk({"x": 100}), edges)
    np.testing.assert_allclose(
        np.reshape(result.attrs["kglmatch_transform"], (3, 3)), found.registration.transform, atol=1e-6
    )
    assert np.abs(result.values.astype(int) - aligned.values).max() <= 1


def test_a_block_reads_the_window_that_it_needs(red, stack, found):
    """A corner of the result, computed alone, reads a part of the array."""
    read = []

    def note(block):
        if block.size:
            read.append(block.shape)
        return block

    lazy = stack.isel(band=0).chunk({"y": 64, "x": 64})
    lazy = lazy.copy(data=lazy.data.map_blocks(note, dtype=lazy.dtype, meta=lazy.data._meta))
    grid = found.grid
    warp = ArrayWarp(found.ir_grid, grid, found.mapping(), Resampling.cubic, 0, 0)
    whole = warp(lazy.data, side=64)
    assert whole.shape == (SIDE, SIDE) and not read
    corner = whole[:64, :64].compute()
    blocks = len(lazy.chunks[0]) * len(lazy.chunks[1])
    assert 1 <= len(read) <= 9 < blocks
    np.testing.assert_array_equal(corner, warp(stack.isel(band=0).values, side=64)[:64, :64])


def test_more_dimensions_by_what_was_found(red, stack, found, aligned):
    times = xarray.concat([stack, stack // 2], "date").assign_coords(date=[1, 2])
    result = times.kglmatch.register_to(red, found=found)
    assert result.dims == ("date", "band", "y", "x")
    np.testing.assert_array_equal(result.sel(date=1).values, aligned.values)
    lazily = times.chunk({"date": 1}).kglmatch.register_to(red, found=found)
    np.testing.assert_array_equal(lazily.values, result.values)


def test_dimensions_may_be_in_any_order(red, stack, found, aligned):
    result = stack.transpose("y", "x", "band").kglmatch.register_to(red, found=found)
    np.testing.assert_array_equal(result.values, aligned.values)


def test_dimensions_of_other_names(edges, stack, red, found):
    degrees = red.rename(y="latitude", x="longitude")
    result = stack.kglmatch.register_to(degrees, found=found)
    assert result.dims == ("band", "latitude", "longitude")


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64", "bool"])
def test_what_the_array_does_not_cover(red, stack, found, kind):
    """Without a nodata value of its own, as rioxarray's reproject_match fills it."""
    pixels = np.ones((40, 40), kind)
    place = red.rio.transform()
    part = array_of(pixels, place)
    result = part.kglmatch.register_to(red, found=found)
    assert result.dtype == kind
    fill = {"uint8": 255, "int16": -32768, "bool": False}.get(kind, np.nan)
    np.testing.assert_allclose(result.values[10, 10], 1)
    np.testing.assert_equal(result.values[-1, -1], np.array(fill, kind))
    if kind != "bool":
        np.testing.assert_equal(result.rio.nodata, np.array(fill, kind))


def test_another_nodata(red, found):
    part = array_of(np.ones((40, 40), np.uint8), red.rio.transform())
    result = part.kglmatch.register_to(red, found=found, nodata=7)
    assert result.values[-1, -1] == 7 and result.rio.nodata == 7
    with pytest.raises(KGLMatchError, match="nodata 300"):
        part.kglmatch.register_to(red, found=found, nodata=300)


def test_masked_arrays_stay_masked(tmp_path, red, stack, found, aligned):
    import rioxarray

    stack.rio.to_raster(tmp_path / "nir.tif")
    masked = rioxarray.open_rasterio(tmp_path / "nir.tif", masked=True)
    result = masked.kglmatch.register_to(red, found=found)
    assert np.isnan(result.rio.nodata) and result.rio.encoded_nodata == 0
    covered = aligned.values > 0
    apart = np.abs(result.values - aligned.values)[covered & np.isfinite(result.values)]
    assert np.quantile(apart, 0.99) <= 0.5
    assert (
        list(result.attrs["long_name"]) == list(masked.attrs["long_name"])
        if "long_name" in masked.attrs
        else True
    )


def test_a_hole_in_one_layer_is_none_in_another(red, found):
    pixels = np.full((2, SIDE, SIDE), 50, np.int16)
    pixels[0, 100:120, 100:120] = -1
    result = array_of(pixels, red.rio.transform(), nodata=-1).kglmatch.register_to(red, found=found)
    assert set(np.unique(result.values)) == {-1, 50}
    assert (result.values[0] == -1).sum() > (result.values[1] == -1).sum() >= 0
    assert not (result.values[1, 90:130, 90:130] == -1).any()


def test_displacements(edges, red, stack):
    result = stack.kglmatch.check(red, edges, max_displacement="160m")
    assert result.check.verdict == "registered"
    np.testing.assert_allclose(result.check.shift, EXPECTED, atol=0.4)


def test_bands_are_chosen_by_number_label_and_name(stack):
    assert ArrayRaster(stack, "nir").bands == (1,)
    assert ArrayRaster(stack, "nir", 2).bands == ArrayRaster(stack, "nir", "b04").bands == (2,)
    numbered = stack.assign_coords(band=range(1, 6)).assign_attrs(long_name=BANDS)
    assert ArrayRaster(numbered, "nir", "B8A").bands == (3,)
    with pytest.raises(ImageError, match=r"nir has no band 'B99'; it has 1 \(B08\), 2 \(B04\)"):
        ArrayRaster(stack, "nir", "B99")


@pytest.mark.parametrize("lazily", [False, True])
def test_averages_are_of_pixels_with_data(lazily):
    pixels = np.arange(7 * 10, dtype=np.float32).reshape(7, 10)
    pixels[0, 0] = np.nan
    array = array_of(pixels, PLACE)
    raster = ArrayRaster(array.chunk({"y": 3, "x": 4}) if lazily else array, "array")
    values, valid = raster._read_values((0, 0, 10, 7), (4, 3), average=True)
    assert valid.all()
    whole = np.nan_to_num(pixels.astype(np.float64)).repeat(3, 0).repeat(4, 1)
    share = np.isfinite(pixels).repeat(3, 0).repeat(4, 1)
    sums, counts = (a.reshape(3, 7, 4, 10).sum((1, 3)) for a in (whole, share))
    np.testing.assert_allclose(values, sums / counts, rtol=1e-9)


def test_large_arrays_by_windows(monkeypatch, edges, red, stack):
    monkeypatch.setattr(register_module, "WHOLE", 200)
    monkeypatch.setattr(register_module, "_COARSE", 128)
    result = stack.chunk({"y": 100, "x": 100}).kglmatch.registration_to(red.chunk(), edges)
    assert result.registration.verdict == "registered"
    np.testing.assert_allclose(result.shift_metres, [-ERROR[0], -ERROR[1]], atol=3)


def test_a_local_correction_is_applied(tmp_path, red, stack, found, aligned):
    """As the command applies it, and the same for numpy and dask."""
    field = DisplacementField.zero((SIDE, SIDE), (4, 4))
    field.control[:, 5:, 0] = 2.0  # pixels, towards the right side
    correction = LocalCorrection(field, "", *[np.empty((0, 2))] * 2, np.empty(0), 0.0, 0.0)
    registration = dataclasses.replace(found.registration, correction=correction)
    corrected = dataclasses.replace(found, registration=registration)
    result = stack.kglmatch.register_to(red, found=corrected)
    apart = np.abs(result.values[0].astype(int) - aligned.values[0]).mean(axis=0)
    assert apart[:60].mean() < 3 and apart[-60:].mean() > 20
    stack.rio.to_raster(tmp_path / "nir.tif")
    with Raster(tmp_path / "nir.tif") as nir:
        save_on_grid(nir, tmp_path / "aligned.tif", found.grid, corrected.mapping())
    with Raster(tmp_path / "aligned.tif") as file:
        apart = np.abs(file.source.read().astype(int) - result.values)
    assert np.quantile(apart, 0.99) <= 1
    lazily = stack.chunk({"y": 90, "x": 110}).kglmatch.register_to(red, found=corrected)
    np.testing.assert_array_equal(lazily.values, result.values)


def test_small_pieces_are_not_blurred(tmp_path, red, stack):
    """A field that is warped in pieces of 16 pixels, against an interpolation without pieces."""
    field = DisplacementField.zero((SIDE, SIDE), (4, 4))
    field.control[:, 5:, 0] = 2.0

    def mapping(points):
        return points + field.at(points)

    own, grid = grid_of(stack, "stack"), grid_of(red, "red")
    pixels = stack.values[0].astype(np.float32)
    warped = ArrayWarp(own, grid, mapping, Resampling.cubic, 0, 0)(pixels)
    x, y = np.meshgrid(np.arange(SIDE, dtype=np.float64), np.arange(SIDE, dtype=np.float64))
    at = pixels_between(grid, own, mapping(np.stack([x.ravel(), y.ravel()], axis=1)))
    columns, rows = at.T.reshape(2, SIDE, SIDE).astype(np.float32)
    expected = cv2.remap(pixels, columns, rows, cv2.INTER_CUBIC)
    stack[0].astype(np.float32).rio.to_raster(tmp_path / "ir.tif")
    with Raster(tmp_path / "ir.tif") as raster:
        save_on_grid(raster, tmp_path / "out.tif", grid, mapping)
    with Raster(tmp_path / "out.tif") as file:
        written = file.source.read(1)
    # 9.5 of about 2000; 11.1 with the kernel that GDAL derives from the size of a piece.
    for result in (warped, written):
        assert np.abs(result - expected)[8:-8, 8:-8].mean() < 10.2


def test_nothing_is_returned_where_nothing_was_found(edges, red):
    noise = np.random.default_rng(0).integers(0, 9999, (512, 512)).astype(np.uint16)
    with pytest.raises(KGLMatchError, match="the array 'noise' was not registered to the visible"):
        array_of(noise, PLACE, name="noise").kglmatch.register_to(red, edges)


def test_what_cannot_be_registered(edges, red, stack, found):
    one = stack.isel(band=0, drop=True)
    nowhere = xarray.DataArray(np.ones((99, 99)), dims=("y", "x"))
    with pytest.raises(ImageError, match=r"no coordinate reference system; set it by \.rio\.write_crs"):
        nowhere.kglmatch.register_to(red, edges)
    with pytest.raises(ImageError, match="no place on the map"):
        nowhere.rio.write_crs(UTM).kglmatch.register_to(red, edges)
    with pytest.raises(ImageError, match=r"has dimensions \(a, b\): expected y and x"):
        xarray.DataArray(np.ones((9, 9)), dims=("a", "b")).kglmatch.check(red, edges)
    with pytest.raises(ImageError, match="at most one of bands"):
        stack.expand_dims(date=2).kglmatch.registration_to(red, edges)
    with pytest.raises(ImageError, match="do not overlap"):
        one.assign_coords(x=one.x + 1e6).kglmatch.registration_to(red, edges)
    with pytest.raises(ImageError, match="expected numbers"):
        one.astype(str).kglmatch.register_to(red, edges)
    with pytest.raises(ImageError, match="no place on the map"):
        one.isel(y=[5]).drop_vars("spatial_ref").rio.write_crs(3857).kglmatch.register_to(red, edges)
    with pytest.raises(ImageError, match="cannot warp float16"):
        one.astype("float16").rio.set_nodata(None).drop_attrs().kglmatch.register_to(red, found=found)
    with pytest.raises(KGLMatchError, match="resampling must be one of"):
        one.kglmatch.register_to(red, found=found, resampling="best")
    with pytest.raises(KGLMatchError, match="another grid"):
        one.kglmatch.register_to(red[1:], found=found)
    with pytest.raises(KGLMatchError, match="kind: found already says"):
        one.kglmatch.register_to(red, found=found, kind="affine")
    with pytest.raises(ImageError, match="has no band 2: it has one alone"):
        one.kglmatch.registration_to(red, edges, ir_band=2)
