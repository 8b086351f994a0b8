"""FPR95, ROC-AUC and average precision against hand-counted cases and published figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kglmatch.errors import DataError
from kglmatch.evaluation import metrics

PARITY = Path(__file__).parents[2] / "shared" / "parity" / "fpr95.npz"


def test_fpr95_is_the_published_one() -> None:
    if not PARITY.exists():
        pytest.skip("../shared/parity is not here")
    with np.load(PARITY) as file:
        ours = metrics.fpr_at_recall(file["score"], file["label"])
        assert ours == pytest.approx(float(file["fpr95_by_sorting"]), abs=1e-12)
        assert ours == pytest.approx(float(file["fpr95_by_interpolation"]), abs=1e-12)


def test_fpr95_by_hand() -> None:
    # 20 matching pairs with scores 20 .. 1: more than 95 % of them is all 20, down to score 1.
    scores = np.concatenate([np.arange(20, 0, -1), [30, 1.5, 0.5, 0.1]])
    labels = np.array([1] * 20 + [0] * 4)
    assert metrics.fpr_at_recall(scores, labels) == 2 / 4
    # At 90 %: 19 of 20, down to score 2.
    assert metrics.fpr_at_recall(scores, labels, 0.90) == 1 / 4


def test_pairs_of_equal_score_are_accepted_together() -> None:
    labels = np.array([1, 0] * 50)
    same = np.zeros(100)
    assert metrics.fpr_at_recall(same, labels) == 1
    assert metrics.roc_auc(same, labels) == 0.5
    assert metrics.average_precision(same, labels) == 0.5


def test_order_of_the_pairs_does_not_matter() -> None:
    random = np.random.default_rng(0)
    labels = random.random(300) < 0.4
    scores = np.round(random.normal(size=300) + labels, 1)  # many ties
    order = random.permutation(300)
    for measure in (metrics.fpr_at_recall, metrics.roc_auc, metrics.average_precision):
        assert measure(scores, labels) == measure(scores[order], labels[order])


def test_roc_auc_counts_pairs_in_the_right_order() -> None:
    random = np.random.default_rng(1)
    labels = random.random(80) < 0.5
    scores = np.round(random.normal(size=80) + 0.5 * labels, 1)
    matching, other = scores[labels][:, None], scores[~labels][None, :]
    expected = (matching > other).mean() + 0.5 * (matching == other).mean()
    assert metrics.roc_auc(scores, labels) == pytest.approx(expected)


def test_average_precision_by_hand() -> None:
    assert metrics.average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.average_precision([4, 3, 2, 1], [1, 1, 0, 0]) == 1


def test_perfect_and_reversed() -> None:
    scores, labels = np.arange(10), np.repeat([0, 1], 5)
    assert metrics.fpr_at_recall(scores, labels) == 0
    assert metrics.roc_auc(scores, labels) == 1
    assert metrics.fpr_at_recall(-scores, labels) == 1
    assert metrics.roc_auc(-scores, labels) == 0


def test_roc_curve_runs_from_corner_to_corner() -> None:
    fpr, tpr = metrics.roc_curve([3, 1, 2, 2], [1, 0, 1, 0])
    np.testing.assert_allclose(fpr, [0, 0, 0.5, 1])
    np.testing.assert_allclose(tpr, [0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("scores", "labels", "word"),
    [
        ([1, 2], [1, 0, 1], "alike"),
        ([[1, 2]], [[1, 0]], "alike"),
        ([1, np.nan], [1, 0], "NaN"),
        ([1, 2], [1, 1], "both"),
        ([1, 2], [1, -1], "labels must be 1"),
        ([], [], "both"),
    ],
)
def test_bad_input(scores: list[float], labels: list[int], word: str) -> None:
    with pytest.raises(DataError, match=word):
        metrics.roc_curve(scores, labels)


def test_bad_recall() -> None:
    with pytest.raises(DataError, match="recall"):
        metrics.fpr_at_recall([1, 2], [0, 1], recall=95)
