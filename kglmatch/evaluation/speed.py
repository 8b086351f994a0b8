"""Which backend and precision describes patches fastest on this machine."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.matcher import Matcher
from kglmatch.options import DEFAULT_MODEL

PATCHES = 64
SECONDS = 15.0
TURN = 0.5  # seconds, at least: threads of the backend before go on spinning for a while
FEWEST_ROUNDS = 3
CALIBRATION = 32  # the speed of int8 does not depend on what it was calibrated with
CPU_FLAGS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class BackendSpeed:
    """How fast a backend describes patches, on the CPU.

    Attributes:
        backend: "torch" or "onnx".
        dtype: "float32" or "int8".
        patches_per_second: median over the rounds.
        ratio: to PyTorch in float32, median of the ratios within each round.
    """

    backend: str
    dtype: str
    patches_per_second: float
    ratio: float


def compare_backends(name: str | Path = DEFAULT_MODEL, *, seconds: float = SECONDS) -> list[BackendSpeed]:
    """Times `Matcher.describe` on the CPU: PyTorch in float32, onnxruntime in float32 and int8.

    The graphs are exported for it, which takes about two minutes. The backends take turns, so that other load
    of the machine affects all of them.

    Args:
        name: as for `Matcher.from_pretrained`.
        seconds: to measure for, three rounds at least.

    Returns:
        the backends, the fastest first.

    Raises:
        WeightsError, ConfigError: as for `Matcher.from_pretrained`.
        KGLMatchError: seconds below 0.
    """
    if not seconds >= 0:
        raise KGLMatchError(f"seconds must be at least 0, got {seconds}")
    by_torch = Matcher.from_pretrained(name, device="cpu", dtype="float32")
    size = by_torch.config.patch_size
    vis = _textures(CALIBRATION, size, 0)
    ir = 1 - vis  # pairs, whose scores int8 changes less than those of strangers
    with tempfile.TemporaryDirectory() as folder:
        reports = [
            by_torch.export_onnx(Path(folder) / "float32"),
            by_torch.export_onnx(Path(folder) / "int8", calibrate=(vis, ir)),
        ]
        matchers = [by_torch, *(Matcher.from_onnx(report.folder, device="cpu") for report in reports)]
        rounds = _rounds(matchers, _textures(PATCHES, size, 2), seconds)
    found = [
        BackendSpeed(
            by.backend.name,
            by.backend.dtype,
            PATCHES / statistics.median(times[i] for times in rounds),
            statistics.median(times[0] / times[i] for times in rounds),
        )
        for i, by in enumerate(matchers)
    ]
    return sorted(found, key=lambda speed: -speed.ratio)


def _textures(count: int, size: int, seed: int) -> NDArray[np.float32]:
    """(count, size, size) float32 in [0, 1]: random walks in both directions."""
    noise = np.random.default_rng(seed).standard_normal((count, size, size))
    texture = noise.cumsum(axis=1).cumsum(axis=2)
    low, high = texture.min(axis=(1, 2), keepdims=True), texture.max(axis=(1, 2), keepdims=True)
    scaled: NDArray[np.float32] = ((texture - low) / (high - low)).astype(np.float32)
    return scaled


def _rounds(matchers: Sequence[Matcher], patches: NDArray[np.float32], seconds: float) -> list[list[float]]:
    """Seconds of a call of each matcher in each round, but the first one, which pays for memory."""
    rounds: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(rounds) <= FEWEST_ROUNDS or time.perf_counter() < stop:
        times = []
        for by in matchers:
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() < began + TURN:
                by.describe(patches, "vis", maps=False)
                calls += 1
            times.append((time.perf_counter() - began) / calls)
        rounds.append(times)
    return rounds[1:]


def has_vnni() -> bool | None:
    """Whether the processor multiplies 8-bit numbers at once (VNNI); None where that is unknown."""
    try:
        text = CPU_FLAGS.read_text(encoding="utf-8")
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "vnni" in flags if flags else None
