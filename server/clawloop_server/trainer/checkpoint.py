"""A checkpoint is one safetensors file: tensors by name, and one JSON text in its metadata. No pickle.

One file is published by one rename, so that there is never half a checkpoint. Knows no model and no optimizer.
Format: docs/training.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clawloop_shared.errors import StorageError
from clawloop_shared.files import publish

KEY = "clawloop"


def write_checkpoint(path: Path, tensors: dict[str, Tensor], *, text: str) -> None:
    """Publish `tensors` and `text` as the file `path` (0600).

    Raises:
        StorageError: it could not be written; a file that was there is still there.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    publish(path, save(plain, metadata={KEY: text}), mode=0o600)


def read_text(path: Path) -> str:
    """The text of a checkpoint alone.

    Raises:
        StorageError: no such file, or not one of ours.
    """
    return _opened(path, lambda file: [])[1]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    """What `write_checkpoint` was given.

    Raises:
        StorageError: no such file, or not one of ours.
    """
    found, text = _opened(path, lambda file: [(name, file.get_tensor(name)) for name in file.keys()])  # noqa: SIM118
    return dict(found), text


def _opened(path: Path, read: Callable[[Any], list[tuple[str, Tensor]]]) -> tuple[list[tuple[str, Tensor]], str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = read(file)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"checkpoint {path} cannot be read: {error}; restore it from a backup") from error
    if KEY not in metadata:
        raise StorageError(f"{path} is a safetensors file, but not a checkpoint of clawloop")
    return tensors, metadata[KEY]


def remove_drafts(folder: Path) -> None:
    """Remove what a crash left of checkpoints that were being written; nobody else writes them."""
    for draft in folder.glob(".*.safetensors.*"):
        draft.unlink()
