"""Engine states of format 2: PyTorch's distributed checkpoints, read without running them."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

# What the metadata of a state consists of; all of it is plain data.
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in _MODULES or (module, name) in _NAMES or is_dtype:
            found = super().find_class(module, name)
            if isinstance(found, type | torch.dtype) or name == "_get_layout":
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class _PlainReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _PlainUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(".metadata is of another kind")
        return metadata


class _PlainPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


def read_engine_folder(folder: Path) -> dict[str, Tensor] | None:
    """All tensors of a state, whole, by name.

    Args:
        folder: ``state/engine`` of a checkpoint.

    Returns:
        The tensors as engine_state.py names them; None if there is no such state, or DeepSpeed
        wrote it.

    Raises:
        Exception: Of many kinds, if it is damaged or holds anything but tensors.
    """
    if not (folder / ".metadata").is_file():
        return None
    reader = _PlainReader(folder)
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single process is no reason to warn
        dcp.load(tensors, storage_reader=reader, planner=_PlainPlanner(), no_dist=True)
    return tensors


__all__ = ["read_engine_folder"]
