"""Matching of many image pairs: workers cut the patches of the next ones while the network is busy."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.dense import check_dense
from kglmatch.errors import KeypointError
from kglmatch.features import Features, Modality, is_whole
from kglmatch.options import (
    DEFAULT_MAX_KEYPOINTS,
    DEFAULT_MIN_SCORE,
    DEFAULT_THRESHOLD,
    DEFAULT_TOP_K,
    DETECTORS,
)
from kglmatch.patch_matcher import PatchMatcher, check_match_parameters, cut_patches
from kglmatch.streaming.prefetch import Prefetch, Task
from kglmatch.streaming.results import Pair, PairMatches, as_pairs
from kglmatch.streaming.tasks import pair_task, read_pair
from kglmatch.streaming.worker import Failure, call
from kglmatch.streaming.workers import Workers, processors

_MOST_WORKERS = 4  # the network is slower than they are
# Of the batch size: patches of one modality that are described together. The last batch is seldom full.
_BATCHES = 4


@dataclass(frozen=True, eq=False)
class _Side:
    """What is known of one image before the network sees it."""

    keypoints: NDArray[np.float32]
    patches: NDArray[np.float32]
    image_size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A pair before the network sees it; of the ir image the pixels where it is searched densely."""

    vis: _Side
    ir: _Side | NDArray[np.float32]
    seconds: float


def match_many(
    matcher: PatchMatcher,
    pairs: Iterable[Any],
    *,
    workers: int | Workers | None = None,
    detector: str | None = None,
    max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
    top_k: int | None = DEFAULT_TOP_K,
    mutual: bool = True,
    one_to_one: bool = True,
    min_score: float = DEFAULT_MIN_SCORE,
    max_displacement: float | None = None,
    decide: str | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    dense: bool = False,
    upright: bool = True,
    nodata: float | None = None,
) -> Iterator[PairMatches]:
    """`Matcher.match_many`; `workers` may also be some that are kept from call to call."""
    # A wrong parameter is reported here and not by every pair.
    maps = matcher.decision(decide) != "descriptor"
    check_match_parameters(top_k, min_score, max_displacement, threshold)
    if detector is not None and detector not in DETECTORS:
        raise KeypointError(f"unknown detector {detector!r}; known are {', '.join(DETECTORS)}")
    if not (is_whole(max_keypoints) and max_keypoints >= 1):
        raise KeypointError(f"max_keypoints must be an integer of at least 1, got {max_keypoints!r}")
    if dense:
        check_dense(max_displacement, upright)
    cut = {
        "patch_size": matcher.config.patch_size,
        "detector": matcher.detector(detector),
        "max_keypoints": max_keypoints,
        "upright": upright,
    }
    how = {
        "top_k": top_k,
        "mutual": mutual,
        "one_to_one": one_to_one,
        "min_score": min_score,
        "max_displacement": max_displacement,
        "decide": decide,
        "threshold": threshold,
        "dense": dense,
    }
    if workers is None:
        workers = min(processors(), _MOST_WORKERS)
    own = Workers(workers) if isinstance(workers, int) else None
    tasks = (pair_task(pair, nodata, _prepare, cut, dense) for pair in as_pairs(pairs))
    return _match_many(matcher, tasks, own or workers, own, maps, how)  # type: ignore[arg-type]


def _match_many(
    matcher: PatchMatcher,
    tasks: Iterator[Task[Pair]],
    workers: Workers,
    own: Workers | None,
    maps: bool,
    how: dict[str, Any],
) -> Iterator[PairMatches]:
    prefetch = Prefetch(tasks, workers)
    try:
        for group in _groups(prefetch, _BATCHES * matcher.backend.batch_size):
            yield from _answer(matcher, group, maps, how)
    finally:
        if own is not None:
            own.close()  # first, so that nothing waits for a task that nobody wants any more
        prefetch.close()


def _prepare(vis: Any, ir: Any, nodata: float | None, cut: dict[str, Any], dense: bool) -> _Prepared:
    """Runs in a worker."""
    began = time.perf_counter()
    grey_vis, grey_ir = read_pair(vis, ir, nodata, cut["patch_size"])

    def side(grey: NDArray[np.float32], modality: Modality) -> _Side:
        return _Side(*cut_patches(grey, modality, **cut), (grey.shape[1], grey.shape[0]))

    prepared_ir = grey_ir if dense else side(grey_ir, "ir")
    return _Prepared(side(grey_vis, "vis"), prepared_ir, time.perf_counter() - began)


def _groups(prefetch: Prefetch[Pair], patches: int) -> Iterator[list[tuple[Pair, Any]]]:
    """Pairs that are ready, together until there are enough patches for the network."""
    while (item := prefetch.take()) is not None:
        group, count = [item], _count(item[1])
        while count < patches and (item := prefetch.take(wait=False)) is not None:
            group.append(item)
            count += _count(item[1])
        yield group


def _count(prepared: Any) -> int:
    return len(prepared.vis.patches) if isinstance(prepared, _Prepared) else 0


def _answer(
    matcher: PatchMatcher, group: list[tuple[Pair, Any]], maps: bool, how: dict[str, Any]
) -> Iterator[PairMatches]:
    whole = [prepared for _, prepared in group if isinstance(prepared, _Prepared)]
    began = time.perf_counter()
    described = call(_describe, matcher, whole, maps)
    if isinstance(described, Failure) and len(group) > 1:
        # Too much at once, or one of them: each on its own.
        for item in group:
            yield from _answer(matcher, [item], maps, how)
        return
    total = sum(_patches(prepared) for prepared in whole)
    share = (time.perf_counter() - began) / max(total, 1)
    features = iter(described) if not isinstance(described, Failure) else iter([described])
    for pair, prepared in group:
        if isinstance(prepared, Failure):
            yield PairMatches(pair, error=prepared.message)
            continue
        sides = next(features)
        if isinstance(sides, Failure):
            yield PairMatches(pair, error=sides.message)
            continue
        began = time.perf_counter()
        found = call(_match, matcher, sides, how)
        seconds = prepared.seconds + share * _patches(prepared) + time.perf_counter() - began
        if isinstance(found, Failure):
            yield PairMatches(pair, error=found.message, seconds=seconds)
            continue
        matches, (keypoints_vis, keypoints_ir) = found
        yield PairMatches(pair, matches, None, keypoints_vis, keypoints_ir, seconds)


def _patches(prepared: _Prepared) -> int:
    return len(prepared.vis.patches) + (len(prepared.ir.patches) if isinstance(prepared.ir, _Side) else 0)


def _describe(
    matcher: PatchMatcher, group: list[_Prepared], maps: bool
) -> list[tuple[Features, Features | NDArray[np.float32]]]:
    """The features of several pairs, described together."""
    of_vis = _describe_sides(matcher, [prepared.vis for prepared in group], "vis", maps)
    sides = [prepared.ir for prepared in group if isinstance(prepared.ir, _Side)]
    of_ir = iter(_describe_sides(matcher, sides, "ir", maps))
    return [
        (vis, next(of_ir) if isinstance(prepared.ir, _Side) else prepared.ir)
        for vis, prepared in zip(of_vis, group, strict=True)
    ]


def _describe_sides(
    matcher: PatchMatcher, sides: list[_Side], modality: Modality, maps: bool
) -> list[Features]:
    if not sides:
        return []
    # One pair of many patches is not copied.
    patches = sides[0].patches if len(sides) == 1 else np.concatenate([side.patches for side in sides])
    keypoints = np.concatenate([side.keypoints for side in sides])
    features = matcher.describe(patches, modality, maps=maps, keypoints=keypoints)
    ends = np.cumsum([len(side.patches) for side in sides])
    return [
        dataclasses.replace(features[end - len(side.patches) : end], image_size=side.image_size)
        for side, end in zip(sides, ends.tolist(), strict=True)
    ]


def _match(
    matcher: PatchMatcher, sides: tuple[Features, Features | NDArray[np.float32]], how: dict[str, Any]
) -> Any:
    """Matches, and how many keypoints there were."""
    vis, ir = sides
    if not isinstance(ir, Features):
        vis, ir = matcher.extract_pair(
            vis, ir, dense=True, max_displacement=how["max_displacement"], maps=vis.maps is not None
        )
    matches = matcher.match_images(vis, ir, **{**how, "dense": False})
    return matches, (len(vis), len(ir))
