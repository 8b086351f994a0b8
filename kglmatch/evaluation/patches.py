"""How well a model tells matching patches from others, alongside baselines on the same data.

The patch protocol is `kglmatch.datasets`', the figures are `kglmatch.evaluation.metrics`', the peers
`kglmatch.evaluation.baselines`'. Test data choose nothing: not a checkpoint, not a threshold, not a setting.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.datasets import PatchPairs, PatchSources, find_patch_sources
from kglmatch.errors import DataError
from kglmatch.evaluation import metrics
from kglmatch.evaluation.baselines import (
    PATCH_PEERS,
    check_peers,
    patch_peer_scores,
)
from kglmatch.evaluation.tables import aligned
from kglmatch.fusion import check_fusion, fuse
from kglmatch.matcher import Matcher
from kglmatch.progress import steps

DEFAULT_PATCH_PEERS = ("sift",)
# False positive rates at which the ROC curves are kept.
ROC_GRID: NDArray[np.float64] = np.logspace(-4, 0, 401)

# Pairs in work at once: their metric maps (64 KiB a patch) take 200 MB at most.
_CHUNK = 2048


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
        return aligned([*rows, *more], rules=(1, len(rows) - 1, len(rows)))


def evaluate_patches(
    matcher: Matcher,
    source: PatchSources,
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
        peers: of `kglmatch.evaluation.baselines.PATCH_PEERS`.
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
