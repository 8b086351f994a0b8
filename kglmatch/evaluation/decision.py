"""What a model decides by: fusion and decision, chosen on validation data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kglmatch.datasets import PatchSources, find_patch_sources
from kglmatch.errors import WeightsError
from kglmatch.evaluation import metrics
from kglmatch.evaluation.patches import score_pairs
from kglmatch.files import atomic_output
from kglmatch.fusion import fit_fusion, fuse, logits_of
from kglmatch.matcher import Matcher
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.files import CONFIG_FILE, list_pretrained
from kglmatch.options import DECISIONS, DEFAULT_NEGATIVES
from kglmatch.progress import steps


@dataclass(frozen=True)
class Decision:
    """What `fit_decision` chose.

    Attributes:
        fusion: for ``config.inference["fusion"]``.
        decide: the decision with the fewest errors, for ``config.inference["decide"]``.
        fpr95_percent: of each decision, mean of the subsets.
        pairs: number of patch pairs that it was chosen on.
    """

    fusion: dict[str, float]
    decide: str
    fpr95_percent: dict[str, float]
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": "decision",
            "decide": self.decide,
            "fusion": self.fusion,
            "fpr95_percent": self.fpr95_percent,
            "pairs": self.pairs,
        }


def fit_decision(
    matcher: Matcher,
    source: PatchSources,
    *,
    max_pairs: int | None = None,
    negatives: int = DEFAULT_NEGATIVES,
    seed: int = 0,
    progress: bool = False,
) -> Decision:
    """Fits the fusion to validation data, and chooses the decision with the fewest errors there.

    Test data must not be used: what is measured on them afterwards would say nothing.

    Args:
        matcher: holds the model.
        source, max_pairs, negatives, seed, progress: as for `kglmatch.evaluation.patches.evaluate_patches`.

    Raises:
        DataError, ImageError: data that cannot be read, or a subset with one kind of pairs only.
    """
    answers = []
    for found in steps(find_patch_sources(source), "subsets", show=progress):
        pairs = found.load(max_pairs=max_pairs, negatives=negatives, seed=seed)
        answers.append((*score_pairs(matcher, pairs, progress=progress), pairs.labels))
    distances, scores, labels = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    fusion = fit_fusion(distances, logits_of(scores), labels)
    errors: dict[str, float] = {}
    fpr95: dict[str, float] = {}
    for decision in DECISIONS:
        by_subset = [
            ({"descriptor": -d, "metric": s, "fused": fuse(d, s, fusion)}[decision], label)
            for d, s, label in answers
        ]
        errors[decision] = float(np.mean([metrics.decision_errors(*one) for one in by_subset]))
        fpr95[decision] = float(np.mean([100 * metrics.fpr_at_recall(*one) for one in by_subset]))
    return Decision(fusion, min(errors, key=errors.__getitem__), fpr95, len(labels))


def check_model_folder(model: str | Path) -> Path:
    """The folder of a model whose configuration may be changed.

    Raises:
        WeightsError: a bundled model or one on the Hub, which are not, or a folder without a configuration.
    """
    folder = Path(model)
    if str(model) in list_pretrained() or not folder.is_dir():
        raise WeightsError(
            f"{model} is not a local folder, and only a folder's {CONFIG_FILE} can be changed: "
            "save the model by Matcher.save_pretrained, and name that folder"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise WeightsError(f"{folder} is not a model folder: it lacks {CONFIG_FILE}")
    return folder


def save_decision(folder: str | Path, decision: Decision) -> None:
    """Writes fusion and decision into the `config.json` of a model folder; all else in it stays.

    ONNX graphs next to the weights carry a configuration of their own: export them again.

    Raises:
        WeightsError, ConfigError: not a model folder, or a wrong configuration.
        OutputError: the file cannot be written; the old one then stays.
    """
    path = check_model_folder(folder) / CONFIG_FILE
    config = KGLNetConfig.from_file(path)
    inference = {**config.inference, "fusion": decision.fusion, "decide": decision.decide}
    with atomic_output(path) as temporary:
        temporary.write_text(dataclasses.replace(config, inference=inference).to_json(), encoding="utf-8")
