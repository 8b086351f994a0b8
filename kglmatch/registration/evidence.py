"""The evidence of a registration or a check as files: tie points, and the field of residuals."""

from __future__ import annotations

import csv
import os
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.files import atomic_output
from kglmatch.geometry import transform_points
from kglmatch.registration.files import NO_MAP, MapFrame, check_ending
from kglmatch.registration.results import Registration, RegistrationCheck

TIE_POINTS = (".csv", ".gpkg")
RESIDUAL_FIELD = (".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class TiePoints:
    """Places that two images have in common.

    Attributes:
        vis, ir: (N, 2) xy pixels of the visible and the ir image.
        displacement: (N, 2) ir pixels, where the ir content was found minus where the registration places it
            (for a check: where it should be); NaN where it could not be judged.
        confidence: (N,) in [0, 1].
        used: (N,) bool: of a registration, the places that support it; of a check, those that were judged.
    """

    vis: NDArray[np.float64]
    ir: NDArray[np.float64]
    displacement: NDArray[np.float64]
    confidence: NDArray[np.float64]
    used: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.vis)

    def columns(self, frame: MapFrame | None = None) -> dict[str, NDArray[Any]]:
        """Name -> (N,), with map coordinates of the visible places where a frame is given."""
        table = {
            "vis_x": self.vis[:, 0],
            "vis_y": self.vis[:, 1],
            "ir_x": self.ir[:, 0],
            "ir_y": self.ir[:, 1],
            "dx": self.displacement[:, 0],
            "dy": self.displacement[:, 1],
            "displacement": np.linalg.norm(self.displacement, axis=1),
            "confidence": self.confidence,
            "used": self.used.astype(np.int64),
        }
        if frame is not None:
            on_map = transform_points(frame.matrix, self.vis)
            table |= {"map_x": on_map[:, 0], "map_y": on_map[:, 1]}
        return table


def tie_points_of(found: Registration | RegistrationCheck) -> TiePoints:
    """The places of a registration, or the points of a check.

    The confidence of a registration's place is 1 without a residual and falls to 0.5 at 2 pixels; one that
    does not support the registration has 0. A local correction and a check bring certainties of their own.
    """
    if isinstance(found, RegistrationCheck):
        points, moved = found.points.astype(np.float64), found.displacement.astype(np.float64)
        moved = np.where(found.judged[:, None], moved, np.nan)
        certainty = found.certainty.astype(np.float64)
        return TiePoints(points, points + moved, moved, certainty, found.judged)
    vis, ir = found.keypoints_vis.astype(np.float64), found.keypoints_ir.astype(np.float64)
    if found.transform is None:
        return TiePoints(vis, ir, np.full(vis.shape, np.nan), np.zeros(len(vis)), np.zeros(len(vis), bool))
    field = found.local
    predicted = transform_points(found.transform, vis if field is None else vis + field.at(vis))
    moved = ir - predicted
    if found.correction is not None and field is not None:
        confidence = found.correction.certainty
    else:
        confidence = found.inliers / (1 + np.square(found.residuals.astype(np.float64) / 2))
    return TiePoints(vis, ir, moved, np.asarray(confidence, np.float64), found.inliers)


def save_tie_points(path: str | os.PathLike[str], points: TiePoints, frame: MapFrame | None = None) -> None:
    """Writes tie points as a table, one a row: `TiePoints.columns`.

    ``.gpkg`` is a GeoPackage with a layer ``tie_points`` whose geometry is the visible place on the map
    (without a map, its pixel with y negative, as GIS programs place an image without one); it needs the
    extra ``kglmatch[geo]``.

    Args:
        frame: of the visible image; None where it has no map.

    Raises:
        OutputError: another ending than .csv or .gpkg, or a file that cannot be written.
        KGLMatchError: .gpkg without pyogrio.
    """
    check_ending(path, TIE_POINTS, "tie points")
    table = points.columns(frame)
    if Path(path).suffix.lower() == ".gpkg":
        _save_geopackage(path, table, points, frame)
        return
    with atomic_output(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        for row in zip(*(_texts(name, values) for name, values in table.items()), strict=True):
            writer.writerow(row)


def _texts(name: str, values: NDArray[Any]) -> list[str]:
    if name == "used":
        return [str(int(value)) for value in values]
    form = "{:.12g}" if name.startswith("map_") else "{:.4f}"
    return [form.format(value) if np.isfinite(value) else "" for value in values]


def check_evidence(tie_points: Path | None, residual_field: Path | None) -> None:
    """Raises, before the work, what `save_tie_points` and `save_residual_field` would for these files."""
    if tie_points is not None:
        check_ending(tie_points, TIE_POINTS, "tie points")
        if tie_points.suffix.lower() == ".gpkg":
            _pyogrio()
    if residual_field is not None:
        check_ending(residual_field, RESIDUAL_FIELD, "a residual field")
        _rasterio()


def _pyogrio() -> types.ModuleType:
    try:
        import pyogrio.raw
    except ImportError as error:
        raise _missing("a GeoPackage", "pyogrio") from error
    module: types.ModuleType = pyogrio.raw
    return module


def _rasterio() -> types.ModuleType:
    try:
        import rasterio
    except ImportError as error:
        raise _missing("a residual field", "rasterio") from error
    module: types.ModuleType = rasterio
    return module


def _missing(what: str, package: str) -> KGLMatchError:
    return KGLMatchError(f'to write {what}, {package} is needed: pip install "kglmatch[geo]"')


def _save_geopackage(
    path: str | os.PathLike[str],
    table: dict[str, NDArray[Any]],
    points: TiePoints,
    frame: MapFrame | None,
) -> None:
    raw = _pyogrio()
    at = transform_points((frame or NO_MAP).matrix, points.vis)
    # Little-endian well-known binary: byte order, type 1 (point), x, y.
    record = np.zeros(len(at), np.dtype([("order", "u1"), ("type", "<u4"), ("xy", "<f8", (2,))]))
    record["order"], record["type"], record["xy"] = 1, 1, at
    geometry = np.array([row.tobytes() for row in record], object)
    names = list(table)
    with atomic_output(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'crs' was not provided")
        temporary.unlink()  # the driver creates the file; an empty one is not a GeoPackage
        raw.write(
            str(temporary),
            geometry,
            [np.ascontiguousarray(table[name]) for name in names],
            np.array(names, object),
            layer="tie_points",
            driver="GPKG",
            geometry_type="Point",
            crs=f"EPSG:{frame.epsg}" if frame is not None and frame.epsg is not None else None,
        )


def save_residual_field(
    path: str | os.PathLike[str], check: RegistrationCheck, frame: MapFrame | None = None
) -> None:
    """Writes the displacements of a check as a GeoTIFF of two float32 bands, in visible pixels.

    Bands "dx" and "dy" show where the ir content was found minus where it should be, to the right and
    downwards. A raster pixel is a point of the check's grid; NaN, the nodata value, where none was judged.

    Args:
        frame: of the visible image; None where it has no map.

    Raises:
        OutputError: another ending than .tif or .tiff, or a file that cannot be written.
        KGLMatchError: no rasterio, which the extra ``kglmatch[geo]`` brings.
    """
    check_ending(path, RESIDUAL_FIELD, "a residual field")
    rasterio = _rasterio()
    bands, to_image = _on_grid(check)
    matrix = (frame or NO_MAP).matrix @ to_image
    # From raster corners, not pixel centres.
    corner = matrix[:, 2] - matrix[:, :2] @ [0.5, 0.5]
    affine = rasterio.Affine(*matrix[0, :2], corner[0], *matrix[1, :2], corner[1])
    with atomic_output(path) as temporary:
        profile: dict[str, Any] = {
            "driver": "GTiff", "dtype": "float32", "count": 2, "nodata": float("nan"),
            "height": bands.shape[1], "width": bands.shape[2], "transform": affine, "compress": "deflate",
        }  # fmt: skip
        if frame is not None and frame.epsg is not None:
            profile["crs"] = f"EPSG:{frame.epsg}"
        with rasterio.open(temporary, "w", **profile) as file:
            file.write(bands)
            for number, name in enumerate(("dx", "dy"), 1):
                file.set_band_description(number, name)
                file.set_band_unit(number, "pixel")


def _on_grid(check: RegistrationCheck) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The displacements of a check as bands (2, rows, columns), and (3, 3) from raster to image pixels."""
    xs, ys = (np.unique(check.points[:, axis]) for axis in (0, 1))
    width, height = check.image_size
    if not len(xs):
        xs, ys = np.array([width / 2]), np.array([height / 2])
    bands = np.full((2, len(ys), len(xs)), np.nan, np.float32)
    rows = np.searchsorted(ys, check.points[check.judged, 1])
    columns = np.searchsorted(xs, check.points[check.judged, 0])
    bands[:, rows, columns] = check.displacement[check.judged].T
    to_image = np.eye(3)
    for axis, at, side in ((0, xs, width), (1, ys, height)):
        # The grid is regular but for rounding to whole pixels.
        to_image[axis, axis] = (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else side
        to_image[axis, 2] = at[0]
    return bands, to_image
