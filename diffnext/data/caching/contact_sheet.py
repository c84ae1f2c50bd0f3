"""A picture of some examples of a dataset, decoded, each with its caption.

Shapes: C latent channels, T latent frames, h w latent size, F frames, H W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffnext.data.caching.errors import CacheError
from diffnext.data.flex_transforms import ParseLatents, check_features
from diffnext.data.manifest import Manifest, read_manifest
from diffnext.data.records import RecordDataset, RecordError
from diffnext.image_processor import VaeImageProcessor
from diffnext.models.autoencoders.loading import find_autoencoder, load_autoencoder
from diffnext.utils.weights_files import hash_weights

MARGIN = 4
LINES = 3  # of a caption
FRAMES = 4  # of a clip
MIN_WIDTH = 96  # of a cell, so that captions can be read


def draw_contact_sheet(
    folder: Path,
    count: int = 16,
    columns: int = 4,
    vae: Path | None = None,
    device: str = "cpu",
) -> Image.Image:
    """Decode examples evenly spaced over a dataset.

    Args:
        folder: Folder of the dataset.
        count: Examples at most.
        columns: Columns of the sheet; the cell of a clip shows four frames.
        vae: Folder of the autoencoder.
        device: Device that decodes.

    Raises:
        CacheError: If there is no autoencoder, or it is not the one of the latents, or nothing is
            asked for.
        RecordError: If a record is damaged.
    """
    if min(count, columns) < 1:
        raise CacheError(f"a sheet has 1 example and 1 column at least, got {count} and {columns}")
    with RecordDataset(folder) as dataset:
        check_features(dataset.features, str(folder))
        model = load_autoencoder(find_vae(folder, vae), torch.float32, device)
        indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
        cells = [_draw_cell(model, dataset, index) for index in indices.tolist()]
    return arrange(cells, columns)


def find_vae(folder: Path, given: Path | None = None) -> Path:
    """The folder of the autoencoder that made a dataset.

    The folder in the manifest is only shown: it may be a stranger's choice.

    Raises:
        CacheError: If it is not given, or is another one.
    """
    manifest = read_manifest(folder) or Manifest()
    if given is None:
        known = f": its manifest names {manifest.vae.folder}" if manifest.vae else ""
        raise CacheError(f"name the autoencoder of {folder} with --vae{known}")
    place = find_autoencoder(given)
    if manifest.vae_hash not in (None, hash_weights(place)):
        raise CacheError(f"{folder} was made with another autoencoder than the one in {place}")
    return place


@torch.inference_mode()
def decode_frames(vae: Any, moments: np.ndarray) -> np.ndarray:
    """Pixels of the means of latents.

    Args:
        vae: Autoencoder.
        moments: (2C, h, w) or (2C, T, h, w).

    Returns:
        (F, H, W, 3), uint8; one frame of a picture.
    """
    channels = len(moments) // 2
    mean = torch.from_numpy(moments[:channels].astype(np.float32))[None].to(vae.device)
    pixels = VaeImageProcessor.pt_to_numpy(vae.decode(mean).sample)
    return pixels.reshape(-1, *pixels.shape[-3:])


def _draw_cell(vae: Any, dataset: RecordDataset, index: int) -> Image.Image:
    example = dataset[index]
    try:
        frames = decode_frames(vae, ParseLatents()(example))
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RecordError(f"{dataset.describe(index)} cannot be decoded: {error}") from error
    return draw_cell(frames, _label(example, index))


def draw_cell(frames: np.ndarray, caption: str) -> Image.Image:
    """A picture, or some frames of a clip side by side, above its caption.

    Args:
        frames: (F, H, W, 3), uint8.
        caption: Is wrapped, and cut after three lines.
    """
    shown = frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)]
    strip = Image.fromarray(np.concatenate(list(shown), axis=1))
    font = ImageFont.load_default()
    line_height = sum(font.getmetrics()) if hasattr(font, "getmetrics") else 12
    width = max(strip.width, MIN_WIDTH)
    cell = Image.new("RGB", (width, strip.height + LINES * line_height), "white")
    cell.paste(strip, (0, 0))
    letters = max(1, int(width / font.getlength("n")))
    lines = textwrap.wrap(caption, letters)[:LINES]
    for number, line in enumerate(lines):
        position = (0, strip.height + number * line_height)
        ImageDraw.Draw(cell).text(position, line, fill="black", font=font)
    return cell


def _label(example: Mapping[str, Any], index: int) -> str:
    caption = example.get("caption")
    if "label" in example:
        caption = f"class {example['label']}"
    elif isinstance(caption, Mapping):
        caption = f"{caption['shape'][0]} cached tokens"
    flow = f", flow {example['flow']:.2g}" if "flow" in example else ""
    return f"{index}{flow}: {caption}"


def arrange(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay cells out row by row."""
    width = max(cell.width for cell in cells) + MARGIN
    height = max(cell.height for cell in cells) + MARGIN
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (MARGIN + column * width, MARGIN + row * height))
    return sheet
