"""Motion strength: how far things move in a clip, as one number.

Shapes: F frames, H W pixels, h w size of the reduced frames, n corners.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffnext.data.caching.errors import CacheError

HEIGHT = 480  # pixels of the frames that are compared
FLOW_UNIT = f"pixels at {HEIGHT} height"

# The values with which the authors of NOVA measured the clips that their models learnt from.
CORNERS: dict[str, Any] = {
    "maxCorners": 100,
    "qualityLevel": 0.1,
    "blockSize": 7,
    "minDistance": 7,
}
TRACKING: dict[str, Any] = {"winSize": (15, 15), "maxLevel": 3}
CHANGED = 1  # levels of 255 by which a place must differ to be looked at
STILL = 0.5  # pixels; noise and rounding shift still things by less
FOUND_AGAIN = 2.0  # pixels between a corner and where the way back from its new place ends
CUT = 0.25  # share of corners that are found again, below which two frames show different things


def estimate_flow(frames: np.ndarray) -> float:
    """How far moving things move from one frame to the next.

    Corners of the places that change are tracked with pyramidal Lucas-Kanade, and the distances of
    those that move are averaged, first over each pair of frames, then over the pairs. Pairs where
    nothing moves count as 0; pairs on both sides of a cut do not count.

    Args:
        frames: (F, H, W, 3), uint8.

    Returns:
        Pixels at a height of 480; 0 for a single frame.

    Raises:
        CacheError: If OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise CacheError(
            "motion is measured with OpenCV: `pip install opencv-python-headless`, or --flow X"
        ) from error
    cv2.setNumThreads(1)  # many clips are decoded at once
    grey = [_reduce(cv2, frame) for frame in frames]
    pairs = [_compare(cv2, *pair) for pair in zip(grey, grey[1:], strict=False)]
    distances = [distance for distance in pairs if distance is not None]
    return float(np.mean(distances)) if distances else 0.0


def _reduce(cv2: Any, frame: np.ndarray) -> np.ndarray:
    """A frame in grey at the common height, (h, w)."""
    height, width = frame.shape[:2]
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    method = cv2.INTER_AREA if height > HEIGHT else cv2.INTER_CUBIC
    return cv2.resize(grey, size, interpolation=method)


def _compare(cv2: Any, first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean distance of moving corners between two grey frames, (h, w); None across a cut."""
    # A lamp that flickers, or a fade, is not motion.
    second = cv2.convertScaleAbs(second, alpha=max(first.mean(), 1) / max(second.mean(), 1))
    corners = cv2.goodFeaturesToTrack(first, mask=_changes(cv2, first, second), **CORNERS)
    if corners is None:
        return 0.0
    moved, found, _ = cv2.calcOpticalFlowPyrLK(first, second, corners, None, **TRACKING)
    back, _, _ = cv2.calcOpticalFlowPyrLK(second, first, moved, None, **TRACKING)
    found = found.ravel() == 1
    if np.mean(found & (_distances(back, corners) < FOUND_AGAIN)) < CUT:
        return None
    distances = _distances(moved, corners)[found]
    moving = distances[distances > STILL]
    return float(moving.mean()) if len(moving) else 0.0


def _changes(cv2: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Places near a change, (h, w): corners elsewhere would hide a small thing that moves."""
    difference = cv2.blur(cv2.absdiff(first, second), (7, 7))
    return cv2.dilate((difference > CHANGED).astype(np.uint8), np.ones((15, 15), np.uint8))


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Between corners (n, 1, 2) and as many others: (n,)."""
    return np.linalg.norm((points - others).reshape(-1, 2), axis=1)
