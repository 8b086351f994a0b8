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
from kglmatch.errors import BackendError, ConfigError, DataError, OutputError, WeightsError
from kglmatch.models.config import KGLNetConfig
from kglmatch.training import Augmentation, StepLosses, Trainer, TrainingConfig, rate_factor, validate
from kglmatch.training import trainer as trainer_module
from kglmatch.training.run_folder import RunFolder, load_checkpoint


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
        negatives="both",
        ema_decay=0.5,
        compile=False,
        log_every=2,
        validate_every=3,
        checkpoint_every=2,
        augmentation=Augmentation(shift=1.0),
        network=KGLNetConfig(patch_size=16, descriptor_dim=8),
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
    chosen = min(validations, key=lambda r: trainer_module.merit(r["validation"]))
    assert best == {"step": chosen["step"], **chosen["validation"]}
    # The model is the average at that step, in a form that inference reads.
    state = load_checkpoint(folder / "checkpoint.pt")["best_state"]
    matcher = Matcher.from_pretrained(folder / "model", device="cpu")
    assert matcher.config == config.network
    patches = np.zeros((2, 16, 16), np.uint8)
    assert matcher.describe(patches, "vis", maps=False).descriptors.shape == (2, 8)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_training_lowers_the_loss(config, tmp_path):
    longer = dataclasses.replace(
        config, steps=15, log_every=5, validate_every=15, checkpoint_every=15, learning_rate=3e-3
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
    figures = validate(net, trainer.validation)
    assert {"step": best["step"], **figures} == best
    assert len(trainer.validation) == 40


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


def test_sigkill_and_resume_by_the_command(config, unbroken, tmp_path):
    values = config.to_dict()
    values["network"] = {k: v for k, v in values["network"].items() if k != "inference"}
    path = tmp_path / "run.toml"
    path.write_text(toml(values))
    run = tmp_path / "run"
    program = str(Path(__file__).with_name("thin_network.py"))
    command = [sys.executable, program, "train", str(path), "-o", str(run), "--device", "cpu"]
    options = {"capture_output": True, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, env={**environment, "KILL_IN_SAVE": "1"}, **options, check=False)
    assert killed.returncode == -signal.SIGKILL and "Traceback" not in killed.stderr
    assert [path.name[:5] for path in run.glob(".*")] == [".tmp-"]
    assert load_checkpoint(run / "checkpoint.pt")["step"] == 2
    resumed = subprocess.run(command, env=environment, **options, check=True)
    assert "going on from step 2" in resumed.stderr and f"{run / 'model'}: step" in resumed.stdout
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


def test_a_decay_branches_off_and_the_run_goes_on(config, tmp_path):
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

    def little(net, batch, config, step, processes):
        loss = net.metric_head.fc3.bias.square().sum()
        return StepLosses(loss, loss, loss, loss)

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

    def broken(net, batch, config, step, processes):
        terms = whole(net, batch, config, step, processes)
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


def test_without_a_compiler_the_error_names_the_way_out(config, tmp_path, monkeypatch):
    def no_compiler(function, **options):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(ConfigError, match=r"\(InvalidCxxCompiler: .*found\); .*compile = false"):
        Trainer(dataclasses.replace(config, compile=True), tmp_path, device="cpu")


def test_half_precision_trains(config, tmp_path):
    for precision in ("bfloat16", "float16"):
        half = dataclasses.replace(config, precision=precision, steps=2, max_gradient_norm=10.0)
        trainer = Trainer(half, tmp_path / precision, device="cpu")
        before = trainer.net.metric_head.fc1.weight.detach().clone()
        trainer.train(progress=False)
        assert not torch.equal(before, trainer.net.metric_head.fc1.weight)
        assert trainer.net.metric_head.fc1.weight.dtype == torch.float32
        assert trainer.scaler.is_enabled() == (precision == "float16")


def test_a_run_starts_from_a_model(config, unbroken, tmp_path):
    folder, _ = unbroken
    start = dataclasses.replace(
        config, init=str(folder / "model"), network=KGLNetConfig(), learning_rate=1e-12, steps=1
    )
    trainer = Trainer(start, tmp_path, device="cpu")
    assert trainer.net.config == config.network
    state = load_checkpoint(folder / "checkpoint.pt")["best_state"]
    for name, tensor in trainer.net.state_dict().items():
        assert torch.allclose(tensor.float(), state[name].float(), rtol=2e-3, atol=1e-4), name
