"""A KGL-Net with few channels, and small image pairs, so that whole training runs take seconds.

`python tests/thin_network.py train ...` is `kglmatch train ...` with that network. With KILL_IN_SAVE=N in
the environment the process kills itself in the middle of writing its checkpoint number N, from 0.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

CHANNELS = (4, 4, 8, 8, 8, 8, 16, 16)


def make_thin(patch: pytest.MonkeyPatch) -> None:
    """Lets every network made from now on be thin."""
    import kglmatch.models.network

    patch.setattr(kglmatch.models.network, "BLOCK_CHANNELS", CHANNELS)
    patch.setattr(kglmatch.models.network, "MAP_CHANNELS", CHANNELS[-1])


def write_image_pairs(folder: Path, count: int = 4) -> None:
    """Registered pairs 0000_rgb.png, 0000_nir.png, ..., of 80 x 72 pixels."""
    from conftest import other_sensor, texture

    for i in range(count):
        image = texture(80, 72, seed=i)
        for name, picture in (("rgb", image), ("nir", other_sensor(image))):
            cv2.imwrite(str(folder / f"{i:04}_{name}.png"), np.rint(picture * 255).astype(np.uint8))


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
