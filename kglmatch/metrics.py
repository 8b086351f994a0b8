"""How well scores tell matching pairs from others: FPR95, ROC-AUC, average precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kglmatch.errors import DataError


def _ranked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores in falling order with their labels, checked."""
    score = np.asarray(scores, dtype=np.float64)
    label = np.asarray(labels)
    if score.ndim != 1 or label.shape != score.shape:
        raise DataError(f"scores and labels must be (N,) alike, got {score.shape} and {label.shape}")
    if not np.isfinite(score).all():
        raise DataError("scores hold NaN or infinite values")
    label = label.astype(bool)
    if label.all() or not label.any():
        raise DataError("labels must hold both matching (1) and non-matching (0) pairs")
    order = np.argsort(-score, kind="stable")
    return score[order], label[order]


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rate at every distinct threshold, from none accepted to all.

    Args:
        scores: (N,), higher means "match". Pass minus the distance for descriptors.
        labels: (N,), 1 for matching pairs.

    Returns:
        false positive rates (T,) and true positive rates (T,), both rising from 0 to 1.

    Raises:
        DataError: shapes differ, a score is not finite, or only one class is there.
    """
    score, label = _ranked(scores, labels)
    # Pairs of one score are accepted together: cut only where the score changes.
    cut = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true = np.cumsum(label)[cut]
    false = cut + 1 - true
    tpr = np.append(0.0, true / true[-1])
    fpr = np.append(0.0, false / false[-1])
    return fpr, tpr


def fpr_at_recall(scores: ArrayLike, labels: ArrayLike, recall: float = 0.95) -> float:
    """Share of non-matching pairs accepted at the threshold that accepts `recall` of the matching ones.

    With `recall=0.95` this is the field's FPR95, the false positive rate at 95 % recall (Winder &
    Brown): the strictest threshold that reaches the recall, pairs of equal score accepted together.

    Args:
        scores: (N,), higher means "match".
        labels: (N,), 1 for matching pairs.

    Raises:
        DataError: as for `roc_curve`.
    """
    fpr, tpr = roc_curve(scores, labels)
    return float(fpr[np.searchsorted(tpr, recall, side="left")])


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a matching pair scores above a non-matching one."""
    fpr, tpr = roc_curve(scores, labels)
    return float(np.trapezoid(tpr, fpr))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean precision over the matching pairs, in the order of their scores."""
    score, label = _ranked(scores, labels)
    cut = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true = np.cumsum(label)[cut]
    precision = true / (cut + 1)
    gained = np.diff(true, prepend=0)
    return float((precision * gained).sum() / true[-1])
