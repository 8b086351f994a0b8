"""What a training run is: `TrainingConfig`, read from a TOML file."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kglmatch.errors import ConfigError
from kglmatch.models.config import KGLNetConfig
from kglmatch.training.augmentation import Augmentation

SCHEDULES = ("constant", "decay", "cosine", "one-cycle")
TRAINED = ("all", "metric_head")
PRECISIONS = ("float32", "float16", "bfloat16")


_HELD_OUT = 6  # images of a data source


@dataclass(frozen=True)
class DataSource:
    """One of several data sets of a run.

    Args:
        path: folder of registered image pairs, or a patch file (see
            `kglmatch.datasets.find_patch_sources`); with `simulated` a folder of colour images, best not
            those of another source, whose held-out images they would show.
        weight: its share of the training pairs, relative to the other sources.
        validation_images: N images (of a patch file: pairs) at the end of the numbering are held out, by
            default 6; 0 for none, which is the default of a simulated source and all that it can have.
        simulated: the second sensor is drawn anew for each patch from the colour image
            (`kglmatch.training.simulation`).

    Raises:
        ConfigError: a value outside what is described above.
    """

    path: str
    weight: float = 1.0
    validation_images: int = None  # type: ignore[assignment]  # until `simulated` is known
    simulated: bool = False

    def __post_init__(self) -> None:
        if self.validation_images is None:
            object.__setattr__(self, "validation_images", 0 if self.simulated else _HELD_OUT)  # type: ignore[unreachable]
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"the weight of a data source must be above 0, got {self.weight}")
        if self.validation_images < 0 or (self.simulated and self.validation_images):
            least = "0 for a simulated source" if self.simulated else "at least 0"
            raise ConfigError(f"validation_images must be {least}, got {self.validation_images}")


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. The defaults of the losses are the paper's.

    Args:
        data: folder of registered image pairs, or a patch file, of which the matching pairs are used
            (see `kglmatch.datasets.find_patch_sources`); or several sources, `[[data]]` tables of
            `DataSource`. Half a batch comes from one source, so that hard negatives are of its kind.
        validation_images: N images (of a patch file: pairs) at the end of the numbering are held out of
            training and choose the model that is kept; several sources have numbers of their own.
        validation_pairs: at most N matching pairs drawn from them, of each source.
        validation_negatives: non-matching pairs for each matching one.
        max_points: points an image, strongest first.
        least_contrast: grey levels; a training point whose second patch has a smaller standard deviation,
            blurred by a pixel, shows nothing there and is left out.
        init: model to start from (bundled name, folder or Hub id); None starts from random weights. Where
            `network` asks for another metric branch than the model has, that part starts from random weights;
            where it asks for more channels, the further ones start as copies (`kglmatch.training.widening`).
        teacher: model to learn from (bundled name, folder or Hub id), with the same length of descriptors and
            size of patches: its descriptors and scores are targets next to the labels. None: no teacher.
        trained: "all", or "metric_head", which leaves every other weight as it is.
        seed: of weights, batches and augmentation.
        steps: length of the run in batches.
        batch_size: matching pairs a batch, over all processes; negatives are mined among them.
        distinct_batches: after N batches the same N come again, augmentation and all, and the teacher's
            answers to them are kept in the device's memory (64 KiB a pair of patches, of a full bundled
            model): all rounds but the first then cost a fraction. 0 always draws new batches.
        learning_rate: Adam's, of everything but the metric head.
        metric_head_learning_rate: of the metric head.
        schedule: "constant", "decay" (constant, then a cosine over the last `decay_fraction`),
            "cosine" (over the whole run) or "one-cycle"; see `kglmatch.training.rate_factor`.
        warmup_steps: linear rise from zero, in every schedule but one-cycle.
        decay_fraction: share of the run, see "decay".
        margin, alpha: of the hybrid triplet loss.
        norm_weight, guided_weight, metric_weight: factors of the losses other than the triplet loss;
            0 switches one off and computes none of it.
        distillation_weight: of the differences from the teacher, in which `metric_weight` counts as well.
        hard_negatives, random_negatives: non-matching pairs that the metric head sees for each matching one:
            the N nearest by descriptor (HNSM-M with 1) and N random ones. Matching and non-matching pairs
            weigh the same in its loss.
        metric_loss_trains_trunk: whether the metric loss also reaches the layers that make its maps.
        min_negative_distance: pixels; nearer points of one image are not each other's negatives.
        max_gradient_norm: gradients are clipped to it; 0 leaves them.
        ema_decay: a step, of the averaged weights that are validated and saved.
        precision: of the network's arithmetic; weights and losses are float32 always.
        compile: use `torch.compile`, which needs a C++ compiler, or Triton on CUDA.
        log_every, validate_every, checkpoint_every: steps.
        augmentation: see `Augmentation`.
        network: keys of `KGLNetConfig` with values other than the defaults; with `init`, other than the
            model's own. What was measured for the model (`inference`) is measured anew.

    Raises:
        ConfigError: a value outside what is described above.
    """

    data: str | tuple[DataSource, ...]
    validation_images: int = _HELD_OUT
    validation_pairs: int = 1000
    validation_negatives: int = 6
    max_points: int = 1500
    least_contrast: float = 0.0
    init: str | None = None
    teacher: str | None = None
    trained: str = "all"
    seed: int = 0
    steps: int = 20000
    batch_size: int = 256
    distinct_batches: int = 0
    learning_rate: float = 5e-3
    metric_head_learning_rate: float = 5e-5
    schedule: str = "decay"
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    margin: float = 1.2
    alpha: float = 2.0
    norm_weight: float = 0.1
    guided_weight: float = 1.0
    metric_weight: float = 1.0
    distillation_weight: float = 1.0
    hard_negatives: int = 1
    random_negatives: int = 0
    metric_loss_trains_trunk: bool = True
    min_negative_distance: float = 8.0
    max_gradient_norm: float = 0.0
    ema_decay: float = 0.99
    precision: str = "float32"
    compile: bool = True
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 100
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("trained", TRAINED), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, lowest in _LOWEST.items():
            if not lowest <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least {lowest}, got {getattr(self, name)}")
        for name in ("learning_rate", "metric_head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ConfigError(f"seed must be below 2^32, got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction must be in [0, 1], got {self.decay_fraction}")
        if self.metric_weight and not self.hard_negatives + self.random_negatives:
            raise ConfigError("the metric loss needs negatives: set hard_negatives or random_negatives")
        if self.trained == "metric_head" and not self.metric_weight:
            raise ConfigError('trained = "metric_head" with metric_weight = 0 leaves nothing to train')
        if not isinstance(self.data, str):
            self._check_sources()
        self.network_config(KGLNetConfig())

    def _check_sources(self) -> None:
        sources: Any = self.data
        if not isinstance(sources, tuple) or not all(isinstance(s, DataSource) for s in sources):
            raise ConfigError(f"data must be a path or a tuple of DataSource, got {sources!r}")
        if not any(source.validation_images for source in sources):
            raise ConfigError(
                "no data source holds out validation images, and nothing would choose the model"
            )
        kinds = [(source.path, source.simulated) for source in sources]
        for path, simulated in kinds:
            if kinds.count((path, simulated)) > 1:
                raise ConfigError(f"{path} is listed twice as a data source; give it one weight")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The data sources: one, or several."""
        if isinstance(self.data, str):
            return (DataSource(self.data, validation_images=self.validation_images),)
        return self.data

    def network_config(self, base: KGLNetConfig) -> KGLNetConfig:
        """The architecture of the run, with what `network` says in place of the values of `base`.

        Raises:
            ConfigError: an unknown key or a bad value.
        """
        if "inference" in self.network:
            raise ConfigError("network.inference is measured by the run; it cannot be given")
        values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name != "inference"}
        config: KGLNetConfig = _build(KGLNetConfig, {**values, **self.network}, "[network]")
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, origin: str = "training config") -> TrainingConfig:
        """Builds a config from plain values, with `augmentation` and `network` as tables.

        Args:
            origin: where the values come from, for errors. `data` is a path or a list of tables.

        Raises:
            ConfigError: an unknown key, a value of another type, or a value out of range.
        """
        tables: dict[str, Any] = {}
        for name in ("augmentation", "network"):
            if not isinstance(values.get(name, {}), dict):
                raise ConfigError(f"{origin}: {name} must be a table, got {values[name]!r}")
        if "augmentation" in values:
            tables["augmentation"] = _build(Augmentation, values["augmentation"], f"{origin} [augmentation]")
        if "data" not in values:
            raise ConfigError(f"{origin} lacks `data`, the folder of image pairs to train on")
        if not isinstance(values["data"], str):
            tables["data"] = _sources(values["data"], origin)
        config: TrainingConfig = _build(cls, {**values, **tables}, origin)
        return config

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainingConfig:
        """Reads a TOML file. A relative `data` or `init` is relative to the working directory.

        Args:
            overrides: values that take the place of the file's.

        Raises:
            ConfigError: as for `from_dict`, or a file that cannot be read.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_dict({**values, **overrides}, origin=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        return dataclasses.asdict(self) | {
            "data": self.data if isinstance(self.data, str) else [dataclasses.asdict(s) for s in self.data]
        }


_LOWEST: dict[str, int] = {
    "validation_images": 1,
    "validation_pairs": 1,
    "validation_negatives": 1,
    "max_points": 1,
    "least_contrast": 0,
    "seed": 0,
    "steps": 1,
    "batch_size": 2,  # negatives are mined among the others
    "distinct_batches": 0,
    "warmup_steps": 0,
    "margin": 0,
    "alpha": 0,
    "norm_weight": 0,
    "guided_weight": 0,
    "metric_weight": 0,
    "distillation_weight": 0,
    "hard_negatives": 0,
    "random_negatives": 0,
    "min_negative_distance": 0,
    "max_gradient_norm": 0,
    "log_every": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
}

_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "str | None": (str, type(None)),
}


def _sources(tables: Any, origin: str) -> tuple[DataSource, ...]:
    if not isinstance(tables, list | tuple) or not tables or not all(isinstance(t, Mapping) for t in tables):
        raise ConfigError(f"{origin}: data must be a path or a list of tables, got {tables!r}")
    for table in tables:
        if "path" not in table:
            raise ConfigError(f"{origin}: a [[data]] table lacks `path`, got {dict(table)!r}")
    return tuple(_build(DataSource, dict(table), f"{origin} [[data]]") for table in tables)


def _build(cls: type, values: dict[str, Any], origin: str) -> Any:
    """An instance of a config class, whose fields are checked by their annotations."""
    annotations = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(annotations))
    if unknown:
        raise ConfigError(
            f"{origin} has unknown keys {', '.join(unknown)}; known are {', '.join(annotations)}"
        )
    for name, value in values.items():
        # Fields of other types are tables, which check themselves.
        types = _TYPES.get(annotations[name])
        if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise ConfigError(f"{origin}: {name} must be {annotations[name]}, got {value!r}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
