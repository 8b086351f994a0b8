"""The network: its layers, the published code's numbers, what runs and how often, all architectures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from thin_network import CHANNELS, make_thin
from torch import nn
from torch.nn import functional as F

from kglmatch.errors import ConfigError
from kglmatch.models.config import HEAD_NORMS, METRIC_TRUNKS, SPLITS, KGLNetConfig
from kglmatch.models.convert import convert_published
from kglmatch.models.cost import cost
from kglmatch.models.network import ECA, FRN, TLU, KGLNet, conv_blocks, normalize_activate

ARCHITECTURES = list(itertools.product((True, False), (True, False), SPLITS))


def random_net(config: KGLNetConfig, seed: int = 0) -> KGLNet:
    """No parameter or statistic is left at a value that would hide a mistake."""
    torch.manual_seed(seed)
    net = KGLNet(config).eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim != 2:
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def published(parity):
    net = KGLNet()
    net.load_state_dict(convert_published(parity / "net.safetensors", parity / "net_metric.safetensors"))
    with np.load(parity / "forward.npz") as file:
        numbers = {name: file[name] for name in file.files}
    return net.eval().requires_grad_(False), numbers


@pytest.fixture
def thin(monkeypatch):
    """Networks made from now on are thin."""
    make_thin(monkeypatch)


@pytest.fixture
def small(thin):
    return random_net(KGLNetConfig(patch_size=16))


@pytest.fixture
def one_trunk(thin):
    """The head reads the descriptor trunk's maps, and has no FRN."""
    return random_net(KGLNetConfig(patch_size=16, metric_trunk="descriptor", head_norm="none"))


def as_input(patches: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patches).unsqueeze(1).float() / 255


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradients", [True, False])
def test_frn_is_its_formula(layout, gradients):
    torch.manual_seed(0)
    frn = FRN(3).requires_grad_(False)
    for parameter in frn.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout)
    mean_square = (x.double() ** 2).sum(dim=(2, 3), keepdim=True) / 20
    expected = x / torch.sqrt(mean_square + 1e-6) * frn.weight + frn.bias
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(frn(x).double(), expected, atol=1e-6)


def test_frn_of_half_precision_does_not_overflow():
    x = torch.full((1, 2, 8, 8), 60000.0, dtype=torch.float16)
    assert torch.allclose(FRN(2).half()(x).float(), torch.ones(1, 2, 8, 8), atol=5e-3)


def test_frn_of_nothing_is_its_bias():
    assert torch.equal(FRN(2)(torch.zeros(1, 2, 4, 4)), torch.zeros(1, 2, 4, 4))


def test_tlu_has_a_threshold_for_each_channel():
    tlu = TLU(2)
    tlu.tau.data = torch.tensor([-1.0, 0.5]).view(1, 2, 1, 1)
    x = torch.tensor([-2.0, 0.0]).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    assert tlu(x).flatten().tolist() == [-1.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(("channels", "kernel"), [(32, 3), (64, 3), (128, 5), (256, 5)])
def test_eca_convolves_over_channel_means(channels, kernel):
    torch.manual_seed(0)
    eca = ECA(channels)
    assert eca.conv.weight.shape == (1, 1, kernel)
    x = torch.randn(2, channels, 3, 3)
    padded = F.pad(x.mean(dim=(2, 3)), (kernel // 2, kernel // 2))
    weight = eca.conv.weight.flatten()
    weighted = sum(weight[k] * padded[:, k : k + channels] for k in range(kernel))
    assert torch.allclose(eca(x), x * torch.sigmoid(weighted)[:, :, None, None], atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_gradients_a_map_is_overwritten_with_the_same_numbers(layout):
    torch.manual_seed(0)
    norm, activation = FRN(4), TLU(4)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=layout)
    expected = normalize_activate(x, norm, activation).detach()
    with torch.inference_mode():
        out = normalize_activate(x, norm, activation)
    assert out.data_ptr() == x.data_ptr()
    assert torch.allclose(out, expected, atol=1e-6)


def test_inference_leaves_its_input_alone_and_gives_the_numbers_of_training(small):
    patches = torch.rand(3, 1, 16, 16)
    given = patches.clone()
    with_gradients = small.encode(patches, "vis")
    with torch.inference_mode():
        without = small.encode(patches, "vis")
    assert torch.equal(patches, given)
    for a, b in zip(with_gradients, without, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# --- the published code's numbers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "layout"),
    [
        (16, torch.contiguous_format),
        (16, torch.channels_last),
        (3, torch.contiguous_format),
        (1, torch.channels_last),
    ],
)
def test_the_published_numbers(published, layout, n):
    net, expected = published
    net = net.to(memory_format=layout)
    with torch.inference_mode():
        vis, ir = (as_input(expected[name][:n]) for name in ("vis", "ir"))
        descriptor_vis, map_vis = net.encode(vis, "vis")
        descriptor_ir, map_ir = net.encode(ir, "ir")
        score = net.score(map_vis, map_ir)
        forward = net(vis, ir) if n < 16 else (descriptor_vis, descriptor_ir, score)
    for name, value in (
        ("descriptor_vis", descriptor_vis),
        ("descriptor_ir", descriptor_ir),
        ("score", score),
    ):
        assert np.abs(value.numpy() - expected[name][:n]).max() < 1e-5, name
    for name, value in (("dif_vis", map_vis), ("dif_ir", map_ir)):
        rows = expected[name][:n]
        assert np.allclose(value.numpy()[: len(rows)], rows, rtol=1e-5, atol=1e-5), name
    for value, same in zip(forward, (descriptor_vis, descriptor_ir, score), strict=True):
        assert torch.allclose(value, same, atol=1e-6)


def test_the_published_descriptor_maps(published):
    net, expected = published
    with torch.inference_mode():
        for modality in ("vis", "ir"):
            branches = net.branches(as_input(expected[modality][:2]), modality)
            rows = expected[f"com_{modality}"]
            assert np.allclose(branches.descriptor_map.numpy(), rows, rtol=1e-5, atol=1e-5)
            assert torch.allclose(
                F.normalize(branches.raw_descriptor, dim=1),
                torch.from_numpy(expected[f"descriptor_{modality}"][:2]),
                atol=1e-5,
            )


def test_the_size_of_the_network():
    assert sum(p.numel() for p in KGLNet().parameters()) == pytest.approx(6.41e6, abs=5e3)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("trunk", METRIC_TRUNKS)
@pytest.mark.parametrize("norm", HEAD_NORMS)
def test_the_cost_is_that_of_the_layers(split, trunk, norm):
    config = KGLNetConfig(patch_size=16, split_after=split, metric_trunk=trunk, head_norm=norm)
    net, count = KGLNet(config).eval(), 0

    def hook(module, _, output):
        nonlocal count
        count += module.weight[0].numel() * output.numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    x, of = torch.zeros(1, 1, 16, 16), cost(config)
    with torch.inference_mode():
        for run, expected in (
            (lambda: net.describe(x, "vis"), of.descriptor),
            (lambda: net.encode(x, "ir"), of.descriptor_and_map),
            (lambda: net(x, x), of.pair),
        ):
            count = 0
            run()
            assert count == expected


def test_the_costs_that_the_design_names():
    paper, ours = cost(KGLNetConfig()), cost(KGLNetConfig(metric_trunk="descriptor", head_norm="none"))
    assert [round(c / 1e6) for c in (paper.descriptor, paper.descriptor_and_map, paper.score)] == [
        211,
        324,
        38,
    ]
    assert ours.descriptor_and_map == ours.descriptor == paper.descriptor


# --- what runs ------------------------------------------------------------------------------------


def calls(net: KGLNet) -> dict[str, int]:
    """Counts from now on how often each of the network's parts is run."""
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    for name, module in net.named_modules():
        if name.count(".") == 1 or name == "metric_head":
            module.register_forward_hook(lambda *_, name=name: count(name))
    return counts


def parts(counts: dict[str, int], *prefixes: str) -> dict[str, int]:
    return {name: n for name, n in counts.items() if name.startswith(prefixes)}


def test_each_stem_runs_once(small):
    counts = calls(small)
    with torch.inference_mode():
        small(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16))
    assert parts(counts, "stem") == {"stem.vis": 1, "stem.ir": 1}
    assert parts(counts, "metric_trunk") == {"metric_trunk.vis": 1, "metric_trunk.ir": 1}
    assert parts(counts, "descriptor_trunk") == {"descriptor_trunk.shared": 2}


def test_one_trunk_serves_descriptor_and_map(one_trunk):
    counts = calls(one_trunk)
    x = torch.rand(2, 1, 16, 16)
    with torch.inference_mode():
        descriptor, metric_map = one_trunk.encode(x, "vis")
        assert parts(counts, "stem") == {"stem.vis": 1}
        assert parts(counts, "descriptor_trunk") == {"descriptor_trunk.shared": 1}
        assert not parts(counts, "metric_trunk")
        assert torch.equal(descriptor, one_trunk.describe(x, "vis"))
        assert torch.equal(metric_map, one_trunk.map(x, "vis"))
        branches = one_trunk.branches(x, "vis")
    assert torch.equal(branches.descriptor_map, metric_map) and torch.equal(branches.metric_map, metric_map)


def test_a_head_without_frn_is_its_formula(one_trunk):
    head = one_trunk.metric_head
    a, b = (torch.randn(3, CHANNELS[-1], 2, 2) for _ in range(2))
    given = a.clone(), b.clone()
    with torch.inference_mode():
        score = one_trunk.score(a, b)
        x = F.conv2d((a - b).abs(), head.conv.weight, head.conv.bias, padding=1)
        x = torch.maximum(x, head.activation.tau).mean(dim=(2, 3))
        x = F.relu(F.linear(x, head.fc1.weight, head.fc1.bias))
        x = F.relu(F.linear(x, head.fc2.weight, head.fc2.bias))
        expected = torch.sigmoid(F.linear(x, head.fc3.weight, head.fc3.bias)).flatten()
        assert not torch.allclose(one_trunk.score(2 * a, 2 * b), score, atol=1e-4)  # the size counts
    assert torch.allclose(score, expected, atol=1e-6)
    assert torch.equal(a, given[0]) and torch.equal(b, given[1])


@pytest.mark.parametrize("norm", HEAD_NORMS)
def test_a_head_that_reads_the_product_too(small, norm):
    config = replace(small.config, head_norm=norm, head_input="difference-product")
    head = random_net(config).metric_head
    a, b = (torch.randn(3, CHANNELS[-1], 2, 2) for _ in range(2))
    given = a.clone(), b.clone()
    with torch.inference_mode():
        logit = head(a, b)
        x = F.conv2d(torch.cat([(a - b).abs(), a * b], 1), head.conv.weight, head.conv.bias, padding=1)
        x = head.activation(x if head.norm is None else head.norm(x)).mean(dim=(2, 3))
        expected = head.fc3(F.relu(head.fc2(F.relu(head.fc1(x))))).flatten()
        assert torch.allclose(logit, head(b, a))
        # The difference of -a and -b is that of b and a, and so is the product; that of a and -b is not.
        assert torch.allclose(logit, head(-a, -b))
        assert not torch.allclose(logit, head(a, -b), atol=1e-3)
    assert torch.allclose(logit, expected, atol=1e-6)
    assert torch.equal(a, given[0]) and torch.equal(b, given[1])
    wider, plain = cost(config).score, cost(small.config).score
    assert wider - plain == 9 * CHANNELS[-1] ** 2 * 2 * 2


def test_names_of_the_parts():
    def names(**options):
        with torch.device("meta"):
            return set(KGLNet(KGLNetConfig(**options)).state_dict())

    paper = names()
    assert paper - names(metric_trunk="descriptor") == {n for n in paper if n.startswith("metric_trunk.")}
    assert paper - names(head_norm="none") == {"metric_head.norm.weight", "metric_head.norm.bias"}
    assert names(metric_trunk="descriptor", head_norm="none") < paper
    assert names(metric_trunk="descriptor", metric_siamese=True) == names(metric_trunk="descriptor")


def test_descriptors_alone_do_not_run_the_metric_branch(small):
    counts = calls(small)
    with torch.inference_mode():
        descriptor = small.describe(torch.rand(2, 1, 16, 16), "ir")
    assert parts(counts, "stem") == {"stem.ir": 1}
    assert not parts(counts, "metric")
    assert torch.allclose(descriptor.norm(dim=1), torch.ones(2))


def test_maps_alone_do_not_run_the_descriptor_branch(small):
    counts = calls(small)
    with torch.inference_mode():
        small.map(torch.rand(2, 1, 16, 16), "vis")
    assert not parts(counts, "descriptor")


def test_a_row_does_not_depend_on_the_others(small):
    patches = torch.rand(5, 1, 16, 16)
    with torch.inference_mode():
        together = small.encode(patches, "vis")
        alone = small.encode(patches[3:4], "vis")
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a[3:4], b, atol=1e-5)


def test_brightness_of_a_patch_does_not_matter(small):
    patches = torch.rand(2, 1, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(
            small.describe(patches, "vis"), small.describe(patches * 65535, "vis"), atol=1e-4
        )


@pytest.mark.parametrize("name", ["small", "one_trunk"])
def test_gradients_reach_every_parameter(request, name):
    net = request.getfixturevalue(name).requires_grad_(True)
    vis, ir, score = net(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16))
    (vis.sum() + ir.sum() + score.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(("descriptor_siamese", "metric_siamese", "split"), ARCHITECTURES)
@pytest.mark.parametrize("trunk", METRIC_TRUNKS)
def test_every_architecture_runs(thin, descriptor_siamese, metric_siamese, split, trunk):
    config = KGLNetConfig(
        patch_size=16,
        descriptor_dim=32,
        descriptor_siamese=descriptor_siamese,
        metric_siamese=metric_siamese,
        split_after=split,
        metric_trunk=trunk,
        head_norm="frn" if metric_siamese else "none",
    )
    net = random_net(config)
    x = torch.rand(2, 1, 16, 16)
    with torch.inference_mode():
        of_vis, of_ir = net.encode(x, "vis"), net.encode(x, "ir")
        assert [tuple(t.shape) for t in of_vis] == [(2, 32), (2, CHANNELS[-1], 2, 2)]
        assert net.score(of_vis[1], of_ir[1]).shape == (2,)
    # Without a stem of its own, a Siamese branch is one and the same network for both.
    same = split == 0
    assert torch.equal(of_vis[0], of_ir[0]) == (descriptor_siamese and same)
    assert torch.equal(of_vis[1], of_ir[1]) == (
        (metric_siamese if trunk == "own" else descriptor_siamese) and same
    )


def test_blocks_are_those_that_were_asked_for():
    assert [name for name, _ in conv_blocks(KGLNetConfig(), 5, 8).named_children()] == [
        "block5",
        "block6",
        "block7",
        "block8",
    ]
    assert len(conv_blocks(KGLNetConfig(), 9, 8)) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": [4] * 7}, "channels must be 8 integers"),
        ({"channels": [4, 4, 4, 4, 4, 4, 4, 0]}, "channels must be 8 integers"),
        ({"channels": 4}, "channels must be 8 integers"),
        ({"strides": [1, 1, 2, 1, 2, 1, 1, 1]}, "strides must be 1 or 2, with 8 as their product"),
        ({"strides": [8, 1, 1, 1, 1, 1, 1, 1]}, "strides must be 1 or 2"),
    ],
)
def test_blocks_that_make_no_network_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        KGLNetConfig(**values)


def test_a_light_configuration_survives_json_and_costs_what_its_blocks_do():
    config = KGLNetConfig(
        channels=[16, 16, 32, 32, 64, 64, 128, 128],
        strides=(2, 1, 1, 1, 2, 1, 2, 1),
        metric_trunk="descriptor",
    )
    again = KGLNetConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert again.channels == (16, 16, 32, 32, 64, 64, 128, 128) and again.map_channels == 128
    convolutions = 9 * (
        32**2 * (16 + 16**2 + 16 * 32 + 32**2) + 16**2 * (32 * 64 + 64**2) + 8**2 * (64 * 128 + 128**2)
    )
    assert cost(config).descriptor == cost(config).descriptor_and_map == convolutions + 128 * 64 * 128
