"""`Matches` as files: `.npz` (all of it), `.json` (all of it, readable), `.csv` (one match a row)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from kglmatch.errors import OutputError
from kglmatch.features import Matches
from kglmatch.files import atomic_output

FORMATS = (".csv", ".json", ".npz")


def check_format(path: str | Path) -> None:
    """Raises `OutputError` unless the file's ending is one of `FORMATS`."""
    if Path(path).suffix.lower() not in FORMATS:
        raise OutputError(f"cannot write matches to {path}: the name must end in one of {', '.join(FORMATS)}")


def matches_to_dict(matches: Matches) -> dict[str, Any]:
    """Plain lists and numbers, as in the `.json` file."""
    return {
        f.name: None if (value := getattr(matches, f.name)) is None else value.tolist()
        for f in dataclasses.fields(matches)
    }


def _csv(matches: Matches) -> str:
    columns: dict[str, np.ndarray] = {
        "index_vis": matches.indices[:, 0],
        "index_ir": matches.indices[:, 1],
        "score": matches.scores,
        "distance": matches.distances,
    }
    for name, points in (("vis", matches.keypoints_vis), ("ir", matches.keypoints_ir)):
        if points is not None:
            columns[f"x_{name}"], columns[f"y_{name}"] = points[:, 0], points[:, 1]
    if matches.inliers is not None:
        columns["inlier"] = matches.inliers.astype(int)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    return text.getvalue()


def save_matches(path: str | Path, matches: Matches) -> None:
    """Writes matches by the file's ending. Raises `OutputError` where it cannot."""
    check_format(path)
    suffix = Path(path).suffix.lower()
    with atomic_output(path) as temporary:
        if suffix == ".npz":
            arrays = {f.name: getattr(matches, f.name) for f in dataclasses.fields(matches)}
            with temporary.open("wb") as file:
                np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
        elif suffix == ".json":
            temporary.write_text(json.dumps(matches_to_dict(matches), indent=1) + "\n", encoding="utf-8")
        else:
            temporary.write_text(_csv(matches), encoding="utf-8")
