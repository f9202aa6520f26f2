"""fastdiff: a kernel-backed sampling engine for diffusion and flow models."""

from fastdiff.accelerate import Report, accelerate, report, undo
from fastdiff.artefact import load, save
from fastdiff.cache import Cache
from fastdiff.carry import Carry, Hook
from fastdiff.guidance import CFG
from fastdiff.loop import NonFiniteError
from fastdiff.ops import backend
from fastdiff.pipeline import PipelineReport, as_fast
from fastdiff.plan import Plan, RowSettings
from fastdiff.process import (
    VE,
    Flow,
    Level,
    MeanReverting,
    Process,
    SubVP,
    TrigFlow,
    VPCosine,
    VPDiscrete,
    VPLinear,
    convert,
    discrete_alphas,
)
from fastdiff.quant import CalibrationSet, QuantConfig
from fastdiff.quant.evaluate import evaluate
from fastdiff.quantized import GateError, quantize
from fastdiff.sampler import Cancelled, Sampler, Step
from fastdiff.solvers import SOLVERS, Solver, SolverTable
from fastdiff.solvers.adaptive import denoiser, solve_adaptive
from fastdiff.solvers.from_scheduler import from_scheduler
from fastdiff.steering import AdaptiveGuidance

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`FastdiffConfig` is made when it is asked for: it needs diffusers, and registers with it."""
    if name == "FastdiffConfig":
        from fastdiff.pipeline.quantizer import FastdiffConfig

        return FastdiffConfig
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")


__all__ = [
    "CFG",
    "SOLVERS",
    "VE",
    "AdaptiveGuidance",
    "Cache",
    "CalibrationSet",
    "Cancelled",
    "Carry",
    "Flow",
    "GateError",
    "Hook",
    "Level",
    "MeanReverting",
    "NonFiniteError",
    "PipelineReport",
    "Plan",
    "Process",
    "QuantConfig",
    "Report",
    "RowSettings",
    "Sampler",
    "Solver",
    "SolverTable",
    "Step",
    "SubVP",
    "TrigFlow",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "accelerate",
    "as_fast",
    "backend",
    "convert",
    "denoiser",
    "discrete_alphas",
    "evaluate",
    "from_scheduler",
    "load",
    "quantize",
    "report",
    "save",
    "solve_adaptive",
    "undo",
]
