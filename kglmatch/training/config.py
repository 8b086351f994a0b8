"""What a training run is: `TrainingConfig`, read from a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kglmatch.config import KGLNetConfig
from kglmatch.errors import ConfigError
from kglmatch.training.augmentation import Augmentation

SCHEDULES = ("constant", "decay", "cosine", "one-cycle")
NEGATIVES = ("hard", "random", "both")
PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. The defaults of the losses are the paper's.

    Args:
        data: folder of registered image pairs (see `kglmatch.datasets.find_image_pairs`).
        validation_images: so many images at the end of the numbering are held out of training and
            choose the checkpoint.
        validation_pairs: matching pairs drawn from them (and as many non-matching ones).
        max_points: points an image, strongest first.
        init: model to start from (bundled name or folder); None starts from random weights.
        seed: of weights, batches and augmentation.
        steps: length of the run in batches.
        batch_size: matching pairs a batch; negatives are mined among them.
        learning_rate: of everything but the metric head.
        metric_head_learning_rate: of the metric head.
        schedule: "constant", "decay" (constant, then a cosine over the last `decay_fraction`),
            "cosine" (over the whole run) or "one-cycle".
        warmup_steps: linear rise from zero, in every schedule but one-cycle.
        decay_fraction: see "decay".
        norm_weight, guided_weight, metric_weight: factors of the losses beside the triplet loss;
            0 switches one off and computes none of it.
        margin, alpha: of the hybrid triplet loss.
        negatives: what the metric head sees beside the positives: "hard" (HNSM-M), "random", or
            "both" (as many of each).
        min_negative_distance: pixels; nearer points of one image are not each other's negatives.
        max_gradient_norm: gradients are clipped to it; 0 leaves them.
        ema_decay: of the averaged weights that are validated and saved, a step.
        precision: of convolutions; the losses are float32 always.
        compile: use `torch.compile`.
        log_every, validate_every, checkpoint_every: steps.
        augmentation: see `Augmentation`.
        network: see `KGLNetConfig`; with `init`, the model's own.
    """

    data: str
    validation_images: int = 6
    validation_pairs: int = 2000
    max_points: int = 1500
    init: str | None = None
    seed: int = 0
    steps: int = 20000
    batch_size: int = 256
    learning_rate: float = 5e-3
    metric_head_learning_rate: float = 5e-5
    schedule: str = "decay"
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    norm_weight: float = 0.1
    guided_weight: float = 1.0
    metric_weight: float = 1.0
    margin: float = 1.2
    alpha: float = 2.0
    negatives: str = "hard"
    min_negative_distance: float = 8.0
    max_gradient_norm: float = 0.0
    ema_decay: float = 0.99
    precision: str = "float32"
    compile: bool = True
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 100
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: KGLNetConfig = field(default_factory=KGLNetConfig)

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("negatives", NEGATIVES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("steps", "validation_images", "validation_pairs", "max_points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ConfigError(
                f"batch_size must be at least 2 (negatives are mined in it), got {self.batch_size}"
            )
        for name in ("learning_rate", "metric_head_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("norm_weight", "guided_weight", "metric_weight", "warmup_steps", "max_gradient_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction must be in [0, 1], got {self.decay_fraction}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, origin: str = "training config") -> TrainingConfig:
        """Builds a config from plain values, with `augmentation` and `network` as tables.

        Raises:
            ConfigError: an unknown key, a value of another type, or a value out of range.
        """
        return _build(cls, values, origin)

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainingConfig:
        """Reads a TOML file. A relative `data` is relative to the working directory."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_dict(values, origin=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        return dataclasses.asdict(self)


_TABLES = {"augmentation": Augmentation, "network": KGLNetConfig}


def _build(cls: type, values: dict[str, Any], origin: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{origin} has unknown keys {unknown}; known are {sorted(fields)}")
    if "data" in fields and "data" not in values:
        raise ConfigError(f"{origin} lacks `data`, the folder of image pairs to train on")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name in _TABLES and cls is TrainingConfig:
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: {name} must be a table, got {value!r}")
            checked[name] = _build(_TABLES[name], value, f"{origin} [{name}]")
            continue
        kind = str(fields[name].type)
        right = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool),
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
            "str | None": value is None or isinstance(value, str),
        }.get(kind, True)
        if not right:
            raise ConfigError(f"{origin}: {name} must be {kind}, got {value!r}")
        checked[name] = value
    return cls(**checked)
