"""Checkpoint folders of the Hugging Face Trainer: ``checkpoint-500`` with weights, optimizer and what else it keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from incckpt.errors import CorruptionError
from incckpt.interchange.foreign import Foreign
from incckpt.interchange.safetensors_files import INDEX_SUFFIX, files_of_index, read_safetensors
from incckpt.interchange.torch_files import read_torch_file

__all__ = ["MODEL_FILES", "is_model_folder", "read_folder"]

MODEL_FILES: Final = (
    "model.safetensors", f"model{INDEX_SUFFIX}", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
"""The files that a model's weights begin with; the first one that is there counts."""

_PARTS: Final = {
    "optimizer.pt": "optimizer", "optimizer.bin": "optimizer",
    "scheduler.pt": "scheduler", "scheduler.bin": "scheduler", "scaler.pt": "scaler", "rng_state.pth": "rng_state",
}  # fmt: skip
_DOCUMENTS: Final = ("config.json", "generation_config.json", "adapter_config.json", "trainer_state.json")


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds the weights of a model, under one of the usual names."""
    return any((path / name).is_file() for name in MODEL_FILES)


def read_folder(path: Path, *, allow_pickle: bool) -> Foreign:
    """Return what a folder holds: ``model``, and what lies beside it under the names of the Trainer.

    JSON documents (the configuration, the Trainer's state) are plain values. Metrics that the Trainer logged at the
    folder's step become those of the checkpoint.

    Raises
    ------
    PickleRefusedError
        If a file needs `allow_pickle`.
    CorruptionError
        If a file is damaged or missing.
    MissingExtraError
        Without the package safetensors, if the folder has such files.
    """
    weights = next(path / name for name in MODEL_FILES if (path / name).is_file())
    state: dict[str, Any] = {}
    files: list[Path] = []
    state["model"] = _weights(weights, files, allow_pickle)
    for name, part in _PARTS.items():
        if (path / name).is_file():
            state[part] = read_torch_file(path / name, allow_pickle=allow_pickle)
            files.append(path / name)
    for name in _DOCUMENTS:
        if (path / name).is_file():
            state[name.removesuffix(".json")] = _document(path / name)
            files.append(path / name)
    read = {file.name for file in files} | {weights.name}
    left_out = sorted(child.name for child in path.iterdir() if child.name not in read)
    return Foreign(state, tuple(files), None, tuple(left_out), _metrics(state.get("trainer_state")))


def _weights(path: Path, files: list[Path], allow_pickle: bool) -> dict[str, Any]:
    if ".safetensors" in path.name:
        files += files_of_index(path) if path.name.endswith(INDEX_SUFFIX) else [path]
        return read_safetensors(path)
    if path.suffix == ".bin":
        files.append(path)
        return _checked(path, read_torch_file(path, allow_pickle=allow_pickle))
    shards = files_of_index(path)
    files += shards
    tensors: dict[str, Any] = {}
    for shard in shards:
        tensors.update(_checked(shard, read_torch_file(shard, allow_pickle=allow_pickle)))
    return tensors


def _checked(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptionError(f"{path} holds no weights by name, but a {type(value).__name__}")
    return value


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptionError(f"{path} is no JSON document: {error}") from error


def _metrics(state: Any) -> dict[str, float]:
    """Return what the Trainer logged at the step of its state, its evaluation say."""
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        return {}
    metrics: dict[str, float] = {}
    for entry in state["log_history"]:
        if isinstance(entry, dict) and entry.get("step") == state.get("global_step"):
            for name, value in entry.items():
                if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                    metrics[name] = float(value)
    return metrics
