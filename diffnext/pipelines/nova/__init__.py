"""NOVA pipelines."""

from diffnext.pipelines.nova.pipeline_nova import NOVAPipeline

__all__ = ["NOVAPipeline"]
