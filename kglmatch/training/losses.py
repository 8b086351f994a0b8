"""The terms of the training objective, one function each.

Source: HyNet's hybrid loss (Tian et al., NeurIPS 2020) and KGL-Net's feature-guided loss and metric
loss (arXiv 2412.11161). Sums and means are as in the published code: the descriptor terms are sums
over the batch, the others means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Descriptors nearer than this are taken for the same place seen twice, not for a negative.
FALSE_NEGATIVE_DISTANCE = 8e-3
_FAR = 10.0  # farther than any two unit vectors are


def descriptor_distances(a: Tensor, b: Tensor) -> Tensor:
    """L2 distances of unit vectors, (N, D) and (M, D) -> (N, M), with finite gradients at zero."""
    return (2.0 - 2.0 * a @ b.T).clamp_min(1e-12).sqrt()


def mask_false_negatives(distances: Tensor, same_place: Tensor) -> Tensor:
    """(N, N) distances with everything that is no negative put out of reach; see `false_negatives`."""
    return distances.masked_fill(false_negatives(distances, same_place), _FAR)


def false_negatives(distances: Tensor, same_place: Tensor) -> Tensor:
    """Which of the pairs of a batch are no negatives, (N, N) bool.

    Args:
        distances: (N, N) descriptor distances.
        same_place: (N, N) bool, true where row and column show the same place (the diagonal, and
            overlapping patches of one image).
    """
    return same_place | (distances.detach() < FALSE_NEGATIVE_DISTANCE)


def hybrid_triplet_loss(
    vis: Tensor, ir: Tensor, same_place: Tensor | None = None, *, margin: float = 1.2, alpha: float = 2.0
) -> Tensor:
    """HyNet's triplet loss with the hardest of four negatives a pair, summed over the batch.

    The hybrid measure of a distance d is ``alpha * d^2 / 2 + d``. For pair i the negative is the
    nearest of: another ir to vis i, another vis to ir i, another vis to vis i, another ir to ir i.

    Args:
        vis, ir: (N, D) L2-normalised descriptors, row by row matching.
        same_place: (N, N) bool, see `false_negatives`; the diagonal if None.

    Returns:
        scalar; 0 for a single pair, which has no negatives.
    """
    if same_place is None:
        same_place = torch.eye(len(vis), dtype=torch.bool, device=vis.device)
    across = descriptor_distances(vis, ir)
    positive = across.diagonal()
    across = mask_false_negatives(across, same_place)
    negative = torch.stack(
        [
            across.amin(1),
            across.amin(0),
            mask_false_negatives(descriptor_distances(vis, vis), same_place).amin(1),
            mask_false_negatives(descriptor_distances(ir, ir), same_place).amin(1),
        ]
    ).amin(0)

    def hybrid(d: Tensor) -> Tensor:
        return alpha * d.square() / 2 + d

    return (margin + hybrid(positive) - hybrid(negative)).clamp_min(0).sum()


def norm_loss(raw_vis: Tensor, raw_ir: Tensor) -> Tensor:
    """Squared difference of the norms of matching raw descriptors (N, D), summed over the batch."""
    return (raw_vis.norm(dim=1) - raw_ir.norm(dim=1)).square().sum()


def feature_guided_loss(descriptor_map: Tensor, metric_map: Tensor) -> Tensor:
    """Mean squared error between the two branches' maps (N, C, S, S) of one modality."""
    return F.mse_loss(metric_map, descriptor_map)


def descriptor_distillation_loss(descriptors: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of unit vectors (N, D) from a teacher's, summed over the batch."""
    return (descriptors - targets).square().sum()


def metric_distillation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits (N,) against a teacher's probabilities, less the teacher's own entropy.

    Args:
        targets: (N,) logits of the teacher. The least value, 0, is reached where both are equal.
    """
    probability = torch.sigmoid(targets)
    entropy = F.binary_cross_entropy_with_logits(targets, probability, reduction="none")
    return (F.binary_cross_entropy_with_logits(logits, probability, reduction="none") - entropy).mean()


def metric_loss(positive_logits: Tensor, negative_logits: Tensor) -> Tensor:
    """Binary cross-entropy of the metric head over matching (N,) and other (M,) pairs.

    The mean over each kind, and of the two: however many negatives there are, both kinds weigh the same.
    """
    return (F.softplus(-positive_logits).mean() + F.softplus(negative_logits).mean()) / 2
