"""How well a model registers whole images, alongside baselines on the same data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.datasets import ImagePair, PatchSources, find_patch_sources
from kglmatch.errors import DataError, KGLMatchError
from kglmatch.evaluation.baselines import REGISTRATION_PEERS, check_peers, register_images
from kglmatch.evaluation.tables import aligned
from kglmatch.geometry import corner_error
from kglmatch.images import load_image
from kglmatch.matcher import Matcher
from kglmatch.progress import steps

DEFAULT_REGISTRATION_PEERS = ("sift", "orb")
OURS = "kglmatch"
PIXELS = (1, 3, 5)


@dataclass(frozen=True)
class PairRegistration:
    """One image pair registered by one method.

    Attributes:
        subset, pair: where the images are from.
        method: "kglmatch" or a peer's name.
        error: mean distance in pixels of the visible image's corners from where the known affine
            takes them; None if no homography was found.
        matches, inliers: how many, and how many agree with the homography.
        seconds: from grey images in memory to the homography.
    """

    subset: str
    pair: str
    method: str
    error: float | None
    matches: int
    inliers: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "subset": self.subset,
            "pair": self.pair,
            "method": self.method,
            "error": None if self.error is None else round(self.error, 3),
            "matches": self.matches,
            "inliers": self.inliers,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class RegistrationReport:
    """What `evaluate_registration` found: one entry an image pair and method."""

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

    def errors(self, method: str, subset: str | None = None) -> NDArray[np.float64]:
        """Corner errors (N,) in pixels; infinite where no homography was found."""
        return np.array(
            [
                np.inf if r.error is None else r.error
                for r in self.results
                if r.method == method and subset in (None, r.subset)
            ]
        )

    def share(self, method: str, pixels: float, subset: str | None = None) -> float:
        """Share in [0, 1] of pairs whose corner error is at most so many pixels."""
        return float((self.errors(method, subset) <= pixels).mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": "registration",
            "seconds": round(self.seconds, 1),
            "pairs": len(self.errors(self.methods[0])),
            "methods": {method: self._summary(method) for method in self.methods},
            "subsets": {
                subset: {method: self._shares(method, subset) for method in self.methods}
                for subset in self.subsets
            },
            "results": [r.to_dict() for r in self.results],
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
        """Shares within 1, 3 and 5 pixels as lines of text: of all pairs, then of each subset."""
        count = len(self.errors(self.methods[0]))
        rows = [
            [
                f"registered, % of {count} pairs",
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
        by_subset = [["subset, % within 1 / 3 / 5 px", *self.methods]]
        for subset in self.subsets:
            shares = (
                " / ".join(f"{100 * self.share(method, px, subset):.0f}" for px in PIXELS)
                for method in self.methods
            )
            by_subset.append([subset, *shares])
        return f"{aligned(rows, rules=(1,))}\n\n{aligned(by_subset, rules=(1,))}"


def evaluate_registration(
    matcher: Matcher,
    source: PatchSources,
    *,
    limit: int | None = None,
    peers: Sequence[str] = DEFAULT_REGISTRATION_PEERS,
    progress: bool = False,
    **options: Any,
) -> RegistrationReport:
    """Measures how well a model registers whole images, beside its peers in the same run.

    A homography from visible to ir pixels is estimated for each pair and compared with the pair's
    affine (with the identity where the pair has none) over the corners of the visible image.

    Args:
        matcher: holds the model; `Matcher.match_images` does the work.
        source: one or several folders of image pairs, or of such folders.
        limit: so many pairs in all, the first of each subset, then the second of each, and so on.
        peers: of `kglmatch.evaluation.baselines.REGISTRATION_PEERS`.
        progress: draw a bar on stderr, if that is a terminal.
        options: of `Matcher.match_images`, in place of its defaults.

    Raises:
        DataError, ImageError: data that cannot be read.
        KGLMatchError: an unknown peer, or one that is not installed; a limit below 1.
    """
    began = time.perf_counter()
    peers = tuple(peers)
    check_peers(peers, REGISTRATION_PEERS)
    if limit is not None and limit < 1:
        raise KGLMatchError(f"limit must be at least 1, or None for all pairs, got {limit}")
    results: list[PairRegistration] = []
    for subset, pair in steps(_image_pairs(source, limit), "image pairs", show=progress):
        results += _register(matcher, subset, pair, peers, options)
    return RegistrationReport(tuple(results), time.perf_counter() - began)


def _image_pairs(source: PatchSources, limit: int | None) -> list[tuple[str, ImagePair]]:
    """The pairs with their subsets' names, ordered by subset."""
    found = find_patch_sources(source)
    for subset in found:
        if not subset.pairs:
            raise DataError(f"{subset.path} holds patches; registration needs folders of image pairs")
    places = [(i, j) for i, subset in enumerate(found) for j in range(len(subset.pairs))]
    in_turn = sorted(places, key=lambda place: place[::-1])
    return [(found[i].name, found[i].pairs[j]) for i, j in sorted(in_turn[:limit])]


def _register(
    matcher: Matcher, subset: str, pair: ImagePair, peers: tuple[str, ...], options: dict[str, Any]
) -> list[PairRegistration]:
    vis, ir = load_image(pair.vis), load_image(pair.ir)
    vis_8_bit, ir_8_bit = (np.rint(image * 255).astype(np.uint8) for image in (vis, ir))
    true = np.eye(3) if pair.affine is None else pair.affine
    size = (vis.shape[1], vis.shape[0])
    results = []
    for method in (OURS, *peers):
        began = time.perf_counter()
        homography: NDArray[np.float64] | None
        if method == OURS:
            found = matcher.match_images(vis, ir, **options)
            homography, matches = found.homography, len(found)
            inliers = 0 if found.inliers is None else int(found.inliers.sum())
        else:
            homography, matches, inliers = register_images(method, vis_8_bit, ir_8_bit)
        seconds = time.perf_counter() - began
        error = None if homography is None else corner_error(homography, true, size)
        # A homography that sends a corner to infinity is as good as none.
        if error is not None and not np.isfinite(error):
            error = None
        results.append(PairRegistration(subset, pair.name, method, error, matches, inliers, seconds))
    return results
