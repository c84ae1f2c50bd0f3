"""Pipelines: from a prompt to pixels, and from a batch to a loss."""

import gc

# Nearly all objects that these imports make stay: a fifth of the time would go to looking for
# garbage among them.
_is_collecting = gc.isenabled()
gc.disable()
try:
    from diffnext.pipelines.nova import NOVAPipeline
finally:
    if _is_collecting:
        gc.enable()

__all__ = ["NOVAPipeline"]
