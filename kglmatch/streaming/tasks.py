"""Pairs as tasks for workers: what is sent, and how a worker reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.images import load_image
from kglmatch.patch_matcher import check_image_size
from kglmatch.streaming.prefetch import Task
from kglmatch.streaming.results import Pair
from kglmatch.streaming.worker import Failure, call


def pair_task(pair: Pair, nodata: float | None, function: Callable[..., Any], *options: Any) -> Task[Pair]:
    """A task that calls `function(vis, ir, nodata, *options)`, with paths or grey pixels (H, W).

    An image that is neither a path nor readable fails when the task's turn comes.
    """
    images = call(_portable, pair, nodata)
    if isinstance(images, Failure):
        return pair, _itself, (images,)
    return pair, function, (*images, nodata, *options)


def read_pair(
    vis: str | NDArray[np.float32], ir: str | NDArray[np.float32], nodata: float | None, patch_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Grey pixels (H, W) of what `pair_task` sends. Raises `ImageError` as `PatchMatcher.load` does."""
    greys = []
    for image, modality in ((vis, "vis"), (ir, "ir")):
        grey = load_image(image, nodata=nodata) if isinstance(image, str) else image
        check_image_size(grey, patch_size, image if isinstance(image, str) else f"the {modality} image")
        greys.append(grey)
    return greys[0], greys[1]


def _portable(pair: Pair, nodata: float | None) -> tuple[Any, Any]:
    """Paths are read by the worker. Whatever else an image may be, only its pixels travel."""

    def side(image: Any) -> Any:
        return str(image) if isinstance(image, str | Path) else load_image(image, nodata=nodata)

    return side(pair.vis), side(pair.ir)


def _itself(failure: Failure) -> Failure:
    return failure
