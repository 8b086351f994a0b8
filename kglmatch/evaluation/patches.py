"""How well a model separates matching patch pairs from others, alongside baselines on the same data.

The patch protocol is `kglmatch.datasets`', the figures are `kglmatch.evaluation.metrics`', the baselines
`kglmatch.evaluation.baselines`'. Test data choose nothing: not a checkpoint, not a threshold, not a setting.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.datasets import LEAST_CONTRAST, PatchPairs, PatchSources, contrast, find_patch_sources
from kglmatch.errors import DataError
from kglmatch.evaluation import metrics
from kglmatch.evaluation.baselines import check_baselines, patch_baseline_scores
from kglmatch.evaluation.excluded import excluded_of
from kglmatch.evaluation.tables import aligned
from kglmatch.fusion import check_fusion, fuse
from kglmatch.matcher import Matcher
from kglmatch.options import DEFAULT_NEGATIVES, DEFAULT_PATCH_BASELINES, PATCH_BASELINES
from kglmatch.progress import steps

# False positive rates at which the ROC curves are kept.
ROC_GRID: NDArray[np.float64] = np.logspace(-4, 0, 401)
RECALLS = (0.95, 0.8)

# What the figures are of: all pairs; those whose second patch shows something; those of image pairs that
# are not excluded.
ALL, SHOWN, KEPT = "all pairs", "without empty patches", "without excluded images"

# Pairs in work at once: their metric maps (64 KiB a patch) take 200 MB at most.
_CHUNK = 2048
# A set of no more second patches is described once, though its pairs refer to them in any order.
_DESCRIBED_ONCE = 4096


@dataclass(frozen=True, eq=False)
class MethodFigures:
    """What one method reached on one subset, or on average over the subsets.

    Attributes:
        method: "descriptor" (the descriptors' distance), "metric" (the metric head), "fused" (both,
            for models that carry a fusion), or a baseline's name.
        fpr95_percent, fpr80_percent: false positives at 95 and at 80 % recall, in percent; lower is better.
        roc_auc, average_precision: in [0, 1], higher is better.
        roc: (401,) true positive rates at the false positive rates `ROC_GRID`.
        resampled: (S, 2) both rates, in percent, on resampled images (`metrics.bootstrap_fpr`); None where
            the images are not known or are fewer than two.
    """

    method: str
    fpr95_percent: float
    fpr80_percent: float
    roc_auc: float
    average_precision: float
    roc: NDArray[np.float64] = field(repr=False)
    resampled: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def fpr95_interval(self) -> tuple[float, float] | None:
        """95 % interval of `fpr95_percent` over images, in percent."""
        return self._interval(0)

    @property
    def fpr80_interval(self) -> tuple[float, float] | None:
        """95 % interval of `fpr80_percent` over images, in percent."""
        return self._interval(1)

    def _interval(self, column: int) -> tuple[float, float] | None:
        if self.resampled is None:
            return None
        low, high = np.nanpercentile(self.resampled[:, column], (2.5, 97.5))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """The figures and intervals, without the curve."""
        intervals = {"fpr95_interval": self.fpr95_interval, "fpr80_interval": self.fpr80_interval}
        return {
            "fpr95_percent": self.fpr95_percent,
            "fpr80_percent": self.fpr80_percent,
            "roc_auc": self.roc_auc,
            "average_precision": self.average_precision,
            **{name: None if found is None else list(found) for name, found in intervals.items()},
        }


@dataclass(frozen=True, eq=False)
class Selection:
    """Some pairs of a subset: how many of either kind, and what each method reached on them.

    Attributes:
        name: `ALL`, `SHOWN` or `KEPT`.
        matching, non_matching: number of pairs.
        methods: figures; empty where only one kind of pairs is left.
    """

    name: str
    matching: int
    non_matching: int
    methods: tuple[MethodFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "matching": self.matching,
            "non_matching": self.non_matching,
            "methods": {figures.method: figures.to_dict() for figures in self.methods},
        }


@dataclass(frozen=True, eq=False)
class SubsetReport:
    """One subset: its name and its selections, all pairs first."""

    name: str
    selections: tuple[Selection, ...]

    @property
    def matching(self) -> int:
        """Number of matching pairs."""
        return self.selections[0].matching

    @property
    def non_matching(self) -> int:
        """Number of non-matching pairs."""
        return self.selections[0].non_matching

    @property
    def methods(self) -> tuple[MethodFigures, ...]:
        """Figures of all pairs."""
        return self.selections[0].methods

    def to_dict(self) -> dict[str, Any]:
        """Plain values: of all pairs, and of the other selections."""
        others = {selection.name: selection.to_dict() for selection in self.selections[1:]}
        return {"name": self.name, **self.selections[0].to_dict(), **others}


@dataclass(frozen=True, eq=False)
class PatchReport:
    """What `evaluate_patches` found.

    Attributes:
        subsets: in the order of the data.
        max_pairs, negatives, seed: of the draw.
        seconds: that the whole took, reading included.
    """

    subsets: tuple[SubsetReport, ...]
    max_pairs: int | None
    negatives: int
    seed: int
    seconds: float

    @property
    def selections(self) -> tuple[str, ...]:
        """Names of the selections that were made of every subset."""
        return tuple(selection.name for selection in self.subsets[0].selections)

    @property
    def mean(self) -> tuple[MethodFigures, ...]:
        """Of each method on all pairs, every subset weighing the same."""
        return self.mean_of(ALL)

    def mean_of(self, selection: str) -> tuple[MethodFigures, ...]:
        """Of each method on a selection, every subset with figures weighing the same."""
        place = self.selections.index(selection)
        found = [one.methods for s in self.subsets if (one := s.selections[place]).methods]
        return tuple(_mean(figures) for figures in zip(*found, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": "patches",
            "max_pairs": self.max_pairs,
            "negatives": self.negatives,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "subsets": [subset.to_dict() for subset in self.subsets],
            "mean": {figures.method: figures.to_dict() for figures in self.mean},
            **{
                f"mean {name}": {figures.method: figures.to_dict() for figures in self.mean_of(name)}
                for name in self.selections[1:]
            },
        }

    def table(self) -> str:
        """FPR95 of each subset and method as lines of text, and the means of all figures.

        Selections that leave no pair out anywhere are not shown.
        """
        return "\n\n".join(
            self._table(place)
            for place in range(len(self.selections))
            if not place or any(s.selections[place].matching < s.matching for s in self.subsets)
        )

    def _table(self, place: int) -> str:
        mean = self.mean_of(self.selections[place])
        title = "FPR95, %" if not place else f"FPR95, %, {self.selections[place]}"
        rows = [[title, "pairs", *(figures.method for figures in self.mean)]]
        for subset in self.subsets:
            one = subset.selections[place]
            figures = [f"{m.fpr95_percent:.2f}" for m in one.methods] or ["none"] * len(self.mean)
            rows.append([subset.name, f"{one.matching}+{one.non_matching}", *figures])
        subsets = len(rows)
        if not mean:
            return aligned(rows, rules=(1,))
        rows.append(["mean", "", *(f"{m.fpr95_percent:.2f}" for m in mean)])
        rows.append(["95 % interval", "", *(_written(m.fpr95_interval) for m in mean)])
        others = len(rows)
        rows.append(["FPR at 80 % recall, %, mean", "", *(f"{m.fpr80_percent:.2f}" for m in mean)])
        rows.append(["95 % interval", "", *(_written(m.fpr80_interval) for m in mean)])
        rows.append(["ROC-AUC, mean", "", *(f"{m.roc_auc:.4f}" for m in mean)])
        rows.append(["average precision, mean", "", *(f"{m.average_precision:.4f}" for m in mean)])
        return aligned(rows, rules=(1, subsets, others))


def evaluate_patches(
    matcher: Matcher,
    source: PatchSources,
    *,
    max_pairs: int | None = None,
    negatives: int = DEFAULT_NEGATIVES,
    seed: int = 0,
    baselines: Sequence[str] = DEFAULT_PATCH_BASELINES,
    exclude: Iterable[str] = (),
    progress: bool = False,
) -> PatchReport:
    """Measures how well a model separates matching patch pairs from others, alongside baselines.

    Figures are of all pairs, of the pairs whose second patch shows something (`kglmatch.datasets.contrast`),
    and, where images are excluded, of the pairs of the other images.

    Args:
        matcher: holds the model. If its configuration carries a fusion (`kglmatch.fusion`), the
            fused answer is measured too.
        source: one or several paths, see `kglmatch.datasets.find_patch_sources`.
        max_pairs: the largest number of matching pairs a subset, drawn at random.
        negatives: non-matching pairs for each matching one, where the data are images; patch files hold
            their own.
        seed: of the draw and of the resampled images.
        baselines: of `kglmatch.options.PATCH_BASELINES`.
        exclude: image pairs ("subset/pair") without which the figures are given too.
        progress: draw bars on stderr, if that is a terminal.

    Returns:
        a `PatchReport`; memory stays bounded, one subset is held at a time.

    Raises:
        DataError, ImageError: data that cannot be read, a subset with one kind of pairs only, or an
            excluded image pair that is not there.
        KGLMatchError: an unknown baseline, or one that is not installed.
    """
    began = time.perf_counter()
    baselines = tuple(baselines)
    check_baselines(baselines, PATCH_BASELINES)
    if (fusion := matcher.config.inference.get("fusion")) is not None:
        check_fusion(fusion)
    sources = find_patch_sources(source)
    excluded = excluded_of(sources, exclude)
    subsets = []
    for found in steps(sources, "subsets", show=progress):
        pairs = found.load(max_pairs=max_pairs, negatives=negatives, seed=seed)
        kept = None
        if excluded:
            of_subset = excluded.get(found.name, [])
            kept = np.array([name not in of_subset for name in _images(pairs)], bool)
        subsets.append(_evaluate_subset(matcher, pairs, baselines, kept, seed, progress))
    return PatchReport(tuple(subsets), max_pairs, negatives, seed, time.perf_counter() - began)


def score_pairs(
    matcher: Matcher, pairs: PatchPairs, *, progress: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Descriptor distances (N,) and scores of the metric head (N,) of labelled pairs.

    On validation data, ``fit_fusion(distances, logits_of(scores), pairs.labels)`` of `kglmatch.fusion`
    makes one answer of the two.
    """
    distances, scores = np.empty(len(pairs)), np.empty(len(pairs))
    every_ir, every_row = _unique(pairs.ir)
    once = matcher.describe(every_ir, "ir") if len(every_ir) <= _DESCRIBED_ONCE else None
    for start in steps(range(0, len(pairs), _CHUNK), pairs.name, show=progress):
        part = slice(start, start + _CHUNK)
        # A patch is in several pairs; it is described once.
        vis, rows_vis = _unique(pairs.vis[part])
        features_vis = matcher.describe(vis, "vis")
        if once is None:
            ir, rows_ir = _unique(pairs.ir[part])
            features_ir = matcher.describe(ir, "ir")
        else:
            features_ir, rows_ir = once, every_row[part]
        difference = features_vis.descriptors[rows_vis] - features_ir.descriptors[rows_ir]
        distances[part] = np.linalg.norm(difference, axis=1)
        scores[part] = matcher.backend.score(features_vis.maps, features_ir.maps, rows_vis, rows_ir)
    return distances, scores


def _images(pairs: PatchPairs) -> NDArray[np.str_]:
    """Names of the visible patches' images (N,), empty where they are not known."""
    return np.full(len(pairs), "", np.str_) if pairs.images is None else pairs.images


def _unique(patches: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The different patches (A, P, P), and which of them each patch is (N,)."""
    index: dict[bytes, int] = {}
    rows = np.array([index.setdefault(p.tobytes(), len(index)) for p in patches], np.int64)
    _, first = np.unique(rows, return_index=True)
    return np.ascontiguousarray(patches[first]), rows


def _evaluate_subset(
    matcher: Matcher,
    pairs: PatchPairs,
    baselines: tuple[str, ...],
    kept: NDArray[np.bool_] | None,
    seed: int,
    progress: bool,
) -> SubsetReport:
    if pairs.labels.all() or not pairs.labels.any():
        raise DataError(
            f"{pairs.name}: both matching and non-matching pairs are needed, and it holds one kind"
        )
    distances, scores = score_pairs(matcher, pairs, progress=progress)
    answers = {"descriptor": -distances, "metric": scores}
    if (fusion := matcher.config.inference.get("fusion")) is not None:
        answers["fused"] = fuse(distances, scores, fusion)
    (vis, rows_vis), (ir, rows_ir) = _unique(pairs.vis), _unique(pairs.ir)
    for baseline in baselines:
        answers[baseline] = patch_baseline_scores(baseline, vis, ir, rows_vis, rows_ir)
    selected = {ALL: np.ones(len(pairs), bool), SHOWN: (contrast(ir) >= LEAST_CONTRAST)[rows_ir]}
    if kept is not None:
        selected[KEPT] = kept
    whole: Selection | None = None
    selections = []
    for name, rows in selected.items():
        if whole is not None and rows.all():
            selections.append(Selection(name, whole.matching, whole.non_matching, whole.methods))
            continue
        selections.append(_select(name, answers, pairs, rows, seed))
        whole = whole or selections[0]
    return SubsetReport(pairs.name, tuple(selections))


def _select(
    name: str, answers: dict[str, NDArray[np.float64]], pairs: PatchPairs, rows: NDArray[np.bool_], seed: int
) -> Selection:
    """The figures of some rows (N,) of the pairs."""
    labels = pairs.labels[rows]
    images = None if pairs.images is None else pairs.images[rows]
    matching = int(labels.sum())
    methods: tuple[MethodFigures, ...] = ()
    if 0 < matching < len(labels):
        methods = tuple(_figures(m, a[rows], labels, images, seed) for m, a in answers.items())
    return Selection(name, matching, len(labels) - matching, methods)


def _figures(
    method: str,
    scores: NDArray[np.float64],
    labels: NDArray[np.bool_],
    images: NDArray[np.str_] | None,
    seed: int,
) -> MethodFigures:
    fpr, tpr = metrics.roc_curve(scores, labels)
    resampled = None if images is None else metrics.bootstrap_fpr(scores, labels, images, RECALLS, seed=seed)
    return MethodFigures(
        method,
        100 * metrics.fpr_at_recall(scores, labels, RECALLS[0]),
        100 * metrics.fpr_at_recall(scores, labels, RECALLS[1]),
        metrics.roc_auc(scores, labels),
        metrics.average_precision(scores, labels),
        # The last threshold whose false positive rate is not above the grid's.
        tpr[np.searchsorted(fpr, ROC_GRID, side="right") - 1],
        None if resampled is None else 100 * resampled,
    )


def _mean(figures: Sequence[MethodFigures]) -> MethodFigures:
    """The figures' means; images are resampled within each subset, independently of the others."""
    resampled = []
    for i, one in enumerate(figures):
        if one.resampled is not None:
            # Subsets share their seed: without this, the nth draws of all of them would belong together.
            resampled.append(np.random.RandomState(i).permutation(one.resampled))
    return MethodFigures(
        figures[0].method,
        float(np.mean([f.fpr95_percent for f in figures])),
        float(np.mean([f.fpr80_percent for f in figures])),
        float(np.mean([f.roc_auc for f in figures])),
        float(np.mean([f.average_precision for f in figures])),
        np.mean([f.roc for f in figures], axis=0),
        np.mean(resampled, axis=0) if len(resampled) == len(figures) else None,
    )


def _written(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"
