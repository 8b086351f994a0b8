"""Registration of two rasters with the map as prior."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import ImageError, KGLMatchError
from kglmatch.geo.grid import Grid, bounds_within, name_of, pixels_between, project, text_of
from kglmatch.geo.raster import Image, Mask, Raster, gdal_settings
from kglmatch.geo.windows import TILE, Scene, judge_on_tiles, place_tiles, refine_on_tiles, steps
from kglmatch.geometry import resize_matrix, transform_points
from kglmatch.options import (
    DEFAULT_CHECK_DISPLACEMENT,
    DEFAULT_KIND,
    DEFAULT_MAP_ROTATION,
    DEFAULT_MAP_SCALE,
)
from kglmatch.patch_matcher import PatchMatcher, check_image_size
from kglmatch.progress import counter
from kglmatch.registration.align import Alignment, align, refine, same_place
from kglmatch.registration.corrected import correct_locally
from kglmatch.registration.displacement import DisplacementField
from kglmatch.registration.limits import Limits, within_limits
from kglmatch.registration.masks import Masks, fill
from kglmatch.registration.proposals import Proposer, propose
from kglmatch.registration.results import Registration, RegistrationCheck
from kglmatch.registration.verdict import check, choose, judge

Matrix = NDArray[np.float64]

WHOLE = 3072  # pixels: rasters up to this side are registered as a whole
_COARSE = 2048  # pixels, of the longer side of larger ones at first
_MOST = 8192  # pixels: rasters up to this side are matched
_CLEAR = 0.5  # support of the map's own place from which no other is looked for
_RADIUS = 10  # pixels at a width of 256 that the map may be wrong by where no other place is looked for
_LENGTH = re.compile(r"([0-9.]+(?:e[+-]?\d+)?)\s*(m|km|px)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class RasterRegistration:
    """Where the second raster's content is on the first one's grid.

    Attributes:
        registration: from pixels of the first raster to pixels of the second one as the map puts it on the
            first one's grid; without an error of the map, the identity.
        grid: the first raster's.
        ir_grid: the second raster's own.
        shift_metres: (2,) east and north, by how much the second raster's content must be moved on the
            ground at the middle of what both cover; NaN if failed.
    """

    registration: Registration
    grid: Grid
    ir_grid: Grid
    shift_metres: NDArray[np.float64]

    def to_ir_pixels(self, points: NDArray[np.floating]) -> Matrix:
        """Pixels (N, 2) of the second raster on the first one's grid, as those of its own file."""
        return pixels_between(self.grid, self.ir_grid, np.asarray(points, np.float64))

    def in_ir_pixels(self) -> Registration:
        """The registration in pixels of both files.

        Raises:
            KGLMatchError: the rasters have different reference systems: no homography is between them.
        """
        if self.grid.crs != self.ir_grid.crs:
            raise KGLMatchError(
                f"no homography is between the pixels of {name_of(self.grid.crs)} and those of "
                f"{name_of(self.ir_grid.crs)}"
            )
        to_own = np.linalg.inv(self.ir_grid.matrix) @ self.grid.matrix
        found = self.registration
        transform = None if found.transform is None else to_own @ found.transform
        return dataclasses.replace(
            found,
            transform=transform,
            keypoints_ir=self.to_ir_pixels(found.keypoints_ir).astype(np.float32),
            ir_size=grid_size(self.ir_grid),
        )

    def mapping(self) -> Matrix | Callable[[Matrix], Matrix]:
        """From pixels of the grid to where the second raster shows their content, in pixels of that grid.

        (3, 3), or a function of (N, 2) xy where there is a local correction.

        Raises:
            KGLMatchError: the registration failed.
        """
        if self.registration.transform is None:
            raise KGLMatchError("the registration failed: there is no transform")
        return mapping_of(self.registration.transform, self.registration.local)

    def check_on_grid(self, check: RegistrationCheck) -> RegistrationCheck:
        """A check of what `preview` gave, in pixels of the grid."""
        width, height = check.image_size
        scale = resize_matrix(self.grid.width / width, self.grid.height / height)
        return _scaled_check(check, scale, grid_size(self.grid))

    def map_shift(self) -> Matrix:
        """(2,) what to add to the map coordinates of the second raster, in its own reference system."""
        if self.registration.transform is None:
            raise KGLMatchError("the registration failed: there is no shift")
        middle = self._middle()
        here = transform_points(self.registration.transform, middle)
        both = transform_points(self.grid.matrix, np.vstack([middle, here]))
        right, shown = project(both, self.grid.crs, self.ir_grid.crs)
        return right - shown

    def _middle(self) -> Matrix:
        """(1, 2) pixels of the first raster's grid, of what was compared."""
        points = self.registration.keypoints_vis
        return np.asarray(
            points.mean(axis=0, keepdims=True)
            if len(points)
            else [[(self.grid.width - 1) / 2, (self.grid.height - 1) / 2]],
            np.float64,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, without the single places."""
        failed = self.registration.transform is None
        return {
            **self.registration.to_dict(),
            "crs": text_of(self.grid.crs),
            "geotransform": list(self.grid.affine)[:6],
            "shift_metres": None if failed else [round(float(v), 4) for v in self.shift_metres],
        }


def mapping_of(transform: Matrix, field: DisplacementField | None) -> Matrix | Callable[[Matrix], Matrix]:
    """A transform (3, 3) after a local correction, as `kglmatch.geo.write.save_on_grid` takes it."""
    if field is None:
        return transform
    return lambda points: transform_points(transform, points + field.at(points))


@dataclass(frozen=True, eq=False)
class RasterCheck:
    """How far the contents of two rasters are apart.

    Attributes:
        check: in pixels of the first raster.
        grid: the first raster's.
    """

    check: RegistrationCheck
    grid: Grid

    def preview(self, vis: Raster, side: int = _COARSE) -> tuple[Image, RegistrationCheck]:
        """The first raster, at most `side` pixels wide and high, and the check in its pixels."""
        small = _coarse(self.grid, max(1.0, max(grid_size(self.grid)) / side))
        scale = resize_matrix(small.width / self.grid.width, small.height / self.grid.height)
        return vis.on(small)[0], _scaled_check(self.check, scale, grid_size(small))


def parse_displacement(text: str | float) -> tuple[float, str]:
    """How far, and in what: "60m" -> (60.0, "m"), "0.5km" -> (500.0, "m"), 12 or "12px" -> (12.0, "px").

    Raises:
        KGLMatchError: no length of 0 or more.
    """
    found = _LENGTH.fullmatch(str(text).strip())
    try:
        value = float(found[1]) if found else float("nan")
    except ValueError:
        value = float("nan")
    if found is None or not 0 <= value < np.inf:
        raise KGLMatchError(f'max_displacement must be pixels or metres, such as 12 or "60m", got {text!r}')
    unit = (found[2] or "px").lower()
    return (value * 1000, "m") if unit == "km" else (value, unit)


def displacement_in_pixels(text: str | float | None, grid: Grid) -> float | None:
    """`parse_displacement` in pixels of a grid; None for any."""
    if text is None:
        return None
    value, unit = parse_displacement(text)
    return value / grid.metres_per_pixel() if unit == "m" else value


@contextmanager
def opened(
    vis: Any, ir: Any, vis_band: str | int | None, ir_band: str | int | None, nodata: float | None
) -> Iterator[tuple[Raster, Raster]]:
    """Both rasters, opened where they are names."""
    with gdal_settings(), ExitStack() as stack:
        rasters = [
            each if isinstance(each, Raster) else stack.enter_context(Raster(each, band, nodata))
            for each, band in ((vis, vis_band), (ir, ir_band))
        ]
        yield rasters[0], rasters[1]


def register_rasters(
    matcher: PatchMatcher,
    vis: Raster | str | os.PathLike[str],
    ir: Raster | str | os.PathLike[str],
    *,
    vis_band: str | int | None = None,
    ir_band: str | int | None = None,
    nodata: float | None = None,
    kind: str = DEFAULT_KIND,
    max_displacement: str | float | None = None,
    max_rotation: float = DEFAULT_MAP_ROTATION,
    max_scale: float = DEFAULT_MAP_SCALE,
    proposers: Sequence[Proposer] = (),
    progress: bool = False,
) -> RasterRegistration:
    """Finds where the second raster's content really is, beginning with where the map puts it.

    The second raster is seen on the first one's grid. Up to 3072 pixels a side, both are registered as a
    whole; larger ones at a lower resolution first, and then by at most 64 tiles of the full resolution,
    placed where there is structure, to which one transform is fitted. Pixels that are nodata, masked or
    transparent do not count.

    Args:
        matcher: a `Matcher`.
        vis, ir: the visible raster and the other sensor's: open, or names, as for `Raster`.
        vis_band, ir_band, nodata: as for `Raster`, where names are given.
        kind: "translation", "similarity", "affine", "homography", or "auto".
        max_displacement: pixels of the first raster, or a length such as "60m"; None for any.
        max_rotation: degrees, either way.
        max_scale: factor, either way.
        proposers: as for `Matcher.register`; they see the rasters as images on one grid.
        progress: draw a bar.

    Returns:
        `RasterRegistration`; its registration's verdict is "failed" where nothing was found that holds.

    Raises:
        ImageError: a raster that cannot be read, has no place on the map, or overlaps the other one too
            little.
        KGLMatchError: a parameter out of range.
    """
    with opened(vis, ir, vis_band, ir_band, nodata) as (first, second):
        scene, (left, top) = common_scene(first, second)
        most = displacement_in_pixels(max_displacement, scene.grid)
        limits = Limits(kind, most, max_rotation, max_scale)
        found = _register(matcher, scene, limits, proposers, progress)
        whole = first.grid
        found = _in_whole(found, whole, left, top)
        result = RasterRegistration(found, whole, scene.ir_grid, np.full(2, np.nan))
        return dataclasses.replace(result, shift_metres=_shift_metres(result))


def preview(
    vis: Raster, ir: Raster, found: RasterRegistration, side: int = _COARSE
) -> tuple[Image, Image, Registration]:
    """Both rasters on the first one's grid, at most `side` pixels wide and high, and what was found, for
    pictures.

    The second one is where the map puts it, before the registration.
    """
    (vis_image, _), (ir_image, _), small = preview_with_data(vis, ir, found, side)
    return vis_image, ir_image, small


def preview_with_data(
    vis: Raster, ir: Raster, found: RasterRegistration, side: int = _COARSE
) -> tuple[tuple[Image, Mask], tuple[Image, Mask], Registration]:
    """`preview`, each image with its pixels (H, W) that hold data."""
    grid = found.grid
    small = _coarse(grid, max(1.0, max(grid_size(grid)) / side))
    scale = resize_matrix(small.width / grid.width, small.height / grid.height)
    small_found = _scaled(found.registration, scale, grid_size(small))
    return vis.on(small), ir.on(small, found.ir_grid), small_found


def correct_rasters(
    matcher: PatchMatcher, vis: Raster, ir: Raster, found: RasterRegistration
) -> RasterRegistration:
    """The registration of two rasters with a local correction, measured on at most 2048 pixels a side.

    Args:
        matcher: scores the places.
        vis, ir: the rasters that were registered.
        found: their registration; one that failed stays as it is.
    """
    if found.registration.transform is None:
        return found
    (vis_image, vis_valid), (ir_image, ir_valid), small = preview_with_data(vis, ir, found)
    images = fill(vis_image, vis_valid), fill(ir_image, ir_valid)
    corrected = correct_locally(matcher, *images, small, Masks(vis_valid, ir_valid))
    width, height = corrected.vis_size
    scale = resize_matrix(found.grid.width / width, found.grid.height / height)
    whole = _scaled(corrected, scale, grid_size(found.grid))
    return dataclasses.replace(found, registration=whole)


def check_rasters(
    matcher: PatchMatcher,
    vis: Raster | str | os.PathLike[str],
    ir: Raster | str | os.PathLike[str],
    *,
    vis_band: str | int | None = None,
    ir_band: str | int | None = None,
    nodata: float | None = None,
    max_displacement: str | float = DEFAULT_CHECK_DISPLACEMENT,
) -> RasterCheck:
    """How far the contents of two rasters are apart that the map says are at one place.

    An overlap of more than 3072 pixels a side is looked at with 2048 pixels a side.

    Args:
        matcher, vis, ir, vis_band, ir_band, nodata, max_displacement: as for `register_rasters`.

    Returns:
        `RasterCheck`, in pixels of the first raster's grid.

    Raises:
        ImageError: as `register_rasters`.
        KGLMatchError: a displacement out of range.
    """
    with opened(vis, ir, vis_band, ir_band, nodata) as (first, second):
        scene, (left, top) = common_scene(first, second)
        most = displacement_in_pixels(max_displacement, scene.grid)
        factor = _factor(scene.grid)
        grid = _coarse(scene.grid, factor)
        images = scene.pair(grid, np.eye(3))
        _check_pair(scene, grid, images, matcher.config.patch_size)
        vis_image, valid_vis, ir_image, valid_ir = images
        found = check(
            matcher,
            fill(vis_image, valid_vis),
            fill(ir_image, valid_ir),
            max_displacement=most if most is not None else DEFAULT_CHECK_DISPLACEMENT,
            masks=Masks(valid_vis, valid_ir),
        )
        whole = first.grid
        to_part = resize_matrix(scene.grid.width / grid.width, scene.grid.height / grid.height)
        to_whole = _shifted(left, top) @ to_part
        return RasterCheck(_scaled_check(found, to_whole, grid_size(whole)), whole)


def pair_on_map(vis: Raster, ir: Raster) -> tuple[Image, Mask, Image, Mask]:
    """Two rasters on the first one's whole grid, each grey (H, W) with its valid pixels.

    Raises:
        ImageError: as `common_scene`, or more than 8192 pixels a side.
    """
    scene, _ = common_scene(vis, ir)
    grid = vis.grid
    if max(grid_size(grid)) > _MOST:
        raise ImageError(
            f"{vis.path} is {grid.width} x {grid.height}: expected up to {_MOST} pixels a side; cut out "
            "a part (gdal_translate -srcwin), or use register, which takes any size"
        )
    return (*vis.on(grid), *ir.on(grid, scene.ir_grid))


def common_scene(vis: Raster, ir: Raster) -> tuple[Scene, tuple[int, int]]:
    """Two rasters on the part of the first one's grid that both cover, and the place of its corner.

    Raises:
        ImageError: no common part, or no place on the map.
    """
    grid = vis.grid
    ir_grid = ir.grid.near(grid)
    bounds = bounds_within(ir_grid, grid)
    if bounds is None:
        raise ImageError(f"{vis.path} and {ir.path} do not overlap on the map")
    left, top = (max(0, int(np.floor(v))) for v in bounds[:2])
    right, bottom = (min(side, int(np.ceil(v))) for v, side in zip(bounds[2:], grid_size(grid), strict=True))
    if right <= left or bottom <= top:
        raise ImageError(f"{vis.path} and {ir.path} do not overlap on the map")
    part = grid.part(left, top, right - left, bottom - top)
    return Scene(vis, ir, part, ir_grid), (left, top)


def grid_size(grid: Grid) -> tuple[int, int]:
    """(width, height) in pixels."""
    return grid.width, grid.height


def _factor(grid: Grid) -> float:
    longest = max(grid.width, grid.height)
    return 1.0 if longest <= WHOLE else longest / _COARSE


def _coarse(grid: Grid, factor: float) -> Grid:
    """The grid with pixels about `factor` times as wide."""
    if factor == 1:
        return grid
    width, height = (max(1, round(side / factor)) for side in grid_size(grid))
    return grid.resized((width, height))


def _check_pair(scene: Scene, grid: Grid, images: tuple[Any, ...], patch_size: int) -> None:
    vis, valid_vis, _, valid_ir = images
    names = f"{scene.vis.path} and {scene.ir.path}"
    check_image_size(vis, patch_size, f"what {names} both cover")
    for raster, valid in ((scene.vis, valid_vis), (scene.ir, valid_ir)):
        if not valid.any():
            raise ImageError(f"{raster.path} has no pixel with data where {names} overlap")
    if not (valid_vis & valid_ir).any():
        raise ImageError(f"{names} have no pixels with data at the same place")


def _register(
    matcher: PatchMatcher, scene: Scene, limits: Limits, proposers: Sequence[Proposer], progress: bool
) -> Registration:
    """The registration in pixels of the scene's grid."""
    factor = _factor(scene.grid)
    grid = _coarse(scene.grid, factor)
    images = scene.pair(grid, np.eye(3))
    _check_pair(scene, grid, images, matcher.config.patch_size)
    vis, valid_vis, ir, valid_ir = images
    masks = Masks(valid_vis, valid_ir)
    most = limits.max_displacement
    coarse = dataclasses.replace(limits, max_displacement=None if most is None else most / factor)
    filled = fill(vis, valid_vis), fill(ir, valid_ir)
    found = _register_images(matcher, *filled, coarse, masks, proposers)
    if factor == 1:
        return found
    scale = resize_matrix(scene.grid.width / grid.width, scene.grid.height / grid.height)
    found = _scaled(found, scale, grid_size(scene.grid))
    if found.transform is None:
        return found
    tiles = place_tiles(vis, ir, valid_vis & valid_ir, factor, TILE)
    with counter("tiles", total=len(tiles) * len(steps(factor)), done=0, show=progress, unit="tile") as done:
        alignment = refine_on_tiles(scene, found.transform, tiles, factor, kind=str(found.kind), advance=done)
    if alignment is None:
        return found
    alignment = dataclasses.replace(alignment, support=max(alignment.support, found.support))
    fine = judge_on_tiles(matcher, scene, alignment)
    # The coarse registration's evidence is evidence for the refined one, which is about the same.
    if fine.verdict == "failed" or fine.confidence < found.confidence:
        fine = dataclasses.replace(
            fine,
            verdict=found.verdict,
            confidence=found.confidence,
            transform=alignment.transform,
            kind=alignment.kind,
        )
    return fine


def _register_images(
    matcher: PatchMatcher, vis: Any, ir: Any, limits: Limits, masks: Masks, proposers: Sequence[Proposer]
) -> Registration:
    """`registration.verdict.register` of images on one grid, beginning with no displacement at all."""
    most = limits.max_displacement
    radius = _RADIUS
    if most is not None:
        radius = int(np.clip(np.ceil(most * 256 / max(vis.shape)) + 2, 4, _RADIUS))
    near = refine(vis, ir, np.eye(3), kind=limits.kind, first_radius=radius, masks=masks)
    if near is not None and near.support >= _CLEAR and within_limits(near.transform, vis, ir, limits):
        found = judge(matcher, vis, ir, near, masks=masks)
        if found.verdict == "registered":
            return found
    # Of two that are the same, the one with more support: a narrow search may find it with less.
    found_all = align(vis, ir, limits, masks) + ([] if near is None else [near])
    alternatives: list[Alignment] = []
    for each in sorted(found_all, key=lambda each: -each.support):
        known = any(same_place(each.transform, other.transform, vis.shape) for other in alternatives)
        if not known and within_limits(each.transform, vis, ir, limits):
            alternatives.append(each)
    proposals, errors = propose(proposers, vis, ir)
    found = choose(matcher, vis, ir, alternatives, limits, proposals, masks)
    return dataclasses.replace(found, errors=errors) if errors else found


def _scaled(found: Registration, scale: Matrix, size: tuple[int, int]) -> Registration:
    """A registration in pixels of images that both are larger by a scale (3, 3)."""
    transform = found.transform
    if transform is not None:
        transform = scale @ transform @ np.linalg.inv(scale)
        transform = transform / transform[2, 2]
    return dataclasses.replace(
        found,
        transform=transform,
        keypoints_vis=transform_points(scale, found.keypoints_vis).astype(np.float32),
        keypoints_ir=transform_points(scale, found.keypoints_ir).astype(np.float32),
        residuals=(found.residuals * np.sqrt(np.linalg.det(scale[:2, :2]))).astype(np.float32),
        vis_size=size,
        ir_size=size,
    )


def _scaled_check(found: RegistrationCheck, scale: Matrix, size: tuple[int, int]) -> RegistrationCheck:
    """A check in pixels of an image that is larger by a scale (3, 3)."""
    factor = np.float32(np.sqrt(np.linalg.det(scale[:2, :2])))
    return dataclasses.replace(
        found,
        points=transform_points(scale, found.points).astype(np.float32),
        displacement=found.displacement * factor,
        shift=found.shift * factor,
        median_error=found.median_error * float(factor),
        p95_error=found.p95_error * float(factor),
        image_size=size,
    )


def _shifted(left: float, top: float) -> Matrix:
    return np.array([[1, 0, left], [0, 1, top], [0, 0, 1.0]])


def _in_whole(found: Registration, whole: Grid, left: int, top: int) -> Registration:
    """A registration of parts that begin at a pixel, as one of the whole."""
    return _scaled(found, _shifted(left, top), grid_size(whole))


def _shift_metres(result: RasterRegistration) -> NDArray[np.float64]:
    """East and north, on the ground."""
    if result.registration.transform is None:
        return np.full(2, np.nan)
    middle = result._middle()
    shown = transform_points(result.registration.transform, middle)
    here = result.grid.part(middle[0, 0], middle[0, 1], 1, 1)
    along = transform_points(result.grid.matrix, np.vstack([middle, shown]))
    moved = along[0] - along[1]
    # The map's units on the ground, from the size of a pixel there.
    unit = here.metres_per_pixel() / np.sqrt(abs(np.linalg.det(result.grid.matrix[:2, :2])))
    if result.grid.crs.is_geographic:
        aspect = np.cos(np.deg2rad(np.clip(along[0, 1], -89, 89)))
        return moved * [unit * np.sqrt(aspect), unit / np.sqrt(aspect)]
    return moved * unit
