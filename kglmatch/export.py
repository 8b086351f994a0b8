"""The network as ONNX graphs, which are run and compared with PyTorch before they are handed over.

The graphs are leaner than the network. Batch norm is part of the convolution before it. FRN's weight
is taken out of the maps: with w > 0, ``max(w n + b, tau) = w max(n + b / w, tau / w)``, and the factor
goes into the next convolution or the channel attention (where w < 0, the convolution before changes its
sign). What remains of FRN and TLU is three operators; FRN is RMSNormalization over height and width,
or, below opset 23, ReduceL2 and a product. The attention's convolution over channel means is a banded
matrix, so that nothing is reshaped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.compose
import onnx.utils
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kglmatch.errors import ExportError, KGLMatchError
from kglmatch.files import atomic_folder
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.files import (
    CARD_FILE,
    CHECKSUMS_FILE,
    CONFIG_FILE,
    DESCRIPTOR_FILES,
    ENCODER_FILES,
    HEAD_FILE,
    PAIR_FILE,
)
from kglmatch.models.network import (
    FRN,
    FRN_EPS,
    TLU,
    ConvBlock,
    DescriptorHead,
    KGLNet,
    MetricHead,
    compare_maps,
)
from kglmatch.options import __version__
from kglmatch.quantization import quantize

OPSETS = range(18, 24)
DEFAULT_OPSET = 23
# The first that has RMSNormalization.
RMS_OPSET = 23
CHECKED_N = (1, 2, 7, 64)
# Of the largest difference; with int8, of the mean one.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "int8": 2e-2}
# Patches of each sensor to calibrate int8 with: fewer are refused. A quarter, at most the largest N that is
# checked, is kept out to measure the error on.
FEWEST_CALIBRATION = 16
# FRN weights below this are taken out as if they were this large; the error is below that of the type.
# In int8 it bounds the range of what is quantised.
SMALLEST_GAIN = {torch.float32: 1e-12, torch.float16: 1e-3}
# Added to the mean square of a raw descriptor; as in PyTorch, norms below 1e-12 count as that.
L2_EPS = 1e-24
LOGGERS = ("torch.onnx", "torch.export", "onnxscript")


@dataclass(frozen=True)
class Graph:
    """A file that was written: its name, size in bytes and number of nodes."""

    file: str
    size: int
    nodes: int


@dataclass(frozen=True)
class Parity:
    """How far an output for N rows is from PyTorch's (float32, on the CPU)."""

    file: str
    output: str
    n: int
    max_error: float
    mean_error: float


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote and measured."""

    folder: Path
    dtype: str
    opset: int
    batch: int | None
    graphs: tuple[Graph, ...]
    parity: tuple[Parity, ...]


def export_onnx(
    state: Mapping[str, Tensor],
    config: KGLNetConfig,
    folder: str | Path,
    *,
    name: str = "KGL-Net",
    half: bool = False,
    calibration: Mapping[str, NDArray[np.float32]] | None = None,
    batch: int | None = None,
    opset: int = DEFAULT_OPSET,
) -> ExportReport:
    """Writes the network as ONNX graphs, runs them with onnxruntime and compares with PyTorch.

    The folder gets `encoder_vis.onnx` and `encoder_ir.onnx` (patches (N, 1, 64, 64) float32 in [0, 1]
    -> descriptor (N, 128), metric_map (N, 256, 8, 8)), `descriptor_vis.onnx` and `descriptor_ir.onnx`
    (the same without the metric branch), `metric_head.onnx` (metric_map_vis, metric_map_ir -> score
    (N,)), `pair_score.onnx` (patches_vis, patches_ir -> score), `config.json`, a model card and
    `SHA256SUMS`. No file refers to another.

    Args:
        state: state dict of `KGLNet(config)`.
        config: the architecture.
        folder: a new folder, or an empty one.
        name: the model's name, for the card.
        half: convolutions in float16; FRN statistics, pooling and the L2 norm in float32, and so are
            inputs and outputs. No input in [0, 65535] overflows.
        calibration: "vis" and "ir" -> patches (N, 64, 64) float32 in [0, 1], row by row of the same
            place, at least 16: convolutions in int8 (`kglmatch.quantization`) with ranges measured on
            three quarters of them; None does not quantise. FRN, TLU, attention and the L2 norm stay in
            float32.
        batch: a fixed N; None leaves it open.
        opset: 18 to 23; below 23 for onnxruntime before 1.23, or TensorRT before 10.15.

    Returns:
        files, sizes, node counts and the measured differences.

    Raises:
        KGLMatchError: a batch below 1, an opset outside 18 to 23, calibration with half, a fixed batch or
            an older opset, or with patches that are too few or of the wrong shape.
        ExportError: an output differs from PyTorch's by more than 1e-4 (half: 5e-3; int8: 0.02 on
            average, on the patches that were kept out). Nothing is left behind.
        OutputError: the folder cannot be made.
    """
    if batch is not None and batch < 1:
        raise KGLMatchError(f"batch must be at least 1, or None for any, got {batch}")
    if opset not in OPSETS:
        raise KGLMatchError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    net = KGLNet(config)
    net.load_state_dict({key: value.detach().cpu() for key, value in state.items()})
    net.eval().requires_grad_(False)
    dtype = "float16" if half else "float32" if calibration is None else "int8"
    if calibration is not None and (half or batch is not None or opset < RMS_OPSET):
        raise KGLMatchError(
            f"int8 goes with neither half precision nor a fixed batch, and needs opset {RMS_OPSET}"
        )
    examples, calibration = _split(calibration, config)
    with atomic_folder(folder) as temporary:
        graphs = []
        for file, model in _models(net, dtype, batch, opset, calibration).items():
            _sign(model, file, net, dtype)
            onnx.checker.check_model(model, full_check=True)
            data = model.SerializeToString(deterministic=True)
            (temporary / file).write_bytes(data)
            graphs.append(Graph(file, len(data), len(model.graph.node)))
        parity = _compare(temporary, net, batch, examples)
        _check(parity, dtype)
        report = ExportReport(Path(folder), dtype, opset, batch, tuple(graphs), parity)
        sums = [
            f"{hashlib.sha256((temporary / g.file).read_bytes()).hexdigest()}  {g.file}\n" for g in graphs
        ]
        (temporary / CHECKSUMS_FILE).write_text("".join(sums), encoding="utf-8")
        (temporary / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        (temporary / CARD_FILE).write_text(model_card(report, config, name), encoding="utf-8")
    return report


def _split(
    calibration: Mapping[str, NDArray[np.float32]] | None, config: KGLNetConfig
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]] | None]:
    """Patches (N, 1, P, P) of both sensors to measure the error on, and those to calibrate with.

    Raises:
        KGLMatchError: as for `export_onnx`.
    """
    size, most = config.patch_size, max(CHECKED_N)
    if calibration is None:
        made = example_patches(most + 1, size)[:, None]
        return {"vis": made[:most], "ir": made[1:]}, None
    shapes = {modality: tuple(np.shape(calibration[modality])) for modality in ENCODER_FILES}
    n = shapes["vis"][0] if shapes["vis"] else 0
    if set(shapes.values()) != {(n, size, size)} or n < FEWEST_CALIBRATION:
        raise KGLMatchError(
            f"int8 is calibrated with at least {FEWEST_CALIBRATION} patches ({size}, {size}) of either "
            f"sensor, as many of one as of the other; got {shapes['vis']} and {shapes['ir']}"
        )
    kept = min(most, n // 4)
    patches = {m: np.ascontiguousarray(calibration[m], np.float32)[:, None] for m in ENCODER_FILES}
    return {m: p[-kept:] for m, p in patches.items()}, {m: p[:-kept] for m, p in patches.items()}


# --- the lean network -----------------------------------------------------------------------------


class _FRNTLU(nn.Module):
    """FRN and TLU, divided by `gain` (C,): ``max(weight x / rms(x) + shift, threshold)``.

    FRN's weight is expected in `gain` and in the sign of x; `weight` is there for the only channel of
    the input, which has no convolution before it.

    Shape: (N, C, size, size) -> the same
    """

    shift: Tensor
    threshold: Tensor
    weight: Tensor

    def __init__(
        self, norm: FRN, activation: TLU, gain: Tensor, size: int, opset: int, weight: float = 1.0
    ) -> None:
        super().__init__()
        divisor = gain.double().view(1, -1, 1, 1)
        self.register_buffer("shift", (norm.bias.double() / divisor).to(gain.dtype))
        self.register_buffer("threshold", (activation.tau.double() / divisor).to(gain.dtype))
        self.one_operator = opset >= RMS_OPSET
        if self.one_operator:
            self.register_buffer("weight", torch.full((size, size), weight, dtype=gain.dtype))
        # weight / sqrt(sum / size^2 + eps) = weight size / sqrt(sum + eps size^2)
        self.numerator = weight * size
        self.eps = FRN_EPS * size * size

    def forward(self, x: Tensor) -> Tensor:
        if self.one_operator:
            x = F.rms_norm(x, self.weight.shape, self.weight, FRN_EPS)
        else:
            norm: Tensor = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.float32)
            x = x * (self.numerator / torch.sqrt(norm * norm + self.eps)).to(x.dtype)
        return torch.maximum(x + self.shift, self.threshold)


class _TLU(nn.Module):
    """``max(x, tau)``: the activation of a metric head without FRN. Shape: (N, C, H, W) -> the same"""

    tau: Tensor

    def __init__(self, activation: TLU, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("tau", activation.tau.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.tau)


class _Block(nn.Module):
    """A `ConvBlock` whose input comes divided by `gain_in` (C,), and whose output goes divided by `gain`.

    With attention the output has its own size, and `gain` is None.
    """

    attention: Tensor
    attention_gain: Tensor

    def __init__(
        self, block: ConvBlock, gain_in: Tensor | None, size: int, dtype: torch.dtype, opset: int
    ) -> None:
        super().__init__()
        self.input_norm = None
        if block.input_norm is not None and block.input_activation is not None:
            # In float32, because the squares of the input may be large.
            self.input_norm = _FRNTLU(
                block.input_norm,
                block.input_activation,
                torch.ones(1),
                size * block.conv.stride[0],
                opset,
                weight=float(block.input_norm.weight),
            )
        self.conv, gain = _fold(block.conv, block.norm, gain_in, dtype)
        self.norm = _FRNTLU(block.norm, block.activation, gain, size, opset)
        self.gain: Tensor | None = gain
        self.has_attention = block.attention is not None
        if block.attention is not None:
            kernel = block.attention.conv.weight.double().flatten()
            matrix = _banded(kernel, len(gain)) * gain.double()
            self.register_buffer("attention", matrix[:, :, None, None].to(dtype))
            self.register_buffer("attention_gain", gain.view(1, -1, 1, 1))
            self.gain = None

    def forward(self, x: Tensor) -> Tensor:
        if self.input_norm is not None:
            x = self.input_norm(x)
        x = self.norm(self.conv(x.to(self.conv.weight.dtype)))
        if self.has_attention:
            mean = x.float().mean(dim=(2, 3), keepdim=True).to(x.dtype)
            x = x * (torch.sigmoid(F.conv2d(mean, self.attention)) * self.attention_gain)
        return x


class _DescriptorHead(nn.Module):
    """Convolution and batch norm as one matrix, then the L2 norm: (N, C, S, S) -> (N, D) float32."""

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(self, head: DescriptorHead, dtype: torch.dtype, opset: int) -> None:
        super().__init__()
        state = {key: value.double() for key, value in head.state_dict().items()}
        factor = state["norm.weight"] / torch.sqrt(state["norm.running_var"] + head.norm.eps)
        weight = state["conv.weight"].flatten(1) * factor[:, None]
        bias = (state["conv.bias"] - state["norm.running_mean"]) * factor + state["norm.bias"]
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))
        self.one_operator = opset >= RMS_OPSET
        if self.one_operator:
            # The norm is sqrt(D) times the root of the mean square.
            self.register_buffer("scale", torch.full((len(bias),), len(bias) ** -0.5))

    def forward(self, x: Tensor) -> Tensor:
        raw = F.linear(x.flatten(1), self.weight, self.bias).float()
        if self.one_operator:
            return F.rms_norm(raw, self.scale.shape, self.scale, L2_EPS)
        norm: Tensor = torch.linalg.vector_norm(raw, dim=1, keepdim=True)
        return raw / norm.clamp_min(L2_EPS**0.5)


class _Encoder(nn.Module):
    """(N, 1, P, P) -> descriptors (N, D) and metric maps (N, C, S, S), both float32."""

    def __init__(self, net: KGLNet, modality: str, dtype: torch.dtype, opset: int) -> None:
        super().__init__()
        size = net.config.patch_size
        self.stem, size = _blocks(net.stem.select(modality), size, dtype, opset)
        self.descriptor_trunk, _ = _blocks(net.descriptor_trunk.select(modality), size, dtype, opset)
        self.metric_trunk = (
            None
            if net.metric_trunk is None
            else _blocks(net.metric_trunk.select(modality), size, dtype, opset)[0]
        )
        head = cast(DescriptorHead, net.descriptor_head.select(modality))
        self.descriptor_head = _DescriptorHead(head, dtype, opset)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.stem(patches)
        descriptor_map = self.descriptor_trunk(stem)
        metric_map = descriptor_map if self.metric_trunk is None else self.metric_trunk(stem)
        return self.descriptor_head(descriptor_map), metric_map.float()


class _MetricHead(nn.Module):
    """Maps (N, C, S, S) of both -> probabilities (N,). The layers after pooling are small, and float32."""

    fc3_weight: Tensor
    fc3_bias: Tensor

    def __init__(self, head: MetricHead, size: int, dtype: torch.dtype, opset: int) -> None:
        super().__init__()
        self.has_product = head.has_product
        self.norm: nn.Module
        if head.norm is None:
            self.conv, self.norm, self.fc1 = (
                copy.deepcopy(head.conv).to(dtype),
                _TLU(head.activation, dtype),
                head.fc1,
            )
        else:
            self.conv, gain = _fold(head.conv, head.norm, None, dtype)
            self.norm = _FRNTLU(head.norm, head.activation, gain, size, opset)
            self.fc1 = nn.Linear(head.fc1.in_features, head.fc1.out_features).requires_grad_(False)
            self.fc1.weight.copy_(head.fc1.weight.double() * gain.double())
            self.fc1.bias.copy_(head.fc1.bias)
        self.fc2 = head.fc2
        self.register_buffer("fc3_weight", head.fc3.weight[0].clone())
        self.register_buffer("fc3_bias", head.fc3.bias.clone())

    def forward(self, map_vis: Tensor, map_ir: Tensor) -> Tensor:
        x = compare_maps(map_vis, map_ir, self.has_product).to(self.conv.weight.dtype)
        x = self.norm(self.conv(x)).float().mean(dim=(2, 3))
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        # A product with a vector is (N,), where a layer of one unit would be (N, 1).
        return torch.sigmoid(torch.mv(x, self.fc3_weight) + self.fc3_bias)


def _blocks(blocks: nn.Module, size: int, dtype: torch.dtype, opset: int) -> tuple[nn.Sequential, int]:
    """The blocks of a stem or trunk for maps of `size`, and the size of what comes out."""
    lean = nn.Sequential()
    gain: Tensor | None = None
    for name, child in blocks.named_children():
        block = cast(ConvBlock, child)
        size //= block.conv.stride[0]
        lean_block = _Block(block, gain, size, dtype, opset)
        lean.add_module(name, lean_block)
        gain = lean_block.gain
    return lean, size


def _fold(conv: nn.Conv2d, norm: FRN, gain_in: Tensor | None, dtype: torch.dtype) -> tuple[nn.Conv2d, Tensor]:
    """A convolution with the gain of its input and the sign of its FRN in it, and the gain of its FRN."""
    weight = norm.weight.double().flatten()
    gain = weight.abs().clamp_min(SMALLEST_GAIN[dtype]).to(dtype)
    sign = torch.where(weight < 0, -1.0, 1.0).double()
    state = {key: value.double() for key, value in conv.state_dict().items()}
    kernel = state["weight"] * sign.view(-1, 1, 1, 1)
    if gain_in is not None:
        kernel *= gain_in.double().view(1, -1, 1, 1)
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, stride=conv.stride[0], padding=1, dtype=dtype
    ).requires_grad_(False)
    folded.load_state_dict({"weight": kernel, "bias": state["bias"] * sign})
    return folded, gain


def _banded(kernel: Tensor, channels: int) -> Tensor:
    """The matrix (C, C) that convolves over channels, zeros beyond the ends."""
    matrix = torch.zeros(channels, channels, dtype=kernel.dtype)
    for k, value in enumerate(kernel):
        offset = k - len(kernel) // 2
        matrix += torch.diag(value.expand(channels - abs(offset)), offset)
    return matrix


# --- graphs ---------------------------------------------------------------------------------------


def _models(
    net: KGLNet,
    precision: str,
    batch: int | None,
    opset: int,
    calibration: Mapping[str, NDArray[np.float32]] | None,
) -> dict[str, onnx.ModelProto]:
    """File name -> graph. Two encoders and the head come from PyTorch, the others are made of them."""
    dtype = torch.float16 if precision == "float16" else torch.float32
    size, map_size = net.config.patch_size, net.config.map_size
    n = batch or 2
    patches = torch.zeros(n, 1, size, size)
    # Two tensors: one given twice would become one input.
    channels = net.config.map_channels
    maps = {f"metric_map_{m}": torch.zeros(n, channels, map_size, map_size) for m in ENCODER_FILES}
    models: dict[str, onnx.ModelProto] = {}
    for modality, file in ENCODER_FILES.items():
        models[file] = _to_onnx(
            _Encoder(net, modality, dtype, opset),
            {"patches": patches},
            ["descriptor", "metric_map"],
            batch,
            opset,
        )
    models[HEAD_FILE] = _to_onnx(
        _MetricHead(net.metric_head, map_size, dtype, opset),
        maps,
        ["score"],
        batch,
        opset,
    )
    if calibration is not None:
        _quantize(models, net, calibration)
    for modality, file in DESCRIPTOR_FILES.items():
        models[file] = _extract(models[ENCODER_FILES[modality]], "descriptor")
    vis, ir = (_extract(models[file], "metric_map") for file in ENCODER_FILES.values())
    models[PAIR_FILE] = _pair(vis, ir, models[HEAD_FILE])
    return models


@torch.inference_mode()
def _quantize(
    models: dict[str, onnx.ModelProto], net: KGLNet, calibration: Mapping[str, NDArray[np.float32]]
) -> None:
    """Puts quantised graphs in the place of the encoders and the head.

    The head sees maps of matching pairs, and as many of pairs that do not match.
    """
    maps = {}
    for modality, file in ENCODER_FILES.items():
        patches = calibration[modality]
        models[file] = quantize(models[file], {"patches": patches})
        parts = torch.split(torch.from_numpy(patches), max(CHECKED_N))
        maps[modality] = np.concatenate([net.encode(part, modality)[1].numpy() for part in parts])
    feeds = {
        "metric_map_vis": np.concatenate([maps["vis"], maps["vis"]]),
        "metric_map_ir": np.concatenate([maps["ir"], np.roll(maps["ir"], 1, axis=0)]),
    }
    models[HEAD_FILE] = quantize(models[HEAD_FILE], feeds)


def _to_onnx(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], batch: int | None, opset: int
) -> onnx.ModelProto:
    dynamic = None if batch is not None else tuple({0: torch.export.Dim("N")} for _ in inputs)
    with _quiet():
        program: Any = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            opset_version=opset,
            verbose=False,
        )
    model: onnx.ModelProto = program.model_proto
    # What the exporter notes about the Python source is of no use elsewhere.
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.graph.ClearField("value_info")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself and its dependencies."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _extract(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The part of a graph with one input that makes one of its outputs."""
    return onnx.utils.Extractor(model).extract_model([model.graph.input[0].name], [output])


def _pair(vis: onnx.ModelProto, ir: onnx.ModelProto, head: onnx.ModelProto) -> onnx.ModelProto:
    """patches_vis, patches_ir -> score."""
    both = onnx.compose.merge_models(
        onnx.compose.add_prefix(vis, "vis/"), onnx.compose.add_prefix(ir, "ir/"), io_map=[]
    )
    maps = [(f"{modality}/metric_map", f"metric_map_{modality}") for modality in ENCODER_FILES]
    model = onnx.compose.merge_models(both, head, io_map=maps)
    del model.opset_import[1:]  # merging repeats it
    for modality in ENCODER_FILES:
        _rename_input(model.graph, f"{modality}/patches", f"patches_{modality}")
    return model


def _rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for value in graph.input:
        if value.name == old:
            value.name = new
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _sign(model: onnx.ModelProto, file: str, net: KGLNet, dtype: str) -> None:
    """Notes in the graph what it is, for readers and for the check when it is loaded."""
    size, dim, maps = net.config.patch_size, net.config.descriptor_dim, net.config.map_size
    model.producer_name, model.producer_version = "kglmatch", __version__
    model.graph.name = file.removesuffix(".onnx")
    model.doc_string = f"KGL-Net (arXiv 2412.11161), {model.graph.name}, convolutions in {dtype}."
    for value in (*model.graph.input, *model.graph.output):
        what = value.name.split("_")[0]
        value.doc_string = {
            "patches": f"(N, 1, {size}, {size}) float32 in [0, 1], grey, as they are (no standardisation)",
            "descriptor": f"(N, {dim}) float32, L2 norm 1",
            "metric": f"(N, {net.config.map_channels}, {maps}, {maps}) float32, input of {HEAD_FILE}",
            "score": "(N,) float32, probability in [0, 1] that each pair matches, row by row",
        }[what]
    weights = hashlib.sha256()
    for key, tensor in sorted(net.state_dict().items()):
        weights.update(key.encode() + tensor.float().numpy().tobytes())
    metadata = {
        "kglmatch.graph": file,
        "kglmatch.architecture": json.dumps(net.config.architecture(), sort_keys=True),
        "kglmatch.weights": weights.hexdigest(),
        "kglmatch.dtype": dtype,
    }
    onnx.helper.set_model_props(model, metadata)


# --- comparison with PyTorch ----------------------------------------------------------------------


def example_patches(n: int, size: int) -> NDArray[np.float32]:
    """(N, size, size) float32: smooth textures in [0, 1], with some rows that are hard on float16.

    Row 3 is black, row 4 of hardly any contrast, and row 5 has the range of 16-bit pixels.
    """
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((n, size, size))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    spectrum = np.fft.fft2(noise) / (frequency + 0.02)
    texture = np.fft.ifft2(spectrum).real
    low, high = texture.min(axis=(1, 2), keepdims=True), texture.max(axis=(1, 2), keepdims=True)
    patches: NDArray[np.float32] = ((texture - low) / (high - low)).astype(np.float32)
    patches[3:4] = 0
    patches[4:5] = 0.5 + patches[4:5] / 1000
    patches[5:6] *= 65535
    return patches


@torch.inference_mode()
def _compare(
    folder: Path, net: KGLNet, batch: int | None, patches: Mapping[str, NDArray[np.float32]]
) -> tuple[Parity, ...]:
    """Runs every graph for each N of `CHECKED_N`, as far as there are patches; a fixed batch in parts."""
    available = len(patches["vis"])
    checked = [n for n in CHECKED_N if n < available] + [available]
    tensors = {modality: torch.from_numpy(values) for modality, values in patches.items()}
    outputs = {modality: net.encode(tensors[modality], modality) for modality in ENCODER_FILES}
    score = net.score(outputs["vis"][1], outputs["ir"][1])

    cases: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    for modality, (descriptor, metric_map) in outputs.items():
        feeds = {"patches": patches[modality]}
        both = {"descriptor": descriptor, "metric_map": metric_map}
        cases.append((ENCODER_FILES[modality], feeds, both))
        cases.append((DESCRIPTOR_FILES[modality], feeds, {"descriptor": descriptor}))
    maps = {f"metric_map_{modality}": outputs[modality][1].numpy() for modality in outputs}
    cases.append((HEAD_FILE, maps, {"score": score}))
    cases.append((PAIR_FILE, {f"patches_{m}": patches[m] for m in patches}, {"score": score}))

    parity = []
    for file, feeds, expected in cases:
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        for n in checked:
            found = _run(session, {name: values[:n] for name, values in feeds.items()}, batch)
            for name, tensor in expected.items():
                error = np.abs(found[name].astype(np.float64) - tensor[:n].double().numpy())
                parity.append(Parity(file, name, n, float(error.max()), float(error.mean())))
    return tuple(parity)


def _run(session: Any, feeds: Mapping[str, NDArray[Any]], batch: int | None) -> dict[str, NDArray[Any]]:
    """All outputs for N rows; with a fixed batch in parts, the last filled up with zeros."""
    names = [output.name for output in session.get_outputs()]
    n = len(next(iter(feeds.values())))
    size = batch or n
    parts = []
    for start in range(0, n, size):
        part = {}
        for name, values in feeds.items():
            part[name] = np.zeros((size, *values.shape[1:]), np.float32)
            part[name][: n - start] = values[start : start + size]
        parts.append(session.run(names, part))
    return {
        name: np.concatenate(values)[:n] for name, values in zip(names, zip(*parts, strict=True), strict=True)
    }


def _check(parity: Sequence[Parity], dtype: str) -> None:
    most = max(case.n for case in parity)
    for case in parity:
        error = case.mean_error if dtype == "int8" else case.max_error
        if dtype == "int8" and case.n < most and np.isfinite(error):
            continue  # a mean over one pair is none
        # Not `>`, which NaN would pass.
        if not error <= TOLERANCE[dtype]:
            raise ExportError(
                f"{case.file} does not give PyTorch's numbers: {case.output} differs by "
                f"{error:.2g} at N = {case.n}, more than the {TOLERANCE[dtype]:g} of {dtype}; "
                "nothing was written"
            )


# --- the card -------------------------------------------------------------------------------------


def model_card(report: ExportReport, config: KGLNetConfig, name: str) -> str:
    """The text of the folder's `README.md`: inputs, outputs, preprocessing, measured differences."""
    size, dim, maps, channels = config.patch_size, config.descriptor_dim, config.map_size, config.map_channels
    n = "N" if report.batch is None else str(report.batch)
    rows = "any N" if report.batch is None else f"exactly {n} rows; fill up with zeros"
    nodes = "\n".join(f"| `{g.file}` | {g.size / 1e6:.1f} MB | {g.nodes} |" for g in report.graphs)
    parity = "\n".join(
        f"| `{p.file}` | {p.output} | {p.n} | {p.max_error:.1e} | {p.mean_error:.1e} |" for p in report.parity
    )
    if report.dtype == "int8":
        convolutions = (
            "Convolutions and the descriptor's matrix are in int8 (QDQ, weights per channel), calibrated on\n"
            "real patches; FRN, the attention and the L2 norm in float32"
        )
        examples = "patches of the images that it was calibrated with, which were kept out of the calibration"
        limit = f"a mean of {TOLERANCE['int8']:g}"
    else:
        convolutions = f"Convolutions are in {report.dtype}"
        examples = "made textures, a black patch, one of hardly any contrast and one with values up to 65535"
        limit = f"{TOLERANCE[report.dtype]:g}"
    return f"""\
---
library_name: kglmatch
tags: [onnx, image-matching, cross-spectral]
---
# {name} as ONNX graphs

KGL-Net (Yu, Liu, Zhao, Yue, [arXiv 2412.11161](https://arxiv.org/abs/2412.11161)) matches patches of two
sensors: `vis` is the visible image, `ir` the other one ({config.ir_kind}). Each has its own encoder; swapping
them gives other numbers. {convolutions}; inputs and outputs are float32. Opset {report.opset}; {rows}.

| file | input | output |
|---|---|---|
| `encoder_vis.onnx`, `encoder_ir.onnx` | `patches` ({n}, 1, {size}, {size}) | `descriptor` ({n}, {dim}), \
`metric_map` ({n}, {channels}, {maps}, {maps}) |
| `descriptor_vis.onnx`, `descriptor_ir.onnx` | `patches` ({n}, 1, {size}, {size}) | `descriptor` \
({n}, {dim}) |
| `metric_head.onnx` | `metric_map_vis`, `metric_map_ir` ({n}, {channels}, {maps}, {maps}) | `score` ({n},) |
| `pair_score.onnx` | `patches_vis`, `patches_ir` ({n}, 1, {size}, {size}) | `score` ({n},) |

**Preprocessing**: grey patches of {size} x {size} pixels, values in [0, 1] (8-bit pixels divided by 255), in
row-major order, and nothing else: no mean is subtracted, the first layer normalises.

**Outputs**: descriptors have L2 norm 1; compare them by inner product or L2 distance to find candidates.
`score` is the probability in [0, 1] that row i of `vis` and row i of `ir` show the same place; it decides.

```python
from kglmatch import Matcher

matcher = Matcher.from_onnx("{report.folder.name}")
matches = matcher.match_images("scene_vis.png", "scene_ir.png")
```

No file refers to another; `config.json` holds the architecture and `SHA256SUMS` the graphs' checksums.

| file | size | nodes |
|---|---|---|
{nodes}

## Measured differences

Against the network in PyTorch (float32, CPU), by onnxruntime {onnxruntime.__version__} on the CPU, on
{examples}. The export fails above {limit}.

| file | output | N | largest | mean |
|---|---|---|---|---|
{parity}
"""
