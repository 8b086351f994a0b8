"""Names -> weights: bundled models, local folders and the Hugging Face Hub; safetensors in and out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kglmatch.config import KGLNetConfig
from kglmatch.errors import WeightsError
from kglmatch.files import atomic_output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DEFAULT_MODEL = "kglnet-vis-nir"

# SHA-256 of each bundled model's weights, so that a damaged installation is noticed.
BUNDLED_SHA256: dict[str, str] = {}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    Attributes:
        name: as it was asked for.
        source: "bundled", "folder" or "hub".
        config, weights: paths of `config.json` and `model.safetensors`.
    """

    name: str
    source: str
    config: Path
    weights: Path


def weights_root() -> Path:
    """The folder of the bundled models: inside the installed package, or `weights/` of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def list_pretrained() -> list[str]:
    """Names of the models that come with the package."""
    root = weights_root()
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}")) if root.is_dir() else []


def resolve(name: str | Path) -> ModelFiles:
    """Finds a model's files: a bundled name first, then a local folder.

    Raises:
        WeightsError: no such model, or a folder without the files of one.
    """
    bundled = list_pretrained()
    if str(name) in bundled:
        return _in_folder(str(name), "bundled", weights_root() / str(name))
    folder = Path(name)
    if folder.is_dir():
        return _in_folder(str(name), "folder", folder)
    raise WeightsError(
        f"unknown model {str(name)!r}: neither a bundled model ({', '.join(bundled) or 'none installed'}) "
        "nor a local folder"
    )


def _in_folder(name: str, source: str, folder: Path) -> ModelFiles:
    files = ModelFiles(name, source, folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    missing = [path.name for path in (files.config, files.weights) if not path.is_file()]
    if missing:
        raise WeightsError(f"{folder} is not a model folder: it lacks {' and '.join(missing)}")
    return files


def load_config(name: str | Path) -> KGLNetConfig:
    """The configuration of a model, without its weights. Errors as for `load_model`."""
    return KGLNetConfig.from_file(resolve(name).config)


def load_model(name: str | Path) -> tuple[dict[str, Tensor], KGLNetConfig]:
    """Reads a model's weights and configuration.

    Returns:
        a float32 state dict on the CPU that fits `KGLNet(config)` exactly, and the config.

    Raises:
        WeightsError: no such model, a damaged file, or tensors that do not fit the configuration.
        ConfigError: a wrong `config.json`.
    """
    files = resolve(name)
    config = KGLNetConfig.from_file(files.config)
    state = _read_safetensors(files)
    _check_fit(state, config, files.weights)
    return state, config


def _read_safetensors(files: ModelFiles) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = files.weights.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {files.weights}: {error.strerror or error}") from error
    expected = BUNDLED_SHA256.get(files.name) if files.source == "bundled" else None
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise WeightsError(f"{files.weights} is damaged (its checksum differs): install kglmatch again")
    try:
        state = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{files.weights} is not a valid safetensors file: {error}") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _check_fit(state: Mapping[str, Tensor], config: KGLNetConfig, path: Path) -> None:
    import torch

    from kglmatch.network import KGLNet

    with torch.device("meta"):
        expected = {k: v.shape for k, v in KGLNet(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit its config.json: {len(missing)} tensors missing (first: {missing[:2]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:2]})"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise WeightsError(
                f"{path} does not fit its config.json: {key} is {tuple(state[key].shape)}, "
                f"expected {tuple(shape)}"
            )
        if not bool(torch.isfinite(state[key]).all()):
            raise WeightsError(f"{path} is damaged: {key} holds NaN or infinite values")


def save_model(
    folder: str | Path, state: Mapping[str, Tensor], config: KGLNetConfig, *, half: bool = True
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, made if missing.

    Args:
        half: store float16, which halves the file and costs about 1e-3 of a weight's size.

    Raises:
        OutputError: the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    from kglmatch.files import make_folder

    folder = make_folder(folder)
    tensors = {
        key: (value.to(torch.float16) if half and value.is_floating_point() else value)
        .detach()
        .cpu()
        .contiguous()
        for key, value in state.items()
    }
    with atomic_output(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save(tensors))
    with atomic_output(folder / CONFIG_FILE) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")
