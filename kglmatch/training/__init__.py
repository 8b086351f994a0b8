"""Training of KGL-Net. Inference never imports it.

```python
from kglmatch.training import Trainer, TrainingConfig

config = TrainingConfig.from_toml("examples/training/vis-nir.toml", data="vis-nir/country")
best = Trainer(config, "runs/nir").train()       # goes on where a killed run stopped
```

A batch flows one way: scenes -> `PatchSampler` -> `augment` -> `KGLNet.branches` -> `mining` ->
`losses` -> optimizer. `objective` is the whole loss of a batch, `Trainer` the loop around it. The
command line is `kglmatch train CONFIG -o FOLDER`; under `torchrun` several processes share a batch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public names and the module that holds each; loaded on first use.
_PUBLIC = {
    "Augmentation": "kglmatch.training.augmentation",
    "Batch": "kglmatch.training.sampling",
    "PatchSampler": "kglmatch.training.sampling",
    "StepLosses": "kglmatch.training.batch_objective",
    "Trainer": "kglmatch.training.trainer",
    "TrainingConfig": "kglmatch.training.config",
    "augment": "kglmatch.training.augmentation",
    "feature_guided_loss": "kglmatch.training.losses",
    "hard_negatives": "kglmatch.training.mining",
    "hybrid_triplet_loss": "kglmatch.training.losses",
    "metric_loss": "kglmatch.training.losses",
    "norm_loss": "kglmatch.training.losses",
    "objective": "kglmatch.training.batch_objective",
    "random_negatives": "kglmatch.training.mining",
    "rate_factor": "kglmatch.training.schedule",
    "validate": "kglmatch.training.validation",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from kglmatch.training.augmentation import Augmentation as Augmentation
    from kglmatch.training.augmentation import augment as augment
    from kglmatch.training.batch_objective import StepLosses as StepLosses
    from kglmatch.training.batch_objective import objective as objective
    from kglmatch.training.config import TrainingConfig as TrainingConfig
    from kglmatch.training.losses import feature_guided_loss as feature_guided_loss
    from kglmatch.training.losses import hybrid_triplet_loss as hybrid_triplet_loss
    from kglmatch.training.losses import metric_loss as metric_loss
    from kglmatch.training.losses import norm_loss as norm_loss
    from kglmatch.training.mining import hard_negatives as hard_negatives
    from kglmatch.training.mining import random_negatives as random_negatives
    from kglmatch.training.sampling import Batch as Batch
    from kglmatch.training.sampling import PatchSampler as PatchSampler
    from kglmatch.training.schedule import rate_factor as rate_factor
    from kglmatch.training.trainer import Trainer as Trainer
    from kglmatch.training.validation import validate as validate


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kglmatch.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
