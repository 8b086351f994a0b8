"""What the commands share for rasters on the map: options, and whether a pair is one of them."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import non_negative_float, say

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTALL = 'pip install "kglmatch[geo]"'

# No GeoTIFFs: read without GDAL, as ever.
_PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def add_band_options(parser: argparse._ActionsContainer) -> None:
    """Adds --vis-band and --ir-band."""
    for name in ("vis", "ir"):
        parser.add_argument(
            f"--{name}-band",
            metavar="B",
            help=f"band of {name.upper()} that is matched, by number or name; also {name.upper()}:B "
            "(default: red, green and blue as grey, or the first)",
        )


def displacement(text: str) -> float | str:
    """Pixels as a number, or a length with its unit, "60m"."""
    if text.strip().lower().endswith(("m", "px")):
        non_negative_float(text.strip().lower().removesuffix("px").removesuffix("m").removesuffix("k"))
        return non_negative_float(text.strip()[:-2]) if text.strip().lower().endswith("px") else text.strip()
    try:
        return non_negative_float(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'expected pixels or metres of at least 0, such as 12 or "60m", got {text!r}'
        ) from None


def files(*paths: Path) -> list[Path]:
    """The files of names that may end in a band."""
    from kglmatch.files import split_band

    return [Path(split_band(path)[0]) for path in paths]


def is_map_pair(
    vis: Path, ir: Path, vis_band: str | None, ir_band: str | None, needs: Mapping[str, bool]
) -> bool:
    """Whether two files both say where they are on the map, so that it is the prior.

    Args:
        vis, ir: names, which may end in a band.
        vis_band, ir_band: as given by their options.
        needs: option -> whether it was given, of those that need the map.

    Raises:
        KGLMatchError: an option that needs rasterio or a map that is not there.
    """
    from kglmatch.errors import ImageError, KGLMatchError
    from kglmatch.files import split_band

    pair = (vis, ir)
    asked = [option for option, given in needs.items() if given]
    if importlib.util.find_spec("rasterio") is None:
        bands = [f"the band of {path}" for path in pair if split_band(path)[1] is not None]
        bands += [f"--{name}-band" for name, band in (("vis", vis_band), ("ir", ir_band)) if band is not None]
        formats = [str(path) for path in pair if path.suffix.lower() == ".vrt"]
        for what in (*asked, *bands, *formats):
            raise KGLMatchError(f"{what} needs rasterio: {INSTALL}")
        return False
    lacking = [path for path in pair if not _is_on_map(path)]
    if not lacking:
        return True
    if asked:
        raise ImageError(
            f"{lacking[0]} has no place on the map (a coordinate reference system and a geotransform), "
            f"which {asked[0]} needs"
        )
    if len(lacking) == 1:
        say(f"{lacking[0]}: no place on the map; the images are taken as pixels")
    return False


def _is_on_map(path: Path) -> bool:
    from kglmatch.errors import ImageError
    from kglmatch.geo.raster import Raster

    if files(path)[0].suffix.lower() in _PLAIN:
        return False
    try:
        with Raster(files(path)[0]) as raster:
            return raster.is_on_map
    except ImageError:
        return False  # whatever it is, who reads it next says so


def load_grey(
    path: Path, band: str | None = None, nodata: float | None = None
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """A file as grey (H, W) in [0, 1] and its pixels with data, None for all; not placed on the map.

    A file of several bands, or one with nodata, a mask or alpha, is read by rasterio where that is installed.

    Raises:
        ImageError: unreadable, or of bands that cannot be told apart without rasterio.
    """
    from kglmatch.errors import ImageError, KGLMatchError
    from kglmatch.files import split_band
    from kglmatch.images import load_masked

    file, own = split_band(path)
    band = own if band is None else band
    has_rasterio = importlib.util.find_spec("rasterio") is not None
    if band is None and Path(file).suffix.lower() in _PLAIN:
        return load_masked(Path(file), nodata=nodata)
    if not has_rasterio and band is not None:
        raise KGLMatchError(f"band {band} of {file} needs rasterio: {INSTALL}")
    if not has_rasterio:
        try:
            return load_masked(Path(file), nodata=nodata)
        except ImageError as error:
            if not Path(file).is_file():
                raise
            raise ImageError(f"{error}; if it is a raster for GIS programs: {INSTALL}") from None
    from kglmatch.geo.raster import Raster, gdal_settings, is_plain

    try:
        raster = Raster(file, band, nodata)
    except ImageError:
        if band is not None or file.startswith("/vsi"):
            raise
        return load_masked(Path(file), nodata=nodata)  # a format that GDAL does not read, or no file
    with gdal_settings(), raster:
        if band is None and is_plain(raster):
            return load_masked(Path(file), nodata=nodata)
        size = raster.source.width, raster.source.height
        grey, valid = raster.read((0, 0, *size), size)
        return grey, None if valid.all() else valid


def load_raw(path: Path, band: str | None = None) -> NDArray[Any]:
    """The pixels of a file that is not placed on the map, of their own type: all bands, or the one that is
    named.

    Raises:
        ImageError: unreadable, or of bands that no image file of this kind holds.
    """
    from kglmatch.files import split_band
    from kglmatch.images import read_image_raw

    file, own = split_band(path)
    band = own if band is None else band
    if band is None:
        return read_image_raw(file)
    from kglmatch.geo.raster import Raster

    with Raster(file, band) as raster:
        return raster.source.read(raster.bands[0])


def masked(grey: NDArray[Any], valid: NDArray[Any] | None) -> NDArray[Any]:
    """An image as `Matcher.register` takes it, its pixels without data masked."""
    import numpy as np

    return grey if valid is None or valid.all() else np.ma.MaskedArray(grey, mask=~valid)
