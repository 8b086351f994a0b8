"""Two processes that share each batch do what one alone does: gradients, batch norm, a whole run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from thin_network import make_thin, write_image_pairs

from kglmatch.errors import ConfigError
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.network import KGLNet
from kglmatch.training import PatchSampler, Trainer, TrainingConfig, objective
from kglmatch.training.data import load_training_data
from kglmatch.training.parallel import ALONE, Processes, join_processes, leave_processes, share_batch_norm
from kglmatch.training.run_folder import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    make_thin(monkeypatch)


def settings(folder, **changes):
    return TrainingConfig(
        **{
            "data": str(folder),
            "validation_images": 1,
            "validation_pairs": 20,
            "max_points": 30,
            "steps": 4,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "metric_head_learning_rate": 1e-3,
            "warmup_steps": 1,
            "hard_negatives": 1,
            "random_negatives": 1,
            "compile": False,
            "validate_every": 2,
            "log_every": 1,
            "network": {"patch_size": 16, "descriptor_dim": 8},
            **changes,
        }
    )


def one_step(config, processes):
    """Losses, gradients and batch norm statistics of one batch, by this process and its like."""
    training, _ = load_training_data(config, 16)
    torch.manual_seed(0)
    net = KGLNet(config.network_config(KGLNetConfig())).train()
    share_batch_norm(net, processes)
    batch = PatchSampler(
        training,
        batch_size=config.batch_size,
        patch_size=16,
        augmentation=config.augmentation,
        processes=processes,
    ).batch(3)
    terms = objective(net, batch, config, 3, processes)
    terms.total.backward()
    processes.average_gradients(net)
    return {
        "losses": processes.mean(torch.stack([terms.descriptor, terms.guided, terms.metric]).detach()),
        "gradients": {name: p.grad for name, p in net.named_parameters()},
        "buffers": dict(net.named_buffers()),
    }


def torchrun(code, *args):
    """Runs Python code in two processes, as torchrun starts them; waits for both."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(code), *map(str, args)], env=environment, capture_output=True, text=True, check=False
    )


PROGRAM = """
import pytest, sys, torch
from pathlib import Path
from thin_network import make_thin
make_thin(pytest.MonkeyPatch())
from test_training_parallel import one_step, settings
from kglmatch.training import Trainer
from kglmatch.cli import main
from kglmatch.training.parallel import join_processes

folder = Path(sys.argv[1])
processes, device = join_processes("auto")
for name, changes in (("step", {}), ("pseudo", {"descriptor_siamese": False})):
    config = settings(folder / "data")
    if changes:
        import dataclasses
        config = dataclasses.replace(config, network={**config.network, **changes})
    torch.save(one_step(config, processes), folder / f"{name}{processes.rank}.pt")
trainer = Trainer(settings(folder / "data"), folder / "run", device="cpu")
best = trainer.train(progress=False)
print("rank", processes.rank, bool(best), flush=True)
# A batch that cannot be shared, by the command; it leaves the processes, too.
sys.exit(main(["train", str(folder / "uneven.toml"), "-o", str(folder / "uneven"), "--device", "cpu"]))
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    (tmp_path / "data").mkdir()
    write_image_pairs(tmp_path / "data")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "uneven.toml").write_text(
        f'data = "{(tmp_path / "data").as_posix()}"\nsteps = 2\nbatch_size = 7\nmax_points = 30\n'
        "validation_images = 1\ncompile = false\n[network]\npatch_size = 16\n"
    )
    done = torchrun(program, tmp_path)
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 True", "rank 1 False"], done.stderr
    assert done.returncode != 0
    assert "a batch of 7 pairs cannot be shared evenly by 2 processes" in done.stderr

    for name, siamese in (("step", True), ("pseudo", False)):
        network = {"patch_size": 16, "descriptor_dim": 8, "descriptor_siamese": siamese}
        alone = one_step(settings(tmp_path / "data", network=network), ALONE)
        shared = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert torch.allclose(shared[0]["losses"], alone["losses"], rtol=1e-5)
        for part in ("gradients", "buffers"):
            assert shared[0][part].keys() == alone[part].keys() == shared[1][part].keys()
            for key, tensor in alone[part].items():
                # The same numbers in both processes, so that their weights stay alike.
                assert torch.equal(shared[0][part][key], shared[1][part][key]), key
                difference = (shared[0][part][key] - tensor).float().norm()
                rounding = 1e-5
                if re.fullmatch(r"descriptor_head\.\w+\.conv\.bias", key):
                    # Batch norm takes it out again: its gradient is what rounding leaves of its layer's.
                    layer = alone["gradients"][key.replace("bias", "weight")].norm()
                    rounding = 4 * torch.finfo(torch.float32).eps * layer
                assert difference <= 1e-4 * tensor.float().norm() + rounding, key

    Trainer(settings(tmp_path / "data"), tmp_path / "alone", device="cpu").train(progress=False)
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("run", "alone"))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("run", "alone")
    ]
    assert ours["step"] == theirs["step"] == 4
    # Batch norm is trained, too.
    weight = "descriptor_head.shared.norm.weight"
    assert (ours["net"][weight] - 1).abs().max() > 1e-3
    assert torch.allclose(ours["net"][weight], theirs["net"][weight], atol=2e-3)
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    for shared_line, line in zip(*logs, strict=True):
        if "total" in line:
            # Adam turns rounding of tiny gradients into steps, so later losses agree less closely.
            tolerance = 1e-5 if line["step"] == 1 else 0.02
            assert shared_line["total"] == pytest.approx(line["total"], rel=tolerance)


def test_a_shared_batch_norm_keeps_its_parameters_and_its_mode():
    net = KGLNet(KGLNetConfig(patch_size=16, descriptor_siamese=False))
    net.descriptor_head.ir.eval()
    net.descriptor_head.ir.norm.requires_grad_(False)
    before = [id(p) for p in net.parameters()]
    names = list(net.state_dict())
    share_batch_norm(net, Processes(0, 2))
    # Those that the optimizer holds.
    assert [id(p) for p in net.parameters()] == before and list(net.state_dict()) == names
    for side, trained in (("vis", True), ("ir", False)):
        norm = getattr(net.descriptor_head, side).norm
        assert norm.processes == Processes(0, 2) and norm.training == trained
        assert norm.weight.requires_grad == trained
    # In evaluation it asks no other process.
    assert net.descriptor_head.ir(torch.rand(3, 16, 2, 2)).shape == (3, 128)


def test_alone_nothing_is_gathered():
    x = torch.rand(3, 2, requires_grad=True)
    assert ALONE.gather(x) is x and ALONE.agree(7, torch.device("cpu")) == 7
    assert join_processes("cpu") == (ALONE, torch.device("cpu"))
    net = KGLNet(KGLNetConfig(patch_size=16))
    norm = net.descriptor_head.shared.norm
    share_batch_norm(net, ALONE)
    assert net.descriptor_head.shared.norm is norm
    leave_processes()


def test_one_gpu_for_several_processes_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match='"cuda:0" is one GPU for 2 processes'):
        join_processes("cuda:0")


def test_rows_of_a_process():
    assert [Processes(rank, 3).rows(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
