"""The drop-in for diffusers. Nothing here imports diffusers before it is given one of its objects."""

from fastdiff.pipeline.attention_backend import register as register_attention_backend
from fastdiff.pipeline.drop_in_report import PipelineReport
from fastdiff.pipeline.schedulers import as_fast, fast_class

__all__ = ["PipelineReport", "as_fast", "fast_class", "register_attention_backend"]
