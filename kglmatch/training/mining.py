"""Which non-matching pairs the metric head is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from kglmatch.training.losses import mask_false_negatives


def hard_negatives(distances: Tensor, same_place: Tensor) -> Tensor:
    """HNSM-M: for each visible patch the ir patch that the *descriptors* hold nearest, among the others.

    Args:
        distances: (N, N) descriptor distances, visible rows, ir columns.
        same_place: (N, N) bool, true where the pair shows the same place.

    Returns:
        (N,) int64 columns.
    """
    return mask_false_negatives(distances.detach(), same_place).argmin(1)


def random_negatives(same_place: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each visible patch a random ir patch of another place.

    Args:
        same_place: (N, N) bool, as for `hard_negatives`.
        generator: source of the draw, on the matrix's device.

    Returns:
        (N,) int64 columns.
    """
    draw = torch.rand(same_place.shape, generator=generator, device=same_place.device)
    return draw.masked_fill(same_place, -1).argmax(1)
