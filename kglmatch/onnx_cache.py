"""A model's ONNX graphs by its name: those stored with the model, or made once and kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from kglmatch.backends.base import Providers
from kglmatch.backends.onnx import DEVICE_MEMORY, OnnxBackend, choose_providers
from kglmatch.errors import BackendError, NoGraphsError, OutputError
from kglmatch.files import make_folder
from kglmatch.models.files import ModelFiles, read_bytes
from kglmatch.models.hub import HubOptions
from kglmatch.models.pretrained import load_files, resolve, resolve_onnx
from kglmatch.options import __version__

logger = logging.getLogger(__name__)


def load_pretrained(
    name: str | Path,
    hub: HubOptions,
    *,
    providers: Providers,
    device: str,
    dtype: str | None,
    batch_size: int | None,
) -> OnnxBackend:
    """The graphs of a model: those stored with it, or else made once by PyTorch and kept in the cache.

    Args:
        name, hub: as for `kglmatch.models.pretrained.resolve`. The cache is `kglmatch-onnx` in its
            `cache_dir`, else in XDG_CACHE_HOME or ~/.cache.
        dtype: "float32" or "float16"; None takes the graphs as they are (in int8, too), or what suits the
            device.

    Raises:
        WeightsError, ConfigError, BackendError: as for `OnnxBackend`; no such model; a precision that
            the graphs do not have; graphs that are to be made where PyTorch is not installed.
    """
    if dtype not in (None, "float32", "float16"):
        raise BackendError(f'dtype must be "float32" or "float16" for ONNX, got {dtype!r}')
    (first, _), *_ = choose_providers(providers, device)[0]
    try:
        folder = resolve_onnx(name, hub)
    except NoGraphsError as error:
        logger.info("no graphs of its own: %s", error)
        half = dtype == "float16" or (dtype is None and first in DEVICE_MEMORY)
        folder = _exported(resolve(name, hub), hub.cache_dir, half)
    backend = OnnxBackend(folder, providers=providers, device=device, batch_size=batch_size)
    if dtype not in (None, backend.dtype):
        raise BackendError(
            f"dtype={dtype!r} was asked for, but the graphs in {folder} are in {backend.dtype}; "
            "kglmatch export --onnx writes either"
        )
    return backend


def _exported(files: ModelFiles, cache_dir: str | Path | None, half: bool) -> Path:
    """The cache's folder with the graphs of a model, exported now if they are not there."""
    content = read_bytes(files.weights) + read_bytes(files.config) + __version__.encode()
    kind = "float16" if half else "float32"
    place = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = place.expanduser() / "kglmatch-onnx"
    folder = cache / f"{hashlib.sha256(content).hexdigest()[:16]}-{kind}"
    if folder.is_dir():
        return folder
    try:
        from kglmatch.export import export_onnx
    except ImportError as error:
        raise BackendError(
            f"{files.name} has no ONNX graphs yet, and making them needs PyTorch and onnx ({error}): run "
            "kglmatch export --onnx where they are installed, and load the folder by Matcher.from_onnx"
        ) from error
    logger.info("exporting %s to %s", files.name, folder)
    make_folder(cache)
    state, config = load_files(files)
    try:
        export_onnx(state, config, folder, name=files.name, half=half)
    except OutputError:
        if not folder.is_dir():
            raise
        # Another process was faster.
    return folder
