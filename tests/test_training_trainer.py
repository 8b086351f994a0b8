"""The run: what it writes, that a kill costs nothing, time budgets, decay branches, and errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from thin_network import make_thin, write_image_pairs

from kglmatch import Matcher
from kglmatch.cli import main
from kglmatch.errors import BackendError, ConfigError, DataError, OutputError, WeightsError
from kglmatch.evaluation.metrics import fpr_at_recall
from kglmatch.fusion import fit_fusion, fuse
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.network import KGLNet
from kglmatch.models.pretrained import load_model, save_model
from kglmatch.training import (
    Augmentation,
    DataSource,
    StepLosses,
    Trainer,
    TrainingConfig,
    rate_factor,
    validate,
    widening,
)
from kglmatch.training import trainer as trainer_module
from kglmatch.training.run_folder import RunFolder, load_checkpoint
from kglmatch.training.validation import Validation, answer, calibrated

NETWORK = {"patch_size": 16, "descriptor_dim": 8}


@pytest.fixture(scope="module", autouse=True)
def thin():
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_image_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def config(data):
    """A few small steps of a small network."""
    return TrainingConfig(
        data=str(data),
        validation_images=1,
        validation_pairs=20,
        max_points=30,
        steps=5,
        batch_size=6,
        learning_rate=2e-3,
        metric_head_learning_rate=1e-3,
        schedule="decay",
        warmup_steps=2,
        random_negatives=1,
        ema_decay=0.5,
        compile=False,
        log_every=2,
        validate_every=3,
        checkpoint_every=2,
        augmentation=Augmentation(shift=1.0),
        network=dict(NETWORK),
    )


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("unbroken")
    best = Trainer(config, folder, device="cpu").train(progress=False)
    return folder, best


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_clock(records):
    return [{k: v for k, v in record.items() if k != "pairs_per_second"} for record in records]


def assert_same_run(folder, other):
    """Two runs ended alike: weights, average, optimizer, best model and log, bit for bit."""
    ours, theirs = (load_checkpoint(f / "checkpoint.pt") for f in (folder, other))
    assert ours["step"] == theirs["step"] and ours["best"] == theirs["best"]
    assert ours["best_inference"] == theirs["best_inference"] != {}
    for part in ("net", "average", "best_state"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part]), part
    for ours_state, theirs_state in zip(
        ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(ours_state[name], theirs_state[name]) for name in theirs_state)
    for name in ("config.json", "model.safetensors"):
        assert (folder / "model" / name).read_bytes() == (other / "model" / name).read_bytes()
    assert without_clock(log_of(folder)) == without_clock(log_of(other))


# --- what a run writes ------------------------------------------------------------------------


def test_a_run_writes_log_checkpoint_and_the_best_model(config, unbroken, data):
    folder, best = unbroken
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "log.jsonl", "model"]
    records = log_of(folder)
    losses = [r for r in records if "total" in r]
    validations = [r for r in records if "validation" in r]
    assert [r["step"] for r in losses] == [2, 4, 5]
    assert [r["step"] for r in validations] == [3, 5]
    assert all(r["pairs_per_second"] > 0 and np.isfinite(r["total"]) for r in losses)
    assert losses[0]["rate"] == pytest.approx(config.learning_rate * 2 / 3)

    def merit(figures):
        return sum(figures[f"{d}_fpr95"] + 100 * (1 - figures[f"{d}_auc"]) for d in ("descriptor", "metric"))

    assert all(r["pairs"] == r["step"] * config.batch_size for r in validations)
    chosen = min(validations, key=lambda r: merit(r["validation"]))
    expected = {"step": chosen["step"], "merit": merit(chosen["validation"]), **chosen["validation"]}
    assert best == pytest.approx(expected)
    assert validations[0]["sets"] == {data.name: validations[0]["validation"]}
    # The model is the average at that step, in a form that inference reads.
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    state = checkpoint["best_state"]
    assert checkpoint["format"] == 3
    matcher = Matcher.from_pretrained(folder / "model", device="cpu")
    assert matcher.config.architecture() == KGLNetConfig(**NETWORK).architecture()
    patches = np.zeros((2, 16, 16), np.uint8)
    assert matcher.describe(patches, "vis", maps=False).descriptors.shape == (2, 8)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_training_lowers_the_loss(config, tmp_path):
    longer = dataclasses.replace(
        config, steps=12, log_every=4, validate_every=12, checkpoint_every=12, learning_rate=4e-3
    )
    Trainer(longer, tmp_path, device="cpu").train(progress=False)
    totals = [record["total"] for record in log_of(tmp_path) if "total" in record]
    assert totals[-1] < 0.9 * totals[0]


def test_the_average_is_an_exponential_one(config, tmp_path):
    trainer = Trainer(dataclasses.replace(config, steps=2), tmp_path, device="cpu")
    trainer.one_step()
    first = trainer.net.metric_head.fc1.weight.detach().clone()
    trainer.one_step()
    second = trainer.net.metric_head.fc1.weight.detach()
    average = trainer.averaged_net.metric_head.fc1.weight
    assert not torch.equal(first, second)
    assert torch.allclose(average, 0.5 * first + 0.5 * second, atol=1e-7)


def test_the_two_learning_rates(config, tmp_path):
    still = dataclasses.replace(config, learning_rate=1e-12, warmup_steps=0)
    trainer = Trainer(still, tmp_path, device="cpu")
    before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
    trainer.one_step()
    for name, parameter in trainer.net.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        assert (moved > 1e-4) == name.startswith("metric_head"), name


def test_validation_is_evaluation(config, unbroken, data):
    folder, best = unbroken
    trainer = Trainer(config, folder, device="cpu")
    net = trainer.averaged_net
    net.load_state_dict(load_checkpoint(folder / "checkpoint.pt")["best_state"])
    found = validate(net, trainer.validation)
    assert {"step": best["step"], "merit": found.merit, **found.mean} == pytest.approx(best)
    (held_out,) = trainer.validation
    assert held_out.vis.shape == (20, 16, 16) and held_out.partners.shape == (20, 6)
    # The same by the evaluation's own means.
    answers = answer(net, held_out)
    assert answers.labels.tolist() == [True] * 20 + [False] * 120
    assert found.mean["descriptor_fpr95"] == 100 * fpr_at_recall(-answers.distances, answers.labels)
    assert found.mean["metric_fpr95"] == 100 * fpr_at_recall(answers.logits, answers.labels)


def test_a_light_network_learns_from_a_teacher(config, unbroken, tmp_path):
    narrow = dataclasses.replace(
        config,
        teacher=str(unbroken[0] / "model"),
        network={
            **NETWORK,
            "channels": [2, 2, 4, 4, 4, 4, 8, 8],
            "strides": [2, 1, 1, 1, 2, 1, 2, 1],
            "metric_trunk": "descriptor",
        },
        steps=16,
        learning_rate=1e-2,
        distillation_weight=10.0,
    )
    trainer = Trainer(narrow, tmp_path, device="cpu")
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    trainer.train(progress=False)
    apart = [record["distillation"] for record in log_of(tmp_path) if "distillation" in record]
    assert apart[-1] < apart[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.teacher.state_dict().items())
    assert saved(tmp_path)["channels"] == [2, 2, 4, 4, 4, 4, 8, 8]
    # The light model is a model like any other.
    matcher = Matcher.from_pretrained(tmp_path / "model", device="cpu")
    (held_out,) = trainer.validation
    features = matcher.describe(held_out.vis, "vis", maps=True)
    assert features.maps.shape[1:] == (8, *features.maps.shape[2:])
    with pytest.raises(ConfigError, match=r"teacher .* has patch_size 16, and this run's network 24"):
        Trainer(
            dataclasses.replace(narrow, network={**narrow.network, "patch_size": 24}),
            tmp_path / "other",
            device="cpu",
        )


def test_a_teacher_is_asked_once_where_batches_come_again(config, unbroken, tmp_path, monkeypatch):
    taught = dataclasses.replace(
        config, teacher=str(unbroken[0] / "model"), distinct_batches=3, steps=8, checkpoint_every=5
    )
    asked = []
    ask = trainer_module.ask

    def counted(teacher, batch, config):
        asked.append(batch.vis.clone())
        return ask(teacher, batch, config)

    monkeypatch.setattr(trainer_module, "ask", counted)
    whole = Trainer(taught, tmp_path / "whole", device="cpu")
    seen, batch = [], whole.sampler.batch
    monkeypatch.setattr(whole.sampler, "batch", lambda number: seen.append(number) or batch(number))
    whole.train(progress=False)
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(asked) == 3 and not torch.equal(asked[0], asked[1])

    # A run that is resumed asks again, and ends with the same weights.
    first = Trainer(taught, tmp_path / "broken", device="cpu")
    first._begin_interval()
    for _ in range(5):
        first.one_step()
    first.save_checkpoint()
    second = Trainer(taught, tmp_path / "broken", device="cpu")
    second.train(progress=False)
    ours, theirs = second.net.state_dict(), whole.net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_saved_model_decides_as_validation_found(config, tmp_path):
    trainer = Trainer(dataclasses.replace(config, steps=2, validate_every=2), tmp_path, device="cpu")
    best = trainer.train(progress=False)
    inference = saved(tmp_path)["inference"]
    assert set(inference) == {"fusion", "decide"}
    errors = {d: best[f"{d}_fpr95"] + 100 * (1 - best[f"{d}_auc"]) for d in ("fused", "metric", "descriptor")}
    assert errors[inference["decide"]] == min(errors.values())

    # In float32: the kept weights through the matcher give validation's fused figures, pair by pair.
    state = load_checkpoint(tmp_path / "checkpoint.pt")["best_state"]
    save_model(tmp_path / "exact", state, KGLNetConfig(**NETWORK, inference=inference), half=False)
    matcher = Matcher.from_pretrained(tmp_path / "exact", device="cpu")
    (held_out,) = trainer.validation
    vis, ir = matcher.describe(held_out.vis, "vis"), matcher.describe(held_out.ir, "ir")
    rows_vis = np.tile(np.arange(20), 7)
    rows_ir = np.concatenate([np.arange(20), held_out.partners.T.ravel()])
    distances = np.linalg.norm(vis.descriptors[rows_vis] - ir.descriptors[rows_ir], axis=1)
    fused = fuse(distances, matcher.score(vis[rows_vis], ir[rows_ir]), inference["fusion"])
    raw = answer(trainer.averaged_net, held_out)  # as validation saw it, without calibration
    fitted = fit_fusion(raw.distances, raw.logits, raw.labels)
    np.testing.assert_allclose(fused, fuse(raw.distances, 1 / (1 + np.exp(-raw.logits)), fitted), atol=2e-3)
    assert 100 * fpr_at_recall(fused, raw.labels) == pytest.approx(best["fused_fpr95"])
    # Calibrated: fitted once more, the logit stays as it is.
    trainer.averaged_net.load_state_dict(state)
    assert validate(trainer.averaged_net, trainer.validation).calibration == pytest.approx((1, 0), abs=0.02)


def test_a_calibrated_head_gives_factor_times_logit_plus_offset(config, tmp_path):
    trainer = Trainer(config, tmp_path, device="cpu")
    net, (held_out,) = trainer.averaged_net, trainer.validation
    before = answer(net, held_out)
    net.load_state_dict(calibrated(net.state_dict(), (3.0, -0.7)))
    np.testing.assert_allclose(answer(net, held_out).logits, 3 * before.logits - 0.7, atol=1e-5)


def test_a_head_that_ranks_worse_than_chance_is_not_turned_round(config, tmp_path):
    trainer = Trainer(config, tmp_path, device="cpu")
    net = trainer.averaged_net
    factor, _ = validate(net, trainer.validation).calibration
    net.load_state_dict(calibrated(net.state_dict(), (-1.0, 0.0)))
    other, _ = validate(net, trainer.validation).calibration
    assert sorted([factor == 1.0, other == 1.0]) == [False, True] and min(factor, other) > 0


# --- kills ------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler of the run catches."""


def dying(whole, calls, *, after=False):
    """A method that kills the run at its call number `calls`, counted from 0: before or after its work."""
    count = itertools.count()

    def method(self, *args):
        number = next(count)
        if number < calls or after:
            whole(self, *args)
        if number >= calls:
            raise Killed

    return method


@pytest.mark.parametrize(
    ("what", "call", "after"),
    [
        ("save_checkpoint", 0, False),  # nothing is left to go on from
        ("save_checkpoint", 1, True),
        ("save_model", 0, False),  # measured and logged, but neither written nor in a checkpoint
        ("save_model", 0, True),  # written, but in no checkpoint
        ("log", 2, True),
    ],
)
def test_a_kill_at_any_moment_costs_nothing(config, unbroken, tmp_path, monkeypatch, what, call, after):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, what, dying(getattr(RunFolder, what), call, after=after))
        with pytest.raises(Killed):
            Trainer(config, tmp_path, device="cpu").train(progress=False)
    Trainer(config, tmp_path, device="cpu").train(progress=False)
    assert_same_run(tmp_path, unbroken[0])


@pytest.mark.slow
def test_sigkill_and_resume_by_the_command(config, unbroken, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(toml(config.to_dict()))
    run = tmp_path / "run"
    arguments = ["train", str(path), "-o", str(run), "--device", "cpu"]
    program = str(Path(__file__).with_name("thin_network.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "KILL_IN_SAVE": "1"}
    killed = subprocess.run(
        [sys.executable, program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL and "Traceback" not in killed.stderr
    assert [path.name[:5] for path in run.glob(".*")] == [".tmp-"]
    assert load_checkpoint(run / "checkpoint.pt")["step"] == 2
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "resuming from step 2" in err and f"{run / 'model'}: step" in out
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.jsonl", "model"]
    assert_same_run(run, unbroken[0])


def toml(values):
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if k not in tables and v is not None]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


def test_a_finished_run_has_nothing_to_do(config, unbroken, monkeypatch):
    folder, best = unbroken
    before = (folder / "log.jsonl").read_bytes()
    trainer = Trainer(config, folder, device="cpu")
    monkeypatch.setattr(trainer, "one_step", lambda: pytest.fail("a step was made"))
    assert trainer.train(progress=False) == best
    assert (folder / "log.jsonl").read_bytes() == before


def test_the_log_is_cut_at_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    lines = [{"step": 2, "a": 1}, {"step": 4, "a": 2}, {"step": 5, "a": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "a')
    folder.cut_log(9)
    assert log_of(tmp_path) == lines
    folder.cut_log(4)
    assert log_of(tmp_path) == lines[:2]
    folder.cut_log(0)
    assert log_of(tmp_path) == []


@pytest.mark.parametrize(
    ("merits", "kept"),
    [([0.001, 0.004, 0.002], 3), ([0.001, 0.004, 0.02], 2), ([0.4, 0.1, 0.2], 2), ([0.3, 0.2, 0.1], 3)],
)
def test_of_models_as_good_as_each_other_the_later_is_kept(merits, kept, config, tmp_path, monkeypatch):
    left = iter(merits)

    def measured(net, sets):
        figures = {"descriptor_errors": next(left), "metric_errors": 0.0}
        return Validation({}, figures, {}, "metric", (1.0, 0.0))

    monkeypatch.setattr(trainer_module, "validate", measured)
    run = Trainer(dataclasses.replace(config, steps=3, validate_every=1), tmp_path, device="cpu")
    assert run.train(progress=False)["step"] == kept


# --- settings that change ---------------------------------------------------------------------


def test_another_run_in_the_same_folder_is_an_error(config, unbroken):
    other = dataclasses.replace(config, batch_size=8, augmentation=Augmentation(shift=2.0))
    with pytest.raises(ConfigError, match=r"other settings \(batch_size 6 -> 8, augmentation"):
        Trainer(other, unbroken[0], device="cpu")
    with pytest.raises(ConfigError, match="steps 5 -> 9"):
        Trainer(dataclasses.replace(config, steps=9), unbroken[0], device="cpu")


def test_a_run_at_a_constant_rate_can_be_made_longer(config, tmp_path):
    constant = dataclasses.replace(config, schedule="constant", steps=2)
    Trainer(constant, tmp_path / "a", device="cpu").train(progress=False)
    longer = dataclasses.replace(constant, steps=3, checkpoint_every=1)
    Trainer(longer, tmp_path / "a", device="cpu").train(progress=False)
    Trainer(longer, tmp_path / "b", device="cpu").train(progress=False)
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert ours["step"] == 3
    assert all(torch.equal(ours["net"][name], theirs["net"][name]) for name in theirs["net"])


def test_a_decay_branches_off_and_the_run_continues(config, tmp_path):
    constant = dataclasses.replace(config, schedule="constant", steps=4, validate_every=100)
    Trainer(constant, tmp_path / "run", device="cpu").train(progress=False)
    parent = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    untouched = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    decay = dataclasses.replace(config, steps=3, validate_every=100)
    branch = Trainer(decay, tmp_path / "decay", device="cpu", decay_from=tmp_path / "run")
    assert branch.step == 4 and branch.steps == 7 and branch.best is None
    assert all(torch.equal(p, parent["net"][name]) for name, p in branch.net.state_dict().items())
    assert branch.optimizer.state_dict()["state"][0]["step"] == 4
    branch.train(progress=False)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == untouched
    records = [r for r in log_of(tmp_path / "decay") if "rate" in r]
    assert [r["step"] for r in records] == [6, 7]
    rates = [r["rate"] / config.learning_rate for r in records]
    assert rates == pytest.approx([rate_factor(1, 3, "cosine"), rate_factor(2, 3, "cosine")])

    # Killed, and resumed by the same command when the first run has moved on.
    again = {"folder": tmp_path / "again", "device": "cpu", "decay_from": tmp_path / "run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", dying(RunFolder.save_checkpoint, 1))
        with pytest.raises(Killed):
            Trainer(decay, **again).train(progress=False)
    Trainer(dataclasses.replace(constant, steps=5), tmp_path / "run", device="cpu").train(progress=False)
    resumed = Trainer(decay, **again)
    assert resumed.step == 6
    resumed.train(progress=False)
    assert_same_run(tmp_path / "again", tmp_path / "decay")


# --- schedules and time -----------------------------------------------------------------------


def test_schedules():
    def factors(schedule, **options):
        return [rate_factor(step, 100, schedule, **options) for step in range(100)]

    assert factors("constant") == [1.0] * 100
    warm = factors("constant", warmup_steps=9)
    assert warm[:3] == pytest.approx([0.1, 0.2, 0.3]) and warm[9:] == [1.0] * 91
    decay = factors("decay", decay_fraction=0.25)
    assert decay[:76] == [1.0] * 76 and decay[76] < 1
    cosine = factors("cosine")
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5)
    for falling in (decay[75:], cosine):
        assert all(a >= b for a, b in itertools.pairwise(falling)) and 0 < falling[-1] < 0.01
    cycle = factors("one-cycle")
    assert cycle[0] == pytest.approx(0.04) and cycle[30] == 1 and 0 < cycle[-1] < 0.01
    assert all(a < b for a, b in itertools.pairwise(cycle[:31]))
    for schedule in ("constant", "decay", "cosine", "one-cycle"):
        for step in range(5):
            begin = rate_factor(step, None, schedule, warmup_steps=3)
            assert begin == pytest.approx(rate_factor(step, 10**9, schedule, warmup_steps=3), abs=1e-6)


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A step takes 1 s, a validation 4 s, a checkpoint 2 s; what is learned does not matter."""
    clock = Clock()
    monkeypatch.setattr(trainer_module.time, "perf_counter", clock)

    def taking(seconds, whole):
        def timed(*args, **kwargs):
            clock.now += seconds
            return whole(*args, **kwargs)

        return timed

    def little(net, *args):
        loss = net.metric_head.fc3.bias.square().sum()
        return StepLosses(loss, loss, loss, loss, loss)

    monkeypatch.setattr(trainer_module, "objective", taking(1.0, little))
    monkeypatch.setattr(trainer_module, "validate", taking(4.0, trainer_module.validate))
    monkeypatch.setattr(RunFolder, "save_checkpoint", taking(2.0, RunFolder.save_checkpoint))
    return clock


def test_a_time_budget_sets_the_length_once(config, tmp_path, clock):
    budgeted = dataclasses.replace(config, validate_every=10, checkpoint_every=10, log_every=100)
    trainer = Trainer(budgeted, tmp_path, device="cpu")
    trainer.train(time_budget=1.0, progress=False)
    # Nobody knows which validation brings a better model, and so one more checkpoint.
    assert 45 <= clock.now <= 64
    assert 20 <= trainer.step < 60
    length = trainer.step
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["fitted_steps"] == length and checkpoint["step"] == length
    # The schedule ended with it.
    assert log_of(tmp_path)[-2]["rate"] < 0.05 * config.learning_rate

    again = Trainer(budgeted, tmp_path, device="cpu")
    assert again.steps == length
    again.train(time_budget=5.0, progress=False)
    assert again.step == length


def test_a_run_killed_before_its_length_was_known_is_fitted_again(config, tmp_path, clock, monkeypatch):
    budgeted = dataclasses.replace(config, validate_every=50, checkpoint_every=4, log_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_fit", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            Trainer(budgeted, tmp_path, device="cpu").train(time_budget=1.0, progress=False)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["fitted_steps"] is None
    clock.now = 100.0
    trainer = Trainer(budgeted, tmp_path, device="cpu")
    trainer.train(time_budget=0.8, progress=False)
    assert trainer.steps == trainer.step and 130 <= clock.now <= 152


# --- mistakes ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(config, tmp_path, monkeypatch):
    trainer = Trainer(config, tmp_path, device="cpu")
    whole = trainer_module.objective

    def broken(net, batch, config, step, *others):
        terms = whole(net, batch, config, step, *others)
        return dataclasses.replace(terms, total=terms.total * (float("nan") if step == 3 else 1))

    monkeypatch.setattr(trainer_module, "objective", broken)
    with pytest.raises(DataError, match="not finite between steps 2 and 4; lower learning_rate"):
        trainer.train(progress=False)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] in (2, 3)
    assert all(torch.isfinite(tensor).all() for tensor in state["net"].values())


def test_a_damaged_or_foreign_checkpoint_is_an_error(config, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(WeightsError, match="cannot read the checkpoint"):
        Trainer(config, tmp_path, device="cpu")
    torch.save({"net": {}}, path)
    with pytest.raises(WeightsError, match="no checkpoint of this version"):
        Trainer(config, tmp_path, device="cpu")
    with pytest.raises(WeightsError, match="cannot read the checkpoint"):
        Trainer(config, tmp_path / "new", device="cpu", decay_from=tmp_path / "none")


def test_a_folder_that_cannot_be_written_is_an_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="it is a file; expected a folder"):
        Trainer(config, tmp_path / "file", device="cpu")
    (tmp_path / "run" / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(OutputError, match="it is a folder"):
        Trainer(config, tmp_path / "run", device="cpu")


def test_a_device_that_is_not_there_is_an_error(config, tmp_path):
    with pytest.raises(BackendError, match="cuda:99"):
        Trainer(config, tmp_path, device="cuda:99")


@pytest.mark.parametrize(("known", "asked"), [(["a", "triton.mix_order_reduction"], False), (["a"], None)])
def test_what_fails_in_the_compiler_is_switched_off_where_it_exists(known, asked, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch._inductor.list_options", lambda: known)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(how["options"]))
    trainer_module.compile_network(KGLNet(KGLNetConfig(metric_trunk="descriptor")))
    assert len(compiled) == 3  # stem, trunk, head
    assert {options.get("triton.mix_order_reduction") for options in compiled} == {asked}


def test_a_network_that_does_not_compile_names_the_way_out(config, tmp_path, monkeypatch):
    def no_backend(graph, inputs):
        raise AssertionError("32 v.s. 8192\nand much more")

    monkeypatch.setattr(
        "kglmatch.training.trainer.compile_network", lambda net: net.stem.compile(backend=no_backend)
    )
    monkeypatch.setattr("kglmatch.training.trainer.check_compiler", lambda device: None)
    run = Trainer(dataclasses.replace(config, compile=True), tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"fails on this network \(.*32 v\.s\. 8192\); set compile = false"):
        run.train(progress=False)


def test_without_a_compiler_the_error_names_the_way_out(config, tmp_path, monkeypatch):
    def no_compiler(function, **options):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(ConfigError, match=r"\(InvalidCxxCompiler: .*found\); .*compile = false"):
        Trainer(dataclasses.replace(config, compile=True), tmp_path, device="cpu")


def test_half_precision_trains(config, tmp_path):
    for precision, trained in (("bfloat16", "all"), ("float16", "all"), ("float16", "metric_head")):
        half = dataclasses.replace(
            config, precision=precision, trained=trained, steps=2, max_gradient_norm=10.0
        )
        trainer = Trainer(half, tmp_path / f"{precision}-{trained}", device="cpu")
        before = trainer.net.metric_head.fc1.weight.detach().clone()
        trainer.train(progress=False)
        assert not torch.equal(before, trainer.net.metric_head.fc1.weight)
        assert trainer.net.metric_head.fc1.weight.dtype == torch.float32
        assert trainer.scaler.is_enabled() == (precision == "float16")


def test_a_run_starts_from_a_model(config, unbroken, tmp_path):
    folder, _ = unbroken
    start = dataclasses.replace(config, init=str(folder / "model"), network={}, learning_rate=1e-12, steps=1)
    trainer = Trainer(start, tmp_path, device="cpu")
    assert trainer.net.config.architecture() == KGLNetConfig(**NETWORK).architecture()
    state = load_checkpoint(folder / "checkpoint.pt")["best_state"]
    for name, tensor in trainer.net.state_dict().items():
        assert torch.allclose(tensor.float(), state[name].float(), rtol=2e-3, atol=1e-4), name


@pytest.fixture(scope="module")
def parent(unbroken, tmp_path_factory):
    """A model with everything that may be measured for it."""
    weights, network = load_model(unbroken[0] / "model")
    inference = {**network.inference, "detector": "fast"}
    folder = tmp_path_factory.mktemp("parent")
    save_model(folder, weights, dataclasses.replace(network, inference=inference))
    return folder


def saved(folder):
    return json.loads((folder / "model" / "config.json").read_text())


@pytest.mark.parametrize(("ir_kind", "detector"), [("lwir", {}), ("nir", {"detector": "fast"})])
def test_a_fine_tuned_model_carries_what_was_measured_for_itself(config, parent, tmp_path, ir_kind, detector):
    start = dataclasses.replace(config, init=str(parent), network={"ir_kind": ir_kind}, steps=1)
    Trainer(start, tmp_path, device="cpu").train(progress=False)
    ours = saved(tmp_path)
    assert ours["ir_kind"] == ir_kind and ours["patch_size"] == 16
    theirs = json.loads((parent / "config.json").read_text())["inference"]
    assert set(ours["inference"]) == {"fusion", "decide", *detector}
    assert ours["inference"].get("detector") == detector.get("detector")
    assert ours["inference"]["fusion"] != theirs["fusion"]


def test_another_metric_branch_starts_from_random_weights(config, parent, tmp_path):
    weights, _ = load_model(parent)
    changed = {"metric_trunk": "descriptor"}, {"head_norm": "none"}, {"head_input": "difference-product"}
    for number, network in enumerate(changed):
        start = dataclasses.replace(config, init=str(parent), network=network)
        net = Trainer(start, tmp_path / str(number), device="cpu").net
        for name, tensor in net.state_dict().items():
            if name.startswith(("stem.", "descriptor_")):
                assert torch.equal(tensor, weights[name]), name
        assert not torch.equal(net.metric_head.fc1.weight, weights["metric_head.fc1.weight"])
        assert (net.metric_trunk is None) == (number == 0)
    for network, said in (
        ({"split_after": 2}, "split_after 4 -> 2"),
        ({"descriptor_dim": 9}, "descriptor_dim 8 -> 9"),
        ({"strides": [2, 1, 2, 1, 1, 1, 2, 1]}, r"strides \[1, .* -> \[2, 1, 2, 1, 1, 1, 2, 1\]"),
        ({"strides": [2, 1, 2, 1, 1, 1, 2, 1], "head_norm": "none"}, "strides"),
        ({"patch_size": 32, "head_norm": "none"}, "patch_size 16 -> 32, head_norm 'frn' -> 'none'"),
    ):
        start = dataclasses.replace(config, init=str(parent), network=network)
        with pytest.raises(ConfigError, match=said) as error:
            Trainer(start, tmp_path / "none", device="cpu")
        assert "\n" not in str(error.value)


# Of the thin network's (4, 4, 8, 8, 8, 8, 16, 16): blocks without channel attention, whose copies change
# nothing but for the noise; then other blocks as well.
@pytest.mark.parametrize(
    ("channels", "noise", "cosine"),
    [([6, 4, 20, 8, 8, 8, 24, 16], 0.0, 0.99999), ([6, 8, 8, 20, 8, 12, 16, 16], None, 0.9)],
)
def test_more_channels_start_as_copies(config, parent, tmp_path, monkeypatch, channels, noise, cosine):
    weights, narrow = load_model(parent)
    before = KGLNet(narrow)
    before.load_state_dict(weights)
    if noise is not None:
        monkeypatch.setattr(widening, "_NOISE", noise)
    start = dataclasses.replace(config, init=str(parent), network={"channels": channels})
    net = Trainer(start, tmp_path, device="cpu").net
    assert net.config.channels == tuple(channels)
    patches = torch.rand(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (n.eval().describe(patches, "vis") for n in (net, before))
    assert (ours * theirs).sum(1).mean() > cosine
    # Copies that stay copies would be of no use.
    conv = net.state_dict()["stem.vis.block1.conv.weight"]
    assert torch.equal(conv[:2], conv[4:]) == (noise == 0)


@pytest.mark.parametrize("channels", [[4, 4, 8, 8, 8, 8, 8, 16], [4, 4, 8, 8, 8, 8, 16, 24]])
def test_fewer_channels_and_other_maps_are_refused(config, parent, tmp_path, channels):
    start = dataclasses.replace(config, init=str(parent), network={"channels": channels})
    with pytest.raises(ConfigError, match=r"channels .* -> .*channels grow, but for the last"):
        Trainer(start, tmp_path, device="cpu")


def test_training_the_metric_head_leaves_everything_else_bit_for_bit(config, parent, tmp_path):
    start = dataclasses.replace(
        config,
        init=str(parent),
        trained="metric_head",
        network={"metric_trunk": "descriptor", "head_norm": "none"},
        ema_decay=0.3,
        max_gradient_norm=1.0,
        hard_negatives=2,
        steps=3,
    )
    trainer = Trainer(start, tmp_path, device="cpu")
    before = {name: tensor.clone() for name, tensor in trainer.net.state_dict().items()}
    weights, _ = load_model(parent)
    assert before["descriptor_head.shared.norm.num_batches_tracked"] > 0
    trainer.train(progress=False)
    kept, _ = load_model(tmp_path / "model")
    for state in (trainer.net.state_dict(), trainer.averaged_net.state_dict(), kept):
        for name, tensor in before.items():
            same = torch.equal(state[name], weights[name] if state is kept and name in weights else tensor)
            if not name.startswith("metric_head."):
                assert same, name
        assert not torch.equal(state["metric_head.fc1.weight"], before["metric_head.fc1.weight"])
    # The log has the rate of what is trained: 1e-3, and two of three warm-up steps.
    assert log_of(tmp_path)[0]["rate"] == pytest.approx(1e-3 * 2 / 3)
    with pytest.raises(ConfigError, match="same `trained`: 'metric_head' there, 'all' here"):
        Trainer(config, tmp_path / "branch", device="cpu", decay_from=tmp_path)


def test_the_average_counts_batches_as_the_network_does(config, tmp_path):
    trainer = Trainer(config, tmp_path, device="cpu")
    for _ in range(3):
        trainer.one_step()
    # Vis and ir, each step.
    assert trainer.averaged_net.descriptor_head.shared.norm.num_batches_tracked == 6


# --- several sources --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(config, data, tmp_path_factory):
    """Two sources with the same last name, and a simulated one."""
    other = tmp_path_factory.mktemp("other") / data.name
    other.mkdir()
    write_image_pairs(other, 3)
    sources = (
        DataSource(str(data), 2.0, 1),
        DataSource(str(other), 1.0, 1),
        DataSource(str(other), 1.0, 0, simulated=True),
    )
    return dataclasses.replace(config, data=sources, batch_size=8, steps=3)


def test_a_run_of_several_sources_measures_each_and_survives_a_kill(several, data, tmp_path, monkeypatch):
    Trainer(several, tmp_path / "whole", device="cpu").train(progress=False)
    record = next(r for r in log_of(tmp_path / "whole") if "sets" in r)
    assert list(record["sets"]) == [source.path for source in several.data[:2]]
    first, second = record["sets"].values()
    assert first != second
    assert record["validation"] == pytest.approx({k: (first[k] + second[k]) / 2 for k in first})
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", dying(RunFolder.save_checkpoint, 1))
        with pytest.raises(Killed):
            Trainer(several, tmp_path / "again", device="cpu").train(progress=False)
    Trainer(several, tmp_path / "again", device="cpu").train(progress=False)
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    changed = dataclasses.replace(several, data=several.data[:2])
    with pytest.raises(ConfigError, match=r"other settings \(data"):
        Trainer(changed, tmp_path / "again", device="cpu")
