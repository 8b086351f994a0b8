"""Each loss and each choice of negatives, against what its definition says."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kglmatch.errors import DataError
from kglmatch.training import losses, mining


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def diagonal(n):
    return torch.eye(n, dtype=torch.bool)


def test_distances_are_euclidean_and_differentiable_at_zero():
    a = unit(5, 128).requires_grad_()
    b = torch.cat([a.detach()[:2], unit(3, 128, seed=1)])
    distances = losses.descriptor_distances(a, b)
    assert torch.allclose(distances, torch.cdist(a, b), atol=2e-3)
    distances.sum().backward()
    assert torch.isfinite(a.grad).all()


def test_triplet_loss_is_the_one_of_the_definition():
    vis, ir = unit(7, 16), unit(7, 16, seed=1)
    expected = 0.0
    for i in range(7):
        others = [j for j in range(7) if j != i]
        negative = min(
            math.dist(a.tolist(), b.tolist())
            for j in others
            for a, b in ((vis[i], ir[j]), (vis[j], ir[i]), (vis[i], vis[j]), (ir[i], ir[j]))
        )
        positive = math.dist(vis[i].tolist(), ir[i].tolist())
        hybrid = [2.0 * d**2 / 2 + d for d in (positive, negative)]
        expected += max(0.0, 1.2 + hybrid[0] - hybrid[1])
    assert losses.hybrid_triplet_loss(vis, ir).item() == pytest.approx(expected, rel=1e-5)
    assert losses.hybrid_triplet_loss(vis, ir, margin=0.0).item() < expected


def test_triplet_loss_of_far_pairs_is_zero_and_of_one_pair_too():
    apart = torch.eye(4, 8)
    assert losses.hybrid_triplet_loss(apart, apart).item() == 0
    assert losses.hybrid_triplet_loss(unit(1, 8), unit(1, 8, seed=1)).item() == 0


def test_the_same_place_twice_is_no_negative():
    vis, ir = unit(4, 16), unit(4, 16, seed=1)
    vis[1] = F.normalize(vis[0] + 0.05 * unit(16, seed=2), dim=0)  # a near copy of the first
    plain = losses.hybrid_triplet_loss(vis, ir)
    same = diagonal(4)
    same[0, 1] = same[1, 0] = True
    assert losses.hybrid_triplet_loss(vis, ir, same).item() < plain.item() - 0.5


def test_descriptors_that_coincide_are_taken_for_the_same_place():
    distances = torch.tensor([[0.5, 0.007, 1.1], [0.9, 0.4, 0.0], [0.3, 0.009, 0.2]])
    masked = losses.mask_false_negatives(distances, diagonal(3))
    assert masked.argmin(1).tolist() == [2, 0, 1]
    assert (masked > 2).tolist() == [[True, True, False], [False, True, True], [False, False, True]]


def test_norm_loss():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert losses.norm_loss(a, b).item() == pytest.approx((5 - 1) ** 2)


def test_feature_guided_loss_pulls_both_branches_together():
    a, b = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4, requires_grad=True)
    loss = losses.feature_guided_loss(a, b)
    assert loss.item() == pytest.approx((a - b).square().mean().item(), rel=1e-5)
    loss.backward()
    assert torch.allclose(a.grad, -b.grad) and a.grad.abs().sum() > 0


def test_metric_loss_weighs_matching_and_other_pairs_alike():
    positive, negative = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0, 0.0, 1.0])
    expected = -(torch.sigmoid(positive).log().sum() / 2 + (1 - torch.sigmoid(negative)).log().sum() / 4) / 2
    assert losses.metric_loss(positive, negative).item() == pytest.approx(expected.item(), rel=1e-6)
    # With one negative a pair it is the plain mean over all pairs, which is the published loss.
    logits, labels = torch.cat([positive, negative[:2]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    published = F.binary_cross_entropy_with_logits(logits, labels)
    assert losses.metric_loss(positive, negative[:2]).item() == pytest.approx(published.item(), rel=1e-6)


def test_distillation_is_zero_at_the_teacher_and_pulls_towards_it():
    ours, theirs = unit(5, 16), unit(5, 16, seed=1)
    assert losses.descriptor_distillation_loss(theirs, theirs) == 0
    expected = sum(math.dist(a, b) ** 2 for a, b in zip(ours.tolist(), theirs.tolist(), strict=True))
    assert losses.descriptor_distillation_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-5)

    targets = torch.tensor([-3.0, 0.0, 2.0])
    logits = targets.clone().requires_grad_()
    assert losses.metric_distillation_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)
    logits = torch.zeros(3, requires_grad=True)
    loss = losses.metric_distillation_loss(logits, targets)
    p = torch.sigmoid(targets)
    # Of a coin against the teacher's belief: the Kullback-Leibler divergence.
    divergence = math.log(2) + (p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    assert loss.item() == pytest.approx(divergence, rel=1e-5)
    loss.backward()
    assert torch.allclose(logits.grad, (0.5 - p) / 3)


def test_hard_negatives_are_the_nearest_of_another_place():
    distances = torch.tensor([[0.1, 0.5, 0.3, 0.9], [0.2, 0.1, 0.6, 0.7], [1.0, 0.9, 0.0, 0.8], [0.4] * 4])
    same = diagonal(4)
    same[0, 2] = same[2, 0] = True
    assert mining.hard_negatives(distances, same).tolist() == [[1], [0], [3], [0]]


def test_several_hard_negatives_come_nearest_first():
    distances = torch.tensor(
        [[0.1, 0.5, 0.3, 0.9], [0.2, 0.1, 0.6, 0.7], [1.0, 0.9, 0.0, 0.8], [0.4, 0.3, 0.2, 0]]
    )
    assert mining.hard_negatives(distances, diagonal(4), 2).tolist() == [[2, 1], [0, 2], [3, 1], [2, 1]]
    assert mining.hard_negatives(distances, diagonal(4), 3)[0].tolist() == [2, 1, 3]
    assert mining.hard_negatives(distances, diagonal(4), 0).shape == (4, 0)
    assert mining.random_negatives(diagonal(4), 0).shape == (4, 0)
    assert mining.hard_negatives(distances[:0, :0], diagonal(0), 2).shape == (0, 2)


def test_several_random_negatives_do_not_repeat():
    drawn = mining.random_negatives(diagonal(5), 4, torch.Generator().manual_seed(0))
    assert [sorted(row) for row in drawn.tolist()] == [[j for j in range(5) if j != i] for i in range(5)]


def test_too_few_patches_of_other_places_are_an_error_and_never_labelled_negative():
    distances, same = torch.rand(3, 3) + 0.1, diagonal(3)
    same[1] = True  # every patch shows the place of the second
    for mine in (
        lambda count: mining.hard_negatives(distances, same, count),
        lambda count: mining.random_negatives(same, count),
    ):
        with pytest.raises(DataError, match=r"has 0 others of another place .* and 1 negatives") as error:
            mine(1)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"has 2 others .* and 3 negatives"):
        mining.random_negatives(diagonal(3), 3)
    # Descriptors that coincide are taken for one place, and so they leave none either.
    with pytest.raises(DataError, match="has 0 others"):
        mining.hard_negatives(torch.zeros(3, 3), diagonal(3))


def test_random_negatives_are_of_another_place_and_all_of_them_come():
    same = diagonal(6)
    same[0, 1:4] = True
    drawn = torch.stack(
        [mining.random_negatives(same, 1, torch.Generator().manual_seed(seed))[:, 0] for seed in range(60)]
    )
    for row in range(6):
        assert set(drawn[:, row].tolist()) == set((~same[row]).nonzero().flatten().tolist())
    again = mining.random_negatives(same, 1, torch.Generator().manual_seed(3))
    assert again[:, 0].tolist() == drawn[3].tolist()
