"""The training objective of a batch: the network's two branches, mining, and the sum of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kglmatch.models.network import KGLNet
from kglmatch.training import losses, mining
from kglmatch.training.config import TrainingConfig
from kglmatch.training.parallel import ALONE, Processes
from kglmatch.training.sampling import Batch, step_generator


@dataclass(frozen=True)
class StepLosses:
    """The terms of one batch's objective, scalars; one that is switched off is 0.

    Attributes:
        descriptor: hybrid triplet loss and weighted norm term, a sum over the batch.
        guided: feature-guided losses of both modalities, means.
        metric: binary cross-entropy of the metric head, a mean.
        distillation: what sets descriptors (a sum) and metric head (a mean) apart from a teacher's.
        total: what is minimised.
    """

    descriptor: Tensor
    guided: Tensor
    metric: Tensor
    distillation: Tensor
    total: Tensor


class TeacherAnswers(NamedTuple):
    """What a teacher says of the patches of a batch: (N, D) descriptors and (N, C, S, S) metric maps."""

    descriptors_vis: Tensor
    map_vis: Tensor
    descriptors_ir: Tensor
    map_ir: Tensor


def ask(teacher: KGLNet, batch: Batch, config: TrainingConfig) -> TeacherAnswers:
    """A teacher's answers, in `config.precision` as the network is run; it gets no gradients."""
    with _autocast(batch, config), torch.no_grad():
        return TeacherAnswers(*teacher.encode(batch.vis, "vis"), *teacher.encode(batch.ir, "ir"))


def objective(
    net: KGLNet,
    batch: Batch,
    config: TrainingConfig,
    step: int = 0,
    processes: Processes = ALONE,
    teacher: KGLNet | None = None,
    answers: TeacherAnswers | None = None,
) -> StepLosses:
    """The training objective of a batch of matching pairs; a part whose weight is 0 is not computed.

    With `config.trained == "metric_head"` the metric loss is all of it, and the rest of the network is run
    without gradients.

    The network runs in `config.precision`, the losses in float32.

    Args:
        net: in training mode.
        batch: the rows of this process; with several processes, descriptors and metric maps of all of
            them are gathered, so that negatives are mined over the whole batch.
        step: number of the batch, which random negatives depend on.
        teacher: in evaluation mode; its descriptors and its scores of matching pairs and hard negatives are
            targets, weighed by `config.distillation_weight`.
        answers: the teacher's to this batch, if they are known; else it is asked.

    Returns:
        `StepLosses`. The mean over the processes of each term, and of each gradient, is that of the
        whole batch.
    """
    head_alone = config.trained == "metric_head"
    with _autocast(batch, config), torch.set_grad_enabled(torch.is_grad_enabled() and not head_alone):
        vis, ir = net.branches(batch.vis, "vis"), net.branches(batch.ir, "ir")
    raw_vis, raw_ir = (processes.gather(side.raw_descriptor.float()) for side in (vis, ir))
    descriptors_vis, descriptors_ir = F.normalize(raw_vis, dim=1), F.normalize(raw_ir, dim=1)

    descriptor = guided = metric = distillation = raw_vis.new_zeros(())
    if not head_alone:
        descriptor = losses.hybrid_triplet_loss(
            descriptors_vis, descriptors_ir, batch.same_place, margin=config.margin, alpha=config.alpha
        )
        if config.norm_weight:
            descriptor = descriptor + config.norm_weight * losses.norm_loss(raw_vis, raw_ir)
    # A head that reads the descriptor trunk has nothing to be guided.
    if config.guided_weight and net.metric_trunk is not None and not head_alone:
        guided = losses.feature_guided_loss(
            vis.descriptor_map.float(), vis.metric_map.float()
        ) + losses.feature_guided_loss(ir.descriptor_map.float(), ir.metric_map.float())
    chosen: list[Tensor] = []
    logits = raw_vis.new_zeros(0)
    if config.metric_weight:
        chosen = choose_negatives(descriptors_vis, descriptors_ir, batch.same_place, config, step)
        maps_vis, maps_ir = vis.metric_map, ir.metric_map
        if not config.metric_loss_trains_trunk:
            maps_vis, maps_ir = maps_vis.detach(), maps_ir.detach()
        with _autocast(batch, config):
            logits = _score(net, maps_vis, maps_ir, chosen, batch.rows, processes)
        positives, negatives = logits[: len(batch.vis)], logits[len(batch.vis) :]
        metric = losses.metric_loss(positives, negatives)
    if teacher is not None:
        # Of random negatives a teacher knows no more than the labels do.
        hard = chosen[: config.hard_negatives]
        distillation = _distillation(
            teacher,
            ask(teacher, batch, config) if answers is None else answers,
            batch,
            None if head_alone else (descriptors_vis, descriptors_ir),
            logits,
            hard,
            config,
            processes,
        )
    total = (
        descriptor
        + config.guided_weight * guided
        + config.metric_weight * metric
        + config.distillation_weight * distillation
    )
    return StepLosses(descriptor, guided, metric, distillation, total)


def _autocast(batch: Batch, config: TrainingConfig) -> torch.autocast:
    precision = getattr(torch, config.precision)
    return torch.autocast(batch.vis.device.type, dtype=precision, enabled=precision != torch.float32)


def _distillation(
    teacher: KGLNet,
    answers: TeacherAnswers,
    batch: Batch,
    descriptors: tuple[Tensor, Tensor] | None,
    logits: Tensor,
    hard: list[Tensor],
    config: TrainingConfig,
    processes: Processes,
) -> Tensor:
    """What sets a network apart from its teacher, in `config.precision` as the network is run.

    Args:
        descriptors: of both sides over the whole batch, (N, D) L2-normalised; None leaves them out.
        logits: of the process's matching pairs, then of its hard negatives, then of others; empty leaves
            them out.
        hard: columns of the hard negatives.
    """
    loss = logits.new_zeros(())
    with _autocast(batch, config), torch.no_grad():
        maps = answers.map_vis, answers.map_ir
        targets = _score(teacher, *maps, hard, batch.rows, processes) if len(logits) else logits
    if descriptors is not None:
        known = answers.descriptors_vis, answers.descriptors_ir
        for ours, theirs in zip(descriptors, known, strict=True):
            loss = loss + losses.descriptor_distillation_loss(ours, processes.gather(theirs))
    if len(targets):
        loss = loss + config.metric_weight * losses.metric_distillation_loss(logits[: len(targets)], targets)
    return loss


def _score(
    net: KGLNet,
    maps_vis: Tensor,
    maps_ir: Tensor,
    chosen: list[Tensor],
    rows: slice,
    processes: Processes,
) -> Tensor:
    """Logits of a process's matching pairs, and then of each choice of negatives, in one call of the head.

    Args:
        maps_vis, maps_ir: (n, C, S, S) of the process's rows.
        chosen: columns of ir over the whole batch, (N,) each.
        rows: of the whole batch that are this process's.
    """
    all_ir = processes.gather(maps_ir)
    map_ir = torch.cat([maps_ir, *(all_ir[columns[rows]] for columns in chosen)])
    logits: Tensor = net.metric_head(torch.cat([maps_vis] * (1 + len(chosen))), map_ir)
    return logits.float()


def choose_negatives(
    vis: Tensor, ir: Tensor, same_place: Tensor, config: TrainingConfig, step: int
) -> list[Tensor]:
    """The negatives of each visible row of the whole batch: columns of ir, (N,) each, first the hard ones."""
    distances = losses.descriptor_distances(vis.detach(), ir.detach())
    generator = step_generator(config.seed, step, "negatives", vis.device)
    hard = mining.hard_negatives(distances, same_place, config.hard_negatives)
    random = mining.random_negatives(same_place, config.random_negatives, generator)
    return [*hard.unbind(1), *random.unbind(1)]
