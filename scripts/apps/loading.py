"""Loading a model for a page."""

from __future__ import annotations

from pathlib import Path

import torch

from diffnext.pipelines import NOVAPipeline

__all__ = ["load_pipeline", "model_name"]


def load_pipeline(folder: Path, device_index: int, precision: str | None) -> NOVAPipeline:
    """Load a model on the GPU, or on the CPU where there is none.

    Args:
        folder: Of the model.
        device_index: Which GPU.
        precision: Name of a dtype; None is float16 on a GPU and float32 on a CPU.

    Raises:
        FileNotFoundError: If a part of it is missing.
        RuntimeError: If its weights do not fit.
        ValueError: If there is no such GPU.
    """
    device = choose_device(device_index)
    name = precision or ("float32" if device.type == "cpu" else "float16")
    pipe = NOVAPipeline.from_pretrained(folder, dtype=getattr(torch, name))
    return pipe.to(device)


def choose_device(index: int) -> torch.device:
    """The GPU of that index: CUDA, else Apple's only one; the CPU if there is none."""
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise ValueError(f"--device {index}: there are {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def model_name(model: str) -> str:
    """Name of a model for the files it draws: without the path, which is nobody's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
