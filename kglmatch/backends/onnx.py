"""The network in onnxruntime: runs what `kglmatch export --onnx` wrote, and never imports PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from kglmatch.backends.base import Providers
from kglmatch.errors import BackendError, KGLMatchError, WeightsError
from kglmatch.features import Array, Modality, to_numpy
from kglmatch.matching import top_k_rows
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.cost import cpu_batch
from kglmatch.models.files import (
    CHECKSUMS_FILE,
    CONFIG_FILE,
    DESCRIPTOR_FILES,
    ENCODER_FILES,
    GRAPH_FILES,
    HEAD_FILE,
    read_bytes,
)
from kglmatch.progress import steps

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
# Providers whose inputs and outputs stay in their own memory -> that memory's name.
DEVICE_MEMORY = {CUDA: "cuda", TENSORRT: "cuda"}
# TF32 off: it keeps 10 bits of a product. The exhaustive search is paid once, as the batch is fixed.
CUDA_OPTIONS = {
    "use_tf32": "0",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "arena_extend_strategy": "kSameAsRequested",
}
# Patches at once: on a GPU, and for each of the CPU's threads, where the maps are to stay in the core's
# cache. Of 3 to 16, 4 measured fastest: descriptors 8 %, both outputs 5 % faster than by 16.
DEVICE_BATCH = 256
THREAD_BATCH = 4

Provider = tuple[str, dict[str, str]]
Session = Any  # onnxruntime.InferenceSession, which has no types

_GRAPH_ERRORS = (ort_state.InvalidProtobuf, ort_state.InvalidGraph, ort_state.NotImplemented)
_LOAD_ERRORS = (
    *_GRAPH_ERRORS, ort_state.Fail, ort_state.InvalidArgument, ort_state.EPFail, ort_state.NoSuchFile,
    ort_state.RuntimeException, RuntimeError, ValueError,
)  # fmt: skip

logger = logging.getLogger(__name__)


class OnnxBackend:
    """Runs exported graphs; see `kglmatch.backends.base.Backend` for the calls.

    On the CPU, metric maps are numpy arrays. On CUDA they stay in device memory as `DeviceMaps`, and
    each batch is padded to `batch_size`, so that convolutions are tuned for one shape. Threads on the
    CPU are as many as OMP_NUM_THREADS says, as in PyTorch; else one per core.

    Args:
        folder: what `kglmatch export --onnx` wrote.
        providers: None or "auto" chooses by `device`; else execution providers by rank, names or
            (name, options) pairs, as onnxruntime takes them.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N"; of no use with a list of
            providers.
        batch_size: patches at once; None takes what suits the device, or the graphs' own batch.

    Raises:
        WeightsError: a folder that lacks files, a damaged graph, or graphs of different models.
        ConfigError: a wrong `config.json`.
        BackendError: a device or provider that cannot be had.
    """

    name = "onnx"

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Providers = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.progress = False
        self._folder = Path(folder)
        _check_folder(self._folder)
        self.config = KGLNetConfig.from_file(self._folder / CONFIG_FILE)
        if batch_size is not None and batch_size < 1:
            raise KGLMatchError(f"batch_size must be at least 1, got {batch_size}")
        self._sessions: dict[str, Session] = {}
        self._identity: tuple[str, str] | None = None
        self._providers, automatic = choose_providers(providers, device)
        try:
            first = self._session(ENCODER_FILES["vis"])
        except BackendError as error:
            if not automatic:
                raise
            logger.warning("%s; running on the CPU instead", error)
            self._providers = [(CPU, {})]
            first = self._session(ENCODER_FILES["vis"])
        for file in (ENCODER_FILES["ir"], HEAD_FILE):
            self._session(file)

        rank = first.get_providers()
        memory = DEVICE_MEMORY.get(rank[0])
        index = int(self._providers[0][1].get("device_id", 0))
        self.device = "cpu" if memory is None else f"{memory}:{index}"
        self.dtype: str = first.get_modelmeta().custom_metadata_map["kglmatch.dtype"]
        if automatic:
            logger.info("%s runs by %s on %s", self._folder, rank[0], self.device)
        fixed = first.get_inputs()[0].shape[0]
        fixed = fixed if isinstance(fixed, int) else None
        if fixed is not None and batch_size not in (None, fixed):
            raise KGLMatchError(
                f"batch_size={batch_size}, but the graphs in {folder} have a fixed batch of {fixed}"
            )
        default = DEVICE_BATCH
        if memory is None:
            default = cpu_batch(self.config, THREAD_BATCH * (_threads() or os.cpu_count() or 1))
        self.batch_size = fixed or batch_size or default
        self._map_shape = tuple(first.get_outputs()[1].shape[1:])
        self._memory: _Memory = (
            _HostMemory(self._map_shape, fixed)
            if memory is None
            else _DeviceMemory(self._map_shape, self.batch_size, memory, index, self._providers)
        )

    def _session(self, file: str) -> Session:
        """The session of a graph, opened and checked on first use."""
        if file not in self._sessions:
            path = self._folder / file
            session = _open(path, self._providers)
            identity = _check_graph(session, path, self.config)
            if identity != (self._identity or identity):
                raise WeightsError(
                    f"{path} is of another model or precision than {ENCODER_FILES['vis']} in this folder: "
                    "export both together"
                )
            self._identity = identity
            self._sessions[file] = session
        return self._sessions[file]

    def state_dict(self) -> dict[str, Any]:
        raise KGLMatchError(
            f"{self._folder} holds no weights but exported graphs: load the model that they come from"
        )

    def encode(self, patches: Array, modality: Modality, *, maps: bool) -> tuple[Array, Array | None]:
        session = self._session((ENCODER_FILES if maps else DESCRIPTOR_FILES)[modality])
        values = to_numpy(patches)
        n = len(values)
        descriptors = np.empty((n, self.config.descriptor_dim), np.float32)
        metric_maps = self._memory.new_maps(n) if maps else None
        for start in steps(range(0, n, self.batch_size), f"describe {modality}", show=self.progress):
            part = slice(start, start + self.batch_size)
            chunk = np.array(values[part], np.float32, order="C")[:, None]
            if values.dtype == np.uint8:
                chunk /= np.float32(255)
            descriptors[part] = self._memory.encode(session, chunk, metric_maps, start)
        if not isinstance(patches, np.ndarray):
            return sys.modules["torch"].from_numpy(descriptors), metric_maps
        return descriptors, metric_maps

    def score(
        self,
        maps_vis: Array,
        maps_ir: Array,
        rows_vis: NDArray[np.int64] | None = None,
        rows_ir: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        session = self._session(HEAD_FILE)
        a, b = self._memory.take_maps(maps_vis), self._memory.take_maps(maps_ir)
        rows_a = np.arange(len(a)) if rows_vis is None else rows_vis
        rows_b = np.arange(len(b)) if rows_ir is None else rows_ir
        scores = np.empty(len(rows_a), np.float32)
        for start in steps(range(0, len(scores), self.batch_size), "score", show=self.progress):
            part = slice(start, start + self.batch_size)
            scores[part] = self._memory.score(session, a, b, rows_a[part], rows_b[part])
        return scores

    def top_k(self, a: Array, b: Array, k: int) -> NDArray[np.int64]:
        return top_k_rows(to_numpy(a), to_numpy(b), k)


# --- host and device memory -----------------------------------------------------------------------


class _Memory(Protocol):
    """Where maps are held, and how a batch of at most `batch_size` rows goes through a session."""

    def new_maps(self, n: int) -> Any:
        """Space for N maps."""

    def take_maps(self, maps: Array) -> Any:
        """Maps of any origin, as held here."""

    def encode(self, session: Session, patches: NDArray[np.float32], maps: Any, at: int) -> Any:
        """(K, 1, P, P) -> descriptors (K, D); the metric maps go to rows `at` to `at` + K of `maps`."""

    def score(
        self, session: Session, a: Any, b: Any, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]
    ) -> Any:
        """Rows (K,) of two sets of maps -> probabilities (K,)."""


class _HostMemory:
    """Maps are numpy arrays. `fixed` is the batch of graphs that take no other."""

    def __init__(self, map_shape: tuple[int, int, int], fixed: int | None) -> None:
        self._map_shape, self._fixed = map_shape, fixed

    def new_maps(self, n: int) -> NDArray[np.float32]:
        return np.empty((n, *self._map_shape), np.float32)

    def take_maps(self, maps: Array) -> NDArray[np.float32]:
        return np.asarray(to_numpy(maps), np.float32)

    def encode(self, session: Session, patches: NDArray[np.float32], maps: Any, at: int) -> Any:
        outputs = session.run(None, {"patches": _padded(patches, self._fixed)})
        if maps is not None:
            maps[at : at + len(patches)] = outputs[1][: len(patches)]
        return outputs[0][: len(patches)]

    def score(
        self, session: Session, a: Any, b: Any, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]
    ) -> Any:
        feeds = {
            "metric_map_vis": _padded(a[rows_a], self._fixed),
            "metric_map_ir": _padded(b[rows_b], self._fixed),
        }
        return session.run(None, feeds)[0][: len(rows_a)]


class DeviceMaps:
    """N metric maps in device memory: rows of a store that several `DeviceMaps` may share.

    Args:
        store: OrtValue (M, 256, S, S) float32; None if M = 0, which has no memory.
        rows: (N,) rows of the store.
        map_shape: (C, S, S).
    """

    def __init__(self, store: Any, rows: NDArray[np.int64], map_shape: tuple[int, int, int]) -> None:
        self.store, self.rows = store, rows
        self.shape = (len(rows), *map_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> DeviceMaps:
        """Some of the maps, by a slice, a mask or indices; nothing is copied."""
        return DeviceMaps(self.store, self.rows[rows], self.shape[1:])

    def numpy(self) -> NDArray[np.float32]:
        """A copy (N, C, S, S) on the host."""
        if self.store is None:
            return np.empty(self.shape, np.float32)
        values: NDArray[np.float32] = self.store.numpy()[self.rows]
        return values


class _Bound:
    """A session whose inputs and outputs have their places in device memory once and for all.

    That is also what CUDA graphs need, for those who switch them on in the provider's options.
    """

    def __init__(self, session: Session, batch: int, memory: str, index: int) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.values: dict[str, Any] = {}
        for bind, infos in (
            (self.binding.bind_ortvalue_input, session.get_inputs()),
            (self.binding.bind_ortvalue_output, session.get_outputs()),
        ):
            for info in infos:
                shape = [batch, *info.shape[1:]]
                value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, memory, index)
                self.values[info.name] = value
                bind(info.name, value)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)


class _DeviceMemory:
    """Maps are `DeviceMaps`; a batch is padded to `batch` rows and bound to memory on the device."""

    def __init__(
        self,
        map_shape: tuple[int, int, int],
        batch: int,
        memory: str,
        index: int,
        providers: Sequence[Provider],
    ) -> None:
        self._map_shape, self._batch, self._memory, self._index = map_shape, batch, memory, index
        self._bound: dict[int, _Bound] = {}
        # Its shapes change with every call, which a CUDA graph does not allow.
        plain = [(n, {k: v for k, v in o.items() if k != "enable_cuda_graph"}) for n, o in providers]
        self._gather_session = _make_session(gather_graph(), [p for p in plain if p[0] != TENSORRT])

    def new_maps(self, n: int) -> DeviceMaps:
        shape = [n, *self._map_shape]
        store = (
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self._memory, self._index)
            if n
            else None
        )
        return DeviceMaps(store, np.arange(n), self._map_shape)

    def take_maps(self, maps: Array) -> DeviceMaps:
        if isinstance(maps, DeviceMaps):
            return maps
        values = np.ascontiguousarray(to_numpy(maps), np.float32)
        store = (
            onnxruntime.OrtValue.ortvalue_from_numpy(values, self._memory, self._index)
            if len(values)
            else None
        )
        return DeviceMaps(store, np.arange(len(values)), self._map_shape)

    def encode(self, session: Session, patches: NDArray[np.float32], maps: Any, at: int) -> Any:
        bound = self._bind(session)
        bound.values["patches"].update_inplace(_padded(patches, self._batch))
        bound.run()
        if maps is not None:
            self._gather(bound.values["metric_map"], np.arange(len(patches)), maps.store, at)
        return bound.values["descriptor"].numpy()[: len(patches)]

    def score(
        self, session: Session, a: Any, b: Any, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]
    ) -> Any:
        bound = self._bind(session)
        self._gather(a.store, a.rows[rows_a], bound.values["metric_map_vis"], 0)
        self._gather(b.store, b.rows[rows_b], bound.values["metric_map_ir"], 0)
        bound.run()
        return bound.values["score"].numpy()[: len(rows_a)]

    def _bind(self, session: Session) -> _Bound:
        if id(session) not in self._bound:
            self._bound[id(session)] = _Bound(session, self._batch, self._memory, self._index)
        return self._bound[id(session)]

    def _gather(self, source: Any, rows: NDArray[np.int64], target: Any, at: int) -> None:
        """Copies rows of one store to another, from row `at` on, within the device."""
        pointer = target.data_ptr() + at * int(np.prod(self._map_shape)) * 4
        binding = self._gather_session.io_binding()
        binding.bind_ortvalue_input("maps", source)
        binding.bind_cpu_input("rows", np.ascontiguousarray(rows, np.int64))
        shape = [len(rows), *self._map_shape]
        binding.bind_output("out", self._memory, self._index, np.float32, shape, pointer)
        self._gather_session.run_with_iobinding(binding)


def _padded(rows: NDArray[np.float32], size: int | None) -> NDArray[np.float32]:
    """The rows, with zeros up to `size` of them."""
    if size is None or len(rows) == size:
        return rows
    padded = np.zeros((size, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def gather_graph() -> bytes:
    """The ONNX graph ``out = Gather(maps, rows)``, serialised here because `onnx` may not be installed."""

    def field(number: int, *parts: bytes) -> bytes:
        content = b"".join(parts)
        return bytes([number << 3 | 2]) + _varint(len(content)) + content

    def integer(number: int, value: int) -> bytes:
        return bytes([number << 3]) + _varint(value)

    def value(name: str, element: int, rank: int) -> bytes:
        any_shape = field(2, *[field(1)] * rank)
        return field(1, name.encode()) + field(2, field(1, integer(1, element), any_shape))

    float32, int64 = 1, 7
    node = field(1, b"maps") + field(1, b"rows") + field(2, b"out") + field(4, b"Gather")
    inputs = field(11, value("maps", float32, 4)) + field(11, value("rows", int64, 1))
    graph = field(1, node) + field(2, b"gather") + inputs + field(12, value("out", float32, 4))
    ir_version, opset = 8, 13
    return integer(1, ir_version) + field(7, graph) + field(8, integer(2, opset))


def _varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


# --- providers ------------------------------------------------------------------------------------


def choose_providers(providers: Providers, device: str) -> tuple[list[Provider], bool]:
    """The providers to open sessions with, and whether they were chosen here ("auto").

    Raises:
        BackendError: a device or provider that cannot be had, or both given.
    """
    available = onnxruntime.get_available_providers()
    if providers is not None and providers != "auto":
        if isinstance(providers, str) or not providers:
            raise BackendError(f'providers must be "auto" or a list of names, got {providers!r}')
        if device != "auto":
            raise BackendError(f"give device={device!r} or providers={list(providers)}, not both")
        chosen = [_with_options(provider) for provider in providers]
        for name, _ in chosen:
            if name not in available:
                raise BackendError(f"{name} was asked for, but {_why_missing(name, available)}")
        return chosen, False
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise BackendError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    if kind == "cuda" and CUDA not in available:
        raise BackendError(f'device "{device}" was asked for, but {_why_missing(CUDA, available)}')
    devices = count_cuda_devices() if kind != "cpu" and CUDA in available else 0
    if kind == "cuda" and int(number or 0) >= devices:
        raise BackendError(f'device "{device}" was asked for, but the driver reports {devices} GPUs')
    if kind == "cuda" or (kind == "auto" and devices):
        return [_with_options((CUDA, {"device_id": number or "0"}))], kind == "auto"
    return [(CPU, {})], kind == "auto"


def _with_options(provider: str | tuple[str, Mapping[str, Any]]) -> Provider:
    name, options = (provider, {}) if isinstance(provider, str) else provider
    given = {str(key): str(value) for key, value in options.items()}
    return name, {**CUDA_OPTIONS, **given} if name == CUDA else given


def _why_missing(name: str, available: Sequence[str]) -> str:
    if both_packages_installed():
        return (
            "both onnxruntime and onnxruntime-gpu are installed and overwrite each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one that is wanted"
        )
    return f"this onnxruntime has {', '.join(available)}; onnxruntime-gpu has CUDA and TensorRT"


def both_packages_installed() -> bool:
    """Whether the packages onnxruntime and onnxruntime-gpu, which share their files, are both there."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def count_cuda_devices() -> int:
    """GPUs that the CUDA driver reports; 0 without a driver.

    onnxruntime's own way to find out is to fail, with pages of messages.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


# --- files ----------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    """Raises `WeightsError` unless the folder holds every file, each with its checksum."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; expected one that kglmatch export --onnx wrote")
    missing = [file for file in GRAPH_FILES if not (folder / file).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} is not a folder of exported graphs: it lacks {', '.join(missing)}; "
            "kglmatch export --onnx makes one"
        )
    sums = folder / CHECKSUMS_FILE
    if not sums.is_file():
        return  # the graphs were handed on without it
    lines = read_bytes(sums).decode("utf-8", errors="replace").splitlines()
    for file in GRAPH_FILES[1:]:
        if f"{hashlib.sha256(read_bytes(folder / file)).hexdigest()}  {file}" not in lines:
            raise WeightsError(
                f"{folder / file} is damaged or of another export (its checksum is not that in "
                f"{CHECKSUMS_FILE}): copy or export it again"
            )


def _threads() -> int:
    """Threads on the CPU as OMP_NUM_THREADS says; 0, which is one for each core, where it does not."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() else 0


def _make_session(graph: str | bytes, providers: Sequence[Provider]) -> Session:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = _threads()
    names = [name for name, _ in providers]
    if CUDA in names or TENSORRT in names:
        # Finds CUDA and cuDNN in packages from pip, which are on no library path; prints what it misses.
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    return onnxruntime.InferenceSession(
        graph, options, providers=names, provider_options=[o for _, o in providers], enable_fallback=0
    )


def _open(path: Path, providers: Sequence[Provider]) -> Session:
    """A session on exactly the providers that were asked for.

    Raises:
        WeightsError: not a graph that this onnxruntime can read.
        BackendError: a provider did not come up.
    """
    wanted = [name for name, _ in providers]
    try:
        session = _make_session(str(path), providers)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        if wanted == [CPU] or isinstance(error, _GRAPH_ERRORS):
            raise WeightsError(f"onnxruntime cannot read {path} ({reason}): export it again") from error
        raise BackendError(f"{', '.join(wanted)} did not start for {path.name}: {reason}") from error
    running = session.get_providers()
    failed = [name for name in wanted if name not in running]
    if failed:
        raise BackendError(
            f"{', '.join(failed)} did not come up (running: {', '.join(running)}): its libraries, such as "
            "CUDA and cuDNN, may be missing or of another version; onnxruntime's messages say which"
        )
    return session


def _check_graph(session: Session, path: Path, config: KGLNetConfig) -> tuple[str, str]:
    """Checks that a graph is what its file name and `config.json` say.

    Returns:
        hash of the weights, and precision: the same for all graphs of one export.

    Raises:
        WeightsError: another graph, or one of another architecture.
    """
    meta = session.get_modelmeta().custom_metadata_map
    try:
        file, weights, dtype = (meta[f"kglmatch.{key}"] for key in ("graph", "weights", "dtype"))
        # What an older version did not know was at its default, as in config.json.
        exported = {**KGLNetConfig().architecture(), **json.loads(meta["kglmatch.architecture"])}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not a graph that kglmatch export --onnx wrote") from error
    if file != path.name:
        raise WeightsError(f"{path} is {file} under another name; give it its own, or export again")
    for key, value in config.architecture().items():
        if exported[key] != value:
            raise WeightsError(
                f"{path} does not fit {CONFIG_FILE}: {key} is {exported[key]!r} in the graph and "
                f"{value!r} in the configuration; keep the files of one export together"
            )
    return weights, dtype
