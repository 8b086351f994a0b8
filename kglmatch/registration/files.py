"""`Registration` as files: JSON, OpenCV's yml, ground control points for GDAL and QGIS; stacks of bands."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kglmatch.errors import ImageError, KGLMatchError, OutputError
from kglmatch.files import atomic_output
from kglmatch.registration.results import Registration

_ASCII, _SHORT, _LONG, _DOUBLE = 2, 3, 4, 12  # TIFF field types
_BYTES = {_ASCII: 1, _SHORT: 2, _LONG: 4, _DOUBLE: 8}  # of one value
TiffFields = list[tuple[int, int, bytes]]  # tag, type, values

YML = (".yml", ".yaml")
CONTROL_POINTS = (".points", ".txt", ".gcp")
STACK = (".tif", ".tiff")
JSON = (".json",)


def check_ending(path: str | os.PathLike[str], endings: tuple[str, ...], what: str) -> None:
    """Raises `OutputError` unless the file's ending is one of these."""
    if Path(path).suffix.lower() not in endings:
        raise OutputError(
            f"cannot write {what} to {os.fspath(path)}: the name must end in {' or '.join(endings)}"
        )


# --- transforms -----------------------------------------------------------------------------------


def registration_to_dict(registration: Registration) -> dict[str, Any]:
    """`Registration.to_dict` and the single places, as plain lists, as in the `.json` file."""
    places = {
        name: np.round(getattr(registration, name).astype(float), 4).tolist()
        for name in ("keypoints_vis", "keypoints_ir", "scores", "residuals")
    }
    return {**registration.to_dict(), **places, "inliers": registration.inliers.tolist()}


def save_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes plain lists and numbers as JSON. Raises `OutputError` where it cannot."""
    check_ending(path, JSON, "JSON")
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def save_yml(path: str | os.PathLike[str], registration: Registration) -> None:
    """Writes the transform for `cv2.FileStorage`.

    Nodes: "transform" (3 x 3 double, from visible to ir pixels), "kind", "verdict", "confidence",
    "vis_size" and "ir_size" (width, height), "points_vis" and "points_ir" (K x 2, the inliers).
    `cv2.warpPerspective(ir, transform, vis_size, flags=INTER_CUBIC + WARP_INVERSE_MAP)` applies it.

    Raises:
        KGLMatchError: the registration failed.
        OutputError: another ending than .yml or .yaml, or a file that cannot be written.
    """
    check_ending(path, YML, "OpenCV's yml")
    transform = _transform(registration)
    storage = cv2.FileStorage(".yml", cv2.FILE_STORAGE_WRITE | cv2.FILE_STORAGE_MEMORY)
    storage.write("transform", transform)
    storage.write("kind", str(registration.kind))
    storage.write("verdict", registration.verdict)
    storage.write("confidence", float(registration.confidence))
    for name, size in (("vis_size", registration.vis_size), ("ir_size", registration.ir_size)):
        storage.write(name, np.array(size, np.int32))
    storage.write("points_vis", registration.keypoints_vis[registration.inliers].astype(np.float64))
    storage.write("points_ir", registration.keypoints_ir[registration.inliers].astype(np.float64))
    text = storage.releaseAndGetString()
    with atomic_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- ground control points ------------------------------------------------------------------------


@dataclass(frozen=True)
class MapFrame:
    """Where the pixels of an image lie on a map.

    Attributes:
        matrix: (2, 3) from xy pixels (the first pixel's centre is 0, 0) to map x and y.
        epsg: code of the map's reference system, or None.
    """

    matrix: NDArray[np.float64]
    epsg: int | None = None


# An image without a map, as GIS programs show it: the corner is 0, 0 and y goes up.
NO_MAP = MapFrame(np.array([[1.0, 0.0, 0.5], [0.0, -1.0, -0.5]]))

_SCALE, _TIES, _MATRIX, _KEYS = 33550, 33922, 34264, 34735  # GeoTIFF tags
_DOUBLES, _TEXTS, _NODATA = 34736, 34737, 42113
_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1025, 2048, 3072  # GeoTIFF keys
_PIXEL_IS_POINT, _USER_DEFINED = 2, 32767


def read_map_frame(path: str | os.PathLike[str]) -> MapFrame:
    """The map frame of a GeoTIFF; `NO_MAP` for any other image file.

    Raises:
        ImageError: a file that cannot be read.
    """
    tags = _read_tags(path)
    keys = np.array(tags.get(_KEYS, ()), np.int64)
    entries = {int(key): int(value) for key, place, _, value in keys[4:].reshape(-1, 4) if place == 0}
    if len(tags.get(_MATRIX, ())) == 16:
        corner = np.array(tags[_MATRIX], np.float64).reshape(4, 4)[:2][:, [0, 1, 3]]
    elif len(tags.get(_SCALE, ())) >= 2 and len(tags.get(_TIES, ())) == 6:
        x, y, _, east, north, _ = tags[_TIES]
        scale_x, scale_y = tags[_SCALE][:2]
        corner = np.array([[scale_x, 0, east - x * scale_x], [0, -scale_y, north + y * scale_y]])
    else:
        return NO_MAP
    matrix = corner.copy()
    if entries.get(_RASTER_TYPE) != _PIXEL_IS_POINT:
        matrix[:, 2] += corner[:, :2] @ [0.5, 0.5]
    code = entries.get(_PROJECTED, entries.get(_GEOGRAPHIC, _USER_DEFINED))
    return MapFrame(matrix, None if code in (0, _USER_DEFINED) else code)


def _read_tags(path: str | os.PathLike[str]) -> dict[int, Any]:
    """TIFF tags of a file; none of another image. Raises `ImageError` for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return dict(getattr(image, "tag_v2", {}))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # No image that Pillow knows, such as a format of OpenCV's; GeoTIFF it does know.
        if not Path(path).is_file():
            raise ImageError(f"cannot read {os.fspath(path)}: no such file") from None
        return {}


def read_map_tags(path: str | os.PathLike[str]) -> TiffFields:
    """What places a GeoTIFF on its map, as fields for `save_stack`; none for any other image file.

    Raises:
        ImageError: a file that cannot be read.
    """
    tags = _read_tags(path)
    if _KEYS not in tags:
        return []
    fields: TiffFields = []
    for tag in (_SCALE, _TIES, _MATRIX, _DOUBLES):
        if tag in tags:
            values = np.atleast_1d(np.array(tags[tag], "<f8"))
            fields.append((tag, _DOUBLE, values.tobytes()))
    fields.append((_KEYS, _SHORT, _shorts(*tags[_KEYS])))
    if _TEXTS in tags:
        fields.append((_TEXTS, _ASCII, str(tags[_TEXTS]).encode("utf-8", "replace") + b"\0"))
    return fields


def save_control_points(
    path: str | os.PathLike[str], registration: Registration, frame: MapFrame = NO_MAP
) -> None:
    """Writes the inliers as ground control points of the ir image.

    The ending chooses the form: ``.points`` is a file of QGIS's Georeferencer; ``.txt`` and ``.gcp``
    hold ``-gcp pixel line x y`` lines for GDAL: ``gdal_translate --optfile FILE ir.tif gcps.tif``,
    then ``gdalwarp``.

    Args:
        frame: of the visible image, see `read_map_frame`; without a map, x and y are its pixels from
            the upper left corner, y negative, as GIS programs place an image without a map.

    Raises:
        KGLMatchError: the registration failed.
        OutputError: another ending, or a file that cannot be written.
    """
    check_ending(path, CONTROL_POINTS, "ground control points")
    _transform(registration)
    vis = registration.keypoints_vis[registration.inliers].astype(np.float64)
    on_map = vis @ frame.matrix[:, :2].T + frame.matrix[:, 2]
    # GDAL and QGIS count from the image's corner, not from its first pixel's centre.
    pixels = registration.keypoints_ir[registration.inliers].astype(np.float64) + 0.5
    residuals = registration.residuals[registration.inliers]
    lines: list[str] = []
    if Path(path).suffix.lower() == ".points":
        if frame.epsg is not None:
            lines.append(f"#CRS: EPSG:{frame.epsg}")
        lines.append("mapX,mapY,sourceX,sourceY,enable,dX,dY,residual")
        for (x, y), (column, row), residual in zip(on_map, pixels, residuals, strict=True):
            lines.append(f"{_map(x)},{_map(y)},{column:.4f},{-row:.4f},1,0,0,{residual:.4f}")
    else:
        lines.append("# gdal_translate --optfile THIS_FILE ir.tif gcps.tif; gdalwarp gcps.tif warped.tif")
        if frame.epsg is not None:
            lines.append(f"-a_srs EPSG:{frame.epsg}")
        for (x, y), (column, row) in zip(on_map, pixels, strict=True):
            lines.append(f"-gcp {column:.4f} {row:.4f} {_map(x)} {_map(y)}")
    with atomic_output(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _map(value: float) -> str:
    return f"{value:.12g}"  # degrees to a micrometre, metres too


def _transform(registration: Registration) -> NDArray[np.float64]:
    if registration.transform is None:
        raise KGLMatchError("the registration failed: there is no transform to write")
    return registration.transform


# --- stacks ---------------------------------------------------------------------------------------

_STACK_TYPES = ("uint8", "uint16", "uint32", "int16", "int32", "float32", "float64")
_STRIP = 1 << 20  # bytes, before compression


def check_pages(pages: Sequence[NDArray[Any]], names: Sequence[str]) -> None:
    """Raises `ImageError` for a page that `save_stack` cannot write as it is."""
    for page, name in zip(pages, names, strict=True):
        if page.ndim not in (2, 3) or (page.ndim == 3 and page.shape[2] > 4):
            raise ImageError(f"{name} has shape {page.shape}; expected (H, W) or (H, W, C) up to 4 channels")
        if page.dtype.name not in (*_STACK_TYPES, "bool"):
            raise ImageError(f"{name} has type {page.dtype}; a stack holds {', '.join(_STACK_TYPES)}")


def save_stack(
    path: str | os.PathLike[str],
    pages: Sequence[NDArray[Any]],
    names: Sequence[str],
    *,
    map_tags: TiffFields | None = None,
    nodata: float | None = None,
) -> None:
    """Writes images as the pages of one TIFF, lossless (deflate), each of its own type.

    Args:
        path: .tif or .tiff.
        pages: (H, W) or (H, W, C), C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; bool becomes 0 and 255.
        names: of the pages, written as their PageName.
        map_tags: of `read_map_tags`, for pages that lie on the pixels of a GeoTIFF.
        nodata: value of pixels without data, told to GDAL.

    Raises:
        ImageError: a page of a type that is none of these.
        OutputError: another ending, more than 4 GiB, or a file that cannot be written.
    """
    # OpenCV names no pages, and Pillow holds no 16-bit colour.
    check_ending(path, STACK, "a stack")
    check_pages(pages, names)
    more = list(map_tags or ())
    if nodata is not None:
        more.append((_NODATA, _ASCII, f"{nodata:.17g}\0".encode()))
    with atomic_output(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        pointer = 4
        for number, (page, name) in enumerate(zip(pages, names, strict=True)):
            pixels = page.astype(np.uint8) * 255 if page.dtype == np.bool_ else page
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            pointer = _write_page(file, pointer, pixels, name, (number, len(pages)), more)
        if file.tell() >= 1 << 32:
            raise OutputError(f"cannot write {os.fspath(path)}: the stack is larger than a TIFF's 4 GiB")


def _write_page(
    file: BinaryIO,
    pointer: int,
    pixels: NDArray[Any],
    name: str,
    number: tuple[int, int],
    more: TiffFields,
) -> int:
    """Writes one page (H, W, C), links it at `pointer`; where the next page is to be linked."""
    height, width, channels = pixels.shape
    rows = max(1, _STRIP // max(1, width * channels * pixels.itemsize))
    predict = pixels.dtype.kind in "iu" and pixels.itemsize <= 2
    offsets: list[int] = []
    counts: list[int] = []
    for strip in _strips(pixels, rows, predict):
        offsets.append(file.tell())
        counts.append(file.write(strip))
        if file.tell() >= 1 << 32:
            raise OutputError(f"cannot write {name}: the stack is larger than a TIFF's 4 GiB")
    fields: TiffFields = [
        (254, _LONG, _longs(0 if number[1] == 1 else 2)),  # an image, or a page of several
        (256, _LONG, _longs(width)),
        (257, _LONG, _longs(height)),
        (258, _SHORT, _shorts(*[8 * pixels.itemsize] * channels)),
        (259, _SHORT, _shorts(8)),  # deflate
        (262, _SHORT, _shorts(2 if channels >= 3 else 1)),
        (273, _LONG, _longs(*offsets)),
        (277, _SHORT, _shorts(channels)),
        (278, _LONG, _longs(rows)),
        (279, _LONG, _longs(*counts)),
        (285, _ASCII, name.encode("utf-8", "replace") + b"\0"),
        (297, _SHORT, _shorts(*number)),
        (317, _SHORT, _shorts(2 if predict else 1)),
        *([(338, _SHORT, _shorts(2))] if channels in (2, 4) else []),  # alpha
        (339, _SHORT, _shorts(*[{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * channels)),
        *sorted(more),
    ]
    entries = b""
    for tag, kind, value in fields:
        count = len(value) // _BYTES[kind]
        if len(value) > 4:
            file.write(b"\0" * (file.tell() % 2))
            place = struct.pack("<I", file.tell())
            file.write(value)
        else:
            place = value.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, count) + place
    file.write(b"\0" * (file.tell() % 2))
    directory = file.tell()
    file.write(struct.pack("<H", len(fields)) + entries + _longs(0))
    end = file.tell()
    file.seek(pointer)
    file.write(_longs(directory))
    file.seek(end)
    return end - 4


def _strips(pixels: NDArray[Any], rows: int, predict: bool) -> Iterator[bytes]:
    for start in range(0, len(pixels), rows):
        strip = np.ascontiguousarray(pixels[start : start + rows])
        if predict:
            before = strip
            strip = strip.copy()
            strip[:, 1:] -= before[:, :-1]  # wraps around, as the format asks
        yield zlib.compress(strip.astype(strip.dtype.newbyteorder("<"), copy=False).tobytes())


def _shorts(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def _longs(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)
