"""Training of KGL-Net. Inference never imports it.

```python
from kglmatch.training import Trainer, TrainingConfig

config = TrainingConfig.from_toml("examples/training/vis-nir.toml", data="vis-nir/country")
best = Trainer(config, "runs/nir").train()       # resumes where a killed run stopped
```

A batch flows one way: scenes -> `PatchSampler` -> `augment` -> `KGLNet.branches` -> `mining` ->
`losses` -> optimizer. `objective` is the whole loss of a batch, `Trainer` the loop around it. The
command line is `kglmatch train CONFIG -o FOLDER`; under `torchrun` several processes share a batch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
