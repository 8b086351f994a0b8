"""What a network costs: multiply-adds a patch and a pair, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from kglmatch.models.config import BLOCKS, CHANNELS, STRIDES, KGLNetConfig

HEAD_UNITS = (512, 256, 1)
_MOST_BATCHES = 8  # of the light models, whose layers are an eighth, 64 to 128 patches measured fastest


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the convolutions and linear layers; all else is below one percent of them.

    Attributes:
        descriptor: for the descriptor of a patch.
        descriptor_and_map: for descriptor and metric map of a patch.
        score: for the metric head on a pair of maps.
    """

    descriptor: int
    descriptor_and_map: int
    score: int

    @property
    def pair(self) -> int:
        """For both descriptors, both maps and the score of a pair."""
        return 2 * self.descriptor_and_map + self.score


def cost(config: KGLNetConfig) -> Cost:
    """Multiply-adds of `KGLNet(config)`, each stem and trunk counted once a patch."""
    side, channels, blocks = config.patch_size, 1, []
    for i in range(BLOCKS):
        side //= config.strides[i]
        blocks.append(9 * channels * config.channels[i] * side**2)
        channels = config.channels[i]
    stem, trunk = sum(blocks[: config.split_after]), sum(blocks[config.split_after :])
    area = config.map_size**2
    descriptor = stem + trunk + config.map_channels * area * config.descriptor_dim
    linear = sum(a * b for a, b in zip((config.map_channels, *HEAD_UNITS), HEAD_UNITS, strict=False))
    return Cost(
        descriptor,
        descriptor + (trunk if config.metric_trunk == "own" else 0),
        9 * config.head_channels * config.map_channels * area + linear,
    )


def largest_layer(config: KGLNetConfig) -> int:
    """Values of a patch's largest layer, which decide how many patches stay in a processor's cache."""
    side, largest = config.patch_size, 0
    for channels, stride in zip(config.channels, config.strides, strict=True):
        side //= stride
        largest = max(largest, channels * side**2)
    return largest


def cpu_batch(config: KGLNetConfig, batch: int) -> int:
    """Patches at once, so that as many values stay in the cache as those of `batch` at the paper's widths."""
    published = largest_layer(KGLNetConfig(channels=CHANNELS, strides=STRIDES))
    return batch * max(1, min(_MOST_BATCHES, published // largest_layer(config)))
