from fastdiff.acceleration import Report, accelerate, report, undo
from fastdiff.artefact import load, save
from fastdiff.cache import Cache
from fastdiff.carry import Carry, Hook
from fastdiff.engine import Engine
from fastdiff.guidance import CFG
from fastdiff.imported import import_weights
from fastdiff.loop import NonFiniteError
from fastdiff.ops import backend
from fastdiff.pipeline import PipelineReport, as_fast
from fastdiff.pipeline.quantizer import FastdiffConfig
from fastdiff.pipeline.serving import PipelineEngine
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

__version__: str

__all__ = [
    "CFG",
    "SOLVERS",
    "VE",
    "AdaptiveGuidance",
    "Cache",
    "CalibrationSet",
    "Cancelled",
    "Carry",
    "Engine",
    "FastdiffConfig",
    "Flow",
    "GateError",
    "Hook",
    "Level",
    "MeanReverting",
    "NonFiniteError",
    "PipelineEngine",
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
    "import_weights",
    "load",
    "quantize",
    "report",
    "save",
    "solve_adaptive",
    "undo",
]
