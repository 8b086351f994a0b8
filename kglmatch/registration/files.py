"""`Registration` as files: JSON, OpenCV's yml, ground control points for GDAL and QGIS; stacks of bands."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from kglmatch.errors import ImageError, KGLMatchError, OutputError
from kglmatch.files import atomic_output
from kglmatch.registration.results import Registration

_ASCII, _SHORT, _DOUBLE = 2, 3, 12  # TIFF field types
# tag, type, number of values, values, on the first page only: `extratags` of tifffile.
TiffFields = list[tuple[int, int, int, Any, bool]]

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
    """Map coordinates of the pixels of an image.

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
_PAGE_NAME, _PAGE_NUMBER = 285, 297
_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1025, 2048, 3072  # GeoTIFF keys
_PIXEL_IS_POINT, _USER_DEFINED = 2, 32767
_KEY_SHORTS = 4  # in the head of the key directory, and in each of its entries

_log_lock = threading.Lock()


def read_map_frame(path: str | os.PathLike[str]) -> MapFrame:
    """The map frame of a GeoTIFF; `NO_MAP` for any other image file.

    Raises:
        ImageError: a file that cannot be read, or a damaged georeference.
    """
    tags = _map_tags(path)
    keys = tags.get(_KEYS, np.zeros(_KEY_SHORTS))[_KEY_SHORTS:].reshape(-1, _KEY_SHORTS)
    entries = {int(key): int(value) for key, place, _, value in keys if place == 0}
    if _MATRIX in tags:
        corner = tags[_MATRIX].reshape(4, 4)[:2][:, [0, 1, 3]]
    elif _SCALE in tags and len(tags.get(_TIES, ())) == 6:
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


def read_map_tags(path: str | os.PathLike[str]) -> TiffFields:
    """What places a GeoTIFF on its map, as fields for `save_stack`; none for any other image file.

    Raises:
        ImageError: a file that cannot be read, or a damaged georeference.
    """
    tags = _map_tags(path)
    if _KEYS not in tags:
        return []
    fields: TiffFields = []
    for tag in (_SCALE, _TIES, _MATRIX, _DOUBLES):
        if tag in tags:
            fields.append((tag, _DOUBLE, len(tags[tag]), tuple(map(float, tags[tag])), False))
    fields.append((_KEYS, _SHORT, len(tags[_KEYS]), tuple(map(int, tags[_KEYS])), False))
    if _TEXTS in tags:
        fields.append(_text_field(_TEXTS, tags[_TEXTS]))
    return fields


def _text_field(tag: int, text: str) -> tuple[int, int, int, Any, bool]:
    return tag, _ASCII, 0, text.encode("utf-8", "replace") + b"\0", False  # the count is of the bytes


def _map_tags(path: str | os.PathLike[str]) -> dict[int, Any]:
    """The GeoTIFF tags of a file, checked: numbers as arrays, text as it is; none of another image.

    Raises:
        ImageError: a file that cannot be read, or a damaged georeference.
    """
    tags: dict[int, Any] = {}
    for tag, value in _read_tags(path).items():
        if tag == _TEXTS:
            tags[tag] = value if isinstance(value, str) else bytes(value).decode("utf-8", "replace")
            continue
        try:
            tags[tag] = np.atleast_1d(np.array(value, np.int64 if tag == _KEYS else np.float64))
        except (TypeError, ValueError, OverflowError):
            raise _damaged(path, f"tag {tag} holds no numbers") from None
        if not np.isfinite(tags[tag]).all():
            raise _damaged(path, f"tag {tag} holds numbers that are not finite")
    if _KEYS in tags:
        keys = tags[_KEYS]
        # Its fourth number counts the entries; writers may leave more room.
        whole = _KEY_SHORTS * (1 + int(keys[3])) if len(keys) >= _KEY_SHORTS else _KEY_SHORTS
        if len(keys) < whole:
            raise _damaged(path, f"its key directory has {len(keys)} numbers, expected {whole}")
        tags[_KEYS] = keys[:whole]
    if _MATRIX in tags and len(tags[_MATRIX]) != 16:
        raise _damaged(path, f"its matrix has {len(tags[_MATRIX])} numbers, expected 16")
    if _SCALE in tags and (len(tags[_SCALE]) not in (2, 3) or not tags[_SCALE][:2].all()):
        raise _damaged(path, f"its pixel scale is {tags[_SCALE].tolist()}, expected 3 numbers")
    if _TIES in tags and len(tags[_TIES]) % 6:
        raise _damaged(path, f"its tie points have {len(tags[_TIES])} numbers, expected 6 for each point")
    return tags


def _damaged(path: str | os.PathLike[str], why: str) -> ImageError:
    return ImageError(
        f"cannot read the georeference of {os.fspath(path)}: {why}; repair it, or remove the GeoTIFF tags"
    )


def _read_tags(path: str | os.PathLike[str]) -> dict[int, Any]:
    """The GeoTIFF tags of a file as they are; none of another image. `ImageError` if it cannot be read."""
    wanted = (_SCALE, _TIES, _MATRIX, _KEYS, _DOUBLES, _TEXTS)
    if not Path(path).is_file():
        raise ImageError(f"cannot read {os.fspath(path)}: no such file")
    try:
        with _quiet_tifffile(), tifffile.TiffFile(path) as file:
            tags = file.pages[0].tags  # type: ignore[union-attr]  # the first page is never a mere frame
            return {tag: tags[tag].value for tag in wanted if tag in tags}
    except OSError as error:
        raise ImageError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    except Exception:
        # No TIFF, or one so damaged that tifffile gives up by whatever error; `read_image_raw` judges that.
        return {}


@contextmanager
def _quiet_tifffile() -> Iterator[None]:
    """Keeps tifffile from printing about damaged tags, which become an error here."""
    log = logging.getLogger("tifffile")
    with _log_lock:
        before, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = before


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
_CLASSIC_BYTES = (1 << 32) - (1 << 25)  # of pixels: a stack with more is written as BigTIFF


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

    A stack of nearly 4 GiB or more, before compression, becomes a BigTIFF.

    Args:
        path: .tif or .tiff.
        pages: (H, W) or (H, W, C), C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; bool becomes 0 and 255.
        names: of the pages, written as their PageName.
        map_tags: of `read_map_tags`, for pages that have the pixel grid of a GeoTIFF.
        nodata: value of pixels without data, reported to GDAL.

    Raises:
        ImageError: a page of a type that is none of these.
        OutputError: another ending, or a file that cannot be written.
    """
    # OpenCV names no pages, and Pillow holds no 16-bit colour.
    check_ending(path, STACK, "a stack")
    check_pages(pages, names)
    more = list(map_tags or ())
    if nodata is not None:
        more.append(_text_field(_NODATA, f"{nodata:.17g}"))
    big = sum(page.nbytes for page in pages) > _CLASSIC_BYTES
    with (
        atomic_output(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=big, byteorder="<") as file,
    ):
        for number, (page, name) in enumerate(zip(pages, names, strict=True)):
            pixels = page.astype(np.uint8) * 255 if page.dtype == np.bool_ else page
            channels = 1 if page.ndim == 2 else page.shape[2]
            fields = [_text_field(_PAGE_NAME, name), (_PAGE_NUMBER, _SHORT, 2, (number, len(pages)), False)]
            file.write(
                pixels[..., 0] if page.ndim == 3 and channels == 1 else pixels,
                photometric="rgb" if channels >= 3 else "minisblack",
                planarconfig="contig" if channels > 1 else None,
                extrasamples=["unassalpha"] if channels in (2, 4) else None,
                compression="zlib",
                # Differences of neighbours; of wider types they do not get smaller.
                predictor=pixels.dtype.kind in "iu" and pixels.itemsize <= 2,
                subfiletype=0 if len(pages) == 1 else 2,  # an image, or a page of several
                description=None,
                metadata=None,
                software=False,
                extratags=[*fields, *more],
            )
