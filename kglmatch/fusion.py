"""One answer from two: the descriptor distance and the metric head's score, by a logistic regression.

The regression has three numbers. They are fitted on validation data, never on test data, and travel
with the weights as ``config.inference["fusion"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kglmatch.errors import ConfigError, DataError

KEYS = ("distance", "logit", "bias")
# Scores are kept this far from 0 and 1, where the logit is infinite.
SMALLEST = 1e-7

_RIDGE = 1e-3
_SIGNS = np.array([-1.0, 1.0])  # of distance and logit: nearer and likelier is a match
_STEPS = 100


def logits_of(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores (N,) in [0, 1] -> logits (N,), clipped to +-16.1."""
    score = np.clip(np.asarray(scores, dtype=np.float64), SMALLEST, 1 - SMALLEST)
    logit: NDArray[np.float64] = np.log(score) - np.log1p(-score)
    return logit


def fit_fusion(distances: ArrayLike, logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Fits the fusion on labelled pairs of validation data; see `_logistic`.

    Args:
        distances: (N,) descriptor distances.
        logits: (N,) logits of the metric head, as `logits_of` makes them of its scores.
        labels: (N,), 1 for matching pairs.

    Returns:
        ``{"distance": a, "logit": b, "bias": c}``, for ``config.inference["fusion"]``: the probability
        of a match is the sigmoid of a * distance + b * logit + c, a at most 0 and b at least 0. Where one
        answer separates the classes alone, a free fit may give the other the wrong sign; that one then
        counts nothing.

    Raises:
        DataError: shapes differ, values are not finite, or only one class is there.
    """
    # Clipped as the scores will be that the fusion meets.
    largest = float(logits_of(1.0))
    distance, logit = _checked(distances, logits)
    inputs = np.stack([distance, np.clip(logit, -largest, largest)], axis=1)
    slopes, bias, used = np.zeros(2), 0.0, np.arange(2)
    while len(used):
        found, offset = _logistic(inputs[:, used], labels)
        wrong = found * _SIGNS[used] < 0
        if not wrong.any():
            slopes[used], bias = found, offset
            break
        used = used[~wrong]
    return {"distance": float(slopes[0]), "logit": float(slopes[1]), "bias": bias}


def fit_calibration(logits: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Factor and offset that make the metric head's logits those of a probability (Platt scaling).

    Args:
        logits: (N,) of the metric head, on validation data.
        labels: (N,), 1 for matching pairs.

    Raises:
        DataError: as for `fit_fusion`.
    """
    logit, _ = _checked(logits, logits)
    slopes, bias = _logistic(logit[:, None], labels)
    return float(slopes[0]), bias


def _logistic(inputs: NDArray[np.float64], labels: ArrayLike) -> tuple[NDArray[np.float64], float]:
    """Logistic regression, in which matching and non-matching pairs weigh the same.

    On standardised inputs, by Newton's method; a small ridge (1e-3 of a pair) keeps the answer finite
    where the two classes can be separated without a mistake.

    Args:
        inputs: (N, K).
        labels: (N,) of 0 and 1.

    Returns:
        slopes (K,) and bias.
    """
    label = np.asarray(labels)
    if label.shape != (len(inputs),) or not np.isin(label, (0, 1)).all():
        raise DataError(f"labels must be ({len(inputs)},) of 0 and 1, got shape {label.shape}")
    if label.all() or not label.any():
        raise DataError("labels must hold both matching (1) and non-matching (0) pairs")
    matching = float((label == 1).mean())
    share = np.where(label == 1, 0.5 / matching, 0.5 / (1 - matching))
    mean, spread = inputs.mean(axis=0), inputs.std(axis=0) + 1e-12
    x = np.column_stack([(inputs - mean) / spread, np.ones(len(inputs))])
    ridge = np.diag([*[_RIDGE] * inputs.shape[1], 0.0])
    weights = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(x @ weights)
        gradient = x.T @ (share * (p - label)) + ridge @ weights
        hessian = (x * (share * p * (1 - p))[:, None]).T @ x + ridge + 1e-12 * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        # Newton overshoots where the classes hardly overlap: no step may be longer than this.
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    slopes = weights[:-1] / spread
    return slopes, float(weights[-1] - slopes @ mean)


def fuse(distances: ArrayLike, scores: ArrayLike, fusion: Mapping[str, Any]) -> NDArray[np.float64]:
    """Probability of a match from both answers.

    Args:
        distances: (N,) descriptor distances.
        scores: (N,) scores of the metric head in [0, 1].
        fusion: what `fit_fusion` returned.

    Returns:
        (N,) in [0, 1].

    Raises:
        ConfigError: a fusion without its three finite numbers.
        DataError: shapes differ, or values are not finite.
    """
    check_fusion(fusion)
    distance, score = _checked(distances, scores)
    return _sigmoid(fusion["distance"] * distance + fusion["logit"] * logits_of(score) + fusion["bias"])


def check_fusion(fusion: Any) -> None:
    """Raises `ConfigError` unless this is what `fit_fusion` returns."""
    right = isinstance(fusion, Mapping) and set(fusion) == set(KEYS)
    if not right or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in fusion.values()
    ):
        raise ConfigError(f"fusion must hold the finite numbers {', '.join(KEYS)}, got {fusion!r}")


def _checked(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(f"distances and scores must be (N,) alike, got {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("distances or scores hold NaN or infinite values")
    return first, second


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    # Of minus the size, so that nothing overflows.
    small = np.exp(-np.abs(x))
    probability: NDArray[np.float64] = np.where(x >= 0, 1, small) / (1 + small)
    return probability
