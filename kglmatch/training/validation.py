"""How good a network is on labelled patches held out of training."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kglmatch import metrics
from kglmatch.backends.torch import DEFAULT_BATCH
from kglmatch.datasets import PatchPairs
from kglmatch.network import KGLNet


@torch.inference_mode()
def validate(net: KGLNet, pairs: PatchPairs) -> dict[str, float]:
    """Measures a network on labelled patch pairs, in float32 on its own device.

    Args:
        pairs: matching and non-matching pairs.

    Returns:
        FPR95 in percent and the area under the ROC curve, of descriptor and metric head, and the
        metric head's cross-entropy.
    """
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    batch_size = DEFAULT_BATCH[device.type]
    similarity, logits = [], []
    for start in range(0, len(pairs), batch_size):
        rows = slice(start, start + batch_size)
        vis, ir = (
            torch.from_numpy(patches[rows]).to(device).unsqueeze(1).float() / 255
            for patches in (pairs.vis, pairs.ir)
        )
        descriptor_vis, map_vis = net.encode(vis, "vis")
        descriptor_ir, map_ir = net.encode(ir, "ir")
        similarity.append((descriptor_vis * descriptor_ir).sum(1).cpu())
        logits.append(net.metric_head(map_vis, map_ir).float().cpu())
    net.train(was_training)
    descriptor, metric = torch.cat(similarity).numpy(), torch.cat(logits)
    return {
        "descriptor_fpr95": 100 * metrics.fpr_at_recall(descriptor, pairs.labels),
        "metric_fpr95": 100 * metrics.fpr_at_recall(metric.numpy(), pairs.labels),
        "descriptor_auc": metrics.roc_auc(descriptor, pairs.labels),
        "metric_auc": metrics.roc_auc(metric.numpy(), pairs.labels),
        "metric_cross_entropy": float(
            F.binary_cross_entropy_with_logits(metric, torch.from_numpy(pairs.labels).float())
        ),
    }


def merit(figures: dict[str, float]) -> float:
    """What a model is chosen by, lower is better: both FPR95, and the areas, which break ties between
    low ones."""
    return (
        figures["descriptor_fpr95"]
        + figures["metric_fpr95"]
        + 100 * (1 - figures["descriptor_auc"])
        + 100 * (1 - figures["metric_auc"])
    )
