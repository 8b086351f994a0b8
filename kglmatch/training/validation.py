"""How good a network is on patches held out of training, and what is fitted on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kglmatch.backends.torch import default_batch
from kglmatch.evaluation import metrics
from kglmatch.fusion import fit_calibration, fit_fusion, fuse
from kglmatch.matching import distance_from_cosine
from kglmatch.models.network import KGLNet
from kglmatch.options import DECISIONS
from kglmatch.training.data import ValidationSet


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network says of the pairs of a validation set.

    Attributes:
        distances: (M,) descriptor distances.
        logits: (M,) of the metric head.
        labels: (M,) bool, true for matching pairs.
    """

    distances: NDArray[np.float64]
    logits: NDArray[np.float64]
    labels: NDArray[np.bool_]


@dataclass(frozen=True)
class Validation:
    """Figures of a network, lower is better but for the areas.

    Attributes:
        sets: for each validation set and decision FPR95 in percent, the area under the ROC curve, and both in
            one (`descriptor_fpr95`, `fused_auc`, `metric_errors`, ...; see `metrics.decision_errors`).
        mean: their means, every set weighing the same.
        fusion: descriptor distance and calibrated metric head in one answer (`kglmatch.fusion`).
        decide: the decision with the fewest errors.
        calibration: factor (above 0) and offset of the metric head's logit that make its score a probability.
    """

    sets: dict[str, dict[str, float]]
    mean: dict[str, float]
    fusion: dict[str, float]
    decide: str
    calibration: tuple[float, float]

    @property
    def merit(self) -> float:
        """What a model is chosen by, lower is better: the FPR95 of both branches, and the areas, which
        break ties between low ones."""
        return self.mean["descriptor_errors"] + self.mean["metric_errors"]


def validate(net: KGLNet, sets: Sequence[ValidationSet]) -> Validation:
    """Measures a network in float32 on its own device, and fits fusion and calibration to its answers.

    Raises:
        DataError: the network's answers are not finite.
    """
    answers = [answer(net, one) for one in sets]
    distances, logits, labels = (
        np.concatenate([getattr(a, name) for a in answers]) for name in ("distances", "logits", "labels")
    )
    factor, offset = calibration = _calibration(logits, labels)
    fusion = fit_fusion(distances, factor * logits + offset, labels)
    figures = {
        one.name: _figures(a.distances, factor * a.logits + offset, a.labels, fusion)
        for one, a in zip(sets, answers, strict=True)
    }
    first = next(iter(figures.values()))
    mean = {key: float(np.mean([f[key] for f in figures.values()])) for key in first}
    decide = min(DECISIONS, key=lambda decision: mean[f"{decision}_errors"])
    return Validation(figures, mean, fusion, decide, calibration)


@torch.inference_mode()
def answer(net: KGLNet, patches: ValidationSet) -> Answers:
    """Runs a network over a validation set: N matching pairs, then N pairs for each column of partners."""
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    batch = default_batch(device.type, net.config)

    def encode(side: NDArray[np.uint8], modality: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            net.encode(torch.from_numpy(side[i : i + batch]).to(device).unsqueeze(1).float() / 255, modality)
            for i in range(0, len(side), batch)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    descriptor_vis, map_vis = encode(patches.vis, "vis")
    descriptor_ir, map_ir = encode(patches.ir, "ir")
    n, kinds = patches.partners.shape
    rows_vis = torch.arange(n, device=device).repeat(1 + kinds)
    rows_ir = torch.cat([torch.arange(n), torch.from_numpy(patches.partners.T.reshape(-1))]).to(device)
    cosine = (descriptor_vis[rows_vis] * descriptor_ir[rows_ir]).sum(1)
    logits = torch.cat(
        [
            net.metric_head(map_vis[rows_vis[i : i + batch]], map_ir[rows_ir[i : i + batch]]).float()
            for i in range(0, len(rows_vis), batch)
        ]
    )
    net.train(was_training)
    return Answers(
        distance_from_cosine(cosine.cpu().numpy()).astype(np.float64),
        logits.cpu().numpy().astype(np.float64),
        np.arange(len(rows_vis)) < n,
    )


def calibrated(state: dict[str, torch.Tensor], calibration: tuple[float, float]) -> dict[str, torch.Tensor]:
    """A state dict whose metric head gives the calibrated logit: factor and offset go into its last layer."""
    factor, offset = calibration
    weight, bias = state["metric_head.fc3.weight"], state["metric_head.fc3.bias"]
    return state | {"metric_head.fc3.weight": weight * factor, "metric_head.fc3.bias": bias * factor + offset}


def _calibration(logits: NDArray[np.float64], labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Factor and offset of the logit; those of no change for a head that ranks worse than chance.

    A negative factor would turn the head's ranking round, which is not what was validated.
    """
    factor, offset = fit_calibration(logits, labels)
    return (factor, offset) if factor > 0 else (1.0, 0.0)


def _figures(
    distances: NDArray[np.float64],
    logits: NDArray[np.float64],
    labels: NDArray[np.bool_],
    fusion: dict[str, float],
) -> dict[str, float]:
    """FPR95, area under the curve and errors of each decision, from distances and calibrated logits (M,)."""
    scores = {
        "descriptor": -distances,
        "metric": logits,
        # tanh does not overflow.
        "fused": fuse(distances, 0.5 + 0.5 * np.tanh(logits / 2), fusion),
    }
    figures = {}
    for decision, score in scores.items():
        figures[f"{decision}_fpr95"] = 100 * metrics.fpr_at_recall(score, labels)
        figures[f"{decision}_auc"] = metrics.roc_auc(score, labels)
        figures[f"{decision}_errors"] = metrics.decision_errors(score, labels)
    return figures
