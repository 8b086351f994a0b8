"""The architecture as data: `KGLNetConfig` and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kglmatch.errors import ConfigError
from kglmatch.options import PATCH_SIZE

MODEL_TYPE = "kglnet"
BLOCKS = 8
# The paper's: output channels and stride of each of the eight convolution blocks.
CHANNELS = (32, 32, 64, 64, 128, 128, 256, 256)
STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)
MAP_STRIDE = 8
SPLITS = (0, 2, 4, 6, 8)
IR_KINDS = ("nir", "lwir", "sar", "other")
METRIC_TRUNKS = ("own", "descriptor")
HEAD_NORMS = ("frn", "none")
HEAD_INPUTS = ("difference", "difference-product")


@dataclass(frozen=True)
class KGLNetConfig:
    """What kind of KGL-Net a set of weights belongs to, and how it is meant to be used.

    The paper (arXiv 2412.11161) explores 2 x 2 x 5 architectures: descriptor branch Siamese or
    pseudo-Siamese, metric branch likewise, and the block after which the two branches part. Its
    choice is the default. The models that come with the package differ from it in `metric_trunk` and
    `head_norm`, which measured better and cost a third less.

    Args:
        descriptor_dim: length of a descriptor.
        patch_size: side of a square patch in pixels, a multiple of 8 (three stride-2 blocks).
        descriptor_siamese: one descriptor trunk and head for both modalities, instead of one each.
        metric_siamese: one metric trunk for both modalities, instead of one each.
        split_after: block after which descriptor and metric branch part: 0, 2, 4, 6 or 8. The
            blocks before it, the stem, serve both branches and are separate for each modality.
        channels: of each block's output. The last are those of a metric map.
        strides: of each block's convolution, 1 or 2; their product is 8.
        metric_trunk: which maps the metric head reads: those of metric trunks of its "own" (the
            paper's), or those of the "descriptor" trunk; then there is no metric trunk, and
            `metric_siamese` says nothing.
        head_norm: normalisation after the metric head's convolution: "frn" (the paper's) or "none".
        head_input: what the metric head sees of two maps: their absolute "difference" (the paper's), or
            "difference-product", with the product beside it, which makes its convolution twice as wide.
        ir_kind: what the second sensor was in training: "nir", "lwir", "sar" or "other".
        inference: defaults that were measured for these weights (keypoint detector and so on);
            they travel with the weights and change no number of the network.

    Raises:
        ConfigError: a value outside what is described above.
    """

    descriptor_dim: int = 128
    patch_size: int = PATCH_SIZE
    descriptor_siamese: bool = True
    metric_siamese: bool = False
    split_after: int = 4
    # Looked up when a configuration is made, so that tests can make thin networks.
    channels: tuple[int, ...] = field(default_factory=lambda: CHANNELS)
    strides: tuple[int, ...] = field(default_factory=lambda: STRIDES)
    metric_trunk: str = "own"
    head_norm: str = "frn"
    head_input: str = "difference"
    ir_kind: str = "nir"
    inference: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("descriptor_dim", "patch_size", "split_after"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
        for name in ("descriptor_siamese", "metric_siamese"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.descriptor_dim < 1:
            raise ConfigError(f"descriptor_dim must be at least 1, got {self.descriptor_dim}")
        if self.patch_size < MAP_STRIDE or self.patch_size % MAP_STRIDE:
            raise ConfigError(
                f"patch_size must be a positive multiple of {MAP_STRIDE}, got {self.patch_size}"
            )
        if self.split_after not in SPLITS:
            raise ConfigError(f"split_after must be one of {SPLITS}, got {self.split_after}")
        self._check_blocks()
        for name, known in (
            ("ir_kind", IR_KINDS),
            ("metric_trunk", METRIC_TRUNKS),
            ("head_norm", HEAD_NORMS),
            ("head_input", HEAD_INPUTS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not isinstance(self.inference, dict):
            raise ConfigError(f"inference must be an object, got {self.inference!r}")

    def _check_blocks(self) -> None:
        """Checks channels and strides, which JSON gives as lists, and keeps them as tuples."""
        for name in ("channels", "strides"):
            values = getattr(self, name)
            if (
                not isinstance(values, list | tuple)
                or len(values) != BLOCKS
                or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values)
            ):
                raise ConfigError(f"{name} must be {BLOCKS} integers of at least 1, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        if not set(self.strides) <= {1, 2} or math.prod(self.strides) != MAP_STRIDE:
            raise ConfigError(
                f"strides must be 1 or 2, with {MAP_STRIDE} as their product, got {list(self.strides)}"
            )

    @property
    def map_size(self) -> int:
        """Side of a metric map: 8 for patches of 64 pixels."""
        return self.patch_size // MAP_STRIDE

    @property
    def map_channels(self) -> int:
        """Channels of a metric map: 256 in the paper's network."""
        return self.channels[-1]

    @property
    def head_has_product(self) -> bool:
        """Whether the metric head sees the product of the two maps beside their difference."""
        return self.head_input == "difference-product"

    @property
    def head_channels(self) -> int:
        """Channels of what the metric head sees of two maps."""
        return self.map_channels * (2 if self.head_has_product else 1)

    def architecture(self) -> dict[str, Any]:
        """What decides the network's numbers, as the plain values of JSON; `inference` does not."""
        values = dataclasses.asdict(self) | {"channels": list(self.channels), "strides": list(self.strides)}
        del values["inference"]
        return values

    def to_json(self) -> str:
        """The text of a `config.json`."""
        return json.dumps({"model_type": MODEL_TYPE, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str = "config.json") -> KGLNetConfig:
        """Parses the text of a `config.json`; unknown keys are errors, so that no setting is ignored.

        Raises:
            ConfigError: not JSON, another model's configuration, an unknown key or a bad value.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{origin} is not valid JSON: {error}") from error
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise ConfigError(f'{origin} is not a KGL-Net configuration (no "model_type": "{MODEL_TYPE}")')
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{origin} has unknown keys {unknown}; known are {sorted(known)}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error

    @classmethod
    def from_file(cls, path: str | Path) -> KGLNetConfig:
        """Reads a `config.json`. Raises `ConfigError` where it is missing or wrong."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        return cls.from_json(text, origin=str(path))
