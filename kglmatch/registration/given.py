"""Transforms and matches from files, for a verdict: what `save_yml`, `save_control_points` and `Matches.save`
write."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError
from kglmatch.features import Matches
from kglmatch.registration.files import CONTROL_POINTS, NO_MAP, YML, MapFrame

MATCHES = (".csv", ".npz")
ARRAYS = (".npy",)
_POINT_COLUMNS = ("x_vis", "y_vis", "x_ir", "y_ir")
_SIZES = ("vis_size", "ir_size")


@dataclass(frozen=True, eq=False)
class Given:
    """A transform or matches read from a file.

    Attributes:
        value: (3, 3) or (2, 3) from visible to ir pixels, or matches (N, 4).
        vis_size, ir_size: (width, height) of the images that it was found for, or None where the file does
            not say.
    """

    value: NDArray[np.float64]
    vis_size: tuple[int, int] | None = None
    ir_size: tuple[int, int] | None = None


def read_given(path: str | os.PathLike[str], frame: MapFrame = NO_MAP) -> Given:
    """Reads a transform or matches; the ending says which.

    ``.yml`` and ``.yaml`` hold the node "transform" (`save_yml`); ``.npy`` a (2, 3) or (3, 3) array; ``.csv``
    and ``.npz`` matches (`Matches.save`; of a table, the columns x_vis, y_vis, x_ir and y_ir are enough, or
    four columns without a header); ``.points``, ``.txt`` and ``.gcp`` ground control points
    (`save_control_points`).

    Args:
        frame: of the visible image, on whose map the control points are; see `read_map_frame`.

    Raises:
        DataError: another ending, a file that cannot be read, or that holds something else.
    """
    readers = {YML: _read_yml, MATCHES: _read_matches, ARRAYS: _read_array}
    ending = Path(path).suffix.lower()
    if not Path(path).is_file():
        raise DataError(f"cannot read {os.fspath(path)}: no such file")
    if ending in CONTROL_POINTS:
        return Given(_read_control_points(path, frame))
    for endings, read in readers.items():
        if ending in endings:
            return read(path)
    known = ", ".join((".json", *YML, *ARRAYS, *MATCHES, *CONTROL_POINTS))
    raise DataError(f"cannot read a transform from {os.fspath(path)}: the name must end in one of {known}")


def check_sizes(given: Given, name: str, vis_size: tuple[int, int], ir_size: tuple[int, int]) -> None:
    """Raises `DataError` where a file is about images of other sizes (width, height)."""
    for side, own, size in (("VIS", given.vis_size, vis_size), ("IR", given.ir_size, ir_size)):
        if own is not None and own != size:
            raise DataError(
                f"{name} is for a {side} of {own[0]} x {own[1]} pixels, but this one is {size[0]} x {size[1]}"
            )


def _read_yml(path: str | os.PathLike[str]) -> Given:
    name = os.fspath(path)
    try:
        storage = cv2.FileStorage(_text(path), cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
        transform = storage.getNode("transform").mat()
        sizes = [storage.getNode(size).mat() for size in _SIZES]
        storage.release()
    except (cv2.error, SystemError) as error:
        raise DataError(f"cannot read {name}: it is no yml of OpenCV") from error
    if transform is None:
        raise DataError(f"{name} holds no node transform")
    vis_size, ir_size = (
        (int(size.ravel()[0]), int(size.ravel()[1])) if size is not None and size.size == 2 else None
        for size in sizes
    )
    return Given(np.asarray(transform, np.float64), vis_size, ir_size)


def _read_array(path: str | os.PathLike[str]) -> Given:
    try:
        value = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {os.fspath(path)}: it is no .npy array") from error
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise DataError(f"{os.fspath(path)} holds no numbers")
    return Given(value.astype(np.float64))


def _read_matches(path: str | os.PathLike[str]) -> Given:
    if Path(path).suffix.lower() == ".npz":
        matches = Matches.load(Path(path))
        if matches.keypoints_vis is None or matches.keypoints_ir is None:
            raise DataError(f"{os.fspath(path)} holds matches without keypoints")
        return Given(np.concatenate([matches.keypoints_vis, matches.keypoints_ir], axis=1).astype(np.float64))
    return Given(_table(_rows(path), os.fspath(path)))


def _table(rows: list[list[str]], name: str) -> NDArray[np.float64]:
    """(N, 4) of a table with the columns of keypoints, or of four columns without a header."""
    if not rows:
        raise DataError(f"{name} is empty")
    header = [cell.strip() for cell in rows[0]]
    if set(_POINT_COLUMNS) <= set(header):
        places, rows = [header.index(column) for column in _POINT_COLUMNS], rows[1:]
    elif len(header) == 4 and all(map(_is_number, header)):
        places = [0, 1, 2, 3]
    else:
        raise DataError(
            f"{name} holds no matches: expected the columns {', '.join(_POINT_COLUMNS)}, or four columns of "
            "numbers"
        )
    return _numbers([[row[place] for place in places if place < len(row)] for row in rows], name)


def _read_control_points(path: str | os.PathLike[str], frame: MapFrame) -> NDArray[np.float64]:
    """Matches (N, 4): map coordinates become visible pixels by the frame."""
    name = os.fspath(path)
    lines = _text(path).splitlines()
    points = Path(path).suffix.lower() == ".points"
    table, epsg = _points_rows(lines, name) if points else _gcp_rows(lines)
    _check_map(name, epsg, frame)
    if not len(table):
        raise DataError(f"{name} holds no ground control points")
    values = _numbers(table, name)
    on_map = values[:, :2] - frame.matrix[:, 2]
    vis = on_map @ np.linalg.inv(frame.matrix[:, :2]).T
    # GDAL and QGIS count from the image's corner, not from its first pixel's centre.
    return np.concatenate([vis, values[:, 2:] - 0.5], axis=1)


def _points_rows(lines: list[str], name: str) -> tuple[list[list[Any]], str | None]:
    """Map x and y, column and row of each enabled point of a file of QGIS's Georeferencer; the EPSG code."""
    epsg = next((line.partition("EPSG:")[2].strip() for line in lines if line.startswith("#CRS")), None)
    rows = list(csv.reader(line for line in lines if line.strip() and not line.startswith("#")))
    if not rows or [cell.strip() for cell in rows[0][:2]] != ["mapX", "mapY"]:
        raise DataError(
            f"{name} is no file of QGIS's Georeferencer: its first line must name mapX, mapY, ..."
        )
    table: list[list[Any]] = []
    for row in rows[1:]:
        if len(row) > 4 and row[4].strip() == "0":
            continue
        x, y, column, line = _numbers([row[:4]], name)[0]
        table.append([x, y, column, -line])
    return table, epsg or None


def _gcp_rows(lines: list[str]) -> tuple[list[list[Any]], str | None]:
    """The same of options of gdal_translate: ``-gcp column row x y``."""
    parts = " ".join(line for line in lines if not line.lstrip().startswith("#")).split()
    table = []
    for place, part in enumerate(parts):
        if part == "-gcp":
            column_row, on_map = parts[place + 1 : place + 3], parts[place + 3 : place + 5]
            table.append([*on_map, *column_row])
    code = parts[parts.index("-a_srs") + 1 :][:1] if "-a_srs" in parts else []
    return table, code[0].removeprefix("EPSG:") if code else None


def _check_map(name: str, epsg: str | None, frame: MapFrame) -> None:
    own = None if frame.epsg is None else str(frame.epsg)
    if epsg != own:
        raise DataError(
            f"{name} is on {'no map' if epsg is None else f'EPSG:{epsg}'}, but VIS is on "
            f"{'no map' if own is None else f'EPSG:{own}'}"
        )


def _numbers(rows: list[list[Any]], name: str) -> NDArray[np.float64]:
    try:
        values = np.array(rows, np.float64).reshape(len(rows), 4)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: a row does not hold four numbers") from error
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds numbers that are not finite")
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(path: str | os.PathLike[str]) -> list[list[str]]:
    try:
        return [row for row in csv.reader(io.StringIO(_text(path)), strict=True) if row]
    except csv.Error as error:
        raise DataError(f"cannot read {os.fspath(path)}: it is no table") from error


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"cannot read {os.fspath(path)}: it is no text") from error
