"""The training objective against the published code's numbers, its switches, and its precision."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kglmatch.config import SPLITS, KGLNetConfig
from kglmatch.convert import convert_published, published_names
from kglmatch.network import KGLNet
from kglmatch.training import Batch, StepLosses, TrainingConfig, losses, mining, objective

PAPER = TrainingConfig(data="unused")


def small_batch(pairs=4, patch_size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vis = torch.rand(pairs, 1, patch_size, patch_size, generator=generator)
    ir = (vis + 0.1 * torch.rand(vis.shape, generator=generator)).clamp(0, 1)
    return Batch(vis, ir, torch.eye(pairs, dtype=torch.bool))


def small_net(seed=0, **config):
    torch.manual_seed(seed)
    return KGLNet(KGLNetConfig(patch_size=16, **config)).train()


def gradients(net, terms):
    net.zero_grad()
    terms.total.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


# --- the published step -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(parity):
    return json.loads((parity / "train_step.json").read_text())


@pytest.fixture(scope="module")
def published_batch(parity):
    with np.load(parity / "train_step.npz") as file:
        vis, ir = (torch.from_numpy(file[name]).float().unsqueeze(1) / 255 for name in ("vis", "ir"))
        after = {name: file[f"bn_{name}_after"] for name in ("running_mean", "running_var")}
    return Batch(vis, ir, torch.eye(len(vis), dtype=torch.bool)), after


@pytest.fixture(scope="module")
def step(parity, published_batch):
    """One step of ours: the network, the losses, the logits, in that order."""
    net = KGLNet().train()
    state = convert_published(parity / "net.safetensors", parity / "net_metric.safetensors")
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    seen = []
    hook = net.metric_head.register_forward_hook(lambda module, args, output: seen.append(output))
    terms = objective(net, published_batch[0], PAPER)
    hook.remove()
    terms.total.backward()
    return net, terms, torch.cat(seen).detach()


def test_losses_are_those_of_the_published_code(step, published):
    _, terms, logits = step
    close = {"rel": 1e-4}
    assert terms.descriptor.item() == pytest.approx(published["descriptor_loss"], **close)
    guided = published["guided_loss_vis"] + published["guided_loss_ir"]
    assert terms.guided.item() == pytest.approx(guided, **close)
    assert terms.metric.item() == pytest.approx(published["metric_loss"], **close)
    assert terms.total.item() == pytest.approx(published["total"], **close)
    np.testing.assert_allclose(torch.sigmoid(logits), published["metric_scores"], rtol=1e-4)


def test_mined_negatives_and_distances_are_those_of_the_published_code(parity, published, published_batch):
    batch, _ = published_batch
    net = KGLNet().train()
    state = convert_published(parity / "net.safetensors", parity / "net_metric.safetensors")
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        vis, ir = (
            F.normalize(net.branches(patches, modality).raw_descriptor, dim=1)
            for patches, modality in ((batch.vis, "vis"), (batch.ir, "ir"))
        )
    distances = losses.descriptor_distances(vis, ir)
    mined = mining.hard_negatives(distances, batch.same_place)
    assert mined.tolist() == published["hardest_ir_index"]
    assert distances.diagonal().mean().item() == pytest.approx(published["dist_pos"], rel=1e-4)


def test_gradients_are_those_of_the_published_code(step, published):
    net, _, _ = step
    names = [{name: f"{prefix}.{theirs}" for name, theirs in part.items()}
             for prefix, part in zip(("net", "net_metric"), published_names(), strict=True)]
    names = {**names[0], **names[1]}
    theirs = published["gradient_norms"]
    ours = {names[name]: p.grad.norm().item() for name, p in net.named_parameters()}
    assert len(ours) == len(theirs) - sum(name.endswith(".eps") for name in theirs) and len(ours) > 100
    for name, norm in ours.items():
        # A bias before batch norm has no gradient but rounding.
        assert norm == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_batch_norm_after_the_step_is_that_of_the_published_code(step, published_batch):
    norm = step[0].descriptor_head.shared.norm
    _, after = published_batch
    for name, values in after.items():
        np.testing.assert_allclose(getattr(norm, name).numpy(), values, rtol=1e-4, atol=1e-6)
