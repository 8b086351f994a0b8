"""A KGL-Net with few channels, and small image pairs, so that exports and whole training runs take seconds.

`python tests/thin_network.py train ...` is `kglmatch train ...` with that network. With KILL_IN_SAVE=N in
the environment the process kills itself in the middle of writing its checkpoint number N, from 0.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

if TYPE_CHECKING:
    from kglmatch.export import ExportReport
    from kglmatch.models.config import KGLNetConfig
    from kglmatch.models.network import KGLNet

CHANNELS = (4, 4, 8, 8, 8, 8, 16, 16)


def make_thin(patch: pytest.MonkeyPatch) -> None:
    """Lets every network made from now on be thin."""
    import kglmatch.models.config

    patch.setattr(kglmatch.models.config, "CHANNELS", CHANNELS)


def perturbed(config: KGLNetConfig, *, mildly: bool = False) -> KGLNet:
    """A network whose FRN weights are of either sign, and some of them, unless mildly, tiny or zero."""
    import torch

    from kglmatch.models.network import FRN, KGLNet

    torch.manual_seed(0)
    net = KGLNet(config).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, FRN):
            module.weight.uniform_(0.8, 1.2)
            module.weight.flatten()[::3] *= -1
            module.bias.normal_(0, 0.1)
            if not mildly:
                module.weight.flatten()[1::7] = 0
                module.weight.flatten()[3::11] = -1e-5
                module.bias *= 5
    for name, tensor in net.state_dict().items():
        if name.endswith(("tau", "running_mean")):
            tensor.normal_(-0.5, 0.5)
        if name.endswith(("running_var", "attention.conv.weight")):
            tensor.uniform_(0.5, 2)
    return net


def export_thin(config: KGLNetConfig, folder: Path, **options: Any) -> tuple[KGLNet, ExportReport]:
    """Exports a thin network with perturbed weights; returns it and the report."""
    from kglmatch import export

    config = dataclasses.replace(config, channels=CHANNELS)
    with pytest.MonkeyPatch.context() as patch:
        # An untrained network magnifies rounding: thirty times the largest error of the trained one.
        patch.setattr(export, "TOLERANCE", {"float32": 1e-3, "float16": 0.1, "int8": 0.2})
        net = perturbed(config, mildly=True)
        return net, export.export_onnx(net.state_dict(), config, folder, **options)


def write_image_pairs(folder: Path, count: int = 4) -> None:
    """Registered pairs 0000_rgb.png, 0000_nir.png, ..., of 80 x 72 pixels."""
    from conftest import other_sensor, texture

    for i in range(count):
        image = texture(80, 72, seed=i)
        for name, picture in (("rgb", image), ("nir", other_sensor(image))):
            cv2.imwrite(str(folder / f"{i:04}_{name}.png"), np.rint(picture * 255).astype(np.uint8))


def save_thin_model(folder: Path) -> Path:
    """A thin model with random weights, which `Matcher.from_pretrained` loads after `make_thin`."""
    import torch

    from kglmatch.backends.torch import TorchBackend
    from kglmatch.matcher import Matcher
    from kglmatch.models.config import KGLNetConfig
    from kglmatch.models.network import KGLNet

    torch.manual_seed(0)
    config = KGLNetConfig()
    backend = TorchBackend(KGLNet(config).state_dict(), config, device="cpu", dtype="float32")
    Matcher(backend).save_pretrained(folder, half=False)
    return folder


def write_folders_of_pairs(folder: Path, count: int, size: tuple[int, int] = (112, 104)) -> tuple[Path, Path]:
    """Folders `vis` and `ir` with registered pairs 0000.png, 0001.png, ..."""
    from conftest import other_sensor, texture

    sides = folder / "vis", folder / "ir"
    for side in sides:
        side.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = texture(*size, seed=i)
        for side, picture in zip(sides, (image, other_sensor(image)), strict=True):
            cv2.imwrite(str(side / f"{i:04}.png"), np.rint(picture * 255).astype(np.uint8))
    return sides


def kill_in_save(patch: pytest.MonkeyPatch, number: int) -> None:
    """Lets the process die half-way through a `torch.save`."""
    import torch

    count, whole = itertools.count(), torch.save

    def save(state: object, path: Path) -> None:
        if next(count) < number:
            whole(state, path)
            return
        content = io.BytesIO()
        whole(state, content)
        path.write_bytes(content.getvalue()[: content.tell() // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(torch, "save", save)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from kglmatch.cli import main

    patches = pytest.MonkeyPatch()
    make_thin(patches)
    if "KILL_IN_SAVE" in os.environ:
        kill_in_save(patches, int(os.environ["KILL_IN_SAVE"]))
    sys.exit(main())
