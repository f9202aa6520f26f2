"""Serving: requests that arrive at any time share the steps of one batch."""

from fastdiff.engine.engine import Engine
from fastdiff.engine.report import EngineReport
from fastdiff.engine.request import Request

__all__ = ["Engine", "EngineReport", "Request"]
