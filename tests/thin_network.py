"""A KGL-Net with few channels, and small image pairs, so that whole training runs take seconds.

`python tests/thin_network.py train ...` is `kglmatch train ...` with that network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

CHANNELS = (4, 4, 8, 8, 8, 8, 16, 16)


def make_thin(patch: pytest.MonkeyPatch) -> None:
    """Lets every network made from now on be thin."""
    import kglmatch.network

    patch.setattr(kglmatch.network, "BLOCK_CHANNELS", CHANNELS)
    patch.setattr(kglmatch.network, "MAP_CHANNELS", CHANNELS[-1])


def write_image_pairs(folder: Path, count: int = 4) -> None:
    """Registered pairs 0000_rgb.png, 0000_nir.png, ..., of 80 x 72 pixels."""
    from conftest import other_sensor, texture

    for i in range(count):
        image = texture(80, 72, seed=i)
        for name, picture in (("rgb", image), ("nir", other_sensor(image))):
            cv2.imwrite(str(folder / f"{i:04}_{name}.png"), np.rint(picture * 255).astype(np.uint8))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from kglmatch.cli import main

    make_thin(pytest.MonkeyPatch())
    sys.exit(main())
