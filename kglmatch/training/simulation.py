"""A sensor that does not exist: colour patches seen through a random smooth spectral response.

Each patch gets a response of its own, a small random network of red, green and blue that may turn edges
round or make them vanish, and a smooth field of "heat" that the visible image does not show. The pairs are
registered exactly, and there is no end of them. Other differences between sensors (blur, noise, speckle)
are added by `kglmatch.training.augmentation`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kglmatch.training.augmentation import Draws

HIDDEN = 6
_HEAT_CELLS = 5  # of the coarse grid that the heat field is drawn on
_MOST_HEAT = 0.8  # standard deviations of the response
_CONTRAST = (0.06, 0.25)  # standard deviation of the simulated patch, of the full range


def simulate(colour: Tensor, draws: Draws) -> Tensor:
    """Patches of the simulated sensor.

    Args:
        colour: (N, 3, W, W) in [0, 1].
        draws: of the N rows.

    Returns:
        (N, 1, W, W) in [0, 1].
    """
    n, size = len(colour), colour.shape[-1]
    pixels = standardise(colour).flatten(2)
    weights = draws.normal(HIDDEN, 3) * draws.uniform(0.3, 1.2, 1, 1)
    response = torch.tanh(weights @ pixels + draws.normal(HIDDEN, 1))
    response = (draws.normal(1, HIDDEN) @ response).view(n, 1, size, size)
    heat = draws.normal(1, _HEAT_CELLS, _HEAT_CELLS) * draws.uniform(0, _MOST_HEAT, 1, 1, 1)
    heat = F.interpolate(heat, size=(size, size), mode="bicubic", align_corners=True)
    seen = standardise(standardise(response) + heat)
    return (0.5 + draws.uniform(*_CONTRAST, 1, 1, 1) * seen).clamp(0, 1)


def standardise(x: Tensor) -> Tensor:
    """(N, C, H, W), each patch of mean 0 and standard deviation 1 over all its values."""
    spread, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    return (x - mean) / spread.clamp_min(1e-3)
