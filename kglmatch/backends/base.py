"""What a `Matcher` needs of whatever runs the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kglmatch.features import Array, Modality
from kglmatch.models.config import KGLNetConfig

# Execution providers of onnxruntime by rank, as it takes them; None or "auto" chooses by the device.
Providers = str | Sequence[str | tuple[str, Mapping[str, Any]]] | None


class Backend(Protocol):
    """Runs the network. Patches come checked (`kglmatch.patches.check_patches`); any N, 0 included.

    Attributes:
        config: the architecture.
        name: "torch" or "onnx".
        device: where it runs, as one would ask for it ("cpu", "cuda:0").
        dtype: precision of the convolutions ("float32", "float16", "bfloat16").
        batch_size: patches that go through the network at once.
        progress: draw a bar on stderr, if that is a terminal, while the network works.
    """

    config: KGLNetConfig
    name: str
    device: str
    dtype: str
    batch_size: int
    progress: bool

    def state_dict(self) -> dict[str, Any]:
        """The network's tensors by name, as held: in precision `dtype`, on `device`.

        Raises:
            KGLMatchError: a backend of exported graphs, which holds no weights.
        """

    def encode(self, patches: Array, modality: Modality, *, maps: bool) -> tuple[Array, Array | None]:
        """(N, P, P) uint8 or floats -> descriptors (N, D) float32 and metric maps (N, C, S, S).

        Descriptors are of the kind that the patches are (numpy or torch); maps stay on the device.
        With `maps=False` no map is kept, a metric trunk is not run, and None is returned in its place.
        """

    def score(
        self,
        maps_vis: Array,
        maps_ir: Array,
        rows_vis: NDArray[np.int64] | None = None,
        rows_ir: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Match probabilities (P,) of chosen pairs of maps, or row by row if no rows are given."""

    def top_k(self, a: Array, b: Array, k: int) -> NDArray[np.int64]:
        """For each descriptor of `a` (N, D) the `k` nearest of `b` (M, D): (N, min(k, M)) int64."""
