"""Rasters as `register` sees them: grey pixels of chosen bands on any grid, and which of them are valid."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.warp import reproject
from rasterio.windows import Window

from kglmatch.errors import ImageError
from kglmatch.files import split_band
from kglmatch.geo.grid import GDAL_ERRORS, Grid, bounds_within, one_line, pixels_between
from kglmatch.images import PERCENTILES, TOLERANCE

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

_LUMA = (0.299, 0.587, 0.114)  # as `kglmatch.images`
_SAMPLED = 1024  # pixels a side from which percentiles are taken
_MARGIN = 4  # source pixels that an interpolation reaches beyond
_CACHE_MB = 256  # of decoded blocks that GDAL keeps; its own default is a share of all memory
_WHOLE = 1e-6  # pixels


@contextmanager
def gdal_settings() -> Iterator[None]:
    """GDAL's settings for what is read and written here."""
    with rasterio.Env(
        GDAL_CACHEMAX=_CACHE_MB * (1 << 20),
        GDAL_TIFF_INTERNAL_MASK=True,
        GDAL_DISABLE_READDIR_ON_OPEN="FALSE",
    ):
        yield


class Raster(AbstractContextManager["Raster"]):
    """An open raster file, of any size, band count and pixel type.

    Args:
        path: what rasterio opens: GeoTIFF, COG, VRT, JPEG 2000, a /vsi path; "image.tif:B08" chooses a band.
        band: which is matched: its number from 1, or its description (case does not matter); None takes the
            grey value of red, green and blue where the file says which they are, else the first band.
        nodata: value of pixels without data, in place of the file's own.

    Attributes:
        path: the file's name.
        source: rasterio's dataset.
        bands: numbers of the bands that are matched: one, or red, green and blue.

    Raises:
        ImageError: a file that cannot be read, has no such band, or holds no pixel values.
    """

    def __init__(
        self, path: str | os.PathLike[str], band: str | int | None = None, nodata: float | None = None
    ) -> None:
        self.path, own = split_band(path)
        band = own if band is None else band
        self._override: str | None = None
        self._original: Any = None
        self.source = self._open()
        try:
            if nodata is not None and nodata != self.source.nodata:
                self._set_nodata(nodata)
            self.bands = self._bands(band)
            if len({self.source.nodatavals[i - 1] for i in range(1, self.source.count + 1)} - {None}) > 1:
                values = ", ".join(f"{value:g}" for value in self.source.nodatavals if value is not None)
                raise ImageError(
                    f"the bands of {self.path} have different nodata values ({values}); give one by --nodata"
                )
        except BaseException:
            self.close()
            raise
        self._range: tuple[float, float] | None = None

    def _open(self) -> Any:
        if not self.path.startswith("/vsi") and not Path(self.path).exists():
            raise ImageError(f"cannot read {self.path}: no such file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                source = rasterio.open(self.path)
        except GDAL_ERRORS as error:
            raise ImageError(f"cannot read {self.path}: {one_line(error)}") from None
        if not source.count:
            names = ", ".join(source.subdatasets[:3])
            source.close()
            raise ImageError(f"{self.path} holds no bands of its own; open one of {names}, ...")
        return source

    def _set_nodata(self, nodata: float) -> None:
        """Another nodata value, by a virtual copy."""
        kind = self.source.dtypes[0]
        if not in_dtype_range(nodata, kind):
            raise ImageError(f"nodata {nodata:g} is no {kind} value, the type of {self.path}")
        self._original = self.source
        self._override = f"/vsimem/{uuid.uuid4().hex}.vrt"
        rasterio.shutil.copy(self.source, self._override, driver="VRT")
        with rasterio.open(self._override, "r+") as virtual:
            virtual.nodata = nodata
        self.source = rasterio.open(self._override)

    def _bands(self, band: str | int | None) -> tuple[int, ...]:
        count, names = self.source.count, [name or "" for name in self.source.descriptions]
        colours = list(self.source.colorinterp)
        if band is None:
            rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            if all(colours.count(colour) == 1 for colour in rgb):
                return tuple(colours.index(colour) + 1 for colour in rgb)
            return (next((i for i in range(1, count + 1) if colours[i - 1] != ColorInterp.alpha), 1),)
        text = str(band)
        found = [i for i, name in enumerate(names, 1) if name.lower() == text.lower()]
        if len(found) == 1:
            return (found[0],)
        if text.isdecimal() and 1 <= int(text) <= count:
            return (int(text),)
        named = ", ".join(f"{i} ({name})" if name else str(i) for i, name in enumerate(names[:20], 1))
        raise ImageError(f"{self.path} has no band {text!r}; it has {named}{', ...' if count > 20 else ''}")

    @property
    def is_on_map(self) -> bool:
        """Whether the file says where it is on the map."""
        return self.source.crs is not None and not self.source.transform.is_identity

    @property
    def grid(self) -> Grid:
        """The file's pixels on the map.

        Raises:
            ImageError: it has no coordinate reference system or no geotransform, or one that is degenerate.
        """
        source = self.source
        if source.crs is None or not source.crs.to_wkt():
            raise ImageError(f"{self.path} has no coordinate reference system; set it by gdal_edit.py -a_srs")
        if source.transform.is_identity:
            more = " but ground control points; warp it by gdalwarp first" if source.gcps[0] else ""
            raise ImageError(f"{self.path} has no geotransform{more}")
        if source.transform.is_degenerate:
            raise ImageError(f"{self.path} has a geotransform that maps all pixels to one line")
        return Grid.from_affine(source.crs, source.transform, source.width, source.height)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.source.width, self.source.height

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the first of the bands that are matched."""
        return np.dtype(self.source.dtypes[self.bands[0] - 1])

    @property
    def alpha(self) -> int | None:
        """Number of the alpha band, if there is one."""
        colours = list(self.source.colorinterp)
        return colours.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in colours else None

    def describe_bands(self) -> str:
        """Which bands are matched, in a few words."""
        names = [self.source.descriptions[i - 1] or str(i) for i in self.bands]
        return f"band {names[0]}" if len(names) == 1 else f"the grey value of bands {', '.join(names)}"

    # --- pixels ---------------------------------------------------------------------------------------

    def read(
        self, window: tuple[int, int, int, int], size: tuple[int, int], *, average: bool = True
    ) -> tuple[Image, Mask]:
        """Pixels of a window, as grey in [0, 1], and which of them are valid.

        Args:
            window: x, y, width, height in pixels of the file, within it.
            size: (width, height) of the result; smaller than the window, it is averaged, from the file's
                overviews where it has them.
            average: False takes single pixels instead.

        Raises:
            ImageError: a damaged file, or no pixel with data in the whole file.
        """
        if self._range is None:
            self._range = self._stretch()
        values, valid = self._read_values(window, size, average)
        bottom, top = self._range
        with np.errstate(invalid="ignore"):
            grey = np.clip((values - bottom) / max(top - bottom, 1e-30), 0, 1).astype(np.float32)
        grey[~valid] = 0
        return grey, valid

    def _read_values(
        self, window: tuple[int, int, int, int], size: tuple[int, int], average: bool
    ) -> tuple[NDArray[np.float64], Mask]:
        part = Window(*window)
        shape = (size[1], size[0])
        how = Resampling.average if average and shape != (window[3], window[2]) else Resampling.nearest
        bands = list(self.bands)
        try:
            pixels = self.source.read(bands, window=part, out_shape=(len(bands), *shape), resampling=how)
            masks = self.source.read_masks(bands, window=part, out_shape=(len(bands), *shape))
            valid = (masks > 0).all(axis=0)
            if self.alpha is not None:
                valid &= self.source.read(self.alpha, window=part, out_shape=shape) > 0
        except GDAL_ERRORS as error:
            raise ImageError(f"cannot read {self.path}: {one_line(error)}") from None
        if pixels.dtype.kind == "c":
            pixels = np.abs(pixels)
        # Whole numbers beyond 2^24 are no float32 values.
        weights = _LUMA if len(bands) == 3 else (1.0,)
        values = np.zeros(shape, np.float64)
        for weight, band in zip(weights, pixels, strict=True):
            values += weight * band.astype(np.float64)
        valid &= np.isfinite(values)
        return values, valid

    def _stretch(self) -> tuple[float, float]:
        """The values that become 0 and 1, as in `kglmatch.images.load_image`."""
        dtype = self.dtype
        width, height = self.size
        factor = min(1.0, _SAMPLED / max(width, height))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        values, valid = self._read_values((0, 0, width, height), size, average=False)
        data = values[valid]
        if not data.size and factor < 1:
            values, valid = self._read_values((0, 0, width, height), size, average=True)
            data = values[valid]
        if not data.size:
            raise ImageError(f"{self.path} has no pixel with data: all are nodata, masked or not finite")
        if dtype == np.uint8:
            return 0.0, 255.0
        if dtype.kind == "f" and data.min() >= -TOLERANCE and data.max() <= 1 + TOLERANCE:
            return 0.0, 1.0
        bottom, top = (float(v) for v in np.percentile(data, PERCENTILES))
        return (bottom, top) if top > bottom else (float(data.min()), float(data.max()))

    def on(self, grid: Grid, own: Grid | None = None) -> tuple[Image, Mask]:
        """The raster on any grid: grey in [0, 1], and which pixels are valid.

        One resampling, bicubic; where the grid is coarser, of pixels averaged to about its resolution.

        Args:
            grid: where it is wanted.
            own: the raster's own grid, where it is not `self.grid`.

        Returns:
            (height, width) float32 and bool.

        Raises:
            ImageError: as `read`, or coordinates that PROJ cannot transform.
        """
        own = self.grid if own is None else own
        image = np.zeros((grid.height, grid.width), np.float32)
        nothing = np.zeros(image.shape, bool)
        bounds = bounds_within(grid, own)
        if bounds is None:
            return image, nothing
        step = step_between(grid, own)
        x, y, right, bottom = needed_window(bounds, step, own)
        if right <= x or bottom <= y:
            return image, nothing
        exact = _exact_window(grid, own)
        if exact is not None:
            return self.read(exact, (grid.width, grid.height))
        factor = max(1.0, step)
        width, height = right - x, bottom - y
        size = max(1, int(np.ceil(width / factor))), max(1, int(np.ceil(height / factor)))
        grey, valid = self.read((x, y, width, height), size)
        if not valid.any():
            return image, nothing
        part = own.part(x, y, *size)
        scale = np.diag([width / size[0], height / size[1], 1.0])
        corner = np.array(part.affine).reshape(3, 3) @ scale
        found = np.full(image.shape, np.nan, np.float32)
        try:
            reproject(
                np.where(valid, grey, np.float32(np.nan)),
                found,
                src_transform=rasterio.Affine(*corner[:2].ravel()),
                src_crs=own.crs,
                src_nodata=np.nan,
                dst_transform=grid.affine,
                dst_crs=grid.crs,
                dst_nodata=np.nan,
                resampling=Resampling.cubic,
                tolerance=0.01,
            )
        except GDAL_ERRORS as error:
            raise ImageError(f"cannot put {self.path} on the other grid: {one_line(error)}") from None
        valid = np.isfinite(found)
        return np.clip(np.nan_to_num(found), 0, 1), valid

    def close(self) -> None:
        """Closes the file."""
        self.source.close()
        if self._original is not None:
            self._original.close()
        if self._override is not None:
            rasterio.shutil.delete(self._override, driver="VRT")
            self._override = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def step_between(grid: Grid, own: Grid) -> float:
    """How many pixels of a raster's own grid a pixel of a grid is wide, at its middle."""
    middle = np.array([[(grid.width - 1) / 2, (grid.height - 1) / 2]])
    at = pixels_between(grid, own, middle + np.array([[0, 0], [0.5, 0], [0, 0.5]]))
    area = abs(np.linalg.det(2 * (at[1:] - at[0])))
    return float(np.sqrt(area)) if np.isfinite(area) and area > 0 else 1.0


def needed_window(
    bounds: tuple[float, float, float, float], step: float, own: Grid
) -> tuple[int, int, int, int]:
    """The pixels of a raster that an interpolation needs: left, top, right, bottom, within it."""
    reach = _MARGIN * max(1.0, step)
    left, top = (max(0, int(np.floor(min(v - reach, 1e9)))) for v in bounds[:2])
    right, bottom = (
        min(side, int(np.ceil(max(v + reach, -1e9))))
        for v, side in zip(bounds[2:], (own.width, own.height), strict=True)
    )
    return left, top, right, bottom


def _exact_window(grid: Grid, own: Grid) -> tuple[int, int, int, int] | None:
    """The window of a raster that a grid is, where the corners of both are at the same pixels."""
    if grid.crs != own.crs:
        return None
    to_own = np.linalg.inv(own.matrix) @ grid.matrix
    off = np.abs(to_own[[0, 1], [1, 0]]) * max(grid.width, grid.height)
    if off.max() > 1e-3 or min(to_own[0, 0], to_own[1, 1]) <= 0:
        return None
    corners = (to_own @ np.array([[-0.5, grid.width - 0.5], [-0.5, grid.height - 0.5], [1, 1]]))[:2] + 0.5
    whole = np.rint(corners)
    if np.abs(corners - whole).max() > 1e-3:
        return None
    (left, right), (top, bottom) = whole.astype(int)
    if left < 0 or top < 0 or right > own.width or bottom > own.height:
        return None
    if right - left < grid.width or bottom - top < grid.height:
        return None  # enlarged
    return int(left), int(top), int(right - left), int(bottom - top)


def is_plain(raster: Raster) -> bool:
    """Whether a file holds what any reader of images reads alike: grey or colour, every pixel valid."""
    source = raster.source
    opaque = all(flags == [MaskFlags.all_valid] for flags in source.mask_flag_enums)
    return bool(source.count in (1, 3) and opaque and raster.alpha is None and raster.source.nodata is None)
