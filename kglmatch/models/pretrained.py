"""Names -> weights: bundled models, local folders and the Hugging Face Hub; safetensors in and out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kglmatch.errors import ConfigError, NoGraphsError, WeightsError
from kglmatch.files import atomic_output, make_folder
from kglmatch.models.card import ModelCard
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.files import (
    CARD_FILE,
    CHECKSUMS_FILE,
    CONFIG_FILE,
    ENCODER_FILES,
    GRAPH_FILES,
    ONNX_FOLDER,
    WEIGHTS_FILE,
    ModelFiles,
    list_pretrained,
    read_bytes,
    weights_root,
)
from kglmatch.models.hub import DEFAULT_HUB, HubOptions, download, parse_hub_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Its output is stored with the bundled models, so that a damaged installation is noticed.
CHECKSUMS_COMMAND = f"sha256sum */{WEIGHTS_FILE} > {CHECKSUMS_FILE}"
_SHA256 = re.compile("[0-9a-f]{64}")


def resolve(name: str | Path, hub: HubOptions = DEFAULT_HUB) -> ModelFiles:
    """Finds a model's files: a bundled name first, then a local folder, then a model on the Hub.

    Args:
        name: a bundled name, a folder, or "owner/name" or "owner/name@revision" on the Hub.
        hub: how to reach the Hub; of no meaning for bundled models and folders, except that those have
            no `revision`.

    Raises:
        WeightsError: no such model, a folder without the files of one, or what went wrong with the
            Hub.
    """
    found = _find_local(name, hub.revision)
    if isinstance(found, ModelFiles):
        missing = [path.name for path in (found.config, found.weights) if not path.is_file()]
        if missing:
            what = "is damaged" if found.source == "bundled" else "is not a model folder"
            advice = f"; {_way_out(found)}" if found.source == "bundled" else ""
            if any(found.config.parent.glob("*.onnx")):
                advice = "; Matcher.from_onnx loads graphs that kglmatch export --onnx wrote"
            raise WeightsError(f"{found.config.parent} {what}: it lacks {' and '.join(missing)}{advice}")
        return found
    repo_id, revision = found
    files = [CONFIG_FILE, WEIGHTS_FILE]
    snapshot = download(repo_id, files, dataclasses.replace(hub, revision=revision))
    return ModelFiles(
        str(name),
        "hub",
        snapshot.folder / CONFIG_FILE,
        snapshot.folder / WEIGHTS_FILE,
        repo_id,
        snapshot.commit,
    )


def resolve_onnx(name: str | Path, hub: HubOptions = DEFAULT_HUB) -> Path:
    """Finds a model's ONNX graphs, in the folder `onnx` next to its weights or in a folder of their own.

    Args:
        name, hub: as for `resolve`; or the folder that `kglmatch export --onnx` wrote.

    Returns:
        the folder that holds them, with or without `SHA256SUMS`.

    Raises:
        NoGraphsError: a model without graphs, or on a Hub that cannot be asked for them.
        WeightsError: no such model, or one on the Hub that lacks some of its graphs.
    """
    found = _find_local(name, hub.revision)
    if isinstance(found, ModelFiles):
        folder = found.config.parent
        for place in (folder, folder / ONNX_FOLDER):
            if (place / ENCODER_FILES["vis"]).is_file():
                return place
        raise NoGraphsError(
            f"{name} has no ONNX graphs in {folder / ONNX_FOLDER}: write some by `kglmatch export --onnx`"
        )
    repo_id, revision = found
    first = f"{ONNX_FOLDER}/{ENCODER_FILES['vis']}"
    try:
        commit = download(repo_id, [first], dataclasses.replace(hub, revision=revision)).commit
    except WeightsError as error:
        raise NoGraphsError(str(error)) from error
    others = [f for f in (f"{ONNX_FOLDER}/{file}" for file in GRAPH_FILES) if f != first]
    at_commit = dataclasses.replace(hub, revision=commit)
    sums = f"{ONNX_FOLDER}/{CHECKSUMS_FILE}"
    return download(repo_id, others, at_commit, optional=[sums]).folder / ONNX_FOLDER


def _find_local(name: str | Path, revision: str | None) -> ModelFiles | tuple[str, str | None]:
    """A bundled model or a folder, whose files may be missing; or a repository and its revision."""
    bundled = list_pretrained()
    if str(name) in bundled:
        source, folder = "bundled", weights_root() / str(name)
    elif str(name) and Path(name).is_dir():
        source, folder = "folder", Path(name)
    else:
        on_hub = parse_hub_name(str(name))
        if on_hub is None:
            raise WeightsError(
                f"unknown model {str(name)!r}: neither bundled ({', '.join(bundled) or 'none installed'}) "
                "nor a local folder nor a name on the Hub (owner/name or owner/name@revision)"
            )
        repo_id, in_name = on_hub
        if revision and in_name and revision != in_name:
            raise WeightsError(f"{name} names one revision and revision={revision!r} another: give one")
        return repo_id, revision or in_name
    if revision:
        raise WeightsError(
            f"revision={revision!r} was given, but {str(name)!r} is {source}: only models on the Hub have one"
        )
    return ModelFiles(str(name), source, folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def load_config(name: str | Path, hub: HubOptions = DEFAULT_HUB) -> KGLNetConfig:
    """The configuration of a model, without its weights. Arguments and errors as for `resolve`.

    Raises:
        ConfigError: a wrong `config.json`.
    """
    return _read_config(resolve(name, hub))


def load_model(name: str | Path, hub: HubOptions = DEFAULT_HUB) -> tuple[dict[str, Tensor], KGLNetConfig]:
    """Reads a model's weights and configuration. Arguments as for `resolve`.

    Returns:
        a float32 state dict on the CPU that fits `KGLNet(config)` exactly, and the config.

    Raises:
        WeightsError: no such model, a damaged file, or tensors that do not fit the configuration.
        ConfigError: a wrong `config.json`.
    """
    return load_files(resolve(name, hub))


def load_files(files: ModelFiles) -> tuple[dict[str, Tensor], KGLNetConfig]:
    """Reads what `resolve` found. Returns and raises as `load_model`."""
    config = _read_config(files)
    state = _read_safetensors(files)
    check_fit(state, config, files.weights)
    return state, config


def _read_config(files: ModelFiles) -> KGLNetConfig:
    try:
        return KGLNetConfig.from_file(files.config)
    except ConfigError as error:
        if files.source != "hub":
            raise
        raise ConfigError(f"{error}; if the cache is damaged, {_way_out(files)}") from error


def _read_safetensors(files: ModelFiles) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = files.weights
    data = read_bytes(path)
    expected = _expected_sha256(files)
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise WeightsError(f"{path} is damaged (its checksum differs): {_way_out(files)}")
    try:
        state = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is not a valid safetensors file ({error}): {_way_out(files)}") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _expected_sha256(files: ModelFiles) -> str | None:
    """The checksum that the weights must have, where one is known."""
    if files.source == "bundled":
        return _bundled_sha256(files.name)
    if files.source == "hub" and files.weights.is_symlink():
        # The cache names the content of large files by its SHA-256; of small ones, by something else.
        name = files.weights.readlink().name
        return name if _SHA256.fullmatch(name) else None
    return None


def _bundled_sha256(name: str) -> str:
    path = weights_root() / CHECKSUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"cannot read {path} ({error}): install kglmatch again") from error
    for line in lines:
        checksum, _, file = line.partition("  ")
        if file == f"{name}/{WEIGHTS_FILE}":
            return checksum
    raise WeightsError(
        f"{path} lacks {name}: install kglmatch again, or in a checkout run `{CHECKSUMS_COMMAND}` there"
    )


def _way_out(files: ModelFiles) -> str:
    if files.source == "bundled":
        return f"install kglmatch again, or in a checkout run `{CHECKSUMS_COMMAND}` in {weights_root()}"
    if files.source == "hub":
        folder = files.config.parents[2]  # of the repository, in the cache
        return f"download it again with force_download=True, or remove {folder}"
    return "copy or export it again"


def check_fit(state: Mapping[str, Tensor], config: KGLNetConfig, origin: str | Path) -> None:
    """Raises `WeightsError` unless the tensors are those of `KGLNet(config)`, by name and shape, and finite.

    Args:
        origin: where they come from, for the error.
    """
    import torch

    from kglmatch.models.network import KGLNet

    with torch.device("meta"):
        expected = {k: v.shape for k, v in KGLNet(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    if missing or unexpected:
        raise WeightsError(
            f"{origin} does not fit its configuration: {len(missing)} tensors missing "
            f"(first: {missing[:2]}), {len(unexpected)} unexpected (first: {unexpected[:2]})"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise WeightsError(
                f"{origin} does not fit its configuration: {key} is {tuple(state[key].shape)}, "
                f"expected {tuple(shape)}"
            )
        if not bool(torch.isfinite(state[key]).all()):
            raise WeightsError(f"{origin} is damaged: {key} holds NaN or infinite values")


def save_model(
    folder: str | Path, state: Mapping[str, Tensor], config: KGLNetConfig, *, half: bool = True
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, made if missing.

    Args:
        half: store float16, which halves the file and costs about 1e-3 of a weight's size.

    Raises:
        OutputError: the folder cannot be written.
        WeightsError: a weight that is not finite, or too large for float16.
    """
    import torch
    from safetensors.torch import save

    tensors = {
        key: (value.to(torch.float16) if half and value.is_floating_point() else value)
        .detach()
        .cpu()
        .contiguous()
        for key, value in state.items()
    }
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(
                f"cannot save {key}: it holds NaN, or values beyond float16 (half=False keeps them)"
            )
    folder = make_folder(folder)
    with atomic_output(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save(tensors))
    with atomic_output(folder / CONFIG_FILE) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


def save_card(
    folder: str | Path,
    config: KGLNetConfig,
    card: ModelCard | str | None = None,
    *,
    load: str,
    source: ModelFiles | None = None,
) -> None:
    """Writes the model card `README.md` into a folder.

    Args:
        card: the card or its text; None copies the one of `source`, or writes a short one.
        load: what `Matcher.from_pretrained` will be given, for a short card's example.
        source: where the weights came from.

    Raises:
        OutputError: the folder cannot be written.
        WeightsError: the card of `source` cannot be read.
    """
    if card is None and source is not None and source.card.is_file():
        try:
            card = source.card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightsError(f"cannot read {source.card}: {error}") from error
    if card is None:
        card = ModelCard(Path(load).name, load=load, base_model=source.repo_id if source else None)
    text = card if isinstance(card, str) else card.render(config)
    with atomic_output(Path(folder) / CARD_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_onnx(graphs: str | Path, folder: str | Path) -> None:
    """Copies exported graphs into a model folder, to its folder `onnx`.

    Raises:
        WeightsError: no graphs there.
        OutputError: the folder cannot be written.
    """
    source = resolve_onnx(Path(graphs).resolve())
    target = make_folder(Path(folder) / ONNX_FOLDER)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        with atomic_output(target / file.name) as temporary:
            shutil.copyfile(file, temporary)
