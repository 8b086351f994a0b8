"""Calibrating a multispectral rig: one transform a band, from all captures of a flight together.

A start is looked for in few captures, each on its own; what most captures vote for is taken. The windows of
all captures are then pooled, level by level, and one transform is fitted to them
(`kglmatch.batch.rig_pool`). In the end each capture is asked on its own how far it lies from that transform:
one that serves the flight leaves residuals that are small and follow nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.Image import DecompressionBombError

from kglmatch.batch.captures import (
    Capture,
    Moment,
    as_captures,
    band_names,
    choose_reference,
    natural_order,
    opened_header,
    read_moment,
)
from kglmatch.batch.rig_pool import Pairs, Pool, choose_kind, fit, gather, measure
from kglmatch.batch.rig_results import Residuals, Rig, RigBand, RigVerdict, Trend, common_size
from kglmatch.errors import DataError, ImageError, KGLMatchError
from kglmatch.geometry import fit_robustly, transform_points
from kglmatch.images import load_image, read_image_raw
from kglmatch.matcher import Matcher
from kglmatch.options import (
    DEFAULT_BAND_ROTATION,
    DEFAULT_BAND_SCALE,
    DEFAULT_KIND,
    DEFAULT_RIG_CAPTURES,
    DEFAULT_RIG_TOLERANCE,
    TRANSFORMS,
    TransformKind,
)
from kglmatch.registration.align import (
    FIRST_SIDE,
    LEAST_SUPPORT,
    Alignment,
    align,
    pyramid,
    same_place,
    steps_to,
)
from kglmatch.registration.from_matches import LEAST
from kglmatch.registration.limits import Limits
from kglmatch.registration.verdict import confidence, give_verdict, judge
from kglmatch.resampling import enlarge, resize_between, shrink

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

_SAMPLE = 24  # captures that judge a start
_TRIES = 8  # captures that propose one
_MIDDLE = 60  # captures of the levels between the first and the last
_ALTERNATIVES = 2  # starts that a capture proposes
_ENOUGH = 0.25  # of the sample: a start with which that share agrees is taken at once
_PLACED = 6  # captures that the network looks at
_MATCHED = 16  # captures whose keypoints are matched
_MATCH_SIDE, _MATCH_KEYPOINTS = 1024, 300
_MATCH_TOLERANCE = 0.008  # of the longer side, as for one pair
# One transform serves a flight if this share of the judged captures agrees with it, if no trend moves them by
# more than twice the tolerance, and if near and far things do not lie apart.
_SERVED = 0.75
_CONSISTENT = 0.6
_FEWEST_JUDGED = 0.05  # of the captures: with fewer, a band is doubtful
_LEAST_TREND = 8  # captures
_TREND_SHARE, _TREND_CHANCE = 0.3, 0.01
_PERMUTATIONS = 999


def calibrate_rig(
    matcher: Matcher,
    captures: str | os.PathLike[str] | Iterable[Capture | Mapping[str, Any]],
    *,
    reference: str | None = None,
    kind: str = DEFAULT_KIND,
    tolerance: float = DEFAULT_RIG_TOLERANCE,
    max_displacement: float | None = None,
    max_rotation: float = DEFAULT_BAND_ROTATION,
    max_scale: float = DEFAULT_BAND_SCALE,
    max_captures: int | None = DEFAULT_RIG_CAPTURES,
    workers: int | None = None,
) -> Rig:
    """Finds one transform a band from the captures of a flight, and says whether one serves it.

    Args:
        matcher: judges what was found, and matches keypoints where structure finds nothing.
        captures: a folder or list, as for `find_captures`; or captures, as for `as_captures`.
        reference: band that the others are registered to; None takes "1", else the first.
        kind: "translation", "similarity", "affine", "homography", or "auto": the simplest that no other
            clearly beats on captures that were held out of the fit.
        tolerance: pixels of a band within which a capture agrees.
        max_displacement, max_rotation, max_scale: limits of the search, as for `Matcher.register`.
        max_captures: captures to use, evenly spread over the flight; None for all.
        workers: threads that read and correlate; None for one a core.

    Returns:
        `Rig`. A band whose verdict is "varies" was found, but one transform does not serve this flight; a
        band that failed has no transform. Captures that cannot be read are named in `problems`.

    Raises:
        DataError: no captures of two bands, or no such reference.
        KGLMatchError: a parameter out of range.
    """
    limits = Limits(kind, max_displacement, max_rotation, max_scale)
    if not 0 < tolerance < np.inf:
        raise KGLMatchError(f"tolerance must be above 0 pixels, got {tolerance}")
    for name, count in (("max_captures", max_captures), ("workers", workers)):
        if count is not None and count < 1:
            raise KGLMatchError(f"{name} must be 1 or more, got {count}")
    listed = as_captures(captures)
    if max_captures is not None:
        listed = [listed[i] for i in spread(len(listed), max_captures)]
    bands = band_names(listed)
    if len(bands) < 2:
        raise DataError(f"a rig has two bands or more, got captures of {', '.join(bands) or 'none'}")
    reference = choose_reference(bands, reference)
    flight = Flight(listed, reference, workers or os.cpu_count() or 1, matcher.backend.progress)
    search = _Search(matcher, tolerance, limits)
    others = [band for band in bands if band != reference]
    found = {band: search.calibrate(band, flight.pairs(reference, band), flight) for band in others}
    found |= _through_others(search, flight, found)
    return Rig(
        reference=reference,
        size=flight.sizes[reference],
        bands=tuple(found[band] for band in sorted(found, key=natural_order)),
        tolerance=tolerance,
        model=matcher.source.name if matcher.source else "",
        num_captures=len(listed),
        problems=flight.problems,
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly spread."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []
    )


class Flight:
    """Captures, their sizes and moments, and what was wrong with them.

    Args:
        captures: in the order of the flight.
        reference: band that every pair starts from, and whose metadata counts.
        workers: threads.
        progress: draw progress bars.

    Raises:
        DataError: no image of the reference or of a band can be read.
    """

    def __init__(self, captures: Sequence[Capture], reference: str, workers: int, progress: bool) -> None:
        self.captures = captures
        self.workers, self.progress = workers, progress
        self.problems: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        with ThreadPoolExecutor(workers) as threads:
            # Taken over in the order of the captures, which decides between sizes that are as common.
            for capture, (sizes, problem) in zip(captures, threads.map(_read_sizes, captures), strict=True):
                self._sizes |= {(capture.name, band): size for band, size in sizes.items()}
                if problem is not None:
                    self.problems[capture.name] = problem
            self.moments = list(
                threads.map(lambda capture: read_moment(capture.bands.get(reference)), captures)
            )
        for band in band_names(captures):
            known = [size for (_, of), size in self._sizes.items() if of == band]
            if not known:
                raise DataError(f"no image of band {band} can be read: {next(iter(self.problems.values()))}")
            self.sizes[band] = common_size(known)

    def pairs(self, vis: str, ir: str) -> Pairs:
        """The captures that have both bands, in their usual sizes; the others are noted as problems."""
        chosen = []
        for capture in self.captures:
            lacking = [band for band in (vis, ir) if band not in capture.bands]
            sizes = [self._sizes.get((capture.name, band)) for band in (vis, ir)]
            if lacking:
                self.problems.setdefault(capture.name, f"has no band {', '.join(lacking)}")
            elif None not in sizes:
                odd = [
                    f"{_called(capture, band)} is {size[0]} x {size[1]}, where band {band} of the others is "
                    f"{self.sizes[band][0]} x {self.sizes[band][1]}"
                    for band, size in zip((vis, ir), sizes, strict=True)
                    if size is not None and size != self.sizes[band]
                ]
                if odd:
                    self.problems.setdefault(capture.name, odd[0])
                else:
                    chosen.append(capture)
        return Pairs(
            [capture.name for capture in chosen],
            [capture.bands[vis] for capture in chosen],
            [capture.bands[ir] for capture in chosen],
            self.sizes[vis],
            self.sizes[ir],
            self.workers,
            self.progress,
            self.problems,
        )

    def moments_of(self, names: Sequence[str]) -> list[Moment]:
        """When and from where the captures of these names were taken."""
        known = dict(zip((capture.name for capture in self.captures), self.moments, strict=True))
        return [known[name] for name in names]


def _read_sizes(capture: Capture) -> tuple[dict[str, tuple[int, int]], str | None]:
    """(width, height) of each band of a capture that can be read, and why the last other one cannot."""
    sizes, problem = {}, None
    for band, image in capture.bands.items():
        try:
            sizes[band] = image_size(image)
        except ImageError as error:
            problem = str(error)
    return sizes, problem


def _called(capture: Capture, band: str) -> str:
    """What messages call an image: its path, if it has one."""
    image = capture.bands[band]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"band {band}"


def image_size(image: Any) -> tuple[int, int]:
    """(width, height) of an image, from its header where that is enough. Raises `ImageError`."""
    if isinstance(image, (str, os.PathLike)):
        try:
            with opened_header(image) as opened:
                return opened.size
        except (OSError, ValueError, SyntaxError, DecompressionBombError):
            shape = read_image_raw(image).shape
    else:
        shape = load_image(image).shape
    return shape[1], shape[0]


# --- one band ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """A transform (3, 3) that is nearly right; the captures of the sample and the matches that agree."""

    transform: Matrix
    num_agreeing: int
    num_matches: int = 0


@dataclass(frozen=True)
class _Search:
    """Finds the transform between two bands; `limits` are those of the search."""

    matcher: Matcher
    tolerance: float
    limits: Limits

    def calibrate(self, name: str, pairs: Pairs, flight: Flight) -> RigBand:
        """The band of this name, which is the ir side of the pairs."""
        nothing = RigBand(
            name=name,
            size=pairs.ir_size,
            verdict="failed",
            confidence=confidence(0.0, 0.5),
            transform=None,
            kind=None,
            via=None,
            reason="no transform was found that the captures agree on",
            num_captures=len(pairs),
            num_judged=0,
            num_agreeing=0,
            spread=float("nan"),
            support=0.0,
            agreement=0.5,
            num_matches=0,
            consistent=float("nan"),
        )
        if not len(pairs):
            return replace(nothing, reason="no capture has this band and the reference")
        start = self._propose(pairs)
        if start is None:
            return nothing
        kind, transform, known = self._refine(pairs, start)
        residuals = measure(pairs, range(len(pairs)), transform, known)
        return self._conclude(nothing, pairs, flight, start, kind, transform, residuals)

    def _propose(self, pairs: Pairs) -> _Start | None:
        """The start that most captures of a sample agree with; None if nobody agrees with any."""
        sample = spread(len(pairs), _SAMPLE)
        wanted = max(min(2, len(sample)), int(np.ceil(_ENOUGH * len(sample))))
        starts: list[_Start] = []
        tried: list[Matrix] = []

        def best() -> _Start | None:
            return max(starts, key=lambda start: (start.num_agreeing, start.num_matches), default=None)

        def consider(transform: Matrix, num_matches: int = 0) -> None:
            if any(same_place(transform, other, pairs.vis_size[::-1]) for other in tried):
                return
            tried.append(transform)
            pool = gather(pairs, sample, transform, FIRST_SIDE, radius=10, across=9)
            if pool is not None:
                correction, given = fit(pool, steps_to(self.limits.kind), (2.0, 1.0))
                agreeing = sum(vote >= LEAST_SUPPORT for vote in pool.per_capture(given).values())
                if agreeing:
                    starts.append(_Start(pool.level.full(correction), agreeing, num_matches))
                    return
            if num_matches >= LEAST:
                starts.append(_Start(transform, 0, num_matches))

        for row in _from_everywhere(sample)[:_TRIES]:
            images = pairs.load(row)
            if images is None:
                continue
            for alignment in align(*images, self.limits)[:_ALTERNATIVES]:
                consider(alignment.transform)
            found = best()
            if found is not None and found.num_agreeing >= wanted:
                return found
        # Structure has little to say: the keypoints of many captures, matched and pooled.
        matched = self._match(pairs, spread(len(pairs), _MATCHED))
        if matched is not None:
            consider(*matched)
        return best()

    def _match(self, pairs: Pairs, rows: Sequence[int]) -> tuple[Matrix, int] | None:
        """The similarity that the matched keypoints of many captures agree on, and how many do.

        The captures are halved; matches are counted for what was fitted to the other half.
        """
        ratio = float(np.sqrt(np.prod(pairs.ir_size) / np.prod(pairs.vis_size)))
        side = max(pairs.vis_size) * ratio
        found = [
            (row, points)
            for row in rows
            if (images := pairs.load(row)) is not None
            and (points := _matched_points(self.matcher, *images, ratio)) is not None
        ]
        if not found:
            return None
        vis, ir = (np.concatenate([points[i] for _, points in found]) for i in (0, 1))
        owner = np.repeat(np.arange(len(found)), [len(points[0]) for _, points in found])
        half = owner % 2 == 0 if len(found) > 1 else np.arange(len(owner)) % 2 == 0
        count, tolerance = 0, _MATCH_TOLERANCE * side
        for part in (half, ~half):
            transform = _similarity(vis[part], ir[part], tolerance)
            if transform is not None:
                count += int((_apart(transform, vis[~part], ir[~part]) < tolerance).sum())
        whole = _similarity(vis, ir, tolerance)
        if whole is None or count < LEAST:
            return None
        return fit_robustly("similarity", vis, ir, whole, (tolerance, tolerance / 2)), count

    def _refine(
        self, pairs: Pairs, start: _Start
    ) -> tuple[TransformKind, Matrix, tuple[Pool, Matrix] | None]:
        """Fits one transform to the windows of all captures, from coarse to fine.

        Returns:
            its kind, the transform (3, 3), and what it came from, as `measure` takes it.
        """
        asked = self.limits.kind
        transform = start.transform
        kinds, correction = steps_to(asked), np.eye(3)
        kind = kinds[0] if asked == DEFAULT_KIND else cast(TransformKind, asked)
        if not start.num_agreeing:
            return kind, transform, None  # the matches alone speak for it
        everything = list(range(len(pairs)))
        sides = pyramid(max(pairs.vis_size))
        for side in sides[1:-1]:
            pool = gather(pairs, spread(len(pairs), _MIDDLE), transform, side, radius=8, across=12)
            if pool is not None:
                transform = pool.level.full(fit(pool, kinds, (1.0, 0.5))[0])
        pool = gather(pairs, everything, transform, sides[-1], radius=6, across=14)
        if pool is None:
            return kind, transform, None
        correction, _ = fit(pool, kinds, (1.0, 0.5))
        kind, correction = choose_kind(pool, asked, correction)
        return kind, pool.level.full(correction), (pool, correction)

    def _conclude(
        self,
        nothing: RigBand,
        pairs: Pairs,
        flight: Flight,
        start: _Start,
        kind: TransformKind,
        transform: Matrix,
        residuals: Residuals,
    ) -> RigBand:
        judged = np.flatnonzero(residuals.judged)
        support = float(residuals.support[judged].mean()) if len(judged) else 0.0
        agreed = self._agreement(pairs, transform, kind, residuals)
        agreeing = int(residuals.agreeing(self.tolerance).sum())
        trend = find_trend(residuals, flight.moments_of(residuals.captures))
        verdict: RigVerdict = give_verdict(support, agreed, start.num_matches)
        if verdict == "registered" and len(judged) < _FEWEST_JUDGED * len(pairs):
            verdict = "doubtful"
        reason = _why(verdict, len(judged), agreeing, len(pairs), residuals.spread, self.tolerance)
        against = objection(residuals, agreeing, trend, self.tolerance)
        if verdict == "registered" and against is not None:
            verdict, reason = "varies", f"one transform does not serve this flight: {against}"
        failed = verdict == "failed"
        return replace(
            nothing,
            verdict=verdict,
            confidence=confidence(support, agreed, start.num_matches),
            transform=None if failed else transform,
            kind=None if failed else kind,
            reason=reason,
            num_judged=len(judged),
            num_agreeing=agreeing,
            spread=residuals.spread,
            support=support,
            agreement=agreed,
            num_matches=start.num_matches,
            consistent=residuals.consistent,
            trend=trend,
            residuals=residuals,
        )

    def _agreement(self, pairs: Pairs, transform: Matrix, kind: TransformKind, residuals: Residuals) -> float:
        """What the network says of some captures, each at its own shift; 0.5 is chance."""
        judged = np.flatnonzero(residuals.judged)
        rows = judged if len(judged) else np.arange(len(pairs))
        said = []
        for row in rows[spread(len(rows), _PLACED)]:
            images = pairs.load(int(row))
            if images is None:
                continue
            moved = np.eye(3)
            if residuals.judged[row]:
                moved[:2, 2] = residuals.shifts[row]
            places = _grid(pairs.vis_size, self.matcher.config.patch_size)
            own = moved @ transform
            there = transform_points(own, places)
            none = np.zeros(len(places))
            found = judge(self.matcher, *images, Alignment(own, kind, places, there, none, none, 0.0))
            said.append(found.agreement)
        return float(np.mean(said)) if said else 0.5


def _from_everywhere(rows: Sequence[int]) -> list[int]:
    """The rows in an order of which every beginning is spread over all of them."""
    order = sorted(range(len(rows)), key=lambda i: int(f"{i:032b}"[::-1], 2))
    return [rows[i] for i in order]


def _grid(size: tuple[int, int], patch: int) -> Matrix:
    """(P, 2) places of patches that cover an image, about half a patch apart."""
    axes = [
        np.linspace(
            min(patch / 2, side / 2), max(side - patch / 2, side / 2), int(np.clip(side // patch * 2, 1, 9))
        )
        for side in size
    ]
    x, y = np.meshgrid(*axes)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _matched_points(matcher: Matcher, vis: Image, ir: Image, ratio: float) -> tuple[Matrix, Matrix] | None:
    """Matched keypoints (K, 2) of both images, of which a visible pixel is as wide as `ratio` ir pixels."""
    factor = min(1.0, _MATCH_SIDE / max(vis.shape), _MATCH_SIDE * ratio / max(ir.shape))
    small_vis, small_ir = shrink(vis, factor), enlarge(shrink(ir, factor / ratio), factor / ratio)
    if min(*small_vis.shape, *small_ir.shape) < matcher.config.patch_size:
        return None
    features_vis = matcher.extract(small_vis, "vis", max_keypoints=_MATCH_KEYPOINTS)
    features_ir = matcher.extract(small_ir, "ir", max_keypoints=_MATCH_KEYPOINTS)
    matches = matcher.match(features_vis, features_ir, top_k=1)
    if matches.keypoints_vis is None or matches.keypoints_ir is None or not len(matches):
        return None
    return (
        transform_points(np.linalg.inv(resize_between(vis, small_vis)), matches.keypoints_vis),
        transform_points(np.linalg.inv(resize_between(ir, small_ir)), matches.keypoints_ir),
    )


def _similarity(vis: Matrix, ir: Matrix, tolerance: float) -> Matrix | None:
    if len(vis) < 2:
        return None
    cv2.setRNGSeed(0)  # the same matches give the same transform
    affine, _ = cv2.estimateAffinePartial2D(
        vis, ir, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=20_000, confidence=0.9999
    )
    return None if affine is None or not np.isfinite(affine).all() else np.vstack([affine, [0, 0, 1]])


def _apart(transform: Matrix, vis: Matrix, ir: Matrix) -> Matrix:
    return np.linalg.norm(transform_points(transform, vis) - ir, axis=1)


# --- does one transform serve? --------------------------------------------------------------------


def find_trend(residuals: Residuals, moments: Sequence[Moment]) -> Trend | None:
    """What the displacements of the captures follow, if anything: the height, or the time.

    Parallax moves a band with one over the height above the ground, a loose mount with time (or with the
    order of the captures, where they carry no time). Chance is ruled out by permutations.

    Args:
        residuals: of N captures.
        moments: N.
    """
    judged = residuals.judged
    causes: list[tuple[Literal["height", "time"], Matrix]] = []
    heights = np.array([np.nan if m.height is None else m.height for m in moments])
    if all(m.above_ground for m in moments if m.height is not None):
        heights = np.where(heights > 0, 1 / np.maximum(heights, 1e-3), np.nan)
    causes.append(("height", heights))
    times = np.array([np.nan if m.time is None else m.time for m in moments])
    if not np.isfinite(times[judged]).all():
        times = np.arange(len(moments), dtype=float)
    causes.append(("time", times))
    trends = []
    for of, values in causes:
        known = judged & np.isfinite(values)
        if known.sum() < _LEAST_TREND or np.ptp(values[known]) == 0:
            continue
        trend = _trend(of, values[known], residuals.shifts[known])
        if trend is not None:
            trends.append(trend)
    return max(trends, key=lambda trend: trend.share, default=None)


def _trend(of: Literal["height", "time"], values: Matrix, shifts: Matrix) -> Trend | None:
    # By ranks where values are far from even, a few would decide alone.
    values = np.clip(values, *np.percentile(values, [2, 98]))
    if np.ptp(values) == 0:
        return None
    unit = (values - values.mean()) / (values.std() * np.sqrt(len(values)))
    middle = np.median(shifts, axis=0)
    away = shifts - middle
    # Single captures that went astray count no more than the farthest of the others.
    limit = np.percentile(np.abs(away), 95, axis=0)
    away = np.clip(away, -limit, limit)
    away = away - away.mean(axis=0)
    total = np.square(away).sum()
    if total == 0:
        return None
    share = float(np.square(unit @ away).sum() / total)
    rng = np.random.default_rng(0)
    chance = [np.square(unit[rng.permutation(len(unit))] @ away).sum() / total for _ in range(_PERMUTATIONS)]
    if share < _TREND_SHARE or np.mean(np.array(chance) >= share) > _TREND_CHANCE:
        return None
    return Trend(of, share, float(np.linalg.norm(unit @ away) * np.ptp(unit)))


def objection(residuals: Residuals, agreeing: int, trend: Trend | None, tolerance: float) -> str | None:
    """Why one transform does not serve the captures; None if it does."""
    judged = int(residuals.judged.sum())
    if trend is not None and trend.pixels > 2 * tolerance:
        cause = "the height (parallax)" if trend.of == "height" else "time (a mount that moves)"
        return f"the band moves by {trend.pixels:.1f} px with {cause}"
    if agreeing < _SERVED * judged:
        return (
            f"only {agreeing} of {judged} captures agree within {tolerance:g} px, {_spread(residuals.spread)}"
        )
    if residuals.consistent < _CONSISTENT:
        return (
            f"within the captures only {100 * residuals.consistent:.0f} % of the clear places agree "
            "(near and far things: parallax)"
        )
    return None


def _why(
    verdict: RigVerdict, judged: int, agreeing: int, captures: int, spread_px: float, tolerance: float
) -> str:
    if not judged:
        return f"none of {captures} captures can be judged by its structure"
    text = (
        f"{agreeing} of {judged} judged captures (of {captures}) agree within {tolerance:g} px, "
        f"{_spread(spread_px)}"
    )
    return f"too little speaks for it: {text}" if verdict == "failed" else text


def _spread(pixels: float) -> str:
    return f"spread {pixels:.2f} px"


# --- through other bands --------------------------------------------------------------------------


def _through_others(search: _Search, flight: Flight, found: dict[str, RigBand]) -> dict[str, RigBand]:
    """The bands that did not register directly, but do through one that did."""
    by_confidence = sorted(found, key=lambda band: -found[band].confidence)
    bridges = [band for band in by_confidence if found[band].verdict == "registered"]
    better = {}
    for name, band in found.items():
        if band.verdict not in ("failed", "doubtful"):
            continue
        for bridge in bridges:
            onward = search.calibrate(name, flight.pairs(bridge, name), flight)
            if onward.verdict in ("registered", "varies"):
                better[name] = _composed(found[bridge], onward)
                break
    return better


def _composed(first: RigBand, second: RigBand) -> RigBand:
    """The band that the second leads to, from the first's reference."""
    if first.transform is None or second.transform is None:
        raise KGLMatchError("a band that failed cannot lead to another")
    transform = second.transform @ first.transform
    return replace(
        second,
        transform=transform / transform[2, 2],
        kind=max(cast(TransformKind, first.kind), cast(TransformKind, second.kind), key=TRANSFORMS.index),
        via=first.name,
        confidence=min(first.confidence, second.confidence),
        support=min(first.support, second.support),
        agreement=min(first.agreement, second.agreement),
    )
