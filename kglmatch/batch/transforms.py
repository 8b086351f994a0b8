"""A transform that `register` or `rig calibrate` saved, applied to another image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.batch.rig_results import read_json, read_size, read_transform
from kglmatch.errors import DataError, ImageError
from kglmatch.geometry import resize_matrix
from kglmatch.registration.displacement import DisplacementField
from kglmatch.resampling import warp_image

_ASPECT = 0.01  # how far the proportions of an image may be off those of the registered one


@dataclass(frozen=True, eq=False)
class SavedTransform:
    """A transform between two images, and their sizes.

    Attributes:
        transform: (3, 3) from visible (or reference) pixels to those of the other image.
        vis_size, ir_size: (width, height) that it was found for.
        local: displacement of the visible pixels before the transform, or None.
        place: coordinate reference system and geotransform (6 numbers) of the visible raster, where two
            rasters on the map were registered: then both images are seen on its grid.
    """

    transform: NDArray[np.float64]
    vis_size: tuple[int, int]
    ir_size: tuple[int, int]
    local: DisplacementField | None = None
    place: tuple[str, tuple[float, ...]] | None = None


def read_saved_transform(
    path: str | os.PathLike[str], band: str | None = None, *, on_map: bool = False
) -> SavedTransform:
    """Reads a transform from what `kglmatch register --save` or `kglmatch rig calibrate` wrote.

    Args:
        path: the .json file.
        band: which one, where the file holds several.
        on_map: whether it may be of two rasters on the map.

    Raises:
        DataError: no such file or band, a registration that failed, or a file that holds no transform.
    """
    name = os.fspath(path)
    value = read_json(name)
    if not isinstance(value, dict):
        raise DataError(f"cannot read {name}: it holds no transform")
    if "geotransform" in value and not on_map:
        raise DataError(
            f"{name} is of two rasters on the map, in pixels of the first one's grid: kglmatch apply takes it"
        )
    reference = value.get("reference")
    if isinstance(value.get("bands"), list):
        value = _band(name, value["bands"], band)
    elif band is not None:
        raise DataError(f"{name} holds a single transform, and no band {band!r}")
    if value.get("transform", 0) is None:
        raise DataError(f"{name} holds no transform: its registration failed")
    try:
        vis_size = reference["size"] if isinstance(reference, dict) else value["vis_size"]
        ir_size = value["size"] if "size" in value else value["ir_size"]
        transform, vis, ir = read_transform(value["transform"]), read_size(vis_size), read_size(ir_size)
        return SavedTransform(transform, vis, ir, _local(value, vis), _place(value))
    except (KeyError, TypeError, DataError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"cannot read {name}: {what}") from error


def _place(value: dict[str, Any]) -> tuple[str, tuple[float, ...]] | None:
    """Reference system and geotransform of the first raster, where two of them were registered."""
    if "geotransform" not in value:
        return None
    numbers = value["geotransform"]
    if not isinstance(numbers, list) or [type(v) in (int, float) for v in numbers] != [True] * 6:
        raise DataError("its geotransform is not six numbers")
    return str(value["crs"]), tuple(float(v) for v in numbers)


def _local(value: dict[str, Any], vis_size: tuple[int, int]) -> DisplacementField | None:
    """The local correction of a registration, where it has one that is applied."""
    local = value.get("local")
    if not isinstance(local, dict) or local.get("field") is None:
        return None
    field = DisplacementField.from_dict(local["field"])
    if field.size != vis_size:
        raise DataError(f"its local correction is of {field.size} pixels, the visible image of {vis_size}")
    return field


def _band(name: str, bands: list[Any], wanted: str | None) -> dict[str, Any]:
    known = {str(band.get("band")): band for band in bands if isinstance(band, dict)}
    if wanted is None and len(known) == 1:
        return next(iter(known.values()))
    if wanted not in known:
        what = "name the band to apply" if wanted is None else f"there is no band {wanted!r}"
        raise DataError(f"{name} holds bands {', '.join(known) or '(none)'}: {what}")
    return known[wanted]


def apply_transform(
    saved: SavedTransform,
    image: NDArray[Any],
    *,
    size: tuple[int, int] | None = None,
    nodata: float = 0,
    name: str = "the image",
) -> NDArray[Any]:
    """Warps an image onto the visible one by a saved transform, with its local correction; the type is kept.

    Args:
        saved: the transform.
        image: (H, W) or (H, W, C), of the size that was registered, or that in another resolution.
        size: (width, height) of the output, which shows what the visible image shows; None for the visible
            image's size times the resolution of the image.
        nodata: value of pixels that the image does not cover.
        name: of the image, for errors.

    Returns:
        (height, width) or (height, width, C).

    Raises:
        ImageError: an image of other proportions, which is of another camera.
    """
    across, down = image.shape[1] / saved.ir_size[0], image.shape[0] / saved.ir_size[1]
    # Each side of a smaller copy may have been rounded by half a pixel.
    slack = _ASPECT + 0.5 / min(image.shape[0], image.shape[1])
    if abs(np.log(across / down)) > slack:
        raise ImageError(
            f"{name} is {image.shape[1]} x {image.shape[0]}, which has not the proportions of the registered "
            f"{saved.ir_size[0]} x {saved.ir_size[1]}: it is of another camera, or cut"
        )
    if size is None:
        width, height = saved.vis_size
        size = max(1, round(width * across)), max(1, round(height * down))
    to_vis = np.linalg.inv(resize_matrix(size[0] / saved.vis_size[0], size[1] / saved.vis_size[1]))
    transform = resize_matrix(across, down) @ saved.transform @ to_vis
    displacement = None if saved.local is None else saved.local.resized(size).on_grid
    return warp_image(image, transform, size, nodata=nodata, displacement=displacement)
