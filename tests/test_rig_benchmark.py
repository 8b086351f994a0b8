"""`benchmarks/rig.py` runs, small, and its figures are what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """Runs the benchmark on three registered pairs of colour and near infrared."""
    for i in range(3):
        grey = texture(400, 330, i)
        colour = np.stack([grey, grey**1.2, grey**0.8], axis=2)
        for name, image in (("rgb", colour), ("nir", other_sensor(grey))):
            cv2.imwrite(str(tmp_path / f"{i:04}_{name}.png"), np.rint(image * 255).astype(np.uint8))

    def run_benchmark(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / "rig.py"), str(tmp_path), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_benchmark


def test_a_known_rig_is_found_again(run, tmp_path):
    run("--captures", "3", "--bands", "5", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["errors"]) == {"5"} and found["errors"]["5"] < 1
    assert found["rig"]["bands"][0]["num_judged"] >= 2


def test_kills_lose_nothing(run):
    assert "1 kills: all 4 stacks are there" in run("--captures", "4", "--kills", "1")
