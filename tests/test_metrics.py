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
    with pytest.raises(DataError, match="recall"):
        metrics.bootstrap_fpr([1, 2], [0, 1], [0, 1], recalls=[0.5, 1])
    with pytest.raises(DataError, match="images"):
        metrics.bootstrap_fpr([1, 2], [0, 1], [0])


def images_of_pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    images = random.integers(0, 7, 400)
    labels = random.random(400) < 0.4
    return np.round(random.normal(size=400) + labels + 0.3 * images, 1), labels, images


def test_a_bootstrap_is_the_measure_on_repeated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels, images = images_of_pairs()
    recalls = (0.95, 0.8, 0.5)
    found = metrics.bootstrap_fpr(scores, labels, images, recalls, resamples=40, seed=5)
    assert found is not None
    draws = np.random.RandomState(5).multinomial(7, np.full(7, 1 / 7), 40)
    for rates, draw in zip(found, draws, strict=True):
        # The slow way: each image's pairs as often as it was drawn.
        rows = np.concatenate([np.tile(np.flatnonzero(images == i), n) for i, n in enumerate(draw)])
        expected = [metrics.fpr_at_recall(scores[rows], labels[rows], recall) for recall in recalls]
        np.testing.assert_allclose(rates, expected, atol=1e-12)
    monkeypatch.setattr(metrics, "_CHUNK", 1000)
    again = metrics.bootstrap_fpr(scores, labels, images.astype(str), recalls, resamples=40, seed=5)
    np.testing.assert_array_equal(found, again)


def test_a_bootstrap_over_one_image_is_none_and_no_other_pairs_give_nan() -> None:
    assert metrics.bootstrap_fpr([3, 2, 1], [1, 0, 0], [0, 0, 1]) is None
    # All non-matching pairs are in one image: a resample without it has no rate.
    found = metrics.bootstrap_fpr([3, 2, 1], [1, 1, 0], [0, 1, 1], resamples=200)
    assert found is not None
    assert set(found[~np.isnan(found)]) == {0}
    assert 0 < np.isnan(found).mean() < 0.5


def test_an_interval_over_images_is_wider_than_one_over_pairs() -> None:
    # Scores of an image move together, so that its pairs are no independent evidence.
    random = np.random.default_rng(4)
    images, labels = np.repeat(np.arange(12), 100), np.arange(1200) % 2 == 0
    scores = 2 * labels + random.normal(size=1200) + random.normal(size=12)[images]
    over_images, over_pairs = (
        metrics.bootstrap_fpr(scores, labels, groups) for groups in (images, np.arange(1200) // 2)
    )
    assert over_images is not None
    assert over_pairs is not None
    widths = [np.ptp(np.percentile(found, (2.5, 97.5))) for found in (over_images, over_pairs)]
    assert widths[0] > 1.5 * widths[1]
