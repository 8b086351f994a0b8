"""Large rasters by windows: full resolution where there is structure, and one transform for all windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geo.grid import Grid
from kglmatch.geo.raster import Image, Mask, Raster
from kglmatch.geometry import resize_matrix, transform_points
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.registration.align import Alignment, Level, refine_levels
from kglmatch.registration.results import Registration
from kglmatch.registration.structure import EDGE, correlate_windows, structure_maps, without_edge
from kglmatch.registration.surfaces import standardise
from kglmatch.registration.verdict import judge_patches, spread

Matrix = NDArray[np.float64]
Advance = Callable[[int], object]

TILES = 64  # that are looked at, however large the rasters are
_ROWS = 4  # windows a side within a tile
_WINDOW, _RADIUS = 64, 8  # pixels, of a window and of its search
_RIM = _WINDOW // 2 + _RADIUS + EDGE
TILE = 2 * _RIM + _WINDOW * (_ROWS - 1)  # pixels a side
_COVERED = 0.7  # of a window, and of a tile
_WEAK = 0.05  # of the strongest structure: a tile with less is not worth reading
_LEAST_WINDOWS = 8
_STEP = 4.0  # a level's pixels are at most this much finer than those of the one before


@dataclass(frozen=True, eq=False)
class Scene:
    """Two rasters on one grid.

    Attributes:
        vis, ir: the rasters.
        grid: the pixels that both are seen on.
        ir_grid: the ir raster's own grid, counted on to the visible one's longitudes.
    """

    vis: Raster
    ir: Raster
    grid: Grid
    ir_grid: Grid

    def pair(self, grid: Grid, transform: Matrix) -> tuple[Image, Mask, Image, Mask]:
        """Both rasters on a grid, the ir one where a transform of that grid's pixels says; their masks."""
        vis, valid_vis = self.vis.on(grid)
        ir, valid_ir = self.ir.on(grid.moved(transform), self.ir_grid)
        return vis, valid_vis, ir, valid_ir


def steps(factor: float) -> list[float]:
    """Pixel sides of the levels in pixels of the grid, the last is 1.

    Args:
        factor: grid pixels that a pixel of the coarse registration is wide.
    """
    count = max(1, int(np.ceil(np.log(factor) / np.log(_STEP) - 1e-9)))
    return [float(factor ** (1 - (i + 1) / count)) for i in range(count)]


def place_tiles(
    vis: Image, ir: Image, valid: Mask, factor: float, tile: float, count: int = TILES
) -> NDArray[np.float64]:
    """Where both images show structure: the best place in each cell of a lattice over them.

    Args:
        vis, ir: (H, W) coarse images, aligned.
        valid: (H, W) where both show data.
        factor: full-resolution pixels that a coarse pixel is wide.
        tile: side of a tile, full-resolution pixels.
        count: tiles at most.

    Returns:
        (T, 2) xy centres in full-resolution pixels; tiles that hold too few pixels with data are left out.
    """
    strength = np.sqrt(_edges(vis) * _edges(ir)) * valid
    side = max(1, round(tile / factor))
    mean = cv2.blur(strength, (side, side), borderType=cv2.BORDER_CONSTANT)
    covered = cv2.blur(valid.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    mean[covered < _COVERED] = -1
    height, width = vis.shape
    across = np.sqrt(count * width / height)
    columns = int(np.clip(round(across), 1, count))
    rows = max(1, count // columns)
    centres, least = [], max(_WEAK * float(mean.max()), 0.0)
    for top, bottom in zip(*_cuts(height, rows), strict=True):
        for left, right in zip(*_cuts(width, columns), strict=True):
            cell = mean[top:bottom, left:right]
            y, x = np.unravel_index(int(cell.argmax()), cell.shape)
            if cell[y, x] > least:
                centres.append((left + x, top + y))
    at = np.array(centres, np.float64).reshape(-1, 2)
    return (at + 0.5) * factor - 0.5


def _edges(image: Image) -> Image:
    smooth = cv2.GaussianBlur(image, (0, 0), 1.0)
    return np.hypot(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1))


def _cuts(side: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ends = np.unique(np.linspace(0, side, count + 1).astype(np.int64))
    return ends[:-1], ends[1:]


def tile_level(
    scene: Scene, transform: Matrix, tiles: NDArray[np.float64], step: float, advance: Advance
) -> Level | None:
    """Correlation surfaces of windows in all tiles, as one level.

    Args:
        transform: (3, 3) from pixels of the grid to pixels of the ir raster on it.
        tiles: (T, 2) xy centres in grid pixels.
        step: side of the level's pixels in grid pixels.
        advance: is called with 1 after each tile.

    Returns:
        the level, or None if fewer than 8 windows are covered by both rasters.
    """
    to_level = resize_matrix(1 / step, 1 / step)
    predicted = transform @ np.linalg.inv(to_level)
    inner = np.arange(_ROWS) * _WINDOW + _RIM
    x, y = np.meshgrid(inner, inner)
    local = np.stack([x.ravel(), y.ravel()], axis=1)
    centres, surfaces = [], []
    for corner in np.rint(transform_points(to_level, tiles)).astype(int) - TILE // 2:
        to_grid = np.linalg.inv(to_level) @ np.array([[1, 0, corner[0]], [0, 1, corner[1]], [0, 0, 1.0]])
        left, top = (corner * step).tolist()
        grid = scene.grid.part(left, top, TILE, TILE, step=step)
        vis, valid_vis, ir, valid_ir = scene.pair(grid, np.linalg.inv(to_grid) @ transform @ to_grid)
        mask_vis, mask_ir = _clear(valid_vis), _clear(valid_ir)
        share = cv2.blur(mask_vis * mask_ir, (_WINDOW, _WINDOW))[local[:, 1], local[:, 0]]
        at = local[share > _COVERED]
        advance(1)
        if len(at):
            maps_vis, maps_ir = (structure_maps(image) for image in (vis, ir))
            maps_vis = without_edge(maps_vis) * mask_vis
            surfaces.append(correlate_windows(maps_vis, maps_ir * mask_ir, at, size=_WINDOW, radius=_RADIUS))
            centres.append(at + corner)
    if sum(map(len, centres)) < _LEAST_WINDOWS:
        return None
    return Level(
        np.concatenate(centres).astype(np.float64), standardise(np.concatenate(surfaces)), to_level, predicted
    )


def _clear(valid: Mask) -> NDArray[np.float32]:
    size = 2 * EDGE + 1
    return cv2.erode(valid.astype(np.float32), np.ones((size, size), np.uint8), borderValue=1)


def refine_on_tiles(
    scene: Scene, start: Matrix, tiles: NDArray[np.float64], factor: float, *, kind: str, advance: Advance
) -> Alignment | None:
    """`registration.align.refine` by tiles, to full resolution.

    Args:
        start: (3, 3) in pixels of the grid, right to a few pixels of the coarse registration.
        tiles: (T, 2) xy centres, of `place_tiles`.
        factor: grid pixels that a coarse pixel is wide.
    """
    sides = steps(factor)
    return refine_levels(
        start,
        len(sides),
        lambda depth, transform: tile_level(scene, transform, tiles, sides[depth], advance),
        kind=kind,
    )


def judge_on_tiles(matcher: PatchMatcher, scene: Scene, alignment: Alignment) -> Registration:
    """`registration.verdict.judge` on patches that are read one by one."""
    size = matcher.config.patch_size
    rows, patches_vis, patches_ir = [], [], []
    for row in spread(np.arange(len(alignment.points_vis))):
        left, top = np.rint(alignment.points_vis[row]).astype(int) - size // 2
        to_grid = np.array([[1, 0, left], [0, 1, top], [0, 0, 1.0]])
        grid = scene.grid.part(left, top, size, size)
        local = np.linalg.inv(to_grid) @ alignment.transform @ to_grid
        vis, valid_vis, ir, valid_ir = scene.pair(grid, local)
        if valid_vis.all() and valid_ir.all():
            rows.append(row)
            patches_vis.append(vis)
            patches_ir.append(ir)
    none = np.empty((0, size, size), np.float32)
    extent = scene.grid.width, scene.grid.height
    return judge_patches(
        matcher,
        alignment,
        np.array(rows, np.int64),
        np.stack(patches_vis) if rows else none,
        np.stack(patches_ir) if rows else none,
        extent,
        extent,
    )
