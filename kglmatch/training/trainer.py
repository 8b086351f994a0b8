"""The training loop: batches, steps, checkpoints, validation."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from kglmatch.errors import ConfigError, DataError
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.network import KGLNet
from kglmatch.models.pretrained import load_model
from kglmatch.training.batch_objective import TeacherAnswers, ask, objective
from kglmatch.training.config import TrainingConfig
from kglmatch.training.data import TrainingSet, load_training_data
from kglmatch.training.parallel import join_processes, share_batch_norm
from kglmatch.training.run_folder import CHECKPOINT, RunFolder, load_checkpoint
from kglmatch.training.sampling import Batch, PatchSampler
from kglmatch.training.schedule import rate_factor
from kglmatch.training.validation import calibrated, validate
from kglmatch.training.widening import is_wider, widen

logger = logging.getLogger(__name__)

# A time budget is divided by the pace of the first steps: at least this many, and this share of the budget;
# of these the very first compile, and are left out.
_TIMED_STEPS = 12
_COMPILING_STEPS = 2
_TIMED_SHARE = 0.02
# The descriptor loss is a sum over the batch; with PyTorch's 65536 the first steps overflow float16.
_FIRST_LOSS_SCALE = 64.0
# Digits of a merit, in percent, that decide. Of models as good as each other the later one has seen more
# pairs, at a lower rate: images that are told apart without a mistake would else keep any of them.
_MERIT_DIGITS = 2
# Keys of KGLNetConfig that may differ from those of `init`.
_METRIC_BRANCH = ("metric_trunk", "head_norm", "head_input")
# Of the objective, as the log calls them.
_TERMS = ("descriptor", "guided", "metric", "distillation", "total")
# Fusing reductions over different axes fails an assertion of PyTorch 2.11's compiler on CUDA: with light
# networks, and with full ones at some batch sizes.
_COMPILER_OPTIONS = {"triton.mix_order_reduction": False}
# Settings that a resumed run may change, since its weights do not depend on them.
_FREE_SETTINGS = ("compile", "log_every", "checkpoint_every")


class Trainer:
    """One run, in one folder: `checkpoint.pt` to resume from, `log.jsonl`, and `model/` to use.

    A run that was killed resumes from its last checkpoint. On the CPU it ends with the weights of an
    unbroken run, bit for bit: batches, augmentation and random negatives depend on the step alone, and
    the checkpoint holds the rest. On CUDA cuDNN is held to its deterministic algorithms.

    `model/` is the model that was best on the validation images so far, of equals (to a hundredth of a
    percent) the later one: the weights averaged over steps, as float16, with fusion, decision and
    calibration fitted on these images.

    Args:
        config: the run.
        folder: where it lives; made if missing. If it holds a checkpoint, the run is resumed.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        decay_from: folder of another run, or its checkpoint. The new run starts from the other's whole
            state, and lets the rate fall to zero over `config.steps` more steps (schedule "cosine",
            no warm-up). Thus a run at a constant rate, whose end is not known, can be harvested at any
            time, and continues.

    Raises:
        ConfigError: the folder's checkpoint belongs to other settings; `compile` without a compiler.
            A network that does not compile is found out in the first step.
        DataError: no image pairs, or too few.
        WeightsError: a checkpoint or the initial model cannot be read.
        OutputError: the folder cannot be written.
        BackendError: a device that cannot be had.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: str | Path,
        *,
        device: str = "auto",
        decay_from: str | Path | None = None,
    ) -> None:
        self._created = time.perf_counter()
        self.processes, self.device = join_processes(device)
        if decay_from is not None:
            config = dataclasses.replace(config, schedule="cosine", warmup_steps=0)
        self.config = config
        self.folder = RunFolder(folder)
        if self.processes.is_first:
            self.folder.prepare()
        state = load_checkpoint(self.folder.checkpoint) if self.folder.checkpoint.exists() else None
        if state is not None:
            self._check_settings(state)
        elif decay_from is not None:
            state = _branch(Path(decay_from))
        if config.compile:
            check_compiler(self.device)

        self.net = self._make_network(state)
        self.teacher = self._load_teacher()
        self._kept_answers: dict[int, TeacherAnswers] = {}
        training, self.validation = load_training_data(config, self.net.config.patch_size)
        self.sampler = self._make_sampler(training)
        self.average = AveragedModel(self.net, multi_avg_fn=_average_by(config.ema_decay), use_buffers=True)
        self._rates = (config.learning_rate, config.metric_head_learning_rate)
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=_FIRST_LOSS_SCALE, enabled=config.precision == "float16"
        )
        self._start_at_zero()
        if state is not None:
            self._restore(state)
        if self.processes.is_first:
            self.folder.cut_log(self.step)
        share_batch_norm(self.net, self.processes)
        if config.compile:
            compile_network(self.net)
            if self.teacher is not None:
                compile_network(self.teacher)

    def _start_at_zero(self) -> None:
        """What a run counts and keeps apart from its weights, at its beginning."""
        self.step = self.first_step = 0
        self._fitted_steps: int | None = None  # length of the run, if a time budget has set it
        self._fitting = False
        self.best: dict[str, float] | None = None
        self._best_state: dict[str, torch.Tensor] | None = None
        self._best_inference: dict[str, Any] = {}
        # Sums of the losses since the last line of the log, and over how many steps.
        self._sums = torch.zeros(len(_TERMS), dtype=torch.float64, device=self.device)
        self._summed = 0

    @property
    def steps(self) -> int | None:
        """The step at which the run ends; None while a time budget is being fitted."""
        if self._fitting:
            return None
        return self._fitted_steps or self.first_step + self.config.steps

    @property
    def averaged_net(self) -> KGLNet:
        """The network with the weights averaged over steps, which is validated and kept."""
        return cast(KGLNet, self.average.module)

    @property
    def decide(self) -> str | None:
        """The decision that made the fewest errors with the model kept so far; None before there is one."""
        return self._best_inference.get("decide")

    # --- the loop -----------------------------------------------------------------------------

    def train(self, *, time_budget: float | None = None, progress: bool = True) -> dict[str, float]:
        """Runs to the end.

        Args:
            time_budget: minutes from the making of the trainer to the end, validation and all. It
                sets the number of steps, once, by the pace of the first ones; a run that is resumed
                keeps the number that was set.
            progress: show a bar where standard error is a terminal.

        Returns:
            the validation figures of the model that was kept, and its step; empty in all processes
            but the first.

        Raises:
            DataError: the loss is no longer finite.
        """
        self._fitting = time_budget is not None and self._fitted_steps is None
        hide = None if progress and self.processes.is_first else True
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
            tqdm(total=self.steps, initial=self.step, unit="step", disable=hide) as bar,
        ):
            self._begin_interval()
            timed_from, timed_steps = time.perf_counter(), -_COMPILING_STEPS
            while self.steps is None or self.step < self.steps:
                if timed_steps == 0:
                    timed_from = time.perf_counter()
                self.one_step()
                timed_steps += 1
                if self._fitting and time_budget is not None and timed_steps >= _TIMED_STEPS:
                    seconds = (time.perf_counter() - timed_from) / timed_steps
                    self._fit(60 * time_budget, seconds)
                    bar.total = self.steps
                bar.update()
                last = self.step == self.steps
                if last or self.step % self.config.log_every == 0:
                    bar.set_postfix(loss=f"{self._log_losses():.3g}")
                improved = False
                if last or self.step % self.config.validate_every == 0:
                    improved = self._validate()
                if last or improved or self.step % self.config.checkpoint_every == 0:
                    self.save_checkpoint()
        return dict(self.best or {})

    def one_step(self) -> None:
        """Makes one step: batch, loss, gradients, optimizer, average."""
        factor = self._rate_factor()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        number = self.step % self.config.distinct_batches if self.config.distinct_batches else self.step
        batch = self.sampler.batch(number)
        answers = self._answers(batch, number)
        try:
            terms = objective(self.net, batch, self.config, self.step, self.processes, self.teacher, answers)
        except RuntimeError as error:
            # The compiler's own error, of a type whose import takes seconds: it can fail on a network though
            # `check_compiler` found nothing wrong.
            cause = getattr(error, "inner_exception", None)
            if cause is None:
                raise
            raise ConfigError(
                f"torch.compile fails on this network ({_first_line(cause)}); set compile = false"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(terms.total))
        self.processes.average_gradients(self.net)
        if self.config.max_gradient_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.net)
        # Added up on the device: reading them here would make the GPU wait.
        self._sums += torch.stack([getattr(terms, name) for name in _TERMS]).detach()
        self._summed += 1
        self.step += 1

    def _answers(self, batch: Batch, number: int) -> TeacherAnswers | None:
        """The teacher's, kept for when the batch comes again: rounded, so that every round has the same."""
        if self.teacher is None or not self.config.distinct_batches:
            return None
        kept = self._kept_answers.get(number)
        if kept is None:
            kept = self._kept_answers[number] = TeacherAnswers(
                *(tensor.half() for tensor in ask(self.teacher, batch, self.config))
            )
        return TeacherAnswers(*(tensor.float() for tensor in kept))

    def _rate_factor(self) -> float:
        steps = self.steps
        return rate_factor(
            self.step - self.first_step,
            None if steps is None else steps - self.first_step,
            self.config.schedule,
            warmup_steps=self.config.warmup_steps,
            decay_fraction=self.config.decay_fraction,
        )

    def _fit(self, budget: float, seconds_a_step: float) -> None:
        """Sets the length of the run to what fits into a budget of seconds, once the pace is known."""
        spent = time.perf_counter() - self._created
        if not self.processes.agree(int(spent >= _TIMED_SHARE * budget), self.device):
            return
        began = time.perf_counter()
        if self.processes.is_first:
            validate(self.averaged_net, self.validation)
        validation = time.perf_counter() - began
        began = time.perf_counter()
        self.save_checkpoint()
        checkpoint = time.perf_counter() - began
        # The end brings one more validation and checkpoint than the intervals do.
        left = budget - (time.perf_counter() - self._created) - validation - checkpoint
        pace = (
            seconds_a_step
            + validation / self.config.validate_every
            + checkpoint / self.config.checkpoint_every
        )
        more = self.processes.agree(max(1, int(left / pace)), self.device)
        self._fitted_steps, self._fitting = self.step + more, False
        self._begin_interval()
        self._say(
            f"{seconds_a_step:.3g} s a step and {validation:.3g} s a validation: "
            f"the run will have {self._fitted_steps} steps"
        )

    # --- what is written ----------------------------------------------------------------------

    def _begin_interval(self) -> None:
        """Starts the clock by which pairs a second are counted."""
        self._interval_step, self._began, self._aside = self.step, time.perf_counter(), 0.0

    def _mean_losses(self) -> list[float]:
        """Means since the last line of the log of `_TERMS`; that of descriptor is a pair's.

        Raises:
            DataError: not finite.
        """
        means = (self.processes.mean(self._sums.clone()) / max(1, self._summed)).tolist()
        if not all(map(math.isfinite, means)):
            raise DataError(
                f"the loss is not finite between steps {self.step - self._summed} and {self.step}; lower "
                "learning_rate, or set max_gradient_norm"
            )
        means[0] /= self.sampler.batch_size
        return means

    def _log_losses(self) -> float:
        """Writes a line of losses; returns the mean total."""
        means = dict(zip(_TERMS, self._mean_losses(), strict=True))
        seconds = time.perf_counter() - self._began - self._aside
        pairs = (self.step - self._interval_step) * self.sampler.batch_size
        if self.processes.is_first:
            self.folder.log(
                {
                    "step": self.step,
                    **means,
                    "rate": next(g["lr"] for g in self.optimizer.param_groups if g["params"]),
                    "pairs_per_second": pairs / seconds,
                }
            )
        self._sums.zero_()
        self._summed = 0
        self._begin_interval()
        return means["total"]

    def _validate(self) -> bool:
        """Measures the averaged weights and keeps them if they are the best so far; says whether they are."""
        began = time.perf_counter()
        self._mean_losses()  # raises where there is nothing to measure any more
        improved = False
        if self.processes.is_first:
            net = self.averaged_net
            found = validate(net, self.validation)
            pairs = self.step * self.sampler.batch_size
            self.folder.log({"step": self.step, "pairs": pairs, "validation": found.mean, "sets": found.sets})
            self._say(f"step {self.step}: {', '.join(f'{k} {v:.4g}' for k, v in found.mean.items())}")
            improved = self.best is None or (
                round(found.merit, _MERIT_DIGITS) <= round(self.best["merit"], _MERIT_DIGITS)
            )
            if improved:
                self.best = {"step": float(self.step), "merit": found.merit, **found.mean}
                state = {k: v.detach().to("cpu", copy=True) for k, v in net.state_dict().items()}
                self._best_state = calibrated(state, found.calibration)
                self._best_inference = {"fusion": found.fusion, "decide": found.decide}
                self._save_best()
        self._aside += time.perf_counter() - began
        return bool(self.processes.agree(int(improved), self.device))

    def _save_best(self) -> None:
        if self._best_state is not None:
            # The detector depends on the sensors alone; what was fitted to the parent's answers is not kept.
            detector = {k: v for k, v in self.net.config.inference.items() if k == "detector"}
            config = dataclasses.replace(self.net.config, inference=detector | self._best_inference)
            self.folder.save_model(self._best_state, config)

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            logger.info(text)

    def save_checkpoint(self) -> None:
        """Writes everything that the run needs to resume; a kill in the middle leaves the one before.

        Raises:
            DataError: the losses are not finite, and neither will the weights be.
        """
        began = time.perf_counter()
        self._mean_losses()
        if self.processes.is_first:
            self.folder.save_checkpoint(
                {
                    "config": self.config.to_dict(),
                    "network": dataclasses.asdict(self.net.config),
                    "first_step": self.first_step,
                    "step": self.step,
                    "fitted_steps": self._fitted_steps,
                    "best": self.best,
                    "best_state": self._best_state,
                    "best_inference": self._best_inference,
                    "sums": self._sums,
                    "summed": self._summed,
                    "net": self.net.state_dict(),
                    "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                }
            )
        self._aside += time.perf_counter() - began

    # --- where it starts ----------------------------------------------------------------------

    def _make_sampler(self, training: list[TrainingSet]) -> PatchSampler:
        return PatchSampler(
            training,
            batch_size=self.config.batch_size,
            patch_size=self.net.config.patch_size,
            seed=self.config.seed,
            min_distance=self.config.min_negative_distance,
            augmentation=self.config.augmentation,
            device=self.device,
            processes=self.processes,
        )

    def _make_optimizer(self) -> torch.optim.Adam:
        head = list(self.net.metric_head.parameters())
        others = [p for p in self.net.parameters() if all(p is not q for q in head)]
        if self.config.trained == "metric_head":
            for p in others:
                p.requires_grad_(False)
            others = []
        groups = [{"params": others}, {"params": head}]
        return torch.optim.Adam(groups, lr=self.config.learning_rate, fused=True)

    def _check_settings(self, state: dict[str, Any]) -> None:
        """Raises `ConfigError` if the folder's run is another one than is asked for."""
        path = self.folder.checkpoint
        theirs = TrainingConfig.from_dict(state["config"], origin=str(path)).to_dict()
        ours = self.config.to_dict()
        free = set(_FREE_SETTINGS)
        if self.config.schedule == "constant":
            free.add("steps")  # such a run may be made longer
        differing = [key for key in ours if key not in free and ours[key] != theirs[key]]
        if differing:
            changes = ", ".join(f"{key} {theirs[key]!r} -> {ours[key]!r}" for key in differing)
            raise ConfigError(
                f"{path} belongs to a run with other settings ({changes}); "
                "choose another folder, or restore them"
            )

    def _make_network(self, state: dict[str, Any] | None) -> KGLNet:
        if state is not None:
            net = KGLNet(KGLNetConfig(**state["network"]))
        else:
            weights, parent = load_model(self.config.init) if self.config.init else ({}, KGLNetConfig())
            network = self.config.network_config(parent)
            if network.ir_kind == parent.ir_kind:
                network = dataclasses.replace(network, inference=parent.inference)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                net = KGLNet(network)
            if self.config.init:
                _load_shared(net, weights, parent, self.config.seed)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A network that is left as it is keeps its batch norm too.
        return net.to(self.device).train(self.config.trained == "all")

    def _load_teacher(self) -> KGLNet | None:
        if self.config.teacher is None:
            return None
        weights, config = load_model(self.config.teacher)
        for name in ("descriptor_dim", "patch_size"):
            ours, theirs = getattr(self.net.config, name), getattr(config, name)
            if ours != theirs:
                raise ConfigError(
                    f"the teacher {self.config.teacher} has {name} {theirs}, and this run's network {ours}"
                )
        teacher = KGLNet(config)
        teacher.load_state_dict(weights)
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return teacher.to(self.device).eval().requires_grad_(False)

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes over everything that a checkpoint holds.

        Raises:
            ConfigError: a branch of a run in which other weights were trained.
        """
        if state["config"]["trained"] != self.config.trained:
            theirs, ours = state["config"]["trained"], self.config.trained
            raise ConfigError(
                f"decay_from needs a run with the same `trained`: {theirs!r} there, {ours!r} here"
            )
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.first_step = state["step"], state["first_step"]
        self._fitted_steps = state["fitted_steps"]
        self.best, self._best_state = state["best"], state["best_state"]
        self._best_inference = state["best_inference"]
        self._sums.copy_(state["sums"])
        self._summed = state["summed"]
        if self.processes.is_first:
            # The kill may have come between a newer model and its checkpoint.
            self._save_best()
        self._say(f"resuming from step {self.step}")


def _load_shared(net: KGLNet, weights: Mapping[str, torch.Tensor], parent: KGLNetConfig, seed: int) -> None:
    """Loads a parent's weights, widened where the network has more channels; where the metric branch is
    another one, it keeps its random weights.

    Raises:
        ConfigError: an architecture that differs elsewhere.
    """
    ours = net.config
    if is_wider(ours, parent):
        weights = widen(weights, parent, ours, seed=seed)
    branch = tuple(getattr(ours, key) != getattr(parent, key) for key in _METRIC_BRANCH)
    state = net.state_dict()
    taken = {
        key: value
        for key, value in weights.items()
        if not any(branch) or not key.startswith(("metric_trunk.", "metric_head."))
    }
    fits = all(key in state and state[key].shape == value.shape for key, value in taken.items())
    if not fits or ours.strides != parent.strides:  # which no weight shows
        there, asked = parent.architecture(), ours.architecture()
        changes = ", ".join(
            f"{key} {there[key]!r} -> {asked[key]!r}" for key in asked if asked[key] != there[key]
        )
        raise ConfigError(
            f"the weights of `init` do not fit [network] ({changes}); only {', '.join(_METRIC_BRANCH)} "
            "may change, and channels grow, but for the last ones"
        )
    net.load_state_dict(state | taken)


def _branch(path: Path) -> dict[str, Any]:
    """The state of another run, as that of a new one that starts where it is."""
    state = load_checkpoint(path / CHECKPOINT if path.is_dir() else path)
    return {
        **state,
        "first_step": state["step"],
        "fitted_steps": None,
        "best": None,
        "best_state": None,
        "best_inference": {},
        "sums": torch.zeros(len(_TERMS), dtype=torch.float64),
        "summed": 0,
    }


def _average_by(decay: float) -> Callable[..., None]:
    """The exponential average for `AveragedModel`; of whole numbers (batch norm's count) the last."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: Any) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:
            for kept, value in zip(averaged, current, strict=True):
                kept.copy_(value)

    return update


def compile_network(net: KGLNet) -> None:
    """Compiles what takes the time: stems, trunks and metric head, in place. Names of weights stay."""
    # Its import takes seconds.
    from torch._inductor import list_options

    known = list_options()  # an unknown one is an error
    options = {key: value for key, value in _COMPILER_OPTIONS.items() if key in known}
    for part in (net.stem, net.descriptor_trunk, net.metric_trunk, net.metric_head):
        if part is not None:
            part.compile(dynamic=False, options=options)


def check_compiler(device: torch.device) -> None:
    """Raises `ConfigError` where `torch.compile` does not work: better now than after the data is read."""
    x = torch.ones(2, device=device)
    try:
        torch.compile(_probe)(x)
    except RuntimeError as error:
        raise ConfigError(
            f"torch.compile does not work here ({_first_line(error)}); install a C++ compiler, "
            "or set compile = false"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
