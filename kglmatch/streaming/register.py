"""Registration of many image pairs: workers align the next ones by structure while the network is busy."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.images import load_masked
from kglmatch.options import DEFAULT_KIND, DEFAULT_MAX_ROTATION, DEFAULT_MAX_SCALE
from kglmatch.patch_matcher import PatchMatcher, check_image_size
from kglmatch.registration.align import Alignment, align
from kglmatch.registration.limits import Limits
from kglmatch.registration.masks import Masks, fill_pair
from kglmatch.registration.results import Registration
from kglmatch.registration.verdict import choose
from kglmatch.streaming.prefetch import Prefetch, Task
from kglmatch.streaming.results import Pair, PairRegistration, as_pairs
from kglmatch.streaming.tasks import pair_task, read_pair
from kglmatch.streaming.worker import Failure, call
from kglmatch.streaming.workers import Workers, processors


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A pair before the network judges it."""

    vis: NDArray[np.float32]
    ir: NDArray[np.float32]
    alternatives: list[Alignment]
    seconds: float
    masks: Masks | None = None


def register_many(
    matcher: PatchMatcher,
    pairs: Iterable[Any],
    *,
    workers: int | Workers | None = None,
    kind: str = DEFAULT_KIND,
    max_displacement: float | None = None,
    max_rotation: float = DEFAULT_MAX_ROTATION,
    max_scale: float = DEFAULT_MAX_SCALE,
    nodata: float | None = None,
) -> Iterator[PairRegistration]:
    """`Matcher.register_many`; `workers` may also be some that are kept from call to call."""
    limits = Limits(kind, max_displacement, max_rotation, max_scale)  # wrong ones end here
    if workers is None:
        workers = processors()  # structure takes longer than the network
    own = Workers(workers) if isinstance(workers, int) else None
    size = matcher.config.patch_size
    tasks = (pair_task(pair, nodata, _prepare, size, limits) for pair in as_pairs(pairs))
    return _register_many(matcher, tasks, own or workers, own, limits)  # type: ignore[arg-type]


def _register_many(
    matcher: PatchMatcher,
    tasks: Iterator[Task[Pair]],
    workers: Workers,
    own: Workers | None,
    limits: Limits,
) -> Iterator[PairRegistration]:
    prefetch = Prefetch(tasks, workers)
    try:
        while (item := prefetch.take()) is not None:
            pair, prepared = item
            if isinstance(prepared, Failure):
                yield PairRegistration(pair, error=prepared.message)
                continue
            began = time.perf_counter()
            found = call(_judge, matcher, prepared, limits)
            seconds = prepared.seconds + time.perf_counter() - began
            if isinstance(found, Failure):
                yield PairRegistration(pair, error=found.message, seconds=seconds)
            else:
                yield PairRegistration(pair, found, None, seconds)
    finally:
        if own is not None:
            own.close()
        prefetch.close()


def _prepare(vis: Any, ir: Any, nodata: float | None, patch_size: int, limits: Limits) -> _Prepared:
    """Runs in a worker."""
    began = time.perf_counter()
    greys, masks = _read(vis, ir, nodata, patch_size)
    alternatives = align(*greys, limits, masks=masks)
    return _Prepared(*greys, alternatives, time.perf_counter() - began, masks)


def _read(
    vis: Any, ir: Any, nodata: float | None, patch_size: int
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], Masks | None]:
    """Grey pixels, and of files the pixels with data, as `register` sees them; None where all have."""
    if nodata is None or not isinstance(vis, str) or not isinstance(ir, str):
        return read_pair(vis, ir, nodata, patch_size), None
    sides = [load_masked(image, nodata=nodata) for image in (vis, ir)]
    for (grey, _), name in zip(sides, (vis, ir), strict=True):
        check_image_size(grey, patch_size, name)
    return fill_pair(sides[0], sides[1])


def _judge(matcher: PatchMatcher, prepared: _Prepared, limits: Limits) -> Registration:
    return choose(matcher, prepared.vis, prepared.ir, prepared.alternatives, limits, masks=prepared.masks)
