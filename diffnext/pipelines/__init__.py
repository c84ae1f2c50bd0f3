"""Pipelines: from a prompt to pixels, and from a batch to a loss."""

from diffnext.pipelines.nova import NOVAPipeline

__all__ = ["NOVAPipeline"]
