"""Which pixels of two images count: what has no data is never compared, nor seen as an edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.registration.structure import EDGE

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Masks:
    """The valid pixels of an image pair.

    Attributes:
        vis, ir: (H, W) bool, each of the size of its image.
    """

    vis: Mask
    ir: Mask


def fill(image: NDArray[Any], valid: Mask) -> NDArray[Any]:
    """An image (H, W) in which every pixel without data has the value of the nearest one with data."""
    if valid.all() or not valid.any():
        return image
    _, labels = cv2.distanceTransformWithLabels(
        (~valid).astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = np.zeros(int(labels.max()) + 1, image.dtype)
    values[labels[valid]] = image[valid]
    filled: NDArray[Any] = values[labels]
    return filled


def clear_of_edges(valid: Mask, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(h, w), 1 where an image's copy of another size shows its data alone, as far as its filters reach."""
    share = cv2.resize(valid.astype(np.float32), (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    size = 2 * EDGE + 1
    return cv2.erode((share > 0.99).astype(np.float32), np.ones((size, size), np.uint8), borderValue=0)


def fill_pair(
    vis: tuple[NDArray[np.float32], NDArray[np.bool_] | None],
    ir: tuple[NDArray[np.float32], NDArray[np.bool_] | None],
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], Masks | None]:
    """Two images as `load_masked` gives them -> both filled, and their masks; None where all is data."""
    (vis_grey, vis_valid), (ir_grey, ir_valid) = vis, ir
    if vis_valid is None and ir_valid is None:
        return (vis_grey, ir_grey), None
    masks = Masks(
        np.ones(vis_grey.shape, bool) if vis_valid is None else vis_valid,
        np.ones(ir_grey.shape, bool) if ir_valid is None else ir_valid,
    )
    return (fill(vis_grey, masks.vis), fill(ir_grey, masks.ir)), masks
