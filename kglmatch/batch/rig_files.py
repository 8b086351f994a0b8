"""Stacks of bands as TIFF files, with the names, types, metadata and map of what they were made from."""

from __future__ import annotations

import os
import struct
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from kglmatch.batch.captures import opened_header
from kglmatch.errors import ImageError, OutputError
from kglmatch.files import atomic_output
from kglmatch.options import __version__
from kglmatch.registration.files import TiffFields, read_map_tags

_EXIF, _GPS, _XMP = 0x8769, 0x8825, 700
_PLACEHOLDER = 1  # above a tag: nothing stands between them, so that tags stay in order
_LONG = 4  # type of a TIFF field
_DESCRIPTION, _MAKE, _MODEL, _DATE = 270, 271, 272, 306
_PAGE_NAME, _GDAL_METADATA, _GDAL_NODATA = 285, 42112, 42113
_TYPES = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
_UNWRITABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, struct.error)
_TIES, _MATRIX = 33922, 34264  # GeoTIFF tags that name a pixel
_STATISTICS = "STATISTICS_"  # names of GDAL's items that no longer hold once pixels were warped
_LARGEST = (1 << 32) - (1 << 25)  # bytes: above it, offsets of 32 bits do not reach


# (name, value) of each attribute, and the text.
GdalItem = tuple[tuple[tuple[str, str], ...], str]


@dataclass(frozen=True)
class Metadata:
    """What an image file says about how it was taken.

    Attributes:
        texts: TIFF tag -> text: description, make, model, date.
        xmp: the packet as it is, or empty.
        exif, gps: tag -> value, of the EXIF and GPS directories.
        items: of GDAL, such as scale, offset and wavelength: attributes and text of each.
    """

    texts: dict[int, str] = field(default_factory=dict)
    xmp: bytes = b""
    exif: dict[int, Any] = field(default_factory=dict)
    gps: dict[int, Any] = field(default_factory=dict)
    items: tuple[GdalItem, ...] = ()


def read_metadata(image: Any) -> Metadata:
    """The metadata of an image file; empty for anything else, or where nothing can be read."""
    if not isinstance(image, (str, os.PathLike)):
        return Metadata()
    try:
        with opened_header(image) as opened:
            exif = opened.getexif()
            xmp = opened.info.get("xmp") or exif.get(_XMP) or b""
            texts = {tag: str(exif[tag]) for tag in (_DESCRIPTION, _MAKE, _MODEL, _DATE) if tag in exif}
            details, gps = dict(exif.get_ifd(_EXIF)), dict(exif.get_ifd(_GPS))
            items = _gdal_items(exif.get(_GDAL_METADATA))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, UnidentifiedImageError):
        return Metadata()
    return Metadata(texts, xmp if isinstance(xmp, bytes) else str(xmp).encode(), details, gps, items)


def _gdal_items(text: Any) -> tuple[GdalItem, ...]:
    """GDAL's items of an image of one band, but for its name and statistics; none where it holds none."""
    try:
        found = ET.fromstring(str(text).strip("\0 \n")) if text else ()
    except ET.ParseError:
        return ()
    items = []
    for item in found:
        name, role = item.get("name", ""), item.get("role")
        if role != "description" and not name.startswith(_STATISTICS):
            items.append((tuple(item.attrib.items()), item.text or ""))
    return tuple(items)


def map_tags_of_part(image: Any, corner: tuple[int, int]) -> TiffFields:
    """What places a part of an image on its map; nothing for an image without one.

    Args:
        image: a path; anything else has no map.
        corner: (x, y) pixels, the first of the part.

    Raises:
        ImageError: a damaged georeference.
    """
    if not isinstance(image, (str, os.PathLike)):
        return []
    moved: TiffFields = []
    for tag, kind, count, values, once in read_map_tags(image):
        numbers = values
        if tag == _TIES:  # pixel x, y, z, map x, y, z, of each point
            steps = np.array([*corner, 0, 0, 0, 0])
            numbers = tuple((np.reshape(values, (-1, 6)) - steps).ravel().tolist())
        elif tag == _MATRIX:
            step = np.eye(4)
            step[:2, 3] = corner
            numbers = tuple((np.reshape(values, (4, 4)) @ step).ravel().tolist())
        moved.append((tag, kind, count, numbers, once))
    return moved


def write_bands(
    path: str | os.PathLike[str],
    bands: Sequence[NDArray[Any]],
    names: Sequence[str],
    *,
    metadata: Sequence[Metadata] = (),
    map_tags: TiffFields | None = None,
    nodata: float | None = None,
) -> None:
    """Writes bands as one TIFF, lossless (deflate), whole or not at all.

    Bands of one type become the planes of one image, whose names GDAL and QGIS show; otherwise each is a page
    of its own type, with its name as PageName.

    Args:
        path: .tif or .tiff.
        bands: (H, W) each, or (H, W, C); bool becomes 0 and 255.
        names: of the bands.
        metadata: of each band's image, or none. That of the first is the file's; GDAL's items stay with their
            bands, and those that all bands share are the file's.
        map_tags: of `map_tags_of_part`, for bands that have the pixel grid of a GeoTIFF.
        nodata: value of pixels without data.

    Raises:
        ImageError: a type that TIFF does not hold.
        OutputError: the file cannot be written.
    """
    for band, name in zip(bands, names, strict=True):
        if band.dtype.name not in _TYPES:
            raise ImageError(f"band {name} has type {band.dtype}; a stack holds {', '.join(_TYPES)}")
    pixels = [band.astype(np.uint8) * 255 if band.dtype == np.bool_ else band for band in bands]
    metadata = list(metadata) or [Metadata()] * len(bands)
    planes = len({(band.shape, band.dtype) for band in pixels}) == 1 and pixels[0].ndim == 2
    # Planes of one image, or a page each.
    pages = [(np.stack(pixels), range(len(pixels)))] if planes else [(p, (i,)) for i, p in enumerate(pixels)]
    with atomic_output(path) as temporary:
        try:
            with tifffile.TiffWriter(temporary) as file:
                for number, (page, rows) in enumerate(pages):
                    own = metadata[0] if number == 0 else Metadata()
                    tags = _tags(own, nodata) + list(map_tags or ())
                    tags.append(_gdal_tag([names[i] for i in rows], [metadata[i].items for i in rows]))
                    if not planes:
                        tags.append((_PAGE_NAME, "s", 0, names[number].encode(), True))
                    _write(file, page, tags, own, len(rows) if planes else 1)
            if temporary.stat().st_size < _LARGEST:
                _add_directories(temporary, metadata[0])
        except (struct.error, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            raise OutputError(f"cannot write {path}: {error}") from error


Tag = tuple[int, str | int, int, Any, bool]


def _write(
    file: tifffile.TiffWriter, pixels: NDArray[Any], tags: list[Tag], metadata: Metadata, planes: int
) -> None:
    colour = planes == 1 and pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    if planes == 1 and pixels.ndim == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    extra = planes - 1 if planes > 1 else pixels.shape[2] - (3 if colour else 1) if pixels.ndim == 3 else 0
    file.write(
        pixels,
        photometric="rgb" if colour else "minisblack",
        planarconfig=None if pixels.ndim == 2 else "separate" if planes > 1 else "contig",
        extrasamples=["unspecified" if planes > 1 else "unassalpha"] * extra or None,
        compression="zlib",
        # Differences of floats need a codec that is not always there.
        predictor=pixels.dtype.kind in "iu",
        software=f"kglmatch {__version__}",
        description=metadata.texts.get(_DESCRIPTION, "").encode("utf-8") or None,
        datetime=metadata.texts.get(_DATE) if len(metadata.texts.get(_DATE, "")) == 19 else None,
        extratags=tags,
        metadata=None,
    )


def _tags(metadata: Metadata, nodata: float | None) -> list[Tag]:
    tags: list[Tag] = []
    for tag in (_MAKE, _MODEL):
        if tag in metadata.texts:
            tags.append((tag, "s", 0, metadata.texts[tag].encode("utf-8", "replace"), True))
    if metadata.xmp:
        tags.append((_XMP, "B", len(metadata.xmp), metadata.xmp, True))
    # Places of directories that are appended later; tifffile writes none under their own tags.
    for tag, directory in ((_EXIF, metadata.exif), (_GPS, metadata.gps)):
        if directory:
            tags.append((tag + _PLACEHOLDER, "I", 1, 0, True))
    if nodata is not None:
        tags.append((_GDAL_NODATA, "s", 0, f"{nodata:.17g}", True))
    return tags


def _gdal_tag(names: Sequence[str], items: Sequence[tuple[GdalItem, ...]]) -> Tag:
    """Names and items of bands, as GDAL stores them."""
    of_file = [item for item in items[0] if "sample" not in dict(item[0]) and all(item in o for o in items)]
    lines = [_gdal_line(item, None) for item in of_file]
    for i, (name, own) in enumerate(zip(names, items, strict=True)):
        described = (("name", "DESCRIPTION"), ("sample", ""), ("role", "description")), name
        lines += [_gdal_line(item, i) for item in (described, *own) if item not in of_file]
    return _GDAL_METADATA, "s", 0, f"<GDALMetadata>{''.join(lines)}</GDALMetadata>".encode(), True


def _gdal_line(item: GdalItem, band: int | None) -> str:
    attributes, text = dict(item[0]), item[1]
    if band is not None:
        attributes["sample"] = str(band)
    written = "".join(f" {key}={quoteattr(value)}" for key, value in attributes.items())
    return f"<Item{written}>{escape(text)}</Item>"


def _add_directories(path: Path, metadata: Metadata) -> None:
    """Appends the EXIF and GPS directories to a TIFF, and points at them."""
    with tifffile.TiffFile(path) as tiff:
        byteorder = tiff.byteorder
        tags = tiff.pages.first.tags
        places = {tag: tags[tag + _PLACEHOLDER].offset for tag in (_EXIF, _GPS) if tag + _PLACEHOLDER in tags}
    order = b"II" if byteorder == "<" else b"MM"
    with path.open("r+b") as file:
        for tag, values in ((_EXIF, metadata.exif), (_GPS, metadata.gps)):
            if tag not in places:
                continue
            file.seek(0, os.SEEK_END)
            file.write(b"\0" * (file.tell() % 2))
            start = file.tell()
            file.write(_directory(values, tag, order, start))
            file.seek(places[tag])
            file.write(struct.pack(f"{byteorder}HHII", tag, _LONG, 1, start))


def _directory(values: dict[int, Any], group: int, order: bytes, offset: int) -> bytes:
    """A TIFF directory that is to stand at `offset`; values that Pillow cannot write are left out."""
    header = order + (b"\x2a\0" if order == b"II" else b"\0\x2a") + b"\0\0\0\0"
    kept = ImageFileDirectory_v2(header, group=group)
    for tag, value in values.items():
        alone = ImageFileDirectory_v2(header, group=group)
        try:
            alone[tag] = value
            alone.tobytes(0)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            struct.error,
            OverflowError,
            ZeroDivisionError,
        ):
            continue
        kept[tag] = value
    return kept.tobytes(offset)
