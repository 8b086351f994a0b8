"""How well scores tell matching pairs from others: FPR95, ROC-AUC, average precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kglmatch.errors import DataError


def _ranked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores in falling order (N,) with their labels (N,), checked."""
    score = np.asarray(scores, dtype=np.float64)
    label = np.asarray(labels)
    if score.ndim != 1 or label.shape != score.shape:
        raise DataError(f"scores and labels must be (N,) alike, got {score.shape} and {label.shape}")
    if not np.isfinite(score).all():
        raise DataError("scores hold NaN or infinite values")
    if not np.isin(label, (0, 1)).all():
        raise DataError("labels must be 1 (matching) or 0 (non-matching)")
    label = label.astype(bool)
    if label.all() or not label.any():
        raise DataError("labels must hold both matching (1) and non-matching (0) pairs")
    order = np.argsort(-score, kind="stable")
    return score[order], label[order]


def _accepted(
    score: NDArray[np.float64], label: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Matching pairs and all pairs (T,) accepted at each distinct threshold, from the strictest on.

    Pairs of one score are accepted together: the lists are cut only where the score changes.
    """
    cut = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    return np.cumsum(label)[cut], cut + 1


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rate at every distinct threshold, from none accepted to all.

    Args:
        scores: (N,), higher means "match". Pass minus the distance for descriptors.
        labels: (N,), 1 for matching pairs.

    Returns:
        false positive rates (T,) and true positive rates (T,), both rising from 0 to 1.

    Raises:
        DataError: shapes differ, a score is not finite, a label is not 0 or 1, or only one of the
            two is there.
    """
    true, accepted = _accepted(*_ranked(scores, labels))
    false = accepted - true
    tpr = np.append(0.0, true / true[-1])
    fpr = np.append(0.0, false / false[-1])
    return fpr, tpr


def fpr_at_recall(scores: ArrayLike, labels: ArrayLike, recall: float = 0.95) -> float:
    """Share of non-matching pairs accepted where more than `recall` of the matching ones are.

    The threshold is the strictest that accepts so many; pairs of equal score are accepted together.
    With `recall=0.95` this is FPR95, the false positive rate at 95 % recall, as the published code of
    KGL-Net computes it. Where 95 % of the matching pairs is a whole number, codes that stop at "at
    least 95 %" need one matching pair fewer and may report a slightly lower figure.

    Args:
        scores: (N,), higher means "match".
        labels: (N,), 1 for matching pairs.
        recall: between 0 and 1, both excluded.

    Returns:
        a share in [0, 1].

    Raises:
        DataError: as for `roc_curve`; a recall out of range.
    """
    if not 0 < recall < 1:
        raise DataError(f"recall must be between 0 and 1, got {recall}")
    fpr, tpr = roc_curve(scores, labels)
    return float(fpr[np.searchsorted(tpr, recall, side="right")])


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a matching pair scores above a non-matching one.

    Pairs of equal score count half. Arguments and errors as for `roc_curve`.
    """
    fpr, tpr = roc_curve(scores, labels)
    return float(np.trapezoid(tpr, fpr))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean precision over the matching pairs, each at the threshold that first accepts it.

    Arguments and errors as for `roc_curve`.
    """
    true, accepted = _accepted(*_ranked(scores, labels))
    gained = np.diff(true, prepend=0)
    return float((true / accepted * gained).sum() / true[-1])
