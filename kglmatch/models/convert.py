"""Published KGL-Net checkpoints -> our names. A pickle is read nowhere else, with `weights_only=True`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kglmatch.errors import WeightsError
from kglmatch.models.config import BLOCKS, KGLNetConfig

if TYPE_CHECKING:
    from torch import Tensor

_FRN_EPS = 1e-6


def _block_pairs(ours: str, theirs: str, block: int) -> Iterator[tuple[str, str]]:
    """Names of one block's parameters: (ours, published)."""
    ours, theirs = f"{ours}.block{block}", f"{theirs}".format(block)
    first = 0
    if block == 1:
        yield f"{ours}.input_norm.weight", f"{theirs}.0.weight"
        yield f"{ours}.input_norm.bias", f"{theirs}.0.bias"
        yield f"{ours}.input_activation.tau", f"{theirs}.1.tau"
        first = 2
    for leaf in ("weight", "bias"):
        yield f"{ours}.conv.{leaf}", f"{theirs}.{first}.{leaf}"
        yield f"{ours}.norm.{leaf}", f"{theirs}.{first + 1}.{leaf}"
    yield f"{ours}.activation.tau", f"{theirs}.{first + 2}.tau"
    if block % 2 == 0:
        yield f"{ours}.attention.conv.weight", f"{theirs}.{first + 3}.conv.0.weight"


def published_names() -> tuple[dict[str, str], dict[str, str]]:
    """Our parameter name -> published name, for the network file and for the metric file."""
    net: dict[str, str] = {}
    split = KGLNetConfig().split_after
    for modality, number in (("vis", 1), ("ir", 2)):
        for block in range(1, split + 1):
            net.update(_block_pairs(f"stem.{modality}", f"layer{{}}_com{number}", block))
        for block in range(split + 1, BLOCKS + 1):
            net.update(_block_pairs(f"metric_trunk.{modality}", f"layer{{}}_dif{number}", block))
    for block in range(split + 1, BLOCKS + 1):
        net.update(_block_pairs("descriptor_trunk.shared", "layer{}_com1", block))
    head = "descriptor_head.shared"
    for leaf in ("weight", "bias"):
        net[f"{head}.conv.{leaf}"] = f"layer9_com1.0.{leaf}"
    for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        net[f"{head}.norm.{leaf}"] = f"layer9_com1.1.{leaf}"

    metric: dict[str, str] = {}
    for leaf in ("weight", "bias"):
        metric[f"metric_head.conv.{leaf}"] = f"dif_conv.0.{leaf}"
        metric[f"metric_head.norm.{leaf}"] = f"dif_conv.1.{leaf}"
        for ours, theirs in (("fc1", 0), ("fc2", 2), ("fc3", 4)):
            metric[f"metric_head.{ours}.{leaf}"] = f"metric_net.{theirs}.{leaf}"
    metric["metric_head.activation.tau"] = "dif_conv.2.tau"
    return net, metric


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"checkpoint not found: {path}") from error
    except OSError as error:
        raise WeightsError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        try:
            return load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise WeightsError(f"{path} is not a valid safetensors file: {error}") from error
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        # PyTorch's own message advises to let the file run code.
        raise WeightsError(
            f"cannot read checkpoint {path}: it is damaged, no file of PyTorch, or holds more than tensors "
            "(expected a state dict as torch.save writes it)"
        ) from error
    # Training scripts often wrap the state dict.
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _take(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    published = _read_checkpoint(path)
    # The published FRN carries its constant epsilon as a parameter; ours is the same constant.
    for name in [n for n in published if n.endswith(".eps")]:
        eps = abs(float(published.pop(name)))
        if abs(eps - _FRN_EPS) > 1e-9:
            raise WeightsError(f"{path}: {name} is {eps:g}, but KGL-Net's FRN uses {_FRN_EPS:g}")
    missing = sorted(set(names.values()) - set(published))
    unexpected = sorted(set(published) - set(names.values()))
    if missing or unexpected:
        raise WeightsError(
            f"{path} is not a published KGL-Net checkpoint: "
            f"{len(missing)} keys missing (first: {missing[:3]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:3]})"
        )
    return {ours: published[theirs] for ours, theirs in names.items()}


def convert_published(net: str | Path, metric: str | Path) -> dict[str, Tensor]:
    """Reads a published checkpoint pair into a state dict of `kglmatch.models.network.KGLNet`.

    Args:
        net: the network's `.pth` or `.safetensors` file (`layer1_com1.0.weight`, ...).
        metric: the metric head's file (`dif_conv.0.weight`, ...).

    Returns:
        Names and tensors for `KGLNet(KGLNetConfig()).load_state_dict(..., strict=True)`, in the
        precision of the files.

    Raises:
        WeightsError: a file is missing, unreadable, or its keys do not fit.
    """
    net_names, metric_names = published_names()
    state = _take(Path(net), net_names)
    state.update(_take(Path(metric), metric_names))
    return state
