"""How well a model registers whole images, alongside baselines on the same data.

`evaluate_registration` measures `Matcher.register`, `evaluate_homography` the homographies of
`Matcher.match_images`; both give a `RegistrationReport`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.datasets import ImagePair, PatchSource, PatchSources, find_patch_sources
from kglmatch.errors import DataError, KGLMatchError
from kglmatch.evaluation.baselines import check_baselines, register_images
from kglmatch.evaluation.excluded import excluded_of
from kglmatch.evaluation.tables import aligned
from kglmatch.geometry import corner_error
from kglmatch.images import load_image
from kglmatch.matcher import Matcher
from kglmatch.options import DEFAULT_REGISTRATION_BASELINES, REGISTRATION_BASELINES
from kglmatch.progress import steps

OURS = "kglmatch"
PIXELS = (1, 3, 5, 10)
VERDICTS = ("registered", "doubtful", "failed")


@dataclass(frozen=True)
class Estimate:
    """What one method found on one image pair.

    Attributes:
        transform: (3, 3) from visible to ir pixels, or None.
        places: where agreement was looked for: matches, or the windows of `Matcher.register`.
        inliers: the places that agree with the transform.
        verdict: of `Matcher.register`; None where the method has none.
    """

    transform: NDArray[np.float64] | None
    places: int
    inliers: int
    verdict: str | None = None


Method = Callable[[NDArray[np.float32], NDArray[np.float32]], Estimate]


@dataclass(frozen=True)
class PairRegistration:
    """One image pair registered by one method.

    Attributes:
        subset, pair: where the images are from.
        method: "kglmatch" or a baseline's name.
        error: mean distance in pixels of the visible image's corners from where the known affine
            takes them; None if no transform was found.
        places, inliers, verdict: as in `Estimate`.
        seconds: from grey images in memory to the transform.
        excluded: whether the pair is left out in the second set of figures.
    """

    subset: str
    pair: str
    method: str
    error: float | None
    places: int
    inliers: int
    verdict: str | None
    seconds: float
    excluded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **dataclasses.asdict(self),
            "error": None if self.error is None else round(self.error, 3),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class RegistrationReport:
    """What `evaluate_registration` or `evaluate_homography` found.

    Attributes:
        kind: "registration" or "homography".
        results: one entry an image pair and method.
        seconds: that the whole took.
    """

    kind: str
    results: tuple[PairRegistration, ...]
    seconds: float

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order in which they were measured."""
        return tuple(dict.fromkeys(r.method for r in self.results))

    @property
    def subsets(self) -> tuple[str, ...]:
        """In the order of their first pair."""
        return tuple(dict.fromkeys(r.subset for r in self.results))

    @property
    def pairs(self) -> int:
        """Number of image pairs."""
        return len({(r.subset, r.pair) for r in self.results})

    def without_excluded(self) -> RegistrationReport:
        """The report of the image pairs that are not excluded."""
        return dataclasses.replace(self, results=tuple(r for r in self.results if not r.excluded))

    def errors(self, method: str, subset: str | None = None) -> NDArray[np.float64]:
        """Corner errors (N,) in pixels; infinite where no transform was found."""
        return np.array(
            [
                np.inf if r.error is None else r.error
                for r in self.results
                if r.method == method and subset in (None, r.subset)
            ]
        )

    def share(self, method: str, pixels: float, subset: str | None = None) -> float:
        """Share in [0, 1] of pairs whose corner error is at most this large."""
        return float((self.errors(method, subset) <= pixels).mean())

    def verdicts(self) -> dict[str, int]:
        """How many pairs were given each verdict; empty where the methods have none."""
        given = [r.verdict for r in self.results if r.verdict is not None]
        return {verdict: given.count(verdict) for verdict in VERDICTS} if given else {}

    def wrong(self) -> int:
        """Number of pairs called registered whose error is above the largest of `PIXELS`."""
        return sum(
            r.verdict == "registered" and (r.error is None or r.error > PIXELS[-1]) for r in self.results
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kept = self.without_excluded()
        return {
            "kind": self.kind,
            "seconds": round(self.seconds, 1),
            **self._figures(),
            **({"without_excluded": kept._figures()} if 0 < kept.pairs < self.pairs else {}),
            "results": [r.to_dict() for r in self.results],
        }

    def _figures(self) -> dict[str, Any]:
        verdicts = self.verdicts()
        return {
            "pairs": self.pairs,
            **({"verdicts": verdicts, "registered_wrongly": self.wrong()} if verdicts else {}),
            "methods": {method: self._summary(method) for method in self.methods},
            "subsets": {
                subset: {method: self._shares(method, subset) for method in self.methods}
                for subset in self.subsets
            },
        }

    def _shares(self, method: str, subset: str | None = None) -> dict[str, float]:
        return {f"within_{px}_px_percent": round(100 * self.share(method, px, subset), 1) for px in PIXELS}

    def _summary(self, method: str) -> dict[str, float | None]:
        median = float(np.median(self.errors(method)))
        return {
            **self._shares(method),
            "median_error": round(median, 3) if np.isfinite(median) else None,
            "seconds_a_pair": round(float(self._seconds(method).mean()), 3),
        }

    def _seconds(self, method: str) -> NDArray[np.float64]:
        return np.array([r.seconds for r in self.results if r.method == method])

    def table(self) -> str:
        """Shares within 1, 3, 5 and 10 pixels as lines of text: of all pairs, then of each subset."""
        kept = self.without_excluded()
        parts = [self._table("")]
        if 0 < kept.pairs < self.pairs:
            parts.append(kept._table(", without excluded images"))
        return "\n\n".join(parts)

    def _table(self, which: str) -> str:
        rows = [
            [
                f"registered, % of {self.pairs} pairs{which}",
                *(f"<= {px} px" for px in PIXELS),
                "median px",
                "s a pair",
            ]
        ]
        for method in self.methods:
            median = float(np.median(self.errors(method)))
            rows.append(
                [
                    method,
                    *(f"{100 * self.share(method, px):.1f}" for px in PIXELS),
                    f"{median:.2f}" if np.isfinite(median) else "none",
                    f"{self._seconds(method).mean():.2f}",
                ]
            )
        by_subset = [[f"subset, % within {' / '.join(map(str, PIXELS))} px", *self.methods]]
        for subset in self.subsets:
            shares = (
                " / ".join(f"{100 * self.share(method, px, subset):.0f}" for px in PIXELS)
                for method in self.methods
            )
            by_subset.append([subset, *shares])
        parts = [aligned(rows, rules=(1,)), aligned(by_subset, rules=(1,))]
        if verdicts := self.verdicts():
            counts = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items())
            parts.append(
                f"verdicts: {counts}; registered with an error above {PIXELS[-1]} px: {self.wrong()}"
            )
        return "\n\n".join(parts)


def evaluate_registration(
    matcher: Matcher,
    source: PatchSources,
    *,
    limit: int | None = None,
    baselines: Sequence[str] = DEFAULT_REGISTRATION_BASELINES,
    exclude: Iterable[str] = (),
    progress: bool = False,
    **options: Any,
) -> RegistrationReport:
    """Measures `Matcher.register` on image pairs, alongside baselines in the same run.

    The transform from visible to ir pixels is compared with the pair's affine (with the identity where
    the pair has none) over the corners of the visible image.

    Args:
        matcher: holds the model.
        source: one or several folders of image pairs, or of such folders.
        limit: number of pairs in all: the first of each subset, then the second of each, and so on.
        baselines: of `kglmatch.options.REGISTRATION_BASELINES`.
        exclude: image pairs ("subset/pair") without which the figures are given too.
        progress: draw a bar on stderr, if that is a terminal.
        options: of `Matcher.register`, in place of its defaults.

    Raises:
        DataError, ImageError: data that cannot be read, or an excluded pair that is not there.
        KGLMatchError: an unknown baseline, or one that is not installed; a limit below 1.
    """

    def register(vis: NDArray[np.float32], ir: NDArray[np.float32]) -> Estimate:
        found = matcher.register(vis, ir, **options)
        places, inliers = len(found.keypoints_vis), int(found.inliers.sum())
        return Estimate(found.transform, places, inliers, found.verdict)

    return _evaluate("registration", register, source, limit, baselines, exclude, progress)


def evaluate_homography(
    matcher: Matcher,
    source: PatchSources,
    *,
    limit: int | None = None,
    baselines: Sequence[str] = DEFAULT_REGISTRATION_BASELINES,
    exclude: Iterable[str] = (),
    progress: bool = False,
    **options: Any,
) -> RegistrationReport:
    """Measures the homographies of `Matcher.match_images`, as `evaluate_registration` does `register`.

    Args:
        matcher, source, limit, baselines, exclude, progress: as for `evaluate_registration`.
        options: of `Matcher.match_images`, in place of its defaults.

    Raises:
        DataError, ImageError, KGLMatchError: as for `evaluate_registration`.
    """

    def match(vis: NDArray[np.float32], ir: NDArray[np.float32]) -> Estimate:
        found = matcher.match_images(vis, ir, **options)
        return Estimate(
            found.homography, len(found), 0 if found.inliers is None else int(found.inliers.sum())
        )

    return _evaluate("homography", match, source, limit, baselines, exclude, progress)


def _evaluate(
    kind: str,
    ours: Method,
    source: PatchSources,
    limit: int | None,
    baselines: Sequence[str],
    exclude: Iterable[str],
    progress: bool,
) -> RegistrationReport:
    began = time.perf_counter()
    check_baselines(tuple(baselines), REGISTRATION_BASELINES)
    if limit is not None and limit < 1:
        raise KGLMatchError(f"limit must be at least 1, or None for all pairs, got {limit}")
    sources = find_patch_sources(source)
    excluded = excluded_of(sources, exclude)
    methods = {OURS: ours} | {name: _baseline(name) for name in baselines}
    results: list[PairRegistration] = []
    for subset, pair in steps(_image_pairs(sources, limit), "image pairs", show=progress):
        results += _measure(subset, pair, methods, pair.name in excluded.get(subset, ()))
    return RegistrationReport(kind, tuple(results), time.perf_counter() - began)


def _baseline(name: str) -> Method:
    def estimate(vis: NDArray[np.float32], ir: NDArray[np.float32]) -> Estimate:
        eight_bit = (np.rint(image * 255).astype(np.uint8) for image in (vis, ir))
        return Estimate(*register_images(name, *eight_bit))

    return estimate


def _image_pairs(sources: list[PatchSource], limit: int | None) -> list[tuple[str, ImagePair]]:
    """The pairs with their subsets' names, ordered by subset."""
    for subset in sources:
        if not subset.pairs:
            raise DataError(f"{subset.path} holds patches; registration needs folders of image pairs")
    places = [(i, j) for i, subset in enumerate(sources) for j in range(len(subset.pairs))]
    in_turn = sorted(places, key=lambda place: place[::-1])
    return [(sources[i].name, sources[i].pairs[j]) for i, j in sorted(in_turn[:limit])]


def _measure(
    subset: str, pair: ImagePair, methods: dict[str, Method], excluded: bool
) -> list[PairRegistration]:
    vis, ir = load_image(pair.vis), load_image(pair.ir)
    true = np.eye(3) if pair.affine is None else pair.affine
    results = []
    for name, method in methods.items():
        began = time.perf_counter()
        found = method(vis, ir)
        seconds = time.perf_counter() - began
        error = None
        if found.transform is not None:
            error = corner_error(found.transform, true, (vis.shape[1], vis.shape[0]))
            # A transform that sends a corner to infinity is as good as none.
            error = error if np.isfinite(error) else None
        results.append(
            PairRegistration(
                subset,
                pair.name,
                name,
                error,
                found.places,
                found.inliers,
                found.verdict,
                seconds,
                excluded,
            )
        )
    return results
