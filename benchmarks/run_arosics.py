"""AROSICS on pairs of rasters, for `maps.py`: jobs and results are lines of JSON.

It reads standard input. It runs in a Python of its own that has AROSICS and GDAL, and needs nothing of
kglmatch.

Each job is {"vis", "ir": paths, "most": pixels, "method": "global" or "local", "window": pixels, "step":
pixels between the places of "local"}. The result is {"places": (N, 2) map coordinates in the second raster,
"shifts": (N, 2) metres that are to be added there, "seconds"}, one place for "global", none where it gave
up. The last line is {"peak": KiB}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

warnings.simplefilter("ignore")


def peak_memory() -> int:
    """KiB that this process has held at most; what its parent held, which `resource` adds, is left out."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def run(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Places (N, 2) and shifts (N, 2) that AROSICS finds, on the map."""
    window = (job["window"], job["window"])
    arosics = importlib.import_module("arosics")
    options = {"max_shift": round(job["most"]), "CPUs": 1, "progress": False, "q": True}
    options |= {"ignore_errors": True}
    none = np.empty((0, 2))
    if job["method"] == "global":
        found = arosics.COREG(job["vis"], job["ir"], ws=window, **options)
        found.calculate_spatial_shifts()
        if not found.success:
            return none, none
        return np.array([found.win_pos_XY]), np.array([[found.x_shift_map, found.y_shift_map]])
    found = arosics.COREG_LOCAL(job["vis"], job["ir"], grid_res=job["step"], window_size=window, **options)
    table = found.CoRegPoints_table
    if "OUTLIER" not in table:
        return none, none
    table = table[(table["X_SHIFT_M"] != found.outFillVal) & (table["OUTLIER"] == False)]  # noqa: E712
    return (
        table[["X_MAP", "Y_MAP"]].to_numpy(float),
        table[["X_SHIFT_M", "Y_SHIFT_M"]].to_numpy(float),
    )


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # AROSICS prints
    importlib.import_module("arosics")
    for line in sys.stdin:
        began = time.perf_counter()
        try:
            places, shifts = run(json.loads(line))
        except Exception as error:  # whatever it raises, it gave up
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            places = shifts = np.empty((0, 2))
        seconds = time.perf_counter() - began
        result = {"places": places.tolist(), "shifts": shifts.tolist(), "seconds": seconds}
        print(json.dumps(result), file=results, flush=True)
    print(json.dumps({"peak": peak_memory()}), file=results, flush=True)


if __name__ == "__main__":
    main()
