"""The confidence of a registration as a share: how many of the registrations that have it are right.

`Matcher.register` measures evidence; how often evidence is right depends on the model and its data. The fit
turns pairs whose truth is known into a rising curve from evidence to the share of registrations that are
right, which travels with the weights (``config.inference["confidence"]``). The verdict does not depend on it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError

MIN_PAIRS = 20
FOLDS = 5
_DIGITS = 4


def fit_confidence(evidence: NDArray[np.floating], right: NDArray[np.bool_]) -> dict[str, list[float]]:
    """A rising curve from evidence to the share that is right, for ``config.inference["confidence"]``.

    Isotonic regression (pool adjacent violators). Each step's share is (k + 1) / (n + 2) of its n
    registrations, k of them right, so that few pairs do not claim certainty.

    Args:
        evidence: (N,) of `kglmatch.registration.verdict.evidence`, of related and unrelated pairs.
        right: (N,) which of the registrations are.

    Returns:
        ``{"evidence": [...], "share": [...]}``, both rising, to be read by linear interpolation.

    Raises:
        KGLMatchError: fewer than 20 registrations, or lengths that differ.
    """
    if evidence.shape != right.shape or evidence.ndim != 1 or len(evidence) < MIN_PAIRS:
        raise KGLMatchError(
            f"a fit needs the evidence of {MIN_PAIRS} registrations or more and as many answers, got "
            f"{evidence.shape} and {right.shape}"
        )
    order = np.argsort(evidence, kind="stable")
    blocks: list[list[float]] = []  # sum of evidence, right, count
    for value, answer in zip(evidence[order], right[order], strict=True):
        blocks.append([float(value), float(answer), 1.0])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    knots = np.array([total / count for total, _, count in blocks])
    shares = np.array([(good + 1) / (count + 2) for _, good, count in blocks])
    shares = np.maximum.accumulate(shares)  # a step of few registrations is not less than the one below it
    return {"evidence": np.round(knots, _DIGITS).tolist(), "share": np.round(shares, _DIGITS).tolist()}


def held_out(
    evidence: NDArray[np.floating],
    right: NDArray[np.bool_],
    groups: NDArray[np.generic],
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The share that `fit_confidence` gives each registration without having seen its group.

    Args:
        evidence, right: (N,), as for `fit_confidence`.
        groups: (N,) of which image pair each is; the registrations of one pair resemble each other.
        folds: parts that the groups are split into, each in turn left out of the fit.
        seed: of the split.

    Returns:
        (N,) in [0, 1].

    Raises:
        KGLMatchError: fewer groups than folds, or fewer than 20 registrations outside a fold.
    """
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < folds:
        raise KGLMatchError(f"{folds} folds need as many image pairs, got {len(names)}")
    fold = np.random.default_rng(seed).permutation(len(names))[group] % folds
    shares = np.empty(len(evidence))
    for left_out in range(folds):
        inside = fold == left_out
        curve = fit_confidence(evidence[~inside], right[~inside])
        shares[inside] = np.interp(evidence[inside], curve["evidence"], curve["share"])
    return shares


def brier_score(confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> float:
    """Mean squared difference of confidence (N,) and what happened (N,); lower is better (Brier, 1950)."""
    return float(np.mean((confidence - right) ** 2))


@dataclass(frozen=True)
class ReliabilityBin:
    """Registrations of about one confidence.

    Attributes:
        low, high: the confidence is in [low, high).
        count: registrations.
        confidence: their mean.
        share: how many of them are right; NaN for none.
        interval: 95 % interval of the share (Wilson), NaN for none.
    """

    low: float
    high: float
    count: int
    confidence: float
    share: float
    interval: tuple[float, float]


def reliability(
    confidence: NDArray[np.floating], right: NDArray[np.bool_], edges: tuple[float, ...]
) -> list[ReliabilityBin]:
    """How many registrations of each confidence are right.

    Args:
        confidence: (N,) in [0, 1].
        right: (N,).
        edges: rising bounds of the bins; the last one is included.
    """
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == edges[-1]))
        count, good = int(inside.sum()), int(right[inside].sum())
        mean = float(confidence[inside].mean()) if count else float("nan")
        share = good / count if count else float("nan")
        bins.append(ReliabilityBin(low, high, count, mean, share, wilson(good, count)))
    return bins


def wilson(good: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); NaN for none."""
    if not count:
        return float("nan"), float("nan")
    z, share = 1.96, good / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
