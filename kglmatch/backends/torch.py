"""The network in PyTorch, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kglmatch.errors import BackendError, KGLMatchError
from kglmatch.features import Array, Modality, to_numpy
from kglmatch.matching import CHUNK
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.cost import cpu_batch
from kglmatch.models.network import KGLNet
from kglmatch.progress import steps

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# On the CPU few enough that the maps stay in the cache: 16 measured faster than 64 and than 8, at the paper's
# widths.
_BATCH = {"cpu": 16, "cuda": 1024}


def default_batch(device_type: str, config: KGLNetConfig) -> int:
    """Patches at once that suit a device, "cpu" or "cuda"."""
    return cpu_batch(config, _BATCH["cpu"]) if device_type == "cpu" else _BATCH[device_type]


def choose_device(device: str) -> torch.device:
    """The device that was asked for; only "auto" chooses.

    Raises:
        BackendError: not a device of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}') from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(f'device "{device}" was asked for, but PyTorch finds no CUDA here; use "cpu"')
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise BackendError(f'device "{device}" was asked for, but there are {torch.cuda.device_count()}')
    elif chosen.type != "cpu":
        raise BackendError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    return chosen


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """On CUDA without TF32, which keeps 10 bits of a product where float32 was asked for."""
    before = torch.backends.cudnn.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class TorchBackend:
    """Runs a `KGLNet`; see `kglmatch.backends.base.Backend` for the calls.

    Args:
        state: state dict of `KGLNet(config)`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "float16" or "bfloat16"; None takes float16 on CUDA and float32 on the CPU.
            FRN statistics, pooling and L2 normalisation are float32 in any case.
        batch_size: patches at once; None takes what suits the device.

    Raises:
        BackendError: a device or precision that cannot be had.
    """

    name = "torch"

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: KGLNetConfig,
        *,
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.config = config
        self.progress = False
        self._device = choose_device(device)
        kind = self._device.type
        if dtype is None:
            dtype = "float16" if kind == "cuda" else "float32"
        if dtype not in DTYPES:
            raise BackendError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
        if batch_size is None:
            batch_size = default_batch(kind, config)
        if batch_size < 1:
            raise KGLMatchError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.dtype, self.batch_size = str(self._device), dtype, batch_size
        net = KGLNet(config)
        net.load_state_dict(state)
        net.eval().requires_grad_(False).to(self._device, DTYPES[dtype])
        self._net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._net.state_dict())

    def _to_device(self, patches: Array) -> Tensor:
        """A chunk of patches as (N, 1, P, P) float32 on the device; uint8 travels as uint8."""
        chunk = patches if isinstance(patches, Tensor) else torch.from_numpy(np.ascontiguousarray(patches))
        if self._device.type == "cuda" and chunk.device.type == "cpu":
            chunk = chunk.pin_memory().to(self._device, non_blocking=True)
        chunk = chunk.to(self._device)
        chunk = chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk.float()
        return chunk.unsqueeze(1)

    @torch.inference_mode()
    def encode(self, patches: Array, modality: Modality, *, maps: bool) -> tuple[Array, Tensor | None]:
        size = self.config.map_size
        n = len(patches)
        descriptors = torch.empty(n, self.config.descriptor_dim, device=self._device)
        metric_maps = (
            torch.empty(
                (n, self.config.map_channels, size, size),
                dtype=DTYPES[self.dtype],
                device=self._device,
                memory_format=torch.channels_last,
            )
            if maps
            else None
        )
        for start in steps(range(0, n, self.batch_size), f"describe {modality}", show=self.progress):
            part = slice(start, start + self.batch_size)
            x = self._to_device(patches[part])
            with _full_precision(self._device):
                if metric_maps is None:
                    descriptors[part] = self._net.describe(x, modality)
                else:
                    descriptors[part], metric_maps[part] = self._net.encode(x, modality)
        return (descriptors if isinstance(patches, Tensor) else to_numpy(descriptors)), metric_maps

    @torch.inference_mode()
    def score(
        self,
        maps_vis: Array,
        maps_ir: Array,
        rows_vis: NDArray[np.int64] | None = None,
        rows_ir: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        a, b = self._maps(maps_vis), self._maps(maps_ir)
        n = len(a) if rows_vis is None else len(rows_vis)
        out = torch.empty(n, device=self._device)
        for start in steps(range(0, n, self.batch_size), "score", show=self.progress):
            part = slice(start, start + self.batch_size)
            rows_a, rows_b = self._rows(a, rows_vis, part), self._rows(b, rows_ir, part)
            with _full_precision(self._device):
                out[part] = self._net.score(rows_a, rows_b)
        return to_numpy(out)

    def _maps(self, maps: Array) -> Tensor:
        tensor = maps if isinstance(maps, Tensor) else torch.from_numpy(np.ascontiguousarray(maps))
        return tensor.to(self._device, DTYPES[self.dtype])

    def _rows(self, maps: Tensor, rows: NDArray[np.int64] | None, part: slice) -> Tensor:
        if rows is None:
            return maps[part]
        return maps[torch.from_numpy(rows[part]).to(self._device)]

    @torch.inference_mode()
    def top_k(self, a: Array, b: Array, k: int) -> NDArray[np.int64]:
        a, b = (torch.as_tensor(x, device=self._device) for x in (a, b))
        k = min(k, len(b))
        if not len(a) or not k:
            return np.empty((len(a), k), np.int64)
        rows = max(1, CHUNK // len(b))
        found = [(a[i : i + rows] @ b.T).topk(k, dim=1).indices for i in range(0, len(a), rows)]
        return to_numpy(torch.cat(found))
