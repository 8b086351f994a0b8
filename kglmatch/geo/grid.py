"""Pixel grids on the map, and the way from the pixels of one to those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as _project

from kglmatch.errors import DataError, ImageError
from kglmatch.geometry import resize_matrix, transform_points

Matrix = NDArray[np.float64]

# What rasterio raises about files and reference systems; some of GDAL's own errors come through as they are.
GDAL_ERRORS = (RasterioError, CRSError, CPLE_BaseError)

_WGS84 = CRS.from_epsg(4326)
_DEGREE = np.pi / 180
_SEMI_MAJOR, _FLATTENING = 6_378_137.0, 1 / 298.257223563  # of WGS 84, metres
_SAME = 1e-6  # pixels
_AROUND = 17  # points a side at which a grid is looked at


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the pixels of a raster are on the map.

    Attributes:
        crs: the coordinate reference system.
        matrix: (3, 3) affine from xy pixels (the first pixel's centre is 0, 0) to map x and y; north up,
            south up, rotated or sheared.
        width, height: pixels.
    """

    crs: CRS
    matrix: Matrix
    width: int
    height: int

    @classmethod
    def from_affine(cls, crs: CRS, affine: Affine, width: int, height: int) -> Grid:
        """The grid of a GDAL geotransform, which counts from the first pixel's corner."""
        corner = np.array(affine, np.float64).reshape(3, 3)
        return cls(crs, corner @ _shift(0.5, 0.5), width, height)

    @property
    def affine(self) -> Affine:
        """GDAL's geotransform."""
        return Affine(*(self.matrix @ _shift(-0.5, -0.5))[:2].ravel())

    def part(self, x: float, y: float, width: int, height: int, *, step: float = 1.0) -> Grid:
        """A grid within, or around, this one.

        Args:
            x, y: its upper left corner, in pixels of this grid counted from this grid's corner.
            width, height: its pixels.
            step: side of its pixels, in pixels of this grid.
        """
        matrix = self.matrix @ _shift(x, y) @ resize_matrix(step, step)
        return Grid(self.crs, matrix, width, height)

    def resized(self, size: tuple[int, int]) -> Grid:
        """The grid of a resized copy of the image, (width, height)."""
        scale = resize_matrix(self.width / size[0], self.height / size[1])
        return Grid(self.crs, self.matrix @ scale, *size)

    def moved(self, transform: Matrix) -> Grid:
        """The grid at whose pixels another image shows what this grid's pixels show.

        Args:
            transform: (3, 3) from pixels of this grid to pixels of the other image on this grid; of a
                homography, the affine nearest to it at the middle.
        """
        middle = np.array([(self.width - 1) / 2, (self.height - 1) / 2])
        return Grid(self.crs, self.matrix @ local_affine(transform, middle), self.width, self.height)

    def points(self, count: int = _AROUND) -> Matrix:
        """(count^2, 2) xy pixels spread over the grid, its edges included."""
        x, y = np.meshgrid(
            np.linspace(-0.5, self.width - 0.5, count), np.linspace(-0.5, self.height - 0.5, count)
        )
        return np.stack([x.ravel(), y.ravel()], axis=1)

    def metres_per_pixel(self) -> float:
        """Side of a pixel on the ground at the grid's middle; the map's own units where PROJ knows no more.

        In Web Mercator, a metre of the map is shorter than one on the ground.
        """
        middle = np.array([[(self.width - 1) / 2, (self.height - 1) / 2]])
        around = transform_points(self.matrix, middle + np.array([[0, 0], [0.5, 0], [0, 0.5]]))
        try:
            lon, lat = project(around, self.crs, _WGS84).T
        except ImageError:
            lon = lat = np.full(3, np.nan)
        if np.isfinite(lon).all() and np.isfinite(lat).all():
            squared_e = _FLATTENING * (2 - _FLATTENING)
            bent = 1 - squared_e * np.sin(lat[0] * _DEGREE) ** 2
            north = _SEMI_MAJOR * (1 - squared_e) / bent**1.5 * _DEGREE
            east = _SEMI_MAJOR / np.sqrt(bent) * np.cos(lat[0] * _DEGREE) * _DEGREE
            sides = np.stack([(lon[1:] - lon[0] + 180) % 360 - 180, lat[1:] - lat[0]], axis=1) * 2
            return float(np.sqrt(abs(np.linalg.det(sides * [east, north]))))
        side = float(np.sqrt(abs(np.linalg.det(self.matrix[:2, :2]))))
        try:
            return side * float(self.crs.linear_units_factor[1])
        except GDAL_ERRORS:
            return side

    def wrapped_crs(self) -> CRS:
        """The reference system, with longitudes around this grid's own where it crosses the antimeridian."""
        x = transform_points(self.matrix, self.points(2))[:, 0]
        if not self.crs.is_geographic or (x.min() >= -180 and x.max() <= 180):
            return self.crs
        return CRS.from_string(f"{self.crs.to_proj4()} +lon_wrap={x.mean():.6f} +type=crs")

    def near(self, other: Grid) -> Grid:
        """This grid with its longitudes counted on, by whole turns, to where the other one is.

        Rasters on either side of the antimeridian, or across it, may say -180.2 or 179.8 degrees.
        """
        if not self.crs.is_geographic:
            return self
        middle = np.array([[(other.width - 1) / 2, (other.height - 1) / 2]])
        there = project(transform_points(other.matrix, middle), other.crs, self.crs)[0, 0]
        own = np.array([[(self.width - 1) / 2, (self.height - 1) / 2]])
        here = transform_points(self.matrix, own)[0, 0]
        turns = np.round((there - here) / 360) if np.isfinite(there) else 0.0
        return Grid(self.crs, _shift(360 * turns, 0) @ self.matrix, self.width, self.height)


def local_affine(transform: Matrix, at: Matrix) -> Matrix:
    """(3, 3) affine that equals a transform (3, 3), and moves as it does, at a place (2,) xy pixels."""
    if not transform[2, :2].any():
        return transform / transform[2, 2]
    around = transform_points(transform, at + np.array([[0, 0], [0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]]))
    affine = np.eye(3)
    affine[:2, 0], affine[:2, 1] = around[1] - around[2], around[3] - around[4]
    affine[:2, 2] = around[0] - affine[:2, :2] @ at
    return affine


def project(points: Matrix, from_crs: CRS, to_crs: CRS) -> Matrix:
    """(N, 2) map coordinates in another coordinate reference system; infinite where it reaches no further.

    Raises:
        ImageError: one of the two is unknown to PROJ.
    """
    if from_crs == to_crs or not len(points):
        return points
    try:
        x, y = _project(from_crs, to_crs, points[:, 0], points[:, 1])
    except (*GDAL_ERRORS, ValueError) as error:
        raise ImageError(
            f"cannot transform coordinates from {name_of(from_crs)} to {name_of(to_crs)}: {one_line(error)}"
        ) from None
    return np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=1)


def pixels_between(here: Grid, there: Grid, points: Matrix) -> Matrix:
    """Pixels (N, 2) of one grid as pixels of another.

    Raises:
        ImageError: as `project`.
    """
    if here.crs == there.crs:
        return transform_points(np.linalg.inv(there.matrix) @ here.matrix, points)
    on_map = project(transform_points(here.matrix, points), here.crs, there.crs)
    if there.crs.is_geographic:
        middle = there.matrix[0] @ [(there.width - 1) / 2, (there.height - 1) / 2, 1]
        on_map[:, 0] += 360 * np.nan_to_num(np.round((middle - on_map[:, 0]) / 360), posinf=0, neginf=0)
    with np.errstate(invalid="ignore"):
        return transform_points(np.linalg.inv(there.matrix), on_map)


def bounds_within(here: Grid, there: Grid) -> tuple[float, float, float, float] | None:
    """What part of another grid one covers: left, top, right, bottom in the other's pixels from its corner.

    Not clipped to the other grid; None where the map projection maps nothing of it.
    """
    at = pixels_between(here, there, here.points()) + 0.5
    at = at[np.isfinite(at).all(axis=1)]
    if not len(at):
        return None
    (left, top), (right, bottom) = at.min(axis=0), at.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids have the same pixels."""
    if (a.width, a.height) != (b.width, b.height) or a.crs != b.crs:
        return False
    corners = a.points(2)
    apart = transform_points(np.linalg.inv(b.matrix) @ a.matrix, corners) - corners
    return bool(np.abs(apart).max() < _SAME * max(a.width, a.height))


def name_of(crs: CRS) -> str:
    """What to call a coordinate reference system in one line: "EPSG:32633", or its name."""
    try:
        code = crs.to_epsg()
    except GDAL_ERRORS:
        code = None
    if code is not None:
        return f"EPSG:{code}"
    text = crs.to_wkt() if crs else "no CRS"
    return text.split('"')[1] if text.count('"') > 1 else text


def grid_from_text(crs: str, geotransform: Sequence[float], size: tuple[int, int], *, name: str) -> Grid:
    """The grid of a reference system as `text_of` writes it, and six numbers as rasterio's `Affine`.

    Args:
        size: (width, height).
        name: of the file that it is from, for errors.

    Raises:
        DataError: a reference system that PROJ does not know.
    """
    try:
        known = CRS.from_user_input(crs)
    except GDAL_ERRORS as error:
        raise DataError(f"cannot read {name}: {one_line(error)}") from None
    return Grid.from_affine(known, Affine(*geotransform), *size)


def text_of(crs: CRS) -> str:
    """A coordinate reference system in a file: "EPSG:32633", or WKT where it has no such code."""
    name = name_of(crs)
    return name if name.startswith("EPSG:") else str(crs.to_wkt())


def one_line(error: BaseException) -> str:
    """The text of an error of GDAL's."""
    return " ".join(str(error).split()) or type(error).__name__


def _shift(x: float, y: float) -> Matrix:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])
