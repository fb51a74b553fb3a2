"""A model's file: safetensors with a header that says which model it is."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from utils.backbones.building import build_model
from utils.backbones.classifier import PixelClassifier
from utils.utils_funcs import UserError, atomic_path, content_sha256


def save_model(
    model: PixelClassifier,
    path: Path | str,
    metadata: dict[str, object] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Atomically writes a checkpoint that `load_model` reads, as safetensors.

    Args:
        metadata: kept in the header beside the model's name, init and input size; JSON.
        state: weights to write instead of the model's (an average of them).
    """
    header = {
        "model": model.name,
        "init": model.init,
        "input_size": model.input_size,
        **(metadata or {}),
    }
    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in (state or model.state_dict()).items()
    }
    write_checkpoint(path, tensors, header)


def write_checkpoint(path: Path | str, tensors: dict[str, Tensor], header: dict) -> None:
    """Atomically writes tensors and a header that `read_metadata` reads; a hash of the tensors in
    it shows `load_model` whether the file was changed since."""
    from safetensors.torch import save_file

    header = {**header, "sha256": content_sha256(tensors)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"alzheimer": json.dumps(header)})


def save_half(checkpoint: Path | str, path: Path | str) -> None:
    """Writes a copy of a checkpoint at half its size, for the repository.

    Matrices and kernels are kept in float16; what is small and sensitive (biases, BatchNorm's
    statistics) as it is. `load_model` reads it like any other.
    """
    from safetensors.torch import load_file

    tensors = {
        key: value.half() if value.is_floating_point() and value.ndim > 1 else value
        for key, value in load_file(checkpoint).items()
    }
    write_checkpoint(path, tensors, read_metadata(checkpoint) | {"precision_of_file": "fp16"})


def read_metadata(path: Path | str) -> dict:
    """A checkpoint's header: model, init, input_size, and the metadata given to `save_model`.

    Raises:
        UserError: no such file, not a safetensors file, or not written by `save_model`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(
            f"No checkpoint at {path}: train it first (`python -m utils.experiment train --help`)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("alzheimer")
    except SafetensorError as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}): delete it and train again."
        ) from error
    if header is None:
        raise UserError(
            f"{path} was not written by this project (its header names no model): use a file that "
            "`save_model` made."
        )
    return json.loads(header)


def load_model(path: Path | str) -> PixelClassifier:
    """Restores a model, in evaluation mode and float32, from its checkpoint.

    Raises:
        UserError: see `read_metadata`; the weights were changed since they were written; or they do
            not fit the model that the header names.
    """
    from safetensors.torch import load_file

    header, tensors = read_metadata(path), load_file(path)
    if header.get("sha256", digest := content_sha256(tensors)) != digest:
        raise UserError(
            f"{path} is damaged, its weights are not those that were written: fetch it again, or "
            "delete it and train again."
        )
    model = build_model(header["model"], pretrained=False, input_size=header["input_size"])
    model.init = header["init"]
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }
    load_weights(model, state, path)
    return model.eval()


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """`load_state_dict` with a `UserError` that says which file does not fit which model."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        detail = lines[1].strip() if len(lines) > 1 else str(error)
        raise UserError(
            f"{source} does not fit {getattr(model, 'name', 'this model')} ({detail[:160]}): "
            "give the checkpoint of the same backbone."
        ) from error
