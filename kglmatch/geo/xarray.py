"""`DataArray.kglmatch`: registration of xarray's arrays that are on the map, for users of rioxarray.

`import kglmatch.geo.xarray` adds the accessor. Needs `pip install "kglmatch[xarray]"`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import xarray
from rasterio.enums import Resampling

from kglmatch.errors import KGLMatchError
from kglmatch.geo.arrays import ArrayRaster, ArrayWarp, check_array, default_fill, grid_of, spatial_dims
from kglmatch.geo.grid import same_grid
from kglmatch.geo.register import (
    RasterCheck,
    RasterRegistration,
    check_rasters,
    correct_rasters,
    register_rasters,
)
from kglmatch.matcher import Matcher
from kglmatch.options import DEFAULT_CHECK_DISPLACEMENT, DEFAULT_MODEL, DEFAULT_RESAMPLING, RESAMPLINGS
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.resampling import check_nodata

# Of the array as it was stored, and not true of another shape.
_STORED = (
    "source",
    "original_shape",
    "preferred_chunks",
    "chunksizes",
    "chunks",
    "contiguous",
    "rasterio_dtype",
)
_FILLS = ("_FillValue", "missing_value", "fill_value", "nodata", "nodatavals")


@xarray.register_dataarray_accessor("kglmatch")
class KGLMatchAccessor:
    """What `.kglmatch` of a DataArray is: the array is the second sensor's, the argument the visible one.

    Both have a coordinate reference system (`.rio.crs`), dimensions that rioxarray knows as spatial, and
    coordinates along them or a transform.
    """

    def __init__(self, array: xarray.DataArray) -> None:
        self._array = array

    def registration_to(
        self,
        vis: xarray.DataArray,
        matcher: PatchMatcher | str = DEFAULT_MODEL,
        *,
        vis_band: str | int | None = None,
        ir_band: str | int | None = None,
        local: bool = False,
        **options: Any,
    ) -> RasterRegistration:
        """Finds where the array's content really is, beginning with where its coordinates put it.

        Computed at once: of lazy arrays the windows that are looked at, as with files.

        Args:
            vis: the visible array: spatial dimensions, and at most one of bands.
            matcher: a `Matcher`, or the name of a model, which is then loaded once and kept.
            vis_band, ir_band: which band is matched: its number from 1, its label along the dimension of
                bands, or its name in `long_name`; None takes the first.
            local: also correct the smooth displacement that the transform leaves over, where the arrays
                support it.
            options: kind, max_displacement, max_rotation, max_scale, proposers, progress, as for
                `kglmatch.geo.register_rasters`.

        Returns:
            `RasterRegistration`; its registration's verdict is "failed" where nothing was found that holds.

        Raises:
            ImageError: an array without a place on the map, of other dimensions, or that overlaps the other
                one too little.
            KGLMatchError: a parameter out of range.
        """
        first, second = self._pair(vis, vis_band, ir_band)
        scorer = _matcher(matcher)
        found = register_rasters(scorer, first, second, **options)
        return correct_rasters(scorer, first, second, found) if local else found

    def register_to(
        self,
        vis: xarray.DataArray,
        matcher: PatchMatcher | str = DEFAULT_MODEL,
        *,
        found: RasterRegistration | None = None,
        resampling: str = DEFAULT_RESAMPLING,
        nodata: float | None = None,
        **options: Any,
    ) -> xarray.DataArray:
        """The array on the visible one's grid, as `.rio.reproject_match` with the registration in it.

        All layers are resampled once, from the array's own pixels. A dask array stays lazy: each block of
        the result is made from the window of the array that it needs, when it is computed. The registration
        itself is found at once.

        Args:
            vis, matcher: as for `registration_to`.
            found: what `registration_to` found, of this array or of another one on the same map, such as
                another date or all bands; None finds it.
            resampling: one of `kglmatch.options.RESAMPLINGS`; "nearest" for classes.
            nodata: value where the array does not reach; None takes `.rio.nodata`, and of an array that has
                none NaN, or the largest (unsigned) or lowest (signed) whole number.
            options: as for `registration_to`, which finds the registration.

        Returns:
            DataArray of the same name, type, attributes, encoding and other coordinates. The attributes
            `kglmatch_verdict`, `kglmatch_confidence`, `kglmatch_kind`, `kglmatch_transform` (nine numbers)
            and `kglmatch_shift_metres` (east, north) say what was found.

        Raises:
            KGLMatchError: the registration failed, or a parameter is out of range.
            ImageError: as `registration_to`, or a type that GDAL does not warp.
        """
        array, name = self._array, _name(self._array, "the array")
        check_array(array, name)
        if resampling not in RESAMPLINGS:
            raise KGLMatchError(f"resampling must be one of {', '.join(RESAMPLINGS)}, got {resampling!r}")
        fill = default_fill(array.dtype, name) if array.rio.nodata is None else array.rio.nodata
        if nodata is not None and array.rio.encoded_nodata is None:
            check_nodata(nodata, array.dtype)
            fill = nodata
        own, grid = grid_of(array, name), grid_of(vis, _name(vis, "the visible array"))
        if found is None:
            found = self.registration_to(vis, matcher, **options)
        elif options:
            raise KGLMatchError(f"{', '.join(options)}: found already says what was found")
        if not same_grid(found.grid, grid):
            raise KGLMatchError("found was found on another grid than that of the visible array")
        if found.registration.transform is None:
            raise KGLMatchError(
                f"{name} was not registered to {_name(vis, 'the visible array')}: nothing is warped"
            )
        warp = ArrayWarp(
            own.near(grid), grid, found.mapping(), Resampling[resampling], array.rio.nodata, fill
        )
        rows, columns = spatial_dims(array)
        pixels = array.transpose(..., rows, columns)
        data = pixels.data if pixels.chunks is not None else pixels.values
        return _like(array, vis, warp(data), found, nodata if nodata is not None else fill)

    def check(
        self,
        vis: xarray.DataArray,
        matcher: PatchMatcher | str = DEFAULT_MODEL,
        *,
        vis_band: str | int | None = None,
        ir_band: str | int | None = None,
        max_displacement: str | float = DEFAULT_CHECK_DISPLACEMENT,
    ) -> RasterCheck:
        """How far the contents of both arrays are apart that their coordinates put at one place.

        Args:
            vis, matcher, vis_band, ir_band: as for `registration_to`.
            max_displacement: pixels of the visible array, or a length such as "60m".

        Raises:
            ImageError, KGLMatchError: as `kglmatch.geo.check_rasters`.
        """
        first, second = self._pair(vis, vis_band, ir_band)
        return check_rasters(_matcher(matcher), first, second, max_displacement=max_displacement)

    def _pair(
        self, vis: xarray.DataArray, vis_band: str | int | None, ir_band: str | int | None
    ) -> tuple[ArrayRaster, ArrayRaster]:
        return (
            ArrayRaster(vis, _name(vis, "the visible array"), vis_band),
            ArrayRaster(self._array, _name(self._array, "the array"), ir_band),
        )


def _name(array: xarray.DataArray, otherwise: str) -> str:
    return otherwise if array.name is None else f"{otherwise} {str(array.name)!r}"


@functools.lru_cache(maxsize=2)
def _loaded(name: str) -> Matcher:
    return Matcher.from_pretrained(name)


def _matcher(matcher: PatchMatcher | str) -> PatchMatcher:
    return _loaded(matcher) if isinstance(matcher, str) else matcher


def _like(
    array: xarray.DataArray, vis: xarray.DataArray, data: Any, found: RasterRegistration, fill: Any
) -> xarray.DataArray:
    """Warped pixels (..., y, x) with the description of their array, on the visible array's coordinates."""
    own, other = set(spatial_dims(array)), spatial_dims(vis)
    leading = [dim for dim in array.dims if dim not in own]
    mapping = array.rio.grid_mapping
    # What belongs to pixels is the visible array's, all else the array's own.
    coords = {k: v for k, v in array.coords.items() if not own & set(v.dims) and k != mapping}
    coords |= {k: v.variable for k, v in vis.coords.items() if v.dims and set(v.dims) <= set(other)}
    attrs = copy.deepcopy(array.attrs)
    encoding = {k: v for k, v in array.encoding.items() if k not in _STORED}
    masked = array.rio.encoded_nodata is not None
    if not masked:
        attrs = {k: v for k, v in attrs.items() if k not in _FILLS}
    attrs.pop("grid_mapping", None)
    out = xarray.DataArray(data, coords, (*leading, *other), array.name, attrs | _facts(found))
    out.encoding = encoding
    out = out.rio.write_crs(found.grid.crs, grid_mapping_name=mapping)
    out = out.rio.write_transform(found.grid.affine, grid_mapping_name=mapping)
    out = out.rio.write_coordinate_system()
    if masked:
        return out if np.isnan(fill) else out.rio.write_nodata(fill, encoded=True)
    return out if array.dtype == np.bool_ else out.rio.write_nodata(fill)


def _facts(found: RasterRegistration) -> dict[str, Any]:
    """What was found, in types that NetCDF, Zarr and GeoTIFF can hold."""
    registration = found.registration
    return {
        "kglmatch_verdict": registration.verdict,
        "kglmatch_confidence": round(float(registration.confidence), 4),
        "kglmatch_kind": str(registration.kind),
        "kglmatch_transform": [float(v) for v in np.asarray(registration.transform).ravel()],
        "kglmatch_shift_metres": [round(float(v), 4) for v in found.shift_metres],
    }
