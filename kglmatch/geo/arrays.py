"""xarray's DataArrays as `register` sees them, and warped onto another grid, piece by piece."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import cv2
import numpy as np
import rasterio.warp
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.windows import Window
from rioxarray.exceptions import RioXarrayError  # the package also adds the accessor `.rio`

from kglmatch.errors import ImageError
from kglmatch.geo.grid import GDAL_ERRORS, Grid, bounds_within, one_line
from kglmatch.geo.raster import Mask, Raster, needed_window, step_between
from kglmatch.geo.write import Mapping, straight_pieces, warp_scale

Matrix = NDArray[np.float64]
Box = tuple[int, int, int, int]

_SIDE = 2048  # pixels, of the blocks that are warped at once
_STRIP = 1 << 22  # pixels that are averaged at once
_TOLERANCE = 0.02  # input pixels by which GDAL may approximate the map projection
_HALF = 0.5  # of an averaged pixel that must hold data
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_GDAL_TYPES = (*_INTEGERS, "float32", "float64", "complex64", "complex128")  # that GDAL warps


class ArrayRaster(Raster):
    """A DataArray in the place of a file: read in windows, which is all that is computed of a lazy one.

    Args:
        array: with rioxarray's spatial dimensions, and at most one more (bands).
        name: what messages call it.
        band: which is matched: its number from 1, or its label or name; None takes the first.

    Raises:
        ImageError: other dimensions, no such band, or values that are no numbers.
    """

    def __init__(self, array: Any, name: str, band: str | int | None = None) -> None:
        check_array(array, name)
        self.path = name
        others = [dim for dim in array.dims if dim not in spatial_dims(array)]
        if len(others) > 1:
            raise ImageError(
                f"{name} has dimensions {_listed(array.dims)}: expected y, x and at most one of bands; take "
                "one of the others by .isel()"
            )
        self.bands = (1,)
        self._nodata = array.rio.nodata
        self._grid: Grid | None = None
        self._whole = array
        if others:
            index = _band_index(array, others[0], band, name)
            self.bands = (index + 1,)
            array = array.isel({others[0]: index})
        elif band not in (None, 1, "1"):
            raise ImageError(f"{name} has no band {band!r}: it has one alone, without a dimension of bands")
        self._array = array.transpose(*spatial_dims(array))
        self._range = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width = self._array.shape
        return width, height

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the band that is matched."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    @property
    def grid(self) -> Grid:
        """The array's pixels on the map.

        Raises:
            ImageError: no coordinate reference system, or no coordinates.
        """
        if self._grid is None:
            self._grid = grid_of(self._whole, self.path)
        return self._grid

    def close(self) -> None:
        """Nothing is to be closed."""

    def _read_values(
        self, window: Box, size: tuple[int, int], average: bool
    ) -> tuple[NDArray[np.float64], Mask]:
        x, y, width, height = window
        rows, columns = self._array.dims
        part = self._array.isel({rows: slice(y, y + height), columns: slice(x, x + width)})
        if size == (width, height):
            return self._values(part.values)
        if average:
            return self._averaged(part, size)
        down, across = (
            ((np.arange(n) + 0.5) * full / n).astype(int) for n, full in ((size[1], height), (size[0], width))
        )
        return self._values(part.isel({rows: down, columns: across}).values)

    def _averaged(self, part: Any, size: tuple[int, int]) -> tuple[NDArray[np.float64], Mask]:
        """An array (H, W) made smaller: means of its pixels with data, in float64."""
        height, width = part.shape
        across, down = (np.arange(n + 1) * (full / n) for n, full in ((size[0], width), (size[1], height)))
        total, weight = np.zeros((size[1], size[0])), np.zeros((size[1], size[0]))
        for top, pixels in _strips(part):
            bottom = top + len(pixels)
            first = int(np.searchsorted(down, top, side="right")) - 1
            last = int(np.searchsorted(down, bottom, side="left"))
            edges = np.clip(down[first : last + 1] - top, 0, bottom - top)
            values, valid = self._values(pixels)
            total[first:last] += _box_sums(np.where(valid, values, 0), across, edges)
            weight[first:last] += _box_sums(valid.astype(np.float64), across, edges)
        enough = weight >= _HALF * (width / size[0]) * (height / size[1])
        return np.divide(total, weight, out=np.zeros_like(total), where=enough), enough

    def _values(self, pixels: NDArray[Any]) -> tuple[NDArray[np.float64], Mask]:
        valid = np.isfinite(pixels)
        if self._nodata is not None and not np.isnan(self._nodata):
            valid &= pixels != self._nodata
        values = np.abs(pixels) if pixels.dtype.kind == "c" else pixels
        return values.astype(np.float64), valid


def check_array(array: Any, name: str) -> None:
    """Raises `ImageError` unless an array has rioxarray's spatial dimensions and numbers."""
    spatial_dims(array, name)
    if array.dtype.kind not in "biufc":
        raise ImageError(f"{name} holds {array.dtype}: expected numbers")
    if 0 in array.shape:
        raise ImageError(f"{name} is empty: its shape is {array.shape}")


def spatial_dims(array: Any, name: str = "the array") -> tuple[Hashable, Hashable]:
    """Names of the dimensions of rows and columns.

    Raises:
        ImageError: there are none of the names that rioxarray knows.
    """
    try:
        return array.rio.y_dim, array.rio.x_dim
    except RioXarrayError:
        raise ImageError(
            f"{name} has dimensions {_listed(array.dims)}: expected y and x; name them by "
            ".rio.set_spatial_dims()"
        ) from None


def grid_of(array: Any, name: str) -> Grid:
    """An array's pixels on the map.

    Raises:
        ImageError: no coordinate reference system, or no coordinates.
    """
    y_dim, x_dim = spatial_dims(array, name)
    crs = array.rio.crs
    if crs is None or not crs.to_wkt():
        raise ImageError(f"{name} has no coordinate reference system; set it by .rio.write_crs()")
    try:
        # From the coordinates: the transform that is kept of an array is not that of its parts.
        affine = array.rio.transform(recalc=True)
    except RioXarrayError as error:
        raise ImageError(f"{name} has no place on the map: {one_line(error)}") from None
    if affine.is_identity or affine.is_degenerate:
        raise ImageError(
            f"{name} has no place on the map: neither a transform (.rio.write_transform()) nor two or more "
            f"coordinates each along {y_dim} and {x_dim}"
        )
    return Grid.from_affine(crs, affine, array.sizes[x_dim], array.sizes[y_dim])


def band_names(array: Any, dim: Hashable) -> list[str]:
    """Labels along a dimension if they are text, else rioxarray's band descriptions; "" for none."""
    if dim in array.coords and array[dim].dtype.kind in "UO":
        return [str(label) for label in array[dim].values]
    names = array.attrs.get("long_name")
    count = array.sizes[dim]
    if isinstance(names, (tuple, list)) and len(names) == count:
        return [str(label) for label in names]
    return [""] * count


def _band_index(array: Any, dim: Hashable, band: str | int | None, name: str) -> int:
    if band is None:
        return 0
    names, text = band_names(array, dim), str(band)
    found = [i for i, label in enumerate(names) if label.lower() == text.lower()]
    if len(found) == 1:
        return found[0]
    if text.isdecimal() and 1 <= int(text) <= len(names):
        return int(text) - 1
    known = ", ".join(f"{i} ({label})" if label else str(i) for i, label in enumerate(names[:20], 1))
    raise ImageError(f"{name} has no band {text!r}; it has {known}{', ...' if len(names) > 20 else ''}")


def _strips(part: Any) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row's number and rows of an array (H, W), some at a time; each dask block is computed once."""
    height, width = part.shape
    lengths = (height,) if part.chunks is None else part.chunks[0]
    step, top = max(1, _STRIP // width), 0
    for length in lengths:
        lazy = part.isel({part.dims[0]: slice(top, top + length)})
        rows = lazy if part.chunks is None else lazy.values
        for start in range(0, length, step):
            yield top + start, np.asarray(rows[start : start + step])
        top += length


def _box_sums(
    image: NDArray[np.float64], across: NDArray[np.floating], down: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Sums (len(down) - 1, len(across) - 1) of an image between edges, which may cut through pixels."""
    table = cv2.integral(image, sdepth=cv2.CV_64F)
    for axis, edges in ((0, down), (1, across)):
        low = np.minimum(edges.astype(int), table.shape[axis] - 2)
        share = (edges - low).reshape((-1, 1) if axis == 0 else (1, -1))
        table = table.take(low, axis) * (1 - share) + table.take(low + 1, axis) * share
        table = np.diff(table, axis=axis)
    return table


def _listed(dims: tuple[Hashable, ...]) -> str:
    return "(" + ", ".join(str(dim) for dim in dims) + ")"


# --- warping --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArrayWarp:
    """How pixels of one grid are resampled onto another.

    Attributes:
        own: the array's grid.
        grid: the grid of the result.
        mapping: as for `kglmatch.geo.write.save_on_grid`.
        how: GDAL's resampling.
        nodata: the array's value without data; None for none.
        fill: the value where the array does not reach.
    """

    own: Grid
    grid: Grid
    mapping: Matrix | Mapping
    how: Resampling
    nodata: Any
    fill: Any

    def __call__(self, pixels: Any, *, side: int = _SIDE) -> Any:
        """Warps an array (..., H, W) of numpy, or of dask, which stays lazy.

        A block of the result is made from the window of the array that it needs. Both kinds of array are
        warped in the same blocks, so that the results are equal.

        Args:
            pixels: the array; any number of leading dimensions.
            side: of the blocks, pixels.
        """
        height, width = self.grid.height, self.grid.width
        rows, columns = ([(a, min(a + side, n)) for a in range(0, n, side)] for n in (height, width))
        if not hasattr(pixels, "dask"):
            out = np.empty((*pixels.shape[:-2], height, width), pixels.dtype)
            for (top, bottom), (left, right) in product(rows, columns):
                block = Window(left, top, right - left, bottom - top)
                x, y, w, h = self.window(block)
                part = pixels[..., y : y + h, x : x + w]
                out[..., top:bottom, left:right] = self.block(part, block, (x, y))
            return out
        return self._lazily(pixels, rows, columns)

    def _lazily(self, pixels: Any, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Any:
        import dask
        import dask.array

        warp = dask.delayed(self.block, pure=False)
        ends = [np.cumsum([0, *chunks]).tolist() for chunks in pixels.chunks[:-2]]
        leading = [[slice(a, b) for a, b in pairwise(e)] for e in ends]
        meta = np.empty((0,) * pixels.ndim, pixels.dtype)

        def nested(depth: int, chosen: tuple[slice, ...]) -> Any:
            if depth < len(leading):
                return [nested(depth + 1, (*chosen, each)) for each in leading[depth]]
            counts = tuple(each.stop - each.start for each in chosen)
            blocks: list[list[Any]] = []
            for top, bottom in rows:
                blocks.append([])
                for left, right in columns:
                    block = Window(left, top, right - left, bottom - top)
                    x, y, w, h = self.window(block)
                    part = pixels[(*chosen, slice(y, y + h), slice(x, x + w))]
                    blocks[-1].append(
                        dask.array.from_delayed(
                            warp(part, block, (x, y)), (*counts, bottom - top, right - left), meta=meta
                        )
                    )
            return blocks

        return dask.array.block(nested(0, ()))

    def window(self, block: Window) -> Box:
        """What a block of the result needs of the array: x, y, width, height; a width of 0 for nothing."""
        boxes = []
        for _, piece in straight_pieces(self.grid, block, self.mapping):
            bounds = bounds_within(piece, self.own)
            if bounds is not None:
                boxes.append(needed_window(bounds, step_between(piece, self.own), self.own))
        boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
        if not boxes:
            return 0, 0, 0, 0
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return min(lefts), min(tops), max(rights) - min(lefts), max(bottoms) - min(tops)

    def block(self, pixels: NDArray[Any], block: Window, corner: tuple[int, int]) -> NDArray[Any]:
        """A block of the result, from the pixels (..., h, w) of its `window`, which begins at a corner."""
        size = block.height, block.width
        out = np.full((*pixels.shape[:-2], *size), self.fill, pixels.dtype)
        if 0 in pixels.shape:
            return out
        height, width = pixels.shape[-2:]
        source = self.own.part(*corner, width, height)
        layers, filled = pixels.reshape(-1, height, width), out.reshape(-1, *size)
        for window, piece in straight_pieces(self.grid, block, self.mapping):
            rows, columns = window.toslices()
            place = (
                slice(rows.start - block.row_off, rows.stop - block.row_off),
                slice(columns.start - block.col_off, columns.stop - block.col_off),
            )
            # One by one: where one layer has no data, another may have some.
            for layer, target in zip(layers, filled, strict=True):
                target[place] = self._piece(layer, source, piece)
        return out

    def _piece(self, layer: NDArray[Any], source: Grid, piece: Grid) -> NDArray[Any]:
        if self.nodata is not None:
            return _reproject(layer, source, piece, self.how, self.nodata, self.fill)
        moved = _reproject(layer, source, piece, self.how)
        covered = _reproject(np.ones(layer.shape, np.uint8), source, piece, Resampling.nearest)
        moved[covered == 0] = self.fill
        return moved


def _reproject(
    layer: NDArray[Any], source: Grid, piece: Grid, how: Resampling, nodata: Any = None, fill: Any = None
) -> NDArray[Any]:
    """Pixels (H, W) of one grid on another one."""
    dtype = layer.dtype
    moved = np.zeros((piece.height, piece.width), np.uint8 if dtype == np.bool_ else dtype)
    try:
        rasterio.warp.reproject(
            np.ascontiguousarray(layer, moved.dtype),
            moved,
            src_transform=source.affine,
            src_crs=source.crs if source.crs == piece.crs else source.wrapped_crs(),
            src_nodata=nodata,
            dst_transform=piece.affine,
            dst_crs=piece.crs,
            dst_nodata=fill,
            resampling=Resampling.nearest if dtype == np.bool_ else how,
            tolerance=_TOLERANCE,
            **warp_scale(piece, source),
        )
    except GDAL_ERRORS as error:
        raise ImageError(f"cannot put the array on the other grid: {one_line(error)}") from None
    return moved.astype(dtype)


def default_fill(dtype: np.dtype[Any], name: str) -> Any:
    """The value without data of an array that has none, as rioxarray's `reproject_match` chooses it.

    Raises:
        ImageError: a type that GDAL does not warp.
    """
    if dtype == np.bool_:
        return False
    if dtype.name not in _GDAL_TYPES:
        raise ImageError(f"cannot warp {dtype}, the type of {name}; convert it by .astype()")
    if dtype.kind in "fc":
        return np.nan
    limits = np.iinfo(dtype)
    return limits.max if dtype.kind == "u" else limits.min
