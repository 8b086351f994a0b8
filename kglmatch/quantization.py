"""Static quantisation of exported graphs: large convolutions in 8 bits, what normalises in float32.

Before and after each quantised convolution (and the descriptor's matrix) stand QuantizeLinear and
DequantizeLinear, the form that onnxruntime and TensorRT turn into integer kernels. Ranges of activations
are the extremes on calibration data. Weights have one scale per output channel, and seven bits:
processors without VNNI add two products in 16 bits, which eight bits overflow.

The output of a convolution has one scale for all channels, while FRN magnifies each channel by its own.
So the channels are brought to one range first, by their weights: FRN takes the factor out again, all
but its epsilon, which is far below the mean squares there.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

BATCH = 16
# Of a 3 x 3 convolution; the first of a stem has one, costs little, and sets what all others see.
FEWEST_INPUTS = 2
# Columns of the descriptor's matrix, as opposed to the layers after pooling.
FEWEST_COLUMNS = 1024

Feeds = Mapping[str, NDArray[np.float32]]


def quantize(model: onnx.ModelProto, feeds: Feeds) -> onnx.ModelProto:
    """A graph with its convolutions and the descriptor's matrix in int8.

    Args:
        model: a float32 graph of `kglmatch.export`; left as it is.
        feeds: its inputs for calibration, (N, ...) float32 each, N at least 1.

    Returns:
        the quantised graph, with inputs and outputs of the same names, shapes and float32.
    """
    equal = onnx.ModelProto()
    equal.CopyFrom(model)
    _equalize(equal, feeds)
    nodes = [node.name for node in (*_convolutions(equal), *_matrices(equal))]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            equal,
            path,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm"],
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        quantized = onnx.load(path)
    # Domains that the tool notes for itself, and no node uses.
    used = {node.domain for node in quantized.graph.node}
    for opset in [each for each in quantized.opset_import if each.domain not in used | {""}]:
        quantized.opset_import.remove(opset)
    del quantized.metadata_props[:]
    quantized.graph.ClearField("value_info")
    return onnx.shape_inference.infer_shapes(quantized, strict_mode=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tool's advice, which it gives to the root logger, to prepare graphs that need it."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    """The calibration data in batches."""

    def __init__(self, feeds: Feeds) -> None:
        self._batches = _batches(feeds)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def _batches(feeds: Feeds) -> Iterator[dict[str, NDArray[np.float32]]]:
    for start in range(0, len(next(iter(feeds.values()))), BATCH):
        yield {name: values[start : start + BATCH] for name, values in feeds.items()}


def _weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The large ones: those of the attention are 1 x 1, on channel means."""
    weights = _weights(model)
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            _, inputs, *size = weights[node.input[1]].dims
            if inputs >= FEWEST_INPUTS and size == [3, 3]:
                found.append(node)
    return found


def _matrices(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    weights = _weights(model)
    return [
        node
        for node in model.graph.node
        if node.op_type == "Gemm" and max(weights[node.input[1]].dims) >= FEWEST_COLUMNS
    ]


def _equalize(model: onnx.ModelProto, feeds: Feeds) -> None:
    """Gives all channels of a convolution that FRN normalises the same range."""
    weights = _weights(model)
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    nodes = [
        node
        for node in _convolutions(model)
        if [user.op_type for user in users[node.output[0]]] == ["RMSNormalization"]
    ]
    if not nodes:
        return
    for node, largest in zip(nodes, _largest(model, feeds, [node.output[0] for node in nodes]), strict=True):
        # Channels that are zero throughout keep their size.
        alive = largest > largest.max() * 1e-6
        factor = (
            np.where(alive, np.median(largest[alive]) / np.where(alive, largest, 1), 1) if alive.any() else 1
        )
        factor = np.ones_like(largest)
        factor[alive] = np.median(largest[alive]) / largest[alive]
        for name, shape in ((node.input[1], (-1, 1, 1, 1)), (node.input[2], (-1,))):
            values = numpy_helper.to_array(weights[name]) * factor.reshape(shape)
            weights[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


def _largest(model: onnx.ModelProto, feeds: Feeds, names: list[str]) -> list[NDArray[np.float32]]:
    """The largest absolute value (C,) of each channel of some tensors (N, C, H, W)."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    for name in names:
        observed.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session: Any = onnxruntime.InferenceSession(
        observed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[list[NDArray[np.float32]]] = [[] for _ in names]
    for batch in _batches(feeds):
        for each, values in zip(found, session.run(names, batch), strict=True):
            each.append(np.abs(values).max(axis=(0, 2, 3)))
    return [np.max(values, axis=0) for values in found]
