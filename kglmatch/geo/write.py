"""Writing registered rasters: resampled once onto a grid, or the same pixels at a corrected place."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import tifffile
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from kglmatch.errors import KGLMatchError, OutputError
from kglmatch.files import atomic_output
from kglmatch.geo.grid import GDAL_ERRORS, Grid, one_line
from kglmatch.geo.raster import Raster, gdal_settings, step_between
from kglmatch.geometry import transform_points
from kglmatch.options import DEFAULT_RESAMPLING, RESAMPLINGS
from kglmatch.progress import counter

Matrix = NDArray[np.float64]
Mapping = Callable[[Matrix], Matrix]

GEOTIFF = (".tif", ".tiff")
BLOCK = 512  # pixels, side of the blocks of what is written
_PIECE = 2048  # pixels, side of what is warped at once
_LEAST_PIECE = 16
_WARP_MB = 128
_TOLERANCE = 0.02  # input pixels by which GDAL may approximate the map projection
_SAME_STEP = 0.05  # pixels by which a pixel size may differ from a multiple of another
_STRAIGHT = 0.05  # pixels by which an affine may differ from the mapping within a piece
_LOSSY = ("jpeg", "ycbcr jpeg", "webp", "lerc", "jpeg2000", "jxl")
_MODEL_TIES, _MODEL_MATRIX = 33922, 34264  # TIFF tags
_TIE, _MATRIX = 6, 16  # numbers in them


def save_on_grid(
    raster: Raster,
    path: str | os.PathLike[str],
    grid: Grid,
    mapping: Matrix | Mapping,
    *,
    resampling: str = DEFAULT_RESAMPLING,
    nodata: float | None = None,
    own: Grid | None = None,
    progress: bool = False,
) -> None:
    """Writes all bands of a raster on a grid, resampled once from the file's own pixels.

    Bands, their type, names, colours, scales and units, tags, nodata, mask or alpha, overviews, tiling and
    the COG layout are kept. Where the raster does not reach, pixels are nodata, or transparent; of a file
    that has no way to say so, masked. What is written is warped piece by piece and appears when it is
    complete.

    Args:
        raster: whose pixels are written.
        path: .tif or .tiff.
        grid: the pixels of the output.
        mapping: from pixels of the grid to where the raster shows their content, in pixels of that grid: (3,
            3), or a function of (N, 2) xy that is smooth.
        resampling: one of `kglmatch.options.RESAMPLINGS`; bands with a palette are always "nearest".
        nodata: value of pixels without data, in place of the file's own.
        own: the raster's own grid, where it is not `raster.grid`.
        progress: draw a bar.

    Raises:
        KGLMatchError: another resampling, or a nodata that the type cannot hold.
        OutputError: another ending, or a file that cannot be written.
        ImageError: a raster that cannot be read to its end.
    """
    _check_name(path)
    if resampling not in RESAMPLINGS:
        raise KGLMatchError(f"resampling must be one of {', '.join(RESAMPLINGS)}, got {resampling!r}")
    source = raster.source
    own = raster.grid if own is None else own
    if nodata is None:
        nodata = source.nodata
    is_cog = source.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
    how = Resampling[resampling]
    if ColorInterp.palette in source.colorinterp:
        how = Resampling.nearest
    with _written(path, cog_of=source if is_cog else None) as temporary:
        # A raster that reaches over the whole grid needs no mask, but that is not known before.
        masked = nodata is None and raster.alpha is None
        with rasterio.open(temporary, "w", **_profile(source, grid, nodata)) as output:
            _copy_descriptions(source, output)
            _write_pieces(raster, output, grid, own, mapping, how, masked, progress)
        if not is_cog:
            _add_overviews(source, temporary)


def save_shifted(raster: Raster, path: str | os.PathLike[str], shift: NDArray[np.floating]) -> None:
    """Writes the same file with a geotransform that is moved on the map; no pixel changes.

    A TIFF is copied byte by byte, and the coordinates of its tie point are replaced in the copy. Another
    format becomes a GeoTIFF.

    Args:
        raster: the raster to copy.
        path: .tif or .tiff.
        shift: (2,) what to add to map x and y.

    Raises:
        OutputError: another ending, or a file that cannot be written.
    """
    _check_name(path)
    source = raster.source
    right = Affine.translation(*(float(v) for v in shift)) @ source.transform
    is_cog = source.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
    with atomic_output(path) as temporary, _as_output_error(path):
        # Files next to it may hold overviews, masks or the georeference itself.
        if source.driver == "GTiff" and len(source.files) == 1 and Path(raster.path).is_file():
            shutil.copyfile(raster.path, temporary)
            if _move_ties(temporary, shift):
                return
        _copy_with_transform(source, temporary, right, "COG" if is_cog else "GTiff")


# --- what is written --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _written(path: str | os.PathLike[str], cog_of: Any) -> Iterator[Path]:
    """A temporary GeoTIFF that becomes the file, by way of the COG driver where it is to be one."""
    with gdal_settings(), atomic_output(path) as final, _as_output_error(path):
        if cog_of is None:
            yield final
            _remove_sidecars(final)
            return
        # Named as temporaries are, so that what a kill leaves is cleared later.
        plain = final.with_name(f"{final.stem}.plain.tif")
        try:
            yield plain
            options = _cog_options(cog_of)
            rasterio.shutil.copy(plain, final, driver="COG", **options)
        finally:
            plain.unlink(missing_ok=True)
            _remove_sidecars(plain)
            _remove_sidecars(final)


def _remove_sidecars(path: Path) -> None:
    for ending in (".aux.xml", ".msk", ".ovr"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


@contextlib.contextmanager
def _as_output_error(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except GDAL_ERRORS as error:
        cause = error.__cause__ or error
        raise OutputError(f"cannot write {os.fspath(path)}: {one_line(cause)}") from None


def _check_name(path: str | os.PathLike[str]) -> None:
    if Path(path).suffix.lower() not in GEOTIFF:
        raise OutputError(f"cannot write a raster to {os.fspath(path)}: the name must end in .tif or .tiff")


def _profile(source: Any, grid: Grid, nodata: float | None) -> dict[str, Any]:
    """How a GeoTIFF is made that is like the source."""
    dtype = np.result_type(*source.dtypes).name if len(set(source.dtypes)) > 1 else source.dtypes[0]
    if nodata is not None and not in_dtype_range(nodata, dtype):
        raise KGLMatchError(f"nodata {nodata:g} is no {dtype} value, the type of the bands")
    structure = source.tags(ns="IMAGE_STRUCTURE")
    compression = str(structure.get("COMPRESSION", "") or "none").lower()
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "width": grid.width,
        "height": grid.height,
        "count": source.count,
        "dtype": dtype,
        "crs": grid.crs,
        "transform": grid.affine,
        "nodata": nodata,
        "interleave": str(structure.get("INTERLEAVE", "band")).lower(),
        "compress": "deflate" if compression in _LOSSY or source.driver != "GTiff" else compression,
        **creation_options(),
    }
    if profile["interleave"] not in ("band", "pixel") or source.count == 1:
        profile.pop("interleave")
    if "PREDICTOR" in structure and profile["compress"] in ("deflate", "lzw", "zstd"):
        profile["predictor"] = structure["PREDICTOR"]
    rows, columns = source.block_shapes[0]
    # Strips of a wide image are slow to read in parts.
    if source.is_tiled and not rows % 16 and not columns % 16:
        profile |= {"blockxsize": columns, "blockysize": rows}
    colours = list(source.colorinterp)
    if source.count >= 3 and colours[:3] == [ColorInterp.red, ColorInterp.green, ColorInterp.blue]:
        profile["photometric"] = "RGB"
    if ColorInterp.alpha in colours:
        profile["alpha"] = "YES"
    return profile


def creation_options() -> dict[str, Any]:
    """Of every GeoTIFF: tiles, and BigTIFF where it may grow beyond 4 GiB."""
    return {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "BIGTIFF": "IF_SAFER"}


def _cog_options(source: Any) -> dict[str, Any]:
    structure = source.tags(ns="IMAGE_STRUCTURE")
    compression = str(structure.get("COMPRESSION", "") or "none").lower()
    options = {
        "COMPRESS": "DEFLATE" if compression in _LOSSY else compression.upper(),
        "BLOCKSIZE": str(source.block_shapes[0][1]),
        "BIGTIFF": "IF_SAFER",
        "OVERVIEW_RESAMPLING": _overview_resampling(source).name.upper(),
        "OVERVIEWS": "AUTO",
    }
    if "PREDICTOR" in structure and options["COMPRESS"] in ("DEFLATE", "LZW", "ZSTD"):
        options["PREDICTOR"] = {"2": "STANDARD", "3": "FLOATING_POINT"}.get(structure["PREDICTOR"], "NO")
    return options


def _overview_resampling(source: Any) -> Resampling:
    named = str(source.tags(ns="rio_overview").get("resampling", "")).lower()
    if named in Resampling.__members__:
        return Resampling[named]
    named = str(source.tags(ns="IMAGE_STRUCTURE").get("OVERVIEW_RESAMPLING", "")).lower()
    if named in Resampling.__members__:
        return Resampling[named]
    return Resampling.nearest if ColorInterp.palette in source.colorinterp else Resampling.average


def _copy_descriptions(source: Any, output: Any) -> None:
    """Tags, names, colours, scales and units; statistics are no longer true."""
    for space in ("", *source.tag_namespaces()):
        if space in ("IMAGE_STRUCTURE", "DERIVED_SUBDATASETS", "RPC", "GEOLOCATION", "TIFF"):
            continue
        tags = source.tags(ns=space) if space else source.tags()
        output.update_tags(ns=space or None, **tags)
    for band in range(1, source.count + 1):
        tags = {k: v for k, v in source.tags(band).items() if not k.startswith("STATISTICS_")}
        if tags:
            output.update_tags(band, **tags)
        if source.descriptions[band - 1]:
            output.set_band_description(band, source.descriptions[band - 1])
        if source.colorinterp[band - 1] == ColorInterp.palette:
            with contextlib.suppress(ValueError):
                output.write_colormap(band, source.colormap(band))
        if source.units[band - 1]:
            output.set_band_unit(band, source.units[band - 1])
    if ColorInterp.palette not in source.colorinterp:
        output.colorinterp = source.colorinterp
    if set(source.scales) != {1.0}:
        output.scales = source.scales
    if set(source.offsets) != {0.0}:
        output.offsets = source.offsets


def _add_overviews(source: Any, path: Path) -> None:
    factors = source.overviews(1)
    if factors:
        with rasterio.open(path, "r+") as output:
            smallest = min(output.width, output.height)
            output.build_overviews([f for f in factors if f <= smallest], _overview_resampling(source))


# --- warping ----------------------------------------------------------------------------------------------


def _write_pieces(
    raster: Raster,
    output: Any,
    grid: Grid,
    own: Grid,
    mapping: Matrix | Mapping,
    how: Resampling,
    masked: bool,
    progress: bool,
) -> None:
    pieces = [
        Window(x, y, min(_PIECE, grid.width - x), min(_PIECE, grid.height - y))
        for y in range(0, grid.height, _PIECE)
        for x in range(0, grid.width, _PIECE)
    ]
    # Whether a mask is needed shows at the first pixel without data; until then all have some.
    full: list[Window] | None = [] if masked else None
    warp = _Warp(raster, own, how, output.nodata, masked)
    count = raster.source.count
    with counter("write", total=len(pieces), done=0, show=progress, unit="block") as advance:
        for piece in pieces:
            for window, piece_grid in straight_pieces(grid, piece, mapping):
                pixels = warp(piece_grid)
                output.write(pixels[:count], window=window)
                if not masked:
                    continue
                covered = pixels[count] > 0
                if full is not None and covered.all():
                    full.append(window)
                    continue
                for before in full or ():
                    output.write_mask(np.full((before.height, before.width), 255, np.uint8), window=before)
                full = None
                output.write_mask(np.where(covered, 255, 0).astype(np.uint8), window=window)
            advance(1)


class _Warp:
    """All bands of a raster on any grid, by GDAL."""

    def __init__(
        self, raster: Raster, own: Grid, how: Resampling, nodata: float | None, masked: bool
    ) -> None:
        self._source, self._own = raster.source, own
        self._options: dict[str, Any] = {
            "src_transform": own.affine,
            "resampling": how,
            "tolerance": _TOLERANCE,
            "warp_mem_limit": _WARP_MB,
        }
        if masked:
            self._options["add_alpha"] = True
        elif nodata is not None:
            self._options["nodata"] = nodata
            # Else a pixel has data in all bands as soon as it has some in one.
            self._options["UNIFIED_SRC_NODATA"] = "NO"
        if raster.alpha is not None:
            self._options["src_alpha"] = raster.alpha

    def __call__(self, grid: Grid) -> NDArray[Any]:
        """(bands, height, width), and the coverage as one more band where there is a mask."""
        with WarpedVRT(
            self._source,
            crs=grid.crs,
            transform=grid.affine,
            width=grid.width,
            height=grid.height,
            src_crs=self._own.crs if self._own.crs == grid.crs else self._own.wrapped_crs(),
            **warp_scale(grid, self._own),
            **self._options,
        ) as warped:
            return warped.read()


def warp_scale(grid: Grid, own: Grid) -> dict[str, float]:
    """GDAL's options that say by how much a raster's own pixels are shrunk on a grid.

    GDAL itself divides the sizes of source and target windows, which are rounded: a piece of few pixels
    would seem to be shrunk, and be blurred.
    """
    step = max(1.0, step_between(grid, own))
    # As GDAL does, so that neighbouring pieces are treated alike.
    step = round(step) if abs(step - round(step)) < _SAME_STEP else step
    return {"XSCALE": 1 / step, "YSCALE": 1 / step}


def straight_pieces(grid: Grid, window: Window, mapping: Matrix | Mapping) -> Iterator[tuple[Window, Grid]]:
    """Parts of a window within which the mapping is affine, each with the grid to read the raster on."""
    x, y, width, height = window.col_off, window.row_off, window.width, window.height
    moved = mapping if callable(mapping) else (lambda points: transform_points(mapping, points))
    columns, rows = np.meshgrid(np.linspace(x, x + width - 1, 5), np.linspace(y, y + height - 1, 5))
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    there = moved(points)
    local = points - [x, y]
    design = np.column_stack([local, np.ones(len(local))])
    fitted = np.linalg.lstsq(design, there, rcond=None)[0]
    off = np.abs(design @ fitted - there).max()
    if off > _STRAIGHT and max(width, height) > _LEAST_PIECE:
        half_x, half_y = (side if side <= _LEAST_PIECE else side // 2 for side in (width, height))
        for top in (0, half_y) if half_y < height else (0,):
            for left in (0, half_x) if half_x < width else (0,):
                part = Window(
                    x + left,
                    y + top,
                    width - left if left or half_x >= width else half_x,
                    height - top if top or half_y >= height else half_y,
                )
                yield from straight_pieces(grid, part, mapping)
        return
    affine = np.eye(3)
    affine[:2] = fitted.T
    yield window, Grid(grid.crs, grid.matrix @ affine, width, height)


# --- the same pixels --------------------------------------------------------------------------------------


def _move_ties(path: Path, shift: NDArray[np.floating]) -> bool:
    """Moves the coordinates of a GeoTIFF in place; False where they are not in one tie point or matrix."""
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages[0].tags  # type: ignore[union-attr]  # the first page is never a mere frame
        for code, size, at in ((_MODEL_TIES, _TIE, (3, 4)), (_MODEL_MATRIX, _MATRIX, (3, 7))):
            if code in tags and len(tags[code].value) == size:
                values = list(tags[code].value)
                for place, change in zip(at, shift, strict=True):
                    values[place] += float(change)
                tags[code].overwrite(tuple(values))
                return True
    return False


def _copy_with_transform(source: Any, path: Path, transform: Affine, driver: str) -> None:
    """A copy by GDAL, of whatever it reads."""
    virtual = f"/vsimem/{uuid.uuid4().hex}.vrt"
    rasterio.shutil.copy(source, virtual, driver="VRT")
    try:
        with rasterio.open(virtual, "r+") as moved:
            moved.transform = transform
        options = _cog_options(source) if driver == "COG" else creation_options() | {"compress": "deflate"}
        if driver == "GTiff" and source.overviews(1):
            options["COPY_SRC_OVERVIEWS"] = "YES"
        rasterio.shutil.copy(virtual, path, driver=driver, **options)
    finally:
        rasterio.shutil.delete(virtual, driver="VRT")
        _remove_sidecars(path)
