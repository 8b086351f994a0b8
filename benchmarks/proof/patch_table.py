"""FPR95 of descriptors on patches at the same points: ours, and those that other packages bring."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairs import TEST, Part, find_pairs
from report import markdown

from kglmatch import Matcher
from kglmatch.datasets import PatchSource
from kglmatch.errors import KGLMatchError
from kglmatch.evaluation.baselines import check_baselines
from kglmatch.evaluation.patches import MethodFigures, evaluate_patches
from kglmatch.files import atomic_output
from kglmatch.options import PATCH_BASELINES

PATCHES, TABLE = "patches.json", "patches.md"
BASELINES = ("sift", "xfeat", "aliked", "hardnet", "hynet")
TITLES = {
    "descriptor": "kglmatch, descriptor",
    "metric": "kglmatch, metric head",
    "fused": "kglmatch, both fused",
    "sift": "SIFT",
    "xfeat": "XFeat",
    "aliked": "ALIKED",
    "hardnet": "HardNet",
    "hynet": "HyNet",
}
NEGATIVES = 6


@dataclass(frozen=True)
class PatchSet:
    """Attributes:
    model: the set whose model is measured.
    parts: test pairs; the figures are means over them.
    points: matching pairs of each part, at most.
    """

    model: str
    parts: tuple[Part, ...]
    points: int

    def sources(self, data: Path) -> list[PatchSource]:
        """Those parts that are there."""
        found = [(part, tuple(pair for _, pair in find_pairs(data, [part]))) for part in self.parts]
        return [
            PatchSource(part.folder.rpartition("/")[2], data / part.folder, pairs)
            for part, pairs in found
            if pairs
        ]


ROADSCENE, TNO = TEST["vis-lwir"]
SENTINEL, HIGH_RESOLUTION = TEST["vis-sar"]
SETS = {
    "VIS-NIR scenes": PatchSet("vis-nir", tuple(TEST["vis-nir"]), 250),
    "RoadScene": PatchSet("vis-lwir", (ROADSCENE,), 500),
    "TNO": PatchSet("vis-lwir", (TNO,), 500),
    "Sentinel": PatchSet("vis-sar", (SENTINEL,), 500),
    "radar, 1 m": PatchSet("vis-sar", (HIGH_RESOLUTION,), 500),
}


def measure_patches(
    data: Path, out: Path, models: dict[str, str], sets: list[str], points: int | None = None
) -> str:
    """Measures the sets of these models that patches.json lacks; writes that and patches.md.

    Args:
        points: matching pairs of each folder, at most; None for those of `SETS`.

    Returns:
        the table.
    """
    path = out / PATCHES
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = {title: part for title, part in SETS.items() if part.model in sets and title not in found}
    baselines = available() if missing else []
    for title, part in missing.items():
        sources = part.sources(data)
        if not sources:
            continue
        print(f"{time.strftime('%H:%M:%S')} {title}", flush=True)
        report = evaluate_patches(
            Matcher.from_pretrained(models[part.model], device="cpu"),
            sources,
            max_pairs=points or part.points,
            negatives=NEGATIVES,
            baselines=baselines,
        )
        found[title] = {
            "pairs": [sum(getattr(s, kind) for s in report.subsets) for kind in ("matching", "non_matching")],
            "seconds": round(report.seconds),
            "methods": {figures.method: figures_of(figures) for figures in report.mean},
        }
        with atomic_output(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = table(found) + "\n"
    with atomic_output(out / TABLE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def available() -> list[str]:
    """The baselines that can be used here; of the others, why not is said."""
    names = []
    for name in BASELINES:
        try:
            check_baselines((name,), PATCH_BASELINES)
            names.append(name)
        except KGLMatchError as error:
            print(error, file=sys.stderr)
    return names


def figures_of(figures: MethodFigures) -> dict[str, Any]:
    """FPR95 in percent, and its 95 % interval over images."""
    interval = figures.fpr95_interval
    return {
        "fpr95_percent": round(figures.fpr95_percent, 2),
        "interval": None if interval is None else [round(bound, 2) for bound in interval],
    }


def table(found: dict[str, Any]) -> str:
    """A row for each method, a column for each set, in Markdown."""
    header = ["FPR95, %", *(f"{title}, {found[title]['pairs'][0]} points" for title in found)]
    rows = [header]
    for method, name in TITLES.items():
        cells = [cell(part["methods"].get(method)) for part in found.values()]
        if any(cells):
            rows.append([name, *cells])
    return markdown(rows)


def cell(figures: dict[str, Any] | None) -> str:
    """A figure with its interval."""
    if figures is None:
        return ""
    middle, interval = figures["fpr95_percent"], figures["interval"]
    return f"{middle:.1f}" if interval is None else f"{middle:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"
