"""What a run keeps on disk: `checkpoint.pt` to resume from, `log.jsonl` to look at, `model/` to use."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kglmatch.errors import WeightsError
from kglmatch.files import atomic_output, check_output, make_folder
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.pretrained import save_model

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
MODEL = "model"
# Raised whenever a run could not be resumed from a checkpoint of the version before.
FORMAT = 3


class RunFolder:
    """One run's folder, made if missing. Every file is written whole or not at all.

    Args:
        path: the folder.

    Raises:
        OutputError: it cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = make_folder(path)

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is, or will be."""
        return self.path / CHECKPOINT

    def prepare(self) -> None:
        """Checks that the run can be written, and removes what a killed run left half-written.

        Raises:
            OutputError: a file that cannot be written.
        """
        for folder in (self.path, self.path / MODEL):
            for leftover in folder.glob(".tmp-*"):
                leftover.unlink()
        for name in (CHECKPOINT, LOG):
            check_output(self.path / name)

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds one JSON line to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut_log(self, step: int) -> None:
        """Drops what was logged after a step, and a line that a kill cut short: it will come again."""
        path = self.path / LOG
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] > step:
                break
            kept.append(line + "\n")
        with atomic_output(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint."""
        with atomic_output(self.checkpoint) as temporary:
            torch.save({"format": FORMAT, **state}, temporary)

    def save_model(self, state: Mapping[str, torch.Tensor], config: KGLNetConfig) -> None:
        """Writes the model as float16, as `kglmatch.Matcher.from_pretrained` reads it."""
        save_model(self.path / MODEL, state, config)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, tensors on the CPU.

    Raises:
        WeightsError: it is missing, damaged, or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"cannot read the checkpoint {path}: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is no checkpoint of this version of kglmatch; start a new run in another folder "
            f"(`init` takes the {MODEL}/ folder next to it)"
        )
    return state
