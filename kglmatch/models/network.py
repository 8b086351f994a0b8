"""KGL-Net and its layers: patches in, descriptors, metric maps and match probabilities out.

Source: Yu, Liu, Zhao, Yue: "Why and How: Knowledge-Guided Learning for Cross-Spectral Image Patch
Matching", arXiv 2412.11161.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kglmatch.models.config import BLOCKS, KGLNetConfig

FRN_EPS = 1e-6


class FRN(nn.Module):
    """Filter response normalisation (Singh & Krishnan, CVPR 2020), per sample and channel.

    ``x / sqrt(mean over H, W of x^2 + 1e-6) * weight + bias``. The mean is taken in float32
    whatever the input's precision, because squares overflow float16.

    Shape: (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def scale(self, x: Tensor) -> Tensor:
        """The division and the weight as one factor a channel: (N, C, H, W) -> (N, C, 1, 1)."""
        mean_square = _mean_square(x) if torch.is_grad_enabled() else _mean_square_inference(x)
        scale: Tensor = self.weight.float() * torch.rsqrt(mean_square + FRN_EPS)
        return scale.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(x.dtype), x, self.scale(x))


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean(dim=(2, 3), keepdim=True)


def _mean_square_inference(x: Tensor) -> Tensor:
    # The norm reads the map once and writes nothing of its size, but on the CPU it is slow in the
    # channels-last layout: 1.8 GB/s against 4.0 GB/s by two passes.
    if not (x.is_cuda or x.is_contiguous()):
        return _mean_square(x)
    norm: Tensor = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.float32)
    return norm.square() / (x.shape[2] * x.shape[3])


class TLU(nn.Module):
    """Thresholded linear unit (Singh & Krishnan, CVPR 2020): ``max(x, tau)``, tau per channel.

    Shape: (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.full((1, channels, 1, 1), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.tau.to(x.dtype))


def normalize_activate(x: Tensor, norm: FRN, activation: TLU) -> Tensor:
    """FRN, then TLU, of a map that nobody else holds; without gradients it is overwritten.

    Writing in place spares two new maps, whose first touch costs more than the arithmetic.

    Shape: (N, C, H, W) -> (N, C, H, W)
    """
    if torch.is_grad_enabled():
        x = activation(norm(x))
        return x
    torch.addcmul(norm.bias.to(x.dtype), x, norm.scale(x), out=x)
    return x.clamp_(min=activation.tau.to(x.dtype))


def attention_kernel(channels: int) -> int:
    """How many neighbours ECA's convolution reads: ``int((log2(C) + 1) / 2)``, plus one if even."""
    kernel = int((math.log2(channels) + 1) / 2)
    return kernel + 1 - kernel % 2


class ECA(nn.Module):
    """Efficient channel attention (Wang et al., CVPR 2020).

    Each channel is scaled by a sigmoid of a one-dimensional convolution over its neighbours' means.

    Shape: (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = attention_kernel(channels)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().mean(dim=(2, 3)).to(x.dtype)
        weight = torch.sigmoid(self.conv(mean.unsqueeze(1))).squeeze(1)
        return x * weight[:, :, None, None]


class ConvBlock(nn.Module):
    """3x3 convolution, FRN, TLU and, if asked for, channel attention.

    Args:
        normalize_input: pass the input through FRN and TLU first (the first block does, so that
            brightness and contrast of a patch do not matter).

    Shape: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        attention: bool = False,
        normalize_input: bool = False,
    ) -> None:
        super().__init__()
        self.input_norm = FRN(in_channels) if normalize_input else None
        self.input_activation = TLU(in_channels) if normalize_input else None
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm = FRN(out_channels)
        self.activation = TLU(out_channels)
        self.attention = ECA(out_channels) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        if self.input_norm is not None and self.input_activation is not None:
            x = self.input_activation(self.input_norm(x))
        # The input may come in float32 to half-precision weights; it is normalised by now.
        x = self.conv(x.to(self.conv.weight.dtype))
        x = normalize_activate(x, self.norm, self.activation)
        return x if self.attention is None else self.attention(x)


def conv_blocks(config: KGLNetConfig, first: int, last: int) -> nn.Sequential:
    """Blocks `first` to `last` of the eight, both counted from 1 and included; empty if last < first."""
    blocks = nn.Sequential()
    for i in range(first - 1, last):
        blocks.add_module(
            f"block{i + 1}",
            ConvBlock(
                config.channels[i - 1] if i else 1,
                config.channels[i],
                stride=config.strides[i],
                attention=i % 2 == 1,
                normalize_input=i == 0,
            ),
        )
    return blocks


class PerModality(nn.Module):
    """One module for each modality (pseudo-Siamese), or a single one for both (Siamese)."""

    def __init__(self, make: Callable[[], nn.Module], *, shared: bool) -> None:
        super().__init__()
        if shared:
            self.shared = make()
        else:
            self.vis = make()
            self.ir = make()
        self.is_shared = shared

    def select(self, modality: str) -> nn.Module:
        """The module that serves a modality."""
        return self.shared if self.is_shared else self.vis if modality == "vis" else self.ir

    def forward(self, x: Tensor, modality: str) -> Tensor:
        out: Tensor = self.select(modality)(x)
        return out


class DescriptorHead(nn.Module):
    """Descriptor map -> raw descriptor, before L2 normalisation.

    Shape: (N, C, S, S) -> (N, D), S = patch size / 8, C = 256 in the paper's network
    """

    def __init__(self, config: KGLNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.map_channels, config.descriptor_dim, config.map_size)
        self.norm = nn.BatchNorm2d(config.descriptor_dim)

    def forward(self, descriptor_map: Tensor) -> Tensor:
        raw: Tensor = self.norm(self.conv(descriptor_map))
        return raw.flatten(1)


def compare_maps(map_vis: Tensor, map_ir: Tensor, with_product: bool) -> Tensor:
    """What the metric head's convolution reads.

    Shape: (N, C, S, S), (N, C, S, S) -> (N, C, S, S), or with the product (N, 2 C, S, S)
    """
    difference = (map_vis - map_ir).abs()
    return torch.cat([difference, map_vis * map_ir], 1) if with_product else difference


class MetricHead(nn.Module):
    """A pair of metric maps -> the logit of "these two patches match", row by row.

    It reads their absolute difference, and with `head_input="difference-product"` their product as well.

    FRN divides by the size of the difference, which is itself evidence; `head_norm="none"` keeps it.

    Shape: (N, C, S, S), (N, C, S, S) -> (N,)
    """

    def __init__(self, config: KGLNetConfig) -> None:
        super().__init__()
        channels = config.map_channels
        self.has_product = config.head_has_product
        self.conv = nn.Conv2d(config.head_channels, channels, 3, padding=1)
        self.norm = FRN(channels) if config.head_norm == "frn" else None
        self.activation = TLU(channels)
        self.fc1 = nn.Linear(channels, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, 1)

    def forward(self, map_vis: Tensor, map_ir: Tensor) -> Tensor:
        x = self.conv(compare_maps(map_vis, map_ir, self.has_product))
        x = self.activation(x) if self.norm is None else normalize_activate(x, self.norm, self.activation)
        x = x.float().mean(dim=(2, 3)).to(x.dtype)
        logit: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return logit.flatten()


class BranchOutputs(NamedTuple):
    """What training needs of one modality's patches."""

    raw_descriptor: Tensor  # (N, D), before L2 normalisation
    descriptor_map: Tensor  # (N, C, S, S)
    metric_map: Tensor  # (N, C, S, S)


class KGLNet(nn.Module):
    """The network: a stem for each modality that feeds a descriptor branch and a metric branch.

    The metric maps come from trunks of their own, or are the descriptor trunk's (`config.metric_trunk`).
    Each method computes only what it returns, and the stem and each trunk run once a patch. Patches are
    (N, 1, P, P) floats, of any range (the first layer normalises; training used [0, 1]). The two
    modalities have weights of their own, so `modality` ("vis" or "ir") is never guessed.
    """

    def __init__(self, config: KGLNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or KGLNetConfig()
        split = config.split_after
        self.stem = PerModality(lambda: conv_blocks(config, 1, split), shared=False)
        self.descriptor_trunk = PerModality(
            lambda: conv_blocks(config, split + 1, BLOCKS), shared=config.descriptor_siamese
        )
        self.descriptor_head = PerModality(lambda: DescriptorHead(config), shared=config.descriptor_siamese)
        self.metric_trunk = (
            PerModality(lambda: conv_blocks(config, split + 1, BLOCKS), shared=config.metric_siamese)
            if config.metric_trunk == "own"
            else None
        )
        self.metric_head = MetricHead(config)

    def _descriptor(self, descriptor_map: Tensor, modality: str) -> Tensor:
        return F.normalize(self.descriptor_head(descriptor_map, modality).float(), dim=1)

    def describe(self, patches: Tensor, modality: str) -> Tensor:
        """(N, 1, P, P) -> (N, D) float32 descriptors, L2-normalised."""
        descriptor_map = self.descriptor_trunk(self.stem(patches, modality), modality)
        return self._descriptor(descriptor_map, modality)

    def map(self, patches: Tensor, modality: str) -> Tensor:
        """(N, 1, P, P) -> (N, C, S, S) metric maps, the input of `score`."""
        trunk = self.descriptor_trunk if self.metric_trunk is None else self.metric_trunk
        metric_map: Tensor = trunk(self.stem(patches, modality), modality)
        return metric_map

    def encode(self, patches: Tensor, modality: str) -> tuple[Tensor, Tensor]:
        """(N, 1, P, P) -> descriptors (N, D) and metric maps (N, C, S, S)."""
        stem = self.stem(patches, modality)
        descriptor_map = self.descriptor_trunk(stem, modality)
        metric_map = descriptor_map if self.metric_trunk is None else self.metric_trunk(stem, modality)
        return self._descriptor(descriptor_map, modality), metric_map

    def score(self, map_vis: Tensor, map_ir: Tensor) -> Tensor:
        """Metric maps of N pairs, (N, C, S, S) each -> (N,) float32 match probabilities."""
        return torch.sigmoid(self.metric_head(map_vis, map_ir).float())

    def branches(self, patches: Tensor, modality: str) -> BranchOutputs:
        """(N, 1, P, P) -> raw descriptors and both branches' maps, for the training losses."""
        stem = self.stem(patches, modality)
        descriptor_map = self.descriptor_trunk(stem, modality)
        return BranchOutputs(
            self.descriptor_head(descriptor_map, modality),
            descriptor_map,
            descriptor_map if self.metric_trunk is None else self.metric_trunk(stem, modality),
        )

    def forward(self, vis: Tensor, ir: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N pairs, (N, 1, P, P) each -> descriptors (N, D) of both, and probabilities (N,)."""
        descriptor_vis, map_vis = self.encode(vis, "vis")
        descriptor_ir, map_ir = self.encode(ir, "ir")
        return descriptor_vis, descriptor_ir, self.score(map_vis, map_ir)
