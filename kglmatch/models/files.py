"""The files of a model: their names, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kglmatch.errors import WeightsError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
CHECKSUMS_FILE = "SHA256SUMS"  # in the form of `sha256sum`

# Exported graphs, in a folder of their own or in this one next to the weights.
ONNX_FOLDER = "onnx"
ENCODER_FILES = {"vis": "encoder_vis.onnx", "ir": "encoder_ir.onnx"}
DESCRIPTOR_FILES = {"vis": "descriptor_vis.onnx", "ir": "descriptor_ir.onnx"}
HEAD_FILE = "metric_head.onnx"
PAIR_FILE = "pair_score.onnx"
GRAPH_FILES = (CONFIG_FILE, *ENCODER_FILES.values(), *DESCRIPTOR_FILES.values(), HEAD_FILE)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    Attributes:
        name: as it was asked for.
        source: "bundled", "folder" or "hub".
        config, weights: paths of `config.json` and `model.safetensors`.
        repo_id, commit: of a model from the Hub, "owner/name" and the commit's hash; else None.
    """

    name: str
    source: str
    config: Path
    weights: Path
    repo_id: str | None = None
    commit: str | None = None

    @property
    def origin(self) -> str:
        """Where the model comes from, for messages."""
        if self.source == "bundled":
            return "bundled with kglmatch"
        if self.source == "folder":
            return f"the local folder {self.config.parent}"
        return f"{self.repo_id} on the Hugging Face Hub, commit {self.commit}"

    @property
    def card(self) -> Path:
        """Path of the model card, which need not be there."""
        return self.config.with_name(CARD_FILE)


def weights_root() -> Path:
    """The folder of the bundled models: inside the installed package, or `weights/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def list_pretrained() -> list[str]:
    """Names of the models that come with the package."""
    root = weights_root()
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}")) if root.is_dir() else []


def read_bytes(path: Path) -> bytes:
    """The content of a model's file. Raises `WeightsError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
