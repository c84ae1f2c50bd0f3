"""From examples to records: latents, and captions or text states.

The result for an example does not depend on the rest of its batch: batches have one shape.

Shapes: B examples, C latent channels, T latent frames, h w latent size, F frames, H W pixels,
n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffnext.data.caching.errors import CacheError, Skipped
from diffnext.data.caching.examples import Example
from diffnext.data.caching.settings import CacheSettings, format_size
from diffnext.models.autoencoders.loading import find_autoencoder, load_autoencoder
from diffnext.models.text_encoders.encoding import tokenize
from diffnext.utils.component_files import component_files

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
TOKEN_STEP = 32  # texts are encoded in lengths that are multiples of this


class LatentEncoder:
    """The autoencoder of a build.

    Args:
        settings: Settings of the build.

    Raises:
        CacheError: If there is no autoencoder, or sizes or frames do not suit it.
    """

    def __init__(self, settings: CacheSettings) -> None:
        dtype = getattr(torch, settings.dtype)
        try:
            self.vae = load_autoencoder(settings.vae, dtype, settings.device)
        except (OSError, ValueError, RuntimeError) as error:
            raise CacheError(f"vae: {error}") from error
        self._check_frames(settings)
        self._check_sizes(settings)
        self._batch_size = settings.batch_size

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Moments of pictures or clips of one size, as they are stored.

        Args:
            pixels: B pictures (H, W, 3), or clips (F, H, W, 3), uint8; at most a batch.

        Returns:
            B arrays (2C, h, w), or (2C, T, h, w), float16; infinite or NaN where float16, or the
            dtype of the computation, overflows.
        """
        missing = self._batch_size - len(pixels)
        whole = [*pixels, *[pixels[-1]] * missing]
        x = torch.from_numpy(np.stack(whole)).to(self.vae.device).to(self.vae.dtype)
        x = x.movedim(-1, 1).sub(127.5).div(127.5)
        moments = self.vae.encode(x).latent_dist.parameters
        return list(moments[: len(pixels)].half().cpu().numpy())

    def _check_frames(self, settings: CacheSettings) -> None:
        if settings.kind == "images":
            return
        if not hasattr(self.vae, "latent_length"):
            raise CacheError(f"vae: {type(self.vae).__name__} encodes no videos")
        try:
            self.vae.latent_length(settings.frames.num_frames)
        except ValueError as error:
            raise CacheError(f"num_frames: {error}") from error

    def _check_sizes(self, settings: CacheSettings) -> None:
        ratio = getattr(self.vae, "spatial_compression_ratio", None)
        ratio = ratio or 2 ** (len(self.vae.config.block_out_channels) - 1)
        for size in settings.sizes:
            if size[0] % ratio or size[1] % ratio:
                raise CacheError(
                    f"sizes must be multiples of {ratio} pixels, which become one latent; "
                    f"got {format_size(size)}"
                )


class TextStates:
    """The text encoder of a build.

    Args:
        folder: Release folder.
        settings: Settings of the build.

    Raises:
        CacheError: If the folder has no text encoder and tokenizer.
    """

    def __init__(self, folder: Path, settings: CacheSettings) -> None:
        from transformers import AutoTokenizer

        from diffnext.models.text_encoders.phi import PhiEncoderModel

        for name in TEXT_COMPONENTS:
            if not (folder / name).is_dir():
                raise CacheError(f"text_encoder: {folder} has no folder {name}")
        folders = [str(folder / name) for name in TEXT_COMPONENTS]
        dtype = getattr(torch, settings.dtype)
        try:
            for path in folders:
                component_files(Path(path))
            model = PhiEncoderModel.from_pretrained(folders[0], dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(folders[1], trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise CacheError(f"text_encoder: {error}") from error
        self.model = model.eval().requires_grad_(False).to(settings.device)
        self.length = settings.text_length
        self.width = self.model.config.hidden_size
        self._rows = 2 * settings.batch_size

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """States of texts: arrays (n, D), float16."""
        states = [np.empty((0, self.width), np.float16) for _ in texts]
        by_length: dict[int, list[int]] = {}
        vocabulary = self.model.config.vocab_size
        ids = tokenize(self.tokenizer, list(texts), self.length, vocabulary)
        for place, row in enumerate(ids):
            if row:
                by_length.setdefault(-(-len(row) // TOKEN_STEP), []).append(place)
        for steps, places in by_length.items():
            for start in range(0, len(places), self._rows):
                batch = places[start : start + self._rows]
                length = min(steps * TOKEN_STEP, self.length)
                found = self._encode([ids[place] for place in batch], length)
                for place, state in zip(batch, found, strict=True):
                    states[place] = state[: len(ids[place])]
        return states

    @torch.inference_mode()
    def _encode(self, ids: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """States of the tokens of texts, (B, length, D); padding does not change them."""
        padded = torch.zeros(self._rows, length, dtype=torch.int64)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(list(tokens))
        states = self.model(padded.to(self.model.device)).last_hidden_state
        return states[: len(ids)].half().cpu().numpy()


def vae_folder(settings: CacheSettings) -> Path:
    """The folder of the autoencoder itself.

    Raises:
        CacheError: If there is none.
    """
    try:
        return find_autoencoder(settings.vae)
    except (OSError, ValueError) as error:
        raise CacheError(f"vae: {error}") from error


def pack_states(states: np.ndarray | None) -> dict[str, Any]:
    """Text states as a record holds them; None is an absent short caption."""
    if states is None:
        return {"data": b"", "shape": []}
    return {"data": states.tobytes(), "shape": list(states.shape)}


def record_features(settings: CacheSettings) -> dict[str, Any]:
    """The descriptor of the records of a build."""
    text = "string" if settings.text_encoder is None else {"data": "bytes", "shape": ["int64"]}
    captions = {"label": "int64"} if settings.labels else {"caption": text, "text": text}
    flow = {"flow": "float64"} if settings.kind == "videos" else {}
    return {"moments": "bytes", **captions, "shape": ["int64"], **flow, "source": "string"}


def make_records(
    examples: Sequence[Example],
    settings: CacheSettings,
    encoder: LatentEncoder,
    text_states: TextStates | None,
) -> list[dict[str, Any] | Skipped]:
    """Encode a batch of examples of one size.

    Args:
        examples: Decoded examples; at most a batch.
        settings: Settings of the build.
        encoder: Autoencoder.
        text_states: Text encoder, or None to store the captions themselves.

    Returns:
        For each example its record, or the reason why it has none.

    Raises:
        CacheError: If the batch does not fit in the memory of a GPU.
    """
    try:
        latents = encoder.encode([example.pixels for example in examples])
        captions = _make_captions(examples, settings, text_states)
    except torch.OutOfMemoryError as error:
        raise CacheError(
            f"{settings.batch_size} examples at once do not fit in the memory of "
            f"{settings.device}: use a smaller --batch-size"
        ) from error
    records: list[dict[str, Any] | Skipped] = []
    for example, moments, texts in zip(examples, latents, captions, strict=True):
        if not np.isfinite(moments).all():
            reason = f"its latents are not finite when they are computed in {settings.dtype}"
            records.append(Skipped(example.source, reason))
            continue
        flow = {"flow": example.flow} if settings.kind == "videos" else {}
        shape = list(moments.shape)
        record = {"moments": moments.tobytes(), **texts, "shape": shape, **flow}
        records.append({**record, "source": example.source})
    return records


def _make_captions(
    examples: Sequence[Example], settings: CacheSettings, text_states: TextStates | None
) -> list[dict[str, Any]]:
    annotations = [example.annotation for example in examples]
    if settings.labels:
        return [{"label": annotation.label} for annotation in annotations]
    if text_states is None:
        return [{"caption": a.caption, "text": a.text} for a in annotations]
    # Training chooses between these states as it would between the texts.
    texts = [text for a in annotations for text in (a.caption, a.short_caption)]
    states = text_states.encode(texts)
    return [
        {
            "caption": pack_states(states[2 * i]),
            "text": pack_states(states[2 * i + 1] if annotation.short_caption else None),
        }
        for i, annotation in enumerate(annotations)
    ]
