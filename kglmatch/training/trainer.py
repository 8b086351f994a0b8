"""The training loop: batches, losses, checkpoints, validation."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kglmatch import metrics
from kglmatch.datasets import PatchPairs, ScenePairs, find_image_pairs, load_scene_pairs, sample_patch_pairs
from kglmatch.errors import ConfigError, DataError, WeightsError
from kglmatch.files import atomic_output
from kglmatch.network import KGLNet
from kglmatch.training import losses, mining
from kglmatch.training.config import TrainingConfig
from kglmatch.training.sampling import Batch, PatchSampler
from kglmatch.training.schedule import rate_factor

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
MODEL = "model"
_TIMED_STEPS = 12  # steps whose pace a time budget is divided by; the first ones compile


@dataclass(frozen=True)
class StepLosses:
    """The terms of one batch's objective, and what they add up to."""

    descriptor: Tensor
    guided: Tensor
    metric: Tensor
    total: Tensor


def objective(net: KGLNet, batch: Batch, config: TrainingConfig, step: int = 0) -> StepLosses:
    """The training objective of a batch of matching pairs; a part whose weight is 0 is not computed."""
    vis, ir = net.branches(batch.vis, "vis"), net.branches(batch.ir, "ir")
    raw_vis, raw_ir = vis.raw_descriptor.float(), ir.raw_descriptor.float()
    descriptor_vis, descriptor_ir = F.normalize(raw_vis, dim=1), F.normalize(raw_ir, dim=1)
    zero = raw_vis.new_zeros(())

    descriptor = losses.hybrid_triplet_loss(
        descriptor_vis, descriptor_ir, batch.same_place, margin=config.margin, alpha=config.alpha
    )
    if config.norm_weight:
        descriptor = descriptor + config.norm_weight * losses.norm_loss(raw_vis, raw_ir)

    guided = zero
    if config.guided_weight:
        guided = losses.feature_guided_loss(
            vis.descriptor_map.float(), vis.metric_map.float()
        ) + losses.feature_guided_loss(ir.descriptor_map.float(), ir.metric_map.float())

    metric = zero
    if config.metric_weight:
        chosen = []
        if config.negatives in ("hard", "both"):
            distances = losses.descriptor_distances(descriptor_vis.detach(), descriptor_ir.detach())
            chosen.append(mining.hard_negatives(distances, batch.same_place))
        if config.negatives in ("random", "both"):
            generator = torch.Generator(raw_vis.device)
            generator.manual_seed(config.seed * 1_000_003 + step)
            chosen.append(mining.random_negatives(batch.same_place, generator))
        positive = net.metric_head(vis.metric_map, ir.metric_map).float()
        negative = torch.cat(
            [net.metric_head(vis.metric_map, ir.metric_map[rows]).float() for rows in chosen]
        )
        metric = losses.metric_loss(positive, negative)
    total = descriptor + config.guided_weight * guided + config.metric_weight * metric
    return StepLosses(descriptor, guided, metric, total)


@torch.inference_mode()
def validate(net: KGLNet, pairs: PatchPairs, batch_size: int = 128) -> dict[str, float]:
    """FPR95 (percent) of descriptor and metric head on labelled patches, and the head's cross-entropy."""
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
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


class Trainer:
    """One run, in one folder: `checkpoint.pt` to go on from, `log.jsonl`, and `model/` to ship.

    A run that was killed goes on from its last checkpoint and ends with the weights that an unbroken
    run would have ended with on the same device: batches and augmentation depend on the step alone,
    and the checkpoint holds the rest.

    Args:
        config: the run.
        folder: where it lives; made if missing. If it holds a checkpoint, the run is resumed.
        device: "cpu", "cuda", "cuda:1"; "auto" takes CUDA where there is one.

    Raises:
        ConfigError: the folder's checkpoint belongs to another configuration.
        DataError: no image pairs, or too few.
    """

    def __init__(self, config: TrainingConfig, folder: str | Path, *, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.config = config
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        train, validation = _split(config)
        self.sampler = PatchSampler(
            train,
            batch_size=config.batch_size,
            seed=config.seed,
            min_distance=config.min_negative_distance,
            augmentation=config.augmentation,
            device=self.device,
        )
        self.validation = sample_patch_pairs(
            validation, name="validation", max_pairs=config.validation_pairs, seed=config.seed
        )
        torch.manual_seed(config.seed)
        self.net = _initial_network(config).to(self.device, memory_format=torch.channels_last)
        self.net.train()
        self.average = AveragedModel(
            self.net, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
        )
        head = list(self.net.metric_head.parameters())
        in_head = {id(p) for p in head}
        rest = [p for p in self.net.parameters() if id(p) not in in_head]
        self._rates = (config.learning_rate, config.metric_head_learning_rate)
        self.optimizer = torch.optim.Adam(
            [{"params": rest}, {"params": head}], lr=config.learning_rate, fused=self.device.type == "cuda"
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.steps = config.steps
        self.step = 0
        self.best: dict[str, float] | None = None
        if (self.folder / CHECKPOINT).exists():
            self._load(self.folder / CHECKPOINT)
        if config.compile:
            self.net.branches = torch.compile(self.net.branches, dynamic=False)  # type: ignore[method-assign]

    # --- the loop -----------------------------------------------------------------------------

    def train(self, *, time_budget: float | None = None, progress: bool = True) -> dict[str, float]:
        """Runs to the end.

        Args:
            time_budget: minutes; the run's length is set, once, to what fits in them at the pace
                of its first steps. A resumed run keeps the length that it was given.
            progress: show a bar where standard error is a terminal.

        Returns:
            the validation figures of the model that was kept.
        """
        from tqdm import tqdm

        if self.step == 0 and time_budget is not None:
            self.steps = 10**9  # until the pace is known
        started = time.perf_counter()
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=None if progress else True)
        recent: list[dict[str, float]] = []
        while self.step < self.steps:
            if self.step == 2:
                started = time.perf_counter()  # the first steps compile
            recent.append(self._one_step())
            self.step += 1
            if self.step == _TIMED_STEPS and self.steps == 10**9 and time_budget is not None:
                pace = (time.perf_counter() - started) / (_TIMED_STEPS - 2)
                self.steps = max(_TIMED_STEPS + 1, int(time_budget * 60 / pace))
                bar.total = self.steps
                logger.info("%.2f s a step: %d steps fit in %g minutes", pace, self.steps, time_budget)
            bar.update()
            last = self.step == self.steps
            if self.step % self.config.log_every == 0 or last:
                self._log({"step": self.step, **_means(recent)})
                bar.set_postfix(loss=f"{_means(recent)['total']:.3g}")
                recent = []
            if self.step % self.config.validate_every == 0 or last:
                self._validate()
            if self.step % self.config.checkpoint_every == 0 or last:
                self.save_checkpoint()
        bar.close()
        if self.best is None:
            self._validate()
        return dict(self.best or {})

    def _one_step(self) -> dict[str, float]:
        began = time.perf_counter()
        factor = rate_factor(
            self.step,
            self.steps,
            self.config.schedule,
            warmup_steps=self.config.warmup_steps,
            decay_fraction=self.config.decay_fraction,
        )
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        batch = self.sampler.batch(self.step)
        with self._precision():
            terms = objective(self.net, batch, self.config, self.step)
        if not math.isfinite(float(terms.total.detach())):
            raise DataError(
                f"the loss is not finite at step {self.step}; lower learning_rate, or set max_gradient_norm"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(terms.total).backward()
        if self.config.max_gradient_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.net)
        return {
            "descriptor": float(terms.descriptor.detach()) / len(batch.vis),
            "guided": float(terms.guided.detach()),
            "metric": float(terms.metric.detach()),
            "total": float(terms.total.detach()),
            "rate": self._rates[0] * factor,
            "pairs_per_second": len(batch.vis) / (time.perf_counter() - began),
        }

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield

    # --- what is written ----------------------------------------------------------------------

    def _validate(self) -> None:
        from kglmatch.pretrained import save_model

        net = self.average.module
        figures = validate(net, self.validation)
        self._log({"step": self.step, "validation": figures})
        logger.info("step %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        if self.best is None or _merit(figures) < _merit(self.best):
            self.best = {"step": float(self.step), **figures}
            save_model(self.folder / MODEL, net.state_dict(), self.net.config)

    def _log(self, record: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save_checkpoint(self) -> None:
        """Writes everything that the run needs to go on; a kill in the middle leaves the one before."""
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "steps": self.steps,
            "best": self.best,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_output(self.folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise WeightsError(f"cannot read the checkpoint {path}: {error}") from error
        differing = sorted(
            key for key, value in self.config.to_dict().items() if state["config"].get(key) != value
        )
        if differing:
            raise ConfigError(
                f"{path} belongs to a run with other settings ({', '.join(differing)}); "
                "choose another folder, or restore them"
            )
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.steps, self.best = state["step"], state["steps"], state["best"]
        logger.info("going on from step %d of %d", self.step, self.steps)


def _merit(figures: dict[str, float]) -> float:
    """What the checkpoint is chosen by, lower is better; the areas break ties between low FPR95."""
    return (
        figures["descriptor_fpr95"]
        + figures["metric_fpr95"]
        + 100 * (1 - figures["descriptor_auc"])
        + 100 * (1 - figures["metric_auc"])
    )


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(r[key] for r in records) / len(records) for key in records[0]} if records else {}


def _split(config: TrainingConfig) -> tuple[ScenePairs, ScenePairs]:
    """Training and validation scenes; validation is the end of the numbering."""
    pairs = find_image_pairs(config.data)
    if len(pairs) <= config.validation_images:
        raise DataError(
            f"{config.data} holds {len(pairs)} image pairs; {config.validation_images} are held out for "
            "validation, which leaves none to train on"
        )
    cut = len(pairs) - config.validation_images
    return (
        load_scene_pairs(pairs[:cut], max_points=config.max_points),
        load_scene_pairs(pairs[cut:], max_points=config.max_points),
    )


def _initial_network(config: TrainingConfig) -> KGLNet:
    if config.init is None:
        return KGLNet(config.network)
    from kglmatch.pretrained import load_model

    state, network = load_model(config.init)
    net = KGLNet(network)
    net.load_state_dict(state)
    return net.float()
