"""Which non-matching pairs the metric head is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from kglmatch.errors import DataError
from kglmatch.training.losses import false_negatives


def hard_negatives(distances: Tensor, same_place: Tensor, count: int = 1) -> Tensor:
    """HNSM-M: for each visible patch the ir patches that the *descriptors* hold nearest, among the others.

    Args:
        distances: (N, N) descriptor distances, visible rows, ir columns.
        same_place: (N, N) bool, true where the pair shows the same place.
        count: K, negatives for each row; the paper's is 1.

    Returns:
        (N, K) int64 columns, nearest first.

    Raises:
        DataError: a row with fewer than K patches that are of another place and have another descriptor.
    """
    distances = distances.detach()
    excluded = false_negatives(distances, same_place)
    return _first(distances.masked_fill(excluded, torch.inf), excluded, count)


def random_negatives(same_place: Tensor, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """For each visible patch random ir patches of other places, without repeats.

    Args:
        same_place: (N, N) bool, as for `hard_negatives`.
        count: K, negatives for each row.
        generator: source of the draw, on the matrix's device.

    Returns:
        (N, K) int64 columns.

    Raises:
        DataError: as for `hard_negatives`.
    """
    draw = torch.rand(same_place.shape, generator=generator, device=same_place.device)
    return _first(draw.masked_fill(same_place, torch.inf), same_place, count)


def _first(rank: Tensor, excluded: Tensor, count: int) -> Tensor:
    """Columns (N, count) of the lowest ranks of each row."""
    if not count or not len(rank):
        return torch.empty(len(rank), count, dtype=torch.int64, device=rank.device)
    least = int((~excluded).sum(1).min())
    if least < count:
        raise DataError(
            f"a patch of this batch has {least} others of another place and another descriptor, and {count} "
            "negatives were asked for; enlarge the batch, use more images, or ask for fewer negatives"
        )
    if count == 1:
        return rank.argmin(1, keepdim=True)  # of equal ranks the first, as in the published code
    return rank.topk(count, dim=1, largest=False).indices
