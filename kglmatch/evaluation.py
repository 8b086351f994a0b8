"""How well a model matches patches and registers images, beside its peers on the same data.

The patch protocol is `kglmatch.datasets`', the figures are `kglmatch.metrics`', the peers
`kglmatch.peers`'. Test data choose nothing: not a checkpoint, not a threshold, not a setting.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kglmatch import metrics
from kglmatch.datasets import ImagePair, PatchPairs, find_patch_sources
from kglmatch.errors import DataError, KGLMatchError
from kglmatch.fusion import check_fusion, fuse
from kglmatch.geometry import corner_error
from kglmatch.peers import (
    PATCH_PEERS,
    REGISTRATION_PEERS,
    check_peers,
    patch_peer_scores,
    register_images,
)
from kglmatch.progress import steps

if TYPE_CHECKING:
    from kglmatch.matcher import Matcher

DEFAULT_PATCH_PEERS = ("sift",)
DEFAULT_REGISTRATION_PEERS = ("sift", "orb")
OURS = "kglmatch"
PIXELS = (1, 3, 5)
# False positive rates at which the ROC curves are kept.
ROC_GRID: NDArray[np.float64] = np.logspace(-4, 0, 401)

# Pairs in work at once: their metric maps (64 KiB a patch) take 200 MB at most.
_CHUNK = 2048

Source = str | Path | Iterable[str | Path]


# --- patches ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MethodFigures:
    """What one method reached on one subset, or on average over the subsets.

    Attributes:
        method: "descriptor" (the descriptors' distance), "metric" (the metric head), "fused" (both,
            for models that carry a fusion), or a peer's name.
        fpr95_percent: false positives at 95 % recall, in percent; lower is better.
        roc_auc, average_precision: in [0, 1], higher is better.
        roc: (401,) true positive rates at the false positive rates `ROC_GRID`.
    """

    method: str
    fpr95_percent: float
    roc_auc: float
    average_precision: float
    roc: NDArray[np.float64] = field(repr=False)

    def to_dict(self) -> dict[str, float]:
        """The three figures, without the curve."""
        return {
            "fpr95_percent": self.fpr95_percent,
            "roc_auc": self.roc_auc,
            "average_precision": self.average_precision,
        }


@dataclass(frozen=True, eq=False)
class SubsetReport:
    """One subset: its name, how many pairs of either kind it holds, and what each method reached."""

    name: str
    matching: int
    non_matching: int
    methods: tuple[MethodFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "matching": self.matching,
            "non_matching": self.non_matching,
            "methods": {figures.method: figures.to_dict() for figures in self.methods},
        }


@dataclass(frozen=True, eq=False)
class PatchReport:
    """What `evaluate_patches` found.

    Attributes:
        subsets: in the order of the data.
        mean: of each method, every subset weighing the same.
        max_pairs, seed: of the draw.
        seconds: that the whole took, reading included.
    """

    subsets: tuple[SubsetReport, ...]
    mean: tuple[MethodFigures, ...]
    max_pairs: int | None
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": "patches",
            "max_pairs": self.max_pairs,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "subsets": [subset.to_dict() for subset in self.subsets],
            "mean": {figures.method: figures.to_dict() for figures in self.mean},
        }

    def table(self) -> str:
        """FPR95 of each subset and method as lines of text, and the means of all figures."""
        methods = [figures.method for figures in self.mean]
        rows = [["FPR95, %", "pairs", *methods]]
        for subset in self.subsets:
            pairs = f"{subset.matching}+{subset.non_matching}"
            rows.append([subset.name, pairs, *(f"{m.fpr95_percent:.2f}" for m in subset.methods)])
        rows.append(["mean", "", *(f"{m.fpr95_percent:.2f}" for m in self.mean)])
        more = [
            ["ROC-AUC, mean", "", *(f"{m.roc_auc:.4f}" for m in self.mean)],
            ["average precision, mean", "", *(f"{m.average_precision:.4f}" for m in self.mean)],
        ]
        return _aligned([*rows, *more], rules=(1, len(rows) - 1, len(rows)))


def evaluate_patches(
    matcher: Matcher,
    source: Source,
    *,
    max_pairs: int | None = None,
    seed: int = 0,
    peers: Sequence[str] = DEFAULT_PATCH_PEERS,
    progress: bool = False,
) -> PatchReport:
    """Measures how well a model tells matching patch pairs from others, beside its peers.

    Args:
        matcher: holds the model. If its configuration carries a fusion (`kglmatch.fusion`), the
            fused answer is measured too.
        source: one or several paths, see `kglmatch.datasets.find_patch_sources`.
        max_pairs: at most so many matching and so many non-matching pairs a subset, drawn at random.
        seed: of the draw.
        peers: of `kglmatch.peers.PATCH_PEERS`.
        progress: draw bars on stderr, if that is a terminal.

    Returns:
        a `PatchReport`; memory stays bounded, one subset is held at a time.

    Raises:
        DataError, ImageError: data that cannot be read, or a subset with one kind of pairs only.
        KGLMatchError: an unknown peer, or one that is not installed.
    """
    began = time.perf_counter()
    peers = tuple(peers)
    check_peers(peers, PATCH_PEERS)
    if (fusion := matcher.config.inference.get("fusion")) is not None:
        check_fusion(fusion)
    subsets = []
    for found in steps(find_patch_sources(source), "subsets", show=progress):
        pairs = found.load(max_pairs=max_pairs, seed=seed)
        subsets.append(_evaluate_subset(matcher, pairs, peers, progress))
    mean = tuple(_mean([s.methods[i] for s in subsets]) for i in range(len(subsets[0].methods)))
    return PatchReport(tuple(subsets), mean, max_pairs, seed, time.perf_counter() - began)


def score_pairs(
    matcher: Matcher, pairs: PatchPairs, *, progress: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Descriptor distances (N,) and scores of the metric head (N,) of labelled pairs.

    On validation data, ``fit_fusion(distances, logits_of(scores), pairs.labels)`` of `kglmatch.fusion`
    makes one answer of the two.
    """
    distances, scores, _ = _score(matcher, pairs, (), progress)
    return distances, scores


def _score(
    matcher: Matcher, pairs: PatchPairs, peers: tuple[str, ...], progress: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    distances, scores = np.empty(len(pairs)), np.empty(len(pairs))
    others = {peer: np.empty(len(pairs)) for peer in peers}
    for start in steps(range(0, len(pairs), _CHUNK), pairs.name, show=progress):
        part = slice(start, start + _CHUNK)
        # A patch is in several pairs; it is described once.
        (vis, rows_vis), (ir, rows_ir) = _unique(pairs.vis[part]), _unique(pairs.ir[part])
        features_vis, features_ir = matcher.describe(vis, "vis"), matcher.describe(ir, "ir")
        difference = features_vis.descriptors[rows_vis] - features_ir.descriptors[rows_ir]
        distances[part] = np.linalg.norm(difference, axis=1)
        scores[part] = matcher.backend.score(features_vis.maps, features_ir.maps, rows_vis, rows_ir)
        for peer in peers:
            others[peer][part] = patch_peer_scores(peer, vis, ir, rows_vis, rows_ir)
    return distances, scores, others


def _unique(patches: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The different patches (A, P, P), and which of them each patch is (N,)."""
    index: dict[bytes, int] = {}
    rows = np.array([index.setdefault(p.tobytes(), len(index)) for p in patches], np.int64)
    _, first = np.unique(rows, return_index=True)
    return np.ascontiguousarray(patches[first]), rows


def _evaluate_subset(
    matcher: Matcher, pairs: PatchPairs, peers: tuple[str, ...], progress: bool
) -> SubsetReport:
    if pairs.labels.all() or not pairs.labels.any():
        raise DataError(f"{pairs.name}: needs matching and non-matching pairs to tell apart, has one kind")
    distances, scores, others = _score(matcher, pairs, peers, progress)
    answers = {"descriptor": -distances, "metric": scores}
    if (fusion := matcher.config.inference.get("fusion")) is not None:
        answers["fused"] = fuse(distances, scores, fusion)
    methods = tuple(_figures(name, a, pairs.labels) for name, a in (answers | others).items())
    matching = int(pairs.labels.sum())
    return SubsetReport(pairs.name, matching, len(pairs) - matching, methods)


def _figures(method: str, scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> MethodFigures:
    fpr, tpr = metrics.roc_curve(scores, labels)
    return MethodFigures(
        method,
        100 * metrics.fpr_at_recall(scores, labels),
        metrics.roc_auc(scores, labels),
        metrics.average_precision(scores, labels),
        # The last threshold whose false positive rate is not above the grid's.
        tpr[np.searchsorted(fpr, ROC_GRID, side="right") - 1],
    )


def _mean(figures: list[MethodFigures]) -> MethodFigures:
    return MethodFigures(
        figures[0].method,
        float(np.mean([f.fpr95_percent for f in figures])),
        float(np.mean([f.roc_auc for f in figures])),
        float(np.mean([f.average_precision for f in figures])),
        np.mean([f.roc for f in figures], axis=0),
    )


# --- registration -------------------------------------------------------------------------------


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
        return f"{_aligned(rows, rules=(1,))}\n\n{_aligned(by_subset, rules=(1,))}"


def evaluate_registration(
    matcher: Matcher,
    source: Source,
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
        peers: of `kglmatch.peers.REGISTRATION_PEERS`.
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


def _image_pairs(source: Source, limit: int | None) -> list[tuple[str, ImagePair]]:
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
    from kglmatch.images import load_image

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


def _aligned(rows: list[list[str]], rules: tuple[int, ...]) -> str:
    """Rows as lines, the first column to the left and the others to the right, rules before some rows."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    for rule in sorted(rules, reverse=True):
        lines.insert(rule, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
