"""Which model a job runs, in a form that travels to other processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kglmatch.matcher import Matcher
from kglmatch.models.files import read_bytes
from kglmatch.models.pretrained import resolve
from kglmatch.options import DEFAULT_MODEL


@dataclass(frozen=True)
class Model:
    """Arguments of `Matcher.from_pretrained`, which each process loads for itself.

    Attributes:
        name: a bundled model, a folder that all processes reach, or a model on the Hub.
        device, dtype, batch_size: as for `Matcher.from_pretrained`.
    """

    name: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str | None = None
    batch_size: int | None = None

    def load(self) -> Matcher:
        """The matcher. Raises `WeightsError`, `ConfigError` and `BackendError` as `from_pretrained` does."""
        return Matcher.from_pretrained(
            self.name, device=self.device, dtype=self.dtype, batch_size=self.batch_size
        )

    def identity(self) -> dict[str, Any]:
        """What results depend on: the weights and their precision, not the device.

        Raises:
            WeightsError: no such model.
        """
        files = resolve(self.name)
        digest = hashlib.sha256(read_bytes(files.config) + read_bytes(files.weights)).hexdigest()
        return {"model": self.name, "weights": digest, "dtype": self.dtype}
