"""A wider network that starts as good as a narrower one: its further channels are copies of the first ones.

Source: Net2Net (Chen, Goodfellow & Shlens, ICLR 2016).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from kglmatch.models.config import KGLNetConfig
from kglmatch.models.network import attention_kernel

# Relative, of the weights of a convolution: copies that get the same gradients would stay copies.
_NOISE = 0.05
_BLOCK = re.compile(r"block(\d)\.(.+)")


def is_wider(network: KGLNetConfig, parent: KGLNetConfig) -> bool:
    """Whether a network has more channels than its parent in some blocks, fewer in none, and equal maps."""
    return (
        network.channels != parent.channels
        and network.map_channels == parent.map_channels
        and all(ours >= theirs for ours, theirs in zip(network.channels, parent.channels, strict=True))
    )


def widen(
    weights: Mapping[str, Tensor], parent: KGLNetConfig, network: KGLNetConfig, *, seed: int = 0
) -> dict[str, Tensor]:
    """The weights of a narrower network for a wider one.

    The answers are nearly the same: but for a little noise, and for the channel attention, which sees other
    neighbours where the copies begin.

    Args:
        weights: state dict of the parent.
        parent, network: as `is_wider` asks.
        seed: of the noise.

    Returns:
        a state dict with `network.channels`.
    """
    generator = torch.Generator().manual_seed(seed)
    # Which channel of the parent each channel is.
    sources = [
        torch.arange(ours) % theirs for ours, theirs in zip(network.channels, parent.channels, strict=True)
    ]
    widened = dict(weights)
    for key, value in weights.items():
        found = _BLOCK.search(key)
        if found is None:
            continue
        block, name = int(found[1]) - 1, found[2]
        own = sources[block]
        if name == "conv.weight":
            wider = value[own]
            if block:
                # Each copy brings its share of what one channel brought.
                before = sources[block - 1]
                wider = wider[:, before] / torch.bincount(before)[before, None, None]
            noise = torch.randn(wider.shape, generator=generator)
            widened[key] = wider * (1 + _NOISE * noise.to(wider.dtype))
        elif name == "conv.bias":
            widened[key] = value[own]
        elif name == "attention.conv.weight":
            longer = attention_kernel(network.channels[block]) - value.shape[-1]
            widened[key] = F.pad(value, (longer // 2, longer // 2))
        elif not name.startswith("input_"):  # norm and activation, (1, C, 1, 1)
            widened[key] = value[:, own]
    return widened
