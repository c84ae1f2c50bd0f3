"""Examples as the training guide writes them, with tiny latents."""

import numpy as np

FEATURES = {
    "moments": "bytes",
    "shape": ["int64"],
    "caption": "string",
    "text": "string",
    "flow": "float64",
}


def make_example(number: int, shape: tuple[int, ...] = (2, 3, 4)) -> dict:
    """Return an example whose values all tell its number."""
    return {
        "moments": np.full(shape, number, dtype=np.float16),
        "shape": shape,
        "caption": f"Long caption {number}.",
        "text": f"Short {number}",
        "flow": number,
    }
