"""How well scores separate matching pairs from others: FPR95 and its interval, ROC-AUC, average precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kglmatch.errors import DataError

RESAMPLES = 1000
# Values of a bootstrap's cumulative counts that are held at once.
_CHUNK = 4_000_000


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
    """Matching pairs and all pairs (T,) accepted at each distinct threshold, the strictest first.

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

    The threshold is the strictest that accepts that share; pairs of equal score are accepted together.
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
    _check_recall(recall)
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


def bootstrap_fpr(
    scores: ArrayLike,
    labels: ArrayLike,
    images: ArrayLike,
    recalls: Sequence[float] = (0.95,),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray[np.float64] | None:
    """`fpr_at_recall` on data sets whose images are drawn from this one's with replacement.

    Pairs of one image resemble each other, so that an interval over pairs would be too narrow. Each
    resample draws as many images as there are; an image that is drawn twice counts twice, with all of its
    pairs. The percentiles 2.5 and 97.5 of the result bound the 95 % interval.

    Args:
        scores, labels: (N,), as for `fpr_at_recall`.
        images: (N,), which image each pair is from: numbers or names.
        recalls: R of them, each between 0 and 1, both excluded.
        resamples: S, how many data sets are drawn.
        seed: of the draws, which do not depend on the scores.

    Returns:
        shares (S, R) in [0, 1], NaN where a resample holds no non-matching pair; None with fewer than two
        images that hold matching pairs.

    Raises:
        DataError: as for `fpr_at_recall`; images that do not fit the scores.
    """
    _ranked(scores, labels)  # checks
    for recall in recalls:
        _check_recall(recall)
    score, label = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    names = np.asarray(images)
    if names.shape != score.shape:
        raise DataError(f"images must be {score.shape}, got {names.shape}")
    # An image without a matching pair would leave resamples that hold none.
    known, image = np.unique(names[label], return_inverse=True)
    count = len(known)
    if count < 2:
        return None
    draws = np.random.RandomState(seed).multinomial(count, np.full(count, 1 / count), resamples)
    order = np.argsort(-score[label], kind="stable")
    matching, of = score[label][order], image[order]
    at = _resampled_thresholds(matching, of, draws, recalls)
    accepted, total = np.zeros(at.shape), np.zeros((resamples, 1))
    for i, name in enumerate(known):
        others = np.sort(score[~label & (names == name)])
        accepted += draws[:, i, None] * (len(others) - np.searchsorted(others, at))
        total += draws[:, i, None] * len(others)
    with np.errstate(invalid="ignore"):
        rates: NDArray[np.float64] = accepted / total
    return rates


def _resampled_thresholds(
    scores: NDArray[np.float64], image: NDArray[np.int64], draws: NDArray[np.int64], recalls: Sequence[float]
) -> NDArray[np.float64]:
    """The strictest thresholds (S, R) that accept more than each recall of the resampled matching pairs.

    Args:
        scores: (P,) of the matching pairs, falling.
        image: (P,), which image each is from.
        draws: (S, K), how often each image is in each resample.
    """
    found = np.empty((len(draws), len(recalls)))
    step = max(1, _CHUNK // len(scores))
    for start in range(0, len(draws), step):
        part = slice(start, start + step)
        accepted = np.cumsum(draws[part][:, image], axis=1)
        share = accepted / accepted[:, -1:]
        for i, recall in enumerate(recalls):
            found[part, i] = scores[(share > recall).argmax(axis=1)]
    return found


def _check_recall(recall: float) -> None:
    if not 0 < recall < 1:
        raise DataError(f"recall must be between 0 and 1, got {recall}")


def decision_errors(scores: ArrayLike, labels: ArrayLike) -> float:
    """What decisions are compared by, in percent, lower is better: FPR95, and the area above the ROC curve.

    The area breaks ties between decisions whose FPR95 is low.

    Args:
        scores: (N,), higher means "match".
        labels: (N,), 1 for matching pairs.

    Raises:
        DataError: as for `roc_curve`.
    """
    return 100 * (fpr_at_recall(scores, labels) + 1 - roc_auc(scores, labels))
